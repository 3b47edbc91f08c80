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

import fixtures
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import image


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

    def setUp(self):
        super().setUp()
        self.instance = objects.Instance(uuid=uuids.instance)
        self.directory = os.path.join(self.instances, uuids.instance)
        os.mkdir(self.directory)

    def _backend(self, use_cow=True):
        return image.Backend(use_cow)

    def _by_name(self, name='disk', use_cow=True, image_type=None):
        return self._backend(use_cow).by_name(
            self.instance, name, image_type)

    def _write(self, path, data=b''):
        with open(path, 'wb') as file:
            file.write(data)

    def _volume(self, name='disk', data=b''):
        path = image.volume_path(self.instance, name)
        self._write(path, data)
        return path

    def _record(self, **formats):
        self._write(image.disk_info_path(self.instance), jsonutils.dumps({
            image.volume_path(self.instance, name): disk_format
            for name, disk_format in formats.items()}).encode())

    def test_new_disk_is_a_volume_named_after_server_and_disk(self):
        disk = self._by_name('disk.local')
        self.assertIsInstance(disk, image.Qcow2Volume)
        self.assertEqual(
            os.path.join(self.pool, f'{uuids.instance}_disk.local'),
            disk.path)

    def test_disk_is_raw_without_cow_images(self):
        disk = self._by_name(use_cow=False)
        self.assertIsInstance(disk, image.RawVolume)
        self.assertEqual('raw', disk.driver_format)

    def test_image_type_decides_on_the_format(self):
        self.assertIsInstance(
            self._by_name(image_type='raw'), image.RawVolume)
        self.assertIsInstance(
            self._by_name(use_cow=False, image_type='qcow2'),
            image.Qcow2Volume)

    def test_other_image_types_are_refused(self):
        error = self.assertRaises(
            exception.InternalError, self._by_name, image_type='rbd')
        self.assertIn('images_type', str(error))

    def test_format_is_recorded_in_the_instance_directory(self):
        disk = self._by_name()
        self.assertEqual(
            os.path.join(self.directory, 'disk.info'), disk.disk_info_path)
        self.assertEqual(
            'qcow2', image.recorded_format(self.instance, disk.path))
        self.assertEqual([], os.listdir(self.pool))

    def test_raw_disk_stays_raw_on_a_host_with_cow_images(self):
        self._record(disk='raw')
        self._volume(data=b'QFI\xfb' + b'\0' * 508)
        disk = self._by_name(use_cow=True)
        self.assertIsInstance(disk, image.RawVolume)
        self.assertEqual('raw', disk.driver_format)

    def test_format_of_a_used_disk_is_never_probed(self):
        self._volume(data=b'QFI\xfb' + b'\0' * 508)
        with mock.patch('nova.virt.images.qemu_img_info') as info:
            disk = self._by_name(use_cow=False)
        info.assert_not_called()
        self.assertEqual('raw', disk.driver_format)

    def test_unreadable_record_is_an_error(self):
        self._volume()
        self._write(image.disk_info_path(self.instance), b'{')
        self.assertRaises(exception.InvalidDiskInfo, self._by_name)

    def test_server_from_before_keeps_its_disks_in_its_directory(self):
        self._write(os.path.join(self.directory, 'disk'))
        for name in ('disk', 'disk.swap', 'disk.local'):
            disk = self._by_name(name)
            self.assertIs(imagebackend.Qcow2, type(disk))
            self.assertEqual(os.path.join(self.directory, name), disk.path)

    def test_volume_is_found_after_the_option_was_switched_off(self):
        self._volume()
        self.flags(use_storage_pools=False, group='libvirt')
        self.assertIsInstance(self._by_name(), image.Qcow2Volume)
        self.assertIs(imagebackend.Qcow2, type(self._by_name('disk.eph0')))

    def test_files_of_nova_stay_in_the_instance_directory(self):
        for name in ('disk.config', 'kernel', 'ramdisk', 'disk.rescue'):
            disk = self._by_name(name, image_type='raw')
            self.assertIs(imagebackend.Flat, type(disk))
            self.assertEqual(os.path.join(self.directory, name), disk.path)

    def test_disk_is_found_by_the_path_that_libvirt_knows(self):
        path = self._volume()
        disk = self._backend().by_libvirt_path(self.instance, path, 'qcow2')
        self.assertIsInstance(disk, image.Qcow2Volume)
        self.assertEqual(path, disk.path)
        self.assertEqual(
            image.disk_info_path(self.instance), disk.disk_info_path)

    def test_disk_is_found_by_its_path_in_place_of_its_name(self):
        path = self._volume()
        disk = self._by_name(path)
        self.assertIsInstance(disk, image.Qcow2Volume)
        self.assertEqual(path, disk.path)

    def test_legacy_disk_is_found_by_its_path(self):
        path = os.path.join(self.directory, 'disk')
        disk = self._backend().by_libvirt_path(self.instance, path, 'qcow2')
        self.assertIs(imagebackend.Qcow2, type(disk))

    @mock.patch('nova.virt.disk.api.extend')
    def test_disk_grows_even_if_its_base_image_has_the_new_size(self, extend):
        disk = self._by_name('disk.local')
        self._volume('disk.local')
        base_dir = os.path.join(self.instances, '_base')
        os.mkdir(base_dir)
        self._write(os.path.join(base_dir, 'ephemeral_2'))
        with mock.patch.object(disk, 'get_disk_size',
                               return_value=2 * units.Gi):
            disk.cache(mock.Mock(), 'ephemeral_2', 2 * units.Gi, safe=True)
        model, size = extend.call_args.args
        self.assertEqual((disk.path, 2 * units.Gi), (model.path, size))

    @mock.patch('nova.privsep.path.utime', new=lambda path: None)
    def test_new_raw_disk_takes_the_format_of_its_base_image(self):
        disk = self._by_name(use_cow=False)
        base = os.path.join(self.instances, 'base')
        self._write(base, b'\0' * 512)

        def copy(source, target):
            self._write(target)

        with mock.patch('nova.virt.libvirt.utils.copy_image', copy), \
             mock.patch('nova.virt.images.qemu_img_info') as info:
            info.return_value.file_format = 'qcow2'
            disk.create_image(mock.Mock(), base, None, image_id=uuids.image)
        self.assertEqual('qcow2', disk.driver_format)
        self.assertEqual(
            'qcow2', image.recorded_format(self.instance, disk.path))
        self.assertFalse(disk._making)

    def test_overlays_are_the_volumes_recorded_as_qcow2(self):
        path = self._volume('disk')
        self._volume('disk.local')
        self._record(**{'disk': 'qcow2', 'disk.local': 'raw',
                        'disk.gone': 'qcow2'})
        self.assertEqual([path], image.list_overlays())
        os.rename(self.directory, self.directory + '_resize')
        self.assertEqual([path], image.list_overlays())

    def test_preallocation_is_tried_in_the_pool(self):
        with mock.patch.object(imagebackend.Flat, 'can_fallocate', False,
                               create=True):
            self.assertIsNone(image.RawVolume.can_fallocate)

    def test_volumes_and_files_are_told_apart(self):
        self.assertFalse(image.has_volumes(self.instance))
        self.assertFalse(image.has_files(self.instance))
        for name in ('disk.config', 'disk.info', 'console.log'):
            self._write(os.path.join(self.directory, name))
        self.assertFalse(image.has_files(self.instance))
        self._write(os.path.join(self.directory, 'disk.eph0'))
        self.assertTrue(image.has_files(self.instance))
        self._volume('disk.swap')
        self.assertTrue(image.has_volumes(self.instance))
        self.assertFalse(image.has_volumes(
            objects.Instance(uuid=uuids.other)))
