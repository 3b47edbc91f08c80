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

"""Fetch a file from another host: a base image that Glance has lost.

Every call here blocks. In eventlet mode call it through
``nova.utils.tpool_wrap``.
"""

import contextlib
import os
import typing as ty

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import stream

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF


class FetchError(errors.StorageError):
    """A file did not come.

    :ivar path: its path
    :ivar host: the other host
    :ivar uri: libvirt URI of the other host
    """

    def __init__(self, path: str, host: str, uri: str, reason: ty.Any):
        super().__init__(
            f'{path} from host {host} ({uri}): {reason}. Glance does not have '
            f'it. Check that host {host} does, and that libvirt listens there')
        self.path = path
        self.host = host
        self.uri = uri


def fetch(
    local_uri: str,
    host: str,
    uri: str,
    path: str,
    pool_name: str,
    bandwidth: stream.Bandwidth | None = None,
) -> stream.Result:
    """Fetch a file that has the same path on both hosts.

    It is there when it is whole and on stable storage. A file that somebody
    else puts there meanwhile stays, and is as good.

    :param local_uri: libvirt URI of this host
    :param host: the other host
    :param uri: its libvirt URI
    :param path: of the file; nova-compute owns its directory
    :param pool_name: of the pool that is made of the directory on either host
        for as long as it takes, if there is none
    :param bandwidth: limit that all transfers of this host share
    :raises: FetchError
    """
    try:
        with (_directory(local_uri, path, pool_name) as here,
              _directory(uri, path, pool_name) as there):
            source = there.volume(os.path.basename(path))
            return _fetch(source, here, path, bandwidth)
    except (libvirt.libvirtError, errors.CopyError, OSError) as error:
        raise FetchError(path, host, uri, error) from error


@contextlib.contextmanager
def _directory(
    uri: str, path: str, pool_name: str,
) -> ty.Iterator[storage_pool.Pool]:
    """A pool of the directory of a file, over a connection of its own."""
    connection = daemon.open_connection(uri)
    try:
        with storage_pool.at(
                connection, path=os.path.dirname(path),
                name=pool_name) as pool:
            pool.refresh()
            yield pool
    finally:
        connection.close()


def _fetch(
    source: storage_pool.Volume,
    pool: storage_pool.Pool,
    path: str,
    bandwidth: stream.Bandwidth | None,
) -> stream.Result:
    name = os.path.basename(path) + '.part'
    for leftover in pool.volumes(name):
        leftover.delete()
    length = source.length
    part = pool.create_volume(name, length, storage_pool.Permissions(
        os.geteuid(), os.getegid(), layout.FILE_MODE))
    try:
        result = stream.copy(
            stream.VolumeSource(source.libvirt_volume),
            stream.VolumeSink(part.libvirt_volume, length=length),
            length, bandwidth=bandwidth,
            stall_seconds=CONF.libvirt.vol_upload_migration_stall_timeout)
        _put_in_place(part.path, path, length)
        return result
    finally:
        part.delete()


def _put_in_place(part: str, path: str, length: int) -> None:
    """Give a file that has come its name.

    libvirt lets a volume be deleted while it is being written, and reports
    success in the end.
    """
    size = os.path.getsize(part)
    if size != length:
        raise OSError(f'it has {size} bytes after {length} were written')
    layout.flush(part)
    with contextlib.suppress(FileExistsError):
        os.link(part, path)
    layout.flush(os.path.dirname(path))
