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

import errno
import os
import stat
from unittest import mock

import ddt
import fixtures
from lxml import etree
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import power_state
from nova import exception
from nova import test
from nova.tests.fixtures import privileged
from nova.tests.unit.virt.libvirt.storage import test_hostile
from nova.tests.unit.virt.libvirt.storage import test_no_files
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import hooks
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import nvram
from nova.virt.libvirt.storage import site

PATH = '/var/lib/libvirt/qemu/nvram/instance-1_VARS.fd'
DOMAIN = '<domain><os{0}>{1}<type>hvm</type></os></domain>'
PFLASH = '<loader readonly="yes" type="pflash">/OVMF_CODE.fd</loader>'


@ddt.ddt
class XmlTestCase(test.NoDBTestCase):

    @ddt.data(
        (' firmware="efi"', ''),
        (' firmware="efi"', '<nvram>/old</nvram>'),
        ('', PFLASH + '<nvram template="/OVMF_VARS.fd">/old</nvram>'))
    @ddt.unpack
    def test_domain_names_what_came_along(self, attribute, inner):
        xml = nvram.name_path(DOMAIN.format(attribute, inner), PATH)
        self.assertEqual(PATH, nvram.path_in(xml))
        system = etree.fromstring(xml).find('os')
        self.assertEqual(1, len(system.findall('nvram')))
        self.assertEqual('template' in inner,
                         'template' in system.find('nvram').attrib)

    @ddt.data(
        ('', ''), ('', '<loader type="rom">/seabios</loader>'),
        (' firmware="bios"', ''),
        (' firmware="efi"', '<loader stateless="yes"/>'))
    @ddt.unpack
    def test_domain_without_variables_stays_as_it_is(self, attribute, inner):
        xml = DOMAIN.format(attribute, inner)
        self.assertEqual(xml, nvram.name_path(xml, PATH))
        self.assertIsNone(nvram.path_in(xml))

    def test_domain_that_is_off_does_not_tell_the_path(self):
        xml = ('<domain><name>instance-1</name><os firmware="efi"/></domain>')
        self.assertEqual(PATH, nvram.path_in(xml))

    def test_domain_of_another_kind(self):
        self.assertEqual('<domain/>', nvram.name_path('<domain/>', PATH))


class ReadTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.last_bytes = self.useFixture(fixtures.MockPatch(
            'nova.privsep.path.last_bytes', return_value=(b'all', 0))).mock

    def test_variables_are_read_as_root(self):
        self.assertEqual(b'all', nvram.read(PATH))
        self.last_bytes.assert_called_once_with(PATH, nvram.MAX_BYTES)

    def test_server_that_has_never_started(self):
        self.last_bytes.side_effect = FileNotFoundError
        self.assertIsNone(nvram.read(PATH))

    def test_file_that_is_too_long(self):
        self.last_bytes.return_value = b'the end', 1
        error = self.assertRaises(errors.StorageError, nvram.read, PATH)
        self.assertIn(PATH, str(error))

    def test_file_that_is_empty(self):
        self.last_bytes.return_value = b'', 0
        error = self.assertRaises(errors.StorageError, nvram.read, PATH)
        self.assertIn(PATH, str(error))

    def test_privsep_that_fails(self):
        self.last_bytes.side_effect = RuntimeError('no sudo')
        error = self.assertRaises(errors.StorageError, nvram.read, PATH)
        for text in PATH, 'no sudo', 'privsep':
            self.assertIn(text, str(error))
        self.assertLessEqual(len(str(error)), errors.MESSAGE_LENGTH)

    def test_variables_are_written_for_qemu_alone(self):
        path = os.path.join(self.useFixture(fixtures.TempDir()).path, 'nvram')
        for content in b'longer', b'short':
            nvram.write(path, content)
            with open(path, 'rb') as file:
                self.assertEqual(content, file.read())
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))


@ddt.ddt
class WriteTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.directory, 'nvram')
        self._put(b'before')
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.path.last_bytes',
            lambda path, count: (self._content(path), 0)))

    def _put(self, content):
        with open(self.path, 'wb') as file:
            file.write(content)

    def _content(self, path):
        with open(path, 'rb') as file:
            return file.read()

    @ddt.data('fsync', 'replace')
    def test_failure_leaves_the_variables_that_were_there(self, call):
        error = OSError(errno.ENOSPC, 'No space left on device')
        with mock.patch.object(os, call, side_effect=error):
            self.assertRaises(OSError, nvram.write, self.path, b'after')
        self.assertEqual(b'before', self._content(self.path))
        self.assertEqual(['nvram'], os.listdir(self.directory))

    def test_file_of_another_user_is_replaced(self):
        # libvirt may leave it to root. nova-compute owns the directory.
        other = os.path.join(self.directory, 'of QEMU')
        os.link(self.path, other)
        nvram.write(self.path, b'after')
        self.assertEqual(b'after', self._content(self.path))
        self.assertEqual(b'before', self._content(other))

    def test_variables_that_are_there_already_stay_qemus(self):
        before = os.stat(self.path)
        nvram.write(self.path, b'before')
        self.assertEqual(before, os.stat(self.path))

    def test_empty_file_is_replaced(self):
        self._put(b'')
        nvram.write(self.path, b'after')
        self.assertEqual(b'after', self._content(self.path))


