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

"""The lab: its hosts, and the bridge between them and the machine."""

from collections.abc import Sequence
import contextlib
import dataclasses
import ipaddress
import json
import os
from pathlib import Path
import shutil

from tools import certificates
from tools.lab import files
from tools.lab import identity
from tools.lab import libvirtd
from tools.lab import machine
from tools.lab import mounts
from tools.lab import sshd
from tools import processes
from tools import waiting

DEFAULT = os.environ.get('NOVA_LAB_DIR') or '/var/lib/nova-lab'

# A slice of the range that RFC 2544 sets aside for tests of networks: it is
# routed nowhere, so it cannot hide something that the machine needs.
NETWORK = '198.18.{subnet}.0/24'
SUBNET = int(os.environ.get('NOVA_LAB_SUBNET', '0'))
BRIDGE = 'nsm{subnet}'
FIRST_HOST = 11

# Each host numbers its nova user differently: an owner that travels as a
# number instead of being looked up on the destination shows.
FIRST_UID = 64060

# Whose certificate the machine shows, which is outside of any host.
CLIENT = 'lab client'
MARKER = 'lab.json'


class Host(libvirtd.Libvirtd, identity.Identity, sshd.Sshd, files.Files):
    """One compute host out of namespaces.

    :param index: from 0 on; host1 is the first
    """

    def __init__(self, lab: 'Lab', index: int, nova_uid: int) -> None:
        super().__init__(
            lab, 'host%d' % (index + 1), str(lab.network[FIRST_HOST + index]),
            '%s-%d' % (lab.bridge, index + 1), nova_uid)

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

    def _make_files(self) -> None:
        self._make_directories()
        self._make_etc()
        self.configure_libvirtd()
        self._make_users()
        self._make_identity()
        self.directory.joinpath('complete').touch()

    def down(self) -> None:
        """End every process of the host; the namespaces go with the last."""
        self._end_namespaces()


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
        self.directory = Path(directory).absolute()
        self._settings = self._load() or Settings(
            SUBNET if subnet is None else subnet,
            list(uids or range(FIRST_UID, FIRST_UID + (hosts or 2))))
        known = len(self._settings.uids)
        if hosts not in (None, known):
            raise waiting.Failed('%s is for %d hosts, not %d' % (
                self.directory, known, hosts))
        subnet = self._settings.subnet
        self.network = ipaddress.ip_network(NETWORK.format(subnet=subnet))
        self.address = str(self.network[1])
        self.bridge = BRIDGE.format(subnet=subnet)
        self.pki = self.directory / 'pki/client'
        self.hosts = [Host(self, index, uid)
                      for index, uid in enumerate(self._settings.uids)]

    def _load(self) -> Settings | None:
        with contextlib.suppress(FileNotFoundError):
            text = self.directory.joinpath(MARKER).read_text()
            known = json.loads(text)  # noqa: N324
            return Settings(known['subnet'], known['uids'])
        return None

    @property
    def authority(self) -> certificates.Authority:
        """The certificate authority of the lab."""
        return certificates.Authority(self.directory / 'ca')

    @property
    def client_names(self) -> list[str]:
        """The common names of those that the hosts let in."""
        return [CLIENT, *(host.name for host in self.hosts)]

    def host(self, name: str) -> Host:
        """The host of a name; waiting.Failed where there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise waiting.Failed('there is no host %s' % name)

    def uri(self, host: Host, pki: str | os.PathLike | None = None) -> str:
        """The URI by which the machine, outside of any host, reaches one.

        :param pki: another directory of Authority.issue_client() than the
            lab's own
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
            owner = Path(
                '/sys/class/net/%s/ifalias' % self.bridge).read_text().strip()
        if owner == str(self.directory) or not os.path.exists(
                os.path.join(owner, MARKER)):
            return ''
        return owner

    def up(self) -> None:
        """Make what is missing; a lab that is up stays as it is.

        :raises waiting.Failed: if another lab has the subnet
        """
        self._require_root()
        with self._lock():
            if self.rival:
                raise waiting.Failed(
                    '%s is the network of the lab in %s: choose another with '
                    'NOVA_LAB_SUBNET' % (self.network, self.rival))
            self._start_directory()
            self.authority.issue_client(self.pki, CLIENT)
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
                machine.end_all(self)
                processes.execute('ip', 'link', 'delete', self.bridge,
                                  check=False)
            shutil.rmtree(self.directory)
            mounts.remove()

    def ssh(self, enable: bool) -> None:
        """Give all hosts an sshd and a common key of nova's, or take them."""
        key = self.directory / 'ssh/id_ed25519'
        if not enable:
            for host in self.hosts:
                host.stop_sshd()
            shutil.rmtree(key.parent, ignore_errors=True)
            return
        sshd.make_key(key, 'nova')
        for host in self.hosts:
            host.start_sshd(key)

    def _start_directory(self) -> None:
        self.directory.mkdir(mode=0o755, exist_ok=True)
        marker = self.directory / MARKER
        if not marker.exists():
            if any(self.directory.iterdir()):
                raise waiting.Failed('%s is not empty, and not a lab' %
                                     self.directory)
            settings = dataclasses.asdict(self._settings)
            marker.write_text(json.dumps(settings))  # noqa: N324
        mounts.make()

    def _make_bridge(self) -> None:
        if not os.path.exists('/sys/class/net/' + self.bridge):
            processes.execute('ip', 'link', 'add', self.bridge, 'type',
                              'bridge', 'forward_delay', '0', 'stp_state',
                              '0')
        # Tells whose it is.
        processes.execute('ip', 'link', 'set', self.bridge, 'alias',
                          self.directory)
        bits = self.network.prefixlen
        processes.execute('ip', 'address', 'replace',
                          '%s/%d' % (self.address, bits), 'dev', self.bridge)
        processes.execute('ip', 'link', 'set', self.bridge, 'up')

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        """One up or down at a time."""
        parent = self.directory.parent
        parent.mkdir(parents=True, exist_ok=True)
        return waiting.locked(parent)

    @staticmethod
    def _require_root() -> None:
        if os.geteuid():
            raise waiting.Failed('the lab needs root: it makes namespaces')
