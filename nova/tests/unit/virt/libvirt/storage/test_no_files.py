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

"""Servers whose disks are in Ceph or in Cinder, and none in files."""

import os
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova import exception
from nova.tests.unit.virt.libvirt.storage import test_directory
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local

ROOT = {'connection_info': {}, 'mount_device': '/dev/vda', 'boot_index': 0}
FROM_VOLUME = {'block_device_mapping': [ROOT], 'ephemerals': [],
               'root_device_name': '/dev/vda'}


class CephTestCase(test_directory.DirectoryTestCase):
    """A server with its disks in Ceph, on a host that streams no files."""

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration_legacy=False, images_type='rbd',
                   images_rbd_pool='vms', group='libvirt')
        rbd = self.useFixture(fixtures.MockPatchObject(
            imagebackend.rbd_utils, 'RBDDriver')).mock.return_value
        rbd.pool = 'vms'
        self.rbd = rbd
        self.exists = rbd.exists
        self._set_disks(
            self._disk('vda', 'network', 'rbd', f'vms/{uuids.instance}_disk'))

    def _disk(self, target, source_type, protocol=None, name=None):
        disk = vconfig.LibvirtConfigGuestDisk()
        disk.target_dev = target
        disk.source_type = source_type
        disk.source_protocol = protocol
        disk.source_name = name
        return disk

    def _set_disks(self, *disks):
        self.disks.return_value = list(disks)


@ddt.ddt
class MigrateTestCase(CephTestCase):

    def _assert_nothing_is_copied(self, **kwargs):
        self.assertEqual([], jsonutils.loads(self._migrate(**kwargs)))
        self.assertEqual(self.before, self._state())
        self.assertEqual(
            [mock.call.power_off(self.instance, 7, 3),
             mock.call.unplug_vifs(
                 self.instance, mock.sentinel.network_info)],
            self.calls.mock_calls[:2])
        self.assertFalse(os.path.exists(self.directory))
        self.assertTrue(os.path.isdir(self.directory + '_resize'))
        self.nova.assert_not_called()

    @ddt.data(False, True)
    def test_nothing_is_copied(self, legacy):
        self.flags(vol_upload_migration_legacy=legacy, group='libvirt')
        self._add_file('console.log', b'what the guest says')
        self._assert_nothing_is_copied()
        self.assertIn('qemu+tls://dest/system', self.hosts.opened)

    @ddt.data(('qcow2', False), ('qcow2', True), ('rbd', False))
    @ddt.unpack
    def test_nor_of_a_server_that_boots_from_a_volume(self, images, pools):
        self.flags(images_type=images, use_storage_pools=pools,
                   group='libvirt')
        self._set_disks(
            self._disk('vda', 'network', 'rbd', 'volumes/volume-of-cinder'))
        self._assert_nothing_is_copied(block_device_info=FROM_VOLUME)

    def test_directory_that_nova_left_there_is_in_nobody_s_way(self):
        path = os.path.join(self.directory, 'console.log')
        self.dest.add_directory(self.directory)
        self.dest.add_file(path, b'of an earlier time there')
        self.before = self._state()
        self._assert_nothing_is_copied()

    def test_kernel_vtpm_and_record_come_along(self):
        self._add_file('kernel', b'a kernel')
        self._add_file('disk.info', b'{}')
        result = jsonutils.loads(self._migrate())
        self.assertEqual(
            {'kernel': b'a kernel', 'disk.info': b'{}\n'}, self._arrived())
        path = os.path.join(self.directory, 'kernel')
        self.assertEqual(
            {path: layout.digest(b'a kernel')}, local.heads(result))

    def test_file_in_the_directory_needs_its_own_option(self):
        self._add_file('disk.eph0', b'ephemeral')
        with mock.patch.object(
                driver.LibvirtDriver, '_is_path_shared_with') as nova:
            self.assertEqual(self.nova.return_value, self._migrate())
            self.assertEqual(
                nova.return_value,
                self.driver._is_path_shared_with('dest', self.directory))
        self.assertEqual([], self.hosts.opened)

    def test_nothing_is_done_with_the_option_off(self):
        self.flags(vol_upload_migration=False, group='libvirt')
        self.assertEqual(self.nova.return_value, self._migrate())
        self.assertEqual([], self.hosts.opened)

    def test_shared_directory_is_nova_s_and_asked_for_without_ssh(self):
        def share():
            for name in os.listdir(self.instances):
                self.dest.add_file(os.path.join(self.instances, name))

        self.dest.add_directory(self.directory)
        self.dest.call('conn.storagePoolCreateXML', share, times=None)
        self.assertEqual(self.nova.return_value, self._migrate())
        self.assertTrue(
            self.driver._is_path_shared_with('dest', self.directory))

    def test_snapshot_of_a_migration_that_failed_goes(self):
        """Nova cannot take another of this name at the destination."""
        self._migrate()
        self.rbd.remove_snap.assert_called_once_with(
            f'{uuids.instance}_disk', 'nova-resize', True)
        self.flags(vol_upload_migration=False, group='libvirt')
        self._migrate()
        self.exists.return_value = False
        self.flags(vol_upload_migration=True, group='libvirt')
        os.rename(self.directory + '_resize', self.directory)
        self._migrate()
        self.rbd.remove_snap.assert_called_once()

    def test_ceph_that_does_not_answer(self):
        self.rbd.remove_snap.side_effect = OSError('no monitor')
        error = self.assertRaises(
            exception.InstanceFaultRollback, self._migrate)
        self.assertIn('no monitor', str(error.inner_exception))
        self.calls.power_off.assert_not_called()

    def test_server_runs_again_after_a_failure(self):
        with mock.patch.object(local, 'keep_directory', side_effect=OSError):
            self.assertRaises(
                exception.InstanceFaultRollback, self._migrate)
        self.assertEqual('power_on', self.calls.mock_calls[-1][0])
        self.assertEqual(self.before, self._state())
        self.assertFalse(self.driver._leftovers)


