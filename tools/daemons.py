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
import os
from pathlib import Path
import signal
import socket
import subprocess
import time
from typing import TypeVar

T = TypeVar('T')

# Between two looks at something that is waited for.
POLL_SECONDS = 0.1


class Failed(Exception):
    """A daemon did not come up, or ended by itself."""


def wait_for(what: str, probe: Callable[[], T], seconds: float = 60,
             poll: float = POLL_SECONDS) -> T:
    """Call until the answer is true, and return it.

    :param poll: seconds from one call to the next
    :raises Failed: after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise Failed(f'waited {seconds:.0f} s for {what}')
        time.sleep(poll)


def listening(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def started_at(pid: int) -> str | None:
    """The kernel's start time of a process, which tells a reused pid apart."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] == 'Z' else fields[19]


def stat_fields(pid: int) -> list[str]:
    """What proc_pid_stat(5) tells of a process, from its state on.

    The first two fields are left out: the name may have spaces in it.

    :raises: OSError if there is no such process
    """
    stat = Path(f'/proc/{pid}/stat').read_text()
    return stat.rpartition(')')[2].split()


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
        try:
            pid, start = self.record.read_text().split()
        except (OSError, ValueError):
            return None
        return int(pid) if started_at(int(pid)) == start else None

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
        self.record.write_text(f'{process.pid} {started_at(process.pid)}\n')

    def wait(self, what: str, probe: Callable[[], T],
             seconds: float = 60) -> T:
        """Wait for a sign of life of this daemon.

        :raises Failed: with the end of its log, where it ended instead or
            took too long.
        """
        def alive_and_ready() -> T:
            answer = probe()
            if not answer and self.pid is None:
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
    try:
        os.waitpid(pgid, os.WNOHANG)
    except ChildProcessError:
        pass
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return True
    # A zombie whose parent is elsewhere still counts as a group to the kernel.
    return not any(_group(int(entry)) == pgid
                   for entry in os.listdir('/proc') if entry.isdigit())


def _group(pid: int) -> int | None:
    if started_at(pid) is None:
        return None
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def base_environment() -> dict[str, str]:
    """What every daemon gets: nothing of the caller's but a path."""
    return {'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:'
                    '/sbin:/bin',
            'LANG': 'C.UTF-8'}
