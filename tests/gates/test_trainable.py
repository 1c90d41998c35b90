"""Trainable gate: step, gradient shapes, moves, votes and the last trim."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.cost.counts import FlopCost
from gdp_mmseg.gated import gate
from gdp_mmseg.gates.blocks import Blocks
from gdp_mmseg.gates.trainable import SHAPES, TrainableGates, step
from gdp_mmseg.pruner.schedule import Schedule
from gdp_mmseg.pruner.settings import Gate, Settings
from gdp_mmseg.surgery.prune import prune

from helpers.toys import block, conv, last, run

# -- the gate --------------------------------------------------------------


def sawtooth_gate(w: Tensor, times: float, shape: str) -> Tensor:
    """The paper's formula: b(w) + s(w) g(w), s = (M w - floor(M w)) / M."""
    saw = (times * w - (times * w).floor()) / times
    return (w > 0).to(w) + saw * SHAPES[shape](w)


# w, M; value and derivative for g = 1, sigma and sech^2.
TABLE = [
    (.25, 10., (1.05, 1.), (1.02810883, .57448321), (1.04700074, .91699213)),
    (-.25, 10., (.05, 1.), (.02189117, .45013020), (.04700074, .96303757)),
    (.07, 10., (1.07, 1.), (1.03622450, .53497144), (1.06965812, .98537972)),
    (.8, 4., (1.05, 1.), (1.03449872, .70066997), (1.02795276, .52193185)),
    (.123456, 1e5, (1.000006, 1.), (1.00000318, .53082635), (1.00000591,
                                                             .98491070)),
]


@pytest.mark.parametrize('w, times, constant, sigmoid, sech', TABLE)
def test_the_papers_formula_has_the_step_for_its_limit(
        w: float, times: float, constant: tuple[float, float],
        sigmoid: tuple[float, float], sech: tuple[float, float]) -> None:
    wanted = dict(constant=constant, sigmoid=sigmoid, sech=sech)
    for shape, (value, slope) in wanted.items():
        for sharpness in (times, 1e9):
            at = torch.tensor(w, dtype=torch.double, requires_grad=True)
            found = sawtooth_gate(at, sharpness, shape)
            derivative, = torch.autograd.grad(found, at)
            if sharpness == times:
                assert found.item() == pytest.approx(value, abs=1e-8)
                assert derivative.item() == pytest.approx(slope, abs=1e-8)
        # Forward the step, backward the shape.
        limit = step(at, shape)
        assert limit.item() == pytest.approx(found.item(), abs=1e-8)
        slope_of_limit, = torch.autograd.grad(limit, at)
        assert slope_of_limit.item() == pytest.approx(
            derivative.item(), abs=1e-8)


@pytest.mark.parametrize(
    'dtype', [torch.float, torch.half, torch.bfloat16, torch.double])
def test_values_and_gradients_in_each_precision(dtype: torch.dtype) -> None:
    values = torch.tensor([-100., -.25, 0., .25, 100.]).to(dtype)
    slopes = dict(
        constant=[1.] * 5,
        sigmoid=[0., .43782350, .5, .56217650, 1.],
        sech=[0., .94001485, 1., .94001485, 0.])
    for shape, wanted in slopes.items():
        w = values.clone().requires_grad_()
        opened = step(w, shape)
        assert opened.dtype == dtype
        assert opened.tolist() == [0., 0., 0., 1., 1.]
        opened.backward(torch.full_like(opened, 2.))
        assert w.grad is not None
        assert w.grad.tolist() == pytest.approx(
            [2 * one for one in wanted],
            abs=max(20 * torch.finfo(dtype).eps, 1e-7))


def test_no_shape_is_zero_where_gates_lie() -> None:
    for shape in SHAPES.values():
        assert shape(torch.linspace(-1, 1, 21)).min() > 0.2


def test_compiled_gates_are_the_plain_ones() -> None:
    gates = TrainableGates(4, shape='sech')
    gates.theta.data.copy_(torch.tensor([-.25, .25, 0., 1.]))

    @torch.compile(backend='eager', fullgraph=True)
    def compiled() -> Tensor:
        return (gates.openness() * torch.arange(4.)).sum()

    torch._dynamo.reset()
    value = compiled()
    value.backward()
    torch._dynamo.reset()
    assert value == 4.
    assert gates.gradient().tolist() == pytest.approx(
        [0., .94001485, 2., 3 * .41997434])


# -- the cost --------------------------------------------------------------


def two_layers() -> tuple[nn.Module, Analysis]:
    """1x1 convolutions 3 -> 2 -> 4 at 5 x 5: FLOPs 25 (3 s + 4 s)."""
    net = nn.Sequential(conv(3, 2, 1), conv(2, 4, 1))
    return net, analyse(net, (3, 5, 5), run)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('w, slope, slope_of_square', [(0.5, .5, .75),
                                                       (-.5, -.5, -.25)])
