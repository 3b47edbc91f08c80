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

import pathlib

import setuptools

# The modules go into the package of Nova that is installed already. Naming
# them one by one, instead of the packages that they are in, is what keeps pip
# from ever touching a file of Nova's.
setuptools.setup(py_modules=[
    '.'.join(path.with_suffix('').parts)
    for pattern in ('*.py', 'cmd/**/*.py', 'conf/**/*.py', 'privsep/*.py',
                    'virt/**/*.py')
    for path in sorted(pathlib.Path('nova').glob(pattern))])
