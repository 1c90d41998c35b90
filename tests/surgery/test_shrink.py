"""A model that loses its closed channels trains as it would with them."""
from __future__ import annotations

import copy
import re
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gdp_mmseg.analysis.liveness import kept_channels
from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.gates.layers import gate_
from gdp_mmseg.surgery.prune import take
from gdp_mmseg.surgery.shrink import Shrinkage, obstacle

from helpers.toys import TOYS, open_gates

Optimizers = Callable[[Any], torch.optim.Optimizer]
SGD: Optimizers = lambda weights: torch.optim.SGD(
    weights, lr=0.02, momentum=0.9, weight_decay=0.1)
ADAMW: Optimizers = lambda weights: torch.optim.AdamW(
    weights, lr=0.01, weight_decay=0.1, amsgrad=True)
STEPS = 2


def open_of(analysis: Analysis, pattern: str) -> Tensor:
    """Gates that stay open when some have closed, in each group."""
    keep = torch.ones(analysis.num_gates, dtype=torch.bool)
    for index, group in enumerate(analysis.groups):
        keep[group.gates[1::3]] = False
        if pattern != 'some':
            keep[group.gates[2::3]] = False
        # A group that closes as a whole leaves layers without inputs.
        if (pattern, index % 2) in (('groups', 0), ('others', 1)):
            keep[group.gates] = False
    return keep


class Training:
    """A gated toy in double precision that trains with an optimizer."""

    def __init__(self, name: str, make: Optimizers) -> None:
        net, self.analysis = TOYS[name].analyse()
        self.inputs = TOYS[name].inputs().double()
        self.gates = open_gates(
            torch.ones(self.analysis.num_gates, dtype=torch.bool)).double()
        gate_(net, self.analysis, self.gates)
        self.net = net.double().train()
        for module in net.modules():
            # Other channels draw other numbers.
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        self.optimizer = make(net.parameters())
        self.shrinkage = Shrinkage(net, self.analysis)

    def losses(self) -> list[float]:
        """Losses of a few steps."""
        found = []
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            loss = sum((leaf - 0.1).square().mean()
                       for leaf in tree_leaves(self.net(self.inputs))
                       if leaf.is_floating_point())
            loss.backward()
            self.optimizer.step()
            self.gates.theta.grad = None
            found.append(float(loss.detach()))
        return found

    def close_(self, keep: Tensor) -> None:
        self.gates.close_(~keep)

    def narrow_(self) -> None:
        keep = kept_channels(self.analysis, self.gates.openness(),
                             self.shrinkage.present)
        self.shrinkage.narrow_(keep, self.optimizer)


def test_channels_that_have_left_do_not_come_back() -> None:
    training = Training('chain', SGD)
    some = torch.arange(training.analysis.num_gates) % 2 == 0
    training.close_(some)
    training.narrow_()
    before = shapes(training)
    with pytest.raises(ValueError, match='keep: expected gates whose chann'):
        training.shrinkage.narrow_(~some, training.optimizer)
    assert shapes(training) == before


CASES = [(name, ('channels', 'groups', 'others')[index % 3],
          (SGD, ADAMW)[index % 2]) for index, name in enumerate(TOYS)]


def shapes(training: Training) -> dict[str, Any]:
    """Shapes of all tensors, and the sizes that modules remember."""
    found: dict[str, Any] = {
        name: tensor.shape
        for name, tensor in training.net.state_dict().items()
    }
    for name, module in training.net.named_modules():
        found[f'{name}()'] = {
            key: value
            for key, value in vars(module).items() if isinstance(value, int)
        }
    return found


@pytest.mark.parametrize('name, pattern, make', CASES)
def test_losses_are_those_of_the_uncut_model(name: str, pattern: str,
                                             make: Optimizers) -> None:
    """Cut twice, then with all channels again."""
    whole, cut = Training(name, make), Training(name, make)
    assert cut.losses() == whole.losses()
    dense = shapes(cut)
    more = open_of(whole.analysis, pattern)
    for keep in (open_of(whole.analysis, 'some'), more):
        for one in (whole, cut):
            one.close_(keep)
        cut.narrow_()
        assert cut.losses() == pytest.approx(whole.losses(), rel=1e-9)
    assert (shapes(cut) == dense) == bool(cut.shrinkage.present.all())
    cut.shrinkage.widen_(cut.optimizer)
    assert shapes(cut) == dense
    assert cut.losses() == pytest.approx(whole.losses(), rel=1e-9)


