"""A pruned network computes what the gated one does."""
from __future__ import annotations

import copy
import functools
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gdp_mmseg.analysis.liveness import constant_channels, kept_channels
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.cost.counts import FlopCost
from gdp_mmseg.surgery.constant import Constant
from gdp_mmseg.surgery.prune import absorb_, prune
from gdp_mmseg.surgery.widths import Widths, apply_widths_

from helpers.toys import (BACKBONES, TOYS, all_outputs, counted_macs, deeplab,
                          gated, open_gates, randomise_)


def at_random(analysis: Analysis) -> Tensor:
    """Half of the gates; of each group one at least is open, one closed."""
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(analysis.num_gates, generator=generator) < 0.5
    for group in analysis.groups:
        order = torch.randperm(len(group.gates), generator=generator)
        keep[group.gates[order[:1]]] = False
        keep[group.gates[order[-1:]]] = True
    return keep


def whole_groups_closed(analysis: Analysis) -> Tensor:
    """Every second group, beginning with the first."""
    keep = torch.ones(analysis.num_gates, dtype=torch.bool)
    for group in analysis.groups[::2]:
        keep[group.gates] = False
    return keep


def other_groups_closed(analysis: Analysis) -> Tensor:
    return ~whole_groups_closed(analysis)


def all_closed(analysis: Analysis) -> Tensor:
    return torch.zeros(analysis.num_gates, dtype=torch.bool)


def all_open(analysis: Analysis) -> Tensor:
    return torch.ones(analysis.num_gates, dtype=torch.bool)


PATTERNS = {
    pattern.__name__: pattern
    for pattern in (at_random, whole_groups_closed, other_groups_closed,
                    all_closed, all_open)
}


