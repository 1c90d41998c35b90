"""Openness, epsilon, the multiplier and the gate step."""
from __future__ import annotations

import math
from typing import Callable

import pytest
import torch
from torch import Tensor

from gdp_mmseg.gates.gdp import GDPGates, annealed, openness, openness_slope
from gdp_mmseg.gates.multiplier import held_cost, solve_multiplier
from gdp_mmseg.pruner.schedule import Schedule

THETAS = torch.tensor([-2., -0.3, 0., 1e-3, 0.1, 1., 3.]).double()
EPSILONS = [1., 0.1, 1e-4]

# -- openness --------------------------------------------------------------


@pytest.mark.parametrize('epsilon', EPSILONS)
def test_openness_is_the_closed_form(epsilon: float) -> None:
    expected = [(1 + epsilon) * t * t / (t * t + epsilon)
                for t in THETAS.tolist()]
    assert openness(THETAS, epsilon).tolist() == pytest.approx(expected)
    assert openness(torch.tensor(math.sqrt(epsilon)),
                    epsilon).item() == pytest.approx((1 + epsilon) / 2)


@pytest.mark.parametrize('epsilon', EPSILONS)
def test_openness_is_zero_only_at_zero_and_one_at_one(epsilon: float) -> None:
    values = openness(THETAS, epsilon)
    assert torch.equal(values == 0, THETAS == 0)
    assert values.min() >= 0
    assert openness(torch.ones(1), epsilon).item() == 1
    assert (values[THETAS.abs() < 1] < 1).all()


@pytest.mark.parametrize('epsilon', EPSILONS)
def test_slope_is_the_derivative_of_openness(epsilon: float) -> None:
    theta = THETAS.clone().requires_grad_()
    derivative, = torch.autograd.grad(openness(theta, epsilon).sum(), theta)
    torch.testing.assert_close(openness_slope(THETAS, epsilon), derivative)
    assert openness_slope(torch.zeros(1), epsilon).item() == 0


# -- epsilon --------------------------------------------------------------

PHASES = [(0.1, 0.5, 0.4), (0., 1., 0.), (0.2, 0.8, 0.), (0., 0.3, 0.7)]
GRID = [step / 100 for step in range(101)]


@pytest.mark.parametrize('phases', PHASES)
def test_epsilon_falls_geometrically_from_start_to_end(
        phases: tuple[float, float, float]) -> None:
    schedule = Schedule(phases)

    def epsilon_at(progress: float) -> float:
        return annealed((0.1, 1e-3), schedule.pruned_share(progress))

    values = [epsilon_at(progress) for progress in GRID]
    warmup, pruning, _ = phases
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(1e-3)
    assert epsilon_at(warmup + pruning / 2) == pytest.approx(
        math.sqrt(0.1 * 1e-3))
    assert all(one >= other for one, other in zip(values, values[1:]))


@pytest.mark.parametrize('epsilon', [(0.1, ), (0.1, 0.), (1e-3, 0.1)])
def test_epsilon_is_refused_by_name(epsilon: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match='epsilon: expected .* but got'):
        GDPGates(2, epsilon=epsilon)  # type: ignore[arg-type]


# -- multiplier ------------------------------------------------------------


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
@pytest.mark.parametrize('budget', [0.9, 0.5, 0.1])
def test_multiplier_solves_an_analytic_cost(budget: float, scale: float,
                                            signed: bool) -> None:

    def spent(multiplier: Tensor) -> Tensor:
        return 1 / (1 + multiplier / scale)

    wanted = scale * (1 / budget - 1)
    for guess, halvings, precision in ((0., 15, 2**-9), (0., 10, 0.1),
                                       (0., 7, 0.5), (wanted * 1.1, 10, 0.003),
                                       (wanted / 1.1, 10, 0.003),
                                       (wanted * 1.1, 7, 0.03), (wanted / 1.1,
                                                                 7, 0.03)):
        found = solve_multiplier(spent, budget, torch.tensor(scale), guess,
                                 signed, halvings)
        assert found.item() == pytest.approx(wanted, rel=precision)
        assert spent(found) <= budget


