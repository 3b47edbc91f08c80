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

"""nova-compute and libvirt in two containers, as deployment tools make them.

The containers are those of kolla-ansible. What it and the others configure is
written in doc/source/admin/deploy-*.rst, with where it is from.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import signal
import subprocess

from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.tests.live import pages

from tools import containers

lab = base.nova_lab

HERE = pathlib.Path(__file__).resolve().parent
IMAGES = pathlib.Path(os.environ.get(
    'NOVA_CONTAINERS', base.ROOT / '.tox/containers'))
PASSWORD = 'not-secret'
SCRIPT = '/tmp/compute.py'
TCP_PORT = 16509

# Where what is written is seen by both containers, or by nobody.
SEEN = (*(f'{path}/' for path in (*containers.VOLUMES.values(), '/dev',
                                  '/run')), '/proc/', '/tmp/')

NOVA_CONF = """\
[DEFAULT]
host = {host.name}
my_ip = {host.address}
state_path = /var/lib/nova
[libvirt]
connection_uri = "{uri}"
live_migration_inbound_addr = "{name}"
"""
TLS = """\
live_migration_scheme = "tls"
"""
SOCKET = 'qemu+unix:///system?socket=/run/libvirt/libvirt-sock'
ADDED = """\
use_storage_pools = True
vol_upload_migration = True
disks_pool_path = /var/lib/libvirt/images/nova-disks
"""
INBOUND = """\
migration_inbound_addr = {host.name}
"""
LIBVIRTD_CONF = """\
listen_tls = {tls:d}
listen_tcp = {tcp:d}
auth_tls = "{auth}"
auth_tcp = "{auth}"
auth_unix_rw = "none"
listen_addr = "{address}"
log_outputs = "3:file:/var/log/kolla/libvirtd.log"
host_uuid = "{uuid}"
max_workers = 50
max_client_requests = 20
"""
QEMU_CONF = 'user = "nova"\ngroup = "nova"\n'
AUTH_CONF = f"""\
[credentials-default]
authname=nova
password={PASSWORD}

[auth-libvirt-default]
credentials=default
"""
SASL_CONF = 'mech_list: {}\nsasldb_path: /etc/libvirt/passwd.db\n'


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tool configures a host.

    :ivar tls: whether libvirtd listens for TLS, and not for TCP
    :ivar added: lines of the section libvirt of nova.conf
    :ivar sasl: whether libvirtd asks for a password
    :ivar address: where it listens, if not on the host's address
    :ivar by_socket: whether nova-compute takes the socket to it, and not TCP
    :ivar named: whether certificates have the host's name and no address
    """
    tls: bool
    added: str = ''
    sasl: bool = True
    address: str = ''
    by_socket: bool = False
    named: bool = True


