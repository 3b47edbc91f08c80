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

"""Servers on a network file system that both hosts mount.

The first host exports it, and mounts it as the second one does.
"""

from nova.tests.stock import base

EXPORT = '/srv/nova'
# Both are where hosts have them by default.
DIRECTORIES = {'instances': '/var/lib/nova/instances',
               'disks': '/var/lib/libvirt/images/nova-disks'}
EXPORTS = '/etc/exports.d/nova.exports'
CHECK = ['/openstack/venvs/nova/bin/nova-storage-migrate', 'check']


class NfsTestCase(base.CountingMixin, base.StockTestCase):
    """Hosts that mount their pool and their instances directory."""

    squash = 'no_root_squash'

    def setUp(self):
        super().setUp()
        # Their pools are there from now on.
        self.here, self.there = base.get_computes()
        self.source.run_as_root('systemctl start nfs-server.service')
        self.addCleanup(self.source.run_as_root, f'rm -r {EXPORT}')
        self.addCleanup(
            self.source.run_as_root, f'rm {EXPORTS}; exportfs -r')
        self.source.run_as_root(
            'install -d -o nova -g nova ' + ' '.join(
                f'{EXPORT}/{name}' for name in DIRECTORIES))
        self.export(self.squash)
        for each in self.machines:
            self.mount(each)

    def export(self, squash):
        """Export the directories to both hosts.

        :param squash: what root is on them
        """
        self.source.write(EXPORTS, ''.join(
            f'{EXPORT}/{name} {self.lab.network}'
            f'(rw,no_subtree_check,{squash})\n' for name in DIRECTORIES))
        self.source.run_as_root('exportfs -r')

    def mount(self, of):
        """Mount the directories on a host, in the place of its own."""
        for name, path in DIRECTORIES.items():
            of.run(['mount', '-t', 'nfs', '-o', 'vers=4.2',
                    f'{self.source.address}:{EXPORT}/{name}', path])
            self.addCleanup(of.run, ['umount', path])

    def inodes(self, uuid):
        """The files of a server, which both hosts see.

        libvirt makes the log of the console anew wherever a guest starts.
        """
        found = [each.run(
            ['find', *DIRECTORIES.values(), '-path', f'*{uuid}*',
             '!', '-name', 'console.log',
             '-printf', '%i %p\n']).stdout.splitlines()
            for each in self.machines]
        self.assertEqual(*map(sorted, found))
        return set(found[0])

    def destroy_as_nova(self, uuid, on, other):
        """Delete a server on a host that another one may share disks with."""
        mark = on.call('mark', uuid=uuid)
        is_shared = other.call('sees', mark=mark)
        on.call('unmark', mark=mark)
        self.assertTrue(is_shared)
        on.call('destroy', uuid=uuid, with_disks=not is_shared)

    def domains(self, of):
        """The uuids of the domains of a host."""
        return of.run(['virsh', 'list', '--all', '--uuid']).stdout.split()


