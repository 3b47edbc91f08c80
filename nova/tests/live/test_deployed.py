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

"""What the check says of hosts as some deployment tools leave them.

Only what the tool's own files say is made here, on hosts of the lab. The
pages doc/source/admin/deploy-*.rst name those files.
"""

from nova.tests.live import pages
from nova.tests.live import test_check


class DeployedTestCase(pages.PageMixin, test_check.CheckTestCase):

    def setUp(self):
        super().setUp()
        self._make_pool()

    def assert_check(self, name, expected):
        """Run the check; it ends with a status, and is shown by a page."""
        status, out = self._check()
        self.assertEqual(expected, status, out)
        self.assert_page(name, out)

    def test_hosts_with_certificates(self):
        self.assert_check('good', 0)

    def test_charms_do_not_listen(self):
        self.addCleanup(self.destination.start_libvirtd)
        self.destination.stop_libvirtd()
        self.assert_check('charms-before', 1)

    def test_charms_with_live_migration(self):
        self.addCleanup(self.lab.ssh, False)
        self.lab.ssh(True)
        self._configure('qemu+ssh://%s/system')
        self.assert_check('charms-ssh', 0)
