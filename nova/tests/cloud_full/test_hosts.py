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

"""Hosts and services that go down in a migration, and servers side by side."""

import dataclasses
import os
import signal
import time

from nova.tests.cloud import base
from nova.tests.cloud import test_failure
from nova.tests.live import fault_table

from tools import daemons
from tools import servers


@dataclasses.dataclass(frozen=True)
class Move:
    """A server on its way from one host to the other."""
    server: servers.Server
    here: base.live.nova_lab.Host
    there: base.live.nova_lab.Host
    checksums: dict[str, str]


class OutageMixin:
    """nova-compute, or a host with all that runs on it, goes down.

    :ivar broken_at: time.monotonic() of the fault
    """

    def compute(self, name: str) -> daemons.Daemon:
        return self.cloud.daemon(f'nova-compute-{name}')

    def kill_compute(self, name: str) -> None:
        daemon = self.compute(name)
        pid = daemon.pid
        os.killpg(pid, signal.SIGKILL)
        daemons.wait_for(f'the end of nova-compute on {name}',
                         lambda: daemons.gone(pid), poll=0.05)
        self.addCleanup(self.start_compute, name)

    def start_compute(self, name: str) -> None:
        """Start it, unless it runs, and wait until it has reported.

        Nova takes what has not reported for some time for down, and deletes
        the servers there without it.
        """
        before = self._last_report(name)
        self.cloud.start_compute(self.cloud.lab.host(name))
        daemons.wait_for(f'nova-compute of {name} to report', lambda: (
            self._last_report(name) != before), 60, poll=0.5)

    def _last_report(self, name: str) -> str:
        service, = self.cloud.connection().compute.services(
            binary='nova-compute', host=name)
        return service.updated_at

    def take_down(self, host) -> None:
        """Let a host lose its network and all that runs on it."""
        self.kill_compute(host.name)
        host.stop_libvirtd(signal.SIGKILL)
        host.end(host.running('qemu-system-x86'))
        self.addCleanup(self.bring_up, host)
        host.link(False)
        self.broken_at = time.monotonic()
        self.assertFalse(daemons.listening(
            host.address, base.live.nova_lab.TLS_PORT))

    def bring_up(self, host) -> None:
        host.link(True)
        if host.libvirtd_pid is None:
            host.start_libvirtd()
        self.start_compute(host.name)


