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


from concurrent import futures
import os
import sys
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_utils import units
import tenacity

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import pool

Content = libvirt_storage.Content

NOVA = pool.Permissions(owner=42436, group=42437, mode=0o755)
DISK = pool.Permissions(owner=42436, group=42437, mode=0o644)

OTHER_ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STORAGE,
               'something else')


class _PoolTestCase(test.NoDBTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = libvirt_storage.FakeHost()
        self.connection = self.host.connect()

    def add_pool(self, **kwargs) -> pool.Pool:
        self.host.add_pool('disks', '/disks', 42436, 42437, 0o755, **kwargs)
        return pool.Pool.lookup(self.connection, 'disks')

    def assert_libvirt_error(self, code, function, *args, **kwargs):
        error = self.assertRaises(
            libvirt.libvirtError, function, *args, **kwargs)
        self.assertEqual(code, error.get_error_code())
        return error


class LookupTestCase(_PoolTestCase):

    def test_active_pool(self):
        found = self.add_pool()

        self.assertEqual(('disks', '/disks'), (found.name, found.path))
        self.assertEqual(NOVA, found.permissions)
        self.assertEqual([], self.host.changes)

    def test_no_such_pool(self):
        error = self.assertRaises(
            errors.PoolNotFound, pool.Pool.lookup, self.connection, 'disks')

        self.assertIn('disks', str(error))

    def test_inactive_pool_is_not_started(self):
        self.host.add_pool('disks', active=False)

        error = self.assertRaises(
            errors.PoolInactive, pool.Pool.lookup, self.connection, 'disks')

        self.assertIn('disks', str(error))
        self.assertEqual([], self.host.changes)

    def test_other_error_is_not_taken_for_a_missing_pool(self):
        self.host.fail('conn.storagePoolLookupByName',
                       error=libvirt_storage.LOST_ERROR)

        self.assert_libvirt_error(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            pool.Pool.lookup, self.connection, 'disks')

    def test_available_is_what_is_free(self):
        found = self.add_pool()
        self.host.capacity = 10 * units.Gi
        self.host.used = 3 * units.Gi
        self.host.add_volume('disks', 'disk', b'x' * units.Mi)

        self.assertEqual(7 * units.Gi - units.Mi, found.available)

    def test_space_that_only_root_may_use_is_not_available(self):
        found = self.add_pool()
        self.host.capacity = 10 * units.Gi
        self.host.add_volume('disks', pool.RESERVED_NAME, b'\0' * 512)
        free = self.host.available

        self.assertEqual(free - 512 * units.Mi, found.available)

    def test_less_than_nothing_is_never_available(self):
        found = self.add_pool()
        self.host.capacity = units.Mi
        self.host.add_volume('disks', pool.RESERVED_NAME, b'\0' * 2)

        self.assertEqual(0, found.available)

    def test_room_of_a_host_that_cannot_be_asked(self):
        found = self.add_pool()
        self.host.fail('pool.storageVolLookupByName', error=OTHER_ERROR)

        self.assert_libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, lambda: found.available)


