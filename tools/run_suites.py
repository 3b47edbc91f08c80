#!/usr/bin/python3
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

"""Run suites of tests with a release of Nova, and keep their numbers.

    run_suites.py 31 unit upstream functional
    run_suites.py 34 --mode eventlet cloud -- TestMigrate
    run_suites.py main unit upstream functional

What follows -- goes to stestr. Where NOVA_RELEASE_TABLE names a file, the
numbers go into it, a table in CSV with a row for each release, mode and
version of Python. The one of the documentation is
doc/source/contributor/nova-releases.csv.
"""

import argparse
from collections.abc import Iterable
import csv
import dataclasses
import os
from pathlib import Path
import re
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ('Nova', 'Mode', 'Python', 'Unit', 'Functional', "Nova's own",
           'Cloud', 'More in the cloud')
SUITES = {'unit': 'Unit', 'functional': 'Functional',
          'upstream': "Nova's own", 'cloud': 'Cloud',
          'cloud_full': 'More in the cloud'}
# The seconds that a test of a suite may take.
TIMEOUTS = {'cloud': 1800, 'cloud_full': 1800}
NEWEST = (ROOT / 'tools/nova-versions.txt').read_text().split()[-2]
TOTAL = re.compile(r' - (Passed|Skipped|Expected Fail|Failed): (\d+)')


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run of a suite came to."""

    status: int
    counts: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        ran = sum(self.counts.values())
        others = [f'{count} {name.lower()}'
                  for name, count in self.counts.items()
                  if count and name != 'Passed']
        minutes, seconds = divmod(round(self.seconds), 60)
        passed = f'{self.counts["Passed"]} of {ran}'
        return f'{", ".join([passed, *others])} in {minutes}:{seconds:02}'


def run(suite: str, release: str, mode: str,
        arguments: Iterable[str]) -> Outcome:
    """Run a suite, and show what it prints.

    The tests of a cloud run beside it, with Nova 34; the cloud is of the
    release.
    """
    on_cloud = suite.startswith('cloud')
    bin_directory = environment('' if on_cloud else release) / 'bin'
    argv = [str(bin_directory / 'stestr'), '--test-path', f'suites/{suite}',
            'run', *(['--serial'] if on_cloud else []), *arguments]
    env = {**os.environ,
           'PATH': f'{bin_directory}:{os.environ["PATH"]}',
           'OS_TEST_TIMEOUT': str(TIMEOUTS.get(suite, 300)),
           'OS_DEFAULT__PYBASEDIR': str(bin_directory.parent),
           **modes(mode, on_cloud)}
    if on_cloud:
        env['NOVA_LAB_RELEASE'] = release
    started = time.monotonic()
    counts = {'Passed': 0}
    with subprocess.Popen(argv, cwd=ROOT, env=env, text=True,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end='', flush=True)
            if found := TOTAL.match(line):
                counts[found[1]] = int(found[2])
    return Outcome(process.returncode, counts, time.monotonic() - started)


def environment(release: str) -> Path:
    """The virtual environment that tools/test-venv makes for a release."""
    suffix = f'-{release}' if release not in ('', NEWEST) else ''
    return ROOT / f'.tox/nova{suffix}'


def modes(mode: str, on_cloud: bool) -> dict[str, str]:
    """The variables that choose a concurrency mode."""
    eventlet = mode == 'eventlet'
    # The process of tests of a cloud is none of Nova's.
    patched = eventlet and not on_cloud
    return {'OS_NOVA_DISABLE_EVENTLET_PATCHING': str(not patched).lower(),
            'NOVA_LAB_EVENTLET': str(int(eventlet))}


def record(path: Path, release: str, mode: str, python: str, suite: str,
           outcome: Outcome) -> None:
    """Put a number into the table, in the place of an older one."""
    rows = {}
    if path.exists():
        with path.open(newline='') as table:
            rows = {key(row): row for row in csv.DictReader(table)}
    row = dict.fromkeys(COLUMNS, '') | {
        'Nova': release, 'Mode': mode, 'Python': python}
    row = rows.setdefault(key(row), row)
    row[SUITES[suite]] = str(outcome)
    with path.open('w', newline='') as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(row for _key, row in sorted(rows.items()))


def key(row: dict[str, str]) -> tuple[str, str, int]:
    """Where a row stands in the table."""
    return row['Nova'], row['Mode'], int(row['Python'].partition('.')[2])


def python_of(release: str, suite: str) -> str:
    """The version of Python that a suite's Nova runs on."""
    python = (Path('/usr/bin/python3') if suite.startswith('cloud') else
              environment(release) / 'bin/python')
    said = subprocess.run([python, '--version'], check=True, text=True,
                          stdout=subprocess.PIPE).stdout
    return said.split()[1].rpartition('.')[0]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('release')
    parser.add_argument('suites', nargs='+', choices=SUITES,
                        metavar='suite', help=', '.join(SUITES))
    parser.add_argument('--mode', choices=('threads', 'eventlet'),
                        help='concurrency mode; the default is that of the '
                             'release: threads from 34 on')
    parser.add_argument('--exclude-list',
                        help='file of tests that cannot run there')
    end = arguments.index('--') if '--' in arguments else len(arguments)
    args = parser.parse_args(arguments[:end])
    args.others = arguments[end + 1:]
    return args


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    args = parse(arguments)
    mode = args.mode or (
        'eventlet' if args.release < NEWEST else 'threads')
    options = args.others[:]
    if args.exclude_list:
        options += ['--exclude-list', args.exclude_list]
    lines, failed = [], False
    for suite in args.suites:
        outcome = run(suite, args.release, mode, options)
        failed |= outcome.status != 0
        lines.append(f'Nova {args.release}, {mode}, {suite}: {outcome}')
        if 'NOVA_RELEASE_TABLE' in os.environ:
            record(Path(os.environ['NOVA_RELEASE_TABLE']), args.release,
                   mode, python_of(args.release, suite), suite, outcome)
    print('\n'.join(lines))
    return int(failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
