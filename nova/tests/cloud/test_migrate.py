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

"""Servers of a real cloud move from one compute host to the other."""

import filecmp
from typing import Any

from nova.tests.cloud import base
from nova.tests.live import base as live

from tools import certificates
from tools import daemons
from tools import servers

GIB = 1024 ** 3
POOL = 'nova-disks'
DISKS = {'disk', 'disk.eph0', 'disk.config'}


class TestMigrate(base.CloudTestCase):
    """openstack server migrate of a running server."""

    def test_confirm_leaves_the_server_on_the_destination_alone(self):
        server = self.create_booted(flavor='small-ephemeral')
        self.migrate_without_ssh(server, base.DESTINATION)
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=2, vdb=2)
        self.assertNotEqual({}, server.disks(base.SOURCE))
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)
        self.assertEqual({'disk', 'disk.eph0'},
                         set(server.disks(base.DESTINATION)))

    def test_revert_leaves_the_server_on_the_source_alone(self):
        server = self.create_booted(flavor='small-ephemeral')
        server.migrate(base.DESTINATION)
        self.assert_counts(server, vda=2, vdb=2)
        server.revert()
        self.assertEqual(base.SOURCE, server.host)
        # The second boot was on the copy, and went with it.
        self.assert_counts(server, vda=2, vdb=2)
        self.assert_no_disks(server, base.DESTINATION)

    def test_there_and_back_again(self):
        server = self.create_booted()
        server.migrate(base.DESTINATION)
        server.confirm()
        server.migrate(base.SOURCE)
        server.confirm()
        self.assertEqual(base.SOURCE, server.host)
        server.wait_boot()
        self.assert_no_disks(server, base.DESTINATION)

    def test_base_image_goes_along_while_the_guest_runs(self):
        server = self.create_booted()
        path = self.image_info(server, base.SOURCE, 'disk')[
            'full-backing-filename']
        here, there = (host.path(path)
                       for host in (self.source, self.destination))
        there.unlink(missing_ok=True)
        size = base.log_size(self.cloud, base.SOURCE)
        self.migrate_without_ssh(server, base.DESTINATION)
        log = base.read_log(self.cloud, base.SOURCE, size)
        _before, copied, after = log.partition(
            f'Copied base_{there.name} to {self.destination.address}')
        self.assertTrue(copied, log)
        self.assertIn('The server is powered off', after)
        self.assertNotIn('has not written yet', log)
        self.assertTrue(filecmp.cmp(here, there, shallow=False))
        self.assertEqual(1, there.stat().st_nlink)
        server.wait_boot()

    def test_delete_instead_of_confirm_leaves_nothing(self):
        server = self.create()
        server.migrate(base.DESTINATION)
        server.delete()
        for host in (base.SOURCE, base.DESTINATION):
            self.assert_no_disks(server, host)


class TestResize(base.CloudTestCase):
    """openstack server resize to bigger disks, and what is refused."""

    def test_confirm_gives_the_guest_bigger_disks(self):
        server = self.create_booted(flavor='small-ephemeral')
        server.resize('large-ephemeral', base.DESTINATION)
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=2, vdb=2)
        self.assertEqual({'vda': 2 * GIB, 'vdb': 2 * GIB}, server.sizes())
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)

    def test_revert_gives_the_old_disk_back(self):
        server = self.create_booted(flavor='small')
        server.resize('large', base.DESTINATION)
        self.assert_counts(server, vda=2)
        server.revert()
        self.assert_counts(server, vda=2)
        self.assertEqual(GIB, server.sizes()['vda'])
        self.assert_no_disks(server, base.DESTINATION)

    def test_a_smaller_disk_is_refused(self):
        # A smaller root disk the API refuses by itself.
        server = self.create(flavor='small-ephemeral')
        server.resize('small', base.DESTINATION, 'ACTIVE')
        self.assertEqual(base.SOURCE, server.host)
        self.assertIn('resize disk down', server.failure())
        self.assert_no_disks(server, base.DESTINATION)


class TestResizeRaw(TestResize):
    """The same with disks that are no overlays."""

    options = {'DEFAULT': {'use_cow_images': 'False'}}


