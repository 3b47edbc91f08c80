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

"""Servers with their disks in a volume group of LVM."""

import os
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import vm_states
from nova import exception
from nova import objects
from nova.tests.fixtures import libvirt_storage
from nova.tests import storage_contract
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import pool
from nova.virt.libvirt.storage import stream

EXTENT = libvirt_storage.EXTENT
OLD = libvirt_storage.OLD_DATA
Content = libvirt_storage.Content
GROUP = 'vg'
POOL = 'nova-group-vg'
DATA = b'data' * units.Ki
# Data, zeros and data, in whole extents.
ROOT = (DATA + bytes(EXTENT) + DATA).ljust(2 * EXTENT, b'\0')


def padded(data: bytes, extents: int) -> Content:
    """Data and zeros behind it."""
    return Content.of(data.ljust(extents * EXTENT, b'\0'))


class LvmTestCase(test_storage_migrate.DriverTestCase):
    """A server on 'source', with its disks in a volume group.

    Its devices are files here. nova-compute may not read them, as on most
    hosts.
    """

    may_read = False

    def setUp(self):
        super().setUp()
        self.devices = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.layout.DEVICES', self.devices))
        self.flags(use_storage_pools=False, vol_upload_migration_legacy=True,
                   vol_upload_migration_direct_read=self.may_read,
                   images_type='lvm', images_volume_group=GROUP,
                   group='libvirt')
        os.mkdir(layout.group_path(GROUP))
        # The root disk of the flavor is as large as ROOT.
        self.useFixture(fixtures.MockPatchObject(units, 'Gi', len(ROOT)))
        devices = self.devices
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.imagebackend.Lvm.exists',
            lambda disk: os.path.exists(disk.path.replace('/dev', devices))))
        self.instance.ephemeral_key_uuid = None
        self.places = layout.Layout.of(self.instance)
        for host in self.source, self.dest:
            host.pools.clear()
            host.add_group(GROUP)
        self.mark = self.dest.add_file(
            f'{self.instances}/{layout.GROUP_MARK}{GROUP}')
        self.dest.add_logical_volume(GROUP, 'other_disk', b'another server')
        self.remove = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.lvm.remove_volumes')).mock
        self.flush = self.useFixture(fixtures.MockPatch(
            'nova.privsep.storage_migrate.flush_device')).mock
        self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, '_lvm_disks',
            side_effect=lambda instance: self.places.logical_volumes()))

    def _path(self, disk='disk'):
        return os.path.join(self.places.group_path, f'{uuids.instance}_{disk}')

    def _add_volume(self, disk='disk', data=ROOT):
        """Add a disk to the server."""
        self._put_device(self._path(disk), data)
        self.source.add_logical_volume(
            GROUP, os.path.basename(self._path(disk)), data)
        self.disk_info.return_value.append({
            'type': 'raw', 'path': self._path(disk), 'backing_file': '',
            'virt_disk_size': len(data), 'disk_size': len(data)})

    @staticmethod
    def _put_device(path, data):
        with open(path, 'wb') as device:
            device.write(data)

    def _arrived(self):
        """Content of the server's volumes on the destination, by disk."""
        return {name.partition('_')[2]: file.content
                for name, file in self.dest.logical_volumes(GROUP).items()
                if name.startswith(uuids.instance)}

    def _assert_nothing_on_destination(self):
        self.assertEqual({}, self._arrived())
        self.assertEqual({'other_disk'}, set(
            self.dest.logical_volumes(GROUP)))
        self.assertNotIn(self.directory, self.dest.directories)
        self.assertEqual([], [path for path in self.dest.files
                              if path.startswith(self.directory)])
        self.assertEqual([], self.dest.open_streams)
        self.assert_group_is_active()

    def assert_group_is_active(self):
        """Nobody ended a pool of a group: that deactivates its volumes."""
        for host in self.source, self.dest:
            self.assertNotIn(('pool.destroy', POOL), host.calls)
            self.assertEqual({}, host.inactive)


