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

"""Look whether servers could be migrated to another host, before they are.

Every wait has a bound, and nothing stays on the other host.
"""

import contextlib
import dataclasses
import os
import socket
import tempfile
import typing as ty
from urllib import parse

from oslo_utils import units
from oslo_utils import uuidutils
from oslo_utils import versionutils

from nova.virt.libvirt.storage import access
from nova.virt.libvirt.storage import certificates
from nova.virt.libvirt.storage import daemon
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import place
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import site as server_site
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage.threads import libvirt

OK = 'ok'
WARN = 'warn'
FAIL = 'fail'

# Default ports of the transports of a URI.
PORTS = {'tls': 16514, 'tcp': 16509}

# Bytes of the probe copy.
PROBE_BYTES = 16 * units.Mi

# Seconds that a step may take: more than an attempt to connect, and than the
# keepalive of a connection.
STEP_SECONDS = 60
PROBE_SECONDS = 300

DIRECTORY_REMEDY = (
    'Run the check as the user of nova-compute. If nova-compute or libvirt '
    'runs in a container, mount the directory in both under this path')

# Days before its end from which on a certificate is warned of.
EXPIRY_DAYS = 30

_LOG_REMEDY = "Check libvirt's log on both hosts"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    :ivar host: what was looked at, as it was named
    :ivar status: OK, WARN: migrations work, FAIL: they do not
    :ivar what: was checked
    :ivar finding: what was found
    :ivar remedy: what to do about it, empty if all is well
    """
    host: str
    status: str
    what: str
    finding: str
    remedy: str = ''

    def __str__(self) -> str:
        text = f'{self.status:<5} {self.host}: {self.what}: {self.finding}'
        if self.remedy:
            text += f'; {self.remedy}'
        # What libvirt says may have several lines.
        return text.replace('\n', ' ')


class Problem(errors.StorageError):
    """Something is not as it has to be.

    :ivar status: WARN or FAIL
    """

    def __init__(self, reason: str, remedy: str, status: str = FAIL):
        super().__init__(reason, remedy)
        self.status = status


# A step says what it found, or raises what is wrong.
Step = tuple[str, ty.Callable[[], str]]


class Checks:
    """Checks in their order.

    :ivar host: what is looked at
    """

    host: str

    def __init__(self) -> None:
        self._failed = False

    def _run(self, steps: list[Step]) -> ty.Iterator[Finding]:
        """Yield what steps find that do not depend on each other."""
        for what, step in steps:
            finding = self._try(what, step)
            self._failed |= finding.status == FAIL
            yield finding

    def _run_until_failure(self, steps: list[Step]) -> ty.Iterator[Finding]:
        """Yield what steps find each of which needs those before it."""
        for step in steps:
            if self._failed:
                return
            yield from self._run([step])

    def _try(self, what: str, step: ty.Callable[[], str],
             seconds: float | None = None) -> Finding:
        try:
            return Finding(self.host, OK, what, threads.within(
                seconds or STEP_SECONDS, step))
        except errors.StorageError as problem:
            return Finding(
                self.host, getattr(problem, 'status', FAIL), what,
                problem.reason, problem.remedy.rstrip('.') or _LOG_REMEDY)
        except TimeoutError as error:
            return Finding(
                self.host, FAIL, what, str(error),
                'Check whether libvirt, its storage or the network hangs')
        except Exception as error:
            return Finding(
                self.host, FAIL, what, str(error) or repr(error),
                _LOG_REMEDY)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of nova.conf that count.

    :ivar uri: libvirt URI of this host
    :ivar pool: name of the disks pool, None if disks stay in files
    :ivar pool_path: its directory on this host, None for where it is
    :ivar instances_path: directory of the instance directories
    :ivar options: names of the options that are set, of use_storage_pools and
        vol_upload_migration
    :ivar bandwidth: limit in bytes per second, 0 for none
    :ivar group_path: directory of the devices of the volume group that has
        the disks, empty if none has
    """
    uri: str
    pool: str | None
    pool_path: str | None
    instances_path: str
    options: tuple[str, ...]
    bandwidth: int
    group_path: str = ''


