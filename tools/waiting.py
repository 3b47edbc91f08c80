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

"""Waiting for something, with a bound."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import fcntl
import os
import threading
from typing import Self
from typing import TypeVar

import tenacity

T = TypeVar('T')

# Between two looks at something that is waited for.
POLL_SECONDS = 0.1


class Failed(Exception):
    """A command failed, or something did not come in time."""


def wait_for(what: str, probe: Callable[[], T], seconds: float = 60,
             poll: float = POLL_SECONDS) -> T:
    """Call until the answer is true, and return it.

    :param what: is waited for, for the error
    :param poll: seconds from one call to the next
    :raises Failed: after so many seconds.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda answer: not answer),
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_fixed(poll))
    try:
        return retrying(probe)
    except tenacity.RetryError:
        raise Failed(f'waited {seconds:.0f} s for {what}') from None


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a directory; the process before releases it first.

    The end of the process releases it too, and nothing is left behind.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Observer(threading.Thread):
    """Looks at something every few moments, for as long as a block runs."""

    def __init__(self, poll: float) -> None:
        """Do not look yet.

        :param poll: seconds between two looks
        """
        super().__init__(daemon=True)
        self._poll = poll
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(self._poll):
            self.look()

    def look(self) -> None:
        """Take one look."""
        raise NotImplementedError
