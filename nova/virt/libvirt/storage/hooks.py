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

"""The parts of Nova's driver that this one relies on, in every release.

None of them is an interface that Nova promises to keep. nova-compute checks it
as it starts, and the documentation lists it.
"""

import dataclasses
import inspect
import typing as ty

from nova import version
from nova.virt.libvirt import driver

# The releases of Nova that the tests run with, the oldest first.
RELEASES = (31, 32, 33, 34)


@dataclasses.dataclass(frozen=True)
class Hook:
    """A method of Nova's driver that this project overrides or calls.

    :ivar parameters: names that it has to take, in every release
    :ivar reason: what the driver relies on it for
    :ivar overridden: False if the driver only calls it
    """

    parameters: tuple[str, ...]
    reason: str
    overridden: bool = True


HOOKS = {
    'init_host': Hook(
        ('host',),
        'Makes the pools, and puts right the migrations that an end of '
        'nova-compute interrupted, before Nova loads its servers.'),
    'cleanup_host': Hook(
        ('host',),
        'Stops copies as nova-compute ends. Before 34 Nova waits for them '
        'first, so that there is none to stop.'),
    'migrate_disk_and_power_off': Hook(
        ('context', 'instance', 'dest', 'flavor', 'network_info',
         'block_device_info', 'timeout', 'retry_interval'),
        'Copies the disks. InstanceFaultRollback leaves the server as it '
        'was.'),
    'finish_migration': Hook(
        ('context', 'migration', 'instance', 'disk_info', 'network_info',
         'image_meta', 'resize_instance', 'allocations', 'block_device_info',
         'power_on'),
        'Takes over the disks that came, then starts the server as Nova '
        'does.'),
    'confirm_migration': Hook(
        ('context', 'migration', 'instance', 'network_info'),
        'Deletes what the source kept for a revert.'),
    'finish_revert_migration': Hook(
        ('context', 'instance', 'network_info', 'migration',
         'block_device_info', 'power_on'),
        'Restores what the source kept, then starts the server as Nova '
        'does.'),
    '_finish_migration_vtpm': Hook(
        ('context', 'instance'),
        'Deletes the state of a vTPM that is in the way of the one that '
        'came.'),
    '_finish_revert_migration_vtpm': Hook(
        ('context', 'instance'),
        'Puts the state of a vTPM back. Nova calls it as it starts, too, '
        'when the server has no old flavor yet.'),
    'check_can_live_migrate_destination': Hook(
        ('context', 'instance', 'src_compute_info', 'dst_compute_info',
         'block_migration', 'disk_over_commit'),
        'Tells the source host where the disks are to be on this host.'),
    'cleanup_live_migration_destination_check': Hook(
        ('context', 'dest_check_data'),
        'Deletes the file that shows whether hosts share the pool.'),
    'check_can_live_migrate_source': Hook(
        ('context', 'instance', 'dest_check_data', 'block_device_info'),
        'Refuses a live migration to a host that cannot take the disks, and '
        'lists the files that QEMU does not copy.'),
    '_check_shared_storage_test_file': Hook(
        ('filename', 'instance'),
        'Finds out whether the destination host sees the instances '
        'directory.', overridden=False),
    '_is_shared_block_storage': Hook(
        ('instance', 'dest_check_data', 'block_device_info'),
        'Finds out whether the destination host sees disks in the pool.'),
    'pre_live_migration': Hook(
        ('context', 'instance', 'block_device_info', 'network_info',
         'disk_info', 'migrate_data'),
        'Has the disks of a server that is live migrated made where they are '
        'to be.'),
    'live_migration': Hook(
        ('context', 'instance', 'dest', 'post_method', 'recover_method',
         'block_migration', 'migrate_data'),
        'Has Nova delete the disks here only if the server has moved.'),
    '_live_migration_operation': Hook(
        ('context', 'instance', 'dest', 'block_migration', 'migrate_data',
         'guest', 'device_names'),
        'Sends the files that QEMU does not copy, and gives the domain the '
        'paths of the destination host.'),
    'live_migration_abort': Hook(
        ('instance',), 'Stops sending these files.'),
    'rollback_live_migration_at_destination': Hook(
        ('context', 'instance', 'network_info', 'block_device_info',
         'destroy_disks', 'migrate_data'),
        'Deletes what was made under the claim, and nothing else.'),
    'post_live_migration_at_destination': Hook(
        ('context', 'instance', 'network_info', 'block_migration',
         'block_device_info'),
        "Lets the files be the server's own."),
    'instance_on_disk': Hook(
        ('instance',),
        'Tells an evacuation whether the disks are here.'),
    'check_instance_shared_storage_local': Hook(
        ('context', 'instance'),
        'Makes a marker, by which another host finds out whether the pool is '
        'shared.'),
    'check_instance_shared_storage_remote': Hook(
        ('context', 'data'),
        'Looks for that marker, or writes what has arrived to stable '
        'storage.'),
    'check_instance_shared_storage_cleanup': Hook(
        ('context', 'data'), 'Deletes that marker.'),
    'cleanup': Hook(
        ('context', 'instance', 'network_info', 'block_device_info',
         'destroy_disks'),
        'Deletes, when a migration is reverted, the instance directory of a '
        'server with disks in Ceph, and the disks that only the new flavor '
        'has.'),
    'delete_instance_files': Hook(
        ('instance',),
        'Deletes the volumes of a server, and stops their copy.'),
    'spawn': Hook(
        ('context', 'instance', 'image_meta'),
        'Deletes what a migration left here of a server that starts anew.'),
    '_hard_reboot': Hook(
        ('context', 'instance', 'network_info'),
        'Recovers the instance directory of a server that starts again.'),
    '_disk_raw_to_qcow2': Hook(
        ('path',),
        'Makes an image of a raw disk that came to a host with images.',
        overridden=False),
    '_get_guest_config': Hook(
        ('instance', 'network_info'),
        'Names the UEFI variables that came along in the domain.'),
    '_undefine_domain': Hook(
        ('instance',),
        'Keeps the UEFI variables that are in the instance directory.'),
    '_create_image': Hook(
        ('context', 'instance', 'disk_mapping', 'injection_info', 'suffix',
         'disk_images', 'block_device_info', 'fallback_from_host',
         'ignore_bdi_for_swap'),
        'Grows an ephemeral disk in a resize.'),
    '_needs_rebase_original_qcow2_image': Hook(
        ('instance', 'backend'),
        'Leaves a full image in the pool without a base image when its server '
        'is unshelved or comes from another cell.'),
    '_create_images_and_backing': Hook(
        ('context', 'instance', 'instance_dir', 'disk_info',
         'fallback_from_host'),
        'Looks for disks where they are: in the pool.'),
    '_fetch_instance_kernel_ramdisk': Hook(
        ('context', 'instance', 'fallback_from_host'),
        'Leaves kernel and ramdisk of a server that is live migrated to the '
        'source host.'),
    '_is_path_shared_with': Hook(
        ('dest', 'path'),
        'Finds out without ssh whether two hosts share a directory.'),
    'get_available_resource': Hook(
        ('nodename',),
        'Comes every minute: a time to delete what failed migrations left, '
        'and to tell other hosts the room here.'),
    'disk_cachemode': Hook(
        (), 'Looks whether the pool supports O_DIRECT.'),
    '_get_local_gb_info': Hook(
        (), 'Reports the size of the file system of the pool.'),
    'power_on': Hook(
        ('context', 'instance', 'network_info', 'block_device_info',
         'share_info'),
        'Starts the server again after a copy that failed.', False),
    'power_off': Hook(
        ('instance', 'timeout', 'retry_interval'),
        'Powers the server off before its disks are copied.', False),
    'emit_event': Hook(
        ('event',), 'Tells Nova that a server is off.', False),
    'get_info': Hook(
        ('instance',), 'Tells whether the server runs.', False),
    'unplug_vifs': Hook(
        ('instance', 'network_info'),
        'Unplugs the ports of a server that leaves.', False),
    '_disconnect_volume': Hook(
        ('context', 'connection_info', 'instance'),
        'Disconnects the Cinder volumes of a server that leaves.', False),
    '_get_instance_disk_info': Hook(
        ('instance', 'block_device_info'),
        'Lists the disks of a server, from its domain.', False),
    '_is_booted_from_volume': Hook(
        ('block_device_info',),
        'Tells whether the root disk is a Cinder volume.', False),
    'instance_exists': Hook(
        ('instance',), 'Tells whether a server has a domain on this host.',
        overridden=False),
    '_lvm_disks': Hook(
        ('instance',), 'Lists the disks of a server in a volume group.',
        False),
    'get_host_ip_addr': Hook(
        (), 'Tells whether the destination is this host.', False),
    '_live_migration_uri': Hook(
        ('dest',),
        'Names the destination where the options of live migration do.',
        False),
    '_uri': Hook((), 'Names the libvirt daemon of this host.', False),
}


