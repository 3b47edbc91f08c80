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

"""Every fault of a migration's disks, on two real libvirt daemons.

After each the server is whole at its source, with nothing of it at the
destination, or whole at the destination.
"""

import collections
import contextlib
import errno
import functools
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import typing as ty
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_config import cfg
from oslo_config import fixture as config_fixture
from oslo_utils import units

from nova.tests.live import fault_table
from nova.tests.live import moves
from nova.tests.live import test_transfer
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import stream

from tools import waiting

SIZE = 48 * units.Mi

CONNECTING, CREATING, COPYING, FINISHING, CHECKING = (
    fault_table.CONNECTING, fault_table.CREATING, fault_table.COPYING,
    fault_table.FINISHING, fault_table.CHECKING)

DOMAIN = """\
<domain type='qemu'>
  <name>rival</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type></os>
</domain>
"""


class Source:
    """Has something done when a part of the disk was read, or all of it."""

    def __init__(self, source: stream.Source, part: float,
                 moments: dict[str, ty.Callable]):
        self.path = source.path
        self.kind = source.kind
        self._source = source
        self._part = part
        self._moments = moments

    def chunks(self, length: int) -> stream.Chunks:
        done = 0
        for chunk in self._source.chunks(length):
            done += stream.length_of(chunk)
            if done > length * self._part:
                self._moments[COPYING]()
            yield chunk
        self._moments[FINISHING]()


