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

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

import fixtures
from oslo_serialization import jsonutils
from oslo_utils import units

from nova.cmd import storage_migrate
from nova.conf import storage_migrate as storage_migrate_conf  # noqa: F401
from nova import test
from nova.virt.libvirt.storage import check


class CommandTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(host='here', my_ip='192.0.2.1')
        self.flags(vol_upload_migration_uri='qemu+tls://%s/system',
                   group='libvirt')
        for name in ('_forbid_prompts', '_configure'):
            self._patch(storage_migrate, name)
        self._patch(storage_migrate.threads, 'run_event_loop')
        self._patch(storage_migrate.signal, 'signal')
        self.source = self._patch(check, 'Source')
        self.source.return_value.run.return_value = [
            check.Finding('here', check.OK, 'pool', 'is there')]
        self.status = check.OK
        self.destination = self._patch(check, 'Destination')
        self.destination.side_effect = self._destination

    def _patch(self, owner, name):
        return self.useFixture(fixtures.MockPatchObject(owner, name)).mock

    def _destination(self, host, *args):
        return mock.Mock(spec=['run'], run=lambda: [check.Finding(
            host, self.status, 'pool', 'so so', 'do something')])

    def _run(self, *argv):
        """Return the exit status and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = storage_migrate.main(['check', *argv])
        return status, out.getvalue()

    def _hosts(self):
        return [call.args[0] for call in self.destination.call_args_list]

    def _file(self, text):
        directory = self.useFixture(fixtures.TempDir())
        path = directory.join('hosts')
        with open(path, 'w') as file:
            file.write(text)
        return path

    def test_line_for_each_check(self):
        status, out = self._run('dest')
        self.assertEqual(0, status)
        self.assertEqual(
            'ok    here: pool: is there\n'
            'ok    dest: pool: so so; do something\n', out)
        self.assertEqual(
            'qemu+tls://dest/system', self.destination.call_args.args[1])

    def test_exit_status(self):
        for self.status, expected in (
                (check.OK, 0), (check.WARN, 0), (check.FAIL, 1)):
            self.assertEqual(expected, self._run('dest')[0])

    def test_json(self):
        self.status = check.FAIL
        status, out = self._run('dest', '--json')
        self.assertEqual(1, status)
        self.assertEqual(
            {'host': 'dest', 'status': 'fail', 'what': 'pool',
             'finding': 'so so', 'remedy': 'do something'},
            jsonutils.loads(out)[1])

    def test_hosts_of_a_file_but_not_this_one(self):
        path = self._file('a\n\n# b\nhere\n c # d\n192.0.2.1\n')
        self._run('--all', path, 'first')
        self.assertEqual(['first', 'a', 'c'], self._hosts())

    def test_size_is_in_gib(self):
        self._run('dest', '--size', '1.5')
        self.assertEqual(
            int(1.5 * units.Gi), self.destination.call_args.args[-1])

    def test_wrong_usage(self):
        for argv in ((), ('dest', '--size', '-1'), ('dest', '--size', 'big'),
                     ('dest', '--size', 'inf'),
                     ('--all', '/not/there'), ('dest', '--unknown')):
            with contextlib.redirect_stderr(io.StringIO()):
                error = self.assertRaises(SystemExit, self._run, *argv)
            self.assertEqual(2, error.code)
        self.assertEqual([], self._hosts())


# As the command does, in a process of its own: the tests have read theirs.
CONFIGURING = """
import sys

import nova.conf
from nova.cmd import storage_migrate

CONF = nova.conf.CONF
storage_migrate._configure(
    storage_migrate._parse(['check', 'dest', *sys.argv[1:]]))
print(CONF.host, CONF.libvirt.disks_pool, sys.argv[0])
"""


class ConfigurationTestCase(test.NoDBTestCase):
    """The files that are read are those that nova-compute reads."""

    def setUp(self):
        super().setUp()
        self.home = self.useFixture(fixtures.TempDir()).path

    def _write(self, name, content):
        path = os.path.join(self.home, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(content)
        return path

    def _configure(self, *arguments):
        return subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', CONFIGURING, *arguments],
            env=os.environ | {'HOME': self.home}, check=True, text=True,
            stdout=subprocess.PIPE).stdout.split()

    def test_own_files_of_nova_compute(self):
        self._write('.nova/nova.conf', '[DEFAULT]\nhost = all\n')
        self._write('.nova/nova-compute.conf', '[DEFAULT]\nhost = compute\n')
        self._write('.nova/nova-compute.conf.d/pool.conf',
                    '[libvirt]\ndisks_pool = theirs\n')
        self.assertEqual(['compute', 'theirs', '-c'], self._configure())

    def test_file_that_is_named(self):
        path = self._write('nova.conf', '[DEFAULT]\nhost = named\n')
        self._write('.nova/nova-compute.conf', '[DEFAULT]\nhost = compute\n')
        self.assertEqual(
            'named', self._configure('--config-file', path)[0])
