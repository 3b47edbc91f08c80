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

from concurrent import futures
import contextlib
import dataclasses
import functools
import os
import re
import threading
import time
import typing as ty

from oslo_concurrency import lockutils
from oslo_concurrency import processutils
from oslo_log import log as logging
import oslo_messaging
from oslo_serialization import jsonutils
from oslo_utils import excutils
from oslo_utils import fileutils
from oslo_utils import netutils
from oslo_utils import units
import tenacity

from nova import block_device
from nova.compute import power_state
from nova.compute import rpcapi
from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
import nova.privsep.storage_migrate
import nova.privsep.utils
from nova.scheduler.client import report
from nova import version
from nova.virt import driver as virt_driver
from nova.virt import event as virtevent
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import access
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import hooks
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import imagecache
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import leftovers
from nova.virt.libvirt.storage import live
from nova.virt.libvirt.storage import local
from nova.virt.libvirt.storage import lvm
from nova.virt.libvirt.storage import nvram
from nova.virt.libvirt.storage import place
from nova.virt.libvirt.storage import progress
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage import transfer
from nova.virt.libvirt.storage import turns
from nova.virt.libvirt.storage import undo
from nova.virt.libvirt.storage import vtpm
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Image types whose disks are directories.
NOT_STREAMED = ('ploop',)

# The first libvirt that can undefine a domain and keep the state of its vTPM.
# Nova undefines a domain whenever it starts a server.
KEEPS_VTPM = (8, 9, 0)

# The pool that earlier releases made of the image cache. libvirt would probe
# the base images, whose first bytes a user may have chosen.
IMAGE_CACHE_POOL = 'nova-image-cache'

# Key in what a source host sends to have written what has arrived.
FLUSH = 'nova_storage_migrate_flush'

# How often it calls while nobody answers. Each call takes
# [DEFAULT]rpc_response_timeout, 60 seconds by default.
FLUSH_CALLS = 5

# How long nova-compute waits when it stops until all servers whose copies it
# stopped are running again, in seconds. Nova keeps 20 for that and the rest.
PUT_BACK_SECONDS = 15

# How long to wait for the end of a live migration of which Nova lost sight,
# or whose domain is off, in seconds. libvirt has taken 180 to find out that a
# host was down.
LIVE_END_SECONDS = 600

_HOST_NAME = re.compile(r'[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?')


class _Server(ty.NamedTuple):
    """A server that Nova migrates, as it hands it over.

    :ivar flavor: that it is to have
    :ivar timeout: seconds that it may take to shut down
    :ivar retry_interval: seconds between two requests to shut down
    """
    context: ty.Any
    instance: ty.Any
    network_info: ty.Any
    block_device_info: ty.Any
    flavor: ty.Any
    timeout: int
    retry_interval: int


class _Copy:
    """A migration of a server from this host that is under way.

    :ivar instance: the server
    :ivar cancel: stops the copy when it is set
    :ivar reason: why it was stopped
    :ivar deleted: whether the server was deleted, and must not start again
    :ivar sources: where its disks are that are copied, by device
    :ivar off_since: time.monotonic() of its power off
    :ivar over: set when nothing is left to do
    """

    def __init__(self, instance):
        self.instance = instance
        self.cancel = threading.Event()
        self.reason = ''
        self.deleted = False
        self.sources: dict[str, str | None] = {}
        self.off_since = 0.0
        self.over = threading.Event()

    @property
    def off_seconds(self) -> float:
        return time.monotonic() - self.off_since

    def check(self) -> None:
        """Raise Cancelled if the copy was stopped."""
        if self.cancel.is_set():
            raise errors.Cancelled()