def test_flops_of_two_layers_and_their_gradients(
        shape: str, w: float, slope: float, slope_of_square: float) -> None:
    _, analysis = two_layers()
    cost = FlopCost(analysis)
    assert cost.dense == 25 * (3 * 2 + 4 * 2)
    gates = TrainableGates(2, shape)
    gates.theta.data.fill_(w)
    assert cost.price(gates.openness()).tolist() == [.5, .5]
    at_w = float(SHAPES[shape](torch.tensor(w)))
    for power, wanted in ((1, slope), (2, slope_of_square)):
        missed = (cost(gates.openness()) - .25).abs()**power
        found, = torch.autograd.grad(missed, gates.theta)
        assert found.tolist() == pytest.approx([wanted * at_w] * 2)


# -- the step --------------------------------------------------------------


class Linear:
    """A cost that adds up prices ``(G,)``."""

    def __init__(self, prices: list[float] | Tensor) -> None:
        self.prices = torch.as_tensor(prices)

    def __call__(self, openness: Tensor) -> Tensor:
        return self.prices.to(openness) @ openness

    def price(self, openness: Tensor) -> Tensor:
        return self.prices.to(openness)


def move(gates: TrainableGates, gains: Tensor, cost: Linear, budget: float,
         lr: float) -> None:
    """One step for a task whose loss falls by ``gains`` per openness."""
    loss = -(gates.openness() * gains).sum()
    gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
    assert gates.observe_()
    gates.step_(cost, budget, lr)


def test_the_step_is_the_closed_form() -> None:
    # F is above the budget, so that the multiplier is the penalty.
    gates = TrainableGates(2, penalty=1.).double()
    gates.theta.grad = torch.tensor([-.2, -.2]).double()
    gates.observe_()
    gates.step_(Linear([.5, 0.]), 0., lr=.1)
    assert gates.theta[0].item() == pytest.approx(1 - .0428571, abs=1e-7)
    # Without a price, it rises to 1 at most.
    assert gates.theta[1] == 1
    gates.theta.data[1] = -.5
    gates.theta.grad = torch.tensor([-.2, -.1]).double()
    gates.observe_()
    mean, square = gates.mean_gains()
    gates.step_(Linear([.5, 0.]), 0., lr=.1)
    assert gates.theta[1].item() == pytest.approx(
        -.5 - .1 * float(mean[1] / square[1].sqrt()))


@pytest.mark.parametrize('shape', SHAPES)
def test_no_gate_moves_further_than_lr(shape: str) -> None:
    gates, lr = TrainableGates(32, shape), 0.03
    generator = torch.Generator().manual_seed(0)
    for index in range(90):
        before = gates.theta.detach().clone()
        move(gates,
             torch.randn(32, generator=generator) * 10**(index % 3),
             Linear(torch.rand(32, generator=generator) / 16), 1 - index / 200,
             lr)
        way = (gates.theta - before).abs()
        assert float(way.detach().max()) <= lr * (1 + 1e-5)
        assert float(gates.theta.detach().abs().max()) <= 1


def test_a_closed_gate_reopens_if_its_gradient_says_so() -> None:
    gates = TrainableGates(2)
    gates.theta.data[1] = -1
    for _ in range(50):
        move(gates, torch.tensor([1., 1.]), Linear([.5, .5]), 1., .05)
    assert gates.openness().tolist() == [1, 1]
    assert not gates.is_closed().any()


def test_a_gate_that_is_closed_for_good_does_not() -> None:
    gates = TrainableGates(2)
    gates.close_(torch.tensor([False, True]))
    for _ in range(50):
        move(gates, torch.tensor([1., 9.]), Linear([.5, .5]), 1., .05)
    assert gates.openness().tolist() == [1, 0] and gates.theta[1] == 0


def test_noise_closes_no_more_than_the_budget_asks_for() -> None:
    gates, cost = TrainableGates(64), Linear(torch.full((64, ), 1 / 64))
    generator = torch.Generator().manual_seed(0)
    for index in range(120):
        budget = max(1 - index / 120, .5)
        move(gates, torch.randn(64, generator=generator), cost, budget, .1)
        left = float(cost(gates.openness()).detach())
        if index > 30:  # All had to travel from 1 to 0 first.
            assert abs(left - budget) < 1.1 / 64


