"""Multiply-adds, parameters and latency, counted by hand."""
from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.liveness import kept_channels
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.cost.counts import Cost, FlopCost, ParameterCost
from gdp_mmseg.cost.latency import LatencyCost
from gdp_mmseg.surgery.constant import Constant
from gdp_mmseg.surgery.prune import prune

from helpers.toys import (BACKBONES, TOYS, Net, block, conv, counted_macs,
                          deeplab, last, run)

POSITIONS = 8 * 8  # of every toy's feature map


def cost_of(name: str) -> tuple[Analysis, FlopCost]:
    analysis = TOYS[name].analyse()[1]
    return analysis, FlopCost(analysis)


def openness_of(analysis: Analysis) -> Tensor:
    return torch.rand(
        analysis.num_gates, generator=torch.Generator().manual_seed(4))


def sum_of(analysis: Analysis, openness: Tensor, *modules: str) -> Tensor:
    """Openness of the group that touches exactly these modules."""
    group, = (
        group for group in analysis.groups
        if {*group.writers, *group.readers} == {*modules})
    return openness[group.gates].sum()


def check(cost: FlopCost, openness: Tensor, dense: int,
          by_hand: Tensor) -> None:
    assert cost.dense == dense
    torch.testing.assert_close(cost(openness), by_hand / dense)
    assert cost(torch.ones_like(openness)).item() == pytest.approx(1)


def test_chain() -> None:
    analysis, cost = cost_of('chain')
    g = openness_of(analysis)
    a, b = sum_of(analysis, g, '0', '3'), sum_of(analysis, g, '3', '6')
    check(cost, g, POSITIONS * 9 * (3 * 4 + 4 * 6 + 6 * 2),
          POSITIONS * 9 * (3 * a + a * b + b * 2))


def test_residual() -> None:
    analysis, cost = cost_of('residual')
    g = openness_of(analysis)
    stream = sum_of(analysis, g, 'stem.0', 'branch.0', 'branch.3', 'head')
    inside = sum_of(analysis, g, 'branch.0', 'branch.3')
    check(cost, g, POSITIONS * 9 * (3 * 4 + 4 * 5 + 5 * 4 + 4 * 2),
          POSITIONS * 9 * (3 * stream + 2 * stream * inside + stream * 2))


def test_depthwise_behind_concat() -> None:
    analysis, cost = cost_of('depthwise behind concat')
    g = openness_of(analysis)
    a = sum_of(analysis, g, 'a.0', 'depth.0', 'point.0')
    b = sum_of(analysis, g, 'b.0', 'depth.0', 'point.0')
    c = sum_of(analysis, g, 'point.0', 'head')
    check(
        cost, g, POSITIONS * (9 * 3 * 9 + 9 * 9 + 9 * 6 + 9 * 6 * 2),
        POSITIONS * (9 * 3 * (a + b) + 9 * (a + b) + (a + b) * c + 9 * c * 2))


def test_depthwise_of_two_per_channel() -> None:
    analysis, cost = cost_of('depthwise of two per channel')
    g = openness_of(analysis)
    a, b = sum_of(analysis, g, '0', '3', '6'), sum_of(analysis, g, '6', '9')
    check(cost, g, POSITIONS * 9 * (3 * 4 + 8 + 8 * 5 + 5 * 2),
          POSITIONS * 9 * (3 * a + 2 * a + 2 * a * b + b * 2))


