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


import itertools
import os
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import objects
from nova import test
from nova.tests import crashing
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import pool as storage_pool

URI = 'qemu:///system'


class LocalTestCase(test.NoDBTestCase):
    """A host with a pool and an instances directory of real files."""

    def setUp(self):
        super().setUp()
        self.pool, self.instances = (
            self.useFixture(fixtures.TempDir()).path for _ in range(2))
        self.flags(instances_path=self.instances, host='source')
        self.flags(disks_pool_path=self.pool, group='libvirt')
        self.places = layout.Layout.of(objects.Instance(uuid=uuids.server))
        self.directory = self.places.directory
        os.mkdir(self.directory)

    def _write(self, path, content='data'):
        with open(path, 'w') as file:
            file.write(content)
        return path

    def _volume(self, disk='disk', content='data', record='qcow2'):
        path = self._write(self.places.volume_path(disk), content)
        if record:
            self._record({path: record})
        return path

    def _file(self, name, content='data', record=None):
        path = self._write(os.path.join(self.directory, name), content)
        if record:
            self._record({path: record})
        return path

    def _record(self, formats):
        layout.write_record(
            self.places.record_path, self.places.formats() | formats)

    def _claim(self, in_pool=True, arrived=False):
        claim = layout.Claim.new(uuids.server)
        return self._write(os.path.join(
            self.pool if in_pool else self.directory,
            claim.arrived_name if arrived else claim.name), '')

    def _state(self):
        """What is in the pool and the instances directory, by path."""
        state = {}
        for root in self.pool, self.instances:
            for directory, names, files in os.walk(root):
                state.update({os.path.join(directory, name): None
                              for name in names})
                for name in files:
                    path = os.path.join(directory, name)
                    with open(path) as file:
                        state[path] = file.read()
        return state

    def _deleted(self, function, *args):
        """The names of the files that a function deletes, in order."""
        with mock.patch('os.unlink', side_effect=os.unlink) as unlink:
            function(*args)
        return [os.path.basename(call.args[0])
                for call in unlink.call_args_list]


