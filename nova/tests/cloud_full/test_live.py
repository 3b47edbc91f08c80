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

"""Live migration of servers, with disks in the pool and in files."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import statistics
import time

from openstack import exceptions
from testtools import content

from nova.tests.cloud import base
from nova.tests.cloud import test_legacy
from nova.tests.cloud_full import test_hosts
from nova.tests.live import fault_table

from tools import cloud
from tools import daemons
from tools import guest
from tools import servers

TLS = cloud.LIVE
# The full setup without pools, over TLS too.
FILES = test_legacy.DirectoryTestCase.options
IN_POOL = f'{servers.POOL}/{{0}}_{{1}}'
IN_FILES = f'{servers.INSTANCES}/{{0}}/{{1}}'
IMAGE = 'guest-beats'
# Written to the root disk, for a copy that takes some time at a bandwidth of
# so many MiB/s.
NOISE = '256M'
BANDWIDTH = 16
# The stages of a live migration.
SENDING = 'while files are sent that QEMU does not copy'
COPYING = 'while QEMU copies the disks'
MEMORY = 'while QEMU copies the memory'
# How long a link is cut at most.
CUT_SECONDS = 60
# Number of heartbeats on the console after which the guest has written to each
# disk.
BEATS = 3


class LiveTestCase(base.CloudTestCase):
    """A server whose guest writes to every disk all the time.

    :cvar disk_path: where its disks are, made of its id and a disk's name
    :cvar format: of its disks
    """

    options = TLS
    disk_path = IN_POOL
    format = 'qcow2'

    def setUp(self):
        super().setUp()
        self.addCleanup(self.assert_hosts_are_empty)
        self._make_image()
        self.server = self.create(
            image=IMAGE, flavor='small-swap', config_drive=True)
        self.before_boot()
        self.server.wait_boot()
        self.wait_beats(BEATS)

    def before_boot(self) -> None:
        """Do something to the server before it has booted."""

    def _make_image(self) -> None:
        images = self.cloud.connection().image
        if images.find_image(IMAGE) is None:
            path = self.cloud.directory / f'{IMAGE}.raw'
            guest.build(path, beats=True)
            images.create_image(
                name=IMAGE, filename=str(path), wait=True, disk_format='raw',
                container_format='bare', visibility='public')

    # ---- what the guest says

    def beats(self) -> list[int]:
        """The beats that the guest said on this host since it started."""
        return [int(beat) for beat in
                re.findall(r'BEAT (\d+)', self.server.console())]

    def wait_beats(self, count: int) -> None:
        """Wait until the guest has said so many beats."""
        daemons.wait_for('beats of the guest', lambda: (
            len(self.beats()) >= count), servers.BOOT_SECONDS, poll=1)

    def assert_never_noticed(self, last: int) -> None:
        """The guest went on without a gap and without a boot.

        :param last: the last beat that was heard before
        """
        self.wait_beats(BEATS)
        self.assertNotIn('GUEST-READY', self.server.console())
        beats = self.beats()
        self.assertGreater(beats[0], last)
        self.assertEqual(
            list(range(beats[0], beats[0] + len(beats))), beats)

    def assert_all_written(self, boots: int) -> None:
        """The guest boots again, and finds all that it wrote."""
        last = self.beats()[-1]
        self.server.compute.reboot_server(self.server.id, 'HARD')
        self.server.wait('ACTIVE')
        self.assert_counts(self.server, vda=boots, vdb=boots)
        said = self.server.console()
        self.assertEqual(['ok', 'ok'], re.findall(r'DATA \w+ (\w+)', said))
        self.assertIn('SWAP vdc', said)
        for disk in ('vda', 'vdb'):
            count, number = map(int, re.search(
                rf'BEATS {disk} (\d+) (\d+)', said).groups())
            self.assertEqual(count, number)
            self.assertGreaterEqual(count, last)

    # ---- where its disks are

    def config_drive(self) -> str:
        """The checksum of its config drive."""
        return servers.sha256(
            self.server.disks(self.server.host)['disk.config'])

    def assert_in_place(self, formats: dict[str, bool]) -> None:
        """Its disks are where they belong, and known to be.

        :param formats: whether each has a base image, by disk
        """
        for disk, has_base in formats.items():
            info = self.qemu_img_info(self.server.host, self.path(disk))
            self.assertEqual(self.format, info['format'])
            self.assertEqual(has_base, 'backing-filename' in info, disk)
        # Nothing else, no claim either.
        self.assertEqual(
            {*formats, 'disk.config'},
            set(self.server.disks(self.server.host)))

    def path(self, disk: str) -> str:
        """Where a disk is on its host."""
        return self.disk_path.format(self.server.id, disk)

    def contents(self) -> dict[str, str]:
        """The checksums of what the guest can read of its disks."""
        host = self.cloud.lab.host(self.server.host)
        found = {}
        for name, path in self.server.disks(host.name).items():
            copy = self.cloud.directory / 'content'
            if name == 'disk.config':
                shutil.copy(path, copy)
            else:
                with writable(copy):
                    host.run(['qemu-img', 'convert', '-U', '-O', 'raw',
                              '-f', self.format, self.path(name), str(copy)])
            found[name] = servers.sha256(copy)
            copy.unlink()
        return found

    # ---- what becomes of it

    def start_live_migration(self) -> None:
        self.server.compute.live_migrate_server(
            self.server.id, host=base.DESTINATION, block_migration='auto')

    def migration_status(self) -> str:
        """The status of the newest migration."""
        return max(self.server.compute.migrations(
            instance_uuid=self.server.id), key=lambda one: one.id).status

    def assert_as_before(self, last: int) -> None:
        """The server runs on the source, and nothing is anywhere else."""
        self.server.wait('ACTIVE')
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_cleared()
        self.assertNotIn('_incoming', str(self.server.disks(base.SOURCE)))
        count = len(self.beats())
        self.wait_beats(count + 2)
        self.assertGreater(self.beats()[-1], last)

    def assert_cleared(self) -> None:
        """Nothing is on the destination: Nova does not await the rollback."""
        daemons.wait_for('the destination to clear up', lambda: (
            not self.server.disks(base.DESTINATION)), 180, poll=0.5)
        self.assert_no_disks(self.server, base.DESTINATION)


@contextlib.contextmanager
def writable(path):
    """A file that any user of a host may write."""
    path.touch()
    path.chmod(0o666)
    yield


class TestLive(LiveTestCase):
    """Overlays."""

    # Whether each disk has a base image before and after a migration.
    before = {'disk': True, 'disk.eph0': True, 'disk.swap': True}
    after = {'disk': True, 'disk.eph0': False, 'disk.swap': False}

    def test_there_and_back(self):
        config_drive = self.config_drive()
        self.assert_in_place(self.before)
        for boots, (here, there) in enumerate((
                (base.SOURCE, base.DESTINATION),
                (base.DESTINATION, base.SOURCE)), 2):
            last = self.beats()[-1]
            self.server.live_migrate(there)
            self.assertEqual(there, self.server.host)
            self.assert_never_noticed(last)
            self.assert_no_disks(self.server, here)
            self.assert_in_place(self.after)
            self.assertEqual(config_drive, self.config_drive())
            self.assert_all_written(boots)
        self.migrate_without_ssh(self.server, base.DESTINATION)
        self.server.confirm()
        self.assert_counts(self.server, vda=4, vdb=4)

    def test_every_byte_of_every_disk(self):
        compute = self.server.compute
        compute.pause_server(self.server.id)
        self.server.wait('PAUSED')
        contents = self.contents()
        compute.live_migrate_server(self.server.id, host=base.DESTINATION,
                                    block_migration='auto')
        daemons.wait_for('the live migration', lambda: (
            self.server.settle() == 'PAUSED' and
            self.server.host == base.DESTINATION), poll=1)
        self.assertEqual(contents, self.contents())
        compute.unpause_server(self.server.id)
        self.server.wait('ACTIVE')

    def test_swap_disk_that_nobody_made(self):
        """Nova makes it at the end of a migration, which may fail before."""
        self.server.disks(base.SOURCE)['disk.swap'].unlink()
        self.assert_all_written(2)
        self.assertIn('disk.swap', self.server.disks(base.SOURCE))


class TestLiveFull(TestLive):
    """Images without a base."""

    options = cloud.config.merge(
        TLS, {'DEFAULT': {'use_cow_images': 'False'}})
    before = after = {'disk': False, 'disk.eph0': False, 'disk.swap': False}


class TestLiveFiles(TestLive):
    """Overlays in the instance directory; Glance has lost the image."""

    options = FILES
    disk_path = IN_FILES
    # Their base images go along: the root disk's is lost in Glance.
    after = dict.fromkeys(TestLive.before, False)

    def before_boot(self):
        images = self.cloud.connection().image
        base_image = self.qemu_img_info(
            base.SOURCE, self.path('disk'))['backing-filename']
        images.delete_image(images.find_image(IMAGE))
        self.destination.path(base_image).unlink(missing_ok=True)


class TestLiveRaw(LiveTestCase):
    """Raw files, which go to a host that makes images of new disks."""

    options = FILES
    host_options = {base.SOURCE: cloud.config.merge(
        FILES, {'DEFAULT': {'use_cow_images': 'False'}})}
    disk_path = IN_FILES
    format = 'raw'

    def test_there_and_back(self):
        raw = dict.fromkeys(TestLive.before, False)
        self.assert_in_place(raw)
        for boots, (here, there) in enumerate((
                (base.SOURCE, base.DESTINATION),
                (base.DESTINATION, base.SOURCE)), 2):
            last = self.beats()[-1]
            self.server.live_migrate(there)
            self.assert_never_noticed(last)
            self.assert_no_disks(self.server, here)
            self.assert_all_written(boots)
            self.assert_in_place(raw)


class TestLivePlaces(LiveTestCase):
    """One host has pools, the other files."""

    options = TLS
    host_options = {base.SOURCE: FILES}

    def test_into_the_pool_and_out_of_it(self):
        config_drive = self.config_drive()
        self.disk_path = IN_FILES
        self.assert_in_place(TestLive.before)
        boots = 1
        for _round in range(2):
            for here, there, self.disk_path in (
                    (base.SOURCE, base.DESTINATION, IN_POOL),
                    (base.DESTINATION, base.SOURCE, IN_FILES)):
                last = self.beats()[-1]
                self.server.live_migrate(there)
                self.assertEqual(there, self.server.host)
                self.assert_never_noticed(last)
                self.assert_no_disks(self.server, here)
                self.assert_in_place(TestLive.after)
                self.assertEqual(config_drive, self.config_drive())
                boots += 1
                self.assert_all_written(boots)


class TestLiveRefused(LiveTestCase):
    """A destination that cannot take the server stays as it is."""

    def refused(self) -> str:
        """Log of the source host during a live migration that is refused."""
        size = base.log_size(self.cloud, base.SOURCE)
        self.assertRaises(exceptions.BadRequestException,
                          self.start_live_migration)
        self.server.wait('ACTIVE')
        self.assertEqual(base.SOURCE, self.server.host)
        return base.read_log(self.cloud, base.SOURCE, size)

    def test_something_is_in_the_way(self):
        volume = self.destination.path(
            f'{servers.POOL}/{self.server.id}_disk')
        volume.write_text('precious')
        self.assertIn(f'{servers.POOL}/{self.server.id}_disk is in the way',
                      self.refused())
        self.assertEqual('precious', volume.read_text())
        volume.unlink()
        directory = self.destination.path(
            f'{servers.INSTANCES}/{self.server.id}')
        directory.mkdir()
        (directory / 'disk').write_text('precious')
        self.assertIn(f'{servers.INSTANCES}/{self.server.id} is in the way',
                      self.refused())
        self.assertEqual('precious', (directory / 'disk').read_text())
        shutil.rmtree(directory)
        self.assert_no_disks(self.server, base.DESTINATION)

    def test_what_a_dead_attempt_left_is_cleared(self):
        for name in ('disk', 'incoming-a@host1'):
            self.destination.run(
                ['touch', f'{servers.POOL}/{self.server.id}_{name}'],
                user='nova')
        self.server.live_migrate(base.DESTINATION)
        self.assert_in_place(TestLive.after)


class TestLiveStockDestination(TestLiveRefused):
    """The destination has Nova's own driver."""

    host_options = {base.DESTINATION: {
        'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}}}
    test_something_is_in_the_way = None
    test_what_a_dead_attempt_left_is_cleared = None

    def test_it_is_refused(self):
        self.assertIn('the destination has none', self.refused())
        self.assert_no_disks(self.server, base.DESTINATION)


class TestLiveStockSource(LiveTestCase):
    """The source has Nova's own driver again."""

    def test_it_is_refused(self):
        self.addCleanup(self.cloud.restart_computes, self.cloud.options)
        self.cloud.restart_computes(self.cloud.options, host_options={
            base.SOURCE: {
                'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}}})
        self.cloud.wait_computes()
        last = self.beats()[-1]
        self.start_live_migration()
        daemons.wait_for('the end of the live migration', lambda: (
            self.migration_status() in ('error', 'failed')), poll=1)
        self.assertIn('compute_driver', self.server.failure())
        self.assert_as_before(last)


class TestLivePause(LiveTestCase):
    """The guest is paused as long as with Nova's own driver, and files."""

    rounds = 3
    # The machine has other work, and a pause is short.
    slack_ms = 150

    def test_pause_is_no_longer_than_with_novas_own_driver(self):
        self.addCleanup(self.cloud.restart_computes, self.cloud.options)
        pauses = {}
        for _round in range(self.rounds):
            self._measure('pool', self.server, pauses)
            self._restart('libvirt.LibvirtDriver', False)
            if 'files' not in pauses:
                other = self.create(image=IMAGE, flavor='small-swap')
                other.wait_boot()
            self._measure('files', other, pauses)
            self._restart(cloud.STREAMS['DEFAULT']['compute_driver'], True)
        self.addDetail('pauses', content.text_content(str(pauses)))
        self.assertLess(
            statistics.median(pauses['pool']),
            1.2 * statistics.median(pauses['files']) + self.slack_ms)

    def _measure(self, what: str, server: servers.Server,
                 pauses: dict[str, list[int]]) -> None:
        """Move a server there and back, and note how long it paused, in ms."""
        for host in (self.destination, self.source):
            server.live_migrate(host.name)
            self.assertEqual(host.name, server.host)
            said = host.run(
                ['virsh', 'domjobinfo', '--completed', server.id]).stdout
            pauses.setdefault(what, []).append(
                int(re.search(r'Total downtime: +(\d+) +ms', said)[1]))

    def _restart(self, driver: str, pools: bool) -> None:
        """Have both hosts use a driver, and pools or not."""
        self.cloud.restart_computes(cloud.config.merge(self.cloud.options, {
            'DEFAULT': {'compute_driver': driver},
            'libvirt': {'use_storage_pools': pools}}))
        self.cloud.wait_computes()


class LiveFaultTestCase(test_hosts.OutageMixin, LiveTestCase):
    """A fault during a live migration leaves the server as it was."""

    options = cloud.config.merge(TLS, {'libvirt': {
        'live_migration_bandwidth': BANDWIDTH,
        # For the files that are sent before QEMU begins.
        'vol_upload_migration_bandwidth': 1,
        # Their copy would go on when the link is there again.
        'vol_upload_migration_reconnect_timeout': 0}})

    def begin(self, when: str) -> None:
        """Begin a live migration, and return at a stage of it."""
        self.last = self.beats()[-1]
        self.start_live_migration()
        reached = {SENDING: self._sends, COPYING: self._copies,
                   MEMORY: self._copies_memory}[when]
        daemons.wait_for(f'the stage {when}', reached, 180, poll=0.05)
        self.when = when
        self.broken_at = time.monotonic()

    def _copy(self) -> pathlib.Path:
        return self.destination.path(f'{servers.POOL}/{self.server.id}_disk')

    def _sends(self) -> bool:
        return self._copy().exists()

    def _copies(self) -> bool:
        return self._sends() and (
            self._copy().stat().st_blocks * 512 > 16 * 1024 ** 2)

    def _copies_memory(self) -> bool:
        """Whether QEMU has the disks in sync, and goes on with memory."""
        said = self.source.run(
            ['virsh', 'domjobinfo', self.server.id], check=False).stdout
        return re.search('Memory processed: +[1-9]', said) is not None

    def assert_failed(self, fault: str, *statuses: str,
                      outcome: str = fault_table.AT_SOURCE) -> None:
        """The live migration ends, and the server is where it was.

        :param statuses: of the migration that are expected
        """
        daemons.wait_for('the end of the live migration', lambda: (
            self.migration_status() in (statuses or ('error', 'failed'))),
            300, poll=0.5)
        self.record(fault, outcome)
        self.assert_as_before(self.last)

    def record(self, fault: str, outcome: str) -> None:
        fault_table.record_live(
            fault, self.when, outcome, time.monotonic() - self.broken_at)

    # Each of these happens once the stage is reached.

    def is_aborted(self) -> None:
        self._abort()
        self.assert_failed('it is aborted', 'cancelled', 'error', 'failed')

    def _abort(self) -> None:
        migration, = self.server.compute.server_migrations(self.server.id)
        self.server.compute.abort_server_migration(migration, self.server.id)

    def qemu_is_killed(self) -> None:
        os.kill(self._qemu(incoming=True), signal.SIGKILL)
        self.assert_failed('QEMU of the destination is killed')

    def _qemu(self, incoming: bool) -> int:
        """The pid of the QEMU that the server moves to, or from."""
        for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                arguments = path.read_bytes().decode().split('\0')
                if self.server.id in arguments and incoming == (
                        '-incoming' in arguments):
                    return int(path.parent.name)
        raise AssertionError('no QEMU has the server')

    def libvirtd_is_killed(self) -> None:
        self.addCleanup(self.bring_up, self.destination)
        self.destination.stop_libvirtd(signal.SIGKILL)
        self.destination.start_libvirtd()
        self.assert_failed('libvirtd of the destination is killed and started')
        self.cloud.wait_computes()

    def host_goes_down(self) -> None:
        self.take_down(self.destination)
        # libvirt may need three minutes to know.
        self._wait_or_end(300)
        self.bring_up(self.destination)
        self.assert_failed('host of the destination is down, and up again',
                           'cancelled', 'error', 'failed',
                           outcome=fault_table.CLEARED)
        self.cloud.wait_computes()

    def link_is_cut(self) -> None:
        self.addCleanup(self.destination.link, True)
        self.destination.link(False)
        # QEMU does not know before the link is there again.
        with contextlib.suppress(daemons.Failed):
            self.wait_failed(CUT_SECONDS)
        self.destination.link(True)
        self._wait_or_end(CUT_SECONDS)
        self.assert_failed('link is cut', 'cancelled', 'error', 'failed',
                           outcome=fault_table.CLEARED)
        self.cloud.wait_computes()

    def _wait_or_end(self, seconds: float) -> None:
        """Wait until the source knows, or do what the documentation says."""
        try:
            self.wait_failed(seconds)
        except daemons.Failed:
            self._abort()
            self.source.run([
                'ss', '--kill', '--tcp', 'dst', self.destination.address,
                'dport', '>=', ':49152', 'dport', '<=', ':49215'])

    def wait_failed(self, seconds: float) -> None:
        """Wait until the source knows."""
        daemons.wait_for('the source to know', lambda: (
            self.migration_status() in ('error', 'failed')), seconds, poll=0.5)

    def guest_powers_off(self) -> None:
        """Its only disks are here, though its domain is off.

        Not while QEMU copies: libvirt 9.0 then never ends the migration.
        """
        os.kill(self._qemu(incoming=False), signal.SIGTERM)
        self.wait_failed(300)
        self.server.wait('SHUTOFF')
        self.record('guest powers off', 'at the source, off, nothing at the '
                    'destination')
        self.assertEqual(base.SOURCE, self.server.host)
        self.assert_cleared()
        self.server.start()
        self.wait_beats(BEATS)

    def server_is_deleted(self) -> None:
        self.server.delete()
        for host in (base.SOURCE, base.DESTINATION):
            daemons.wait_for(f'{host} to be clean', lambda: (
                not self.server.disks(host)), seconds=60, poll=0.5)
        self.record('server is deleted', 'nothing on either host')


class TestLiveFault(LiveFaultTestCase):
    """While QEMU copies."""

    def before_boot(self):
        """Have a disk that takes time to copy."""
        self.server.stop()
        self.source.run(
            ['qemu-io', '-f', 'qcow2', '-c', f'write -P 7 512M {NOISE}',
             f'{servers.POOL}/{self.server.id}_disk'], user='nova')
        self.server.start()

    def test_server_runs_on(self):
        for fault in (self.libvirtd_is_killed, self.link_is_cut,
                      self.is_aborted, self.qemu_is_killed,
                      self.host_goes_down):
            for when in COPYING, MEMORY:
                self.begin(when)
                fault()
        self.server.live_migrate(base.DESTINATION)
        self.assert_no_disks(self.server, base.SOURCE)

    def test_server_is_deleted(self):
        self.begin(COPYING)
        self.server_is_deleted()

    def test_nova_compute_of_the_destination_ends(self):
        self.begin(COPYING)
        self.kill_compute(base.DESTINATION)
        daemons.wait_for('the domain on the destination to run', lambda: (
            'running' in self.destination.run(
                ['virsh', 'domstate', self.server.id],
                check=False).stdout), 180, poll=1)
        daemons.wait_for('the source to be done', lambda: (
            not self.server.disks(base.SOURCE)), 180, poll=1)
        self.start_compute(base.DESTINATION)
        self.cloud.wait_computes()
        daemons.wait_for('the claim to end', lambda: (
            '_incoming' not in str(self.server.disks(base.DESTINATION))),
            poll=1)
        self.record('nova-compute of the destination is killed and started',
                    fault_table.MOVED)
        self.assertEqual(base.DESTINATION, self.server.host)


class TestLiveFaultBefore(LiveFaultTestCase):
    """While the source sends the base image that Glance has lost."""

    def before_boot(self):
        images = self.cloud.connection().image
        images.delete_image(images.find_image(IMAGE))

    def test_server_runs_on_or_is_deleted(self):
        for fault in (self.is_aborted, self.host_goes_down, self.link_is_cut,
                      self.libvirtd_is_killed, self.guest_powers_off,
                      self.server_is_deleted):
            self.begin(SENDING)
            fault()


class TestLiveNativeTLS(LiveTestCase):
    """QEMU encrypts what it sends."""

    options = cloud.config.merge(
        TLS, {'libvirt': {'live_migration_with_native_tls': True}})

    def setUp(self):
        super().setUp()
        for host in self.cloud.lab.hosts:
            self._give_qemu_certificates(host)

    def _give_qemu_certificates(self, host) -> None:
        directory = host.path('/etc/pki/qemu')
        self.addCleanup(shutil.rmtree, directory)
        directory.mkdir()
        shutil.copy(host.path('/etc/pki/CA/cacert.pem'),
                    directory / 'ca-cert.pem')
        for side in ('server', 'client'):
            shutil.copy(host.certificate(side),
                        directory / f'{side}-cert.pem')
            key = directory / f'{side}-key.pem'
            shutil.copy(host.path(f'/etc/pki/libvirt/private/{side}key.pem'),
                        key)
            key.chmod(0o644)

    def test_it_moves(self):
        last = self.beats()[-1]
        self.server.live_migrate(base.DESTINATION)
        self.assert_never_noticed(last)
        self.assert_in_place(TestLive.after)
        self.assert_all_written(2)
