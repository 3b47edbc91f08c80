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


import os
import pwd
import shutil
import sys
from unittest import mock
import uuid

import libvirt
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.tests.live import moves
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt import utils as libvirt_utils

from tools import daemons

INSTANCES = '/var/lib/nova/instances'
VTPM = '/var/lib/libvirt/swtpm'
SECRET = """\
<secret ephemeral='yes' private='yes'>
  <uuid>{secret}</uuid>
  <usage type='vtpm'><name>{uuid}</name></usage>
</secret>
"""
DOMAIN = """\
<domain type='qemu'>
  <name>vtpm-{uuid}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <tpm model='tpm-tis'>
      <backend type='emulator' version='2.0'>
        <encryption secret='{secret}'/>
      </backend>
    </tpm>
  </devices>
</domain>
"""
# What Nova does at the destination, as the root that it becomes for that.
RESTORE = """\
import sys
import nova.privsep
from nova.virt.libvirt import utils
nova.privsep.sys_admin_pctxt.set_client_mode(False)
utils.restore_vtpm_dir(sys.argv[1])
"""
# Does this driver's part on one host, as nova-compute does it: under eventlet,
# with another process that is root. Off the hub, that would never answer.
HERE = """\
import os
os.environ['OS_NOVA_DISABLE_EVENTLET_PATCHING'] = 'false'
import eventlet
eventlet.monkey_patch()
import sys
from oslo_privsep import priv_context
import nova.conf
import nova.privsep
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import vtpm
nova.conf.CONF([], project='nova')
nova.privsep.sys_admin_pctxt.start(priv_context.Method.FORK)
getattr(vtpm, sys.argv[1])(layout.Layout(sys.argv[2], '/nowhere', sys.argv[3]))
"""


