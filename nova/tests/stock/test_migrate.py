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

"""Servers on hosts as Debian ships them."""

import os

from oslo_utils import units

from nova.tests.stock import base

FILL = '/var/lib/libvirt/images/fill'


class TestStockHosts(base.StockTestCase):
    """From one stock host to the other."""

    def test_hosts_are_what_they_are_taken_for(self):
        for each in self.machines:
            said = each.run_as_root(
                'cat /sys/module/apparmor/parameters/enabled\n'
                'aa-status --enforced\n'
                'systemctl is-active libvirtd-tls.socket\n'
                'dmsetup version | head -1\nvirsh version\nuname -r\n'
                '/openstack/venvs/nova/bin/python --version\n')
            enabled, enforced, socket = said.splitlines()[:3]
            self.assertEqual('Y', enabled)
            self.assertGreater(int(enforced), 1)
            self.assertEqual('active', socket)
            for what in 'libvirt 11.3', 'QEMU 10.', '+deb13', 'Python 3.13':
                self.assertIn(what, said)
            self.assertIn('Library version', said)

    def test_server_goes_there_and_back(self):
        here, there = base.get_computes()
        uuid = self.spawn(here)
        image = self.disk_image(self.source, uuid)
        self.assertEqual('qcow2', image['format'])
        self.assertIn('/_base/', image['full-backing-filename'])
        self.assert_confined(self.source, uuid)

        self.migrate(uuid, here, there)
        self.assert_confined(self.destination, uuid)
        self.assertNotEqual([], self.files(self.source, uuid))
        here.call('confirm', uuid=uuid)
        self.assertEqual([], self.files(self.source, uuid))

        self.migrate(uuid, there, here)
        here.call('destroy', uuid=uuid)
        self.assertEqual('running', there.call('finish_revert', uuid=uuid))
        self.assertEqual([], self.files(self.source, uuid))
        self.assert_confined(self.destination, uuid)

    def assert_confined(self, of, uuid):
        """The guest runs under the profile that libvirt made for it."""
        said = of.run_as_root(
            'cat /proc/$(cat /run/libvirt/qemu/instance-*.pid)/attr/current')
        self.assertEqual(f'libvirt-{uuid} (enforce)', said.strip())

    def test_restart_of_libvirtd_with_a_server(self):
        here, there = base.get_computes()
        uuid = self.spawn(here)
        for each in self.machines:
            each.run_as_root('systemctl restart libvirtd.service')
        self.assertEqual('running', here.call('state', uuid=uuid))
        pools = self.source.run(['virsh', 'pool-list', '--name']).stdout
        self.assertIn(base.POOL, pools.split())
        self.migrate(uuid, here, there)
        here.call('confirm', uuid=uuid)

    def test_check_command(self):
        # They make the pools.
        base.get_computes()
        said = self.source.run(
            ['/openstack/venvs/nova/bin/nova-storage-migrate', 'check',
             self.destination.address], user='nova', check=False)
        self.assertEqual(0, said.returncode, said.stdout + said.stderr)
        self.assertNotIn('fail', said.stdout)


class TestFull(base.StockTestCase):
    """The file system of the destination fills up.

    The upload ends libvirtd there, of this release; guests do not notice.
    """

    def test_server_runs_on(self):
        here, there = base.get_computes()
        uuid = self.spawn(here)
        here.call('stop', uuid=uuid)
        disk = self.disk_path(self.source, uuid)
        self.source.run_as_root(
            f"qemu-io -f qcow2 -c 'write -q -P 7 512M 256M' {disk}")
        here.call('start', uuid=uuid)
        self.fill_up(disk, left=32 * units.Mi)

        error = self.assertRaises(
            AssertionError, self.migrate, uuid, here, there)

        self.assertRegex(str(error), 'bytes available|No space left')
        self.assertEqual('running', here.call('state', uuid=uuid))
        self.assertEqual('running', self.destination.run_as_root(
            'systemctl show -P SubState libvirtd.service').strip())
        self.destination.run_as_root(f'rm {FILL}')
        self.migrate(uuid, here, there)
        here.call('confirm', uuid=uuid)
        self.assertEqual([], self.files(self.source, uuid))

    def fill_up(self, path, left):
        """Fill the destination's file system when a disk has begun to come.

        :param left: bytes that are left
        """
        self.addCleanup(self.destination.run_as_root, f'rm -f {FILL}')
        self.destination.run_as_root(
            f'( until [ -e {path} ]; do sleep 0.1; done\n'
            f'free=$(($(stat -f -c "%f * %S" {os.path.dirname(path)})))\n'
            f'fallocate -l $((free - {left})) {FILL}\n'
            ') > /dev/null 2>&1 &')
