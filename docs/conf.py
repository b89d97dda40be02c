"""How the documentation is built: without the network, and to pages that load nothing from it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

from weightsmith._version import __version__  # noqa: E402

project = "weightsmith"
author = "The weightsmith authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "pages"]
exclude_patterns = ["_build"]
default_role = "code"
smartquotes_action = "D"  # dashes only; quotes stay as they are typed in code
nitpicky = False
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
toc_object_entries = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "weightsmith"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["weightsmith.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "native"
