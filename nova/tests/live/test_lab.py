#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.
"""The lab keeps what it promises to the tests that rely on it."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import fixtures
import libvirt
import testtools

from nova.tests.live import base
from nova.virt.libvirt.storage import threads

from tools import certificates
from tools import daemons
from tools.lab import network
from tools import processes
from tools import waiting

lab = base.nova_lab

# The kernel gives the next process the pid after this one.
LAST_PID = pathlib.Path('/proc/sys/kernel/ns_last_pid')
# An emulated machine with a disk and nothing on it.
DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{path}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def effective_uid(pid):
    for line in pathlib.Path('/proc/%d/status' % pid).open():
        if line.startswith('Uid:'):
            return int(line.split()[2])


def links(prefix):
    return [n for n in os.listdir('/sys/class/net') if n.startswith(prefix)]


class HostsTestCase(base.LiveTestCase):

    def create_domain(self, host, name):
        path = '/var/lib/nova/instances/%s.raw' % name
        self.make_disk(host, path, 1 << 20, [])
        self.addCleanup(self.destroy_domain, host, name)
        connection = self.connect_local(host)
        connection.createXML(DOMAIN.format(name=name, path=path))
        return host.path(path)

    def destroy_domain(self, host, name):
        try:
            self.connect_local(host).lookupByName(name).destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise

    def qemu_pids(self, host):
        return [pid for pid in host.processes()
                if processes.name(pid).startswith('qemu-system')]


class TestConnections(HostsTestCase):

    def test_machine_connects_over_tls(self):
        for host in self.hosts:
            self.assertEqual(host.name, self.connect(host).getHostname())

    def test_nova_of_one_host_connects_to_the_other_over_tls(self):
        done = self.source.run(
            ['virsh', '-c', self.destination.uri, 'hostname'], user='nova')
        self.assertEqual(self.destination.name, done.stdout.strip())

    def test_certificate_names_the_host_too(self):
        self.source.run(['virsh', '-c', 'qemu+tls://%s/system' %
                         self.destination.name, 'uri'], user='nova')

    def refused(self, make):
        with tempfile.TemporaryDirectory() as name:
            pki = make(pathlib.Path(name))
            return self.assertRaises(libvirt.libvirtError, self.connect,
                                     self.destination, pki)

    def test_client_of_another_ca_is_refused(self):
        def make(path):
            ca = certificates.Authority(path / 'ca', 'another CA')
            pki = ca.issue_client(path / 'pki', network.CLIENT)
            # It trusts the server; it is the server that does not trust it.
            pki.joinpath('cacert.pem').write_bytes(
                self.lab.authority.certificate.read_bytes())
            return pki
        self.refused(make)

    def test_server_of_another_ca_is_not_trusted(self):
        def make(path):
            return certificates.Authority(path / 'ca').issue_client(
                path / 'pki', network.CLIENT)
        self.assertIn('certificate', str(self.refused(make)))

    def test_client_without_a_certificate_is_refused(self):
        def make(path):
            path.joinpath('cacert.pem').write_bytes(
                self.lab.authority.certificate.read_bytes())
            return path
        self.refused(make)

    def test_link_goes_down_and_comes_back(self):
        address = (self.destination.address, lab.TLS_PORT)
        self.addCleanup(self.destination.link, True)
        self.destination.link(False)
        with self.assertRaises(OSError):
            socket.create_connection(address, timeout=1)
        self.destination.link(True)
        socket.create_connection(address, timeout=10).close()

    def test_keepalive_finds_a_link_that_is_down(self):
        connection = self.connect(self.destination)
        connection.setKeepAlive(1, 2)
        self.addCleanup(self.destination.link, True)
        self.destination.link(False)
        began = time.monotonic()
        self.assertRaises(libvirt.libvirtError, connection.getHostname)
        self.assertLess(time.monotonic() - began, 15)


class TestLimit(HostsTestCase):
    """What a host sends is counted, and no more than a limit."""

    LIMIT = 4 << 20
    BYTES = 8 << 20
    SEND = ('import socket, sys\n'
            'there = socket.create_connection((sys.argv[1], '
            'int(sys.argv[2])))\n'
            'there.sendall(bytes(int(sys.argv[3])))\n'
            'there.shutdown(socket.SHUT_WR)\n'
            'there.recv(1)\n')

    def send(self):
        """Send bytes from the source to the machine; return the seconds."""
        with socket.create_server((self.lab.address, 0)) as listener:
            process = self.source.popen(
                [sys.executable, '-c', self.SEND, self.lab.address,
                 str(listener.getsockname()[1]), str(self.BYTES)])
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            listener.settimeout(30)
            connection, _address = listener.accept()
            started = time.monotonic()
            with connection:
                while connection.recv(1 << 16):
                    pass
            return time.monotonic() - started

    def test_a_limit_holds_until_it_is_lifted(self):
        self.addCleanup(self.source.limit, None)
        self.source.limit('%dbit' % (self.LIMIT * 8))
        self.assertGreater(self.send(), 0.9 * self.BYTES / self.LIMIT)
        self.source.limit(None)
        qdiscs = self.source.run(
            ['tc', 'qdisc', 'show', 'dev', 'eth0']).stdout
        self.assertNotIn('tbf', qdiscs)

    def test_sent_bytes(self):
        before = self.source.sent_bytes()
        self.send()
        sent = self.source.sent_bytes() - before
        self.assertGreaterEqual(sent, self.BYTES)
        self.assertLess(sent, 1.1 * self.BYTES)


class TestHosts(HostsTestCase):

    def test_nova_has_another_uid_on_each_host(self):
        uids = [host.run(['id', '-u'], user='nova').stdout.strip()
                for host in self.hosts]
        self.assertEqual([str(host.nova_uid) for host in self.hosts], uids)
        self.assertEqual(len(self.hosts), len(set(uids)))

    def test_files_of_one_host_are_not_on_the_other(self):
        for top in lab.MOUNTS:
            path = self.source.path(top) / 'only-here'
            path.touch()
            self.addCleanup(path.unlink)
            self.source.run(['test', '-e', '%s/only-here' % top])
            self.destination.run(['test', '!', '-e', '%s/only-here' % top])

    def test_guest_runs_as_libvirt_qemu_and_gives_the_disk_back(self):
        disk = self.create_domain(self.source, 'owner')
        pid, = self.qemu_pids(self.source)
        qemu = int(self.source.run(['id', '-u', 'libvirt-qemu']).stdout)
        self.assertEqual(qemu, effective_uid(pid))
        self.assertEqual(qemu, disk.stat().st_uid)
        self.destroy_domain(self.source, 'owner')
        self.assertEqual(self.source.nova_uid, disk.stat().st_uid)

    def test_pool_belongs_to_nova_and_takes_a_volume(self):
        pool = self.make_pool(self.destination)
        path = self.destination.path('/var/lib/nova/' + pool.name())
        self.assertEqual(self.destination.nova_uid, path.stat().st_uid)
        pool.createXML('<volume><name>disk</name><capacity>1048576'
                       '</capacity></volume>')
        self.assertEqual(1048576, (path / 'disk').stat().st_size)

    def test_libvirtd_killed_and_started_again_finds_its_guest(self):
        connection = self.connect(self.source)
        self.create_domain(self.source, 'survivor')
        pids = self.qemu_pids(self.source)
        self.addCleanup(self.source.up)
        self.source.stop_libvirtd(signal.SIGKILL)
        self.assertIsNone(self.source.libvirtd_pid)
        self.assertRaises(libvirt.libvirtError, connection.getHostname)
        self.source.start_libvirtd()
        again = self.connect(self.source)
        self.assertTrue(again.lookupByName('survivor').isActive())
        self.assertEqual(pids, self.qemu_pids(self.source))

    def test_program_can_be_ended_whoever_started_it(self):
        started = []
        threads.start(lambda: started.append(
            self.source.popen(['sleep', '60'])), 'copies').join()
        process, = started
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        process.terminate()
        self.assertEqual(-signal.SIGTERM, process.wait(timeout=10))

    def test_sudoers_that_sudo_would_refuse_are_not_installed(self):
        self.source.set_sudoers('nova ALL=(root) NOPASSWD: /usr/bin/id\n')
        self.addCleanup(
            self.source.path('/etc/sudoers.d/nova').unlink)
        self.assertRaises(lab.LabError, self.source.set_sudoers, 'nova may')
        done = self.source.run(['sudo', '-n', '/usr/bin/id', '-u'],
                               user='nova')
        self.assertEqual('0', done.stdout.strip())

    def test_command_that_fails_says_why(self):
        error = self.assertRaises(lab.LabError, self.source.run,
                                  ['ls', '/not/there'])
        self.assertIn("cannot access '/not/there'", str(error))


class TestSsh(HostsTestCase):

    def traces(self, host):
        """What a login by ssh needs: daemons, keys, a shell."""
        keys = [str(path) for top in ('/etc/ssh', '/var/lib/nova/.ssh')
                for path in host.path(top).glob('*')]
        shell = host.run(['getent', 'passwd', 'nova']).stdout.strip()
        return host.sshd_pids, keys, shell.rpartition(':')[2]

    def log_in(self):
        return self.source.run(['ssh', self.destination.address, 'hostname'],
                               user='nova', check=False, timeout=30)

    def test_hosts_have_no_sshd_and_no_key(self):
        for host in self.hosts:
            self.assertFalse(host.listens(lab.SSH_PORT))
            self.assertEqual(([], [], '/usr/sbin/nologin'),
                             self.traces(host))
        self.assertNotEqual(0, self.log_in().returncode)

    def test_ssh_comes_when_asked_for_and_goes_without_a_trace(self):
        before = [self.traces(host) for host in self.hosts]
        self.addCleanup(self.lab.ssh, False)
        self.lab.ssh(True)
        self.lab.ssh(True)
        done = self.log_in()
        self.assertEqual(self.destination.name, done.stdout.strip())
        self.lab.ssh(False)
        self.assertEqual(before, [self.traces(host) for host in self.hosts])


class TestDaemons(testtools.TestCase):

    def start(self, pid=None):
        """Start a process; of a certain pid, if it is asked for."""
        if pid is not None:
            LAST_PID.write_text('%d\n' % (pid - 1))
        process = subprocess.Popen(['sleep', '60'], start_new_session=True)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_process_that_has_the_pid_of_another_still_runs(self):
        first = self.start()
        self.assertFalse(daemons.gone(first.pid))
        first.kill()
        first.wait()
        # Another process of the machine may be first.
        for _attempt in range(50):
            second = self.start(first.pid)
            if second.pid == first.pid:
                break
        self.assertEqual(first.pid, second.pid)
        self.assertFalse(daemons.gone(second.pid))

    def test_daemon_that_ended_is_told_though_another_answers(self):
        directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        daemon = daemons.Daemon('ended', directory)
        daemon.start(['sh', '-c', 'echo Address already in use'])
        waiting.wait_for('its end', lambda: daemon.pid is None)
        error = self.assertRaises(
            waiting.Failed, daemon.wait, 'its port', lambda: True)
        self.assertEqual('ended: it ended\nAddress already in use',
                         str(error))


class TestUpAndDown(base.LiveTestCase):
    """On a second lab, next to the one of the other tests."""

    def setUp(self):
        super().setUp()
        self.directory = base.DIRECTORY + '-2'
        self.subnet = (base.SUBNET + 1) % 256
        self.second = lab.Lab(self.directory, subnet=self.subnet)
        self.addCleanup(self.second.down)
        self.second.up()

    def all_pids(self):
        return [pid for host in self.second.hosts
                for pid in host.processes()]

    def assertNothingLeft(self, pids):
        self.assertFalse(os.path.exists(self.directory))
        self.assertEqual([], links(self.second.bridge))
        self.assertEqual([], [pid for pid in pids
                              if processes.mount_namespace(pid)])
        with open('/proc/self/mountinfo') as mounts:
            self.assertNotIn(self.directory, mounts.read())

    def test_second_up_changes_nothing(self):
        before = self.all_pids()
        lab.Lab(self.directory).up()
        self.assertEqual(before, self.all_pids())

    def test_down_ends_what_runs_in_the_hosts(self):
        self.second.ssh(True)
        stubborn = self.second.hosts[0].popen(
            ['sh', '-c', 'trap "" TERM; echo set; sleep 60'], user='nova',
            stdout=subprocess.PIPE, text=True)
        self.assertEqual('set\n', stubborn.stdout.readline())
        stubborn.stdout.close()
        pids = self.all_pids()
        self.assertIn(stubborn.pid, pids)
        self.second.down()
        self.assertEqual(-signal.SIGKILL, stubborn.wait(5))
        self.assertNothingLeft(pids)

    def test_down_works_where_a_holder_died(self):
        pids = self.all_pids()
        os.kill(self.second.hosts[0].pid, signal.SIGKILL)
        lab.Lab(self.directory).down()
        self.assertNothingLeft(pids)

    def test_down_leaves_the_other_lab_alone(self):
        self.second.down()
        for top in lab.MOUNTS:
            self.assertTrue(os.path.samefile(
                '/proc/%d/root%s' % (self.source.pid, top),
                self.source.path(top)))
        self.assertTrue(self.lab.is_up)

    def test_subnet_of_another_lab_is_refused(self):
        other = lab.Lab(self.directory + '-other', subnet=self.subnet)
        self.addCleanup(other.down)
        error = self.assertRaises(lab.LabError, other.up)
        self.assertIn(f'the lab in {self.directory}: choose', str(error))
        self.assertFalse(other.directory.exists())
        # As if it had lost its bridge to the other.
        other._start_directory()
        other.down()
        self.assertFalse(other.directory.exists())
        for host in self.second.hosts:
            self.connect_to(host)

    def test_up_repairs_what_died(self):
        first, second = self.second.hosts
        other = second.pid
        os.kill(first.pid, signal.SIGKILL)
        second.stop_libvirtd(signal.SIGKILL)
        self.second.up()
        self.assertTrue(self.second.is_up)
        self.assertEqual(other, second.pid)
        self.assertEqual('host1', self.connect_to(first).getHostname())

    def connect_to(self, host):
        return self._open(self.second.uri(host))

    def test_down_twice_is_no_error(self):
        self.second.down()
        self.second.down()
        self.assertFalse(os.path.exists(self.directory))

    def test_directory_that_is_no_lab_is_left_alone(self):
        self.second.down()
        with tempfile.TemporaryDirectory() as name:
            precious = pathlib.Path(name, 'precious')
            precious.touch()
            other = lab.Lab(name, subnet=self.subnet)
            self.assertRaises(lab.LabError, other.up)
            other.down()
            self.assertTrue(precious.exists())

    def test_command_line(self):
        def run(*args):
            return subprocess.run(
                [sys.executable, '-m', 'tools.lab', '--directory',
                 self.directory, *args], capture_output=True, text=True)
        self.assertEqual(0, run('status').returncode)
        done = run('exec', 'host2', '--user', 'nova', '--', 'id', '-un')
        self.assertEqual('nova\n', done.stdout)
        self.assertEqual('lab: there is no host host9\n',
                         run('exec', 'host9', 'true').stderr)
        self.assertEqual(0, run('down').returncode)
        self.assertEqual(1, run('status').returncode)
