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

"""Ceph for the small cloud, which only few tests need.

One monitor, one manager, without which there are no figures of free room, and
one OSD, which keeps all in memory. Nova, Glance and Cinder have a user and a
pool each. Ceph and its Python modules are Debian's.
"""

import contextlib
import functools
import os
from pathlib import Path
import shutil
from typing import TYPE_CHECKING
import uuid

from oslo_serialization import jsonutils
from oslo_utils import uuidutils

from tools import cloud as cloud_module
from tools import cloud_config as config
from tools import cloud_venv as venv
from tools import daemons
from tools import processes

if TYPE_CHECKING:
    from tools import lab as lab_module

# Pools by the user that owns them, who is also the service.
POOLS = {'nova': 'vms', 'glance': 'images', 'cinder': 'volumes'}
DAEMONS = ('ceph-mon', 'ceph-mgr', 'ceph-osd')
# Name of the store in Glance, beside its files.
STORE = 'ceph'
# Where a compute host has what it needs of Ceph.
HOST_DIRECTORY = '/etc/ceph'
# The UUIDs of libvirt's secrets, which have the keys of these users.
SECRETS = {user: str(uuid.uuid5(uuid.NAMESPACE_DNS, f'{user}-lab-ceph'))
           for user in ('nova', 'cinder')}
SECRET_XML = ("<secret ephemeral='no' private='no'><uuid>{secret}</uuid>"
              "<usage type='ceph'><name>client.{user}</name></usage></secret>")
START_SECONDS = 60
MODULES = Path('/usr/lib/python3/dist-packages')
# What a host of Nova says of it in nova.conf.
OPTIONS: config.Options = {
    'libvirt': {'images_type': 'rbd', 'images_rbd_pool': POOLS['nova'],
                'images_rbd_ceph_conf': f'{HOST_DIRECTORY}/ceph.conf',
                'rbd_user': 'nova', 'rbd_secret_uuid': SECRETS['nova'],
                'use_storage_pools': False}}


