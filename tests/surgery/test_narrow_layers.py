"""Verification of narrow layers, whose kept channels could all be zero."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.surgery.verify import verify

from helpers.toys import SHAPE, Net, block, last, run


class DirectConv(nn.Conv2d):
    """Runs its kernel without the method that a gate replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, padding=1)


def chain(net: Any, x: Tensor) -> Tensor:
    return net.head(net.tail(F.relu(net.body(net.stem(x)))))


def without_norm(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


@pytest.mark.parametrize('part', [block, without_norm])
@pytest.mark.parametrize('width', [3, 5, 7])
@pytest.mark.parametrize('depth', [1, 3, 5])
def test_narrow_layers_do_not_hide_an_error_in_front_of_them(
        part: Any, width: int, depth: int) -> None:
    net = Net(
        chain,
        stem=part(3, 12),
        # No gate can act here.
        body=DirectConv(12, width, 3, padding=1),
        tail=nn.Sequential(*(part(width, width) for _ in range(depth))),
        head=last(width))
    # A gate at a norm would act.
    analysis, _ = verify(net, analyse(net, SHAPE, run).at_layers(), run)
    writers = {name for group in analysis.groups for name in group.writers}
    assert 'stem.0' not in writers


def run_with_average(net: Any, x: Tensor) -> Tensor:
    """Run a network, and move an average of its first kernel."""
    net.average.data.lerp_(net.stem[0].weight.data, 0.5)
    return net(x)


@pytest.mark.parametrize('width', [4, 5, 6, 7])
def test_no_group_passes_because_one_channel_is_broadcast(width: int) -> None:
    net = Net(
        lambda net, x: net.head(net.body(net.stem(x))),
        stem=block(3, width),
        body=block(width, 8),
        head=last(8),
        average=nn.Parameter(torch.zeros(width, 3, 3, 3), False))
    analysis, _ = verify(
        net, analyse(net, SHAPE, run), run, others=[(run_with_average, True)])
    assert [group.writers for group in analysis.groups] == [('body.0', )]
