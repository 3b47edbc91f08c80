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

"""A host with Debian 12's libvirt, and one with Debian 13's."""

import os

from nova.tests.live import test_docs
from nova.tests.stock import base

from tools.lab import host
from tools import processes


class TestMixed(base.StockTestCase):
    """From a host out of namespaces to a stock host, and back."""

    def setUp(self):
        super().setUp()
        self.older = self.lab.hosts[0]
        self.admit(self.older)
        self.configure(self.older)

    def admit(self, of):
        """Give a host certificates of the authority of the stock hosts."""
        home = self.machines[0].directory / 'home'
        authority = home / 'libvirt-ca'
        (authority / 'hosts').write_text(f'{of.name} {of.address}\n')
        blocks = test_docs.read_blocks(test_docs.PAGE)
        # As the page says for a new host: the last block, with it alone.
        make = [commands for classes, commands in blocks
                if classes == {'on-ca'}][2]
        processes.execute('sh', '-eu', '-c', make, cwd='/', env={
            'HOME': str(home), 'PATH': host.PATH})
        self.addCleanup(self.restore, of)
        for path, names in (
                ('CA', ['cacert.pem']),
                ('libvirt', ['servercert.pem', 'clientcert.pem']),
                ('libvirt/private', ['serverkey.pem', 'clientkey.pem'])):
            for name in names:
                target = of.path('/etc/pki') / path / name
                target.write_bytes((authority / of.name / name).read_bytes())
        os.chown(of.path('/etc/pki/libvirt/private/clientkey.pem'), 0,
                 of.nova_gid)
        of.path('/etc/pki/libvirt/private/clientkey.pem').chmod(0o640)
        of.restart_libvirtd(tls_allowed_dn_list=['O=Compute hosts,CN=*'])

    def restore(self, of):
        """Give a host its own certificates back."""
        of.path('/etc/pki/CA/cacert.pem').write_bytes(
            self.lab.authority.certificate.read_bytes())
        for side in 'server', 'client':
            of.set_certificate(side)
        of.restart_libvirtd()

    def test_server_goes_there_and_back(self):
        said = self.older.run(['virsh', 'version']).stdout
        self.assertIn('libvirt 9.0.0', said)
        older = self.start_compute(self.older)
        newer = base.get_computes()[0]
        uuid = self.spawn(older)
        self.migrate(uuid, older, newer)
        older.call('confirm', uuid=uuid)
        self.assertEqual([], self.files(self.older, uuid))
        self.migrate(uuid, newer, older)
        newer.call('confirm', uuid=uuid)
        self.assertEqual([], self.files(self.machines[0], uuid))
