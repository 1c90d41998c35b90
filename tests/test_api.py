"""The public names, and the page that describes them."""
from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import gdp_mmseg

from helpers import ROOT

PAGE = (ROOT / 'docs' / 'api.md').read_text()


def test_page_describes_every_public_name_and_no_other() -> None:
    rows = re.findall(r'^\| `(\w+)[`(]', PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(gdp_mmseg.__all__)


def test_signatures_on_the_page_are_those_of_the_code() -> None:
    pytest.importorskip('mmseg')
    signatures = re.findall(r'^\| `(\w+)\((.*?)\)`', PAGE, re.MULTILINE)
    assert {'gate', 'save_pruned'} <= {name for name, _ in signatures}
    for name, arguments in signatures:
        given = inspect.signature(getattr(gdp_mmseg, name)).parameters
        named = [one.partition('=')[0] for one in arguments.split(', ')]
        known = [str(one).partition(':')[0] for one in given.values()]
        assert named == known[:len(named)], name


def test_every_public_name_can_be_imported_and_documents_itself() -> None:
    pytest.importorskip('mmseg')
    for name in set(gdp_mmseg.__all__) - {'__version__'}:
        assert inspect.getdoc(getattr(gdp_mmseg, name))
    assert set(gdp_mmseg.__all__) <= set(dir(gdp_mmseg))
    with pytest.raises(AttributeError, match="no attribute 'prune_all'"):
        gdp_mmseg.prune_all


def test_import_alone_loads_no_torch() -> None:
    code = 'import gdp_mmseg, sys; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code],
                          cwd=ROOT).returncode == 0
