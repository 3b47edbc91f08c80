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
"""SASL between the hosts of a lab: passwords (SCRAM), and Kerberos.

Both come on top of TLS and its client certificates. A host whose libvirtd asks
for one of them lets nobody in without it, and goes back to certificates alone
with ``disable``. All files are in the hosts' own directories: nothing of it
outlives the lab.
"""

import os
import pathlib
import secrets

from tools import lab as nova_lab

REALM = 'NOVA.LAB'
KDC_PORT = 88
TICKETS = nova_lab.NOVA_HOME + '/tickets'
NOVA_KEYTAB = '/etc/nova.keytab'
RENEWAL_KEYTAB = '/etc/nova-renewal.keytab'
LIBVIRT_KEYTAB = '/etc/libvirt/krb5.tab'
AUTH_CONF = '/etc/libvirt/auth.conf'
SASL_CONF = '/etc/sasl2/libvirt.conf'
PASSWORDS = '/etc/libvirt/passwd.db'

AUTH = """\
[credentials-nova]
authname=nova
password={password}

[auth-libvirt-default]
credentials=nova
"""

SCRAM = """\
mech_list: scram-sha-256
sasldb_path: /etc/libvirt/passwd.db
"""

GSSAPI = """\
mech_list: gssapi
keytab: /etc/libvirt/krb5.tab
"""

# Nothing of it is to be looked up in a DNS, which the lab has not.
KRB5_CONF = """\
[libdefaults]
    default_realm = {realm}
    default_ccache_name = FILE:{tickets}
    default_client_keytab_name = FILE:{renewal}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
[realms]
    {realm} = {{
        kdc = {kdc}:{port}
    }}
"""

KDC_CONF = """\
[realms]
    {realm} = {{
        database_name = /etc/krb5kdc/principal
        key_stash_file = /etc/krb5kdc/stash
    }}
"""


class Scram:
    """A password of nova's, in auth.conf, that a libvirtd asks for.

    :param server: the host whose libvirtd it is
    """

    def __init__(self, server: nova_lab.Host) -> None:
        self.server = server

    def enable(self) -> None:
        """Ask for a password that no other host knows yet."""
        _write(self.server.path(SASL_CONF), SCRAM)
        self._set(secrets.token_hex())
        self.server.restart_libvirtd(
            auth_tls='sasl', sasl_allowed_username_list=['nova'])

    def disable(self) -> None:
        """Ask for certificates alone again, and forget the passwords."""
        self.server.path(PASSWORDS).unlink(missing_ok=True)
        for host in self.server.lab.hosts:
            host.path(AUTH_CONF).unlink(missing_ok=True)
        self.server.restart_libvirtd()

    def tell(self, client: nova_lab.Host, password: str = '') -> None:
        """Write the password, or another, where nova's libvirt looks for it.

        :param client: the host that is to get in
        """
        if not password:
            password = secrets.token_hex()
            self._set(password)
        path = client.path(AUTH_CONF)
        _write(path, AUTH.format(password=password))
        os.chown(path, 0, client.nova_gid)
        path.chmod(0o640)

    def _set(self, password: str) -> None:
        self.server.run(['saslpasswd2', '-p', '-c', '-a', 'libvirt',
                         '-f', PASSWORDS, 'nova'], input=password)


class Kerberos:
    """A realm, with tickets for nova that a libvirtd asks for.

    The realm's key distribution center runs in the host whose libvirtd it is.

    :param server: that host, called by its name: tickets are for names
    """

    def __init__(self, server: nova_lab.Host) -> None:
        self.server = server
        self.principal = 'libvirt/%s@%s' % (server.name, REALM)

    def enable(self) -> None:
        """Start the realm, and ask for its tickets."""
        for host in self.server.lab.hosts:
            _write(host.path('/etc/krb5.conf'), KRB5_CONF.format(
                realm=REALM, tickets=TICKETS, renewal=RENEWAL_KEYTAB,
                kdc=self.server.address, port=KDC_PORT))
        if not self.server.listens(KDC_PORT):
            self._start()
        _write(self.server.path(SASL_CONF), GSSAPI)
        self._make_keytab(self.principal, LIBVIRT_KEYTAB)
        # A pattern would let a realm in that this one trusts.
        self.server.restart_libvirtd(
            auth_tls='sasl', sasl_allowed_username_list=[
                'nova/' + host.name for host in self.server.lab.hosts])

    def disable(self) -> None:
        """Ask for certificates alone again, and end the realm."""
        self.server.end(self.server.running('krb5kdc'))
        self.server.restart_libvirtd()
        for host in self.server.lab.hosts:
            self.destroy_ticket(host)
            host.path(RENEWAL_KEYTAB).unlink(missing_ok=True)

    def get_ticket(self, client: nova_lab.Host, user: str = 'nova',
                   lifetime: str = '1h') -> None:
        """Get a ticket for nova of a host, as a cron job of its would do.

        :param user: the first part of the principal's name
        :param lifetime: of the ticket
        """
        principal = '%s/%s@%s' % (user, client.name, REALM)
        self._make_keytab(principal, NOVA_KEYTAB)
        keytab = self.server.path(NOVA_KEYTAB)
        target = client.path(NOVA_KEYTAB)
        keytab.rename(target)
        os.chown(target, client.nova_uid, client.nova_gid)
        client.run(['kinit', '-k', '-t', NOVA_KEYTAB, '-l', lifetime,
                    principal], user='nova')

    def renew_tickets(self, client: nova_lab.Host) -> None:
        """Let Kerberos itself get a host's next tickets when they are due."""
        client.path(NOVA_KEYTAB).rename(client.path(RENEWAL_KEYTAB))

    def destroy_ticket(self, client: nova_lab.Host) -> None:
        """Take a host's ticket away."""
        client.path(TICKETS).unlink(missing_ok=True)

    def has_ticket(self, client: nova_lab.Host) -> bool:
        """Whether nova of a host has a ticket that is still good."""
        return client.run(['klist', '-s'], user='nova',
                          check=False).returncode == 0

    def _start(self) -> None:
        _write(self.server.path('/etc/krb5kdc/kdc.conf'),
               KDC_CONF.format(realm=REALM))
        if not self.server.path('/etc/krb5kdc/principal').exists():
            self.server.run(['kdb5_util', 'create', '-s', '-r', REALM, '-P',
                             secrets.token_hex()])
        self.server.daemon(['krb5kdc', '-n'], 'krb5kdc.log')
        nova_lab.wait_for('the KDC', lambda: self.server.listens(KDC_PORT),
                          nova_lab.START_TIMEOUT)

    def _make_keytab(self, principal: str, keytab: str) -> None:
        self.server.path(keytab).unlink(missing_ok=True)
        known = self._kadmin('get_principal ' + principal, check=False)
        if 'Principal:' not in known:
            self._kadmin('add_principal -randkey ' + principal)
        self._kadmin('ktadd -k %s %s' % (keytab, principal))

    def _kadmin(self, query: str, check: bool = True) -> str:
        return self.server.run(
            ['kadmin.local', '-r', REALM, '-q', query], check=check).stdout


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
