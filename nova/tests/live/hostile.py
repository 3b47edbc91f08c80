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

"""Starts of disks that name a file, as a hostile guest would write them."""

import struct

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

_SIZE = 256 * 1024


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
