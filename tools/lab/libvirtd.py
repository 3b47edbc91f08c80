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

"""The libvirt daemon of a host: configured, started, ended."""

from collections.abc import Sequence
import contextlib
import json
import os
import signal
import subprocess
from typing import Any
import uuid

from tools.lab import host
from tools.lab import namespaces
from tools import processes
from tools import waiting

# Where there are daemons to run in place of libvirtd, which Debian 12 does not
# have; see tools/modular-daemons. The first of them is what others connect to.
DAEMONS = os.environ.get('NOVA_LAB_DAEMONS', '')
MODULAR = ('virtproxyd', 'virtqemud', 'virtsecretd', 'virtstoraged')
LISTENER = 'virtproxyd' if DAEMONS else 'libvirtd'

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


class Libvirtd(namespaces.Namespaces):
    """The daemon, or the several in its place, of a host."""

    def configure_libvirtd(self, **settings: Any) -> None:
        """Write libvirtd.conf, which counts from the next start on.

        :param settings: what differs from the lab's own configuration
        """
        settings = {
            'host_uuid': str(uuid.uuid5(
                uuid.NAMESPACE_URL, str(self.directory))),
            'tls_allowed_dn_list': [
                'CN=' + name for name in self.lab.client_names],
            **LIBVIRTD_CONF, **settings}
        for daemon in ('libvirtd', *MODULAR):
            self.path('/etc/libvirt/%s.conf' % daemon).write_text(''.join(
                '%s = %s\n' % (name, json.dumps(value))  # noqa: N324
                for name, value in settings.items()))
        self.path('/etc/libvirt/qemu.conf').write_text(QEMU_CONF)

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
            if (processes.name(pid) == LISTENER and self.pid and
                    processes.mount_namespace(pid) ==
                    processes.mount_namespace(self.pid)):
                return pid
        return None

    def start_libvirtd(self, tracer: Sequence[str] = ()) -> None:
        """Start libvirtd and wait until it answers, over TLS as well.

        :param tracer: the command that starts it, such as strace
        """
        process = self._start_modular(tracer) if DAEMONS else self.daemon(
            [*tracer, 'libvirtd', '--listen'], 'libvirtd.log')

        def listens() -> bool:
            if process.poll() is not None:
                raise waiting.Failed('libvirtd of %s ended: see %s' % (
                    self.name, self.logs / 'libvirtd.log'))
            return bool(self.libvirtd_pid) and self.listens(host.TLS_PORT)

        waiting.wait_for('libvirtd of ' + self.name, listens,
                         host.START_TIMEOUT, poll=0.02)
        # Its socket may come later than its port.
        waiting.wait_for(
            'an answer of libvirtd of ' + self.name, self._answers,
            host.START_TIMEOUT, poll=0.1)

    def _answers(self) -> bool:
        return not self.run(
            ['virsh', '-c', 'qemu:///system', 'uri'], check=False,
            timeout=host.START_TIMEOUT).returncode

    def _start_modular(self, tracer: Sequence[str]) -> subprocess.Popen:
        """Start what there is in place of libvirtd.

        :returns: the daemon that the others are behind
        """
        first, *behind = [os.path.join(DAEMONS, name) for name in MODULAR]
        for path in behind:
            name = os.path.basename(path)
            self.daemon([*tracer, path], name + '.log')
            waiting.wait_for(
                name, self.path('/run/libvirt/%s-sock' % name).exists,
                host.START_TIMEOUT, poll=0.02)
        return self.daemon([*tracer, first], 'libvirtd.log')

    def stop_libvirtd(self, signal: int = signal.SIGTERM) -> None:
        """End libvirtd, its guests go on; SIGKILL is a crash of it."""
        pids = [self.libvirtd_pid, *(
            pid for name in MODULAR[1:] for pid in self.running(name))]
        found = processes.find(pid for pid in pids if pid)
        processes.send(found, signal)
        self._wait_for_end(found, host.STOP_TIMEOUT)
        # A thread that waits for a disk keeps the port open for a moment.
        waiting.wait_for(
            f'the port of libvirtd of {self.name} to be free',
            lambda: not self.listens(host.TLS_PORT), host.STOP_TIMEOUT,
            poll=0.02)
