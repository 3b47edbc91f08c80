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

"""Measure the copy of a disk against everything else that copies one.

All ways copy between the two hosts of the lab, as user nova, over TLS or SSH,
one after the other in each round: what disturbs the machine disturbs all. The
figures are medians, and medians of the ratios within a round. What takes
minutes is measured in the first round only. The disks are in the page cache,
and were copied once before the first round. They find warm memory, see
warm_memory().

Takes the lab of NOVA_LAB_DIR if it is up, and one of its own otherwise.

What goes into the documentation is written with
``--output doc/source/performance/copy.json``; see tools/plots.py.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import filecmp
import json
import mmap
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from oslo_utils import uuidutils
import psutil

from tools import bench_report
from tools import lab as nova_lab
from tools import processes
from tools import waiting

POOL = 'bench'
DIRECTORY = '/var/lib/nova/' + POOL
MIB = 1024 ** 2

# Where qemu-nbd listens on the destination, and where it and its client look
# for certificates.
NBD_PORT = 10809
NBD_PKI = '/var/lib/nova/bench-pki'

# The smallest block of memory that a hypervisor takes back, in bytes.
BLOCK = 2 * MIB

# How long the daemon of the destination is stopped for, and how long a copier
# may take to import what it needs, in seconds.
PAUSE = 5
IMPORTS = 8


@dataclasses.dataclass(frozen=True)
class Disk:
    """A kind of disk to copy, in MiB.

    :ivar extents: (offset, length) of its random bytes
    :ivar zeros: whether zeros are written to the rest; a hole if not
    :ivar files: whether the bytes are an archive of this machine's /usr
        rather than random
    """

    name: str
    size: int
    extents: Sequence[tuple[float, float]]
    zeros: bool = False
    files: bool = False

    @property
    def data(self) -> float:
        return sum(length for _offset, length in self.extents)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured with a disk.

    :ivar ways: the first is what the others are compared to
    :ivar slow: ways that are measured in the first round only
    :ivar link: what the hosts can send, as tc(8) spells a rate
    """

    disk: Disk
    ways: Sequence[str]
    slow: Sequence[str] = ()
    link: str | None = None

    @property
    def name(self) -> str:
        return ' '.join(filter(None, (self.disk.name, self.link)))


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one copy took.

    :ivar client: CPU seconds of the processes on the source that copy
    :ivar daemons: CPU seconds of both libvirtd, and of what sshd started
    :ivar memory: bytes that the biggest of the client's processes had
    :ivar grown: bytes that our process grew by in the copy
    :ivar wire: bytes that left the source host
    :ivar used: bytes that the copy takes up
    :ivar late: seconds that a thread of the client was late at worst, which
        wanted to wake up every 10 ms
    :ivar late_99: the same at the 99th percentile
    """

    seconds: float
    client: float
    daemons: float
    memory: int
    wire: int
    used: int
    late: float | None = None
    late_99: float | None = None
    grown: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one way says of its copy.

    :ivar end: deletes the copy
    """

    seconds: float
    client: float
    memory: int
    end: Callable[[], None]
    late: float | None = None
    late_99: float | None = None
    grown: int | None = None


