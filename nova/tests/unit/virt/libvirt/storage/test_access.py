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

import ddt
import testtools

from nova.virt.libvirt.storage import access


@ddt.ddt
class UriTestCase(testtools.TestCase):

    @ddt.data(
        'qemu+tls://%s/system?no_verify=1',
        'qemu+tls://%s/system?pkipath=/x&no_verify=1',
        'qemu+tls://%s/system?pkipath=/x;no_verify=1',
        'qemu+tls://%s/system?no_verify=0&no_verify=1',
        'qemu+tls://%s/system?no%5fverify=1',
        'qemu+tls://%s/system?NO_VERIFY=2#x',
        'qemu+ssh://[%s]/system?no_verify=1')
    def test_uri_that_does_not_verify_is_refused(self, uri):
        error = self.assertRaises(access.Unsafe, access.check_uri, uri)
        self.assertIn(uri, error.reason)
        self.assertIn('without it', error.remedy)
        self.assertEqual(f'{error.reason}. {error.remedy}', str(error))

    @ddt.data(
        'qemu+tls://%s/system',
        'qemu+tls://[%s]/system?no_verify=0',
        'qemu+tls://%s/system?pkipath=/no_verify=1',
        'qemu+tls://%s/no_verify=1')
    def test_uri_that_verifies_is_accepted(self, uri):
        access.check_uri(uri)

    @ddt.data('qemu+tls://%s/system', 'storage+tls://%s/system',
              'qemu://%s/system')
    def test_nothing_is_wrong_with_tls(self, uri):
        self.assertIsNone(access.weakness(uri))

    @ddt.data(('qemu+tcp://%s/system', 'SASL'),
              ('parallels+tcp://%s/system', 'SASL'),
              ('qemu+ext://%s/system?command=/x', 'command'),
              ('qemu+ssh://%s/system', 'key'),
              ('qemu+libssh://%s/system', 'key'),
              ('qemu+libssh2://nova@%s/system', 'key'))
    @ddt.unpack
    def test_what_is_wrong_with_other_transports(self, uri, text):
        self.assertIn(text, access.weakness(uri))


# What libvirt 9.0.0 says, with what is to be kept of it and what helps.
SASL = 'authentication failed: Failed to start SASL negotiation: -1 (SASL(-1)'
GSSAPI = SASL + (': generic failure: GSSAPI Error: Unspecified GSS failure.  '
                 'Minor code may provide more information (%s))')


@ddt.ddt
class RefusalTestCase(testtools.TestCase):

    @ddt.data(
        (GSSAPI % 'Ticket expired', 'authentication failed: Ticket expired',
         'kinit'),
        ('authentication failed: Failed to step SASL negotiation: -1 '
         '(SASL(-1): generic failure: GSSAPI Error: The referenced context '
         'has expired (Success))',
         'authentication failed: The referenced context has expired',
         'kinit'),
        (GSSAPI % 'Server libvirt/192.0.2.1@A not found in Kerberos database',
         'authentication failed: Server libvirt/192.0.2.1@A not found in '
         'Kerberos database', 'migration_inbound_addr'),
        (GSSAPI % 'Cannot contact any KDC for realm (A)',
         'authentication failed: Cannot contact any KDC for realm (A)',
         'krb5.conf'),
        (SASL + ': generic failure: GSSAPI Error: No credentials were '
         'supplied, or the credentials were unavailable or inaccessible (No '
         'Kerberos credentials available (default cache: FILE:/x)))',
         'authentication failed: No Kerberos credentials available (default '
         'cache: FILE:/x)', 'kinit'),
        ('authentication failed: Failed to start SASL negotiation: -4 '
         '(SASL(-4): no mechanism available: No worthy mechs found)',
         'authentication failed: no mechanism available: No worthy mechs '
         'found', 'Install'),
        ('authentication failed: Failed to collect auth credentials', None,
         'auth.conf'),
        ('authentication failed: authentication failed', None,
         'sasl_allowed_username_list'),
        ('Unable to read TLS confirmation: Input/output error', None,
         'tls_allowed_dn_list'),
        ("authentication failed: Failed to verify peer's certificate", None,
         'cacert.pem'),
        ("Cannot read CA certificate '/etc/pki/CA/cacert.pem': No such file",
         None, '/etc/pki on this host'),
        ('Our own certificate /etc/pki/libvirt/clientcert.pem failed '
         'validation against /etc/pki/CA/cacert.pem: The certificate has '
         'expired', None, '/etc/pki on this host'),
        ("Unable to resolve address 'a' service '16514': Unknown name", None,
         'DNS'),
        ("unable to connect to server at 'a:16514': Connection refused", None,
         'libvirt listens'),
        ('no answer within 30 seconds', None, 'libvirt listens'))
    @ddt.unpack
    def test_cause_and_remedy(self, text, cause, remedy):
        error = Exception(text)
        self.assertEqual(cause or text, access.cause(error))
        self.assertIn(remedy, access.remedy(error))
