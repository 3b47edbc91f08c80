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

"""Threads for calls that block, in both of Nova's concurrency modes.

A call into libvirt can block its thread for as long as a daemon or a disk
hangs. The eventlet hub must never make one, and neither may a thread of
eventlet's tpool: that has 20, which Nova's own libvirt calls go through.
"""

import functools
import os
import signal
import sys
import threading
import time
import typing as ty

# The other modules of this package take it from here. It may be missing where
# nothing connects to libvirt, as in unit tests.
try:
    import libvirt
except ImportError:
    libvirt = None

_T = ty.TypeVar('_T')

# Seconds between two looks whether to go on waiting.
POLL_SECONDS = 0.2

# Name of the native threads of off_hub().
OFF_HUB = 'off-hub'

# Asked for once: it takes nearly as long as to start a thread.
_SIGNALS = signal.valid_signals()


class NoAnswer(TimeoutError):
    """A call took too long.

    :ivar thread: in which it goes on
    """

    def __init__(self, seconds: float, thread: ty.Any):
        super().__init__(f'no answer within {seconds} seconds')
        self.thread = thread


def get_eventlet() -> ty.Any:
    """The module eventlet if this process runs under it, else None.

    nova.utils tells the concurrency mode from Nova 32 on, and differently in
    each release. Look at the process instead, and import nothing: with native
    threads Nova 34 forbids the import of eventlet.
    """
    eventlet = sys.modules.get('eventlet')
    if eventlet is None or not eventlet.patcher.is_monkey_patched('thread'):
        return None
    return eventlet


def native_threading() -> ty.Any:
    """The threading module whose threads and locks are the system's own."""
    eventlet = get_eventlet()
    return eventlet.patcher.original('threading') if eventlet else threading


def native_os() -> ty.Any:
    """The os module whose functions are the system's own."""
    eventlet = get_eventlet()
    return eventlet.patcher.original('os') if eventlet else os


def off_hub(
    function: ty.Callable[..., ty.Any], *args: ty.Any, **kwargs: ty.Any,
) -> ty.Any:
    """Call a function that may block, off the eventlet hub if there is one.

    Under eventlet the function runs in a native thread of its own, and only
    the calling green thread waits for it. With native threads this is a plain
    call.

    The function must not start programs. Python's logging holds its lock
    during a fork, and under eventlet that is eventlet's: of two threads that
    fork at once, one may wait for ever.

    :returns: what the function returns
    :raises: what the function raises
    """
    eventlet = get_eventlet()
    if eventlet is None:
        return function(*args, **kwargs)
    # The end of file on the pipe wakes up the hub as soon as the thread ends.
    reader, writer = native_os().pipe()

    def run(outcome: dict[str, ty.Any]) -> None:
        try:
            _record(outcome, functools.partial(function, *args, **kwargs))
        finally:
            native_os().close(writer)

    outcome: dict[str, ty.Any] = {}
    try:
        _start_native(functools.partial(run, outcome), OFF_HUB)
    except RuntimeError:
        # There are too many threads.
        native_os().close(reader)
        native_os().close(writer)
        raise
    try:
        eventlet.hubs.trampoline(reader, read=True)
    finally:
        native_os().close(reader)
    return _result(outcome)


def spawn(function: ty.Callable[..., None], *args: ty.Any) -> None:
    """Call a function beside, and do not wait for it.

    The function runs in a thread as nova-compute has them: a green thread
    under eventlet, a native one otherwise. It takes none of Nova's executors,
    whose few threads Nova's own work needs, and has to handle its errors.
    """
    threading.Thread(target=function, args=args, daemon=True).start()


def start(function: ty.Callable[[], None], name: str) -> ty.Any:
    """Start a native thread that the system gives no signals to.

    libvirt's client sets the signal mask of its thread twice for each message.
    A thread that does so takes a signal of the process before the main thread
    wakes up, and Python handles signals in the main thread only: nova-compute
    would not end when it is told to while it copies (see
    bugs.python.org/issue5315).

    The function must not start programs: they would get no signals either.

    :returns: the thread, which does not keep the process from ending
    """
    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        function()

    return _start_native(run, name)


def _start_native(function: ty.Callable[[], None], name: str) -> ty.Any:
    eventlet = get_eventlet()

    def run() -> None:
        if eventlet:
            eventlet.hubs.use_hub(_NoHub)
        function()

    thread = native_threading().Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class _NoHub:
    """The hub of a native thread that has none.

    eventlet tells the hub of a thread of each file that os.open() opens there,
    and makes a hub for that if need be. It has a descriptor and a greenlet,
    which garbage collection frees in another thread after this one has ended.
    What waits as a green thread does still gets a hub.
    """

    @staticmethod
    def is_available() -> bool:
        return True

    def mark_as_reopened(self, descriptor: int) -> None:
        pass

    def __getattr__(self, name: str) -> ty.Any:
        if name.startswith('_'):
            raise AttributeError(name)
        hubs = get_eventlet().hubs
        if hubs.get_hub() is self:
            hubs.use_hub()
        return getattr(hubs.get_hub(), name)


def within(seconds: float, function: ty.Callable[[], _T],
           gives_up: ty.Callable[[], bool] = lambda: False) -> _T:
    """Call a function in a native thread, and wait for it so long.

    Blocks the calling native thread.

    :param seconds: how long to wait
    :param gives_up: asked a few times a second whether not to wait any longer
    :raises: NoAnswer; the thread then ends when the function does
    :raises: what the function raises
    """
    outcome: dict[str, ty.Any] = {}
    thread = start(functools.partial(_record, outcome, function),
                   'libvirt-call')
    deadline = time.monotonic() + seconds
    while thread.is_alive() and not gives_up() and (
            left := deadline - time.monotonic()) > 0:
        thread.join(min(left, POLL_SECONDS))
    if thread.is_alive():
        # Let the thread drop a late result: freeing a libvirt object can
        # block too, and an error that holds `outcome` would free it in the
        # caller's thread.
        del outcome
        raise NoAnswer(seconds, thread)
    return _result(outcome)


def sleep(seconds: float) -> None:
    """Let a native thread sleep.

    time.sleep() is the hub's under eventlet, and would make a hub of its own
    in a native thread.
    """
    native_threading().Event().wait(seconds)


@functools.cache
def run_event_loop() -> None:
    """Run libvirt's event loop in this process, as nova-compute does.

    Without an event loop no connection is kept alive, and no lost connection
    is noticed.
    """
    # libvirt would print the errors that it raises as well.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    start(loop, 'libvirt-events')


def _record(
    outcome: dict[str, ty.Any], function: ty.Callable[[], ty.Any],
) -> None:
    try:
        outcome['result'] = function()
    except BaseException as error:
        # The caller waits for a result, whatever ends the thread.
        forget_frames(error)
        outcome['error'] = error


def forget_frames(error: BaseException) -> None:
    """Let an error keep alive none of what the calls that failed worked with.

    libvirt's objects are among it. Freeing the last one of a connection closes
    that, which may take long, in whatever thread drops the error or collects
    garbage. Call this in the thread that raised the error.
    """
    chain = [error]
    for each in chain:
        each.__traceback__ = None
        chain += [other for other in (each.__cause__, each.__context__)
                  if other is not None and other not in chain]


def _result(outcome: dict[str, ty.Any]) -> ty.Any:
    if 'error' in outcome:
        # Its traceback will lead here, and must not lead back to it.
        raise outcome.pop('error')
    return outcome['result']