@ddt.ddt
class EnsureTestCase(_PoolTestCase):

    def ensure(self, path: str = '/disks',
               autostart: bool = True) -> pool.Pool:
        return pool.Pool.ensure(
            self.connection, name='disks', path=path, permissions=NOVA,
            autostart=autostart)

    def test_missing_pool_is_made_to_stay(self):
        made = self.ensure()

        self.assertEqual(('disks', '/disks', NOVA),
                         (made.name, made.path, made.permissions))
        state = self.host.pools['disks']
        self.assertTrue(state.active)
        self.assertTrue(state.persistent)
        self.assertTrue(state.autostart)
        self.assertEqual(
            dict(owner=42436, group=42437, mode=0o755),
            vars(self.host.directories['/disks']))

    def test_pool_that_could_hang_the_daemon_does_not_start_with_it(self):
        self.ensure(autostart=False)

        self.assertTrue(self.host.pools['disks'].active)
        self.assertFalse(self.host.pools['disks'].autostart)

    def test_autostart_follows_what_is_in_the_pool(self):
        for autostart in True, False, True:
            self.ensure(autostart=autostart)

            self.assertEqual(autostart, self.host.pools['disks'].autostart)

    def test_active_pool_is_used_as_it_is(self):
        self.add_pool()
        self.host.pools['disks'].autostart = True

        found = self.ensure(path='/elsewhere')

        self.assertEqual('/disks', found.path)
        self.assertEqual([], self.host.changes)

    def test_inactive_pool_is_started(self):
        self.host.add_pool('disks', '/disks', active=False)

        self.ensure()

        self.assertTrue(self.host.pools['disks'].active)
        self.assertEqual([('pool.create', 'disks'),
                          ('pool.setAutostart', 'disks')], self.host.changes)

    def test_second_time_changes_nothing(self):
        self.ensure()
        before = list(self.host.changes)

        self.ensure()

        self.assertEqual(before, self.host.changes)

    def test_pool_whose_directory_was_never_built_is_built(self):
        self.host.fail('pool.create', error=OTHER_ERROR)
        self.assertRaises(libvirt.libvirtError, self.ensure)

        self.assertEqual(NOVA, self.ensure().permissions)

    def test_directory_that_exists_keeps_its_files(self):
        self.host.add_file('/disks/kept', b'data')

        made = self.ensure()

        self.assertEqual(['kept'], [v.name for v in made.volumes()])

    @ddt.data((0o755, False), (0o711, True))
    @ddt.unpack
    def test_directory_is_built_unless_it_is_as_wanted(self, mode, is_built):
        # Where root is nobody libvirt cannot set the mode that it has.
        path = self.useFixture(fixtures.TempDir()).path
        os.chmod(path, mode)
        self.host.directories[path] = libvirt_storage.FakeDirectory(
            os.getuid(), os.getgid(), mode)
        with mock.patch.object(self.host, 'build') as build:
            pool.Pool.ensure(
                self.connection, name='disks', path=path, autostart=True,
                permissions=pool.Permissions(os.getuid(), os.getgid(), 0o755))

        self.assertEqual(is_built, build.called)
        self.assertTrue(self.host.pools['disks'].active)

    def test_path_is_escaped_in_xml(self):
        self.assertEqual('/disks/<&>', self.ensure('/disks/<&>').path)


class AttachTestCase(_PoolTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host.add_directory('/instances/x')

    def attach(self) -> pool.Pool:
        return pool.Pool.attach(
            self.connection, name='nova-x', path='/instances/x')

    def test_pool_does_not_outlive_the_daemon(self):
        self.attach()

        self.assertFalse(self.host.pools['nova-x'].persistent)

    def test_pool_that_a_failed_attempt_left_is_found(self):
        self.attach()
        self.host.calls.clear()

        self.assertEqual('/instances/x', self.attach().path)
        self.assertEqual([], self.host.changes)

    def test_directory_stays_as_it_is(self):
        self.host.add_file('/instances/x/disk.config', b'iso')

        attached = self.attach()

        self.assertEqual(['disk.config'],
                         [v.name for v in attached.volumes()])
        self.assertEqual(dict(owner=0, group=0, mode=0o711),
                         vars(self.host.directories['/instances/x']))

    def test_directory_has_to_exist(self):
        self.host.directories.clear()
        self.assert_libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, self.attach)

        self.assertEqual({}, self.host.directories)
        self.assertEqual({}, self.host.pools)

    def test_directory_of_another_pool_is_refused(self):
        self.host.add_pool('theirs', '/instances/x')

        self.assert_libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED, self.attach)

    def test_detach_leaves_the_directory_and_its_files(self):
        attached = self.attach()
        attached.create_volume('disk.info', 2, DISK)

        attached.detach()

        self.assertEqual({}, self.host.pools)
        self.assertIn('/instances/x/disk.info', self.host.files)

    def test_end(self):
        self.attach()
        self.host.add_pool('defined')
        self.host.add_pool('off', active=False)

        for name in 'nova-x', 'defined', 'off', 'unknown':
            pool.end(self.connection, name)

        self.assertEqual({}, self.host.pools)
        self.assertIn('/instances/x', self.host.directories)


