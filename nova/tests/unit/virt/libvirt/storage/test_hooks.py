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

import ast
import csv
import inspect
import pathlib
from unittest import mock

from nova import exception
from nova import test
from nova.tests.unit.virt.libvirt import test_storage_migrate
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import hooks
from nova.virt.libvirt import storage_migrate

ROOT = pathlib.Path(__file__).resolve().parents[6]
TABLE = ROOT / 'doc/source/contributor/hooks.csv'
VERSIONS = ROOT / 'tools/nova-versions.txt'


def names(overridden):
    return {name for name, hook in hooks.HOOKS.items()
            if hook.overridden == overridden}


def used_names():
    """The attributes of its own instance, or class, that our driver uses."""
    tree = ast.parse(inspect.getsource(storage_migrate))
    return {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and
            ast.unparse(node.value) in (
                'self', 'super()', 'driver.LibvirtDriver')}


class HooksTestCase(test.NoDBTestCase):

    def test_this_nova_has_them(self):
        self.assertEqual([], hooks.find_problems(driver.LibvirtDriver))

    def test_what_the_driver_overrides_is_among_them(self):
        overridden = {
            name for name in vars(storage_migrate.LibvirtDriver)
            if not name.startswith('__') and
            hasattr(driver.LibvirtDriver, name)}
        self.assertEqual(names(overridden=True), overridden)

    def test_what_the_driver_calls_is_among_them(self):
        inherited = {
            name for name in used_names()
            if name not in vars(storage_migrate.LibvirtDriver) and
            callable(getattr(driver.LibvirtDriver, name, None))}
        self.assertEqual(
            set(), inherited - names(overridden=False) - {'__init__'})

    def test_what_is_missing_is_named(self):
        class Another:
            def init_host(self):
                pass

        problems = hooks.find_problems(Another)
        self.assertEqual(len(hooks.HOOKS), len(problems))
        self.assertIn('init_host does not take host', problems)
        self.assertIn('migrate_disk_and_power_off is missing', problems)

    def test_the_driver_declares_what_nova_does(self):
        for name in names(overridden=True):
            hook = getattr(driver.LibvirtDriver, name)
            if callable(hook):
                self.assertEqual(
                    list(inspect.signature(hook).parameters),
                    list(inspect.signature(getattr(
                        storage_migrate.LibvirtDriver, name)).parameters))

    def test_the_documentation_lists_them(self):
        with TABLE.open(newline='') as table:
            head, *rows = csv.reader(table)
        self.assertEqual(['Method', 'Use', 'Relied on for'], head)
        self.assertEqual(
            [(f'``{name}``', 'overrides' if hook.overridden else 'calls')
             for name, hook in hooks.HOOKS.items()],
            [(method, use) for method, use, _reason in rows])
        self.assertTrue(all(reason for _method, _use, reason in rows))

    def test_releases_are_those_of_the_tests(self):
        self.assertEqual(list(hooks.RELEASES), [
            int(line.split()[0])
            for line in VERSIONS.read_text().splitlines()
            if not line.startswith('#')])


class CheckTestCase(test.NoDBTestCase):

    def _check(self, version, nova_driver=driver.LibvirtDriver):
        with (mock.patch('nova.version.version_string', return_value=version),
              mock.patch.object(storage_migrate.LOG, 'info') as info,
              mock.patch.object(storage_migrate.LOG, 'warning') as warning):
            storage_migrate.check_hooks(nova_driver)
        return info, warning

    def test_release_and_number_of_hooks_are_logged(self):
        for version in ('31.3.1', '34.0.0.0rc1'):
            info, warning = self._check(version)
            self.assertEqual(
                {'found': version, 'count': len(hooks.HOOKS)},
                info.call_args.args[1])
            warning.assert_not_called()

    def test_release_that_was_not_tested_is_warned_of(self):
        _info, warning = self._check('35.0.0')
        message = warning.call_args.args[0] % warning.call_args.args[1]
        self.assertIn('Nova 35.0.0 has all', message)
        self.assertIn('tested with Nova 31 to 34 only', message)

    def test_nova_without_them_is_refused_with_what_is_wrong(self):
        error = self.assertRaises(
            exception.InternalError, self._check, '30.0.0', object)
        self.assertIn('needs Nova 31 to 34. This is Nova 30.0.0', str(error))
        self.assertIn('confirm_migration is missing', str(error))


class LaterTestCase(test_storage_migrate.DriverTestCase):
    """What only some releases pass is passed on to Nova's own method.

    In every release: the mocks take what Nova's method may not.
    """

    def test_finish_migration(self):
        with mock.patch.object(driver.LibvirtDriver, 'finish_migration',
                               autospec=False) as nova:
            self.driver.finish_migration(
                self.context, mock.sentinel.migration, self.instance,
                '[{"path": "disk", "type": "qcow2"}]',
                mock.sentinel.network_info, mock.sentinel.image_meta, False,
                {}, share_info=mock.sentinel.shares)
        self.assertEqual(
            {'share_info': mock.sentinel.shares}, nova.call_args.kwargs)

    def test_finish_revert_migration(self):
        with mock.patch.object(
                driver.LibvirtDriver, 'finish_revert_migration',
                autospec=False) as nova:
            self.driver.finish_revert_migration(
                self.context, self.instance, mock.sentinel.network_info,
                mock.sentinel.migration, share_info=mock.sentinel.shares)
        self.assertEqual(
            {'share_info': mock.sentinel.shares}, nova.call_args.kwargs)
