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

"""nova-compute's driver without the rest of a cloud, as the user nova.

It runs on a host with that host's nova.conf, reads lines of JSON from
standard input, each of which names a function of FUNCTIONS with its
arguments, and answers with what that returns, or with the error.

The driver, libvirt and QEMU are real. The conductor is not: it knows the one
migration that is under way, and forgets what it is told to save. Other hosts'
nova-compute do not answer. Glance has the image that lies on the host, and the
snapshot that was made last. Servers have what describe() was told.
"""

from concurrent import futures
import dataclasses
import functools
import os
import shlex
import shutil
import sys
import time
import traceback
from typing import Any
from typing import Callable

from lxml import etree
import oslo_messaging
from oslo_privsep import priv_context
from oslo_serialization import jsonutils

from nova.compute import manager
from nova.compute import power_state
from nova.compute import rpcapi
from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import config
from nova import context as nova_context
from nova import exception
from nova.network import model
from nova import objects
from nova.objects import base
from nova import utils
from nova.virt import fake
from nova.virt import images
from nova.virt.libvirt import storage_migrate

CONF = nova.conf.CONF
IMAGE = '/var/lib/nova/image.raw'
IMAGE_ID = '155d900f-4e14-4e4c-a73d-069cbf4541e6'
SNAPSHOT = '/var/lib/nova/snapshot.raw'
SNAPSHOT_ID = '7d0c3a52-91be-4f0e-8f27-0a5b6c1d9e38'
MIGRATION_ID = 1
MEMORY_MIB = 64


@dataclasses.dataclass
class Server:
    """What servers have.

    :ivar ephemerals: GiB of each ephemeral disk
    :ivar root_gb: GiB of the root disk, 0 for those of the image
    :ivar swap: MiB of the swap disk
    :ivar properties: of the image
    :ivar image: id of the image
    """
    ephemerals: list[int] = dataclasses.field(default_factory=list)
    root_gb: int = 1
    swap: int = 0
    properties: dict[str, str] = dataclasses.field(default_factory=dict)
    image: str = IMAGE_ID


SERVER = Server()


class Conductor:
    """What the objects of a nova-compute ask for the database."""

    def object_action(self, context: Any, objinst: Any, objmethod: str,
                      args: Any, kwargs: Any) -> tuple[dict, None]:
        """Save an object, or refresh it: it is what it was."""
        if objmethod not in ('save', 'refresh'):
            raise NotImplementedError(f'{objinst.obj_name()}.{objmethod}')
        return {}, None

    def object_class_action(self, context: Any, objname: str, objmethod: str,
                            objver: str, args: Any, kwargs: Any) -> Any:
        """Look something up.

        There is one migration, lists are empty, and servers are all there.
        """
        if objname == 'Migration':
            return migration(context)
        if objname == 'Instance':
            return make_instance(context, args[0])
        if objname.endswith('List'):
            return getattr(objects, objname)(objects=[])
        if objname == 'Service':
            raise exception.ComputeHostNotFound(host=CONF.host)
        raise NotImplementedError(f'{objname}.{objmethod}')

    object_class_action_versions = object_class_action


class OtherHosts:
    """The calls that a nova-compute makes of another host's."""

    def check_instance_shared_storage(self, *args: Any, **kwargs: Any) -> bool:
        """Time out, as no other host is asked."""
        raise oslo_messaging.MessagingTimeout('there is no message queue')


class Glance:
    """Has one image of raw format, and a snapshot once it is made."""

    paths = {IMAGE_ID: IMAGE, SNAPSHOT_ID: SNAPSHOT}

    def get(self, context: Any, image_id: str, **kwargs: Any) -> dict:
        path = self.paths[image_id]
        return {'id': image_id, 'name': 'image', 'disk_format': 'raw',
                'status': 'active', 'container_format': 'bare',
                'properties': {}, 'min_disk': 0, 'min_ram': 0,
                'size': os.path.getsize(path) if os.path.exists(path) else 0}

    def download(self, context: Any, image_id: str, dest_path: str,
                 *args: Any, **kwargs: Any) -> None:
        shutil.copyfile(self.paths[image_id], dest_path)

    def update(self, context: Any, image_id: str, metadata: dict,
               data: Any) -> None:
        """Upload an image."""
        with open(self.paths[image_id], 'wb') as image:
            shutil.copyfileobj(data, image)