@pytest.mark.parametrize('guess', [0., -2.2, 1.8])
def test_signed_multiplier_uses_the_budget_up(guess: float) -> None:
    found = solve_multiplier(
        lambda multiplier: -multiplier,
        2.,
        torch.tensor(1.),
        guess,
        signed=True)
    assert -2 <= found.item() <= -2 * (1 - 0.003)


@pytest.mark.parametrize('least', [1e-12, 1e-8, 1e-4, 1e-3, 0.9, 1., 3e3, 3e7])
def test_multiplier_is_found_over_many_magnitudes(least: float) -> None:

    def spent(multiplier: Tensor) -> Tensor:
        return (multiplier < least).double()

    found = solve_multiplier(spent, 0.5, torch.tensor(1.))
    if least < 1e6:  # That is far above any that is needed.
        assert least <= found.item() <= max(least * 1.01, 1.01e-9)
    assert found.isfinite()


@pytest.mark.parametrize('large', [1., 1e3, 1e6])
def test_a_large_gain_makes_no_other_gates_close_too_early(
        large: float) -> None:
    """The scale of the search is a sum, which one gain may outweigh."""
    gains = torch.linspace(0.5, 1., 100).index_fill(0, torch.tensor(99), large)
    gates, cost = GDPGates(100), Linear(torch.ones(100))
    for step in range(10):
        gates.theta.grad, = torch.autograd.grad(
            -(gates.openness() * gains).sum(), gates.theta)
        gates.observe_()
        gates.step_(cost, 1 - 0.05 * step, lr=0.8)
    assert float(cost(gates.openness().sign())) > 0.5


def test_multiplier_is_zero_when_the_budget_holds_of_itself() -> None:
    found = solve_multiplier(lambda x: torch.tensor(0.5), 0.5,
                             torch.tensor(1.))
    assert found == 0


@pytest.mark.parametrize('scale', [1., 0.])
def test_multiplier_is_finite_when_none_can_hold_the_budget(
        scale: float) -> None:
    found = solve_multiplier(lambda x: torch.tensor(1.), 0.5,
                             torch.tensor(scale))
    assert found.isfinite() and found > 1e3


# -- step ------------------------------------------------------------------


class Linear:
    """A cost that adds up prices ``(G,)``."""

    def __init__(self, prices: Tensor) -> None:
        self.prices = prices / prices.sum()

    def __call__(self, openness: Tensor) -> Tensor:
        return openness @ self.prices

    def price(self, openness: Tensor) -> Tensor:
        return self.prices


@pytest.mark.parametrize('whole, expected', [(0., 0.35), (0.5, 0.675),
                                             (1., 1.)])
def test_half_open_gates_are_held_partly_as_whole_channels(
        whole: float, expected: float) -> None:
    cost = Linear(torch.tensor([0.5, 0.5]))
    held = held_cost(cost, torch.tensor([0.2, 0.5]), whole)
    assert held.item() == pytest.approx(expected)


def step(gates: GDPGates, gains: Tensor, cost: Linear, budget: float,
         lr: float) -> None:
    """One step for a task whose loss falls by ``gains`` per openness."""
    loss = -(gates.openness() * gains).sum()
    gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
    gates.observe_()
    gates.step_(cost, budget, lr)


def random_gains(number: int, index: int) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(index))


def test_zero_absorbs_whatever_opening_would_gain() -> None:
    gates = GDPGates(3)
    gates.close_(torch.tensor([True, False, False]))
    for _ in range(50):
        step(gates, torch.tensor([100., 1., 1.]), Linear(torch.ones(3)), 1.,
             0.1)
    assert gates.theta.tolist()[0] == 0
    assert (gates.theta[1:] > 0).all()


def test_a_gate_that_was_wanted_stays_closed() -> None:
    gates = GDPGates(2)
    for _ in range(20):
        step(gates, torch.tensor([100., 1.]), Linear(torch.ones(2)), 1., 0.01)
    gates.close_(torch.tensor([True, False]))
    for _ in range(20):
        # The running mean of its gain still asks to open it.
        step(gates, torch.zeros(2), Linear(torch.ones(2)), 1., 0.1)
        assert gates.theta[0] == 0


def test_closed_gates_only_become_more() -> None:
    gates = GDPGates(32)
    closed = torch.zeros(32, dtype=torch.bool)
    for index in range(80):
        step(gates, random_gains(32, index), Linear(torch.rand(32) + 0.1),
             max(0.9 - index / 80, 0.2), 0.1)
        assert (gates.theta[closed] == 0).all()
        closed |= gates.theta == 0
    assert 0 < int(closed.sum()) < 32


