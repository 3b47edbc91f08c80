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

"""Find out what changed in a file since it was copied.

A disk is copied while its guest runs, and only what the guest has changed
since then has to follow once it is off. :func:`track` chooses how to find the
changes:

* :class:`Clone`, where the file system has reflinks: an unnamed clone keeps
  the file as it was, and the extents of both files tell them apart. Nothing
  has to be read again.
* :class:`Hashes`, everywhere else: a hash of each block that was copied is
  compared with what the block holds now.

The file itself is only ever read. The calls block: run them off the eventlet
hub. Nothing here logs, and nothing knows libvirt.
"""

import array
import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import time
import typing as ty
import weakref

from oslo_utils import units

from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads

try:
    import blake3
except ImportError:
    blake3 = None  # type: ignore[assignment]

# Ranges that are closer together than this are sent as one. A range costs the
# destination as much time as the data of such a gap.
MERGE_BYTES = 256 * units.Ki

# Sending so many ranges takes seconds, in which the guest may be off.
# Neighbours are merged rather than having more.
MOST_RANGES = 32 * units.Ki

# Ends passes: less than this is sent in no time.
FLOOR_BYTES = 32 * units.Mi

# How often a disk is copied while its guest runs, in whole or in part. Each
# pass sends at most half of what the pass before it did.
MOST_PASSES = 12

# Blocks of at least this size have a hash each.
BLOCK_BYTES = 64 * units.Ki

# An accident, or a guest that tries to provoke one, makes a changed block look
# unchanged with a probability of 2**-96: the hash is keyed.
DIGEST_BYTES = 12

# Memory for all hashes of a file, whichever is more. Larger disks have larger
# blocks.
TABLE_BYTES = 16 * units.Mi
TABLE_BYTES_PER_TIB = 48 * units.Mi

# How many threads read a disk again when its guest is off, and waits for that.
# While the guest runs there is one: the guest needs the processors, too.
LAST_READERS = 4

# A disk is read again in sections of at least this size, and in no more of
# them than this, each of which has at most so many ranges.
SECTION_BYTES = 64 * units.Mi
MOST_SECTIONS = 256
MOST_SECTION_RANGES = 512

# A clone is made only where so much room is left beside what all clones may
# take, so that guests can go on.
RESERVED_BYTES = units.Gi

# A guest's writes wait while its disk is cloned. Extents are cloned one by
# one: 10,000 of them took 0.5 s on XFS and 0.1 s on btrfs.
MOST_EXTENTS = 10_000

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_BTRFS_IOC_FS_INFO = 0x8400941F
_BTRFS_FS_INFO_BYTES = 1024
_BTRFS_FS_INFO_FSID = slice(16, 32)
_FIEMAP_FLAG_SYNC = 1
_FIEMAP_HEADER = struct.Struct('=QQLLLL')
_FIEMAP_EXTENT = struct.Struct('=QQQQQLLLL')
_FIEMAP_BATCH = 1000
_EXTENT_LAST = 0x1
_EXTENT_ENCODED = 0x8
_EXTENT_UNWRITTEN = 0x800
_EXTENT_SHARED = 0x2000
# The physical place is not known, or not that of these bytes alone: unknown,
# delayed allocation, not aligned, inline, packed with others.
_EXTENT_VAGUE = 0x2 | 0x4 | 0x100 | 0x200 | 0x400

_ZERO_DIGEST = bytes(DIGEST_BYTES)

# File system of each Clone of this process, and the bytes that it may still
# take there. A clone that is lost without close() is closed by Python, and
# leaves this account at that moment, too. Nothing blocks under the lock.
_costs: 'weakref.WeakKeyDictionary[Clone, tuple[ty.Any, int]]' = (
    weakref.WeakKeyDictionary())
_costs_lock = threads.native_threading().Lock()


