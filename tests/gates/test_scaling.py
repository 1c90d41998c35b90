"""Kernel times factors: the plain product, in memory that is used again."""
from __future__ import annotations

import copy
import pickle
from typing import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdp_mmseg.gates import scaling
from gdp_mmseg.gates.scaling import Product, along

INPUTS = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
# Layer, shape of its kernel, axis of its inputs.
LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    'convolution': (lambda kernel: F.conv2d(INPUTS, kernel), (8, 6, 3, 3), 1),
    'grouped':
    (lambda kernel: F.conv2d(INPUTS, kernel, groups=2), (8, 3, 3, 3), 1),
    'transposed':
    (lambda kernel: F.conv_transpose2d(INPUTS, kernel), (6, 4, 2, 2), 0),
    'linear': (lambda kernel: F.linear(INPUTS[:, :, 0, 0], kernel), (4, 6), 1),
}


def plain(weight: Tensor, factors: Tensor, axis: int) -> Tensor:
    return weight * along(factors, weight, axis)


def leaves(shape: tuple[int, ...], axis: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    factors = torch.rand(shape[axis], generator=generator)
    return weight.requires_grad_(), factors.requires_grad_()


@pytest.mark.parametrize('chunk', [1, 100, 2**18])
@pytest.mark.parametrize('name', LAYERS)
def test_gradients_are_those_of_the_plain_product(
        name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, '_CHUNK', chunk)
    layer, shape, axis = LAYERS[name]
    found = []
    for product in (plain, Product()):
        weight, factors = leaves(shape, axis)
        output = layer(product(weight, factors, axis))
        output.square().sum().backward()
        found.append((output, weight.grad, factors.grad))
    (output, of_weight, of_factors), other = found
    assert torch.equal(output, other[0])
    assert torch.equal(of_weight, other[1])
    torch.testing.assert_close(of_factors, other[2], rtol=1e-5, atol=1e-5)


def test_memory_is_used_again_after_each_backward_pass() -> None:
    product, places = Product(), set()
    weight, factors = leaves((8, 6, 3, 3), 1)
    for _ in range(3):
        kernel = product(weight, factors, 1)
        places.add(kernel.data_ptr())
        loss = F.conv2d(INPUTS, kernel).sum()  # kept, as a loop keeps it
        loss.backward()
    with torch.no_grad():
        places.add(product(weight, factors, 1).data_ptr())
    assert len(places) == 1


def gradients(product: Callable[..., Tensor],
              use: Callable[..., Tensor | None]) -> list[Tensor]:
    weight, factors = leaves((8, 6, 3, 3), 1)

    def layer() -> Tensor:
        return F.conv2d(INPUTS, product(weight, factors, 1)).square().sum()

    use(layer, weight, factors)
    assert weight.grad is not None and factors.grad is not None
    return [weight.grad, factors.grad]


def twice_in_a_pass(layer: Callable[[], Tensor], *_: Tensor) -> None:
    (layer() * layer().sqrt()).backward()


def two_passes_before_their_gradients(layer: Callable[[], Tensor], *_:
                                      Tensor) -> None:
    first, second = layer(), layer()
    first.backward()
    second.backward()


def retained_over_another_pass(layer: Callable[[], Tensor], weight: Tensor, *_:
                               Tensor) -> None:
    first = layer()
    first.backward(retain_graph=True)
    layer().backward()
    first.backward()


def without_gradients_between(layer: Callable[[], Tensor], *_: Tensor) -> None:
    first = layer()
    with torch.no_grad():
        layer()
    first.backward()


def penalty_on_gradients(layer: Callable[[], Tensor], weight: Tensor,
                         factors: Tensor) -> None:
    found = torch.autograd.grad(layer(), [weight, factors], create_graph=True)
    (layer() + sum(one.square().sum() for one in found)).backward()


@pytest.mark.parametrize('use', [
    twice_in_a_pass, two_passes_before_their_gradients,
    retained_over_another_pass, without_gradients_between, penalty_on_gradients
])
def test_any_order_of_passes_is_right(
        use: Callable[..., Tensor | None]) -> None:
    for found, expected in zip(
            gradients(Product(), use), gradients(plain, use)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_has_memory_of_its_own() -> None:
    product = Product()
    weight, factors = leaves((8, 6, 3, 3), 1)
    kernel = product(weight, factors, 1)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert torch.equal(other(weight, factors, 1), kernel)
        assert other(weight, factors, 1).data_ptr() != kernel.data_ptr()


def test_memory_follows_the_kernel() -> None:
    product = Product()
    for shape in ((8, 6, 3, 3), (8, 4, 3, 3)):
        for dtype in (torch.float32, torch.float64):
            weight, factors = leaves(shape, 1)
            weight, factors = weight.to(dtype), factors.to(dtype)
            assert torch.equal(
                product(weight, factors, 1), plain(weight, factors, 1))