class DisksMixin:
    """Disks arrive as they are: compared while the server is off.

    :cvar flattened: those whose base images the source host had made for
        itself; they have none any more
    """

    flattened: frozenset[str] = frozenset()

    def setUp(self):
        super().setUp()
        self.server = self.create_booted(flavor='small-ephemeral',
                                         config_drive=True)
        self.server.stop()
        self.server.migrate(base.DESTINATION)

    def test_every_disk_is_the_same_on_both_hosts(self):
        self.assertEqual(DISKS, set(self.server.disks(base.SOURCE)))
        self.assert_same_disks(self.server, DISKS - self.flattened)

    def test_formats_are_the_same_on_both_hosts(self):
        for host in (base.SOURCE, base.DESTINATION):
            for disk in ('disk', 'disk.eph0'):
                info = self.image_info(self.server, host, disk)
                self.assertEqual(self.format, info['format'])
                is_flat = host == base.DESTINATION and disk in self.flattened
                self.assertEqual(self.backing and not is_flat,
                                 'backing-filename' in info)

    def test_the_guest_starts_from_them(self):
        self.server.confirm('SHUTOFF')
        self.server.start()
        self.assert_counts(self.server, vda=2, vdb=2)
        self.assertEqual(DISKS, set(self.server.disks(base.DESTINATION)))


class TestQcow2Disks(DisksMixin, base.CloudTestCase):
    """Overlays on the image cache, as by default."""

    format = 'qcow2'
    backing = True
    flattened = frozenset({'disk.eph0'})


class TestFullDisks(DisksMixin, base.CloudTestCase):
    """Disks on their own, with use_cow_images switched off."""

    format = 'qcow2'
    backing = False
    options = {'DEFAULT': {'use_cow_images': False}}

    def test_holes_stay_holes(self):
        there = self.server.disks(base.SOURCE)
        here = self.server.disks(base.DESTINATION)
        for disk in ('disk', 'disk.eph0'):
            self.assertLess(
                live.LabMixin.allocated(here[disk]),
                live.LabMixin.allocated(there[disk]) + 1024 ** 2)


class SshMixin:
    """How to see that Nova's own way was taken."""

    def sshd_log_size(self) -> int:
        return (self.destination.logs / 'sshd.log').stat().st_size


class TestLegacy(SshMixin, base.CloudTestCase):
    """Servers that are not in a pool go Nova's own way, over ssh."""

    ssh = True
    options = {'libvirt': {'use_storage_pools': False}}

    def test_without_pools(self):
        self._move(self._create())

    def test_made_before_pools_were_switched_on(self):
        """Raw disks stay files, and go Nova's own way."""
        raw = {'DEFAULT': {'use_cow_images': False}}
        self.cloud.restart_computes(base.cloud.config.merge(
            base.cloud.STREAMS, self.options, raw))
        server = self._create()
        self.cloud.restart_computes(base.cloud.config.merge(
            base.cloud.STREAMS, raw))
        self._move(server)

    def _create(self) -> servers.Server:
        server = self.create_booted(flavor='small-ephemeral')
        self.assert_in_instance_directory(server, base.SOURCE)
        return server

    def _move(self, server: servers.Server) -> None:
        size = self.sshd_log_size()
        server.migrate(base.DESTINATION)
        self.assertGreater(self.sshd_log_size(), size)
        self.assert_in_instance_directory(server, base.DESTINATION)
        self.assert_counts(server, vda=2, vdb=2)
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)

    def assert_in_instance_directory(self, server: servers.Server,
                                     host: str) -> None:
        self.assertEqual({server.id}, {
            path.parent.name for path in server.disks(host).values()})


class RefusedTestCase(base.CloudTestCase):
    """A server, and how to see that it did not move."""

    def setUp(self):
        super().setUp()
        self.server = self.create()
        self.domain = self._domain()

    def _domain(self) -> str:
        return self.source.run(['virsh', 'domid', self.server.id]).stdout

    def assert_stays(self) -> None:
        """Try to migrate, and check that nothing came of it."""
        self.server.migrate(base.DESTINATION, status='ACTIVE')
        self.assertEqual(base.SOURCE, self.server.host)
        self.assertEqual(self.domain, self._domain())

    def assert_refused(self, reason: str) -> None:
        """Try to migrate, and check that all that came of it is a message."""
        self.assert_stays()
        message = self.server.failure()
        self.assertIn(self.destination.address, message)
        self.assertIn(reason, message)
        self.assertIn(message.splitlines()[0],
                      base.read_log(self.cloud, base.SOURCE))
        # The name of the host is left out where it makes the text too long:
        # it is in the URI.
        self.assertIn(self.uri(), message)

    def uri(self) -> str:
        """The URI that a message has to name."""
        return self.destination.uri

    def undo(self, host: live.nova_lab.Host, *argv: str, **kwargs) -> None:
        """Run a command in a host after the test."""
        self.addCleanup(host.run, argv, **kwargs)


