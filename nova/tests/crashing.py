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

"""The end of nova-compute in the middle of something."""

import itertools
import os
from unittest import mock


class Crash(BaseException):
    """The end of nova-compute, which nothing may handle."""


def crashes(name, nth, function):
    """Whether nova-compute ends while it runs a function.

    :param name: of a function of os, at the nth call of which it ends
    """
    original, calls = getattr(os, name), itertools.count()

    def crash(*args, **kwargs):
        if next(calls) == nth:
            raise Crash()
        return original(*args, **kwargs)

    with mock.patch(f'os.{name}', crash):
        try:
            function()
        except Crash:
            return True
    return False
