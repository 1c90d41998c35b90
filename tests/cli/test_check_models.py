"""What tools/check_models.py says of a config of one's own."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')
from helpers import TOOLS
from helpers.project import NAME, Project, run_program, run_tool

HEAD = "model = dict(decode_head=dict(type='{}'))"


@pytest.fixture(scope='module')
def rows(project: Project,
         tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A row for each of four configs, from one command line beside them."""
    folder = tmp_path_factory.mktemp('rows')
    configs = [
        project.dense,
        project.gated,
        project.config('unknown', HEAD.format('NoSuchHead'), project.dense),
        project.config(
            'nothing', "model = dict(backbone=dict(type='torch.nn.Identity', "
            '_delete_=True))', project.dense),
    ]
    run_program(
        TOOLS / 'check_models.py',
        *(config.relative_to(project.folder) for config in configs),
        '--json',
        folder / 'rows.json',
        cwd=project.folder)
    found = json.loads((folder / 'rows.json').read_text())
    return {Path(row['config']).stem: row for row in found}


@pytest.mark.parametrize('config', ['my_config', NAME])
def test_model_that_works(rows: dict[str, Any], config: str) -> None:
    row = rows[config]
    assert row['status'] == 'works', row
    assert row['rel_diff'] <= 1e-5 and row['rel_diff_fp64'] <= 1e-8
    assert row['effect'] > 1e-3
    assert 0.9 < row['prunable_channels'] < 1
    assert 0.9 < row['prunable_macs'] < 1
    assert row['frozen'] == [] and row['seconds'] > 0 and row['peak_gib'] > 0


def test_model_that_cannot_be_built_says_why(rows: dict[str, Any]) -> None:
    row = rows['unknown']
    assert row['status'] == 'unbuilt' and 'NoSuchHead' in row['reason']


def test_model_that_is_refused_says_why(rows: dict[str, Any]) -> None:
    row = rows['nothing']
    assert row['status'] in ('refused', 'unbuilt') and row['reason']


def test_missing_config_is_one_line(tmp_path: Path) -> None:
    outcome = run_tool('check_models.py', 'absent.py', cwd=tmp_path)
    assert outcome.status == 2
    assert 'expected a config file, but got absent.py' in outcome.stderr
