"""On networks drawn at random, the pruned one computes what the gated does."""
from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis import operators
from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.labels import Labels
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.gates import METHODS
from gdp_mmseg.gates.base import GateMethod
from gdp_mmseg.gates.scp import SCPGates
from gdp_mmseg.gates.trainable import TrainableGates
from gdp_mmseg.surgery.outputs import largest_difference
from gdp_mmseg.surgery.prune import prune
from gdp_mmseg.surgery.random_weights import randomise_

from helpers.random_networks import SHAPE, STEPS, RandomNetwork
from helpers.toys import gated, run

SEEDS = range(300)
TOLERANCE = 1e-9


@functools.cache
def drawn_once(seed: int) -> tuple[nn.Module, Analysis]:
    """:func:`drawn`, for those that change nothing."""
    return drawn(seed)


def drawn(seed: int) -> tuple[nn.Module, Analysis]:
    """A network of double precision with random weights, and its groups."""
    torch.manual_seed(seed)
    net = randomise_(RandomNetwork(seed)).eval()
    return net.double(), analyse(net, SHAPE, run)


def error(net: nn.Module,
          analysis: Analysis,
          seed: int,
          gate: str = 'gdp') -> float:
    """Difference of gated and pruned with gates drawn at random.

    Each group has a chance of its own to lose channels: from none to all.
    """
    generator = torch.Generator().manual_seed(seed)
    gates = METHODS[gate].of(analysis).double().eval()
    with torch.no_grad():
        gates.theta.uniform_(0.2, 2., generator=generator)
        for group in analysis.groups:
            share = torch.rand(1, generator=generator).mul(1.6).sub(0.3)
            shut = torch.rand(len(group.gates), generator=generator) < share
            gates.theta[group.gates[shut]] *= -1
        _close_(gates, gates.theta < 0)
    inputs = torch.randn((2, *SHAPE), generator=generator).double()
    with torch.no_grad():
        wanted = gated(net, analysis, gates)(inputs)
        pruned, _ = prune(net, analysis, gates.decided())
        return largest_difference([pruned(inputs)], [wanted])


def _close_(gates: GateMethod, shut: Tensor) -> None:
    """Close gates as their method does while it trains, in place."""
    if isinstance(gates, SCPGates):
        gates.phase.fill_(1)
        gates.kept.copy_(~shut)
    elif not isinstance(gates, TrainableGates):
        gates.theta.masked_fill_(shut, 0)


@pytest.mark.parametrize('seed', SEEDS)
def test_pruned_network_computes_what_the_gated_one_does(seed: int) -> None:
    net, analysis = drawn_once(seed)
    for number, gate in enumerate(METHODS):
        try:
            # As many gates as the method can have.
            options = dict(streams=True) if gate == 'scp' else {}
            admitted = METHODS[gate].admitted(analysis, net, **options)
        except ValueError:  # No batch norm tells about any channel.
            assert gate == 'scp'
            continue
        found = error(net, admitted, 2 * seed + number, gate)
        assert found <= TOLERANCE, (gate, net)


def test_networks_have_every_kind_of_step_and_gates() -> None:
    kinds: Counter[str] = Counter()
    for seed in SEEDS:
        kinds.update(RandomNetwork(seed).kinds)
    assert min(kinds[step.__name__] for step in STEPS) >= 30
    numbers = [drawn_once(seed)[1].num_gates for seed in list(SEEDS)[:50]]
    assert sorted(numbers)[len(numbers) // 2] >= 10


def skip_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elementwise operators no longer make their labels equal."""
    plain: Callable[..., Tensor] = operators._meet

    def meet(labels: Labels, first: Tensor, second: Tensor) -> Tensor:
        found = copy.copy(labels)
        found.pairs = []  # whatever is tied here is lost
        return plain(found, first, second)

    monkeypatch.setattr(operators, '_meet', meet)


def skip_depthwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a grouped convolution no longer go as a whole."""
    monkeypatch.setattr(Labels, 'tie_along', lambda self, labels, dim: labels)


def skip_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that mixes channels is taken for one that does not."""
    rule: Any = operators._copy
    monkeypatch.setitem(operators._SOURCE_RULES, '_softmax', rule)


@pytest.mark.parametrize('mutation', [skip_ties, skip_depthwise, skip_softmax])
def test_broken_analysis_is_noticed(mutation: Callable[[pytest.MonkeyPatch],
                                                       None],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    wrong = 0
    for seed in SEEDS[:60]:
        try:
            net, analysis = drawn(seed)
            wrong += error(net, analysis, seed) > TOLERANCE
        except (RuntimeError, ValueError, ArithmeticError):
            wrong += 1
        if wrong == 3:
            break
    assert wrong == 3
