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

"""Commands, and the processes of this machine."""

from collections.abc import Iterable
import contextlib
import os
from pathlib import Path
import subprocess
from typing import Any

import psutil

from tools import waiting


def execute(*argv: str | os.PathLike, check: bool = True,
            **kwargs: Any) -> subprocess.CompletedProcess:
    """Run a command, captured as text.

    :raises waiting.Failed: with what it said, unless told not to check.
    """
    kwargs.setdefault('capture_output', True)
    done = subprocess.run([os.fspath(a) for a in argv], text=True, **kwargs)
    if check and done.returncode:
        said = (done.stderr or done.stdout or '').strip()
        raise waiting.Failed('%s: exit status %d: %s' % (
            ' '.join(map(str, argv)), done.returncode, said))
    return done


def find(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes of these pids, as far as they are there."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended. One whose parent forgot it has."""
    with contextlib.suppress(psutil.Error):
        return (process.is_running() and
                process.status() != psutil.STATUS_ZOMBIE)
    return False


def running(found: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended.

    psutil.wait_procs() would take the exit status of our own children, for
    which their subprocess.Popen waits, too.
    """
    return [process for process in found if runs(process)]


def every() -> list[psutil.Process]:
    """All processes of the machine that have not ended.

    psutil.process_iter() remembers processes, and misses one that has got the
    pid of another.
    """
    return running(find(psutil.pids()))


def send(found: Iterable[psutil.Process], signum: int) -> None:
    """Send a signal to processes; those that are gone have had it."""
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def name(pid: int) -> str:
    """The name of a process's program, '' where there is no such process."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name()
    return ''


def environment(pid: int) -> dict[str, str]:
    """What a process was started with, empty where there is none."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ()
    return {}


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far.

    :raises psutil.NoSuchProcess:
    """
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def page_faults(pid: int) -> int:
    """How often a process got a page of memory that it did not have yet.

    See proc_pid_stat(5); psutil does not tell.

    :raises OSError: if there is no such process
    """
    stat = Path(f'/proc/{pid}/stat').read_text()
    # The name may have spaces in it.
    return int(stat.rpartition(')')[2].split()[7])


def mount_namespace(pid: int | str) -> str | None:
    """Which mount namespace a process is in, None where there is none."""
    with contextlib.suppress(OSError):
        return os.readlink(f'/proc/{pid}/ns/mnt')
    return None


def is_traced(pid: int) -> bool:
    """Whether a process is traced, or is no more."""
    try:
        status = Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return True
    return 'TracerPid:\t0\n' not in status
