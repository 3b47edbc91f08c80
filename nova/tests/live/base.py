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
"""What live tests share: two lab hosts, connections, pools and files."""

import atexit
import faulthandler
import functools
import gc
import hashlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
from typing import Any
from typing import Sequence

import libvirt
from oslo_serialization import jsonutils
from oslo_utils import uuidutils
import testtools

from nova.virt.libvirt.storage import threads

from tools import certificates
from tools import cloud
from tools import daemons
from tools import lab as nova_lab

ROOT = pathlib.Path(__file__).resolve().parents[3]

# Not the lab that an operator may have up, but one that a test may break.
DIRECTORY = os.environ.get('NOVA_LAB_DIR') or '/var/lib/nova-lab-test'
SUBNET = int(os.environ.get('NOVA_LAB_SUBNET', '200'))

POOL = """\
<pool type='dir'>
  <name>{name}</name>
  <target>
    <path>{path}</path>
    <permissions>
      <mode>0755</mode><owner>{uid}</owner><group>{gid}</group>
    </permissions>
  </target>
</pool>
"""


@functools.cache
def get_lab() -> nova_lab.Lab:
    """The lab of this process: one that is up, or else one of its own."""
    lab = find_lab()
    kept = lab.is_up
    if not kept:
        atexit.register(lab.down)
        # Comes before that: a connection that nothing but an exception's
        # cycle holds on to would wait for ever for a daemon that is gone.
        atexit.register(gc.collect)
    lab.up()
    if not kept:
        _owner(lab).remember(os.getpid())
    return lab


def find_lab() -> nova_lab.Lab:
    """The lab of the tests, cleared of what killed tests left."""
    lab = nova_lab.Lab(DIRECTORY, subnet=SUBNET)
    owner = _owner(lab)
    if owner.record.exists() and owner.pid is None:
        cloud.Cloud(lab).down()
        lab.down()
    return lab


def _owner(lab: nova_lab.Lab) -> daemons.Daemon:
    """The process of tests that a lab goes with."""
    return daemons.Daemon('tests', lab.directory)


def python_as_nova(host: nova_lab.Host, *argv: str) -> list[str]:
    """The command that runs Python in a host, as the user nova there.

    Beyond what nova may do, it may read every file: this repository may be
    where nobody but root can.
    """
    read = '+dac_read_search'
    return ['setpriv', '--reuid', str(host.nova_uid),
            '--regid', str(host.nova_gid),
            '--init-groups', '--inh-caps', read, '--ambient-caps', read, '--',
            sys.executable, '-W', 'ignore', *argv]