class Network:
    """The part of Neutron that the driver calls."""

    def has_port_binding_extension(self, context: Any) -> bool:
        return False


class Compute:
    """The calls that a compute manager makes of its driver."""

    def __init__(self, source: str) -> None:
        self.context = nova_context.get_admin_context()
        self.driver = storage_migrate.LibvirtDriver(fake.FakeVirtAPI())
        self.driver.init_host(source)
        self.driver._network_api = Network()
        self.driver._image_api = images.IMAGE_API
        self._pool = futures.ThreadPoolExecutor(1)
        self._live: futures.Future
        if not self.driver._host.has_min_version((9, 2, 0)):
            self.driver._get_guest_xml = functools.partial(
                without_secure, self.driver._get_guest_xml)

    def describe(self, **server: Any) -> None:
        """Say what servers have from now on, see Server."""
        vars(SERVER).update(vars(Server(**server)))

    def spawn(self, uuid: str) -> str:
        """Make a server and start it."""
        instance = make_instance(self.context, uuid)
        self.driver.spawn(
            self.context, instance, image_meta(), [], None, {},
            network_info(), block_devices())
        return self.state(uuid)

    def migrate(self, uuid: str, dest: str,
                root_gb: int | None = None) -> str:
        """Take a server's disks to the host of an address.

        :param root_gb: of the flavor that it is resized to
        """
        instance = make_instance(self.context, uuid)
        flavor = instance.flavor.obj_clone()
        if root_gb is not None:
            flavor.root_gb = root_gb
        return self.driver.migrate_disk_and_power_off(
            self.context, instance, dest, flavor, network_info(),
            block_devices(), timeout=0)

    def finish(self, uuid: str, disk_info: str) -> str:
        """Start a server that has come."""
        instance = make_instance(self.context, uuid)
        self.driver.finish_migration(
            self.context, migration(self.context), instance, disk_info,
            network_info(), image_meta(), False, {}, block_devices())
        return self.state(uuid)

    def confirm(self, uuid: str) -> None:
        """Delete what is kept of a server that has gone."""
        instance = make_instance(self.context, uuid, host='elsewhere')
        self.driver.confirm_migration(
            self.context, migration(self.context), instance, network_info())

    def finish_revert(self, uuid: str) -> str:
        """Start a server that is to be here again."""
        instance = make_instance(self.context, uuid)
        self.driver.finish_revert_migration(
            self.context, instance, network_info(), migration(self.context),
            block_devices())
        return self.state(uuid)

    def destroy(self, uuid: str, with_disks: bool = True) -> None:
        """Delete a server, and its disks."""
        instance = make_instance(self.context, uuid)
        self.driver.destroy(
            self.context, instance, network_info(), block_devices(),
            with_disks)

    def stop(self, uuid: str) -> None:
        """Power a server off."""
        self.driver.power_off(make_instance(self.context, uuid))

    def start(self, uuid: str) -> str:
        """Power a server on."""
        self.driver.power_on(
            self.context, make_instance(self.context, uuid), network_info(),
            block_devices())
        return self.state(uuid)

    def suspend(self, uuid: str) -> str:
        """Save a server's memory, and power it off."""
        self.driver.suspend(self.context, make_instance(self.context, uuid))
        return self.state(uuid)

    def resume(self, uuid: str) -> str:
        """Let it go on from there."""
        self.driver.resume(
            self.context, make_instance(self.context, uuid), network_info(),
            block_devices())
        return self.state(uuid)

    def rescue(self, uuid: str) -> str:
        """Start a server from a new disk of its image."""
        self.driver.rescue(
            self.context, make_instance(self.context, uuid), network_info(),
            image_meta(), 'password', block_devices(), [])
        return self.state(uuid)

    def unrescue(self, uuid: str) -> str:
        """Start it from its own disk again."""
        self.driver.unrescue(self.context, make_instance(self.context, uuid))
        return self.state(uuid)

    def snapshot(self, uuid: str) -> str:
        """Make the snapshot of a server's root disk."""
        self.driver.snapshot(
            self.context, make_instance(self.context, uuid), SNAPSHOT_ID,
            lambda *args, **kwargs: None)
        return self.state(uuid)

    def hard_reboot(self, uuid: str) -> str:
        """Define a server anew and start it."""
        instance = make_instance(self.context, uuid)
        self.driver.reboot(
            self.context, instance, network_info(), 'HARD', block_devices())
        return self.state(uuid)

    def state(self, uuid: str) -> str:
        """Whether a server runs, as the driver sees it."""
        info = self.driver.get_info(make_instance(self.context, uuid))
        return power_state.STATE_MAP[info.state]

    # Live migration: what a manager calls on the one host and the other.

    def resources(self) -> dict[str, Any]:
        """Tell of this host what is compared before a live migration."""
        found = self.driver.get_available_resource(CONF.host)
        return {name: found[name]
                for name in ('cpu_info', 'disk_available_least')}

    def check_destination(self, uuid: str, source: str,
                          resources: dict[str, Any]) -> dict[str, Any]:
        """Let this host check whether it can take a server.

        :param resources: of the host that the server is on
        """
        instance = make_migrating(self.context, uuid, source)
        return self._pack(self.driver.check_can_live_migrate_destination(
            self.context, instance, resources, self.resources(),
            block_migration=None, disk_over_commit=None))

    def check_source(self, uuid: str, data: dict[str, Any]) -> dict[str, Any]:
        """Let the host that a server is on check that, too."""
        return self._pack(self.driver.check_can_live_migrate_source(
            self.context, make_migrating(self.context, uuid),
            self._unpack(data), block_devices()))

    def end_check(self, data: dict[str, Any]) -> None:
        """Delete what the check has made on the destination."""
        self.driver.cleanup_live_migration_destination_check(
            self.context, self._unpack(data))

    def prepare_live(self, uuid: str, source: str,
                     data: dict[str, Any]) -> dict[str, Any]:
        """Make ready for a server whose disks are here already."""
        return self._pack(self.driver.pre_live_migration(
            self.context, make_migrating(self.context, uuid, source),
            block_devices(), network_info(), None, self._unpack(data)))

    def begin_live(self, uuid: str, dest: str, data: dict[str, Any]) -> None:
        """Begin to live migrate a server to the host of an address."""
        self._live = self._pool.submit(
            self._migrate_live, uuid, dest, self._unpack(data))

    def abort_live(self, uuid: str) -> None:
        """Abort that, as soon as QEMU has begun to send memory."""
        instance = make_migrating(self.context, uuid)
        guest = self.driver._host.get_guest(instance)
        while not guest.get_job_info().memory_total:
            if self._live.done():
                raise RuntimeError('the live migration is over')
            time.sleep(0.1)
        self.driver.live_migration_abort(instance)

    def end_live(self) -> list[Any]:
        """Wait for the end of the live migration.

        :returns: its status, whether the manager would clean up the host on
            which the server is not, and whether delete the disks there
        """
        return self._live.result()

    def _migrate_live(self, uuid: str, dest: str, data: Any) -> list[Any]:
        instance = make_migrating(self.context, uuid)
        status = []

        def complete(*args: Any, **kwargs: Any) -> None:
            self.driver.post_live_migration(
                self.context, instance, block_devices(), data)
            self.driver.post_live_migration_at_source(
                self.context, instance, network_info())
            status.append('completed')

        def roll_back(*args: Any, migration_status: str = 'failed') -> None:
            self.driver.rollback_live_migration_at_source(
                self.context, instance, data)
            status.append(migration_status)

        data.migration = migration(self.context)
        self.driver.live_migration(
            self.context, instance, dest, complete, roll_back,
            data.block_migration, data)
        return [*status,
                *manager.ComputeManager._live_migration_cleanup_flags(
                    None, data)]

    def finish_live(self, uuid: str, source: str) -> str:
        """Take over a server that has come."""
        instance = make_migrating(self.context, uuid, source)
        self.driver.post_live_migration_at_destination(
            self.context, instance, network_info(), False, block_devices())
        return self.state(uuid)

    def _pack(self, data: Any) -> dict[str, Any]:
        return base.NovaObjectSerializer().serialize_entity(
            self.context, data)

    def _unpack(self, data: dict[str, Any]) -> Any:
        return base.NovaObjectSerializer().deserialize_entity(
            self.context, data)

    # Evacuation from a host that is down, and what happens when it is back.

    def is_on_disk(self, uuid: str, source: str) -> bool:
        """Whether this host has the disks of another's server."""
        return self.driver.instance_on_disk(
            make_instance(self.context, uuid, source))

    def evacuate(self, uuid: str, source: str) -> str:
        """Start another host's server from the disks that are here."""
        instance = make_instance(self.context, uuid, source)
        instance.task_state = task_states.REBUILD_SPAWNING
        self.driver.spawn(
            self.context, instance, image_meta(), [], None, {},
            network_info(), block_devices())
        return self.state(uuid)

    def mark(self, uuid: str) -> dict[str, str] | None:
        """Make what hosts see that share a server's storage."""
        return self.driver.check_instance_shared_storage_local(
            self.context, make_instance(self.context, uuid, 'elsewhere'))

    def sees(self, mark: dict[str, str]) -> bool:
        """Whether this host sees it."""
        return self.driver.check_instance_shared_storage_remote(
            self.context, mark)

    def unmark(self, mark: dict[str, str]) -> None:
        """Delete it."""
        self.driver.check_instance_shared_storage_cleanup(self.context, mark)


