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

"""The configuration files of the small cloud's services, as plain data."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path

from tools.cloud_venv import ROOT

Options = Mapping[str, Mapping[str, object]]

PORTS = {'keystone': 5000, 'placement': 8778, 'glance': 9292,
         'neutron': 9696, 'nova': 8774, 'cinder': 8776, 'mariadb': 3306,
         'rabbitmq': 5672}
DATABASES = ('keystone', 'glance', 'placement', 'neutron', 'nova',
             'nova_api', 'nova_cell0')
REGION = 'RegionOne'
# Reachable from the lab's own bridge alone, and gone with the lab.
PASSWORD = 'lab'


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a cloud lives: its address and its directory."""

    address: str
    directory: Path

    def url(self, service: str, path: str = '') -> str:
        """The address of a service's API."""
        return f'http://{self.address}:{PORTS[service]}{path}'

    def database(self, name: str) -> str:
        """SQLAlchemy's address of a database."""
        return (f'mysql+pymysql://lab:{PASSWORD}@{self.address}/{name}'
                '?charset=utf8')

    @property
    def transport(self) -> str:
        """oslo.messaging's address of the message queue."""
        return (f'rabbit://lab:{PASSWORD}@{self.address}:'
                f'{PORTS["rabbitmq"]}/')

    @property
    def epmd_port(self) -> int:
        """Where RabbitMQ's nodes find each other, on loopback.

        By subnet: two clouds on one machine need different ones.
        """
        return 24000 + int(self.address.split('.')[2])

    def credentials(self, user: str) -> dict[str, object]:
        """How a service authenticates to the others."""
        return {'auth_type': 'password',
                'auth_url': self.url('keystone'),
                'username': user,
                'password': PASSWORD,
                'project_name': 'service',
                'user_domain_name': 'Default',
                'project_domain_name': 'Default',
                'region_name': REGION}

    def token_check(self, user: str) -> dict[str, object]:
        """How a service checks the tokens that it is shown."""
        return {**self.credentials(user),
                'www_authenticate_uri': self.url('keystone')}


def render(options: Options) -> str:
    """The text of an oslo.config file."""
    lines = []
    for section, values in options.items():
        lines.append(f'[{section}]')
        lines += [f'{name} = {value}' for name, value in values.items()]
        lines.append('')
    return '\n'.join(lines)


def merge(*layers: Options) -> dict[str, dict[str, object]]:
    """Sections of options, where later layers win option by option."""
    merged: dict[str, dict[str, object]] = {}
    for layer in layers:
        for section, values in layer.items():
            merged.setdefault(section, {}).update(values)
    return merged


def keystone(site: Site) -> Options:
    """keystone.conf."""
    keys = site.directory / 'keystone/fernet-keys'
    return {
        'database': {'connection': site.database('keystone')},
        'fernet_tokens': {'key_repository': keys},
        'fernet_receipts': {'key_repository': keys},
        'token': {'provider': 'fernet'},
        # The default makes every login cost a quarter of a second of CPU.
        'identity': {'password_hash_rounds': 4},
    }


def glance(site: Site) -> Options:
    """glance-api.conf."""
    store = site.directory / 'glance'
    return {
        'DEFAULT': {'enabled_backends': 'file:file'},
        'database': {'connection': site.database('glance')},
        'glance_store': {'default_backend': 'file'},
        'file': {'filesystem_store_datadir': store / 'images'},
        'os_glance_tasks_store': {'filesystem_store_datadir': store / 'tasks'},
        'os_glance_staging_store': {
            'filesystem_store_datadir': store / 'staging'},
        'keystone_authtoken': site.token_check('glance'),
        'paste_deploy': {
            'flavor': 'keystone',
            'config_file': ROOT / 'etc/glance/glance-api-paste.ini'},
    }


def placement(site: Site) -> Options:
    """placement.conf."""
    return {
        'api': {'auth_strategy': 'keystone'},
        'placement_database': {'connection': site.database('placement')},
        'keystone_authtoken': site.token_check('placement'),
    }


def neutron(site: Site) -> Options:
    """neutron.conf: an API without networks or agents, as Nova needs one."""
    return {
        'DEFAULT': {'core_plugin': 'ml2',
                    'service_plugins': '',
                    'auth_strategy': 'keystone',
                    'transport_url': site.transport,
                    'api_paste_config': ROOT / 'etc/neutron/api-paste.ini',
                    'state_path': site.directory / 'neutron',
                    'rpc_workers': 0,
                    'notify_nova_on_port_status_changes': False,
                    'notify_nova_on_port_data_changes': False},
        'oslo_concurrency': {'lock_path': site.directory / 'neutron/lock'},
        'database': {'connection': site.database('neutron')},
        'keystone_authtoken': site.token_check('neutron'),
        'ml2': {'mechanism_drivers': '', 'type_drivers': 'local',
                'tenant_network_types': 'local'},
    }


