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

"""What tests on stock hosts share: two of them, set up as the docs say.

A host is a virtual machine with Debian 13, beside the hosts out of namespaces
of the live tests. All of one process use the same two, which are made ready
once: the commands are those of the documentation.
"""

import atexit
import base64
import concurrent.futures
import configparser
import functools
import hashlib
import io
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from oslo_serialization import jsonutils
from oslo_utils import uuidutils

from nova.tests.live import base as live
from nova.tests.live import test_docs

from tools import cloud_config
from tools.lab import host
from tools.lab import image
from tools.lab import machine
from tools import processes

# What pip needs of this repository to build the package.
SOURCE = ('LICENSE', 'README.rst', 'nova/cmd', 'nova/conf',
          'nova/storage_migrate.py', 'nova/virt', 'pyproject.toml',
          'requirements.txt', 'setup.cfg', 'setup.py')
WORK = '/root/nova-storage-migrate'
RUNNER = '/usr/local/lib/nova-test-compute.py'
NOVA_CONF = '/etc/nova/nova.conf'
POOL = 'nova-disks'
IMAGE = '/var/lib/nova/image.raw'
VENV = Path(sys.prefix)

# The same on all hosts. There is no system on it: a guest starts, and that is
# all that is asked of it.
MAKE_IMAGE = f'yes image | head -c 1M > {IMAGE}; truncate -s 16M {IMAGE}'

# A guest that counts: it reads a number from the second sector of its disk
# into memory, then adds one and writes it back, ten times a second.
BOOT_SECTOR = bytes.fromhex(
    '31c0'            # xor %ax,%ax
    '8ed88ec08ed0'    # mov %ax,%ds; mov %ax,%es; mov %ax,%ss
    'bc007c'          # mov $0x7c00,%sp
    'fb'              # sti
    'b80102'          # mov $0x0201,%ax     read one sector
    'bb0080'          # mov $0x8000,%bx
    'b90200'          # mov $2,%cx
    'ba8000'          # mov $0x80,%dx
    'cd13'            # int $0x13
    '66ff060080'      # again: incl 0x8000
    'b80103'          # mov $0x0301,%ax     write one sector
    'bb0080'          # mov $0x8000,%bx
    'b90200'          # mov $2,%cx
    'ba8000'          # mov $0x80,%dx
    'cd13'            # int $0x13
    'b486'            # mov $0x86,%ah       wait for CX:DX microseconds
    'b90100'          # mov $1,%cx
    'baa086'          # mov $0x86a0,%dx
    'cd15'            # int $0x15
    'ebe1'            # jmp again
).ljust(446, b'\0') + bytes.fromhex(
    # Nova takes no image with a boot sector and without a partition.
    '8000020083000200' '01000000' '01000000'
).ljust(64, b'\0') + b'\x55\xaa' + bytes(512)
COUNTER = 'xp /1wx 0x8000'

# Besides what the documentation says: a host of a cloud has it already.
OPTIONS = {
    'DEFAULT': {'state_path': '/var/lib/nova'},
    'oslo_concurrency': {'lock_path': '/var/lib/nova/lock'},
    'libvirt': {'virt_type': 'qemu', 'cpu_mode': 'none',
                'live_migration_scheme': 'tls'},
}


def documented_options() -> dict[str, dict[str, str]]:
    """What the documentation says to write into nova.conf."""
    blocks = test_docs.read_blocks(test_docs.SWITCH_PAGE, 'ini')
    parser = configparser.ConfigParser()
    parser.read_file(io.StringIO(blocks[0][1]))
    return {name: dict(parser[name]) for name in parser.sections()} | {
        'DEFAULT': dict(parser.defaults())}


def nova_conf(of: host.Host, *layers: cloud_config.Options) -> str:
    """The text of a host's nova.conf.

    :param layers: what differs from the documented options
    """
    return cloud_config.render(cloud_config.merge(
        OPTIONS, documented_options(),
        {'DEFAULT': {'host': of.name, 'my_ip': of.address},
         # libvirt gives the name of its host otherwise.
         'libvirt': {'live_migration_inbound_addr': of.address}}, *layers))


@functools.cache
def get_machines() -> list[machine.Machine]:
    """The stock hosts of this process, ready for use.

    Where a lab was up before they stay, for a run that begins sooner.
    """
    kept = live.nova_lab.Lab(live.DIRECTORY, subnet=live.SUBNET).is_up
    machines = [machine.Machine(live.get_lab(), index) for index in range(2)]
    for each in machines:
        if not kept:
            atexit.register(each.down)
        each.start()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(prepare, machines))
    connect(machines)
    return machines


