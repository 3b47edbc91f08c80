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

"""Copy a storage volume from one libvirt connection to another.

A reader thread reads a :class:`Source` into a bounded queue, a writer thread
uploads (virStorageVolUpload) from it, and the thread that called :func:`copy`
watches both. The source is the volume's file where this process may read
that, and else libvirt (virStorageVolDownload). All are native threads: a
send() to a peer that stopped reading blocks its thread even on a stream made
with VIR_STREAM_NONBLOCK, so none of this may run on the eventlet hub. In
eventlet mode call :func:`copy` through :func:`threads.off_hub`, once for a
whole volume.

Nothing here logs: oslo.log may not be used in a native thread under eventlet.
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

try:
    import libvirt
except ImportError:
    libvirt = None

# The most bytes of data that recv() returns, for that is what libvirtd sends
# in one message (VIR_NET_MESSAGE_LEGACY_PAYLOAD_MAX less its header).
RECEIVE_BYTES = 262120

# How many bytes of data to send in one message. send() takes up to 32 MiB.
MESSAGE_BYTES = 512 * 1024

# How many bytes of data to send in one message of a copy, the first that has
# as many. The daemon that receives it frees memory of that size, and glibc's
# malloc(3) keeps twice as much from then on (M_TRIM_THRESHOLD). Without that
# the daemon gives back to the system what two messages took, and gets it
# again for the next ones: a third of the time of the thread that decrypts.
LONG_MESSAGE_BYTES = 4 * MESSAGE_BYTES

# With an event loop in the process, and nova-compute always runs one, libvirt
# reads a download into a client side queue that has no bound. Downloading a
# window at a time is what bounds it.
WINDOW_BYTES = 32 * 1024 * 1024

# What may wait between the reader and the writer.
QUEUE_BYTES = 8 * 1024 * 1024

# Zeros are looked for in blocks of so many bytes, and a block of nothing else
# is sent as a hole. A hole is a message, and makes two of the data around it:
# one of 16 KiB took twice the time of the data, one of 64 KiB up to a seventh
# more. This is the price of not storing them.
ZERO_BYTES = 32 * 1024

# How long a copy may stand still, in seconds, if nothing else is said.
STALL_SECONDS = 60

# After so many seconds without a byte a copy says that it pauses.
PAUSE_SECONDS = 2

# How often a copy is looked at, in seconds.
POLL_SECONDS = 0.2

# How long the threads of a copy that failed may take to end, in seconds. One
# that hangs in libvirt can not be ended. It is left behind, and ends when
# libvirt returns.
END_SECONDS = 0.5

# What virStreamRecvFlags() returns in front of a hole.
_AT_HOLE = -3

# What a copy takes at a time of a bandwidth that it shares with others: turns
# of one size make it a fair share, however small a message is.
TURN_BYTES = 256 * 1024

# How much of an unused bandwidth can be made up for, in seconds of it: more
# than a thread is late, and less than shows.
SLACK_SECONDS = 0.05

_ZEROS = bytes(MESSAGE_BYTES)
_ZERO_BLOCK = bytes(ZERO_BYTES)


class CancelEvent(ty.Protocol):
    """What tells a copy to stop; a threading.Event of either mode will do."""

    def is_set(self) -> bool:
        ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What a copy did.

    :ivar length: bytes of the volume, holes included
    :ivar wire: bytes of data that were sent, holes not included
    :ivar seconds: from the first request to the destination's last answer
    :ivar source: how the volume was read, the ``kind`` of its source
    """
    length: int
    wire: int
    seconds: float
    source: str


# Called from the copying thread with the bytes dealt with so far, holes
# included, and the bytes sent. Must return soon, and must not log.
Progress = ty.Callable[[int, int], None]


# What a copy reads: data, no more of it than a message carries, or the length
# of a hole.
Chunks = ty.Generator[bytes | int, None, None]


class Bandwidth:
    """A limit to what all copies together send that are given it.

    Each that has something to send takes turns with the others. Holes are
    free.
    """

    def __init__(self, rate: int):
        """Set the limit.

        :param rate: bytes per second; 0 for no limit
        """
        self._rate = rate
        self._lock = threads.native_threading().Lock()
        self._next = 0.0

    def take_turn(self) -> float:
        """The time.monotonic() from which on TURN_BYTES may be sent."""
        if not self._rate:
            return 0.0
        with self._lock:
            turn = max(self._next, time.monotonic() - SLACK_SECONDS)
            self._next = turn + TURN_BYTES / self._rate
            return turn


class Source(ty.Protocol):
    """Where a copy reads from; used by one thread.

    :ivar path: path of the volume
    :ivar kind: what is read: 'file' or 'volume'
    """
    path: str
    kind: str

    def chunks(self, length: int) -> Chunks:
        """Yield the first bytes of the volume, ``length`` in all.

        :raises: CopyError if that fails, or if there are not so many
        """
        ...


