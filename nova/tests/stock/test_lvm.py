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

"""Servers with their disks in volume groups of LVM, on stock hosts."""

import atexit
import base64
import concurrent.futures
import functools
from pathlib import Path
import re

from oslo_utils import units

from nova.tests.stock import base
from nova.tests.stock import compute
from nova.tests import storage_contract

from tools.lab import image

GROUP = 'servers'
DEVICE = '/dev/vdb'
CACHE = '/var/lib/nova/instances/_base'
CONTRACT = '/root/contract'
OPTIONS = {
    # Nova's default needs a package that stock hosts do not have.
    'DEFAULT': {'default_ephemeral_format': 'ext4'},
    'libvirt': {
        'use_storage_pools': 'False', 'vol_upload_migration_legacy': 'True',
        'images_type': 'lvm', 'images_volume_group': GROUP}}
# QEMU asks of any device whether it has zones. libvirt's profile for AppArmor
# does not let it, and nothing comes of that.
HARMLESS = re.compile(r'name="/sys/devices/virtual/block/dm-\d+/queue/zoned"')
# Content of a guest's disk: the next owner of the space must not read it.
SECRET = 'the-secret-of-a-guest-'


@functools.cache
def get_computes():
    """The drivers of this module, one on each stock host.

    The first host's may read the devices, as a member of the group "disk". It
    copies them while guests run.
    """
    machines = base.get_machines()
    machines[0].run(['usermod', '--append', '--groups', 'disk', 'nova'])
    for each in machines:
        each.run_as_root(
            f'vgs {GROUP} 2> /dev/null || vgcreate -q {GROUP} {DEVICE}')
        each.write(base.NOVA_CONF, base.nova_conf(each, OPTIONS), 0o640,
                   'nova')
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            computes = list(pool.map(base.Compute.on_machine, machines))
    finally:
        for each in machines:
            each.write(base.NOVA_CONF, base.nova_conf(each), 0o640, 'nova')
    for each in computes:
        atexit.register(each.stop)
    return computes


class LvmTestCase(base.CountingMixin, base.StockTestCase):

    def setUp(self):
        super().setUp()
        self.here, self.there = get_computes()
        self.let_guests_count()
        self.describe(ephemerals=[], root_gb=0, swap=0)
        for each in self.machines:
            self.forget_images(each)
            self.addCleanup(self.forget_images, each)

    def assert_nothing_denied(self):
        for each in self.machines:
            self.assertEqual([], [
                line for line in each.denials()
                if line not in self.denied[each] and
                not HARMLESS.search(line)])

    def describe(self, **server):
        for each in self.here, self.there:
            each.call('describe', **server)

    @staticmethod
    def forget_images(of):
        """The image cache has the image as other tests know it."""
        of.run(['find', CACHE, '-type', 'f', '-delete'], check=False)

    def volumes(self, of, uuid):
        """Bytes of each volume of a server on a host, by disk."""
        said = of.run(['lvs', '--noheadings', '--nosuffix', '--units', 'b',
                       '--options', 'lv_name,lv_size', GROUP]).stdout
        rows = [line.split() for line in said.splitlines()]
        return {name.partition('_')[2]: int(size) for name, size in rows
                if name.startswith(uuid)}

    @staticmethod
    def path(uuid, disk='disk'):
        return f'/dev/{GROUP}/{uuid}_{disk}'

    def checksum(self, of, path, start=0):
        """The digest of a device from a byte on."""
        return of.run_as_root(f'tail -c +{start + 1} {path} | sha256sum')

    def write(self, of, path, text):
        """Write to the start of a device, past the page cache."""
        data = base64.b64encode(text.ljust(units.Ki, b'\0')).decode()
        of.run_as_root(f'echo {data} | base64 -d | dd of={path} '
                       'conv=fsync,notrunc status=none')

    def has_secret(self, of):
        """Whether anything on the disk of a host tells the secret."""
        of.run(['blockdev', '--flushbufs', DEVICE])
        # grep takes a line into memory, and old data has no end of line.
        code = of.run(
            ['sh', '-c', f"tr '\\0\\245' '\\n\\n' < {DEVICE} | "
             f'LC_ALL=C grep -qa {SECRET}'], check=False).returncode
        self.assertIn(code, (0, 1))
        return code == 0

    def leave_old_data(self, of, extents):
        """Let others have had the room that is taken next."""
        of.run_as_root(
            f'lvcreate -q -W n -n old -l {extents} {GROUP}\n'
            f"tr '\\0' '\\245' < /dev/zero | head -c {extents * 4}M | "
            f'dd of=/dev/{GROUP}/old bs=1M conv=fsync status=none\n'
            f'lvremove -q -f {GROUP}/old')

    def resize(self, uuid, source, target, root_gb):
        """Resize a server to another host, where it runs then."""
        disk_info = source.call('migrate', uuid=uuid, root_gb=root_gb,
                                dest=target.host.address)
        self.addCleanup(target.call, 'destroy', uuid=uuid)
        self.describe(ephemerals=[], root_gb=root_gb, swap=0)
        self.assertEqual('running', target.call(
            'finish', uuid=uuid, disk_info=disk_info))

    def assert_goes_on(self, count, of, uuid):
        """The guest counts on from where it was."""
        now = self.count(of, uuid)
        self.assertGreater(now, count)
        return now

    def check_refused(self, uuid, *texts):
        """A migration is refused, and the guest goes on all the time."""
        before = self.source.run(['virsh', 'domid', uuid]).stdout
        count = self.count(self.source, uuid)
        error = self.assertRaises(
            AssertionError, self.migrate, uuid, self.here, self.there)
        for text in texts:
            self.assertIn(text, str(error))
        self.assertEqual(
            before, self.source.run(['virsh', 'domid', uuid]).stdout)
        self.assertGreater(self.count(self.source, uuid), count)
        self.assertEqual([], self.files(self.destination, uuid))