@ddt.ddt
class MigrateTestCase(LvmTestCase):

    def test_disks_arrive_and_the_source_keeps_its_own(self):
        self._add_volume()
        self._add_volume('disk.eph0', DATA.ljust(EXTENT, b'\0'))
        self._add_volume('disk.swap', bytes(EXTENT))
        self._add_file('disk.config', b'config drive')

        result = jsonutils.loads(self._migrate())

        self.assertEqual(
            [self._path(), self._path('disk.eph0')],
            [info['path'] for info in result])
        self.assertEqual(
            {'disk': Content.of(ROOT), 'disk.eph0': padded(DATA, 1)},
            self._arrived())
        self.assertEqual(b'config drive', self.dest.files[
            f'{self.directory}/disk.config'].content.read(0, 99))
        self.assertEqual(Content.of(ROOT),
                         self.source.files[self._path()].content)
        self.assertTrue(os.path.isdir(self.directory + '_resize'))
        self.assert_group_is_active()

    def test_zeros_are_written_where_another_tenants_data_was(self):
        self._add_volume(data=DATA.ljust(3 * EXTENT, b'\0'))
        self._migrate()
        content = self._arrived()['disk']
        self.assertEqual(padded(DATA, 3), content)
        self.assertEqual(0, content.read(0, content.size).count(OLD))

    def test_many_zeros_are_written_piece_by_piece(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.stream.DeviceSink.most_hole', EXTENT))
        self._add_volume(data=bytes(5 * EXTENT) + DATA.ljust(EXTENT, b'\0'))
        self._migrate()
        uploads = [each for each in self.dest.streams
                   if each.way == 'upload' and each.name.endswith('_disk')]
        for each in uploads:
            zeros = [length for kind, _, length in each.events
                     if kind == 'hole']
            self.assertLess(sum(zeros), 2 * EXTENT)
            # Several holes in a row hang a daemon before libvirt 10.1.
            self.assertNotIn(('hole', 'hole'), list(zip(
                [event[0] for event in each.events],
                [event[0] for event in each.events[1:]])))
        self.assertGreaterEqual(len(uploads), 5)
        self.assertEqual(padded(bytes(5 * EXTENT) + DATA, 6),
                         self._arrived()['disk'])

    @ddt.data(1, 2)
    def test_resize_grows_disks_with_zeros(self, ephemerals):
        self._add_volume(data=DATA.ljust(EXTENT, b'\0'))
        for number in range(ephemerals):
            self._add_volume(f'disk.eph{number}', DATA.ljust(EXTENT, b'\0'))
        self._migrate(flavor=self._flavor(2, 1), block_device_info={
            'block_device_mapping': [], 'ephemerals': [
                {'size': 0} for number in range(ephemerals)]})
        # Of several ephemeral disks nobody knows which is to grow.
        grown = 2 if ephemerals == 1 else 1
        arrived = self._arrived()
        self.assertEqual(padded(DATA, 4), arrived['disk'])
        self.assertEqual(padded(DATA, grown), arrived['disk.eph0'])

    def test_rest_of_the_last_extent_is_zeros(self):
        # The extents of the source are smaller.
        self._add_volume(data=bytes(2 * EXTENT) + DATA)
        self.source.files[self._path()].content.truncate(
            2 * EXTENT + len(DATA))
        self._migrate()
        self.assertEqual(padded(bytes(2 * EXTENT) + DATA, 3),
                         self._arrived()['disk'])

    def test_header_of_an_image_is_data(self):
        self._add_volume(
            data=storage_contract.HOSTILE.ljust(2 * EXTENT, b'\0'))
        self._migrate()
        self.assertEqual({'disk': padded(storage_contract.HOSTILE, 2)},
                         self._arrived())

    def test_record_of_formats_names_no_volume(self):
        self._add_volume()
        self._add_record({f'{self.directory}/disk.config': 'raw'})
        self._migrate()
        self.assertEqual(
            {f'{self.directory}/disk.config': 'raw'},
            jsonutils.loads(self.dest.files[
                f'{self.directory}/disk.info'].content.read(0, 999)))

    def test_pool_of_the_operator_is_used(self):
        self._add_volume()
        self.dest.connect().storagePoolCreateXML(
            storage_contract.LOGICAL_POOL.format(name='theirs', group=GROUP))
        self._migrate()
        self.assertEqual(['theirs'], list(self.dest.pools))

    def test_pool_of_the_operator_that_is_not_active_is_left_alone(self):
        self._add_volume()
        theirs = self.dest.connect().storagePoolDefineXML(
            storage_contract.LOGICAL_POOL.format(name='theirs', group=GROUP))
        self._migrate()
        self.assertFalse(theirs.isActive())
        self.assertTrue(self.dest.pools[POOL].active)

    def test_pool_that_another_migration_makes_meanwhile_is_used(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.FIRST_WAIT', 0))
        connection = self.dest.connect()
        self.dest.call(
            'conn.storagePoolCreateXML',
            lambda: connection.storagePoolCreateXML(
                storage_contract.LOGICAL_POOL.format(name=POOL, group=GROUP)))
        found = pool.of_group(connection, GROUP, layout.group_path(GROUP))
        self.assertEqual(POOL, found.name)

    @ddt.data('size', 'checksum')
    def test_copy_is_checked(self, verify):
        self.flags(vol_upload_migration_verify=verify, group='libvirt')
        self._add_volume()
        self._migrate()
        self.assertEqual(
            verify == 'checksum',
            ('vol.download', f'{uuids.instance}_disk') in self.dest.calls)

    @ddt.data(units.Mi, units.Gi)
    def test_copy_goes_on_after_a_lost_connection(self, section):
        # What the destination has for certain, or nothing at all.
        self.flags(vol_upload_migration_reconnect_timeout=10, group='libvirt')
        self._add_volume(data=DATA * 3072)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.transfer.RECONNECT_SECONDS', 0.01))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.stream.SECTION_BYTES', section))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.stream.SECTION_COSTS', 0))
        self.dest.call('stream.send', self.dest.restart, after=6 * units.Mi)
        self._migrate()
        self.assertEqual(Content.of(DATA * 3072), self._arrived()['disk'])

    def test_zeros_of_a_resize_are_written_while_the_server_runs(self):
        self._add_volume(data=DATA.ljust(EXTENT, b'\0'))

        def look(*args):
            content = self._arrived()['disk']
            self.assertEqual(Content(3 * EXTENT), Content.of(
                content.read(EXTENT, 9 * EXTENT)))
            self.assertEqual(OLD * EXTENT, content.read(0, EXTENT))
            del self.dest.streams[:]

        self.calls.power_off.side_effect = look
        self._migrate(flavor=self._flavor(2))
        self.assertEqual(padded(DATA, 4), self._arrived()['disk'])
        # They are not written again.
        self.assertEqual([EXTENT], [
            each.position for each in self.dest.streams
            if each.way == 'upload' and each.name.endswith('_disk')])

    def test_volume_that_is_made_anew_is_wiped_anew(self):
        self._add_volume(data=DATA.ljust(EXTENT, b'\0'))
        name = f'{uuids.instance}_disk'
        self.calls.power_off.side_effect = lambda *args: (
            self.dest.remove_file(self._path()))
        self._migrate(flavor=self._flavor(2))
        self.assertEqual(padded(DATA, 4), self._arrived()['disk'])
        self.assertEqual(2, self.dest.calls.count(('pool.createXML', POOL)))
        self.assertIn(name, self.dest.logical_volumes(GROUP))

    @ddt.data(True, False)
    def test_zeros_of_a_resize_go_on_after_a_lost_connection(self, again):
        self.flags(vol_upload_migration_reconnect_timeout=10, group='libvirt')
        self._add_volume(data=DATA.ljust(EXTENT, b'\0'))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.transfer.RECONNECT_SECONDS', 0.01))
        if again:
            self.dest.call('stream.sendHole', self.dest.restart,
                           after=2 * EXTENT)
        self._migrate(flavor=self._flavor(2))
        self.assertEqual(padded(DATA, 4), self._arrived()['disk'])

    @mock.patch.object(driver.LibvirtDriver, 'migrate_disk_and_power_off')
    @ddt.data({'vol_upload_migration': False},
              {'vol_upload_migration_legacy': False})
    def test_both_options_are_needed(self, change, nova):
        self.flags(group='libvirt', **change)
        self._add_volume()
        self.assertEqual(nova.return_value, self._migrate())
        self.assertEqual([], self.hosts.opened)

    @mock.patch.object(driver.LibvirtDriver, 'migrate_disk_and_power_off')
    def test_resize_on_the_same_host_is_novas_to_refuse(self, nova):
        self._add_volume()
        with mock.patch.object(self.driver, 'get_host_ip_addr',
                               return_value='dest'):
            self.assertEqual(nova.return_value, self._migrate())
        self.assertEqual([], self.hosts.opened)

    def test_server_without_disks_here_needs_no_group(self):
        self.dest.groups.clear()
        self.dest.files.pop(f'{self.instances}/{layout.GROUP_MARK}{GROUP}')
        root = {'connection_info': {}, 'mount_device': '/dev/vda',
                'boot_index': 0}
        self._add_file('disk.config', b'config drive')
        self._migrate(block_device_info={
            'block_device_mapping': [root], 'ephemerals': [],
            'root_device_name': '/dev/vda'})
        self.assertEqual(b'config drive', self.dest.files[
            f'{self.directory}/disk.config'].content.read(0, 99))
        self.assertEqual({}, self.dest.pools)


