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

"""The command line: tools/run lab up."""

import argparse
from collections.abc import Sequence
import os
import sys

from tools.lab import network
from tools import waiting


def status(lab: network.Lab) -> int:
    """Print one line per host; 0 if the lab is up."""
    print('%s: machine %s, bridge %s, %s' % (
        lab.directory, lab.address, lab.bridge,
        'up' if lab.is_up else 'not up'))
    for host in lab.hosts:
        print('%s %s: namespaces %s, libvirtd %s, sshd %s, nova uid %d' % (
            host.name, host.address, host.pid or 'none',
            host.libvirtd_pid or 'none',
            'running' if host.sshd_pids else 'none', host.nova_uid))
    return 0 if lab.is_up else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Several compute hosts.')
    parser.add_argument('--directory', default=network.DEFAULT,
                        help='state of the lab (default: %(default)s, or '
                             'NOVA_LAB_DIR)')
    commands = parser.add_subparsers(dest='action', required=True)
    up = commands.add_parser('up', help='make the hosts')
    up.add_argument('--hosts', type=int, help='how many (default: 2)')
    up.add_argument('--ssh', action='store_true',
                    help='with sshd and a key for nova in each')
    commands.add_parser('down', help='remove everything')
    commands.add_parser('status', help='what runs')
    run = commands.add_parser('exec', help='run a command in a host')
    run.add_argument('host')
    run.add_argument('--user', help='as this user (default: root)')
    run.add_argument('command', nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def execute_in(lab: network.Lab, args: argparse.Namespace) -> None:
    """Become the command that ``exec`` names."""
    host = lab.host(args.host)
    command = args.command
    if '--user' in command[:1]:  # argparse leaves it to the remainder
        args.user, command = command[1], command[2:]
    command = command[1:] if command[:1] == ['--'] else command
    argv = host.command(command or ['bash'], args.user)
    term = {'TERM': os.environ.get('TERM', 'dumb')}
    os.execvpe(argv[0], argv, host.environment(args.user, term))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        lab = network.Lab(args.directory, getattr(args, 'hosts', None))
        if args.action == 'down':
            lab.down()
            return 0
        if args.action == 'exec':
            execute_in(lab, args)
        if args.action == 'up':
            lab.up()
            if args.ssh:
                lab.ssh(True)
        return status(lab)
    except waiting.Failed as error:
        print('lab: %s' % error, file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
