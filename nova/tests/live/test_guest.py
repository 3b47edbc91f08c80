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
"""The guest image keeps what it promises to the tests that rely on it."""

import os

from nova.tests.live import base

from tools import guest
from tools import waiting

DOMAIN = """\
<domain type='qemu'>
  <name>counter</name>
  <memory unit='MiB'>256</memory>
  {os}
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{directory}/counter.raw'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{directory}/counter.ephemeral'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{directory}/counter.log'/></serial>
  </devices>
</domain>
"""
DIRECTORY = '/var/lib/nova/instances'
BIOS = "<os><type arch='x86_64'>hvm</type></os>"
UEFI = f"""\
<os firmware='efi'>
    <type arch='x86_64' machine='q35'>hvm</type>
    <firmware><feature enabled='no' name='secure-boot'/></firmware>
    <nvram>{DIRECTORY}/counter.nvram</nvram>
  </os>"""


class TestGuest(base.LiveTestCase):

    def setUp(self):
        super().setUp()
        self.disk = self.make_disk(
            self.source, DIRECTORY + '/counter.raw', 0, [])
        self.ephemeral = self.make_disk(
            self.source, DIRECTORY + '/counter.ephemeral', 32 << 20, [])
        self.log = self.make_disk(
            self.source, DIRECTORY + '/counter.log', 0, [])
        guest.build(self.disk)
        guest.execute('mke2fs', '-q', '-t', 'ext4', self.ephemeral)

    def boot(self, firmware=BIOS):
        """Boot to the end, press the power button, return the console."""
        self.log.write_bytes(b'')
        connection = self.connect_local(self.source)
        domain = connection.createXML(
            DOMAIN.format(directory=DIRECTORY, os=firmware))
        try:
            self.wait_for(lambda: 'GUEST-READY' in self.console(), 120)
            domain.shutdown()
            self.wait_for(lambda: not connection.listAllDomains(), 30)
        finally:
            for domain in connection.listAllDomains():
                domain.destroy()
        return self.console()

    def console(self):
        return self.log.read_text(errors='replace').splitlines()

    def wait_for(self, condition, timeout):
        try:
            waiting.wait_for('the guest', condition, timeout)
        except waiting.Failed as error:
            self.fail('%s: %s' % (error, self.console()))

    def test_counts_its_boots_on_each_disk_and_sees_a_disk_grow(self):
        first = self.boot()
        self.assertIn('BOOT-COUNTER 1', first)
        self.assertIn('DISK vda %d' % (guest.SIZE // 512), first)
        self.assertIn('DISK vdb 65536', first)
        self.assertIn('DISK-COUNTER vdb 1', first)
        os.truncate(self.disk, guest.SIZE + (1 << 20))
        second = self.boot()
        self.assertIn('BOOT-COUNTER 2', second)
        self.assertIn('DISK vda %d' % (guest.SIZE // 512 + 2048), second)
        self.assertIn('DISK-COUNTER vdb 2', second)

    def test_counts_its_boots_in_the_firmware_too(self):
        variables = self.source.path(f'{DIRECTORY}/counter.nvram')
        self.addCleanup(variables.unlink, missing_ok=True)
        self.assertIn('EFI-COUNTER 1', self.boot(UEFI))
        second = self.boot(UEFI)
        self.assertIn('EFI-COUNTER 2', second)
        self.assertIn('BOOT-COUNTER 2', second)
        variables.unlink()
        third = self.boot(UEFI)
        self.assertIn('EFI-COUNTER 1', third)
        self.assertIn('BOOT-COUNTER 3', third)
        self.assertNotIn('EFI-COUNTER', ' '.join(self.boot()))

    def test_image_has_two_partitions_and_holes(self):
        with open(self.disk, 'rb') as image:
            image.seek(446)
            table = image.read(66)
        self.assertEqual(b'\x80', table[:1])
        self.assertEqual(b'\xef', table[20:21])
        self.assertEqual(bytes(32), table[32:64])
        self.assertEqual(b'\x55\xaa', table[64:])
        self.assertLess(self.allocated(self.disk), guest.SIZE // 2)
