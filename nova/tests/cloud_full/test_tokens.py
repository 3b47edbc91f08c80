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

"""The token of a user expires while the disks of a server are copied."""

from typing import Any

from openstack import exceptions

from nova.tests.cloud import base
from nova.tests.cloud import test_failure
from nova.tests.cloud_full import test_volumes

from tools import cloud
from tools import daemons
from tools import servers

# How long a token is valid. At this bandwidth, in MiB/s, a copy takes longer.
TOKEN_SECONDS = 90
BANDWIDTH = 5


class TokenMixin:
    """How to migrate a server for longer than a token is valid."""

    options: cloud.config.Options = {
        'libvirt': {'vol_upload_migration_bandwidth': BANDWIDTH},
        # After ten minutes, Nova asks Neutron again. A token is valid for
        # longer, and such a copy takes longer still.
        'neutron': {'extension_sync_interval': 1}}

    def outlive_token(self, server: servers.Server) -> None:
        """Begin a migration, and return when its token has expired."""
        test_failure.FaultTestCase.make_noise(server, self.source)
        user = self.cloud.connection()
        token = self._issue_token(user)
        exceptions.raise_from_response(user.compute.post(
            f'/servers/{server.id}/action', authenticated=False,
            headers={'X-Auth-Token': token},
            json={'migrate': {'host': base.DESTINATION}}))
        daemons.wait_for('the token to expire', lambda: (
            self._is_refused(user, token)), 2 * TOKEN_SECONDS, poll=1)
        # Nova asks the other services again when the disks are there.
        self.assertEqual('migrating', self.migration(server).status)

    def _issue_token(self, user: Any) -> str:
        """Have a token that expires soon, unlike those of the services."""
        self.cloud.restart_api(
            'keystone', {'token': {'expiration': TOKEN_SECONDS}})
        try:
            return user.session.get_token()
        finally:
            self.cloud.restart_api('keystone')

    def _is_refused(self, user: Any, token: str) -> bool:
        """Whether Neutron takes a token no longer."""
        answer = user.session.get(
            self.cloud.site.url('neutron', '/v2.0/extensions'),
            headers={'X-Auth-Token': token}, authenticated=False,
            raise_exc=False)
        self.assertIn(answer.status_code, (200, 401))
        return answer.status_code == 401

    def migration(self, server: servers.Server) -> Any:
        """The only migration of a server."""
        migration, = server.compute.migrations(instance_uuid=server.id)
        return migration


class TestToken(TokenMixin, test_volumes.VolumeTestCase):
    """Hosts have a service user, and a server has a volume."""

    def test_server_moves(self):
        volume = self.make_volume()
        server = self.create_booted()
        server.compute.create_volume_attachment(server.id, volume)
        self.assert_attached(volume, server)
        self.outlive_token(server)
        server.wait('VERIFY_RESIZE')
        self.assertEqual(base.DESTINATION, server.host)
        self.assert_counts(server, vda=2)
        self.assert_attached(volume, server)
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)


class TestTokenRefused(TokenMixin, base.CloudTestCase):
    """Hosts have no service user, of which they warn."""

    options = cloud.config.merge(TokenMixin.options, {
        'service_user': {'send_service_user_token': False}})

    def _set_options(self):
        size = base.log_size(self.cloud, base.SOURCE)
        super()._set_options()
        self.said = base.read_log(self.cloud, base.SOURCE, size)

    def test_server_stays_and_starts_again(self):
        self.assertIn('Set [service_user]send_service_user_token', self.said)
        server = self.create_booted()
        self.outlive_token(server)
        server.wait('ERROR')
        self.assertIn('unauthorized', server.failure())
        self.assertEqual('error', self.migration(server).status)
        self.assertEqual(base.SOURCE, server.host)
        self.assertEqual([], server.qemu_pids())
        server.compute.reboot_server(server.id, 'HARD')
        self.assertEqual('ACTIVE', server.settle())
        self.assert_counts(server, vda=2)
        # The next attempt clears the copy that nobody needs.
        server.migrate(base.DESTINATION)
        server.confirm()
        self.assert_no_disks(server, base.SOURCE)
        self.assert_counts(server, vda=3)
