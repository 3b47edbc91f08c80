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

"""The certificates with which libvirt connects over TLS, read without it.

libvirt says of a connection that fails only that it does. This says which
certificate is why: it connects as libvirt's client does, and looks.
"""

import dataclasses
import datetime
import os
import pathlib
import socket
import ssl

from cryptography import x509

from nova.virt.libvirt.storage import errors

# Where libvirt looks, see https://libvirt.org/kbase/tlscerts.html.
SYSTEM_FILES = {
    'cacert.pem': '/etc/pki/CA/cacert.pem',
    'clientcert.pem': '/etc/pki/libvirt/clientcert.pem',
    'clientkey.pem': '/etc/pki/libvirt/private/clientkey.pem',
}
USER_DIRECTORY = '~/.pki/libvirt'

# Seconds that a host may take for each answer.
TIMEOUT = 10

# libvirt's server sends this when it has taken the client's certificate.
ACCEPTED = b'\x01'

# Codes of OpenSSL, see X509_STORE_CTX_get_error(3).
_NOT_YET_VALID = 9
_EXPIRED = 10
_WRONG_NAME = (62, 64)


class Unusable(errors.StorageError):
    """A certificate cannot be used."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The files that libvirt's client uses.

    :ivar ca: certificates of the authorities that are trusted
    :ivar certificate: of this host
    :ivar key: for that
    """
    ca: str
    certificate: str
    key: str


def find_files(directory: str | None = None) -> Files:
    """The files that this process's libvirt would use.

    :param directory: the ``pkipath`` of the URI
    """
    def find(name: str) -> str:
        if directory:
            return os.path.join(directory, name)
        own = os.path.join(os.path.expanduser(USER_DIRECTORY), name)
        if os.geteuid() and os.path.exists(own):
            return own
        return SYSTEM_FILES[name]

    return Files(*map(find, SYSTEM_FILES))


def read(path: str) -> x509.Certificate:
    """Read a certificate of this host.

    :raises: Unusable
    """
    try:
        return x509.load_pem_x509_certificate(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise _unreadable(path, error)
    except ValueError:
        raise Unusable(f'{path} is not a certificate in PEM format',
                       'Replace it on this host')


class Peer:
    """A host that listens for TLS connections of libvirt."""

    def __init__(self, host: str, port: int, files: Files):
        """Name the host; nothing happens yet.

        :param host: its name or address, as the URI has it
        :param files: with which to connect
        """
        self._host = host
        self._port = port
        self._files = files

    def fetch(self) -> x509.Certificate:
        """The host's certificate, valid or not.

        :raises: Unusable if our own are not
        :raises: OSError if the host does not answer
        """
        context = self._context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            with self._connect(context) as connection:
                data = connection.getpeercert(binary_form=True)
        except (ssl.SSLError, ConnectionError) as error:
            raise Unusable(
                f'port {self._port} of {self._host} does not speak TLS as '
                f'libvirt does: {error}',
                'Start libvirtd-tls.socket there, or set listen_tls = 1 in '
                'its libvirtd.conf')
        assert data is not None
        return x509.load_der_x509_certificate(data)

    def verify(self, certificate: x509.Certificate) -> None:
        """Check that this host takes the other's certificate, and it ours.

        :param certificate: of the other, which is what this is about
        :raises: Unusable
        :raises: OSError if the host does not answer
        """
        try:
            with self._connect(self._context()) as connection:
                answer = self._answer(connection)
        except ssl.SSLCertVerificationError as error:
            raise self._untrusted(certificate, error)
        if answer != ACCEPTED:
            raise Unusable(
                f'it refuses the certificate of this host, '
                f'{describe(read(self._files.certificate))}',
                'Check the CA in cacert.pem there, and '
                'tls_allowed_dn_list in its libvirtd.conf')

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        path = self._files.ca
        try:
            context.load_verify_locations(path)
            # No error of OpenSSL's names the file that cannot be read.
            for path in (self._files.certificate, self._files.key):
                with open(path, 'rb'):
                    pass
            context.load_cert_chain(self._files.certificate, self._files.key)
        except ssl.SSLError as error:
            raise Unusable(f'{path}: {error.reason or error}',
                           'Replace the file on this host')
        except OSError as error:
            raise _unreadable(path, error)
        return context

    def _connect(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        plain = socket.create_connection((self._host, self._port), TIMEOUT)
        try:
            return context.wrap_socket(plain, server_hostname=self._host)
        except BaseException:
            plain.close()
            raise

    @staticmethod
    def _answer(connection: ssl.SSLSocket) -> bytes:
        try:
            return connection.recv(1)
        except (ssl.SSLError, ConnectionError):
            # A refusal looks like this with TLS 1.3.
            return b''

    def _untrusted(
        self, certificate: x509.Certificate,
        error: ssl.SSLCertVerificationError,
    ) -> Unusable:
        if error.verify_code == _EXPIRED:
            return Unusable(
                f'the certificate of the host expired at '
                f'{_date(certificate.not_valid_after_utc)}',
                'Give it a new servercert.pem, and restart libvirt there')
        if error.verify_code == _NOT_YET_VALID:
            return Unusable(
                f'the certificate of the host is valid only from '
                f'{_date(certificate.not_valid_before_utc)}',
                'Check the clocks of both hosts')
        if error.verify_code in _WRONG_NAME:
            return Unusable(
                f'the certificate of the host is for '
                f'{", ".join(names(certificate))}, not {self._host}',
                'Give it a servercert.pem with that name, or set its '
                '[libvirt]migration_inbound_addr to a name that it has')
        return Unusable(
            f'the certificate of the host, issued by '
            f'{certificate.issuer.rfc4514_string()}, is not trusted: '
            f'{error.verify_message}',
            f'Give it one of a CA in {self._files.ca} on this host, or add '
            f'its CA there')


def names(certificate: x509.Certificate) -> list[str]:
    """The names that a certificate gives its host."""
    try:
        extension = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return [certificate.subject.rfc4514_string()]
    return [str(name.value) for name in extension.value]


def describe(certificate: x509.Certificate) -> str:
    """Whose a certificate is, and until when."""
    return (f'{certificate.subject.rfc4514_string()}, valid until '
            f'{_date(certificate.not_valid_after_utc)}')


def days_left(certificate: x509.Certificate) -> int:
    """Days until a certificate expires, negative if it did."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return (certificate.not_valid_after_utc - now).days


def _date(moment: datetime.datetime) -> str:
    return f'{moment:%Y-%m-%d %H:%M} UTC'


def _unreadable(path: str, error: OSError) -> Unusable:
    return Unusable(
        f'{path} cannot be read: {error.strerror}',
        'Put it on this host, and let the user of nova-compute read it')
