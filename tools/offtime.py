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


"""How long a guest is off: no process of QEMU runs it, on any host."""

import os
from pathlib import Path
import time

from tools import waiting

# Between two looks, in seconds. Measured times are exact to two of them.
POLL_SECONDS = 0.02

# How long a new process is looked at again, in seconds: a daemon forks first,
# and becomes QEMU a moment later.
NEW_SECONDS = 2

EMULATOR = b'qemu-system'
UUID_OPTION = b'-uuid'


class Observer(waiting.Observer):
    """Looks all the time which guests run.

    The hosts of the lab have no PID namespaces, so that the processes of all
    hosts are in the machine's /proc.
    """

    def __init__(self, proc: Path = Path('/proc')) -> None:
        super().__init__(POLL_SECONDS)
        self._proc = proc
        # By pid: the server that a process runs, or '' for anything else, and
        # until when to look again.
        self._known: dict[str, tuple[str, float]] = {}
        # By server: (seen at, whether it ran), one for each change.
        self._changes: dict[str, list[tuple[float, bool]]] = {}

    def look(self) -> None:
        """Note which guests run now."""
        now = time.monotonic()
        pids = set(filter(str.isdigit, os.listdir(self._proc)))
        for pid in self._known.keys() - pids:
            del self._known[pid]
        for pid in pids:
            server, until = self._known.get(pid, ('', now + NEW_SECONDS))
            if server or now < until:
                self._known[pid] = self._server(pid), until
        running = {server for server, _until in self._known.values()}
        for server in running | self._changes.keys():
            if server:
                self._note(server, now, server in running)

    def _server(self, pid: str) -> str:
        """The server whose guest a process runs, or ''.

        The command line of a process that has ended, and that its parent has
        not waited for, is empty.
        """
        try:
            words = (self._proc / pid / 'cmdline').read_bytes().split(b'\0')
        except OSError:
            return ''
        if EMULATOR not in words[0] or UUID_OPTION not in words:
            return ''
        return words[words.index(UUID_OPTION) + 1].decode()

    def _note(self, server: str, now: float, runs: bool) -> None:
        changes = self._changes.setdefault(server, [])
        if not changes or changes[-1][1] != runs:
            changes.append((now, runs))

    def off_seconds(self, server: str, since: float) -> float:
        """How long a guest has been off.

        :param since: the time.monotonic() from which to count
        """
        changes = list(self._changes.get(server, ()))
        ends = [seen for seen, _runs in changes[1:]] + [time.monotonic()]
        return sum(
            max(0.0, end - max(seen, since))
            for (seen, runs), end in zip(changes, ends) if not runs)