class Ceph:
    """The Ceph of one cloud, which has to be up."""

    def __init__(self, cloud: cloud_module.Cloud):
        self.cloud = cloud
        self.directory = cloud.directory / 'ceph'
        self.conf = self.directory / 'ceph.conf'
        self.keyring = self.directory / 'keyring'

    def up(self) -> None:
        """Bring Ceph up, and let Glance and all hosts use it."""
        self.cloud.say('Ceph')
        self.down()
        link_modules(venv.ROOT)
        for name in ('mon', 'mgr', 'osd'):
            (self.directory / name).mkdir(parents=True)
        self._configure()
        self._start_monitor()
        self._start_manager()
        self._start_osd()
        for user, pool in POOLS.items():
            self._make_pool(user, pool)
        for host in self.cloud.lab.hosts:
            self._introduce(host)
        self.cloud.restart_api('glance', self._glance())
        self.cloud.say('Ceph is up')

    def down(self) -> None:
        """End it, and remove its files; nothing where there is none."""
        if not self.directory.exists():
            return
        self.cloud.restart_api('glance')
        for host in self.cloud.lab.hosts:
            for secret in SECRETS.values():
                host.run(['virsh', 'secret-undefine', secret], check=False)
            shutil.rmtree(host.path(HOST_DIRECTORY))
        daemons.stop(map(self.cloud.daemon, DAEMONS), 10)
        shutil.rmtree(self.directory)

    # ---- what is in it

    def images(self, pool: str) -> set[str]:
        """The names of the images in a pool."""
        return set(self._rbd('ls', pool).split())

    def snapshots(self, pool: str, image: str) -> set[str]:
        """The names of the snapshots of an image."""
        said = self._rbd('snap', 'ls', '--format=json', f'{pool}/{image}')
        return {snapshot['name']
                for snapshot in jsonutils.loads(said)}

    def take_snapshot(self, pool: str, image: str, name: str) -> None:
        """Take a snapshot of an image."""
        self._rbd('snap', 'create', f'{pool}/{image}@{name}')

    def info(self, pool: str, image: str) -> dict:
        """What Ceph says of an image: its size, its parent, ..."""
        return jsonutils.loads(self._rbd(
            'info', '--format=json', f'{pool}/{image}'))

    def upload(self, name: str, path: Path) -> str:
        """Make a raw image in Glance that is in Ceph.

        :returns: its id
        """
        image = self.cloud.connection().image
        made = image.create_image(
            name=name, disk_format='raw', container_format='bare')
        with path.open('rb') as data:
            image.put(f'/images/{made.id}/file', data=data, headers={
                'Content-Type': 'application/octet-stream',
                'X-Image-Meta-Store': STORE}).raise_for_status()
        return made.id

    def backend(self, root: Path) -> dict[str, object]:
        """The options of a backend of Cinder.

        :param root: Cinder's environment, which gets Ceph's modules
        """
        link_modules(root)
        return {'volume_driver': 'cinder.volume.drivers.rbd.RBDDriver',
                'rbd_pool': POOLS['cinder'], 'rbd_user': 'cinder',
                'rbd_secret_uuid': SECRETS['cinder'],
                'rbd_ceph_conf': self.conf}

    # ---- how it is made

    def _configure(self) -> None:
        address = self.cloud.site.address
        state = self.directory
        self._common = {
            'fsid': uuidutils.generate_uuid(),
            'mon_host': f'{address}:6789',
            'auth_cluster_required': 'cephx',
            'auth_service_required': 'cephx',
            'auth_client_required': 'cephx'}
        self.conf.write_text(config.render({'global': {
            **self._common,
            'public_addr': address, 'keyring': self.keyring,
            'mon_data': state / 'mon', 'mgr_data': state / 'mgr',
            'osd_data': state / 'osd', 'run_dir': state,
            'admin_socket': state / '$name.asok',
            'log_file': state / '$name.log',
            'osd_pool_default_size': 1, 'osd_pool_default_min_size': 1,
            'osd_crush_chooseleaf_type': 0, 'mon_allow_pool_size_one': True,
            # What a full disk of the machine is to others.
            'mon_data_avail_crit': 1,
            'osd_objectstore': 'memstore',
            'memstore_device_bytes': 32 * 1024 ** 3}}))

    def _start_monitor(self) -> None:
        tool = ('ceph-authtool', self.keyring, '--gen-key')
        processes.execute(*tool, '--create-keyring', '-n', 'mon.',
                          '--cap', 'mon', 'allow *')
        processes.execute(*tool, '-n', 'client.admin', *(
            word for kind in ('mon', 'mgr', 'osd')
            for word in ('--cap', kind, 'allow *')))
        monmap = self.directory / 'monmap'
        processes.execute(
            'monmaptool', '--create', '--fsid', self._common['fsid'],
            '--addv', 'a', f'[v1:{self._common["mon_host"]}]', monmap)
        self._run('ceph-mon', '--mkfs', '-i', 'a', '--monmap', monmap,
                  '--keyring', self.keyring)
        self._start('ceph-mon', 'a')

    def _start_manager(self) -> None:
        self._make_user('mgr.a', mon='allow profile mgr', osd='allow *')
        self._start('ceph-mgr', 'a')

    def _start_osd(self) -> None:
        identity = uuidutils.generate_uuid()
        number = self._ceph('osd', 'new', identity).strip()
        self._make_user(f'osd.{number}', mon='allow profile osd',
                        mgr='allow profile osd', osd='allow *')
        self._run('ceph-osd', '-i', number, '--mkfs', '--osd-uuid', identity,
                  '--no-mon-config')
        self._start('ceph-osd', number)
        self.cloud.daemon('ceph-osd').wait('the OSD', lambda: (
            jsonutils.loads(self._ceph('osd', 'stat', '--format=json'))[
                'num_up_osds']), START_SECONDS)

    def _make_pool(self, user: str, pool: str) -> None:
        self._ceph('osd', 'pool', 'create', pool, '8')
        self._rbd('pool', 'init', pool)
        self._make_user(f'client.{user}', mon='profile rbd',
                        osd=', '.join(f'profile rbd pool={each}'
                                      for each in POOLS.values()))

    def _make_user(self, name: str, **capabilities: str) -> None:
        words = [word for item in capabilities.items() for word in item]
        key = self._ceph('auth', 'get-or-create', name, *words)
        with self.keyring.open('a') as keyring:
            keyring.write(key)

    def _introduce(self, host: 'lab_module.Host') -> None:
        """Let nova-compute and libvirt of a host use Ceph."""
        directory = host.path(HOST_DIRECTORY)
        directory.mkdir(exist_ok=True)
        (directory / 'ceph.conf').write_text(
            config.render({'global': self._common}))
        keyring = directory / 'ceph.client.nova.keyring'
        keyring.touch(mode=0o600)
        keyring.write_text(self._ceph('auth', 'get', 'client.nova'))
        os.chown(keyring, host.nova_uid, host.nova_gid)
        for user, secret in SECRETS.items():
            host.run(['virsh', 'secret-define', '/dev/stdin'],
                     input=SECRET_XML.format(user=user, secret=secret))
            host.run(['virsh', 'secret-set-value', secret,
                      '--file', '/dev/stdin'],
                     input=self._ceph('auth', 'print-key', f'client.{user}'))

    def _glance(self) -> config.Options:
        return {
            'DEFAULT': {'enabled_backends': f'file:file, {STORE}:rbd',
                        # Nova clones an image only where it knows of it.
                        'show_image_direct_url': True},
            STORE: {'rbd_store_pool': POOLS['glance'],
                    'rbd_store_user': 'glance',
                    'rbd_store_ceph_conf': self.conf}}

    # ---- programs

    def _start(self, program: str, name: str) -> None:
        self.cloud.daemon(program).start(
            [program, '-f', '-c', str(self.conf), '-i', name])

    def _run(self, program: str, *arguments: str | os.PathLike) -> str:
        return processes.execute(
            program, '-c', self.conf, *arguments).stdout

    _ceph = functools.partialmethod(
        _run, 'ceph', '--connect-timeout', str(START_SECONDS))
    _rbd = functools.partialmethod(_run, 'rbd')


def link_modules(root: Path) -> None:
    """Let an environment have Ceph's modules for Python.

    They are not on PyPI. The environment is made with Debian's Python.
    """
    packages = next(root.glob('lib/python3*/site-packages'))
    for path in MODULES.glob('r[ab]d*.so'):
        with contextlib.suppress(FileExistsError):
            (packages / path.name).symlink_to(path)
