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


import gc
from unittest import mock
import weakref

import ddt
import libvirt

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import threads

URI = 'qemu+tls://dest/system'
SECONDS = 0.2
VOLUME = """\
<volume><name>new</name><capacity>4</capacity>
<target><format type='raw'/></target></volume>
"""

TLS_ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC,
             'authentication failed: The certificate is not trusted')


class DaemonTestCase(test.NoDBTestCase):
    """A daemon of the host 'dest', with a pool and a volume."""

    def setUp(self):
        super().setUp()
        self.hosts = self.useFixture(libvirt_storage.LibvirtStorageFixture())
        self.host = self.hosts['dest']
        self.host.add_pool('disks', '/disks')
        self.host.add_volume('disks', 'disk', b'data')

    def _block(self, where, **kwargs):
        fault = self.host.block(where, **kwargs)
        self.addCleanup(fault.release)
        return fault

    def _wait_until_answered(self):
        self.assertTrue(libvirt_storage.wait_for(
            lambda: not daemon._hangs(URI)))


class OpenConnectionTestCase(DaemonTestCase):

    def test_keepalive_bounds_every_wait(self):
        self.flags(vol_upload_migration_keepalive_interval=7, group='libvirt')

        connection = daemon.open_connection(URI)

        self.assertEqual((7, daemon.KEEPALIVE_COUNT), connection.keepalive)
        self.assertEqual([URI], self.hosts.opened)

    def test_keepalive_can_start_later(self):
        connection = daemon.open_connection(URI, keepalive=False)
        self.assertIsNone(connection.keepalive)

        daemon.start_keepalive(connection)

        self.assertEqual((5, daemon.KEEPALIVE_COUNT), connection.keepalive)

    def test_nobody_is_asked_for_credentials(self):
        daemon.open_connection(URI)

        _uri, (kinds, callback, _opaque), flags = (
            libvirt.openAuth.call_args.args)
        self.assertIn(libvirt.VIR_CRED_PASSPHRASE, kinds)
        self.assertEqual(-1, callback([mock.sentinel.credential], None))
        self.assertEqual(0, flags)

    def test_refusal_is_libvirts_error(self):
        self.host.open_error = TLS_ERROR

        error = self.assertRaises(
            libvirt.libvirtError, daemon.open_connection, URI)

        self.assertEqual(TLS_ERROR[2], str(error))

    def test_daemon_that_does_not_answer(self):
        self.flags(vol_upload_migration_connect_timeout=1, group='libvirt')
        self._block('open')

        error = self.assertRaises(
            TimeoutError, daemon.open_connection, URI)

        self.assertEqual('no answer within 1 seconds', str(error))

    def test_waits_are_bounded_by_the_option(self):
        self.flags(vol_upload_migration_stall_timeout=1, group='libvirt')
        connection = daemon.open_connection(URI)
        self._block('conn.getLibVersion')

        error = self.assertRaises(TimeoutError, connection.getLibVersion)

        self.assertEqual('no answer within 1 seconds', str(error))


