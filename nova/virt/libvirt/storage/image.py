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

"""The image backend of disks that are volumes of a libvirt storage pool.

The pool is a directory that nova-compute owns, so that Nova's own Qcow2
backend makes a new disk in it. Three things differ from a disk in the instance
directory: its path, where its format is recorded, and that its format is never
guessed from what a guest may have written.

A disk in a pool is always a qcow2 image. libvirtd reads the first bytes of
every file of a pool, as root, and opens what a header there names. The header
of an image is QEMU's; the first bytes of a raw disk are the guest's.
"""

import glob
import os

from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_utils import fileutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova import exception
from nova.i18n import _
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The image types whose disks can be volumes of a pool.
IMAGE_TYPES = ('default', 'raw', 'flat', 'qcow2')

# Nova makes these with its raw backend in the instance directory, whatever
# the image type of the other disks.
_NEVER_IN_POOL = ('disk.config', *layout.BOOT_FILES)


def is_in_pool(path: str) -> bool:
    """Whether a path is that of a volume in this host's pool."""
    return os.path.dirname(path) == CONF.libvirt.disks_pool_path.rstrip('/')


def list_overlays() -> list[str]:
    """Paths of the disks here that may have a base image.

    They are volumes, and disks that are kept for the revert of a migration;
    Nova lists the files in instance directories itself. Where the record of
    formats cannot be read, each image is one.
    """
    return [path for record in _records() for path in _list_overlays(record)
            if os.path.isfile(path)]


def list_raw() -> list[str]:
    """Paths of the volumes here that are raw disks."""
    return [path for record in _records()
            for path, disk_format in _read(record).items()
            if disk_format == 'raw' and is_in_pool(path) and
            os.path.isfile(path)]


def _records() -> list[str]:
    return glob.glob(os.path.join(
        glob.escape(CONF.instances_path), '*', layout.RECORD))


def _list_overlays(record: str) -> list[str]:
    directory = os.path.dirname(record)
    formats = _read(record)
    if not formats:
        return _list_images(directory)
    images = [path for path, disk_format in formats.items()
              if disk_format == 'qcow2']
    # The record of a kept directory says where its files were before.
    kept = [os.path.join(directory, os.path.basename(path))
            for path in images if layout.is_kept(directory)]
    return [*filter(is_in_pool, images), *kept]


def _read(record: str) -> dict[str, str]:
    """The formats in a record; none if it cannot be read."""
    try:
        return layout.read_record(record)
    except errors.StorageError as error:
        LOG.error('%s', error)
        return {}


def _list_images(directory: str) -> list[str]:
    """Paths of the disks of a server that begin as an image does.

    :param directory: its instance directory, or the kept one
    """
    uuid = os.path.basename(directory)[:36]
    paths = glob.glob(os.path.join(
        glob.escape(CONF.libvirt.disks_pool_path), f'{uuid}[_-]*'))
    if layout.is_kept(directory):
        paths += glob.glob(os.path.join(glob.escape(directory), 'disk*'))
    return [path for path in paths if _is_image(path)]


def _is_image(path: str) -> bool:
    try:
        return layout.is_image(path)
    except OSError:
        return False


class _PoolVolume(imagebackend.Image):
    """The common base of the image types in a pool."""

    # Nova finds out once per class whether the file system of its disks can
    # preallocate. The pool may be on another one.
    can_fallocate = None

    def __init__(self, instance=None, disk_name=None, path=None,
                 disk_info_mapping=None):
        self._layout = layout.Layout.of(instance)
        # The next class is Flat or Qcow2, whose parameters these are.
        super().__init__(  # type: ignore[call-arg]
            instance=instance, disk_name=disk_name,
            path=path or self._layout.volume_path(disk_name),
            disk_info_mapping=disk_info_mapping)

    @property
    def disk_info_path(self):
        # Nova's backends put the record beside the disk. The pool is shared
        # by all servers, and the record has to go where the server goes.
        return self._layout.record_path

    @disk_info_path.setter
    def disk_info_path(self, path):
        pass

    @staticmethod
    def is_file_in_instance_path():
        return False

    def cache(self, fetch_func, filename, size=None, *args, **kwargs):
        if not self.exists() or self._has_base():
            super().cache(fetch_func, filename, size, *args, **kwargs)
        # Nova compares the size with that of the base image, and so does not
        # notice that an ephemeral disk with a base image of its own grew.
        if size:
            self.resize_image(size)

    def _has_base(self) -> bool:
        """Whether the disk needs a base image in the cache."""
        return False


