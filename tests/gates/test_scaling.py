"""Inputs or kernels times factors: values and gradients of plain products."""
from __future__ import annotations

from typing import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdp_mmseg.gates import scaling
from gdp_mmseg.gates.scaling import along, scaled

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(2, 6, 5, 5, generator=DRAW)
KERNEL = torch.randn(8, 6, 3, 3, generator=DRAW)
TOKENS = torch.randn(2, 7, 6, generator=DRAW)
MATRIX = torch.randn(4, 6, generator=DRAW)
# Layer, shape of what is multiplied, axis of its channels.
LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    'kernel': (lambda kernel: F.conv2d(INPUTS, kernel), (8, 6, 3, 3), 1),
    'grouped kernel':
    (lambda kernel: F.conv2d(INPUTS, kernel, groups=2), (8, 3, 3, 3), 1),
    'transposed kernel':
    (lambda kernel: F.conv_transpose2d(INPUTS, kernel), (6, 4, 2, 2), 0),
    'matrix': (lambda kernel: F.linear(TOKENS, kernel), (4, 6), 1),
    'inputs': (lambda inputs: F.conv2d(inputs, KERNEL), (2, 6, 5, 5), -3),
    'inputs without batch':
    (lambda inputs: F.conv2d(inputs, KERNEL), (6, 5, 5), -3),
    'tokens': (lambda inputs: F.linear(inputs, MATRIX), (2, 7, 6), -1),
}


def plain(tensor: Tensor, factors: Tensor, axis: int) -> Tensor:
    return tensor * along(factors, tensor, axis)


def leaves(shape: tuple[int, ...], axis: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator)
    factors = torch.rand(shape[axis], generator=generator)
    return tensor.requires_grad_(), factors.requires_grad_()


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_SMALL', 0)


@pytest.mark.parametrize('small, chunk', [(0, 1), (0, 100), (0, 2**18),
                                          (2**18, 2**18)])
@pytest.mark.parametrize('name', LAYERS)
def test_gradients_are_those_of_the_plain_product(
        name: str, small: int, chunk: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_SMALL', small)
    monkeypatch.setattr(scaling, '_CHUNK', chunk)
    layer, shape, axis = LAYERS[name]
    found = []
    for product in (plain, scaled):
        tensor, factors = leaves(shape, axis)
        output = layer(product(tensor, factors, axis))
        output.square().sum().backward()
        found.append((output, tensor.grad, factors.grad))
    (output, of_tensor, of_factors), other = found
    assert torch.equal(output, other[0])
    assert torch.equal(of_tensor, other[1])
    torch.testing.assert_close(of_factors, other[2], rtol=1e-5, atol=1e-5)


def test_factors_that_nobody_heeds_get_no_gradient() -> None:
    tensor, factors = leaves((8, 6, 3, 3), 1)
    output = F.conv2d(INPUTS, scaled(tensor, factors, 1, heeded=False))
    output.square().sum().backward()
    expected, _ = leaves((8, 6, 3, 3), 1)
    F.conv2d(INPUTS, plain(expected, factors.detach(),
                           1)).square().sum().backward()
    assert factors.grad is not None and not factors.grad.any()
    assert tensor.grad is not None and expected.grad is not None
    assert torch.equal(tensor.grad, expected.grad)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_rounded_once(
        dtype: torch.dtype) -> None:
    tensor, factors = leaves((2, 6, 5, 5), 1)
    half = tensor.detach().to(dtype).requires_grad_()
    product = scaled(half, factors, 1)
    exact = half.detach().float() * along(factors.detach(), half, 1)
    assert product.dtype == dtype
    assert torch.equal(product, exact.to(dtype))
    product.square().sum().backward()
    # The sum of the gradient does not overflow, nor lose small terms.
    wanted = (2 * exact.to(dtype) * half.detach()).float().sum((0, 2, 3))
    assert factors.grad is not None and factors.grad.dtype == torch.float32
    torch.testing.assert_close(factors.grad, wanted, rtol=2e-2, atol=2e-2)


def gradients(product: Callable[..., Tensor],
              use: Callable[..., Tensor | None]) -> list[Tensor]:
    tensor, factors = leaves((8, 6, 3, 3), 1)

    def layer() -> Tensor:
        return F.conv2d(INPUTS, product(tensor, factors, 1)).square().sum()

    use(layer, tensor, factors)
    assert tensor.grad is not None and factors.grad is not None
    return [tensor.grad, factors.grad]


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


def penalty_on_gradients(layer: Callable[[], Tensor], tensor: Tensor,
                         factors: Tensor) -> None:
    found = torch.autograd.grad(layer(), [tensor, factors], create_graph=True)
    (layer() + sum(one.square().sum() for one in found)).backward()


@pytest.mark.parametrize('use', [
    twice_in_a_pass, two_passes_before_their_gradients,
    retained_over_another_pass, penalty_on_gradients
])
def test_any_order_of_passes_is_right(
        use: Callable[..., Tensor | None]) -> None:
    for found, expected in zip(gradients(scaled, use), gradients(plain, use)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
