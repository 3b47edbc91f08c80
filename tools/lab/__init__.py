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

"""Several compute hosts on one Debian machine.

Hosts out of namespaces have their own /etc, /run, /var/lib/libvirt and
/var/lib/nova, their own libvirtd and their own TLS identity. They hang on a
bridge whose address belongs to the machine itself, which is where a control
plane listens::

    machine 198.18.0.1 -- bridge nsm0 --+-- host1 198.18.0.11
                                        +-- host2 198.18.0.12

Install Debian packages before ``up``: a host gets its /etc as a copy.
"""

from tools.lab.host import NOVA_HOME
from tools.lab.host import PATH
from tools.lab.host import SSH_PORT
from tools.lab.host import START_TIMEOUT
from tools.lab.host import TLS_PORT
from tools.lab.libvirtd import LISTENER
from tools.lab.namespaces import MOUNTS
from tools.lab.network import DEFAULT
from tools.lab.network import Host
from tools.lab.network import Lab
from tools.processes import execute
from tools.waiting import Failed as LabError
from tools.waiting import wait_for

__all__ = [
    'DEFAULT',
    'execute',
    'Host',
    'Lab',
    'LabError',
    'LISTENER',
    'MOUNTS',
    'NOVA_HOME',
    'PATH',
    'SSH_PORT',
    'START_TIMEOUT',
    'TLS_PORT',
    'wait_for',
]