class Bench:
    """The two hosts, and the ways to copy a disk of the pool on the first."""

    def __init__(self, lab: nova_lab.Lab) -> None:
        self.source, self.destination = lab.hosts[:2]
        self._sent = pathlib.Path(
            '/sys/class/net/%s-1/statistics/rx_bytes' % lab.bridge)
        self._server = uuidutils.generate_uuid()
        self._name = self._server + '_disk'
        self._path = '%s/%s' % (DIRECTORY, self._name)
        target = '%s:%s' % (self.destination.name, self._path)
        there = 'virsh -q -c %s' % self.destination.uri
        self._ways: dict[str, Callable[[], Outcome]] = {
            'direct': lambda: self._ours('direct'),
            'volume': lambda: self._ours('volume'),
            'memory': lambda: self._ours('memory'),
            'stalled': self._stalled,
            'two at once': self._two_at_once,
            'cp': lambda: self._shell('cp {0} {0}.cp && rm {0}.cp'.format(
                self._path)),
            'ssh path': lambda: self._shell(
                'ssh {0} touch {2}.tmp && ssh {0} rm {2}.tmp && '
                'ssh {0} mkdir -p {2} && scp -q -C {1} {3} && '
                'scp -q -C /etc/hostname {0}:{2}/hostname && '
                'ssh {0} rm -r {2}'.format(
                    self.destination.name, self._path, DIRECTORY + '/x',
                    target)),
            'scp': lambda: self._shell('scp -q %s %s' % (self._path, target)),
            'scp -C': lambda: self._shell(
                'scp -q -C %s %s' % (self._path, target)),
            'rsync --sparse': lambda: self._shell(
                'rsync --sparse %s %s' % (self._path, target)),
            'rsync --sparse --compress': lambda: self._shell(
                'rsync --sparse --compress %s %s' % (self._path, target)),
            'nbdcopy': self._nbdcopy,
            'virsh': lambda: self._shell(
                '%s vol-create-as %s %s %d --allocation 0 && '
                'virsh -q -c qemu:///system vol-download --pool %s %s '
                '/dev/stdout | %s vol-upload --pool %s %s /dev/stdin' % (
                    there, POOL, self._name, self._file.stat().st_size,
                    POOL, self._name, there, POOL, self._name)),
        }

    @property
    def _file(self) -> pathlib.Path:
        return self.source.path(self._path)

    @property
    def _copy(self) -> pathlib.Path:
        return self.destination.path(self._path)

    @contextlib.contextmanager
    def pools(self) -> Iterator[None]:
        """A pool on either host, for as long as it is needed."""
        for host in (self.source, self.destination):
            path = host.path(DIRECTORY)
            path.mkdir(exist_ok=True)
            os.chown(path, host.nova_uid, host.nova_gid)
            host.run(['virsh', 'pool-create-as', POOL, 'dir', '--target',
                      DIRECTORY])
        try:
            yield
        finally:
            for host in (self.source, self.destination):
                host.run(['virsh', 'pool-destroy', POOL], check=False)
                shutil.rmtree(host.path(DIRECTORY))

    @contextlib.contextmanager
    def link(self, rate: str | None) -> Iterator[None]:
        """Let the hosts send no more than that for a while."""
        hosts = self.source, self.destination
        with contextlib.ExitStack() as stack:
            for host in hosts:
                stack.callback(host.limit, None)
                host.limit(rate)
            yield

    def make(self, disk: Disk) -> None:
        """Write the disk on the source host."""
        content = archive() if disk.files else contextlib.nullcontext(
            os.urandom)
        with content as read, open(self._file, 'wb') as file:
            for _index in range(disk.size if disk.zeros else 0):
                file.write(bytes(MIB))
            file.truncate(disk.size * MIB)
            for offset, length in disk.extents:
                file.seek(int(offset * MIB))
                for start in range(0, int(length * MIB), MIB):
                    file.write(read(min(MIB, int(length * MIB) - start)))
            os.fsync(file.fileno())
        os.chown(self._file, self.source.nova_uid, self.source.nova_gid)

    def measure(self, way: str, compare: bool = False) -> Sample:
        """Copy the disk, look whether it arrived, and delete the copy.

        :param compare: whether to compare all of its bytes
        """
        before = self._daemons_cpu(), self._wire()
        with Watch(self.destination) as sshd:
            outcome = self._ways[way]()
        daemons_cpu = self._daemons_cpu() - before[0] + sshd.seconds
        wire = self._wire() - before[1]
        used = 0
        if way != 'cp':
            self._check_copy(compare and way != 'memory')
            used = self._copy.stat().st_blocks * 512
        outcome.end()
        return Sample(outcome.seconds, outcome.client, daemons_cpu,
                      outcome.memory, wire, used, outcome.late,
                      outcome.late_99, outcome.grown)

    def _check_copy(self, compare: bool) -> None:
        if self._copy.stat().st_size != self._file.stat().st_size:
            raise nova_lab.LabError('the copy has another size')
        if compare and not filecmp.cmp(
                self._file, self._copy, shallow=False):
            raise nova_lab.LabError('the copy has other bytes')

    def _shell(self, command: str) -> Outcome:
        """Copy with a command line of user nova on the source host."""
        started = time.monotonic()
        process = self.source.popen(
            ['sh', '-o', 'errexit', '-c', command], user='nova')
        status, usage = os.wait4(process.pid, 0)[1:]
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise nova_lab.LabError('failed: ' + command)
        return Outcome(seconds, usage.ru_utime + usage.ru_stime,
                       usage.ru_maxrss * 1024, self._remove_copy)

    def _nbdcopy(self) -> Outcome:
        """Copy to a qemu-nbd that is there already, as libvirtd is."""
        size = self._file.stat().st_size
        self.destination.run(['truncate', '--size', str(size), self._path])
        self._link_certificates()
        server = self.destination.popen([
            'qemu-nbd', '--format=raw', '--object',
            'tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir=' +
            NBD_PKI, '--tls-creds=tls', '--bind=' + self.destination.address,
            '--port=%d' % NBD_PORT, self._path])
        try:
            nova_lab.wait_for('qemu-nbd', lambda: self.destination.listens(
                NBD_PORT), poll=0.02)
            return self._shell(
                "nbdcopy --connections=1 %s 'nbds://%s:%d/?tls-certificates="
                "%s'" % (self._path, self.destination.address, NBD_PORT,
                         NBD_PKI))
        finally:
            # It ends with its client.
            if server.wait(timeout=30):
                raise nova_lab.LabError('qemu-nbd failed')

    def _link_certificates(self) -> None:
        """Show libvirt's certificates under the names that NBD has."""
        for host, side in ((self.source, 'client'),
                           (self.destination, 'server')):
            directory = host.path(NBD_PKI)
            directory.mkdir(exist_ok=True)
            for name, target in (
                    ('ca-cert.pem', 'CA/cacert.pem'),
                    (side + '-cert.pem', 'libvirt/%scert.pem' % side),
                    (side + '-key.pem', 'libvirt/private/%skey.pem' % side)):
                with contextlib.suppress(FileExistsError):
                    (directory / name).symlink_to('/etc/pki/' + target)

    def _remove_copy(self) -> None:
        self._copy.unlink(missing_ok=True)
        self.destination.run(['virsh', 'pool-refresh', POOL])

    def _ours(self, read: str) -> Outcome:
        """Copy as nova-compute does, in a process that is not Nova's."""
        return self._outcome(self._start(read, self._server))

    def _stalled(self) -> Outcome:
        """The same under eventlet, while the other daemon is stopped."""
        process = self._start('direct', self._server, eventlet=True)
        assert process.stdout
        if not process.stdout.readline():
            raise nova_lab.LabError('the copy did not begin')
        time.sleep(0.5)
        assert self.destination.libvirtd_pid
        os.kill(self.destination.libvirtd_pid, signal.SIGSTOP)
        try:
            time.sleep(PAUSE)
        finally:
            os.kill(self.destination.libvirtd_pid, signal.SIGCONT)
        outcome = self._outcome(process, begun=True)
        if outcome.seconds < PAUSE:
            raise nova_lab.LabError('the copy was over before the stall')
        return outcome

    def _two_at_once(self) -> Outcome:
        """Copy the disk twice, for two servers; the CPU time is of both."""
        other = uuidutils.generate_uuid()
        link = self._file.with_name(other + '_disk')
        os.link(self._file, link)
        try:
            both = [self._popen() for _index in range(2)]
            time.sleep(IMPORTS)
            for process, server in zip(both, (self._server, other)):
                self._begin(process, 'direct', server)
            outcomes = [self._outcome(process) for process in both]
        finally:
            link.unlink()

        def end() -> None:
            for outcome in outcomes:
                outcome.end()

        return Outcome(
            max(outcome.seconds for outcome in outcomes),
            sum(outcome.client for outcome in outcomes),
            max(outcome.memory for outcome in outcomes), end)

    def _start(self, read: str, server: str,
               eventlet: bool = False) -> subprocess.Popen:
        """Start a copy."""
        process = self._popen(eventlet)
        self._begin(process, read, server)
        return process

    def _popen(self, eventlet: bool = False) -> subprocess.Popen:
        """Start a process that copies once it is told what."""
        return self.source.popen(
            [sys.executable, '-W', 'ignore', '-m', 'nova.tests.live.copier'],
            user='nova', cwd='/', text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={'OS_NOVA_DISABLE_EVENTLET_PATCHING': str(not eventlet)})

    def _begin(self, process: subprocess.Popen, read: str,
               server: str) -> None:
        assert process.stdin
        process.stdin.write(json.dumps({  # noqa: N324
            'source_uri': 'qemu:///system', 'pool': POOL, 'uuid': server,
            'destination_uri': self.destination.uri, 'read': read,
            'directory': '/var/lib/nova/instances/' + server,
            'discard': True}) + '\n')
        process.stdin.flush()

    @staticmethod
    def _outcome(process: subprocess.Popen, begun: bool = False) -> Outcome:
        """Wait for a copy.

        :param begun: whether its first line was read already
        """
        assert process.stdout and process.stderr
        if not begun:
            process.stdout.readline()
        line = process.stdout.readline()
        if not line:
            raise nova_lab.LabError(process.stderr.read())
        seen = json.loads(line)  # noqa: N324
        return Outcome(
            seen['seconds'], seen['cpu'], seen['memory'],
            lambda: process.communicate('\n') and None,
            seen['late'], seen['late_99'], seen['grown'])

    def _wire(self) -> int:
        return int(self._sent.read_text())

    def _daemons_cpu(self) -> float:
        """CPU seconds so far of both libvirtd."""
        return sum(processes.cpu_seconds(host.libvirtd_pid)
                   for host in (self.source, self.destination)
                   if host.libvirtd_pid)


