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

"""The places of one server on one libvirt daemon, and the claim on them.

A server has two places on a host: its volumes in the disks pool, and its
instance directory. Where Nova has its disks in LVM, a volume group takes the
place of the pool, and the claim on the instance directory is that on the
volumes too. The claim is an empty file that stands for a copy which is not
complete. It is made when nothing of anybody else's is there, and before
anything of ours; it goes last. Right before anything is deleted the claim is
read again, and the daemon is asked for a domain of the server.

libvirt probes each file in the directory of a pool, as root: it opens the
backing file that a header there names, and waits for it. In the disks pool all
files are images whose header QEMU wrote. An instance directory may have files
whose first bytes a guest wrote. So the claim on it is beside it, in the parent
directory. No pool is made of an instance directory without a claim that says
"incoming", and under that claim no file gets a head that a guest may have
written. When all else has arrived, the claim changes to "arrived", the pool
ends, and then the heads are sent.

Every call here may block on the daemon, with a bound. Under eventlet call it
through :func:`threads.off_hub`.
"""

import contextlib
import dataclasses
import errno
import os
import tempfile
import typing as ty

from oslo_utils import units

import nova.conf
from nova.virt.libvirt.storage import daemon as libvirt_daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout as server_layout
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage.threads import libvirt

CONF = nova.conf.CONF

_T = ty.TypeVar('_T')

# A full file system may keep as many bytes for itself.
KEPT_BYTES = 64 * units.Mi


class Place:
    """One directory of files on one libvirt daemon.

    libvirt has no directories within a pool: each directory below gets a
    transient pool of its own, for as long as the place is used.

    :ivar path: the directory
    :ivar owner: who gets the files that are made
    """

    def __init__(self, pool: storage_pool.Pool,
                 owner: storage_pool.Permissions):
        """Use a directory through the pool of it.

        :param owner: who gets the files that are made; nova-compute there
        """
        self.path = pool.path
        self._pool = pool
        self.owner = owner
        self._inner: dict[str, storage_pool.Pool] = {}

    def look_at_owner(self) -> None:
        """Let files that are made belong to who owned it at the last look."""
        self.owner = storage_pool.Pool(self._pool.libvirt_pool).permissions

    def files(self, prefix: str = '') -> list[storage_pool.Volume]:
        """The files whose names begin with ``prefix``, as they are now."""
        self._pool.refresh()
        return self._pool.volumes(prefix)

    def sizes(self, prefix: str = '') -> dict[str, int]:
        """Bytes that these files take up, by name."""
        return {file.name: file.allocation for file in self.files(prefix)}

    def room(self) -> int:
        """Bytes that users other than root may use in the file system."""
        return self._pool.available

    def create(self, name: str, length: int,
               mode: int = server_layout.FILE_MODE) -> storage_pool.Volume:
        """Create a file that is all a hole.

        :param name: of the file, with the directories it is in, which exist
        :param length: bytes that will be written to it
        """
        directory, base = os.path.split(name)
        return self._at(directory).create_volume(
            base, length, self._permissions(mode))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        directory, base = os.path.split(name)
        pool = self._at(directory)
        pool.refresh()
        pool.delete(base)

    def make_directory(self, name: str, mode: int) -> None:
        """Create a directory, in one that exists."""
        directory, base = os.path.split(name)
        self._at(directory).create_directory(base, self._permissions(mode))

    def find(self, name: str) -> storage_pool.Volume:
        """Look a file up again.

        :raises: libvirtError, VIR_ERR_NO_STORAGE_VOL
        """
        directory, base = os.path.split(name)
        pool = self._at(directory)
        pool.refresh()
        return pool.volume(base)

    def tree(self, name: str, below: str = '') -> list[server_layout.File]:
        """The directory and all that is in it, with the modes it has.

        :param name: of the directory in the instance directory
        :param below: a directory in this one, to list instead
        """
        pool = self._at(below)
        pool.refresh()
        files = [server_layout.File(
            name, server_layout.DIRECTORY, pool.path,
            mode=pool.permissions.mode, is_directory=True)]
        for volume in pool.volumes():
            inner = os.path.join(name, volume.name)
            if volume.is_directory:
                files += self.tree(inner, os.path.join(below, volume.name))
            else:
                files.append(server_layout.File(
                    inner, server_layout.DIRECTORY, volume.path,
                    mode=volume.mode))
        return files

    def clear(self, prefix: str = '',
              spare: ty.Callable[[str], bool] = lambda name: False) -> None:
        """Delete the files whose names begin with ``prefix``.

        :param spare: tells by its name whether a file is to stay
        """
        self._release_inner()
        for file in self.files(prefix):
            if spare(file.name):
                continue
            self._delete(file)

    def _delete(self, file: storage_pool.Volume) -> None:
        if file.is_directory:
            storage_pool.delete_directory(self._pool, file)
        else:
            file.delete()

    def release(self) -> None:
        """Let go of transient pools; the files stay.

        :raises: libvirtError, TimeoutError
        """
        self._release_inner()
        self._pool.detach()

    def _release_inner(self) -> None:
        for pool in reversed(self._inner.values()):
            pool.detach()
        self._inner.clear()

    def _at(self, directory: str) -> storage_pool.Pool:
        """The pool of a directory below."""
        if not directory:
            return self._pool
        if directory not in self._inner:
            parent, base = os.path.split(directory)
            self._inner[directory] = self._at(parent).attach_inner(base)
        return self._inner[directory]

    def _permissions(self, mode: int) -> storage_pool.Permissions:
        return dataclasses.replace(self.owner, mode=mode)


