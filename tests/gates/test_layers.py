"""Gates on the weight side: the layer on gated activations."""
from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.gates import scaling
from gdp_mmseg.gates.gdp import GDPGates
from gdp_mmseg.gates.layers import gate_, gate_layer_, ungate_
from gdp_mmseg.gates.lookup import slot_values

from helpers.toys import SHAPE, TOYS, open_gates, randomise_, run

SLOTS = torch.tensor([2, -1, 0, 0, 1, -1])
IMAGE = (2, 6, 7, 7)
TOKENS = (2, 5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'convolution': (lambda: nn.Conv2d(6, 4, 3, padding=1), IMAGE),
    'strided, dilated, no bias':
    (lambda: nn.Conv2d(6, 4, 3, stride=2, dilation=2, bias=False), IMAGE),
    'reflection padding':
    (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode='reflect'), IMAGE),
    'convolution over time': (lambda: nn.Conv1d(6, 4, 3), (2, 6, 9)),
    'transposed convolution':
    (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), IMAGE),
    'linear': (lambda: nn.Linear(6, 4), (2, 6)),
    'linear on tokens, no bias': (lambda: nn.Linear(6, 4, bias=False), TOKENS),
}


def layer_and_gates(name: str) -> tuple[nn.Module, GDPGates, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    gates = GDPGates(3).double()
    with torch.no_grad():
        gates.theta.copy_(torch.tensor([0.5, 0., 1.5]))
    return build().double(), gates, torch.randn(shape).double()


def scaled(inputs: Tensor, values: Tensor, name: str) -> Tensor:
    """Activations times the openness of their channels."""
    if name.startswith('linear'):
        return inputs * values
    return inputs * values.reshape(1, -1, *[1] * (inputs.dim() - 2))


@pytest.mark.parametrize('name', LAYERS)
def test_gated_layer_is_the_layer_on_gated_activations(name: str) -> None:
    layer, gates, inputs = layer_and_gates(name)
    values = slot_values(gates.openness(), SLOTS)
    wanted = layer(scaled(inputs, values, name))
    gradient, = torch.autograd.grad(wanted.square().sum(), gates.theta)
    gate_layer_(layer, gates, SLOTS)
    found = layer(inputs)
    torch.testing.assert_close(found, wanted)
    by_weight, = torch.autograd.grad(found.square().sum(), gates.theta)
    torch.testing.assert_close(by_weight, gradient)
    assert by_weight[1] == 0 and (by_weight[[0, 2]] != 0).all()


@pytest.mark.parametrize('name',
                         [name for name in LAYERS if 'reflection' not in name])
def test_no_gated_kernel_is_kept_for_the_backward_pass(
        name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_SMALL', 0)
    layer, gates, inputs = layer_and_gates(name)
    gate_layer_(layer, gates, SLOTS)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda one: one):
        layer(inputs.requires_grad_())
    kernels = [one for one in kept if one.numel() == layer.weight.numel()]
    assert [one.data_ptr() for one in kernels] == [layer.weight.data_ptr()]


@pytest.mark.parametrize('name', LAYERS)
def test_gradient_of_theta_is_the_finite_difference(name: str) -> None:
    layer, gates, inputs = layer_and_gates(name)
    gate_layer_(layer, gates, SLOTS)
    gradient, = torch.autograd.grad(layer(inputs).square().sum(), gates.theta)
    for index in range(3):
        sides = []
        for way in (1e-5, -1e-5):
            with torch.no_grad():
                gates.theta[index] += way
                sides.append(float(layer(inputs).square().sum()))
                gates.theta[index] -= way
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(
            float(gradient[index]), rel=1e-5, abs=1e-5)


def test_closed_form_of_the_gradient_of_a_linear_layer() -> None:
    gates = GDPGates(1).double()
    layer = nn.Linear(1, 1, bias=False).double()
    gate_layer_(layer, gates, torch.tensor([0]))
    layer(torch.full((1, 1), 3.).double()).sum().backward()
    epsilon = float(gates.epsilon)
    assert float(gates.theta.grad) == pytest.approx(
        3 * float(layer.weight.detach()) * 2 * epsilon / (1 + epsilon))


@pytest.mark.parametrize('name', LAYERS)
def test_state_dict_of_a_gated_layer_is_unchanged(name: str) -> None:
    layer, gates, _ = layer_and_gates(name)
    before = {
        key: tensor.clone()
        for key, tensor in layer.state_dict().items()
    }
    gate_layer_(layer, gates, SLOTS)
    assert list(layer.state_dict()) == list(before)
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in layer.state_dict().items())
    assert [name for name, _ in layer.named_modules()] == ['']
    assert not any('slots' in key for key in gates.state_dict())


def gated_net() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    net.gates = GDPGates(3)
    gate_layer_(net[2], net.gates, torch.arange(3))
    return net


def output(net: Any, inputs: Tensor) -> Tensor:
    return net[2](F.relu(net[0](inputs)))