def open_source(
    volume: 'libvirt.virStorageVol', length: int, direct: bool = True,
) -> Source:
    """The better way to read a volume of this host.

    :param volume: the volume
    :param length: its length as libvirt tells it
    :param direct: whether its file may be read past libvirt, if this process
        has the right to, and what it finds at the path is of that length
    """
    path = volume.path()
    if direct and _is_readable(path, length):
        return FileSource(path)
    return VolumeSource(volume)


def copy(
    source: Source,
    destination: 'libvirt.virStorageVol',
    length: int,
    progress: Progress | None = None,
    cancel: CancelEvent | None = None,
    stall_seconds: float = STALL_SECONDS,
    bandwidth: Bandwidth | None = None,
    paused: ty.Callable[[], None] | None = None,
) -> Result:
    """Copy the first bytes of a volume into a fresh volume on another host.

    Holes stay holes, and runs of zeros become some. When this returns, every
    byte was read and counted and both streams were finished; the data need
    not be on stable storage yet. Blocks the calling native thread for as
    long as the copy takes.

    :param source: what to read
    :param destination: volume to write, at least ``length`` bytes long, all
        of it a hole, on a connection that nothing else uses
    :param length: bytes to copy
    :param progress: told how far the copy is
    :param cancel: stops the copy when set
    :param stall_seconds: how long the copy may stand still
    :param bandwidth: shared with the other copies that are given it
    :param paused: called when nothing moved for PAUSE_SECONDS, once
    :raises: CopyError if either end fails; the first error is the one raised
    :raises: Cancelled if ``cancel`` was set
    """
    started = time.monotonic()
    sent: list[int] = []

    def write(queue: _Queue) -> None:
        sent.append(_write(destination, length, queue, progress, bandwidth))

    _run(source, destination.path(), length, write, cancel, stall_seconds,
         paused)
    return Result(length, sent[0], time.monotonic() - started, source.kind)


