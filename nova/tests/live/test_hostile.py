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

"""No libvirt daemon opens a path because a guest wrote it.

A server has raw disks, a config drive, a kernel and a ramdisk that each begin
with another header; the headers name files on which who opens them hangs.
"""

import contextlib
import dataclasses
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import typing as ty
from unittest import mock

import libvirt
from oslo_utils import units
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.tests.live import hostile
from nova.tests.live import hostile_table
from nova.tests.live import moves
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import transfer
from tools import lab as nova_lab
from tools import process_trace

INSTANCES = '/var/lib/nova/instances'

OPENS = ('open', 'openat', 'openat2')

# A file that a daemon reads as it starts.
CONFIGURATION = '/etc/libvirt/qemu.conf'

# A file system that answers nothing, as one on a server that is gone.
HANGING = """\
import ctypes, os, sys
device = os.open('/dev/fuse', os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
options = f'fd={device},rootmode=40000,user_id=0,group_id=0'.encode()
if libc.mount(b'hanging', sys.argv[1].encode(), b'fuse', 0, options):
    raise OSError(ctypes.get_errno(), 'mount')
print('mounted', flush=True)
sys.stdin.read()
"""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to begin a disk.

    :ivar name: for the table
    :ivar make: makes the header
    :ivar bait: the file that it names, below hostile.BAIT if relative
    """
    name: str
    make: ty.Callable[[str], bytes]
    bait: str

    @property
    def path(self) -> str:
        return os.path.join(hostile.BAIT, self.bait)


# By the names of the files that begin so.
KINDS = {
    'disk': Kind('qcow2, /proc/kmsg', hostile.qcow2, '/proc/kmsg'),
    'disk.eph0': Kind('qcow2, a FIFO', hostile.qcow2, 'qcow2'),
    'disk.eph1': Kind('qcow2 version 3, a FIFO',
                      lambda path: hostile.qcow2(path, 3), 'qcow3'),
    'disk.eph2': Kind('qcow, a FIFO', hostile.qcow, 'qcow'),
    'disk.eph3': Kind('QED, a FIFO', hostile.qed, 'qed'),
    'disk.eph4': Kind('VMDK, a FIFO', hostile.vmdk, 'vmdk'),
    'disk.eph5': Kind('COW, a FIFO', hostile.cow, 'cow'),
    'disk.eph6': Kind('qcow2, a FIFO in the notation json:', hostile.json,
                      'json'),
    'disk.eph7': Kind('qcow2, a chain that ends in a FIFO', hostile.qcow2,
                      'chain'),
    'disk.eph8': Kind('qcow2, /dev/full', hostile.qcow2, '/dev/full'),
    'disk.eph9': Kind('qcow2, a file system that hangs', hostile.qcow2,
                      'hanging/file'),
    'disk.eph10': Kind('qcow2, itself', hostile.qcow2, ''),
    'disk.eph11': Kind('VHDX', hostile.vhdx, ''),
    'disk.eph12': Kind('VDI', hostile.vdi, ''),
    'disk.config': Kind('qcow2 on a config drive, a FIFO', hostile.qcow2,
                        'config'),
    'kernel': Kind('qcow2 as a kernel, a FIFO', hostile.qcow2, 'kernel'),
    'ramdisk': Kind('COW as a ramdisk, a FIFO', hostile.cow, 'ramdisk'),
}


class Client:
    """Another client of a daemon, which asks it something all the time.

    :ivar seconds: how long each answer took
    """

    def __init__(self, connect: ty.Callable[[], libvirt.virConnect]):
        self.seconds: list[float] = []
        self._connect = connect
        self._asked = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> 'Client':
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # A moment may be shorter than the first question.
        self._asked.wait(30)
        self._over.set()
        self._thread.join(30)

    def check(self, test: base.LiveTestCase) -> None:
        """Check that the daemon answered all the time, and soon."""
        test.assertFalse(self._thread.is_alive())
        # strace stops the daemon at each call, and the machine may be busy.
        # Who hangs on a bait does so for ever.
        slow = [seconds for seconds in self.seconds if seconds > 1]
        test.assertLessEqual(len(slow), len(self.seconds) / 20, slow)
        test.assertLess(max(self.seconds, default=30), 5)

    def _ask(self) -> None:
        connection = self._connect()
        while not self._over.wait(0.05):
            started = time.monotonic()
            connection.getHostname()
            for pool in connection.listAllStoragePools():
                # Others make and end pools.
                with contextlib.suppress(libvirt.libvirtError):
                    pool.info()
            self.seconds.append(time.monotonic() - started)
            self._asked.set()


class HostileTestCase(base.LiveTestCase):
    """A server whose guest and owner are as hostile as can be."""

    def setUp(self) -> None:
        super().setUp()
        self.uuid = uuidutils.generate_uuid()
        self.directory = f'{INSTANCES}/{self.uuid}'
        for host in self.source, self.destination:
            self.addCleanup(self._remove, host)
            self._lay_bait(host)
        self.places = self._layout(self.source)
        self.there = self._layout(self.destination)
        self.files = self._add_files()

    def _layout(self, host: nova_lab.Host) -> layout.Layout:
        """Where a host has the server, by paths of this process."""
        return layout.Layout(
            self.uuid, '/nowhere', str(host.path(self.directory)))

    def _remove(self, host: nova_lab.Host) -> None:
        for path in host.path(INSTANCES).glob(f'{self.uuid}*'):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _lay_bait(self, host: nova_lab.Host) -> None:
        bait = host.path(hostile.BAIT)
        (bait / 'hanging').mkdir(parents=True)
        self.addCleanup(shutil.rmtree, bait)
        for kind in KINDS.values():
            if kind.bait and '/' not in kind.bait:
                os.mkfifo(bait / kind.bait)
        (bait / 'chain').unlink()
        os.mkfifo(bait / 'end')
        (bait / 'chain').write_bytes(
            hostile.qcow2(f'{hostile.BAIT}/end').ljust(units.Mi, b'\0'))
        self._hang(host, f'{hostile.BAIT}/hanging')

    def _hang(self, host: nova_lab.Host, path: str) -> None:
        process = host.popen(
            [sys.executable, '-c', HANGING, path], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(host.run, ['umount', '--lazy', path])
        self.addCleanup(process.communicate)
        self.assertEqual('mounted\n', process.stdout.readline())

    def _content(self, name: str, kind: Kind) -> bytes:
        path = kind.path if kind.bait else f'{self.directory}/{name}'
        return kind.make(path).ljust(hostile.HEAD, b'\0') + b'x' * units.Mi

    def _add_files(self) -> list[layout.File]:
        os.mkdir(self.places.directory)
        for name, kind in KINDS.items():
            with open(f'{self.places.directory}/{name}', 'wb') as file:
                file.write(self._content(name, kind))
        disks = [f'{self.places.directory}/{name}' for name in KINDS
                 if name.startswith('disk')]
        layout.write_record(
            self.places.record_path, dict.fromkeys(disks, 'raw'))
        return self.places.plan(
            [{'path': path, 'type': 'raw'} for path in disks])

    def _new_transfer(self) -> transfer.Transfer:
        move = moves.new_transfer(
            self.local_uri(self.source), self.destination.name,
            self.lab.uri(self.destination), 'none', self.places, self.files,
            self.directory, uses_pool=False)
        self.addCleanup(move.close)
        return move

    @contextlib.contextmanager
    def moment(self, name: str) -> ty.Iterator[None]:
        """Watch both daemons, and record what became of the baits."""
        traces = [process_trace.Trace(host, *OPENS)
                  for host in (self.source, self.destination)]
        with contextlib.ExitStack() as stack:
            for trace in traces:
                stack.enter_context(trace)
            with self._clients():
                yield
        self._check_baits(name, traces)

    def restart(self, name: str) -> None:
        """Restart both daemons, watched from their first instruction on."""
        records = [process_trace.Record(host, *OPENS)
                   for host in (self.source, self.destination)]
        for record in records:
            self.addCleanup(record.host.restart_libvirtd)
            record.host.stop_libvirtd()
            record.host.start_libvirtd(record.argv)
        with self._clients():
            time.sleep(2)
        for record in records:
            record.host.stop_libvirtd()
            self.assertIn(CONFIGURATION, record.opened())
        self._check_baits(name, records)

    @contextlib.contextmanager
    def _clients(self) -> ty.Iterator[None]:
        """Have other clients of both daemons, which get their answers."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(
                lambda host=host: self.connect(host)))
                for host in (self.source, self.destination)]
            yield
        for client in clients:
            client.check(self)

    def _check_baits(self, name: str,
                     records: list[process_trace.Record]) -> None:
        """Check that nobody opened a bait, and record it."""
        opened = {path for record in records for path in record.opened()}
        for record in records:
            opened |= self._open_fifos(record.host)
        outcomes = {kind.name: 'opened' if kind.bait and kind.path in opened
                    else 'not opened' for kind in KINDS.values()}
        self.assertEqual({'not opened'}, set(outcomes.values()), outcomes)
        self.assertNotIn(f'{hostile.BAIT}/end', opened)
        hostile_table.record(name, outcomes)

    def _open_fifos(self, host: nova_lab.Host) -> set[str]:
        """The FIFOs that somebody has open, or waits to open."""
        found = set()
        for path in host.path(hostile.BAIT).iterdir():
            if not stat.S_ISFIFO(path.stat().st_mode):
                continue
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                found.add(f'{hostile.BAIT}/{path.name}')
        return found

    def _migrate(self) -> None:
        move = self._new_transfer()
        moves.start(move)
        move.run()
        move.close()
        local.keep_directory(self.places)

    def _assert_arrived(self) -> None:
        for name, kind in KINDS.items():
            with open(f'{self.there.directory}/{name}', 'rb') as file:
                self.assertEqual(self._content(name, kind), file.read())


