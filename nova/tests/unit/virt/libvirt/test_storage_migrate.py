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

import datetime
import itertools
import os
import re
import shutil
import threading
import time
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_config import cfg
import oslo_messaging
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova.conf import storage_migrate as storage_migrate_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.scheduler.client import report
from nova import test
from nova.tests import crashing
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt_storage
from nova.virt import fake
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import hooks
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import imagecache
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import place
from nova.virt.libvirt.storage import progress
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt import storage_migrate

CONF = cfg.CONF
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
        self.ask_there = self.useFixture(fixtures.MockPatchObject(
            storage_migrate.rpcapi, 'ComputeAPI'
        )).mock.return_value.check_instance_shared_storage
        self.source.add_pool('nova-disks', self.pool_path)
        self.dest.add_pool('nova-disks', '/srv/disks')
        self.dest.add_directory(self.instances)
        self.driver = storage_migrate.LibvirtDriver(fake.FakeVirtAPI())
        self.context = nova_context.get_admin_context()
        self.instance = self._instance()
        self.places = layout.Layout.of(self.instance)
        self.directory = self.places.directory
        os.mkdir(self.directory)
        self._patch_driver()
        self.disks = self.useFixture(fixtures.MockPatchObject(
            storage_migrate.LibvirtDriver, '_list_disks',
            return_value=[])).mock
        self.save = self.useFixture(fixtures.MockPatchObject(
            objects.Instance, 'save')).mock
        self.migration = mock.Mock(spec=objects.Migration)
        self.useFixture(fixtures.MockPatchObject(
            objects.Migration, 'get_by_id', return_value=self.migration))
        self.events = self.useFixture(fixtures.MockPatchObject(
            objects, 'InstanceActionEvent')).mock
        self.events.event_finish.side_effect = (
            exception.InstanceActionEventNotFound(action_id=1, event='off'))
        self.shares = self.useFixture(fixtures.MockPatchObject(
            objects.ShareMappingList, 'get_by_instance_uuid')).mock
        self.servers = self.useFixture(fixtures.MockPatchObject(
            objects.InstanceList, 'get_by_host', return_value=[])).mock

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

    def _add_file(self, name, data):
        """Put a file into the instance directory, which libvirt sees too."""
        path = os.path.join(self.directory, name)
        with open(path, 'wb') as file:
            file.write(data)
        self.source.add_file(path, data)
        return path

    def _flavor(self, root_gb=1, ephemeral_gb=0):
        return objects.Flavor(
            root_gb=root_gb, ephemeral_gb=ephemeral_gb, swap=0,
            memory_mb=64, vcpus=1, extra_specs={})

    def _instance(self, **attributes):
        return objects.Instance(
            id=1, uuid=uuids.instance, host='source', flavor=self._flavor(),
            old_flavor=self._flavor(), default_ephemeral_device=None,
            image_ref=uuids.image, task_state=None, progress=0,
            migration_context=objects.MigrationContext(migration_id=42),
            system_metadata={}, deleted=False, **attributes)

    def _add_disk(self, name='disk', disk_format='qcow2', picture='A-B-'):
        volume = self.places.volume_name(name)
        self.content = libvirt_storage.Content.draw(picture)
        self.source.add_volume('nova-disks', volume, self.content)
        path = self.places.volume_path(name)
        with open(path, 'wb'):
            pass
        self._add_record({path: disk_format})
        self.disk_info.return_value.append(
            {'path': path, 'type': disk_format})
        return volume

    def _add_record(self, formats):
        """Add to the record of the formats of disks."""
        layout.write_record(
            self.places.record_path, self.places.formats() | formats)

    def _volumes(self):
        """The names of the files in this host's pool."""
        return sorted(os.listdir(self.pool_path))

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
        # Nova raises the inner exception of a rollback.
        self.assertNotIsInstance(
            error.inner_exception, exception.InstanceFaultRollback)
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
                os.path.join(self.pool_path, volume): 'qcow2',
                os.path.join(self.directory, 'disk.config'): 'raw'}))
        result = jsonutils.loads(self._migrate())

        self.assertEqual(
            self.content, self.dest.volume('nova-disks', volume).content)
        self.assertEqual(
            self.content, self.source.volume('nova-disks', volume).content)
        self.assertEqual(
            [{'path': '/srv/disks/' + volume, 'type': 'qcow2'}], result)
        self.assertEqual(
            [mock.call.power_off(self.instance, 7, 3),
             mock.call.unplug_vifs(
                 self.instance, mock.sentinel.network_info)],
            self.calls.mock_calls)
        self.assertFalse(os.path.exists(self.directory))
        self.assertTrue(os.path.isdir(self.directory + '_resize'))

    def test_server_and_migration_show_that_all_is_copied(self):
        self._add_disk()
        self._add_disk('disk.eph0', picture='C---')
        self._migrate()
        self.assertEqual(100, self.instance.progress)
        self.save.assert_called_once_with(
            expected_task_state=task_states.RESIZE_MIGRATING)
        record = os.path.join(self.directory, 'disk.info')
        total = 2 * self.content.size + self.dest.files[record].content.size
        self.assertEqual(
            (total, total, 0),
            (self.migration.disk_total, self.migration.disk_processed,
             self.migration.disk_remaining))
        self.migration.save.assert_called_once_with()

    def test_formats_are_recorded_with_the_paths_over_there(self):
        volume = self._add_disk()
        with open(os.path.join(self.directory, 'disk.info'), 'w') as record:
            record.write(jsonutils.dumps({
                os.path.join(self.pool_path, volume): 'qcow2',
                os.path.join(self.directory, 'disk.config'): 'raw'}))
        self._migrate()
        file = self.dest.files[os.path.join(self.directory, 'disk.info')]
        self.assertEqual(
            {'/srv/disks/' + volume: 'qcow2',
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

    def test_bandwidth_is_one_of_the_driver(self):
        self.flags(vol_upload_migration_bandwidth=7, group='libvirt')
        with mock.patch.object(stream, 'Bandwidth', autospec=True) as limit:
            limit.return_value.limit.side_effect = lambda chunks, wait: chunks
            self.driver = storage_migrate.LibvirtDriver(fake.FakeVirtAPI())
            self._patch_driver()
            self._add_disk()
            self._migrate()
        limit.assert_called_once_with(7 * units.Mi)
        limit.return_value.limit.assert_called()

    @ddt.data('size', 'checksum')
    def test_copy_is_read_back_if_the_operator_wants_it(self, verify):
        self.flags(vol_upload_migration_verify=verify, group='libvirt')
        volume = self._add_disk()

        self._migrate()

        self.assertEqual(
            verify == 'checksum',
            ('vol.download', volume) in self.dest.calls)

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
        claim, = set(self.dest.volume_names('nova-disks')) - {volume}
        self.assertTrue(
            claim.startswith(f'{uuids.instance}_{layout.CLAIM}-'), claim)

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
        path = self._add_file('disk', b'what the guest wrote')
        self._add_record({path: 'raw'})
        self.disk_info.return_value = [{'path': path, 'type': 'raw'}]
        self.assertEqual(nova.return_value, self._migrate())
        nova.assert_called_once()
        self.assertEqual([], self.hosts.opened)

    def test_server_without_disks_of_its_own_needs_no_ssh(self):
        root = {'connection_info': {}, 'mount_device': '/dev/vda',
                'boot_index': 0}
        self._migrate(block_device_info={
            'block_device_mapping': [root], 'ephemerals': [],
            'root_device_name': '/dev/vda'})
        self.calls.power_off.assert_called_once()
        self._assert_nothing_on_destination()


@ddt.ddt
class PrecopyTestCase(DriverTestCase):
    """Disks are copied while the server runs."""

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()
        self.path = os.path.join(self.pool_path, self.volume)
        data = os.urandom(3 * units.Mi)
        with open(self.path, 'wb') as disk:
            disk.write(data)
        content = libvirt_storage.Content.of(data)
        self.source.add_volume('nova-disks', self.volume, content)
        self.calls.power_off.side_effect = self._power_off
        self.copied = None

    def _power_off(self, *_args):
        """Take note of what there is at the destination; write a bit more."""
        self.off_since = time.monotonic()
        self.copied = self.volume in self.dest.volume_names('nova-disks')
        with open(self.path, 'r+b') as disk:
            disk.write(b'the last words')

    def _assert_arrived(self):
        with open(self.path, 'rb') as disk:
            self.assertEqual(
                libvirt_storage.Content.of(disk.read()),
                self.dest.volume('nova-disks', self.volume).content)

    def _assert_logged_off(self, verb):
        """The log tells of no more seconds than since the power off."""
        longest = time.monotonic() - self.off_since
        off = re.search(rf'It {verb} off for (\d+\.\d) s',
                        self.stdlog.logger.output)
        self.assertIsNotNone(off)
        # The log has one decimal.
        self.assertLessEqual(float(off[1]), longest + 0.1)

    def _interrupt(self, function):
        """Have something done in the middle of the first copy."""
        self.dest.call('stream.send', function, nth=1)

    def test_disk_is_copied_before_the_power_off(self):
        self._migrate()
        self.assertTrue(self.copied)
        self._assert_arrived()
        # Only a block of the second upload.
        first, second, _record = [
            stream for stream in self.dest.streams if stream.way == 'upload']
        self.assertEqual((0, 3 * units.Mi), (first.offset, first.length))
        self.assertEqual((0, 64 * units.Ki), (second.offset, second.length))

    def test_progress_is_that_of_all_files(self):
        self._migrate()
        self.assertEqual(100, self.instance.progress)
        self.assertEqual(0, self.migration.disk_remaining)

    def test_time_off_is_logged(self):
        self._migrate()
        self._assert_logged_off('has been')

    def _off_events(self):
        return [name for name, arguments, _more in self.events.mock_calls
                if arguments[1:] == (self.instance.uuid, progress.OFF)]

    def test_time_off_is_an_event(self):
        self.calls.power_off.side_effect = lambda *args: self.assertEqual(
            ['event_start'], self._off_events())
        self._migrate()
        self.assertEqual(['event_start', 'event_finish'], self._off_events())

    def test_time_off_of_a_failure_is_an_event(self):
        self._interrupt(lambda: None)
        self.calls.power_off.side_effect = lambda *args: (
            self._power_off(), self.dest.fail('stream.send'))
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.assertEqual(['event_start', 'event_finish'], self._off_events())

    def test_stopped_server_was_not_off_for_its_migration(self):
        self.info.return_value.state = power_state.SHUTDOWN
        self._migrate()
        self.assertEqual(['event_finish'], self._off_events())

    def test_changes_are_told_before_the_power_off(self):
        self._migrate()
        self.assertRegex(
            self.stdlog.logger.output,
            r'The server has changed \d+ bytes of .*_disk while')
        self.assertRegex(
            self.stdlog.logger.output,
            r'so far, which takes about \d+\.\d s')

    def test_destination_has_written_it_before_the_power_off(self):
        self.migration.dest_compute = 'there'
        self.ask_there.side_effect = lambda *args, **kwargs: (
            self.assertTrue(self.volume in self.dest.volume_names(
                'nova-disks')),
            self.calls.power_off.assert_not_called())
        self._migrate()
        self.ask_there.assert_called_once_with(
            self.context, data=mock.ANY, instance=self.instance, host='there')
        self.calls.power_off.assert_called_once()
        self.assertNotIn('not written', self.stdlog.logger.output)

    def test_each_pass_is_written(self):
        def write(*_args, **_kwargs):
            with open(self.path, 'r+b') as disk:
                disk.seek(units.Mi)
                disk.write(b'changed')

        self.ask_there.side_effect = iter([None, None])
        with mock.patch.object(changes, 'FLOOR_BYTES', 0):
            self.dest.call('stream.finish', write, nth=1)
            self._migrate()
        self.assertEqual(2, self.ask_there.call_count)
        self._assert_arrived()

    def test_destination_takes_long_to_write(self):
        self.ask_there.side_effect = [
            oslo_messaging.MessagingTimeout(), False]
        self._migrate()
        self.assertEqual(2, self.ask_there.call_count)
        self.assertNotIn('not written', self.stdlog.logger.output)

    @ddt.data((oslo_messaging.MessagingTimeout(), storage_migrate.FLUSH_CALLS),
              (oslo_messaging.RemoteError('OSError', 'no sync'), 1))
    @ddt.unpack
    def test_copy_goes_on_without_that(self, error, calls):
        self.ask_there.side_effect = error
        self._migrate()
        self.assertEqual(calls, self.ask_there.call_count)
        self.assertIn('has not written yet', self.stdlog.logger.output)
        self._assert_arrived()

    def _snapshot(self, *_args, **_kwargs):
        """Let the guest write to an overlay from now on."""
        self.disks.return_value = [self._vda(f'{self.path}.snap')]

    @staticmethod
    def _vda(path):
        return mock.Mock(target_dev='vda', source_type='file',
                         source_path=path, source_name=None,
                         source_protocol=None)

    @ddt.data('ask', 'power_off')
    def test_snapshot_while_the_disks_are_copied(self, when):
        self.disks.return_value = [self._vda(self.path)]
        if when == 'ask':
            self.ask_there.side_effect = self._snapshot
        else:
            self.calls.power_off.side_effect = self._snapshot
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate)
        self.assertIn(f'disk vda is {self.path}.snap by now',
                      str(error.inner_exception))
        self.assertIn('blockcommit', str(error.inner_exception))
        self.assertEqual(when == 'power_off', self.calls.power_off.called)
        self.assertEqual(when == 'power_off', self.calls.power_on.called)
        self.assertNotIn(self.volume, self.dest.volume_names('nova-disks'))
        self.assertTrue(os.path.exists(self.path))

    def test_cancel_does_not_wait_for_that(self):
        answer = threads.native_threading().Event()
        self.addCleanup(answer.set)

        def ask(*_args, **_kwargs):
            self.driver._copies[self.instance.uuid].cancel.set()
            while not answer.is_set():
                time.sleep(0.01)

        self.ask_there.side_effect = ask
        self._assert_refused()

    def test_stopped_server_is_copied_once(self):
        self.info.return_value.state = power_state.SHUTDOWN
        self._migrate()
        self.assertFalse(self.copied)
        self._assert_arrived()
        self.ask_there.assert_not_called()

    def test_option_switches_it_off(self):
        self.flags(vol_upload_migration_precopy=False, group='libvirt')
        self._migrate()
        self.assertFalse(self.copied)
        self._assert_arrived()

    def test_disks_are_read_through_libvirt_only_if_off(self):
        self.flags(vol_upload_migration_direct_read=False, group='libvirt')
        self._migrate()
        self.assertFalse(self.copied)

    def test_failure_leaves_the_server_running(self):
        self.dest.fail('stream.send')
        self._assert_refused('injected failure')

    def test_copy_that_is_lost_is_found_before_the_power_off(self):
        def delete():
            self.dest.remove_file('/srv/disks/' + self.volume)

        self.dest.call('stream.finish', delete)
        self._assert_refused(self.volume)

    def test_failure_after_the_power_off_starts_it_again(self):
        self._interrupt(lambda: None)
        self.calls.power_off.side_effect = lambda *args: (
            self._power_off(), self.dest.fail('stream.send'))
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.calls.power_on.assert_called_once()
        self._assert_nothing_on_destination()
        self._assert_logged_off('was')

    def test_guest_that_qemu_paused_is_started_again(self):
        """Its disk may have been full, which is why it moves."""
        self.info.return_value.state = power_state.PAUSED
        self._interrupt(lambda: None)
        self.dest.fail('stream.send')
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.calls.power_on.assert_called_once()

    def test_shares_are_asked_for_while_the_server_runs(self):
        """Nobody may answer later, and the server would stay off."""
        self._interrupt(lambda: None)

        def power_off(*_args):
            self._power_off()
            self.shares.side_effect = exception.NovaException
            self.dest.fail('stream.send')

        self.calls.power_off.side_effect = power_off
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.calls.power_on.assert_called_once_with(
            self.context, self.instance, mock.ANY, mock.ANY,
            share_info=self.shares.return_value)

    def test_error_while_the_route_is_chosen(self):
        os.unlink(self.places.volume_path('disk'))
        self._add_file('disk', b'')
        self.disks.side_effect = exception.InternalError('libvirtd is down')
        self.disk_info.side_effect = self.disks.side_effect
        self._assert_refused('libvirtd is down')

    def test_server_that_shut_itself_down_is_not_started_again(self):
        def shut_down():
            self.info.return_value.state = power_state.SHUTDOWN

        self._interrupt(shut_down)
        self.calls.power_off.side_effect = lambda *args: (
            self._power_off(), self.dest.fail('stream.send'))
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.calls.power_on.assert_not_called()

    def test_end_of_nova_compute_leaves_the_server_running(self):
        copy = self.driver._copies

        def end():
            self.driver._stop_copy(copy[self.instance.uuid], 'it ended')

        self._interrupt(end)
        self.dest.slow('stream.send', 0.5)
        self._assert_refused('it ended')

    def test_deletion_ends_the_copy(self):
        def delete():
            copy = self.driver._copies[self.instance.uuid]
            copy.deleted = True
            self.driver._stop_copy(copy, 'the server was deleted')

        self._interrupt(delete)
        self.dest.slow('stream.send', 0.5)
        error = self.assertRaises(exception.MigrationError, self._migrate)
        self.assertIn('the server was deleted', str(error))
        self.assertEqual([], self.calls.mock_calls)
        self._assert_nothing_on_destination()


class RefusalTestCase(DriverTestCase):

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()

    def test_migration_is_not_enabled(self):
        self.flags(vol_upload_migration=False, group='libvirt')
        self._assert_refused('nova-disks', 'vol_upload_migration = True')

    def test_disk_that_an_earlier_resize_kept(self):
        original = self.places.kept_path(self.places.volume_path('disk'))
        with open(original, 'wb'):
            pass
        for dest in 'dest', 'source':
            self._assert_refused(
                original, self.places.volume_path('disk'), dest=dest)

    def test_second_attempt_while_the_first_copies(self):
        errors = []

        def migrate_again(*args):
            errors.append(self.assertRaises(
                exception.InstanceFaultRollback, self._migrate))

        self.calls.unplug_vifs.side_effect = migrate_again
        self._migrate()
        self.assertIn('being copied already', str(errors[0].inner_exception))
        self.assertIn(self.volume, self.dest.volume_names('nova-disks'))

    def test_smaller_root_disk(self):
        error = self._assert_refused(flavor=self._flavor(root_gb=0))
        self.assertIsInstance(error, exception.ResizeError)

    def test_smaller_ephemeral_disk(self):
        self.instance.flavor.ephemeral_gb = 2
        error = self._assert_refused(flavor=self._flavor(ephemeral_gb=1))
        self.assertIsInstance(error, exception.ResizeError)

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
        with open(self.places.volume_path('disk'), 'wb') as disk:
            disk.write(b'x' * 128 * units.Ki)
        with mock.patch.object(
                type(self.dest), 'available', 64 * units.Ki):
            self._assert_refused(
                'host dest', f'{64 * units.Ki} bytes available')

    def test_domain_in_the_way(self):
        self.dest.add_domain(uuids.instance)
        self._assert_refused('a domain with uuid ' + uuids.instance)

    def test_foreign_volume_in_the_way(self):
        self.dest.add_volume('nova-disks', self.volume, b'not ours')
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
        self.assertIn('is there already', str(error))
        self.assertEqual([path], [name for name in self.dest.files
                                  if name.startswith(self.instances)])
        self.assertEqual([], self.dest.volume_names('nova-disks'))
        self.assertEqual([], self.calls.mock_calls)

    def test_old_libvirt(self):
        self.dest.version = 7_000_000
        self._assert_refused('7.0.0', '8.0.0')


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
                {'block_device_mapping': [], 'ephemerals': []},
                share_info=self.shares.return_value),
            self.calls.mock_calls[-1])
        self.assertTrue(os.path.isdir(self.directory))
        self.assertEqual(
            self.content,
            self.source.volume('nova-disks', self.volume).content)
        self._assert_nothing_on_destination()

    def test_progress_is_none_after_a_failure(self):
        self.instance.progress = 30
        self._fail()
        self.assertEqual(0, self.instance.progress)

    def test_copy_that_differs_is_deleted(self):
        self.flags(vol_upload_migration_verify='checksum', group='libvirt')
        self.dest.faults.clear()
        self.dest.call('vol.download', lambda: self.dest.volume(
            'nova-disks', self.volume).content.write(0, b'x'))
        self.assertIn('differs', str(self._fail()))
        self.calls.power_on.assert_called_once()
        self._assert_nothing_on_destination()

    def test_destination_that_hangs_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self.dest.faults.clear()
        blocked = self.dest.block('stream.send')
        self.addCleanup(blocked.release)
        self.assertIn('nothing moved for 1 seconds', str(self._fail()))
        self.calls.power_on.assert_called_once()

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

    def _fail_and_leave(self):
        self.dest.fail('vol.delete', error=(
            libvirt_storage.libvirt.VIR_ERR_SYSTEM_ERROR,
            libvirt_storage.libvirt.VIR_FROM_STORAGE, 'second error'))
        self._fail()
        self.assertIn(self.volume, self.dest.volume_names('nova-disks'))

    @mock.patch.object(driver.LibvirtDriver, 'get_available_resource')
    def test_what_is_left_is_deleted_when_that_can_be(self, nova):
        self._fail_and_leave()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.leftovers.FIRST_WAIT', 0))
        self.dest.disconnect()
        self.driver._leftovers.retry()
        self.dest.reconnect()
        self.assertIn(self.volume, self.dest.volume_names('nova-disks'))

        self.assertEqual(
            nova.return_value, self.driver.get_available_resource('node'))

        self.assertTrue(libvirt_storage.wait_for(
            lambda: not self.driver._leftovers))
        self._assert_nothing_on_destination()

    def test_what_is_left_is_not_taken_for_the_next_attempt_s(self):
        self._fail_and_leave()
        self._migrate()
        before = self.dest.volume_names('nova-disks')

        self.driver._leftovers.retry()

        self.assertEqual(before, self.dest.volume_names('nova-disks'))
        self.assertFalse(self.driver._leftovers)

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
        self.assertEqual([], self._volumes())