def as_nova_declares(method: ty.Callable) -> ty.Callable:
    """Give an override the signature that Nova's method has.

    For an override that takes what only some releases pass as **later. Nova's
    own tests compare the signatures.
    """
    method.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        getattr(driver.LibvirtDriver, method.__name__))
    return method


def keeps_nvram() -> bool:
    """Whether Nova can undefine a domain and keep its UEFI variables."""
    return 'keep_nvram' in inspect.signature(
        driver.LibvirtDriver._undefine_domain).parameters


def find_problems(nova_driver: type) -> list[str]:
    """Compare Nova's driver with what this project counts on.

    :returns: a sentence for each hook that is missing or takes other
        parameters
    """
    problems = []
    for name, hook in HOOKS.items():
        found = getattr(nova_driver, name, None)
        if found is None:
            problems.append(f'{name} is missing')
            continue
        taken = inspect.signature(found).parameters if callable(found) else ()
        lacking = [each for each in hook.parameters if each not in taken]
        if lacking:
            problems.append(f'{name} does not take {", ".join(lacking)}')
    return problems


def release() -> int:
    """The release of the Nova beside this module, 34 for example."""
    return int(version.version_string().partition('.')[0])


def supported() -> str:
    """The releases that the tests run with, to be shown."""
    return f'{RELEASES[0]} to {RELEASES[-1]}'


def table() -> list[tuple[str, str, str]]:
    """The hooks as a table, for the documentation."""
    return [('Method', 'Use', 'Relied on for'), *(
        (f'``{name}``', 'overrides' if hook.overridden else 'calls',
         hook.reason) for name, hook in HOOKS.items())]
