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


import dataclasses
import os
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import pool

UUID = '11111111-2222-3333-4444-555555555555'
ATTEMPT = '66666666-7777-8888-9999-000000000000'


@ddt.ddt
class NamesTestCase(test.NoDBTestCase):
    """The names on disk, a protocol between hosts and between releases.

    Nothing here may change.
    """

    def setUp(self):
        super().setUp()
        self.places = layout.Layout(UUID, '/disks', '/instances/' + UUID)
        self.claim = layout.Claim(UUID, ATTEMPT, 'source')

    def test_disk(self):
        self.assertEqual(f'{UUID}_disk', self.places.volume_name('disk'))
        self.assertEqual(f'/disks/{UUID}_disk.eph0',
                         self.places.volume_path('disk.eph0'))
        self.assertEqual(f'{UUID}_', self.places.prefix)

    def test_disk_in_a_volume_group(self):
        # As Nova's own LVM backend calls it.
        places = dataclasses.replace(
            self.places, group_path=layout.group_path('vg'))
        file, = places.plan([{
            'path': f'/dev/vg/{UUID}_disk.eph0', 'type': 'raw',
            'virt_disk_size': 5}])
        self.assertEqual(
            layout.File(f'{UUID}_disk.eph0', layout.GROUP,
                        f'/dev/vg/{UUID}_disk.eph0', 'raw', size=5), file)
        self.assertEqual(file.path, places.path(file))
        self.assertEqual('nova-group-', layout.GROUP_MARK)

    def test_what_a_resize_on_the_same_host_keeps(self):
        self.assertEqual(f'{UUID}-resize_', self.places.kept_prefix)
        self.assertEqual(
            f'/disks/{UUID}-resize_disk',
            self.places.kept_path(f'/disks/{UUID}_disk'))
        self.assertEqual(f'/instances/{UUID}_resize',
                         self.places.kept_directory)
        self.assertEqual(
            f'/instances/{UUID}_resize/disk.config',
            self.places.kept_path(f'/instances/{UUID}/disk.config'))

    def test_claim(self):
        self.assertEqual(f'{UUID}_incoming-{ATTEMPT}@source', self.claim.name)

    def test_claim_of_a_complete_copy(self):
        self.assertEqual(f'{UUID}_arrived-{ATTEMPT}@source',
                         self.claim.arrived_name)

    def test_claim_of_a_host_with_any_name(self):
        claim = layout.Claim(UUID, ATTEMPT, 'a/b@c d')
        self.assertEqual(f'{UUID}_incoming-{ATTEMPT}@a%2Fb%40c%20d',
                         claim.name)
        self.assertEqual(claim, layout.Claim.parse(UUID, claim.name))

    def test_transient_pool(self):
        self.assertEqual(f'nova-{UUID}', self.places.transient_pool)

    def test_file_that_tells_of_space_for_root(self):
        self.assertEqual('nova-reserved', pool.RESERVED_NAME)

    def test_files_of_the_instance_directory(self):
        self.assertEqual(f'/instances/{UUID}/disk.info',
                         self.places.record_path)
        self.assertEqual(f'/instances/{UUID}/swtpm',
                         self.places.saved_vtpm_path)
        self.assertEqual(f'/var/lib/libvirt/swtpm/{UUID}',
                         self.places.vtpm_path)

    @ddt.data('incoming', 'arrived')
    def test_claim_of_either_kind_is_read(self, kind):
        self.assertEqual(self.claim, layout.Claim.parse(
            UUID, f'{UUID}_{kind}-{ATTEMPT}@source'))

    @ddt.data(('incoming', ''), ('incoming-0a1b', '0a1b'),
              ('arrived-0a1b', '0a1b'), ('incoming0a1b', '0a1b'))
    @ddt.unpack
    def test_claim_of_an_old_release_is_a_claim(self, name, attempt):
        self.assertEqual(layout.Claim(UUID, attempt, ''),
                         layout.Claim.parse(UUID, f'{UUID}_{name}'))

    @ddt.data(f'{UUID}_disk', f'{UUID}-resize_disk', f'{UUID}',
              f'{ATTEMPT}_incoming-{ATTEMPT}@source', 'incoming', 'disk.info')
    def test_other_names_are_no_claims(self, name):
        self.assertIsNone(layout.Claim.parse(UUID, name))

    def test_new_claim_is_one_of_this_host(self):
        self.flags(host='this')
        first, second = layout.Claim.new(UUID), layout.Claim.new(UUID)
        self.assertEqual((UUID, 'this'), (first.uuid, first.source))
        self.assertNotEqual(first, second)

    @ddt.data(f'{UUID}_disk', f'{UUID}-resize_disk', f'/a/{UUID}_disk',
              f'/b/{UUID}-resize_disk', 'disk', f'/instances/{UUID}/disk')
    def test_disk_is_known_by_any_of_its_names(self, name):
        self.assertEqual('disk', self.places.disk_name(name))

    def test_path_of_a_file(self):
        for name, place, path in (
                (f'{UUID}_disk', layout.POOL, f'/disks/{UUID}_disk'),
                ('disk.info', layout.DIRECTORY,
                 f'/instances/{UUID}/disk.info')):
            file = layout.File(name, place, '/elsewhere')
            self.assertEqual(path, self.places.path(file))


