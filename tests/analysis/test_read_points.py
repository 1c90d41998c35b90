"""Which batch norms the readers of each group see, on the toy networks."""
from __future__ import annotations

from typing import Any, Callable

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.state import from_state, to_state
from gdp_mmseg.analysis.structure import ReadPoint

from helpers.toys import SHAPE, TOYS, Net, block, conv, last, run


def shown(point: ReadPoint) -> str:
    """A read point in a line, e.g. ``a + b, relu, summed``."""
    words = [point.reason or ' + '.join(point.norms), point.activation]
    words += ['summed'] * point.summed + ['of a sum'] * point.of_sum
    return ', '.join(filter(None, words))


def found(net: nn.Module) -> list[list[str]]:
    return [[shown(point) for point in group.read_points]
            for group in analyse(net, SHAPE, run).groups]


@pytest.mark.parametrize('name, points', [
    ('chain', [['1, relu'], ['4, relu']]),
    ('pooling', [['1, relu'], ['5, relu']]),
    ('concat', [['a.1, relu'], ['b.1, relu']]),
    ('interpolate and concat', [['fine.1, relu'], ['coarse.1, relu']]),
    ('image pool', [['stem.1, relu'], ['pool.1, relu']]),
    ('reflection padding', [['1, relu'], ['4, relu']]),
    ('depthwise behind concat', [['depth.1, relu'], ['depth.1, relu'],
                                 ['point.1, relu']]),
    ('residual', [[
        'stem.1, relu', 'stem.1, relu, summed', 'branch.4, relu, summed'
    ], ['branch.1, relu']]),
    ('residual with downsample', [['stem.1, relu'],
                                  ['down.1 + branch.4, relu, summed'],
                                  ['branch.1, relu']]),
    ('shared head', [[
        'fine.1, relu', 'coarse.1, relu'
    ], ['head.1, relu', 'batch norm used more than once (head.1)']]),
    ('hard swish', [['1, hardswish'], ['4, relu']]),
    ('squeeze-excite', [['stem.1, relu'], ['no batch norm (after down)']]),
    ('no norm', [['no batch norm (after 0)'], ['no batch norm (after 2)']]),
    ('group norm', [['group norm in 1'], ['4, relu']]),
    ('norm without affine', [['batch norm without scale (1)'],
                             ['batch norm without scale (3)']]),
    ('scale parameter', [['mul in the model']]),
    ('dropout and activations', [['gelu after relu at 1'], ['leaky_relu in 9']
                                 ]),
])
def test_read_points_of_toys(name: str, points: list[list[str]]) -> None:
    _, analysis = TOYS[name].analyse()
    assert [[shown(point) for point in group.read_points]
            for group in analysis.groups] == points


def _stream(net: Any, x: Tensor) -> Tensor:
    """A stem and two blocks that normalise what they read."""
    x = net.stem(x)
    x = x + net.first(x)
    x = x + net.second(x)
    return net.head(x)


def pre_activation(inputs: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, inner),
        nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, inputs))


def linear_bottleneck(inner: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        conv(4, inner, kernel=1), nn.BatchNorm2d(inner), nn.ReLU6(),
        conv(inner, inner, groups=inner), nn.BatchNorm2d(inner), nn.ReLU6(),
        conv(inner, outputs, kernel=1), nn.BatchNorm2d(outputs))


@pytest.mark.parametrize('build, points', [
    (lambda: Net(
        _stream,
        stem=conv(3, 4),
        first=pre_activation(4, 5),
        second=pre_activation(4, 6),
        head=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), last(4))),
     [['first.0, relu', 'second.0, relu, of a sum', 'head.0, relu, of a sum'],
      ['first.3, relu'], ['second.3, relu']]),
    (lambda: Net(
        lambda net, x: net.head(F.silu(net.body(net.stem(x)))),
        stem=block(3, 4),
        body=block(4, 5)[:2],
        head=last(5)), [['stem.1, relu'], ['body.1, silu']]),
    (lambda: Net(
        lambda net, x: net.head((y := net.stem(x)) * y.sigmoid()),
        stem=block(3, 4)[:2],
        head=last(4)), [['stem.1, silu']]),
    (lambda: Net(
        lambda net, x: net.head((y := net.stem(x)) *
                                ((net.map(y) + 3) / 6).clamp(0, 1)),
        stem=block(3, 4),
        map=conv(4, 4),
        head=last(4)), [['stem.1, relu']]),
    (lambda: Net(
        lambda net, x: net.head(net.left(y := net.stem(x)) - net.right(y)),
        stem=block(3, 4),
        left=block(4, 5),
        right=block(4, 5),
        head=last(5)), [['stem.1, relu'], ['sub in the model']]),
])
def test_read_points_of_other_networks(build: Callable[[], nn.Module],
                                       points: list[list[str]]) -> None:
    assert found(build()) == points


