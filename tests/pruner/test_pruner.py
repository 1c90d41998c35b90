"""The pruner holds each kind of cost to its target, on small networks."""
from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Layer
from gdp_mmseg.gates import METHODS
from gdp_mmseg.gates.gdp import GDPGates
from gdp_mmseg.pruner import pruner as pruner_module
from gdp_mmseg.pruner import schedule as schedule_module
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Settings
from gdp_mmseg.surgery.prune import prune

from helpers.reads import reads_of
from helpers.toys import block, gated, last, run

RATIO = 0.5

STEPS = 120


def times(layers: list[Layer], device: torch.device, *_: Any) -> Tensor:
    """A device on which layers of all kernel sizes take as long."""
    return torch.tensor([[1., 0., 0.01, 0.001]] * len(layers))


# Many tests look at the same training.
_TRAINED: dict[str, tuple[nn.Module, Pruner]] = {}


def trained_toy(kind: str, **settings: Any) -> tuple[nn.Module, Pruner]:
    """A copy of what :func:`train_toy` returns."""
    key = f'{kind} {settings}'
    if key not in _TRAINED:
        _TRAINED[key] = train_toy(kind, **settings)
    return copy.deepcopy(_TRAINED[key])


def train_toy(kind: str,
              watch: Callable[[Pruner], None] = lambda pruner: None,
              **settings: Any) -> tuple[nn.Module, Pruner]:
    """A chain, trained to a target on random inputs and random wishes."""
    torch.manual_seed(0)
    net = nn.Sequential(*block(3, 96), *block(96, 128, kernel=1), last(128))
    analysis = analyse(net, (3, 8, 8), run)
    pruner = Pruner(
        analysis,
        Settings.from_config(
            dict(
                target=dict(type=kind, ratio=RATIO),
                phases=(0.1, 0.8, 0.1),
                **settings)))
    if pruner.unmeasured:
        pruner.measure_()
    with_gates = gated(net, analysis, pruner.gates)
    optimizer = torch.optim.SGD(with_gates.parameters(), lr=0.05)
    inputs = torch.randn(4, 3, 8, 8)
    wishes = torch.randn(4, 2, 8, 8)
    for step in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(with_gates(inputs), wishes).backward()
        watch(pruner)
        pruner.step_(step / STEPS, STEPS)
        optimizer.step()
    return net, pruner


@pytest.mark.parametrize('gate, floor',
                         [*[(one, 0.) for one in METHODS], ('gdp', 0.3)])
def test_a_step_reads_once_from_the_device(gate: str, floor: float) -> None:
    _, pruner = trained_toy('flops', min_keep_ratio=floor, gate=gate)
    gates = pruner.gates
    for progress, reads in ((0.95, 0), (0.05, 1), (0.3, 1), (0.8, 1)):
        pruner.begin_(progress, STEPS)
        gates.theta.grad = torch.ones_like(gates.theta)
        with reads_of('gdp_mmseg') as found:
            pruner.step_(progress, STEPS)
        assert len(found) == reads, found


@pytest.mark.parametrize('gate', METHODS)
def test_a_gradient_that_is_not_finite_changes_no_gate(gate: str) -> None:
    _, trained = trained_toy('flops', gate=gate)
    # In the last step, gates that may come back are fixed all the same.
    last = 0.899 if METHODS[gate].ABSORBING else 0.88
    for progress in (0.05, 0.5, last):
        check_no_gate_changes(copy.deepcopy(trained), progress)


def check_no_gate_changes(pruner: Pruner, progress: float) -> None:
    gates = pruner.gates
    for wrong in (torch.nan, torch.inf):
        pruner.begin_(progress, STEPS)
        before = copy.deepcopy(gates.state_dict())
        gates.theta.grad = torch.ones_like(gates.theta)
        gates.theta.grad[gates.openness().argmax()] = wrong
        figures = pruner.step_(progress, STEPS)
        assert figures is not None and not figures.moved
        for name, tensor in gates.state_dict().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize('gate', METHODS)
def test_gates_are_fixed_where_mixed_precision_skips_the_last_step(
        gate: str) -> None:
    _, pruner = trained_toy('flops', gate=gate)
    gates = pruner.gates
    pruner.begin_(0., STEPS)
    for progress in (0.88, 0.9, 0.91):
        gates.theta.grad = torch.ones_like(gates.theta)
        pruner.step_(progress, STEPS)
    assert gates.is_settled() and not gates.heeded
    assert torch.equal(gates.decided() == 0, gates.is_closed())
    assert float(pruner.cost(pruner.channels())) == pytest.approx(
        RATIO, abs=0.01)


def has_gains(pruner: Pruner) -> bool:
    """Tell whether a pass has computed the gains of some gates."""
    gradient = pruner.gates.theta.grad
    return gradient is not None and bool(gradient.any())


