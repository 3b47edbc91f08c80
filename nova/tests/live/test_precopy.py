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
"""Disks are copied while a guest writes to them, and what it changed later."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from unittest import mock

from oslo_config import cfg
from oslo_config import fixture as config_fixture
from oslo_serialization import jsonutils
from oslo_utils import units

from nova.tests import changing_disk
from nova.tests.live import moves
from nova.tests.live import test_changes
from nova.tests.live import test_transfer
from nova.virt.libvirt.storage import changes
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout

SIZE = 64 * units.Mi


class Emulator:
    """QEMU that writes to a disk as a guest does, as fast as it goes.

    There is no guest: the writes are ordered through QEMU's monitor. They take
    the way of a guest's, past the page cache.

    :ivar written: how many writes have ended
    """

    def __init__(self, path, disk_format, size, seed):
        """Name the disk; nothing is started yet.

        :param size: bytes of the disk as a guest sees it
        """
        self._path = path
        self._format = disk_format
        self._size = size
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._directory = tempfile.mkdtemp()
        self.written = 0

    def __enter__(self):
        monitor = os.path.join(self._directory, 'monitor')
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(monitor)
        listener.listen()
        self._process = subprocess.Popen(
            ['qemu-system-x86_64', '-S', '-display', 'none', '-nodefaults',
             '-machine', 'none', '-qmp', f'unix:{monitor}', '-drive',
             f'id=disk,if=none,format={self._format},cache=none,'
             f'aio=threads,discard=unmap,file={self._path}'],
            stdout=subprocess.DEVNULL)
        connection, _address = listener.accept()
        listener.close()
        self._monitor = connection.makefile('rw')
        connection.close()
        self._monitor.readline()
        self._run('qmp_capabilities')
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._stop.set()
        self._thread.join()
        self._run('quit')
        self._monitor.close()
        self._process.wait()
        shutil.rmtree(self._directory)

    def _write(self):
        while not self._stop.is_set():
            length = self._random.choice([4096, 65536, units.Mi])
            offset = self._random.randrange(self._size // 4096 - 256) * 4096
            command = self._random.choices(
                [f'write -P {self._random.randrange(1, 256)}', 'write -z -u',
                 'discard'], [8, 1, 1])[0]
            self._run('human-monitor-command', **{
                'command-line': f'qemu-io disk "{command} {offset} {length}"'})
            self.written += 1

    def _run(self, command, **arguments):
        self._monitor.write(jsonutils.dumps(
            {'execute': command, 'arguments': arguments}) + '\n')
        self._monitor.flush()
        while True:
            answer = jsonutils.loads(self._monitor.readline())
            if 'event' not in answer:
                return answer['return']


class _PrecopyTestCase(test_transfer.TransferTestCase):
    """A disk in the pool, on a file system without reflinks."""

    ENGINE = 'hashes'

    def setUp(self):
        super().setUp()
        self.config = self.useFixture(config_fixture.Config(cfg.CONF)).config
        self.watch = moves.Watch()

    def _copied_path(self):
        return self._path(self.destination)

    def _disk(self):
        return self._path(self.source)

    def _fill(self, size=SIZE):
        return self._make_disk(size, [(0, size)])

    def _precopy(self, move, cancel=None):
        moves.precopy_all(move, cancel, self.watch)
        self.assertEqual([self.ENGINE] * len(move._early), [
            early.tracked.kind for early in move._early.values()])

    def _finish(self, move):
        """Copy the rest; return the bytes that were sent for the disk."""
        self.watch.passes.clear()
        self.watch.results.clear()
        move.run(None, self.watch)
        return sum(result.wire for name, result in [
            *self.watch.passes, *self.watch.results.items()]
            if name == self.volume)

    def _assert_same(self):
        self.assertEqual(self.sha256(self._disk()),
                         self.sha256(self._copied_path()))

    def _write(self, offset, data):
        with open(self._disk(), 'r+b') as disk:
            disk.seek(offset)
            disk.write(data)


class PrecopyTestCase(_PrecopyTestCase):

    def test_only_what_changed_is_sent_in_the_end(self):
        self._fill()
        move = self._start()
        self._precopy(move)
        self.assertEqual(SIZE, self.watch.results[self.volume].wire)
        self.assertEqual([], self.watch.passes)
        self._write(5 * units.Mi, b'changed')
        self.assertLessEqual(self._finish(move), changes.BLOCK_BYTES)
        self._assert_same()

    def test_a_guest_that_writes_all_the_time(self):
        path = self._fill()
        move = self._start()
        with test_changes.DirectWriter(path, 1) as writer:
            self._precopy(move)
        self.assertGreater(writer.written, 0)
        self._finish(move)
        self._assert_same()

    def test_qemu_that_writes_all_the_time(self):
        for disk_format in ('raw', 'qcow2'):
            with self.subTest(format=disk_format):
                self._fill()
                path = self._disk()
                if disk_format == 'qcow2':
                    os.unlink(path)
                    subprocess.run(
                        ['qemu-img', 'create', '-q', '-f', 'qcow2', path,
                         str(SIZE)], check=True)
                    with Emulator(path, disk_format, SIZE, 1) as emulator:
                        while emulator.written < 50:
                            time.sleep(0.1)
                move = self._start()
                with Emulator(path, disk_format, SIZE, 2) as emulator:
                    self._precopy(move)
                    while emulator.written < 50:
                        time.sleep(0.1)
                self.assertNotEqual({}, self.watch.results)
                self._finish(move)
                self._assert_same()
                move.discard()
                move.close()

    def test_a_disk_that_grows_and_shrinks(self):
        path = self._fill()
        move = self._start()
        guest = changing_disk.Guest(path, 5, most=SIZE + 2 * units.Mi)
        stop = threading.Event()

        def act():
            while not stop.is_set():
                guest.act()

        thread = threading.Thread(target=act)
        thread.start()
        try:
            self._precopy(move)
        finally:
            stop.set()
            thread.join()
        os.truncate(path, os.path.getsize(path) - 12345)
        self._finish(move)
        self._assert_same()

    def test_more_passes_while_they_help(self):
        self._fill()
        move = self._start()
        look = self.track_class().look
        writes = iter([SIZE // 4, SIZE // 16, SIZE // 64, 0])

        def busy_look(tracked, *args):
            self._write(SIZE // 2, os.urandom(next(writes)))
            return look(tracked, *args)

        with (mock.patch.object(self.track_class(), 'look', busy_look),
                mock.patch.object(changes, 'FLOOR_BYTES', SIZE // 64)):
            self._precopy(move)
        self.assertEqual(
            [SIZE // 4, SIZE // 16],
            [result.wire for _name, result in self.watch.passes])
        self._finish(move)
        self._assert_same()

    def test_a_guest_that_writes_faster_than_the_link_costs_one_pass(self):
        self._fill()
        move = self._start()
        look = self.track_class().look
        looks = []

        def busy_look(tracked, *args):
            looks.append(args)
            self._write(0, os.urandom(SIZE))
            return look(tracked, *args)

        with (mock.patch.object(self.track_class(), 'look', busy_look),
                mock.patch.object(changes, 'FLOOR_BYTES', 0)):
            self._precopy(move)
        self.assertEqual(1, len(looks))
        self.assertEqual([], self.watch.passes)
        self.assertEqual(SIZE, self._finish(move))
        self._assert_same()

    def test_zeros_in_the_place_of_all_data_are_not_sent(self):
        path = self._fill()
        move = self._start()
        self._precopy(move)
        with open(path, 'r+b') as disk:
            changing_disk.punch(disk, units.Mi, SIZE - units.Mi)
        self.assertLess(self._finish(move), 2 * units.Mi)
        self._assert_same()
        self.assertLess(self.allocated(self._copied_path()), 4 * units.Mi)

    def test_what_arrived_is_compared(self):
        self.config(
            group='libvirt', vol_upload_migration_verify='checksum')
        self._fill()
        move = self._start()
        self._precopy(move)
        self._write(0, b'changed')
        self._finish(move)
        self._assert_same()

        move = self._restarted(move)
        self._precopy(move)
        with open(self._copied_path(), 'r+b') as copied:
            copied.seek(9)
            copied.write(b'X')
        error = self.assertRaises(errors.HostError, self._finish, move)
        self.assertIn('it differs from the source', str(error))

    def _restarted(self, move):
        move.discard()
        move.close()
        return self._start()

    def test_copy_that_was_cut_off_is_found_out(self):
        self._fill()
        move = self._start()
        self._precopy(move)
        os.truncate(self._copied_path(), units.Mi)
        error = self.assertRaises(errors.HostError, self._finish, move)
        self.assertIn('Find out what else writes there', str(error))

    def test_cancel_after_the_first_pass(self):
        path = self._fill()
        before = self.sha256(path)
        move = self._start()
        cancel = threading.Event()
        self.watch.end = lambda *args: cancel.set()
        self.assertRaises(errors.Cancelled, self._precopy, move, cancel)
        move.discard()
        self.assertEqual(before, self.sha256(path))
        self.assertFalse(os.path.exists(self._copied_path()))

    def test_cancel_in_the_first_pass(self):
        path = self._fill()
        before = self.sha256(path)
        move = self._start()
        cancel = threading.Event()
        self.watch.note = lambda *args: cancel.set()
        self.assertRaises(errors.Cancelled, move.precopy, cancel, self.watch)
        move.discard()
        move.close()
        self.assertEqual(before, self.sha256(path))
        self.assertFalse(os.path.exists(self._copied_path()))

    def test_destination_ends_in_the_first_pass(self):
        path = self._fill()
        before = self.sha256(path)
        self.config(vol_upload_migration_reconnect_timeout=1, group='libvirt')
        move = self._start()
        self.addCleanup(self.destination.start_libvirtd)
        self.watch.note = lambda *args: self.destination.stop_libvirtd(
            signal.SIGKILL)
        self.assertRaises(errors.HostError, move.precopy, None, self.watch)
        self.destination.start_libvirtd()
        move.discard()
        self.assertEqual(before, self.sha256(path))
        self.assertFalse(os.path.exists(self._copied_path()))

    def test_short_disks_wait(self):
        self._fill(100_000)
        move = self._start()
        self._precopy(move)
        self.assertEqual({}, self.watch.results)
        self.assertEqual(100_000, self._finish(move))
        self._assert_same()

    def test_descriptors_are_closed(self):
        self._fill()
        descriptors = len(os.listdir('/proc/self/fd'))
        for _ in range(2):
            move = self._start()
            self._precopy(move)
            move.discard()
            move.close()
            paths = [os.readlink(f'/proc/self/fd/{name}')
                     for name in os.listdir('/proc/self/fd')
                     if os.path.exists(f'/proc/self/fd/{name}')]
            self.assertNotIn(str(self._disk()), paths)
        self.assertLess(len(os.listdir('/proc/self/fd')), descriptors + 8)

    def track_class(self):
        return {'hashes': changes.Hashes, 'clone': changes.Clone}[self.ENGINE]


class ClonePrecopyTestCase(PrecopyTestCase):
    """A disk in the instance directory, on XFS."""

    ENGINE = 'clone'

    def setUp(self):
        super().setUp()
        self.file_system = self.useFixture(test_changes.FileSystem('xfs'))
        self.volume = 'disk'

    def _disk(self):
        return os.path.join(self.file_system.path, self.volume)

    def _copied_path(self):
        return self.destination.path(f'{self.directory}/{self.volume}')

    def _make_disk(self, size, extents):
        path = super()._make_disk(size, extents)
        shutil.copyfile(path, self._disk())
        return self._disk()

    def _transfer(self):
        move = moves.new_transfer(
            self.local_uri(self.source), self.destination.name,
            self._uri(self.destination), self.pool_name,
            layout.Layout(self.uuid, '', self.file_system.path),
            [layout.File(self.volume, layout.DIRECTORY, self._disk(), 'raw')],
            self.directory, uses_pool=False)
        self.addCleanup(move.close)
        return move