class LayoutTestCase(test.NoDBTestCase):
    """A server on a host whose directories have two names each."""

    def setUp(self):
        super().setUp()
        top = self.useFixture(fixtures.TempDir()).path
        self.pool, self.instances, self.other = (
            os.path.join(top, name) for name in (
                'pool', 'instances', 'other'))
        for path in self.pool, self.instances, self.other:
            os.mkdir(path)
        self.link = os.path.join(top, 'link')
        os.symlink(self.pool, self.link)
        self.flags(instances_path=self.instances)
        self.flags(disks_pool_path=self.pool, group='libvirt')
        self.places = layout.Layout.of(objects.Instance(uuid=UUID))
        os.mkdir(self.places.directory)
        os.mkdir(layout.cache_dir())

    def _write(self, path, data=b''):
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def _add(self, disk='disk', disk_format='raw', **info):
        """A disk in the pool."""
        path = self._write(self.places.volume_path(disk))
        return self._info(path, disk_format, **info)

    def _add_file(self, disk='disk', disk_format='raw', **info):
        """A disk in the instance directory."""
        path = self._write(os.path.join(self.places.directory, disk))
        return self._info(path, disk_format, **info)

    def _info(self, path, disk_format, recorded=True, **info):
        """What Nova says of a disk."""
        if recorded:
            layout.write_record(self.places.record_path,
                                self.places.formats() | {path: disk_format})
        return dict(path=path, type=disk_format, backing_file='', **info)


class LookUpTestCase(LayoutTestCase):

    def test_layout_of_a_server(self):
        self.flags(disks_pool_path=self.pool + '/', group='libvirt')
        self.assertEqual(self.places, layout.Layout.of(
            objects.Instance(uuid=UUID)))

    def test_nothing_is_there(self):
        os.rmdir(self.places.directory)
        for names in (self.places.volumes(), self.places.kept(),
                      self.places.claims(), self.places.formats()):
            self.assertFalse(names)
        self.assertFalse(self.places.has_volume('disk'))
        self.assertFalse(self.places.has_files())

    def test_volumes_and_what_is_kept_are_told_apart(self):
        for name in (f'{UUID}_disk', f'{UUID}-resize_disk', f'{UUID}_z',
                     f'{uuids.other}_disk', f'a{UUID}_disk'):
            self._write(os.path.join(self.pool, name))
        self.assertCountEqual(
            [f'{self.pool}/{UUID}_disk', f'{self.pool}/{UUID}_z'],
            self.places.volumes())
        self.assertEqual([f'{self.pool}/{UUID}-resize_disk'],
                         self.places.kept())
        self.assertTrue(self.places.has_volume('disk'))
        self.assertFalse(self.places.has_volume('disk.eph0'))

    def test_pool_path_is_no_pattern(self):
        strange = os.path.join(self.other, '[a]*?')
        os.mkdir(strange)
        self.flags(disks_pool_path=strange, group='libvirt')
        places = layout.Layout.of(objects.Instance(uuid=UUID))
        path = self._write(places.volume_path('disk'))
        self.assertEqual([path], places.volumes())

    def test_disks_in_the_instance_directory(self):
        for name in 'disk.config', 'disk.info', 'console.log', 'kernel':
            self._write(os.path.join(self.places.directory, name))
        self.assertFalse(self.places.has_files())
        self._write(os.path.join(self.places.directory, 'disk.eph0'))
        self.assertTrue(self.places.has_files())

    def test_claims_are_found_in_both_places(self):
        claims = [layout.Claim.new(UUID) for _ in range(2)]
        paths = [
            self._write(os.path.join(self.pool, claims[0].name)),
            self._write(os.path.join(self.places.directory,
                                     claims[1].arrived_name))]
        self._add()
        self._write(os.path.join(
            self.pool, layout.Claim.new(uuids.other).name))
        self.assertEqual(dict(zip(paths, claims)), self.places.claims())

    def test_cache(self):
        self.assertEqual(os.path.join(self.instances, '_base'),
                         layout.cache_dir())