class PrecopyTestCase(LvmTestCase):
    """nova-compute may read the devices."""

    may_read = True

    def test_disk_is_copied_while_the_server_runs(self):
        self._add_volume()
        power_off = self.calls.power_off

        def change(*args):
            self.assertEqual({'disk': Content.of(ROOT)}, self._arrived())
            with open(self._path(), 'r+b') as device:
                device.seek(units.Mi)
                device.write(b'changed')
                device.seek(0)
                device.write(bytes(len(DATA)))

        power_off.side_effect = change
        self._migrate()
        with open(self._path(), 'rb') as device:
            self.assertEqual({'disk': Content.of(device.read())},
                             self._arrived())
        self.assertNotIn(('vol.download', f'{uuids.instance}_disk'),
                         self.source.calls)

    def test_device_has_no_holes(self):
        self._put_device(self._path(), ROOT)

        def refuse(descriptor, offset, whence):
            if whence in (os.SEEK_DATA, os.SEEK_HOLE):
                raise OSError(22, 'Invalid argument')
            return real(descriptor, offset, whence)

        real = os.lseek
        with mock.patch('os.lseek', refuse):
            self._assert_read(stream.FileSource(self._path()))
            tracked = changes.Hashes(self._path())
            self.addCleanup(tracked.close)
            self.assertEqual(len(ROOT), tracked.length)
            self._assert_read(tracked.source())
            self.assertEqual(0, tracked.look(True).total)

    def _assert_read(self, source):
        """All of ROOT is read, and none of it taken for a hole."""
        self.assertEqual(Content.of(ROOT), Content.of(
            b''.join(source.chunks(len(ROOT)))))


