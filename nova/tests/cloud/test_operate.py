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
"""What operators do and see: the check before, progress, the limit.

The server that moves has a disk that a hostile guest made look like another.
"""

import random
import re

from lxml import etree
from oslo_serialization import jsonutils
from oslo_utils import units
import sqlalchemy

from nova.tests.cloud import base

from tools import daemons
from tools import servers

# MiB per second.
RATE = 6
# Besides what the guest has on it: random data in several places of its root
# disk, so that a copy takes about 15 seconds and gets on all the time.
PIECES = [offset * units.Mi for offset in range(150, 1000, 170)]
PIECE_BYTES = 16 * units.Mi

COPYING = re.compile(
    r'Copying to (\S+): (\d+) %, (\d+) of (\d+) bytes, (\d+) on the wire, '
    r'[\d.]+ MiB/s, time left: \d+ s')
COPIED = re.compile(
    r'Copied (\S+) to \S+: (\d+) bytes, (\d+) on the wire, ([\d.]+) s, '
    r'([\d.]+) MiB/s')


class TestOperate(base.CloudTestCase):
    """Full images, and a limit on what a host may send."""

    options = {'DEFAULT': {'use_cow_images': False},
               'libvirt': {'vol_upload_migration_bandwidth': RATE}}

    # ---- nova-storage-migrate check

    def check(self, *argv: str, **kwargs) -> str:
        """Run the installed command as nova of the source, to succeed."""
        program = base.cloud.venv.program('nova-storage-migrate')
        return self.source.run(
            [program, 'check', *argv], user='nova', **kwargs).stdout

    def test_check_of_hosts(self):
        lines = self.check(self.destination.address).splitlines()
        self.assertGreater(len(lines), 10)
        self.assertEqual({'ok'}, {line.split()[0] for line in lines})
        self.assertIn('16 MiB written at', lines[-1])

        findings = jsonutils.loads(self.check('--json', '--all', '-', input=(
            f'{base.SOURCE}\n{base.DESTINATION}  # the other\n')))
        self.assertEqual({'ok'}, {each['status'] for each in findings})
        self.assertEqual(len(lines), len(findings))
        self.assertEqual({base.SOURCE, base.DESTINATION},
                         {each['host'] for each in findings})
        self.assert_hosts_are_empty()

    # ---- a migration

    def test_progress_and_limit(self):
        server = self.create_booted(flavor='small-ephemeral')
        server.stop()
        self.fill(server)
        self.lengths = {name: path.stat().st_size for name, path
                        in server.disks(base.SOURCE).items()}
        size = base.log_size(self.cloud, base.SOURCE)
        percents, figures = self.watch_migration(server)
        log = base.read_log(self.cloud, base.SOURCE, size)
        self.assert_progress(percents)
        self.assert_figures(figures, self.figures(server))
        self.assert_log(log)
        self.assert_rate(log)
        server.confirm('SHUTOFF')
        server.start()
        self.assert_counts(server, vda=2, vdb=2)
        self.assert_full_images(server)

    def fill(self, server: servers.Server) -> None:
        """Write random data behind the end of what QEMU uses of the image."""
        noise = random.Random(0)
        with server.disks(base.SOURCE)['disk'].open('r+b') as disk:
            for offset in PIECES:
                disk.seek(offset)
                disk.write(noise.randbytes(PIECE_BYTES))

    def watch_migration(
        self, server: servers.Server,
    ) -> tuple[list[int], list[tuple[int, ...]]]:
        """Migrate; return what is seen of it meanwhile, without repetitions.

        :returns: the per cents of the server, and the figures of the record
        """
        percents: list[int] = []
        figures: list[tuple[int, ...]] = []

        def over() -> bool:
            seen = server.get()
            percent = seen.progress or 0
            if seen.status == 'RESIZE' and percent not in percents:
                percents.append(percent)
            recorded = self.figures(server)
            if recorded and recorded not in figures:
                figures.append(recorded)
            return not seen.task_state

        server.compute.migrate_server(server.id, host=base.DESTINATION)
        daemons.wait_for(f'the migration of {server.id}', over, 180, poll=0.5)
        self.assertEqual('VERIFY_RESIZE', server.status)
        return percents, figures

    def figures(self, server: servers.Server) -> tuple[int, ...] | None:
        """The disk figures of the only migration, which no API shows.

        :returns: total, processed and remaining bytes, once they are there
        """
        engine = sqlalchemy.create_engine(self.cloud.site.database('nova'))
        with engine.connect() as connection:
            found = connection.execute(sqlalchemy.text(
                'SELECT disk_total, disk_processed, disk_remaining '
                'FROM migrations WHERE instance_uuid = :uuid'),
                {'uuid': server.id}).one_or_none()
        engine.dispose()
        return tuple(found) if found and None not in found else None

    def assert_progress(self, percents: list[int]) -> None:
        self.assertEqual(sorted(percents), percents)
        between = [each for each in percents if 0 < each < 100]
        self.assertGreaterEqual(len(between), 2, percents)

    def assert_figures(self, figures: list[tuple[int, ...]],
                       last: tuple[int, ...] | None) -> None:
        # With the record of formats, and what else there is.
        total = last[0]
        self.assertGreater(total, sum(self.lengths.values()))
        self.assertLess(total - sum(self.lengths.values()), units.Mi)
        self.assertEqual((total, total, 0), last)
        for each in figures:
            self.assertEqual((total, total), (each[0], each[1] + each[2]))
        processed = [each[1] for each in figures]
        self.assertEqual(sorted(processed), processed)
        between = [each for each in processed if 0 < each < total]
        self.assertGreaterEqual(len(between), 2, processed)

    def assert_log(self, log: str) -> None:
        reports = COPYING.findall(log)
        self.assertGreaterEqual(len(reports), 2, log)
        for host, percent, done, total, wire in reports:
            self.assertEqual(self.destination.address, host)
            self.assertEqual(int(percent), int(done) * 100 // int(total))
            self.assertLess(int(wire), int(done))

    def assert_rate(self, log: str) -> None:
        """Check that the limit is kept to within 5 per cent."""
        copied = COPIED.findall(log)
        self.assertEqual(['disk', 'disk.eph0', ''], [
            name.partition('_')[2] for name, *_figures in copied])
        _name, length, wire, seconds, rate = copied[0]
        self.assertEqual(self.lengths['disk'], int(length))
        self.assertGreater(int(wire), len(PIECES) * PIECE_BYTES)
        self.assertAlmostEqual(RATE, float(rate), delta=0.05 * RATE)
        self.assertAlmostEqual(RATE, int(wire) / units.Mi / float(seconds),
                               delta=0.05 * RATE)

    def assert_full_images(self, server: servers.Server) -> None:
        """Check what QEMU was told of the disks."""
        domain = etree.fromstring(self.destination.run(
            ['virsh', 'dumpxml', server.id]).stdout)
        disks = domain.findall("devices/disk[@device='disk']")
        self.assertEqual(2, len(disks))
        for disk in disks:
            self.assertEqual('qcow2', disk.find('driver').get('type'))
            self.assertEqual([], disk.findall('backingStore/*'))