@ddt.ddt
class VolumeTestCase(_PoolTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.pool = self.add_pool()

    @ddt.data(0, 1, 511, 4097, 3 * units.Gi + 1)
    def test_created_volume_is_all_a_hole(self, length):
        volume = self.pool.create_volume('disk', length, DISK)

        self.assertEqual(('disk', '/disks/disk'), (volume.name, volume.path))
        self.assertEqual((length, 0), (volume.length, volume.allocation))
        file = self.host.files['/disks/disk']
        self.assertEqual([], file.content.extents)
        self.assertEqual(length, file.content.size)

    def test_created_volume_belongs_to_nova(self):
        self.pool.create_volume('disk', 1, DISK)

        file = self.host.files['/disks/disk']
        self.assertEqual((42436, 42437, 0o644),
                         (file.owner, file.group, file.mode))

    def test_name_is_escaped_in_xml(self):
        self.assertEqual('<&>', self.pool.create_volume('<&>', 1, DISK).name)

    def test_volume_in_the_way_is_not_touched(self):
        self.host.add_volume('disks', 'disk', b'theirs')

        self.assert_libvirt_error(
            libvirt.VIR_ERR_STORAGE_VOL_EXIST,
            self.pool.create_volume, 'disk', 1, DISK)

        self.assertEqual(Content.of(b'theirs'),
                         self.host.volume('disks', 'disk').content)

    def test_length_of_raw_is_its_capacity(self):
        self.host.add_volume('disks', 'disk', Content(4097, [(5, b'x')]))

        volume = self.pool.volume('disk')

        self.assertEqual((4097, 1), (volume.length, volume.allocation))

    def test_length_of_qcow2_is_that_of_the_file(self):
        image = libvirt_storage.qcow2_header(10 * units.Gi, '/base')
        self.host.add_volume('disks', 'disk', Content(196616, [(0, image)]))

        self.assertEqual(196616, self.pool.volume('disk').length)

    def test_length_does_not_depend_on_what_a_guest_wrote(self):
        """Once refreshed, libvirt takes such a raw disk for qcow2."""
        header = libvirt_storage.qcow2_header(10 * units.Gi, '/etc/shadow')
        self.host.add_volume(
            'disks', 'disk', Content(units.Mi, [(0, header)]), 'raw')
        self.pool.refresh()
        self.assertEqual(
            'qcow2', self.pool.volume('disk').libvirt_volume.format)

        self.assertEqual(units.Mi, self.pool.volume('disk').length)

    def test_volumes_are_those_with_the_prefix(self):
        for name in ('a_disk', 'a_disk.eph0', 'ab_disk', 'b_disk'):
            self.host.add_volume('disks', name)

        self.assertEqual(['a_disk', 'a_disk.eph0'],
                         [v.name for v in self.pool.volumes('a_')])
        self.assertEqual(4, len(self.pool.volumes()))

    def test_refresh_finds_what_others_made(self):
        self.host.add_file('/disks/disk', b'data')
        self.assertEqual([], self.pool.volumes())

        self.pool.refresh()

        self.assertEqual(4, self.pool.volume('disk').length)

    def test_missing_volume(self):
        self.assert_libvirt_error(
            libvirt.VIR_ERR_NO_STORAGE_VOL, self.pool.volume, 'disk')

    def test_delete(self):
        self.pool.create_volume('disk', 1, DISK).delete()

        self.assertEqual({}, self.host.files)

    def test_delete_of_what_is_gone(self):
        volume = self.pool.create_volume('disk', 1, DISK)
        self.host.remove_file('/disks/disk')

        volume.delete()

    def test_delete_that_fails(self):
        volume = self.pool.create_volume('disk', 1, DISK)
        self.host.fail('vol.delete', error=OTHER_ERROR)

        self.assert_libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, volume.delete)


