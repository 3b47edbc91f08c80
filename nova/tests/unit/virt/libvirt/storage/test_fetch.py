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
from oslo_utils import units

from nova import exception
from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import fetch
from nova.virt.libvirt.storage import image
from nova.virt.libvirt import storage_migrate

URI = 'qemu+tls://dest/system'
PATH = '/var/lib/nova/instances/_base/0123'


class FetchTestCase(test.NoDBTestCase):
    """A file of the host 'dest', which 'source' fetches."""

    def setUp(self):
        super().setUp()
        self.hosts = self.useFixture(
            libvirt_storage.LibvirtStorageFixture('source', ['dest']))
        self.here, self.there = self.hosts['source'], self.hosts['dest']
        self.content = libvirt_storage.Content.draw('A-B-')
        self.there.add_file(PATH, self.content)
        self.here.directories[
            os.path.dirname(PATH)] = libvirt_storage.FakeDirectory()
        self.came = []
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.fetch._put_in_place', self._come))

    def _come(self, part, path, length):
        file = self.here.files[part]
        self.came.append((file.content.copy(), file.owner, path, length))

    def _fetch(self):
        return fetch.fetch('qemu:///system', 'dest', URI, PATH, 'fetch')

    def _assert_no_traces(self):
        for host in (self.here, self.there):
            self.assertEqual({}, host.pools)
            self.assertEqual([], host.open_streams)
            self.assertTrue(all(connection.closed
                                for connection in host.connections))
        self.assertEqual([], list(self.here.files))

    def test_file_comes_and_is_nova_s(self):
        self._fetch()
        self.assertEqual(
            [(self.content, os.geteuid(), PATH, self.content.size)],
            self.came)
        self._assert_no_traces()

    def test_pool_of_the_directory_is_used_and_stays(self):
        self.there.add_pool('theirs', os.path.dirname(PATH))
        self._fetch()
        self.assertEqual(['theirs'], list(self.there.pools))
        self.assertEqual(1, len(self.came))

    def test_part_that_a_dead_attempt_left_goes(self):
        self.here.add_file(PATH + '.part', b'of a dead attempt')
        self._fetch()
        self.assertEqual(self.content, self.came[0][0])
        self._assert_no_traces()

    def test_file_is_not_there_either(self):
        self.there.remove_file(PATH)
        error = self.assertRaises(fetch.FetchError, self._fetch)
        for text in (PATH, f'host dest ({URI})', 'matching name'):
            self.assertIn(text, str(error))
        self._assert_no_traces()

    def test_copy_fails(self):
        self.there.fail('stream.recv')
        self.assertRaises(fetch.FetchError, self._fetch)
        self.assertEqual([], self.came)
        self._assert_no_traces()

    def test_host_does_not_answer(self):
        self.there.open_error = (
            libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC,
            'No route to host')
        error = self.assertRaises(fetch.FetchError, self._fetch)
        self.assertIn('No route to host', str(error))


class PutInPlaceTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        directory = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(directory, 'base')
        self.part = self.path + '.part'
        with open(self.part, 'wb') as file:
            file.write(b'new')

    def _content(self):
        with open(self.path, 'rb') as file:
            return file.read()

    def test_whole_file_gets_its_name_when_it_is_on_stable_storage(self):
        with mock.patch('os.fsync') as fsync:
            fetch._put_in_place(self.part, self.path, 3)
        self.assertEqual(2, fsync.call_count)
        self.assertEqual(b'new', self._content())

    def test_file_that_is_there_stays(self):
        with open(self.path, 'wb') as file:
            file.write(b'in use')
        fetch._put_in_place(self.part, self.path, 3)
        self.assertEqual(b'in use', self._content())

    def test_file_of_another_size_is_refused(self):
        self.assertRaises(
            OSError, fetch._put_in_place, self.part, self.path, 4)
        self.assertFalse(os.path.exists(self.path))


