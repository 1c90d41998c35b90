"""SCP gates: masks, gradients of the norms, threshold, push and settling."""
from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg import gate
from gdp_mmseg.analysis.analyse import analyse
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.gates.blocks import Blocks
from gdp_mmseg.gates.layers import gate_
from gdp_mmseg.gates.masks import drop_probability
from gdp_mmseg.gates.scp import SCPGates
from gdp_mmseg.pruner.settings import Gate

from helpers.toys import SHAPE, TOYS, Net, block, branch, conv, last, run

OPTIONS: dict[str, Any] = dict(tau=0.05, k=20., T=0.5, s=2.)


class Mean:
    """Cost of channels that cost the same."""

    def __call__(self, openness: Tensor) -> Tensor:
        return openness.double().mean()

    def price(self, openness: Tensor) -> Tensor:
        return torch.full_like(openness, 1 / len(openness))


def chain(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*block(3, width), last(width))


def gates_on(net: nn.Module,
             streams: bool = False,
             **options: Any) -> tuple[SCPGates, Analysis]:
    found = SCPGates.admitted(analyse(net, SHAPE, run), net, streams)
    gates = SCPGates.of(found, streams=streams, **options)
    assert isinstance(gates, SCPGates)
    gate_(net, found, gates)
    return gates, found


def set_(norm: Any, beta: list[float], gamma: list[float]) -> None:
    with torch.no_grad():
        norm.bias.copy_(torch.tensor(beta))
        norm.weight.copy_(torch.tensor(gamma))


def with_phi_(norm: Any, values: list[float]) -> None:
    """Give the channels of a norm a Phi each, at gamma = 1."""
    z = torch.special.ndtri(torch.tensor(values, dtype=torch.double))
    set_(norm, (0.05 - z).tolist(), [1.] * len(values))


def steps(gates: SCPGates,
          budget: float,
          number: int = 1,
          **options: Any) -> None:
    for _ in range(number):
        gates.theta.grad = torch.zeros_like(gates.theta)
        gates.observe_()
        gates.step_(Mean(), budget, **dict(dict(lr=0.), **options))


def phi_of(gates: SCPGates) -> list[float]:
    return (-gates.score.double().expm1()).tolist()


# -- which gates there are -------------------------------------------------


def frozen_norms(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return net


class NormEval(nn.Sequential):
    """Keeps its norms in eval mode, as backbones with ``norm_eval`` do."""

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


@pytest.mark.parametrize('net, reason', [
    (TOYS['no norm'].build(), r'no batch norm \(after 0\)'),
    (nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6), nn.ReLU(),
                   last(6)), 'group norm in 1'),
    (TOYS['norm without affine'].build(), r'without scale \(1\)'),
    (frozen_norms(chain()), r'frozen batch norm \(1: requires_grad=False\)'),
    (NormEval(*chain()), r'frozen batch norm \(1: eval mode in training\)'),
])
def test_network_without_evidence_is_refused_by_name(net: nn.Module,
                                                     reason: str) -> None:
    with pytest.raises(ValueError, match=f"gdp.gate: .*{reason}.*gate='gdp'"):
        gate(net, SHAPE, target=0.5, num_steps=100, gate='scp')


@pytest.mark.parametrize('name, writers', [
    ('residual', {'branch.0'}),
    ('residual with downsample', {'stem.0', 'branch.0'}),
    ('group norm', {'3'}),
    ('hard swish', {'3'}),
    ('depthwise behind concat', {'a.0', 'b.0', 'point.0'}),
    ('squeeze-excite', {'stem.0'}),
])
def test_gates_stand_where_a_norm_and_a_relu_are(name: str,
                                                 writers: set[str]) -> None:
    net, analysis = TOYS[name].analyse()
    left = SCPGates.admitted(analysis, net)
    assert {group.writers[0] for group in left.groups} == writers
    reasons = [row.reason for row in left.frozen[len(analysis.frozen):]]
    assert len(reasons) == len(analysis.groups) - len(left.groups)
    assert all(reasons)


