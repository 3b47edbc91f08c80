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

import os
import pathlib
from unittest import mock

import ddt
import fixtures
from oslo_config import cfg

import nova.conf
from nova import test
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import place

CONF = nova.conf.CONF
DEFAULT = '/var/lib/libvirt/images/nova-disks'
CAPABILITIES = ('<capabilities><host><secmodel><model>{}</model>'
                '</secmodel><secmodel><model>dac</model></secmodel></host>'
                '</capabilities>')


def message(error):
    """An error as the command shows it."""
    return f'{error.reason}; {error.remedy}'


class PathTestCase(test.NoDBTestCase):
    """Which directory is taken where nova.conf names none."""

    def setUp(self):
        super().setUp()
        self.state = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.flags(state_path=str(self.state))
        self.addCleanup(CONF.clear_default, 'disks_pool_path', 'libvirt')

    def test_new_host(self):
        place.adopt(None)
        self.assertEqual(DEFAULT, CONF.libvirt.disks_pool_path)

    def test_pool_that_is_elsewhere(self):
        place.adopt('/var/lib/nova/disks')
        self.assertEqual('/var/lib/nova/disks',
                         CONF.libvirt.disks_pool_path)

    def test_pool_that_nova_conf_knows_better(self):
        location = cfg.LocationInfo(cfg.Locations.user, 'nova.conf')
        with mock.patch.object(cfg.ConfigOpts, 'get_location',
                               return_value=location):
            place.adopt('/var/lib/nova/disks')
            self.assertTrue(place.is_configured())
        self.assertEqual(DEFAULT, CONF.libvirt.disks_pool_path)

    def test_disks_of_an_earlier_release_without_a_pool(self):
        former = self.state / 'disks'
        former.mkdir()
        (former / 'nova-reserved').touch()
        place.adopt(None)
        self.assertEqual(DEFAULT, CONF.libvirt.disks_pool_path)
        (former / 'disk').touch()
        place.adopt(None)
        self.assertEqual(str(former), CONF.libvirt.disks_pool_path)
        self.assertFalse(place.is_configured())


class AccessTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.parent = top / 'images'
        self.path = self.parent / 'disks'
        self.path.mkdir(parents=True)

    def _refusal(self):
        return message(self.assertRaises(
            errors.Refused, place.check_access, str(self.path)))

    def _deny(self, path, mode):
        """Deny what root, who runs tests too, cannot be denied."""
        self.useFixture(fixtures.MockPatchObject(
            os, 'access', lambda asked, wanted: not (
                str(asked) == str(path) and wanted & mode)))

    def test_directory_of_ours(self):
        place.check_access(str(self.path))

    def test_parent_that_lets_nobody_in(self):
        self._deny(self.parent, os.X_OK)
        self.assertIn(f'cannot enter {self.parent}', self._refusal())
        self.assertIn(f'chmod o+x {self.parent}', self._refusal())

    def test_parent_that_may_only_be_entered(self):
        """As Debian has it: 0711."""
        self._deny(self.parent, os.R_OK | os.W_OK)
        place.check_access(str(self.path))

    def test_directory_that_is_not_there(self):
        self.path.rmdir()
        self.assertIn('there is no directory', self._refusal())
        self.assertIn('container', self._refusal())

    def test_directory_of_somebody_else(self):
        self._deny(self.path, os.W_OK)
        self.assertIn(f'cannot write to {self.path}', self._refusal())
        self.assertIn('chown', self._refusal())


@ddt.ddt
class PolicyTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.rules = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path, 'local')
        self.useFixture(fixtures.MockPatchObject(
            place, 'APPARMOR_RULES', str(self.rules)))

    def _check(self, model, path='/var/lib/nova/disks'):
        return place.check_policy(CAPABILITIES.format(model), path)

    def _refusal(self, model):
        return message(
            self.assertRaises(errors.Refused, self._check, model))

    @ddt.data('apparmor', 'selinux')
    def test_default(self, model):
        self.assertEqual(f'{model}, dac', self._check(model, DEFAULT))

    def test_host_without_a_policy(self):
        self.assertEqual('none, dac', self._check('none'))

    def test_place_that_only_begins_like_the_right_one(self):
        self.assertRaises(errors.Refused, self._check, 'apparmor',
                          '/var/lib/libvirt/images-2/disks')

    def test_place_that_only_apparmor_allows(self):
        self.assertEqual('apparmor, dac',
                         self._check('apparmor', '/srv/nova-disks'))
        self.assertRaises(errors.Refused, self._check, 'selinux',
                          '/srv/nova-disks')

    def test_place_that_apparmor_denies(self):
        refusal = self._refusal('apparmor')
        for text in ('AppArmor denies', '/var/lib/nova/disks/** r,'):
            self.assertIn(text, refusal)

    def test_place_that_an_administrator_allowed(self):
        self.rules.write_text('# ours\n  /var/lib/nova/disks/** r,\n')
        self.assertEqual('apparmor, dac', self._check('apparmor'))

    def test_place_that_has_no_label(self):
        for label in OSError(), [b'system_u:object_r:nova_var_lib_t:s0\0']:
            with mock.patch.object(os, 'getxattr', side_effect=label):
                self.assertIn('virt_image_t', self._refusal('selinux'))

    def test_place_that_has_a_label(self):
        label = b'system_u:object_r:virt_image_t:s0\0'
        with mock.patch.object(os, 'getxattr', return_value=label):
            self.assertEqual('selinux, dac', self._check('selinux'))
