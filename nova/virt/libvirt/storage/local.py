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

"""This host's own files of a server.

nova-compute owns the directory of the pool and those of the instances, and
needs no libvirt to look at, rename, flush or delete what is in them. libvirt
takes notice when the pool is refreshed.

What blocks here blocks on a disk. Under eventlet call it through
:func:`threads.off_hub`, except for what starts programs: adopt(),
take_bases() and flush_all().
"""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import typing as ty

from oslo_concurrency import processutils
from oslo_utils import fileutils
from oslo_utils import units
from oslo_utils import uuidutils

import nova.conf
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import overlay
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import threads

CONF = nova.conf.CONF

# Key in what a source says of its first disk: the digests of files' heads.
_HEADS = 'nova_storage_migrate_heads'

# Stands for the first disk of a server that has none of its own.
_NO_DISK = {'path': '', 'type': 'none'}

# Formats that are recorded, those of disks that are files.
_FILE_FORMATS = ('qcow2', 'raw')


def adopt(places: layout.Layout, disks: list[dict[str, ty.Any]]) -> None:
    """Take over the files that another host wrote here.

    Each disk has to be there, with the format that it had on the source. All
    files that arrived and their directories are on stable storage when this
    returns: the end of an upload leaves them in the page cache. Without a
    claim the hosts may share the instance directory, and QEMU on the other one
    has made files in it that nova-compute cannot read.

    Starts programs: call it in a green thread.

    :param disks: what the source says of the disks
    :raises: StorageError, OSError
    """
    if threads.off_hub(_check_and_flush, places, disks):
        take_bases(places)
        threads.off_hub(drop_claims, places)


def _check_and_flush(places: layout.Layout,
                     disks: list[dict[str, ty.Any]]) -> bool:
    """Check and flush what arrived; return whether it is under a claim."""
    claims = places.claims()
    if claims and not any(is_volume(places, info) for info in disks):
        _refuse_volumes(places)
    for path, digest in heads(disks).items():
        _check_head(path, digest)
    for info in layout.without_swap(disks):
        if info['type'] in _FILE_FORMATS and (
                claims or is_volume(places, info)):
            _check_arrived(places, info)
    if claims:
        flush(places)
    elif any(is_volume(places, info) for info in disks):
        _flush_known(places)
    return bool(claims)


def take_bases(places: layout.Layout) -> None:
    """Let the disks of a server have the base images that came along.

    One of Glance goes into the image cache. One that the source host made for
    itself does not: the cache may have another of the same name, on which
    other disks stand. The overlays on it become images of their own.

    Goes on where an earlier call ended. Starts programs: call it in a green
    thread.

    :raises: StorageError, OSError
    """
    for path, base in places.bases().items():
        name = os.path.basename(path)
        if name.startswith(layout.OWN_BASES):
            for disk in _overlays(places, {name, os.path.basename(base)}):
                overlay.flatten(disk, base)
                threads.off_hub(layout.flush, disk)
            threads.off_hub(os.unlink, base)
        else:
            threads.off_hub(_move_into_cache, base, path)


def _overlays(places: layout.Layout, names: set[str]) -> list[str]:
    """Paths of the disks that stand on a base image.

    :param names: of the base image
    """
    images = [path for path, disk_format in places.formats().items()
              if disk_format == 'qcow2' and os.path.isfile(path)]
    return [path for path in images
            if os.path.basename(layout.backing_file(path) or '') in names]


def _refuse_volumes(places: layout.Layout) -> None:
    """Refuse what would be taken for the disks that arrived as files."""
    for path in _volumes(places):
        raise errors.StorageError(
            f'volume {path} is in the way of the disks in {places.directory}',
            'Revert the migration, and find out whose the volume is.')


def heads(disks: list[dict[str, ty.Any]]) -> dict[str, str]:
    """Digests of the first bytes of files that arrived, by path here."""
    return disks[0].get(_HEADS, {}) if disks else {}


def add_heads(disks: list[dict[str, ty.Any]], digests: dict[str, str]) -> None:
    """Have the destination check the first bytes of the files.

    Nova's own driver ignores this.
    """
    if digests:
        first = disks[0] if disks else _NO_DISK
        disks[:1] = [first | {_HEADS: digests}]


def _check_head(path: str, digest: str) -> None:
    """Check the first bytes of a file: libvirt must not read them back."""
    with open(path, 'rb') as file:
        head = file.read(layout.HEAD_BYTES)
    if layout.digest(head) != digest:
        raise errors.StorageError(
            f'the first bytes of {path} are not those that were sent',
            'Revert the migration.')


