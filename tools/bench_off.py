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


"""Measure how long guests are off in a cold migration.

Real servers of the small cloud are migrated from one host to the other and
back. A guest is off while no host has a process of QEMU for it. Each scene
measures what one or more of FIGURES need; all servers of a scene take turns in
each round, so that what disturbs the machine disturbs all.

    tools/run bench_off                   # all scenes
    tools/run bench_off ssh drain         # these

Takes the lab of NOVA_LAB_DIR, which is left up if it was up.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
import random
import signal
import sys
import threading
import time
from typing import Any

from tools import bench_report
from tools import cloud as cloud_module
from tools import cloud_config as config
from tools import cloud_venv as venv
from tools import guest
from tools import offtime
from tools import servers
from tools import waiting

MIB = 1024 ** 2
GIB = 1024 ** 3

# Random bytes that disks are filled with, again and again. Neither TLS nor SSH
# compresses them, as no two are within the window of a compressor.
NOISE = '/var/lib/nova/bench-noise'
NOISE_BYTES = 64 * MIB

# Where a guest's own file system ends: nothing of the guest is behind it.
DATA_START = guest.SIZE

# Bytes of one write of a guest that writes a little, and of one that rewrites
# its disk.
WRITE_BYTES = 64 * 1024
REWRITE_BYTES = 8 * MIB

# What the names of servers, flavors and images begin with.
PREFIX = 'bench-'

# How long a link is cut for, in seconds, and after which share of the data.
CUT_SECONDS = 30
CUT_AFTER = 0.8

# Nova's own driver, with the disks where it wants them.
STOCK: config.Options = {}

# As the driver copied before it copied while servers run: all servers are
# powered off first, and as many are copied at once as are migrated.
AFTER_POWER_OFF: config.Options = {'libvirt': {
    'vol_upload_migration_precopy': False,
    'vol_upload_migration_max_concurrent': 0}}

# How long a migration may take, in seconds.
PATIENCE = 1200


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of server.

    :ivar disk: GiB of its root disk, as the guest sees it
    :ivar data: MiB of random bytes on it, besides the guest itself
    :ivar rate: bytes per second that the guest writes
    :ivar image: name of the image that it is made from
    """

    name: str
    disk: int
    data: int = 0
    rate: int = 0
    image: str = 'guest'


EMPTY = Kind('empty', 1)