class RefusalTestCase(LvmTestCase):

    def setUp(self):
        super().setUp()
        self._add_volume()

    def _fill(self, left):
        """Leave so many bytes in the group there."""
        self.dest.groups[GROUP] = left + EXTENT

    def test_no_room_in_the_group(self):
        self._fill(EXTENT)
        self._assert_refused('volume group vg', f'{EXTENT} bytes available')

    def test_no_room_for_a_larger_disk(self):
        self._fill(8 * EXTENT)
        self._assert_refused('volume group vg', f'{8 * len(ROOT)}',
                             flavor=self._flavor(8))

    def test_no_room_for_the_swap_disk(self):
        self._fill(2 * EXTENT)
        flavor = self._flavor()
        flavor.swap = 1
        self._assert_refused('volume group vg', f'{2 * EXTENT + units.Mi}',
                             flavor=flavor)
        flavor.swap = 0
        self._migrate(flavor=flavor)

    def test_name_that_is_taken(self):
        name = f'{uuids.instance}_disk'
        taken = self.dest.add_logical_volume(GROUP, name, b'precious')
        before = taken.content.copy()
        error = self.assertRaises(exception.InstanceFaultRollback,
                                  self._migrate)
        self.assertIn(f'{name} is in the way', str(error))
        self.assertEqual([], self.calls.mock_calls)
        self.assertEqual(before, self.dest.logical_volumes(
            GROUP)[name].content)

    def test_group_that_both_hosts_share(self):
        name = f'{uuids.instance}_disk'
        self.dest.files[self._path()] = self.source.files[self._path()]
        # Its disks look like the leftovers of an attempt.
        claim = f'{self.instances}/{uuids.instance}_{layout.CLAIM}-a@source'
        self.dest.add_file(claim)
        error = self.assertRaises(exception.InstanceFaultRollback,
                                  self._migrate)
        self.assertIn('both hosts share volume group vg', str(error))
        self.assertEqual([], self.calls.mock_calls)
        self.assertIn(name, self.dest.logical_volumes(GROUP))
        self.assertIn(claim, self.dest.files)
        self.assertEqual(Content.of(ROOT),
                         self.source.files[self._path()].content)

    def test_group_that_is_not_there(self):
        self.dest.groups.clear()
        del self.dest.files[f'{layout.group_path(GROUP)}/other_disk']
        error = self.assertRaises(exception.InstanceFaultRollback,
                                  self._migrate)
        self.assertIn('cannot use volume group vg', str(error))
        self.assertEqual([], self.calls.mock_calls)

    def test_destination_that_has_its_disks_elsewhere(self):
        self.dest.remove_file(f'{self.instances}/{layout.GROUP_MARK}{GROUP}')
        self._assert_refused('does not take servers into volume group vg')

    def test_destination_with_another_group_of_a_longer_name(self):
        self.dest.remove_file(f'{self.instances}/{layout.GROUP_MARK}{GROUP}')
        self.dest.add_file(f'{self.instances}/{layout.GROUP_MARK}{GROUP}2')
        self._assert_refused('does not take servers into volume group vg')

    def test_encrypted_disks(self):
        self.instance.ephemeral_key_uuid = uuids.key
        self._assert_refused('[ephemeral_storage_encryption]')

    def test_live_migration(self):
        error = self.assertRaises(
            exception.MigrationPreCheckError,
            self.driver.check_can_live_migrate_source, self.context,
            self.instance, objects.LibvirtLiveMigrateData(), {})
        self.assertIn('Cold migrate the server', str(error))

    @mock.patch.object(driver.LibvirtDriver, 'check_can_live_migrate_source')
    def test_live_migration_is_novas_with_the_options_off(self, nova):
        self.flags(vol_upload_migration=False, group='libvirt')
        data = objects.LibvirtLiveMigrateData()
        self.assertEqual(
            nova.return_value, self.driver.check_can_live_migrate_source(
                self.context, self.instance, data, {}))

    def test_disk_that_is_not_novas(self):
        self.disk_info.return_value.append(dict(
            self.disk_info.return_value[0], path=self._path('snapshot')))
        self._assert_refused('not one that Nova made')

    def test_smaller_flavor(self):
        self.assertIsInstance(
            self._assert_refused(flavor=self._flavor(0)),
            exception.ResizeError)


