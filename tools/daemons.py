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

"""Daemons without systemd: started, recorded by pid, waited for, ended."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import http.client
import os
from pathlib import Path
import signal
import socket
import subprocess
from typing import TypeVar

import psutil

from tools import processes
from tools.waiting import Failed
from tools.waiting import wait_for

T = TypeVar('T')

# How far what psutil tells of a process's start may be off, in seconds: it is
# counted from the machine's own start, whose date moves with its clock.
CLOCK_SECONDS = 2


def listening(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def answering(address: str, port: int) -> bool:
    """Whether a web server answers there, whatever it says."""
    connection = http.client.HTTPConnection(address, port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request('GET', '/')
            connection.getresponse()
        except (OSError, http.client.HTTPException):
            return False
    return True


class Daemon:
    """A process in a session of its own, with a log and a record of its pid.

    Nothing but this record says that a process is ours: stop() ends what the
    record names, and only where its start time is still the recorded one.
    """

    def __init__(self, name: str, directory: Path):
        self.name = name
        self.log = directory / f'{name}.log'
        self.record = directory / f'{name}.pid'

    @property
    def pid(self) -> int | None:
        """The running process's pid, None where there is none."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid, start = self.record.read_text().split()
            process = psutil.Process(int(pid))
            late = abs(process.create_time() - float(start))
            if late < CLOCK_SECONDS and processes.runs(process):
                return process.pid
        return None

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None,
              cwd: str = '/') -> None:
        """Start it, unless it runs already."""
        if self.pid is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open('ab') as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**base_environment(), **(env or {})}, cwd=cwd,
                start_new_session=True)
        self.remember(process.pid)

    def remember(self, pid: int) -> None:
        """Record a process that runs."""
        start = psutil.Process(pid).create_time()
        self.record.write_text(f'{pid} {start}\n')

    def wait(self, what: str, probe: Callable[[], T],
             seconds: float = 60) -> T:
        """Wait for a sign of life of this daemon.

        :raises Failed: with the end of its log, where it ended instead or
            took too long.
        """
        def alive_and_ready() -> T:
            answer = probe()
            # Another process may be what answers.
            if self.pid is None:
                raise Failed('it ended')
            return answer

        try:
            return wait_for(what, alive_and_ready, seconds)
        except Failed as e:
            raise Failed(f'{self.name}: {e}\n{self.tail()}') from None

    def stop(self, seconds: float = 20) -> None:
        """End it and the processes of its session; no error where none run."""
        stop([self], seconds)

    def tail(self, lines: int = 30) -> str:
        """The last lines of its log."""
        try:
            text = self.log.read_text(errors='replace')
        except OSError:
            return ''
        return '\n'.join(text.splitlines()[-lines:])


def stop(daemons: Iterable[Daemon], seconds: float) -> None:
    """End daemons side by side; by force, what is left after so long."""
    pids = {daemon: daemon.pid for daemon in daemons}
    groups = [pid for pid in pids.values() if pid is not None]
    for signum, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10)):
        groups = [pid for pid in groups if not gone(pid)]
        for pid in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signum)
        with contextlib.suppress(Failed):
            wait_for('the end of daemons', lambda: all(map(gone, groups)),
                     patience)
            break
    else:
        raise Failed(f'these process groups do not end: {groups}')
    for daemon in pids:
        daemon.record.unlink(missing_ok=True)


def gone(pgid: int) -> bool:
    """Whether no process of a group runs any more."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pgid, os.WNOHANG)
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return True
    # A zombie whose parent is elsewhere still counts as a group to the kernel.
    return not any(_group(process.pid) == pgid
                   for process in processes.every())


def _group(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def base_environment() -> dict[str, str]:
    """What every daemon gets: nothing of the caller's but a path."""
    return {'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:'
                    '/sbin:/bin',
            'LANG': 'C.UTF-8'}
