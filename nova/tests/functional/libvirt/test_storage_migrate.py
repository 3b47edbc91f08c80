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

"""From Nova's API to our driver and back, on faked libvirt daemons."""

import functools
import os
import pathlib
import threading
from unittest import mock

import ddt
import fixtures
from lxml import etree
from oslo_concurrency import processutils
from oslo_serialization import jsonutils
from oslo_utils import fileutils
from oslo_utils import units
import tenacity

from nova.compute import instance_actions
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.policies import base as base_policies
from nova.policies import servers as servers_policies
from nova import test
from nova.tests.fixtures import libvirt
from nova.tests.fixtures import libvirt_storage
from nova.tests.functional.libvirt import base
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt import storage_migrate
from nova.virt.libvirt import utils as libvirt_utils

POOL = 'nova-disks'

# The calls of Nova's to a driver for which it matters which host it is on.
CALLS = ('spawn', 'destroy', 'cleanup', 'get_host_ip_addr', 'snapshot',
         'reboot',
         'migrate_disk_and_power_off', 'finish_migration',
         'confirm_migration', 'finish_revert_migration',
         'check_instance_shared_storage_local',
         'check_instance_shared_storage_remote',
         'check_instance_shared_storage_cleanup', 'delete_instance_files',
         'get_available_resource', 'check_can_live_migrate_destination',
         'check_can_live_migrate_source',
         'cleanup_live_migration_destination_check', 'get_instance_disk_info',
         'pre_live_migration', '_live_migration_operation',
         'post_live_migration_at_destination',
         'rollback_live_migration_at_destination')


class DirectoryHost(libvirt_storage.FakeHost):
    """A host whose files and directories are real ones.

    :param seen: the path that leads to its file system while its driver runs
    :param root: where that is
    """

    def __init__(self, name, meter, seen: str, root: pathlib.Path):
        super().__init__(name, meter)
        self._seen = seen
        self._root = root
        self.files = Entries(self._write, self._unlink)
        self.directories = Entries(self._mkdir, self._rmdir)

    def real(self, path: str) -> pathlib.Path:
        """Where what the host has at a path is."""
        return self._root / os.path.relpath(path, self._seen)

    def refresh(self, pool):
        directory = self.real(pool.path)
        if directory.is_file():
            self._read(pool.path, directory)
        if directory.is_dir():
            self.directories.setdefault(
                pool.path, libvirt_storage.FakeDirectory())
            here = {os.path.join(pool.path, file.name): file
                    for file in directory.iterdir() if file.is_file()}
            for path in list(self.files):
                if os.path.dirname(path) == pool.path and path not in here:
                    super(Entries, self.files).__delitem__(path)
            for path, file in here.items():
                self._read(path, file)
            self._find_directories(pool.path, directory)
        super().refresh(pool)

    def _find_directories(self, path, directory):
        here = {os.path.join(path, each.name)
                for each in directory.iterdir() if each.is_dir()}
        for each in list(self.directories):
            if os.path.dirname(each) == path and each not in here:
                super(Entries, self.directories).__delitem__(each)
        for each in here:
            self.directories.setdefault(each, libvirt_storage.FakeDirectory())

    def closed_upload(self, pool):
        for path, file in self.files.items():
            if os.path.dirname(path) == pool.path:
                self._write(path, file)
        super().closed_upload(pool)

    def _read(self, path, file):
        content = libvirt_storage.Content.of(file.read_bytes())
        if path in self.files:
            self.files[path].content = content
        else:
            self.files[path] = libvirt_storage.FakeFile(content)

    def _write(self, path, file):
        self.real(path).write_bytes(file.content.read(0, file.content.size))

    def _unlink(self, path):
        self.real(path).unlink()

    def _mkdir(self, path, directory):
        self.real(path).mkdir(parents=True, exist_ok=True)

    def _rmdir(self, path):
        self.real(path).rmdir()


class Entries(dict):
    """Says what is added and what is removed."""

    def __init__(self, added, removed):
        super().__init__()
        self._added = added
        self._removed = removed

    def __setitem__(self, path, entry):
        self._added(path, entry)
        super().__setitem__(path, entry)

    def __delitem__(self, path):
        self._removed(path)
        super().__delitem__(path)

    def setdefault(self, path, entry):
        if path not in self:
            self[path] = entry
        return self[path]