def cinder(site: Site, root: Path, backend: str) -> Options:
    """cinder.conf, with one backend.

    :param root: Cinder's environment
    :param backend: the name of its section, which is in a file of its own
    """
    state = site.directory / 'cinder'
    return {
        'DEFAULT': {'transport_url': site.transport,
                    'auth_strategy': 'keystone',
                    'my_ip': site.address,
                    'host': 'control',
                    'state_path': state,
                    'api_paste_config': root / 'etc/cinder/api-paste.ini',
                    'resource_query_filters_file':
                        root / 'etc/cinder/resource_filters.json',
                    'enabled_backends': backend},
        'database': {'connection': site.database('cinder')},
        'oslo_concurrency': {'lock_path': state / 'lock'},
        'coordination': {'backend_url': f'file://{state}/coordination'},
        'keystone_authtoken': {**site.token_check('cinder'),
                               'service_token_roles': 'service',
                               'service_token_roles_required': True},
    }


def nova_common(site: Site) -> Options:
    """What the control plane's nova.conf and a compute host's both say."""
    return {
        'DEFAULT': {'transport_url': site.transport,
                    'service_down_time': 30,
                    'report_interval': 5,
                    'allow_resize_to_same_host': True,
                    # A guest in software emulation takes long to end.
                    'shutdown_timeout': 0},
        # Where a link was cut, a connection is found dead, and made anew,
        # within seconds.
        'oslo_messaging_rabbit': {'heartbeat_timeout_threshold': 10},
        'keystone_authtoken': site.token_check('nova'),
        'service_user': {**site.credentials('nova'),
                         'send_service_user_token': True},
        'placement': site.credentials('placement'),
        'neutron': site.credentials('neutron'),
        'glance': {**site.credentials('glance'), 'num_retries': 2},
        'vnc': {'enabled': False},
    }


def nova_control(site: Site) -> Options:
    """nova.conf of the API, the conductor and the scheduler."""
    state = site.directory / 'nova'
    return merge(nova_common(site), {
        'DEFAULT': {'my_ip': site.address,
                    'host': 'control',
                    'state_path': state},
        'oslo_concurrency': {'lock_path': state / 'lock'},
        'api_database': {'connection': site.database('nova_api')},
        'database': {'connection': site.database('nova')},
        'wsgi': {'api_paste_config': ROOT / 'etc/nova/api-paste.ini'},
        'conductor': {'workers': 1},
        'scheduler': {'workers': 1},
    })


def nova_compute(site: Site, name: str, address: str) -> Options:
    """nova.conf of a compute host: no access to any database."""
    return merge(nova_common(site), {
        'DEFAULT': {'my_ip': address,
                    'host': name,
                    'state_path': '/var/lib/nova',
                    'compute_driver': 'libvirt.LibvirtDriver',
                    # The guest has no driver for the default, vfat.
                    'default_ephemeral_format': 'ext4'},
        'oslo_concurrency': {'lock_path': '/var/lib/nova/lock'},
        'libvirt': {'virt_type': 'qemu', 'cpu_mode': 'none',
                    'swtpm_enabled': True},
        'key_manager': {'backend': 'lab_keys.KeyManager'},
    })


def rootwrap(root: Path = ROOT) -> Options:
    """rootwrap.conf: as Nova's own, with the environment's programs."""
    return {'DEFAULT': {
        'filters_path': '/etc/nova/rootwrap.d',
        'exec_dirs': f'{root}/bin,/usr/sbin,/usr/bin,/sbin,/bin',
        'use_syslog': False}}


def sudoers(root: Path = ROOT) -> str:
    """What lets nova become root: through nova-rootwrap alone."""
    return (f'Defaults:nova secure_path="{root}/bin:/usr/sbin:/usr/bin"\n'
            'Defaults:nova !requiretty, !syslog\n'
            f'nova ALL = (root) NOPASSWD: {root}/bin/nova-rootwrap '
            '/etc/nova/rootwrap.conf *\n')


def rabbitmq(site: Site) -> str:
    """rabbitmq.conf."""
    return (f'listeners.tcp.1 = {site.address}:{PORTS["rabbitmq"]}\n'
            'default_user = lab\n'
            f'default_pass = {PASSWORD}\n'
            'log.console = true\n'
            'log.console.level = warning\n'
            'log.file = false\n')


def mariadb(site: Site) -> list[str]:
    """The arguments of mariadbd."""
    data = site.directory / 'mariadb'
    return ['--no-defaults', '--user=mysql',
            f'--datadir={data}', f'--socket={data}/sock',
            f'--pid-file={data}/pid',
            f'--bind-address={site.address}', f'--port={PORTS["mariadb"]}',
            '--skip-name-resolve', '--max-connections=400',
            # A power cut may lose this database: the next up makes it anew.
            '--innodb-flush-log-at-trx-commit=0', '--skip-log-bin',
            '--innodb-doublewrite=0', '--innodb-flush-method=nosync',
            '--performance-schema=0', '--innodb-buffer-pool-size=128M',
            '--character-set-server=utf8mb3']