class _Operation:
    """A live migration of a server from this host that is under way.

    :ivar is_stopped: whether it has to end before QEMU begins
    :ivar has_begun: whether there is a thread that sends, or waits for QEMU
    :ivar is_qemus: whether QEMU may have begun
    :ivar is_known: whether Nova knows how it ended
    :ivar over: set when QEMU does no more
    :ivar has_moved: whether libvirt said that the server has moved
    """

    def __init__(self):
        self.is_stopped = False
        self.has_begun = False
        self.is_qemus = False
        self.is_known = False
        self.over = threading.Event()
        self.has_moved = False

    def begin(self) -> None:
        """Let QEMU begin; raise Cancelled if that was stopped."""
        self.is_qemus = True
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the live migration was stopped."""
        if self.is_stopped:
            raise errors.Cancelled()


class LibvirtDriver(driver.LibvirtDriver):
    """Nova's libvirt driver, with disks in storage pools that it migrates.

    With ``use_storage_pools`` and ``vol_upload_migration`` both off it does
    what Nova's own driver does.
    """

    def __init__(self, virtapi, read_only=False):
        super().__init__(virtapi, read_only)
        self.image_backend = image.Backend(CONF.use_cow_images)
        self.image_cache_manager = imagecache.ImageCacheManager()
        self._copies: dict[str, _Copy] = {}
        self._operations: dict[str, _Operation] = {}
        # The uuid of the server that this thread hard reboots.
        self._rebooting = threading.local()
        self._queue = turns.Queue(
            CONF.libvirt.vol_upload_migration_max_concurrent)
        self._leftovers = leftovers.Leftovers()
        self._bandwidth = stream.Bandwidth(
            CONF.libvirt.vol_upload_migration_bandwidth * units.Mi)

    def init_host(self, host):
        check_hooks(driver.LibvirtDriver)
        if CONF.libvirt.vol_upload_migration:
            self._check_migration_uri()
            self._warn_of_tokens()
        super().init_host(host)
        self._find_disks_pool()
        if CONF.libvirt.use_storage_pools:
            self._init_disks_pool()
            self._warn_of_clear_text()
        _native(local.tell_place, self._mark())
        if _is_switched_on():
            self._look_at_servers(host)
        if CONF.libvirt.vol_upload_migration:
            _native(local.end_pool, self._uri(), IMAGE_CACHE_POOL)
            self._mend_migrations(host)

    def _look_at_servers(self, host) -> None:
        """Let servers have the files that came while nova-compute was off.

        Also count the servers whose disks are not in the pool yet.
        """
        instances = objects.InstanceList.get_by_host(
            nova_context.get_admin_context(), host)
        for instance in instances:
            places = layout.Layout.of(instance)
            _native(live.delete_unsent, places)
            if instance.task_state is None and self.instance_exists(instance):
                _native(local.drop_claims, places)
            try:
                self._correct_record(instance, places)
            except Exception:
                # This is not to keep nova-compute from starting.
                LOG.exception('The formats of the disks that the domain of '
                              'the server names could not be recorded',
                              instance=instance)
        if CONF.libvirt.use_storage_pools:
            _native(live.delete_markers, CONF.libvirt.disks_pool_path)
            self._warn_of_files(instances)

    def _correct_record(self, instance, places) -> None:
        """Record the files of a server as the images that QEMU takes them for.

        Nova's own driver converts raw disks that come to a host with
        use_cow_images, and leaves their record as it was.

        :raises: StorageError, OSError, NovaException, libvirtError
        """
        try:
            disks = self._list_disks(instance)
        except exception.InstanceNotFound:
            return
        names = {os.path.basename(disk.source_path) for disk in disks
                 if disk.source_type == 'file' and disk.source_path and
                 disk.driver_format == 'qcow2' and
                 os.path.basename(os.path.dirname(disk.source_path)) ==
                 places.uuid}
        _native(local.record_images, places, names)

    @staticmethod
    def _wants_files() -> bool:
        """Whether servers that come here are to have their disks in files."""
        return (CONF.libvirt.vol_upload_migration and
                not CONF.libvirt.use_storage_pools and
                CONF.libvirt.images_type in image.IMAGE_TYPES)

    def _mark(self) -> str | None:
        """Name of the file that tells where disks are, None for the pool."""
        if takes_logical_volumes():
            return layout.GROUP_MARK + CONF.libvirt.images_volume_group
        return layout.NO_POOL if self._wants_files() else None

    def _mend_migrations(self, host) -> None:
        """Put right what Nova leaves of migrations that it ended in.

        Nova loads the servers of this host after that.
        """
        context = nova_context.get_admin_context()
        instances = objects.InstanceList.get_by_host(
            context, host, expected_attrs=[
                'flavor', 'migration_context', 'system_metadata'])
        mend = {task_states.RESIZE_MIGRATING: self._end_migration,
                task_states.RESIZE_FINISH: self._offer_revert}
        for instance in instances:
            if instance.task_state in mend:
                try:
                    mend[instance.task_state](
                        context, instance,
                        objects.Migration.get_by_id_and_instance(
                            context, instance.migration_context.migration_id,
                            instance.uuid))
                except Exception:
                    # This is not to keep nova-compute from starting.
                    LOG.exception('The migration of the server, in which '
                                  'nova-compute ended, cannot be put right',
                                  instance=instance)

    @staticmethod
    def _warn_of_files(instances) -> None:
        count = sum(places.has_files() and not places.volumes()
                    for places in map(layout.Layout.of, instances))
        if count:
            LOG.warning(
                'Servers on this host with disks in %(path)s rather than in '
                'storage pool %(pool)s: %(count)d. A migration to another '
                'host with a pool moves copy-on-write disks into the pool '
                'there', {'path': CONF.instances_path, 'count': count,
                          'pool': CONF.libvirt.disks_pool})

    def _end_migration(self, context, instance, migration) -> None:
        """Let a migration fail, and this host be the server's again.

        nova-compute ended in migrate_disk_and_power_off. Nova starts the
        server next, and would leave the migration as one that is under way,
        and the server's allocation at the destination.
        """
        report.report_client_singleton().move_allocations(
            context, migration.uuid, instance.uuid)
        migration.status = 'error'
        migration.save()

    def _offer_revert(self, context, instance, migration) -> None:
        """Give a server a state that an operator can do something with.

        nova-compute ended in finish_migration. Nova would leave the server in
        that for ever. Its migration can be reverted, unless Nova would confirm
        it by itself: the server is whole on this host, but nobody knows
        whether it starts.
        """
        values = {'host': migration.source_compute, 'uuid': instance.uuid}
        if CONF.resize_confirm_window:
            report.report_client_singleton().delete_allocation_for_instance(
                context, migration.uuid, consumer_type='migration')
            migration.status = 'error'
            instance.vm_state = vm_states.ERROR
            message = ('nova-compute ended before the migration of the server '
                       'did. To start it on this host: openstack server set '
                       '--state active %(uuid)s; openstack server reboot '
                       '--hard %(uuid)s')
        else:
            migration.status = 'finished'
            instance.vm_state = vm_states.RESIZED
            message = ('nova-compute ended before the migration of the server '
                       'did, which may be off now. To start it on %(host)s as '
                       'it was: openstack server resize revert %(uuid)s')
        migration.save()
        instance.task_state = None
        instance.save(expected_task_state=task_states.RESIZE_FINISH)
        LOG.warning(message, values, instance=instance)

    def cleanup_host(self, host):
        """Stop what copies disks, and wait until its servers are back.

        Nova calls this as nova-compute ends, when it has given the work that
        is under way some time to finish ([DEFAULT]manager_shutdown_timeout).
        """
        copies = list(self._copies.values())
        for copy in copies:
            self._stop_copy(copy, _('nova-compute on %s ended') % host)
        deadline = time.monotonic() + PUT_BACK_SECONDS
        for copy in copies:
            copy.over.wait(max(0, deadline - time.monotonic()))
        super().cleanup_host(host)

    @hooks.as_nova_declares
    def spawn(self, context, instance, *args, **kwargs):
        """Start a new server, or an old one anew on this host.

        What an earlier migration left here never becomes its disk.

        :raises: MigrationError
        """
        self._clear_leftovers(instance)
        if (_is_switched_on() and
                instance.task_state == task_states.RESIZE_FINISH):
            self._check_other_cell(instance)
        super().spawn(context, instance, *args, **kwargs)

    def _clear_leftovers(self, instance) -> None:
        """Delete files of a server here that are not its disks.

        An evacuation is the only time when the disks of a server that Nova
        starts anew may be here: on storage that its old host shares. They
        are its disks unless that host was copying them to here.
        """
        places = layout.Layout.of(instance)
        claims = places.claims()
        if instance.host == CONF.host:
            is_leftover = bool(claims) or (
                instance.vm_state == vm_states.SHELVED_OFFLOADED)
        else:
            is_leftover = _is_unfinished(instance, places)
        if is_leftover:
            self._delete_leftovers(instance, places)
        elif claims:
            raise exception.MigrationError(reason=_describe_claims(claims))
        elif instance.host != CONF.host:
            # Its pool may have another path here.
            _native(live.record_shared, places)

    def _check_other_cell(self, instance) -> None:
        """Refuse disks that a server from another cell has here already.

        Nova brings a new disk by Glance. It would go on with the source
        host's instead, and delete that as the resize is confirmed.

        :raises: MigrationError
        """
        for disk in self._list_disks_here(instance):
            raise exception.MigrationError(reason=_(
                '%s of the server is here already. Hosts of two cells must '
                'not share storage for disks. If they do not, delete it: it '
                'is a leftover.') % disk)

    def _list_disks_here(self, instance) -> ty.Iterator[str]:
        """Names of the disks of a server, on any host, that this host sees."""
        places = layout.Layout.of(instance)
        yield from places.volumes()
        if places.has_files():
            yield places.directory
        if self.image_backend.backend().is_shared_block_storage():
            for name in 'disk', 'disk.local', 'disk.eph0', 'disk.swap':
                disk = self.image_backend.by_name(instance, name)
                if disk.exists():
                    yield disk.rbd_name

    def _delete_leftovers(self, instance, places) -> None:
        LOG.info('Deleting what a migration left here of the server',
                 instance=instance)
        self._end_transient_pool(places)
        self._delete_all(instance, places)

    def _delete_all(self, instance, places) -> None:
        """Delete all disks and files of a server here, the claims last."""
        self._delete_logical_volumes(instance)
        _native(local.delete_all, places)

    def _delete_logical_volumes(self, instance) -> None:
        """Delete a server's volumes in the volume group, as Nova does.

        Nova wipes them as [libvirt]volume_clear says.

        :raises: VolumesNotRemoved
        """
        if takes_logical_volumes():
            lvm.remove_volumes(self._lvm_disks(instance))

    def _end_transient_pool(self, places) -> None:
        """Let libvirt forget an instance directory.

        A source host that died may have left a pool of it. When libvirtd
        starts, it would probe what guests wrote there.
        """
        _native(local.end_pool, self._uri(), places.transient_pool)

    @hooks.as_nova_declares
    def _hard_reboot(self, context, instance, *args, **kwargs):
        """Start a server that is this host's, whatever ended before."""
        places = layout.Layout.of(instance)
        if _is_switched_on():
            self._correct_record(instance, places)
        if local.is_half_copied(places):
            _native(local.restore, places)
        is_unfinished = local.has_kept_directory(places) or places.claims()
        if is_unfinished and instance.host == CONF.host:
            _native(local.recover_directory, places)
            if places.claims():
                self._flush_logical_volumes(places)
                _native(local.flush, places)
            local.take_bases(places)
            if places.claims():
                self._end_transient_pool(places)
                _native(local.drop_claims, places)
        if (_is_switched_on() and vtpm.is_saved(places) and
                not os.path.exists(places.vtpm_path) and
                instance.host == CONF.host):
            # It came with a migration that failed before Nova moved it. The
            # server would start with a new vTPM.
            vtpm.put_back(places)
        self._rebooting.uuid = instance.uuid
        try:
            super()._hard_reboot(context, instance, *args, **kwargs)
        finally:
            self._rebooting.uuid = None

    def _is_rebooting(self, instance) -> bool:
        """Whether this is a step of a hard reboot of a server."""
        return _is_switched_on() and (
            getattr(self._rebooting, 'uuid', None) == instance.uuid)

    def _make_swap(self, instance) -> None:
        """Make the swap disk of a server whose migration ended before that.

        Nova makes it at the end, and starts no server without it.
        """
        size = instance.flavor.swap
        disk = self.image_backend.by_name(instance, 'disk.swap')
        if size and not disk.exists():
            disk.cache(
                fetch_func=self._create_swap, filename=f'swap_{size}',
                size=size * units.Mi, swap_mb=size, safe=True)

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
        places = layout.Layout.of(instance)
        server = _Server(context, instance, network_info, block_device_info,
                         flavor, timeout, retry_interval)
        is_here = dest == self.get_host_ip_addr()
        if is_here and places.volumes():
            return self._copy_here_and_power_off(server, places)
        with _refused_on_error(instance):
            self._forget_snapshot(instance)
            enters_pool = not is_here and self._enters_pool(
                server, places, dest)
            is_novas = is_here or not (
                enters_pool or self._moves_over_libvirt(places, dest))
        if is_novas:
            has_nvram = is_here and os.path.isfile(places.nvram_path)
            was_running = has_nvram and self._is_active(instance)
            shares = self._shares(server, was_running)
            disk_info = super().migrate_disk_and_power_off(
                context, instance, dest, flavor, network_info,
                block_device_info, timeout, retry_interval)
            if has_nvram:
                self._copy_nvram_here(server, places, was_running, shares)
            return disk_info

        prepare = functools.partial(
            self._prepare, server, places, dest, enters_pool)
        with contextlib.ExitStack() as stack:
            copy, turn = self._begin_copy(instance, places, stack)
            disk_info, files, move = prepare(copy, stack)
            with _refused_on_error(instance):
                _delete_stale(places)
            if not disk_info or move.there.is_shared:
                turn.leave()
            elif turn.ahead:
                _native(move.close)
                self._wait_for_turn(server, copy, turn, dest)
                disk_info, files, move = prepare(copy, stack)
            with _refused_on_error(instance):
                _native(move.claim)
            with self._put_back_on_error(server, copy, dest) as steps:
                steps.push(self._discard_copy, instance, dest, move.discard)
                self._copy_and_power_off(server, places, move, copy, steps)
        LOG.info('All files of the server are on %(host)s. It has been off '
                 'for %(seconds).1f s',
                 {'host': dest, 'seconds': copy.off_seconds},
                 instance=instance)
        progress.end_off(context, instance)
        paths = {file.path: move.there.layout.path(file) for file in files}
        moved = [dict(info, path=paths[info['path']]) for info in disk_info]
        local.add_heads(moved, move.heads)
        return jsonutils.dumps(moved)

    def _forget_snapshot(self, instance) -> None:
        """Remove the snapshot that an earlier migration left in Ceph.

        Nova takes one of the root disk on the destination host, and fails if
        it is there. A revert goes back to it, however old it is.
        """
        if (_is_switched_on() and
                self.image_backend.backend().is_shared_block_storage()):
            root = self.image_backend.by_name(instance, 'disk')
            if root.exists():
                root.remove_snap(
                    libvirt_utils.RESIZE_SNAPSHOT_NAME, ignore_errors=True)

    def _plan(self, server, places, dest, enters_pool) -> tuple[
            list[dict[str, ty.Any]], list[layout.File], str | None]:
        """List what goes along: every disk is in it, or it is refused.

        :returns: what Nova says of the disks, the files, and where the disks
            go: POOL, DIRECTORY, or None if where they are here
        :raises: StorageError
        """
        disk_info = self._disk_info(server)
        with self._asking(places, dest) as move:
            place = layout.POOL if enters_pool else None
            if places.volumes() and _native(
                    move.may_change_place, layout.DIRECTORY):
                place = layout.DIRECTORY
            bases = self._bases_to_send(server, disk_info, move)
        files = places.moved(places.plan(disk_info, bases), place)
        return disk_info, [_grown(file, server) for file in files], place

    def _begin_copy(
        self, instance, places, stack,
    ) -> tuple[_Copy, turns.Turn]:
        """Note a migration that is under way, and its place in the queue.

        If Nova failed after an earlier copy, the instance directory gets its
        name back first: the checks look into it.

        :param stack: what to leave when it is over
        :raises: InstanceFaultRollback
        """
        with _refused_on_error(instance):
            copy = stack.enter_context(self._copying(instance))
            _check_kept(places)
            _native(local.recover_directory, places)
        return copy, stack.enter_context(self._queue.join())

    def _prepare(
        self, server, places, dest, enters_pool, copy, stack,
    ) -> tuple[list[dict[str, ty.Any]], list[layout.File], transfer.Transfer]:
        """Plan a migration and check both hosts; change nothing.

        :param copy: takes note of where the disks are
        :param stack: what to close when the migration is over
        :returns: what Nova says of the disks, the files, and their transfer
        :raises: InstanceFaultRollback
        """
        with _refused_on_error(server.instance):
            self._check_enabled()
            self._check_request(server)
            copy.sources = self._sources(server)
            disk_info, files, place = self._plan(
                server, places, dest, enters_pool)
            variables = self._read_nvram(server.instance)
            move = self._new_transfer(
                places, dest, files, server.instance.name, place=place,
                has_variables=variables is not None)
            stack.callback(_native, move.close)
            self._check_vtpm(places)
            _native(move.check, server.flavor.swap * units.Mi)
            if not move.there.is_shared:
                _check_files(files, move)
                self._check_raw(files, move)
        return disk_info, files, move

    @staticmethod
    def _check_raw(files, move) -> None:
        """Refuse raw disks with which the server would not start there.

        Nova's own driver makes qcow2 of them where use_cow_images is set, and
        starts the server from them as raw ones.

        :raises: MigrationPreCheckError
        """
        raw = [file.name for file in files if file.format == 'raw' and
               file.place != layout.GROUP and
               file.name not in layout.COMPANIONS]
        if raw and CONF.use_cow_images and not _native(
                move.ask, site.Site.has_driver):
            raise exception.MigrationPreCheckError(reason=_(
                'The destination host has Nova\'s own driver, which converts '
                'raw disk %s. Set [DEFAULT]compute_driver there as on this '
                'host, or [DEFAULT]use_cow_images = False on both.') % raw[0])

    def _wait_for_turn(self, server, copy, turn, dest) -> None:
        """Wait, with the server on, until few enough others copy.

        :raises: InstanceFaultRollback, MigrationError if the waiting ended
            for another reason
        """
        with (self._put_back_on_error(server, copy, dest),
              progress.waiting(server.context, server.instance, turn.ahead)):
            turn.wait(lambda: copy.cancel.is_set() or self._is_ending())
            if self._is_ending():
                self._stop_copy(copy, _('nova-compute on %s ended') %
                                CONF.host)
            copy.check()

    def _is_ending(self) -> bool:
        """Whether nova-compute was told to end.

        It calls cleanup_host() only after the work that is under way, or
        after minutes. Nova before 34 does not tell.
        """
        compute = getattr(self.virtapi, '_compute', None)
        ending = getattr(compute, '_shutdown_in_progress', None)
        return ending is not None and ending.is_set()

    def _copy_and_power_off(self, server, places, move, copy, steps) -> None:
        """Copy all files: the disks while the server runs, then what changed.

        On storage that both hosts share there is nothing to copy.

        :param steps: where to put what has to be undone after an error
        """
        instance = server.instance
        watch = progress.Progress(
            server.context, instance, move.there.daemon.host)
        copy.check()
        if self._can_precopy(instance, move):
            while watch.watch(functools.partial(
                    _native, move.precopy, copy.cancel, watch)):
                self._flush_there(server, copy)
            watch.tell_power_off()
        copy.check()
        self._check_sources(server, copy)
        # The guest may have been shut down meanwhile.
        self._power_off_for_copy(
            server, copy, self._is_active(instance), steps)
        variables = self._read_nvram(instance)
        if move.there.is_shared:
            if variables is not None and hooks.keeps_nvram():
                nvram.write(places.nvram_path, variables)
            # The destination host takes it. The original is for a revert.
            steps.push(self._drop_saved, instance, places)
            vtpm.save(places, places.saved_vtpm_path)
            _native(layout.write_record, places.record_path,
                    places.formats() | move.formats())
            return
        late = [] if variables is None else [nvram.as_file(variables)]
        watch.watch(functools.partial(
            _native, move.run, copy.cancel, watch, late))
        _native(local.keep_directory, places)

    @staticmethod
    def _drop_saved(instance, places) -> None:
        """Delete the copy of a vTPM; the next migration does it otherwise."""
        try:
            vtpm.drop_saved(places)
        except Exception as error:
            LOG.warning('Failed to delete the copy of the vTPM: %s', error,
                        instance=instance)

    @staticmethod
    def _flush_there(server, copy) -> None:
        """Wait until the destination host has written what has arrived.

        It waits for that again before it starts the server. But the server is
        off then, for as long as its storage takes to write what came in half a
        minute. Nova's own driver there writes nothing now, and the copy goes
        on if nobody answers. Without a message queue it waits for one: Nova
        needs that for all that follows, and the server still runs.
        """
        instance = server.instance

        def ask():
            migration = progress.get_migration(server.context, instance)
            tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(
                    oslo_messaging.MessagingTimeout),
                stop=tenacity.stop_after_attempt(FLUSH_CALLS), reraise=True)(
                    rpcapi.ComputeAPI().check_instance_shared_storage,
                    server.context, data={'filename': '', FLUSH: True},
                    instance=instance, host=migration.dest_compute)

        asking = progress.start(ask)
        while not (copy.cancel.is_set() or
                   futures.wait([asking], threads.POLL_SECONDS).done):
            pass
        error = asking.exception() if asking.done() else None
        if error:
            LOG.warning('The destination host has not written yet what has '
                        'arrived, the server may be off for longer: %s',
                        error, instance=instance)

    def _copy_here_and_power_off(self, server, places) -> str:
        """Do the same for a server that is resized on its own host.

        What it had until now is kept for a revert under other names.
        """
        instance = server.instance
        with contextlib.ExitStack() as stack:
            copy, turn = self._begin_copy(instance, places, stack)
            disk_info, files = self._prepare_here(server, places, copy)
            with _refused_on_error(instance):
                _delete_stale(places)
            if turn.ahead:
                self._wait_for_turn(server, copy, turn, CONF.host)
                disk_info, files = self._prepare_here(server, places, copy)
            with _refused_on_error(instance):
                was_running = self._is_active(instance)
            with self._put_back_on_error(server, copy, CONF.host) as steps:
                copy.check()
                self._power_off_for_copy(server, copy, was_running, steps)
                steps.push(self._restore, copy, places)
                _native(local.keep, places)
                # Copy the record last: a server does not start from a disk
                # whose format is not recorded.
                for path in [*(file.path for file in files),
                             places.record_path]:
                    self._copy_here(copy, places.kept_path(path), path)
                copy.check()
                vtpm.keep(places)
                _copy_kept_nvram(places)
        return jsonutils.dumps(disk_info)

    def _copy_nvram_here(self, server, places, was_running, shares) -> None:
        """Copy the UEFI variables of a server that Nova's code resized here.

        :raises: InstanceFaultRollback
        """
        with (self._copying(server.instance) as copy,
              self._put_back_on_error(server, copy, CONF.host) as steps):
            copy.off_since = time.monotonic()
            steps.push(self._start_again, server, copy, was_running, shares,
                       steps)
            steps.push(self._restore, copy, places, local.restore_directory)
            _copy_kept_nvram(places)

    def _prepare_here(
        self, server, places, copy,
    ) -> tuple[list[dict[str, ty.Any]], list[layout.File]]:
        """Check a server that is resized on its own host; change nothing.

        :param copy: takes note of where the disks are
        :returns: what Nova says of the disks, and the files to copy
        :raises: InstanceFaultRollback
        """
        with _refused_on_error(server.instance):
            self._check_request(server)
            self._check_vtpm(places)
            copy.sources = self._sources(server)
            disk_info = self._disk_info(server)
            files = places.plan(disk_info)
            _check_room_here(disk_info)
        return disk_info, files

    @hooks.as_nova_declares
    def finish_migration(
        self, context, migration, instance, disk_info, network_info,
        image_meta, resize_instance, allocations, block_device_info=None,
        power_on=True, **later,
    ):
        """Start a server on the destination, whichever way its disks came."""
        # Saved by Nova with the state that it gives to the server next.
        instance.progress = 0
        disks = jsonutils.loads(disk_info)
        places = layout.Layout.of(instance)
        self._check_seen(migration, instance, disks, block_device_info)
        try:
            self._flush_logical_volumes(places)
            if _is_switched_on() and not places.claims():
                # Nova's own driver, on the source host, does not correct it.
                _native(local.record_images, places, {
                    os.path.basename(info['path']) for info in disks
                    if info['type'] == 'qcow2' and
                    not local.is_volume(places, info)})
            local.adopt(places, disks)
            _native(local.delete_unknown, places, disks)
            others = [self._convert(places, info) for info in disks
                      if self._is_novas(places, info)]
        except (errors.StorageError, OSError,
                processutils.ProcessExecutionError) as error:
            raise exception.MigrationError(reason=str(error)) from error
        super().finish_migration(
            context, migration, instance, jsonutils.dumps(others),
            network_info, image_meta, resize_instance, allocations,
            block_device_info, power_on, **later)
        if power_on:
            seconds = progress.end_off(context, instance)
            if seconds is not None:
                LOG.info('The server runs on this host. It was off for '
                         '%.1f s', seconds, instance=instance)

    @staticmethod
    def _flush_logical_volumes(places) -> None:
        for path in places.logical_volumes():
            nova.privsep.storage_migrate.flush_device(path)

    def _check_seen(
        self, migration, instance, disks, block_device_info,
    ) -> None:
        """Check that this host sees the disks of a server that arrives.

        Nova would make new ones where this host does not have the storage
        that the source host has.

        :raises: MigrationError
        """
        if not CONF.libvirt.vol_upload_migration:
            return
        names = self._list_old_disks(instance, block_device_info)
        backend = self.image_backend.backend()
        if (backend.is_shared_block_storage() or
                backend is imagebackend.Lvm):
            seen = {name for name in names if self.image_backend.by_name(
                instance, name).exists()}
        else:
            places = layout.Layout.of(instance)
            seen = {places.disk_name(info['path']) for info in disks}
        for name in names:
            if name not in seen:
                raise exception.MigrationError(reason=_(
                    'this host does not see disk %(disk)s of the server. Set '
                    '[libvirt]images_type, images_rbd_pool and '
                    'images_rbd_ceph_conf as on host %(host)s.') % {
                        'disk': name, 'host': migration.source_compute})

    def _list_old_disks(self, instance, block_device_info) -> list[str]:
        """Names of the disks with data that a server had on its source."""
        names = []
        if not self._is_booted_from_volume(block_device_info):
            names.append('disk')
        ephemerals = virt_driver.block_device_info_get_ephemerals(
            block_device_info)
        names += map(blockinfo.get_eph_disk, range(len(ephemerals)))
        if instance.default_ephemeral_device and not ephemerals:
            # Nova made it because the flavor has one.
            names.append('disk.local')
        return names

    def _is_novas(self, places, info) -> bool:
        """Whether Nova's code may convert a disk that arrived.

        It makes qcow2 of raw disks where use_cow_images is set, also where
        the server's domain goes on to call them raw.
        """
        keeps_raw = self.image_backend.backend() in (
            imagebackend.Flat, imagebackend.Lvm)
        return not local.is_volume(places, info) and not (
            keeps_raw and info['type'] == 'raw')

    def _convert(self, places, info) -> dict[str, ty.Any]:
        """Convert a raw disk that arrived as Nova's code does, and record it.

        Nova's code reads the disk as an image before it converts it, and does
        not change the record. A swap disk does not exist yet.

        :returns: what to tell Nova's code of the disk
        :raises: StorageError, OSError, ProcessExecutionError
        """
        path = info['path']
        if (not _is_switched_on() or info['type'] != 'raw' or
                not CONF.use_cow_images or not os.path.exists(path) or
                os.path.basename(path) in layout.COMPANIONS):
            return info
        self._disk_raw_to_qcow2(path)
        _native(layout.write_record, places.record_path,
                places.formats() | {path: 'qcow2'})
        return dict(info, type='qcow2')

    def confirm_migration(self, context, migration, instance, network_info):
        """Delete what was kept on the source for a revert."""
        places = layout.Layout.of(instance)
        _native(local.delete_kept, places)
        if instance.host != CONF.host and local.has_kept_directory(places):
            self._delete_logical_volumes(instance)
            _native(local.delete_kept_volumes, places)
        super().confirm_migration(context, migration, instance, network_info)
        if instance.host != CONF.host and (
                _is_switched_on() and hooks.keeps_tpm_secret()):
            # Nova's code leaves the secret of a vTPM that a host keeps.
            self._host.delete_secret('vtpm', instance.uuid)

    @hooks.as_nova_declares
    def finish_revert_migration(
        self, context, instance, network_info, migration,
        block_device_info=None, power_on=True, **later,
    ):
        """Start a server on the source as it was before its migration.

        Nova calls this also when it finds, as it starts, that it ended in
        the middle of one.
        """
        if (instance.task_state == task_states.RESIZE_MIGRATING and
                self._is_active(instance)):
            # Nova's code would fail to start it, and then unplug its ports.
            LOG.info('nova-compute ended while it copied the disks of the '
                     'server, which has been running all the time',
                     instance=instance)
            return
        if instance.task_state == task_states.RESIZE_MIGRATING:
            self._forget_snapshot(instance)
        places = layout.Layout.of(instance)
        if places.kept() and (
                migration.source_compute == migration.dest_compute):
            _native(local.restore, places)
        super().finish_revert_migration(
            context, instance, network_info, migration, block_device_info,
            power_on, **later)

    def _is_active(self, instance) -> bool:
        """Whether the server has a domain that runs or is paused.

        QEMU pauses a guest whose disk has an error, or no room.
        """
        try:
            return self.get_info(instance).state in (
                power_state.RUNNING, power_state.PAUSED,
                power_state.SUSPENDED)
        except exception.InstanceNotFound:
            return False

    def _finish_migration_vtpm(self, context, instance):
        # The state that an earlier migration left here would be in the way of
        # the state that arrived.
        places = layout.Layout.of(instance)
        if _is_switched_on() and vtpm.is_saved(places):
            vtpm.delete(places)
        super()._finish_migration_vtpm(context, instance)

    def _finish_revert_migration_vtpm(self, context, instance):
        # Nova's code fails where the server has had a state since its resize.
        # Nova calls this also as it starts after it ended in the middle of a
        # copy. The server has no old flavor then, which Nova's code stumbles
        # over, and the server would stay off.
        if _is_switched_on() or instance.old_flavor is None:
            places = layout.Layout.of(instance)
            if instance.task_state == task_states.RESIZE_MIGRATING:
                vtpm.drop_half(places)
            vtpm.put_back(places)
        if instance.old_flavor is not None:
            super()._finish_revert_migration_vtpm(context, instance)

    @hooks.as_nova_declares
    def cleanup(self, context, instance, network_info,
                block_device_info=None, destroy_disks=True, *args, **kwargs):
        """Also delete the files that came with a migration.

        In a revert, Nova keeps the vTPM's state of a server, the instance
        directory of one with disks in Ceph, and on shared storage the disks
        that only the new flavor has. They would be in the way when the server
        comes again.
        """
        super().cleanup(context, instance, network_info, block_device_info,
                        destroy_disks, *args, **kwargs)
        is_reverted = (not destroy_disks and
                       instance.task_state == task_states.RESIZE_REVERTING)
        if is_reverted and _is_switched_on():
            self._delete_reverted(instance)

    def _delete_reverted(self, instance) -> None:
        places = layout.Layout.of(instance)
        vtpm.delete(places)
        _native(local.delete_disks, places, _list_new_disks(instance))
        # Where the source host kept it beside this one, Nova deletes it.
        if (CONF.libvirt.vol_upload_migration and
                self.image_backend.backend().is_shared_block_storage() and
                not os.path.exists(places.kept_directory)):
            self._delete_leftovers(instance, places)

    def delete_instance_files(self, instance):
        """Delete a server's files on this host, and its volumes.

        A copy of them that is under way ends. A hard reboot, by which Nova
        gets here with disks in Ceph and [workarounds]
        ensure_libvirt_rbd_instance_dir_cleanup, deletes nothing: the UEFI
        variables and the kernel that came with a migration would be lost.

        :returns: True if nothing is left
        :raises: OSError if a volume is left that is to be made anew
        """
        if self._is_rebooting(instance):
            return True
        copy = self._copies.get(instance.uuid)
        if copy:
            copy.deleted = True
            self._stop_copy(copy, _('the server was deleted'))
        deleted = super().delete_instance_files(instance)
        try:
            _native(local.delete_volumes, layout.Layout.of(instance))
            if takes_logical_volumes() and instance.deleted:
                # Nova deletes no more than files of a server that was deleted
                # before its migration from here was confirmed.
                self._delete_logical_volumes(instance)
        except (OSError, exception.VolumesNotRemoved):
            if instance.task_state == task_states.REBUILDING:
                # The server would be made anew with its old disks.
                raise
            # Nova tries again later if told that this failed.
            LOG.exception('Failed to delete the volumes of the server in %s',
                          CONF.libvirt.disks_pool_path, instance=instance)
            return False
        return deleted

    def instance_on_disk(self, instance):
        """Whether the disks of a server to evacuate are on this host.

        :raises: InvalidSharedStorage if they are, and their formats not
        """
        places = layout.Layout.of(instance)
        if _is_unfinished(instance, places):
            LOG.info('Only an unfinished copy of the server is on this host',
                     instance=instance)
            return False
        try:
            formats = places.formats()
            names_volumes = places.names_volumes()
        except errors.StorageError as error:
            raise exception.InvalidSharedStorage(
                path=places.record_path, reason=str(error)) from error
        if claims := places.claims():
            raise exception.InvalidSharedStorage(
                path=places.directory, reason=_describe_claims(claims))
        _check_recorded(places, formats)
        _check_images(places, formats)
        _check_left(places)
        if names_volumes:
            return bool(places.volumes())
        return super().instance_on_disk(instance)

    def check_instance_shared_storage_local(self, context, instance):
        """Make what another host sees if it shares the server's storage.

        :returns: what to tell it; None if there is nothing to share
        """
        data = super().check_instance_shared_storage_local(context, instance)
        places = layout.Layout.of(instance)
        if places.volumes():
            marker = local.make_marker(places)
            data = {'filename': marker, **(data or {}),
                    'volume': os.path.basename(marker)}
        return data

    def check_instance_shared_storage_remote(self, context, data):
        """Whether this host shares any of another's storage.

        Any, for the other will delete all or nothing.

        A source host calls this also to have written what it has sent: Nova
        has no other call from one host to the driver of another.
        """
        if FLUSH in data:
            local.flush_all()
            return False
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
        """How QEMU caches disks; without O_DIRECT it cannot be 'none'."""
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

    def check_can_live_migrate_destination(
        self, context, instance, src_compute_info, dst_compute_info,
        block_migration=False, disk_over_commit=False,
    ):
        """Also tell the source host about the pool on this host.

        :raises: MigrationPreCheckError
        """
        tells = CONF.libvirt.use_storage_pools or self._wants_files()
        if tells:
            self._refuse_domain(instance)
        data = super().check_can_live_migrate_destination(
            context, instance, src_compute_info, dst_compute_info,
            block_migration, disk_over_commit)
        if tells:
            try:
                notice = live.introduce(
                    layout.Layout.of(instance), instance.host,
                    CONF.libvirt.use_storage_pools)
            except OSError as error:
                super().cleanup_live_migration_destination_check(context, data)
                raise exception.MigrationPreCheckError(
                    reason=str(error)) from error
            notice.write(data)
        return data

    def cleanup_live_migration_destination_check(
        self, context, dest_check_data,
    ):
        notice = live.Notice.read(dest_check_data)
        if notice and notice.marker:
            fileutils.delete_if_exists(os.path.join(
                CONF.libvirt.disks_pool_path, notice.marker))
        super().cleanup_live_migration_destination_check(
            context, dest_check_data)

    def check_can_live_migrate_source(
        self, context, instance, dest_check_data, block_device_info=None,
    ):
        """Refuse what the destination cannot take; decide what is sent.

        :raises: MigrationPreCheckError
        """
        places = layout.Layout.of(instance)
        if takes_logical_volumes() and places.logical_volumes():
            # Nova would make files for them, which no domain there has.
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are in LVM, and cannot be live '
                'migrated. Cold migrate the server.'))
        if not places.volumes():
            data = super().check_can_live_migrate_source(
                context, instance, dest_check_data, block_device_info)
            self._offer_files(
                context, instance, places, data, block_device_info)
            return data
        try:
            disks = self._read_disk_info(instance, block_device_info)
            notice = live.find_notice(dest_check_data)
            is_shared = live.shares_pool(places, notice)
            if is_shared != self._check_shared_storage_test_file(
                    dest_check_data.filename, instance):
                raise live.half_shared()
            live.check(places, notice, disks, is_shared)
            sent = ([] if is_shared else
                    self._list_sent(context, instance, places, disks))
            if sent:
                destination_uri('destination')
        except errors.StorageError as error:
            raise exception.MigrationPreCheckError(
                reason=str(error)) from error
        data = super().check_can_live_migrate_source(
            context, instance, dest_check_data, block_device_info)
        dataclasses.replace(notice, sent=sent).write(data)
        return data

    def _offer_files(self, context, instance, places, data,
                     block_device_info) -> None:
        """Offer to send what QEMU does not copy of a server with files.

        Nova's own code migrates the server if either host is not set up for
        that, or if a disk is not one that Nova made.

        :raises: MigrationPreCheckError
        """
        notice = live.Notice.read(data)
        if (notice is None or data.is_on_shared_storage() or
                not CONF.libvirt.vol_upload_migration or
                CONF.libvirt.images_type not in image.IMAGE_TYPES):
            return
        try:
            disks = self._read_disk_info(instance, block_device_info)
            places.plan(disks)
            sent = self._list_sent(context, instance, places, disks)
            destination_uri('destination')
        except errors.StorageError as error:
            LOG.info("Nova's own code live migrates the server: %s", error,
                     instance=instance)
            return
        try:
            if live.shares_pool(places, notice):
                raise live.half_shared()
            live.check_names(notice)
        except errors.Refused as error:
            raise exception.MigrationPreCheckError(
                reason=str(error)) from error
        dataclasses.replace(notice, sent=sent).write(data)

    def _list_sent(self, context, instance, places, disks) -> list[str]:
        """Names of the files that QEMU does not copy to the destination."""
        lost = self._lost_bases(context, instance, _list_bases(disks))
        live.check_room(places, lost)
        return live.list_sent(places, disks, self._list_read_only(instance),
                              set(map(os.path.basename, lost)))

    def _list_read_only(self, instance) -> set[str]:
        return {disk.source_path for disk in self._list_disks(instance)
                if disk.readonly}

    def _list_disks(self, instance) -> list[ty.Any]:
        return self._host.get_guest(instance).get_all_disks()

    def _is_shared_block_storage(
        self, instance, dest_check_data, block_device_info=None,
    ):
        """Whether the destination host sees the server's disks."""
        notice = live.Notice.read(dest_check_data)
        if notice is None or not layout.Layout.of(instance).volumes():
            return super()._is_shared_block_storage(
                instance, dest_check_data, block_device_info)
        return live.shares_pool(layout.Layout.of(instance), notice)

    def pre_live_migration(
        self, context, instance, block_device_info, network_info, disk_info,
        migrate_data,
    ):
        """Make the disks of a server that is to come, for QEMU to fill.

        :raises: MigrationPreCheckError
        """
        with _deciding(instance):
            return self._pre_live_migration(
                context, instance, block_device_info, network_info, disk_info,
                migrate_data)

    def _pre_live_migration(
        self, context, instance, block_device_info, network_info, disk_info,
        migrate_data,
    ):
        places = layout.Layout.of(instance)
        disks = jsonutils.loads(disk_info or '[]')
        notice = None
        if migrate_data.is_shared_block_storage:
            if places.volumes():
                live.record_shared(places)
                notice = live.Notice(places.pool_path)
        else:
            notice = self._claim_for_live_migration(
                instance, places, migrate_data, disks)
        if notice and notice.claim:
            disk_info = jsonutils.dumps(live.disks_here(disks, notice))
        try:
            migrate_data = super().pre_live_migration(
                context, instance, block_device_info, network_info, disk_info,
                migrate_data)
        except Exception:
            with excutils.save_and_reraise_exception():
                if notice and notice.claim:
                    # Nova's code replaces the list that the notice is in.
                    notice.write(migrate_data)
                    self._rollback_live_migration(
                        context, instance, network_info, block_device_info,
                        True, migrate_data)
        if notice:
            notice.write(migrate_data)
        return migrate_data

    def _claim_for_live_migration(self, instance, places, migrate_data,
                                  disks) -> live.Notice | None:
        """Take possession of the names of a server's files on this host.

        :param disks: what the source host says of them
        :returns: what to tell the source host; None if the server has files
            that Nova's own code makes here
        :raises: MigrationPreCheckError
        """
        notice = live.Notice.read(migrate_data)
        if notice is None or notice.sent is None:
            if not any(local.is_volume(places, disk) for disk in disks):
                return None
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are in a storage pool, and host '
                '%s does not have the driver for it. Set [DEFAULT]'
                'compute_driver there as on this host.') % instance.host)
        # The files of a domain that is here are no leftovers.
        self._refuse_domain(instance)
        if places.claims():
            self._delete_leftovers(instance, places)
        has_pool = CONF.libvirt.use_storage_pools
        try:
            claim = live.claim(places, notice, instance.host, has_pool)
        except errors.Refused as error:
            raise exception.MigrationPreCheckError(
                reason=str(error)) from error
        return live.Notice(
            places.pool_path if has_pool else '', sent=notice.sent,
            claim=claim.name, paths=live.paths_here(places, disks, has_pool))

    def live_migration(
        self, context, instance, dest, post_method, recover_method,
        block_migration=False, migrate_data=None,
    ):
        """Live migrate a server, and let go of it here if it has moved.

        Nova takes a domain that is off for one that has moved. A guest can
        power off at any time, even before QEMU has begun to copy.
        """
        if live.Notice.read(migrate_data) is None:
            super().live_migration(
                context, instance, dest, post_method, recover_method,
                block_migration, migrate_data)
            return
        operation = self._operations[instance.uuid] = _Operation()
        address = migrate_data.target_connect_addr or dest

        def let_go(*args):
            operation.is_known = True
            if self._has_left(instance, operation, address):
                post_method(*args)
            else:
                LOG.warning('The server was powered off before it had moved',
                            instance=instance)
                recover_method(context, instance, dest, migrate_data)
                # Nova ignored the power-off while the server was moving.
                self.emit_event(virtevent.LifecycleEvent(
                    instance.uuid, virtevent.EVENT_LIFECYCLE_STOPPED))

        def take_back(*args, **kwargs):
            operation.is_known = True
            self._check_stayed(instance, operation, address)
            recover_method(*args, **kwargs)

        try:
            super().live_migration(
                context, instance, dest, let_go, take_back,
                block_migration, migrate_data)
        except Exception:
            with excutils.save_and_reraise_exception() as ending:
                # libvirt or the database did not answer in time. Nova would
                # set the status of the server to ERROR, wherever it runs.
                if self._is_out_of_sight(instance, operation):
                    if operation.has_moved:
                        let_go(context, instance, dest, block_migration,
                               migrate_data)
                        ending.reraise = False
                    elif self._is_active(instance):
                        take_back(context, instance, dest, migrate_data)
                        ending.reraise = False
        finally:
            del self._operations[instance.uuid]

    def _is_out_of_sight(self, instance, operation) -> bool:
        """Whether a live migration has ended, and Nova does not know how.

        A live migration that has not begun is kept from beginning.
        """
        if operation.is_known:
            return False
        self._stop_sending(instance, operation,
                           _('the live migration is not watched any more'))
        return not operation.has_begun or operation.over.wait(LIVE_END_SECONDS)

    def _check_stayed(self, instance, operation, dest) -> None:
        """Check that a server whose live migration failed is here alone.

        If the libvirt daemon here ends in the last moment, it leaves the
        domain paused, and does not know whether the server has moved.

        :raises: HostError, MigrationError if nobody can tell
        """
        guest = self._host.get_guest(instance)
        has_moved = operation.has_moved or live.is_in_post_copy(guest)
        if not has_moved and live.is_held(guest):
            operation.over.wait(LIVE_END_SECONDS)
            if live.is_held(guest):
                with self._asking(layout.Layout.of(instance), dest) as move:
                    has_moved = _native(move.ask, site.Site.has_moved)
                if not has_moved:
                    guest.resume()
        if has_moved:
            raise exception.MigrationError(reason=_(
                'A domain of the server is on both hosts. Find out on which '
                'one it runs.'))

    def _has_left(self, instance, operation, dest) -> bool:
        """Whether nothing here is needed any more of a server that is off.

        :raises: HostError, MigrationError if nobody can tell whether the
            server has moved
        """
        self._stop_sending(instance, operation,
                           _('the server was powered off'))
        if _is_deleted(instance):
            return True
        if not operation.over.wait(LIVE_END_SECONDS):
            raise exception.MigrationError(reason=_(
                'QEMU does not end the live migration. Find out on which host '
                'the server runs.'))
        if operation.has_moved:
            return True
        with self._asking(layout.Layout.of(instance), dest) as move:
            return _native(move.ask, site.Site.has_moved)

    def _stop_sending(self, instance, operation, reason) -> None:
        operation.is_stopped = True
        copy = self._copies.get(instance.uuid)
        if copy:
            self._stop_copy(copy, reason)

    def _live_migration_operation(
        self, context, instance, dest, block_migration, migrate_data, guest,
        device_names,
    ):
        """Send what QEMU does not, and have it copy the rest.

        Nova asks the domain how the migration ended. It has put all back when
        it looks at an error of this method, and would leave a server in ERROR
        that runs as before.
        """
        places = layout.Layout.of(instance)
        notice = live.Notice.read(migrate_data)
        if notice is None:
            super()._live_migration_operation(
                context, instance, dest, block_migration, migrate_data, guest,
                device_names)
            return
        operation = self._operations.get(instance.uuid)
        if operation is None:
            # Nova gave up before this thread began.
            return
        operation.has_begun = True
        try:
            if notice.claim and notice.sent:
                self._send(instance, operation, places, notice,
                           migrate_data.target_connect_addr or dest)
            operation.begin()
            super()._live_migration_operation(
                context, instance, dest, block_migration, migrate_data,
                live.Guest(guest._domain, places, notice), device_names)
            operation.has_moved = True
        except Exception as error:
            LOG.warning('The live migration of the server failed: %s', error,
                        instance=instance)
        finally:
            operation.over.set()

    def _send(self, instance, operation, places, notice, dest) -> None:
        """Send the files that QEMU does not copy.

        :raises: MigrationPreCheckError, HostError, Cancelled
        """
        claim = layout.Claim.parse(places.uuid, notice.claim)
        live.check_sent(notice, self._list_disks(instance))
        with self._copying(instance) as copy, contextlib.ExitStack() as stack:
            operation.check()
            files = stack.enter_context(live.files_to_send(
                places, notice, functools.partial(self._execute, copy)))
            move = self._new_transfer(
                places, dest, files, instance.name, claim,
                layout.POOL if notice.path else layout.DIRECTORY)
            stack.callback(_native, move.close)
            _native(move.send, copy.cancel)

    def live_migration_abort(self, instance):
        """Abort a live migration, also before QEMU has begun."""
        operation = self._operations and self._operations.get(instance.uuid)
        if operation:
            self._stop_sending(instance, operation,
                               _('the live migration was aborted'))
        if not operation or operation.is_qemus:
            try:
                super().live_migration_abort(instance)
            except exception.InstanceNotFound:
                # Nova also aborts what it fails to watch, and would tell of
                # this error instead of the first one.
                if not operation:
                    raise
                LOG.warning('It is too late to abort the live migration of '
                            'the server', instance=instance)

    def rollback_live_migration_at_destination(
        self, context, instance, network_info, block_device_info,
        destroy_disks=True, migrate_data=None,
    ):
        """Delete what was made here for the server, and nothing else.

        The call may be late. By then the server may run here, or another
        attempt may be under way.
        """
        with _deciding(instance):
            self._rollback_live_migration(
                context, instance, network_info, block_device_info,
                destroy_disks, migrate_data)

    def _rollback_live_migration(
        self, context, instance, network_info, block_device_info,
        destroy_disks, migrate_data,
    ) -> None:
        places = layout.Layout.of(instance)
        notice = live.Notice.read(migrate_data)
        if notice and notice.sent is not None and not (
                migrate_data.is_shared_block_storage):
            if notice.claim not in {
                    claim.name for claim in places.claims().values()}:
                LOG.warning('The live migration that failed has nothing here '
                            'any more', instance=instance)
                return
            self._end_transient_pool(places)
        elif places.volumes():
            destroy_disks = False
        super().rollback_live_migration_at_destination(
            context, instance, network_info, block_device_info,
            destroy_disks, migrate_data)

    def post_live_migration_at_destination(
        self, context, instance, network_info, block_migration=False,
        block_device_info=None,
    ):
        """Let the files here be the server's own."""
        places = layout.Layout.of(instance)
        try:
            super().post_live_migration_at_destination(
                context, instance, network_info, block_migration,
                block_device_info)
        except exception.InstanceNotFound:
            if places.claims() and _is_deleted(instance):
                self.delete_instance_files(instance)
            raise
        if places.claims():
            _native(local.settle, places)

    def _create_images_and_backing(
        self, context, instance, instance_dir, disk_info,
        fallback_from_host=None,
    ):
        # Nova looks for all disks of a server that starts in the directory
        # it is told, and makes those that are not there.
        if instance.task_state == task_states.MIGRATING and any(
                'sent' in info for info in disk_info or []):
            live.record(layout.Layout.of(instance), disk_info)
            disk_info = [info for info in disk_info if not info['sent']]
        in_pool = [info for info in disk_info or []
                   if image.is_in_pool(info['path'])]
        if in_pool:
            super()._create_images_and_backing(
                context, instance, CONF.libvirt.disks_pool_path, in_pool,
                fallback_from_host)
            disk_info = [info for info in disk_info if info not in in_pool]
        super()._create_images_and_backing(
            context, instance, instance_dir, disk_info, fallback_from_host)

    @hooks.as_nova_declares
    def _undefine_domain(self, instance, *args, **kwargs):
        """Undefine a domain; its UEFI variables go with its directory.

        The directory may be in use on another host that shares it.
        """
        if hooks.keeps_nvram() and os.path.isfile(
                layout.Layout.of(instance).nvram_path):
            kwargs['keep_nvram'] = True
        super()._undefine_domain(instance, *args, **kwargs)

    @hooks.as_nova_declares
    def _get_guest_config(
        self, instance, network_info, image_meta, disk_info, *args, **kwargs,
    ):
        """Describe a domain, with the UEFI variables that came along.

        :raises: InternalError if their file is empty
        """
        if (self._is_rebooting(instance) and instance.host == CONF.host and
                'disk.swap' in disk_info['mapping']):
            self._make_swap(instance)
        guest = super()._get_guest_config(
            instance, network_info, image_meta, disk_info, *args, **kwargs)
        path = layout.Layout.of(instance).nvram_path
        if os.path.isfile(path):
            try:
                nvram.check(path)
            except errors.StorageError as error:
                raise exception.InternalError(str(error)) from error
            nvram.name_in(guest, path)
        return guest

    def _fetch_instance_kernel_ramdisk(self, context, instance,
                                       fallback_from_host=None):
        """Get kernel and ramdisk, unless the source host sends them."""
        if not (instance.task_state == task_states.MIGRATING and
                layout.Layout.of(instance).claims()):
            super()._fetch_instance_kernel_ramdisk(
                context, instance, fallback_from_host)

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

    def _needs_rebase_original_qcow2_image(self, instance, backend):
        # A full image does not stand on that of the snapshot it was made of.
        return (not isinstance(backend, image.FullVolume) and
                super()._needs_rebase_original_qcow2_image(instance, backend))

    def _bases_to_send(self, server, disk_info, move) -> list[str]:
        """Paths of base images that have to go along.

        One that Glance gives goes along too where the destination does not
        have it: Nova there would fetch it only when the server is off.

        :raises: StorageError
        """
        bases = _list_bases(disk_info)
        lost = self._lost_bases(server.context, server.instance, bases)
        others = [base for base in bases
                  if base not in lost and os.access(base, os.R_OK)]
        return lost + (_native(move.missing_bases, others) if others else [])

    def _lost_bases(self, context, instance, bases) -> list[str]:
        """The base images that the destination cannot get from Glance.

        Also those that this host has made for itself.

        :param bases: paths of the base images of a server
        """
        image_id = instance.image_ref
        name = imagecache.cache_name(image_id) if image_id else ''
        if any(os.path.basename(base) == name for base in bases) and (
                self._glance_gives(context, image_id)):
            return [base for base in bases if os.path.basename(base) != name]
        return bases

    def _glance_gives(self, context, image_id) -> bool:
        """Whether the user of a request can have an image."""
        try:
            image_meta = self._image_api.get(context, image_id)
        except Exception as error:
            LOG.info('Glance does not give image %(id)s, which goes along '
                     'with the disks: %(error)s',
                     {'id': image_id, 'error': error})
            return False
        return image_meta['status'] == 'active'

    def _grow_ephemeral(self, instance, block_device_info) -> None:
        """Let a server's only ephemeral disk be as big as its flavor says.

        Nova takes the size from the block device mapping, which a resize
        does not change. Of several disks nobody knows which is to grow.
        """
        ephemerals = virt_driver.block_device_info_get_ephemerals(
            block_device_info)
        name = blockinfo.get_eph_disk(0)
        if len(ephemerals) == 1 and layout.Layout.of(
                instance).has_volume(name):
            self.image_backend.by_name(instance, name).resize_image(
                instance.flavor.ephemeral_gb * units.Gi)

    def _check_migration_uri(self) -> None:
        """Refuse a URI that is not safe, warn of one that is less so.

        :raises: InvalidConfiguration
        """
        uri = _uri_template() or self._live_migration_uri('%s')
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

    @staticmethod
    def _warn_of_tokens() -> None:
        if not CONF.service_user.send_service_user_token:
            LOG.warning(
                'The token of a user may expire while the disks of a server '
                'are copied. Nova then gets no answer from Neutron, Cinder '
                'and Glance, and the migration fails. Set [service_user]'
                'send_service_user_token and the credentials there on all '
                'hosts')

    def _find_disks_pool(self) -> None:
        """Take the disks pool where it is, if nova.conf does not say where.

        It is where an earlier release, with another default, made it. Servers
        may have disks there with both options off, too.
        """
        path = None
        if _is_switched_on():
            path = _native(
                local.find_pool, self._uri(), CONF.libvirt.disks_pool)
        place.adopt(path)

    @staticmethod
    def _warn_of_clear_text() -> None:
        if not CONF.libvirt.live_migration_with_native_tls:
            LOG.warning(
                'QEMU sends the disks and the memory of servers that are live '
                'migrated in clear text, whatever the URI is. Give QEMU '
                'certificates and set [libvirt]live_migration_with_native_tls '
                'on all hosts')

    def _init_disks_pool(self) -> None:
        if CONF.libvirt.images_type not in image.IMAGE_TYPES:
            raise exception.InvalidConfiguration(_(
                '[libvirt]use_storage_pools cannot be used with '
                '[libvirt]images_type = %(type)s. Set it to one of %(types)s, '
                'or switch use_storage_pools off: [libvirt]'
                'vol_upload_migration alone migrates disks in Ceph without '
                'SSH.') % {'type': CONF.libvirt.images_type,
                           'types': ', '.join(image.IMAGE_TYPES)})
        if os.path.realpath(CONF.libvirt.disks_pool_path) == os.path.realpath(
                CONF.instances_path):
            raise exception.InvalidConfiguration(_(
                '[libvirt]disks_pool_path must not be the same directory as '
                '[DEFAULT]instances_path.'))
        path = _native(
            local.ensure_pool, self._uri(), CONF.libvirt.disks_pool,
            CONF.libvirt.disks_pool_path, not self._warn_of_raw_volumes())
        if path != CONF.libvirt.disks_pool_path.rstrip('/'):
            raise exception.InvalidConfiguration(_(
                'Storage pool %(pool)s has the directory %(path)s. Set '
                '[libvirt]disks_pool_path to that, or choose another name '
                'in [libvirt]disks_pool.') % {
                    'pool': CONF.libvirt.disks_pool, 'path': path})
        try:
            place.check_access(path)
        except errors.Refused as error:
            raise exception.InvalidConfiguration(
                f'{error.reason}. {error.remedy}') from error

    @staticmethod
    def _warn_of_raw_volumes() -> bool:
        """Whether there are raw volumes here, which libvirtd would probe."""
        raw = image.list_raw()
        if raw:
            LOG.warning(
                'Volumes in storage pool %(pool)s are raw disks of an earlier '
                'release: %(raw)s. A guest can write into one what makes '
                'libvirtd hang. Cold migrate their servers to a host without '
                '[libvirt]use_storage_pools',
                {'pool': CONF.libvirt.disks_pool, 'raw': ', '.join(raw)})
        return bool(raw)

    def _moves_over_libvirt(self, places, dest) -> bool:
        """Whether a server is one to migrate without Nova's own code.

        One with volumes in the pool always is, if only to be refused. Any
        other is if its instance directory is to go over libvirt, and is not
        shared.
        """
        return bool(places.volumes()) or (
            self._streams_files(places) and
            not self._is_path_shared_with(dest, places.directory))

    @contextlib.contextmanager
    def _asking(self, places, dest, place=layout.DIRECTORY,
                ) -> ty.Iterator[transfer.Transfer]:
        """A transfer of nothing, to ask the destination before a plan.

        :param place: POOL if it has to have a pool, or an error is raised
        """
        move = self._new_transfer(places, dest, [], '', place=place)
        try:
            yield move
        finally:
            _native(move.close)

    def _enters_pool(self, server, places, dest) -> bool:
        """Whether a server's disks go from its directory into a pool.

        All of them or none. Raw disks do not: libvirt reads the first bytes
        of each volume, which a guest may have written. A server whose
        destination has no pool migrates as if this host had none.
        """
        if not (CONF.libvirt.vol_upload_migration and
                (CONF.libvirt.use_storage_pools or
                 self._streams_files(places)) and
                places.has_files()) or places.volumes():
            return False
        try:
            files = places.plan(self._disk_info(server))
            if not all(map(layout.may_enter_pool, (
                    file for file in files
                    if file.name not in layout.COMPANIONS))):
                return False
            with self._asking(places, dest, layout.POOL) as move:
                return _native(move.may_change_place, layout.POOL)
        except errors.StorageError as error:
            LOG.info('The disks of the server will not go into a pool: %s',
                     error, instance=server.instance)
            return False

    @staticmethod
    def _streams_files(places) -> bool:
        """Whether a server's instance directory is to go over libvirt."""
        return (_avoids_ssh(places) and not places.volumes() and
                CONF.libvirt.images_type not in NOT_STREAMED)

    def _is_path_shared_with(self, dest, path):
        """Whether this host and another have a directory in common.

        Nova asks by ssh.

        :raises: InstanceFaultRollback if the other host does not say
        """
        places = layout.Layout.at(path)
        if not _avoids_ssh(places):
            return super()._is_path_shared_with(dest, path)
        if dest == self.get_host_ip_addr():
            return True
        with _refused_on_error(None), self._asking(places, dest) as move:
            return _native(move.ask, site.Site.shares_directory, places)

    @contextlib.contextmanager
    def _copying(self, instance) -> ty.Iterator[_Copy]:
        """Let no other attempt begin, and let this one be stopped.

        :raises: MigrationPreCheckError
        """
        if instance.uuid in self._copies:
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are being copied already.'))
        copy = self._copies[instance.uuid] = _Copy(instance)
        try:
            yield copy
        finally:
            del self._copies[instance.uuid]
            copy.over.set()

    def _check_enabled(self):
        if not CONF.libvirt.vol_upload_migration:
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are in storage pool %s, from which '
                'they can only be migrated with [libvirt]'
                'vol_upload_migration = True on this host.') %
                CONF.libvirt.disks_pool)

    def _check_request(self, server):
        """Refuse what cannot be done, whatever the destination is.

        :raises: ResizeError, MigrationPreCheckError
        """
        instance, flavor = server.instance, server.flavor
        if instance.get('ephemeral_key_uuid', None):
            raise exception.MigrationPreCheckError(reason=_(
                'The disks of the server are encrypted, as '
                '[ephemeral_storage_encryption]enabled asks for, and cannot '
                'be migrated. Shelve and unshelve the server to move all but '
                'its ephemeral disks.'))
        root_shrinks = (
            flavor.root_gb < instance.flavor.root_gb and
            not self._is_booted_from_volume(server.block_device_info))
        ephemerals = virt_driver.block_device_info_get_ephemerals(
            server.block_device_info)
        ephemeral_gb = max(
            block_device.get_bdm_ephemeral_disk_size(ephemerals),
            instance.flavor.ephemeral_gb)
        if root_shrinks or flavor.ephemeral_gb < ephemeral_gb:
            raise exception.ResizeError(
                reason=_('Unable to resize disk down.'))

    def _check_vtpm(self, places) -> None:
        """Refuse a vTPM whose state could not be put back after a failure.

        :raises: MigrationPreCheckError
        """
        if os.path.exists(places.vtpm_path) and not (
                self._host.has_min_version(KEEPS_VTPM)):
            raise exception.MigrationPreCheckError(reason=_(
                'This libvirt deletes the state of a vTPM when a server '
                'starts again. Install libvirt 8.9.0 or later.'))

    def _read_nvram(self, instance) -> bytes | None:
        """The server's UEFI variables, None if it has none.

        :raises: StorageError
        """
        try:
            xml = self._host.get_guest(instance).get_xml_desc()
        except exception.InstanceNotFound:
            return None
        path = nvram.path_in(xml)
        return nvram.read(path) if path else None

    def _disk_info(self, server) -> list[dict[str, ty.Any]]:
        """Nova's list of the disks of a server that have to go along.

        :raises: Refused if nova-compute may not read one of them, or if
            there is one that is nobody's
        """
        volumes = _devices_of_volumes(server)
        for disk in self._list_disks(server.instance):
            if disk.target_dev not in volumes:
                _refuse_unknown(server.instance, disk)
        return layout.without_swap(self._read_disk_info(
            server.instance, server.block_device_info))

    def _read_disk_info(
        self, instance, block_device_info,
    ) -> list[dict[str, ty.Any]]:
        try:
            return self._get_instance_disk_info(instance, block_device_info)
        except exception.InvalidDiskInfo as error:
            # The overlay of a snapshot belongs to QEMU alone.
            raise errors.Refused(
                f'a disk cannot be read: {str(error).partition(chr(10))[0]}',
                layout.MERGE_REMEDY) from error

    def _new_transfer(self, places, dest, files, name, claim=None,
                      place=None, has_variables=False) -> transfer.Transfer:
        """The transfer of a server's files to another host.

        :param name: of the server's domain
        :param claim: the claim that the destination made, None to make one
        :param place: where the disks go, None if where they are here
        """
        claim = claim or layout.Claim.new(places.uuid)
        uses_pool = (not self._streams_files(places) if place is None else
                     place == layout.POOL)
        enters_pool = place == layout.POOL and not places.volumes()
        uses_group = any(file.place == layout.GROUP for file in files)
        here, there = (
            site.Site(daemon.Daemon(host, uri), places,
                      CONF.libvirt.disks_pool, claim, uses, uses_group)
            for host, uri, uses in (
                (CONF.host, self._uri(), uses_pool and not enters_pool),
                (dest, destination_uri(dest), uses_pool)))
        return transfer.Transfer(
            here, there, files, name, self._bandwidth, has_variables)

    def _power_off_for_copy(self, server, copy, was_running, steps) -> None:
        """Power a server off; it starts again if its migration fails.

        :param steps: where to put what has to be undone after an error
        """
        steps.push(self._start_again, server, copy, was_running,
                   self._shares(server, was_running), steps)
        if was_running:
            progress.begin_off(server.context, server.instance)
        copy.off_since = time.monotonic()
        self.power_off(
            server.instance, server.timeout, server.retry_interval)
        self._detach_from_host(server)
        self._check_sources(server, copy)

    def _sources(self, server) -> dict[str, str | None]:
        """Where the disks of a server are, all but Cinder's, by device."""
        volumes = _devices_of_volumes(server)
        return {disk.target_dev: disk.source_path or disk.source_name
                for disk in self._list_disks(server.instance)
                if disk.target_dev not in volumes}

    def _check_sources(self, server, copy) -> None:
        """Check that the server writes to the disks that are copied.

        An administrator may have made a snapshot while they were.

        :raises: Refused
        """
        for name, source in self._sources(server).items():
            if source and source != copy.sources.get(name):
                raise errors.Refused(
                    f'disk {name} is {source} by now, which is not copied',
                    layout.MERGE_REMEDY)

    def _detach_from_host(self, server) -> None:
        self.unplug_vifs(server.instance, server.network_info)
        for volume in virt_driver.block_device_info_get_mapping(
                server.block_device_info):
            self._disconnect_volume(
                server.context, volume['connection_info'], server.instance)

    @contextlib.contextmanager
    def _put_back_on_error(
        self, server, copy, host,
    ) -> ty.Iterator[undo.Undo]:
        """Undo a migration that fails after the server was powered off.

        Yields the stack of what has to be undone.

        :param host: address of the destination
        """
        steps = undo.Undo()
        try:
            yield steps
        except Exception as error:
            LOG.warning('Migration to %(host)s failed: %(error)s',
                        {'host': host, 'error': error},
                        instance=server.instance)
            # Saved by Nova with the state that it gives to the server next.
            server.instance.progress = 0
            steps.rewind()
            failure = exception.MigrationError(reason=errors.StorageError(
                copy.reason or error, '. '.join(
                    str(second) for second in steps.failures
                    if isinstance(second, errors.NotRestored))).shown())
            if copy.deleted or steps.failures:
                raise failure from error
            raise exception.InstanceFaultRollback(failure) from error

    def _stop_copy(self, copy, reason) -> None:
        copy.reason = reason
        copy.cancel.set()
        self._queue.look()
        self.job_tracker.terminate_jobs(copy.instance)

    def _can_precopy(self, instance, move) -> bool:
        return (CONF.libvirt.vol_upload_migration_precopy and
                not move.there.is_shared and
                self.get_info(instance).state == power_state.RUNNING)

    @staticmethod
    def _shares(server, was_running) -> ty.Any:
        """The Manila shares to start a server with again, None if it is off.

        Ask while the server runs: the database may not answer when the server
        has to start again.
        """
        if not was_running:
            return None
        return objects.ShareMappingList.get_by_instance_uuid(
            server.context, server.instance.uuid)

    def _start_again(self, server, copy, was_running, shares, steps) -> None:
        """Start a server as it ran before, unless its disks are not back."""
        if copy.deleted or steps.failures or not was_running:
            return
        try:
            self.power_on(
                server.context, server.instance, server.network_info,
                server.block_device_info, share_info=shares)
        except Exception:
            LOG.exception('The server could not be started again',
                          instance=server.instance)
            raise
        LOG.info('The server runs again. It was off for %.1f s',
                 copy.off_seconds, instance=server.instance)
        progress.end_off(server.context, server.instance)

    def _discard_copy(self, instance, host, discard) -> None:
        try:
            _native(discard)
        except Exception as error:
            # The server is safe, and this is tried again.
            LOG.warning('Failed to delete the unfinished copy: %s', error,
                        instance=instance)
            self._leftovers.add(instance.uuid, host, discard)

    def get_available_resource(self, nodename):
        """Tell the resources; clear up, since Nova asks every minute."""
        if self._leftovers:
            threads.spawn(self._leftovers.retry)
        if local.list_copied():
            threads.spawn(self._delete_abandoned)
        if directories := _directories_of_servers():
            threads.spawn(self._tell_reserved, directories)
        return super().get_available_resource(nodename)

    @staticmethod
    def _tell_reserved(directories: list[str]) -> None:
        """Let other hosts know how much room is here for their servers."""
        for directory in directories:
            try:
                _native(local.tell_reserved, directory)
            except OSError as error:
                LOG.warning('Other hosts may take the space in %(path)s that '
                            'only root can use for available: %(error)s',
                            {'path': directory, 'error': error})

    def _delete_abandoned(self) -> None:
        """Delete copies of failed migrations that nobody else deletes.

        Source hosts cannot delete complete directories: libvirt would probe
        what guests wrote. The next attempt clears an incomplete copy, but not
        of a server that was deleted.
        """
        # The source host may have been down when its server was deleted.
        admin = nova_context.get_admin_context(read_deleted='yes')
        for uuid in local.list_copied():
            try:
                self._clear_copy(admin, uuid)
            except Exception:
                LOG.exception('The copy of server %s here, whose migration '
                              'failed, cannot be deleted', uuid)

    def _clear_copy(self, context, uuid: str) -> None:
        try:
            instance = objects.Instance.get_by_uuid(context, uuid)
        except exception.InstanceNotFound:
            # Nothing says that it was a copy. Its directory may be one that
            # Nova deletes later. Nova's own driver leaves the claim alone.
            instance = objects.Instance(uuid=uuid, deleted=True)
        else:
            self._delete_if_abandoned(instance)
        if instance.deleted:
            _native(local.drop_lone_claims, layout.Layout.of(instance))

    def _delete_if_abandoned(self, instance) -> None:
        places = layout.Layout.of(instance)
        claims = places.claims()
        if not _is_abandoned(instance, places) or self._has_domain(instance):
            return
        self._end_transient_pool(places)
        with _deciding(instance):
            # While libvirt answered, another attempt may have come under way.
            instance.refresh()
            if (places.claims().keys() == claims.keys() and
                    _is_abandoned(instance, places)):
                LOG.info('Deleting the copy here of the server, which is not '
                         'needed any more', instance=instance)
                self._delete_all(instance, places)

    def _refuse_domain(self, instance) -> None:
        """Refuse a server that has a domain on this host.

        :raises: MigrationPreCheckError
        """
        if self._has_domain(instance):
            raise exception.MigrationPreCheckError(reason=_(
                'A domain of the server is on this host already. Find out '
                'where it comes from, and undefine it if it is not needed.'))

    def _has_domain(self, instance) -> bool:
        """Whether a server has a domain on this host, as libvirt says.

        :raises: NovaException if it says nothing
        """
        try:
            self._host.get_guest(instance)
        except exception.InstanceNotFound:
            return False
        return True

    @staticmethod
    def _restore(copy, places, restore=local.restore) -> None:
        """Put the original disks back after a copy on this host failed.

        :param restore: puts back what was kept
        :raises: NotRestored
        """
        if copy.deleted:
            # Only what was made since the server's deletion is there.
            _native(local.delete_volumes, places)
            return
        try:
            _native(restore, places)
            vtpm.put_back(places)
        except Exception as error:
            raise errors.NotRestored(
                f'The original disks could not be put back: {error}'
            ) from error

    def _copy_here(self, copy, source, target) -> None:
        """Copy a file on this host; holes stay holes."""
        self._execute(copy, 'cp', '--reflink=auto', '--sparse=auto', source,
                      target)

    def _execute(self, copy, *command: str) -> tuple[str, str]:
        """Run a command, which ends when the copy is stopped.

        :raises: ProcessExecutionError, Cancelled
        """
        copy.check()
        return processutils.execute(
            *command,
            on_execute=lambda process:
                self.job_tracker.add_job(copy.instance, process.pid),
            on_completion=lambda process:
                self.job_tracker.remove_job(copy.instance, process.pid))