class Source(Checks):
    """The host that this runs on.

    :ivar version: of its libvirt, once run
    :ivar pool: its disks pool, if it has one
    """

    def __init__(self, host: str, settings: Settings):
        super().__init__()
        self.host = host
        self.version = 0
        self.pool: storage_pool.Pool | None = None
        self._settings = settings
        self._connection: ty.Any = None

    def run(self) -> ty.Iterator[Finding]:
        """Yield what is found, one after the other."""
        yield from self._run([('user', self._user),
                              ('options', self._options)])
        steps: list[Step] = [('libvirt', self._libvirt),
                             ('directory', self._directory)]
        if self._settings.pool:
            steps[1:1] = [('pool', self._pool), ('access', self._access)]
            steps.append(('policy', self._policy))
        yield from self._run_until_failure(steps)

    @property
    def pool_path(self) -> str:
        """The directory of the disks pool, as far as it is known."""
        return self.pool.path if self.pool else self._settings.pool_path or ''

    def close(self) -> None:
        """Close the connection to this host's libvirt."""
        _close(self._connection)

    def _user(self) -> str:
        try:
            owner = os.stat(self._settings.instances_path).st_uid
        except OSError as error:
            raise Problem(
                f'{self._settings.instances_path}: {error.strerror}',
                'Name the configuration of nova-compute with --config-file '
                'if that is not its instances_path')
        if os.geteuid() != owner:
            raise Problem(
                f'this runs with uid {os.geteuid()}, and '
                f'{self._settings.instances_path} belongs to uid {owner}',
                'Run the check as the user of nova-compute, whose access '
                'counts: sudo -u nova', WARN)
        return f'uid {owner}, as nova-compute'

    def _options(self) -> str:
        options = self._settings.options
        if 'vol_upload_migration' not in options:
            raise Problem(
                'servers of this host do not migrate over libvirt',
                'Set [libvirt]vol_upload_migration and, for disks in files, '
                'use_storage_pools or vol_upload_migration_legacy', WARN)
        verb = 'are' if len(options) > 1 else 'is'
        return f'{" and ".join(options)} {verb} set'

    def _libvirt(self) -> str:
        try:
            self._connection = daemon.open_connection(self._settings.uri)
        except libvirt.libvirtError as error:
            raise Problem(f'{self._settings.uri}: {error}',
                          'Start libvirt, and let this user connect to it')
        self.version = self._connection.getLibVersion()
        version = versionutils.convert_version_to_str(self.version)
        return f'version {version}'

    def _pool(self) -> str:
        name = self._settings.pool or ''
        try:
            self.pool = storage_pool.Pool.lookup(self._connection, name)
        except (errors.PoolNotFound, errors.PoolInactive):
            raise Problem(f'there is no active storage pool {name}',
                          'Set [libvirt]use_storage_pools, and restart '
                          'nova-compute on this host')
        path = self._settings.pool_path
        if path is not None and self.pool.path != path.rstrip('/'):
            raise Problem(
                f'{name} has the directory {self.pool.path}',
                'Set [libvirt]disks_pool_path to that directory')
        return _describe(self.pool)

    def _directory(self) -> str:
        """Whether this user and libvirt mean the same by a path."""
        path = self.pool.path if self.pool else self._settings.instances_path
        with _marker(path) as marker:
            if marker is None:
                raise Problem(f'this user cannot make a file in {path}',
                              DIRECTORY_REMEDY)
            is_seen = storage_pool.within(
                self._connection, path=path, name='nova-check-directory',
                function=lambda pool: bool(pool.volumes(marker)))
        if not is_seen:
            raise Problem(
                f'libvirt does not see what this user writes to {path}',
                DIRECTORY_REMEDY)
        return f'libvirt sees what this user writes to {path}'

    def _access(self) -> str:
        assert self.pool
        place.check_access(self.pool.path)
        return f'this user may use {self.pool.path}'

    def _policy(self) -> str:
        assert self.pool
        try:
            return place.check_policy(
                self._connection.getCapabilities(), self.pool.path)
        except errors.Refused as error:
            # A rule may allow it that this check does not know.
            raise Problem(error.reason, error.remedy, WARN)


