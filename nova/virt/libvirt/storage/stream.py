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

"""Copy a file between storage volumes, local files and memory.

A reader thread reads a :class:`Source` into a bounded queue, a writer thread
writes from the queue into a :class:`Sink`, and the thread that called
:func:`copy` watches both. All three are native threads: send() blocks its
thread when the daemon stops reading, even on a stream that was made with
VIR_STREAM_NONBLOCK, so no copy may run on the eventlet hub. Under eventlet
call :func:`copy` through :func:`threads.off_hub`, once for each file.

Nothing here logs: oslo.log must not be used in a native thread under eventlet.
"""

import collections
import contextlib
import dataclasses
import errno
import os
import stat
import time
import typing as ty

from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage.threads import libvirt

# The most bytes of data that libvirtd sends in one message
# (VIR_NET_MESSAGE_LEGACY_PAYLOAD_MAX less the header). Asked for more, recv()
# joins the messages that have arrived.
RECEIVE_BYTES = 262120

# Bytes of data in one message to libvirtd. send() takes up to 32 MiB; messages
# of 512 KiB were the fastest.
MESSAGE_BYTES = 512 * 1024

# Size of one deliberately large message per copy. When libvirtd frees it,
# glibc raises its trim threshold to twice that size (M_TRIM_THRESHOLD in
# mallopt(3)) and stops returning message buffers to the kernel. Without it,
# page faults take a third of the decrypting thread's time.
LONG_MESSAGE_BYTES = 4 * MESSAGE_BYTES

# A volume is downloaded in windows of this size. libvirt's receive queue has
# no bound in a process with an event loop, and nova-compute always has one:
# downloaded in one piece, a disk could end up in memory as a whole.
WINDOW_BYTES = 32 * 1024 * 1024

# Capacity of the queue between reader and writer.
QUEUE_BYTES = 8 * 1024 * 1024

# Blocks of this size that contain only zeros are sent as holes. A hole costs a
# message and splits the data around it: with blocks of 16 KiB a copy took
# twice as long as without holes, with 64 KiB up to a seventh longer.
ZERO_BYTES = 32 * 1024

# A block device gets zeros written where a file has a hole. So many of them
# take a second or so, and end a section: whoever waits for its end, libvirtd
# included, does not wait for more.
HOLE_BYTES = 64 * 1024 * 1024

# Default for the seconds without progress after which a copy fails.
STALL_SECONDS = 60

# Seconds without progress after which a copy reports a pause.
PAUSE_SECONDS = 2

# Seconds between two looks at the progress of a copy.
POLL_SECONDS = 0.2

# Seconds that a failed copy waits for its threads. A thread that hangs in
# libvirt cannot be ended: it is left behind, and ends when libvirt returns.
END_SECONDS = 0.5

# A daemon says of bytes that it has them only when their upload is finished.
# After so many bytes of data, or so many seconds, an upload is finished and
# the next one begins there: what came before is not sent again if the
# connection is lost.
SECTION_BYTES = 128 * 1024 * 1024
SECTION_SECONDS = 30

# An upload takes at least so many times as long as its end, in which nothing
# is sent. On a link with a long way uploads are longer.
SECTION_COSTS = 20

# Copies that share a bandwidth take turns of this many bytes. The turns of all
# copies are of one size, so the shares are fair whatever the message size.
TURN_BYTES = 256 * 1024

# Burst allowance: how many seconds of unused bandwidth a copy may catch up on.
# Longer than scheduling jitter, too short to show as a burst.
SLACK_SECONDS = 0.05

# Return value of virStreamRecvFlags() in front of a hole.
_AT_HOLE = -3

_ZEROS = bytes(MESSAGE_BYTES)
_ZERO_BLOCK = bytes(ZERO_BYTES)

# Either data, no more than one message carries, or the length of a hole.
Chunk = bytes | int

Chunks = ty.Generator[Chunk, None, None]

# Called from the writer thread with the bytes copied so far, holes included,
# and the bytes of data among them. Must return soon, and must not log.
Progress = ty.Callable[[int, int], None]