class MomentTestCase(HostileTestCase):

    def test_migration(self):
        move = self._new_transfer()
        with self.moment(hostile_table.PREFLIGHT):
            moves.start(move)
        settle = move.there.settle
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.moment(hostile_table.COPY))

            def end_of_copy(files):
                stack.close()
                stack.enter_context(
                    self.moment(hostile_table.UPLOADED))
                return settle(files)

            with mock.patch.object(move.there, 'settle', end_of_copy):
                move.run()
        self._assert_arrived()
        move.close()
        local.keep_directory(self.places)
        with self.moment(hostile_table.CONFIRM):
            local.delete_kept(self.places)
            shutil.rmtree(self.places.kept_directory)

    def test_revert(self):
        self._migrate()
        with self.moment(hostile_table.REVERT):
            local.delete_all(self.there)
            local.recover_directory(self.places)
        self.assertFalse(os.path.exists(self.there.directory))

    def test_delete(self):
        self._migrate()
        with self.moment(hostile_table.DELETE):
            local.delete_all(self.there)
            shutil.rmtree(self.places.kept_directory)

    def test_restart_of_the_daemons(self):
        self._migrate()
        self.restart(hostile_table.RESTART)
        self._assert_arrived()

    def test_retry_after_a_crash_while_heads_are_sent(self):
        move = self._new_transfer()
        moves.start(move)
        copy = stream.copy
        sent = []

        def crash(source, *args, **kwargs):
            if source.kind == 'memory' and move.there._is_sealed:
                if len(sent) == 3:
                    raise KeyboardInterrupt
                sent.append(source)
            return copy(source, *args, **kwargs)

        with self.moment(hostile_table.RETRY):
            with mock.patch.object(stream, 'copy', crash):
                self.assertRaises(KeyboardInterrupt, move.run)
            move.close()
            error = self.assertRaises(
                errors.HostError, self._new_transfer().check)
            self.assertIn('is there already', str(error))
            self.assertEqual([self.uuid], [
                uuid for uuid in self._arrived_there() if uuid == self.uuid])
            local.end_pool(
                self.local_uri(self.destination), self.there.transient_pool)
            local.delete_all(self.there)
            self._migrate()
        self._assert_arrived()

    def _arrived_there(self):
        with mock.patch.object(
                local.CONF, 'instances_path',
                str(self.destination.path(INSTANCES)), create=True):
            return local.list_copied()

    def test_retry_after_a_crash_of_a_copy(self):
        move = self._new_transfer()
        moves.start(move)
        with mock.patch.object(
                move.there, 'settle', side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, move.run)
        move.close()
        with self.moment(hostile_table.RETRY):
            self._migrate()
        self._assert_arrived()


class ControlTestCase(base.LiveTestCase):
    """The same headers in a pool, with files that nobody hangs on."""

    def test_daemon_opens_what_the_headers_name(self):
        pool = self.make_pool(self.source)
        path = self.source.path(f'/var/lib/nova/{pool.name()}')
        kinds = {name: kind for name, kind in KINDS.items() if kind.bait}
        opened_by = {}
        for name, kind in kinds.items():
            bait = f'/run/{pool.name()}-{name}'
            self.source.path(bait).write_text('bait')
            self.addCleanup(self.source.path(bait).unlink)
            (path / name).write_bytes(
                kind.make(bait).ljust(units.Mi, b'\0'))
            opened_by[bait] = kind.name
        with process_trace.Trace(
                self.source, *OPENS) as trace:
            pool.refresh()
        opened = {opened_by[bait] for bait in trace.opened()
                  if bait in opened_by}
        self.assertEqual(set(opened_by.values()), opened)
        hostile_table.record(hostile_table.CONTROL, {
            kind.name: 'opened' if kind.bait else 'no file is named'
            for kind in KINDS.values()})
