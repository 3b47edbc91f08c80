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

import concurrent.futures
import os
import shutil
import subprocess
import tempfile

from oslo_utils import units
from oslo_utils import uuidutils

from nova.tests.live import base
from nova.tests.live import moves
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import pool
from nova.virt.libvirt.storage import site

INSTANCES = '/var/lib/nova/instances'
# How Nova's own driver copies the files of a server.
COPY = """\
import sys
import nova.conf
from nova.virt.libvirt import utils
from nova.virt.libvirt.volume import remotefs
transport, host, directory, *names = sys.argv[1:]
nova.conf.CONF.set_override(
    'remote_filesystem_transport', transport, group='libvirt')
remotefs.RemoteFilesystem().create_dir(host, directory)
for name in names:
    path = directory + '/' + name
    utils.copy_image(path, path, host=host)
"""


class DirectoryTestCase(base.LiveTestCase):
    """An instance directory on its way between two real libvirt daemons."""

    def setUp(self):
        super().setUp()
        self.uuid = uuidutils.generate_uuid()
        self.directory = f'{INSTANCES}/{self.uuid}'
        for host in (self.source, self.destination):
            self.addCleanup(shutil.rmtree, host.path(self.directory),
                            ignore_errors=True)
        os.makedirs(self.source.path(self.directory))
        # This process is on neither host, and its path of the directory is
        # not the one that the source's libvirtd knows.
        self.local = self.source.path(self.directory)

    def _add_files(self):
        self.make_disk(self.source, f'{self.directory}/base', 8 * units.Mi,
                       [(0, units.Mi)])
        disk = self.local / 'disk'
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw', '-b',
             self.local / 'base', disk, '1G'], check=True)
        subprocess.run(
            ['qemu-io', '-f', 'qcow2', '-c', 'write -P 7 5M 3M', disk],
            check=True, stdout=subprocess.DEVNULL)
        self.make_disk(self.source, f'{self.directory}/disk.eph0',
                       64 * units.Mi, [(32 * units.Mi, 4096)])
        for name in ('kernel', 'ramdisk'):
            (self.local / name).write_text(f'a {name}')
        formats = {'disk': 'qcow2', 'disk.eph0': 'raw'}
        layout.write_record(str(self.local / 'disk.info'), {
            str(self.local / name): disk_format
            for name, disk_format in formats.items()})
        return self._layout().plan([
            {'path': str(self.local / name), 'type': disk_format}
            for name, disk_format in formats.items()])

    def _layout(self):
        return layout.Layout(self.uuid, '/nowhere', str(self.local))

    def _transfer(self, files=()):
        move = moves.new_transfer(
            self.local_uri(self.source), self.destination.name,
            self.lab.uri(self.destination), 'none', self._layout(),
            list(files), self.directory, uses_pool=False)
        self.addCleanup(move.close)
        return move

    def _start(self):
        move = self._transfer(self._add_files())
        moves.start(move)
        return move

    def _pools(self, host):
        return {pool.name()
                for pool in self.connect(host).listAllStoragePools()}

    def _migrate(self):
        move = self._start()
        move.run()
        move.close()

    def _arrived(self):
        """Owner, group, mode and checksum of the directory and its files."""
        there = self.destination.path(self.directory)
        return {
            path.name: (path.stat().st_uid, path.stat().st_gid,
                        path.stat().st_mode,
                        self.sha256(path) if path.is_file() else '')
            for path in (there, *there.iterdir())
            if path.name != layout.RECORD}

    def test_files_are_as_nova_s_own_transports_make_them(self):
        self._migrate()
        ours = self._arrived()
        self.assertEqual({self.uuid, 'disk', 'disk.eph0', 'kernel',
                          'ramdisk'}, set(ours))
        self.addCleanup(self.lab.ssh, False)
        self.lab.ssh(True)
        for transport in ('ssh', 'rsync'):
            shutil.rmtree(self.destination.path(self.directory))
            self.source.run(base.python_as_nova(
                self.source, '-c', COPY, transport, self.destination.name,
                self.directory, *(name for name in ours
                                  if name != self.uuid)))
            self.assertEqual(ours, self._arrived(), transport)

    def test_files_arrive_as_nova_s_of_that_host(self):
        before = self._pools(self.source), self._pools(self.destination)
        self._migrate()

        there = self.destination.path(self.directory)
        self.assertEqual(
            {'disk', 'disk.eph0', 'disk.info', 'kernel', 'ramdisk'},
            set(os.listdir(there)))
        self.assertEqual({layout.ARRIVED}, self._claims())
        self.assertNotEqual(self.source.nova_uid, self.destination.nova_uid)
        for path in (there, *there.iterdir()):
            status = path.stat()
            self.assertEqual(
                (self.destination.nova_uid, self.destination.nova_gid,
                 0o755 if path == there else 0o644),
                (status.st_uid, status.st_gid, status.st_mode & 0o7777))
            # The record has the paths of the destination as well.
            if path.name not in (self.uuid, layout.RECORD):
                self.assertEqual(self.sha256(self.local / path.name),
                                 self.sha256(path))
        self.assertEqual(4096, self.allocated(there / 'disk.eph0'))
        self.assertEqual(
            before, (self._pools(self.source), self._pools(self.destination)))

    def test_failed_copy_leaves_nothing(self):
        before = self._pools(self.destination)
        move = self._start()
        self._copy_half(move)
        move.discard()
        self.assertFalse(self.destination.path(self.directory).exists())
        self.assertEqual(before, self._pools(self.destination))

    def test_next_attempt_clears_what_a_dead_source_left(self):
        move = self._start()
        self._copy_half(move)
        move.close()
        self._start()
        self.assertEqual(
            [], os.listdir(self.destination.path(self.directory)))
        self.assertEqual({layout.CLAIM}, self._claims())

    def test_copy_that_nobody_took_over_is_for_the_destination_to_clear(self):
        self._migrate()
        error = self.assertRaises(errors.HostError, self._start)
        self.assertIn('is there already', str(error))
        local.delete_all(layout.Layout(
            self.uuid, '/nowhere',
            str(self.destination.path(self.directory))))
        self._start()
        self.assertEqual({layout.CLAIM}, self._claims())

    def _copy_half(self, move):
        """Copy files until the second one is created."""
        created = []
        create = move.there.create

        def fail(file, length):
            created.append(file.name)
            if len(created) == 2:
                raise errors.StorageError('broken on purpose')
            return create(file, length)

        move.there.create = fail
        self.assertRaises(errors.HostError, move.run)

    def _claims(self):
        """Of which kinds the claims on the destination are."""
        return {name.removeprefix(f'{self.uuid}_').partition('-')[0]
                for name in os.listdir(self.destination.path(INSTANCES))
                if name.startswith(f'{self.uuid}_')}

    def test_files_of_somebody_else_stay(self):
        there = self.destination.path(self.directory)
        there.mkdir()
        (there / 'disk').write_text('not ours')
        move = self._transfer(self._add_files())
        error = self.assertRaises(errors.HostError, move.check)
        self.assertIn('is there already', str(error))
        self.assertEqual('not ours', (there / 'disk').read_text())

    def test_instances_path_that_is_not_there(self):
        self.directory = f'/var/lib/nova/elsewhere/{self.uuid}'
        error = self.assertRaises(errors.HostError, self._transfer().check)
        self.assertIn('instances_path', str(error))

    def test_many_look_at_a_directory_at_once(self):
        before = self._pools(self.destination)

        def look(index):
            connection = daemon.open_connection(self.lab.uri(self.destination))
            try:
                return pool.within(
                    connection, path=INSTANCES, name=f'test-{index}',
                    function=pool.Directory.of).permissions.owner
            finally:
                connection.close()

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            owners = set(executor.map(look, range(40)))
        self.assertEqual({self.destination.nova_uid}, owners)
        self.assertEqual(before, self._pools(self.destination))

    def test_many_make_directories_at_once(self):
        before = self._pools(self.destination)
        names = [f'made-{index}' for index in range(40)]
        owner = pool.Permissions(self.destination.nova_uid,
                                 self.destination.nova_gid, 0o755)

        def make(name):
            connection = daemon.open_connection(self.lab.uri(self.destination))
            try:
                for function in (
                        lambda parent: parent.create_directory(name, owner),
                        lambda parent: parent.delete(name)):
                    pool.within(connection, path=INSTANCES,
                                name=f'test-{name}', function=function)
            finally:
                connection.close()

        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            list(executor.map(make, names))
        self.assertEqual(before, self._pools(self.destination))
        self.assertEqual([], [path for path in
                              self.destination.path(INSTANCES).iterdir()
                              if path.name in names])


