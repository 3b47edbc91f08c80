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

"""Link the modules of this repository into the installed Nova.

The package ``tools`` is linked beside it, for the tests, which import it.

For development: Nova is a regular package, so that pip's editable mode can
not add modules to it. Run it with the Python of the environment in which Nova
is installed; ``--undo`` takes the links out again.
"""

import argparse
import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = 'tools'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--undo', action='store_true')
    arguments = parser.parse_args()
    site = installed_nova().parent
    remove_links(site)
    if not arguments.undo:
        add_links(site)


def installed_nova() -> pathlib.Path:
    """The directory of the installed package ``nova``."""
    spec = importlib.util.find_spec('nova')
    if spec is None or spec.origin is None:
        raise SystemExit('Nova is not installed in this environment.')
    return pathlib.Path(spec.origin).parent


def remove_links(site: pathlib.Path) -> None:
    """Remove links into this repository, also those of deleted modules."""
    for path in (site / TOOLS, *(site / 'nova').rglob('*.py')):
        if path.is_symlink() and ROOT in path.readlink().parents:
            path.unlink()


def add_links(site: pathlib.Path) -> None:
    """Link each module to where it belongs in Nova's tree.

    :raises: SystemExit if Nova has a file there
    """
    for source in (ROOT / TOOLS, *sorted((ROOT / 'nova').rglob('*.py'))):
        link = site / source.relative_to(ROOT)
        if link.exists():
            raise SystemExit(f'{link} is in the way.')
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)


if __name__ == '__main__':
    main()
