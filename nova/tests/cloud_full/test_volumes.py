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

"""Servers with volumes of Cinder, besides disks of their own or instead."""

import atexit
import functools
import shutil

from openstack import exceptions
from oslo_utils import units

from nova.tests.cloud import base
from nova.tests.cloud_full import test_ceph
from nova.tests.cloud_full import test_life

from tools import cloud_ceph
from tools import cloud_volumes
from tools import daemons
from tools import servers


@functools.cache
def get_volumes() -> cloud_volumes.Volumes:
    """The Cinder of this process's cloud."""
    made = cloud_volumes.Volumes(base.get_cloud())
    atexit.register(made.down)
    made.up()
    return made


class VolumeTestCase(base.CloudTestCase):
    """Servers and volumes of which nothing is left in the end."""

    def _set_options(self):
        self.volumes = get_volumes()
        self.volumes.use(self.backend())
        self.storage = self.volumes.connection()
        super()._set_options()
        self.addCleanup(self.assert_hosts_are_empty)

    def backend(self) -> dict[str, object] | None:
        """The options of Cinder's backend, None for files."""
        return None

    def boot_from_volume(self, volume: str, flavor: str,
                         **kwargs) -> servers.Server:
        """Boot a server on the source from a volume with the guest."""
        compute = self.cloud.connection().compute
        made = compute.create_server(
            name=self.id(), host=base.SOURCE, networks='none',
            flavor_id=compute.find_flavor(flavor).id,
            block_device_mapping_v2=[{
                'boot_index': 0, 'uuid': volume, 'source_type': 'volume',
                'destination_type': 'volume'}], **kwargs)
        server = servers.Server(self.cloud, made.id)
        self.addCleanup(server.delete)
        server.wait('ACTIVE')
        server.wait_boot()
        return server

    def make_boot_volume(self) -> str:
        """Make a volume with a copy of the guest."""
        volume = self.make_volume()
        shutil.copyfile(self.cloud.directory / 'guest.raw',
                        self.volumes.path(volume))
        with open(self.volumes.path(volume), 'r+b') as file:
            file.truncate(units.Gi)
        self.storage.set_volume_bootable_status(volume, True)
        return volume

    def make_volume(self, **kwargs) -> str:
        volume = self.storage.create_volume(size=1, name=self.id(), **kwargs)
        self.addCleanup(self._delete_volume, volume.id)
        self.wait_volume(volume.id, 'available')
        return volume.id

    def _delete_volume(self, volume: str) -> None:
        self.wait_volume(volume, 'available')
        self.storage.delete_volume(volume)
        daemons.wait_for('the end of the volume', lambda: (
            self.storage.find_volume(volume) is None), poll=0.5)

    def wait_volume(self, volume: str, status: str) -> None:
        daemons.wait_for(f'volume {volume} to be {status}', lambda: (
            self.storage.get_volume(volume).status == status), poll=0.5)

    def assert_attached(self, volume: str, server: servers.Server) -> None:
        """Cinder knows of one attachment, of the server on its host."""
        self.wait_volume(volume, 'in-use')
        attachment, = self.storage.get_volume(volume).attachments
        self.assertEqual((server.id, server.host), (
            attachment['server_id'], attachment['host_name']))


class TestBootFromVolume(VolumeTestCase):
    """A server without a disk of its own."""

    def test_nothing_is_copied(self):
        volume = self.make_boot_volume()
        server = self.boot_from_volume(volume, 'small')
        self.assert_counts(server, vda=1)

        server.migrate(base.DESTINATION)
        self.assert_on(base.DESTINATION, server, volume, 2)
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)
        server.migrate(base.SOURCE)
        self.assert_on(base.SOURCE, server, volume, 3)
        server.revert()
        # The same volume was used there.
        self.assert_on(base.DESTINATION, server, volume, 4)
        self.assert_no_disks(server, base.SOURCE)

    def assert_on(self, host: str, server: servers.Server, volume: str,
                  boots: int) -> None:
        """It runs there, from the volume, and has no other disk anywhere."""
        self.assertEqual(host, server.host)
        self.assert_counts(server, vda=boots)
        self.assert_attached(volume, server)
        for name in (base.SOURCE, base.DESTINATION):
            self.assertEqual({}, server.disks(name))


class LifeVolumeTestCase(VolumeTestCase, test_life.LifeTestCase):
    """A server that boots from a volume, its other disks in the pool."""

    flavor = 'small-swap'

    def _boot(self):
        self.volume = self.make_boot_volume()
        return self.boot_from_volume(
            self.volume, self.flavor, config_drive=True)

    def assert_in_place(self):
        self.assertEqual({'disk.eph0', 'disk.swap', 'disk.config'},
                         set(self.server.disks(self.server.host)))
        self.assert_attached(self.volume, self.server)


