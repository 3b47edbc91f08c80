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

"""A libvirt driver that cold migrates over libvirt instead of SSH.

Enable it on each compute host, in nova.conf::

    [DEFAULT]
    compute_driver = libvirt.storage_migrate.LibvirtDriver
    [libvirt]
    use_storage_pools = True
    vol_upload_migration = True

See the blueprints "Use libvirt Storage Pools" and "Use Libvirt Storage Pool
Methods to Migrate Libvirt Volumes".
"""

import contextlib
import functools
import inspect
import os
import threading
import typing as ty

from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import fileutils
from oslo_utils import netutils
from oslo_utils import units

from nova import block_device
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
import nova.privsep.utils
from nova.scheduler.client import report
from nova import version
from nova.virt import driver as virt_driver
from nova.virt import hardware
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage import access
from nova.virt.libvirt.storage import directory
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import fetch
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import imagecache
from nova.virt.libvirt.storage import kept
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import progress
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage import transfer
from nova.virt.libvirt import utils as libvirt_utils

try:
    from nova import thread_pool_factory
except ImportError:
    # Of a Nova before 34, which check_hooks() refuses.
    pass

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The release of Nova that this module was written for.
NOVA_RELEASE = '34'

# Image types whose disks are no plain files in the instance directory.
NOT_STREAMED = ('lvm', 'ploop')

# The pool of this host's base images, if there is none of their directory.
IMAGE_CACHE_POOL = 'nova-image-cache'

# What this module overrides or calls in Nova's driver, and the parameters
# that it counts on. None of it is an interface that Nova promises to keep.
HOOKS = {
    'init_host': ('host',),
    'migrate_disk_and_power_off': (
        'context', 'instance', 'dest', 'flavor', 'network_info',
        'block_device_info', 'timeout', 'retry_interval'),
    'finish_migration': (
        'context', 'migration', 'instance', 'disk_info', 'network_info',
        'image_meta', 'resize_instance', 'allocations', 'block_device_info',
        'power_on', 'share_info'),
    'confirm_migration': (
        'context', 'migration', 'instance', 'network_info'),
    'finish_revert_migration': (
        'context', 'instance', 'network_info', 'migration',
        'block_device_info', 'power_on', 'share_info'),
    'check_can_live_migrate_source': (
        'context', 'instance', 'dest_check_data', 'block_device_info'),
    'instance_on_disk': ('instance',),
    'check_instance_shared_storage_local': ('context', 'instance'),
    'check_instance_shared_storage_remote': ('context', 'data'),
    'check_instance_shared_storage_cleanup': ('context', 'data'),
    'delete_instance_files': ('instance',),
    '_create_image': (
        'context', 'instance', 'disk_mapping', 'injection_info', 'suffix',
        'disk_images', 'block_device_info', 'fallback_from_host',
        'ignore_bdi_for_swap'),
    '_create_images_and_backing': (
        'context', 'instance', 'instance_dir', 'disk_info',
        'fallback_from_host'),
    'power_on': (
        'context', 'instance', 'network_info', 'block_device_info'),
    'power_off': ('instance', 'timeout', 'retry_interval'),
    'unplug_vifs': ('instance', 'network_info'),
    'disk_cachemode': (),
    '_get_local_gb_info': (),
    '_disconnect_volume': ('context', 'connection_info', 'instance'),
    '_try_fetch_image_cache': (
        'image', 'fetch_func', 'context', 'filename', 'image_id', 'instance',
        'size', 'fallback_from_host'),
    '_try_fetch_image': (
        'context', 'path', 'image_id', 'instance', 'fallback_from_host'),
    '_get_instance_disk_info': ('instance', 'block_device_info'),
    '_cleanup_failed_instance_base': ('inst_base',),
    '_is_path_shared_with': ('dest', 'path'),
    '_is_booted_from_volume': ('block_device_info',),
    'get_host_ip_addr': (),
    'process_instances_at_startup': ('context', 'instances'),
    'cleanup_host': ('host',),
    'get_available_resource': ('nodename',),
    '_finish_revert_migration_vtpm': ('context', 'instance'),
    '_live_migration_uri': ('dest',),
    '_uri': (),
}


# How long nova-compute waits as it ends for a server to be started again, in
# seconds. Nova keeps 20 seconds for that and the rest.
PUT_BACK_SECONDS = 15


class _Cancel(threading.Event):
    """Stops the copy of a server's disks when it is set.

    :ivar instance: the server
    :ivar reason: why it was set
    :ivar deleted: whether the server was deleted, and is not to be started
        again
    :ivar over: set when nothing is left to do
    """

    def __init__(self, instance):
        super().__init__()
        self.instance = instance
        self.reason = ''
        self.deleted = False
        self.over = threading.Event()