class CancelEvent(ty.Protocol):
    """Stops a copy once it is set, such as a threading.Event."""

    def is_set(self) -> bool:
        ...


class Source(ty.Protocol):
    """The reading end of a copy.

    :func:`copy` reads the attributes in the thread that called it, and calls
    chunks() in the reader thread, which also closes the generator early when
    the copy fails.

    :ivar path: path of the file, for errors
    :ivar kind: how the file is read: 'file', 'volume' or 'memory'
    """
    path: str
    kind: str

    def chunks(self, length: int) -> Chunks:
        """Yield the first ``length`` bytes; may block.

        :raises: CopyError if reading fails, or if there are fewer bytes
        """
        ...


class Sink(ty.Protocol):
    """The writing end of a copy, used for one copy only.

    :func:`copy` reads the attributes in the thread that called it, and calls
    the methods in the writer thread: data() and hole() in the order of the
    bytes and without gaps, then finish() once. If any of these raises, or if
    the copy fails elsewhere or is cancelled, abort() is called once instead,
    and nothing after it. A method may block. When the copy fails meanwhile,
    its caller does not wait for the method, and abort() follows late.

    :ivar path: path of the file, for errors
    :ivar sparse: whether the sink takes holes. If not, hole() is never
        called, and data() gets zeros instead.
    :ivar most_hole: bytes of the longest hole that it takes, 0 for no limit.
        A hole of that length may be followed by another one.
    """
    path: str
    sparse: bool
    most_hole: int

    def data(self, data: bytes) -> None:
        """Write the next bytes, at least one.

        :raises: CopyError; an error of earlier bytes may come this late
        """
        ...

    def hole(self, length: int) -> None:
        """Leave out the next bytes, which read as zeros; ``length`` > 0.

        Two holes never follow each other, but for ``most_hole``.

        :raises: CopyError; an error of earlier bytes may come this late
        """
        ...

    def finish(self) -> None:
        """End the copy. When this returns, all bytes have been taken.

        Also called if there were no bytes at all.

        :raises: CopyError; an error of earlier bytes may come this late
        """
        ...

    def abort(self) -> None:
        """End a copy that failed, possibly in finish().

        :raises: any exception, which is noted at the error of the copy
        """
        ...


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a copy.

    :ivar length: bytes of the file, holes included
    :ivar wire: bytes of data that were sent, holes not included
    :ivar seconds: from the first request to the sink's last answer
    :ivar source: how the file was read, the ``kind`` of its source
    """
    length: int
    wire: int
    seconds: float
    source: str


class Bandwidth:
    """A limit on what all the copies that share it send together.

    Copies that have something to send take turns. Holes are free.
    """

    def __init__(self, rate: int):
        """Set the limit.

        :param rate: bytes per second; 0 for no limit
        """
        self._rate = rate
        self._lock = threads.native_threading().Lock()
        self._next = 0.0

    def limit(self, chunks: ty.Iterable[Chunk],
              wait_until: ty.Callable[[float], None]) -> ty.Iterator[Chunk]:
        """Yield the chunks of one copy, each as soon as it may be sent.

        :param wait_until: blocks up to a time.monotonic()
        """
        allowed = 0
        for chunk in chunks:
            if isinstance(chunk, bytes) and self._rate:
                allowed -= len(chunk)
                while allowed < 0:
                    wait_until(self._next_turn())
                    allowed += TURN_BYTES
            yield chunk

    def _next_turn(self) -> float:
        """The time.monotonic() from which on TURN_BYTES may be sent."""
        with self._lock:
            turn = max(self._next, time.monotonic() - SLACK_SECONDS)
            self._next = turn + TURN_BYTES / self._rate
            return turn


def open_source(
    volume: 'libvirt.virStorageVol', length: int, direct: bool = True,
    offset: int = 0,
) -> Source:
    """Return the faster of the possible sources for a volume of this host.

    Blocks while libvirt looks up the volume.

    :param length: length of the volume as libvirt reports it
    :param direct: whether the file of the volume may be read without libvirt,
        if this process has the permission and the file has that length
    :param offset: where in the volume to begin
    """
    path = volume.path()
    if direct and _is_readable(path, length):
        return FileSource(path, offset)
    return VolumeSource(volume, offset=offset)


def copy(
    source: Source,
    sink: Sink,
    length: int,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
    stall_seconds: float = STALL_SECONDS,
    bandwidth: Bandwidth | None = None,
    paused: ty.Callable[[], None] | None = None,
) -> Result:
    """Copy bytes from a source into a sink.

    Holes stay holes, and long runs of zeros become holes, if the sink takes
    them. When this returns, every byte was read and counted and the sink was
    finished; the data need not be on stable storage yet. Blocks the calling
    native thread as long as the copy takes. Waiting for a turn of a bandwidth
    is not a stall.

    :param source: end to read
    :param sink: end to write
    :param length: bytes to copy
    :param progress: called with the progress of the copy
    :param cancel: stops the copy when set
    :param stall_seconds: how long the copy may stand still
    :param bandwidth: shared with the other copies that are given it
    :param paused: called once if nothing moved for PAUSE_SECONDS; must not
        raise
    :raises: CopyError if either end fails; the first error is the one raised
    :raises: Cancelled if ``cancel`` was set
    """
    started = time.monotonic()
    sent: list[int] = []

    def write(queue: _Queue) -> None:
        sent.append(_write(sink, queue, progress, bandwidth))

    _run(source, sink.path, length, write, cancel, stall_seconds, paused)
    return Result(length, sent[0], time.monotonic() - started, source.kind)


def compare(
    source: Source,
    destination: 'libvirt.virStorageVol',
    length: int,
    cancel: CancelEvent | None = None,
    stall_seconds: float = STALL_SECONDS,
    offset: int = 0,
) -> None:
    """Read a copy back, and compare its bytes with those of the source.

    A hole equals zeros, and costs nothing. Blocks the calling native thread as
    copy() does; the parameters are those of copy().

    :param offset: where in the destination to begin
    :raises: CopyError if either end fails, or if they differ
    :raises: Cancelled if ``cancel`` was set
    """
    path = destination.path()

    def check(queue: _Queue) -> None:
        _compare(VolumeSource(destination, 'destination', offset), length,
                 queue)

    _run(source, path, length, check, cancel, stall_seconds)


class MemorySource:
    """Bytes in memory."""
    path = kind = 'memory'

    def __init__(self, data: bytes):
        self._data = data

    def chunks(self, length: int) -> Chunks:
        """Yield the first ``length`` bytes, a message at a time."""
        if length > len(self._data):
            raise errors.CopyError(
                'source', self.path, 0, f'it has {len(self._data)} bytes')
        for start in range(0, length, MESSAGE_BYTES):
            yield self._data[start:min(start + MESSAGE_BYTES, length)]


class _Zeros:
    """Nothing but zeros."""
    path = kind = 'memory'

    def chunks(self, length: int) -> Chunks:
        yield length


class FileSource:
    """A file of this host, read without libvirt.

    Without this host's libvirtd, reading costs half as much CPU. Reading waits
    for the writer, so no window is needed.
    """
    kind = 'file'

    def __init__(self, path: str, offset: int = 0):
        """Name what to read; nothing is opened yet.

        :param offset: where in the file to begin
        """
        self.path = path
        self._offset = offset

    def chunks(self, length: int) -> Chunks:
        """Yield the ``length`` bytes from the offset on."""
        position = self._offset
        end = self._offset + length
        try:
            with open(self.path, 'rb', buffering=0) as file:
                while position < end:
                    for chunk in self._section(file.fileno(), position, end):
                        position += length_of(chunk)
                        yield chunk
        except OSError as error:
            raise self._error(position, error) from error

    def _section(self, file: int, position: int, end: int) -> Chunks:
        """Yield the hole at the position, if there is one, and the data."""
        start = seek(file, position, os.SEEK_DATA, end)
        if start == end and os.fstat(file).st_size < end:
            raise self._shrunk(position)
        if start > position:
            yield start - position
        stop = seek(file, start, os.SEEK_HOLE, end)
        while start < stop:
            data = os.pread(file, min(MESSAGE_BYTES, stop - start), start)
            if not data:
                raise self._shrunk(start)
            start += len(data)
            yield data

    def _shrunk(self, position: int) -> errors.CopyError:
        return self._error(
            position, 'the file ends there; did the volume change its size?')

    def _error(self, position: int, reason: ty.Any) -> errors.CopyError:
        return errors.CopyError(
            'source', self.path, position - self._offset, reason)


class VolumeSource:
    """A volume that is read through libvirt."""
    kind = 'volume'

    def __init__(self, volume: 'libvirt.virStorageVol', end: str = 'source',
                 offset: int = 0):
        """Name what to read; blocks while libvirt looks up the volume.

        :param end: the ``end`` of the errors that this source raises
        :param offset: where in the volume to begin
        """
        self.path: str = volume.path()
        self._volume = volume
        self._end = end
        self._offset = offset

    def chunks(self, length: int) -> Chunks:
        """Yield the ``length`` bytes from the offset on, window by window."""
        done = 0
        try:
            while done < length:
                size = min(WINDOW_BYTES, length - done)
                for chunk in self._window(self._offset + done, size):
                    done += length_of(chunk)
                    yield chunk
        except libvirt.libvirtError as error:
            raise errors.CopyError(
                self._end, self.path, done, error) from error

    def _window(self, offset: int, size: int) -> Chunks:
        """Yield the chunks of one window, ``size`` bytes in all."""
        left = size
        stream = self._volume.connect().newStream(0)
        # No context manager: as a generator is closed in it, contextlib of
        # Python 3.10 keeps the frames until garbage is collected.
        try:
            self._volume.download(
                stream, offset, size,
                libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
            while chunk := _receive(stream):
                left -= length_of(chunk)
                if left < 0:
                    raise self._resized(offset, size, left)
                yield chunk
            stream.finish()
        except BaseException as error:
            _abort(stream, error)
            raise
        # Check after finish(), which reports a read error that ended the
        # window early.
        if left:
            raise self._resized(offset, size, left)

    def _resized(self, offset: int, size: int, left: int) -> errors.CopyError:
        return errors.CopyError(
            self._end, self.path, offset + size - left,
            f'the window of {size} bytes at {offset} came with {size - left} '
            f'bytes; did the volume change its size?')


class VolumeSink:
    """A volume, or a range of it, that is written through libvirt.

    The volume must be as large as the range, and a sparse range must be all a
    hole before. Use a connection that nothing else uses: a daemon takes few
    requests at a time from a connection, and a copy can starve all others,
    keepalive included.

    A range is written in sections, one after the other, each of them an
    upload. All but the last end in data: a hole at the end would truncate the
    volume. See SECTION_BYTES.

    :ivar kept: bytes that the daemon has written for certain
    """
    most_hole = 0

    def __init__(
        self,
        volume: 'libvirt.virStorageVol',
        offset: int = 0,
        length: int = 0,
        sparse: bool = True,
    ):
        """Name what to write; blocks while libvirt looks up the volume.

        :param offset: where in the volume to begin
        :param length: bytes to write, at most; 0 for no limit
        :param sparse: whether to leave holes. A hole at the end of a sparse
            range truncates the volume there: pass False for a range that is
            not at the end of the volume.
        """
        self.path: str = volume.path()
        self.sparse = sparse
        self.kept = 0
        self._volume = volume
        self._done = 0
        self._sections = _Sections()
        self._stream: ty.Any = None
        self._place(offset, length)

    def _place(self, offset: int, length: int) -> None:
        self._position = offset
        self._end = length and offset + length

    def open(self) -> None:
        """Begin the upload, if it has not begun; data() and hole() do, too.

        An upload that was begun goes on when the pool is destroyed.

        :raises: CopyError
        """
        if self._stream is not None:
            return
        try:
            stream = self._volume.connect().newStream(0)
            self._volume.upload(
                stream, self._position,
                self._end and self._end - self._position,
                libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM
                if self.sparse else 0)
        except libvirt.libvirtError as error:
            raise self._error(error) from error
        self._stream = stream

    def move(self, offset: int, length: int) -> None:
        """End the upload, and write another range of the volume next."""
        self._end_section()
        self._place(offset, length)

    def _end_section(self) -> None:
        with self._sections.ending():
            self.finish()

    def data(self, data: bytes) -> None:
        """Send the next bytes."""
        self.open()
        try:
            # virStreamSend() may take only a part of the bytes.
            sent = self._stream.send(data)
            while sent < len(data):
                sent += self._stream.send(data[sent:])
        except libvirt.libvirtError as error:
            raise self._error(error) from error
        self._count(len(data))
        if self._sections.is_over(len(data)):
            self._end_section()

    def hole(self, length: int) -> None:
        """Send a hole."""
        self.open()
        try:
            self._stream.sendHole(length)
        except libvirt.libvirtError as error:
            raise self._error(error) from error
        self._count(length)

    def _count(self, length: int) -> None:
        self._done += length
        self._position += length

    def finish(self) -> None:
        """End the upload; the daemon has then written all bytes."""
        # Nothing was sent for an empty file: an upload of length 0 would be
        # one without a limit.
        if self._stream is None:
            return
        try:
            self._stream.finish()
        except libvirt.libvirtError as error:
            raise self._error(error) from error
        self._stream = None
        self.kept = self._done

    def abort(self) -> None:
        """End the upload after an error."""
        # If finish() failed the stream is already closed, and abort()
        # normally fails too.
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

    def _error(self, reason: 'libvirt.libvirtError') -> errors.CopyError:
        return errors.CopyError(
            'destination', self.path, self._done, reason, self.kept)


class DeviceSink(VolumeSink):
    """A block device, or a range of it, that is written through libvirt.

    A new logical volume shows what was on the disk before, which may be
    another tenant's. libvirt writes zeros over it where a hole comes.
    """
    most_hole = HOLE_BYTES

    def __init__(self, volume: 'libvirt.virStorageVol', offset: int = 0,
                 length: int = 0):
        super().__init__(volume, offset, length)
        self._zeros = 0

    def hole(self, length: int) -> None:
        """Have zeros written; wait for them once there are many."""
        super().hole(length)
        self._zeros += length
        if self._zeros >= self.most_hole:
            self._zeros = 0
            self._end_section()


class _Sections:
    """Tells when to end a section; see SECTION_BYTES."""

    def __init__(self) -> None:
        # The least that an end took: others waited for more than the link.
        self._cost = 0.0
        self._begin()

    def _begin(self) -> None:
        self._sent = 0
        self._started = time.monotonic()

    def is_over(self, sent: int) -> bool:
        """Whether to end the section after some more bytes of data."""
        self._sent += sent
        seconds = time.monotonic() - self._started
        return seconds >= SECTION_COSTS * self._cost and (
            self._sent >= SECTION_BYTES or seconds >= SECTION_SECONDS)

    @contextlib.contextmanager
    def ending(self) -> ty.Iterator[None]:
        """Measure what the end of a section costs."""
        started = time.monotonic()
        yield
        self._begin()
        cost = self._started - started
        self._cost = min(cost, self._cost or cost)


class RangesSink:
    """Ranges of a volume that are written through libvirt, one by one.

    The bytes of all ranges come one after the other. What is outside of the
    ranges stays, and so does the length of the volume, unless a range ends
    beyond it. libvirtd takes 1 ms for each range.
    """
    sparse = False
    most_hole = 0

    def __init__(
        self, volume: 'libvirt.virStorageVol',
        ranges: ty.Iterable[tuple[int, int]],
    ):
        """Name what to write; blocks while libvirt looks up the volume.

        :param ranges: (start, end) of each; none is empty
        """
        self._sink = VolumeSink(volume, sparse=False)
        self.path = self._sink.path
        self._ranges = iter(ranges)
        self._left = 0

    def data(self, data: bytes) -> None:
        """Send the next bytes, possibly to several ranges."""
        while data:
            if not self._left:
                start, end = next(self._ranges)
                self._left = end - start
                self._sink.move(start, self._left)
            part, data = data[:self._left], data[self._left:]
            self._sink.data(part)
            self._left -= len(part)

    def hole(self, length: int) -> None:
        raise NotImplementedError()

    def finish(self) -> None:
        """End the last upload."""
        self._sink.finish()

    def abort(self) -> None:
        """End the upload of a range after an error."""
        self._sink.abort()


def wipe(
    volume: 'libvirt.virStorageVol',
    start: int,
    end: int,
    cancel: CancelEvent | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Write zeros over a range of a block device.

    virStorageVolWipe() does all of it in one call, which has no bound.

    :param start: offset of the first byte
    :param end: offset behind the last byte
    :raises: CopyError, Cancelled
    """
    length = end - start
    if length > 0:
        copy(_Zeros(), DeviceSink(volume, start, length), length, None,
             cancel, stall_seconds)