def test_linear_bottlenecks_add_up() -> None:
    net = Net(
        _stream,
        stem=nn.Sequential(*block(3, 4), *linear_bottleneck(5, 4)),
        first=linear_bottleneck(6, 4),
        second=linear_bottleneck(7, 4),
        head=last(4))
    stream = next(points for points in found(net) if len(points) > 1)
    assert stream == [
        'stem.10', 'stem.10 + first.7, summed',
        'stem.10 + first.7 + second.7, summed'
    ]
    inner = [points for points in found(net) if len(points) == 1]
    assert inner == [['stem.1, relu'], ['stem.7, relu'], ['first.4, relu'],
                     ['second.4, relu']]


def test_an_older_state_has_no_read_points() -> None:
    _, analysis = TOYS['residual'].analyse()
    state = to_state(analysis)
    assert from_state(state).groups[0].read_points == (
        analysis.groups[0].read_points)
    for row in state['groups']:
        del row['read_points']
    assert [group.read_points
            for group in from_state(state).groups] == [()] * 2


class FunctionalNorm(nn.Module):
    """Block that does not call its norm, but uses its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.relu(
            F.batch_norm(
                self.conv(x), norm.running_mean, norm.running_var, norm.weight,
                norm.bias, self.training))


@pytest.mark.parametrize('name, norms', [
    ('chain', [('1', ), ('4', )]),
    ('residual', [('stem.1', 'branch.4'), ('branch.1', )]),
    ('concat', [('a.1', ), ('b.1', )]),
    ('image pool', [('stem.1', ), ('pool.1', )]),
    ('depthwise behind concat', [('depth.1', ), ('depth.1', ), ('point.1', )]),
    ('hard swish', [(), ('4', )]),
    ('squeeze-excite', [(), ()]),
    ('group norm', [(), ('4', )]),
    ('PReLU', [(), ('3', )]),
    ('norm shared by two layers', [('stem.1', ), (), ()]),
    ('called twice', [()]),
    ('no norm', [(), ()]),
])
def test_norms_that_can_have_gates(name: str, norms: list[tuple[str,
                                                                ...]]) -> None:
    _, analysis = TOYS[name].analyse()
    assert [group.norms for group in analysis.groups] == norms


@pytest.mark.parametrize(
    'net', [
        Net(lambda net, x: net.head(F.relu6(net.stem(x))),
            stem=block(3, 4)[:2],
            head=last(4)),
        Net(lambda net, x: net.head((y := net.stem(x)) * y.mean(
            (2, 3), keepdim=True).sigmoid()),
            stem=block(3, 4),
            head=last(4)),
        Net(lambda net, x: net.head(net.stem(x)),
            stem=FunctionalNorm(),
            head=last(4)),
    ],
    ids=['clipped', 'attention of itself', 'module not called'])
def test_norms_whose_factor_would_change_more_have_no_gates(
        net: nn.Module) -> None:
    assert analyse(net, SHAPE, run).groups[0].norms == ()


@pytest.mark.parametrize(
    'net, norm, behind', [
        (TOYS['depthwise beside another reader'].build(), 'depth.1', 'side'),
        (Net(
            lambda net, x: net.head(y := net.stem(x)) + net.side(
                net.depth(F.softplus(y))),
            stem=block(3, 4),
            depth=block(4, 4, groups=4),
            head=last(4),
            side=last(4)), 'depth.1', 'side'),
        (Net(
            lambda net, x: net.head((y := net.stem(x)) + net.body(y)),
            stem=block(3, 4),
            body=nn.Sequential(
                nn.BatchNorm2d(4), nn.ReLU(), *block(4, 5), conv(5, 4),
                nn.BatchNorm2d(4)),
            head=last(4)), 'body.0', 'body.2'),
    ],
    ids=[
        'read by a depthwise convolution', 'read by one behind an activation',
        'read by a norm'
    ])
def test_norms_have_the_gates_of_the_readers_that_alone_read_them(
        net: nn.Module, norm: str, behind: str) -> None:
    """The factor of another norm would change what that norm reads."""
    group = analyse(net, SHAPE, run).groups[0]
    assert (group.norms, group.behind) == ((norm, ), (behind, ))
    assert set(group.readers) - {behind}


def test_norms_with_gates_are_saved() -> None:
    _, analysis = TOYS['residual'].analyse()
    state = to_state(analysis)
    saved = from_state(state).groups[0]
    assert saved.norms == ('stem.1', 'branch.4')
    assert saved.behind == saved.readers == ('branch.0', 'head')
    # Earlier versions.
    del state['groups'][0]['behind']
    assert from_state(state).groups[0].behind == saved.readers
    del state['groups'][0]['norms']
    earlier = from_state(state).groups[0]
    assert earlier.norms == earlier.behind == ()
