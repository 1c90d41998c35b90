"""Formulas of SCP, against the closed forms that follow from them."""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gdp_mmseg.gates.deactivation import edges_of, log_active
from gdp_mmseg.gates.masks import drop_probability, soft_mask, uniform_numbers

TAU, K, T = 0.05, 20., 0.5
C = torch.tensor(0.95, dtype=torch.double)


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def phi_of(beta: Tensor, gamma: Tensor, activation: str = 'relu') -> Tensor:
    return -log_active(beta, gamma.abs(), TAU, activation).expm1()


@pytest.mark.parametrize(
    'beta, gamma, phi, drop, by_beta, by_gamma',
    [(0, 1, .5199388, 1.838e-4, -1.464783e-3, -7.323917e-5),
     (0, .1, .6914624, .0056482, -.3954619, -.1977309),
     (-.1, .1, .9331928, .4167463, -6.296339, -9.444507),
     (-.2, .1, .9937903, .7059525, -.7277178, -1.819294),
     (-1, .7, .9331928, .4167464, -.8994769, -1.349215),
     (-1, -.5, .9821356, .6553662, -.3973678, .8344724),
     (.3, .001, 0, 5.6e-9, 0, 0), (0, 1e-4, 1, .7310586, 0, 0)])
def test_probability_and_its_derivatives(beta: float, gamma: float, phi: float,
                                         drop: float, by_beta: float,
                                         by_gamma: float) -> None:
    offset, scale = of(beta).requires_grad_(), of(gamma).requires_grad_()
    found = phi_of(offset, scale)
    dropped = drop_probability(found, C, K)
    dropped.sum().backward()
    assert found.item() == pytest.approx(phi, abs=6e-8)
    assert dropped.item() == pytest.approx(drop, rel=1e-4, abs=6e-8)
    assert offset.grad is not None and scale.grad is not None
    assert offset.grad.item() == pytest.approx(by_beta, rel=1e-6, abs=1e-9)
    assert scale.grad.item() == pytest.approx(by_gamma, rel=1e-6, abs=1e-9)


def test_channel_is_kept_from_a_quantile_on() -> None:
    gamma = of(1, .5, .1)
    beta = of(-1.5948536, -.7724268, -.1144854)
    drop = drop_probability(phi_of(beta, gamma), C, K)
    assert drop.tolist() == pytest.approx([.5] * 3, abs=1e-6)


def test_derivatives_are_finite_where_gamma_is_zero() -> None:
    beta, gamma = of(TAU).requires_grad_(), of(0).requires_grad_()
    drop_probability(phi_of(beta, gamma), C, K).sum().backward()
    assert beta.grad is not None and gamma.grad is not None
    assert beta.grad.isfinite().all() and gamma.grad.item() == 0
    assert -10 < beta.grad.item() < 0


@pytest.mark.parametrize('drop, masks', [
    (.5, (.5, .1, .0121951)),
    (.1, (.9878049, .9, .5)),
    (.9, (.0121951, .0013699, 1.5239e-4)),
])
def test_soft_mask_is_a_relaxed_draw(drop: float, masks: tuple[float,
                                                               ...]) -> None:
    found = soft_mask(of(drop), of(.5, .25, .1), T)
    assert found.tolist() == pytest.approx(masks, rel=4e-5)


@pytest.mark.parametrize('drop, uniform, slope', [(.5, .5, -2),
                                                  (.5, .25, -.72),
                                                  (.1, .5, -.2676978),
                                                  (.1, .25, -2)])
def test_slope_of_a_soft_mask(drop: float, uniform: float,
                              slope: float) -> None:
    value = of(drop).requires_grad_()
    soft_mask(value, of(uniform), T).sum().backward()
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize('drop, mean', [(.02, .97081), (.1, .87254),
                                        (.3, .67475), (.5, .5), (.7, .32525),
                                        (.9, .12746)])
def test_masks_keep_with_their_probability(drop: float, mean: float) -> None:
    uniform = (torch.arange(200_000).double() + .5) / 200_000
    mask = soft_mask(of(drop), uniform, T)
    assert float(mask.mean()) == pytest.approx(mean, abs=1e-5)
    assert float((mask > .5).double().mean()) == pytest.approx(1 - drop)


@pytest.mark.parametrize('uniform, mask, by_beta, by_gamma',
                         [(.5, .6620155, 11.591877, 17.387814),
                          (.25, .1787359, 7.604722, 11.407082)])
def test_whole_chain(uniform: float, mask: float, by_beta: float,
                     by_gamma: float) -> None:
    beta, gamma = of(-.1).requires_grad_(), of(.1).requires_grad_()
    found = soft_mask(
        drop_probability(phi_of(beta, gamma), C, K), of(uniform), T)
    found.sum().backward()
    assert beta.grad is not None and gamma.grad is not None
    assert found.item() == pytest.approx(mask, abs=6e-8)
    assert beta.grad.item() == pytest.approx(by_beta, rel=1e-6)
    assert gamma.grad.item() == pytest.approx(by_gamma, rel=1e-6)


@pytest.mark.parametrize('beta, gamma, phi, drop',
                         [(0, .1, .3829249, None),
                          (0, .02, .9875807, .6795301), (-1, .1, 0, None)])
def test_without_a_relu_both_sides_count(beta: float, gamma: float, phi: float,
                                         drop: float | None) -> None:
    found = phi_of(of(beta), of(gamma), '')
    assert found.item() == pytest.approx(phi, abs=1e-7)
    dropped = drop_probability(found, C, K).item()
    assert dropped == pytest.approx(drop, abs=1e-6) if drop else dropped < .5


@pytest.mark.parametrize('activation, edges', [
    ('silu', (-4.48534, -.10557, .09545)),
    ('gelu', (-1.94886, -.10956, .09309)),
    ('hardswish', (-2.89642, -.10358, .09687)),
])
def test_other_activations_are_about_zero_twice(
        activation: str, edges: tuple[float, ...]) -> None:
    assert edges_of(activation, TAU) == pytest.approx(edges, abs=6e-6)

    def below(edge: float) -> float:
        return (1 + math.erf((edge + .3) / .4 / math.sqrt(2))) / 2

    low, middle, high = map(below, edges)
    assert phi_of(of(-.3), of(.4), activation).item() == pytest.approx(
        low + high - middle, abs=1e-5)
    # No value is as low as that.
    assert len(edges_of(activation, .4)) == 1


def test_far_from_deactivated_channels_still_differ() -> None:
    found: Any = log_active(of(-1, -2, -3), of(.01, .01, .01), TAU)
    assert found.tolist() == sorted(found.tolist(), reverse=True)
    assert (-found.expm1() == 1).all()


def test_noise_is_uniform_and_a_function_of_the_step() -> None:
    seed, step = torch.tensor(3), torch.tensor(5)
    numbers = uniform_numbers(seed, step, 100_000)
    assert torch.equal(numbers, uniform_numbers(seed, step, 100_000))
    assert torch.equal(numbers[:10], uniform_numbers(seed, step, 10))
    assert 0 < float(numbers.min()) and float(numbers.max()) < 1
    counts = numbers.mul(50).long().bincount()
    assert len(counts) == 50 and 1800 < int(counts.min())
    others = [
        uniform_numbers(seed, step + 1, 100_000),
        uniform_numbers(seed + 1, step, 100_000),
        numbers.roll(1)
    ]
    for other in others:
        both = torch.corrcoef(torch.stack([numbers, other]))
        assert abs(float(both[0, 1])) < 0.015