def test_gains_are_computed_only_where_they_are_observed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Not early in the warm-up, nor in the settling phase."""
    monkeypatch.setattr(schedule_module, '_OBSERVED_WARMUP', 4.5)
    heeded, gains, plain = [], [], []

    def watch(pruner: Pruner) -> None:
        heeded.append(pruner.gates.heeded)
        gains.append(has_gains(pruner))
        plain.append(pruner.gates.neutral)

    _, pruner = train_toy('flops', watch)
    warm, over = round(STEPS * 0.1), round(STEPS * 0.9)
    # The first pass does not know yet, and one is a step ahead.
    assert heeded == [
        step in (0, warm - 5) or warm - 4 <= step < over
        for step in range(STEPS)
    ]
    # Later on the ReLUs of the toy are dead.
    assert gains[:warm + 4] == heeded[:warm + 4] and not any(gains[over:])
    assert int(pruner.gates.observed) == over - warm + 4
    # The first step of the pruning phase has a budget of 1 still.
    assert plain == [0 < step <= warm + 1 for step in range(STEPS)]


@pytest.mark.parametrize('gate', METHODS)
def test_gates_rest_between_the_moves_of_a_long_training(
        monkeypatch: pytest.MonkeyPatch, gate: str) -> None:
    """GDP's gates do, and reach the target; other methods act in each step."""
    # A quarter of the steps of the pruning phase.
    monkeypatch.setattr(schedule_module, '_ENOUGH_MOVES', STEPS // 5)
    states, heeded, gains = [], [], []

    def watch(pruner: Pruner) -> None:
        states.append(pruner.gates.theta.detach().clone())
        heeded.append(pruner.gates.heeded)
        gains.append(has_gains(pruner))

    _, pruner = train_toy('flops', watch, gate=gate)
    first, over = round(STEPS * 0.1), round(STEPS * 0.9)
    can_move = [
        step for step in range(first, over)
        if gate != 'gdp' or step % 4 == 0 or step >= over - 4
    ]
    assert [step for step in range(first, over) if heeded[step]] == can_move
    assert not any(gain for gain, heeds in zip(gains, heeded) if not heeds)
    moved = [
        step for step in range(first, over)
        if not torch.equal(states[step], states[step + 1])
    ]
    # SCP's gates are those of their norms, and theta stays.
    assert gate == 'scp' or len(moved) > len(can_move) / 4
    assert {*moved} <= {*can_move}
    assert float(pruner.cost(pruner.channels())) == pytest.approx(
        RATIO, abs=0.01)


def test_a_training_that_goes_on_rests_in_the_same_steps(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go on within a step that accumulates gradients."""
    monkeypatch.setattr(schedule_module, '_ENOUGH_MOVES', STEPS // 5)
    _, pruner = trained_toy('flops')
    pruner.gates.theta.data.fill_(0.5)
    rests = []
    for step in range(1, STEPS - 1):
        pruner.gates.theta.grad = torch.zeros_like(pruner.gates.theta)
        # A step of the optimizer comes at the end of its four iterations.
        pruner.step_((step - 0.25) / STEPS, STEPS)
        heeds = pruner.gates.heeded
        for done in (0., 0.25, 0.5, 0.75):
            pruner.begin_((step + done) / STEPS, STEPS)
            assert pruner.gates.heeded == heeds, (step, done)
        rests.append(not heeds)
    assert STEPS / 2 < sum(rests) < STEPS


def test_figures_are_the_state_of_the_gates() -> None:
    _, pruner = trained_toy('params')
    openness = pruner.gates.openness().detach()
    figures = pruner.figures(1.)
    assert figures.flops == pytest.approx(
        float(pruner.flops((openness > 0).float())))
    assert figures.cost == pytest.approx(float(pruner.cost(pruner.channels())))
    assert figures.held_cost == pytest.approx(figures.cost)
    assert figures.budget == RATIO
    assert figures.openness == pytest.approx([
        float(openness[group.gates].mean()) for group in pruner.analysis.groups
    ])


def test_a_training_takes_the_gates_of_another_as_they_are() -> None:
    _, pruner = trained_toy('params')
    before = pruner.gates.openness().detach()
    for step in range(STEPS // 10 + 1):  # the warm-up, and one step more
        pruner.gates.theta.grad = torch.zeros_like(before)
        pruner.step_(step / STEPS, STEPS)
    assert float(pruner.gates.epsilon) > 0.09
    assert float(
        (pruner.gates.openness() - before).abs().max().detach()) < 0.01


@pytest.mark.parametrize('gate', METHODS)
def test_training_ends_within_one_point_of_the_parameters(gate: str) -> None:
    net, pruner = trained_toy('params', gate=gate)
    pruned, _ = prune(net, pruner.analysis, pruner.gates.decided())
    left, dense = (
        sum(parameter.numel() for parameter in model.parameters())
        for model in (pruned, net))
    assert RATIO - 0.01 <= left / dense <= RATIO + 0.01
    # Which is not where that of FLOPs would be.
    flops = float(pruner.flops(pruner.channels()))
    assert abs(flops - left / dense) > 0.003


@pytest.mark.parametrize('gate', METHODS)
def test_a_floor_keeps_its_share_of_each_group_and_the_target(
        gate: str) -> None:
    kept = {}
    for floor in (0., 0.6):
        _, pruner = trained_toy('flops', min_keep_ratio=floor, gate=gate)
        channels = pruner.channels()
        assert RATIO - 0.01 <= float(pruner.cost(channels)) <= RATIO + 0.01
        kept[floor] = min(
            float(channels[group.gates].mean())
            for group in pruner.analysis.groups)
    assert kept[0.] < 0.6 <= kept[0.6]


class Branches(nn.Module):
    """Two that cost the same, added."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(*block(3, 96), last(96))
        self.b = nn.Sequential(*block(3, 96), last(96))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.a(inputs) + self.b(inputs)


def test_widths_are_those_of_groups_worth_the_logarithm_of_their_width(
) -> None:
    pruner = Pruner(
        analyse(Branches(), (3, 8, 8), run),
        Settings.from_config(dict(target=RATIO, phases=(0.1, 0.8, 0.1))))
    gates = pruner.gates
    spread = 1 + 0.1 * torch.rand(192, generator=torch.Generator())
    worth = torch.tensor([2., 1.])[pruner.cost.group_of] * spread
    for step in range(400):
        # With the others of its group as they are a channel gains ``worth``.
        loss = -(worth * gates.openness()).sum()
        gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
        pruner.step_(step / 400, 400)
    a, b = pruner.cost.group_sums(pruner.channels()).tolist()
    # The most of 2 log a + log b at this a + b.
    assert a + b == pytest.approx(96, abs=2)
    assert a / b == pytest.approx(2, rel=0.1)


def test_a_target_below_what_a_floor_keeps_is_refused() -> None:
    with pytest.raises(ValueError, match='gdp.target: expected more than'):
        trained_toy('flops', min_keep_ratio=0.9)


def test_a_target_below_one_channel_in_each_group_is_noted() -> None:
    net = nn.Sequential(*block(3, 96), *block(96, 128, kernel=1), last(128))
    analysis = analyse(net, (3, 8, 8), run)
    single = (3 * 9 + 1 + 2 * 9) / (3 * 96 * 9 + 96 * 128 + 128 * 2 * 9)

    def note(target: float) -> str | None:
        settings = Settings.from_config(dict(target=target))
        return Pruner(analysis, settings).note_on_target()

    assert note(1.01 * single) is None
    assert f'{single:.2g} of the FLOPs' in str(note(0.99 * single))


@pytest.mark.parametrize('gate', METHODS)
def test_training_ends_within_one_point_of_the_latency(
        gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner_module, 'measure', times)
    _, pruner = trained_toy('latency', gate=gate)
    channels = pruner.channels()
    assert RATIO - 0.01 <= float(pruner.cost(channels)) <= RATIO + 0.01
    a, b = (
        float(channels[group.gates].sum()) for group in pruner.analysis.groups)

    def time(a: float, b: float) -> float:
        return 3 + 0.01 * (a + b + 2) + 0.001 * (3 * a + a * b + b * 2)

    assert float(pruner.cost(channels)) == pytest.approx(
        time(a, b) / time(96, 128))


def test_a_number_is_a_target_of_flops() -> None:
    """With the same gates, and no more in the state dict than ever."""
    analysis = analyse(
        nn.Sequential(*block(3, 4), *block(4, 6), last(6)), (3, 8, 8), run)
    number, named = (
        Pruner(analysis, Settings.from_config(dict(target=target)))
        for target in (0.4, dict(type='flops', ratio=0.4)))
    assert number.cost is number.flops
    assert number.settings == named.settings
    assert [*number.state_dict()
            ] == [f'gates.{key}' for key in GDPGates(10).state_dict()]


@pytest.mark.parametrize('left, noted', [(0.5, False), (0.509, False),
                                         (0.491, False), (0.52, True),
                                         (0.48, True)])
def test_a_missed_target_is_noted(left: float, noted: bool) -> None:
    net = nn.Sequential(*block(3, 16), last(16))
    pruner = Pruner(
        analyse(net, (3, 8, 8), run), Settings.from_config(dict(target=0.5)))
    note = pruner.note_on(left)
    assert bool(note) == noted
    assert not note or f'{left:.4f} of the FLOPs' in note


def test_a_target_that_a_penalty_misses_is_noted() -> None:
    """The budget is the target at once, and the gates pull one way."""
    gate = dict(type='trainable', penalty=1e-9)
    _, pruner = trained_toy('flops', gate=gate)
    assert pruner.budget(0.05) == 1 and pruner.budget(0.11) == RATIO
    assert pruner.gates.is_settled()
    left = float(pruner.cost(pruner.channels()))
    assert left > RATIO + 0.1
    assert 'options of gdp.gate do not hold it' in str(pruner.note_on(left))
