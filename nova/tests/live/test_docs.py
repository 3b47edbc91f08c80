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
"""Pages of the documentation, followed word by word."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

from docutils import core
from docutils import nodes
import fixtures
from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils
import testtools

import nova
from nova.tests.live import base
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import pool

from tools.lab import auth as lab_auth

lab = base.nova_lab

PAGE = base.ROOT / 'doc/source/admin/remote-libvirt.rst'
INSTALL_PAGE = base.ROOT / 'doc/source/install/index.rst'
SECURITY_PAGE = base.ROOT / 'doc/source/admin/security.rst'
SWITCH_PAGE = base.ROOT / 'doc/source/admin/switch-on.rst'

# What the page says of systemd, and what Debian 12 has of it.
UNITS = pathlib.Path('/lib/systemd/system')

# What the page calls the hosts and their addresses.
EXAMPLES = (('compute1', '192.0.2.11'), ('compute2', '192.0.2.12'))


def read_blocks(page, language='shell'):
    """The code blocks of a page: (classes, commands) of each, in order."""
    # docutils does not know the roles of Sphinx, and need not.
    tree = core.publish_doctree(
        page.read_text(), source_path=str(page),
        settings_overrides={'report_level': 5})
    return [(set(block['classes']) - {'code', language}, block.astext())
            for block in tree.findall(nodes.literal_block)
            if language in block['classes']]


class TestRemoteLibvirtPage(base.LiveTestCase):
    """On two hosts of their own, which have no certificates."""

    def setUp(self):
        super().setUp()
        self.fresh = lab.Lab(base.DIRECTORY + '-docs',
                             subnet=(base.SUBNET + 2) % 256)
        self.addCleanup(self.fresh.down)
        self.fresh.up()
        self.source, self.destination = self.hosts = self.fresh.hosts
        for host in self.hosts:
            self.make_fresh(host)
        self.home = self.fresh.directory / 'home'
        self.home.mkdir()

    def make_fresh(self, host):
        """Take away what the lab does of what the page does."""
        host.stop_libvirtd()
        shutil.rmtree(host.path('/etc/pki'))
        conf = host.path('/etc/libvirt/libvirtd.conf')
        lines = [line for line in conf.read_text().splitlines(True)
                 if not line.startswith('tls_')]
        conf.write_text(''.join(lines))

    def test_page_connects_hosts(self):
        done = {'on-ca': self.on_ca, 'on-each-host': self.on_each_host,
                'on-first-host': self.on_first_host}
        revokes = []
        for classes, commands in read_blocks(PAGE):
            if 'revokes' in classes:
                revokes.append(commands)
            elif classes == {'with-systemd'}:
                self.check_units(commands)
            elif classes == {'untested'}:
                # Debian 12 has no such units; the page says so.
                self.assertIn('virtproxyd', commands)
            elif classes == {'on-ca', 'fails'}:
                error = self.assertRaises(
                    lab.LabError, self.on_ca, commands)
                self.assertIn('Unable to read TLS confirmation', str(error))
            else:
                place, = classes
                done[place](commands)
        self.assert_stranger_is_refused()
        self.assert_disk_goes_over()
        self.assert_host_is_excluded(*revokes)

    def check_units(self, commands):
        """The hosts have no systemd: look whether it would know the units."""
        units = re.findall(r'[\w-]+\.(?:socket|service)', commands)
        self.assertNotEqual([], units)
        lab.execute('systemd-analyze', 'verify', '--man=no',
                    *(UNITS / unit for unit in units))
        for line in commands.splitlines():
            if ' enable ' in line:
                self.enable_unit(line.split()[-1])

    def enable_unit(self, unit):
        """Enable a unit in another root than the machine's."""
        root = self.fresh.directory / 'systemd'
        shutil.copytree(UNITS, root / UNITS.relative_to('/'), symlinks=True)
        lab.execute('systemctl', f'--root={root}', 'enable', unit)
        self.assertTrue(
            (root / 'etc/systemd/system/sockets.target.wants' / unit
             ).is_symlink())

    def on_ca(self, commands):
        home = self.home / 'ca'
        home.mkdir(exist_ok=True)
        return self.execute([], commands, home)

    def on_each_host(self, commands):
        for host in self.hosts:
            self.bring_certificates(host)
            self.execute(host.enter, commands, self.home / host.name)

    def on_first_host(self, commands):
        done = self.execute(
            self.source.enter, commands, self.home / self.source.name)
        self.assertEqual(self.destination.name, done.stdout.strip())

    def bring_certificates(self, host):
        """The step that the page leaves to the operator."""
        home = self.home / host.name
        if not home.exists():
            home.mkdir()
            shutil.copy(
                self.home / f'ca/libvirt-ca/{host.name}.tar', home)

    def execute(self, enter, commands, home):
        for host, (name, address) in zip(self.hosts, EXAMPLES, strict=True):
            commands = commands.replace(address, host.address)
            commands = commands.replace(name, host.name)
        return lab.execute(
            *enter, 'sh', '-eu', '-c', commands, stdin=subprocess.DEVNULL,
            env={'HOME': str(home), 'PATH': lab.PATH}, cwd='/')

    def assert_stranger_is_refused(self):
        """A certificate of the same CA lets in if its name is in the list."""
        ca = self.home / 'ca/libvirt-ca'
        files = ('cacert.pem', 'clientcert.pem', 'clientkey.pem')
        pki = self.home / 'pki'
        pki.mkdir()
        for file in files:
            shutil.copy(ca / self.source.name / file, pki)
        uri = f'{self.destination.uri}?pkipath={pki}'
        self._open(uri).close()

        template = ca / self.source.name / 'client.info'
        text = template.read_text()
        template.write_text(text.replace('Compute hosts', 'Somebody else'))
        lab.execute(
            'certtool', '--generate-certificate', '--template', template,
            '--load-privkey', pki / 'clientkey.pem',
            '--load-ca-certificate', ca / 'cacert.pem',
            '--load-ca-privkey', ca / 'cakey.pem',
            '--outfile', pki / 'clientcert.pem')
        self.assertNotEqual(text, template.read_text())
        self.assertRaises(base.libvirt.libvirtError, self._open, uri)

    def assert_host_is_excluded(self, on_ca, on_other_hosts):
        """The destination host, after the commands of the page."""
        connect = ['virsh', '-c']
        for host, other in self.hosts, self.hosts[::-1]:
            host.run([*connect, other.uri, 'hostname'], user='nova')

        self.on_ca(on_ca)
        home = self.home / self.source.name
        shutil.copy(self.home / 'ca/libvirt-ca/cacrl.pem', home)
        self.execute(self.source.enter, on_other_hosts, home)
        for host, other in self.hosts, self.hosts[::-1]:
            error = self.assertRaises(
                lab.LabError, host.run, [*connect, other.uri, 'hostname'],
                user='nova')
            self.assertIn('revoked' if host is self.source else
                          'Unable to read TLS confirmation', str(error))
        self.source.run([*connect, self.source.uri, 'hostname'], user='nova')

    def assert_disk_goes_over(self):
        uuid = uuidutils.generate_uuid()
        name = 'docs'
        for host in self.hosts:
            self.make_pool(host, name)
        path = f'/var/lib/nova/{name}/{uuid}_disk'
        disk = self.make_disk(
            self.source, path, 64 * units.Mi, [(0, 8 * units.Mi)])
        arguments = jsonutils.dumps({
            'source_uri': 'qemu:///system',
            'destination_uri': self.destination.uri, 'pool': name,
            'uuid': uuid, 'directory': f'/var/lib/nova/instances/{uuid}'})
        done = lab.execute(
            *self.source.enter, sys.executable, '-W', 'ignore', '-m',
            'nova.tests.live.copier', input=arguments + '\n', env=os.environ)
        result = jsonutils.loads(done.stdout.splitlines()[-1])['result']
        self.assertEqual(64 * units.Mi, result['length'])
        self.assertEqual(
            self.sha256(disk), self.sha256(self.destination.path(path)))


