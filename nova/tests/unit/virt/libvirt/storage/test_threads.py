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

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

from oslo_concurrency import processutils

from nova import test
from nova.tests.fixtures import privileged
from nova.virt.libvirt.storage import threads


class OffHubTestCase(test.NoDBTestCase):

    def test_result(self):
        self.assertEqual(
            (1, 2), threads.off_hub(lambda a, b: (a, b), 1, b=2))

    def test_error(self):
        def fail():
            raise ValueError('told')

        error = self.assertRaises(ValueError, threads.off_hub, fail)
        self.assertEqual('told', str(error))

    def test_stand_in_for_privsep_fails_off_the_hub(self):
        function = privileged.privileged(lambda: 1)
        self.assertEqual(1, function())
        if threads.get_eventlet() is None:
            self.assertEqual(1, threads.off_hub(function))
        else:
            self.assertRaises(AssertionError, threads.off_hub, function)

    def test_call_for_which_there_is_no_thread_leaves_nothing(self):
        if threads.get_eventlet() is None:
            self.skipTest('there is no hub')
        before = os.listdir('/proc/self/fd')
        with mock.patch.object(
                threads.native_threading().Thread, 'start',
                side_effect=RuntimeError("can't start new thread")):
            self.assertRaises(RuntimeError, threads.off_hub, lambda: 1)
        self.assertEqual(before, os.listdir('/proc/self/fd'))

    def test_programs_fail_off_the_hub(self):
        self.assertEqual(('', ''), processutils.execute('true'))
        if threads.get_eventlet() is None:
            threads.off_hub(processutils.execute, 'true')
        else:
            for call in threads.off_hub, self._within:
                self.assertRaises(
                    AssertionError, call, processutils.execute, 'true')

    @staticmethod
    def _within(function, *args):
        threads.off_hub(threads.within, 30, lambda: function(*args))

    def _count_hubs(self, function):
        """How many hubs eventlet makes for a call off the hub."""
        eventlet = threads.get_eventlet()
        if eventlet is None:
            self.skipTest('there is no hub')
        with mock.patch.object(
                eventlet.hubs, 'get_default_hub',
                side_effect=eventlet.hubs.get_default_hub) as made:
            threads.off_hub(function)
        return made.call_count

    def test_files_that_are_opened_make_no_hub(self):
        def write():
            with tempfile.TemporaryDirectory() as directory:
                os.close(os.open(directory, os.O_RDONLY))
                with tempfile.NamedTemporaryFile(dir=directory):
                    pass

        self.assertEqual(0, self._count_hubs(write))

    def test_a_call_that_waits_gets_a_hub(self):
        self.assertEqual(1, self._count_hubs(lambda: time.sleep(0.01)))

    def test_any_number_of_calls_may_block_at_once(self):
        # eventlet's tpool has 20 threads, which Nova's calls share.
        release = threads.native_threading().Event()
        self.addCleanup(release.set)
        entered = []

        def block():
            entered.append(None)
            release.wait(30)

        blocked = [threading.Thread(target=threads.off_hub, args=(block,))
                   for _ in range(64)]
        for thread in blocked:
            thread.start()
        while len(entered) < 64:
            time.sleep(0.01)

        started = time.monotonic()
        self.assertEqual(1, threads.off_hub(lambda: 1))
        self.assertLess(time.monotonic() - started, 10)
        release.set()
        for thread in blocked:
            thread.join(10)
            self.assertFalse(thread.is_alive())


class WithinTestCase(test.NoDBTestCase):

    def test_caller_may_give_up(self):
        release = threads.native_threading().Event()
        self.addCleanup(release.set)
        started = time.monotonic()

        error = self.assertRaises(
            threads.NoAnswer, threads.off_hub, threads.within, 30,
            release.wait, lambda: time.monotonic() > started + 0.1)

        self.assertLess(time.monotonic() - started, 10)
        self.assertTrue(error.thread.is_alive())

    def test_result_is_there_at_once(self):
        started = time.monotonic()
        self.assertEqual(3, threads.off_hub(threads.within, 30, lambda: 3))
        self.assertLess(time.monotonic() - started, 10)


# Its main thread waits, as nova-compute's does, and threads of ours set their
# signal masks all the time, as libvirt's client does.
WAITING = """
import ctypes
import os
import signal
import threading

from nova.virt.libvirt.storage import threads

handled = []


def handle(*_args):
    handled.append(None)
    os.write(1, b'.')
    if len(handled) == 50:
        os._exit(0)


def change_mask():
    set_mask = ctypes.CDLL(None).pthread_sigmask
    # libvirt blocks SIGCHLD, among others.
    mask = ctypes.create_string_buffer(
        (1 << signal.SIGCHLD - 1).to_bytes(128, 'little'))
    before = ctypes.create_string_buffer(128)
    while True:
        set_mask(signal.SIG_BLOCK, mask, before)
        set_mask(signal.SIG_SETMASK, before, None)


signal.signal(signal.SIGTERM, handle)
for name in 'first', 'second':
    threads.start(change_mask, name)
os.write(1, b'.')
threading.Event().wait()
"""


class StartTestCase(test.NoDBTestCase):

    def test_signals_are_left_to_the_main_thread(self):
        process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', WAITING],
            stdout=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        for _number in range(50):
            self.assertEqual(b'.', process.stdout.read(1))
            # Let the main thread fall asleep.
            time.sleep(0.02)
            process.terminate()
        self.assertEqual(b'.', process.stdout.read(1))
        self.assertEqual(0, process.wait(30))

    def test_calls_of_libvirt_get_none(self):
        mask = threads.off_hub(
            threads.within, 30,
            lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []))
        self.assertIn(signal.SIGTERM, mask)


class EventletTestCase(test.NoDBTestCase):

    def test_eventlet_where_it_has_patched_this_process(self):
        # As Nova's tests tell their own mode, in every release.
        threading_mode = os.environ.get(
            'OS_NOVA_DISABLE_EVENTLET_PATCHING', '').lower() in (
                '1', 'true', 'yes')
        self.assertEqual(threading_mode, threads.get_eventlet() is None)

    def test_eventlet_that_patched_nothing_is_not_used(self):
        eventlet = mock.Mock()
        eventlet.patcher.is_monkey_patched.return_value = False
        with mock.patch.dict('sys.modules', eventlet=eventlet):
            self.assertIsNone(threads.get_eventlet())

    def test_eventlet_is_not_imported(self):
        with mock.patch.dict('sys.modules'):
            sys.modules.pop('eventlet', None)
            self.assertIsNone(threads.get_eventlet())
            self.assertNotIn('eventlet', sys.modules)


class SpawnTestCase(test.NoDBTestCase):

    def test_the_caller_does_not_wait(self):
        release, done = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def work(*args):
            release.wait(30)
            self.arguments = args
            done.set()

        threads.spawn(work, 1, 2)
        self.assertFalse(done.is_set())
        release.set()
        self.assertTrue(done.wait(30))
        self.assertEqual((1, 2), self.arguments)
