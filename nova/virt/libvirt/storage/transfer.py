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

"""Take a server's files from this host to another one.

A connection that is lost is opened again, and the copy goes on from what the
destination has for certain: see :meth:`Transfer._persist`.

Every call here blocks. Under eventlet call it through
:func:`threads.off_hub`; nothing here logs, for the same reason as in
``stream``.
"""

import contextlib
import dataclasses
import functools
import os
import time
import typing as ty

import tenacity

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import daemon as libvirt_daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site as server_site
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage.threads import libvirt

CONF = nova.conf.CONF

# A file up to this length goes over the connection that is open: a connection
# of its own costs more than it saves.
SHORT_BYTES = 1024 * 1024

# Seconds before a lost connection is opened again: at first, so that a daemon
# that has ended it is done with what came over it, and at most.
RECONNECT_SECONDS = 1
MOST_RECONNECT_SECONDS = 5

_T = ty.TypeVar('_T')

_ALIVE_REMEDY = ('The daemon is alive and may wait for storage. Check the '
                 'kernel log on that host.')
_LOG_REMEDY = "Check libvirt's log on both hosts."
_FILE_REMEDY = 'Check the file, and the kernel log on this host.'


class Watch(ty.Protocol):
    """The receiver of a transfer's progress.

    All methods are called in the thread that copies: they must return soon
    and not log.
    """

    def begin(self, total: int) -> None:
        """Called before the first file.

        :param total: bytes of all files, holes included
        """

    def note(self, name: str, done: int, wire: int) -> None:
        """Called with the bytes of a file done and sent so far."""

    def end(self, name: str, result: stream.Result) -> None:
        """Called when a file has arrived."""

    def changed(self, name: str, changed: int, seconds: float) -> None:
        """Called with the bytes of a file that changed since its last copy.

        :param seconds: it took to find that out
        """

    def end_pass(self, name: str, result: stream.Result) -> None:
        """Called when what had changed in a file has arrived."""

    def lose(self, error: Exception, seconds: int) -> None:
        """Called when a connection was lost, before it is opened again.

        :param seconds: for how long that is tried
        """


@dataclasses.dataclass
class _Early:
    """The copy of a disk that was made while the server ran.

    :ivar tracked: finds what has changed since
    :ivar path: of the copy
    :ivar length: bytes of the copy
    :ivar passes: how often changes were sent
    """
    tracked: changes.Changes
    path: str
    length: int
    passes: int = 0


class _Copy:
    """A copy of some ranges of a file, which may take several attempts.

    :ivar path: of the volume that it goes to
    :ivar rest: what to copy in this attempt
    :ivar done: bytes that earlier attempts have copied
    :ivar sent: bytes of data that all attempts have sent
    """

    def __init__(self, ranges: changes.Ranges, block: int,
                 progress: stream.Progress):
        """Begin with nothing.

        :param block: see Changes.block
        """
        self.path = ''
        self.rest = ranges
        self.done = 0
        self._ranges = ranges
        self._block = block
        self._progress = progress
        self._started = time.monotonic()
        self.sent = self._sent_before = 0

    def note(self, done: int, wire: int) -> None:
        self.sent = self._sent_before + wire
        self._progress(self.done + done, self.sent)

    def keep(self, error: Exception) -> bool:
        """Go on after an error from what the destination has for certain.

        :returns: whether this attempt has come further than the last one
        """
        kept = error.kept if isinstance(error, errors.CopyError) else 0
        self._sent_before = self.sent
        self.rest = self._ranges.after(self.done + kept, self._block)
        before, self.done = self.done, self._ranges.total - self.rest.total
        return self.done > before

    def result(self, last: stream.Result) -> stream.Result:
        """The result of all attempts, of which this was the last one."""
        return stream.Result(
            self._ranges.total, self.sent,
            time.monotonic() - self._started, last.source)


