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

"""Nova's own tests of image backends, with disks in a storage pool."""

import unittest

import fixtures

from nova.tests.unit.virt.libvirt import test_imagebackend
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import layout

# They count the look-ups of files, of which a disk in the pool has one more,
# or say of every file that it is there, and this disk is asked for its size.
NOT_OF_A_POOL = (
    'test_cache',
    'test_cache_base_dir_exists',
    'test_cache_image_exists',
    'test_cache_template_exists',
    'test_prealloc_image',
    'test_prealloc_image_without_write_access',
)

# The format of a raw disk is never guessed, and its size is that of the file.
NOT_OF_A_RAW_DISK = (
    'test_cache_generating_resize',
    'test_correct_format',
    'test_create_image_extend',
)


def without(*names):
    """Expect that these tests fail: one that does not is to be run."""
    def change(case):
        for name in names:
            test = getattr(case, name)

            def expected_to_fail(self, *args, _test=test, **kwargs):
                return _test(self, *args, **kwargs)

            setattr(case, name, unittest.expectedFailure(expected_to_fail))
        return case
    return change


class VolumeMixin:
    """Have Nova's tests use a class of disks in the pool."""

    def setUp(self):
        super().setUp()
        self.flags(disks_pool_path=self.useFixture(fixtures.TempDir()).path,
                   group='libvirt')
        self.image_class = self.VOLUME
        self.PATH = layout.Layout.of(self.INSTANCE).volume_path(self.NAME)
        self.useFixture(fixtures.MockPatchObject(
            layout, 'backing_file', return_value=self.TEMPLATE_PATH))


@without(*NOT_OF_A_POOL, *NOT_OF_A_RAW_DISK)
class RawVolumeTestCase(VolumeMixin, test_imagebackend.FlatTestCase):
    VOLUME = image.RawVolume


@without(*NOT_OF_A_POOL)
class Qcow2VolumeTestCase(VolumeMixin, test_imagebackend.Qcow2TestCase):
    VOLUME = image.Qcow2Volume
