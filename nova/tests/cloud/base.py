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

"""What cloud tests share: one small cloud per test process."""

import atexit
import functools
import os
import stat

from oslo_serialization import jsonutils
import testtools
from testtools import content
from testtools import content_type

from nova.tests.live import base as live

from tools import cloud
from tools import cloud_venv
from tools import daemons
from tools import guest
from tools import process_trace
from tools import servers
from tools import tripwire

RELEASE = int(cloud_venv.RELEASE)
EVENTLET = os.environ.get('NOVA_LAB_EVENTLET', '') == '1'
SOURCE = 'host1'
DESTINATION = 'host2'
SSH_PROGRAMS = {'ssh', 'scp', 'sftp', 'rsync', 'sshd', 'sftp-server'}


def get_cloud() -> cloud.Cloud:
    """The cloud of this process: on a lab that is up, or one of its own.

    A lab that was up before is kept, and so is the cloud on it. A cloud that
    cannot be brought up is tried once only, not for each test.
    """
    made, error = _bring_up()
    if error:
        raise error
    return made


@functools.cache
def _bring_up() -> tuple[cloud.Cloud, Exception | None]:
    kept = live.find_lab().is_up
    made = cloud.Cloud(live.get_lab(), EVENTLET, cloud.STREAMS)
    if not kept:
        # Registered after the lab's own end, so that it comes before it.
        atexit.register(made.down)
    try:
        made.up()
    except Exception as error:
        return made, error
    return made, None


