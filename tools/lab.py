#!/usr/bin/env python3
#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Several compute hosts on one Debian machine.

A host is a network, a mount and a UTS namespace with its own /etc, /run,
/var/lib/libvirt and /var/lib/nova, its own libvirtd and its own TLS identity.
The hosts hang on a bridge whose address belongs to the machine itself, which
is where a control plane listens::

    machine 198.18.0.1 -- bridge nsm0 --+-- host1 198.18.0.11
                                        +-- host2 198.18.0.12

There is no PID namespace: a process of a host is an ordinary process of the
machine, found by the files that it sees. That, and not a list of pids, is how
``down`` knows what to end, so it works after a crash at any point.

Install Debian packages before ``up``: a host gets its /etc as a copy.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import ipaddress
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any
from typing import Iterator
from typing import Mapping
from typing import Sequence
import uuid

DEFAULT = os.environ.get('NOVA_LAB_DIR', '/var/lib/nova-lab')

# A slice of the range that RFC 2544 sets aside for tests of networks: it is
# routed nowhere, so it cannot hide something that the machine needs.
NETWORK = '198.18.{subnet}.0/24'
SUBNET = int(os.environ.get('NOVA_LAB_SUBNET', '0'))
BRIDGE = 'nsm{subnet}'
FIRST_HOST = 11

# Each host numbers its nova user differently: an owner that travels as a
# number instead of being looked up on the destination shows.
FIRST_UID = 64060

# Where there are daemons to run in place of libvirtd, which Debian 12 does not
# have; see tools/modular-daemons. The first of them is what others connect to.
DAEMONS = os.environ.get('NOVA_LAB_DAEMONS', '')
MODULAR = ('virtproxyd', 'virtqemud', 'virtsecretd', 'virtstoraged')
LISTENER = 'virtproxyd' if DAEMONS else 'libvirtd'

TLS_PORT = 16514
SSH_PORT = 22
NOVA_HOME = '/var/lib/nova'
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

# Whose certificate the machine shows, which is outside of any host.
CLIENT = 'lab client'

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
MARKER = 'lab.json'
MOUNT_MARKER = '.made-by-nova-lab'

START_TIMEOUT = 30
STOP_TIMEOUT = 20

LIBVIRTD_CONF = {
    'listen_tls': 1,
    'listen_tcp': 0,
    'auth_unix_ro': 'none',
    'auth_unix_rw': 'none',
    'unix_sock_group': 'libvirt',
    'unix_sock_rw_perms': '0770',
    'log_outputs': '3:stderr',
}

# Users and ownership stay Debian's defaults (libvirt-qemu, dynamic_ownership)
# on purpose. What is off here does not work in a container or wants systemd.
QEMU_CONF = """\
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""

SSHD_CONF = """\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowUsers nova
UsePAM no
Subsystem sftp internal-sftp
"""

SSH_CLIENT_CONF = """\
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    BatchMode yes
"""


class LabError(Exception):
    """The lab cannot do what it was asked to do."""


def execute(*argv: str | os.PathLike, check: bool = True,
            **kwargs: Any) -> subprocess.CompletedProcess:
    """Run a command, captured as text; what it said is in the error."""
    kwargs.setdefault('capture_output', True)
    done = subprocess.run([os.fspath(a) for a in argv], text=True, **kwargs)
    if check and done.returncode:
        said = (done.stderr or done.stdout or '').strip()
        raise LabError('%s: exit status %d: %s' % (
            ' '.join(map(str, argv)), done.returncode, said))
    return done


def wait_for(condition: Any, what: str, timeout: float) -> None:
    """Wait until condition() is true; LabError after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LabError('waited %d s for %s' % (timeout, what))
        time.sleep(0.02)


# Certificates


