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
"""A copy goes on after its link was cut, or its daemon restarted."""

import os
import pathlib
import signal
import threading
import time
from unittest import mock

import ddt
import fixtures
from oslo_utils import units

from nova.tests.live import test_changes
from nova.tests.live import test_precopy
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import stream

SIZE = 512 * units.Mi

# What the tests take for a section.
SECTION = 16 * units.Mi

# What is sent twice at most: a section, the message that ended it, and the
# part of a block before it.
WINDOW = SECTION + 4 * units.Mi


class ReconnectTestCase(test_precopy._PrecopyTestCase):
    """A disk of which something happens to the copy."""

    def setUp(self):
        super().setUp()
        for name, value in (('SECTION_BYTES', SECTION), ('SECTION_COSTS', 0)):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.stream.' + name, value))
        self._fill(SIZE)
        self.happened = []
        self.sent = {}

    def _at(self, part, function):
        """Have something happen when a part of the disk has been sent."""
        def note(name, done, wire):
            self.sent[name] = wire
            if wire > part * SIZE and not self.happened:
                self.happened.append(time.monotonic())
                function()

        self.watch.note = note

    def _cut(self, seconds):
        """Cut the link for some time, in the background."""
        timer = threading.Timer(
            seconds, lambda: self.destination.link(True))
        self.addCleanup(self.destination.link, True)
        self.addCleanup(timer.join)
        self.destination.link(False)
        timer.start()

    def _restart(self, signum=signal.SIGTERM):
        self.destination.stop_libvirtd(signum)
        self.destination.start_libvirtd()

    def _in_background(self, function, *args):
        thread = threading.Thread(target=function, args=args)
        self.addCleanup(thread.join)
        thread.start()

    def _moved(self, move):
        """Copy the disk as that of a server that is off."""
        move.run(None, self.watch)
        self._assert_same()
        return self.watch.results[self.volume].wire

    def _assert_sent_once(self, wire, cuts=1):
        self.assertTrue(self.happened)
        self.assertGreaterEqual(wire, SIZE)
        self.assertLessEqual(wire, SIZE + cuts * WINDOW)