def make_migrating(context: Any, uuid: str,
                   host: str | None = None) -> 'objects.Instance':
    """A server that is live migrated."""
    instance = make_instance(context, uuid, host)
    instance.task_state = task_states.MIGRATING
    return instance


def make_instance(context: Any, uuid: str,
                  host: str | None = None) -> 'objects.Instance':
    """The server, as the manager would have it from the conductor."""
    ephemeral_gb = sum(SERVER.ephemerals)
    flavor = objects.Flavor(
        id=1, name='tiny', flavorid='1', memory_mb=MEMORY_MIB, vcpus=1,
        root_gb=SERVER.root_gb, ephemeral_gb=ephemeral_gb, swap=SERVER.swap,
        rxtx_factor=1,
        vcpu_weight=0, disabled=False, is_public=True, extra_specs={})
    return objects.Instance(
        context, id=int(uuid[:7], 16), uuid=uuid, host=host or CONF.host,
        node=CONF.host, flavor=flavor, old_flavor=flavor, new_flavor=flavor,
        image_ref=SERVER.image, kernel_id='', ramdisk_id='',
        display_name='tiny', hostname='tiny', user_id='user',
        project_id='project', memory_mb=MEMORY_MIB, vcpus=1,
        root_gb=SERVER.root_gb,
        ephemeral_gb=ephemeral_gb, os_type=None, architecture=None,
        vm_mode=None, vm_state=vm_states.ACTIVE, task_state=None,
        deleted=False,
        power_state=1, progress=0, auto_disk_config=False, config_drive='',
        root_device_name='/dev/vda', default_ephemeral_device=None,
        default_swap_device=None, key_data=None, key_name=None,
        user_data=None, access_ip_v4=None, access_ip_v6=None,
        availability_zone=None, launched_at=None, locked=False,
        numa_topology=None, pci_devices=objects.PciDeviceList(objects=[]),
        pci_requests=objects.InstancePCIRequests(
            instance_uuid=uuid, requests=[]),
        device_metadata=None, ephemeral_key_uuid=None, hidden=False,
        trusted_certs=None, vcpu_model=None, resources=None,
        keypairs=objects.KeyPairList(objects=[]), metadata={},
        tags=objects.TagList(objects=[]),
        system_metadata={'image_disk_format': 'raw', **{
            f'image_{name}': value
            for name, value in SERVER.properties.items()}},
        migration_context=objects.MigrationContext(
            instance_uuid=uuid, migration_id=MIGRATION_ID,
            old_numa_topology=None, new_numa_topology=None,
            old_pci_devices=None, new_pci_devices=None,
            old_pci_requests=None, new_pci_requests=None,
            old_resources=None, new_resources=None),
        info_cache=objects.InstanceInfoCache(
            instance_uuid=uuid, network_info=network_info()))


