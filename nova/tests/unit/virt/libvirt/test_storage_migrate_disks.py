#!/usr/bin/python3
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

"""No disk of a server is forgotten, or deleted by mistake."""

import os
import pathlib
import shutil
import threading
import time
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage import test_vtpm
from nova.tests.unit.virt.libvirt import test_storage_migrate as base
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import hooks
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import turns
from nova.virt.libvirt import utils as libvirt_utils

BOOTS_FROM_VOLUME = {
    'root_device_name': '/dev/vda', 'ephemerals': [],
    'block_device_mapping': [{'mount_device': '/dev/vda', 'boot_index': 0,
                              'connection_info': {}}]}


@ddt.ddt
class PlanTestCase(base.DriverTestCase):
    """Every disk of the domain goes along, or the migration is refused."""

    @ddt.data(power_state.RUNNING, power_state.SHUTDOWN)
    def test_overlay_of_an_external_snapshot(self, state):
        self.info.return_value.state = state
        self._add_disk()
        overlay = self.places.volume_path('disk') + '.snap'
        self.disk_info.return_value = [{'path': overlay, 'type': 'qcow2'}]
        self._assert_refused(overlay, 'virsh blockcommit --shallow')

    def test_overlay_that_nova_compute_cannot_read(self):
        self._add_disk()
        overlay = self.places.volume_path('disk') + '.snap'
        self.disk_info.side_effect = exception.InvalidDiskInfo(
            reason=f'qemu-img failed to execute on {overlay} : Unexpected '
                   f'error while running command.\nCommand: {"a" * 300}')
        self._assert_refused('.snap', 'virsh blockcommit --shallow')

    def test_overlay_that_has_the_name_of_the_disk(self):
        self._add_disk(disk_format='qcow2')
        path = self.places.volume_path('disk')
        os.unlink(path)
        below = os.path.join(self.pool_path, 'below')
        for arguments in ([below], ['-F', 'qcow2', '-b', below, path]):
            processutils.execute(
                'qemu-img', 'create', '-f', 'qcow2', *arguments[:-1],
                arguments[-1], *(['1M'] if arguments == [below] else []))
        self.disk_info.return_value[0]['backing_file'] = 'below'
        self._assert_refused(below, 'virsh blockcommit --shallow')

    def test_disk_in_the_directory_of_a_server_with_a_swap_disk_in_the_pool(
            self):
        # It boots from a volume, and has got its swap disk after pools were
        # switched on.
        self._add_disk('disk.swap')
        path = self._add_file('disk.eph0', b'precious')
        self._add_record({path: 'qcow2'})
        self.disk_info.return_value.append({'path': path, 'type': 'qcow2'})
        result = jsonutils.loads(self._migrate(
            block_device_info=BOOTS_FROM_VOLUME))
        self.assertEqual([path], [info['path'] for info in result])
        self.assertEqual(
            b'precious', self.dest.files[path].content.read(0, units.Ki))

    def test_new_disk_goes_where_the_others_are(self):
        open(os.path.join(self.directory, 'disk.eph0'), 'w').close()
        disk = self.driver.image_backend.by_name(self.instance, 'disk.swap')
        self.assertEqual(self.directory, os.path.dirname(disk.path))

    def test_pool_by_another_name(self):
        volume = self._add_disk()
        link = os.path.join(self.instances, 'link')
        os.symlink(self.pool_path, link)
        self.disk_info.return_value[0]['path'] = os.path.join(link, volume)
        result = jsonutils.loads(self._migrate())
        self.assertEqual(['/srv/disks/' + volume],
                         [info['path'] for info in result])
        self.assertIn(volume, self.dest.volume_names('nova-disks'))

    def test_pool_that_was_elsewhere_when_the_server_started(self):
        volume = self._add_disk()
        path = os.path.join('/srv/before', volume)
        self.disk_info.return_value[0]['path'] = path
        self._assert_refused(path, 'hard reboot')

    def test_disk_without_a_record(self):
        self._add_disk()
        os.unlink(self.places.record_path)
        self._assert_refused(self.places.volume_path('disk'),
                             self.places.record_path)

    def test_record_that_differs_from_the_domain(self):
        self._add_disk()
        self._add_record({self.places.volume_path('disk'): 'raw'})
        self._assert_refused('the domain says qcow2 and disk.info raw')

    @ddt.data('', '{', '[]')
    def test_record_that_is_broken(self, content):
        self._add_disk()
        with open(self.places.record_path, 'w') as record:
            record.write(content)
        self._assert_refused('empty or broken', self.places.record_path)

    def test_raw_disk_in_the_pool(self):
        self._add_disk(disk_format='raw')
        self._assert_refused(
            'is a raw disk in a pool', 'Cold migrate the server to')

    def test_instances_of_the_destination_are_elsewhere(self):
        self._add_disk()
        del self.dest.directories[self.instances]
        self._assert_refused(self.instances, 'instances_path')


