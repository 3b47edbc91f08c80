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
from oslo_config import cfg
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import power_state
from nova.conf import storage_migrate as storage_migrate_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt_storage
from nova.virt import fake
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt import storage_migrate

SIZE = 4 * units.Mi


class DriverTestCase(test.NoDBTestCase):
    """A driver on the host 'source', whose server moves to 'dest'."""

    def setUp(self):
        super().setUp()
        self.pool_path = self.useFixture(fixtures.TempDir()).path
        self.instances = self.useFixture(fixtures.TempDir()).path
        self.flags(instances_path=self.instances, host='source')
        self.flags(
            use_storage_pools=True, vol_upload_migration=True,
            disks_pool_path=self.pool_path,
            migration_inbound_addr='source', group='libvirt')
        self.useFixture(nova_fixtures.LibvirtFixture())
        self.hosts = self.useFixture(
            libvirt_storage.LibvirtStorageFixture('source', ['dest']))
        self.source, self.dest = self.hosts['source'], self.hosts['dest']
        self.source.add_pool('nova-disks', self.pool_path)
        self.dest.add_pool('nova-disks', '/srv/disks')
        self.driver = storage_migrate.LibvirtDriver(fake.FakeVirtAPI())
        self.context = nova_context.get_admin_context()
        self.instance = self._instance()
        self.directory = os.path.join(self.instances, uuids.instance)
        os.mkdir(self.directory)
        self._patch_driver()

    def _patch_driver(self):
        self.calls = mock.Mock()
        for name in ('power_off', 'unplug_vifs', '_disconnect_volume',
                     'power_on'):
            self.useFixture(fixtures.MockPatchObject(
                self.driver, name, getattr(self.calls, name)))
        self.info = self.useFixture(fixtures.MockPatchObject(
            self.driver, 'get_info')).mock
        self.info.return_value.state = power_state.RUNNING
        self.disk_info = self.useFixture(fixtures.MockPatchObject(
            self.driver, '_get_instance_disk_info', return_value=[])).mock

    def _flavor(self, root_gb=1, ephemeral_gb=0):
        return objects.Flavor(
            root_gb=root_gb, ephemeral_gb=ephemeral_gb, swap=0,
            memory_mb=64, vcpus=1, extra_specs={})

    def _instance(self, **attributes):
        return objects.Instance(
            uuid=uuids.instance, host='source', flavor=self._flavor(),
            image_ref=uuids.image,
            system_metadata={}, **attributes)

    def _add_disk(self, name='disk', disk_format='raw', picture='A-B-'):
        volume = image.volume_name(self.instance, name)
        self.content = libvirt_storage.Content.draw(picture)
        self.source.add_volume('nova-disks', volume, self.content)
        path = image.volume_path(self.instance, name)
        with open(path, 'wb'):
            pass
        self.disk_info.return_value.append(
            {'path': path, 'type': disk_format})
        return volume

    def _migrate(self, **kwargs):
        arguments = dict(
            context=self.context, instance=self.instance, dest='dest',
            flavor=self._flavor(), network_info=mock.sentinel.network_info,
            block_device_info={'block_device_mapping': [], 'ephemerals': []},
            timeout=7, retry_interval=3)
        arguments.update(kwargs)
        return self.driver.migrate_disk_and_power_off(**arguments)

    def _assert_refused(self, *texts, **kwargs):
        """The migration is refused and nothing was done to the server."""
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate, **kwargs)
        for text in texts:
            self.assertIn(text, str(error.inner_exception))
        self.assertEqual([], self.calls.mock_calls)
        self.assertTrue(os.path.isdir(self.directory))
        self._assert_nothing_on_destination()
        return error.inner_exception

    def _assert_nothing_on_destination(self):
        self.assertEqual([], self.dest.volume_names('nova-disks'))
        self.assertEqual(['nova-disks'], list(self.dest.pools))
        self.assertNotIn(self.directory, self.dest.directories)
        self.assertEqual([], self.source.open_streams)
        self.assertEqual([], self.dest.open_streams)


