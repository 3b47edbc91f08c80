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

"""The two containers of a compute host, as kolla-ansible lays them out.

An image is a root file system that debootstrap makes from the packages of
this machine's own Debian. A container is a mount namespace in a host of the
lab. Its root is an overlay on the image; it sees kolla's volumes and what
kolla shows of the host, and nothing else. nova-compute has a PID namespace
too. Network and host name are the host's, as in kolla.

``python -m tools.containers build DIRECTORY``, as root, makes the images.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

from tools import lab

ROOT = Path(__file__).resolve().parent.parent

# Where kolla's images have Nova.
VENV = '/var/lib/kolla/venv'

# The numbers that kolla gives its users, the same in all images.
NOVA_ID = 42436
LIBVIRT_ID = 42473

# The volumes of the engine that both containers have, and where.
VOLUMES = {
    'kolla_logs': '/var/log/kolla',
    'libvirtd': '/var/lib/libvirt',
    'nova_compute': '/var/lib/nova',
}
# One that only libvirt has.
LIBVIRT_VOLUMES = {'nova_libvirt_qemu': '/etc/libvirt/qemu'}

# What both see of the host. The engine adds the last three by itself.
HOST_PATHS = (
    '/dev', '/run', '/etc/hosts', '/etc/hostname', '/etc/resolv.conf')

READY = '/.container'

# Neither a container nor a daemon in it is to outlive a test that crashes.
DIE_WITH_US = ('setpriv', '--pdeathsig', 'KILL')
START_SECONDS = 30

# libvirt-qemu is who libvirt was built for, whatever qemu.conf says.
USERS = f"""\
useradd --system --user-group --home-dir /nonexistent libvirt-qemu
groupadd --gid {LIBVIRT_ID} libvirt
useradd --uid {NOVA_ID} --user-group --groups libvirt \
    --home-dir /var/lib/nova --create-home --shell /usr/sbin/nologin nova
"""
INSTALL_NOVA = f"""\
python3 -m venv {VENV}
{VENV}/bin/pip --quiet install --no-index --find-links /wheels nova \\
    cryptography libvirt-python