class Ranges:
    """Ranges of a file that changed, in order.

    :ivar total: bytes of all of them
    """

    def __init__(self, most: int = MOST_RANGES):
        """Begin with none.

        :param most: how many to hold; with more, neighbours are merged
        """
        self.total = 0
        self._most = most
        self._gap = MERGE_BYTES
        self._starts = array.array('Q')
        self._ends = array.array('Q')

    def add(self, start: int, end: int) -> None:
        """Add a range that does not begin before the end of the last one."""
        if self._ends and start - self._ends[-1] < self._gap:
            self.total += end - self._ends[-1]
            self._ends[-1] = end
            return
        self.total += end - start
        self._starts.append(start)
        self._ends.append(end)
        if len(self) > self._most:
            self._merge()

    def after(self, done: int, block: int) -> 'Ranges':
        """The ranges that are left once the first bytes were copied.

        :param done: how many bytes
        :param block: a range begins where it began before, or a multiple of
            so many bytes behind that
        """
        rest = Ranges(self._most)
        for start, end in self:
            size = end - start
            if done < size:
                rest.add(start + done - done % block, end)
            done = max(0, done - size)
        return rest

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> ty.Iterator[tuple[int, int]]:
        """Yield (start, end) of each range; the end is not part of it."""
        return zip(self._starts, self._ends)

    def _merge(self) -> None:
        """Merge neighbours until half as many ranges are left."""
        while len(self) > self._most // 2:
            ranges, self._gap = list(self), 2 * self._gap
            del self._starts[:], self._ends[:]
            self.total = 0
            for start, end in ranges:
                self.add(start, end)


class Passes:
    """Tells whether one more pass, while the guest runs, is worth it."""

    def __init__(self, sent: int):
        """Begin after the first pass.

        :param sent: bytes of data that it sent
        """
        self._sent = sent
        self._left = MOST_PASSES - 1

    def another(self, changed: int) -> bool:
        """Whether to send what changed now, with the guest running.

        Once a pass would send more than half of what the last one did, the
        guest writes about as fast as the link carries. A guest that rewrites
        its disk faster than that is copied once before it is powered off.

        :param changed: bytes that changed since the last pass
        """
        if changed <= FLOOR_BYTES or 2 * changed > self._sent:
            return False
        self._sent = changed
        self._left -= 1
        return self._left >= 0


class Changes(ty.Protocol):
    """The changes in a file since it was last copied.

    Copy ``source()`` as a whole first. Then, as often as it helps, look() and
    copy ``source(ranges)`` over the first copy, after that has been given the
    new ``length``: see send(). The last look() has to come after the last
    write to the file. What a look finds counts as changed until it has been
    copied.

    :ivar kind: how changes are found: 'clone' or 'hashes'
    :ivar skip: bytes at the start of the file that are left out
    :ivar length: bytes of the file at the last look, with those
    :ivar block: a copy that goes on in the middle of a range has to begin
        with a block of so many bytes
    """
    kind: str
    skip: int
    length: int
    block: int

    def look(
        self, last: bool = False, cancel: stream.CancelEvent | None = None,
        stall_seconds: float = stream.STALL_SECONDS,
    ) -> Ranges:
        """Find what changed since it was copied.

        :param last: whether nobody writes to the file any more
        :param cancel: ends the look when set
        :param stall_seconds: how long the file system may take
        :returns: ranges between ``skip`` and ``length``
        :raises: CopyError, Cancelled
        """
        ...

    def source(self, ranges: Ranges | None = None) -> stream.Source:
        """The bytes to copy: all of the file, or what the last look found.

        The bytes of the ranges come one after the other. Read it to its end.
        A copy that broke off goes on with another one of what is left.

        :param ranges: what look() returned
        """
        ...

    def close(self) -> None:
        """Forget all about the file."""
        ...


