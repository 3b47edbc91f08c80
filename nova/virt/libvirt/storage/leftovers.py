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

"""Unfinished copies that could not be deleted on other hosts yet."""

import time
import typing as ty

from oslo_log import log as logging

from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import threads

LOG = logging.getLogger(__name__)

# The first wait after a host could not be cleared, in seconds. Each further
# one is twice as long.
FIRST_WAIT = 60
LONGEST_WAIT = 60 * 60

# How long to go on, in seconds. The next migration to the host clears it, too.
GIVE_UP_AFTER = 24 * 60 * 60


class _Host:
    """When to ask a host again.

    :ivar wait: seconds between this time and the next
    :ivar due: time.monotonic() of the next time
    """

    def __init__(self) -> None:
        self.wait = FIRST_WAIT
        self.due = 0.0

    def failed(self) -> None:
        self.due = time.monotonic() + self.wait
        self.wait = min(2 * self.wait, LONGEST_WAIT)


class Leftovers:
    """What failed migrations had to leave on other hosts.

    A host that does not answer is asked less and less often, and for one
    server at a time. After a day it is not asked any more.
    """

    def __init__(self) -> None:
        self._discards: dict[
            tuple[str, str], tuple[float, ty.Callable[[], None]]] = {}
        self._hosts: dict[str, _Host] = {}

    def __bool__(self) -> bool:
        return bool(self._discards)

    def add(self, uuid: str, host: str,
            discard: ty.Callable[[], None]) -> None:
        """Have an unfinished copy deleted later.

        :param uuid: of the server
        :param host: address of the host
        :param discard: deletes the copy
        """
        self._discards[uuid, host] = (time.monotonic(), discard)

    def retry(self) -> None:
        """Delete what can be deleted; called about once a minute."""
        for (uuid, host), (since, discard) in list(self._discards.items()):
            state = self._hosts.setdefault(host, _Host())
            if time.monotonic() < state.due:
                continue
            if self._delete(uuid, host, discard):
                self._forget(uuid, host)
                self._hosts.pop(host)
                continue
            state.failed()
            if time.monotonic() - since > GIVE_UP_AFTER:
                LOG.warning(
                    'Giving up on the unfinished copy of server %(uuid)s on '
                    '%(host)s. The next migration of the server to there '
                    'deletes it',
                    {'uuid': uuid, 'host': host})
                self._forget(uuid, host)

    def _delete(self, uuid: str, host: str,
                discard: ty.Callable[[], None]) -> bool:
        """Whether there is nothing left to do for a server on a host."""
        try:
            threads.off_hub(discard)
        except Exception as error:
            LOG.info('The unfinished copy of server %(uuid)s on %(host)s '
                     'cannot be deleted: %(error)s',
                     {'uuid': uuid, 'host': host, 'error': error})
            return isinstance(error.__cause__, errors.Superseded)
        return True

    def _forget(self, uuid: str, host: str) -> None:
        self._discards.pop((uuid, host), None)
