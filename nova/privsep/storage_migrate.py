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

"""Operations on logical volumes that need root.

The process that is root loads this module, and with it none of Nova's drivers.
"""

import os

import nova.privsep


@nova.privsep.sys_admin_pctxt.entrypoint
def flush_device(path: str) -> None:
    """Wait until what was written to a device is on stable storage.

    Tells of an earlier write that failed, which ``blockdev --flushbufs`` does
    not; it does not flush the cache of the device either.

    :raises: OSError
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
