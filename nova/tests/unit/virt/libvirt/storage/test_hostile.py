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
import libvirt
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova import objects
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage import test_directory
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import overlay
from nova.virt.libvirt import storage_migrate

BAIT = '/proc/kmsg'
# What a guest wrote to the start of its raw disk, and more behind it.
HOSTILE = libvirt_storage.qcow2_header(units.Mi, BAIT).ljust(
    2 * layout.HEAD_BYTES, b'x')

LOST = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
        'cannot write to stream: No space left on device')


class HostileTestCase(test_directory.DirectoryTestCase):
    """A server whose guest wants libvirtd to open a file.

    :ivar opened: backing files that a daemon found in the directory of a pool
    """

    def setUp(self):
        super().setUp()
        self.opened = []
        refresh = libvirt_storage.FakeHost.refresh

        def probe(host, pool):
            refresh(host, pool)
            self.opened += [
                file.backing('qcow2') for path, file in host.files.items()
                if os.path.dirname(path) == pool.path and
                file.backing('qcow2')]

        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.libvirt_storage.FakeHost.refresh', probe))

    def _add_hostile(self, *names):
        self._add_files()
        for name in names:
            self._add_file(name, HOSTILE)

    def _assert_arrived(self, *names):
        for name in names:
            file = self.dest.files[os.path.join(self.directory, name)]
            self.assertEqual(HOSTILE, file.content.read(0, file.content.size))


@ddt.ddt
class MigrateTestCase(HostileTestCase):

    def test_fake_follows_a_header_that_is_in_a_pool(self):
        self.dest.add_pool('theirs', '/srv/raw')
        self.dest.add_file('/srv/raw/disk', HOSTILE)
        self.dest.connect().storagePoolLookupByName('theirs').refresh()
        self.assertEqual([BAIT], self.opened)

    def test_nothing_is_probed_on_the_way(self):
        names = 'disk.eph0', 'disk.config', 'kernel', 'ramdisk'
        self._add_hostile(*names)
        self._migrate()
        self._assert_arrived(*names)
        self.assertEqual([], self.opened)
        self.assertEqual({}, self.dest.pools)

    def test_nor_is_what_goes_beside_a_pool(self):
        self.flags(use_storage_pools=True, group='libvirt')
        self.dest.add_pool(
            'nova-disks', '/srv/disks', mode=0o755, **test_directory.NOVA)
        self._add_disk(disk_format='qcow2')
        self._add_file('kernel', HOSTILE)
        self._migrate()
        self._assert_arrived('kernel')
        self.assertEqual([], self.opened)
        self.assertEqual(['nova-disks'], list(self.dest.pools))

    def test_directory_that_may_be_hostile_is_not_looked_into(self):
        self._add_files()
        self.dest.add_file(os.path.join(self.directory, 'disk'), HOSTILE)
        self.before = self._state()
        self._assert_refused('is there already')
        self.assertEqual([], self.opened)

    def test_shared_directory_is_not_looked_into(self):
        self._add_hostile('disk.eph0')

        def share():
            for name in os.listdir(self.instances):
                self.dest.add_file(os.path.join(self.instances, name))

        self.dest.add_file(
            os.path.join(self.directory, 'disk.eph0'), HOSTILE)
        self.dest.call('conn.storagePoolCreateXML', share, times=None)
        self._migrate()
        self.nova.assert_called_once()
        self.assertEqual([], self.opened)

    def test_head_is_not_read_back_by_libvirt(self):
        self.flags(vol_upload_migration_verify='checksum', group='libvirt')
        self._add_hostile('disk.eph0')
        result = jsonutils.loads(self._migrate())
        path = os.path.join(self.directory, 'disk.eph0')
        self.assertEqual(
            layout.digest(HOSTILE[:layout.HEAD_BYTES]),
            local.heads(result)[path])
        offsets = [stream.offset for stream in self.dest.streams
                   if stream.way == 'download' and
                   stream.name == 'disk.eph0']
        self.assertEqual([layout.HEAD_BYTES], offsets)
        self.assertEqual([], self.opened)

    @ddt.data(layout.HEAD_BYTES - 1, layout.HEAD_BYTES,
              layout.HEAD_BYTES + 1, 0)
    def test_length_around_that_of_a_head(self, length):
        self._add_files()
        content = HOSTILE[:length]
        self._add_file('disk.eph0', content)
        self._migrate()
        file = self.dest.files[os.path.join(self.directory, 'disk.eph0')]
        self.assertEqual(content, file.content.read(0, units.Mi))
        self.assertEqual([], self.opened)