def difference(found: Any, wanted: Any) -> float:
    """Largest relative difference of all outputs; shapes must agree."""
    pairs = list(zip(tree_leaves(found), tree_leaves(wanted), strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    assert all(bool(other.isfinite().all()) for _, other in pairs)
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in pairs)


def numbers(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', TOYS)
def test_pruned_toy_computes_what_the_gated_one_does(name: str,
                                                     pattern: str) -> None:
    toy = TOYS[name]
    net, analysis = toy.analyse()
    gates = open_gates(PATTERNS[pattern](analysis)).double()
    net, inputs = net.double(), toy.inputs().double()
    before = copy.deepcopy(net.state_dict())
    pruned, _ = prune(net, analysis, gates.openness())
    with torch.no_grad():
        wanted = gated(net, analysis, gates)(inputs)
        assert difference(pruned(inputs), wanted) <= 1e-10
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in net.state_dict().items())
    assert not pruned.training


@functools.cache
def pruned_toy(
        name: str,
        pattern: str) -> tuple[nn.Module, Analysis, Tensor, nn.Module, Widths]:
    """A toy, its analysis, the openness of its gates, and what is left.

    Made once, for those that change nothing of it.
    """
    net, analysis = TOYS[name].analyse()
    openness = open_gates(PATTERNS[pattern](analysis)).openness().detach()
    return net, analysis, openness, *prune(net, analysis, openness)


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', TOYS)
def test_pruned_toy_has_fewer_parameters_if_a_channel_went(
        name: str, pattern: str) -> None:
    net, analysis, openness, pruned, widths = pruned_toy(name, pattern)
    if kept_channels(analysis, openness).all():
        assert numbers(pruned) == numbers(net) and not widths
    else:
        assert numbers(pruned) < numbers(net) and widths


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', TOYS)
def test_pruned_toy_is_rebuilt_from_its_widths_alone(name: str,
                                                     pattern: str) -> None:
    toy = TOYS[name]
    pruned, widths = pruned_toy(name, pattern)[3:]
    torch.manual_seed(5)
    rebuilt = toy.build().eval()
    apply_widths_(rebuilt, widths)
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    with torch.no_grad():
        assert difference(rebuilt(toy.inputs()), pruned(toy.inputs())) == 0


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', TOYS)
def test_pruned_toy_trains_on(name: str, pattern: str) -> None:
    toy = TOYS[name]
    torch.manual_seed(0)
    pruned = copy.deepcopy(pruned_toy(name, pattern)[3])
    trains(pruned, lambda net: net(toy.inputs()))


def trains(pruned: nn.Module, forward: Callable[[nn.Module], Any]) -> None:
    """One step of SGD changes the parameters and keeps them finite."""
    pruned.train()
    before = copy.deepcopy([*pruned.parameters()])
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    sum(output.square().sum()
        for output in tree_leaves(forward(pruned))).backward()
    optimizer.step()
    after = [*pruned.parameters()]
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert any(not torch.equal(one, other)
               for one, other in zip(before, after))


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', TOYS)
def test_macs_of_the_pruned_toy_are_what_the_cost_says(name: str,
                                                       pattern: str) -> None:
    toy = TOYS[name]
    _, analysis, openness, pruned, _ = pruned_toy(name, pattern)
    kept = kept_channels(analysis, openness).float()
    assert counted_macs(pruned,
                        toy.inputs()[:1]) == FlopCost(analysis).count(kept)


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', TOYS)
def test_kept_channels_are_idempotent(name: str, pattern: str) -> None:
    groups = TOYS[name].analyse()[1]
    keep = kept_channels(groups, PATTERNS[pattern](groups).float())
    assert torch.equal(kept_channels(groups, keep.float()), keep)


@pytest.mark.parametrize('name', TOYS)
def test_a_group_that_cannot_vanish_keeps_one_channel(name: str) -> None:
    analysis = TOYS[name].analyse()[1]
    closed = torch.zeros(analysis.num_gates)
    # Where the first channel of each has left before, it is another one.
    present = torch.ones(analysis.num_gates, dtype=torch.bool)
    present[[
        int(group.gates[0]) for group in analysis.groups
        if len(group.gates) > 1
    ]] = False
    for keep in (kept_channels(analysis, closed),
                 present & kept_channels(analysis, closed, present)):
        for group in analysis.groups:
            assert int(
                keep[group.gates].sum()) == (0 if group.can_be_empty else 1)


def test_channels_that_only_feed_dead_layers_go() -> None:
    analysis = TOYS['chain'].analyse()[1]
    first, second = (group.gates for group in analysis.groups)
    openness = torch.ones(analysis.num_gates)
    openness[second] = 0
    assert not kept_channels(analysis, openness).any()
    openness[:] = 1
    openness[first] = 0
    keep = kept_channels(analysis, openness)
    # What the second layer writes is constant, but the head reads it.
    assert keep[second].all() and not keep[first].any()
    assert torch.equal(constant_channels(analysis, keep), keep)


def test_dead_branch_leaves_the_constant_of_its_last_norm() -> None:
    net, analysis = TOYS['residual'].analyse()
    inside, = (
        group.gates for group in analysis.groups
        if set(group.readers) == {'branch.3'})
    openness = torch.ones(analysis.num_gates)
    openness[inside] = 0
    pruned, widths = prune(net, analysis, openness)
    norm = net.branch[4]
    constant = norm.bias - norm.weight * norm.running_mean / (
        norm.running_var + norm.eps).sqrt()
    assert isinstance(pruned.branch[3], Constant)
    assert isinstance(pruned.branch[4], nn.Identity)
    torch.testing.assert_close(pruned.branch[3].bias, constant)
    assert widths['branch.3'] == [4, 0] and widths['branch.4'] == [0]


def test_absorbing_scales_the_columns_of_the_kernel() -> None:
    net, analysis = TOYS['chain'].analyse()
    openness = torch.linspace(0, 0.9, analysis.num_gates)
    state = dict(net.state_dict())
    absorb_(state, analysis, openness, openness >= 0)
    gates_of = {
        group.readers: openness[group.gates]
        for group in analysis.groups
    }
    for layer, gates in gates_of.items():
        kernel = net.get_submodule(layer[0]).weight.detach()
        for channel, gate in enumerate(gates):
            torch.testing.assert_close(state[f'{layer[0]}.weight'][:, channel],
                                       kernel[:, channel] * gate)
    assert torch.equal(state['0.weight'], net[0].weight)


def test_pruning_keeps_what_must_not_be_trained() -> None:
    net, analysis = TOYS['chain'].analyse()
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    pruned, _ = prune(net, analysis,
                      open_gates(at_random(analysis)).openness())
    assert not pruned[0].weight.requires_grad
    assert pruned[3].weight.requires_grad


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('key', ['0.weight', '1.running_var', '6.weight'])
def test_weights_that_are_not_finite_are_refused(key: str,
                                                 value: float) -> None:
    net, analysis = TOYS['chain'].analyse()
    net.state_dict()[key].view(-1)[0] = value
    with pytest.raises(ValueError, match=key.replace('.', r'\.')):
        prune(net, analysis, torch.ones(analysis.num_gates))


@pytest.mark.parametrize('widths, said', [
    ({
        'elsewhere': [1]
    }, 'elsewhere'),
    ({
        '0.elsewhere': [1]
    }, '0.elsewhere'),
    ({
        'stem.0': [1, 1]
    }, 'stem.0'),
    ({
        '0': [5, 3]
    }, r'at most \[4, 3\], but got \[5, 3\]'),
    ({
        '0': [4, 4]
    }, r'at most \[4, 3\], but got \[4, 4\]'),
    ({
        '0': [-1, 3]
    }, r'but got \[-1, 3\]'),
    ({
        '0': [4]
    }, r'but got \[4\]'),
    ({
        '1': [4, 4]
    }, r'at most \[4\], but got \[4, 4\]'),
    ({
        '1': [5]
    }, r'at most \[4\], but got \[5\]'),
    ({
        '0.weight': [4, 3]
    }, r'at most \[4, 3, 3, 3\]'),
    ({
        '2': [4]
    }, 'ReLU'),
])
def test_widths_that_do_not_fit_are_refused(widths: Widths, said: str) -> None:
    net = TOYS['chain'].build()
    with pytest.raises(ValueError, match=said):
        apply_widths_(net, widths)


def test_widths_of_another_net_are_refused() -> None:
    net, analysis = TOYS['residual'].analyse()
    _, widths = prune(net, analysis, torch.zeros(analysis.num_gates))
    with pytest.raises(ValueError, match='another config'):
        apply_widths_(TOYS['chain'].build(), widths)


@pytest.mark.parametrize('options', [
    dict(kernel_size=3),
    dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=(1, 4), stride=(1, 3), padding=(0, 2), dilation=(1, 2)),
    dict(kernel_size=4, padding='same'),
    dict(kernel_size=5, padding='valid'),
    dict(kernel_size=3, padding=2, padding_mode='reflect'),
])
def test_constant_is_a_convolution_of_nothing(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 4, **options)
    with torch.no_grad():
        layer.weight.zero_()
    left = Constant(layer, 4)
    left.load_state_dict({'bias': layer.bias.detach()})
    inputs = torch.randn(2, 3, 11, 14)
    assert torch.equal(left(inputs[:, :0]), layer(inputs))
    assert Constant(layer, 0)(inputs).shape == (2, 0, *layer(inputs).shape[2:])