class RefusalTestCase(CephTestCase):

    def test_daemon_that_is_down(self):
        self.dest.open_error = (
            libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC,
            'Connection refused')
        self._assert_refused('host dest', 'Connection refused')

    def test_domain_in_the_way(self):
        self.dest.add_domain(uuids.instance)
        self._assert_refused('a domain with uuid ' + uuids.instance)

    def test_disk_that_nobody_knows(self):
        name = f'{uuids.instance}_disk'
        for disk in (self._disk('vdb', 'network', 'nbd', 'export'),
                     self._disk('vdb', 'network', 'rbd', f'other/{name}'),
                     self._disk('vdb', 'network', 'rbd', 'vms/another_disk'),
                     self._disk('vdb', 'vhostuser')):
            self._set_disks(disk)
            self._assert_refused('disk vdb', 'images_rbd_pool')

    def test_directory_in_the_way_of_files(self):
        self._add_file('kernel', b'a kernel')
        self.dest.add_directory(self.directory)
        self.before = self._state()
        self._assert_refused('is there already')


class FinishTestCase(CephTestCase, test_storage_migrate.FinishMixin):
    """Nova would make a root disk that is not here anew."""

    def test_disk_that_is_here(self):
        self._finish([])
        self.exists.assert_called_once_with(f'{uuids.instance}_disk')

    def test_disk_that_this_host_does_not_see(self):
        self.exists.return_value = False
        self._assert_refused([])

    def test_host_with_another_type_of_images(self):
        self.flags(images_type='qcow2', group='libvirt')
        self._assert_refused([])
        self.assertEqual([], os.listdir(self.directory))

    def test_file_that_came_to_a_host_with_ceph(self):
        self.exists.return_value = False
        self._assert_refused(
            [{'path': os.path.join(self.directory, 'disk'),
              'type': 'qcow2'}])

    def test_server_that_boots_from_a_volume_has_none(self):
        self.exists.return_value = False
        self._finish([], block_device_info=FROM_VOLUME)

    def test_ephemeral_disk_of_a_server_that_boots_from_a_volume(self):
        info = FROM_VOLUME | {'ephemerals': [{'size': 1}, {'size': 1}]}
        self._finish([], block_device_info=info)
        self.assertEqual(
            [mock.call(f'{uuids.instance}_disk.eph0'),
             mock.call(f'{uuids.instance}_disk.eph1')],
            self.exists.call_args_list)
        self.exists.side_effect = lambda name: name.endswith('eph0')
        self._assert_refused([], 'disk.eph1', block_device_info=info)

    def test_ephemeral_disk_that_came_with_a_resize(self):
        self.exists.return_value = False
        # Nova makes none where a volume or a swap disk has its place.
        self.instance.flavor.ephemeral_gb = 1
        self.instance.old_flavor.ephemeral_gb = 1
        self._finish([], block_device_info=FROM_VOLUME)
        self.instance.default_ephemeral_device = '/dev/vdb'
        self._assert_refused(
            [], 'disk.local', block_device_info=FROM_VOLUME)

    def test_ephemeral_disk_in_ceph_of_a_host_with_files(self):
        self.flags(images_type='qcow2', group='libvirt')
        path = self._add_file('disk', b'image')
        layout.write_record(self.places.record_path, {path: 'qcow2'})
        disks = [{'path': path, 'type': 'qcow2'}]
        self._finish(disks)
        self._assert_refused(
            disks, 'disk.eph0',
            block_device_info={'ephemerals': [{'size': 1}]})

    def test_option_is_off(self):
        self.flags(vol_upload_migration=False, group='libvirt')
        self.exists.return_value = False
        self._finish([])

    def test_kernel_is_compared(self):
        claim = layout.Claim(uuids.instance, uuids.attempt, 'gone')
        with open(os.path.join(self.instances, claim.arrived_name), 'wb'):
            pass
        path = self._add_file('kernel', b'a kernel')
        disks = []
        local.add_heads(disks, {path: layout.digest(b'a kernel')})
        self._finish(disks)
        with open(path, 'wb') as kernel:
            kernel.write(b'another')
        self.assertRaises(exception.MigrationError, self._finish, disks)

    def _assert_refused(self, disks, name='disk', **kwargs):
        error = self.assertRaises(
            exception.MigrationError, self._finish, disks, **kwargs)
        self.assertIn(f'does not see disk {name} of the server', str(error))
        self.assertIn('images_rbd_pool', str(error))


