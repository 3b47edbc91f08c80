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

"""nova-storage-migrate, run as the user nova of a lab host.

Reads a line of JSON for each run from standard input: the arguments, and the
version of libvirt to insist on where that is not the usual one. Answers with
one: the exit status, and what was printed.
"""

import os
import sys
import tempfile

from oslo_serialization import jsonutils

from nova.cmd import storage_migrate
from nova.virt.libvirt.storage import daemon


def main() -> None:
    print(jsonutils.dumps({'uid': os.getuid()}), flush=True)
    for line in sys.stdin:
        print(jsonutils.dumps(run(**jsonutils.loads(line))), flush=True)


def run(argv: list[str], minimum: int | None = None) -> dict[str, str | int]:
    """Run the command in a process of its own, as a shell would."""
    with tempfile.TemporaryFile('w+') as out:
        pid = os.fork()
        if not pid:
            if minimum:
                daemon.MIN_LIBVIRT_VERSION = minimum
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os._exit(call(argv))
        _pid, status = os.waitpid(pid, 0)
        out.seek(0)
        return {'status': os.waitstatus_to_exitcode(status),
                'out': out.read()}


def call(argv: list[str]) -> int:
    try:
        return storage_migrate.main(argv)
    finally:
        sys.stdout.flush()


if __name__ == '__main__':
    main()