@ddt.ddt
class MigrateTestCase(DriverTestCase):

    def test_disks_arrive_and_the_source_keeps_its_own(self):
        volume = self._add_disk()
        with open(os.path.join(self.directory, 'disk.info'), 'w') as record:
            record.write(jsonutils.dumps({
                os.path.join(self.pool_path, volume): 'raw',
                os.path.join(self.directory, 'disk.config'): 'raw'}))
        result = jsonutils.loads(self._migrate())

        self.assertEqual(
            self.content, self.dest.volume('nova-disks', volume).content)
        self.assertEqual(
            self.content, self.source.volume('nova-disks', volume).content)
        self.assertEqual(
            [{'path': '/srv/disks/' + volume, 'type': 'raw'}], result)
        self.assertEqual(
            [mock.call.power_off(self.instance, 7, 3),
             mock.call.unplug_vifs(
                 self.instance, mock.sentinel.network_info)],
            self.calls.mock_calls)
        self.assertFalse(os.path.exists(self.directory))
        self.assertTrue(os.path.isdir(self.directory + '_resize'))

    def test_formats_are_recorded_with_the_paths_over_there(self):
        volume = self._add_disk()
        with open(os.path.join(self.directory, 'disk.info'), 'w') as record:
            record.write(jsonutils.dumps({
                os.path.join(self.pool_path, volume): 'raw',
                os.path.join(self.directory, 'disk.config'): 'raw'}))
        self._migrate()
        file = self.dest.files[os.path.join(self.directory, 'disk.info')]
        self.assertEqual(
            {'/srv/disks/' + volume: 'raw',
             os.path.join(self.directory, 'disk.config'): 'raw'},
            jsonutils.loads(file.content.read(0, file.content.size)))

    def test_config_drive_comes_along(self):
        self._add_disk()
        drive = os.path.join(self.directory, 'disk.config')
        with open(drive, 'wb') as file:
            file.write(b'x' * 100)
        self.source.add_file(drive, b'x' * 100)
        self._migrate()
        self.assertEqual(
            b'x' * 100, self.dest.files[drive].content.read(0, 200))

    @ddt.data(True, False)
    def test_disk_is_read_directly_if_the_operator_lets_it_be(self, direct):
        self.flags(vol_upload_migration_direct_read=direct, group='libvirt')
        volume = self._add_disk(picture='AB')
        with open(os.path.join(self.pool_path, volume), 'wb') as file:
            file.write(self.content.read(0, self.content.size))

        self._migrate()

        self.assertEqual(
            self.content, self.dest.volume('nova-disks', volume).content)
        self.assertEqual(
            direct, ('vol.download', volume) not in self.source.calls)

    def test_swap_disk_is_not_copied(self):
        volume = self._add_disk()
        swap = self._add_disk('disk.swap')
        result = jsonutils.loads(self._migrate())
        self.assertIn(volume, self.dest.volume_names('nova-disks'))
        self.assertNotIn(swap, self.dest.volume_names('nova-disks'))
        self.assertEqual(['/srv/disks/' + volume],
                         [info['path'] for info in result])

    def test_volumes_of_cinder_are_disconnected(self):
        self._add_disk()
        volume = {'connection_info': mock.sentinel.connection_info,
                  'mount_device': '/dev/vdb', 'boot_index': None}
        self._migrate(block_device_info={
            'block_device_mapping': [volume], 'ephemerals': []})
        self.calls._disconnect_volume.assert_called_once_with(
            self.context, mock.sentinel.connection_info, self.instance)

    def test_claim_stays_until_the_destination_takes_over(self):
        volume = self._add_disk()
        self._migrate()
        self.assertEqual(
            {volume, f'{uuids.instance}_{peer.CLAIM}'},
            set(self.dest.volume_names('nova-disks')))

    def test_all_connections_are_closed(self):
        self._add_disk()
        self._migrate()
        for host in (self.source, self.dest):
            self.assertTrue(host.connections)
            self.assertTrue(all(connection.closed
                                for connection in host.connections))

    @mock.patch.object(driver.LibvirtDriver, 'migrate_disk_and_power_off')
    @ddt.data((True, True), (False, True), (True, False), (False, False))
    @ddt.unpack
    def test_server_with_files_takes_novas_path(self, pools, upload, nova):
        self.flags(use_storage_pools=pools, vol_upload_migration=upload,
                   group='libvirt')
        self.assertEqual(nova.return_value, self._migrate())
        nova.assert_called_once()
        self.assertEqual([], self.hosts.opened)

    def test_server_without_disks_of_its_own_needs_no_ssh(self):
        root = {'connection_info': {}, 'mount_device': '/dev/vda',
                'boot_index': 0}
        self._migrate(block_device_info={
            'block_device_mapping': [root], 'ephemerals': [],
            'root_device_name': '/dev/vda'})
        self.assertIn(self.directory + '/disk.info', self.dest.files)