@ddt.ddt
class ConnectTestCase(DaemonTestCase):

    def setUp(self):
        super().setUp()
        self.daemon = daemon.Daemon('dest', URI)
        self.addCleanup(self.daemon.close)

    def test_connect(self):
        self.assertFalse(self.daemon.is_connected())

        self.daemon.connect()

        self.assertTrue(self.daemon.is_connected())
        self.assertEqual(9_000_000, self.daemon.version())
        self.assertEqual([], self.host.changes)

    def test_connection_is_an_error_before_and_after(self):
        for step in lambda: None, self.daemon.connect, self.daemon.close:
            step()
            if not self.daemon.is_connected():
                self.assertRaises(
                    errors.StorageError, getattr, self.daemon, 'connection')

    def test_connect_again_closes_the_old_connection(self):
        self.daemon.connect()

        self.daemon.connect()

        self.assertEqual([True, False],
                         [each.closed for each in self.host.connections])

    def test_refusal_says_what_to_do(self):
        self.host.open_error = TLS_ERROR

        error = self.assertRaises(errors.StorageError, self.daemon.connect)

        self.assertIn('cannot connect', error.reason)
        self.assertIn('not trusted', error.reason)
        self.assertTrue(error.remedy)

    def test_daemon_that_does_not_answer(self):
        self.flags(vol_upload_migration_connect_timeout=1, group='libvirt')
        self._block('open')

        error = self.assertRaises(errors.StorageError, self.daemon.connect)

        self.assertIn('cannot connect: no answer within 1 seconds',
                      error.reason)

    @ddt.data((7_000_000, False), (7_999_999, False), (8_000_000, True))
    @ddt.unpack
    def test_libvirt_has_to_be_new_enough(self, version, good):
        self.host.version = version

        if good:
            self.daemon.connect()
        else:
            error = self.assertRaises(errors.Refused, self.daemon.connect)
            self.assertIn('7.', str(error))
            self.assertIn('8.0.0', error.remedy)

    def test_domains(self):
        self.host.add_domain('its-uuid', name='its-name')
        self.daemon.connect()

        self.assertTrue(self.daemon.has_domain('its-uuid'))
        self.assertFalse(self.daemon.has_domain('its-name'))
        self.assertEqual('its-uuid', self.daemon.named_domain('its-name'))
        self.assertIsNone(self.daemon.named_domain('its-uuid'))

    @ddt.data('lookupByUUIDString', 'lookupByName')
    def test_daemon_that_knows_no_domains(self, lookup):
        self.daemon.connect()
        self.host.fail('conn.' + lookup, error=(
            libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_FROM_REMOTE,
            'this function is not supported by the connection driver'))

        self.assertFalse(self.daemon.has_domain('its-uuid'))
        self.assertIsNone(self.daemon.named_domain('its-name'))

    @ddt.data('lookupByUUIDString', 'lookupByName')
    def test_error_is_not_taken_for_a_missing_domain(self, lookup):
        self.daemon.connect()
        self.host.fail('conn.' + lookup, error=libvirt_storage.LOST_ERROR)

        def look_up():
            self.daemon.has_domain('its-uuid')
            self.daemon.named_domain('its-name')

        self.assertRaises(libvirt.libvirtError, look_up)

    def test_writing_has_a_connection_of_its_own(self):
        self.daemon.connect()

        with self.daemon.writing('/disks/disk') as volume:
            connection = self.host.connections[1]
            self.assertEqual('/disks/disk', volume.path())
            self.assertIsNone(connection.keepalive)

        self.assertEqual((5, daemon.KEEPALIVE_COUNT), connection.keepalive)
        self.assertTrue(connection.closed)
        self.assertTrue(self.daemon.is_connected())

    def test_link_that_is_lost_while_writing(self):
        self.daemon.connect()

        with self.assertRaises(libvirt.libvirtError):
            with self.daemon.writing('/disks/disk') as volume:
                self.host.disconnect()
                volume.info()

        # The other connection may seem to stand until its keepalive ends it.
        self.host.reconnect()
        self.assertFalse(self.daemon.is_connected())
        self.daemon.connect()
        self.assertTrue(self.daemon.is_connected())

    def test_writing_to_a_volume_that_is_gone_closes_the_connection(self):
        self.daemon.connect()

        with self.assertRaises(libvirt.libvirtError):
            with self.daemon.writing('/disks/other'):
                self.fail('There is no such volume.')

        self.assertTrue(self.host.connections[1].closed)


