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

"""Write the table of hooks of the documentation from the code.

Run it with the Python of the environment in which Nova is installed:
.tox/nova/bin/python tools/hooks_table.py
"""

import csv
from pathlib import Path

from nova.virt.libvirt.storage import hooks

TABLE = Path(__file__).resolve().parent.parent / (
    'doc/source/contributor/hooks.csv')

with TABLE.open('w', newline='') as table:
    csv.writer(table, lineterminator='\n').writerows(hooks.table())