class AdoptTestCase(LocalTestCase):

    def _info(self, disk='disk', disk_format='qcow2', pool='/their/disks'):
        return {'path': os.path.join(pool, self.places.volume_name(disk)),
                'type': disk_format}

    def _adopt(self, *infos):
        """Adopt; returns the paths that were flushed."""
        flush = layout.flush
        with mock.patch.object(layout, 'flush', side_effect=flush) as flushed:
            local.adopt(self.places, list(infos))
        return [call.args[0] for call in flushed.call_args_list]

    def _assert_refused(self, info, *texts):
        before = self._state()
        error = self.assertRaises(
            errors.StorageError, local.adopt, self.places, [info])
        for text in texts:
            self.assertIn(text, error.reason)
        self.assertTrue(error.remedy)
        # The claim too: what is here is still no server's disk.
        self.assertEqual(before, self._state())

    def test_files_are_flushed_and_the_claim_goes(self):
        disk, claim = self._volume(), self._claim()
        config = self._file('disk.config')
        inner = os.path.join(self.directory, 'swtpm', uuids.server)
        os.makedirs(inner)
        state = self._write(os.path.join(inner, 'tpm2'))

        flushed = self._adopt(self._info())

        self.assertCountEqual(
            [disk, self.pool, config, state, self.places.record_path, inner,
             os.path.dirname(inner), self.directory, self.instances], flushed)
        self.assertNotIn(claim, self._state())
        self.assertIn(disk, self._state())

    def test_what_qemu_of_another_host_owns_is_not_flushed(self):
        """The hosts share the directory, and nothing has arrived."""
        disk = self._volume()
        self._file('console.log')
        self.assertCountEqual(
            [disk, self.pool, self.places.record_path, self.directory,
             self.instances], self._adopt(self._info()))

    def test_claim_goes_when_all_is_flushed(self):
        disk, claim = self._volume(), self._claim()
        with mock.patch.object(layout, 'flush', side_effect=OSError('bad')):
            self.assertRaises(OSError, local.adopt, self.places,
                              [self._info()])
        self.assertLessEqual({disk, claim}, set(self._state()))

    def test_claim_in_the_instance_directory(self):
        claim = self._claim(in_pool=False, arrived=True)
        path = self._file('disk', record='raw')

        flushed = self._adopt({'path': path, 'type': 'raw'})

        self.assertIn(path, flushed)
        self.assertNotIn(self.pool, flushed)
        self.assertNotIn(claim, self._state())

    def test_raw_disk_in_a_pool(self):
        self._volume(record='raw')
        self.assertTrue(self._adopt(self._info(disk_format='raw')))

    def test_record_may_spell_the_pool_another_way(self):
        link = os.path.join(self.instances, 'link')
        os.symlink(self.pool, link)
        path = self._volume(record=None)
        self._record({os.path.join(link, os.path.basename(path)): 'qcow2'})
        self.assertIn(path, self._adopt(self._info()))

    def test_swap_is_not_expected(self):
        self._volume()
        self._adopt(self._info(), self._info('disk.swap'))

    def test_server_that_came_nova_s_way_is_left_alone(self):
        path = self._file('disk')
        self.assertEqual(
            [], self._adopt({'path': path, 'type': 'qcow2'}))

    def test_disk_of_a_logical_volume_is_left_alone(self):
        self.assertEqual([], self._adopt({
            'path': f'/dev/vg/{uuids.server}_disk', 'type': 'raw'}))

    def test_volume_that_is_not_here(self):
        self._claim()
        self._assert_refused(
            self._info(), self.places.volume_path('disk'),
            '/their/disks/' + self.places.volume_name('disk'))

    def test_volume_that_is_not_here_without_a_claim(self):
        self._assert_refused(self._info(), 'is not here')

    def test_file_that_is_not_here(self):
        self._claim(in_pool=False)
        self._assert_refused({
            'path': os.path.join(self.directory, 'disk'), 'type': 'qcow2'},
            'is not here')

    def test_disk_without_a_record(self):
        self._volume(record=None)
        self._assert_refused(self._info(), 'not recorded in ' +
                             self.places.record_path)

    def test_disk_of_another_format_than_on_its_source(self):
        self._volume(record='raw')
        self._assert_refused(self._info(), 'was qcow2 on its source and is '
                             'raw')

    def test_record_that_is_cut_off(self):
        self._volume()
        self._write(self.places.record_path, '')
        self._assert_refused(self._info(), 'empty or broken record of formats')

    def test_adopt_again_after_a_crash_anywhere(self):
        for name in 'fsync', 'unlink':
            for nth in itertools.count():
                disk, claims = self._volume(), [self._claim(), self._claim()]
                crashed = crashing.crashes(
                    name, nth, lambda: self._adopt(self._info()))
                self._adopt(self._info())
                self.assertEqual(
                    {}, self.places.claims())
                self.assertIn(disk, self._state())
                if not crashed:
                    break
            self.assertGreater(nth, len(claims) - 1)