@ddt.ddt
class RevertTestCase(CephTestCase):
    """Nova keeps the instance directory on the host that a server leaves."""

    def setUp(self):
        super().setUp()
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.instance.old_flavor = self.instance.flavor
        self._add_file('console.log', b'of the guest')

    @mock.patch.object(driver.LibvirtDriver, 'cleanup')
    def _leave(self, cleanup, **kwargs):
        arguments = {'destroy_disks': False, 'destroy_vifs': True, **kwargs}
        self.driver.cleanup(
            self.context, self.instance, mock.sentinel.network_info, None,
            **arguments)
        cleanup.assert_called_once()

    def test_directory_that_came_goes(self):
        self._leave()
        self.assertFalse(os.path.exists(self.directory))

    def test_state_of_the_vtpm_that_came_goes(self):
        parent = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.utils.VTPM_DIR', parent))
        os.makedirs(os.path.join(parent, uuids.instance, 'tpm2'))
        with (mock.patch('nova.privsep.path.chown') as chown,
              mock.patch('nova.privsep.path.rmdir', os.rmdir)):
            self._leave()
        chown.assert_called_once_with(
            os.path.join(parent, uuids.instance), os.geteuid(), os.getegid(),
            recursive=True)
        self.assertEqual([], os.listdir(parent))

    def test_directory_that_both_hosts_share_stays(self):
        os.mkdir(self.directory + '_resize')
        self._leave()
        self.assertTrue(os.path.exists(self.directory))

    @ddt.data({'task_state': None}, {'destroy_disks': True},
              {'images_type': 'qcow2'}, {'vol_upload_migration': False})
    def test_anything_else_is_nova_s(self, change):
        for name in change.keys() & {'images_type', 'vol_upload_migration'}:
            self.flags(group='libvirt', **{name: change.pop(name)})
        if 'task_state' in change:
            self.instance.task_state = change.pop('task_state')
        self._leave(**change)
        self.assertTrue(os.path.exists(self.directory))


@ddt.ddt
class SnapshotTestCase(CephTestCase):
    """The snapshot of the root disk to which Nova reverts."""

    def _revert(self, task_state):
        self.instance.task_state = task_state
        with (mock.patch.object(self.driver, '_is_active',
                                return_value=False),
              mock.patch.object(driver.LibvirtDriver,
                                'finish_revert_migration') as nova):
            self.driver.finish_revert_migration(
                self.context, self.instance, mock.sentinel.network_info,
                self.migration)
        nova.assert_called_once()

    def test_nova_compute_that_ended_before_there_was_one(self):
        """An older one would take the disk back to what it was then."""
        self._revert(task_states.RESIZE_MIGRATING)
        self.rbd.remove_snap.assert_called_once_with(
            f'{uuids.instance}_disk', 'nova-resize', True)

    def test_snapshot_stays_for_a_revert(self):
        self._revert(task_states.RESIZE_REVERTING)
        self.rbd.remove_snap.assert_not_called()

    def test_disk_without_one_is_as_it_was(self):
        disk = self.driver.image_backend.by_name(self.instance, 'disk')
        disk.rollback_to_snap('nova-resize')
        self.rbd.rollback_to_snap.assert_called_once_with(
            f'{uuids.instance}_disk', 'nova-resize')
        self.rbd.rollback_to_snap.side_effect = exception.SnapshotNotFound(
            snapshot_id='nova-resize')
        disk.rollback_to_snap('nova-resize')
        self.rbd.rollback_to_snap.side_effect = OSError
        self.assertRaises(OSError, disk.rollback_to_snap, 'nova-resize')


@ddt.ddt
class OtherCellTestCase(CephTestCase):
    """A server that Nova resizes to here from another cell."""

    def setUp(self):
        super().setUp()
        self.exists.return_value = False
        self.instance.update({'host': 'source', 'vm_state': 'active',
                              'task_state': task_states.RESIZE_FINISH})
        self.spawned = self.useFixture(fixtures.MockPatchObject(
            driver.LibvirtDriver, 'spawn')).mock

    def _spawn(self):
        self.driver.spawn(self.context, self.instance, None, [], None, {})

    def _assert_refused(self, what):
        error = self.assertRaises(exception.MigrationError, self._spawn)
        self.assertIn(f'{what} of the server is here already', str(error))
        self.spawned.assert_not_called()

    @ddt.data('disk', 'disk.eph0', 'disk.local', 'disk.swap')
    def test_disk_in_the_ceph_of_both_cells(self, name):
        name = f'{uuids.instance}_{name}'
        self.exists.side_effect = lambda image: image == name
        self._assert_refused(name)

    def test_file_in_the_directory_of_both_cells(self):
        self.flags(images_type='qcow2', group='libvirt')
        self._add_file('disk', b'image')
        self._assert_refused(self.directory)

    def test_nothing_is_shared(self):
        self._add_file('console.log', b'')
        self._spawn()
        self.spawned.assert_called_once()
