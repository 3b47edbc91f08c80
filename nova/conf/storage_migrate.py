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

"""Options for disks in libvirt storage pools, and for their migration.

Unlike the other modules in nova/conf, this one registers its options when it
is imported, because Nova's nova/conf/__init__.py does not import it.
"""

from oslo_config import cfg

storage_pool_opts = [
    cfg.BoolOpt(
        'use_storage_pools',
        default=False,
        help="""
Create the disks of new servers as volumes of a libvirt storage pool.

The root, ephemeral and swap disks of a new server become volumes
``{uuid}_{disk}`` of the pool named in ``disks_pool``. nova-compute defines,
builds and starts this pool when it starts. The disks are qcow2 overlays on the
image cache where Nova's own driver would make these. Where it would make raw
disks (``images_type`` raw or flat, or ``use_cow_images`` off), they are full
qcow2 images, preallocated as ``preallocate_images`` says: libvirt probes the
first bytes of every file of a pool, and those of a raw disk are the guest's.
The config drive, the console log and ``disk.info`` stay in the instance
directory.

The local disk that the host reports is the file system of
``disks_pool_path``. Servers with disks in the pool can be live migrated to
hosts that set this option or ``vol_upload_migration``.

Existing servers keep working with their disks where they are. With
``vol_upload_migration``, a migration moves copy-on-write disks into the pool
of the destination host. If this option is switched off again, servers with
disks in the pool keep working too, and a migration to such a host moves their
disks into the instance directory.

Related options:

* ``images_type`` must be one of ``default``, ``raw``, ``flat`` and ``qcow2``.
  With ``rbd`` or ``lvm``, leave this option off: disks in Ceph or LVM need no
  storage pool of this kind to migrate without SSH.
* ``vol_upload_migration``: without it, a server with disks in a pool cannot
  be cold migrated or resized to another host.
"""),
    cfg.StrOpt(
        'disks_pool',
        default='nova-disks',
        help="""
Name of the libvirt storage pool that holds the disks of servers.

The name must be the same on all compute hosts between which servers migrate.
An existing pool of this name is used as it is; it must be of type ``dir``.

Related options:

* ``use_storage_pools``
* ``disks_pool_path``
"""),
    cfg.StrOpt(
        'disks_pool_path',
        default='/var/lib/libvirt/images/nova-disks',
        help="""
Directory of the storage pool that holds the disks of servers.

nova-compute creates the directory through libvirt, and its own user becomes
the owner. The path may differ between compute hosts.

The default is a directory in which the AppArmor profiles and the SELinux
labels of distributions expect the disks of servers. Elsewhere they may have
to be told of the directory; ``nova-storage-migrate check`` says how.

If this option is not set and the pool exists, it is used where it is. Earlier
releases had the default ``$state_path/disks``: a host that was upgraded keeps
its pool there.

Related options:

* ``disks_pool``
"""),
]

