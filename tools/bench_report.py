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


"""What the benchmarks measured: kept as JSON, told as tables.

The files hold every sample, by the name of what was measured. Nothing here
needs more than Python: the plots are in tools/plots.py.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import platform
import statistics
from typing import Any

MIB = 1024 ** 2
GIB = 1024 ** 3

# The samples of a round: one for each server or disk that moved at once.
Samples = list[dict[str, Any]]
# By the name of a way, all rounds.
Ways = dict[str, list[Samples]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured with the same servers, or the same disk.

    :ivar machine: what it was measured on
    :ivar ways: the samples of each way
    :ivar disk: MiB of the disk ('size') and of data on it ('data'), if the
        copy of a disk was measured
    """

    machine: str
    ways: Ways
    disk: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def values(self, way: str, name: str) -> list[float]:
        """A value of each round: the mean of the samples that have it."""
        found = [[sample[name] for sample in samples
                  if sample.get(name) is not None]
                 for samples in self.ways.get(way, ())]
        return [statistics.fmean(values) for values in found if values]

    def median(self, way: str, name: str) -> float | None:
        values = self.values(way, name)
        return statistics.median(values) if values else None

    def ratio(self, way: str, to: str, name: str = 'seconds') -> float | None:
        """How many times as much: the median of the rounds' ratios."""
        ratios = [one / other for one, other in zip(
            self.values(way, name), self.values(to, name))]
        return statistics.median(ratios) if ratios else None

    def rounds(self, *ways: str) -> int:
        """In how many rounds all of these ways were measured."""
        return min(len(self.ways.get(way, ())) for way in ways)


Found = dict[str, Measured]


def load(path: Path) -> Found:
    """What a file holds; nothing if there is none."""
    if not path.exists():
        return {}
    return {name: Measured(**found) for name, found in
            json.loads(path.read_text()).items()}  # noqa: N324


def add(path: Path, name: str, measured: Measured) -> None:
    """Write what was measured into a file, in place of what it had of it."""
    found = load(path) | {name: measured}
    path.write_text(json.dumps(  # noqa: N324
        {name: dataclasses.asdict(each) for name, each in found.items()},
        indent=1) + '\n')