class FaultTestCase(test_transfer.TransferTestCase):
    """Migrates as the driver does, and has a fault happen at some moment.

    :ivar direct: whether the disk's file is read, past libvirt
    :ivar part: of the disk that was read when it is in the middle of a copy
    :cvar has_guest: whether a guest has the disk open
    :cvar precopy: whether the disk is copied while that runs, too
    """

    direct = True
    part = 0.5
    has_guest = True
    precopy = False

    def setUp(self):
        super().setUp()
        self.config = self.useFixture(config_fixture.Config(cfg.CONF)).config
        self.set_limits(stall_timeout=20, connect_timeout=2,
                        keepalive_interval=1, reconnect_timeout=0)
        self.moments: dict[str, ty.Callable] = {
            moment: lambda: None for moment in (
                CONNECTING, CREATING, COPYING, FINISHING, CHECKING)}
        self.path = self._make_disk(SIZE, [(0, SIZE)])
        self.sha = self.sha256(self.path)
        self.happened: float | None = None
        self._hook()

    def set_limits(self, **limits: int) -> None:
        self.config(group='libvirt', **{
            f'vol_upload_migration_{name}': value
            for name, value in limits.items()})

    def _hook(self) -> None:
        """Reach the moments while a real migration passes them."""
        create_file, verify_file = site.Site.create, site.Site.verify
        self._track_changes = changes.track

        def create(there, file, *args):
            if file.name == self.volume:
                self.moments[CREATING]()
            return create_file(there, file, *args)

        def verify(there, file, *args):
            if file.name == self.volume:
                self.moments[CHECKING]()
            return verify_file(there, file, *args)

        for name, function in (
                ('site.Site.create', create),
                ('site.Site.verify', verify),
                ('changes.track', self._track),
                ('stream.open_source', self._open_source)):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.' + name, function))

    def _open_source(self, volume, _length, _direct,
                     offset: int) -> stream.Source:
        # The path of a volume is one of its host's, which this process is
        # not on.
        source = (stream.FileSource(str(self.path), offset) if self.direct else
                  stream.VolumeSource(volume, offset=offset))
        return Source(source, self.part, self.moments)

    def _track(self, *args, **kwargs) -> changes.Changes:
        tracked = self._track_changes(*args, **kwargs)
        tracked.source = functools.partial(
            self._source_of, tracked.source, iter([True]))
        return tracked

    def _source_of(self, open_source, is_first, ranges) -> stream.Source:
        source = open_source(ranges)
        if next(is_first, False):
            return Source(source, self.part, self.moments)
        return source

    # ---- what happens

    def at(self, moment: str, break_it: ty.Callable[[], None]) -> None:
        """Have a fault happen once, at a moment."""

        def happen() -> None:
            if self.happened is not None:
                return
            if moment == COPYING:
                # What is at half of the disk has read, has not arrived.
                self.wait_for(lambda: self.arrived() > 0)
            elif moment == FINISHING:
                self.wait_for(lambda: self.arrived() >= SIZE)
            self.happened = time.monotonic()
            break_it()

        self.moments[moment] = happen
        self.moment = moment

    def arrived(self) -> int:
        """Bytes that the destination has of the disk."""
        try:
            return self.allocated(self._path(self.destination))
        except FileNotFoundError:
            return 0

    def migrate(self, cancel=None) -> None:
        """Move the disk, and note when that fails and what it leaves."""
        guest = self.guest = self._start_guest()
        self.moments[CONNECTING]()
        move = self.move = self._transfer()
        discard = move.discard
        self.ended = None

        def note_end():
            self.ended = self.ended or time.monotonic()

        def note_discard():
            note_end()
            self.discarded = False
            discard()
            self.discarded = True

        def note_start():
            note_end()
            start()

        self.discarded = True
        with contextlib.ExitStack() as stack:
            stack.callback(move.close)
            stack.enter_context(
                mock.patch.object(move, 'discard', note_discard))
            if guest:
                start = guest.start
                stack.enter_context(
                    mock.patch.object(guest, 'start', note_start))
            moves.migrate(
                move, cancel, guest=guest, precopy=self.precopy)

    def _start_guest(self) -> moves.Guest | None:
        if not self.has_guest:
            return None
        guest = moves.Guest(self.path)
        self.addCleanup(guest.stop)
        return guest

    def record(self, fault: str, when: str, outcome: str,
               seconds: float) -> None:
        """Add what was seen to the table of the documentation."""
        if self.guest:
            fault_table.record(
                fault, when, outcome, self.guest.was_off, seconds)

    def wait_for(self, condition: ty.Callable[[], bool],
                 seconds: float = 30) -> None:
        waiting.wait_for('it', condition, seconds, poll=0.01)

    @property
    def when(self) -> str:
        """When the fault happened, as the table tells it."""
        is_running = self.precopy and self.moment in (
            CREATING, COPYING, FINISHING)
        return (fault_table.RUNNING.format(self.moment) if is_running
                else self.moment)

    # ---- what comes of it

    def assert_fails(
        self, fault: str, heal: ty.Callable[[], None] = lambda: None,
        text: str = '', cancel=None, within: float = 30,
    ) -> str:
        """The migration fails, and the server is as it was.

        :returns: the error
        """
        self.ended = None
        error = self.assertRaises(
            (errors.HostError, errors.Cancelled),
            self.migrate, cancel)
        ended = self.ended or time.monotonic()
        self.assertIsNotNone(self.happened, 'there was no fault')
        self.assertIn(text, str(error))
        self.assertLess(ended - self.happened, within)
        heal()
        self.assertEqual(self.sha, self.sha256(self.path))
        outcome = fault_table.AT_SOURCE
        if self.ended and not self.discarded:
            outcome = fault_table.CLEARED
            # As the driver does every minute.
            self.wait_answered()
            self.move.discard()
        self.assert_nothing_there()
        self.record(fault, self.when, outcome, ended - self.happened)
        return str(error)

    def succeed(self, fault: str,
                heal: ty.Callable[[], None] = lambda: None) -> None:
        """The migration goes on, in spite of what happens."""
        self.migrate()
        self.assertIsNotNone(self.happened, 'there was no fault')
        self.assertEqual(self.sha, self.sha256(self.path))
        self.assertEqual(self.sha, self.sha256(self._path(self.destination)))
        self.record(fault, self.when, fault_table.MOVED,
                    time.monotonic() - self.happened)
        heal()
        self.clear()

    def wait_answered(self) -> None:
        """Wait until the destination owes no answer that was given up."""
        self.wait_for(lambda: not daemon._hangs(self._uri(self.destination)),
                      seconds=60)

    def assert_next_attempt_works(self) -> None:
        self.wait_answered()
        self.migrate()
        self.assertEqual(self.sha, self.sha256(self._path(self.destination)))
        self.clear()

    def clear(self) -> None:
        """Delete what arrived, as one who starts anew."""
        self.wait_answered()
        move = self._transfer()
        moves.start(move)
        move.discard()
        move.close()
        self.assert_nothing_there()

    def assert_nothing_there(self) -> None:
        self._assert_nothing_on_destination()
        pools = self.connect(self.destination).listAllStoragePools()
        self.assertNotIn(f'nova-{self.uuid}', [p.name() for p in pools])

    def restart(self, host) -> None:
        """Have a libvirtd that works, with the pool in it active."""
        if host.libvirtd_pid is None:
            host.start_libvirtd()
        pool = self.connect_local(host).storagePoolLookupByName(
            self.pool_name)
        if not pool.isActive():
            pool.create()

    def pool_there(self) -> libvirt.virStoragePool:
        return self.connect_local(self.destination).storagePoolLookupByName(
            self.pool_name)

    def volume_there(self) -> libvirt.virStorageVol:
        return self.pool_there().storageVolLookupByName(self.volume)

    def signal(self, signum: int) -> None:
        os.kill(self.destination.libvirtd_pid, signum)


