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

"""What a resize on the same host keeps of a server, for its revert.

libvirt can not rename a volume. But nova-compute owns the directory of the
pool, and libvirt learns of it when the pool is refreshed: so the volume
``{uuid}_disk`` is kept as ``{uuid}-resize_disk``, and a copy takes its place.
The instance directory is kept as Nova does it, as ``{uuid}_resize``.
"""

import os
import shutil

from oslo_utils import fileutils

import nova.conf
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import transfer
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF


class NotRestored(Exception):
    """The kept disks could not be put back; the server must not start."""


class Originals:
    """The disks and the instance directory of a server before its resize."""

    def __init__(self, instance):
        self._instance = instance
        self._directory = libvirt_utils.get_instance_path(instance)
        self._kept_directory = self._directory + '_resize'

    def path(self, path: str) -> str:
        """Where the original of a disk or file is kept."""
        if image.is_in_pool(path):
            return image.kept_path(
                self._instance, image.disk_name(self._instance, path))
        return os.path.join(self._kept_directory, os.path.basename(path))

    def keep(self) -> None:
        """Rename what is to be kept, and make an empty instance directory.

        restore() leads back from wherever this or what follows it ends, even
        if nova-compute does.

        :raises: OSError
        """
        for path in image.list_volumes(self._instance):
            os.rename(path, self.path(path))
        # The renamed directory says that all volumes were renamed.
        transfer.flush(CONF.libvirt.disks_pool_path)
        os.rename(self._directory, self._kept_directory)
        fileutils.ensure_tree(self._directory)

    def restore(self) -> None:
        """Put the originals back in the place of their copies.

        :raises: OSError
        """
        if os.path.exists(self._kept_directory):
            self._delete_new_volumes()
        for path in image.list_kept(self._instance):
            name = image.disk_name(self._instance, path)
            os.replace(path, image.volume_path(self._instance, name))
        if os.path.exists(self._kept_directory):
            shutil.rmtree(self._directory, ignore_errors=True)
            os.rename(self._kept_directory, self._directory)

    def _delete_new_volumes(self) -> None:
        """Delete the disks that the server did not have before.

        Those that it had are in the record, which tells them from the others
        also when this is called again after an attempt that did not end.
        """
        formats = image.recorded_formats(self.path('disk.info'))
        for path in image.list_volumes(self._instance):
            if (formats and path not in formats and
                    not os.path.exists(self.path(path))):
                os.unlink(path)
