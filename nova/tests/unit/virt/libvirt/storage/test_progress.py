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

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import progress
from nova.virt.libvirt.storage import stream

INTERVAL = 0.05


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
            self.context, self.instance, 'dest', 1000)

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
        def copy(note):
            for done, wire in figures:
                calls = self.log.info.call_count
                note(done, wire)
                self._wait(lambda: self.log.info.call_count > calls)
                # What is told is saved next.
                self._wait(lambda: (
                    self.save_migration.called or self.log.warning.called))
            return stream.Result(length, figures[-1][1], 2.0, 'file')

        return self.progress.watch(disk, copy)

    def _wait(self, condition):
        deadline = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.005)

    def _messages(self):
        return [call.args[0] % call.args[1]
                for call in self.log.info.call_args_list]

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

    def test_disks_count_together(self):
        self._copy((200, 200), length=200)
        self.assertNotIn(100, self.saved)
        self._copy((300, 300), disk='disk.eph0', length=800)
        self.assertIn(50, self.saved)
        self.assertEqual([100, (1000, 1000, 0)], self.saved[-2:])

    def test_result_of_the_copy_is_returned(self):
        self.assertEqual(
            stream.Result(1000, 7, 2.0, 'file'), self._copy((10, 7)))

    def test_short_copy_is_saved_once(self):
        self.progress.watch(
            'disk', lambda note: stream.Result(1000, 1000, 0.0, 'volume'))
        self.assertEqual([100, (1000, 1000, 0)], self.saved)

    def test_saves_do_not_grow_with_the_steps_of_the_copy(self):
        def copy(note):
            for done in range(1000):
                note(done, done)
                time.sleep(0.0005)
            return stream.Result(1000, 1000, 0.5, 'file')

        started = time.monotonic()
        self.progress.watch('disk', copy)
        seconds = time.monotonic() - started
        self.assertGreater(self.save_migration.call_count, 3)
        # One at once, as the last is long ago, and one at the end.
        self.assertLessEqual(
            self.save_migration.call_count, seconds / INTERVAL + 2)

    def test_server_is_only_saved_when_its_progress_changes(self):
        self._copy((300, 100), (301, 101), (302, 102))
        self.assertEqual([30, 100], [
            saved for saved in self.saved if isinstance(saved, int)])

    def test_thread_that_waits_is_the_one_that_saves(self):
        threads = set()
        self.save_server.side_effect = (
            lambda **kwargs: threads.add(threading.get_ident()))
        self.save_migration.side_effect = (
            lambda: threads.add(threading.get_ident()))
        copying = []

        def copy(note):
            copying.append(threading.get_ident())
            note(1, 1)
            self._wait(lambda: self.save_migration.called)
            return stream.Result(1000, 1000, 1.0, 'file')

        self.progress.watch('disk', copy)
        self.assertEqual({threading.get_ident()}, threads)
        self.assertNotIn(copying[0], threads)

    def _test_failing_save(self, error):
        self.assertEqual(1000, self._copy((300, 100), (600, 200)).length)
        self.assertIn(
            str(error), str(self.log.warning.call_args.args[1]))

    def test_copy_goes_on_if_the_server_can_not_be_saved(self):
        error = exception.UnexpectedDeletingTaskStateError(
            instance_uuid=uuids.instance, expected={}, actual={})
        self.save_server.side_effect = error
        self._test_failing_save(error)

    def test_copy_goes_on_if_the_migration_can_not_be_saved(self):
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
                type(error), self.progress.watch, 'disk',
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
                self.context, self.instance, 'dest', 1000 << 20)
            self.progress._figures['disk'] = (100 << 20, 60 << 20)
            clock.return_value = 110.0
            self.progress._tell()
            self.progress._figures['disk'] = (500 << 20, 160 << 20)
            clock.return_value = 120.0
            self.progress._tell()
        first, second = self._messages()
        self.assertIn('6.0 MiB/s, time left: 90 s', first)
        self.assertIn('10.0 MiB/s, time left: 20 s', second)


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
        progress.Progress(
            self.context, self.instance, 'dest', length).watch(
                'disk', lambda note: stream.Result(length, 1, 1.0, 'file'))

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
