"""Readers of a closing channel take over what it carried."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip('mmseg')

import takeover
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.engine.hooked import HookedPruner
from gdp_mmseg.engine.model import add_gates_
from gdp_mmseg.gates.gdp import theta_of
from gdp_mmseg.pruner.settings import Settings
from gdp_mmseg.surgery.shrink import Shrinkage

from helpers.toys import Net

SHAPE = (3, 9, 9)


def _gated(reader: nn.Module, **more: nn.Module) -> Any:
    """Network whose channel 3 is the sum of its channels 0 and 1, plus 2."""

    def run(net: Any, inputs: Tensor) -> Tensor:
        found = net.writer(inputs)
        found = net.reader(net.before(found) if 'before' in more else found)
        return net.last(net.norm(found) if 'norm' in more else found)

    net = Net(
        run,
        writer=nn.Conv2d(3, 6, 1),
        reader=reader,
        last=nn.Conv2d(4, 2, 1),
        **more)
    nn.init.normal_(net.reader.weight)
    weight, bias = net.writer.weight.data, net.writer.bias.data
    weight[3], bias[3] = weight[:2].sum(0), bias[:2].sum() + 2
    settings = Settings.from_config(
        dict(target=0.5, input_shape=SHAPE, phases=(0.1, 0.5, 0.4)))
    analysis = analyse(net, SHAPE, lambda net, x: net(x))
    return add_gates_(net, analysis, settings)


def _pruner(net: Any) -> HookedPruner:
    pruner: HookedPruner = net.gdp
    return pruner


@torch.no_grad()
def _set_(theta: Tensor, gate: int, value: Tensor | float) -> None:
    theta[gate] = value


def _observing(net: Any, **options: Any) -> tuple[takeover.TakeoverHook, Any]:
    """Hook that has observed ten batches."""
    hook = takeover.TakeoverHook(1, **options)
    runner: Any = SimpleNamespace(model=net.train(), iter=0, max_iters=100)
    if hasattr(net, 'before'):
        # Statistics of batches would make the relation of channels change.
        net.before.eval()
    hook.before_train(runner)
    for _ in range(10):
        _iterate(hook, runner)
    # The passes of a test, with gates closed before they are taken over, do
    # not count.
    hook.interval, runner.iter = 2, 1
    hook.before_train_iter(runner, 0)
    return hook, runner


def _iterate(hook: takeover.TakeoverHook, runner: Any) -> None:
    hook.before_train_iter(runner, 0)
    runner.model(_inputs())
    hook.after_train_iter(runner, 0)


def _inputs() -> Tensor:
    return torch.randn(4, *SHAPE)


@pytest.fixture(autouse=True)
def small_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(takeover, 'RIDGE', 1e-6)


def _close_(net: Any, channel: int) -> None:
    gates = _pruner(net).gates
    of_writer = _pruner(net).analysis.gate_of_slot['writer.weight', 0]
    gates.close_(torch.arange(len(gates.theta)) == of_writer[channel])


def _assert_taken_over(net: Any, hook: Any, runner: Any) -> None:
    """Assert that hardly anything is lost by closing a channel."""
    inputs = _inputs()
    wanted = net(inputs)
    _close_(net, 3)
    lost = (net(inputs) - wanted).abs().max()
    hook.after_train_iter(runner, 0)
    assert (net(inputs) - wanted).abs().max() < 1e-3 * lost


@pytest.mark.parametrize('reader, more', [
    (nn.Conv2d(6, 4, 1), {}),
    (nn.Conv2d(6, 4, 3), {}),
    (nn.Conv2d(6, 4, 3), dict(before=nn.BatchNorm2d(6))),
    (nn.Conv2d(6, 4, 3, bias=False), dict(norm=nn.BatchNorm2d(4))),
])
def test_outputs_stay_where_others_tell_the_closing_channel(
        reader: nn.Module, more: dict[str, nn.Module]) -> None:
    net = _gated(reader, **more)
    _assert_taken_over(net, *_observing(net))


def test_inputs_that_a_norm_gates_are_seen_without_their_gates() -> None:
    net = _gated(nn.Conv2d(6, 4, 1), before=nn.BatchNorm2d(6))
    assert any(group.norms for group in _pruner(net).analysis.groups)
    gates = _pruner(net).gates
    gate = _pruner(net).analysis.gate_of_slot['writer.weight', 0][1]
    _set_(gates.theta, gate, theta_of(torch.tensor(0.5), gates.epsilon))
    hook, runner = _observing(net)
    _set_(gates.theta, gate, 1.)
    hook.after_train_iter(runner, 0)
    _assert_taken_over(net, hook, runner)


def test_what_was_taken_over_is_handed_on_after_a_cut() -> None:
    net = _gated(nn.Conv2d(6, 4, 1))
    hook, runner = _observing(net)
    inputs = _inputs()
    wanted = net(inputs)
    _close_(net, 3)
    hook.after_train_iter(runner, 0)
    gates = _pruner(net).gates
    Shrinkage(net, _pruner(net).analysis).narrow_(~gates.is_closed())
    assert net.reader.weight.shape[1] == 5
    _iterate(hook, runner)
    # Three inputs of the network: any of the five others is a sum of four.
    _close_(net, 0)
    lost = (net(inputs) - wanted).abs().max()
    hook.after_train_iter(runner, 0)
    assert (net(inputs) - wanted).abs().max() < 1e-3 * lost


def test_half_of_a_channel_is_taken_over_and_given_back() -> None:
    net = _gated(nn.Conv2d(6, 4, 1))
    hook, runner = _observing(net, gradually=True)
    inputs = _inputs()
    wanted = net(inputs)
    gates = _pruner(net).gates
    gate = _pruner(net).analysis.gate_of_slot['writer.weight', 0][3]
    _set_(gates.theta, gate, theta_of(torch.tensor(0.5), gates.epsilon))
    lost = (net(inputs) - wanted).abs().max()
    hook.after_train_iter(runner, 0)
    assert (net(inputs) - wanted).abs().max() < 1e-3 * lost
    _set_(gates.theta, gate, 1.)
    hook.after_train_iter(runner, 0)
    assert (net(inputs) - wanted).abs().max() < 1e-3 * lost


def test_gates_in_use_leave_the_kernels_as_they_are() -> None:
    net = _gated(nn.Conv2d(6, 4, 1))
    hook, runner = _observing(net)
    before = net.reader.weight.clone()
    _set_(_pruner(net).gates.theta, 0, 0.5)
    hook.after_train_iter(runner, 0)
    assert torch.equal(net.reader.weight, before)


def test_nothing_is_observed_in_the_settling_phase() -> None:
    net = _gated(nn.Conv2d(6, 4, 1))
    hook, runner = _observing(net)
    assert net.reader._forward_pre_hooks
    runner.iter = 59
    hook.after_train_iter(runner, 0)
    assert not net.reader._forward_pre_hooks


def test_gain_of_a_channel_that_others_tell_counts_less() -> None:
    net = _gated(nn.Conv2d(6, 4, 1))
    nn.init.orthogonal_(net.writer.weight.data[:3].flatten(1))
    net.writer.weight.data[3:] = 0
    net.writer.weight.data[3] = net.writer.weight.data[0]
    hook, runner = _observing(net, weigh_every=1)
    openness = _pruner(net).gates.openness()
    plain = HookedPruner._scarcity(_pruner(net), openness)
    runner.iter = 10
    hook.before_train_iter(runner, 0)
    of_writer = _pruner(net).analysis.gate_of_slot['writer.weight', 0]
    factors = (_pruner(net)._scarcity(openness) / plain)[of_writer[:4]]
    # The fourth channel is the first.
    assert factors[[0, 3]].max() < 0.01
    assert factors[[1, 2]].min() > 0.9
