"""Odd projects are refused at their start, or go all the way."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmseg')

from gdp_mmseg.engine import model
from gdp_mmseg.export import export
from gdp_mmseg.export.compare import Comparison

from helpers.odd_check import check
from helpers.odd_projects import PROPERTIES, draw

# Together they have every property.
SEEDS = {
    4625: 'trained',
    3681: 'trained',
    9: 'trained',
    1965: 'trained',
    2400: 'trained',
    2097: 'trained',
    5814: 'trained',
}
# Its predictions read features that the logits do not need.
READER = 20


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed', SEEDS)
def test_project_is_refused_at_its_start_or_goes_all_the_way(
        seed: int, tmp_path: Path) -> None:
    outcome = check(draw(seed), tmp_path)
    assert (outcome.result, outcome.kind,
            outcome.message[:0]) == (SEEDS[seed], '', ''), outcome


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

    def verify_logits(*args: Any) -> Any:
        return verify(*args[:4])

    monkeypatch.setattr(model, 'verify', verify_logits)
    monkeypatch.setattr(export, 'compare',
                        lambda *_, **__: Comparison(0., 'nothing'))
    monkeypatch.setattr(export, 'check_metrics', lambda *_: None)
    outcome = check(draw(READER), tmp_path)
    assert (outcome.result, outcome.kind) == ('failed', 'prediction')
