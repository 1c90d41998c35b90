"""Forwards as users write them are verified, or refused for what is wrong."""
from __future__ import annotations

import random
from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.surgery.prune import prune
from gdp_mmseg.surgery.verify import verify

from helpers.toys import SHAPE, CachedBias, Net, block, last, run

Run = Callable[[Any, Tensor], Any]


def three(forward: Run, **more: Any) -> nn.Module:
    """A stem of 8 channels, a body of 6 and a head, run by ``forward``."""
    parts = dict(stem=block(3, 8), body=block(8, 6), head=last(6), **more)
    return Net(forward, **parts)


def analysed(net: nn.Module,
             training: Run | None = None,
             at_norms: bool = True) -> Analysis:
    analysis = analyse(net, SHAPE, run, training)
    if not at_norms:
        analysis = analysis.at_layers()
    return verify(net, analysis, run, training)[0]


def writers(analysis: Analysis) -> set[str]:
    return {name for group in analysis.groups for name in group.writers}


def reason(analysis: Analysis, writer: str) -> str:
    row, = (row for row in analysis.frozen if writer in row.writers)
    return row.reason


# -- errors -----------------------------------------------------------------


def count_on_stem(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    n, _, h, w = x.shape
    return net.head(net.body(x.view(n, 8, h, w)))


def misspell(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    if x.shape[1] != 8:
        x = net.stme(x)
    return net.head(net.body(x))


@pytest.mark.parametrize('forward, error', [
    (count_on_stem, "(RuntimeError: shape '[1, 8, 8, 8]' is invalid"),
    (misspell, "(AttributeError: 'Net' object has no attribute 'stme'"),
])
def test_reason_carries_the_error_of_the_pruned_forward(
        forward: Run, error: str) -> None:
    analysis = analysed(three(forward))
    assert writers(analysis) == {'body.0'}
    assert error in reason(analysis, 'stem.0')


def test_error_of_the_gated_forward_is_raised_as_it_is() -> None:

    def forward(net: Any, x: Tensor) -> Tensor:
        if 'forward' in vars(net.stem[1]):
            raise KeyError('of gates')
        return net.head(net.body(net.stem(x)))

    with pytest.raises(ValueError, match="gates.*KeyError: 'of gates'.*corr"):
        analysed(three(forward))


def test_error_of_the_dense_forward_names_itself_first() -> None:

    def training(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(net.stme(x)))

    net = three(lambda net, x: net.head(net.body(net.stem(x))))
    with pytest.raises(ValueError, match="AttributeError: 'Net' .*'stme'"):
        analysed(net, training)
    analysis = analyse(net, SHAPE, run)
    with pytest.raises(ValueError, match="AttributeError: 'Net' .*correct"):
        verify(net, analysis, run, training)


class SameConv(nn.Conv2d):
    """Runs its kernel without the method that a gate replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, [1] * 4), self.weight, self.bias)


class ScaledLinear(nn.Linear):
    """Does more than the forward that a gate replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_layer_without_a_place_for_gates_is_named_with_its_class() -> None:
    net = three(
        lambda net, x: net.head(net.same(net.body(net.stem(x)))),
        same=SameConv(6, 6, 3))
    said = reason(analysed(net, at_norms=False), 'body.0')
    assert said.startswith('no gate can act in same: the forward of SameConv')


def test_linear_layer_with_a_forward_of_its_own_is_named() -> None:
    net = Net(
        lambda net, x: net.head(net.scaled(net.stem(x).mean((2, 3)))),
        stem=nn.Sequential(*block(3, 4), *block(4, 8)),
        scaled=ScaledLinear(8, 6),
        head=nn.Linear(6, 2))
    assert writers(analysed(net)) == {'stem.0', 'stem.3', 'scaled'}
    analysis = analysed(net, at_norms=False)
    assert writers(analysis) == {'stem.0', 'scaled'}
    said = reason(analysis, 'stem.3')
    assert said.startswith('no gate can act in scaled: the forward of Scal')


# -- float32 ----------------------------------------------------------------


def attend_in_float32(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    tokens = x.flatten(2)
    weights = (tokens.transpose(1, 2).float() @ tokens.float()).softmax(-1)
    return net.head(net.body(x + (tokens.float() @ weights).view_as(x)))


def product_in_float32(net: Any, x: Tensor) -> Tensor:
    return net.head(net.body(net.stem(x).to(torch.float32)))


def resize_in_float32(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    x = F.interpolate(x.float(), scale_factor=2, mode='bilinear').to(x.dtype)
    return net.head(net.body(x))


def resize_with_numpy(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    if y.device.type == 'cpu':
        shift = torch.from_numpy(x.numpy().astype(np.float32)).mean()
        y = y + shift.to(y)
    return net.head(net.body(y))


@pytest.mark.parametrize(
    'forward', [product_in_float32, resize_in_float32, resize_with_numpy])
def test_forward_that_writes_float32_loses_no_gate(forward: Run) -> None:
    analysis = analysed(three(forward))
    assert analysis.num_gates == 14


def test_gates_leave_norms_where_untraced_code_adds_to_them() -> None:
    stem, body = analysed(three(resize_with_numpy)).groups
    assert stem.norms == body.norms == ()


def test_attention_in_float32_is_not_refused() -> None:
    assert writers(analysed(three(attend_in_float32))) == {'body.0'}


def test_forward_in_float32_that_counts_on_channels_is_found() -> None:

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).float()
        return net.head(net.body(x * (1 + 0.01 * net.stem[0].out_channels)))

    analysis = analysed(three(forward))
    assert writers(analysis) == {'body.0'}
    assert 'counts on' in reason(analysis, 'stem.0')


# -- forwards that are verified where the model runs them --------------------


def plainly(net: Any, x: Tensor) -> Tensor:
    return net.head(net.body(net.stem(x)))


def needs_samples(net: Any, x: Tensor) -> Tensor:
    raise KeyError('no samples')


def nan_loss(net: Any, x: Tensor) -> Tensor:
    return run(net, x).sum() * float('nan')


def count_in_float32(net: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError('expected Float but found Double')
    return count_on_stem(net, x)


@pytest.mark.parametrize('other, cause', [
    (needs_samples, "KeyError: 'no samples'"),
    (nan_loss, 'no finite numbers'),
])
def test_forward_that_is_not_verified_is_noted(other: Run, cause: str) -> None:
    notes: list[str] = []
    net = three(plainly)
    analysis = analyse(net, SHAPE, run)
    left, _ = verify(net, analysis, run, None, [(other, False)], notes.append)
    assert left.num_gates == analysis.num_gates
    assert notes == [
        f'{other.__name__} was not verified, because it gave: {cause}'
    ]


def test_forward_that_fails_in_double_precision_is_verified_in_single(
) -> None:
    notes: list[str] = []
    net = three(plainly)
    analysis = analyse(net, SHAPE, run)
    left, _ = verify(net, analysis, run, None, [(count_in_float32, False)],
                     notes.append)
    assert writers(analysis) == {'stem.0', 'body.0'} and not notes
    assert writers(left) == {'body.0'}


# -- random numbers and state -----------------------------------------------


def skip_at_random(draw: Callable[[], float]) -> Run:
    """Stochastic depth: the body is left out in a half of all runs."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(x + net.body(x) if draw() < 0.5 else x)

    return forward


@pytest.mark.parametrize(
    'draw', [
        random.random,
        lambda: float(np.random.rand()),
        lambda: float(torch.rand(())),
    ],
    ids=['python', 'numpy', 'torch'])
def test_forward_that_draws_numbers_is_the_same_in_each_run(
        draw: Callable[[], float]) -> None:
    net = Net(
        skip_at_random(draw),
        stem=block(3, 8),
        body=nn.Sequential(*block(8, 5), *block(5, 8)),
        head=last(8))
    for seed in range(5):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)

        def forward(model: Any, x: Tensor) -> Any:
            y = model.stem(x)
            return model.head(y + model.body(y))

        found = analyse(net, SHAPE, forward, run)
        left = verify(net, found, forward, run)[0]
        assert left.num_gates == found.num_gates == 13


def test_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    net = three(lambda net, x: net.head(net.body(net.stem(x))))
    numbers = []
    for used in (False, True):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        if used:
            analysed(net)
        numbers.append(
            (random.random(), np.random.rand(), float(torch.rand(()))))
    assert numbers[0] == numbers[1]


def running_mean(net: Any, x: Tensor) -> Tensor:
    """State in a buffer and in an attribute, which each run changes."""
    x = net.stem(x)
    net.mean.lerp_(x.mean(), 0.5)
    net.calls += 1
    return net.head(net.body(x - net.mean * net.calls))


def test_forward_that_keeps_state_is_compared_from_the_same_state() -> None:
    net = three(running_mean)
    net.register_buffer('mean', torch.zeros(()))
    net.calls = 0
    # The mean over all channels is frozen; what comes behind it is not.
    analysis = analysed(net)
    assert writers(analysis) == {'body.0'}
    assert 'mean' in reason(analysis, 'stem.0')
    assert net.calls == 0 and float(net.mean) == 0


def drop_whole_channels(net: Any, x: Tensor) -> Tensor:
    x = net.body(net.stem(x))
    return net.head(F.dropout2d(x, 0.3, training=True))


def test_dropout_that_is_always_on_freezes_the_channels_it_draws_for() -> None:
    net = three(drop_whole_channels)
    analysis = analysed(net)
    assert writers(analysis) == {'stem.0'}
    # Other channels are removed without a change of the numbers drawn.
    pruned, _ = prune(net.eval(), analysis, (torch.arange(8) % 2).float())
    assert pruned.body[0].weight.shape[1] == 4


# -- modules with a train() of their own ------------------------------------


@pytest.mark.parametrize('training', [True, False])
def test_train_of_a_module_is_called(training: bool) -> None:
    net = three(
        lambda net, x: net.head(net.cached(net.body(net.stem(x)))),
        cached=CachedBias(6)).train(training)
    analysis = analysed(net, run)
    assert writers(analysis) == {'stem.0', 'body.0'}
    pruned, _ = prune(net.eval(), analysis, (torch.arange(14) % 2).float())
    assert pruned(torch.zeros(1, *SHAPE)).shape == (1, 2, 8, 8)


def test_part_that_its_owner_keeps_in_eval_mode_stays_so() -> None:
    seen: set[bool] = set()

    class Teacher(nn.Sequential):

        def forward(self, inputs: Tensor) -> Tensor:
            seen.add(self.training)
            return super().forward(inputs)

    class Student(Net):

        def train(self, mode: bool = True) -> Student:
            super().train(mode)
            self.teacher.eval()
            return self

    net = Student(
        lambda net, x: net.head(net.body(net.stem(x)) + net.teacher(x)),
        stem=block(3, 8),
        body=block(8, 6),
        head=last(6),
        teacher=Teacher(*block(3, 6)))
    analysed(net, run)
    assert seen == {False}