def destination_uri(dest: str) -> str:
    """The libvirt URI of the destination of a migration.

    :param dest: its address, a name or an IP address
    :raises: Unsafe if the address is neither, or the URI not safe
    """
    if not (netutils.is_valid_ip(dest) or _HOST_NAME.fullmatch(dest)):
        raise access.Unsafe(
            f'{dest!r} is no address of a host',
            'Check [libvirt]migration_inbound_addr there.')
    uri = _uri_template()
    if uri is None:
        uri = driver.LibvirtDriver._live_migration_uri(dest)
    uri = uri.replace('%s', netutils.escape_ipv6(dest))
    access.check_uri(uri)
    return uri


def _uri_template() -> str | None:
    """The URI with %s for the address, None for that of live migration."""
    uri = CONF.libvirt.vol_upload_migration_uri
    if not uri and (CONF.libvirt.live_migration_uri or
                    CONF.libvirt.live_migration_scheme):
        return None
    return uri or 'qemu+tls://%s/system'


def check_hooks(nova_driver: type) -> None:
    """Check that the Nova beside this module has what it hooks into.

    :raises: InternalError if it has not
    """
    found = version.version_string()
    problems = hooks.find_problems(nova_driver)
    if problems:
        raise exception.InternalError(_(
            'nova.virt.libvirt.storage_migrate needs Nova %(wanted)s. This '
            'is Nova %(found)s, in whose LibvirtDriver %(problems)s.') % {
                'wanted': hooks.supported(), 'found': found,
                'problems': '; '.join(problems)})
    if hooks.release() in hooks.RELEASES:
        LOG.info('Nova %(found)s has all %(count)d hooks of the driver',
                 {'found': found, 'count': len(hooks.HOOKS)})
    else:
        LOG.warning(
            'Nova %(found)s has all %(count)d hooks of the driver, but the '
            'driver is tested with Nova %(wanted)s only',
            {'found': found, 'count': len(hooks.HOOKS),
             'wanted': hooks.supported()})