class ShutdownTestCase(DriverTestCase):
    """What nova-compute's end does to a copy that is under way."""

    def setUp(self):
        super().setUp()
        self._add_disk(picture='A' * 64)
        self.blocked = self.dest.block('stream.send')
        self.addCleanup(self.blocked.release)
        self.cleanup = self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, 'cleanup_host')).mock

    def _shut_down_while_copying(self):
        """Return the migration's error, and the order of what happened."""
        order = []
        self.calls.power_on.side_effect = (
            lambda *args, **kwargs: order.append('on'))
        self.cleanup.side_effect = lambda host: order.append('cleanup')
        errors = []

        def migrate():
            try:
                self._migrate()
            except Exception as error:
                errors.append(error)

        migration = threading.Thread(target=migrate)
        migration.start()
        self.assertTrue(self.blocked.wait_reached())
        started = time.monotonic()
        self.driver.cleanup_host('source')
        self.assertLess(time.monotonic() - started, 5)
        migration.join(5)
        return errors[0], order

    def test_server_runs_again_before_nova_cleans_up(self):
        error, order = self._shut_down_while_copying()
        self.assertIsInstance(error, exception.InstanceFaultRollback)
        self.assertIn('nova-compute on source ended', str(error))
        self.assertEqual(['on', 'cleanup'], order)

    def test_server_that_was_off_stays_off(self):
        self.info.return_value.state = power_state.SHUTDOWN
        error, order = self._shut_down_while_copying()
        self.assertIsInstance(error, exception.InstanceFaultRollback)
        self.assertEqual(['cleanup'], order)

    def test_nova_cleans_up_when_nothing_is_copied(self):
        self.driver.cleanup_host('source')
        self.cleanup.assert_called_once_with('source')


