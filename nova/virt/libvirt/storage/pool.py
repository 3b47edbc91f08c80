#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.


"""Storage pools and their volumes: thin wrappers on libvirt's objects.

Every call here may block on a libvirt daemon, possibly on another host's.
Under eventlet call it through :func:`threads.off_hub`.
"""

import contextlib
import dataclasses
import errno
import functools
import os
import stat
import typing as ty

from lxml import builder
from lxml import etree
from oslo_utils import units
import tenacity

from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage.threads import libvirt

E = builder.ElementMaker()

_T = ty.TypeVar('_T')

# The end of an upload makes libvirt refresh the pool in the background, and
# other calls on the pool can be refused while that starts. Seconds.
BUSY_TIMEOUT = 5

# Many servers may move to a host at once, and each attempt looks into the
# directory that has all instance directories. Seconds.
SHARED_TIMEOUT = 30

# The first wait between two tries, and the longest, in seconds.
FIRST_WAIT = 0.1
LONGEST_WAIT = 2

# Name of an empty file that tells how much of its file system only root may
# use: it has a length of one byte for each MiB. nova-compute on the host makes
# it, since libvirt counts this space as available.
RESERVED_NAME = 'nova-reserved'

# Mode of the device of a new logical volume, as udev makes it. Its owner and
# group are udev's too.
DEVICE_MODE = 0o660

# Reads what a daemon says, which may be another host's: no entity of it may
# name a file of this host.
_PARSER = etree.XMLParser(resolve_entities=False, no_network=True)


def _is_busy(error: BaseException) -> bool:
    """Whether a pool may have asynchronous jobs running.

    The text of the error is in the daemon's language, its code is one for all
    internal errors.
    """
    return (isinstance(error, libvirt.libvirtError) and
            error.get_error_code() == libvirt.VIR_ERR_INTERNAL_ERROR and
            error.get_error_domain() == libvirt.VIR_FROM_STORAGE)


def _retrying(
    is_passing: ty.Callable[[BaseException], bool], seconds: float,
) -> ty.Callable[[ty.Callable[..., _T]], ty.Callable[..., _T]]:
    """Decorate a function that is to be tried again after some errors.

    tenacity.retry() is not for a function that several threads call: it has
    one dictionary of statistics for all of them, and whoever begins clears it
    under those who are about to wait.

    :param is_passing: whether an error is such a one
    :param seconds: how long to go on
    """
    def decorate(function: ty.Callable[..., _T]) -> ty.Callable[..., _T]:
        @functools.wraps(function)
        def call(*args: ty.Any, **kwargs: ty.Any) -> _T:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(is_passing),
                wait=tenacity.wait_random_exponential(
                    FIRST_WAIT, max=LONGEST_WAIT),
                stop=tenacity.stop_after_delay(seconds),
                sleep=threads.sleep, reraise=True)(function, *args, **kwargs)
        return call
    return decorate


_retry_busy = _retrying(_is_busy, BUSY_TIMEOUT)


@dataclasses.dataclass(frozen=True)
class Permissions:
    """Owner and mode of the files of a volume or pool.

    :ivar owner: numeric user id on the volume's host
    :ivar group: numeric group id on the volume's host
    :ivar mode: permission bits
    """
    owner: int
    group: int
    mode: int

    def xml(self) -> etree._Element:
        """The <permissions> element of a <target>."""
        return E.permissions(
            E.owner(str(self.owner)), E.group(str(self.group)),
            E.mode(f'{self.mode:04o}'))


@dataclasses.dataclass(frozen=True)
class Directory:
    """A directory on the host of a libvirt daemon.

    :ivar path: the directory
    :ivar permissions: who owns it
    :ivar available: bytes that users other than root may use
    """
    path: str
    permissions: Permissions
    available: int

    @classmethod
    def of(cls, pool: 'Pool') -> 'Directory':
        """The directory of a pool."""
        return cls(pool.path, pool.permissions, pool.available)


