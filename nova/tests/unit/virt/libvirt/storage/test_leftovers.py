#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.


from unittest import mock

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import test
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import leftovers

MINUTE = 60
DAY = 24 * 60 * MINUTE


class LeftoversTestCase(test.NoDBTestCase):
    """nova-compute retries once a minute, on a clock that tests turn."""

    def setUp(self):
        super().setUp()
        self.now = 1000.0
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.leftovers.time.monotonic',
            lambda: self.now))
        self.leftovers = leftovers.Leftovers()

    def _add(self, uuid=uuids.server, host='dest', error=None):
        discard = mock.Mock(side_effect=error)
        self.leftovers.add(uuid, host, discard)
        return discard

    def _retry(self, minutes=1):
        for _ in range(minutes):
            self.leftovers.retry()
            self.now += MINUTE

    @staticmethod
    def _error(cause=None):
        error = errors.HostError('dest', 'qemu+tls://dest/system', 'it burns')
        error.__cause__ = cause
        return error

    def test_nothing_is_left(self):
        self.assertFalse(self.leftovers)
        self.leftovers.retry()

    def test_copy_is_deleted_at_once(self):
        discard = self._add()
        self.assertTrue(self.leftovers)

        self._retry(5)

        discard.assert_called_once_with()
        self.assertFalse(self.leftovers)

    def test_host_is_asked_less_and_less(self):
        asked = []
        self._add(error=lambda: asked.append(self.now) or self._raise())

        self._retry(8 * 60)

        waits = [second - first for first, second in zip(asked, asked[1:])]
        self.assertEqual(
            [minutes * MINUTE for minutes in (1, 2, 4, 8, 16, 32)], waits[:6])
        self.assertEqual({60 * MINUTE}, set(waits[6:]))
        self.assertTrue(self.leftovers)
        self.assertIn('it burns', self.stdlog.logger.output)

    def _raise(self):
        raise self._error()

    def test_host_that_hangs_is_asked_for_one_server_at_a_time(self):
        discards = [self._add(uuid, error=self._error())
                    for uuid in (uuids.one, uuids.two, uuids.three)]

        self._retry()

        self.assertEqual(1, sum(each.call_count for each in discards))

    def test_all_servers_of_a_host_are_deleted_once_it_answers(self):
        discards = [self._add(uuid, error=self._error())
                    for uuid in (uuids.one, uuids.two, uuids.three)]
        self._retry(30)
        for each in discards:
            each.side_effect = None

        self._retry(60)

        self.assertFalse(self.leftovers)
        for each in discards:
            self.assertTrue(each.called)

    def test_every_server_of_a_host_has_its_turn(self):
        """One that cannot be deleted is in no other's way for ever."""
        stuck = self._add(uuids.one, error=self._error())
        good = self._add(uuids.two)

        self._retry(10)

        good.assert_called_once_with()
        self.assertTrue(stuck.called)
        self.assertTrue(self.leftovers)

    def test_hosts_do_not_wait_for_each_other(self):
        self._add(host='hangs', error=self._error())
        self._retry(10)
        good = self._add(host='dest')

        self._retry()

        good.assert_called_once_with()

    def test_copy_is_given_up_after_a_day(self):
        discard = self._add(error=self._error())

        self._retry(26 * 60)

        self.assertFalse(self.leftovers)
        self.assertLess(discard.call_count, 40)
        log = self.stdlog.logger.output
        self.assertIn('Giving up on the unfinished copy of server '
                      f'{uuids.server} on dest', log)
        self.assertEqual(1, log.count('Giving up'))

    def test_copy_is_not_given_up_before(self):
        self._add(error=self._error())

        self._retry(23 * 60)

        self.assertTrue(self.leftovers)

    def test_copy_that_is_another_attempt_s_is_nothing_left(self):
        discard = self._add(error=self._error(
            errors.Superseded('another attempt took over')))

        self._retry(10)

        discard.assert_called_once_with()
        self.assertFalse(self.leftovers)

    def test_next_failure_of_a_server_replaces_the_one_before(self):
        first, second = self._add(), self._add()

        self._retry()

        first.assert_not_called()
        second.assert_called_once_with()

    def test_host_that_answered_is_asked_at_once_the_next_time(self):
        failing = self._add(error=self._error())
        self._retry(20)
        failing.side_effect = None
        self._retry(60)
        again = self._add()

        self._retry()

        again.assert_called_once_with()

    def test_host_that_takes_its_time_is_asked_by_one_at_a_time(self):
        """The next retry may come before the one before has ended."""
        discard = self._add()

        def hang():
            self.now += 10 * MINUTE
            self.leftovers.retry()

        discard.side_effect = hang
        self._retry()

        discard.assert_called_once_with()
        self.assertFalse(self.leftovers)

    def test_copy_that_is_left_meanwhile_is_not_forgotten(self):
        later = []
        self._add(error=lambda: later.append(self._add()))

        self._retry(3)

        later[0].assert_called_once_with()
        self.assertFalse(self.leftovers)
