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

"""An overlay that gets a base image of another host, and does without it.

Programs do the work: call these functions in a green thread.
"""

import os
import typing as ty

from oslo_concurrency import processutils
from oslo_utils import units

from nova import exception
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt import utils as libvirt_utils

# Bytes that QEMU copies with one command.
_PIECE = 4 * units.Mi


def flatten(path: str, base: str) -> None:
    """Copy what an overlay needs of a base image, and let go of that.

    "qemu-img rebase" does the same, and reads the holes of the base image too:
    that takes minutes for some hundred GiB, while the server is off.

    An overlay whose copy ended in the middle still has the base image. This
    may be called again.

    :param path: of a qcow2 image that is not in use
    :param base: path of the raw image, whatever path the overlay names
    :raises: StorageError
    """
    try:
        _flatten(path, base)
    except (OSError, exception.NovaException,
            processutils.ProcessExecutionError) as error:
        reason = getattr(error, 'stderr', '') or str(error)
        raise errors.StorageError(
            f'base image {base} cannot be copied into {path}: '
            f'{reason.strip().splitlines()[-1]}',
            'Revert the migration.') from error


def _flatten(path: str, base: str) -> None:
    _rebase(path, '-F', 'raw', '-b', base)
    length = min(os.path.getsize(base),
                 libvirt_utils.get_disk_size(path, format='qcow2'))
    # QEMU copies on a read what the overlay does not have yet.
    processutils.execute(
        'qemu-io', '--copy-on-read', '-f', 'qcow2', path,
        process_input=''.join(
            f'read -q {offset} {size}\n' for offset, size in
            threads.off_hub(list, _data(base, length))))
    _rebase(path, '-b', '')


def _rebase(path: str, *base: str) -> None:
    """Write into the header of an overlay which base image it has."""
    processutils.execute(
        'qemu-img', 'rebase', '-u', '-f', 'qcow2', *base, path)


def _data(path: str, end: int) -> ty.Iterator[tuple[int, int]]:
    """Offset and length of what a file has that is not a hole, in pieces."""
    with open(path, 'rb') as file:
        start = stream.seek(file.fileno(), 0, os.SEEK_DATA, end)
        while start < end:
            stop = stream.seek(file.fileno(), start, os.SEEK_HOLE, end)
            for offset in range(start, stop, _PIECE):
                yield offset, min(_PIECE, stop - offset)
            start = stream.seek(file.fileno(), stop, os.SEEK_DATA, end)
