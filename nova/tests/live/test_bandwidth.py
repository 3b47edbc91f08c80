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

from concurrent import futures
import time

from oslo_utils import units

from nova.tests.live import moves
from nova.tests.live import test_transfer
from nova.virt.libvirt.storage import stream

RATE = 16 * units.Mi


class BandwidthTestCase(test_transfer.TransferTestCase):
    """One limit for all copies from a host, over real connections."""

    def _new_disk(self, data, hole):
        """Write a disk; return the transfer that is ready to copy it."""
        self._name_server()
        self._make_disk(data + hole, [(0, data)])
        return self._start(), self.volume

    def _copy_all(self, *disks):
        """Copy disks at once; return the rate of all, and the results."""
        with futures.ThreadPoolExecutor() as executor:
            started = time.monotonic()
            copies = [executor.submit(self._result, *disk)
                      for disk in disks]
            results = [copy.result() for copy in copies]
            seconds = time.monotonic() - started
        return sum(result.wire for result in results) / seconds, results

    def _result(self, move, volume):
        watch = moves.Watch()
        move.run(watch=watch)
        return watch.results[volume]

    def _assert_limited(self, *sizes):
        """Copy disks at once; all keep to the limit, and share it alike.

        A machine that has other things to do makes them slower, and not all
        by as much: that is tried three times. It makes them no faster.
        """
        self.bandwidth = stream.Bandwidth(RATE)
        share = RATE / len(sizes)
        for _attempt in range(3):
            rate, results = self._copy_all(
                *[self._new_disk(*size) for size in sizes])
            self.assertLess(rate, 1.05 * RATE)
            rates = [result.wire / result.seconds for result in results]
            if rate > 0.95 * RATE and all(
                    0.95 < each / share < 1.05 for each in rates):
                return
        self.fail(f'{rates}, {rate} in all, where {RATE} are allowed')

    def test_one_copy(self):
        self._assert_limited((64 * units.Mi, units.Gi))

    def test_two_copies_share_the_limit(self):
        self._assert_limited((32 * units.Mi, units.Gi), (32 * units.Mi, 0))

    def test_one_copy_without_a_limit(self):
        """What the others are held up by is not the lab."""
        rate, _results = self._copy_all(self._new_disk(64 * units.Mi, 0))
        self.assertGreater(rate, 1.5 * RATE)