class SharedDirectoryTestCase(base.LiveTestCase):
    """One directory that both hosts see at the same path, or do not."""

    def setUp(self):
        super().setUp()
        # Not among what a host has of its own.
        self.shared = tempfile.mkdtemp(prefix='nova-lab-shared-')
        self.addCleanup(shutil.rmtree, self.shared)
        os.chmod(self.shared, 0o755)

    def _is_shared(self, path):
        places = layout.Layout(os.path.basename(path), '/nowhere', path)
        move = moves.new_transfer(
            self.local_uri(self.source), self.destination.name,
            self.lab.uri(self.destination), 'none', places, [],
            uses_pool=False)
        self.addCleanup(move.close)
        return move.ask(site.Site.shares_directory, places)

    def test_shared_directory(self):
        path = os.path.join(self.shared, uuidutils.generate_uuid())
        os.mkdir(path)
        with open(os.path.join(path, 'disk'), 'w'):
            pass
        self.assertTrue(self._is_shared(path))
        self.assertEqual(['disk'], os.listdir(path))

    def test_directory_that_is_not_shared(self):
        path = os.path.join(self.shared, uuidutils.generate_uuid())
        os.mkdir(path)
        # The destination has another one mounted there.
        self.destination.run(
            ['mount', '-t', 'tmpfs', 'tmpfs', self.shared])
        self.addCleanup(self.destination.run, ['umount', self.shared])
        self.assertFalse(self._is_shared(path))
        self.destination.run(['mkdir', path])
        self.destination.run(['touch', f'{path}/disk'])
        self.assertFalse(self._is_shared(path))
        self.assertEqual([], os.listdir(path))
