"""Layers that read a closing channel take over what it told."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.gates import moments, takeover
from gdp_mmseg.gates.gdp import theta_of
from gdp_mmseg.pruner.pruner import Pruner
from gdp_mmseg.pruner.settings import Settings
from gdp_mmseg.surgery.shrink import Shrinkage

from helpers.toys import Net

SHAPE = (3, 9, 9)


@pytest.fixture(autouse=True)
def small_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(moments, '_RIDGE', 1e-4)


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
        settings = Settings.from_config(dict(target=0.5, input_shape=SHAPE))
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

    def observe_(self) -> None:
        """Run the network in a step in which others take over."""
        self.takeover.watch_(True)
        for _ in range(3):
            self.net(_inputs())
        self.takeover.watch_(False)

    def take_over_(self) -> None:
        self.takeover.take_over_(self.openness())

    def openness(self) -> Tensor:
        return self.pruner.gates.openness().detach()

    def gate_of(self, channel: int) -> int:
        return int(self.pruner.analysis.gate_of_slot['writer.weight',
                                                     0][channel])

    def set_(self, openness: float, *channels: int) -> None:
        """Set the openness of the gates of some channels."""
        gates = self.pruner.gates
        chosen = [self.gate_of(channel) for channel in channels]
        if openness == 0:
            gates.close_(
                torch.isin(
                    torch.arange(len(gates.theta)), torch.tensor(chosen)))
            return
        with torch.no_grad():
            gates.theta[chosen] = theta_of(
                torch.tensor(openness).double(), gates.epsilon)


def _inputs() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.double)


def _assert_taken_over(gated: Gated, openness: float = 0.) -> None:
    """Assert that hardly anything is lost by channel 3's lower openness."""
    inputs = _inputs()
    wanted = gated.net(inputs)
    gated.observe_()
    gated.set_(openness, 3)
    lost = (gated.net(inputs) - wanted).abs().max()
    gated.take_over_()
    assert (gated.net(inputs) - wanted).abs().max() < 3e-3 * lost


READERS: list[tuple[nn.Module, dict[str, nn.Module]]] = [
    (nn.Conv2d(6, 4, 1), {}),
    (nn.Linear(6, 4), {}),
    (nn.Conv2d(6, 4, 3), {}),
    (nn.Conv2d(6, 4, 3), dict(before=nn.BatchNorm2d(6))),
    (nn.Conv2d(6, 4, 3, bias=False), dict(norm=nn.BatchNorm2d(4))),
]


@pytest.mark.parametrize('openness', [0., 0.3])
@pytest.mark.parametrize('reader, more', READERS)
def test_outputs_stay_where_others_tell_a_channel_that_is_let_through_less(
        reader: nn.Module, more: dict[str, nn.Module],
        openness: float) -> None:
    reader, more = copy.deepcopy((reader, more))
    _assert_taken_over(Gated(reader, **more), openness)


def test_inputs_that_a_norm_gates_are_seen_without_their_gates() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1), before=nn.BatchNorm2d(6))
    assert any(group.norms for group in gated.pruner.analysis.groups)
    gated.set_(0.5, 1)
    gated.observe_()
    gated.take_over_()
    _assert_taken_over(gated)


def test_gates_that_move_to_the_layers_multiply_no_inputs() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1), before=nn.BatchNorm2d(6))
    reader = gated.takeover.readers[0]
    assert not reader.here.any()
    gated.pruner.move_to_layers_(gated.net)
    assert reader.here.all()
    gated.set_(0.5, 1)
    gated.observe_()
    gated.take_over_()
    _assert_taken_over(gated)


def test_openness_at_which_others_take_over_counts() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.set_(0.5, 1)
    gated.observe_()
    gated.take_over_()
    _assert_taken_over(gated)


def test_gates_that_move_over_many_steps_are_taken_over_in_one() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    inputs = _inputs()
    wanted = gated.net(inputs)
    kernel = gated.net.reader.weight.clone()
    for openness in (0.8, 0.4):
        gated.set_(openness, 3)
        gated.take_over_()  # Nothing has been observed.
        assert torch.equal(gated.net.reader.weight, kernel)
    gated.observe_()
    gated.set_(0.1, 3)
    gated.take_over_()
    torch.testing.assert_close(gated.net(inputs), wanted, rtol=0, atol=1e-3)
    assert not gated.takeover.observed