def machine() -> str:
    """What figures are of that are measured now."""
    info = Path('/proc/cpuinfo').read_text()
    model = next((line.partition(': ')[2] for line in info.splitlines()
                  if line.startswith('model name')), platform.machine())
    return '%s, %d CPUs for both hosts, load %.1f, Linux %s' % (
        model, os.cpu_count() or 0, os.getloadavg()[0], platform.release())


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that has to be reached.

    :ivar scene: where it is measured
    :ivar text: what, and against what
    :ivar bound: of what ``of`` tells
    :ivar ways: that it needs
    """

    scene: str
    text: str
    against: str
    bound: float
    ways: Sequence[str]
    of: Callable[[Measured], float | None]
    at_most: bool = True

    def row(self, found: Measured) -> list[str]:
        """A line of a table; empty cells where it was not measured."""
        rounds = found.rounds(*self.ways) if self.ways else 0
        value = self.of(found) if rounds else None
        return [self.text, self.against,
                '%s %g' % ('at most' if self.at_most else 'at least',
                           self.bound),
                '%.2f' % value if value is not None else 'not measured',
                str(rounds),
                self._verdict(value)]

    def _verdict(self, value: float | None) -> str:
        if value is None:
            return ''
        reached = (value <= self.bound if self.at_most
                   else value >= self.bound)
        return 'yes' if reached else 'no'


def _off(scene: str, text: str, against: str, bound: float, way: str,
         to: str, name: str = 'off') -> Goal:
    return Goal(scene, text, against, bound, (way, to),
                lambda found: found.ratio(way, to, name))


def _speed(scene: str, text: str, against: str, bound: float,
           way: str = 'direct') -> Goal:
    return Goal(scene, text, against, bound, (way, against),
                lambda found: found.ratio(against, way), at_most=False)


OFF_GOALS = (
    _off('disks', '2 GiB of random bytes, guest writes 1 MiB/s',
         'empty disk', 1.3, 'random', 'empty'),
    _off('disks', '8 GiB with 4 GiB of data, idle guest', 'empty disk', 1.6,
         'half full', 'empty'),
    _off('xfs', '64 GiB with 8 GiB of data on XFS, guest writes 1 MiB/s',
         'empty disk', 1.3, '64 GiB', 'empty'),
    _off('ssh', '700 MiB', "Nova's SSH path", 0.2, 'libvirt', 'ssh'),
    _off('drain', 'six servers with 700 MiB at once, mean',
         'one with an empty disk', 1.3, 'drain', 'empty'),
    _off('drain', 'the same: time until all have moved',
         'all powered off first', 1.15, 'drain', 'drain, off first',
         'seconds'),
    _off('base', 'the destination lacks a base image of 1 GiB',
         'empty disk', 1.3, 'base image', 'empty'),
    _off('rewrite', 'the guest rewrites its disk faster than the link',
         'powered off first', 1.1, 'precopy', 'off first'),
    Goal('cut', 'link cut for 30 s at 80 % of 4 GiB: bytes sent',
         'the same, not cut', 1.05, ('cut', 'whole'),
         lambda found: found.ratio('cut', 'whole', 'wire')),
    _off('cut', 'the same: time off', 'the same, not cut', 1.3, 'cut',
         'whole'),
)

COPY_GOALS = (
    _speed('random', '2 GiB of random bytes', 'scp', 1.9),
    _speed('random', '2 GiB of random bytes', 'rsync --sparse', 2.3),
    _speed('random', '2 GiB of random bytes', 'scp -C', 12),
    _speed('random', '2 GiB of random bytes', 'nbdcopy', 0.95),
    _speed('random', '2 GiB of random bytes', 'memory', 0.95),
    _speed('sparse', '16 GiB with 0.5 GiB of data', 'scp', 25),
    _speed('sparse', '16 GiB with 0.5 GiB of data', 'rsync --sparse', 20),
    _speed('extents', '8 GiB with 20,000 extents of 4 KiB', 'rsync --sparse',
           5),
    _speed('small', '1 MiB', 'ssh path', 1.5),
)

OFF_HEAD = ('guest off', 'compared with', 'goal', 'measured', 'rounds',
            'reached')
COPY_HEAD = ('disk', 'times as fast as', 'goal', 'measured', 'rounds',
             'reached')


def figures(goals: Sequence[Goal], found: Found) -> Iterator[list[str]]:
    """The lines of a table of what has to be reached, and what was."""
    for goal in goals:
        if goal.scene in found:
            yield goal.row(found[goal.scene])


def _text(form: str, value: float | None, unit: float = 1) -> str:
    return form % (value / unit) if value is not None else ''


OFF_COLUMNS = ('servers', 'rounds', 'off, seconds', 'fastest', 'slowest',
               'moved, seconds', 'sent MiB', 'load')


def off_rows(found: Measured) -> Iterator[list[str]]:
    """The lines of a table of a scene: medians of the rounds."""
    for way, taken in found.ways.items():
        off = found.values(way, 'off')
        yield [way, str(len(taken)), '%.2f' % statistics.median(off),
               '%.2f' % min(off), '%.2f' % max(off),
               _text('%.1f', found.median(way, 'seconds')),
               _text('%.0f', found.median(way, 'wire'), MIB),
               _text('%.1f', found.median(way, 'load'))]


COPY_COLUMNS = ('way', 'rounds', 'seconds', 'of ours', 'client CPU s/GiB',
                'all CPU s/GiB', 'peak MiB', 'grown MiB', 'wire MiB',
                'used MiB', 'late ms 99 %', 'late ms at most')


def copy_rows(found: Measured) -> Iterator[list[str]]:
    """The lines of a table of all ways to copy a disk: medians."""
    ours = next(iter(found.ways))
    for way, taken in found.ways.items():
        gib = found.disk['data'] / 1024 * (2 if way == 'two at once' else 1)
        client = found.median(way, 'client') or 0.0
        daemons = found.median(way, 'daemons') or 0.0
        yield [way, str(len(taken)),
               _text('%.2f', found.median(way, 'seconds')),
               _text('%.2f', found.ratio(way, ours)),
               _text('%.2f', client, gib),
               _text('%.2f', client + daemons, gib),
               *(_text('%.0f', found.median(way, name), MIB)
                 for name in ('memory', 'grown', 'wire', 'used')),
               *(_text('%.0f', found.median(way, name), 0.001)
                 for name in ('late_99', 'late'))]


def table(lines: Sequence[Sequence[str]]) -> str:
    """A simple table in reStructuredText; the first line is its head."""
    # An empty first cell would go on with the line above.
    lines = [[line[0] or '\\', *line[1:]] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = '  '.join('=' * width for width in widths)
    text = ['  '.join(cell.ljust(width) for cell, width in zip(line, widths))
            .rstrip() for line in lines]
    return '\n'.join([rule, text[0], rule, *text[1:], rule])


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a user is shown of a way.

    :ivar label: what a user calls it
    :ivar is_ours: whether it is this driver's, as it is
    :ivar name: of the value in the samples, seconds
    """

    scene: str
    way: str
    label: str
    is_ours: bool = True
    name: str = 'off'