class TestRefused(RefusedTestCase):
    """A destination that cannot take the server leaves it running."""

    def test_libvirtd_is_down(self):
        # Nova's own doing: a host whose libvirtd is gone takes no servers.
        self.addCleanup(self.cloud.restart_computes)
        self.addCleanup(self.destination.start_libvirtd)
        self.destination.stop_libvirtd()
        compute = self.server.compute
        daemons.wait_for('the destination to be disabled', lambda: (
            find_service(compute, base.DESTINATION).status == 'disabled'))
        self.assert_stays()

    def test_host_does_not_answer(self):
        route = ('blackhole', self.source.address)
        self.destination.run(['ip', 'route', 'add', *route])
        self.undo(self.destination, 'ip', 'route', 'delete', *route)
        self.assert_refused('no answer')

    def test_host_is_not_there(self):
        route = ('unreachable', self.destination.address)
        self.source.run(['ip', 'route', 'add', *route])
        self.undo(self.source, 'ip', 'route', 'delete', *route)
        self.assert_refused('No route to host')

    def test_certificate_of_an_authority_that_is_not_ours(self):
        ours = self.source.path('/etc/pki/CA/cacert.pem')
        before = ours.read_bytes()
        self.addCleanup(ours.write_bytes, before)
        other = certificates.Authority(self.source.directory / 'other-ca')
        ours.write_bytes(other.certificate.read_bytes())
        self.assert_refused('ertificate')

    def test_certificate_of_another_host(self):
        address = [f'{self.destination.address}/32', 'dev', 'lo']
        self.source.run(['ip', 'address', 'add', *address])
        self.undo(self.source, 'ip', 'address', 'delete', *address)
        self.assert_refused('ertificate')

    def test_pool_is_not_there(self):
        xml = self._virsh('pool-dumpxml', POOL)
        self._virsh('pool-destroy', POOL)
        self.undo(self.destination, 'virsh', 'pool-start', POOL)
        self._virsh('pool-undefine', POOL)
        self.undo(self.destination, 'virsh', 'pool-define', '/dev/stdin',
                  input=xml)
        self.assert_refused(f'no storage pool {POOL}')

    def test_pool_is_not_active(self):
        self._virsh('pool-destroy', POOL)
        self.undo(self.destination, 'virsh', 'pool-start', POOL)
        self.assert_refused(f'{POOL} is not active')

    def test_pool_has_no_room(self):
        # Of a size that placement has nothing against, but full.
        owner = (f'uid={self.destination.nova_uid},'
                 f'gid={self.destination.nova_gid},mode=0755')
        self.destination.run(['mount', '-t', 'tmpfs', '-o',
                              f'size=2g,{owner}', 'tmpfs', servers.POOL])
        self.destination.run(['fallocate', '-l', str(2 * GIB - 2 ** 16),
                              f'{servers.POOL}/filler'])
        self.undo(self.destination, 'virsh', 'pool-refresh', POOL)
        self.undo(self.destination, 'umount', servers.POOL)
        self.assert_refused('bytes available')

    def test_another_volume_is_in_the_way(self):
        other = self.destination.path(
            f'{servers.POOL}/{self.server.id}_disk')
        other.write_bytes(b'of somebody else')
        self.addCleanup(other.unlink)
        self.assert_refused('is in the way')
        self.assertEqual(b'of somebody else', other.read_bytes())

    def _virsh(self, *argv: str) -> str:
        return self.destination.run(['virsh', *argv]).stdout


class TestRefusedPort(RefusedTestCase):
    """libvirtd runs, but takes no connections where they are to go."""

    options = {'libvirt': {'vol_upload_migration_uri':
                           'qemu+tls://%s:16599/system'}}

    def uri(self) -> str:
        return f'qemu+tls://{self.destination.address}:16599/system'

    def test_connection_is_refused(self):
        self.assert_refused('Connection refused')


def find_service(compute: Any, host: str) -> Any:
    """The nova-compute of a host, as the API shows it."""
    return next(compute.services(binary='nova-compute', host=host))