class Volume:
    """A volume of a storage pool (virStorageVol)."""

    def __init__(self, volume: 'libvirt.virStorageVol'):
        self.libvirt_volume = volume
        self.name: str = volume.name()

    @property
    def path(self) -> str:
        """The path on the volume's host, for which the daemon is asked."""
        return self.libvirt_volume.path()

    @property
    def key(self) -> str:
        """An id of the volume; of a logical volume the one that LVM gave it.

        One that is made anew under the same name has another.
        """
        return self.libvirt_volume.key()

    @property
    def length(self) -> int:
        """Bytes of the volume's file, which a stream would carry.

        That is the capacity of a raw disk, and the size of the file, not of
        the disk inside, of a qcow2 one.
        """
        return self.libvirt_volume.infoFlags(
            libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)[2]

    @property
    def allocation(self) -> int:
        """Bytes that the volume takes up in its pool."""
        return self.libvirt_volume.info()[2]

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory in that of the pool."""
        return self.libvirt_volume.info()[0] == libvirt.VIR_STORAGE_VOL_DIR

    @property
    def mode(self) -> int:
        """The permission bits of the volume's file."""
        xml = _parse(self.libvirt_volume.XMLDesc(0))
        return int(xml.findtext('target/permissions/mode'), 8)

    def delete(self) -> None:
        """Delete the volume; no error if it is gone already."""
        try:
            _retry_busy(self.libvirt_volume.delete)(0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise


class Pool:
    """A storage pool (virStoragePool) that is active.

    Its volumes are the files of a directory or the volumes of a group of LVM.

    :ivar permissions: of the directory, -1 where libvirt knows of none
    """

    def __init__(self, pool: 'libvirt.virStoragePool'):
        self.libvirt_pool = pool
        self.name: str = pool.name()
        target = _parse(pool.XMLDesc(0)).find('target')
        self.path: str = target.findtext('path')
        self.permissions = Permissions(
            owner=int(target.findtext('permissions/owner', '-1')),
            group=int(target.findtext('permissions/group', '-1')),
            mode=int(target.findtext('permissions/mode', '-1'), 8))

    @classmethod
    def lookup(cls, connection: 'libvirt.virConnect', name: str) -> 'Pool':
        """Find an active pool by its name.

        :raises: PoolNotFound, PoolInactive
        """
        pool = _lookup(connection, name)
        if pool is None:
            raise errors.PoolNotFound(
                f'there is no storage pool {name}',
                'Set [libvirt]use_storage_pools in nova.conf there and '
                'restart nova-compute.')
        if not pool.isActive():
            raise errors.PoolInactive(
                f'storage pool {name} is not active',
                f'Start it there: virsh pool-start {name}')
        return cls(pool)

    @classmethod
    def ensure(
        cls,
        connection: 'libvirt.virConnect',
        *,
        name: str,
        path: str,
        permissions: Permissions,
        autostart: bool,
    ) -> 'Pool':
        """Find this host's pool; define, build and start it where needed.

        A pool that an operator made under this name is used as it is.

        :param path: target directory of a pool that has to be defined
        :param permissions: of that directory
        :param autostart: whether the pool starts with the libvirt daemon
        """
        pool = _lookup(connection, name)
        is_built = os.path.isdir(path)
        if pool is None:
            pool = connection.storagePoolDefineXML(
                _pool_xml(name, path, permissions), 0)
            is_built = _is_built(path, permissions)
        if not pool.isActive():
            # An attempt to build it may have failed.
            pool.create(0 if is_built else
                        libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD)
        if bool(pool.autostart()) != autostart:
            pool.setAutostart(int(autostart))
        return cls(pool)

    @classmethod
    def attach(
        cls,
        connection: 'libvirt.virConnect',
        *,
        name: str,
        path: str,
    ) -> 'Pool':
        """Make a transient pool of a directory, or find it made already.

        :param path: the directory, which has to exist
        """
        pool = _lookup(connection, name)
        if pool is not None and not pool.isActive():
            # Whoever removed it was interrupted.
            pool.undefine()
            pool = None
        if pool is None:
            pool = connection.storagePoolCreateXML(
                _pool_xml(name, path, None), 0)
        return cls(pool)

    def attach_inner(self, name: str) -> 'Pool':
        """Make a transient pool of a directory in that of this pool."""
        return Pool.attach(
            self.libvirt_pool.connect(), name=f'{self.name}-{name}',
            path=os.path.join(self.path, name))

    @property
    def available(self) -> int:
        """Bytes that users other than root may use in the file system."""
        return max(self.libvirt_pool.info()[3] - self._reserved(), 0)

    def _reserved(self) -> int:
        """Bytes that only root may use, as nova-compute there tells."""
        reserved = self.find(RESERVED_NAME)
        return reserved.length * units.Mi if reserved else 0

    @_retry_busy
    def refresh(self) -> None:
        """Make libvirt look again which volumes there are."""
        self.libvirt_pool.refresh(0)

    @_retry_busy
    def volumes(self, prefix: str = '') -> list[Volume]:
        """The volumes whose names begin with ``prefix``."""
        return [Volume(volume)
                for volume in self.libvirt_pool.listAllVolumes(0)
                if _has_name(volume) and volume.name().startswith(prefix)]

    def delete(self, name: str) -> None:
        """Delete a volume, unless it is gone already."""
        volume = self.find(name)
        if volume:
            volume.delete()

    def find(self, name: str) -> Volume | None:
        """Look a volume up by its name, None if there is none."""
        try:
            return self.volume(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise
            return None

    @_retry_busy
    def volume(self, name: str) -> Volume:
        """Look a volume up by its name.

        :raises: libvirtError, VIR_ERR_NO_STORAGE_VOL
        """
        return Volume(self.libvirt_pool.storageVolLookupByName(name))

    @_retry_busy
    def create_volume(
        self, name: str, length: int, permissions: Permissions,
    ) -> Volume:
        """Create a volume that is all a hole.

        It is made as raw even if a qcow2 image will be written into it:
        libvirt then does not look for the image's backing file.

        :param length: bytes that a stream will carry
        """
        return self._create(name, 'raw', length, permissions)

    @_retry_busy
    def create_directory(self, name: str, permissions: Permissions) -> None:
        """Create a directory in that of the pool.

        Asks nothing of it. Who shares the pool may have ended it by now, and
        another attempt would find the directory in its way: see within().
        """
        self._create(name, 'dir', 0, permissions)

    @_retry_busy
    def create_logical_volume(self, name: str, length: int) -> Volume:
        """Create a volume in a group; it shows what was on the disk before.

        All of it is allocated. A sparse one is a snapshot, which is lost when
        more than a part of it has been written.

        :param length: bytes; LVM makes whole extents of them
        """
        return self._create_xml(E.volume(
            E.name(name),
            E.capacity(str(length), unit='bytes'),
            E.allocation(str(length), unit='bytes'),
            E.target(E.permissions(E.mode(f'{DEVICE_MODE:04o}')))))

    def _create(
        self, name: str, kind: str, length: int, permissions: Permissions,
    ) -> Volume:
        return self._create_xml(E.volume(
            E.name(name),
            E.capacity(str(length), unit='bytes'),
            E.allocation('0', unit='bytes'),
            E.target(E.format(type=kind), permissions.xml())))

    def _create_xml(self, xml: etree._Element) -> Volume:
        return Volume(self.libvirt_pool.createXML(_text(xml), 0))

    @_retry_busy
    def detach(self) -> None:
        """End a transient pool; its directory stays."""
        self.libvirt_pool.destroy()


def _is_built(path: str, permissions: Permissions) -> bool:
    """Whether the directory of a pool is there as it would be made.

    libvirt sets its mode again where it may not: on a network file system
    root may be nobody.
    """
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and permissions == Permissions(
        found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))


def _has_name(volume: 'libvirt.virStorageVol') -> bool:
    """Whether a volume's name is UTF-8; that of a stranger's may not be."""
    try:
        return bool(volume.name())
    except UnicodeDecodeError:
        return False


def _is_shared_pool(error: BaseException) -> bool:
    """Whether somebody else made or removed a pool of a directory."""
    return isinstance(error, libvirt.libvirtError) and (
        error.get_error_code() in (libvirt.VIR_ERR_NO_STORAGE_POOL,
                                   libvirt.VIR_ERR_OPERATION_INVALID,
                                   libvirt.VIR_ERR_OPERATION_FAILED))


_retry_shared = _retrying(_is_shared_pool, SHARED_TIMEOUT)


@_retry_shared
def of_group(connection: 'libvirt.virConnect', group: str, path: str) -> Pool:
    """The pool of a volume group, which is made if there is none.

    Nobody ends it: libvirt then deactivates all volumes of the group, and a
    server that is off would have no disks any more. libvirt does not probe
    what is in a logical volume.

    :param path: directory of the devices of the group
    :raises: libvirtError
    """
    pool = _lookup_path(connection, path)
    if pool is None:
        pool = connection.storagePoolCreateXML(_text(E.pool(
            E.name(f'nova-group-{group}'), E.source(E.name(group)),
            E.target(E.path(path)), type='logical')), 0)
    return Pool(pool)


@_retry_shared
def within(
    connection: 'libvirt.virConnect', *, path: str, name: str,
    function: ty.Callable[[Pool], _T],
) -> _T:
    """Do something in a directory, which has to exist.

    libvirt only tells of directories that are targets of pools, and there is
    one pool of a directory at most: of those who look at the same time all
    use the same. Who made it ends it, and the others do their part again.

    :param name: of a transient pool, if there is no other
    :param function: called with the pool; again if the pool ended, maybe
        after all has been done
    """
    with _at(connection, path=path, name=name) as pool:
        pool.refresh()
        return function(pool)


@contextlib.contextmanager
def _at(
    connection: 'libvirt.virConnect', *, path: str, name: str,
) -> ty.Iterator[Pool]:
    """The pool of a directory, or one that is made and ended again.

    :param path: the directory, which has to exist
    :param name: of the pool, if it has to be made
    """
    pool = _lookup_path(connection, path)
    if pool is not None and pool.name() != name:
        yield Pool(pool)
        return
    # A pool of this name is left of an attempt that was interrupted.
    made = Pool(pool or connection.storagePoolCreateXML(
        _pool_xml(name, path, None), 0))
    with _ending(made):
        yield made


@contextlib.contextmanager
def _ending(pool: Pool) -> ty.Iterator[None]:
    """End a transient pool after the body."""
    try:
        yield
    except TimeoutError:
        # Skip the end of the pool: a daemon that hangs would hang with it.
        raise
    except BaseException:
        # A pool that stays is in nobody's way: the next attempt uses it.
        with contextlib.suppress(libvirt.libvirtError, TimeoutError):
            pool.detach()
        raise
    try:
        pool.detach()
    except libvirt.libvirtError as error:
        # Another attempt may have ended it, or a look that failed.
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_STORAGE_POOL,
                                          libvirt.VIR_ERR_OPERATION_INVALID):
            raise