@ddt.ddt
class DestinationDaemonTestCase(FaultTestCase):

    @ddt.data(CONNECTING, CREATING, COPYING, FINISHING, CHECKING)
    def test_killed(self, moment):
        self.addCleanup(self.restart, self.destination)
        self.at(moment, lambda: self.destination.stop_libvirtd(
            signal.SIGKILL))
        self.assert_fails('libvirtd of the destination is killed',
                          heal=lambda: self.restart(self.destination))

    @ddt.data(CONNECTING, CREATING, COPYING, FINISHING)
    def test_stopped_for_longer_than_the_limits(self, moment):
        self.set_limits(stall_timeout=2)
        self.at(moment, lambda: self.signal(signal.SIGSTOP))
        self.addCleanup(self.signal, signal.SIGCONT)
        self.assert_fails('libvirtd of the destination stands still for long',
                          heal=lambda: self.signal(signal.SIGCONT), within=20,
                          text='nothing moved for 2 seconds'
                          if moment in (COPYING, FINISHING) else '')

    @ddt.data(CREATING, COPYING, FINISHING)
    def test_stopped_for_a_while(self, moment):
        self.at(moment, lambda: self.for_a_while(
            lambda: self.signal(signal.SIGSTOP),
            lambda: self.signal(signal.SIGCONT)))
        self.succeed('libvirtd of the destination stands still for a while')

    def for_a_while(self, break_it, heal, seconds=1.5) -> None:
        """Break something now, and have it healed in the background."""
        timer = threading.Timer(seconds, heal)
        self.addCleanup(timer.join)
        break_it()
        timer.start()

    @ddt.data(CONNECTING, CREATING, COPYING, FINISHING)
    def test_link_down_for_long(self, moment):
        self.addCleanup(self.destination.link, True)
        self.at(moment, lambda: self.destination.link(False))
        self.assert_fails('link is down for longer than the keepalive',
                          heal=lambda: self.destination.link(True), within=20)

    @ddt.data(CREATING, COPYING, FINISHING, CHECKING)
    def test_killed_and_started_again(self, moment):
        self.set_limits(reconnect_timeout=20)

        def restart():
            self.destination.stop_libvirtd(signal.SIGKILL)
            self.destination.start_libvirtd()

        self.addCleanup(self.restart, self.destination)
        self.at(moment, restart)
        self.succeed('libvirtd of the destination is killed and started again')

    def test_killed_for_longer_than_the_limits(self):
        self.set_limits(reconnect_timeout=5)
        self.addCleanup(self.restart, self.destination)
        self.at(COPYING, lambda: self.destination.stop_libvirtd(
            signal.SIGKILL))
        self.assert_fails(
            'libvirtd of the destination is away for longer than '
            'reconnect_timeout',
            heal=lambda: self.restart(self.destination))

    def test_link_down_until_the_destination_has_given_up(self):
        # Its keepalive takes half a minute, and TCP tries again at most after
        # twice the time.
        self.set_limits(reconnect_timeout=90, stall_timeout=90)
        self.addCleanup(self.destination.link, True)
        self.at(COPYING, lambda: self.for_a_while(
            lambda: self.destination.link(False),
            lambda: self.destination.link(True), 35))
        self.succeed('link is down for longer than the keepalive, and up '
                     'again within reconnect_timeout')

    @ddt.data(CREATING, COPYING, FINISHING)
    def test_link_down_for_a_while(self, moment):
        self.set_limits(keepalive_interval=5)
        self.addCleanup(self.destination.link, True)
        self.at(moment, lambda: self.for_a_while(
            lambda: self.destination.link(False),
            lambda: self.destination.link(True)))
        self.succeed('link is down for less than the keepalive')