class Qcow2Volume(_PoolVolume, imagebackend.Qcow2):
    """A disk in a pool that is an overlay on the image cache."""

    def _has_base(self) -> bool:
        return layout.backing_file(self.path) is not None


class FullVolume(Qcow2Volume):
    """A disk in a pool that is an image of its own."""

    def create_image(self, *args, **kwargs):
        is_new = not self.exists()
        super().create_image(*args, **kwargs)
        if is_new:
            with fileutils.remove_path_on_error(self.path):
                processutils.execute(
                    'qemu-img', 'rebase', '-f', 'qcow2', '-b', '', self.path)


class RawVolume(_PoolVolume, imagebackend.Flat):
    """A raw disk in a pool, which an early release of this driver made."""

    def _get_driver_format(self):
        return 'raw'

    def resize_image(self, size):
        _grow_raw(self.path, size)


def _grow_raw(path: str, size: int) -> None:
    """Let a raw disk be of a size in bytes, unless it is larger.

    Nova asks qemu-img for the size, which would probe what the guest wrote.
    """
    if size > os.path.getsize(path):
        os.truncate(path, size)


class BootFile(imagebackend.Flat):
    """The kernel or ramdisk of a server, which a migration brings along.

    Glance may have lost it, and does not have to have it.
    """

    def cache(self, fetch_func, filename, size=None, *args, **kwargs):
        if not self.exists():
            super().cache(fetch_func, filename, size, *args, **kwargs)


class _File(imagebackend.Image):
    """A disk in the instance directory, which a migration brings along.

    One that stands alone does not need the base image that Nova would fetch,
    which Glance may have lost.
    """

    def cache(self, fetch_func, filename, size=None, *args, **kwargs):
        base = os.path.join(layout.cache_dir(), filename)
        if self.exists() and not os.path.exists(base) and (
                self._stands_alone()):
            if size:
                self._grow(size)
        elif self.exists():
            super().cache(fetch_func, filename, size, *args, **kwargs)
        else:
            self._forget_format()
            super().cache(fetch_func, filename, size, *args, **kwargs)
            self.resolve_driver_format()

    def _forget_format(self) -> None:
        """Let the record not say of a new disk what an earlier one was."""
        record = os.path.join(os.path.dirname(self.path), layout.RECORD)
        if layout.has_record(record):
            formats = layout.read_record(record)
            if formats.pop(self.path, None):
                layout.write_record(record, formats)

    def _stands_alone(self) -> bool:
        return (self.driver_format == 'raw' or
                layout.backing_file(self.path) is None)

    def _grow(self, size: int) -> None:
        if self.driver_format == 'raw':
            _grow_raw(self.path, size)
        else:
            self.resize_image(size)


class FlatFile(_File, imagebackend.Flat):
    """A disk of Nova's raw backend, which may be an image all the same."""


class Qcow2File(_File, imagebackend.Qcow2):
    """A disk of Nova's qcow2 backend."""


class RawFile(FlatFile):
    """A disk in the instance directory that is recorded as raw.

    It stays one where use_cow_images is set: it may have come by a live
    migration, which converts nothing.
    """

    def _get_driver_format(self):
        return 'raw'

    def resize_image(self, size):
        _grow_raw(self.path, size)


class LogicalVolume(imagebackend.Lvm):
    """A disk in a volume group, which a migration brings along.

    Where the image cache lacks its base image, Nova would make it once more,
    and delete it because that fails.
    """

    def cache(self, fetch_func, filename, size=None, *args, **kwargs):
        if not self.exists():
            super().cache(fetch_func, filename, size, *args, **kwargs)


class CephDisk(imagebackend.Rbd):
    """A disk in Ceph."""

    def rollback_to_snap(self, name):
        """Go back to what was there before a migration.

        The destination host takes the snapshot before it changes anything:
        without one the disk is as it was, and Nova would not start the server.
        """
        try:
            super().rollback_to_snap(name)
        except exception.SnapshotNotFound:
            LOG.info('The migration ended before the destination host took '
                     'snapshot %(name)s of %(disk)s, which is as it was',
                     {'name': name, 'disk': self.rbd_name})


_FILES = {imagebackend.Flat: FlatFile, imagebackend.Qcow2: Qcow2File,
          imagebackend.Lvm: LogicalVolume, imagebackend.Rbd: CephDisk}


