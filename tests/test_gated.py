"""Gates on plain PyTorch models: train, export, save, load, resume."""
from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg import GatedModel, gate, load_pruned, save_pruned

from helpers.toys import block, branch, last

SHAPE = (3, 8, 8)
STEPS = 60
TARGET = 0.5


class Net(nn.Module):
    """A stem, a residual block and a head, with an auxiliary training head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.branch = branch(width, width, width)
        self.head = last(width)
        self.aux = last(width)

    def forward(self, x: Tensor) -> Any:
        stem = self.stem(x)
        y = self.head((stem + self.branch(stem)).relu())
        return dict(out=y, aux=self.aux(stem)) if self.training else y


def gated(net: nn.Module | None = None, **settings: Any) -> GatedModel:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(
        target=TARGET, num_steps=STEPS, phases=(0.1, 0.7, 0.2))
    return gate(net or Net(), SHAPE, **dict(options, **settings))


def train(model: GatedModel,
          first: int = 0,
          end: int = STEPS,
          scale: float = 1.,
          optimizer: torch.optim.Optimizer | None = None,
          after: Callable[[int], None] = lambda step: None) -> Any:
    """A loop of a user's own, on random inputs and wishes."""
    optimizer = optimizer or torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    model.train()
    for step in range(first, end):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, *SHAPE, generator=generator)
        wishes = inputs[:, :2]
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = F.mse_loss(outputs['out'], wishes) + F.mse_loss(
            outputs['aux'], wishes)
        (scale * loss).backward()
        for group in optimizer.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None and parameter.dim():
                    parameter.grad /= scale
        model.step(step)
        optimizer.step()
        after(step)
    return optimizer


GATES: dict[str, dict[str, Any]] = {
    'gdp': {},
    'trainable': dict(gate='trainable'),
    'no-takeover': dict(takeover=False)
}


@functools.cache
def trained_with(gate: str) -> GatedModel:
    model = gated(**GATES[gate])
    train(model)
    return model


@pytest.fixture()
def trained() -> GatedModel:
    return trained_with('gdp')


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(
            torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9)))


def test_fresh_gates_change_no_output_mode_or_parameter() -> None:
    net = Net().eval()
    net.stem.train()
    names = [name for name, _ in net.named_parameters()]
    before, frozen = outputs(net), copy.deepcopy(net)
    net.train()
    net.stem[1].eval()  # a frozen norm of the user's
    model = gated(net)
    assert net.training and not net.stem[1].training
    assert model.training and model.pruner.training
    assert [name for name, _ in net.named_parameters()] == names
    assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(frozen), before)


@pytest.mark.parametrize('gate', GATES)
def test_training_meets_the_target_and_the_export_computes_the_same(
        gate: str) -> None:
    trained = trained_with(gate)
    # One channel of the stem costs two points.
    assert trained.flops() == pytest.approx(TARGET, abs=0.03)
    pruned, widths = trained.export()
    assert type(pruned) is Net and not hasattr(pruned, 'pruner')
    assert torch.allclose(outputs(pruned), outputs(trained), atol=1e-6)
    count = sum(value.numel() for value in pruned.parameters())
    assert count < 0.9 * sum(value.numel() for value in Net().parameters())
    assert set(widths) < {name for name, _ in Net().named_modules()}
    # The gated model can be trained and exported again.
    again, _ = trained.export()
    assert torch.equal(outputs(again), outputs(pruned))
    assert 'FLOPs' in trained.summary() and 'stem.0' in trained.summary()


def test_optimizer_neither_moves_nor_decays_the_gates() -> None:
    model = gated(phases=(1 - 0.5, 0.4, 0.1))
    theta = model.pruner.gates.theta
    train(model, end=STEPS // 2)  # a warm-up without a pruning step
    assert torch.equal(theta, torch.ones_like(theta))
    assert theta.grad is None
    assert any(parameter is theta for parameter in model.parameters())


def test_step_behind_the_optimizer_is_an_error_that_says_so() -> None:
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(torch.randn(2, *SHAPE))['out'].mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match='before|between backward'):
        model.step(0)


def test_step_without_a_gradient_is_an_error() -> None:
    model = gated()
    with torch.no_grad():
        model(torch.randn(2, *SHAPE))
    with pytest.raises(RuntimeError, match='theta.grad is None'):
        model.step(0)
    with pytest.raises(ValueError, match='from 0, but got -1'):
        model.step(-1)


def test_a_constant_loss_scale_moves_the_gates_alike(
        trained: GatedModel) -> None:
    model = gated()
    train(model, scale=2.**10)
    assert torch.equal(model.pruner.channels(), trained.pruner.channels())


