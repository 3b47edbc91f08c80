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

import mmap
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import fixtures
from oslo_config import cfg
from oslo_config import fixture as config_fixture
from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.tests.live import moves
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import stream

from tools import daemons
from tools import processes


class TransferTestCase(base.LiveTestCase):
    """Disks on their way from one real libvirt daemon to another's."""

    def setUp(self):
        super().setUp()
        self.pool_name = 'test-' + uuidutils.generate_uuid()
        self.pools = {host: self.make_pool(host, self.pool_name)
                      for host in (self.source, self.destination)}
        # Before their connections are closed, which they would keep open.
        self.addCleanup(self.pools.clear)
        self.bandwidth = None
        self._name_server()

    def _name_server(self):
        self.uuid = uuidutils.generate_uuid()
        self.volume = self.uuid + '_disk'
        self.directory = f'/var/lib/nova/instances/{self.uuid}'
        self.addCleanup(
            shutil.rmtree, self.destination.path(self.directory),
            ignore_errors=True)

    def _path(self, host, name=None):
        return host.path(
            f'/var/lib/nova/{self.pool_name}/{name or self.volume}')

    def _make_disk(self, size, extents):
        return self.make_disk(
            self.source, f'/var/lib/nova/{self.pool_name}/{self.volume}',
            size, extents)

    def _uri(self, host):
        return self.lab.uri(host)

    def _transfer(self):
        path = self._path(self.source)
        move = moves.new_transfer(
            self.local_uri(self.source), self.destination.name,
            self._uri(self.destination), self.pool_name,
            layout.Layout(self.uuid, str(path.parent),
                          str(self.source.path(self.directory))),
            [layout.File(self.volume, layout.POOL, str(path), 'raw')],
            self.directory, bandwidth=self.bandwidth)
        self.addCleanup(move.close)
        return move

    def _start(self):
        move = self._transfer()
        moves.start(move)
        return move

    def _run(self, move, cancel=None):
        """Copy the files; return what came of the disk."""
        watch = moves.Watch()
        move.run(cancel, watch)
        return watch.results.get(self.volume)

    def _copy(self, cancel=None):
        return self._run(self._start(), cancel)

    def start_copier(self, disable_eventlet='true'):
        """Copy in a process of its own, that has begun on return."""
        environment = dict(
            os.environ, OS_NOVA_DISABLE_EVENTLET_PATCHING=disable_eventlet)
        process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-m', 'nova.tests.live.copier'],
            env=environment, text=True, cwd='/', stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        process.stdin.write(jsonutils.dumps({
            'source_uri': self.local_uri(self.source),
            'destination_uri': self._uri(self.destination),
            'pool': self.pool_name, 'uuid': self.uuid,
            'directory': self.directory}) + '\n')
        process.stdin.flush()
        self.assertEqual('started\n', process.stdout.readline())
        return process

    def _assert_arrived(self):
        self.assertEqual(self.sha256(self._path(self.source)),
                         self.sha256(self._path(self.destination)))

    def _assert_nothing_on_destination(self):
        connection = self.connect_local(self.destination)
        pool = connection.storagePoolLookupByName(self.pool_name)
        pool.refresh()
        self.assertEqual([], pool.listVolumes())
        self.assertFalse(
            os.path.exists(self.destination.path(self.directory)))


