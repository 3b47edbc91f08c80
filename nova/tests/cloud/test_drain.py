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

"""A host is drained: its servers copy one by one, and run until then."""

import collections
import datetime
import time

from testtools import content

from nova.tests.cloud import base
from nova.tests.cloud import test_failure

from tools import cloud
from tools import daemons

WAITING, OFF = 'compute_wait_for_copies', 'compute_off_for_migration'


class DrainTestCase(base.CloudTestCase):

    options: cloud.config.Options = {
        'libvirt': {'vol_upload_migration_max_concurrent': 1,
                    # A copy takes so long that others are seen waiting.
                    'vol_upload_migration_bandwidth': 16}}

    def make_servers(self, count):
        servers = [self.create() for _index in range(count)]
        for server in servers:
            test_failure.FaultTestCase.make_noise(server, self.source)
        return servers

    def start(self, server) -> None:
        server.compute.migrate_server(server.id, host=base.DESTINATION)

    def migration(self, server):
        migration, = server.compute.migrations(instance_uuid=server.id)
        return migration

    def status(self, server) -> str:
        """The status of the server's migration, '' where there is none."""
        return ''.join(migration.status for migration in
                       server.compute.migrations(instance_uuid=server.id))

    def wait_status(self, server, status) -> None:
        daemons.wait_for(f'the migration to be {status}', lambda: (
            self.status(server) == status), poll=0.2)

    def begin(self, servers) -> None:
        """Begin to migrate servers, one after the other."""
        self.start(servers[0])
        self.wait_status(servers[0], 'migrating')
        daemons.wait_for('the first copy', lambda: (
            servers[0].disks(base.DESTINATION)), poll=0.1)
        for server in servers[1:]:
            self.start(server)
            self.wait_status(server, 'queued')

    def events(self, server, name) -> list:
        """What the API tells of the events of a name."""
        return [event for action in server.compute.server_actions(server.id)
                for event in server.compute.get_server_action(
                    action.request_id, server.id).events or []
                if event['event'] == name]

    def seconds(self, server, name) -> float:
        event, = self.events(server, name)
        self.assertEqual('Success', event['result'])
        start, end = (datetime.datetime.fromisoformat(event[key])
                      for key in ('start_time', 'finish_time'))
        return (end - start).total_seconds()

    def test_servers_run_while_they_wait(self):
        moving = self.make_servers(3)
        pids = {server.id: server.qemu_pids() for server in moving}
        ended = []
        seen = collections.Counter()
        self.begin(moving)
        deadline = time.monotonic() + 300
        while len(ended) < len(moving):
            self.assertLess(time.monotonic(), deadline)
            for server in moving:
                # The process first: it may end, but does not come back.
                running = server.qemu_pids()
                status = self.status(server)
                self.assertNotEqual('error', status)
                if status == 'queued':
                    seen[server.id] += 1
                    self.assertEqual(pids[server.id], running)
                    self.assertEqual({}, server.disks(base.DESTINATION))
                if status == 'finished' and server.id not in ended:
                    ended.append(server.id)
            time.sleep(0.2)
        self.assertEqual([server.id for server in moving], ended)
        self.assertEqual({server.id for server in moving[1:]}, set(seen))
        for server in moving:
            server.wait('VERIFY_RESIZE')
        self.assertEqual([], self.events(moving[0], WAITING))
        waited = [self.seconds(server, WAITING) for server in moving[1:]]
        self.assertEqual(sorted(waited), waited)
        for server in moving:
            self.assertLess(
                self.seconds(server, OFF),
                self.seconds(server, 'compute_resize_instance') +
                self.seconds(server, 'compute_finish_resize'))
            server.confirm()

    def test_server_that_waits_is_deleted(self):
        first, second, third = self.make_servers(3)
        self.begin([first, second, third])
        second.delete()
        self.assertIn(self.status(first), ('migrating', 'post-migrating'))
        self.assertEqual('queued', self.status(third))
        for host in base.SOURCE, base.DESTINATION:
            self.assert_no_disks(second, host)
        for server in first, third:
            server.wait('VERIFY_RESIZE')


class FewThreadsTestCase(DrainTestCase):
    """Servers that wait take the threads that Nova has for requests."""

    options = cloud.config.merge(DrainTestCase.options, {
        'DEFAULT': {'executor_thread_pool_size': 2}})

    test_servers_run_while_they_wait = None
    test_server_that_waits_is_deleted = None

    def test_others_wait_in_the_message_queue(self):
        moving = self.make_servers(3)
        other = self.create()
        self.begin(moving[:2])
        self.start(moving[2])
        self.wait_status(moving[2], 'pre-migrating')
        started = time.monotonic()
        other.stop()
        self.addDetail('seconds', content.text_content(
            f'{time.monotonic() - started:.1f} s to stop a server'))
        # Before 33 all requests share the threads, and the first is free
        # when a server's disks are copied.
        if base.RELEASE < 33:
            self.assertEqual('migrating', self.status(moving[1]))
        else:
            self.assertEqual('queued', self.status(moving[1]))
            self.assertEqual('pre-migrating', self.status(moving[2]))
        for server in moving:
            server.wait('VERIFY_RESIZE')
