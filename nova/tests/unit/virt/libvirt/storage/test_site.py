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


import errno
import os
import typing as ty
from unittest import mock

import ddt
import fixtures
import libvirt
from oslo_utils.fixture import uuidsentinel as uuids

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import threads

Content = libvirt_storage.Content

URI = 'qemu+tls://dest/system'
NOVA = dict(owner=64060, group=64061)

TLS_ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC,
             'authentication failed: The certificate is not trusted')


def volume_name(disk: str) -> str:
    return uuids.server + '_' + disk


def disk(name: str = 'disk') -> layout.File:
    return layout.File(volume_name(name), layout.POOL, '/source/' + name)


def file(name: str, **attributes: ty.Any) -> layout.File:
    return layout.File(name, layout.DIRECTORY, '/source/' + name,
                       **attributes)


class SiteTestCase(test.NoDBTestCase):
    """The site of a server on the host 'dest', which has other servers."""

    uses_pool = True

    def setUp(self) -> None:
        super().setUp()
        self.flags(host='source')
        self.hosts = self.useFixture(
            libvirt_storage.LibvirtStorageFixture())
        self.instances = self.useFixture(fixtures.TempDir()).path
        self.pool_path = self.useFixture(fixtures.TempDir()).path
        self.here = layout.Layout(
            uuids.server, self.pool_path,
            os.path.join(self.instances, uuids.server))
        self.directory = self.here.directory
        os.mkdir(self.directory)
        self.add_dest()

    def add_dest(self) -> None:
        """Make a new destination host, with the files of another server."""
        self.dest = self.hosts.hosts['dest'] = libvirt_storage.FakeHost(
            'dest')
        self.dest.add_pool('disks', '/srv/disks', NOVA['owner'],
                           NOVA['group'], 0o755)
        self.dest.add_volume('disks', 'other_disk', b'of another server')
        self.dest.add_directory(self.instances, mode=0o755, **NOVA)
        self.dest.add_file(self.instances + '/other/disk.info', b'{}')
        self.before = self.state()

    def new_site(self, uri: str = URI) -> site.Site:
        """The site of a new attempt."""
        new = site.Site(
            daemon.Daemon('dest', uri), self.here, 'disks',
            layout.Claim.new(uuids.server), self.uses_pool)
        self.addCleanup(new.close)
        return new

    def connected(self) -> site.Site:
        new = self.new_site()
        new.connect()
        return new

    def check(self, there: site.Site, pool: int = 4,
              directory: int = 4) -> None:
        there.check(self.here, 'instance-00000001', {
            layout.POOL: pool, layout.DIRECTORY: directory})

    def claimed(self) -> site.Site:
        there = self.connected()
        self.check(there)
        there.claim()
        return there

    def state(self) -> dict[str, ty.Any]:
        """All that a migration must not leave changed on the destination."""
        return dict(pools=sorted(self.dest.pools),
                    files=sorted(self.dest.files),
                    directories={path: dict(vars(directory)) for
                                 path, directory in
                                 self.dest.directories.items()})

    def claims(self) -> list[str]:
        """The names of the claims there, wherever they are."""
        return sorted({name for name in map(os.path.basename, self.dest.files)
                       if layout.Claim.parse(uuids.server, name)})

    def drop_claims(self) -> None:
        """Take the server over, as nova-compute there does."""
        for path in list(self.dest.files):
            if os.path.basename(path) in self.claims():
                del self.dest.files[path]

    def in_directory(self) -> list[str]:
        """The names of the files in the instance directory there."""
        return sorted(os.path.basename(path) for path in self.dest.files
                      if os.path.dirname(path) == self.directory)

    def assert_nothing_left(self) -> None:
        self.assertEqual(self.before, self.state())

    def assert_raises(self, error_class: type[errors.StorageError],
                      text: str, function: ty.Callable,
                      *args: ty.Any) -> None:
        """An error says what is wrong, and what to do about it."""
        error = self.assertRaises(error_class, function, *args)
        self.assertIn(text, str(error))
        self.assertTrue(error.remedy, error)

    def assert_libvirt_error(self, text: str, function: ty.Callable,
                             *args: ty.Any) -> None:
        error = self.assertRaises(libvirt.libvirtError, function, *args)
        self.assertIn(text, str(error))