@pytest.mark.parametrize('shape', [(2, 3), (2, 7, 3), (2, 5, 7, 3)])
def test_constant_is_a_linear_layer_of_nothing(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.zero_()
    left = Constant(layer, 4)
    left.load_state_dict({'bias': layer.bias.detach()})
    inputs = torch.randn(shape)
    assert torch.equal(left(inputs[..., :0]), layer(inputs))


# -- DeepLabV3Plus ---------------------------------------------------------


def segmentor(name: str) -> nn.Module:
    from gdp_mmseg.engine.model import build_base_model
    torch.manual_seed(0)
    return randomise_(build_base_model(None, deeplab(BACKBONES[name]))).eval()


@pytest.fixture(scope='module', params=BACKBONES)
def dense(request: pytest.FixtureRequest,
          mmseg_scope: None) -> tuple[str, nn.Module, Analysis]:
    from gdp_mmseg.engine.model import analyse_model
    net = segmentor(request.param)
    return request.param, net, analyse_model(net, (3, 49, 41))[0]


def images(number: int = 2) -> Tensor:
    return torch.randn((number, 3, 49, 41),
                       generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('pattern', PATTERNS)
def test_pruned_deeplab_computes_what_the_gated_one_does(
        dense: tuple[str, nn.Module, Analysis], pattern: str) -> None:
    name, net, analysis = dense
    gates = open_gates(PATTERNS[pattern](analysis))
    before = copy.deepcopy(net.state_dict())
    pruned, widths = prune(net, analysis, gates.openness())
    rebuilt = segmentor(name)
    apply_widths_(rebuilt, widths)
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    kept = kept_channels(analysis, gates.openness())
    with torch.no_grad():
        found = all_outputs(pruned, images())
        assert difference(found,
                          all_outputs(gated(net, analysis, gates),
                                      images())) <= 1e-5
        assert difference(all_outputs(rebuilt, images()), found) == 0
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in net.state_dict().items())
    assert (numbers(pruned) < numbers(net)) == (not bool(kept.all()))
    assert counted_macs(
        pruned, images(1),
        lambda net, inputs: net(inputs, mode='tensor')) == FlopCost(
            analysis).count(kept.float())
    assert torch.equal(kept_channels(analysis, kept.float()), kept)


@pytest.mark.parametrize('pattern', PATTERNS)
def test_pruned_deeplab_trains_on(dense: tuple[str, nn.Module, Analysis],
                                  pattern: str) -> None:
    _, net, analysis = dense
    pruned, _ = prune(net, analysis,
                      open_gates(PATTERNS[pattern](analysis)).openness())
    trains(pruned, lambda net: all_outputs(net, images()))
    assert not net.training