def _move_into_cache(image: str, path: str) -> None:
    """Give a base image that came along its place in the image cache.

    The base image may be there already, and in use: then that stays. Nobody
    sees a part of one.

    :raises: OSError
    """
    fileutils.ensure_tree(os.path.dirname(path))
    try:
        _link(image, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The cache is on a file system of its own.
        part = f'{path}.{uuidutils.generate_uuid()}.part'
        with fileutils.remove_path_on_error(part):
            shutil.copyfile(image, part)
            layout.flush(part)
            _link(part, path)
        os.unlink(part)
    layout.flush(os.path.dirname(path))
    os.unlink(image)


def _link(image: str, path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.link(image, path)


def record_images(places: layout.Layout, names: ty.Collection[str]) -> None:
    """Record those files of a server as images that are recorded as raw.

    The instance directory may be the one that is kept for a revert.

    :param names: of the files that a domain has as images
    :raises: StorageError, OSError
    """
    for record in filter(layout.has_record, (
            places.record_path, places.kept_path(places.record_path))):
        formats = layout.read_record(record)
        wrong = {path: 'qcow2' for path, disk_format in formats.items()
                 if disk_format == 'raw' and os.path.basename(path) in names
                 and _may_be_image(os.path.join(
                     os.path.dirname(record), os.path.basename(path)))}
        if wrong:
            layout.write_record(record, formats | wrong)


def _may_be_image(path: str) -> bool:
    """Whether a domain that has a file as an image may be right.

    Nova's own driver names a raw disk as one that was live migrated.
    """
    try:
        return layout.is_image(path)
    except FileNotFoundError:
        return False
    except PermissionError:
        # QEMU's alone.
        return True


def settle(places: layout.Layout) -> None:
    """Take over the files of a server that was live migrated to here.

    QEMU, which runs by now, may own files that nova-compute cannot read: only
    what QEMU reads and does not write has to be flushed for it.

    :raises: OSError
    """
    _flush_known(places)
    drop_claims(places)


def _flush_known(places: layout.Layout) -> None:
    """Wait until the files that QEMU reads are on stable storage."""
    volumes = _volumes(places)
    names = [places.record_path, *(
        os.path.join(places.directory, name) for name in layout.COMPANIONS),
        *(path for path in places.formats()
          if os.path.dirname(path) == places.directory)]
    for path in [*volumes, *dict.fromkeys(filter(os.path.exists, names)),
                 *([places.pool_path] if volumes else []), places.directory,
                 places.parent]:
        layout.flush(path)


def is_volume(places: layout.Layout, info: dict[str, ty.Any]) -> bool:
    """Whether a disk was a volume of a pool on its source."""
    path = info['path']
    return (os.path.basename(path).startswith(places.prefix) and
            not path.startswith(layout.DEVICES + os.sep))


def _check_arrived(places: layout.Layout, info: dict[str, ty.Any]) -> None:
    if places.is_in_group(info['path']):
        # Its format is always raw, and recorded nowhere.
        _check_device(info['path'])
        return
    if is_volume(places, info):
        path = places.volume_path(places.disk_name(info['path']))
    else:
        path = os.path.join(places.directory, os.path.basename(info['path']))
    if not os.path.isfile(path):
        raise errors.StorageError(
            f'disk {path} of the server is not here, it was written to '
            f'{info["path"]}',
            'Set [libvirt]disks_pool_path to the directory of the pool.')
    recorded = places.format(path)
    if recorded != info['type']:
        raise errors.StorageError(
            f'disk {path} was {info["type"]} on its source and is '
            f'{recorded or "not recorded"} in {places.record_path}',
            'Revert the migration.')


def _check_device(path: str) -> None:
    if not os.path.exists(path):
        raise errors.StorageError(
            f'volume {path} of the server is not here',
            'Activate its volume group: vgchange -ay.')


def flush(places: layout.Layout) -> None:
    """Wait until all files of a server are on stable storage.

    :raises: OSError, also of an earlier write
    """
    claims = places.claims()
    volumes = _volumes(places)
    paths = [*volumes, *([places.pool_path] if volumes else [])]
    for directory, _names, files in os.walk(places.directory):
        paths += {os.path.join(directory, name)
                  for name in files} - claims.keys()
        paths.append(directory)
    paths.append(places.parent)
    for path in filter(os.path.exists, paths):
        layout.flush(path)


def flush_all() -> None:
    """Wait until the file systems of all disks are on stable storage.

    syncfs() leaves the error of a write to a file for adopt(), which fsync()
    would not.

    :raises: ProcessExecutionError
    """
    for path in filter(os.path.isdir, [
            CONF.libvirt.disks_pool_path, CONF.instances_path]):
        processutils.execute('sync', '--file-system', path)


def list_copied() -> list[str]:
    """The uuids of servers of which a copy is, or was, here."""
    paths = [path for kind in (layout.CLAIM, layout.ARRIVED)
             for path in glob.glob(os.path.join(
                 glob.escape(CONF.instances_path), f'*_{kind}*'))]
    return sorted({os.path.basename(path).partition('_')[0]
                   for path in paths})


def is_abandoned(places: layout.Layout, host: str | None) -> bool:
    """Whether files here are a copy that its source does not need any more.

    :param host: the server's, None if it was deleted; no migration of it is
        under way
    """
    claims = places.claims().values()
    return (bool(claims) and
            all(host in (None, claim.source) for claim in claims) and
            not places.kept() and not os.path.exists(places.kept_directory))


def _volumes(places: layout.Layout) -> list[str]:
    """Paths of the volumes of a server, without the claims."""
    claims = places.claims()
    return [path for path in places.volumes() if path not in claims]


def drop_claims(places: layout.Layout) -> None:
    """Let the files here be the server's own.

    :raises: OSError
    """
    _delete(places.claims())


def drop_lone_claims(places: layout.Layout) -> None:
    """Delete the claims if there is nothing else of the server here.

    :raises: OSError
    """
    if not (_volumes(places) or places.kept() or places.logical_volumes() or
            os.path.exists(places.directory) or
            os.path.exists(places.kept_directory)):
        drop_claims(places)


def delete_volumes(places: layout.Layout) -> None:
    """Delete a server's volumes here, also those kept for a revert.

    :raises: OSError
    """
    # A claim goes last: without it what is left would be the server's disks.
    claims = places.claims()
    _delete(path for path in [*places.volumes(), *places.kept()]
            if path not in claims)
    _delete(claims)


def delete_kept(places: layout.Layout) -> None:
    """Delete what a resize on this host kept for a revert.

    :raises: OSError
    """
    _delete(places.kept())


def delete_disks(places: layout.Layout, names: ty.Iterable[str]) -> None:
    """Delete those of some disks of a server that are volumes here.

    :raises: OSError
    """
    _delete(map(places.volume_path, names))


def delete_unknown(places: layout.Layout,
                   disks: list[dict[str, ty.Any]]) -> None:
    """Delete ephemeral disks that a server which arrived did not have.

    A resize that was reverted may have left one on storage that hosts share.
    The server would get it, as it is, for a new disk.

    :param disks: what the source says of the disks, all but the swap disk
    :raises: OSError
    """
    known = {places.disk_name(info['path']) for info in disks}
    found = map(places.disk_name, _volumes(places))
    delete_disks(places, [name for name in found if name not in known and
                          name.startswith(layout.EPHEMERAL)])


def delete_kept_volumes(places: layout.Layout) -> None:
    """Delete the volumes that the kept instance directory has on record.

    No others: disks that were files here may be volumes by now, in a pool that
    both hosts share.

    :raises: OSError, StorageError if the record cannot be read
    """
    formats = layout.read_record(places.kept_path(places.record_path))
    _delete(places.volume_path(places.disk_name(path)) for path in formats
            if os.path.basename(path).startswith(places.prefix))


def delete_all(places: layout.Layout) -> None:
    """Delete all files of a server here, the claims last.

    :raises: OSError
    """
    for directory in places.directory, places.kept_directory:
        if os.path.isdir(directory):
            shutil.rmtree(directory)
    delete_volumes(places)


def _delete(paths: ty.Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def make_marker(places: layout.Layout) -> str:
    """Make an empty file with a new name among the volumes of a server.

    :returns: its path
    """
    descriptor, path = tempfile.mkstemp(
        prefix=places.prefix, dir=places.pool_path)
    os.close(descriptor)
    return path


def keep_directory(places: layout.Layout) -> None:
    """Put the instance directory where a revert will look for it.

    :raises: OSError, also if an earlier migration left one there
    """
    os.rename(places.directory, places.kept_directory)
    layout.flush(places.parent)


def remove_stale_directory(places: layout.Layout) -> None:
    """Delete what an earlier migration left beside the instance directory.

    Without an instance directory it is no leftover, but the only one.

    :raises: OSError
    """
    if os.path.exists(places.directory) and os.path.exists(
            places.kept_directory):
        shutil.rmtree(places.kept_directory)


def recover_directory(places: layout.Layout) -> None:
    """Undo keep_directory() after a migration that did not go on.

    :raises: OSError
    """
    if has_kept_directory(places):
        os.rename(places.kept_directory, places.directory)
        layout.flush(places.parent)


def has_kept_directory(places: layout.Layout) -> bool:
    """Whether a migration kept the server's files here for a revert.

    On shared storage it did not: the instance directory is in use.
    """
    return os.path.exists(places.kept_directory) and not os.path.exists(
        places.directory)


def keep(places: layout.Layout) -> None:
    """Rename the disks and the directory of a server, for a revert.

    Makes an empty instance directory. libvirt cannot rename a volume, but
    nova-compute owns the directory of the pool. restore() leads back from
    wherever this or what follows it ends, even if nova-compute does.

    :raises: OSError
    """
    for path in places.volumes():
        os.rename(path, places.kept_path(path))
    # The renamed directory says that all volumes were renamed.
    layout.flush(places.pool_path)
    os.rename(places.directory, places.kept_directory)
    fileutils.ensure_tree(places.directory)


def is_half_copied(places: layout.Layout) -> bool:
    """Whether nova-compute ended during keep(), or during the copies after it.

    The directory is renamed after the volumes, and the record is copied last.
    """
    if not places.kept():
        return False
    if os.path.exists(places.kept_directory):
        return not os.path.isfile(places.record_path)
    return not places.volumes()


def restore(places: layout.Layout) -> None:
    """Put the kept disks and directory back in the place of their copies.

    :raises: OSError, StorageError
    """
    if os.path.exists(places.kept_directory):
        _delete_new_volumes(places)
    for path in places.kept():
        os.replace(path, places.volume_path(places.disk_name(path)))
    restore_directory(places)


def restore_directory(places: layout.Layout) -> None:
    """Put the kept directory back in the place of its copy.

    :raises: OSError
    """
    if os.path.exists(places.kept_directory):
        shutil.rmtree(places.directory, ignore_errors=True)
        os.rename(places.kept_directory, places.directory)


def _delete_new_volumes(places: layout.Layout) -> None:
    """Delete the disks that the server did not have before its resize.

    The record tells them from the others, also when this is called again after
    an attempt that did not end.
    """
    # The record may spell the directory of the pool another way.
    names = set(map(os.path.basename, layout.read_record(
        places.kept_path(places.record_path))))
    for path in places.volumes():
        if (names and os.path.basename(path) not in names and
                not os.path.exists(places.kept_path(path))):
            os.unlink(path)


def find_pool(uri: str, name: str) -> str | None:
    """Return the directory of this host's pool, active or not.

    :returns: None if there is no such pool
    :raises: libvirtError, TimeoutError
    """
    with contextlib.closing(daemon.open_connection(uri)) as connection:
        return storage_pool.find_path(connection, name)


def ensure_pool(uri: str, name: str, path: str, autostart: bool) -> str:
    """See to it that this host has an active pool.

    :param uri: libvirt URI of this host
    :param path: directory of the pool, if it has to be made; this process's
        user will own it
    :param autostart: whether the pool starts with the libvirt daemon
    :returns: path of its directory
    :raises: libvirtError, TimeoutError
    """
    with contextlib.closing(daemon.open_connection(uri)) as connection:
        return storage_pool.Pool.ensure(
            connection, name=name, path=path, autostart=autostart,
            permissions=storage_pool.Permissions(
                os.getuid(), os.getgid(), layout.DIRECTORY_MODE)).path


def tell_place(mark: str | None) -> None:
    """Tell other hosts where servers have their disks on this one.

    :param mark: name of the file that tells it, None where they are in a pool
    :raises: OSError
    """
    for path in [os.path.join(CONF.instances_path, layout.NO_POOL),
                 *glob.glob(os.path.join(glob.escape(CONF.instances_path),
                                         f'{layout.GROUP_MARK}*'))]:
        if os.path.basename(path) != mark:
            fileutils.delete_if_exists(path)
    if mark:
        fileutils.ensure_tree(CONF.instances_path)
        os.close(os.open(os.path.join(CONF.instances_path, mark),
                         os.O_CREAT, layout.FILE_MODE))


def end_pool(uri: str, name: str) -> None:
    """End a pool of this host; what is in it stays.

    :param uri: libvirt URI of this host
    :raises: libvirtError, TimeoutError
    """
    with contextlib.closing(daemon.open_connection(uri)) as connection:
        storage_pool.end(connection, name)


def tell_reserved(directory: str) -> None:
    """Tell other hosts how much of a file system only root may use.

    libvirt counts this space as available, and has no call that tells it. A
    guest could not use what a migration fills it with.

    :param directory: of a pool, or of the instance directories
    :raises: OSError
    """
    status = os.statvfs(directory)
    reserved = (status.f_bfree - status.f_bavail) * status.f_frsize
    length = -(-reserved // units.Mi)
    path = os.path.join(directory, storage_pool.RESERVED_NAME)
    if not length:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    elif not os.path.exists(path) or os.path.getsize(path) != length:
        with open(path, 'ab') as file:
            file.truncate(length)
