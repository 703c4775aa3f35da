"""Sphinx settings: MyST Markdown, the furo theme, API pages from docstrings."""

from kvbm import __version__

project = "kvbm"
author = "The kvbm developers"
copyright = "The kvbm developers, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # "(num_blocks,) int32, host" is a description of an array, not a name to link
suppress_warnings = ["ref.python"]  # the same words in attributes' types match attributes of several classes
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_type_aliases = {"HashArray": "HashArray", "IdArray": "IdArray"}

html_theme = "furo"
html_title = f"kvbm {release}"
