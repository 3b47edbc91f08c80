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

import os
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_utils import units

from nova import test
from nova.tests import crashing
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import overlay


@ddt.ddt
class FlattenTestCase(test.NoDBTestCase):
    """A real overlay that comes from another host, and its base image."""

    def setUp(self):
        super().setUp()
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.base = self._path('base_ephemeral_1_abcdef')
        self._write(self.base, 8 * units.Mi, {
            0: b'a' * 70000, 5 * units.Mi + 4096: b'b' * 5 * units.Mi})

    def _path(self, name):
        return os.path.join(self.directory, name)

    def _write(self, path, length, content):
        with open(path, 'wb') as file:
            file.truncate(length)
            for offset, data in content.items():
                file.seek(offset)
                file.write(data)

    def _overlay(self, length, name='disk.eph0'):
        """An overlay that names the base image of its old host."""
        path = self._path(name)
        processutils.execute(
            'qemu-img', 'create', '-f', 'qcow2', '-b', self.base, '-F', 'raw',
            path, str(length))
        processutils.execute(
            'qemu-io', '-f', 'qcow2', '-c', 'write -P 7 60k 9k', '-c',
            'write -z 8M 64k', path)
        processutils.execute(
            'qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b',
            '/elsewhere/_base/ephemeral_1_abcdef', '-F', 'raw', path)
        return path

    def _content(self, path):
        raw = self._path('raw')
        processutils.execute(
            'qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path, raw)
        with open(raw, 'rb') as file:
            return file.read()

    def _expected(self, path, length):
        """What the disk holds, as QEMU sees it with its base image."""
        processutils.execute('qemu-img', 'rebase', '-u', '-f', 'qcow2',
                             '-b', self.base, '-F', 'raw', path)
        content = self._content(path)
        self.assertEqual(length, len(content))
        return content

    @ddt.data(16 * units.Mi, 10 * units.Mi + 4096, 9 * units.Mi)
    def test_disk_holds_what_it_held(self, length):
        path = self._overlay(length)
        expected = self._expected(path, length)
        overlay.flatten(path, self.base)
        self.assertIsNone(layout.backing_file(path))
        self.assertEqual(expected, self._content(path))

    def test_holes_of_the_base_image_stay_holes(self):
        os.truncate(self.base, 64 * units.Gi)
        path = self._overlay(64 * units.Gi)
        with mock.patch.object(
                processutils, 'execute', side_effect=processutils.execute
        ) as execute:
            overlay.flatten(path, self.base)
        self.assertLess(os.stat(path).st_blocks * 512, 8 * units.Mi)
        reads, = (call.kwargs['process_input'].splitlines()
                  for call in execute.call_args_list
                  if 'process_input' in call.kwargs)
        self.assertLess(sum(int(line.split()[-1]) for line in reads),
                        6 * units.Mi)

    def test_it_goes_on_after_a_crash_anywhere(self):
        length = 16 * units.Mi
        for nth in range(4):
            path = self._overlay(length, f'disk.eph{nth}')
            expected = self._expected(path, length)
            crashed = self._crashes(nth, path)
            self.assertEqual(nth < 3, crashed)
            if crashed:
                self.assertIsNotNone(layout.backing_file(path))
            overlay.flatten(path, self.base)
            self.assertEqual(expected, self._content(path))

    def _crashes(self, nth, path):
        """Let the command of that number be the last, and half done."""
        commands = []
        execute = processutils.execute

        def run(*argv, **kwargs):
            if 'info' in argv:
                return execute(*argv, **kwargs)
            if len(commands) == nth:
                lines = kwargs.get('process_input', '').splitlines(True)
                if lines:
                    execute(*argv, process_input=''.join(lines[:1]))
                raise crashing.Crash()
            commands.append(argv)
            return execute(*argv, **kwargs)

        with mock.patch.object(processutils, 'execute', run):
            try:
                overlay.flatten(path, self.base)
            except crashing.Crash:
                return True
        return False

    def test_base_image_that_cannot_be_read(self):
        path = self._overlay(16 * units.Mi)
        error = self.assertRaises(
            errors.StorageError, overlay.flatten, path, self._path('gone'))
        self.assertIn('gone', str(error))
        self.assertIsNotNone(layout.backing_file(path))

    def test_disk_that_cannot_grow_keeps_its_base_image(self):
        path = self._overlay(16 * units.Mi)
        execute = processutils.execute

        def run(*argv, **kwargs):
            if argv[0] == 'qemu-io':
                kwargs['process_input'] += 'read -q 1T 4k\n'
            return execute(*argv, **kwargs)

        with mock.patch.object(processutils, 'execute', run):
            error = self.assertRaises(
                errors.StorageError, overlay.flatten, path, self.base)
        self.assertIn(path, str(error))
        self.assertLess(len(str(error)), errors.MESSAGE_LENGTH)
        self.assertEqual(self.base, layout.backing_file(path))