class Watch(waiting.Observer):
    """Adds up the CPU time of the processes that begin on a host.

    sshd does not wait for all of its own, so that asking it is not enough.
    The last quarter of a second of each is missed.
    """

    def __init__(self, host: nova_lab.Host) -> None:
        super().__init__(0.25)
        self._host = host
        self._before = set(host.processes())
        self._seen: dict[int, float] = {}

    @property
    def seconds(self) -> float:
        return sum(self._seen.values())

    def look(self) -> None:
        for pid in set(self._host.processes()) - self._before:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen[pid] = processes.cpu_seconds(pid)


@contextlib.contextmanager
def archive() -> Iterator[Callable[[int], bytes]]:
    """The bytes of an archive of this machine's operating system."""
    with subprocess.Popen(
            ['tar', '--create', '--sort=name', '--directory=/', 'usr'],
            stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield process.stdout.read
        process.kill()


@contextlib.contextmanager
def warm_memory(size: int) -> Iterator[None]:
    """Free memory that a hypervisor does not take back.

    It may take back what its guest does not use, and then makes it wait for
    each page of it: up to two seconds per GiB here, for whatever is copied in
    whatever way. A host of a cloud keeps its memory. Only whole blocks are
    taken back, and of each that is free here one page is not.

    :param size: bytes, if there are as many
    """
    free = os.sysconf('SC_AVPHYS_PAGES') * mmap.PAGESIZE - 1024 * MIB
    size = min(size, free) // BLOCK * BLOCK
    if size <= 0:
        # All memory is in use, and so is warm.
        yield
        return
    # Of a file, so that it is no part of this process, whose size Linux tells
    # as the least of what those that it starts had at their peak.
    with open(os.memfd_create('warm'), 'wb+', buffering=0) as file:
        for _index in range(0, size, BLOCK):
            file.write(bytes(BLOCK))
        with mmap.mmap(file.fileno(), size) as pages:
            for start in range(0, size, BLOCK):
                pages.madvise(mmap.MADV_REMOVE, start + mmap.PAGESIZE,
                              BLOCK - mmap.PAGESIZE)
        yield


Samples = dict[str, list[Sample]]


def run(bench: Bench, work: Work, rounds: int) -> Samples:
    """Measure all ways in each round, each time from another one on."""
    bench.make(work.disk)
    samples: Samples = {way: [] for way in (*work.ways, *work.slow)}
    # Twice as much as is copied, since a part of it is in pieces that are too
    # small for a message, and something for all else.
    with (warm_memory(int(2 * work.disk.data + 2048) * MIB),
          bench.link(work.link)):
        # The first copy on a new lab takes up to twice as long as the others.
        bench.measure(work.ways[0])
        for number in range(rounds):
            first = number % len(work.ways)
            ways = [*work.ways[first:], *work.ways[:first]]
            for way in [*ways, *(work.slow if not number else ())]:
                sample = bench.measure(way, compare=not number)
                samples[way].append(sample)
                print('%s, round %d: %s %.2f s' % (
                    work.name, number + 1, way, sample.seconds),
                    file=sys.stderr)
    return samples


def works(short: bool) -> list[Work]:
    """All that is measured."""
    scale = 4 if short else 1
    size, count = 8192 // scale, 64 // scale
    spread = [(index * 128, 8) for index in range(count)]
    wide = [(index * 256, 8) for index in range(count)]
    extents = 20000 // scale
    step = size * 256 // extents

    def random(name: str, mib: int) -> Disk:
        return Disk(name, mib, [(0, mib)])

    system = Disk('system', 512 // scale, [(0, 512 // scale)], files=True)
    return [
        Work(random('random', 2048 // scale),
             ('direct', 'volume', 'memory', 'nbdcopy', 'scp',
              'rsync --sparse'),
             ('scp -C', 'rsync --sparse --compress', 'virsh', 'cp')),
        *(Work(system, ('direct', 'nbdcopy', 'scp', 'rsync --sparse',
                        'rsync --sparse --compress'), ('scp -C',), link)
          for link in ('1gbit', '200mbit')),
        Work(Disk('sparse', 2 * size, wide), ('direct', 'volume', 'nbdcopy'),
             ('scp', 'rsync --sparse')),
        Work(Disk('zeros written', size, spread, zeros=True), ('direct',)),
        Work(Disk('extents', size, [
            (index * step / 256, 1 / 256) for index in range(extents)]),
            ('direct', 'nbdcopy'), ('rsync --sparse',)),
        Work(random('small', 1), ('direct', 'ssh path')),
        Work(random('two', 1024), ('direct', 'two at once', 'stalled')),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--short', action='store_true',
                        help='disks of a quarter of the size')
    parser.add_argument('--rounds', type=int)
    parser.add_argument('--disks', nargs='+', help='of these names only')
    parser.add_argument('--output', type=pathlib.Path, metavar='FILE',
                        help='write all samples as JSON; disks that are in '
                        'the file and were not measured stay')
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.short else 5)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # What was made for the measurement goes, whichever way it ends.
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(1))
    lab = nova_lab.Lab(nova_lab.DEFAULT)
    was_up = lab.is_up
    lab.up()
    try:
        lab.ssh(True)
        bench = Bench(lab)
        with bench.pools():
            for work in works(args.short):
                if args.disks and work.name not in args.disks:
                    continue
                machine = bench_report.machine()
                found = measured(machine, work, run(bench, work, args.rounds))
                print(bench_report.copy_report({work.name: found}))
                if args.output:
                    bench_report.add(args.output, work.name, found)
        return 0
    finally:
        if not was_up:
            lab.down()


def measured(machine: str, work: Work,
             samples: Samples) -> bench_report.Measured:
    """What is kept of it."""
    return bench_report.Measured(
        machine,
        {way: [[dataclasses.asdict(sample)] for sample in taken]
         for way, taken in samples.items()},
        {'size': work.disk.size, 'data': work.disk.data})


if __name__ == '__main__':
    sys.exit(main())