def test_streams_have_gates_on_request() -> None:
    net, analysis = TOYS['residual'].analyse()
    left = SCPGates.admitted(analysis, net, streams=True)
    assert len(left.groups) == len(analysis.groups)
    refused = SCPGates.admitted(analysis, net).frozen[-1]
    assert 'part of a sum' in refused.reason and 'streams' in refused.reason


@pytest.mark.parametrize('depth', [18, 50])
def test_gates_of_deeplab_leave_the_streams(depth: int) -> None:
    pytest.importorskip('mmseg')
    from mmengine.registry import init_default_scope

    from gdp_mmseg.engine.forwards import inference_forward, training_forward
    from gdp_mmseg.engine.model import build_base_model

    from helpers.toys import BACKBONES, deeplab
    init_default_scope('mmseg')
    net = build_base_model(None, deeplab(BACKBONES[f'ResNet-{depth}']))
    analysis = analyse(net, (3, 64, 64), inference_forward, training_forward)
    found = Gate('scp').admitted(analysis, net)
    writers = {group.writers[0] for group in found.groups}
    inner = 1 if depth == 18 else 2
    for stage in range(1, 5):
        for index in range(1, inner + 1):
            assert f'backbone.layer{stage}.0.conv{index}' in writers
        outer = f'backbone.layer{stage}.0.conv{inner + 1}'
        assert not any(outer in group.writers for group in found.groups)
    head = 'decode_head.'
    assert {
        f'{head}image_pool.1.conv', f'{head}aspp_modules.0.conv',
        f'{head}bottleneck.conv', f'{head}c1_bottleneck.conv',
        f'{head}sep_bottleneck.0.pointwise_conv.conv'
    } <= writers
    assert any('part of a sum' in row.reason for row in found.frozen)


@pytest.mark.parametrize('options, message', [
    (dict(tau=-1.), 'gdp.gate.tau: expected a number above 0'),
    (dict(k='20'), 'gdp.gate.k: expected a number above 0'),
    (dict(streams=1), 'gdp.gate.streams: expected True or False'),
    (dict(threshold=1., penalty=1.), 'gdp.gate.threshold: .*below 1'),
    (dict(penalty=1e-4), 'expected both threshold and penalty'),
    (dict(shape='sech'), "'shape', an option of"),
])
def test_wrong_options_are_an_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate.from_config(dict(type='scp', **options))


# -- deactivation of a gate ------------------------------------------------


def test_sum_of_norms_is_one_gaussian_and_a_chain_the_least() -> None:
    rows = [-1., 0.], [.5, .1]
    net = Net(
        lambda net, x: net.head(
            F.relu(net.left(y := net.stem(x)) + net.right(y))),
        stem=block(3, 2),
        left=block(2, 1)[:2],
        right=block(2, 1)[:2],
        head=last(1))
    gates, found = gates_on(net, streams=True)
    for part, beta, gamma in zip((net.left, net.right), *rows):
        set_(part[1], [beta], [gamma])
    steps(gates, 1.)
    place = int(found.groups[-1].gates[0])
    assert phi_of(gates)[place] == pytest.approx(.9802634, abs=1e-6)

    net = Net(
        lambda net, x: net.head(F.relu((y := net.stem(x)) + net.branch(y))),
        stem=block(3, 1),
        branch=branch(1, 2, 1),
        head=last(1))
    gates, found = gates_on(net, streams=True)
    for norm, beta, gamma in zip((net.stem[1], net.branch[4]), *rows):
        set_(norm, [beta], [gamma])
    steps(gates, 1.)
    assert phi_of(gates)[0] == pytest.approx(.6914625, abs=1e-6)


# -- masks -----------------------------------------------------------------