@pytest.mark.parametrize('other, told', [(1, True), (0, False)])
def test_channels_tell_each_other_within_blocks(
        other: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of odd indices are one block, those of even ones another."""
    monkeypatch.setattr(takeover, '_WIDTH', 3)
    gated = Gated(nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        for tensor in (gated.net.writer.weight, gated.net.writer.bias):
            tensor[3] = 2 * tensor[other]
    if told:
        _assert_taken_over(gated)
    else:
        with pytest.raises(AssertionError):
            _assert_taken_over(gated)


def test_cut_channels_change_nothing_in_what_is_taken_over() -> None:
    kernels = []
    for cut in (False, True):
        torch.manual_seed(0)
        gated = Gated(nn.Conv2d(6, 4, 1))
        gated.observe_()
        gated.set_(0, 2)
        gated.take_over_()
        keep = ~gated.pruner.gates.is_closed()
        if cut:
            Shrinkage(gated.net, gated.pruner.analysis).narrow_(keep)
            gated.takeover.narrow_(keep)
            assert gated.net.reader.weight.shape[1] == 5
        _assert_taken_over(gated)
        kernel = gated.net.reader.weight.detach()
        kernels.append(kernel if cut else kernel[:, [0, 1, 3, 4, 5]])
    torch.testing.assert_close(*kernels)


def test_gates_that_stay_leave_the_kernels_as_they_are() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    kernel = gated.net.reader.weight.clone()
    gated.observe_()
    gated.set_(0.9999, 0)
    gated.take_over_()
    assert torch.equal(gated.net.reader.weight, kernel)


def test_gates_of_a_checkpoint_without_takeover_are_taken_as_they_are(
) -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.set_(0.3, 1)
    state = {
        name: value
        for name, value in gated.pruner.state_dict().items()
        if not name.startswith('takeover')
    }
    other = Gated(nn.Conv2d(6, 4, 1))
    other.pruner.load_state_dict(state)
    kernel = other.net.reader.weight.clone()
    other.observe_()
    other.take_over_()
    assert torch.equal(other.net.reader.weight, kernel)


def test_inputs_that_are_not_finite_teach_nothing() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.observe_()
    gated.take_over_()
    known = copy.deepcopy(gated.pruner.state_dict())
    gated.takeover.watch_(True)
    gated.net(_inputs() * torch.nan)
    gated.takeover.watch_(False)
    for name, value in gated.pruner.state_dict().items():
        assert torch.equal(value, known[name]), name


def test_what_is_known_is_in_the_state_until_gates_move_no_more() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    names = [*gated.pruner.state_dict()]
    gated.observe_()
    state = copy.deepcopy(gated.pruner.state_dict())
    assert len(state) > len(names)
    other = Gated(nn.Conv2d(6, 4, 1))
    other.pruner.load_state_dict(state)
    assert [*other.pruner.state_dict()] == [*state]
    for name, value in other.pruner.state_dict().items():
        assert torch.equal(value, state[name]), name
    gated.takeover.forget_()
    assert [*gated.pruner.state_dict()] == names


def test_moments_of_earlier_versions_are_read() -> None:
    gated = Gated(nn.Conv2d(6, 4, 1))
    gated.observe_()
    state = copy.deepcopy(gated.pruner.state_dict())
    reader = 'takeover.readers.0.0'
    known = moments.Known(*(state.pop(f'{reader}.{name}')
                            for name in moments.Known._fields))
    state[reader] = known.moments()
    other = Gated(nn.Conv2d(6, 4, 1))
    other.pruner.load_state_dict(state)
    for name, value in other.pruner.state_dict().items():
        torch.testing.assert_close(value, gated.pruner.state_dict()[name])


def test_frozen_and_shared_kernels_stay_as_they_are() -> None:
    frozen, shared = (nn.Conv2d(6, 4, 1) for _ in range(2))
    frozen.weight.requires_grad_(False)
    twin = nn.Conv2d(6, 4, 1)
    twin.weight = shared.weight
    assert [one.name for one in Gated(frozen).takeover.readers] == ['last']
    # Channels of a shared kernel have no gates.
    with pytest.raises(ValueError, match='reader.weight has other names'):
        Gated(shared, twin=twin)