class FailureTestCase(HostileTestCase):
    """What is left when the first bytes of a disk are on their way."""

    def setUp(self):
        super().setUp()
        self._add_hostile('disk.eph0')

    def _fail(self):
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertTrue(os.path.isdir(self.directory))
        self.assertEqual('power_on', self.calls.mock_calls[-1][0])
        return str(error)

    def test_copy_whose_heads_were_sent_is_left_alone(self):
        with mock.patch.object(
                local, 'keep_directory', side_effect=OSError):
            self._fail()
        self._assert_arrived('disk.eph0')
        self.assertEqual(1, len(self._markers()))
        self.driver._leftovers.retry()
        self.assertFalse(self.driver._leftovers)
        self.calls.reset_mock()
        self.before = self._state()
        self._assert_refused('is there already', 'nova-compute there')
        self.assertEqual([], self.opened)

    def test_copy_goes_if_the_pool_does_not_end(self):
        self.dest.fail('pool.destroy', error=LOST,
                       name=self.places.transient_pool)
        self._fail()
        self._assert_nothing_on_destination()
        self.assertEqual([], self.opened)

    def test_error_while_a_head_is_sent_names_the_file(self):
        self.dest.call(
            'pool.destroy',
            lambda: self.dest.fail('stream.send', error=LOST),
            name=self.places.transient_pool)
        message = self._fail()
        for text in 'disk', 'host dest', 'No space left on device':
            self.assertIn(text, message)
        self.assertEqual([], self.opened)
        self.assertEqual([], self.dest.open_streams)

    def _other(self, kind):
        claim = layout.Claim(uuids.instance, 'other', 'source')
        name = claim.name if kind == layout.CLAIM else claim.arrived_name
        self.dest.add_file(os.path.join(self.instances, name))

    def test_attempt_that_was_superseded_sends_no_head(self):
        self.dest.call('vol.upload', lambda: self._other(layout.CLAIM),
                       name=layout.RECORD)
        self.assertIn('another attempt', self._fail())
        self.assertEqual([], self.opened)
        self.assertNotEqual(
            HOSTILE, self.dest.files[os.path.join(
                self.directory, 'disk.eph0')].content.read(0, units.Mi))

    def test_attempt_that_comes_late_makes_no_pool_of_a_complete_copy(self):
        self._other(layout.CLAIM)
        self.dest.add_file(
            os.path.join(self.directory, 'disk.eph0'), b'\0' * len(HOSTILE))

        def arrive():
            # The other attempt goes on as this one makes its claim.
            self._other(layout.ARRIVED)
            self.dest.add_file(
                os.path.join(self.directory, 'disk.eph0'), HOSTILE)

        self.dest.call('pool.createXML', arrive)
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('is there already', str(error))
        self.assertEqual([], self.opened)
        self._assert_arrived('disk.eph0')
        self.assertEqual([], self.calls.mock_calls)

    def test_stranger_s_directory_is_not_taken_for_a_leftover(self):
        """It shows up between the preflight and the claim."""
        path = os.path.join(self.directory, 'disk')
        self.dest.call('pool.createXML',
                       lambda: self.dest.add_file(path, HOSTILE))
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertIn('is there already', str(error))
        self.assertIn(path, self.dest.files)
        self.assertEqual([], self._markers())
        self.assertEqual([], self.opened)

    def test_pool_that_a_dead_attempt_left_is_used(self):
        """The files it remembers are gone."""
        state = self.dest.add_pool(
            self.places.transient_pool, self.directory)
        del self.dest.directories[self.directory]
        state.persistent = False
        state.volumes['disk.eph0'] = [self.dest.add_file('/gone'), 'raw']
        del self.dest.files['/gone']
        self._migrate()
        self._assert_arrived('disk.eph0')
        self.assertEqual({}, self.dest.pools)

    def test_marker_that_nova_s_own_driver_left_is_no_hindrance(self):
        self._other(layout.ARRIVED)
        self._migrate()
        self._assert_arrived('disk.eph0')
        self.assertEqual(1, len(self._markers()))


