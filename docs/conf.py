"""Sphinx configuration. Build the site with `bash scripts/docs`; it is written to build/docs."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "unmask"
copyright = "the authors of unmask, Apache-2.0"
version = release = installed("unmask")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "command_reference", "api_reference"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_ext"]

html_theme = "furo"
html_title = "unmask"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
default_role = "code"
python_maximum_signature_line_length = 88
add_module_names = False
highlight_language = "none"
smartquotes = False  # smart quotes would turn the two hyphens of --option into a dash
