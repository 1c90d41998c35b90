"""The README's lines do what it says, and docs name tests that exist."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

import torch

from helpers import ROOT
from helpers.project import Project, run_tool


def _drop_in() -> str:
    """The Python block that turns a user's config into a gated one."""
    readme = (ROOT / 'README.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S)
    found = [
        block for block in blocks
        if 'gdp_mmseg.GDPModel' in block and '_base_' in block
    ]
    return found[0] if found else ''


def test_readme_prints_the_drop_in_lines() -> None:
    block = _drop_in()
    assert 'gdp_mmseg.GDPHook' in block
    assert re.search(r"^_base_ = '[^']+'$", block, re.M)


def test_drop_in_lines_train_as_printed(project: Project,
                                        tmp_path: Path) -> None:
    block, found = re.subn(
        r"^_base_ = '[^']+'$",
        f'_base_ = {str(project.dense)!r}',
        _drop_in(),
        flags=re.M)
    assert found == 1
    config = tmp_path / 'mine.py'
    config.write_text(block)
    outcome = run_tool(
        'train.py',
        config,
        '--work-dir',
        tmp_path / 'out',
        '--cfg-options',
        'train_cfg.max_iters=2',
        'model.gdp.gate_travel=1',
        cwd=tmp_path)
    assert outcome.status == 0, outcome.stderr
    state = torch.load(
        tmp_path / 'out/iter_2.pth', map_location='cpu',
        weights_only=False)['state_dict']
    # The hook was there at both steps.
    assert int(state['gdp.gates.observed']) == 2


NAMED_TEST = re.compile(r'(test_\w+\.py)::(test_\w+)(?:\[([^\]]+)\])?')


def test_tables_of_features_name_tests_that_exist() -> None:
    page = (ROOT / 'docs' / 'reliability.md').read_text()
    tables = re.findall(r'^\|[^\n]*\| test \|\n\|[-:|]+\n((?:\|.*\n)+)', page,
                        re.M)
    rows = [row for table in tables for row in table.splitlines()]
    assert rows
    for row in rows:
        named = NAMED_TEST.findall(row)
        assert named, f'no test holds: {row}'
        for file, function, case in named:
            path, = (ROOT / 'tests').rglob(file)
            tree = ast.walk(ast.parse(path.read_text()))
            names = {
                node.name if isinstance(node, ast.FunctionDef) else node.value
                for node in tree
                if isinstance(node, (ast.FunctionDef, ast.Constant))
            }
            assert {function, case or function} <= names, row
