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

"""The fake of libvirt's storage API behaves as libvirt does."""

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.tests import storage_contract


class FakeMixin:
    """The host of the tests is the fake."""

    def setUp(self) -> None:
        super().setUp()
        self.host = libvirt_storage.FakeHost()
        self.connection = self.host.connect()

    def put_file(self, path: str, data: bytes) -> None:
        self.host.add_file(path, data)

    def get_file(self, path: str) -> bytes | None:
        if path not in self.host.files:
            return None
        content = self.host.files[path].content
        return content.read(0, content.size)

    def fill_up(self, free: int) -> None:
        self.host.used = self.host.capacity - free

    def begin_job(self) -> None:
        self.host.pools['disks'].async_jobs = 2


class FakeContractTestCase(
        FakeMixin, storage_contract.StorageContract, test.NoDBTestCase):
    """The same tests run on real daemons in nova/tests/live."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.host.add_pool().path
        self.pool = self.connection.storagePoolLookupByName('disks')


class FakeLogicalContractTestCase(
        FakeMixin, storage_contract.LogicalContract, test.NoDBTestCase):
    """The same tests run on a real daemon in nova/tests/stock."""

    def setUp(self) -> None:
        super().setUp()
        self.group = 'disks'
        self.host.add_group(self.group)
        self.pool = self.connection.storagePoolCreateXML(
            storage_contract.LOGICAL_POOL.format(
                name='pool', group=self.group))
