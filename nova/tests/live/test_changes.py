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
"""Changes are found on real file systems, and sent to a real daemon."""

import contextlib
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

import fixtures
from oslo_utils import units
from oslo_utils import uuidutils
import testtools

from nova.tests import changing_disk
from nova.tests.live import base
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import stream

MAKE = {
    'ext4': ('mkfs.ext4', '-q'),
    'xfs': ('mkfs.xfs', '-q'),
    'btrfs': ('mkfs.btrfs', '-q'),
}

# A process that has a clone, until it is killed.
FOLLOWER = """
import sys, time
from nova.virt.libvirt.storage import changes
tracked = changes.Clone(*sys.argv[1:])
print(tracked.kind, flush=True)
time.sleep(600)
"""


class FileSystem(fixtures.Fixture):
    """A new file system, in a file, that is mounted.

    :ivar path: where it is mounted
    """

    def __init__(self, kind, options='', size=4 * units.Gi):
        self._kind = kind
        self._options = options
        self._size = size

    def _setUp(self):
        descriptor, image = tempfile.mkstemp(dir='/var/tmp')
        self.addCleanup(os.unlink, image)
        os.truncate(descriptor, self._size)
        os.close(descriptor)
        self.path = tempfile.mkdtemp(dir='/var/tmp')
        self.addCleanup(os.rmdir, self.path)
        self._run(*MAKE[self._kind], image)
        self._run('mount', '-o', f'loop,{self._options}'.rstrip(','),
                  image, self.path)
        self.addCleanup(self._run, 'umount', self.path)

    @staticmethod
    def _run(*command):
        subprocess.run(command, check=True, capture_output=True)

    @property
    def available(self):
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize


class DirectWriter:
    """Writes blocks to a disk past the page cache, as fast as it goes.

    As QEMU does with cache mode "none".
    """

    def __init__(self, path, seed, most=64 * units.Ki):
        self._path = path
        self._random = random.Random(seed)
        self._most = most
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.written = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._stop.set()
        self._thread.join()

    def _run(self):
        disk = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        blocks = os.path.getsize(self._path) // self._most
        with mmap.mmap(-1, self._most) as data:
            while not self._stop.is_set():
                data[:8] = data[-8:] = self._random.randbytes(8)
                size = self._random.choice([4096, self._most])
                os.pwrite(disk, memoryview(data)[:size],
                          self._random.randrange(blocks) * self._most)
                self.written += 1
        os.close(disk)


class _FileSystemTestCase(testtools.TestCase):

    KIND = ''
    OPTIONS = ''

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('mounting needs root')
        self.file_system = self.useFixture(
            FileSystem(self.KIND, self.OPTIONS))
        self.directory = self.file_system.path


class DirectWritesTests:
    """Nothing that is read once the guest is off is older than its writes."""

    def read_directly(self, path):
        """Read a disk without the page cache."""
        disk = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, os.path.getsize(path)) as data:
            os.preadv(disk, [data], 0)
            os.close(disk)
            return data[:]

    def test_direct_writes_at_any_time_arrive(self):
        path = self.open_disk(os.urandom(32 * units.Mi))
        for seed in range(4):
            tracked = self.follow(path)
            with contextlib.ExitStack() as stack:
                writers = [stack.enter_context(DirectWriter(path, number))
                           for number in (seed, seed + 100)]
                copy = changing_disk.Copy(tracked)
                for _ in range(5):
                    copy.send()
                written = sum(writer.written for writer in writers)
            copy.send(last=True)
            tracked.close()
            self.assertGreater(written, 100)
            self.assertTrue(
                self.read_directly(path) == copy.data, f'seed {seed}')


class HashesTests(DirectWritesTests, changing_disk.EngineTests):
    SEEDS = 10

    def follow(self, path, skip=0):
        tracked = changes.Hashes(path, skip)
        self.addCleanup(tracked.close)
        return tracked


class Ext4HashesTestCase(HashesTests, _FileSystemTestCase):
    KIND = 'ext4'

    def test_there_are_no_reflinks(self):
        tracked = changes.track(self.open_disk(b'data'), self.directory)
        self.addCleanup(tracked.close)
        self.assertEqual('hashes', tracked.kind)


