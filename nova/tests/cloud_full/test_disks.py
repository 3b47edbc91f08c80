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

"""Disks that are not where Nova made them, and files that are not disks."""

import os

from oslo_serialization import jsonutils

from nova.tests.cloud import base
from nova.virt.libvirt.storage import layout

from tools import servers


class TestSnapshot(base.CloudTestCase):
    """An administrator made an external snapshot of a running server."""

    def setUp(self):
        super().setUp()
        self.server = self.create_booted()
        self.counter = self.server.counters()['vda']
        self._virsh('snapshot-create-as', self.server.id, 'snap',
                    '--disk-only', '--no-metadata')

    def _virsh(self, *arguments: str) -> None:
        self.source.run(['virsh', *arguments])

    def _assert_refused(self, status: str) -> None:
        before = self.server.disks(base.SOURCE)
        self.server.migrate(base.DESTINATION, status=status)
        self.assertEqual(base.SOURCE, self.server.host)
        self.assertIn('virsh blockcommit --shallow', self.server.failure())
        self.assertEqual(before, self.server.disks(base.SOURCE))
        self.assert_no_disks(self.server, base.DESTINATION)

    def test_running_server_moves_when_the_snapshot_is_merged(self):
        self._assert_refused('ACTIVE')
        self._virsh('blockcommit', self.server.id, 'vda', '--active',
                    '--shallow', '--pivot', '--wait')
        os.unlink(self.source.path(
            f'{servers.POOL}/{self.server.id}_disk.snap'))
        self.server.migrate(base.DESTINATION)
        self.assert_counts(self.server, vda=self.counter + 1)
        self.server.confirm()

    def test_stopped_server(self):
        self.server.stop()
        self._assert_refused('SHUTOFF')
        os.unlink(self.source.path(
            f'{servers.POOL}/{self.server.id}_disk.snap'))


class TestLeftover(base.CloudTestCase):
    """A copy that was not finished lies where a server is unshelved to."""

    def test_unshelved_server_has_its_own_disk(self):
        server = self.create_booted()
        counter = server.counters()['vda']
        self._leave_copy(server)
        server.compute.shelve_server(server.id)
        server.wait('SHELVED_OFFLOADED')
        with server.only(base.DESTINATION):
            server.compute.unshelve_server(server.id)
            server.wait('ACTIVE')
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=counter + 1)
        self.assertEqual({'disk'}, set(server.disks(base.DESTINATION)))
        for path in (servers.POOL, servers.INSTANCES):
            self.assertEqual(
                [], list(self.destination.path(path).glob('*incoming*')))

    def _leave_copy(self, server: servers.Server) -> None:
        """Leave on the destination what a migration leaves that is cut."""
        claim = layout.Claim(server.id, 'attempt', base.SOURCE)
        pool, instances = map(
            self.destination.path, (servers.POOL, servers.INSTANCES))
        directory = instances / server.id
        directory.mkdir()
        disk = pool / f'{server.id}_disk'
        self.source.run(['qemu-img', 'create', '-q', '-f', 'qcow2',
                         '/run/stale', '1G'])
        disk.write_bytes(self.source.path('/run/stale').read_bytes())
        (directory / 'disk.info').write_text(jsonutils.dumps(
            {f'{servers.POOL}/{server.id}_disk': 'qcow2'}))
        for path in (disk, directory, directory / 'disk.info',
                     pool / claim.name, instances / claim.name):
            path.touch()
            os.chown(path, self.destination.nova_uid,
                     self.destination.nova_gid)