@pytest.mark.parametrize('close_below', [1e-3, 1e-2, 0.1])
def test_gate_below_the_threshold_is_closed(close_below: float) -> None:
    gates = GDPGates(8, close_below=close_below)
    for index in range(60):
        step(gates, torch.linspace(0.1, 1, 8), Linear(torch.ones(8)),
             max(0.9 - index / 50, 0.5), 0.05)
        values = gates.openness()
        assert ((values == 0) | (values >= close_below)).all()
    assert (values == 0).any()


def test_strongest_are_the_open_gates_of_most_gain_in_each_group() -> None:
    gates = GDPGates(6)
    gates.gain_square.copy_(torch.tensor([3., 1., 2., 9., 4., 5.]))
    gates.close_(torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.bool))
    chosen = gates.strongest(
        torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([2, 3]))
    assert chosen.tolist() == [True, True, False, False, True, True]


def test_protected_gates_do_not_close_whatever_they_cost() -> None:
    gates = GDPGates(4)
    protected = torch.tensor([True, False, False, False])
    for _ in range(60):
        loss = -gates.openness()[1]
        gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
        gates.observe_()
        gates.step_(
            Linear(torch.tensor([5., 1., 1., 1.])),
            0.,
            0.05,
            protected=protected)
    assert (gates.theta > 0).tolist() == protected.tolist()


@pytest.mark.parametrize('budget', [1., 0.5, 0.])
def test_steady_gain_moves_a_gate_little_more_than_lr(budget: float) -> None:
    gates, lr = GDPGates(16), 0.01
    gains = random_gains(16, 0)
    for _ in range(60):
        before = gates.theta.detach().clone()
        step(gates, gains, Linear(torch.rand(16) + 0.1), budget, lr)
        way = (gates.theta - before).abs()[gates.theta > 0]
        # Gain, 1.3 of the mean, against price; the rest is rounding.
        assert len(way) == 0 or way.max() <= 1.3 * lr * (1 + 1e-3)


@pytest.mark.parametrize('quiet', [0, 30])
def test_no_step_is_longer_than_its_running_means_allow(quiet: int) -> None:
    lr, betas = 0.01, (0.9, 0.99)
    gates = GDPGates(16, betas=betas)
    for index in range(quiet + 40):
        before = gates.theta.detach().clone()
        gains = random_gains(16, index) * (1e-6 if index < quiet else 1.)
        step(gates, gains, Linear(torch.ones(16)), 0., lr)
        # Cauchy-Schwarz between the weights of the two running means.
        powers = torch.arange(index + 1).double()
        mean, square = ((1 - beta) * beta**powers / (1 - beta**(index + 1))
                        for beta in betas)
        bound = lr * float((1 + (mean**2 / square).sum()).sqrt())
        way = (gates.theta - before).abs()[gates.theta > 0]
        assert len(way) == 0 or way.max() <= bound * (1 + 1e-3)


def trajectory(scale: float, cost_scale: float = 1.) -> Tensor:
    gates = GDPGates(24)
    prices = torch.linspace(0.5, 2, 24)
    cost = Linear(prices)
    cost.prices = cost.prices * cost_scale
    for index in range(40):
        step(gates, scale * random_gains(24, index), cost,
             cost_scale * max(0.9 - index / 50, 0.4), 0.05)
    return gates.theta.detach()


def test_scale_of_the_loss_does_not_matter() -> None:
    # A power of two scales exactly, in every operation.
    assert torch.equal(trajectory(1024.), trajectory(1.))
    torch.testing.assert_close(
        trajectory(1000.), trajectory(1.), atol=1e-3, rtol=0)
    assert (trajectory(1.) == 0).any() and (trajectory(1.) > 0).any()


def test_scale_of_the_cost_does_not_matter() -> None:
    assert torch.equal(trajectory(1., 2.**-10), trajectory(1.))


