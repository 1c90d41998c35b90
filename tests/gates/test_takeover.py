"""Layers that read a closing channel take over what it told."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.gates import takeover
from gdp_mmseg.gates.gdp import theta_of
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Settings
from gdp_mmseg.surgery.shrink import Shrinkage

from helpers.toys import Net

SHAPE = (3, 9, 9)


@pytest.fixture(autouse=True)
def small_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(takeover, '_RIDGE', 1e-6)


class Gated:
    """Network whose channel 3 is the sum of its channels 0 and 1, plus 2.

    Its layer ``reader`` reads them.
    """

    def __init__(self, reader: nn.Module, **more: nn.Module) -> None:

        def run(net: Any, inputs: Tensor) -> Tensor:
            found = net.writer(inputs)
            found = net.before(found) if 'before' in more else found
            if isinstance(net.reader, nn.Linear):
                found = net.reader(found.movedim(1, -1)).movedim(-1, 1)
            else:
                found = net.reader(found)
            return net.last(net.norm(found) if 'norm' in more else found)

        self.net: Any = Net(
            run,
            writer=nn.Conv2d(3, 6, 1),
            reader=reader,
            last=nn.Conv2d(4, 2, 1),
            **more)
        nn.init.normal_(self.net.reader.weight)
        weight, bias = self.net.writer.weight.data, self.net.writer.bias.data
        weight[3], bias[3] = weight[:2].sum(0), bias[:2].sum() + 2
        settings = Settings.from_config(
            dict(target=0.5, input_shape=SHAPE, takeover=True))
        self.pruner = Pruner(
            analyse(self.net, SHAPE, lambda net, x: net(x)), settings)
        self.pruner.gate_(self.net)
        # The channels are linear in fewer, and the ridge is small.
        self.net.double()
        self.pruner.double()
        # Statistics of batches would change with each batch.
        for name in {*more}:
            self.net.get_submodule(name).eval()

    @property
    def takeover(self) -> takeover.Takeover:
        assert self.pruner.takeover is not None
        return self.pruner.takeover

    def observe(self) -> None:
        self.takeover.watch_(True)
        for _ in range(3):
            self.net(_inputs())
        self.takeover.watch_(False)
        self.takeover.renew_(self.openness())

    def openness(self) -> Tensor:
        return self.pruner.gates.openness().detach()

    def gate_of(self, channel: int) -> int:
        return int(self.pruner.analysis.gate_of_slot['writer.weight',
                                                     0][channel])

    def close_(self, *channels: int) -> Tensor:
        """Close channels; return the openness before."""
        before = self.openness()
        gates = [self.gate_of(channel) for channel in channels]
        self.pruner.gates.close_(
            torch.isin(torch.arange(len(before)), torch.tensor(gates)))
        return before


def _inputs() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.double)


def _assert_taken_over(gated: Gated) -> None:
    """Assert that hardly anything is lost by closing channel 3."""
    inputs = _inputs()
    wanted = gated.net(inputs)
    before = gated.close_(3)
    lost = (gated.net(inputs) - wanted).abs().max()
    gated.takeover.take_over_(before, gated.openness())
    assert (gated.net(inputs) - wanted).abs().max() < 1e-3 * lost


READERS: list[tuple[nn.Module, dict[str, nn.Module]]] = [
    (nn.Conv2d(6, 4, 1), {}),
    (nn.Linear(6, 4), {}),
    (nn.Conv2d(6, 4, 3), {}),
    (nn.Conv2d(6, 4, 3), dict(before=nn.BatchNorm2d(6))),
    (nn.Conv2d(6, 4, 3, bias=False), dict(norm=nn.BatchNorm2d(4))),
]


@pytest.mark.parametrize('reader, more', READERS)
def test_outputs_stay_where_others_tell_the_closing_channel(
        reader: nn.Module, more: dict[str, nn.Module]) -> None:
    gated = Gated(reader, **more)
    gated.observe()
    _assert_taken_over(gated)


def test_inputs_that_a_norm_gates_are_seen_without_their_gates() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1), before=nn.BatchNorm2d(6))
    assert any(group.norms for group in gated.pruner.analysis.groups)
    gates = gated.pruner.gates
    half = theta_of(torch.tensor(0.5), gates.epsilon)
    with torch.no_grad():
        gates.theta[gated.gate_of(1)] = half
    gated.observe()
    with torch.no_grad():
        gates.theta[gated.gate_of(1)] = 1
    _assert_taken_over(gated)


def test_one_inverse_serves_many_closing_channels() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    reader = gated.takeover.readers[0]
    samples = torch.randn(50, 6).double() @ torch.randn(6, 6).double()
    covariance = samples.T @ samples / 50
    reader.precision.copy_(torch.linalg.inv(covariance))
    for channels in ((3, ), (1, 5)):
        before = gated.close_(*channels)
        gated.takeover.take_over_(before, gated.openness())
    left = torch.tensor([0, 2, 4])
    torch.testing.assert_close(
        reader.precision[left[:, None], left],
        torch.linalg.inv(covariance[left[:, None], left]),
        rtol=1e-3,
        atol=1e-3)


def test_what_was_taken_over_is_handed_on_after_a_cut() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.observe()
    inputs = _inputs()
    wanted = gated.net(inputs)
    before = gated.close_(3)
    gated.takeover.take_over_(before, gated.openness())
    keep = ~gated.pruner.gates.is_closed()
    Shrinkage(gated.net, gated.pruner.analysis).narrow_(keep)
    gated.takeover.narrow_(keep)
    assert gated.net.reader.weight.shape[1] == 5
    for channel in (0, 1):
        # Three inputs of the network: four channels tell the fifth.
        before = gated.close_(channel)
        lost = (gated.net(inputs) - wanted).abs().max()
        gated.takeover.take_over_(before, gated.openness())
        assert (gated.net(inputs) - wanted).abs().max() < 1e-3 * lost
        gated.observe()


def test_gates_in_use_leave_the_kernels_as_they_are() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.observe()
    kernel, before = gated.net.reader.weight.clone(), gated.openness()
    with torch.no_grad():
        gated.pruner.gates.theta[0] = 0.9
    gated.takeover.take_over_(before, gated.openness())
    assert torch.equal(gated.net.reader.weight, kernel)


def test_inputs_that_are_not_finite_teach_nothing() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.observe()
    known = [one.clone() for one in gated.takeover.readers.buffers()]
    gated.takeover.watch_(True)
    gated.net(_inputs() * torch.nan)
    gated.takeover.renew_(gated.openness())
    for one, other in zip(gated.takeover.readers.buffers(), known):
        assert torch.equal(one, other)


def test_frozen_and_shared_kernels_stay_as_they_are() -> None:
    frozen, shared = (nn.Conv2d(6, 4, 1) for _ in range(2))
    frozen.weight.requires_grad_(False)
    twin = nn.Conv2d(6, 4, 1)
    twin.weight = shared.weight
    assert [one.name for one in Gated(frozen).takeover.readers] == ['last']
    # Channels of a shared kernel have no gates.
    with pytest.raises(ValueError, match='reader.weight has other names'):
        Gated(shared, twin=twin)
