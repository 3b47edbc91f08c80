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
import subprocess
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova import objects
from nova import test
from nova.virt import images
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import layout

# A header that a guest may write into a raw disk.
HEADER = b'QFI\xfb' + b'\0' * 508


class PoolTestCase(test.NoDBTestCase):
    """A host with an empty pool, and an empty instances directory."""

    def setUp(self):
        super().setUp()
        self.pool = self.useFixture(fixtures.TempDir()).path
        self.instances = self.useFixture(fixtures.TempDir()).path
        self.flags(instances_path=self.instances)
        self.flags(use_storage_pools=True, disks_pool_path=self.pool,
                   group='libvirt')


class BackendTestCase(PoolTestCase):
    """A server whose instance directory is empty."""

    def setUp(self):
        super().setUp()
        self.instance = objects.Instance(uuid=uuids.instance)
        self.places = layout.Layout.of(self.instance)
        self.directory = self.places.directory
        os.mkdir(self.directory)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.privsep.path.utime', lambda path: None))

    def _backend(self, use_cow=True):
        return image.Backend(use_cow)

    def _by_name(self, name='disk', use_cow=True, image_type=None):
        return self._backend(use_cow).by_name(
            self.instance, name, image_type)

    def _write(self, path, data=b''):
        with open(path, 'wb') as file:
            file.write(data)

    def _volume(self, name='disk', data=b'', disk_format='qcow2'):
        path = self.places.volume_path(name)
        self._write(path, data)
        if disk_format:
            self._record(**{name: disk_format})
        return path

    def _record(self, **formats):
        layout.write_record(self.places.record_path, self.places.formats() | {
            self.places.volume_path(name): disk_format
            for name, disk_format in formats.items()})


