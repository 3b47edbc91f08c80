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

"""What the processes of a host start and open, as the kernel sees it."""

from collections.abc import Container
import os
from pathlib import Path
import re
import signal
import subprocess
from typing import Any
from typing import TYPE_CHECKING

from tools import processes
from tools import waiting

if TYPE_CHECKING:
    from tools import lab as lab_module

SECONDS = 30
CANARY = '/usr/bin/true'


class Record:
    """What strace writes down of processes of a host.

    That is each execve, also one that fails for want of the program.

    :ivar argv: starts a command that is traced from its first instruction on
    """

    def __init__(self, host: 'lab_module.Host', *calls: str):
        """Name the host; nothing is traced yet.

        :param calls: what to trace beside execve
        """
        self.host = host
        self.record = Path(host.directory) / 'trace.log'
        self.record.unlink(missing_ok=True)
        self.argv = ['strace', '-f', '-qq',
                     '-e', f'trace={",".join(("execve", *calls))}',
                     '-e', 'signal=none', '-s', '200', '-A',
                     '-o', str(self.record)]

    def programs(self) -> set[str]:
        """The names, without directories, of all that was started."""
        return {os.path.basename(path)
                for path in self._find(r'execve\("([^"]+)"')}

    def opened(self) -> set[str]:
        """The paths of all files that were opened, or were to be."""
        return set(self._find(r'open(?:at2?)?\((?:[^",]+, )?"([^"]+)"'))

    def commands(self, programs: Container[str]) -> list[str]:
        """The arguments of such programs, each a text as strace has it.

        A program that is looked for in several directories is there once.
        """
        found = self._find(r'execve\("([^"]+)", \[(.*?)\], 0x')
        return [arguments for path, arguments in found
                if os.path.basename(path) in programs and
                os.path.exists(path)]

    def _find(self, pattern: str) -> list[Any]:
        return re.findall(pattern, self.record.read_text())


class Trace(Record):
    """Traces every process of a host, and all that they start.

    A process of our own, which starts CANARY in the end, shows that it did.
    """

    _strace: subprocess.Popen
    _canary: subprocess.Popen

    def __enter__(self) -> 'Trace':
        self._canary = self.host.popen(
            ['sh', '-c', f'echo; read line; {CANARY}'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._canary.stdout is not None
        self._canary.stdout.readline()
        pids = [pid for pid in self.host.processes() if pid != self.host.pid]
        self._strace = subprocess.Popen(
            [*self.argv, *(f'--attach={pid}' for pid in pids)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True)
        waiting.wait_for(f'strace of {self.host.name}', lambda: (
            self._strace.poll() is not None or
            all(map(processes.is_traced, pids))), SECONDS)
        if self._strace.poll() is not None:
            assert self._strace.stderr is not None
            raise waiting.Failed(
                f'strace: {self._strace.stderr.read().decode()}')
        return self

    def __exit__(self, *error: object) -> None:
        self._canary.communicate(b'\n', timeout=SECONDS)
        self._strace.send_signal(signal.SIGINT)
        self._strace.communicate(timeout=SECONDS)
        if f'execve("{CANARY}"' not in self.record.read_text():
            raise waiting.Failed(f'strace of {self.host.name} saw nothing')