class Destination(Checks):
    """A host to which servers may have to go."""

    def __init__(self, host: str, uri: str, source: Source,
                 settings: Settings, size: int):
        """Name the host; nothing happens yet.

        :param uri: its libvirt URI
        :param size: bytes of a disk that it has to take
        """
        super().__init__()
        self.host = host
        self._source = source
        self._settings = settings
        self._connection: ty.Any = None
        self._size = size
        self._uri = parse.urlsplit(uri)
        self._name = self._uri.hostname or ''
        self._transport = access.transport(uri)
        self._port = self._uri.port or PORTS.get(self._transport, 0)
        uuid = uuidutils.generate_uuid()
        self._places = layout.Layout(
            uuid, source.pool_path,
            os.path.join(settings.instances_path, uuid), settings.group_path)
        self._site = server_site.Site(
            daemon.Daemon(host, uri), self._places, settings.pool or '',
            layout.Claim.new(self._places.uuid), bool(settings.pool),
            bool(settings.group_path))
        # A migration copies most bytes to there.
        self._place = (layout.POOL if settings.pool else
                       layout.GROUP if settings.group_path else
                       layout.DIRECTORY)

    def run(self) -> ty.Iterator[Finding]:
        """Yield what is found, one after the other."""
        try:
            yield from self._run_until_failure([('uri', self._check_uri)])
            yield from self._run_until_failure(self._network_steps())
            yield from self._run_until_failure([
                ('libvirt', self._connect),
                ('encryption', self._encryption)])
            if self._settings.pool:
                yield from self._run_until_failure([
                    ('pool', self._look_at_pool)])
            yield from self._run_until_failure([
                ('preflight', self._preflight),
                ('shared storage', self._shared)])
            if not self._failed and not self._site.is_shared:
                yield from self._run_probe()
        finally:
            _close(self._site)

    def _check_uri(self) -> str:
        uri = self._uri.geturl()
        access.check_uri(uri)
        return uri

    def _network_steps(self) -> list[Step]:
        if not self._name:
            return []
        steps: list[Step] = [('name', self._resolve)]
        if self._port:
            steps.append(('port', self._reach))
        if self._transport == 'tls':
            steps += [('client certificate', self._own_certificate),
                      ('server certificate', self._its_certificate)]
        return steps

    def _resolve(self) -> str:
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(
                self._name, None, type=socket.SOCK_STREAM)}
        except OSError as error:
            raise Problem(
                f'{self._name} has no address: {error.strerror}',
                'Check the name in DNS or /etc/hosts, and its '
                '[libvirt]migration_inbound_addr')
        return ', '.join(sorted(found))

    def _reach(self) -> str:
        try:
            _reach(self._name, self._port)
        except ConnectionRefusedError:
            raise self._no_listener()
        except OSError as error:
            raise Problem(
                f'{self._name} does not answer on port {self._port}: {error}',
                'Check the network, and the firewall on both hosts')
        return f'{self._port} is open'

    def _no_listener(self) -> Problem:
        reason = f'nothing listens on port {self._port} of {self._name}'
        if self._transport != 'tls':
            return Problem(reason, 'Start libvirtd-tcp.socket there, or '
                           'libvirtd with --listen')
        remedy = ('Start libvirtd-tls.socket there (virtproxyd-tls.socket '
                  'with modular daemons), or without systemd libvirtd with '
                  '--listen')
        try:
            _reach(self._name, PORTS['tcp'])
        except OSError:
            return Problem(reason, remedy)
        return Problem(
            f'{reason}, only on {PORTS["tcp"]}, which is not encrypted',
            f'{remedy} and listen_tls = 1')

    def _own_certificate(self) -> str:
        certificate = certificates.read(self._files.certificate)
        return _check_expiry(certificate, self._files.certificate,
                             'Give this host a new one')

    def _its_certificate(self) -> str:
        host = certificates.Peer(self._name, self._port, self._files)
        certificate = host.fetch()
        host.verify(certificate)
        return _check_expiry(
            certificate, 'servercert.pem there',
            'Give it a new servercert.pem, and restart libvirt there')

    @property
    def _files(self) -> certificates.Files:
        parameters = dict(access.parameters(self._uri.geturl()))
        return certificates.find_files(parameters.get('pkipath'))

    def _connect(self) -> str:
        self._site.connect()
        self._connection = self._site.daemon.connection
        version = self._connection.getLibVersion()
        there, here = map(versionutils.convert_version_to_str, (
            version, self._source.version))
        return f'version {there} there, {here} here'

    def _encryption(self) -> str:
        weakness = access.weakness(self._uri.geturl())
        # Over tcp it is if the host asks for a SASL mechanism that encrypts.
        if weakness is None or self._connection.isEncrypted():
            return f'{self._transport}, encrypted'
        raise Problem(
            f'{self._transport} {weakness}', access.WEAKNESS_REMEDY, WARN)

    def _look_at_pool(self) -> str:
        return _describe(storage_pool.Pool.lookup(
            self._connection, self._settings.pool or ''))

    def _preflight(self) -> str:
        needed = max(self._size, PROBE_BYTES)
        with self._stand_in():
            self._site.check(
                self._places, self._places.uuid, {self._place: needed})
        return (f'nothing is in the way of a server, '
                f'{_readable(self._site.room(self._place))} free')

    @contextlib.contextmanager
    def _stand_in(self) -> ty.Iterator[None]:
        """Files on this host as those of a server.

        The destination sees them if both hosts share the storage.
        """
        with contextlib.ExitStack() as stack:
            try:
                os.mkdir(self._places.directory)
                stack.callback(os.rmdir, self._places.directory)
                if self._source.pool is not None:
                    stack.enter_context(tempfile.NamedTemporaryFile(
                        prefix=self._places.prefix,
                        dir=self._places.pool_path))
            except OSError as error:
                raise Problem(
                    f'{error.filename} cannot be made here: {error.strerror}',
                    DIRECTORY_REMEDY) from error
            yield

    def _shared(self) -> str:
        if self._settings.pool and self._source.pool is None:
            raise Problem('unknown, as this host has no pool',
                          'Correct what is said about the pool of this host',
                          WARN)
        if self._site.is_shared:
            pool = 'pool and ' if self._settings.pool else ''
            return f'{pool}instance directories, nothing will be copied'
        return 'none, disks will be copied'

    def _run_probe(self) -> ty.Iterator[Finding]:
        """Look what becomes of a volume, and delete it in any case."""
        try:
            yield self._try('probe copy', self._probe, PROBE_SECONDS)
        finally:
            removal = self._try('probe copy', self._remove_probe)
            if removal.status != OK:
                yield removal

    def _probe(self) -> str:
        """Copy a file as a migration does: under a claim."""
        prefix = ('' if self._place == layout.DIRECTORY else
                  self._places.prefix)
        file = layout.File(f'{prefix}disk', self._place, '')
        self._site.claim()
        volume = self._site.create(file, PROBE_BYTES).libvirt_volume
        source = stream.MemorySource(os.urandom(PROBE_BYTES))
        result = stream.copy(
            source, stream.VolumeSink(volume, length=PROBE_BYTES),
            PROBE_BYTES)
        self._site.verify(file, PROBE_BYTES)
        stream.compare(source, volume, PROBE_BYTES)
        speed = PROBE_BYTES / result.seconds
        text = (f'{PROBE_BYTES // units.Mi} MiB written at '
                f'{speed / units.Mi:.0f} MiB/s, read back, deleted')
        if self._size:
            limit = self._settings.bandwidth or speed
            text += (f'; {_readable(self._size)} take about '
                     f'{_duration(self._size / min(speed, limit))}')
        return text

    def _remove_probe(self) -> str:
        try:
            self._site.discard()
        except Exception as error:
            raise Problem(
                f'files of {self._places.uuid} are left there: {error}',
                f'On {self.host}, delete the directory '
                f'{self._places.directory}, and what begins with this UUID in '
                'the same directory'
                + (f' and in pool {self._settings.pool}'
                   if self._settings.pool else ''))
        return 'deleted'