class CopyTestCase(TransferTestCase):

    def test_data_and_holes_arrive_as_such(self):
        size = units.Gi
        extents = [(start * 64 * units.Mi + start * 4096, 5 * units.Mi)
                   for start in range(12)]
        self._make_disk(size, extents)
        result = self._copy()
        self._assert_arrived()
        data = 12 * 5 * units.Mi
        self.assertEqual(size, result.length)
        self.assertLessEqual(result.wire, data + 12 * 8192)
        self.assertLessEqual(
            self.allocated(self._path(self.destination)),
            data + 12 * 8192 + units.Mi)

    def test_zeros_that_were_written_take_no_room(self):
        path = self._make_disk(64 * units.Mi, [(0, 8 * units.Mi)])
        with open(path, 'r+b') as disk:
            disk.seek(9 * units.Mi)
            disk.write(bytes(40 * units.Mi))
        result = self._copy()
        self._assert_arrived()
        self.assertLessEqual(
            result.wire, 8 * units.Mi + 2 * stream.ZERO_BYTES)
        self.assertLessEqual(
            self.allocated(self._path(self.destination)), 9 * units.Mi)

    def test_sizes_that_are_no_multiple_of_anything(self):
        for size, extents in (
                (0, []), (1, [(0, 1)]), (511, [(0, 511)]),
                (4097, [(4096, 1)]), (4097, []),
                (3 * units.Gi + 1, []),
                (3 * units.Gi + 1, [(3 * units.Gi, 1)]),
                (stream.WINDOW_BYTES + 1, [(0, stream.WINDOW_BYTES + 1)]),
                (40 * units.Mi, [(0, 4096)])):
            with self.subTest(size=size, extents=extents):
                self._make_disk(size, extents)
                move = self._start()
                result = self._run(move)
                self.assertEqual(size, result.length if result else 0)
                self._assert_arrived()
                move.discard()

    def test_twenty_thousand_extents(self):
        step = 16 * units.Ki
        self._make_disk(20000 * step, [
            (index * step, 4096) for index in range(20000)])
        result = self._copy()
        self._assert_arrived()
        self.assertEqual(20000 * 4096, result.wire)

    def test_daemon_keeps_the_memory_that_it_needs(self):
        """And gets it not again for each message: see LONG_MESSAGE_BYTES."""
        size = 128 * units.Mi
        self._make_disk(size, [(0, size)])
        before = self._page_faults()
        self._copy()
        self.assertLess(
            (self._page_faults() - before) * mmap.PAGESIZE, size // 4)

    def _page_faults(self):
        """How many pages the other daemon has got from the system so far."""
        return processes.page_faults(self.destination.libvirtd_pid)

    def test_files_belong_to_nova_of_the_destination(self):
        self.assertNotEqual(self.source.nova_uid, self.destination.nova_uid)
        self._make_disk(units.Mi, [(0, units.Mi)])
        self._copy()
        for path, mode in ((self._path(self.destination), 0o644),
                           (self.destination.path(self.directory), 0o755)):
            status = os.stat(path)
            self.assertEqual(
                (self.destination.nova_uid, self.destination.nova_gid, mode),
                (status.st_uid, status.st_gid, status.st_mode & 0o7777))

    def test_qcow2_with_a_backing_file_arrives_byte_by_byte(self):
        # The backing file is not on the destination, nor looked for there.
        base_file = self.make_disk(
            self.source, '/var/lib/nova/base', 8 * units.Mi,
            [(0, units.Mi)])
        path = self._path(self.source)
        self.addCleanup(path.unlink, missing_ok=True)
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw', '-b',
             base_file, path, '1G'], check=True)
        subprocess.run(
            ['qemu-io', '-f', 'qcow2', '-c', 'write -P 7 5M 3M', path],
            check=True, stdout=subprocess.DEVNULL)
        self._copy()
        self._assert_arrived()

    def test_qcow2_with_internal_snapshots_arrives_with_them(self):
        path = self._path(self.source)
        self.addCleanup(path.unlink, missing_ok=True)
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', path, '64M'],
            check=True)
        for number in (1, 2):
            subprocess.run(
                ['qemu-io', '-f', 'qcow2', '-c',
                 f'write -P {number} {number}M 5M', path],
                check=True, stdout=subprocess.DEVNULL)
            subprocess.run(
                ['qemu-img', 'snapshot', '-c', f'number{number}', path],
                check=True)
        self._copy()
        self._assert_arrived()
        said = subprocess.run(
            ['qemu-img', 'snapshot', '-l', self._path(self.destination)],
            check=True, stdout=subprocess.PIPE, text=True).stdout
        self.assertIn('number1', said)
        self.assertIn('number2', said)

    def test_holes_wherever_they_are(self):
        size = 8 * units.Mi
        for name, extents in (
                ('trailing', [(0, units.Mi)]),
                ('leading', [(7 * units.Mi, units.Mi)]),
                ('all', []), ('middle', [(0, 1), (size - 1, 1)])):
            with self.subTest(name):
                self._make_disk(size, extents)
                move = self._start()
                move.run()
                self._assert_arrived()
                self.assertLessEqual(
                    self.allocated(self._path(self.destination)),
                    self.allocated(self._path(self.source)) + 8192)
                move.discard()

    def test_names_that_xml_has_to_escape(self):
        self.volume = f'{self.uuid}_a&b<c>"d\'e;--\u00e4'
        self._make_disk(units.Mi, [(0, units.Mi)])
        move = self._start()
        move.run()
        self._assert_arrived()
        self.assertEqual(['disk.info'], os.listdir(
            self.destination.path(self.directory)))
        move.discard()
        self._assert_nothing_on_destination()

    def test_raw_disk_with_a_hostile_header_arrives_byte_by_byte(self):
        path = self._make_disk(8 * units.Mi, [(0, units.Mi)])
        subprocess.run(
            ['qemu-img', 'create', '-q', '-u', '-f', 'qcow2', '-F', 'raw',
             '-b', '/etc/shadow', f'{path}.header', '1T'], check=True)
        with open(f'{path}.header', 'rb') as header:
            data = header.read()
        os.unlink(f'{path}.header')
        with open(path, 'r+b') as disk:
            disk.write(data)
        self._copy()
        self._assert_arrived()
        self.assertEqual(
            8 * units.Mi, os.path.getsize(self._path(self.destination)))


