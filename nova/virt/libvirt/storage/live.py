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

"""Live migration of servers with disks that the hosts do not share.

QEMU copies the disks, as it does for Nova's own driver. This module has the
rest: what the two hosts tell each other about their pools, the files that QEMU
does not copy, and the domain as the destination host has to define it.

The destination host chooses the place of the disks, as for new servers: images
go into its pool if it has one. A server with a raw file keeps all of them
files: libvirtd would probe what its guest writes into the pool.

The hosts talk through the field of Nova's LibvirtLiveMigrateData that
describes block devices. Every Nova carries it, and looks in it for the serial
numbers of Cinder volumes only.
"""

import contextlib
import dataclasses
import glob
import os
import re
import shutil
import tempfile
import time
import typing as ty

from lxml import etree
from oslo_serialization import jsonutils
from oslo_utils import uuidutils

from nova import objects
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage.threads import libvirt

# No Cinder volume has such a serial number.
SERIAL = 'nova-storage-migrate/pool'
_MARKER = re.compile(
    r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}-(live|shared)-\w+')
# No check takes longer; a host that shares the pool may be in one.
_CHECK_SECONDS = 3600
# Start of the name of the directory of files that are made to be sent.
_TO_SEND = 'to-send-'


@dataclasses.dataclass(frozen=True)
class Notice:
    """The notice that the hosts of a live migration give each other.

    :ivar path: directory of the pool on the destination host; empty if it
        has disks in files
    :ivar marker: name of an empty file in that pool, there during the check
    :ivar in_the_way: paths of what the destination host has of the server
    :ivar sent: names of the files that the source host sends; None if it has
        not told
    :ivar claim: name of the claim on the server's files on the destination
        host, which chooses it before it makes the claim
    :ivar paths: where the destination host has the disks, by the names of
        their files on the source host
    """
    path: str
    marker: str = ''
    in_the_way: list[str] = dataclasses.field(default_factory=list)
    sent: list[str] | None = None
    claim: str = ''
    paths: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, migrate_data) -> 'Notice | None':
        """The notice in Nova's data, None if there is none."""
        for device in _devices(migrate_data):
            if device.serial == SERIAL:
                names = {field.name for field in dataclasses.fields(cls)}
                return cls(**{name: value for name, value in
                              device.connection_info.items() if name in names})
        return None

    def path_of(self, name: str) -> str:
        """Where the destination host has a disk, by its name on the source."""
        return self.paths.get(name, os.path.join(self.path, name))

    def write(self, migrate_data) -> None:
        """Put the notice into Nova's data, in place of an earlier one."""
        device = objects.LibvirtLiveMigrateBDMInfo(
            serial=SERIAL, bus='', dev='', type='pool')
        device.connection_info = dataclasses.asdict(self)
        migrate_data.bdms = [
            other for other in _devices(migrate_data)
            if other.serial != SERIAL] + [device]


def _devices(migrate_data) -> list[ty.Any]:
    return (list(migrate_data.bdms)
            if migrate_data is not None and 'bdms' in migrate_data else [])


# The destination host.

def introduce(places: layout.Layout, source: str, has_pool: bool) -> Notice:
    """Tell the source host what it has to know before it decides.

    Makes a file in the pool, to see whether the hosts share it. Its name is
    not that of a volume of the server, which may have none.

    :param source: name of the source host
    :param has_pool: whether new servers have their disks in the pool here
    :raises: OSError
    """
    claim = layout.Claim.new(places.uuid, source).name
    in_the_way = []
    if not places.claims():
        in_the_way = [path for path in [
            *places.volumes(), places.directory, places.kept_directory]
            if os.path.exists(path)]
    if not has_pool:
        return Notice('', in_the_way=in_the_way, claim=claim)
    descriptor, marker = tempfile.mkstemp(
        prefix=f'{places.uuid}-live-', dir=places.pool_path)
    os.close(descriptor)
    return Notice(places.pool_path, os.path.basename(marker), in_the_way,
                  claim=claim)


def delete_markers(pool_path: str) -> None:
    """Delete the markers of checks that did not end.

    introduce() makes them, and Site.check(). Another host that shares the pool
    may delete them at the same time.

    :raises: OSError
    """
    for entry in os.scandir(pool_path):
        if _MARKER.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if not found.st_size and (
                        time.time() - found.st_mtime > _CHECK_SECONDS):
                    os.unlink(entry.path)


def claim(places: layout.Layout, notice: Notice, source: str,
          has_pool: bool) -> layout.Claim:
    """Take possession of the names of a server's files on this host.

    The claim on the instance directory says "arrived" from the beginning: no
    other attempt may make a pool of the directory, where QEMU will write what
    the guest says on its console. nova-compute here deletes the files if the
    attempt is abandoned.

    :param notice: names the claim. The source host knows the name since
        introduce(), even if the answer to this step is lost
    :param source: name of the source host
    :param has_pool: see introduce()
    :raises: OSError, Refused
    """
    made = layout.Claim.parse(places.uuid, notice.claim)
    if made is None or made.source != source or not (
            uuidutils.is_uuid_like(made.attempt)):
        raise errors.Refused(
            f'{source} names another claim than this host has told it',
            'Repeat the live migration.')
    paths = [os.path.join(places.parent, made.arrived_name)]
    if has_pool:
        paths.insert(0, os.path.join(places.pool_path, made.name))
    for path in paths:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, layout.FILE_MODE))
    return made


