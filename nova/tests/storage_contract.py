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

"""What the code relies on in libvirt's storage API, as tests.

The tests run on the fake in ``unit`` and on the lab's daemons in ``live``, so
that the fake behaves as libvirt does.
"""

import errno
import struct
import time
import typing as ty

import libvirt
from lxml import etree

UNIT = 64 * 1024
MESSAGE_MAX = 262120
RAW = libvirt.VIR_STORAGE_VOL_FILE

SPARSE_DOWNLOAD = libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM
SPARSE_UPLOAD = libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM
STOP_AT_HOLE = libvirt.VIR_STREAM_RECV_STOP_AT_HOLE
PHYSICAL = libvirt.VIR_STORAGE_VOL_GET_PHYSICAL

UUID = 'ac91fc3b-44d3-4b3c-b7ea-7ebd8c1b8f0e'

VOLUME = """\
<volume type='{type}'>
  <name>{name}</name>
  <capacity unit='bytes'>{size}</capacity>
  <allocation>0</allocation>
  <target>
    <format type='{format}'/>
    <permissions>
      <mode>{mode}</mode><owner>{owner}</owner><group>{group}</group>
    </permissions>
  </target>
</volume>
"""

POOL = """\
<pool type='dir'>
  <name>{name}</name>
  <target>
    <path>{path}</path>
    <permissions>
      <mode>{mode}</mode><owner>1234</owner><group>1235</group>
    </permissions>
  </target>
</pool>
"""


LOGICAL_POOL = """\
<pool type='logical'>
  <name>{name}</name>
  <source><name>{group}</name></source>
  <target><path>/dev/{group}</path></target>
</pool>
"""

LOGICAL_VOLUME = """\
<volume>
  <name>{name}</name>
  <capacity unit='bytes'>{size}</capacity>
  <allocation unit='bytes'>{size}</allocation>
  <target><permissions><mode>0660</mode></permissions></target>
</volume>
"""

# A qcow2 header that names a backing file. A guest may write one.
HOSTILE = struct.pack('>4sIQIIQ', b'QFI\xfb', 3, 512, 10, 16, 1 << 40).ljust(
    512, b'\0') + b'/proc/kmsg'
EXTENT = 4 * 1024 ** 2