def test_masks_of_a_step_are_drawn_once_and_shared() -> None:
    torch.manual_seed(0)
    net, _ = TOYS['shared head'].analyse()
    gates, _ = gates_on(net.train())
    net.gates = gates
    with_phi_(net.fine[1], [.93, .94, .95, .96])
    with_phi_(net.coarse[1], [.93, .94, .95, .96])
    steps(gates, 1.)
    axis = gates.lookup.add(torch.arange(4))
    drawn = gates.slot_factors(axis).detach()
    assert torch.equal(drawn, gates.slot_factors(axis))
    copied = copy.deepcopy(net)  # as an average does
    assert torch.equal(drawn, copied.gates.slot_factors(axis))
    assert copied.fine[1].forward.gates is copied.gates is not gates
    steps(gates, 1.)
    assert not torch.equal(drawn, gates.slot_factors(axis))


def test_masks_are_one_before_the_pruning_phase() -> None:
    net = chain()
    gates, _ = gates_on(net.train())
    set_(net[1], [-9.] * 4, [.1] * 4)
    assert gates.slot_factors(0).tolist() == [1.] * 4 == (
        gates.openness().tolist())
    assert bool(gates.are_open())
    steps(gates, 1.)
    assert not bool(gates.are_open())
    assert max(gates.slot_factors(0).tolist()) < 1


def test_gradient_of_the_norms_is_that_of_the_masked_network() -> None:
    """As if autograd went through the formulas, in the same step."""
    torch.manual_seed(0)
    net = nn.Sequential(*block(3, 6), *block(6, 5), last(5)).double().train()
    plain = copy.deepcopy(net)
    gates, _ = gates_on(net)
    gates.double()
    set_(net[1], [-.4, -.2, -.1, 0, .1, .3], [.1, .2, .1, .1, .3, .5])
    set_(net[4], [-.5, -.3, -.1, 0, .2], [.3, .2, .1, .1, -.3])
    steps(gates, 1.)
    plain.load_state_dict(net.state_dict())
    inputs = torch.randn(2, *SHAPE).double()
    net(inputs).square().sum().backward()
    assert bool(gates.observe_())

    beta = torch.cat([plain[1].bias, plain[4].bias])
    gamma = torch.cat([plain[1].weight, plain[4].weight])
    masks = gates._masks(beta, gamma)
    outputs = inputs
    for index, module in enumerate(plain):
        outputs = module(outputs)
        if index in (2, 5):
            mask = masks[:6] if index == 2 else masks[6:]
            outputs = outputs * mask.view(1, -1, 1, 1)
    outputs.square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), plain.parameters()):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-8), name


def test_evaluation_is_hard() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .6, .9, .97])
    steps(gates, 1.)
    net.eval()
    assert gates.eval().slot_factors(0).tolist() == [1., 1., 1., 0.]


# -- threshold and push ----------------------------------------------------


def test_threshold_is_solved_for_the_budget() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .6, .9, .97])
    steps(gates, .5)
    assert float(gates.limit) == pytest.approx(.75, abs=1e-6)
    assert gates.decided().tolist() == [1., 1., 0., 0.]
    drop = drop_probability(
        torch.tensor(phi_of(gates)), gates.limit, OPTIONS['k'])
    assert drop.tolist() == pytest.approx(
        [1.67e-5, .0474259, .9525741, .9878716], rel=2e-3)
    assert float(gates.multiplier) == 1


def test_threshold_is_the_papers_where_that_meets_the_budget() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .6, .9, .97])
    before = copy.deepcopy(net[1].state_dict())
    steps(gates, 1., 3, lr=.5)
    assert float(gates.limit) == pytest.approx(.95)
    assert gates.decided().tolist() == [1., 1., 1., 0.]
    assert float(gates.multiplier) == 0 == float(gates.push.sum())
    assert all(
        torch.equal(value, before[key])
        for key, value in net[1].state_dict().items())


def test_openness_is_rescaled() -> None:
    net = chain(5)
    gates, _ = gates_on(net)
    # At Phi = 1 the probability of being kept is not 0.
    with_phi_(net[1], [1e-9, .5, .9, .949999, .97])
    steps(gates, 1.)
    assert gates.openness().tolist() == pytest.approx(
        [1, .999831, .632121, .316060, 0], abs=6e-4)