class NvramMixin:
    """A server with UEFI variables."""

    def setUp(self):
        super().setUp()
        self.variables = b'before it was off'
        self.last_bytes = self.useFixture(fixtures.MockPatch(
            'nova.privsep.path.last_bytes',
            side_effect=privileged.privileged(self._read))).mock
        self.guest = self.useFixture(fixtures.MockPatchObject(
            self.driver._host, 'get_guest')).mock.return_value
        self.guest.get_xml_desc.return_value = DOMAIN.format(
            '', f'<nvram>{PATH}</nvram>')
        self.target = os.path.join(self.directory, layout.NVRAM)

    def _read(self, path, count):
        if path != PATH:
            with open(path, 'rb') as file:
                return file.read(), 0
        if self.variables is None:
            raise PermissionError(13, 'denied')
        return self.variables, 0

    def _kept(self):
        with open(self.target, 'rb') as file:
            return file.read()


class PoolTestCase(NvramMixin, test_storage_migrate.DriverTestCase):

    def setUp(self):
        super().setUp()
        self._add_disk()

    def test_variables_are_those_of_when_the_server_is_off(self):
        def off(*args):
            self.variables = b'of the end'

        self.calls.power_off.side_effect = off
        result = jsonutils.loads(self._migrate())
        file = self.dest.files[self.target]
        self.assertEqual((b'of the end', 0o600),
                         (file.content.read(0, 99), file.mode))
        self.assertEqual({self.target: layout.digest(b'of the end')},
                         local.heads(result))

    def test_server_without_any(self):
        self.guest.get_xml_desc.return_value = DOMAIN.format('', '')
        self._migrate()
        self.assertNotIn(self.target, self.dest.files)

    def test_variables_that_cannot_be_read_are_a_reason_to_refuse(self):
        self.variables = None
        self._assert_refused(PATH, 'denied')

    def test_variables_that_are_empty_are_a_reason_to_refuse(self):
        self.variables = b''
        self._assert_refused(PATH, 'empty')

    def test_failure_leaves_nothing_over_there(self):
        self.dest.fail('vol.upload', name=layout.NVRAM)
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self._assert_nothing_on_destination()
        self.assertNotIn(self.target, self.dest.files)
        self.assertFalse(os.path.exists(self.target))

    def test_shared_directory_has_them_for_the_other_host(self):
        with mock.patch.object(site.Site, '_find_shared', return_value=True):
            self._migrate()
        self.assertEqual(self.variables, self._kept())

    def test_shared_directory_where_nova_would_delete_them(self):
        with (mock.patch.object(site.Site, '_find_shared', return_value=True),
              mock.patch.object(hooks, 'keeps_nvram', return_value=False)):
            self._migrate()
        self.assertFalse(os.path.exists(self.target))


@ddt.ddt
class NoFilesTestCase(NvramMixin, test_no_files.CephTestCase):
    """A server that has variables and not a single file."""

    @ddt.data([], test_no_files.FROM_VOLUME)
    def test_variables_come_along(self, volumes):
        result = jsonutils.loads(self._migrate(
            **({'block_device_info': volumes} if volumes else {})))
        self.assertEqual(
            {layout.NVRAM: self.variables, layout.RECORD: b'{}\n'},
            self._arrived())
        self.assertEqual({self.target: layout.digest(self.variables)},
                         local.heads(result))
        self.assertEqual(1, len(self._markers()))

    def test_failure_leaves_nothing_over_there(self):
        self.dest.fail('vol.upload', name=layout.NVRAM)
        self.assertRaises(exception.InstanceFaultRollback, self._migrate)
        self._assert_nothing_on_destination()
        self.assertEqual('power_on', self.calls.mock_calls[-1][0])

    def test_server_without_any_needs_nothing_over_there(self):
        self.guest.get_xml_desc.return_value = DOMAIN.format('', '')
        self._migrate()
        self._assert_nothing_on_destination()


