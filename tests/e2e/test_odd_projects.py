"""Odd projects are refused at their start, or go all the way."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.engine import model
from gdp_mmseg.export import export
from gdp_mmseg.export.compare import Comparison

from helpers.odd_check import check
from helpers.odd_projects import PROPERTIES, draw

# Results by seed. Together the projects have every property.
SEEDS = {
    2: 'trained',
    3: 'trained',
    5: 'trained',
    9: 'trained',
    17: 'trained',
    42: 'trained',
    44: 'trained',
    52: 'trained',
    62: 'trained',
    64: 'trained',
    # It resizes in float32, and amplifies the rounding of single precision.
    175: 'trained',
    # Its averaged network makes the predictions, and has no gates.
    10: 'refused',
}
# A project whose prediction compares features; the logits do not.
READER = 29


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed', SEEDS)
def test_project_is_refused_at_its_start_or_goes_all_the_way(
        seed: int, tmp_path: Path) -> None:
    outcome = check(draw(seed), tmp_path)
    assert outcome.result == SEEDS[seed], outcome


def test_seeds_have_every_property() -> None:
    assert set().union(*(draw(seed).properties
                         for seed in SEEDS)) == set(PROPERTIES)


def test_a_seed_gives_the_same_project_each_time() -> None:
    one, other = draw(3), draw(3)
    assert one.properties == other.properties
    assert one.config.to_dict() == other.config.to_dict()


@pytest.mark.filterwarnings('ignore')
def test_unverified_predictions_are_found_to_differ(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = model.verify

    def verify_logits(network: Any, analysis: Analysis, *args: Any) -> Any:
        # A gate at a norm would act on the prediction too.
        return verify(network, analysis.at_layers(), *args[:2])

    monkeypatch.setattr(model, 'verify', verify_logits)
    monkeypatch.setattr(export, 'compare',
                        lambda *_, **__: Comparison(0., 'nothing'))
    monkeypatch.setattr(export, 'check_metrics', lambda *_: None)
    project = draw(READER)
    # The prediction reads channels that would have left the training.
    project.config.model.gdp.shrink = False
    outcome = check(project, tmp_path)
    assert (outcome.result, outcome.kind) == ('failed', 'prediction')


def test_report_counts_equal_causes_together() -> None:
    from odd_projects import markdown

    def row(seed: int, result: str, message: str = '') -> dict[str, Any]:
        return dict(
            seed=seed,
            result=result,
            kind='export' if result == 'failed' else '',
            message=message,
            properties=['residual'])

    refusal = 'ValueError: gdp.target: expected more than {}; raise it'
    text = markdown(
        dict(
            machine='x86_64',
            torch='2',
            iterations=10,
            num_properties=60,
            projects=[
                row(0, 'trained'),
                row(1, 'refused', refusal.format(0.5063)),
                row(2, 'refused', refusal.format(0.7)),
                row(3, 'failed', 'RuntimeError: expected equal outputs')
            ]))
    lines = [
        line.split('|')[1:-1] for line in text.splitlines() if '|' in line
    ]
    cells = {left.strip(): right.strip() for left, right in lines}
    assert cells['gdp.target: expected more than N'] == '2'
    assert cells['export: expected equal outputs'] == '1'
