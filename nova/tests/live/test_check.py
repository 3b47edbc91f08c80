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

"""nova-storage-migrate check against a good host, and against broken ones."""

import functools
import os
import signal
import time

from oslo_serialization import jsonutils
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.virt.libvirt.storage import access

lab = base.nova_lab

CONFIG = '/etc/nova-check.conf'
OPTIONS = """\
[DEFAULT]
host = {host.name}
my_ip = {host.address}
instances_path = /var/lib/nova/instances
[libvirt]
use_storage_pools = True
vol_upload_migration = True
vol_upload_migration_uri = {uri}
disks_pool = {pool}
disks_pool_path = /var/lib/nova/{pool}
"""
GOOD = {
    'user', 'options', 'libvirt', 'pool', 'access', 'directory',
    'policy', 'uri', 'name', 'port',
    'client certificate', 'server certificate', 'encryption', 'preflight',
    'shared storage', 'probe copy'}


@functools.cache
def get_checker(host):
    """Start what runs the command on a host, as nova."""
    return base.start_as_nova(host, 'nova.tests.live.checker')


class CheckTestCase(base.LiveTestCase):

    def setUp(self):
        super().setUp()
        self.pool_name = 'test-' + uuidutils.generate_uuid()
        self.path = '/var/lib/nova/' + self.pool_name
        self.make_pool(self.source, self.pool_name)
        self.address = self.destination.address
        self._configure('qemu+tls://%s/system')

    def _configure(self, uri):
        config = self.source.path(CONFIG)
        config.write_text(OPTIONS.format(
            host=self.source, uri=uri, pool=self.pool_name))
        self.addCleanup(config.unlink, missing_ok=True)

    def _make_pool(self):
        self.pool = self.make_pool(self.destination, self.pool_name)
        return self.pool

    def _check(self, *argv, **kwargs):
        """Check the destination as nova of the source.

        :returns: the exit status, and what was printed
        """
        checker = get_checker(self.source)
        checker.stdin.write(jsonutils.dumps({
            'argv': ['check', '--config-file', CONFIG,
                     *(argv or [self.address])], **kwargs}) + '\n')
        checker.stdin.flush()
        seen = jsonutils.loads(checker.stdout.readline())
        return seen['status'], seen['out']

    def _assert_broken(self, what, cause, remedy, status='fail', **kwargs):
        """One line says what is wrong, and what to do about it."""
        exit_status, out = self._check(**kwargs)
        bad = [line for line in out.splitlines()
               if not line.startswith('ok ')]
        self.assertEqual(1, len(bad), out)
        self.assertTrue(bad[0].startswith(
            f'{status:<5} {self.address}: {what}: '), out)
        self.assertIn(cause, bad[0])
        self.assertIn(remedy, bad[0].partition('; ')[2])
        self.assertEqual(int(status == 'fail'), exit_status)

    def _assert_nothing_left(self):
        """Neither a volume nor a pool of the check's is on a host."""
        for host in self.source, self.destination:
            connection = self.connect_local(host)
            self.assertEqual(
                [], [pool.name() for pool in connection.listAllStoragePools()
                     if pool.name().startswith('nova-check')])
            self.assertEqual([], os.listdir(host.path(self.path)))


class GoodTestCase(CheckTestCase):

    def setUp(self):
        super().setUp()
        self._make_pool()

    def test_all_is_well_and_nothing_is_left(self):
        status, out = self._check(self.address, '--size', '100')
        self.assertEqual(0, status, out)
        lines = out.splitlines()
        self.assertEqual(GOOD, {line.split(': ')[1] for line in lines})
        self.assertEqual({'ok'}, {line.split()[0] for line in lines})
        self.assertRegex(
            lines[-1], r'16 MiB written at \d+ MiB/s, read back, deleted; '
            r'100\.0 GiB take about \d+ h \d+ min \d+ s')
        self._assert_nothing_left()

    def test_hosts_without_pools(self):
        config = self.source.path(CONFIG)
        config.write_text(config.read_text().replace(
            'use_storage_pools = True', 'use_storage_pools = False'))
        status, out = self._check(self.address, '--size', '1')
        self.assertEqual(0, status, out)
        lines = out.splitlines()
        self.assertEqual(GOOD - {'pool', 'access', 'policy'},
                         {line.split(': ')[1] for line in lines})
        self.assertRegex(lines[-1], r'16 MiB written at \d+ MiB/s')
        self._assert_nothing_left()

    def test_json_of_several_hosts(self):
        others = self.source.path('/etc/nova-others')
        self.addCleanup(others.unlink)
        others.write_text(f'198.18.255.254  # gone\n{self.source.address}\n')
        status, out = self._check(
            self.address, '--all', '/etc/nova-others', '--json')
        self.assertEqual(1, status)
        findings = jsonutils.loads(out)
        self.assertEqual(
            {self.source.name, self.address, '198.18.255.254'},
            {each['host'] for each in findings})
        bad, = [each for each in findings if each['status'] != 'ok']
        self.assertEqual(('198.18.255.254', 'port'),
                         (bad['host'], bad['what']))


