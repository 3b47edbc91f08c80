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

"""The part of nova-compute that migrates, as the user nova of a lab host.

Unlike a test itself it has the host's names, certificates, passwords and
tickets. It reads lines of JSON from standard input, each of which names a
function of FUNCTIONS with its arguments, and answers with what that returns.
"""

import os
import sys

from oslo_serialization import jsonutils

import nova.conf
from nova import objects
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage import transfer

CONF = nova.conf.CONF


def main() -> None:
    threads.run_event_loop()
    print(jsonutils.dumps({'uid': os.getuid()}), flush=True)
    for line in sys.stdin:
        name, arguments = jsonutils.loads(line)
        print(jsonutils.dumps(FUNCTIONS[name](**arguments)), flush=True)


def migrate(uri: str, host: str, pool: str, uuid: str,
            directory: str) -> dict[str, str | int]:
    """Copy a disk to another host, as far as a migration does.

    :returns: the bytes copied, or the error
    """
    destination = peer.Destination(host, uri, pool, uuid, directory)
    move = transfer.Transfer('qemu:///system', destination, pool, directory)
    disk = transfer.Disk(f'{uuid}_disk', 'raw')
    try:
        move.check([disk])
        destination.claim()
        result = move.copy_disk(disk, None)
        move.copy_instance_dir([disk], None)
    except (peer.Unsuitable, transfer.TransferError) as error:
        return {'error': str(error)}
    finally:
        move.close()
    return {'bytes': result.length}


def grow(pool_path: str, uuid: str, size: int) -> dict[str, str | int]:
    """Let a server's root disk be as big as its new flavor says.

    :returns: the format that it is taken for
    """
    CONF.set_override('instances_path', '/var/lib/nova/instances')
    CONF.set_override('disks_pool_path', pool_path, group='libvirt')
    disk = image.Backend(use_cow=False).by_name(
        objects.Instance(uuid=uuid), 'disk')
    disk.resize_image(size)
    return {'format': disk.driver_format}


FUNCTIONS = {'migrate': migrate, 'grow': grow}

if __name__ == '__main__':
    main()
