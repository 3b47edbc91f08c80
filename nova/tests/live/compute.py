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
tickets. It reads a line of JSON for each migration from standard input, and
answers with one: the bytes copied, or the error.
"""

import os
import sys

from oslo_serialization import jsonutils

from nova.tests.live import base
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import transfer


def main(uid: int, gid: int) -> None:
    os.initgroups('nova', gid)
    os.setgid(gid)
    os.setuid(uid)
    base.run_event_loop()
    print(jsonutils.dumps({'uid': os.getuid()}), flush=True)
    for line in sys.stdin:
        print(jsonutils.dumps(migrate(**jsonutils.loads(line))), flush=True)


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


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