SCALES = (1e-3, 1., 1e3)
# Eight channels: the best subset for a budget is known by brute force.
GAINS = torch.tensor([8., 1., 6., 2., 0.5, 5., 3., 0.2])
KNAPSACKS = {
    'equal prices': torch.ones(8),
    'unequal prices': torch.tensor([4., 1., 2., 4., 1., 1., 4., 1.]),
}


def budget_for(prices: Tensor, number: int) -> float:
    """What the ``number`` best gains per price cost, and a little more.

    There the best subset is one that a multiplier can tell from the rest.
    """
    best = (GAINS / prices).argsort(descending=True)[:number]
    return float((prices[best].sum() + 0.1) / prices.sum())


def best_subset(prices: Tensor, budget: float) -> Tensor:
    """Largest gain within the budget, by trying all."""
    sets = torch.tensor([[index >> bit & 1 for bit in range(8)]
                         for index in range(256)]).float()
    allowed = sets @ (prices / prices.sum()) <= budget + 1e-6
    return sets[(sets @ GAINS).masked_fill(~allowed, -1).argmax()].bool()


# Each two of the values meet.
@pytest.mark.parametrize('name, number, scale',
                         [([*KNAPSACKS][(row + column) % 2], number, scale)
                          for row, number in enumerate((5, 4, 2))
                          for column, scale in enumerate(SCALES)])
def test_step_finds_the_best_channels_for_a_budget(name: str, number: int,
                                                   scale: float) -> None:
    prices = KNAPSACKS[name]
    budget = budget_for(prices, number)
    assert int(best_subset(prices, budget).sum()) == number
    gates, cost = GDPGates(8), Linear(prices)
    schedule = Schedule((0., 0.8, 0.2))
    steps = 300
    for index in range(steps):
        gates.epsilon.fill_(
            annealed((0.1, 1e-4), schedule.pruned_share(index / steps)))
        step(gates, scale * GAINS, cost,
             schedule.budget_at(index / steps, budget), 8. / steps)
    open_ = gates.openness() > 0
    assert float(cost(open_.float())) <= budget + 1e-6
    assert torch.equal(open_, best_subset(prices, budget))


# Gain per price of gate i is 2^RANKS[i], so the best n cost a known budget.
RANKS = torch.randperm(16, generator=torch.Generator().manual_seed(0))
PRICES = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
BEST = RANKS.argsort(descending=True)
Gains = Callable[[Tensor, Tensor, int], Tensor]


def open_after_pruning(gains_at: Gains,
                       number: int,
                       loss_scale: float = 1.,
                       cost_scale: float = 1.) -> list[bool]:
    """Which gates live, from the best gain per price to the worst.

    Args:
        gains_at (Gains): Gains at full gains, openness and iteration.
        number (int): The budget is enough for so many of the best and a
            half.
        loss_scale (float): Unit of the loss.
        cost_scale (float): Unit of the cost.
    """
    gates, cost = GDPGates(16), Linear(PRICES)
    enough = PRICES[BEST[:number]].sum() + PRICES[BEST[number]] / 2
    budget = float(enough / PRICES.sum())
    cost.prices = cost_scale * cost.prices
    schedule = Schedule((0., 1., 0.))
    steps = 160
    for index in range(steps):
        gates.epsilon.fill_(
            annealed((0.1, 1e-4), schedule.pruned_share(index / steps)))
        gains = gains_at(2.**RANKS * PRICES, gates.openness().detach(), index)
        step(gates, loss_scale * gains, cost,
             cost_scale * schedule.budget_at(index / steps, budget),
             8. / steps)
    return (gates.openness() > 0)[BEST].tolist()


# Each two of the values meet.
@pytest.mark.parametrize('number, loss_scale, cost_scale',
                         [(number, scale, SCALES[(row + column) % 3])
                          for row, number in enumerate((1, 3, 8, 13, 15))
                          for column, scale in enumerate(SCALES)])
def test_exactly_the_least_gains_per_price_close(number: int,
                                                 loss_scale: float,
                                                 cost_scale: float) -> None:
    living = open_after_pruning(lambda gains, openness, index: gains, number,
                                loss_scale, cost_scale)
    assert living == [True] * number + [False] * (16 - number)


@pytest.mark.parametrize('number', [3, 8, 13])
def test_noise_as_large_as_the_gain_moves_the_border_by_one(
        number: int) -> None:
    living = open_after_pruning(
        lambda gains, openness, index: gains *
        (1 + random_gains(len(gains), index)), number)
    assert all(living[:number - 1]) and not any(living[number + 1:])


