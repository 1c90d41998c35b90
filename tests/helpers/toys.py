"""Toy networks, and DeepLabV3Plus at toy size, for the tables of the tests.

A toy says what an analysis of it must find: which modules share how many
channels, and which channels are frozen by which operator.
"""
from __future__ import annotations

import copy
import dataclasses
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.gates.gdp import GDPGates
from gdp_mmseg.gates.layers import gate_

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Named parts and the function that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Any],
                 **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Any:
        return self.run(self, inputs)


_ANALYSED: dict[int, tuple[nn.Module, Analysis]] = {}


@dataclasses.dataclass(frozen=True)
class Toy:
    """A network and what an analysis must say of it.

    Args:
        build (Callable[[], nn.Module]): Makes it.
        groups (tuple[tuple[int, str], ...]): Gates of each group, and the
            names of all convolutions and linear layers that it touches.
        frozen (dict[str, str]): Module to a part of the reason for which its
            output channels are frozen. The head, whose outputs are the
            model's, is frozen in every toy.
        shape (tuple[int, ...]): ``(C, H, W)`` of one input.
    """
    build: Callable[[], nn.Module]
    groups: tuple[tuple[int, str], ...]
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = SHAPE

    def analyse(self) -> tuple[nn.Module, Analysis]:
        """The network with random weights in eval mode, and its groups.

        The network is a copy of what the first call made; nothing changes
        an analysis.
        """
        if id(self) not in _ANALYSED:
            torch.manual_seed(0)
            net = randomise_(self.build()).eval()
            _ANALYSED[id(self)] = net, analyse(net, self.shape, run)
        torch.manual_seed(0)
        net, analysis = _ANALYSED[id(self)]
        return copy.deepcopy(net), analysis

    def inputs(self) -> Tensor:
        """A batch of two."""
        return torch.randn((2, *self.shape),
                           generator=torch.Generator().manual_seed(1))


def run(net: nn.Module, inputs: Tensor) -> Any:
    return net(inputs)


def conv(inputs: int,
         outputs: int,
         kernel: int = 3,
         **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1, without a bias."""
    return nn.Conv2d(inputs, outputs, kernel, **{
        'padding': kernel // 2,
        'bias': False,
        **options
    })


def block(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU: names 0, 1, 2."""
    return nn.Sequential(
        conv(inputs, outputs, **options), nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True))


def last(inputs: int) -> nn.Conv2d:
    """The model's output: with a bias, it says something whatever is dead."""
    return conv(inputs, 2, bias=True)


def branch(inputs: int, inner: int, outputs: int,
           **options: Any) -> nn.Sequential:
    """Residual branch; its convolutions are 0 and 3."""
    return nn.Sequential(*block(inputs, inner, **options),
                         conv(inner, outputs), nn.BatchNorm2d(outputs))


def randomise_(net: nn.Module) -> nn.Module:
    """Random statistics and affine parameters of norms and biases, in place.

    Without them a dead branch would leave no constant to get wrong.
    """
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 1.5)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
            elif isinstance(getattr(module, 'bias', None), nn.Parameter):
                module.bias.normal_()
    return net


def gated(net: nn.Module, analysis: Analysis, gates: GDPGates) -> nn.Module:
    """A copy of a network with gates in it."""
    net = copy.deepcopy(net)
    gate_(net, analysis, gates)
    return net


def open_gates(open_: Tensor) -> GDPGates:
    """Gates at random openness where ``open_``, exact zero elsewhere."""
    gates = GDPGates(len(open_))
    with torch.no_grad():
        gates.theta.uniform_(
            0.2, 2., generator=torch.Generator().manual_seed(2))
        gates.theta[~open_] = 0
    return gates


def counted_macs(net: nn.Module,
                 inputs: Tensor,
                 forward: Callable[[nn.Module, Tensor], Any] = run) -> int:
    """Multiply-adds as PyTorch counts them: two FLOPs each.

    Without data, where attention runs as the products that it is made of.
    """
    net, inputs = copy.deepcopy(net).to('meta'), inputs.to('meta')
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(net, inputs)
    return counter.get_total_flops() // 2