@ddt.ddt
class ChoiceTestCase(BackendTestCase):
    """Which disk is a volume, and of what format."""

    def test_new_disk_is_a_volume_named_after_server_and_disk(self):
        disk = self._by_name('disk.local')
        self.assertIs(image.Qcow2Volume, type(disk))
        self.assertEqual(
            os.path.join(self.pool, f'{uuids.instance}_disk.local'),
            disk.path)
        self.assertFalse(disk.is_file_in_instance_path())

    # libvirtd would probe what a guest wrote into a raw one.
    @ddt.data((True, None, image.Qcow2Volume),
              (True, 'default', image.Qcow2Volume),
              (True, 'qcow2', image.Qcow2Volume),
              (True, 'raw', image.FullVolume),
              (True, 'flat', image.FullVolume),
              (False, None, image.FullVolume),
              (False, 'default', image.FullVolume),
              (False, 'qcow2', image.Qcow2Volume),
              (False, 'raw', image.FullVolume),
              (False, 'flat', image.FullVolume))
    @ddt.unpack
    def test_new_disk_is_always_qcow2(self, use_cow, image_type, volume):
        disk = self._by_name(use_cow=use_cow, image_type=image_type)
        self.assertIs(volume, type(disk))
        self.assertEqual('qcow2', disk.driver_format)
        self.assertEqual('qcow2', self.places.format(disk.path))

    @ddt.data('rbd', 'lvm', 'ploop')
    def test_other_image_types_are_refused(self, image_type):
        error = self.assertRaises(
            exception.InternalError, self._by_name, image_type=image_type)
        self.assertIn('images_type', str(error))
        self.assertIn(image_type, str(error))

    def test_format_is_recorded_in_the_instance_directory(self):
        disk = self._by_name()
        self.assertEqual(
            os.path.join(self.directory, 'disk.info'), disk.disk_info_path)
        self.assertEqual({disk.path: 'qcow2'}, self.places.formats())
        self.assertEqual([], os.listdir(self.pool))

    @ddt.data(True, False)
    def test_disk_recorded_as_raw_stays_raw(self, use_cow):
        self._volume(data=HEADER, disk_format='raw')
        disk = self._by_name(use_cow=use_cow)
        self.assertIs(image.RawVolume, type(disk))
        self.assertEqual('raw', disk.driver_format)

    @ddt.data('raw', 'qcow2')
    def test_format_of_a_used_disk_is_never_probed(self, disk_format):
        path = self._volume(data=HEADER, disk_format=disk_format)
        with mock.patch('nova.virt.images.qemu_img_info') as info:
            for disk in (self._by_name(), self._by_name(use_cow=False),
                         self._backend().by_libvirt_path(
                             self.instance, path, disk_format)):
                self.assertEqual(disk_format, disk.driver_format)
        info.assert_not_called()

    @ddt.data(HEADER, b'\0' * 512)
    def test_used_disk_whose_format_is_not_recorded_is_an_error(self, data):
        path = self._volume(data=data, disk_format=None)
        for find in (self._by_name,
                     lambda: self._by_name(use_cow=False),
                     lambda: self._backend().by_libvirt_path(
                         self.instance, path, 'qcow2')):
            error = self.assertRaises(exception.InvalidDiskInfo, find)
            self.assertIn(path, str(error))
            self.assertIn(self.places.record_path, str(error))
        self.assertEqual({}, self.places.formats())

    def test_record_of_a_disk_with_another_spelling_counts(self):
        link = os.path.join(self.useFixture(fixtures.TempDir()).path, 'link')
        os.symlink(self.pool, link)
        path = self._volume(data=HEADER, disk_format=None)
        layout.write_record(self.places.record_path, {
            os.path.join(link, os.path.basename(path)): 'raw'})
        self.assertIs(image.RawVolume, type(self._by_name()))

    @ddt.data(b'', b'{', b'[]', b'qcow2')
    def test_unreadable_record_is_an_error(self, data):
        self._volume()
        self._write(self.places.record_path, data)
        error = self.assertRaises(exception.InvalidDiskInfo, self._by_name)
        self.assertIn(self.places.record_path, str(error))

    def test_server_from_before_keeps_its_disks_in_its_directory(self):
        self._write(os.path.join(self.directory, 'disk'))
        for name in ('disk', 'disk.swap', 'disk.local'):
            disk = self._by_name(name)
            self.assertIs(imagebackend.Qcow2, type(disk))
            self.assertEqual(os.path.join(self.directory, name), disk.path)

    def test_new_disk_goes_where_the_server_s_other_disks_are(self):
        for name in 'disk.config', 'kernel', 'console.log':
            self._write(os.path.join(self.directory, name))
        self.assertIs(image.Qcow2Volume, type(self._by_name('disk.eph0')))
        self._volume()
        # A file that a crash of an early release left beside the volumes.
        self._write(os.path.join(self.directory, 'disk.swap'))
        self.assertIs(image.Qcow2Volume, type(self._by_name('disk.eph0')))
        os.unlink(self.places.volume_path('disk'))
        self.assertIs(imagebackend.Qcow2, type(self._by_name('disk.eph0')))

    def test_volume_is_found_after_the_option_was_switched_off(self):
        self._volume()
        self.flags(use_storage_pools=False, group='libvirt')
        self.assertIs(image.Qcow2Volume, type(self._by_name()))
        self.assertIs(imagebackend.Qcow2, type(self._by_name('disk.eph0')))

    def test_files_of_nova_stay_in_the_instance_directory(self):
        self._volume()
        for name in ('disk.config', 'kernel', 'ramdisk', 'disk.rescue'):
            disk = self._by_name(name, image_type='raw')
            self.assertIs(imagebackend.Flat, type(disk))
            self.assertEqual(os.path.join(self.directory, name), disk.path)

    def test_disk_is_found_by_the_path_that_libvirt_knows(self):
        path = self._volume()
        disk = self._backend().by_libvirt_path(self.instance, path, 'qcow2')
        self.assertIs(image.Qcow2Volume, type(disk))
        self.assertEqual(path, disk.path)
        self.assertEqual(self.places.record_path, disk.disk_info_path)

    def test_disk_is_found_by_its_path_in_place_of_its_name(self):
        path = self._volume()
        disk = self._by_name(path)
        self.assertIs(image.Qcow2Volume, type(disk))
        self.assertEqual(path, disk.path)

    def test_legacy_disk_is_found_by_its_path(self):
        path = os.path.join(self.directory, 'disk')
        self._write(path)
        found = self._backend().by_libvirt_path(self.instance, path, 'qcow2')
        for disk in found, self._by_name(path):
            self.assertIs(imagebackend.Qcow2, type(disk))
            self.assertEqual(path, disk.path)

    def test_absolute_name_elsewhere_is_nova_s(self):
        # Nova names the disks of a server that it starts by their paths, and
        # a legacy one may be missing.
        path = os.path.join(self.directory, 'disk')
        disk = self._by_name(path)
        self.assertIs(imagebackend.Qcow2, type(disk))
        self.assertEqual(path, disk.path)

    def test_preallocation_is_tried_in_the_pool(self):
        for nova in imagebackend.Flat, imagebackend.Qcow2:
            self.useFixture(fixtures.MockPatchObject(
                nova, 'can_fallocate', False, create=True))
        for volume in image.Qcow2Volume, image.FullVolume, image.RawVolume:
            self.assertIsNone(volume.can_fallocate)