@ddt.ddt
class RecordTestCase(LayoutTestCase):

    def test_record_is_what_nova_reads(self):
        layout.write_record(self.places.record_path, {'/a': 'raw'})
        with open(self.places.record_path) as record:
            text = record.read()
        self.assertEqual('{"/a": "raw"}\n', text)
        self.assertEqual(text.encode(), layout.record_bytes({'/a': 'raw'}))
        self.assertEqual(
            0o644, os.stat(self.places.record_path).st_mode & 0o777)
        self.assertEqual({'/a': 'raw'}, self.places.formats())

    def test_record_is_replaced_as_a_whole(self):
        layout.write_record(self.places.record_path, {'/a': 'raw'})
        with mock.patch('os.replace', side_effect=test.TestingException):
            self.assertRaises(
                test.TestingException, layout.write_record,
                self.places.record_path, {'/b': 'raw'})
        self.assertEqual({'/a': 'raw'}, self.places.formats())

    def test_record_is_on_stable_storage_before_it_has_its_name(self):
        calls = mock.Mock()
        with mock.patch('os.fsync', side_effect=os.fsync) as fsync, \
             mock.patch('os.replace', side_effect=os.replace) as replace:
            calls.attach_mock(fsync, 'fsync')
            calls.attach_mock(replace, 'replace')
            layout.write_record(self.places.record_path, {})
        self.assertEqual(['fsync', 'replace', 'fsync'],
                         [call[0] for call in calls.mock_calls])

    @ddt.data(b'', b'{', b'[]', b'null', b'\xff')
    def test_record_that_is_empty_or_broken(self, data):
        self._write(self.places.record_path, data)
        for read in (self.places.formats, self.places.names_volumes,
                     lambda: self.places.format('/a'),
                     lambda: self.places.record([], self.places)):
            error = self.assertRaises(errors.StorageError, read)
            self.assertIn(
                f'empty or broken record of formats {self.places.record_path}',
                error.reason)
            self.assertTrue(error.remedy)

    def test_format_by_any_spelling_of_the_directory(self):
        path = self._add()['path']
        linked = os.path.join(self.link, os.path.basename(path))
        self.assertEqual('raw', self.places.format(path))
        self.assertEqual('raw', self.places.format(linked))
        layout.write_record(self.places.record_path, {linked: 'qcow2'})
        self.assertEqual('qcow2', self.places.format(path))

    def test_format_of_a_disk_of_the_same_name_elsewhere_is_another(self):
        name = os.path.basename(self._add()['path'])
        self.assertIsNone(self.places.format(
            os.path.join(self.other, name)))
        self.assertIsNone(self.places.format('/not/there/' + name))

    def test_record_names_volumes(self):
        self.assertFalse(self.places.names_volumes())
        self._add_file()
        self.assertFalse(self.places.names_volumes())
        layout.write_record(
            self.places.record_path, {f'/other/host/{UUID}_disk': 'raw'})
        self.assertTrue(self.places.names_volumes())

    def test_record_for_another_host(self):
        files = self.places.plan([
            self._add('disk', 'qcow2'), self._add('disk.eph0'),
            self._add_file('disk.config')])
        self._info(self.places.volume_path('disk.swap'), 'qcow2')
        config = os.path.join(self.places.directory, 'disk.config')
        there = layout.Layout(UUID, '/srv/disks', self.places.directory)
        self.assertEqual({
            f'/srv/disks/{UUID}_disk': 'qcow2',
            f'/srv/disks/{UUID}_disk.eph0': 'raw',
            config: 'raw'}, self.places.record(files, there))


