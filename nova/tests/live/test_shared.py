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
from nova.tests.live import moves
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout


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
        self.disks = self._make('disks')
        self.volume = f'{self.uuid}_disk'
        self.instances = self._make('instances')
        self.directory = self.instances / self.uuid
        self.directory.mkdir()
        self._define(self.source, self.disks)
        for path in (self.disks / self.volume,
                     self.directory / 'disk.info'):
            path.write_bytes(os.urandom(units.Mi))
        (self.directory / 'disk.info').write_text(
            jsonutils.dumps({str(self.disks / self.volume): 'raw'}))
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

    def _check(self, uses_pool=True):
        self.here = layout.Layout(
            self.uuid, str(self.disks), str(self.directory))
        disks = [{'path': path, 'type': disk_format}
                 for path, disk_format in self.here.formats().items()]
        move = moves.new_transfer(
            self.local_uri(self.source), self.destination.name,
            self.lab.uri(self.destination), self.name, self.here,
            self.here.plan(disks), uses_pool=uses_pool)
        self.addCleanup(move.close)
        move.check()
        return move

    def assert_found(self, path):
        """All is found to be shared; nothing is made, and nothing deleted.

        :param path: of the pool on the destination
        """
        self._define(self.destination, path)
        move = self._check()
        self.assertTrue(move.there.is_shared)
        move.claim()
        move.discard()
        self.assertEqual(self.before, self._files())
        record = self.directory / 'disk.info'
        layout.write_record(
            str(record), self.here.formats() | move.formats())
        self.assertEqual(
            {f'{self.disks}/{self.volume}': 'raw',
             f'{path}/{self.volume}': 'raw'},
            jsonutils.loads(record.read_text()))
        self.assertEqual(set(self.before), set(self._files()))

    def assert_refused(self, text, **kwargs):
        error = self.assertRaises(errors.HostError, self._check, **kwargs)
        self.assertIn(text, error.reason)
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
            f'both hosts share storage pool {self.name} and not instance '
            f'directory {self.directory}')

    def test_pool_alone_with_disks_in_files(self):
        """It makes no difference whether the destination has the pool now."""
        self._mount(self._make('empty'), self.instances)
        disk = self.directory / 'disk'
        os.rename(self.disks / self.volume, disk)
        layout.write_record(
            str(self.directory / 'disk.info'), {str(disk): 'raw'})
        self.before = self._files()
        text = f'both hosts share storage pool {self.name} and not instance'
        self.assert_refused(text, uses_pool=False)
        self._define(self.destination, self.disks)
        self.assert_refused(text, uses_pool=False)
        self.assert_refused(text)
        self.connect_local(self.destination).storagePoolLookupByName(
            self.name).destroy()
        self.assert_refused(text, uses_pool=False)

    def test_instance_directory_alone(self):
        self._define(self.destination, self._make('its-own'))
        self.assert_refused(
            f'both hosts share instance directory {self.directory} and not '
            f'storage pool {self.name}')

    def test_nothing(self):
        self._mount(self._make('empty'), self.instances)
        self._define(self.destination, self._make('its-own'))
        for uses_pool in True, False:
            move = self._check(uses_pool)
            self.assertFalse(move.there.is_shared)
        self.assertEqual(self.before, self._files())
