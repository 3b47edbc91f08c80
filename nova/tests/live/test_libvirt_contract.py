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

"""libvirt behaves as its fake in the unit tests does."""

import os
import pathlib
import threading
import time

from nova.tests.live import base
from nova.tests import storage_contract

# Size of the pool's file system, in bytes.
SIZE = 96 * 1024 ** 2


class DaemonContractTestCase(
        storage_contract.StorageContract, base.LiveTestCase):
    """A pool with a file system of its own, over TLS."""

    def setUp(self) -> None:
        super().setUp()
        pool = self.make_pool(self.destination)
        self.path = f'/var/lib/nova/{pool.name()}'
        pool.destroy()
        self.destination.run(
            ['mount', '-t', 'tmpfs', '-o', f'size={SIZE},mode=755', 'tmpfs',
             self.path])
        self.addCleanup(self.destination.run, ['umount', '-l', self.path])
        pool.create()
        self.connection = self.connect(self.destination)
        self.pool = self.connection.storagePoolLookupByName(pool.name())

    def real_path(self, path: str) -> pathlib.Path:
        # The machine does not see the mount.
        return pathlib.Path(f'/proc/{self.destination.pid}/root{path}')

    def put_file(self, path: str, data: bytes) -> None:
        self.real_path(path).write_bytes(data)

    def get_file(self, path: str) -> bytes | None:
        try:
            return self.real_path(path).read_bytes()
        except FileNotFoundError:
            return None

    def fill_up(self, free: int) -> None:
        room = os.statvfs(self.real_path(self.path))
        with open(self.real_path(self.path + '/filler'), 'wb') as file:
            os.posix_fallocate(
                file.fileno(), 0, room.f_bavail * room.f_frsize - free)

    def begin_job(self) -> None:
        # qemu-img writes 50 MiB of tables, while the pool is not locked.
        pool = self.connect(self.destination).storagePoolLookupByName(
            self.pool.name())
        xml = storage_contract.VOLUME.format(
            type='file', name='tables', size=400 * 1024 ** 3, format='qcow2',
            mode='0600', owner=0, group=0)
        job = threading.Thread(target=pool.createXML, args=(
            xml, base.libvirt.VIR_STORAGE_VOL_CREATE_PREALLOC_METADATA))
        job.start()
        self.addCleanup(job.join)
        while not self.real_path(f'{self.path}/tables').exists():
            self.assertTrue(job.is_alive())
            time.sleep(0.001)
