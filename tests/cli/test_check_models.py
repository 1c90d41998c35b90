"""Rows of tools/check_models.py for one's own configs and stock backbones."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')
from mmengine.config import Config
from torch import Tensor, nn

from gdp_mmseg.cli.check import Candidate, _build, check_candidate
from gdp_mmseg.cli.rows import COLUMNS, cells_of

import check_models
from helpers import TOOLS
from helpers.project import NAME, Project, run_program, run_tool
from models_page import markdown, summary
from stock_backbones import check_backbone, stock

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


@pytest.mark.parametrize('options, shapes', [
    ({}, [(3, 128, 128), (3, 64, 64)]),
    ({
        'model.backbone.in_channels': 1
    }, [(1, 128, 128), (1, 64, 64)]),
    ({
        'model.gdp.input_shape': (4, 64, 96),
        'model.backbone.in_channels': 4
    }, [(4, 128, 128), (4, 64, 96)]),
])
def test_input_has_the_bands_of_the_model(project: Project, options: dict[str,
                                                                          Any],
                                          shapes: list[tuple]) -> None:
    cfg = Config.fromfile(project.gated)
    cfg.merge_from_dict(options)
    assert _build(cfg).shapes == shapes


class Single(nn.Module):
    """Model with a forward that computes in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self,
                inputs: Tensor,
                data_samples: Any = None,
                mode: str = 'tensor') -> Tensor:
        return self.last(self.first(inputs).relu().float())


def test_model_in_single_precision_is_compared_there() -> None:
    row = check_candidate('single', '',
                          lambda: Candidate(Single(), [(3, 16, 16)]))
    assert row['status'] == 'works' and row['rel_diff_fp64'] is None
    assert cells_of(row)[COLUMNS.index('random weights, fp64')] == (
        'does not run')


def test_unexpected_error_is_faulty(monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(*args: Any) -> None:
        raise RuntimeError('broken')

    monkeypatch.setattr('gdp_mmseg.engine.model.analyse_model', broken)
    row = check_candidate('broken', '',
                          lambda: Candidate(Single(), [(3, 16, 16)]))
    assert row['status'] == 'wrong'
    assert row['reason'] == 'RuntimeError: broken'


def test_process_that_dies_is_refused() -> None:
    row = check_models.check_apart(lambda name: os._exit(3), 'a.py', 'a')
    assert row['status'] == 'refused'
    assert row['reason'] == 'the process ended with 3'


def test_process_beyond_its_time_is_refused(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_models, 'LIMIT_SECONDS', 0.1)
    row = check_models.check_apart(lambda name: time.sleep(60), 'a.py', 'a')
    assert row['status'] == 'refused'
    assert row['reason'] == 'no result within 0.1 s'


# -- stock backbones --------------------------------------------------------


def test_backbone_under_a_segmentation_head() -> None:
    pytest.importorskip('mmpretrain')
    row = check_backbone('mmpretrain/ResNet')
    assert row['status'] == 'works' and row['side'] == 64
    assert row['library'].startswith('mmpretrain ')


def test_classifier_of_torchvision() -> None:
    row = check_backbone('torchvision/mnasnet0_5')
    assert row['status'] == 'works' and row['prunable_macs'] > 0.9


def test_backbone_of_timm() -> None:
    pytest.importorskip('timm')
    row = check_backbone('timm/resnet18')
    assert row['status'] == 'works' and row['prunable_macs'] > 0.9


def test_sweep_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch,
                                      tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    names = stock()
    checked = []

    def check_apart(check_one: check_models.Check, name: str,
                    family: str) -> dict[str, Any]:
        checked.append(name)
        return dict(config=name, family=family, status='refused', reason='-')

    monkeypatch.setattr(check_models, 'check_apart', check_apart)
    report = tmp_path / 'backbones.json'
    check_models.check_backbones([names[3]], report)
    rows = check_models.check_backbones([], report)
    assert checked == [names[3], *names[:3], *names[4:]]
    written = json.loads(report.read_text())
    assert [row['config']
            for row in written] == names == [row['config'] for row in rows]


def test_unknown_backbone_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip('mmpretrain')
    with pytest.raises(ValueError, match='but got timm/none'):
        check_models.check_backbones(['timm/none'], tmp_path / 'rows.json')


def test_page_has_a_section_for_each_library() -> None:
    rows = [
        dict(
            config=name,
            family=name.partition('/')[2],
            status='refused',
            reason='too large',
            library='some 1.0') for name in ('timm/a', 'torchvision/b')
    ]
    page = markdown([], rows)
    assert page.count('### some 1.0') == 2
    assert '0 of 1 backbones are pruned exactly. Refused: a.' in page


def test_summary_names_models_with_little_to_prune() -> None:
    rows = [
        dict(config=f'x/{name}', family=name, status='part', prunable_macs=sh)
        for name, sh in (('some', 0.5), ('little', 0.004))
    ]
    assert summary(rows, 'backbones').endswith(
        'Exact, but with less than 1% of the FLOPs to prune: little.')
