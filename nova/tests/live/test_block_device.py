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


import os
import subprocess

import fixtures
from oslo_utils import units
import testtools

import nova.privsep.storage_migrate
from nova.tests.live import base
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import stream

SIZE = 64 * units.Mi
DATA = [(0, units.Mi), (32 * units.Mi, 4096)]
OLD = b'\xa5'


class BlockDeviceTestCase(base.LiveTestCase):
    """What the copy loop does with volumes that are block devices.

    Those of a logical pool are, which needs a device mapper. Here they are
    loop devices, whose nodes are in the directory of a pool.
    """

    def setUp(self):
        super().setUp()
        self.pools = {host: self.make_pool(host)
                      for host in (self.source, self.destination)}

    def add_file(self, host, extents):
        """Make a disk in the pool; return its file and its volume."""
        pool = self.pools[host]
        file = self.make_disk(
            host, '/var/lib/nova/%s/disk' % pool.name(), SIZE, extents)
        pool.refresh()
        return file, pool.storageVolLookupByName('disk')

    def add_device(self, host, size=SIZE):
        """Make a device full of old data; return its file and its volume."""
        pool = self.pools[host]
        path = '/var/lib/nova/%s' % pool.name()
        file = self.make_disk(host, path + '.img', 0, [])
        file.write_bytes(OLD * size)
        loop = subprocess.run(
            ['losetup', '--find', '--show', file], check=True, text=True,
            stdout=subprocess.PIPE).stdout.strip()
        self.addCleanup(subprocess.run, ['losetup', '--detach', loop],
                        check=True)
        # Block device, with the number of the one in /dev.
        os.mknod(host.path(path + '/device'), 0o060600, os.stat(loop).st_rdev)
        pool.refresh()
        volume = pool.storageVolLookupByName('device')
        self.assertEqual(size, volume.infoFlags(
            base.libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)[2])
        return file, volume

    def copy(self, source, target):
        result = stream.copy(
            stream.VolumeSource(source),
            stream.VolumeSink(target, length=SIZE), SIZE)
        os.sync()
        return result

    def test_holes_are_zeros_where_a_device_held_old_data(self):
        disk, source = self.add_file(self.source, DATA)
        file, device = self.add_device(self.destination)
        before = self.sha256(file)
        result = self.copy(source, device)
        # That is, the holes were not sent.
        self.assertEqual(sum(length for _offset, length in DATA), result.wire)
        self.assertNotEqual(before, self.sha256(file))
        self.assertEqual(self.sha256(disk), self.sha256(file))

    def test_device_that_is_larger(self):
        disk, source = self.add_file(self.source, DATA)
        # By one extent of a logical volume.
        file, device = self.add_device(
            self.destination, SIZE + 4 * units.Mi)
        self.copy(source, device)
        content = file.read_bytes()
        self.assertEqual(disk.read_bytes(), content[:SIZE])
        self.assertEqual(OLD * 4 * units.Mi, content[SIZE:])

    def test_device_arrives_and_its_zeros_become_holes(self):
        file, device = self.add_device(self.source)
        with open(file, 'r+b') as data:
            data.write(bytes(SIZE - units.Mi))
        os.sync()
        subprocess.run(['blockdev', '--flushbufs', self.loop_of(file)],
                       check=True)
        disk, target = self.add_file(self.destination, [])
        result = self.copy(device, target)
        self.assertEqual(self.sha256(file), self.sha256(disk))
        # libvirt cuts what it reads anywhere: some zeros may come with data.
        for seen in (result.wire, self.allocated(disk)):
            self.assertGreaterEqual(seen, units.Mi)
            self.assertLess(seen, units.Mi + 2 * stream.ZERO_BYTES)

    def loop_of(self, file):
        return subprocess.run(
            ['losetup', '--noheadings', '--output', 'NAME', '--associated',
             file], check=True, text=True,
            stdout=subprocess.PIPE).stdout.strip()

    def test_device_that_is_too_small(self):
        _disk, source = self.add_file(self.source, [(0, SIZE)])
        _file, device = self.add_device(self.destination, SIZE // 2)
        error = self.assertRaises(errors.CopyError, self.copy, source, device)
        self.assertEqual('destination', error.end)


class FlushTestCase(testtools.TestCase):
    """A write that failed after the upload had ended."""

    def setUp(self):
        super().setUp()
        # This is root.
        nova.privsep.sys_admin_pctxt.set_client_mode(False)
        self.addCleanup(nova.privsep.sys_admin_pctxt.set_client_mode, True)
        directory = self.useFixture(fixtures.TempDir()).path
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8M', 'tmpfs',
                        directory], check=True)
        self.addCleanup(subprocess.run, ['umount', directory], check=True)
        path = os.path.join(directory, 'disk')
        with open(path, 'wb') as file:
            file.truncate(SIZE)
        self.loop = subprocess.run(
            ['losetup', '--find', '--show', path], check=True, text=True,
            stdout=subprocess.PIPE).stdout.strip()
        self.addCleanup(subprocess.run, ['losetup', '--detach', self.loop],
                        check=True)

    @staticmethod
    def flush(path):
        nova.privsep.storage_migrate.flush_device(path)

    def write(self, size):
        with open(self.loop, 'r+b') as target:
            target.write(OLD * size)

    def test_device_that_is_full(self):
        self.write(32 * units.Mi)
        self.assertRaises(OSError, self.flush, self.loop)

    def test_device_that_is_not(self):
        self.write(units.Mi)
        self.flush(self.loop)