class FinishTestCase(base.FinishMixin, base.DriverTestCase):
    """The destination takes over what is there, or nothing."""

    def _assert_fails(self, path, *texts, disk_format='qcow2'):
        error = self.assertRaises(
            exception.MigrationError, self._finish,
            [{'path': path, 'type': disk_format}])
        for text in texts:
            self.assertIn(text, str(error))

    def test_pool_was_elsewhere_when_the_disk_came(self):
        self.flags(use_storage_pools=False, group='libvirt')
        path = f'/srv/disks/{uuids.instance}_disk'
        self._assert_fails(path, path, 'disks_pool_path')

    def test_file_that_did_not_come(self):
        self._claim(directory=self.directory)
        path = os.path.join(self.directory, 'disk')
        self._assert_fails(path, path)

    def test_format_is_not_that_of_the_source(self):
        volume = self._add_disk(disk_format='raw')
        path = self.places.volume_path('disk')
        self._assert_fails(path, volume, 'was qcow2 on its source and is raw')

    def test_format_did_not_come(self):
        self._add_disk()
        os.unlink(self.places.record_path)
        self._assert_fails(
            self.places.volume_path('disk'), 'not recorded',
            disk_format='raw')

    def test_raw_disk_without_a_record_is_never_taken_for_an_image(self):
        self._add_disk()
        path = self.places.volume_path('disk')
        with open(path, 'wb') as disk:
            disk.write(libvirt_storage.qcow2_header(1 << 20, '/etc/shadow'))
        os.unlink(self.places.record_path)
        self.assertRaises(
            exception.InvalidDiskInfo, self.driver.image_backend.by_name,
            self.instance, 'disk')
        self.assertFalse(os.path.exists(self.places.record_path))

    def test_guest_does_not_decide_whether_its_raw_disk_grows(self):
        self._add_disk(disk_format='raw')
        path = self.places.volume_path('disk')
        os.unlink(path)
        processutils.execute('qemu-img', 'create', '-f', 'qcow2', path, '1T')
        disk = self.driver.image_backend.by_name(self.instance, 'disk')
        disk.resize_image(units.Gi)
        self.assertEqual(units.Gi, os.path.getsize(path))


