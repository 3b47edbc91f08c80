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

"""A host out of namespaces of this machine's kernel.

It has a network, a mount and a UTS namespace, with its own /etc, /run,
/var/lib/libvirt and /var/lib/nova. There is no PID namespace: a process of a
host is an ordinary process of the machine, found by the files that it sees.
That, and not a list of pids, is how ``down`` knows what to end, so it works
after a crash at any point.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import os
from pathlib import Path
import signal
import subprocess
from typing import TYPE_CHECKING

from tools.lab import host
from tools import processes
from tools import waiting

if TYPE_CHECKING:
    from tools.lab import network

# What a host has of its own; all the rest is the machine's.
MOUNTS = (
    '/etc',
    '/run',
    '/var/cache/libvirt',
    '/var/lib/libvirt',
    '/var/lib/nova',
    '/var/log/libvirt',
)
# Hidden where the machine has it. A /dev/kvm that is there and does not work
# makes libvirt probe QEMU anew at every turn: the start of a guest took 45 s
# instead of 1. Without it every lab has emulated guests, as fast or as slow.
HIDDEN = ('/dev/kvm', '/root/.ssh')

# Marks the process that keeps a host's namespaces alive.
HOLDER = 'NOVA_LAB_HOLDER'
MOUNT_MARKER = '.made-by-nova-lab'


class Namespaces(host.Host):
    """The namespaces of a host, what runs in them and how they are joined.

    :param port: the name of the machine's end of its network cable
    :ivar nova_uid: what its /etc/passwd says
    """

    def __init__(self, lab: 'network.Lab', name: str, address: str,
                 port: str, nova_uid: int) -> None:
        super().__init__(name, address, lab.directory / name)
        self.lab = lab
        self.nova_uid = nova_uid
        self.nova_gid = nova_uid
        self._port = port
        self._holder: int | None = None
        self._daemons: list[subprocess.Popen] = []

    # Where things are

    def path(self, path: str | os.PathLike) -> Path:
        """Where a path that the host sees lives on the machine."""
        path = os.path.normpath(path)
        if any(path == top or path.startswith(top + '/') for top in MOUNTS):
            return self.directory / 'root' / path.lstrip('/')
        return Path(path)

    @property
    def pid(self) -> int | None:
        """The process that keeps the namespaces alive, or None."""
        if self._holder is None or not self._is_holder(self._holder):
            self._holder = next((
                process.pid for process in processes.every()
                if self._is_holder(process.pid)), None)
        return self._holder

    def _is_holder(self, pid: int) -> bool:
        mark = processes.environment(pid).get(HOLDER)
        return (mark == str(self.directory) and
                processes.name(pid) == 'sleep')

    def processes(self) -> list[int]:
        """Everything that runs in this host, its holder included.

        A process belongs to the host when it sees the host's /etc. Those
        that have changed their root since (sshd) are told by the namespace.
        """
        found = {process.pid: processes.mount_namespace(process.pid)
                 for process in processes.every()}
        etc = self.path('/etc')
        ours = {
            namespace for pid, namespace in found.items()
            if _same_file('/proc/%d/root/etc' % pid, etc)}
        machine = processes.mount_namespace('self')
        mine = {pid for pid, namespace in found.items()
                if namespace in ours and namespace != machine}
        if self.pid:
            mine.add(self.pid)
        return sorted(mine)

    def running(self, name: str) -> list[int]:
        """The pids of the host's processes of a name."""
        return [p for p in self.processes() if processes.name(p) == name]

    def listens(self, port: int) -> bool:
        """Whether something in the host accepts connections on a TCP port.

        Read in /proc/net/tcp*: a look from outside would say no for a host
        whose link is down.
        """
        suffix = ':%04X' % port
        for table in ('tcp', 'tcp6'):
            path = Path('/proc/%d/net/%s' % (self.pid or 0, table))
            with contextlib.suppress(OSError):
                for line in path.read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == '0A' and fields[1].endswith(suffix):
                        return True
        return False

    # Running commands

    @property
    def enter(self) -> list[str]:
        """The argv prefix that runs a command in this host."""
        if not self.pid:
            raise waiting.Failed('%s is not up' % self.name)
        return ['nsenter', '-m', '-n', '-u', '-t', str(self.pid), '--']

    def command(self, argv: Sequence[str | os.PathLike],
                user: str | None = None,
                env: Mapping[str, str] | None = None) -> list[str]:
        switch: list[str] = []
        if user == 'nova':
            switch = ['setpriv', '--reuid', str(self.nova_uid),
                      '--regid', str(self.nova_gid), '--init-groups', '--']
        elif user is not None and user != 'root':
            switch = ['runuser', '-u', user, '--']
        return self.enter + switch + [os.fspath(arg) for arg in argv]

    def daemon(self, argv: Sequence[str], log: str, user: str | None = None,
               env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start a command whose output is appended to a file in logs.

        It outlives the caller; ``down`` ends it.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.logs / log, 'ab') as out:
            process = self.popen(argv, user, env, stdout=out,
                                 stderr=subprocess.STDOUT)
        self._daemons.append(process)
        return process

    def end(self, pids: Sequence[int]) -> None:
        """End processes of the host, by force where they do not."""
        found = processes.find(pids)
        for signum, seconds in ((signal.SIGCONT, 0), (signal.SIGTERM, 5),
                                (signal.SIGKILL, 5)):
            processes.send(found, signum)
            with contextlib.suppress(waiting.Failed):
                self._wait_for_end(found, seconds)
                return
        raise waiting.Failed('%s: processes do not end: %s' % (
            self.name, processes.running(found)))

    def _wait_for_end(self, found: list, seconds: float) -> None:
        def ended() -> bool:
            for process in self._daemons:
                process.poll()
            return not processes.running(found)

        waiting.wait_for('processes of %s to end' % self.name, ended,
                         seconds, poll=0.02)

    # Namespaces, mounts and the cable

    def _start_holder(self) -> None:
        env = {HOLDER: str(self.directory), 'PATH': host.PATH}
        process = subprocess.Popen(
            ['unshare', '--net', '--mount', '--uts', '--propagation',
             'private', '--', 'sleep', 'infinity'], env=env, cwd='/',
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        self._daemons.append(process)
        waiting.wait_for(
            'the namespaces of ' + self.name,
            lambda: self._is_holder(process.pid), host.START_TIMEOUT,
            poll=0.02)

    def _end_namespaces(self) -> None:
        """End every process; the namespaces go with the last."""
        self.end(self.processes())
        self._holder = None
        if not self.lab.rival:
            processes.execute('ip', 'link', 'delete', self._port, check=False)

    def _mount(self) -> None:
        script = ['set -e', 'hostname %s' % self.name, 'ip link set lo up']
        for path, source in self._mounts():
            if not _same_file('/proc/%s/root%s' % (self.pid, path), source):
                script.append('mount --bind %s %s' % (source, path))
        self.run(['sh', '-c', '\n'.join(script)])

    def _mounts(self) -> Iterator[tuple[str, Path]]:
        """What is to be seen where, and the file or directory behind it."""
        for path in HIDDEN:
            if os.path.exists(path):
                yield path, self._stand_in(path)
        for path in MOUNTS:
            yield path, self.path(path)

    def _stand_in(self, path: str) -> Path:
        """Something empty that only root may open."""
        stand_in = self.directory / 'hidden' / path.lstrip('/')
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(path):
            stand_in.mkdir(mode=0o700, exist_ok=True)
        else:
            stand_in.touch(mode=0)
        return stand_in

    def _connect(self) -> None:
        if os.path.exists('/sys/class/net/' + self._port):
            return
        bits = self.lab.network.prefixlen
        processes.execute('ip', 'link', 'add', self._port, 'type', 'veth',
                          'peer', 'name', 'eth0', 'netns', str(self.pid))
        processes.execute('ip', 'link', 'set', self._port, 'master',
                          self.lab.bridge, 'up')
        self.run(['ip', 'address', 'add', '%s/%d' % (self.address, bits),
                  'dev', 'eth0'])
        self.run(['ip', 'link', 'set', 'eth0', 'up'])

    def sent_bytes(self) -> int:
        """The bytes that have left the host so far."""
        return int(Path('/sys/class/net', self._port,
                        'statistics/rx_bytes').read_text())

    def limit(self, rate: str | None) -> None:
        """Let no more than that leave the host, as tc(8) spells a rate.

        The burst has to hold the largest packets of a cable that no hardware
        is behind, 64 KiB.
        """
        self.run(['tc', 'qdisc', 'delete', 'dev', 'eth0', 'root'],
                 check=False)
        if rate:
            self.run(['tc', 'qdisc', 'add', 'dev', 'eth0', 'root', 'tbf',
                      'rate', rate, 'burst', '256kb', 'latency', '50ms'])

    def link(self, up: bool) -> None:
        """Plug the host's network cable in, or pull it."""
        processes.execute('ip', 'link', 'set', self._port,
                          'up' if up else 'down')


def _same_file(first: str, second: str | os.PathLike) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(first, second)
    return False
