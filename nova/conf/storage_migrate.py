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

"""Options of disks in libvirt storage pools, and of moving them.

Unlike its neighbours this module registers its options when it is imported:
Nova's nova/conf/__init__.py does not know of it.
"""

from oslo_config import cfg

from nova.conf import paths

storage_pool_opts = [
    cfg.BoolOpt(
        'use_storage_pools',
        default=False,
        help="""
Create the disks of new servers as volumes of a libvirt storage pool.

The root, ephemeral and swap disks of a new server become volumes
``{uuid}_{disk}`` of the pool named in ``disks_pool``, which nova-compute
defines, builds and starts when it starts itself. As in the instance directory
they are qcow2 overlays on the image cache with ``use_cow_images`` and raw
otherwise. Config drive, console log and ``disk.info`` stay in the instance
directory.

The local disk that the host reports is the file system of
``disks_pool_path``. Servers with disks in the pool can not be live migrated.

Servers that were created before keep their disks where they are, and keep
working. So do servers with disks in the pool after this option was switched
off again.

Related options:

* ``images_type`` must be one of ``default``, ``raw``, ``flat`` and ``qcow2``.
* ``vol_upload_migration``: without it, a server with disks in a pool can not
  be cold migrated, nor resized to another host.
"""),
    cfg.StrOpt(
        'disks_pool',
        default='nova-disks',
        help="""
Name of the libvirt storage pool that holds the disks of servers.

The name must be the same on all compute hosts between which servers migrate.
A pool that exists already under this name is used as it is; it must be of
type ``dir``.

Related options:

* ``use_storage_pools``
* ``disks_pool_path``
"""),
    cfg.StrOpt(
        'disks_pool_path',
        default=paths.state_path_def('disks'),
        help="""
Directory of the storage pool that holds the disks of servers.

nova-compute creates the directory, through libvirt, with itself as the owner.
The path may differ from one compute host to the other.

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

For a server with its disks in a storage pool, new volumes are created in the
pool of the destination over a remote libvirt connection, and the data goes
through libvirt's volume streams. Neither host needs an SSH daemon, key or
login for it.

Servers with disks in the instance directory are migrated over SSH, unless
``vol_upload_migration_legacy`` is set too.

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

With this and ``vol_upload_migration``, the disks of a server in its instance
directory go to the same directory of the destination through libvirt's volume
streams, in place of ``scp`` or ``rsync``. The destination needs no storage
pool, and not this driver: Nova's own finishes the migration there. Neither
host needs an SSH daemon, key or login for it.

Disks of the image types ``lvm`` and ``ploop`` are left to Nova's own code.

Related options:

* ``vol_upload_migration``
* ``instances_path`` must be the same on all compute hosts.
"""),
    cfg.StrOpt(
        'vol_upload_migration_uri',
        help="""
Libvirt URI of the destination of a cold migration or resize.

Any ``%s`` is replaced with the address of the destination, which is its
``migration_inbound_addr``. Where the connection is protected by TLS, the
destination's certificate has to be valid for that address.

If this option is not set, the URI is the one that live migration uses, from
``live_migration_uri`` or ``live_migration_scheme``, and
``qemu+tls://%s/system`` if neither of them is set.

nova-compute warns at its start of a transport that is not TLS, and does not
start with ``no_verify`` in the URI, which would let any host pass for the
destination. User names and passwords for SASL come from libvirt's
``auth.conf``, Kerberos tickets from the credential cache of nova-compute's
user; nobody is asked for them. ``storage+tls://%s/system`` connects to the
destination's storage driver alone, which can not tell whether a domain of the
server is there already.

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

Where nova-compute may open the file of a volume for reading, it does so, which
is faster and leaves the libvirt daemon of the source host alone. Where it may
not, or if this option is switched off, the data is read through that daemon.
The data goes to the destination through libvirt in both cases.

Related options:

* ``vol_upload_migration``
"""),
    cfg.IntOpt(
        'vol_upload_migration_bandwidth',
        default=0,
        min=0,
        help="""
The most that cold migrations and resizes send from this host, in MiB/s.

All that run at once over libvirt share it in equal parts, and what one of them
does not use is left to the others. Holes in disks are free. 0 is no limit.

Related options:

* ``vol_upload_migration``
"""),
    cfg.IntOpt(
        'vol_upload_migration_stall_timeout',
        default=60,
        min=1,
        help="""
How long a copy may stand still before it is given up, in seconds.

The destination may take as long to answer whatever else it is asked. A copy
that was given up is deleted on the destination, and the server runs again on
its source. A daemon that is gone is noticed earlier, by the keepalive of the
connection: this is for one that lives, and waits for its disk.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_keepalive_interval``
"""),
    cfg.IntOpt(
        'vol_upload_migration_connect_timeout',
        default=30,
        min=1,
        help="""
How long the destination may take to answer a connection, in seconds.

A server is left as it is if the destination of its migration does not answer.

Related options:

* ``vol_upload_migration``
"""),
    cfg.IntOpt(
        'vol_upload_migration_keepalive_interval',
        default=5,
        min=1,
        help="""
How often the destination is asked whether it is still there, in seconds.

It is taken for lost when 5 questions in a row got no answer, and what waits
for it then fails: with the default this is after about half a minute.

Related options:

* ``vol_upload_migration``
* ``vol_upload_migration_stall_timeout``
"""),
    cfg.StrOpt(
        'vol_upload_migration_verify',
        default='size',
        choices=[
            ('size', 'Look each volume up again and compare its size.'),
            ('checksum', 'Read each volume back from the destination as well, '
             'and compare all of its bytes.'),
        ],
        help="""
How to check what arrived on the destination of a migration.

Reading back takes about as long as the copy, in which the server is off; holes
cost nothing. What is read may still be in the memory of the destination: this
finds what went wrong on the way, not a disk that does not keep its data.

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
    """The options as oslo-config-generator wants them of an entry point."""
    return list(list_opts().items())


register_opts(cfg.CONF)
