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

"""The part of nova-compute that migrates, in the container of nova-compute.

It runs with the container's own Nova and nova.conf, as the user nova. Its
argument names a function; the function's arguments are JSON on standard
input, and what it returns is JSON on standard output.
"""

import os
import sys

from oslo_serialization import jsonutils

import nova.conf
from nova import config
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage import transfer
from nova.virt.libvirt import storage_migrate

CONF = nova.conf.CONF


def main() -> None:
    config.parse_args(['nova-compute'], configure_db=False, init_rpc=False)
    threads.run_event_loop()
    arguments = jsonutils.loads(sys.stdin.read())
    print(jsonutils.dumps(FUNCTIONS[sys.argv[1]](**arguments)))


def start() -> dict[str, str | int]:
    """Do what nova-compute does with the pool when it starts.

    :returns: the pool's directory
    """
    storage_migrate.LibvirtDriver(None)._init_disks_pool()
    return {'path': CONF.libvirt.disks_pool_path}


def make_disk(uuid: str, size: int) -> dict[str, str | int]:
    """Make a disk of a server as nova-compute does, in the pool's directory.

    :param size: bytes, all of which are random
    """
    path = os.path.join(CONF.libvirt.disks_pool_path, f'{uuid}_disk')
    with open(path, 'wb') as disk:
        disk.write(os.urandom(size))
    return {'path': path}


def migrate(host: str, uuid: str) -> dict[str, str | int]:
    """Copy the disk to another host, as far as a migration does.

    :param host: the migration_inbound_addr of that host
    """
    places = layout.Layout(uuid, CONF.libvirt.disks_pool_path,
                           os.path.join(CONF.instances_path, uuid))
    os.mkdir(places.directory)
    path = places.volume_path('disk')
    disk = layout.File(
        os.path.basename(path), layout.POOL, path, format='raw')
    claim = layout.Claim.new(uuid)
    here, there = (
        site.Site(daemon.Daemon(name, uri), places, CONF.libvirt.disks_pool,
                  claim, True)
        for name, uri in ((CONF.host, storage_migrate.LibvirtDriver._uri()),
                          (host, storage_migrate.destination_uri(host))))
    move = transfer.Transfer(here, there, [disk], f'instance-{uuid}')
    try:
        move.check()
        move.claim()
        move.run()
    finally:
        move.close()
    return {'bytes': os.path.getsize(path)}


FUNCTIONS = {'start': start, 'make_disk': make_disk, 'migrate': migrate}

if __name__ == '__main__':
    main()