class DeleteTestCase(LocalTestCase):

    def setUp(self):
        super().setUp()
        self.names = [os.path.basename(self._volume(disk))
                      for disk in ('disk', 'z')]
        self.names.append(os.path.basename(self._write(
            self.places.kept_path(self.places.volume_path('disk')))))
        self.other = self._write(os.path.join(
            self.pool, f'{uuids.other}_disk'))
        self.claim = self._claim()

    def test_volumes_are_deleted_and_the_claim_last(self):
        deleted = self._deleted(local.delete_volumes, self.places)

        self.assertEqual(os.path.basename(self.claim), deleted[-1])
        self.assertCountEqual(self.names, deleted[:-1])
        self.assertEqual([os.path.basename(self.other)],
                         os.listdir(self.pool))
        self.assertTrue(os.path.isdir(self.directory))

    def test_everything_is_deleted_and_the_claim_last(self):
        inner = self._claim(in_pool=False)

        deleted = self._deleted(local.delete_all, self.places)

        self.assertEqual(os.path.basename(self.claim), deleted[-1])
        self.assertFalse(os.path.exists(inner))
        self.assertEqual({self.other: 'data'}, self._state())

    def test_no_kept_directory_is_left_alone(self):
        kept = self._write(os.path.join(
            self.instances, f'{self.places.uuid}_resize_other'))
        os.mkdir(self.places.kept_directory)
        self._write(os.path.join(self.places.kept_directory, 'disk'))

        local.delete_all(self.places)

        self.assertEqual({self.other: 'data', kept: 'data'}, self._state())

    def test_claim_stays_if_a_volume_does(self):
        with mock.patch('os.unlink', side_effect=OSError('busy')):
            self.assertRaises(OSError, local.delete_volumes, self.places)
        self.assertIn(self.claim, self._state())

    def test_volume_that_another_deletes_at_the_same_time(self):
        def race(path):
            os.remove(path)
            raise FileNotFoundError(path)

        with mock.patch('os.unlink', race):
            local.delete_volumes(self.places)
        self.assertEqual([os.path.basename(self.other)],
                         os.listdir(self.pool))

    def test_confirm_deletes_what_was_kept(self):
        local.delete_kept(self.places)

        self.assertEqual([], self.places.kept())
        self.assertEqual(3, len(self.places.volumes()))

    def _keep(self, *paths):
        """Keep a directory with a record of these paths."""
        os.mkdir(self.places.kept_directory)
        layout.write_record(
            self.places.kept_path(self.places.record_path),
            dict.fromkeys(paths, 'qcow2'))

    def test_kept_volumes_are_those_on_record(self):
        self._keep('/elsewhere/' + self.names[0],
                   os.path.join(self.directory, 'z'))

        deleted = self._deleted(local.delete_kept_volumes, self.places)

        self.assertEqual([self.names[0]], deleted)

    def test_record_of_files_names_no_volume(self):
        self._keep(os.path.join(self.directory, 'disk'))
        before = self._state()

        local.delete_kept_volumes(self.places)

        self.assertEqual(before, self._state())

    def test_no_volume_is_deleted_without_a_record(self):
        before = self._state()

        local.delete_kept_volumes(self.places)

        self.assertEqual(before, self._state())

    def test_no_volume_is_deleted_if_the_record_is_broken(self):
        self._keep()
        self._write(self.places.kept_path(self.places.record_path), '{')
        before = self._state()

        self.assertRaises(errors.StorageError, local.delete_kept_volumes,
                          self.places)

        self.assertEqual(before, self._state())

    def test_claims_are_dropped_in_both_places(self):
        self._claim(in_pool=False)
        before = self._state()
        self.assertEqual(2, len(self.places.claims()))

        local.drop_claims(self.places)

        self.assertEqual({}, self.places.claims())
        self.assertEqual(len(before) - 2, len(self._state()))

    def test_server_that_has_nothing_here(self):
        nobody = layout.Layout.of(objects.Instance(uuid=uuids.nobody))
        before = self._state()
        for delete in (local.delete_volumes, local.delete_all,
                       local.delete_kept, local.drop_claims):
            delete(nobody)
        self.assertEqual(before, self._state())

    def test_marker_is_a_file_among_the_volumes(self):
        marker = local.make_marker(self.places)
        self.assertIn(marker, self.places.volumes())
        self.assertEqual('', self._state()[marker])


