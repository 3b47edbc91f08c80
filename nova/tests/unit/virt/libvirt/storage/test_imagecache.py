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
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova.tests.unit.virt.libvirt.storage import test_image
from nova.virt.libvirt import imagecache as nova_imagecache
from nova.virt.libvirt.storage import imagecache


@ddt.ddt
class ImageCacheTestCase(test_image.PoolTestCase):

    def setUp(self):
        super().setUp()
        self.manager = imagecache.ImageCacheManager()
        os.mkdir(self.manager.cache_dir)
        self.base = os.path.join(self.manager.cache_dir, 'abc')

    def _add_volume(self, disk_format, uuid=uuids.instance):
        path = os.path.join(self.pool, f'{uuid}_disk')
        directory = os.path.join(self.instances, uuid)
        os.mkdir(directory)
        with open(os.path.join(directory, 'disk.info'), 'w') as record:
            record.write(jsonutils.dumps({path: disk_format}))
        with open(path, 'w'):
            pass
        return path

    def _list(self, error=None):
        """List the images in use, where every overlay is one on abc."""
        self.manager.unexplained_images = [self.base]
        with mock.patch('nova.virt.libvirt.utils.get_disk_backing_file',
                        return_value='abc',
                        side_effect=error) as self.backing_file:
            return self.manager._list_backing_images()

    def test_base_image_of_a_volume_is_in_use(self):
        path = self._add_volume('qcow2')
        self.assertEqual([self.base], self._list())
        self.assertEqual([], self.manager.unexplained_images)
        self.backing_file.assert_called_once_with(path, format='qcow2')

    def test_raw_volume_is_not_looked_into(self):
        self._add_volume('raw')
        self.assertEqual([], self._list())
        self.backing_file.assert_not_called()

    def test_volume_that_is_being_deleted_has_no_base_image(self):
        path = self._add_volume('qcow2')

        def fail(*args, **kwargs):
            os.unlink(path)
            raise exception.DiskNotFound(location=path)

        self.assertEqual([], self._list(fail))

    def test_nothing_is_removed_if_a_volume_cannot_be_read(self):
        self._add_volume('qcow2')
        self.assertRaises(exception.InvalidDiskInfo, self._list,
                          exception.InvalidDiskInfo(reason='broken'))

    def test_broken_record_of_one_server_stops_no_other(self):
        """Whatever is an image may have a base image; the rest goes on."""
        broken = self._add_volume('qcow2')
        for path, data in (
                (os.path.join(self.instances, uuids.instance, 'disk.info'),
                 b'{'), (broken, b'QFI\xfb')):
            with open(path, 'wb') as file:
                file.write(data)
        good = self._add_volume('qcow2', uuids.other)

        self.assertEqual([self.base], self._list())

        self.assertCountEqual(
            [mock.call(broken, format='qcow2'),
             mock.call(good, format='qcow2')],
            self.backing_file.call_args_list)
        self.assertEqual([], self.manager.unexplained_images)

    def test_other_images_are_not_in_use(self):
        self.assertEqual([], self._list())
        self.assertEqual([self.base], self.manager.unexplained_images)

    def _update(self, *names, add=None):
        """Which of these old base images stay if an overlay is on the first.

        It is that of no server that Nova knows to be on this host.
        """
        (add or self._add_volume)('qcow2')
        for name in names:
            path = os.path.join(self.manager.cache_dir, name)
            with open(path, 'w'):
                os.utime(path, (0, 0))
        with mock.patch('nova.virt.libvirt.utils.get_disk_backing_file',
                        return_value=names[0]), \
             mock.patch('nova.objects.BlockDeviceMappingList.'
                        'bdms_by_instance_uuid', return_value={}), \
             mock.patch('nova.privsep.path.utime'):
            self.manager.update(mock.sentinel.context, [])
        return os.listdir(self.manager.cache_dir)

    def test_base_image_of_a_disk_kept_for_a_revert_stays(self):
        kept, other = '0' * 40, '1' * 40
        self.assertEqual([kept], self._update(kept, other))

    def test_base_of_an_ephemeral_disk_kept_for_a_revert_stays(self):
        kept, other = 'ephemeral_1_40d1d2c', 'ephemeral_2_40d1d2c'
        self.assertEqual([kept], self._update(kept, other))

    def _add_kept_file(self, disk_format):
        """A disk in a file, whose instance directory has been renamed."""
        directory = os.path.join(self.instances, uuids.instance)
        os.mkdir(directory + '_resize')
        for name, text in (
                ('disk', ''), ('disk.info', jsonutils.dumps(
                    {os.path.join(directory, 'disk'): disk_format}))):
            with open(os.path.join(directory + '_resize', name), 'w') as file:
                file.write(text)

    @ddt.data('0' * 40, 'ephemeral_1_40d1d2c', 'swap_64')
    def test_base_of_a_file_kept_for_a_revert_stays(self, kept):
        self.assertEqual([kept], self._update(
            kept, kept.translate({ord('0'): '1', ord('4'): '5'}),
            add=self._add_kept_file))

    def test_base_of_a_swap_disk_kept_for_a_revert_stays(self):
        self.assertEqual(['swap_64'], self._update('swap_64', 'swap_128'))

    def _usage(self, devices):
        """What the cache takes if directories are on these devices."""
        with mock.patch.object(nova_imagecache.ImageCacheManager,
                               'get_disk_usage', return_value=7), \
             mock.patch('os.stat') as stat:
            stat.side_effect = lambda path: mock.Mock(st_dev=devices[path])
            return self.manager.get_disk_usage()

    def test_cache_takes_space_from_a_pool_on_its_file_system(self):
        self.assertEqual(7, self._usage(
            {self.pool: 1, self.manager.cache_dir: 1}))

    def test_cache_takes_nothing_from_a_pool_elsewhere(self):
        self.assertEqual(0, self._usage(
            {self.pool: 2, self.manager.cache_dir: 1}))
