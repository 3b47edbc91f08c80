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

"""The test suites, as stestr finds them.

The tests are in nova/tests, as they would be in Nova's own tree. There they
are modules of the installed package ``nova``, whose other tests are not ours
to run, so that each suite here names its own instead of searching for them.
"""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load(kind, loader):
    """Load the tests below nova/tests/<kind> of this repository.

    :param kind: 'unit', 'functional', 'live', 'stock', 'containers', 'cloud'
        or 'cloud_full'
    """
    paths = sorted((ROOT / 'nova' / 'tests' / kind).glob('**/test_*.py'))
    names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
             for path in paths]
    return loader.loadTestsFromNames(names)