def track(
    path: str, directory: str, skip: int = 0,
    stall_seconds: float = stream.STALL_SECONDS,
) -> Changes:
    """Begin to find the changes of a file in the best way that there is.

    :param directory: any of the same file system that may be written to; a
        clone has no name there, and is gone with this process at the latest
    :param skip: bytes at the start of the file to leave out
    :param stall_seconds: how long the file system may take
    :raises: CopyError if the file cannot be read
    """
    with _source_errors(path):
        try:
            return threads.within(
                stall_seconds, lambda: Clone(path, directory, skip))
        except TimeoutError:
            raise
        except OSError:
            # No reflinks, too little room, another file system, no right to
            # write there. Hashes need no more than the copy itself.
            return Hashes(path, skip)


def send(
    tracked: Changes,
    ranges: Ranges,
    volume: ty.Any,
    length: int,
    cancel: stream.CancelEvent | None = None,
    stall_seconds: float = stream.STALL_SECONDS,
    **options: ty.Any,
) -> stream.Result:
    """Copy what changed over an earlier copy of the file.

    Blocks the calling native thread, as stream.copy() does.

    :param ranges: what the last look has found
    :param volume: the virStorageVol that has the copy
    :param length: bytes of the volume
    :param options: more of what stream.copy() takes
    :returns: what was copied; its length is that of all ranges
    :raises: CopyError, Cancelled
    """
    if tracked.length != length:
        stream.set_length(volume, tracked.length, cancel, stall_seconds)
    return stream.copy(
        tracked.source(ranges), stream.RangesSink(volume, ranges),
        ranges.total, cancel=cancel, stall_seconds=stall_seconds, **options)


