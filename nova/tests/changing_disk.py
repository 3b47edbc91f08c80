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

"""A disk whose guest writes to it while it is copied."""

import ctypes
import errno
import hashlib
import os
import random
import threading
from unittest import mock

import fixtures

from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import stream

BLOCK = changes.BLOCK_BYTES

_FALLOC_FL_PUNCH_HOLE = 2
_FALLOC_FL_KEEP_SIZE = 1


def punch(file, start, length):
    """Make a hole in an open file."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(
            file.fileno(), _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
            ctypes.c_int64(start), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), 'fallocate')


class Copy:
    """The disk of a destination host after the passes of a copy."""

    def __init__(self, tracked):
        self.tracked = tracked
        self.data = bytearray()
        self.read = 0
        self._write([(tracked.skip, tracked.length)], tracked.source())

    def send(self, last=False, between=lambda: None):
        """Look what has changed, and copy that.

        :param between: called as the copy runs
        """
        ranges = self.tracked.look(last)
        del self.data[self.tracked.length:]
        self.data.extend(bytes(self.tracked.length - len(self.data)))
        self._write(ranges, self.tracked.source(ranges), between)
        return ranges

    def _write(self, ranges, source, between=lambda: None):
        self.data.extend(bytes(self.tracked.length - len(self.data)))
        ranges = [(start, end) for start, end in ranges if start < end]
        total = sum(end - start for start, end in ranges)
        position, end = 0, 0
        for chunk in source.chunks(total):
            data = bytes(chunk) if isinstance(chunk, int) else chunk
            if not isinstance(chunk, int):
                self.read += len(data)
            while data:
                if position == end:
                    position, end = ranges.pop(0)
                part = data[:end - position]
                self.data[position:position + len(part)] = part
                position += len(part)
                data = data[len(part):]
            between()


class Guest:
    """Writes to a disk at random places, in all the ways that there are."""

    def __init__(self, path, seed, most=24 * BLOCK):
        self._path = path
        self._random = random.Random(seed)
        self._most = most

    def act(self):
        size = os.path.getsize(self._path)
        with open(self._path, 'r+b') as disk:
            self._random.choices(
                [self._write, self._zero, self._punch, self._grow,
                 self._shrink], [8, 1, 2, 1, 1])[0](disk, size)

    def _place(self, size):
        start = self._random.randrange(size + 1)
        length = self._random.choice([1, 511, 4096, BLOCK, 5 * BLOCK])
        return start, min(length, self._most - start)

    def _write(self, disk, size):
        start, length = self._place(size)
        disk.seek(start)
        disk.write(self._random.randbytes(length))

    def _zero(self, disk, size):
        start, length = self._place(size)
        disk.seek(start)
        disk.write(bytes(length))

    def _punch(self, disk, size):
        start, length = self._place(size)
        if start < size and length > 0:
            punch(disk, start, length)

    def _grow(self, disk, size):
        disk.truncate(self._random.randint(size, self._most))

    def _shrink(self, disk, size):
        disk.truncate(self._random.randint(size // 2, size))


class Reflinks(fixtures.Fixture):
    """Reflinks on any file system: clones are copies.

    :ivar available: bytes that all file systems have left
    :ivar shared: whether the file systems tell which extents are shared
    :ivar cloning: called before a clone is made; may raise
    """

    def __init__(self, available=2 ** 60):
        self.available = available
        self.shared = True
        self.cloning = lambda: None
        self._made = set()

    def _setUp(self):
        for name, value in (
                ('fcntl.ioctl', self._ioctl), ('os.statvfs', self._statvfs),
                ('_File.count_extents', lambda file: 1),
                ('_File.extents', self._extents)):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.changes.' + name, value))

    @staticmethod
    def costs():
        """The bytes that each clone may take."""
        return sorted(cost for _place, cost in changes._costs.values())

    def clones(self):
        """Number of clones that are open."""
        found = 0
        for name in os.listdir('/proc/self/fd'):
            try:
                status = os.stat('/proc/self/fd/' + name)
            except FileNotFoundError:
                continue
            found += (status.st_dev, status.st_ino) in self._made
        return found

    def _ioctl(self, descriptor, request, argument):
        if request != changes._FICLONE:
            raise OSError(errno.ENOTTY, 'not btrfs')
        status = os.fstat(descriptor)
        self._made.add((status.st_dev, status.st_ino))
        self.cloning()
        length = os.fstat(argument).st_size
        os.pwrite(descriptor, os.pread(argument, length, 0), 0)

    def _statvfs(self, _path):
        return mock.Mock(f_bavail=self.available, f_frsize=1)

    def _extents(self, file):
        data = os.pread(file.descriptor, file.length, 0)
        yield changes.Extent(
            0, len(data), hashlib.sha256(data).digest(), self.shared)


class EngineTests:
    """Tests of what holds however changes are found.

    :ivar directory: of the disks
    """

    SEEDS = 40

    def open_disk(self, data=b''):
        """Make a disk."""
        path = os.path.join(self.directory, 'disk')
        with open(path, 'wb') as disk:
            disk.write(data)
        return path

    def follow(self, path, skip=0):
        """Track the disk with the engine under test."""
        raise NotImplementedError

    def _assert_same(self, path, copy):
        with open(path, 'rb') as disk:
            self.assertEqual(disk.read(), bytes(copy.data))

    def test_nothing_changed(self):
        path = self.open_disk(os.urandom(3 * BLOCK + 1))
        copy = Copy(self.follow(path))
        self.assertEqual([], list(copy.send(last=True)))
        self._assert_same(path, copy)

    def test_what_was_found_and_not_sent_is_found_again(self):
        path = self.open_disk(os.urandom(20 * BLOCK))
        tracked = self.follow(path)
        copy = Copy(tracked)
        for number in range(3):
            with open(path, 'r+b') as disk:
                disk.seek(number * 8 * BLOCK)
                disk.write(b'changed')
                disk.truncate((20 - number) * BLOCK)
            self.assertEqual(number + 1, len(tracked.look()))
        copy.send(last=True)
        self._assert_same(path, copy)

    def test_the_start_is_left_out(self):
        skip = BLOCK
        path = self.open_disk(os.urandom(20 * BLOCK + 5))
        guest = Guest(path, 0)
        copy = Copy(self.follow(path, skip))
        for _ in range(4):
            guest.act()
            with open(path, 'r+b') as disk:
                disk.write(os.urandom(BLOCK + 64))
            ranges = copy.send()
            self.assertEqual(skip, next(iter(ranges))[0])
        copy.send(last=True)
        with open(path, 'rb') as disk:
            self.assertEqual(disk.read()[skip:], bytes(copy.data[skip:]))
        self.assertEqual(bytes(skip), bytes(copy.data[:skip]))

    def test_a_file_shorter_than_the_start_that_is_left_out(self):
        path = self.open_disk(os.urandom(BLOCK - 7))
        copy = Copy(self.follow(path, BLOCK))
        self.assertEqual([], list(copy.send()))
        with open(path, 'r+b') as disk:
            disk.truncate(BLOCK + 9)
            disk.seek(BLOCK)
            disk.write(b'x')
        copy.send(last=True)
        self.assertEqual(b'x' + bytes(8), bytes(copy.data[BLOCK:]))

    def test_cancel(self):
        tracked = self.follow(self.open_disk(os.urandom(BLOCK)))
        Copy(tracked)
        cancel = threading.Event()
        cancel.set()
        self.assertRaises(errors.Cancelled, tracked.look, cancel=cancel)

    def test_any_writes_at_any_time_arrive(self):
        for seed in range(self.SEEDS):
            with self.subTest(seed=seed):
                noise = random.Random(seed)
                path = self.open_disk(
                    noise.randbytes(noise.randrange(16 * BLOCK)))
                guest = Guest(path, seed)
                tracked = self.follow(path)
                copy = Copy(tracked)
                for _ in range(noise.randrange(4)):
                    for _ in range(noise.randrange(6)):
                        guest.act()
                    copy.send(between=guest.act)
                for _ in range(noise.randrange(6)):
                    guest.act()
                copy.send(last=True)
                self._assert_same(path, copy)
                tracked.close()

    def test_first_pass_of_a_busy_disk(self):
        path = self.open_disk(os.urandom(20 * BLOCK))
        guest = Guest(path, 0)
        tracked = self.follow(path)
        with mock.patch.object(stream, 'MESSAGE_BYTES', BLOCK):
            source = tracked.source()

            class Busy:
                skip = 0
                length = tracked.length

                def source(self):
                    return self

                def chunks(self, length):
                    for chunk in source.chunks(length):
                        guest.act()
                        yield chunk

            copy = Copy(Busy())
        copy.tracked = tracked
        copy.send(last=True)
        self._assert_same(path, copy)

    def test_errors_of_writing_back_are_told(self):
        # The kernel tells fsync() of pages that it could not drop.
        path = self.open_disk(os.urandom(BLOCK))
        tracked = self.follow(path)
        Copy(tracked)
        with mock.patch('os.fsync', side_effect=OSError(errno.EIO, 'stale')):
            error = self.assertRaises(
                errors.CopyError, tracked.look, last=True)
        self.assertEqual('source', error.end)

    def test_only_that_many_bytes_can_be_read(self):
        tracked = self.follow(self.open_disk(os.urandom(BLOCK)))
        self.assertRaises(
            ValueError, list, tracked.source().chunks(BLOCK + 1))
