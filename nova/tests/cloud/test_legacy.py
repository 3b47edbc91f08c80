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

"""Servers with disks in instance directories migrate over libvirt."""

import os
import stat
from typing import Any

from nova.tests.cloud import base
from nova.tests.cloud import test_migrate

from tools import servers

GIB = 1024 ** 3
MIB = 1024 ** 2
SECRET = 'injected-and-kept'
# What Nova's own path makes of the files of a server that is off: the owner
# is nova's of that host.
MODES = {'disk': 0o644, 'disk.eph0': 0o644, 'disk.config': 0o644,
         'disk.swap': 0o644, 'disk.info': 0o644, '.': 0o755}
BOOT_MODES = {'kernel': 0o644, 'ramdisk': 0o644}


class DirectoryTestCase(base.CloudTestCase):
    """A server with root, ephemeral and swap disk and a config drive."""

    options: base.cloud.config.Options = {'libvirt': {
        'use_storage_pools': False, 'vol_upload_migration_legacy': True,
        'live_migration_scheme': 'tls'}}
    modes = MODES

    def create_full(self, **kwargs: Any) -> servers.Server:
        """Boot a server whose password is on its config drive."""
        return self.create_booted(**{
            'flavor': 'small-swap', 'config_drive': True,
            'admin_password': SECRET, **kwargs})

    def directory(self, server: servers.Server, host: str):
        """The path of its instance directory on a host."""
        return self.cloud.lab.host(host).path(
            f'{servers.INSTANCES}/{server.id}')

    def assert_owned_by_nova(self, server: servers.Server,
                             host: str, *others: str) -> None:
        """Check owner, group and mode of all files of a server.

        :param others: names of files that are no part of the server
        """
        not_disks = ('console.log', *others)
        nova = self.cloud.lab.host(host)
        directory = self.directory(server, host)
        found = {name: os.stat(directory / name)
                 for name in ('.', *os.listdir(directory))
                 if name not in not_disks}
        self.assertEqual(self.modes, {
            name: stat.S_IMODE(status.st_mode)
            for name, status in found.items()})
        self.assertEqual({(nova.nova_uid, nova.nova_gid)}, {
            (status.st_uid, status.st_gid) for status in found.values()})

    def assert_keeps_password(self, server: servers.Server,
                              host: str) -> None:
        drive = self.directory(server, host) / 'disk.config'
        self.assertIn(SECRET.encode(), drive.read_bytes())

    def image_info(self, server: servers.Server, host: str,
                   disk: str) -> dict:
        return self.qemu_img_info(
            host, f'{servers.INSTANCES}/{server.id}/{disk}')


class TestOverlays(DirectoryTestCase):
    """qcow2 files with a base image in the image cache."""

    modes = MODES | BOOT_MODES

    def test_resize_and_revert_then_migrate_with_the_images_lost(self):
        images = self.make_boot_images('lost')
        server = self.create_full(image='lost')

        server.resize('large-swap', base.DESTINATION)
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=2, vdb=2)
        # Nova's own code leaves an ephemeral disk of such a server as it is.
        self.assertEqual(
            {'vda': 2 * GIB, 'vdb': GIB, 'vdc': 128 * MIB}, server.sizes())
        server.revert()
        self.assertEqual(base.SOURCE, server.host)
        self.assert_counts(server, vda=2, vdb=2)
        self.assert_no_disks(server, base.DESTINATION)

        server.stop()
        for image in images:
            self.cloud.connection().image.delete_image(image)
        backing = self.image_info(
            server, base.SOURCE, 'disk')['backing-filename']
        self.destination.path(backing).unlink()
        self.migrate_without_ssh(server, base.DESTINATION)
        self.assertEqual(
            backing, self.image_info(
                server, base.DESTINATION, 'disk')['backing-filename'])
        self.assert_fetched(backing, self.source, self.destination)
        status = self.destination.path(backing).stat()
        self.assertEqual(
            (self.destination.nova_uid, self.destination.nova_gid, 0o644),
            (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)))
        self.assert_owned_by_nova(server, base.DESTINATION)
        self.assert_keeps_password(server, base.DESTINATION)
        sums = [server.checksums(host)
                for host in (base.SOURCE, base.DESTINATION)]
        for name in ('disk', 'disk.config'):
            self.assertEqual(sums[0][name], sums[1][name])
        # The base image of this one is of its host's own making.
        self.assertNotIn('backing-filename', self.image_info(
            server, base.DESTINATION, 'disk.eph0'))
        server.confirm('SHUTOFF')
        self.assert_no_disks(server, base.SOURCE)
        server.start()
        self.assert_counts(server, vda=3, vdb=3)

    @staticmethod
    def path(server: servers.Server, name: str) -> str:
        return f'{servers.INSTANCES}/{server.id}/{name}'

    def assert_fetched(self, path: str, source, destination) -> None:
        """Check that a base image came whole from the other host."""
        there = destination.path(path)
        self.assertEqual(servers.sha256(source.path(path)),
                         servers.sha256(there))
        self.assertEqual([], list(there.parent.glob('*.part')))


class TestRawToNovasOwnDriver(DirectoryTestCase):
    """Raw files, and a destination that does not have our driver."""

    options = base.cloud.config.merge(DirectoryTestCase.options, {
        'DEFAULT': {'use_cow_images': False},
        'libvirt': {'images_type': 'flat'}})
    host_options = {base.DESTINATION: {
        'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}}}

    def test_migrate_and_confirm(self):
        server = self.create_full(flavor='small-vtpm')
        server.stop()
        server.migrate(base.DESTINATION)
        self.assert_same_vtpm(server)
        # Nova's own driver leaves what says that all has arrived.
        marker, = self.directory(server, base.DESTINATION).parent.glob(
            f'{server.id}_*')
        self.addCleanup(marker.unlink, missing_ok=True)
        self.assertEqual(0, marker.stat().st_size)
        self.assert_owned_by_nova(server, base.DESTINATION, 'swtpm')
        self.assert_keeps_password(server, base.DESTINATION)
        for disk in ('disk', 'disk.eph0'):
            self.assertEqual('raw', self.image_info(
                server, base.DESTINATION, disk)['format'])
        server.confirm('SHUTOFF')
        self.assert_no_disks(server, base.SOURCE)
        server.start()
        self.assert_counts(server, vda=2, vdb=2)


class TestRsync(test_migrate.SshMixin, DirectoryTestCase):
    """Without the opt-in Nova's own path is taken, here with rsync."""

    ssh = True
    options = {'libvirt': {'use_storage_pools': False,
                           'remote_filesystem_transport': 'rsync'}}

    def test_migrate_and_confirm(self):
        server = self.create_full()
        server.stop()
        size = self.sshd_log_size()
        server.migrate(base.DESTINATION)
        self.assertGreater(self.sshd_log_size(), size)
        self.assert_owned_by_nova(server, base.DESTINATION)
        self.assert_keeps_password(server, base.DESTINATION)
        server.confirm('SHUTOFF')
        server.start()
        self.assert_counts(server, vda=2, vdb=2)
