#!/bin/sh
# Check the types of our modules. mypy refuses to read them where they are
# installed, and finds no Nova around them where they are written; so it gets
# the installed package, with the links to ours in it, under another path.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
# tox has an environment of its own first in the path.
PATH=$root/.tox/nova/bin:$PATH
nova=$(cd / && python -c 'import nova; print(nova.__path__[0])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$nova" "$work/nova"
modules=$(git ls-files nova/storage_migrate.py 'nova/cmd/*.py' \
    'nova/conf/*.py' 'nova/privsep/*.py' 'nova/virt/*.py')
cd "$work"
# shellcheck disable=SC2086
mypy --config-file "$root/setup.cfg" --cache-dir "$root/.mypy_cache" $modules
cd "$root"
mypy --cache-dir "$root/.mypy_cache/tools" tools
