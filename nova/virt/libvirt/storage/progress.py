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

"""Report how far the files of a server are, where operators look.

That is in ``openstack server show`` while the server is resized or migrated,
in the record of its migration, and in the log.
"""

import collections
from concurrent import futures
import threading
import time
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

from nova.compute import task_states
from nova import objects
from nova.virt.libvirt.storage import stream

LOG = logging.getLogger(__name__)

# Seconds between two reports, as in live migration. One costs two calls of
# nova-conductor at most.
INTERVAL = 5


class Progress:
    """The files of one server on their way to another host.

    A transfer is watched through begin(), note() and end(), which only take
    notes: they are called in the thread that copies. All that needs the
    database or the log happens in the thread that waits in watch(), which is
    one of Nova's: under eventlet a native thread could do neither.
    """

    def __init__(self, context, instance, host: str):
        """Name the server; nothing is reported yet.

        :param instance: the server; its ``progress`` becomes per cent
        :param host: address of the destination
        """
        self._context = context
        self._instance = instance
        self._host = host
        self._total = 0
        self._migration: ty.Any = None
        self._figures: dict[str, tuple[int, int]] = {}
        self._ended: collections.deque[tuple[str, stream.Result]] = (
            collections.deque())
        self._started = self._told = time.monotonic()
        self._wire_told = 0

    def begin(self, total: int) -> None:
        """Note how much there is to copy.

        :param total: bytes of all files, holes included
        """
        self._total = total

    def note(self, name: str, done: int, wire: int) -> None:
        """Note the bytes of a file done and sent so far."""
        self._figures[name] = (done, wire)

    def end(self, name: str, result: stream.Result) -> None:
        """Note that a file has arrived."""
        self.note(name, result.length, result.wire)
        self._ended.append((name, result))

    def end_pass(self, name: str, result: stream.Result) -> None:
        """Note that what had changed in a file has arrived."""
        self._ended.append((f'what changed in {name}', result))

    def watch(self, run: ty.Callable[[], None]) -> None:
        """Copy, and report every few seconds how far it is.

        :param run: does it, in another thread
        :raises: what ``run`` raised
        """
        copying = _start(run)
        while not self._ends(copying):
            self._tell_ended()
            self._tell()
            self._save()
        self._tell_ended()
        copying.result()
        if self._figures:
            self._save()

    @property
    def _done(self) -> int:
        return sum(done for done, _wire in list(self._figures.values()))

    @property
    def _wire(self) -> int:
        return sum(wire for _done, wire in list(self._figures.values()))

    def _ends(self, copying: 'futures.Future[None]') -> bool:
        """Wait for the end of a copy, but no longer than the next report."""
        wait = self._told + INTERVAL - time.monotonic()
        return bool(futures.wait([copying], max(0, wait)).done)

    def _tell_ended(self) -> None:
        while self._ended:
            self._tell_end(*self._ended.popleft())

    def _tell(self) -> None:
        now = time.monotonic()
        done, wire = self._done, self._wire
        rate = (wire - self._wire_told) / (now - self._told)
        left = 'unknown'
        if done:
            seconds = (now - self._started) * (self._total - done) / done
            left = f'{seconds:.0f} s'
        self._told, self._wire_told = now, wire
        LOG.info('Copying to %(host)s: %(percent)d %%, %(done)d of %(total)d '
                 'bytes, %(wire)d on the wire, %(rate).1f MiB/s, time left: '
                 '%(left)s',
                 {'host': self._host, 'percent': self._percent(done),
                  'done': done, 'total': self._total, 'wire': wire,
                  'rate': rate / units.Mi, 'left': left},
                 instance=self._instance)

    def _tell_end(self, name: str, result: stream.Result) -> None:
        rate = result.wire / max(result.seconds, 0.001)
        LOG.info('Copied %(name)s to %(host)s: %(bytes)d bytes, %(wire)d on '
                 'the wire, %(seconds).1f s, %(rate).1f MiB/s, read from the '
                 '%(source)s',
                 {'name': name, 'host': self._host, 'bytes': result.length,
                  'wire': result.wire, 'seconds': result.seconds,
                  'rate': rate / units.Mi, 'source': result.source},
                 instance=self._instance)

    def _percent(self, done: int) -> int:
        return done * 100 // max(self._total, 1)

    def _save(self) -> None:
        """Save the figures; the copy goes on if that fails."""
        done = self._done
        try:
            self._save_server(self._percent(done))
            self._save_migration(done)
        except Exception as error:
            LOG.warning('Failed to save the progress of the migration: %s',
                        error, instance=self._instance)

    def _save_server(self, percent: int) -> None:
        if self._instance.progress != percent:
            self._instance.progress = percent
            # Do not save if the server has been deleted meanwhile.
            self._instance.save(
                expected_task_state=task_states.RESIZE_MIGRATING)

    def _save_migration(self, done: int) -> None:
        if self._migration is None:
            self._migration = objects.Migration.get_by_id(
                self._context, self._instance.migration_context.migration_id)
        self._migration.disk_total = self._total
        self._migration.disk_processed = done
        self._migration.disk_remaining = self._total - done
        self._migration.save()


def _start(run: ty.Callable[[], None]) -> 'futures.Future[None]':
    """Call a function in a thread of its own, green under eventlet.

    Not in one of an executor of Nova's: a copy may take hours.
    """
    future: futures.Future[None] = futures.Future()

    def call() -> None:
        try:
            run()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name='copy', daemon=True).start()
    return future