class RefusalTestCase(DriverTestCase):

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()

    def test_migration_is_not_enabled(self):
        self.flags(vol_upload_migration=False, group='libvirt')
        self._assert_refused('nova-disks', 'vol_upload_migration = True')

    def test_same_host(self):
        self._assert_refused('same host', dest='source')

    def test_smaller_root_disk(self):
        error = self._assert_refused(flavor=self._flavor(root_gb=0))
        self.assertIsInstance(error, exception.ResizeError)

    def test_smaller_ephemeral_disk(self):
        self.instance.flavor.ephemeral_gb = 2
        error = self._assert_refused(flavor=self._flavor(ephemeral_gb=1))
        self.assertIsInstance(error, exception.ResizeError)

    def test_vtpm(self):
        with mock.patch('nova.virt.hardware.get_vtpm_constraint'):
            self._assert_refused('vTPM')

    def test_host_that_is_not_there(self):
        self._assert_refused(
            'host gone (qemu+tls://gone/system)', 'No route to host',
            dest='gone')

    def test_pool_that_is_not_there(self):
        del self.dest.pools['nova-disks']
        self.dest.add_pool('other', '/srv/other')
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('there is no storage pool nova-disks', str(error))
        self.assertIn('use_storage_pools', str(error))
        self.assertEqual([], self.calls.mock_calls)

    def test_pool_that_is_not_active(self):
        self.dest.pools['nova-disks'].active = False
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('virsh pool-start nova-disks', str(error))
        self.assertEqual([], self.calls.mock_calls)

    def test_no_room(self):
        with mock.patch.object(
                type(self.dest), 'available', 64 * units.Ki):
            self._assert_refused(
                'host dest', f'{64 * units.Ki} bytes available')

    def test_domain_in_the_way(self):
        self.dest.add_domain(uuids.instance)
        self._assert_refused('a domain with uuid ' + uuids.instance)

    def test_foreign_volume_in_the_way(self):
        self.dest.add_volume('nova-disks', self.volume)
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('/srv/disks/' + self.volume, str(error))
        self.assertEqual(
            [self.volume], self.dest.volume_names('nova-disks'))
        self.assertEqual([], self.calls.mock_calls)

    def test_file_in_the_way(self):
        path = os.path.join(self.directory, 'disk')
        self.dest.add_file(path, b'not ours')
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('is not empty', str(error))
        self.assertEqual([path], [name for name in self.dest.files
                                  if name.startswith(self.instances)])
        self.assertEqual([], self.dest.volume_names('nova-disks'))
        self.assertEqual([], self.calls.mock_calls)

    def test_old_libvirt(self):
        self.dest.version = 7_000_000
        self._assert_refused('7000000', '8000000')


