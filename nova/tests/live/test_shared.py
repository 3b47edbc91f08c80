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
import pathlib
import shutil

from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import transfer


class SharedTestCase(base.LiveTestCase):
    """Two hosts that mount the same storage, each in its own way.

    What is outside the directories that a lab host has of its own, as these
    are, both hosts see under the same path.
    """

    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.lab.directory) / 'shared'
        self.root.mkdir()
        self.addCleanup(shutil.rmtree, self.root)
        self.name = f'test-{uuidutils.generate_uuid()}'
        self.uuid = uuidutils.generate_uuid()
        self.disk = transfer.Disk(f'{self.uuid}_disk', 'raw')
        self.disks = self._make('disks')
        self.instances = self._make('instances')
        self.directory = self.instances / self.uuid
        self.directory.mkdir()
        self._define(self.source, self.disks)
        for path in (self.disks / self.disk.volume,
                     self.directory / 'disk.info'):
            path.write_bytes(os.urandom(units.Mi))
        (self.directory / 'disk.info').write_text(
            jsonutils.dumps({str(self.disks / self.disk.volume): 'raw'}))
        self.before = self._files()

    def _make(self, name):
        path = self.root / name
        path.mkdir()
        return path

    def _define(self, host, path):
        pool = self.connect_local(host).storagePoolDefineXML(base.POOL.format(
            name=self.name, path=path, uid=host.nova_uid, gid=host.nova_gid))
        self.addCleanup(self._remove_pool, host, self.name)
        pool.create()

    def _mount(self, what, where):
        """Mount a directory on the destination alone."""
        self.destination.run(['mount', '--bind', str(what), str(where)])
        self.addCleanup(self.destination.run, ['umount', str(where)])

    def _files(self):
        return {path: path.read_bytes()
                for path in self.root.rglob('*') if path.is_file()}

    def _check(self):
        destination = peer.Destination(
            self.destination.name, self.lab.uri(self.destination), self.name,
            self.uuid, str(self.directory))
        move = transfer.Transfer(
            'qemu+unix:///system?socket=%s' % self.source.path(
                '/run/libvirt/libvirt-sock'),
            destination, self.name, str(self.directory))
        self.addCleanup(move.close)
        move.check([self.disk])
        return move

    def assert_found(self, path):
        """All is found to be shared; nothing is made, and nothing deleted.

        :param path: of the pool on the destination
        """
        self._define(self.destination, path)
        move = self._check()
        self.assertTrue(move.destination.is_shared)
        move.destination.claim()
        move.destination.discard()
        self.assertEqual(self.before, self._files())
        move.record_disks([self.disk])
        record = self.directory / 'disk.info'
        self.assertEqual(
            {f'{self.disks}/{self.disk.volume}': 'raw',
             f'{path}/{self.disk.volume}': 'raw'},
            jsonutils.loads(record.read_text()))
        self.assertEqual(set(self.before), set(self._files()))

    def assert_refused(self, text):
        error = self.assertRaises(peer.Unsuitable, self._check)
        self.assertIn(text, str(error))
        self.assertEqual(self.before, self._files())

    def test_same_path(self):
        self.assert_found(self.disks)

    def test_another_path(self):
        self._mount(self.disks, self._make('mounted'))
        self.assert_found(self.root / 'mounted')

    def test_symbolic_link(self):
        link = self.root / 'link'
        link.symlink_to(self.disks)
        self.assert_found(link)

    def test_pool_alone(self):
        self._mount(self._make('empty'), self.instances)
        self._define(self.destination, self.disks)
        self.assert_refused(
            f'storage pool {self.name} is on storage that both hosts share, '
            f'and instance directory {self.directory} is not')

    def test_instance_directory_alone(self):
        self._define(self.destination, self._make('its-own'))
        self.assert_refused(
            f'instance directory {self.directory} is on storage that both '
            f'hosts share, and storage pool {self.name} is not')

    def test_nothing(self):
        self._mount(self._make('empty'), self.instances)
        self._define(self.destination, self._make('its-own'))
        move = self._check()
        self.assertFalse(move.destination.is_shared)
        self.assertEqual(self.before, self._files())