class ListTestCase(BackendTestCase):

    def test_overlays_are_the_volumes_recorded_as_qcow2(self):
        path = self._volume('disk')
        raw = self._volume('disk.local', disk_format='raw')
        self._record(**{'disk.gone': 'qcow2'})
        self.assertEqual([path], image.list_overlays())
        self.assertEqual([raw], image.list_raw())
        os.rename(self.directory, self.places.kept_directory)
        self.assertEqual([path], image.list_overlays())
        self.assertEqual([raw], image.list_raw())

    def test_disks_in_instance_directories_are_nova_s(self):
        path = os.path.join(self.directory, 'disk')
        self._write(path)
        for disk_format in 'qcow2', 'raw':
            layout.write_record(
                self.places.record_path, {path: disk_format})
            self.assertEqual([], image.list_overlays())
            self.assertEqual([], image.list_raw())

    def test_kept_files_may_have_a_base_image(self):
        """Nova does not list servers that are on other hosts by now."""
        formats = {}
        for name, disk_format in (('disk', 'qcow2'), ('disk.eph0', 'qcow2'),
                                  ('disk.local', 'raw')):
            path = os.path.join(self.directory, name)
            self._write(path, HEADER)
            formats[path] = disk_format
        layout.write_record(self.places.record_path, formats)
        os.rename(self.directory, self.places.kept_directory)
        kept = [os.path.join(self.places.kept_directory, name)
                for name in ('disk', 'disk.eph0')]
        self.assertCountEqual(kept, image.list_overlays())

        self._write(self.places.kept_path(self.places.record_path), b'{')
        self.assertCountEqual(
            [*kept, self.places.kept_path(os.path.join(
                self.directory, 'disk.local'))], image.list_overlays())

    def test_without_a_record_each_image_may_have_a_base(self):
        paths = [self._volume('disk', HEADER),
                 self.places.kept_path(self.places.volume_path('disk'))]
        self._write(paths[1], HEADER)
        self._volume('disk.local', b'\0' * 512)
        self._write(os.path.join(self.pool, uuids.other + '_disk'), HEADER)
        for data in b'{', b'':
            self._write(self.places.record_path, data)
            self.assertCountEqual(paths, image.list_overlays())
            self.assertEqual([], image.list_raw())
        self.assertIn(
            'empty or broken record of formats', self.stdlog.logger.output)


