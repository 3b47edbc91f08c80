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

"""What the hosts' own directories are mounted on."""

import contextlib
from pathlib import Path

from tools.lab import namespaces
from tools import processes


def make() -> None:
    """Make the directories that the machine lacks to mount a host's on."""
    for path in map(Path, namespaces.MOUNTS):
        if not path.is_dir():
            path.mkdir(parents=True)
            (path / namespaces.MOUNT_MARKER).touch()


def remove() -> None:
    """Remove those again, if no other lab has its hosts' mounted there.

    Removing a directory would take the mounts off it in every namespace.
    """
    busy = _mounted_anywhere()
    for path in map(Path, namespaces.MOUNTS):
        marker = path / namespaces.MOUNT_MARKER
        if str(path) not in busy and marker.exists():
            marker.unlink()
            with contextlib.suppress(OSError):
                path.rmdir()


def _mounted_anywhere() -> set[str]:
    spaces = {processes.mount_namespace(process.pid): process.pid
              for process in processes.every()}
    found: set[str] = set()
    for pid in spaces.values():
        with contextlib.suppress(OSError):
            table = Path('/proc/%d/mountinfo' % pid).read_text()
            found.update(line.split()[4] for line in table.splitlines())
    return found
