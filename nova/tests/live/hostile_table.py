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

"""The table of hostile disks in the documentation, written by their tests.

The live tests put what they saw into the file that NOVA_HOSTILE_TABLE names in
their environment. The one that is in the documentation is
doc/source/admin/hostile-table.csv.
"""

import csv
import os
import pathlib
import typing as ty

FIRST = 'Start of the disk'

# The moments, in the order of the columns.
CONTROL = 'in a pool, for comparison'
PREFLIGHT = 'preflight'
COPY = 'copy'
UPLOADED = 'end of the upload'
CONFIRM = 'confirm'
REVERT = 'revert'
DELETE = 'delete'
RESTART = 'restart of the daemons'
RETRY = 'retry after a crash'
MOMENTS = (CONTROL, PREFLIGHT, COPY, UPLOADED, CONFIRM, REVERT, DELETE,
           RESTART, RETRY)


def record(moment: str, seen: dict[str, str]) -> None:
    """Add a column to the table, or replace that of this moment.

    :param moment: one of MOMENTS
    :param seen: what came of each start of a disk
    """
    if 'NOVA_HOSTILE_TABLE' not in os.environ:
        return
    path = pathlib.Path(os.environ['NOVA_HOSTILE_TABLE'])
    rows = _rows(path)
    for kind, outcome in seen.items():
        rows.setdefault(kind, {})[moment] = outcome
    with path.open('w', newline='') as table:
        writer = csv.writer(table, lineterminator='\n')
        writer.writerow([FIRST, *MOMENTS])
        writer.writerows([kind, *(row.get(name, '') for name in MOMENTS)]
                         for kind, row in rows.items())


def _rows(path: pathlib.Path) -> dict[str, dict[str, ty.Any]]:
    """What was seen of each start of a disk, by moment."""
    try:
        with path.open(newline='') as table:
            return {row.pop(FIRST): row for row in csv.DictReader(table)}
    except FileNotFoundError:
        return {}
