"""Configuration of the documentation site, which `make docs` builds.

The pages are written for a code host. So they link to files outside of docs/,
where README, CONTRIBUTING and CHANGELOG lie too: `index.md`, `contributing.md`
and `changelog.md` include these, and links are changed accordingly. Formulas
become MathML, which browsers show without a script.
"""
from __future__ import annotations

import inspect
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gdp_mmseg import __version__  # noqa: E402

project = 'gdp_mmseg'
author = copyright = 'gdp_mmseg contributors'
version = release = __version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'gdp_mmseg {__version__}'
html_show_sourcelink = False
html_math_renderer = 'mathml'

# The docstrings are read without the libraries of the package.
autodoc_mock_imports = [
    'matplotlib', 'mmcv', 'mmengine', 'mmpretrain', 'mmseg', 'numpy', 'scipy',
    'torch'
]
# The registries too, as a mocked decorator would replace the hooks.
registry: Any = ModuleType('gdp_mmseg.registry')
registry.HOOKS = registry.MODELS = registry.OPTIM_WRAPPERS = SimpleNamespace(
    register_module=lambda **_: lambda found: found)
sys.modules[registry.__name__] = registry
# Types stand in the docstrings.
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_numpy_docstring = False

myst_enable_extensions = ['dollarmath']
# Links to sections, as a code host makes them.
myst_heading_anchors = 3
myst_fence_as_directive = ['math']

# Pages of the site that are files of the top folder.
TOP_PAGES = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md'
}
# The target of a link to a file: neither an address nor a section of the page.
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)[^)\s#]+')


def relink(text: str, folder: str) -> str:
    """Change the links of a text to what they are from docs/.

    Args:
        text (str): Text of a page.
        folder (str): Folder of the page in the repository.
    """

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[0]))
        if path in TOP_PAGES:
            return TOP_PAGES[path]
        return posixpath.relpath(path, 'docs')

    return LINK.sub(target, text)


def relink_page(_: Sphinx, __: str, content: list[str]) -> None:
    """Change the links of a page in docs/."""
    content[0] = relink(content[0], 'docs')


def relink_included(_: Sphinx, __: Path, ___: str, content: list[str]) -> None:
    """Change the links of a page in the top folder."""
    content[0] = relink(content[0], '')


def constructor(_: Sphinx, what: str, __: str, described: Any, ___: Any,
                *signature: str) -> tuple[str, ...]:
    """Show the arguments of a class, which a mocked base class hides."""
    if what != 'class' or '__init__' not in vars(described):
        return signature
    parameters = inspect.signature(described.__init__).parameters.values()
    shown = [
        one.replace(annotation=one.empty) for one in parameters
        if one.name != 'self'
    ]
    return str(inspect.Signature(shown)), ''


def inline_formula(visitor: nodes.NodeVisitor, node: nodes.math) -> None:
    """Write a formula within a line."""
    visitor.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_formula(visitor: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    # The space keeps the theme from showing a scroll bar beside it.
    formula = convert(node.astext(), display='block')
    visitor.body.append(f'<div style="padding: 0.5em 0">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the functions of this file."""
    app.connect('source-read', relink_page)
    app.connect('include-read', relink_included)
    app.connect('autodoc-process-signature', constructor)
    app.add_html_math_renderer('mathml', (inline_formula, None),
                               (block_formula, None))