@ddt.ddt
class LeftoverTestCase(base.FinishMixin, base.DriverTestCase):
    """What an unfinished migration left never becomes a server's disk."""

    def setUp(self):
        super().setUp()
        self.spawned = self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, 'spawn')).mock

    def _leave(self, source='gone'):
        self._add_disk()
        self._add_file('disk.config', b'stale')
        self._claim(source)

    def _spawn(self, host='source', vm_state=vm_states.BUILDING,
               task_state=task_states.SPAWNING):
        self.instance.update({'host': host, 'vm_state': vm_state,
                              'task_state': task_state})
        self.driver.spawn(self.context, self.instance, 'image', [], None, {})
        self.spawned.assert_called_once_with(
            self.context, self.instance, 'image', [], None, {})

    def test_unshelved_onto_an_unfinished_copy(self):
        self._leave()
        self._spawn(vm_state=vm_states.SHELVED_OFFLOADED)
        self.assertEqual([], self._volumes())
        self.assertFalse(os.path.exists(self.directory))

    def test_unshelved_onto_disks_that_a_failed_confirm_left(self):
        self._add_disk()
        self._spawn(vm_state=vm_states.SHELVED_OFFLOADED)
        self.assertEqual([], self._volumes())

    def test_resized_between_cells_onto_an_unfinished_copy(self):
        self._leave()
        self._spawn(task_state=task_states.RESIZE_FINISH)
        self.assertEqual([], self._volumes())

    def test_resized_between_cells_that_share_storage(self):
        # These are the disks of the source, kept for a revert. Nova would
        # delete them as the resize is confirmed.
        volume = self._add_disk()
        error = self.assertRaises(
            exception.MigrationError, self._spawn, 'elsewhere',
            vm_states.ACTIVE, task_states.RESIZE_FINISH)
        self.assertIn(volume, str(error))
        self.assertLessEqual(len(str(error)), 255)
        self.spawned.assert_not_called()
        self.assertEqual([volume], self._volumes())

    def test_evacuated_onto_a_copy_that_its_host_did_not_finish(self):
        self._leave(source='gone')
        self.instance.host = 'gone'
        self.assertFalse(self.driver.instance_on_disk(self.instance))
        self._spawn('gone', vm_states.ACTIVE,
                    task_states.REBUILD_SPAWNING)
        self.assertEqual([], self._volumes())
        self.assertFalse(os.path.exists(self.directory))

    @ddt.data(True, False)
    def test_evacuated_with_the_claim_of_a_third_host(self, has_files):
        # It may have been migrated from 'older' to 'gone', which shares its
        # storage with this host, and died. Or 'older' died while it copied to
        # here, and 'gone' had the server from it later.
        if has_files:
            self._add_file('disk', b'half')
            self._claim('older', self.instances)
        else:
            self._leave(source='older')
        self.instance.host = 'gone'
        before = self._volumes()
        error = self.assertRaises(
            exception.InvalidSharedStorage, self.driver.instance_on_disk,
            self.instance)
        self.assertIn('unfinished copy from older', str(error))
        self.assertRaises(
            exception.MigrationError, self._spawn, 'gone', vm_states.ACTIVE,
            task_states.REBUILD_SPAWNING)
        self.spawned.assert_not_called()
        self.assertEqual(before, self._volumes())
        self.assertTrue(os.path.exists(self.directory))

    def test_evacuated_onto_a_pool_that_has_another_path(self):
        volume = self._add_disk()
        other = os.path.join('/mnt/other', volume)
        layout.write_record(self.places.record_path, {other: 'qcow2'})
        self.instance.host = 'gone'
        self.assertTrue(self.driver.instance_on_disk(self.instance))
        self._spawn('gone', vm_states.ACTIVE, task_states.REBUILD_SPAWNING)
        self.assertEqual(
            'qcow2', self.places.format(self.places.volume_path('disk')))

    def test_evacuated_to_where_an_unconfirmed_migration_began(self):
        self._add_disk()
        os.rename(self.directory, self.places.kept_directory)
        self._assert_evacuation_leads_back()

    def _assert_evacuation_leads_back(self):
        self.instance.host = 'gone'
        error = self.assertRaises(
            exception.InvalidSharedStorage, self.driver.instance_on_disk,
            self.instance)
        self.assertIn(f'rename {self.places.kept_directory} to '
                      f'{self.directory}', str(error))
        self.assertNotIn('delete', str(error))

    def test_evacuated_to_where_files_are_kept(self):
        """The next migration of the server would delete them."""
        self._add_file('disk', b'its disk')
        self._add_file('disk.config', b'drive')
        os.rename(self.directory, self.places.kept_directory)
        self._assert_evacuation_leads_back()
        # Without disks of its own it has lost nothing here.
        os.rename(os.path.join(self.places.kept_directory, 'disk'),
                  os.path.join(self.places.kept_directory, 'disk.swap'))
        self.assertFalse(self.driver.instance_on_disk(self.instance))

    def _has_domain(self, **formats):
        """Have a domain with these files of the instance directory."""
        self.disks.return_value = [
            mock.Mock(source_type='file', driver_format=disk_format,
                      source_path=os.path.join(self.directory, name))
            for name, disk_format in formats.items()]

    def _start(self):
        self.servers.return_value = [self.instance]
        self.driver._look_at_servers('source')

    def _reboot(self):
        with mock.patch.object(driver.LibvirtDriver, '_hard_reboot'):
            self.driver._hard_reboot(self.context, self.instance, [], None)

    @ddt.data('_start', '_reboot')
    def test_raw_disk_that_nova_converted_is_recorded(self, function):
        """Nova's own driver leaves the record as it was."""
        disk = self._add_file('disk', b'QFI\xfb')
        others = [self._add_file('disk.local', b'QFI\xfb by its guest'),
                  self._add_file('disk.eph0', b'raw, and the domain wrong')]
        raw = dict.fromkeys(others, 'raw')
        self._add_record({disk: 'raw'} | raw)
        self._has_domain(disk='qcow2', **{'disk.local': 'raw',
                                          'disk.eph0': 'qcow2'})
        getattr(self, function)()
        self.assertEqual({disk: 'qcow2'} | raw, self.places.formats())

    def test_converted_disk_that_is_kept_for_a_revert_is_recorded(self):
        disk = self._add_file('disk', b'QFI\xfb')
        self._add_record({disk: 'raw'})
        self._has_domain(disk='qcow2')
        os.rename(self.directory, self.places.kept_directory)
        self._start()
        self.assertEqual({disk: 'qcow2'}, layout.read_record(
            self.places.kept_path(self.places.record_path)))

    def test_domain_that_cannot_be_asked_does_not_stop_nova_compute(self):
        self._add_file('disk', b'')
        self.disks.side_effect = exception.InternalError('libvirtd is down')
        self._start()
        self.assertIn('libvirtd is down', self.stdlog.logger.output)
        self.disks.side_effect = exception.InstanceNotFound(instance_id='a')
        self._reboot()

    def test_evacuated_disk_that_is_an_image_and_recorded_as_raw(self):
        disk = self._add_file('disk', b'QFI\xfb')
        self._add_record({disk: 'raw'})
        self.instance.host = 'gone'
        error = self.assertRaises(
            exception.InvalidSharedStorage, self.driver.instance_on_disk,
            self.instance)
        self.assertIn('is recorded as raw', str(error))
        self._add_record({disk: 'qcow2'})
        self.assertTrue(self.driver.instance_on_disk(self.instance))

    def test_hard_reboot_deletes_nothing(self):
        """Nova would, with a workaround of its own and disks in Ceph."""
        variables = self._add_file('nvram', b'variables')

        def reboot(*_args):
            self.assertTrue(self.driver.delete_instance_files(self.instance))
            nova.assert_not_called()
            # The deletion of the server comes at the same time.
            deletion = threading.Thread(
                target=self.driver.delete_instance_files,
                args=(self.instance,))
            deletion.start()
            deletion.join()

        with (mock.patch.object(driver.LibvirtDriver,
                                'delete_instance_files') as nova,
              mock.patch.object(driver.LibvirtDriver, '_hard_reboot',
                                side_effect=reboot)):
            self.driver._hard_reboot(self.context, self.instance, [], None)
            nova.assert_called_once()
            self.driver.delete_instance_files(self.instance)
        self.assertEqual(2, nova.call_count)
        self.assertTrue(os.path.exists(variables))

    def _reboot_with_swap(self, swap=1, host='source',
                          mapping=('disk', 'disk.swap')):
        """Whether a hard reboot made a swap disk."""
        self.instance.flavor.swap = swap
        self.instance.host = host

        def create(target, swap_mb):
            with open(target, 'wb') as file:
                file.truncate(swap_mb * units.Mi)

        def reboot(*_args):
            self.driver._get_guest_config(
                self.instance, [], None, {'mapping': dict.fromkeys(mapping)})

        with (mock.patch.object(driver.LibvirtDriver, '_hard_reboot',
                                side_effect=reboot),
              mock.patch.object(driver.LibvirtDriver, '_get_guest_config'),
              mock.patch('nova.privsep.path.utime'),
              mock.patch.object(self.driver, '_create_swap',
                                side_effect=create) as made):
            # Outside a hard reboot none is made.
            reboot()
            made.assert_not_called()
            self.driver._hard_reboot(self.context, self.instance, [], None)
        return made.called

    @ddt.data(True, False)
    def test_hard_reboot_makes_the_swap_disk_that_nobody_made(self, in_pool):
        os.mkdir(layout.cache_dir())
        self._add_disk() if in_pool else self._add_file('disk', b'')
        self.assertFalse(self._reboot_with_swap(swap=0))
        self.assertFalse(self._reboot_with_swap(host='other'))
        # A volume has its place, or it is a container.
        self.assertFalse(self._reboot_with_swap(mapping=('disk', '/dev/vdb')))
        self.assertTrue(self._reboot_with_swap())
        path = (self.places.volume_path('disk.swap') if in_pool else
                os.path.join(self.directory, 'disk.swap'))
        self.assertTrue(os.path.exists(path))
        self.assertEqual('qcow2', self.places.format(path))
        self.assertFalse(self._reboot_with_swap())

    @ddt.data((True, b'half'), (True, None), (False, None))
    @ddt.unpack
    def test_hard_reboot_after_half_a_resize_on_this_host(self, kept, half):
        """nova-compute ended, and Nova did not get to put it right."""
        disk = self.places.volume_path('disk')
        self._add_disk()
        local.keep(self.places)
        with open(self.places.kept_path(disk), 'wb') as file:
            file.write(b'original')
        if half:
            with open(disk, 'wb') as file:
                file.write(half)
        if not kept:
            # The last step of keep().
            os.rmdir(self.directory)
            os.rename(self.places.kept_directory, self.directory)
        with mock.patch.object(driver.LibvirtDriver, '_hard_reboot'):
            self.driver._hard_reboot(self.context, self.instance, [], None)
        with open(disk, 'rb') as file:
            self.assertEqual(b'original', file.read())
        self.assertEqual([], self.places.kept())
        self.assertEqual('qcow2', self.places.format(disk))

    def test_hard_reboot_after_a_resize_on_this_host(self):
        """The server keeps what it has written since the resize."""
        disk = self.places.volume_path('disk')
        self._add_disk()
        local.keep(self.places)
        with open(disk, 'wb') as file:
            file.write(b'later')
        layout.write_record(self.places.record_path, {disk: 'qcow2'})
        with mock.patch.object(driver.LibvirtDriver, '_hard_reboot'):
            self.driver._hard_reboot(self.context, self.instance, [], None)
        with open(disk, 'rb') as file:
            self.assertEqual(b'later', file.read())

    def test_copy_from_a_third_host_goes_when_the_server_was_deleted(self):
        self._leave(source='older')
        self.instance.update({'host': 'gone', 'task_state': None,
                              'vm_state': vm_states.DELETED})
        self.instance.refresh = mock.Mock()
        with mock.patch.object(self.driver, '_has_domain',
                               return_value=False):
            self.driver._delete_if_abandoned(self.instance)
            self.assertNotEqual([], self._volumes())
            self.instance.deleted = True
            self.driver._delete_if_abandoned(self.instance)
        self.assertEqual([], self._volumes())
        self.assertFalse(os.path.exists(self.directory))

    def test_hard_reboot_makes_the_files_the_servers_own(self):
        self._leave()
        os.rename(self.directory, self.places.kept_directory)
        with (mock.patch.object(driver.LibvirtDriver, '_hard_reboot') as nova,
              mock.patch.object(local, 'take_bases') as take_bases):
            self.driver._hard_reboot(self.context, self.instance, [], None)
        take_bases.assert_called_once_with(self.places)
        nova.assert_called_once_with(self.context, self.instance, [], None)
        self.assertEqual([self.places.volume_name('disk')], self._volumes())
        self.assertTrue(os.path.exists(self.places.record_path))

    def test_hard_reboot_waits_for_stable_storage(self):
        """The server starts from what finish_migration() did not flush."""
        self._leave()
        before = self._volumes()
        with (mock.patch('os.fsync', side_effect=OSError('disk is broken')),
              mock.patch.object(driver.LibvirtDriver, '_hard_reboot') as nova):
            self.assertRaises(OSError, self.driver._hard_reboot, self.context,
                              self.instance, [], None)
        nova.assert_not_called()
        self.assertEqual(before, self._volumes())

    def test_cleaning_leaves_a_server_that_runs_there_alone(self):
        volume = self._add_disk()
        self.dest.fail('stream.send')
        self.dest.fail('vol.delete')
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.assertTrue(self.driver._leftovers)
        # It is shelved, and unshelved there beside the claim.
        live = libvirt_storage.Content.draw('LIVE')
        self.dest.volume('nova-disks', volume).content = live
        self.dest.add_domain(uuids.instance)

        self.driver._leftovers.retry()

        self.assertEqual(
            live, self.dest.volume('nova-disks', volume).content)
        self.assertFalse(self.driver._leftovers)

    def test_cleaning_leaves_a_server_that_was_unshelved_there_alone(self):
        volume = self._add_disk()
        self.dest.fail('stream.send')
        self.dest.fail('vol.delete')
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        # That host's spawn() cleared the copy and made a new disk.
        for name in self.dest.volume_names('nova-disks'):
            self.dest.remove_file(f'/srv/disks/{name}')
        live = libvirt_storage.Content.draw('LIVE')
        self.dest.add_volume('nova-disks', volume, live)

        self.driver._leftovers.retry()

        self.assertEqual(
            live, self.dest.volume('nova-disks', volume).content)
        self.assertFalse(self.driver._leftovers)


