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

"""Where the files of one server are on one host, and what they are called.

The names on disk are a protocol between hosts and between releases:

* ``{uuid}_{disk}``: a disk in the pool
* ``{uuid}-resize_{disk}``: what a resize on the same host keeps for a revert
* ``{uuid}_incoming-...``: the claim of a copy that is not complete
* ``{uuid}_arrived-...``: a complete copy in an instance directory
* ``nova-{uuid}``: the transient pool of an instance directory
* ``nova-no-pool``: among the instance directories, where disks are files
* ``nova-group-{group}``: the same where disks are in a volume group of LVM

This module knows files and nothing of libvirt.
"""

import dataclasses
import glob
import hashlib
import os
import re
import tempfile
import typing as ty
from urllib import parse

from oslo_serialization import jsonutils
from oslo_utils import fileutils
from oslo_utils import units
from oslo_utils import uuidutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

# The places of a server's files: the disks pool, the instance directory, and
# the volume group that Nova's LVM backend has its disks in.
POOL = 'pool'
DIRECTORY = 'directory'
GROUP = 'group'

# Prefix of the claim's name. While the claim exists, the server's other files
# on the host belong to an incomplete copy, running or abandoned.
CLAIM = 'incoming'

# Prefix of the claim's name once an instance directory is complete. From then
# on no pool may be made of the directory: libvirt would probe the first bytes
# of its files, which a guest may have written. Nova's own driver may finish
# the migration there, and leaves the claim.
ARRIVED = 'arrived'

# Bytes at the start of a file in which an image format is recognized. libvirt
# reads 33 KiB of them.
HEAD_BYTES = 64 * 1024

# Name of the file among the instance directories of a host on which servers
# are to have their disks in files, and not in a pool.
NO_POOL = 'nova-no-pool'

# Prefix of the name of the file that tells, in the same way, the volume group
# in which servers have their disks.
GROUP_MARK = 'nova-group-'

# The directory in which volume groups have theirs.
DEVICES = '/dev'

# LVM's default for the unit in which volumes take up a group, in bytes.
EXTENT_BYTES = 4 * units.Mi

RECORD = 'disk.info'

# Kernel and ramdisk of a server that was made from a kernel image. Glance may
# have lost them.
BOOT_FILES = ('kernel', 'ramdisk')

# Prefix of the name of a base image that goes along in the instance directory.
BASE = 'base_'

# Prefixes of the names of base images that each host makes for itself. No two
# hosts make the same file system: an overlay on that of another host is lost.
OWN_BASES = ('ephemeral', 'swap')

# Files in the instance directory that go along as they are.
COMPANIONS = ('disk.config', *BOOT_FILES)

# The way out of a pool for a disk that does not belong in one.
TAKE_OUT = ('Cold migrate the server to a host with [libvirt]'
            'vol_upload_migration and without use_storage_pools.')

# Directory in the instance directory in which Nova looks for the state of a
# server's vTPM.
VTPM = 'swtpm'

# Name of the file with the UEFI variables of a server that came from another
# host.
NVRAM = 'nvram'

# Modes of the files and directories that nova-compute makes.
FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

# The remedy for disks that libvirt made for a snapshot. Without "--shallow"
# it would go on into the base image that other servers share.
MERGE_REMEDY = 'Merge external snapshots: virsh blockcommit --shallow.'

# Prefixes of the names of ephemeral disks.
EPHEMERAL = ('disk.local', 'disk.eph')

_SWAP = 'disk.swap'
_KEPT = '_resize'
_QCOW2_MAGIC = b'QFI\xfb'
_DISK_NAME = re.compile(r'disk(\.local|\.eph\d+|\.swap|\.config)?')