def start_as_nova(host: nova_lab.Host, module: str,
                  **kwargs: Any) -> subprocess.Popen:
    """Run a module of the tests in a host, as the user nova there.

    It answers on standard output what it is asked on standard input, and
    begins with a line of JSON that says its uid.
    """
    process = host.popen(
        python_as_nova(host, '-m', module),
        env={'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'true'}, cwd='/',
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kwargs)
    atexit.register(process.kill)
    started = jsonutils.loads(process.stdout.readline())
    assert started == {'uid': host.nova_uid}
    return process


class LabMixin:
    """For test cases that need real hosts.

    :ivar lab: the lab, which is up
    :ivar hosts: its hosts; source and destination are the first two
    """

    def setUp(self) -> None:
        super().setUp()
        if os.geteuid():
            self.skipTest('the lab needs root')
        self.end_the_run_if_this_hangs()
        threads.run_event_loop()
        self.lab = get_lab()
        self.hosts = self.lab.hosts
        self.source, self.destination = self.hosts[:2]

    def end_the_run_if_this_hangs(self) -> None:
        """Give the test that much time, from now on."""
        # The timeout of Nova's base class, and that of the test runner, is a
        # signal, which Python heeds when libvirt has returned.
        seconds = int(os.environ.get('OS_TEST_TIMEOUT', 0))
        if seconds:
            faulthandler.dump_traceback_later(
                seconds + 60, exit=True, file=sys.__stderr__)
            self.addCleanup(faulthandler.cancel_dump_traceback_later)

    def connect(self, host: nova_lab.Host,
                pki: str | os.PathLike | None = None) -> libvirt.virConnect:
        """Connect to a host from the machine over TLS."""
        return self._open(self.lab.uri(host, pki))

    def connect_local(self, host: nova_lab.Host) -> libvirt.virConnect:
        """Connect as the host's own nova-compute does, by its socket."""
        return self._open(self.local_uri(host))

    @staticmethod
    def local_uri(host: nova_lab.Host) -> str:
        """The URI by which a host's own nova-compute connects."""
        return 'qemu+unix:///system?socket=%s' % host.path(
            '/run/libvirt/libvirt-sock')

    def _open(self, uri: str) -> libvirt.virConnect:
        connection = libvirt.open(uri)
        # Who frees the last pool of a connection, which may be the garbage
        # collector, asks the daemon, which a test may have stopped.
        connection.setKeepAlive(2, 3)
        self.addCleanup(self._close, connection)
        return connection

    @staticmethod
    def _close(connection: libvirt.virConnect) -> None:
        try:
            connection.close()
        except libvirt.libvirtError:
            pass  # a test may have cut it

    def make_pool(self, host: nova_lab.Host,
                  name: str = '') -> libvirt.virStoragePool:
        """Define, build and start a dir pool of nova's on a host.

        The pool goes away with the test, and what is in it.
        """
        name = name or 'test-%s' % uuidutils.generate_uuid()
        path = '/var/lib/nova/%s' % name
        connection = self.connect_local(host)
        self.addCleanup(shutil.rmtree, host.path(path), ignore_errors=True)
        pool = connection.storagePoolDefineXML(POOL.format(
            name=name, path=path, uid=host.nova_uid, gid=host.nova_gid))
        self.addCleanup(self._remove_pool, host, name)
        pool.build()
        pool.create()
        return pool

    def _remove_pool(self, host: nova_lab.Host, name: str) -> None:
        # By name and over a new connection: a test may have ended libvirtd.
        pool = self.connect_local(host).storagePoolLookupByName(name)
        if pool.isActive():
            pool.destroy()
        pool.undefine()

    def make_disk(self, host: nova_lab.Host, path: str, size: int,
                  extents: Sequence[tuple[int, int]],
                  seed: int = 0) -> pathlib.Path:
        """Write a sparse file of nova's with random data in some extents.

        :param path: as the host sees it
        :param extents: (offset, length) of each
        :returns: where the file is on the machine
        """
        file = host.path(path)
        noise = random.Random(seed)
        with open(file, 'wb') as disk:
            disk.truncate(size)
            for offset, length in extents:
                disk.seek(offset)
                while length:
                    step = min(length, 1 << 20)
                    disk.write(noise.randbytes(step))
                    length -= step
        self.addCleanup(file.unlink, missing_ok=True)
        os.chown(file, host.nova_uid, host.nova_gid)
        return file

    @staticmethod
    def sha256(path: str | os.PathLike) -> str:
        """The hex digest of a file's bytes, holes read as zeroes."""
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()

    @staticmethod
    def allocated(path: str | os.PathLike) -> int:
        """The bytes that a file takes on disk."""
        return os.stat(path).st_blocks * 512


class CertificateMixin(LabMixin):
    """Gives hosts other certificates for the length of a test."""

    def set_client(self, **certificate: Any) -> None:
        """Give the source another one; see Host.set_certificate()."""
        self.addCleanup(self.source.set_certificate, 'client')
        self.source.set_certificate('client', **certificate)

    def set_server(self, **certificate: Any) -> None:
        """Give the destination another one, which libvirtd then reads."""
        self.addCleanup(self._restore_server)
        self.destination.set_certificate('server', **certificate)

    def _restore_server(self) -> None:
        self.destination.set_certificate('server')
        self.destination.restart_libvirtd()

    def other_ca(self) -> certificates.Authority:
        """A CA that no host knows."""
        return certificates.Authority(
            self.lab.directory / 'other-ca', 'another CA')


class LiveTestCase(LabMixin, testtools.TestCase):
    """A test on real hosts that needs nothing of Nova's fixtures."""