def migration(context: Any) -> 'objects.Migration':
    """The migration, whichever it is."""
    return objects.Migration(
        context, id=MIGRATION_ID, status='migrating',
        migration_type='migration', source_compute=CONF.host,
        dest_compute='elsewhere', memory_total=None, memory_processed=None,
        memory_remaining=None, disk_total=None, disk_processed=None,
        disk_remaining=None)


def image_meta() -> 'objects.ImageMeta':
    """What Nova keeps of the image."""
    return objects.ImageMeta.from_dict({
        'id': SERVER.image, 'disk_format': 'raw', 'container_format': 'bare',
        'size': os.path.getsize(Glance.paths[SERVER.image]), 'min_disk': 0,
        'min_ram': 0,
        'properties': SERVER.properties})


def network_info() -> Any:
    """No network."""
    return model.NetworkInfo([])


def block_devices() -> dict[str, Any]:
    """A root disk, the ephemeral ones and the swap disk."""
    ephemerals = [
        {'num': number, 'virtual_name': f'ephemeral{number}', 'size': size,
         'guest_format': None, 'device_type': 'disk',
         'disk_bus': 'virtio', 'device_name': f'/dev/vd{"bcd"[number]}'}
        for number, size in enumerate(SERVER.ephemerals)]
    swap = None
    if SERVER.swap:
        swap = {'swap_size': SERVER.swap, 'device_name': '/dev/vde',
                'device_type': 'disk', 'disk_bus': 'virtio'}
    return {'root_device_name': '/dev/vda', 'image': [],
            'ephemerals': ephemerals,
            'swap': swap, 'block_device_mapping': []}