def _is_deleted(instance) -> bool:
    """Whether a server is deleted, or about to be, by what Nova says now."""
    try:
        now = objects.Instance.get_by_uuid(
            nova_context.get_admin_context(), instance.uuid)
    except exception.InstanceNotFound:
        return True
    return (now.task_state == task_states.DELETING or
            now.vm_state == vm_states.DELETED)


def _list_new_disks(instance) -> list[str]:
    """Names of the disks that a server has since its resize, if at all.

    Nova refuses a flavor without a disk that the server has.
    """
    old = instance.old_flavor
    if old is None:
        return []
    return [name for name, size in (('disk.local', old.ephemeral_gb),
                                    ('disk.swap', old.swap)) if not size]


def _deciding(instance):
    """A lock for what makes or deletes files of a server that is to come.

    A late rollback would delete the files of the next attempt.
    """
    return lockutils.lock(f'storage-migrate-{instance.uuid}')


def _is_abandoned(instance, places) -> bool:
    """Whether a server of another host has no use for what is here of it."""
    return (instance.host != CONF.host and instance.task_state is None and
            instance.vm_state != vm_states.RESIZED and
            (places.has_arrived() or instance.deleted) and
            local.is_abandoned(
                places, None if instance.deleted else instance.host))


def _is_switched_on() -> bool:
    """Whether the driver is to do anything that Nova's own does not."""
    return (CONF.libvirt.use_storage_pools or
            CONF.libvirt.vol_upload_migration)


