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

import functools
import os
import shutil
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import nvram
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage import transfer

HERE = 'qemu:///system'
THERE = 'qemu+tls://dest/system'

# What Nova shows of the message of a fault.
FAULT_LENGTH = 255


class Watch:
    """Notes what a transfer tells."""

    def __init__(self):
        self.totals = []
        self.noted = {}
        self.results = {}
        self.losses = []

    def begin(self, total):
        self.totals.append(total)

    def note(self, name, done, wire):
        assert name not in self.results
        self.noted[name] = done

    def end(self, name, result):
        self.results[name] = result

    def lose(self, error, seconds):
        self.losses.append((error, seconds))


class TransferTestCase(test.NoDBTestCase):
    """A server with a file of each kind, from 'source' to 'dest'."""

    def setUp(self):
        super().setUp()
        self.flags(host='source')
        self.hosts = self.useFixture(libvirt_storage.LibvirtStorageFixture())
        self.source, self.dest = self.hosts['source'], self.hosts['dest']
        self.pool_path, self.instances, self.vtpm = (
            self.useFixture(fixtures.TempDir()).path for _ in range(3))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.utils.VTPM_DIR', self.vtpm))
        self.source.add_pool('disks', self.pool_path)
        self.dest.add_pool('disks', '/srv/disks')
        self.dest.add_directory(self.instances)
        self.places = layout.Layout(
            uuids.server, self.pool_path,
            os.path.join(self.instances, uuids.server))
        os.mkdir(self.places.directory)
        self.contents = {}
        self.formats = {}
        self.files = []
        self._add_disk('disk', b'root' * 500_000)
        self._add_disk('disk.eph0', b'ephemeral')
        for name in 'disk.config', 'kernel', 'ramdisk':
            self._add_file(name, f'its {name}'.encode())
        layout.write_record(self.places.record_path, self.formats)
        self._add_vtpm()
        self.transfer = self._new()

    def _add_disk(self, disk, data):
        name, path = (self.places.volume_name(disk),
                      self.places.volume_path(disk))
        self._write(path, data)
        self.source.add_volume('disks', name, data)
        self.files.append(layout.File(name, layout.POOL, path, 'raw'))
        self.contents['/srv/disks/' + name] = data
        self.formats[path] = 'raw'

    def _add_file(self, name, data):
        path = os.path.join(self.places.directory, name)
        self._write(path, data)
        self.files.append(layout.File(name, layout.DIRECTORY, path))
        self.contents[path] = data

    def _add_vtpm(self):
        os.mkdir(self.places.vtpm_path)
        self.source.add_directory(self.places.vtpm_path, mode=0o711)
        self.source.add_directory(self.places.vtpm_path + '/tpm2', mode=0o700)
        state = os.path.join('tpm2', 'tpm2-00.permall')
        self.source.add_file(os.path.join(self.places.vtpm_path, state),
                             b'secret', mode=0o600)
        self.contents[os.path.join(
            self.places.saved_vtpm_path, uuids.server, state)] = b'secret'

    def _write(self, path, data):
        with open(path, 'wb') as file:
            file.write(data)

    def _new(self, uri=THERE, **kwargs):
        claim = layout.Claim.new(uuids.server)
        sites = [site.Site(daemon.Daemon(host, uri), self.places, 'disks',
                           claim)
                 for host, uri in (('source', HERE), ('dest', uri))]
        new = transfer.Transfer(
            *sites, self.files, 'instance-00000001', **kwargs)
        self.addCleanup(new.close)
        return new

    def _claimed(self):
        self.transfer.check()
        self.transfer.claim()

    def _run(self, **kwargs):
        self._claimed()
        self.transfer.run(**kwargs)

    def _arrived(self):
        """What is of the server at the destination, by path."""
        return {path: file.content.read(0, file.content.size)
                for path, file in self.dest.files.items()}

    def _assert_fails(self, *texts, function=None):
        error = self.assertRaises(
            errors.HostError, function or self.transfer.run)
        for text in texts:
            self.assertEqual(1, str(error).count(text), (text, str(error)))
        self.assertTrue(error.remedy, error)
        return error