def compare(
    source: Source,
    destination: 'libvirt.virStorageVol',
    length: int,
    cancel: CancelEvent | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Read a copy back, and compare its bytes with those of the source.

    It does not matter which zeros are holes, and holes cost nothing. Blocks
    the calling native thread as copy() does, whose parameters these are.

    :raises: CopyError if either end fails, or if they differ
    :raises: Cancelled if ``cancel`` was set
    """
    path = destination.path()

    def check(queue: _Queue) -> None:
        _compare(VolumeSource(destination, 'destination'), length, queue)

    _run(source, path, length, check, cancel, stall_seconds)


def _run(
    source: Source,
    destination_path: str,
    length: int,
    take: ty.Callable[['_Queue'], None],
    cancel: CancelEvent | None,
    stall_seconds: float,
    paused: ty.Callable[[], None] | None = None,
) -> None:
    """Read a source in one thread, and take what was read in another.

    :param destination_path: what to tell the path of the destination is
    :param take: takes it out of the queue
    """
    if cancel is not None and cancel.is_set():
        raise errors.Cancelled()
    queue = _Queue(QUEUE_BYTES)

    def read() -> None:
        _read(source, length, queue)

    def write() -> None:
        take(queue)

    workers = [_start(read, queue), _start(write, queue)]
    last_move, moved = time.monotonic(), 0
    while queue.error is None and any(
            worker.is_alive() for worker in workers):
        workers[-1].join(POLL_SECONDS)
        now = time.monotonic()
        if queue.moved != moved:
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
        raise queue.error


def write(
    destination: 'libvirt.virStorageVol',
    data: bytes,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Write a few bytes at the beginning of a fresh volume.

    :raises: CopyError if the destination fails
    """
    copy(_Memory(data), destination, len(data), stall_seconds=stall_seconds)


def _start(function: ty.Callable[[], None], queue: '_Queue') -> ty.Any:
    """Run a function in a native thread; what it raises fails the queue."""
    def run() -> None:
        try:
            function()
        except Exception as error:
            queue.fail(error)

    thread = threads.native_threading().Thread(
        target=run, name='volume-' + function.__name__, daemon=True)
    thread.start()
    return thread


def _join(threads: list[ty.Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))


def _stalled(
    source_path: str, destination_path: str, queue: '_Queue', seconds: float,
) -> errors.CopyError:
    """The error of the end that the other one waits for."""
    reason = f'nothing moved for {seconds} seconds'
    if queue.full or queue.closed:
        return errors.CopyError(
            'destination', destination_path, queue.taken, reason)
    return errors.CopyError('source', source_path, queue.put_in, reason)


class _Queue:
    """Chunks on their way from the reader to the writer.

    A chunk is either bytes, or the length of a hole as an int. Holds at most
    ``budget`` bytes of data and one chunk more. Once it is full the reader
    waits until half of that is gone: waking it for each chunk costs more than
    reading the chunk does.

    :ivar full: whether the reader has to wait for the writer
    :ivar put_in: bytes that came in so far, holes included
    :ivar taken: bytes that went out so far, holes included
    :ivar closed: whether no chunk will follow
    :ivar error: the first error of either side, which ends both
    """

    def __init__(self, budget: int):
        self.full = False
        self.closed = False
        self.put_in = 0
        self.taken = 0
        self.error: Exception | None = None
        self._changed = threads.native_threading().Condition()
        self._chunks: collections.deque[bytes | int] = collections.deque()
        self._budget = budget
        self._bytes = 0

    @property
    def moved(self) -> int:
        """Grows with every chunk that comes in or goes out."""
        return self.put_in + self.taken

    def put(self, chunk: bytes | int) -> None:
        """Append a chunk, waiting while the queue is full."""
        with self._changed:
            self._wait_for(lambda: not self.full)
            self._chunks.append(chunk)
            self._bytes += self._cost(chunk)
            self.full = self._bytes >= self._budget
            self.put_in += length_of(chunk)
            self._changed.notify_all()

    def __iter__(self) -> ty.Iterator[bytes | int]:
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
        """Say that no chunk will follow."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Make both sides stop. Of the two the first to fail counts."""
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def wait_until(self, moment: float) -> None:
        """Let time pass, up to a time.monotonic() or the first error."""
        with self._changed:
            self._wait_for(lambda: False, moment - time.monotonic())

    def _wait_for(self, ready: ty.Callable[[], bool],
                  seconds: float | None = None) -> None:
        self._changed.wait_for(
            lambda: self.error is not None or ready(), seconds)
        if self.error is not None:
            raise self.error

    @staticmethod
    def _cost(chunk: bytes | int) -> int:
        # A hole costs no memory to speak of, but 20,000 of them in a row
        # should still wait for the writer.
        return 64 if isinstance(chunk, int) else len(chunk)


def length_of(chunk: bytes | int) -> int:
    """Bytes of the volume that a chunk stands for."""
    return chunk if isinstance(chunk, int) else len(chunk)


class FileSource:
    """The file of a volume, read past libvirt.

    The daemon of this host has then no part in the copy, which is the half of
    what reading costs, and reading waits for the writer: no window is needed.
    """
    kind = 'file'

    def __init__(self, path: str):
        self.path = path

    def chunks(self, length: int) -> Chunks:
        done = 0
        try:
            # Not os.open(): eventlet's would make a hub in this thread.
            with open(self.path, 'rb', buffering=0) as file:
                while done < length:
                    for chunk in self._section(file.fileno(), done, length):
                        done += length_of(chunk)
                        yield chunk
        except OSError as error:
            raise errors.CopyError('source', self.path, done, error) from error

    def _section(self, file: int, offset: int, length: int) -> Chunks:
        """Yield the hole that may be at the offset, and the data after it."""
        start = _seek(file, offset, os.SEEK_DATA, length)
        if start == length and os.fstat(file).st_size < length:
            raise self._shrunk(offset)
        if start > offset:
            yield start - offset
        end = _seek(file, start, os.SEEK_HOLE, length)
        while start < end:
            data = os.pread(file, min(MESSAGE_BYTES, end - start), start)
            if not data:
                raise self._shrunk(start)
            start += len(data)
            yield data

    def _shrunk(self, size: int) -> errors.CopyError:
        return errors.CopyError(
            'source', self.path, size,
            'the file ends there; did the volume change its size?')


def _is_readable(path: str, length: int) -> bool:
    """Whether this process may read a file, and it is of that length."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != length:
            return False
        with open(path, 'rb', buffering=0):
            return True
    except OSError:
        return False


def _seek(file: int, offset: int, whence: int, length: int) -> int:
    """The next data or hole of a file, ``length`` if none is before that."""
    try:
        return min(os.lseek(file, offset, whence), length)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return length


class VolumeSource:
    """A volume that is read through libvirt."""
    kind = 'volume'

    def __init__(self, volume: 'libvirt.virStorageVol', end: str = 'source'):
        """Say what to read.

        :param end: whose errors a failure is one of
        """
        self.path: str = volume.path()
        self._volume = volume
        self._end = end

    def chunks(self, length: int) -> Chunks:
        done = 0
        try:
            while done < length:
                size = min(WINDOW_BYTES, length - done)
                for chunk in self._window(done, size):
                    done += length_of(chunk)
                    yield chunk
        except libvirt.libvirtError as error:
            raise errors.CopyError(
                self._end, self.path, done, error) from error

    def _window(self, offset: int, size: int) -> Chunks:
        """Yield the chunks of one window, ``size`` bytes in all."""
        left = size
        with _new_stream(self._volume) as stream:
            self._volume.download(
                stream, offset, size,
                libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
            while chunk := _receive(stream):
                left -= length_of(chunk)
                if left < 0:
                    raise self._resized(offset, size, left)
                yield chunk
        # Not before the end of the stream, which tells what went wrong.
        if left:
            raise self._resized(offset, size, left)

    def _resized(self, offset: int, size: int, left: int) -> errors.CopyError:
        return errors.CopyError(
            self._end, self.path, offset + size - left,
            f'the window of {size} bytes at {offset} came with {size - left} '
            f'bytes; did the volume change its size?')


class _Memory:
    """A few bytes."""
    path = kind = 'memory'

    def __init__(self, data: bytes):
        self._data = data

    def chunks(self, length: int) -> Chunks:
        yield self._data[:length]


def _receive(stream: 'libvirt.virStream') -> bytes | int:
    """The next data, or length of a hole; nothing at the end."""
    data = stream.recvFlags(
        RECEIVE_BYTES, libvirt.VIR_STREAM_RECV_STOP_AT_HOLE)
    return stream.recvHole() if data == _AT_HOLE else data


def _read(source: Source, length: int, queue: _Queue) -> None:
    """Put the chunks of a source into the queue."""
    with contextlib.closing(source.chunks(length)) as chunks:
        for chunk in chunks:
            if isinstance(chunk, int):
                queue.put(chunk)
                continue
            for part in _without_zeros(chunk):
                queue.put(part)
    queue.close()


def _without_zeros(data: bytes) -> ty.Iterator[bytes | int]:
    """Cut data into what has to be sent, and holes where it is all zeros.

    The destination is a fresh volume: what is not sent reads as zeros there.
    """
    # startswith() compares in place, and ends at the first byte that is not
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
    volume: 'libvirt.virStorageVol',
    length: int,
    queue: _Queue,
    progress: Progress | None = None,
    bandwidth: Bandwidth | None = None,
) -> int:
    """Upload the chunks of the queue; return the bytes of data sent."""
    done = wire = hole = allowed = 0
    # Its daemon has to be asked for it, and may be gone later.
    path = volume.path()
    if not length:
        # An upload of length 0 would mean one without a limit.
        return 0
    try:
        with _new_stream(volume) as stream:
            volume.upload(
                stream, 0, length,
                libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
            for chunk in _with_long_message(queue):
                if isinstance(chunk, int):
                    # Several holes in a row could hang a daemon older than
                    # libvirt 10.1.0, and windows cut holes into pieces.
                    hole += chunk
                    continue
                while bandwidth and wire + len(chunk) > allowed:
                    queue.wait_until(bandwidth.take_turn())
                    allowed += TURN_BYTES
                _send_hole(stream, hole)
                _send(stream, chunk)
                done += hole + len(chunk)
                wire += len(chunk)
                hole = 0
                if progress:
                    progress(done, wire)
            _send_hole(stream, hole)
            done += hole
            if progress:
                progress(done, wire)
    except libvirt.libvirtError as error:
        raise errors.CopyError('destination', path, done, error) from error
    return wire


def _with_long_message(queue: _Queue) -> ty.Iterator[bytes | int]:
    """Yield the chunks, one of them of LONG_MESSAGE_BYTES if there can be."""
    chunks = iter(queue)
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
        there: bytes | int = 0
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


def _cut(chunk: bytes | int, size: int) -> tuple[bytes | int, bytes | int]:
    if isinstance(chunk, int):
        return size, chunk - size
    return chunk[:size], chunk[size:]


def _same(first: bytes | int, second: bytes | int) -> bool:
    """Whether two chunks of one length read the same; holes are zeros."""
    if isinstance(first, int):
        return isinstance(second, int) or _ZEROS.startswith(second)
    if isinstance(second, int):
        return _ZEROS.startswith(first)
    return first == second


def _send_hole(stream: 'libvirt.virStream', length: int) -> None:
    if length:
        stream.sendHole(length)


def _send(stream: 'libvirt.virStream', data: bytes) -> None:
    """Send all of a chunk: virStreamSend() may take only a part of it."""
    sent = stream.send(data)
    while sent < len(data):
        sent += stream.send(data[sent:])


@contextlib.contextmanager
def _new_stream(
    volume: 'libvirt.virStorageVol',
) -> ty.Iterator['libvirt.virStream']:
    """A stream that is finished in the end, or aborted after an error."""
    stream = volume.connect().newStream(0)
    try:
        yield stream
        stream.finish()
    except BaseException as error:
        # Finishing may have failed, which ends the stream too: an abort that
        # is refused is then the rule, and the first error is the one to tell.
        try:
            stream.abort()
        except libvirt.libvirtError as abort_error:
            error.add_note(f'Aborting the stream failed: {abort_error}')
        raise
