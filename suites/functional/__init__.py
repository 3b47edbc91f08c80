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

# First of Nova's, for one of them chooses the concurrency mode: in Nova 32 the
# second. Under eventlet, oslo.db imported before has no green threads, which
# then share their transactions.
import nova.tests.functional  # noqa: F401
import nova.tests.unit  # noqa: F401

from nova.tests.fixtures import native
from suites import load


def load_tests(loader, tests, pattern):
    native.forbid_programs()
    return load('functional', loader)
