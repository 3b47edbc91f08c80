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

import threading
import time
from unittest import mock

import ddt
import fixtures
from oslo_utils import fixture
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import timeutils

from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import progress
from nova.virt.libvirt.storage import stream

INTERVAL = 0.05


@ddt.ddt
class ProgressTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.progress.INTERVAL', INTERVAL))
        self.context = nova_context.get_admin_context()
        self.instance = objects.Instance(
            self.context, uuid=uuids.instance, progress=0,
            migration_context=objects.MigrationContext(migration_id=42))
        self.migration = objects.Migration(self.context, id=42)
        self.saved = []
        self.save_server = self._patch(
            objects.Instance, 'save', self._note_server)
        self.save_migration = self._patch(
            objects.Migration, 'save', self._note_migration)
        self.lookup = self._patch(
            objects.Migration, 'get_by_id',
            lambda context, migration_id: self.migration)
        self.log = self.useFixture(fixtures.MockPatchObject(
            progress, 'LOG')).mock
        self.progress = progress.Progress(
            self.context, self.instance, 'dest')
        self.progress.begin(1000)

    def _patch(self, owner, name, side_effect):
        return self.useFixture(fixtures.MockPatchObject(
            owner, name, side_effect=side_effect)).mock

    def _note_server(self, **kwargs):
        self.saved.append(self.instance.progress)

    def _note_migration(self):
        self.saved.append((
            self.migration.disk_total, self.migration.disk_processed,
            self.migration.disk_remaining))

    def _copy(self, *figures, disk='disk', length=1000):
        """Copy in some steps, each of which lasts until it was reported."""
        def copy():
            for done, wire in figures:
                calls = self.log.info.call_count
                self.progress.note(disk, done, wire)
                self._wait(lambda: self.log.info.call_count > calls)
                # What is told is saved next.
                self._wait(lambda: (
                    self.save_migration.called or self.log.warning.called))
            self.progress.end(disk, stream.Result(
                length, figures[-1][1], 2.0, 'file'))

        self.progress.watch(copy)

    def _end(self, name, length, wire=0, seconds=0.0, source='volume'):
        self.progress.end(name, stream.Result(length, wire, seconds, source))

    def _wait(self, condition):
        deadline = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.005)

    def _messages(self):
        return [call.args[0] % call.args[1]
                for call in self.log.info.call_args_list]

    def test_connection_that_was_lost_is_told(self):
        self.progress.watch(lambda: self.progress.lose(
            errors.CopyError('destination', '/disk', 5, 'cut'), 60))
        self.log.warning.assert_called_once()
        message, values = self.log.warning.call_args.args
        self.assertRegex(
            message % values,
            'Lost the connection to .*, connecting again for up to 60 s: '
            'destination failed after 5 bytes: cut')

    def test_server_and_migration_show_how_far_it_is(self):
        self._copy((300, 100))
        # A busy machine may report twice, or before the copy has begun.
        begin = (1000, 0, 1000)
        self.assertEqual(
            [30, (1000, 300, 700), 100, (1000, 1000, 0)],
            [each for each in dict.fromkeys(self.saved) if each != begin])
        self.save_server.assert_called_with(
            expected_task_state=task_states.RESIZE_MIGRATING)
        self.lookup.assert_called_once_with(self.context, 42)

    def test_total_may_be_told_by_the_copy(self):
        self.progress = progress.Progress(
            self.context, self.instance, 'dest')

        def copy():
            self._wait(lambda: self.save_migration.called)
            self.progress.begin(2000)
            self._end('disk', 2000)

        self.progress.watch(copy)
        self.assertEqual((0, 0, 0), self.saved[0])
        self.assertEqual([100, (2000, 2000, 0)], self.saved[-2:])

    def test_files_count_together(self):
        def copy():
            self._end('disk', 200)
            calls = self.save_migration.call_count
            self.progress.note('disk.eph0', 300, 300)
            self._wait(lambda: (1000, 500, 500) in self.saved)
            self.assertGreater(self.save_migration.call_count, calls)
            self._end('disk.eph0', 800)

        self.progress.watch(copy)
        self.assertIn(50, self.saved)
        self.assertEqual([100, (1000, 1000, 0)], self.saved[-2:])
        self.assertEqual(1, self.saved.count(100))

    def test_short_copy_is_saved_once(self):
        self.progress.watch(lambda: self._end('disk', 1000, 1000))
        self.assertEqual([100, (1000, 1000, 0)], self.saved)

    def test_each_file_is_told_of_once(self):
        def copy():
            for name in 'disk', 'disk.eph0', 'disk.info':
                self._end(name, 300, 20, 2.0)
                self._wait(lambda: f'Copied {name} to dest' in ''.join(
                    self._messages()))

        self.progress.watch(copy)
        self.assertEqual(
            [f'Copied {name} to dest: 300 bytes, 20 on the wire, 2.0 s, '
             f'0.0 MiB/s, read from the volume'
             for name in ('disk', 'disk.eph0', 'disk.info')],
            [message for message in self._messages()
             if message.startswith('Copied')])

    def test_server_of_empty_files_is_no_error(self):
        self.progress.begin(0)
        self.progress.watch(lambda: self._end('disk', 0))
        self.assertEqual([(0, 0, 0)], self.saved)

    def test_saves_do_not_grow_with_the_steps_of_the_copy(self):
        def copy():
            for done in range(1000):
                self.progress.note('disk', done, done)
                time.sleep(0.0005)
            self._end('disk', 1000, 1000, 0.5)

        started = time.monotonic()
        self.progress.watch(copy)
        seconds = time.monotonic() - started
        self.assertGreater(self.save_migration.call_count, 3)
        # One at once, as the last is long ago, and one at the end.
        self.assertLessEqual(
            self.save_migration.call_count, seconds / INTERVAL + 2)

    def test_server_is_only_saved_when_its_progress_changes(self):
        self._copy((300, 100), (301, 101), (302, 102))
        self.assertEqual([30, 100], [
            saved for saved in self.saved if isinstance(saved, int)])

    @ddt.data(True, False)
    def test_database_that_does_not_answer_holds_up_nothing(self, fails):
        """The server has to start again if its copy failed."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.progress.SAVE_SECONDS', 0.01))
        answer = threading.Event()
        self.addCleanup(answer.set)
        self.save_migration.side_effect = lambda: answer.wait(60)
        error = errors.StorageError('the link is down')

        def copy():
            self.progress.note('disk', 500, 500)
            self._wait(lambda: self.save_migration.called)
            if fails:
                raise error
            self._end('disk', 1000, 1000, 1.0)

        started = time.monotonic()
        if fails:
            self.assertIs(error, self.assertRaises(
                errors.StorageError, self.progress.watch, copy))
        else:
            self.progress.watch(copy)
        self.assertLess(time.monotonic() - started, 30)
        self.save_migration.assert_called_once_with()

    def test_what_nova_changes_stays_to_be_saved(self):
        def save(**_kwargs):
            # Nova is about to save this with an expectation of its own.
            self.instance.task_state = 'later'

        self.save_server.side_effect = save
        self._copy((300, 100))
        changes = self.instance.obj_get_changes()
        self.assertEqual('later', changes.get('task_state'))
        self.assertNotIn('progress', changes)

    def _test_failing_save(self, error):
        self._copy((300, 100), (600, 200))
        self.assertIn(
            str(error), str(self.log.warning.call_args.args[1]))

    def test_copy_goes_on_if_the_server_cannot_be_saved(self):
        error = exception.UnexpectedDeletingTaskStateError(
            instance_uuid=uuids.instance, expected={}, actual={})
        self.save_server.side_effect = error
        self._test_failing_save(error)

    def test_copy_goes_on_if_the_migration_cannot_be_saved(self):
        error = exception.MigrationNotFound(migration_id=42)
        self.save_migration.side_effect = error
        self._test_failing_save(error)

    def test_copy_goes_on_if_the_migration_is_not_found(self):
        error = exception.MigrationNotFound(migration_id=42)
        self.lookup.side_effect = error
        self._test_failing_save(error)

    def test_error_of_the_copy_is_raised(self):
        for error in errors.Cancelled(), KeyboardInterrupt():
            self.assertRaises(
                type(error), self.progress.watch,
                mock.Mock(side_effect=error))
        self.assertNotIn(100, self.saved)

    def test_log_tells_bytes_rate_and_time_left(self):
        self._copy((0, 0), (500, 400))
        first, *_others, second, last = self._messages()
        self.assertIn('time left: unknown', first)
        self.assertRegex(
            second, r'^Copying to dest: 50 %, 500 of 1000 bytes, 400 on the '
            r'wire, \d+\.\d MiB/s, time left: \d+ s$')
        self.assertEqual(
            'Copied disk to dest: 1000 bytes, 400 on the wire, 2.0 s, '
            '0.0 MiB/s, read from the file', last)

    def test_rate_and_time_left_are_measured(self):
        with mock.patch.object(progress.time, 'monotonic') as clock:
            clock.return_value = 100.0
            self.progress = progress.Progress(
                self.context, self.instance, 'dest')
            self.progress.begin(1000 << 20)
            self.progress.note('disk', 100 << 20, 60 << 20)
            clock.return_value = 110.0
            self.progress._tell()
            self.progress.note('disk', 500 << 20, 160 << 20)
            clock.return_value = 120.0
            self.progress._tell()
        first, second = self._messages()
        self.assertIn('6.0 MiB/s, time left: 90 s', first)
        self.assertIn('10.0 MiB/s, time left: 20 s', second)

    def test_changes_of_the_server_show(self):
        def copy():
            self._end('disk', 600, 400, 4.0)
            self.progress.note('disk.eph0', 400, 0)
            self.progress.changed('disk', 50, 0.25)
            calls = self.save_migration.call_count
            self._wait(lambda: self.save_migration.call_count > calls + 1)

        self.progress.watch(copy)
        self.assertIn((1000, 1000, 50), self.saved)
        # To read the disk again, and to send what is different.
        self.assertEqual(0.25 + 50 * 4.0 / 400, self.progress.seconds_off)
        self.progress.tell_power_off()
        messages = self._messages()
        self.assertIn('The server has changed 50 bytes of disk while that was '
                      'copied', messages)
        self.assertEqual(
            'The disks of the server are on dest. The server is powered off '
            'to copy what it has changed since: 50 bytes so far, which takes '
            'about 0.8 s', messages[-1])

    def test_figures_of_a_copy_that_gets_on_meanwhile_belong_together(self):
        def look_up(context, migration_id):
            self.progress.note('disk', 700, 0)
            return self.migration

        self.lookup.side_effect = look_up
        self._copy((300, 0))
        self.assertEqual((1000, 300, 700), next(
            each for each in self.saved if isinstance(each, tuple)))

    def test_changes_that_were_sent_are_none(self):
        self._end('disk', 1000, 500, 5.0)
        self.progress.changed('disk', 500, 1.0)
        self.progress.end_pass('disk', stream.Result(500, 500, 5.0, 'file'))
        self.assertEqual((0, 0), (
            self.progress.get_remaining(1000), self.progress.seconds_off))
        self.progress.changed('disk', 10, 0.0)
        self.assertEqual((10, 10 * 10.0 / 1000), (
            self.progress.get_remaining(1000), self.progress.seconds_off))

    def test_nothing_is_expected_before_anything_was_sent(self):
        self.progress.changed('disk', 10, 1.0)
        self.assertIsNone(self.progress.seconds_off)
        self.progress.tell_power_off()
        self.assertEqual([], self._messages())


class DatabaseTestCase(test.TestCase):
    """What is saved is what others read, from a real database."""

    def setUp(self):
        super().setUp()
        self.context = nova_context.get_admin_context()
        self.instance = objects.Instance(
            self.context, uuid=uuids.instance, project_id='project',
            progress=0, task_state=task_states.RESIZE_MIGRATING)
        self.instance.create()
        self.migration = objects.Migration(
            self.context, instance_uuid=uuids.instance, status='migrating',
            migration_type='migration')
        self.migration.create()
        self.instance.migration_context = objects.MigrationContext(
            self.context, instance_uuid=uuids.instance,
            migration_id=self.migration.id)

    def _watch(self, length):
        watch = progress.Progress(self.context, self.instance, 'dest')
        watch.begin(length)
        watch.watch(lambda: watch.end(
            'disk', stream.Result(length, 1, 1.0, 'file')))

    def _saved(self):
        return objects.Instance.get_by_uuid(self.context, uuids.instance)

    def test_server_and_migration(self):
        size = 8 << 40
        self._watch(size)
        self.assertEqual(100, self._saved().progress)
        saved = objects.Migration.get_by_id(self.context, self.migration.id)
        self.assertEqual((size, size, 0), (
            saved.disk_total, saved.disk_processed, saved.disk_remaining))
        # Nova goes on with an object that knows nothing of all this.
        self.migration.status = 'post-migrating'
        self.migration.save()
        self.assertEqual(0, self.migration.disk_remaining)

    def test_server_that_is_being_deleted_is_left_alone(self):
        deleting = self._saved()
        deleting.task_state = task_states.DELETING
        deleting.save()
        self._watch(1000)
        self.assertIn('Failed to save', self.stdlog.logger.output)
        self.assertEqual(
            (0, task_states.DELETING),
            (self._saved().progress, self._saved().task_state))

    def test_server_that_is_gone(self):
        self._saved().destroy()
        self._watch(1000)
        self.assertIn('could not be found', self.stdlog.logger.output)

    def _events(self):
        """The events of the action as the API reads them, by their names."""
        action = objects.InstanceAction.get_by_request_id(
            self.context, uuids.instance, self.context.request_id)
        return {event.event: event
                for event in objects.InstanceActionEventList.get_by_action(
                    self.context, action.id)}

    def _begin_action(self):
        objects.InstanceAction.action_start(
            self.context, uuids.instance, 'migrate', want_result=False)

    def _status(self):
        return objects.Migration.get_by_id(
            self.context, self.migration.id).status

    def test_waiting_is_an_event_and_a_status(self):
        self._begin_action()
        with progress.waiting(self.context, self.instance, 3):
            self.assertEqual('queued', self._status())
            event, = self._events().values()
            self.assertEqual(
                (progress.WAITING, None), (event.event, event.finish_time))
        self.assertEqual('migrating', self._status())
        event, = self._events().values()
        self.assertEqual('Success', event.result)

    def test_waiting_that_was_ended_is_an_error(self):
        self._begin_action()
        with (self.assertRaises(exception.MigrationError),
              progress.waiting(self.context, self.instance, 3)):
            raise exception.MigrationError(reason='it was deleted')
        event, = self._events().values()
        self.assertEqual('Error', event.result)
        self.assertIn('it was deleted', event.details)

    def test_time_off_is_an_event_that_the_last_host_ends(self):
        self._begin_action()
        progress.begin_off(self.context, self.instance)
        first = progress.end_off(self.context, self.instance)
        self.useFixture(fixture.TimeFixture(
            timeutils.utcnow())).advance_time_seconds(7)
        last = progress.end_off(self.context, self.instance)
        self.assertGreaterEqual(last, first + 5)
        event, = self._events().values()
        self.assertEqual(
            (progress.OFF, 'Success', last),
            (event.event, event.result,
             (event.finish_time - event.start_time).total_seconds()))

    def test_server_that_was_never_off_has_no_such_event(self):
        self._begin_action()
        self.assertIsNone(progress.end_off(self.context, self.instance))
        self.assertEqual({}, self._events())

    def test_no_action_is_no_error(self):
        progress.begin_off(self.context, self.instance)
        self.assertIsNone(progress.end_off(self.context, self.instance))