@ddt.ddt
class BusyTestCase(_PoolTestCase):
    """What is refused while libvirt refreshes the pool is tried again."""

    BUSY_ERROR = (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_STORAGE,
                  "internal error: pool 'disks' has asynchronous jobs "
                  "running.")

    # libvirtd answers in the language of its host.
    TRANSLATED_ERROR = (*BUSY_ERROR[:2], "Interner Fehler: asynchrone "
                        "Aufgaben im Pool 'disks' werden ausgeführt.")

    def setUp(self) -> None:
        super().setUp()
        self.pool = self.add_pool()
        self.host.add_volume('disks', 'disk', b'data')

    def call(self, call: str) -> None:
        calls = {
            'pool.refresh': self.pool.refresh,
            'pool.listAllVolumes': self.pool.volumes,
            'pool.storageVolLookupByName': lambda: self.pool.volume('disk'),
            'pool.createXML':
                lambda: self.pool.create_volume('new', 1, DISK),
            'pool.destroy': self.pool.detach,
            'vol.delete': self.pool.volume('disk').delete,
        }
        calls[call]()

    @ddt.data('pool.refresh', 'pool.listAllVolumes',
              'pool.storageVolLookupByName', 'pool.createXML',
              'pool.destroy', 'vol.delete')
    def test_busy_pool_is_waited_for(self, call):
        fault = self.host.fail(call, error=self.BUSY_ERROR, times=2,
                               nth=2 if 'Lookup' in call else 1)

        self.call(call)

        self.assertEqual(2, fault.hits)

    def test_busy_pool_is_told_by_the_code_of_the_error(self):
        fault = self.host.fail('pool.refresh', error=self.TRANSLATED_ERROR,
                               times=2)

        self.pool.refresh()

        self.assertEqual(2, fault.hits)

    @ddt.data('pool.refresh', 'pool.listAllVolumes', 'pool.createXML',
              'pool.destroy', 'vol.delete')
    def test_other_error_is_not_tried_again(self, call):
        lost = libvirt_storage.LOST_ERROR
        # The words prove nothing either: a file may be called that.
        words = (*OTHER_ERROR[:2], self.BUSY_ERROR[2])
        for error in OTHER_ERROR, lost, words:
            self.host.faults.clear()
            fault = self.host.fail(call, error=error, times=None)

            self.assert_libvirt_error(error[0], self.call, call)

            self.assertEqual(1, fault.hits)

    def never_wait(self, tries: int) -> mock.Mock:
        """Give up after some tries, and at once.

        :returns: what is asked how long to go on
        """
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.threads.sleep', lambda seconds: None))
        stop = self.useFixture(fixtures.MockPatchObject(
            tenacity, 'stop_after_delay',
            return_value=tenacity.stop_after_attempt(tries)))
        return stop.mock

    def test_wait_has_an_end(self):
        stop = self.never_wait(tries=3)
        fault = self.host.fail('pool.refresh', error=self.BUSY_ERROR,
                               times=None)

        error = self.assert_libvirt_error(
            libvirt.VIR_ERR_INTERNAL_ERROR, self.pool.refresh)

        self.assertIn('asynchronous jobs', str(error))
        self.assertEqual(3, fault.hits)
        stop.assert_called_once_with(pool.BUSY_TIMEOUT)

    def test_many_wait_at_once(self):
        self.never_wait(tries=3)
        self.host.fail('pool.refresh', error=self.BUSY_ERROR, times=None)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)

        def refresh(_number: int) -> Exception:
            return self.assertRaises(Exception,  # noqa: H202
                                     self.pool.refresh)

        with futures.ThreadPoolExecutor(8) as threads:
            for error in threads.map(refresh, range(400)):
                self.assertIsInstance(error, libvirt.libvirtError)

    def test_pool_is_busy_after_an_upload(self):
        self.host.pools['disks'].async_jobs_after_upload = 2
        stream = self.connection.newStream(0)
        self.pool.volume('disk').libvirt_volume.upload(stream, 0, 4, 0)
        stream.send(b'DATA')
        stream.finish()

        self.pool.refresh()

        self.assertEqual(0, self.host.pools['disks'].async_jobs)


