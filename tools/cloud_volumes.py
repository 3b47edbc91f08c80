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

"""Cinder for the small cloud, which only few tests need.

It has an environment of its own, so that the cloud without it is up as soon
as before.
"""

from collections.abc import Mapping
import os
from pathlib import Path
import shutil
from typing import Any

from tools import cloud as cloud_module
from tools import cloud_config as config
from tools import cloud_venv as venv
from tools import daemons

ROOT = Path(os.environ.get('NOVA_LAB_CINDER_VENV') or f'{venv.BASE}-cinder')
REQUIREMENTS = venv.TOOLS / 'cinder-requirements.txt'
DRIVER = venv.TOOLS / 'cinder_files.py'
# Nova looks for it under this type.
CATALOGUE = {'cinder': ('volumev3', '/v3/$(project_id)s')}
SERVICES = ('cinder-scheduler', 'cinder-volume')
BACKEND = 'lab'
STOP_SECONDS = 5


class Volumes:
    """The Cinder of one cloud, which has to be up."""

    def __init__(self, cloud: cloud_module.Cloud):
        self.cloud = cloud
        self.directory = cloud.directory / 'cinder'
        self.environment = {'PYTHONPATH': str(self.directory / 'python')}
        self._options = ['--config-file', str(self.directory / 'cinder.conf')]

    def up(self) -> None:
        """Bring Cinder up, or what is missing of it."""
        self.cloud.say('Cinder')
        venv.ensure(ROOT, REQUIREMENTS)
        self._configure()
        self.cloud.make_databases(['cinder'])
        self.cloud.run([*self._program('cinder-manage'), 'db', 'sync'])
        self.cloud.register_services(CATALOGUE)
        self.cloud.daemon('cinder').start(
            [*self.cloud.uwsgi('cinder', 'cinder.wsgi.api', ROOT),
             '--pyargv', ' '.join(self._options)],
            cwd=str(self.directory), env=self.environment)
        self.cloud.daemon('cinder-scheduler').start(
            self._program('cinder-scheduler'), env=self.environment)
        self.use()
        self.cloud.wait_answer('cinder')
        storage = self.connection()
        self.cloud.daemon('cinder-volume').wait(
            'both services', lambda: {
                service.binary for service in storage.services()
                if service.state == 'up'} == set(SERVICES), 120)
        self.cloud.say('Cinder is up')

    def use(self, backend: Mapping[str, object] | None = None) -> None:
        """Use a backend from now on, in place of the one before.

        :param backend: its options; without them, volumes are files
        """
        path = self.directory / 'backend.conf'
        text = config.render({BACKEND: {
            'volume_backend_name': BACKEND, **(backend or {
                'volume_driver': 'cinder_files.FileDriver',
                'volumes_dir': self.directory / 'volumes'})}})
        daemon = self.cloud.daemon('cinder-volume')
        if not path.exists() or path.read_text() != text:
            daemon.stop(STOP_SECONDS)
            path.write_text(text)
        daemon.start([*self._program('cinder-volume'),
                      '--config-file', str(path)], env=self.environment)

    def down(self) -> None:
        """End it, and remove what it had."""
        daemons.stop([self.cloud.daemon(name)
                      for name in (*SERVICES, 'cinder')], STOP_SECONDS)
        shutil.rmtree(self.directory, ignore_errors=True)

    def connection(self) -> Any:
        """openstacksdk's block storage, as the administrator."""
        return self.cloud.connection().block_storage

    def path(self, volume: str) -> Path:
        """The file of a volume that is one, which all hosts see there."""
        return self.directory / 'volumes' / volume

    def _configure(self) -> None:
        python = self.directory / 'python'
        python.mkdir(parents=True, exist_ok=True)
        shutil.copy(DRIVER, python)
        (self.directory / 'cinder.conf').write_text(
            config.render(config.cinder(self.cloud.site, ROOT, BACKEND)))

    def _program(self, name: str) -> list[str]:
        return [venv.program(name, ROOT), *self._options]