class Contract:
    """Helpers for the tests of a pool.

    :ivar connection: connection to the host
    :ivar pool: the pool
    :ivar path: path of the pool's directory
    """
    connection: ty.Any
    pool: ty.Any
    path: str

    def put_file(self, path: str, data: bytes) -> None:
        """Write a file of the host without libvirt."""
        raise NotImplementedError

    def get_file(self, path: str) -> bytes | None:
        """Read a file of the host without libvirt; None if there is none."""
        raise NotImplementedError

    def fill_up(self, free: int) -> None:
        """Leave so many bytes free where the pool is."""
        raise NotImplementedError

    def begin_job(self) -> None:
        """Have the daemon do something with the pool in the background."""
        raise NotImplementedError

    # Helpers.

    def create(self, name: str, size: int = 8 * UNIT, format: str = 'raw',
               mode: str = '0640', owner: int = 0, group: int = 0) -> ty.Any:
        return self.pool.createXML(VOLUME.format(
            type='dir' if format == 'dir' else 'file', name=name, size=size,
            format=format, mode=mode, owner=owner, group=group))

    def create_from(self, name: str, picture: str) -> ty.Any:
        """Create a volume with the content of a picture."""
        volume = self.create(name, len(picture) * UNIT)
        self.upload(volume, picture, flags=SPARSE_UPLOAD)
        return volume

    def upload(self, volume: ty.Any, picture: str, offset: int = 0,
               length: int | None = None, flags: int = 0) -> None:
        """Upload a picture, and wait for the refresh that follows."""
        stream = self.begin_upload(
            volume, offset,
            len(picture) * UNIT if length is None else length, flags)
        for char in picture:
            if char == '-':
                stream.sendHole(UNIT)
            else:
                self.send(stream, char)
        stream.finish()
        self.refresh()

    def begin_upload(self, volume: ty.Any, offset: int, length: int,
                     flags: int = 0) -> ty.Any:
        stream = self.connection.newStream(0)
        volume.upload(stream, offset, length, flags)
        return stream

    def send(self, stream: ty.Any, char: str) -> None:
        self.assertEqual(UNIT, stream.send(char.encode() * UNIT))

    def receive(self, volume: ty.Any, offset: int = 0, length: int = 0,
                flags: int = SPARSE_DOWNLOAD) -> list[tuple[str, int]]:
        """Download: ('-' or a character, bytes) of all runs."""
        stream = self.connection.newStream(0)
        volume.download(stream, offset, length, flags)
        runs: list[tuple[str, int]] = []
        while data := stream.recvFlags(4096, STOP_AT_HOLE):
            run = (('-', stream.recvHole()) if data == -3 else
                   (chr(data[0]), len(data)))
            if runs and runs[-1][0] == run[0]:
                run = (run[0], run[1] + runs.pop()[1])
            runs.append(run)
        stream.finish()
        return runs

    def refresh(self) -> None:
        """Refresh the pool, once the daemon has done so after an upload."""
        deadline = time.monotonic() + 10
        while True:
            try:
                self.pool.refresh()
                return
            except libvirt.libvirtError as error:
                self.assertEqual(
                    libvirt.VIR_ERR_INTERNAL_ERROR, error.get_error_code())
                self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)

    def assert_error(self, code: int, function: ty.Callable,
                     *args: ty.Any) -> libvirt.libvirtError:
        # On a stock host it is not testtools that returns the error.
        try:
            function(*args)
        except libvirt.libvirtError as error:
            self.assertEqual(code, error.get_error_code(), str(error))
            return error
        self.fail('no error')

    def assert_content(self, picture: str, name: str = 'disk') -> None:
        data = self.get_file(f'{self.path}/{name}')
        self.assertIsNotNone(data)
        units = [data[start:start + UNIT]
                 for start in range(0, len(data), UNIT)]
        self.assertEqual(picture, ''.join(
            chr(unit[0]) if any(unit) else '-' for unit in units))
        self.assertEqual({UNIT}, {unit.count(unit[0]) for unit in units})

    def xml(self, volume: ty.Any, tag: str) -> ty.Any:
        return etree.fromstring(volume.XMLDesc(0)).find(tag)