class TestLvm(LvmTestCase):

    def test_every_disk_goes_there_and_back_and_a_revert_leads_back(self):
        self.describe(ephemerals=[1], root_gb=0, swap=16)
        self.leave_old_data(self.destination, 300)
        uuid = self.spawn(self.here)
        sizes = {'disk': 16 * units.Mi, 'disk.eph0': units.Gi,
                 'disk.swap': 16 * units.Mi}
        self.assertEqual(sizes, self.volumes(self.source, uuid))
        # A guest may write the header of an image: no host may probe it.
        self.write(self.source, self.path(uuid, 'disk.eph0'),
                   storage_contract.HOSTILE + SECRET.encode())
        drive = f'/var/lib/nova/instances/{uuid}/disk.config'
        self.source.run(['sh', '-c', f'echo drive > {drive}'], user='nova')
        before = self.checksum(self.source, self.path(uuid, 'disk.eph0'))
        count = self.count(self.source, uuid)
        self.assertTrue(self.has_secret(self.source))
        self.assertTrue(self.may_read(self.source, uuid))

        self.migrate(uuid, self.here, self.there)
        self.assertEqual(sizes, self.volumes(self.destination, uuid))
        self.assertEqual(before, self.checksum(
            self.destination, self.path(uuid, 'disk.eph0')))
        self.assertEqual('drive\n', self.destination.read(drive))
        # The guest has read from its disk what it wrote on the other host.
        count = self.assert_goes_on(count, self.destination, uuid)
        self.assert_raw(self.destination, uuid)

        self.assertEqual(sizes, self.volumes(self.source, uuid))
        self.here.call('confirm', uuid=uuid)
        self.assertEqual({}, self.volumes(self.source, uuid))
        self.assertEqual([], self.files(self.source, uuid))
        self.assertFalse(self.has_secret(self.source))

        # There the disks are read through libvirt.
        self.assertFalse(self.may_read(self.destination, uuid))
        self.migrate(uuid, self.there, self.here)
        self.assertEqual(before, self.checksum(
            self.source, self.path(uuid, 'disk.eph0')))
        self.assert_goes_on(count, self.source, uuid)
        self.here.call('destroy', uuid=uuid)
        self.assertEqual({}, self.volumes(self.source, uuid))
        self.assertFalse(self.has_secret(self.source))
        self.assertEqual('running', self.there.call(
            'finish_revert', uuid=uuid))
        self.assertEqual(sizes, self.volumes(self.destination, uuid))
        self.assertEqual(before, self.checksum(
            self.destination, self.path(uuid, 'disk.eph0')))
        self.assert_goes_on(count, self.destination, uuid)

    def may_read(self, of, uuid):
        """Whether nova-compute on a host may read the disks of a server."""
        return of.run(['test', '-r', self.path(uuid)], user='nova',
                      check=False).returncode == 0

    def assert_raw(self, of, uuid):
        """Nothing has looked into a disk with the header of an image."""
        said = of.run_as_root(
            f'virsh dumpxml {uuid} | grep -c "type=.raw."\n'
            f'virsh pool-refresh nova-group-{GROUP}\n'
            'virsh vol-dumpxml --pool '
            f'nova-group-{GROUP} {uuid}_disk.eph0\n')
        self.assertEqual('3', said.splitlines()[0])
        for text in 'qcow2', 'backingStore', 'kmsg':
            self.assertNotIn(text, said)

    def test_resize_grows_the_disk_with_zeros(self):
        self.leave_old_data(self.destination, 300)
        uuid = self.spawn(self.here)
        count = self.count(self.source, uuid)
        before = self.checksum(self.source, self.path(uuid), units.Mi)

        self.resize(uuid, self.here, self.there, 1)
        self.assertEqual({'disk': units.Gi},
                         self.volumes(self.destination, uuid))
        self.assertGreater(self.count(self.destination, uuid), count)
        self.assertEqual(before, self.destination.run_as_root(
            f'head -c 16M {self.path(uuid)} | tail -c 15M | sha256sum'))
        self.assertEqual('0', self.destination.run_as_root(
            f'tail -c +{16 * units.Mi + 1} {self.path(uuid)} | '
            "tr -d '\\0' | wc -c").strip())
        self.here.call('confirm', uuid=uuid)
        self.assertEqual({}, self.volumes(self.source, uuid))

    def test_group_stays_active_without_a_guest_that_runs(self):
        uuid = self.spawn(self.here)
        self.here.call('stop', uuid=uuid)
        self.migrate(uuid, self.here, self.there)
        self.there.call('stop', uuid=uuid)
        for each in self.machines:
            each.run(['test', '-b', self.path(uuid)])
        self.here.call('confirm', uuid=uuid)