@dataclasses.dataclass(frozen=True)
class File:
    """A file or directory that goes along with a server.

    :ivar name: its name in its place, the same on both hosts; may begin with
        directories
    :ivar place: POOL, DIRECTORY or GROUP
    :ivar path: path on the source host
    :ivar format: recorded format of a disk, None for any other file
    :ivar data: the bytes of a file that is made, None for one that is read
    :ivar mode: permission bits on the destination
    :ivar is_directory: whether it is a directory
    :ivar has_hostile_head: whether libvirt might probe first bytes that a
        guest may have chosen
    :ivar size: bytes that a logical volume has on the destination at least
    """
    name: str
    place: str
    path: str
    format: str | None = None
    data: bytes | None = None
    mode: int = FILE_MODE
    is_directory: bool = False
    has_hostile_head: bool = False
    size: int = 0

    @property
    def head_bytes(self) -> int:
        """Length of the start of the file that has to arrive last."""
        return HEAD_BYTES if self.has_hostile_head else 0

    @property
    def is_own_base(self) -> bool:
        """Whether it is a base image that the source host made for itself."""
        return self.name.startswith(
            tuple(BASE + prefix for prefix in OWN_BASES))

    def allocation(self) -> int:
        """Bytes that the file takes up on the source host.

        A logical volume takes up all its bytes, on the destination those that
        it has there.
        """
        if self.data is not None:
            return len(self.data)
        if self.place == GROUP:
            return -(-self.size // EXTENT_BYTES) * EXTENT_BYTES
        return os.stat(self.path).st_blocks * 512


@dataclasses.dataclass(frozen=True)
class Claim:
    """The mark of one attempt to copy a server's files to a host.

    :ivar uuid: of the server
    :ivar attempt: id of the attempt
    :ivar source: name of the source host; empty in claims of old releases
    """
    uuid: str
    attempt: str
    source: str

    @classmethod
    def new(cls, uuid: str, source: str = '') -> 'Claim':
        """The claim of a new attempt to copy a server.

        :param source: name of the source host, this one by default
        """
        return cls(uuid, uuidutils.generate_uuid(), source or CONF.host)

    @classmethod
    def parse(cls, uuid: str, name: str) -> 'Claim | None':
        """Read a claim from the name of a file, None if it is no claim."""
        for kind in CLAIM, ARRIVED:
            prefix = f'{uuid}_{kind}'
            if name.startswith(prefix):
                attempt, _, source = (
                    name[len(prefix):].removeprefix('-').partition('@'))
                return cls(uuid, attempt, parse.unquote(source))
        return None

    @staticmethod
    def has_arrived(uuid: str, name: str) -> bool:
        """Whether a name is that of the claim on a complete directory."""
        return name.startswith(f'{uuid}_{ARRIVED}')

    @property
    def name(self) -> str:
        """Name of the file that stands for an incomplete copy."""
        return self._name(CLAIM)

    @property
    def arrived_name(self) -> str:
        """Name of the file that stands for a complete copy."""
        return self._name(ARRIVED)

    def _name(self, kind: str) -> str:
        source = parse.quote(self.source, safe='')
        return f'{self.uuid}_{kind}-{self.attempt}@{source}'


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one server's files are on one host.

    :ivar uuid: of the server
    :ivar pool_path: directory of the disks pool
    :ivar directory: the instance directory
    :ivar group_path: directory of the devices of the volume group; empty if
        servers do not have their disks in one
    """
    uuid: str
    pool_path: str
    directory: str
    group_path: str = ''

    @classmethod
    def of(cls, instance) -> 'Layout':
        """Where this host has, or would have, the files of a server."""
        return dataclasses.replace(
            cls.at(libvirt_utils.get_instance_path(instance)),
            uuid=instance.uuid)

    @classmethod
    def at(cls, directory: str) -> 'Layout':
        """The same of the server that has an instance directory."""
        group = CONF.libvirt.images_volume_group
        return cls(os.path.basename(directory),
                   CONF.libvirt.disks_pool_path.rstrip('/'), directory,
                   group_path(group)
                   if group and CONF.libvirt.images_type == 'lvm' else '')

    # Names and paths.

    @property
    def prefix(self) -> str:
        """Prefix of the names of the server's volumes."""
        return f'{self.uuid}_'

    @property
    def kept_prefix(self) -> str:
        """Prefix of what a resize on the same host keeps for a revert."""
        return f'{self.uuid}-resize_'

    @property
    def parent(self) -> str:
        """The directory of the instance directories."""
        return os.path.dirname(self.directory)

    @property
    def kept_directory(self) -> str:
        """Where Nova keeps the instance directory for a revert."""
        return self.directory + _KEPT

    @property
    def transient_pool(self) -> str:
        """Name of the pool that is made of the instance directory."""
        return f'nova-{self.uuid}'

    @property
    def record_path(self) -> str:
        """The file in which Nova records the formats of the disks."""
        return os.path.join(self.directory, RECORD)

    @property
    def vtpm_path(self) -> str:
        """Where libvirt has the state of the server's vTPM."""
        return os.path.join(libvirt_utils.VTPM_DIR, self.uuid)

    @property
    def nvram_path(self) -> str:
        """Where the UEFI variables are of a server that came here."""
        return os.path.join(self.directory, NVRAM)

    @property
    def saved_vtpm_path(self) -> str:
        """Where Nova puts the state of the vTPM during a migration."""
        return os.path.join(self.directory, VTPM)

    def volume_name(self, disk: str) -> str:
        """Name of a disk in the pool: ``{uuid}_{disk}``."""
        return self.prefix + disk

    def volume_path(self, disk: str) -> str:
        """Where a disk in the pool is, or would be."""
        return os.path.join(self.pool_path, self.volume_name(disk))

    def kept_path(self, path: str) -> str:
        """Where a resize on this host keeps the original of a file."""
        if self.is_in_pool(path):
            return os.path.join(
                self.pool_path, self.kept_prefix + self.disk_name(path))
        return os.path.join(self.kept_directory, os.path.basename(path))

    def disk_name(self, name: str) -> str:
        """The disk that the name or path of a volume, kept or not, is of."""
        name = os.path.basename(name).removeprefix(self.prefix)
        return name.removeprefix(self.kept_prefix)

    def is_in_pool(self, path: str) -> bool:
        """Whether a path is that of a file in the pool."""
        return _is_same(os.path.dirname(path), self.pool_path)

    def is_in_directory(self, path: str) -> bool:
        """Whether a path is that of a file in the instance directory."""
        return _is_same(os.path.dirname(path), self.directory)

    def is_in_group(self, path: str) -> bool:
        """Whether a path is that of a volume of the volume group."""
        return bool(self.group_path) and (
            os.path.dirname(path) == self.group_path)

    def path(self, file: File) -> str:
        """Where a file is, or would be."""
        place = {POOL: self.pool_path, DIRECTORY: self.directory,
                 GROUP: self.group_path}[file.place]
        return os.path.join(place, file.name)

    # Look-ups.

    def volumes(self) -> list[str]:
        """Paths of the server's volumes, claims included."""
        return _list(self.pool_path, self.prefix)

    def logical_volumes(self) -> list[str]:
        """Paths of the server's volumes in the volume group."""
        return _list(self.group_path, self.prefix) if self.group_path else []

    def bases(self) -> dict[str, str]:
        """Base images that came along, by the path that each is to get."""
        return {os.path.join(cache_dir(),
                             os.path.basename(path).removeprefix(BASE)): path
                for path in _list(self.directory, BASE)}

    def kept(self) -> list[str]:
        """Paths of what a resize on this host keeps for a revert."""
        return _list(self.pool_path, self.kept_prefix)

    def has_volume(self, disk: str) -> bool:
        """Whether a disk of the server is in the pool."""
        return os.path.isfile(self.volume_path(disk))

    def has_files(self) -> bool:
        """Whether disks of the server are in the instance directory."""
        return bool(_disks(self.directory))

    def has_kept_files(self) -> bool:
        """Whether disks with data of the server are in the kept directory."""
        return bool(_disks(self.kept_directory) - {_SWAP})

    def has_state(self) -> bool:
        """Whether more goes along than disks and companions."""
        return os.path.exists(self.record_path) or os.path.exists(
            self.vtpm_path)

    def claims(self) -> dict[str, Claim]:
        """The claims on the server's files here, by path."""
        found = {}
        # Earlier releases put the claim into the instance directory.
        for path in [*self.volumes(), *_list(self.parent, self.prefix),
                     *_list(self.directory, self.prefix)]:
            claim = Claim.parse(self.uuid, os.path.basename(path))
            if claim:
                found[path] = claim
        return found

    def has_arrived(self) -> bool:
        """Whether a claim says that the instance directory is complete."""
        return any(Claim.has_arrived(self.uuid, os.path.basename(path))
                   for path in self.claims())

    # The record of formats.

    def formats(self) -> dict[str, str]:
        """The recorded formats of the disks, by path.

        :raises: StorageError if the record cannot be read
        """
        return read_record(self.record_path)

    def format(self, path: str) -> str | None:
        """The recorded format of a disk, None if there is no record of it.

        The record may spell the directory another way, with a symbolic link.

        :raises: StorageError if the record cannot be read
        """
        formats = self.formats()
        if path in formats:
            return formats[path]
        directory, name = os.path.split(path)
        for other, disk_format in formats.items():
            if os.path.basename(other) == name and _is_same(
                    os.path.dirname(other), directory):
                return disk_format
        return None

    def names_volumes(self) -> bool:
        """Whether the record is of a server with disks in a pool anywhere.

        :raises: StorageError if the record cannot be read
        """
        return any(os.path.basename(path).startswith(self.prefix)
                   for path in self.formats())

    def record(self, disks: list[File], there: 'Layout') -> dict[str, str]:
        """The record of formats with the paths of another host.

        :param there: where that host has the files
        :raises: StorageError if the record of this host cannot be read
        """
        moved = {os.path.basename(disk.path) for disk in disks
                 if disk.place == POOL}
        formats = {path: disk_format
                   for path, disk_format in self.formats().items()
                   if os.path.dirname(path) == self.directory and
                   os.path.basename(path) not in moved and
                   # Made anew, in the format that the other host chooses.
                   not path.endswith(_SWAP)}
        # Nova records no format of a logical volume, which is always raw.
        return formats | {there.path(disk): str(disk.format)
                          for disk in disks
                          if disk.format and disk.place != GROUP}

    # The plan.

    def plan(self, disk_info: list[dict[str, ty.Any]],
             bases: ty.Collection[str] = ()) -> list[File]:
        """List the files that go along when the server moves.

        Swap disks do not, Nova makes them anew.

        :param disk_info: what Nova's driver says of the disks of the domain
        :param bases: paths of base images that have to go along
        :raises: Refused for a disk that would be left behind
        :raises: StorageError if the record of formats cannot be read
        """
        disks = [self._disk(info) for info in without_swap(disk_info)]
        names = {file.name for file in disks}
        companions = [File(name, DIRECTORY, os.path.join(self.directory, name),
                           has_hostile_head=True)
                      for name in COMPANIONS if name not in names]
        return [*disks, *(file for file in companions
                          if os.path.exists(file.path)),
                *(File(BASE + os.path.basename(path), DIRECTORY, path,
                       has_hostile_head=True) for path in sorted(bases))]

    def moved(self, files: list[File], place: str | None) -> list[File]:
        """The files as the destination gets them.

        :param files: see plan()
        :param place: where the disks go, None if where they are here
        :raises: Refused for a raw disk that would go into a pool: libvirtd
            there would probe what its guest wrote
        """
        if place == POOL:
            files = [self._into_pool(file) for file in files]
        elif place == DIRECTORY:
            files = [self._out_of_pool(file) for file in files]
        for file in files:
            if file.place == POOL and file.format == 'raw':
                raise errors.Refused(
                    f'disk {file.path} is a raw disk in a pool, as only an '
                    f'early release made them',
                    TAKE_OUT)
        return files

    def _into_pool(self, file: File) -> File:
        if not may_enter_pool(file):
            return file
        return dataclasses.replace(
            file, name=self.volume_name(file.name), place=POOL)

    def _out_of_pool(self, file: File) -> File:
        if file.place != POOL:
            return file
        return dataclasses.replace(
            file, name=self.disk_name(file.name), place=DIRECTORY,
            has_hostile_head=file.format != 'qcow2')

    def _disk(self, info: dict[str, ty.Any]) -> File:
        path = info['path']
        name = os.path.basename(path)
        if self.is_in_pool(path):
            place, disk = POOL, name.removeprefix(self.prefix)
        elif self.is_in_directory(path):
            place, disk = DIRECTORY, name
        elif self.is_in_group(path):
            place, disk = GROUP, name.removeprefix(self.prefix)
        else:
            raise errors.Refused(
                f'disk {path} is neither in {self.pool_path} nor in '
                f'{self.group_path or self.directory}',
                'If the pool moved, hard reboot the server.')
        if not _DISK_NAME.fullmatch(disk):
            raise errors.Refused(
                f'disk {path} is not one that Nova made',
                MERGE_REMEDY)
        _check_base(info)
        disk_format = self._checked_format(info, disk)
        return File(name, place, path, disk_format,
                    has_hostile_head=place == DIRECTORY and
                    disk_format != 'qcow2',
                    size=info['virt_disk_size'] if place == GROUP else 0)

    def _checked_format(self, info: dict[str, ty.Any], disk: str) -> str:
        path = info['path']
        recorded = 'raw' if self.is_in_group(path) else self.format(path)
        if recorded is None and disk == 'disk.config':
            # An image that Nova wrote; of some ages it is not recorded.
            return info['type']
        if recorded is None:
            raise errors.Refused(
                f'no format of disk {path} is recorded in {self.record_path}',
                'Add it, as Nova made the disk.')
        if recorded != info['type']:
            raise errors.Refused(
                f'the domain says {info["type"]} and disk.info {recorded} of '
                f'disk {path}',
                'Find out which is true, and correct the other.')
        return recorded


def room(files: list[File]) -> dict[str, int]:
    """Bytes that files take up on the destination, by place.

    A base image of the source host's own is there for a while beside its copy
    in the disk that stands on it.
    """
    places = {POOL, DIRECTORY, *(file.place for file in files)}
    return {place: sum(file.allocation() for file in files
                       if file.place == place or file.is_own_base)
            for place in places}


def may_enter_pool(file: File) -> bool:
    """Whether a file is a disk whose header QEMU wrote."""
    return file.format == 'qcow2' and file.name not in COMPANIONS


def without_swap(
    disk_info: list[dict[str, ty.Any]],
) -> list[dict[str, ty.Any]]:
    """The disks that have to be copied: a swap disk is made anew."""
    return [info for info in disk_info if not info['path'].endswith(_SWAP)]


def group_path(group: str) -> str:
    """The directory of the devices of a volume group."""
    return os.path.join(DEVICES, group)


def length(path: str) -> int:
    """Bytes of a file or of a block device, holes included.

    :raises: OSError
    """
    with open(path, 'rb') as file:
        return file.seek(0, os.SEEK_END)


def is_image(path: str) -> bool:
    """Whether a file begins as a qcow2 image does.

    :raises: OSError
    """
    with open(path, 'rb') as file:
        return file.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC


def backing_file(path: str) -> str | None:
    """Path of the base image of a qcow2 disk, None if it has none."""
    return libvirt_utils.get_disk_backing_file(
        path, basename=False, format='qcow2')


def is_kept(directory: str) -> bool:
    """Whether an instance directory is one that is kept for a revert."""
    return directory.endswith(_KEPT)


def cache_dir() -> str:
    """The directory of this host's base images."""
    return os.path.join(
        CONF.instances_path, CONF.image_cache.subdirectory_name)


def has_record(path: str) -> bool:
    """Whether there is a record of formats, and something in it.

    A crash may leave an empty one. Nova writes it anew.
    """
    try:
        return os.path.getsize(path) > 0
    except FileNotFoundError:
        return False


def read_record(path: str) -> dict[str, str]:
    """Read a record of the formats of disks, by their paths.

    :returns: the formats; none if there is no record
    :raises: StorageError if the record is empty or broken
    """
    try:
        with open(path) as record:
            formats = jsonutils.loads(record.read())
        if not isinstance(formats, dict):
            raise ValueError('no JSON object')
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise errors.StorageError(
            f'empty or broken record of formats {path}',
            'Write it anew: the format of each disk by its path.') from error
    return formats


def write_record(path: str, formats: dict[str, str]) -> None:
    """Replace a record of formats, on stable storage.

    :raises: OSError
    """
    replace(path, record_bytes(formats), FILE_MODE)


def record_bytes(formats: dict[str, str]) -> bytes:
    """A record of formats as Nova reads it."""
    return (jsonutils.dumps(formats) + '\n').encode()


def replace(path: str, content: bytes, mode: int) -> None:
    """Make a file or replace it, on stable storage.

    Nobody ever sees a part of it, and the file may be another user's.

    :param mode: permission bits
    :raises: OSError; what was there is there
    """
    directory = os.path.dirname(path)
    with tempfile.NamedTemporaryFile(
            'wb', dir=directory, delete=False) as file:
        with fileutils.remove_path_on_error(file.name):
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            os.replace(file.name, path)
    flush(directory)


def digest(head: bytes) -> str:
    """The digest of the first bytes of a file."""
    return hashlib.sha256(head).hexdigest()


def flush(path: str) -> None:
    """Wait until a file or directory is on stable storage.

    :raises: OSError
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_base(info: dict[str, ty.Any]) -> None:
    """Check that an overlay stands on a base image of the image cache.

    An overlay on anything else has data that would be left behind.
    """
    if not info.get('backing_file') or info['type'] != 'qcow2':
        return
    base = backing_file(info['path'])
    if base and not _is_same(os.path.dirname(base), cache_dir()):
        raise errors.Refused(
            f'disk {info["path"]} is an overlay on {base}, which Nova did not '
            'make', MERGE_REMEDY)


def _list(directory: str, prefix: str) -> list[str]:
    return glob.glob(glob.escape(os.path.join(directory, prefix)) + '*')


def _disks(directory: str) -> set[str]:
    names = {os.path.basename(path) for path in _list(directory, 'disk')}
    return names - {'disk.config', RECORD}


def _is_same(first: str, second: str) -> bool:
    """Whether two paths are of one directory, however they are spelled."""
    if first.rstrip('/') == second.rstrip('/'):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