class TestLifeVolume(test_life.LifeMixin, test_life.MoveMixin,
                     LifeVolumeTestCase):
    """The operations of an operator on such a server."""

    larger_flavor = 'large-swap'
    # A volume is the same before and after.
    given_up = ('vdb',)
    sizes = {'vda': units.Gi, 'vdb': units.Gi, 'vdc': 64 * units.Mi}
    larger_sizes = {
        'vda': units.Gi, 'vdb': 2 * units.Gi, 'vdc': 128 * units.Mi}

    def _rescue(self):
        """Nova refuses it without a device of its own for that."""
        self.assertRaises(exceptions.BadRequestException, self.act,
                          'rescue_server')
        self.act('reboot_server', 'HARD')

    def test_snapshot_rebuild_shelve(self):
        """Snapshot and rebuild are Cinder's; shelving loses other disks."""
        self.act('shelve_server', status='SHELVED_OFFLOADED')
        for host in (base.SOURCE, base.DESTINATION):
            self.assert_no_disks(self.server, host)
        self.act('unshelve_server')
        self.assert_boots(vdb=1)


class TestLiveVolume(test_life.LiveMixin, LifeVolumeTestCase):
    """A live migration, with the volume in Ceph.

    libvirt refuses it with files that it does not know to be shared.
    """

    def _set_options(self):
        self.ceph = test_ceph.get_ceph()
        super()._set_options()

    def backend(self):
        return self.ceph.backend(cloud_volumes.ROOT)

    def make_boot_volume(self):
        """Make a volume of an image in Ceph, which Cinder clones."""
        image = self.ceph.upload(
            'in-ceph', self.cloud.directory / 'guest.raw')
        self.addCleanup(self.images.delete_image, image)
        return self.make_volume(image_id=image)

    def assert_in_place(self):
        super().assert_in_place()
        self.assertEqual({f'volume-{self.volume}'},
                         self.ceph.images(cloud_ceph.POOLS['cinder']))


class TestAttached(VolumeTestCase):
    """A server with a disk in the pool, and a volume beside it."""

    def test_attach_reboot_resize_detach(self):
        volume = self.make_volume()
        path = self.volumes.path(volume)
        self.cloud.run(['mke2fs', '-q', '-F', '-t', 'ext4', str(path)])
        server = self.create_booted(flavor='small')
        server.compute.create_volume_attachment(server.id, volume)
        self.assert_attached(volume, server)
        self._reboot_soft(server)
        self.assert_counts(server, vda=2, vdb=1)

        server.resize('large', base.DESTINATION)
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=3, vdb=2)
        self.assert_attached(volume, server)
        server.revert()
        # What the guest wrote there, it wrote to its copied disk, and to the
        # volume.
        self.assert_counts(server, vda=3, vdb=3)
        self.assert_attached(volume, server)
        self.assert_no_disks(server, base.DESTINATION)
        server.resize('large', base.DESTINATION)
        server.confirm()
        self.assert_counts(server, vda=4, vdb=4)
        self.assertEqual({'vda': 2 * units.Gi, 'vdb': units.Gi},
                         server.sizes())
        self.assert_attached(volume, server)
        self.assertEqual({'disk'}, set(server.disks(base.DESTINATION)))
        self.assert_no_disks(server, base.SOURCE)

        server.compute.delete_volume_attachment(server.id, volume)
        self.wait_volume(volume, 'available')
        server.compute.reboot_server(server.id, 'HARD')
        server.wait('ACTIVE')
        self.assert_counts(server, vda=5)

    def _reboot_soft(self, server: servers.Server) -> None:
        size = base.log_size(self.cloud, base.SOURCE)
        server.compute.reboot_server(server.id, 'SOFT')
        server.wait('ACTIVE')
        said = base.read_log(self.cloud, base.SOURCE, size)
        # The guest powered off by itself: it was not done the hard way.
        self.assertIn('Instance shutdown successfully', said)
        self.assertNotIn('Failed to soft reboot', said)


class TestAttachedRaw(TestAttached):
    """The same with a disk that is no overlay."""

    options = {'DEFAULT': {'use_cow_images': False}}


class TestAttachedFile(TestAttached):
    """The same with a disk in the instance directory."""

    options = {'libvirt': {'use_storage_pools': False,
                           'vol_upload_migration_legacy': True}}
