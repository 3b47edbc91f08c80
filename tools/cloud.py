#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""A real small OpenStack on the lab's hosts.

MariaDB, RabbitMQ, keystone, placement, glance, neutron, and Nova's API,
conductor and scheduler run in the machine's own namespaces, bound to the
lab's bridge address; one nova-compute runs in each lab host, as the
unprivileged user nova, with sudo and nova-rootwrap for what needs root.

    tools/run cloud up [--stock] [--eventlet] [--ssh]
    tools/run cloud restart-computes [--stock] [--eventlet]
    tools/run cloud env     # what the openstack command needs, for eval
    tools/run cloud down
"""

import argparse
import base64
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import concurrent.futures
import functools
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any
from typing import TYPE_CHECKING

from tools import cloud_config as config
from tools import cloud_venv as venv
from tools import daemons

if TYPE_CHECKING:
    from tools import lab as lab_module

# What an operator writes into nova.conf to use this project.
STREAMS: config.Options = {
    'DEFAULT': {'compute_driver': 'libvirt.storage_migrate.LibvirtDriver'},
    'libvirt': {'use_storage_pools': True, 'vol_upload_migration': True},
}
# The option for live migration over TLS.
LIVE: config.Options = {'libvirt': {'live_migration_scheme': 'tls'}}
API_MODULES = {'keystone': 'keystone.wsgi.api',
               'placement': 'placement.wsgi.api',
               'glance': 'glance.wsgi.api',
               'neutron': 'neutron.wsgi.api',
               'nova': 'nova.wsgi.osapi_compute'}
# The functions that make their configurations.
CONFIGURATIONS = {'keystone': config.keystone,
                  'placement': config.placement,
                  'glance': config.glance,
                  'neutron': config.neutron,
                  'nova': config.nova_control}
CATALOGUE = {'placement': ('placement', ''),
             'glance': ('image', ''),
             'neutron': ('network', ''),
             'nova': ('compute', '/v2.1')}
NOVA_COMPUTE = ('nova-compute',)
# The same where libvirt refuses what Nova writes for UEFI.
COMPUTE_FOR_UEFI = ('python', '-P', '-m', 'lab_compute')
IMAGES = {'guest': 'raw', 'guest-qcow2': 'qcow2', 'guest-uefi': 'raw'}
# Further properties of some images.
PROPERTIES = {'guest-uefi': {'hw_firmware_type': 'uefi',
                             'hw_machine_type': 'q35'}}
# name -> root disk and ephemeral disk, GiB, and swap disk, MiB
FLAVORS = {'small': (1, 0, 0), 'large': (2, 0, 0),
           'small-ephemeral': (1, 1, 0), 'large-ephemeral': (2, 2, 0),
           'small-swap': (1, 1, 64), 'large-swap': (2, 2, 128),
           'small-vtpm': (1, 1, 64), 'large-vtpm': (2, 2, 128)}
# Extra specifications of some flavors.
EXTRA_SPECS = {name: {'hw:tpm_version': '2.0', 'hw:tpm_model': 'tpm-tis'}
               for name in ('small-vtpm', 'large-vtpm')}
MEMORY_MIB = 256
# The first that lets an administrator name the host of a new server.
MICROVERSION = '2.96'
# Nova's services wait for threads that do not end when asked to stop: for so
# many seconds we let them.
PATIENCE = 5


class Clock:
    """Says what is done, with the seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def say(self, what: str) -> None:
        """Print a line of progress."""
        print(f'[{time.monotonic() - self._started:6.1f} s] {what}',
              file=sys.stderr, flush=True)


