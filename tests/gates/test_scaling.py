"""Layers with factors: outputs and gradients of plain products."""
from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdp_mmseg.gates import scaling
from gdp_mmseg.gates.operators import Convolution, Matrix, Operator
from gdp_mmseg.gates.scaling import Scaling, along, run


def convolution(**options: Any) -> Convolution:
    """Operator of a convolution of two dimensions, with other options."""
    return Convolution(
        **{
            **dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
            **dict(transposed=False, added=(0, 0)),
            **options
        })


# Operator, shapes of inputs, kernel and bias, axis of the kernel's inputs.
Shape = tuple[int, ...]
LAYERS: dict[str, tuple[Operator, Shape, Shape, int]] = {
    'convolution': (convolution(), (2, 6, 5, 5), (8, 6, 3, 3), 1),
    'strided, dilated convolution':
    (convolution(stride=(2, 1), dilation=(1, 2),
                 padding=(1, 2)), (2, 6, 5, 5), (8, 6, 3, 3), 1),
    'grouped convolution':
    (convolution(groups=2), (2, 6, 5, 5), (8, 3, 3, 3), 1),
    'convolution over time':
    (convolution(stride=(2, ), padding=(1, ), dilation=(1, ),
                 added=(0, )), (2, 6, 9), (8, 6, 3), 1),
    'transposed convolution':
    (convolution(transposed=True, stride=(2, 2),
                 added=(1, 0)), (2, 6, 5, 5), (6, 4, 2, 2), 0),
    'matrix': (Matrix(), (2, 7, 6), (4, 6), 1),
    'matrix and a vector': (Matrix(), (6, ), (4, 6), 1),
}
NAMES = [(name, of_inputs) for name, (_, shape, kernel, _) in LAYERS.items()
         for of_inputs in (False, True)
         if not (of_inputs and 'grouped' in name)]


def plain(operator: Operator, inputs: Tensor, weight: Tensor,
          bias: Tensor | None, factors: Tensor, scaling: Scaling) -> Tensor:
    """Compute what :func:`run` does, by operations of PyTorch alone."""
    if scaling.of_inputs:
        return operator(inputs * along(factors, inputs, scaling.axis), weight,
                        bias)
    return operator(inputs, weight * along(factors, weight, scaling.axis),
                    bias)


class Case:
    """Layer of :data:`LAYERS` and its leaves: x, W, b and factors."""

    def __init__(self,
                 name: str,
                 of_inputs: bool = False,
                 dtype: torch.dtype = torch.double,
                 **more: bool) -> None:
        self.operator, inputs, kernel, axis = LAYERS[name]
        draw = torch.Generator().manual_seed(1)
        outputs = kernel[1 if 'transposed' in name else 0]
        self.leaves = [
            torch.randn(shape, generator=draw,
                        dtype=torch.double).to(dtype).requires_grad_()
            for shape in (inputs, kernel, (outputs, ), (kernel[axis], ))
        ]
        channels = -1 if 'matrix' in name else 1 - len(kernel)
        self.scaling = Scaling(of_inputs, channels if of_inputs else axis,
                               **more)

    def outputs(self, function: Callable[..., Tensor]) -> Tensor:
        """Outputs of the layer by :func:`run` or :func:`plain`."""
        return function(self.operator, *self.leaves, self.scaling)

    def gradients(self) -> list[Any]:
        """Gradients of the leaves."""
        return [leaf.grad for leaf in self.leaves]


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_SMALL', 0)


@pytest.mark.parametrize('small, chunk', [(0, 1), (0, 100), (0, 2**18),
                                          (2**18, 2**18)])
