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

Every call here blocks. Under eventlet call it through
:func:`threads.off_hub`; nothing here logs, for the same reason as in
``stream``.
"""

import contextlib
import dataclasses
import os
import time
import typing as ty

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import daemon as libvirt_daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import site as server_site
from nova.virt.libvirt.storage import stream

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF

# A file up to this length goes over the connection that is open: a connection
# of its own costs more than it saves.
SHORT_BYTES = 1024 * 1024

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


@dataclasses.dataclass
class _Early:
    """The copy of a disk that was made while the server ran.

    :ivar tracked: finds what has changed since
    :ivar volume: the copy
    :ivar length: bytes of the copy
    :ivar passes: how often changes were sent
    """
    tracked: changes.Changes
    volume: storage_pool.Volume
    length: int
    passes: int = 0


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
    ):
        """Say what is to go where; nothing happens yet.

        :param here: the site on this host
        :param files: the plan, see Layout.plan()
        :param name: of the server's domain
        :param bandwidth: limit that all transfers of this host share
        """
        self.there = there
        self.heads: dict[str, str] = {}
        self._here = here
        self._places = here.layout
        self._files = files
        self._name = name
        self._bandwidth = bandwidth
        self._early: dict[str, _Early] = {}
        # All disks may be in Ceph or in Cinder. Whatever is in the instance
        # directory there is in nobody's way then, as with Nova's own driver.
        self._is_empty = not (files or here.layout.has_state())

    def check(self) -> None:
        """Connect to both hosts; check that the other can take the server.

        Changes nothing on either.

        :raises: HostError
        """
        with self._located(self._here.daemon):
            self._here.connect()
            # libvirt may spell the path of the pool another way.
            self._here.layout = self._places
            needed = {} if self._is_empty else layout.room(self._files)
        with self._located(self.there.daemon):
            self.there.connect()
            self.there.check(self._places, self._name, needed)

    def shares_directory(self) -> bool:
        """Whether both hosts have the instance directory in common.

        :raises: HostError
        """
        with self._located(self.there.daemon):
            self.there.connect()
            return self.there.shares_directory(self._places)

    def enters_pool(self) -> bool:
        """Whether the destination has a pool, and a directory of its own.

        :raises: HostError
        """
        with self._located(self.there.daemon):
            self.there.connect()
            return not self.there.shares_directory(self._here.layout)

    def claim(self) -> None:
        """Take possession of the names on the destination.

        :raises: HostError
        """
        if not (self.there.is_shared or self._is_empty):
            with self._located(self.there.daemon):
                self.there.claim()

    def precopy(self, cancel: stream.CancelEvent | None = None,
                watch: Watch | None = None) -> None:
        """Copy the disks while the server runs, and again what it changes.

        run() then copies only what has changed since. On this host nothing
        is made but unnamed files: see changes.Clone.

        :param cancel: stops the copy when set
        :raises: HostError, Cancelled
        """
        with self._located(self._here.daemon):
            total = sum(map(self._here.length, self._files))
        if watch:
            watch.begin(total)
        for file in self._files:
            if _can_go_early(file):
                with self._located(self.there.daemon, file.name):
                    self._copy_early(file, cancel, watch)

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
        if self._is_empty:
            return
        with self._located(self._here.daemon):
            files = [*self._files, *late, *self._here.vtpm(), self._record()]
            total = sum(map(self._here.length, files))
        if watch:
            watch.begin(total)
        for file in files:
            with self._located(self.there.daemon, file.name):
                self._move(file, cancel, watch)
        self._send_heads(
            [file for file in files if file.has_hostile_head], cancel, watch)

    def send(self, cancel: stream.CancelEvent | None = None) -> None:
        """Copy the files of a server that is live migrated.

        They go under a claim that the destination made, and follows up on.

        :param cancel: stops the copy when set
        :raises: HostError, Cancelled
        """
        with self._located(self._here.daemon):
            self._here.connect()
            # libvirt may spell the path of the pool another way.
            self._here.layout = self._places
        with self._located(self.there.daemon):
            self.there.connect()
            self.there.join()
        try:
            for file in self._files:
                with self._located(self.there.daemon, file.name):
                    self._move(file, cancel, None)
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
        """Close the connections to both hosts."""
        for early in self._early.values():
            early.tracked.close()
        self._early.clear()
        self.there.close()
        self._here.close()

    def formats(self) -> dict[str, str]:
        """The record of formats as the destination needs it."""
        return self._here.layout.record(self._files, self.there.layout)

    def _record(self) -> layout.File:
        return layout.File(
            layout.RECORD, layout.DIRECTORY, self._here.layout.record_path,
            data=layout.record_bytes(self.formats()))

    def _move(
        self, file: layout.File, cancel: stream.CancelEvent | None,
        watch: Watch | None,
    ) -> None:
        """Create a file on the destination, copy it, look it up again."""
        if file.is_directory:
            self.there.make_directory(file)
            return
        early = self._early.get(file.name)
        if early:
            ranges = early.tracked.look(True, cancel, _stall_seconds())
            # Zeros that came in the place of data have to be sent, too.
            if ranges.total <= file.allocation():
                self._send_changes(file, early, ranges, cancel, watch)
                self._verify(file, early.volume, early.length, cancel)
                return
            early.volume.delete()
        source, length = self._here.open(file, file.head_bytes)
        volume = self.there.create(file, length)
        if length > file.head_bytes:
            result = self._copy(
                file, source, length, volume.path, cancel, watch)
            if watch:
                watch.end(file.name, result)
        self._verify(file, volume, length, cancel)

    def _verify(
        self, file: layout.File, volume: storage_pool.Volume, length: int,
        cancel: stream.CancelEvent | None,
    ) -> None:
        skip = file.head_bytes
        if length > skip and (
                CONF.libvirt.vol_upload_migration_verify == 'checksum'):
            stream.compare(
                self._here.open(file, skip)[0], volume.libvirt_volume,
                length - skip, cancel, _stall_seconds(), skip)
        self.there.verify(file, length)

    def _copy(
        self, file: layout.File, source: stream.Source, length: int,
        path: str, cancel: stream.CancelEvent | None, watch: Watch | None,
    ) -> stream.Result:
        """Copy a file but for a hostile head, which goes last."""
        def progress(done: int, wire: int) -> None:
            if watch:
                watch.note(file.name, done, wire)

        skip = file.head_bytes
        length -= skip
        with self._writing(path, length) as (target, paused):
            return stream.copy(
                source, stream.VolumeSink(target, skip, length), length,
                progress, cancel, bandwidth=self._bandwidth, paused=paused,
                stall_seconds=_stall_seconds())

    def _copy_early(
        self, file: layout.File, cancel: stream.CancelEvent | None,
        watch: Watch | None,
    ) -> None:
        """Copy a disk in use, in as many passes as are worth it."""
        tracked = changes.track(
            file.path, os.path.dirname(file.path), file.head_bytes,
            stall_seconds=_stall_seconds())
        with contextlib.ExitStack() as stack:
            stack.callback(tracked.close)
            length = tracked.length
            early = _Early(tracked, self.there.create(file, length), length)
            self._early[file.name] = early
            stack.pop_all()
        result = self._copy(file, tracked.source(), length, early.volume.path,
                            cancel, watch)
        if watch:
            watch.end(file.name, result)
        passes = changes.Passes(result.wire)
        while True:
            started = time.monotonic()
            ranges = tracked.look(False, cancel, _stall_seconds())
            if watch:
                watch.changed(file.name, ranges.total,
                              time.monotonic() - started)
            if not passes.another(ranges.total):
                return
            self._send_changes(file, early, ranges, cancel, watch)

    def _send_changes(
        self, file: layout.File, early: _Early, ranges: changes.Ranges,
        cancel: stream.CancelEvent | None, watch: Watch | None,
    ) -> None:
        """Copy what the last look has found over an earlier copy."""
        early.passes += 1
        name = f'{file.name}, pass {early.passes}'

        def progress(_done: int, wire: int) -> None:
            # All bytes of the file are counted already.
            if watch:
                watch.note(name, 0, wire)

        with self._writing(early.volume.path, ranges.total) as (
                target, paused):
            result = changes.send(
                early.tracked, ranges, target, early.length, cancel,
                _stall_seconds(), progress=progress,
                bandwidth=self._bandwidth, paused=paused)
        early.length = early.tracked.length
        if watch:
            watch.end_pass(file.name, result)

    def _send_heads(
        self, files: list[layout.File], cancel: stream.CancelEvent | None,
        watch: Watch | None,
    ) -> None:
        """Let go of the destination; send the starts of files, the last bytes.

        The destination's nova-compute compares their digests: nobody else can
        read them back there.
        """
        with self._located(self.there.daemon):
            sinks = self.there.settle(files)
        for file, sink in zip(files, sinks):
            with self._located(self.there.daemon, file.name):
                head = self._here.head(file)
                # A hole is there already.
                data = head.rstrip(b'\0')
                stream.copy(
                    stream.MemorySource(data), sink, len(data), cancel=cancel,
                    stall_seconds=_stall_seconds())
                self.heads[self.there.layout.path(file)] = layout.digest(head)
            if watch:
                watch.note(f'head of {file.name}', len(head), len(head))

    @contextlib.contextmanager
    def _writing(self, path: str, length: int) -> ty.Iterator[ty.Any]:
        """A volume to write to, and what to do if the copy pauses."""
        daemon = self.there.daemon
        if length <= SHORT_BYTES:
            yield daemon.connection.storageVolLookupByPath(path), None
            return
        with daemon.writing(path) as volume:
            yield volume, lambda: libvirt_daemon.start_keepalive(
                volume.connect())

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
            os.path.getsize(file.path) > SHORT_BYTES)


def _stall_seconds() -> int:
    return CONF.libvirt.vol_upload_migration_stall_timeout