def test_threshold_has_a_floor_and_what_is_missing_is_pushed() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .3, .4, .5])
    steps(gates, .5)
    assert float(gates.limit) == .75
    assert gates.decided().tolist() == [1.] * 4
    before = net[1].bias.detach().clone(), net[1].weight.detach().clone()
    steps(gates, .5, lr=.1)  # decides on the push
    steps(gates, .5)  # and this step does it
    moved = before[0] - net[1].bias, before[1] - net[1].weight
    assert moved[0][:2].tolist() == [0, 0] == moved[1][:2].tolist()
    # A missed budget has made the push stronger.
    amount = 3.3 / 8 * .1 * float(gates.distance) * math.exp(2 * .1 / 8)
    assert moved[0][2:].tolist() == pytest.approx([amount] * 2, rel=1e-4)
    assert moved[1][2:].tolist() == pytest.approx([2 * amount] * 2, rel=1e-4)
    for _ in range(80):
        steps(gates, .5, lr=.02)
    assert gates.decided().tolist() == [1., 1., 0., 0.]
    # What is deactivated is pushed no further.
    assert float(gates.push.sum()) == 0
    assert .95 < phi_of(gates)[2] < .995


def test_gamma_is_not_pushed_beyond_zero() -> None:
    net = chain(2)
    gates, _ = gates_on(net)
    set_(net[1], [9., .1], [1., -.05])
    steps(gates, .5, 3, lr=.1)
    assert net[1].weight.tolist() == [1., 0.]
    assert net[1].bias[1] < .1


def test_gates_that_must_stay_are_kept() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .6, .9, .97])
    protected = torch.tensor([False, False, False, True])
    steps(gates, .5, protected=protected)
    assert gates.decided().tolist() == [1., 0., 0., 1.] or (
        # The threshold has a floor.
        gates.decided().tolist() == [1., 1., 0., 1.])
    gates.settle_(Mean(), .5, protected)
    assert gates.decided().tolist() == [1., 0., 0., 1.]


def test_blocks_close_as_a_whole() -> None:
    net = chain(6)
    gates, found = gates_on(net)
    with_phi_(net[1], [.2, .8, .82, .84, .86, .88])
    blocks = Blocks(found, 2)
    steps(gates, .5, blocks=blocks)
    assert int(gates.kept.sum()) in (2, 4)
    gates.settle_(Mean(), .5, None, blocks)
    assert gates.decided().tolist() == [1., 1., 0., 0., 0., 0.]


def test_a_gate_that_was_cut_comes_back() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .6, .9, .97])
    steps(gates, 1.)
    with_phi_(net[1], [.2, .6, .97, .9])
    steps(gates, 1.)
    assert gates.decided().tolist() == [1., 1., 0., 1.]
    assert not gates.is_closed().any()


def test_settling_fixes_all_gates() -> None:
    net = chain()
    gates, _ = gates_on(net.train())
    with_phi_(net[1], [.2, .3, .4, .97])
    steps(gates, .5)
    gates.settle_(Mean(), .5)
    assert gates.is_settled()
    # Also those that the budget forced out.
    assert gates.is_closed().tolist() == [False, False, True, True]
    assert gates.openness().tolist() == [1., 1., 0., 0.]
    assert 'end: 0.3500; 1 of 2 closed' in gates.outcome()[0]
    # Even if their channels left the norm.
    net[1] = nn.BatchNorm2d(2)
    assert gates.slot_factors(0).tolist() == [1., 1., 0., 0.]
    assert gates.eval().slot_factors(0).tolist() == [1., 1., 0., 0.]


def test_a_new_training_opens_what_is_not_closed() -> None:
    net = chain()
    gates, _ = gates_on(net)
    with_phi_(net[1], [.2, .6, .9, .97])
    steps(gates, 1.)
    gates.settle_(Mean(), .5)
    gates.begin_(0.)
    assert not gates.is_settled()
    assert gates.openness().tolist() == [1., 1., 0., 0.]
    assert gates.slot_factors(gates.lookup.add(
        torch.arange(2))).tolist() == [1., 1.]


