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
import contextlib
import functools
import threading
import time
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import exception
from nova import objects
from nova.virt.libvirt.storage import stream

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds between two reports, as in live migration. One costs two calls of
# nova-conductor at most.
INTERVAL = 5

# How long to wait until the last figures are saved, in seconds.
SAVE_SECONDS = 10

_T = ty.TypeVar('_T')

# Events of the action, a migration or a resize, in ``openstack server event
# show``. Each has the time of its start and of its end.
WAITING = 'compute_wait_for_copies'
OFF = 'compute_off_for_migration'


def get_migration(context, instance) -> ty.Any:
    """The record of the migration of a server that is under way."""
    return objects.Migration.get_by_id(
        context, instance.migration_context.migration_id)


@contextlib.contextmanager
def waiting(context, instance, ahead: int) -> ty.Iterator[None]:
    """Tell that a server waits until other migrations have copied.

    :param ahead: how many have to end before
    """
    started = time.monotonic()
    LOG.info('The migration of the server waits, with the server as it is, '
             'until as many others from this host have copied their disks: '
             '%d', ahead, instance=instance)
    _save_status(context, instance, 'queued')
    _save_event('event_start', context, instance, WAITING, host=CONF.host)
    error = None
    try:
        yield
    except BaseException as failure:
        error = failure
        raise
    finally:
        _save_event('event_finish_with_failure', context, instance, WAITING,
                    exc_val=error, exc_tb=error and error.__traceback__)
        _save_status(context, instance, 'migrating')
        LOG.info('The server waited for %.1f s',
                 time.monotonic() - started, instance=instance)


def begin_off(context, instance) -> None:
    """Tell that a server is powered off for its migration."""
    _save_event('event_start', context, instance, OFF, host=CONF.host)


def end_off(context, instance) -> float | None:
    """Tell that a server is on again, or that its host has done its part.

    Nova's own driver on the destination host does not tell. On the host that
    tells last the server is on.

    :returns: seconds since begin_off(), None if that was not called
    """
    event = _save_event('event_finish', context, instance, OFF)
    return event and (event.finish_time - event.start_time).total_seconds()


def _save_event(what: str, context, instance, name: str, **more) -> ty.Any:
    """Save the start or the end of an event; go on if that fails."""
    try:
        return getattr(objects.InstanceActionEvent, what)(
            context, instance.uuid, name, **more)
    except exception.InstanceActionEventNotFound:
        # Its start was not to be told.
        return None
    except Exception as error:
        LOG.warning('Failed to save event %(name)s of the migration: '
                    '%(error)s', {'name': name, 'error': error},
                    instance=instance)
        return None


def _save_status(context, instance, status: str) -> None:
    """Save the status of a migration; go on if that fails."""
    try:
        migration = get_migration(context, instance)
        migration.status = status
        migration.save()
    except Exception as error:
        LOG.warning('Failed to save status %(status)s of the migration: '
                    '%(error)s', {'status': status, 'error': error},
                    instance=instance)


