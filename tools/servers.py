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

"""A server of the small cloud, as demonstration and tests handle it."""

from collections.abc import Iterator
import contextlib
import hashlib
from pathlib import Path
import re
from typing import Any
from typing import TYPE_CHECKING

from tools import cloud as cloud_module
from tools import daemons

if TYPE_CHECKING:
    from tools import lab as lab_module

# Where disks are on a host: Nova's own place, and the disks pool's.
INSTANCES = '/var/lib/nova/instances'
POOL = '/var/lib/libvirt/images/nova-disks'
POOL_NAMES = ['nova-disks']
VTPM = '/var/lib/libvirt/swtpm'
NVRAM = '/var/lib/libvirt/qemu/nvram'
# Tells other hosts how much of a file system is kept for root.
RESERVED = 'nova-reserved'
# Tells other hosts that disks are files.
NO_POOL = 'nova-no-pool'
# What Nova keeps among the instance directories.
NOT_OF_SERVERS = {
    '_base', 'compute_nodes', 'locks', 'snapshots', RESERVED, NO_POOL}
# A guest in software emulation on a busy machine.
BOOT_SECONDS = 180
# The states of a migration that is over.
ENDED = ('confirmed', 'reverted', 'error', 'failed', 'completed', 'cancelled')


class Server:
    """One server; each method asks the cloud anew, nothing is kept."""

    def __init__(self, cloud: cloud_module.Cloud, identity: str):
        self.cloud = cloud
        self.compute = cloud.connection().compute
        self.id = identity

    @classmethod
    def create(cls, cloud: cloud_module.Cloud, host: str, name: str = 'demo',
               image: str = 'guest', flavor: str = 'small',
               config_drive: bool = False, **kwargs: Any) -> 'Server':
        """Boot a server on a host, and wait until it is active."""
        connection = cloud.connection()
        made = connection.compute.create_server(
            name=name, host=host, networks='none', config_drive=config_drive,
            image_id=connection.image.find_image(image).id,
            flavor_id=connection.compute.find_flavor(flavor).id, **kwargs)
        server = cls(cloud, made.id)
        server.wait('ACTIVE')
        return server

    # ---- what it is

    def get(self) -> Any:
        """The server as the API shows it."""
        return self.compute.get_server(self.id)

    @property
    def status(self) -> str:
        """ACTIVE, SHUTOFF, VERIFY_RESIZE, ..."""
        return self.get().status

    @property
    def host(self) -> str:
        """The name of the host that it is on."""
        return self.get().compute_host

    def wait(self, status: str, seconds: float = 180) -> None:
        """Wait for a status, with no task under way.

        :raises daemons.Failed: where it gets into ERROR instead, or takes
            too long.
        """
        def there() -> bool:
            server = self.get()
            if server.status == 'ERROR' != status:
                raise daemons.Failed(
                    f'{self.id} is in ERROR: {server.fault}')
            return server.status == status and not server.task_state

        daemons.wait_for(f'{self.id} to be {status}', there, seconds,
                         poll=0.3)

    def settle(self, seconds: float = 180) -> str:
        """Wait until no task is under way, and return the status."""
        daemons.wait_for(f'the task of {self.id}',
                         lambda: not self.get().task_state, seconds,
                         poll=0.3)
        return self.status

    # ---- what is done to it

    def migrate(self, host: str | None = None,
                status: str = 'VERIFY_RESIZE') -> None:
        """Cold migrate it."""
        self.compute.migrate_server(self.id, host=host)
        self._wait_for_task(status)

    def live_migrate(self, host: str) -> None:
        """Live migrate it, with the disks that hosts do not share."""
        self.compute.live_migrate_server(
            self.id, host=host, block_migration='auto')
        self._wait_for_task('ACTIVE')

    def resize(self, flavor: str, host: str,
               status: str = 'VERIFY_RESIZE') -> None:
        """Resize it, to another host or on its own."""
        with self.only(host):
            self.compute.resize_server(
                self.id, self.compute.find_flavor(flavor).id)
            self._wait_for_task(status)

    @contextlib.contextmanager
    def only(self, host: str) -> Iterator[None]:
        """Let the scheduler choose no host but this."""
        others = [service for service in
                  self.compute.services(binary='nova-compute')
                  if service.host != host]
        try:
            for service in others:
                self.compute.disable_service(service)
            yield
        finally:
            for service in others:
                self.compute.enable_service(service)

    def _wait_for_task(self, status: str) -> None:
        """Wait until the task that the API began is over.

        :raises daemons.Failed: with what is told of it, where the server is
            not of this status then.
        """
        if self.settle() != status:
            raise daemons.Failed(
                f'{self.id} is {self.status}, not {status}: '
                f'{self.failure()}')

    def confirm(self, status: str = 'ACTIVE') -> None:
        """Confirm a migration or a resize, and wait for the source's part."""
        self.compute.confirm_server_resize(self.id)
        self.wait_confirmed(status)

    def wait_confirmed(self, status: str = 'ACTIVE') -> None:
        """Wait until the source has done its part of a confirmation."""
        self.wait(status)
        daemons.wait_for(
            f'the end of the migration of {self.id}',
            lambda: all(migration.status in ENDED for migration in
                        self.compute.migrations(instance_uuid=self.id)),
            poll=0.3)

    def revert(self, status: str = 'ACTIVE') -> None:
        """Revert a migration or a resize."""
        self.compute.revert_server_resize(self.id)
        self.wait(status)

    def stop(self) -> None:
        """Power it off."""
        self.compute.stop_server(self.id)
        self.wait('SHUTOFF')

    def start(self) -> None:
        """Power it on."""
        self.compute.start_server(self.id)
        self.wait('ACTIVE')

    def delete(self) -> None:
        """Delete it and wait until it is gone."""
        self.compute.delete_server(self.id, ignore_missing=True)
        daemons.wait_for(f'the end of {self.id}', lambda: (
            self.compute.find_server(self.id) is None), poll=0.3)

    # ---- what can be seen of it

    def console(self) -> str:
        """What the guest said on its serial console since it was started."""
        return self.compute.get_server_console_output(self.id)['output'] or ''

    def counters(self) -> dict[str, int]:
        """The guest's boot counters, by disk, as of its last boot.

        A guest with UEFI has one more counter, in the variables: efi.
        """
        said = self.console()
        found = {name: int(count) for name, count in re.findall(
            r'DISK-COUNTER (\w+) (\d+)', said)}
        for name, word in (('vda', 'BOOT'), ('efi', 'EFI')):
            found.update({name: int(count) for count in re.findall(
                rf'{word}-COUNTER (\d+)', said)})
        return dict(sorted(found.items()))

    def sizes(self) -> dict[str, int]:
        """The sizes of the guest's disks in bytes, as it sees them."""
        return {name: int(sectors) * 512 for name, sectors in re.findall(
            r'DISK (\w+) (\d+)', self.console())}

    def wait_boot(self, seconds: float = BOOT_SECONDS) -> int:
        """Wait until the guest has booted, and return its boot counter."""
        daemons.wait_for(f'the guest of {self.id}',
                         lambda: 'GUEST-READY' in self.console(), seconds,
                         poll=1)
        return self.counters()['vda']

    def events(self) -> Iterator[tuple[str, str | None]]:
        """What `openstack server event show` says, newest action first."""
        for action in self.compute.server_actions(self.id):
            full = self.compute.get_server_action(action.request_id, self.id)
            for event in full.events or []:
                yield event['event'], event.get('details')

    def failure(self) -> str:
        """What `openstack server event show` says of the last failure.

        Nova records it a moment after the server has its status again.
        """
        return daemons.wait_for(f'an error of {self.id}', lambda: next(
            (details for event, details in self.events() if details), ''),
            seconds=30)

    def disks(self, host: str) -> dict[str, Path]:
        """The files of its disks on a host, by the disks' names."""
        where = self.cloud.lab.host(host).path
        found = {path.name.partition('_')[2]: path
                 for path in where(POOL).glob(f'{self.id}_*')}
        for directory in (self.id, f'{self.id}_resize'):
            for path in where(INSTANCES).joinpath(directory).glob('disk*'):
                found.setdefault(path.name, path)
        found.pop('disk.info', None)
        return found

    def qemu_pids(self) -> list[int]:
        """The processes that run its guest, on whichever host."""
        found = []
        for path in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b'\0')
                if b'qemu-system' in words[0] and self.id.encode() in words:
                    found.append(int(path.parent.name))
        return found

    def checksums(self, host: str) -> dict[str, str]:
        """The sha256 of each of its disks on a host."""
        return {name: sha256(path)
                for name, path in sorted(self.disks(host).items())}


