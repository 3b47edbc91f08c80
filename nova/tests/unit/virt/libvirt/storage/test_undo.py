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

from nova import test
from nova.virt.libvirt.storage import undo


class UndoTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.undone = []

    def _fail(self, *pushed):
        with undo.Undo() as steps:
            for each in pushed:
                steps.push(self.undone.append, each)
            raise test.TestingException

    def test_steps_are_undone_in_the_opposite_order(self):
        self.assertRaises(test.TestingException, self._fail, 1, 2, 3)

        self.assertEqual([3, 2, 1], self.undone)

    def test_nothing_is_undone_after_a_commit(self):
        with undo.Undo() as steps:
            steps.push(self.undone.append, 1)
            steps.commit()
            steps.push(self.undone.append, 2)
            steps.commit()

        self.assertEqual([], self.undone)

    def test_what_follows_a_commit_is_undone(self):
        with self.assertRaises(test.TestingException):
            with undo.Undo() as steps:
                steps.push(self.undone.append, 1)
                steps.commit()
                steps.push(self.undone.append, 2)
                raise test.TestingException

        self.assertEqual([2], self.undone)

    def test_nothing_is_undone_if_nothing_fails(self):
        with undo.Undo() as steps:
            steps.push(self.undone.append, 1)

        self.assertEqual([], self.undone)

    def test_end_of_the_process_undoes_nothing(self):
        # The next start of nova-compute does.
        with self.assertRaises(KeyboardInterrupt):
            with undo.Undo() as steps:
                steps.push(self.undone.append, 1)
                raise KeyboardInterrupt

        self.assertEqual([], self.undone)

    def test_undo_that_fails_hides_no_error_and_stops_no_other(self):
        second = ValueError('second')
        steps = undo.Undo()
        with self.assertRaises(test.TestingException):
            with steps:
                steps.push(self.undone.append, 1)
                steps.push(mock.Mock(side_effect=second))
                steps.push(self.undone.append, 3)
                raise test.TestingException

        self.assertEqual([3, 1], self.undone)
        self.assertEqual([second], steps.failures)
        self.assertIn('Failed to undo', self.stdlog.logger.output)

    def test_later_steps_see_what_failed_before_them(self):
        steps = undo.Undo()
        steps.push(lambda: self.undone.append(len(steps.failures)))
        steps.push(mock.Mock(side_effect=ValueError))

        steps.rewind()

        self.assertEqual([1], self.undone)

    def test_rewind_undoes_once(self):
        steps = undo.Undo()
        steps.push(self.undone.append, 1)

        steps.rewind()
        steps.rewind()

        self.assertEqual([1], self.undone)
