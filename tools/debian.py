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

"""Debian packages: those that bindep.txt lists, installed where missing."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import re
import subprocess
import sys

BINDEP = Path(__file__).resolve().parent.parent / 'bindep.txt'
POLICY = Path('/usr/sbin/policy-rc.d')


def wanted() -> list[str]:
    """The packages of bindep.txt that are for Debian."""
    names = []
    for line in BINDEP.read_text().splitlines():
        found = re.match(r'([a-z0-9][a-z0-9.+-]+)\s*(?:\[(.*)\])?\s*$',
                         line.partition('#')[0])
        if found and '!platform:dpkg' not in (found[2] or ''):
            names.append(found[1])
    return names


def missing(names: list[str]) -> list[str]:
    """Those of the packages that are not installed."""
    asked = subprocess.run(
        ['dpkg-query', '--show', '--showformat',
         '${Package} ${db:Status-Status}\n', *names],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    there = {line.split()[0] for line in asked.stdout.splitlines()
             if line.endswith(' installed')}
    return [name for name in names if name not in there]


def install() -> list[str]:
    """Install what is missing, without starting any of its daemons.

    :returns: what was missing
    """
    names = missing(wanted())
    if names:
        with no_daemons():
            apt_get('update')
            apt_get('install', '--yes', '--no-install-recommends', *names)
    return names


def apt_get(*arguments: str) -> None:
    """Run apt-get; its output is shown only where it fails."""
    env = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive', 'RUNLEVEL': '1'}
    done = subprocess.run(['apt-get', '--quiet', *arguments], env=env,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise RuntimeError(f'apt-get {arguments[0]}: '
                           f'status {done.returncode}')


@contextlib.contextmanager
def no_daemons() -> Iterator[None]:
    """Keep packages from starting their daemons, as they would by default.

    MariaDB, RabbitMQ, libvirtd and sshd for the whole machine are not what
    anybody asked for: the lab starts its own.
    """
    if POLICY.exists():
        yield
        return
    POLICY.write_text('#!/bin/sh\nexit 101\n')
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
