"""Tables of groups: long lists of modules are short, reasons are whole."""
from __future__ import annotations

import pytest

pytest.importorskip('mmseg')

from mmengine.config import Config
from mmengine.registry import init_default_scope

from gdp_mmseg.cli.groups import describe, show
from gdp_mmseg.engine.config import ModelConfig

from helpers.project import Project


def test_modules_are_cut_short_and_reasons_are_not(
        capsys: pytest.CaptureFixture[str]) -> None:
    reason = "not exact (RuntimeError: shape '[1, 3, 4]' is invalid)"
    show(
        dict(
            input_shape=[1, 3, 8, 8],
            macs=10**9,
            gates=4,
            groups=[
                dict(
                    writers=['a', 'b', 'c'],
                    readers=['d'],
                    channels=4,
                    flops_share=0.75),
                dict(
                    writers=['d'],
                    readers=['e'],
                    channels=5,
                    flops_share=0.125)
            ],
            fixed_flops_share=0.125,
            frozen=[dict(reason=reason, writers=['d', 'e'], channels=8)]))
    text = capsys.readouterr().out
    assert '| a and 2 more ' in text and 'd and 1 more' in text
    assert reason in text
    # Rows of the table: groups, what has no gate, and the total.
    cells = [[cell.strip() for cell in line.split('|')[1:-1]]
             for line in text.splitlines() if line.startswith('| ')]
    assert [row[-2:] for row in cells[1:5]] == [['4', '75.0%'], ['5', '12.5%'],
                                                ['', '12.5%'], ['9', '100.0%']]


def test_shares_of_a_model_add_up(project: Project) -> None:
    init_default_scope('mmseg')
    found = describe(ModelConfig.of(Config.fromfile(project.gated)))
    assert found['fixed_flops_share'] == 0
    assert sum(group['flops_share']
               for group in found['groups']) == pytest.approx(1)
    found = describe(
        ModelConfig.of(
            Config.fromfile(
                project.config(
                    'ignoring',
                    "model = dict(gdp=dict(ignore=['backbone.layer4.*']))"))))
    assert 0.1 < found['fixed_flops_share'] < 1
    assert sum(group['flops_share'] for group in found['groups']
               ) + found['fixed_flops_share'] == pytest.approx(1)


def test_gates_of_another_method_can_be_shown(project: Project) -> None:
    init_default_scope('mmseg')
    config = ModelConfig.of(Config.fromfile(project.gated))
    plain, found = describe(config), describe(config, 'scp')
    assert 0 < found['gates'] < plain['gates']
    assert found['fixed_flops_share'] < 0.2
    more = [row for row in found['frozen'] if row not in plain['frozen']]
    assert more and all(row['reason'].startswith('part of a sum')
                        for row in more)
    assert sum(row['channels'] for row in more) + found['gates'] == (
        plain['gates'])