class LibvirtDriver(driver.LibvirtDriver):
    """Nova's libvirt driver, with disks in storage pools that it migrates.

    With ``use_storage_pools`` and ``vol_upload_migration`` both off it does
    what Nova's own driver does.
    """

    def __init__(self, virtapi, read_only=False):
        super().__init__(virtapi, read_only)
        self.image_backend = image.Backend(CONF.use_cow_images)
        self.image_cache_manager = imagecache.ImageCacheManager()
        self._cancel_events: dict[str, _Cancel] = {}
        # What deletes an unfinished copy, by uuid of the server and host.
        self._leftovers: dict[tuple[str, str], ty.Callable[[], None]] = {}
        self._bandwidth = stream.Bandwidth(
            CONF.libvirt.vol_upload_migration_bandwidth * units.Mi)

    def init_host(self, host):
        check_hooks(driver.LibvirtDriver)
        if CONF.libvirt.vol_upload_migration:
            self._check_migration_uri()
        super().init_host(host)
        if CONF.libvirt.use_storage_pools:
            self._init_disks_pool()
        if CONF.libvirt.vol_upload_migration:
            cache_dir = self.image_cache_manager.cache_dir
            fileutils.ensure_tree(cache_dir)
            _native(transfer.ensure_cache_pool, self._uri(), IMAGE_CACHE_POOL,
                    cache_dir)

    def process_instances_at_startup(self, context, instances):
        """Also put right what Nova leaves of migrations that it ended in."""
        instances = super().process_instances_at_startup(context, instances)
        mend = {task_states.RESIZE_MIGRATING: self._end_migration,
                task_states.RESIZE_FINISH: self._offer_revert}
        for instance in instances:
            if (CONF.libvirt.vol_upload_migration and
                    instance.task_state in mend):
                try:
                    mend[instance.task_state](
                        context, instance,
                        objects.Migration.get_by_id_and_instance(
                            context, instance.migration_context.migration_id,
                            instance.uuid))
                except Exception:
                    # This is not to keep nova-compute from starting.
                    LOG.exception('The migration of the server, in which '
                                  'nova-compute ended, can not be put right',
                                  instance=instance)
        return instances

    def _end_migration(self, context, instance, migration) -> None:
        """Let a migration fail, and this host be the server's again.

        nova-compute ended in migrate_disk_and_power_off. Nova starts the
        server next, and would leave the migration as one that is under way,
        and the server's allocation at the destination.
        """
        migration.status = 'error'
        migration.save()
        report.report_client_singleton().move_allocations(
            context, migration.uuid, instance.uuid)

    def _offer_revert(self, context, instance, migration) -> None:
        """Give a server the state from which its migration is reverted.

        nova-compute ended in finish_migration. Nova would leave the server in
        that for ever, with nothing that anybody could do with it.
        """
        migration.status = 'finished'
        migration.save()
        instance.vm_state = vm_states.RESIZED
        instance.task_state = None
        instance.save(expected_task_state=task_states.RESIZE_FINISH)
        LOG.warning(
            'nova-compute ended before the migration of the server did, which '
            'may be off now. To start it on %(host)s as it was: openstack '
            'server resize revert %(uuid)s',
            {'host': migration.source_compute, 'uuid': instance.uuid},
            instance=instance)

    def cleanup_host(self, host):
        """Stop what copies disks, and wait until its servers are back.

        Nova calls this as nova-compute ends, when it has given the work that
        is under way some time to finish ([DEFAULT]manager_shutdown_timeout).
        """
        cancels = list(self._cancel_events.values())
        for cancel in cancels:
            self._stop_copy(cancel, _('nova-compute on %s ended') % host)
        for cancel in cancels:
            cancel.over.wait(PUT_BACK_SECONDS)
        super().cleanup_host(host)

    def migrate_disk_and_power_off(
        self, context, instance, dest, flavor, network_info,
        block_device_info=None, timeout=0, retry_interval=0,
    ):
        """Take a server's disks to another host and power the server off.

        Over libvirt if the disks are in a storage pool, or if that is enabled
        for those in the instance directory, and as Nova does it otherwise.

        :param dest: address of the destination
        :returns: JSON of what _get_instance_disk_info() says of the disks,
            with the paths that they have on the destination
        :raises: InstanceFaultRollback; the server is then where and what it
            was before, running if it ran
        """
        here = dest == self.get_host_ip_addr()
        if here and image.has_volumes(instance):
            return self._copy_here_and_power_off(
                context, instance, flavor, network_info, block_device_info,
                timeout, retry_interval)
        if here or not self._moves_over_libvirt(
                instance, dest, block_device_info):
            return super().migrate_disk_and_power_off(
                context, instance, dest, flavor, network_info,
                block_device_info, timeout, retry_interval)

        move = self._new_transfer(instance, dest)
        try:
            with _rollback(exception.MigrationPreCheckError, instance):
                self._check_enabled()
                self._check_request(instance, flavor, block_device_info)
                disk_info = _without_swap(self._get_instance_disk_info(
                    instance, block_device_info))
                disks = _disks_in(self._disks_path(instance), disk_info)
                running = self.get_info(instance).state == power_state.RUNNING
                vtpm = _vtpm_path(instance)
                _native(move.check, disks)
                if move.destination.is_shared:
                    _refuse_vtpm(instance, _(
                        'hosts that share its instance directory'))
                _native(move.destination.claim)
            with self._put_back_on_error(
                    context, instance, network_info, block_device_info,
                    dest, move.destination.discard, running) as cancel:
                self.power_off(instance, timeout, retry_interval)
                self._detach_from_host(
                    context, instance, network_info, block_device_info)
                if move.destination.is_shared:
                    move.record_disks(disks)
                else:
                    self._copy_disks(context, instance, move, disks, cancel)
                    if vtpm:
                        _native(move.copy_vtpm, vtpm, cancel)
                    _native(move.copy_instance_dir, disks, cancel)
                    self._keep_instance_dir(instance)
        finally:
            _native(move.close)
        return jsonutils.dumps(
            _disk_info_at(move.destination.disks_path, disk_info))

    def _copy_here_and_power_off(
        self, context, instance, flavor, network_info, block_device_info,
        timeout, retry_interval,
    ) -> str:
        """Do the same for a server that is resized on its own host.

        What it had until now is kept for a revert under other names.
        """
        originals = kept.Originals(instance)
        with _rollback(exception.MigrationPreCheckError, instance):
            self._check_request(instance, flavor, block_device_info)
            _refuse_vtpm(instance, _('the pools of one host'))
            disk_info = _without_swap(self._get_instance_disk_info(
                instance, block_device_info))
            _check_room_here(disk_info)
            running = self.get_info(instance).state == power_state.RUNNING
            self._cleanup_failed_instance_base(
                libvirt_utils.get_instance_path(instance) + '_resize')
        with self._put_back_on_error(
                context, instance, network_info, block_device_info,
                CONF.host, None, running) as cancel:
            self.power_off(instance, timeout, retry_interval)
            self._detach_from_host(
                context, instance, network_info, block_device_info)
            with self._restored_on_error(instance, originals, cancel):
                _native(originals.keep)
                for path in [image.disk_info_path(instance),
                             *(info['path'] for info in disk_info)]:
                    self._copy_here(
                        instance, originals.path(path), path, cancel)
        return jsonutils.dumps(disk_info)

    def finish_migration(
        self, context, migration, instance, disk_info, network_info,
        image_meta, resize_instance, allocations, block_device_info=None,
        power_on=True, share_info=None,
    ):
        """Start a server on the destination, whichever way its disks came."""
        # Saved by Nova with the state that it gives to the server next.
        instance.progress = 0
        disks = jsonutils.loads(disk_info)
        volumes = [os.path.basename(info['path']) for info in disks
                   if image.is_in_pool(info['path'])]
        if volumes or image.has_volumes(instance):
            _native(transfer.adopt_volumes, self._uri(),
                    CONF.libvirt.disks_pool, image.volume_prefix(instance),
                    volumes)
        elif self._streams_files(instance):
            _native(_flush, [info['path'] for info in disks])
        _native(_flush, [
            os.path.join(path, name)
            for path, _names, names in os.walk(_saved_vtpm_path(instance))
            for name in names])
        for path in image.list_files(instance, image.volume_name(
                instance, directory.ARRIVED)):
            os.unlink(path)
        # What Nova would do with the disks is to make qcow2 of raw ones where
        # use_cow_images is set. One in a pool stays raw instead.
        others = [info for info in disks if not image.is_in_pool(info['path'])]
        super().finish_migration(
            context, migration, instance, jsonutils.dumps(others),
            network_info, image_meta, resize_instance, allocations,
            block_device_info, power_on, share_info)

    def confirm_migration(self, context, migration, instance, network_info):
        """Delete what was kept on the source for a revert."""
        self._delete_volumes(image.kept_prefix(instance))
        if instance.host != CONF.host and self._is_instance_dir_kept(instance):
            self._delete_volumes(image.volume_prefix(instance))
        super().confirm_migration(context, migration, instance, network_info)

    def finish_revert_migration(
        self, context, instance, network_info, migration,
        block_device_info=None, power_on=True, share_info=None,
    ):
        """Start a server on the source as it was before its migration.

        Nova calls this also when it finds, as it starts, that it ended in
        the middle of one.
        """
        if image.list_kept(instance):
            _native(kept.Originals(instance).restore)
        super().finish_revert_migration(
            context, instance, network_info, migration, block_device_info,
            power_on, share_info)

    def _finish_revert_migration_vtpm(self, context, instance):
        # Nova calls this also as it starts after it ended in the middle of a
        # copy. The server has no old flavor then, which Nova's code stumbles
        # over, and the server would stay off.
        if instance.old_flavor is not None:
            super()._finish_revert_migration_vtpm(context, instance)
            return
        # What Nova's own way over ssh had moved. Without it the server would
        # start with a new vTPM.
        saved = os.path.join(_saved_vtpm_path(instance), instance.uuid)
        if os.path.exists(saved):
            libvirt_utils.restore_vtpm_dir(saved)

    def delete_instance_files(self, instance):
        """Delete a server's files on this host, and its volumes.

        A copy of them that is under way ends.

        :returns: True if nothing is left
        :raises: libvirtError if a volume is left that is to be made anew
        """
        if instance.uuid in self._cancel_events:
            cancel = self._cancel_events[instance.uuid]
            cancel.deleted = True
            self._stop_copy(cancel, _('the server was deleted'))
        deleted = super().delete_instance_files(instance)
        try:
            self._delete_all_volumes(instance)
        except Exception:
            if instance.task_state == task_states.REBUILDING:
                # The server would be made anew with its old disks.
                raise
            # Nova tries again later if this is told to have failed.
            LOG.exception('Failed to delete the volumes of the server in '
                          'storage pool %s', CONF.libvirt.disks_pool,
                          instance=instance)
            return False
        return deleted

    def instance_on_disk(self, instance):
        """Whether the disks of a server to evacuate are on this host.

        :raises: InvalidSharedStorage if they are, and their formats not
        """
        claim = image.volume_name(instance, peer.CLAIM)
        if image.list_paths(claim) or image.list_files(instance, claim):
            LOG.info('Deleting what a migration brought that did not end',
                     instance=instance)
            self.delete_instance_files(instance)
            return False
        record = image.disk_info_path(instance)
        formats = image.recorded_formats(record)
        for path in image.list_volumes(instance):
            if path not in formats:
                raise exception.InvalidSharedStorage(path=path, reason=_(
                    'the format of the disk is not recorded in %s. If both '
                    'hosts share the storage pool, they have to share the '
                    'instance directory too. If not, delete the '
                    'disk') % record)
        if image.names_volumes(instance, record):
            return image.has_volumes(instance)
        return super().instance_on_disk(instance)

    def check_instance_shared_storage_local(self, context, instance):
        """Make what another host sees if it shares the server's storage.

        :returns: what to tell it; None if there is nothing to share
        """
        data = super().check_instance_shared_storage_local(context, instance)
        if image.has_volumes(instance):
            marker = image.make_marker(instance)
            data = {'filename': marker, **(data or {}),
                    'volume': os.path.basename(marker)}
        return data

    def check_instance_shared_storage_remote(self, context, data):
        """Whether this host shares any of another's storage.

        Any, for the other will delete all or nothing.
        """
        # The pool may have another path here.
        shares_pool = 'volume' in data and os.path.exists(os.path.join(
            CONF.libvirt.disks_pool_path, data['volume']))
        return (shares_pool or
                super().check_instance_shared_storage_remote(context, data))

    def check_instance_shared_storage_cleanup(self, context, data):
        super().check_instance_shared_storage_cleanup(context, data)
        if 'volume' in data:
            fileutils.delete_if_exists(os.path.join(
                CONF.libvirt.disks_pool_path, data['volume']))

    @property
    def disk_cachemode(self):
        """How QEMU caches disks; without O_DIRECT it can not be 'none'."""
        unknown = self._disk_cachemode is None
        mode = super().disk_cachemode
        if unknown and mode == 'none' and CONF.libvirt.use_storage_pools:
            if not nova.privsep.utils.supports_direct_io(
                    CONF.libvirt.disks_pool_path):
                mode = self._disk_cachemode = 'writeback'
        return mode

    @staticmethod
    def _get_local_gb_info():
        """Size and use of the file system that servers' disks are on, GiB."""
        if not CONF.libvirt.use_storage_pools:
            return super(LibvirtDriver, LibvirtDriver)._get_local_gb_info()
        info = libvirt_utils.get_fs_info(CONF.libvirt.disks_pool_path)
        return {name: size / units.Gi for name, size in info.items()}

    def check_can_live_migrate_source(
        self, context, instance, dest_check_data, block_device_info=None,
    ):
        """Refuse to live migrate disks that are volumes of a pool.

        The other host would make empty disks for them in the instance
        directory, where the server does not look for them.

        :raises: MigrationPreCheckError
        """
        if image.has_volumes(instance):
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are in storage pool %s, and can not '
                'be live migrated. Migrate it cold instead: openstack server '
                'migrate, without --live-migration.') %
                CONF.libvirt.disks_pool)
        return super().check_can_live_migrate_source(
            context, instance, dest_check_data, block_device_info)

    def _create_images_and_backing(
        self, context, instance, instance_dir, disk_info,
        fallback_from_host=None,
    ):
        # Nova looks for all disks of a server that starts in the directory
        # it is told, and makes those that are not there.
        in_pool = [info for info in disk_info or []
                   if image.is_in_pool(info['path'])]
        if in_pool:
            super()._create_images_and_backing(
                context, instance, CONF.libvirt.disks_pool_path, in_pool,
                fallback_from_host)
            disk_info = [info for info in disk_info if info not in in_pool]
        super()._create_images_and_backing(
            context, instance, instance_dir, disk_info, fallback_from_host)

    def _create_image(
        self, context, instance, disk_mapping, injection_info=None,
        suffix='', disk_images=None, block_device_info=None,
        fallback_from_host=None, ignore_bdi_for_swap=False,
    ):
        created = super()._create_image(
            context, instance, disk_mapping, injection_info, suffix,
            disk_images, block_device_info, fallback_from_host,
            ignore_bdi_for_swap)
        if instance.task_state == task_states.RESIZE_FINISH:
            self._grow_ephemeral(instance, block_device_info)
        return created

    def _try_fetch_image_cache(
        self, image, fetch_func, context, filename, image_id, instance, size,
        fallback_from_host=None,
    ):
        """Fetch a base image from Glance, or from a host if it is lost there.

        Nova gets it from the host by ssh.

        :raises: MigrationError if the host does not have it either
        """
        if not self._needs_no_ssh(instance):
            return super()._try_fetch_image_cache(
                image, fetch_func, context, filename, image_id, instance,
                size, fallback_from_host)
        try:
            super()._try_fetch_image_cache(
                image, fetch_func, context, filename, image_id, instance,
                size)
        except exception.ImageNotFound:
            if not fallback_from_host:
                raise
            image.cache(
                fetch_func=functools.partial(
                    self._fetch_file, instance, fallback_from_host),
                filename=filename, size=size)

    def _try_fetch_image(
        self, context, path, image_id, instance, fallback_from_host=None,
    ):
        """Do the same with a kernel or ramdisk."""
        if not self._needs_no_ssh(instance):
            return super()._try_fetch_image(
                context, path, image_id, instance, fallback_from_host)
        try:
            super()._try_fetch_image(context, path, image_id, instance)
        except exception.ImageNotFound:
            if not fallback_from_host:
                raise
            self._fetch_file(instance, fallback_from_host, path)

    @staticmethod
    def _needs_no_ssh(instance) -> bool:
        """Whether all that a server needs of other hosts is libvirt."""
        return CONF.libvirt.vol_upload_migration and (
            CONF.libvirt.vol_upload_migration_legacy or
            image.has_volumes(instance))

    def _fetch_file(self, instance, host, target) -> None:
        LOG.info('Fetching %(path)s, which Glance does not have, from '
                 '%(host)s', {'path': target, 'host': host},
                 instance=instance)
        try:
            _native(fetch.fetch, self._uri(), host, destination_uri(host),
                    target, f'nova-{instance.uuid}-fetch', self._bandwidth)
        except fetch.FetchError as error:
            raise exception.MigrationError(reason=str(error)) from error

    def _grow_ephemeral(self, instance, block_device_info) -> None:
        """Let a server's only ephemeral disk be as big as its flavor says.

        Nova takes the size from the block device mapping, which a resize
        does not change. Of several disks nobody knows which is to grow.
        """
        ephemerals = virt_driver.block_device_info_get_ephemerals(
            block_device_info)
        name = blockinfo.get_eph_disk(0)
        if len(ephemerals) == 1 and image.has_volume(instance, name):
            self.image_backend.by_name(instance, name).resize_image(
                instance.flavor.ephemeral_gb * units.Gi)

    def _check_migration_uri(self) -> None:
        """Refuse a URI that is not safe, warn of one that is less so.

        :raises: InvalidConfiguration
        """
        uri = destination_uri('%s')
        try:
            access.check_uri(uri)
        except access.Unsafe as error:
            raise exception.InvalidConfiguration(str(error))
        weakness = access.weakness(uri)
        if weakness:
            LOG.warning(
                'Servers will be cold migrated over %(uri)s. This %(why)s. '
                '%(remedy)s.', {'uri': uri, 'why': weakness,
                                'remedy': access.WEAKNESS_REMEDY})

    def _init_disks_pool(self) -> None:
        if CONF.libvirt.images_type not in image.IMAGE_TYPES:
            raise exception.InvalidConfiguration(_(
                '[libvirt]use_storage_pools can not be used with '
                '[libvirt]images_type = %(type)s. Set it to one of '
                '%(types)s.') % {'type': CONF.libvirt.images_type,
                                 'types': ', '.join(image.IMAGE_TYPES)})
        path = _native(
            transfer.ensure_pool, self._uri(), CONF.libvirt.disks_pool,
            CONF.libvirt.disks_pool_path)
        if path != CONF.libvirt.disks_pool_path.rstrip('/'):
            raise exception.InvalidConfiguration(_(
                'Storage pool %(pool)s has the directory %(path)s. Set '
                '[libvirt]disks_pool_path to that, or choose another name '
                'in [libvirt]disks_pool.') % {
                    'pool': CONF.libvirt.disks_pool, 'path': path})

    def _moves_over_libvirt(
        self, instance, dest, block_device_info,
    ) -> bool:
        """Whether a server is one to migrate without Nova's own code.

        One with volumes in the pool always is, if only to be refused. One
        that has no disks of its own, only Cinder's, is if that is enabled,
        and one with an instance directory if that is, and is not shared.
        """
        if image.has_volumes(instance):
            return True
        if self._streams_files(instance):
            return not self._is_path_shared_with(
                dest, libvirt_utils.get_instance_path(instance))
        return (CONF.libvirt.vol_upload_migration and
                CONF.libvirt.use_storage_pools and
                self._is_booted_from_volume(block_device_info) and
                not image.has_files(instance))

    @staticmethod
    def _streams_files(instance) -> bool:
        """Whether a server's instance directory is to go over libvirt."""
        return (CONF.libvirt.vol_upload_migration and
                CONF.libvirt.vol_upload_migration_legacy and
                CONF.libvirt.images_type not in NOT_STREAMED and
                not image.has_volumes(instance))

    def _disks_path(self, instance) -> str:
        """The directory of a server's disks."""
        if self._streams_files(instance):
            return libvirt_utils.get_instance_path(instance)
        return CONF.libvirt.disks_pool_path.rstrip('/')

    def _is_path_shared_with(self, dest, path):
        """Whether this host and another have a directory in common.

        Nova asks by ssh.

        :raises: InstanceFaultRollback if the other host does not say
        """
        if not (CONF.libvirt.vol_upload_migration and
                CONF.libvirt.vol_upload_migration_legacy):
            return super()._is_path_shared_with(dest, path)
        if dest == self.get_host_ip_addr():
            return True
        with _rollback(exception.MigrationPreCheckError, None):
            return _native(
                directory.is_shared, dest, destination_uri(dest), path)

    def _check_enabled(self):
        if not CONF.libvirt.vol_upload_migration:
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are in storage pool %s, from which '
                'they can only be migrated with [libvirt]'
                'vol_upload_migration = True on this host.') %
                CONF.libvirt.disks_pool)

    def _check_request(self, instance, flavor, block_device_info):
        """Refuse what can not be done, whatever the destination is.

        :raises: ResizeError, MigrationPreCheckError
        """
        if instance.uuid in self._cancel_events:
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are being copied already.'))
        for path in image.list_kept(instance):
            raise exception.MigrationPreCheckError(reason=_(
                'An earlier resize kept %(kept)s and was neither confirmed '
                'nor reverted. Find out whether that or %(disk)s is the disk '
                'of the server, and delete the other.') % {
                    'kept': path, 'disk': image.volume_path(
                        instance, image.disk_name(instance, path))})
        root_shrinks = (
            flavor.root_gb < instance.flavor.root_gb and
            not self._is_booted_from_volume(block_device_info))
        ephemerals = virt_driver.block_device_info_get_ephemerals(
            block_device_info)
        ephemeral_gb = max(
            block_device.get_bdm_ephemeral_disk_size(ephemerals),
            instance.flavor.ephemeral_gb)
        if root_shrinks or flavor.ephemeral_gb < ephemeral_gb:
            raise exception.ResizeError(
                reason=_('Unable to resize disk down.'))

    def _new_transfer(self, instance, dest) -> transfer.Transfer:
        path = libvirt_utils.get_instance_path(instance)
        pool_name = CONF.libvirt.disks_pool
        here, there = transfer.Transfer, peer.Destination
        if self._streams_files(instance):
            pool_name = f'nova-{instance.uuid}'
            here, there = directory.Transfer, directory.Destination
        destination = there(
            dest, destination_uri(dest), pool_name, instance.uuid, path)
        return here(
            self._uri(), destination, pool_name, path,
            CONF.libvirt.vol_upload_migration_direct_read, self._bandwidth)

    def _detach_from_host(
            self, context, instance, network_info, block_device_info):
        """Unplug the server's ports and disconnect its Cinder volumes."""
        self.unplug_vifs(instance, network_info)
        for volume in virt_driver.block_device_info_get_mapping(
                block_device_info):
            self._disconnect_volume(
                context, volume['connection_info'], instance)

    def _copy_disks(self, context, instance, move, disks, cancel) -> None:
        """Copy the disks, and tell how far that is."""
        watcher = progress.Progress(
            context, instance, move.destination.host,
            _native(move.length, disks))
        for disk in disks:
            watcher.watch(disk.volume, functools.partial(
                _native, move.copy_disk, disk, cancel))

    @staticmethod
    def _is_instance_dir_kept(instance) -> bool:
        """Whether the server has left copies behind here.

        On shared storage it has not: its disks are those of the destination.
        """
        return os.path.exists(
            libvirt_utils.get_instance_path(instance) + '_resize')

    def _keep_instance_dir(self, instance) -> None:
        """Put the instance directory where a revert will look for it."""
        path = libvirt_utils.get_instance_path(instance)
        self._cleanup_failed_instance_base(path + '_resize')
        os.rename(path, path + '_resize')

    @contextlib.contextmanager
    def _put_back_on_error(
        self, context, instance, network_info, block_device_info, host,
        discard, running,
    ) -> ty.Iterator['_Cancel']:
        """Undo a migration that fails after the server was powered off.

        Nothing was changed on this host but that the server was taken off
        it, so that starting it is all there is to do. Yields what is set when
        the server is deleted, or nova-compute ends.

        :param host: address of the destination
        :param discard: clears the destination
        """
        cancel = self._cancel_events[instance.uuid] = _Cancel(instance)
        try:
            yield cancel
        except Exception as error:
            LOG.warning('Migration to %(host)s failed: %(error)s',
                        {'host': host, 'error': error},
                        instance=instance)
            failure = exception.MigrationError(
                reason=cancel.reason or str(error))
            # Saved by Nova with the state that it gives to the server next.
            instance.progress = 0
            try:
                if cancel.deleted or isinstance(error, kept.NotRestored):
                    raise failure from error
                if running:
                    self._start_again(
                        context, instance, network_info, block_device_info,
                        failure)
            finally:
                if discard:
                    self._discard_copy(instance, host, discard)
            raise exception.InstanceFaultRollback(failure) from error
        finally:
            del self._cancel_events[instance.uuid]
            cancel.over.set()

    def _stop_copy(self, cancel, reason) -> None:
        cancel.reason = reason
        cancel.set()
        self.job_tracker.terminate_jobs(cancel.instance)

    def _start_again(self, context, instance, network_info,
                     block_device_info, failure) -> None:
        try:
            self.power_on(context, instance, network_info, block_device_info)
        except Exception:
            LOG.exception('The server could not be started again',
                          instance=instance)
            raise failure

    def _discard_copy(self, instance, host, discard) -> None:
        try:
            _native(discard)
        except Exception:
            # The server is safe, and this is tried again.
            LOG.exception('Failed to delete the unfinished copy on %s', host,
                          instance=instance)
            self._leftovers[instance.uuid, host] = discard

    def get_available_resource(self, nodename):
        """What Nova asks for every minute, and a time to clear up."""
        if self._leftovers:
            thread_pool_factory.spawn(self._discard_leftovers)
        return super().get_available_resource(nodename)

    def _discard_leftovers(self) -> None:
        """Delete what migrations that failed had to leave on other hosts."""
        leftovers, self._leftovers = self._leftovers, {}
        for (uuid, host), discard in leftovers.items():
            try:
                _native(discard)
            except peer.Superseded as error:
                LOG.info('Nothing to delete for server %(uuid)s: %(error)s',
                         {'uuid': uuid, 'error': error})
            except Exception as error:
                LOG.info('The unfinished copy of server %(uuid)s can not be '
                         'deleted yet: %(error)s',
                         {'uuid': uuid, 'error': error})
                self._leftovers.setdefault((uuid, host), discard)

    @contextlib.contextmanager
    def _restored_on_error(
        self, instance, originals, cancel,
    ) -> ty.Iterator[None]:
        """Put the original disks back if copying them on this host fails.

        :raises: NotRestored
        """
        try:
            yield
        except Exception as error:
            if cancel.deleted:
                # Only what was made since the server's deletion is there.
                self._delete_all_volumes(instance)
                raise
            try:
                _native(originals.restore)
            except Exception as second:
                raise kept.NotRestored(
                    f'{error}. The original disks could not be put back: '
                    f'{second}') from error
            raise

    def _copy_here(self, instance, source, target, cancel) -> None:
        """Copy a file on this host; holes stay holes."""
        if cancel.is_set():
            raise errors.Cancelled()
        processutils.execute(
            'cp', '--reflink=auto', '--sparse=auto', source, target,
            on_execute=lambda process:
                self.job_tracker.add_job(instance, process.pid),
            on_completion=lambda process:
                self.job_tracker.remove_job(instance, process.pid))

    def _delete_all_volumes(self, instance) -> None:
        self._delete_volumes(image.volume_prefix(instance))
        self._delete_volumes(image.kept_prefix(instance))

    def _delete_volumes(self, prefix: str) -> None:
        if image.list_paths(prefix):
            _native(transfer.delete_volumes, self._uri(),
                    CONF.libvirt.disks_pool, prefix)


