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


import filecmp
import grp
import itertools
import os
import pathlib
import pwd
import shutil
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova.tests import crashing
from nova.tests.fixtures import libvirt_storage
from nova.tests.fixtures import privileged
from nova.tests.unit.virt.libvirt.storage import test_directory
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import vtpm
from nova.virt.libvirt import utils as libvirt_utils

ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
         'cannot write to stream: No space left on device')


class VtpmMixin:
    """A server whose vTPM has state that libvirt keeps on this host."""

    def setUp(self):
        super().setUp()
        self.pools = set(self.source.pools), set(self.dest.pools)
        self.vtpm = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.utils.VTPM_DIR', self.vtpm))
        self.state = os.path.join(self.vtpm, uuids.instance)
        os.mkdir(self.state)
        for path, mode in ((self.state, 0o711),
                           (self.state + '/tpm2', 0o700)):
            self.source.directories[path] = libvirt_storage.FakeDirectory(
                owner=104, group=105, mode=mode)
        for name, data in (('tpm2-00.permall', b'state'), ('.lock', b'')):
            self.source.add_file(
                f'{self.state}/tpm2/{name}', data, owner=104, group=105,
                mode=0o600)
        self.useFixture(fixtures.MockPatch(
            'nova.virt.hardware.get_vtpm_constraint'))
        self.min_version = self.useFixture(fixtures.MockPatchObject(
            self.driver._host, 'has_min_version', return_value=True)).mock

    def _moved(self):
        """What arrived: path below the instance directory -> file."""
        return {os.path.relpath(path, self.directory): file
                for path, file in {**self.dest.files,
                                   **self.dest.directories}.items()
                if layout.VTPM in path}

    def _assert_state_arrives(self, owner, group):
        self._migrate()
        moved = self._moved()
        top = f'{layout.VTPM}/{uuids.instance}'
        self.assertEqual(
            {layout.VTPM: 0o755, top: 0o711, f'{top}/tpm2': 0o700,
             f'{top}/tpm2/tpm2-00.permall': 0o600,
             f'{top}/tpm2/.lock': 0o600},
            {name: file.mode for name, file in moved.items()})
        self.assertEqual({(owner, group)}, {
            (file.owner, file.group) for file in moved.values()})
        self.assertEqual(b'state', moved[
            f'{top}/tpm2/tpm2-00.permall'].content.read(0, 10))
        # That of the source is there for a revert.
        self.assertIn(f'{self.state}/tpm2/tpm2-00.permall', self.source.files)
        self.assertEqual(self.pools, (set(self.source.pools),
                                      set(self.dest.pools)))

    def _fail(self):
        return str(self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception)


