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
    :ivar is_busy: whether it is being asked
    """

    def __init__(self) -> None:
        self.wait = FIRST_WAIT
        self.due = 0.0
        self.is_busy = False

    def is_due(self) -> bool:
        return not self.is_busy and time.monotonic() >= self.due

    def failed(self) -> None:
        self.due = time.monotonic() + self.wait
        self.wait = min(2 * self.wait, LONGEST_WAIT)


class Leftovers:
    """The leftovers of failed migrations on other hosts.

    A host that does not answer is asked less and less often, and for one
    server at a time, each in its turn. After a day it is not asked any more.
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
        for key, entry in list(self._discards.items()):
            state = self._hosts.setdefault(key[1], _Host())
            if state.is_due():
                self._retry(state, key, entry)

    def _retry(self, state: _Host, key: tuple[str, str],
               entry: tuple[float, ty.Callable[[], None]]) -> None:
        (uuid, host), (since, discard) = key, entry
        state.is_busy = True
        is_deleted = self._delete(uuid, host, discard)
        state.is_busy = False
        # A later failure may have replaced the entry meanwhile.
        if self._discards.get(key) is entry:
            del self._discards[key]
        else:
            is_deleted = True
        if is_deleted:
            self._hosts.pop(host, None)
            return
        state.failed()
        if time.monotonic() - since <= GIVE_UP_AFTER:
            # At the end: the host's other servers have their turn first.
            self._discards[key] = entry
            return
        LOG.warning(
            'Giving up on the unfinished copy of server %(uuid)s on %(host)s. '
            'The next migration of the server to there deletes it',
            {'uuid': uuid, 'host': host})

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