# Calls that may block run off the eventlet hub, if there is one.
_native = threads.off_hub


@contextlib.contextmanager
def _refused_on_error(instance) -> ty.Iterator[None]:
    """Tell Nova that an error changed nothing about the server.

    :raises: InstanceFaultRollback
    """
    try:
        yield
    except exception.InstanceFaultRollback:
        raise
    except exception.NovaException as error:
        raise exception.InstanceFaultRollback(error)
    except Exception as error:
        LOG.warning('The server cannot be migrated: %s', error,
                    instance=instance)
        reason = (error.shown() if isinstance(error, errors.StorageError)
                  else str(error))
        raise exception.InstanceFaultRollback(
            exception.MigrationPreCheckError(reason=reason)) from error


def _is_unfinished(instance, places: layout.Layout) -> bool:
    """Whether files of a server here are a copy that was not finished.

    A claim stands for one only while the server is the source host's.
    """
    return any(claim.source in ('', instance.host)
               for claim in places.claims().values())


def _describe_claims(claims: dict[str, layout.Claim]) -> str:
    """Tell an operator why a server does not start from files under a claim.

    The server may have run from these files, if its last host shares the
    storage with this one. Otherwise they are half of a copy from a third host.
    """
    path, claim = min(claims.items())
    return _('%(path)s says that the files here are an unfinished copy from '
             '%(source)s. If the server ran from them, on storage that hosts '
             'share, delete that file; if not, delete the files') % {
                 'path': path, 'source': claim.source}


