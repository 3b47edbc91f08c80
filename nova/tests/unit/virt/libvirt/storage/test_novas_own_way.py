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

import contextlib
import os
import shutil
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt import fake
from nova.virt.libvirt import driver
from nova.virt.libvirt import storage_migrate

DISKS = [('disk', 'qcow2'), ('disk.eph0', 'raw'), ('disk.swap', 'raw'),
         ('disk.config', 'raw')]


@contextlib.contextmanager
def fixed_directory(**kwargs):
    """What nova.utils.tempdir() is, with a name that does not change."""
    yield '/tmp/of-nova'


@ddt.ddt
class CommandsTestCase(test_storage_migrate.DriverTestCase):
    """A server in an instance directory, without the opt-in.

    The commands that Nova's own driver runs are recorded, and so are those
    that ours does.
    """

    def setUp(self):
        super().setUp()
        self.flags(use_storage_pools=False, group='libvirt')
        self.vtpm = self.useFixture(fixtures.TempDir()).path
        for name, value in (
                ('nova.virt.libvirt.utils.VTPM_DIR', self.vtpm),
                ('nova.utils.tempdir', fixed_directory),
                ('oslo_utils.uuidutils.generate_uuid',
                 lambda dashed=True: 'of-nova')):
            self.useFixture(fixtures.MonkeyPatch(name, value))
        self.privileged = mock.Mock()
        for name in ('move_tree', 'chown'):
            self.useFixture(fixtures.MonkeyPatch(
                f'nova.privsep.path.{name}', getattr(self.privileged, name)))

    def _record(self, driver_class):
        """The result of a migration, and every command it took."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.directory + '_resize', ignore_errors=True)
        os.makedirs(self.directory)
        os.makedirs(os.path.join(self.vtpm, uuids.instance), exist_ok=True)
        self.driver = driver_class(fake.FakeVirtAPI())
        self._patch_driver()
        self.disk_info.return_value = [
            {'path': self._add_file(name, b'data'), 'type': disk_format}
            for name, disk_format in DISKS]
        self._add_file('disk.info', b'{}')
        self.privileged.reset_mock()
        with mock.patch(
                'oslo_concurrency.processutils.execute') as execute:
            result = self._migrate()
        return (result, [call.args for call in execute.mock_calls],
                self.privileged.mock_calls, self.calls.mock_calls)

    @ddt.data(('ssh', 'scp'), ('rsync', 'rsync'))
    @ddt.unpack
    def test_commands_are_those_of_nova(self, transport, program):
        self.flags(remote_filesystem_transport=transport, group='libvirt')
        novas = self._record(driver.LibvirtDriver)
        arguments = {argument for command in novas[1]
                     if command[0] == program for argument in command}
        for target in ('/disk.eph0', '/disk.info', ''):
            self.assertIn(f'dest:{self.directory}{target}', arguments)
        self.privileged.move_tree.assert_called_once()
        for upload, legacy in ((False, False), (True, False), (False, True)):
            self.flags(vol_upload_migration=upload,
                       vol_upload_migration_legacy=legacy, group='libvirt')
            self.assertEqual(
                novas, self._record(storage_migrate.LibvirtDriver))
        self.assertEqual([], self.hosts.opened)