class VtpmTestCase(base.LiveTestCase):
    """The state that a real emulator made moves to where another uses it."""

    USES_POOL = False

    def pool_name(self):
        return f'nova-{self.uuid}'

    def setUp(self):
        super().setUp()
        self.uuid = uuidutils.generate_uuid()
        self.secret = str(uuid.UUID(int=uuid.UUID(self.uuid).int ^ 1))
        self.directory = f'{INSTANCES}/{self.uuid}'
        self.state = f'{VTPM}/{self.uuid}'
        for host in (self.source, self.destination):
            for path in (self.directory, f'{self.directory}_resize',
                         self.state):
                self.addCleanup(shutil.rmtree, host.path(path),
                                ignore_errors=True)

    def define(self, host, passphrase):
        """Define the server, and what its vTPM is encrypted with."""
        connection = self.connect_local(host)
        values = {'uuid': self.uuid, 'secret': self.secret}
        secret = connection.secretDefineXML(SECRET.format(**values))
        self.addCleanup(secret.undefine)
        secret.setValue(passphrase)
        domain = connection.defineXML(DOMAIN.format(**values))
        self.addCleanup(self._undefine, domain)
        return domain, secret

    def _undefine(self, domain):
        if domain.isActive():
            domain.destroy()
        domain.undefine()

    def files(self, host, top):
        """Checksum, owner and mode of what is in a directory, by path."""
        top = host.path(top)
        return {
            str(path.relative_to(top)): (
                self.sha256(path) if path.is_file() else '',
                path.stat().st_uid, path.stat().st_mode)
            for path in top.rglob('*')}

    def migrate(self):
        """Move all that there is, the state of the vTPM."""
        here = layout.Layout(
            self.uuid, '/nowhere', str(self.source.path(self.directory)))
        # The path of the state is one of its host's, which this process is
        # not on.
        is_there = (mock.patch.object(libvirt_utils, 'VTPM_DIR', VTPM),
                    mock.patch.object(os.path, 'exists', return_value=True))
        with is_there[0], is_there[1]:
            move = moves.new_transfer(
                self.local_uri(self.source), self.destination.name,
                self.lab.uri(self.destination), self.pool_name(), here, [],
                self.directory, uses_pool=self.USES_POOL)
        self.addCleanup(move.close)
        moves.start(move)
        with is_there[0], is_there[1]:
            move.run()
        return move

    def restore(self, host):
        """Do Nova's part at the end of a migration."""
        host.run([sys.executable, '-W', 'ignore', '-c', RESTORE,
                  f'{self.directory}/{layout.VTPM}/{self.uuid}'])

    def test_emulator_goes_on_with_the_state_on_the_other_host(self):
        os.makedirs(self.source.path(self.directory))
        domain, _secret = self.define(self.source, b'of the server')
        domain.create()
        domain.destroy()
        before = self.files(self.source, self.state)
        self.assertIn('tpm2/tpm2-00.permall', before)
        self.pool_name()
        pools = [self.pools(host) for host in self.lab.hosts]

        move = self.migrate()
        came = self.files(self.destination,
                          f'{self.directory}/{layout.VTPM}/{self.uuid}')
        self.assertEqual(
            {path: (checksum, self.destination.nova_uid, mode)
             for path, (checksum, _owner, mode) in before.items()}, came)
        move.close()
        self.assertEqual(pools, [self.pools(host) for host in self.lab.hosts])
        self.assertEqual(before, self.files(self.source, self.state))

        self.restore(self.destination)
        # Nova lets root have them where it moves them between file systems,
        # and libvirt then gives them to the emulator as that starts.
        self.assertEqual(
            {path: (checksum, mode)
             for path, (checksum, _owner, mode) in before.items()},
            {path: (checksum, mode) for path, (checksum, _owner, mode)
             in self.files(self.destination, self.state).items()})
        # It is encrypted: what starts with this secret is this vTPM.
        domain, secret = self.define(self.destination, b'of another one')
        self.assertRaises(libvirt.libvirtError, domain.create)
        daemons.wait_for('the end of the emulator', lambda: (
            not self.destination.running('swtpm')), poll=0.1)
        secret.setValue(b'of the server')
        domain.create()
        self.assertTrue(domain.isActive())
        owners = {owner for _checksum, owner, _mode in self.files(
            self.destination, self.state).values()}
        self.assertEqual({pwd.getpwnam('tss').pw_uid}, owners)

    def test_failed_migration_leaves_nothing(self):
        os.makedirs(self.source.path(self.directory))
        domain, _secret = self.define(self.source, b'of the server')
        domain.create()
        self.pool_name()
        pools = self.pools(self.destination)
        move = self.migrate()
        self.assertTrue(self.destination.path(self.directory).exists())
        move.discard()
        self.assertFalse(self.destination.path(self.directory).exists())
        self.assertEqual(pools, self.pools(self.destination))

    def assert_goes_on(self, domain, secret):
        """The emulator starts with what the server's secret is for."""
        secret.setValue(b'of another one')
        self.assertRaises(libvirt.libvirtError, domain.create)
        daemons.wait_for('the end of the emulator', lambda: (
            not self.source.running('swtpm')), poll=0.1)
        secret.setValue(b'of the server')
        domain.create()
        domain.destroy()

    def test_emulator_goes_on_with_the_state_after_a_resize_here(self):
        kept = f'{self.directory}_resize'
        for directory in self.directory, kept:
            os.makedirs(self.source.path(directory))
        domain, secret = self.define(self.source, b'of the server')
        domain.create()
        domain.destroy()
        before = self.files(self.source, self.state)

        def contents(top):
            return {path: (checksum, mode) for path, (checksum, _owner, mode)
                    in self.files(self.source, top).items()}

        original = contents(self.state)
        self.here('keep')
        self.assertFalse(self.source.path(self.state).exists())
        self.assertEqual(
            original, contents(f'{kept}/{layout.VTPM}/{self.uuid}'))
        self.restore(self.source)
        self.assert_goes_on(domain, secret)

        # Nova's libvirt keeps this state in a revert.
        state = self.source.path(f'{self.state}/tpm2/tpm2-00.permall')
        state.write_bytes(b'changed since')
        shutil.rmtree(self.source.path(self.directory))
        self.source.path(kept).rename(self.source.path(self.directory))
        self.here('put_back')
        self.assertEqual(original, contents(self.state))
        self.assert_goes_on(domain, secret)
        self.assertEqual(
            {owner for _checksum, owner, _mode in before.values()},
            {owner for _checksum, owner, _mode
             in self.files(self.source, self.state).values()})

    def here(self, function):
        """Call a function of this driver for the vTPM on the source host."""
        self.source.run(['timeout', '60', sys.executable, '-W', 'ignore', '-c',
                         HERE, function, self.uuid, self.directory])

    def pools(self, host):
        return {pool.name()
                for pool in self.connect(host).listAllStoragePools()}


class VtpmAndPoolTestCase(VtpmTestCase):
    """The same where the disks are in a storage pool."""

    USES_POOL = True

    def pool_name(self):
        name = f'test-{self.uuid}'
        if name not in self.pools(self.source):
            for host in (self.source, self.destination):
                self.make_pool(host, name)
        return name