@ddt.ddt
class DestinationPoolTestCase(FaultTestCase):

    def test_missing(self):
        pool = self.pool_there()
        xml = pool.XMLDesc()

        def remove():
            pool.destroy()
            pool.undefine()

        def heal():
            self.connect_local(self.destination).storagePoolDefineXML(
                xml).create()

        self.at(CONNECTING, remove)
        self.assert_fails('pool of the destination is missing', heal=heal,
                          text='there is no storage pool')

    @ddt.data(CONNECTING, CREATING, COPYING, FINISHING, CHECKING)
    def test_inactive(self, moment):
        self.at(moment, lambda: self.pool_there().destroy())
        self.assert_fails('pool of the destination is stopped',
                          heal=lambda: self.restart(self.destination),
                          text='active', within=10)

    @ddt.data(CONNECTING, CREATING)
    def test_read_only(self, moment):
        path = f'/var/lib/nova/{self.pool_name}'

        def protect():
            self.destination.run(['mount', '--bind', path, path])
            self.destination.run(
                ['mount', '-o', 'remount,bind,ro', path])

        self.at(moment, protect)
        self.assert_fails('pool of the destination is read-only',
                          heal=lambda: self.destination.run(['umount', path]),
                          text='Read-only file system')

    def test_refreshed_all_the_time_by_somebody_else(self):
        ended = threading.Event()
        refreshed = []

        def refresh():
            pool = self.pool_there()
            while not ended.is_set():
                with contextlib.suppress(libvirt.libvirtError):
                    pool.refresh()
                    refreshed.append(time.monotonic())

        thread = threading.Thread(target=refresh)
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)
        self.at(CONNECTING, thread.start)
        self.succeed('pool of the destination is refreshed all the time')
        self.assertGreater(len(refreshed), 10)


class MountedPoolTestCase(FaultTestCase):
    """The disks pool of one host is a file system of its own."""

    mounted = None

    def setUp(self):
        super().setUp()
        self.pool_path = f'/var/lib/nova/{self.pool_name}'

    def mount(self, host, *arguments) -> None:
        host.run(['mount', *arguments, self.pool_path])
        self.addCleanup(host.run, ['umount', '-l', self.pool_path])
        self.mounted = host

    def mount_image(self, host) -> pathlib.Path:
        """Mount a file system that has a disk of its own, and return that."""
        image = host.directory / 'image'
        self.addCleanup(image.unlink)
        with open(image, 'wb') as file:
            file.truncate(SIZE + 16 * units.Mi)
        host.run(['mkfs.ext4', '-q', '-b', '4096', '-O', '^has_journal', '-E',
                  f'root_owner={host.nova_uid}:{host.nova_gid}', str(image)])
        self.mount(host, '-o', 'loop', str(image))
        host.run(['rmdir', self.pool_path + '/lost+found'])
        self.connect_local(host).storagePoolLookupByName(
            self.pool_name).refresh()
        return image

    def _path(self, host, name=None):
        if host is not self.mounted:
            return super()._path(host, name)
        # The machine does not see the mount.
        return pathlib.Path(f'/proc/{host.pid}/root{self.pool_path}',
                            name or self.volume)


