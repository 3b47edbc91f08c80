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

from openstack import exceptions

from nova.tests.cloud import base

GIB = 1024 ** 3


class TestLife(base.CloudTestCase):
    """What else operators do with a server whose disks are in the pool."""

    def setUp(self):
        super().setUp()
        self.server = self.create_booted(flavor='small-ephemeral')
        self.boots = 1

    def assert_boots(self) -> None:
        """The guest starts once more, from the disks that it had."""
        self.boots += 1
        self.assert_counts(self.server, vda=self.boots, vdb=self.boots)
        self.assertEqual(
            [], [path.name for path in self._directory().glob('disk*')
                 if path.name != 'disk.info'])

    def _directory(self):
        return self.source.path(
            f'/var/lib/nova/instances/{self.server.id}')

    def _action(self, action: str, *args, status: str = 'ACTIVE') -> None:
        getattr(self.server.compute, action)(self.server.id, *args)
        self.server.wait(status)

    def test_stop_start_reboot_rescue_suspend(self):
        self.server.stop()
        self.server.start()
        self.assert_boots()
        self._action('reboot_server', 'HARD')
        self.assert_boots()
        self._action('suspend_server', status='SUSPENDED')
        self._action('resume_server')
        self._action('rescue_server', status='RESCUE')
        self._action('unrescue_server')
        self.assert_boots()

    def test_live_migration_is_refused(self):
        self.assertRaises(
            exceptions.BadRequestException,
            self.server.compute.live_migrate_server, self.server.id,
            host=base.DESTINATION, block_migration='auto')
        self.server.wait('ACTIVE')
        self.assertIn('Migrate it cold instead',
                      base.read_log(self.cloud, base.SOURCE))
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_no_disks(self.server, base.DESTINATION)


class TestLifeRaw(TestLife):
    """The same with disks that are no overlays."""

    options = {'DEFAULT': {'use_cow_images': 'False'}}


class TestSameHost(base.CloudTestCase):
    """A server is resized on its host, and nothing is left of it then."""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)
        self.server = self.create_booted(flavor='small-ephemeral')

    def test_revert_and_confirm(self):
        before = self.server.disks(base.SOURCE)
        self.server.resize('large-ephemeral', base.SOURCE)
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_counts(self.server, vda=2, vdb=2)
        self.assertEqual({'vda': 2 * GIB, 'vdb': 2 * GIB},
                         self.server.sizes())
        self.server.revert()
        # The second boot was from the copies, and went with them.
        self.assert_counts(self.server, vda=2, vdb=2)
        self.assertEqual({'vda': GIB, 'vdb': GIB}, self.server.sizes())
        self.assertEqual(before, self.server.disks(base.SOURCE))
        self.server.stop()
        self.server.resize('large-ephemeral', base.SOURCE)
        self.server.confirm('SHUTOFF')
        self.assertEqual(before, self.server.disks(base.SOURCE))
        self.server.start()
        self.assert_counts(self.server, vda=3, vdb=3)
        self.assert_no_disks(self.server, base.DESTINATION)