class Group(Place):
    """The volume group of a host, as a place of files.

    Whoever deletes a volume wipes it: the next one that is made there would
    show its content.
    """

    def __init__(self, pool: storage_pool.Pool):
        super().__init__(pool, pool.permissions)

    def keys(self, prefix: str) -> set[str]:
        """The keys of the volumes whose names begin with ``prefix``."""
        return {volume.key for volume in self.files(prefix)}

    def room(self) -> int:
        """Bytes that volumes may take up."""
        self._pool.refresh()
        return self._pool.available

    def make(self, name: str, length: int,
             again: bool = False) -> storage_pool.Volume:
        """Create a volume that shows what was on the disk before.

        :param length: bytes; the volume may have more
        :param again: whether this attempt may have created it before; it is
            written as a whole again
        """
        self._pool.refresh()
        volume = (again and self._pool.find(name)) or (
            self._pool.create_logical_volume(name, length))
        # libvirt 11 ends when an upload goes beyond the end of a device.
        if volume.length < length:
            raise errors.StorageError(
                f'volume {volume.path} has {volume.length} bytes, and '
                f'{length} are needed', 'Find out what made it smaller.')
        return volume

    def _delete(self, file: storage_pool.Volume) -> None:
        # Overwrite as much of it with zeros as Nova would.
        if CONF.libvirt.volume_clear != 'none':
            size = CONF.libvirt.volume_clear_size * units.Mi
            stream.wipe(
                file.libvirt_volume, 0, min(size or file.length, file.length),
                stall_seconds=CONF.libvirt.vol_upload_migration_stall_timeout)
        file.delete()