class DirectoryTestCase(LocalTestCase):
    """The instance directory, and what a migration keeps of it."""

    def setUp(self):
        super().setUp()
        self._file('disk.info', 'current')
        self.kept = self.places.kept_directory

    def _stale(self):
        os.mkdir(self.kept)
        self._write(os.path.join(self.kept, 'disk.info'), 'stale')

    def _read(self, directory):
        with open(os.path.join(directory, 'disk.info')) as file:
            return file.read()

    def test_directory_is_kept_for_a_revert(self):
        self.assertFalse(local.has_kept_directory(self.places))

        local.keep_directory(self.places)

        self.assertTrue(local.has_kept_directory(self.places))
        self.assertEqual('current', self._read(self.kept))
        self.assertFalse(os.path.exists(self.directory))

    def test_directory_does_not_replace_a_stale_one(self):
        self._stale()
        before = self._state()

        self.assertRaises(OSError, local.keep_directory, self.places)

        self.assertEqual(before, self._state())

    def test_directory_may_not_be_kept_while_it_is_in_use(self):
        self._stale()

        self.assertFalse(local.has_kept_directory(self.places))

    def test_stale_directory_is_removed(self):
        self._stale()

        local.remove_stale_directory(self.places)

        self.assertFalse(os.path.exists(self.kept))
        self.assertEqual('current', self._read(self.directory))

    def test_only_directory_is_never_removed(self):
        local.keep_directory(self.places)

        local.remove_stale_directory(self.places)

        self.assertEqual('current', self._read(self.kept))

    def test_directory_is_recovered(self):
        local.keep_directory(self.places)

        local.recover_directory(self.places)

        self.assertEqual('current', self._read(self.directory))
        self.assertFalse(os.path.exists(self.kept))

    def test_stale_directory_is_not_recovered(self):
        self._stale()
        before = self._state()

        local.recover_directory(self.places)

        self.assertEqual(before, self._state())

    def test_nothing_to_recover(self):
        before = self._state()

        local.recover_directory(self.places)

        self.assertEqual(before, self._state())

    def _replace(self):
        local.remove_stale_directory(self.places)
        local.keep_directory(self.places)

    def test_directory_survives_a_crash_anywhere(self):
        for name in 'rename', 'fsync', 'unlink', 'rmdir':
            for nth in itertools.count():
                self._stale()
                crashed = crashing.crashes(name, nth, self._replace)
                local.recover_directory(self.places)
                self.assertEqual('current', self._read(self.directory))
                local.remove_stale_directory(self.places)
                self.assertFalse(os.path.exists(self.kept))
                if not crashed:
                    break


class KeepTestCase(LocalTestCase):
    """A resize on the same host keeps the originals for a revert."""

    def setUp(self):
        super().setUp()
        for disk in 'disk', 'disk.local', 'disk.swap':
            self._volume(disk, 'old ' + disk)
        self._file('disk.config', 'old config')
        self.before = self._state()

    def _resize(self):
        """Keep, and do what the rest of a resize does."""
        local.keep(self.places)
        for disk in 'disk', 'disk.local', 'disk.eph0':
            self._volume(disk, 'new')
        self._file('disk.config', 'new')

    def _restore(self):
        """As Nova does: this first, then the directory."""
        local.restore(self.places)

    def test_originals_have_other_names(self):
        local.keep(self.places)

        self.assertEqual([], self.places.volumes())
        kept = {self.places.kept_path(path): content
                for path, content in self.before.items()
                if path != self.directory}
        self.assertEqual(
            kept | {self.directory: None, self.places.kept_directory: None},
            self._state())

    def test_restore_brings_back_what_was_and_no_more(self):
        self._resize()

        self._restore()

        self.assertEqual(self.before, self._state())

    def test_restore_goes_on_with_a_record_that_spells_the_pool_otherwise(
            self):
        link = self.pool + '-link'
        os.symlink(self.pool, link)
        self.addCleanup(os.unlink, link)
        layout.write_record(self.places.record_path, {
            os.path.join(link, os.path.basename(path)): 'qcow2'
            for path in self.places.volumes()})
        before = self._state()
        for nth in itertools.count():
            self._resize()
            crashed = crashing.crashes('replace', nth, self._restore)
            self._restore()
            self.assertEqual(before, self._state(), nth)
            if not crashed:
                break
        self.assertGreater(nth, 2)

    def test_restore_of_nothing_changes_nothing(self):
        self._restore()

        self.assertEqual(self.before, self._state())

    def test_names_are_on_stable_storage_before_the_directory_tells(self):
        calls = mock.Mock()
        with mock.patch.object(layout, 'flush') as flush, \
             mock.patch('os.rename', side_effect=os.rename) as rename:
            calls.attach_mock(flush, 'flush')
            calls.attach_mock(rename, 'rename')
            local.keep(self.places)
        self.assertEqual(
            [mock.call.flush(self.pool),
             mock.call.rename(self.directory, self.places.kept_directory)],
            calls.mock_calls[-2:])

    def test_either_may_end_anywhere_and_begin_again(self):
        for name in 'rename', 'replace', 'unlink', 'rmdir', 'mkdir':
            for nth in itertools.count():
                first = crashing.crashes(name, nth, self._resize)
                second = not first and crashing.crashes(
                    name, nth, self._restore)
                self._restore()
                self.assertEqual(self.before, self._state(), (name, nth))
                if not (first or second):
                    break