@ddt.ddt
class ConnectTestCase(SiteTestCase):

    def test_layout_is_that_of_the_other_host(self):
        there = self.connected()

        self.assertEqual('/srv/disks/' + volume_name('disk'),
                         there.layout.volume_path('disk'))
        self.assertEqual(self.directory, there.layout.directory)
        self.assertEqual([], self.dest.changes)

    def test_host_that_is_not_there(self):
        self.assert_raises(
            errors.StorageError, 'No route to host',
            self.new_site('qemu+tls://nowhere/system').connect)

    def test_certificate_that_is_not_trusted(self):
        self.dest.open_error = TLS_ERROR

        self.assert_raises(
            errors.StorageError, 'not trusted', self.new_site().connect)

    def test_daemon_that_does_not_answer(self):
        self.flags(vol_upload_migration_connect_timeout=1, group='libvirt')
        blocked = self.dest.block('open')
        self.addCleanup(blocked.release)

        error = self.assertRaises(errors.StorageError, self.new_site().connect)

        self.assertIn('no answer', str(error))

    def test_link_that_is_cut_while_connecting(self):
        self.dest.fail('conn.setKeepAlive',
                       error=libvirt_storage.LOST_ERROR)

        error = self.assertRaises(errors.StorageError, self.new_site().connect)

        self.assertIn('socket is closed', str(error))

    def test_no_pool(self):
        del self.dest.pools['disks']

        self.assert_raises(errors.PoolNotFound, 'no storage pool disks',
                           self.new_site().connect)

    def test_inactive_pool(self):
        self.dest.pools['disks'].active = False

        self.assert_raises(errors.PoolInactive, 'not active',
                           self.new_site().connect)

        self.assertEqual([], self.dest.changes)

    @ddt.data((7_000_000, False), (8_000_000, True), (9_000_000, True))
    @ddt.unpack
    def test_libvirt_has_to_be_new_enough(self, version, good):
        self.dest.version = version

        if good:
            self.connected()
        else:
            self.assert_raises(
                errors.Refused, '7.0.0', self.new_site().connect)

    def test_close(self):
        there = self.connected()

        there.close()
        there.close()

        self.assertTrue(self.dest.connections[-1].closed)

    def test_close_without_connection(self):
        self.new_site().close()


