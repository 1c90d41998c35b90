"""Gates on any PyTorch model: put them on, train, export, save and load.

Nothing here needs an mm package.
"""
from __future__ import annotations

import warnings
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from .analysis.analyse import analyse
from .analysis.state import first_difference, from_state, to_state
from .analysis.structure import Analysis
from .analysis.tracer import Forward, clone_model
from .cost.counts import CountCost, ParameterCost
from .gates.layers import ungate_
from .pruner.pruner import Pruner
from .pruner.settings import Settings
from .report.summary import dead_parts, kept_by_part, kept_share
from .report.tables import table
from .surgery.outputs import TOLERANCE, largest_difference, outputs_of
from .surgery.prune import prune
from .surgery.verify import verify
from .surgery.widths import Widths

# Number of random inputs on which the two are compared.
_BATCH = 2


def gate(model: nn.Module,
         input_shape: tuple[int, int, int],
         target: float | Mapping[str, Any],
         num_steps: int,
         forward: Forward | None = None,
         **settings: Any) -> GatedModel:
    """Put gates on a model, in place, and return it ready for training.

    The model computes what it did before until the gates begin to move. A
    copy is traced and pruned at random first, so that only channels get a
    gate whose removal is exact.

    Args:
        model (nn.Module): Any model whose convolutions and linear layers are
            to lose channels, on any device.
        input_shape (tuple[int, int, int]): ``(C, H, W)`` of one input, at
            which multiply-adds are counted.
        target (float | Mapping[str, Any]): Share of the multiply-adds to
            keep, or ``dict(type='params', ratio=0.4)`` for parameters, or
            ``dict(type='latency', ratio=0.4)`` for the measured time of the
            layers.
        num_steps (int): Number of steps of the optimizer in the training.
        forward (Forward, optional): Runs the model on inputs
            ``(N, C, H, W)``. Defaults to calling it.
        **settings: Further fields of
            :class:`gdp_mmseg.pruner.settings.Settings`, e.g. ``phases``,
            ``ignore`` and ``only``. ``shrink`` has no effect here: closed
            channels stay until the export.

    Returns:
        GatedModel: The model with its gates.

    Raises:
        ValueError: If a setting is wrong, the target or the length of the
            training does not fit, or nothing can be pruned.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(),
        ...                     nn.Conv2d(8, 2, 3))
        >>> gated = gate(net, (3, 16, 16), target=0.5, num_steps=100)
        >>> optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
        >>> for step in range(100):
        ...     optimizer.zero_grad()
        ...     gated(torch.randn(2, 3, 16, 16)).square().mean().backward()
        ...     gated.step(step)
        ...     optimizer.step()
        >>> pruned, widths = gated.export()
        >>> widths['0'], pruned[0].out_channels
        ([4, None], 4)
    """
    forward = forward or _call
    chosen = Settings.from_config(
        dict(settings, target=target, input_shape=input_shape))
    notes = [chosen.check_length(num_steps)]
    analysis = _analyse(
        clone_model(model, 'cpu'), input_shape, forward, chosen)
    pruner = Pruner(analysis, chosen).to(next(model.parameters()).device)
    if pruner.unmeasured:
        pruner.measure_()
        pruner.check_target()
    notes += [pruner.note_on_target(), *pruner.gates.notes()]
    for note in filter(None, notes):
        warnings.warn(note)
    pruner.gate_(model)
    return GatedModel(model, pruner, num_steps, forward)


def _call(model: nn.Module, inputs: Tensor) -> Any:
    return model(inputs)


def _analyse(model: nn.Module, input_shape: tuple[int, ...], forward: Forward,
             settings: Settings) -> Analysis:
    """Analyse a model on the CPU and verify that its surgery is exact.

    The same forward runs in evaluation and in training mode, where a model
    may run further layers.
    """
    found = analyse(model, input_shape, forward, forward, settings.ignore,
                    settings.only)
    verified, _ = verify(model, found, forward, forward)
    return settings.gate.admitted(verified, model)