class PoolTestCase(VtpmMixin, test_storage_migrate.DriverTestCase):
    """Its disks are in the pool."""

    def setUp(self):
        super().setUp()
        self.volume = self._add_disk()
        for path in ('/srv/disks', self.instances):
            self.dest.directories[path].owner = 7

    def test_state_arrives(self):
        self._assert_state_arrives(7, 0)
        self.assertIn(self.volume, self.dest.volume_names('nova-disks'))

    def test_server_without_a_vtpm(self):
        os.rmdir(self.state)
        self._migrate()
        self.assertEqual({}, self._moved())

    def test_failure_leaves_nothing_over_there(self):
        # After the disk and the empty claim.
        self.dest.fail('vol.upload', name='tpm2-00.permall', error=ERROR)
        message = self._fail()
        self.assertIn('tpm2-00.permall to host dest', message)
        self.assertIn('No space left on device', message)
        self._assert_nothing_on_destination()
        self.assertEqual({}, self._moved())
        self.calls.power_on.assert_called_once()
        self.assertIn(f'{self.state}/tpm2/tpm2-00.permall', self.source.files)

    def test_next_attempt_clears_what_is_left(self):
        self.dest.fail('vol.upload', name='tpm2-00.permall', error=ERROR)
        self.dest.fail('vol.delete', error=ERROR)
        self._fail()
        self.assertNotEqual({}, self._moved())
        self._assert_state_arrives(7, 0)

    def test_file_that_got_lost(self):
        path = f'{self.directory}/swtpm/{uuids.instance}/tpm2/tpm2-00.permall'
        self.dest.call('stream.finish', name='tpm2-00.permall',
                       action=lambda: self.dest.files.pop(path))
        self.assertIn('tpm2-00.permall to host dest', self._fail())

    def test_destination_that_hangs_is_asked_nothing_more(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        blocked = self.dest.block(
            'conn.storagePoolCreateXML',
            name=f'nova-{uuids.instance}-swtpm-{uuids.instance}')
        self.addCleanup(blocked.release)
        ended = []
        self.calls.power_on.side_effect = lambda *args, **kwargs: ended.extend(
            name for call, name in self.dest.calls if call == 'pool.destroy')
        self.assertIn('no answer within 1 seconds', self._fail())
        self.assertTrue(blocked.reached.is_set())
        self.assertNotIn(f'nova-{uuids.instance}-swtpm', ended)

    def test_libvirt_that_would_delete_the_state_is_refused(self):
        self.min_version.return_value = False
        self._assert_refused('vTPM', '8.9.0')
        self.min_version.assert_called_with((8, 9, 0))


class DirectoryTestCase(VtpmMixin, test_directory.DirectoryTestCase):
    """Its disks are in the instance directory."""

    def test_state_arrives(self):
        self._add_files()
        self._assert_state_arrives(*test_directory.NOVA.values())

    def test_failure_leaves_nothing_over_there(self):
        self._add_files()
        self.dest.fail('vol.upload', name='tpm2-00.permall', error=ERROR)
        self.assertIn('tpm2-00.permall to host dest', self._fail())
        self._assert_nothing_on_destination()


@ddt.ddt
class FinishTestCase(VtpmMixin, test_storage_migrate.FinishMixin,
                     test_storage_migrate.DriverTestCase):

    def test_state_that_came_is_on_stable_storage(self):
        saved = os.path.join(self.directory, layout.VTPM, uuids.instance)
        os.makedirs(saved)
        state = os.path.join(saved, 'state')
        with open(state, 'w'):
            pass
        self._claim()
        flushed = self._flushed([{'path': 'disk', 'type': 'none'}])
        self.assertLessEqual(
            {state, saved, os.path.dirname(saved), self.directory}, flushed)


class PrivilegedMixin:
    """nova-compute may do as root what Nova has a helper for."""

    def setUp(self):
        super().setUp()
        self.chown = mock.Mock()
        for name, function in (('chown', self.chown), ('rmdir', os.rmdir),
                               ('move_tree', shutil.move)):
            self.useFixture(fixtures.MonkeyPatch(
                f'nova.privsep.path.{name}', privileged.privileged(function)))
        self.flags(swtpm_user=pwd.getpwuid(os.geteuid()).pw_name,
                   swtpm_group=grp.getgrgid(os.getegid()).gr_name,
                   group='libvirt')
        self.saved = os.path.join(
            self.places.saved_vtpm_path, uuids.instance)
        self.instance.old_flavor = self.instance.new_flavor = self._flavor()

    def _write_state(self, content, path=None):
        directory = pathlib.Path(path or self.state)
        (directory / 'tpm2').mkdir(parents=True, exist_ok=True)
        (directory / 'tpm2/.lock').touch()
        (directory / 'tpm2/tpm2-00.permall').write_text(content)

    def _read_state(self, path=None):
        """The content of a complete state, None if there is none."""
        directory = pathlib.Path(path or self.state)
        if not directory.exists():
            return None
        self.assertEqual({'.lock', 'tpm2-00.permall'}, {
            path.name for path in directory.rglob('*') if path.is_file()})
        return (directory / 'tpm2/tpm2-00.permall').read_text()


class SameHostTestCase(PrivilegedMixin, VtpmMixin,
                       test_storage_migrate.SameHostMixin,
                       test_storage_migrate.DriverTestCase):
    """The server is resized on its host, with its disks in the pool."""

    def setUp(self):
        super().setUp()
        self._write_state('old')
        self.before = self._state()
        self.kept = os.path.join(
            self.places.kept_directory, layout.VTPM, uuids.instance)

    def _finish(self):
        self.driver._finish_migration_vtpm(self.context, self.instance)

    def _nova_reverts(self, task_state=task_states.RESIZE_REVERTING):
        """Do what Nova does, and its libvirt, which keeps the state."""
        self.instance.task_state = task_state
        self.info.return_value.state = power_state.SHUTDOWN

        def nova(*args):
            if os.path.exists(self.places.kept_directory):
                shutil.rmtree(self.directory, ignore_errors=True)
                os.rename(self.places.kept_directory, self.directory)
            self.driver._finish_revert_migration_vtpm(
                self.context, self.instance)

        with mock.patch.object(
                driver.LibvirtDriver, 'finish_revert_migration',
                side_effect=nova):
            self.driver.finish_revert_migration(
                self.context, self.instance, mock.sentinel.network_info,
                self.migration, None, False)

    def _assert_as_before(self):
        self.assertEqual('old', self._read_state())
        self.assertEqual(self.before, self._state())
        self.assertEqual([], os.listdir(self.places.saved_vtpm_path) if
                         os.path.exists(self.places.saved_vtpm_path) else [])

    def test_state_is_kept_and_handed_to_nova(self):
        self._resize()
        self.assertIsNone(self._read_state())
        self.assertEqual('old', self._read_state(self.kept))
        self.assertEqual('old', self._read_state(self.saved))

    def test_resized_server_goes_on_with_it(self):
        self._resize()
        self._finish()
        self.assertEqual('old', self._read_state())
        self.assertFalse(os.path.exists(self.saved))
        self.chown.assert_called_with(
            self.saved, os.geteuid(), os.getegid(), recursive=True)

    def test_revert_brings_back_what_was(self):
        self._resize()
        self._finish()
        self._write_state('new')
        self._nova_reverts()
        self._assert_as_before()

    def test_server_without_a_vtpm(self):
        shutil.rmtree(self.state)
        self._resize()
        self._finish()
        self._nova_reverts()
        self.assertIsNone(self._read_state())
        self.assertEqual(self.before, self._state())

    def test_state_that_came_to_be_since_goes_in_a_revert(self):
        shutil.rmtree(self.state)
        self._resize()
        self._write_state('new')
        self.instance.task_state = task_states.RESIZE_REVERTING
        with mock.patch.object(driver.LibvirtDriver, 'cleanup'):
            self.driver.cleanup(
                self.context, self.instance, mock.sentinel.network_info,
                destroy_disks=False)
        self.assertIsNone(self._read_state())

    def test_failure_puts_it_back(self):
        with mock.patch('shutil.copytree', side_effect=OSError('full')):
            error = self.assertRaises(
                exception.InstanceFaultRollback, self._resize)
        self.assertIn('full', str(error.inner_exception))
        self.calls.power_on.assert_called_once()
        self._assert_as_before()

    def test_failure_after_it_was_saved_puts_it_back(self):
        with mock.patch('nova.virt.libvirt.storage_migrate._copy_kept_nvram',
                        side_effect=OSError('no room')):
            error = self.assertRaises(
                exception.InstanceFaultRollback, self._resize)
        self.assertIn('no room', str(error.inner_exception))
        self.calls.power_on.assert_called_once()
        self._assert_as_before()

    def test_nova_compute_may_end_anywhere(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage_migrate._native',
            lambda function, *args: function(*args)))
        self.instance.old_flavor = None
        for name in 'rename', 'rmdir', 'unlink', 'mkdir':
            for nth in itertools.count():
                crashed = crashing.crashes(name, nth, self._resize)
                self._nova_reverts(task_states.RESIZE_MIGRATING)
                self._assert_as_before()
                if not crashed:
                    break
            self.assertGreater(nth, 0, name)

    def test_revert_may_end_anywhere_and_begin_again(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage_migrate._native',
            lambda function, *args: function(*args)))
        for name in 'rename', 'rmdir', 'unlink', 'mkdir':
            for nth in itertools.count():
                self._resize()
                self._finish()
                self._write_state('new')
                crashed = crashing.crashes(name, nth, self._nova_reverts)
                self._nova_reverts()
                self._assert_as_before()
                if not crashed:
                    break
            self.assertGreater(nth, 0, name)

    def test_leftover_of_a_revert_does_not_come_back(self):
        self._write_state('stale', self.saved)
        self._resize()
        self.assertEqual('old', self._read_state(self.kept))
        self._nova_reverts()
        self._assert_as_before()

    def test_libvirt_that_would_delete_it_is_refused(self):
        self.min_version.return_value = False
        self._assert_refused('vTPM', '8.9.0', dest='source')
        self._assert_as_before()