def test_grouped_with_channels_of_each_group() -> None:
    analysis, cost = cost_of('grouped convolution of few groups')
    g = openness_of(analysis)
    a = 2 * sum_of(analysis, g, 'stem.0', 'grouped.0')
    b = 2 * sum_of(analysis, g, 'grouped.0', 'body.0')
    c = sum_of(analysis, g, 'body.0', 'head')
    check(cost, g, POSITIONS * 9 * (3 * 8 + 8 * 6 // 2 + 6 * 5 + 5 * 2),
          POSITIONS * 9 * (3 * a + a * b / 2 + b * c + c * 2))


def test_grouped_with_whole_groups() -> None:
    analysis, cost = cost_of('grouped convolution of many groups')
    g = openness_of(analysis)
    blocks = sum_of(analysis, g, 'stem.0', 'grouped.0', 'body.0')
    a = sum_of(analysis, g, 'body.0', 'head')
    check(
        cost, g, POSITIONS * 9 * (3 * 8 + 8 * 12 // 4 + 12 * 5 + 5 * 2),
        POSITIONS * 9 *
        (3 * 2 * blocks + blocks * 2 * 3 + 3 * blocks * a + a * 2))


def test_linear_counts_its_rows() -> None:
    analysis, cost = cost_of('linear behind mean')
    g = openness_of(analysis)
    a, b = sum_of(analysis, g, 'stem.0',
                  'middle'), sum_of(analysis, g, 'middle', 'head')
    check(cost, g, POSITIONS * 9 * 3 * 4 + 4 * 5 + 5 * 2,
          POSITIONS * 9 * 3 * a + a * b + b * 2)
    analysis, cost = cost_of('linear on tokens')
    g = openness_of(analysis)
    a, b = sum_of(analysis, g, 'stem.0', 'up'), sum_of(analysis, g, 'up',
                                                       'head')
    check(cost, g, POSITIONS * (9 * 3 * 4 + 4 * 6 + 6 * 2),
          POSITIONS * (9 * 3 * a + a * b + b * 2))


def test_flattened_channel_counts_with_all_its_positions() -> None:
    analysis, cost = cost_of('linear behind flatten')
    g = openness_of(analysis)
    check(cost, g, POSITIONS * (9 * 3 * 4 + 4 * 2),
          POSITIONS * (9 * 3 * g.sum() + g.sum() * 2))


def test_layer_called_twice_counts_twice() -> None:
    analysis, cost = cost_of('called twice')
    g = openness_of(analysis)
    s = g.sum()
    check(cost, g, POSITIONS * 9 * (3 * 4 + 2 * 4 * 4 + 4 * 2),
          POSITIONS * 9 * (3 * s + 2 * s * s + s * 2))


def test_strided_output_counts_its_own_size() -> None:
    analysis, cost = cost_of('residual with downsample')
    fine, coarse = POSITIONS, POSITIONS // 4
    assert cost.dense == 9 * fine * 3 * 4 + coarse * (4 * 6 + 9 *
                                                      (4 * 5 + 5 * 6 + 6 * 2))


def test_what_only_training_runs_is_not_counted() -> None:
    net = Net(
        lambda net, x: net.head(net.stem(x)),
        stem=block(3, 4),
        head=last(4),
        extra=conv(4, 5))
    plain = FlopCost(analyse(net, (3, 8, 8), run))
    trained = FlopCost(
        analyse(net, (3, 8, 8), run, lambda net, x: net.extra(net.stem(x))))
    openness = torch.linspace(0, 1, 4)
    assert trained.dense == plain.dense == POSITIONS * 9 * (3 * 4 + 4 * 2)
    assert torch.equal(trained(openness), plain(openness))


def kinds_of_cost(analysis: Analysis) -> list[Cost]:
    """One of each kind; latency by random numbers."""
    latency = LatencyCost(analysis)
    latency.weigh_(
        torch.rand(
            len(latency.shares), generator=torch.Generator().manual_seed(7)))
    return [FlopCost(analysis), ParameterCost(analysis), latency]


@pytest.mark.parametrize('kind', range(3))
@pytest.mark.parametrize('name', TOYS)
def test_price_is_the_derivative_of_the_cost(name: str, kind: int) -> None:
    analysis = TOYS[name].analyse()[1]
    cost = kinds_of_cost(analysis)[kind]
    assert float(cost(torch.ones(analysis.num_gates))) == pytest.approx(1)
    openness = openness_of(analysis).requires_grad_()
    derivative, = torch.autograd.grad(cost(openness), openness)
    torch.testing.assert_close(cost.price(openness.detach()), derivative)


@pytest.mark.parametrize('name', TOYS)
def test_dense_is_what_torch_counts(name: str) -> None:
    toy = TOYS[name]
    net, analysis = toy.analyse()
    assert FlopCost(analysis).dense == counted_macs(net, toy.inputs()[:1])


@pytest.mark.parametrize('name', TOYS)
def test_macs_are_the_share_of_the_dense_ones(name: str) -> None:
    analysis, cost = cost_of(name)
    openness = openness_of(analysis)
    assert cost.count(torch.ones(analysis.num_gates)) == cost.dense
    assert cost.count(openness) == pytest.approx(
        float(cost(openness)) * cost.dense, rel=1e-5, abs=1)


def test_shares_of_a_chain_halve_what_two_groups_share() -> None:
    """3 -> 4 -> 6 -> 2 channels: only the middle layer is shared."""
    analysis, cost = cost_of('chain')
    first = 3 * 4 + 4 * 6 / 2
    second = 4 * 6 / 2 + 6 * 2
    assert cost.group_shares().tolist() == pytest.approx(
        [first / 48, second / 48])
    assert cost.fixed_share() == 0


def test_depthwise_layer_and_residual_stream_belong_to_their_group() -> None:
    analysis, cost = cost_of('depthwise of two per channel')
    shares = cost.group_shares()
    dense = 3 * 4 + 8 + 8 * 5 + 5 * 2
    assert shares.tolist() == pytest.approx([(3 * 4 + 8 + 8 * 5 / 2) / dense,
                                             (8 * 5 / 2 + 5 * 2) / dense])
    # The group that reads and writes a layer has all of it.
    analysis, cost = cost_of('called twice')
    assert cost.group_shares().tolist() == pytest.approx([1])


def test_layer_without_a_gate_is_the_fixed_share() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1))
    analysis = analyse(net, (3, 8, 8), lambda net, x: net(x), ignore=('0', ))
    cost = FlopCost(analysis)
    dense = 3 * 4 + 4 * 5 + 5 * 2
    assert cost.fixed_share() == pytest.approx(3 * 4 / dense)
    assert cost.group_shares().tolist() == pytest.approx([
        (4 * 5 + 5 * 2) / dense
    ])


