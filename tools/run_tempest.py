#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Tempest's tests of servers, on the small cloud.

Brings the cloud up with disks in storage pools and copies over libvirt, runs
the tests that suites/tempest selects, and looks at the hosts afterwards: no
program of ssh may have been tried, and nothing may be left of any server. A
lab that is up already is used and kept.
"""

import argparse
from collections.abc import Iterator
import contextlib
import functools
from pathlib import Path
import re
import shutil
import subprocess
import sys

from tools import cloud as cloud_module
from tools import cloud_config as config
from tools import cloud_venv as venv
from tools import daemons
from tools.demonstration import COPIED
from tools import lab as lab_module
from tools import servers
from tools import tripwire

# nova.conf of all hosts of the cloud.
OPTIONS = config.merge(cloud_module.STREAMS, cloud_module.LIVE)
SUITE = venv.REPOSITORY / 'suites/tempest'
# A server that is deleted while it is built goes after its deletion is over.
CLEAR_SECONDS = 60


class Tempest:
    """One run of Tempest, with its configuration, logs and results.

    :param program: Tempest's own, where it is installed
    :param directory: made anew, and kept afterwards
    """

    def __init__(self, cloud: cloud_module.Cloud, program: Path,
                 directory: Path):
        self.cloud = cloud
        self.program = program
        self.directory = directory
        self.workspace = directory / 'workspace'

    def prepare(self) -> None:
        """Make Tempest's workspace."""
        shutil.rmtree(self.directory, ignore_errors=True)
        etc = self.directory / 'etc'
        etc.mkdir(parents=True)
        (etc / 'tempest.conf').write_text(
            config.render(configuration(self.cloud)))
        # Told of no file, it would list the workspace in the home directory.
        subprocess.run(
            [self.program, 'init', '--config-dir', etc, '--workspace-path',
             self.directory / 'workspaces.yaml', self.workspace], check=True)

    def run(self, tests: list[str]) -> bool:
        """Run the tests of these names, or all selected; True if all pass."""
        selected = (['--regex', ' '.join(tests)] if tests else
                    ['--include-list', SUITE / 'include.txt'])
        done = subprocess.run(
            [self.program, 'run', '--serial', *selected,
             '--exclude-list', SUITE / 'exclude.txt',
             '--config-file', self.workspace / 'etc/tempest.conf'],
            cwd=self.workspace, stdin=subprocess.DEVNULL)
        return done.returncode == 0

    def counts(self) -> dict[str, int]:
        """How many tests Passed, were Skipped, Failed, and so on."""
        said = subprocess.run(
            [self.program.with_name('stestr'), 'last'], cwd=self.workspace,
            stdout=subprocess.PIPE, text=True).stdout
        return {what: int(number) for what, number in re.findall(
            r'^ - ([A-Z][A-Za-z ]+): (\d+)$', said, re.MULTILINE)}

    def keep_logs(self) -> None:
        """Keep what every nova-compute logged, as the cloud's goes with it."""
        for host in self.cloud.lab.hosts:
            shutil.copy(self.cloud.log(host.name), self.directory)


def configuration(cloud: cloud_module.Cloud) -> config.Options:
    """tempest.conf, as far as it is not of the workspace."""
    connection = cloud.connection()
    image, alternative = (
        connection.image.find_image(name).id
        for name in ('guest', 'guest-qcow2'))
    flavor, larger = (connection.compute.find_flavor(name).id
                      for name in ('small', 'large'))
    return {
        'auth': {'admin_username': 'admin',
                 'admin_password': config.PASSWORD,
                 'admin_project_name': 'admin',
                 # The cloud has a network service, but no networks.
                 'create_isolated_networks': False},
        'identity': {'uri_v3': cloud.site.url('keystone', '/v3'),
                     'region': config.REGION},
        'service_available': {'cinder': False, 'swift': False,
                              'horizon': False},
        # A server has no address to be reached at.
        'validation': {'run_validation': False},
        'compute': {'image_ref': image, 'image_ref_alt': alternative,
                    'flavor_ref': flavor, 'flavor_ref_alt': larger,
                    'min_compute_nodes': len(cloud.lab.hosts),
                    # No lower bound: before 2.37, a request without networks
                    # is one for a server without ports where there are none.
                    'max_microversion': 'latest'},
        'compute-feature-enabled': {
            'resize': True,
            'cold_migration': True,
            'rescue': True,
            'stable_rescue': True,
            'shelve': True,
            'snapshot': True,
            'live_migration': True,
            'block_migration_for_live_migration': True,
            'live_migrate_back_and_forth': True,
            'vnc_console': False,
            'metadata_service': False,
        },
    }


def copies(cloud: cloud_module.Cloud) -> int:
    """How many disks every nova-compute has copied over libvirt so far."""
    return sum(len(COPIED.findall(cloud.log(host.name).read_text()))
               for host in cloud.lab.hosts)


def traces(wires: list[tripwire.Tripwire]) -> Iterator[str]:
    """What was tried with ssh, and what is left of servers."""
    for wire in wires:
        yield from wire.calls()
        yield from tripwire.ssh_traces(wire.host)
        with contextlib.suppress(daemons.Failed):
            daemons.wait_for('the end of all servers', functools.partial(
                is_empty, wire.host), CLEAR_SECONDS, poll=1)
        yield from servers.leftovers(wire.host)


def is_empty(host: lab_module.Host) -> bool:
    """Whether nothing is left of any server on a host."""
    return not servers.leftovers(host)


def run(tempest: Tempest, tests: list[str]) -> int:
    """Run the tests on a cloud that is up; returns the exit status."""
    cloud = tempest.cloud
    tempest.prepare()
    before = copies(cloud)
    with tripwire.laid(cloud.lab.hosts) as wires:
        passed = tempest.run(tests)
        wrong = list(traces(wires))
    copied = copies(cloud) - before
    counts = tempest.counts()
    if not passed:
        wrong.append(f'{counts.get("Failed", "all")} tests failed')
    if counts['Skipped']:
        wrong.append(f'{counts["Skipped"]} tests were skipped')
    if not (copied or tests):
        wrong.append('no disk was copied over libvirt')
    print(f'{counts["Passed"]} tests passed, {copied} disks were copied over '
          f'libvirt. Logs: {tempest.directory}')
    for what in wrong:
        print(f'WRONG: {what}')
    return 1 if wrong else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tempest', type=Path, required=True,
                        help="Tempest's program")
    parser.add_argument('--directory', type=Path, required=True,
                        help='for configuration, logs and results; '
                             'what is in it is deleted')
    parser.add_argument('tests', nargs='*',
                        help='run only tests whose names match one of these '
                             'regular expressions')
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """The command line."""
    args = parse(arguments)
    lab = lab_module.Lab()
    cloud = cloud_module.Cloud(lab, options=OPTIONS)
    tempest = Tempest(cloud, args.tempest, args.directory.absolute())
    kept = lab.is_up
    try:
        lab.up()
        cloud.up()
        try:
            return run(tempest, args.tests)
        finally:
            tempest.keep_logs()
    finally:
        if not kept:
            cloud.down()
            lab.down()


if __name__ == '__main__':
    venv.ensure()
    venv.reexec('run_tempest')
    sys.exit(main(sys.argv[1:]))