def without_secure(get_guest_xml: Callable, *args: Any, **kwargs: Any) -> str:
    """The XML of a domain as libvirt before 9.2 takes it.

    Nova 34 gives the loader an attribute that such a libvirt refuses where it
    selects the firmware. The element that replaces it is there, too.
    """
    domain = etree.fromstring(get_guest_xml(*args, **kwargs))
    for system in domain.findall('os[@firmware]'):
        for loader in system.findall('loader'):
            system.remove(loader)
    return etree.tostring(domain, encoding='unicode')


def serve() -> None:
    """Do what is asked until there is no more."""
    compute = Compute(CONF.host)
    answer({'uid': os.getuid()})
    for line in sys.stdin:
        name, arguments = jsonutils.loads(line)
        try:
            answer({'result': getattr(compute, name)(**arguments)})
        except Exception as error:
            traceback.print_exc()
            answer({'error': f'{type(error).__name__}: {error}'})


def answer(what: dict[str, Any]) -> None:
    """Say something to whoever asked."""
    print(jsonutils.dumps(what), flush=True)


def main() -> None:
    config.parse_args(sys.argv)
    # As nova.cmd.compute and its manager do.
    nova.conf.neutron.register_dynamic_opts(CONF)
    nova.conf.devices.register_dynamic_opts(CONF)
    priv_context.init(root_helper=shlex.split(utils.get_root_helper()))
    objects.register_all()
    base.NovaObject.indirection_api = Conductor()
    images.IMAGE_API = Glance()
    rpcapi.ComputeAPI = OtherHosts
    serve()
    sys.stdout.flush()
    # Nova's threads do not end by themselves.
    os._exit(0)


if __name__ == '__main__':
    main()