SHOWN_OFF = (
    Shown('disks', 'empty', 'empty disk'),
    Shown('disks', 'random', '2 GiB, guest writes 1 MiB/s'),
    Shown('disks', 'half full', '4 GiB'),
    Shown('xfs', '64 GiB', '8 GiB on XFS, guest writes 1 MiB/s'),
    Shown('base', 'base image', 'destination lacks a base image of 1 GiB'),
    Shown('ssh', 'libvirt', '700 MiB'),
    Shown('ssh', 'ssh', "700 MiB, Nova's SSH path", False),
    Shown('drain', 'drain', 'six servers of 700 MiB at once'),
    Shown('drain', 'drain, off first',
          'six, vol_upload_migration_precopy off', False),
)
SHOWN_DISKS = (
    ('random', '2 GiB of random bytes, link without a limit'),
    ('system 1gbit', '512 MiB of an operating system, 1 Gbit/s'),
    ('system 200mbit', '512 MiB of an operating system, 200 Mbit/s'),
)
SHOWN_WAYS = (('direct', 'this driver'), ('nbdcopy', 'nbdcopy'),
              ('scp', 'scp'), ('scp -C', 'scp -C'),
              ('rsync --sparse', 'rsync'),
              ('rsync --sparse --compress', 'rsync --compress'))


def shown_copies(disk: str) -> list[Shown]:
    """What a user is shown of the copy of a disk."""
    return [Shown(disk, way, label, way == 'direct', 'seconds')
            for way, label in SHOWN_WAYS]


def taken(shown: Sequence[Shown],
          found: Found) -> list[tuple[Shown, list[float]]]:
    """What was measured of what is shown, with the values of the rounds."""
    every = [(one, found[one.scene].values(one.way, one.name))
             for one in shown if one.scene in found]
    return [(one, values) for one, values in every if values]


def off_summary(found: Found) -> str:
    """How long guests are off, in reStructuredText."""
    return table([('data on the disk', 'off, seconds', 'fastest', 'slowest',
                   'rounds')] + [
        (one.label, *('%.1f' % value for value in (
            statistics.median(values), min(values), max(values))),
         str(len(values)))
        for one, values in taken(SHOWN_OFF, found)]) + '\n'


def drain_summary(found: Found) -> str:
    """How long a drain takes and guests are off, in reStructuredText."""
    measured = found['concurrent']
    return table([('limit', 'each server off, seconds',
                   'all servers moved after, seconds', 'rounds')] + [
        (way.split()[0], *(_text('%.1f', measured.median(way, name))
                           for name in ('off', 'seconds')), str(len(taken)))
        for way, taken in measured.ways.items()]) + '\n'


def copy_summary(found: Found) -> str:
    """How long a disk takes on a link, in reStructuredText."""
    lines = [('disk and link', 'way', 'seconds', 'seconds per GiB',
              'of this driver', 'rounds')]
    for disk, title in SHOWN_DISKS:
        for one, values in taken(shown_copies(disk), found):
            seconds = statistics.median(values)
            lines.append((
                title if one.is_ours else '', one.label, '%.1f' % seconds,
                '%.1f' % (seconds / found[disk].disk['data'] * 1024),
                '%.2f' % (found[disk].ratio(one.way, 'direct') or 0),
                str(len(values))))
    return table(lines) + '\n'


def off_report(found: Found) -> str:
    """All tables of what bench_off measured, in reStructuredText."""
    parts = [table([OFF_HEAD, *figures(OFF_GOALS, found)])]
    for name, measured in found.items():
        parts += [f'{name}, measured on {measured.machine}:',
                  table([OFF_COLUMNS, *off_rows(measured)])]
    return '\n\n'.join(parts) + '\n'


def copy_report(found: Found) -> str:
    """All tables of what bench measured, in reStructuredText."""
    parts = [table([COPY_HEAD, *figures(COPY_GOALS, found)])]
    for name, measured in found.items():
        parts += ['%s: %g MiB with %g MiB of data, measured on %s:' % (
            name, measured.disk['size'], round(measured.disk['data'], 1),
            measured.machine),
            table([COPY_COLUMNS, *copy_rows(measured)])]
    return '\n\n'.join(parts) + '\n'