class CloudTestCase(testtools.TestCase):
    """A test on a real cloud, with no servers left in it afterwards.

    :cvar options: of nova-compute, besides those that switch this on
    :cvar host_options: of one host's nova-compute, besides those
    :cvar compute_program: what both hosts run, with its arguments
    :cvar ssh: whether the hosts have an ssh daemon and keys; where they have
        not, no program of ssh may have been tried in the end
    """

    options: cloud.config.Options = {}
    host_options: dict[str, cloud.config.Options] = {}
    compute_program = cloud.NOVA_COMPUTE
    ssh = False

    def setUp(self) -> None:
        super().setUp()
        if os.geteuid():
            self.skipTest('a lab needs root')
        self.cloud = get_cloud()
        self.source = self.cloud.lab.host(SOURCE)
        self.destination = self.cloud.lab.host(DESTINATION)
        self.addDetail('nova-compute', self._logs())
        self._set_options()
        self.cloud.wait_computes()
        self._set_ssh()

    def _set_options(self) -> None:
        options = cloud.config.merge(cloud.STREAMS, self.options)
        wanted = options, self.host_options, self.compute_program
        if wanted != (self.cloud.options, self.cloud.host_options,
                      self.cloud.compute_program):
            self.cloud.compute_program = self.compute_program
            self.cloud.restart_computes(
                options, host_options=self.host_options)

    def _set_ssh(self) -> None:
        if self.ssh:
            self.addCleanup(self.cloud.lab.ssh, False)
            self.cloud.lab.ssh(True)
            return
        for host in self.cloud.lab.hosts:
            wire = tripwire.Tripwire(host)
            self.addCleanup(wire.lift)
            wire.lay()
            self.addCleanup(self._check_no_ssh, wire)

    def _check_no_ssh(self, wire: tripwire.Tripwire) -> None:
        self.assertEqual([], wire.calls())
        self.assertEqual([], tripwire.ssh_traces(wire.host))

    def _logs(self) -> content.Content:
        sizes = {host.name: log_size(self.cloud, host.name)
                 for host in self.cloud.lab.hosts}
        return content.Content(
            content_type.UTF8_TEXT,
            lambda: [read_log(self.cloud, name, size).encode()
                     for name, size in sizes.items()])

    def forget_pools(self, *hosts: live.nova_lab.Host) -> None:
        """Take the pools away that a nova-compute defines as it starts."""
        for host in hosts:
            known = host.run(['virsh', 'pool-list', '--all', '--name']).stdout
            for name in set(servers.POOL_NAMES) & set(known.split()):
                host.run(['virsh', 'pool-destroy', name], check=False)
                host.run(['virsh', 'pool-undefine', name])

    # ---- what a migration starts

    def migrate_traced(self, server: servers.Server,
                       host: str) -> dict[str, process_trace.Trace]:
        """Cold migrate a server.

        :returns: what each host started meanwhile
        """
        with (process_trace.Trace(self.source) as source,
              process_trace.Trace(self.destination) as destination):
            server.migrate(host)
        return {SOURCE: source, DESTINATION: destination}

    def migrate_without_ssh(self, server: servers.Server, host: str) -> None:
        """Cold migrate a server, and check what was started for that."""
        for trace in self.migrate_traced(server, host).values():
            self.assertEqual(set(), SSH_PROGRAMS & trace.programs())

    # ---- servers

    def create(self, host: str = SOURCE, **kwargs) -> servers.Server:
        """Boot a server on a host, to be deleted after the test."""
        server = servers.Server.create(self.cloud, host, self.id(), **kwargs)
        self.addCleanup(server.delete)
        return server

    def create_booted(self, **kwargs) -> servers.Server:
        """Boot a server whose guest has counted its first boot."""
        server = self.create(**kwargs)
        server.wait_boot()
        return server

    def assert_counts(self, server: servers.Server, **counters: int) -> None:
        """Wait for the guest to boot, and check its counters by disk."""
        server.wait_boot()
        self.assertEqual(counters, server.counters())

    def assert_no_disks(self, server: servers.Server, host: str) -> None:
        """Check that nothing of a server is left on a host."""
        self.assertEqual([], self._left(server, host))

    def wait_no_disks(self, server: servers.Server) -> None:
        """Wait until nothing of a server is left on any host.

        Nova does not wait for the end of a copy that a deletion cancels.
        """
        for host in SOURCE, DESTINATION:
            daemons.wait_for(
                f'{host} to be clean',
                lambda: not self._left(server, host), seconds=10, poll=0.2)

    def _left(self, server: servers.Server, host: str) -> list[object]:
        where = self.cloud.lab.host(host).path(servers.INSTANCES)
        return [*server.disks(host), *where.glob(f'{server.id}*')]

    def assert_hosts_are_empty(self) -> None:
        """Check that no server has left anything on any host."""
        for host in self.cloud.lab.hosts:
            self.assertEqual([], servers.leftovers(host))

    def assert_same_disks(self, server: servers.Server,
                          names: set[str]) -> None:
        """Check that a server that is off has the same disks on both hosts.

        :param names: of the disks; others may differ
        """
        source, destination = (server.checksums(host)
                               for host in (SOURCE, DESTINATION))
        self.assertEqual(set(source), set(destination))
        for name in names:
            self.assertEqual(source[name], destination[name], name)

    def assert_usage(self, **usage: int) -> None:
        """Wait until placement has given so many GiB away on each host."""
        placement = self.cloud.connection().placement

        def given() -> dict[str, int]:
            return {provider.name: placement.get(
                f'/resource_providers/{provider.id}/usages').json()[
                    'usages']['DISK_GB']
                for provider in placement.resource_providers()}

        daemons.wait_for(f'placement to show {usage}',
                         lambda: given() == usage, poll=0.5)

    def image_info(self, server: servers.Server, host: str,
                   disk: str) -> dict:
        """What qemu-img says of a volume."""
        return self.qemu_img_info(
            host, f'{servers.POOL}/{server.id}_{disk}')

    def qemu_img_info(self, host: str, path: str) -> dict:
        """What qemu-img says of a file, asked by nova as nova-compute is."""
        said = self.cloud.lab.host(host).run(
            ['qemu-img', 'info', '-U', '--output=json', path],
            user='nova').stdout
        return jsonutils.loads(said)

    def vtpm(self, server: servers.Server,
             host: str) -> dict[str, tuple[str, int]]:
        """The state of its vTPM: checksum and mode of files by path."""
        top = self.cloud.lab.host(host).path(f'{servers.VTPM}/{server.id}')
        return {
            str(path.relative_to(top)): (
                servers.sha256(path) if path.is_file() else '',
                stat.S_IMODE(path.stat().st_mode))
            for path in top.rglob('*')}

    def assert_same_vtpm(self, server: servers.Server) -> None:
        """Check that a server that is off has one, the same on all hosts."""
        state = self.vtpm(server, SOURCE)
        self.assertIn('tpm2/tpm2-00.permall', state)
        self.assertEqual(state, self.vtpm(server, DESTINATION))

    def make_boot_images(self, name: str) -> list[str]:
        """Upload the guest with a kernel and a ramdisk of its own.

        :returns: the ids of the images
        """
        disk = self.cloud.directory / 'guest.raw'
        properties = {'os_command_line': guest.KERNEL_PARAMETERS}
        for kind, form, file in (('kernel', 'aki', 'vmlinuz'),
                                 ('ramdisk', 'ari', 'initrd')):
            path = self.cloud.directory / file
            self.addCleanup(path.unlink)
            self.cloud.run(['debugfs', '-R', f'dump /boot/{file} {path}',
                            f'{disk}?offset={guest.PARTITION_START}'])
            properties[f'{kind}_id'] = self._upload(
                kind, path, disk_format=form, container_format=form)
        return [properties['kernel_id'], properties['ramdisk_id'],
                self._upload(name, disk, disk_format='raw',
                             container_format='bare', **properties)]

    def _upload(self, name: str, path: os.PathLike, **kwargs) -> str:
        images = self.cloud.connection().image
        made = images.create_image(
            name=name, filename=str(path), wait=True, **kwargs)
        self.addCleanup(images.delete_image, made.id, ignore_missing=True)
        return made.id


def log_size(of: cloud.Cloud, host: str) -> int:
    """Where nova-compute's log ends now."""
    path = of.log(host)
    return path.stat().st_size if path.exists() else 0


def read_log(of: cloud.Cloud, host: str, offset: int = 0) -> str:
    """What nova-compute logged since."""
    with of.log(host).open('rb') as log:
        log.seek(offset)
        return log.read().decode(errors='replace')