class XmlTestCase(_PoolTestCase):
    """Another host's daemon says what it likes."""

    def setUp(self) -> None:
        super().setUp()
        self.add_pool()
        secret = os.path.join(self.useFixture(fixtures.TempDir()).path, 'key')
        with open(secret, 'w') as file:
            file.write('/secret')
        self.xml = f"""<!DOCTYPE pool [
            <!ENTITY file SYSTEM "file://{secret}">
            <!ENTITY web SYSTEM "http://127.0.0.1:1/x">]>
            <pool type="dir"><name>disks</name><target>
            <path>/disks&{'%s'};</path><permissions><mode>0755</mode>
            <owner>1</owner><group>1</group></permissions></target></pool>"""

    def path(self, entity: str) -> str | None:
        with mock.patch.object(libvirt_storage.FakePool, 'XMLDesc',
                               return_value=self.xml % entity):
            return pool.Pool.lookup(self.connection, 'disks').path

    def test_entities_of_a_daemon_name_no_file_of_this_host(self):
        for entity in 'file', 'web':
            self.assertNotIn('secret', str(self.path(entity)))


class DirectoryTestCase(_PoolTestCase):
    """A look at a directory that may or may not be the target of a pool."""

    def setUp(self) -> None:
        super().setUp()
        self.host.add_directory('/instances', owner=42436, group=42437,
                                mode=0o755)
        self.host.capacity = units.Gi

    def inspect(self) -> pool.Directory:
        return pool.within(self.connection, path='/instances', name='ours',
                           function=pool.Directory.of)

    def test_directory_is_told_of_and_no_pool_is_left(self):
        self.assertEqual(pool.Directory('/instances', NOVA, units.Gi),
                         self.inspect())
        self.assertEqual({}, self.host.pools)

    def test_pool_of_somebody_else_is_used_and_stays(self):
        self.host.add_pool('theirs', '/instances', 42436, 42437, 0o755)

        self.assertEqual(NOVA, self.inspect().permissions)

        self.assertEqual(['theirs'], list(self.host.pools))
        self.assertEqual([], self.host.changes)

    def test_volume_whose_name_is_no_utf_8_is_passed_over(self):
        volume = mock.Mock()
        volume.name.side_effect = UnicodeDecodeError('utf-8', b'', 0, 1, '')
        self.host.add_pool('theirs', '/instances')
        self.host.add_file('/instances/known')
        found = pool.Pool.lookup(self.connection, 'theirs')
        found.refresh()
        known = found.libvirt_pool.listAllVolumes(0)
        with mock.patch.object(found.libvirt_pool, 'listAllVolumes',
                               return_value=[volume, *known]):
            self.assertEqual(['known'], [v.name for v in found.volumes()])

    def test_pool_that_an_interrupted_look_left_is_used_and_ended(self):
        with mock.patch.object(pool.Pool, 'detach'):
            self.inspect()
        self.assertEqual(['ours'], list(self.host.pools))

        self.assertEqual(NOVA, self.inspect().permissions)

        self.assertEqual({}, self.host.pools)

    def test_missing_directory(self):
        del self.host.directories['/instances']

        self.assert_libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, self.inspect)

        self.assertEqual({}, self.host.pools)

    def test_pool_that_another_look_makes_at_the_same_time_is_used(self):
        self.host.call('conn.storagePoolCreateXML', lambda:
                       self.host.add_pool('theirs', '/instances', 42436,
                                          42437, 0o755))

        self.assertEqual(NOVA, self.inspect().permissions)

    def test_pool_that_another_look_ends_after_a_directory_was_made(self):
        self.host.add_pool('theirs', '/instances')
        self.host.call('vol.path', self.host.pools.clear)

        pool.within(
            self.connection, path='/instances', name='ours',
            function=lambda parent: parent.create_directory('new', NOVA))

        self.assertIn('/instances/new', self.host.directories)

    def test_pool_that_another_look_ends_at_the_same_time(self):
        self.host.add_pool('theirs', '/instances')
        self.host.call('pool.info', self.host.pools.clear)
        self.host.call('pool.XMLDesc', self.host.pools.clear)

        self.inspect()

        self.assertEqual({}, self.host.pools)