@ddt.ddt
class AbandonedTestCase(HostileTestCase):
    """This host is the destination of a migration that failed."""

    def setUp(self):
        super().setUp()
        self._add_hostile('disk.eph0')
        self.claim = layout.Claim(uuids.instance, 'attempt', 'elsewhere')
        self.marker = os.path.join(self.instances, self.claim.arrived_name)
        open(self.marker, 'w').close()
        self.instance.host = 'elsewhere'
        self.instance.vm_state = vm_states.ACTIVE
        self.instance.deleted = False
        self.useFixture(fixtures.MockPatchObject(
            objects.Instance, 'get_by_uuid', return_value=self.instance))
        self.refresh = self.useFixture(fixtures.MockPatchObject(
            objects.Instance, 'refresh')).mock
        self.pool = self.source.add_pool(
            self.places.transient_pool, self.directory)
        self.pool.persistent = False

    def _clear(self):
        with mock.patch.object(driver.LibvirtDriver, 'get_available_resource'):
            self.driver.get_available_resource('node')
        return libvirt_storage.wait_for(
            lambda: not os.path.exists(self.marker), timeout=1)

    def test_copy_is_deleted_and_libvirt_forgets_it(self):
        self.opened.clear()
        self.assertTrue(self._clear())
        self.assertFalse(os.path.exists(self.directory))
        self.assertNotIn(self.places.transient_pool, self.source.pools)
        self.assertEqual([], self.opened)

    def test_copy_of_a_server_that_was_deleted_goes(self):
        """Nova has deleted it on its own host, and knows of no other."""
        self.instance.update({
            'vm_state': vm_states.DELETED, 'deleted': True})
        self.assertTrue(self._clear())
        self.assertFalse(os.path.exists(self.directory))
        context, uuid = objects.Instance.get_by_uuid.call_args.args
        self.assertEqual(('yes', uuids.instance), (context.read_deleted, uuid))

    def _make_incomplete(self):
        arrived = self.marker
        self.marker = os.path.join(self.instances, self.claim.name)
        os.rename(arrived, self.marker)

    def test_incomplete_copy_of_a_server_that_was_deleted_goes(self):
        """No other attempt comes that would clear it."""
        self._make_incomplete()
        self.instance.update({
            'vm_state': vm_states.DELETED, 'deleted': True})
        self.assertTrue(self._clear())
        self.assertFalse(os.path.exists(self.directory))

    def test_incomplete_copy_stays_for_the_next_attempt_to_clear(self):
        self._make_incomplete()
        self.assertFalse(self._clear())
        self.assertTrue(os.path.exists(self.directory))

    @ddt.data({'host': 'source'}, {'host': 'a third'},
              {'vm_state': vm_states.RESIZED},
              {'task_state': task_states.RESIZE_MIGRATING})
    def test_copy_that_is_needed_stays(self, attributes):
        for name, value in attributes.items():
            setattr(self.instance, name, value)
        self.assertFalse(self._clear())
        self.assertTrue(os.path.exists(self.directory))

    @ddt.data({'host': 'source'}, {'task_state': task_states.RESIZE_MIGRATING})
    def test_copy_that_is_needed_by_the_time_libvirt_answers_stays(
            self, attributes):
        self.refresh.side_effect = lambda: [
            setattr(self.instance, name, value)
            for name, value in attributes.items()]
        self.assertFalse(self._clear())
        self.refresh.assert_called_once_with()
        self.assertTrue(os.path.exists(self.directory))

    def test_what_is_kept_for_a_revert_stays(self):
        os.rename(self.directory, self.places.kept_directory)
        self.assertFalse(self._clear())
        self.assertTrue(os.path.exists(self.places.kept_directory))

    def test_server_that_is_unknown_to_nova_stays(self):
        objects.Instance.get_by_uuid.side_effect = (
            exception.InstanceNotFound(instance_id=uuids.instance))
        self.assertFalse(self._clear())
        self.assertTrue(os.path.exists(self.directory))

    def test_mark_of_a_server_that_was_deleted_goes(self):
        objects.Instance.get_by_uuid.side_effect = (
            exception.InstanceNotFound(instance_id=uuids.instance))
        os.rename(self.directory, self.places.kept_directory)
        self.assertFalse(self._clear())
        os.rename(self.places.kept_directory, f'{self.instances}/elsewhere')
        self.assertTrue(self._clear())

    def test_one_that_fails_does_not_keep_the_others(self):
        with mock.patch.object(local, 'delete_all', side_effect=OSError):
            self.assertFalse(self._clear())
        self.assertTrue(os.path.exists(self.directory))