class BrokenTestCase(base.CertificateMixin, CheckTestCase):

    def setUp(self):
        super().setUp()
        self._make_pool()

    def _restart(self, **settings):
        """Start the destination's libvirtd anew; its pool is active."""
        self.destination.restart_libvirtd(**settings)
        self.pool = self.connect_local(
            self.destination).storagePoolLookupByName(self.pool_name)
        if not self.pool.isActive():
            self.pool.create()

    def _restart_unchecked(self):
        """Without this libvirtd does not start with a bad certificate."""
        self._restart(tls_no_sanity_certificate=1)

    def test_certificate_of_a_wrong_ca(self):
        self.set_server(ca=self.other_ca())
        self._restart_unchecked()
        self._assert_broken(
            'server certificate', 'issued by CN=another CA, is not trusted',
            '/etc/pki/CA/cacert.pem')

    def test_our_certificate_of_a_wrong_ca(self):
        self.set_client(ca=self.other_ca())
        self._assert_broken(
            'server certificate', 'refuses the certificate of this host',
            'cacert.pem there')

    def test_certificate_that_expired(self):
        self.set_server()
        self.destination.expire_certificate('server')
        self._restart_unchecked()
        self._assert_broken('server certificate', 'expired at',
                            'new servercert.pem')

    def test_our_certificate_that_expired(self):
        self.set_client()
        self.source.expire_certificate('client')
        self._assert_broken('client certificate', 'expired', 'new one')

    def test_certificate_of_a_wrong_name(self):
        self.set_server(name='another-host')
        self._restart_unchecked()
        self._assert_broken(
            'server certificate', f'is for another-host, not {self.address}',
            'migration_inbound_addr')

    def test_no_listener(self):
        self.addCleanup(self.destination.start_libvirtd)
        self.destination.stop_libvirtd()
        self._assert_broken('port', 'nothing listens on port 16514',
                            'virtproxyd-tls.socket')

    def test_libvirtd_that_hangs(self):
        pid = self.destination.libvirtd_pid
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        self._assert_broken('server certificate', 'timed out', 'hang')
        self.assertLess(time.monotonic() - started, 20)

    def test_no_pool(self):
        self.addCleanup(
            self.connect_local(self.destination).storagePoolDefineXML,
            self.pool.XMLDesc())
        self.pool.destroy()
        self.pool.undefine()
        self._assert_broken('libvirt', f'no storage pool {self.pool_name}',
                            'use_storage_pools')

    def test_pool_that_is_not_active(self):
        self.pool.destroy()
        self._assert_broken('libvirt', 'is not active',
                            f'virsh pool-start {self.pool_name}')

    def test_full_disk(self):
        self.destination.run(['mount', '-t', 'tmpfs', '-o', 'size=8m,mode=755,'
                              f'uid={self.destination.nova_uid}', 'tmpfs',
                              self.path])
        self.addCleanup(self.destination.run, ['umount', self.path])
        self._assert_broken('preflight', 'bytes available in storage pool',
                            'Free some space')

    def test_pool_of_a_wrong_owner(self):
        os.chown(self.destination.path(self.path), 0, 0)
        nova = f'{self.destination.nova_uid}:{self.destination.nova_gid}'
        self._assert_broken('preflight', f'{self.path} there belongs to uid 0',
                            f'chown {nova} {self.path}')
        self._assert_nothing_left()

    def test_libvirt_that_is_too_old(self):
        # There is but one version here: more than that is asked for.
        self._assert_broken('libvirt', 'its libvirt is version 9.',
                            'Install 99.0.0 or later', minimum=99_000_000)

    def test_plain_tcp(self):
        self.addCleanup(self.destination.restart_libvirtd)
        self._restart(listen_tcp=1, auth_tcp='none')
        self._configure('qemu+tcp://%s/system')
        self._assert_broken('encryption', access.WEAKNESSES['tcp'],
                            'qemu+tls://%s/system', status='warn')
        self._assert_nothing_left()

    def test_ssh(self):
        self.addCleanup(self.lab.ssh, False)
        self.lab.ssh(True)
        self._configure('qemu+ssh://%s/system')
        self._assert_broken('encryption', access.SSH_WEAKNESS,
                            'qemu+tls://%s/system', status='warn')

    def test_uri_that_does_not_verify(self):
        self._configure('qemu+tls://%s/system?no_verify=1')
        self._assert_broken(
            'uri', 'no_verify lets any host pass for the destination',
            'a certificate that is valid')