class Site:
    """One server's places on one libvirt daemon; of either host.

    :ivar daemon: the host's libvirt daemon
    :ivar layout: where the server's files are on the host, once connected
    :ivar is_shared: whether both hosts share the places, once checked
    """

    def __init__(
        self,
        daemon: libvirt_daemon.Daemon,
        layout: server_layout.Layout,
        pool_name: str,
        claim: server_layout.Claim,
        uses_pool: bool = True,
        uses_group: bool = False,
    ):
        """Name the host and the server; nothing happens yet.

        :param pool_name: of the disks pool
        :param claim: of this attempt
        :param uses_pool: whether any file of the server is in the pool
        :param uses_group: whether any is in the volume group
        """
        self.daemon = daemon
        self.layout = layout
        self.is_shared = False
        self._pool_name = pool_name
        self._claim = claim
        self._uses_pool = uses_pool
        self._uses_group = uses_group
        self._pool: Place | None = None
        self._group: Group | None = None
        self._directory: Place | None = None
        self._state: Place | None = None
        self._parent: storage_pool.Directory | None = None
        # Whether a guest may have written what is in the instance directory.
        self._is_sealed = False
        self._has_directory = False
        # Bytes that the files of each place take up.
        self._needed: dict[str, int] = {}

    def connect(self) -> None:
        """Connect to the daemon, and find the places there.

        :raises: StorageError, libvirtError, TimeoutError
        """
        self.daemon.connect()
        if self._uses_pool:
            pool = storage_pool.Pool.lookup(
                self.daemon.connection, self._pool_name)
            self._pool = Place(pool, pool.permissions)
            self.layout = dataclasses.replace(
                self.layout, pool_path=pool.path)
        if self._uses_group:
            self._group = Group(self._find_group())

    def close(self) -> None:
        """Let go of the vTPM's state and close the connection."""
        if self._state is not None:
            with contextlib.suppress(libvirt.libvirtError, TimeoutError):
                self._state.release()
            self._state = None
        self.daemon.close()

    # The source.

    def open(
        self, file: server_layout.File, skip: int = 0,
    ) -> tuple[stream.Source, int]:
        """Open a file of the server for reading.

        :param skip: bytes to leave out at the start of the file
        :returns: the source to read it from, and the file's length in bytes
        :raises: OSError, libvirtError, TimeoutError
        """
        if file.data is not None:
            return stream.MemorySource(file.data[skip:]), len(file.data)
        if file.place == server_layout.GROUP or (
                file.place == server_layout.POOL and
                self.layout.is_in_pool(file.path)):
            volume = self._place(file.place).find(file.name)
        elif self._state and file.path.startswith(self._state.path):
            volume = self._state.find(
                os.path.relpath(file.path, self._state.path))
        else:
            # No pool is made of the directory: libvirt would probe what a
            # guest wrote into a raw disk.
            return (stream.FileSource(file.path, skip),
                    os.path.getsize(file.path))
        length = volume.length
        return stream.open_source(
            volume.libvirt_volume, length,
            CONF.libvirt.vol_upload_migration_direct_read, skip), length

    def head(self, file: server_layout.File) -> bytes:
        """The start of a file, which a guest may have written.

        :raises: OSError
        """
        if file.data is not None:
            return file.data[:file.head_bytes]
        with open(file.path, 'rb') as disk:
            return disk.read(file.head_bytes)

    def length(self, file: server_layout.File) -> int:
        """Bytes that a copy of a file will have, holes included."""
        return 0 if file.is_directory else self.open(file)[1]

    def vtpm(self) -> list[server_layout.File]:
        """The state of the server's vTPM, with the modes that it has.

        It goes into the instance directory. From there Nova's own code, which
        finishes the migration, takes it to where libvirt looks for it. It is
        read through libvirt: it belongs to a user that lets no other in.
        """
        path = self.layout.vtpm_path
        if not os.path.exists(path):
            return []
        pool = storage_pool.Pool.attach(
            self.daemon.connection, path=path,
            name=f'nova-{self.layout.uuid}-state')
        self._state = Place(pool, pool.permissions)
        top = os.path.join(server_layout.VTPM, self.layout.uuid)
        parent = server_layout.File(
            server_layout.VTPM, server_layout.DIRECTORY, path,
            mode=server_layout.DIRECTORY_MODE, is_directory=True)
        return [parent, *self._state.tree(top)]

    # The destination.

    def check(self, here: server_layout.Layout, name: str,
              needed: dict[str, int]) -> None:
        """Check that the host can take the server; change nothing there.

        :param here: where the files are on the source host
        :param name: of the server's domain
        :param needed: bytes that the files of each place take up, nothing if
            there are none
        :raises: Refused, libvirtError, TimeoutError
        """
        self._instances()
        self._check_domain(name)
        self.is_shared = self._find_shared(here)
        if self.is_shared or not needed:
            return
        found = self._find()
        self._check_names(found)
        if self._group is not None:
            self._check_driver()
            _check_room(f'volume group {self._group_name}',
                        self._group.room(),
                        self._group.sizes(self.layout.prefix),
                        needed.get(server_layout.GROUP, 0))
        if self._pool is not None:
            self._check_owner(self._pool)
            _check_room(f'storage pool {self._pool_name}', self._pool.room(),
                        self._pool.sizes(self.layout.prefix),
                        needed.get(server_layout.POOL, 0))
        self._needed = needed
        # How much room a copy takes up that is not complete nobody knows
        # without a pool of it: claim() looks when it is gone.
        if not found.has_directory:
            self._check_room()

    def group_keys(self) -> set[str]:
        """The keys of the server's volumes in the volume group."""
        return self._group.keys(self.layout.prefix) if self._group else set()

    def check_group(self, keys: set[str]) -> None:
        """Check that the source host has a volume group of its own.

        The server's disks would be taken for leftovers of an earlier attempt.

        :param keys: of the server's volumes on the source host
        :raises: Refused, libvirtError, TimeoutError
        """
        if keys & self.group_keys():
            raise errors.Refused(
                f'both hosts share volume group {self._group_name}',
                'Give each host a group of its own.')

    def claim(self) -> None:
        """Take possession of the names in both places.

        Clears what an attempt left here whose source host died.

        :raises: StorageError, libvirtError, TimeoutError
        """
        before = self._find()
        self._check_names(before)
        try:
            self._make_claim()
            # From now on the attempt that left the others goes no further.
            found = self._find()
            if found.claims - before.claims != {self._claim}:
                raise _superseded(found.claims)
            if found.has_directory and (
                    found.has_arrived or not before.is_incoming):
                raise self._in_the_way()
            if before.claims or before.volumes:
                self._clear(found, spare_claim=True)
                self._check_room()
            self.check_claim()
            self._make_directory()
            self._directory = self._attach()
        except (libvirt.libvirtError, TimeoutError,
                errors.StorageError) as error:
            self._give_up(error)
            raise

    def join(self) -> None:
        """Go on under a claim that nova-compute there has made.

        It has also made the instance directory, in which no guest has written
        anything yet. The claim says "arrived" from the start. This attempt
        alone makes a pool of the directory, and no file gets its head before
        settle().

        :raises: StorageError, libvirtError, TimeoutError
        """
        self.check_claim()
        self._directory = self._attach()

    def has_moved(self) -> bool:
        """Whether the server runs there after a live migration to there.

        :raises: StorageError if it has a domain that does not run
        :raises: libvirtError, TimeoutError
        """
        state = self.daemon.domain_state(self.layout.uuid)
        if state in (None, libvirt.VIR_DOMAIN_RUNNING):
            return state is not None
        raise errors.StorageError(
            'the server has a domain there that does not run',
            'Find out on which host the server is to run.')

    def leave(self) -> None:
        """Let go of the instance directory, before QEMU begins.

        The claim stays.

        :raises: libvirtError, TimeoutError
        """
        if self._directory is not None:
            self._directory.release()
            self._directory = None

    def reconnect(self) -> None:
        """Connect again, and see whether all is there as it was left.

        A daemon that is restarted finds its transient pools again. A host
        that is forgets them, and may have lost of the files what it had not
        put on stable storage.

        :raises: StorageError, libvirtError, TimeoutError
        """
        self.connect()
        self.check_claim()
        if self._directory is not None:
            try:
                pool = storage_pool.Pool.lookup(
                    self.daemon.connection, self.layout.transient_pool)
            except (errors.PoolNotFound, errors.PoolInactive) as error:
                raise errors.StorageError(
                    f'it has lost pool {self.layout.transient_pool}, as after '
                    f'a restart of the host', 'Migrate the server again.',
                ) from error
            self._directory = Place(pool, self._directory.owner)

    def check_room_left(self) -> None:
        """Check after a loss that it was not for want of room.

        Some releases of libvirt end when an upload finds a file system full.
        They would do so again at once, until systemd starts them no more.

        :raises: Refused, libvirtError, TimeoutError
        """
        # A logical volume has all its room from the start.
        for place, name, prefix in (
                (self._pool, server_layout.POOL, self.layout.prefix),
                (self._directory, server_layout.DIRECTORY, '')):
            needed = self._needed.get(name, 0)
            if place is not None and needed:
                _check_room(place.path, max(0, place.room() - KEPT_BYTES),
                            place.sizes(prefix), needed)

    def create(self, file: server_layout.File, length: int,
               again: bool = False) -> storage_pool.Volume:
        """Create an empty file under the claim.

        A logical volume is not empty: all of its bytes have to be written. It
        may have more of them than the file.

        :param length: bytes that will be written to it
        :param again: whether this attempt may have created it before
        """
        place = self._place(file.place)
        if isinstance(place, Group):
            return place.make(file.name, max(length, file.size), again)
        if again:
            place.delete(file.name)
        return place.create(file.name, length, file.mode)

    def make_directory(self, file: server_layout.File) -> None:
        """Create a directory under the claim."""
        self._place(file.place).make_directory(file.name, file.mode)

    def wipe_rest(self, file: server_layout.File, length: int, wiped: str = '',
                  cancel: stream.CancelEvent | None = None) -> str:
        """Overwrite what a logical volume has beyond what is copied.

        Its guest could read there what was on the disk before.

        :param length: bytes that are copied
        :param wiped: key of a volume for which this was done before
        :returns: the key of the volume
        :raises: CopyError, Cancelled, libvirtError, TimeoutError
        """
        volume = self._place(file.place).find(file.name)
        if volume.key != wiped:
            stream.wipe(volume.libvirt_volume, length, volume.length, cancel,
                        self.daemon.answer_seconds())
        return volume.key

    def verify(self, file: server_layout.File, length: int) -> None:
        """Check that a file is there, of the right size, under the claim.

        libvirt lets a volume be deleted while it is being written, and
        reports success in the end.

        :raises: StorageError, libvirtError, TimeoutError
        """
        self.check_claim()
        actual = self._place(file.place).find(file.name).length
        if actual < length or (
                actual > length and file.place != server_layout.GROUP):
            raise errors.StorageError(
                f'it has {actual} bytes after {length} were written',
                'Find out what else writes there, and try again.')

    def settle(
        self, files: ty.Iterable[server_layout.File],
    ) -> list[stream.VolumeSink]:
        """Let go of the instance directory; only heads are missing.

        The claim changes its name first: nobody makes a pool of the directory
        any more. The uploads are begun while there still is one; it ends
        before a byte is sent. libvirt then finds no pool to refresh when they
        finish.

        The claim stays until the destination's nova-compute takes the server
        over. Nova's own driver leaves it.

        :param files: those that have a hostile head
        :returns: what the heads are to be written to, in the same order
        :raises: StorageError, libvirtError, TimeoutError
        """
        self.check_claim()
        assert self._directory is not None
        files = list(files)
        if files or self._pool is None:
            self._mark(self._claim.arrived_name, self._claim.name)
        sinks = [self._open_head(file) for file in files]
        self._directory.release()
        self._directory = None
        self._is_sealed = bool(sinks)
        return sinks

    def _mark(self, name: str, old: str) -> None:
        """Change the name of the claim on the instance directory.

        :raises: Superseded if another attempt came in between
        """
        def make(parent: storage_pool.Pool) -> frozenset[str]:
            self._make_file(parent, name)
            parent.refresh()
            return self._names(parent)

        claims = self._found(self._on_parent(make)).claims
        is_ours = claims == {self._claim}
        self._on_parent(
            lambda parent: parent.delete(old if is_ours else name))
        if not is_ours:
            raise _superseded(claims)

    def _open_head(self, file: server_layout.File) -> stream.VolumeSink:
        volume = self._place(file.place).find(file.name)
        sink = stream.VolumeSink(
            volume.libvirt_volume,
            length=min(file.head_bytes, volume.length), sparse=False)
        if volume.length:
            sink.open()
        return sink

    def discard(self) -> None:
        """Delete all that this attempt made on the host.

        Over a new connection: the other one may be why it is needed.

        :raises: Superseded if the files are not this attempt's any more
        :raises: StorageError, libvirtError, TimeoutError
        """
        if self.is_shared:
            return
        if self._is_sealed:
            raise errors.Superseded(
                'the copy there is complete, and only nova-compute there can '
                'delete it', 'It does so within minutes.')
        self.close()
        self.connect()
        try:
            self._directory = None
            found = self._find()
            if found.names or found.volumes:
                self.check_claim()
                if found.has_arrived:
                    self._mark(self._claim.name, self._claim.arrived_name)
                self._clear(found)
        finally:
            self.close()

    # How it is done.

    def _place(self, name: str) -> Place:
        place = {server_layout.POOL: self._pool,
                 server_layout.GROUP: self._group,
                 server_layout.DIRECTORY: self._directory}[name]
        assert place is not None
        return place

    @property
    def _group_name(self) -> str:
        return os.path.basename(self.layout.group_path)

    def _find_group(self) -> storage_pool.Pool:
        """The pool of the volume group there.

        :raises: Refused, TimeoutError
        """
        try:
            return storage_pool.of_group(
                self.daemon.connection, self._group_name,
                self.layout.group_path)
        except libvirt.libvirtError as error:
            raise errors.Refused(
                f'libvirt cannot use volume group {self._group_name}: {error}',
                "Check that the group is there, that libvirt's driver for "
                'logical pools is installed, and that its pool is '
                'active.') from error

    def _check_driver(self) -> None:
        """Check that nova-compute there has its disks in the group, too.

        Nova's own driver would make new disks, and delete those that came.

        :raises: Refused
        """
        if self._group_name not in self.groups():
            raise errors.Refused(
                f'nova-compute there does not take servers into volume group '
                f'{self._group_name}',
                'Set images_type, images_volume_group, compute_driver and '
                'vol_upload_migration_legacy there as here, and restart it.')

    def _instances(self) -> storage_pool.Directory:
        """The directory of the instance directories there.

        :raises: Refused if there is none
        """
        if self._parent is None:
            try:
                self._parent = self._on_parent(storage_pool.Directory.of)
            except libvirt.libvirtError as error:
                raise errors.Refused(
                    f'cannot look into {self.layout.parent}: {error}',
                    'Set instances_path to the same on all hosts.') from error
        return self._parent

    def _on_parent(self, function: ty.Callable[[storage_pool.Pool], _T]) -> _T:
        """Do something in the directory of the instance directories.

        libvirt looks at directories in a pool, but not into them.

        :param function: may be called again after it failed, or had done its
            part, and so has to leave the disks pool alone, whose errors do not
            pass
        """
        return storage_pool.within(
            self.daemon.connection, path=self.layout.parent,
            name=f'{self.layout.transient_pool}-parent', function=function)

    def _check_domain(self, name: str) -> None:
        if self.daemon.has_domain(self.layout.uuid):
            raise errors.Refused(
                f'a domain with uuid {self.layout.uuid} is there already',
                'Find out where it comes from, and undefine it if it is not '
                'needed.')
        other = self.daemon.named_domain(name)
        if other is not None:
            raise errors.Refused(
                f'another domain there, {other}, has the name {name}',
                'Rename or undefine it.')

    def _check_owner(self, pool: Place) -> None:
        """Check that nova-compute there may take over what arrives.

        :raises: Refused
        """
        pool.look_at_owner()
        nova, found = self._instances().permissions, pool.owner
        if found.owner != nova.owner:
            raise errors.Refused(
                f'{pool.path} there belongs to uid {found.owner}, and '
                f'{self.layout.parent}, which is of nova-compute, to uid '
                f'{nova.owner}',
                f'Run there: chown {nova.owner}:{nova.group} {pool.path}')
        if found.mode & 0o700 != 0o700:
            raise errors.Refused(
                f'{pool.path} there has mode {found.mode:04o}',
                f'Run there: chmod 0755 {pool.path}')

    def _find_shared(self, here: server_layout.Layout) -> bool:
        """Whether what the server has here is there already.

        With one place shared and the other not, Nova could not tell what to
        delete. The pool counts also if none of the server's files is in it:
        disks may come into it or leave it with this migration, and Nova there
        may make new ones in it.

        :raises: Refused
        """
        shares_directory = self.shares_directory(here)
        shares_pool = self._shares_pool(here)
        if self._pool is None and not shares_pool:
            return shares_directory
        if shares_directory != shares_pool:
            pool, directory = (f'storage pool {self._pool_name}',
                               f'instance directory {here.directory}')
            shared, other = ((directory, pool) if shares_directory else
                             (pool, directory))
            raise errors.Refused(
                f'both hosts share {shared} and not {other}',
                'Share both or neither.')
        return shares_directory

    def wants_files(self) -> bool:
        """Whether disks are to be files there, and not in a pool.

        :raises: Refused, libvirtError, TimeoutError
        """
        self._instances()
        return self._on_parent(
            lambda parent: bool(parent.volumes(server_layout.NO_POOL)))

    def groups(self) -> set[str]:
        """Volume groups in which servers have their disks there.

        :raises: Refused, libvirtError, TimeoutError
        """
        mark = server_layout.GROUP_MARK
        self._instances()
        return self._on_parent(lambda parent: {
            file.name.removeprefix(mark) for file in parent.volumes(mark)})

    def has_driver(self) -> bool:
        """Whether nova-compute there has this driver.

        It has a pool, or tells that it wants none.

        :raises: Refused, libvirtError, TimeoutError
        """
        return self.wants_files() or bool(self.groups()) or (
            storage_pool.exists(self.daemon.connection, self._pool_name))

    def has_base(self, name: str) -> bool:
        """Whether a base image is in the image cache there.

        :raises: libvirtError, TimeoutError
        """
        return storage_pool.is_file(
            self.daemon.connection, name=f'{self.layout.transient_pool}-base',
            path=os.path.join(server_layout.cache_dir(), name))

    def shares_directory(self, here: server_layout.Layout) -> bool:
        """Whether a new file beside the instance directory shows up there."""
        self._instances()
        if not (os.path.isdir(here.directory) and self._find().has_directory):
            return False
        with tempfile.NamedTemporaryFile(
                prefix=f'{here.prefix}shared-', dir=here.parent) as marker:
            return os.path.basename(marker.name) in self._find().names

    def _shares_pool(self, here: server_layout.Layout) -> bool:
        """Whether a new file in this host's pool shows up there.

        Its name is not that of a volume of the server, which may have none.
        """
        if not os.path.isdir(here.pool_path):
            return False
        with tempfile.NamedTemporaryFile(
                prefix=f'{here.uuid}-shared-', dir=here.pool_path) as marker:
            return self._sees_in_pool(marker.name)

    def _sees_in_pool(self, path: str) -> bool:
        """Whether a file of this host's pool is in the pool there.

        A host without the pool may have had one, and may have it again: its
        directory is looked for where this host has it.
        """
        here, name = os.path.split(path)
        if self._pool is not None:
            return bool(self._pool.files(name))
        there = storage_pool.find_path(
            self.daemon.connection, self._pool_name) or here
        return storage_pool.is_file(
            self.daemon.connection, path=os.path.join(there, name),
            name=f'{self.layout.transient_pool}-shared')

    def _find(self) -> '_Found':
        """Look at the server's files in both places."""
        return self._found(self._on_parent(self._names))

    def _names(self, parent: storage_pool.Pool) -> frozenset[str]:
        return frozenset(
            volume.name for volume in parent.volumes(self.layout.uuid))

    def _found(self, names: frozenset[str]) -> '_Found':
        return _Found(
            self.layout.uuid, names,
            frozenset(self._pool.sizes(self.layout.prefix)
                      if self._pool else ()))

    def _check_names(self, found: '_Found') -> None:
        """Check that nothing there has the names of what is to come.

        :raises: Refused
        """
        if found.has_directory and not found.is_incoming:
            raise self._in_the_way()
        if os.path.basename(self.layout.kept_directory) in found.names:
            raise errors.Refused(
                f'directory {self.layout.kept_directory}, which a migration '
                f'kept, is there',
                'Delete it if the server is whole on this host.')
        if found.claims:
            return
        if self._group is not None:
            for volume in self._group.files(self.layout.prefix):
                raise _occupied(volume.path)
        for prefix in self.layout.prefix, self.layout.kept_prefix:
            volumes = self._pool.sizes(prefix) if self._pool else {}
            for name, allocation in volumes.items():
                # Ignore empty volumes: a create request sent while the link
                # was down may take effect after the attempt was abandoned.
                if allocation:
                    raise _occupied(os.path.join(self.layout.pool_path, name))

    def room(self, place: str) -> int:
        """Bytes that files may take up in a place.

        :param place: POOL, DIRECTORY or GROUP
        :raises: Refused, libvirtError, TimeoutError
        """
        if place == server_layout.DIRECTORY:
            return self._instances().available
        return self._place(place).room()

    def _in_the_way(self) -> errors.Refused:
        return errors.Refused(
            f'instance directory {self.layout.directory} is there already',
            'Wait 2 minutes for nova-compute there to delete a failed copy, '
            'or delete what is not needed.')

    def _check_room(self) -> None:
        """Check that there is room for the files of the instance directory.

        :raises: Refused
        """
        parent = self._on_parent(storage_pool.Directory.of)
        _check_room(parent.path, parent.available, {},
                    self._needed.get(server_layout.DIRECTORY, 0))

    def _make_directory(self) -> None:
        """Make the instance directory.

        :raises: libvirtError if it is there already
        """
        permissions = dataclasses.replace(
            self._owner(), mode=server_layout.DIRECTORY_MODE)
        # libvirt creates files as their owner where root may not, and
        # directories as root.
        with _refused_if_denied(self.layout.parent):
            self._on_parent(lambda parent: parent.create_directory(
                self.layout.uuid, permissions))
        self._has_directory = True

    def _remove_directory(self) -> None:
        """Remove the instance directory, which is empty."""
        self._on_parent(lambda parent: parent.delete(self.layout.uuid))

    def _attach(self) -> Place:
        """Make a transient pool of the instance directory.

        Call this only under an incoming claim: libvirt probes all files.
        """
        pool = storage_pool.Pool.attach(
            self.daemon.connection, name=self.layout.transient_pool,
            path=self.layout.directory)
        # The pool of a dead attempt may exist, and list files that are gone.
        pool.refresh()
        return Place(pool, self._owner())

    def _owner(self) -> storage_pool.Permissions:
        """nova-compute there, which owns the pool and the instances."""
        return (self._pool.owner if self._pool else
                self._instances().permissions)

    def _make_claim(self) -> None:
        """Make the claim: in the pool, if there is one, and on the directory.

        That in the pool is made first and goes last: it is what counts.
        """
        if self._pool is not None:
            with _refused_if_denied(self._pool.path):
                self._pool.create(self._claim.name, 0)
        with _refused_if_denied(self.layout.parent):
            self._on_parent(
                lambda parent: self._make_file(parent, self._claim.name))

    def _make_file(self, parent: storage_pool.Pool, name: str) -> None:
        """Create an empty file, unless it is there already."""
        if not parent.volumes(name):
            parent.create_volume(name, 0, dataclasses.replace(
                self._owner(), mode=server_layout.FILE_MODE))

    def check_claim(self) -> None:
        """Check that the files there are still those of this attempt.

        :raises: Superseded
        """
        found = self._find()
        names = found.volumes if self._pool else found.names
        if found.claims != {self._claim} or (
                self._claim not in map(self._parse, names)):
            raise _superseded(found.claims - {self._claim})

    def _give_up(self, error: Exception) -> None:
        """Take the claim back, and what was made under it."""
        try:
            if self._has_directory:
                self._remove_directory()
            self._delete_claims({self._claim})
        except (libvirt.libvirtError, TimeoutError) as second:
            errors.add_note(error, f'Deleting the claim failed: {second}')

    def _delete_claims(self, claims: set[server_layout.Claim]) -> None:
        def delete(parent: storage_pool.Pool) -> None:
            for volume in parent.volumes(self.layout.prefix):
                if self._parse(volume.name) in claims:
                    volume.delete()

        self._on_parent(delete)
        if self._pool is not None:
            self._pool.clear(
                self.layout.prefix,
                spare=lambda name: self._parse(name) not in claims)

    def _clear(self, found: '_Found', spare_claim: bool = False) -> None:
        """Delete all that was made under a claim, the claims last.

        Call this only under an incoming claim.

        :param found: what is there
        :param spare_claim: whether to spare that of this attempt
        :raises: Superseded if the server runs there by now
        """
        if self.daemon.has_domain(self.layout.uuid):
            raise errors.Superseded(
                'the server has a domain there now',
                'Nothing of it was deleted.')
        if found.has_directory:
            directory = self._attach()
            directory.clear()
            directory.release()
            self._remove_directory()
        if self._group is not None:
            self._group.clear(self.layout.prefix)
        if self._pool is not None:
            self._pool.clear(
                self.layout.prefix,
                spare=lambda name: self._parse(name) is not None)
        spared = {self._claim} if spare_claim else set()
        self._delete_claims(found.claims - spared)

    def _parse(self, name: str) -> server_layout.Claim | None:
        return server_layout.Claim.parse(self.layout.uuid, name)


