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

from nova import test
from nova.virt.libvirt.storage import errors


class ErrorTestCase(test.NoDBTestCase):

    def test_reason_and_remedy(self):
        self.assertEqual(
            'it burns. Put it out.',
            str(errors.Refused('it burns.', 'Put it out.')))

    def test_host_and_uri(self):
        self.assertEqual(
            'host d (qemu+tls://d/system): it burns. Put it out.',
            str(errors.HostError(
                'd', 'qemu+tls://d/system', 'it burns', 'Put it out.')))

    def test_long_reason_is_cut_and_the_remedy_is_not(self):
        error = errors.HostError(
            'd' * 30, f'qemu+tls://{"d" * 30}/system', 'a' * 200 + 'z' * 200,
            'Put it out.')
        text = str(error)
        self.assertEqual(errors.MESSAGE_LENGTH, len(text))
        self.assertIn('aa...zz', text)
        self.assertTrue(text.endswith('. Put it out.'), text)

    def test_question_needs_no_full_stop(self):
        self.assertEqual(
            'd: does it burn? Put it out.',
            str(errors.HostError('d', 'd', 'does it burn?', 'Put it out.'))
            .replace('host d (d)', 'd'))

    def test_attributes(self):
        error = errors.CopyError('source', '/a/disk', 7, 'no /a/disk')
        self.assertEqual(('source', '/a/disk', 7),
                         (error.end, error.path, error.done))
        self.assertEqual('source failed after 7 bytes: no the volume',
                         str(error))

    def test_note(self):
        error = ValueError('x')
        errors.add_note(error, 'one')
        errors.add_note(error, 'two')
        self.assertEqual(['one', 'two'], error.__notes__)

    def test_note_in_python_3_10(self):
        # Its exceptions have no add_note(), as this class seems not to have.
        class OldError(ValueError):
            @property
            def add_note(self):
                raise AttributeError

        error = OldError('x')
        errors.add_note(error, 'one')
        errors.add_note(error, 'two')
        self.assertEqual(['one', 'two'], error.__notes__)