class FailureTestCase(DriverTestCase):

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()
        self.dest.fail('stream.send', error=(
            libvirt_storage.libvirt.VIR_ERR_SYSTEM_ERROR,
            libvirt_storage.libvirt.VIR_FROM_STREAMS,
            'cannot write to stream: No space left on device'))

    def _fail(self, error_class=exception.InstanceFaultRollback):
        error = self.assertRaises(error_class, self._migrate)
        return getattr(error, 'inner_exception', error)

    def test_running_server_runs_again_and_the_copy_is_gone(self):
        error = self._fail()
        self.assertIsInstance(error, exception.MigrationError)
        for text in ('host dest (qemu+tls://dest/system)', self.volume,
                     'No space left on device'):
            self.assertIn(text, str(error))
        self.assertEqual(
            mock.call.power_on(
                self.context, self.instance, mock.sentinel.network_info,
                {'block_device_mapping': [], 'ephemerals': []}),
            self.calls.mock_calls[-1])
        self.assertTrue(os.path.isdir(self.directory))
        self.assertEqual(
            self.content,
            self.source.volume('nova-disks', self.volume).content)
        self._assert_nothing_on_destination()

    def test_stopped_server_stays_stopped(self):
        self.info.return_value.state = power_state.SHUTDOWN
        self._fail()
        self.calls.power_on.assert_not_called()
        self._assert_nothing_on_destination()

    def test_server_that_does_not_start_again_is_an_error(self):
        self.calls.power_on.side_effect = test.TestingException
        error = self._fail(exception.MigrationError)
        self.assertIn('No space left on device', str(error))
        self._assert_nothing_on_destination()

    def test_first_error_is_told_if_the_destination_can_not_be_cleared(self):
        self.dest.fail('vol.delete', error=(
            libvirt_storage.libvirt.VIR_ERR_SYSTEM_ERROR,
            libvirt_storage.libvirt.VIR_FROM_STORAGE, 'second error'))
        error = self._fail()
        self.assertIn('No space left on device', str(error))
        self.assertNotIn('second error', str(error))
        self.calls.power_on.assert_called_once()

    def test_next_attempt_clears_what_is_left(self):
        self.dest.fail('vol.delete', error=(
            libvirt_storage.libvirt.VIR_ERR_SYSTEM_ERROR,
            libvirt_storage.libvirt.VIR_FROM_STORAGE, 'second error'))
        self._fail()
        self.assertIn(self.volume, self.dest.volume_names('nova-disks'))
        self._migrate()
        self.assertEqual(
            self.content,
            self.dest.volume('nova-disks', self.volume).content)

    def test_deleted_server_is_not_started_again(self):
        self.calls.power_off.side_effect = (
            lambda *args: self.driver.delete_instance_files(self.instance))
        error = self._fail(exception.MigrationError)
        self.assertIsInstance(error, exception.MigrationError)
        self.calls.power_on.assert_not_called()
        self._assert_nothing_on_destination()
        self.assertEqual([], self.source.volume_names('nova-disks'))


class FinishTestCase(DriverTestCase):

    def _finish(self, disk_info):
        with mock.patch.object(
                driver.LibvirtDriver, 'finish_migration') as nova:
            self.driver.finish_migration(
                self.context, mock.sentinel.migration, self.instance,
                jsonutils.dumps(disk_info), mock.sentinel.network_info,
                mock.sentinel.image_meta, False, {})
        return jsonutils.loads(nova.call_args.args[3])

    def test_volumes_are_flushed_and_the_claim_ends(self):
        volume = self._add_disk()
        claim = image.volume_name(self.instance, peer.CLAIM)
        self.source.add_volume('nova-disks', claim)
        with mock.patch('os.fsync') as fsync:
            self._finish([{'path': os.path.join(self.pool_path, volume),
                           'type': 'raw'}])
        self.assertEqual(2, fsync.call_count)
        self.assertEqual([volume], self.source.volume_names('nova-disks'))

    def test_volume_that_is_not_there_is_an_error(self):
        path = image.volume_path(self.instance, 'disk')
        self.assertRaises(
            libvirt_storage.libvirt.libvirtError, self._finish,
            [{'path': path, 'type': 'raw'}])

    def test_raw_volume_is_not_converted_and_a_raw_file_is_nova_s(self):
        volume = self._add_disk()
        file = {'path': os.path.join(self.directory, 'disk'), 'type': 'raw'}
        with mock.patch('os.fsync'):
            rest = self._finish([
                {'path': os.path.join(self.pool_path, volume),
                 'type': 'raw'}, file])
        self.assertEqual([file], rest)

    def test_server_with_files_is_nova_s(self):
        file = {'path': os.path.join(self.directory, 'disk'), 'type': 'raw'}
        self.assertEqual([file], self._finish([file]))
        self.assertEqual([], self.hosts.opened)