@ddt.ddt
class FailureTestCase(LvmTestCase):

    ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
             'cannot write to stream: Input/output error')

    def setUp(self):
        super().setUp()
        self._add_volume()
        self.deleted = []

    def _fail(self):
        """A migration that fails in the middle of its only disk."""
        self.dest.fail('stream.send', error=self.ERROR, after=EXTENT)
        name = f'{uuids.instance}_disk'

        def look():
            self.deleted.append(
                self.dest.logical_volumes(GROUP)[name].content.copy())

        self.dest.call('vol.delete', look, name=name)
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate).inner_exception
        self.assertEqual('power_on', self.calls.mock_calls[-1][0])
        return str(error)

    def test_server_runs_again_and_the_copy_is_wiped(self):
        self.assertIn('Input/output error', self._fail())
        self._assert_nothing_on_destination()
        content, = self.deleted
        self.assertEqual(padded(b'', 2), content)

    @ddt.data(('none', 0, 0), ('zero', 1, units.Mi),
              ('shred', 0, 2 * EXTENT))
    @ddt.unpack
    def test_copy_is_wiped_as_the_operator_wants_it(self, how, size, wiped):
        self.flags(volume_clear=how, volume_clear_size=size, group='libvirt')
        self._fail()
        self._assert_nothing_on_destination()
        content, = self.deleted
        self.assertEqual(Content(wiped), Content.of(content.read(0, wiped)))
        self.assertEqual(
            wiped < len(DATA), content.read(0, len(DATA)) == DATA)
        self.assertEqual(
            wiped < len(ROOT), OLD in content.read(wiped, len(ROOT)))

    def test_leftover_of_a_dead_attempt_is_wiped(self):
        name = f'{uuids.instance}_disk'
        self.dest.add_file(
            f'{self.instances}/{uuids.instance}_{layout.CLAIM}-other@source')
        leftover = self.dest.add_logical_volume(GROUP, name, ROOT)
        self._migrate()
        self.assertEqual(padded(b'', 2), leftover.content)
        self.assertEqual({'disk': Content.of(ROOT)}, self._arrived())

    def test_volumes_of_others_stay(self):
        before = self.dest.logical_volumes(GROUP)['other_disk'].content.copy()
        self._fail()
        self.assertEqual(before, self.dest.logical_volumes(
            GROUP)['other_disk'].content)