@ddt.ddt
class PlanTestCase(LayoutTestCase):

    def _assert_refused(self, info, *texts):
        error = self.assertRaises(
            errors.Refused, self.places.plan, [info])
        for text in (info['path'], *texts):
            self.assertIn(text, error.reason)
        self.assertTrue(error.remedy)

    def test_disks_and_companions(self):
        disk = self._add('disk', 'qcow2')['path']
        local = self._add('disk.eph0')['path']
        for name in 'kernel', 'ramdisk', 'console.log':
            self._write(os.path.join(self.places.directory, name))
        infos = [self._info(disk, 'qcow2'), self._info(local, 'raw')]
        kernel, ramdisk = (os.path.join(self.places.directory, name)
                           for name in ('kernel', 'ramdisk'))
        self.assertEqual([
            layout.File(f'{UUID}_disk', layout.POOL, disk, 'qcow2'),
            layout.File(f'{UUID}_disk.eph0', layout.POOL, local, 'raw'),
            layout.File('kernel', layout.DIRECTORY, kernel,
                        has_hostile_head=True),
            layout.File('ramdisk', layout.DIRECTORY, ramdisk,
                        has_hostile_head=True),
        ], self.places.plan(infos))

    @ddt.data(('qcow2', 0), ('raw', layout.HEAD_BYTES))
    @ddt.unpack
    def test_head_that_a_guest_wrote(self, disk_format, length):
        file, = self.places.plan([self._add_file('disk', disk_format)])
        self.assertEqual(length, file.head_bytes)

    def test_own_base_needs_room_beside_its_copy_in_the_disk(self):
        path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'ephemeral_1_a')
        with open(path, 'wb') as file:
            file.write(b'a' * 8192)
            file.flush()
            os.fsync(file.fileno())
        files = self.places.plan([], [path])
        size = os.stat(path).st_blocks * 512
        self.assertEqual({layout.POOL: size, layout.DIRECTORY: size},
                         layout.room(files))
        other = dataclasses.replace(files[0], name='base_0123')
        self.assertEqual({layout.POOL: 0, layout.DIRECTORY: size},
                         layout.room([other]))

    def test_base_images_go_along(self):
        base, = self.places.plan([], ['/_base/0123'])
        self.assertEqual(
            layout.File('base_0123', layout.DIRECTORY, '/_base/0123',
                        has_hostile_head=True), base)

    @ddt.data('disk', 'disk.local', 'disk.eph0', 'disk.eph12', 'disk.config')
    def test_disk_that_nova_made(self, name):
        for info in self._add(name), self._add_file(name):
            self.assertEqual(
                [info['path']],
                [file.path for file in self.places.plan([info])
                 if file.format])

    def test_swap_is_made_anew(self):
        infos = [self._add('disk'), self._add('disk.swap')]
        self.assertEqual([infos[0]], layout.without_swap(infos))
        self.assertEqual(1, len(self.places.plan(infos)))

    def test_disk_of_a_domain_that_spells_the_pool_another_way(self):
        self._add()
        linked = os.path.join(self.link, f'{UUID}_disk')
        file, = self.places.plan([self._info(linked, 'raw', recorded=False)])
        self.assertEqual(
            (f'{UUID}_disk', layout.POOL, linked, 'raw'),
            (file.name, file.place, file.path, file.format))

    def test_config_drive_goes_once(self):
        file, = self.places.plan([self._add_file('disk.config')])
        self.assertEqual('raw', file.format)

    def test_config_drive_that_no_domain_has_goes_along(self):
        path = self._write(
            os.path.join(self.places.directory, 'disk.config'))
        self.assertEqual(
            [layout.File('disk.config', layout.DIRECTORY, path,
                         has_hostile_head=True)],
            self.places.plan([]))

    def test_config_drive_needs_no_record(self):
        info = self._add_file('disk.config', recorded=False)
        self.assertEqual('raw', self.places.plan([info])[0].format)

    def test_nothing_to_copy(self):
        self.assertEqual([], self.places.plan([]))

    def test_disk_elsewhere_is_refused(self):
        path = self._write(os.path.join(self.other, f'{UUID}_disk'))
        self._assert_refused(self._info(path, 'raw'), self.pool,
                             self.places.directory)

    @ddt.data('disk.snap1', 'disk.qcow2', 'disk.eph', 'diskette',
              'disk.rescue', 'disk.config.1')
    def test_external_snapshot_is_refused(self, name):
        for info in self._add(name), self._add_file(name):
            self._assert_refused(info, 'is not one that Nova made')

    def test_volume_of_another_server_is_refused(self):
        path = self._write(os.path.join(self.pool, f'{uuids.other}_disk'))
        self._assert_refused(self._info(path, 'raw'))

    def test_disk_without_a_record_is_refused(self):
        self._assert_refused(self._add(recorded=False),
                             self.places.record_path)

    def test_disk_whose_domain_has_another_format_is_refused(self):
        info = self._add('disk', 'raw')
        self._assert_refused(dict(info, type='qcow2'),
                             'the domain says qcow2 and disk.info raw of')

    def test_broken_record_is_an_error(self):
        info = self._add()
        self._write(self.places.record_path, b'')
        self.assertRaises(errors.StorageError, self.places.plan, [info])

    def _overlay(self, base):
        info = dict(self._add('disk', 'qcow2'),
                    backing_file=os.path.basename(base or 'gone'))
        with mock.patch('nova.virt.libvirt.utils.get_disk_backing_file',
                        return_value=base) as look:
            try:
                return self.places.plan([info])
            except errors.Refused as error:
                self.assertIn(info['path'], error.reason)
                self.assertIn(base, error.reason)
                self.assertIn('blockcommit --shallow', error.remedy)
                return None
            finally:
                look.assert_called_once_with(
                    info['path'], basename=False, format='qcow2')

    def test_overlay_on_the_image_cache(self):
        base = os.path.join(layout.cache_dir(), 'abc')
        self.assertEqual(1, len(self._overlay(base)))
        self.assertEqual(1, len(self._overlay(None)))

    def test_overlay_on_a_cache_with_another_name(self):
        link = os.path.join(self.other, 'base')
        os.symlink(layout.cache_dir(), link)
        self.assertEqual(1, len(self._overlay(os.path.join(link, 'abc'))))

    def test_overlay_on_another_disk_is_refused(self):
        for base in (os.path.join(self.places.directory, 'disk'),
                     os.path.join(self.pool, f'{UUID}_disk.snap'),
                     '/not/there'):
            self.assertIsNone(self._overlay(base))

    def test_raw_disk_is_never_looked_into(self):
        info = dict(self._add(), backing_file='abc')
        with mock.patch('nova.virt.images.qemu_img_info') as look:
            self.places.plan([info])
        look.assert_not_called()

    def test_disk_that_cannot_be_read_is_no_overlay_on_nothing(self):
        info = dict(self._add('disk', 'qcow2'), backing_file='abc')
        with mock.patch('nova.virt.images.qemu_img_info',
                        side_effect=exception.InvalidDiskInfo(reason='x')):
            self.assertRaises(
                exception.InvalidDiskInfo, self.places.plan, [info])

    def test_allocation(self):
        path = self._write(self.places.volume_path('disk'), b'x' * 8192)
        os.truncate(path, 1 << 30)
        file = layout.File('disk', layout.POOL, path)
        self.assertEqual(os.stat(path).st_blocks * 512, file.allocation())
        self.assertLess(file.allocation(), 1 << 20)
        self.assertEqual(3, layout.File(
            'disk.info', layout.DIRECTORY, path, data=b'{}\n').allocation())
