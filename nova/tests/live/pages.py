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

"""What nova-storage-migrate check prints, as the documentation shows it.

The pages include files, which these tests compare with the real output. With
NOVA_LAB_WRITE_PAGES=1 in the environment they write the files instead.
"""

import os
import re

from nova.tests.live import base

DIRECTORY = base.ROOT / 'doc/source/admin'
WRITE = bool(os.environ.get('NOVA_LAB_WRITE_PAGES'))

# What differs from one run to the next, and what stands for it.
EXAMPLES = (
    (r'\b198\.18\.\d+\.(\d+)\b', r'192.0.2.\1'),
    (r'\bhost([12])\b', r'compute\1'),
    (r'valid until [\d: -]+ UTC', 'valid until 2027-11-26 09:00 UTC'),
    (r'at \d+ MiB/s', 'at 210 MiB/s'),
    (r'[\d.]+ GiB free', '812.4 GiB free'),
    (r'test-[0-9a-f-]{36}', 'nova-disks'),
    (r'/[0-9a-f-]{36}_\w+ cannot', '/UUID_PART cannot'),
    (r'/var/lib/nova/nova-disks', '/var/lib/libvirt/images/nova-disks'),
)


class PageMixin:
    """For test cases whose output is shown by a page."""

    def assert_page(self, name: str, out: str) -> None:
        """Compare an output with the file that a page includes.

        :param name: the file is check-{name}.txt
        """
        for pattern, example in EXAMPLES:
            out = re.sub(pattern, example, out)
        path = DIRECTORY / f'check-{name}.txt'
        if WRITE:
            path.write_text(out)
        self.assertEqual(path.read_text(), out)