@ddt.ddt
class BaseImageTestCase(HostileTestCase):
    """An overlay on a base image that Glance gives, or does not."""

    def setUp(self):
        super().setUp()
        self._add_files()
        self.cache = layout.cache_dir()
        os.mkdir(self.cache)
        self.name = storage_migrate.imagecache.cache_name(uuids.image)
        self.glance = self.useFixture(fixtures.MockPatchObject(
            self.driver._image_api, 'get',
            return_value={'status': 'active'})).mock

    def _overlay(self, name):
        base = os.path.join(self.cache, name)
        with open(base, 'wb') as file:
            file.write(HOSTILE)
        info = self.disk_info.return_value[0]
        info['backing_file'] = name
        self.useFixture(fixtures.MockPatchObject(
            layout, 'backing_file', return_value=base))
        return layout.BASE + name

    def _lose(self):
        self.glance.side_effect = exception.ImageNotFound(
            image_id=uuids.image)

    def _add_there(self):
        """Let the destination have the base image."""
        path = os.path.join(self.cache, self.name)
        self.dest.add_file(path, HOSTILE)
        return path

    def test_base_that_the_destination_has_stays(self):
        name = self._overlay(self.name)
        self._add_there()
        self._migrate()
        self.assertNotIn(name, self._arrived())
        self.assertEqual([], self.opened)

    def test_base_that_the_destination_does_not_have_goes_along(self):
        name = self._overlay(self.name)
        self._migrate()
        self._assert_arrived(name)
        self.assertEqual([], self.opened)

    def test_base_stays_that_nova_s_own_driver_would_not_take(self):
        name = self._overlay(self.name)
        del self.dest.files[os.path.join(self.instances, layout.NO_POOL)]
        # It would convert a raw disk then, which is refused.
        self.flags(use_cow_images=False)
        self._migrate()
        self.assertNotIn(name, self._arrived())

    def test_so_does_one_that_nova_may_not_read(self):
        name = self._overlay(self.name)
        with mock.patch.object(os, 'access', return_value=False):
            self._migrate()
        self.assertNotIn(name, self._arrived())

    def test_who_looks_at_the_same_time_is_waited_for(self):
        name = self._overlay(self.name)
        path = self._add_there()
        other = self.dest.add_pool('other', path)
        del self.dest.directories[path]
        looks = itertools.count(1)

        def look():
            # The other one is there at the first look, and not any more at
            # the second.
            if next(looks) == 2:
                del self.dest.pools[other.name]

        self.dest.call('conn.storagePoolCreateXML', look, times=None,
                       name=f'{self.places.transient_pool}-base')
        self._migrate()
        self.assertNotIn(name, self._arrived())
        self.assertEqual(3, next(looks))

    @ddt.data(exception.ImageNotFound(image_id='image'),
              exception.ImageNotAuthorized(image_id='image'),
              exception.GlanceConnectionFailed(server='it', reason='down'))
    def test_base_that_glance_does_not_give_goes_along(self, error):
        self.glance.side_effect = error
        name = self._overlay(self.name)
        result = jsonutils.loads(self._migrate())
        self._assert_arrived(name)
        self.assertNotIn(name, [os.path.basename(info['path'])
                                for info in result])
        self.assertIn(os.path.join(self.directory, name), local.heads(result))
        self.assertEqual([], self.opened)

    def test_so_does_that_of_a_deactivated_image(self):
        self.glance.return_value = {'status': 'deactivated'}
        name = self._overlay(self.name)
        self._migrate()
        self._assert_arrived(name)

    def test_so_does_one_of_another_image(self):
        name = self._overlay('0123')
        self._migrate()
        self._assert_arrived(name)
        self.glance.assert_not_called()

    def test_so_does_one_that_this_host_made_for_itself(self):
        name = self._overlay('ephemeral_1_0706d66')
        self._migrate()
        self._assert_arrived(name)
        self.glance.assert_not_called()

    def test_glance_is_asked_before_the_server_is_off(self):
        self._overlay(self.name)
        self.glance.side_effect = lambda *args: (
            self.assertEqual([], self.calls.mock_calls) or
            {'status': 'active'})
        self._migrate()
        self.glance.assert_called_once()

    def test_base_needs_room(self):
        self._lose()
        self._overlay(self.name)
        with mock.patch.object(type(self.dest), 'available', 64 * units.Ki):
            self._assert_refused('bytes available')

    def test_no_pool_is_made_of_the_cache(self):
        cache = self.source.add_pool(
            storage_migrate.IMAGE_CACHE_POOL, self.cache)
        with mock.patch.object(storage_migrate, 'check_hooks'), (
                mock.patch.object(driver.LibvirtDriver, 'init_host')):
            self.driver.init_host('source')
            self.driver.init_host('source')
        self.assertFalse(cache.active)
        self.assertNotIn(
            storage_migrate.IMAGE_CACHE_POOL, self.source.pools)