install -d -o nova -g nova /etc/nova
"""


@dataclasses.dataclass(frozen=True)
class Image:
    """A root file system, and what is in it.

    :ivar packages: of Debian, beyond a minimal system
    :ivar commands: that finish it, run inside
    :ivar has_nova: whether Nova and this project are installed
    """
    name: str
    packages: tuple[str, ...]
    commands: str
    has_nova: bool = False

    @property
    def fingerprint(self) -> str:
        """What the image has to be made anew for when it changes."""
        text = f'{self} {requirements() if self.has_nova else ""}'
        return hashlib.sha256(text.encode()).hexdigest()


LIBVIRT = Image('nova-libvirt', (
    'libsasl2-modules', 'libvirt-clients', 'libvirt-daemon', 'qemu-utils',
    'sasl2-bin'), USERS)
COMPUTE = Image('nova-compute', (
    'libsasl2-modules', 'libvirt0', 'python3', 'python3-venv', 'qemu-utils'),
    USERS + INSTALL_NOVA, has_nova=True)


# Images


def build(directory: Path) -> None:
    """Make the images that are missing, with this project as it is now."""
    directory.mkdir(parents=True, exist_ok=True)
    for image in LIBVIRT, COMPUTE:
        stamp = directory / f'{image.name}.stamp'
        if (stamp.exists() and stamp.read_text() == image.fingerprint):
            continue
        print(f'Making the image {image.name}', flush=True)
        stamp.unlink(missing_ok=True)
        _make(image, directory)
        stamp.write_text(image.fingerprint)
    _install_project(directory / COMPUTE.name)


def requirements() -> str:
    """The versions of all that the environment of the tests has."""
    return lab.execute(
        sys.executable, '-m', 'pip', 'freeze', '--exclude',
        'nova-storage-migrate').stdout


def _make(image: Image, directory: Path) -> None:
    root = directory / image.name
    shutil.rmtree(root, ignore_errors=True)
    cache = directory / 'packages'
    cache.mkdir(exist_ok=True)
    # In a mount namespace, so that no mount stays where this is ended.
    lab.execute(
        'unshare', '--mount', 'debootstrap', '--variant=minbase',
        f'--cache-dir={cache}', f'--include={",".join(image.packages)}',
        *_suite_and_mirror(root))
    if image.has_nova:
        _build_wheels(root / 'wheels')
    lab.execute('chroot', root, 'sh', '-eu', '-c', image.commands,
                env={'PATH': lab.PATH})
    shutil.rmtree(root / 'wheels', ignore_errors=True)


def _suite_and_mirror(root: Path) -> list[str]:
    """The arguments of debootstrap that apt's own sources give.

    :raises: LabError if apt has no source of this machine's release
    """
    release = dict(
        line.split('=', 1)
        for line in Path('/etc/os-release').read_text().splitlines()
        if '=' in line)['VERSION_CODENAME'].strip('"')
    targets = lab.execute(
        'apt-get', 'indextargets', '--format',
        '$(CODENAME) $(COMPONENT) $(REPO_URI)', 'Identifier: Packages').stdout
    for line in targets.splitlines():
        codename, component, mirror = line.split(' ', 2)
        if (codename, component) == (release, 'main'):
            return [release, str(root), mirror]
    raise lab.LabError(f'apt has no source of {release}: run apt-get update')


def _build_wheels(wheels: Path) -> None:
    """Build Nova and what it needs, in the versions that are tested here."""
    with tempfile.NamedTemporaryFile('w', suffix='.txt') as constraints:
        constraints.write(requirements())
        constraints.flush()
        lab.execute(
            sys.executable, '-m', 'pip', '--quiet', 'wheel', '--wheel-dir',
            wheels, '--constraint', constraints.name, 'nova', 'cryptography',
            'libvirt-python')


def _install_project(root: Path) -> None:
    """Do what the recipe in the installation guide does.

    The wheel is built outside, where there is a network.
    """
    wheels = root / 'wheels'
    with tempfile.TemporaryDirectory() as work:
        # setuptools leaves its traces where it builds.
        copy = Path(work) / 'copy'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            '.*', 'build', '*.egg-info', '__pycache__'))
        lab.execute(sys.executable, '-m', 'pip', '--quiet', 'wheel',
                    '--no-deps', '--wheel-dir', wheels, copy)
    lab.execute(
        'chroot', root, 'sh', '-eu', '-c',
        f'{VENV}/bin/pip --quiet install --no-index --no-deps '
        f'--force-reinstall /wheels/nova_storage_migrate-*.whl',
        env={'PATH': lab.PATH})
    shutil.rmtree(wheels)


# Containers


class Container:
    """A container of a lab's host.

    :ivar host: the host
    :ivar name: as kolla calls it, nova_libvirt or nova_compute
    """

    def __init__(self, host: lab.Host, image: Path, name: str,
                 volumes: Mapping[str, str], own_pids: bool) -> None:
        """Describe a container; nothing happens yet.

        :param image: its root file system, which stays as it is
        :param volumes: by the names of volumes, where the container has them
        :param own_pids: whether it has a PID namespace of its own
        """
        self.host = host
        self.name = name
        self._image = image
        self._volumes = volumes
        self._own_pids = own_pids
        self._directory = host.directory / 'containers' / name
        self._holder: subprocess.Popen | None = None
        self._pid = 0

    def up(self) -> None:
        """Start it, with a root as the image has it."""
        shutil.rmtree(self._directory, ignore_errors=True)
        for part in 'root', 'upper', 'work':
            (self._directory / part).mkdir(parents=True)
        self._make_volumes()
        unshare = [*DIE_WITH_US, 'unshare', '--mount', '--propagation',
                   'private']
        if self._own_pids:
            unshare += ['--pid', '--fork', '--kill-child']
        self._holder = self.host.popen(
            [*unshare, 'sh', '-eu', '-c', self._script()])
        lab.wait_for(f'the container {self.name}', self._is_ready,
                     START_SECONDS)

    def down(self) -> None:
        """End all that runs in it, and forget its root."""
        if self._holder is None:
            return
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self._holder.wait()
        lab.wait_for(f'the end of the container {self.name}',
                     lambda: not self.processes(), START_SECONDS)
        self._holder = None
        shutil.rmtree(self._directory)

    def processes(self) -> list[int]:
        """All that runs in its mount namespace."""
        try:
            ours = os.readlink(f'/proc/{self._pid}/ns/mnt')
        except OSError:
            return []
        return [pid for pid in map(int, filter(str.isdigit,
                                               os.listdir('/proc')))
                if _link(f'/proc/{pid}/ns/mnt') == ours]

    def running(self, name: str) -> list[int]:
        """The pids of its processes of a name."""
        return [pid for pid in self.processes() if Path(
            f'/proc/{pid}/comm').read_text().strip() == name]

    def path(self, path: str) -> Path:
        """Where a path that the container sees can be had from outside."""
        return Path(f'/proc/{self._pid}/root{path}')

    def write(self, path: str, text: str, mode: int = 0o600,
              owner: int = 0) -> None:
        """Write a file in it, as the configuration of kolla is."""
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        os.chown(file, owner, owner)

    def command(self, argv: Sequence[str], user: str = 'root') -> list[str]:
        """The argv that runs a command in it."""
        switch = [] if user == 'root' else [
            'setpriv', '--reuid', user, '--regid', user, '--init-groups',
            '--inh-caps=-all', '--']
        # Where it enters a PID namespace, nsenter starts another process.
        pids = ['-p'] if self._own_pids else []
        return ['nsenter', '-m', '-n', '-u', '-r', '-w', *pids, '-t',
                str(self._pid), '--', *switch, *argv]

    def run(self, argv: Sequence[str], user: str = 'root',
            check: bool = True, **kwargs: Any) -> subprocess.CompletedProcess:
        """Run a command in it, its output captured as text."""
        if 'input' not in kwargs:
            kwargs['stdin'] = subprocess.DEVNULL
        return lab.execute(*self.command(argv, user), check=check, cwd='/',
                           env=self.environment(user), **kwargs)

    def popen(self, argv: Sequence[str], user: str = 'root',
              **kwargs: Any) -> subprocess.Popen:
        """Start a command in it."""
        return subprocess.Popen(
            [*DIE_WITH_US, *self.command(argv, user)], cwd='/',
            env=self.environment(user), **kwargs)

    @staticmethod
    def environment(user: str) -> dict[str, str]:
        """What a command finds in its environment, in kolla's images."""
        home = '/root' if user == 'root' else f'/var/lib/{user}'
        return {'HOME': home, 'USER': user, 'LANG': 'C.UTF-8',
                'PATH': f'{VENV}/bin:{lab.PATH}'}

    def _make_volumes(self) -> None:
        """Make volumes with what the image has there, as the engine does."""
        for name, path in self._volumes.items():
            volume = self._volume(name)
            inside = self._image / path.lstrip('/')
            if volume.exists():
                continue
            volume.parent.mkdir(parents=True, exist_ok=True)
            if inside.exists():
                lab.execute('cp', '-a', inside, volume)
            else:
                volume.mkdir()

    def _volume(self, name: str) -> Path:
        return self.host.directory / 'volumes' / name

    def _script(self) -> str:
        """What makes the root inside the namespace, and holds it."""
        root = self._directory / 'root'
        binds = [(path, path) for path in HOST_PATHS] + [
            (str(self._volume(name)), path)
            for name, path in self._volumes.items()]
        lines = [
            f'mount -t overlay overlay -o lowerdir={self._image},'
            f'upperdir={self._directory}/upper,'
            f'workdir={self._directory}/work {root}',
            f'mount -t proc proc {root}/proc',
            f'mount --rbind /sys {root}/sys']
        for source, path in binds:
            make = 'mkdir -p' if os.path.isdir(source) else 'touch'
            lines += [f'{make} {root}{path}',
                      f'mount --rbind {source} {root}{path}']
        lines += [f'touch {root}{READY}',
                  f'exec chroot {root} sleep infinity']
        return '\n'.join(lines)

    def _is_ready(self) -> bool:
        assert self._holder is not None
        if self._holder.poll() is not None:
            raise lab.LabError(f'the container {self.name} did not start')
        self._pid = self._holder.pid
        if self._own_pids:
            children = Path(
                f'/proc/{self._pid}/task/{self._pid}/children').read_text()
            self._pid = int(children.split()[0]) if children else 0
        return bool(self._pid) and self.path(READY).exists()


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


