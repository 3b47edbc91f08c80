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

"""A compute host, whatever it is made of."""

import abc
from collections.abc import Mapping
from collections.abc import Sequence
import os
from pathlib import Path
import signal
import subprocess
from typing import Any

from tools import processes

NOVA_HOME = '/var/lib/nova'
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
TLS_PORT = 16514
SSH_PORT = 22

START_TIMEOUT = 30
STOP_TIMEOUT = 20


class Host(abc.ABC):
    """A compute host with a libvirt daemon and a user nova.

    :ivar name: also its hostname
    :ivar address: its address on the network of the lab
    :ivar directory: its state on the machine's file system
    :ivar logs: what its daemons write, on the machine's file system
    """

    def __init__(self, name: str, address: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self.directory = directory
        self.logs = directory / 'log'

    @property
    def uri(self) -> str:
        """The URI by which another host reaches its libvirt."""
        return 'qemu+tls://%s/system' % self.address

    @abc.abstractmethod
    def command(self, argv: Sequence[str | os.PathLike],
                user: str | None = None,
                env: Mapping[str, str] | None = None) -> list[str]:
        """The argv, on the machine, that runs a command in this host.

        :param user: root if not given
        :param env: besides what environment() says, where the environment of
            the argv itself does not reach the command
        """

    def environment(self, user: str | None = None,
                    env: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a login of the user would have set, plus env."""
        user = user or 'root'
        home = {'nova': NOVA_HOME, 'root': '/root'}.get(user, '/')
        return {'HOME': home, 'USER': user, 'LOGNAME': user,
                'PATH': PATH, 'LANG': 'C.UTF-8', **(env or {})}

    def run(self, argv: Sequence[str | os.PathLike], user: str | None = None,
            check: bool = True, input: str | None = None,
            timeout: float | None = None,
            env: Mapping[str, str] | None = None
            ) -> subprocess.CompletedProcess:
        """Run a command in the host, its output captured as text.

        :raises waiting.Failed: with what it said, unless told not to check
        """
        return processes.execute(
            *self.command(argv, user, env), check=check, input=input,
            timeout=timeout, env=self.environment(user, env),
            **({} if input else {'stdin': subprocess.DEVNULL}))

    def popen(self, argv: Sequence[str | os.PathLike],
              user: str | None = None, env: Mapping[str, str] | None = None,
              **kwargs: Any) -> subprocess.Popen:
        """Start a command in the host, in a session of its own."""
        kwargs.setdefault('stdin', subprocess.DEVNULL)
        kwargs.setdefault('start_new_session', True)
        # A test may start it in a thread that copies, which gets no signals;
        # a program would keep that, and not end when it is told to.
        before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            return subprocess.Popen(self.command(argv, user, env),
                                    env=self.environment(user, env), **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