class StorageContract(Contract):
    """Tests for a host with a persistent, active pool that is empty.

    The pool is a directory.
    """

    # Downloads.

    def test_receives_may_be_short(self):
        volume = self.create_from('disk', 'ABCDEFGH')
        stream = self.connection.newStream(0)
        volume.download(stream, 0, 0, 0)

        sizes = []
        while data := stream.recv(MESSAGE_MAX):
            sizes.append(len(data))
        stream.finish()

        self.assertEqual(8 * UNIT, sum(sizes))
        self.assertGreaterEqual(len(sizes), 3)

    def test_holes_stop_a_sparse_download(self):
        volume = self.create_from('disk', 'A--BC-')

        self.assertEqual(
            [('A', UNIT), ('-', 2 * UNIT), ('B', UNIT), ('C', UNIT),
             ('-', UNIT)], self.receive(volume))

    def test_holes_of_other_downloads_are_zeros(self):
        volume = self.create_from('disk', 'A-B')

        self.assertEqual(
            [('A', UNIT), ('\0', UNIT), ('B', UNIT)],
            self.receive(volume, flags=0))

    def test_download_of_a_range(self):
        volume = self.create_from('disk', 'AB--CD')

        self.assertEqual([('B', UNIT), ('-', UNIT)],
                         self.receive(volume, UNIT, 2 * UNIT))
        self.assertEqual([('-', UNIT), ('C', UNIT)],
                         self.receive(volume, 3 * UNIT, 2 * UNIT))

    def test_download_of_length_0_has_no_limit(self):
        volume = self.create_from('disk', 'A-B')

        self.assertEqual([('-', UNIT), ('B', UNIT)],
                         self.receive(volume, UNIT, 0))

    def test_download_of_more_than_there_is_ends_early(self):
        volume = self.create_from('disk', 'AB')

        self.assertEqual([('B', UNIT)], self.receive(volume, UNIT, 3 * UNIT))

    # Uploads.

    def test_sparse_upload_leaves_holes(self):
        volume = self.create_from('disk', 'A--B--')

        self.assert_content('A--B--')
        self.assertEqual(
            [('A', UNIT), ('-', 2 * UNIT), ('B', UNIT), ('-', 2 * UNIT)],
            self.receive(volume))
        self.assertLess(volume.info()[2], 4 * UNIT)

    def test_sparse_upload_to_a_range_that_ends_in_a_hole_truncates(self):
        volume = self.create_from('disk', 'AAAAAA')

        self.upload(volume, 'B-', UNIT, flags=SPARSE_UPLOAD)

        # The hole does not even become one: it is lseek() and ftruncate().
        self.assert_content('ABA')

    def test_sparse_upload_to_a_range_that_ends_in_data_spares_the_rest(self):
        volume = self.create_from('disk', 'AAAAAA')

        self.upload(volume, 'BB', UNIT, flags=SPARSE_UPLOAD)

        self.assert_content('ABBAAA')

    def test_sparse_upload_that_goes_on_where_another_one_ended(self):
        """An upload may end before the length that it announced."""
        volume = self.create('disk', 6 * UNIT)

        self.upload(volume, 'A-B', 0, 6 * UNIT, flags=SPARSE_UPLOAD)
        self.upload(volume, '-C-', 3 * UNIT, flags=SPARSE_UPLOAD)

        self.assert_content('A-B-C-')
        self.assertLess(volume.info()[2], 4 * UNIT)

    def test_other_upload_to_a_range_spares_the_rest(self):
        volume = self.create_from('disk', 'AAAAAA')

        self.upload(volume, 'BC', UNIT)

        self.assert_content('ABCAAA')

    def test_other_upload_takes_no_holes(self):
        stream = self.begin_upload(self.create('disk'), 0, UNIT)

        self.assertRaises(libvirt.libvirtError, stream.sendHole, UNIT)

    def test_upload_of_length_0_has_no_limit(self):
        volume = self.create('disk', UNIT)

        self.upload(volume, 'ABC', length=0)

        self.assert_content('ABC')

    def test_upload_of_more_than_announced_fails_late(self):
        volume = self.create('disk', 4 * UNIT)
        stream = self.begin_upload(volume, 0, UNIT)

        self.assert_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, self.send_until_refused, stream, 4)

    def send_until_refused(self, stream: ty.Any, count: int) -> None:
        """Send, and finish: an error comes with a later call."""
        self.send(stream, 'a')
        for _index in range(count - 1):
            stream.send(b'a' * UNIT)
        stream.finish()

    def test_full_disk_is_reported_late(self):
        volume = self.create('disk', 64 * UNIT)
        self.fill_up(2 * UNIT)
        stream = self.begin_upload(volume, 0, 64 * UNIT)

        error = self.assert_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, self.send_until_refused, stream, 64)
        self.assertEqual(errno.ENOSPC, error.get_int1())

    def test_volume_that_is_deleted_during_an_upload(self):
        volume = self.create('disk', 2 * UNIT)
        stream = self.begin_upload(volume, 0, 2 * UNIT)
        self.send(stream, 'A')

        volume.delete()
        self.send(stream, 'B')
        stream.finish()

        self.refresh()
        self.assertIsNone(self.get_file(f'{self.path}/disk'))
        self.assert_error(libvirt.VIR_ERR_NO_STORAGE_VOL,
                          self.pool.storageVolLookupByName, 'disk')

    def test_pool_that_is_destroyed_during_an_upload(self):
        volume = self.create('disk', 2 * UNIT)
        stream = self.begin_upload(volume, 0, 2 * UNIT)
        self.send(stream, 'A')

        self.pool.destroy()
        self.send(stream, 'B')
        stream.finish()

        self.assert_content('AB')
        self.assertFalse(self.pool.isActive())
        self.pool.create()

    def test_aborted_upload_leaves_what_came(self):
        volume = self.create('disk', 2 * UNIT)
        stream = self.begin_upload(volume, 0, 2 * UNIT)
        self.send(stream, 'A')

        stream.abort()

        self.refresh()
        self.assertEqual(2 * UNIT, volume.infoFlags(PHYSICAL)[2])
        self.assertRaises(libvirt.libvirtError, stream.send, b'B')

    def test_stream_ends_once(self):
        stream = self.begin_upload(self.create('disk'), 0, UNIT)
        stream.finish()

        self.assertRaises(libvirt.libvirtError, stream.send, b'B')
        self.assertRaises(libvirt.libvirtError, stream.finish)
        self.assertRaises(libvirt.libvirtError, stream.abort)

    def test_refresh_and_destroy_are_refused_during_a_job(self):
        self.begin_job()

        for method in self.pool.refresh, self.pool.destroy:
            self.assert_error(libvirt.VIR_ERR_INTERNAL_ERROR, method)

    # Volumes.

    def test_raw_volume_is_a_hole_of_its_size(self):
        volume = self.create('disk', 3 * UNIT + 5)

        self.assertEqual([RAW, 3 * UNIT + 5, 0], volume.info())
        self.assertEqual(3 * UNIT + 5, volume.infoFlags(PHYSICAL)[2])
        self.assertEqual(bytes(3 * UNIT + 5),
                         self.get_file(f'{self.path}/disk'))
        self.assertEqual(f'{self.path}/disk', volume.path())
        self.assertEqual('disk', volume.name())

    def test_qcow2_volume_has_a_header(self):
        volume = self.create('disk', 1 << 30, 'qcow2')

        self.assertEqual([RAW, 1 << 30], volume.info()[:2])
        self.assertLess(volume.infoFlags(PHYSICAL)[2], 1 << 20)
        self.assertEqual(b'QFI\xfb', self.get_file(f'{self.path}/disk')[:4])
        self.assertEqual(
            'qcow2', self.xml(volume, 'target/format').get('type'))

    def test_permissions_are_those_of_the_xml(self):
        volume = self.create('disk', mode='0640', owner=1234, group=1235)

        permissions = self.xml(volume, 'target/permissions')
        self.assertEqual(0o640, int(permissions.findtext('mode'), 8))
        self.assertEqual('1234', permissions.findtext('owner'))
        self.assertEqual('1235', permissions.findtext('group'))

    def test_format_is_probed_by_a_refresh(self):
        """Until then it is what was asked for."""
        self.put_file(f'{self.path}/header', b'')
        header = self.get_file(f'{self.path}/' + self.create(
            'image', UNIT, 'qcow2').name())
        volume = self.create('disk', len(header))
        stream = self.begin_upload(volume, 0, len(header))
        self.assertEqual(
            'raw', self.xml(volume, 'target/format').get('type'))
        sent = 0
        while sent < len(header):
            sent += stream.send(header[sent:])
        stream.finish()

        self.refresh()

        self.assertEqual(
            'qcow2', self.xml(volume, 'target/format').get('type'))
        self.assertEqual(UNIT, volume.info()[1])

    def test_name_that_is_taken(self):
        self.create('disk')

        self.assert_error(
            libvirt.VIR_ERR_STORAGE_VOL_EXIST, self.create, 'disk')

    def test_file_that_the_pool_does_not_know_is_in_the_way(self):
        self.put_file(f'{self.path}/disk', b'precious')

        self.assert_error(
            libvirt.VIR_ERR_OPERATION_INVALID, self.create, 'disk')

        self.assertEqual(b'precious', self.get_file(f'{self.path}/disk'))

    def test_refresh_finds_files_and_forgets_them(self):
        self.put_file(f'{self.path}/disk', b'x' * 5)
        self.assertEqual([], self.pool.listVolumes())

        self.refresh()

        self.assertEqual(['disk'], self.pool.listVolumes())
        volume, = self.pool.listAllVolumes()
        self.assertEqual(5, volume.info()[1])

    def test_deleted_volume_is_gone(self):
        volume = self.create('disk')

        volume.delete()

        self.assertIsNone(self.get_file(f'{self.path}/disk'))
        for function in (
                volume.delete, volume.info, volume.XMLDesc,
                lambda: self.pool.storageVolLookupByName('disk'),
                lambda: self.connection.storageVolLookupByPath(
                    f'{self.path}/disk'),
                lambda: self.begin_upload(volume, 0, 1)):
            self.assert_error(libvirt.VIR_ERR_NO_STORAGE_VOL, function)

    def test_directory_is_a_volume(self):
        volume = self.create('vtpm', 0, 'dir', '0711')

        self.refresh()

        self.assertEqual(libvirt.VIR_STORAGE_VOL_DIR, volume.info()[0])
        self.put_file(f'{self.path}/vtpm/state', b'x')
        error = self.assert_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, volume.delete)
        self.assertEqual(errno.ENOTEMPTY, error.get_int1())
        self.assertEqual(b'x', self.get_file(f'{self.path}/vtpm/state'))

    # Pools.

    def test_pool_is_found_by_its_directory_if_it_is_active(self):
        find = self.connection.storagePoolLookupByTargetPath
        self.assertEqual(self.pool.name(), find(self.path).name())
        self.assertEqual(self.pool.name(), find(self.path + '/').name())

        self.pool.destroy()

        self.assert_error(libvirt.VIR_ERR_NO_STORAGE_POOL, find, self.path)
        self.pool.create()

    def test_second_pool_of_a_directory_is_refused(self):
        xml = POOL.format(name='second', path=self.path, mode='0755')

        for function in (self.connection.storagePoolCreateXML,
                         self.connection.storagePoolDefineXML):
            self.assert_error(libvirt.VIR_ERR_OPERATION_FAILED, function, xml)

    def test_name_of_a_pool_that_is_taken(self):
        xml = POOL.format(
            name=self.pool.name(), path=self.path + '2', mode='0755')

        self.assert_error(libvirt.VIR_ERR_OPERATION_FAILED,
                          self.connection.storagePoolCreateXML, xml)

    def test_transient_pool_makes_its_directory_and_is_gone_at_its_end(self):
        name = self.pool.name() + '-transient'
        path = f'{self.path}/nested'
        pool = self.connection.storagePoolCreateXML(
            POOL.format(name=name, path=path, mode='0750'),
            libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD)

        permissions = self.xml(pool, 'target/permissions')
        self.assertEqual(
            ('1234', '1235', 0o750), (
                permissions.findtext('owner'), permissions.findtext('group'),
                int(permissions.findtext('mode'), 8)))
        self.assertFalse(pool.isPersistent())
        self.assertTrue(self.pool.isPersistent())
        self.assertRaises(libvirt.libvirtError, pool.setAutostart, 1)

        pool.destroy()

        self.assert_error(libvirt.VIR_ERR_NO_STORAGE_POOL,
                          self.connection.storagePoolLookupByName, name)
        self.assert_error(libvirt.VIR_ERR_NO_STORAGE_POOL, pool.refresh)

    def test_transient_pool_of_a_missing_directory_is_refused(self):
        self.assert_no_pool_of('missing', errno.ENOENT)

    def test_transient_pool_of_a_file_is_refused(self):
        self.put_file(f'{self.path}/file', b'content')
        self.assert_no_pool_of('file', errno.ENOTDIR)

    def assert_no_pool_of(self, inner: str, number: int) -> None:
        """The daemon makes no pool of a path, and tells the errno."""
        name = self.pool.name() + '-transient'
        error = self.assert_error(
            libvirt.VIR_ERR_SYSTEM_ERROR,
            self.connection.storagePoolCreateXML, POOL.format(
                name=name, path=f'{self.path}/{inner}', mode='0750'))
        self.assertEqual(number, error.get_int1())
        self.assert_error(libvirt.VIR_ERR_NO_STORAGE_POOL,
                          self.connection.storagePoolLookupByName, name)

    def test_pool_that_is_not_active(self):
        volume = self.create('disk')
        self.pool.destroy()

        for function in (
                self.pool.refresh, self.pool.listVolumes,
                self.pool.listAllVolumes, self.pool.destroy, volume.info,
                lambda: self.pool.storageVolLookupByName('disk'),
                lambda: self.create('other')):
            self.assert_error(libvirt.VIR_ERR_OPERATION_INVALID, function)
        self.assertEqual(libvirt.VIR_STORAGE_POOL_INACTIVE,
                         self.pool.info()[0])

        self.pool.create()
        self.assertEqual(['disk'], self.pool.listVolumes())
        self.assert_error(libvirt.VIR_ERR_OPERATION_INVALID, self.pool.create)

    def test_directory_of_a_pool_is_deleted_only_if_it_is_empty(self):
        path = f'{self.path}/nested'
        pool = self.connection.storagePoolDefineXML(POOL.format(
            name=self.pool.name() + '-nested', path=path, mode='0750'))
        pool.build()
        self.put_file(f'{path}/disk', b'x')

        error = self.assert_error(libvirt.VIR_ERR_SYSTEM_ERROR, pool.delete)

        self.assertEqual(errno.ENOTEMPTY, error.get_int1())
        self.assertEqual(b'x', self.get_file(f'{path}/disk'))
        pool.undefine()

    def test_allocation_counts_as_used(self):
        before = self.pool.info()
        self.create_from('disk', 'A' * 64)

        after = self.pool.info()

        self.assertEqual(before[1], after[1])
        self.assertLessEqual(after[3], before[3] - 32 * UNIT)

    def test_missing_things(self):
        connection = self.connection
        for code, function, name in (
                (libvirt.VIR_ERR_NO_STORAGE_POOL,
                 connection.storagePoolLookupByName, 'missing'),
                (libvirt.VIR_ERR_NO_STORAGE_POOL,
                 connection.storagePoolLookupByTargetPath, '/missing'),
                (libvirt.VIR_ERR_NO_STORAGE_VOL,
                 self.pool.storageVolLookupByName, 'missing'),
                (libvirt.VIR_ERR_NO_STORAGE_VOL,
                 connection.storageVolLookupByPath, f'{self.path}/missing'),
                (libvirt.VIR_ERR_NO_DOMAIN,
                 connection.lookupByUUIDString, UUID),
                (libvirt.VIR_ERR_NO_DOMAIN,
                 connection.lookupByName, 'missing')):
            self.assert_error(code, function, name)

    def test_closed_connection(self):
        self.connection.close()

        self.assert_error(
            libvirt.VIR_ERR_INVALID_CONN, self.connection.isAlive)