# The servers that a drain moves at once.
DRAINED = [Kind(f'700 MiB {number}', 1, 700) for number in range(6)]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One migration of one server.

    :ivar off: seconds that the guest was off
    :ivar seconds: from the call of the API until all servers that moved at
        once had moved
    :ivar wire: bytes that left the source host meanwhile
    :ivar written: bytes that the guests wrote until they were powered off
    :ivar load: of the machine when it began, see os.getloadavg()
    """

    off: float
    seconds: float
    wire: int
    written: int
    load: float


class Writer(threading.Thread):
    """Lets QEMU write to the disk of a guest, as the guest would.

    The writes are ordered through QEMU's monitor, and take the way of a
    guest's. They end when the guest is powered off.
    """

    def __init__(self, bench: 'Bench', server: servers.Server, host: str,
                 kind: Kind) -> None:
        super().__init__(daemon=True)
        self._disk = bench.disk(server, host)
        self._kind = kind
        self._over = threading.Event()
        # Another each time: the same bytes in the same places as in the last
        # migration would be no changes.
        self._random = random.Random()
        self.written = 0

    def __enter__(self) -> 'Writer':
        if self._kind.rate:
            self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._over.set()
        if self._kind.rate:
            self.join()

    def run(self) -> None:
        started = time.monotonic()
        for offset, length in self._places():
            ahead = self.written / self._kind.rate - (
                time.monotonic() - started)
            if self._over.wait(max(0.0, ahead)):
                return
            # What is the same as before is no change.
            pattern = self._random.randrange(1, 256)
            if not self._disk.write(offset, length, pattern):
                return
            self.written += length

    def _places(self) -> Iterator[tuple[int, int]]:
        """Where to write next, and how much, without end."""
        size = self._kind.data * MIB
        is_rewrite = self._kind.rate > size // 16
        length = REWRITE_BYTES if is_rewrite else WRITE_BYTES
        number = 0
        while True:
            place = number if is_rewrite else self._random.randrange(size)
            yield DATA_START + place * length % size, length
            number += 1


class Disk:
    """The root disk of a guest that runs, through QEMU's monitor."""

    def __init__(self, domain: Any, monitor: Callable[..., str]) -> None:
        self._domain = domain
        self._monitor = monitor
        answer = json.loads(monitor(  # noqa: N324
            domain, json.dumps({'execute': 'query-block'}), 0))  # noqa: N324
        # The guest's own device: nobody else may write to its disk.
        self._device = next(
            device['qdev'] for device in answer['return']
            if device.get('inserted'))

    def write(self, offset: int, length: int, pattern: int) -> bool:
        """Write bytes that are all alike.

        :returns: whether the guest was there to do so
        """
        return self._write(f'-P {pattern} {offset} {length}')

    def fill(self, offset: int, length: int) -> None:
        """Write random bytes.

        :raises waiting.Failed: if they are not on the disk then
        """
        for start in range(0, length, NOISE_BYTES):
            if not self._write(f'-s {NOISE} {offset + start} '
                               f'{min(NOISE_BYTES, length - start)}'):
                raise waiting.Failed('the guest is gone')
        allocated = self._domain.blockInfo('vda')[1]
        if allocated < length:
            raise waiting.Failed(f'{allocated} bytes are on the disk')

    def _write(self, arguments: str) -> bool:
        import libvirt
        import libvirt_qemu
        try:
            said = self._monitor(
                self._domain, f'qemu-io -d {self._device} "write {arguments}"',
                libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        except libvirt.libvirtError:
            return False
        # QEMU says on its own output how the write went, and here only why
        # there was none.
        if said.strip():
            raise waiting.Failed(f'write {arguments}: {said}')
        return True


class Bench:
    """The cloud, and how a server is made, filled and moved in it."""

    def __init__(self, cloud: cloud_module.Cloud,
                 observer: offtime.Observer, scale: int = 1) -> None:
        """Measure with disks of which the data is divided by ``scale``."""
        self.cloud = cloud
        self.scale = scale
        self._observer = observer
        self._kinds: dict[str, Kind] = {}

    # ---- servers

    def clear(self) -> None:
        """Delete what an earlier run that was killed left."""
        for server in self.cloud.connection().compute.servers():
            if server.name.startswith(PREFIX):
                servers.Server(self.cloud, server.id).delete()

    def use(self, options: config.Options,
            host_options: dict[str, config.Options] | None = None) -> None:
        """Let nova-compute run with these options."""
        wanted = options, host_options or {}
        if (self.cloud.options, self.cloud.host_options) != wanted:
            self.cloud.restart_computes(options, host_options=host_options)
        self.cloud.wait_computes()

    @contextlib.contextmanager
    def running(self, *kinds: Kind) -> Iterator[list[servers.Server]]:
        """Servers that run on the first host, with data on their disks."""
        made: list[servers.Server] = []
        try:
            for kind in kinds:
                made.append(self._create(dataclasses.replace(
                    kind, data=kind.data // self.scale)))
            for server in made:
                server.wait_boot(600)
            for server in made:
                self._fill(server)
            yield made
        finally:
            for server in made:
                server.delete()

    def _create(self, kind: Kind) -> servers.Server:
        compute = self.cloud.connection().compute
        flavor = f'{PREFIX}{kind.disk}'
        if not compute.find_flavor(flavor):
            compute.create_flavor(name=flavor, ram=cloud_module.MEMORY_MIB,
                                  vcpus=1, disk=kind.disk)
        server = servers.Server.create(
            self.cloud, self.cloud.lab.hosts[0].name, PREFIX + kind.name,
            kind.image, flavor)
        self._kinds[server.id] = kind
        return server

    def _fill(self, server: servers.Server) -> None:
        host = self.cloud.lab.host(server.host)
        noise = host.path(NOISE)
        if not noise.exists():
            noise.write_bytes(os.urandom(NOISE_BYTES))
        self.disk(server, server.host).fill(
            DATA_START, self._kinds[server.id].data * MIB)

    def disk(self, server: servers.Server, host: str) -> Disk:
        """The root disk of a server that runs on a host."""
        import libvirt
        import libvirt_qemu
        socket = self.cloud.lab.host(host).path('/run/libvirt/libvirt-sock')
        connection = libvirt.open(f'qemu+unix:///system?socket={socket}')
        return Disk(connection.lookupByUUIDString(server.id),
                    libvirt_qemu.qemuMonitorCommand)

    # ---- migrations

    def move(self, *moving: servers.Server,
             during: Callable[[int], None] = lambda wire: None
             ) -> list[Sample]:
        """Migrate servers at once to the other host, and confirm.

        :param during: called again and again meanwhile, with the bytes that
            have left the source host
        """
        source, target = self._route(moving[0].host)
        compute = self.cloud.connection().compute
        load, wire = os.getloadavg()[0], self._wire(source)
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(Writer(
                self, server, source, self._kinds[server.id]))
                for server in moving]
            if any(self._kinds[server.id].rate for server in moving):
                time.sleep(1)
            started = time.monotonic()
            for server in moving:
                compute.migrate_server(server.id, host=target)
            self._wait(moving, lambda: during(self._wire(source) - wire))
            seconds = time.monotonic() - started
        wire = self._wire(source) - wire
        written = sum(writer.written for writer in writers)
        samples = [Sample(self._observer.off_seconds(server.id, started),
                          seconds, wire, written, load) for server in moving]
        for server in moving:
            server.confirm()
        return samples

    def _route(self, source: str) -> tuple[str, str]:
        first, second = (host.name for host in self.cloud.lab.hosts[:2])
        return (first, second) if source == first else (second, first)

    def _wait(self, moving: Sequence[servers.Server],
              during: Callable[[], None]) -> None:
        """Wait until all have moved."""
        compute = self.cloud.connection().compute
        wanted = {server.id for server in moving}

        def moved() -> bool:
            during()
            found = [server for server in compute.servers()
                     if server.id in wanted]
            for server in found:
                if not server.task_state and server.status != 'VERIFY_RESIZE':
                    if server.status == 'ERROR' or self._failed(server):
                        raise waiting.Failed(
                            f'{server.name} is {server.status}')
            return all(server.status == 'VERIFY_RESIZE' and
                       not server.task_state for server in found)

        waiting.wait_for('servers to move', moved, PATIENCE, poll=0.3)

    def _failed(self, server: Any) -> bool:
        """Whether the migration of a server that is active was refused."""
        newest = next(iter(self.cloud.connection().compute.migrations(
            instance_uuid=server.id)), None)
        return newest is not None and newest.status in ('error', 'failed')

    def _wire(self, host: str) -> int:
        """Bytes that have left a host so far."""
        return self.cloud.lab.host(host).sent_bytes()


Round = Iterator[tuple[str, list[Sample]]]


class Scene:
    """What is measured with the same servers.

    :cvar name: what the command line calls it
    :cvar host_options: what a host's nova-compute has besides the options
        that every user of the driver sets
    """

    name = ''
    host_options: dict[str, config.Options] = {}

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Make the servers, and delete them in the end."""
        with self.surroundings():
            self.bench.use(cloud_module.STREAMS, self.host_options)
            with self.bench.running(*self.kinds()) as self.servers:
                # The first migration from a host connects, and fills caches.
                for _host in range(2):
                    self.bench.move(self.servers[0])
                yield

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """What differs from the lab as it is."""
        yield

    def kinds(self) -> Sequence[Kind]:
        """The servers, all of which are on the first host to begin with."""
        raise NotImplementedError

    def round(self) -> Round:
        """Measure each way once; the servers are on the same host then."""
        raise NotImplementedError


class EachAlone(Scene):
    """Servers that move one after the other."""

    KINDS: Sequence[Kind] = ()

    def kinds(self) -> Sequence[Kind]:
        return self.KINDS

    def round(self) -> Round:
        for kind, server in zip(self.KINDS, self.servers):
            yield kind.name, self.bench.move(server)


class Disks(EachAlone):
    """Servers with disks of different sizes on the file system there is."""

    name = 'disks'
    KINDS = (EMPTY, Kind('random', 3, 2048, MIB), Kind('half full', 8, 4096))


class Xfs(EachAlone):
    """The same where the disks are on XFS."""

    name = 'xfs'
    KINDS = (EMPTY, Kind('64 GiB', 64, 8192, MIB))
    SIZE = '80G'

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Another file system for the pools of both hosts."""
        hosts = self.bench.cloud.lab.hosts[:2]
        self.bench.cloud.stop_computes()
        with contextlib.ExitStack() as stack:
            for host in hosts:
                image = host.directory / 'pool.xfs'
                stack.callback(image.unlink, missing_ok=True)
                host.run(['truncate', '--size', self.SIZE, image])
                host.run(['mkfs.xfs', '-q', '-f', image])
                host.run(['mkdir', '-p', servers.POOL])
                host.run(['mount', '-o', 'loop', image, servers.POOL])
                stack.callback(host.run, ['umount', servers.POOL])
                host.run(['chown', f'{host.nova_uid}:{host.nova_gid}',
                          servers.POOL])
            self.bench.cloud.start_computes()
            yield


class Base(EachAlone):
    """The destination lacks the base image of a server."""

    name = 'base'
    IMAGE = PREFIX + 'base'
    KINDS = (EMPTY, Kind('base image', 1, image=IMAGE))

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """An image of 1 GiB."""
        cloud = self.bench.cloud
        path = cloud.directory / 'bench-base.raw'
        path.write_bytes((cloud.directory / 'guest.raw').read_bytes())
        with path.open('ab') as image:
            while image.tell() < GIB:
                image.write(os.urandom(MIB))
        made = cloud.connection().image.create_image(
            name=self.IMAGE, filename=str(path), wait=True,
            disk_format='raw', container_format='bare')
        path.unlink()
        self._base = hashlib.sha1(
            made.id.encode(), usedforsecurity=False).hexdigest()
        try:
            yield
        finally:
            cloud.connection().image.delete_image(made.id)

    def round(self) -> Round:
        empty, based = self.servers
        yield 'empty', self.bench.move(empty)
        for host in self.bench.cloud.lab.hosts:
            if host.name != based.host:
                host.path(f'{servers.INSTANCES}/_base/{self._base}').unlink(
                    missing_ok=True)
        yield 'base image', self.bench.move(based)


class Ssh(Scene):
    """This driver, and Nova's own over SSH."""

    name = 'ssh'
    KIND = Kind('700 MiB', 1, 700)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """One server for each driver, with its disks where that wants them."""
        with contextlib.ExitStack() as stack:
            self.bench.use(STOCK)
            [self._nova] = stack.enter_context(
                self.bench.running(self.KIND))
            self.bench.use(cloud_module.STREAMS)
            [self._ours] = stack.enter_context(
                self.bench.running(self.KIND))
            yield

    def round(self) -> Round:
        self.bench.use(cloud_module.STREAMS)
        yield 'libvirt', self.bench.move(self._ours)
        self.bench.use(STOCK)
        yield 'ssh', self.bench.move(self._nova)


class Drain(Scene):
    """Six servers at once: there as it is, back as it was before."""

    name = 'drain'
    host_options = {'host2': AFTER_POWER_OFF}

    def kinds(self) -> Sequence[Kind]:
        return [EMPTY, *DRAINED]

    def round(self) -> Round:
        empty, *drained = self.servers
        yield 'empty', self.bench.move(empty)
        yield 'drain', self.bench.move(*drained)
        yield 'empty, off first', self.bench.move(empty)
        yield 'drain, off first', self.bench.move(*drained)


class Concurrent(Scene):
    """Six servers at once, of which a host copies so many at a time."""

    name = 'concurrent'
    # For the way there, and the way back.
    LIMITS = ((1, 2), (3, len(DRAINED)))

    def kinds(self) -> Sequence[Kind]:
        return DRAINED

    def round(self) -> Round:
        hosts = self.bench.cloud.lab.hosts[:2]
        for limits in self.LIMITS:
            self.bench.use(cloud_module.STREAMS, {
                host.name: {'libvirt': {
                    'vol_upload_migration_max_concurrent': limit}}
                for host, limit in zip(hosts, limits)})
            for limit in limits:
                yield f'{limit} at a time', self.bench.move(*self.servers)


class Rewrite(Scene):
    """A guest that rewrites its disk faster than the link carries it."""

    name = 'rewrite'
    RATE = '200mbit'
    host_options = {'host2': AFTER_POWER_OFF}

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for host in self.bench.cloud.lab.hosts:
                stack.callback(host.limit, None)
                host.limit(self.RATE)
            yield

    def kinds(self) -> Sequence[Kind]:
        return [Kind('rewrite', 1, 512, 64 * MIB)]

    def round(self) -> Round:
        yield 'precopy', self.bench.move(*self.servers)
        yield 'off first', self.bench.move(*self.servers)


class Cut(Scene):
    """The link is cut when most of a disk has been copied."""

    name = 'cut'
    KIND = Kind('4 GiB', 5, 4096)

    def kinds(self) -> Sequence[Kind]:
        return [self.KIND]

    def round(self) -> Round:
        yield 'whole', self.bench.move(*self.servers)
        cut = _Cut(self.bench.cloud.lab.host(
            self.bench._route(self.servers[0].host)[1]),
            self.KIND.data * MIB * CUT_AFTER / self.bench.scale)
        with cut:
            yield 'cut', self.bench.move(*self.servers, during=cut.look)


class _Cut:
    """Pulls the cable of a host for a while, once."""

    def __init__(self, host: Any, after: float) -> None:
        self._host = host
        self._after = after
        self._plug = threading.Timer(CUT_SECONDS, host.link, [True])

    def look(self, wire: int) -> None:
        """Pull it if so many bytes are through."""
        if wire >= self._after and self._plug.ident is None:
            self._host.link(False)
            self._plug.start()

    def __enter__(self) -> '_Cut':
        return self

    def __exit__(self, *args: object) -> None:
        self._plug.cancel()
        self._host.link(True)


SCENES: Sequence[type[Scene]] = (
    Disks, Xfs, Base, Ssh, Drain, Concurrent, Rewrite, Cut)


def measure(scene: Scene, rounds: int,
            keep: Callable[[bench_report.Ways], None]) -> None:
    """Measure a scene.

    :param keep: called after each round, with all samples so far
    """
    found: bench_report.Ways = {}
    with scene.ready():
        for number in range(rounds):
            for way, samples in scene.round():
                found.setdefault(way, []).append(
                    [dataclasses.asdict(sample) for sample in samples])
                print('%s, round %d: %s off %s s, %.1f s, load %.1f' % (
                    scene.name, number + 1, way,
                    ' '.join('%.2f' % sample.off for sample in samples),
                    samples[0].seconds, samples[0].load),
                    file=sys.stderr, flush=True)
            keep(found)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [scene.name for scene in SCENES]
    parser.add_argument('scenes', nargs='*', metavar='SCENE',
                        help=', '.join(names))
    parser.add_argument('--short', action='store_true',
                        help='a quarter of the data on the disks')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=Path, metavar='FILE',
                        help='write all samples as JSON; scenes that are in '
                        'the file and were not measured stay')
    args = parser.parse_args(argv)
    if unknown := set(args.scenes).difference(names):
        parser.error('no scene: ' + ', '.join(sorted(unknown)))
    return args


def keep(path: Path | None, scene: str, machine: str,
         ways: bench_report.Ways) -> None:
    """Tell what was measured of a scene so far, and write it to a file."""
    found = bench_report.Measured(machine, ways)
    print(bench_report.off_report({scene: found}), flush=True)
    if path:
        bench_report.add(path, scene, found)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    # What was made for the measurement goes, whichever way it ends.
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(1))
    import libvirt
    # That a guest is gone is no error of a writer's.
    libvirt.registerErrorHandler(lambda *_args: None, None)
    from tools import lab as lab_module
    lab = lab_module.Lab()
    was_up = lab.is_up
    lab.up()
    lab.ssh(True)
    cloud = cloud_module.Cloud(lab, options=cloud_module.STREAMS)
    try:
        cloud.up()
        with offtime.Observer() as observer:
            bench = Bench(cloud, observer, 4 if args.short else 1)
            bench.clear()
            for scene in SCENES:
                if not args.scenes or scene.name in args.scenes:
                    measure(scene(bench), args.rounds, functools.partial(
                        keep, args.output, scene.name, bench_report.machine()))
    finally:
        if not was_up:
            cloud.down()
            lab.down()
    return 0


if __name__ == '__main__':
    venv.ensure()
    venv.reexec('bench_off')
    sys.exit(main(sys.argv[1:]))