class ComputeTestCase(OutageMixin, test_failure.FaultTestCase):
    """nova-compute, or what it talks over, ends in a migration."""

    def record(self, fault, when, outcome) -> None:
        fault_table.record(
            fault, when, outcome, self.was_off,
            time.monotonic() - self.broken_at)

    def wait_moved(self) -> None:
        """Wait for the server on the destination, and its next boot."""
        self.server.wait('VERIFY_RESIZE')
        self.assertEqual(base.DESTINATION, self.server.host)
        self.server.wait_boot()
        self.assertEqual({'vda': self.counter + 1}, self.server.counters())

    def test_source_is_told_to_end(self):
        stopped = []

        def terminate():
            os.killpg(self.compute(base.SOURCE).pid, signal.SIGTERM)
            self.addCleanup(self.start_compute, base.SOURCE)
            stopped.append(time.monotonic())

        message = self.fail_when_copying(terminate)
        self.assertLess(time.monotonic() - stopped[0], 30)
        self.assertIn('nova-compute on host1 ended', message)
        self.record('nova-compute of the source is told to end',
                    fault_table.COPYING, fault_table.AT_SOURCE)
        pid = self.compute(base.SOURCE).pid
        daemons.wait_for('the end of nova-compute', lambda: (
            pid is None or daemons.gone(pid)), poll=0.2)
        self.assert_no_disks(self.server, base.DESTINATION)
        self.start_compute(base.SOURCE)
        self.assert_as_before()

    def test_source_ends_after_the_copy_before_33(self):
        # Nova 31 and 32 wait for the copy before they tell the driver.
        daemon = self.compute(base.SOURCE)
        pid = daemon.pid
        self.addCleanup(self.start_compute, base.SOURCE)
        self.break_when_copying(lambda: os.killpg(pid, signal.SIGTERM))
        self.wait_moved()
        daemons.wait_for('the end of nova-compute',
                         lambda: daemons.gone(pid), 60, poll=0.2)
        self.start_compute(base.SOURCE)
        self.cloud.wait_computes()
        self.server.confirm()
        self.assert_no_disks(self.server, base.SOURCE)

    def test_destination_is_killed_before_the_end_of_the_copy(self):
        self.break_when_copying(lambda: self.kill_compute(base.DESTINATION))
        daemons.wait_for('the source to be done', lambda: (
            self.server.get().task_state in ('resize_migrated',
                                             'resize_finish')), poll=0.2)
        self.start_compute(base.DESTINATION)
        self.wait_moved()
        self.record('nova-compute of the destination is killed and started',
                    'before finish_migration', fault_table.MOVED)
        self.assert_confirmed_when_the_source_is_back()

    def assert_confirmed_when_the_source_is_back(self) -> None:
        self.take_down(self.source)
        self.server.compute.confirm_server_resize(self.server.id)
        time.sleep(2)
        self.assertIn('disk', self.server.disks(base.SOURCE))
        self.bring_up(self.source)
        self.server.wait_confirmed()
        self.record('host of the source is down, and up again',
                    'confirmation', fault_table.MOVED)
        self.assert_no_disks(self.server, base.SOURCE)

    def test_source_is_killed_and_then_the_destination(self):
        self.break_when_copying(lambda: self.kill_compute(base.SOURCE))
        self.start_compute(base.SOURCE)
        self.server.wait('ACTIVE')
        self.record('nova-compute of the source is killed and started',
                    fault_table.COPYING, fault_table.NEXT)
        self.assert_as_before()
        self.assert_allocated(base.SOURCE)
        self.assertIn('disk', self.server.disks(base.DESTINATION))
        self.cloud.wait_computes()
        self.assert_reverted_after_the_destination_was_killed()

    def assert_reverted_after_the_destination_was_killed(self) -> None:
        self.server.compute.migrate_server(
            self.server.id, host=base.DESTINATION)
        daemons.wait_for('finish_migration', lambda: (
            self.server.get().task_state == 'resize_finish'), 120, poll=0.02)
        self.kill_compute(base.DESTINATION)
        self.broken_at = time.monotonic()
        self.assertEqual('resize_finish', self.server.get().task_state)
        self.start_compute(base.DESTINATION)
        self.server.wait('VERIFY_RESIZE')
        self.server.revert()
        self.record('nova-compute of the destination is killed and started',
                    'in finish_migration',
                    'server at the source once the migration is reverted')
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_counts(self.server, vda=self.counter + 2)
        self.assert_allocated(base.SOURCE)
        self.assert_no_disks(self.server, base.DESTINATION)

    def assert_allocated(self, host: str) -> None:
        """Check that the server takes up room of this host and no other."""
        placement = self.cloud.connection().placement
        names = {provider.id: provider.name
                 for provider in placement.resource_providers()}
        said = placement.get(f'/allocations/{self.server.id}').json()
        self.assertEqual(
            [host], [names[identity] for identity in said['allocations']])

    def test_message_queue_is_away_at_the_end_of_the_copy(self):
        def take_away():
            self.cloud.daemon('rabbitmq').stop()
            self.addCleanup(self.cloud.start_rabbitmq)

        self.break_when_copying(take_away)
        time.sleep(20)
        self.assertIsNone(self.cloud.daemon('rabbitmq').pid)
        self.cloud.start_rabbitmq()
        self.wait_moved()
        self.record('message queue is away for 20 seconds',
                    'around finish_resize', fault_table.MOVED)
        self.assert_reverted_when_the_destination_is_back()

    def assert_reverted_when_the_destination_is_back(self) -> None:
        self.take_down(self.destination)
        self.server.compute.revert_server_resize(self.server.id)
        time.sleep(2)
        self.assertEqual('resize_reverting', self.server.get().task_state)
        self.bring_up(self.destination)
        self.server.wait('ACTIVE')
        self.record('host of the destination is down, and up again',
                    'revert', fault_table.AT_SOURCE)
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_no_disks(self.server, base.DESTINATION)


class ManyTestCase(base.CloudTestCase):

    options = test_failure.FaultTestCase.options

    def test_two_servers_each_way_at_once(self):
        moves = [self.make_move(*way) for way in 2 * (
            (self.source, self.destination), (self.destination, self.source))]
        started = time.monotonic()
        for move in moves:
            move.server.compute.migrate_server(
                move.server.id, host=move.there.name)
        daemons.wait_for('four copies at once', lambda: all(
            self.is_under_way(move) for move in moves), poll=0.05)
        for move in moves:
            move.server.wait('VERIFY_RESIZE')
            self.assertEqual(move.there.name, move.server.host)
            self.assertEqual(
                move.checksums, move.server.checksums(move.there.name))
        for move in moves:
            move.server.compute.confirm_server_resize(move.server.id)
        for move in moves:
            move.server.wait_confirmed('SHUTOFF')
            self.assert_no_disks(move.server, move.here.name)
            self.assertEqual({'disk'}, set(
                move.server.disks(move.there.name)))
        fault_table.record('two servers each way at once',
                           fault_table.COPYING, fault_table.MOVED,
                           any(not move.server.qemu_pids() for move in moves),
                           time.monotonic() - started)

    def make_move(self, here, there) -> Move:
        """A server that is off, and goes from here to there."""
        server = servers.Server.create(self.cloud, here.name, self.id())
        self.addCleanup(server.delete)
        server.stop()
        test_failure.FaultTestCase.make_noise(server, here)
        return Move(server, here, there, server.checksums(here.name))

    def is_under_way(self, move: Move) -> bool:
        copy = move.there.path(f'{servers.POOL}/{move.server.id}_disk')
        return (copy.exists() and
                0 < copy.stat().st_blocks * 512 < test_failure.NOISE_BYTES)
