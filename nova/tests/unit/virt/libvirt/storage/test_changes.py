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

import errno
import os
import tracemalloc
from unittest import mock

import ddt
import fixtures
from oslo_utils import units

from nova import test
from nova.tests import changing_disk
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import threads

BLOCK = changing_disk.BLOCK


@ddt.ddt
class HashesTestCase(changing_disk.EngineTests, test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(fixtures.TempDir()).path

    def follow(self, path, skip=0):
        tracked = changes.Hashes(path, skip)
        self.addCleanup(tracked.close)
        return tracked

    def draw(self, picture):
        """Write a disk: a character for a block, '-' for a hole."""
        path = os.path.join(self.directory, 'disk')
        with open(path, 'r+b' if os.path.exists(path) else 'wb') as disk:
            disk.truncate(len(picture) * BLOCK)
            for number, letter in enumerate(picture):
                disk.seek(number * BLOCK)
                if letter == '-':
                    changing_disk.punch(disk, number * BLOCK, BLOCK)
                elif letter == '0':
                    disk.write(bytes(BLOCK))
                else:
                    disk.write(letter.encode() * BLOCK)
        return path

    def _changes(self, before, after):
        path = self.draw(before)
        copy = changing_disk.Copy(self.follow(path))
        self.draw(after)
        ranges = copy.send(last=True)
        self._assert_same(path, copy)
        return ''.join(
            'x' if any(start <= at < end for start, end in ranges) else '.'
            for at in range(0, len(copy.data), BLOCK))

    @ddt.data(
        ('ABC', 'ABC', '...'),
        ('ABC', 'AXC', '.x.'),
        ('ABC', 'XBX', 'xxx'),  # merged
        ('A------B', 'X------Y', 'x......x'),
        ('ABC', 'A-C', '.x.'),
        ('ABC', 'A0C', '.x.'),
        ('A-C', 'AXC', '.x.'),
        ('A-C', 'A0C', '...'),
        ('A0C', 'A-C', '...'),
        ('ABC', 'ABCD', '...x'),
        ('ABC', 'ABC-', '....'),
        ('ABC', 'ABC------D', '.........x'),
        ('ABC', 'AB', '..'),
        ('ABC', 'X', 'x'),
        ('---', '---', '...'),
        ('---', '', ''),
        ('', 'A', 'x'),
    )
    @ddt.unpack
    def test_changed_blocks(self, before, after, changed):
        self.assertEqual(changed, self._changes(before, after))

    def test_a_file_that_was_cut_off_and_grew_again_has_zeros(self):
        path = self.draw('ABCD')
        copy = changing_disk.Copy(self.follow(path))
        self.draw('A')
        copy.send()
        self.draw('A---')
        copy.send(last=True)
        self._assert_same(path, copy)

    def test_a_file_that_is_cut_off_while_it_is_read(self):
        path = self.open_disk(os.urandom(4 * BLOCK))
        tracked = self.follow(path)
        os.truncate(path, BLOCK + 1)
        copy = changing_disk.Copy(tracked)
        copy.send(last=True)
        self._assert_same(path, copy)

    def test_only_what_changed_is_read_for_a_pass(self):
        path = self.open_disk(os.urandom(32 * BLOCK))
        copy = changing_disk.Copy(self.follow(path))
        copy.read = 0
        with open(path, 'r+b') as disk:
            disk.seek(20 * BLOCK + 17)
            disk.write(b'changed')
        ranges = copy.send()
        self.assertEqual([(20 * BLOCK, 21 * BLOCK)], list(ranges))
        self.assertEqual(BLOCK, ranges.total)
        self.assertEqual(BLOCK, copy.read)

    def test_what_a_pass_sent_is_not_sent_again(self):
        path = self.draw('ABC')
        copy = changing_disk.Copy(self.follow(path))
        self.draw('XBC')
        self.assertEqual(1, len(copy.send()))
        self.assertEqual(0, len(copy.send()))

    def test_without_blake3(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes.blake3', None))
        self.assertEqual('.x.', self._changes('ABC', 'AXC'))

    def test_hashes_are_keyed(self):
        first, second = changes._new_hash(), changes._new_hash()
        self.assertNotEqual(first(b'a' * BLOCK), second(b'a' * BLOCK))
        self.assertEqual(changes.DIGEST_BYTES, len(first(b'a')))

    def test_a_file_that_grew_beyond_the_table(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes.TABLE_BYTES',
            2 * changes.DIGEST_BYTES))
        path = self.draw('AB')
        copy = changing_disk.Copy(self.follow(path))
        self.draw('ABCD')
        self.assertEqual([(2 * BLOCK, 4 * BLOCK)], list(copy.send()))
        # These are not recorded, and so are sent in each pass.
        self.assertEqual([(2 * BLOCK, 4 * BLOCK)], list(copy.send()))
        self.draw('AB--')
        copy.send(last=True)
        self._assert_same(path, copy)

    def _sparse(self, size, extents=()):
        path = self.open_disk()
        with open(path, 'r+b') as disk:
            disk.truncate(size)
            for start, data in extents:
                disk.seek(start)
                disk.write(data)
        return path

    def test_a_sparse_disk_of_a_tebibyte_takes_next_to_nothing(self):
        path = self._sparse(units.Ti, [
            (number * 16 * units.Gi + 4096, os.urandom(4096))
            for number in range(64)])
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        tracked = self.follow(path)
        read = sum(
            len(chunk) for chunk in tracked.source().chunks(units.Ti)
            if not isinstance(chunk, int))
        with open(path, 'r+b') as disk:
            disk.seek(units.Ti // 2 + 1)
            disk.write(b'changed')
        ranges = tracked.look(last=True)
        self.assertEqual(tracked._table.block, ranges.total)
        self.assertEqual(64 * 4096, read)
        self.assertLess(tracemalloc.get_traced_memory()[1], 6 * units.Mi)

    def test_a_full_disk_of_a_tebibyte_takes_less_than_64_mib(self):
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        table = changes._Table(units.Ti)
        data = os.urandom(table.block)
        for block in range(0, units.Ti // table.block, table.SEGMENT):
            table.record(block, 1, data)
        self.assertLess(tracemalloc.get_traced_memory()[1], 64 * units.Mi)

    @ddt.data(
        (1, 64), (32 * units.Gi, 64), (80 * units.Gi, 64),
        (128 * units.Gi, 128), (units.Ti, 256), (16 * units.Ti, 256))
    @ddt.unpack
    def test_larger_disks_have_larger_blocks(self, size, block):
        table = changes._Table(size)
        self.assertEqual(block * units.Ki, table.block)
        room = -(-size // table.block) * changes.DIGEST_BYTES
        self.assertLessEqual(
            room, max(16 * units.Mi, 48 * units.Mi * size // units.Ti))


class SectionsTestCase(HashesTestCase):
    """A disk is read again in many sections, as a large one is."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes.SECTION_BYTES', BLOCK))

    def _patch_chunks(self, chunks):
        """Let something else yield the sections of a disk."""
        read = changes._File.chunks
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes._File.chunks',
            lambda file, start, end: chunks(read(file, start, end), start)))

    def _follow_copied(self, blocks=16):
        """Track a disk that was copied."""
        tracked = self.follow(self.open_disk(os.urandom(blocks * BLOCK)))
        changing_disk.Copy(tracked)
        return tracked

    def test_the_last_look_reads_sections_at_once(self):
        barrier = threads.native_threading().Barrier(
            changes.LAST_READERS, timeout=60)

        def meet(chunks, start):
            barrier.wait()
            yield from chunks

        tracked = self._follow_copied(2 * changes.LAST_READERS)
        self._patch_chunks(meet)
        self.assertEqual([], list(tracked.look(last=True)))

    def test_one_section_at_a_time_while_the_guest_runs(self):
        readers = set()

        def note(chunks, start):
            readers.add(threads.native_threading().get_ident())
            yield from chunks

        tracked = self._follow_copied()
        self._patch_chunks(note)
        tracked.look()
        self.assertEqual(1, len(readers))

    def test_there_are_never_many_sections(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes.MOST_SECTIONS', 4))
        starts = []

        def note(chunks, start):
            starts.append(start)
            yield from chunks

        tracked = self._follow_copied(20)
        self._patch_chunks(note)
        tracked.look()
        self.assertEqual([0, 5 * BLOCK, 10 * BLOCK, 15 * BLOCK], starts)

    def test_an_error_of_one_section_is_that_of_the_look(self):
        def fail(chunks, start):
            if start == 7 * BLOCK:
                raise OSError(errno.EIO, 'Input/output error')
            yield from chunks

        tracked = self._follow_copied()
        self._patch_chunks(fail)
        error = self.assertRaises(
            errors.CopyError, tracked.look, last=True)
        self.assertIn(
            f'source failed after {7 * BLOCK} bytes: [Errno 5]', str(error))

    def _hang(self):
        """Let the disk hang when half of it has been read.

        :returns: set when it does
        """
        hangs, go_on = (
            threads.native_threading().Event() for _index in range(2))
        self.addCleanup(go_on.set)

        def hang(chunks, start):
            if start == 8 * BLOCK:
                hangs.set()
                go_on.wait(60)
            yield from chunks

        self._patch_chunks(hang)
        return hangs

    def test_a_disk_that_hangs(self):
        tracked = self._follow_copied()
        self._hang()
        error = self.assertRaises(
            errors.CopyError, tracked.look, last=True, stall_seconds=0.3)
        self.assertIn('nothing moved for 0.3 seconds', str(error))

    def test_cancel_a_look_that_hangs(self):
        tracked = self._follow_copied()
        self.assertRaises(
            errors.Cancelled, tracked.look, last=True, cancel=self._hang())


class TrackTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.directory, 'disk')
        with open(self.path, 'wb') as disk:
            disk.write(b'data')

    def test_hashes_where_no_clone_can_be_made(self):
        for number in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL,
                       errno.ENOTTY, errno.EACCES, errno.ENOSPC):
            with self.subTest(errno=number), mock.patch(
                    'fcntl.ioctl', side_effect=OSError(number, 'no')):
                tracked = changes.track(self.path, self.directory)
                self.assertEqual('hashes', tracked.kind)
                tracked.close()

    def test_hashes_without_room_for_a_clone(self):
        descriptors = os.listdir('/proc/self/fd')
        with mock.patch.object(changes, 'RESERVED_BYTES', 2 ** 60):
            tracked = changes.track(self.path, self.directory)
        self.assertEqual('hashes', tracked.kind)
        tracked.close()
        self.assertEqual(descriptors, os.listdir('/proc/self/fd'))

    def test_a_file_that_cannot_be_read(self):
        error = self.assertRaises(
            errors.CopyError, changes.track, self.path + '-lost',
            self.directory)
        self.assertEqual(
            'source failed after 0 bytes: [Errno 2] No such file or '
            "directory: 'the volume'", str(error))


@ddt.ddt
class RoomTestCase(test.NoDBTestCase):
    """There is room for all that the clones of this process may cost."""

    def setUp(self):
        super().setUp()
        self.reflinks = self.useFixture(changing_disk.Reflinks())
        self.disks = [self._make_disk() for _number in range(3)]
        # A file system may allocate a little more.
        self.size = os.stat(self.disks[0]).st_blocks * 512
        self.assertEqual([], self.reflinks.costs())
        self.descriptors = os.listdir('/proc/self/fd')

    def _make_disk(self):
        path = os.path.join(self.useFixture(fixtures.TempDir()).path, 'disk')
        with open(path, 'wb') as disk:
            disk.write(os.urandom(4 * BLOCK))
            os.fsync(disk.fileno())
        return path

    def _track(self, path, kind='clone', **kwargs):
        tracked = changes.track(path, os.path.dirname(path), **kwargs)
        self.addCleanup(tracked.close)
        self.assertEqual(kind, tracked.kind)
        return tracked

    def _leave_room(self, clones, missing=0):
        self.reflinks.available = (
            changes.RESERVED_BYTES + clones * self.size - missing)

    def _assert_all_closed(self):
        """Nothing is left of any clone, at once or soon."""
        self.assertTrue(libvirt_storage.wait_for(
            lambda: not (self.reflinks.costs() or self.reflinks.clones())),
            (self.reflinks.costs(), self.reflinks.clones()))
        self.assertEqual(self.descriptors, os.listdir('/proc/self/fd'))

    def test_room_for_one_clone_and_none_for_another(self):
        self._leave_room(2, missing=1)
        first = self._track(self.disks[0])
        second = self._track(self.disks[1], 'hashes')
        self.assertEqual([self.size], self.reflinks.costs())
        second.close()
        first.close()
        self._assert_all_closed()

    def test_room_for_two_clones(self):
        self._leave_room(2)
        for path in self.disks[:2]:
            self._track(path)
        self._track(self.disks[2], 'hashes')
        self.assertEqual(2 * [self.size], self.reflinks.costs())

    def test_room_is_free_again_after_close(self):
        self._leave_room(1)
        for path in self.disks:
            tracked = self._track(path)
            self._track(self.disks[0], 'hashes').close()
            tracked.close()
            tracked.close()
            self._assert_all_closed()

    def test_clones_that_are_made_at_the_same_moment(self):
        """A clone that is made during the check of room counts the other."""
        self._leave_room(2, missing=1)
        statvfs, kinds = changes.os.statvfs, []

        def track_another(path):
            if not kinds:
                kinds.append('')
                kinds[0] = self._track(self.disks[1], 'hashes').kind
            return statvfs(path)

        with mock.patch('os.statvfs', track_another):
            self._track(self.disks[0])
        self.assertEqual(['hashes'], kinds)
        self.assertEqual([self.size], self.reflinks.costs())

    def test_file_systems_are_independent(self):
        self._leave_room(1)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.changes._File.file_system',
            lambda file: self.disks.index(file.path) % 2))
        self._track(self.disks[0])
        self._track(self.disks[1])
        self._track(self.disks[2], 'hashes')

    def _file_system(self, path):
        file = changes._File(path)
        self.addCleanup(file.close)
        return file.file_system()

    def test_file_system_by_its_number(self):
        self.assertEqual(self._file_system(self.disks[0]),
                         self._file_system(self.disks[1]))
        self.assertNotEqual(self._file_system(self.disks[0]),
                            self._file_system('/proc/self/status'))

    @ddt.data((b'a', b'a'), (b'a', b'b'))
    def test_file_systems_of_btrfs_by_their_uuid(self, letters):
        """Their subvolumes have numbers of their own."""
        found = []
        for path, letter in zip(
                (self.disks[0], '/proc/self/status'), letters):
            def tell(_descriptor, request, info, letter=letter):
                self.assertEqual(0x8400941F, request)
                self.assertEqual(1024, len(info))
                info[:33] = bytes(16) + 16 * letter + b'x'

            with mock.patch('fcntl.ioctl', tell):
                found.append(self._file_system(path))
        self.assertEqual(letters, tuple(each[:1] for each in found))
        self.assertEqual(letters[0] == letters[1], found[0] == found[1])

    def test_next_clone_of_a_disk_takes_the_place_of_the_last(self):
        self._leave_room(1)
        tracked = self._track(self.disks[0])
        copy = changing_disk.Copy(tracked)
        for number in range(3):
            with open(self.disks[0], 'r+b') as disk:
                disk.write(b'change %d' % number)
            self.assertGreater(tracked.look().total, 0)
            self.assertGreater(copy.send().total, 0)
            self.assertEqual([self.size], self.reflinks.costs())
            self.assertEqual(1, self.reflinks.clones())
        tracked.look()
        self.assertEqual(2, self.reflinks.clones())
        tracked.close()
        self._assert_all_closed()

    def test_next_clone_counts_what_the_disk_has_then(self):
        tracked = self._track(self.disks[0])
        with open(self.disks[0], 'ab') as disk:
            disk.write(os.urandom(4 * BLOCK))
            os.fsync(disk.fileno())
        self._leave_room(2, missing=1)
        self.assertEqual(0, tracked.look().total)
        self._leave_room(2)
        self.assertGreater(tracked.look().total, 0)
        self.assertEqual([2 * self.size], self.reflinks.costs())

    def test_no_next_clone_where_the_room_is_for_other_disks(self):
        """The last look needs none."""
        tracked, other = (self._track(path) for path in self.disks[:2])
        copy = changing_disk.Copy(tracked)
        with open(self.disks[0], 'r+b') as disk:
            disk.write(b'changed')
        self._leave_room(2, missing=1)
        self.assertEqual(0, copy.send().total)
        self.assertEqual(2 * [self.size], self.reflinks.costs())
        self.assertGreater(copy.send(last=True).total, 0)
        tracked.close()
        self.assertEqual([self.size], self.reflinks.costs())
        other.close()
        self._assert_all_closed()

    def test_copy_does_not_depend_on_room(self):
        """Other files may take room, but not what a clone may cost."""
        tracked = self._track(self.disks[0])
        self.reflinks.available = 0
        with open(self.disks[0], 'rb') as disk:
            self.assertEqual(
                disk.read(),
                b''.join(tracked.source().chunks(4 * BLOCK)))

    def test_clone_that_fails(self):
        self.reflinks.cloning = mock.Mock(side_effect=OSError(
            errno.EOPNOTSUPP, 'no'))
        self._track(self.disks[0], 'hashes').close()
        self.reflinks.cloning.assert_called_once_with()
        self._assert_all_closed()

    def test_clone_without_shared_extents(self):
        self.reflinks.shared = False
        self._track(self.disks[0], 'hashes').close()
        self._assert_all_closed()

    def test_clone_that_cannot_be_opened(self):
        with mock.patch.object(changes, '_open_unnamed',
                               side_effect=OSError(errno.EMFILE, 'no')):
            self._track(self.disks[0], 'hashes').close()
        self._assert_all_closed()

    def test_next_clone_that_fails(self):
        tracked = self._track(self.disks[0])
        self.reflinks.cloning = mock.Mock(side_effect=OSError(
            errno.EIO, 'no'))
        self.assertEqual(0, tracked.look().total)
        self.assertEqual([self.size], self.reflinks.costs())
        self.assertEqual(1, self.reflinks.clones())
        tracked.close()
        self._assert_all_closed()

    def _hang(self):
        """Let the next clone hang.

        :returns: set when it does, and what lets it go on
        """
        hangs, go_on = (
            threads.native_threading().Event() for _index in range(2))
        self.addCleanup(go_on.set)

        def hang():
            hangs.set()
            go_on.wait(60)

        self.reflinks.cloning = hang
        return hangs, go_on

    def test_clone_that_comes_too_late(self):
        hangs, go_on = self._hang()
        self.assertRaises(errors.CopyError, self._track, self.disks[0],
                          stall_seconds=0.5)
        self.assertTrue(hangs.wait(60))
        # It may still be made.
        self.assertEqual([self.size], self.reflinks.costs())
        go_on.set()
        self._assert_all_closed()

    def test_next_clone_that_comes_after_close(self):
        tracked = self._track(self.disks[0])
        hangs, go_on = self._hang()
        self.assertRaises(
            errors.CopyError, tracked.look, stall_seconds=0.5)
        self.assertTrue(hangs.wait(60))
        tracked.close()
        self.assertEqual([], self.reflinks.costs())
        go_on.set()
        self._assert_all_closed()

    def test_close_while_the_next_clone_is_entered(self):
        tracked = self._track(self.disks[0])

        def close(file):
            allocated = os.fstat(file.descriptor).st_blocks * 512
            tracked.close()
            return allocated

        with mock.patch.object(changes._File, 'allocated', property(close)):
            self.assertRaises(ValueError, tracked.look)
        self._assert_all_closed()

    def test_close_that_fails_closes_the_rest(self):
        tracked = self._track(self.disks[0])
        close = changes._File.close

        def fail(file):
            close(file)
            raise OSError(errno.EIO, 'no')

        with mock.patch.object(changes._File, 'close', fail):
            self.assertRaises(OSError, tracked.close)
        self._assert_all_closed()

    def test_nothing_is_read_after_close(self):
        """Another file may have the number of its descriptor."""
        tracked = self._track(self.disks[0])
        chunks = tracked.source().chunks(4 * BLOCK)
        tracked.close()
        with open('/proc/self/status', 'rb'):
            self.assertRaises(ValueError, next, chunks)


class RangesTestCase(test.NoDBTestCase):

    def test_what_is_left(self):
        ranges = changes.Ranges()
        for start, end in (100, 400), (10 ** 6, 10 ** 6 + 50):
            ranges.add(start, end)
        for done, block, rest in (
                (0, 1, [(100, 400), (10 ** 6, 10 ** 6 + 50)]),
                (0, 64, [(100, 400), (10 ** 6, 10 ** 6 + 50)]),
                (130, 1, [(230, 400), (10 ** 6, 10 ** 6 + 50)]),
                (130, 64, [(228, 400), (10 ** 6, 10 ** 6 + 50)]),
                (300, 64, [(10 ** 6, 10 ** 6 + 50)]),
                (345, 1, [(10 ** 6 + 45, 10 ** 6 + 50)]),
                (345, 64, [(10 ** 6, 10 ** 6 + 50)]),
                (350, 64, [])):
            left = ranges.after(done, block)
            self.assertEqual(rest, list(left), (done, block))
            self.assertEqual(sum(end - start for start, end in rest),
                             left.total)

    def test_near_ranges_are_merged(self):
        ranges = changes.Ranges()
        far = changes.MERGE_BYTES
        for start, end in [(0, 1), (1, 2), (far, far + 1),
                           (2 * far + 1, 2 * far + 3)]:
            ranges.add(start, end)
        self.assertEqual(
            [(0, far + 1), (2 * far + 1, 2 * far + 3)], list(ranges))
        self.assertEqual(far + 3, ranges.total)
        self.assertEqual(2, len(ranges))

    def test_there_are_never_many(self):
        ranges = changes.Ranges(most=8)
        step = 2 * changes.MERGE_BYTES
        for number in range(1000):
            ranges.add(number * step, number * step + 1)
            self.assertLessEqual(len(ranges), 8)
        self.assertEqual(
            ranges.total, sum(end - start for start, end in ranges))
        for number in range(1000):
            self.assertTrue(any(
                start <= number * step < end for start, end in ranges))


@ddt.ddt
class PassesTestCase(test.NoDBTestCase):

    @ddt.data(
        # Rewritten faster than it is sent: once before the power off.
        ([1000, 1000], 1), ([1000, 501], 1),
        # Each pass takes a tenth of the time of the one before.
        ([10000, 1000, 100, 10], 3),
        ([1000, 500, 251], 2),
        ([1000, 0], 1), ([0, 0], 1), ([20, 9], 1),
        ([64000 >> n for n in range(20)], 11),
    )
    @ddt.unpack
    def test_passes(self, mebibytes, expected):
        """The first figure is what the first pass sent."""
        first, *more = [count * units.Mi for count in mebibytes]
        passes, done = changes.Passes(first), 1
        for changed in more:
            if not passes.another(changed):
                break
            done += 1
        self.assertEqual(expected, done)

    def test_their_number_is_bounded(self):
        passes = changes.Passes(2 ** 60)
        changed = 2 ** 59
        done = 1
        while passes.another(changed):
            changed //= 2
            done += 1
        self.assertEqual(changes.MOST_PASSES, done)


@ddt.ddt
class ExtentsTestCase(test.NoDBTestCase):

    @staticmethod
    def _draw(picture):
        """Extents of one character each: '-' is a hole, '?' is vague.

        A letter is the place on the disk: that of its upper case is shared.
        """
        for number, letter in enumerate(picture):
            if letter != '-':
                yield changes.Extent(
                    number, number + 1,
                    object() if letter == '?' else letter)

    @ddt.data(
        ('', '', ''), ('abc', 'abc', '...'), ('abc', 'axc', '.x.'),
        ('a-c', 'abc', '.x.'), ('abc', 'a-c', '.x.'), ('a?c', 'a?c', '.x.'),
        ('---', '---', '...'), ('abc', 'abcd', '...x'), ('abc', 'a', '.'),
        ('', 'a-b', 'x.x'), ('abc', '---', 'xxx'))
    @ddt.unpack
    def test_differing(self, old, new, expected):
        changed = ['.'] * len(new)
        for start, end in changes.differing(
                self._draw(old), self._draw(new), len(new)):
            changed[start:end] = 'x' * (end - start)
        self.assertEqual(expected, ''.join(changed))

    def test_extents_that_overlap_in_part(self):
        old = [changes.Extent(0, 100, 7), changes.Extent(150, 300, 9)]
        new = [changes.Extent(0, 50, 7), changes.Extent(50, 60, 8),
               changes.Extent(60, 100, 7), changes.Extent(120, 200, 9),
               changes.Extent(200, 400, 9)]
        self.assertEqual(
            [(50, 60), (120, 150), (300, 350)],
            list(changes.differing(old, new, 350)))

    def test_places(self):
        place = changes._place
        self.assertEqual(place(0, 4096, 10, 0), place(4096, 8192, 99, 0x2000))
        self.assertNotEqual(place(0, 4096, 10, 0), place(0, 8192, 10, 0))
        for vague in (0x2, 0x4, 0x100, 0x200, 0x400):
            self.assertNotEqual(
                place(0, 4096, 10, vague), place(0, 4096, 10, vague))
        self.assertNotEqual(place(0, 0, 10, 0), place(0, 0, 10, 0))
        self.assertEqual(place(0, 4096, 10, 8), place(0, 4096, 10, 8))
        self.assertNotEqual(place(0, 4096, 10, 8), place(0, 4096, 9, 8))