@_retry_shared
def is_file(
    connection: 'libvirt.virConnect', *, path: str, name: str,
) -> bool:
    """Whether a path is that of a file, which libvirt does not open.

    It would probe every file in the directory of a pool. It makes no pool of
    a file, and tells what keeps it from that.

    :param name: for the pool that is not made
    """
    try:
        pool = connection.storagePoolCreateXML(
            _pool_xml(name, path, None), 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_SYSTEM_ERROR:
            raise
        return error.get_int1() == errno.ENOTDIR
    pool.destroy()
    return False


def end(connection: 'libvirt.virConnect', name: str) -> None:
    """End a pool and forget it, if there is one; its files stay."""
    pool = _lookup(connection, name)
    if pool is None:
        return
    is_persistent = pool.isPersistent()
    if pool.isActive():
        _retry_busy(pool.destroy)()
    if is_persistent:
        pool.undefine()


def delete_directory(parent: Pool, directory: Volume) -> None:
    """Delete a directory in that of a pool, with all that is in it."""
    pool = parent.attach_inner(directory.name)
    with _ending(pool):
        pool.refresh()
        for volume in pool.volumes():
            if volume.is_directory:
                delete_directory(pool, volume)
            else:
                volume.delete()
    directory.delete()


def find_path(connection: 'libvirt.virConnect', name: str) -> str | None:
    """Return the directory of a pool, active or not; None without a pool."""
    pool = _lookup(connection, name)
    return pool and _parse(pool.XMLDesc(0)).findtext('target/path')


def exists(connection: 'libvirt.virConnect', name: str) -> bool:
    """Whether there is a pool of a name, active or not."""
    return _lookup(connection, name) is not None


def _lookup_path(
    connection: 'libvirt.virConnect', path: str,
) -> 'libvirt.virStoragePool | None':
    return _find(connection.storagePoolLookupByTargetPath, path)


def _lookup(
    connection: 'libvirt.virConnect', name: str,
) -> 'libvirt.virStoragePool | None':
    return _find(connection.storagePoolLookupByName, name)


def _find(
    lookup: 'ty.Callable[[str], libvirt.virStoragePool]', what: str,
) -> 'libvirt.virStoragePool | None':
    try:
        return lookup(what)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        return None


def _pool_xml(name: str, path: str, permissions: Permissions | None) -> str:
    target = E.target(E.path(path))
    if permissions:
        target.append(permissions.xml())
    return _text(E.pool(E.name(name), target, type='dir'))


def _parse(xml: str) -> ty.Any:
    return etree.fromstring(xml.encode(), _PARSER)


def _text(xml: etree._Element) -> str:
    return etree.tostring(xml, encoding='unicode')
