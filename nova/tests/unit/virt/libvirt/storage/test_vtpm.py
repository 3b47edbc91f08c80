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
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage import test_directory
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
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

    def test_shared_storage_is_refused(self):
        with mock.patch.object(
                site.Site, '_find_shared', return_value=True):
            self._assert_refused('vTPM', 'share its instance directory')

    def test_libvirt_that_would_delete_the_state_is_refused(self):
        self.min_version.return_value = False
        self._assert_refused('vTPM', '8.9.0')
        self.min_version.assert_called_with((8, 9, 0))

    def test_resize_on_one_host_is_refused(self):
        self._assert_refused('vTPM', 'one host', dest='source')


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

    @ddt.data(True, False)
    @mock.patch.object(libvirt_utils, 'restore_vtpm_dir')
    def test_state_that_nova_moved_is_put_back(self, moved, restore):
        saved = os.path.join(self.directory, layout.VTPM, uuids.instance)
        if moved:
            os.makedirs(saved)
        self.instance.old_flavor = None
        self.driver._finish_revert_migration_vtpm(self.context, self.instance)
        self.assertEqual([mock.call(saved)] if moved else [],
                         restore.mock_calls)
