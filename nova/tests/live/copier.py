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

"""Move a disk as nova-compute would, in a process that can be measured.

Reads its arguments as JSON from standard input, and prints what it saw as
JSON: the copy's result, how much the process grew, and how late a (green)
thread was that wanted to wake up every 10 ms; for a benchmark also the seconds
and CPU seconds from connecting to the check of what arrived. The concurrency
mode is that of OS_NOVA_DISABLE_EVENTLET_PATCHING.

The argument ``read`` says how to read the disk: direct, volume, or memory for
as many random bytes instead. With ``discard`` the copy is deleted at the end,
after a line from standard input.
"""

from nova import monkey_patch; monkey_patch.patch()  # noqa

import dataclasses
import os
import resource
import sys
import threading
import time

from oslo_serialization import jsonutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.tests.live import moves
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads

INTERVAL = 0.01


def main() -> None:
    arguments = jsonutils.loads(sys.stdin.readline())
    threads.run_event_loop()
    nova.conf.CONF.set_override(
        'vol_upload_migration_direct_read', arguments.get('read') != 'volume',
        group='libvirt')
    if arguments.get('read') == 'memory':
        stream.open_source = lambda *args: MemorySource()
    name = arguments['uuid'] + '_disk'
    move = moves.new_transfer(
        arguments['source_uri'], 'destination', arguments['destination_uri'],
        arguments['pool'],
        layout.Layout(arguments['uuid'], '', arguments['directory']),
        [Disk(name, layout.POOL, '', 'raw')])
    watch = moves.Watch()
    started, cpu = time.monotonic(), cpu_seconds()
    native(moves.start, move)
    before = memory('VmRSS')
    sleeper = Sleeper()
    sleeper.start()
    print('started', flush=True)
    native(move.run, None, watch)
    seen = {'seconds': time.monotonic() - started,
            'cpu': cpu_seconds() - cpu}
    sleeper.stop()
    print(jsonutils.dumps(seen | {
        'result': dataclasses.asdict(watch.results[name]),
        'grown': memory('VmHWM') - before,
        'memory': memory('VmHWM'),
        'late': sleeper.late,
        'late_99': sleeper.late_99,
        'wakes': sleeper.wakes,
    }), flush=True)
    if arguments.get('discard'):
        sys.stdin.readline()
        native(move.discard)
    native(move.close)


class Disk(layout.File):
    """A disk whose file this process may not see."""

    def allocation(self) -> int:
        return 0


class MemorySource:
    """Random bytes, which cost nothing to read: the limit of an upload."""
    path = kind = 'memory'

    def chunks(self, length: int) -> stream.Chunks:
        data = os.urandom(stream.MESSAGE_BYTES)
        for left in range(length, 0, -len(data)):
            yield data[:left]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def native(function, *args):
    return threads.off_hub(function, *args)


def memory(field: str) -> int:
    """Bytes of this process, a field of /proc/self/status."""
    with open('/proc/self/status') as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


class Sleeper(threading.Thread):
    """Wants to wake up every 10 ms; a green thread under eventlet.

    :ivar late: the seconds that it was late at worst
    :ivar late_99: the seconds that it was late at the 99th percentile
    """

    def __init__(self):
        super().__init__(daemon=True)
        self._late: list[float] = []
        self._running = True

    @property
    def wakes(self) -> int:
        return len(self._late)

    @property
    def late(self) -> float:
        return max(self._late, default=0.0)

    @property
    def late_99(self) -> float:
        return sorted(self._late)[len(self._late) * 99 // 100]

    def run(self) -> None:
        while self._running:
            start = time.monotonic()
            time.sleep(INTERVAL)
            self._late.append(time.monotonic() - start - INTERVAL)

    def stop(self) -> None:
        self._running = False
        self.join()


if __name__ == '__main__':
    main()
