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
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import pool

NOVA = dict(owner=64062, group=64063)


class DirectoryTestCase(test_storage_migrate.DriverTestCase):
    """A server with its disks in the instance directory.

    The destination has no storage pool, and the ids of its nova-compute are
    not those of the source.
    """

    def setUp(self):
        super().setUp()
        self.flags(use_storage_pools=False, vol_upload_migration_legacy=True,
                   group='libvirt')
        del self.dest.pools['nova-disks']
        self.dest.directories = {
            self.instances: libvirt_storage.FakeDirectory(mode=0o755, **NOVA)}
        self.dest.add_file(f'{self.instances}/{layout.NO_POOL}', **NOVA,
                           mode=0o644)
        self.before = self._state()
        self.nova = self.useFixture(
            fixtures.MockPatchObject(
                driver.LibvirtDriver, 'migrate_disk_and_power_off')).mock

    def _add_files(self):
        disks = [('disk', 'qcow2'), ('disk.eph0', 'raw'),
                 ('disk.swap', 'raw'), ('disk.config', 'raw')]
        self.disk_info.return_value = [
            {'path': self._add_file(name, name.encode() * 50),
             'type': disk_format} for name, disk_format in disks]
        self._add_file('disk.info', layout.record_bytes({
            os.path.join(self.directory, name): disk_format
            for name, disk_format in disks}))

    def _state(self):
        return (dict(self.dest.pools), sorted(self.dest.files), {
            path: vars(directory)
            for path, directory in self.dest.directories.items()})

    def _arrived(self):
        return {os.path.basename(path): file.content.read(0, units.Ki)
                for path, file in self.dest.files.items()
                if layout.ARRIVED not in path and
                not path.endswith(layout.NO_POOL)}

    def _markers(self):
        return [path for path in self.dest.files if layout.ARRIVED in path]

    def _come_back(self):
        """What Nova does as it starts after it ended in a migration."""
        os.rename(self.directory + '_resize', self.directory)

    def _assert_nothing_on_destination(self):
        self.assertEqual(self.before, self._state())


