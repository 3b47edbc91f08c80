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

import contextlib
import copy
import errno
import os
import subprocess
import tempfile
import threading
import time
from unittest import mock

import ddt
import fixtures
from lxml import etree
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units
from oslo_utils import uuidutils

from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt import event as virtevent
from nova.virt.libvirt import driver
from nova.virt.libvirt import guest
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import live
from nova.virt.libvirt.storage import local
from nova.virt.libvirt import storage_migrate

try:
    import libvirt
except ImportError:
    libvirt = None

SIZE = 4 * units.Mi

DOMAIN = """
<domain>
  <name>a</name>
  <devices>
    <disk type='file' device='disk'>
      <source file='%(pool)s/%(uuid)s_disk'/><target dev='vda'/>
      <backingStore type='file'><source file='/base/a'/></backingStore>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='%(directory)s/disk.config'/><target dev='sda'/>
      <readonly/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/a'/><target dev='vdb'/>
    </disk>
  </devices>
</domain>
"""


class LiveTestCase(test_storage_migrate.DriverTestCase):
    """A server that moves while it runs; this host is either of the two."""

    def setUp(self):
        super().setUp()
        self.instance.update({
            'kernel_id': '', 'trusted_certs': None, 'vm_state': 'active',
            'os_type': None, 'numa_topology': None,
            'task_state': task_states.MIGRATING})
        self.data = objects.LibvirtLiveMigrateData(
            is_shared_instance_path=False, is_shared_block_storage=False,
            block_migration=True, instance_relative_path=uuids.instance,
            filename='test')
        self.exists = self.patch('instance_exists', return_value=False)
        self.has_domain = self.patch('_has_domain', return_value=False)

    def patch(self, name, **kwargs):
        """Stand in for a method of this driver."""
        patcher = mock.patch.object(self.driver, name, **kwargs)
        self.addCleanup(patcher.stop)
        return patcher.start()

    @staticmethod
    def novas(name, **kwargs):
        """Stand in for a method of Nova's driver."""
        return mock.patch.object(driver.LibvirtDriver, name, **kwargs)

    def there(self, name):
        return f'/srv/disks/{uuids.instance}_{name}'

    def notice(self, **about):
        live.Notice(**{'path': '/srv/disks', 'marker': 'elsewhere',
                       'claim': self.claim_name(), **about}).write(self.data)

    @staticmethod
    def claim_name(attempt=uuids.attempt, source='source'):
        return layout.Claim(uuids.instance, attempt, source).name

    def claims(self):
        return list(set(self.places.claims().values()))

    def add_claim(self, source='source'):
        return live.claim(self.places, live.Notice('', claim=self.claim_name(
            uuidutils.generate_uuid(), source)), source, True)


class NoticeTestCase(LiveTestCase):

    def test_none_is_read_where_none_was_written(self):
        self.assertIsNone(live.Notice.read(self.data))
        self.data.bdms = []
        self.assertIsNone(live.Notice.read(self.data))

    def test_it_is_carried_beside_cinders_volumes(self):
        volume = objects.LibvirtLiveMigrateBDMInfo(
            serial=uuids.volume, bus='virtio', dev='vdb', type='disk')
        self.data.bdms = [volume]
        self.notice(sent=['a'])
        self.notice(sent=['b'])
        carried = objects.LibvirtLiveMigrateData.obj_from_primitive(
            jsonutils.loads(jsonutils.dumps(self.data.obj_to_primitive())))
        self.assertEqual(
            live.Notice('/srv/disks', 'elsewhere', sent=['b'],
                        claim=self.claim_name()),
            live.Notice.read(carried))
        self.assertEqual([uuids.volume, live.SERIAL],
                         [device.serial for device in carried.bdms])

    def test_what_a_later_release_adds_is_ignored(self):
        self.notice()
        self.data.bdms[0].connection_info = {'path': '/a', 'new': 1}
        self.assertEqual(live.Notice('/a'), live.Notice.read(self.data))


@ddt.ddt
class CheckAtDestinationTestCase(LiveTestCase):

    def setUp(self):
        super().setUp()
        os.unlink(self.places.record_path) if os.path.exists(
            self.places.record_path) else None
        os.rmdir(self.directory)

    def check(self):
        with self.novas('check_can_live_migrate_destination',
                        return_value=self.data):
            self.driver.check_can_live_migrate_destination(
                self.context, self.instance, {}, {})
        return live.Notice.read(self.data)

    def test_domain_that_is_here_is_refused(self):
        """Before there is anything that a rollback would delete."""
        self.has_domain.return_value = True
        self.assertRaises(exception.MigrationPreCheckError, self.check)
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self.check()

    def test_it_tells_about_its_pool(self):
        notice = self.check()
        self.assertEqual(self.pool_path, notice.path)
        self.assertEqual([], notice.in_the_way)
        self.assertIsNone(notice.sent)
        self.assertEqual([notice.marker], self._volumes())

    def test_marker_is_no_volume_of_the_server(self):
        """A server with files may be checked, in a pool that is shared."""
        self.check()
        self.assertEqual([], self.places.volumes())

    def test_marker_goes_after_the_check(self):
        self.check()
        with self.novas('cleanup_live_migration_destination_check') as nova:
            self.driver.cleanup_live_migration_destination_check(
                self.context, self.data)
        nova.assert_called_once_with(self.context, self.data)
        self.assertEqual([], self._volumes())

    def test_pool_that_cannot_be_written(self):
        """Nothing that Nova has made for the check stays."""
        full = OSError(errno.ENOSPC, 'full')
        with (mock.patch.object(tempfile, 'mkstemp', side_effect=full),
              self.novas('cleanup_live_migration_destination_check') as nova):
            self.assertRaises(exception.MigrationPreCheckError, self.check)
        nova.assert_called_once_with(self.context, self.data)

    def test_old_markers_go_when_nova_compute_starts(self):
        new, old, cold, empty, full = (
            os.path.join(self.pool_path, name) for name in (
                f'{uuids.other}-live-new_1', f'{uuids.other}-live-old_1',
                f'{uuids.other}-shared-old_1',
                'debian-live-old', f'{uuids.other}-live-full'))
        for path in new, old, cold, empty, full:
            with open(path, 'w') as file:
                file.write('full' if path == full else '')
            if path != new:
                os.utime(path, (0, 0))
        live.delete_markers(self.pool_path)
        self.assertCountEqual(
            map(os.path.basename, (new, empty, full)), self._volumes())

    def test_with_both_options_off_it_tells_nothing(self):
        self.flags(use_storage_pools=False, vol_upload_migration=False,
                   group='libvirt')
        self.assertIsNone(self.check())
        with self.novas('cleanup_live_migration_destination_check'):
            self.driver.cleanup_live_migration_destination_check(
                self.context, self.data)

    def test_without_a_pool_it_tells_that_it_has_files(self):
        self.flags(use_storage_pools=False, group='libvirt')
        notice = self.check()
        self.assertEqual(live.Notice('', claim=notice.claim), notice)
        self.assertEqual([], self._volumes())
        with self.novas('cleanup_live_migration_destination_check'):
            self.driver.cleanup_live_migration_destination_check(
                self.context, self.data)

    @ddt.data('rbd', 'lvm')
    def test_with_disks_that_are_no_files_it_tells_nothing(self, image_type):
        self.flags(use_storage_pools=False, images_type=image_type,
                   group='libvirt')
        self.assertIsNone(self.check())

    @ddt.data(True, False)
    def test_it_tells_what_is_in_the_way(self, has_pool):
        self.flags(use_storage_pools=has_pool, group='libvirt')
        os.mkdir(self.directory)
        path = os.path.join(self.pool_path, self._add_disk())
        self.assertEqual([path, self.directory], self.check().in_the_way)

    def test_directory_that_a_migration_kept_is_in_the_way(self):
        os.mkdir(self.places.kept_directory)
        self.assertEqual(
            [self.places.kept_directory], self.check().in_the_way)

    def test_what_a_dead_attempt_left_is_not_in_the_way(self):
        os.mkdir(self.directory)
        self._add_disk()
        self.add_claim_beside()
        self.assertEqual([], self.check().in_the_way)

    def add_claim_beside(self):
        name = layout.Claim(uuids.instance, 'a', 'source').name
        with open(os.path.join(self.pool_path, name), 'wb'):
            pass