class CrashMixin:
    """Starts nova-compute, which ended in a migration."""

    @mock.patch.object(report, 'report_client_singleton', autospec=True)
    @mock.patch.object(storage_migrate, 'check_hooks', mock.Mock())
    @mock.patch.object(driver.LibvirtDriver, 'init_host', mock.Mock())
    @mock.patch.object(objects.Migration, 'get_by_id_and_instance',
                       autospec=True)
    def _start(self, task_state, find, placement):
        """Start with a server in a migration, as nova-compute ended in it."""
        self.instance.vm_state = vm_states.ACTIVE
        self.instance.task_state = task_state
        self.migration.configure_mock(uuid=uuids.migration, status='before')
        if self.instance.migration_context:
            find.return_value = self.migration
        self.servers.return_value = [self.instance]
        self.driver.init_host('source')
        for call in self.servers.call_args_list:
            self.assertEqual('source', call.args[1])
        for call in find.call_args_list:
            self.assertEqual((42, uuids.instance), call.args[1:])
        self.allocations = placement.return_value
        return self.allocations.move_allocations

    def _assert_state(self, vm_state, task_state, migration):
        self.assertEqual(
            (vm_state, task_state, migration),
            (self.instance.vm_state, self.instance.task_state,
             self.migration.status))


@ddt.ddt
class CrashTestCase(CrashMixin, DriverTestCase):

    @mock.patch.object(driver.LibvirtDriver, 'finish_revert_migration')
    @ddt.data(
        # Nova finds, as it starts, that it ended before the power off,
        (task_states.RESIZE_MIGRATING, power_state.RUNNING, False),
        (task_states.RESIZE_MIGRATING, power_state.PAUSED, False),
        # after it,
        (task_states.RESIZE_MIGRATING, power_state.SHUTDOWN, True),
        # or not at all.
        (task_states.RESIZE_REVERTING, power_state.SHUTDOWN, True),
        (task_states.RESIZE_REVERTING, power_state.RUNNING, True))
    @ddt.unpack
    def test_server_that_runs_is_not_started(
            self, task_state, state, starts, nova):
        self.instance.task_state = task_state
        self.info.return_value.state = state
        self.driver.finish_revert_migration(
            self.context, self.instance, mock.sentinel.network_info,
            mock.sentinel.migration)
        self.assertEqual(starts, nova.called)

    @mock.patch.object(driver.LibvirtDriver, 'finish_revert_migration')
    def test_server_without_a_domain_is_started(self, nova):
        self.instance.task_state = task_states.RESIZE_MIGRATING
        self.info.side_effect = exception.InstanceNotFound(
            instance_id=uuids.instance)
        self.driver.finish_revert_migration(
            self.context, self.instance, mock.sentinel.network_info,
            mock.sentinel.migration)
        nova.assert_called_once()

    @mock.patch.object(driver.LibvirtDriver, '_finish_revert_migration_vtpm')
    def test_server_that_has_no_old_flavor_yet_is_put_back(self, nova):
        self.instance.old_flavor = None
        self.driver._finish_revert_migration_vtpm(self.context, self.instance)
        nova.assert_not_called()
        self.instance.old_flavor = self.instance.flavor
        self.driver._finish_revert_migration_vtpm(self.context, self.instance)
        nova.assert_called_once_with(self.context, self.instance)

    def test_copy_fails_and_the_allocation_is_the_server_s_again(self):
        move_allocations = self._start(task_states.RESIZE_MIGRATING)
        self._assert_state(
            vm_states.ACTIVE, task_states.RESIZE_MIGRATING, 'error')
        self.migration.save.assert_called_once_with()
        move_allocations.assert_called_once_with(
            mock.ANY, uuids.migration, uuids.instance)

    def test_migration_that_was_not_finished_can_be_reverted(self):
        move_allocations = self._start(task_states.RESIZE_FINISH)
        self._assert_state(vm_states.RESIZED, None, 'finished')
        self.migration.save.assert_called_once_with()
        self.save.assert_called_once_with(
            expected_task_state=task_states.RESIZE_FINISH)
        move_allocations.assert_not_called()

    @ddt.data(None, task_states.RESIZE_MIGRATED, task_states.RESIZE_PREP)
    def test_other_servers_are_left_alone(self, task_state):
        self._start(task_state)
        self._assert_state(vm_states.ACTIVE, task_state, 'before')

    @ddt.data(task_states.RESIZE_MIGRATING, task_states.RESIZE_FINISH)
    def test_servers_are_nova_s_with_the_option_off(self, task_state):
        self.flags(vol_upload_migration=False, group='libvirt')
        self._start(task_state)
        self._assert_state(vm_states.ACTIVE, task_state, 'before')

    def test_what_can_not_be_put_right_does_not_end_the_start(self):
        self.instance.migration_context = None
        self._start(task_states.RESIZE_FINISH)
        self._assert_state(
            vm_states.ACTIVE, task_states.RESIZE_FINISH, 'before')


