"""The length of a training that the settings of its gates need."""
from __future__ import annotations

import pytest

from gdp_mmseg.pruner.settings import Settings, Target

# A pruning phase of half of the training, in which gates travel 8.
SETTINGS = Settings(Target(0.5), phases=(0.25, 0.5, 0.25), gate_travel=8.)


@pytest.mark.parametrize('steps, note', [(16, True), (159, True), (160, False),
                                         (10**6, False)])
def test_short_pruning_phase_is_noted(steps: int, note: bool) -> None:
    found = SETTINGS.check_length(steps)
    assert bool(found) == note
    if found:
        assert f' of {steps} steps (' in found and '160 steps in all' in found


@pytest.mark.parametrize('steps', [1, 2, 15])
def test_pruning_phase_without_enough_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError) as error:
        SETTINGS.check_length(steps, 'iterations')
    message = str(error.value)
    assert 'at least 8 iterations (gdp.gate_travel)' in message
    assert f'of {steps} iterations (50%); train for at least 16 ' in message
    assert 'better 160' in message


@pytest.mark.parametrize('steps', range(1, 200))
def test_steps_of_which_the_phase_is_a_whole_number_are_enough(
        steps: int) -> None:
    """0.1 * 3 is more than 0.3 in binary, and 0.3 / 0.1 more than 3."""
    settings = Settings(
        Target(0.5), phases=(0.9, 0.1, 0.), gate_travel=0.1 * steps)
    assert settings.check_length(steps) is not None
