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

"""The state of a server's vTPM, which libvirt keeps for the emulator alone.

Nova's code, which finishes and reverts migrations, looks for a saved state in
the instance directory and moves it to where libvirt has it. A state that is
saved here is whole: it gets its name last. Nova's own is not while it is moved
to another file system.

The server is off whenever one of these is called. libvirt gives the state to
the user of the emulator as the server starts.

Nova's privsep changes owners. Call these functions in a green thread: privsep
never wakes up a native one under eventlet.
"""

import filecmp
import os
import shutil

import nova.privsep.path
from nova.virt.libvirt.storage import layout
from nova.virt.libvirt.storage import threads
from nova.virt.libvirt import utils as libvirt_utils

# Directory beside a saved state in which a copy is made.
_PART = 'part'


def keep(places: layout.Layout) -> None:
    """Save the state for a revert, and save it for the resized server.

    Called when the instance directory is kept, see local.keep(). The state is
    whole in one of three places wherever this ends.

    :raises: OSError
    """
    if not os.path.exists(places.vtpm_path):
        return
    save(places, places.saved_vtpm_path)
    save(places, places.kept_path(places.saved_vtpm_path))
    delete(places)


def save(places: layout.Layout, directory: str) -> None:
    """Copy the state of a server that has one, on stable storage.

    :param directory: where to; what an earlier migration left there goes
    :raises: OSError
    """
    if os.path.exists(places.vtpm_path):
        _own(places.vtpm_path)
        _remove(directory)
        threads.off_hub(
            _copy, places.vtpm_path, os.path.join(directory, places.uuid),
            os.path.join(directory, _PART))


def is_saved(places: layout.Layout) -> bool:
    """Whether a state is in the instance directory."""
    return os.path.exists(_saved(places))


def drop_half(places: layout.Layout) -> None:
    """Delete a saved state that is not whole, because nova-compute ended.

    One that has all that is where libvirt has it is whole: the server has not
    run since.

    :raises: OSError
    """
    if is_saved(places) and os.path.exists(places.vtpm_path):
        _own(places.vtpm_path)
        if not _has_all(_saved(places), places.vtpm_path):
            drop_saved(places)


def put_back(places: layout.Layout) -> None:
    """Give the server the saved state, if there is one.

    May end anywhere and be called again.

    :raises: OSError, Invalid
    """
    saved = _saved(places)
    part = os.path.join(places.saved_vtpm_path, _PART)
    _remove(part)
    if os.path.exists(saved):
        delete(places)
        # Nova moves it, maybe to another file system.
        copy = os.path.join(part, places.uuid)
        threads.off_hub(shutil.copytree, saved, copy)
        libvirt_utils.restore_vtpm_dir(copy)
        os.rename(saved, copy)
        _remove(part)


def drop_saved(places: layout.Layout) -> None:
    """Delete the saved state.

    :raises: OSError
    """
    _remove(places.saved_vtpm_path)


def delete(places: layout.Layout) -> None:
    """Delete the state, which belongs to another user.

    :raises: OSError
    """
    path = places.vtpm_path
    if os.path.exists(path):
        _own(path)
        for name in os.listdir(path):
            shutil.rmtree(os.path.join(path, name))
        # The directory above is root's.
        nova.privsep.path.rmdir(path)


def _saved(places: layout.Layout) -> str:
    return os.path.join(places.saved_vtpm_path, places.uuid)


def _has_all(copy: str, original: str) -> bool:
    """Whether a directory has all files of another, with their content."""
    files = [os.path.relpath(os.path.join(directory, name), original)
             for directory, _names, names in os.walk(original)
             for name in names]
    _same, different, missing = filecmp.cmpfiles(
        copy, original, files, shallow=False)
    return not different and not missing


def _own(path: str) -> None:
    nova.privsep.path.chown(
        path, os.geteuid(), os.getegid(), recursive=True)


def _remove(path: str) -> None:
    """Delete a directory in which the emulator's user may own files."""
    if os.path.exists(path):
        _own(path)
        shutil.rmtree(path)


def _copy(source: str, target: str, part: str) -> None:
    """Copy a directory, which gets its name when it is on stable storage.

    :param part: directory to make the copy in
    """
    copy = os.path.join(part, os.path.basename(target))
    shutil.copytree(source, copy)
    for directory, _names, files in os.walk(copy):
        for name in files:
            layout.flush(os.path.join(directory, name))
        layout.flush(directory)
    os.rename(copy, target)
    os.rmdir(part)
    layout.flush(os.path.dirname(target))
    layout.flush(os.path.dirname(os.path.dirname(target)))