class TestLvmLife(LvmTestCase):
    """Operations on a server other than migrations."""

    def setUp(self):
        super().setUp()
        self.uuid = self.spawn(self.here)
        self.last = self.count(self.source, self.uuid)

    def act(self, name, state='running', **arguments):
        self.assertEqual(
            state, self.here.call(name, uuid=self.uuid, **arguments))

    def assert_counts_on(self):
        """The guest runs, and counts on from where it was."""
        self.last = self.assert_goes_on(self.last, self.source, self.uuid)

    def test_stop_start_reboot_rescue_suspend(self):
        self.here.call('stop', uuid=self.uuid)
        self.act('start')
        self.assert_counts_on()
        self.act('hard_reboot')
        self.assert_counts_on()
        self.act('suspend', 'shutdown')
        self.act('resume')
        self.assert_counts_on()
        self.act('rescue')
        self.assertEqual({'disk', 'disk.rescue'},
                         set(self.volumes(self.source, self.uuid)))
        self.act('unrescue')
        self.assertEqual({'disk'}, set(self.volumes(self.source, self.uuid)))
        self.assert_counts_on()

    def test_snapshot_rebuild_shelve(self):
        self.act('snapshot')
        self.assert_counts_on()
        self.here.call('stop', uuid=self.uuid)
        self.act('snapshot', 'shutdown')
        # A rebuild, as the compute manager does it.
        self.here.call('destroy', uuid=self.uuid)
        self.describe(ephemerals=[], root_gb=0, swap=0,
                      image=compute.SNAPSHOT_ID)
        self.act('spawn')
        self.assert_counts_on()
        # Shelved: nothing of the server stays.
        self.act('snapshot')
        self.here.call('destroy', uuid=self.uuid)
        self.assertEqual({}, self.volumes(self.source, self.uuid))
        self.assertEqual([], self.files(self.source, self.uuid))
        self.forget_images(self.source)
        self.act('spawn')
        self.assert_counts_on()

    def test_evacuate(self):
        self.source.run(['virsh', 'destroy', self.uuid])
        self.addCleanup(self.there.call, 'destroy', uuid=self.uuid)
        self.assertEqual('running', self.there.call(
            'evacuate', uuid=self.uuid, source=self.source.name))
        self.count(self.destination, self.uuid)
        # nova-compute of the source does it when it is back.
        self.here.call('destroy', uuid=self.uuid)
        self.assertEqual({}, self.volumes(self.source, self.uuid))
        self.assertEqual([], self.files(self.source, self.uuid))
        self.assertEqual({'disk'}, set(
            self.volumes(self.destination, self.uuid)))