def prepare(of: machine.Machine) -> None:
    """Install this project on a host, by the commands of the docs."""
    of.wait()
    stamp = WORK + '.stamp'
    if of.run(['cat', stamp], check=False).stdout == fingerprint():
        return
    of.run(['rm', '-rf', WORK])
    of.copy(live.ROOT, SOURCE, WORK)
    (_classes, commands), = (
        block for block in test_docs.read_blocks(test_docs.INSTALL_PAGE)
        if block[0] == {'venv'})
    of.run_as_root(f'cd {WORK}\n{commands}')
    of.copy(Path(__file__).parent, ['compute.py'], '/usr/local/lib')
    of.run(['mv', '/usr/local/lib/compute.py', RUNNER])
    of.run_as_root(MAKE_IMAGE)
    of.write(NOVA_CONF, nova_conf(of), 0o640, 'nova')
    of.write(stamp, fingerprint())


def fingerprint() -> str:
    """What has to be installed anew when it changes."""
    made = hashlib.sha256()
    runner = Path(__file__).with_name('compute.py')
    for top in (runner, *(live.ROOT / name for name in SOURCE)):
        for path in sorted([top, *top.rglob('*')]):
            if path.is_file() and path.suffix != '.pyc':
                made.update(path.read_bytes())
    return made.hexdigest()


def connect(machines: list[machine.Machine]) -> None:
    """Follow the page on remote connections, with systemd."""
    first, second = machines
    if first.run(['test', '-e', '/etc/pki/libvirt/clientcert.pem'],
                 check=False).returncode == 0:
        return
    home = first.directory / 'home'
    home.mkdir(exist_ok=True)
    for classes, commands in test_docs.read_blocks(test_docs.PAGE):
        for each, (name, address) in zip(machines, test_docs.EXAMPLES):
            commands = commands.replace(address, each.address)
            commands = commands.replace(name, each.name)
        if classes == {'on-ca'}:
            processes.execute('sh', '-eu', '-c', commands, cwd='/', env={
                'HOME': str(home), 'PATH': host.PATH})
            bring_certificates(machines, home / 'libvirt-ca')
        elif classes == {'on-first-host'}:
            said = first.run_as_root(commands).strip()
            if said != second.name:
                raise AssertionError(f'{said} is not {second.name}')
        elif classes == {'with-systemd'} or (
                # The daemon that this starts would be in systemd's way.
                classes == {'on-each-host'} and '--listen' not in commands):
            for each in machines:
                each.run_as_root(commands)


def bring_certificates(machines: list[machine.Machine],
                       authority: Path) -> None:
    """Bring hosts what is there for them: the docs leave it to operators."""
    for each in machines:
        tar = f'{each.name}.tar'
        if (authority / tar).exists():
            each.copy(authority, [tar], '/root')


class Compute:
    """nova-compute's driver on a host, in a process of nova's there.

    :param argv: runs Python in the host as nova
    """

    def __init__(self, of: host.Host, argv: list[str]) -> None:
        self.host = of
        self.log = of.directory / 'compute.log'
        with self.log.open('w') as log:
            self._process = subprocess.Popen(
                [*argv, '--config-file', NOVA_CONF], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, cwd='/',
                env=of.environment('nova'))
        self._read()

    @classmethod
    def on_machine(cls, of: machine.Machine) -> 'Compute':
        """Start it on a stock host, in the environment of its Nova."""
        path = f'{image.VENV}/bin:/usr/sbin:/usr/bin:/sbin:/bin'
        return cls(of, of.command(
            [f'{image.VENV}/bin/python', '-W', 'ignore', RUNNER], 'nova',
            {'PATH': path}))

    @classmethod
    def in_namespaces(cls, of: live.nova_lab.Host) -> 'Compute':
        """Start it on a host of the live tests."""
        return cls(of, of.command(live.python_as_nova(
            of, '-m', 'nova.tests.stock.compute')))

    def call(self, name: str, **arguments: Any) -> Any:
        """Call one of the functions there.

        :raises AssertionError: with the error, if it failed
        """
        assert self._process.stdin
        self._process.stdin.write(jsonutils.dumps([name, arguments]) + '\n')
        self._process.stdin.flush()
        answer = self._read()
        if 'error' in answer:
            raise AssertionError(f'{self.host.name}, {name}: '
                                 f'{answer["error"]}')
        return answer['result']

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f'{self.host.name}: the driver ended:\n'
                                 f'{self.log.read_text()[-3000:]}')
        return jsonutils.loads(line)

    def stop(self) -> None:
        """End it."""
        self._process.communicate()


