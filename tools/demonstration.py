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

"""Cold migration without ssh, shown on a real small OpenStack.

Installs what it needs, brings up two compute hosts and a cloud on this
machine, boots a server, migrates it, resizes it to a bigger disk and back,
and says what happened. The cloud is left up to look around in; --down removes
it.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import os
from pathlib import Path
import re
import subprocess
import sys
import time

from tools import cloud_venv as venv

# The clock starts before any Python is there.
STARTED = 'NOVA_LAB_STARTED'
SERVER = 'demo'
GIB = 1024 ** 3
COPIED = re.compile(
    r'Copied [0-9a-f-]{36}_(?P<disk>\S+) to (?P<host>\S+): (?P<bytes>\d+) '
    r'bytes, (?P<wire>\d+) on the wire, (?P<seconds>[\d.]+) s')


def say(what: str) -> None:
    """A line of progress."""
    elapsed = time.time() - float(os.environ[STARTED])
    print(f'[{elapsed:5.0f} s] {what}', flush=True)


@dataclasses.dataclass(frozen=True)
class Copy:
    """What nova-compute logged at the end of a copy."""

    disk: str
    host: str
    bytes: int
    wire: int
    seconds: float


@dataclasses.dataclass
class Report:
    """What was seen, and whether it is what has to be."""

    copies: dict[str, list[Copy]] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    def check(self, what: str, seen: object, wanted: object) -> None:
        """Note something that has one right value."""
        good = seen == wanted
        line = f'{what}: {seen}' + ('' if good else f', not {wanted}')
        self.lines.append(f'  [{"ok" if good else "WRONG"}] {line}')
        if not good:
            self.failures.append(line)
            say(f'WRONG: {line}')

    def note(self, line: str = '') -> None:
        """Note something that is only to be read."""
        self.lines.append(line)

    def show(self) -> None:
        """Print all of it."""
        print('\n'.join(['', '=' * 72, *self.lines, '=' * 72]))
        if self.failures:
            print(f'FAILED: {len(self.failures)} of the checks above')
        else:
            print('SUCCESS: the server moved without ssh, and lost nothing')


class Demonstration:
    """The steps, in the order in which they are shown."""

    def __init__(self, eventlet: bool):
        from tools import cloud
        from tools import lab
        self.lab = lab.Lab()
        self.cloud = cloud.Cloud(self.lab, eventlet, cloud.STREAMS, say)
        self.report = Report()

    def run(self) -> int:
        """Show everything; returns the exit status."""
        from tools import tripwire
        say('lab: two hosts')
        self.lab.up()
        self.cloud.up()
        self.remove_server()
        with tripwire.laid(self.lab.hosts) as wires:
            self.create()
            self.migrate_and_confirm()
            self.resize_and_revert()
            self.migrate_while_off()
            self.look_for_ssh(wires)
        self.report.show()
        print(f'\nThe cloud is up. Look around in it:\n'
              f'  eval "$({venv.TOOLS}/run cloud env)"\n'
              f'  openstack server event list {SERVER}\n'
              f'nova-compute of host1 logs to {self.cloud.log("host1")}.\n'
              f'Remove all of it: {venv.TOOLS}/demo --down')
        return 1 if self.report.failures else 0

    # ---- the steps

    def remove_server(self) -> None:
        """Delete what an earlier demonstration left."""
        from tools import servers
        for old in self.cloud.connection().compute.servers(name=SERVER):
            servers.Server(self.cloud, old.id).delete()

    def create(self) -> None:
        """Boot the server on host1."""
        from tools import servers
        self.openstack('server create --flavor small-ephemeral --image guest '
                       '--config-drive True --host host1 --nic none')
        found = self.cloud.connection().compute.find_server(SERVER)
        self.server = servers.Server(self.cloud, found.id)
        self.server.wait('ACTIVE')
        say('the guest boots')
        mode = 'eventlet' if self.cloud.eventlet else 'native threads'
        self.report.note(f'server {found.id}, nova-compute with {mode}')
        self.report.check('it boots on', self.server.host, 'host1')
        self.check_boot('at its first boot', 1)

    def migrate_and_confirm(self) -> None:
        """Migrate the running server to host2."""
        with self.moved('openstack server migrate, while it runs'):
            self.openstack('server migrate --host host2')
            self.server.wait('VERIFY_RESIZE')
        self.report.check('the server is now on', self.server.host, 'host2')
        self.check_boot('on host2', 2)
        self.openstack('server migrate confirm')
        self.server.wait_confirmed()
        self.report.check('disks left on host1 after confirm',
                          sorted(self.server.disks('host1')), [])

    def resize_and_revert(self) -> None:
        """Resize to bigger disks, which goes to host1, and go back."""
        # Unlike a migration, a resize cannot be told where to go.
        with (self.moved('openstack server resize, to bigger disks'),
              self.server.only('host1')):
            self.openstack('server resize --flavor large-ephemeral')
            self.server.wait('VERIFY_RESIZE')
        self.report.check('the server is now on', self.server.host, 'host1')
        self.check_boot('on host1', 3)
        self.report.check('GiB of root disk that the guest sees',
                          self.server.sizes()['vda'] // GIB, 2)
        self.openstack('server resize revert')
        self.server.wait('ACTIVE')
        self.report.check('after revert the server is on', self.server.host,
                          'host2')
        # The third boot was on the copy that is gone with the revert.
        self.check_boot('on host2, from the disks kept there', 3)
        self.report.check('GiB of root disk that the guest sees',
                          self.server.sizes()['vda'] // GIB, 1)
        self.report.check('disks left on host1 after revert',
                          sorted(self.server.disks('host1')), [])

    def migrate_while_off(self) -> None:
        """Migrate the server powered off, and compare every byte."""
        self.openstack('server stop')
        self.server.wait('SHUTOFF')
        with self.moved('openstack server migrate, while it is off'):
            self.openstack('server migrate --host host1')
            self.server.wait('VERIFY_RESIZE')
        self.compare_disks('host2', 'host1')
        self.openstack('server migrate confirm')
        self.server.wait_confirmed('SHUTOFF')
        self.openstack('server start')
        self.server.wait('ACTIVE')
        self.check_boot('on host1', 4)

    def compare_disks(self, source: str, target: str) -> None:
        """Compare the checksums on both sides while nothing runs."""
        say('sha256 of the disks on both sides')
        there = self.server.checksums(source)
        here = self.server.checksums(target)
        self.report.check('disks on both sides', sorted(here),
                          ['disk', 'disk.config', 'disk.eph0'])
        for disk in sorted(there):
            self.report.note(f'       {disk} on {source}: '
                             f'sha256 {there[disk]}')
            self.report.check(f'{disk} on {target}: sha256', here.get(disk),
                              there[disk])

    def look_for_ssh(self, wires: list) -> None:
        """Say what of ssh was there, and what was tried."""
        from tools import tripwire
        self.report.note('\nssh')
        for wire in wires:
            name = wire.host.name
            self.report.check(
                f'ssh, scp, sftp, rsync or sshd started on {name}',
                wire.calls(), [])
            self.report.check(f'ssh daemons, ports and keys on {name}',
                              tripwire.ssh_traces(wire.host), [])

    # ---- how they are done

    def openstack(self, command: str) -> None:
        """Run the openstack command, for the server, and show it."""
        argv = ['openstack', *command.split(), SERVER]
        say('$ ' + ' '.join(argv))
        env = {**os.environ, **self.cloud.environment()}
        done = subprocess.run([venv.program(argv[0]), *argv[1:]], env=env,
                              stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f'{" ".join(argv)}: status {done.returncode}\n'
                               f'{done.stdout}')

    def check_boot(self, where: str, number: int) -> None:
        """Wait for the guest, whose disks have to count one boot more."""
        self.server.wait_boot()
        self.report.check(f'boot counters {where}', self.server.counters(),
                          {'vda': number, 'vdb': number})

    @contextlib.contextmanager
    def moved(self, title: str) -> Iterator[None]:
        """Report the copies that nova-compute logs during the body."""
        sizes = {host.name: self.cloud.log(host.name).stat().st_size
                 for host in self.lab.hosts}
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        copies = [copy for name, size in sizes.items()
                  for copy in read_copies(self.cloud.log(name), size,
                                          self.server.id)]
        self.report.note(f'\n{title}')
        self.report.check('path', 'libvirt streams' if copies else 'not ours',
                          'libvirt streams')
        for copy in copies:
            self.report.note(
                f'       {copy.disk} to {copy.host}: {copy.bytes} bytes, '
                f'{copy.wire} on the wire, {copy.seconds} s')
        self.report.note(f'       {seconds:.1f} s from command to end')


def read_copies(log: Path, offset: int, server: str) -> Iterator[Copy]:
    """The copies of a server's disks that a log tells of."""
    with log.open(errors='replace') as lines:
        lines.seek(offset)
        for line in lines:
            found = COPIED.search(line)
            if found and server in line:
                yield Copy(found['disk'], found['host'], int(found['bytes']),
                           int(found['wire']), float(found['seconds']))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog='demo', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--eventlet', action='store_true',
                        help='run nova-compute under eventlet instead of '
                             'native threads')
    parser.add_argument('--down', action='store_true',
                        help='remove the cloud and the hosts, and do nothing '
                             'else; packages and the Python environment stay')
    return parser.parse_args(arguments)


def prepare() -> None:
    """Install what the rest needs, and go on in its Python."""
    if Path(sys.prefix) != venv.ROOT:
        say('Python environment (a few minutes, the first time)')
        venv.ensure()
    venv.reexec('demonstration')


def tear_down() -> int:
    """Remove everything but packages and the environment."""
    from tools import cloud
    from tools import lab
    hosts = lab.Lab()
    cloud.Cloud(hosts).down()
    hosts.down()
    say('the cloud and its hosts are gone')
    return 0


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    args = parse(arguments)
    if os.geteuid():
        sys.exit('demo: this needs root')
    os.environ.setdefault(STARTED, str(time.time()))
    steps: Callable[[], int] = tear_down
    if not args.down:
        prepare()
        steps = Demonstration(args.eventlet).run
    try:
        return steps()
    except Exception as e:
        say(f'FAILED: {type(e).__name__}: {e}')
        return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
