"""Multiply-adds, counted by hand."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.cost import Cost
from gdp_mmseg.groups import Groups, analyse

from toys import (BACKBONES, TOYS, Net, block, conv, counted_macs, deeplab,
                  last, run)

POSITIONS = 8 * 8  # of every toy's feature map


def cost_of(name: str) -> tuple[Groups, Cost]:
    groups = TOYS[name].analyse()[1]
    return groups, Cost(groups)


def openness_of(groups: Groups) -> Tensor:
    return torch.rand(
        groups.number, generator=torch.Generator().manual_seed(4))


def sum_of(groups: Groups, openness: Tensor, *modules: str) -> Tensor:
    """Openness of the group that touches exactly these modules."""
    group, = (
        group for group in groups.groups
        if {*group.writers, *group.readers} == {*modules})
    return openness[group.gates].sum()


def check(cost: Cost, openness: Tensor, dense: int, by_hand: Tensor) -> None:
    assert cost.dense == dense
    torch.testing.assert_close(cost(openness), by_hand / dense)
    assert cost(torch.ones_like(openness)).item() == pytest.approx(1)


def test_chain() -> None:
    groups, cost = cost_of('chain')
    g = openness_of(groups)
    a, b = sum_of(groups, g, '0', '3'), sum_of(groups, g, '3', '6')
    check(cost, g, POSITIONS * 9 * (3 * 4 + 4 * 6 + 6 * 2),
          POSITIONS * 9 * (3 * a + a * b + b * 2))


def test_residual() -> None:
    groups, cost = cost_of('residual')
    g = openness_of(groups)
    stream = sum_of(groups, g, 'stem.0', 'branch.0', 'branch.3', 'head')
    inside = sum_of(groups, g, 'branch.0', 'branch.3')
    check(cost, g, POSITIONS * 9 * (3 * 4 + 4 * 5 + 5 * 4 + 4 * 2),
          POSITIONS * 9 * (3 * stream + 2 * stream * inside + stream * 2))


def test_depthwise_behind_concat() -> None:
    groups, cost = cost_of('depthwise behind concat')
    g = openness_of(groups)
    a = sum_of(groups, g, 'a.0', 'depth.0', 'point.0')
    b = sum_of(groups, g, 'b.0', 'depth.0', 'point.0')
    c = sum_of(groups, g, 'point.0', 'head')
    check(
        cost, g, POSITIONS * (9 * 3 * 9 + 9 * 9 + 9 * 6 + 9 * 6 * 2),
        POSITIONS * (9 * 3 * (a + b) + 9 * (a + b) + (a + b) * c + 9 * c * 2))


def test_depthwise_of_two_per_channel() -> None:
    groups, cost = cost_of('depthwise of two per channel')
    g = openness_of(groups)
    a, b = sum_of(groups, g, '0', '3', '6'), sum_of(groups, g, '6', '9')
    check(cost, g, POSITIONS * 9 * (3 * 4 + 8 + 8 * 5 + 5 * 2),
          POSITIONS * 9 * (3 * a + 2 * a + 2 * a * b + b * 2))


def test_grouped_with_channels_of_each_group() -> None:
    groups, cost = cost_of('grouped convolution of few groups')
    g = openness_of(groups)
    a = 2 * sum_of(groups, g, 'stem.0', 'grouped.0')
    b = 2 * sum_of(groups, g, 'grouped.0', 'body.0')
    c = sum_of(groups, g, 'body.0', 'head')
    check(cost, g, POSITIONS * 9 * (3 * 8 + 8 * 6 // 2 + 6 * 5 + 5 * 2),
          POSITIONS * 9 * (3 * a + a * b / 2 + b * c + c * 2))


def test_grouped_with_whole_groups() -> None:
    groups, cost = cost_of('grouped convolution of many groups')
    g = openness_of(groups)
    blocks = sum_of(groups, g, 'stem.0', 'grouped.0', 'body.0')
    a = sum_of(groups, g, 'body.0', 'head')
    check(
        cost, g, POSITIONS * 9 * (3 * 8 + 8 * 12 // 4 + 12 * 5 + 5 * 2),
        POSITIONS * 9 *
        (3 * 2 * blocks + blocks * 2 * 3 + 3 * blocks * a + a * 2))


def test_linear_counts_its_rows() -> None:
    groups, cost = cost_of('linear behind mean')
    g = openness_of(groups)
    a, b = sum_of(groups, g, 'stem.0',
                  'middle'), sum_of(groups, g, 'middle', 'head')
    check(cost, g, POSITIONS * 9 * 3 * 4 + 4 * 5 + 5 * 2,
          POSITIONS * 9 * 3 * a + a * b + b * 2)
    groups, cost = cost_of('linear on tokens')
    g = openness_of(groups)
    a, b = sum_of(groups, g, 'stem.0', 'up'), sum_of(groups, g, 'up', 'head')
    check(cost, g, POSITIONS * (9 * 3 * 4 + 4 * 6 + 6 * 2),
          POSITIONS * (9 * 3 * a + a * b + b * 2))


def test_flattened_channel_counts_with_all_its_positions() -> None:
    groups, cost = cost_of('linear behind flatten')
    g = openness_of(groups)
    check(cost, g, POSITIONS * (9 * 3 * 4 + 4 * 2),
          POSITIONS * (9 * 3 * g.sum() + g.sum() * 2))


def test_layer_called_twice_counts_twice() -> None:
    groups, cost = cost_of('called twice')
    g = openness_of(groups)
    s = g.sum()
    check(cost, g, POSITIONS * 9 * (3 * 4 + 2 * 4 * 4 + 4 * 2),
          POSITIONS * 9 * (3 * s + 2 * s * s + s * 2))


def test_strided_output_counts_its_own_size() -> None:
    groups, cost = cost_of('residual with downsample')
    fine, coarse = POSITIONS, POSITIONS // 4
    assert cost.dense == 9 * fine * 3 * 4 + coarse * (4 * 6 + 9 *
                                                      (4 * 5 + 5 * 6 + 6 * 2))


def test_what_only_training_runs_is_not_counted() -> None:
    net = Net(
        lambda net, x: net.head(net.stem(x)),
        stem=block(3, 4),
        head=last(4),
        extra=conv(4, 5))
    plain = Cost(analyse(net, (3, 8, 8), run))
    trained = Cost(
        analyse(net, (3, 8, 8), run, lambda net, x: net.extra(net.stem(x))))
    openness = torch.linspace(0, 1, 4)
    assert trained.dense == plain.dense == POSITIONS * 9 * (3 * 4 + 4 * 2)
    assert torch.equal(trained(openness), plain(openness))


@pytest.mark.parametrize('name', TOYS)
def test_price_is_the_derivative_of_the_cost(name: str) -> None:
    groups, cost = cost_of(name)
    openness = openness_of(groups).requires_grad_()
    derivative, = torch.autograd.grad(cost(openness), openness)
    torch.testing.assert_close(cost.price(openness.detach()), derivative)


@pytest.mark.parametrize('name', TOYS)
def test_dense_is_what_torch_counts(name: str) -> None:
    toy = TOYS[name]
    net, groups = toy.analyse()
    assert Cost(groups).dense + toy.uncounted == counted_macs(
        net,
        toy.inputs()[:1])


@pytest.mark.parametrize('name', TOYS)
def test_macs_are_the_share_of_the_dense_ones(name: str) -> None:
    groups, cost = cost_of(name)
    openness = openness_of(groups)
    assert cost.macs(torch.ones(groups.number)) == cost.dense
    assert cost.macs(openness) == pytest.approx(
        float(cost(openness)) * cost.dense, rel=1e-5, abs=1)


@pytest.mark.parametrize('name', TOYS)
def test_share_of_a_group_is_what_closing_it_saves(name: str) -> None:
    groups, cost = cost_of(name)
    for group, share in zip(groups.groups, cost.group_macs(), strict=True):
        openness = torch.ones(groups.number)
        openness[group.gates] = 0
        assert float(share) == pytest.approx(
            1 - cost.macs(openness) / cost.dense, abs=1e-6)


def test_cost_moves_with_its_module_and_adds_nothing_to_a_checkpoint() -> None:
    cost = cost_of('residual')[1]
    assert not cost.state_dict()
    assert not [*cost.parameters()]
    moved = nn.ModuleDict(dict(cost=cost)).to('meta')
    assert all(buffer.is_meta for buffer in moved.buffers())


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.parametrize('name', BACKBONES)
def test_dense_deeplab_is_what_torch_counts(name: str) -> None:
    from gdp_mmseg.model import analyse_model, build_base_model
    net = build_base_model(None, deeplab(BACKBONES[name])).eval()
    groups, _ = analyse_model(net, (3, 49, 41))
    cost = Cost(groups)
    assert cost.dense == counted_macs(
        net, torch.zeros(1, 3, 49, 41),
        lambda net, inputs: net(inputs, mode='tensor'))
    assert cost.macs(torch.ones(groups.number)) == cost.dense