class GatedModel(nn.Module):
    """Model with gates, made by :func:`gate`.

    It is called as the model itself. Its ``parameters()`` are those of the
    model and theta, the vector of all gates. :meth:`step` moves theta and
    removes its gradient, so that an optimizer neither moves nor decays it.

    A training is resumed by calling :func:`gate` on a new model and loading
    the ``state_dict()``. An average of the weights
    (``torch.optim.swa_utils.AveragedModel``) has an average of the gates, and
    its ``module`` can be exported, too.

    Args:
        model (nn.Module): The model, with gates on its layers.
        pruner (Pruner): Gates, cost and schedule.
        num_steps (int): Number of steps of the optimizer in the training.
        forward (Forward): Runs the model on inputs ``(N, C, H, W)``.

    Attributes:
        model (nn.Module): The model itself; it has its own parameters only.
        pruner (Pruner): Gates, cost and schedule.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, num_steps: int,
                 forward: Forward) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.pruner = pruner.train(model.training)
        self.num_steps = num_steps
        self._forward = forward
        # Version of theta in the last forward pass.
        self._version = -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        if not torch.compiler.is_compiling():
            self._version = self.pruner.gates.theta._version
        return self.model(*args, **kwargs)

    @property
    def analysis(self) -> Analysis:
        """Groups of channels that are pruned together."""
        return self.pruner.analysis

    @torch.compiler.disable
    def step(self, index: int) -> None:
        """Move the gates; call it after ``backward()``, in every step.

        It must come before ``optimizer.step()``, and before gradients are
        clipped, so that those of the gates do not count in their norm. If
        gradients are accumulated, it is called once for each step of the
        optimizer. Gradients that are scaled by a constant, or not finite, as
        with ``torch.amp.GradScaler``, are fine; with a fixed ``penalty`` of
        the gates, unscale them first. In several processes, the
        gradient of theta is averaged like that of a weight, and all of them
        take the gates of the first one.

        Args:
            index (int): Number of steps of the optimizer so far, from 0.

        Raises:
            ValueError: If the index is negative.
            RuntimeError: If theta has no gradient, or an optimizer has moved
                it.
        """
        if index < 0:
            raise ValueError('index: expected the number of steps so far, '
                             f'from 0, but got {index}')
        gates = self.pruner.gates
        if gates.theta._version > self._version >= 0:
            raise RuntimeError(
                'expected step() between backward() and optimizer.step(), '
                'but the optimizer has already moved the gates; change the '
                'order of the two')
        self.pruner.step_(min(index / self.num_steps, 1.), self.num_steps)

    def flops(self) -> float:
        """Share of the dense multiply-adds that an export would have now."""
        return float(self.pruner.flops(self.pruner.channels()))

    def export(self) -> tuple[nn.Module, Widths]:
        """Copy the model without gates and without its closed channels.

        The copy computes what the gated model computes in eval mode; the two
        are compared on random inputs.

        Returns:
            tuple[nn.Module, Widths]: The pruned model in eval mode, and its
            widths (see :mod:`gdp_mmseg.surgery.prune`), for
            :func:`save_pruned`.

        Raises:
            ValueError: If a weight is not finite, or the outputs differ.
        """
        note = self.pruner.note_on(
            float(self.pruner.cost(self.pruner.channels())))
        if note:
            warnings.warn(note)
        gated = self._clone_in_eval_mode()
        dense = self._clone_in_eval_mode()
        ungate_(dense, self.analysis)
        pruned, widths = prune(dense, self.analysis,
                               self.pruner.gates.decided())
        difference = largest_difference(
            self._outputs(pruned), self._outputs(gated))
        if not difference <= TOLERANCE:
            raise ValueError(
                'expected the outputs of the gated model from the pruned one, '
                f'but got a relative difference of {difference:.1e}; keep '
                'parts out with ignore=[...]')
        return pruned, widths

    def _clone_in_eval_mode(self) -> nn.Module:
        """Copy the model and its gates, and let the copy evaluate."""
        gates = self.pruner.gates
        is_training = gates.training
        # The layers know the gates, but these are no part of the model.
        gates.eval()
        clone = clone_model(self.model).eval()
        gates.train(is_training)
        return clone

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """Run a model on random inputs."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(
            _BATCH, *self.analysis.input_shape[1:], generator=generator)
        weight = next(model.parameters())
        return outputs_of(model, self._forward, inputs.to(weight))

    def summary(self) -> str:
        """Compose a table of what an export would keep, part by part."""
        analysis, channels = self.analysis, self.pruner.channels()
        keep = channels.cpu() > 0
        parameters = ParameterCost(analysis)
        rows = [['part', 'channels', 'kept']]
        rows += [[
            part.name,
            str(part.channels), f'{part.kept} ({kept_share(part):.0%}'
            ')'
        ] for part in kept_by_part(analysis.groups, keep)]
        lines = [
            f'FLOPs: {_share(self.pruner.flops, channels, 1e9, "G")} at '
            f'{" x ".join(map(str, analysis.input_shape))}',
            f'parameters: {_share(parameters, channels.cpu(), 1e6, "M")}',
            'removed parts: ' +
            ('; '.join(dead_parts(analysis, keep)) or 'none'),
            *self.pruner.gates.outcome()
        ]
        return '\n'.join([*lines, '', table(rows)])

    def get_extra_state(self) -> dict[str, Any]:
        """Return the analysis, which is saved with the ``state_dict()``."""
        return to_state(self.analysis)

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a ``state_dict()`` has gates on the same channels.

        Raises:
            ValueError: If it has not.
        """
        module = first_difference(from_state(state), self.analysis)
        if module is not None:
            raise ValueError(
                'state_dict: expected gates on the channels of this model, '
                f'but got gates on other channels ({module} first); build '
                'model and gates as for the training that saved it')


def _share(cost: CountCost, channels: Tensor, unit: float, name: str) -> str:
    """Compose the count of some channels, in a unit, and its share."""
    left = cost.count(channels)
    return (f'{left / unit:.2f} of {cost.dense / unit:.2f} {name} '
            f'({left / cost.dense:.1%})')
