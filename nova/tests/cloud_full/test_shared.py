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

"""Both hosts have the same storage for pool and instance directories."""

import os
import pathlib
import shutil

from nova.tests.cloud import base
from nova.tests.cloud_full import test_life
from nova.tests.live import base as live

from tools import servers

# Outside of what a host of the lab has of its own.
ROOT = pathlib.Path(live.DIRECTORY) / 'shared'
# Which files on a host belong to nova, besides those that are shared.
OF_NOVA = ('/var/lib/nova', '/etc/nova', '/etc/pki')


class TestShared(test_life.LifeTestCase):
    """Nothing is copied, and nothing deleted that is still needed."""

    options = {'DEFAULT': {'instances_path': ROOT / 'instances'},
               'libvirt': {'disks_pool_path': ROOT / 'disks'}}
    # The destination has another path to the same pool.
    host_options = {base.DESTINATION: {
        'libvirt': {'disks_pool_path': ROOT / 'link'}}}

    def _set_options(self):
        # In the end the hosts have their pools again.
        self.addCleanup(self.cloud.restart_computes, base.cloud.STREAMS)
        self.cloud.stop_computes()
        self.addCleanup(shutil.rmtree, ROOT)
        for name in ('', 'instances', 'disks'):
            (ROOT / name).mkdir()
            os.chown(ROOT / name, self.source.nova_uid, self.source.nova_gid)
        (ROOT / 'link').symlink_to(ROOT / 'disks')
        self._share_uid()
        self.addCleanup(self.forget_pools, *self.cloud.lab.hosts)
        self.forget_pools(*self.cloud.lab.hosts)
        self.addCleanup(self.cloud.stop_computes)
        super()._set_options()

    def _share_uid(self) -> None:
        """Give nova on the destination the numbers that it has here.

        They differ in the lab, and would not on hosts that share storage.
        """
        before = self.destination.nova_uid
        self.addCleanup(self._set_uid, before)
        self._set_uid(self.source.nova_uid)

    def _set_uid(self, new: int) -> None:
        host = self.destination
        old = host.nova_uid
        host.run(['sed', '-i', f'/^nova:/s/:{old}:/:{new}:/g; '
                               f'/^nova:/s/:{old}:/:{new}:/g',
                  '/etc/passwd', '/etc/group'])
        for owner in ('{}', ':{}'):
            host.run(['chown', '-R', '--no-dereference',
                      '--from=' + owner.format(old), owner.format(new),
                      *OF_NOVA])
        host.nova_uid = host.nova_gid = new

    def assert_hosts_are_empty(self):
        super().assert_hosts_are_empty()
        self.assertEqual({}, self._disks())
        self.assertEqual(set(), set(os.listdir(ROOT / 'instances')) -
                         servers.NOT_OF_SERVERS)

    def assert_in_place(self):
        """The disks are the files that they have been from the start."""
        self.assertEqual(self.disks, self._disks())

    def _disks(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino
                for path in (ROOT / 'disks').iterdir()
                if path.name != servers.RESERVED}

    def test_migrate_confirm_revert_evacuate(self):
        self.disks = self._disks()
        self.assertEqual({f'{self.server.id}_disk',
                          f'{self.server.id}_disk.eph0'}, set(self.disks))
        self.server.migrate(base.DESTINATION)
        self.assertEqual(base.DESTINATION, self.server.host)
        self.assert_boots()
        self.server.confirm()
        self.act('reboot_server', 'HARD')
        self.assert_boots()

        self.server.migrate(base.SOURCE)
        self.assert_boots()
        self.server.revert()
        self.assertEqual(base.DESTINATION, self.server.host)
        # What the guest did on the other host was on the same disks.
        self.assert_boots()

        self.server.migrate(base.SOURCE)
        self.server.confirm()
        self.assert_boots()
        with self.evacuated():
            self.assert_in_place()
        self.server.start()
        self.assert_boots()