class FinishTestCase(LvmTestCase, test_storage_migrate.FinishMixin):

    def setUp(self):
        super().setUp()
        self._add_volume()
        self._add_file('disk.info', b'{}')
        self.marker = self._claim(directory=self.instances)

    def test_disks_are_flushed_and_left_as_they_are(self):
        self.assertEqual([], self._finish(self.disk_info.return_value))
        self.flush.assert_called_once_with(self._path())
        self.assertFalse(os.path.exists(self.marker))

    def test_disk_that_is_not_here(self):
        self._add_volume('disk.eph0')
        os.unlink(self._path('disk.eph0'))
        error = self.assertRaises(
            exception.MigrationError, self._finish,
            self.disk_info.return_value)
        self.assertIn(f'{self._path("disk.eph0")} of the server is not here',
                      str(error))
        self.assertTrue(os.path.exists(self.marker))

    def test_disk_that_cannot_be_flushed(self):
        self.flush.side_effect = OSError
        self.assertRaises(exception.MigrationError, self._finish,
                          self.disk_info.return_value)
        self.assertTrue(os.path.exists(self.marker))

    def test_root_disk_that_came_as_a_file(self):
        os.unlink(self._path())
        path = self._add_file('disk', b'image')
        self._add_record({path: 'qcow2'})
        error = self.assertRaises(
            exception.MigrationError, self._finish,
            [{'path': path, 'type': 'qcow2'}])
        self.assertIn('does not see disk disk of', str(error))


class ImageTestCase(LvmTestCase):

    def _image(self):
        return self.driver.image_backend.by_name(self.instance, 'disk')

    def setUp(self):
        super().setUp()
        self.create = self.useFixture(fixtures.MockPatchObject(
            imagebackend.Lvm, 'create_image')).mock

    def test_disk_that_came_is_not_made_again(self):
        self._add_volume()
        found = self._image()
        self.assertIsInstance(found, image.LogicalVolume)
        found.cache(mock.Mock(), 'image', size=units.Gi)
        self.create.assert_not_called()

    def test_new_disk_is_made_as_nova_does(self):
        self._image().cache(mock.Mock(), 'image', size=units.Gi)
        self.create.assert_called_once()