def paths_here(
    places: layout.Layout, disks: list[dict[str, ty.Any]], has_pool: bool,
) -> dict[str, str]:
    """Choose where this host is to have the disks of a server.

    :param disks: what the source host says of them
    :param has_pool: see introduce()
    :returns: the paths, by the names of the files on the source host
    """
    formats = {os.path.basename(disk['path']): disk['type'] for disk in disks}
    images = formats.keys() - set(layout.COMPANIONS)
    into_pool = has_pool and all(
        formats[name] == 'qcow2' for name in images)
    return {name: places.volume_path(places.disk_name(name))
            if into_pool and name in images else
            os.path.join(places.directory, places.disk_name(name))
            for name in formats}


def disks_here(
    disks: list[dict[str, ty.Any]], notice: Notice,
) -> list[dict[str, ty.Any]]:
    """Describe the disks of a server as this host is to make them.

    :param disks: what the source host says of them
    :param notice: what this host tells it
    """
    names = [os.path.basename(disk['path']) for disk in disks]
    return [dict(disk, path=notice.path_of(name),
                 sent=name in (notice.sent or []))
            for name, disk in zip(names, disks)]


def record(places: layout.Layout, disks: list[dict[str, ty.Any]]) -> None:
    """Record the formats of the disks that this host is going to have.

    :param disks: see disks_here()
    :raises: OSError
    """
    layout.write_record(places.record_path, {
        disk['path']: disk['type'] for disk in disks})


def record_shared(places: layout.Layout) -> None:
    """Add the paths that the volumes have on this host to a shared record.

    :raises: OSError, StorageError
    """
    formats = places.formats()
    here = {path: disk_format for other, disk_format in formats.items()
            for path in [places.volume_path(places.disk_name(other))]
            if os.path.basename(other).startswith(places.prefix)}
    if not here.items() <= formats.items():
        layout.write_record(places.record_path, formats | here)


# The source host.

def find_notice(migrate_data) -> Notice:
    """Read the notice of the destination host, which volumes need.

    :raises: Refused if there is none
    """
    notice = Notice.read(migrate_data)
    if notice is None:
        raise errors.Refused(
            'the disks of the server are in a storage pool, and the '
            'destination has none',
            'Set [libvirt]use_storage_pools there, with this driver.')
    return notice


def half_shared() -> errors.Refused:
    """The refusal of hosts that share the pool or the directory, not both.

    Nova could not tell what to delete.
    """
    return errors.Refused(
        'both hosts share either the storage pool or the instance directory '
        'of the server', 'Share both or neither.')


def check(places: layout.Layout, notice: Notice,
          disks: list[dict[str, ty.Any]], is_shared: bool) -> None:
    """Check that the server can be live migrated to the destination host.

    :param notice: what the destination host tells
    :param disks: what Nova's driver says of the disks of the domain
    :param is_shared: whether both hosts see them
    :raises: Refused
    """
    if not is_shared:
        check_names(notice)
    for file in places.plan(disks):
        if notice.path and file.place == layout.POOL and (
                file.format != 'qcow2'):
            raise errors.Refused(
                f'disk {file.path} is {file.format}, as an early release '
                f'made it', layout.TAKE_OUT)


def check_room(places: layout.Layout, bases: list[str]) -> None:
    """Check that this host has room for what files_to_send() makes.

    Half of what is free stays free, for the guests that write meanwhile.

    :param bases: paths of base images that have to be sent
    :raises: Refused
    """
    needed = sum(os.stat(base).st_blocks * 512 for base in bases)
    room = os.statvfs(places.directory)
    if 2 * needed > room.f_bavail * room.f_frsize:
        raise errors.Refused(
            f'this host has no room for the {needed} bytes of the base images '
            f'of the server, which have to go along',
            f'Free space in {places.directory}.')


def is_in_post_copy(guest: libvirt_guest.Guest) -> bool:
    """Whether the memory of a domain here is in part on another host only."""
    return _is_paused(guest, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
                      libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)


def is_held(guest: libvirt_guest.Guest) -> bool:
    """Whether a domain here is paused until a migration has ended."""
    return _is_paused(guest, libvirt.VIR_DOMAIN_PAUSED_MIGRATION)


def _is_paused(guest: libvirt_guest.Guest, *reasons: int) -> bool:
    state, reason = guest._domain.state()
    return state == libvirt.VIR_DOMAIN_PAUSED and reason in reasons


