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

import struct
import uuid

import ddt
from lxml import etree

from nova.tests.live import base
from nova.tests.stock import base as stock

UEFI = {'hw_firmware_type': 'uefi', 'hw_machine_type': 'q35'}
SECURE = UEFI | {'os_secure_boot': 'required'}

# Of EDK II: see MdeModulePkg/Include/Guid/VariableFormat.h.
VENDOR = uuid.UUID('3f1d0c5a-7b9e-4246-8d10-6b1e8d0a73c5')
START_ID = 0x55aa
ADDED = 0x3f
# Kept between starts, and to be seen by the firmware and by the system.
ATTRIBUTES = 7
HEADER = struct.Struct('<HBBIQ16sIII16s')
STORE = struct.Struct('<16sIBBHI')


class Variables:
    """The variables that a firmware keeps in a file."""

    def __init__(self, path):
        self._path = path
        self._data = bytearray(path.read_bytes())
        # Behind the header of the firmware volume, which has its length.
        self._first = struct.unpack_from('<H', self._data, 48)[0] + STORE.size

    def names(self):
        """The names of what is not deleted."""
        return {name for name, state in self._walk() if state == ADDED}

    def _walk(self):
        position = self._first
        while True:
            (start, state, _reserved, _attributes, _count, _time, _key,
             name_size, data_size, _guid) = HEADER.unpack_from(
                self._data, position)
            if start != START_ID:
                self._free = position
                return
            begin = position + HEADER.size
            name = self._data[begin:begin + name_size].decode('utf-16-le')
            yield name.rstrip('\0'), state
            position = (begin + name_size + data_size + 3) // 4 * 4

    def add(self, name, data):
        """Add a variable behind the last one, as the firmware does."""
        list(self._walk())
        encoded = (name + '\0').encode('utf-16-le')
        record = HEADER.pack(
            START_ID, ADDED, 0, ATTRIBUTES, 0, bytes(16), 0, len(encoded),
            len(data), VENDOR.bytes_le) + encoded + data
        self._data[self._free:self._free + len(record)] = record
        self._path.write_bytes(self._data)


@ddt.ddt
class UefiTestCase(stock.ComputeMixin, base.LiveTestCase):
    """A server whose firmware is OVMF, from host to host."""

    IN_POOL = True

    def start(self, properties):
        layer = {'libvirt': {} if self.IN_POOL else {
            'use_storage_pools': 'False',
            'vol_upload_migration_legacy': 'True'}}
        for host in self.source, self.destination:
            self.configure(host, layer)
        self.here, self.there = map(
            self.start_compute, (self.source, self.destination))
        for compute in self.here, self.there:
            compute.call('describe', properties=properties)

    def path(self, host, uuid):
        """Where libvirt has the variables of a server."""
        domain = etree.fromstring(host.run(['virsh', 'dumpxml', uuid]).stdout)
        # Before 9.2 libvirt does not tell of a domain that is off.
        return domain.findtext('os/nvram') or (
            f'/var/lib/libvirt/qemu/nvram/{domain.findtext("name")}_VARS.fd')

    def names(self, host, uuid):
        return Variables(host.path(self.path(host, uuid))).names()

    def write(self, host, compute, uuid, name):
        """Write a variable, as the guest would."""
        compute.call('stop', uuid=uuid)
        Variables(host.path(self.path(host, uuid))).add(name, b'7')

    def assert_known(self, host, uuid, *names):
        """A firmware that has started knows these variables."""
        self.assertEqual('running', host.run(
            ['virsh', 'domstate', uuid]).stdout.strip())
        self.assertLessEqual(set(names), self.names(host, uuid))

    @ddt.data(UEFI, SECURE)
    def test_variables_go_there_and_back_and_come_back_by_revert(
            self, properties):
        self.start(properties)
        uuid = self.spawn(self.here)
        made = self.path(self.source, uuid)
        self.write(self.source, self.here, uuid, 'First')

        self.migrate(uuid, self.here, self.there)
        self.assert_known(self.destination, uuid, 'First')
        self.assertIn(uuid, self.path(self.destination, uuid))
        # A hard reboot defines the domain anew.
        self.write(self.destination, self.there, uuid, 'Second')
        self.there.call('hard_reboot', uuid=uuid)
        self.assert_known(self.destination, uuid, 'First', 'Second')

        self.there.call('destroy', uuid=uuid)
        self.assertEqual('running', self.here.call(
            'finish_revert', uuid=uuid))
        self.assertEqual(made, self.path(self.source, uuid))
        self.assert_known(self.source, uuid, 'First')
        self.assertNotIn('Second', self.names(self.source, uuid))

        self.migrate(uuid, self.here, self.there)
        self.here.call('confirm', uuid=uuid)
        self.assertFalse(self.source.path(made).exists())
        self.write(self.destination, self.there, uuid, 'Third')
        self.migrate(uuid, self.there, self.here)
        self.there.call('confirm', uuid=uuid)
        self.assert_known(self.source, uuid, 'First', 'Third')


class UefiInDirectoryTestCase(UefiTestCase):
    """The same where the disks are in the instance directory."""

    IN_POOL = False
