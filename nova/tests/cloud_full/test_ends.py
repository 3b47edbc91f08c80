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

"""Each way in which a migration ends, one after the other on one guest."""

import os
import pathlib
import signal

from oslo_utils import units

from nova.tests.cloud import base
from nova.tests.cloud import test_legacy

from tools import daemons
from tools import servers

# Written into a disk, where its guest has nothing: long enough to copy for a
# fault to happen meanwhile.
NOISE_AT = 256 * units.Mi
NOISE_BYTES = 512 * units.Mi


class EndsMixin:
    """Migrations of a server.

    :cvar directory: of its disks, on each host
    :cvar disk: the file of its root disk in there
    :cvar refusal: what is said where such a file is on the destination
    """

    directory = servers.POOL
    disk = '{0}_disk'
    refusal = 'is in the way'

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)
        self.server = self.create_booted(flavor='small-ephemeral')
        self.boots = 1
        self.disks = {
            name: path.name
            for name, path in self.server.disks(base.SOURCE).items()}
        self._make_noise()

    def _make_noise(self) -> None:
        with self._root_disk(self.source).open('r+b') as disk:
            disk.seek(NOISE_AT)
            for _index in range(NOISE_BYTES // units.Mi):
                disk.write(os.urandom(units.Mi))

    def _root_disk(self, host) -> pathlib.Path:
        return host.path(os.path.join(
            self.directory, self.disk).format(self.server.id))

    def assert_boots(self, host: str, other: str | None = None) -> None:
        """The guest starts once more on a host, from all of its disks.

        :param other: the host that has nothing of the server
        """
        self.boots += 1
        self.assertEqual(host, self.server.host)
        self.assert_counts(self.server, vda=self.boots, vdb=self.boots)
        directory = self.cloud.lab.host(host).path(
            self.directory.format(self.server.id))
        self.assertEqual(
            {name: directory / file for name, file in self.disks.items()},
            self.server.disks(host))
        if other:
            self.assert_no_disks(self.server, other)

    def test_refused_failed_reverted_confirmed_deleted(self):
        self.assert_usage(host1=2, host2=0)
        self._be_refused()
        self._fail()
        self._revert()
        self._go(base.DESTINATION, base.SOURCE)
        self.assert_usage(host1=0, host2=2)
        self._go(base.SOURCE, base.DESTINATION)
        self._delete_instead_of_confirm()
        self.assert_usage(host1=0, host2=0)

    def _be_refused(self) -> None:
        domain = self._domain()
        route = ['unreachable', self.destination.address]
        self.source.run(['ip', 'route', 'add', *route])
        try:
            self.server.migrate(base.DESTINATION, status='ACTIVE')
        finally:
            self.source.run(['ip', 'route', 'delete', *route])
        self._assert_reason('No route to host')

        other = self._root_disk(self.destination)
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b'of somebody else')
        self.server.migrate(base.DESTINATION, status='ACTIVE')
        self._assert_reason(self.refusal)
        self.assertEqual(b'of somebody else', other.read_bytes())
        other.unlink()
        if other.parent != self.destination.path(servers.POOL):
            other.parent.rmdir()

        self.assertEqual(base.SOURCE, self.server.host)
        self.assertEqual(domain, self._domain())
        self.assert_no_disks(self.server, base.DESTINATION)
        self.assert_usage(host1=2, host2=0)

    def _domain(self) -> str:
        return self.source.run(['virsh', 'domid', self.server.id]).stdout

    def _assert_reason(self, text: str) -> None:
        """Wait until the API tells why the last migration failed."""
        daemons.wait_for(f'the reason to be told: {text}',
                         lambda: text in self.server.failure(), seconds=30)

    def _fail(self) -> None:
        domain = self._domain()
        copy = self._begin_to_copy()
        self.destination.stop_libvirtd(signal.SIGKILL)
        self.assertLess(copy.stat().st_blocks * 512, NOISE_BYTES)
        # As a host that has been restarted: the copy does not go on.
        self.destination.path(
            f'/run/libvirt/storage/nova-{self.server.id}.xml').unlink()
        self.destination.start_libvirtd()
        self.server.wait('ACTIVE')
        self._assert_reason(
            f'to host {self.destination.address} ({self.destination.uri})')
        # The guest ran on: its disks were being copied for the first time.
        self.assertEqual(domain, self._domain())
        self.boots -= 1
        self.assert_boots(base.SOURCE, base.DESTINATION)
        self.cloud.wait_computes()

    def _begin_to_copy(self) -> pathlib.Path:
        self.server.compute.migrate_server(
            self.server.id, host=base.DESTINATION)
        copy = self._root_disk(self.destination)
        daemons.wait_for('the copy to begin', lambda: (
            copy.exists() and copy.stat().st_blocks * 512 > 32 * units.Mi),
            poll=0.02)
        return copy

    def _revert(self) -> None:
        self.server.migrate(base.DESTINATION)
        self.assert_boots(base.DESTINATION)
        self.assert_usage(host1=2, host2=2)
        self.server.revert()
        # The last boot was on the copy, and went with it.
        self.boots -= 1
        self.assert_boots(base.SOURCE, base.DESTINATION)
        self.assert_usage(host1=2, host2=0)

    def _go(self, host: str, other: str) -> None:
        self.server.migrate(host)
        self.server.confirm()
        self.assert_boots(host, other)

    def _delete_instead_of_confirm(self) -> None:
        self.server.migrate(base.DESTINATION)
        self.server.delete()
        for host in (base.SOURCE, base.DESTINATION):
            self.assert_no_disks(self.server, host)

    def test_deleted_while_copied(self):
        copy = self._begin_to_copy()
        self.assertLess(copy.stat().st_blocks * 512, NOISE_BYTES)
        self.server.delete()
        self.wait_no_disks(self.server)
        self.assert_usage(host1=0, host2=0)


class TestEnds(EndsMixin, base.CloudTestCase):
    """Overlays in the pool."""


class TestEndsRaw(EndsMixin, base.CloudTestCase):
    """Raw disks in the pool."""

    options = {'DEFAULT': {'use_cow_images': False}}


class TestEndsFile(EndsMixin, test_legacy.DirectoryTestCase):
    """Overlays in the instance directory."""

    directory = servers.INSTANCES + '/{0}'
    disk = 'disk'
    refusal = 'is there already'

    def test_resized(self):
        self.server.resize('small', base.DESTINATION, 'ACTIVE')
        self.assertIn('resize disk down', self.server.failure())
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_no_disks(self.server, base.DESTINATION)
        self.server.resize('large-ephemeral', base.DESTINATION)
        self.server.confirm()
        self.assert_boots(base.DESTINATION, base.SOURCE)
        # Nova's own code leaves an ephemeral disk of such a server as it is.
        self.assertEqual({'vda': 2 * units.Gi, 'vdb': units.Gi},
                         self.server.sizes())


class TestAutoConfirm(base.CloudTestCase):
    """Nova confirms what nobody has confirmed for a while."""

    options = {'DEFAULT': {'resize_confirm_window': 5}}

    def test_confirmed_by_nova(self):
        self.addCleanup(self.assert_hosts_are_empty)
        server = self.create_booted()
        server.migrate(base.DESTINATION)
        self.assertNotEqual({}, server.disks(base.SOURCE))
        server.wait_confirmed()
        self.assert_no_disks(server, base.SOURCE)
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=2)
