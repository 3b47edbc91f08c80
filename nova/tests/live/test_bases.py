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
import random
import shutil
import subprocess
import tempfile

import ddt

from nova.tests.live import base
from nova.tests.stock import base as stock

CACHE = '/var/lib/nova/instances/_base'
CLUSTER = 65536

# Commands that only read a file system, and fail if anything is wrong.
CHECKS = {
    'ext4': ['e2fsck', '-fn'],
    'xfs': ['xfs_repair', '-n', '-f'],
    'btrfs': ['btrfs', 'check', '--readonly'],
}


class OwnBaseMixin(stock.ComputeMixin):
    """An ephemeral disk on a base image that each host made for itself.

    Both hosts have a server with such a disk, and so a base image of the same
    name and of other content.
    """

    IN_POOL = True

    def start(self, file_system):
        layer = {'DEFAULT': {'default_ephemeral_format': file_system},
                 'libvirt': {} if self.IN_POOL else {
                     'use_storage_pools': 'False',
                     'vol_upload_migration_legacy': 'True'}}
        for host in self.source, self.destination:
            self.addCleanup(shutil.rmtree, host.path(CACHE))
            self.configure(host, layer)
        self.here, self.there = map(
            self.start_compute, (self.source, self.destination))
        for compute in self.here, self.there:
            compute.call('describe', ephemerals=[1])

    def path(self, host, uuid):
        """The ephemeral disk of a server, by its path on the host."""
        said = host.run(['virsh', 'domblklist', uuid]).stdout
        path, = (line.split()[1] for line in said.splitlines()
                 if line.split()[:1] == ['vdb'])
        self.assertEqual(
            self.IN_POOL, path.startswith('/var/lib/libvirt/images/'))
        return path

    def content(self, host, uuid):
        """A raw file, on the machine, with what the guest sees."""
        path = f'/var/lib/nova/{uuid}.raw'
        host.run(['qemu-img', 'convert', '-U', '-f', 'qcow2', '-O', 'raw',
                  self.path(host, uuid), path])
        self.addCleanup(host.path(path).unlink, missing_ok=True)
        return host.path(path)

    def mounted(self, image, function):
        """Call a function with the directory where an image is mounted."""
        with tempfile.TemporaryDirectory(dir='/var/tmp') as directory:
            subprocess.run(['mount', '-o', 'loop', image, directory],
                           check=True)
            try:
                return function(directory)
            finally:
                subprocess.run(['umount', directory], check=True)

    def write_files(self, directory):
        noise = random.Random(7)
        for number in range(40):
            parent = os.path.join(directory, f'directory-{number % 7}')
            os.makedirs(parent, exist_ok=True)
            with open(os.path.join(parent, str(number)), 'wb') as file:
                file.write(noise.randbytes(noise.randrange(300_000)))

    def read_files(self, directory):
        return {
            os.path.relpath(os.path.join(parent, name), directory):
                self.sha256(os.path.join(parent, name))
            for parent, _names, files in os.walk(directory)
            for name in files}

    def use(self, host, compute, uuid):
        """Write files to a disk, as its guest would.

        :returns: what has been written
        """
        compute.call('stop', uuid=uuid)
        image = self.content(host, uuid)
        before = image.read_bytes()
        self.mounted(image, self.write_files)
        commands = []
        with open(image, 'rb') as file, tempfile.TemporaryDirectory(
                dir=host.path('/var/lib/nova')) as pieces:
            for start in range(0, len(before), CLUSTER):
                piece = file.read(CLUSTER)
                if piece != before[start:start + CLUSTER]:
                    name = os.path.join(pieces, str(start))
                    with open(name, 'wb') as part:
                        part.write(piece)
                    inside = f'/var/lib/nova/{os.path.basename(pieces)}'
                    commands += ['-c', f'write -q -s {inside}/{start} {start} '
                                       f'{len(piece)}']
            host.run(['qemu-io', '-f', 'qcow2', *commands,
                      self.path(host, uuid)])
        return self.mounted(image, self.read_files)

    def assert_whole(self, host, uuid, file_system, files):
        """Nothing is wrong with a disk, and it has these files."""
        image = self.content(host, uuid)
        done = subprocess.run([*CHECKS[file_system], image], text=True,
                              capture_output=True)
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        self.assertEqual(files, self.mounted(image, self.read_files))

    def bases(self, host):
        """Checksums of the base images of ephemeral disks, by name."""
        return {path.name: self.sha256(path)
                for path in host.path(CACHE).glob('ephemeral*')}

    def info(self, host, uuid):
        return host.run(['qemu-img', 'info', '-U', self.path(host, uuid)]
                        ).stdout

    def go_there_and_back(self, file_system):
        self.start(file_system)
        other = self.spawn(self.there)
        theirs = self.use(self.destination, self.there, other)
        uuid = self.spawn(self.here)
        mine = self.use(self.source, self.here, uuid)
        self.assertIn('backing file:', self.info(self.source, uuid))
        bases = self.bases(self.destination)
        own = self.bases(self.source)
        self.assertEqual(bases.keys(), own.keys())
        self.assertNotEqual(bases, own)

        self.migrate(uuid, self.here, self.there)
        self.assert_whole(self.destination, uuid, file_system, mine)
        self.assertNotIn('backing file:', self.info(self.destination, uuid))
        # The disk that stands on the other base image still does.
        self.assertEqual(bases, self.bases(self.destination))
        self.assert_whole(self.destination, other, file_system, theirs)
        self.assertEqual([], list(self.destination.path(
            f'/var/lib/nova/instances/{uuid}').glob('base_*')))

        self.there.call('destroy', uuid=uuid)
        self.assertEqual('running', self.here.call(
            'finish_revert', uuid=uuid))
        self.assertIn('backing file:', self.info(self.source, uuid))
        self.assert_whole(self.source, uuid, file_system, mine)

        self.migrate(uuid, self.here, self.there)
        self.here.call('confirm', uuid=uuid)
        self.migrate(uuid, self.there, self.here)
        self.there.call('confirm', uuid=uuid)
        self.assert_whole(self.source, uuid, file_system, mine)
        self.assertEqual(own, self.bases(self.source))

        # The other way round: a disk that has a base image still.
        self.migrate(other, self.there, self.here)
        self.assert_whole(self.source, other, file_system, theirs)


@ddt.ddt
class OwnBaseTestCase(OwnBaseMixin, base.LiveTestCase):
    """The disks are in a storage pool."""

    @ddt.data('xfs', 'btrfs', 'ext4')
    def test_disk_is_whole_there_and_back_and_reverted(self, file_system):
        self.go_there_and_back(file_system)


class OwnBaseInDirectoryTestCase(OwnBaseMixin, base.LiveTestCase):
    """The disks are in the instance directory."""

    IN_POOL = False

    def test_disk_is_whole_there_and_back_and_reverted(self):
        self.go_there_and_back('xfs')