def destination_uri(dest: str) -> str:
    """The libvirt URI of the destination of a migration.

    :param dest: its address
    """
    uri = CONF.libvirt.vol_upload_migration_uri
    if not uri and (CONF.libvirt.live_migration_uri or
                    CONF.libvirt.live_migration_scheme):
        return driver.LibvirtDriver._live_migration_uri(dest)
    uri = uri or 'qemu+tls://%s/system'
    return uri.replace('%s', netutils.escape_ipv6(dest))


def check_hooks(nova_driver: type) -> None:
    """Check that the Nova beside this module has what it hooks into.

    :raises: InternalError if it has not
    """
    for name, parameters in HOOKS.items():
        hook = getattr(nova_driver, name, None)
        found = inspect.signature(hook).parameters if callable(hook) else {}
        if hook is None or not set(parameters) <= set(found):
            raise exception.InternalError(_(
                'nova.virt.libvirt.storage_migrate needs Nova %(wanted)s. '
                'This is Nova %(found)s, whose LibvirtDriver.%(name)s is '
                'missing or takes other parameters.') % {
                    'wanted': NOVA_RELEASE, 'name': name,
                    'found': version.version_string()})


def _native(function: ty.Callable[..., ty.Any], *args: ty.Any) -> ty.Any:
    """Call what may block, off the eventlet hub if there is one."""
    return threads.off_hub(function, *args)