@ddt.ddt
class SharedRevertTestCase(base.FinishMixin, base.DriverTestCase):
    """A resize on storage that hosts share makes disks of the new flavor."""

    def setUp(self):
        super().setUp()
        self.disks = ['disk', 'disk.local', 'disk.eph0', 'disk.swap']
        for name in self.disks:
            self._add_disk(name)
        self.instance.old_flavor = self._flavor()
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.other = f'{uuids.other}_disk.local'
        with open(os.path.join(self.pool_path, self.other), 'w'):
            pass

    def _assert_left(self, *disks):
        self.assertEqual(
            sorted([self.other, *map(self.places.volume_name, disks)]),
            self._volumes())

    @mock.patch.object(driver.LibvirtDriver, 'cleanup')
    def _leave(self, nova, **kwargs):
        nova.side_effect = lambda *args: self._assert_left(*self.disks)
        self.driver.cleanup(
            self.context, self.instance, mock.sentinel.network_info, None,
            **{'destroy_disks': False, **kwargs})
        nova.assert_called_once()

    @ddt.data((0, 0, ['disk', 'disk.eph0']),
              (0, 64, ['disk', 'disk.eph0', 'disk.swap']),
              (1, 0, ['disk', 'disk.local', 'disk.eph0']),
              (1, 64, ['disk', 'disk.local', 'disk.eph0', 'disk.swap']))
    @ddt.unpack
    def test_revert_deletes_what_the_old_flavor_has_no_place_for(
            self, ephemeral_gb, swap, left):
        self.instance.old_flavor.ephemeral_gb = ephemeral_gb
        self.instance.old_flavor.swap = swap
        self._leave()
        self._assert_left(*left)

    @ddt.data({'task_state': None}, {'old_flavor': None},
              {'task_state': task_states.RESIZE_MIGRATING})
    def test_anything_else_deletes_nothing(self, attributes):
        for name, value in attributes.items():
            setattr(self.instance, name, value)
        self._leave()
        self._assert_left(*self.disks)

    def test_new_disk_never_has_the_content_of_an_old_one(self):
        # A revert of an earlier release left disk.local.
        disks = [{'path': f'/elsewhere/{self.places.volume_name(name)}',
                  'type': 'qcow2'} for name in ('disk', 'disk.eph0')]
        self._finish(disks)
        self._assert_left('disk', 'disk.eph0', 'disk.swap')

    def test_disks_that_the_server_had_stay(self):
        self._finish([{'path': self.places.volume_path(name), 'type': 'qcow2'}
                      for name in self.disks])
        self._assert_left(*self.disks)