class DestinationFullTestCase(MountedPoolTestCase):

    def setUp(self):
        super().setUp()
        self.mount(self.destination, '-t', 'tmpfs', '-o',
                   f'size={SIZE + 8 * units.Mi},mode=755,'
                   f'uid={self.destination.nova_uid}', 'tmpfs')
        self.pool_there().refresh()

    def _fill(self):
        filler = self._path(self.destination, 'filler')
        room = os.statvfs(filler.parent)
        with open(filler, 'wb') as file:
            os.posix_fallocate(
                file.fileno(), 0, room.f_bavail * room.f_frsize)

    def _empty(self):
        self._path(self.destination, 'filler').unlink()
        self.pool_there().refresh()

    def test_full_before(self):
        self.at(CONNECTING, self._fill)
        self.assert_fails('disk of the destination is full', heal=self._empty,
                          text='bytes available')

    def test_fills_up(self):
        self.at(COPYING, self._fill)
        self.assert_fails('disk of the destination is full', heal=self._empty,
                          text='No space left on device')


@ddt.ddt
class DestinationDiskHangsTestCase(MountedPoolTestCase):
    """libvirtd of the destination lives, and waits for its disk."""

    fault = 'disk of the destination hangs'

    def setUp(self):
        super().setUp()
        self.mount_image(self.destination)
        self.set_limits(stall_timeout=2)
        self.addCleanup(self.thaw, check=False)

    def freeze(self):
        self.destination.run(['fsfreeze', '-f', self.pool_path])

    def thaw(self, check=True):
        # An error if it is not frozen, which is then no fault.
        self.destination.run(['fsfreeze', '-u', self.pool_path], check=check)

    @ddt.data((CREATING, 'no answer within 2 seconds'),
              (COPYING, 'nothing moved for 2 seconds'))
    @ddt.unpack
    def test_hangs(self, moment, text):
        self.at(moment, self.freeze)
        self.assert_fails(self.fault, heal=self.thaw, text=text, within=20)

    def test_hangs_before(self):
        self.at(CONNECTING, self.freeze)
        error = self.assertRaises(errors.HostError, self.migrate)
        seconds = time.monotonic() - self.happened
        guest = self.guest
        self.assertIn('no answer within 2 seconds', str(error))
        self.assertLess(seconds, 10)
        self.assertEqual(self.sha, self.sha256(self.path))
        self.thaw()
        # What was asked for is done now: the claim is there.
        claim = f'{self.uuid}_{layout.CLAIM}-*'
        self.wait_for(lambda: any(
            self._path(self.destination).parent.glob(claim)))
        self.assert_next_attempt_works()
        self.guest = guest
        self.record(self.fault, CONNECTING, fault_table.NEXT, seconds)