class FinishMixin:
    """Finishes a migration on this host."""

    def _finish(self, disk_info, **kwargs):
        migration = mock.Mock(source_compute='gone')
        with (mock.patch.object(
                driver.LibvirtDriver, 'finish_migration') as nova,
              mock.patch.object(
                  driver.LibvirtDriver, '_disk_raw_to_qcow2') as self.to_image
              ):
            self.driver.finish_migration(
                self.context, migration, self.instance,
                jsonutils.dumps(disk_info), mock.sentinel.network_info,
                mock.sentinel.image_meta, False, {}, **kwargs)
        return jsonutils.loads(nova.call_args.args[3])

    def _claim(self, source='gone', directory=None):
        """Make the claim of an attempt to copy the server to here."""
        claim = layout.Claim(uuids.instance, 'attempt', source)
        path = os.path.join(directory or self.pool_path, claim.name)
        with open(path, 'w'):
            pass
        return path

    def _flushed(self, disk_info):
        """The paths that a server is flushed at before it starts."""
        flushed = set()
        fsync = os.fsync

        def note(descriptor):
            flushed.add(os.readlink(f'/proc/self/fd/{descriptor}'))
            fsync(descriptor)

        with mock.patch('os.fsync', note):
            self._finish(disk_info)
        return flushed


