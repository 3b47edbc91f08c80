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

"""What the documentation says of the code is so."""

import ast
import collections
import configparser
import csv
from importlib import metadata
import pathlib
import re
import sys

from docutils import core
from docutils import nodes
import testtools

ROOT = pathlib.Path(__file__).resolve().parents[5]
PAGE = ROOT / 'doc/source/admin/troubleshooting.rst'
CONTRIBUTOR = ROOT / 'doc/source/contributor/index.rst'
ENVIRONMENTS = CONTRIBUTOR.with_name('environments.csv')
OPERATIONS = ROOT / 'doc/source/admin/operations.rst'
TRANSPORTS = ROOT / 'doc/source/admin/transports.rst'

# Environments that test nothing.
NO_TESTS = {'bench', 'bench-off', 'genconfig', 'plots'}

# The messages here are not ours.
LIBVIRT = 'Messages of libvirt'

# Stands for what differs from one message to the next.
ANY = '<>'


def read_terms(page):
    """The messages that a page explains, by its sections."""
    tree = core.publish_doctree(
        page.read_text(), settings_overrides={'report_level': 5})
    return {section.next_node(nodes.title).astext():
            [term.astext() for term in section.findall(nodes.term)]
            for section in tree.findall(nodes.section)}


def read_strings():
    """Every string in the code, with ANY for what is put in."""
    for path in sorted((ROOT / 'nova/virt').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r'%(\(\w+\))?[ds]', ANY, node.value)
            elif isinstance(node, ast.JoinedStr):
                yield ''.join(
                    part.value if isinstance(part, ast.Constant) else ANY
                    for part in node.values)


def find_modules():
    """The paths of all modules, tests aside."""
    return {path for path in (ROOT / 'nova').rglob('*.py')
            if 'tests' not in path.relative_to(ROOT).parts and
            path.stat().st_size}


def read_imports(path):
    """The modules that a module imports, and what it takes from some."""
    return {
        f'{node.module}.{name.name}' if isinstance(node, ast.ImportFrom)
        else name.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names}


def read_modules():
    """The modules in the order in which the documentation lists them."""
    modules = []
    for line in re.findall('^``.*\\.py``$', CONTRIBUTOR.read_text(), re.M):
        directory = None
        for name in re.findall('``(.*?)``', line):
            path = ROOT / name if '/' in name else directory / name
            directory = path.parent
            modules.append(path)
    return modules


def find_environments(tox):
    """The names of tox's environments, those in braces one by one."""
    for section in tox.sections():
        kind, _colon, name = section.partition(':')
        if kind == 'testenv' and name:
            before, *rest = re.split('[{}]', name)
            releases, after = rest or ('', '')
            for release in releases.split(','):
                yield before + release + after


def read_tests():
    """The names of tests with Nova's services, inherited ones included."""
    bases = collections.defaultdict(list)
    found = collections.defaultdict(set)
    for kind in ('live', 'cloud', 'cloud_full', 'stock',
                 'functional/libvirt'):
        for path in (ROOT / 'nova/tests' / kind).glob('test_*.py'):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    bases[node.name] += [
                        ast.unparse(base).rpartition('.')[2]
                        for base in node.bases]
                    found[node.name] |= {
                        each.name for each in node.body
                        if isinstance(each, ast.FunctionDef)}

    def add_inherited(name):
        for base in bases.pop(name, []):
            if base in found:
                add_inherited(base)
                found[name] |= found[base]

    for name in found:
        add_inherited(name)
    return {f'{name}.{test}' for name, tests in found.items()
            for test in tests}


def read_literals(page):
    """What is marked as code in the tables of a page."""
    tree = core.publish_doctree(page.read_text())
    return {literal.astext() for entry in tree.findall(nodes.entry)
            for literal in entry.findall(nodes.literal)}


class OperationsTestCase(testtools.TestCase):

    def test_tests_are_there(self):
        named = read_literals(OPERATIONS)
        self.assertGreater(len(named), 10)
        self.assertEqual(set(), named - read_tests())

    def test_no_cell_is_without_a_test(self):
        tree = core.publish_doctree(OPERATIONS.read_text())
        rows = [row for body in tree.findall(nodes.tbody)
                for row in body.findall(nodes.row)]
        self.assertGreater(len(rows), 20)
        for row in rows:
            operation, *cells = row.findall(nodes.entry)
            for cell in cells:
                self.assertTrue(
                    list(cell.findall(nodes.literal)) or
                    cell.astext() in ('not applicable', 'as raw'),
                    operation.astext())


class TransportsTestCase(testtools.TestCase):

    def test_tests_are_there(self):
        named = {text for text in read_literals(TRANSPORTS)
                 if '.test_' in text}
        self.assertGreater(len(named), 10)
        self.assertEqual(set(), named - read_tests())


class ContributorTestCase(testtools.TestCase):

    def test_modules_are_named_and_import_down_the_list(self):
        modules = read_modules()
        self.assertEqual(find_modules(), set(modules))
        names = ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
                 for path in modules]
        for place, path in enumerate(modules):
            self.assertEqual(
                set(), read_imports(path) & set(names[:place]), path)

    def test_environments_are_listed(self):
        with ENVIRONMENTS.open(newline='') as table:
            when = {row['Environment'].strip('`'): row['When']
                    for row in csv.DictReader(table)}
        tox = configparser.ConfigParser(interpolation=None)
        tox.read(ROOT / 'tox.ini')
        self.assertEqual(
            re.findall(r'[\w-]+', tox['tox']['envlist']),
            [name for name, each in when.items() if each == 'always'])
        self.assertEqual(
            set(find_environments(tox)) - NO_TESTS, set(when))


class RequirementsTestCase(testtools.TestCase):

    def test_each_library_that_is_imported_is_required(self):
        required = {
            re.split(r'[<>=!~]', line)[0].lower()
            for line in (ROOT / 'requirements.txt').read_text().splitlines()}
        owners = metadata.packages_distributions()
        tops = {name.partition('.')[0] for path in find_modules()
                for name in read_imports(path)}
        for top in tops - sys.stdlib_module_names - {'nova'}:
            # Python 3.10 does not know the owners of some.
            names = {name.lower() for name in owners.get(top, [top])}
            self.assertTrue(names & required, f'{top}: {names}')


class TroubleshootingTestCase(testtools.TestCase):

    def test_messages_are_in_the_code(self):
        strings = list(read_strings())
        terms = read_terms(PAGE)
        self.assertIn(LIBVIRT, terms)
        del terms[LIBVIRT]
        messages = [term for each in terms.values() for term in each]
        self.assertGreater(len(messages), 20)
        for message in messages:
            text = re.sub('<.*?>', ANY, message)
            self.assertTrue(
                any(text in string for string in strings),
                f'no message in the code is: {message}')
