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

"""Who gets in to a host, by each way of telling who one is.

A disk is copied as nova of the source host, with what that host has: its
certificate, password, or ticket. What it does not have it must not get in
without, and the error has to say what is missing.
"""

import functools
import os
import shutil
import time

from oslo_serialization import jsonutils
from oslo_utils import units

from nova.tests.live import base
from nova.tests.live import fault_table
from nova.tests.live import moves
from nova.tests.live import test_transfer

from tools.lab import auth as lab_auth
from tools import process_trace

lab = base.nova_lab

# A refusal takes a tenth of it on a machine that has nothing else to do.
REFUSAL_SECONDS = 10


LOG = 'migrations.log'


@functools.cache
def get_compute(host):
    """Start the part of nova-compute that migrates, on a host."""
    with open(host.logs / LOG, 'w') as log:
        return base.start_as_nova(
            host, 'nova.tests.live.compute', stderr=log)


class SecurityTestCase(test_transfer.TransferTestCase):

    def setUp(self):
        super().setUp()
        # A server whose migration is refused has a disk all the same.
        path = self._make_disk(units.Mi, [(0, units.Mi)])
        self.sha = self.sha256(path)
        directory = self.source.path(self.directory)
        directory.mkdir()
        self.addCleanup(shutil.rmtree, directory)
        os.chown(directory, self.source.nova_uid, self.source.nova_gid)
        self.compute = get_compute(self.source)
        self.by_name = 'qemu+tls://%s/system' % self.destination.name

    def _call(self, name, **arguments):
        """Call a function of the source's nova-compute."""
        request = jsonutils.dumps([name, arguments])
        self.compute.stdin.write(request + '\n')
        self.compute.stdin.flush()
        return jsonutils.loads(self.compute.stdout.readline())

    def _migrate(self, uri):
        return self._call(
            'migrate', uri=uri, host=self.destination.name,
            pool=self.pool_name, uuid=self.uuid, directory=self.directory)

    def _assert_admitted(self, uri):
        self.assertEqual({'bytes': units.Mi}, self._migrate(uri))
        self._assert_arrived()
        self.assertEqual(self.destination.nova_uid,
                         self._path(self.destination).stat().st_uid)
        self.assertTrue(self.destination.path(
            self.directory + '/disk.info').exists())

    def _assert_refused(self, fault, cause, remedy, uri=None):
        """Assert that nothing happens, and that the error says why.

        Users see no more than 255 characters of it.

        :param fault: what the table of faults has of it
        """
        uri = uri or self.by_name
        guest = moves.Guest(self._path(self.source))
        self.addCleanup(guest.stop)
        started = time.monotonic()
        error = self._migrate(uri).get('error', '')
        seconds = time.monotonic() - started
        self.assertLess(seconds, REFUSAL_SECONDS)
        for text in (self.destination.name, uri, cause, remedy):
            self.assertIn(text, error[:255])
        self.assertEqual(self.sha, self.sha256(self._path(self.source)))
        self._assert_nothing_on_destination()
        fault_table.record(fault, fault_table.CONNECTING,
                           fault_table.AT_SOURCE, guest.was_off, seconds)
        self.assertFalse(guest.was_off)
        guest.stop()

    def _assert_not_confirmed(self, fault):
        """Assert that the destination does not take the certificate."""
        self._assert_refused(fault, 'TLS confirmation', 'tls_allowed_dn_list')

    def _remove_client_certificate(self):
        self.addCleanup(self.source.set_certificate, 'client')
        self.source.certificate('client').unlink()


class CertificateTestCase(base.CertificateMixin, SecurityTestCase):

    def _assert_server_not_trusted(self, fault, remedy):
        """Assert that the source does not take the certificate."""
        # Else libvirtd does not start; one that runs does not look again.
        self.destination.restart_libvirtd(tls_no_sanity_certificate=1)
        self._assert_refused(fault, "verify peer's certificate", remedy)

    def test_compute_host_gets_in(self):
        self._assert_admitted(self.destination.uri)

    def test_compute_host_gets_in_by_name(self):
        self._assert_admitted(self.by_name)

    def test_storage_driver_alone_is_enough(self):
        self._assert_admitted('storage+tls://%s/system' %
                              self.destination.name)

    def test_host_that_is_not_on_the_list(self):
        self.set_client(name='webserver')
        self._assert_not_confirmed('certificate of the source is not on the '
                                   'list of the destination')

    def test_no_client_certificate(self):
        self._remove_client_certificate()
        self._assert_not_confirmed('no client certificate')

    def test_client_certificate_of_another_ca(self):
        self.set_client(ca=self.other_ca())
        self._assert_refused('certificate of the source is of another CA',
                             'known issuer', '/etc/pki')

    def test_client_certificate_expired(self):
        self.set_client()
        self.source.expire_certificate('client')
        self._assert_refused('certificate of the source has expired',
                             'expired', '/etc/pki')

    def test_server_certificate_expired(self):
        self.set_server()
        self.destination.expire_certificate('server')
        self._assert_server_not_trusted(
            'certificate of the destination has expired', 'not expired')

    def test_server_certificate_of_another_ca(self):
        self.set_server(ca=self.other_ca())
        self._assert_server_not_trusted(
            'certificate of the destination is of another CA', 'cacert.pem')

    def test_server_certificate_of_another_name(self):
        self.set_server(name='host9')
        self._assert_server_not_trusted(
            'certificate of the destination is for another name',
            'valid for the name in the URI')

    def test_server_certificate_is_renewed_without_a_restart(self):
        self.set_server(name='host9')
        self._assert_admitted(self.by_name)
        self.destination.run(['virt-admin', '-c', 'libvirtd:///system',
                              'server-update-tls', lab.LISTENER])
        self.assertIn("verify peer's certificate",
                      self._migrate(self.by_name)['error'])

    def test_name_that_does_not_resolve(self):
        self._assert_refused(
            'name of the destination cannot be resolved', 'resolve', 'DNS',
            uri='qemu+tls://nowhere.invalid/system')


