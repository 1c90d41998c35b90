"""Verdict on a network that lost half of its channels."""
from __future__ import annotations

from typing import Any

import pytest

from gdp_mmseg.surgery.random_half import is_right


def found(single: float, double: float | None, **others: float) -> Any:
    """Result of a comparison whose other numbers are good."""
    return dict(
        dict(
            rel_diff=single,
            rel_diff_fp64=double,
            rel_diff_built=0.,
            effect=1.), **others)


@pytest.mark.parametrize('single, double', [
    (1e-7, 1e-15),
    (3e-5, 1e-15),
    (3e-5, None),
    (3e-4, 1e-6),
])
def test_single_precision_decides_only_without_double(
        single: float, double: float | None) -> None:
    assert is_right(found(single, double))


@pytest.mark.parametrize('comparison', [
    found(1e-7, 2e-5),
    found(3e-4, None),
    found(1e-7, float('nan')),
    found(float('nan'), None),
    found(1e-7, 1e-15, effect=1e-4),
    found(1e-7, 1e-15, rel_diff_built=5e-5, rounding=1e-5),
    found(1e-7, 1e-15, rel_diff_built=float('nan'), rounding=1.),
])
def test_difference_beyond_its_bound_is_faulty(
        comparison: dict[str, Any]) -> None:
    assert not is_right(comparison)
