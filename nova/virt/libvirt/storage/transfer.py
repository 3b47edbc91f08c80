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

"""Take a server's disks from this host's storage pool to another host's.

Every call here blocks. In eventlet mode call it through
``nova.utils.tpool_wrap``; nothing here logs, for the same reason as in
``stream``.
"""

import contextlib
import dataclasses
import os
import tempfile
import typing as ty

from oslo_serialization import jsonutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import stream

CONF = nova.conf.CONF

# Of a server that was made from a kernel image. Nova takes them from Glance,
# which may have lost them.
BOOT_FILES = ('kernel', 'ramdisk')

# What may be in the instance directory of a server with disks in a pool, and
# has to come along as it is.
FILES = ('disk.config', *BOOT_FILES)


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk of a server that is a volume of the disks pool.

    :ivar volume: name of the volume, the same on both hosts
    :ivar format: what Nova recorded when it made the disk
    """
    volume: str
    format: str


class TransferError(Exception):
    """A volume did not arrive.

    :ivar volume: its name
    :ivar host: address of the destination
    :ivar uri: libvirt URI of the destination
    """

    def __init__(self, volume: str, host: str, uri: str, reason: str):
        super().__init__(f'{volume} to host {host} ({uri}): {reason}')
        self.volume = volume
        self.host = host
        self.uri = uri


class Transfer:
    """The disks and the instance directory of one server, on their way."""

    def __init__(
        self,
        source_uri: str,
        destination: peer.Destination,
        pool_name: str,
        directory: str,
        direct_read: bool = True,
        bandwidth: stream.Bandwidth | None = None,
    ):
        """Say what is to go where; nothing happens yet.

        :param source_uri: libvirt URI of this host
        :param pool_name: name of the disks pool
        :param directory: path of the server's instance directory
        :param direct_read: whether files may be read past libvirt
        :param bandwidth: limit that all transfers of this host share
        """
        self.destination = destination
        self._source_uri = source_uri
        self._pool_name = pool_name
        self._directory = directory
        self._record = os.path.join(directory, 'disk.info')
        self._direct_read = direct_read
        self._bandwidth = bandwidth
        self._connection: ty.Any = None
        self._source_pool: storage_pool.Pool

    def check(self, disks: list[Disk]) -> None:
        """Connect to both hosts, and check that the other takes the disks.

        Changes nothing on the other.

        :raises: peer.Unsuitable
        """
        # Not Nova's own connection: the copy would hold up what else Nova
        # has to ask libvirt.
        self._connection = peer.open_connection(self._source_uri)
        self._source_pool = self._find_source_pool()
        self._source_pool.refresh()
        needed = sum(self._source_pool.volume(disk.volume).allocation
                     for disk in disks)
        self.destination.connect()
        self.destination.check(needed, self._source_pool)

    def length(self, disks: list[Disk]) -> int:
        """Bytes that copies of the disks will have, holes included."""
        return sum(self._source_pool.volume(disk.volume).length
                   for disk in disks)

    def copy_disk(
        self, disk: Disk, cancel: stream.CancelEvent | None,
        progress: stream.Progress | None = None,
    ) -> stream.Result:
        """Copy a disk, and look whether it arrived.

        :param progress: told how far the copy is, in a thread of its own
        :raises: TransferError, errors.Cancelled
        """
        try:
            source = self._source_pool.volume(disk.volume)
            length = source.length
            volume = self.destination.create_disk(disk.volume, length)
            result = self._copy(source, length, volume, cancel, progress)
            self.destination.verify_disk(disk.volume, length)
            return result
        except errors.Cancelled:
            raise
        except Exception as error:
            raise self._error(disk.volume, error) from error

    def copy_instance_dir(
        self, disks: list[Disk], cancel: stream.CancelEvent | None,
    ) -> None:
        """Copy what belongs to the disks from the instance directory.

        That is FILES, and the record of the disks' formats with the paths
        that they have over there.

        :raises: TransferError, errors.Cancelled
        """
        name = 'disk.info'
        try:
            self._write_disk_info(disks)
            for name in FILES:
                if os.path.exists(os.path.join(self._directory, name)):
                    self._copy_file(name, cancel)
            self.destination.settle()
        except errors.Cancelled:
            raise
        except Exception as error:
            raise self._error(name, error) from error

    def copy_vtpm(
        self, path: str, cancel: stream.CancelEvent | None,
    ) -> None:
        """Copy the state of a server's vTPM, which stays here too.

        It goes into the instance directory. From there Nova's own code, which
        finishes the migration, takes it to where libvirt looks for it.

        :param path: its directory on this host
        :raises: TransferError, errors.Cancelled
        """
        name = os.path.basename(path)
        try:
            with (storage_pool.attached(
                    self._connection, f'nova-{name}-state', path) as source,
                  self.destination.vtpm() as target):
                self._copy_directory(source, target, name, cancel)
        except errors.Cancelled:
            raise
        except Exception as error:
            raise self._error('the state of the vTPM', error) from error

    def _copy_directory(
        self, source: storage_pool.Pool, parent: storage_pool.Pool,
        name: str, cancel: stream.CancelEvent | None,
    ) -> None:
        """Copy a directory, with the modes that all in it has here."""
        with self.destination.subdirectory(
                parent, name, source.permissions.mode) as target:
            for volume in source.volumes():
                if volume.is_directory:
                    with storage_pool.inside(source, volume.name) as inner:
                        self._copy_directory(
                            inner, target, volume.name, cancel)
                    continue
                length = volume.length
                file = self.destination.create_in(
                    target, volume.name, length, volume.mode)
                if length:
                    self._copy(volume, length, file, cancel)
                target.refresh()
                self.destination.verify(target, volume.name, length)

    def record_disks(self, disks: list[Disk]) -> None:
        """Add the paths over there to the record of formats, which is shared.

        :raises: OSError
        """
        formats = image.recorded_formats(self._record) | {
            self.destination_path(disk): disk.format for disk in disks}
        with tempfile.NamedTemporaryFile('w', dir=self._directory,
                                         delete=False) as record:
            record.write(jsonutils.dumps(formats) + '\n')
        os.chmod(record.name, peer.FILE_MODE)
        os.replace(record.name, self._record)

    def destination_path(self, disk: Disk) -> str:
        """Path of a disk on the destination."""
        return os.path.join(self.destination.disks_path, disk.volume)

    def close(self) -> None:
        """Close the connections to both hosts."""
        self.destination.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _find_source_pool(self) -> storage_pool.Pool:
        return storage_pool.Pool.lookup(self._connection, self._pool_name)

    def _write_disk_info(self, disks: list[Disk]) -> None:
        formats = {path: format for path, format in
                   image.recorded_formats(self._record).items()
                   if os.path.dirname(path) == self._directory}
        for disk in disks:
            formats[self.destination_path(disk)] = disk.format
        data = (jsonutils.dumps(formats) + '\n').encode()
        file = self.destination.create_file('disk.info', len(data))
        stream.copy(
            stream.MemorySource(data), stream.VolumeSink(
                file.libvirt_volume, length=len(data)),
            len(data),
            stall_seconds=CONF.libvirt.vol_upload_migration_stall_timeout)

    def _copy_file(self, name: str, cancel: stream.CancelEvent | None) -> None:
        # Through a pool here too: libvirt may have given the file to QEMU,
        # and this process can then not read it.
        with storage_pool.attached(
                self._connection,
                f'nova-{os.path.basename(self._directory)}',
                self._directory) as directory:
            source = directory.volume(name)
            length = source.length
            file = self.destination.create_file(name, length)
            self._copy(source, length, file, cancel)

    def _copy(
        self,
        source: storage_pool.Volume,
        length: int,
        volume: storage_pool.Volume,
        cancel: stream.CancelEvent | None,
        progress: stream.Progress | None = None,
    ) -> stream.Result:
        source_file = stream.open_source(
            source.libvirt_volume, length, self._direct_read)
        stall_seconds = CONF.libvirt.vol_upload_migration_stall_timeout
        with self.destination.writing(volume) as target:
            result = stream.copy(
                source_file, stream.VolumeSink(target, length=length),
                length, progress, cancel,
                bandwidth=self._bandwidth, stall_seconds=stall_seconds,
                paused=lambda: peer.start_keepalive(target.connect()))
        if CONF.libvirt.vol_upload_migration_verify == 'checksum':
            stream.compare(
                source_file, volume.libvirt_volume, length, cancel,
                stall_seconds)
        return result

    def _error(self, volume: str, error: Exception) -> TransferError:
        # What libvirt says of a connection that its keepalive has closed is
        # often no more than that a socket is closed.
        reason = (str(error) if self.destination.is_connected() else
                  f'the connection was lost: {error}')
        return TransferError(
            volume, self.destination.host, self.destination.uri, reason)


def ensure_pool(uri: str, name: str, path: str) -> str:
    """See to it that this host has an active disks pool.

    :param uri: libvirt URI of this host
    :param path: directory of the pool, if it has to be made; this process's
        user will own it
    :returns: path of its directory
    """
    connection = peer.open_connection(uri)
    try:
        return storage_pool.Pool.ensure(
            connection, name, path, _ours()).path
    finally:
        connection.close()


def delete_volumes(uri: str, pool_name: str, prefix: str) -> None:
    """Delete the volumes whose names begin with ``prefix``.

    :param uri: libvirt URI of this host
    """
    with _refreshed_pool(uri, pool_name) as pool:
        for volume in pool.volumes(prefix):
            volume.delete()


def adopt_volumes(
    uri: str, pool_name: str, prefix: str, names: list[str],
) -> None:
    """Take over volumes that another host wrote into this host's pool.

    They have to be there, and are on stable storage afterwards: the end of
    an upload leaves them in the page cache.

    :param uri: libvirt URI of this host
    :param names: of the volumes, each of which begins with ``prefix``
    :raises: libvirtError, OSError
    """
    with _refreshed_pool(uri, pool_name) as pool:
        for name in names:
            flush(pool.volume(name).path)
        flush(pool.path)
        for volume in pool.volumes(prefix + peer.CLAIM):
            volume.delete()


def ensure_cache_pool(uri: str, name: str, path: str) -> None:
    """See to it that this host has a pool of its base images.

    Other hosts read those from it that Glance has lost.

    :param uri: libvirt URI of this host
    :param name: of the pool, if there is none of the directory
    :param path: the directory
    """
    connection = peer.open_connection(uri)
    try:
        if not storage_pool.is_target(connection, path):
            storage_pool.Pool.ensure(connection, name, path, _ours())
    finally:
        connection.close()


def _ours() -> storage_pool.Permissions:
    return storage_pool.Permissions(
        os.getuid(), os.getgid(), peer.DIRECTORY_MODE)


@contextlib.contextmanager
def _refreshed_pool(
    uri: str, name: str,
) -> ty.Iterator[storage_pool.Pool]:
    """A pool as it is now, over a connection of its own."""
    connection = peer.open_connection(uri)
    try:
        pool = storage_pool.Pool.lookup(connection, name)
        pool.refresh()
        yield pool
    finally:
        connection.close()


def flush(path: str) -> None:
    """Wait until a file or directory is on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
