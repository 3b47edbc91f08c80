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

"""A bound on how long libvirt may take to answer.

The keepalive of a connection ends the wait for a daemon that is gone. One
that lives and hangs, on a disk for example, answers the keepalive and not
what it was asked. libvirt can not take a request back, and closing the
connection does not end it either: whoever waits has to go on without.
"""

import contextlib
import typing as ty
import weakref

from nova.virt.libvirt.storage import threads

# What asks no daemon, and is too much in use to have a thread of its own.
_LOCAL = frozenset(['connect', 'isAlive', 'name', 'newStream'])


class Bounded:
    """A connection of libvirt's, or a pool or volume of it, as it is.

    But what asks the daemon raises TimeoutError if that takes too long. What
    was asked for may happen all the same, later.

    Streams are left alone: who copies watches them, and a thread for each
    chunk would cost more than the chunk.
    """

    def __init__(
        self, wrapped: ty.Any, seconds: float,
        family: 'weakref.WeakSet[Bounded] | None' = None,
    ):
        """Bound every wait.

        :param wrapped: libvirt's object
        :param seconds: how long an answer may take
        :param family: of all objects of the connection
        """
        self._wrapped = wrapped
        self._seconds = seconds
        self._family: weakref.WeakSet[Bounded] = (
            weakref.WeakSet() if family is None else family)
        self._family.add(self)

    def close(self) -> None:
        """Close the connection; it is given up if that takes too long.

        No pool and no volume of it can be used any more. libvirt keeps a
        connection open as long as there is one, and whoever frees the last
        of them waits for the daemon.
        """
        with contextlib.suppress(TimeoutError):
            threads.within(self._seconds, self._free)

    def _free(self) -> None:
        connection = self._wrapped
        for each in list(self._family):
            each._wrapped = None
        connection.close()

    def __getattr__(self, name: str) -> ty.Any:
        attribute = getattr(self._wrapped, name)
        if not callable(attribute) or name == 'newStream':
            return attribute

        def ask(*args: ty.Any) -> ty.Any:
            # By name: the frames of an error hold on to nothing of libvirt's.
            return getattr(self._wrapped, name)(*args)

        def call(*args: ty.Any) -> ty.Any:
            if name in _LOCAL:
                return self._wrap(ask(*args))
            return self._wrap(
                threads.within(self._seconds, lambda: ask(*args)))

        return call

    def _wrap(self, result: ty.Any) -> ty.Any:
        if isinstance(result, list):
            return [self._wrap(each) for each in result]
        if result is None or isinstance(result, (int, str, tuple, dict)):
            return result
        return Bounded(result, self._seconds, self._family)
