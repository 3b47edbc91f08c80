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

import os
import signal
import time

from oslo_utils import units

from nova.tests.cloud import base

from tools import cloud
from tools import daemons
from tools import servers

# Written beyond the guest's only partition: long enough to copy for a fault
# to happen meanwhile.
NOISE_AT = 256 * units.Mi
NOISE_BYTES = 512 * units.Mi
# In MiB/s. On a busy machine it takes seconds to break something.
SLOW = {'vol_upload_migration_bandwidth': 64}


# So that nova-compute stops copies at once when it is told to end: Nova 34
# keeps 20 seconds of it for the driver, Nova 33 none.
SHUTDOWN_SECONDS = 20 if base.RELEASE >= 34 else 0


class FaultTestCase(base.CloudTestCase):
    """A server with a disk that takes long enough to copy.

    :cvar boots: how often a server boots when its migration fails
    """

    options: cloud.config.Options = {
        'DEFAULT': {
            'use_cow_images': 'False',
            'manager_shutdown_timeout': SHUTDOWN_SECONDS,
            'update_resources_interval': 10},
        'libvirt': {**SLOW, 'vol_upload_migration_precopy': 'False',
                    'vol_upload_migration_reconnect_timeout': '0'}}
    boots = 1

    def setUp(self):
        super().setUp()
        self.server = self.create_booted()
        self.counter = self.server.counters()['vda']
        self.disk = f'{servers.POOL}/{self.server.id}_disk'
        self.make_noise(self.server, self.source)
        self.pids = self.server.qemu_pids()
        self.assertEqual(1, len(self.pids))

    @property
    def was_off(self) -> bool:
        """Whether the guest's process is not the one that it was."""
        return self.pids != self.server.qemu_pids()

    @staticmethod
    def make_noise(server, host) -> None:
        path = host.path(f'{servers.POOL}/{server.id}_disk')
        with open(path, 'r+b') as disk:
            disk.seek(NOISE_AT)
            for _index in range(NOISE_BYTES // units.Mi):
                disk.write(os.urandom(units.Mi))

    def break_when_copying(self, break_it) -> None:
        """Migrate, and break something on the way."""
        self.server.compute.migrate_server(
            self.server.id, host=base.DESTINATION)
        copy = self.destination.path(self.disk)
        daemons.wait_for('the copy to begin', lambda: (
            copy.exists() and copy.stat().st_blocks * 512 > 32 * units.Mi),
            poll=0.05)
        self.broken_at = time.monotonic()
        break_it()
        size = copy.stat().st_blocks * 512 if copy.exists() else 0
        self.assertLess(size, NOISE_BYTES)

    def fail_when_copying(self, break_it) -> str:
        """The same; return what is told of it."""
        self.break_when_copying(break_it)
        self.server.wait('ACTIVE')
        return self.server.failure()

    def assert_as_before(self) -> None:
        """The server runs on the source, from the disk that it had."""
        self.assertEqual(base.SOURCE, self.server.host)
        self.server.wait_boot()
        self.assertEqual({'vda': self.counter + self.boots},
                         self.server.counters())
        migration, = self.server.compute.migrations(
            instance_uuid=self.server.id)
        self.assertEqual('error', migration.status)

    def assert_next_attempt_works(self) -> None:
        self.cloud.wait_computes()
        self.server.migrate(base.DESTINATION)
        self.assertEqual(base.DESTINATION, self.server.host)
        self.server.confirm()
        self.assert_no_disks(self.server, base.SOURCE)
        self.server.wait_boot()
        self.assertEqual({'vda': self.counter + self.boots + 1},
                         self.server.counters())


class ReconnectTestCase(FaultTestCase):
    """A copy goes on after its connection was lost."""

    options = {**FaultTestCase.options, 'libvirt': SLOW}

    def test_daemon_of_the_destination_is_restarted(self):
        def restart():
            self.destination.stop_libvirtd(signal.SIGKILL)
            self.destination.start_libvirtd()

        self.break_when_copying(restart)
        self.server.wait('VERIFY_RESIZE')
        self.assertEqual(base.DESTINATION, self.server.host)
        self.server.confirm()
        self.assert_no_disks(self.server, base.SOURCE)
        self.server.wait_boot()
        self.assertEqual({'vda': self.counter + 1}, self.server.counters())


class FailureTestCase(FaultTestCase):
    """What breaks when a copy is under way leaves the server as it was."""

    def test_daemon_of_the_destination_is_killed(self):
        def kill():
            self.destination.stop_libvirtd(signal.SIGKILL)
            self.destination.start_libvirtd()

        message = self.fail_when_copying(kill)
        self.assertIn(
            f'{self.disk.rpartition("/")[2]} to host '
            f'{self.destination.address} ({self.destination.uri})', message)
        self.assert_as_before()
        # The daemon may not answer yet when this is tried first.
        daemons.wait_for('the copy to be deleted', lambda: (
            not self.server.disks(base.DESTINATION)), seconds=120)
        self.assert_no_disks(self.server, base.DESTINATION)
        self.assert_next_attempt_works()

    def test_link_is_cut(self):
        self.addCleanup(self.destination.link, True)
        message = self.fail_when_copying(
            lambda: self.destination.link(False))
        self.assertIn('the connection was lost', message)
        self.destination.link(True)
        self.assert_as_before()
        self.assert_next_attempt_works()

    def test_disk_of_the_destination_fills_up(self):
        pool = servers.POOL
        # Big enough for placement, which counts all of it, and so full that
        # the disk would only just fit.
        self.destination.run(['mount', '-t', 'tmpfs', '-o', 'size=4g,'
                              f'uid={self.destination.nova_uid}', 'tmpfs',
                              pool])
        self.addCleanup(self.destination.run, ['virsh', 'pool-refresh',
                                               'nova-disks'])
        self.addCleanup(self.destination.run, ['umount', pool])
        # From inside the host, which alone sees the mount.
        inside = f'/proc/{self.destination.pid}/root'
        self._fill(f'{inside}{pool}/filler', 4 * units.Gi - 800 * units.Mi)
        copy = f'{inside}{self.disk}'

        self.server.compute.migrate_server(
            self.server.id, host=base.DESTINATION)
        daemons.wait_for('the copy to begin', lambda: (
            os.path.exists(copy) and os.stat(copy).st_blocks > 0), poll=0.02)
        self._fill(f'{inside}{pool}/more', 500 * units.Mi)
        self.server.wait('ACTIVE')
        self.assertIn('No space left on device', self.server.failure())
        self.assert_as_before()
        self.assertEqual({'filler', 'more'},
                         set(os.listdir(inside + pool)) - {servers.RESERVED})

    @staticmethod
    def _fill(path, size) -> None:
        with open(path, 'wb') as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def test_server_is_deleted(self):
        self.server.compute.migrate_server(
            self.server.id, host=base.DESTINATION)
        copy = self.destination.path(self.disk)
        daemons.wait_for('the copy to begin', copy.exists, poll=0.05)
        self.server.delete()
        self.wait_no_disks(self.server)
        for host in (base.SOURCE, base.DESTINATION):
            domains = self.cloud.lab.host(host).run(
                ['virsh', 'list', '--all', '--uuid']).stdout
            self.assertNotIn(self.server.id, domains)


class PrecopyTestCase(FailureTestCase):
    """A fault before the server is powered off does not stop it."""

    options: cloud.config.Options = {
        'DEFAULT': FaultTestCase.options['DEFAULT'],
        'libvirt': {**SLOW, 'vol_upload_migration_reconnect_timeout': '0'}}
    boots = 0

    def fail_when_copying(self, break_it) -> str:
        message = super().fail_when_copying(break_it)
        self.assertFalse(self.was_off)
        return message