@ddt.ddt
class LocalTestCase(LvmTestCase):
    """What nova-compute does with volumes on its own host."""

    def setUp(self):
        super().setUp()
        self.nova = self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, 'confirm_migration')).mock
        self._add_volume()
        self._add_volume('disk.swap')

    def _confirm(self):
        self.driver.confirm_migration(
            self.context, mock.Mock(), self.instance, mock.sentinel.network)
        self.nova.assert_called_once()

    def test_confirm_removes_what_was_kept(self):
        self.instance.host = 'dest'
        os.rename(self.directory, self.places.kept_directory)
        self._confirm()
        self.remove.assert_called_once_with(self.places.logical_volumes())
        self.assertEqual(2, len(self.remove.call_args.args[0]))

    def test_confirm_spares_what_this_migration_has_not_kept(self):
        self.instance.host = 'dest'
        self._confirm()
        self.remove.assert_not_called()

    def test_confirm_spares_a_server_of_this_host(self):
        os.rename(self.directory, self.places.kept_directory)
        self._confirm()
        self.remove.assert_not_called()

    def test_confirm_with_other_images(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.instance.host = 'dest'
        os.rename(self.directory, self.places.kept_directory)
        self._confirm()
        self.remove.assert_not_called()

    @ddt.data(True, False)
    def test_volumes_go_if_the_server_was_deleted_unconfirmed(self, deleted):
        """Nova deletes only files then."""
        self.instance.deleted = deleted
        self.assertTrue(self.driver.delete_instance_files(self.instance))
        self.assertEqual(deleted, self.remove.called)

    def test_abandoned_copy_goes_with_its_volumes(self):
        self.instance.host = 'gone'
        self.instance.vm_state = vm_states.ACTIVE
        claim = layout.Claim(uuids.instance, 'attempt', 'gone')
        marker = os.path.join(self.instances, claim.arrived_name)
        self._put_device(marker, b'')
        order = mock.Mock()
        self.remove.side_effect = lambda paths: order(
            os.path.exists(marker), len(paths))
        with (mock.patch.object(objects.Instance, 'get_by_uuid',
                                return_value=self.instance),
              mock.patch.object(objects.Instance, 'refresh'),
              mock.patch.object(self.driver, 'instance_exists',
                                return_value=False)):
            self.driver._delete_abandoned()
        # The claim goes last.
        order.assert_called_once_with(True, 2)
        self.assertFalse(os.path.exists(marker))
        self.assertFalse(os.path.exists(self.directory))

    def test_claim_stays_on_volumes_of_a_server_that_is_gone(self):
        claim = layout.Claim(uuids.instance, 'attempt', 'gone')
        marker = os.path.join(self.instances, claim.arrived_name)
        self._put_device(marker, b'')
        os.rmdir(self.directory)
        local.drop_lone_claims(self.places)
        self.assertTrue(os.path.exists(marker))
        for path in self.places.logical_volumes():
            os.unlink(path)
        local.drop_lone_claims(self.places)
        self.assertFalse(os.path.exists(marker))


@ddt.ddt
class MarkTestCase(LvmTestCase):
    """What other hosts see of where this one has its disks."""

    def _marks(self):
        self._put_device(os.path.join(
            self.instances, layout.GROUP_MARK + 'former'), b'')
        local.tell_place(self.driver._mark())
        return os.listdir(self.instances)

    def test_group_is_told(self):
        self.assertEqual({uuids.instance, layout.GROUP_MARK + GROUP},
                         set(self._marks()))

    @ddt.data({'vol_upload_migration': False}, {'images_type': 'rbd'},
              {'vol_upload_migration_legacy': False},
              {'images_volume_group': None})
    def test_group_is_not_told(self, change):
        self.flags(group='libvirt', **change)
        self.assertEqual([uuids.instance], self._marks())

    def test_files_are_told(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.assertEqual({uuids.instance, layout.NO_POOL},
                         set(self._marks()))