def make_ca(directory: str | os.PathLike,
            name: str = 'nova lab CA') -> pathlib.Path:
    """Make cacert.pem and cakey.pem in a directory, unless they are there."""
    directory = pathlib.Path(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate = directory / 'cacert.pem'
    if not certificate.exists():
        _openssl_req(directory / 'cakey.pem', certificate, name,
                     'basicConstraints=critical,CA:TRUE',
                     'keyUsage=critical,keyCertSign,cRLSign')
    return directory


def make_certificate(ca: pathlib.Path, key: pathlib.Path,
                     certificate: pathlib.Path, name: str, purpose: str,
                     addresses: Sequence[str] = ()) -> None:
    """Make a key and a certificate for it, signed by the CA.

    :param purpose: 'serverAuth' or 'clientAuth'
    :param addresses: addresses that go in next to the name
    """
    if certificate.exists():
        return
    names = ['DNS:' + name] + ['IP:' + a for a in addresses]
    _openssl_req(key, certificate, name,
                 'basicConstraints=critical,CA:FALSE',
                 # libvirt insists on both, though an EC key needs one
                 'keyUsage=critical,digitalSignature,keyEncipherment',
                 'extendedKeyUsage=' + purpose,
                 'subjectAltName=' + ','.join(names), ca=ca)


def make_client(ca: pathlib.Path, directory: str | os.PathLike,
                name: str = CLIENT) -> pathlib.Path:
    """Make a directory that libvirt takes as ``?pkipath=``.

    :param name: its common name; the hosts let only those in that they know
    """
    directory = pathlib.Path(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy(ca / 'cacert.pem', directory / 'cacert.pem')
    make_certificate(ca, directory / 'clientkey.pem',
                     directory / 'clientcert.pem', name, 'clientAuth')
    return directory


def expire(ca: pathlib.Path, key: pathlib.Path,
           certificate: pathlib.Path) -> None:
    """Sign a certificate anew, so that it expired a day ago."""
    request = execute('openssl', 'x509', '-x509toreq', '-copy_extensions',
                      'copyall', '-in', certificate, '-signkey', key).stdout
    execute('openssl', 'x509', '-req', '-copy_extensions', 'copyall',
            '-days', '-1', '-CA', ca / 'cacert.pem',
            '-CAkey', ca / 'cakey.pem', '-out', certificate, input=request)


def _openssl_req(key: pathlib.Path, certificate: pathlib.Path, name: str,
                 *extensions: str, ca: pathlib.Path | None = None) -> None:
    signer = () if ca is None else (
        '-CA', ca / 'cacert.pem', '-CAkey', ca / 'cakey.pem')
    added = [arg for ext in extensions for arg in ('-addext', ext)]
    # The -config keeps openssl.cnf's own v3_ca extensions out.
    execute('openssl', 'req', '-x509', '-config', '/dev/stdin',
            '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
            '-days', '3650', '-subj', '/CN=' + name,
            '-keyout', key, '-out', certificate, *signer, *added,
            input='[req]\ndistinguished_name=dn\n[dn]\n')


# Processes


def _mount_namespace(pid: int | str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink('/proc/%s/ns/mnt' % pid)
    return None


def _pids() -> Iterator[int]:
    for entry in os.listdir('/proc'):
        if entry.isdigit() and _mount_namespace(entry):
            yield int(entry)


def make_mount_points() -> None:
    """Make the directories that the machine lacks to mount a host's on."""
    for path in map(pathlib.Path, MOUNTS):
        if not path.is_dir():
            path.mkdir(parents=True)
            (path / MOUNT_MARKER).touch()


def remove_mount_points() -> None:
    """Remove those again, if no other lab has its hosts' mounted there.

    Removing a directory would take the mounts off it in every namespace.
    """
    busy = _mounted_anywhere()
    for path in map(pathlib.Path, MOUNTS):
        marker = path / MOUNT_MARKER
        if str(path) not in busy and marker.exists():
            marker.unlink()
            with contextlib.suppress(OSError):
                path.rmdir()


def _mounted_anywhere() -> set[str]:
    namespaces = {_mount_namespace(pid): pid for pid in _pids()}
    found: set[str] = set()
    for pid in namespaces.values():
        with contextlib.suppress(OSError):
            table = pathlib.Path('/proc/%d/mountinfo' % pid).read_text()
            found.update(line.split()[4] for line in table.splitlines())
    return found


def _same_file(first: str, second: str | os.PathLike) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(first, second)
    return False


def _command_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path('/proc/%d/comm' % pid).read_text().strip()
    return ''


def _environment(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return pathlib.Path('/proc/%d/environ' % pid).read_bytes().split(b'\0')
    return []


def _kill(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


class Host:
    """One compute host.

    :ivar name: host1, host2, ...; also its hostname
    :ivar address: its address on the bridge
    :ivar directory: its state on the machine's file system
    :ivar uri: the URI by which another host reaches its libvirtd
    :ivar nova_uid: what its /etc/passwd says
    """

    def __init__(self, lab: 'Lab', index: int, nova_uid: int) -> None:
        self.lab = lab
        self.name = 'host%d' % (index + 1)
        self.address = str(lab.network[FIRST_HOST + index])
        self.directory = lab.directory / self.name
        self.uri = 'qemu+tls://%s/system' % self.address
        self.nova_uid = nova_uid
        self.nova_gid = nova_uid
        self.logs = self.directory / 'log'
        self._port = '%s-%d' % (lab.bridge, index + 1)
        self._holder: int | None = None
        self._daemons: list[subprocess.Popen] = []

    # Where things are

    def path(self, path: str | os.PathLike) -> pathlib.Path:
        """Where a path that the host sees lives on the machine."""
        path = os.path.normpath(path)
        if any(path == top or path.startswith(top + '/') for top in MOUNTS):
            return self.directory / 'root' / path.lstrip('/')
        return pathlib.Path(path)

    @property
    def pid(self) -> int | None:
        """The process that keeps the namespaces alive, or None."""
        if self._holder is None or not self._is_holder(self._holder):
            self._holder = next(filter(self._is_holder, _pids()), None)
        return self._holder

    def _is_holder(self, pid: int) -> bool:
        mark = '%s=%s' % (HOLDER, self.directory)
        return (mark.encode() in _environment(pid) and
                _command_name(pid) == 'sleep')

    def processes(self) -> list[int]:
        """Everything that runs in this host, its holder included.

        A process belongs to the host when it sees the host's /etc. Those
        that have changed their root since (sshd) are told by the namespace.
        """
        found = {pid: _mount_namespace(pid) for pid in _pids()}
        etc = self.path('/etc')
        ours = {
            namespace for pid, namespace in found.items()
            if _same_file('/proc/%d/root/etc' % pid, etc)}
        machine = _mount_namespace('self')
        mine = {pid for pid, namespace in found.items()
                if namespace in ours and namespace != machine}
        if self.pid:
            mine.add(self.pid)
        return sorted(mine)

    # Running commands

    @property
    def enter(self) -> list[str]:
        """The argv prefix that runs a command in this host."""
        if not self.pid:
            raise LabError('%s is not up' % self.name)
        return ['nsenter', '-m', '-n', '-u', '-t', str(self.pid), '--']

    def command(self, argv: Sequence[str],
                user: str | None = None) -> list[str]:
        """The argv that runs a command in this host as a user."""
        switch: list[str] = []
        if user == 'nova':
            switch = ['setpriv', '--reuid', str(self.nova_uid),
                      '--regid', str(self.nova_gid), '--init-groups', '--']
        elif user not in (None, 'root'):
            switch = ['runuser', '-u', user, '--']
        return self.enter + switch + [os.fspath(arg) for arg in argv]

    def environment(self, user: str | None = None,
                    env: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a login of the user would have set, plus env."""
        user = user or 'root'
        home = {'nova': NOVA_HOME, 'root': '/root'}.get(user, '/')
        return {'HOME': home, 'USER': user, 'LOGNAME': user,
                'PATH': PATH, 'LANG': 'C.UTF-8', **(env or {})}

    def run(self, argv: Sequence[str], user: str | None = None,
            check: bool = True, input: str | None = None,
            timeout: float | None = None,
            env: Mapping[str, str] | None = None
            ) -> subprocess.CompletedProcess:
        """Run a command in the host, its output captured as text."""
        return execute(*self.command(argv, user), check=check, input=input,
                       timeout=timeout, env=self.environment(user, env),
                       **({} if input else {'stdin': subprocess.DEVNULL}))

    def popen(self, argv: Sequence[str], user: str | None = None,
              env: Mapping[str, str] | None = None,
              **kwargs: Any) -> subprocess.Popen:
        """Start a command in the host; the pid is the command's own.

        It gets a session of its own and outlives the caller; ``down`` ends it.
        """
        kwargs.setdefault('stdin', subprocess.DEVNULL)
        kwargs.setdefault('start_new_session', True)
        return subprocess.Popen(self.command(argv, user),
                                env=self.environment(user, env), **kwargs)

    def daemon(self, argv: Sequence[str], log: str, user: str | None = None,
               env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start a command whose output is appended to a file in logs."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.logs / log, 'ab') as out:
            process = self.popen(argv, user, env, stdout=out,
                                 stderr=subprocess.STDOUT)
        self._daemons.append(process)
        return process

    # Up and down

    def up(self) -> None:
        """Make what is missing of the host."""
        if not self.pid:
            self.down()  # what a holder that died left running
            if not self.directory.joinpath('complete').exists():
                self._make_files()
            self._start_holder()
        self._mount()
        self._connect()
        if not self.libvirtd_pid:
            self.start_libvirtd()

    def down(self) -> None:
        """End every process of the host; the namespaces go with the last."""
        self.end(self.processes())
        self._holder = None
        if not self.lab.rival:
            execute('ip', 'link', 'delete', self._port, check=False)

    def end(self, pids: Sequence[int]) -> None:
        """End processes of the host, by force where they do not."""
        for signum in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            _kill(pids, signum)
            with contextlib.suppress(LabError):
                wait_for(lambda: not self._alive(pids),
                         'processes of %s' % self.name,
                         0 if signum == signal.SIGCONT else 5)
                return
        raise LabError('%s: processes %s do not end' % (
            self.name, self._alive(pids)))

    def _alive(self, pids: Sequence[int]) -> list[int]:
        for process in self._daemons:
            process.poll()
        return [pid for pid in pids if _mount_namespace(pid)]

    def _start_holder(self) -> None:
        env = {HOLDER: str(self.directory), 'PATH': PATH}
        process = subprocess.Popen(
            ['unshare', '--net', '--mount', '--uts', '--propagation',
             'private', '--', 'sleep', 'infinity'], env=env, cwd='/',
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        self._daemons.append(process)
        wait_for(lambda: self._is_holder(process.pid),
                 'the namespaces of ' + self.name, START_TIMEOUT)

    def _mount(self) -> None:
        script = ['set -e', 'hostname %s' % self.name, 'ip link set lo up']
        for path, source in self._mounts():
            if not _same_file('/proc/%s/root%s' % (self.pid, path), source):
                script.append('mount --bind %s %s' % (source, path))
        self.run(['sh', '-c', '\n'.join(script)])

    def _mounts(self) -> Iterator[tuple[str, pathlib.Path]]:
        """What is to be seen where, and the file or directory behind it."""
        for path in HIDDEN:
            if os.path.exists(path):
                yield path, self._stand_in(path)
        for path in MOUNTS:
            yield path, self.path(path)

    def _stand_in(self, path: str) -> pathlib.Path:
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
        execute('ip', 'link', 'add', self._port, 'type', 'veth',
                'peer', 'name', 'eth0', 'netns', str(self.pid))
        execute('ip', 'link', 'set', self._port, 'master', self.lab.bridge,
                'up')
        self.run(['ip', 'address', 'add', '%s/%d' % (self.address, bits),
                  'dev', 'eth0'])
        self.run(['ip', 'link', 'set', 'eth0', 'up'])

    def link(self, up: bool) -> None:
        """Plug the host's network cable in, or pull it."""
        execute('ip', 'link', 'set', self._port, 'up' if up else 'down')

    # Files

    def _make_files(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for top in MOUNTS:
            self.path(top).mkdir(parents=True, exist_ok=True)
        self.path('/run/lock').mkdir(exist_ok=True)
        self.path('/run/lock').chmod(0o1777)
        self._make_etc()
        self._make_users()
        self._make_identity()
        for path in (NOVA_HOME, NOVA_HOME + '/instances'):
            self.path(path).mkdir(exist_ok=True)
            os.chown(self.path(path), self.nova_uid, self.nova_gid)
        self.directory.joinpath('complete').touch()

    def _make_etc(self) -> None:
        etc = self.path('/etc')
        execute('cp', '-a', '/etc/.', etc)
        for name in ('libvirt', 'ssh', 'pki'):
            shutil.rmtree(etc / name, ignore_errors=True)
            (etc / name).mkdir()
        for name in ('hosts', 'hostname', 'resolv.conf'):
            (etc / name).unlink(missing_ok=True)
        (etc / 'hostname').write_text(self.name + '\n')
        (etc / 'hosts').write_text(self.lab.hosts_file())
        # Empty: a look-up that /etc/hosts cannot answer fails at once.
        (etc / 'resolv.conf').touch()
        self.configure_libvirtd()
        (etc / 'libvirt/qemu.conf').write_text(QEMU_CONF)

    def _make_users(self) -> None:
        ids = (self.nova_uid, self.nova_gid)
        self._edit('/etc/passwd', 'nova', 'x:%d:%d::%s:/usr/sbin/nologin'
                   % (*ids, NOVA_HOME))
        self._edit('/etc/shadow', 'nova', '*:19000:0:99999:7:::')
        self._edit('/etc/group', 'nova', 'x:%d:' % self.nova_gid)
        group = self.path('/etc/group').read_text().splitlines()
        for name in ('libvirt', 'kvm'):
            entry = [line for line in group if line.startswith(name + ':')]
            if not entry:
                raise LabError('there is no group %s: install '
                               'libvirt-daemon-system' % name)
            fields = entry[0].split(':')[1:]
            fields[-1] = ','.join(filter(None, [fields[-1], 'nova']))
            self._edit('/etc/group', name, ':'.join(fields))

    def _edit(self, path: str, name: str, fields: str) -> None:
        """Set the entry of a name in one of the user databases."""
        database = self.path(path)
        lines = [line for line in database.read_text().splitlines()
                 if not line.startswith(name + ':')]
        lines.append('%s:%s' % (name, fields))
        database.write_text('\n'.join(lines) + '\n')

    def _make_identity(self) -> None:
        pki = self.path('/etc/pki')
        private = pki / 'libvirt/private'
        private.mkdir(parents=True)
        (pki / 'CA').mkdir()
        shutil.copy(self.lab.ca / 'cacert.pem', pki / 'CA/cacert.pem')
        for side in ('server', 'client'):
            self.set_certificate(side)
        os.chown(private, 0, self.nova_gid)
        private.chmod(0o750)

    def certificate(self, side: str) -> pathlib.Path:
        """Where the host has its certificate as 'server' or as 'client'."""
        return self.path('/etc/pki/libvirt/%scert.pem' % side)

    def _key(self, side: str) -> pathlib.Path:
        return self.path('/etc/pki/libvirt/private/%skey.pem' % side)

    def set_certificate(self, side: str, ca: pathlib.Path | None = None,
                        name: str | None = None) -> None:
        """Give the host a new certificate; libvirtd reads it at its start.

        :param side: 'server' or 'client'
        :param ca: another than the lab's
        :param name: another host's than its own; it has no address then
        """
        self.certificate(side).unlink(missing_ok=True)
        make_certificate(ca or self.lab.ca, self._key(side),
                         self.certificate(side), name or self.name,
                         side + 'Auth', [] if name else [self.address])
        if side == 'client':
            # nova-compute is the client, and it is not root.
            os.chown(self._key(side), 0, self.nova_gid)
            self._key(side).chmod(0o640)

    def expire_certificate(self, side: str) -> None:
        """Let the host's certificate have expired a day ago."""
        expire(self.lab.ca, self._key(side), self.certificate(side))

    def set_sudoers(self, text: str) -> None:
        """Write the host's /etc/sudoers.d/nova, if sudo accepts it."""
        checked = execute('visudo', '-c', '-f', '-', input=text, check=False)
        if checked.returncode:
            raise LabError('visudo: ' + checked.stderr.strip())
        path = self.path('/etc/sudoers.d/nova')
        path.unlink(missing_ok=True)
        path.touch(mode=0o440)
        path.write_text(text)
        path.chmod(0o440)

    # libvirtd

    def configure_libvirtd(self, **settings: Any) -> None:
        """Write libvirtd.conf, which counts from the next start on.

        :param settings: what differs from the lab's own configuration
        """
        allowed = [CLIENT, *(host.name for host in self.lab.hosts)]
        settings = {
            'host_uuid': str(uuid.uuid5(
                uuid.NAMESPACE_URL, str(self.directory))),
            'tls_allowed_dn_list': ['CN=' + name for name in allowed],
            **LIBVIRTD_CONF, **settings}
        for daemon in ('libvirtd', *MODULAR):
            self.path('/etc/libvirt/%s.conf' % daemon).write_text(''.join(
                '%s = %s\n' % (name, json.dumps(value))  # noqa: N324
                for name, value in settings.items()))

    def restart_libvirtd(self, **settings: Any) -> None:
        """Start libvirtd anew, with settings; guests go on."""
        self.stop_libvirtd()
        self.configure_libvirtd(**settings)
        self.start_libvirtd()

    @property
    def libvirtd_pid(self) -> int | None:
        """The pid of the host's libvirtd, or None where none runs.

        With several daemons in its place, of the one that listens.
        """
        with contextlib.suppress(OSError, ValueError):
            pid = int(self.path('/run/%s.pid' % LISTENER).read_text())
            if (_command_name(pid) == LISTENER and self.pid and
                    _mount_namespace(pid) == _mount_namespace(self.pid)):
                return pid
        return None

    def start_libvirtd(self) -> None:
        """Start libvirtd and wait until it answers, over TLS as well."""
        process = self._start_modular() if DAEMONS else self.daemon(
            ['libvirtd', '--listen'], 'libvirtd.log')

        def listens() -> bool:
            if process.poll() is not None:
                raise LabError('libvirtd of %s ended: see %s' % (
                    self.name, self.logs / 'libvirtd.log'))
            return bool(self.libvirtd_pid) and self.listens(TLS_PORT)

        wait_for(listens, 'libvirtd of ' + self.name, START_TIMEOUT)
        self.run(['virsh', '-c', 'qemu:///system', 'uri'],
                 timeout=START_TIMEOUT)

    def _start_modular(self) -> subprocess.Popen:
        """Start what there is in place of libvirtd.

        :returns: the daemon that the others are behind
        """
        first, *behind = [os.path.join(DAEMONS, name) for name in MODULAR]
        for path in behind:
            name = os.path.basename(path)
            self.daemon([path], name + '.log')
            wait_for(self.path('/run/libvirt/%s-sock' % name).exists, name,
                     START_TIMEOUT)
        return self.daemon([first], 'libvirtd.log')

    def stop_libvirtd(self, signal: int = signal.SIGTERM) -> None:
        """End libvirtd, its guests go on; SIGKILL is a crash of it."""
        found = [self.libvirtd_pid, *(
            pid for name in MODULAR[1:] for pid in self.running(name))]
        pids = [pid for pid in found if pid]
        _kill(pids, signal)
        wait_for(lambda: not self._alive(pids),
                 'the end of libvirtd of ' + self.name, STOP_TIMEOUT)

    def listens(self, port: int) -> bool:
        """Whether something in the host accepts connections on a TCP port.

        Read in /proc/net/tcp*: a look from outside would say no for a host
        whose link is down.
        """
        suffix = ':%04X' % port
        for table in ('tcp', 'tcp6'):
            path = pathlib.Path('/proc/%d/net/%s' % (self.pid or 0, table))
            with contextlib.suppress(OSError):
                for line in path.read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == '0A' and fields[1].endswith(suffix):
                        return True
        return False

    # ssh: only where the way without it is to be compared with it

    def start_sshd(self, key: pathlib.Path) -> None:
        """Let nova log in on this host with the key, and from it."""
        home = self.path(NOVA_HOME) / '.ssh'
        home.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(key, home / 'id_ed25519')
        shutil.copy(key.with_suffix('.pub'), home / 'authorized_keys')
        (home / 'config').write_text(SSH_CLIENT_CONF)
        for path in (home, *home.iterdir()):
            os.chown(path, self.nova_uid, self.nova_gid)
            path.chmod(0o700 if path == home else 0o600)
        self._set_shell('/bin/bash')
        if not self.sshd_pids:
            self._start_sshd()

    def _start_sshd(self) -> None:
        etc = self.path('/etc/ssh')
        (etc / 'sshd_config').write_text(SSHD_CONF)
        host_key = etc / 'ssh_host_ed25519_key'
        if not host_key.exists():
            execute('ssh-keygen', '-q', '-t', 'ed25519', '-N', '',
                    '-C', self.name, '-f', host_key)
        self.path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
        self.daemon(['/usr/sbin/sshd', '-D', '-e'], 'sshd.log')
        wait_for(lambda: self.listens(SSH_PORT), 'sshd of ' + self.name,
                 START_TIMEOUT)

    def stop_sshd(self) -> None:
        """End sshd and remove every key and the login shell."""
        self.end(self.sshd_pids)
        self._set_shell('/usr/sbin/nologin')
        for directory in (NOVA_HOME + '/.ssh', '/etc/ssh', '/run/sshd'):
            shutil.rmtree(self.path(directory), ignore_errors=True)
        self.path('/etc/ssh').mkdir(exist_ok=True)

    @property
    def sshd_pids(self) -> list[int]:
        """The host's sshd with the sessions that it has."""
        return self.running('sshd')

    def running(self, name: str) -> list[int]:
        """The pids of the host's processes of a name."""
        return [p for p in self.processes() if _command_name(p) == name]

    def _set_shell(self, shell: str) -> None:
        ids = (self.nova_uid, self.nova_gid)
        self._edit('/etc/passwd', 'nova',
                   'x:%d:%d::%s:%s' % (*ids, NOVA_HOME, shell))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``down`` and later calls have to know about an ``up``."""

    subnet: int
    uids: list[int]


class Lab:
    """The hosts, and the bridge between them and the machine.

    Where the directory holds a lab already, its number of hosts, subnet and
    user ids are those it was made with.

    :param directory: the state of all hosts; ``down`` deletes it
    :param hosts: how many
    :param subnet: 0 to 255; two labs on one machine need different ones
    :param uids: of the nova user, per host
    """

    def __init__(self, directory: str | os.PathLike = DEFAULT,
                 hosts: int | None = None, subnet: int | None = None,
                 uids: Sequence[int] = ()) -> None:
        self.directory = pathlib.Path(directory).absolute()
        self._settings = self._load() or Settings(
            SUBNET if subnet is None else subnet,
            list(uids or range(FIRST_UID, FIRST_UID + (hosts or 2))))
        known = len(self._settings.uids)
        if hosts not in (None, known):
            raise LabError('%s is for %d hosts, not %d' % (
                self.directory, known, hosts))
        subnet = self._settings.subnet
        self.network = ipaddress.ip_network(NETWORK.format(subnet=subnet))
        self.address = str(self.network[1])
        self.bridge = BRIDGE.format(subnet=subnet)
        self.ca = self.directory / 'ca'
        self.pki = self.directory / 'pki/client'
        self.hosts = [Host(self, index, uid)
                      for index, uid in enumerate(self._settings.uids)]

    def _load(self) -> Settings | None:
        with contextlib.suppress(FileNotFoundError):
            text = self.directory.joinpath(MARKER).read_text()
            known = json.loads(text)  # noqa: N324
            return Settings(known['subnet'], known['uids'])
        return None

    def host(self, name: str) -> Host:
        """The host of a name; LabError where there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise LabError('there is no host %s' % name)

    def uri(self, host: Host, pki: str | os.PathLike | None = None) -> str:
        """The URI by which the machine, outside of any host, reaches one.

        :param pki: another directory of make_client() than the lab's own
        """
        return '%s?pkipath=%s' % (host.uri, pki or self.pki)

    def hosts_file(self) -> str:
        """The /etc/hosts of every host."""
        lines = ['127.0.0.1 localhost', '::1 localhost ip6-localhost',
                 self.address + ' controller']
        lines += ['%s %s' % (host.address, host.name) for host in self.hosts]
        return '\n'.join(lines) + '\n'

    @property
    def is_up(self) -> bool:
        """Whether each host has its namespaces and a libvirtd."""
        return all(host.pid and host.libvirtd_pid for host in self.hosts)

    @property
    def rival(self) -> str:
        """The directory of another lab that has our subnet, or ''."""
        owner = ''
        with contextlib.suppress(OSError):
            owner = pathlib.Path(
                '/sys/class/net/%s/ifalias' % self.bridge).read_text().strip()
        if owner == str(self.directory) or not os.path.exists(
                os.path.join(owner, MARKER)):
            return ''
        return owner

    def up(self) -> None:
        """Make what is missing; a lab that is up stays as it is.

        :raises LabError: if another lab has the subnet
        """
        self._require_root()
        with self._lock():
            if self.rival:
                raise LabError(
                    '%s is the network of the lab in %s: choose another with '
                    'NOVA_LAB_SUBNET' % (self.network, self.rival))
            self._start_directory()
            make_ca(self.ca)
            make_client(self.ca, self.pki)
            self._make_bridge()
            for host in self.hosts:
                host.up()

    def down(self) -> None:
        """End the hosts and remove all that ``up`` and ``ssh`` made."""
        self._require_root()
        with self._lock():
            for host in self.hosts:
                host.down()
            if not self._load():
                # Nothing was made, or something that is not ours is there.
                return
            if not self.rival:
                execute('ip', 'link', 'delete', self.bridge, check=False)
            shutil.rmtree(self.directory)
            remove_mount_points()

    def ssh(self, enable: bool) -> None:
        """Give all hosts an sshd and a common key of nova's, or take them."""
        key = self.directory / 'ssh/id_ed25519'
        if not enable:
            for host in self.hosts:
                host.stop_sshd()
            shutil.rmtree(key.parent, ignore_errors=True)
            return
        if not key.exists():
            key.parent.mkdir(mode=0o700, exist_ok=True)
            execute('ssh-keygen', '-q', '-t', 'ed25519', '-N', '',
                    '-C', 'nova', '-f', key)
        for host in self.hosts:
            host.start_sshd(key)

    def _start_directory(self) -> None:
        self.directory.mkdir(mode=0o755, exist_ok=True)
        marker = self.directory / MARKER
        if not marker.exists():
            if any(self.directory.iterdir()):
                raise LabError('%s is not empty, and not a lab' %
                               self.directory)
            settings = dataclasses.asdict(self._settings)
            marker.write_text(json.dumps(settings))  # noqa: N324
        make_mount_points()

    def _make_bridge(self) -> None:
        if not os.path.exists('/sys/class/net/' + self.bridge):
            execute('ip', 'link', 'add', self.bridge, 'type', 'bridge',
                    'forward_delay', '0', 'stp_state', '0')
        # Tells whose it is.
        execute('ip', 'link', 'set', self.bridge, 'alias', self.directory)
        bits = self.network.prefixlen
        execute('ip', 'address', 'replace', '%s/%d' % (self.address, bits),
                'dev', self.bridge)
        execute('ip', 'link', 'set', self.bridge, 'up')

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One up or down at a time, and nothing to clean up after it."""
        parent = self.directory.parent
        parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def _require_root() -> None:
        if os.geteuid():
            raise LabError('the lab needs root: it makes namespaces')


def status(lab: Lab) -> int:
    """Print one line per host; 0 if the lab is up."""
    print('%s: machine %s, bridge %s, %s' % (
        lab.directory, lab.address, lab.bridge,
        'up' if lab.is_up else 'not up'))
    for host in lab.hosts:
        print('%s %s: namespaces %s, libvirtd %s, sshd %s, nova uid %d' % (
            host.name, host.address, host.pid or 'none',
            host.libvirtd_pid or 'none',
            'running' if host.sshd_pids else 'none', host.nova_uid))
    return 0 if lab.is_up else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--directory', default=DEFAULT,
                        help='state of the lab (default: %(default)s, or '
                             'NOVA_LAB_DIR)')
    commands = parser.add_subparsers(dest='action', required=True)
    up = commands.add_parser('up', help='make the hosts')
    up.add_argument('--hosts', type=int, help='how many (default: 2)')
    up.add_argument('--ssh', action='store_true',
                    help='with sshd and a key for nova in each')
    commands.add_parser('down', help='remove everything')
    commands.add_parser('status', help='what runs')
    run = commands.add_parser('exec', help='run a command in a host')
    run.add_argument('host')
    run.add_argument('--user', help='as this user (default: root)')
    run.add_argument('command', nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def execute_in(lab: Lab, args: argparse.Namespace) -> None:
    """Become the command that ``exec`` names."""
    host = lab.host(args.host)
    command = args.command
    if '--user' in command[:1]:  # argparse leaves it to the remainder
        args.user, command = command[1], command[2:]
    command = command[1:] if command[:1] == ['--'] else command
    argv = host.command(command or ['bash'], args.user)
    term = {'TERM': os.environ.get('TERM', 'dumb')}
    os.execvpe(argv[0], argv, host.environment(args.user, term))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        lab = Lab(args.directory, getattr(args, 'hosts', None))
        if args.action == 'down':
            lab.down()
            return 0
        if args.action == 'exec':
            execute_in(lab, args)
        if args.action == 'up':
            lab.up()
            if args.ssh:
                lab.ssh(True)
        return status(lab)
    except LabError as error:
        print('lab: %s' % error, file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