class TestSecurityPage(testtools.TestCase):

    def test_files_are_those_of_the_tests(self):
        """ScramTestCase lets a host in with these, and none without."""
        self.assertEqual(
            [lab_auth.AUTH.format(password='secret'), lab_auth.SCRAM],
            [f'{text}\n' for _classes, text in read_blocks(
                SECURITY_PAGE, 'ini')[-2:]])


class TestSwitchOnPage(base.LiveTestCase):
    """The pool goes before the driver does, and not with a disk in it."""

    PATH = '/var/lib/libvirt/images/nova-disks'

    def setUp(self):
        super().setUp()
        connection = self.connect_local(self.destination)
        nova = pool.Permissions(
            self.destination.nova_uid, self.destination.nova_gid, 0o755)
        self.addCleanup(shutil.rmtree, self.destination.path(self.PATH),
                        ignore_errors=True)
        self.addCleanup(self.remove_pool, 'nova-disks')
        pool.Pool.ensure(connection, name='nova-disks', path=self.PATH,
                         permissions=nova, autostart=False)

    def find_pool(self):
        """Look for the pool as a migration to there does."""
        connection = daemon.open_connection(self.lab.uri(self.destination))
        try:
            pool.Pool.lookup(connection, 'nova-disks')
        finally:
            connection.close()

    def test_off(self):
        remove_disks, = (
            commands for classes, commands in read_blocks(SWITCH_PAGE)
            if classes == {'off'})
        disk = self.make_disk(
            self.destination, f'{self.PATH}/disk', units.Mi, [])
        self.make_disk(self.destination, f'{self.PATH}/nova-reserved', 5, [])
        error = self.assertRaises(lab.LabError, self.run_block, remove_disks)
        self.assertIn(f"failed to remove '{self.PATH}'", str(error))
        self.run_block('virsh pool-start nova-disks')
        self.find_pool()
        disk.unlink()
        self.run_block(remove_disks)
        error = self.assertRaises(errors.PoolNotFound, self.find_pool)
        self.assertIn('there is no storage pool nova-disks', str(error))
        left = self.run_block('virsh pool-list --all --name').split()
        self.assertNotIn('nova-disks', left)

    def remove_pool(self, name):
        """Remove what a test that failed has left."""
        for action in 'destroy', 'undefine':
            self.destination.run(['virsh', f'pool-{action}', name],
                                 check=False)

    def run_block(self, commands):
        return self.destination.run(['sh', '-eu', '-c', commands]).stdout