class LogicalContract(Contract):
    """Tests for a host with an active pool of a volume group.

    The group has no volumes, extents of LVM's default size, and 16 of them at
    least, which are full of OLD from the second on.

    :ivar group: name of the group
    """
    group: str
    OLD = 0xa5

    def make(self, name: str = 'disk', size: int = 2 * EXTENT) -> ty.Any:
        return self.pool.createXML(
            LOGICAL_VOLUME.format(name=name, size=size))

    def read(self, start: int, length: int, name: str = 'disk') -> bytes:
        data = self.get_file(f'/dev/{self.group}/{name}')
        self.assertIsNotNone(data)
        return data[start:start + length]

    def test_volume_is_a_device_of_whole_extents(self):
        volume = self.make(size=EXTENT + 1)

        self.assertEqual(2 * EXTENT, volume.infoFlags(PHYSICAL)[2])
        self.refresh()
        self.assertEqual(
            [libvirt.VIR_STORAGE_VOL_BLOCK, 2 * EXTENT, 2 * EXTENT],
            volume.info())
        self.assertEqual(f'/dev/{self.group}/disk', volume.path())
        self.assertEqual(
            'disk', self.connection.storageVolLookupByPath(
                volume.path()).name())

    def test_key_of_a_volume_is_its_own(self):
        first, second = self.make('disk'), self.make('disk2')
        key = first.key()

        self.assertNotIn(key, (second.key(), first.path()))
        self.refresh()
        self.assertEqual(
            key, self.pool.storageVolLookupByName('disk').key())
        first.delete()
        self.assertNotEqual(key, self.make('disk').key())

    def test_new_volume_shows_what_was_on_the_disk(self):
        self.make()

        self.assertEqual(
            {self.OLD}, set(self.read(EXTENT + UNIT, EXTENT - UNIT)))

    def test_hole_of_an_upload_is_written_as_zeros(self):
        volume = self.make()

        self.upload(volume, '--A-', EXTENT, flags=SPARSE_UPLOAD)

        self.assertEqual(
            bytes(2 * UNIT) + b'A' * UNIT + bytes(UNIT),
            self.read(EXTENT, 4 * UNIT))

    def test_hole_at_the_end_of_an_upload_spares_the_rest(self):
        volume = self.make()

        self.upload(volume, 'A-', EXTENT, flags=SPARSE_UPLOAD)

        self.assertEqual(2 * EXTENT, volume.infoFlags(PHYSICAL)[2])
        self.assertEqual(
            {self.OLD}, set(self.read(EXTENT + 2 * UNIT, UNIT)))

    def test_upload_that_goes_on_where_another_one_ended(self):
        volume = self.make()

        self.upload(volume, 'A-', EXTENT, flags=SPARSE_UPLOAD)
        self.upload(volume, '-B', EXTENT + 2 * UNIT, flags=SPARSE_UPLOAD)

        self.assertEqual(
            b'A' * UNIT + bytes(2 * UNIT) + b'B' * UNIT,
            self.read(EXTENT, 4 * UNIT))

    def test_download_has_no_holes(self):
        volume = self.make()
        self.upload(volume, 'A--B', flags=SPARSE_UPLOAD)

        self.assertEqual(
            [('A', UNIT), ('\0', 2 * UNIT), ('B', UNIT)],
            self.receive(volume, 0, 4 * UNIT))

    def test_nothing_is_probed(self):
        volume = self.make()
        stream = self.begin_upload(volume, 0, len(HOSTILE))
        stream.send(HOSTILE)
        stream.finish()

        self.refresh()

        xml = etree.fromstring(volume.XMLDesc(0))
        self.assertIsNone(xml.find('target/format'))
        self.assertIsNone(xml.find('backingStore'))
        self.assertEqual(2 * EXTENT, volume.info()[1])

    def test_volumes_take_up_the_group(self):
        before = self.pool.info()[3]
        self.make(size=3 * EXTENT)
        self.refresh()

        self.assertEqual(before - 3 * EXTENT, self.pool.info()[3])

    def test_no_room_in_the_group(self):
        self.refresh()
        error = self.assert_error(
            libvirt.VIR_ERR_INTERNAL_ERROR, self.make, 'disk',
            self.pool.info()[3] + EXTENT)

        # The error of a pool with jobs has the same code.
        self.assertNotEqual(
            libvirt.VIR_FROM_STORAGE, error.get_error_domain())
        self.assertEqual([], self.pool.listVolumes())

    def test_name_that_is_taken(self):
        self.make()

        self.assert_error(libvirt.VIR_ERR_STORAGE_VOL_EXIST, self.make)

    def test_deleted_volume_is_gone(self):
        volume = self.make()

        volume.delete()

        self.assertIsNone(self.get_file(f'/dev/{self.group}/disk'))
        self.assert_error(libvirt.VIR_ERR_NO_STORAGE_VOL, volume.info)

    def test_pool_is_found_by_the_directory_of_its_devices(self):
        found = self.connection.storagePoolLookupByTargetPath(
            f'/dev/{self.group}')

        self.assertEqual(self.pool.name(), found.name())

    def test_second_pool_of_the_group(self):
        second = self.connection.storagePoolCreateXML(
            LOGICAL_POOL.format(name='second', group=self.group))
        self.addCleanup(second.destroy)

        self.assertEqual([], second.listVolumes())

    def test_second_pool_of_the_name(self):
        self.assert_error(
            libvirt.VIR_ERR_OPERATION_FAILED,
            self.connection.storagePoolCreateXML,
            LOGICAL_POOL.format(name=self.pool.name(), group=self.group))

    def test_end_of_the_pool_deactivates_the_group(self):
        self.make()

        self.pool.destroy()
        self.assertIsNone(self.get_file(f'/dev/{self.group}/disk'))

        self.pool = self.connection.storagePoolCreateXML(
            LOGICAL_POOL.format(name='again', group=self.group))
        self.assertIsNotNone(self.get_file(f'/dev/{self.group}/disk'))

    def test_group_that_is_missing(self):
        self.assert_error(
            libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            self.connection.storagePoolCreateXML,
            LOGICAL_POOL.format(name='missing', group='missing'))
        self.assert_error(
            libvirt.VIR_ERR_NO_STORAGE_POOL,
            self.connection.storagePoolLookupByName, 'missing')
