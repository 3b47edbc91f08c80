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

"""A host that is a virtual machine, with a kernel and an init of its own.

It hangs on the bridge of a lab beside its hosts out of namespaces, and is
reached as root by ssh, which only the lab does.
"""

import base64
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import os
from pathlib import Path
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

from tools import daemons
from tools.lab import host
from tools.lab import image
from tools.lab import sshd
from tools import processes
from tools import waiting

if TYPE_CHECKING:
    from tools.lab import network

PREFIX = 'stock'
PORT = '{}-m{}'
FIRST_MACHINE = 21
# What tells of a machine that runs, in its directory.
QEMU = 'qemu'
SOCKET = 'ssh'
MEMORY_MIB = 1536
# A second disk, /dev/vdb, which is empty and takes up nothing.
DATA_SIZE = '4G'
# KVM, where a machine has it, would make it much faster.
ACCELERATOR = os.environ.get('NOVA_LAB_ACCELERATOR', 'tcg,thread=multi')
# A busy machine that emulates several takes long to start them.
BOOT_SECONDS = 900
COMMAND_SECONDS = 900

KERNEL_PARAMETERS = (
    'root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0 '
    'systemd.hostname={name} ip={address}::{gateway}:{mask}:{name}:eth0:none')


class Machine(host.Host):
    """A stock Debian 13.

    :param lab: a lab that is up, on whose bridge it is
    :param index: from 0 on; stock1 is the first
    """

    def __init__(self, lab: 'network.Lab', index: int) -> None:
        name = '%s%d' % (PREFIX, index + 1)
        super().__init__(name, str(lab.network[FIRST_MACHINE + index]),
                         lab.directory / name)
        self.lab = lab
        self.image = image.Image()
        self._index = index
        self._port = PORT.format(lab.bridge, index + 1)
        self._key = lab.directory / 'machines-ssh/id_ed25519'
        self._overlay = self.directory / 'disk.qcow2'
        self._data = self.directory / 'data.qcow2'
        self._qemu = daemons.Daemon(QEMU, self.directory)

    # Up and down

    def start(self) -> None:
        """Start it, and do not wait for it; nothing if it runs."""
        if self._qemu.pid:
            return
        self.image.ensure()
        self.directory.mkdir(exist_ok=True)
        sshd.make_key(self._key, 'lab')
        self._overlay.unlink(missing_ok=True)
        processes.execute('qemu-img', 'create', '-q', '-f', 'qcow2', '-F',
                          'raw', '-b', self.image.disk, self._overlay)
        processes.execute('qemu-img', 'create', '-q', '-f', 'qcow2',
                          self._data, DATA_SIZE)
        self._make_port()
        self._qemu.start(self._arguments())

    def _make_port(self) -> None:
        if not os.path.exists('/sys/class/net/' + self._port):
            processes.execute('ip', 'tuntap', 'add', self._port, 'mode',
                              'tap')
        processes.execute('ip', 'link', 'set', self._port, 'master',
                          self.lab.bridge, 'up')

    def _arguments(self) -> list[str]:
        parameters = KERNEL_PARAMETERS.format(
            name=self.name, address=self.address, gateway=self.lab.address,
            mask=self.lab.network.netmask)
        # systemd puts it where sshd looks for it.
        key = base64.b64encode(
            self._key.with_suffix('.pub').read_bytes()).decode()
        return [
            'qemu-system-x86_64', '-accel', ACCELERATOR, '-cpu', 'max',
            '-machine', 'q35', '-m', str(MEMORY_MIB), '-smp', '1',
            '-nodefaults', '-display', 'none', '-no-reboot',
            '-serial', 'file:%s' % (self.directory / 'console.log'),
            '-kernel', str(self.image.kernel),
            '-initrd', str(self.image.ramdisk), '-append', parameters,
            '-smbios', 'type=11,value=io.systemd.credential.binary:'
                       'ssh.authorized_keys.root=' + key,
            '-drive', 'file=%s,format=qcow2,if=virtio,cache=unsafe' %
                      self._overlay,
            '-drive', 'file=%s,format=qcow2,if=virtio,cache=unsafe,'
                      'discard=unmap,detect-zeroes=unmap' % self._data,
            '-device', 'virtio-rng-pci',
            '-netdev', 'tap,id=net,ifname=%s,script=no,downscript=no' %
                       self._port,
            '-device', 'virtio-net-pci,netdev=net,mac=52:54:00:20:26:%02x' %
                       self._index]

    def wait(self) -> None:
        """Wait until systemd has started all that it has to.

        :raises waiting.Failed: with the end of what QEMU has said
        """
        self._qemu.wait('sshd', lambda: daemons.listening(
            self.address, host.SSH_PORT), BOOT_SECONDS)
        self._qemu.wait('a login', lambda: self.run(
            ['true'], check=False).returncode == 0, BOOT_SECONDS)
        self.run(['systemctl', 'is-system-running', '--wait'], check=False,
                 timeout=BOOT_SECONDS)

    def down(self) -> None:
        """End it, and forget all that was done in it."""
        _end(self.directory)
        processes.execute('ip', 'link', 'delete', self._port, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    # Commands and files

    @property
    def _connection(self) -> list[str]:
        """ssh, with one connection for all commands: each takes a second."""
        return ['ssh', '-q', '-i', str(self._key), '-l', 'root',
                '-o', 'BatchMode=yes', '-o', 'StrictHostKeyChecking=no',
                '-o', 'UserKnownHostsFile=/dev/null',
                '-o', 'ConnectTimeout=20', '-o', 'ControlMaster=auto',
                '-o', 'ControlPath=%s' % (self.directory / SOCKET),
                '-o', 'ControlPersist=yes']

    def command(self, argv: Sequence[str | os.PathLike],
                user: str | None = None,
                env: Mapping[str, str] | None = None) -> list[str]:
        """The argv, on the machine, that runs a command in this host."""
        switch = [] if user in (None, 'root') else [
            'setpriv', '--reuid', str(user), '--regid', str(user),
            '--init-groups', '--']
        variables = ['%s=%s' % item
                     for item in self.environment(user, env).items()]
        words = [os.fspath(word) for word in argv]
        return [*self._connection, self.address, '--', shlex.join(
            [*switch, 'env', '-i', *variables, *words])]

    def run_as_root(self, script: str,
                    env: Mapping[str, str] | None = None) -> str:
        """Run lines of shell, and return what they print.

        :raises waiting.Failed: at the first command that fails
        """
        return self.run(['sh', '-eu', '-c', script], env=env,
                        timeout=COMMAND_SECONDS).stdout

    def read(self, path: str) -> str:
        """The text of a file."""
        return self.run(['cat', path]).stdout

    def write(self, path: str, text: str, mode: int = 0o644,
              group: str = 'root') -> None:
        """Write a file of root's, with the directories above it."""
        self.run(['sh', '-eu', '-c', 'mkdir -p "$(dirname "$1")"; '
                  'cat > "$1"; chmod "$2" "$1"; chgrp "$3" "$1"', 'sh',
                  path, '%o' % mode, group], input=text)

    def copy(self, directory: Path, names: Iterable[str],
             target: str) -> None:
        """Copy files and directories into a directory of the host."""
        tar = subprocess.Popen(
            ['tar', '-C', directory, '-c', '--dereference',
             '--exclude=__pycache__', *names],
            stdout=subprocess.PIPE)
        with tar:
            subprocess.run(
                self.command(['sh', '-c', 'mkdir -p "$1" && tar -C "$1" '
                              '--no-same-owner -x', 'sh', target]),
                stdin=tar.stdout, check=True)
        if tar.returncode:
            raise waiting.Failed('tar: exit status %d' % tar.returncode)

    def denials(self) -> list[str]:
        """What the kernel says of accesses that a security policy denied."""
        log = self.run(['journalctl', '--dmesg', '--output=cat']).stdout
        return [line for line in log.splitlines()
                if 'DENIED' in line or 'avc:' in line]


def end_all(lab: 'network.Lab') -> None:
    """End all machines of a lab, also those of a process that was killed."""
    for directory in lab.directory.glob(PREFIX + '[0-9]'):
        _end(directory)
    for port in Path('/sys/class/net').glob(PORT.format(lab.bridge, '*')):
        processes.execute('ip', 'link', 'delete', port.name, check=False)


def _end(directory: Path) -> None:
    processes.execute('ssh', '-S', directory / SOCKET, '-O', 'exit', 'any',
                      check=False)
    daemons.Daemon(QEMU, directory).stop()
