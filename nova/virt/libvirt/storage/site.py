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
instance directory. The claim is an empty file that stands for a copy which is
not complete. It is made when nothing of anybody else's is there, and before
anything of ours; it goes last. Right before anything is deleted the claim is
read again, and the daemon is asked for a domain of the server.

Every call here may block on the daemon, with a bound. Under eventlet call it
through :func:`threads.off_hub`.
"""

import contextlib
import dataclasses
import os
import tempfile
import typing as ty

import nova.conf
from nova.virt.libvirt.storage import daemon as libvirt_daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout as server_layout
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import stream

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF


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

    def files(self, prefix: str = '') -> list[storage_pool.Volume]:
        """The files whose names begin with ``prefix``, as they are now."""
        self._pool.refresh()
        return self._pool.volumes(prefix)

    def sizes(self, prefix: str = '') -> dict[str, int]:
        """Bytes that these files take up, by name."""
        return {file.name: file.allocation for file in self.files(prefix)}

    def room(self) -> int:
        """Bytes that are free in the file system."""
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

    def clear(self, prefix: str,
              is_claim: ty.Callable[[str], bool]) -> None:
        """Delete the files whose names begin with ``prefix``, claims last.

        The next attempt then goes on with what this one may have to leave.
        """
        self._release_inner()
        for file in sorted(self.files(prefix),
                           key=lambda file: is_claim(file.name)):
            if file.is_directory:
                storage_pool.delete_directory(self._pool, file)
            else:
                file.delete()

    def remove(self) -> None:
        """Remove the directory, which is empty, and its pool."""
        self._pool.remove()

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
            outer = self._at(parent)
            self._inner[directory] = storage_pool.Pool.attach(
                outer.libvirt_pool.connect(), name=f'{outer.name}-{base}',
                path=os.path.join(outer.path, base))
        return self._inner[directory]

    def _permissions(self, mode: int) -> storage_pool.Permissions:
        return storage_pool.Permissions(
            self.owner.owner, self.owner.group, mode)


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
    ):
        """Name the host and the server; nothing happens yet.

        :param pool_name: of the disks pool
        :param claim: of this attempt
        :param uses_pool: whether any file of the server is in the pool
        """
        self.daemon = daemon
        self.layout = layout
        self.is_shared = False
        self._pool_name = pool_name
        self._claim = claim
        self._uses_pool = uses_pool
        self._pool: Place | None = None
        self._directory: Place | None = None
        self._state: Place | None = None
        self._parent: storage_pool.Directory | None = None

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

    def close(self) -> None:
        """Let go of the vTPM's state and close the connection."""
        if self._state is not None:
            with contextlib.suppress(libvirt.libvirtError, TimeoutError):
                self._state.release()
            self._state = None
        self.daemon.close()

    # The source.

    def open(
        self, file: server_layout.File,
    ) -> tuple[stream.Source, int]:
        """Open a file of the server for reading.

        :returns: the source to read it from, and its length in bytes
        :raises: OSError, libvirtError, TimeoutError
        """
        if file.data is not None:
            return stream.MemorySource(file.data), len(file.data)
        if file.place == server_layout.POOL:
            volume = self._disks.find(file.name)
        elif self._state and file.path.startswith(self._state.path):
            volume = self._state.find(
                os.path.relpath(file.path, self._state.path))
        else:
            # No pool is made of the directory: libvirt would probe what a
            # guest wrote into a raw disk.
            return stream.FileSource(file.path), os.path.getsize(file.path)
        length = volume.length
        return stream.open_source(
            volume.libvirt_volume, length,
            CONF.libvirt.vol_upload_migration_direct_read), length

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
        :param needed: bytes that the files of each place take up
        :raises: Refused, libvirtError, TimeoutError
        """
        self._instances()
        self._check_domain(name)
        self.is_shared = self._find_shared(here)
        if self.is_shared:
            return
        directory = self._list_directory()
        claims = self._claims(directory)
        if not claims:
            self._check_names(directory)
        if self._pool is not None:
            leftovers = self._pool.sizes(self.layout.prefix)
            _check_room(f'storage pool {self._pool_name}', self._pool.room(),
                        leftovers, needed.get(server_layout.POOL, 0))
        parent = self._instances()
        _check_room(parent.path, parent.available, directory,
                    needed.get(server_layout.DIRECTORY, 0))

    def claim(self) -> None:
        """Take possession of the names in both places.

        Clears first what an attempt left here whose source host died.

        :raises: StorageError, libvirtError, TimeoutError
        """
        directory = self._list_directory()
        if not self._claims(directory):
            self._check_names(directory)
        if directory or self._pool and self._pool.files(self.layout.prefix):
            self._clear()
        try:
            if self._pool is not None:
                self._pool.create(self._claim.name, 0)
                self._check_claim()
                self._directory = self._make_directory()
            else:
                self._directory = self._make_directory()
                self._directory.create(self._claim.name, 0)
                self._check_claim()
        except (libvirt.libvirtError, TimeoutError,
                errors.StorageError) as error:
            self._give_up(error)
            raise

    def create(self, file: server_layout.File,
               length: int) -> storage_pool.Volume:
        """Create an empty file under the claim.

        :param length: bytes that will be written to it
        """
        return self._place(file).create(file.name, length, file.mode)

    def make_directory(self, file: server_layout.File) -> None:
        """Create a directory under the claim."""
        self._place(file).make_directory(file.name, file.mode)

    def verify(self, file: server_layout.File, length: int) -> None:
        """Check that a file is there, of the right size, under the claim.

        libvirt lets a volume be deleted while it is being written, and
        reports success in the end.

        :raises: StorageError, libvirtError, TimeoutError
        """
        self._check_claim()
        actual = self._place(file).find(file.name).length
        if actual != length:
            raise errors.StorageError(
                f'{file.name} has {actual} bytes after {length} were written',
                'Find out what else writes there, and try again.')

    def settle(self) -> None:
        """Let go of the instance directory; all files have arrived.

        A claim in the pool stays until the destination's nova-compute takes
        the server over. Nova's own driver may finish the migration of a server
        without volumes, and knows no claims: that one changes its name.

        :raises: StorageError, libvirtError, TimeoutError
        """
        self._check_claim()
        assert self._directory is not None
        if self._pool is None:
            self._directory.create(self._claim.arrived_name, 0)
            self._directory.find(self._claim.name).delete()
        self._directory.release()

    def clear_pool(self) -> None:
        """Delete the server's volumes, whosever they are."""
        self._disks.clear(self.layout.uuid, self._is_claim)

    def discard(self) -> None:
        """Delete all that this attempt made on the host.

        Over a new connection: the other one may be why it is needed.

        :raises: Superseded if the files are not this attempt's any more
        :raises: StorageError, libvirtError, TimeoutError
        """
        if self.is_shared:
            return
        self.close()
        self.connect()
        try:
            self._directory = None
            if self._pool is not None or self._list_directory():
                self._check_claim()
                self._clear()
        finally:
            self.close()

    # How it is done.

    @property
    def _disks(self) -> Place:
        assert self._pool is not None
        return self._pool

    def _place(self, file: server_layout.File) -> Place:
        if file.place == server_layout.POOL:
            return self._disks
        assert self._directory is not None
        return self._directory

    def _instances(self) -> storage_pool.Directory:
        """The directory of the instance directories there.

        :raises: Refused if there is none
        """
        if self._parent is None:
            path = os.path.dirname(self.layout.directory)
            try:
                self._parent = storage_pool.inspect(
                    self.daemon.connection, path=path,
                    name=f'{self.layout.transient_pool}-parent')
            except libvirt.libvirtError as error:
                raise errors.Refused(
                    f'cannot look into {path}: {error}',
                    'Set instances_path to the same on all hosts.') from error
        return self._parent

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

    def _find_shared(self, here: server_layout.Layout) -> bool:
        """Whether what the server has here is there already.

        With one place shared and the other not, Nova could not tell what to
        delete.

        :raises: Refused
        """
        shares_directory = self.shares_directory(here)
        if self._pool is None:
            return shares_directory
        if shares_directory != self._shares_pool(here):
            pool, directory = (f'storage pool {self._pool_name}',
                               f'instance directory {here.directory}')
            shared, other = ((directory, pool) if shares_directory else
                             (pool, directory))
            raise errors.Refused(
                f'both hosts share {shared} and not {other}',
                'Share both or neither.')
        return shares_directory

    def shares_directory(self, here: server_layout.Layout) -> bool:
        """Whether a new file in the instance directory shows up there."""
        if not os.path.isdir(here.directory) or not self._list_directory():
            return False
        with tempfile.NamedTemporaryFile(dir=here.directory) as marker:
            return os.path.basename(marker.name) in self._list_directory()

    def _shares_pool(self, here: server_layout.Layout) -> bool:
        """Whether a new file in this host's pool shows up there."""
        if not self._disks.files(self.layout.prefix):
            return False
        with tempfile.NamedTemporaryFile(
                prefix=here.prefix, dir=here.pool_path) as marker:
            return bool(self._disks.files(os.path.basename(marker.name)))

    def _check_names(self, directory: dict[str, int]) -> None:
        """Check that nothing there has the names of what is to come.

        :raises: Refused
        """
        for prefix in self.layout.prefix, self.layout.kept_prefix:
            volumes = self._pool.sizes(prefix) if self._pool else {}
            for name, allocation in volumes.items():
                # Ignore empty volumes: a create request sent while the link
                # was down may take effect after the attempt was abandoned.
                if allocation:
                    raise errors.Refused(
                        f'volume {os.path.join(self._disks.path, name)} is in '
                        f'the way', 'Find out whose it is, and delete it if '
                        'it is not needed.')
        if directory:
            raise errors.Refused(
                f'instance directory {self.layout.directory} is not empty',
                'Find out whose files these are, and delete them if they are '
                'not needed.')

    def _list_directory(self) -> dict[str, int]:
        """Bytes that the files in the instance directory take up, by name."""
        # Leave a pool that is there already: another attempt may be copying.
        is_in_use = storage_pool.is_active(
            self.daemon.connection, self.layout.transient_pool)
        directory = self._find_directory()
        if directory is None:
            return {}
        sizes = directory.sizes()
        if not is_in_use:
            directory.release()
        return sizes

    def _find_directory(self) -> Place | None:
        try:
            return self._attach(None)
        except libvirt.libvirtError as error:
            if not storage_pool.is_missing(error):
                raise
            return None

    def _make_directory(self) -> Place:
        owner = self._owner()
        return self._attach(storage_pool.Permissions(
            owner.owner, owner.group, server_layout.DIRECTORY_MODE))

    def _attach(
        self, permissions: storage_pool.Permissions | None,
    ) -> Place:
        pool = storage_pool.Pool.attach(
            self.daemon.connection, name=self.layout.transient_pool,
            path=self.layout.directory, permissions=permissions)
        return Place(pool, self._owner())

    def _owner(self) -> storage_pool.Permissions:
        """nova-compute there, which owns the pool and the instances."""
        return (self._pool.owner if self._pool else
                self._instances().permissions)

    def _claims(
        self, directory: ty.Iterable[str],
    ) -> list[server_layout.Claim]:
        """The claims on the server's files there, whosever they are.

        :param directory: names of the files in the instance directory
        """
        if self._pool is not None:
            directory = self._pool.sizes(self.layout.prefix)
        found = [server_layout.Claim.parse(self.layout.uuid, name)
                 for name in directory]
        return [claim for claim in found if claim]

    def _check_claim(self) -> None:
        """Check that the files there are still those of this attempt.

        :raises: Superseded
        """
        directory: ty.Iterable[str] = ()
        if self._pool is None:
            directory = (self._directory.sizes() if self._directory else
                         self._list_directory())
        claims = self._claims(directory)
        if not claims or any(claim != self._claim for claim in claims):
            raise errors.Superseded(
                'another attempt to migrate the server took over its files',
                'Wait for its end.' if claims else
                'Find out which files of the server are needed there.')

    def _give_up(self, error: Exception) -> None:
        """Take the claim back, and the directory if it is empty then."""
        try:
            if self._pool is not None:
                self._pool.clear(self._claim.name, self._is_claim)
            elif self._directory is not None:
                self._directory.clear(self._claim.name, self._is_claim)
                if self._directory.files():
                    self._directory.release()
                else:
                    self._directory.remove()
        except (libvirt.libvirtError, TimeoutError) as second:
            errors.add_note(error, f'Deleting the claim failed: {second}')

    def _clear(self) -> None:
        """Delete all that was made under a claim, the claim itself last.

        :raises: Superseded if the server runs there by now
        """
        if self.daemon.has_domain(self.layout.uuid):
            raise errors.Superseded(
                'the server has a domain there now',
                'Nothing of it was deleted.')
        directory = self._make_directory()
        directory.clear('', self._is_claim)
        directory.remove()
        if self._pool is not None:
            self._pool.clear(self.layout.prefix, self._is_claim)

    def _is_claim(self, name: str) -> bool:
        return server_layout.Claim.parse(
            self.layout.uuid, name) is not None


def _check_room(place: str, available: int,
                leftovers: dict[str, int], needed: int) -> None:
    """Check that there is room for the server's files.

    :param available: bytes that are free
    :param leftovers: bytes of the files of a dead attempt, which will go
    """
    room = available + sum(leftovers.values())
    if room < needed:
        raise errors.Refused(
            f'{place} has {room} bytes available, and the files of the server '
            f'take up {needed}', 'Free some space, or choose another host.')