class TestLiveMigration(NfsTestCase):

    def test_abort_live_migrate_evacuate(self):
        self.let_guests_count()
        uuid = self.spawn(self.here)
        self.addCleanup(self.there.call, 'destroy', uuid=uuid)
        files = self.inodes(uuid)
        count = self.count(self.source, uuid)

        # Slow, for there is little memory that is not empty.
        self.source.run(['virsh', 'migrate-setspeed', uuid, '1'])
        self.begin(uuid)
        self.here.call('abort_live', uuid=uuid)
        self.assertEqual(['cancelled', False, False],
                         self.here.call('end_live'))
        self.assertEqual([], self.domains(self.destination))
        self.assertEqual('running', self.here.call('state', uuid=uuid))
        self.assertEqual(files, self.inodes(uuid))
        count = self.assert_goes_on(count, self.source, uuid)

        self.source.run(['virsh', 'migrate-setspeed', uuid, '1000'])
        self.begin(uuid)
        self.assertEqual(['completed', False, False],
                         self.here.call('end_live'))
        self.assertEqual('running', self.there.call(
            'finish_live', uuid=uuid, source=self.source.name))
        self.assertEqual([], self.domains(self.source))
        self.assertEqual(files, self.inodes(uuid))
        count = self.assert_goes_on(count, self.destination, uuid)

        # The host of the server is down.
        self.destination.run(['virsh', 'destroy', uuid])
        self.assertTrue(self.here.call(
            'is_on_disk', uuid=uuid, source=self.destination.name))
        self.assertEqual('running', self.here.call(
            'evacuate', uuid=uuid, source=self.destination.name))
        # The guest has read from its disk what it wrote on both hosts.
        count = self.assert_goes_on(count, self.source, uuid)

        # It is back.
        self.destroy_as_nova(uuid, self.there, self.here)
        self.assertEqual([], self.domains(self.destination))
        self.assertEqual(files, self.inodes(uuid))
        self.assert_goes_on(count, self.source, uuid)

    def begin(self, uuid):
        """Begin to live migrate a server from here to there."""
        data = self.there.call(
            'check_destination', uuid=uuid, source=self.source.name,
            resources=self.here.call('resources'))
        checked = self.here.call('check_source', uuid=uuid, data=data)
        self.there.call('end_check', data=data)
        prepared = self.there.call(
            'prepare_live', uuid=uuid, source=self.source.name, data=checked)
        self.here.call('begin_live', uuid=uuid,
                       dest=self.destination.address, data=prepared)

    def assert_goes_on(self, count, of, uuid):
        """The guest counts on from where it was."""
        now = self.count(of, uuid)
        self.assertGreater(now, count)
        return now


class ColdMigrationTestCase(NfsTestCase):

    def check_there_and_back(self):
        """A server goes to the other host and back; nothing is copied."""
        uuid = self.spawn(self.here)
        self.addCleanup(self.there.call, 'destroy', uuid=uuid)
        disk = self.disk(uuid)
        self.migrate(uuid, self.here, self.there)
        self.here.call('confirm', uuid=uuid)
        self.assertEqual([], self.domains(self.source))
        self.assertEqual(disk, self.disk(uuid))
        self.assertEqual('running', self.there.call('state', uuid=uuid))

        self.migrate(uuid, self.there, self.here)
        self.destroy_as_nova(uuid, self.here, self.there)
        self.assertEqual('running', self.there.call(
            'finish_revert', uuid=uuid))
        self.assertEqual([], self.domains(self.source))
        self.assertEqual(disk, self.disk(uuid))

    def disk(self, uuid):
        """The inode and the path of a server's disk, the only volume."""
        found, = (line for line in self.inodes(uuid)
                  if f'{DIRECTORIES["disks"]}/' in line)
        return found

    def check(self):
        """Run the check command, which finds nothing to mend."""
        said = self.source.run([*CHECK, self.destination.address],
                               user='nova', check=False)
        self.assertEqual(0, said.returncode, said.stdout + said.stderr)
        self.assertIn('pool and instance directories, nothing will be copied',
                      said.stdout)


class TestRootIsRoot(ColdMigrationTestCase):

    def test_there_and_back(self):
        self.check()
        self.check_there_and_back()


class TestRootIsNobody(ColdMigrationTestCase):
    """An NFS server does not trust root of its clients, by default."""

    squash = 'root_squash'

    def test_pool_is_made(self):
        self.source.run_as_root('virsh pool-destroy nova-disks\n'
                                'virsh pool-undefine nova-disks')
        self.start_compute(self.source)
        self.check()


class TestOnlyTheDestination(NfsTestCase):
    """A host whose own storage does not trust root."""

    squash = 'root_squash'

    def mount(self, of):
        if of is self.destination:
            super().mount(of)

    def test_refused_while_the_server_runs(self):
        uuid = self.spawn(self.here)
        before = self.source.run(['virsh', 'domid', uuid]).stdout
        error = self.assertRaises(
            AssertionError, self.migrate, uuid, self.here, self.there)
        for text in ('may not write to', 'no_root_squash'):
            self.assertIn(text, str(error))
        self.assertEqual(
            before, self.source.run(['virsh', 'domid', uuid]).stdout)
        self.assertEqual([], self.files(self.destination, uuid))

        said = self.source.run([*CHECK, self.destination.address],
                               user='nova', check=False)
        self.assertEqual(1, said.returncode, said.stdout)
        self.assertIn('probe copy: libvirt there may not write to',
                      said.stdout)