class DirectCopyTestCase(CopyTestCase):
    """The same with disks whose files are read, not downloaded.

    The path of a volume is one of its host's, which this process is not on.
    """

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.stream.open_source',
            lambda _volume, _length, _direct, offset: stream.FileSource(
                str(self._path(self.source)), offset)))


class FaultTestCase(TransferTestCase):

    def _fail(self, break_it):
        """Break something when the copy has begun; return the error."""
        self.useFixture(config_fixture.Config(cfg.CONF)).config(
            vol_upload_migration_reconnect_timeout=0, group='libvirt')
        self._make_disk(512 * units.Mi, [(0, 512 * units.Mi)])
        move = self._start()
        # A cancel event is asked every 0.2 s, which makes it a place from
        # which to do harm in the middle of a copy.
        asked = []

        class Saboteur:
            def is_set(saboteur):
                asked.append(1)
                if len(asked) == 4:
                    break_it()
                return False

        error = self.assertRaises(errors.HostError, move.run, Saboteur())
        self.assertGreaterEqual(len(asked), 4)
        return move, error

    def test_destination_daemon_killed(self):
        def kill():
            self.destination.stop_libvirtd(signal.SIGKILL)

        self.addCleanup(self._restart_libvirtd)
        started = time.monotonic()
        move, error = self._fail(kill)
        self.assertLess(time.monotonic() - started, 30)
        self.assertIn(self.volume[-12:], str(error))
        self._restart_libvirtd()
        move.discard()
        self._assert_nothing_on_destination()

    def _restart_libvirtd(self):
        if self.destination.libvirtd_pid is None:
            self.destination.start_libvirtd()
        pool = self.connect(self.destination).storagePoolLookupByName(
            self.pool_name)
        if not pool.isActive():
            pool.create()

    def test_next_attempt_clears_what_a_dead_source_left(self):
        self._make_disk(units.Mi, [(0, units.Mi)])
        self._copy()
        self.assertTrue(self._path(self.destination).exists())
        move = self._start()
        left, = os.listdir(self._path(self.destination).parent)
        self.assertTrue(left.startswith(f'{self.uuid}_{layout.CLAIM}'), left)
        move.discard()
        self._assert_nothing_on_destination()

    def test_link_cut(self):
        self.addCleanup(self.destination.link, True)
        started = time.monotonic()
        move, error = self._fail(lambda: self.destination.link(False))
        seconds = time.monotonic() - started
        self.assertIn('the connection was lost', str(error))
        interval = cfg.CONF.libvirt.vol_upload_migration_keepalive_interval
        self.assertLess(seconds, interval * (daemon.KEEPALIVE_COUNT + 3) + 5)
        self.destination.link(True)
        move.discard()
        self._assert_nothing_on_destination()

    def test_volume_deleted_during_the_copy(self):
        def delete():
            self.connect(self.destination).storagePoolLookupByName(
                self.pool_name).storageVolLookupByName(self.volume).delete()

        move, error = self._fail(delete)
        self.assertIn('no storage vol', str(error.__cause__))
        move.discard()
        self._assert_nothing_on_destination()

    def test_cancel_stops_the_copy_within_a_second(self):
        self._make_disk(512 * units.Mi, [(0, 512 * units.Mi)])
        move = self._start()
        asked = []

        class CancelLater:
            def is_set(cancel):
                asked.append(time.monotonic())
                return len(asked) >= 4

        self.assertRaises(errors.Cancelled, move.run, CancelLater())
        self.assertLess(time.monotonic() - asked[3], 1)
        move.discard()
        self._assert_nothing_on_destination()


class StrangersTestCase(TransferTestCase):
    """Files beside the server's whose names are Latin-1, not UTF-8."""

    NAME = 'vid\xe9o'.encode('latin-1')

    def setUp(self):
        super().setUp()
        self.strangers = [self._make_stranger(host, directory)
                          for host in (self.source, self.destination)
                          for directory in (f'/var/lib/nova/{self.pool_name}',
                                            '/var/lib/nova/instances')]
        for pool in self.pools.values():
            pool.refresh()

    def _make_stranger(self, host, directory):
        path = os.path.join(os.fsencode(host.path(directory)), self.NAME)
        with open(path, 'wb') as file:
            file.write(b'not of nova')
        self.addCleanup(os.unlink, path)
        return path

    def test_libvirt_python_cannot_name_them(self):
        volumes = self.pools[self.destination].listAllVolumes()
        self.assertEqual(1, len(volumes))
        self.assertRaises(UnicodeDecodeError, volumes[0].name)

    def test_copy_and_discard(self):
        self._make_disk(16 * units.Mi, [(0, 8 * units.Mi)])
        move = self._start()
        self._run(move)
        self._assert_arrived()
        move.discard()
        there = self._path(self.destination).parent
        self.assertEqual([self.NAME], os.listdir(os.fsencode(there)))
        self.assertFalse(
            os.path.exists(self.destination.path(self.directory)))

    def test_confirm_and_delete(self):
        disk = self._make_disk(units.Mi, [(0, units.Mi)])
        places = layout.Layout(self.uuid, str(disk.parent),
                               str(self.source.path(self.directory)))
        kept = pathlib.Path(places.kept_path(str(disk)))
        disk.rename(kept)
        local.delete_kept(places)
        self.assertFalse(kept.exists())
        self._make_disk(units.Mi, [(0, units.Mi)])
        local.delete_volumes(places)
        self.assertFalse(disk.exists())
        self.assertTrue(all(map(os.path.exists, self.strangers)))