class TestInstallPage(testtools.TestCase):
    """In an environment that has Nova, and in it nothing of ours."""

    # The first thing that nova-compute does with the driver.
    CHECK_HOOKS = """
from nova import exception
from nova.virt.libvirt import driver
from nova.virt.libvirt import storage_migrate
try:
    storage_migrate.check_hooks(driver.LibvirtDriver)
except exception.InternalError as error:
    print(error)
"""

    def setUp(self):
        super().setUp()
        self.work = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.source = self.work / 'source'
        self.venv = self.work / 'venv'
        lab.execute(sys.executable, '-m', 'venv', self.venv)
        self.site, = self.venv.glob('lib/python3*/site-packages')
        self.give_nova(pathlib.Path(nova.__path__[0]).parent)
        blocks = read_blocks(INSTALL_PAGE)
        self.blocks = {frozenset(classes): commands
                       for classes, commands in blocks}
        self.assertEqual(len(blocks), len(self.blocks))

    def give_nova(self, site):
        """Copy an installed Nova without our links; share what it needs."""
        shutil.copytree(site / 'nova', self.site / 'nova', ignore=(
            lambda directory, names: [
                name for name in names if name == '__pycache__' or
                os.path.islink(os.path.join(directory, name))]))
        (self.site / 'shared.pth').write_text(f'{site}\n')

    def test_package_comes_and_goes_on_each_way(self):
        before = self.nova_files()
        ways = ((self.block('venv'), self.block('venv', 'remove')),
                (self.container_command(), self.block('venv', 'remove')),
                (self.block('distribution'),
                 self.block('distribution', 'remove')))
        for number, (install, remove) in enumerate(ways):
            self.run_block(install)
            self.assert_nova_is_whole(before)
            self.assert_installed(has_script=number < 2)
            self.run_block(remove)
            self.assertEqual(before, self.nova_files())
            self.assertEqual(
                [], list(self.site.glob('nova_storage_migrate*')))
        self.assertEqual(5, len(self.blocks))

    def test_packages_are_sound_and_complete(self):
        said = self.run_block('''
            python3 -m pip --quiet wheel --no-deps --wheel-dir tree .
            python3 -m venv checker
            checker/bin/pip --quiet install build twine
            checker/bin/python -m build --outdir dist . > log
            checker/bin/twine --no-color check --strict dist/*
            ''')
        self.assertEqual(2, said.count('PASSED'), said)
        sdist, = (self.source / 'dist').glob('*.tar.gz')
        # This wheel was built from the sdist, the other one from the tree.
        wheel, = (self.source / 'dist').glob('*.whl')
        other, = (self.source / 'tree').glob('*.whl')
        self.assertEqual(self.members(other), self.members(wheel))
        self.assertEqual(
            {str(path.relative_to(base.ROOT))
             for top in ('storage_migrate.py', 'cmd', 'conf', 'privsep',
                         'virt')
             for path in [base.ROOT / 'nova' / top,
                          *(base.ROOT / 'nova' / top).rglob('*.py')]
             if path.is_file()},
            {name for name in self.members(wheel)
             if '.dist-info/' not in name})
        with tarfile.open(sdist) as files:
            self.assertEqual([], [name for name in files.getnames()
                                  if '/nova/tests/' in name])

    @staticmethod
    def members(wheel):
        """The names of the files in a wheel."""
        with zipfile.ZipFile(wheel) as files:
            return set(files.namelist())

    def test_nova_of_each_older_release_has_all_hooks(self):
        said = self.run_block(f"""
            python3 -m pip --quiet wheel --no-deps --wheel-dir . .
            for release in 33 32 31; do
                python3 -m pip --quiet download --no-deps nova==$release.*
                for wheel in nova-$release.*.whl nova_storage_migrate-*; do
                    python3 -m zipfile -e $wheel $release
                done
                PYTHONPATH=$PWD/$release python3 -P -c '{self.CHECK_HOOKS}'
            done
            """)
        self.assertEqual('', said)

    def block(self, *classes):
        return self.blocks[frozenset(classes)]

    def container_command(self):
        """What the image of a container is made with."""
        (_classes, recipe), = read_blocks(INSTALL_PAGE, 'dockerfile')
        command, = re.findall(
            r'^RUN (.*)$', recipe.replace('\\\n', ''), re.MULTILINE)
        return command

    def run_block(self, commands):
        """Run commands in a fresh copy of our source."""
        shutil.rmtree(self.source, ignore_errors=True)
        shutil.copytree(base.ROOT, self.source, ignore=shutil.ignore_patterns(
            '.*', 'build', '*.egg-info', '__pycache__'))
        for place in '/openstack/venvs/nova', '/var/lib/kolla/venv':
            commands = commands.replace(place, str(self.venv))
        commands = commands.replace(
            '/tmp/nova-storage-migrate', str(self.source))
        env = dict(os.environ, PATH=f'{self.venv}/bin:{lab.PATH}',
                   PYTHONDONTWRITEBYTECODE='1')
        env.pop('PYTHONPATH', None)
        return lab.execute(
            'sh', '-eu', '-c', commands, stdin=subprocess.DEVNULL, env=env,
            cwd=self.source).stdout

    def nova_files(self):
        """The files of Nova, and what tells that one was replaced."""
        return {path: (path.stat().st_mtime_ns, path.stat().st_size)
                for path in (self.site / 'nova').rglob('*')
                if path.is_file()}

    def assert_nova_is_whole(self, before):
        now = self.nova_files()
        self.assertEqual(before, {path: now[path] for path in before})
        self.assertGreater(len(now), len(before))

    def assert_installed(self, has_script):
        said = self.run_block(self.block('check')).splitlines()
        self.assertEqual(str(self.site / 'nova'), said[0])
        self.assertEqual(
            f'{said[0]}/virt/libvirt/storage_migrate.py', said[1])
        self.assertIn('usage: nova-storage-migrate check', said[2])
        self.assertIn('use_storage_pools', self.run_block(
            'cd /; python3 -m oslo_config.generator '
            '--namespace nova.storage_migrate'))
        commands = [self.block('check').splitlines()[-1]]
        if has_script:
            commands.append('nova-storage-migrate check --help')
        for command in commands:
            self.assertIn('usage: nova-storage-migrate check',
                          self.run_block(command))
            # No library warns of anything.
            self.assertEqual('', self.run_block(f'{command} 2>&1 >/dev/null'))