@functools.cache
def get_computes() -> list[Compute]:
    """The drivers of this process, one on each stock host.

    They start at once, and stay: where processors are emulated, starting one
    takes a minute.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        computes = list(pool.map(Compute.on_machine, get_machines()))
    for each in computes:
        atexit.register(each.stop)
    return computes


class ComputeMixin:
    """For tests that have nova-compute's driver on hosts."""

    def configure(self, of: live.nova_lab.Host,
                  *layers: cloud_config.Options) -> None:
        """Give a host of the live tests its /etc/nova, as a stock host has it.

        :param layers: what differs from the documented options
        """
        etc = of.path('/etc/nova')
        processes.execute('cp', '-r', VENV / 'etc/nova', etc)
        self.addCleanup(processes.execute, 'rm', '-r', etc)
        (etc / 'rootwrap.conf').write_text(
            cloud_config.render(cloud_config.rootwrap(VENV)))
        (etc / 'nova.conf').write_text(nova_conf(of, *layers))
        of.set_sudoers(cloud_config.sudoers(VENV))
        self.addCleanup(of.path('/etc/sudoers.d/nova').unlink)
        of.run(['sh', '-c', MAKE_IMAGE])
        self.addCleanup(of.path(IMAGE).unlink)

    def start_compute(self, of: host.Host) -> Compute:
        """Start the driver on a host, for this test."""
        made = (Compute.on_machine(of) if isinstance(of, machine.Machine)
                else Compute.in_namespaces(of))
        self.addCleanup(made.stop)
        return made

    def spawn(self, on: Compute) -> str:
        """Make a server, to be deleted after the test.

        :returns: its uuid
        """
        uuid = uuidutils.generate_uuid()
        self.addCleanup(on.call, 'destroy', uuid=uuid)
        self.assertEqual('running', on.call('spawn', uuid=uuid))
        return uuid

    def migrate(self, uuid: str, source: Compute, target: Compute) -> None:
        """Take a server to another host, where it runs then."""
        disk_info = source.call('migrate', uuid=uuid,
                                dest=target.host.address)
        self.addCleanup(target.call, 'destroy', uuid=uuid)
        self.assertEqual('running', target.call(
            'finish', uuid=uuid, disk_info=disk_info))


class StockTestCase(ComputeMixin, live.LiveTestCase):
    """A test on stock hosts.

    :ivar source: the first of them
    :ivar destination: the second
    """

    def setUp(self) -> None:
        super().setUp()
        self.machines = get_machines()
        self.source, self.destination = self.machines
        self.denied = {each: each.denials() for each in self.machines}
        self.addCleanup(self.assert_nothing_denied)

    def assert_nothing_denied(self) -> None:
        """AppArmor had nothing to refuse in this test."""
        self.assertEqual(self.denied, {
            each: each.denials() for each in self.machines})

    def disk_image(self, of: host.Host, uuid: str) -> dict[str, Any]:
        """What qemu-img says of the root disk of a server."""
        path = self.disk_path(of, uuid)
        return jsonutils.loads(of.run(
            ['qemu-img', 'info', '-U', '--output=json', path],
            user='nova').stdout)

    def disk_path(self, of: host.Host, uuid: str) -> str:
        """The path of the root disk of a server, as libvirt sees it."""
        said = of.run(['virsh', 'domblklist', uuid]).stdout
        return next(line.split()[1] for line in said.splitlines()
                    if line.strip().startswith('vda'))

    def files(self, of: host.Host, uuid: str) -> list[str]:
        """All that a host has of a server."""
        # A host whose pool is of an earlier release lacks the second one.
        return of.run(['find', '/var/lib/nova', '/var/lib/libvirt/images',
                       '-name', f'{uuid}*'], check=False).stdout.splitlines()


class CountingMixin:
    """For tests with guests that count on their disks."""

    def let_guests_count(self):
        """Give the image a guest that writes."""
        text = base64.b64encode(BOOT_SECTOR).decode()
        for each in self.machines:
            self.addCleanup(each.run_as_root, MAKE_IMAGE)
            each.run_as_root(f'echo {text} | base64 -d | '
                             f'dd of={IMAGE} conv=notrunc status=none')

    def count(self, of, uuid):
        """How far a server's guest has come, once it has gone on."""
        first = self._count(of, uuid)
        for _ in range(60):
            last = self._count(of, uuid)
            if last > first:
                return last
            time.sleep(1)
        self.fail(f'the guest stays at {first}')

    def _count(self, of, uuid):
        said = of.run(['virsh', 'qemu-monitor-command', uuid, '--hmp',
                       COUNTER]).stdout
        return int(said.split()[1], 16)