class SharedTestCase(PrivilegedMixin, VtpmMixin,
                     test_storage_migrate.DriverTestCase):
    """Both hosts have the pool and the instances directory."""

    def setUp(self):
        super().setUp()
        self._add_disk()
        self._write_state('old')
        self.useFixture(fixtures.MockPatchObject(
            site.Site, '_find_shared', return_value=True))

    def test_copy_that_cannot_be_deleted_keeps_no_server_off(self):
        with (mock.patch.object(layout, 'write_record',
                                side_effect=OSError('disk is full')),
              mock.patch.object(vtpm, 'drop_saved', side_effect=[
                  None, OSError('no access')])):
            error = self.assertRaises(
                exception.InstanceFaultRollback, self._migrate)
        self.assertIn('disk is full', str(error.inner_exception))
        self.assertEqual('power_on', self.calls.mock_calls[-1][0])
        self.assertIn('Failed to delete the copy of the vTPM: no access',
                      self.stdlog.logger.output)

    def _revert(self):
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.driver._finish_revert_migration_vtpm(self.context, self.instance)

    def _arrive(self):
        """Finish on the destination host.

        :returns: the directory in which libvirt has the states there
        """
        there = self.useFixture(fixtures.TempDir()).path
        with mock.patch.object(libvirt_utils, 'VTPM_DIR', there):
            self.driver._finish_migration_vtpm(self.context, self.instance)
        return there

    def test_state_goes_through_the_shared_directory(self):
        self._migrate()
        there = self._arrive()
        self.assertEqual(
            'old', self._read_state(os.path.join(there, uuids.instance)))
        self.assertFalse(os.path.exists(self.saved))

    def test_revert_finds_the_original(self):
        self._migrate()
        there = self._arrive()
        self._revert()
        self.assertEqual('old', self._read_state())
        # Nova has libvirt keep it on the destination host.
        with (mock.patch.object(libvirt_utils, 'VTPM_DIR', there),
              mock.patch.object(driver.LibvirtDriver, 'cleanup')):
            self.driver.cleanup(
                self.context, self.instance, mock.sentinel.network_info,
                destroy_disks=False)
        self.assertEqual([], os.listdir(there))

    def test_revert_of_what_did_not_arrive(self):
        self._migrate()
        self._revert()
        self.assertEqual('old', self._read_state())
        self.assertFalse(os.path.exists(self.saved))

    def test_failure_leaves_it_where_it_was(self):
        with mock.patch.object(
                layout, 'write_record', side_effect=OSError('full')):
            self.assertIn('full', self._fail())
        self.calls.power_on.assert_called_once()
        self.assertEqual('old', self._read_state())
        self.assertFalse(os.path.exists(self.places.saved_vtpm_path))

    def test_nova_compute_may_end_after_it_was_saved(self):
        self._migrate()
        self.instance.old_flavor = None
        self.instance.task_state = task_states.RESIZE_MIGRATING
        self.driver._finish_revert_migration_vtpm(self.context, self.instance)
        self.assertEqual('old', self._read_state())
        self.assertFalse(os.path.exists(self.saved))


