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

"""Servers in instance directories, with every kind of disk and a vTPM."""

import re

from nova.tests.cloud import base
from nova.tests.cloud import test_legacy


class FullTestCase(test_legacy.DirectoryTestCase):
    """A server with ephemeral disk, swap disk, config drive and vTPM."""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)
        self.server = self.create_full(flavor='small-vtpm')

    def assert_moved(self, host: str, *others: str) -> None:
        """Check what is on the host to which the server, off, has moved."""
        self.assertEqual(host, self.server.host)
        self.assert_same_vtpm(self.server)
        # Nova leaves the directory in which the vTPM's state came.
        self.assert_owned_by_nova(self.server, host, 'swtpm', *others)
        self.assert_keeps_password(self.server, host)

    def assert_format(self, expected: str, host: str,
                      has_base: bool = False) -> None:
        """Check the format of both disks, and whether they have a base."""
        for disk in ('disk', 'disk.eph0'):
            info = self.image_info(self.server, host, disk)
            self.assertEqual(expected, info['format'])
            self.assertEqual(has_base, 'backing-filename' in info)

    def assert_nothing(self, host: str) -> None:
        self.assert_no_disks(self.server, host)
        self.assertEqual({}, self.vtpm(self.server, host))


class EndsMixin:
    """A migration that is reverted, and a resize that is confirmed.

    :cvar format: of its disks
    """

    def test_migrate_revert_resize_confirm(self):
        server = self.server
        self.assert_format(self.format, base.SOURCE,
                           has_base=self.format == 'qcow2')

        server.stop()
        self.migrate_without_ssh(server, base.DESTINATION)
        self.assert_moved(base.DESTINATION)
        sums = [server.checksums(host)
                for host in (base.SOURCE, base.DESTINATION)]
        # The base image of an ephemeral overlay is of its host's own making.
        whole = ['disk', 'disk.config'] + (
            [] if self.format == 'qcow2' else ['disk.eph0'])
        for name in whole:
            self.assertEqual(sums[0][name], sums[1][name])
        vtpm = self.vtpm(server, base.SOURCE)
        server.revert('SHUTOFF')
        self.assertEqual(base.SOURCE, server.host)
        self.assert_nothing(base.DESTINATION)
        self.assertEqual(vtpm, self.vtpm(server, base.SOURCE))
        server.start()
        self.assert_counts(server, vda=2, vdb=2)

        server.resize('large-vtpm', base.DESTINATION)
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=3, vdb=3)
        # Nova's own code leaves an ephemeral disk of such a server as it is.
        self.assertEqual(
            {'vda': 2 * test_legacy.GIB, 'vdb': test_legacy.GIB,
             'vdc': 128 * test_legacy.MIB}, server.sizes())
        server.confirm()
        self.assert_nothing(base.SOURCE)
        server.stop()
        server.start()
        self.assert_counts(server, vda=4, vdb=4)


class TestOverlayDirectory(EndsMixin, FullTestCase):
    """qcow2 files with a base image in the image cache."""

    format = 'qcow2'


class TestRawDirectory(EndsMixin, FullTestCase):
    """images_type = raw, with use_cow_images as it is by default."""

    format = 'raw'
    options = base.cloud.config.merge(FullTestCase.options, {
        'libvirt': {'images_type': 'raw'}})


class TestFlatDirectory(EndsMixin, FullTestCase):
    """images_type = flat."""

    format = 'raw'
    options = base.cloud.config.merge(FullTestCase.options, {
        'DEFAULT': {'use_cow_images': False},
        'libvirt': {'images_type': 'flat'}})


class TestRawToOverlays(FullTestCase):
    """Raw files, and a destination that makes qcow2 of what arrives."""

    host_options = {
        base.SOURCE: {'DEFAULT': {'use_cow_images': False}},
        base.DESTINATION: {'DEFAULT': {'use_cow_images': True}}}

    def test_revert_confirm_migrate_back(self):
        server = self.server
        self.assert_format('raw', base.SOURCE)
        server.stop()
        self.migrate_without_ssh(server, base.DESTINATION)
        self.assert_moved(base.DESTINATION)
        self.assert_format('qcow2', base.DESTINATION)
        server.revert('SHUTOFF')
        self.assert_nothing(base.DESTINATION)
        self.assert_format('raw', base.SOURCE)
        server.start()
        self.assert_counts(server, vda=2, vdb=2)

        server.migrate(base.DESTINATION)
        server.confirm()
        self.assert_nothing(base.SOURCE)
        self.assert_counts(server, vda=3, vdb=3)
        server.compute.reboot_server(server.id, 'HARD')
        server.wait('ACTIVE')
        self.assert_counts(server, vda=4, vdb=4)
        self.assert_format('qcow2', base.DESTINATION)

        server.migrate(base.SOURCE)
        server.confirm()
        self.assert_nothing(base.DESTINATION)
        self.assert_counts(server, vda=5, vdb=5)
        self.assert_format('qcow2', base.SOURCE)


class TestNovasOwnWay(FullTestCase):
    """Without the opt-in this driver does what Nova's own does."""

    ssh = True
    options = {'libvirt': {'use_storage_pools': False}}

    def test_commands_are_those_of_nova(self):
        self.server.stop()
        for transport, program in (('ssh', 'scp'), ('rsync', 'rsync')):
            ours = self._migrate(
                transport, base.cloud.STREAMS['DEFAULT']['compute_driver'],
                base.SOURCE, base.DESTINATION)
            novas = self._migrate(
                transport, 'libvirt.LibvirtDriver',
                base.DESTINATION, base.SOURCE)
            self.assertIn(f'"{program}"', ' '.join(ours))
            self.assertEqual(novas, ours)
        self.server.start()
        self.assert_counts(self.server, vda=2, vdb=2)

    def _migrate(self, transport: str, driver: str, source: str,
                 destination: str) -> list[str]:
        """Move the server with a driver on both hosts.

        :returns: the commands that this took
        """
        self.cloud.restart_computes(base.cloud.config.merge(
            base.cloud.STREAMS, self.options, {
                'DEFAULT': {'compute_driver': driver},
                'libvirt': {'remote_filesystem_transport': transport}}))
        self.cloud.wait_computes()
        traces = self.migrate_traced(self.server, destination)
        self.assert_owned_by_nova(self.server, destination, 'swtpm')
        self.assert_keeps_password(self.server, destination)
        self.server.confirm('SHUTOFF')
        self.assert_nothing(source)
        return [self._without_names(command, source, destination)
                for command in traces[source].commands(base.SSH_PROGRAMS)]

    def _without_names(self, command: str, source: str,
                       destination: str) -> str:
        """A command without what differs from one time to the next."""
        for name, host in (('SOURCE', source), ('DESTINATION', destination)):
            command = command.replace(self.cloud.lab.host(host).address, name)
        return re.sub(r'/tmp/\w+|\b[0-9a-f]{32}\.tmp', 'TEMPORARY', command)