class FinishTestCase(FinishMixin, DriverTestCase):

    def test_volumes_are_flushed_and_the_claim_ends(self):
        volume = self._add_disk(disk_format='raw')
        self._claim()
        disk = os.path.join(self.pool_path, volume)
        drive = self._add_file('disk.config', b'drive')
        self.assertEqual(
            {disk, self.pool_path, drive, self.places.record_path,
             self.directory, self.instances},
            self._flushed([{'path': disk, 'type': 'raw'}]))
        self.assertEqual([volume], self._volumes())

    def test_progress_ends(self):
        self.instance.progress = 100
        self._finish([{'path': 'disk', 'type': 'qcow2'}])
        self.assertEqual(0, self.instance.progress)

    def test_time_off_ends_when_the_server_runs(self):
        event = self.events.event_finish.return_value
        event.start_time = datetime.datetime(2026, 1, 1, 12, 0, 0)
        event.finish_time = datetime.datetime(2026, 1, 1, 12, 0, 2, 500000)
        self.events.event_finish.side_effect = None
        volume = self._add_disk(disk_format='raw')
        disks = [{'path': os.path.join(self.pool_path, volume),
                  'type': 'raw'}]
        self._finish(disks, power_on=False)
        self.events.event_finish.assert_not_called()
        self._finish(disks)
        self.events.event_finish.assert_called_once_with(
            self.context, self.instance.uuid, progress.OFF)
        self.assertIn('The server runs on this host. It was off for 2.5 s',
                      self.stdlog.logger.output)

    def test_volume_that_is_not_there_is_an_error(self):
        path = self.places.volume_path('disk')
        error = self.assertRaises(
            exception.MigrationError, self._finish,
            [{'path': path, 'type': 'raw'}])
        self.assertIn(path, str(error))

    def test_raw_volume_is_not_converted_and_a_raw_file_is(self):
        volume = self._add_disk(disk_format='raw')
        path = os.path.join(self.pool_path, volume)
        file, config, swap = (
            {'path': os.path.join(self.directory, name), 'type': 'raw'}
            for name in ('disk', 'disk.config', 'disk.swap'))
        for name in 'disk', 'disk.config':
            self._add_file(name, b'data')
        with mock.patch('os.fsync'):
            rest = self._finish([
                {'path': path, 'type': 'raw'}, file, config, swap])
        # Nova's code does not convert it again.
        self.assertEqual([dict(file, type='qcow2'), config, swap], rest)
        self.to_image.assert_called_once_with(file['path'])
        self.assertEqual({path: 'raw', file['path']: 'qcow2'},
                         self.places.formats())

    def test_raw_file_is_nova_s_with_both_options_off(self):
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        file = {'path': os.path.join(self.directory, 'disk'), 'type': 'raw'}
        self.assertEqual([file], self._finish([file]))
        self.to_image.assert_not_called()

    @mock.patch.object(driver.LibvirtDriver, '_create_image')
    @mock.patch('nova.virt.disk.api.extend')
    def _grow(self, count, extend, nova):
        self.driver._create_image(
            self.context, self.instance, {}, block_device_info={
                'ephemerals': [{'size': 1}] * count})
        nova.assert_called_once()
        return [(call.args[0].path, call.args[1])
                for call in extend.call_args_list]

    def test_only_ephemeral_disk_grows_with_a_resize(self):
        self._add_disk(disk_format='qcow2')
        self._add_disk('disk.eph0', 'qcow2')
        self.instance.flavor = self._flavor(ephemeral_gb=2)
        self.instance.task_state = None
        self.assertEqual([], self._grow(1))
        self.instance.task_state = task_states.RESIZE_FINISH
        self.assertEqual(
            [(self.places.volume_path('disk.eph0'), 2 * units.Gi)],
            self._grow(1))
        self.assertEqual([], self._grow(2))

    def test_ephemeral_file_is_left_to_nova(self):
        self.instance.flavor = self._flavor(ephemeral_gb=2)
        self.instance.task_state = task_states.RESIZE_FINISH
        self.assertEqual([], self._grow(1))

    def test_server_with_files_is_nova_s(self):
        file = {'path': os.path.join(self.directory, 'disk'), 'type': 'qcow2'}
        self.assertEqual([file], self._finish([file]))
        self.assertEqual([], self.hosts.opened)


class SameHostMixin:
    """A resize on the same host, whose files are real ones here."""

    OLD = {'disk': 'old', 'disk.local': 'old local', 'disk.swap': 'old swap'}

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration=False, group='libvirt')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.utils.get_fs_info',
            lambda path: {'free': SIZE}))
        for name, content in self.OLD.items():
            self._write(self.places.volume_path(name), content)
        self._write(self._file('disk.config'), 'old config')
        self._write(self._file('disk.info'), jsonutils.dumps({
            self.places.volume_path(name): 'raw'
            for name in self.OLD}))
        self.disk_info.return_value = [
            {'path': path, 'type': 'raw', 'disk_size': 1024}
            for path in [*(self.places.volume_path(name)
                           for name in self.OLD),
                         self._file('disk.config')]]
        self.before = self._state()
        self.migration.configure_mock(
            source_compute='source', dest_compute='source')

    def _file(self, name):
        return os.path.join(self.directory, name)

    def _write(self, path, content):
        with open(path, 'w') as file:
            file.write(content)

    def _state(self):
        """What is in the pool and the instance directories, by path."""
        state = {}
        for root in self.pool_path, self.instances:
            for directory, _, names in os.walk(root):
                for name in names:
                    path = os.path.join(directory, name)
                    with open(path) as file:
                        state[path] = file.read()
        return state

    def _resize(self):
        return jsonutils.loads(self._migrate(dest='source'))

    def _change_copies(self):
        """Write as the resized server would, which got a new disk."""
        for name in (*self.OLD, 'disk.eph0'):
            self._write(self.places.volume_path(name), 'new')
        self._write(self._file('disk.info'), '{}')

    def _revert(self):
        with mock.patch.object(
                driver.LibvirtDriver, 'finish_revert_migration') as nova:
            self.driver.finish_revert_migration(
                self.context, self.instance, mock.sentinel.network_info,
                self.migration, None, False)
        nova.assert_called_once_with(
            self.context, self.instance, mock.sentinel.network_info,
            self.migration, None, False)

    def _fail_to_copy(self, name, error=None):
        """Make the copy of one file fail half way."""
        execute = processutils.execute

        def fail(*command, **kwargs):
            if command[-1].endswith(name):
                self._write(command[-1], 'half')
                raise error or processutils.ProcessExecutionError('no room')
            return execute(*command, **kwargs)

        self.useFixture(fixtures.MonkeyPatch(
            'oslo_concurrency.processutils.execute', fail))


