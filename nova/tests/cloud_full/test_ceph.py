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

"""Servers with all their disks in Ceph."""

import atexit
import functools

from oslo_utils import units

from nova.tests.cloud import base
from nova.tests.cloud_full import test_life

from tools import cloud_ceph
from tools import servers

VMS = cloud_ceph.POOLS['nova']
DISKS = {'disk', 'disk.eph0', 'disk.swap', 'disk.config'}


@functools.cache
def get_ceph() -> cloud_ceph.Ceph:
    """The Ceph of this process's cloud."""
    made = cloud_ceph.Ceph(base.get_cloud())
    atexit.register(made.down)
    made.up()
    return made


class CephTestCase(test_life.LifeTestCase):
    """A server with a root, ephemeral and swap disk and a config drive."""

    options = cloud_ceph.OPTIONS
    flavor = 'small-swap'
    # Nova takes the root disk back to its snapshot, and no other.
    given_up = ('vda',)
    larger_flavor = 'large-swap'
    sizes = {'vda': units.Gi, 'vdb': units.Gi, 'vdc': 64 * units.Mi}
    # Nova's own code leaves an ephemeral disk of such a server as it is.
    larger_sizes = {'vda': 2 * units.Gi, 'vdb': units.Gi,
                    'vdc': 128 * units.Mi}

    def _set_options(self):
        self.ceph = get_ceph()
        super()._set_options()

    def _server(self):
        return {**super()._server(), 'config_drive': True}

    def assert_hosts_are_empty(self):
        self.assertEqual(set(), self.ceph.images(VMS))
        super().assert_hosts_are_empty()

    def assert_in_place(self):
        """All disks are in Ceph, and none is on a host."""
        self.assertEqual({f'{self.server.id}_{disk}' for disk in DISKS},
                         self.ceph.images(VMS))
        for host in (base.SOURCE, base.DESTINATION):
            self.assertEqual({}, self.server.disks(host))

    def assert_kept(self, kept: bool) -> None:
        """Nova keeps the root disk as it was until the resize ends."""
        self.assertEqual({'nova-resize'} if kept else set(),
                         self.ceph.snapshots(VMS, f'{self.server.id}_disk'))


class TestCeph(CephTestCase, test_life.MoveMixin):
    """The image is a file of Glance, which Nova imports."""

    is_clone = False

    def test_migrate_revert_resize_confirm(self):
        self.assertEqual(self.is_clone, 'parent' in self.ceph.info(
            VMS, f'{self.server.id}_disk'))
        super().test_migrate_revert_resize_confirm()

    def test_snapshot_that_a_failed_migration_left(self):
        self.ceph.take_snapshot(
            VMS, f'{self.server.id}_disk', 'nova-resize')
        self.act('reboot_server', 'HARD')
        self.assert_boots()
        self.server.migrate(base.DESTINATION)
        self.assert_boots()
        self.assert_kept(True)
        self.server.revert()
        self.forget_boot()
        self.assert_boots()
        self.assert_kept(False)

    def test_evacuate_and_migrate_back(self):
        with self.evacuated():
            self.assert_in_place()
        self.server.start()
        self.assert_boots()
        # Nova leaves the instance directory on the host that was down.
        left = self.source.path(f'{servers.INSTANCES}/{self.server.id}')
        self.assertTrue(left.exists())
        self.server.migrate(base.SOURCE)
        self.server.confirm()
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_boots()
        self.assert_no_disks(self.server, base.DESTINATION)


class TestCephClone(TestCeph):
    """The image is in Ceph, too: Nova clones it."""

    is_clone = True

    def _server(self):
        image = self.ceph.upload(
            'in-ceph', self.cloud.directory / 'guest.raw')
        self.addCleanup(self.images.delete_image, image)
        return {**super()._server(), 'image': image}


class TestLifeCeph(CephTestCase, test_life.LiveMixin, test_life.LifeMixin):
    """The operations of an operator on such a server."""

    options = base.cloud.config.merge(
        CephTestCase.options, test_life.LiveMixin.options)

    # Nova takes the root disk back, and leaves a swap disk as it is.
    reverted_sizes = CephTestCase.sizes | {'vdc': 128 * units.Mi}
    # See TestCeph.test_evacuate_and_migrate_back.
    test_evacuate = None
