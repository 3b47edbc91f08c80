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

"""The disk of a stock Debian host, for virtual machines.

It holds Debian 13 as debootstrap makes it, with its own kernel, systemd,
AppArmor and libvirt, a user nova, and Nova from PyPI in a virtual environment.
This project is not on it: that is installed as its documentation says. The
disk is made once, and made again when its recipe changes.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import hashlib
import os
from pathlib import Path
import shutil
import sys

from tools import cloud_config
from tools import cloud_venv
from tools import processes
from tools import waiting

CACHE = Path(os.environ.get('NOVA_LAB_IMAGES') or
             '/var/lib/nova-lab-images')
SUITE = 'trixie'
SIZE = '6G'
# Of an operator who keeps Nova in a virtual environment.
VENV = '/openstack/venvs/nova'
# A machine has no way to PyPI: its pip finds here what it builds with.
WHEELS = '/var/cache/wheels'
BUILD_TOOLS = ('setuptools', 'wheel')
REQUIREMENTS = cloud_venv.REPOSITORY / 'requirements.txt'
CA_BUNDLE = 'etc/ssl/certs/ca-certificates.crt'

PACKAGES = (
    # The host itself, and how it is reached.
    'dbus', 'initramfs-tools', 'iproute2', 'kmod', 'linux-image-cloud-amd64',
    'openssh-server', 'systemd-sysv', 'udev', 'zstd',
    # What makes it differ from a host out of namespaces.
    'apparmor', 'apparmor-utils', 'lvm2',
    # Disks in LVM: Debian has libvirt's driver for it in a package of its own.
    'libvirt-daemon-driver-storage-logical',
    # Storage that hosts share.
    'nfs-common', 'nfs-kernel-server',
    # libvirt, and what Nova runs.
    'e2fsprogs', 'genisoimage', 'gnutls-bin', 'libvirt-clients',
    'libvirt-daemon-system', 'qemu-system-x86', 'qemu-utils', 'sudo',
    # For the virtual environment: libvirt-python is built.
    'ca-certificates', 'gcc', 'libvirt-dev', 'pkg-config', 'python3-dev',
    'python3-venv')

PIP_CONF = """\
[global]
no-index = true
find-links = {wheels}
disable-pip-version-check = true
"""

# Run in the new root. The address comes with the kernel's command line, and
# the key that lets the lab in from the machine's firmware.
SETUP = """\
set -e
apt-get clean
systemctl enable systemd-networkd systemd-network-generator
systemctl mask apt-daily.timer apt-daily-upgrade.timer
systemctl disable nfs-server rpcbind.service rpcbind.socket
useradd --system --home-dir /var/lib/nova --shell /usr/sbin/nologin \
    --groups libvirt,kvm nova
