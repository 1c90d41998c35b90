"""Verification of narrow layers, whose kept channels could all be zero."""
from __future__ import annotations

from typing import Any

import pytest
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
    analysis, _ = verify(net, analyse(net, SHAPE, run), run)
    writers = {name for group in analysis.groups for name in group.writers}
    assert 'stem.0' not in writers
