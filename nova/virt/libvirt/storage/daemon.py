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

"""One libvirt daemon, of this host or of another one.

Every call here may block, with a bound. Under eventlet call it through
:func:`threads.off_hub`.
"""

import contextlib
import typing as ty
import weakref

from oslo_utils import versionutils

import nova.conf
from nova.conf import storage_migrate  # noqa: F401 (registers the options)
from nova.virt.libvirt.storage import access
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt.storage.threads import libvirt

CONF = nova.conf.CONF

# Sparse streams through split daemons looped for ever before.
MIN_LIBVIRT_VERSION = 8_000_000

# A lost connection is noticed after about interval * (count + 1) seconds. A
# daemon that only pauses has to survive that: nothing else is lost if a copy
# waits half a minute.
KEEPALIVE_COUNT = 5

# Methods that ask no daemon, and are called too often to have a thread of
# their own.
_LOCAL = frozenset(['connect', 'isAlive', 'name', 'newStream'])

# The thread of a call that got no answer in time, by URI. It holds a worker of
# the daemon, which has 20 or so, until the daemon answers.
_unanswered: dict[str, ty.Any] = {}


OWES_ANSWER = 'an earlier call has got no answer yet'

# How long to wait for the end of a connection to a daemon that hangs, seconds.
CLOSE_SECONDS = 0.5

# Transports that are a TCP connection of this process. Such a connection that
# the kernel or the other side has ended carries nothing any more; one that
# this side has closed may do so for minutes.
_DIRECT = ('tls', 'tcp')