class Backend(imagebackend.Backend):
    """Nova's choice of an image backend, and disks in a storage pool."""

    def by_name(self, instance, name, image_type=None,
                disk_info_mapping=None):
        places = layout.Layout.of(instance)
        if is_in_pool(name):
            # Nova names a disk by its path when it starts a server.
            name = places.disk_name(name)
        image_class: type
        if self._belongs_in_pool(places, name):
            image_class = self._volume_class(
                places, places.volume_path(name), image_type)
        elif not CONF.libvirt.vol_upload_migration:
            return super().by_name(
                instance, name, image_type, disk_info_mapping)
        elif name in layout.BOOT_FILES:
            image_class = BootFile
        else:
            backend = self.backend(image_type)
            image_class = _FILES.get(backend, backend)
            if not name.endswith('.rescue'):
                image_class = _as_recorded(places, name, image_class)
        return image_class(instance=instance, disk_name=name,
                           disk_info_mapping=disk_info_mapping)

    def by_libvirt_path(self, instance, path, image_type=None):
        if not is_in_pool(path):
            return super().by_libvirt_path(instance, path, image_type)
        places = layout.Layout.of(instance)
        volume_class = self._volume_class(places, path, image_type)
        return volume_class(
            instance=instance, disk_name=places.disk_name(path), path=path)

    @staticmethod
    def _belongs_in_pool(places: layout.Layout, name: str) -> bool:
        """Whether a disk is a volume, or is to be made as one.

        A disk stays where it is. A new one goes where the server's other disks
        are.
        """
        if name in _NEVER_IN_POOL or name.endswith('.rescue'):
            return False
        if places.has_volume(name):
            return True
        if not CONF.libvirt.use_storage_pools or os.path.isabs(name):
            return False
        return bool(places.volumes()) or not places.has_files()

    def _volume_class(self, places: layout.Layout, path: str,
                      image_type: str | None) -> type[_PoolVolume]:
        backend = self.backend(image_type)
        if backend not in (imagebackend.Flat, imagebackend.Qcow2):
            raise exception.InternalError(_(
                'Disk %(path)s is a volume of storage pool %(pool)s, which '
                'image type %(type)s cannot use. Set [libvirt]images_type '
                'to one of %(types)s.') % {
                    'path': path, 'pool': CONF.libvirt.disks_pool,
                    'type': image_type or CONF.libvirt.images_type,
                    'types': ', '.join(IMAGE_TYPES)})
        recorded = _volume_format(places, path)
        if recorded == 'raw':
            return RawVolume
        # An existing image is the same to both; only a new one is made with
        # or without a base.
        return Qcow2Volume if backend is imagebackend.Qcow2 else FullVolume


def _as_recorded(places: layout.Layout, name: str,
                 image_class: type) -> type:
    """Return the class of a file by its record, against use_cow_images.

    Nova's backend of qcow2 images takes every file for one, and so would have
    QEMU read what the guest wrote into a raw disk as a header. Nova's raw
    backend would make a raw file where the domain of a server that is live
    migrated says qcow2.
    """
    path = os.path.join(places.directory, name)
    if not layout.has_record(places.record_path):
        return image_class
    if image_class is Qcow2File and os.path.exists(path):
        if _recorded_format(places, path) == 'raw':
            return RawFile
    elif (image_class is FlatFile and os.path.isabs(name) and
            not os.path.exists(path)):
        if _recorded_format(places, path) == 'qcow2':
            return Qcow2File
    return image_class


def _volume_format(places: layout.Layout, path: str) -> str | None:
    """The format of a volume, None if it is still to be made.

    :raises: InvalidDiskInfo if the format of an existing one is not recorded
    """
    recorded = _recorded_format(places, path)
    if recorded is None and os.path.exists(path):
        raise exception.InvalidDiskInfo(reason=_(
            'The format of disk %(path)s is not recorded in %(record)s. Add '
            'it, as Nova made the disk.') % {
                'path': path, 'record': places.record_path})
    return recorded


def _recorded_format(places: layout.Layout, path: str) -> str | None:
    """The format of a disk, None if there is no record of it.

    :raises: InvalidDiskInfo if the record cannot be read
    """
    try:
        return places.format(path)
    except errors.StorageError as error:
        raise exception.InvalidDiskInfo(reason=str(error)) from error