class XfsHashesTestCase(HashesTests, _FileSystemTestCase):
    KIND = 'xfs'


class BtrfsHashesTestCase(HashesTests, _FileSystemTestCase):
    KIND = 'btrfs'


class CloneTests(DirectWritesTests, changing_disk.EngineTests):

    def follow(self, path, skip=0):
        # An empty disk has no extents, of which the clone could be seen.
        tracked = (changes.Clone if os.path.getsize(path) else
                   changes.track)(path, self.directory, skip)
        self.addCleanup(tracked.close)
        return tracked

    def test_it_is_chosen(self):
        tracked = changes.track(self.open_disk(b'data' * 4096),
                                self.directory)
        self.addCleanup(tracked.close)
        self.assertEqual('clone', tracked.kind)

    def test_blocks_that_were_written_and_no_others(self):
        size = 256 * units.Mi
        path = self.open_disk(os.urandom(size))
        tracked = self.follow(path)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes.MERGE_BYTES', 1))
        noise = random.Random(7)
        written = set()
        with open(path, 'r+b') as disk:
            for _ in range(500):
                block = noise.randrange(size // 4096)
                disk.seek(block * 4096)
                disk.write(os.urandom(4096))
                written.add(block)
        ranges = tracked.look(last=True)
        self.assertEqual(written, {
            block for start, end in ranges
            for block in range(start // 4096, end // 4096)})

    def test_preallocated_disk(self):
        path = self.open_disk(b'')
        with open(path, 'r+b') as disk:
            os.posix_fallocate(disk.fileno(), 0, 64 * changing_disk.BLOCK)
            disk.write(b'some')
        tracked = self.follow(path)
        copy = changing_disk.Copy(tracked)
        with open(path, 'r+b') as disk:
            disk.seek(20 * changing_disk.BLOCK)
            disk.write(b'more')
        copy.send(last=True)
        self._assert_same(path, copy)

    def test_a_clone_has_no_name(self):
        path = self.open_disk(os.urandom(units.Mi))
        tracked = self.follow(path)
        tracked.look()
        self.assertIn('disk', os.listdir(self.directory))
        self.assertEqual([], [
            name for name in os.listdir(self.directory)
            if name not in ('disk', 'lost+found')])
        tracked.close()

    def _fill(self, path, size):
        with open(path, 'r+b') as disk:
            for _ in range(size // units.Mi):
                disk.write(os.urandom(units.Mi))
            os.fsync(disk.fileno())

    def _wait_for_room(self, room):
        for _ in range(100):
            os.sync()
            if self.file_system.available >= room:
                return
            time.sleep(0.1)
        self.fail('the clone still takes room')

    def test_room_of_a_clone_is_given_back(self):
        size = 64 * units.Mi
        path = self.open_disk()
        self._fill(path, size)
        before = self.file_system.available
        tracked = self.follow(path)
        self._fill(path, size)
        os.sync()
        self.assertLess(self.file_system.available, before - size // 2)
        tracked.close()
        self._wait_for_room(before - 4 * units.Mi)

    def test_room_is_given_back_when_the_process_is_killed(self):
        size = 64 * units.Mi
        path = self.open_disk()
        self._fill(path, size)
        before = self.file_system.available
        follower = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', FOLLOWER, path,
             self.directory], stdout=subprocess.PIPE, text=True, cwd='/')
        self.addCleanup(follower.stdout.close)
        self.addCleanup(follower.kill)
        self.assertEqual('clone\n', follower.stdout.readline())
        self._fill(path, size)
        follower.kill()
        follower.wait()
        self._wait_for_room(before - 4 * units.Mi)

    def test_too_little_room(self):
        path = self.open_disk(os.urandom(units.Mi))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes.RESERVED_BYTES',
            self.file_system.available - units.Mi // 2))
        tracked = changes.track(path, self.directory)
        self.addCleanup(tracked.close)
        self.assertEqual('hashes', tracked.kind)

    def test_too_little_room_for_another_clone(self):
        path = self.open_disk(os.urandom(units.Mi))
        copy = changing_disk.Copy(self.follow(path))
        with open(path, 'r+b') as disk:
            disk.write(b'changed')
        with mock.patch.object(changes, 'RESERVED_BYTES', units.Ei):
            self.assertEqual(0, copy.send().total)
        self.assertGreater(copy.send(last=True).total, 0)
        self._assert_same(path, copy)

    def test_disk_of_too_many_extents(self):
        path = self.open_disk()
        with open(path, 'r+b') as disk:
            for number in range(10):
                disk.seek(number * 2 * changing_disk.BLOCK)
                disk.write(os.urandom(changing_disk.BLOCK))
        with mock.patch.object(changes, 'MOST_EXTENTS', 9):
            tracked = changes.track(path, self.directory)
        self.addCleanup(tracked.close)
        self.assertEqual('hashes', tracked.kind)

    def test_directory_of_another_file_system(self):
        path = self.open_disk(os.urandom(units.Mi))
        tracked = changes.track(path, '/var/tmp')
        self.addCleanup(tracked.close)
        self.assertEqual('hashes', tracked.kind)

    def test_more_extents_than_one_call_tells(self):
        count = 2 * changes._FIEMAP_BATCH + 7
        path = self.open_disk()
        with open(path, 'r+b') as disk:
            for number in range(count):
                disk.seek(number * 8192)
                disk.write(os.urandom(4096))
        file = changes._File(path)
        self.addCleanup(file.close)
        # Those that are preallocated are counted, too.
        self.assertGreaterEqual(file.count_extents(), count)
        self.assertEqual(
            [(number * 8192, number * 8192 + 4096)
             for number in range(count)],
            [(extent.start, extent.end) for extent in file.extents()])


class XfsCloneTestCase(CloneTests, _FileSystemTestCase):
    KIND = 'xfs'


class BtrfsCloneTestCase(CloneTests, _FileSystemTestCase):
    KIND = 'btrfs'


class BtrfsCompressedCloneTestCase(
        DirectWritesTests, changing_disk.EngineTests, _FileSystemTestCase):
    """Compressed extents are shared in parts."""
    KIND = 'btrfs'
    OPTIONS = 'compress-force=zstd'

    follow = CloneTests.follow

    def test_part_of_a_compressed_extent(self):
        path = self.open_disk(b'compressible' * 100_000)
        copy = changing_disk.Copy(self.follow(path))
        with open(path, 'r+b') as disk:
            disk.seek(8192)
            disk.write(b'x' * 4096)
        copy.send(last=True)
        self._assert_same(path, copy)


class BtrfsNoCowCloneTestCase(
        DirectWritesTests, changing_disk.EngineTests, _FileSystemTestCase):
    """Files that are overwritten in place, but for what a clone has."""
    KIND = 'btrfs'
    OPTIONS = 'nodatacow'

    follow = CloneTests.follow


class SendTests:
    """What was found is sent to a libvirt daemon of another host."""

    def setUp(self):
        super().setUp()
        self.pool_name = 'test-' + uuidutils.generate_uuid()
        self.make_pool(self.destination, self.pool_name)
        self.pool = self.connect(
            self.destination).storagePoolLookupByName(self.pool_name)
        self.addCleanup(delattr, self, 'pool')
        self.copied = self.destination.path(
            f'/var/lib/nova/{self.pool_name}/disk')
        self.disk = os.path.join(
            self.useFixture(FileSystem(self.KIND)).path, 'disk')

    def _make_volume(self, length):
        return self.pool.createXML(
            f"""<volume><name>disk</name><capacity>{length}</capacity>
            <allocation>0</allocation>
            <target><format type='raw'/></target></volume>""")

    def _make_disk(self, data):
        with open(self.disk, 'wb') as disk:
            disk.write(data)

    def _track(self):
        directory = os.path.dirname(self.disk)
        tracked = changes.track(self.disk, directory)
        self.addCleanup(tracked.close)
        self.assertEqual(self.ENGINE, tracked.kind)
        return tracked

    def _follow(self, act, passes):
        """Copy a disk, with a guest that acts in each pass."""
        tracked = self._track()
        self.volume = self._make_volume(tracked.length)
        stream.copy(tracked.source(), stream.VolumeSink(self.volume),
                    tracked.length)
        for _ in range(passes):
            act()
            self._send(tracked)
        act()
        return self._send(tracked, last=True)

    def _send(self, tracked, last=False):
        length = tracked.length
        ranges = tracked.look(last)
        return changes.send(tracked, ranges, self.volume, length)

    def test_scattered_writes(self):
        size = 256 * units.Mi
        self._make_disk(os.urandom(size))
        noise = random.Random(3)

        def act():
            with open(self.disk, 'r+b') as disk:
                for _ in range(100):
                    disk.seek(noise.randrange(size))
                    disk.write(noise.randbytes(4096))

        result = self._follow(act, passes=2)
        self.assertEqual(self.sha256(self.disk), self.sha256(self.copied))
        self.assertLess(result.wire, size // 4)

    def test_any_writes_at_any_time(self):
        for seed in range(8):
            self._make_disk(os.urandom(9 * changing_disk.BLOCK))
            # A volume of no length cannot be made.
            guest = changing_disk.Guest(
                self.disk, seed, most=200 * changing_disk.BLOCK)

            def act():
                for _ in range(3):
                    guest.act()
                with open(self.disk, 'r+b') as disk:
                    disk.write(b'x')

            with self.subTest(seed=seed):
                self._follow(act, passes=3)
                self.assertEqual(
                    self.sha256(self.disk), self.sha256(self.copied))
                self.volume.delete()

    def test_an_image_that_grows_and_shrinks(self):
        # A pool's refresh knows the volume as qcow2 then, and its capacity is
        # that of the disk within.
        create = ['qemu-img', 'create', '-q', '-f', 'qcow2', self.disk, '1G']
        subprocess.run(create, check=True)
        writes = iter(['512k 5M', '900M 88k'])

        def act():
            subprocess.run(
                ['qemu-io', '-f', 'qcow2', '-c', f'write {next(writes)}',
                 self.disk], check=True, capture_output=True)

        self._follow(act, passes=1)
        self.assertEqual(self.sha256(self.disk), self.sha256(self.copied))
        size = os.path.getsize(self.disk)
        tracked = self._track()
        stream.copy(tracked.source(), stream.VolumeSink(
            self.volume, sparse=False), tracked.length)
        os.truncate(self.disk, size - 100_000)
        self._send(tracked, last=True)
        self.assertEqual(self.sha256(self.disk), self.sha256(self.copied))

    def test_no_upload_is_refused_while_volumes_come_and_go(self):
        size = 512 * units.Mi
        self._make_disk(b'')
        os.truncate(self.disk, size)
        with open(self.disk, 'r+b') as disk:
            disk.write(os.urandom(units.Mi))
        stop = threading.Event()
        made = []

        def act():
            with open(self.disk, 'r+b') as disk:
                for number in range(1000):
                    disk.seek(number * size // 1000)
                    disk.write(os.urandom(100))
            thread.start()

        def come_and_go():
            pool = self.connect(
                self.destination).storagePoolLookupByName(self.pool_name)
            while not stop.is_set():
                # It may be refused itself.
                with contextlib.suppress(base.libvirt.libvirtError):
                    pool.createXML(
                        """<volume><name>other</name>
                        <capacity>8388608</capacity>
                        <allocation>8388608</allocation>
                        <target><format type='raw'/></target></volume>"""
                    ).delete()
                    made.append(1)

        thread = threading.Thread(target=come_and_go)
        try:
            self._follow(act, passes=0)
        finally:
            stop.set()
            thread.join()
        self.assertEqual(self.sha256(self.disk), self.sha256(self.copied))
        self.assertGreater(len(made), 10)

    def test_cancel(self):
        self._make_disk(os.urandom(8 * units.Mi))
        tracked = self._track()
        self.volume = self._make_volume(tracked.length)
        cancel = threading.Event()
        cancel.set()
        self._make_disk(os.urandom(16 * units.Mi))
        length = tracked.length
        ranges = tracked.look(last=True)
        self.assertRaises(
            errors.Cancelled, changes.send, tracked, ranges, self.volume,
            length, cancel)


class HashesSendTestCase(SendTests, base.LiveTestCase):
    KIND = 'ext4'
    ENGINE = 'hashes'


class CloneSendTestCase(SendTests, base.LiveTestCase):
    KIND = 'xfs'
    ENGINE = 'clone'
