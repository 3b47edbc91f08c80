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
"""A copy goes on after its connection was lost."""

import os
import threading
import time
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_utils import units

from nova.tests import changing_disk
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage import test_transfer
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads

SECTION = 512 * units.Ki
SIZE = 4 * units.Mi

AUTH_ERROR = (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_FROM_RPC,
              'authentication failed')


class ReconnectTestCase(test_transfer.TransferTestCase):
    """A server with one large disk, and a host that gets lost."""

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration_reconnect_timeout=20, group='libvirt')
        for name, value in (
                ('stream.SECTION_BYTES', SECTION), ('stream.SECTION_COSTS', 0),
                ('stream.MESSAGE_BYTES', SECTION // 8),
                ('stream.LONG_MESSAGE_BYTES', SECTION // 4),
                ('transfer.RECONNECT_SECONDS', 0.01),
                ('transfer.MOST_RECONNECT_SECONDS', 0.05)):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.' + name, value))
        self.files.clear()
        self.contents.clear()
        self._add_disk('disk', os.urandom(SIZE))
        self.disk, = self.files
        self.path = '/srv/disks/' + self.disk.name
        self.transfer = self._new()
        self.lost = []

    def _sent(self):
        """Bytes of data that all uploads of the disk have sent."""
        return sum(length for upload in self.dest.streams
                   if upload.way == 'upload' and
                   upload.name == self.disk.name
                   for kind, _start, length in upload.events
                   if kind == 'data')

    def _lose(self, seconds=0.2):
        """Lose all connections, and be back later."""
        def lose():
            self.lost.append(time.monotonic())
            self.dest.restart(seconds)

        return lose

    def _lose_at(self, where='stream.send', seconds=0.2, **kwargs):
        return self.dest.call(
            where, self._lose(seconds), name=kwargs.pop('name', None),
            **kwargs)

    def _native(self, function, *args):
        return threads.off_hub(function, *args)

    def _move(self, watch=None):
        self._native(self._claimed)
        self._native(self.transfer.run, None, watch)

    def _assert_arrived(self):
        with open(self.disk.path, 'rb') as disk:
            data = disk.read()
        self.assertEqual(data, self._arrived()[self.path])

    def _assert_sent_once(self, losses=1):
        self.assertEqual(losses, len(self.lost))
        self.assertGreaterEqual(self._sent(), SIZE)
        self.assertLessEqual(
            self._sent(), SIZE + losses * (SECTION + changes.BLOCK_BYTES))


@ddt.ddt
class StoppedTestCase(ReconnectTestCase):

    @ddt.data(0, SECTION // 2, SIZE // 2, SIZE - 1)
    def test_lost_while_data_is_sent(self, after):
        watch = test_transfer.Watch()
        self._lose_at(after=after)

        self._move(watch=watch)

        self._assert_arrived()
        self._assert_sent_once()
        result = watch.results[self.disk.name]
        self.assertEqual(SIZE, result.length)
        self.assertEqual(SIZE, watch.noted[self.disk.name])
        self.assertEqual(self._sent(), result.wire)
        (error, seconds), = watch.losses
        self.assertIn('destination failed after', str(error))
        self.assertEqual(20, seconds)

    @ddt.data(
        ('pool.createXML', 4), ('vol.upload', 1), ('vol.upload', 3),
        ('stream.finish', 1), ('stream.finish', 3), ('pool.refresh', 9))
    @ddt.unpack
    def test_lost_at_other_calls(self, where, nth):
        self._native(self._claimed)
        self._lose_at(where, nth=1 if where == 'pool.createXML' else nth)

        self._native(self.transfer.run)

        self._assert_arrived()
        self._assert_sent_once()

    def test_lost_for_want_of_room(self):
        """Some releases of libvirt end where a file system is full."""
        def fill():
            self._lose()()
            self.dest.used = self.dest.capacity - SIZE // 4

        self.dest.call('stream.send', fill, after=SIZE // 2)

        error = self.assertRaises(errors.HostError, self._move)

        self.assertIn('bytes available in /srv/disks', str(error))
        self.assertEqual(1, len(self.lost))

    def test_lost_after_a_request_that_took_effect(self):
        create = site.Site.create

        def create_and_lose(there, *args):
            volume = create(there, *args)
            if not self.lost:
                self._lose()()
                self.dest.enter('*')
            return volume

        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.site.Site.create', create_and_lose))
        self._move()
        self._assert_arrived()
        self._assert_sent_once()

    def test_lost_again_and_again(self):
        for number in range(1, 8):
            self._lose_at(after=number * SIZE // 8)
        self._move()
        self._assert_arrived()
        self._assert_sent_once(7)

    @ddt.data(True, False)
    def test_lost_again_and_again_wherever_it_is(self, direct):
        self.flags(vol_upload_migration_direct_read=direct, group='libvirt')
        watch = test_transfer.Watch()

        def note(name, done, wire):
            if wire > (len(self.lost) + 1) * SIZE // 5:
                self._lose()()

        watch.note = note
        self._move(watch)
        self._assert_arrived()
        self._assert_sent_once(len(self.lost))
        self.assertLess(len(self.lost), 12)

    def test_loss_that_shows_when_the_copy_pauses(self):
        """Nothing is sent again that the destination has."""
        for name, value in ('PAUSE_SECONDS', 0.1), ('POLL_SECONDS', 0.02):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.stream.' + name, value))
        ended = []

        def lose():
            self._lose()()
            threads.sleep(1)
            ended.append(len(self.dest.connections))

        self.dest.call('stream.send', lose, after=SIZE // 2)
        self._native(self._claimed)
        connections = len(self.dest.connections) + 1
        self._native(self.transfer.run)
        self._assert_arrived()
        self._assert_sent_once()
        # No other connection came before the writer had ended.
        self.assertEqual([connections], ended)

    def test_lost_before_the_end(self):
        self._native(self._claimed)
        check_claim = site.Site.check_claim
        calls = []

        def check(there):
            calls.append(1)
            if len(calls) == 4:
                self._lose()()
            return check_claim(there)

        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.site.Site.check_claim', check))
        self._native(self.transfer.run)
        self.assertEqual(1, len(self.lost))
        self._assert_arrived()

    def test_read_back_begins_anew(self):
        self.flags(vol_upload_migration_verify='checksum', group='libvirt')
        self._lose_at('stream.recv', after=SIZE // 2)

        self._move()

        self._assert_sent_once()
        self._assert_arrived()

    def test_holes(self):
        blocks = [os.urandom(changes.BLOCK_BYTES)
                  if number % 4 == 1 or number > 60 else
                  bytes(changes.BLOCK_BYTES) for number in range(64)]
        blocks[-5:] = [bytes(changes.BLOCK_BYTES)] * 5
        self._write(self.disk.path, b''.join(blocks))
        for after in (200, 1200, 2000, 3000):
            self._lose_at(after=after * units.Ki)

        self._move()

        self._assert_arrived()
        self.assertEqual(4, len(self.lost))
        content = self.dest.files[self.path].content
        self.assertLess(content.allocated, SIZE // 3)

    def test_source_that_is_read_over_libvirt(self):
        self.flags(vol_upload_migration_direct_read=False, group='libvirt')
        self._lose_at(after=SIZE // 2)

        self._move()

        self._assert_arrived()
        self._assert_sent_once()

    def _make_hostile(self):
        """Have the disk be a raw one in the instance directory."""
        self.files[0] = self.disk = layout.File(
            'disk', layout.DIRECTORY,
            os.path.join(self.places.directory, 'disk'), 'raw',
            has_hostile_head=True)
        content = bytearray(os.urandom(SIZE))
        # Zeros at the end of a head are not sent.
        content[layout.HEAD_BYTES - 1] = 1
        self._write(self.disk.path, bytes(content))
        self.path = self.disk.path

    def _uploads(self):
        """(offset, bytes) of each upload of the disk."""
        return [(upload.offset, upload.position - upload.offset)
                for upload in self.dest.streams
                if upload.way == 'upload' and upload.name == 'disk']

    def test_hostile_head_still_goes_last(self):
        self._make_hostile()
        self._lose_at(after=SIZE // 2)

        self._move()

        self._assert_arrived()
        self.assertEqual(1, len(self.lost))
        *others, last = self._uploads()
        self.assertEqual((0, self.disk.head_bytes), last)
        self.assertLessEqual(
            self.disk.head_bytes, min(offset for offset, _size in others))

    def test_heads_are_not_sent_again(self):
        """No pool may be made of the directory any more."""
        self._make_hostile()
        fault = self._lose_at()
        fault.matches = lambda where, name, end: not self.lost and (
            (where, name) == ('stream.send', 'disk') and
            end <= self.disk.head_bytes)
        self._native(self._claimed)

        self._assert_fails(
            'destination failed after',
            function=lambda: self._native(self.transfer.run))

        self.assertEqual(1, len(self.lost))
        self.assertEqual((0, 0), self._uploads()[-1])
        self.assertNotIn(self.places.transient_pool, self.dest.pools)

    @ddt.data('ssh', 'ext', 'libssh2')
    def test_other_transports_are_not_connected_again(self, transport):
        """What the command in between has taken may arrive for ever."""
        self.transfer = self._new(f'qemu+{transport}://dest/system')
        self._lose_at(after=SIZE // 2)
        self._native(self._claimed)
        self._assert_fails(
            'connection was lost',
            function=lambda: self._native(self.transfer.run))

    def test_off_by_option(self):
        self.flags(vol_upload_migration_reconnect_timeout=0, group='libvirt')
        self.transfer = self._new()
        self._lose_at(after=SIZE // 2)
        self._native(self._claimed)
        self._assert_fails(
            'connection was lost', 'destination failed after',
            function=lambda: self._native(self.transfer.run))

    def test_server_that_is_off_waits_no_longer_than_for_a_stall(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self._lose_at(after=SIZE // 2, seconds=None)
        self._native(self._claimed)
        self._assert_fails(
            'connection was lost', 'destination failed after',
            function=lambda: self._native(self.transfer.run))
        seconds = time.monotonic() - self.lost[0]
        self.assertGreater(seconds, 0.9)
        self.assertLess(seconds, 10)

    def test_refusal_is_not_tried_again(self):
        def lose():
            self._lose()()
            self.dest.open_error = AUTH_ERROR

        self.dest.call('stream.send', lose, after=SIZE // 2)
        self._native(self._claimed)
        opened = self.hosts.opened.count(test_transfer.THERE)
        error = self._assert_fails(
            'cannot connect: authentication failed',
            function=lambda: self._native(self.transfer.run))
        self.assertNotIsInstance(error.__cause__, errors.Unreachable)
        # One for the copy; of those that follow some find nobody there.
        self.assertGreater(
            self.hosts.opened.count(test_transfer.THERE), opened + 1)

    def test_claim_that_is_gone(self):
        def lose():
            self._lose()()
            for path in list(self.dest.files):
                if layout.CLAIM in path:
                    self.dest.remove_file(path)

        self.dest.call('stream.send', lose, after=SIZE // 2)
        self._native(self._claimed)
        error = self._assert_fails(
            'another attempt',
            function=lambda: self._native(self.transfer.run))
        self.assertIsInstance(error.__cause__, errors.Superseded)
        self.assertLess(self._sent(), SIZE // 2 + SECTION)

    def test_host_that_was_restarted(self):
        def lose():
            self._lose()()
            del self.dest.pools[self.places.transient_pool]

        self.dest.call('stream.send', lose, after=SIZE // 2)
        self._native(self._claimed)
        self._assert_fails(
            'as after a restart of the host', 'Migrate the server again',
            function=lambda: self._native(self.transfer.run))

    def test_pool_that_is_not_active_any_more(self):
        def lose():
            self._lose()()
            self.dest.pools['disks'].active = False

        self.dest.call('stream.send', lose, after=SIZE // 2)
        self._native(self._claimed)
        self._assert_fails(
            'is not active', 'virsh pool-start',
            function=lambda: self._native(self.transfer.run))

    def test_daemon_that_hangs_is_not_lost(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        blocked = self.dest.block('stream.send', after=SIZE // 2)
        self.addCleanup(blocked.release)
        self._native(self._claimed)
        opened = len(self.hosts.opened)
        self._assert_fails(
            'nothing moved for 1 seconds',
            function=lambda: self._native(self.transfer.run))
        self.assertEqual(opened + 1, len(self.hosts.opened))

    def test_connection_that_this_side_gave_up_is_not_replaced(self):
        """What was sent over it may still arrive."""
        self._native(self._claimed)
        opened = len(self.hosts.opened)

        def fail():
            self.transfer.there.daemon.connection._wrapped._start = -1
            raise libvirt_storage.make_error(*libvirt_storage.DEFAULT_ERROR)

        self.dest.call('stream.send', fail, after=SIZE // 2)
        self._assert_fails(
            'injected failure',
            function=lambda: self._native(self.transfer.run))
        self.assertEqual(opened + 1, len(self.hosts.opened))

    def test_source_that_fails_is_not_read_again(self):
        chunks = stream.FileSource.chunks

        def break_and_lose(source, length):
            self._lose()()
            os.truncate(self.disk.path, 1)
            return chunks(source, length)

        self._native(self._claimed)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.stream.FileSource.chunks',
            break_and_lose))
        error = self._assert_fails(
            'source failed',
            function=lambda: self._native(self.transfer.run))
        self.assertIsInstance(error.__cause__, errors.CopyError)

    def test_cancel_while_there_is_nobody(self):
        cancel = threading.Event()
        self._lose_at(after=SIZE // 2, seconds=None)
        self.dest.call('open', cancel.set, nth=4)
        self._native(self._claimed)
        self.assertRaises(
            errors.Cancelled, self._native, self.transfer.run, cancel)
        self.assertLess(time.monotonic() - self.lost[0], 5)

    def test_cancel_while_connecting_hangs(self):
        cancel = threading.Event()

        def lose():
            self._lose()()
            self.addCleanup(self.dest.block('open', nth=2).release)

        self.dest.call('stream.send', lose, after=SIZE // 2)
        self._native(self._claimed)
        outcome = []

        def run():
            try:
                self._native(self.transfer.run, cancel)
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.assertTrue(libvirt_storage.wait_for(lambda: any(
            fault.where == 'open' and fault.reached.is_set()
            for fault in self.dest.faults)))
        cancel.set()
        started = time.monotonic()
        thread.join()
        self.assertLess(time.monotonic() - started, 10)
        self.assertIsInstance(outcome[0], errors.Cancelled)

    def test_daemon_that_ends_each_connection_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self.dest.call('stream.send', self._lose(0), after=SIZE // 2,
                       times=None)
        self._native(self._claimed)
        self._assert_fails(
            'connection was lost', 'destination failed after',
            function=lambda: self._native(self.transfer.run))
        self.assertGreater(len(self.lost), 2)
        self.assertLess(time.monotonic() - self.lost[0], 15)


@ddt.ddt
class RunningTestCase(ReconnectTestCase):
    """The disk is copied while its guest writes to it."""

    def _precopied(self):
        self._native(self._claimed)
        self._native(self.transfer.precopy)

    def _assert_hashes_are_right(self):
        """What the guest writes now is found, and nothing else."""
        early = self.transfer._early[self.disk.name]
        ranges = self._native(early.tracked.look, True)
        self.assertEqual([], list(ranges))

    @ddt.data(0, SECTION // 2, SIZE // 2, SIZE - 1)
    def test_lost_while_data_is_sent(self, after):
        self._lose_at(after=after)

        self._precopied()

        self._assert_hashes_are_right()
        self._assert_arrived()
        self._assert_sent_once()
        self._native(self.transfer.run)
        self._assert_arrived()

    def test_guest_zeroes_what_had_arrived_and_is_copied_again(self):
        """What the destination has behind the last section does not stay."""
        def zero():
            with open(self.disk.path, 'r+b') as disk:
                disk.write(bytes(SIZE))
            self._lose()()

        self.dest.call('stream.send', zero, after=SIZE // 2 + SECTION // 2)
        self._precopied()
        early = self.transfer._early[self.disk.name]
        ranges = self._native(early.tracked.look, True)
        # The reader may have been a little ahead.
        copied = self._arrived()[self.path]
        for start in range(0, SIZE, changes.BLOCK_BYTES):
            is_zero = not any(copied[start:start + changes.BLOCK_BYTES])
            is_found = any(first <= start < last for first, last in ranges)
            self.assertNotEqual(is_zero, is_found, start)
        self._native(self.transfer.run)
        self._assert_arrived()

    def test_lost_in_a_pass(self):
        self._precopied()
        data = os.urandom(2 * units.Mi)
        with open(self.disk.path, 'r+b') as disk:
            disk.seek(units.Mi)
            disk.write(data)
        before = self._sent()
        self._lose_at(after=2 * units.Mi)

        self._native(self.transfer.run)

        self._assert_arrived()
        self.assertEqual(1, len(self.lost))
        self.assertLessEqual(self._sent() - before, len(data) + SECTION +
                             changes.BLOCK_BYTES)

    def test_lost_while_the_disk_grows_and_shrinks(self):
        for length in (SIZE + units.Mi + 1, SIZE // 2 - 1):
            with self.subTest(length=length):
                self.dest.faults.clear()
                self._precopied()
                with open(self.disk.path, 'r+b') as disk:
                    disk.truncate(length)
                    disk.write(os.urandom(units.Mi))
                self._lose_at(after=units.Mi // 2)
                self._lose_at('vol.upload')
                self._native(self.transfer.run)
                self._assert_arrived()
                self._native(self.transfer.discard)
                self._write(self.disk.path, os.urandom(SIZE))
                self.transfer = self._new()

    def test_waits_longer_than_for_a_stall(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self._lose_at(after=SIZE // 2, seconds=3)

        self._precopied()

        self._assert_hashes_are_right()
        self._assert_arrived()

    def test_copy_may_stand_still_for_as_long(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self.dest.slow('stream.send', 3, after=SIZE // 2, times=1)

        self._precopied()

        self._assert_arrived()

    def test_time_over(self):
        self.flags(vol_upload_migration_reconnect_timeout=1, group='libvirt')
        self.transfer = self._new()
        self._lose_at(after=SIZE // 2, seconds=None)
        self._native(self._claimed)
        self._assert_fails(
            'connection was lost', 'destination failed after',
            function=lambda: self._native(self.transfer.precopy))

    def test_keepalive_outlasts_all_that_waits(self):
        """A connection that this side closed must not be replaced."""
        for reconnect, stall in ((300, 60), (10, 60), (1, 7)):
            with self.subTest(reconnect=reconnect, stall=stall):
                self.flags(
                    vol_upload_migration_reconnect_timeout=reconnect,
                    vol_upload_migration_stall_timeout=stall,
                    group='libvirt')
                move = self._new()
                self._native(move.there.connect)
                interval, count = self.dest.connections[-1].keepalive
                self.assertGreater(interval * count, max(reconnect, stall))
                move.close()

    def test_live_migration_s_files(self):
        self._native(self._claimed)
        move = self._new()
        move.there._claim = self.transfer.there._claim
        self._lose_at(after=SIZE // 2)
        self._native(move.send)
        self._assert_arrived()
        self._assert_sent_once()


@ddt.ddt
class ClonesTestCase(ReconnectTestCase):
    """Two disks are copied from clones, none of which is left behind."""

    def setUp(self):
        super().setUp()
        self._add_disk('disk.eph0', os.urandom(SIZE))
        self.transfer = self._new()
        self.reflinks = self.useFixture(changing_disk.Reflinks())
        self.costs = [os.stat(file.path).st_blocks * 512
                      for file in self.files]
        self._native(self._claimed)

    def _kinds(self):
        return [early.tracked.kind
                for early in self.transfer._early.values()]

    def _assert_none_left(self):
        self.assertTrue(libvirt_storage.wait_for(
            lambda: not (self.reflinks.costs() or self.reflinks.clones())),
            (self.reflinks.costs(), self.reflinks.clones()))

    def test_lost_while_data_is_sent(self):
        self._lose_at(after=SIZE // 2)

        self._native(self.transfer.precopy)

        self._assert_arrived()
        self._assert_sent_once()
        self.assertEqual(['clone', 'clone'], self._kinds())
        self.assertEqual(sorted(self.costs), self.reflinks.costs())
        self._native(self.transfer.run)
        self._assert_arrived()
        self._native(self.transfer.close)
        self._assert_none_left()

    def test_changes_while_another_disk_is_copied(self):
        """They do not wait for the power off."""
        self.assertTrue(self._native(self.transfer.precopy))
        with open(self.files[0].path, 'r+b') as disk:
            disk.write(os.urandom(SIZE // 4))
        with mock.patch.object(changes, 'FLOOR_BYTES', 0):
            self.assertTrue(self._native(self.transfer.precopy))
            self.assertFalse(self._native(self.transfer.precopy))
        self._assert_arrived()
        before = len(self.dest.streams)
        self._native(self.transfer.run)
        self.assertLess(sum(stream.length for stream in
                            self.dest.streams[before:]), SIZE // 4)
        self._assert_arrived()

    def test_room_for_the_clone_of_one_disk(self):
        self.reflinks.available = (
            changes.RESERVED_BYTES + sum(self.costs) - 1)

        self._native(self.transfer.precopy)

        self.assertEqual(['clone', 'hashes'], self._kinds())
        self._native(self.transfer.run)
        self._assert_arrived()
        self._native(self.transfer.close)
        self._assert_none_left()

    @ddt.data(0, 1)
    def test_copy_that_fails(self, number):
        self.dest.fail('stream.send', name=self.files[number].name,
                       after=SIZE // 2)
        self.assertRaises(
            errors.HostError, self._native, self.transfer.precopy)
        self.assertEqual(1 + number, len(self.reflinks.costs()))
        self._native(self.transfer.close)
        self._assert_none_left()

    def test_cancelled(self):
        cancel = threads.native_threading().Event()
        self.dest.call('stream.send', cancel.set, after=SIZE // 2)
        self.assertRaises(
            errors.Cancelled, self._native, self.transfer.precopy, cancel)
        self._native(self.transfer.close)
        self._assert_none_left()

    def test_close_fails_for_one_disk(self):
        self._native(self.transfer.precopy)
        early = self.transfer._early[self.files[1].name]
        close = early.tracked.close

        def fail():
            close()
            raise OSError('no')

        early.tracked.close = fail
        self.assertRaises(OSError, self._native, self.transfer.close)
        self._assert_none_left()
        self.assertFalse(self.transfer.there.daemon.is_connected())

    def _run_abandoned(self):
        """Begin a copy that nobody waits for.

        :returns: has the kind of its error once it has failed
        """
        failed = []

        def run():
            try:
                self.transfer.precopy()
            except Exception as error:
                failed.append(type(error))

        thread = threads.native_threading().Thread(target=run)
        thread.start()
        self.addCleanup(thread.join)
        return failed

    def test_closed_while_data_is_sent(self):
        blocked = self.dest.block('stream.send', after=SIZE // 2)
        failed = self._run_abandoned()
        self.assertTrue(libvirt_storage.wait_for(blocked.reached.is_set))
        self.assertEqual(1, self.reflinks.clones())
        self._native(self.transfer.close)
        self._assert_none_left()
        blocked.release()
        self.assertTrue(libvirt_storage.wait_for(lambda: failed, 60))
        self._assert_none_left()

    def test_closed_while_a_clone_is_made(self):
        self.reflinks.cloning = self.transfer.close
        failed = self._run_abandoned()
        self.assertTrue(libvirt_storage.wait_for(lambda: failed, 60))
        self.assertEqual([errors.Cancelled], failed)
        self._assert_none_left()


class SectionsTestCase(test_transfer.test.NoDBTestCase):
    """When an upload ends, and the next one begins."""

    def setUp(self):
        super().setUp()
        self.now = 100.0
        self.useFixture(fixtures.MonkeyPatch('time.monotonic',
                                             lambda: self.now))
        self.sections = stream._Sections()

    def _end(self, seconds):
        with self.sections.ending():
            self.now += seconds

    def test_after_so_much_data(self):
        self.assertFalse(self.sections.is_over(stream.SECTION_BYTES - 1))
        self.assertTrue(self.sections.is_over(1))
        self._end(0)
        self.assertFalse(self.sections.is_over(stream.SECTION_BYTES - 1))

    def test_after_so_many_seconds(self):
        self.now += stream.SECTION_SECONDS - 1
        self.assertFalse(self.sections.is_over(1))
        self.now += 1
        self.assertTrue(self.sections.is_over(1))

    def test_not_more_often_than_an_end_costs(self):
        self._end(0.5)
        self.assertFalse(self.sections.is_over(stream.SECTION_BYTES))
        self.now += 0.5 * stream.SECTION_COSTS
        self.assertTrue(self.sections.is_over(1))