@pytest.mark.parametrize('name', TOYS)
@pytest.mark.parametrize('kind', [FlopCost, ParameterCost])
def test_shares_add_up_to_the_whole(name: str, kind: type[Cost]) -> None:
    analysis, _ = cost_of(name)
    cost = kind(analysis)
    shares = cost.group_shares()
    assert len(shares) == len(analysis.groups)
    assert float(shares.min()) > 0
    assert float(shares.sum()) + cost.fixed_share() == pytest.approx(
        1, abs=1e-6)


@pytest.mark.parametrize('name', ['residual', 'depthwise behind concat'])
def test_share_is_the_mean_saving_over_all_orders_of_closing(
        name: str) -> None:
    analysis, cost = cost_of(name)
    numbers = range(len(analysis.groups))
    saved = [0.] * len(numbers)
    orders = [*itertools.permutations(numbers)]
    for order in orders:
        openness = torch.ones(analysis.num_gates)
        for index in order:
            before = float(cost(openness))
            openness[analysis.groups[index].gates] = 0
            saved[index] += before - float(cost(openness))
    assert cost.group_shares().tolist() == pytest.approx(
        [one / len(orders) for one in saved], abs=1e-6)


def test_cost_moves_with_its_module_and_adds_nothing_to_a_checkpoint() -> None:
    cost = cost_of('residual')[1]
    assert not cost.state_dict()
    assert not [*cost.parameters()]
    moved = nn.ModuleDict(dict(cost=cost)).to('meta')
    assert all(buffer.is_meta for buffer in moved.buffers())


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('name', BACKBONES)
def test_dense_deeplab_is_what_torch_counts(name: str) -> None:
    from gdp_mmseg.engine.model import analyse_model, build_base_model
    net = build_base_model(None, deeplab(BACKBONES[name])).eval()
    analysis, _ = analyse_model(net, (3, 49, 41))
    cost = FlopCost(analysis)
    assert cost.dense == counted_macs(
        net, torch.zeros(1, 3, 49, 41),
        lambda net, inputs: net(inputs, mode='tensor'))
    assert cost.count(torch.ones(analysis.num_gates)) == cost.dense