install -d -m 755 -o nova -g nova /var/lib/nova /var/lib/nova/instances
python3 -m venv {venv}
{venv}/bin/pip --quiet install --requirement /root/requirements.txt {nova}
{venv}/bin/pip --quiet download --dest {wheels} {tools}
cp -r {venv}/etc/nova /etc/nova
rm /root/requirements.txt
update-ca-certificates --fresh > /dev/null
echo '/dev/vda / ext4 defaults 0 1' > /etc/fstab
"""


def fingerprint() -> str:
    """Names the recipe: another disk has another one."""
    return hashlib.sha256(
        Path(__file__).read_bytes() + REQUIREMENTS.read_bytes() +
        cloud_venv.nova()[0].encode()).hexdigest()[:16]


class Image:
    """The disk, with the kernel and the ramdisk that start from it.

    :param cache: the directory of all that is kept
    """

    def __init__(self, cache: Path = CACHE) -> None:
        self.cache = cache
        self.directory = cache / fingerprint()
        self.disk = self.directory / 'host.img'
        self.kernel = self.directory / 'vmlinuz'
        self.ramdisk = self.directory / 'initrd.img'

    def ensure(self) -> None:
        """Make it, where it is missing: three minutes.

        :raises waiting.Failed: with what the command that failed has said
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        with waiting.locked(self.cache):
            if self.disk.exists():
                return
            for old in self.cache.iterdir():
                shutil.rmtree(old)
            work = self.cache / 'work'
            work.mkdir()
            try:
                self._make(work, work / 'root')
                shutil.rmtree(work / 'root')
                work.rename(self.directory)
            except BaseException:
                shutil.rmtree(work)
                raise

    def _make(self, work: Path, root: Path) -> None:
        processes.execute('debootstrap', '--variant=minbase', SUITE, root,
                          mirror())
        with _mounted(root), _no_daemons(root):
            _chroot(root, 'apt-get -qq update')
            _chroot(root, 'apt-get -qq install --yes '
                    '--no-install-recommends ' + ' '.join(PACKAGES))
            shutil.copy(Path('/') / CA_BUNDLE, root / CA_BUNDLE)
            shutil.copy(REQUIREMENTS, root / 'root')
            _chroot(root, SETUP.format(
                venv=VENV, wheels=WHEELS, tools=' '.join(BUILD_TOOLS),
                nova=cloud_venv.nova()[0]))
        _write_files(root)
        for pattern, target in (('vmlinuz-*', self.kernel),
                                ('initrd.img-*', self.ramdisk)):
            found, = (root / 'boot').glob(pattern)
            shutil.copy(found, work / target.name)
        disk = work / self.disk.name
        processes.execute('truncate', '-s', SIZE, disk)
        processes.execute('mke2fs', '-q', '-t', 'ext4', '-d', root, disk)


def mirror() -> str:
    """Where apt has Debian from.

    :raises waiting.Failed: where it has no lists of packages
    """
    said = processes.execute(
        'apt-get', 'indextargets', '--format',
        '$(LABEL)|$(COMPONENT)|$(REPO_URI)', 'Created-By: Packages').stdout
    for line in said.splitlines():
        label, component, uri = line.split('|')
        if (label, component) == ('Debian', 'main'):
            return uri
    raise waiting.Failed('apt knows no mirror of Debian: run apt-get update')


def _write_files(root: Path) -> None:
    """What an installed Nova has in /etc, and where pip finds packages."""
    venv = Path(VENV)
    (root / 'etc/nova/rootwrap.conf').write_text(
        cloud_config.render(cloud_config.rootwrap(venv)))
    sudoers = root / 'etc/sudoers.d/nova'
    sudoers.write_text(cloud_config.sudoers(venv))
    sudoers.chmod(0o440)
    (root / 'etc/pip.conf').write_text(PIP_CONF.format(wheels=WHEELS))


def _chroot(root: Path, script: str) -> None:
    env: Mapping[str, str] = {
        **os.environ, 'DEBIAN_FRONTEND': 'noninteractive', 'LANG': 'C.UTF-8',
        **_index()}
    processes.execute('chroot', root, 'sh', '-c', script, env=env)


def _index() -> dict[str, str]:
    """Where this machine's pip has packages from, unless that is PyPI."""
    url = processes.execute(
        sys.executable, '-m', 'pip', 'config', 'get', 'global.index-url',
        check=False).stdout.strip()
    return {'PIP_INDEX_URL': url} if url else {}


@contextlib.contextmanager
def _mounted(root: Path) -> Iterator[None]:
    processes.execute('mount', '--bind', '/proc', root / 'proc')
    try:
        yield
    finally:
        processes.execute('umount', root / 'proc')


@contextlib.contextmanager
def _no_daemons(root: Path) -> Iterator[None]:
    """Let no package start its daemon while it is installed."""
    policy = root / 'usr/sbin/policy-rc.d'
    policy.write_text('#!/bin/sh\nexit 101\n')
    policy.chmod(0o755)
    yield
    policy.unlink()
