"""Products without a gate still cost what they cost, and are listed."""
from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.cost.counts import FlopCost, inference_layers
from gdp_mmseg.cost.latency import measure, stopwatch
from gdp_mmseg.surgery.verify import verify

from helpers.toys import (SHAPE, Net, StandardisedConv, block, conv,
                          counted_macs, last, run)


class OwnKernelLinear(nn.Linear):
    """A linear layer whose kernel is computed from a parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.tanh(self.weight), self.bias)


def between(body: Callable[[], nn.Module]) -> nn.Module:
    """A layer of 6 -> 8 channels between two ordinary blocks."""
    return Net(
        lambda net, x: net.head(net.after(net.body(net.stem(x)))),
        stem=nn.Sequential(*block(3, 4), *block(4, 6)),
        body=body(),
        after=block(8, 5),
        head=last(5))


def on_tokens(body: nn.Module) -> nn.Module:
    """A linear layer of 6 -> 8 features on the pixels of a map."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).flatten(2).transpose(1, 2)
        return net.head(net.body(x).transpose(1, 2).unflatten(2, (8, 8)))

    return Net(
        forward,
        stem=nn.Sequential(*block(3, 4), *block(4, 6)),
        body=body,
        head=last(8))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    'weight standardisation':
    lambda: between(lambda: StandardisedConv(6, 8, 3, padding=1)),
    'grouped weight standardisation':
    lambda: between(lambda: StandardisedConv(6, 8, 3, padding=1, groups=2)),
    'spectral norm':
    lambda: between(lambda: parametrizations.spectral_norm(conv(6, 8))),
    'weight norm':
    lambda: between(lambda: parametrizations.weight_norm(conv(6, 8))),
    'older weight norm':
    lambda: between(lambda: weight_norm(conv(6, 8))),
    'transposed weight norm':
    lambda: between(lambda: parametrizations.weight_norm(
        nn.ConvTranspose2d(6, 8, 3, padding=1, groups=2))),
    'linear with a bias':
    lambda: on_tokens(OwnKernelLinear(6, 8)),
    'linear without a bias':
    lambda: on_tokens(OwnKernelLinear(6, 8, bias=False)),
}


def analysed(net: nn.Module) -> Analysis:
    return verify(net, analyse(net, SHAPE, run), run)[0]


@pytest.mark.parametrize('name', LAYERS)
def test_layer_with_a_computed_kernel_counts_and_is_listed(name: str) -> None:
    net = LAYERS[name]().eval()
    analysis = analysed(net)
    if name == 'older weight norm':
        net.body.weight = net.body.weight.detach()  # copied to be counted
    assert analysis.num_gates > 0
    assert FlopCost(analysis).dense == counted_macs(net,
                                                    torch.zeros(1, *SHAPE))
    row, = (row for row in analysis.frozen if row.writers == ('body', ))
    assert row.reason == 'computed kernel in body' and row.channels == 8


@pytest.mark.parametrize('name', LAYERS)
def test_layer_with_a_computed_kernel_can_be_timed(name: str) -> None:
    layers = inference_layers(analysed(LAYERS[name]().eval()))
    times = measure(layers, torch.device('cpu'), stopwatch, seconds=-1)
    assert bool((times.sum(1) > 0).all())


def _biased_product(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x).flatten(2).transpose(1, 2)
    return net.head(
        torch.baddbmm(net.value(x), net.mix(x),
                      net.square(x)[:, :6]))


def _product_of_kernels(net: Any, x: Tensor) -> Tensor:
    kernel = net.up.weight.flatten(1) @ net.down.weight.flatten(1)
    return net.head(net.stem(x)) + F.conv2d(x, kernel[:, :, None, None])


PRODUCTS: dict[str, Callable[[], nn.Module]] = {
    'product with a sum':
    lambda: Net(
        _biased_product,
        stem=block(3, 4),
        mix=nn.Linear(4, 6),
        square=nn.Linear(4, 5),
        value=nn.Linear(4, 5),
        head=nn.Linear(5, 2)),
    'kernel that is a product of kernels':
    lambda: Net(
        _product_of_kernels,
        stem=block(3, 4),
        down=conv(3, 7, 1),
        up=conv(7, 2, 1),
        head=last(4)),
}


@pytest.mark.parametrize('name', PRODUCTS)
def test_every_product_counts_once(name: str) -> None:
    net = PRODUCTS[name]().eval()
    assert FlopCost(analyse(net, SHAPE, run)).dense == counted_macs(
        net, torch.zeros(1, *SHAPE))


def test_layer_that_runs_in_training_only_costs_nothing() -> None:
    net = between(lambda: StandardisedConv(6, 8, 3, padding=1))
    net.extra = StandardisedConv(4, 2, 1)
    plain = FlopCost(analyse(net, SHAPE, run)).dense
    assert plain == FlopCost(
        analyse(net, SHAPE, run,
                lambda net, x: [net(x), net.extra(net.stem[:3](x))])).dense


# -- operators of other libraries -------------------------------------------


@torch.library.custom_op('gdp_tests::convolution', mutates_args=())
def shuffled_convolution(inputs: Tensor, weight: Tensor) -> Tensor:
    """Convolve with the inputs in another order; only its name is known."""
    return F.conv2d(inputs.flip(1), weight)


@shuffled_convolution.register_fake
def _(inputs: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(inputs, weight)


@torch.library.custom_op('gdp_tests::_softmax', mutates_args=())
def sorted_channels(inputs: Tensor, dim: int, flag: bool) -> Tensor:
    """Mix channels under the name of an operator with a rule."""
    return inputs.sort(1)[0]


@sorted_channels.register_fake
def _(inputs: Tensor, dim: int, flag: bool) -> Tensor:
    return torch.empty_like(inputs)


@pytest.mark.parametrize('mix', [
    lambda net, x: shuffled_convolution(x, net.body.weight),
    lambda net, x: net.body(sorted_channels(x, 2, False)),
])
def test_operator_of_another_library_goes_by_no_rule(mix: Any) -> None:
    net = Net(
        lambda net, x: net.head(net.after(mix(net, net.stem(x)))),
        stem=nn.Sequential(*block(3, 4), *block(4, 6)),
        body=conv(6, 7, 1),
        after=block(7, 5),
        head=last(5))
    analysis = analyse(net, SHAPE, run)
    written = {name for group in analysis.groups for name in group.writers}
    assert 'stem.3' not in written
    row, = (row for row in analysis.frozen if 'stem.3' in row.writers)
    assert row.reason.startswith('gdp_tests::')
