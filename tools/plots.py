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


"""Draw what the benchmarks measured, and write the tables of it.

Reads copy.json and off.json, which tools/bench.py and tools/bench_off.py
write, and writes the plots and tables that the documentation shows beside
them::

    tox -e plots
"""

from collections.abc import Sequence
from pathlib import Path
import statistics
import sys
from typing import Any

from tools import bench_report

DIRECTORY = Path(__file__).resolve().parent.parent / 'doc/source/performance'

# Colours that a reader who cannot tell red from green can tell apart.
OURS = '#0072b2'
OTHERS = '#d55e00'
DOTS = '#333333'

# The same bytes for the same samples: with neither a date nor random ids.
STYLE = {'svg.fonttype': 'none', 'svg.hashsalt': 'nova-storage-migrate',
         'font.family': 'sans-serif', 'font.size': 10,
         'axes.spines.top': False, 'axes.spines.right': False}


def draw_bars(axes: Any, shown: Sequence[bench_report.Shown],
              found: bench_report.Found) -> None:
    """Horizontal bars of medians, with a dot for each round."""
    taken = bench_report.taken(shown, found)
    for place, (bar, values) in enumerate(taken):
        median = statistics.median(values)
        axes.barh(place, median, color=OURS if bar.is_ours else OTHERS,
                  height=0.65)
        axes.plot(values, [place] * len(values), '.', color=DOTS,
                  markersize=4)
        axes.annotate(f'{median:.1f} s', (max(values), place), (5, 0),
                      textcoords='offset points', va='center')
    axes.set_yticks(range(len(taken)), [bar.label for bar, _values in taken])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel('seconds; bars are medians, dots are rounds')


def draw_off(found: bench_report.Found, path: Path) -> None:
    """How long guests are off."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout='constrained')
    axes.set_title('Time that a guest is off in a cold migration', loc='left')
    draw_bars(axes, bench_report.SHOWN_OFF, found)
    figure.savefig(path, metadata={'Date': None})


def draw_copy(found: bench_report.Found, path: Path) -> None:
    """How long the copy of a disk takes, by the link."""
    from matplotlib import pyplot
    panels = [panel for panel in bench_report.SHOWN_DISKS
              if panel[0] in found]
    if not panels:
        return
    figure, all_axes = pyplot.subplots(
        len(panels), figsize=(8, 2.4 * len(panels)), squeeze=False,
        layout='constrained')
    for (name, title), axes in zip(panels, all_axes.flat):
        axes.set_title('Time to copy ' + title, loc='left')
        draw_bars(axes, bench_report.shown_copies(name), found)
    figure.savefig(path, metadata={'Date': None})


def write_tables(directory: Path = DIRECTORY) -> None:
    """Write the tables; no more than Python is needed."""
    off, copy = (bench_report.load(directory / f'{name}.json')
                 for name in ('off', 'copy'))
    for name, text in (('off', bench_report.off_summary(off)),
                       ('off-all', bench_report.off_report(off)),
                       ('drain', bench_report.drain_summary(off)),
                       ('copy', bench_report.copy_summary(copy)),
                       ('copy-all', bench_report.copy_report(copy))):
        (directory / f'{name}.inc').write_text(text)


def main() -> int:
    import matplotlib
    matplotlib.use('svg')
    write_tables()
    with matplotlib.rc_context(STYLE):
        draw_off(bench_report.load(DIRECTORY / 'off.json'),
                 DIRECTORY / 'off.svg')
        draw_copy(bench_report.load(DIRECTORY / 'copy.json'),
                  DIRECTORY / 'copy.svg')
    return 0


if __name__ == '__main__':
    sys.exit(main())
