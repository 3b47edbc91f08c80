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

"""A host's certificates, in the places where libvirt looks for them."""

import os
from pathlib import Path
import shutil

from tools import certificates
from tools.lab import namespaces


class Identity(namespaces.Namespaces):
    """The certificates of a host, of the lab's authority or of another."""

    def _make_identity(self) -> None:
        pki = self.path('/etc/pki')
        private = pki / 'libvirt/private'
        private.mkdir(parents=True)
        (pki / 'CA').mkdir()
        shutil.copy(self.lab.authority.certificate, pki / 'CA/cacert.pem')
        for side in ('server', 'client'):
            self.set_certificate(side)
        os.chown(private, 0, self.nova_gid)
        private.chmod(0o750)

    def certificate(self, side: str) -> Path:
        """Where the host has its certificate as 'server' or as 'client'."""
        return self.path('/etc/pki/libvirt/%scert.pem' % side)

    def _key(self, side: str) -> Path:
        return self.path('/etc/pki/libvirt/private/%skey.pem' % side)

    def set_certificate(self, side: str,
                        ca: certificates.Authority | None = None,
                        name: str | None = None) -> None:
        """Give the host a new certificate; libvirtd reads it at its start.

        :param side: 'server' or 'client'
        :param ca: another than the lab's
        :param name: another host's than its own; it has no address then
        """
        authority = ca or self.lab.authority
        authority.issue(
            self._key(side), self.certificate(side), name or self.name, side,
            [] if name else [self.address])
        self._let_nova_read(side)

    def expire_certificate(self, side: str) -> None:
        """Let the host's certificate have expired a day ago."""
        self.lab.authority.issue(
            self._key(side), self.certificate(side), self.name, side,
            [self.address], -certificates.DAY)
        self._let_nova_read(side)

    def _let_nova_read(self, side: str) -> None:
        """nova-compute is the client, and it is not root."""
        if side == 'client':
            os.chown(self._key(side), 0, self.nova_gid)
            self._key(side).chmod(0o640)
