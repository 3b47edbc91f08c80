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

"""The image cache of a host whose servers have disks in a storage pool."""

import os
import typing as ty

import nova.conf
from nova import exception
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF


def cache_name(image_id: str) -> str:
    """Name of the base image of an image in the cache."""
    return imagecache.get_cache_fname(image_id)


class ImageCacheManager(imagecache.ImageCacheManager):
    """Nova's, which looks for disks in the instance directories only."""

    def _list_backing_images(self):
        images = super()._list_backing_images()
        # Disks that are kept for the revert of a migration use base images,
        # too. Their servers are on other hosts, and Nova does not list them.
        for path in self._list_bases_of_volumes():
            if path not in images:
                images.append(path)
            if path in self.unexplained_images:
                self.unexplained_images.remove(path)
            # Nova has lists of its own for ephemeral and swap disks, and
            # looks at them next.
            name = {os.path.basename(path)}
            self.used_ephemeral_images |= name & self.back_ephemeral_images
            self.used_swap_images |= name & self.back_swap_images
        return images

    def get_disk_usage(self):
        """Bytes that the cache takes from what disks of servers can have."""
        if CONF.libvirt.use_storage_pools and not self._is_on_disks_device():
            return 0
        return super().get_disk_usage()

    def _list_bases_of_volumes(self) -> ty.Iterator[str]:
        for path in image.list_overlays():
            try:
                base = libvirt_utils.get_disk_backing_file(
                    path, format='qcow2')
            except exception.NovaException:
                if os.path.exists(path):
                    raise
                # The server was deleted in this moment.
                continue
            if base:
                yield os.path.join(self.cache_dir, base)

    def _is_on_disks_device(self) -> bool:
        try:
            return (os.stat(CONF.libvirt.disks_pool_path).st_dev ==
                    os.stat(self.cache_dir).st_dev)
        except FileNotFoundError:
            return True