@contextlib.contextmanager
def _rollback(
    error_class: type[exception.NovaException], instance,
) -> ty.Iterator[None]:
    """Tell Nova that an error changed nothing about the server."""
    try:
        yield
    except exception.NovaException as error:
        raise exception.InstanceFaultRollback(error)
    except Exception as error:
        LOG.warning('The server can not be migrated: %s', error,
                    instance=instance)
        raise exception.InstanceFaultRollback(
            error_class(reason=str(error))) from error


def _without_swap(
    disk_info: list[dict[str, ty.Any]],
) -> list[dict[str, ty.Any]]:
    """The disks that have to be copied: a swap disk is made anew."""
    return [info for info in disk_info
            if not info['path'].endswith('disk.swap')]


def _vtpm_path(instance) -> str | None:
    """Where the state of a server's vTPM is on this host, if it has one."""
    path = os.path.join(libvirt_utils.VTPM_DIR, instance.uuid)
    return path if os.path.exists(path) else None


def _saved_vtpm_path(instance) -> str:
    """Where Nova puts that while the server is migrated."""
    return os.path.join(
        libvirt_utils.get_instance_path(instance), peer.VTPM)


def _refuse_vtpm(instance, where: str) -> None:
    """Refuse to move a vTPM's state where Nova's code could not go on.

    :raises: MigrationPreCheckError
    """
    if hardware.get_vtpm_constraint(instance.flavor, instance.image_meta):
        raise exception.MigrationPreCheckError(reason=_(
            'A server with a vTPM and disks in a storage pool can not be '
            'moved between %s.') % where)