def _check_recorded(
    places: layout.Layout, formats: dict[str, str],
) -> None:
    """Check that the formats of the volumes here are recorded.

    The record may have another path of the pool: that of the last host.

    :raises: InvalidSharedStorage
    """
    recorded = set(map(os.path.basename, formats))
    for path in places.volumes():
        if os.path.basename(path) in recorded:
            continue
        if os.path.exists(places.kept_directory):
            reason = _describe_kept(places)
        else:
            reason = _(
                'the format of the disk is not recorded in %s. If both hosts '
                'share the storage pool, they have to share the instance '
                'directory too. If not, delete the disk') % places.record_path
        raise exception.InvalidSharedStorage(path=path, reason=reason)


def _check_images(
    places: layout.Layout, formats: dict[str, str],
) -> None:
    """Check that no file here is an image that is recorded as raw.

    No domain tells whether Nova converted it, or its guest wrote the header.

    :raises: InvalidSharedStorage
    """
    if not (CONF.libvirt.vol_upload_migration and CONF.use_cow_images):
        return
    for path, disk_format in formats.items():
        if disk_format == 'raw' and (
                os.path.dirname(path) == places.directory and
                os.path.exists(path) and layout.is_image(path)):
            raise exception.InvalidSharedStorage(path=path, reason=_(
                'it begins like a qcow2 image and is recorded as raw in '
                '%(record)s. If the domain of the server had it as qcow2, '
                'record that; if not, evacuate it to a host with '
                '[DEFAULT]use_cow_images = False') % {
                    'record': places.record_path})