@ddt.ddt
class AdoptTestCase(HostileTestCase, test_storage_migrate.FinishMixin):
    """This host is the destination."""

    def setUp(self):
        super().setUp()
        self._add_files()
        self.claim = layout.Claim(uuids.instance, 'attempt', 'gone')
        self.marker = os.path.join(self.instances, self.claim.arrived_name)
        open(self.marker, 'w').close()
        self.path = os.path.join(layout.cache_dir(), '0123')
        self.disks = self.disk_info.return_value

    def _bring(self):
        return self._add_file(layout.BASE + '0123', HOSTILE)

    def _assert_in_cache(self, content=HOSTILE):
        with open(self.path, 'rb') as file:
            self.assertEqual(content, file.read())
        self.assertEqual(['0123'], os.listdir(layout.cache_dir()))
        self.assertEqual([], [name for name in os.listdir(self.directory)
                              if name.startswith(layout.BASE)])
        self.assertFalse(os.path.exists(self.marker))

    def test_base_that_came_along_is_put_into_the_cache(self):
        self._bring()
        flushed = self._flushed(self.disks)
        self._assert_in_cache()
        self.assertIn(layout.cache_dir(), flushed)

    def test_base_that_is_there_stays(self):
        self._bring()
        os.mkdir(layout.cache_dir())
        with open(self.path, 'wb') as file:
            file.write(b'in use')
        self._finish(self.disks)
        self._assert_in_cache(b'in use')

    def test_cache_on_another_file_system(self):
        self._bring()
        link = os.link

        def cross(source, target):
            if source.startswith(self.directory):
                raise OSError(18, 'Invalid cross-device link')
            link(source, target)

        with mock.patch('os.link', cross):
            self._finish(self.disks)
        self._assert_in_cache()

    @ddt.data('ephemeral_1_0706d66', 'swap_64')
    def test_base_of_the_source_s_own_does_not_get_into_the_cache(self, name):
        base = self._add_file(layout.BASE + name, HOSTILE)
        os.mkdir(layout.cache_dir())
        with open(os.path.join(layout.cache_dir(), name), 'wb') as file:
            file.write(b'of this host')
        overlays = {self._add_file(disk, b''): f'/elsewhere/{backing}'
                    for disk, backing in (
                        ('disk.eph5', name), ('disk.eph6', name),
                        ('disk.eph7', layout.BASE + name),
                        ('disk.eph8', '0123'))}
        self._add_record(dict.fromkeys(overlays, 'qcow2'))
        with (mock.patch.object(overlay, 'flatten') as flatten,
              mock.patch.object(layout, 'backing_file', overlays.get)):
            flushed = self._flushed(self.disks)
        flattened = [path for path in overlays if path[-1] in '567']
        self.assertCountEqual([mock.call(path, base) for path in flattened],
                              flatten.call_args_list)
        self.assertLessEqual(set(flattened), set(flushed))
        self.assertFalse(os.path.exists(base))
        self.assertEqual([name], os.listdir(layout.cache_dir()))
        self.assertFalse(os.path.exists(self.marker))

    def test_base_that_cannot_be_copied_fails_the_migration(self):
        base = self._add_file(layout.BASE + 'ephemeral_1_0706d66', HOSTILE)
        self._add_record({self._add_file('disk.eph5', b''): 'qcow2'})
        failure = errors.StorageError('no room', 'Revert it.')
        with (mock.patch.object(overlay, 'flatten', side_effect=failure),
              mock.patch.object(layout, 'backing_file',
                                return_value='/x/ephemeral_1_0706d66')):
            error = self.assertRaises(
                exception.MigrationError, self._finish, self.disks)
        self.assertIn('no room', str(error))
        for path in base, self.marker:
            self.assertTrue(os.path.exists(path))

    def test_head_that_is_not_what_was_sent_is_an_error(self):
        path = self._add_file('disk.eph0', HOSTILE)
        local.add_heads(self.disks, {path: layout.digest(b'')})
        error = self.assertRaises(
            exception.MigrationError, self._finish, self.disks)
        self.assertIn('the first bytes of', str(error))
        self.assertTrue(os.path.exists(self.marker))

    def test_head_that_is_what_was_sent(self):
        path = self._add_file('disk.eph0', HOSTILE)
        local.add_heads(self.disks, {
            path: layout.digest(HOSTILE[:layout.HEAD_BYTES])})
        self._finish(self.disks)
        self.assertFalse(os.path.exists(self.marker))


class KernelTestCase(test_storage_migrate.DriverTestCase):
    """What came along is not fetched."""

    def _kernel(self):
        self.flags(force_raw_images=False)
        kernel = self.driver.image_backend.by_name(
            self.instance, 'kernel', 'raw')
        fetch_func = mock.Mock(side_effect=exception.ImageNotFound(
            image_id=uuids.kernel))
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
