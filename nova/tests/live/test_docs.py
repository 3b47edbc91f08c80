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
"""The page that sets up libvirt connections, followed word by word."""

import os
import shutil
import subprocess
import sys

from docutils import core
from docutils import nodes
from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils

from nova.tests.live import base

lab = base.nova_lab

PAGE = base.ROOT / 'doc/source/admin/remote-libvirt.rst'

# What the page calls the hosts and their addresses.
EXAMPLES = (('compute1', '192.0.2.11'), ('compute2', '192.0.2.12'))


def read_blocks(page):
    """The code blocks of a page: (classes, commands) of each, in order."""
    # docutils does not know the roles of Sphinx, and need not.
    tree = core.publish_doctree(
        page.read_text(), settings_overrides={'report_level': 5})
    return [(set(block['classes']) - {'code', 'shell'}, block.astext())
            for block in tree.findall(nodes.literal_block)
            if 'shell' in block['classes']]


class TestRemoteLibvirtPage(base.LiveTestCase):
    """On two hosts of their own, which have no certificates."""

    def setUp(self):
        super().setUp()
        self.fresh = lab.Lab(base.DIRECTORY + '-docs',
                             subnet=(base.SUBNET + 2) % 256)
        self.addCleanup(self.fresh.down)
        self.fresh.up()
        self.source, self.destination = self.hosts = self.fresh.hosts
        for host in self.hosts:
            self.make_fresh(host)
        self.home = self.fresh.directory / 'home'
        self.home.mkdir()

    def make_fresh(self, host):
        """Take away what the lab does of what the page does."""
        host.stop_libvirtd()
        shutil.rmtree(host.path('/etc/pki'))
        conf = host.path('/etc/libvirt/libvirtd.conf')
        lines = [line for line in conf.read_text().splitlines(True)
                 if not line.startswith('tls_')]
        conf.write_text(''.join(lines))

    def test_page_connects_hosts(self):
        done = {'on-ca': self.on_ca, 'on-each-host': self.on_each_host,
                'on-first-host': self.on_first_host}
        left_out = []
        for classes, commands in read_blocks(PAGE):
            if classes == {'with-systemd'}:
                left_out.append(commands.splitlines()[-1])
            elif classes == {'on-ca', 'fails'}:
                error = self.assertRaises(
                    lab.LabError, self.on_ca, commands)
                self.assertIn('cert', str(error))
            else:
                place, = classes
                done[place](commands)
        # The hosts have no systemd; the page says what to do there too.
        self.assertEqual(['systemctl start libvirtd.service',
                          'systemctl enable --now virtproxyd-tls.socket'],
                         left_out)
        self.assert_stranger_is_refused()
        self.assert_disk_goes_over()

    def on_ca(self, commands):
        home = self.home / 'ca'
        home.mkdir(exist_ok=True)
        return self.execute([], commands, home)

    def on_each_host(self, commands):
        for host in self.hosts:
            self.bring_certificates(host)
            self.execute(host.enter, commands, self.home / host.name)

    def on_first_host(self, commands):
        done = self.execute(
            self.source.enter, commands, self.home / self.source.name)
        self.assertEqual(self.destination.name, done.stdout.strip())

    def bring_certificates(self, host):
        """The step that the page leaves to the operator."""
        home = self.home / host.name
        if not home.exists():
            home.mkdir()
            shutil.copy(
                self.home / f'ca/libvirt-ca/{host.name}.tar', home)

    def execute(self, enter, commands, home):
        for host, (name, address) in zip(self.hosts, EXAMPLES, strict=True):
            commands = commands.replace(address, host.address)
            commands = commands.replace(name, host.name)
        return lab.execute(
            *enter, 'sh', '-eu', '-c', commands, stdin=subprocess.DEVNULL,
            env={'HOME': str(home), 'PATH': lab.PATH}, cwd='/')

    def assert_stranger_is_refused(self):
        """A certificate of the same CA lets in if its name is in the list."""
        ca = self.home / 'ca/libvirt-ca'
        files = ('cacert.pem', 'clientcert.pem', 'clientkey.pem')
        pki = self.home / 'pki'
        pki.mkdir()
        for file in files:
            shutil.copy(ca / self.source.name / file, pki)
        uri = f'{self.destination.uri}?pkipath={pki}'
        self._open(uri).close()

        template = ca / self.source.name / 'client.info'
        text = template.read_text()
        template.write_text(text.replace('Compute hosts', 'Somebody else'))
        lab.execute(
            'certtool', '--generate-certificate', '--template', template,
            '--load-privkey', pki / 'clientkey.pem',
            '--load-ca-certificate', ca / 'cacert.pem',
            '--load-ca-privkey', ca / 'cakey.pem',
            '--outfile', pki / 'clientcert.pem')
        self.assertNotEqual(text, template.read_text())
        self.assertRaises(base.libvirt.libvirtError, self._open, uri)

    def assert_disk_goes_over(self):
        uuid = uuidutils.generate_uuid()
        name = 'docs'
        for host in self.hosts:
            self.make_pool(host, name)
        path = f'/var/lib/nova/{name}/{uuid}_disk'
        disk = self.make_disk(
            self.source, path, 64 * units.Mi, [(0, 8 * units.Mi)])
        arguments = jsonutils.dumps({
            'source_uri': 'qemu:///system',
            'destination_uri': self.destination.uri, 'pool': name,
            'uuid': uuid, 'directory': f'/var/lib/nova/instances/{uuid}'})
        done = lab.execute(
            *self.source.enter, sys.executable, '-W', 'ignore', '-m',
            'nova.tests.live.copier', input=arguments + '\n', env=os.environ)
        result = jsonutils.loads(done.stdout.splitlines()[-1])['result']
        self.assertEqual(64 * units.Mi, result['length'])
        self.assertEqual(
            self.sha256(disk), self.sha256(self.destination.path(path)))
