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

# Nova truncates the message of a fault to 255 characters. Its own wording
# ("Migration pre-check error: ...") takes up to 35 of them.
MESSAGE_LENGTH = 220


class StorageError(Exception):
    """The base of all errors of this package.

    :ivar reason: what is wrong
    :ivar remedy: what to do about it, a sentence in the imperative; may be
        empty
    """

    def __init__(self, reason: ty.Any, remedy: str = ''):
        super().__init__(reason, remedy)
        self.reason = str(reason)
        self.remedy = remedy

    def __str__(self) -> str:
        return _join('', self.reason, self.remedy)

    def shown(self) -> str:
        """The message as Nova shows it to users, no longer than fits."""
        return _join('', self.reason, self.remedy, MESSAGE_LENGTH)


class Refused(StorageError):
    """A migration cannot be done; nothing was changed."""


class Superseded(StorageError):
    """The files on a host belong to another attempt, or to a server there."""


class NotRestored(StorageError):
    """The kept disks could not be put back; the server must not start."""


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
    """

    def __init__(self, end: str, path: str, done: int, reason: ty.Any):
        # Nova truncates messages to 255 characters, and whoever reports the
        # copy of a file names the file: drop its path here.
        reason = str(reason).replace(path, 'the volume')
        super().__init__(f'{end} failed after {done} bytes: {reason}')
        self.end = end
        self.path = path
        self.done = done


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
        place = f'host {self.host} ({self.uri}): '
        if self.file:
            place = f'{self.file} to {place}'
        return _join(place, self.reason, self.remedy, MESSAGE_LENGTH)

    def shown(self) -> str:
        """The same, which fits."""
        return str(self)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, as BaseException.add_note() of Python 3.11."""
    if hasattr(error, 'add_note'):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, '__notes__', []), note]


def _join(place: str, reason: str, remedy: str, limit: int = 0) -> str:
    """Put a message together.

    :param limit: length at which a long reason, as libvirt's may be, is cut in
        the middle rather than the remedy at the end; 0 for none
    """
    reason = ' '.join(reason.split()).rstrip('.')
    end = f'. {remedy}' if remedy else ''
    room = limit - len(place) - len(end)
    if limit and len(reason) > room >= 20:
        half = (room - 3) // 2
        reason = f'{reason[:room - 3 - half]}...{reason[-half:]}'
    return place + reason + end