@pytest.mark.parametrize('name, of_inputs', NAMES)
def test_gradients_are_those_of_the_plain_product(
        name: str, of_inputs: bool, small: int, chunk: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_SMALL', small)
    monkeypatch.setattr(scaling, '_CHUNK', chunk)
    found = []
    for function in (plain, run):
        case = Case(name, of_inputs)
        outputs = case.outputs(function)
        outputs.square().sum().backward()
        found.append([outputs, *case.gradients()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name, of_inputs', NAMES)
def test_neutral_factors_leave_the_layer_as_it_is(name: str,
                                                  of_inputs: bool) -> None:
    found = []
    for function in (plain, run):
        case = Case(name, of_inputs, neutral=True)
        case.leaves[-1].data.fill_(1)
        outputs = case.outputs(function)
        outputs.square().sum().backward()
        found.append([outputs, *case.gradients()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def kept_by(outputs: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors that are kept for the backward pass of a layer."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        outputs()
    return kept


@pytest.mark.parametrize('name, of_inputs', NAMES)
def test_no_product_is_kept_for_the_backward_pass(name: str,
                                                  of_inputs: bool) -> None:
    case = Case(name, of_inputs)
    kept = kept_by(lambda: case.outputs(run))
    known = {leaf.data_ptr() for leaf in case.leaves}
    assert {one.data_ptr() for one in kept} <= known
    plainly = kept_by(lambda: case.outputs(plain))
    assert not {one.data_ptr() for one in plainly} <= known


@pytest.mark.parametrize('of_inputs', [False, True])
def test_factors_that_nobody_heeds_get_no_gradient(of_inputs: bool) -> None:
    found = []
    for function in (plain, run):
        case = Case('convolution', of_inputs, heeded=False)
        case.outputs(function).square().sum().backward()
        found.append(case.gradients())
    (*wanted, _), (*others, of_factors) = found
    assert of_factors is not None and not of_factors.any()
    for one, other in zip(wanted, others):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['convolution', 'matrix'])
def test_products_under_autocast_are_rounded_once(name: str,
                                                  dtype: torch.dtype) -> None:
    case = Case(name, dtype=torch.float)
    with torch.autocast('cpu', dtype=dtype):
        kept = kept_by(lambda: case.outputs(run))
        outputs = case.outputs(run)
        wanted = case.outputs(plain)
    assert torch.equal(outputs, wanted) and outputs.dtype == dtype
    # Of the inputs, what the operator reads is kept, as it is without gates.
    inputs, kernel, _, factors = case.leaves
    assert [one.dtype for one in kept if one.shape == inputs.shape] == [dtype]
    gradient = torch.ones_like(outputs)
    outputs.backward(gradient)
    found = case.gradients()
    assert [one.dtype for one in found] == [torch.float32] * 4
    expected = torch.autograd.grad(wanted, case.leaves, gradient)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_gradient_of_factors_is_summed_in_their_precision() -> None:
    inputs = torch.full((1, 2, 300, 1), 300., dtype=torch.half)
    weight = torch.ones(1, 2, 1, 1, dtype=torch.half)
    factors = torch.ones(2, requires_grad=True)
    run(convolution(), inputs.requires_grad_(), weight.requires_grad_(), None,
        factors, Scaling(True, 1)).sum().backward()
    assert factors.grad is not None
    # float16 ends at 65504.
    assert factors.grad.tolist() == [9e4, 9e4]


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('name, of_inputs', NAMES)
def test_checkpoints_of_activations_compute_the_same(
        name: str, of_inputs: bool, use_reentrant: bool) -> None:
    found = []
    for recomputes in (False, True):
        case = Case(name, of_inputs)
        outputs = (
            checkpoint(
                lambda *leaves: run(case.operator, *leaves, case.scaling),
                *case.leaves,
                use_reentrant=use_reentrant)
            if recomputes else case.outputs(run))
        outputs.square().sum().backward()
        found.append(case.gradients())
    for one, other in zip(*found):
        assert torch.equal(one, other)


def gradients(function: Callable[..., Tensor], name: str, of_inputs: bool,
              use: Callable[..., Tensor | None]) -> list[Tensor]:
    case = Case(name, of_inputs)
    use(lambda: case.outputs(function).square().sum(), *case.leaves)
    return case.gradients()


def twice_in_a_pass(layer: Callable[[], Tensor], *_: Tensor) -> None:
    (layer() * layer().sqrt()).backward()


def two_passes_before_their_gradients(layer: Callable[[], Tensor], *_:
                                      Tensor) -> None:
    first, second = layer(), layer()
    first.backward()
    second.backward()


def retained_over_another_pass(layer: Callable[[], Tensor], *_:
                               Tensor) -> None:
    first = layer()
    first.backward(retain_graph=True)
    layer().backward()
    first.backward()


def penalty_on_gradients(layer: Callable[[], Tensor], *leaves: Tensor) -> None:
    found = torch.autograd.grad(layer(), leaves, create_graph=True)
    (layer() + sum(one.square().sum() for one in found)).backward()


@pytest.mark.parametrize('use', [
    twice_in_a_pass, two_passes_before_their_gradients,
    retained_over_another_pass, penalty_on_gradients
])
@pytest.mark.parametrize('name, of_inputs', NAMES)
def test_any_order_of_passes_is_right(
        name: str, of_inputs: bool, use: Callable[..., Tensor | None]) -> None:
    for found, expected in zip(
            gradients(run, name, of_inputs, use),
            gradients(plain, name, of_inputs, use)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