@ddt.ddt
class DestinationVolumeTestCase(FaultTestCase):

    @ddt.data(COPYING, FINISHING, CHECKING)
    def test_deleted(self, moment):
        self.at(moment, lambda: self.volume_there().delete())
        self.assert_fails('volume of the destination is deleted')

    @ddt.data(FINISHING, CHECKING)
    def test_truncated(self, moment):
        self.at(moment, lambda: os.truncate(
            self._path(self.destination), SIZE // 2))
        self.assert_fails(
            'volume of the destination is truncated',
            text=f'has {SIZE // 2} bytes after {SIZE} were written')

    def test_truncated_in_the_middle(self):
        # What is written behind the end makes it grow again.
        self.config(vol_upload_migration_verify='checksum', group='libvirt')
        self.at(COPYING, lambda: os.truncate(
            self._path(self.destination), 0))
        self.assert_fails('volume of the destination is truncated (checksum)',
                          text='it differs from the source')

    def test_changed(self):
        self.config(vol_upload_migration_verify='checksum', group='libvirt')

        def change():
            with open(self._path(self.destination), 'r+b') as disk:
                disk.seek(SIZE // 4)
                disk.write(b'changed')

        self.at(FINISHING, change)
        self.assert_fails('volume of the destination is changed (checksum)',
                          text='it differs from the source')

    def test_somebody_else_s_is_left_alone(self):
        path = self._path(self.destination)
        self.at(CONNECTING, lambda: path.write_bytes(b'precious'))
        self.assert_fails('volume of that name at the destination',
                          text='is in the way', heal=lambda: (
                              self.assertEqual(b'precious', path.read_bytes()),
                              path.unlink()))

    def test_domain_of_that_uuid(self):
        connection = self.connect_local(self.destination)
        self.at(CONNECTING, lambda: connection.defineXML(
            DOMAIN.format(uuid=self.uuid)))
        self.assert_fails('domain of that uuid at the destination',
                          text='is there already',
                          heal=lambda: connection.lookupByUUIDString(
                              self.uuid).undefine())

    def test_domain_that_came_when_a_copy_was_left(self):
        connection = self.connect_local(self.destination)
        self.migrate()
        self.at(CONNECTING, lambda: connection.defineXML(
            DOMAIN.format(uuid=self.uuid)))

        error = self.assertRaises(errors.HostError, self.migrate)

        connection.lookupByUUIDString(self.uuid).undefine()
        self.assertIsNotNone(self.happened)
        self.assertIn('is there already', str(error))
        self.assertEqual(
            self.sha, self.sha256(self._path(self.destination)))


@ddt.ddt
class SourceDiskFailsTestCase(MountedPoolTestCase):
    """The kernel cannot read the disk of the source any more."""

    # Beyond it is at least a third of the volume.
    kept = 32 * units.Mi

    def setUp(self):
        super().setUp()
        on_another_disk = self.path
        self.image = self.mount_image(self.source)
        self.path = self._path(self.source)
        shutil.copyfile(on_another_disk, self.path)
        os.chown(self.path, self.source.nova_uid, self.source.nova_gid)
        self.source.run(['sync', '-f', self.pool_path])
        self.content = self.image.read_bytes()

    def forget(self) -> None:
        """Have nothing of the volume in memory."""
        with open(self.path, 'rb') as disk:
            os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def lose(self) -> None:
        os.truncate(self.image, self.kept)
        self.forget()

    def find(self) -> None:
        error = self.assertRaises(OSError, self.path.read_bytes)
        self.assertEqual(errno.EIO, error.errno)
        with open(self.image, 'r+b') as image:
            image.seek(self.kept)
            image.write(self.content[self.kept:])
        self.forget()

    @ddt.data((True, ' (direct read)'), (False, ''))
    @ddt.unpack
    def test_read_error(self, direct, how):
        self.direct = direct
        self.at(COPYING, self.lose)
        error = self.assert_fails('disk of the source has a read error' + how,
                                  heal=self.find, text='Input/output error')
        for text in (self.volume[-12:], self.destination.name,
                     'source failed'):
            self.assertIn(text, error)


@ddt.ddt
class SourceTestCase(FaultTestCase):

    def test_volume_is_gone(self):
        self.at(CREATING, self.path.unlink)
        self.assert_fails('volume of the source is gone', heal=self._mend,
                          text='source failed after 0 bytes')

    def test_volume_is_truncated(self):
        self.at(COPYING, lambda: os.truncate(self.path, SIZE // 2 + 1))
        self.assert_fails('volume of the source is truncated', heal=self._mend,
                          text='the volume change its size?')

    def _mend(self):
        self._make_disk(SIZE, [(0, SIZE)])

    @ddt.data(CREATING, COPYING)
    def test_libvirtd_killed(self, moment):
        self.direct = False
        self.addCleanup(self.restart, self.source)
        self.at(moment, lambda: self.source.stop_libvirtd(signal.SIGKILL))
        self.assert_fails('libvirtd of the source is killed',
                          heal=lambda: self.restart(self.source))

    def test_libvirtd_killed_that_has_no_part_in_the_copy(self):
        self.addCleanup(self.restart, self.source)
        self.at(COPYING, lambda: self.source.stop_libvirtd(signal.SIGKILL))
        self.succeed('libvirtd of the source is killed (direct read)',
                     heal=lambda: self.restart(self.source))

    def test_server_is_deleted(self):
        cancel = threading.Event()
        self.at(COPYING, cancel.set)
        self.assert_fails('server is deleted', cancel=cancel, within=1)

    def test_second_attempt(self):
        def attempt_again():
            move = self._transfer()
            moves.start(move)
            move.run()

        self.at(COPYING, attempt_again)
        error = self.assertRaises(errors.HostError, self.migrate)
        self.assertIsNotNone(self.happened)
        self.assertIn('another attempt', str(error))
        self.assertFalse(self.discarded)
        self.assertEqual(
            self.sha, self.sha256(self._path(self.destination)))
        self.record('second attempt for the server', COPYING,
                    'that of the second attempt counts',
                    self.ended - self.happened)
        self.clear()

    def test_process_killed(self):
        # The copy of one that was powered off.
        guest = self._start_guest()
        guest.stop()
        copier = self.start_copier()
        self.wait_for(lambda: self.arrived() > 0)
        self.happened = time.monotonic()
        copier.kill()
        copier.communicate()
        self.assertEqual(-signal.SIGKILL, copier.returncode)
        self.assertTrue(self._path(self.destination).exists())
        self.assert_next_attempt_works()
        self.assertEqual(self.sha, self.sha256(self.path))
        self.guest = guest
        self.record('process that copies is killed', COPYING,
                    fault_table.NEXT, time.monotonic() - self.happened)


@ddt.ddt
class PrecopyTestCase(FaultTestCase):
    """Faults while the guest runs, whose disk is copied meanwhile."""

    precopy = True

    def assert_fails(self, *args, **kwargs):
        error = super().assert_fails(*args, **kwargs)
        self.assertFalse(self.guest.was_off)
        return error

    @ddt.data(CREATING, COPYING, FINISHING)
    def test_daemon_killed(self, moment):
        self.addCleanup(self.restart, self.destination)
        self.at(moment, lambda: self.destination.stop_libvirtd(
            signal.SIGKILL))
        self.assert_fails('libvirtd of the destination is killed',
                          heal=lambda: self.restart(self.destination))

    def test_daemon_stopped_for_longer_than_the_limits(self):
        self.set_limits(stall_timeout=2)
        self.addCleanup(self.signal, signal.SIGCONT)
        self.at(COPYING, lambda: self.signal(signal.SIGSTOP))
        self.assert_fails('libvirtd of the destination stands still for long',
                          heal=lambda: self.signal(signal.SIGCONT), within=20)

    def test_link_down_for_long(self):
        self.addCleanup(self.destination.link, True)
        self.at(COPYING, lambda: self.destination.link(False))
        self.assert_fails('link is down for longer than the keepalive',
                          heal=lambda: self.destination.link(True), within=20)

    def test_pool_stopped(self):
        self.at(COPYING, lambda: self.pool_there().destroy())
        self.assert_fails('pool of the destination is stopped',
                          heal=lambda: self.restart(self.destination),
                          text='active')

    @ddt.data(COPYING, FINISHING)
    def test_volume_deleted(self, moment):
        self.at(moment, lambda: self.volume_there().delete())
        self.assert_fails('volume of the destination is deleted')

    def test_volume_truncated(self):
        self.at(FINISHING, lambda: os.truncate(
            self._path(self.destination), SIZE // 2))
        self.assert_fails('volume of the destination is truncated')

    def test_server_is_deleted(self):
        cancel = threading.Event()
        self.at(COPYING, cancel.set)
        self.assert_fails('server is deleted', cancel=cancel, within=1)


FAULTS = ('kill', 'stop', 'link', 'delete', 'truncate', 'cancel',
          'kill source', 'kill process')


class RandomFaultsTestCase(FaultTestCase):
    """Faults in a row, each at a moment that nobody thought of.

    NOVA_FAULT_RUNS says how many there are. A run that fails names its seed:
    NOVA_FAULT_RUNS=1 NOVA_FAULT_SEED=<seed> is the same one again.
    """

    has_guest = False

    def test_faults_in_a_row(self):
        first = int(os.environ.get('NOVA_FAULT_SEED', '1'))
        runs = int(os.environ.get('NOVA_FAULT_RUNS', '10'))
        self.set_limits(stall_timeout=4)
        # What truncates a volume in the middle of its copy is not seen else.
        self.config(vol_upload_migration_verify='checksum', group='libvirt')
        self.addCleanup(self.restart, self.destination)
        self.addCleanup(self.restart, self.source)
        self.addCleanup(self.destination.link, True)
        happened, violations = collections.Counter(), []
        for seed in range(first, first + runs):
            self.end_the_run_if_this_hangs()
            try:
                happened[self.run_one(random.Random(seed))] += 1
            except Exception as error:
                violations.append((seed, error))
                print(seed, repr(error), file=sys.stderr)
                self.heal()
                self.clear()
        print(dict(happened), file=sys.stderr)
        self.assertEqual([], violations)
        self.assertEqual(runs, happened.total())

    def run_one(self, choice: random.Random) -> tuple[str, str]:
        """Return the fault, and how the migration ended."""
        self.happened = None
        self.direct = choice.random() < 0.5
        self.part = choice.random()
        length = choice.randrange(1, 24 * units.Mi)
        self._make_random_disk(choice, length)
        fault = choice.choice(FAULTS)
        # A file that is not there cannot be damaged.
        moment = choice.choice([CHECKING] + 6 * [COPYING] + (
            [] if fault in ('delete', 'truncate') else [CREATING]))
        seconds = choice.uniform(0.1, 8)
        if fault == 'kill process':
            self._kill_process(choice.uniform(0, 0.5))
            self.assert_next_attempt_works()
            return fault, 'killed'
        cancel = threading.Event()
        self.at(moment, lambda: self._break(fault, seconds, cancel))
        try:
            self.migrate(cancel)
        except (errors.HostError, errors.Cancelled):
            ending = 'failed'
        else:
            ending = 'moved'
            self.assertEqual(
                self.sha, self.sha256(self._path(self.destination)))
        self.heal()
        self.assertIsNotNone(self.happened, 'there was no fault')
        self.assertEqual(self.sha, self.sha256(self.path))
        if ending == 'failed' and self.discarded:
            self.assert_nothing_there()
        self.assert_next_attempt_works()
        return fault, ending

    def at(self, moment, break_it):
        def happen():
            if self.happened is None:
                self.happened = time.monotonic()
                break_it()

        for each in self.moments:
            self.moments[each] = happen if each == moment else lambda: None

    def assert_nothing_there(self) -> None:
        """But for what libvirt was asked for too long ago to matter.

        A link that was down may deliver that late: see site._check_names().
        """
        pool = self.pool_there()
        pool.refresh()
        self.assertEqual([], [
            volume.name() for volume in pool.listAllVolumes()
            if volume.info()[2]])

    def _make_random_disk(self, choice: random.Random, length: int) -> None:
        ends = sorted(choice.randrange(length + 1)
                      for _index in range(2 * choice.randrange(1, 20)))
        self.path = self._make_disk(length, [
            (start, end - start) for start, end in zip(ends[::2], ends[1::2])])
        self.sha = self.sha256(self.path)

    def _break(self, fault: str, seconds: float,
               cancel: threading.Event) -> None:
        if fault == 'kill':
            self.destination.stop_libvirtd(signal.SIGKILL)
        elif fault == 'kill source':
            self.source.stop_libvirtd(signal.SIGKILL)
        elif fault == 'stop':
            self.signal(signal.SIGSTOP)
            self._heal_later(seconds, lambda: self.signal(signal.SIGCONT))
        elif fault == 'link':
            self.destination.link(False)
            self._heal_later(seconds, lambda: self.destination.link(True))
        elif fault == 'delete':
            self._path(self.destination).unlink()
        elif fault == 'truncate':
            os.truncate(self._path(self.destination), 0)
        else:
            cancel.set()

    def _heal_later(self, seconds, heal) -> None:
        self.healer = threading.Timer(seconds, heal)
        self.healer.start()

    def _kill_process(self, seconds: float) -> None:
        copier = self.start_copier()
        time.sleep(seconds)
        self.happened = time.monotonic()
        copier.kill()
        copier.communicate()

    def heal(self) -> None:
        healer = getattr(self, 'healer', None)
        if healer is not None:
            healer.join()
        for host in self.source, self.destination:
            self.restart(host)
