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

"""Access to another host's libvirt: what is safe, and why it is refused."""

import re
from urllib import parse

from nova.virt.libvirt.storage import errors

# Transport of a URI that names a host and no transport.
DEFAULT_TRANSPORT = 'tls'

# Why a transport is not what disks should go over. Those are the server's
# secrets, and what may write them owns the host.
WEAKNESSES = {
    'tcp': (
        'is encrypted, and knows who connects, only where the destination '
        'asks for SASL with a mechanism that encrypts, such as GSSAPI. '
        'Otherwise everybody on the network reads and changes the disks of '
        'servers, and controls the host'),
    'ext': (
        'leaves it to a command of your own whether the disks of servers '
        'are encrypted on the network, and who may connect'),
}
SSH_WEAKNESS = (
    'needs a key that logs in to every compute host: whoever takes one host '
    'over has all of them')
WEAKNESS_REMEDY = (
    'Let libvirt on all compute hosts listen for TLS, and set '
    '[libvirt]vol_upload_migration_uri to qemu+tls://%s/system')

# Patterns of libvirt's errors, and a remedy for each. Only the text tells them
# apart: most are VIR_ERR_AUTH_FAILED or VIR_ERR_SYSTEM_ERROR.
REMEDIES = (
    ('GSSAPI.*expired|No Kerberos credentials',
     "Get a ticket for nova on this host (kinit), or give it a client "
     "keytab."),
    ('not found in Kerberos database',
     "Tickets are for names: name the destination in its "
     "migration_inbound_addr as its keytab does."),
    ('GSSAPI',
     "Check Kerberos on both hosts: krb5.conf, clocks, the ticket of nova "
     "here, the keytab there."),
    ('auth credentials|whitespace username',
     "Give nova on this host a user name and password in "
     "/etc/libvirt/auth.conf."),
    ('authentication failed: authentication failed',
     "Check the user name and password in auth.conf here, and "
     "sasl_allowed_username_list there. Over tcp only GSSAPI will do."),
    ('No worthy mechs|SASL mechanism',
     "Install the SASL mechanism that the destination asks for on this host."),
    ("verify peer's certificate",
     "The destination's certificate has to be valid for the name in the "
     "URI, not expired, and of a CA in this host's cacert.pem."),
    ('TLS confirmation',
     "The destination refuses this host's certificate: check its CA, its "
     "dates, and tls_allowed_dn_list there."),
    ('certificate|private key|/pki/',
     "Check the certificates in /etc/pki on this host, and that nova may "
     "read them."),
    ('resolve address',
     "Check the destination's name in DNS, and its migration_inbound_addr."),
)
OTHER_REMEDY = (
    'Check that libvirt listens there, and the firewall on both hosts.')

# GSSAPI hides what is wrong behind 150 characters that say nothing.
_SASL_ERROR = re.compile(
    r'Failed to (?:start|step) SASL negotiation: -\d+ \(SASL\(-\d+\): '
    r'(?:generic failure: )?'
    r'(?:GSSAPI Error: (?P<major>.*?) \((?P<minor>.*)\)|(?P<other>.*))\)$')


class Unsafe(errors.StorageError):
    """Disks must not go over a URI."""


def check_uri(uri: str) -> None:
    """Check that a URI lets libvirt find out whom it talks to.

    :raises: Unsafe
    """
    if any(name.lower() == 'no_verify' and value != '0'
           for name, value in parameters(uri)):
        raise Unsafe(
            f'{uri}: no_verify lets any host pass for the destination, and '
            f'get the disks of servers',
            'Set [libvirt]vol_upload_migration_uri without it, and give each '
            'host a certificate that is valid for its name or address')


def weakness(uri: str) -> str | None:
    """The weakness of the transport of a URI, None if it has none."""
    name = transport(uri)
    return None if name == 'tls' else WEAKNESSES.get(name, SSH_WEAKNESS)


def transport(uri: str) -> str:
    """The transport of a URI: tls, tcp, ssh and so on."""
    _driver, plus, name = uri.partition(':')[0].partition('+')
    return name if plus else DEFAULT_TRANSPORT


def parameters(uri: str) -> list[tuple[str, str]]:
    """The names and values of a URI's query."""
    # libvirt takes a semicolon for an ampersand.
    query = uri.partition('?')[2].replace(';', '&')
    return parse.parse_qsl(query, keep_blank_values=True)


def cause(error: Exception) -> str:
    """Why libvirt did not connect, without what says nothing."""
    match = _SASL_ERROR.search(str(error))
    if match is None:
        return str(error)
    minor = match['major'] if match['minor'] == 'Success' else match['minor']
    return str(error)[:match.start()] + (minor or match['other'])


def remedy(error: Exception) -> str:
    """The remedy for a connection that libvirt did not make."""
    for pattern, text in REMEDIES:
        if re.search(pattern, str(error)):
            return text
    return OTHER_REMEDY
