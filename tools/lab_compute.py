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

"""nova-compute on a libvirt that refuses what Nova writes for UEFI.

Where libvirt selects the firmware of a server, its versions before 9.2 refuse
an attribute that Nova gives the loader. An element says the same, which not
every release of Nova writes.
"""

from collections.abc import Callable
import functools
import sys
from typing import Any

# The first import: it decides on eventlet.
import nova.cmd.compute

import libvirt
from lxml import etree

import nova.virt.libvirt.config

TAKES_IT = 9_002_000


def leave_out_secure(format_dom: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make the XML of a domain with the element, and without the attribute."""
    @functools.wraps(format_dom)
    def format_without(guest: Any) -> Any:
        domain = format_dom(guest)
        for loader in domain.findall('os[@firmware]/loader[@secure]'):
            secure = loader.attrib.pop('secure')
            system = loader.getparent()
            if not loader.attrib:
                system.remove(loader)
            if system.find('firmware') is None:
                etree.SubElement(
                    etree.SubElement(system, 'firmware'), 'feature',
                    name='secure-boot', enabled=secure)
        return domain

    return format_without


if __name__ == '__main__':
    if libvirt.getVersion() < TAKES_IT:
        guest = nova.virt.libvirt.config.LibvirtConfigGuest
        guest.format_dom = leave_out_secure(guest.format_dom)
    sys.exit(nova.cmd.compute.main())
