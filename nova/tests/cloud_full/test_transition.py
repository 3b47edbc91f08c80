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

"""Hosts on which the options are not, or not yet, the same."""

import os
import shutil

from nova.tests.cloud import base
from nova.tests.cloud import test_legacy
from nova.tests.cloud import test_migrate

from tools import servers

STREAMS = base.cloud.STREAMS
LEGACY = test_legacy.DirectoryTestCase.options


class TransitionTestCase(base.CloudTestCase):
    """Servers of which nothing is left in the end."""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)

    def restart(self, *options: base.cloud.config.Options) -> None:
        self.cloud.restart_computes(base.cloud.config.merge(*options))
        self.cloud.wait_computes()

    def domain(self, server: servers.Server, host: str) -> str:
        return self.cloud.lab.host(host).run(
            ['virsh', 'domid', server.id]).stdout

    def reboot(self, server: servers.Server) -> None:
        server.compute.reboot_server(server.id, 'HARD')
        server.wait('ACTIVE')

    def assert_in(self, path: str, server: servers.Server,
                  host: str) -> None:
        """All of the server's disks are in one directory."""
        self.assertEqual({self.cloud.lab.host(host).path(path)}, {
            disk.parent for disk in server.disks(host).values()})

    def assert_refused(self, server: servers.Server, reason: str) -> None:
        """The server does not go, and runs on without a break."""
        before = self.domain(server, base.SOURCE)
        server.migrate(base.DESTINATION, status='ACTIVE')
        self.assertIn(reason, server.failure())
        self.assertEqual(base.SOURCE, server.host)
        self.assertEqual(before, self.domain(server, base.SOURCE))
        self.assert_no_disks(server, base.DESTINATION)


class TestSideBySide(TransitionTestCase):
    """A server from before the pools beside one that is in a pool."""

    options = LEGACY

    def test_pools_are_switched_on_and_off_again(self):
        old = self.create_booted(flavor='small-ephemeral')
        directory = f'{servers.INSTANCES}/{old.id}'
        self.assert_in(directory, old, base.SOURCE)
        self.restart(LEGACY, STREAMS)
        new = self.create_booted(flavor='small-ephemeral')
        self.reboot(old)
        self.assert_counts(old, vda=2, vdb=2)

        for server in (old, new):
            server.migrate(base.DESTINATION)
        self.assert_counts(old, vda=3, vdb=3)
        self.assert_counts(new, vda=2, vdb=2)
        for host in (base.SOURCE, base.DESTINATION):
            self.assert_in(servers.POOL, new, host)
        new.revert()
        self.assert_no_disks(new, base.DESTINATION)
        self.assert_in(servers.POOL, new, base.SOURCE)
        self.assert_enters_the_pool(old, directory)

        self.restart(STREAMS, {'libvirt': {
            'use_storage_pools': False, 'vol_upload_migration': False}})
        self.reboot(new)
        # The boot on the destination went with the copy there.
        self.assert_counts(new, vda=3, vdb=3)
        self.assert_in(servers.POOL, new, base.SOURCE)
        self.assert_refused(new, 'vol_upload_migration = True on this host')

    def assert_enters_the_pool(self, old, directory) -> None:
        """The old server is in a pool once a migration is confirmed."""
        self.assert_in(servers.POOL, old, base.DESTINATION)
        old.revert()
        self.assert_counts(old, vda=3, vdb=3)
        self.assert_in(directory, old, base.SOURCE)
        self.assert_no_disks(old, base.DESTINATION)
        old.migrate(base.DESTINATION)
        self.assert_counts(old, vda=4, vdb=4)
        old.confirm()
        self.assert_no_disks(old, base.SOURCE)
        self.reboot(old)
        self.assert_counts(old, vda=5, vdb=5)
        self.assert_in(servers.POOL, old, base.DESTINATION)


class TestThereAndBack(TransitionTestCase):
    """One host has pools, the other files."""

    host_options = {base.SOURCE: LEGACY}

    def test_ten_times_into_the_pool_and_out_of_it(self):
        server = self.create_booted(flavor='small-swap', config_drive=True)
        directory = f'{servers.INSTANCES}/{server.id}'
        places = {base.SOURCE: directory, base.DESTINATION: servers.POOL}
        boots = 1
        for _round in range(10):
            for here, there in ((base.SOURCE, base.DESTINATION),
                                (base.DESTINATION, base.SOURCE)):
                self.migrate_without_ssh(server, there)
                boots += 1
                self.assert_counts(server, vda=boots, vdb=boots)
                self.assert_disks(server, there, places[there])
                server.confirm()
                self.assert_no_disks(server, here)

        # And back again, by a revert from either.
        server.migrate(base.DESTINATION)
        server.revert()
        self.assert_counts(server, vda=boots + 1, vdb=boots + 1)
        self.assert_disks(server, base.SOURCE, directory)
        self.assert_no_disks(server, base.DESTINATION)
        server.migrate(base.DESTINATION)
        self.assert_counts(server, vda=boots + 2, vdb=boots + 2)
        server.confirm()
        server.migrate(base.SOURCE)
        server.revert()
        self.assert_counts(server, vda=boots + 3, vdb=boots + 3)
        self.assert_disks(server, base.DESTINATION, servers.POOL)
        self.assert_no_disks(server, base.SOURCE)

    def assert_disks(self, server: servers.Server, host: str,
                     path: str) -> None:
        """The disks are in a place, and the config drive where Nova has it."""
        disks = server.disks(host)
        where = self.cloud.lab.host(host).path
        drive = where(f'{servers.INSTANCES}/{server.id}/disk.config')
        self.assertEqual(drive, disks.pop('disk.config'))
        self.assertIn(b'config-2', drive.read_bytes())
        self.assertEqual({'disk', 'disk.eph0', 'disk.swap'}, set(disks))
        self.assertEqual({where(path)},
                         {disk.parent for disk in disks.values()})