class SameHostTestCase(SameHostMixin, DriverTestCase):

    def test_kernel_that_came_with_a_migration_stays(self):
        """Glance may have lost it."""
        self._write(self._file('kernel'), 'kernel')
        self._resize()
        self.assertEqual('kernel', self._state()[self._file('kernel')])

    def test_record_is_copied_when_all_disks_are(self):
        self._fail_to_copy('disk.config')
        # nova-compute ends there.
        with mock.patch.object(self.driver, '_restore'):
            self.assertRaises(exception.InstanceFaultRollback, self._resize)
        self.assertFalse(os.path.exists(self.places.record_path))
        self.assertTrue(local.is_half_copied(self.places))
        local.restore(self.places)
        self.assertEqual(self.before, self._state())

    def test_originals_are_kept_and_copies_are_in_their_place(self):
        info = self._resize()
        copies = {path: content for path, content in self.before.items()
                  if not path.endswith('disk.swap')}
        kept_ones = {self.places.kept_path(path): content
                     for path, content in self.before.items()}
        self.assertEqual({**copies, **kept_ones}, self._state())
        self.assertEqual(
            [self.places.volume_path('disk'),
             self.places.volume_path('disk.local'),
             self._file('disk.config')], [disk['path'] for disk in info])
        self.assertEqual(
            [mock.call.power_off(self.instance, 7, 3),
             mock.call.unplug_vifs(
                 self.instance, mock.sentinel.network_info)],
            self.calls.mock_calls)
        self.assertEqual([], self.hosts.opened)

    def test_holes_stay_holes(self):
        path = self.places.volume_path('disk')
        os.truncate(path, SIZE)
        self._resize()
        status = os.stat(path)
        self.assertEqual(SIZE, status.st_size)
        self.assertLess(status.st_blocks * 512, SIZE)

    def test_revert_brings_back_what_was(self):
        self._resize()
        self._change_copies()
        self._revert()
        self.assertEqual(self.before, self._state())

    def _crash_in_this_thread(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage_migrate._native',
            lambda function, *args: function(*args)))

    def test_revert_may_end_anywhere_and_begin_again(self):
        self._crash_in_this_thread()
        for name in 'replace', 'unlink', 'rename':
            for nth in itertools.count():
                self._resize()
                self._change_copies()
                crashed = crashing.crashes(name, nth, self._revert)
                self._nova_reverts()
                self.assertEqual(self.before, self._state())
                if not crashed:
                    break
            self.assertGreater(nth, 0, name)

    def _nova_reverts(self):
        self._revert()
        if os.path.exists(self.directory + '_resize'):
            shutil.rmtree(self.directory, ignore_errors=True)
            os.rename(self.directory + '_resize', self.directory)

    def test_nova_compute_may_end_anywhere(self):
        self._crash_in_this_thread()
        for nth in itertools.count():
            crashed = crashing.crashes('rename', nth, self._resize)
            self._nova_reverts()
            self.assertEqual(self.before, self._state())
            if not crashed:
                break
        self.assertGreater(nth, 1)

    def test_failed_copy_puts_the_server_back(self):
        self._fail_to_copy('_disk.local')
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._resize)
        self.assertIn('no room', str(error.inner_exception))
        self.assertEqual(self.before, self._state())
        self.calls.power_on.assert_called_once()

    def test_server_does_not_start_from_half_a_copy(self):
        self._fail_to_copy('_disk.local', OSError('no room ' + 'x' * 300))
        with mock.patch('os.replace', side_effect=OSError('gone')):
            error = self.assertRaises(exception.MigrationError, self._resize)
        self.assertIn('no room', str(error))
        self.assertIn('could not be put back: gone', str(error))
        self.assertLessEqual(len(str(error)), 255)
        self.calls.power_on.assert_not_called()
        self._nova_reverts()
        self.assertEqual(self.before, self._state())

    def test_no_room_is_found_out_before_anything_happens(self):
        self.disk_info.return_value[0]['disk_size'] = SIZE
        self._assert_refused(f'{SIZE} bytes available', dest='source')
        self.assertEqual(self.before, self._state())

    def test_confirm_deletes_what_was_kept_and_no_more(self):
        copies = [self.places.volume_name(name)
                  for name in ('disk', 'disk.local')]
        self._resize()
        with mock.patch.object(driver.LibvirtDriver, 'confirm_migration'):
            self.driver.confirm_migration(
                self.context, mock.sentinel.migration, self.instance,
                mock.sentinel.network_info)
        self.assertEqual(copies, self._volumes())

    def test_delete_clears_both(self):
        self._resize()
        self.driver.delete_instance_files(self.instance)
        self.assertEqual([], self._volumes())

    def test_delete_ends_the_copy(self):
        jobs = mock.Mock()
        self.driver.job_tracker = jobs
        self.calls.unplug_vifs.side_effect = (
            lambda *args: self.driver.delete_instance_files(self.instance))
        self.assertRaises(exception.MigrationError, self._resize)
        jobs.terminate_jobs.assert_called_with(self.instance)
        self.calls.power_on.assert_not_called()

    @mock.patch.object(driver.LibvirtDriver, 'migrate_disk_and_power_off')
    def test_server_without_volumes_is_nova_s(self, nova):
        for name in self.OLD:
            os.unlink(self.places.volume_path(name))
        self.assertEqual(nova.return_value, self._migrate(dest='source'))


class DeleteTestCase(DriverTestCase):

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()
        self.delete_secret = self.useFixture(fixtures.MockPatchObject(
            self.driver._host, 'delete_secret')).mock

    @mock.patch.object(driver.LibvirtDriver, 'confirm_migration')
    def _confirm(self, nova):
        self.driver.confirm_migration(
            self.context, mock.sentinel.migration, self.instance,
            mock.sentinel.network_info)
        nova.assert_called_once()

    def test_confirm_deletes_what_the_source_kept(self):
        with open(os.path.join(
                self.pool_path, f'{uuids.other}_disk'), 'w'):
            pass
        self.instance.host = 'dest'
        os.rename(self.directory, self.directory + '_resize')
        self._confirm()
        self.assertEqual([f'{uuids.other}_disk'], self._volumes())

    def test_confirm_on_shared_storage_deletes_nothing(self):
        self.instance.host = 'dest'
        self._confirm()
        self.assertEqual([self.volume], self._volumes())

    def test_confirm_on_the_same_host_deletes_nothing(self):
        self._confirm()
        self.assertEqual([self.volume], self._volumes())
        self.delete_secret.assert_not_called()

    def test_confirm_deletes_the_secret_of_a_vtpm(self):
        self.instance.host = 'dest'
        with mock.patch.object(hooks, 'keeps_tpm_secret', return_value=True):
            self._confirm()
        self.delete_secret.assert_called_once_with('vtpm', self.instance.uuid)

    def test_confirm_does_not_ask_a_nova_that_knows_no_such_secret(self):
        self.instance.host = 'dest'
        with mock.patch.object(hooks, 'keeps_tpm_secret', return_value=False):
            self._confirm()
        self.delete_secret.assert_not_called()

    def test_confirm_leaves_it_where_switched_off(self):
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self.instance.host = 'dest'
        self._confirm()
        self.delete_secret.assert_not_called()

    def test_delete_takes_volumes_and_directory(self):
        self.assertTrue(self.driver.delete_instance_files(self.instance))
        self.assertEqual([], self._volumes())
        self.assertFalse(os.path.exists(self.directory))

    def _delete_fails(self):
        return mock.patch('os.unlink', side_effect=OSError('read-only'))

    def test_rebuild_does_not_go_on_with_the_old_disk(self):
        self.instance.task_state = 'rebuilding'
        with self._delete_fails():
            self.assertRaises(
                OSError, self.driver.delete_instance_files, self.instance)

    def test_delete_is_tried_again_if_a_volume_stays(self):
        with self._delete_fails():
            self.assertFalse(self.driver.delete_instance_files(self.instance))
        self.assertTrue(self.driver.delete_instance_files(self.instance))


# The states of servers whose root disks Nova makes of snapshots.
FROM_SNAPSHOTS = (
    {'vm_state': vm_states.SHELVED_OFFLOADED},
    {'vm_state': vm_states.ACTIVE, 'task_state': task_states.RESIZE_FINISH})


