"""Any gate method drives the same pruner."""
from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from gdp_mmseg.gates import METHODS
from gdp_mmseg.gates.base import CostFunction, GateMethod
from gdp_mmseg.gates.blocks import Blocks
from gdp_mmseg.gates.gdp import GDPGates, openness, openness_slope
from gdp_mmseg.gates.layers import gate_
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Gate, Settings, Target
from gdp_mmseg.surgery.outputs import largest_difference
from gdp_mmseg.surgery.prune import prune

from helpers.toys import TOYS


class HardGates(GateMethod):
    """Gates that are open or closed, least gradient first, noisy in training.
    """

    def __init__(self, num_gates: int, **_: object) -> None:
        super().__init__(num_gates)
        self.register_buffer('seen', torch.zeros(num_gates))
        self.settled = 0

    def levels(self) -> tuple[Tensor, Tensor]:
        noise = 1 + 0.1 * torch.rand(len(self.theta))
        slopes = torch.ones_like(noise) if self.settled else noise
        return self.theta * slopes, slopes

    def openness(self) -> Tensor:
        return self.theta.masked_fill(self.is_closed(), 0)

    def worth(self) -> Tensor:
        return self.seen

    @torch.no_grad()
    def observe_(self) -> Tensor:
        assert self.theta.grad is not None
        self.seen.add_(self.theta.grad.abs())
        return self.seen.isfinite().all()

    @torch.no_grad()
    def step_(self,
              cost: CostFunction,
              budget: Tensor | float,
              lr: float,
              channel_weight: float = 0.5,
              protected: Tensor | None = None,
              scarcity: Tensor | float = 1.,
              blocks: Blocks | None = None) -> None:
        free = ~self.is_closed()
        if protected is not None:
            free &= ~protected
        for gate in self.seen.masked_fill(~free, torch.inf).argsort():
            if float(cost(self.openness())) <= budget or not free[gate]:
                break
            self.close_(torch.arange(len(self.theta)) == gate)

    def settle_(self, *_: object) -> None:
        self.settled += 1