def _check_left(places: layout.Layout) -> None:
    """Check that a server did not leave its disks here, to be reverted to.

    Nova would make it anew of its image, and the next migration delete them.

    :raises: InvalidSharedStorage
    """
    if _is_switched_on() and local.has_kept_directory(places) and (
            places.has_kept_files() or places.logical_volumes()):
        raise exception.InvalidSharedStorage(
            path=places.kept_directory, reason=_describe_kept(places))


def _describe_kept(places: layout.Layout) -> str:
    return _(
        'the server was migrated from here and neither confirmed nor '
        'reverted. To start it from the disks that it had before, rename '
        '%(kept)s to %(directory)s') % {
            'kept': places.kept_directory, 'directory': places.directory}


def _avoids_ssh(places: layout.Layout) -> bool:
    """Whether a server without disks in a pool is to migrate without SSH.

    One whose disks are all in Ceph or in Cinder is: hardly a file goes along.
    Disks in the instance directory or in LVM have an option of their own.
    """
    return CONF.libvirt.vol_upload_migration and (
        CONF.libvirt.vol_upload_migration_legacy or not (
            places.has_files() or places.logical_volumes()))


def takes_logical_volumes() -> bool:
    """Whether servers come here, and leave, with their disks in LVM."""
    return (CONF.libvirt.vol_upload_migration and
            CONF.libvirt.vol_upload_migration_legacy and
            CONF.libvirt.images_type == 'lvm' and
            bool(CONF.libvirt.images_volume_group))