class QemuTestCase(BackendTestCase):
    """Disks that are made by qemu-img, of a base image in the cache."""

    SIZE = 2 * units.Mi

    def setUp(self):
        super().setUp()
        self.cache_dir = layout.cache_dir()
        os.mkdir(self.cache_dir)
        self.base = os.path.join(self.cache_dir, 'base')
        self.content = (os.urandom(64 * units.Ki) +
                        bytes(128 * units.Ki) + b'the end').ljust(
                            units.Mi, b'\0')

    def _fetch(self, target, **kwargs):
        self._write(target, self.content)

    def _cache(self, disk, size=None):
        disk.cache(self._fetch, 'base', size, image_id=uuids.image)

    def _info(self, path):
        return images.qemu_img_info(path, 'qcow2')

    def _read(self, path):
        """The content of the disk in an image."""
        raw = os.path.join(self.instances, 'raw')
        processutils.execute(
            'qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path, raw)
        with open(raw, 'rb') as file:
            return file.read()

    def test_overlay_has_a_base_in_the_cache(self):
        disk = self._by_name()
        self._cache(disk, self.SIZE)
        self.assertEqual(self.base, self._info(disk.path).backing_file)
        self.assertEqual(
            self.content.ljust(self.SIZE, b'\0'), self._read(disk.path))

    def test_full_image_has_the_data_and_no_base(self):
        disk = self._by_name(use_cow=False)
        self._cache(disk, self.SIZE)
        os.unlink(self.base)
        info = self._info(disk.path)
        self.assertEqual(('qcow2', None, self.SIZE),
                         (info.file_format, info.backing_file,
                          info.virtual_size))
        self.assertEqual(
            self.content.ljust(self.SIZE, b'\0'), self._read(disk.path))
        # Holes stay holes.
        self.assertLess(os.path.getsize(disk.path), units.Mi)

    def test_full_image_of_a_qcow2_base(self):
        raw = os.path.join(self.instances, 'template')
        self._write(raw, self.content)
        disk = self._by_name(use_cow=False)

        def fetch(target, **kwargs):
            processutils.execute('qemu-img', 'convert', '-f', 'raw',
                                 '-O', 'qcow2', raw, target)

        disk.cache(fetch, 'base', image_id=uuids.image)
        os.unlink(self.base)
        self.assertIsNone(self._info(disk.path).backing_file)
        self.assertEqual(self.content, self._read(disk.path))

    def test_disk_that_is_there_needs_no_base_image(self):
        disk = self._by_name(use_cow=False)
        self._cache(disk, self.SIZE)
        os.unlink(self.base)
        fetch = mock.Mock()
        for use_cow in True, False:
            self._by_name(use_cow=use_cow).cache(
                fetch, 'base', self.SIZE, image_id=uuids.image)
        fetch.assert_not_called()
        self.assertEqual([], os.listdir(self.cache_dir))

    def test_overlay_that_is_there_gets_its_base_image_back(self):
        disk = self._by_name()
        self._cache(disk, self.SIZE)
        os.unlink(self.base)
        self._cache(self._by_name(use_cow=False), self.SIZE)
        self.assertEqual(self.base, self._info(disk.path).backing_file)
        self.assertEqual(
            self.content.ljust(self.SIZE, b'\0'), self._read(disk.path))

    def test_flattened_overlay_needs_no_base_image(self):
        disk = self._by_name()
        self._cache(disk, self.SIZE)
        processutils.execute(
            'qemu-img', 'rebase', '-f', 'qcow2', '-b', '', disk.path)
        os.unlink(self.base)
        fetch = mock.Mock()
        self._by_name().cache(fetch, 'base', image_id=uuids.image)
        fetch.assert_not_called()

    def test_full_image_that_is_not_complete_is_deleted(self):
        disk = self._by_name(use_cow=False)
        execute = processutils.execute

        def fail(*command, **kwargs):
            if 'rebase' in command:
                raise processutils.ProcessExecutionError('no room')
            return execute(*command, **kwargs)

        with mock.patch.object(processutils, 'execute', fail):
            self.assertRaises(processutils.ProcessExecutionError,
                              self._cache, disk)
        self.assertFalse(disk.exists())

    def test_disk_is_preallocated(self):
        self.flags(preallocate_images='space')
        for use_cow in True, False:
            disk = self._by_name(use_cow=use_cow)
            self._cache(disk, self.SIZE)
            self.assertEqual('native', disk.driver_io)
            self.assertGreaterEqual(
                os.stat(disk.path).st_blocks * 512, self.SIZE)
            self.assertEqual(self.content.ljust(self.SIZE, b'\0'),
                             self._read(disk.path))
            os.unlink(disk.path)

    def test_disk_grows_even_if_its_base_image_has_the_new_size(self):
        # As an ephemeral disk, whose base image is made with its size.
        disk = self._by_name('disk.eph0')
        self._cache(disk)
        self.assertEqual(units.Mi, self._info(disk.path).virtual_size)
        os.truncate(self.base, self.SIZE)
        self._cache(disk, self.SIZE)
        self.assertEqual(self.SIZE, self._info(disk.path).virtual_size)

    def test_disk_never_shrinks(self):
        disk = self._by_name(use_cow=False)
        self._cache(disk, self.SIZE)
        self._cache(disk, units.Mi)
        self.assertEqual(self.SIZE, self._info(disk.path).virtual_size)

    def test_raw_disk_grows_without_being_probed(self):
        path = self._volume(data=HEADER, disk_format='raw')
        with mock.patch('nova.virt.images.qemu_img_info') as info:
            for size in self.SIZE, units.Mi:
                self._by_name().cache(
                    mock.Mock(), 'base', size, image_id=uuids.image)
        info.assert_not_called()
        self.assertEqual(self.SIZE, os.path.getsize(path))


class BootFileTestCase(BackendTestCase):
    """The kernel of a server, which a migration brings along."""

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration=True, group='libvirt')
        self.flags(force_raw_images=False)
        self.fetch = mock.Mock(
            side_effect=exception.ImageNotFound(image_id=uuids.kernel))

    def _kernel(self):
        return self._by_name('kernel', image_type='raw')

    def test_kernel_that_came_along_is_not_fetched(self):
        path = os.path.join(self.directory, 'kernel')
        self._write(path, b'a kernel')
        kernel = self._kernel()
        self.assertIs(image.BootFile, type(kernel))
        self.assertEqual(path, kernel.path)
        kernel.cache(self.fetch, 'name', image_id=uuids.kernel)
        self.fetch.assert_not_called()

    def test_kernel_that_is_not_there_is_fetched(self):
        self.assertRaises(
            exception.ImageNotFound, self._kernel().cache, self.fetch,
            'name', image_id=uuids.kernel)

    def test_kernel_is_nova_s_with_the_option_off(self):
        self.flags(vol_upload_migration=False, group='libvirt')
        self.assertIs(imagebackend.Flat, type(self._kernel()))


