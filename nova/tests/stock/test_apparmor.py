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

"""A pool that AppArmor knows nothing of, and what the docs say of that."""

from nova.tests.live import test_docs
from nova.tests.stock import base

PATH = '/var/lib/nova/disks'
POOL = 'elsewhere'
RULES = '/etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper'
PROFILE = '/etc/apparmor.d/usr.lib.libvirt.virt-aa-helper'
CHECK = ['/openstack/venvs/nova/bin/nova-storage-migrate', 'check']


class TestPoolElsewhere(base.StockTestCase):

    def setUp(self):
        super().setUp()
        self.addCleanup(self.source.write, base.NOVA_CONF,
                        self.source.read(base.NOVA_CONF), 0o640, 'nova')
        self.source.write(base.NOVA_CONF, base.nova_conf(
            self.source, {'libvirt': {'disks_pool': POOL,
                                      'disks_pool_path': PATH}}),
            0o640, 'nova')
        self.addCleanup(
            self.source.run_as_root,
            f'virsh pool-destroy {POOL}; virsh pool-undefine {POOL}\n'
            f'rmdir {PATH}; : > {RULES}; apparmor_parser -r {PROFILE}')

    def test_server_starts_with_the_documented_rule(self):
        compute = self.start_compute(self.source)
        error = self.assertRaises(AssertionError, self.spawn, compute)
        self.assertIn('Permission denied', str(error))
        self.assertNotEqual(
            self.denied[self.source], self.source.denials())
        # From here on there has to be no other.
        self.denied[self.source] = self.source.denials()
        self.assertIn(f'AppArmor denies virt-aa-helper the disks in {PATH}',
                      self.check())

        (_classes, commands), = (
            block for block in test_docs.read_blocks(test_docs.SWITCH_PAGE)
            if block[0] == {'apparmor'})
        self.source.run_as_root(commands)
        self.assertNotIn('AppArmor denies', self.check())
        self.spawn(compute)

    def check(self):
        """What the command says, of this host before the other."""
        return self.source.run([*CHECK, self.destination.address],
                               user='nova', check=False).stdout