class ScramTestCase(SecurityTestCase):

    def setUp(self):
        super().setUp()
        self.scram = lab_auth.Scram(self.destination)
        self.addCleanup(self.scram.disable)
        self.scram.enable()

    def test_password_lets_in(self):
        self.scram.tell(self.source)
        self._assert_admitted(self.by_name)

    def test_no_password(self):
        self._assert_refused('no SASL password', 'auth', 'auth.conf')

    def test_wrong_password(self):
        self.scram.tell(self.source, 'wrong')
        self._assert_refused('SASL password is wrong',
                             'authentication failed', 'auth.conf')

    def test_password_without_encryption(self):
        self.scram.tell(self.source)
        self.destination.restart_libvirtd(listen_tcp=1, auth_tcp='sasl')
        self._assert_refused(
            'SASL password without encryption', 'authentication failed',
            'Over tcp only GSSAPI',
            uri='qemu+tcp://%s/system' % self.destination.name)

    def test_password_without_a_certificate(self):
        self.scram.tell(self.source)
        self._remove_client_certificate()
        self._assert_not_confirmed('SASL password, and no client certificate')


class KerberosTestCase(SecurityTestCase):

    def setUp(self):
        super().setUp()
        self.kerberos = lab_auth.Kerberos(self.destination)
        self.addCleanup(self.kerberos.disable)
        self.kerberos.enable()

    def test_ticket_lets_in(self):
        self.kerberos.get_ticket(self.source)
        self._assert_admitted(self.by_name)

    def test_ticket_encrypts_where_tls_does_not(self):
        self.kerberos.get_ticket(self.source)
        self.destination.restart_libvirtd(listen_tcp=1, auth_tcp='sasl')
        self._assert_admitted('qemu+tcp://%s/system' % self.destination.name)

    def test_no_ticket(self):
        self.assertFalse(self.kerberos.has_ticket(self.source))
        self._assert_refused('no Kerberos ticket', 'No Kerberos credentials',
                             'kinit')

    def _expire_ticket(self):
        self.kerberos.get_ticket(self.source, lifetime='1s')
        lab.wait_for('the end of the ticket', lambda: (
            not self.kerberos.has_ticket(self.source)), 10)

    def test_ticket_expired(self):
        self._expire_ticket()
        self._assert_refused('Kerberos ticket has expired', 'expired',
                             'kinit')

    def test_ticket_that_expired_is_renewed_with_a_keytab(self):
        self._expire_ticket()
        self.kerberos.renew_tickets(self.source)
        self._assert_admitted(self.by_name)

    def test_ticket_of_somebody_else(self):
        self.kerberos.get_ticket(self.source, user='somebody')
        self._assert_refused('Kerberos ticket is of somebody else',
                             'authentication failed',
                             'sasl_allowed_username_list')

    def test_ticket_is_for_a_name(self):
        self.kerberos.get_ticket(self.source)
        self._assert_refused(
            'Kerberos ticket, and the destination is named by its address',
            'not found in Kerberos database', 'migration_inbound_addr',
            uri=self.destination.uri)


class TraceTestCase(SecurityTestCase):
    """Which programs the hosts start for a migration."""

    SSH = {'ssh', 'scp', 'sftp', 'rsync', 'sshd', 'sftp-server'}

    def test_migration_starts_no_program_of_ssh(self):
        with (process_trace.Trace(self.source) as source,
              process_trace.Trace(self.destination) as destination):
            self._assert_admitted(self.by_name)
            # The trace has to see that this one starts a program.
            self._call('start_program')
        self.assertIn('qemu-img', source.programs())
        self.assertEqual(
            set(), self.SSH & (source.programs() | destination.programs()))
