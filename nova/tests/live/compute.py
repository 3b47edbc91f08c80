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

from oslo_concurrency import processutils
from oslo_serialization import jsonutils

from nova.tests.live import moves
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import threads


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
    name = f'{uuid}_disk'
    places = layout.Layout(uuid, f'/var/lib/nova/{pool}', directory)
    move = moves.new_transfer('qemu:///system', host, uri, pool, places, [
        layout.File(name, layout.POOL, places.volume_path('disk'), 'raw')])
    watch = moves.Watch()
    try:
        moves.start(move)
        move.run(watch=watch)
    except errors.HostError as error:
        return {'error': str(error)}
    finally:
        move.close()
    return {'bytes': watch.results[name].length}


def start_program() -> dict[str, str | int]:
    """Start a program, as Nova does for an image."""
    processutils.execute('qemu-img', '--version')
    return {}


FUNCTIONS = {'migrate': migrate, 'start_program': start_program}

if __name__ == '__main__':
    main()