def leftovers(host: 'lab_module.Host') -> list[str]:
    """How a host differs from one that never had a server."""
    found = []
    for kind, expected, what in (
            ('domain', [], ['list', '--all', '--name']),
            ('pool', POOL_NAMES, ['pool-list', '--all', '--name'])):
        names = set(host.run(['virsh', *what]).stdout.split())
        found += [f'{kind} {name}' for name in names.difference(expected)]
        found += [f'no {kind} {name}' for name in set(expected) - names]
    # The key of Ceph is the host's own.
    secrets = host.run(['virsh', '-q', 'secret-list']).stdout.splitlines()
    found += [f'secret {secret.strip()}' for secret in secrets
              if secret.strip() and secret.split()[1] != 'ceph']
    # Asked in the host: only there is seen what is mounted there.
    for path, known in ((POOL, {RESERVED}), (INSTANCES, NOT_OF_SERVERS)):
        names = set(host.run(['ls', '-A', path]).stdout.split())
        found += [f'{path}/{name}' for name in sorted(names - known)]
    found += [f'{where}/{path.name}' for where in (VTPM, NVRAM)
              for path in host.path(where).glob('*')]
    return [f'{host.name}: {what}' for what in found]


def sha256(path: Path) -> str:
    """The checksum of a file's content."""
    with path.open('rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