# Makes a helper of Nova's try six times before it fails: each time it asks ten
# times, half a second apart, which is too short on a busy machine.
patiently = tenacity.retry(
    retry=tenacity.retry_if_exception_type(AssertionError),
    stop=tenacity.stop_after_attempt(6), reraise=True)


class StorageMigrateTestCase(base.ServersTestBase):
    """Compute hosts each with a file system and a libvirt daemon of its own.

    Their drivers are in one process, with one configuration. While one of
    them is called, it is that of its host.
    """

    ADMIN_API = True
    microversion = 'latest'
    CAST_AS_CALL = False
    computes_to_start = ('source', 'dest')
    # name and group of an option -> its value, by host
    differing: dict = {}
    # The cells that hosts are in, if not in the first one.
    cells: dict = {}

    def setUp(self):
        of_nova = [(owner, name, getattr(owner, name)) for owner, name in (
            (imagebackend.Backend, 'backend'),
            (driver.LibvirtDriver, '_create_image'))]
        super().setUp()
        # What Nova's tests replace of it, our driver needs.
        for owner, name, attribute in of_nova:
            self.useFixture(fixtures.MockPatchObject(owner, name, attribute))
        self.useFixture(fixtures.MockPatchObject(
            storage_migrate.LibvirtDriver, '_create_image', create_disk))
        # Nova waits for ten seconds, which is too short on a busy machine.
        self.notifier.wait_for_versioned_notifications = functools.partial(
            self.notifier.wait_for_versioned_notifications, timeout=60)
        # A mock already.
        libvirt_utils.get_fs_info.return_value = {
            'total': 128 * units.Gi, 'used': 0, 'free': 128 * units.Gi}
        self.root = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        # The file systems of the hosts are larger than that of this machine.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.local.tell_reserved',
            lambda directory: None))
        self.seen = seen = str(self.root / 'current')
        self.flags(
            compute_driver='libvirt.storage_migrate.LibvirtDriver',
            instances_path=f'{seen}/instances', use_cow_images=False)
        self.flags(
            use_storage_pools=True, vol_upload_migration=True,
            disks_pool_path=f'{seen}/disks', group='libvirt')
        self.hosts = self.useFixture(libvirt_storage.LibvirtStorageFixture(
            'source', ['dest']))
        self.drivers_lock = threading.RLock()
        for name in self.hosts.names:
            self.hosts.hosts[name] = DirectoryHost(
                name, self.hosts.meter, seen, self.root / name)
            self._make_root(name)
        self.source, self.dest = self.hosts['source'], self.hosts['dest']
        for name in self.computes_to_start:
            self._start(name)
        self.flavors = {size: self._create_flavor(
            name=f'flavor-{size}', disk=size, ephemeral=0) for size in (1, 2)}

    def _make_root(self, name):
        (self.root / name / 'instances').mkdir(parents=True)

    def _start(self, name):
        self._be(name)
        self.start_compute(name, cell_name=self.cells.get(name))
        there = self.computes[name].driver
        for method in CALLS:
            setattr(there, method, self._on_host(
                name, getattr(there, method)))

    def _on_host(self, name, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            with self.drivers_lock:
                self._be(name)
                return method(*args, **kwargs)
        return call

    def _be(self, name):
        current = self.root / 'current'
        current.unlink(missing_ok=True)
        current.symlink_to(self.root / name)
        self.hosts.local = name
        self.flags(host=name)
        self.flags(migration_inbound_addr=name, group='libvirt')
        for (option, group), values in self.differing.items():
            self.flags(**{option: values[name], 'group': group})

    # ---- what tests do and see

    def _boot(self):
        server = self._create_server(
            flavor_id=self.flavors[1], host='source', networks='none')
        self.disk = f'{server["id"]}_disk'
        self.before = self._files(self.source)
        self.assertEqual({f'disks/{self.disk}'}, self._disks(self.source))
        return server

    def _files(self, host):
        """The content of all files of a host, by their paths."""
        root = self.root / host.name
        return {str(path.relative_to(root)): path.read_bytes()
                for path in root.rglob('*')
                if path.is_file() and 'locks' not in path.parts and
                'compute_nodes' not in path.parts}

    def _disks(self, host):
        return {path for path in self._files(host) if 'disk.info' not in path}

    def _assert_empty(self, host):
        self.assertEqual({}, self._files(host))
        self.assertEqual(
            {POOL}, set(host.pools))
        self.assertEqual([], host.open_streams)

    def _assert_domain(self, server, name, state=libvirt.VIR_DOMAIN_RUNNING,
                       others=()):
        """A host has the server's domain, in a state; and the other has not.

        :param others: the states of those on the other host
        """
        self.assertEqual(name, self._get(server)['OS-EXT-SRV-ATTR:host'])
        for host, compute in self.computes.items():
            connection = compute.driver._host.get_connection()
            self.assertEqual(
                [state] if host == name else list(others),
                [domain.info()[0] for domain in connection.listAllDomains(
                    libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE |
                    libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE)])

    def _get(self, server):
        return self.api.get_server(server['id'])

    def _assert_usage(self, **usage):
        """Wait until placement has given so many GiB away on each host."""
        def found():
            return {name: self._get_provider_usages(
                self.compute_rp_uuids[name])['DISK_GB'] for name in usage}

        libvirt_storage.wait_for(lambda: usage == found(), timeout=60)
        self.assertEqual(usage, found())

    def _try_to_migrate(self, server):
        status = self._get(server)['status']
        self.api.post_server_action(server['id'], {'migrate': None})
        self._wait_for_migration_status(server, ['error'])
        self._wait_for_state_change(server, status)

    @patiently
    def _wait_for_migration_status(self, *args, **kwargs):
        return super()._wait_for_migration_status(*args, **kwargs)

    @patiently
    def _wait_for_server_parameter(self, *args, **kwargs):
        return super()._wait_for_server_parameter(*args, **kwargs)

    @patiently
    def _wait_for_instance_action_event(self, *args, **kwargs):
        return super()._wait_for_instance_action_event(*args, **kwargs)


def create_disk(self, context, instance, *args, **kwargs):
    """What of Nova's making of disks is to be seen here; MiB for GiB."""
    directory = libvirt_utils.get_instance_path(instance)
    is_new = not os.path.exists(directory)
    fileutils.ensure_tree(directory)
    # Records the format.
    path = self.image_backend.by_name(instance, 'disk').path
    is_made = not os.path.exists(path)
    if is_made:
        processutils.execute(
            'qemu-img', 'create', '-q', '-f', 'qcow2', path, '1M')
        processutils.execute(
            'qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 512k', path)
    # QEMU does not mind what is behind the end of an image.
    os.truncate(path, instance.flavor.root_gb * units.Mi)
    return is_new, is_made


class LiveMixin:
    """QEMU copies the disks, or fails to."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.libvirt.Domain.migrateToURI3',
            self._migrate))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.libvirt.Domain.state',
            lambda domain, flags=0: [domain._state, 0]))
        self.fails = self.powers_off = False

    def _migrate(self, domain, uri, params, flags):
        """Do what libvirt and QEMU do."""
        xml = etree.fromstring(params['destination_xml'])
        source = xml.find("devices/disk[@device='disk']/source")
        self.copied = source.get('file')
        self.during = self._files(self.dest)
        if self.powers_off:
            domain.destroy()
            domain.complete_job()
        elif self.fails:
            domain.fail_job()
        if self.fails:
            raise libvirt.make_libvirtError(
                libvirt.libvirtError, 'the link was cut',
                error_code=libvirt.VIR_ERR_OPERATION_FAILED)
        disk = self.root / 'dest/disks' / self.disk
        disk.write_bytes(self.before[f'disks/{self.disk}'])
        connection = self.computes['dest'].driver._host.get_connection()
        connection.createXML(params['destination_xml'], 'fake')
        domain.complete_job()


class LiveMigrateTestCase(LiveMixin, StorageMigrateTestCase):

    def test_disk_is_copied_into_the_pool(self):
        server = self._boot()
        self._live_migrate(server)
        self.assertEqual(f'{self.seen}/disks/{self.disk}', self.copied)
        self._assert_empty(self.source)
        self.assertEqual(self.before, self._files(self.dest))
        self.assertEqual('dest', self._get(server)['OS-EXT-SRV-ATTR:host'])
        self._assert_usage(source=0, dest=1)

    def test_disk_is_made_under_a_claim_and_its_format_recorded(self):
        server = self._boot()
        self._live_migrate(server)
        claims = {path for path in self.during if path.endswith('@source')}
        self.assertEqual(
            [f'disks/{server["id"]}_incoming',
             f'instances/{server["id"]}_arrived'],
            sorted(path.partition('-'.join(['', *path.split('-')[-5:]]))[0]
                   for path in claims))
        self.assertEqual(
            {f'disks/{self.disk}', f'instances/{server["id"]}/disk.info'},
            set(self.during) - claims)
        record = f'instances/{server["id"]}/disk.info'
        self.assertEqual(
            {f'{self.seen}/disks/{self.disk}': 'qcow2'},
            jsonutils.loads(self.during[record]))

    def test_failure_leaves_the_server_active_and_nothing_there(self):
        server = self._boot()
        self.fails = True
        self._live_migrate(server, 'failed')
        self._assert_domain(server, 'source')
        self.assertEqual(self.before, self._files(self.source))
        self._assert_empty(self.dest)
        self._assert_usage(source=1, dest=0)

    def test_guest_that_powers_off_keeps_its_disk(self):
        """Nova believes that a domain that is off has moved."""
        server = self._boot()
        self.fails = self.powers_off = True
        self._live_migrate(server, 'failed', 'SHUTOFF')
        self.assertEqual('source', self._get(server)['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(self.before, self._files(self.source))
        self._assert_empty(self.dest)

    def test_something_in_the_way_is_refused_and_stays(self):
        server = self._boot()
        path = self.root / 'dest/disks' / self.disk
        path.write_bytes(b'precious')
        self._live_migrate(server, 'error')
        self._assert_domain(server, 'source')
        self.assertEqual(
            {f'disks/{self.disk}': b'precious'}, self._files(self.dest))


@ddt.ddt
class MigrateTestCase(StorageMigrateTestCase):

    def test_migrate_and_confirm(self):
        server = self._boot()
        self._migrate_server(server)
        self._assert_kept()
        self._assert_domain(
            server, 'dest', others=[libvirt.VIR_DOMAIN_SHUTOFF])
        self._confirm_resize(server)
        self._assert_domain(server, 'dest')
        self._assert_empty(self.source)
        self.assertEqual(
            {f'disks/{self.disk}', f'instances/{server["id"]}/disk.info'},
            set(self._files(self.dest)))
        self._assert_usage(source=0, dest=1)

    def test_resize_and_revert(self):
        server = self._boot()
        self._resize_server(server, self.flavors[2])
        arrived = self._files(self.dest)[f'disks/{self.disk}']
        self.assertEqual(
            self.before[f'disks/{self.disk}'] + bytes(units.Mi), arrived)
        self._revert_resize(server)
        self._assert_domain(server, 'source')
        self.assertEqual(self.before, self._files(self.source))
        self._assert_empty(self.dest)
        self._assert_usage(source=1, dest=0)

    def test_there_and_back_again_and_delete(self):
        server = self._boot()
        for _host in 'dest', 'source':
            self._migrate_server(server)
            self._confirm_resize(server)
        self.assertEqual(self.before, self._files(self.source))
        self._delete_server(server)
        self._assert_empty(self.source)
        self._assert_empty(self.dest)

    @ddt.data(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_SHUTOFF)
    def test_failure_before_power_off(self, state):
        server = self._boot_into(state)
        self.dest.pools[POOL].active = False
        self._try_to_migrate(server)
        self.assertEqual(0, self.powered_off)
        self._assert_as_before(server, state)

    @ddt.data(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_SHUTOFF)
    def test_failure_after_power_off(self, state):
        server = self._boot_into(state)
        fault = self.dest.fail('stream.send', nth=2)
        self._try_to_migrate(server)
        self.assertTrue(fault.reached)
        self.assertEqual(1, self.powered_off)
        self._assert_as_before(server, state)
        # Nothing of it is in the way of the next attempt.
        self._migrate_server(server)
        self._assert_kept()

    def _boot_into(self, state):
        server = self._boot()
        if state == libvirt.VIR_DOMAIN_SHUTOFF:
            server = self._stop_server(server)
        source = self.computes['source'].driver
        self.powered_off = 0
        power_off = source.power_off

        def count(*args, **kwargs):
            self.powered_off += 1
            return power_off(*args, **kwargs)

        self.useFixture(fixtures.MockPatchObject(
            source, 'power_off', count))
        return server

    def _assert_kept(self):
        """Both hosts have the disk as it was."""
        for host in self.source, self.dest:
            self.assertEqual(self.before[f'disks/{self.disk}'],
                             self._files(host)[f'disks/{self.disk}'])

    def _assert_as_before(self, server, state):
        self._assert_domain(server, 'source', state)
        self.assertEqual(self.before, self._files(self.source))
        self.dest.pools[POOL].active = True
        self._assert_empty(self.dest)
        self._assert_usage(source=1, dest=0)


class SameHostTestCase(StorageMigrateTestCase):

    computes_to_start = ('source',)

    def setUp(self):
        super().setUp()
        self.flags(allow_resize_to_same_host=True)

    def test_confirm(self):
        server = self._boot()
        self._resize_server(server, self.flavors[2])
        self._assert_domain(server, 'source')
        self._confirm_resize(server)
        self.assertEqual(
            self.before[f'disks/{self.disk}'] + bytes(units.Mi),
            self._files(self.source)[f'disks/{self.disk}'])
        self.assertEqual(set(self.before), set(self._files(self.source)))
        self._assert_usage(source=2)
        self._delete_server(server)
        self._assert_empty(self.source)

    def test_revert(self):
        server = self._boot()
        self._resize_server(server, self.flavors[2])
        self._revert_resize(server)
        self._assert_domain(server, 'source')
        self.assertEqual(self.before, self._files(self.source))
        self._assert_usage(source=1)


class SharedMixin:
    """Both hosts have one file system."""

    def _make_root(self, name):
        if name == 'source':
            super()._make_root(name)
        else:
            (self.root / name).symlink_to(self.root / 'source')


class SharedStorageTestCase(SharedMixin, StorageMigrateTestCase):

    def _assert_all_there(self):
        files = self._files(self.source)
        self.assertEqual(set(self.before), set(files))
        disk = f'disks/{self.disk}'
        self.assertEqual(self.before[disk], files[disk][:units.Mi])
        self.assertEqual([], self.source.streams + self.dest.streams)

    def test_migrate_confirm_and_delete(self):
        server = self._boot()
        self._migrate_server(server)
        self._assert_all_there()
        self._confirm_resize(server)
        self._assert_domain(server, 'dest')
        self._assert_all_there()
        self._delete_server(server)
        self._assert_empty(self.dest)

    def test_resize_and_revert(self):
        server = self._boot()
        self._resize_server(server, self.flavors[2])
        self._assert_all_there()
        self._revert_resize(server)
        self._assert_domain(server, 'source')
        self._assert_all_there()
        self._delete_server(server)
        self._assert_empty(self.source)

    def test_revert_deletes_the_disk_of_the_new_flavor_alone(self):
        server = self._boot()
        flavor = self._create_flavor(name='ephemeral', disk=1, ephemeral=1)
        self._resize_server(server, flavor)
        new = self.root / 'dest' / 'disks' / f'{self.disk}.local'
        new.write_bytes(b'of the resized guest')
        self._revert_resize(server)
        self._assert_domain(server, 'source')
        self._assert_all_there()

    def test_failure_after_power_off(self):
        server = self._boot()
        with mock.patch.object(
                layout, 'write_record',
                side_effect=OSError('injected')) as record:
            self._try_to_migrate(server)
        record.assert_called_once()
        self._assert_domain(server, 'source')
        self._assert_all_there()


class SharedPoolMixin:
    """Both hosts have the directory of the pool, and not the instances'."""

    def _make_root(self, name):
        super()._make_root(name)
        if name == 'source':
            (self.root / name / 'disks').mkdir()
        else:
            (self.root / name / 'disks').symlink_to(self.root / 'source/disks')

    def _boot_with_files(self):
        """Boot a server with overlays in its instance directory."""
        self.flags(use_cow_images=True)
        self.flags(use_storage_pools=False, group='libvirt')
        server = self._create_server(
            flavor_id=self.flavors[1], host='source', networks='none')
        self.flags(use_storage_pools=True, group='libvirt')
        self.before = self._files(self.source)
        self.assertIn(f'instances/{server["id"]}/disk', self.before)
        return server

    def _assert_refused(self, server):
        self._try_to_migrate(server)
        event = self._wait_for_action_fail_completion(
            server, 'migrate', 'compute_resize_instance')
        self.assertIn('both hosts share storage pool', event['details'])
        self._assert_as_before(server)

    def _assert_as_before(self, server):
        self._assert_domain(server, 'source')
        self.assertEqual(self.before, self._files(self.source))
        self.assertEqual([], [path for path in self._files(self.dest)
                              if server['id'] in path])


class SharedPoolTestCase(SharedPoolMixin, StorageMigrateTestCase):

    def test_files_do_not_go_into_it(self):
        self._assert_refused(self._boot_with_files())

    def test_volumes_do_not_go_to_another_directory(self):
        self._assert_refused(self._boot())


class SharedPoolToFilesTestCase(SharedPoolMixin, StorageMigrateTestCase):
    """The destination does not use the pool, and has its directory."""

    differing = {('use_storage_pools', 'libvirt'): {
        'source': True, 'dest': False}}

    def test_volumes_do_not_become_files(self):
        self._assert_refused(self._boot())


class SharedPoolLiveTestCase(SharedPoolMixin, LiveMixin,
                             StorageMigrateTestCase):

    def test_files_do_not_go_into_it(self):
        server = self._boot_with_files()
        self._live_migrate(server, 'error')
        self._assert_as_before(server)


class StaleDirectoryTestCase(StorageMigrateTestCase):
    """A migration that failed left the directory that it had kept.

    nova-compute ends during the next one, while the server is off.
    """

    def setUp(self):
        super().setUp()
        self.flags(use_cow_images=True)
        self.flags(use_storage_pools=False, vol_upload_migration_legacy=True,
                   group='libvirt')

    def _end(self, driver, server, *args):
        """Do what Nova does when nova-compute starts again."""
        instance = server.instance
        migration = objects.Migration.get_by_id_and_instance(
            nova_context.get_admin_context(),
            instance.migration_context.migration_id, instance.uuid)
        driver.finish_revert_migration(
            server.context, instance, server.network_info, migration,
            server.block_device_info, False)
        self.after = self._files(self.source)
        raise test.TestingException('nova-compute ended')

    def test_it_does_not_become_the_servers(self):
        server = self._stop_server(self._create_server(
            flavor_id=self.flavors[1], host='source', networks='none'))
        stale = self.root / f'source/instances/{server["id"]}_resize'
        stale.mkdir()
        (stale / 'disk').write_bytes(b'stale')
        before = self._files(self.source)
        del before[f'instances/{server["id"]}_resize/disk']
        with mock.patch.object(
                storage_migrate.LibvirtDriver, '_copy_and_power_off',
                lambda driver, *args: self._end(driver, *args)):
            self._try_to_migrate(server)
        self.assertEqual(before, self.after)


class CrossCellMixin:
    """The hosts are in two cells: the disk goes through Glance."""

    NUMBER_OF_CELLS = 2
    cells = {'source': 'cell1', 'dest': 'cell2'}

    def setUp(self):
        super().setUp()
        self.policy.set_rules(
            {servers_policies.CROSS_CELL_RESIZE:
                base_policies.RULE_ADMIN_API}, overwrite=False)

    def _fail(self, server):
        self.api.post_server_action(
            server['id'], {'resize': {'flavorRef': self.flavors[2]}})
        # The conductor is not done with a server when that is in ERROR.
        self._wait_for_action_fail_completion(
            server, instance_actions.RESIZE, 'conductor_migrate_server')
        self._wait_for_state_change(server, 'ERROR')
        self.assertEqual(self.before, self._files(self.source))
        return self._get(server)['fault']['message']

    def _start_again(self, server):
        self.api.post_server_action(server['id'], {'reboot': {'type': 'HARD'}})
        self._wait_for_state_change(server, 'ACTIVE')
        self.assertEqual(self.before, self._files(self.source))


class CrossCellTestCase(CrossCellMixin, StorageMigrateTestCase):

    def _resize(self, server):
        self._resize_server(server, self.flavors[2])
        self._assert_domain(server, 'dest')
        self.assertEqual(self.before, self._files(self.source))
        self.assertEqual(set(self.before), set(self._files(self.dest)))
        self.assertEqual([], self.source.streams + self.dest.streams)

    def test_confirm_and_delete(self):
        server = self._boot()
        self._resize(server)
        arrived = self._files(self.dest)
        self._confirm_resize(server, cross_cell=True)
        self._assert_domain(server, 'dest')
        self._assert_empty(self.source)
        self.assertEqual(arrived, self._files(self.dest))
        self._assert_usage(source=0, dest=2)
        self._delete_server(server)
        self._assert_empty(self.dest)

    def test_revert_and_resize_again(self):
        server = self._boot()
        for _attempt in range(2):
            # The helpers wait for notifications, and not for those of before.
            self.notifier.reset()
            self._resize(server)
            self._revert_resize(server)
            self._assert_domain(server, 'source')
            self.assertEqual(self.before, self._files(self.source))
            self._assert_empty(self.dest)
            self._assert_usage(source=1, dest=0)

    def test_delete_instead_of_confirm(self):
        server = self._boot()
        self._resize(server)
        self._delete_server(server)
        self._assert_empty(self.source)
        self._assert_empty(self.dest)

    def test_server_that_does_not_start_there(self):
        server = self._boot()
        with mock.patch('nova.virt.libvirt.guest.Guest.launch',
                        side_effect=exception.InvalidInput('injected')):
            self._fail(server)
        self._assert_empty(self.dest)
        self._start_again(server)
        self._assert_domain(server, 'source')

    def test_disk_that_is_there_is_neither_taken_nor_deleted(self):
        """It may be what an earlier attempt left."""
        server = self._boot()
        (self.root / 'dest/disks' / self.disk).write_bytes(b'precious')
        self.assertIn(self.disk, self._fail(server))
        self.assertEqual(
            {f'disks/{self.disk}': b'precious'}, self._files(self.dest))
        self._start_again(server)


class CrossCellSharedTestCase(CrossCellMixin, SharedMixin,
                              StorageMigrateTestCase):
    """Both cells have one file system.

    Nova would have the resized server use the disk of the source host, and
    delete that as the resize is confirmed.
    """

    def test_resize_is_refused_and_the_disk_stays(self):
        server = self._boot()
        self.assertIn('share storage', self._fail(server))
        self._start_again(server)
        self._assert_domain(server, 'source')


class TransitionTestCase(StorageMigrateTestCase):
    """The two hosts are not, or not yet, configured alike."""

    def _differ(self, option, source, dest, group='libvirt'):
        self.differing = {
            (option, group): {'source': source, 'dest': dest}}

    def _assert_refused(self, server, *texts):
        self._try_to_migrate(server)
        event = self._wait_for_action_fail_completion(
            server, 'migrate', 'compute_resize_instance')
        for text in texts:
            self.assertIn(text, event['details'])
        self._assert_domain(server, 'source')
        self.assertEqual(self.before, self._files(self.source))
        self.assertEqual({}, self._files(self.dest))

    def test_destination_has_no_pool_yet(self):
        server = self._boot()
        del self.dest.pools[POOL]
        self._assert_refused(
            server, f'there is no storage pool {POOL}', 'use_storage_pools')

    def test_source_may_not_migrate_over_libvirt_yet(self):
        server = self._boot()
        self._differ('vol_upload_migration', False, True)
        self._assert_refused(server, 'vol_upload_migration = True')

    def test_pools_are_switched_off_at_the_destination(self):
        server = self._boot()
        self._differ('use_storage_pools', True, False)
        self._migrate_server(server)
        self._confirm_resize(server)
        self._assert_domain(server, 'dest')
        self.assertEqual(self.before[f'disks/{self.disk}'],
                         self._files(self.dest)[f'disks/{self.disk}'])
        self._assert_empty(self.source)

    def test_pools_have_different_directories(self):
        del self.dest.pools[POOL]
        self.dest.add_pool(POOL, f'{self.seen}/elsewhere')
        server = self._boot()
        self._differ('disks_pool_path', f'{self.seen}/disks',
                     f'{self.seen}/elsewhere')
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assertEqual({f'elsewhere/{self.disk}'}, self._disks(self.dest))
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assertEqual(self.before, self._files(self.source))
        self._assert_empty(self.dest)

    def test_full_image_stays_one_where_others_are_overlays(self):
        self._differ('use_cow_images', False, True, group=None)
        server = self._boot()
        self._migrate_server(server)
        self._confirm_resize(server)
        files = self._files(self.dest)
        self.assertEqual(self.before[f'disks/{self.disk}'],
                         files[f'disks/{self.disk}'])
        self.assertEqual(
            {f'{self.seen}/disks/{self.disk}': 'qcow2'}, jsonutils.loads(
                files[f'instances/{server["id"]}/disk.info']))
