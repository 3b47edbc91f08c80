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


"""The benchmark measures what it says, and the pages show what it measured."""

from pathlib import Path

import fixtures
import testtools

from tools import bench_report
from tools import offtime
from tools import plots

SERVER = 'f3a1c2d4-0000-4000-8000-000000000001'
OTHER = 'f3a1c2d4-0000-4000-8000-000000000002'


class TestObserver(testtools.TestCase):
    """On a /proc of its own, at times that the test says."""

    def setUp(self):
        super().setUp()
        self.proc = Path(self.useFixture(fixtures.TempDir()).path)
        self.observer = offtime.Observer(self.proc)
        self.clock = self.useFixture(fixtures.MockPatch(
            'tools.offtime.time.monotonic')).mock

    def set_process(self, pid, *words):
        """Let there be a process of these words; a zombie has none."""
        directory = self.proc / str(pid)
        directory.mkdir(exist_ok=True)
        directory.joinpath('cmdline').write_bytes(
            b''.join(word.encode() + b'\0' for word in words))

    def set_guest(self, pid, server=SERVER):
        self.set_process(pid, '/usr/bin/qemu-system-x86_64', '-name', 'x',
                         '-uuid', server, '-nodefaults')

    def end(self, pid):
        self.proc.joinpath(str(pid), 'cmdline').unlink()
        self.proc.joinpath(str(pid)).rmdir()

    def look(self, now):
        self.clock.return_value = now
        self.observer.look()

    def off(self, since=0.0, server=SERVER):
        return self.observer.off_seconds(server, since)

    def test_a_guest_is_off_from_one_process_to_the_next(self):
        self.set_guest(1)
        self.look(10)
        self.end(1)
        self.look(11)
        self.look(12)
        self.set_guest(2)
        self.look(13.5)
        self.look(20)
        self.assertEqual(2.5, self.off())

    def test_a_process_that_nobody_has_waited_for_has_ended(self):
        self.set_guest(1)
        self.look(10)
        self.set_process(1)
        self.look(11)
        self.set_guest(2)
        self.look(12)
        self.assertEqual(1, self.off())

    def test_two_processes_at_once_are_no_time_off(self):
        self.set_guest(1)
        self.look(10)
        self.set_guest(2)
        self.look(11)
        self.end(1)
        self.look(12)
        self.assertEqual(0, self.off())

    def test_a_process_that_becomes_qemu_later_counts(self):
        self.set_guest(1)
        self.look(10)
        self.end(1)
        self.set_process(2, '/usr/sbin/libvirtd', '--listen')
        self.look(11)
        self.set_guest(2)
        self.look(12)
        self.assertEqual(1, self.off())

    def test_other_guests_and_programs_do_not_count(self):
        self.set_guest(1)
        self.look(10)
        self.end(1)
        self.set_guest(2, OTHER)
        self.set_process(3, 'qemu-img', 'info', '-uuid', SERVER)
        self.set_process(4, 'grep', 'qemu-system', '-uuid', SERVER)
        self.look(11)
        self.look(14)
        self.assertEqual(3, self.off())
        self.assertEqual(0, self.off(server=OTHER))

    def test_time_before_the_start_does_not_count(self):
        for number in range(2):
            self.set_guest(number)
            self.look(10 * number)
            self.end(number)
            self.look(10 * number + 1)
        self.set_guest(2)
        self.look(13)
        self.assertEqual(11, self.off())
        self.assertEqual(2, self.off(since=10))
        self.assertEqual(1, self.off(since=12))

    def test_a_guest_that_is_off_still_is_counted_until_now(self):
        self.set_guest(1)
        self.look(10)
        self.end(1)
        self.look(11)
        self.clock.return_value = 15
        self.assertEqual(4, self.off())


class TestReport(testtools.TestCase):
    """What is made of samples."""

    def measured(self, **ways):
        return bench_report.Measured('a machine', {
            way: [[{'off': value} for value in samples]
                  for samples in rounds]
            for way, rounds in ways.items()})

    def test_a_ratio_is_the_median_of_those_of_the_rounds(self):
        found = self.measured(one=[[2], [30], [12]], other=[[1], [10], [3]])
        self.assertEqual(3, found.ratio('one', 'other', 'off'))

    def test_servers_that_move_at_once_count_by_their_mean(self):
        found = self.measured(drain=[[1, 2, 6]], empty=[[2]])
        self.assertEqual(1.5, found.ratio('drain', 'empty', 'off'))

    def test_a_goal_says_whether_it_was_reached(self):
        goal = next(goal for goal in bench_report.OFF_GOALS
                    if goal.scene == 'ssh')
        for ours, verdict in ((2, 'yes'), (3, 'no')):
            found = self.measured(libvirt=[[ours]], ssh=[[10]])
            self.assertEqual(['at most 0.2', f'0.{ours}0', '1', verdict],
                             goal.row(found)[2:])

    def test_what_was_not_measured_is_said_to_be(self):
        goal = bench_report.OFF_GOALS[0]
        self.assertEqual(
            ['not measured', '0', ''],
            goal.row(self.measured(empty=[[1]]))[3:])

    def test_a_file_keeps_what_was_measured_before(self):
        path = Path(self.useFixture(fixtures.TempDir()).join('off.json'))
        first = self.measured(one=[[1]])
        second = self.measured(two=[[2]])
        bench_report.add(path, 'first', second)
        bench_report.add(path, 'second', second)
        bench_report.add(path, 'first', first)
        self.assertEqual({'first': first, 'second': second},
                         bench_report.load(path))


class TestPages(testtools.TestCase):

    def test_the_tables_are_those_of_the_samples(self):
        made = Path(self.useFixture(fixtures.TempDir()).path)
        for path in plots.DIRECTORY.glob('*.json'):
            made.joinpath(path.name).write_bytes(path.read_bytes())
        plots.write_tables(made)
        tables = sorted(path.name for path in made.glob('*.inc'))
        self.assertEqual(['copy-all.inc', 'copy.inc', 'drain.inc',
                          'off-all.inc', 'off.inc'], tables)
        for name in tables:
            self.assertEqual(
                plots.DIRECTORY.joinpath(name).read_text(),
                made.joinpath(name).read_text())