class Hashes:
    """Finds changes by reading a file again and comparing hashes of blocks.

    A hash is made of the very bytes that are copied. So a block which the
    guest writes at that moment counts as changed in the next look, whatever
    was read of it.
    """
    kind = 'hashes'

    def __init__(self, path: str, skip: int = 0):
        self.skip = skip
        self._file = _File(path)
        self.length = self._file.length
        self._table = _Table(self.length)
        self.block = self._table.block

    def look(
        self, last: bool = False, cancel: stream.CancelEvent | None = None,
        stall_seconds: float = stream.STALL_SECONDS,
    ) -> Ranges:
        if last:
            with _source_errors(self._file.path):
                threads.within(stall_seconds, self._file.settle)
        self.length = self._file.length
        look = _Look(self._file, self._table, self.skip, self.length)
        return look.run(LAST_READERS if last else 1, cancel, stall_seconds)

    def source(self, ranges: Ranges | None = None) -> stream.Source:
        # The copy is cut off at this length, too.
        self._table.clear_from(
            -(-max(0, self.length - self.skip) // self._table.block))
        return _Source(self._file.path, 'file', (
            self._recorded(start, end)
            for start, end in _or_whole(ranges, self)))

    def _recorded(self, start: int, end: int) -> stream.Chunks:
        """Yield a range of the file, which begins with a block."""
        cutter = _Cutter(start - self.skip, self._table.block)
        for chunk in self._file.chunks(start, end):
            for block in cutter.add(chunk):
                self._table.record(*block)
            yield chunk
        for block in cutter.end():
            self._table.record(*block)

    def close(self) -> None:
        self._file.close()


class _Look:
    """Reads a file again, in several threads, and finds what has changed."""

    def __init__(self, file: '_File', table: '_Table', skip: int, length: int):
        """Divide the file into sections of whole blocks.

        :param skip: bytes at the start of the file to leave out
        :param length: bytes of the file, with those
        """
        self._file = file
        self._table = table
        self._skip = skip
        self._length = length
        size = max(SECTION_BYTES, (length - skip) // MOST_SECTIONS)
        self._size = size + -size % table.block
        # All threads take their next section from here.
        self._starts = iter(range(skip, length, self._size))
        self._found: dict[int, Ranges] = {}
        # Bytes read so far, or about: grows as long as anything moves.
        self._read = 0
        self._error: Exception | None = None

    def run(
        self, readers: int, cancel: stream.CancelEvent | None,
        stall_seconds: float,
    ) -> Ranges:
        """Read all sections, and tell what has changed in them.

        Blocks the calling native thread, as stream.copy() does.

        :raises: CopyError, Cancelled
        """
        if cancel is not None and cancel.is_set():
            raise errors.Cancelled()
        self._wait([threads.start(self._read_sections, 'changes-read')
                    for _ in range(readers)], cancel, stall_seconds)
        ranges = Ranges()
        for _start, found in sorted(self._found.items()):
            for start, end in found:
                ranges.add(start, end)
        return ranges

    def _wait(
        self, readers: list[ty.Any], cancel: stream.CancelEvent | None,
        stall_seconds: float,
    ) -> None:
        last_move, read = time.monotonic(), 0
        while self._error is None and any(
                reader.is_alive() for reader in readers):
            next(filter(lambda reader: reader.is_alive(), readers),
                 readers[0]).join(stream.POLL_SECONDS)
            now = time.monotonic()
            if self._read != read:
                last_move, read = now, self._read
            if cancel is not None and cancel.is_set():
                self._fail(errors.Cancelled())
            elif now - last_move > stall_seconds:
                self._fail(errors.CopyError(
                    'source', self._file.path, read,
                    f'nothing moved for {stall_seconds} seconds'))
        if self._error is not None:
            for reader in readers:
                reader.join(stream.END_SECONDS / len(readers))
            raise self._error

    def _fail(self, error: Exception) -> None:
        """Make all threads stop. The first error is kept."""
        self._error = self._error or error

    def _read_sections(self) -> None:
        try:
            for start in self._starts:
                self._found[start] = self._compare(
                    start, min(start + self._size, self._length))
        except Exception as error:
            self._fail(error)

    def _compare(self, start: int, end: int) -> Ranges:
        ranges = Ranges(MOST_SECTION_RANGES)
        cutter = _Cutter(start - self._skip, self._table.block)
        with _source_errors(self._file.path, start):
            for chunk in self._file.chunks(start, end):
                if self._error is not None:
                    break
                self._add(ranges, cutter.add(chunk))
                self._read += stream.length_of(chunk)
        self._add(ranges, cutter.end())
        return ranges

    def _add(
        self, ranges: Ranges, blocks: ty.Iterator[tuple[int, int, 'Block']],
    ) -> None:
        size = self._table.block
        for block in blocks:
            for number in self._table.differing(*block):
                start = self._skip + number * size
                ranges.add(start, min(start + size, self._length))


# Bytes of a block, or None if all of them are zeros.
Block = bytes | memoryview | None


class _Cutter:
    """Cuts chunks that follow each other into blocks.

    Blocks come as (number of the first, how many, content); only holes come
    with more than one. The file is taken to go on with zeros after its end.

    :ivar number: of the block that comes next
    """

    def __init__(self, start: int, size: int):
        """Begin with a block.

        :param start: where the first chunk is from, a multiple of ``size``
        :param size: bytes of a block
        """
        self.number = start // size
        self._size = size
        self._part = bytearray()

    def add(self, chunk: bytes | int) -> ty.Iterator[tuple[int, int, Block]]:
        """Yield the blocks that a chunk completes."""
        done, length = 0, stream.length_of(chunk)
        while done < length:
            left = length - done
            if self._part or left < self._size:
                size = min(left, self._size - len(self._part))
                self._part += _piece(chunk, done, size)
                if len(self._part) == self._size:
                    yield from self.end()
            elif isinstance(chunk, int):
                size = left - left % self._size
                yield self._next(size // self._size, None)
            else:
                size = self._size
                yield self._next(1, _piece(chunk, done, size))
            done += size

    def end(self) -> ty.Iterator[tuple[int, int, Block]]:
        """Yield the last block, if it has begun."""
        if self._part:
            part = bytes(self._part).ljust(self._size, b'\0')
            self._part.clear()
            yield self._next(1, part)

    def _next(self, count: int, data: Block) -> tuple[int, int, Block]:
        first = self.number
        self.number += count
        return first, count, data


def _piece(chunk: bytes | int, start: int, size: int) -> memoryview:
    data = bytes(size) if isinstance(chunk, int) else chunk
    start = 0 if isinstance(chunk, int) else start
    return memoryview(data)[start:start + size]


class _Table:
    """The hashes of a file's blocks; zeros take no room.

    :ivar block: bytes of a block
    """
    SEGMENT = 1024

    def __init__(self, length: int):
        room = max(TABLE_BYTES, TABLE_BYTES_PER_TIB * length // units.Ti)
        # Blocks that a file which has grown has beyond that are not recorded,
        # and count as changed.
        self._most = room // DIGEST_BYTES
        self.block = BLOCK_BYTES
        while self.block * self._most < length:
            self.block *= 2
        self._zeros = bytes(self.block)
        self._digest = _new_hash()
        self._segments: dict[int, bytearray] = {}
        self._zero_hashes = bytearray(self.SEGMENT * DIGEST_BYTES)

    def record(self, first: int, count: int, data: Block) -> None:
        """Record the hash of a block, or that some are zeros."""
        digest = self._hash(data)
        for segment, start, end in self._places(first, count):
            if digest == _ZERO_DIGEST and segment not in self._segments:
                continue
            hashes = self._segments.setdefault(
                segment, bytearray(self.SEGMENT * DIGEST_BYTES))
            hashes[start * DIGEST_BYTES:end * DIGEST_BYTES] = (
                digest * (end - start))

    def differing(
        self, first: int, count: int, data: Block,
    ) -> ty.Iterator[int]:
        """Yield the blocks that are recorded with another content."""
        digest = self._hash(data)
        if count == 1 and first < self._most:
            # Only holes come as more. The server may be off meanwhile.
            segment, index = divmod(first, self.SEGMENT)
            at = index * DIGEST_BYTES
            recorded = self._segments.get(segment, self._zero_hashes)
            if recorded[at:at + DIGEST_BYTES] != digest:
                yield first
            return
        for segment, start, end in self._places(first, count):
            hashes = self._segments.get(segment)
            if hashes is None:
                if digest == _ZERO_DIGEST:
                    continue
                hashes = self._zero_hashes
            for index in range(start, end):
                at = index * DIGEST_BYTES
                if hashes[at:at + DIGEST_BYTES] != digest:
                    yield segment * self.SEGMENT + index
        yield from range(max(first, self._most), first + count)

    def clear_from(self, first: int) -> None:
        """Record that all blocks from one on are zeros."""
        last = max(self._segments, default=-1)
        self.record(first, (last + 1) * self.SEGMENT - first, None)

    def _places(
        self, first: int, count: int,
    ) -> ty.Iterator[tuple[int, int, int]]:
        """Yield (segment, first in it, end in it) of blocks to record."""
        end = min(first + count, self._most)
        while first < end:
            segment, start = divmod(first, self.SEGMENT)
            size = min(self.SEGMENT - start, end - first)
            yield segment, start, start + size
            first += size

    def _hash(self, data: Block) -> bytes:
        if data is None or self._zeros.startswith(data):
            return _ZERO_DIGEST
        return self._digest(data)


def _new_hash() -> ty.Callable[[bytes | memoryview], bytes]:
    """A keyed hash function, BLAKE3 where it is installed."""
    key = os.urandom(32)
    if blake3 is not None:
        return lambda data: blake3.blake3(
            data, key=key).digest(length=DIGEST_BYTES)
    return lambda data: hashlib.blake2b(
        data, key=key, digest_size=DIGEST_BYTES).digest()


class Clone:
    """Finds changes by comparing the extents of a file with those of a clone.

    Copies are made of the clone, which does not change: reading it takes
    nothing from the guest, and shows the file at one moment. A write to the
    file goes to another place on the disk as long as the clone has the old
    one, so blocks that are in one place in both are the same.

    The clone takes room for what the guest overwrites. All clones of a file
    together take at most what the file had allocated when the last one was
    made, because only the first write to a block that is shared takes more
    room. A clone is made only where that is left, and what all other clones of
    this process may take.

    The clone has no name: the kernel deletes it with the last descriptor, even
    if the host loses power.
    """
    kind = 'clone'
    block = 1

    def __init__(self, path: str, directory: str, skip: int = 0):
        """Make the first clone.

        :raises: OSError where that is not possible, or not wise
        """
        self.skip = skip
        self._directory = directory
        # self._copied was copied last; self._next is to be copied next.
        self._file = self._copied = _File(path)
        self._next: _File | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._file_system = self._file.file_system()
            self._copied = self._clone()
            self._check_extents(self._copied)
            stack.pop_all()
        self.length = self._copied.length

    def look(
        self, last: bool = False, cancel: stream.CancelEvent | None = None,
        stall_seconds: float = stream.STALL_SECONDS,
    ) -> Ranges:
        """Find what changed since it was copied.

        Without room for another clone nothing is found before the last look.
        """
        if cancel is not None and cancel.is_set():
            raise errors.Cancelled()
        with _source_errors(self._file.path):
            return threads.within(stall_seconds, lambda: self._look(last))

    def _look(self, last: bool) -> Ranges:
        try:
            return self._find(last)
        finally:
            # close() does not wait for a look that takes too long.
            if self._file.closed:
                self.close()

    def _find(self, last: bool) -> Ranges:
        self._drop_next()
        if last:
            self._file.settle()
            self._next = self._file
        else:
            try:
                self._next = self._clone()
            except OSError:
                return Ranges()
        self.length = self._next.length
        return self._differing(self._next)

    def _differing(self, now: '_File') -> Ranges:
        ranges = Ranges()
        for start, end in differing(
                self._copied.extents(), now.extents(), self.length):
            if end > self.skip:
                ranges.add(max(start, self.skip), end)
        return ranges

    def source(self, ranges: Ranges | None = None) -> stream.Source:
        if self._next is not None:
            self._copied.close()
            self._copied, self._next = self._next, None
        return _Source(self._file.path, self.kind, (
            self._copied.chunks(start, end)
            for start, end in _or_whole(ranges, self)))

    def _drop_next(self) -> None:
        if self._next is not None and self._next is not self._file:
            self._next.close()
        self._next = None

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._release_room)
            stack.callback(lambda: self._copied.close())
            stack.callback(self._drop_next)
            # First: a look that goes on closes what it makes after that.
            stack.callback(self._file.close)

    def _clone(self) -> '_File':
        if self._file.count_extents() > MOST_EXTENTS:
            raise OSError(errno.EFBIG, 'too many extents')
        self._take_room()
        clone = _File(self._directory, _open_unnamed, self._file.path)
        try:
            fcntl.ioctl(clone.descriptor, _FICLONE, self._file.descriptor)
        except BaseException:
            clone.close()
            raise
        return clone

    def _take_room(self) -> None:
        """Enter into the account what the next clone may cost.

        That holds for the clones before it as well: of what they share with
        the file, the next clone shares all.

        :raises: OSError if the room for all clones is not there
        """
        needed = self._file.allocated
        with _costs_lock:
            _costs[self] = self._file_system, needed
            total = sum(cost for place, cost in _costs.values()
                        if place == self._file_system)
        # Look this up last: a clone that is made meanwhile counts this one.
        status = os.statvfs(self._directory)
        available = status.f_bavail * status.f_frsize
        if available < total + RESERVED_BYTES:
            raise OSError(errno.ENOSPC, 'too little room for another clone')

    def _release_room(self) -> None:
        with _costs_lock:
            _costs.pop(self, None)

    @staticmethod
    def _check_extents(clone: '_File') -> None:
        """Check that the file system tells where shared bytes are."""
        if not any(extent.shared for extent in clone.extents()):
            raise OSError(errno.EOPNOTSUPP, 'no shared extents')


class Extent(ty.NamedTuple):
    """Consecutive bytes of a file in one place of the disk.

    :ivar start: offset of the first byte in the file
    :ivar end: offset of the byte behind the last
    :ivar place: equal in two files where both have the same bytes there
    :ivar shared: whether another file has them, too
    """
    start: int
    end: int
    place: ty.Any
    shared: bool = False


def differing(
    old: ty.Iterable[Extent], new: ty.Iterable[Extent], length: int,
) -> ty.Iterator[tuple[int, int]]:
    """Yield (start, end) of what is not in the same place in two files.

    :param old: extents of one, in order
    :param new: extents of the other, in order
    :param length: bytes to compare; holes are between and after the extents
    """
    olds, news = _with_holes(old, length), _with_holes(new, length)
    done, first, second = 0, Extent(0, 0, None), Extent(0, 0, None)
    while done < length:
        if first.end == done:
            first = next(olds)
        if second.end == done:
            second = next(news)
        end = min(first.end, second.end)
        if first.place != second.place:
            yield done, end
        done = end


def _with_holes(
    extents: ty.Iterable[Extent], length: int,
) -> ty.Iterator[Extent]:
    """Yield extents that cover all of ``length``, and nothing else."""
    done = 0
    for extent in extents:
        start, end = max(extent.start, done), min(extent.end, length)
        if start >= end:
            continue
        if start > done:
            yield Extent(done, start, None)
        yield Extent(start, end, extent.place)
        done = end
    if done < length:
        yield Extent(done, length, None)


class _File:
    """A file that is read while others may write to it."""

    def __init__(
        self, path: str,
        open_file: ty.Callable[[str], ty.BinaryIO] | None = None,
        told: str = '',
    ):
        """Open the file.

        :param open_file: opens it, if not just for reading
        :param told: its path as errors tell it, if it is another
        """
        self.path = told or path
        self._file = (open_file or _open)(path)

    @property
    def descriptor(self) -> int:
        """The number of the open file, which another may have after close().

        :raises: ValueError after close()
        """
        return self._file.fileno()

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def length(self) -> int:
        # That of a block device is not in its status.
        return os.lseek(self.descriptor, 0, os.SEEK_END)

    @property
    def allocated(self) -> int:
        return os.fstat(self.descriptor).st_blocks * 512

    def chunks(self, start: int, end: int) -> stream.Chunks:
        """Yield a range of the file, which reads as zeros behind its end.

        :raises: OSError
        """
        while start < end:
            data = stream.seek(self.descriptor, start, os.SEEK_DATA, end)
            if data > start:
                yield data - start
            start = stream.seek(self.descriptor, data, os.SEEK_HOLE, end)
            yield from self._data(data, start)

    def _data(self, start: int, end: int) -> stream.Chunks:
        size = stream.MESSAGE_BYTES
        while start < end:
            # Aligned: most chunks are then made of whole blocks.
            length = min(end, start - start % size + size) - start
            data = os.pread(self.descriptor, length, start)
            if not data:
                # It was cut off meanwhile.
                yield end - start
                return
            yield data
            start += len(data)

    def settle(self) -> None:
        """See to it that what is read from now on is what was written last.

        Direct writes go past the page cache. The kernel drops the pages that
        it has of what they change, before the write and after it, and the
        write does not end before. If a page cannot be dropped, for example
        because somebody else has written to it through the cache, the kernel
        keeps the error for fsync() of those who have the file open since.
        Those are the only pages that can be stale, so this tells of any.

        :raises: OSError
        """
        os.fsync(self.descriptor)

    def file_system(self) -> ty.Any:
        """Equal for two files if they take room from the same file system.

        The subvolumes of btrfs, which share all room, have numbers of their
        own in what stat() tells.
        """
        info = bytearray(_BTRFS_FS_INFO_BYTES)
        try:
            fcntl.ioctl(self.descriptor, _BTRFS_IOC_FS_INFO, info)
        except OSError:
            return os.fstat(self.descriptor).st_dev
        return bytes(info[_BTRFS_FS_INFO_FSID])

    def count_extents(self) -> int:
        """How many extents the file has.

        :raises: OSError where the file system does not tell
        """
        header = bytearray(_FIEMAP_HEADER.pack(
            0, 2 ** 64 - 1, _FIEMAP_FLAG_SYNC, 0, 0, 0))
        fcntl.ioctl(self.descriptor, _FIEMAP, header)
        return _FIEMAP_HEADER.unpack(header)[3]

    def extents(self) -> ty.Iterator[Extent]:
        """Yield the extents of the file, in order.

        Those that read as zeros are taken for holes.

        :raises: OSError
        """
        start, last = 0, False
        while not last:
            batch = self._fiemap(start)
            last = not batch
            for logical, physical, length, _, _, flags, _, _, _ in batch:
                start = logical + length
                last = bool(flags & _EXTENT_LAST)
                if not flags & _EXTENT_UNWRITTEN:
                    yield Extent(logical, start, _place(
                        logical, physical, length, flags),
                        bool(flags & _EXTENT_SHARED))

    def _fiemap(self, start: int) -> list[tuple[int, ...]]:
        """The next extents, as many as one call returns."""
        size = _FIEMAP_EXTENT.size
        data = bytearray(_FIEMAP_HEADER.pack(
            start, 2 ** 64 - 1 - start, _FIEMAP_FLAG_SYNC, 0, _FIEMAP_BATCH,
            0)) + bytes(_FIEMAP_BATCH * size)
        fcntl.ioctl(self.descriptor, _FIEMAP, data)
        count = _FIEMAP_HEADER.unpack_from(data)[3]
        return [_FIEMAP_EXTENT.unpack_from(
            data, _FIEMAP_HEADER.size + index * size)
            for index in range(count)]

    def close(self) -> None:
        self._file.close()


def _place(logical: int, physical: int, length: int, flags: int) -> ty.Any:
    """A key that two files have in common where they share bytes."""
    if flags & _EXTENT_VAGUE or not physical:
        return object()
    if flags & _EXTENT_ENCODED:
        # Compressed: each part of it has the physical place of the whole.
        return logical, physical, length
    return physical - logical


def _open(path: str) -> ty.BinaryIO:
    return open(path, 'rb', buffering=0)


def _open_unnamed(directory: str) -> ty.BinaryIO:
    """A new file of a directory's file system that has no name."""
    native_os = threads.native_os()
    descriptor = native_os.open(
        directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    return native_os.fdopen(descriptor, 'rb', buffering=0)


class _Source:
    """Sections of a file, one after the other, as what a copy reads."""

    def __init__(
        self, path: str, kind: str, sections: ty.Iterable[stream.Chunks],
    ):
        self.path = path
        self.kind = kind
        self._sections = sections

    def chunks(self, length: int) -> stream.Chunks:
        done = 0
        try:
            for section in self._sections:
                for chunk in section:
                    done += stream.length_of(chunk)
                    yield chunk
        except OSError as error:
            raise errors.CopyError('source', self.path, done, error) from error
        if done != length:
            raise ValueError(f'{done} bytes to read, not {length}')


@contextlib.contextmanager
def _source_errors(path: str, done: int = 0) -> ty.Iterator[None]:
    """Tell errors of a look as those of a copy are told."""
    try:
        yield
    except OSError as error:
        raise errors.CopyError('source', path, done, error) from error


def _or_whole(
    ranges: Ranges | None, tracked: Changes,
) -> ty.Iterable[tuple[int, int]]:
    if ranges is None:
        return [(tracked.skip, tracked.length)]
    return ranges
