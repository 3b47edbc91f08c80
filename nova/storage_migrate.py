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

"""The command nova-storage-migrate, without warnings of other libraries.

Importing anything in nova.cmd may import eventlet, which then warns of its
own end. An operator can do nothing about that. ``python -W`` shows warnings.
"""

import sys
import warnings


def main() -> int:
    """Run the command and return its exit status."""
    if not sys.warnoptions:
        warnings.simplefilter('ignore')
    from nova.cmd import storage_migrate
    return storage_migrate.main()


if __name__ == '__main__':
    sys.exit(main())