@pytest.mark.parametrize('number', [3, 8, 13])
def test_gains_that_grow_as_a_gate_closes_keep_the_order(number: int) -> None:
    """The loss sum a (1 - g)^2 / 2, whose best gates are half-open ones."""
    living = open_after_pruning(
        lambda gains, openness, index: gains * (1 - openness), number)
    assert living == sorted(living, reverse=True)
    assert number <= sum(living) < 16


def test_open_budget_closes_no_gate_that_gains() -> None:
    gates = GDPGates(8)
    for _ in range(100):
        step(gates, GAINS, Linear(torch.ones(8)), 1., 0.1)
    assert gates.multiplier == 0
    assert (gates.theta == 1).all()


def test_only_the_price_closes_a_gate() -> None:
    gates = GDPGates(4)
    for _ in range(100):
        # The task would rather have them closed, the budget does not ask.
        step(gates, -torch.ones(4), Linear(torch.ones(4)), 1., 0.1)
    assert (gates.theta == 1).all()


def test_step_without_any_gradient_ends() -> None:
    """All gains zero: nothing tells the gates apart, but the step returns."""
    gates, calls = GDPGates(4), []

    class Counting(Linear):

        def __call__(self, openness: Tensor) -> Tensor:
            calls.append(None)
            if len(calls) > 1000:
                pytest.fail('the step does not end')
            return super().__call__(openness)

    step(gates, torch.zeros(4), Counting(torch.ones(4)), 0.5, 0.1)
    assert gates.theta.isfinite().all()


def test_step_without_a_backward_pass_says_so() -> None:
    with pytest.raises(RuntimeError, match='theta.grad is None'):
        GDPGates(2).observe_()


def test_gates_that_are_loaded_keep_their_openness() -> None:
    gates, polarised = (GDPGates(2, epsilon=(0.1, 1e-3)) for _ in range(2))
    gates.anneal_(0.5)
    polarised.anneal_(1.)
    polarised.theta.data[0] = 0.01
    gates.load_state_dict(polarised.state_dict())
    gates.anneal_(0.6)
    assert float(gates.epsilon) == pytest.approx(0.1 * 0.01**0.6)
    torch.testing.assert_close(gates.openness(), polarised.openness())


def test_epsilon_that_rises_leaves_openness_as_it_is() -> None:
    """A training that begins from gates that another has polarised."""
    gates = GDPGates(4, epsilon=(0.1, 0.01))
    gates.epsilon.fill_(1e-4)
    gates.theta.data.copy_(torch.tensor([1., 0.3, 0.02, 0.]))
    gates.close_(torch.tensor([False, False, False, True]))
    before = gates.openness()
    gates.begin_(0.)
    assert torch.allclose(gates.openness(), before, atol=1e-6)
    assert gates.theta[0].item() == pytest.approx(1)
    # And as it falls, theta stays.
    theta = gates.theta.detach().clone()
    gates.anneal_(1.)
    assert torch.equal(gates.theta, theta)
    assert float(gates.epsilon) == pytest.approx(0.01)


def test_gates_closed_in_one_model_are_closed_in_an_average() -> None:
    pytest.importorskip('mmengine')
    from mmengine.model import ExponentialMovingAverage
    gates = GDPGates(2)
    average = ExponentialMovingAverage(gates, update_buffers=True)
    average.update_parameters(gates)
    gates.close_(torch.tensor([True, False]))
    average.update_parameters(gates)
    assert float(average.module.theta[0]) > 0.9
    assert average.module.openness()[0] == 0
    assert average.module.openness()[1] > 0.9


def test_checkpoint_continues_the_step_exactly() -> None:
    cost = Linear(torch.linspace(1, 2, 8))
    first, second = GDPGates(8), GDPGates(8)
    for index in range(10):
        step(first, random_gains(8, index), cost, 0.7, 0.05)
    second.load_state_dict(first.state_dict(), strict=True)
    for index in range(10, 20):
        step(first, random_gains(8, index), cost, 0.5, 0.05)
        step(second, random_gains(8, index), cost, 0.5, 0.05)
    assert torch.equal(first.theta, second.theta)