def _check_files(files: list[layout.File], move: transfer.Transfer) -> None:
    """Refuse disks in files where Nova has none.

    It would make new ones in its volume group.

    :raises: MigrationPreCheckError
    """
    disks = [file.name for file in files
             if file.place == layout.DIRECTORY and file.format and
             file.name not in layout.COMPANIONS]
    if disks and _native(move.ask, site.Site.groups):
        raise exception.MigrationPreCheckError(reason=_(
            'The destination host has its disks in LVM, and disk %s of the '
            'server is a file. Choose a host with the same [libvirt]'
            'images_type.') % disks[0])


def _grown(file: layout.File, server: _Server) -> layout.File:
    """A logical volume as large as the flavor says, any other file as it is.

    Nova's backend does not resize what it finds on the destination. Of several
    ephemeral disks nobody knows which is to grow.
    """
    if file.place != layout.GROUP:
        return file
    flavor = server.flavor
    ephemerals = virt_driver.block_device_info_get_ephemerals(
        server.block_device_info)
    gigabytes = {'disk': flavor.root_gb, 'disk.local': flavor.ephemeral_gb}
    if len(ephemerals) == 1:
        gigabytes[blockinfo.get_eph_disk(0)] = flavor.ephemeral_gb
    disk = file.name.partition('_')[2]
    return dataclasses.replace(file, size=max(
        file.size, gigabytes.get(disk, 0) * units.Gi))


def _refuse_unknown(instance, disk) -> None:
    """Refuse a server with a disk that would be left behind.

    Nova lists files and devices. Of all others only those that it made in
    its own pool in Ceph are on the other host too.

    :param disk: of its domain, and none of Cinder's
    :raises: Refused
    """
    name = disk.source_name or ''
    is_in_ceph = disk.source_protocol == 'rbd' and name.startswith(
        f'{CONF.libvirt.images_rbd_pool}/{instance.uuid}_')
    if disk.source_type in (None, 'file', 'block') or is_in_ceph:
        return
    raise errors.Refused(
        f'disk {disk.target_dev} ({disk.source_protocol or disk.source_type} '
        f'{name}) is neither of Cinder nor in [libvirt]images_rbd_pool',
        'If nobody needs it, hard reboot the server.')


def _devices_of_volumes(server) -> set[str]:
    """Names of the devices of a server that are volumes of Cinder's."""
    return {volume['mount_device'].rpartition('/')[2]
            for volume in virt_driver.block_device_info_get_mapping(
                server.block_device_info)}


def _list_bases(disk_info) -> list[str]:
    found = {layout.backing_file(info['path']) for info in disk_info
             if info['type'] == 'qcow2' and info.get('backing_file')}
    return [base for base in found if base]


def _directories_of_servers() -> list[str]:
    """The directories here into which other hosts copy servers."""
    directories = []
    if CONF.libvirt.use_storage_pools:
        directories.append(CONF.libvirt.disks_pool_path)
    if CONF.libvirt.vol_upload_migration:
        directories.append(CONF.instances_path)
    return directories


def _check_kept(places: layout.Layout) -> None:
    """Refuse a server of which a resize on this host kept another disk.

    :raises: MigrationPreCheckError
    """
    for path in places.kept():
        raise exception.MigrationPreCheckError(reason=_(
            'An earlier resize kept %(kept)s and was neither confirmed nor '
            'reverted. Find out whether that or %(disk)s is the disk of the '
            'server, and delete the other.') % {
                'kept': path,
                'disk': places.volume_path(places.disk_name(path))})


def _delete_stale(places: layout.Layout) -> None:
    """Delete what earlier migrations left beside the files of a server here.

    If nova-compute ends during the next one, Nova would take a directory that
    is there for the one that this migration kept.

    :raises: OSError
    """
    _native(local.remove_stale_directory, places)
    # A claim stays if Nova's own driver finished the migration to here.
    _native(local.drop_claims, places)
    if os.path.exists(places.vtpm_path):
        # An interrupted revert left it, and the next one would restore it.
        vtpm.drop_saved(places)


def _copy_kept_nvram(places: layout.Layout) -> None:
    """Let a server that is resized on its host have its UEFI variables.

    Those of a server that was made here are where libvirt has them.

    :raises: StorageError, OSError
    """
    kept = places.kept_path(places.nvram_path)
    content = nvram.read(kept) if os.path.isfile(kept) else None
    if content is not None:
        nvram.write(places.nvram_path, content)


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