@ddt.ddt
class RunTestCase(TransferTestCase):

    def test_every_file_arrives(self):
        self._run()

        arrived = self._arrived()
        record = jsonutils.loads(arrived.pop(self.places.record_path))
        for claim in set(arrived) - set(self.contents):
            self.assertIsNotNone(layout.Claim.parse(
                uuids.server, os.path.basename(claim)))
            self.assertEqual(b'', arrived.pop(claim))
        self.assertEqual(self.contents, arrived)
        self.assertEqual({
            '/srv/disks/' + self.places.volume_name(disk): 'raw'
            for disk in ('disk', 'disk.eph0')}, record)
        self.assertEqual(['disks'], list(self.dest.pools))
        state = f'nova-{uuids.server}-state'
        self.assertEqual({'disks', state, state + '-tpm2'},
                         set(self.source.pools))
        self.transfer.close()
        self.assertEqual(['disks'], list(self.source.pools))

    def test_state_of_a_vtpm_keeps_its_modes(self):
        self._run()

        top = os.path.join(self.places.saved_vtpm_path, uuids.server)
        self.assertEqual(
            [0o755, 0o711, 0o700],
            [self.dest.directories[path].mode for path in (
                self.places.saved_vtpm_path, top, top + '/tpm2')])
        self.assertEqual(
            0o600, self.dest.files[top + '/tpm2/tpm2-00.permall'].mode)

    def test_check_changes_nothing_and_claim_comes_before_all_else(self):
        self.transfer.check()
        self.assertEqual([], [call for call in self.dest.changes
                              if call[0] == 'pool.createXML'])

        self.transfer.claim()
        self.transfer.run()

        self.assertEqual([], [call for call in self.source.changes if
                              call[0] in ('pool.createXML', 'vol.delete')])

    def test_files_are_made_copied_and_looked_up_again_one_by_one(self):
        calls = mock.Mock()
        here, there = (mock.Mock(spec=site.Site) for _ in range(2))
        here.layout = there.layout = self.places
        here.daemon = there.daemon = mock.Mock(spec=daemon.Daemon)
        here.vtpm.return_value = [
            layout.File('swtpm', layout.DIRECTORY, '/', is_directory=True)]
        here.length.return_value = 4
        there.settle.return_value = []
        calls.attach_mock(there, 'there')
        move = transfer.Transfer(here, there, self.files[:1], 'name')
        with mock.patch.object(move, '_upload') as upload:
            calls.attach_mock(upload, 'upload')
            move.run()

        disk, record = self.files[0], there.verify.call_args_list[1].args[0]
        self.assertEqual(layout.RECORD, record.name)
        self.assertEqual([
            mock.call.there.create(disk, 4, False),
            mock.call.upload(mock.ANY, disk, 4, mock.ANY),
            mock.call.there.verify(disk, 4),
            mock.call.there.make_directory(here.vtpm.return_value[0]),
            mock.call.there.create(record, 4, False),
            mock.call.upload(mock.ANY, record, 4, mock.ANY),
            mock.call.there.verify(record, 4),
            mock.call.there.check_claim(),
            mock.call.there.settle([])], calls.mock_calls)

    def test_watch_is_told_of_every_byte(self):
        watch = Watch()

        self._run(watch=watch)

        lengths = {os.path.basename(path): len(data)
                   for path, data in self._arrived().items() if data}
        self.assertEqual([sum(lengths.values())], watch.totals)
        self.assertEqual(lengths, {
            os.path.basename(name): result.length
            for name, result in watch.results.items()})
        self.assertEqual(watch.noted, {
            name: result.length for name, result in watch.results.items()})

    def test_checksum_is_of_every_file(self):
        self.flags(vol_upload_migration_verify='checksum', group='libvirt')

        self._run()

        read = {name for call, name in self.dest.calls
                if call == 'vol.download'}
        self.assertEqual({os.path.basename(path) for path, data in
                          self._arrived().items() if data}, read)

    @ddt.data('disk', 'disk.config', 'kernel', 'disk.info',
              'tpm2-00.permall')
    def test_file_that_differs_is_found_by_its_checksum(self, name):
        self.flags(vol_upload_migration_verify='checksum', group='libvirt')
        self._claimed()
        path, = self._paths_there(name)
        self.dest.call(
            'vol.download', lambda: self.dest.files[path].content.write(
                0, b'\0'), name=os.path.basename(path))

        self._assert_fails('differs', name)

    def _paths_there(self, name):
        return [path for path in [*self.contents, self.places.record_path]
                if os.path.basename(path).removeprefix(
                    self.places.prefix) == name]

    @ddt.data('disk', 'disk.eph0', 'disk.config', 'kernel', 'ramdisk',
              'disk.info', 'tpm2-00.permall')
    def test_file_that_is_cut_at_the_end_of_its_upload(self, name):
        self._claimed()
        path, = self._paths_there(name)
        self.dest.call(
            'stream.finish',
            lambda: self.dest.files[path].content.truncate(0),
            name=os.path.basename(path))

        self._assert_fails(
            'has 0 bytes after', 'host dest', f'({THERE})')

    @ddt.data('disk', 'disk.config', 'disk.info')
    def test_file_that_is_deleted_at_the_end_of_its_upload(self, name):
        self._claimed()
        path, = self._paths_there(name)
        self.dest.call('stream.finish', lambda: self.dest.remove_file(path),
                       name=os.path.basename(path))

        self._assert_fails('host dest', f'({THERE})')

    def test_empty_file_is_made_and_looked_up(self):
        self._write(os.path.join(self.places.directory, 'kernel'), b'')

        self._run()

        self.assertEqual(
            b'', self._arrived()[self.places.directory + '/kernel'])
        self.assertNotIn(('vol.upload', 'kernel'), self.dest.calls)

    def test_long_file_has_a_connection_of_its_own(self):
        self.assertGreater(len(b'root' * 500_000), transfer.SHORT_BYTES)

        self._run()

        # One for the check and the short files, one for the disk.
        self.assertEqual(2, self.hosts.opened.count(THERE))
        self.assertEqual(1, self.hosts.opened.count(HERE))

    def test_keepalive_begins_where_a_copy_pauses(self):
        self._claimed()
        with mock.patch.object(stream, 'copy') as copy:
            def pause(*args, paused, **kwargs):
                writing = self.dest.connections[-1]
                self.assertIsNone(writing.keepalive)
                paused()
                # Longer than the default of reconnect_timeout.
                self.assertEqual((5, 62), writing.keepalive)
                raise test.TestingException

            copy.side_effect = pause
            error = self.assertRaises(errors.HostError, self.transfer.run)
        self.assertIsInstance(error.__cause__, test.TestingException)

    def test_copy_that_is_cancelled(self):
        cancel = threads.native_threading().Event()
        cancel.set()
        self._claimed()

        self.assertRaises(errors.Cancelled, self.transfer.run, cancel)

        self.transfer.discard()
        self.assertEqual([], self.dest.volume_names('disks'))
        self.assertEqual([], self.dest.open_streams)

    def test_discard_leaves_nothing(self):
        self._run()

        self.transfer.discard()

        self.assertEqual({}, self._arrived())
        self.assertNotIn(self.places.directory, self.dest.directories)

    def test_shared_storage_is_not_claimed(self):
        with mock.patch.object(site.Site, '_find_shared', return_value=True):
            self.transfer.check()
        self.transfer.claim()
        self.transfer.discard()

        self.assertEqual({}, self._arrived())

    def _empty(self, has_variables):
        """A server without any file, with or without UEFI variables."""
        self.files = []
        os.unlink(self.places.record_path)
        shutil.rmtree(self.places.vtpm_path)
        self.transfer = self._new(has_variables=has_variables)
        self._claimed()

    def test_variables_alone_are_a_reason_to_copy(self):
        self._empty(has_variables=True)
        variables = nvram.as_file(b'variables')
        self.transfer.run(late=[variables])
        path = self.places.nvram_path
        self.assertEqual(b'variables', self._arrived()[path])
        self.assertEqual(
            {path: layout.digest(b'variables')}, self.transfer.heads)

    def test_nothing_is_made_for_a_server_without_files(self):
        self._empty(has_variables=False)
        self.transfer.run()
        self.assertEqual({}, self._arrived())

    def test_variables_that_nobody_expected_are_not_dropped(self):
        self._empty(has_variables=False)
        self._assert_fails(function=functools.partial(
            self.transfer.run, late=[nvram.as_file(b'variables')]))

    def test_needed_room_is_what_the_files_take_up_here(self):
        with mock.patch.object(site.Site, 'check') as check:
            self.transfer.check()
        places, name, needed = check.call_args.args
        self.assertEqual(self.pool_path, places.pool_path)
        self.assertEqual('instance-00000001', name)
        self.assertEqual({
            place: sum(os.stat(file.path).st_blocks * 512
                       for file in self.files if file.place == place)
            for place in (layout.POOL, layout.DIRECTORY)}, needed)
        self.assertGreater(needed[layout.POOL], 1_900_000)


