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

"""Many migrations at once, in both concurrency modes of nova-compute."""

import os
import threading
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import power_state
from nova import exception
from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt import fake
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage import turns
from nova.virt.libvirt import storage_migrate


class ManyTestCase(test_storage_migrate.DriverTestCase):
    """Servers whose copies stand still, each in its native threads.

    That is what they do where the destination's disk hangs. The guests are
    off then: their disks are so short that they are not copied before.

    :cvar limit: how many copy at once
    """

    limit = 0

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration_max_concurrent=self.limit,
                   group='libvirt')
        self.driver = storage_migrate.LibvirtDriver(fake.FakeVirtAPI())
        self._patch_driver()
        self.paths = {}
        self.disk_info.side_effect = lambda instance, *args: [
            {'path': self.paths[instance.uuid], 'type': 'qcow2',
             'disk_size': 1}]
        # Many take long on a busy machine.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.libvirt_storage.BLOCK_MAX', 300))
        self.blocked = self.dest.block('stream.send', times=None)
        self.failures = {}
        self.migrations = []
        self.addCleanup(self._finish)

    def _make_server(self, number):
        instance = self._instance()
        instance.uuid = getattr(uuids, f'server_{number}')
        places = layout.Layout.of(instance)
        os.mkdir(places.directory)
        self.source.add_volume(
            'nova-disks', places.volume_name('disk'),
            libvirt_storage.Content.draw('A-B-'))
        path = places.volume_path('disk')
        self.paths[instance.uuid] = path
        with open(path, 'wb'):
            pass
        layout.write_record(places.record_path, {path: 'qcow2'})
        return instance

    def _start(self, instance, **kwargs):
        """Have a thread migrate a server, as one of Nova's does."""
        def migrate():
            try:
                self._migrate(instance=instance, **kwargs)
            except Exception as error:
                self.failures[instance.uuid] = error

        migration = threading.Thread(target=migrate, daemon=True)
        self.migrations.append(migration)
        migration.start()
        return migration

    def _wait(self, condition, seconds=120):
        self.assertTrue(libvirt_storage.wait_for(condition, seconds))

    def _finish(self):
        """Let all copies go on, and wait for the end of all migrations."""
        self.blocked.release()
        for migration in self.migrations:
            migration.join(120)
            self.assertFalse(migration.is_alive())

    def _call_libvirt(self):
        """Call libvirt as Nova does, with eventlet over its tpool."""
        nova = self.driver._host._wrap_libvirt_proxy(
            libvirt.open('qemu:///system'))
        nova.storagePoolLookupByName('nova-disks')

    def _assert_answers(self, function):
        """Something that Nova calls ends at once."""
        ended = threading.Event()

        def call():
            function()
            ended.set()

        threading.Thread(target=call, daemon=True).start()
        self.assertTrue(ended.wait(10))

    def _arrived(self):
        return {name for name in self.dest.volume_names('nova-disks')
                if name.endswith('_disk')}

    def _names(self, instances):
        return {layout.Layout.of(instance).volume_name('disk')
                for instance in instances}


class CopyingTestCase(ManyTestCase):

    # More than the threads of eventlet's tpool, which are 20.
    SERVERS = 30

    def test_libvirt_answers_nova_while_all_copy(self):
        moving = [self._make_server(number) for number in range(self.SERVERS)]
        for instance in moving:
            self._start(instance)
        self._wait(lambda: self.blocked.hits >= self.SERVERS or self.failures)
        self.assertEqual({}, self.failures)
        self._assert_answers(self._call_libvirt)
        self._finish()
        self.assertEqual({}, self.failures)
        self.assertEqual(self._names(moving), self._arrived())


