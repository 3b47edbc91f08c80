# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""ssh: only where the way without it is to be compared with it."""

import os
from pathlib import Path
import shutil

from tools.lab import files
from tools.lab import host
from tools import processes
from tools import waiting

SSHD_CONF = """\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowUsers nova
UsePAM no
Subsystem sftp internal-sftp
"""

SSH_CLIENT_CONF = """\
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    BatchMode yes
"""


class Sshd(files.Files):
    """The ssh daemon of a host, and nova's keys."""

    def start_sshd(self, key: Path) -> None:
        """Let nova log in on this host with the key, and from it."""
        home = self.path(host.NOVA_HOME) / '.ssh'
        home.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(key, home / 'id_ed25519')
        shutil.copy(key.with_suffix('.pub'), home / 'authorized_keys')
        (home / 'config').write_text(SSH_CLIENT_CONF)
        for path in (home, *home.iterdir()):
            os.chown(path, self.nova_uid, self.nova_gid)
            path.chmod(0o700 if path == home else 0o600)
        self._set_shell('/bin/bash')
        if not self.sshd_pids:
            self._start_sshd()

    def _start_sshd(self) -> None:
        etc = self.path('/etc/ssh')
        (etc / 'sshd_config').write_text(SSHD_CONF)
        make_key(etc / 'ssh_host_ed25519_key', self.name)
        self.path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
        self.daemon(['/usr/sbin/sshd', '-D', '-e'], 'sshd.log')
        waiting.wait_for(
            'sshd of ' + self.name, lambda: self.listens(host.SSH_PORT),
            host.START_TIMEOUT, poll=0.02)

    def stop_sshd(self) -> None:
        """End sshd and remove every key and the login shell."""
        self.end(self.sshd_pids)
        self._set_shell('/usr/sbin/nologin')
        for directory in (host.NOVA_HOME + '/.ssh', '/etc/ssh', '/run/sshd'):
            shutil.rmtree(self.path(directory), ignore_errors=True)
        self.path('/etc/ssh').mkdir(exist_ok=True)

    @property
    def sshd_pids(self) -> list[int]:
        """The host's sshd with the sessions that it has."""
        return self.running('sshd')


def make_key(path: Path, comment: str) -> None:
    """Make a key of ssh's, where it is missing."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        processes.execute('ssh-keygen', '-q', '-t', 'ed25519', '-N', '',
                          '-C', comment, '-f', path)