@ddt.ddt
class SnapshotTestCase(DriverTestCase):
    """The root disk was made of a snapshot of the server."""

    def setUp(self):
        super().setUp()
        self.rebase = self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, '_rebase_with_qemu_img')).mock
        self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, '_try_fetch_image_cache'))
        self.instance.system_metadata['image_base_image_ref'] = uuids.base

    def _create(self, cow, **attributes):
        for name, value in attributes.items():
            setattr(self.instance, name, value)
        backend = image.Backend(cow).by_name(self.instance, 'disk')
        self.driver._rebase_original_qcow2_image(
            self.context, self.instance, backend)

    @ddt.data(*FROM_SNAPSHOTS)
    def test_full_image_gets_no_base(self, attributes):
        self._create(False, **attributes)
        self.rebase.assert_not_called()

    @ddt.data(*FROM_SNAPSHOTS)
    def test_overlay_gets_that_of_its_image(self, attributes):
        self._create(True, **attributes)
        self.rebase.assert_called_once()


class HardRebootTestCase(DriverTestCase):
    """Nova makes disks that are missing when it starts a server."""

    def setUp(self):
        super().setUp()
        self.instance.update({'kernel_id': '', 'trusted_certs': None,
                              'vm_state': 'active', 'os_type': None,
                              'migration_context': None})

    def _make_missing(self, *disk_info):
        self.driver._create_images_and_backing(
            self.context, self.instance, self.directory, list(disk_info))

    def _info(self, path, backing_file=''):
        return {'path': path, 'type': 'raw', 'virt_disk_size': SIZE,
                'backing_file': backing_file}

    @mock.patch('nova.virt.libvirt.utils.create_image')
    def test_volume_that_is_there_is_left_alone(self, create):
        path = os.path.join(self.pool_path, self._add_disk())
        self._make_missing(self._info(path))
        create.assert_not_called()

    @mock.patch('nova.virt.libvirt.utils.create_image')
    def test_missing_disks_are_made_where_they_belong(self, create):
        volume = self.places.volume_path('disk.swap')
        file = os.path.join(self.directory, 'disk.config')
        self._make_missing(self._info(volume), self._info(file))
        self.assertEqual([mock.call(volume, 'raw', SIZE),
                          mock.call(file, 'raw', SIZE)], create.mock_calls)

    def test_missing_base_image_is_fetched_for_the_volume(self):
        path = os.path.join(self.pool_path, self._add_disk())
        with mock.patch.object(
                self.driver, '_try_fetch_image_cache') as fetch:
            self._make_missing(self._info(path, backing_file='/base/abc'))
        disk, _, _, base = fetch.call_args.args[:4]
        self.assertEqual((path, 'abc'), (disk.path, base))

    @mock.patch.object(driver.LibvirtDriver, '_create_images_and_backing')
    def test_server_with_files_is_nova_s(self, nova):
        info = self._info(os.path.join(self.directory, 'disk'))
        self._make_missing(info)
        nova.assert_called_once_with(
            self.context, self.instance, self.directory, [info], None)


class SharedStorageTestCase(DriverTestCase):
    """Nova asks before it deletes, and when it evacuates."""

    def _record(self, *paths):
        layout.write_record(
            self.places.record_path, {path: 'raw' for path in paths})

    def _on_disk(self):
        return self.driver.instance_on_disk(self.instance)

    def _volume_path(self):
        return os.path.join(self.pool_path, self._add_disk())

    def test_shared_disks_with_their_record_are_used(self):
        self._record(self._volume_path())
        self.assertTrue(self._on_disk())

    def test_disk_of_unknown_format_is_refused(self):
        path = self._volume_path()
        os.unlink(self.places.record_path)
        error = self.assertRaises(
            exception.InvalidSharedStorage, self._on_disk)
        self.assertIn(path, str(error))
        self.assertIn('share the instance directory too', str(error))

    def test_disks_in_a_pool_that_is_not_shared_are_made_anew(self):
        self._record(f'/srv/disks/{uuids.instance}_disk')
        self.assertFalse(self._on_disk())

    def test_server_with_files_is_nova_s(self):
        self.assertTrue(self._on_disk())
        self._record(os.path.join('/mnt', uuids.instance, 'disk'))
        self.assertTrue(self._on_disk())
        self.instance.uuid = uuids.other
        self.assertFalse(self._on_disk())

    def test_unfinished_copy_is_not_the_servers_disk(self):
        self._volume_path()
        self.instance.host = 'gone'
        with open(self.places.volume_path(
                layout.CLAIM + '-attempt@gone'), 'w'):
            pass
        before = self._volumes()
        self.assertFalse(self._on_disk())
        self.assertEqual(before, self._volumes())

    def _check(self, remote_pool, remote_directory):
        """Ask from this host one that has other directories."""
        data = self.driver.check_instance_shared_storage_local(
            self.context, self.instance)
        if not remote_directory:
            os.rename(data['filename'], data['filename'] + '.hidden')
        self.flags(disks_pool_path=remote_pool, group='libvirt')
        shared = self.driver.check_instance_shared_storage_remote(
            self.context, jsonutils.loads(jsonutils.dumps(data)))
        self.flags(disks_pool_path=self.pool_path, group='libvirt')
        if not remote_directory:
            os.rename(data['filename'] + '.hidden', data['filename'])
        self.driver.check_instance_shared_storage_cleanup(self.context, data)
        return shared

    def test_shared_pool_is_found_under_another_path(self):
        path = self._volume_path()
        link = os.path.join(self.instances, 'link')
        os.symlink(self.pool_path, link)
        self.assertTrue(self._check(link, remote_directory=False))
        self.assertEqual([os.path.basename(path)], os.listdir(self.pool_path))
        self.assertEqual(['disk.info'], os.listdir(self.directory))

    def test_shared_directory_is_found_with_a_pool_that_is_not(self):
        self._volume_path()
        self.assertTrue(self._check('/srv/disks', remote_directory=True))

    def test_nothing_is_shared(self):
        self._volume_path()
        self.assertFalse(self._check('/srv/disks', remote_directory=False))

    def test_pool_is_enough_to_ask(self):
        path = self._volume_path()
        shutil.rmtree(self.directory)
        self.assertTrue(self._check(self.pool_path, remote_directory=True))
        self.assertEqual([os.path.basename(path)], os.listdir(self.pool_path))

    def test_source_asks_to_have_written_what_arrived(self):
        data = {'filename': '', storage_migrate.FLUSH: True}
        with mock.patch.object(
                processutils, 'execute',
                side_effect=processutils.execute) as execute:
            self.assertFalse(self.driver.check_instance_shared_storage_remote(
                self.context, data))
            self.assertEqual(
                [self.pool_path, self.instances],
                [call.args[-1] for call in execute.mock_calls])
            self.flags(disks_pool_path='/none', group='libvirt')
            self.driver.check_instance_shared_storage_remote(
                self.context, data)
            self.assertEqual(3, execute.call_count)

    def test_nova_asks_for_a_server_with_files(self):
        data = self.driver.check_instance_shared_storage_local(
            self.context, self.instance)
        self.assertEqual(['filename'], list(data))
        self.driver.check_instance_shared_storage_cleanup(self.context, data)
        self.assertEqual([], os.listdir(self.directory))


