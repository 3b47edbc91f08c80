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

"""libvirt's volume groups behave as their fake in the unit tests does.

It runs on a stock host, as root, with the contract beside it: only there is a
device mapper.
"""

import subprocess
import unittest

import libvirt

# Beside this file on the host.
import storage_contract

GROUP = 'contract'
FILE = '/var/tmp/contract.img'
EXTENTS = 17


def run(script: str) -> str:
    return subprocess.run(['sh', '-eu', '-c', script], check=True, text=True,
                          stdout=subprocess.PIPE).stdout.strip()


class DaemonLogicalContractTestCase(
        storage_contract.LogicalContract, unittest.TestCase):
    """A volume group on a loop device."""

    group = GROUP

    @classmethod
    def setUpClass(cls) -> None:
        # LVM takes one more extent for the description of the group.
        run(f'truncate -s {(EXTENTS + 1) * 4}M {FILE}')
        cls.loop = run(f'losetup --find --show {FILE}')
        run(f'vgcreate -q {GROUP} {cls.loop} >&2')

    @classmethod
    def tearDownClass(cls) -> None:
        run(f'vgremove -q -f {GROUP} >&2; losetup -d {cls.loop}; rm {FILE}')

    def setUp(self) -> None:
        run(f'lvcreate -q -W n -n old -l 100%FREE {GROUP} >&2\n'
            f"tr '\\0' '\\245' < /dev/zero | head -c {EXTENTS * 4}M | "
            f'dd of=/dev/{GROUP}/old bs=1M conv=fsync status=none\n'
            f'lvremove -q -f {GROUP}/old >&2')
        self.connection = libvirt.open('qemu:///system')
        self.addCleanup(self.connection.close)
        self.pool = self.connection.storagePoolCreateXML(
            storage_contract.LOGICAL_POOL.format(name='pool', group=GROUP))
        self.addCleanup(self.end)

    def end(self) -> None:
        """Leave the group empty, and without a pool."""
        for volume in self.pool.listAllVolumes():
            volume.delete()
        self.pool.destroy()

    def get_file(self, path: str) -> bytes | None:
        try:
            with open(path, 'rb') as device:
                return device.read()
        except FileNotFoundError:
            return None


if __name__ == '__main__':
    libvirt.registerErrorHandler(lambda *args: None, None)
    unittest.main()
