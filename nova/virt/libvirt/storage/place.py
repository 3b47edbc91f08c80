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

"""Where the disks pool of this host is, and who may enter it.

The default is a directory that the security policies of distributions let
guests use. Earlier releases had another one, in which servers may still be.
"""

import os
import pathlib
import typing as ty

from lxml import etree

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import pool as storage_pool

CONF = nova.conf.CONF

# Default of earlier releases, below [DEFAULT]state_path.
FORMER_NAME = 'disks'

# Directory that distributions label for guests' disks, and let virt-aa-helper
# read.
IMAGES = '/var/lib/libvirt/images'

# Where virt-aa-helper may read any file, as Debian and Ubuntu have it.
APPARMOR_READS = (IMAGES, '/media', '/mnt', '/opt', '/srv')

# Where an administrator lets virt-aa-helper read more.
APPARMOR_RULES = '/etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper'


def is_configured() -> bool:
    """Whether nova.conf, and not a default, names the directory."""
    found = CONF.get_location('disks_pool_path', 'libvirt')
    return found is not None and found.location.is_user_controlled


def adopt(path: str | None) -> None:
    """Take the pool where it is, unless nova.conf names the directory.

    :param path: directory of the pool; None if there is no such pool, or if
        nobody asked libvirt for it
    """
    if is_configured():
        return
    former = os.path.join(CONF.state_path, FORMER_NAME)
    if path is None and _has_files(former):
        path = former
    if path is not None:
        CONF.set_default('disks_pool_path', path, group='libvirt')


def _has_files(path: str) -> bool:
    try:
        return bool({*os.listdir(path)} - {storage_pool.RESERVED_NAME})
    except OSError:
        return False


def check_access(path: str) -> None:
    """Check that this process can work in the directory of the pool.

    :raises: Refused, which tells a directory that must not be entered from
        one that is not there
    """
    for parent in reversed(pathlib.Path(path).parents):
        if parent.exists() and not os.access(parent, os.X_OK):
            raise errors.Refused(
                f'user {os.geteuid()} cannot enter {parent}, in which the '
                f'storage pool {path} is',
                f'Allow it: chmod o+x {parent}, or set '
                '[libvirt]disks_pool_path to another directory.')
    if not os.path.isdir(path):
        raise errors.Refused(
            f'there is no directory {path} here, though libvirt has a storage '
            'pool in it',
            'Mount the directory into the container of nova-compute too.')
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise errors.Refused(
            f'user {os.geteuid()} cannot write to {path}, the storage pool',
            f'Let it belong to that user: chown {os.geteuid()} {path}')


def check_policy(capabilities: str, path: str) -> str:
    """Check that the host's security policy lets guests use the pool.

    A policy denies access without a word of it in the error that a guest's
    start ends with: "Permission denied", for a file that anybody may read.

    :param capabilities: XML of virConnect.getCapabilities()
    :param path: directory of the pool
    :returns: the policy, for a report
    :raises: Refused
    """
    models = [model.text for model in etree.fromstring(
        capabilities.encode(), etree.XMLParser(
            resolve_entities=False)).findall('host/secmodel/model')]
    if 'apparmor' in models and not (
            any(_is_below(path, each) for each in APPARMOR_READS) or
            _has_rule(path)):
        raise errors.Refused(
            f'AppArmor denies virt-aa-helper the disks in {path}, so that '
            'servers with a base image do not start',
            f'Add "{path}/** r," to {APPARMOR_RULES} and run '
            'apparmor_parser -r /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper'
            f', or use a directory in {IMAGES}')
    if 'selinux' in models and not (
            _is_below(path, IMAGES) or _is_labelled(path)):
        raise errors.Refused(
            f'SELinux has no label for disks of servers in {path}',
            f"Run semanage fcontext -a -t virt_image_t '{path}(/.*)?' and "
            f'restorecon -R {path}, or use a directory in {IMAGES}')
    return ', '.join(ty.cast(list[str], models)) or 'none'


def _is_below(path: str, directory: str) -> bool:
    return os.path.realpath(path).startswith(
        os.path.realpath(directory) + os.sep)


def _has_rule(path: str) -> bool:
    try:
        rules = pathlib.Path(APPARMOR_RULES).read_text()
    except OSError:
        return False
    return any(line.strip().startswith(path.rstrip('/') + '/')
               for line in rules.splitlines())


def _is_labelled(path: str) -> bool:
    try:
        label = os.getxattr(path, 'security.selinux')
    except OSError:
        return False
    return b':virt_image_t:' in label or b':svirt_image_t:' in label
