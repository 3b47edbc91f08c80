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

"""Proof that no ssh ran: a wire across every program that could."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools import lab as lab_module

PROGRAMS = ('/usr/bin/ssh', '/usr/bin/scp', '/usr/bin/sftp', '/usr/bin/rsync',
            '/usr/sbin/sshd')
SCRIPT = """\
#!/bin/sh
echo "$0 $*" >> {record}
echo "$0 is not to be used here" >&2
exit 1
"""


class Tripwire:
    """In a host's mount namespace, scripts in place of ssh and its like.

    One that is started writes down its command line, and fails.
    """

    def __init__(self, host: 'lab_module.Host'):
        self.host = host
        self.record = Path(host.directory) / 'tripwire.log'
        self.script = Path(host.directory) / 'tripwire'

    def lay(self) -> None:
        """Mount the script over each program; forget earlier calls."""
        self.record.write_text('')
        # Whoever starts a program, nova or root, has to be able to write.
        self.record.chmod(0o666)
        self.script.write_text(SCRIPT.format(record=self.record))
        self.script.chmod(0o755)
        for program in self.programs():
            self.host.run(['mount', '--bind', str(self.script), program])

    def lift(self) -> None:
        """Give the host its programs back."""
        for program in self.programs():
            self.host.run(['umount', program])

    def calls(self) -> list[str]:
        """The command lines that were tried."""
        return self.record.read_text().splitlines()

    @staticmethod
    def programs() -> list[str]:
        """Those that are installed, and could be started at all."""
        return [program for program in PROGRAMS if Path(program).exists()]


@contextlib.contextmanager
def laid(hosts: list['lab_module.Host']) -> Iterator[list[Tripwire]]:
    """Tripwires in all hosts, for as long as the body runs."""
    wires = [Tripwire(host) for host in hosts]
    with contextlib.ExitStack() as stack:
        for wire in wires:
            wire.lay()
            stack.callback(wire.lift)
        yield wires


def ssh_traces(host: 'lab_module.Host') -> list[str]:
    """What a host has of ssh: a daemon, a listening port, keys."""
    found = [f'sshd, process {pid}' for pid in host.sshd_pids]
    if host.listens(22):
        found.append('port 22 listens')
    keys = host.run(
        ['find', '/etc/ssh', '/var/lib/nova/.ssh', '/root/.ssh', '-type', 'f',
         '(', '-name', 'id_*', '-o', '-name', 'authorized_keys', '-o',
         '-name', 'ssh_host_*', ')'], check=False).stdout
    return found + keys.splitlines()