@ddt.ddt
class RunningTestCase(ReconnectTestCase):
    """The server runs, and writes to its disk."""

    def _copied(self):
        """Copy a disk in use; return what was sent until it was off."""
        move = self._start()
        with test_changes.DirectWriter(self._disk(), 1) as writer:
            self._precopy(move)
        self.assertGreater(writer.written, 0)
        wire = self.watch.results[self.volume].wire
        self._finish(move)
        self._assert_same()
        return wire

    @ddt.data(10, 35)
    def test_link_is_cut(self, seconds):
        """For less, and for more than the daemon waits for its client."""
        self._at(0.8, lambda: self._cut(seconds))
        self._assert_sent_once(self._copied())

    @ddt.data(signal.SIGTERM, signal.SIGKILL)
    def test_daemon_restarts(self, signum):
        self._at(0.8, lambda: self._restart(signum))
        self._assert_sent_once(self._copied())

    def test_daemon_restarts_in_a_pass(self):
        move = self._start()
        self._precopy(move)
        data = os.urandom(SIZE // 2)
        self._write(SIZE // 4, data)
        name = f'{self.volume}, pass 1'

        def note(each, done, wire):
            if each == name and wire > len(data) // 2 and not self.happened:
                self.happened.append(wire)
                self._restart()

        self.watch.note = note
        wire = self._finish(move)
        self.assertTrue(self.happened)
        self.assertLess(wire, len(data) + WINDOW)
        self._assert_same()

    def test_daemon_restarts_while_changes_are_looked_for(self):
        move = self._start()
        look = self.track_class().look

        def restart_and_look(*args):
            self._restart()
            self.happened.append(1)
            return look(*args)

        with mock.patch.object(
                self.track_class(), 'look', restart_and_look):
            self._precopy(move)
            self._write(SIZE // 2, b'changed')
            self._finish(move)
        self.assertEqual(2, len(self.happened))
        self._assert_same()

    def track_class(self):
        return test_precopy.changes.Hashes

    def test_cancel_while_the_link_is_down(self):
        cancel = threading.Event()

        def cut():
            self.addCleanup(self.destination.link, True)
            self.destination.link(False)
            timer = threading.Timer(5, self._cancel, [cancel])
            self.addCleanup(timer.join)
            timer.start()

        self._at(0.5, cut)
        move = self._start()
        self.assertRaises(errors.Cancelled, move.precopy, cancel, self.watch)
        self.assertLess(time.monotonic() - self.cancelled, 2)
        self.destination.link(True)

    def _cancel(self, cancel):
        self.cancelled = time.monotonic()
        cancel.set()

    def test_cancel_while_there_is_no_daemon(self):
        cancel = threading.Event()

        def stop():
            self.addCleanup(self.destination.start_libvirtd)
            self.destination.stop_libvirtd()
            timer = threading.Timer(5, self._cancel, [cancel])
            self.addCleanup(timer.join)
            timer.start()

        self._at(0.5, stop)
        move = self._start()
        self.assertRaises(errors.Cancelled, move.precopy, cancel, self.watch)
        self.assertLess(time.monotonic() - self.cancelled, 2)

    def test_daemon_that_stays_away(self):
        self.config(vol_upload_migration_reconnect_timeout=5, group='libvirt')

        def stop():
            self.addCleanup(self.destination.start_libvirtd)
            self.destination.stop_libvirtd()

        self._at(0.5, stop)
        move = self._start()
        error = self.assertRaises(
            errors.HostError, move.precopy, None, self.watch)
        self.assertIn('the connection was lost', str(error))
        seconds = time.monotonic() - self.happened[0]
        self.assertGreater(seconds, 4)
        self.assertLess(seconds, 15)

    def test_host_that_was_restarted(self):
        """It has none of its transient pools any more."""
        def restart():
            state = pathlib.Path(self.destination.path(
                '/run/libvirt/storage'), f'nova-{self.uuid}.xml')
            self.destination.stop_libvirtd(signal.SIGKILL)
            state.unlink()
            self.destination.start_libvirtd()

        self._at(0.5, restart)
        move = self._start()
        error = self.assertRaises(
            errors.HostError, move.precopy, None, self.watch)
        self.assertIn('as after a restart of the host', str(error))
        move.discard()
        self._assert_nothing_on_destination()

    def test_claim_that_is_gone(self):
        def restart():
            self.destination.stop_libvirtd()
            claim, = self._path(self.destination).parent.glob(
                f'{self.uuid}_{layout.CLAIM}-*')
            claim.unlink()
            self.destination.start_libvirtd()

        self._at(0.5, restart)
        move = self._start()
        error = self.assertRaises(
            errors.HostError, move.precopy, None, self.watch)
        self.assertIsInstance(error.__cause__, errors.Superseded)


@ddt.ddt
class StoppedTestCase(ReconnectTestCase):
    """The server is off."""

    @ddt.data(False, True)
    def test_link_is_cut(self, direct):
        if direct:
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.stream.open_source',
                lambda _volume, _length, _direct, offset: stream.FileSource(
                    str(self._path(self.source)), offset)))
        self._at(0.8, lambda: self._cut(10))
        self._assert_sent_once(self._moved(self._start()))

    @ddt.data(signal.SIGTERM, signal.SIGKILL)
    def test_daemon_restarts(self, signum):
        self._at(0.8, lambda: self._restart(signum))
        self._assert_sent_once(self._moved(self._start()))

    def test_daemon_restarts_time_and_again(self):
        restarts = []

        def note(name, done, wire):
            if name == self.volume and wire > (
                    len(restarts) + 1) * SIZE // 5:
                restarts.append(wire)
                self._restart()

        self.watch.note = note
        self.happened.append(0)
        wire = self._moved(self._start())
        self.assertGreater(len(restarts), 3)
        self._assert_sent_once(wire, len(restarts))

    def test_holes_stay_holes(self):
        self._make_disk(SIZE, [
            (start, 3 * units.Mi)
            for start in range(0, SIZE, 16 * units.Mi)])
        self.watch.note = lambda name, done, wire: (
            wire > 80 * units.Mi and not self.happened and (
                self.happened.append(1), self._restart()))
        self._moved(self._start())
        self.assertLessEqual(
            self.allocated(self._copied_path()),
            self.allocated(self._disk()) + units.Mi)

    def test_link_is_cut_for_too_long(self):
        self.config(vol_upload_migration_stall_timeout=5, group='libvirt')
        self._at(0.8, lambda: self._cut(20))
        move = self._start()
        self.assertRaises(errors.HostError, move.run, None, self.watch)
        self.assertLess(time.monotonic() - self.happened[0], 15)