def test_order_of_the_axes_in_memory_stays() -> None:
    last = torch.channels_last
    training = Training('chain', SGD)
    training.net.to(memory_format=last)
    training.losses()

    def stored() -> list[str]:
        """Kernels whose axes, or whose momenta's, lie with channels last."""
        return [
            f'{kernel} {index}'
            for kernel, weight in training.net.named_parameters()
            for index, tensor in enumerate((
                weight, *training.optimizer.state.get(weight, {}).values()))
            if isinstance(tensor, Tensor) and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=last)
        ]

    before = stored()
    assert len(before) >= 4
    training.close_(open_of(training.analysis, 'some'))
    training.narrow_()
    assert stored() == before
    training.shrinkage.widen_(training.optimizer)
    assert stored() == before


@pytest.mark.parametrize('last, axes', [(torch.channels_last, 2),
                                        (torch.channels_last_3d, 3)])
def test_order_of_the_axes_of_a_tensor_stays(last: torch.memory_format,
                                             axes: int) -> None:
    net, analysis = TOYS['chain'].analyse()
    name, kernel = next(
        (name, weight) for name, weight in net.named_parameters()
        if weight.dim() == 4 and (name, 1) in analysis.gate_of_slot)
    whole = torch.randn(*kernel.shape[:2], *[3] * axes)
    keep = open_of(analysis, 'some')
    narrow = take({name: whole}, analysis, keep)[name]
    found = take({name: whole.to(memory_format=last)}, analysis, keep)[name]
    assert narrow.is_contiguous() and not found.is_contiguous()
    assert found.is_contiguous(memory_format=last)
    assert found.shape != whole.shape and torch.equal(found, narrow)


def test_graph_that_is_still_held_does_not_stop_the_next_step() -> None:
    """Autograd's nodes of the last step know the wide shapes."""
    training = Training('residual', SGD)
    held = [leaf.sum() for leaf in tree_leaves(training.net(training.inputs))]
    training.close_(open_of(training.analysis, 'more'))
    training.narrow_()
    assert len(training.losses()) == STEPS
    assert len(held) == 1


def test_gradients_are_cut_with_their_weights() -> None:
    whole, cut = Training('residual', SGD), Training('residual', SGD)
    for one in (whole, cut):
        one.close_(open_of(one.analysis, 'more'))
        for leaf in tree_leaves(one.net(one.inputs)):
            leaf.square().mean().backward()
    cut.narrow_()
    for one in (whole, cut):
        one.optimizer.step()
    cut.shrinkage.widen_()
    kept = cut.net.stem[0].weight != 0
    assert bool(kept.any()) and not bool(kept.all())
    torch.testing.assert_close(
        cut.net.stem[0].weight[kept],
        whole.net.stem[0].weight[kept],
        rtol=1e-9,
        atol=0)


def test_copy_of_a_cut_model_has_layers_of_its_own() -> None:
    training = Training('residual', SGD)
    training.close_(open_of(training.analysis, 'groups'))
    training.narrow_()
    twin = copy.deepcopy(training.net)
    before = [leaf.clone() for leaf in tree_leaves(twin(training.inputs))]
    for parameter in training.net.parameters():
        parameter.data.fill_(0.3)
    after = tree_leaves(twin(training.inputs))
    assert all(map(torch.equal, before, after))


class Centred(torch.optim.SGD):
    """An optimizer whose steps depend on all entries of a weight."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group['params']:
                if weight.grad is not None:
                    weight.grad -= weight.grad.mean()
        return super().step(closure)


class Failing(torch.optim.SGD):

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError('no step')


@pytest.mark.parametrize('kind, reason', [
    (torch.optim.SGD, None),
    (torch.optim.AdamW, None),
    (torch.optim.RMSprop, None),
    (torch.optim.ASGD, None),
    (Centred, 'Centred moves a weight by more than its own gradients'),
    (torch.optim.Adafactor, 'Adafactor keeps row_var in another shape'),
    (Failing, r'a trial step of Failing fails \(RuntimeError: no step\)'),
])
def test_optimizers_that_look_beyond_an_entry_are_found(
        kind: Any, reason: str | None) -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    # In a warm-up that begins at zero.
    optimizer = kind([weight], lr=0.)
    found = obstacle(optimizer)
    assert found is None if reason is None else re.search(reason, found)
    assert not optimizer.state and not bool(weight.any())
    assert optimizer.param_groups[0]['lr'] == 0


def test_state_of_another_shape_is_found_in_a_running_optimizer() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]['scales'] = torch.zeros(5)
    assert 'SGD keeps scales in another shape' in str(obstacle(optimizer))
