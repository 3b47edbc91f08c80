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

import functools
import itertools
import time
from unittest import mock

import fixtures
from oslo_utils import units

from nova import context as nova_context
from nova import objects
from nova.tests.live import moves
from nova.tests.live import test_transfer
from nova.virt.libvirt.storage import progress
from nova.virt.libvirt.storage import stream

RATE = 8 * units.Mi
DATA = 32 * units.Mi
INTERVAL = 0.5


class ProgressTestCase(test_transfer.TransferTestCase):
    """How far a copy is that takes four seconds over a real connection."""

    def setUp(self):
        super().setUp()
        objects.register_all()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.progress.INTERVAL', INTERVAL))
        self.instance = objects.Instance(
            uuid=self.uuid, progress=0,
            migration_context=objects.MigrationContext(migration_id=1))
        self.percents = []
        self.useFixture(fixtures.MockPatchObject(
            objects.Instance, 'save', side_effect=self._note_percent))
        self.figures = []
        self.migration = objects.Migration(id=1)
        self.useFixture(fixtures.MockPatchObject(
            objects.Migration, 'get_by_id', return_value=self.migration))
        self.useFixture(fixtures.MockPatchObject(
            objects.Migration, 'save', side_effect=self._note_figures))

    def _note_percent(self, expected_task_state):
        self.percents.append(self.instance.progress)

    def _note_figures(self):
        self.figures.append((
            time.monotonic(), self.migration.disk_total,
            self.migration.disk_processed, self.migration.disk_remaining))

    def _watch(self):
        """Copy a disk of data with a hole behind it; return the log."""
        self.size = DATA + 2 * units.Mi
        self._make_disk(self.size, [(0, DATA)])
        self.bandwidth = stream.Bandwidth(RATE)
        move = self._start()
        watch = progress.Progress(
            nova_context.get_admin_context(), self.instance, 'dest')
        results = moves.Watch()
        end = watch.end

        def note(name, result):
            results.end(name, result)
            end(name, result)

        watch.end = note
        with mock.patch.object(progress, 'LOG') as log:
            watch.watch(functools.partial(move.run, None, watch))
        self.result = results.results[self.volume]
        self.size += results.results['disk.info'].length
        return [call.args for call in log.info.call_args_list]

    def test_progress_rises_with_the_bytes_and_is_saved_seldom(self):
        self._watch()
        self._assert_arrived()
        reports = int(self.result.seconds / INTERVAL)
        self.assertGreaterEqual(reports, 6)
        for saves in self.percents, self.figures:
            self.assertLessEqual(reports - 1, len(saves))
            self.assertLessEqual(len(saves), reports + 2)
        self.assertEqual(sorted(set(self.percents)), self.percents)
        self.assertEqual(100, self.percents[-1])
        self.assertEqual((self.size, self.size, 0), self.figures[-1][1:])
        copying = self.figures[:-1]
        for first, second in itertools.pairwise(copying):
            self.assertEqual(self.size, first[2] + first[3])
            self.assertGreater(second[2], first[2])
        # One report may come late on a busy machine.
        rate = ((copying[-1][2] - copying[0][2]) /
                (copying[-1][0] - copying[0][0]))
        self.assertAlmostEqual(RATE, rate, delta=0.15 * RATE)

    def test_log_tells_the_rate_and_the_time_left(self):
        log = [values for _message, values in self._watch()]
        # A report may come between the disk and the record.
        told = [values for values in log if 'left' in values]
        end = next(values for values in log if 'source' in values)
        started = self.figures[0][0] - INTERVAL
        for values, (now, *_figures) in zip(told, self.figures):
            left = started + self.result.seconds - now
            self.assertAlmostEqual(
                left, int(values['left'].removesuffix(' s')), delta=1.5)
        self.assertAlmostEqual(RATE / units.Mi, end['rate'], delta=0.8)
        self.assertEqual('volume', end['source'])