def test_deepcopy_is_bound_to_its_own_gates() -> None:
    net, inputs = gated_net(), torch.ones(1, 3, 5, 5)
    before = output(net, inputs)
    copied = copy.deepcopy(net)
    assert torch.equal(output(copied, inputs), before)
    copied.gates.close_(torch.ones(3, dtype=torch.bool))
    assert torch.equal(output(net, inputs), before)
    closed = output(copied, inputs)
    assert torch.equal(closed, copied[2].bias.reshape(1, 2, 1,
                                                      1).expand_as(closed))
    output(copied, inputs).sum().backward()
    assert net.gates.theta.grad is None
    assert copied.gates.theta.grad is not None


def test_deepcopy_is_bound_to_its_own_kernel() -> None:
    net, inputs = gated_net(), torch.ones(1, 3, 5, 5)
    before = output(net, inputs)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied[2].weight.zero_()
    assert torch.equal(output(net, inputs), before)
    assert not torch.equal(output(copied, inputs), before)


def test_slots_move_with_the_gates() -> None:
    net = gated_net()
    net.gates.to('meta')
    assert all(buffer.is_meta for buffer in net.gates.buffers())


@pytest.mark.parametrize(
    'layer', [nn.ReLU(), nn.BatchNorm2d(6),
              nn.Embedding(6, 4)])
def test_only_convolutions_and_linear_layers_are_gated(
        layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=type(layer).__name__):
        gate_layer_(layer, GDPGates(3), SLOTS)


def outputs_and_gradients(net: nn.Module,
                          analysis: Analysis,
                          inputs: Tensor,
                          heeded: bool = True) -> list[Any]:
    """Gradient of theta, outputs, gradients and statistics of a step."""
    torch.manual_seed(0)
    net = copy.deepcopy(net)
    gates = open_gates(torch.arange(analysis.num_gates) % 3 != 0).to(inputs)
    gates.heeded = heeded
    gate_(net, analysis, gates)
    outputs = run(net, inputs)
    flat = [outputs] if isinstance(outputs, Tensor) else [*outputs]
    weights = torch.Generator().manual_seed(3)
    sum((output *
         torch.randn(output.shape, generator=weights, dtype=output.dtype)
         ).sum() for output in flat).backward()
    return [
        gates.theta.grad, *flat, *[p.grad for p in net.parameters()],
        *[b for b in net.buffers() if b.is_floating_point()]
    ]


@pytest.mark.parametrize('name', [
    name for name in TOYS if any(group.norms
                                 for group in TOYS[name].analyse()[1].groups)
])
def test_gates_at_norms_compute_what_gates_at_layers_do(name: str) -> None:
    torch.manual_seed(0)
    net, analysis = TOYS[name].analyse()
    net = randomise_(net).double().train()
    inputs = torch.randn(3, *SHAPE).double()
    for found, wanted in zip(
            outputs_and_gradients(net, analysis, inputs),
            outputs_and_gradients(net, analysis.at_layers(), inputs)):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('small', [0, 2**18])
@pytest.mark.parametrize('name', TOYS)
def test_gains_that_nobody_heeds_are_not_computed(
        name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_SMALL', small)
    torch.manual_seed(0)
    net, analysis = TOYS[name].analyse()
    net = randomise_(net).double().train()
    inputs = torch.randn(3, *SHAPE).double()
    unheeded, heeded = (
        outputs_and_gradients(net, analysis, inputs, heeded)
        for heeded in (False, True))
    assert unheeded[0] is None and heeded[0] is not None
    for found, wanted in zip(unheeded[1:], heeded[1:]):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_loss_has_a_gradient_where_only_gates_are_trained() -> None:
    net, analysis = TOYS['residual'].analyse()
    net.requires_grad_(False)
    gains, *_ = outputs_and_gradients(net, analysis, torch.randn(3, *SHAPE),
                                      False)
    assert gains is not None and not gains.any()


def test_layers_behind_gated_norms_stay_plain() -> None:
    net, analysis = TOYS['residual'].analyse()
    plain = [{**vars(module)} for module in net.modules()]
    gate_(net, analysis, GDPGates(analysis.num_gates))
    changed = [
        name for name, module in net.named_modules()
        if {'forward', '_conv_forward'} & {*vars(module)}
    ]
    assert changed == ['stem.1', 'branch.1', 'branch.4']
    ungate_(net, analysis)
    assert [{**vars(module)} for module in net.modules()] == plain


@pytest.mark.parametrize('convert', [
    nn.SyncBatchNorm.convert_sync_batchnorm,
    lambda net: copy.deepcopy(net),
    lambda net: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)),
])
def test_gates_stay_where_norms_are_replaced(
        convert: Callable[[nn.Module], nn.Module]) -> None:
    net, analysis = TOYS['residual'].analyse()
    net = randomise_(net).eval()
    net.gates = open_gates(torch.arange(analysis.num_gates) % 2 > 0)
    gate_(net, analysis, net.gates)
    inputs = torch.randn(2, *SHAPE)
    wanted = run(net, inputs)
    other = convert(net)
    torch.testing.assert_close(run(other, inputs), wanted)
    other.gates.close_(torch.ones(analysis.num_gates, dtype=torch.bool))
    assert not torch.allclose(run(other, inputs), wanted)
    ungate_(other, analysis)
    opened = run(other, inputs)
    assert not torch.allclose(opened, wanted)
    assert not other._forward_pre_hooks
