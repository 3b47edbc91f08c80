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
import socket
from unittest import mock

import ddt
import fixtures
from oslo_utils import units

from nova import test
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage import access
from nova.virt.libvirt.storage import check
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import place
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import threads

libvirt = libvirt_storage.libvirt

INSTANCES = '/var/lib/nova/instances'


class _CheckTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.hosts = self.useFixture(libvirt_storage.LibvirtStorageFixture())
        self.source, self.dest = self.hosts['source'], self.hosts['dest']
        self.instances = self.useFixture(fixtures.TempDir()).path
        self.disks = self.useFixture(fixtures.TempDir()).path
        self.source.add_pool('nova-disks', self.disks, os.getuid(), 0, 0o755)
        self._show(self.disks)
        self.dest.add_pool('nova-disks', '/srv/disks', 64060, 64061, 0o755)
        self.dest.directories[self.instances] = (
            libvirt_storage.FakeDirectory(64060, 64061, 0o755))
        self.settings = dict(
            uri='qemu:///system', pool='nova-disks', pool_path=self.disks,
            instances_path=self.instances,
            options=('use_storage_pools', 'vol_upload_migration'),
            bandwidth=0)
        # There are no such directories.
        self.useFixture(fixtures.MockPatchObject(place, 'check_access'))

    def _show(self, directory):
        """Let the faked libvirt see files that are made in a directory."""
        self.seen = True
        make = check.tempfile.NamedTemporaryFile

        def make_seen(**kwargs):
            file = make(**kwargs)
            if self.seen and kwargs['dir'] == directory:
                self.source.add_file(file.name)
            return file

        self.useFixture(fixtures.MockPatchObject(
            check.tempfile, 'NamedTemporaryFile', make_seen))

    def _source(self):
        source = check.Source('source', check.Settings(**self.settings))
        self.addCleanup(source.close)
        return source

    def _statuses(self, findings):
        return {each.what: each.status for each in findings}

    def _only_failure(self, findings, *texts, status=check.FAIL):
        """One check has this status, and says what is wrong in one line."""
        failure, = [each for each in findings if each.status != check.OK]
        self.assertEqual(status, failure.status)
        self.assertTrue(failure.remedy)
        for text in texts:
            self.assertIn(text, str(failure))
        self.assertNotIn('\n', str(failure))
        return failure


class SourceTestCase(_CheckTestCase):

    def _run(self):
        self.checked = self._source()
        return list(self.checked.run())

    def test_good_host(self):
        findings = self._run()
        self.assertEqual(
            dict.fromkeys(['user', 'options', 'libvirt', 'pool', 'access',
                           'directory', 'policy'], check.OK),
            self._statuses(findings))
        self.assertEqual('nova-disks', self.checked.pool.name)

    def test_another_user(self):
        with mock.patch('os.geteuid', return_value=12345):
            self._only_failure(self._run(), 'uid 12345', 'sudo -u nova',
                               status=check.WARN)

    def test_no_instances_path(self):
        self.settings['instances_path'] = '/not/there'
        self._only_failure(self._run(), '/not/there: No such file',
                           '--config-file')

    def test_not_enabled(self):
        self.settings['options'] = ()
        self._only_failure(
            self._run(), 'vol_upload_migration', status=check.WARN)

    def test_libvirt_that_refuses(self):
        self.source.open_error = libvirt_storage.DEFAULT_ERROR
        self._only_failure(self._run(), 'qemu:///system', 'injected failure')

    def test_pool_that_is_not_there(self):
        self.source.pools.clear()
        self._only_failure(self._run(), 'no active storage pool nova-disks',
                           'restart nova-compute')

    def test_pool_of_another_path(self):
        self.settings['pool_path'] = '/other'
        self._only_failure(self._run(), self.disks, 'disks_pool_path')

    def test_directory_that_this_user_does_not_see(self):
        os.rmdir(self.disks)
        self.addCleanup(os.mkdir, self.disks)
        self._only_failure(
            self._run(), f'directory: this user cannot make a file in '
            f'{self.disks}', 'mount the directory in both')

    def test_directory_that_is_another_one_for_libvirt(self):
        self.seen = False
        self._only_failure(
            self._run(), f'directory: libvirt does not see what this user '
            f'writes to {self.disks}', 'mount the directory in both')
        self.assertEqual([], os.listdir(self.disks))

    def test_pool_of_which_nova_conf_says_nothing(self):
        self.settings['pool_path'] = None
        self.assertEqual({check.OK}, {each.status for each in self._run()})
        self.assertEqual(self.disks, self.checked.pool_path)

    def test_host_without_a_pool(self):
        self.settings.update(pool=None, options=('vol_upload_migration',))
        self.source.pools.clear()
        self._show(self.instances)
        findings = self._run()
        self.assertEqual(
            dict.fromkeys(['user', 'options', 'libvirt', 'directory'],
                          check.OK), self._statuses(findings))
        self.assertIn('vol_upload_migration is set', str(findings[1]))
        self.assertEqual({}, self.source.pools)

    def test_pool_that_this_user_cannot_enter(self):
        place.check_access.side_effect = errors.Refused(
            'user 1 cannot enter /', 'Allow it.')
        self._only_failure(self._run(), 'access: user 1 cannot enter /')

    def test_policy_that_denies_guests_the_pool(self):
        refusal = errors.Refused('AppArmor denies it', 'Add a rule')
        with mock.patch.object(place, 'check_policy', side_effect=refusal):
            self._only_failure(self._run(), 'policy: AppArmor denies it',
                               status=check.WARN)


