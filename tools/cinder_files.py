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

"""A backend of Cinder for the lab: volumes are files that all hosts see.

Real backends need what a kernel may not have: iSCSI, NFS, or device mapper.
Nova takes such a volume for one on GPFS, where it opens a path as well.
"""

import os
import shutil

from cinder.volume import driver

GIB = 1024 ** 3


class FileDriver(driver.VolumeDriver):
    """Makes, shows and deletes a sparse raw file for each volume."""

    VERSION = '1.0'

    @property
    def _directory(self) -> str:
        return self.configuration.volumes_dir

    def check_for_setup_error(self):
        os.makedirs(self._directory, exist_ok=True)

    def _path(self, volume) -> str:
        return os.path.join(self._directory, volume.id)

    def create_volume(self, volume):
        with open(self._path(volume), 'xb') as file:
            file.truncate(volume.size * GIB)

    def delete_volume(self, volume):
        os.unlink(self._path(volume))

    def create_export(self, context, volume, connector):
        pass

    def ensure_export(self, context, volume):
        pass

    def remove_export(self, context, volume):
        pass

    def initialize_connection(self, volume, connector):
        return {'driver_volume_type': 'gpfs',
                'data': {'device_path': self._path(volume)}}

    def terminate_connection(self, volume, connector, **kwargs):
        pass

    def get_volume_stats(self, refresh=False):
        total, _used, free = shutil.disk_usage(self._directory)
        return {'volume_backend_name': self.configuration.volume_backend_name,
                'vendor_name': 'lab', 'driver_version': self.VERSION,
                'storage_protocol': 'file',
                'total_capacity_gb': total / GIB,
                'free_capacity_gb': free / GIB,
                'reserved_percentage': 0}
