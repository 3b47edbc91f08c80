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

"""A stack of what has to be undone if what follows fails."""

import typing as ty

from oslo_log import log as logging

LOG = logging.getLogger(__name__)


class Undo:
    """Undoes in the opposite order what was done, unless it is committed.

    ::

        with undo.Undo() as steps:
            first()
            steps.push(undo_first)
            second()
            steps.commit()

    An undo that fails is logged, hides no error, and keeps no other from
    being undone.

    :ivar failures: what undoing raised
    """

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self._steps: list[ty.Callable[[], None]] = []

    def push(self, step: ty.Callable[..., ty.Any], *args: ty.Any) -> None:
        """Have a function called if what follows fails."""
        self._steps.append(lambda: step(*args))

    def commit(self) -> None:
        """Keep all that was done."""
        self._steps.clear()

    def __enter__(self) -> 'Undo':
        return self

    def __exit__(self, kind: ty.Any, error: ty.Any, trace: ty.Any) -> None:
        if isinstance(error, Exception):
            self.rewind()

    def rewind(self) -> None:
        """Undo all that was done."""
        while self._steps:
            try:
                self._steps.pop()()
            except Exception as error:
                LOG.warning('Failed to undo a step of a migration: %s', error)
                self.failures.append(error)