def check_sent(notice: Notice, disks: ty.Iterable[ty.Any]) -> None:
    """Check that the destination host asks only for what it was offered.

    The destination host repeats the names that list_sent() has offered. Any
    other name may be the path of another server's disk, and the first bytes of
    a raw disk may name any file.

    :param disks: of the domain here, as Nova reads its XML
    :raises: Refused
    """
    known = {os.path.basename(disk.source_path) for disk in disks
             if disk.source_path and (
                 disk.readonly or disk.driver_format == 'qcow2')}
    unknown = set(notice.sent or []) - known - set(layout.BOOT_FILES)
    if unknown:
        raise errors.Refused(
            f'the destination host asks for {", ".join(sorted(unknown))}, '
            f'which was not offered',
            'Find out what runs as nova-compute there.')


def check_names(notice: Notice) -> None:
    """Check that nothing of the server is on the destination host.

    :raises: Refused
    """
    if notice.in_the_way:
        paths = ', '.join(notice.in_the_way)
        raise errors.Refused(
            f'on the destination {paths} is in the way',
            'Find out whose it is, and delete it if it is not needed.')


def shares_pool(places: layout.Layout, notice: Notice) -> bool:
    """Whether the destination's pool is this host's, under any path."""
    return bool(notice.marker) and os.path.exists(
        os.path.join(places.pool_path, notice.marker))


def list_sent(
    places: layout.Layout, disks: list[dict[str, ty.Any]],
    read_only: ty.Collection[str], lost: ty.Collection[str],
) -> list[str]:
    """List what QEMU does not copy, or not as a whole.

    Kernel and ramdisk are no disks. Glance may have lost them.

    :param disks: what Nova's driver says of the disks of the domain
    :param read_only: paths of the disks that the guest cannot write
    :param lost: names of base images that the destination host cannot get
    :returns: names of their files
    """
    boot_files = [name for name in layout.BOOT_FILES
                  if os.path.exists(os.path.join(places.directory, name))]
    return boot_files + [
        os.path.basename(disk['path']) for disk in disks
        if disk['path'] in read_only or disk.get('backing_file') and (
            disk['backing_file'] in lost or
            disk['backing_file'].startswith(layout.OWN_BASES))]


@contextlib.contextmanager
def files_to_send(
    places: layout.Layout, notice: Notice, execute: ty.Callable,
) -> ty.Iterator[list[layout.File]]:
    """The files that list_sent() has named.

    :param notice: what the destination host tells
    :param execute: runs a command, as processutils.execute() does

    Of an overlay it is an image with the content of its base image. QEMU then
    writes the content of the overlay over it.

    :raises: OSError, ProcessExecutionError
    """
    delete_unsent(places)
    with tempfile.TemporaryDirectory(
            dir=places.directory, prefix=_TO_SEND) as directory:
        yield [_file_to_send(places, name, notice, directory, execute)
               for name in notice.sent or []]


def delete_unsent(places: layout.Layout) -> None:
    """Delete what a nova-compute that ended has left of files_to_send()."""
    for path in glob.glob(os.path.join(
            glob.escape(places.directory), f'{_TO_SEND}*')):
        shutil.rmtree(path, ignore_errors=True)


def _file_to_send(places: layout.Layout, name: str, notice: Notice,
                  directory: str, execute: ty.Callable) -> layout.File:
    here = os.path.join(places.pool_path if name.startswith(places.prefix)
                        else places.directory, name)
    if name in layout.COMPANIONS:
        return layout.File(name, layout.DIRECTORY, here,
                           has_hostile_head=True)
    parent, there = os.path.split(notice.path_of(name))
    place = layout.POOL if parent == notice.path else layout.DIRECTORY
    path = os.path.join(directory, name)
    _copy_base(here, path, execute)
    return layout.File(there, place, path, 'qcow2')


def _copy_base(overlay: str, path: str, execute: ty.Callable) -> None:
    """Make an image of the size of an overlay, with its base's content."""
    info = jsonutils.loads(execute(
        'qemu-img', 'info', '-U', '-f', 'qcow2', '--output=json', overlay)[0])
    execute('qemu-img', 'convert', '-O', 'qcow2',
            '-f', info.get('backing-filename-format', 'raw'),
            info['full-backing-filename'], path)
    execute('qemu-img', 'resize', '-f', 'qcow2', path,
            str(info['virtual-size']))


class Guest(libvirt_guest.Guest):
    """A domain whose disks are to be where another host wants them."""

    def __init__(self, domain, places: layout.Layout, notice: Notice):
        """Wrap a domain of this host.

        :param places: where the files are on this host
        :param notice: what the destination host tells
        """
        super().__init__(domain)
        self._places = places
        self._notice = notice

    def get_xml_desc(self, *args, **kwargs):
        xml = etree.fromstring(super().get_xml_desc(*args, **kwargs))
        for source in xml.findall('devices/disk/source[@file]'):
            path = self._path_there(source.get('file'))
            if path:
                source.set('file', path)
                # The destination's libvirt reads the chain from the image.
                disk = source.getparent()
                for chain in disk.findall('backingStore'):
                    disk.remove(chain)
        return etree.tostring(xml, encoding='unicode')

    def _path_there(self, path: str) -> str | None:
        """Where the destination host has a disk, None if it is not ours."""
        name = os.path.basename(path)
        if self._places.is_in_pool(path):
            return self._notice.path_of(name)
        return (self._notice.paths.get(name)
                if self._places.is_in_directory(path) else None)
