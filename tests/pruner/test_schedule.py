"""The schedule: budget and price of half-open channels over the progress."""
from __future__ import annotations

from typing import Any

import pytest

from gdp_mmseg.pruner.schedule import Schedule

PHASES = [(0.1, 0.5, 0.4), (0., 1., 0.), (0.2, 0.8, 0.), (0., 0.3, 0.7)]
GRID = [step / 100 for step in range(101)]


@pytest.mark.parametrize('ramp', [0.25, 0.9])
@pytest.mark.parametrize('phases', PHASES)
def test_whole_channels_are_all_that_counts_when_the_pruning_ends(
        phases: tuple[float, float, float], ramp: float) -> None:
    schedule = Schedule(phases, ramp=ramp)
    warmup, pruning, _ = phases
    values = [schedule.channel_weight_at(progress) for progress in GRID]
    standing = pruning * (1 - ramp)
    assert schedule.channel_weight_at(warmup +
                                      pruning * ramp) == pytest.approx(0.5)
    assert schedule.channel_weight_at(warmup + pruning * ramp +
                                      standing / 4) == pytest.approx(0.75)
    assert schedule.channel_weight_at(warmup + pruning * ramp +
                                      standing / 2) == pytest.approx(1)
    assert values[0] == 0.5 and values[-1] == pytest.approx(1)
    assert all(one <= other for one, other in zip(values, values[1:]))


@pytest.mark.parametrize('steps', [3, 8, 100])
def test_last_step_of_the_pruning_is_for_the_target(steps: int) -> None:
    schedule = Schedule((0.1, 0.6, 0.3))
    seen = [
        schedule.end_of_pruning if schedule.is_last_pruning_step(
            step / steps, 1 / steps) else step / steps for step in range(steps)
    ]
    pruning = [one for one in seen if schedule.phase_at(one) == 'pruning']
    assert schedule.budget_at(pruning[-1], 0.4) == pytest.approx(0.4)
    assert schedule.pruned_share(pruning[-1]) == pytest.approx(1)
    moved = sum(one != step / steps for step, one in enumerate(seen))
    assert moved == 1


def test_groups_are_protected_in_the_last_third_of_the_pruning() -> None:
    schedule = Schedule((0.1, 0.6, 0.3))
    protected = [
        schedule.protects_groups(progress)
        for progress in (0., 0.1, 0.49, 0.51, 0.7)
    ]
    assert protected == [False, False, False, True, True]


@pytest.mark.parametrize('ramp', [0.25, 0.9, 1.])
@pytest.mark.parametrize('phases', PHASES)
def test_budget_falls_linearly_and_then_holds(phases: tuple[float, float,
                                                            float],
                                              ramp: float) -> None:
    schedule = Schedule(phases, ramp=ramp)
    values = [schedule.budget_at(progress, 0.4) for progress in GRID]
    warmup, pruning, _ = phases
    assert values[0] == pytest.approx(1)
    assert values[-1] == pytest.approx(0.4)
    middle = schedule.budget_at(warmup + pruning * ramp / 2, 0.4)
    assert middle == pytest.approx((1 + 0.4) / 2)
    assert schedule.budget_at(warmup + pruning * (ramp + 1e-9),
                              0.4) == pytest.approx(0.4)
    assert all(one >= other for one, other in zip(values, values[1:]))


def test_phases_follow_each_other() -> None:
    schedule = Schedule((0.125, 0.5, 0.375))
    assert [
        schedule.phase_at(progress)
        for progress in (0, 0.124, 0.125, 0.624, 0.625, 1)
    ] == ['warmup', 'warmup', 'pruning', 'pruning', 'settling', 'settling']
    assert schedule.pruned_share(0) == schedule.pruned_share(0.125) == 0
    assert schedule.pruned_share(0.625) == schedule.pruned_share(1) == 1


def test_without_warmup_pruning_begins_at_once() -> None:
    assert Schedule((0., 0.5, 0.5)).phase_at(0) == 'pruning'
    assert Schedule((0., 1., 0.)).phase_at(0.999) == 'pruning'


def test_gates_rest_in_long_pruning_phases_only() -> None:
    schedule = Schedule((0.1, 0.5, 0.4), rests=True)
    for steps, period in ((100, 1), (9_998, 1), (10_000, 2), (20_000, 4)):
        begin, end = round(steps * 0.1), round(steps * 0.6)
        moves = [
            step for step in range(steps) if not schedule.is_rest(step, steps)
        ]
        assert {*range(0, end, period)} <= {*moves}
        assert {*range(end - period, steps)} <= {*moves}
        moves = [step for step in moves if begin <= step < end]
        assert 0 <= len(moves) - (end - begin) / period < period
        assert schedule.period(steps) == period
        assert schedule.observed_from(steps) == pytest.approx(0.1 - 700 *
                                                              period / steps)
    always = Schedule((0.1, 0.5, 0.4))
    assert always.period(20_000) == 1 and not always.is_rest(1, 20_000)


@pytest.mark.parametrize('steps', [40, 48, 100, 997, 10_000, 50_000])
def test_takeovers_are_spread_over_the_moves_of_the_pruning_phase(
        steps: int) -> None:
    schedule = Schedule((0.1, 0.5, 0.4), rests=True)
    found = [
        index for index in range(steps + 1)
        if schedule.is_takeover(index, steps)
    ]
    moves = [
        index for index in range(steps)
        if schedule.phase_at(index / steps) == 'pruning'
        and not schedule.is_rest(index, steps)
    ]
    assert {*found} <= {*moves} and found[-1] == moves[-1]
    # One in four moves, or 24.
    assert min(len(moves) // 4, 20) <= len(found) <= min(
        len(moves) / 4 + 2, 33)
    assert found[0] - moves[0] <= max((moves[-1] - moves[0]) / 16, 4)


@pytest.mark.parametrize('options, key', [
    (dict(phases=(0.5, 0.5)), 'phases'),
    (dict(phases=(0.5, 0.6, 0.4)), 'phases'),
    (dict(phases=(0.5, 0., 0.5)), 'phases'),
    (dict(phases=(-0.1, 0.6, 0.5)), 'phases'),
    (dict(ramp=0.), 'ramp'),
    (dict(ramp=1.1), 'ramp'),
])
def test_schedule_refuses_by_name(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f'{key}: expected .* but got'):
        Schedule(**options)
