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

"""What placement and the image cache are told of disks in a pool."""

import os
import pathlib

from oslo_utils import units

from nova.tests.cloud import base
from nova.tests.cloud_full import test_life

from tools import daemons
from tools import servers

# The last that shows how much room a hypervisor has on its disks.
MICROVERSION = '2.87'


class TestRoom(base.CloudTestCase):
    """A pool on a file system of its own, of which more is given away."""

    options = {'DEFAULT': {'update_resources_interval': 5,
                           'disk_allocation_ratio': 2.0}}

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)

    def _set_options(self):
        host = self.destination
        self.addCleanup(host.run, ['virsh', 'pool-refresh', 'nova-disks'])
        self.addCleanup(host.run, ['umount', servers.POOL])
        self.addCleanup(self.cloud.stop_computes)
        host.run(['mount', '-t', 'tmpfs', '-o',
                  f'size=3584m,uid={host.nova_uid},gid={host.nova_gid},'
                  'mode=755', 'tmpfs', servers.POOL])
        super()._set_options()

    def test_inventory_usage_and_overcommit(self):
        status = os.statvfs(self.source.path(servers.POOL))
        self.assertEqual(
            {'host1': (status.f_blocks * status.f_frsize // units.Gi, 2.0),
             'host2': (3, 2.0)}, self._inventory())
        self._wait_for_room(3)
        self._boot_there()
        self.assert_usage(host1=0, host2=2)
        self._wait_for_room(1)
        # There is no room for all that this one may write.
        self._boot_there()
        self.assert_usage(host1=0, host2=4)

    def _boot_there(self) -> None:
        self.create(base.DESTINATION, flavor='small-ephemeral')

    def _inventory(self) -> dict[str, tuple[int, float]]:
        """By host, the GiB of disk and how often they are given away."""
        placement = self.cloud.connection().placement
        found = {}
        for provider in placement.resource_providers():
            disk = placement.get(
                f'/resource_providers/{provider.id}/inventories').json()[
                    'inventories']['DISK_GB']
            found[provider.name] = (disk['total'], disk['allocation_ratio'])
        return found

    def _wait_for_room(self, gib: int) -> None:
        """Wait until so much is left, had each disk its full size."""
        compute = self.cloud.connection().compute

        def left() -> int:
            found = compute.get('/os-hypervisors/detail',
                                microversion=MICROVERSION).json()
            return {each['hypervisor_hostname']: each['disk_available_least']
                    for each in found['hypervisors']}[base.DESTINATION]

        daemons.wait_for(f'{gib} GiB to be left', lambda: left() == gib,
                         poll=0.5)


class TestImageCache(test_life.LifeTestCase):
    """A base image that is in use stays, and another one goes."""

    options = {'image_cache': {
        'manager_interval': 5,
        'remove_unused_original_minimum_age_seconds': 1}}

    def test_base_in_use_is_kept(self):
        base_image = self._base(self.server)
        self._wait_for_a_removal()
        self.assertTrue(base_image.exists())
        # What is kept for a revert is the disk of no server of this host.
        self.server.migrate(base.DESTINATION)
        self.assert_boots()
        self._wait_for_a_removal()
        self.assertTrue(base_image.exists())
        self.server.revert()
        # The last boot was on the copy, and went with it.
        self.forget_boot()
        self.assert_boots()

    def _base(self, server: servers.Server) -> pathlib.Path:
        """The base image of a server's root disk, on the source."""
        info = self.image_info(server, base.SOURCE, 'disk')
        return self.source.path(info['backing-filename'])

    def _wait_for_a_removal(self) -> None:
        """Have a base image that nobody needs any more, until it is gone."""
        name = f'unused-{self.boots["vda"]}'
        self._upload(name, self.cloud.directory / 'guest.raw',
                     disk_format='raw', container_format='bare')
        server = self.create(image=name)
        unused = self._base(server)
        self.assertTrue(unused.exists())
        server.delete()
        daemons.wait_for(f'{unused} to be removed',
                         lambda: not unused.exists(), poll=0.5)