@ddt.ddt
class FileTestCase(BackendTestCase):
    """A server whose disks are files, and whose image Glance has lost."""

    def setUp(self):
        super().setUp()
        self.flags(use_storage_pools=False, vol_upload_migration=True,
                   group='libvirt')
        self.path = os.path.join(self.directory, 'disk')
        self.fetch = mock.Mock(side_effect=exception.ImageNotFound(
            image_id='a'))

    def _image(self, *options):
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', *options, self.path,
             '1M'], check=True)
        layout.write_record(self.places.record_path, {self.path: 'qcow2'})

    def _cache(self, use_cow=True, size=2 * units.Mi):
        self._by_name(use_cow=use_cow).cache(self.fetch, 'lost', size)

    def _size(self):
        said = subprocess.check_output(
            ['qemu-img', 'info', '-f', 'qcow2', '--output=json', self.path])
        return jsonutils.loads(said)['virtual-size']

    @ddt.data(True, False)
    def test_image_without_a_base_needs_none(self, use_cow):
        self._image()
        self._cache(use_cow)
        self.fetch.assert_not_called()
        self.assertEqual(2 * units.Mi, self._size())

    def test_raw_disk_needs_none_and_is_not_probed(self):
        self._write(self.path, HEADER)
        layout.write_record(self.places.record_path, {self.path: 'raw'})
        with mock.patch('nova.virt.images.qemu_img_info') as info:
            self._cache(use_cow=False)
        info.assert_not_called()
        self.fetch.assert_not_called()
        self.assertEqual(2 * units.Mi, os.path.getsize(self.path))
        self._cache(use_cow=False, size=None)
        self.assertEqual(2 * units.Mi, os.path.getsize(self.path))

    @ddt.data('disk', 'disk.local')
    def test_raw_disk_stays_raw_where_new_ones_are_images(self, name):
        """A live migration converts nothing, and the guest writes headers."""
        path = os.path.join(self.directory, name)
        self._write(path, HEADER)
        layout.write_record(self.places.record_path, {path: 'raw'})
        with mock.patch('nova.virt.images.qemu_img_info') as info:
            # Nova names the type of images when it starts a server.
            for found, image_type in (
                    (name, None), (path, None), (name, 'default'),
                    (name, 'qcow2')):
                disk = self._by_name(found, image_type=image_type)
                self.assertEqual(('raw', path),
                                 (disk.driver_format, disk.path))
                disk.cache(self.fetch, 'lost', 2 * units.Mi)
        info.assert_not_called()
        self.assertEqual(2 * units.Mi, os.path.getsize(path))

    @ddt.data(True, False)
    def test_empty_record_is_written_anew(self, use_cow):
        """As Nova does. It can come of a crash, and no guest can empty it."""
        self._image()
        self._write(self.places.record_path)
        self.assertEqual('qcow2', self._by_name(use_cow=use_cow).driver_format)
        self.assertEqual({self.path: 'qcow2'}, self.places.formats())
        self._write(self.places.record_path)
        os.mkdir(layout.cache_dir())
        self._by_name('disk.swap', use_cow).cache(
            lambda target, **kwargs: self._write(target, bytes(units.Mi)),
            'swap_1', units.Mi, safe=True)
        self.assertEqual({os.path.join(self.directory, 'disk.swap'):
                          'qcow2' if use_cow else 'raw'},
                         self.places.formats())

    def test_raw_disk_whose_path_is_spelled_another_way(self):
        link = os.path.join(self.useFixture(fixtures.TempDir()).path, 'link')
        os.symlink(self.directory, link)
        self._write(self.path, HEADER)
        layout.write_record(self.places.record_path,
                            {os.path.join(link, 'disk'): 'raw'})
        self.assertEqual('raw', self._by_name().driver_format)

    def test_rescue_disk_is_as_this_host_makes_them(self):
        path = os.path.join(self.directory, 'disk.rescue')
        layout.write_record(self.places.record_path, {path: 'raw'})
        self._write(path, HEADER)
        self.assertEqual('qcow2', self._by_name('disk.rescue').driver_format)

    @ddt.data((True, 'raw', 'qcow2'), (False, 'qcow2', 'raw'))
    @ddt.unpack
    def test_new_disk_has_no_older_one_s_format(self, use_cow, old, new):
        path = os.path.join(self.directory, 'disk.swap')
        os.mkdir(layout.cache_dir())
        layout.write_record(self.places.record_path,
                            {path: old, self.path: 'raw'})

        def make(target, **kwargs):
            self._write(target, bytes(units.Mi))

        self._by_name('disk.swap', use_cow).cache(
            make, 'swap_1', units.Mi, safe=True)

        self.assertEqual({path: new, self.path: 'raw'},
                         self.places.formats())
        for use_cow in True, False:
            self.assertEqual(
                new, self._by_name('disk.swap', use_cow).driver_format)

    def test_overlay_needs_its_base(self):
        base = os.path.join(self.instances, 'base')
        self._write(base, b'x' * units.Mi)
        self._image('-b', base, '-F', 'raw')
        self.assertRaises(exception.ImageNotFound, self._cache)

    def test_new_disk_needs_its_base(self):
        self.assertRaises(exception.ImageNotFound, self._cache)

    @ddt.data(True, False)
    def test_nova_has_its_own_way_without_the_option(self, use_cow):
        self.flags(vol_upload_migration=False, group='libvirt')
        self.assertIn(type(self._by_name(use_cow=use_cow)),
                      (imagebackend.Flat, imagebackend.Qcow2))

    @ddt.data('lvm', 'rbd')
    def test_disks_that_are_no_files_are_novas(self, image_type):
        backend = mock.Mock()
        with mock.patch.object(image.Backend, 'backend',
                               return_value=backend):
            self.assertIs(backend.return_value,
                          self._by_name(image_type=image_type))