def set_length(
    volume: 'libvirt.virStorageVol',
    length: int,
    cancel: CancelEvent | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Truncate a volume, or extend it by a hole.

    virStorageVolResize() is of no use: of a volume that holds a qcow2 image
    it resizes the disk within.

    :param length: bytes that the volume will have, at least 1
    :raises: CopyError, Cancelled
    """
    # A sparse upload truncates the volume where it ends in a hole.
    sink = VolumeSink(volume, length - 1, 1)
    copy(MemorySource(b'\0'), sink, 1, None, cancel, stall_seconds)


def length_of(chunk: Chunk) -> int:
    """Bytes of the file that a chunk stands for."""
    return chunk if isinstance(chunk, int) else len(chunk)


def seek(file: int, offset: int, whence: int, end: int) -> int:
    """The next data or hole of a file, ``end`` if none is before that.

    A block device has no holes.

    :param file: descriptor
    :param offset: where to begin, in bytes
    :param whence: SEEK_DATA or SEEK_HOLE
    :raises: OSError
    """
    try:
        return min(os.lseek(file, offset, whence), end)
    except OSError as error:
        if error.errno == errno.EINVAL and whence == os.SEEK_DATA:
            return min(offset, end)
        if error.errno not in (errno.ENXIO, errno.EINVAL):
            raise
        return end


def _is_readable(path: str, length: int) -> bool:
    """Whether this process may read a file or device of that length."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return False
        with open(path, 'rb', buffering=0) as file:
            return file.seek(0, os.SEEK_END) == length
    except OSError:
        return False


def _receive(stream: 'libvirt.virStream') -> Chunk:
    """The next data, or length of a hole; empty at the end."""
    data = stream.recvFlags(
        RECEIVE_BYTES, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE)
    return stream.recvHole() if data == _AT_HOLE else data


def _abort(end: 'Sink | libvirt.virStream', error: BaseException) -> None:
    """Abort a stream or a sink; its error must not hide the first one."""
    try:
        end.abort()
    except Exception as second:
        errors.add_note(error, f'Aborting failed too: {second}')


class _Queue:
    """Chunks on their way from the reader to the writer.

    Holds at most ``budget`` bytes of data and one more chunk. Once the queue
    is full, the reader waits until half of it is gone: waking the reader for
    each chunk costs more than reading the chunk does.

    :ivar full: whether the reader must wait for the writer
    :ivar held: whether the writer waits for a turn of the bandwidth
    :ivar put_in: bytes that came in so far, holes included
    :ivar taken: bytes that went out so far, holes included
    :ivar closed: whether no chunk will follow
    :ivar error: the first error of either side, which ends both
    """

    def __init__(self, budget: int):
        self.full = False
        self.held = False
        self.closed = False
        self.put_in = 0
        self.taken = 0
        self.error: Exception | None = None
        self._changed = threads.native_threading().Condition()
        self._chunks: collections.deque[Chunk] = collections.deque()
        self._budget = budget
        self._bytes = 0

    @property
    def moved(self) -> int:
        """Grows with every chunk that comes in or goes out."""
        return self.put_in + self.taken

    def put(self, chunk: Chunk) -> None:
        """Append a chunk, waiting while the queue is full."""
        with self._changed:
            self._wait_for(lambda: not self.full)
            self._chunks.append(chunk)
            self._bytes += self._cost(chunk)
            self.full = self._bytes >= self._budget
            self.put_in += length_of(chunk)
            self._changed.notify_all()

    def __iter__(self) -> ty.Iterator[Chunk]:
        """Yield the chunks until the queue is closed and empty."""
        while True:
            with self._changed:
                self._wait_for(lambda: bool(self._chunks) or self.closed)
                if not self._chunks:
                    return
                chunk = self._chunks.popleft()
                self._bytes -= self._cost(chunk)
                self.taken += length_of(chunk)
                if self.full and self._bytes <= self._budget // 2:
                    self.full = False
                    self._changed.notify_all()
            yield chunk

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Make both sides stop. The first error of the two is kept."""
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def end(self) -> Exception:
        """Return the first error, and let it not lead back to this queue.

        A side that has not stopped yet does so with another error.
        """
        with self._changed:
            error, self.error = self.error, errors.Cancelled()
        assert error is not None
        return error

    def wait_until(self, moment: float) -> None:
        """Hold the writer up to a time.monotonic() or the first error."""
        with self._changed:
            self.held = True
            self._wait_for(lambda: False, moment - time.monotonic())
            self.held = False

    def _wait_for(self, ready: ty.Callable[[], bool],
                  seconds: float | None = None) -> None:
        self._changed.wait_for(
            lambda: self.error is not None or ready(), seconds)
        if self.error is not None:
            raise self.error

    @staticmethod
    def _cost(chunk: Chunk) -> int:
        # A hole costs next to no memory, but 20,000 of them in a row should
        # still wait for the writer.
        return 64 if isinstance(chunk, int) else len(chunk)


def _run(
    source: Source,
    destination_path: str,
    length: int,
    take: ty.Callable[[_Queue], None],
    cancel: CancelEvent | None,
    stall_seconds: float,
    paused: ty.Callable[[], None] | None = None,
) -> None:
    """Read a source in one thread, and process its chunks in another.

    :param destination_path: path of the destination, for errors
    :param take: processes the chunks of the queue
    """
    queue = _Queue(QUEUE_BYTES)
    if cancel is not None and cancel.is_set():
        queue.fail(errors.Cancelled())

    def read() -> None:
        _read(source, length, queue)

    def write() -> None:
        take(queue)

    workers: list[ty.Any] = []
    try:
        for function in read, write:
            workers.append(_start(function, queue))
    except RuntimeError as error:
        # There are too many threads. The first one must not wait for ever.
        queue.fail(error)
    last_move, moved = time.monotonic(), 0
    while queue.error is None and any(
            worker.is_alive() for worker in workers):
        workers[-1].join(POLL_SECONDS)
        now = time.monotonic()
        if queue.held or queue.moved != moved:
            last_move, moved = now, queue.moved
        if paused and now - last_move > PAUSE_SECONDS:
            paused()
            paused = None
        if cancel is not None and cancel.is_set():
            queue.fail(errors.Cancelled())
        elif now - last_move > stall_seconds:
            queue.fail(_stalled(
                source.path, destination_path, queue, stall_seconds))
    if queue.error is not None:
        _join(workers, END_SECONDS)
        if isinstance(queue.error, errors.CopyError):
            queue.error.has_ended = not any(
                worker.is_alive() for worker in workers)
        raise queue.end()


def _start(function: ty.Callable[[], None], queue: _Queue) -> ty.Any:
    """Run a function in a native thread; its error fails the queue."""
    def run() -> None:
        try:
            function()
        except Exception as error:
            threads.forget_frames(error)
            queue.fail(error)

    return threads.start(run, 'volume-' + function.__name__)


def _join(workers: list[ty.Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))


def _stalled(
    source_path: str, destination_path: str, queue: _Queue, seconds: float,
) -> errors.CopyError:
    """The error of the end for which the other end waits."""
    reason = f'nothing moved for {seconds} seconds'
    if queue.full or queue.closed:
        return errors.CopyError(
            'destination', destination_path, queue.taken, reason)
    return errors.CopyError('source', source_path, queue.put_in, reason)


def _read(source: Source, length: int, queue: _Queue) -> None:
    with contextlib.closing(source.chunks(length)) as chunks:
        for chunk in chunks:
            if isinstance(chunk, int):
                queue.put(chunk)
                continue
            for part in _without_zeros(chunk):
                queue.put(part)
    queue.close()


def _without_zeros(data: bytes) -> ty.Iterator[Chunk]:
    """Cut data into the parts to send, and holes for the zeros between."""
    # startswith() compares in place and stops at the first byte that is not
    # zero: in random data this costs 8 ms of CPU per GiB.
    if _ZEROS.startswith(data):
        yield len(data)
        return
    start = 0
    for block in range(0, len(data), ZERO_BYTES):
        if data.startswith(_ZERO_BLOCK, block):
            if start < block:
                yield data[start:block]
            yield ZERO_BYTES
            start = block + ZERO_BYTES
    if start < len(data):
        yield data[start:]


def _write(
    sink: Sink,
    queue: _Queue,
    progress: Progress | None = None,
    bandwidth: Bandwidth | None = None,
) -> int:
    """Write the chunks of the queue; return the bytes of data among them."""
    done = wire = 0
    chunks = (_merged(queue, sink.most_hole) if sink.sparse else
              _filled(queue))
    chunks = _with_long_message(chunks)
    if bandwidth:
        chunks = bandwidth.limit(chunks, queue.wait_until)
    try:
        for chunk in chunks:
            if isinstance(chunk, int):
                sink.hole(chunk)
            else:
                sink.data(chunk)
                wire += len(chunk)
            done += length_of(chunk)
            if progress:
                progress(done, wire)
        sink.finish()
    except BaseException as error:
        _abort(sink, error)
        raise
    return wire


def _merged(chunks: ty.Iterable[Chunk],
            most: int = 0) -> ty.Iterator[Chunk]:
    """Merge holes in a row.

    Windows cut holes into pieces, and several holes in a row could hang a
    daemon older than libvirt 10.1.0.

    :param most: bytes of the longest hole to yield, 0 for no limit
    """
    hole = 0
    for chunk in chunks:
        if isinstance(chunk, int):
            hole += chunk
            while most and hole >= most:
                yield most
                hole -= most
            continue
        if hole:
            yield hole
            hole = 0
        yield chunk
    if hole:
        yield hole


def _filled(chunks: ty.Iterable[Chunk]) -> ty.Iterator[Chunk]:
    """Replace holes by zeros."""
    for chunk in chunks:
        if isinstance(chunk, int):
            for start in range(0, chunk, MESSAGE_BYTES):
                yield _ZEROS[:chunk - start]
        else:
            yield chunk


def _with_long_message(chunks: ty.Iterable[Chunk]) -> ty.Iterator[Chunk]:
    """Join the first chunks that make a message of LONG_MESSAGE_BYTES."""
    chunks = iter(chunks)
    start = b''
    for chunk in chunks:
        if isinstance(chunk, int):
            if start:
                yield start
                start = b''
            yield chunk
        else:
            start += chunk
            if len(start) >= LONG_MESSAGE_BYTES:
                break
    if start:
        yield start
    yield from chunks


def _compare(destination: Source, length: int, queue: _Queue) -> None:
    """Compare the chunks of the queue with those of a volume.

    :raises: CopyError
    """
    done = 0
    with contextlib.closing(destination.chunks(length)) as chunks:
        there: Chunk = 0
        for here in queue:
            while here:
                there = there or next(chunks)
                size = min(length_of(here), length_of(there))
                first, here = _cut(here, size)
                second, there = _cut(there, size)
                if not _same(first, second):
                    raise errors.CopyError(
                        'destination', destination.path, done,
                        'it differs from the source')
                done += size


def _cut(chunk: Chunk, size: int) -> tuple[Chunk, Chunk]:
    if isinstance(chunk, int):
        return size, chunk - size
    return chunk[:size], chunk[size:]


def _same(first: Chunk, second: Chunk) -> bool:
    """Whether two chunks of one length read the same; holes are zeros."""
    if isinstance(first, int):
        return isinstance(second, int) or _ZEROS.startswith(second)
    if isinstance(second, int):
        return _ZEROS.startswith(first)
    return first == second