# -- the forward passes that are more than a line --------------------------


def _shuffle(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return net.head(net.depth(x))


def _halves(net: Any, x: Tensor) -> Tensor:
    left, right = net.stem(x).chunk(2, dim=1)
    return net.head(torch.cat([net.left(left), right], 1))


def _squeeze_excite(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    scale = net.up(F.relu(net.down(x.mean((2, 3), keepdim=True))))
    return net.head(x * scale.sigmoid())


def _shared_head(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    fine = net.fine(x)
    return net.head(fine), net.head(net.coarse(fine))


def _skip_concat(net: Any, x: Tensor) -> Tensor:
    fine = net.fine(x)
    coarse = F.interpolate(
        net.coarse(fine),
        size=fine.shape[2:],
        mode='bilinear',
        align_corners=False)
    return net.head(torch.cat([coarse, fine], 1))


def _image_pool(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    pooled = F.interpolate(
        net.pool(F.adaptive_avg_pool2d(x, 1)), size=x.shape[2:])
    return net.head(torch.cat([pooled, x], 1))


def _option_a(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
    return net.head(F.relu(short + net.branch(x)))


def _cropped(net: Any, x: Tensor) -> Tensor:
    return net.head(F.pad(net.body(net.stem(x)), (0, 0, 0, 0, 0, -1)))


def _zeros(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    zeros = torch.zeros(
        len(x), 2, *x.shape[2:], device=x.device, dtype=x.dtype)
    short = torch.cat([x, zeros], 1)
    return net.head(F.relu(short + net.branch(x)))


def _shared_norm(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    return net.head(
        F.relu(
            net.norm(net.right(F.relu(net.left(y)))) + net.norm(net.skip(y))))


def _raw_and_normed(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    raw = net.raw(net.stem(x))
    return raw, net.head(F.relu(net.norm(raw)))


def _tied_decoder(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    code = net.middle(F.relu(net.code(x)))
    return net.head(
        F.conv_transpose2d(F.relu(code), net.code.weight, padding=1))


def _grouped_shuffle(net: Any, x: Tensor) -> Tensor:
    x = net.first(net.stem(x))
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return net.head(net.second(x))


def _attend(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x).flatten(2).transpose(1, 2)
    weights = (net.query(x) @ net.key(x).transpose(1, 2)).softmax(-1)
    return net.head(weights @ net.value(x))


def _attend_in_heads(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x).flatten(2).transpose(1, 2)
    query, key, value = (
        part(x).unflatten(2, (2, -1)).transpose(1, 2)
        for part in (net.query, net.key, net.value))
    x = F.scaled_dot_product_attention(query, key, value)
    return net.head(x.transpose(1, 2).flatten(2))


class StandardisedConv(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019): a computed kernel."""

    def forward(self, input: Tensor) -> Tensor:
        axes = tuple(range(1, self.weight.dim()))
        kernel = self.weight - self.weight.mean(axes, keepdim=True)
        kernel = kernel / (kernel.std(axes, keepdim=True) + 1e-5)
        return self._conv_forward(input, kernel, self.bias)


def _selective(net: Any, x: Tensor) -> Tensor:
    """Two paths, weighted by a softmax over the paths (SKNet)."""
    paths = torch.stack([net.one(x), net.two(x)], 1)
    pooled = paths.sum(1).mean((2, 3), keepdim=True)
    share = net.select(net.squeeze(pooled).relu())
    share = share.reshape(len(x), 2, -1, 1, 1).softmax(1)
    return net.last((paths * share).sum(1))


def _normed_attention(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x).flatten(2).transpose(1, 2)
    query, key = net.norm(net.query(x)), net.norm(net.key(x))
    return net.head((query @ key.transpose(1, 2)).softmax(-1) @ net.value(x))


def _learnt_queries(net: Any, x: Tensor) -> Tensor:
    """Queries of no image, then repeated for each, meet the features."""
    x = net.stem(x).flatten(2).transpose(1, 2)
    queries = net.mix(net.query(net.tokens).expand(len(x), -1, -1))
    return net.head((queries @ x.transpose(1, 2)).softmax(-1) @ net.value(x))


TOYS: dict[str, Toy] = {
    'selective':
    Toy(
        lambda: Net(
            _selective,
            one=block(3, 8),
            two=block(3, 8),
            squeeze=conv(8, 4),
            select=conv(4, 16),
            last=last(8)),
        ((8, 'one.0 two.0 squeeze select last'), (4, 'squeeze select'))),
    'computed kernel':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.after(net.body(net.stem(x)))),
            stem=nn.Sequential(*block(3, 4), *block(4, 6)),
            body=StandardisedConv(6, 8, 3, padding=1),
            after=block(8, 5),
            head=last(5)), ((4, 'stem.0 stem.3'), (5, 'after.0 head')), {
                'stem.3': 'convolution in body',
                'body': 'computed kernel in body'
            }),
    'attention behind a layer norm':
    Toy(
        lambda: Net(
            _normed_attention,
            stem=block(3, 4),
            query=nn.Linear(4, 6),
            key=nn.Linear(4, 6),
            norm=nn.LayerNorm(6),
            value=nn.Linear(4, 5),
            head=nn.Linear(5, 2)),
        ((4, 'stem.0 query key value'), (5, 'value head')), {
            'query': 'native_layer_norm in norm',
            'key': 'native_layer_norm in norm'
        }),
    'learnt queries':
    Toy(
        lambda: Net(
            _learnt_queries,
            stem=nn.Sequential(*block(3, 5), *block(5, 4)),
            tokens=nn.Parameter(torch.linspace(-1, 1, 35).reshape(1, 7, 5)),
            query=nn.Linear(5, 6),
            mix=nn.Linear(6, 4),
            value=nn.Linear(4, 5),
            head=nn.Linear(5, 2)),
        ((5, 'stem.0 stem.3'), (6, 'query mix'), (5, 'value head')), {
            'stem.3': 'bmm over it',
            'mix': 'bmm over it'
        }),
    'chain':
    Toy(lambda: nn.Sequential(*block(3, 4), *block(4, 6), last(6)),
        ((4, '0 3'), (6, '3 6'))),
    'bias before norm':
    Toy(
        lambda: nn.Sequential(*block(3, 4, bias=True), *block(4, 6, bias=True),
                              last(6)), ((4, '0 3'), (6, '3 6'))),
    'no norm':
    Toy(
        lambda: nn.Sequential(
            conv(3, 4, bias=True), nn.ReLU(), conv(4, 6, bias=True), nn.ReLU(),
            last(6)), ((4, '0 2'), (6, '2 4'))),
    'norm without affine':
    Toy(
        lambda: nn.Sequential(
            conv(3, 4), nn.BatchNorm2d(4, affine=False), conv(4, 6),
            nn.BatchNorm2d(6, affine=False), nn.ReLU(), last(6)),
        ((4, '0 2'), (6, '2 5'))),
    'norm without statistics':
    Toy(
        lambda: nn.Sequential(
            conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), conv(
                4, 6), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(),
            last(6)), ((4, '0 2'), (6, '2 5'))),
    'dropout and activations':
    Toy(
        lambda: nn.Sequential(*block(3, 4), nn.Dropout2d(0.5), nn.GELU(
        ), nn.Hardsigmoid(), conv(4, 6), nn.BatchNorm2d(6), nn.SiLU(
        ), nn.LeakyReLU(0.1), nn.ReLU6(), nn.ELU(), nn.Dropout(0.5), last(6)),
        ((4, '0 6'), (6, '6 13'))),
    'hard swish':
    Toy(
        lambda: nn.Sequential(
            conv(3, 4), nn.BatchNorm2d(4), nn.Hardswish(), *block(4, 6), last(
                6)), ((4, '0 3'), (6, '3 6'))),
    'pooling':
    Toy(
        lambda: nn.Sequential(*block(3, 4), nn.MaxPool2d(3, 2, 1), *block(
            4, 6), nn.AvgPool2d(2), last(6)), ((4, '0 4'), (6, '4 8'))),
    'stride and dilation without padding':
    Toy(lambda: nn.Sequential(*block(3, 4, stride=2, padding=0),
                              *block(4, 5, dilation=2, padding='same'),
                              *block(5, 6, kernel=2, padding='valid'), last(6)
                              ), ((4, '0 3'), (5, '3 6'), (6, '6 9')),
        shape=(3, 11, 12)),
    'residual':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                F.relu((y := net.stem(x)) + net.branch(y))),
            stem=block(3, 4),
            branch=branch(4, 5, 4),
            head=last(4)),
        ((4, 'stem.0 branch.0 branch.3 head'), (5, 'branch.0 branch.3'))),
    'residual with downsample':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                F.relu(net.down(y := net.stem(x)) + net.branch(y))),
            stem=block(3, 4),
            down=block(4, 6, kernel=1, stride=2)[:2],
            branch=branch(4, 5, 6, stride=2),
            head=last(6)),
        ((4, 'stem.0 down.0 branch.0'), (5, 'branch.0 branch.3'),
         (6, 'down.0 branch.3 head'))),
    'concat':
    Toy(
        lambda: Net(
            lambda net, x: net.head(torch.cat([net.a(x), net.b(x)], 1)),
            a=block(3, 4),
            b=block(3, 5),
            head=last(9)), ((4, 'a.0 head'), (5, 'b.0 head'))),
    'depthwise behind concat':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                net.point(net.depth(torch.cat([net.a(x), net.b(x)], 1)))),
            a=block(3, 4),
            b=block(3, 5),
            depth=block(9, 9, groups=9),
            point=block(9, 6, kernel=1),
            head=last(6)), ((4, 'a.0 depth.0 point.0'),
                            (5, 'b.0 depth.0 point.0'), (6, 'point.0 head'))),
    'depthwise beside another reader':
    Toy(
        lambda: Net(
            lambda net, x: net.head(y := net.stem(x)) + net.side(net.depth(y)),
            stem=block(3, 4),
            depth=block(4, 4, groups=4),
            head=last(4),
            side=last(4)), ((4, 'stem.0 depth.0 head side'), )),
    'depthwise of two per channel':
    Toy(
        lambda: nn.Sequential(*block(3, 4), *block(4, 8, groups=4), *block(
            8, 5), last(5)), ((4, '0 3 6'), (5, '6 9'))),
    'depthwise of the input':
    Toy(lambda: nn.Sequential(*block(3, 6, groups=3), *block(6, 5), last(5)),
        ((5, '3 6'), ), {'0': 'input of 0'}),
    'halves':
    Toy(lambda: Net(_halves, stem=block(3, 8), left=block(4, 5), head=last(9)),
        ((4, 'stem.0 left.0 head'), (5, 'left.0 head'))),
    'channel shuffle':
    Toy(
        lambda: Net(
            _shuffle,
            stem=block(3, 8),
            depth=conv(8, 8, groups=8),
            head=last(8)), ((4, 'stem.0 depth head'), )),
    'channel roll':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                torch.cat([y := net.body(net.stem(x)),
                           y.roll(1, 1)], 1)),
            stem=block(3, 4),
            body=block(4, 5),
            head=last(10)), ((4, 'stem.0 body.0'), ), {'body.0': 'roll'}),
    'channel flip':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                torch.cat([y := net.body(net.stem(x)),
                           y.flip(1)], 1)),
            stem=block(3, 4),
            body=block(4, 5),
            head=last(10)), ((4, 'stem.0 body.0'), ), {'body.0': 'flip'}),
    'squeeze-excite':
    Toy(
        lambda: Net(
            _squeeze_excite,
            stem=block(3, 6),
            down=conv(6, 3, 1, bias=True),
            up=conv(3, 6, 1, bias=True),
            head=last(6)), ((6, 'stem.0 down up head'), (3, 'down up'))),
    'shared head':
    Toy(
        lambda: Net(
            _shared_head,
            fine=block(3, 4),
            coarse=block(4, 4, stride=2),
            head=nn.Sequential(*block(4, 5), last(5))),
        ((4, 'fine.0 coarse.0 head.0'), (5, 'head.0 head.3'))),
    'called twice':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.body(net.body(net.stem(x)))),
            stem=block(3, 4),
            body=block(4, 4),
            head=last(4)), ((4, 'stem.0 body.0 head'), )),
    'norm shared by two layers':
    Toy(
        lambda: Net(
            _shared_norm,
            stem=block(3, 4),
            left=conv(4, 5),
            right=conv(5, 6),
            skip=conv(4, 6),
            norm=nn.BatchNorm2d(6),
            head=last(6)),
        ((4, 'stem.0 left skip'), (5, 'left right'), (6, 'right skip head'))),
    'output before its norm':
    Toy(
        lambda: Net(
            _raw_and_normed,
            stem=block(3, 4),
            raw=conv(4, 5, bias=True),
            norm=nn.BatchNorm2d(5),
            head=last(5)), ((4, 'stem.0 raw'), ),
        {'raw': 'output of the model'}),
    'linear behind mean':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                F.relu(net.middle(net.stem(x).mean((2, 3))))),
            stem=block(3, 4),
            middle=nn.Linear(4, 5),
            head=nn.Linear(5, 2)), ((4, 'stem.0 middle'), (5, 'middle head'))),
    'linear behind flatten':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.stem(x).flatten(1)),
            stem=block(3, 4),
            head=nn.Linear(4 * 8 * 8, 2)), ((4, 'stem.0 head'), )),
    'linear on tokens':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                F.gelu(net.up(net.stem(x).flatten(2).transpose(1, 2)))),
            stem=block(3, 4),
            up=nn.Linear(4, 6, bias=False),
            head=nn.Linear(6, 2)), ((4, 'stem.0 up'), (6, 'up head'))),
    'spatial attention':
    Toy(
        lambda: Net(
            lambda net, x: net.head((y := net.stem(x)) * net.map(y).sigmoid()),
            stem=block(3, 6),
            map=conv(6, 1, bias=True),
            head=last(6)), ((6, 'stem.0 map head'), ),
        {'map': 'channel spread over others'}),
    'reflection padding':
    Toy(
        lambda: nn.Sequential(*block(3, 4, padding_mode='reflect'),
                              *block(4, 6, padding_mode='reflect'), last(6)),
        ((4, '0 3'), (6, '3 6'))),
    'interpolate and concat':
    Toy(
        lambda: Net(
            _skip_concat,
            fine=block(3, 4),
            coarse=block(4, 5, stride=2),
            head=last(9)),
        ((4, 'fine.0 coarse.0 head'), (5, 'coarse.0 head'))),
    'image pool':
    Toy(
        lambda: Net(
            _image_pool,
            stem=block(3, 4),
            pool=block(4, 5, kernel=1),
            head=last(9)), ((4, 'stem.0 pool.0 head'), (5, 'pool.0 head'))),
    'scale parameter':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.stem(x) * net.scale),
            stem=block(3, 4),
            scale=nn.Parameter(torch.linspace(1, 2, 4).reshape(1, 4, 1, 1)),
            head=last(4)), ((4, 'stem.0 head'), )),
    'fourier transform':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                net.body(torch.fft.fft2(net.stem(x)).real)),
            stem=block(3, 4),
            body=block(4, 5),
            head=last(5)), ((5, 'body.0 head'), ), {'stem.0': 'fft'}),
    'softmax over channels':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.body(net.stem(x).softmax(1))),
            stem=block(3, 4),
            body=block(4, 5),
            head=last(5)), ((5, 'body.0 head'), ), {'stem.0': '_softmax'}),
    'pooling over channels':
    Toy(
        lambda:
        Net(lambda net, x: net.head(
            net.body(
                F.max_pool1d(net.stem(x).flatten(2).transpose(1, 2), 3, 1, 1).
                transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))),
            stem=block(3, 4),
            body=block(4, 5),
            head=last(5)), ((5, 'body.0 head'), ), {'stem.0': 'max_pool'}),
    'group norm':
    Toy(
        lambda: nn.Sequential(
            conv(3, 6), nn.GroupNorm(3, 6), nn.ReLU(), *block(6, 5), last(5)),
        ((3, '0 3'), (5, '3 6'))),
    'group norm of one group':
    Toy(
        lambda: nn.Sequential(
            conv(3, 6), nn.GroupNorm(1, 6), *block(6, 5), last(5)),
        ((1, '0 2'), (5, '2 5'))),
    'layer norm':
    Toy(
        lambda: nn.Sequential(
            conv(3, 4), nn.LayerNorm([8, 8]), *block(4, 5), last(5)),
        ((5, '2 5'), ), {'0': 'native_layer_norm in 1'}),
    'PReLU':
    Toy(lambda: nn.Sequential(conv(3, 4), nn.PReLU(4), *block(4, 5), last(5)),
        ((4, '0 2'), (5, '2 5'))),
    'transposed convolution':
    Toy(
        lambda: nn.Sequential(
            *block(3, 4), nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1),
            nn.BatchNorm2d(5), nn.ReLU(), *block(5, 6), last(6)),
        ((4, '0 3'), (5, '3 6'), (6, '6 9'))),
    'transposed depthwise convolution':
    Toy(
        lambda: nn.Sequential(*block(3, 4),
                              nn.ConvTranspose2d(4, 4, 2, 2, groups=4),
                              *block(4, 6), last(6)),
        ((4, '0 3 4'), (6, '4 7'))),
    'transposed grouped convolution':
    Toy(
        lambda: nn.Sequential(*block(3, 4),
                              nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
                              *block(6, 5), last(5)), ((5, '4 7'), ),
        {'0': 'convolution in 3'}),
    'kernel used twice, once transposed':
    Toy(
        lambda: Net(
            _tied_decoder,
            stem=block(3, 4),
            code=conv(4, 5),
            middle=branch(5, 7, 5),
            head=last(4)), ((7, 'middle.0 middle.3'), ), {
                'stem.0': 'code.weight is used without a call of its layer',
                'code': 'code.weight is used without a call of its layer'
            }),
    'zero-padded shortcut':
    Toy(
        lambda: Net(
            _option_a,
            stem=block(3, 4),
            branch=branch(4, 5, 6, stride=2),
            head=last(6)),
        ((4, 'stem.0 branch.0 branch.3 head'), (5, 'branch.0 branch.3')),
        {'branch.3': 'joined with channels of no layer'}),
    'channels cut off by padding':
    Toy(
        lambda: Net(
            _cropped, stem=block(3, 5), body=block(5, 4), head=last(3)),
        ((5, 'stem.0 body.0'), ), {'body.0': 'constant_pad_nd'}),
    'shortcut joined with zeros':
    Toy(
        lambda: Net(
            _zeros, stem=block(3, 4), branch=branch(4, 5, 6), head=last(6)),
        ((4, 'stem.0 branch.0 branch.3 head'), (5, 'branch.0 branch.3')),
        {'branch.3': 'joined with channels of no layer'}),
    'grouped convolution of few groups':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.body(net.grouped(net.stem(x)))),
            stem=block(3, 8),
            grouped=block(8, 6, groups=2),
            body=block(6, 5),
            head=last(5)), ((4, 'stem.0 grouped.0'), (3, 'grouped.0 body.0'),
                            (5, 'body.0 head'))),
    'grouped convolution of many groups':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.body(net.grouped(net.stem(x)))),
            stem=block(3, 8),
            grouped=block(8, 12, groups=4),
            body=block(12, 5),
            head=last(5)),
        ((4, 'stem.0 grouped.0 body.0'), (5, 'body.0 head'))),
    'two grouped convolutions around a shuffle':
    Toy(
        lambda: Net(
            _grouped_shuffle,
            stem=block(3, 8),
            first=block(8, 12, groups=2),
            second=block(12, 8, groups=2),
            head=last(8)), ((4, 'stem.0 first.0'), (3, 'first.0 second.0'),
                            (4, 'second.0 head'))),
    'pixel shuffle':
    Toy(
        lambda: nn.Sequential(*block(3, 8), nn.PixelShuffle(2), *block(2, 5),
                              last(5)), ((2, '0 4'), (5, '4 7'))),
    'pixel unshuffle':
    Toy(
        lambda: nn.Sequential(*block(3, 4), nn.PixelUnshuffle(2), *block(
            16, 5), last(5)), ((4, '0 4'), (5, '4 7'))),
    'unfold':
    Toy(
        lambda: nn.Sequential(*block(3, 4), nn.Unfold(3, padding=1),
                              nn.Unflatten(2, (8, 8)), *block(36, 5), last(5)),
        ((4, '0 5'), (5, '5 8'))),
    'maximum over positions':
    Toy(
        lambda: Net(
            lambda net, x: net.head(net.stem(x).flatten(2).max(2)[0]),
            stem=block(3, 4),
            head=nn.Linear(4, 2)), ((4, 'stem.0 head'), )),
    'attention':
    Toy(
        lambda: Net(
            _attend,
            stem=block(3, 4),
            query=nn.Linear(4, 6),
            key=nn.Linear(4, 6),
            value=nn.Linear(4, 5),
            head=nn.Linear(5, 2)),
        ((4, 'stem.0 query key value'), (5, 'value head')), {
            'query': 'bmm over it',
            'key': 'bmm over it'
        }),
    'attention of several heads':
    Toy(
        lambda: Net(
            _attend_in_heads,
            stem=block(3, 4),
            query=nn.Linear(4, 6),
            key=nn.Linear(4, 6),
            value=nn.Linear(4, 8),
            head=nn.Linear(8, 2)),
        ((4, 'stem.0 query key value'), (4, 'value head')), {
            'query': 'bmm over it',
            'key': 'bmm over it'
        }),
    'products of channels with channels':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                (y := net.stem(x).flatten(2)) @ y.transpose(1, 2)),
            stem=nn.Sequential(*block(3, 5), *block(5, 4)),
            head=nn.Linear(4, 2)), ((5, 'stem.0 stem.3'), ),
        {'stem.3': 'bmm'}),
    'kernel used without its layer':
    Toy(
        lambda: Net(
            lambda net, x: net.head(
                F.conv2d(net.stem(x), net.body.weight, padding=1)),
            stem=nn.Sequential(*block(3, 5), *block(5, 4)),
            body=conv(4, 5),
            head=last(5)), ((5, 'stem.0 stem.3'), ), {
                'stem.3': 'body.weight is used without a call',
                'body': 'body.weight is used without a call'
            }),
}


def twice_named() -> nn.Module:
    """One module under two names."""
    net = Net(
        lambda net, x: net.head(net.body(net.second(net.first(net.stem(x))))),
        stem=block(3, 4),
        first=block(4, 4),
        body=block(4, 5),
        head=last(5))
    net.second = net.first
    return net


def per_channel_buffer() -> nn.Module:
    """A buffer with a number for each channel."""
    net = Net(
        lambda net, x: net.head(net.body(net.stem(x) - net.shift)),
        stem=block(3, 4),
        body=block(4, 5),
        head=last(5))
    net.register_buffer('shift', torch.linspace(1, 2, 4).reshape(1, 4, 1, 1))
    return net


def tied_kernels() -> nn.Module:
    """One parameter in two modules."""
    net = Net(
        lambda net, x: net.head(net.body(net.second(net.first(net.stem(x))))),
        stem=block(3, 4),
        first=block(4, 4),
        second=block(4, 4),
        body=block(4, 5),
        head=last(5))
    net.second[0].weight = net.first[0].weight
    return net


TOYS |= {
    'module under two names':
    Toy(twice_named, ((5, 'body.0 head'), ), {'stem.0': 'other names'}),
    'parameter in two modules':
    Toy(tied_kernels, ((5, 'body.0 head'), ), {'stem.0': 'other names'}),
    'buffer of each channel':
    Toy(per_channel_buffer, ((5, 'body.0 head'), ), {'stem.0': 'sub'}),
}

# -- DeepLabV3Plus ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone's config and the channels that the heads get from it."""
    config: dict[str, Any]
    low: int
    middle: int
    high: int


def resnet(kind: str, depth: int, width: int) -> Backbone:
    """A ResNet of stage widths ``width, 2 width, ...`` at output stride 8."""
    expansion = 4 if depth == 50 else 1
    return Backbone(
        dict(
            type=kind,
            depth=depth,
            base_channels=width,
            stem_channels=width,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            dilations=(1, 1, 2, 4),
            strides=(1, 2, 1, 1),
            norm_cfg=dict(type='BN'),
            norm_eval=False,
            style='pytorch',
            contract_dilation=True), expansion * width, 4 * expansion * width,
        8 * expansion * width)


BACKBONES: dict[str, Backbone] = {
    'ResNet-50':
    resnet('ResNetV1c', 50, 8),
    'ResNet-18':
    resnet('ResNet', 18, 8),
    'ResNet-18-v1c':
    resnet('ResNetV1c', 18, 8),
    'MobileNetV2':
    Backbone(
        dict(
            type='MobileNetV2',
            widen_factor=0.5,
            strides=(1, 2, 2, 1, 1, 1, 1),
            dilations=(1, 1, 1, 2, 2, 4, 4),
            out_indices=(1, 2, 4, 6),
            norm_cfg=dict(type='BN')), 16, 48, 160),
}


def deeplab(backbone: Backbone,
            channels: int = 16,
            low: int = 6,
            auxiliary: int = 10,
            classes: int = 5) -> dict[str, Any]:
    """Model config of DeepLabV3Plus with an auxiliary head."""
    common = dict(
        dropout_ratio=0.1,
        num_classes=classes,
        align_corners=False,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True))
    return dict(
        backbone=copy.deepcopy(backbone.config),
        decode_head=dict(
            type='DepthwiseSeparableASPPHead',
            in_channels=backbone.high,
            in_index=3,
            channels=channels,
            dilations=(1, 12, 24, 36),
            c1_in_channels=backbone.low,
            c1_channels=low,
            **common),
        auxiliary_head=dict(
            type='FCNHead',
            in_channels=backbone.middle,
            in_index=2,
            channels=auxiliary,
            num_convs=1,
            concat_input=False,
            **common),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'))


def all_outputs(net: Any, inputs: Tensor) -> list[Tensor]:
    """What the decode head and the auxiliary head of a segmentor say."""
    return [
        net(inputs, mode='tensor'),
        net.auxiliary_head(net.extract_feat(inputs))
    ]


class ComputedTable(nn.Module):
    """Drops a buffer from what it loads, as mmpretrain's SwinV2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(2))
        self.register_buffer('table', torch.ones(3))
        self._register_load_state_dict_pre_hook(self._drop)

    def _drop(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.pop(f'{prefix}table', None)


class CachedBias(nn.Module):
    """Bias that ``train`` computes once for inference, as LeViT does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.cached: Tensor | None = None

    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        self.cached = None if mode else self.bias.detach().tanh()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.bias.tanh() if self.training else self.cached)