@contextlib.contextmanager
def _marker(path: str) -> ty.Iterator[str | None]:
    """A new file in a directory of this host, if this user may make one."""
    try:
        file = tempfile.NamedTemporaryFile(prefix='nova-check-', dir=path)
    except OSError:
        yield None
        return
    with file:
        yield os.path.basename(file.name)


def _check_expiry(certificate: ty.Any, name: str, remedy: str) -> str:
    days = certificates.days_left(certificate)
    text = f'{name} ({certificates.describe(certificate)})'
    if days < 0:
        raise Problem(f'{text} expired', remedy)
    if days < EXPIRY_DAYS:
        raise Problem(f'{text} expires in {days} days', remedy, WARN)
    return text


def _describe(pool: storage_pool.Pool) -> str:
    return (f'{pool.name} is active, in {pool.path}, owner '
            f'{pool.permissions.owner}:{pool.permissions.group}, mode '
            f'{pool.permissions.mode:04o}')


def _readable(size: int) -> str:
    if size < units.Gi:
        return f'{size // units.Mi} MiB'
    return f'{size / units.Gi:.1f} GiB'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes} min {seconds} s'


def _reach(host: str, port: int) -> None:
    """Connect to a port.

    :raises: OSError
    """
    socket.create_connection((host, port), certificates.TIMEOUT).close()


def _close(connection: ty.Any) -> None:
    # The step before has reported a connection that hangs: go on.
    if connection is not None:
        with contextlib.suppress(TimeoutError):
            threads.within(STEP_SECONDS, connection.close)