class UnansweredTestCase(DaemonTestCase):
    """A daemon that owes an answer is not asked for another one."""

    def setUp(self):
        super().setUp()
        self.flags(vol_upload_migration_stall_timeout=1,
                   vol_upload_migration_connect_timeout=1, group='libvirt')
        self.connection = daemon.open_connection(URI)

    def _hang(self, where='conn.getLibVersion'):
        """Have the daemon owe an answer until the fault is released."""
        fault = self._block(where)
        self.assertRaises(TimeoutError, self.connection.getLibVersion)
        return fault

    def _count(self, where):
        return [call for call, _name in self.host.calls].count(where)

    def _assert_not_asked(self, function, *args):
        error = self.assertRaises(TimeoutError, function, *args)
        self.assertIn('an earlier call has got no answer yet', str(error))

    def test_one_request_waits_at_most(self):
        pool = self.connection.storagePoolLookupByName('disks')
        self._hang()

        for _ in range(30):
            self._assert_not_asked(self.connection.getLibVersion)
            self._assert_not_asked(pool.refresh, 0)
            self._assert_not_asked(daemon.open_connection, URI)

        self.assertEqual(1, self._count('conn.getLibVersion'))
        self.assertEqual(0, self._count('pool.refresh'))
        self.assertEqual(1, self._count('open'))

    def test_new_connection_says_so(self):
        self._hang()

        error = self.assertRaises(
            errors.StorageError, daemon.Daemon('dest', URI).connect)

        self.assertIn('an earlier call has got no answer yet', error.reason)

    def test_daemon_is_asked_again_once_it_has_answered(self):
        fault = self._hang()
        self._assert_not_asked(self.connection.getLibVersion)

        fault.release()
        self._wait_until_answered()

        self.assertEqual(9_000_000, self.connection.getLibVersion())
        daemon.open_connection(URI)

    def test_attempt_to_connect_that_hung_keeps_no_other_from_it(self):
        # A link that was down, for example: no worker of the daemon waits.
        self._block('open')
        self.assertRaises(TimeoutError, daemon.open_connection, URI)

        daemon.open_connection(URI)

    def test_daemon_may_hang_more_than_once(self):
        for _ in range(2):
            fault = self._hang()
            self._assert_not_asked(self.connection.getLibVersion)
            fault.release()
            self._wait_until_answered()
            self.host.faults.clear()

    def test_other_daemons_are_asked(self):
        self._hang()

        here = daemon.open_connection('qemu:///system')

        self.assertEqual(9_000_000, here.getLibVersion())

    def test_calls_that_ask_nobody_go_on(self):
        pool = self.connection.storagePoolLookupByName('disks')
        self._hang()

        self.assertEqual('disks', pool.name())
        self.assertEqual(1, self.connection.isAlive())
        self.assertEqual(1, pool.connect().isAlive())

    def test_close_waits_for_a_daemon_that_hangs_no_longer_than_it_must(self):
        closing = threads.native_threading().Event()
        self.addCleanup(closing.set)
        raw = mock.Mock()
        raw.close.side_effect = lambda: closing.wait(30)
        connection = daemon.Bounded(raw, URI, lambda: 30)
        self._hang()

        with mock.patch.object(threads, 'within',
                               side_effect=threads.within) as within:
            connection.close()

        within.assert_called_once_with(daemon.CLOSE_SECONDS, mock.ANY)
        self.assertLess(daemon.CLOSE_SECONDS, 1)
        raw.close.assert_called_once_with()

    def test_close_that_hangs_is_not_an_answer_that_is_owed(self):
        raw = mock.Mock()
        closing = threads.native_threading().Event()
        self.addCleanup(closing.set)
        raw.close.side_effect = lambda: closing.wait(10)

        daemon.Bounded(raw, URI, lambda: SECONDS).close()

        self.assertEqual(9_000_000, self.connection.getLibVersion())


