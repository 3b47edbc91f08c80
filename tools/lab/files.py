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

"""A host's own /etc, and the users in it."""

import os
import shutil

from tools.lab import host
from tools.lab import namespaces
from tools import processes
from tools import waiting


class Files(namespaces.Namespaces):
    """The files that a host begins with: the machine's, and what differs."""

    def _make_directories(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for top in namespaces.MOUNTS:
            self.path(top).mkdir(parents=True, exist_ok=True)
        self.path('/run/lock').mkdir(exist_ok=True)
        self.path('/run/lock').chmod(0o1777)

    def _make_etc(self) -> None:
        etc = self.path('/etc')
        # Files vanish from it while a package is installed.
        waiting.wait_for('a copy of /etc', lambda: processes.execute(
            'cp', '-a', '/etc/.', etc, check=False).returncode == 0, poll=1)
        for name in ('libvirt', 'ssh', 'pki'):
            shutil.rmtree(etc / name, ignore_errors=True)
            (etc / name).mkdir()
        for name in ('hosts', 'hostname', 'resolv.conf'):
            (etc / name).unlink(missing_ok=True)
        (etc / 'hostname').write_text(self.name + '\n')
        (etc / 'hosts').write_text(self.lab.hosts_file())
        # Empty: a look-up that /etc/hosts cannot answer fails at once.
        (etc / 'resolv.conf').touch()

    def _make_users(self) -> None:
        ids = (self.nova_uid, self.nova_gid)
        self._set_shell('/usr/sbin/nologin')
        self._edit('/etc/shadow', 'nova', '*:19000:0:99999:7:::')
        self._edit('/etc/group', 'nova', 'x:%d:' % self.nova_gid)
        group = self.path('/etc/group').read_text().splitlines()
        for name in ('libvirt', 'kvm'):
            entry = [line for line in group if line.startswith(name + ':')]
            if not entry:
                raise waiting.Failed('there is no group %s: install '
                                     'libvirt-daemon-system' % name)
            fields = entry[0].split(':')[1:]
            fields[-1] = ','.join(filter(None, [fields[-1], 'nova']))
            self._edit('/etc/group', name, ':'.join(fields))
        for path in (host.NOVA_HOME, host.NOVA_HOME + '/instances'):
            self.path(path).mkdir(exist_ok=True)
            os.chown(self.path(path), *ids)

    def _set_shell(self, shell: str) -> None:
        ids = (self.nova_uid, self.nova_gid)
        self._edit('/etc/passwd', 'nova',
                   'x:%d:%d::%s:%s' % (*ids, host.NOVA_HOME, shell))

    def _edit(self, path: str, name: str, fields: str) -> None:
        """Set the entry of a name in one of the user databases."""
        database = self.path(path)
        lines = [line for line in database.read_text().splitlines()
                 if not line.startswith(name + ':')]
        lines.append('%s:%s' % (name, fields))
        database.write_text('\n'.join(lines) + '\n')

    def set_sudoers(self, text: str) -> None:
        """Write the host's /etc/sudoers.d/nova, if sudo accepts it."""
        checked = processes.execute('visudo', '-c', '-f', '-', input=text,
                                    check=False)
        if checked.returncode:
            raise waiting.Failed('visudo: ' + checked.stderr.strip())
        path = self.path('/etc/sudoers.d/nova')
        path.unlink(missing_ok=True)
        path.touch(mode=0o440)
        path.write_text(text)
        path.chmod(0o440)