class Cloud:
    """The cloud of one lab.

    :param lab: the hosts, which have to be up before the cloud.
    :param eventlet: run nova-compute under eventlet, not in native threads.
    :param options: added to the nova.conf of every compute host.
    :param say: takes a line of progress.
    :ivar compute_program: what a compute host runs, with its arguments.
    """

    def __init__(self, lab: 'lab_module.Lab', eventlet: bool = False,
                 options: config.Options | None = None,
                 say: Callable[[str], None] | None = None):
        self.lab = lab
        self.eventlet = eventlet
        self.options = options or {}
        self.host_options: dict[str, config.Options] = {}
        self.compute_program: tuple[str, ...] = NOVA_COMPUTE
        self.directory = Path(lab.directory) / 'cloud'
        self.secrets = self.directory / 'secrets'
        self.site = config.Site(lab.address, self.directory)
        self.say = say or Clock().say

    # ---- life cycle

    def up(self) -> None:
        """Bring everything up; of what runs, only the computes start anew.

        They may have been of other code, or of other options.
        """
        self.stop_computes()
        self.say('Python environment')
        venv.ensure()
        venv.install_project()
        self.write_configuration()
        self.say('MariaDB, RabbitMQ')
        self.start_rabbitmq()
        self.start_mariadb()
        self.say('API services')
        self.start_apis()
        self.register_services()
        self.warm_neutron()
        self.say('conductor, scheduler, computes')
        self.start_control()
        self.start_computes()
        self.say('flavors, images')
        self.make_flavors()
        self.make_images()
        self.say('the cloud is up')

    def down(self) -> None:
        """End every daemon that up() started, and remove their state."""
        self.stop_computes()
        daemons.stop([self.daemon(name) for name in (
            'nova-scheduler', 'nova-conductor', *API_MODULES)], PATIENCE)
        for name in ('rabbitmq', 'epmd', 'mariadb'):
            self.daemon(name).stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def restart_computes(self, options: config.Options | None = None,
                         eventlet: bool | None = None,
                         reinstall: bool = False,
                         host_options: dict[str, config.Options] | None = None
                         ) -> None:
        """Start every nova-compute anew, with other options where given.

        :param host_options: by host, what it alone has besides the others
        :param reinstall: take the repository's code as it is now.
        """
        if options is not None:
            self.options = options
            self.host_options = host_options or {}
        if eventlet is not None:
            self.eventlet = eventlet
        self.stop_computes()
        if reinstall:
            venv.install_project()
        self.start_computes()

    def daemon(self, name: str) -> daemons.Daemon:
        """One of the cloud's daemons, by name."""
        return daemons.Daemon(name, self.directory / 'run')

    def log(self, host: str) -> Path:
        """The log of a host's nova-compute."""
        return self.daemon(f'nova-compute-{host}').log

    # ---- configuration

    def write_configuration(self) -> None:
        """Write the configuration of the control plane."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o711)
        self.secrets.mkdir(exist_ok=True)
        self.secrets.chmod(0o777)
        for name in CONFIGURATIONS:
            self.configure(name)
        for name in ('images', 'tasks', 'staging'):
            (self.directory / 'glance' / name).mkdir(exist_ok=True)
        shutil.copy(venv.ROOT / 'etc/nova/api-paste.ini',
                    self.directory / 'nova')

    def configure(self, service: str,
                  options: config.Options | None = None) -> None:
        """Write the configuration of a service.

        :param options: what it has besides its own
        """
        path = self.configuration(service)
        path.parent.mkdir(exist_ok=True)
        path.write_text(config.render(config.merge(
            CONFIGURATIONS[service](self.site), options or {})))

    def configuration(self, service: str) -> Path:
        """The file with the configuration of a service."""
        stem = 'glance-api' if service == 'glance' else service
        return self.directory / service / f'{stem}.conf'

    def program(self, name: str, *arguments: str) -> list[str]:
        """The command line of a service's program, with its configuration."""
        path = self.configuration(name.partition('-')[0])
        return [venv.program(name), '--config-file', str(path), *arguments]

    def run(self, argv: list[str], **kwargs: Any) -> None:
        """Run a command; what it says goes to a log, and into the error."""
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, text=True,
                              env=daemons.base_environment(),
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, **kwargs)
        with (self.directory / 'run/commands.log').open('a') as log:
            log.write(f'$ {" ".join(argv)}\n{done.stdout}')
        if done.returncode:
            raise daemons.Failed(f'{argv}: status {done.returncode}\n'
                                 f'{done.stdout[-3000:]}')

    # ---- message queue and databases

    def start_rabbitmq(self) -> None:
        """Start RabbitMQ with an epmd of its own, and do not wait for it."""
        home = self.directory / 'rabbitmq'
        home.mkdir(exist_ok=True)
        (home / 'rabbitmq.conf').write_text(config.rabbitmq(self.site))
        (home / 'plugins').write_text('[].\n')
        erlang = {'HOME': str(home), 'ERL_EPMD_ADDRESS': '127.0.0.1',
                  'ERL_EPMD_PORT': str(self.site.epmd_port)}
        epmd = self.daemon('epmd')
        epmd.start(['/usr/bin/epmd'], env=erlang)
        epmd.wait('epmd', lambda: daemons.listening(
            '127.0.0.1', self.site.epmd_port))
        self.daemon('rabbitmq').start(
            ['/usr/lib/rabbitmq/bin/rabbitmq-server'], cwd=str(home),
            env={**erlang,
                 'RABBITMQ_NODENAME': 'lab@localhost',
                 'RABBITMQ_CONFIG_FILE': str(home / 'rabbitmq.conf'),
                 'RABBITMQ_CONF_ENV_FILE': '/dev/null',
                 'RABBITMQ_ENABLED_PLUGINS_FILE': str(home / 'plugins'),
                 'RABBITMQ_MNESIA_BASE': str(home / 'mnesia'),
                 'RABBITMQ_LOG_BASE': str(home / 'log'),
                 'RABBITMQ_DIST_PORT': str(self.site.epmd_port + 1000),
                 # Lets the start script become the Erlang VM, so that the
                 # recorded pid is the one to end.
                 'RUNNING_UNDER_SYSTEMD': 'true',
                 'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS':
                     '-kernel inet_dist_use_interface {127,0,0,1} '
                     '+sbwt none +sbwtdcpu none +sbwtdio none'})

    def wait_port(self, name: str) -> None:
        """Wait until a daemon takes connections."""
        self.daemon(name).wait('its port', lambda: daemons.listening(
            self.site.address, config.PORTS[name]))

    def wait_answer(self, name: str) -> None:
        """Wait until an API service answers.

        uWSGI takes connections before it has loaded the service.
        """
        self.daemon(name).wait('its answer', lambda: daemons.answering(
            self.site.address, config.PORTS[name]))

    def start_mariadb(self) -> None:
        """Start MariaDB with every service's schema.

        A data directory with fresh schemas is kept beside the environment,
        as making them takes a minute, and used while it fits.
        """
        data = self.directory / 'mariadb'
        kept = venv.ROOT / 'databases' / self.schema_key()
        incomplete = kept.with_name(f'{kept.name}.new')
        if not data.exists() and kept.is_dir():
            self.copy_databases(kept, self.directory)
        if data.exists():
            self.run_mariadb()
            return
        self.say('database schemas (kept for the next time)')
        self.make_mariadb(data)
        self.run_mariadb()
        self.make_schemas()
        self.daemon('mariadb').stop()
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True, mode=0o700)
        self.copy_databases(self.directory, incomplete)
        incomplete.rename(kept)
        self.run_mariadb()

    def schema_key(self) -> str:
        """Names what kept databases fit.

        The address is in Nova's cells and in keystone's catalogue.
        """
        return f'{venv.fingerprint()[:16]}-{self.site.address}'

    def copy_databases(self, source: Path, target: Path) -> None:
        """Copy a stopped MariaDB's data and keystone's keys."""
        for name in ('mariadb', 'keystone/fernet-keys'):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            self.run(['cp', '-a', '--sparse=always', str(source / name),
                      str(target / name)])

    def make_mariadb(self, data: Path) -> None:
        """Make an empty data directory."""
        self.run(['mysql_install_db', '--no-defaults', '--user=mysql',
                  '--auth-root-authentication-method=normal',
                  '--skip-test-db', '--skip-name-resolve',
                  f'--datadir={data}'])

    def run_mariadb(self) -> None:
        """Start MariaDB on its data directory."""
        self.daemon('mariadb').start(
            ['/usr/sbin/mariadbd', *config.mariadb(self.site)])
        self.wait_port('mariadb')

    def make_schemas(self) -> None:
        """Make the databases, and what has to be in them."""
        self.make_databases(config.DATABASES)
        self.make_keystone_keys()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for future in [pool.submit(step) for step in (
                    self.make_nova_schema, self.make_keystone_schema,
                    lambda: self.run(self.program(
                        'neutron-db-manage', 'upgrade', 'heads')),
                    lambda: self.run(self.program('glance-manage', 'db_sync')),
                    lambda: self.run(self.program(
                        'placement-manage', 'db', 'sync')))]:
                future.result()

    def make_databases(self, names: Iterable[str]) -> None:
        """Make empty databases, where missing, and who may use them."""
        statements = [f"CREATE USER IF NOT EXISTS lab@'%' IDENTIFIED BY "
                      f"'{config.PASSWORD}';"]
        for name in names:
            statements += [f'CREATE DATABASE IF NOT EXISTS {name};',
                           f"GRANT ALL ON {name}.* TO lab@'%';"]
        socket = self.directory / 'mariadb/sock'
        self.run(['mariadb', '--no-defaults', f'--socket={socket}', '-uroot',
                  '-e', ' '.join(statements)])

    def make_keystone_keys(self) -> None:
        """The two keys that Fernet tokens need."""
        keys = self.directory / 'keystone/fernet-keys'
        keys.mkdir(mode=0o700)
        for name in ('0', '1'):
            (keys / name).write_bytes(base64.urlsafe_b64encode(os.urandom(32)))

    def make_keystone_schema(self) -> None:
        """keystone's schema, administrator and own catalogue entry."""
        url = self.site.url('keystone', '/v3')
        self.run(self.program('keystone-manage', 'db_sync'))
        self.run(self.program(
            'keystone-manage', 'bootstrap',
            '--bootstrap-password', config.PASSWORD,
            '--bootstrap-region-id', config.REGION,
            '--bootstrap-admin-url', url, '--bootstrap-internal-url', url,
            '--bootstrap-public-url', url))

    def make_nova_schema(self) -> None:
        """Nova's three schemas and its one cell."""
        cell0 = self.site.database('nova_cell0')
        for arguments in (
                ('api_db', 'sync'),
                ('cell_v2', 'map_cell0', '--database_connection', cell0),
                ('db', 'sync'),
                ('cell_v2', 'create_cell', '--name', 'cell1')):
            self.run(self.program('nova-manage', *arguments))

    # ---- the control plane

    def start_apis(self) -> None:
        """Start the five API services and wait until each answers."""
        for name, module in API_MODULES.items():
            self.daemon(name).start(
                self.uwsgi(name, module), cwd=str(self.directory / name),
                env={f'OS_{name.upper()}_CONFIG_DIR':
                     str(self.directory / name),
                     'OS_NEUTRON_CONFIG_FILES': 'neutron.conf',
                     # As is the rule from Nova 33 on. An eventlet loses
                     # replies to the threads of uwsgi.
                     'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'true'})
        self.wait_port('rabbitmq')
        for name in API_MODULES:
            self.wait_answer(name)

    def restart_api(self, name: str,
                    options: config.Options | None = None) -> None:
        """Start an API service anew.

        :param options: what it has besides its own
        """
        self.configure(name, options)
        self.daemon(name).stop()
        self.start_apis()

    def uwsgi(self, name: str, module: str,
              root: Path = venv.ROOT) -> list[str]:
        """The command line of an API service.

        :param root: the environment that it is installed in
        """
        return [venv.program('uwsgi', root),
                '--http-socket', f'{self.site.address}:{config.PORTS[name]}',
                '--module', f'{module}:application',
                '--virtualenv', str(root),
                '--master', '--processes', '1', '--enable-threads',
                '--threads', '6', '--lazy-apps', '--need-app',
                '--die-on-term', '--buffer-size', '65535',
                # Nova sends snapshots in chunks of 1 MiB. With the two bytes
                # at its end such a chunk is beyond the default limit.
                '--http-chunked-input', '--chunked-input-limit', '2097152',
                '--disable-logging',
                '--add-header', 'Connection: close']

    def connection(self) -> Any:
        """openstacksdk's connection, as the administrator."""
        import openstack
        return openstack.connect(
            auth_url=self.site.url('keystone', '/v3'), username='admin',
            password=config.PASSWORD, project_name='admin',
            user_domain_name='Default', project_domain_name='Default',
            region_name=config.REGION, load_yaml_config=False,
            load_envvars=False, app_name='nova-lab',
            compute_default_microversion=MICROVERSION)

    def environment(self) -> dict[str, str]:
        """What the openstack command needs in its environment."""
        return {'OS_AUTH_URL': self.site.url('keystone', '/v3'),
                'OS_USERNAME': 'admin', 'OS_PASSWORD': config.PASSWORD,
                'OS_PROJECT_NAME': 'admin', 'OS_USER_DOMAIN_NAME': 'Default',
                'OS_PROJECT_DOMAIN_NAME': 'Default',
                'OS_IDENTITY_API_VERSION': '3',
                'OS_COMPUTE_API_VERSION': MICROVERSION}

    def register_services(
            self, catalogue: Mapping[str, tuple[str, str]] = CATALOGUE
    ) -> None:
        """Make the service users and the catalogue, where missing.

        :param catalogue: by name, a service's type and the path of its API
        """
        identity = self.connection().identity
        domain = 'default'
        if identity.find_project('service') is None:
            identity.create_project(name='service', domain_id=domain)
        project = identity.find_project('service')
        roles = {role.name: role for role in identity.roles()}
        if 'service' not in roles:
            roles['service'] = identity.create_role(name='service')
        known = {service.name for service in identity.services()}
        for name, (kind, path) in catalogue.items():
            if name in known:
                continue
            user = identity.create_user(
                name=name, password=config.PASSWORD, domain_id=domain,
                default_project_id=project.id)
            for role in ('admin', 'service'):
                identity.assign_project_role_to_user(
                    project, user, roles[role])
            service = identity.create_service(name=name, type=kind)
            for interface in ('public', 'internal', 'admin'):
                identity.create_endpoint(
                    service_id=service.id, interface=interface,
                    region_id=config.REGION, url=self.site.url(name, path))

    def warm_neutron(self) -> None:
        """Ask neutron for anything but ports.

        SQLAlchemy completes neutron's models at the first query. A list of
        ports uses them before it makes one, so as the first request it fails.
        """
        list(self.connection().network.networks())

    def start_control(self) -> None:
        """Start the conductor and the scheduler.

        They end at once where placement does not know them, so this is only
        for after register_services().
        """
        for name in ('nova-conductor', 'nova-scheduler'):
            self.daemon(name).start(self.program(name))

    # ---- compute hosts

    def start_computes(self) -> None:
        """Start every host's nova-compute and wait until the cloud sees it."""
        compute = self.connection().compute
        before = service_reports(compute)
        for host in self.lab.hosts:
            self.configure_host(host)
            self.start_compute(host)
        for host in self.lab.hosts:
            name = host.name
            self.daemon(f'nova-compute-{name}').wait(
                'a report to the cloud', functools.partial(
                    has_reported, compute, name, before.get(name)), 120)
        if not all(host.name in before for host in self.lab.hosts):
            self.run(self.program('nova-manage', 'cell_v2', 'discover_hosts'))

    def wait_computes(self) -> None:
        """Wait until the scheduler gives servers to every host.

        Nova takes a host away from it while its nova-compute does not report,
        or has no libvirtd to talk to.
        """
        compute = self.connection().compute
        daemons.wait_for('every nova-compute to be up and enabled', lambda: (
            {host.name for host in self.lab.hosts} == {
                service.host
                for service in compute.services(binary='nova-compute')
                if service.state == 'up' and service.status == 'enabled'}),
            seconds=150, poll=0.5)

    def stop_computes(self) -> None:
        """End every host's nova-compute."""
        daemons.stop([self.daemon(f'nova-compute-{host.name}')
                      for host in self.lab.hosts], PATIENCE)

    def start_compute(self, host: 'lab_module.Host') -> None:
        """Start one nova-compute as user nova."""
        program, *arguments = self.compute_program
        argv = [venv.program(program), *arguments,
                '--config-file', '/etc/nova/nova.conf']
        path = f'{venv.ROOT}/bin:/usr/sbin:/usr/bin:/sbin:/bin'
        self.daemon(f'nova-compute-{host.name}').start(
            host.command(argv, 'nova'),
            env=host.environment('nova', {
                'PATH': path, 'NOVA_LAB_SECRETS': str(self.secrets)}))

    def configure_host(self, host: 'lab_module.Host') -> None:
        """Give a host its /etc/nova, as an installed package would."""
        etc = host.path('/etc/nova')
        if not etc.is_dir():
            shutil.copytree(venv.ROOT / 'etc/nova', etc)
            (etc / 'rootwrap.conf').write_text(
                config.render(config.rootwrap()))
            host.set_sudoers(config.sudoers())
        options = config.merge(
            config.nova_compute(self.site, host.name, host.address),
            {'DEFAULT': {'concurrency_backend':
                         'eventlet' if self.eventlet else 'threading'}},
            self.options, self.host_options.get(host.name, {}))
        conf = etc / 'nova.conf'
        conf.write_text(config.render(options))
        os.chown(conf, 0, host.nova_gid)
        conf.chmod(0o640)

    # ---- what servers are made of

    def make_flavors(self) -> None:
        """Make the flavors, where missing."""
        compute = self.connection().compute
        known = {flavor.name for flavor in compute.flavors()}
        for name, (root, ephemeral, swap) in FLAVORS.items():
            if name not in known:
                flavor = compute.create_flavor(
                    name=name, ram=MEMORY_MIB, vcpus=1, disk=root,
                    ephemeral=ephemeral, swap=swap)
                compute.create_flavor_extra_specs(
                    flavor, EXTRA_SPECS.get(name, {}))

    def make_images(self) -> None:
        """Build the guest and upload it as each image, where missing."""
        from tools import guest
        image = self.connection().image
        known = {each.name for each in image.images()}
        raw = self.directory / 'guest.raw'
        if not raw.exists():
            guest.build(raw)
        for name, form in IMAGES.items():
            if name in known:
                continue
            path = raw.with_suffix(f'.{form}')
            if form != 'raw':
                self.run(['qemu-img', 'convert', '-O', form, str(raw),
                          str(path)])
            image.create_image(name=name, filename=str(path), wait=True,
                               disk_format=form, container_format='bare',
                               visibility='public',
                               **PROPERTIES.get(name, {}))


def service_reports(compute: Any) -> dict[str, str]:
    """When each nova-compute last reported, by host."""
    return {service.host: service.updated_at
            for service in compute.services(binary='nova-compute')
            if service.updated_at}


def has_reported(compute: Any, host: str, before: str | None) -> bool:
    """Whether a nova-compute has reported once more than before."""
    return service_reports(compute).get(host) != before


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('action',
                        choices=('up', 'down', 'restart-computes', 'env'))
    parser.add_argument('--eventlet', action='store_true',
                        help='run nova-compute under eventlet')
    parser.add_argument('--stock', action='store_true',
                        help="use Nova's own driver, not this project's")
    parser.add_argument('--ssh', action='store_true',
                        help='run an ssh daemon in each host')
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """The command line."""
    args = parse(arguments)
    from tools import lab as lab_module
    lab = lab_module.Lab()
    cloud = Cloud(lab, args.eventlet, {} if args.stock else STREAMS)
    if args.action == 'up':
        lab.up()
        if args.ssh:
            lab.ssh(True)
        cloud.up()
    elif args.action == 'restart-computes':
        cloud.restart_computes(reinstall=True)
    elif args.action == 'env':
        for name, value in cloud.environment().items():
            print(f'export {name}={value}')
        print(f'PATH={venv.ROOT}/bin:$PATH')
    else:
        cloud.down()
        lab.down()


if __name__ == '__main__':
    venv.ensure()
    venv.reexec('cloud')
    main(sys.argv[1:])