@ddt.ddt
class PoolTestCase(LocalTestCase):

    def setUp(self):
        super().setUp()
        self.host = self.useFixture(
            libvirt_storage.LibvirtStorageFixture())['source']

    @ddt.data(True, False)
    def test_pool_is_made(self, autostart):
        path = local.ensure_pool(URI, 'disks', self.pool, autostart)

        self.assertEqual(self.pool, path)
        pool = self.host.pools['disks']
        self.assertEqual((True, autostart), (pool.active, pool.autostart))
        directory = self.host.directories[self.pool]
        self.assertEqual((os.getuid(), os.getgid(), 0o755),
                         (directory.owner, directory.group, directory.mode))
        self.assertTrue(self.host.connections[0].closed)

    def test_pool_elsewhere_is_told(self):
        self.host.add_pool('disks', '/elsewhere')
        self.assertEqual('/elsewhere', local.ensure_pool(
            URI, 'disks', self.pool, True))

    def test_connection_is_closed_after_an_error(self):
        self.host.fail('conn.storagePoolDefineXML')
        self.assertRaises(libvirt_storage.libvirt.libvirtError,
                          local.ensure_pool, URI, 'disks', self.pool, True)
        self.assertTrue(self.host.connections[0].closed)

    def test_pool_ends(self):
        self.host.add_pool('ours')
        for _attempt in range(2):
            local.end_pool(URI, 'ours')
            self.assertEqual({}, self.host.pools)
        self.assertTrue(self.host.connections[-1].closed)


class ReservedTestCase(LocalTestCase):
    """What other hosts are told of space that only root may use."""

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.pool, storage_pool.RESERVED_NAME)

    def _tell(self, free, available, size=4096):
        status = mock.Mock(f_bfree=free, f_bavail=available, f_frsize=size)
        with mock.patch('os.statvfs', return_value=status):
            local.tell_reserved(self.pool)

    def test_length_of_the_file_is_the_number_of_mib(self):
        self._tell(free=1000 * 256, available=800 * 256)
        self.assertEqual(200, os.path.getsize(self.path))
        self.assertEqual(0, os.stat(self.path).st_blocks)

    def test_part_of_a_mib_counts_as_one(self):
        self._tell(free=1000, available=999)
        self.assertEqual(1, os.path.getsize(self.path))

    def test_change_is_told(self):
        for reserved in 300, 200, 400:
            self._tell(free=units.Mi, available=units.Mi - reserved * 256)
            self.assertEqual(reserved, os.path.getsize(self.path))

    def test_nothing_is_written_without_a_change(self):
        self._tell(free=1024, available=0)
        before = os.stat(self.path).st_ctime_ns
        self._tell(free=2048, available=1024)
        self.assertEqual(before, os.stat(self.path).st_ctime_ns)

    def test_no_file_where_nothing_is_reserved(self):
        self._tell(free=1024, available=1024)
        self.assertFalse(os.path.exists(self.path))
        self._tell(free=1024, available=0)
        self._tell(free=1024, available=1024)
        self.assertFalse(os.path.exists(self.path))
