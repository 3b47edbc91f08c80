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

The pool is a directory that nova-compute owns, so that a new disk is made in
it by Nova's own Flat and Qcow2 backends. libvirt takes notice of it when the
pool is refreshed. Only three things differ from a disk in the instance
directory: its path, where its format is recorded, and that its format is
never found out by looking at what a guest may have written.
"""

import glob
import os
import tempfile

from oslo_serialization import jsonutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova import exception
from nova.i18n import _
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

# The image types whose disks can be volumes of a pool.
IMAGE_TYPES = ('default', 'raw', 'flat', 'qcow2')

# Nova makes these with its raw backend in the instance directory, whatever
# the image type of the other disks.
_BOOT_FILES = ('kernel', 'ramdisk')
_NEVER_IN_POOL = ('disk.config', *_BOOT_FILES)


def volume_prefix(instance) -> str:
    """What the names of all volumes of a server begin with."""
    return f'{instance.uuid}_'


def volume_name(instance, disk_name: str) -> str:
    """The name of a server's disk in the pool: ``{uuid}_{disk_name}``."""
    return volume_prefix(instance) + disk_name


def kept_prefix(instance) -> str:
    """The same of what a resize on the same host keeps for a revert."""
    return f'{instance.uuid}-resize_'


def disk_name(instance, name: str) -> str:
    """The disk that the name or path of a volume, also a kept one, is of."""
    name = os.path.basename(name).removeprefix(volume_prefix(instance))
    return name.removeprefix(kept_prefix(instance))


def volume_path(instance, disk_name: str) -> str:
    """Where a server's disk is, or would be, on this host."""
    return os.path.join(
        CONF.libvirt.disks_pool_path, volume_name(instance, disk_name))


def kept_path(instance, disk_name: str) -> str:
    """Where a resize on this host keeps the original of a disk."""
    return os.path.join(
        CONF.libvirt.disks_pool_path, kept_prefix(instance) + disk_name)


def list_volumes(instance) -> list[str]:
    """Paths of a server's volumes in this host's pool."""
    return list_paths(volume_prefix(instance))


def list_kept(instance) -> list[str]:
    """Paths of what a resize on this host keeps for a revert."""
    return list_paths(kept_prefix(instance))


def list_paths(prefix: str) -> list[str]:
    """Paths of the volumes whose names begin with ``prefix``."""
    path = os.path.join(CONF.libvirt.disks_pool_path, prefix)
    return glob.glob(glob.escape(path) + '*')


def list_files(instance, prefix: str) -> list[str]:
    """Paths of the files in the instance directory that begin so."""
    path = os.path.join(libvirt_utils.get_instance_path(instance), prefix)
    return glob.glob(glob.escape(path) + '*')


def make_marker(instance) -> str:
    """Make an empty file with a new name among the volumes of a server.

    :returns: its path
    """
    descriptor, path = tempfile.mkstemp(
        prefix=volume_prefix(instance), dir=CONF.libvirt.disks_pool_path)
    os.close(descriptor)
    return path


def has_volumes(instance) -> bool:
    """Whether a server has volumes in this host's pool."""
    return bool(list_volumes(instance))


def names_volumes(instance, record_path: str) -> bool:
    """Whether a record is of a server with disks in a pool, on any host.

    :raises: InvalidDiskInfo if the record can not be read
    """
    return any(os.path.basename(path).startswith(volume_prefix(instance))
               for path in recorded_formats(record_path))


def has_volume(instance, disk_name: str) -> bool:
    """Whether a server has a disk that is a volume in this host's pool."""
    return os.path.isfile(volume_path(instance, disk_name))


def has_files(instance) -> bool:
    """Whether a server has disks in the instance directory."""
    directory = libvirt_utils.get_instance_path(instance)
    files = {os.path.basename(path)
             for path in glob.glob(os.path.join(directory, 'disk*'))}
    return bool(files - {'disk.config', 'disk.info'})


def is_in_pool(path: str) -> bool:
    """Whether a path is that of a volume in this host's pool."""
    return os.path.dirname(path) == CONF.libvirt.disks_pool_path.rstrip('/')


def disk_info_path(instance) -> str:
    """The file in which Nova records the formats of a server's disks."""
    return os.path.join(
        libvirt_utils.get_instance_path(instance), 'disk.info')


def recorded_format(instance, path: str) -> str | None:
    """The format that Nova recorded for a disk when it made it.

    :raises: InvalidDiskInfo if the record can not be read
    """
    return recorded_formats(disk_info_path(instance)).get(path)


def list_overlays() -> list[str]:
    """Paths of the volumes here that were recorded as qcow2 images.

    Those included that are kept for the revert of a migration.
    """
    records = glob.glob(os.path.join(
        glob.escape(CONF.instances_path), '*', 'disk.info'))
    return [path for record in records
            for path, disk_format in recorded_formats(record).items()
            if disk_format == 'qcow2' and is_in_pool(path) and
            os.path.isfile(path)]