@ddt.ddt
class DestinationTestCase(_CheckTestCase):
    """What is asked of libvirt; the network comes before."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MockPatchObject(
            check.Destination, '_network_steps', return_value=[]))
        self.checked_source = self._source()
        list(self.checked_source.run())
        self.volumes = self.dest.volume_names('nova-disks')

    def _destination(self, uri='qemu+tls://dest/system', size=0):
        return check.Destination('dest', uri, self.checked_source,
                                 check.Settings(**self.settings), size)

    def _run(self, *args, **kwargs):
        findings = list(self._destination(*args, **kwargs).run())
        self.assertEqual(
            self.volumes, self.dest.volume_names('nova-disks'))
        self.assertTrue(all(connection.closed
                            for connection in self.dest.connections))
        self.assertEqual([], self.dest.open_streams)
        self.assertLessEqual(set(self.dest.pools), {'nova-disks'})
        return findings

    def test_good_host(self):
        findings = self._run(size=units.Gi)
        self.assertEqual(
            dict.fromkeys(['uri', 'libvirt', 'encryption', 'pool',
                           'preflight', 'shared storage', 'probe copy'],
                          check.OK),
            self._statuses(findings))
        self.assertRegex(
            findings[-1].finding, r'^16 MiB written at \d+ MiB/s, read back, '
            r'deleted; 1\.0 GiB take about 0 h \d+ min \d+ s$')

    def test_host_with_a_volume_group(self):
        mark = f'{self.instances}/{layout.GROUP_MARK}vg'
        self.dest.add_file(mark)
        self.dest.add_group('vg')
        self.settings |= dict(pool=None, pool_path=None, group_path='/dev/vg')
        self.checked_source.pool = None
        findings = list(self._destination(size=40 * units.Mi).run())
        self.assertEqual({check.OK}, set(self._statuses(findings).values()))
        self.assertIn('256 MiB free', str(findings[-3]))
        self.assertIn('read back, deleted', str(findings[-1]))
        self.assertEqual({}, self.dest.logical_volumes('vg'))
        self.assertEqual(['nova-disks', 'nova-group-vg'],
                         sorted(self.dest.pools))
        self._only_failure(
            list(self._destination(size=units.Gi).run()),
            'preflight: 268435456 bytes available in volume group vg')
        self.dest.remove_file(mark)
        self._only_failure(list(self._destination().run()), 'does not take')

    def test_estimate_keeps_to_the_bandwidth(self):
        self.settings['bandwidth'] = 2 * units.Mi
        self.assertIn('0 h 8 min 32 s', self._run(size=units.Gi)[-1].finding)

    def test_host_that_is_not_there(self):
        findings = list(check.Destination(
            'gone', 'qemu+tls://gone/system', self.checked_source,
            check.Settings(**self.settings), 0).run())
        self._only_failure(findings, 'gone: libvirt', 'No route to host')

    def test_connection_that_is_not_encrypted(self):
        findings = self._run('qemu+tcp://dest/system')
        self._only_failure(
            findings, f'encryption: tcp {access.WEAKNESSES["tcp"]}',
            'to qemu+tls://%s/system', status=check.WARN)
        self.assertIn('probe copy', self._statuses(findings))

    def test_connection_that_sasl_encrypts(self):
        with mock.patch.object(libvirt_storage.FakeConnection, 'isEncrypted',
                               return_value=1):
            findings = self._run('qemu+tcp://dest/system')
        self.assertEqual({check.OK}, {each.status for each in findings})

    def test_connection_by_ssh(self):
        self._only_failure(
            self._run('qemu+ssh://dest/system'), access.SSH_WEAKNESS,
            'to qemu+tls://%s/system', status=check.WARN)

    def test_uri_that_does_not_verify(self):
        findings = self._run('qemu+tls://dest/system?no_verify=1')
        failure = self._only_failure(
            findings, 'dest: uri: qemu+tls://dest/system?no_verify=1: '
            'no_verify lets any host pass', 'a certificate')
        self.assertEqual([failure], findings)
        self.assertEqual([], self.dest.connections)

    def test_old_libvirt(self):
        self.dest.version = 7_000_000
        self._only_failure(self._run(), '7.0.0', '8.0.0')

    def test_pool_that_is_not_there(self):
        del self.dest.pools['nova-disks']
        findings = list(self._destination().run())
        self._only_failure(findings, 'there is no storage pool nova-disks',
                           'use_storage_pools')

    def test_pool_that_is_not_active(self):
        self.dest.pools['nova-disks'].active = False
        findings = list(self._destination().run())
        self._only_failure(findings, 'not active',
                           'virsh pool-start nova-disks')

    def test_pool_of_another_owner(self):
        self.dest.directories['/srv/disks'].owner = 0
        self._only_failure(
            self._run(), '/srv/disks there belongs to uid 0', 'uid 64060',
            'Run there: chown 64060:64061 /srv/disks')

    def test_pool_that_its_owner_cannot_use(self):
        self.dest.directories['/srv/disks'].mode = 0o500
        self._only_failure(self._run(), 'mode 0500', 'chmod 0755 /srv/disks')

    def test_instances_in_another_directory(self):
        del self.dest.directories[self.instances]
        self._only_failure(self._run(), self.instances, 'instances_path')

    def test_pool_that_somebody_has_of_the_instances_is_used(self):
        self.dest.add_pool('theirs', self.instances, 64060, 64061, 0o755)
        findings = list(self._destination().run())
        self.assertEqual({check.OK}, {each.status for each in findings})
        self.assertEqual({'nova-disks', 'theirs'}, set(self.dest.pools))

    @ddt.data(0, units.Ti)
    def test_no_room(self, size):
        available = 0 if not size else units.Gi
        with mock.patch.object(type(self.dest), 'available', available):
            self._only_failure(self._run(size=size), 'bytes available',
                               'Free some space')

    def _share_pool(self):
        self._share(self.disks, '/srv/disks')

    def _share_directory(self):
        self._share(self.instances, self.instances)
        mkdir = os.mkdir

        def shared(path, *args):
            mkdir(path, *args)
            self.dest.add_directory(path)

        self.useFixture(fixtures.MonkeyPatch('os.mkdir', shared))

    def _share(self, here, there):
        """Let the destination see the files that are made in a directory."""
        make = check.tempfile.NamedTemporaryFile

        def shared(**kwargs):
            file = make(**kwargs)
            if kwargs['dir'] == here:
                path = os.path.join(there, os.path.basename(file.name))
                self.dest.add_file(path)
                self.addCleanup(self.dest.files.pop, path, None)
            return file

        self.useFixture(fixtures.MockPatchObject(
            check.tempfile, 'NamedTemporaryFile', shared))

    def test_shared_storage(self):
        self._share_pool()
        self._share_directory()
        findings = list(self._destination().run())
        self.assertEqual({check.OK}, {each.status for each in findings})
        self.assertIn('nothing will be copied', str(findings[-1]))
        self.assertEqual([], os.listdir(self.instances))
        self.assertEqual([], os.listdir(self.disks))

    def _do_without_pools(self):
        self.settings.update(pool=None, options=('vol_upload_migration',))
        self.source.pools.clear()
        self.dest.pools.clear()
        self.checked_source = self._source()

    def test_hosts_without_pools(self):
        self._do_without_pools()
        findings = list(self._destination(size=units.Gi).run())
        self.assertEqual(
            dict.fromkeys(['uri', 'libvirt', 'encryption', 'preflight',
                           'shared storage', 'probe copy'], check.OK),
            self._statuses(findings))
        self.assertIn('16 MiB written', findings[-1].finding)
        self.assertEqual({}, self.dest.pools)
        self.assertEqual([], [path for path in self.dest.files
                              if path.startswith(self.instances)])
        self.assertEqual([], os.listdir(self.instances))

    def test_hosts_without_pools_that_share_the_directory(self):
        self._do_without_pools()
        self._share_directory()
        findings = list(self._destination().run())
        self.assertEqual({check.OK}, {each.status for each in findings})
        self.assertIn('storage: instance directories, nothing will be copied',
                      str(findings[-1]))

    def test_only_the_pool_is_shared(self):
        self._share_pool()
        self._only_failure(
            list(self._destination().run()),
            'both hosts share storage pool nova-disks and not instance '
            f'directory {self.instances}', 'Share both')

    def test_only_the_instance_directories_are_shared(self):
        self._share_directory()
        self._only_failure(
            list(self._destination().run()),
            f'both hosts share instance directory {self.instances}/',
            'Share both')

    def test_probe_that_fails_is_deleted(self):
        self.dest.fail('stream.send', after=units.Mi)
        self._only_failure(self._run(), 'probe copy', 'injected failure')

    def test_probe_that_comes_back_wrong(self):
        def corrupt():
            name, = [name for name in self.dest.volume_names('nova-disks')
                     if name.endswith('_disk')]
            self.dest.volume('nova-disks', name).content.write(
                units.Mi, bytes(units.Ki))

        self.dest.call('vol.download', corrupt)
        self._only_failure(self._run(), 'probe copy',
                           'it differs from the source')

    def test_probe_that_cannot_be_deleted(self):
        self.dest.fail('vol.delete')
        destination = self._destination()
        findings = list(destination.run())
        self.assertEqual(2, len(self.dest.volume_names('nova-disks')))
        uuid = destination._places.uuid
        self._only_failure(
            findings, f'files of {uuid} are left there',
            f'On dest, delete the directory {self.instances}/{uuid}, and what '
            'begins with this UUID in the same directory and in pool '
            'nova-disks')

    def test_user_who_cannot_write_to_the_instances(self):
        os.rmdir(self.instances)
        self.addCleanup(os.mkdir, self.instances)
        self._only_failure(self._run(), f'{self.instances}/', 'as the user of '
                           'nova-compute')

    def test_step_that_hangs(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.check.STEP_SECONDS', 0.2))
        fault = self.dest.block('conn.getLibVersion')
        self.addCleanup(fault.release)
        findings = list(self._destination().run())
        self._only_failure(findings, 'no answer within 0.2 seconds')

    def test_end_that_hangs(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.check.STEP_SECONDS', 2))
        done = libvirt_storage.native_threading().Event()
        self.addCleanup(done.set)
        with mock.patch.object(site.Site, 'close',
                               lambda self: done.wait(10)):
            self._only_failure(list(self._destination().run()),
                'no answer within 2 seconds')

    def test_error_of_several_lines(self):
        self.dest.fail('vol.upload', error=(
            libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_STORAGE,
            'first line\nsecond line'))
        self._only_failure(self._run(), 'first line second line')

    def test_interruption_deletes_the_probe(self):
        with mock.patch.object(
                check.Destination, '_probe', side_effect=KeyboardInterrupt):
            with mock.patch.object(
                    threads, 'within', lambda seconds, step: step()):
                self.assertRaises(KeyboardInterrupt, self._run)
        self.assertEqual(
            self.volumes, self.dest.volume_names('nova-disks'))


class NetworkTestCase(_CheckTestCase):

    def _findings(self, uri):
        destination = check.Destination(
            'it', uri, self._source(), check.Settings(**self.settings), 0)
        return list(destination.run())

    def _listen(self):
        # Of eventlet's nothing but itself keeps it open.
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(self.listener.close)
        return self.listener.getsockname()[1]

    def test_name_that_is_not_known(self):
        with mock.patch('socket.getaddrinfo',
                        side_effect=socket.gaierror(-2, 'not known')):
            self._only_failure(self._findings('qemu+tls://nowhere/system'),
                               'nowhere has no address: not known', 'DNS')

    def test_nothing_listens(self):
        with mock.patch.dict(check.PORTS, tcp=1):
            self._only_failure(
                self._findings('qemu+tls://127.0.0.1:2/system'),
                'nothing listens on port 2', 'virtproxyd-tls.socket')

    def test_only_the_port_without_encryption_is_open(self):
        with mock.patch.dict(check.PORTS, tcp=self._listen()):
            self._only_failure(
                self._findings('qemu+tls://127.0.0.1:2/system'),
                'which is not encrypted', 'listen_tls = 1')

    def test_host_that_does_not_answer(self):
        with mock.patch('socket.create_connection',
                        side_effect=TimeoutError('timed out')):
            self._only_failure(
                self._findings('qemu+tls://127.0.0.1/system'),
                'does not answer on port 16514: timed out', 'firewall')

    def test_our_certificate_is_not_there(self):
        port = self._listen()
        self._only_failure(
            self._findings(
                f'qemu+tls://127.0.0.1:{port}/system?pkipath=/not/there'),
            '/not/there/clientcert.pem cannot be read')