class Progress:
    """The files of one server on their way to another host.

    A transfer is watched through begin(), note() and end(), which only take
    notes: they are called in the thread that copies. watch() writes the log in
    the thread that waits, which is one of Nova's: under eventlet a native
    thread cannot. The figures are saved in a third thread: a server whose copy
    has failed starts again even if the database does not answer.
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
        self._saving: futures.Future[None] | None = None
        self._figures: dict[str, tuple[int, int]] = {}
        self._changed: dict[str, tuple[int, float]] = {}
        self._untold: collections.deque[ty.Callable[[], None]] = (
            collections.deque())
        # Bytes sent in all copies that have ended, and their seconds.
        self._sent, self._sending = 0, 0.0
        self._started = self._told = time.monotonic()
        self._wire_told = 0

    def begin(self, total: int) -> None:
        """Note how many bytes all files have, holes included."""
        self._total = total

    def note(self, name: str, done: int, wire: int) -> None:
        """Note the bytes of a file done and sent so far."""
        self._figures[name] = (done, wire)

    def end(self, name: str, result: stream.Result) -> None:
        """Note that a file has arrived."""
        self.note(name, result.length, result.wire)
        self._end(name, name, result)

    def changed(self, name: str, changed: int, seconds: float) -> None:
        """Note what a server has changed in a file since its last copy.

        :param changed: bytes
        :param seconds: it took to find that out
        """
        self._changed[name] = changed, seconds
        self._untold.append(functools.partial(
            self._tell_changed, name, changed))

    def end_pass(self, name: str, result: stream.Result) -> None:
        """Note that what had changed in a file has arrived."""
        self._end(name, f'what changed in {name}', result)

    def _end(self, name: str, told: str, result: stream.Result) -> None:
        self._sent += result.wire
        self._sending += result.seconds
        self._changed.pop(name, None)
        self._untold.append(functools.partial(self._tell_end, told, result))

    def get_remaining(self, done: int) -> int:
        """Bytes that are still to be copied, as far as that is known.

        :param done: bytes that have been copied
        """
        return self._total - done + sum(
            changed for changed, _seconds in list(self._changed.values()))

    @property
    def seconds_off(self) -> float | None:
        """Seconds to copy, with the server off, what it has changed so far.

        None if nothing was sent yet that would tell how fast that is.
        """
        if not self._sent:
            return None
        figures = list(self._changed.values())
        return (sum(seconds for _changed, seconds in figures) +
                sum(changed for changed, _seconds in figures) *
                self._sending / self._sent)

    def tell_power_off(self) -> None:
        """Tell what is left to copy when the server is powered off."""
        seconds = self.seconds_off
        if self._changed and seconds is not None:
            LOG.info('The disks of the server are on %(host)s. The server is '
                     'powered off to copy what it has changed since: '
                     '%(bytes)d bytes so far, which takes about %(seconds).1f '
                     's', {'host': self._host, 'seconds': seconds,
                           'bytes': sum(changed for changed, _seconds
                                        in self._changed.values())},
                     instance=self._instance)

    def lose(self, error: Exception, seconds: int) -> None:
        """Note that a connection was lost, and is opened again."""
        self._untold.append(
            functools.partial(self._tell_loss, error, seconds))

    def watch(self, run: ty.Callable[[], _T]) -> _T:
        """Copy, and report every few seconds how far it is.

        :param run: does it, in another thread
        :returns: what ``run`` returned
        :raises: what ``run`` raised
        """
        copying = start(run)
        while not self._ends(copying):
            self._tell_untold()
            self._tell()
            self._save()
        self._tell_untold()
        result = copying.result()
        if self._figures:
            self._wait_for_save()
            self._save()
            # Nova saves the next state of the server after this.
            self._wait_for_save()
        return result

    @property
    def _done(self) -> int:
        return sum(done for done, _wire in list(self._figures.values()))

    @property
    def _wire(self) -> int:
        return sum(wire for _done, wire in list(self._figures.values()))

    def _ends(self, copying: 'futures.Future[ty.Any]') -> bool:
        """Wait for the end of a copy, but no longer than the next report."""
        wait = self._told + INTERVAL - time.monotonic()
        return bool(futures.wait([copying], max(0, wait)).done)

    def _tell_loss(self, error: Exception, seconds: int) -> None:
        LOG.warning('Lost the connection to %(host)s, connecting again for up '
                    'to %(seconds)d s: %(error)s',
                    {'host': self._host, 'seconds': seconds, 'error': error},
                    instance=self._instance)

    def _tell_untold(self) -> None:
        while self._untold:
            self._untold.popleft()()

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

    def _tell_changed(self, name: str, changed: int) -> None:
        LOG.info('The server has changed %(bytes)d bytes of %(name)s while '
                 'that was copied', {'bytes': changed, 'name': name},
                 instance=self._instance)

    def _percent(self, done: int) -> int:
        return done * 100 // max(self._total, 1)

    def _wait_for_save(self) -> None:
        if self._saving:
            futures.wait([self._saving], SAVE_SECONDS)

    def _save(self) -> None:
        """Save the figures, unless the last are still being saved."""
        if self._saving and not self._saving.done():
            return
        done = self._done
        percent = self._percent(done)
        server = None
        if self._instance.progress != percent:
            # Save a copy: Nova's own object keeps what Nova has changed in it
            # and has not saved yet.
            server = self._instance.obj_clone()
            server.obj_reset_changes()
            for instance in server, self._instance:
                instance.progress = percent
            self._instance.obj_reset_changes(['progress'])
        self._saving = start(
            functools.partial(self._save_figures, server, done))

    def _save_figures(self, server, done: int) -> None:
        """Save the figures; the copy goes on if that fails.

        :param server: copy of the server with its new progress; None if the
            progress has not changed
        """
        try:
            if server:
                # Do not save if the server has been deleted meanwhile.
                server.save(expected_task_state=task_states.RESIZE_MIGRATING)
            self._save_migration(done)
        except Exception as error:
            LOG.warning('Failed to save the progress of the migration: %s',
                        error, instance=self._instance)

    def _save_migration(self, done: int) -> None:
        if self._migration is None:
            self._migration = get_migration(self._context, self._instance)
        self._migration.disk_total = self._total
        self._migration.disk_processed = done
        self._migration.disk_remaining = self.get_remaining(done)
        self._migration.save()


def start(run: ty.Callable[[], _T]) -> 'futures.Future[_T]':
    """Call a function in a thread of its own, green under eventlet.

    Not in one of an executor of Nova's: a copy may take hours.

    :returns: its result, when it has ended
    """
    future: futures.Future[_T] = futures.Future()

    def call() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future
