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

import os
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.tests.unit.virt.libvirt import test_storage_migrate_disks
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt import storage_migrate


class SharedPoolMixin:
    """Lets both hosts have the pool, and not the instance directory."""

    def share_pool(self, there='/srv/disks'):
        self.useFixture(libvirt_storage.SharedDirectories(
            self.dest, {self.pool_path: there}))

    def assert_not_shared(self, **kwargs):
        """A migration is refused before anything changes."""
        before = self._volumes()
        files = sorted(os.listdir(self.directory))
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate, **kwargs)
        for text in (
                'both hosts share storage pool nova-disks and not instance '
                f'directory {self.directory}', 'Share both or neither'):
            self.assertIn(text, str(error))
        self.assertEqual([], self.calls.mock_calls)
        self.assertEqual(before, self._volumes())
        self.assertEqual(files, sorted(os.listdir(self.directory)))
        self.assertNotIn(self.directory, self.dest.directories)


@ddt.ddt
class EnterPoolTestCase(SharedPoolMixin, test_storage_migrate.DriverTestCase):
    """A server from before the pools, which migrates to a host with one."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MockPatchObject(
            layout, 'backing_file', return_value=None))

    def add(self, name='disk', disk_format='qcow2', data=b'QFI'):
        path = self._add_file(name, data)
        self._add_record({path: disk_format})
        self.disk_info.return_value.append(
            {'path': path, 'type': disk_format, 'backing_file': 'abc'})
        return path

    def novas(self):
        return mock.patch.object(
            driver.LibvirtDriver, 'migrate_disk_and_power_off')

    def assert_stays_a_file(self):
        with self.novas() as nova:
            self._migrate()
        nova.assert_called_once()
        self._assert_nothing_on_destination()

    def volume(self, name):
        return f'{uuids.instance}_{name}'

    def test_every_overlay_goes_into_the_pool(self):
        self.add()
        self.add('disk.eph0', data=b'ephemeral')
        moved = jsonutils.loads(self._migrate())
        for name, data in (('disk', b'QFI'), ('disk.eph0', b'ephemeral')):
            content = self.dest.volume('nova-disks', self.volume(name)).content
            self.assertEqual(data, content.read(0, 100))
        self.assertEqual(
            [f'/srv/disks/{self.volume(name)}'
             for name in ('disk', 'disk.eph0')],
            [info['path'] for info in moved])

    def test_files_and_record_follow(self):
        self.add()
        self.add('disk.config', 'raw', b'config')
        self.disk_info.return_value.pop()
        self._migrate()
        record = self.dest.files[f'{self.directory}/disk.info'].content
        self.assertEqual(
            {f'/srv/disks/{self.volume("disk")}': 'qcow2',
             f'{self.directory}/disk.config': 'raw'},
            jsonutils.loads(record.read(0, record.size)))
        self.assertIn(f'{self.directory}/disk.config', self.dest.files)
        self.assertNotIn(f'{self.directory}/disk', self.dest.files)

    def test_source_keeps_its_files_for_a_revert(self):
        self.add()
        self._migrate()
        self.assertCountEqual(
            ['disk', 'disk.info'], os.listdir(self.directory + '_resize'))
        self.assertEqual([], self._volumes())

    def _confirm(self):
        self.instance.host = 'dest'
        with mock.patch.object(driver.LibvirtDriver, 'confirm_migration'):
            self.driver.confirm_migration(
                self.context, mock.sentinel.migration, self.instance, [])

    def test_pool_that_both_hosts_share_is_refused(self):
        self.share_pool()
        self.add()
        self.assert_not_shared()

    def test_volume_of_a_server_without_any_may_not_come_into_a_shared_pool(
            self):
        # Nova there may make an ephemeral disk for the new flavor.
        self.share_pool()
        self.assert_not_shared(
            block_device_info=test_storage_migrate_disks.BOOTS_FROM_VOLUME)

    def test_confirm_deletes_no_volume_that_is_not_on_record(self):
        self.add()
        self._migrate()
        volume = self.places.volume_path('disk')
        open(volume, 'w').close()
        self._confirm()
        self.assertEqual([self.volume('disk')], self._volumes())

    def test_swap_disk_is_made_anew(self):
        self.add()
        self.add('disk.swap', 'raw')
        self._migrate()
        self.assertNotIn(self.volume('disk.swap'),
                         self.dest.volume_names('nova-disks'))

    def test_raw_disk_keeps_all_of_them_files(self):
        self.add()
        self.add('disk.eph0', 'raw')
        self.assert_stays_a_file()

    @ddt.data('use_storage_pools', 'vol_upload_migration')
    def test_both_options_are_needed(self, option):
        self.flags(**{option: False, 'group': 'libvirt'})
        self.add()
        self.assert_stays_a_file()
        self.assertEqual([], self.hosts.opened)

    def test_destination_without_a_pool_gets_files(self):
        self.dest.pools.clear()
        self.add()
        with self.novas() as nova:
            self._migrate()
        nova.assert_called_once()
        self.assertNotIn(self.directory, self.dest.directories)

    def test_destination_without_a_pool_gets_files_over_libvirt(self):
        self.flags(vol_upload_migration_legacy=True, group='libvirt')
        self.dest.pools.clear()
        self.add()
        moved = jsonutils.loads(self._migrate())
        self.assertEqual([f'{self.directory}/disk'],
                         [info['path'] for info in moved])
        self.assertIn(f'{self.directory}/disk', self.dest.files)

    def test_source_that_takes_files_over_libvirt_needs_no_pool(self):
        self.flags(use_storage_pools=False, vol_upload_migration_legacy=True,
                   group='libvirt')
        self.source.pools.clear()
        self.add()
        self._migrate()
        self.assertIn(self.volume('disk'),
                      self.dest.volume_names('nova-disks'))

    def test_destination_that_wants_files_gets_files(self):
        self.flags(vol_upload_migration_legacy=True, group='libvirt')
        self.dest.add_file(f'{self.instances}/{layout.NO_POOL}', b'')
        self.add()
        moved = jsonutils.loads(self._migrate())
        self.assertEqual([f'{self.directory}/disk'],
                         [info['path'] for info in moved])
        self.assertEqual([], self.dest.volume_names('nova-disks'))

    def test_destination_that_shares_the_directory_is_novas(self):
        self.add()
        with mock.patch('nova.virt.libvirt.storage.site.Site.'
                        'shares_directory', return_value=True):
            self.assert_stays_a_file()

    def test_disk_that_nova_did_not_make_keeps_them_files(self):
        self.add()
        self.add('snapshot')
        self.assert_stays_a_file()

    def test_failure_leaves_the_files_where_they_are(self):
        path = self.add()
        self.dest.fail('stream.send', after=0)
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.assertTrue(os.path.exists(path))
        self._assert_nothing_on_destination()

    def test_servers_that_are_not_in_the_pool_are_counted(self):
        self.add()
        with mock.patch.object(storage_migrate.LOG, 'warning') as warning:
            self.driver._warn_of_files([self.instance])
        self.assertEqual(1, warning.call_args.args[1]['count'])

    def test_server_in_the_pool_is_not_counted(self):
        self._add_disk()
        with mock.patch.object(storage_migrate.LOG, 'warning') as warning:
            self.driver._warn_of_files([self.instance])
        warning.assert_not_called()


@ddt.ddt
class LeavePoolTestCase(SharedPoolMixin, test_storage_migrate.DriverTestCase):
    """A server in a pool, which migrates to a host that wants files."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MockPatchObject(
            layout, 'backing_file', return_value=None))
        self.dest.add_file(f'{self.instances}/{layout.NO_POOL}', b'')

    def add(self, name='disk', disk_format='qcow2', data=b'QFI'):
        path = os.path.join(self.pool_path, self._add_disk(name, disk_format))
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def arrived(self, name):
        content = self.dest.files[f'{self.directory}/{name}'].content
        return content.read(0, content.size)

    @ddt.data(True, False)
    def test_every_disk_becomes_a_file(self, has_pool):
        if not has_pool:
            self.dest.pools.clear()
        self.add()
        self.add('disk.eph0', data=b'ephemeral')
        moved = jsonutils.loads(self._migrate())
        self.assertEqual(b'QFI', self.arrived('disk'))
        self.assertEqual(b'ephemeral', self.arrived('disk.eph0'))
        paths = [f'{self.directory}/{name}' for name in ('disk', 'disk.eph0')]
        self.assertEqual(paths, [info['path'] for info in moved])
        self.assertEqual(dict.fromkeys(paths, 'qcow2'),
                         jsonutils.loads(self.arrived('disk.info')))
        if has_pool:
            self.assertEqual([], self.dest.volume_names('nova-disks'))

    def test_source_keeps_its_volumes_until_the_end(self):
        path = self.add()
        self._migrate()
        self.assertTrue(os.path.exists(path))
        self.assertTrue(os.path.exists(self.directory + '_resize'))

    @ddt.data('active', 'inactive', 'gone')
    def test_pool_that_both_hosts_share_is_refused(self, pool):
        self.dest.pools['nova-disks'].active = pool == 'active'
        if pool == 'gone':
            self.dest.pools.clear()
            self.share_pool(self.pool_path)
        else:
            self.share_pool()
        self.add()
        self.assert_not_shared()

    def test_raw_volume_of_an_early_release_may_leave(self):
        data = b'raw' * 100000
        self.add(disk_format='raw', data=data)
        moved = jsonutils.loads(self._migrate())
        self.assertEqual(data, self.arrived('disk'))
        self.assertEqual(
            [f'{self.directory}/disk'], list(local.heads(moved)))

    def test_failure_leaves_the_volumes_where_they_are(self):
        path = self.add()
        self.dest.fail('stream.send', after=0)
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.assertTrue(os.path.exists(path))
        self.assertNotIn(f'{self.directory}/disk', self.dest.files)

    def test_destination_without_a_pool_that_does_not_say_so_is_refused(self):
        del self.dest.files[f'{self.instances}/{layout.NO_POOL}']
        self.dest.pools.clear()
        self.add()
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate)
        self.assertIn('no storage pool', str(error))

    def test_shared_directory_does_not_change_the_place(self):
        self.add()
        with mock.patch('nova.virt.libvirt.storage.site.Site.'
                        'shares_directory', return_value=True):
            error = self.assertRaises(
                exception.InstanceFaultRollback, self._migrate)
        self.assertIn('Share both or neither', str(error))