class Node(containers.Pair):
    """A compute host of two containers."""

    def start(self, layout: Layout) -> None:
        """Start both containers, and libvirtd in its own."""
        self.layout = layout
        self.up()
        self._configure_libvirt()
        self._configure_compute()
        self.daemon = self.libvirt.popen(['libvirtd', '--listen'])
        port = lab.TLS_PORT if layout.tls else TCP_PORT
        lab.wait_for(f'libvirtd of {self.host.name}',
                     lambda: self.host.listens(port), lab.START_TIMEOUT)

    def stop(self) -> None:
        """End all of it."""
        self.down()
        if hasattr(self, 'daemon'):
            self.daemon.wait()

    def ask(self, function: str, prefix: Sequence[str] = (), **arguments):
        """Call a function of compute.py in the container of nova-compute.

        :param prefix: a command that runs another one, outside
        """
        argv = self.compute.command(
            ['python3', '-W', 'ignore', SCRIPT, function], user='nova')
        return jsonutils.loads(lab.execute(
            *prefix, *argv, cwd='/', env=self.compute.environment('nova'),
            input=jsonutils.dumps(arguments)).stdout)

    def check(self, *hosts: str) -> tuple[int, str]:
        """Run nova-storage-migrate check, as the page says.

        :returns: its exit status, and what it printed
        """
        done = self.compute.run(
            ['nova-storage-migrate', 'check', *hosts], user='nova',
            check=False)
        return done.returncode, done.stdout

    def _configure_libvirt(self) -> None:
        container, layout = self.libvirt, self.layout
        container.write('/etc/libvirt/libvirtd.conf', LIBVIRTD_CONF.format(
            tls=layout.tls, tcp=not layout.tls,
            auth='sasl' if layout.sasl else 'none',
            address=layout.address or self.host.address,
            uuid=uuidutils.generate_uuid()))
        container.write('/etc/libvirt/qemu.conf', QEMU_CONF)
        container.write('/etc/sasl2/libvirt.conf', SASL_CONF.format(
            'SCRAM-SHA-256' if layout.tls else 'DIGEST-MD5'))
        container.run(['saslpasswd2', '-c', '-p', '-a', 'libvirt', 'nova'],
                      input=PASSWORD)
        if layout.tls:
            self._give_certificates(container, 0, 'server', 'client')

    def _configure_compute(self) -> None:
        nova = containers.NOVA_ID
        container, layout = self.compute, self.layout
        text = NOVA_CONF + (TLS if layout.tls else '') + layout.added
        name = self.host.name if layout.tls else self.host.address
        uri = SOCKET if layout.by_socket else (
            f'qemu+{"tls" if layout.tls else "tcp"}://{name}/system')
        container.write('/etc/nova/nova.conf', text.format(
            host=self.host, uri=uri, name=name), owner=nova)
        container.write('/var/lib/nova/.config/libvirt/auth.conf', AUTH_CONF,
                        owner=nova)
        # As the start script of kolla's image does.
        container.run(['mkdir', '-p', '/var/lib/nova/instances'], user='nova')
        container.write(SCRIPT, (HERE / 'compute.py').read_text(), 0o644)
        if layout.tls:
            self._give_certificates(container, nova, 'client')

    def _give_certificates(self, container, group: int, *sides: str) -> None:
        authority = self.host.lab.authority
        container.write('/etc/pki/CA/cacert.pem',
                        authority.certificate.read_text(), 0o644)
        pki = container.path('/etc/pki/libvirt')
        (pki / 'private').mkdir(parents=True)
        for side in sides:
            key = pki / f'private/{side}key.pem'
            authority.issue(
                key, pki / f'{side}cert.pem', self.host.name, side,
                [] if self.layout.named else [self.host.address])
            os.chown(key, 0, group)
            key.chmod(0o640)


class Written:
    """Sees which files processes of a container write, make or remove.

    :ivar opened: all files that they opened, as the container names them,
        once it is over
    :ivar paths: those of them that they wrote, made or removed
    """

    def __init__(self, container):
        self.opened: set[str] = set()
        self.paths: set[str] = set()
        self._container = container
        self._record = container.host.directory / f'{container.name}.trace'

    @property
    def command(self) -> list[str]:
        """The command that records, to be put before another one."""
        return ['strace', '-f', '-qq', '-s', '4096', '-e', 'signal=none',
                '-e', 'trace=openat,mkdir,rename,unlink,truncate',
                '-o', str(self._record)]

    def __enter__(self):
        pid, = self._container.running('libvirtd')
        self._strace = subprocess.Popen([*self.command, f'--attach={pid}'])
        lab.wait_for('strace', lambda: self._is_traced(pid),
                     lab.START_TIMEOUT)
        return self

    def __exit__(self, *error):
        self._strace.send_signal(signal.SIGINT)
        self._strace.wait()
        self.read()

    @staticmethod
    def _is_traced(pid):
        return all('TracerPid:\t0\n' not in status.read_text()
                   for status in pathlib.Path(f'/proc/{pid}/task').glob(
                       '*/status'))

    def read(self) -> None:
        """Take in what was recorded."""
        for line in self._record.read_text().splitlines():
            if ' = -1 ' in line:
                continue
            found = re.findall(r'"(/[^"]*)"', line)
            self.opened.update(found)
            if 'openat(' not in line or re.search(
                    'O_WRONLY|O_RDWR|O_CREAT', line):
                self.paths.update(found)