class SharedConfirmTestCase(base.SameHostMixin, base.DriverTestCase):
    """A kept directory that an earlier failure left behind."""

    def test_confirm_on_shared_storage_deletes_nothing(self):
        self.flags(vol_upload_migration=True, group='libvirt')
        # Resized on its own host; that failed later, and the server was hard
        # rebooted. The operator deleted the kept disks, as the message says.
        self._resize()
        for kept in self.places.kept():
            os.unlink(kept)
        self.assertTrue(os.path.isdir(self.places.kept_directory))
        with open(self.places.volume_path('disk.swap'), 'w'):
            pass
        before = self._volumes()
        path = self.places.volume_path('disk')
        self._add_record({path: 'qcow2'})
        self.disk_info.return_value = [{'path': path, 'type': 'qcow2'}]

        with mock.patch.object(site.Site, '_find_shared', return_value=True):
            self._migrate(dest='dest')
        self.instance.host = 'dest'
        with mock.patch.object(driver.LibvirtDriver, 'confirm_migration'):
            self.driver.confirm_migration(
                self.context, mock.sentinel.migration, self.instance, [])

        self.assertEqual(before, self._volumes())
        self.assertTrue(os.path.isdir(self.directory))

    def test_revert_between_cells_restores_nothing_kept_here(self):
        self._resize()
        path = self.places.volume_path('disk')
        self._write(path, 'live data')
        self.migration.configure_mock(dest_compute='another')
        self._revert()
        with open(path) as disk:
            self.assertEqual('live data', disk.read())


