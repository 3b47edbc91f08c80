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

"""The other host of a cold migration, as seen over its libvirt daemon.

Every call here may block on that daemon, as long as it may be gone, or take to
answer. In eventlet mode call it through ``nova.utils.tpool_wrap``.
"""

import contextlib
import os
import tempfile
import typing as ty

from oslo_utils import uuidutils
from oslo_utils import versionutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import access
from nova.virt.libvirt.storage import bounded
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import threads

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF

# Sparse streams through split daemons looped for ever before.
MIN_LIBVIRT_VERSION = 8_000_000

# A peer that is gone is noticed after about interval * (count + 1) seconds. A
# daemon that only pauses has to survive that: nothing else is lost if a copy
# waits half a minute.
KEEPALIVE_COUNT = 5

# The mode that files and directories get which nova-compute makes itself.
FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

# What the name of a volume begins with that says that the server's other
# volumes on the destination are those of a copy that is under way, or was when
# its source host died. It ends with an id that tells one attempt from others.
CLAIM = 'incoming'

# The directory in the instance directory in which Nova looks for the state of
# a server's vTPM.
VTPM = 'swtpm'


class Unsuitable(Exception):
    """The destination can not take the server.

    :ivar host: address of the destination
    :ivar uri: libvirt URI of the destination
    :ivar reason: why not
    :ivar remedy: what to do about it
    """

    def __init__(self, host: str, uri: str, reason: ty.Any, remedy: str):
        super().__init__(f'host {host} ({uri}): {reason}. {remedy}')
        self.host = host
        self.uri = uri
        self.reason = str(reason)
        self.remedy = remedy


class Superseded(Unsuitable):
    """What an attempt made on the destination is not its own any more."""


def open_connection(
    uri: str, keepalive: bool = True,
) -> 'libvirt.virConnect':
    """Open a connection to a libvirt daemon that may be gone.

    Credentials for SASL come from libvirt's auth.conf, or from the Kerberos
    ticket; nobody is asked for any.

    :param keepalive: whether to start the keepalive of the connection
    :raises: libvirtError if the daemon refuses
    :raises: TimeoutError if it does not answer
    """
    credentials = [
        libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_ECHOPROMPT,
        libvirt.VIR_CRED_REALM, libvirt.VIR_CRED_PASSPHRASE,
        libvirt.VIR_CRED_NOECHOPROMPT, libvirt.VIR_CRED_EXTERNAL]
    auth = [credentials, lambda creds, opaque: -1, None]
    # A host that is down would cost what the kernel allows, minutes.
    connection = threads.within(
        CONF.libvirt.vol_upload_migration_connect_timeout,
        lambda: libvirt.openAuth(uri, auth, 0))
    if keepalive:
        start_keepalive(connection)
    return connection


def open_bounded(uri: str, keepalive: bool = True) -> bounded.Bounded:
    """The same to a daemon that may also hang, as another host's.

    :raises: libvirtError if the daemon refuses
    :raises: TimeoutError if it does not answer, then or later
    """
    return bounded.Bounded(
        open_connection(uri, keepalive),
        CONF.libvirt.vol_upload_migration_stall_timeout)


def start_keepalive(connection: 'libvirt.virConnect') -> None:
    """Have libvirt end a connection whose other end is gone."""
    connection.setKeepAlive(
        CONF.libvirt.vol_upload_migration_keepalive_interval, KEEPALIVE_COUNT)