class DiskSpaceTestCase(DriverTestCase):

    def _flag_off(self):
        self.flags(use_storage_pools=False, group='libvirt')

    def test_local_disk_is_that_of_the_pool(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.utils.get_fs_info', lambda path: {
                'total': (6 if path == self.pool_path else 3) * units.Gi}))
        self.assertEqual({'total': 6}, self.driver._get_local_gb_info())
        self._flag_off()
        self.assertEqual({'total': 3}, self.driver._get_local_gb_info())

    @mock.patch.object(driver.LibvirtDriver, 'get_available_resource')
    def _reserved_after_a_minute(self, _nova):
        """The directories of which other hosts are told."""
        told = []

        def tell(path):
            told.append(path)
            if path == self.pool_path:
                raise PermissionError(13, 'Permission denied', path)

        with (mock.patch.object(
                threads, 'spawn', lambda function, *args: function(*args)),
              mock.patch.object(local, 'tell_reserved', tell)):
            self.driver.get_available_resource('node')
        return told

    def test_other_hosts_are_told_of_space_that_only_root_may_use(self):
        instances = storage_migrate.CONF.instances_path
        self.assertEqual(
            [self.pool_path, instances], self._reserved_after_a_minute())
        self._flag_off()
        self.assertEqual([instances], self._reserved_after_a_minute())
        self.flags(vol_upload_migration=False, group='libvirt')
        self.assertEqual([], self._reserved_after_a_minute())

    @mock.patch('nova.privsep.utils.supports_direct_io')
    def test_disks_are_cached_if_the_pool_needs_it(self, supports):
        supports.side_effect = lambda path: path != self.pool_path
        self.assertEqual('writeback', self.driver.disk_cachemode)
        self.assertEqual('writeback', self.driver.disk_cachemode)
        self.assertEqual(2, supports.call_count)

    @mock.patch('nova.privsep.utils.supports_direct_io', return_value=True)
    def test_disks_are_not_cached_if_nothing_needs_it(self, supports):
        self.assertEqual('none', self.driver.disk_cachemode)

    @mock.patch('nova.privsep.utils.supports_direct_io')
    def test_only_nova_s_directory_counts_with_the_option_off(self, supports):
        self._flag_off()
        supports.side_effect = lambda path: path != self.pool_path
        self.assertEqual('none', self.driver.disk_cachemode)

    def test_image_cache_knows_the_pool(self):
        self.assertIsInstance(
            self.driver.image_cache_manager, imagecache.ImageCacheManager)


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
        self.assertEqual(uri, storage_migrate.destination_uri('dest'))

    def test_uri_of_an_ipv6_address(self):
        self.assertEqual('qemu+tls://[fd00::1]/system',
                         storage_migrate.destination_uri('fd00::1'))

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
        self.flags(vol_upload_migration=False, group='libvirt')
        self.source.pools['nova-disks'].autostart = True
        changes = len(self.source.changes)
        self._init_host()
        self.assertEqual(changes, len(self.source.changes))

    def test_pool_elsewhere_is_refused(self):
        self.flags(disks_pool_path='/elsewhere', group='libvirt')
        error = self.assertRaises(
            exception.InvalidConfiguration, self._init_host)
        self.assertIn(self.pool_path, str(error))

    def _forget_path(self):
        """Have a nova.conf that does not say where the pool is."""
        self.addCleanup(
            CONF.clear_default, 'disks_pool_path', group='libvirt')
        CONF.clear_override('disks_pool_path', group='libvirt')

    def test_pool_of_an_earlier_release_is_used_where_it_is(self):
        self._forget_path()
        self._init_host()
        self.assertEqual(self.pool_path, CONF.libvirt.disks_pool_path)

    def test_pool_of_an_earlier_release_is_used_with_the_options_off(self):
        self._forget_path()
        former = self.useFixture(fixtures.TempDir()).path
        self.flags(state_path=former)
        os.makedirs(os.path.join(former, 'disks', 'server_disk'))
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self._init_host()
        self.assertEqual(
            os.path.join(former, 'disks'), CONF.libvirt.disks_pool_path)
        self.assertEqual([], self.hosts.opened)

    def test_pool_that_nova_cannot_enter_is_refused(self):
        refusal = errors.Refused('nobody enters', 'Open it.')
        with mock.patch.object(place, 'check_access', side_effect=refusal):
            error = self.assertRaises(
                exception.InvalidConfiguration, self._init_host)
        self.assertIn('nobody enters. Open it', str(error))

    def test_image_type_that_has_no_files_is_refused(self):
        self.flags(images_type='rbd', group='libvirt')
        error = self.assertRaises(
            exception.InvalidConfiguration, self._init_host)
        self.assertIn('vol_upload_migration alone migrates', str(error))

    def test_nothing_happens_with_the_options_off(self):
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self._init_host()
        self.assertEqual([], self.hosts.opened)

    def _warnings(self, sends_service_token=True):
        self.flags(live_migration_with_native_tls=True, group='libvirt')
        self.flags(send_service_user_token=sends_service_token,
                   group='service_user')
        with mock.patch.object(storage_migrate.LOG, 'warning') as warning:
            self._init_host()
        return [call.args[0] % (call.args[1] if call.args[1:] else ())
                for call in warning.call_args_list]

    def test_tokens_that_may_expire_during_a_copy_are_warned_of(self):
        warning, = self._warnings(sends_service_token=False)
        self.assertIn('[service_user]send_service_user_token', warning)
        self.flags(vol_upload_migration=False, group='libvirt')
        self.assertEqual([], self._warnings(sends_service_token=False))

    def test_tls_is_nothing_to_warn_of(self):
        self.assertEqual([], self._warnings())

    @ddt.data(
        ({'vol_upload_migration_uri': 'qemu+tcp://%s/system'},
         'qemu+tcp://%s/system', 'SASL'),
        ({'vol_upload_migration_uri': 'qemu+ssh://nova@%s/system'},
         'qemu+ssh://nova@%s/system', 'key'),
        ({'live_migration_scheme': 'tcp'}, 'qemu+tcp://%s/system', 'SASL'),
        ({'live_migration_uri': 'qemu+ssh://%s/system'},
         'qemu+ssh://%s/system', 'key'))
    @ddt.unpack
    def test_transport_that_is_weak_is_warned_of(self, flags, uri, why):
        self.flags(virt_type='qemu', group='libvirt', **flags)
        warning, = self._warnings()
        for text in (uri, why, 'vol_upload_migration_uri to qemu+tls://%s/'):
            self.assertIn(text, warning)

    @ddt.data('vol_upload_migration_uri', 'live_migration_uri')
    def test_uri_that_does_not_verify_is_refused(self, option):
        uri = 'qemu+tls://%s/system?no_verify=1'
        self.flags(group='libvirt', **{option: uri})
        error = self.assertRaises(
            exception.InvalidConfiguration, self._init_host)
        self.assertEqual([], self.hosts.opened)
        for text in (uri, 'vol_upload_migration_uri', 'certificate'):
            self.assertIn(text, str(error))

    def test_uri_does_not_matter_where_disks_go_over_ssh(self):
        self.flags(vol_upload_migration=False, group='libvirt',
                   live_migration_uri='qemu+tcp://%s/system?no_verify=1')
        self.assertEqual([], self._warnings())

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
        self.assertIn('needs Nova 31 to 34', str(error))
        self.assertIn('migrate_disk_and_power_off', str(error))


class OptionsTestCase(test.NoDBTestCase):

    def test_options_are_off_by_default(self):
        self.assertFalse(cfg.CONF.libvirt.use_storage_pools)
        self.assertFalse(cfg.CONF.libvirt.vol_upload_migration)

    def test_generator_gets_every_option(self):
        (group, options), = storage_migrate_conf.sample_opts()
        self.assertEqual('libvirt', group)
        self.assertEqual(storage_migrate_conf.ALL_OPTS, options)
