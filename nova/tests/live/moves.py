#!/usr/bin/python3
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

"""The files of a server moved as the driver moves them, without Nova."""

import pathlib
import subprocess
import typing as ty

from oslo_utils import uuidutils

from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import site
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import transfer
from nova.virt.libvirt.storage import undo


class Watch:
    """Keeps what a transfer says of its files.

    :ivar results: what became of each file, by name
    :ivar passes: what became of each pass that sent changes, with the name
    :ivar losses: what each loss of a connection looked like
    """

    def __init__(self) -> None:
        self.results: dict[str, stream.Result] = {}
        self.passes: list[tuple[str, stream.Result]] = []
        self.losses: list[Exception] = []

    def begin(self, total: int) -> None:
        pass

    def note(self, name: str, done: int, wire: int) -> None:
        pass

    def end(self, name: str, result: stream.Result) -> None:
        self.results[name] = result

    def changed(self, name: str, changed: int, seconds: float) -> None:
        pass

    def end_pass(self, name: str, result: stream.Result) -> None:
        self.passes.append((name, result))

    def lose(self, error: Exception, seconds: int) -> None:
        self.losses.append(error)


class Guest:
    """QEMU that has a disk open, as that of a server, and does not write.

    What the copy does to it shows in its process alone.
    """

    def __init__(self, path: str | pathlib.Path, disk_format: str = 'raw'):
        """Start it."""
        self._command = [
            'qemu-system-x86_64', '-S', '-display', 'none', '-nodefaults',
            '-machine', 'none', '-monitor', 'stdio', '-drive',
            f'if=none,format={disk_format},cache=none,aio=threads,file={path}']
        self._processes: list[subprocess.Popen] = []
        self.start()

    def start(self) -> None:
        """Start it, again if it was stopped; return when the disk is open."""
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self._processes.append(process)
        output = ty.cast(ty.IO[bytes], process.stdout)
        if not output.readline():
            raise RuntimeError('QEMU did not start')

    def stop(self) -> None:
        """Stop it, as a power off does."""
        process = self._processes[-1]
        process.kill()
        process.wait()
        for pipe in process.stdin, process.stdout:
            if pipe:
                pipe.close()

    @property
    def was_off(self) -> bool:
        """Whether the process that was started first is not there any more."""
        return self._processes[0].poll() is not None


def new_transfer(
    source_uri: str,
    host: str,
    uri: str,
    pool: str,
    here: layout.Layout,
    files: list[layout.File],
    directory: str | None = None,
    uses_pool: bool = True,
    bandwidth: stream.Bandwidth | None = None,
) -> transfer.Transfer:
    """A transfer between two hosts; nothing happens yet.

    :param here: the files of the source, by paths of this process
    :param directory: the instance directory of the destination, if this
        process has another path of that of the source
    """
    claim = layout.Claim(here.uuid, uuidutils.generate_uuid(), 'source')
    there = layout.Layout(here.uuid, '', directory or here.directory)
    return transfer.Transfer(
        site.Site(daemon.Daemon('source', source_uri), here, pool, claim,
                  uses_pool),
        site.Site(daemon.Daemon(host, uri), there, pool, claim, uses_pool),
        files, f'instance-{here.uuid}', bandwidth)


def start(move: transfer.Transfer) -> None:
    """All that a migration does before the server is powered off."""
    move.check()
    move.claim()


def precopy_all(move: transfer.Transfer,
                cancel: stream.CancelEvent | None = None,
                watch: transfer.Watch | None = None) -> None:
    """All that is copied while the server runs."""
    while move.precopy(cancel, watch):
        pass


def migrate(move: transfer.Transfer, cancel: stream.CancelEvent | None = None,
            watch: transfer.Watch | None = None,
            steps: undo.Undo | None = None, guest: Guest | None = None,
            precopy: bool = False) -> None:
    """Move the files, or leave nothing behind.

    :param guest: stopped for the copy; started again where that fails
    :param precopy: whether to copy the disks before that, too
    """
    with steps or undo.Undo() as steps:
        start(move)
        steps.push(move.discard)
        if precopy:
            precopy_all(move, cancel, watch)
        if guest:
            steps.push(guest.start)
            guest.stop()
        move.run(cancel, watch)
        steps.commit()