class KollaTestCase(pages.PageMixin, base.LiveTestCase):

    # The volumes of nova_compute, if they are not all of kolla's.
    volumes: dict[str, str] | None = None

    def start(self, **layout):
        """Start both hosts, and let nova-compute make their pools."""
        self.start_hosts(**layout)
        self.made = [node.ask('start') for node in self.nodes]

    def start_hosts(self, **layout):
        """Start both hosts without nova-compute."""
        self.nodes = []
        for host in self.hosts:
            node = Node(host, IMAGES, self.volumes)
            self.addCleanup(node.stop)
            self.nodes.append(node)
            node.start(Layout(**layout))

    def assert_check(self, name, expected, destination):
        status, out = self.nodes[0].check(destination)
        self.assertEqual(expected, status, out)
        self.assert_page(name, out)


class GoodTestCase(KollaTestCase):
    """With the lines that the page adds."""

    def setUp(self):
        super().setUp()
        self.start(tls=True, added=ADDED + INBOUND)

    def test_pool_is_at_one_path_in_both(self):
        for node, made in zip(self.nodes, self.made, strict=True):
            for container in node.libvirt, node.compute:
                self.assertEqual(
                    containers.NOVA_ID,
                    os.stat(container.path(made['path'])).st_uid)
            self.assertIn(made['path'], node.libvirt.run(
                ['virsh', 'pool-dumpxml', 'nova-disks']).stdout)
            self.assertFalse(
                os.path.exists(node.host.path(made['path'])))

    def test_check(self):
        self.assert_check('kolla-after', 0, self.nodes[1].host.name)

    def test_disk_goes_to_the_other_host(self):
        source, destination = self.nodes
        uuid = uuidutils.generate_uuid()
        path = source.ask('make_disk', uuid=uuid, size=64 * units.Mi)['path']
        nova = Written(source.compute)
        with Written(source.libvirt) as here, \
                Written(destination.libvirt) as there:
            moved = source.ask(
                'migrate', prefix=nova.command, host=destination.host.name,
                uuid=uuid)
        nova.read()
        self.assertEqual(64 * units.Mi, moved['bytes'])
        arrived = destination.compute.path(path)
        self.assertEqual(self.sha256(source.compute.path(path)),
                         self.sha256(arrived))
        self.assertEqual(containers.NOVA_ID, os.stat(arrived).st_uid)
        self.assertIn(path, nova.opened)
        self.assertIn(path, there.paths)
        for written in nova, here, there:
            self.assertEqual(set(), {
                path for path in written.paths if not path.startswith(SEEN)})


class BeforeTestCase(KollaTestCase):
    """With less than the page adds."""

    def test_without_tls(self):
        self.start(tls=False, added=ADDED)
        self.assert_check('kolla-before', 1, self.nodes[1].host.address)

    def test_without_a_name(self):
        self.start(tls=True, added=ADDED)
        self.assert_check('kolla-address', 1, self.nodes[1].host.address)


class UnsharedTestCase(KollaTestCase):
    """With the pool's directory in a volume that nova_compute lacks."""

    volumes = {name: path for name, path in containers.VOLUMES.items()
               if name != 'libvirtd'}

    def test_check(self):
        self.start_hosts(tls=True, added=ADDED + INBOUND)
        for node in self.nodes:
            error = self.assertRaises(lab.LabError, node.ask, 'start')
            self.assertIn('Mount the directory into the container', str(error))
        self.assert_check('unshared', 1, self.nodes[1].host.name)


class OtherToolsTestCase(KollaTestCase):
    """With what other tools configure."""

    def test_openstack_ansible_key_of_root(self):
        self.start(tls=True, sasl=False, by_socket=True, named=False,
                   added=ADDED)
        os.chown(self.nodes[0].compute.path(
            '/etc/pki/libvirt/private/clientkey.pem'), 0, 0)
        self.assert_check('openstack-ansible-before', 1,
                          self.nodes[1].host.address)

    def test_openstack_helm_listens_to_itself(self):
        self.start(tls=False, sasl=False, by_socket=True, added=ADDED,
                   address='127.0.0.1')
        self.assert_check('openstack-helm-before', 1,
                          self.nodes[1].host.address)