class Pair:
    """The containers nova_libvirt and nova_compute of a host.

    :ivar libvirt: has libvirtd, no Nova, and sees the host's processes
    :ivar compute: has Nova and this project, and no libvirtd
    """

    def __init__(self, host: lab.Host, images: Path,
                 compute_volumes: Mapping[str, str] | None = None) -> None:
        """Describe them; nothing happens yet.

        :param images: the directory that build() filled
        :param compute_volumes: of nova_compute, if not those of kolla
        """
        self.host = host
        self.libvirt = Container(
            host, images / LIBVIRT.name, 'nova_libvirt',
            {**VOLUMES, **LIBVIRT_VOLUMES}, own_pids=False)
        self.compute = Container(
            host, images / COMPUTE.name, 'nova_compute',
            VOLUMES if compute_volumes is None else compute_volumes,
            own_pids=True)

    def up(self) -> None:
        """Start both. The host's own libvirtd gives way to them."""
        self.host.stop_libvirtd()
        for container in self.libvirt, self.compute:
            container.up()

    def down(self) -> None:
        """End both, and remove their volumes."""
        for container in self.compute, self.libvirt:
            container.down()
        shutil.rmtree(self.host.directory / 'volumes', ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('build', help='make the images')
    command.add_argument('directory', type=Path)
    arguments = parser.parse_args()
    try:
        build(arguments.directory.absolute())
    except lab.LabError as error:
        print(f'containers: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
