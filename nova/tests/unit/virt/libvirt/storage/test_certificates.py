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

import contextlib
import os
import pathlib
import socket
import ssl

import fixtures

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import certificates

from tools import certificates as tools_certificates


class Authority(tools_certificates.Authority):
    """Makes certificates in its directory.

    :ivar path: of its own certificate
    """

    def __init__(self, directory: str, name: str = 'our CA'):
        super().__init__(directory, name)
        self.path = str(self.certificate)

    def make(self, name: str, days: int = 100) -> tuple[str, str]:
        """Make a certificate for 127.0.0.1 with a name, and its key.

        :param name: 'server', 'client', or 'other' for a server elsewhere
        """
        certificate, key = (self.directory / f'{name}-{kind}.pem'
                            for kind in ('cert', 'key'))
        self.issue(key, certificate, name,
                   'client' if name == 'client' else 'server',
                   [] if name == 'other' else ['127.0.0.1'],
                   days * tools_certificates.DAY)
        return str(certificate), str(key)


class FilesTestCase(test.NoDBTestCase):

    def test_directory_of_the_uri(self):
        self.assertEqual(
            certificates.Files('/pki/cacert.pem', '/pki/clientcert.pem',
                               '/pki/clientkey.pem'),
            certificates.find_files('/pki'))

    def test_own_files_before_those_of_the_system(self):
        home = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.EnvironmentVariable('HOME', home))
        own = os.path.join(home, '.pki/libvirt')
        os.makedirs(own)
        pathlib.Path(own, 'cacert.pem').touch()
        self.useFixture(fixtures.MonkeyPatch('os.geteuid', lambda: 64060))
        self.assertEqual(
            certificates.Files(
                own + '/cacert.pem', '/etc/pki/libvirt/clientcert.pem',
                '/etc/pki/libvirt/private/clientkey.pem'),
            certificates.find_files())

    def test_certificate_that_is_not_there(self):
        error = self.assertRaises(
            certificates.Unusable, certificates.read, '/not/there')
        self.assertIn('/not/there cannot be read: No such file', str(error))


class PeerTestCase(test.NoDBTestCase):
    """Against a server on loopback that does what libvirt's does."""

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.ca = Authority(self.directory)
        self.server = self.ca.make('server')
        self.client = self.ca.make('client')
        self.answer = certificates.ACCEPTED
        self.encrypted = True

    def _other_ca(self):
        return Authority(self.useFixture(fixtures.TempDir()).path, 'other CA')

    def _listen(self):
        """Serve connections; return the port."""
        listener = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(listener.close)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.ca.path)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _address = listener.accept()
                    with contextlib.suppress(OSError), connection:
                        self._serve(context, connection)

        libvirt_storage.native_threading().Thread(
            target=serve, daemon=True).start()
        return listener.getsockname()[1]

    def _serve(self, context, connection):
        if not self.encrypted:
            connection.recv(4)
            return
        with context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.sendall(self.answer)
            encrypted.unwrap()

    def _peer(self, ca=None):
        return certificates.Peer('127.0.0.1', self._listen(), (
            certificates.Files(ca or self.ca.path, *self.client)))

    def _assert_unusable(self, *texts, **kwargs):
        peer = self._peer(**kwargs)
        error = self.assertRaises(
            certificates.Unusable,
            lambda: peer.verify(peer.fetch()))
        for text in texts:
            self.assertIn(text, str(error))

    def test_good_ones(self):
        peer = self._peer()
        certificate = peer.fetch()
        peer.verify(certificate)
        self.assertIn('CN=server, valid until',
                      certificates.describe(certificate))
        self.assertIn(certificates.days_left(certificate), (99, 100))

    def test_certificate_of_a_ca_that_is_not_trusted(self):
        ca = self._other_ca()
        self._assert_unusable('issued by CN=our CA, is not trusted',
                              f'{ca.path} on this host', ca=ca.path)

    def test_certificate_that_expired(self):
        self.server = self.ca.make('server', days=-3)
        self._assert_unusable('expired at', 'new servercert.pem')

    def test_certificate_of_another_name(self):
        self.server = self.ca.make('other')
        self._assert_unusable('is for other, not 127.0.0.1',
                              'migration_inbound_addr')

    def test_our_certificate_is_of_a_ca_that_they_do_not_trust(self):
        self.client = self._other_ca().make('client')
        self._assert_unusable('refuses the certificate of this host, '
                              'CN=client', 'cacert.pem there')

    def test_our_name_is_not_on_their_list(self):
        self.answer = b''
        self._assert_unusable('refuses the certificate of this host',
                              'tls_allowed_dn_list')

    def test_host_without_tls(self):
        self.encrypted = False
        self._assert_unusable('does not speak TLS', 'listen_tls = 1')

    def test_our_key_is_not_for_our_certificate(self):
        self.client = self.client[0], self.ca.make('other')[1]
        self._assert_unusable('other-key.pem', 'Replace the file')

    def test_our_key_is_not_there(self):
        self.client = self.client[0], '/not/there'
        self._assert_unusable('/not/there cannot be read',
                              'the user of nova-compute')