@ddt.ddt
class TellPlaceTestCase(test_storage_migrate.DriverTestCase):
    """Other hosts see where servers have their disks on this one."""

    @ddt.data((True, True, 'default', False), (False, True, 'default', True),
              (False, False, 'default', False), (False, True, 'rbd', False))
    @ddt.unpack
    def test_files_are_wanted(self, pools, upload, image_type, wanted):
        self.flags(use_storage_pools=pools, vol_upload_migration=upload,
                   images_type=image_type, group='libvirt')
        self.assertEqual(wanted, self.driver._wants_files())

    def test_it_is_told_and_taken_back(self):
        path = os.path.join(self.instances, layout.NO_POOL)
        for mark in (layout.NO_POOL, layout.NO_POOL, None, None):
            local.tell_place(mark)
            self.assertEqual(bool(mark), os.path.exists(path))


class ArrivedFilesTestCase(test_storage_migrate.DriverTestCase):

    def test_volume_that_would_be_taken_for_the_disk_is_refused(self):
        path = self._add_file('disk', b'')
        self._add_record({path: 'qcow2'})
        claim = layout.Claim(uuids.instance, 'a', 'source')
        open(os.path.join(self.instances, claim.arrived_name), 'wb').close()
        disks = [{'path': path, 'type': 'qcow2'}]
        volume = self.places.volume_path('disk')
        open(volume, 'wb').close()
        error = self.assertRaises(
            errors.StorageError, local.adopt, self.places, disks)
        self.assertIn(volume, str(error))
        os.unlink(volume)
        local.adopt(self.places, disks)
        self.assertEqual({}, self.places.claims())
