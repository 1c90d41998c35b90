"""Copies of models that keep computed tensors in plain attributes."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.tracer import clone_model
from gdp_mmseg.report.measure import count_flops
from gdp_mmseg.surgery.prune import prune

from helpers.toys import SHAPE, CachedBias, Net, block, last, run


def weight_normed() -> nn.Module:
    return nn.utils.weight_norm(nn.Conv2d(3, 4, 3))


def test_pruned_model_computes_anew_what_train_had_cached() -> None:
    net = Net(
        lambda net, x: net.head(net.bias(net.stem(x))),
        stem=block(3, 8),
        bias=CachedBias(8),
        head=last(8)).eval()
    analysis = analyse(net, SHAPE, run)
    openness = torch.ones(analysis.num_gates)
    openness[analysis.groups[0].gates[:3]] = 0
    pruned, _ = prune(net, analysis, openness)
    x = torch.randn(1, *SHAPE)
    kept = [*range(3, 8)]
    hidden = net.bias(net.stem(x))[:, kept]
    wanted = torch.conv2d(hidden, net.head.weight[:, kept], net.head.bias, 1,
                          net.head.padding)
    torch.testing.assert_close(pruned(x), wanted)


@pytest.mark.filterwarnings('ignore')
def test_model_with_a_computed_kernel_is_cloned_and_counted() -> None:
    net = weight_normed()
    clone = clone_model(net)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(clone(x), net(x))
    assert {id(one)
            for one in clone.parameters()
            }.isdisjoint(id(one) for one in net.parameters())
    assert count_flops(net, x.shape, run) == 4 * 3 * 9 * 9