class SavedTestCase(PrivilegedMixin, VtpmMixin,
                    test_storage_migrate.DriverTestCase):
    """A state is in the instance directory."""

    def _start_again(self):
        """Do as Nova does as it starts after it ended in a migration."""
        self.instance.old_flavor = None
        self.instance.task_state = task_states.RESIZE_MIGRATING
        self.driver._finish_revert_migration_vtpm(self.context, self.instance)

    def test_state_that_nova_moved_is_put_back(self):
        shutil.rmtree(self.state)
        self._write_state('old', self.saved)
        self._start_again()
        self.assertEqual('old', self._read_state())

    def test_none_was_moved(self):
        self._write_state('old')
        self._start_again()
        self.assertEqual('old', self._read_state())

    def test_nova_ended_while_it_copied(self):
        self._write_state('old')
        self._write_state('ol', self.saved)
        os.unlink(self.saved + '/tpm2/.lock')
        self._start_again()
        self.assertEqual('old', self._read_state())
        self.assertFalse(os.path.exists(self.saved))

    def test_nova_ended_while_it_deleted_the_original(self):
        self._write_state('old')
        self._write_state('old', self.saved)
        os.unlink(self.state + '/tpm2/tpm2-00.permall')
        self._start_again()
        self.assertEqual('old', self._read_state())
        self.assertFalse(os.path.exists(self.saved))

    def test_state_in_the_way_of_the_one_that_came(self):
        """Nova leaves it where a migration was reverted."""
        self._write_state('left')
        self._write_state('came', self.saved)
        self.driver._finish_migration_vtpm(self.context, self.instance)
        self.assertEqual('came', self._read_state())

    def test_state_that_did_not_come_stays(self):
        self._write_state('here')
        self.driver._finish_migration_vtpm(self.context, self.instance)
        self.assertEqual('here', self._read_state())

    def _hard_reboot(self):
        with mock.patch.object(driver.LibvirtDriver, '_hard_reboot') as nova:
            self.driver._hard_reboot(self.context, self.instance, [], None)
        nova.assert_called_once()

    def test_migration_failed_before_nova_moved_the_state(self):
        shutil.rmtree(self.state)
        self._write_state('came', self.saved)
        self._hard_reboot()
        self.assertEqual('came', self._read_state())
        self.assertFalse(os.path.exists(self.saved))

    def test_state_of_a_server_that_ran_stays(self):
        self._write_state('here')
        self._write_state('older', self.saved)
        self._hard_reboot()
        self.assertEqual('here', self._read_state())

    def test_nova_does_as_ever_with_the_options_off(self):
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self._write_state('here')
        self._write_state('came', self.saved)
        for method in (self.driver._finish_migration_vtpm,
                       self.driver._finish_revert_migration_vtpm):
            self.assertRaises(
                shutil.Error, method, self.context, self.instance)
        shutil.rmtree(self.state)
        self._hard_reboot()
        self.assertIsNone(self._read_state())

    def test_server_is_not_this_hosts(self):
        shutil.rmtree(self.state)
        self._write_state('came', self.saved)
        self.instance.host = 'dest'
        self._hard_reboot()
        self.assertIsNone(self._read_state())

    def test_copy_has_the_modes_of_the_original(self):
        self._write_state('old')
        os.chmod(self.state + '/tpm2/tpm2-00.permall', 0o600)
        os.chmod(self.state + '/tpm2', 0o700)
        vtpm.save(self.places, self.places.saved_vtpm_path)
        for name in 'tpm2', 'tpm2/tpm2-00.permall':
            self.assertEqual(os.stat(os.path.join(self.state, name)).st_mode,
                             os.stat(os.path.join(self.saved, name)).st_mode)
        self.assertEqual([], filecmp.dircmp(self.state, self.saved).diff_files)