class Daemon:
    """A connection to the libvirt daemon of a host.

    :ivar host: address of the host
    :ivar uri: its libvirt URI
    :ivar patience: seconds for which to wait for a host that is silent, or
        cannot be connected to any more
    :ivar is_patient: whether nobody else has to wait meanwhile: a server that
        is off waits no longer than for a daemon that hangs
    """

    def __init__(self, host: str, uri: str):
        self.host = host
        self.uri = uri
        self.patience = 0
        self.is_patient = False
        self._connection: Bounded | None = None
        # The connection of a copy is often found dead before the other one.
        self._is_lost = False
        # Whether this side has closed one over which something went wrong.
        self._has_given_up = False

    @property
    def connection(self) -> 'Bounded':
        """The connection, once open."""
        if self._connection is None:
            raise errors.StorageError('the connection is closed')
        return self._connection

    def connect(self) -> None:
        """Connect to the daemon, and check its version.

        :raises: StorageError if the daemon refuses or does not answer
        """
        self.close()
        self._is_lost = self._has_given_up = False
        self._connection = self._open()
        version = self.version()
        if version < MIN_LIBVIRT_VERSION:
            has, needs = map(versionutils.convert_version_to_str, (
                version, MIN_LIBVIRT_VERSION))
            raise errors.Refused(
                f'its libvirt is version {has}', f'Install {needs} or later.')

    def version(self) -> int:
        """The version of the host's libvirt, such as 9000000 for 9.0.0."""
        return self.connection.getLibVersion()

    def has_domain(self, uuid: str) -> bool:
        """Whether the host has a domain, as far as can be known.

        A storage driver alone, as in storage+tls://, knows no domains.
        """
        return self._find_domain('lookupByUUIDString', uuid) is not None

    def domain_state(self, uuid: str) -> int | None:
        """The virDomainState of a domain, None if the host has none.

        :raises: libvirtError, TimeoutError; also if the daemon knows no
            domains
        """
        try:
            return self.connection.lookupByUUIDString(uuid).state()[0]
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return None

    def named_domain(self, name: str) -> str | None:
        """The uuid of the domain that has a name, None if there is none."""
        domain = self._find_domain('lookupByName', name)
        return domain and domain.UUIDString()

    def _find_domain(self, lookup: str, key: str) -> ty.Any:
        try:
            return getattr(self.connection, lookup)(key)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (
                    libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_SUPPORT):
                raise
            return None

    @contextlib.contextmanager
    def writing(self, path: str) -> ty.Iterator['libvirt.virStorageVol']:
        """A volume on a connection of its own, to write to it.

        The connection has no keepalive yet: with one libvirt wakes up the
        process's event loop for each 16 KiB sent, 0.8 s of CPU per GiB.

        :param path: of the volume
        :raises: StorageError if the daemon refuses or does not answer
        """
        connection = self._open(keepalive=False)
        has_failed = True
        try:
            yield connection.storageVolLookupByPath(path)
            has_failed = False
        finally:
            # Closing the connection sends one more request, possibly late if
            # a traceback keeps it alive: have keepalive bound it.
            self.begin_keepalive(connection)
            self._is_lost = not connection.isAlive()
            self._has_given_up = has_failed and not self._is_lost
            connection.close(is_urgent=has_failed)

    def begin_keepalive(self, connection: 'libvirt.virConnect') -> None:
        """Start the keepalive of a connection that may have it, or be lost.

        Whoever uses the connection finds out whether it is.
        """
        with contextlib.suppress(libvirt.libvirtError, TimeoutError):
            self.start_keepalive(connection)

    def start_keepalive(self, connection: 'libvirt.virConnect') -> None:
        """Have libvirt end a connection once the host is silent for too long.

        With patience all that waits for the host has to give up before that:
        see may_reconnect().
        """
        start_keepalive(connection, self.patience and max(
            self.patience, _stall_seconds()))

    def may_reconnect(self, error: BaseException) -> bool:
        """Whether an error is that a connection was lost, and nothing else.

        A connection must not be replaced if this side has closed it: the
        system may still deliver what was sent over it, to a file that has
        been written otherwise since then. So only a connection counts as lost
        that the other side or the system has ended, and this side closes none
        before what waits for an answer has given up.
        """
        if not self.patience or self._has_given_up or (
                access.transport(self.uri) not in _DIRECT):
            return False
        return isinstance(error, errors.Unreachable) or (
            isinstance(error, (libvirt.libvirtError, errors.CopyError)) and
            not self.is_connected())

    def probe(self) -> None:
        """Connect to the daemon and end the connection again.

        :raises: StorageError
        """
        self._open().close()

    def is_connected(self) -> bool:
        """Whether the connections still stand, as far as is known."""
        return (self._connection is not None and not self._is_lost and
                bool(self._connection.isAlive()))

    def close(self) -> None:
        """Close the connection to the daemon."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self, keepalive: bool = True) -> 'Bounded':
        try:
            connection = open_connection(
                self.uri, False, self.answer_seconds)
            if keepalive:
                self.start_keepalive(connection)
            return connection
        except (libvirt.libvirtError, TimeoutError) as error:
            kind = errors.Unreachable if _may_pass(error) else (
                errors.StorageError)
            raise kind(f'cannot connect: {access.cause(error)}',
                       access.remedy(error)) from error

    def answer_seconds(self) -> int:
        """How long an answer may take."""
        return max(_stall_seconds(), self.reconnect_seconds())

    def reconnect_seconds(self) -> int:
        """How long to try to connect again."""
        return (self.patience if self.is_patient else
                min(self.patience, _stall_seconds()))


def _may_pass(error: Exception) -> bool:
    """Whether another attempt to connect may succeed."""
    return isinstance(error, TimeoutError) or (
        ty.cast(ty.Any, error).get_error_code() in (
            libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INTERNAL_ERROR,
            libvirt.VIR_ERR_RPC))


def _stall_seconds() -> int:
    return CONF.libvirt.vol_upload_migration_stall_timeout


def open_connection(
    uri: str, keepalive: bool = True,
    answer_seconds: ty.Callable[[], float] = _stall_seconds,
) -> 'Bounded':
    """Open a connection to a libvirt daemon that may be gone, or hang.

    Credentials for SASL come from libvirt's auth.conf, or from the Kerberos
    ticket; nobody is asked for any.

    :param keepalive: whether to start the keepalive of the connection
    :param answer_seconds: tells how long an answer may take
    :raises: libvirtError if the daemon refuses
    :raises: TimeoutError if it does not answer, then or later
    """
    credentials = [
        libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_ECHOPROMPT,
        libvirt.VIR_CRED_REALM, libvirt.VIR_CRED_PASSPHRASE,
        libvirt.VIR_CRED_NOECHOPROMPT, libvirt.VIR_CRED_EXTERNAL]
    auth = [credentials, lambda creds, opaque: -1, None]
    if _hangs(uri):
        raise TimeoutError(OWES_ANSWER)
    # A host that is down would cost what the kernel allows, minutes. An
    # attempt that is given up holds no worker of a daemon.
    connection = Bounded(
        threads.within(
            CONF.libvirt.vol_upload_migration_connect_timeout,
            lambda: libvirt.openAuth(uri, auth, 0)),
        uri, answer_seconds)
    if keepalive:
        start_keepalive(connection)
    return connection


def start_keepalive(connection: 'libvirt.virConnect',
                    seconds: int = 0) -> None:
    """Have libvirt end a connection that was lost.

    :param seconds: for which the connection may be silent, if that is longer
        than KEEPALIVE_COUNT makes it
    """
    interval = CONF.libvirt.vol_upload_migration_keepalive_interval
    connection.setKeepAlive(
        interval, max(KEEPALIVE_COUNT, seconds // interval + 2))


def _ask(
    uri: str, seconds: float, function: ty.Callable[[], ty.Any],
) -> ty.Any:
    """Ask a daemon something, but not one that still owes an answer.

    libvirt cannot take a request back. Each that is given up keeps a thread
    here and a worker there, and a daemon without workers answers nobody.

    :raises: TimeoutError
    """
    if _hangs(uri):
        raise TimeoutError(OWES_ANSWER)
    try:
        return threads.within(seconds, function)
    except threads.NoAnswer as error:
        _unanswered[uri] = error.thread
        raise


def _hangs(uri: str) -> bool:
    """Whether a daemon still owes an answer that was given up."""
    thread = _unanswered.get(uri)
    return thread is not None and thread.is_alive()


class Bounded:
    """A connection of libvirt's, or a pool or volume of it, with a bound.

    A call that asks the daemon raises TimeoutError if the answer takes too
    long. The request may still take effect later.

    The keepalive of a connection ends the wait for a daemon that is gone. A
    daemon that hangs, on a disk for example, still answers the keepalive.
    libvirt cannot take a request back, and closing the connection does not
    end it either.

    Streams are not wrapped: the copy watches them, and a thread for each chunk
    would cost more than the chunk.
    """

    def __init__(
        self, wrapped: ty.Any, uri: str, seconds: ty.Callable[[], float],
        family: 'weakref.WeakSet[Bounded] | None' = None,
    ):
        """Bound every wait.

        :param wrapped: libvirt's object
        :param uri: of the daemon
        :param seconds: tells how long an answer may take
        :param family: of all objects of the connection
        """
        self._wrapped = wrapped
        self._uri = uri
        self._seconds = seconds
        self._family: weakref.WeakSet[Bounded] = (
            weakref.WeakSet() if family is None else family)
        self._family.add(self)

    def close(self, is_urgent: bool = False) -> None:
        """Close the connection; give it up if that takes too long.

        :param is_urgent: whether not to wait for a daemon that is silent

        Its pools and volumes cannot be used any more: libvirt keeps a
        connection open as long as there is one of them, and freeing the last
        waits for the daemon.
        """
        # Do not wait for a daemon that is known to hang. This request is not
        # counted as one: no connection is opened while the daemon hangs.
        seconds = (CLOSE_SECONDS if is_urgent or _hangs(self._uri) else
                   self._seconds())
        with contextlib.suppress(TimeoutError):
            threads.within(seconds, self._free)

    def _free(self) -> None:
        connection = self._wrapped
        for each in list(self._family):
            each._wrapped = None
        connection.close()

    def __getattr__(self, name: str) -> ty.Any:
        attribute = getattr(self._wrapped, name)
        if not callable(attribute) or name == 'newStream':
            return attribute

        def ask(*args: ty.Any) -> ty.Any:
            # Look it up by name: no frame of an error then keeps an object of
            # libvirt's.
            return getattr(self._wrapped, name)(*args)

        def call(*args: ty.Any) -> ty.Any:
            if name in _LOCAL:
                return self._wrap(ask(*args))
            return self._wrap(
                _ask(self._uri, self._seconds(), lambda: ask(*args)))

        return call

    def _wrap(self, result: ty.Any) -> ty.Any:
        if isinstance(result, list):
            return [self._wrap(each) for each in result]
        if result is None or isinstance(result, (int, str, tuple, dict)):
            return result
        return Bounded(result, self._uri, self._seconds, self._family)