@pytest.fixture()
def hard(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that name a method which this file adds to the known ones."""
    monkeypatch.setitem(METHODS, 'hard', HardGates)
    return Settings(Target(0.5), gate=Gate('hard'), phases=(0.1, 0.6, 0.3))


def test_a_method_from_outside_prunes_to_the_target(hard: Settings) -> None:
    net, analysis = TOYS['residual'].analyse()
    pruner = Pruner(analysis, hard)
    gated, inputs = TOYS['residual'].build(), TOYS['residual'].inputs()
    gated.load_state_dict(net.state_dict())
    gate_(gated, analysis, pruner.gates)
    steps = 20
    for step in range(steps):
        gated.train()
        pruner.train()
        gated(inputs).square().sum().backward()
        pruner.step_(step / steps, steps)
    assert isinstance(pruner.gates, HardGates) and pruner.gates.settled == 1
    assert float(pruner.cost(pruner.channels())) == pytest.approx(0.5, abs=0.1)

    gated.eval()
    pruner.eval()
    dense = TOYS['residual'].build()
    dense.load_state_dict(gated.state_dict())
    pruned, _ = prune(dense.eval(), analysis, pruner.gates.decided())
    with torch.no_grad():
        assert largest_difference([pruned(inputs)], [gated(inputs)]) < 1e-5


def test_an_unknown_method_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gdp.gate: .*\['gdp'.*but got 'x'"):
        Gate('x')


def test_options_reach_the_method(monkeypatch: pytest.MonkeyPatch) -> None:

    class Sharp(HardGates):
        OPTIONS = ('edge', )

        def __init__(self, num_gates: int, edge: float = 1.) -> None:
            super().__init__(num_gates)
            self.edge = edge

    monkeypatch.setitem(METHODS, 'sharp', Sharp)
    _, analysis = TOYS['residual'].analyse()
    for gate, edge in (('sharp', 1.), (dict(type='sharp', edge=2.), 2.)):
        settings = Settings.from_config(dict(target=0.5, gate=gate))
        gates = settings.build_gates(analysis)
        assert isinstance(gates, Sharp) and gates.edge == edge
        assert len(gates.theta) == analysis.num_gates


@pytest.mark.parametrize('gate, message', [
    (dict(edge=1.), 'add type'),
    (dict(type='hard', edge=1.), "'hard'.*no options.*'edge'"),
    (dict(type='hrad'), "did you mean 'hard'"),
])
def test_wrong_options_of_a_gate_are_an_error(hard: Settings, gate: dict,
                                              message: str) -> None:
    with pytest.raises(ValueError, match='gdp.gate: expected.*' + message):
        Settings.from_config(dict(target=0.5, gate=gate))


def test_settings_of_another_gate_are_an_error(hard: Settings) -> None:
    with pytest.raises(ValueError, match="gdp.close_below.*gate='gdp' only"):
        dataclasses.replace(hard, close_below=0.1)


@pytest.mark.parametrize('change, key', [
    (dict(phases=(0.5, 0.2, 0.1)), 'gdp.phases'),
    (dict(epsilon=(0.1, 0.2)), 'gdp.epsilon'),
    (dict(gate_travel=-1.), 'gdp.gate_travel'),
    (dict(close_below=2.), 'gdp.close_below'),
    (dict(min_keep_ratio=1.), 'gdp.min_keep_ratio'),
    (dict(multiple=0), 'gdp.multiple'),
    (dict(multiple=2.), 'gdp.multiple'),
    (dict(multiple=True), 'gdp.multiple'),
    (dict(ignore=['head']), 'gdp.ignore'),
])
def test_settings_made_in_python_are_checked_too(change: dict,
                                                 key: str) -> None:
    right = Settings(Target(0.5))
    with pytest.raises(ValueError, match=f'{key}: expected .* but got'):
        dataclasses.replace(right, **change)


def test_a_target_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match='gdp.target: expected .* but got 40'):
        Target(40)
    with pytest.raises(ValueError, match='gdp.target.type: .* but got'):
        Target(0.4, 'flop')


def test_factors_are_computed_once_for_each_state_of_the_gates(
        monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    plain = GDPGates.levels

    def levels(self: GDPGates) -> tuple[Tensor, Tensor]:
        computed.append(self.theta.tolist())
        return plain(self)

    monkeypatch.setattr(GDPGates, 'levels', levels)
    gates = GDPGates(4)
    with torch.no_grad():
        gates.theta.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8]))
    axes = torch.tensor([2, -1, 0]), torch.tensor([0, 1, 2, 2])
    first, second = (gates.lookup.add(axis) for axis in axes)

    def gradient(*factors: Tensor) -> Tensor:
        gates.theta.grad = None
        for factor in factors:  # Several passes, of one graph.
            factor.sum().backward()
        assert gates.theta.grad is not None
        return gates.theta.grad

    moving = [gates.slot_factors(index) for index in (first, second)]
    opened = openness(gates.theta.detach(), 0.1)
    slope = openness_slope(gates.theta.detach(), 0.1)
    assert torch.equal(moving[0],
                       torch.stack([opened[2],
                                    torch.tensor(1.), opened[0]]))
    assert torch.equal(moving[1], opened[[0, 1, 2, 2]])
    assert torch.equal(
        gradient(*moving), slope * torch.tensor([2., 1., 3., 0.]))
    assert len(computed) == 1
    gates.heeded = False
    for _ in range(3):
        fixed = gates.slot_factors(first)
        assert torch.equal(fixed, moving[0])
        # The gradient exists, for wrappers of several processes.
        assert torch.equal(gradient(fixed), torch.zeros(4))
    assert len(computed) == 2
    with torch.no_grad():
        gates.theta[0] = 0.9
    assert torch.equal(gates.slot_factors(first)[:2], moving[0][:2])
    assert gates.slot_factors(first)[2] > moving[0][2]
    gates.close_(torch.tensor([True, False, False, False]))
    assert gates.slot_factors(first)[2] == 0
    gates.lookup.replace_(first, torch.tensor([3]))
    assert gates.slot_factors(first).shape == (1, )


def test_factors_of_copies_and_of_passes_without_gradient_are_their_own(
) -> None:
    gates = GDPGates(2)
    index = gates.lookup.add(torch.tensor([1, 0]))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not gates.slot_factors(index).requires_grad
        factors = gates.slot_factors(index)
        (factors * factors).sum().backward()
        assert gates.theta.grad is not None
        gates.theta.grad = None
    for copied in (copy.deepcopy(gates), pickle.loads(pickle.dumps(gates))):
        with torch.no_grad():
            copied.theta[0] = 0.5
        copied.slot_factors(index).sum().backward()
        assert copied.theta.grad is not None and gates.theta.grad is None
        assert copied.slot_factors(index)[1] < gates.slot_factors(index)[1]