# -- parameters -------------------------------------------------------------


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def halves(analysis: Analysis, seed: int) -> Tensor:
    """About half of the gates open, at least one of each group."""
    openness = torch.rand(
        analysis.num_gates,
        generator=torch.Generator().manual_seed(seed)).round()
    for group in analysis.groups:
        openness[group.gates[0]] = 1
    return openness


@pytest.mark.parametrize('name', TOYS)
def test_parameters_are_those_of_the_pruned_network(name: str) -> None:
    net, analysis = TOYS[name].analyse()
    cost = ParameterCost(analysis)
    assert cost.dense == parameters(net)
    for seed in range(3):
        openness = halves(analysis, seed)
        pruned, _ = prune(net, analysis, openness)
        assert cost.count(openness) == parameters(pruned)
        assert float(cost(openness)) == pytest.approx(
            parameters(pruned) / parameters(net))


@pytest.mark.parametrize('name', TOYS)
def test_parameters_but_for_constants_where_all_is_closed(name: str) -> None:
    """A layer that reads nothing has one per channel, not of its norm."""
    net, analysis = TOYS[name].analyse()
    keep = kept_channels(analysis, torch.zeros(analysis.num_gates)).float()
    pruned, _ = prune(net, analysis, torch.zeros(analysis.num_gates))
    difference = 0
    for layer, module in pruned.named_modules():
        if isinstance(module, Constant) and module.bias is not None:
            dense = net.get_submodule(layer)
            norm = analysis.norms.get(layer, '')
            folded = norm and isinstance(
                pruned.get_submodule(norm), nn.Identity)
            had = (dense.bias is not None) + 2 * bool(folded)
            difference += (1 - had) * len(module.bias)
    assert parameters(pruned) == (
        ParameterCost(analysis).count(keep) + difference)


def test_parameters_by_hand() -> None:
    net = nn.Sequential(*block(3, 4, bias=True), *block(4, 6), last(6))
    analysis = analyse(net, (3, 8, 8), run)
    g = openness_of(analysis)
    a, b = sum_of(analysis, g, '0', '3'), sum_of(analysis, g, '3', '6')
    check(
        ParameterCost(analysis), g,
        (9 * 3 * 4 + 3 * 4) + (9 * 4 * 6 + 2 * 6) + (9 * 6 * 2 + 2),
        (9 * 3 * a + 3 * a) + (9 * a * b + 2 * b) + (9 * b * 2 + 2))


def test_parameters_that_only_training_uses_are_not_counted() -> None:
    net = Net(
        lambda net, x: net.head(net.stem(x)),
        stem=block(3, 4),
        head=last(4),
        extra=block(4, 5),
        idle=conv(4, 5))
    cost = ParameterCost(
        analyse(net, (3, 8, 8), run, lambda net, x: net.extra(net.stem(x))))
    assert cost.dense == parameters(net.stem) + parameters(net.head)


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('name', BACKBONES)
def test_parameters_of_a_pruned_deeplab_but_for_the_auxiliary_head(
        name: str) -> None:
    from gdp_mmseg.engine.model import analyse_model, build_base_model
    net = build_base_model(None, deeplab(BACKBONES[name])).eval()
    analysis, _ = analyse_model(net, (3, 49, 41))
    openness = halves(analysis, 0)
    pruned, _ = prune(net, analysis, openness)
    for model, gates in ((net, torch.ones_like(openness)), (pruned, openness)):
        assert ParameterCost(analysis).count(
            gates) == parameters(model) - parameters(
                model.get_submodule('auxiliary_head'))


def test_indices_follow_their_module_and_are_not_averaged() -> None:
    cost = FlopCost(
        analyse(nn.Sequential(*block(3, 8), last(8)), (3, 8, 8), run))
    names = {name for name, _ in cost.named_buffers()}
    assert not names & {'group_of', 'sizes'}
    assert cost.half().sizes.tolist() == [8]
    assert cost.to('meta').sizes.device.type == 'meta'