class FailureTestCase(TransferTestCase):
    """Each error names host, URI and file once, and says what to do."""

    def test_source_that_cannot_be_reached(self):
        self.source.open_error = libvirt_storage.DEFAULT_ERROR

        self._assert_fails('host source', f'({HERE})', 'injected failure',
                           function=self.transfer.check)

    def test_destination_that_cannot_be_reached(self):
        self.dest.open_error = libvirt_storage.DEFAULT_ERROR

        self._assert_fails('host dest', f'({THERE})', 'injected failure',
                           function=self.transfer.check)

    def test_refusal(self):
        self.dest.add_domain(uuids.server)

        error = self._assert_fails(
            'host dest', f'({THERE})', 'a domain with uuid',
            function=self.transfer.check)

        self.assertIsInstance(error.__cause__, errors.Refused)

    def test_claim_that_fails(self):
        self.transfer.check()
        self.dest.fail('pool.createXML')

        self._assert_fails('host dest', f'({THERE})', 'injected failure',
                           transfer._LOG_REMEDY, function=self.transfer.claim)

    def test_discard_of_what_is_another_attempt_s(self):
        self._claimed()
        second = self._new()
        second.check()
        second.claim()

        error = self._assert_fails(
            'host dest', 'another attempt', function=self.transfer.discard)

        self.assertIsInstance(error.__cause__, errors.Superseded)

    def test_copy_that_fails(self):
        self._claimed()
        self.dest.fail('stream.send', after=units.Mi)

        error = self._assert_fails(
            self.places.volume_name('disk') + ' to host dest', f'({THERE})',
            'destination failed after', 'injected failure',
            transfer._LOG_REMEDY)

        self.assertEqual(('dest', THERE, self.places.volume_name('disk')),
                         (error.host, error.uri, error.file))

    def test_source_file_that_is_gone(self):
        self._claimed()
        os.unlink(os.path.join(self.places.directory, 'kernel'))

        self._assert_fails('No such file', transfer._FILE_REMEDY)

    def test_link_that_is_lost(self):
        self.flags(vol_upload_migration_reconnect_timeout=0, group='libvirt')
        self.transfer = self._new()
        self._claimed()
        self.dest.call('stream.send', self.dest.disconnect)

        self._assert_fails('the connection was lost')

    def test_daemon_that_hangs(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        self._claimed()
        blocked = self.dest.block('pool.createXML')
        self.addCleanup(blocked.release)

        self._assert_fails('no answer within 1 seconds',
                           transfer._ALIVE_REMEDY)

    def test_record_that_is_broken(self):
        self._claimed()
        self._write(self.places.record_path, b'{')

        error = self._assert_fails('host source', 'Write it anew')
        self.assertIn('empty or broken record of formats', error.reason)


@ddt.ddt
class MessageTestCase(TransferTestCase):
    """What Nova shows as a whole, in the worst cases that are real."""

    # Linux has hosts' names of up to 64 characters.
    HOST = 'compute-0123.rack-17.az-frankfurt-2.cloud.customer.example.com'
    REMEDIES = (transfer._ALIVE_REMEDY, transfer._LOG_REMEDY,
                transfer._FILE_REMEDY)

    def _files(self):
        return [
            self.places.volume_name('disk.eph10'),
            os.path.join('swtpm', uuids.server, 'tpm2', 'tpm2-00.permall'),
            'disk.config', '']

    def _assert_complete(self, message, error, *texts):
        self.assertLessEqual(len(message), FAULT_LENGTH, message)
        for text in (error.uri, error.host, error.remedy, *texts):
            self.assertIn(text, message)

    @ddt.data('dest', '2001:db8:1234:5678:9abc:def0:1234:5678', HOST)
    def test_errors_of_a_copy(self, host):
        uri = f'qemu+tls://{host}/system'
        if ':' in host:
            uri = f'qemu+tls://[{host}]/system'
        reason = str(errors.CopyError(
            'destination', '/srv/disks/' + uuids.server, 17_592_186_044_416,
            'internal error: received hangup event on socket while waiting '
            'for the reply to a request of the stream ' + 'x' * 300))
        for file in self._files():
            for remedy in self.REMEDIES:
                error = errors.HostError(host, uri, reason, remedy, file)
                for wrapper in (exception.MigrationError,
                                exception.MigrationPreCheckError):
                    message = wrapper(reason=str(error)).format_message()
                    self._assert_complete(
                        message, error, file[-10:], 'dest')

    def test_refusals(self):
        cases = [
            f'volume /var/lib/libvirt/images/nova-disks/{uuids.server}'
            f'-resize_disk.eph0 is in the way',
            f'another domain there, {uuids.server}, has the name '
            f'instance-0000ffff',
            f'both hosts share instance directory '
            f'/var/lib/nova/instances/{uuids.server} and not storage pool '
            f'nova-disks']
        for reason in cases:
            error = errors.HostError(
                self.HOST, f'qemu+tls://{self.HOST}/system', reason,
                'Find out whose it is, and delete it if it is not needed.')
            message = exception.MigrationPreCheckError(
                reason=str(error)).format_message()
            self._assert_complete(message, error)

    def test_short_messages_are_whole(self):
        error = errors.HostError('dest', THERE, 'it burns', 'Put it out.',
                                 'disk')
        self.assertEqual(f'disk to host dest ({THERE}): it burns. '
                         f'Put it out.', str(error))

    def test_uri_without_the_host(self):
        error = errors.HostError(
            'dest', 'qemu+ext://relay/system?command=' + 'c' * 100, 'x' * 300,
            'Put it out.', 'disk')
        self.assertLessEqual(len(str(error)), errors.MESSAGE_LENGTH)
        self.assertIn('host dest (qemu+ext://relay', str(error))

    def test_nothing_makes_a_message_too_long(self):
        error = errors.HostError('h' * 250, f'qemu+tls://{"h" * 250}/system',
                                 'r' * 400, 'Do it. ' * 60, 'f' * 200)
        self.assertLessEqual(len(str(error)), errors.MESSAGE_LENGTH)