class RetryTestCase(base.DriverTestCase):

    def test_second_attempt_after_nova_failed_behind_the_driver(self):
        volume = self._add_disk()
        self._add_file('kernel', b'the kernel that Glance has lost')
        self._migrate()
        # Cinder, Neutron or the database fail after that: the server is in
        # status ERROR on this host, and its state is reset.
        self.assertFalse(os.path.exists(self.directory))
        self.info.return_value.state = power_state.SHUTDOWN

        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate)

        self.assertIn('is there already', str(error.inner_exception))
        names = {'kernel', 'disk.info'}
        self.assertEqual(names, set(os.listdir(self.directory)))
        # The nova-compute of that host clears what nobody took over.
        for files in self.dest.files, self.dest.directories:
            for path in [path for path in files if uuids.instance in path]:
                del files[path]
        self._migrate()
        self.assertIn(volume, self.dest.volume_names('nova-disks'))
        self.assertEqual(names, set(os.listdir(self.places.kept_directory)))

    def test_second_attempt_while_the_first_checks(self):
        self._add_disk()
        blocked = self.dest.block('conn.getLibVersion')
        first = threading.Thread(target=self._migrate)
        first.start()
        self.assertTrue(blocked.wait_reached())
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate)
        self.assertIn('being copied already', str(error.inner_exception))
        blocked.release()
        first.join(20)
        self.assertFalse(os.path.exists(self.directory))

    def test_server_that_is_deleted_while_the_destination_is_checked(self):
        self._add_disk()
        self.dest.call('conn.lookupByName', lambda: (
            self.driver.delete_instance_files(self.instance)))
        self.assertRaises(exception.MigrationError, self._migrate)
        self.calls.power_off.assert_not_called()
        self.calls.power_on.assert_not_called()
        self._assert_nothing_on_destination()


