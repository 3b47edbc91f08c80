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

"""Many migrations at once, in both concurrency modes of nova-compute."""

import os
import threading
import time

import libvirt
from oslo_utils.fixture import uuidsentinel as uuids

from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt.storage import layout

# More than the threads of eventlet's tpool, which are 20.
SERVERS = 30


class ManyTestCase(test_storage_migrate.DriverTestCase):

    def setUp(self):
        super().setUp()
        self.paths = {}
        self.disk_info.side_effect = lambda instance, *args: [
            {'path': self.paths[instance.uuid], 'type': 'qcow2'}]
        self.moving = [self._make_server(number)
                       for number in range(SERVERS)]
        # Copies stand still, each in its native threads, as they do where
        # the destination's disk hangs.
        self.blocked = self.dest.block('stream.send', times=None)
        self.addCleanup(self.blocked.release)
        self.failures = []

    def _make_server(self, number):
        instance = self._instance()
        instance.uuid = getattr(uuids, f'server_{number}')
        places = layout.Layout.of(instance)
        os.mkdir(places.directory)
        self.source.add_volume(
            'nova-disks', places.volume_name('disk'),
            libvirt_storage.Content.draw('A-B-'))
        path = places.volume_path('disk')
        self.paths[instance.uuid] = path
        with open(path, 'wb'):
            pass
        layout.write_record(places.record_path, {path: 'qcow2'})
        return instance

    def _migrate_one(self, instance):
        try:
            self._migrate(instance=instance)
        except Exception as error:
            self.failures.append(error)

    def _call_libvirt(self):
        """Call libvirt as Nova does, with eventlet over its tpool.

        :returns: the seconds until the answer
        """
        nova = self.driver._host._wrap_libvirt_proxy(
            libvirt.open('qemu:///system'))
        started = time.monotonic()
        nova.storagePoolLookupByName('nova-disks')
        return time.monotonic() - started

    def test_libvirt_answers_nova_while_all_copy(self):
        migrations = [
            threading.Thread(target=self._migrate_one, args=(instance,))
            for instance in self.moving]
        for migration in migrations:
            migration.start()
        self.assertTrue(libvirt_storage.wait_for(
            lambda: self.blocked.hits >= SERVERS or self.failures, 30))
        self.assertEqual([], self.failures)

        answers = threading.Event()
        seconds = []

        def call():
            seconds.append(self._call_libvirt())
            answers.set()

        threading.Thread(target=call, daemon=True).start()
        self.assertTrue(answers.wait(5))
        self.assertLess(seconds[0], 1)

        self.blocked.release()
        for migration in migrations:
            migration.join(30)
            self.assertFalse(migration.is_alive())
        self.assertEqual([], self.failures)
        self.assertEqual(
            {layout.Layout.of(instance).volume_name('disk')
             for instance in self.moving},
            {name for name in self.dest.volume_names('nova-disks')
             if name.endswith('_disk')})