migration_opts = [
    cfg.BoolOpt(
        'vol_upload_migration',
        default=False,
        help="""
Cold migrate and resize over libvirt instead of SSH.

For a server with disks in a storage pool, nova-compute creates new volumes in
the pool of the destination host over a remote libvirt connection, and copies
the data through libvirt's volume streams. Neither host needs an SSH daemon,
key or login for this.

For a server that has all its disks in Ceph (``images_type = rbd``) or in
Cinder, no disk is copied. Its kernel, ramdisk, config drive and vTPM state go
over libvirt, if it has any of them in files.

Servers with disks in the instance directory are migrated over SSH, unless
``vol_upload_migration_legacy`` is set too. With ``use_storage_pools``, they
also go over libvirt if all the disks are copy-on-write images, and the
destination host has a storage pool for them. In a live migration of servers
with disks in the instance directory, the config drive and other files that
QEMU does not copy go over libvirt if both hosts set this option.

Related options:

* ``use_storage_pools``
* ``vol_upload_migration_legacy``
* ``vol_upload_migration_uri``
"""),
    cfg.BoolOpt(
        'vol_upload_migration_legacy',
        default=False,
        help="""
Migrate servers with disks in the instance directory over libvirt too.

With this option and ``vol_upload_migration``, the disks in the instance
directory of a server are copied to the same directory on the destination host
through libvirt's volume streams, instead of with ``scp`` or ``rsync``. The
destination host needs no storage pool. Nova's own driver can finish the
migration there, but not for raw disks with ``use_cow_images``, and it takes
neither UEFI variables nor base images that the source host made. Neither host
needs an SSH daemon, key or login for this.

Servers with ``images_type = lvm``, which Nova's own driver does not migrate,
are migrated from volume group to volume group. Both hosts need this driver and
this option for that. If the user of nova-compute may read the devices of the
volume group, the disks are copied while the server runs.

Disks of the image type ``ploop`` are left to Nova's own code.

Related options:

* ``vol_upload_migration``
* ``instances_path`` must be the same on all compute hosts, and so must
  ``images_volume_group`` with ``images_type = lvm``.
"""),
    cfg.StrOpt(
        'vol_upload_migration_uri',
        help="""
Libvirt URI of the destination host of a cold migration or resize.

Each ``%s`` is replaced with the address of the destination host, which is its
``migration_inbound_addr``. If the connection is protected by TLS, the
certificate of the destination host must be valid for that address.

If this option is not set, the URI is that of live migration, from
``live_migration_uri`` or ``live_migration_scheme``, or
``qemu+tls://%s/system`` if neither of them is set.

When nova-compute starts, it warns about a transport other than TLS. It does
not start with ``no_verify`` in the URI, which would let any host pass for the
destination host. User names and passwords for SASL come from libvirt's
``auth.conf``, and Kerberos tickets from the credential cache of nova-compute's
user; nova-compute never prompts for them. ``storage+tls://%s/system`` connects
only to the storage driver of the destination host, which cannot tell whether a
domain of the server already exists there.

Related options:

* ``migration_inbound_addr``
* ``live_migration_uri``
* ``live_migration_scheme``
"""),
    cfg.BoolOpt(
        'vol_upload_migration_direct_read',
        default=True,
        help="""
Read the disks of a server directly when it is cold migrated or resized.

If nova-compute may open the file of a volume, it reads the file itself, which
is faster and puts no load on the libvirt daemon of the source host. If it may
not, or if this option is switched off, it reads the data through that daemon.
In both cases, the data goes to the destination host through libvirt.

Related options:

* ``vol_upload_migration``
"""),
    cfg.BoolOpt(
        'vol_upload_migration_precopy',
        default=True,
        help="""
Copy the disks of a server while it runs, before it is powered off.

Only what the server has changed since is copied while it is off. The disks are
copied again, as often as that helps, before the server is powered off: as long
as each pass has at most half as much to send as the one before.

On a file system with reflinks, such as XFS or btrfs, an unnamed clone of each
disk keeps what the server overwrites, and needs as much room for as long as
the migration takes. Where the file system has no reflinks, or too little room,
the disk is read a second time after the server has been powered off. That
takes memory, 48 MiB for each TiB of the disk.

If this option is switched off, all disks are copied after the server has been
powered off.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_direct_read``: without it disks are copied only after
  the server has been powered off.
"""),
    cfg.IntOpt(
        'vol_upload_migration_bandwidth',
        default=0,
        min=0,
        help="""
Bandwidth limit for cold migrations and resizes from this host, in MiB/s.

Concurrent migrations over libvirt share the limit equally; one that does not
use its share leaves it to the others. Holes in disks do not count. 0 means
unlimited.

Related options:

* ``vol_upload_migration``
"""),
    cfg.IntOpt(
        'vol_upload_migration_max_concurrent',
        default=2,
        min=0,
        help="""
How many cold migrations and resizes from this host copy disks at once.

Further ones wait in the order in which they came. A server that waits keeps
running and has nothing on the destination host, and its migration has the
status ``queued``. Only migrations over libvirt that have disks to copy count,
and resizes on the host itself of servers with disks in a storage pool. 0 means
unlimited.

With 1, the link is idle while a server is powered off on one host and started
on the other. The higher the limit, the longer each server is off.

Each server that waits or copies takes one of the threads in which nova-compute
handles requests: see ``[DEFAULT]executor_thread_pool_size``.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_bandwidth``
* ``[DEFAULT]executor_thread_pool_size``
"""),
    cfg.IntOpt(
        'vol_upload_migration_stall_timeout',
        default=60,
        min=1,
        help="""
Timeout for a copy that makes no progress, in seconds.

The timeout also applies to every other request to the destination host. While
the server runs, ``vol_upload_migration_reconnect_timeout`` applies instead if
it is longer. When the timeout expires, the incomplete copy is deleted on the
destination host, and the server runs on the source host.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_reconnect_timeout``
* ``vol_upload_migration_keepalive_interval``
"""),
    cfg.IntOpt(
        'vol_upload_migration_reconnect_timeout',
        default=300,
        min=0,
        help="""
Timeout for connecting again to a destination host that was lost, in seconds.

When the connection is lost during a copy, because the link is cut or the
libvirt daemon of the destination host restarts, the copy waits, connects again
and goes on from what the destination host has for certain. At most 128 MiB of
data, or what the link carries in half a minute, are sent again. The files on
the destination host must still be those of this migration.

This timeout applies while the server runs: a copy may stand still for as long.
Once the server has been powered off, it waits no longer than
``vol_upload_migration_stall_timeout``. When the time is over, the migration
fails: the incomplete copy is deleted, and the server runs on the source host.

A refusal, for example of the certificate or of the password, is not retried. A
host that has been restarted is not waited for either: it may have lost a part
of the copy. Only the transports ``tls`` and ``tcp`` can be connected again.

0 means that a copy fails with its connection.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_stall_timeout``
* ``vol_upload_migration_keepalive_interval``
"""),
    cfg.IntOpt(
        'vol_upload_migration_connect_timeout',
        default=30,
        min=1,
        help="""
Timeout for connecting to the destination host, in seconds.

If the destination host of a migration does not answer, the server stays as it
is.

Related options:

* ``vol_upload_migration``
"""),
    cfg.IntOpt(
        'vol_upload_migration_keepalive_interval',
        default=5,
        min=1,
        help="""
Interval of the keepalive messages to the destination host, in seconds.

When 5 messages in a row get no answer, the connection is considered lost, and
all requests that wait for it fail. With the default, this takes about half a
minute. A connection over which a copy runs is not considered lost before
``vol_upload_migration_reconnect_timeout`` and
``vol_upload_migration_stall_timeout`` are over.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_reconnect_timeout``
* ``vol_upload_migration_stall_timeout``
"""),
    cfg.StrOpt(
        'vol_upload_migration_verify',
        default='size',
        choices=[
            ('size', 'Look each volume up again and compare its size.'),
            ('checksum', 'Also read each volume back from the destination '
             'host, and compare all of its bytes.'),
        ],
        help="""
How to verify the copy on the destination host of a migration.

Reading back takes about as long as the copy, and the server is off during this
time; holes cost no time. The data may still come from the page cache of the
destination host: this check finds errors in the transfer, not a disk that does
not keep its data.

Related options:

* ``vol_upload_migration``
"""),
]

ALL_OPTS = storage_pool_opts + migration_opts


def register_opts(conf):
    conf.register_opts(ALL_OPTS, group='libvirt')


def list_opts():
    return {'libvirt': ALL_OPTS}


def sample_opts():
    """Return the options in the form that oslo-config-generator expects."""
    return list(list_opts().items())


register_opts(cfg.CONF)