@ddt.ddt
class StaleTestCase(test_vtpm.PrivilegedMixin, test_vtpm.VtpmMixin,
                    base.FinishMixin, base.DriverTestCase):
    """Earlier migrations left files beside those of the server.

    nova-compute may end at any time during the next one. Nova then puts back
    the directory that it takes for the one that this migration kept.
    """

    def setUp(self):
        super().setUp()
        self._add_disk()
        self.disk_info.return_value[0]['disk_size'] = 0
        # A mock already.
        libvirt_utils.get_fs_info.return_value = {'free': 1}
        self._claim()
        os.mkdir(self.places.kept_directory)
        stale = os.path.join(self.places.kept_directory, 'disk')
        open(stale, 'w').close()
        self._write_state('new')
        self._write_state('stale', self.saved)

    def _state(self):
        return {path for root in (self.instances, self.pool_path)
                for path in pathlib.Path(root).rglob('*')}

    def _is_stale(self):
        return [os.path.exists(self.places.kept_directory),
                bool(self.places.claims()),
                os.path.exists(self.places.saved_vtpm_path)]

    @ddt.data('dest', 'source')
    def test_refusal_changes_nothing(self, dest):
        before = self._state()
        self.assertRaises(
            exception.InstanceFaultRollback, self._migrate, dest=dest,
            flavor=self._flavor(root_gb=0))
        self.assertEqual(before, self._state())

    def test_refusal_by_the_destination_changes_nothing(self):
        before = self._state()
        self.dest.pools['nova-disks'].active = False
        self._assert_refused('not active')
        self.assertEqual(before, self._state())
        self.assertEqual([True] * 3, self._is_stale())

    @ddt.data('dest', 'source')
    def test_nothing_is_left_when_the_server_goes_off(self, dest):
        self.calls.power_off.side_effect = lambda *args: self.assertEqual(
            [False] * 3, self._is_stale())
        with mock.patch.object(self.driver, '_copy_here'):
            self._migrate(dest=dest)
        self.calls.power_off.assert_called_once()

    @ddt.data('dest', 'source')
    def test_nothing_is_left_while_the_server_waits_for_its_turn(self, dest):
        self.useFixture(fixtures.MockPatchObject(
            turns.Turn, 'ahead', 1))
        self.useFixture(fixtures.MockPatchObject(
            self.driver, '_wait_for_turn', side_effect=lambda *args: (
                self.assertEqual([False] * 3, self._is_stale()))))
        with mock.patch.object(self.driver, '_copy_here'):
            self._migrate(dest=dest)
        self.driver._wait_for_turn.assert_called_once()

    def test_nothing_is_left_on_shared_storage(self):
        self.calls.power_off.side_effect = lambda *args: self.assertEqual(
            [False] * 3, self._is_stale())
        with mock.patch.object(site.Site, '_find_shared', return_value=True):
            self._migrate()
        self.calls.power_off.assert_called_once()

    def test_unshelved_server_has_no_kept_directory(self):
        self.instance.update({'vm_state': vm_states.SHELVED_OFFLOADED,
                              'task_state': task_states.SPAWNING})
        with mock.patch.object(driver.LibvirtDriver, 'spawn'):
            self.driver.spawn(
                self.context, self.instance, 'image', [], None, {})
        self.assertFalse(os.path.exists(self.places.kept_directory))


@ddt.ddt
class OffHubTestCase(base.FinishMixin, base.DriverTestCase):
    """Calls that wait for a disk do not block nova-compute."""

    def setUp(self):
        super().setUp()
        self._add_disk()
        self.called = {}
        self.off_hub = threading.local()
        for name in 'storage_migrate._native', 'storage.threads.off_hub':
            self.useFixture(fixtures.MonkeyPatch(
                f'nova.virt.libvirt.{name}', self._native))
        for owner, name in (
                (local, 'remove_stale_directory'), (local, 'keep_directory'),
                (local, 'recover_directory'), (local, 'drop_claims'),
                (layout, 'write_record')):
            self._watch(owner, name)

    def _native(self, function, *args):
        self.off_hub.depth = getattr(self.off_hub, 'depth', 0) + 1
        try:
            return function(*args)
        finally:
            self.off_hub.depth -= 1

    def _watch(self, owner, name):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            self.called.setdefault(name, set()).add(
                getattr(self.off_hub, 'depth', 0) > 0)
            return function(*args, **kwargs)

        self.useFixture(fixtures.MockPatchObject(owner, name, call))

    def _assert_off_hub(self, *names):
        self.assertEqual(dict.fromkeys(names, {True}), self.called)

    def test_copy(self):
        self._migrate()
        self._assert_off_hub('recover_directory', 'remove_stale_directory',
                             'drop_claims', 'keep_directory')

    def test_shared_storage(self):
        self.useFixture(fixtures.MockPatchObject(
            self.driver, '_read_nvram', return_value=b'variables'))
        with (mock.patch.object(site.Site, '_find_shared', return_value=True),
              mock.patch.object(hooks, 'keeps_nvram', return_value=True)):
            self._migrate()
        self._assert_off_hub('recover_directory', 'remove_stale_directory',
                             'drop_claims', 'write_record')

    def test_hard_reboot(self):
        os.rename(self.directory, self.places.kept_directory)
        claim = layout.Claim(uuids.instance, 'attempt', 'gone')
        open(os.path.join(self.pool_path, claim.name), 'w').close()
        with mock.patch.object(driver.LibvirtDriver, '_hard_reboot'):
            self.driver._hard_reboot(self.context, self.instance, [], None)
        self._assert_off_hub('recover_directory', 'drop_claims')

    def _add_overlay(self):
        """An overlay that came with a base image of its old host."""
        base_image = os.path.join(
            self.directory, f'{layout.BASE}ephemeral_1_abcdef')
        with open(base_image, 'wb') as file:
            file.truncate(units.Mi)
        path = self.places.volume_path('disk.eph0')
        processutils.execute(
            'qemu-img', 'create', '-f', 'qcow2', '-b', base_image, '-F', 'raw',
            path, '1M')
        processutils.execute(
            'qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b',
            '/gone/_base/ephemeral_1_abcdef', '-F', 'raw', path)
        layout.write_record(self.places.record_path, {path: 'qcow2'})
        return path

    def _assert_programs_on_hub(self, path):
        """An overlay has become an image, with programs of green threads."""
        self.assertIsNone(layout.backing_file(path))
        self.assertEqual({False}, self.called['execute'])
        self.assertEqual({True}, self.called['flush'])

    def test_hard_reboot_starts_programs_on_the_hub(self):
        overlay = self._add_overlay()
        self._claim()
        self._watch(processutils, 'execute')
        self._watch(layout, 'flush')
        with mock.patch.object(driver.LibvirtDriver, '_hard_reboot'):
            self.driver._hard_reboot(self.context, self.instance, [], None)
        self._assert_programs_on_hub(overlay)

    def test_arrival_starts_programs_on_the_hub(self):
        overlay = self._add_overlay()
        self._claim()
        self._watch(processutils, 'execute')
        self._watch(layout, 'flush')
        self._finish([{'path': 'disk', 'type': 'none'},
                      {'path': overlay, 'type': 'qcow2'}])
        self._assert_programs_on_hub(overlay)


