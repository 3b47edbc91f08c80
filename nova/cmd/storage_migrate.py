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

"""Check whether servers can be migrated to other hosts over libvirt."""

import argparse
import collections.abc
import contextlib
import fcntl
import math
import os
import signal
import sys
import termios

from oslo_serialization import jsonutils
from oslo_utils import units

import nova.conf
from nova.conf import storage_migrate as options  # noqa: F401 (registers)
from nova import config
from nova.virt.libvirt.storage import check
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import place
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt import storage_migrate

CONF = nova.conf.CONF

EPILOG = """\
Each check prints one line: ok, warn (migrations work, but the problem should
be fixed) or fail (migrations do not work), with the remedy. The exit status
is 1 if any check failed, 2 for wrong usage, and 0 otherwise. The command
leaves nothing on the other hosts. Run it as the user of nova-compute.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    hosts = arguments.host + _read_hosts(arguments.all)
    _forbid_prompts()
    _configure(arguments)
    threads.run_event_loop()
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(1))
    findings = []
    with contextlib.closing(_check(hosts, arguments.size)) as found:
        for finding in found:
            findings.append(finding)
            if not arguments.json:
                print(finding, flush=True)
    if arguments.json:
        print(jsonutils.dumps([vars(each) for each in findings], indent=2))
    return int(any(each.status == check.FAIL for each in findings))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='nova-storage-migrate', description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        'check', help='check other hosts', description=__doc__,
        epilog=EPILOG)
    command.add_argument(
        'host', nargs='*', help='address of another compute host, as in its '
        '[libvirt]migration_inbound_addr, which is my_ip by default')
    command.add_argument(
        '--all', metavar='FILE', type=argparse.FileType(), help='also check '
        'the hosts in FILE, one per line; - reads the standard input. This '
        'host is skipped')
    command.add_argument(
        '--size', metavar='GIB', type=_size, default=0, help='also check '
        'that there is room for a disk of this size in GiB, and estimate how '
        'long its copy takes')
    command.add_argument(
        '--json', action='store_true', help='print a JSON list of objects '
        'with host, status, what, finding and remedy')
    command.add_argument(
        '--config-file', action='append', default=[],
        help='configuration file, as for nova-compute')
    command.add_argument(
        '--config-dir', action='append', default=[],
        help='configuration directory, as for nova-compute')
    arguments = parser.parse_args(argv)
    if not arguments.host and not arguments.all:
        command.error('name a host, or a file with --all')
    return arguments


def _size(text: str) -> int:
    size = float(text)
    if not 0 <= size < math.inf:
        raise ValueError(text)
    return int(size * units.Gi)


def _read_hosts(
    lines: collections.abc.Iterable[str] | None,
) -> list[str]:
    """Return the hosts in a file, without empty lines and comments."""
    found = [line.partition('#')[0].strip() for line in lines or ()]
    return [host for host in found if host]


def _forbid_prompts() -> None:
    """Prevent programs that libvirt starts from prompting for input."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # ssh prompts on the controlling terminal, whatever its standard input is.
    with contextlib.suppress(OSError), open('/dev/tty') as terminal:
        fcntl.ioctl(terminal, termios.TIOCNOTTY)


def _configure(arguments: argparse.Namespace) -> None:
    argv = ['nova-compute']
    for name in 'config_file', 'config_dir':
        for path in getattr(arguments, name):
            argv += [f'--{name.replace("_", "-")}', path]
    # oslo.config reads nova-compute.conf in a program of that name. Nova 31
    # passes no other name on.
    own, sys.argv[0] = sys.argv[0], argv[0]
    try:
        config.parse_args(argv, configure_db=False, init_rpc=False)
    finally:
        sys.argv[0] = own


def _check(
    hosts: list[str], size: int,
) -> collections.abc.Generator[check.Finding, None, None]:
    is_set = tuple(name for name in ('use_storage_pools',
                                     'vol_upload_migration')
                   if CONF.libvirt[name])
    settings = check.Settings(
        uri=storage_migrate.LibvirtDriver._uri(),
        pool=(None if is_set == ('vol_upload_migration',) else
              CONF.libvirt.disks_pool),
        pool_path=(CONF.libvirt.disks_pool_path
                   if place.is_configured() else None),
        instances_path=CONF.instances_path, options=is_set,
        bandwidth=CONF.libvirt.vol_upload_migration_bandwidth * units.Mi,
        group_path=(layout.group_path(CONF.libvirt.images_volume_group)
                    if storage_migrate.takes_logical_volumes() else ''))
    ours = {CONF.host, CONF.my_ip, CONF.libvirt.migration_inbound_addr}
    source = check.Source(CONF.host, settings)
    with contextlib.closing(source):
        yield from source.run()
        for host in hosts:
            if host not in ours:
                yield from _check_destination(host, source, settings, size)


def _check_destination(
    host: str, source: check.Source, settings: check.Settings, size: int,
) -> collections.abc.Iterator[check.Finding]:
    try:
        uri = storage_migrate.destination_uri(host)
    except errors.StorageError as error:
        yield check.Finding(host, check.FAIL, 'uri', error.reason,
                            error.remedy.rstrip('.'))
        return
    yield from check.Destination(host, uri, source, settings, size).run()


if __name__ == '__main__':
    sys.exit(main())
