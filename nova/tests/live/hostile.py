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

"""A disk into which a hostile guest wrote what makes it look like another.

Its first bytes are those of a qcow2 image without data of its own, on a
backing file. Whoever asks the disk itself for its format is shown the backing
file's content in its place.
"""

import pathlib
import struct
import subprocess

import fixtures

from nova.tests.live import base

BACKING = '/etc/shadow'

# Where the files are that no daemon may open.
BAIT = '/run/bait'

# Length of the hostile start of a disk.
HEAD = 4096

_DESCRIPTOR = """\
# Disk DescriptorFile
version=1
CID=1
parentCID=2
createType="monolithicSparse"
parentFileNameHint="%s"
"""
# What the guest must not get to see.
CANARY = 'canary-c2b1f0a9'

# An ext4 file system, which leaves its first KiB to boot loaders, lives on
# behind this: the guest that wrote it still starts.
_LENGTH = 1024
_CLUSTER_BITS = 9
_TABLES = 512
_SIZE = 256 * 1024


def write_header(disk: pathlib.Path, backing: str = BACKING) -> None:
    """Write it over the first bytes of a raw disk.

    See QEMU's docs/interop/qcow2.txt for the fields of version 2.
    """
    name = backing.encode()
    header = struct.pack(
        '>4sIQIIQIIQQIIQ', b'QFI\xfb', 2, 128, len(name), _CLUSTER_BITS,
        _SIZE, 0, 8, _TABLES, _TABLES, 1, 0, 0)
    with open(disk, 'r+b') as file:
        file.write((header.ljust(128, b'\0') + name).ljust(_LENGTH, b'\0'))


def qcow2(backing: str, version: int = 2) -> bytes:
    """A header of version 2 or 3 of qcow2."""
    name = backing.encode()
    header = struct.pack(
        '>4sIQIIQIIQQIIQ', b'QFI\xfb', version, 512, len(name), 16, _SIZE, 0,
        1, 1 << 16, 2 << 16, 1, 0, 0)
    if version == 3:
        header += struct.pack('>QQQII', 0, 0, 0, 4, 104)
    return header.ljust(512, b'\0') + name


def qcow(backing: str) -> bytes:
    """A header of qcow, the first version."""
    name = backing.encode()
    header = struct.pack('>4sIQIIQBBHIQ', b'QFI\xfb', 1, 512, len(name), 0,
                         _SIZE, 12, 9, 0, 0, 1 << 16)
    return header.ljust(512, b'\0') + name


def qed(backing: str) -> bytes:
    """A header of QED with a backing file."""
    name = backing.encode()
    header = struct.pack('<4sIIIQQQQQII', b'QED\0', 1 << 16, 4, 1, 1, 0, 0,
                         1 << 16, _SIZE, 512, len(name))
    return header.ljust(512, b'\0') + name


def vmdk(backing: str) -> bytes:
    """A header of VMDK, and a descriptor that names a parent."""
    return (struct.pack('<4sII', b'KDMV', 1, 3).ljust(512, b'\0') +
            (_DESCRIPTOR % backing).encode())


def cow(backing: str) -> bytes:
    """A header of COW, which QEMU has forgotten and libvirt has not."""
    return struct.pack('>4sI', b'OOOM', 2) + backing.encode()


def json(backing: str) -> bytes:
    """A header of qcow2 with a backing file in QEMU's other notation."""
    return qcow2('json:{"driver":"raw","file":{"driver":"file",'
                 f'"filename":"{backing}"}}}}')


def vhdx(_backing: str) -> bytes:
    """The start of a VHDX file."""
    return b'vhdxfile'


def vdi(_backing: str) -> bytes:
    """A header of VDI."""
    return (b'<<< Oracle VM VirtualBox Disk Image >>>\n'.ljust(64, b'\0') +
            struct.pack('<II', 0xbeda107f, 0x00010001))


def is_bait(host: base.nova_lab.Host, path: str) -> bool:
    """Whether a program that asks the disk for its format is taken in.

    :param path: of the disk, as the host sees it
    """
    host.run(['qemu-img', 'convert', '-O', 'raw', path, '/run/bait'])
    taken = host.path('/run/bait')
    try:
        return contains_canary(taken)
    finally:
        taken.unlink()


def contains_canary(path: pathlib.Path) -> bool:
    """Whether a disk or a log contains what only BACKING does."""
    return subprocess.run(['grep', '-qaF', CANARY, path]).returncode == 0


class Canary(fixtures.Fixture):
    """Make a host's /etc/shadow one that nova may read, with the canary.

    Its mode must not be all that keeps the content from a disk.
    """

    def __init__(self, host: base.nova_lab.Host) -> None:
        super().__init__()
        self._path = host.path(BACKING)

    def _setUp(self) -> None:
        before = self._path.read_text()
        self.addCleanup(self._path.chmod, self._path.stat().st_mode)
        self.addCleanup(self._path.write_text, before)
        self._path.write_text(before + f'{CANARY}:*:19000:0:99999:7:::\n')
        self._path.chmod(0o644)