def _check_room_here(disk_info: list[dict[str, ty.Any]]) -> None:
    """Check that the pool has room for another copy of the disks.

    :raises: MigrationPreCheckError
    """
    needed = sum(int(info['disk_size']) for info in disk_info)
    room = libvirt_utils.get_fs_info(CONF.libvirt.disks_pool_path)['free']
    if room < needed:
        raise exception.MigrationPreCheckError(reason=_(
            'The disks of the server take up %(needed)d bytes, and storage '
            'pool %(pool)s has %(room)d bytes available.') % {
                'needed': needed, 'pool': CONF.libvirt.disks_pool,
                'room': room})


def _flush(paths: list[str]) -> None:
    """Wait until those of the files that are there are on stable storage."""
    for path in filter(os.path.isfile, paths):
        transfer.flush(path)
        transfer.flush(os.path.dirname(path))


def _disks_in(
    path: str, disk_info: list[dict[str, ty.Any]],
) -> list[transfer.Disk]:
    return [transfer.Disk(os.path.basename(info['path']), info['type'])
            for info in disk_info if os.path.dirname(info['path']) == path]


def _disk_info_at(
    pool_path: str, disk_info: list[dict[str, ty.Any]],
) -> list[dict[str, ty.Any]]:
    """The same with the paths that the disks have in another pool."""
    def path_there(path: str) -> str:
        if not image.is_in_pool(path):
            return path
        return os.path.join(pool_path, os.path.basename(path))

    return [dict(info, path=path_there(info['path'])) for info in disk_info]
