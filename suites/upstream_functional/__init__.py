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

"""Nova's own functional tests of the libvirt driver, with our class.

With both options off, as they are by default, it has to pass them all.
"""

import pkgutil

# Puts our class in the place of Nova's.
import suites.upstream  # noqa: F401

from nova.tests.functional import libvirt
from nova.virt.libvirt import storage_migrate

# The tests put mocks into Nova's driver, which tell of no parameters.
storage_migrate.check_hooks = lambda nova_driver: None


def load_tests(loader, tests, pattern):
    return loader.loadTestsFromNames([
        module.name for module in pkgutil.iter_modules(
            libvirt.__path__, f'{libvirt.__name__}.')
        if module.name.rpartition('.')[2].startswith('test_') and
        not module.name.endswith('test_storage_migrate')])
