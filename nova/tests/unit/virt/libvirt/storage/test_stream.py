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

import array
import contextlib
import dataclasses
import errno
import gc
import os
import threading
import time
import typing as ty
from unittest import mock
import weakref

import ddt
import fixtures
import libvirt
from oslo_utils import units

from nova import test
from nova.tests.fixtures import content as sparse_content
from nova.tests.fixtures import libvirt_storage
from nova.tests.fixtures import recording_sink
from nova.virt.libvirt.storage import errors
from nova.virt.libvirt.storage import stream
from nova.virt.libvirt.storage import threads

Content = sparse_content.Content

# Small enough that the tests may cross it often.
UNIT = 64 * units.Ki
WINDOW = 8 * UNIT
QUEUE = 4 * UNIT

SOURCE_ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
                'Unable to read: Input/output error')
DEST_ERROR = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
              'cannot write to stream: No space left on device')


def patterned(size: int) -> bytes:
    """Data of which no two places nearby look the same, or are zero."""
    return array.array('I', range(1, size // 4 + 2)).tobytes()[:size]


@dataclasses.dataclass
class Outcome:
    """How a copy ended."""
    result: stream.Result | None = None
    error: BaseException | None = None
    done: bool = False

    def wait(self, timeout: float) -> bool:
        return libvirt_storage.wait_for(lambda: self.done, timeout)


class ContentSource:
    """A source that is content in memory, holes included.

    :ivar at_chunk: called before each chunk
    """
    path = '/source/disk'
    kind = 'content'

    def __init__(self, content: Content):
        self.at_chunk: ty.Callable[[], ty.Any] = lambda: None
        self._content = content

    def chunks(self, length: int) -> stream.Chunks:
        position = 0
        while position < length:
            self.at_chunk()
            is_data, size = self._content.section(position)
            size = min(size, length - position,
                       stream.MESSAGE_BYTES if is_data else WINDOW)
            yield self._content.read(position, size) if is_data else size
            position += size


class _CopyTestCase(test.NoDBTestCase):
    """A copy between ends that need no libvirt."""

    def setUp(self) -> None:
        super().setUp()
        self.sink = recording_sink.RecordingSink()
        self.progress: list[tuple[int, int]] = []
        self.threads_before = set(self._threads())
        self.addCleanup(self.assert_nothing_left)
        # Most disks here are shorter than a long message.
        self.set_size('LONG_MESSAGE_BYTES', 0)

    def set_sizes(self, window: int = WINDOW, queue: int = QUEUE) -> None:
        self.set_size('WINDOW_BYTES', window)
        self.set_size('QUEUE_BYTES', queue)

    def set_size(self, name: str, value: float) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.stream.' + name, value))

    @staticmethod
    def _threads(name: str = 'volume-') -> list[ty.Any]:
        # eventlet keeps the threads of its pool; those are not ours.
        return [thread for thread in threads.native_threading().enumerate()
                if thread.name.startswith(name)]

    def assert_nothing_left(self) -> None:
        """No thread outlives a copy."""
        self.assertEqual(self.threads_before, set(self._threads()))

    def wait_until_threads_end(self) -> None:
        self.assertTrue(libvirt_storage.wait_for(
            lambda: set(self._threads()) == self.threads_before))

    def block(self, method: str, nth: int = 1) -> ty.Any:
        """Have the nth call of a method of the sink hang.

        :returns: the event that lets it go on
        """
        event = threads.native_threading().Event()
        self.addCleanup(event.set)
        self.sink.on(method, lambda: event.wait(30), nth)
        return event

    def delay(self, method: str, seconds: float, nth: int = 1) -> None:
        """Have each call of a method of the sink take its time."""
        self.sink.on(method, lambda: threads.sleep(seconds), nth)

    def ends(self, content: Content,
             size: int | None = None) -> tuple[ty.Any, ty.Any]:
        """The source with the content, and the sink.

        :param size: of the destination, if it is not that of the source
        """
        return self.open_source(content, 'disk'), self.sink

    def open_source(self, content: Content, name: str) -> stream.Source:
        return ContentSource(content)

    def copy(self, content: Content, length: int | None = None,
             **kwargs: ty.Any) -> stream.Result:
        """Copy in the way that the driver does, and wait for it."""
        source, sink = self.ends(content)
        return threads.off_hub(
            stream.copy, source, sink,
            content.size if length is None else length,
            progress=self.record_progress, **kwargs)

    def record_progress(self, done: int, wire: int) -> None:
        self.progress.append((done, wire))

    def start_copy(self, content: Content, source: ty.Any = None,
                   **kwargs: ty.Any) -> Outcome:
        """Copy in the background."""
        own_source, sink = self.ends(content)
        outcome = Outcome()

        def run() -> None:
            try:
                outcome.result = stream.copy(
                    source or own_source, sink, content.size,
                    progress=self.record_progress, **kwargs)
            except BaseException as error:
                outcome.error = error
            outcome.done = True

        threads.native_threading().Thread(target=run, daemon=True).start()
        return outcome

    def copied(self) -> Content:
        return self.sink.content

    def outcomes(self) -> list[str | None]:
        """How the uploads ended that were begun."""
        return [self.sink.outcome] if self.sink.outcome else []

    def events(self) -> list[sparse_content.Event]:
        return self.sink.events

    def sent(self) -> list[sparse_content.Event]:
        """What was sent, data in a row taken together."""
        merged = sparse_content.merge_events(self.events())
        holes = [event for event in self.events() if event[0] == 'hole']
        self.assertEqual(
            [event for event in merged if event[0] == 'hole'], holes,
            'holes in a row have to be sent as one')
        return merged


class VolumeMixin:
    """Both ends are volumes 'disk', on two hosts."""

    def setUp(self) -> None:
        super().setUp()
        self.hosts = self.useFixture(
            libvirt_storage.LibvirtStorageFixture())
        self.source = self.hosts['source']
        self.dest = self.hosts['dest']
        self.source.add_pool()
        self.dest.add_pool()

    def assert_nothing_left(self) -> None:
        """No thread and no stream outlives a copy."""
        super().assert_nothing_left()
        self.assertEqual([], self.source.open_streams)
        self.assertEqual([], self.dest.open_streams)

    def ends(self, content: Content, size: int | None = None,
             name: str = 'disk') -> tuple[ty.Any, ty.Any]:
        self.dest.add_volume(
            'disks', name, Content(content.size if size is None else size))
        return self.open_source(content, name), self.open_sink(name)

    def open_source(self, content: Content, name: str) -> stream.Source:
        self.source.add_volume('disks', name, content)
        return stream.VolumeSource(self.lookup(self.source, name))

    def open_sink(self, name: str = 'disk',
                  **kwargs: ty.Any) -> stream.VolumeSink:
        volume = self.lookup(self.dest, name)
        kwargs.setdefault('length', volume.file.content.size)
        return stream.VolumeSink(volume, **kwargs)

    @staticmethod
    def lookup(host: libvirt_storage.FakeHost,
               name: str) -> libvirt_storage.FakeVolume:
        return host.connect().storagePoolLookupByName(
            'disks').storageVolLookupByName(name)

    def copied(self) -> Content:
        return self.dest.volume('disks', 'disk').content

    def uploads(self) -> list[libvirt_storage.FakeStream]:
        return [s for s in self.dest.streams if s.way == 'upload']

    def outcomes(self) -> list[str | None]:
        return [upload.outcome for upload in self.uploads()]

    def events(self) -> list[sparse_content.Event]:
        upload, = self.uploads()
        return upload.events


class FileMixin:
    """The source is a real file, which is read past libvirt."""

    def open_source(self, content: Content, name: str) -> stream.Source:
        self.file = os.path.join(
            self.useFixture(fixtures.TempDir()).path, name)
        with open(self.file, 'wb') as file:
            for offset, data in content.extents:
                file.seek(offset)
                file.write(data)
            file.truncate(content.size)
        return stream.FileSource(self.file)

    def patch_reads(self, read: ty.Callable[[int, int, int], bytes]) -> None:
        """Have something else called for os.pread().

        It can call that as self.pread().
        """
        self.pread = os.pread
        self.useFixture(fixtures.MonkeyPatch('os.pread', read))


@ddt.ddt
class ContentTests:
    """What arrives is what was there, and holes stay holes."""

    # Pictures of 64 KiB a character: '-' is a hole, '0' are zeroes that are
    # data, and sent as a hole. A window is eight of them.
    @ddt.data(
        ('A', [('data', 0, 1)]),
        ('-', [('hole', 0, 1)]),
        ('0', [('hole', 0, 1)]),
        ('-A', [('hole', 0, 1), ('data', 1, 1)]),
        ('A-', [('data', 0, 1), ('hole', 1, 1)]),
        ('A0-B', [('data', 0, 1), ('hole', 1, 2), ('data', 3, 1)]),
        ('0A', [('hole', 0, 1), ('data', 1, 1)]),
        ('A0B', [('data', 0, 1), ('hole', 1, 1), ('data', 2, 1)]),
        ('-00-00-', [('hole', 0, 7)]),
        ('A-B-C-', [('data', 0, 1), ('hole', 1, 1), ('data', 2, 1),
                    ('hole', 3, 1), ('data', 4, 1), ('hole', 5, 1)]),
        # a hole before, over and after the border of the first window
        ('AAAAAAA-|AAA', [('data', 0, 7), ('hole', 7, 1), ('data', 8, 3)]),
        ('AAAAAA--|--A', [('data', 0, 6), ('hole', 6, 4), ('data', 10, 1)]),
        ('AAAAAAAA|--A', [('data', 0, 8), ('hole', 8, 2), ('data', 10, 1)]),
        # windows that are all a hole
        ('A-------|--------|-------B',
         [('data', 0, 1), ('hole', 1, 22), ('data', 23, 1)]),
        ('--------|--------', [('hole', 0, 16)]),
        ('--------|-----A--|--------',
         [('hole', 0, 13), ('data', 13, 1), ('hole', 14, 10)]),
        # data over a border
        ('--AAAAAA|BBBBBBBB|CC--',
         [('hole', 0, 2), ('data', 2, 16), ('hole', 18, 2)]),
    )
    @ddt.unpack
    def test_holes_are_merged_and_sent_as_holes(self, picture, expected):
        self.set_sizes()
        content = Content.draw(picture.replace('|', ''), UNIT)

        result = self.copy(content)

        self.assertEqual(
            [(kind, start * UNIT, count * UNIT)
             for kind, start, count in expected], self.sent())
        self.assertEqual(content, self.copied())
        self.assertEqual(content.size, result.length)
        data = sum(count for kind, _start, count in expected
                   if kind == 'data') * UNIT
        self.assertEqual((data, data), (result.wire, self.copied().allocated))

    @ddt.data(1, 4096, stream.ZERO_BYTES - 1)
    def test_few_zeros_are_sent_as_data(self, size):
        """As a hole they would cost more."""
        content = Content.of(b'A' * 5 + bytes(size) + b'B' * UNIT)

        self.copy(content)

        self.assertEqual([('data', 0, content.size)], self.sent())
        self.assertEqual(content, self.copied())

    @ddt.data(1, stream.ZERO_BYTES - 1, stream.MESSAGE_BYTES - 1,
              stream.MESSAGE_BYTES)
    def test_zeros_are_found_wherever_they_begin(self, offset):
        size = 3 * stream.MESSAGE_BYTES
        content = Content.of(b'A' * offset + bytes(size) + b'B' * 5)

        result = self.copy(content)

        self.assertEqual(content, self.copied())
        # A part of a block may be left at either end of a run in a message,
        # and where one that was received ends.
        self.assertLess(result.wire, offset + 3 * stream.ZERO_BYTES + 5)
        self.assertEqual(result.wire, self.copied().allocated)

    def test_disk_full_of_zeros_is_one_hole(self):
        self.set_sizes()
        size = 20 * WINDOW + 3

        result = self.copy(Content.of(bytes(size)))

        self.assertEqual([('hole', 0, size)], self.sent())
        self.assertEqual((size, 0), (result.length, result.wire))

    @ddt.data(1, 511, 512, 4097, 262119, 262120, 262121,
              WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW + 4097)
    def test_every_size_arrives(self, size):
        self.set_sizes()
        content = Content.of(patterned(size))

        result = self.copy(content)

        self.assertEqual(content, self.copied())
        self.assertEqual([('data', 0, size)], self.sent())
        self.assertEqual((size, size), (result.length, result.wire))

    @ddt.data(1, 4097, WINDOW - 1, WINDOW, WINDOW + 1)
    def test_every_size_of_a_hole_arrives(self, size):
        self.set_sizes()

        result = self.copy(Content(size))

        self.assertEqual([('hole', 0, size)], self.sent())
        self.assertEqual((size, 0), (result.length, result.wire))

    def test_big_hole_costs_one_message(self):
        size = 3 * units.Gi + 1

        result = self.copy(Content(size))

        self.assertEqual([('hole', 0, size)], self.sent())
        self.assertEqual((size, 0), (result.length, result.wire))
        self.assertEqual(size, self.copied().size)

    def test_last_byte_behind_a_big_hole_arrives(self):
        size = 3 * units.Gi + 1
        content = Content(size, [(size - 1, b'x')])

        self.copy(content)

        self.assertEqual([('hole', 0, size - 1), ('data', size - 1, 1)],
                         self.sent())
        self.assertEqual(content, self.copied())

    def test_many_small_extents(self):
        self.set_sizes()
        content = Content.draw('A-' * 1000, 4096)

        result = self.copy(content)

        self.assertEqual(2000, len(self.sent()))
        self.assertEqual(content, self.copied())
        self.assertEqual(4096000, result.wire)

    def test_nothing(self):
        result = self.copy(Content())

        self.assertNotIn('aborted', self.outcomes())
        self.assertEqual((0, 0), (result.length, result.wire))

    def test_sink_is_finished(self):
        self.set_sizes()

        self.copy(Content.draw('A-B-' * 10, UNIT))

        self.assertEqual(['finished'], self.outcomes())

    def test_length_may_be_less_than_the_volume(self):
        content = Content.of(patterned(4 * UNIT))

        result = self.copy(content, length=3 * UNIT)

        self.assertEqual(3 * UNIT, result.length)
        self.assertEqual([('data', 0, 3 * UNIT)], self.sent())


@ddt.ddt
class CopyContentTestCase(ContentTests, _CopyTestCase):
    """From one end in memory to another."""

    def test_seconds_are_measured(self):
        self.delay('finish', 0.2)

        result = self.copy(Content.draw('A', UNIT))

        self.assertGreaterEqual(result.seconds, 0.2)
        self.assertLess(result.seconds, 5)

    @ddt.data('A0-B', '--', '-A-', '0' * 30)
    def test_sink_that_takes_no_holes_gets_zeros(self, picture):
        self.sink.sparse = False
        content = Content.draw(picture, UNIT)

        result = self.copy(content)

        self.assertEqual([('data', 0, content.size)], self.sent())
        self.assertEqual(content, self.copied())
        self.assertEqual(content.size, result.wire)
        self.assertLessEqual(max(size for _, _, size in self.events()),
                             stream.MESSAGE_BYTES)

    @ddt.data(
        ('----------', [('hole', 4), ('hole', 4), ('hole', 2)]),
        ('A--------B', [('data', 1), ('hole', 4), ('hole', 4), ('data', 1)]),
        ('---A-----', [('hole', 3), ('data', 1), ('hole', 4), ('hole', 1)]))
    @ddt.unpack
    def test_long_holes_come_in_pieces(self, picture, expected):
        self.sink.most_hole = 4 * UNIT
        content = Content.draw(picture, UNIT)

        self.copy(content)

        self.assertEqual(expected, [
            (kind, length // UNIT) for kind, _offset, length in self.events()])
        self.assertEqual(content, self.copied())


@ddt.ddt
class CopyVolumeContentTestCase(VolumeMixin, ContentTests, _CopyTestCase):
    """From volume to volume; the source is read in windows."""

    def test_nothing(self):
        super().test_nothing()

        # An upload of length 0 would be one without a limit.
        self.assertEqual([], self.uploads())

    @ddt.data(1000, 65536, 262119)
    def test_short_sends_lose_nothing(self, limit):
        self.set_sizes()
        self.dest.send_limit = limit
        content = Content.of(patterned(2 * WINDOW + 13))
        content.truncate(3 * WINDOW)

        self.copy(content)

        self.assertEqual(content, self.copied())

    def test_destination_is_uploaded_to_once(self):
        """A second sparse upload would cut the volume off."""
        self.set_sizes()

        self.copy(Content.draw('A-B-' * 10, UNIT))

        upload, = self.uploads()
        self.assertTrue(upload.sparse)
        self.assertEqual((0, 40 * UNIT), (upload.offset, upload.length))

    def test_both_ends_are_finished(self):
        self.set_sizes()

        self.copy(Content.draw('A-B-' * 10, UNIT))

        self.assertEqual(
            {'finished'},
            {s.outcome for s in self.source.streams + self.dest.streams})

    def test_short_receives_lose_nothing(self):
        self.set_sizes()
        self.source.recv_limit = 4093
        content = Content.draw('AB--C0-D', UNIT)

        self.copy(content)

        self.assertEqual(content, self.copied())

    def test_source_is_read_in_windows_one_after_the_other(self):
        self.set_sizes()
        self.source.call('stream.finish', lambda: None, times=None)

        self.copy(Content.of(patterned(2 * WINDOW + 1)))

        windows = [(s.offset, s.length) for s in self.source.streams]
        self.assertEqual(
            [(0, WINDOW), (WINDOW, WINDOW), (2 * WINDOW, 1)], windows)
        for download in self.source.streams:
            self.assertTrue(download.sparse)
            self.assertTrue(download.exhausted)
        self.assertEqual(
            ['vol.download', 'stream.finish'] * 3,
            [where for where, _name in self.source.calls
             if where in ('vol.download', 'stream.finish')])

    def test_window_is_never_0_long(self):
        """A download of length 0 would be one of all that is left."""
        self.set_sizes()

        self.copy(Content.of(patterned(2 * WINDOW)))

        self.assertEqual(2, len(self.source.streams))

    def test_source_is_only_read(self):
        self.copy(Content.draw('A-B', UNIT))

        self.assertEqual([], self.source.changes)


@ddt.ddt
class CopyFileContentTestCase(FileMixin, ContentTests, _CopyTestCase):
    """From a real file."""

    @ddt.data((0, 8), (1, 7), (2, 2), (3, 1), (7, 1))
    @ddt.unpack
    def test_part_of_a_file(self, offset, length):
        content = Content.draw('AB--CD-E', UNIT)
        self.open_source(content, 'disk')

        threads.off_hub(
            stream.copy, stream.FileSource(self.file, offset * UNIT),
            self.sink, length * UNIT)

        self.assertEqual(content.read(offset * UNIT, length * UNIT),
                         self.copied().read(0, self.copied().size))

    def test_part_of_a_file_that_ends(self):
        self.open_source(Content.draw('AB', UNIT), 'disk')

        error = self.assertRaises(
            errors.CopyError, threads.off_hub, stream.copy,
            stream.FileSource(self.file, UNIT), self.sink, 2 * UNIT)

        self.assertEqual(('source', UNIT), (error.end, error.done))

    def test_short_reads_lose_nothing(self):
        self.set_sizes()
        self.patch_reads(lambda file, size, offset: self.pread(
            file, min(size, 4093), offset))
        content = Content.draw('AB--C0-D', UNIT)

        self.copy(content)

        self.assertEqual(content, self.copied())

    def test_reads_are_of_one_message(self):
        sizes = []

        def read(file, size, offset):
            sizes.append(size)
            return self.pread(file, size, offset)

        self.patch_reads(read)

        self.copy(Content.of(patterned(2 * stream.MESSAGE_BYTES + 5)))

        self.assertEqual(
            [stream.MESSAGE_BYTES, stream.MESSAGE_BYTES, 5], sizes)

    def test_file_is_closed(self):
        before = os.listdir('/proc/self/fd')

        self.copy(Content.draw('A-B-', UNIT))

        self.assertEqual(before, os.listdir('/proc/self/fd'))


@ddt.ddt
class OpenSourceTestCase(VolumeMixin, _CopyTestCase):
    """A file is read directly only if that is sure to be right."""

    def setUp(self) -> None:
        super().setUp()
        directory = self.useFixture(fixtures.TempDir()).path
        self.source.add_pool('real', directory)
        self.source.add_volume('real', 'disk', Content(4097))
        self.path = os.path.join(directory, 'disk')
        self.volume = self.source.connect().storagePoolLookupByName(
            'real').storageVolLookupByName('disk')

    def write(self, size: int) -> None:
        with open(self.path, 'wb') as file:
            file.truncate(size)

    def assert_opened(self, kind: type, **kwargs: ty.Any) -> None:
        opened = stream.open_source(self.volume, 4097, **kwargs)

        self.assertIsInstance(opened, kind)
        self.assertEqual(self.path, opened.path)
        self.dest.add_volume('disks', 'disk')
        result = threads.off_hub(stream.copy, opened, self.open_sink(), 0)
        self.assertEqual(kind.kind, result.source)

    def test_file_that_can_be_read(self):
        self.write(4097)

        self.assert_opened(stream.FileSource)

    def test_file_that_the_operator_wants_read_through_libvirt(self):
        self.write(4097)

        self.assert_opened(stream.VolumeSource, direct=False)

    @ddt.data(0, 4096, 4098)
    def test_file_of_another_length(self, size):
        self.write(size)

        self.assert_opened(stream.VolumeSource)

    def test_no_file(self):
        self.assert_opened(stream.VolumeSource)

    @ddt.data(True, False)
    def test_offset(self, direct):
        self.write(4097)
        opened = stream.open_source(self.volume, 4097, direct, 4090)
        self.assertEqual(7, sum(map(
            stream.length_of, threads.off_hub(list, opened.chunks(7)))))

    def test_file_that_may_not_be_read(self):
        self.write(4097)

        # Root may read what its mode forbids.
        with mock.patch('builtins.open', side_effect=PermissionError):
            self.assert_opened(stream.VolumeSource)

    def test_no_regular_file(self):
        # Opening it would wait for a writer.
        os.mkfifo(self.path)

        self.assert_opened(stream.VolumeSource)


@ddt.ddt
class CopyProgressTestCase(_CopyTestCase):

    @ddt.data('AAAAAAAAAAAAAAAAAAAA', 'A-B-C-------------------', '--------',
              '----------A', 'A')
    def test_progress_grows_and_ends_at_the_total(self, picture):
        self.set_sizes()
        content = Content.draw(picture, UNIT)

        self.copy(content)

        self.assertEqual(sorted(self.progress), self.progress)
        self.assertEqual((content.size, content.allocated),
                         self.progress[-1])

    def test_progress_is_reported_while_the_copy_runs(self):
        self.set_sizes()
        seen: list[int] = []
        self.sink.on('data', lambda: seen.append(len(self.progress)))

        self.copy(Content.of(patterned(40 * UNIT)))

        self.assertEqual([0, 1, 2, 3, 4], seen)

    def test_failing_progress_fails_the_copy(self):
        source, sink = self.ends(Content.of(patterned(20 * UNIT)))

        self.assertRaises(
            test.TestingException, threads.off_hub, stream.copy,
            source, sink, 20 * UNIT,
            progress=mock.Mock(side_effect=test.TestingException()))

        self.assertEqual(['aborted'], self.outcomes())


@ddt.ddt
class SinkFailureTestCase(FileMixin, _CopyTestCase):
    """A sink that fails, or hangs, while a file is read."""

    def setUp(self) -> None:
        super().setUp()
        self.set_sizes()
        self.content = Content.of(patterned(5 * WINDOW))

    def assert_fails(self, content: Content | None = None,
                     **kwargs: ty.Any) -> errors.CopyError:
        error = self.assertRaises(
            errors.CopyError, self.copy, content or self.content, **kwargs)
        self.assertEqual('destination', error.end)
        self.assertEqual(self.sink.path, error.path)
        self.assertEqual(['aborted'], self.outcomes())
        return error

    def test_sink_fails_at_once(self):
        self.sink.fail('data', 'No space left')

        self.assertIn('No space left', str(self.assert_fails()))

    def test_sink_fails_in_the_middle(self):
        self.sink.fail('data', 'No space left', nth=3)

        self.assertEqual(2 * stream.MESSAGE_BYTES, self.assert_fails().done)

    def test_sink_fails_at_a_hole(self):
        self.sink.fail('hole', 'No space left')

        self.assert_fails(Content.draw('AAAA----AA', UNIT))

    def test_sink_fails_at_the_end(self):
        self.sink.fail('finish', 'No space left')

        self.assertEqual(self.content.size, self.assert_fails().done)

    def test_sink_fails_before_anything_is_sent(self):
        self.sink.fail('finish', 'No space left')

        self.assert_fails(Content())

    def test_error_of_abort_does_not_hide_the_first(self):
        self.sink.fail('data', 'No space left')
        self.sink.on('abort', mock.Mock(side_effect=ValueError('gone')))

        error = self.assert_fails()

        self.assertIn('No space left', str(error))
        self.assertEqual(['Aborting failed too: gone'], error.__notes__)

    def test_source_is_closed_when_the_sink_fails(self):
        before = os.listdir('/proc/self/fd')
        self.sink.fail('data', 'No space left')

        self.assert_fails()

        self.assertEqual(before, os.listdir('/proc/self/fd'))

    def test_pause_that_is_shorter_than_the_limit_is_no_stall(self):
        self.delay('data', 0.3)

        result = self.copy(self.content, stall_seconds=0.6)

        self.assertEqual(self.content.size, result.length)

    @ddt.data('volume-read', 'volume-write')
    def test_thread_that_cannot_be_started_fails_the_copy(self, name):
        start = threads.start

        def start_others(function, other):
            if other == name:
                raise RuntimeError("can't start new thread")
            return start(function, other)

        with mock.patch.object(threads, 'start', start_others):
            error = self.assertRaises(
                RuntimeError, self.copy, self.content)

        self.assertIn("can't start", str(error))
        self.assert_nothing_left()

    @ddt.data('data', 'finish')
    def test_sink_that_hangs_is_named_and_left_behind(self, method):
        event = self.block(method)
        source, sink = self.ends(self.content)

        started = time.monotonic()
        error = self.assertRaises(
            errors.CopyError, threads.off_hub, stream.copy, source, sink,
            self.content.size, stall_seconds=0.3)

        self.assertLess(time.monotonic() - started, 5)
        self.assertEqual('destination', error.end)
        self.assertIn('nothing moved for 0.3 seconds', str(error))
        self.assertEqual([], self.outcomes())
        event.set()
        self.wait_until_threads_end()

    def test_sink_that_hung_is_aborted_late(self):
        event = self.block('data')
        source, sink = self.ends(self.content)
        self.assertRaises(
            errors.CopyError, threads.off_hub, stream.copy, source, sink,
            self.content.size, stall_seconds=0.3)

        event.set()

        self.wait_until_threads_end()
        self.assertEqual(['aborted'], self.outcomes())

    def test_cancel_does_not_wait_for_a_sink_that_hangs(self):
        cancel = threading.Event()
        self.sink.on('data', cancel.set)
        event = self.block('data')
        source, sink = self.ends(self.content)

        started = time.monotonic()
        self.assertRaises(
            errors.Cancelled, threads.off_hub, stream.copy, source, sink,
            self.content.size, cancel=cancel)

        self.assertLess(time.monotonic() - started, 10)
        event.set()
        self.wait_until_threads_end()


class _CopyFailureTestCase(VolumeMixin, _CopyTestCase):
    """The first error is the one raised, and both ends are closed."""

    def setUp(self) -> None:
        super().setUp()
        self.set_sizes()
        self.content = Content.of(patterned(5 * WINDOW))

    def assert_fails(self, end: str, text: str,
                     content: Content | None = None) -> errors.CopyError:
        error = self.assertRaises(
            errors.CopyError, self.copy, content or self.content)
        self.assertEqual(end, error.end)
        self.assertEqual('/var/lib/nova/disks/disk', error.path)
        self.assertIn(text, str(error))
        return error

    def assert_upload_aborted(self) -> None:
        self.assertEqual(['aborted'], self.outcomes())


@ddt.ddt
class VolumeSinkFailureTestCase(_CopyFailureTestCase):
    """A daemon of the destination that fails."""

    @ddt.data('conn.newStream', 'vol.upload', 'stream.send')
    def test_destination_fails_at_once(self, where):
        self.dest.fail(where, error=DEST_ERROR)

        error = self.assert_fails('destination', 'No space left')

        self.assertEqual(0, error.done)
        self.assertNotIn('finished', self.outcomes())

    def test_destination_fails_in_the_middle(self):
        self.dest.fail('stream.send', after=3 * WINDOW, error=DEST_ERROR)

        error = self.assert_fails('destination', 'No space left')

        self.assertGreaterEqual(error.done, 2 * WINDOW)
        self.assertLessEqual(error.done, 3 * WINDOW)
        self.assert_upload_aborted()

    def test_destination_fails_at_a_hole(self):
        self.dest.fail('stream.sendHole', error=DEST_ERROR)

        self.assert_fails('destination', 'No space left',
                          Content.draw('AAAA----AA', UNIT))

        self.assert_upload_aborted()

    def test_destination_fails_late_at_finish(self):
        self.dest.fail('stream.finish', error=DEST_ERROR)

        error = self.assert_fails('destination', 'No space left')

        self.assertEqual(self.content.size, error.done)
        self.assert_upload_aborted()

    def test_destination_that_fills_up_fails(self):
        """It is reported late, if at the last message only by finish()."""
        self.dest.used = self.dest.capacity - 5 * WINDOW + 1

        self.assert_fails('destination', 'No space left')

    def test_reader_stops_when_the_destination_fails(self):
        self.dest.fail('stream.send', error=DEST_ERROR)

        self.assert_fails('destination', 'No space left')

        self.assertLess(self.hosts.meter.received, 3 * WINDOW)

    def test_error_of_an_abort_does_not_hide_the_first(self):
        self.dest.fail('stream.finish', error=DEST_ERROR)
        self.dest.fail('stream.abort', error=libvirt_storage.LOST_ERROR)

        error = self.assert_fails('destination', 'No space left')

        self.assertNotIn('socket is closed', str(error))

    def test_lost_destination_fails(self):
        self.dest.call('stream.send', self.dest.disconnect, after=WINDOW)

        self.assert_fails('destination', 'socket is closed')
        self.dest.reconnect()

    def test_link_that_is_cut_while_a_send_blocks_ends_the_copy(self):
        blocked = self.dest.block('stream.send', after=WINDOW)
        outcome = self.start_copy(self.content)
        self.assertTrue(blocked.wait_reached())

        self.dest.disconnect()

        self.assertTrue(outcome.wait(5))
        self.assertEqual('destination', outcome.error.end)
        self.assertIn('socket is closed', str(outcome.error))

    def test_error_tells_libvirts_own(self):
        self.dest.fail('stream.send', error=DEST_ERROR)

        error = self.assert_fails('destination', DEST_ERROR[2])

        self.assertIn('0 bytes', str(error))

    def test_next_copy_works_after_a_failure(self):
        self.dest.fail('stream.send', after=WINDOW, error=DEST_ERROR)
        self.assert_fails('destination', 'No space left')

        result = self.copy(self.content)

        self.assertEqual(self.content.size, result.length)
        self.assertEqual(self.content, self.copied())


@ddt.ddt
class CopyVolumeFailureTestCase(_CopyFailureTestCase):
    """A source that fails, and which of two errors counts."""

    @ddt.data('stream.recv', 'stream.finish', 'vol.download',
              'conn.newStream')
    def test_source_fails_on_its_second_window(self, where):
        self.source.fail(where, nth=12 if where == 'stream.recv' else 2,
                         error=SOURCE_ERROR)

        error = self.assert_fails('source', 'Unable to read')

        self.assertGreaterEqual(error.done, WINDOW)
        self.assertLessEqual(error.done, 5 * WINDOW)
        self.assert_upload_aborted()

    def test_source_fails_in_front_of_a_hole(self):
        self.source.fail('stream.recvHole', error=SOURCE_ERROR)

        self.assert_fails('source', 'Unable to read',
                          Content.draw('AAAA----AA', UNIT))

        self.assertNotIn('finished', self.outcomes())

    def test_source_fails_at_once(self):
        self.source.fail('vol.download', error=SOURCE_ERROR)

        error = self.assert_fails('source', 'Unable to read')

        self.assertEqual(0, error.done)
        self.assertNotIn('finished', self.outcomes())

    def test_failed_download_is_aborted(self):
        self.source.fail('stream.recv', after=WINDOW, error=SOURCE_ERROR)

        self.assert_fails('source', 'Unable to read')

        self.assertEqual(['finished', 'aborted'],
                         [s.outcome for s in self.source.streams])

    def test_first_error_wins_if_the_source_fails_first(self):
        self.source.fail('stream.recv', after=WINDOW, error=SOURCE_ERROR)
        self.dest.fail('stream.abort', error=DEST_ERROR)

        self.assert_fails('source', 'Unable to read')

    def test_first_error_wins_if_the_destination_fails_first(self):
        self.dest.fail('stream.send', after=WINDOW, error=DEST_ERROR)
        self.source.fail('stream.abort', error=SOURCE_ERROR)

        self.assert_fails('destination', 'No space left')

    def test_source_error_wins_over_a_later_one_of_the_destination(self):
        sending = self.dest.block('stream.send')
        sending.error = DEST_ERROR
        reading = self.source.block('stream.recv', after=UNIT)
        reading.error = SOURCE_ERROR
        outcome = self.start_copy(self.content)
        self.assertTrue(sending.wait_reached())

        reading.release()
        self.assertTrue(libvirt_storage.wait_for(
            lambda: not self._threads('volume-read')))
        sending.release()

        self.assertTrue(outcome.wait(5))
        self.assertEqual('source', outcome.error.end)

    @ddt.data(('source', 'stream.recv'), ('destination', 'stream.send'))
    @ddt.unpack
    def test_end_that_stands_still_is_named_and_left_behind(self, end, where):
        host = self.source if end == 'source' else self.dest
        fault = host.block(where, after=WINDOW)
        source, dest = self.ends(self.content)

        started = time.monotonic()
        error = self.assertRaises(
            errors.CopyError, threads.off_hub, stream.copy, source, dest,
            self.content.size, None, None, 0.3)

        self.assertEqual(end, error.end)
        self.assertIn('nothing moved for 0.3 seconds', str(error))
        self.assertGreaterEqual(time.monotonic() - started, 0.3)
        self.assertLess(time.monotonic() - started, 5)
        self.assertTrue(fault.reached.is_set())
        fault.release()
        self.wait_until_threads_end()

    def test_daemon_that_hangs_at_the_end_is_named(self):
        fault = self.dest.block('stream.finish')
        source, dest = self.ends(self.content)
        known = self.lookup(self.dest, 'disk').path()

        def path(volume) -> str:
            # A daemon that hangs cannot be asked for it.
            self.assertFalse(fault.reached.is_set())
            return known

        with mock.patch.object(libvirt_storage.FakeVolume, 'path', path):
            error = self.assertRaises(
                errors.CopyError, threads.off_hub, stream.copy, source,
                dest, self.content.size, None, None, 0.3)

        self.assertEqual(
            ('destination', self.content.size), (error.end, error.done))
        fault.release()
        self.wait_until_threads_end()

    @ddt.data(WINDOW, 2 * WINDOW + 7, 5 * WINDOW - 1)
    def test_source_that_is_shorter_than_told_fails(self, size):
        source, dest = self.ends(Content.of(patterned(size)), 5 * WINDOW)

        error = self.assertRaises(
            errors.CopyError, threads.off_hub, stream.copy,
            source, dest, 5 * WINDOW)

        self.assertEqual(('source', size), (error.end, error.done))
        self.assert_upload_aborted()

    def test_source_that_vanishes_fails(self):
        self.source.call(
            'vol.download',
            lambda: self.source.remove_file('/var/lib/nova/disks/disk'),
            nth=2)

        self.assert_fails('source', 'no storage vol with matching path')

        self.assert_upload_aborted()

    def test_read_error_that_ends_a_window_early(self):
        # libvirt tells of it when the stream is finished, and not before.
        self.source.call(
            'vol.download',
            lambda: self.source.volume('disks', 'disk').content.truncate(
                WINDOW + 5), nth=2)
        self.source.fail('stream.finish', nth=2, error=(
            libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS,
            'Unable to read: Input/output error'))

        error = self.assert_fails('source', 'Input/output error')

        self.assertEqual(WINDOW + 5, error.done)

    def test_source_that_shrinks_fails(self):
        self.source.call(
            'vol.download',
            lambda: self.source.volume('disks', 'disk').content.truncate(
                WINDOW + 5), nth=2)

        error = self.assert_fails('source', 'did the volume change its size?')

        self.assertEqual(WINDOW + 5, error.done)

    def test_lost_source_fails(self):
        self.source.call('stream.recv', self.source.disconnect, after=WINDOW)

        self.assert_fails('source', 'socket is closed')

        self.assert_upload_aborted()


@ddt.ddt
class GarbageTestCase(_CopyFailureTestCase):
    """Streams that are left after a failed copy.

    Freeing the last stream of a connection closes that, which may take as long
    as the daemon likes. The garbage collector runs in any thread.
    """

    def setUp(self) -> None:
        super().setUp()
        gc.disable()
        self.addCleanup(gc.enable)
        self.made: list[weakref.ref] = []
        self._note(libvirt_storage.FakeConnection, 'newStream')

    def _note(self, owner: ty.Any, name: str) -> None:
        """Note what a call returns."""
        function = getattr(owner, name)

        def call(*args: ty.Any, **kwargs: ty.Any) -> ty.Any:
            result = function(*args, **kwargs)
            self.made.append(weakref.ref(result))
            return result

        self.useFixture(fixtures.MockPatchObject(owner, name, call))

    def _left(self) -> list[ty.Any]:
        """The objects that were noted and still exist."""
        self.assertNotEqual([], self.made)
        for host in self.source, self.dest:
            host.streams.clear()
        return [each for each in (made() for made in self.made) if each]

    @ddt.data('conn.newStream', 'vol.download', 'stream.recv',
              'stream.finish')
    def test_source_error_keeps_no_stream(self, where):
        self.source.fail(where, nth=12 if where == 'stream.recv' else 2,
                         error=SOURCE_ERROR)
        error = self.assert_fails('source', 'Unable to read')
        self.assertEqual([], self._left(), error)

    @ddt.data('vol.upload', 'stream.send', 'stream.finish')
    def test_destination_error_keeps_no_stream(self, where):
        self.dest.fail(where, error=DEST_ERROR)
        error = self.assert_fails('destination', 'No space left')
        self.assertEqual([], self._left(), error)

    def test_error_at_a_hole_keeps_no_stream(self):
        content = Content.draw('AAAA----AA', UNIT)
        self.source.fail('stream.recvHole', error=SOURCE_ERROR)
        error = self.assert_fails('source', 'Unable to read', content)
        self.assertEqual([], self._left(), error)

    def test_cancelled_copy_keeps_no_stream(self):
        cancel = threading.Event()

        def stop() -> None:
            cancel.set()
            threads.sleep(2 * stream.POLL_SECONDS)

        self.dest.call('stream.send', stop)
        error = self.assertRaises(
            errors.Cancelled, self.copy, self.content, cancel=cancel)
        self.assertEqual([], self._left(), error)

    def test_upload_that_does_not_begin_frees_its_stream(self):
        _source, sink = self.ends(self.content)
        self.dest.fail('vol.upload', error=DEST_ERROR)
        with contextlib.suppress(errors.CopyError):
            threads.off_hub(sink.open)
        self.assertEqual([], self._left())

    def test_data_that_was_read_is_freed_with_the_error(self):
        self._note(stream, '_Queue')
        self.dest.fail('stream.send', error=DEST_ERROR)
        with contextlib.suppress(errors.CopyError):
            self.copy(self.content)
        self.assertEqual([], self._left())


@ddt.ddt
class CopyFileFailureTestCase(FileMixin, _CopyTestCase):
    """What can happen to a file while it is read."""

    def setUp(self) -> None:
        super().setUp()
        self.set_sizes()

    def assert_fails(self, content: Content, text: str) -> errors.CopyError:
        error = self.assertRaises(errors.CopyError, self.copy, content)
        self.assertEqual(('source', self.file), (error.end, error.path))
        self.assertIn(text, str(error))
        self.assertNotIn('finished', self.outcomes())
        return error

    def at_read(self, number: int, action: ty.Callable[[], ty.Any]) -> None:
        """Have something happen before the nth read."""
        reads = []

        def read(file, size, offset):
            reads.append(offset)
            if len(reads) == number:
                action()
            return self.pread(file, size, offset)

        self.patch_reads(read)

    def test_read_error(self):
        def fail():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        self.at_read(3, fail)

        error = self.assert_fails(
            Content.of(patterned(5 * WINDOW)), 'Input/output error')

        self.assertEqual(2 * stream.MESSAGE_BYTES, error.done)

    # How long it still is when its first data is read.
    @ddt.data(WINDOW + 5, 2 * WINDOW, 3 * WINDOW, 5 * WINDOW - 1)
    def test_file_that_shrinks(self, size):
        content = Content.draw('A' * 16 + '-' * 16 + 'B' * 8, UNIT)
        self.at_read(1, lambda: os.truncate(self.file, size))

        error = self.assert_fails(content, 'did the volume change its size?')

        self.assertEqual(min(size, error.done), error.done)

    def test_file_that_shrinks_before_its_last_hole(self):
        content = Content.draw('A' * 8 + '-' * 8, UNIT)
        self.at_read(1, lambda: os.truncate(self.file, 8 * UNIT))

        error = self.assert_fails(content, 'did the volume change its size?')

        self.assertEqual(8 * UNIT, error.done)

    def test_file_that_is_gone_already(self):
        source, dest = self.ends(Content.draw('A', UNIT))
        os.unlink(self.file)

        error = self.assertRaises(
            errors.CopyError, threads.off_hub, stream.copy,
            source, dest, UNIT)

        self.assertEqual(('source', 0), (error.end, error.done))
        self.assertIn('No such file', str(error))

    def test_stalled_sink_bounds_what_is_read(self):
        event = self.block('data')
        offsets = []

        def read(file, size, offset):
            offsets.append(offset)
            return self.pread(file, size, offset)

        self.patch_reads(read)
        outcome = self.start_copy(Content.of(patterned(20 * WINDOW)))
        self.assertTrue(libvirt_storage.wait_for(
            lambda: len(offsets) * stream.MESSAGE_BYTES > QUEUE))
        time.sleep(0.3)

        self.assertLessEqual(offsets[-1], QUEUE + 3 * stream.MESSAGE_BYTES)

        event.set()
        self.assertTrue(outcome.wait(10))


@ddt.ddt
class CopyCancelTestCase(_CopyTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.set_sizes()
        self.content = Content.of(patterned(20 * WINDOW))
        self.cancel = threading.Event()

    def assert_cancelled(self, outcome: Outcome) -> None:
        self.assertTrue(outcome.wait(10))
        self.assertIsInstance(outcome.error, errors.Cancelled)

    def test_cancel_while_data_flows(self):
        self.delay('data', 0.05)
        outcome = self.start_copy(self.content, cancel=self.cancel)
        self.assertTrue(libvirt_storage.wait_for(lambda: self.progress))

        self.cancel.set()

        self.assert_cancelled(outcome)
        self.assertEqual(['aborted'], self.outcomes())
        self.assertLess(self.progress[-1][0], self.content.size)

    def test_cancel_while_the_source_is_slow(self):
        source = ContentSource(self.content)
        source.at_chunk = lambda: threads.sleep(0.2)
        outcome = self.start_copy(self.content, source, cancel=self.cancel)
        self.assertTrue(libvirt_storage.wait_for(lambda: self.progress))

        self.cancel.set()

        self.assert_cancelled(outcome)
        self.assertEqual(['aborted'], self.outcomes())

    def test_cancel_before_the_start(self):
        self.cancel.set()

        outcome = self.start_copy(self.content, cancel=self.cancel)

        self.assert_cancelled(outcome)
        self.assertNotIn('finished', self.outcomes())

    def test_cancel_during_a_big_hole(self):
        """Such a source is fast, and takes no room in the queue."""
        content = Content(1000 * WINDOW)
        source = ContentSource(content)
        chunks = []

        def at_chunk() -> None:
            chunks.append(None)
            threads.sleep(0.01)

        source.at_chunk = at_chunk
        outcome = self.start_copy(content, source, cancel=self.cancel)
        self.assertTrue(libvirt_storage.wait_for(lambda: len(chunks) > 3))

        self.cancel.set()

        self.assert_cancelled(outcome)

    def test_cancel_after_the_end_changes_nothing(self):
        outcome = self.start_copy(self.content, cancel=self.cancel)
        self.assertTrue(outcome.wait(10))

        self.cancel.set()

        self.assertEqual(self.content.size, outcome.result.length)

    def test_error_wins_over_a_later_cancel(self):
        self.sink.fail('data', 'No space left')
        self.sink.on('abort', self.cancel.set)

        self.assertRaises(
            errors.CopyError, self.copy, self.content, cancel=self.cancel)


@ddt.ddt
class LongMessageTestCase(_CopyTestCase):
    """One message is so long that the daemon keeps memory for the others."""

    def setUp(self) -> None:
        super().setUp()
        self.set_size('LONG_MESSAGE_BYTES', 4 * UNIT)

    # Chunks of the source, and lengths of the messages. Units; <0 for holes.
    @ddt.data(
        ([1, 1, 1, 1, 1, 1], [4, 1, 1]),
        ([3, 3, 3], [6, 3]),
        ([9, 9], [9, 9]),
        ([1, 1], [2]),
        ([1, 1, -3, 1, 1, 1, -1], [2, -3, 3, -1]),
        ([-1, 2, -1, 2, 2, 2, -1, 2, 2], [-1, 2, -1, 4, 2, -1, 2, 2]),
        ([-4], [-4]),
    )
    @ddt.unpack
    def test_one_is_joined(self, chunks, messages):
        source = mock.Mock(path='source', kind='file')
        source.chunks.return_value = (
            patterned(chunk * UNIT) if chunk > 0 else -chunk * UNIT
            for chunk in chunks)

        result = threads.off_hub(
            stream.copy, source, self.sink, sum(map(abs, chunks)) * UNIT)

        self.assertEqual(
            [('data' if length > 0 else 'hole', abs(length) * UNIT)
             for length in messages],
            [(kind, length) for kind, _offset, length in self.events()])
        self.assertEqual(
            sum(chunk for chunk in chunks if chunk > 0) * UNIT, result.wire)


class CopyMemoryTestCase(VolumeMixin, _CopyTestCase):
    """What was read and not yet written is bounded."""

    # Beyond the queue: what the reader holds and cannot put, what the writer
    # took and sends, and the message with which the queue is over its budget.
    IN_HAND = 3 * libvirt_storage.MESSAGE_MAX

    def test_stalled_destination_bounds_what_is_read(self):
        self.set_sizes(window=4 * units.Mi, queue=1 * units.Mi)
        blocked = self.dest.block('stream.send', after=2 * units.Mi)
        outcome = self.start_copy(Content.of(patterned(24 * units.Mi)))
        self.assertTrue(blocked.wait_reached())
        self.wait_until_reader_waits()

        self.assertLessEqual(self.hosts.meter.peak,
                             units.Mi + self.IN_HAND)

        blocked.release()
        self.assertTrue(outcome.wait(30))
        self.assertEqual(24 * units.Mi, outcome.result.length)
        self.assertLessEqual(self.hosts.meter.peak,
                             units.Mi + self.IN_HAND)

    def wait_until_reader_waits(self) -> None:
        """Wait until nothing was received for a while."""
        received = -1
        while received != self.hosts.meter.received:
            received = self.hosts.meter.received
            time.sleep(0.3)

    def test_slow_destination_bounds_what_is_read(self):
        self.set_sizes(window=4 * units.Mi, queue=1 * units.Mi)
        self.dest.slow('stream.send', 0.005)

        self.copy(Content.of(patterned(16 * units.Mi)))

        self.assertLessEqual(self.hosts.meter.peak,
                             units.Mi + self.IN_HAND)

    def test_reader_that_waits_is_let_on_when_half_is_gone(self):
        queue = stream._Queue(4)
        for _index in range(4):
            queue.put(b'x')
        chunks = iter(queue)

        seen = [queue.full]
        for _index in range(4):
            next(chunks)
            seen.append(queue.full)

        self.assertEqual([True, True, False, False, False], seen)

    def test_bounds_of_real_copies(self):
        """The measured figures that the bounds stand for."""
        self.assertEqual(32 * units.Mi, stream.WINDOW_BYTES)
        self.assertLessEqual(stream.QUEUE_BYTES, stream.WINDOW_BYTES)
        self.assertEqual(libvirt_storage.MESSAGE_MAX, stream.RECEIVE_BYTES)
        self.assertEqual(512 * units.Ki, stream.MESSAGE_BYTES)

    def test_two_copies_side_by_side_do_not_mix(self):
        contents = {'one': Content.of(patterned(40 * UNIT)),
                    'two': Content.draw('AB-C' * 10, UNIT)}
        self.set_sizes()
        runs = []
        for name, content in contents.items():
            ends = self.ends(content, name=name)
            thread = libvirt_storage.native_threading().Thread(
                target=stream.copy, args=(*ends, content.size))
            thread.start()
            runs.append(thread)
        self.assertTrue(libvirt_storage.wait_for(
            lambda: not any(run.is_alive() for run in runs)))

        for name, content in contents.items():
            self.assertEqual(
                content, self.dest.volume('disks', name).content)


class BandwidthTestCase(_CopyTestCase):

    def turns(self, bandwidth: stream.Bandwidth, *sizes: int) -> list[float]:
        """What a copy that sends messages of these sizes waits for."""
        turns: list[float] = []
        for _chunk in bandwidth.limit(
                [bytes(size) for size in sizes], turns.append):
            pass
        return turns

    def test_turns_are_as_far_apart_as_the_rate_wants(self):
        bandwidth = stream.Bandwidth(stream.TURN_BYTES // 10)

        turns = self.turns(bandwidth, *[stream.TURN_BYTES] * 4)

        self.assertEqual([10, 10, 10], [
            round(later - turn, 3) for turn, later in zip(turns, turns[1:])])
        self.assertLess(turns[0], time.monotonic())

    def test_turn_lasts_until_its_bytes_are_sent(self):
        turn = stream.TURN_BYTES
        for sizes, count in (
                ([turn // 2] * 4, 2), ([turn * 2 + 1], 3), ([1] * 9, 1),
                ([turn + 1, turn - 1], 2), ([turn + 1, turn], 3)):
            with self.subTest(sizes=sizes):
                self.assertEqual(
                    count, len(self.turns(stream.Bandwidth(1), *sizes)))

    def test_unused_bandwidth_is_lost(self):
        bandwidth = stream.Bandwidth(1000 * stream.TURN_BYTES)
        self.turns(bandwidth, 1)
        time.sleep(0.2)
        now = time.monotonic()

        turn, = self.turns(bandwidth, 1)

        self.assertGreaterEqual(turn, now - stream.SLACK_SECONDS)

    def test_no_limit(self):
        self.assertEqual(
            [], self.turns(stream.Bandwidth(0), *[units.Mi] * 1000))

    def test_copy_takes_the_time_that_the_rate_allows(self):
        bandwidth = stream.Bandwidth(4 * units.Mi)

        result = self.copy(
            Content.of(patterned(2 * units.Mi)), bandwidth=bandwidth)

        self.assertEqual(2 * units.Mi, result.wire)
        # The first turn is at once.
        self.assertGreater(result.seconds, 7 / 8 * 0.5 - 0.06)
        self.assertLess(result.seconds, 5)

    def test_only_data_takes_turns(self):
        turns: list[float] = []

        chunks = [500 * units.Gi, b'A', 300, b'B']
        seen = list(stream.Bandwidth(1).limit(chunks, turns.append))

        self.assertEqual(chunks, seen)
        self.assertEqual(1, len(turns))

    def test_small_messages_get_as_much_as_big_ones(self):
        """Neither of two copies of as much data ends long before the other."""
        bandwidth = stream.Bandwidth(8 * units.Mi)
        sent = {'big': 0, 'small': 0}
        contents = {'big': Content.of(patterned(3 * units.Mi)),
                    'small': Content.draw('A-' * 768, 4096)}
        seen_at_end = []
        native = libvirt_storage.native_threading()
        # A busy machine may start one long after the other.
        both = native.Barrier(2)

        def run(name, content):
            def progress(done, wire):
                if not sent[name]:
                    both.wait(30)
                sent[name] = wire

            stream.copy(
                ContentSource(content), recording_sink.RecordingSink(),
                content.size, progress=progress, bandwidth=bandwidth)
            seen_at_end.append(min(sent.values()))

        runs = [native.Thread(target=run, args=item)
                for item in contents.items()]
        for thread in runs:
            thread.start()
        self.assertTrue(libvirt_storage.wait_for(
            lambda: not any(thread.is_alive() for thread in runs)))

        self.assertEqual({'big': 3 * units.Mi, 'small': 3 * units.Mi}, sent)
        self.assertGreater(seen_at_end[0], units.Mi // 2)

    def test_waiting_for_a_turn_is_no_stall(self):
        """However many copies share the bandwidth, and however small it is."""
        paused = mock.Mock()
        self.set_size('PAUSE_SECONDS', 0.7)

        result = self.copy(
            Content.of(patterned(6 * stream.TURN_BYTES)), stall_seconds=1,
            bandwidth=stream.Bandwidth(4 * stream.TURN_BYTES), paused=paused)

        self.assertGreater(result.seconds, 0.9)
        paused.assert_not_called()

    def test_destination_that_hangs_after_a_turn_is_a_stall(self):
        event = self.block('data', nth=2)
        outcome = self.start_copy(
            Content.of(patterned(6 * stream.TURN_BYTES)), stall_seconds=0.3,
            bandwidth=stream.Bandwidth(2 * stream.TURN_BYTES))

        self.assertTrue(outcome.wait(5))

        self.assertIn('nothing moved for 0.3 seconds', str(outcome.error))
        self.assertEqual('destination', outcome.error.end)
        event.set()
        self.wait_until_threads_end()

    def test_cancel_while_the_copy_waits_for_its_turn(self):
        cancel = threading.Event()
        outcome = self.start_copy(
            Content.draw('A-' * 10, UNIT), cancel=cancel,
            bandwidth=stream.Bandwidth(1))
        self.assertTrue(libvirt_storage.wait_for(lambda: self.progress))

        cancel.set()

        self.assertTrue(outcome.wait(10))
        self.assertIsInstance(outcome.error, errors.Cancelled)


class PauseTestCase(_CopyTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.set_size('PAUSE_SECONDS', 0.3)
        self.paused = mock.Mock()

    def test_copy_that_pauses_says_so_once(self):
        self.delay('data', 1.2)

        self.copy(Content.draw('A-B', UNIT), paused=self.paused)

        self.paused.assert_called_once_with()

    def test_copy_that_is_slow_does_not_pause(self):
        self.delay('data', 0.02)

        self.copy(Content.draw('A-' * 40, UNIT), paused=self.paused)

        self.paused.assert_not_called()


class CopyHubTestCase(_CopyTestCase):

    def test_rest_of_the_process_runs_while_a_send_blocks(self):
        """Neither eventlet's hub nor another thread is held up."""
        self.set_sizes()
        self.delay('data', 2.0, nth=4)
        source, dest = self.ends(Content.of(patterned(4 * WINDOW)))
        ticks = [time.monotonic()]
        stop = threading.Event()

        def tick() -> None:
            while not stop.is_set():
                time.sleep(0.01)
                ticks.append(time.monotonic())

        ticker = threading.Thread(target=tick)
        ticker.start()
        try:
            threads.off_hub(stream.copy, source, dest, 4 * WINDOW)
        finally:
            stop.set()
            ticker.join()

        latest = max(b - a for a, b in zip(ticks, ticks[1:]))
        self.assertGreater(len(ticks), 20)
        # A hub that is held up would be so for as long as the send.
        self.assertLess(latest, 1.8)


@ddt.ddt
class CompareTestCase(VolumeMixin, _CopyTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.set_sizes()

    def compare(self, here: Content, there: Content,
                **kwargs: ty.Any) -> None:
        source = self.open_source(here, 'disk')
        self.dest.add_volume('disks', 'disk', there)
        threads.off_hub(
            stream.compare, source, self.lookup(self.dest, 'disk'), here.size,
            **kwargs)

    @ddt.data('', 'A', 'A-B', '-A-', '---', 'AB-CD--E' * 4)
    def test_same(self, picture):
        content = Content.draw(picture, UNIT)
        self.compare(content, Content.draw(picture, UNIT))

    def test_sizes_of_chunks_do_not_matter(self):
        content = Content.of(patterned(3 * WINDOW + 7))
        self.dest.recv_limit = 1000
        self.compare(content, content)

    @ddt.data((b'a' * UNIT + bytes(2 * UNIT) + b'b', 'hole'),
              (bytes(5 * UNIT), 'all'), (bytes(3), 'few'))
    @ddt.unpack
    def test_it_does_not_matter_which_zeros_are_holes(self, data, _name):
        dense = Content.of(data)
        sparse = Content(len(data))
        for offset, byte in ((0, b'a' * UNIT), (3 * UNIT, b'b')):
            if data[offset:].startswith(byte):
                sparse.write(offset, byte)
        self.compare(dense, sparse)
        self.compare(sparse, dense)

    @ddt.data((0, b'x'), (UNIT, b'x'), (UNIT * 5 - 1, b'x'), (7, bytes(9)))
    @ddt.unpack
    def test_one_difference_is_found(self, offset, data):
        here = Content.draw('A-B-C', UNIT)
        there = Content.draw('A-B-C', UNIT)
        there.write(offset, data)

        error = self.assertRaises(
            errors.CopyError, self.compare, here, there)

        self.assertEqual('destination', error.end)
        self.assertIn('differs', str(error))
        self.assertLessEqual(error.done, offset)
        self.assertLess(offset - error.done, UNIT)

    def test_data_that_came_as_a_hole_is_found(self):
        self.assertRaises(
            errors.CopyError, self.compare,
            Content.draw('AB', UNIT), Content.draw('A-', UNIT))

    def test_volume_that_is_too_short_is_the_destination_s_failure(self):
        error = self.assertRaises(
            errors.CopyError, self.compare,
            Content.draw('AB', UNIT), Content.draw('A', UNIT))
        self.assertEqual('destination', error.end)

    def test_holes_are_cheap(self):
        size = 1 << 40
        self.set_sizes(window=size)
        self.compare(Content(size), Content(size))

    def test_cancel(self):
        cancel = threading.Event()
        cancel.set()
        self.assertRaises(
            errors.Cancelled, self.compare, Content.draw('A', UNIT),
            Content.draw('A', UNIT), cancel=cancel)

    def test_stall(self):
        blocked = self.dest.block('stream.recv')
        error = self.assertRaises(
            errors.CopyError, self.compare, Content.draw('A', UNIT),
            Content.draw('A', UNIT), stall_seconds=0.3)
        self.assertEqual('destination', error.end)
        blocked.release()
        self.wait_until_threads_end()


class MemorySourceTestCase(_CopyTestCase):

    def copy(self, data: bytes, length: int) -> stream.Result:
        return threads.off_hub(
            stream.copy, stream.MemorySource(data), self.sink, length)

    def test_first_bytes_are_copied(self):
        data = patterned(3 * units.Mi + 5)

        result = self.copy(data, len(data) - 3)

        self.assertEqual(Content.of(data[:-3]), self.copied())
        self.assertEqual('memory', result.source)

    def test_nothing(self):
        self.copy(b'', 0)

        self.assertEqual(['finished'], self.outcomes())
        self.assertEqual([], self.events())

    def test_fewer_bytes_than_told(self):
        error = self.assertRaises(errors.CopyError, self.copy, b'hello', 6)

        self.assertEqual('source', error.end)
        self.assertIn('it has 5 bytes', str(error))


class VolumeSinkTestCase(VolumeMixin, _CopyTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.before = Content.of(patterned(8 * UNIT))
        self.dest.add_volume('disks', 'disk', self.before.copy())

    def write(self, picture: str, offset: int, **kwargs: ty.Any) -> int:
        """Copy a picture into a range of the volume; return its wire."""
        content = Content.draw(picture, UNIT)
        return threads.off_hub(
            stream.copy, self.open_source(content, 'disk'),
            self.open_sink(
                offset=offset * UNIT, length=content.size, **kwargs),
            content.size).wire

    def test_range_that_is_not_sparse_leaves_the_rest(self):
        wire = self.write('A0-B--', 1, sparse=False)

        expected = self.before.copy()
        expected.write(
            UNIT, Content.draw('A0-B--', UNIT).read(0, 6 * UNIT))
        self.assertEqual(expected, self.copied())
        self.assertEqual(6 * UNIT, wire)
        upload, = self.uploads()
        self.assertFalse(upload.sparse)
        self.assertEqual(
            (UNIT, 6 * UNIT), (upload.offset, upload.length))

    def test_zeros_for_a_big_hole_are_sent_in_messages(self):
        self.dest.add_volume('disks', 'big', Content(5 * units.Mi + 1))

        threads.off_hub(
            stream.copy, self.open_source(Content(5 * units.Mi + 1), 'disk'),
            self.open_sink('big', sparse=False), 5 * units.Mi + 1)

        upload, = self.uploads()
        self.assertEqual({stream.MESSAGE_BYTES, 1}, {
            length for _kind, _offset, length in upload.events})

    def test_sections(self):
        """Each is an upload, and all but the last one end in data."""
        self.set_size('SECTION_BYTES', 2 * UNIT)
        self.set_size('SECTION_COSTS', 0)
        self.set_size('LONG_MESSAGE_BYTES', 1)
        picture = 'AB-C--DEF---GH-I-'
        self.dest.add_volume('disks', 'disk', Content(len(picture) * UNIT))

        wire = self.write(picture, 0)

        self.assertEqual(Content.draw(picture, UNIT), self.copied())
        self.assertEqual(9 * UNIT, wire)
        uploads = self.uploads()
        self.assertGreater(len(uploads), 2)
        self.assertEqual({'finished'}, set(self.outcomes()))
        end = 0
        for upload in uploads:
            self.assertEqual(
                (end, len(picture) * UNIT - end, True),
                (upload.offset, upload.length, upload.sparse))
            end = upload.position
        self.assertEqual(len(picture) * UNIT, end)
        self.assertEqual({'data'}, {
            upload.events[-1][0] for upload in uploads[:-1]})

    def test_error_tells_what_was_kept(self):
        self.set_size('SECTION_BYTES', 2 * UNIT)
        self.set_size('SECTION_COSTS', 0)
        self.dest.fail('stream.send', after=7 * UNIT, error=DEST_ERROR)

        error = self.assertRaises(
            errors.CopyError, self.write, 'ABCDEFGH', 0)

        *kept, last = self.uploads()
        self.assertEqual('aborted', last.outcome)
        self.assertEqual({'finished'}, {each.outcome for each in kept})
        self.assertEqual(last.offset, error.kept)
        self.assertGreater(error.kept, 0)
        self.assertTrue(error.has_ended)

    def test_sparse_range_at_the_end(self):
        self.dest.add_volume('disks', 'disk', Content(8 * UNIT))

        self.write('A--B--', 2)

        self.assertEqual(Content.draw('--A--B--', UNIT), self.copied())

    def test_upload_that_was_opened_before_is_used(self):
        sink = self.open_sink(length=UNIT, sparse=False)

        threads.off_hub(sink.open)
        upload, = self.uploads()
        self.assertEqual([], upload.events)
        threads.off_hub(
            stream.copy, stream.MemorySource(b'x' * UNIT), sink, UNIT)

        self.assertEqual([upload], self.uploads())
        self.assertEqual(b'x' * UNIT, self.copied().read(0, UNIT))

    def test_upload_that_was_opened_is_aborted_if_cancelled_before(self):
        sink = self.open_sink()
        threads.off_hub(sink.open)
        cancel = threading.Event()
        cancel.set()

        self.assertRaises(
            errors.Cancelled, threads.off_hub, stream.copy,
            stream.MemorySource(b'x'), sink, 1, cancel=cancel)

        self.assertEqual(['aborted'], self.outcomes())

    def test_open_fails(self):
        self.dest.fail('vol.upload', error=DEST_ERROR)

        error = self.assertRaises(
            errors.CopyError, threads.off_hub, self.open_sink().open)

        self.assertEqual(('destination', 0), (error.end, error.done))


class RangesSinkTestCase(VolumeMixin, _CopyTestCase):

    RANGES = [(1, 3), (5, 6), (7, 9)]

    def setUp(self) -> None:
        super().setUp()
        self.before = Content.of(patterned(8 * UNIT))
        self.dest.add_volume('disks', 'disk', self.before.copy())
        self.ranges = [
            (start * UNIT, end * UNIT) for start, end in self.RANGES]

    def write(self, data: bytes, **kwargs: ty.Any) -> stream.Result:
        sink = stream.RangesSink(self.lookup(self.dest, 'disk'), self.ranges)
        return threads.off_hub(
            stream.copy, stream.MemorySource(data), sink, len(data), **kwargs)

    def test_ranges_are_written_and_nothing_else(self):
        data = b'A' * 2 * UNIT + b'\0' * UNIT + b'C' * 2 * UNIT

        result = self.write(data)

        for offset, length, byte in ((1, 2, b'A'), (5, 1, b'\0'),
                                     (7, 2, b'C')):
            self.before.write(offset * UNIT, byte * length * UNIT)
        self.assertEqual(self.before, self.copied())
        self.assertEqual(5 * UNIT, result.wire)
        self.assertEqual(
            [(start, end - start, False) for start, end in self.ranges],
            [(upload.offset, upload.length, upload.sparse)
             for upload in self.uploads()])
        self.assertEqual(
            ['finished'] * 3, [upload.outcome for upload in self.uploads()])

    def test_no_ranges(self):
        self.ranges = []

        self.assertEqual(0, self.write(b'').wire)

        self.assertEqual([], self.uploads())
        self.assertEqual(self.before, self.copied())

    def test_a_message_that_is_longer_than_the_ranges(self):
        self.set_size('LONG_MESSAGE_BYTES', 1 << 30)
        self.ranges = [(number * 100, number * 100 + 1)
                       for number in range(50)]

        self.write(b'x' * 50)

        for start, _end in self.ranges:
            self.before.write(start, b'x')
        self.assertEqual(self.before, self.copied())

    def test_error_tells_the_bytes_of_all_ranges(self):
        for function, fault in (
                ('vol.upload', {'nth': 3}), ('stream.send', {'nth': 3}),
                ('stream.finish', {'nth': 3})):
            with self.subTest(function=function):
                self.dest.fail(function, error=DEST_ERROR, **fault)
                error = self.assertRaises(
                    errors.CopyError, self.write, b'x' * 5 * UNIT)
                self.assertEqual('destination', error.end)
                self.assertIn(error.done, (3 * UNIT, 5 * UNIT))

    def test_cancel(self):
        cancel = threading.Event()
        self.dest.call('stream.send', cancel.set, nth=2)
        self.dest.slow('stream.send', 0.5)

        self.assertRaises(
            errors.Cancelled, self.write, b'x' * 5 * UNIT, cancel=cancel)

        libvirt_storage.wait_for(
            lambda: self.uploads()[-1].outcome is not None, 5)
        self.assertEqual('aborted', self.uploads()[-1].outcome)


@ddt.ddt
class SetLengthTestCase(VolumeMixin, _CopyTestCase):

    @ddt.data(1, UNIT, 3 * UNIT + 5, 8 * UNIT - 1, 8 * UNIT, 20 * UNIT)
    def test_length(self, length):
        before = Content.of(patterned(8 * UNIT))
        self.dest.add_volume('disks', 'disk', before.copy())

        threads.off_hub(
            stream.set_length, self.lookup(self.dest, 'disk'), length)

        before.truncate(length)
        self.assertEqual(before, self.copied())

    def test_failure(self):
        self.dest.add_volume('disks', 'disk', Content(UNIT))
        self.dest.fail('stream.sendHole', error=DEST_ERROR)

        error = self.assertRaises(
            errors.CopyError, threads.off_hub, stream.set_length,
            self.lookup(self.dest, 'disk'), 5)

        self.assertEqual('destination', error.end)