class HostileTestCase(NvramMixin, test_hostile.HostileTestCase):

    def test_variables_that_a_guest_wrote_are_not_probed(self):
        self._add_files()
        self.variables = test_hostile.HOSTILE
        self._migrate()
        self._assert_arrived(layout.NVRAM)
        self.assertEqual([], self.opened)


@ddt.ddt
class SameHostTestCase(NvramMixin, test_storage_migrate.SameHostMixin,
                       test_storage_migrate.DriverTestCase):

    def test_variables_that_came_along_are_there_and_kept(self):
        nvram.write(self.target, b'that came')
        self._resize()
        self.assertEqual(b'that came', self._kept())
        nvram.write(self.target, b'changed')
        self._revert()
        self.assertEqual(b'that came', self._kept())

    def _nova_resizes(self):
        """Have Nova's own code resize the server, which has files."""
        nvram.write(self.target, b'that came')

        def resize(*args):
            os.rename(self.directory, self.places.kept_directory)
            os.mkdir(self.directory)
            self._write(self._file('disk.info'), '{}')
            return '[]'

        with (mock.patch.object(layout.Layout, 'volumes', return_value=[]),
              mock.patch.object(driver.LibvirtDriver,
                                'migrate_disk_and_power_off', resize)):
            return self._migrate(dest='source')

    def test_so_they_are_when_nova_resizes(self):
        self.assertEqual('[]', self._nova_resizes())
        self.assertEqual(b'that came', self._kept())
        self.assertTrue(os.path.isdir(self.places.kept_directory))
        self.calls.power_on.assert_not_called()

    @ddt.data(power_state.RUNNING, power_state.SHUTDOWN)
    def test_server_is_as_before_if_nova_resizes_and_they_stay(self, state):
        self.info.return_value.state = state
        stale = self.places.kept_path(self.places.volume_path('disk'))
        self._write(stale, 'of an earlier resize')
        self.before = self._state()
        write = mock.Mock(side_effect=[None, OSError('no space left')])
        with mock.patch.object(nvram, 'write', write):
            self._write(self.target, 'that came')
            error = self.assertRaises(
                exception.InstanceFaultRollback, self._nova_resizes)
        self.assertIn('no space left', str(error.inner_exception))
        self.assertEqual(self.before | {self.target: 'that came'},
                         self._state())
        self.assertEqual(state == power_state.RUNNING,
                         self.calls.power_on.called)


@ddt.ddt
class DomainTestCase(NvramMixin, test_storage_migrate.DriverTestCase):
    """The domain of a server, with variables that came along or without."""

    def _xml(self):
        guest = mock.Mock()
        guest.to_xml.return_value = DOMAIN.format(' firmware="efi"', '')
        with mock.patch.object(driver.LibvirtDriver, '_get_guest_config',
                               return_value=guest):
            return self.driver._get_guest_config(
                self.instance, None, None, None).to_xml()

    def test_domain_names_variables_that_are_there(self):
        self.assertNotIn('nvram', self._xml())
        nvram.write(self.target, b'variables')
        self.assertEqual(self.target, nvram.path_in(self._xml()))

    def test_domain_never_names_an_empty_file(self):
        with open(self.target, 'wb'):
            pass
        error = self.assertRaises(exception.InternalError, self._xml)
        self.assertIn(self.target, str(error))
        self.assertLessEqual(len(str(error)), errors.MESSAGE_LENGTH)

    @ddt.data(True, False)
    def test_libvirt_deletes_none_in_an_instance_directory(self, here):
        # Another host may share the directory, and run the server.
        if here:
            nvram.write(self.target, b'variables')
        with mock.patch.object(
                driver.LibvirtDriver, '_undefine_domain') as undefine, (
                mock.patch.object(hooks, 'keeps_nvram', return_value=True)):
            self.driver._undefine_domain(self.instance)
            self.driver._undefine_domain(self.instance, keep_nvram=False)
        kept = {'keep_nvram': True} if here else {}
        self.assertEqual(
            [mock.call(self.instance, **kept),
             mock.call(self.instance, **({'keep_nvram': False} | kept))],
            undefine.call_args_list)

    def test_nova_that_cannot_keep_them(self):
        nvram.write(self.target, b'variables')
        with mock.patch.object(
                driver.LibvirtDriver, '_undefine_domain') as undefine, (
                mock.patch.object(hooks, 'keeps_nvram', return_value=False)):
            self.driver._undefine_domain(self.instance)
        undefine.assert_called_once_with(self.instance)

    def test_server_without_a_domain(self):
        self.driver._host.get_guest.side_effect = (
            exception.InstanceNotFound(instance_id=uuids.instance))
        self.assertIsNone(self.driver._read_nvram(self.instance))