@ddt.ddt
class MigrateTestCase(DirectoryTestCase):

    def test_directory_arrives_without_the_swap_disk(self):
        self._add_files()
        formats = self.places.formats()
        # The other host makes its own, in a format of its own.
        del formats[os.path.join(self.directory, 'disk.swap')]
        result = jsonutils.loads(self._migrate())

        self.assertEqual(
            {'disk': b'disk' * 50, 'disk.eph0': b'disk.eph0' * 50,
             'disk.config': b'disk.config' * 50,
             'disk.info': layout.record_bytes(formats)},
            self._arrived())
        self.assertEqual(
            [os.path.join(self.directory, name)
             for name in ('disk', 'disk.eph0', 'disk.config')],
            [info['path'] for info in result])
        self.assertTrue(os.path.exists(self.directory + '_resize/disk'))
        self.assertFalse(os.path.exists(self.directory))
        self.nova.assert_not_called()

    def test_files_are_those_of_nova_over_there(self):
        self._add_files()
        self._migrate()
        for file, mode in [(self.dest.directories[self.directory], 0o755),
                           *((file, 0o644)
                             for file in self.dest.files.values())]:
            self.assertEqual(
                dict(NOVA, mode=mode),
                {name: getattr(file, name)
                 for name in ('owner', 'group', 'mode')})

    def test_no_pool_stays(self):
        self._add_files()
        self._migrate()
        self.assertEqual({}, self.dest.pools)
        self.assertEqual(['nova-disks'], list(self.source.pools))

    def test_kernel_and_ramdisk_come_along(self):
        self._add_files()
        self._add_file('kernel', b'a kernel')
        self._add_file('ramdisk', b'a ramdisk')
        self._migrate()
        arrived = self._arrived()
        self.assertEqual(b'a kernel', arrived['kernel'])
        self.assertEqual(b'a ramdisk', arrived['ramdisk'])

    def test_pool_that_somebody_has_of_the_directory_is_used(self):
        self.dest.add_pool('theirs', self.instances, mode=0o755, **NOVA)
        self._add_files()
        self._migrate()
        self.assertEqual(['theirs'], list(self.dest.pools))
        self.assertTrue(self.dest.pools['theirs'].active)

    def test_pool_that_another_migration_makes_meanwhile_is_used(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.FIRST_WAIT', 0))
        self.dest.call(
            'conn.storagePoolCreateXML',
            lambda: self.dest.add_pool('theirs', self.instances, mode=0o755,
                                       **NOVA))
        found = pool.within(
            self.dest.connect(), path=self.instances, name='ours',
            function=pool.Directory.of)
        self.assertEqual(
            pool.Permissions(NOVA['owner'], NOVA['group'], 0o755),
            found.permissions)
        self.assertEqual(['theirs'], list(self.dest.pools))

    def test_images_that_are_directories_are_nova_s(self):
        self.flags(images_type='ploop', group='libvirt')
        self.assertEqual(self.nova.return_value, self._migrate())
        self.assertEqual([], self.hosts.opened)

    @ddt.data((True, False), (False, True))
    @ddt.unpack
    def test_both_options_are_needed(self, upload, legacy):
        self.flags(vol_upload_migration=upload,
                   vol_upload_migration_legacy=legacy, group='libvirt')
        self._add_files()
        with mock.patch.object(
                driver.LibvirtDriver, '_is_path_shared_with') as nova:
            self.assertEqual(self.nova.return_value, self._migrate())
            self.assertEqual(
                nova.return_value,
                self.driver._is_path_shared_with('dest', self.directory))
        self.assertEqual([], self.hosts.opened)

    def test_server_without_disks_of_its_own_needs_no_pool(self):
        root = {'connection_info': {}, 'mount_device': '/dev/vda',
                'boot_index': 0}
        self.flags(use_storage_pools=True, group='libvirt')
        self._add_file('disk.info', b'{}')
        self._migrate(block_device_info={
            'block_device_mapping': [root], 'ephemerals': [],
            'root_device_name': '/dev/vda'})
        self.assertEqual({'disk.info': b'{}\n'}, self._arrived())

    def test_shared_directory_is_nova_s_and_asked_for_without_ssh(self):
        self._add_files()

        def share():
            # Whatever file this host makes, the other one has too.
            for name in os.listdir(self.instances):
                self.dest.add_file(os.path.join(self.instances, name))

        self.dest.add_directory(self.directory)
        self.dest.call('conn.storagePoolCreateXML', share, times=None)
        self.assertEqual(self.nova.return_value, self._migrate())
        self.assertTrue(
            self.driver._is_path_shared_with('dest', self.directory))
        self.assertEqual(
            {'disk', 'disk.eph0', 'disk.swap', 'disk.config', 'disk.info'},
            set(os.listdir(self.directory)))
        self.assertEqual({}, self.dest.pools)

    def test_this_host_shares_its_own_directory(self):
        self.assertTrue(
            self.driver._is_path_shared_with('source', self.directory))
        self.assertEqual([], self.hosts.opened)


class RefusalTestCase(DirectoryTestCase):

    def setUp(self):
        super().setUp()
        self._add_files()

    def test_host_that_is_not_there(self):
        self._assert_refused(
            'host gone (qemu+tls://gone/system)', 'No route to host',
            dest='gone')

    def test_instances_are_elsewhere(self):
        del self.dest.directories[self.instances]
        self.before = self._state()
        self._assert_refused(self.instances, 'instances_path')

    def test_raw_disk_to_a_host_with_nova_s_own_driver(self):
        del self.dest.files[f'{self.instances}/{layout.NO_POOL}']
        self.before = self._state()
        self._assert_refused("Nova's own driver", 'converts raw disk '
                             'disk.eph0', 'use_cow_images = False')

    def test_host_with_its_disks_in_lvm(self):
        self.dest.add_file(f'{self.instances}/{layout.GROUP_MARK}vg')
        self.before = self._state()
        self._assert_refused('has its disks in LVM', 'disk disk of the server')

    def test_raw_disk_to_a_host_that_does_not_convert_it(self):
        del self.dest.files[f'{self.instances}/{layout.NO_POOL}']
        self.flags(use_cow_images=False)
        self._migrate()

    def test_raw_disk_to_a_host_with_a_pool(self):
        del self.dest.files[f'{self.instances}/{layout.NO_POOL}']
        self.dest.add_pool('nova-disks', '/srv/disks', 64060, 64061, 0o755)
        self._migrate()

    def test_no_room(self):
        with mock.patch.object(type(self.dest), 'available', 512):
            self._assert_refused('512 bytes available', self.instances)

    def test_domain_in_the_way(self):
        self.dest.add_domain(uuids.instance)
        self._assert_refused('a domain with uuid ' + uuids.instance)

    def test_domain_with_the_copy_that_arrived(self):
        self._migrate()
        self._come_back()
        self.calls.reset_mock()
        self.dest.add_domain(uuids.instance)
        self.before = self._state()
        self._assert_refused('a domain with uuid ' + uuids.instance)

    def test_files_in_the_way(self):
        path = os.path.join(self.directory, 'disk')
        self.dest.add_file(path, b'not ours')
        self.before = self._state()
        self._assert_refused('is there already')
        self.assertEqual(b'not ours', self.dest.files[path].content.read(
            0, units.Ki))


class FailureTestCase(DirectoryTestCase):

    ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
             'cannot write to stream: No space left on device')

    def setUp(self):
        super().setUp()
        self._add_files()

    def _fail(self):
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertTrue(os.path.isdir(self.directory))
        self.assertFalse(os.path.exists(self.directory + '_resize'))
        self.assertEqual('power_on', self.calls.mock_calls[-1][0])
        return str(error)

    def test_server_runs_again_and_the_copy_is_gone(self):
        self.dest.fail('vol.upload', error=self.ERROR, nth=2)
        message = self._fail()
        for text in ('disk.info', 'host dest (qemu+tls://dest/system)',
                     'No space left on device'):
            self.assertIn(text, message)
        self._assert_nothing_on_destination()
        self.assertEqual(['nova-disks'], list(self.source.pools))

    def test_failure_to_give_up_the_claim(self):
        self.dest.fail('vol.delete', error=self.ERROR)
        self._fail()
        self._assert_nothing_on_destination()

    def test_copy_that_another_attempt_took_over_stays(self):
        self.dest.call('stream.send', lambda: self.dest.add_file(
            f'{self.directory}_{layout.CLAIM}-other'))
        self.assertIn('another attempt', self._fail())
        # Another attempt has taken over; what is there is its own to clear.
        self.assertIn('disk', self._arrived())

    def test_claim_of_another_attempt_is_respected(self):
        self.dest.call('pool.createXML', lambda: self.dest.add_file(
            f'{self.directory}_{layout.CLAIM}-other'))
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('another attempt', str(error))
        self.assertEqual([], self.calls.mock_calls)
        self.assertEqual({f'{uuids.instance}_{layout.CLAIM}-other'},
                         set(self._arrived()))

    def test_copy_of_images_goes_if_the_source_cannot_keep_its_own(self):
        images = [info for info in self.disk_info.return_value
                  if info['type'] == 'qcow2']
        self.disk_info.return_value = images
        os.unlink(os.path.join(self.directory, 'disk.config'))
        with mock.patch.object(
                local, 'keep_directory', side_effect=OSError):
            self._fail()
        self._assert_nothing_on_destination()

    def test_directory_without_a_claim_goes(self):
        self.dest.fail('pool.createXML', error=self.ERROR)
        self._assert_refused('No space left on device')

    def test_discard_that_hangs_names_the_host(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        blocked = self.dest.block('conn.storagePoolCreateXML')
        self.addCleanup(blocked.release)
        move = self.driver._new_transfer(self.places, 'dest', [], 'name')
        error = self.assertRaises(errors.HostError, move.discard)
        self.assertIn('host dest (qemu+tls://dest/system): no answer within',
                      str(error))

    def test_next_attempt_clears_what_is_left(self):
        self.dest.fail('vol.upload', error=self.ERROR, nth=2)
        self.dest.fail('vol.delete', error=self.ERROR)
        self._fail()
        self.assertTrue(any(layout.CLAIM in name for name in self._arrived()))
        self._migrate()
        self.assertEqual({'disk', 'disk.eph0', 'disk.config', 'disk.info'},
                         set(self._arrived()))


class FinishTestCase(DirectoryTestCase, test_storage_migrate.FinishMixin):

    claim = layout.Claim(uuids.instance, uuids.attempt, 'gone')

    def test_files_that_came_are_on_stable_storage(self):
        self.flags(use_cow_images=False)
        self._add_files()
        os.unlink(os.path.join(self.directory, 'disk.swap'))
        names = os.listdir(self.directory)
        self._add_file(self.claim.arrived_name, b'')
        flushed = self._flushed(self.disk_info.return_value)
        self.assertEqual(
            {self.instances, self.directory,
             *(os.path.join(self.directory, name) for name in names)},
            flushed)

    def test_file_that_is_not_there_is_an_error(self):
        self._add_files()
        self._add_file(self.claim.arrived_name, b'')
        os.unlink(os.path.join(self.directory, 'disk.eph0'))
        error = self.assertRaises(
            exception.MigrationError, self._finish,
            self.disk_info.return_value)
        self.assertIn('disk.eph0', str(error))

    def test_marker_of_a_copy_that_arrived_goes(self):
        self._add_files()
        marker = self._add_file(self.claim.arrived_name, b'')
        self.flags(vol_upload_migration_legacy=False, group='libvirt')
        self._finish(self.disk_info.return_value)
        self.assertFalse(os.path.exists(marker))
        self.assertTrue(os.path.exists(os.path.join(self.directory, 'disk')))

    def test_unfinished_copy_is_no_disk_to_evacuate_to(self):
        self.instance.host = 'gone'
        self._add_file('disk', b'unfinished')
        for name in self.claim.name, self.claim.arrived_name:
            path = self._add_file(name, b'')
            self.assertFalse(self.driver.instance_on_disk(self.instance))
            os.unlink(path)
        self.assertTrue(self.driver.instance_on_disk(self.instance))