class TestNotYetThere(TransitionTestCase):
    """The destination has Nova's own driver still, and so no pool."""

    host_options = {base.DESTINATION: {
        'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}}}

    def test_refused_with_a_remedy(self):
        self.forget_pools(self.destination)
        server = self.create_booted()
        self.assert_refused(server, 'no storage pool nova-disks')
        self.assertIn('use_storage_pools', server.failure())
        # The remedy.
        self.restart(STREAMS)
        server.migrate(base.DESTINATION)
        self.assert_counts(server, vda=2)
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)


class TestNotYetHere(test_migrate.SshMixin, TransitionTestCase):
    """The source has Nova's own driver still."""

    ssh = True
    host_options = {base.SOURCE: {
        'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}}}

    def test_goes_over_ssh_and_stays_what_it_is(self):
        server = self.create_booted(flavor='small-ephemeral')
        directory = f'{servers.INSTANCES}/{server.id}'
        size = self.sshd_log_size()
        server.migrate(base.DESTINATION)
        self.assertGreater(self.sshd_log_size(), size)
        self.assert_counts(server, vda=2, vdb=2)
        self.assert_in(directory, server, base.DESTINATION)
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)
        self.reboot(server)
        self.assert_counts(server, vda=3, vdb=3)
        self.assert_in(directory, server, base.DESTINATION)


class TestUnlikeHosts(TransitionTestCase):
    """Pools with different directories, and different formats of disks."""

    elsewhere = '/var/lib/nova/elsewhere'
    host_options = {
        base.SOURCE: {'DEFAULT': {'use_cow_images': False}},
        base.DESTINATION: {'DEFAULT': {'use_cow_images': True},
                           'libvirt': {'disks_pool_path': elsewhere}}}

    def _set_options(self):
        self.forget_pools(self.destination)
        self.addCleanup(
            shutil.rmtree, self.destination.path(self.elsewhere))
        self.addCleanup(self.forget_pools, self.destination)
        super()._set_options()

    def test_each_disk_stays_what_it_is(self):
        full = self.create_booted(flavor='small-ephemeral')
        full.migrate(base.DESTINATION)
        self.assert_counts(full, vda=2, vdb=2)
        self.assert_kind('full', full, base.DESTINATION, self.elsewhere)
        full.confirm()
        self.assert_no_disks(full, base.SOURCE)
        self.reboot(full)
        self.assert_counts(full, vda=3, vdb=3)
        self.assert_kind('full', full, base.DESTINATION, self.elsewhere)

        overlay = self.create_booted(host=base.DESTINATION)
        overlay.migrate(base.SOURCE)
        self.assert_counts(overlay, vda=2)
        self.assert_kind('overlay', overlay, base.SOURCE, servers.POOL)
        overlay.revert()
        self.assert_counts(overlay, vda=2)
        self.assert_kind(
            'overlay', overlay, base.DESTINATION, self.elsewhere)
        self.assert_no_disks(overlay, base.SOURCE)
        overlay.delete()

        full.migrate(base.SOURCE)
        full.confirm()
        self.assert_counts(full, vda=4, vdb=4)
        self.assert_kind('full', full, base.SOURCE, servers.POOL)
        self.assertEqual(set(), set(os.listdir(
            self.destination.path(self.elsewhere))) - {servers.RESERVED})

    def assert_kind(self, kind: str, server: servers.Server, host: str,
                    directory: str) -> None:
        """The root disk is a full image or an overlay."""
        path = f'{directory}/{server.id}_disk'
        info = self.qemu_img_info(host, path)
        self.assertEqual('qcow2', info['format'])
        self.assertEqual(kind == 'overlay', 'backing-filename' in info)
        blocks = self.cloud.lab.host(host).run(
            ['virsh', 'dumpxml', server.id]).stdout.split('<disk ')[1:]
        root = next(xml for xml in blocks if f"file='{path}'" in xml)
        self.assertIn("type='qcow2'", root.split('<source')[0])
