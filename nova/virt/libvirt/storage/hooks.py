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
as it starts. ``doc/source/contributor/hooks.csv`` tells what the driver relies
on each of them for.
"""

import dataclasses
import inspect
import typing as ty

from nova import version
from nova.virt import hardware
from nova.virt.libvirt import driver

# The releases of Nova that the tests run with, the oldest first.
RELEASES = (31, 32, 33, 34)


@dataclasses.dataclass(frozen=True)
class Hook:
    """A method of Nova's driver that this project overrides or calls.

    :ivar parameters: names that it has to take, in every release
    :ivar overridden: False if the driver only calls it
    """

    parameters: tuple[str, ...]
    overridden: bool = True


HOOKS = {
    'init_host': Hook(('host',)),
    'cleanup_host': Hook(('host',)),
    'migrate_disk_and_power_off': Hook(
        ('context', 'instance', 'dest', 'flavor', 'network_info',
         'block_device_info', 'timeout', 'retry_interval')),
    'finish_migration': Hook(
        ('context', 'migration', 'instance', 'disk_info', 'network_info',
         'image_meta', 'resize_instance', 'allocations', 'block_device_info',
         'power_on')),
    'confirm_migration': Hook(
        ('context', 'migration', 'instance', 'network_info')),
    'finish_revert_migration': Hook(
        ('context', 'instance', 'network_info', 'migration',
         'block_device_info', 'power_on')),
    '_finish_migration_vtpm': Hook(('context', 'instance')),
    '_finish_revert_migration_vtpm': Hook(('context', 'instance')),
    'check_can_live_migrate_destination': Hook(
        ('context', 'instance', 'src_compute_info', 'dst_compute_info',
         'block_migration', 'disk_over_commit')),
    'cleanup_live_migration_destination_check': Hook(
        ('context', 'dest_check_data')),
    'check_can_live_migrate_source': Hook(
        ('context', 'instance', 'dest_check_data', 'block_device_info')),
    '_check_shared_storage_test_file': Hook(
        ('filename', 'instance'), overridden=False),
    '_is_shared_block_storage': Hook(
        ('instance', 'dest_check_data', 'block_device_info')),
    'pre_live_migration': Hook(
        ('context', 'instance', 'block_device_info', 'network_info',
         'disk_info', 'migrate_data')),
    'live_migration': Hook(
        ('context', 'instance', 'dest', 'post_method', 'recover_method',
         'block_migration', 'migrate_data')),
    '_live_migration_operation': Hook(
        ('context', 'instance', 'dest', 'block_migration', 'migrate_data',
         'guest', 'device_names')),
    'live_migration_abort': Hook(('instance',)),
    'rollback_live_migration_at_destination': Hook(
        ('context', 'instance', 'network_info', 'block_device_info',
         'destroy_disks', 'migrate_data')),
    'post_live_migration_at_destination': Hook(
        ('context', 'instance', 'network_info', 'block_migration',
         'block_device_info')),
    'instance_on_disk': Hook(('instance',)),
    'check_instance_shared_storage_local': Hook(('context', 'instance')),
    'check_instance_shared_storage_remote': Hook(('context', 'data')),
    'check_instance_shared_storage_cleanup': Hook(('context', 'data')),
    'cleanup': Hook(
        ('context', 'instance', 'network_info', 'block_device_info',
         'destroy_disks')),
    'delete_instance_files': Hook(('instance',)),
    'spawn': Hook(('context', 'instance', 'image_meta')),
    '_hard_reboot': Hook(('context', 'instance', 'network_info')),
    '_disk_raw_to_qcow2': Hook(('path',), overridden=False),
    '_create_swap': Hook(('target', 'swap_mb'), overridden=False),
    '_get_guest_config': Hook(
        ('instance', 'network_info', 'image_meta', 'disk_info')),
    '_undefine_domain': Hook(('instance',)),
    '_create_image': Hook(
        ('context', 'instance', 'disk_mapping', 'injection_info', 'suffix',
         'disk_images', 'block_device_info', 'fallback_from_host',
         'ignore_bdi_for_swap')),
    '_needs_rebase_original_qcow2_image': Hook(('instance', 'backend')),
    '_create_images_and_backing': Hook(
        ('context', 'instance', 'instance_dir', 'disk_info',
         'fallback_from_host')),
    '_fetch_instance_kernel_ramdisk': Hook(
        ('context', 'instance', 'fallback_from_host')),
    '_is_path_shared_with': Hook(('dest', 'path')),
    'get_available_resource': Hook(('nodename',)),
    'disk_cachemode': Hook(()),
    '_get_local_gb_info': Hook(()),
    'power_on': Hook(
        ('context', 'instance', 'network_info',
         'block_device_info', 'share_info'), overridden=False),
    'power_off': Hook(
        ('instance', 'timeout', 'retry_interval'), overridden=False),
    'emit_event': Hook(('event',), overridden=False),
    'get_info': Hook(('instance',), overridden=False),
    'unplug_vifs': Hook(('instance', 'network_info'), overridden=False),
    '_disconnect_volume': Hook(
        ('context', 'connection_info', 'instance'), overridden=False),
    '_get_instance_disk_info': Hook(
        ('instance', 'block_device_info'), overridden=False),
    '_is_booted_from_volume': Hook(('block_device_info',), overridden=False),
    'instance_exists': Hook(('instance',), overridden=False),
    '_lvm_disks': Hook(('instance',), overridden=False),
    'get_host_ip_addr': Hook((), overridden=False),
    '_live_migration_uri': Hook(('dest',), overridden=False),
    '_uri': Hook((), overridden=False),
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


def keeps_tpm_secret() -> bool:
    """Whether Nova may leave the secret of a vTPM in libvirt, as from 33 on.

    Before that, its Host does not look for secrets of this kind.
    """
    return hasattr(hardware, 'get_tpm_secret_security_constraint')


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
