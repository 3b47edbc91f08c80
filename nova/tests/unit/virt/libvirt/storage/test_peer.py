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

import typing as ty
from unittest import mock

import ddt
import libvirt
from oslo_utils.fixture import uuidsentinel as uuids

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import pool

Content = libvirt_storage.Content

URI = 'qemu+tls://dest/system'
DIRECTORY = '/var/lib/nova/instances/' + uuids.server
NOVA = dict(owner=64060, group=64061)

TLS_ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC,
             'authentication failed: The certificate is not trusted')


def volume_name(disk: str) -> str:
    return uuids.server + '_' + disk


class _PeerTestCase(test.NoDBTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.hosts = self.useFixture(
            libvirt_storage.LibvirtStorageFixture())
        self.source = self.hosts['source']
        self.source.add_pool('disks', '/disks', 1000, 1001)
        self.source.add_volume('disks', volume_name('disk'), b'data')
        self.source_pool = pool.Pool.lookup(self.source.connect(), 'disks')
        self.add_dest()

    def add_dest(self) -> None:
        """Make a new destination host, with the disk of another server."""
        self.dest = self.hosts.hosts['dest'] = libvirt_storage.FakeHost(
            'dest')
        self.dest.add_pool('disks', '/srv/disks', NOVA['owner'],
                           NOVA['group'], 0o755)
        self.dest.add_volume('disks', 'other_disk', b'of another server')
        self.dest.add_file('/var/lib/nova/instances/other/disk.info', b'{}')
        self.before = self.state()

    def destination(self, uri: str = URI) -> peer.Destination:
        destination = peer.Destination(
            'dest', uri, 'disks', uuids.server, DIRECTORY)
        self.addCleanup(destination.close)
        return destination

    def connected(self) -> peer.Destination:
        destination = self.destination()
        destination.connect()
        return destination

    def claimed(self) -> peer.Destination:
        destination = self.connected()
        destination.check(4, self.source_pool)
        destination.claim()
        return destination

    def state(self) -> dict[str, ty.Any]:
        """All that a migration must not leave changed on the destination."""
        return dict(pools=sorted(self.dest.pools),
                    files=sorted(self.dest.files),
                    directories={path: dict(vars(directory)) for
                                 path, directory in
                                 self.dest.directories.items()})

    def claims(self) -> list[str]:
        return [name for name in self.dest.volume_names('disks')
                if name.startswith(volume_name(peer.CLAIM))]

    def assert_only_claimed(self) -> None:
        """There is one claim, and nothing of the server besides."""
        self.assertCountEqual(['other_disk', *self.claims()],
                              self.dest.volume_names('disks'))
        self.assertEqual(1, len(self.claims()))

    def assert_nothing_left(self) -> None:
        self.assertEqual(self.before, self.state())

    def assert_unsuitable(self, text: str, function: ty.Callable,
                          *args: ty.Any) -> None:
        error = self.assertRaises(peer.Unsuitable, function, *args)
        self.assertIn(text, str(error))
        # An operator has to know where to look.
        self.assertEqual('dest', error.host)
        self.assertIn(error.host, str(error))
        self.assertIn(error.uri, str(error))


class OpenConnectionTestCase(_PeerTestCase):

    def test_keepalive_bounds_every_wait(self):
        self.flags(vol_upload_migration_keepalive_interval=7, group='libvirt')

        connection = peer.open_connection(URI)

        self.assertEqual((7, peer.KEEPALIVE_COUNT), connection.keepalive)
        self.assertEqual([URI], self.hosts.opened)

    def test_keepalive_can_start_later(self):
        connection = peer.open_connection(URI, keepalive=False)
        self.assertIsNone(connection.keepalive)

        peer.start_keepalive(connection)

        self.assertEqual((5, peer.KEEPALIVE_COUNT), connection.keepalive)

    def test_nobody_is_asked_for_credentials(self):
        peer.open_connection(URI)

        _uri, (kinds, callback, _opaque), flags = (
            libvirt.openAuth.call_args.args)
        self.assertIn(libvirt.VIR_CRED_PASSPHRASE, kinds)
        self.assertEqual(-1, callback([mock.sentinel.credential], None))
        self.assertEqual(0, flags)

    def test_refusal_is_libvirts_error(self):
        self.dest.open_error = TLS_ERROR

        error = self.assertRaises(
            libvirt.libvirtError, peer.open_connection, URI)

        self.assertEqual(TLS_ERROR[2], str(error))

    def test_daemon_that_does_not_answer(self):
        self.flags(vol_upload_migration_connect_timeout=1, group='libvirt')
        blocked = self.dest.block('open')
        self.addCleanup(blocked.release)

        self.assertRaises(TimeoutError, peer.open_connection, URI)


@ddt.ddt
class ConnectTestCase(_PeerTestCase):

    def test_connect(self):
        destination = self.connected()

        self.assertEqual('/srv/disks', destination.pool.path)
        self.assertEqual([], self.dest.changes)

    def test_host_that_is_not_there(self):
        self.assert_unsuitable(
            'No route to host',
            self.destination('qemu+tls://nowhere/system').connect)

    def test_certificate_that_is_not_trusted(self):
        self.dest.open_error = TLS_ERROR

        self.assert_unsuitable(
            'not trusted', self.destination().connect)

    def test_daemon_that_does_not_answer(self):
        self.flags(vol_upload_migration_connect_timeout=1, group='libvirt')
        blocked = self.dest.block('open')
        self.addCleanup(blocked.release)

        self.assert_unsuitable('no answer', self.destination().connect)

    def test_link_that_is_cut_while_connecting(self):
        self.dest.fail('conn.setKeepAlive',
                       error=libvirt_storage.LOST_ERROR)

        self.assert_unsuitable(
            'socket is closed', self.destination().connect)

    def test_no_pool(self):
        del self.dest.pools['disks']

        self.assert_unsuitable(
            'no storage pool disks', self.destination().connect)

    def test_inactive_pool(self):
        self.dest.pools['disks'].active = False

        self.assert_unsuitable('not active', self.destination().connect)

        self.assertEqual([], self.dest.changes)

    @ddt.data((7_000_000, False), (8_000_000, True), (9_000_000, True))
    @ddt.unpack
    def test_libvirt_has_to_be_new_enough(self, version, good):
        self.dest.version = version

        if good:
            self.connected()
        else:
            self.assert_unsuitable('7.0.0', self.destination().connect)

    def test_close(self):
        destination = self.connected()

        destination.close()
        destination.close()

        self.assertTrue(self.dest.connections[-1].closed)

    def test_close_without_connection(self):
        self.destination().close()


class CheckTestCase(_PeerTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.peer = self.connected()

    def check(self, needed: int = 4) -> None:
        self.peer.check(needed, self.source_pool)

    def assert_refused(self, text: str, needed: int = 4) -> None:
        self.assert_unsuitable(
            text, self.peer.check, needed, self.source_pool)
        self.assertEqual([], self.dest.changes)

    def share(self) -> None:
        """Put the pools of both hosts on the same directory."""
        self.dest.files = self.source.files
        self.dest.directories = self.source.directories
        self.dest.pools['disks'].path = '/disks'

    def test_check_changes_nothing(self):
        self.check()

        # The only way to ask libvirt whether a directory is there.
        self.assertEqual(
            [('conn.storagePoolCreateXML', f'nova-{uuids.server}')],
            self.dest.changes)
        self.assertEqual([], self.source.changes)
        self.assert_nothing_left()

    def test_domain_in_the_way(self):
        self.dest.add_domain(uuids.server)

        self.assert_refused(uuids.server)

    def test_domain_of_another_server(self):
        self.dest.add_domain(uuids.other)

        self.check()

    def test_storage_driver_knows_no_domains(self):
        self.dest.fail('conn.lookupByUUIDString', error=(
            libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_FROM_REMOTE,
            'this function is not supported by the connection driver: '
            'virDomainLookupByUUIDString'))
        self.check()

    def test_error_is_not_taken_for_a_missing_domain(self):
        self.dest.fail('conn.lookupByUUIDString',
                       error=libvirt_storage.LOST_ERROR)

        self.assertRaises(Exception, self.check)  # noqa: H202

    def test_volume_in_the_way(self):
        self.dest.add_volume('disks', volume_name('disk'), b'whose?')

        self.assert_refused('/srv/disks/' + volume_name('disk'))

    def test_volume_in_the_way_that_libvirt_has_not_seen(self):
        self.dest.add_file('/srv/disks/' + volume_name('disk'), b'whose?')

        self.assert_refused('/srv/disks/' + volume_name('disk'))

    def test_volume_with_nothing_in_it_is_not_in_the_way(self):
        # Asked for over a link that was down, and made when it was up again.
        hole = libvirt_storage.Content(4097)
        self.dest.add_volume('disks', volume_name('disk'), hole)

        self.check()
        self.peer.claim()
        self.peer.create_disk(volume_name('disk'), 4097)

    def test_volumes_of_a_crashed_attempt_are_not_in_the_way(self):
        for disk in (peer.CLAIM, 'disk'):
            self.dest.add_volume('disks', volume_name(disk))

        self.check()

        self.assertEqual([], self.dest.changes)

    def test_room_that_is_just_enough(self):
        self.check(self.dest.available)

    def test_directory_with_files_is_refused_as_it_is(self):
        self.dest.add_file(DIRECTORY + '/disk.info', b'whose?')
        self.before = self.state()

        self.assertRaises(peer.Unsuitable, self.check)

        self.assert_nothing_left()
        self.assertIn(DIRECTORY + '/disk.info', self.dest.files)

    def test_no_room(self):
        self.assert_refused('bytes available', self.dest.available + 1)

    def test_pool_that_is_shared_without_the_directory_is_refused(self):
        self.share()

        self.assert_refused(
            'both hosts share, and instance directory ' + DIRECTORY)

        self.assertEqual(['/disks/' + volume_name('disk')],
                         sorted(self.source.files))

    def test_pools_with_the_same_names_are_not_shared(self):
        for disk in (peer.CLAIM, 'disk'):
            self.dest.add_volume('disks', volume_name(disk))

        self.check()

        self.assertEqual(['/disks/' + volume_name('disk')],
                         sorted(self.source.files))

    def test_lost_link_names_the_host(self):
        self.dest.disconnect()

        self.assert_refused('socket is closed')

    def test_marker_of_a_crashed_check_is_not_in_the_way(self):
        self.dest.add_volume('disks', volume_name(peer.CLAIM))
        self.source.add_volume('disks', volume_name('shared'))

        self.check()

    def test_marker_is_deleted_if_the_check_fails(self):
        self.share()
        self.dest.fail('pool.refresh', nth=2)

        self.assertRaises(Exception, self.check)  # noqa: H202

        self.assertEqual(['/disks/' + volume_name('disk')],
                         sorted(self.source.files))


class ClaimTestCase(_PeerTestCase):

    def test_claim_makes_the_directory_for_nova(self):
        self.claimed()

        directory = self.dest.directories[DIRECTORY]
        self.assertEqual(NOVA | dict(mode=0o755), vars(directory))

    def test_claim_is_a_volume(self):
        self.claimed()

        self.assert_only_claimed()

    def test_empty_directory_is_taken(self):
        self.dest.directories[DIRECTORY] = libvirt_storage.FakeDirectory()

        self.claimed()

    def test_crashed_attempt_is_cleared(self):
        crashed = self.claimed()
        crashed.create_disk(volume_name('disk'), 100)
        crashed.create_disk(volume_name('disk.eph0'), 100)
        crashed.create_file('disk.info', 10)

        self.claimed()

        self.assert_only_claimed()
        self.assertEqual([], [path for path in self.dest.files
                              if path.startswith(DIRECTORY)])

    def test_attempt_that_crashed_after_settling_is_cleared(self):
        crashed = self.claimed()
        crashed.create_disk(volume_name('disk'), 100)
        crashed.create_file('disk.info', 10)
        crashed.settle()

        self.claimed()

        self.assertEqual([], [path for path in self.dest.files
                              if path.startswith(DIRECTORY)])

    def test_attempt_that_was_superseded_touches_nothing(self):
        first = self.claimed()
        first.create_disk(volume_name('disk'), 100)
        second = self.claimed()
        second.create_disk(volume_name('disk'), 100)
        before = self.state()

        for function, *args in (
                (first.verify_disk, volume_name('disk'), 100),
                (first.settle,), (first.discard,)):
            self.assert_unsuitable('another attempt', function, *args)

        self.assertEqual(before, self.state())
        second.verify_disk(volume_name('disk'), 100)
        second.settle()

    def test_attempt_whose_claim_was_adopted_touches_nothing(self):
        first = self.claimed()
        first.create_disk(volume_name('disk'), 100)
        claim, = self.claims()
        self.dest.connect().storagePoolLookupByName(
            'disks').storageVolLookupByName(claim).delete()
        before = self.state()

        self.assert_unsuitable('Find out which', first.discard)

        self.assertEqual(before, self.state())

    def test_of_two_claims_at_once_neither_is_made(self):
        destination = self.connected()
        rival = volume_name(peer.CLAIM) + '-of-another'
        self.dest.call('pool.createXML', lambda: self.dest.add_volume(
            'disks', rival))

        self.assert_unsuitable('Wait for its end', destination.claim)

        self.assertEqual([rival], self.claims())

    def test_claim_that_hangs_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        destination = self.connected()
        blocked = self.dest.block('pool.createXML')
        self.addCleanup(blocked.release)

        self.assert_unsuitable('no answer within 1 seconds. It lives',
                               destination.claim)

        # What was asked for happens, and is for the next attempt to clear.
        blocked.release()
        self.assertTrue(libvirt_storage.wait_for(self.claims))
        self.claimed()
        self.assert_only_claimed()

    def test_directory_that_hangs_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        destination = self.connected()
        blocked = self.dest.block('conn.storagePoolCreateXML')
        self.addCleanup(blocked.release)

        self.assert_unsuitable('no answer within 1 seconds',
                               destination.claim)

        self.assertEqual([], self.claims())

    def test_claim_that_fails_leaves_nothing(self):
        self.dest.fail('conn.storagePoolCreateXML')
        destination = self.connected()

        self.assert_unsuitable('injected failure', destination.claim)

        self.assert_nothing_left()


class TransferTestCase(_PeerTestCase):
    """What a migration makes on the destination, and how it goes away."""

    def setUp(self) -> None:
        super().setUp()
        self.peer = self.claimed()

    def file(self, path: str) -> libvirt_storage.FakeFile:
        return self.dest.files[path]

    def test_disk_belongs_to_nova(self):
        self.peer.create_disk(volume_name('disk'), 4097)

        file = self.file('/srv/disks/' + volume_name('disk'))
        self.assertEqual((NOVA['owner'], NOVA['group'], 0o644, 4097),
                         (file.owner, file.group, file.mode,
                          file.content.size))

    def test_file_belongs_to_nova(self):
        self.peer.create_file('disk.info', 10)

        file = self.file(DIRECTORY + '/disk.info')
        self.assertEqual((NOVA['owner'], NOVA['group'], 0o644),
                         (file.owner, file.group, file.mode))

    def test_writing_has_a_connection_of_its_own(self):
        disk = self.peer.create_disk(volume_name('disk'), 4097)

        before = len(self.dest.connections)
        with self.peer.writing(disk) as volume:
            connection, = self.dest.connections[before:]
            self.assertEqual(disk.path, volume.path())
            self.assertIsNone(connection.keepalive)

        self.assertEqual((5, peer.KEEPALIVE_COUNT), connection.keepalive)
        self.assertTrue(connection.closed)

    def test_disk_that_arrived(self):
        self.peer.create_disk(volume_name('disk'), 4097)

        self.peer.verify_disk(volume_name('disk'), 4097)

    def test_disk_of_another_size(self):
        self.peer.create_disk(volume_name('disk'), 4097)
        self.file('/srv/disks/' + volume_name('disk')).content.truncate(4096)

        self.assert_unsuitable(
            '4096 bytes', self.peer.verify_disk, volume_name('disk'), 4097)

    def test_disk_that_lies_about_its_size(self):
        self.peer.create_disk(volume_name('disk'), 4097)
        self.file('/srv/disks/' + volume_name('disk')).reported = dict(
            physical=5000)

        self.assert_unsuitable(
            '5000 bytes', self.peer.verify_disk, volume_name('disk'), 4097)

    def test_disk_that_was_deleted_behind_libvirts_back(self):
        self.peer.create_disk(volume_name('disk'), 4097)
        self.dest.remove_file('/srv/disks/' + volume_name('disk'))

        self.assertRaises(libvirt.libvirtError, self.peer.verify_disk,
                          volume_name('disk'), 4097)

    def test_settle_keeps_the_files_and_the_claim(self):
        self.peer.create_disk(volume_name('disk'), 1)
        self.peer.create_file('disk.info', 10)

        self.peer.settle()

        self.assertEqual(['disks'], sorted(self.dest.pools))
        self.assertIn(DIRECTORY + '/disk.info', self.dest.files)
        self.assertEqual(1, len(self.claims()))

    def test_discard_removes_all_and_nothing_else(self):
        self.peer.create_disk(volume_name('disk'), 1)
        self.peer.create_file('disk.info', 10)

        self.peer.discard()

        self.assert_nothing_left()

    def test_discard_after_settle(self):
        self.peer.create_disk(volume_name('disk'), 1)
        self.peer.create_file('disk.info', 10)
        self.peer.settle()

        self.peer.discard()

        self.assert_nothing_left()

    def test_discard_after_the_link_was_cut(self):
        self.peer.create_disk(volume_name('disk'), 1)
        self.dest.disconnect()
        self.assertRaises(libvirt.libvirtError, self.peer.create_disk,
                          volume_name('disk.eph0'), 1)
        self.dest.reconnect()

        self.peer.discard()

        self.assert_nothing_left()
        self.assertEqual([URI, URI], self.hosts.opened)
        self.assertEqual([True, True],
                         [c.closed for c in self.dest.connections])

    def test_discard_of_what_was_never_copied(self):
        self.peer.discard()

        self.assert_nothing_left()

    def test_discard_deletes_the_claim_last(self):
        self.peer.create_disk(volume_name('disk'), 1)
        self.peer.create_disk(volume_name('z'), 1)
        self.peer.create_file('disk.info', 10)
        claim, = self.claims()

        self.peer.discard()

        deleted = [name for where, name in self.dest.calls
                   if where == 'vol.delete']
        self.assertEqual(claim, deleted[-1])
        self.assertEqual(4, len(deleted))

    def test_discard_that_hangs_names_the_host(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        blocked = self.dest.block('vol.delete')
        self.addCleanup(blocked.release)

        self.assert_unsuitable('no answer within 1 seconds',
                               self.peer.discard)

    def test_discard_that_fails_names_the_host(self):
        self.dest.open_error = TLS_ERROR

        self.assert_unsuitable('not trusted', self.peer.discard)


class CrashTestCase(_PeerTestCase):
    """Wherever an attempt stops, the next one clears what it left."""

    def attempt(self) -> None:
        """Fail in the end, after clearing what an attempt before left."""
        destination = self.claimed()
        destination.create_disk(volume_name('disk'), 100)
        destination.create_file('disk.info', 10)
        destination.settle()
        destination.discard()

    def attempt_twice(self) -> None:
        destination = self.claimed()
        destination.create_disk(volume_name('disk'), 100)
        destination.create_file('disk.info', 10)
        self.attempt()

    def crash_after(self, count: int) -> tuple[str, str | None]:
        """Get no further than a number of changes; return the next one."""
        self.add_dest()

        def crash() -> None:
            if len(self.dest.changes) > count:
                self.dest.disconnect()

        self.dest.call('*', crash, times=None)
        self.assertRaises(Exception, self.attempt_twice)  # noqa: H202
        self.dest.faults.clear()
        self.dest.reconnect()
        return self.dest.changes[-1]

    def test_every_change_may_be_the_last(self):
        self.attempt_twice()
        self.assert_nothing_left()
        stuck = []
        for count in range(len(self.dest.changes)):
            crashed_at = self.crash_after(count)
            try:
                self.attempt()
                self.assert_nothing_left()
            except Exception as error:
                stuck.append((count, crashed_at, str(error)))

        self.assertEqual([], stuck)
