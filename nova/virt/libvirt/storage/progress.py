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

"""How far the disks of a server are, told where operators look.

That is in ``openstack server show`` while the server is resized or migrated,
in the record of its migration, and in the log.
"""

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
    """The disks of one server on their way to another host.

    What copies them runs in threads of its own, and only notes how far it is.
    All that needs the database or the log happens in the thread that waits,
    which is one of Nova's: under eventlet a native thread could do neither.
    """

    def __init__(self, context, instance, host: str, total: int):
        """Begin to measure; nothing is told yet.

        :param instance: the server; its ``progress`` becomes per cent
        :param host: address of the destination
        :param total: bytes of all disks, holes included
        """
        self._context = context
        self._instance = instance
        self._host = host
        self._total = total
        self._migration: ty.Any = None
        self._figures: dict[str, tuple[int, int]] = {}
        self._started = self._told = time.monotonic()
        self._wire_told = 0

    def watch(
        self, disk: str, copy: ty.Callable[[stream.Progress], stream.Result],
    ) -> stream.Result:
        """Copy a disk, and tell every few seconds how far it is.

        :param disk: its name
        :param copy: does it, in another thread; is given what to call with
            the bytes done and sent so far
        :returns: what ``copy`` returned
        :raises: what ``copy`` raised
        """
        def note(done: int, wire: int) -> None:
            self._figures[disk] = (done, wire)

        copying = _start(lambda: copy(note))
        while not self._ends(copying):
            self._tell()
            self._save()
        result = copying.result()
        note(result.length, result.wire)
        self._tell_end(disk, result)
        if self._done == self._total:
            self._save()
        return result

    @property
    def _done(self) -> int:
        return sum(done for done, _wire in list(self._figures.values()))

    @property
    def _wire(self) -> int:
        return sum(wire for _done, wire in list(self._figures.values()))

    def _ends(self, copying: 'futures.Future[stream.Result]') -> bool:
        """Wait for the end of a copy, but no longer than the next report."""
        wait = self._told + INTERVAL - time.monotonic()
        return bool(futures.wait([copying], max(0, wait)).done)

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

    def _tell_end(self, disk: str, result: stream.Result) -> None:
        rate = result.wire / max(result.seconds, 0.001)
        LOG.info('Copied %(disk)s to %(host)s: %(bytes)d bytes, %(wire)d on '
                 'the wire, %(seconds).1f s, %(rate).1f MiB/s, read from the '
                 '%(source)s',
                 {'disk': disk, 'host': self._host, 'bytes': result.length,
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
            # Of a server that was deleted nothing is to be saved any more.
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


def _start(
    function: ty.Callable[[], stream.Result],
) -> 'futures.Future[stream.Result]':
    """Call a function in a thread of its own, green under eventlet.

    Not one of an executor of Nova's: a copy may take hours.
    """
    future: futures.Future[stream.Result] = futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name='copy', daemon=True).start()
    return future
