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

"""A key manager for a cloud on one machine: each secret is a file.

Nova needs one for servers with a vTPM. Hosts see the same directory, which
the environment names.
"""

import os
from pathlib import Path
from typing import Any

from castellan.common import exception
from castellan.common.objects import passphrase
from castellan.key_manager import key_manager
from oslo_utils import uuidutils


class KeyManager(key_manager.KeyManager):
    """Keeps passphrases, the only kind of secret that Nova stores."""

    def __init__(self, configuration: Any) -> None:
        """Take what castellan gives; nothing of it is needed."""

    def store(self, context: Any, managed_object: Any, *args: Any,
              **kwargs: Any) -> str:
        identity = uuidutils.generate_uuid()
        path = self._path(identity)
        path.write_bytes(managed_object.get_encoded())
        # nova has another number on each host.
        path.chmod(0o644)
        return identity

    def get(self, context: Any, managed_object_id: str, *args: Any,
            **kwargs: Any) -> passphrase.Passphrase:
        try:
            secret = self._path(managed_object_id).read_bytes()
        except FileNotFoundError:
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id)
        return passphrase.Passphrase(secret, id=managed_object_id)

    def delete(self, context: Any, managed_object_id: str, *args: Any,
               **kwargs: Any) -> None:
        try:
            self._path(managed_object_id).unlink()
        except FileNotFoundError:
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id)

    def _path(self, identity: str) -> Path:
        return Path(os.environ['NOVA_LAB_SECRETS']) / identity

    def create_key(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError()

    def create_key_pair(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
        raise NotImplementedError()

    def add_consumer(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError()

    def remove_consumer(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError()
