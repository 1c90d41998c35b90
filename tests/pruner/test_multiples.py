"""Widths that are multiples of a number, as some runtimes prefer them."""
from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.gates.blocks import Blocks
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Settings
from gdp_mmseg.report.summary import note_on_widths, other_widths
from gdp_mmseg.surgery.outputs import largest_difference
from gdp_mmseg.surgery.prune import prune

from helpers.reads import reads_of
from helpers.toys import Net, block, branch, conv, gated, last, run

STEPS = 100
TARGET = 0.5


class Blocked(nn.Module):
    """Residual blocks of several widths, two of which are not even."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 30))
        self.inner = nn.ModuleList(
            branch(30, width, 30, kernel=1) for width in (18, 24, 32, 40))
        self.head = last(30)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        for inner in self.inner:
            features = F.relu(features + inner(features))
        return self.head(features)


@functools.cache
def pruned_blocks(multiple: int,
                  floor: float = 0.,
                  gate: str = 'gdp') -> tuple[Any, Pruner]:
    """Train with gates to a target, on random inputs and random wishes."""
    torch.manual_seed(0)
    net = Blocked()
    pruner = Pruner(
        analyse(net, (3, 8, 8), run),
        Settings.from_config(
            dict(
                target=TARGET,
                gate=gate,
                phases=(0.1, 0.8, 0.1),
                min_keep_ratio=floor,
                multiple=multiple)))
    with_gates = gated(net, pruner.analysis, pruner.gates)
    optimizer = torch.optim.SGD(with_gates.parameters(), lr=0.05)
    inputs, wishes = torch.randn(4, 3, 8, 8), torch.randn(4, 2, 8, 8)
    for step in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(with_gates(inputs), wishes).backward()
        pruner.step_(step / STEPS, STEPS)
        optimizer.step()
    return with_gates.eval(), pruner


def kept_of(pruner: Pruner) -> list[int]:
    channels = pruner.channels()
    return [
        int(channels[group.gates].sum()) for group in pruner.analysis.groups
    ]


@pytest.mark.parametrize('multiple, points, gate', [(4, 3, 'gdp'),
                                                    (8, 6, 'gdp'),
                                                    (4, 3, 'trainable')])
def test_all_widths_become_multiples_and_open_channels(multiple: int,
                                                       points: int,
                                                       gate: str) -> None:
    _, pruner = pruned_blocks(multiple, gate=gate)
    kept = kept_of(pruner)
    assert all(number % multiple == 0 for number in kept)
    assert 0 < sum(kept) < pruner.analysis.num_gates
    # Every channel that is kept is an open one.
    openness = pruner.gates.decided()
    keep = pruner.channels() > 0
    assert torch.equal(openness > 0, keep)
    assert float(openness[openness > 0].min()) > 0.9
    # Blocks are worth several points of so small a network.
    cost = float(pruner.cost(pruner.channels()))
    assert 100 * abs(cost - TARGET) < points
    assert other_widths(pruner.analysis, keep, multiple) == {}
    assert note_on_widths(pruner.analysis, keep, multiple) is None


def test_networks_of_multiples_are_exact() -> None:
    net, pruner = pruned_blocks(4)
    dense = Blocked().eval()
    dense.load_state_dict(net.state_dict())
    pruned, widths = prune(dense, pruner.analysis, pruner.gates.decided())
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert largest_difference([pruned(inputs)], [net(inputs)]) < 1e-5
    assert widths['head'][1] in (4, 8, 12, 16, 20, 24, 28)


def test_a_step_in_blocks_reads_no_more_from_the_device() -> None:
    pruner = copy.deepcopy(pruned_blocks(4)[1])
    pruner.begin_(0.85, STEPS)
    pruner.gates.theta.grad = torch.ones_like(pruner.gates.theta)
    with reads_of('gdp_mmseg') as found:
        pruner.step_(0.85, STEPS)
    assert len(found) == 1, found


def test_channels_close_one_by_one_by_default() -> None:
    assert Settings.from_config(dict(target=0.5)).multiple == 1
    analysis = analyse(nn.Sequential(*block(3, 8), last(8)), (3, 8, 8), run)
    one = Settings.from_config(dict(target=0.5, multiple=1))
    assert Pruner(analysis, one).blocks is None


def blocks_of(net: nn.Module, multiple: int,
              **options: Any) -> tuple[Blocks, Analysis]:
    analysis = analyse(net, (3, 8, 8), run, **options)
    return Blocks(analysis, multiple), analysis


def test_blocks_hold_whole_multiples_of_channels_on_every_axis() -> None:
    chain = nn.Sequential(*block(3, 12), last(12))
    shuffled = nn.Sequential(conv(3, 32), nn.PixelShuffle(2), last(8))
    twice = Net(
        lambda net, x: net.head(torch.cat([net.stem(x)] * 2, 1)),
        stem=conv(3, 12),
        head=last(24))
    grouped = nn.Sequential(*block(3, 16), conv(16, 16, groups=4), nn.ReLU(),
                            last(16))
    assert blocks_of(chain, 4)[0].sizes.tolist() == [4]
    # Four channels of the first layer become one.
    assert blocks_of(shuffled, 4)[0].sizes.tolist() == [4]
    assert blocks_of(twice, 4)[0].sizes.tolist() == [4]
    # A gate stands for one channel of each of the four groups.
    assert blocks_of(grouped, 4)[0].sizes.tolist() == [1, 1]
    assert blocks_of(grouped, 8)[0].sizes.tolist() == [2, 2]


def test_blocks_close_as_soon_as_they_are_low() -> None:
    blocks, _ = blocks_of(nn.Sequential(*block(3, 10), last(10)), 4)
    is_open = torch.arange(10) < 9

    def left(low: int) -> int:
        return int(blocks.left(is_open, is_open & (torch.arange(10) >= low)))

    # Nine are open, and eight of them are two blocks.
    assert [left(low) for low in range(10)] == [8, 8, 8, 8, 8, 4, 4, 4, 4, 0]
    stays = is_open & (torch.arange(10) >= 6)
    channels = blocks.channels(is_open, stays)
    assert channels.sum() == 4 and torch.equal(channels > 0, stays)


def test_a_floor_and_a_group_that_cannot_be_empty_keep_whole_blocks() -> None:
    _, pruner = pruned_blocks(4, 0.5)
    sizes = [len(group.gates) for group in pruner.analysis.groups]
    kept = kept_of(pruner)
    assert all(number % 4 == 0 for number in kept)
    assert all(number >= 0.5 * size for number, size in zip(kept, sizes))


def test_a_group_that_has_no_room_for_a_block_keeps_all_or_nothing() -> None:
    net = nn.Sequential(*block(3, 2), *block(2, 32), last(32))
    pruner = Pruner(
        analyse(net, (3, 8, 8), run),
        Settings.from_config(
            dict(target=0.5, multiple=4, phases=(0.1, 0.8, 0.1))))
    keep = torch.ones(34, dtype=torch.bool)
    for step in range(STEPS):
        pruner.gates.theta.grad = torch.full((34, ), -1.)
        pruner.step_(step / STEPS, STEPS)
    narrow, wide = kept_of(pruner)
    assert narrow in (0, 2) and wide % 4 == 0
    assert note_on_widths(pruner.analysis, keep, 4) == (
        'gdp.multiple is 4, but the outputs of 1 layer(s) are no multiple of '
        'it: 0 (2)')


def _pruner_of_chain(widths: tuple[int, ...], target: float,
                     multiple: int) -> Pruner:
    """Pruner of a chain of layers."""
    pairs = zip((3, *widths), widths)
    net = nn.Sequential(*(nn.Sequential(*block(*pair)) for pair in pairs),
                        last(widths[-1]))
    return Pruner(
        analyse(net, (3, 8, 8), run),
        Settings.from_config(
            dict(target=target, multiple=multiple, phases=(0.1, 0.8, 0.1))))


@pytest.mark.parametrize('target, kept', [(0.3, [8, 8, 8, 8]),
                                          (0.7, [8, 16, 8, 16])])
def test_groups_of_no_multiple_keep_one_near_the_target(
        target: float, kept: list[int]) -> None:
    pruner = _pruner_of_chain((12, 20, 12, 20), target, 8)
    draws = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        pruner.gates.theta.grad = torch.randn(64, generator=draws)
        pruner.step_(step / STEPS, STEPS)
    assert kept_of(pruner) == kept
    cost = float(pruner.cost(pruner.channels()))
    assert (pruner.note_on(cost) is None) == (target == 0.3)
    assert (pruner.note_on_target() is None) == (target == 0.3)


def test_a_target_that_blocks_cannot_meet_is_noted() -> None:
    dense = 3 * 12 + 12 * 20 + 20 * 12 + 12 * 20 + 20 * 2
    most = (3 * 8 + 8 * 16 + 16 * 8 + 8 * 16 + 16 * 2) / dense
    least = (3 * 8 + 8 * 8 + 8 * 8 + 8 * 8 + 8 * 2) / dense
    high, low = (
        _pruner_of_chain((12, 20, 12, 20), target, 8)
        for target in (most + 0.011, least + 0.001))
    assert high.note_on_target() == (
        f'gdp.target is {most + 0.011}, but with widths in multiples of 8 at '
        f'most {most:.2g} of the FLOPs are left; lower gdp.multiple or '
        'gdp.target')
    assert low.note_on_target() is None
    missed = 'blocks of gdp.multiple=8 channels are too large to meet it'
    assert missed in str(high.note_on(most))


def test_a_chain_of_single_blocks_is_refused_because_it_would_die() -> None:
    with pytest.raises(ValueError) as error:
        _pruner_of_chain((8, 12, 8), 0.5, 8)
    dense = 3 * 8 + 8 * 12 + 12 * 8 + 8 * 2
    least = (3 * 8 + 8 * 8 + 8 * 8 + 8 * 2) / dense
    assert str(error.value).startswith(
        f'gdp.target: expected more than {least:.4g}, because '
        f'{100 * least:.4g}% of the FLOPs cannot be pruned with '
        'gdp.multiple=8, but got 0.5; raise gdp.target, lower gdp.multiple')


def test_a_multiple_larger_than_every_group_is_refused() -> None:
    net = nn.Sequential(*block(3, 6), *block(6, 12), last(12))
    with pytest.raises(ValueError) as error:
        Pruner(
            analyse(net, (3, 8, 8), run),
            Settings.from_config(dict(target=0.5, multiple=16)))
    assert str(error.value) == (
        'gdp.multiple: expected at most 12, the number of gates of the '
        'largest group, but got 16; lower gdp.multiple')