@dataclasses.dataclass(frozen=True)
class _Found:
    """The names of a server's files on a host.

    :ivar uuid: of the server
    :ivar names: in the directory of the instance directories
    :ivar volumes: in the disks pool
    """
    uuid: str
    names: frozenset[str]
    volumes: frozenset[str]

    @property
    def claims(self) -> set[server_layout.Claim]:
        """The claims on the server's files, whosever they are."""
        found = (server_layout.Claim.parse(self.uuid, name)
                 for name in self.names | self.volumes)
        return {claim for claim in found if claim}

    @property
    def has_directory(self) -> bool:
        return self.uuid in self.names

    @property
    def has_arrived(self) -> bool:
        """Whether a complete copy is, or was, in the instance directory."""
        return any(server_layout.Claim.has_arrived(self.uuid, name)
                   for name in self.names)

    @property
    def is_incoming(self) -> bool:
        """Whether all files in the instance directory may be looked at."""
        return not self.has_arrived and any(
            server_layout.Claim.parse(self.uuid, name)
            for name in self.names)


@contextlib.contextmanager
def _refused_if_denied(path: str) -> ty.Iterator[None]:
    """Tell that libvirt, which is root, may not write to a directory there.

    :raises: Refused
    """
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_int1() not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise errors.Refused(
            f'libvirt there may not write to {path}: {error}',
            'If it is on NFS, export it with no_root_squash.') from error


def _occupied(path: str) -> errors.Refused:
    return errors.Refused(
        f'volume {path} is in the way',
        'Find out whose it is, and delete it if it is not needed.')


def _superseded(claims: ty.Collection[server_layout.Claim],
                ) -> errors.Superseded:
    return errors.Superseded(
        'another attempt to migrate the server took over its files',
        'Wait until that attempt has ended.' if claims else
        'Find out which files of the server are needed there.')


def _check_room(place: str, available: int,
                leftovers: dict[str, int], needed: int) -> None:
    """Check that there is room for the server's files.

    :param available: bytes that are free
    :param leftovers: bytes of the files of a dead attempt, which will go
    """
    room = available + sum(leftovers.values())
    if room < needed:
        raise errors.Refused(
            f'{room} bytes available in {place}, and the files of the server '
            f'take up {needed}', 'Free some space, or choose another host.')