def test_fixed_threshold_and_penalty_are_the_papers() -> None:
    net = chain()
    options = dict(threshold=.95, penalty=1e-3)
    gates, _ = gates_on(net, **options)
    with_phi_(net[1], [.2, .6, .9, .97])
    steps(gates, .1, 2)
    # 1 for each offset and 2 sign(gamma) for each scale, in each step.
    assert net[1].bias.grad.tolist() == pytest.approx([2e-3] * 4)
    assert net[1].weight.grad.tolist() == pytest.approx([4e-3] * 4)
    assert float(gates.limit) == pytest.approx(.95)
    gates.settle_(Mean(), .1)
    assert gates.decided().tolist() == [1., 1., 1., 0.]
    assert 'not held' in gates.notes()[0] and not gates.gradual


# -- trainings -------------------------------------------------------------


def train(model: Any, first: int, end: int, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.SGD(
        model.parameters(), lr=.02, momentum=.9, weight_decay=1e-4)
    model.train()
    for index in range(first, end):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(4, *SHAPE, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(inputs), inputs[:, :2]).backward()
        model.step(index)
        optimizer.step()
    return optimizer


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(*block(3, 40), *block(40, 48, kernel=1), last(48))
    return gate(
        net, SHAPE, target=.5, num_steps=40, phases=(.1, .7, .2), gate='scp')


def test_training_meets_the_target_and_the_export_computes_the_same() -> None:
    model = model_of()
    train(model, 0, 40)
    assert model.flops() == pytest.approx(.5, abs=.01)
    pruned, _ = model.export()
    inputs = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(pruned(inputs), model.eval()(inputs), atol=1e-6)


def test_training_resumes_as_if_it_had_not_stopped() -> None:
    straight = model_of()
    optimizer = train(straight, 0, 20)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    train(straight, 20, 40, optimizer)
    resumed = model_of(seed=1)
    resumed.load_state_dict(saved[0])
    other = torch.optim.SGD(
        resumed.parameters(), lr=.02, momentum=.9, weight_decay=1e-4)
    other.load_state_dict(saved[1])
    train(resumed, 20, 40, other)
    for (name, one), two in zip(straight.state_dict().items(),
                                resumed.state_dict().values()):
        assert not isinstance(one, Tensor) or torch.equal(one, two), name


def test_theta_stays_zero_and_gets_no_step() -> None:
    model = model_of()
    train(model, 0, 20)
    assert model.pruner.gates.theta.grad is None
    assert not model.pruner.gates.theta.any()


def test_the_papers_penalty_leaves_few_channels_undecided() -> None:
    """At the strength of the authors' longest training, in few steps."""
    torch.manual_seed(0)
    teacher = nn.Sequential(*block(3, 8), last(8)).eval()
    net = nn.Sequential(*block(3, 24), last(24))
    number, lr = 150, .05
    penalty = 3.3 / (number * .9 * lr / (1 - .9))
    model = gate(
        net,
        SHAPE,
        target=.5,
        num_steps=number,
        phases=(0., .9, .1),
        gate=dict(type='scp', threshold=.95, penalty=penalty))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)
    for index in range(number):
        inputs = torch.randn(
            8, *SHAPE, generator=torch.Generator().manual_seed(index))
        wishes = teacher(inputs).detach()
        wishes = (wishes - wishes.mean()) / wishes.std()
        optimizer.zero_grad()
        F.mse_loss(model(inputs), wishes).backward()
        model.step(index)
        optimizer.step()
    phi = torch.tensor(phi_of(model.pruner.gates))
    assert float(((phi > .55) & (phi < .95)).float().mean()) < .1
    assert float((phi > .95).float().mean()) > .5
    assert float((phi < .5).float().mean()) > 0
    # Whatever the target is.
    assert model.flops() < .4