class WaitingTestCase(ManyTestCase):
    """Servers over the limit wait, and run meanwhile."""

    limit = 2

    def _start_all(self, count):
        """Start migrations, each when the one before is in the queue."""
        instances = [self._make_server(number) for number in range(count)]
        for number, instance in enumerate(instances):
            self._start(instance)
            self._wait(lambda: self._waiting() + min(
                self.limit, self.blocked.hits) == number + 1)
        return instances

    def _waiting(self):
        return len(self._calls_of_event('event_start', 'wait_for_copies'))

    def _calls_of_event(self, what, name):
        return [call for call in getattr(self.events, what).mock_calls
                if call.args[2] == f'compute_{name}']

    def _connections(self):
        """How many connections are open to each host."""
        return [sum(not connection.closed for connection in host.connections)
                for host in (self.source, self.dest)]

    def _powered_off(self):
        return [call.args[0].uuid for call in
                self.calls.power_off.call_args_list]

    def _uuids(self, instances):
        return [instance.uuid for instance in instances]

    def test_fifty_wait_and_nova_is_answered(self):
        native = threads.native_threading()
        # The first call starts the threads of eventlet's tpool.
        self._call_libvirt()
        moving = self._start_all(2)
        copying = native.active_count()
        connections = self._connections()
        moving += [self._make_server(number) for number in range(2, 52)]
        for instance in moving[2:]:
            self._start(instance)
        self._wait(lambda: self._waiting() == 50)
        self.assertEqual(connections, self._connections())

        self._assert_answers(self._call_libvirt)
        self._assert_answers(
            lambda: self.driver.delete_instance_files(self._instance()))
        self.assertEqual(self._uuids(moving[:2]), self._powered_off())
        # Under eventlet those who wait have no native thread. A few of calls
        # that have just ended may still be there.
        if threads.get_eventlet():
            self.assertLess(native.active_count(), copying + 10)
        self.assertEqual(self._names(moving[:2]), self._arrived())

        self._finish()
        self.assertEqual({}, self.failures)
        self.assertEqual(self._names(moving), self._arrived())

    def test_order_is_that_in_which_they_came(self):
        self.limit = 1
        self.driver._queue = turns.Queue(1)
        moving = self._start_all(6)
        self._finish()
        self.assertEqual({}, self.failures)
        self.assertEqual(self._uuids(moving), self._powered_off())

    def test_one_that_fails_lets_the_next_one_copy(self):
        self.limit = 1
        self.driver._queue = turns.Queue(1)
        moving = self._start_all(3)
        self.dest.fail('vol.info')
        self._finish()
        self.assertEqual([moving[0].uuid], list(self.failures))
        self.assertIn('injected failure', str(self.failures[moving[0].uuid]))
        self.assertEqual(self._names(moving[1:]), self._arrived())

    def test_waiting_shows(self):
        moving = self._start_all(3)
        self.assertEqual('queued', self.migration.status)
        self.assertIn('until as many others from this host have copied their '
                      'disks: 1', self.stdlog.logger.output)
        self._finish()
        self.assertEqual({}, self.failures)
        self.assertEqual('migrating', self.migration.status)
        self.assertIn('The server waited for', self.stdlog.logger.output)
        start, = self._calls_of_event('event_start', 'wait_for_copies')
        end, = self._calls_of_event(
            'event_finish_with_failure', 'wait_for_copies')
        for call in start, end:
            self.assertEqual(moving[2].uuid, call.args[1])
        self.assertIsNone(end.kwargs['exc_val'])

    def test_deletion_ends_the_waiting(self):
        # Not by asking again and again.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.turns.POLL_SECONDS', 60))
        moving = self._start_all(4)
        self.driver.delete_instance_files(moving[2])
        self.migrations[2].join(30)
        self.assertFalse(self.migrations[2].is_alive())
        error = self.failures[moving[2].uuid]
        self.assertIsInstance(error, exception.MigrationError)
        self.assertIn('the server was deleted', str(error))
        end, = self._calls_of_event(
            'event_finish_with_failure', 'wait_for_copies')
        self.assertIsNotNone(end.kwargs['exc_val'])
        self._finish()
        self.assertEqual(
            self._names(moving[:2] + moving[3:]), self._arrived())
        self.assertNotIn(moving[2].uuid, self._powered_off())

    def test_end_of_nova_compute_ends_the_waiting(self):
        self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, 'cleanup_host'))
        moving = self._start_all(4)
        self.driver.cleanup_host('source')
        for migration in self.migrations[2:]:
            migration.join(30)
            self.assertFalse(migration.is_alive())
        for instance in moving[2:]:
            error = self.failures[instance.uuid]
            self.assertIsInstance(error, exception.InstanceFaultRollback)
            self.assertIn('nova-compute on source ended', str(error))
        self.assertEqual(
            set(self._uuids(moving[:2])), set(self._powered_off()))

    def test_no_copy_begins_when_nova_compute_was_told_to_end(self):
        moving = self._start_all(4)
        compute = self.driver.virtapi._compute = mock.Mock()
        compute._shutdown_in_progress.is_set.return_value = True
        for migration in self.migrations[2:]:
            migration.join(30)
        self.assertEqual(set(self._uuids(moving[2:])), set(self.failures))
        for error in self.failures.values():
            self.assertIsInstance(error, exception.InstanceFaultRollback)
        # Those that had begun go on as long as Nova lets them.
        self._finish()
        self.assertEqual(self._names(moving[:2]), self._arrived())

    def test_refusal_does_not_wait(self):
        self._start_all(2)
        refused = self._make_server(2)
        self.dest.add_domain(refused.uuid)
        self._start(refused).join(10)
        self.assertIn('is there already', str(self.failures[refused.uuid]))
        self.assertEqual(0, self._waiting())

    def test_what_changes_while_it_waits_is_found(self):
        moving = self._start_all(3)
        self.dest.add_domain(moving[2].uuid)
        self._finish()
        self.assertEqual([moving[2].uuid], list(self.failures))
        error = self.failures[moving[2].uuid]
        self.assertIsInstance(error, exception.InstanceFaultRollback)
        self.assertIn('is there already', str(error))
        self.assertNotIn(moving[2].uuid, self._powered_off())
        self.assertEqual(self._names(moving[:2]), self._arrived())

    def test_guest_that_shut_itself_down_stays_off_after_a_failure(self):
        self.limit = 1
        self.driver._queue = turns.Queue(1)
        moving = self._start_all(2)
        self.info.return_value.state = power_state.SHUTDOWN
        self.calls.power_off.side_effect = [ValueError('failed')]
        self._finish()
        self.assertEqual([moving[1].uuid], list(self.failures))
        self.calls.power_on.assert_not_called()

    def test_server_without_disks_does_not_wait(self):
        self._start_all(2)
        server = self._make_server(2)
        self.disk_info.side_effect = lambda *args: []
        os.unlink(self.paths[server.uuid])
        root = {'connection_info': {}, 'mount_device': '/dev/vda',
                'boot_index': 0}
        self._start(server, block_device_info={
            'block_device_mapping': [root], 'ephemerals': [],
            'root_device_name': '/dev/vda'})
        self._wait(lambda: self.blocked.hits == 3 or self.failures)
        self.assertEqual({}, self.failures)
        self.assertEqual(0, self._waiting())

    def test_resize_on_its_own_host_waits(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.utils.get_fs_info', lambda path: {'free': 9}))
        self._start_all(2)
        instance = self._make_server(2)
        self._start(instance, dest='source')
        self._wait(lambda: self._waiting() == 1)
        self.assertNotIn(instance.uuid, self._powered_off())
        self.assertEqual([], layout.Layout.of(instance).kept())
        self._finish()
        self.assertEqual({}, self.failures)
        self.assertIn(instance.uuid, self._powered_off())

    def test_failure_to_tell_keeps_nothing_from_going_on(self):
        self.migration.save.side_effect = exception.MigrationNotFound(
            migration_id=42)
        self.events.event_start.side_effect = (
            exception.InstanceActionNotFound(
                request_id='x', instance_uuid='y'))
        self.events.event_finish_with_failure.side_effect = ValueError
        moving = [self._make_server(number) for number in range(3)]
        for instance in moving:
            self._start(instance)
        self._wait(lambda: self._waiting() == 1)
        self._finish()
        self.assertEqual({}, self.failures)
        self.assertEqual(self._names(moving), self._arrived())


@ddt.ddt
class QueueTestCase(test.NoDBTestCase):

    @ddt.data((1, [0, 1, 2]), (2, [0, 0, 1]), (3, [0, 0, 0]), (0, [0, 0, 0]))
    @ddt.unpack
    def test_first_ones_may_go(self, most, ahead):
        queue = turns.Queue(most)
        with queue.join() as first, queue.join() as second, (
                queue.join()) as third:
            self.assertEqual(
                ahead, [turn.ahead for turn in (first, second, third)])

    def test_who_leaves_lets_the_next_one_go(self):
        queue = turns.Queue(1)
        with queue.join() as first, queue.join() as second:
            first.leave()
            second.wait(lambda: self.fail('it waits'))
            first.leave()
            with queue.join() as third:
                self.assertEqual(1, third.ahead)

    def test_error_lets_the_next_one_go(self):
        queue = turns.Queue(1)
        with self.assertRaises(ValueError), queue.join():
            raise ValueError()
        with queue.join() as turn:
            self.assertEqual(0, turn.ahead)

    def test_one_that_leaves_out_of_turn(self):
        queue = turns.Queue(1)
        with queue.join(), queue.join() as second, queue.join() as third:
            second.leave()
            self.assertEqual(1, third.ahead)
