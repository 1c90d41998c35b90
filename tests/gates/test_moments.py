"""What is known of channels: exact to the rounding, and safe."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdp_mmseg.gates import moments
from gdp_mmseg.gates.moments import Known, Moments

# Largest rounding of a correlation.
ROUNDING = 0.5 / (2**15 - 1)


def correlated(number: int, channels: int, seed: int = 0) -> Tensor:
    """Positions of channels of different means and variances."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(channels, channels, generator=draw)
    values = torch.randn(number, channels, generator=draw) @ mixed
    return values * torch.logspace(-3, 3, channels) + torch.arange(channels)


def observed(*batches: Tensor) -> Moments:
    found = Moments(torch.arange(batches[0].shape[1]))
    for batch in batches:
        found.observe_(batch.clone(), torch.ones(batch.shape[1]),
                       torch.arange(batch.shape[1]))
    return found


def matrix(values: Tensor) -> Tensor:
    """Mean products of a constant 1 and the channels."""
    values = torch.nn.functional.pad(values.double(), (1, 0), value=1)
    return values.T @ values / len(values)


def statistics(found: Moments) -> tuple[Tensor, Tensor]:
    assert found.known is not None
    return found.known.mean.double(), found.known.covariance(torch.double)


def assert_known(found: Moments, wanted: Tensor, atol: float) -> None:
    """Assert the matrix of moments that :func:`matrix` makes."""
    mean, covariance = statistics(found)
    torch.testing.assert_close(mean, wanted[0, 1:], rtol=1e-4, atol=1e-4)
    expected = wanted[1:, 1:] - torch.outer(wanted[0, 1:], wanted[0, 1:])
    scale = expected.diagonal().sqrt()
    difference = (covariance - expected) / torch.outer(scale, scale)
    assert difference.abs().max() < atol


def test_one_batch_is_known_to_the_rounding() -> None:
    batch = correlated(4000, 20)
    assert_known(observed(batch), matrix(batch), ROUNDING + 1e-5)


def test_batches_are_averaged_as_their_moments_are() -> None:
    first, second = correlated(4000, 20), correlated(4000, 20, 1) - 5
    wanted = 0.7 * matrix(first) + 0.3 * matrix(second)
    assert_known(observed(first, second), wanted, 3 * ROUNDING)


def test_averages_forget_what_they_no_longer_see() -> None:
    before, after = correlated(4000, 20), correlated(4000, 20, 1)
    # Each average keeps a part of the rounding of the one before.
    assert_known(observed(before, *[after] * 60), matrix(after), 4 * ROUNDING)


def test_factors_are_divided_out() -> None:
    batch = correlated(4000, 8)
    factors = torch.linspace(0.1, 1, 8)
    found = Moments(torch.arange(8))
    found.observe_(batch * factors, factors, torch.arange(8))
    assert_known(found, matrix(batch), ROUNDING + 1e-5)


def test_memory_is_two_bytes_for_each_pair_of_channels() -> None:
    known = observed(correlated(10, 256)).known
    assert known is not None
    size = sum(one.numel() * one.element_size() for one in known)
    assert size == 2 * 256 * 255 // 2 + 2 * 4 * 256


def test_covariances_of_equal_channels_stay_positive() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(
        1000, 3, generator=draw) @ torch.randn(
            3, 256, generator=draw)
    values *= torch.logspace(-2, 2, 256)
    _, covariance = statistics(observed(values))
    covariance.diagonal().add_(moments._RIDGE * covariance.diagonal().mean())
    assert torch.linalg.eigvalsh(covariance).min() > 0


@pytest.mark.parametrize('scale', [0., 1e-25, 1e-15])
def test_channels_that_hardly_vary_are_safe(scale: float) -> None:
    batch = correlated(100, 6)
    batch[:, 2] *= scale
    batch[:, 4] = 3
    found = observed(batch, batch)
    assert all(one.isfinite().all() for one in statistics(found))
    like = torch.zeros(1)
    for ours in ([2], [4], [0, 2]):
        others = [index for index in range(6) if index not in ours]
        coefficients, constant = found.estimate(
            torch.tensor(ours), torch.tensor(others), True, like)
        assert coefficients.isfinite().all() and constant.isfinite().all()
    _, constant = found.estimate(
        torch.tensor([4]), torch.tensor([0, 1, 3, 5]), True, like)
    assert constant.item() == pytest.approx(3, rel=1e-4)


def test_inputs_that_are_not_finite_are_left_out() -> None:
    batch = correlated(100, 6)
    bad = batch.clone()
    bad[7, 3] = torch.inf
    assert observed(bad).known is None
    for one, other in zip(
            statistics(observed(batch, bad)), statistics(observed(batch))):
        assert torch.equal(one, other)


def test_moments_and_back_is_the_same() -> None:
    known = observed(correlated(100, 6)).known
    assert known is not None
    double = Known(known.mean.double(), known.deviation.double(),
                   known.correlations)
    for one, other in zip(Known.of_moments(double.moments()), double):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('is_centred', [False, True])
def test_estimates_are_those_of_exact_moments(is_centred: bool) -> None:
    batch = correlated(4000, 64).relu()
    ours, others = torch.arange(64).split([20, 44])
    like = torch.zeros(1, dtype=torch.double)
    coefficients, constant = observed(batch).estimate(ours, others, is_centred,
                                                      like)
    exact = matrix(batch)
    mean = exact[0, 1:] * is_centred
    covariance = exact[1:, 1:] - torch.outer(mean, mean)
    inner = covariance[others[:, None], others]
    inner.diagonal().add_(moments._RIDGE * inner.diagonal().mean())
    wanted = torch.linalg.solve(inner, covariance[others[:, None], ours]).T
    offset = mean[ours] - wanted @ mean[others]
    read, told = batch.double()[:, others], batch.double()[:, ours]
    difference = read @ (coefficients - wanted).T + constant - offset
    assert difference.square().sum() < 1e-6 * (told -
                                               told.mean(0)).square().sum()
