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
figures are medians, and medians of the ratios within a round. The disks are in
the page cache.

Takes the lab of NOVA_LAB_DIR if it is up, and one of its own otherwise.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import filecmp
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time

import lab as nova_lab
from oslo_utils import uuidutils

POOL = 'bench'
DIRECTORY = '/var/lib/nova/' + POOL
MIB = 1024 ** 2
TICKS = os.sysconf('SC_CLK_TCK')
WAYS = ('direct', 'volume', 'memory', 'scp', 'scp -C', 'rsync --sparse',
        'rsync --sparse --compress', 'virsh')
COLUMNS = ('way', 'seconds', 'ratio', 'client CPU s', 'daemons CPU s',
           'peak MiB', 'wire MiB', 'late ms')


@dataclasses.dataclass(frozen=True)
class Disk:
    """A kind of disk to copy, in MiB.

    :ivar extents: (offset, length) of its random bytes
    :ivar zeros: whether zeros are written to the rest; a hole if not
    """

    name: str
    size: int
    extents: Sequence[tuple[int, int]]
    zeros: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one copy took.

    :ivar client: CPU seconds of the processes on the source that copy
    :ivar daemons: CPU seconds of both libvirtd, and of what sshd started
    :ivar memory: bytes that the biggest of the client's processes had
    :ivar wire: bytes that left the source host
    :ivar late: seconds that a thread of the client was late at worst, which
        wanted to wake up every 10 ms
    """

    seconds: float
    client: float
    daemons: float
    memory: int
    wire: int
    late: float | None = None


# Seconds, CPU seconds, peak memory and lateness of the client, and what
# deletes the copy.
Outcome = tuple[float, float, int, float | None, Callable[[], None]]


class Bench:
    """The two hosts, and the ways to copy a disk of the pool on the first."""

    def __init__(self, lab: nova_lab.Lab) -> None:
        self.source, self.destination = lab.hosts[:2]
        self._sent = pathlib.Path(
            '/sys/class/net/%s-1/statistics/rx_bytes' % lab.bridge)
        self._name = uuidutils.generate_uuid() + '_disk'
        self._path = '%s/%s' % (DIRECTORY, self._name)
        self._compare = False
        target = '%s:%s' % (self.destination.name, self._path)
        there = 'virsh -q -c %s' % self.destination.uri
        self._ways: dict[str, Callable[[], Outcome]] = {
            'direct': lambda: self._ours('direct'),
            'volume': lambda: self._ours('volume'),
            'memory': lambda: self._ours('memory'),
            'scp': lambda: self._shell('scp -q %s %s' % (self._path, target)),
            'scp -C': lambda: self._shell(
                'scp -q -C %s %s' % (self._path, target)),
            'rsync --sparse': lambda: self._shell(
                'rsync --sparse %s %s' % (self._path, target)),
            'rsync --sparse --compress': lambda: self._shell(
                'rsync --sparse --compress %s %s' % (self._path, target)),
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

    def make(self, disk: Disk) -> None:
        """Write the disk on the source host."""
        with open(self._file, 'wb') as file:
            for _index in range(disk.size if disk.zeros else 0):
                file.write(bytes(MIB))
            file.truncate(disk.size * MIB)
            for offset, length in disk.extents:
                file.seek(offset * MIB)
                for _index in range(length):
                    file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        os.chown(self._file, self.source.nova_uid, self.source.nova_gid)

    def measure(self, way: str, compare: bool = False) -> Sample:
        """Copy the disk, look whether it arrived, and delete the copy.

        :param compare: whether to compare all of its bytes
        """
        self._compare = compare and way != 'memory'
        before = self._daemons_cpu(), self._wire()
        with Watch(self.destination) as sshd:
            seconds, client, memory, late, end = self._ways[way]()
        daemons = self._daemons_cpu() - before[0] + sshd.seconds
        wire = self._wire() - before[1]
        self._check_copy()
        end()
        return Sample(seconds, client, daemons, memory, wire, late)

    def _check_copy(self) -> None:
        if self._copy.stat().st_size != self._file.stat().st_size:
            raise nova_lab.LabError('the copy has another size')
        if self._compare and not filecmp.cmp(
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
        return (seconds, usage.ru_utime + usage.ru_stime,
                usage.ru_maxrss * 1024, None, self._remove_copy)

    def _remove_copy(self) -> None:
        self._copy.unlink()
        self.destination.run(['virsh', 'pool-refresh', POOL])

    def _ours(self, read: str) -> Outcome:
        """Copy as nova-compute does, in a process that is not Nova's."""
        server = self._name.removesuffix('_disk')
        process = self.source.popen(
            [sys.executable, '-W', 'ignore', '-m', 'nova.tests.live.copier'],
            user='nova', env={'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'true'},
            cwd='/', text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(json.dumps({  # noqa: N324
            'source_uri': 'qemu:///system', 'pool': POOL, 'uuid': server,
            'destination_uri': self.destination.uri, 'read': read,
            'directory': '/var/lib/nova/instances/' + server,
            'discard': True}) + '\n')
        process.stdin.flush()
        if not process.stdout.readline():
            raise nova_lab.LabError(process.stderr.read())
        seen = json.loads(process.stdout.readline())  # noqa: N324

        def end() -> None:
            process.communicate('\n')

        return (seen['seconds'], seen['cpu'], seen['memory'], seen['late'],
                end)

    def _wire(self) -> int:
        return int(self._sent.read_text())

    def _daemons_cpu(self) -> float:
        """CPU seconds so far of both libvirtd."""
        return sum(_cpu_seconds(host.libvirtd_pid)
                   for host in (self.source, self.destination)
                   if host.libvirtd_pid)


class Watch(threading.Thread):
    """Adds up the CPU time of the processes that begin on a host.

    sshd does not wait for all of its own, so that asking it is not enough.
    The last quarter of a second of each is missed.
    """

    def __init__(self, host: nova_lab.Host) -> None:
        super().__init__(daemon=True)
        self._host = host
        self._before = set(host.processes())
        self._seen: dict[int, float] = {}
        self._end = threading.Event()

    @property
    def seconds(self) -> float:
        return sum(self._seen.values())

    def __enter__(self) -> 'Watch':
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        while not self._end.wait(0.25):
            for pid in set(self._host.processes()) - self._before:
                with contextlib.suppress(OSError):
                    self._seen[pid] = _cpu_seconds(pid)


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far."""
    text = pathlib.Path('/proc/%d/stat' % pid).read_text()
    return sum(map(int, text.rpartition(')')[2].split()[11:13])) / TICKS


def run(bench: Bench, disk: Disk, ways: Sequence[str],
        rounds: int) -> dict[str, list[Sample]]:
    """Measure all ways in each round, each time from another one on."""
    bench.make(disk)
    samples: dict[str, list[Sample]] = {way: [] for way in ways}
    for number in range(rounds):
        first = number % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            sample = bench.measure(way, compare=not number)
            samples[way].append(sample)
            print('%s, round %d: %s %.2f s' % (
                disk.name, number + 1, way, sample.seconds), file=sys.stderr)
    return samples


def rows(samples: dict[str, list[Sample]]) -> Iterator[list[str]]:
    """The lines of the table: medians; ratio to the first way's time."""
    first = next(iter(samples.values()))
    for way, taken in samples.items():
        def median(of: Callable[[Sample], float]) -> float:
            return statistics.median(map(of, taken))

        ratio = statistics.median(
            own.seconds / theirs.seconds for own, theirs in zip(taken, first))
        late = [1000 * s.late for s in taken if s.late is not None]
        yield [way, '%.2f' % median(lambda s: s.seconds), '%.2f' % ratio,
               '%.2f' % median(lambda s: s.client),
               '%.2f' % median(lambda s: s.daemons),
               '%.0f' % median(lambda s: s.memory / MIB),
               '%.0f' % median(lambda s: s.wire / MIB),
               '%.0f' % statistics.median(late) if late else '']


def table(lines: Sequence[Sequence[str]]) -> str:
    """A simple table in reStructuredText; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = '  '.join('=' * width for width in widths)
    text = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths))
            .rstrip() for line in lines]
    return '\n'.join([rule, text[0], rule, *text[1:], rule])


def machine() -> str:
    """What the figures are of."""
    info = pathlib.Path('/proc/cpuinfo').read_text()
    model = next((line.partition(': ')[2] for line in info.splitlines()
                  if line.startswith('model name')), platform.machine())
    return '%s, %d CPUs for both hosts, load %.1f, Linux %s' % (
        model, os.cpu_count() or 0, os.getloadavg()[0], platform.release())


def disks(short: bool) -> list[Disk]:
    """What is copied: a short run takes a minute, not an hour."""
    scale = 4 if short else 1
    size, count = 8192 // scale, 64 // scale
    spread = [(index * 128, 8) for index in range(count)]
    return [Disk('random', 1024 // scale, [(0, 1024 // scale)]),
            Disk('sparse', size, spread),
            Disk('zeros written', size, spread, zeros=True)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--short', action='store_true',
                        help='disks of a quarter of the size')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--disks', nargs='+', help='of these names only')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS,
                        help='the first is what the others are compared to')
    parser.add_argument('--output', type=pathlib.Path, metavar='FILE',
                        help='write all samples as JSON')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    lab = nova_lab.Lab(os.environ.get('NOVA_LAB_DIR', nova_lab.DEFAULT))
    was_up = lab.is_up
    lab.up()
    try:
        lab.ssh(True)
        bench = Bench(lab)
        print(machine() + '\n')
        found: dict[str, dict[str, list[dict]]] = {}
        with bench.pools():
            for disk in disks(args.short):
                if args.disks and disk.name not in args.disks:
                    continue
                samples = run(bench, disk, args.ways, args.rounds)
                print('%s, %d MiB with %d MiB of data:\n\n%s\n' % (
                    disk.name, disk.size, sum(n for _o, n in disk.extents),
                    table([COLUMNS, *rows(samples)])), flush=True)
                found[disk.name] = {
                    way: [dataclasses.asdict(s) for s in taken]
                    for way, taken in samples.items()}
        if args.output:
            args.output.write_text(json.dumps(  # noqa: N324
                {'machine': machine(), 'disks': found}, indent=1) + '\n')
        return 0
    finally:
        if not was_up:
            lab.down()


if __name__ == '__main__':
    sys.exit(main())