class TestLvmRefused(LvmTestCase):

    def test_live_migration(self):
        uuid = self.spawn(self.here)
        data = self.there.call(
            'check_destination', uuid=uuid, source=self.source.name,
            resources=self.here.call('resources'))
        error = self.assertRaises(
            AssertionError, self.here.call, 'check_source', uuid=uuid,
            data=data)
        self.there.call('end_check', data=data)
        self.assertIn('cannot be live migrated', str(error))

    def test_resize_on_the_same_host(self):
        uuid = self.spawn(self.here)
        error = self.assertRaises(
            AssertionError, self.here.call, 'migrate', uuid=uuid, root_gb=1,
            dest=self.source.address)
        self.assertIn('not supported for LVM', str(error))
        self.assertEqual({'disk': 16 * units.Mi},
                         self.volumes(self.source, uuid))

    def test_no_room_in_the_group(self):
        uuid = self.spawn(self.here)
        self.addCleanup(self.destination.run_as_root,
                        f'lvremove -q -f {GROUP}/filler')
        self.destination.run_as_root(
            f'lvcreate -q -y -W n -n filler -l 100%FREE {GROUP}\n'
            f'lvreduce -q -f -l -3 {GROUP}/filler')
        self.check_refused(uuid, f'volume group {GROUP}',
                           f'{12 * units.Mi} bytes available')
        self.assertEqual({}, self.volumes(self.destination, uuid))

    def test_name_that_is_taken(self):
        uuid = self.spawn(self.here)
        name = f'{uuid}_disk'
        self.addCleanup(self.destination.run_as_root,
                        f'lvremove -q -f {GROUP}/{name}')
        self.destination.run_as_root(
            f'lvcreate -q -y -W n -n {name} -l 1 {GROUP}')
        self.write(self.destination, self.path(uuid), b'precious')
        self.check_refused(uuid, f'{name} is in the way')
        self.assertEqual('precious', self.destination.run_as_root(
            f'head -c 8 {self.path(uuid)}'))

    def test_host_that_keeps_disks_elsewhere(self):
        uuid = self.spawn(self.here)
        mark = f'/var/lib/nova/instances/nova-group-{GROUP}'
        self.destination.run(['mv', mark, mark + '.away'])
        self.addCleanup(self.destination.run, ['mv', mark + '.away', mark])
        self.check_refused(uuid, 'does not take servers into volume group')


class TestLvmContract(base.StockTestCase):

    def test_libvirt_behaves_as_its_fake_does(self):
        tests = Path(storage_contract.__file__).parent
        self.source.copy(tests, ['storage_contract.py'], CONTRACT)
        self.source.copy(tests / 'stock', ['contract.py'], CONTRACT)
        said = self.source.run(
            [f'{image.VENV}/bin/python', f'{CONTRACT}/contract.py'],
            check=False, timeout=900)
        self.assertEqual(0, said.returncode, said.stdout + said.stderr)
