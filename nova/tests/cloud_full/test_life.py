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

from collections.abc import Iterator
import contextlib

from openstack import exceptions

from nova.tests.cloud import base

from tools import daemons
from tools import servers

MIB = 1024 ** 2
GIB = 1024 ** 3


class LifeTestCase(base.CloudTestCase):
    """A server of which nothing is left in the end.

    :cvar counted: the disks on which the guest counts its boots
    :cvar given_up: those of them that go with their host: to a revert, or to
        an evacuation
    :cvar made_anew: those of them that are not in a snapshot
    """

    flavor = 'small-ephemeral'
    counted = given_up = ('vda', 'vdb')
    made_anew = ('vdb',)

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)
        self.images = self.cloud.connection().image
        self.server = self._boot()
        self.boots = dict.fromkeys(self.counted, 1)

    def _boot(self) -> servers.Server:
        """Boot the server on the source host."""
        return self.create_booted(**self._server())

    def _server(self) -> dict:
        return {'flavor': self.flavor}

    def assert_boots(self, **counters: int) -> None:
        """The guest starts once more, from the disks that it had.

        :param counters: of the disks that are new, or older ones
        """
        for disk in self.boots:
            self.boots[disk] += 1
        self.boots.update(counters)
        self.assert_counts(self.server, **self.boots)
        self.assert_in_place()

    def forget_boot(self) -> None:
        """The last boot went with the disks that a revert gave up."""
        for disk in self.given_up:
            self.boots[disk] -= 1

    def assert_in_place(self) -> None:
        """The disks are in the pool, and none in the instance directory."""
        directory = self.cloud.lab.host(self.server.host).path(
            f'{servers.INSTANCES}/{self.server.id}')
        self.assertEqual(
            set(), {path.name for path in directory.glob('disk*')} -
            {'disk.info', 'disk.config'})

    def act(self, action: str, *args, status: str = 'ACTIVE',
            **kwargs) -> None:
        """Call the API, and wait until the server is of this status."""
        getattr(self.server.compute, action)(self.server.id, *args, **kwargs)
        self.server.wait(status)

    @contextlib.contextmanager
    def evacuated(self) -> Iterator[None]:
        """Evacuate the server from the source, which is back in the end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.cloud.wait_computes)
            stack.callback(self._force_source_down, False)
            stack.callback(self.cloud.start_compute, self.source)
            self.cloud.daemon(f'nova-compute-{base.SOURCE}').stop()
            # On a host that is down no guest holds on to its disks.
            self.source.run(['virsh', 'destroy', self.server.id])
            self._force_source_down(True)
            self.act('evacuate_server', status='SHUTOFF')
            self.assertEqual(base.DESTINATION, self.server.host)
            yield

    def _force_source_down(self, forced: bool) -> None:
        compute = self.server.compute
        service = next(compute.services(
            binary='nova-compute', host=base.SOURCE))
        # Nova lets go of it only when the host has cleared up what was
        # evacuated from it.
        daemons.wait_for('the host to be forced down, or not', lambda: (
            compute.put(f'/os-services/{service.id}',
                        json={'forced_down': forced}).ok), poll=0.5)


class LifeMixin:
    """The operations of an operator on a server.

    :cvar larger_flavor: to which it is resized on the same host
    :cvar sizes: of its disks in bytes, as the guest sees them
    :cvar larger_sizes: the same after the resize
    :cvar reverted_sizes: the same after its revert, if they are others
    """

    larger_flavor = 'large-ephemeral'
    sizes = {'vda': GIB, 'vdb': GIB}
    larger_sizes = {'vda': 2 * GIB, 'vdb': 2 * GIB}
    reverted_sizes: dict[str, int] = {}

    def test_stop_start_reboot_rescue_suspend(self):
        self.server.stop()
        self.server.start()
        self.assert_boots()
        self.act('reboot_server', 'HARD')
        self.assert_boots()
        self.act('suspend_server', status='SUSPENDED')
        self.act('resume_server')
        self._rescue()
        self.assert_boots()

    def _rescue(self) -> None:
        self.act('rescue_server', status='RESCUE')
        self.act('unrescue_server')

    def test_snapshot_rebuild_shelve(self):
        live = self._snapshot()
        self.server.stop()
        cold = self._snapshot()
        new = dict.fromkeys(self.made_anew, 1)
        self.act('rebuild_server', cold.id, status='SHUTOFF')
        self.server.start()
        self.assert_boots(**new)
        self.act('rebuild_server', live.id)
        self.assert_boots(vda=2, **new)
        self.act('shelve_server', status='SHELVED_OFFLOADED')
        for host in (base.SOURCE, base.DESTINATION):
            self.assert_no_disks(self.server, host)
        shelved = self.images.find_image(f'{self.id()}-shelved')
        self.assertIsNotNone(shelved)
        self.act('unshelve_server')
        self.assert_boots(vda=3, **new)

    def _snapshot(self):
        image = self.server.compute.create_server_image(
            self.server.id, 'snapshot', wait=True)
        self.addCleanup(self.images.delete_image, image.id)
        self.server.settle()
        self.assertEqual('active', self.images.get_image(image.id).status)
        return image

    def test_resize_on_the_same_host(self):
        before = self.server.disks(base.SOURCE)
        self.server.resize(self.larger_flavor, base.SOURCE)
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_boots()
        self.assertEqual(self.larger_sizes, self.server.sizes())
        self.server.revert()
        self.forget_boot()
        self.assert_boots()
        self.assertEqual(self.reverted_sizes or self.sizes,
                         self.server.sizes())
        self.assertEqual(before, self.server.disks(base.SOURCE))
        self.server.stop()
        self.server.resize(self.larger_flavor, base.SOURCE)
        self.server.confirm('SHUTOFF')
        self.assertEqual(before, self.server.disks(base.SOURCE))
        self.server.start()
        self.assert_boots()
        self.assert_no_disks(self.server, base.DESTINATION)

    def test_evacuate(self):
        with self.evacuated():
            self.assertNotEqual({}, self.server.disks(base.SOURCE))
        daemons.wait_for('the source to clear up', lambda: (
            not self.server.disks(base.SOURCE)), poll=0.5)
        self.assert_no_disks(self.server, base.SOURCE)
        self.server.start()
        # The disks of the source were lost.
        self.assert_boots(**dict.fromkeys(self.given_up, 1))


class MoveMixin:
    """A migration that is reverted, and a resize that is confirmed."""

    def test_migrate_revert_resize_confirm(self):
        self.migrate_without_ssh(self.server, base.DESTINATION)
        self.assertEqual(base.DESTINATION, self.server.host)
        self.assert_boots()
        self.assert_kept(True)
        self.server.revert()
        self.assertEqual(base.SOURCE, self.server.host)
        self.forget_boot()
        self.assert_boots()
        self.assert_kept(False)
        self.assert_no_disks(self.server, base.DESTINATION)

        self.server.resize(self.larger_flavor, base.DESTINATION)
        self.assert_boots()
        self.server.confirm()
        self.assertEqual(base.DESTINATION, self.server.host)
        self.assertEqual(self.larger_sizes, self.server.sizes())
        self.assert_kept(False)
        self.assert_no_disks(self.server, base.SOURCE)
        self.assertEqual({}, self.vtpm(self.server, base.SOURCE))
        self.act('reboot_server', 'HARD')
        self.assert_boots()

    def assert_kept(self, kept: bool) -> None:
        """Check whether something is kept for a revert."""


class LiveMixin:
    """A live migration, with which nothing stays on the source."""

    options = base.cloud.LIVE

    def test_live_migration(self):
        self.server.live_migrate(base.DESTINATION)
        self.assertEqual(base.DESTINATION, self.server.host)
        self.assertEqual(
            [self.server.id], self.destination.run(
                ['virsh', 'list', '--uuid', '--state-running']).stdout.split())
        self.assert_no_disks(self.server, base.SOURCE)
        self.assertEqual({}, self.vtpm(self.server, base.SOURCE))
        self.act('reboot_server', 'HARD')
        self.assert_boots()


class TestLife(LifeMixin, LifeTestCase):
    """A server whose disks are in the pool."""


class TestLifeRaw(TestLife):
    """The same with disks that are no overlays."""

    options = {'DEFAULT': {'use_cow_images': 'False'}}

    def test_snapshot_rebuild_shelve(self):
        super().test_snapshot_rebuild_shelve()
        self.assertNotIn('backing-filename', self.image_info(
            self.server, self.server.host, 'disk'))


class UefiMixin:
    """A server whose guest counts its boots in UEFI variables, too."""

    compute_program = base.cloud.COMPUTE_FOR_UEFI
    counted = given_up = (*LifeTestCase.counted, 'efi')
    made_anew = (*LifeTestCase.made_anew, 'efi')

    def _server(self):
        return {**super()._server(), 'image': 'guest-uefi'}

    def test_resize_on_the_same_host(self):
        # libvirt has the variables in the same place before and after.
        self.given_up = LifeTestCase.given_up
        super().test_resize_on_the_same_host()

    def test_live_migration(self):
        super().test_live_migration()
        # libvirt leaves the variables on the source.
        for path in self.source.path(servers.NVRAM).glob('*'):
            path.unlink()


class TestLifeUefi(UefiMixin, LiveMixin, MoveMixin, LifeMixin,
                 LifeTestCase):
    """A server with UEFI, whose disks are in the pool."""

    def test_live_migration_of_a_server_that_was_migrated(self):
        """Its variables are in its instance directory."""
        self.server.migrate(base.DESTINATION)
        self.server.confirm()
        self.assert_boots()
        self.server.live_migrate(base.SOURCE)
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_no_disks(self.server, base.DESTINATION)
        self.act('reboot_server', 'HARD')
        self.assert_boots()


class TestLifeVtpm(UefiMixin, LiveMixin, MoveMixin, LifeMixin,
                 LifeTestCase):
    """The same with a vTPM, of which Nova refuses more than of others."""

    flavor = 'small-vtpm'
    larger_flavor = 'large-vtpm'
    # Others Nova does not live migrate, and before 33 it knows no others.
    specs = ({'hw:tpm_secret_security': 'host'}
             if base.RELEASE >= 33 else {})
    sizes = LifeMixin.sizes | {'vdc': 64 * MIB}
    larger_sizes = LifeMixin.larger_sizes | {'vdc': 128 * MIB}
    test_snapshot_rebuild_shelve = test_evacuate = None

    def _boot(self):
        compute = self.cloud.connection().compute
        for flavor in map(compute.find_flavor, (
                self.flavor, self.larger_flavor)):
            for name, value in self.specs.items():
                compute.create_flavor_extra_specs(flavor, {name: value})
                self.addCleanup(compute.delete_flavor_extra_specs_property,
                                flavor, name)
        return super()._boot()

    def test_stop_start_reboot_rescue_suspend(self):
        self.server.stop()
        state = self.vtpm(self.server, base.SOURCE)
        self.assertIn('tpm2/tpm2-00.permall', state)
        self.server.start()
        self.assert_boots()
        self._snapshot()
        self.act('reboot_server', 'HARD')
        self.assert_boots()
        for action, *arguments in (
                ('rescue_server',), ('shelve_server',), ('evacuate_server',),
                ('rebuild_server', self.server.get().image.id)):
            self.assertRaises(
                exceptions.HttpException, self.act, action, *arguments)
        self.assertEqual('ACTIVE', self.server.status)
        self.server.stop()
        self.assertEqual(set(state), set(self.vtpm(self.server, base.SOURCE)))


class TestEveryDisk(LifeTestCase):
    """A server with every kind of disk, a kernel beside them, and a vTPM.

    :cvar needs_base: whether its root disk is an overlay
    """

    flavor = 'small-vtpm'
    needs_base = True

    def _server(self):
        self.lost = self.make_boot_images('every-disk')
        return {**super()._server(), 'config_drive': True,
                'image': 'every-disk'}

    def test_migrate_while_off_without_a_target(self):
        self.server.stop()
        for image in self.lost:
            self.images.delete_image(image)
        size = base.log_size(self.cloud, base.SOURCE)
        self.server.migrate()
        self.assertEqual(base.DESTINATION, self.server.host)
        self.assertEqual(self.needs_base, 'Copied base_' in base.read_log(
            self.cloud, base.SOURCE, size))
        self.assert_same_vtpm(self.server)
        self.server.confirm('SHUTOFF')
        self.assert_no_disks(self.server, base.SOURCE)
        self.assertEqual({}, self.vtpm(self.server, base.SOURCE))
        self.server.start()
        self.assert_boots()
        self.assertEqual(64 * 1024 ** 2, self.server.sizes()['vdc'])
        self.assertEqual(
            {'disk', 'disk.eph0', 'disk.swap', 'disk.config'},
            set(self.server.disks(base.DESTINATION)))


class TestEveryDiskRaw(TestEveryDisk):
    """The same with disks that are no overlays."""

    needs_base = False
    options = {'DEFAULT': {'use_cow_images': 'False'}}