class InterruptedTestCase(base.CrashMixin, base.DriverTestCase):

    def test_nova_does_not_confirm_what_was_not_finished(self):
        self.flags(resize_confirm_window=1)
        self._start(task_states.RESIZE_FINISH)
        self._assert_state(vm_states.ERROR, None, 'error')
        delete = self.allocations.delete_allocation_for_instance
        delete.assert_called_once_with(
            mock.ANY, uuids.migration, consumer_type='migration')


class BoundTestCase(base.DriverTestCase):

    def test_own_daemon_that_hangs_holds_up_no_delete(self):
        self._add_disk()
        blocked = self.source.block('*')
        self.addCleanup(blocked.release)
        self.assertTrue(self.driver.delete_instance_files(self.instance))
        self.assertEqual([], self.source.calls)

    def test_own_daemon_that_hangs_refuses_a_migration(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self._add_disk()
        blocked = self.source.block('conn.storagePoolLookupByName')
        self.addCleanup(blocked.release)
        self._assert_refused('host source', 'no answer within 1 seconds')

    def test_destination_that_hangs_is_not_asked_again(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self._add_disk()
        self.dest.fail('stream.send')
        self.dest.fail('vol.delete')
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.leftovers.FIRST_WAIT', 0))
        blocked = self.dest.block('conn.storagePoolLookupByName', times=None)
        self.addCleanup(blocked.release)
        self.driver._leftovers.retry()
        before = threading.active_count(), len(self.dest.connections)
        for _attempt in range(4):
            self.driver._leftovers.retry()
        self.assertEqual(before, (
            threading.active_count(), len(self.dest.connections)))

    def test_one_bound_for_all_copies_at_shutdown(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage_migrate.PUT_BACK_SECONDS', 2))
        self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, 'cleanup_host'))
        for name in 'abc':
            instance = mock.Mock(uuid=name)
            copying = self.driver._copying(instance)
            copying.__enter__()
            self.addCleanup(copying.__exit__, None, None, None)
        started = time.monotonic()
        self.driver.cleanup_host('source')
        self.assertLess(time.monotonic() - started, 4)


@ddt.ddt
class AddressTestCase(base.DriverTestCase):
    """The address of the destination comes from its own record."""

    @ddt.data('dest?no_verify=1', 'dest/system?command=x', 'a b', '-x', '',
              'dest#', 'x@dest')
    def test_address_that_is_none(self, dest):
        self._add_disk()
        self._assert_refused('is no address of a host', dest=dest)
        self.assertEqual([], self.hosts.opened)

    @ddt.data('fd00::1', '192.0.2.1', 'host-1.example.org', 'h')
    def test_address(self, dest):
        self.assertIn(
            dest, base.storage_migrate.destination_uri(dest))


class PoolIsInstancesPathTestCase(base.DriverTestCase):

    def test_refused_at_start(self):
        self.flags(disks_pool_path=self.instances + '/', group='libvirt')
        error = self.assertRaises(
            exception.InvalidConfiguration, self.driver._init_disks_pool)
        self.assertIn('instances_path', str(error))


class RawVolumeTestCase(base.DriverTestCase):

    def test_pool_with_raw_volumes_does_not_start_by_itself(self):
        self._add_disk(disk_format='raw')
        with mock.patch.object(base.storage_migrate.LOG, 'warning') as warning:
            self.driver._init_disks_pool()
        self.assertIn('raw disks of an earlier release',
                      warning.call_args.args[0])
        self.assertFalse(self.source.pools['nova-disks'].autostart)
        shutil.rmtree(self.directory)
        self.driver._init_disks_pool()
        self.assertTrue(self.source.pools['nova-disks'].autostart)
