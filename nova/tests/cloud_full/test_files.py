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

"""The life of a server whose disks are in its instance directory."""

from oslo_utils import units

from nova.tests.cloud import base
from nova.tests.cloud import test_legacy
from nova.tests.cloud_full import test_life

from tools import servers

OPTIONS = test_legacy.DirectoryTestCase.options


class FilesMixin:
    """Disks in the instance directory, with a driver that knows of pools."""

    options = OPTIONS

    def assert_in_place(self):
        """The disks are in the instance directory, and none in the pool."""
        directory = self.cloud.lab.host(self.server.host).path(
            f'{servers.INSTANCES}/{self.server.id}')
        self.assertEqual({directory}, {
            path.parent
            for path in self.server.disks(self.server.host).values()})


class TestLifeFile(FilesMixin, test_life.LiveMixin, test_life.LifeMixin,
                   test_life.LifeTestCase):
    """The operations of an operator on such a server."""

    options = base.cloud.config.merge(
        FilesMixin.options, test_life.LiveMixin.options)
    # Nova's own code leaves it as it is.
    larger_sizes = {'vda': 2 * units.Gi, 'vdb': units.Gi}


class TestEveryDiskFile(FilesMixin, test_life.TestEveryDisk):
    """A server with every kind of disk, and a kernel beside them."""