class RoomTestCase(TransferTestCase):
    """The destination's file system keeps a part of its blocks for root."""

    def setUp(self):
        super().setUp()
        host = self.destination
        self.path = f'/var/lib/nova/{self.pool_name}'
        image = host.directory / 'image'
        self.addCleanup(image.unlink)
        with image.open('wb') as file:
            file.truncate(128 * units.Mi)
        host.run(['mkfs.ext4', '-q', '-m', '20', '-E',
                  f'root_owner={host.nova_uid}:{host.nova_gid}', str(image)])
        host.run(['mount', '-o', 'loop', str(image), self.path])
        self.addCleanup(host.run, ['umount', '-l', self.path])
        # From inside the host, which alone sees the mount.
        self.inside = f'/proc/{host.pid}/root{self.path}'
        self.status = os.statvfs(self.inside)
        self.tell()

    def tell(self):
        """What nova-compute of the destination does each minute."""
        local.tell_reserved(self.inside)
        self.pools[self.destination].refresh()

    def test_room_is_what_users_may_have(self):
        free, available = (blocks * self.status.f_frsize for blocks in (
            self.status.f_bfree, self.status.f_bavail))
        self.assertGreater(free, available + 20 * units.Mi)
        info = self.pools[self.destination].info()
        self.assertAlmostEqual(free, info[3], delta=units.Mi)
        self._make_disk(available + 8 * units.Mi,
                        [(0, available + 8 * units.Mi)])
        error = self.assertRaises(errors.HostError, self._start)
        self.assertIn('bytes available in storage pool', error.reason)

        self._make_disk(available - 8 * units.Mi,
                        [(0, available - 8 * units.Mi)])
        self._copy()

    def test_room_that_the_administrator_gives_back(self):
        self._make_disk(100 * units.Mi, [(0, 100 * units.Mi)])
        self.assertRaises(errors.HostError, self._start)
        self.destination.run(
            ['sh', '-c', f'tune2fs -m 0 $(findmnt -no SOURCE {self.path})'])
        self.tell()
        self._copy()


class SlowDestinationTestCase(TransferTestCase):
    """2 GiB to a daemon that is stopped for 5 seconds on the way."""

    SIZE = 2 * units.Gi

    def _make_big_disk(self):
        # Cheaper than random bytes, and as little a hole as they are.
        block = os.urandom(units.Mi)
        path = self._path(self.source)
        self.addCleanup(path.unlink, missing_ok=True)
        with open(path, 'wb') as disk:
            for _index in range(self.SIZE // len(block)):
                disk.write(block)

    def _run(self, disable_eventlet):
        self._make_big_disk()
        process = self.start_copier(disable_eventlet)
        stopped_at = self._stop_for_a_while()
        out, err = process.communicate(timeout=300)
        self.assertEqual(0, process.returncode, err)
        self.assertLess(stopped_at, self.SIZE)
        return jsonutils.loads(out)

    def _stop_for_a_while(self):
        """Stop the destination's daemon; return how far the copy was."""
        path = self._path(self.destination)
        daemons.wait_for('the copy to be under way', lambda: (
            os.path.exists(path) and self.allocated(path) > self.SIZE // 4),
            poll=0.05)
        pid = self.destination.libvirtd_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(1)
            done = self.allocated(path)
            time.sleep(4)
            # The file system may still write down what it had allocated.
            self.assertLess(self.allocated(path) - done, units.Mi)
        finally:
            os.kill(pid, signal.SIGCONT)
        return done

    def _test(self, disable_eventlet):
        seen = self._run(disable_eventlet)

        print(jsonutils.dumps(seen), file=sys.stderr)
        self.assertEqual(self.SIZE, seen['result']['wire'])
        self.assertGreater(seen['result']['seconds'], 5)
        self.assertLess(seen['grown'], 64 * units.Mi)
        self.assertGreater(seen['wakes'], 100)
        self.assertLess(seen['late'], 0.2)
        self._assert_arrived()

    def test_native_threads(self):
        self._test('true')

    def test_eventlet(self):
        self._test('false')
