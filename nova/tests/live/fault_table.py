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

"""The table of faults in the documentation, written by the tests of them.

The live and the cloud tests put what they saw into the file that
NOVA_FAULT_TABLE names in their environment, or NOVA_LIVE_FAULT_TABLE for live
migration. Those that are in the documentation are
doc/source/admin/fault-table.csv and live-fault-table.csv.
"""

import csv
import os
import pathlib

COLUMNS = ('Fault', 'When', 'Outcome', 'Was the guest off?',
           'Seconds until known')
LIVE_COLUMNS = ('Fault', 'When', 'Outcome', 'Seconds until known')

# When a fault may happen.
CONNECTING = 'before connecting'
CREATING = 'before the volume is created'
COPYING = 'in the middle of the copy'
FINISHING = 'when all was sent, before the end of the stream'
CHECKING = 'after the end of the stream, before the check'

# The same while the guest runs and its disks are copied for the first time.
RUNNING = '{0}; the guest runs'

# What may come of it.
AT_SOURCE = 'server at the source, nothing at the destination'
CLEARED = 'server at the source, the destination is cleared when it is back'
NEXT = 'server at the source, the next attempt clears the destination'
MOVED = 'server at the destination'


def record(
    fault: str, when: str, outcome: str, was_off: bool, seconds: float,
) -> None:
    """Add a row to the table, or replace that of this fault at this time.

    :param when: what was under way
    :param outcome: where the server is in the end
    :param was_off: whether the guest that ran before was off at any time
    :param seconds: from the fault until the migration ended
    """
    _write('NOVA_FAULT_TABLE', COLUMNS, [
        fault, when, outcome, 'yes' if was_off else 'no', f'{seconds:.1f}'])


def record_live(fault: str, when: str, outcome: str, seconds: float) -> None:
    """Do the same for the table of faults in live migrations."""
    _write('NOVA_LIVE_FAULT_TABLE', LIVE_COLUMNS,
           [fault, when, outcome, f'{seconds:.1f}'])


def _write(variable: str, columns: tuple[str, ...], row: list[str]) -> None:
    """Put a row into the file that a variable of the environment names."""
    if variable not in os.environ:
        return
    path = pathlib.Path(os.environ[variable])
    rows = {tuple(each[:2]): each for each in [*_rows(path), row]}
    with path.open('w', newline='') as table:
        writer = csv.writer(table, lineterminator='\n')
        writer.writerow(columns)
        writer.writerows(rows[key] for key in sorted(rows))


def _rows(path: pathlib.Path) -> list[list[str]]:
    try:
        with path.open(newline='') as file:
            return list(csv.reader(file))[1:]
    except FileNotFoundError:
        return []