class DeleteTestCase(DriverTestCase):

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()

    @mock.patch.object(driver.LibvirtDriver, 'confirm_migration')
    def _confirm(self, nova):
        self.driver.confirm_migration(
            self.context, mock.sentinel.migration, self.instance,
            mock.sentinel.network_info)
        nova.assert_called_once()

    def test_confirm_deletes_what_the_source_kept(self):
        self.source.add_volume('nova-disks', f'{uuids.other}_disk')
        self.instance.host = 'dest'
        self._confirm()
        self.assertEqual([f'{uuids.other}_disk'],
                         self.source.volume_names('nova-disks'))

    def test_confirm_on_the_same_host_deletes_nothing(self):
        self._confirm()
        self.assertEqual(
            [self.volume], self.source.volume_names('nova-disks'))

    def test_delete_takes_volumes_and_directory(self):
        self.assertTrue(self.driver.delete_instance_files(self.instance))
        self.assertEqual([], self.source.volume_names('nova-disks'))
        self.assertFalse(os.path.exists(self.directory))

    def test_delete_is_tried_again_if_a_volume_stays(self):
        self.source.fail('vol.delete', error=(
            libvirt_storage.libvirt.VIR_ERR_SYSTEM_ERROR,
            libvirt_storage.libvirt.VIR_FROM_STORAGE, 'busy'))
        self.assertFalse(self.driver.delete_instance_files(self.instance))
        self.assertTrue(self.driver.delete_instance_files(self.instance))


@ddt.ddt
class StartTestCase(DriverTestCase):

    @ddt.data(
        ({}, 'qemu+tls://dest/system'),
        ({'live_migration_scheme': 'tcp'}, 'qemu+tcp://dest/system'),
        ({'live_migration_uri': 'qemu+tls://%s/session'},
         'qemu+tls://dest/session'),
        ({'live_migration_scheme': 'tcp',
          'vol_upload_migration_uri': 'qemu+tls://%s/system?pkipath=/a%20b'},
         'qemu+tls://dest/system?pkipath=/a%20b'))
    @ddt.unpack
    def test_uri(self, flags, uri):
        self.flags(virt_type='qemu', group='libvirt', **flags)
        self.assertEqual(uri, self.driver._storage_migration_uri('dest'))

    def test_uri_of_an_ipv6_address(self):
        self.assertEqual('qemu+tls://[fd00::1]/system',
                         self.driver._storage_migration_uri('fd00::1'))

    def _init_host(self):
        with mock.patch.object(driver.LibvirtDriver, 'init_host') as nova, \
             mock.patch.object(storage_migrate, 'check_hooks') as check:
            self.driver.init_host('source')
        check.assert_called_once_with(driver.LibvirtDriver)
        nova.assert_called_once_with('source')

    def test_pool_is_made_as_nova_s_own(self):
        del self.source.pools['nova-disks']
        self._init_host()
        pool = self.source.pools['nova-disks']
        self.assertTrue(pool.active and pool.autostart and pool.persistent)
        directory = self.source.directories[self.pool_path]
        self.assertEqual((os.getuid(), os.getgid(), 0o755),
                         (directory.owner, directory.group, directory.mode))

    def test_pool_that_is_there_is_used(self):
        changes = len(self.source.changes)
        self._init_host()
        self.assertEqual(changes, len(self.source.changes))

    def test_pool_elsewhere_is_refused(self):
        self.flags(disks_pool_path='/elsewhere', group='libvirt')
        error = self.assertRaises(
            exception.InvalidConfiguration, self._init_host)
        self.assertIn(self.pool_path, str(error))

    def test_image_type_that_has_no_files_is_refused(self):
        self.flags(images_type='rbd', group='libvirt')
        self.assertRaises(exception.InvalidConfiguration, self._init_host)

    def test_nothing_happens_with_the_options_off(self):
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self._init_host()
        self.assertEqual([], self.hosts.opened)

    def test_hooks_are_those_of_this_nova(self):
        storage_migrate.check_hooks(driver.LibvirtDriver)

    def test_another_nova_is_refused_with_the_version_that_is_wanted(self):
        class Another:
            def init_host(self, host):
                pass

            def migrate_disk_and_power_off(self, context, instance):
                pass

        error = self.assertRaises(
            exception.InternalError, storage_migrate.check_hooks, Another)
        self.assertIn('needs Nova 34', str(error))
        self.assertIn('migrate_disk_and_power_off', str(error))


class OptionsTestCase(test.NoDBTestCase):

    def test_options_are_off_by_default(self):
        self.assertFalse(cfg.CONF.libvirt.use_storage_pools)
        self.assertFalse(cfg.CONF.libvirt.vol_upload_migration)

    def test_generator_gets_every_option(self):
        (group, options), = storage_migrate_conf.sample_opts()
        self.assertEqual('libvirt', group)
        self.assertEqual(storage_migrate_conf.ALL_OPTS, options)
