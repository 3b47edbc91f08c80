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

"""The UEFI variables of a server: what its firmware keeps between starts.

libvirt has them in a directory of QEMU's, which nova-compute cannot enter, and
of which no pool may be made: guests write these files. Where a server comes
to, they are in its instance directory, and its domain names them there.

Nova's privsep reads them. Call these functions in a green thread: privsep
never wakes up a native one under eventlet.
"""

import os
import typing as ty

from lxml import etree
from oslo_utils import units

import nova.privsep.path
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import threads

# Where libvirt has them.
DIRECTORY = '/var/lib/libvirt/qemu/nvram'

# Bytes that the variables may have: those of an aarch64 server, the largest.
MAX_BYTES = 64 * units.Mi

_MODE = 0o600


def path_in(xml: str) -> str | None:
    """Path of the variables in the XML of a domain, None if it has none."""
    domain = etree.fromstring(xml)
    system = domain.find('os')
    path = domain.findtext('os/nvram')
    if not path and system is not None and _keeps_variables(system):
        # Before 9.2 libvirt does not tell of a domain that is off.
        path = os.path.join(
            DIRECTORY, domain.findtext('name', '') + '_VARS.fd')
    return path or None


def name_in(guest: ty.Any, path: str) -> None:
    """Name other variables in the XML of a configuration of Nova's.

    Nova has no attribute for them that it puts into the XML.

    :param guest: a LibvirtConfigGuest
    """
    to_xml = guest.to_xml
    guest.to_xml = lambda **kwargs: name_path(to_xml(**kwargs), path)


def name_path(xml: str, path: str) -> str:
    """Name other variables in the XML of a domain.

    XML of a domain that has none, or is to lose them, stays as it is.
    """
    domain = etree.fromstring(xml)
    system = domain.find('os')
    if system is None or not _keeps_variables(system):
        return xml
    found = system.find('nvram')
    if found is None:
        found = etree.SubElement(system, 'nvram')
    found.text = path
    return etree.tostring(domain, encoding='unicode', pretty_print=True)


def _keeps_variables(system: etree._Element) -> bool:
    loader = system.find('loader')
    if loader is not None and loader.get('stateless') == 'yes':
        return False
    return (system.get('firmware') == 'efi' or
            loader is not None and loader.get('type') == 'pflash')


def read(path: str) -> bytes | None:
    """Read variables, as root.

    :returns: None if there are none: the server has never started
    :raises: StorageError, also if the file is empty
    """
    try:
        content, before = nova.privsep.path.last_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except Exception as error:
        # The helper of nova-compute that is root may be missing, or fail.
        raise errors.StorageError(
            f'the UEFI variables {path} cannot be read: {error}',
            'Check privsep in the log of nova-compute.') from error
    if before:
        raise errors.StorageError(
            f'the UEFI variables {path} have more than {MAX_BYTES} bytes',
            'Find out what the file is.')
    if not content:
        raise _empty(path)
    return content


def check(path: str) -> None:
    """Check that a file is not empty; QEMU alone may be able to read it.

    A firmware does not start with such variables. Without the file, libvirt
    makes new ones, which only an operator can want.

    :raises: StorageError
    """
    if not os.path.getsize(path):
        raise _empty(path)


def _empty(path: str) -> errors.StorageError:
    return errors.StorageError(
        f'the UEFI variables {path} are empty',
        'Restore the file. To start with new variables, delete it.')


def write(path: str, content: bytes) -> None:
    """Write variables, on stable storage, for QEMU alone to read.

    Those that a server has had on storage that hosts share stay as they are.

    :raises: StorageError, OSError; what was there is there
    """
    if not _has(path, content):
        threads.off_hub(layout.replace, path, content, _MODE)


def _has(path: str, content: bytes) -> bool:
    return (os.path.exists(path) and
            os.path.getsize(path) == len(content) and read(path) == content)


def as_file(content: bytes) -> layout.File:
    """Variables on their way to another host."""
    return layout.File(layout.NVRAM, layout.DIRECTORY, layout.NVRAM,
                       data=content, mode=_MODE, has_hostile_head=True)
