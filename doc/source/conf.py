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

"""Sphinx configuration; ``tox -e docs`` builds the documentation."""

import configparser
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]

_metadata = configparser.ConfigParser()
_metadata.read(ROOT / 'setup.cfg')

project = _metadata['metadata']['name']
version = release = _metadata['metadata']['version']
author = copyright = 'The nova-storage-migrate authors'

extensions = [
    'openstackdocstheme',
    'oslo_config.sphinxconfiggen',
    'oslo_config.sphinxext',
    'reno.sphinxext',
    'sphinx.ext.graphviz',
]

graphviz_output_format = 'svg'

# The entry point in setup.cfg provides the options.
config_generator_config_file = str(
    ROOT / 'etc/nova/nova-storage-migrate-config-generator.conf')
sample_config_basename = '_static/nova-storage-migrate'

html_theme = 'openstackdocs'
html_static_path = ['_static']
html_theme_options = {'display_badge': False}
openstackdocs_auto_name = False
openstackdocs_auto_version = False
pygments_style = 'native'
