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

import libvirt

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import bounded
from nova.virt.libvirt.storage import threads

SECONDS = 0.2
VOLUME = """\
<volume><name>new</name><capacity>4</capacity>
<target><format type='raw'/></target></volume>
"""


class BoundedTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        hosts = self.useFixture(libvirt_storage.LibvirtStorageFixture())
        self.host = hosts['dest']
        self.host.add_pool('disks', '/disks')
        self.host.add_volume('disks', 'disk', b'data')
        self.connection = bounded.Bounded(self.host.connect(), SECONDS)

    def _pool(self):
        return self.connection.storagePoolLookupByName('disks')

    def _assert_bounded(self, where, function, *args):
        fault = self.host.block(where)
        self.addCleanup(fault.release)
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

        connection = bounded.Bounded(Object(0), 10)
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
        bounded.Bounded(raw, SECONDS).close()
        raw.close.assert_called_once_with()

    def test_streams_are_left_alone(self):
        self.assertIsInstance(self.connection.newStream(0),
                              libvirt_storage.FakeStream)
