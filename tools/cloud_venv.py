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

"""The virtual environment of the small cloud: made once, then reused.

It lies outside any home directory, and is made with Debian's own Python,
because nova-compute runs in it as the unprivileged user nova. NOVA_LAB_RELEASE
chooses the release of Nova; the other services are the same for all.
"""

import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile

PYTHON = '/usr/bin/python3'
TOOLS = Path(__file__).resolve().parent
REPOSITORY = TOOLS.parent
REQUIREMENTS = TOOLS / 'cloud-requirements.txt'
# Nova's versions by release, the newest last.
VERSIONS = dict(
    line.split()
    for line in (TOOLS / 'nova-versions.txt').read_text().splitlines()
    if not line.startswith('#'))
NEWEST = list(VERSIONS)[-1]
RELEASE = os.environ.get('NOVA_LAB_RELEASE', NEWEST)
BASE = os.environ.get('NOVA_LAB_VENV') or '/var/lib/nova-lab-venv'
ROOT = Path(BASE if RELEASE == NEWEST else f'{BASE}-{RELEASE}')


def program(name: str, root: Path = ROOT) -> str:
    """The full path of a program of the environment."""
    return str(root / 'bin' / name)


def fingerprint(requirements: Path = REQUIREMENTS) -> str:
    """What the environment has to be made anew for when it changes."""
    wanted = [requirements.read_text(), *nova(requirements)]
    return hashlib.sha256('\n'.join(wanted).encode()).hexdigest()


def nova(requirements: Path = REQUIREMENTS) -> list[str]:
    """The requirement of Nova, in an environment that holds Nova."""
    return ([f'nova=={VERSIONS[RELEASE]}'] if requirements == REQUIREMENTS
            else [])


def ensure(root: Path = ROOT, requirements: Path = REQUIREMENTS) -> bool:
    """Make the environment where it is missing or of other requirements.

    :returns: True where something was installed.
    """
    stamp = root / 'requirements.sha256'
    if stamp.is_file() and stamp.read_text() == fingerprint(requirements):
        return False
    if not os.access(program('python', root), os.X_OK):
        subprocess.run([PYTHON, '-m', 'venv', str(root)], check=True)
    shutil.rmtree(root / 'databases', ignore_errors=True)
    pip('install', '--upgrade', 'pip', 'setuptools', 'wheel', root=root)
    pip('install', '--requirement', str(requirements), *nova(requirements),
        root=root)
    stamp.write_text(fingerprint(requirements))
    return True


def install_project() -> None:
    """Install this repository, as it is now, beside the environment's Nova.

    It is built from a copy: setuptools leaves its traces where it builds, and
    takes what an earlier build left there.
    """
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / 'copy'
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(
            '.*', 'build', '*.egg-info', '__pycache__'))
        pip('install', '--no-deps', '--no-build-isolation',
            '--force-reinstall', str(copy))
    packages = next(ROOT.glob('lib/python3*/site-packages'))
    for name in ('lab_compute.py', 'lab_keys.py'):
        shutil.copy(TOOLS / name, packages)


def pip(*arguments: str, root: Path = ROOT) -> None:
    """Run pip in the environment; its output is shown only where it fails."""
    argv = [program('python', root), '-m', 'pip', '--quiet',
            '--disable-pip-version-check', '--no-input', *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise RuntimeError(f'{" ".join(argv)}: status {done.returncode}')


def reexec(module: str) -> None:
    """Go on in the environment's Python, where that is not the case yet.

    :param module: the one of tools that runs
    """
    if Path(sys.prefix) != ROOT:
        os.environ['PYTHONPATH'] = str(REPOSITORY)
        os.execv(program('python'), [program('python'), '-P', '-m',
                                     f'tools.{module}', *sys.argv[1:]])


if __name__ == '__main__':
    ensure()
    install_project()