class SourceTestCase(LiveTestCase):
    """The check on the source host."""

    def setUp(self):
        super().setUp()
        self.disks = []
        self.patch('_list_read_only', return_value=set())
        self.lost = self.patch('_lost_bases', return_value=[])
        self.shares_directory = self.patch(
            '_check_shared_storage_test_file', return_value=False)
        self.useFixture(fixtures.MockPatchObject(
            layout, 'backing_file', return_value=None))

    def check(self):
        with self.novas('check_can_live_migrate_source',
                        return_value=self.data) as nova:
            result = self.driver.check_can_live_migrate_source(
                self.context, self.instance, self.data, mock.sentinel.bdi)
        nova.assert_called_once_with(
            self.context, self.instance, self.data, mock.sentinel.bdi)
        return result

    def refused(self, *texts):
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.check)
        for text in texts:
            self.assertIn(text, str(error))

    def sent(self):
        return live.Notice.read(self.check()).sent


@ddt.ddt
class CheckAtSourceTestCase(SourceTestCase):

    def add_image(self, name='disk', base=''):
        volume = self._add_disk(name, 'qcow2')
        self.disk_info.return_value[-1]['backing_file'] = base
        return volume

    def test_destination_that_says_nothing_is_refused(self):
        self.add_image()
        self.refused('the destination has none', 'use_storage_pools')

    def test_what_is_in_the_way_is_named(self):
        self.add_image()
        self.notice(in_the_way=['/srv/disks/a', '/instances/a'])
        self.refused('/srv/disks/a, /instances/a', 'delete')

    def test_own_volumes_are_not_in_the_way_on_shared_storage(self):
        volume = self.add_image()
        self.notice(marker=volume, in_the_way=[volume])
        self.shares_directory.return_value = True
        self.check()

    def test_nothing_is_sent_on_shared_storage(self):
        volume = self.add_image(base='abc')
        self.lost.return_value = ['/nowhere/abc']
        self.flags(vol_upload_migration_uri='qemu+tcp://%%s/system?%s',
                   group='libvirt')
        self.notice(marker=volume)
        self.shares_directory.return_value = True
        self.assertEqual([], self.sent())

    def test_raw_volume_is_refused(self):
        self._add_disk('disk', 'raw')
        self.notice()
        self.refused('is raw', 'Cold migrate the server to')

    def test_disk_that_is_elsewhere_is_refused(self):
        self.add_image()
        self.disk_info.return_value.append(
            {'path': '/elsewhere/disk', 'type': 'raw', 'backing_file': ''})
        self.notice()
        self.refused('/elsewhere/disk')

    @ddt.data((False, False), (False, True), (True, False), (True, True))
    @ddt.unpack
    def test_both_places_are_shared_or_neither(self, directory, pool):
        """The directory there that is in the way may be this host's own."""
        volume = self.add_image()
        self.notice(marker=volume if pool else 'elsewhere',
                    in_the_way=[self.directory] if directory else [])
        self.shares_directory.return_value = directory
        if directory == pool:
            self.check()
            self.assertEqual(pool, self.driver._is_shared_block_storage(
                self.instance, self.data))
        else:
            self.refused('both hosts share either')

    def test_raw_volume_may_leave_the_pool(self):
        self._add_disk('disk', 'raw')
        self.notice(path='', marker='')
        self.assertEqual([], self.sent())

    def test_no_pool_is_no_shared_pool(self):
        self.add_image()
        self.notice(path='', marker='')
        self.assertFalse(self.driver._is_shared_block_storage(
            self.instance, self.data))

    # What the source sends.

    def test_qemu_copies_images_and_overlays_on_glances(self):
        self.add_image(base='abc')
        self.add_image('disk.eph0')
        self.notice()
        self.assertEqual([], self.sent())

    @ddt.data('ephemeral_1_abc', 'swap_64')
    def test_overlay_on_a_base_of_this_host_is_sent(self, base):
        volume = self.add_image('disk.eph0', base)
        self.notice()
        self.assertEqual([volume], self.sent())

    def test_overlay_whose_base_glance_has_lost_is_sent(self):
        volume = self.add_image(base='abc')
        self.add_image('disk.eph0')
        self.lost.return_value = [self._add_file('abc', b'')]
        self.notice()
        self.assertEqual([volume], self.sent())

    def test_base_image_for_which_here_is_no_room(self):
        """The copy of it would fill up the disks of other guests."""
        self.add_image(base='abc')
        base = self._add_file('abc', b'a' * 8192)
        self.lost.return_value = [base]
        self.notice()
        needed = os.stat(base).st_blocks * 512
        for free, may in ((2 * needed, True), (2 * needed - 512, False)):
            with mock.patch('os.statvfs', return_value=mock.Mock(
                    f_bavail=free // 512, f_frsize=512)):
                if may:
                    self.check()
                else:
                    self.refused(f'no room for the {needed} bytes', 'Free')

    def test_config_drive_is_sent_unless_the_guest_can_write_it(self):
        self.add_image()
        path = os.path.join(self.directory, 'disk.config')
        self.disk_info.return_value.append(
            {'path': path, 'type': 'raw', 'backing_file': ''})
        self.notice()
        self.assertEqual([], self.sent())
        self.driver._list_read_only.return_value = {path}
        self.assertEqual(['disk.config'], self.sent())

    def test_kernel_and_ramdisk_are_sent(self):
        self.add_image()
        self._add_file('kernel', b'kernel')
        self._add_file('ramdisk', b'ramdisk')
        self.notice()
        self.assertEqual(['kernel', 'ramdisk'], self.sent())

    def test_uri_that_is_not_safe_is_refused_if_anything_is_sent(self):
        self.flags(vol_upload_migration_uri='qemu+tls://%s/system?no_verify=1',
                   group='libvirt')
        self.add_image()
        self.notice()
        self.check()
        self.add_image('disk.swap', 'swap_64')
        self.refused('no_verify')


@ddt.ddt
class CheckFilesAtSourceTestCase(SourceTestCase):
    """A server with files in its instance directory."""

    def setUp(self):
        super().setUp()
        self.path = self._add_file('disk', b'')
        self.config = self._add_file('disk.config', b'')
        self._add_record({self.path: 'qcow2', self.config: 'raw'})
        self.disk_info.return_value += [
            {'path': self.path, 'type': 'qcow2', 'backing_file': 'abc'},
            {'path': self.config, 'type': 'raw', 'backing_file': ''}]
        self.driver._list_read_only.return_value = {self.config}

    def test_config_drive_is_sent(self):
        self.notice()
        self.assertEqual(['disk.config'], self.sent())

    def test_overlay_whose_base_glance_has_lost_is_sent(self):
        self.lost.return_value = [self._add_file('abc', b'')]
        self.notice(path='', marker='')
        self.assertEqual(['disk', 'disk.config'], self.sent())

    def test_what_is_in_the_way_is_named(self):
        self.notice(in_the_way=['/instances/a'])
        self.refused('/instances/a', 'delete')

    def test_shared_pool_alone_is_refused(self):
        """The source would delete the disk there, as it clears up."""
        with open(os.path.join(self.pool_path, 'marker'), 'wb'):
            pass
        self.notice(path=self.pool_path, marker='marker')
        self.refused('share either')

    def assert_novas(self):
        self.check()
        notice = live.Notice.read(self.data)
        self.assertIsNone(notice and notice.sent)

    def test_destination_that_says_nothing_is_novas(self):
        self.assert_novas()

    @ddt.data('is_shared_instance_path', 'is_shared_block_storage')
    def test_shared_storage_is_novas(self, shared):
        setattr(self.data, shared, True)
        self.notice(in_the_way=['/instances/a'])
        self.assert_novas()

    @ddt.data({'vol_upload_migration': False}, {'images_type': 'lvm'})
    def test_source_without_the_options_is_novas(self, options):
        self.flags(group='libvirt', **options)
        self.notice()
        self.assert_novas()

    def test_disk_that_nova_did_not_make_is_novas(self):
        self.disk_info.return_value.append(
            {'path': '/elsewhere/disk', 'type': 'raw', 'backing_file': ''})
        self.notice()
        self.assert_novas()

    def test_uri_that_is_not_safe_is_novas(self):
        self.flags(vol_upload_migration_uri='qemu+tls://%s/system?no_verify=1',
                   group='libvirt')
        self.notice()
        self.assert_novas()


@ddt.ddt
class PrepareTestCase(LiveTestCase):
    """What the destination does before QEMU begins."""

    def setUp(self):
        super().setUp()
        os.rmdir(self.directory)
        self.patch('_pre_live_migration_plug_vifs')
        self.fetch = self.patch('_try_fetch_image_cache')
        self.create = mock.patch(
            'nova.virt.libvirt.utils.create_image').start()
        self.addCleanup(mock.patch.stopall)

    def prepare(self, *disks):
        infos = [{'path': path, 'type': form, 'virt_disk_size': SIZE,
                  'backing_file': backing} for path, form, backing in disks]
        self.driver.pre_live_migration(
            self.context, self.instance, {}, [],
            jsonutils.dumps(infos) if infos else None, self.data)
        return live.Notice.read(self.data)

    def here(self, name):
        return self.places.volume_path(name)

    def test_disks_are_made_where_they_belong(self):
        config = os.path.join(self.directory, 'disk.config')
        self.notice(sent=[])
        notice = self.prepare(
            (self.there('disk'), 'qcow2', 'abc'),
            (self.there('disk.eph0'), 'qcow2', ''), (config, 'raw', ''))
        overlay = self.fetch.call_args.args[0]
        self.assertEqual(self.here('disk'), overlay.path)
        self.assertIsInstance(overlay, image.Qcow2Volume)
        self.assertEqual(
            [mock.call(self.here('disk.eph0'), 'qcow2', SIZE),
             mock.call(config, 'raw', SIZE)], self.create.mock_calls)
        self.assertEqual(
            {self.here('disk'): 'qcow2', self.here('disk.eph0'): 'qcow2',
             config: 'raw'}, self.places.formats())
        self.assertEqual(self.pool_path, notice.path)

    def test_claim_names_the_source_and_is_told(self):
        self.notice(sent=[])
        notice = self.prepare((self.there('disk'), 'qcow2', ''))
        made, = self.claims()
        self.assertEqual('source', made.source)
        # The source host knows it, also if this answer is lost.
        self.assertEqual(self.claim_name(), made.name)
        self.assertEqual(made.name, notice.claim)
        self.assertEqual([made.name], self._volumes())
        self.assertEqual(
            sorted([made.arrived_name, uuids.instance]),
            sorted(set(os.listdir(self.instances)) & {
                made.arrived_name, made.name, uuids.instance}))

    def test_formats_are_recorded_before_the_first_disk_is_made(self):
        self.notice(sent=[])
        self.create.side_effect = lambda *_args: self.assertEqual(
            {self.here('disk'): 'qcow2'}, self.places.formats())
        self.prepare((self.there('disk'), 'qcow2', ''))
        self.create.assert_called_once()

    def test_what_the_source_sends_is_recorded_and_not_made(self):
        name = f'{uuids.instance}_disk.eph0'
        config = os.path.join(self.directory, 'disk.config')
        self.notice(sent=[name, 'disk.config'])
        notice = self.prepare(
            (self.there('disk.eph0'), 'qcow2', 'ephemeral_1_a'),
            (config, 'raw', ''))
        self.create.assert_not_called()
        self.fetch.assert_not_called()
        self.assertEqual({self.here('disk.eph0'): 'qcow2', config: 'raw'},
                         self.places.formats())
        self.assertEqual([name, 'disk.config'], notice.sent)

    @ddt.data(None, live.Notice('/srv/disks'))
    def test_source_with_another_driver_is_refused(self, notice):
        if notice:
            notice.write(self.data)
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.prepare,
            (self.there('disk'), 'qcow2', ''))
        self.assertIn('compute_driver', str(error))
        self.assertEqual([], self._volumes())
        self.assertFalse(os.path.exists(self.directory))

    def test_domain_that_is_here_is_refused(self):
        self.has_domain.return_value = True
        self.add_claim()
        self.notice(sent=[])
        self.assertRaises(
            exception.MigrationPreCheckError, self.prepare,
            (self.there('disk'), 'qcow2', ''))
        self.assertEqual(1, len(self.claims()))

    def prepare_files(self, *disks):
        """A server whose disks are files on the source host."""
        self.notice(sent=['disk.config'])
        config = os.path.join(self.directory, 'disk.config')
        return self.prepare(*(
            (os.path.join(self.directory, name), form, backing)
            for name, form, backing in disks), (config, 'raw', ''))

    def test_images_go_into_the_pool(self):
        notice = self.prepare_files(
            ('disk', 'qcow2', 'abc'), ('disk.swap', 'qcow2', ''))
        config = os.path.join(self.directory, 'disk.config')
        self.assertEqual(
            {'disk': self.here('disk'), 'disk.swap': self.here('disk.swap'),
             'disk.config': config}, notice.paths)
        self.assertEqual(self.here('disk'), self.fetch.call_args.args[0].path)
        self.create.assert_called_once_with(
            self.here('disk.swap'), 'qcow2', SIZE)
        self.assertEqual(
            {self.here('disk'): 'qcow2', self.here('disk.swap'): 'qcow2',
             config: 'raw'}, self.places.formats())
        self.assertEqual(1, len(self.claims()))

    def test_raw_file_keeps_all_of_them_files(self):
        notice = self.prepare_files(
            ('disk', 'raw', ''), ('disk.eph0', 'qcow2', ''))
        self.assertEqual(
            {name: os.path.join(self.directory, name)
             for name in ('disk', 'disk.eph0', 'disk.config')}, notice.paths)
        self.assertEqual([notice.claim], self._volumes())

    def test_disks_leave_the_pool(self):
        self.flags(use_storage_pools=False, group='libvirt')
        self.notice(path='', sent=[f'{uuids.instance}_disk.eph0'])
        notice = self.prepare((self.there('disk'), 'raw', ''),
                              (self.there('disk.eph0'), 'qcow2', ''))
        root, ephemeral = (os.path.join(self.directory, name)
                           for name in ('disk', 'disk.eph0'))
        self.assertEqual({f'{uuids.instance}_disk': root,
                          f'{uuids.instance}_disk.eph0': ephemeral},
                         notice.paths)
        self.assertEqual('', notice.path)
        self.create.assert_called_once_with(root, 'raw', SIZE)
        self.assertEqual({root: 'raw', ephemeral: 'qcow2'},
                         self.places.formats())
        made, = self.claims()
        self.assertEqual(made.name, notice.claim)
        self.assertEqual([], self._volumes())

    @ddt.data(True, False)
    def test_image_is_one_whatever_this_host_makes_of_new_disks(self, cow):
        self.flags(use_cow_images=cow)
        self.flags(use_storage_pools=False, group='libvirt')
        self.driver.image_backend = image.Backend(cow)
        self.notice(path='', sent=[])
        self.prepare((self.there('disk'), 'qcow2', 'abc'))
        self.assertIsInstance(
            self.fetch.call_args.args[0], imagebackend.Qcow2)

    def test_kernel_and_ramdisk_are_not_fetched_if_they_are_sent(self):
        self.instance.kernel_id = uuids.kernel
        self.instance.ramdisk_id = ''
        with mock.patch.object(self.driver, '_try_fetch_image') as fetch:
            self.prepare_files(('disk', 'qcow2', ''))
            fetch.assert_not_called()
            self.driver.delete_instance_files(self.instance)
            self.data.bdms = []
            self.prepare((os.path.join(self.directory, 'disk'), 'raw', ''))
            fetch.assert_called_once()

    def test_server_with_files_stays_one_if_the_source_is_novas(self):
        """Nova names the disk by its path, which is not there yet."""
        path = os.path.join(self.directory, 'disk')
        self.notice()
        self.assertIsNone(self.prepare((path, 'qcow2', 'abc')))
        self.assertEqual(path, self.fetch.call_args.args[0].path)
        self.assertEqual({path: 'qcow2'}, self.places.formats())
        self.assertEqual([], self._volumes())

    def test_what_a_dead_attempt_left_is_cleared(self):
        os.mkdir(self.directory)
        self._add_disk('disk.eph0')
        self.add_claim_beside()
        self.notice(sent=[])
        self.prepare((self.there('disk'), 'qcow2', ''))
        self.assertEqual(
            [self.claims()[0].name], self._volumes())
        self.assertNotEqual('dead', self.claims()[0].attempt)

    def add_claim_beside(self):
        name = layout.Claim(uuids.instance, 'dead', 'source').name
        with open(os.path.join(self.pool_path, name), 'wb'):
            pass

    def test_shared_record_gets_the_paths_of_this_host(self):
        os.mkdir(self.directory)
        here = os.path.join(self.pool_path, self._add_disk('disk', 'qcow2'))
        layout.write_record(
            self.places.record_path, {self.there('disk'): 'qcow2'})
        self.data.is_shared_instance_path = True
        self.data.is_shared_block_storage = True
        self.notice(sent=[])
        notice = self.prepare()
        self.assertEqual({self.there('disk'): 'qcow2', here: 'qcow2'},
                         self.places.formats())
        self.assertEqual([], self.claims())
        self.assertEqual('', notice.claim)
        self.assertEqual(self.pool_path, notice.path)


@ddt.ddt
class EndTestCase(LiveTestCase):
    """What the destination does in the end, or after a failure."""

    def end(self, **nova):
        with self.novas('post_live_migration_at_destination', **nova):
            self.driver.post_live_migration_at_destination(
                self.context, self.instance, [])

    def test_files_are_flushed_and_then_the_servers_own(self):
        self._add_disk()
        self.add_own_claim()
        config = self._add_file('disk.config', b'')
        with mock.patch.object(layout, 'flush', side_effect=lambda path:
                               self.assertEqual(1, len(self.claims()))
                               ) as flush:
            self.end()
        self.assertEqual(
            [mock.call(path) for path in (
                self.here, self.places.record_path, config, self.pool_path,
                self.directory, self.instances)], flush.mock_calls)
        self.assertEqual([], self.claims())

    def test_files_are_flushed_where_there_is_no_pool(self):
        disk = self._add_file('disk', b'')
        self._add_record({disk: 'qcow2'})
        live.claim(self.places, live.Notice('', claim=self.claim_name()),
                   'source', False)
        os.rmdir(self.pool_path)
        with mock.patch.object(layout, 'flush') as flush:
            self.end()
        self.assertEqual(
            [mock.call(path) for path in (
                self.places.record_path, disk, self.directory,
                self.instances)], flush.mock_calls)
        self.assertEqual([], self.claims())

    def test_what_qemu_owns_is_not_flushed(self):
        """nova-compute may not open the console log of a running server."""
        os.chmod(self._add_file('console.log', b''), 0)
        self.add_own_claim()
        with mock.patch.object(layout, 'flush') as flush:
            self.end()
        self.assertNotIn('console', str(flush.mock_calls))

    def add_own_claim(self):
        self.here = self.places.volume_path('disk')
        name = layout.Claim(uuids.instance, 'a', 'source').name
        with open(os.path.join(self.pool_path, name), 'wb'):
            pass

    @mock.patch.object(layout, 'flush')
    def test_nothing_is_flushed_without_a_claim(self, flush):
        self.end()
        flush.assert_not_called()

    @ddt.data((True, True), (False, True), (True, False))
    @ddt.unpack
    def test_disks_of_a_server_that_was_deleted_on_its_way(self, ours, gone):
        """A server that Nova knows needs them, though no domain is here."""
        if ours:
            self.add_own_claim()
        delete = self.patch('delete_instance_files')
        lost = exception.InstanceNotFound(instance_id='a')
        with mock.patch.object(
                objects.Instance, 'get_by_uuid', return_value=self.instance,
                side_effect=lost if gone else None):
            self.assertRaises(
                exception.InstanceNotFound, self.end, side_effect=lost)
        self.assertEqual(ours and gone, delete.called)

    @ddt.data((True, 0), (False, 1))
    @ddt.unpack
    def test_claim_ends_at_the_start_if_the_server_runs(self, exists, count):
        self.instance.task_state = None
        self.add_own_claim()
        self.exists.return_value = exists
        objects.InstanceList.get_by_host.return_value = [self.instance]
        self.driver._look_at_servers('source')
        self.assertEqual(count, len(self.claims()))

    @ddt.data((True, 1), (False, 0))
    @ddt.unpack
    def test_abandoned_copy_is_deleted_unless_the_server_runs(self, exists,
                                                              count):
        """A domain here is the server's, whatever Nova believes."""
        self.flags(host='dest')
        self.instance.task_state = None
        self.add_claim('source')
        self.has_domain.return_value = exists
        self.instance.refresh = mock.Mock()
        self.driver._delete_if_abandoned(self.instance)
        self.assertEqual(count, len(self.claims()))

    @ddt.data('claim', 'task')
    def test_abandoned_copy_stays_if_another_attempt_begins(self, what):
        """It may, while this host's libvirt daemon does not answer."""
        self.flags(host='dest')
        self.instance.task_state = None
        self.add_claim('source')
        volume = self.places.volume_path('disk')

        def begin():
            self._add_disk()
            if what == 'claim':
                local.drop_claims(self.places)
                self.add_claim('source')

        def refresh():
            if what == 'task':
                self.instance.task_state = task_states.MIGRATING

        self.instance.refresh = refresh
        with mock.patch.object(self.driver, '_end_transient_pool',
                               side_effect=lambda places: begin()):
            self.driver._delete_if_abandoned(self.instance)
        self.assertTrue(os.path.exists(volume))
        self.assertEqual(1, len(self.claims()))

    def roll_back(self, **about):
        """The values of destroy_disks that Nova's own code is called with."""
        self._add_disk()
        if about:
            self.notice(**about)
        with self.novas('rollback_live_migration_at_destination') as nova:
            self.driver.rollback_live_migration_at_destination(
                self.context, self.instance, [], {}, True, self.data)
        return [call.args[4] for call in nova.call_args_list]

    def test_rollback_deletes_what_is_under_its_claim(self):
        self.assertEqual([True], self.roll_back(
            sent=[], claim=self.add_claim().name))

    def test_next_attempt_waits_for_the_rollback_of_the_last(self):
        """The deletion of large files takes its time."""
        self.notice(sent=[], claim=self.add_claim().name)
        last = copy.deepcopy(self.data)
        self.notice(sent=[])
        next_one = threading.Thread(
            target=self.driver.pre_live_migration,
            args=(self.context, self.instance, {}, [], '[]', self.data))

        def delete(*_args):
            next_one.start()
            time.sleep(0.2)
            local.delete_all(self.places)

        with (self.novas('pre_live_migration', return_value=self.data),
              self.novas('rollback_live_migration_at_destination',
                         side_effect=delete)):
            self.driver.rollback_live_migration_at_destination(
                self.context, self.instance, [], {}, True, last)
            next_one.join()
        self.assertEqual([self.claim_name()],
                         [claim.name for claim in self.claims()])

    @ddt.data('', 'a', 'other', '../../tmp/a')
    def test_source_that_names_another_claim_is_refused(self, claim):
        self.notice(sent=[], claim={
            '': '', 'other': self.claim_name(source='other')}.get(
                claim, self.claim_name(claim)))
        with self.novas('pre_live_migration') as nova:
            self.assertRaises(
                exception.MigrationPreCheckError,
                self.driver.pre_live_migration, self.context, self.instance,
                {}, [], '[]', self.data)
        nova.assert_not_called()
        self.assertEqual([], self.claims())

    def test_rollback_without_a_notice_keeps_volumes(self):
        self.assertEqual([False], self.roll_back())

    @ddt.data('none', 'another')
    def test_late_rollback_leaves_another_attempt_alone(self, claim):
        """The server may run here by now."""
        gone = layout.Claim(uuids.instance, 'a', 'source').name
        if claim == 'another':
            self.add_claim()
        self.assertEqual([], self.roll_back(sent=[], claim=gone))

    def test_rollback_of_an_attempt_that_was_refused_here(self):
        self.add_claim()
        self.assertEqual([], self.roll_back(sent=['disk.config']))

    def test_rollback_on_shared_storage_is_novas(self):
        self.data.is_shared_block_storage = True
        self.assertEqual([False], self.roll_back(sent=[]))

    @ddt.data((False, 1), (True, 0))
    @ddt.unpack
    def test_clear_text_is_warned_of(self, native_tls, count):
        self.flags(live_migration_with_native_tls=native_tls,
                   group='libvirt')
        with mock.patch.object(storage_migrate.LOG, 'warning') as warning:
            self.driver._warn_of_clear_text()
        self.assertEqual(count, warning.call_count)


@ddt.ddt
class OperationTestCase(LiveTestCase):
    """What the source does when the destination is ready."""

    def setUp(self):
        super().setUp()
        self.data.target_connect_addr = 'dest'
        self.domain = mock.Mock()
        self.domain.XMLDesc.return_value = DOMAIN % {
            'pool': self.pool_path, 'uuid': uuids.instance,
            'directory': self.directory}

    def operate(self, **nova):
        self.operation = storage_migrate._Operation()
        self.driver._operations[uuids.instance] = self.operation
        self.driver._list_disks.return_value = (
            guest.Guest(self.domain).get_all_disks())
        with self.novas('_live_migration_operation', **nova) as self.nova:
            self.driver._live_migration_operation(
                self.context, self.instance, 'other', True, self.data,
                guest.Guest(self.domain), ['vda'])
        return self.nova.call_args and self.nova.call_args.args[5]

    def test_disks_are_in_the_pool_of_the_destination(self):
        self.notice(sent=[])
        xml = etree.fromstring(
            self.operate().get_xml_desc(dump_migratable=True))
        self.assertTrue(self.operation.over.is_set())
        self.assertTrue(self.operation.has_moved)
        self.assertIsNone(xml.find('devices/disk/backingStore'))
        sources = xml.findall('devices/disk/source')
        self.assertEqual(
            [self.there('disk'), os.path.join(self.directory, 'disk.config')],
            [source.get('file') for source in sources[:2]])

    def test_failure_is_left_to_what_nova_asks_next(self):
        """Nova would put the server into ERROR, which is as it was."""
        self.notice(sent=[])
        self.operate(side_effect=test.TestingException)
        self.assertTrue(self.operation.over.is_set())
        self.assertFalse(self.operation.has_moved)
        self.data.bdms = []
        self.assertRaises(test.TestingException, self.operate,
                          side_effect=test.TestingException)

    def test_disks_are_where_the_destination_wants_them(self):
        config = os.path.join(self.directory, 'disk.config')
        self.notice(path='', sent=[], paths={
            f'{uuids.instance}_disk': '/there/disk', 'disk.config': config})
        xml = etree.fromstring(self.operate().get_xml_desc())
        self.assertIsNone(xml.find('devices/disk/backingStore'))
        self.assertEqual(
            ['/there/disk', config, None],
            [source.get('file')
             for source in xml.findall('devices/disk/source')])

    def test_file_goes_into_the_pool_and_a_cinder_volume_nowhere(self):
        self.domain.XMLDesc.return_value = '''<domain><devices>
            <disk><source file='%s/disk'/></disk>
            <disk><source file='/mnt/nfs/disk'/></disk>
            </devices></domain>''' % self.directory
        self.notice(sent=[], paths={'disk': self.there('disk')})
        xml = etree.fromstring(self.operate().get_xml_desc())
        self.assertEqual(
            [self.there('disk'), '/mnt/nfs/disk'],
            [source.get('file') for source in xml.iter('source')])

    def test_server_with_files_is_migrated_as_it_is(self):
        self.assertIs(guest.Guest, type(self.operate()))

    # What it sends.

    def add_destination(self):
        """What the destination has made, and told of it."""
        made = layout.Claim(uuids.instance, 'a', 'source')
        self.domain.XMLDesc.return_value = (
            self.domain.XMLDesc.return_value.replace('</devices>', '''
                <disk type='file'>
                  <driver name='qemu' type='qcow2'/>
                  <source file='%s/%s_disk.eph0'/><target dev='vdc'/>
                </disk></devices>''' % (self.pool_path, uuids.instance)))
        self.dest.add_volume('nova-disks', made.name, b'')
        self.dest.add_file(f'{self.directory}/disk.info', b'{}')
        self._add_file('disk.config', b'config')
        self.volume = f'{uuids.instance}_disk.eph0'
        self.notice(sent=['disk.config', self.volume], claim=made.name,
                    paths={self.volume: f'/srv/disks/{self.volume}'})
        return made.name

    @contextlib.contextmanager
    def images(self):
        def copy(overlay, path, execute):
            self.assertEqual(
                os.path.join(self.pool_path, self.volume), overlay)
            with open(path, 'wb') as file:
                file.write(b'base')
        with mock.patch.object(live, '_copy_base', side_effect=copy):
            yield

    def test_config_drive_and_bases_arrive_before_qemu_begins(self):
        claim = self.add_destination()
        with self.images():
            self.operate()
        self.nova.assert_called_once()
        self.assertCountEqual([claim, self.volume],
                              self.dest.volume_names('nova-disks'))
        sent = self.dest.volume('nova-disks', self.volume)
        self.assertEqual(b'base', sent.content.read(0, 10))
        self.assertEqual(b'config', self.dest.files[
            f'{self.directory}/disk.config'].content.read(0, 10))
        self.assertEqual(['nova-disks'], list(self.dest.pools))
        self.assertEqual(['disk.config'], os.listdir(self.directory))
        self.assertTrue(all(connection.closed
                            for connection in self.dest.connections))

    def test_files_arrive_where_there_is_no_pool(self):
        self.add_destination()
        self.dest.pools.clear()
        made = layout.Claim(uuids.instance, 'a', 'source')
        self.dest.add_file(f'{self.instances}/{made.arrived_name}', b'')
        self.notice(path='', sent=['disk.config', self.volume],
                    claim=made.name, paths={
                        self.volume: f'{self.directory}/disk.eph0'})
        with self.images():
            self.operate()
        self.nova.assert_called_once()
        for name, data in (('disk.eph0', b'base'), ('disk.config', b'config')):
            self.assertEqual(data, self.dest.files[
                f'{self.directory}/{name}'].content.read(0, 10))
        self.assertEqual([], list(self.dest.pools))
        self.assertEqual(['disk.config'], os.listdir(self.directory))

    @ddt.data('claim', 'host', '/srv/other/disk', '../other/disk', 'vdb')
    def test_qemu_does_not_begin_without_them(self, what):
        self.add_destination()
        if what not in ('claim', 'host'):
            # Whatever runs there may ask for anything.
            notice = live.Notice.read(self.data)
            notice.sent.append(what)
            notice.write(self.data)
        elif what == 'claim':
            self.dest.add_volume('nova-disks', layout.Claim(
                uuids.instance, 'b', 'other').name, b'')
        else:
            self.data.target_connect_addr = 'nowhere'
        with self.images():
            self.operate()
        self.nova.assert_not_called()
        self.assertNotIn(self.volume, self.dest.volume_names('nova-disks'))
        self.assertEqual(['nova-disks'], list(self.dest.pools))
        self.assertEqual(['disk.config'], os.listdir(self.directory))

    @ddt.data('live_migration_abort', 'delete_instance_files')
    def test_abort_or_deletion_stops_what_is_sent(self, how):
        self.add_destination()

        def stop(*_args):
            getattr(self.driver, how)(self.instance)

        with self.images(), self.novas('delete_instance_files'):
            self.dest.call('open', stop)
            self.operate()
        self.nova.assert_not_called()

    @ddt.data('_new_transfer', '_copying')
    def test_abort_before_and_after_anything_is_sent_counts(self, when):
        """Nova has been told that the live migration was stopped."""
        self.add_destination()
        real = getattr(self.driver, when)

        @contextlib.contextmanager
        def copying(instance):
            with real(instance) as copy:
                yield copy
            self.driver.live_migration_abort(self.instance)

        def transfer(*args):
            self.driver._operations[uuids.instance].is_stopped = True
            return real(*args)

        with self.images(), mock.patch.object(
                self.driver, when,
                copying if when == '_copying' else transfer):
            self.operate()
        self.nova.assert_not_called()

    def test_nothing_is_sent_if_it_was_stopped_before(self):
        self.add_destination()
        operation = storage_migrate._Operation()
        operation.is_stopped = True
        self.notice(sent=['kernel'], claim=self.claim_name())
        self.assertRaises(
            errors.Cancelled, self.driver._send, self.instance, operation,
            self.places, live.Notice.read(self.data), 'dest')
        self.assertEqual({}, self.driver._copies)
        self.assertRaises(errors.Cancelled, operation.begin)

    def test_first_bytes_of_a_ramdisk_come_when_there_is_no_pool(self):
        """libvirtd would open the file that they name, and wait for it."""
        self.add_destination()
        head = b'QFI\xfb' + bytes(range(256)) * 512
        self._add_file('ramdisk', head)
        notice = live.Notice.read(self.data)
        self.notice(sent=['ramdisk'], claim=notice.claim)
        path = f'{self.directory}/ramdisk'
        seen = []

        def look(*_args):
            if path in self.dest.files:
                seen.append(self.dest.files[path].content.read(0, 4))

        for call in ('pool.refresh', 'pool.destroy'):
            self.dest.call(call, look, times=None)
        self.operate()
        self.nova.assert_called_once()
        self.assertEqual({bytes(4)}, set(seen))
        self.assertEqual(
            head, self.dest.files[path].content.read(0, len(head)))

    def begin(self):
        """Let QEMU copy the disks of a server of ours."""
        operation = storage_migrate._Operation()
        operation.begin()
        self.driver._operations[uuids.instance] = operation

    @ddt.data(True, False)
    def test_abort_of_qemus_part_is_novas(self, ours):
        if ours:
            self.begin()
        with self.novas('live_migration_abort') as nova:
            self.driver.live_migration_abort(self.instance)
        nova.assert_called_once_with(self.instance)

    @ddt.data(True, False)
    def test_abort_of_a_domain_that_has_gone(self, ours):
        """Nova aborts after an error, which must not be lost."""
        if ours:
            self.begin()
        with self.novas('live_migration_abort') as nova:
            nova.side_effect = exception.InstanceNotFound(
                instance_id=uuids.instance)
            if ours:
                self.driver.live_migration_abort(self.instance)
            else:
                self.assertRaises(
                    exception.InstanceNotFound,
                    self.driver.live_migration_abort, self.instance)


@ddt.ddt
class LeaveTestCase(LiveTestCase):
    """Nova sees a domain that is off, and takes it for one that has moved."""

    def setUp(self):
        super().setUp()
        self.data.target_connect_addr = 'dest'
        self.notice(sent=[])
        self.post, self.recover = mock.Mock(), mock.Mock()
        self.event = self.patch('emit_event')
        self.now = self.useFixture(fixtures.MockPatchObject(
            objects.Instance, 'get_by_uuid', return_value=self.instance)).mock

    def migrate(self, has_moved=False):
        def novas(context, instance, dest, post, recover, *others):
            operation = self.driver._operations[uuids.instance]
            operation.has_moved = has_moved
            operation.over.set()
            post(context, instance, dest, *others)

        with self.novas('live_migration', side_effect=novas):
            self.driver.live_migration(
                self.context, self.instance, 'other', self.post, self.recover,
                True, self.data)

    def assert_moved(self):
        self.post.assert_called_once_with(
            self.context, self.instance, 'other', True, self.data)
        self.recover.assert_not_called()

    def test_it_has_moved(self):
        self.migrate(has_moved=True)
        self.assert_moved()
        self.assertEqual({}, self.driver._operations)

    def test_guest_has_powered_off(self):
        self.migrate()
        self.recover.assert_called_once_with(
            self.context, self.instance, 'other', self.data)
        self.post.assert_not_called()
        event = self.event.call_args.args[0]
        self.assertEqual(
            (uuids.instance, virtevent.EVENT_LIFECYCLE_STOPPED),
            (event.get_instance_uuid(), event.get_transition()))

    def test_it_has_moved_though_libvirt_said_it_has_not(self):
        self.dest.add_domain(uuids.instance, active=True)
        self.migrate()
        self.assert_moved()

    @ddt.data('domain', 'connection', 'driver')
    def test_nothing_is_deleted_if_nobody_can_tell(self, what):
        if what == 'domain':
            self.dest.add_domain(uuids.instance)
        elif what == 'connection':
            self.data.target_connect_addr = 'nowhere'
        else:
            self.dest.fail('conn.lookupByUUIDString', error=(
                libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_FROM_REMOTE,
                'this function is not supported by the connection driver'))
        self.assertRaises(errors.HostError, self.migrate)
        self.post.assert_not_called()
        self.recover.assert_not_called()
        self.assertEqual({}, self.driver._operations)

    @ddt.data({'task_state': task_states.DELETING},
              {'task_state': None, 'vm_state': vm_states.DELETED}, {})
    def test_server_that_is_deleted_goes_from_both_hosts(self, state):
        """Nova sets each of these, one after the other."""
        self.instance.update(state)
        if not state:
            self.now.side_effect = exception.InstanceNotFound(instance_id='a')
        self.migrate()
        self.assert_moved()

    @ddt.data((True, 'RUNNING_BOOTED', False),
              (False, 'PAUSED_POSTCOPY', False),
              (False, 'PAUSED_POSTCOPY_FAILED', False),
              (False, 'PAUSED_USER', True), (False, 'RUNNING_BOOTED', True),
              (False, 'PAUSED_MIGRATION', True))
    @ddt.unpack
    def test_destination_is_cleared_only_if_the_guest_is_here(
            self, has_moved, reason, cleared):
        """Nova takes a domain that is paused for one that runs."""
        domain = self.let_fail(has_moved, reason)
        self.assertEqual(cleared, self.recover.called)
        self.assertEqual(
            reason == 'PAUSED_MIGRATION', domain.resume.called)

    @ddt.data(True, False, None)
    def test_domain_that_a_dead_daemon_has_left_paused(self, active):
        """Where libvirt ended in the last moment, only the other knows."""
        if active is None:
            self.data.target_connect_addr = 'nowhere'
        else:
            self.dest.add_domain(uuids.instance, active=active)
        domain = self.let_fail(False, 'PAUSED_MIGRATION')
        self.recover.assert_not_called()
        domain.resume.assert_not_called()

    def test_domain_goes_on_as_libvirt_ends_the_migration(self):
        domain = self.let_fail(False, 'PAUSED_MIGRATION', 'RUNNING_BOOTED')
        self.recover.assert_called_once()
        domain.resume.assert_not_called()

    def let_fail(self, has_moved, *reasons):
        """Let a live migration fail, and the domain have states."""
        states = [[getattr(libvirt, f'VIR_DOMAIN_{reason.partition("_")[0]}'),
                   getattr(libvirt, f'VIR_DOMAIN_{reason}')]
                  for reason in reasons]
        domain = mock.Mock()
        # The first of two states is asked for twice.
        domain.state.side_effect = [states[0]] * 2 + [states[-1]] * 2

        def novas(context, instance, dest, post, recover, *others):
            operation = self.driver._operations[uuids.instance]
            operation.has_moved = has_moved
            operation.over.set()
            recover(context, instance, dest, self.data,
                    migration_status='failed')

        with (self.novas('live_migration', side_effect=novas),
              mock.patch.object(self.driver._host, 'get_guest',
                                return_value=guest.Guest(domain))):
            try:
                self.driver.live_migration(
                    self.context, self.instance, 'other', self.post,
                    self.recover, True, self.data)
            except (exception.MigrationError, errors.HostError):
                self.recover.assert_not_called()
        return domain

    def lose_sight(self, has_moved=False, begun=True, over=True, active=True,
                   post=False):
        """Nova's monitor fails, as where libvirt does not answer in time."""
        def novas(*args):
            operation = self.driver._operations[uuids.instance]
            operation.has_begun = begun
            operation.has_moved = has_moved
            if over:
                operation.over.set()
            if post:
                args[3](*args[:3])
            raise test.TestingException

        self.useFixture(fixtures.MockPatchObject(
            storage_migrate, 'LIVE_END_SECONDS', 0.01))
        self.patch('_is_active', return_value=active)
        domain = mock.Mock()
        domain.state.return_value = [libvirt.VIR_DOMAIN_RUNNING, 0]
        with (self.novas('live_migration', side_effect=novas),
              mock.patch.object(self.driver._host, 'get_guest',
                                return_value=guest.Guest(domain))):
            self.driver.live_migration(
                self.context, self.instance, 'other', self.post, self.recover,
                True, self.data)

    def test_server_of_which_nova_lost_sight_is_as_before(self):
        self.lose_sight()
        self.recover.assert_called_once_with(
            self.context, self.instance, 'other', self.data)
        self.assertEqual({}, self.driver._operations)

    def test_server_of_which_nova_lost_sight_has_moved(self):
        self.lose_sight(has_moved=True)
        self.assert_moved()

    def test_live_migration_that_has_not_begun_does_not_begin(self):
        self.lose_sight(begun=False, over=False)
        self.recover.assert_called_once()
        with self.novas('_live_migration_operation') as nova:
            self.driver._live_migration_operation(
                self.context, self.instance, 'other', True, self.data,
                mock.Mock(), [])
        nova.assert_not_called()

    @ddt.data({'over': False}, {'active': False},
              {'active': False, 'begun': False, 'over': False},
              {'has_moved': True, 'post': True})
    def test_server_that_may_be_elsewhere_is_novas(self, how):
        self.assertRaises(test.TestingException, self.lose_sight, **how)
        self.recover.assert_not_called()

    def test_what_is_sent_is_stopped_first(self):
        operation = storage_migrate._Operation()
        copy = storage_migrate._Copy(self.instance)
        self.driver._copies[uuids.instance] = copy

        def wait(_seconds):
            self.assertTrue(copy.cancel.is_set())
            return True

        with mock.patch.object(operation.over, 'wait', side_effect=wait):
            self.assertFalse(self.driver._has_left(
                self.instance, operation, 'dest'))

    @ddt.data(True, False)
    def test_qemu_that_does_not_end(self, deleted):
        """It may wait for ever for an answer that the link has lost."""
        self.useFixture(fixtures.MockPatchObject(
            storage_migrate, 'LIVE_END_SECONDS', 0.01))
        if deleted:
            self.now.side_effect = exception.InstanceNotFound(instance_id='a')
            self.assertTrue(self.driver._has_left(
                self.instance, storage_migrate._Operation(), 'dest'))
        else:
            self.assertRaises(
                exception.MigrationError, self.driver._has_left,
                self.instance, storage_migrate._Operation(), 'dest')

    def test_server_without_a_notice_is_novas(self):
        self.data.bdms = []
        with self.novas('live_migration') as nova:
            self.driver.live_migration(
                self.context, self.instance, 'other', self.post, self.recover,
                True, self.data)
        nova.assert_called_once_with(
            self.context, self.instance, 'other', self.post, self.recover,
            True, self.data)


class FilesToSendTestCase(LiveTestCase):

    def execute(self, *argv):
        return subprocess.run(
            argv, check=True, stdout=subprocess.PIPE, text=True).stdout, ''

    def test_overlay_is_sent_as_an_image_with_the_content_of_its_base(self):
        base = os.path.join(self.instances, 'ephemeral_1_a')
        with open(base, 'wb') as file:
            file.write(b'base' * 256 * 1024)
        overlay = self.places.volume_path('disk.eph0')
        self.execute('qemu-img', 'create', '-f', 'qcow2', '-b', base, '-F',
                     'raw', overlay, '2M')
        self.execute('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 64k',
                     overlay)
        name = os.path.basename(overlay)
        notice = live.Notice(
            '/srv/disks', sent=[name], paths={name: self.there('disk.eph0')})
        os.mkdir(os.path.join(self.directory, 'to-send-dead'))
        with live.files_to_send(
                self.places, notice, self.execute) as files:
            file, = files
            self.assertEqual(
                (layout.POOL, os.path.basename(overlay), 'qcow2'),
                (file.place, file.name, file.format))
            self.assertIsNone(layout.backing_file(file.path))
            self.execute('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw',
                         file.path, base)
            info = jsonutils.loads(subprocess.check_output(
                ['qemu-img', 'info', '--output=json', file.path]))
            self.assertEqual(2 * units.Mi, info['virtual-size'])
        self.assertEqual([], os.listdir(self.directory))

    def test_refusal_fits_into_what_nova_shows(self):
        error = self.assertRaises(
            errors.Refused, live.find_notice, self.data)
        self.assertLessEqual(len(str(error)), errors.MESSAGE_LENGTH)
        self.assertTrue(str(error).endswith(error.remedy))