def test_overflow_moves_no_gate() -> None:
    model = gated()
    train(model, end=STEPS // 2)
    before = model.pruner.gates.theta.detach().clone()
    (model(torch.randn(2, *SHAPE))['out'].mean() * float('inf')).backward()
    model.step(STEPS // 2)
    assert torch.equal(model.pruner.gates.theta, before)
    assert model.pruner.gates.theta.grad is None


# In the pruning phase, and among the votes of its last steps.
@pytest.mark.parametrize('gate, stop', [('gdp', STEPS // 2),
                                        ('gdp', STEPS // 2 + 1),
                                        ('no-takeover', STEPS // 2),
                                        ('trainable', STEPS // 2),
                                        ('trainable', 47)])
def test_resume_by_state_dicts_goes_on_as_the_straight_training(
        gate: str, stop: int, tmp_path: Path) -> None:
    first = gated(**GATES[gate])
    optimizer = train(first, end=stop)
    torch.save((first.state_dict(), optimizer.state_dict()),
               tmp_path / 'half.pt')
    model = gated(**GATES[gate])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    state, momenta = torch.load(tmp_path / 'half.pt', weights_only=True)
    model.load_state_dict(state)
    optimizer.load_state_dict(momenta)
    train(model, first=stop, optimizer=optimizer)
    for name, value in trained_with(gate).state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(model.state_dict()[name], value), name


def test_state_of_other_gates_is_refused(trained: GatedModel) -> None:
    other = gated(target=0.9, only=['branch'])
    with pytest.raises(ValueError, match='other channels'):
        other.set_extra_state(trained.get_extra_state())


@pytest.mark.parametrize('use_buffers, gate', [(False, 'gdp'), (True, 'gdp'),
                                               (False, 'trainable'),
                                               (True, 'trainable')])
def test_average_of_the_weights_can_be_exported(use_buffers: bool,
                                                gate: str) -> None:
    model = gated(gate=gate)
    average = torch.optim.swa_utils.AveragedModel(
        model,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9),
        use_buffers=use_buffers)
    train(model, after=lambda step: average.update_parameters(model))
    pruned, _ = average.module.export()
    assert torch.allclose(outputs(pruned), outputs(average), atol=1e-5)
    assert float((average.module.pruner.gates.closed > 0).float().mean()) > 0
    assert torch.equal(average.module.pruner.channels(),
                       model.pruner.channels())
    # Not if the sizes of the groups were averaged, and rounded down.
    assert average.module.flops() == model.flops()


def test_masks_that_are_still_drawn_are_exported_as_they_decide() -> None:
    model = gated(gate='scp', target=0.85)
    train(model, end=STEPS // 2)
    with pytest.warns(UserWarning, match='of the FLOPs are left'):
        pruned, _ = model.export()
    assert model.pruner.gates.training
    assert torch.allclose(outputs(pruned), outputs(model), atol=1e-5)
    assert 0 < float(model.pruner.channels().mean()) < 1


def test_saved_model_is_loaded_into_the_dense_class(trained: GatedModel,
                                                    tmp_path: Path) -> None:
    pruned, widths = trained.export()
    path = tmp_path / 'pruned.pt'
    save_pruned(pruned, widths, path)
    dense = Net()
    count = sum(value.numel() for value in dense.parameters())
    loaded = load_pruned(dense, path)
    assert torch.equal(outputs(loaded), outputs(pruned))
    assert sum(value.numel() for value in dense.parameters()) == count
    content = torch.load(path, weights_only=True)
    assert content['meta']['widths'] == widths


@pytest.mark.parametrize('spoil, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:-200]), 'cannot be'),
    (lambda path: path.write_bytes(b'no archive'), 'cannot be'),
    (lambda path: path.unlink(), 'cannot be'),
    (lambda path: torch.save(Net().state_dict(), path), 'cannot be'),
])
def test_file_that_holds_no_pruned_model_is_refused(spoil: Callable[[Path],
                                                                    Any],
                                                    message: str,
                                                    trained: GatedModel,
                                                    tmp_path: Path) -> None:
    path = tmp_path / 'pruned.pt'
    save_pruned(*trained.export(), path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        load_pruned(Net(), path)


def test_changed_tensors_and_other_models_are_refused(trained: GatedModel,
                                                      tmp_path: Path) -> None:
    path = tmp_path / 'pruned.pt'
    save_pruned(*trained.export(), path)
    with pytest.raises(ValueError, match='widths: expected'):
        load_pruned(Net(width=4), path)
    content = torch.load(path, weights_only=True)
    next(iter(content['state_dict'].values())).add_(1)
    torch.save(content, path)
    with pytest.raises(ValueError, match='got others'):
        load_pruned(Net(), path)


@pytest.mark.parametrize('settings, message', [
    (dict(num_steps=8), 'gdp.phases: .* train for at least 12 steps'),
    (dict(target=1.5), 'gdp.target'),
    (dict(target=0.05, only=['branch']), 'expected more than'),
    (dict(ignore=['nothing']), "'nothing', which matches none"),
    (dict(phase=(0.1, 0.7, 0.2)), 'gdp: expected'),
])
def test_bad_settings_are_refused_before_the_model_changes(
        settings: dict[str, Any], message: str) -> None:
    net = Net()
    before = dict(vars(net.head))
    with pytest.raises(ValueError, match=message):
        gated(net, **settings)
    assert vars(net.head) == before


def test_short_pruning_phase_is_warned_of() -> None:
    with pytest.warns(
            UserWarning, match='the pruning phase is short with 8.4'):
        gated(num_steps=12)


def test_target_below_one_channel_in_each_group_is_warned_of() -> None:
    with pytest.warns(
            UserWarning, match='gdp.target is 0.005, but with a single'):
        gated(target=0.005)


def test_unfinished_training_is_exported_with_a_warning() -> None:
    model = gated()
    with pytest.warns(UserWarning, match='1.0000 of the FLOPs are left'):
        pruned, widths = model.export()
    assert not widths
    assert torch.allclose(outputs(pruned), outputs(model), atol=1e-6)


def test_latency_is_measured_when_the_gates_are_put_on(
        monkeypatch: pytest.MonkeyPatch) -> None:
    from gdp_mmseg.pruner import pruner

    def times(layers: list[Any], device: torch.device, *_: Any) -> Tensor:
        return torch.tensor([[1., 0., 0.01, 0.001]] * len(layers))

    monkeypatch.setattr(pruner, 'measure', times)
    model = gated(target=dict(type='latency', ratio=0.9))
    assert not model.pruner.unmeasured