class Transfer:
    """The files of one server on their way from one site to another.

    :ivar there: the site on the destination host
    :ivar heads: digests of what was sent last, by path on the destination
    """

    def __init__(
        self,
        here: server_site.Site,
        there: server_site.Site,
        files: list[layout.File],
        name: str,
        bandwidth: stream.Bandwidth | None = None,
        has_variables: bool = False,
    ):
        """Say what is to go where; nothing happens yet.

        :param here: the site on this host
        :param files: the plan, see Layout.plan()
        :param name: of the server's domain
        :param bandwidth: limit that all transfers of this host share
        :param has_variables: whether its UEFI variables will go along, late
        """
        self.there = there
        self.heads: dict[str, str] = {}
        self._here = here
        self._places = here.layout
        self._files = files
        self._name = name
        self._bandwidth = bandwidth
        self._early: dict[str, _Early] = {}
        self._passes: changes.Passes | None = None
        # Names of the files that may be there since an earlier copy, or since
        # an attempt to create them whose answer was lost.
        self._created: set[str] = set()
        # Keys of logical volumes whose rest was wiped, by name.
        self._wiped: dict[str, str] = {}
        self._is_closed = False
        # All disks may be in Ceph or in Cinder. Whatever is in the instance
        # directory there is in nobody's way then, as with Nova's own driver.
        self._is_empty = not (
            files or has_variables or here.layout.has_state())
        # _begin() sets both for each copy.
        self._cancel: stream.CancelEvent | None = None
        self._watch: Watch | None = None
        there.daemon.patience = (
            CONF.libvirt.vol_upload_migration_reconnect_timeout)

    def check(self, swap: int = 0) -> None:
        """Connect to both hosts; check that the other can take the server.

        Changes nothing on either.

        :param swap: bytes of a swap disk that the destination makes anew,
            where disks take up all their bytes
        :raises: HostError
        """
        with self._located(self._here.daemon):
            self._here.connect()
            # libvirt may spell the path of the pool another way.
            self._here.layout = self._places
            needed = {} if self._is_empty else layout.room(self._files)
            if layout.GROUP in needed:
                needed[layout.GROUP] += swap
            keys = self._here.group_keys()
        with self._located(self.there.daemon):
            self.there.connect()
            self.there.check_group(keys)
            self.there.check(self._places, self._name, needed)

    def ask(self, question: ty.Callable[..., _T], *args: ty.Any) -> _T:
        """Ask the destination something, before or after a migration.

        :param question: a method of Site that changes nothing
        :param args: more of what it takes
        :raises: HostError
        """
        with self._located(self.there.daemon):
            if not self.there.daemon.is_connected():
                self.there.connect()
            return question(self.there, *args)

    def may_change_place(self, place: str) -> bool:
        """Whether the destination wants disks in another place than here.

        It does not where it has the instance directory in common with this
        host.

        :param place: POOL or DIRECTORY
        :raises: HostError
        """
        return self.ask(
            lambda there: there.wants_files() == (place == layout.DIRECTORY)
            and not there.shares_directory(self._here.layout))

    def missing_bases(self, paths: ty.Iterable[str]) -> list[str]:
        """Which base images of this host the destination has to be sent.

        Nova's own driver there would do nothing with them.

        :param paths: of the base images
        :raises: HostError
        """
        def missing(there: server_site.Site) -> list[str]:
            if not there.has_driver():
                return []
            return [path for path in paths
                    if not there.has_base(os.path.basename(path))]

        return self.ask(missing)

    def claim(self) -> None:
        """Take possession of the names on the destination.

        :raises: HostError
        """
        if not (self.there.is_shared or self._is_empty):
            with self._located(self.there.daemon):
                self.there.claim()

    def precopy(self, cancel: stream.CancelEvent | None = None,
                watch: Watch | None = None) -> bool:
        """Copy the disks while the server runs; later, what it has changed.

        Call it as long as it sends anything. run() then copies only what has
        changed since. On this host nothing is made but unnamed files: see
        changes.Clone.

        :param cancel: stops the copy when set
        :returns: whether it has sent anything. The destination may still have
            that in its page cache
        :raises: HostError, Cancelled
        """
        self._begin(cancel, watch, is_patient=True)
        if self._passes is None:
            self._passes = changes.Passes(self._copy_disks())
            return bool(self._early)
        early = [(file, self._early[file.name]) for file in self._files
                 if file.name in self._early]
        changed = [self._look(*each) for each in early]
        if self._passes.another(sum(ranges.total for ranges in changed)):
            for each, ranges in zip(early, changed):
                with self._located(self.there.daemon, each[0].name):
                    self._send_changes(*each, ranges)
            return True
        # A copy that was lost is found out while the server still runs.
        for file, copied in early:
            with self._located(self.there.daemon, file.name):
                self._persist(functools.partial(
                    self.there.verify, file, copied.length))
        return False

    def _copy_disks(self) -> int:
        """Copy each disk once.

        :returns: bytes that were sent
        """
        with self._located(self._here.daemon):
            total = sum(map(self._here.length, self._files))
        if self._watch:
            self._watch.begin(total)
        sent = 0
        for file in self._files:
            with self._located(self.there.daemon, file.name):
                if _can_go_early(file):
                    sent += self._copy_early(file)
                elif file.place == layout.GROUP:
                    self._make_early(file)
        return sent

    def _look(self, file: layout.File, early: _Early) -> changes.Ranges:
        """Find what a server that runs has changed in a disk."""
        started = time.monotonic()
        with self._located(self.there.daemon, file.name):
            ranges = early.tracked.look(False, self._cancel, _stall_seconds())
        if self._watch:
            self._watch.changed(
                file.name, ranges.total, time.monotonic() - started)
        return ranges

    def run(self, cancel: stream.CancelEvent | None = None,
            watch: Watch | None = None,
            late: ty.Sequence[layout.File] = ()) -> None:
        """Copy every file of the plan; the server is off.

        When this returns all files have arrived and are complete. They need
        not be on stable storage yet: the destination sees to that before it
        starts the server.

        :param cancel: stops the copy when set
        :param late: files that go along and are there since the server is off
        :raises: HostError, Cancelled
        """
        if self._is_empty and not late:
            return
        self._begin(cancel, watch, is_patient=False)
        with self._located(self._here.daemon):
            if self._is_empty:
                raise errors.StorageError(
                    'the server got UEFI variables during its migration',
                    'Migrate it again.')
            files = [*self._files, *late, *self._here.vtpm(), self._record()]
            total = sum(map(self._here.length, files))
        if self._watch:
            self._watch.begin(total)
        self._copy_all(files)

    def send(self, cancel: stream.CancelEvent | None = None) -> None:
        """Copy the files of a server that is live migrated.

        They go under a claim that the destination made, and follows up on.

        :param cancel: stops the copy when set
        :raises: HostError, Cancelled
        """
        self._begin(cancel, None, is_patient=True)
        with self._located(self._here.daemon):
            self._here.connect()
            # libvirt may spell the path of the pool another way.
            self._here.layout = self._places
        with self._located(self.there.daemon):
            self.there.connect()
            self.there.join()
        try:
            self._copy_all(self._files)
        finally:
            with self._located(self.there.daemon):
                self.there.leave()

    def discard(self) -> None:
        """Delete what was made on the destination.

        :raises: HostError
        """
        if self._is_empty:
            return
        with self._located(self.there.daemon):
            self.there.discard()

    def close(self) -> None:
        """Forget the copies of disks; close the connections to both hosts.

        A copy that still runs, because nobody waits for it any more, fails.
        """
        self._is_closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._here.close)
            stack.callback(self.there.close)
            while self._early:
                stack.callback(self._early.popitem()[1].tracked.close)

    def formats(self) -> dict[str, str]:
        """The record of formats as the destination needs it."""
        return self._here.layout.record(self._files, self.there.layout)

    def _record(self) -> layout.File:
        return layout.File(
            layout.RECORD, layout.DIRECTORY, self._here.layout.record_path,
            data=layout.record_bytes(self.formats()))

    def _begin(self, cancel: stream.CancelEvent | None, watch: Watch | None,
               is_patient: bool) -> None:
        """Note what holds for the copy that begins.

        :param is_patient: see Daemon
        """
        self._cancel = cancel
        self._watch = watch
        self.there.daemon.is_patient = is_patient

    def _copy_all(self, files: list[layout.File]) -> None:
        for file in files:
            with self._located(self.there.daemon, file.name):
                self._move(file)
        self._send_heads([file for file in files if file.has_hostile_head])

    def _move(self, file: layout.File) -> None:
        """Create a file on the destination, copy it, look it up again."""
        if file.is_directory:
            self._persist(lambda: self.there.make_directory(file))
            return
        early = self._early.get(file.name)
        if early:
            ranges = early.tracked.look(True, self._cancel, _stall_seconds())
            # Zeros that came in the place of data have to be sent, too.
            if ranges.total <= file.allocation():
                self._send_changes(file, early, ranges)
                self._verify(file, early.path, early.length)
                return
        length = self._here.length(file)
        copy = self._copy(
            file, length, lambda rest: self._open(file, length - rest.total))
        self._verify(file, copy.path, length)

    def _open(self, file: layout.File, offset: int) -> stream.Source:
        try:
            return self._here.open(file, offset)[0]
        except TimeoutError:
            raise
        except (OSError, libvirt.libvirtError) as error:
            raise errors.CopyError(
                'source', file.path, offset, error) from error

    def _verify(self, file: layout.File, path: str, length: int) -> None:
        skip = file.head_bytes

        def verify() -> None:
            if length > skip and (
                    CONF.libvirt.vol_upload_migration_verify == 'checksum'):
                stream.compare(
                    self._open(file, skip), self._find(path),
                    length - skip, self._cancel, self._stall_seconds(), skip)
            self.there.verify(file, length)

        self._persist(verify)

    def _copy(
        self, file: layout.File, length: int,
        read: ty.Callable[[changes.Ranges], stream.Source],
        block: int = 1,
    ) -> _Copy:
        """Create a file and copy it but for a hostile head, which goes last.

        :param length: bytes of the file
        :param read: opens what is to be copied, which ends with the file
        :param block: see Changes.block
        """
        whole = changes.Ranges()
        if length > file.head_bytes:
            whole.add(file.head_bytes, length)

        def note(done: int, wire: int) -> None:
            if self._watch:
                self._watch.note(file.name, done, wire)

        copy = _Copy(whole, block, note)

        def go_on() -> None:
            if not copy.done:
                copy.path = self._create(file, length)
            if whole.total:
                result = self._upload(copy, file, length, read)
                if self._watch:
                    self._watch.end(file.name, copy.result(result))

        self._persist(go_on, copy)
        if file.place == layout.GROUP:
            self._wipe_rest(file, length)
        return copy

    def _create(self, file: layout.File, length: int) -> str:
        """Create a file, and return the path of its volume."""
        again = file.name in self._created
        self._created.add(file.name)
        return self.there.create(file, length, again).path

    def _make_early(self, file: layout.File) -> None:
        """Make a logical volume while the server runs, if only that can be.

        A resize may add more to it than has to be copied.
        """
        length = self._here.length(file)
        self._persist(lambda: self._create(file, length))
        self._wipe_rest(file, length)

    def _wipe_rest(self, file: layout.File, length: int) -> None:
        """Overwrite what a logical volume has beyond what is copied, once."""
        self._wiped[file.name] = self._persist(functools.partial(
            self.there.wipe_rest, file, length,
            self._wiped.get(file.name, ''), self._cancel))

    def _upload(
        self, copy: _Copy, file: layout.File, length: int,
        read: ty.Callable[[changes.Ranges], stream.Source],
    ) -> stream.Result:
        """Copy the rest of a file to the end of its volume."""
        left = copy.rest.total
        is_device = file.place == layout.GROUP
        sink_class = stream.DeviceSink if is_device else stream.VolumeSink
        with self._writing(copy.path, left) as (target, paused):
            if copy.done and not is_device:
                # Data of the rest that an earlier attempt has sent may be
                # there, and would stay where there are holes now.
                stream.set_length(
                    target, length - left, self._cancel,
                    self._stall_seconds())
            return stream.copy(
                read(copy.rest),
                sink_class(target, length - left, left), left, copy.note,
                self._cancel, bandwidth=self._bandwidth, paused=paused,
                stall_seconds=self._stall_seconds())

    def _copy_early(self, file: layout.File) -> int:
        """Copy a disk in use.

        :returns: bytes that were sent
        """
        tracked = changes.track(
            file.path, os.path.dirname(file.path), file.head_bytes,
            stall_seconds=_stall_seconds())
        with contextlib.ExitStack() as stack:
            stack.callback(tracked.close)
            early = _Early(tracked, '', tracked.length)
            self._early[file.name] = early
            if self._is_closed:
                raise errors.Cancelled()
            stack.pop_all()
        copy = self._copy(file, early.length, tracked.source,
                          block=tracked.block)
        early.path = copy.path
        return copy.sent

    def _send_changes(self, file: layout.File, early: _Early,
                      ranges: changes.Ranges) -> None:
        """Copy what the last look has found over an earlier copy."""
        early.passes += 1
        name = f'{file.name}, pass {early.passes}'

        def note(_done: int, wire: int) -> None:
            # All bytes of the file are counted already.
            if self._watch:
                self._watch.note(name, 0, wire)

        copy = _Copy(ranges, early.tracked.block, note)

        def go_on() -> stream.Result:
            with self._writing(early.path, copy.rest.total) as (
                    target, paused):
                return changes.send(
                    early.tracked, copy.rest, target, early.length,
                    self._cancel, self._stall_seconds(), progress=copy.note,
                    bandwidth=self._bandwidth, paused=paused)

        result = self._persist(go_on, copy)
        early.length = early.tracked.length
        if self._watch:
            self._watch.end_pass(file.name, copy.result(result))

    def _send_heads(self, files: list[layout.File]) -> None:
        """Let go of the destination; send the starts of files, the last bytes.

        The destination's nova-compute compares their digests: nobody else can
        read them back there.
        """
        with self._located(self.there.daemon):
            self._persist(self.there.check_claim)
            sinks = self.there.settle(files)
        try:
            for file in files:
                self._send_head(file, sinks)
        finally:
            # A connection is not closed as long as it has a stream.
            for sink in sinks:
                with contextlib.suppress(libvirt.libvirtError, TimeoutError):
                    threads.within(libvirt_daemon.CLOSE_SECONDS, sink.abort)

    def _send_head(self, file: layout.File,
                   sinks: list[stream.VolumeSink]) -> None:
        """Send the start of a file to the first sink, which is taken out."""
        with self._located(self.there.daemon, file.name):
            head = self._here.head(file)
            # A hole is there already.
            data = head.rstrip(b'\0')
            stream.copy(
                stream.MemorySource(data), sinks.pop(0), len(data),
                cancel=self._cancel, stall_seconds=_stall_seconds())
            self.heads[self.there.layout.path(file)] = layout.digest(head)
        if self._watch:
            self._watch.note(f'head of {file.name}', len(head), len(head))

    @contextlib.contextmanager
    def _writing(self, path: str, length: int) -> ty.Iterator[ty.Any]:
        """A volume to write to, and what to do if the copy pauses."""
        daemon = self.there.daemon
        if length <= SHORT_BYTES:
            yield self._find(path), None
            return
        with daemon.writing(path) as volume:
            yield volume, lambda: daemon.begin_keepalive(volume.connect())

    def _find(self, path: str) -> ty.Any:
        return self.there.daemon.connection.storageVolLookupByPath(path)

    def _stall_seconds(self) -> float:
        return self.there.daemon.answer_seconds()

    def _persist(
        self, step: ty.Callable[[], _T], copy: _Copy | None = None,
    ) -> _T:
        """Do a step, and go on over new connections when one is lost.

        The patience begins anew with each attempt that comes further.

        :param step: may be done again
        :param copy: what it copies
        :raises: what ``step`` raised last, or why it cannot go on
        """
        lost = 0.0
        while True:
            try:
                return step()
            except Exception as error:
                if not self._may_go_on(error):
                    raise
                if (copy and copy.keep(error)) or not lost:
                    lost = time.monotonic()
                seconds = self.there.daemon.reconnect_seconds()
                if self._watch:
                    self._watch.lose(error, seconds)
                self._reconnect(error, lost + seconds, copy is not None)

    def _may_go_on(self, error: BaseException) -> bool:
        """Whether a step that failed can be done again."""
        if isinstance(error, errors.CopyError) and not (
                error.has_ended and error.end == 'destination'):
            return False
        return self.there.daemon.may_reconnect(error)

    def _reconnect(self, error: Exception, deadline: float,
                   is_copying: bool) -> None:
        """Connect to the destination again, as soon as that is possible.

        :param error: what the loss of the connection looked like
        :param deadline: time.monotonic() at which to give up
        :param is_copying: whether there is more to write
        :raises: ``error`` if it is too late
        :raises: StorageError, libvirtError if the destination refuses
        """
        def left() -> float:
            return max(0, deadline - time.monotonic())

        def is_cancelled() -> bool:
            return self._cancel is not None and self._cancel.is_set()

        def sleep(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end and not is_cancelled():
                threads.sleep(min(seconds, threads.POLL_SECONDS))
            if is_cancelled():
                raise errors.Cancelled()

        def connect() -> None:
            # The probe can be given up at any moment, as nothing depends on
            # the thread it is in.
            threads.within(left(), self.there.daemon.probe, is_cancelled)
            self.there.reconnect()
            if is_copying:
                self.there.check_room_left()

        sleep(min(RECONNECT_SECONDS, left()))
        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_exception(self._may_go_on),
                wait=tenacity.wait_exponential(max=MOST_RECONNECT_SECONDS),
                stop=lambda state: not left(),
                sleep=sleep, reraise=True)(connect)
        except Exception as second:
            if is_cancelled():
                raise errors.Cancelled() from second
            if left():
                raise
            raise error from second

    @contextlib.contextmanager
    def _located(self, daemon: libvirt_daemon.Daemon,
                 name: str = '') -> ty.Iterator[None]:
        """Say of an error which host and which file it is about, once.

        :raises: HostError, Cancelled
        """
        try:
            yield
        except errors.Cancelled:
            raise
        except Exception as error:
            remedy = getattr(error, 'remedy', '')
            reason: ty.Any = getattr(error, 'reason', error)
            if isinstance(error, TimeoutError):
                remedy = _ALIVE_REMEDY
            elif isinstance(error, (libvirt.libvirtError, errors.CopyError)):
                remedy = _LOG_REMEDY
            elif isinstance(error, OSError):
                remedy = _FILE_REMEDY
            # libvirt often says no more of a connection that its keepalive
            # has closed than that a socket is closed.
            if name and not daemon.is_connected():
                reason = f'the connection was lost: {reason}'
            raise errors.HostError(
                daemon.host, daemon.uri, reason, remedy, name) from error


def _can_go_early(file: layout.File) -> bool:
    """Whether to copy a file while the server runs.

    It has to be a disk, or its base image, that this process may read. A short
    file is copied in no time.
    """
    return ((file.format is not None or file.name.startswith(layout.BASE)) and
            CONF.libvirt.vol_upload_migration_direct_read and
            os.access(file.path, os.R_OK) and
            layout.length(file.path) > SHORT_BYTES)


def _stall_seconds() -> int:
    return CONF.libvirt.vol_upload_migration_stall_timeout