def trained(prices: Tensor,
            gains: Tensor,
            budget: float,
            steps: int = 400,
            noise: float = 0.,
            penalty: float | None = None,
            shape: str = 'constant') -> TrainableGates:
    """Gates at the end of a pruning phase, not settled."""
    gates, cost = TrainableGates(len(gains), shape, penalty), Linear(prices)
    schedule = Schedule((0., 1., 0.))
    generator = torch.Generator().manual_seed(1)
    for index in range(steps):
        share = schedule.pruned_share(index / steps)
        gates.anneal_(share)
        gain = gains + noise * torch.randn(len(gains), generator=generator)
        move(gates, gain, cost,
             schedule.budget_at(share, budget) if gates.gradual else budget,
             8. / steps)
    return gates


@pytest.mark.parametrize('number, shape', [(1, 'constant'), (8, 'constant'),
                                           (15, 'constant'), (8, 'sech'),
                                           (8, 'sigmoid')])
def test_exactly_the_least_gains_per_price_close(number: int,
                                                 shape: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(16, generator=generator)
    prices = torch.rand(16, generator=generator) + .5
    prices /= prices.sum()
    best = ranks.argsort(descending=True)
    budget = float(prices[best[:number]].sum() + prices[best[number]] / 2)
    gates = trained(prices, 2.**ranks * prices, budget, 160, shape=shape)
    wanted = [1.] * number + [0.] * (16 - number)
    assert gates.openness()[best].tolist() == wanted


@pytest.mark.parametrize('share, hit', [(.2, False), (1.5, True)])
def test_a_penalty_below_the_marginal_worth_misses_its_target(
        share: float, hit: bool) -> None:
    """The marginal worth of a gate is 0.4, by a price of 1 / 500."""
    worth = torch.rand(500, generator=torch.Generator().manual_seed(0))
    prices = torch.full((500, ), 1 / 500)
    gates = trained(prices, worth, .6, 500, noise=.1, penalty=share * .4 * 500)
    found = float(Linear(prices)(gates.decided()))
    assert (abs(found - .6) < .01) == hit
    assert hit or found > .65
    before = gates.openness().detach()
    gates.settle_(Linear(prices), .6)
    # What comes out is not trimmed, but for what flips at the end.
    after = gates.openness().detach()
    assert float((after - before).abs().mean()) < .01


# -- the end of the pruning phase ------------------------------------------


def voted(votes: list[float], w: list[float],
          **options: float) -> TrainableGates:
    gates = TrainableGates(len(w), **options)  # type: ignore[arg-type]
    gates.theta.data.copy_(torch.tensor(w))
    gates.votes.copy_(torch.tensor(votes))
    gates.ballots.fill_(10.)
    return gates


def settled(gates: TrainableGates, budget: float,
            **options: Tensor) -> list[float]:
    number = len(gates.theta)
    gates.settle_(Linear([1 / number] * number), budget,
                  **options)  # type: ignore
    opened = gates.openness().tolist()
    assert gates.is_settled()
    assert gates.is_closed().tolist() == [one == 0 for one in opened]
    assert gates.theta.tolist() == opened
    return opened


@pytest.mark.parametrize('budget, opened', [
    (.5, [1., 0., 1., 0.]),
    (.3, [1., 0., 0., 0.]),
    (.75, [1., 1., 1., 0.]),
    (.1, [0., 0., 0., 0.]),
    (1., [1., 1., 1., 1.]),
])
def test_votes_decide_then_w_then_the_budget(budget: float,
                                             opened: list[float]) -> None:
    gates = voted([10., 4., 5., 0.], [.5, .1, -.01, -.5])
    assert settled(gates, budget) == opened


def test_a_fixed_penalty_leaves_the_vote_as_it_is() -> None:
    gates = voted([10., 4., 5., 0.], [.5, .1, -.01, -.5], penalty=1.)
    assert settled(gates, .1) == [1, 0, 1, 0]


def test_protected_gates_stay_open_if_they_are() -> None:
    gates = voted([10., 0., 5., 0.], [.5, .1, -.01, -.5])
    protected = torch.tensor([False, True, False, True])
    assert settled(gates, .5, protected=protected) == [1, 1, 0, 0]


def test_gates_without_a_vote_stay_as_they_are() -> None:
    gates = voted([0.] * 4, [.5, .1, -.01, -.5])
    gates.ballots.zero_()
    assert settled(gates, .5) == [1, 1, 0, 0]


def test_votes_are_those_of_the_last_twentieth_of_the_phase() -> None:
    prices = torch.full((20, ), 1 / 20)
    gates = trained(prices, torch.arange(20.), .5, 200)
    assert gates.ballots == 10
    assert gates.votes.tolist() == [0.] * 10 + [10.] * 10


def test_whole_blocks_open_and_close() -> None:
    net = nn.Sequential(*block(3, 16), *block(16, 12, kernel=1), last(12))
    analysis = analyse(net, (3, 8, 8), run)
    cost, blocks = FlopCost(analysis), Blocks(analysis, 4)
    gates = TrainableGates(28)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for index in range(100):
        loss = -(gates.openness() * torch.rand(28, generator=generator)).sum()
        gates.theta.grad, = torch.autograd.grad(loss, gates.theta)
        gates.observe_()
        budget = max(1 - index / 100, .4)
        gates.step_(cost, budget, .1, blocks=blocks)
        numbers = blocks.count(gates.openness() > 0)
        assert (numbers % 4 == 0).all()
        seen.add(tuple(numbers.tolist()))
    assert float(cost(gates.openness()).detach()) <= .4 and len(seen) > 2
    gates.settle_(cost, .4, blocks=blocks)
    assert (blocks.count(gates.openness() > 0) % 4 == 0).all()


def test_cost_before_the_last_step_is_that_of_the_pruned_network() -> None:
    """To the multiply-add, for the cost counts whole channels."""
    net, analysis = two_layers()
    gates = TrainableGates(2)
    gates.theta.data[1] = -.5
    pruned, _ = prune(net, analysis, gates.decided())
    count = sum(25 * layer.weight.numel() for layer in pruned)
    assert FlopCost(analysis).count(gates.openness()) == count == 25 * 7


# -- copies and settings ---------------------------------------------------


@pytest.mark.parametrize('update_buffers', [False, True])
def test_gates_settled_in_one_model_are_settled_in_an_average(
        update_buffers: bool) -> None:
    pytest.importorskip('mmengine')
    from mmengine.model import ExponentialMovingAverage
    gates = TrainableGates(3)
    average = ExponentialMovingAverage(gates, update_buffers=update_buffers)
    gates.theta.data.copy_(torch.tensor([-1., -1., 1.]))
    for _ in range(20000):
        if float(average.module.theta[0]) < -.5:
            break
        average.update_parameters(gates)
        average.momentum = .01
    assert average.module.openness().tolist() == [0, 0, 1]
    gates.theta.data[0] = 1.
    gates.settle_(Linear([1 / 3] * 3), .7)
    average.update_parameters(gates)
    assert float(average.module.theta[0]) < 0
    for name in ('openness', 'decided'):
        assert getattr(average.module, name)().tolist() == [1, 0, 1]
    axis = average.module.lookup.add(torch.arange(2))
    assert average.module.slot_factors(axis).tolist()[0] == 1
    # Another training that begins with the average, as it is.
    average.module.begin_(0.)
    assert average.module.openness().tolist() == [1, 0, 1]
    assert not average.module.is_settled()


def test_a_new_training_moves_settled_gates() -> None:
    gates = voted([10., 10., 0., 0.], [.5, .1, -.01, -.5])
    assert settled(gates, .5) == [1, 1, 0, 0]
    gates.begin_(.5)
    assert gates.is_settled()
    gates.begin_(0.)
    assert not gates.is_settled()
    for _ in range(50):
        move(gates, torch.tensor([1., 2., 3., 3.]), Linear([.25] * 4), .25,
             .05)
    assert gates.openness().tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize('options, message', [
    (dict(shape='sec'), "gate.shape: .*'sech'.*got 'sec'; did you mean"),
    (dict(shape=1), 'gate.shape: expected one of .* but got 1'),
    (dict(penalty=0), 'gate.penalty: expected a number above 0.* got 0'),
    (dict(penalty=math.inf), 'gate.penalty: .* got inf'),
    (dict(penalty='1'), "gate.penalty: .* got '1'"),
    (dict(penalty=True), 'gate.penalty: .* got True'),
    (dict(epsilon=1), "gdp.gate: .*'shape', 'penalty'.*got 'epsilon'"),
])
def test_wrong_options_are_refused(options: dict[str, object],
                                   message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate('trainable', options)


def test_settings_of_gdp_are_refused() -> None:
    with pytest.raises(ValueError, match="gdp.epsilon: .*gate='gdp' only"):
        Settings.from_config(
            dict(target=.5, gate='trainable', epsilon=(.1, .01)))


def test_a_fixed_penalty_is_noted() -> None:
    assert not TrainableGates(2).notes()
    assert 'gate.penalty=3 ' in TrainableGates(2, penalty=3.).notes()[0]


def test_closed_gates_behind_a_norm_and_a_relu_get_a_gradient() -> None:
    """They could not come back without one."""
    torch.manual_seed(0)
    gated = gate(
        nn.Sequential(block(3, 8), last(8)), (3, 8, 8),
        0.5,
        num_steps=100,
        gate='trainable').train()
    gates = gated.pruner.gates
    with torch.no_grad():
        gates.theta[::2] = -0.1
    assert gates.openness().sum() == len(gates.theta) / 2
    gated(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert (gates.gradient() != 0).all()