def recorded_formats(record_path: str) -> dict[str, str]:
    """The formats of disks in a record, by their paths.

    :raises: InvalidDiskInfo if the record can not be read
    """
    try:
        with open(record_path) as record:
            return jsonutils.loads(record.read())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise exception.InvalidDiskInfo(reason=str(error))


class _PoolVolume(imagebackend.Image):
    """What the two formats of disks in a pool have in common."""

    # Nova finds out once per class whether the file system of its disks can
    # preallocate. The pool may be on another one.
    can_fallocate = None

    def __init__(self, instance=None, disk_name=None, path=None,
                 disk_info_mapping=None):
        self._instance = instance
        # The next class is Flat or Qcow2, whose parameters these are.
        super().__init__(  # type: ignore[call-arg]
            instance=instance, disk_name=disk_name,
            path=path or volume_path(instance, disk_name),
            disk_info_mapping=disk_info_mapping)

    @property
    def disk_info_path(self):
        # Nova's backends put the record beside the disk. The pool is shared
        # by all servers, and the record has to go where the server goes.
        return disk_info_path(self._instance)

    @disk_info_path.setter
    def disk_info_path(self, path):
        pass

    @staticmethod
    def is_file_in_instance_path():
        return False

    def cache(self, fetch_func, filename, size=None, *args, **kwargs):
        super().cache(fetch_func, filename, size, *args, **kwargs)
        # Nova compares the size with that of the base image, and so does not
        # notice that an ephemeral disk with a base image of its own grew.
        if size:
            self.resize_image(size)


class RawVolume(_PoolVolume, imagebackend.Flat):
    """A disk in a pool without a backing file."""

    _making = False

    def create_image(self, *args, **kwargs):
        self._making = not self.exists()
        try:
            super().create_image(*args, **kwargs)
        finally:
            self._making = False

    def _get_driver_format(self):
        # Only before a guest has seen it may the disk itself be asked.
        return super()._get_driver_format() if self._making else 'raw'


class Qcow2Volume(_PoolVolume, imagebackend.Qcow2):
    """A disk in a pool that is an overlay on the image cache."""


class BootFile(imagebackend.Flat):
    """The kernel or ramdisk of a server, which a migration brings along.

    Glance may have lost it, and does not have to have it.
    """

    def cache(self, fetch_func, filename, size=None, *args, **kwargs):
        if not self.exists():
            super().cache(fetch_func, filename, size, *args, **kwargs)


class Backend(imagebackend.Backend):
    """Nova's choice of an image backend, and disks in a storage pool."""

    def by_name(self, instance, name, image_type=None,
                disk_info_mapping=None):
        if is_in_pool(name):
            # Nova names a disk by its path when it starts a server.
            name = disk_name(instance, name)
        if name in _BOOT_FILES and CONF.libvirt.vol_upload_migration:
            return BootFile(instance=instance, disk_name=name,
                            disk_info_mapping=disk_info_mapping)
        if not self._belongs_in_pool(instance, name):
            return super().by_name(
                instance, name, image_type, disk_info_mapping)
        volume_class = self._volume_class(
            instance, volume_path(instance, name), image_type)
        return volume_class(
            instance=instance, disk_name=name,
            disk_info_mapping=disk_info_mapping)

    def by_libvirt_path(self, instance, path, image_type=None):
        if not is_in_pool(path):
            return super().by_libvirt_path(instance, path, image_type)
        volume_class = self._volume_class(instance, path, image_type)
        return volume_class(
            instance=instance, disk_name=disk_name(instance, path), path=path)

    @staticmethod
    def _belongs_in_pool(instance, name: str) -> bool:
        """Whether a disk is a volume, or is to be made as one.

        A disk stays where it is. A new one goes where the server's root disk
        is, so that a server never has disks in both places.
        """
        if name in _NEVER_IN_POOL or name.endswith('.rescue'):
            return False
        if has_volume(instance, name):
            return True
        if not CONF.libvirt.use_storage_pools:
            return False
        directory = libvirt_utils.get_instance_path(instance)
        return not any(os.path.exists(os.path.join(directory, file))
                       for file in (name, 'disk'))

    def _volume_class(self, instance, path: str, image_type: str | None):
        backend = self.backend(image_type)
        if backend not in (imagebackend.Flat, imagebackend.Qcow2):
            raise exception.InternalError(_(
                'Disk %(path)s is a volume of storage pool %(pool)s, which '
                'image type %(type)s can not use. Set [libvirt]images_type '
                'to one of %(types)s.') % {
                    'path': path, 'pool': CONF.libvirt.disks_pool,
                    'type': image_type or CONF.libvirt.images_type,
                    'types': ', '.join(IMAGE_TYPES)})
        # A raw disk that came from a host without use_cow_images stays raw:
        # Qcow2 would take whatever a guest wrote into it for a qcow2 header.
        if (backend is imagebackend.Flat or
                recorded_format(instance, path) == 'raw'):
            return RawVolume
        return Qcow2Volume
