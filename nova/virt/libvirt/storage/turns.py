#
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

"""Let only a few migrations copy at once, the others wait for their turn.

A migration waits in the thread that Nova gave it, a green one under eventlet:
it takes no native thread, and nothing blocks the hub.
"""

import contextlib
import threading
import typing as ty

# Seconds after which those who wait look by themselves whether the waiting
# has ended: nobody tells the driver of every reason.
POLL_SECONDS = 1


class Queue:
    """The migrations of this host, in the order in which they came.

    The first ones may copy. When one of them leaves, whether it succeeded or
    failed, the next one moves up.
    """

    def __init__(self, most: int):
        """Begin with none.

        :param most: how many may copy at once; 0 means any number
        """
        self._most = most
        self._turns: list[Turn] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def join(self) -> ty.Iterator['Turn']:
        """Take the last place in the queue, and leave it at the end."""
        turn = Turn(self)
        with self._changed:
            self._turns.append(turn)
        try:
            yield turn
        finally:
            turn.leave()

    def look(self) -> None:
        """Have all that wait look whether their waiting has ended."""
        with self._changed:
            self._changed.notify_all()

    def _leave(self, turn: 'Turn') -> None:
        with self._changed:
            if turn in self._turns:
                self._turns.remove(turn)
                self._changed.notify_all()

    def _ahead(self, turn: 'Turn') -> int:
        with self._changed:
            if not self._most or turn not in self._turns:
                return 0
            return max(0, self._turns.index(turn) + 1 - self._most)

    def _wait(
        self, turn: 'Turn', has_ended: ty.Callable[[], bool],
    ) -> None:
        with self._changed:
            while self._ahead(turn) and not has_ended():
                self._changed.wait(POLL_SECONDS)


class Turn:
    """The place of one migration in the queue."""

    def __init__(self, queue: Queue):
        """Belong to a queue: see Queue.join()."""
        self._queue = queue

    @property
    def ahead(self) -> int:
        """How many have to leave before this one may copy; 0 if it may."""
        return self._queue._ahead(self)

    def wait(self, has_ended: ty.Callable[[], bool]) -> None:
        """Wait until this one may copy.

        :param has_ended: whether to wait no longer; called in this thread, at
            once after Queue.look(), and every POLL_SECONDS
        """
        self._queue._wait(self, has_ended)

    def leave(self) -> None:
        """Let the next one move up, if that was not done yet."""
        self._queue._leave(self)