class CheckTestCase(SiteTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.there = self.connected()

    def assert_refused(self, text: str, **needed: int) -> None:
        before = self.state()
        error = self.assertRaises(
            errors.Refused, self.check, self.there, **needed)
        self.assertIn(text, str(error))
        self.assertTrue(error.remedy)
        self.assertEqual(before, self.state())

    def share(self, *paths: str, volume: str = volume_name('disk')) -> None:
        """Put directories of this host on storage that 'dest' shares.

        :param paths: of the pool or the instance directory
        :param volume: the server's in the pool, if there is one
        """
        markers = {self.pool_path: (self.pool_path, '/srv/disks'),
                   self.directory: (self.instances, self.instances)}
        self.useFixture(libvirt_storage.SharedDirectories(
            self.dest, dict(markers[path] for path in paths)))
        if self.pool_path in paths and volume:
            self.dest.add_file('/srv/disks/' + volume, b'data')
        if self.directory in paths:
            self.dest.add_file(self.directory + '/disk.info', b'{}')

    def assert_no_markers(self) -> None:
        for path in self.pool_path, self.directory:
            self.assertEqual([], os.listdir(path))
        self.assertEqual([uuids.server], os.listdir(self.instances))

    def test_check_changes_nothing(self):
        self.check(self.there)

        # The only way to ask libvirt whether a directory is there.
        self.assertLessEqual(
            {name for _call, name in self.dest.changes},
            {f'nova-{uuids.server}', f'nova-{uuids.server}-parent'})
        self.assert_nothing_left()
        self.assertFalse(self.there.is_shared)

    def test_domain_in_the_way(self):
        self.dest.add_domain(uuids.server, name='other')

        self.assert_refused(uuids.server)

    def test_name_of_the_domain_in_the_way(self):
        self.dest.add_domain(uuids.other, name='instance-00000001')

        self.assert_refused(
            f'another domain there, {uuids.other}, has the name '
            f'instance-00000001')

    def test_domain_of_another_server(self):
        self.dest.add_domain(uuids.other, name='other')

        self.check(self.there)

    def test_storage_driver_knows_no_domains(self):
        for lookup in 'lookupByUUIDString', 'lookupByName':
            self.dest.fail('conn.' + lookup, error=(
                libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_FROM_REMOTE,
                'this function is not supported by the connection driver: '
                'virDomain' + lookup))
        self.check(self.there)

    def test_error_is_not_taken_for_a_missing_domain(self):
        for lookup in 'lookupByUUIDString', 'lookupByName':
            self.dest.fail('conn.' + lookup,
                           error=libvirt_storage.LOST_ERROR)

            self.assert_libvirt_error(
                'socket is closed', self.check, self.there)

    def test_instances_in_another_directory(self):
        self.dest.directories = {
            path: directory
            for path, directory in self.dest.directories.items()
            if not path.startswith(self.instances)}

        self.assert_refused(f'cannot look into {self.instances}')

    def test_volume_in_the_way(self):
        self.dest.add_volume('disks', volume_name('disk'), b'whose?')

        self.assert_refused('/srv/disks/' + volume_name('disk'))

    def test_kept_volume_in_the_way(self):
        name = f'{uuids.server}-resize_disk'
        self.dest.add_volume('disks', name, b'whose?')

        self.assert_refused('/srv/disks/' + name)

    def test_volume_in_the_way_that_libvirt_has_not_seen(self):
        self.dest.add_file('/srv/disks/' + volume_name('disk'), b'whose?')

        self.assert_refused('/srv/disks/' + volume_name('disk'))

    def test_late_empty_volume_is_not_in_the_way(self):
        # Asked for over a link that was down, and made when it was up again.
        self.dest.add_volume('disks', volume_name('disk'), Content(4097))

        self.check(self.there)
        self.there.claim()
        self.there.create(disk(), 4097)

        self.assertEqual(1, len(self.claims()))

    def test_files_of_a_crashed_attempt_are_not_in_the_way(self):
        for name in layout.CLAIM, 'disk':
            self.dest.add_volume('disks', volume_name(name), b'data')
        self.dest.add_file(self.directory + '/disk.info', b'{}')
        self.dest.add_file(f'{self.directory}_{layout.CLAIM}')
        before = self.state()

        self.check(self.there)

        self.assertEqual(before, self.state())

    def test_directory_with_files_is_refused_as_it_is(self):
        self.dest.add_file(self.directory + '/disk.info', b'whose?')

        self.assert_refused(
            f'instance directory {self.directory} is there already')

    def test_pool_that_nova_there_does_not_own(self):
        nova = self.dest.directories[self.instances].owner
        for attributes, reason in (
                ({'owner': nova + 1}, f'belongs to uid {nova + 1}'),
                ({'mode': 0o500}, 'has mode 0500')):
            pool = self.dest.directories[self.dest.pools['disks'].path]
            with mock.patch.multiple(pool, **attributes):
                self.assert_refused(reason)

    def test_room_that_is_just_enough(self):
        self.check(self.there, pool=self.dest.available,
                   directory=self.dest.available)

    def test_no_room_for_the_disks(self):
        self.assert_refused(
            f'{self.dest.available} bytes available in storage pool disks, '
            f'and the files of the server take up {self.dest.available + 1}',
            pool=self.dest.available + 1)

    def test_no_room_in_the_file_system_of_the_instances(self):
        self.assert_refused(
            f'{self.dest.available} bytes available in {self.instances}',
            directory=self.dest.available + 1)

    def test_room_that_a_crashed_attempt_takes_up_will_be_free(self):
        self.dest.add_volume('disks', volume_name(layout.CLAIM))
        self.dest.add_volume('disks', volume_name('disk'), b'x' * 4096)
        self.dest.add_file(self.directory + '/disk.config', b'x' * 512)
        self.dest.add_file(f'{self.directory}_{layout.CLAIM}')
        available = self.dest.available

        self.assert_refused('take up', pool=available + 4097)
        self.check(self.there, pool=available + 4096,
                   directory=available + 4096 + 512 + 1)
        # Known when the copy is gone, and still before the server is off.
        self.assert_raises(errors.Refused, 'take up', self.there.claim)
        self.check(self.there, pool=available + 4096,
                   directory=available + 4096 + 512)
        self.there.claim()

    def test_shared_storage_needs_no_copy(self):
        self.share(self.pool_path, self.directory)
        self.dest.capacity = 0

        self.check(self.there)

        self.assertTrue(self.there.is_shared)
        self.assert_no_markers()
        self.there.discard()
        self.assertIn('/srv/disks/' + volume_name('disk'), self.dest.files)

    def test_pool_that_is_shared_without_the_directory_is_refused(self):
        self.share(self.pool_path)

        error = self.assertRaises(errors.Refused, self.check, self.there)

        self.assertIn('both hosts share storage pool disks and not instance '
                      f'directory {self.directory}', str(error))
        self.assertFalse(self.there.is_shared)
        self.assert_no_markers()

    def assert_only_the_pool_is_shared(self) -> None:
        error = self.assertRaises(errors.Refused, self.check, self.there)

        self.assertIn('both hosts share storage pool disks and not instance '
                      f'directory {self.directory}', str(error))
        self.assert_no_markers()

    def test_pool_is_shared_before_any_volume_is_in_it(self):
        self.share(self.pool_path, volume='')

        self.assert_only_the_pool_is_shared()

    def test_pool_that_the_copy_does_not_use_may_not_be_shared_alone(self):
        self.uses_pool = False
        self.there = self.connected()
        self.share(self.pool_path, volume='')

        self.assert_only_the_pool_is_shared()
        self.dest.pools['disks'].active = False
        self.assert_only_the_pool_is_shared()

    def test_directory_of_a_pool_that_is_gone_may_not_be_shared_alone(self):
        self.uses_pool = False
        self.dest.pools.clear()
        self.there = self.connected()
        make = site.tempfile.NamedTemporaryFile

        def make_shared(**kwargs: ty.Any) -> ty.Any:
            marker = make(**kwargs)
            self.dest.add_file(marker.name)
            self.addCleanup(self.dest.files.pop, marker.name, None)
            return marker

        with mock.patch.object(
                site.tempfile, 'NamedTemporaryFile', make_shared):
            self.assert_only_the_pool_is_shared()

    def test_pool_that_nothing_uses_need_not_be_shared(self):
        self.uses_pool = False
        self.there = self.connected()
        self.share(self.directory)

        self.check(self.there)

        self.assertTrue(self.there.is_shared)
        self.assert_no_markers()

    def test_kept_directory_in_the_way(self):
        self.dest.add_directory(f'{self.directory}_resize')
        for crashed in False, True:
            if crashed:
                self.dest.add_file(f'{self.directory}_{layout.CLAIM}')

            self.assert_refused(f'{self.directory}_resize')

    def test_directory_that_is_shared_without_the_pool_is_refused(self):
        self.share(self.directory)

        error = self.assertRaises(errors.Refused, self.check, self.there)

        self.assertIn('both hosts share instance directory '
                      f'{self.directory} and not storage pool disks',
                      str(error))
        self.assert_no_markers()

    def test_places_with_the_same_names_are_not_shared(self):
        self.dest.add_volume('disks', volume_name(layout.CLAIM))
        self.dest.add_file(self.directory + '/disk.info', b'{}')
        self.dest.add_file(f'{self.directory}_{layout.CLAIM}')

        self.check(self.there)

        self.assertFalse(self.there.is_shared)
        self.assert_no_markers()

    def test_marker_is_deleted_if_the_check_fails(self):
        self.share(self.pool_path, self.directory)
        for nth in range(1, 10):
            self.dest.faults.clear()
            self.dest.fail('pool.refresh', nth=nth)
            try:
                self.check(self.there)
            except (libvirt.libvirtError, errors.Refused):
                self.assert_no_markers()
            else:
                break
        self.assertGreater(nth, 3)

    def test_lost_link(self):
        self.dest.disconnect()

        self.assert_raises(errors.Refused, 'socket is closed', self.check,
                           self.there)


@ddt.ddt
class ClaimTestCase(SiteTestCase):

    def assert_only_claimed(self) -> None:
        """There is one claim, and nothing of the server besides."""
        self.assertCountEqual(['other_disk', *self.claims()],
                              self.dest.volume_names('disks'))
        self.assertEqual(1, len(self.claims()))
        self.assertEqual([], self.in_directory())

    def crash(self, settled: bool = False) -> None:
        """Copy something, and go no further."""
        crashed = self.claimed()
        crashed.create(disk(), 100)
        crashed.create(disk('disk.eph0'), 100)
        crashed.create(file('disk.info'), 10)
        crashed.make_directory(file('swtpm', mode=0o700))
        crashed.create(file('swtpm/state', mode=0o600), 10)
        if settled:
            crashed.settle([])

    def test_claim_makes_the_directory_for_nova(self):
        self.claimed()

        self.assertEqual(NOVA | dict(mode=0o755),
                         vars(self.dest.directories[self.directory]))

    def test_claim_names_server_attempt_and_source_host(self):
        self.claimed()

        self.assert_only_claimed()
        claim = layout.Claim.parse(uuids.server, *self.claims())
        self.assertEqual('source', claim.source)
        self.assertEqual(36, len(claim.attempt))

    @ddt.data(1, 2, 3)
    def test_storage_on_which_root_is_nobody(self, nth):
        there = self.connected()
        self.check(there)
        before = self.state()
        self.dest.fail('pool.createXML', nth=nth, error=(
            libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STORAGE,
            'Failed to create file: Permission denied', errno.EACCES))

        error = self.assertRaises(errors.Refused, there.claim)

        self.assertIn('may not write to', error.reason)
        path = self.instances if nth > 1 else '/srv/disks'
        self.assertIn(path, error.reason)
        self.assertIn('no_root_squash', error.remedy)
        self.assertEqual(before, self.state())

    def test_what_came_since_the_check_is_in_the_way(self):
        there = self.connected()
        self.check(there)
        self.dest.add_volume('disks', volume_name('disk'), b'whose?')
        before = self.state()

        self.assert_raises(errors.Refused, 'is in the way', there.claim)

        self.assertEqual(before, self.state())

    def test_crashed_attempt_is_cleared(self):
        self.crash()

        self.claimed()

        self.assert_only_claimed()

    def test_attempt_that_crashed_after_settling_is_cleared(self):
        self.crash(settled=True)

        self.claimed()

        self.assert_only_claimed()

    def test_claim_of_an_old_release_is_cleared(self):
        for name in layout.CLAIM + '-0a1b', 'disk':
            self.dest.add_volume('disks', volume_name(name), b'data')

        self.claimed()

        self.assert_only_claimed()

    def test_crashed_attempt_is_not_cleared_if_the_server_came(self):
        self.crash()
        there = self.connected()
        self.check(there)
        self.dest.add_domain(uuids.server)
        before = self.state()

        self.assert_raises(errors.Superseded, 'has a domain', there.claim)

        self.assertEqual(before, self.state())

    def test_attempt_that_was_superseded_touches_nothing(self):
        first = self.claimed()
        first.create(disk(), 100)
        second = self.claimed()
        second.create(disk(), 100)
        before = self.state()

        for function, *args in (
                (first.verify, disk(), 100),
                (first.settle, []), (first.discard,)):
            self.assert_raises(
                errors.Superseded, 'another attempt', function, *args)

        self.assertEqual(before, self.state())
        second.verify(disk(), 100)
        second.settle([])

    def test_attempt_whose_claim_was_adopted_touches_nothing(self):
        first = self.claimed()
        first.create(disk(), 100)
        self.drop_claims()
        before = self.state()

        self.assert_raises(
            errors.Superseded, 'Find out which', first.discard)

        self.assertEqual(before, self.state())

    def test_of_two_claims_at_once_neither_is_made(self):
        there = self.connected()
        rival = volume_name(layout.CLAIM) + '-of-another'
        self.dest.call('pool.createXML', lambda: self.dest.add_volume(
            'disks', rival))

        self.assert_raises(
            errors.Superseded, 'Wait until that attempt has ended',
            there.claim)

        self.assertEqual([rival], self.claims())

    def test_claim_that_hangs_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        there = self.connected()
        blocked = self.dest.block('pool.createXML')
        self.addCleanup(blocked.release)

        error = self.assertRaises(TimeoutError, there.claim)

        self.assertIn('no answer within 1 seconds', str(error))
        self.assertIn('Deleting the claim failed', error.__notes__[0])
        # What was asked for happens, and is for the next attempt to clear.
        blocked.release()
        self.assertTrue(libvirt_storage.wait_for(
            lambda: self.claims() and not daemon._hangs(URI)))
        self.claimed()
        self.assert_only_claimed()

    def test_directory_that_hangs_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        there = self.connected()
        self.check(there)
        blocked = self.dest.block(
            'conn.storagePoolCreateXML', name=f'nova-{uuids.server}')
        self.addCleanup(blocked.release)

        error = self.assertRaises(TimeoutError, there.claim)

        self.assertIn('no answer within 1 seconds', str(error))

    def test_claim_that_fails_leaves_nothing(self):
        there = self.connected()
        self.check(there)
        self.dest.fail('conn.storagePoolCreateXML', nth=2)

        self.assert_libvirt_error('injected failure', there.claim)

        self.assert_nothing_left()


class FilesTestCase(SiteTestCase):
    """What a migration makes on the destination, and how it goes away."""

    def setUp(self) -> None:
        super().setUp()
        self.there = self.claimed()
        self.disk_path = '/srv/disks/' + volume_name('disk')

    def copy(self) -> None:
        self.there.create(disk(), 1)
        self.there.create(file('disk.info'), 10)
        self.there.make_directory(file('swtpm', mode=0o755))
        self.there.make_directory(file('swtpm/deep', mode=0o700))
        self.there.create(file('swtpm/deep/state', mode=0o600), 10)

    def test_disk_belongs_to_nova(self):
        volume = self.there.create(disk(), 4097)

        self.assertEqual(self.disk_path, volume.path)
        made = self.dest.files[self.disk_path]
        self.assertEqual((NOVA['owner'], NOVA['group'], 0o644, 4097),
                         (made.owner, made.group, made.mode,
                          made.content.size))

    def test_pool_that_stopped_is_not_waited_for(self):
        self.dest.pools['disks'].active = False
        self.useFixture(fixtures.MockPatchObject(
            threads, 'sleep', side_effect=AssertionError('it waits')))

        error = self.assertRaises(
            libvirt.libvirtError, self.there.check_claim)

        self.assertIn("'disks' is not active", str(error))

    def test_file_belongs_to_nova(self):
        self.there.create(file('disk.info'), 10)

        made = self.dest.files[self.directory + '/disk.info']
        self.assertEqual((NOVA['owner'], NOVA['group'], 0o644),
                         (made.owner, made.group, made.mode))

    def test_directory_and_what_is_in_it_have_the_modes_given(self):
        self.copy()

        path = self.directory + '/swtpm/deep'
        self.assertEqual(NOVA | dict(mode=0o700),
                         vars(self.dest.directories[path]))
        self.assertEqual(0o600, self.dest.files[path + '/state'].mode)
        self.there.verify(file('swtpm/deep/state'), 10)

    def test_file_that_arrived(self):
        self.there.create(disk(), 4097)
        self.there.create(file('disk.config'), 2048)

        self.there.verify(disk(), 4097)
        self.there.verify(file('disk.config'), 2048)

    def test_file_of_another_size(self):
        for each, path in (
                (disk(), self.disk_path),
                (file('disk.config'), self.directory + '/disk.config')):
            self.there.create(each, 4097)
            self.dest.files[path].content.truncate(0)

            self.assert_raises(
                errors.StorageError, 'it has 0 bytes after 4097 '
                'were written', self.there.verify, each, 4097)

    def test_disk_that_lies_about_its_size(self):
        self.there.create(disk(), 4097)
        self.dest.files[self.disk_path].reported = dict(physical=5000)

        self.assert_raises(errors.StorageError, '5000 bytes',
                           self.there.verify, disk(), 4097)

    def test_disk_that_was_deleted_behind_libvirts_back(self):
        self.there.create(disk(), 4097)
        self.dest.remove_file(self.disk_path)

        self.assert_libvirt_error(
            'no storage vol', self.there.verify, disk(), 4097)

    def test_claim_that_was_deleted_fails_the_copy(self):
        self.there.create(disk(), 4097)
        self.dest.remove_file('/srv/disks/' + self.claims()[0])

        self.assert_raises(errors.Superseded, 'another attempt',
                           self.there.verify, disk(), 4097)

    def test_settle_keeps_the_files_and_the_claim(self):
        self.copy()

        self.there.settle([])

        self.assertEqual(['disks'], sorted(self.dest.pools))
        self.assertIn(self.directory + '/disk.info', self.dest.files)
        self.assertIn(self.disk_path, self.dest.files)
        self.assertEqual(1, len(self.claims()))

    def test_settle_fails_if_the_pool_of_the_directory_stays(self):
        self.copy()
        self.dest.fail('pool.destroy')

        self.assert_libvirt_error('injected failure', self.there.settle, [])

    def test_discard_removes_all_and_nothing_else(self):
        self.copy()

        self.there.discard()

        self.assert_nothing_left()
        self.assertTrue(all(connection.closed
                            for connection in self.dest.connections))

    def test_discard_after_settle(self):
        self.copy()
        self.there.settle([])

        self.there.discard()

        self.assert_nothing_left()

    def test_discard_after_the_link_was_cut(self):
        self.there.create(disk(), 1)
        self.dest.disconnect()
        self.assert_libvirt_error('socket is closed', self.there.create,
                                  disk('disk.eph0'), 1)
        self.dest.reconnect()

        self.there.discard()

        self.assert_nothing_left()
        self.assertEqual([URI, URI], self.hosts.opened)
        self.assertEqual([True, True],
                         [c.closed for c in self.dest.connections])

    def test_discard_of_what_was_never_copied(self):
        self.there.discard()

        self.assert_nothing_left()

    def test_discard_deletes_the_claim_last(self):
        self.copy()
        self.there.create(disk('z'), 1)
        claim, = self.claims()

        self.there.discard()

        deleted = [name for where, name in self.dest.calls
                   if where == 'vol.delete']
        self.assertEqual([claim, claim], deleted[-2:])
        self.assertEqual(9, len(deleted))

    def test_discard_asks_for_a_domain_right_before_it_deletes(self):
        self.copy()
        # Defined after the claim was read again.
        self.dest.call('conn.lookupByUUIDString',
                       lambda: self.dest.add_domain(uuids.server))
        before = self.state()

        self.assert_raises(
            errors.Superseded, 'has a domain', self.there.discard)

        self.assertEqual(before['files'], self.state()['files'])

    def test_discard_that_hangs_is_given_up(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        blocked = self.dest.block('vol.delete')
        self.addCleanup(blocked.release)

        error = self.assertRaises(TimeoutError, self.there.discard)

        self.assertIn('no answer within 1 seconds', str(error))

    def test_discard_that_cannot_connect(self):
        self.dest.open_error = TLS_ERROR

        self.assert_raises(
            errors.StorageError, 'not trusted', self.there.discard)

    def test_discard_can_be_repeated_until_it_succeeds(self):
        self.copy()
        for nth in range(1, 20):
            self.dest.faults.clear()
            fault = self.dest.fail('vol.delete', nth=nth)
            try:
                self.there.discard()
            except libvirt.libvirtError:
                self.assertEqual(1, len(self.claims()))
            if not fault.hits:
                break
        self.assert_nothing_left()


class DirectoryTestCase(SiteTestCase):
    """The site of a server without volumes: no pool, one claim."""

    uses_pool = False

    def setUp(self) -> None:
        super().setUp()
        self.dest.pools.clear()
        self.before = self.state()

    def test_no_pool_is_needed(self):
        there = self.claimed()

        self.assertEqual([], self.in_directory())
        self.assertEqual(1, len(self.claims()))
        self.assertEqual(NOVA | dict(mode=0o755),
                         vars(self.dest.directories[self.directory]))
        there.discard()
        self.assert_nothing_left()

    def test_settled_claim_has_another_name(self):
        there = self.claimed()
        there.create(file('disk'), 100)
        there.verify(file('disk'), 100)

        there.settle([])

        claim, = self.claims()
        self.assertTrue(claim.startswith(volume_name(layout.ARRIVED)), claim)
        self.assertCountEqual(['disk'], self.in_directory())
        self.assertEqual([], sorted(self.dest.pools))
        there.discard()
        self.assert_nothing_left()

    def test_superseded_attempt_touches_nothing(self):
        first = self.claimed()
        second = self.claimed()
        second.create(file('disk'), 100)
        before = self.state()

        for function, *args in (first.verify, file('disk'), 100), (
                first.discard,):
            self.assert_raises(
                errors.Superseded, 'another attempt', function, *args)

        self.assertEqual(before, self.state())
        second.verify(file('disk'), 100)
        second.settle([])

    def test_files_in_the_way(self):
        self.dest.add_file(self.directory + '/disk', b'whose?')

        self.assert_raises(
            errors.Refused, 'is there already', self.claimed)

    def test_claim_that_fails_leaves_nothing(self):
        there = self.connected()
        self.check(there)
        self.dest.fail('pool.createXML')

        self.assert_libvirt_error('injected failure', there.claim)

        self.assert_nothing_left()

    def test_nothing_to_discard(self):
        there = self.claimed()
        there.discard()

        there.discard()

        self.assert_nothing_left()


@ddt.ddt
class CrashTestCase(SiteTestCase):
    """Wherever an attempt stops, the next one clears what it left."""

    def copy(self) -> site.Site:
        there = self.claimed()
        if self.uses_pool:
            there.create(disk(), 100)
        there.create(file('disk.info'), 10)
        there.make_directory(file('swtpm', mode=0o700))
        there.create(file('swtpm/state', mode=0o600), 10)
        return there

    def attempt(self) -> None:
        """Fail in the end, after clearing what an attempt before left."""
        there = self.copy()
        there.settle([])
        there.discard()

    def attempt_twice(self) -> None:
        self.copy()
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

    def has_arrived(self) -> bool:
        """Whether the instance directory is one that no pool is made of."""
        return self.directory in self.dest.directories and any(
            layout.Claim.has_arrived(uuids.server, name)
            for name in self.claims())

    def clear_there(self) -> None:
        """Delete all there, and forget it, as nova-compute there does."""
        for found in self.dest.files, self.dest.directories:
            for path in list(found):
                if path.startswith(self.directory):
                    del found[path]
        for name in list(self.dest.pools):
            if name.startswith(f'nova-{uuids.server}'):
                del self.dest.pools[name]

    @ddt.data(True, False)
    def test_every_change_may_be_the_last(self, uses_pool):
        self.uses_pool = uses_pool
        self.attempt_twice()
        self.assert_nothing_left()
        stuck = []
        for count in range(len(self.dest.changes)):
            crashed_at = self.crash_after(count)
            try:
                if self.has_arrived():
                    self.assert_raises(
                        errors.Refused, 'is there already', self.attempt)
                    self.clear_there()
                self.attempt()
                self.assert_nothing_left()
            except Exception as error:
                stuck.append((count, crashed_at, str(error)))

        self.assertEqual([], stuck)