class Destination:
    """What one migration has on the host that it goes to.

    :ivar host: address of the host
    :ivar uri: its libvirt URI
    :ivar pool: its disks pool, once connected
    :ivar is_shared: whether it shares both places of the server's disks with
        this host, which check() finds out
    """

    def __init__(
        self, host: str, uri: str, pool_name: str, uuid: str, directory: str,
    ):
        """Name the host, and the server that is to go there.

        :param pool_name: name of the pool for the server's disks
        :param uuid: of the server
        :param directory: path of the server's instance directory there
        """
        self.host = host
        self.uri = uri
        self._pool_name = pool_name
        self._uuid = uuid
        self._prefix = f'{uuid}_'
        self._claim_name = (
            f'{self._prefix}{CLAIM}-{uuidutils.generate_uuid()}')
        self._directory_path = directory
        self._directory_pool = f'nova-{uuid}'
        self._connection: bounded.Bounded | None = None
        # That of a copy, which often is found dead before the other one.
        self._is_lost = False
        self._directory: storage_pool.Pool | None = None
        self.pool: storage_pool.Pool
        self.is_shared = False

    def connect(self) -> None:
        """Connect to the host and find its disks pool.

        :raises: Unsuitable
        """
        self._connection = self._open()
        with self._explained():
            version = self._connection.getLibVersion()
            if version < MIN_LIBVIRT_VERSION:
                has, needs = map(versionutils.convert_version_to_str, (
                    version, MIN_LIBVIRT_VERSION))
                raise self._unsuitable(
                    f'its libvirt is version {has}',
                    f'At least {needs} is needed.')
            self._look()

    def check(self, needed: int, source_pool: storage_pool.Pool) -> None:
        """Check that the host can take the server; change nothing there.

        :param needed: bytes that the server's disks take up
        :param source_pool: the disks pool of this host
        :raises: Unsuitable
        """
        with self._explained():
            self.pool.refresh()
            self._check_domain()
            self.is_shared = self._find_shared(source_pool)
            if not self.is_shared:
                self._check_room(
                    f'storage pool {self.pool.name}', self.pool.available,
                    sum(volume.allocation for volume in
                        self.pool.volumes(self._prefix)), needed)
                self._check_names()

    def _check_domain(self) -> None:
        if self._has_domain():
            raise self._unsuitable(
                f'a domain with uuid {self._uuid} is there already',
                'Find out where it comes from, and undefine it if it is '
                'not needed.')

    def _find_shared(self, source_pool: storage_pool.Pool) -> bool:
        """Whether what the server has here is there already.

        Where only one of its two places is, Nova could not tell what to
        delete and what not.
        """
        shares_directory = self._shares_directory()
        if not source_pool.volumes(self._prefix):
            return shares_directory
        if shares_directory != self._shares_pool(source_pool):
            pool, directory = (
                f'storage pool {self.pool.name}',
                f'instance directory {self._directory_path}')
            shared, other = ((directory, pool) if shares_directory else
                             (pool, directory))
            raise self._unsuitable(
                f'{shared} is on storage that both hosts share, and {other} '
                f'is not', 'Share both, or give each host its own of both.')
        return shares_directory

    def _check_names(self) -> None:
        """Check that nothing there has the names of what is to come."""
        volumes = self.pool.volumes(self._prefix)
        if not any(self._is_claim(volume.name) for volume in volumes):
            for volume in volumes:
                # One with nothing in it is nobody's: what an attempt asks
                # for over a link that is down may be made when it is up
                # again, and the attempt long over.
                if volume.allocation:
                    raise self._unsuitable(
                        f'volume {volume.path} is in the way',
                        'Find out whose it is, and delete it if it is not '
                        'needed.')
            self._check_directory()

    def _check_directory(self) -> None:
        if self._list_directory():
            raise self._unsuitable(
                f'instance directory {self._directory_path} is not empty',
                'Find out whose files these are, and delete them if they are '
                'not needed.')

    def _list_directory(self) -> dict[str, int]:
        """The names of the files in the instance directory, if it is there.

        With the bytes that each takes up.
        """
        directory = self._find_directory()
        if directory is None:
            return {}
        files = {file.name: file.allocation for file in directory.volumes()}
        directory.detach()
        return files

    def _check_room(self, place: str, available: int, leftovers: int,
                    needed: int) -> None:
        """Check that there is room for the server's disks.

        :param available: bytes that are free
        :param leftovers: bytes of what a dead attempt left, which will go
        """
        room = available + leftovers
        if room < needed:
            raise self._unsuitable(
                f'{place} has {room} bytes available, and the disks of the '
                f'server take up {needed}',
                'Free some space, or choose another host.')

    def claim(self) -> None:
        """Take possession of the volume names and the instance directory.

        Not on shared storage, where they are those of the source.

        Clears what an attempt left there whose source host died. The claim
        is made when nothing of anybody else's is there, and before anything
        of ours: all that is found under it later is ours.

        :raises: Unsuitable
        """
        if self.is_shared:
            return
        with self._explained():
            if self.pool.volumes(self._prefix):
                self._clear()
            claim = self.pool.create_volume(
                self._claim_name, 0, self._permissions(FILE_MODE))
            try:
                self._check_claim()
                self._directory = self._make_directory()
            except (libvirt.libvirtError, TimeoutError, Unsuitable) as error:
                try:
                    claim.delete()
                except (libvirt.libvirtError, TimeoutError) as second:
                    error.add_note(f'Deleting the claim failed: {second}')
                raise

    def _check_claim(self) -> None:
        """Check that what is there is still that of this attempt.

        :raises: Unsuitable
        """
        pool = self._disks()
        pool.refresh()
        claims = {volume.name for volume in pool.volumes(self._prefix)
                  if self._is_claim(volume.name)}
        if not claims or claims - self._claims():
            raise Superseded(
                self.host, self.uri,
                'another attempt to migrate the server has taken over what '
                'this one made', 'Wait for its end.' if claims else
                'Find out which volumes of the server are needed there.')

    def create_disk(self, name: str, length: int) -> storage_pool.Volume:
        """Create a volume in the disks pool.

        :param name: of the volume
        :param length: bytes that will be written to it
        """
        return self._disks().create_volume(
            name, length, self._permissions(FILE_MODE))

    def create_file(self, name: str, length: int) -> storage_pool.Volume:
        """Create a file in the instance directory.

        :param name: of the file
        :param length: bytes that will be written to it
        """
        assert self._directory is not None
        return self._directory.create_volume(
            name, length, self._permissions(FILE_MODE))

    @contextlib.contextmanager
    def vtpm(self) -> ty.Iterator[storage_pool.Pool]:
        """The place of a vTPM's state, which is made, as a pool."""
        assert self._directory is not None
        with self.subdirectory(
                self._directory, VTPM, DIRECTORY_MODE) as pool:
            yield pool

    @contextlib.contextmanager
    def subdirectory(
        self, parent: storage_pool.Pool, name: str, mode: int,
    ) -> ty.Iterator[storage_pool.Pool]:
        """A directory in that of a pool, which is made, as a pool."""
        parent.create_directory(name, self._permissions(mode))
        with storage_pool.inside(parent, name) as pool:
            yield pool

    def create_in(
        self, pool: storage_pool.Pool, name: str, length: int, mode: int,
    ) -> storage_pool.Volume:
        """Create a file in the directory of a pool.

        :param length: bytes that will be written to it
        """
        return pool.create_volume(name, length, self._permissions(mode))

    @contextlib.contextmanager
    def writing(
        self, volume: storage_pool.Volume,
    ) -> ty.Iterator['libvirt.virStorageVol']:
        """A volume of the host on a connection of its own, to write to it.

        That has no keepalive yet, with which libvirt wakes up the process's
        event loop for each 16 KiB that are sent: 0.8 s of CPU per GiB.

        :raises: Unsuitable
        """
        connection = self._open(keepalive=False)
        try:
            yield connection.storageVolLookupByPath(volume.path)
        finally:
            # Its end asks the host once more, and may come late, where an
            # error holds on to it: that must not wait for ever either.
            # An error means that it was started already.
            with contextlib.suppress(libvirt.libvirtError):
                start_keepalive(connection)
            self._is_lost = not connection.isAlive()
            connection.close()

    def verify_disk(self, name: str, length: int) -> None:
        """Check that a volume is there and of the right size.

        libvirt lets a volume be deleted while it is being written, and
        reports success in the end.

        :raises: Unsuitable
        """
        self._check_claim()
        self.verify(self._disks(), name, length)

    def verify(
        self, pool: storage_pool.Pool, name: str, length: int,
    ) -> None:
        """Check that a volume is there, in a pool that was refreshed.

        :raises: Unsuitable
        """
        actual = pool.volume(name).length
        if actual != length:
            raise self._unsuitable(
                f'volume {name} in storage pool {pool.name} has '
                f'{actual} bytes after {length} were written',
                'Find out what else writes there, and try again.')

    def settle(self) -> None:
        """Let go of the instance directory; all files have arrived.

        The claim stays until the destination has taken the server over.

        :raises: Unsuitable
        """
        self._check_claim()
        assert self._directory is not None
        self._directory.detach()

    @property
    def disks_path(self) -> str:
        """Path of the directory that the disks are in."""
        return self.pool.path

    def is_connected(self) -> bool:
        """Whether the connections still stand, as far as is known."""
        return (self._connection is not None and not self._is_lost and
                self._connection.isAlive())

    def discard(self) -> None:
        """Delete all that the migration made on the host.

        Over a connection of its own: the other one may be why it is needed.

        :raises: Unsuitable
        :raises: Superseded if that is not all this attempt's
        """
        if self.is_shared:
            return
        self.close()
        self._connection = self._open()
        try:
            with self._explained():
                self._look()
                self._clear_ours()
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection to the host."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self, keepalive: bool = True) -> bounded.Bounded:
        try:
            return open_bounded(self.uri, keepalive)
        except (libvirt.libvirtError, TimeoutError) as error:
            raise self._unsuitable(
                f'can not connect: {access.cause(error)}',
                access.remedy(error)) from error

    def _look(self) -> None:
        """Look for the place of the server's disks."""
        self.pool = self._find_pool()

    def _disks(self) -> storage_pool.Pool:
        """The pool of the server's disks."""
        return self.pool

    def _find_pool(self) -> storage_pool.Pool:
        try:
            return storage_pool.Pool.lookup(self._connection, self._pool_name)
        except storage_pool.PoolNotFound:
            raise self._unsuitable(
                f'there is no storage pool {self._pool_name}',
                'Set [libvirt]use_storage_pools in nova.conf there and '
                'restart nova-compute.')
        except storage_pool.PoolInactive:
            raise self._unsuitable(
                f'storage pool {self._pool_name} is not active',
                f'Start it there: virsh pool-start {self._pool_name}')

    def _has_domain(self) -> bool:
        """Whether the host has the server already, as far as can be known.

        A storage driver, as in storage+tls://, knows nothing of domains.
        """
        assert self._connection is not None
        try:
            self._connection.lookupByUUIDString(self._uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (
                    libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_SUPPORT):
                raise
            return False
        return True

    def _is_claim(self, name: str) -> bool:
        """Whether a volume says that some attempt made the others."""
        return name.startswith(self._prefix + CLAIM)

    def _claims(self) -> set[str]:
        """The names of those by which this attempt says so."""
        return {self._claim_name}

    def _shares_directory(self) -> bool:
        """Whether a new file in the instance directory shows up there."""
        if not (os.path.isdir(self._directory_path) and
                self._list_directory()):
            return False
        with tempfile.NamedTemporaryFile(dir=self._directory_path) as marker:
            return os.path.basename(marker.name) in self._list_directory()

    def _shares_pool(self, source_pool: storage_pool.Pool) -> bool:
        """Whether a new volume in this host's pool shows up in the other's."""
        if not self.pool.volumes(self._prefix):
            return False
        name = self._prefix + uuidutils.generate_uuid()
        marker = source_pool.create_volume(
            name, 0, source_pool.permissions)
        try:
            self.pool.refresh()
            return any(volume.name == name
                       for volume in self.pool.volumes(self._prefix))
        finally:
            marker.delete()

    def _clear_ours(self) -> None:
        """Delete what this attempt made.

        :raises: Superseded
        """
        self._check_claim()
        self._clear()

    def _clear(self) -> None:
        """Delete all that was made under a claim, the claim itself last.

        The next attempt then goes on with what this one may have to leave.
        """
        self._remove_directory()
        self.pool.refresh()
        for volume in sorted(self.pool.volumes(self._prefix),
                             key=lambda volume: self._is_claim(volume.name)):
            volume.delete()

    def _remove_directory(self) -> None:
        """Delete the instance directory, and a claim last of its files."""
        directory = self._make_directory()
        for file in sorted(directory.volumes(),
                           key=lambda file: self._is_claim(file.name)):
            if file.name == VTPM:
                storage_pool.delete_directory(directory, file)
            else:
                file.delete()
        directory.remove()

    def _make_directory(self) -> storage_pool.Pool:
        """A pool on the instance directory, which is made if need be."""
        directory = storage_pool.Pool.attach(
            self._connection, self._directory_pool, self._directory_path,
            self._permissions(DIRECTORY_MODE))
        directory.refresh()
        return directory

    def _find_directory(self) -> storage_pool.Pool | None:
        """A pool on the instance directory if there is one."""
        try:
            directory = storage_pool.Pool.attach(
                self._connection, self._directory_pool, self._directory_path)
        except libvirt.libvirtError as error:
            if 'No such file or directory' not in str(error):
                raise
            return None
        directory.refresh()
        return directory

    @contextlib.contextmanager
    def _explained(self) -> ty.Iterator[None]:
        """Say of an error of libvirt's which host it is about."""
        try:
            yield
        except TimeoutError as error:
            raise self._unsuitable(
                error, 'It lives, and may wait for its disk: look into the '
                'log of the kernel there.') from error
        except libvirt.libvirtError as error:
            raise self._unsuitable(
                error, "Look into libvirt's log on both hosts.") from error

    def _permissions(self, mode: int) -> storage_pool.Permissions:
        """For files of the host's nova-compute."""
        owner = self._owner()
        return storage_pool.Permissions(owner.owner, owner.group, mode)

    def _owner(self) -> storage_pool.Permissions:
        """The host's nova-compute, which owns the pool there."""
        return self.pool.permissions

    def _unsuitable(self, reason: ty.Any, remedy: str) -> Unsuitable:
        return Unsuitable(self.host, self.uri, reason, remedy)
