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

"""A certificate authority and its certificates, as libvirt takes them."""

from collections.abc import Sequence
import datetime
import ipaddress
import os
from pathlib import Path
import shutil

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509
from cryptography.x509 import oid

YEARS = datetime.timedelta(days=3650)
DAY = datetime.timedelta(days=1)
PURPOSES = {'server': oid.ExtendedKeyUsageOID.SERVER_AUTH,
            'client': oid.ExtendedKeyUsageOID.CLIENT_AUTH}
# What who does not know it has to refuse.
CRITICAL = (x509.BasicConstraints, x509.KeyUsage)


class Authority:
    """A certificate authority, which is made where it is missing.

    :param directory: of its files
    :ivar certificate: the path of its own certificate
    """

    def __init__(self, directory: str | os.PathLike,
                 name: str = 'nova lab CA') -> None:
        self.directory = Path(directory)
        self.certificate = self.directory / 'cacert.pem'
        self._key_path = self.directory / 'cakey.pem'
        if not self.certificate.exists():
            self._make(name)
        key = serialization.load_pem_private_key(
            self._key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._name = x509.load_pem_x509_certificate(
            self.certificate.read_bytes()).subject

    def _make(self, name: str) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = _make_key(self._key_path)
        subject = _subject(name)
        _write(_sign(key, subject, key, subject, YEARS, (
            x509.BasicConstraints(ca=True, path_length=None),
            _key_usage(key_cert_sign=True, crl_sign=True))), self.certificate)

    def issue(self, key: Path, certificate: Path, name: str, side: str,
              addresses: Sequence[str] = (),
              validity: datetime.timedelta = YEARS) -> None:
        """Make a key and a certificate for it.

        :param name: its common name, and its name in the DNS
        :param side: 'server' or 'client', which it is for
        :param addresses: addresses that go in next to the name
        :param validity: from now on; negative for one that has expired
        """
        names: list[x509.GeneralName] = [x509.DNSName(name)]
        names += [x509.IPAddress(ipaddress.ip_address(a)) for a in addresses]
        signed = _sign(
            self._key, self._name, _make_key(key), _subject(name), validity, (
                x509.BasicConstraints(ca=False, path_length=None),
                # libvirt insists on both, though an EC key needs one.
                _key_usage(digital_signature=True, key_encipherment=True),
                x509.ExtendedKeyUsage([PURPOSES[side]]),
                x509.SubjectAlternativeName(names)))
        _write(signed, certificate)

    def issue_client(self, directory: str | os.PathLike, name: str) -> Path:
        """Make a directory that libvirt takes as ``?pkipath=``, once.

        :param name: its common name
        """
        directory = Path(directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(self.certificate, directory / 'cacert.pem')
        certificate = directory / 'clientcert.pem'
        if not certificate.exists():
            self.issue(directory / 'clientkey.pem', certificate, name,
                       'client')
        return directory


def _make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()))
    return key


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid.NameOID.COMMON_NAME, name)])


def _sign(authority: ec.EllipticCurvePrivateKey, issuer: x509.Name,
          key: ec.EllipticCurvePrivateKey, subject: x509.Name,
          validity: datetime.timedelta,
          extensions: Sequence[x509.ExtensionType]) -> x509.Certificate:
    """Make a certificate, valid as of yesterday unless it has expired."""
    start = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(
        subject).public_key(key.public_key()).serial_number(
            x509.random_serial_number()).not_valid_before(
                start + min(validity, 0 * DAY) - DAY).not_valid_after(
                    start + validity)
    for extension in (
            *extensions,
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(
                authority.public_key())):
        builder = builder.add_extension(
            extension, critical=isinstance(extension, CRITICAL))
    return builder.sign(authority, hashes.SHA256())


def _key_usage(**usages: bool) -> x509.KeyUsage:
    names = ('digital_signature', 'content_commitment', 'key_encipherment',
             'data_encipherment', 'key_agreement', 'key_cert_sign',
             'crl_sign', 'encipher_only', 'decipher_only')
    return x509.KeyUsage(**{name: usages.get(name, False) for name in names})


def _write(certificate: x509.Certificate, path: Path) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