@ddt.ddt
class DriverTestCase(test_storage_migrate.DriverTestCase):

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration_legacy=True, group='libvirt')
        self.fetch = self.useFixture(fixtures.MockPatchObject(
            fetch, 'fetch')).mock
        self.lost = exception.ImageNotFound(image_id=uuids.image)

    def _fetch_base(self, fallback):
        backend = mock.Mock(spec_set=imagebackend.Qcow2)
        self.driver._try_fetch_image_cache(
            backend, mock.sentinel.fetch_func, self.context, 'name',
            uuids.image, self.instance, 7, fallback)
        return backend

    def _assert_fetched(self, path):
        self.fetch.assert_called_once_with(
            self.driver._uri(), 'dest', URI, path, mock.ANY, mock.ANY)

    def test_base_image_that_glance_lost_comes_over_libvirt(self):
        with mock.patch.object(
                driver.LibvirtDriver, '_try_fetch_image_cache',
                side_effect=self.lost):
            backend = self._fetch_base('dest')
        backend.cache.assert_called_once_with(
            fetch_func=mock.ANY, filename='name', size=7)
        backend.cache.call_args.kwargs['fetch_func'](target='/base')
        self._assert_fetched('/base')

    @mock.patch.object(driver.LibvirtDriver, '_try_fetch_image_cache')
    def test_base_image_that_glance_has_is_nova_s(self, nova):
        backend = self._fetch_base('dest')
        nova.assert_called_once()
        backend.cache.assert_not_called()

    def test_base_image_that_nobody_has(self):
        with mock.patch.object(
                driver.LibvirtDriver, '_try_fetch_image_cache',
                side_effect=self.lost):
            self.assertRaises(
                exception.ImageNotFound, self._fetch_base, None)

    def test_kernel_that_glance_lost_comes_over_libvirt(self):
        with mock.patch.object(driver.LibvirtDriver, '_try_fetch_image',
                               side_effect=self.lost):
            self.driver._try_fetch_image(
                self.context, '/kernel', uuids.kernel, self.instance, 'dest')
            self._assert_fetched('/kernel')
            self.assertRaises(
                exception.ImageNotFound, self.driver._try_fetch_image,
                self.context, '/kernel', uuids.kernel, self.instance)

    def test_failure_is_told(self):
        self.fetch.side_effect = fetch.FetchError('/base', 'dest', URI, 'why')
        error = self.assertRaises(
            exception.MigrationError, self.driver._fetch_file, self.instance,
            'dest', '/base')
        for text in ('/base', 'dest', URI, 'why'):
            self.assertIn(text, str(error))

    @ddt.data((True, False), (False, True))
    @ddt.unpack
    def test_server_with_files_needs_both_options(self, upload, legacy):
        self.flags(vol_upload_migration=upload,
                   vol_upload_migration_legacy=legacy, group='libvirt')
        with mock.patch.object(
                driver.LibvirtDriver, '_try_fetch_image_cache') as cache:
            self._fetch_base('dest')
        self.assertEqual('dest', cache.call_args.args[-1])
        with mock.patch.object(
                driver.LibvirtDriver, '_try_fetch_image') as kernel:
            self.driver._try_fetch_image(
                self.context, '/kernel', uuids.kernel, self.instance, 'dest')
        self.assertEqual('dest', kernel.call_args.args[-1])

    def test_server_with_volumes_needs_one(self):
        self.flags(vol_upload_migration_legacy=False, group='libvirt')
        self._add_disk()
        self.assertTrue(self.driver._needs_no_ssh(self.instance))

    def _kernel(self):
        self.flags(force_raw_images=False)
        kernel = self.driver.image_backend.by_name(
            self.instance, 'kernel', 'raw')
        fetch_func = mock.Mock(side_effect=self.lost)
        return kernel, fetch_func

    def test_kernel_that_came_along_is_not_fetched(self):
        with open(os.path.join(self.directory, 'kernel'), 'w'):
            pass
        kernel, fetch_func = self._kernel()
        self.assertIsInstance(kernel, image.BootFile)
        kernel.cache(fetch_func, 'name', image_id=uuids.kernel)
        fetch_func.assert_not_called()

    def test_kernel_that_is_not_there_is_fetched(self):
        kernel, fetch_func = self._kernel()
        self.assertRaises(exception.ImageNotFound, kernel.cache, fetch_func,
                          'name', image_id=uuids.kernel)

    def test_kernel_is_nova_s_with_the_option_off(self):
        self.flags(vol_upload_migration=False, group='libvirt')
        self.assertIs(imagebackend.Flat, type(self._kernel()[0]))

    def test_kernel_goes_with_a_server_in_the_pool(self):
        self._add_disk()
        path = self._add_file('kernel', b'a kernel')
        self._migrate()
        self.assertEqual(
            b'a kernel', self.dest.files[path].content.read(0, units.Ki))

    @mock.patch.object(storage_migrate, 'check_hooks', mock.Mock())
    @mock.patch.object(driver.LibvirtDriver, 'init_host', mock.Mock())
    def test_base_images_are_in_a_pool(self):
        cache = self.driver.image_cache_manager.cache_dir
        self.driver.init_host('source')
        self.driver.init_host('source')
        pool = self.source.pools['nova-image-cache']
        # It starts with nova-compute, not with a daemon that is to come up.
        self.assertEqual((cache, True, False),
                         (pool.path, pool.active, pool.autostart))

    @mock.patch.object(storage_migrate, 'check_hooks', mock.Mock())
    @mock.patch.object(driver.LibvirtDriver, 'init_host', mock.Mock())
    def test_pool_that_somebody_has_of_the_base_images_is_used(self):
        cache = self.driver.image_cache_manager.cache_dir
        self.source.add_pool('theirs', cache)
        self.driver.init_host('source')
        self.assertCountEqual(
            ['nova-disks', 'theirs'], self.source.pools)
