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

"""A server whose disks are files in its instance directory moves.

The files go into the same directory of the other host, where Nova's own
driver finds them as if ``scp`` had brought them. That host needs no storage
pool: pools of its directories are made for as long as the migration lasts.
"""

import contextlib
import os

from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import transfer

try:
    import libvirt
except ImportError:
    libvirt = None

# What may be in an instance directory besides disks and has to come along.
FILES = ('disk.info', *transfer.BOOT_FILES)

# What the name of the claim begins with when all other files have arrived.
# Where no domain is defined and the server is still on this host, such files
# are a copy that nobody took over, because this host's nova-compute died.
ARRIVED = 'arrived'


class Destination(peer.Destination):
    """What such a migration has on the host that it goes to.

    The claim is an empty file in the instance directory. Nova's own driver
    over there leaves it, so that it has another name when the others have
    arrived: they are a server's disks from then on.
    """

    _instances: storage_pool.Directory

    def check(self, needed: int, source_pool: storage_pool.Pool) -> None:
        """Check that the host can take the server; change nothing there.

        :param needed: bytes that the server's disks take up
        :raises: Unsuitable
        """
        with self._explained():
            self._check_domain()
            files = self._list_directory()
            if not any(map(self._is_claim, files)):
                self._check_directory()
            self._check_room(
                self._instances.path, self._instances.available,
                sum(files.values()), needed)

    def claim(self) -> None:
        """Take possession of the instance directory, which is made.

        Clears what an attempt left there whose source host died.

        :raises: Unsuitable
        """
        with self._explained():
            if self._list_directory():
                self._clear()
            self._directory = self._make_directory()
            try:
                self.create_file(self._claim_name, 0)
                self._check_claim()
            except (libvirt.libvirtError, TimeoutError,
                    peer.Unsuitable) as error:
                try:
                    self._give_up(self._directory)
                except (libvirt.libvirtError, TimeoutError) as second:
                    error.add_note(f'Deleting the claim failed: {second}')
                raise

    def settle(self) -> None:
        """Let go of the instance directory; all files have arrived.

        :raises: Unsuitable
        """
        self._check_claim()
        self.create_file(self._arrived_name, 0)
        self._disks().volume(self._claim_name).delete()
        self._disks().detach()

    def shares(self) -> bool:
        """Whether the host sees what this host has in the directory.

        :raises: Unsuitable
        """
        with self._explained():
            return self._shares_directory()

    @property
    def disks_path(self) -> str:
        return self._directory_path

    def _look(self) -> None:
        path = os.path.dirname(self._directory_path)
        try:
            assert self._connection is not None
            self._instances = storage_pool.inspect(
                self._connection, path, f'{self._directory_pool}-parent')
        except libvirt.libvirtError as error:
            raise self._unsuitable(
                f'can not look into {path}: {error}',
                'instances_path in nova.conf has to be the same on both '
                'hosts.')

    def _disks(self) -> storage_pool.Pool:
        assert self._directory is not None
        return self._directory

    def _owner(self) -> storage_pool.Permissions:
        return self._instances.permissions

    def _clear(self) -> None:
        self._remove_directory()

    def _clear_ours(self) -> None:
        self._directory = self._find_directory()
        if self._directory is not None:
            self._check_claim()
            self._clear()

    def _give_up(self, directory: storage_pool.Pool) -> None:
        """Take back the claim, and the directory if that is empty then."""
        for claim in directory.volumes(self._claim_name):
            claim.delete()
        if directory.volumes():
            directory.detach()
        else:
            directory.remove()

    def _is_claim(self, name: str) -> bool:
        return super()._is_claim(name) or name.startswith(
            self._prefix + ARRIVED)

    def _claims(self) -> set[str]:
        return {self._claim_name, self._arrived_name}

    @property
    def _arrived_name(self) -> str:
        return self._claim_name.replace(peer.CLAIM, ARRIVED)


class Transfer(transfer.Transfer):
    """The instance directory of one server, on its way."""

    _attached: storage_pool.Pool | None = None

    def copy_instance_dir(
        self,
        disks: list[transfer.Disk],
        cancel: stream.CancelEvent | None,
    ) -> None:
        """Copy what belongs to the disks, which were copied.

        :raises: TransferError, errors.Cancelled
        """
        for name in FILES:
            if os.path.exists(os.path.join(self._directory, name)):
                self.copy_disk(transfer.Disk(name, 'raw'), cancel)
        try:
            self.destination.settle()
        except Exception as error:
            raise self._error(peer.CLAIM, error) from error

    def close(self) -> None:
        """Let go of the directory and close the connections."""
        if self._attached is not None:
            # One that stays is in nobody's way: the next attempt uses it.
            with contextlib.suppress(libvirt.libvirtError):
                self._attached.detach()
            self._attached = None
        super().close()

    def _find_source_pool(self) -> storage_pool.Pool:
        self._attached = storage_pool.Pool.attach(
            self._connection, self._pool_name, self._directory)
        return self._attached


def is_shared(host: str, uri: str, path: str) -> bool:
    """Whether this and another host have an instance directory in common.

    :param host: address of the other host
    :param uri: its libvirt URI
    :param path: the directory, which is there on this host
    :raises: peer.Unsuitable if the other host does not tell
    """
    uuid = os.path.basename(path)
    destination = Destination(host, uri, f'nova-{uuid}', uuid, path)
    try:
        destination.connect()
        return destination.shares()
    finally:
        destination.close()
