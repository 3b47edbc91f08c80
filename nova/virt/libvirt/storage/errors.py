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

"""The errors of storage migrations.

Each names its cause and, where there is one, the remedy. The host and its URI
are added once, by whoever knows them: see :class:`HostError`.
"""

import typing as ty

# Nova truncates the message of a fault to 255 characters. Its own wording,
# "Migration pre-check error: ", takes 27 of them.
MESSAGE_LENGTH = 228

# Characters that a long reason, and the name of a file, keep at least when a
# message has to be shortened.
_SHORT_REASON = 60
_SHORT_NAME = 16


class StorageError(Exception):
    """The base of all errors of this package.

    :ivar reason: what is wrong
    :ivar remedy: what to do about it, a sentence in the imperative; may be
        empty
    """

    def __init__(self, reason: ty.Any, remedy: str = ''):
        super().__init__(reason, remedy)
        self.reason = ' '.join(str(reason).split()).rstrip('.')
        self.remedy = remedy

    def __str__(self) -> str:
        return f'{self.reason}. {self.remedy}' if self.remedy else self.reason

    def shown(self) -> str:
        """The message as Nova shows it to users, cut where it is too long."""
        return _fit([''], self.reason, self.remedy)


class Refused(StorageError):
    """A migration cannot be done; nothing was changed."""


class Superseded(StorageError):
    """The files on a host belong to another attempt, or to a server there."""


class NotRestored(StorageError):
    """The kept disks could not be put back; the server must not start."""


class Unreachable(StorageError):
    """A host cannot be connected to for now, as far as is known."""


class PoolNotFound(StorageError):
    """The host has no storage pool of that name."""


class PoolInactive(StorageError):
    """The storage pool is defined on the host but not started."""


class Cancelled(StorageError):
    """A copy was told to stop."""

    def __init__(self) -> None:
        super().__init__('the copy was cancelled')


class CopyError(StorageError):
    """One end of a copy failed.

    :ivar end: 'source' or 'destination'
    :ivar path: path of the file at that end
    :ivar done: bytes that this end had dealt with
    :ivar kept: bytes that the destination has for certain
    :ivar has_ended: whether nothing reads or writes for the copy any more
    """

    def __init__(self, end: str, path: str, done: int, reason: ty.Any,
                 kept: int = 0):
        # Nova truncates messages to 255 characters, and whoever reports the
        # copy of a file names the file: drop its path here.
        reason = str(reason).replace(path, 'the volume')
        super().__init__(f'{end} failed after {done} bytes: {reason}')
        self.end = end
        self.path = path
        self.done = done
        self.kept = kept
        self.has_ended = True


class HostError(StorageError):
    """An error with the host that it is about; the outermost one.

    :ivar host: address of the host
    :ivar uri: libvirt URI of the host
    :ivar file: name of the file that was copied there; may be empty
    """

    def __init__(self, host: str, uri: str, reason: ty.Any, remedy: str = '',
                 file: str = ''):
        super().__init__(reason, remedy)
        self.host = host
        self.uri = uri
        self.file = file

    def __str__(self) -> str:
        return self.shown()

    def shown(self) -> str:
        """The message, cut where it is too long for Nova."""
        # The host's name is in its URI, in most.
        short = (self.uri if self.host in self.uri else
                 f'host {self.host} ({self.uri})')
        places = [self._place(self.file, f'host {self.host} ({self.uri})'),
                  self._place(self.file, short),
                  self._place(_cut_start(self.file, _SHORT_NAME), short)]
        return _fit(places, self.reason, self.remedy)

    @staticmethod
    def _place(file: str, host: str) -> str:
        return f'{file} to {host}: ' if file else f'{host}: '


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, as BaseException.add_note() of Python 3.11."""
    if hasattr(error, 'add_note'):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, '__notes__', []), note]


def _fit(places: list[str], reason: str, remedy: str) -> str:
    """Put a message together that Nova shows as a whole.

    A long reason, as libvirt's may be, is cut in the middle rather than the
    remedy at the end.

    :param places: where it happened, in shorter and shorter words
    """
    reason = ' '.join(reason.split()).rstrip('.')
    stop = '' if reason.endswith(('?', '!')) else '.'
    end = f'{stop} {remedy}' if remedy else ''
    needed = len(end) + min(len(reason), _SHORT_REASON)
    place = next((place for place in places
                  if len(place) + needed <= MESSAGE_LENGTH), places[-1])
    room = MESSAGE_LENGTH - len(place) - len(end)
    return (place + _cut(reason, max(room, _SHORT_NAME)) + end)[
        :MESSAGE_LENGTH]


def _cut(text: str, length: int) -> str:
    """Take out of the middle of a text what is too much."""
    if len(text) <= length:
        return text
    half = (length - 3) // 2
    return f'{text[:length - 3 - half]}...{text[-half:]}'


def _cut_start(text: str, length: int) -> str:
    """The same at the start: names of files differ in their ends."""
    return text if len(text) <= length else f'...{text[-length:]}'