class BoundedTestCase(DaemonTestCase):

    def setUp(self):
        super().setUp()
        self.connection = daemon.Bounded(
            self.host.connect(), URI, lambda: SECONDS)

    def _pool(self):
        return self.connection.storagePoolLookupByName('disks')

    def _assert_bounded(self, where, function, *args):
        fault = self._block(where)
        error = self.assertRaises(TimeoutError, function, *args)
        self.assertEqual('no answer within 0.2 seconds', str(error))
        fault.release()

    def test_results(self):
        self.assertEqual('disks', self._pool().name())
        self.assertEqual(['disk'], self._pool().listVolumes())
        self.assertEqual(4, self._pool().storageVolLookupByName(
            'disk').info()[1])

    def test_connection(self):
        self._assert_bounded('conn.storagePoolLookupByName', self._pool)

    def test_pool(self):
        self._assert_bounded('pool.refresh', self._pool().refresh, 0)

    def test_volume(self):
        volume = self._pool().storageVolLookupByName('disk')
        self._assert_bounded('vol.delete', volume.delete, 0)

    def test_every_volume_of_a_list(self):
        volume, = self._pool().listAllVolumes(0)
        self._assert_bounded('vol.delete', volume.delete, 0)

    def test_connection_of_a_volume(self):
        volume = self._pool().storageVolLookupByName('disk')
        self._assert_bounded('conn.getLibVersion',
                             volume.connect().getLibVersion)

    def test_what_was_asked_for_happens_later(self):
        self._assert_bounded(
            'pool.createXML', self._pool().createXML, VOLUME, 0)
        self.assertTrue(libvirt_storage.wait_for(
            lambda: 'new' in self.host.volume_names('disks')))

    def test_errors_are_those_of_libvirt(self):
        error = self.assertRaises(
            libvirt.libvirtError, self.connection.storagePoolLookupByName,
            'other')
        self.assertEqual(
            libvirt.VIR_ERR_NO_STORAGE_POOL, error.get_error_code())

    def test_an_error_holds_on_to_nothing_once_it_is_handled(self):
        # To free the last volume of a connection is to ask its daemon, which
        # no garbage collection should do in whatever thread it happens to be.
        def fail(volume):
            raise ValueError(volume)

        class Volume:
            pass

        volume = Volume()
        freed = weakref.ref(volume)
        gc.disable()
        self.addCleanup(gc.enable)
        with self.assertRaises(ValueError):
            threads.within(10, lambda given=volume: fail(given))
        del volume
        self.assertIsNone(freed())

    def test_what_comes_late_is_freed_where_it_comes(self):
        # A connection to a daemon that hangs, for example: to close it is to
        # ask that daemon.
        class Connection:
            pass

        native = threads.native_threading()
        answer, freed = native.Event(), native.Event()

        def connect():
            answer.wait(10)
            connection = Connection()
            weakref.finalize(connection, freed.set)
            return connection

        try:
            threads.within(SECONDS, connect)
        except TimeoutError as error:
            kept = error
        answer.set()
        self.assertTrue(freed.wait(10), kept)

    def test_pools_and_volumes_are_freed_before_the_connection_is_closed(self):
        # The connection stays open as long as there is one of them.
        freed = []

        class Object:
            def __init__(self, name):
                self.lookup = lambda: Object(name + 1)
                self.close = lambda: freed.append('closed')
                weakref.finalize(self, freed.append, name)

        connection = daemon.Bounded(Object(0), URI, lambda: 10)
        pool = connection.lookup()
        volume = pool.lookup()
        gc.disable()
        self.addCleanup(gc.enable)
        connection.close()
        self.assertEqual({1, 2}, set(freed[:2]))
        self.assertEqual(['closed', 0], freed[2:])
        self.assertRaises(AttributeError, lambda: volume.lookup)

    def test_a_close_that_hangs_is_no_error(self):
        closing = threads.native_threading().Event()
        raw = mock.Mock()
        raw.close.side_effect = lambda: closing.wait(10)
        self.addCleanup(closing.set)
        daemon.Bounded(raw, URI, lambda: SECONDS).close()
        raw.close.assert_called_once_with()

    def test_streams_are_left_alone(self):
        self.assertIsInstance(self.connection.newStream(0),
                              libvirt_storage.FakeStream)
