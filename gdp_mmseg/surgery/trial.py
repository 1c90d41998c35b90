"""Trial prunings of a copy of a model with random weights and gates."""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from ..analysis.structure import Analysis
from ..analysis.tracer import Forward, ForwardError, copy_model
from ..gates.gdp import GDPGates, theta_of
from ..gates.layers import gate_
from .outputs import first_line, largest_difference, outputs_of
from .prune import cut
from .random_weights import centre_biases_, copy_with_random_weights

# Forwards, each with True if it is one of training.
Forwards = Sequence[tuple[Forward, bool]]
_INEXACT = 'not exact when pruned: the forward counts on these channels'
# Sides of the input that are tried before the analysed one, and the step
# between larger ones: a small input makes the many forward passes fast.
_SIDES = (64, 128)
_STEP = 32


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of one trial.

    Args:
        difference (float): Relative difference of the gated and the pruned
            outputs; infinite if the pruned copy cannot run.
        error (str): Type and first line of the pruned copy's error.
    """
    difference: float
    error: str = ''


class _WatchedGates(GDPGates):
    """Gates that record which layers used them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.used: set[int] = set()

    def slot_factors(self, index: int) -> Tensor:
        self.used.add(index)
        return super().slot_factors(index)


class Trial:
    """A gated copy of a model, with random weights, to be pruned repeatedly.

    Args:
        model (nn.Module): The model that was analysed, which stays unchanged.
        analysis (Analysis): The analysis of the model.
        forwards (Forwards): Forwards that are compared,
            the one of inference first; each with True if it is of training.
        others (Forwards): Forwards that are compared if
            the model itself can run them on these inputs.
        tolerance (float): Largest relative difference of equal outputs.

    Attributes:
        num_required (int): Number of the forwards that were given as such.
        skipped (dict[str, str]): Names of the other forwards that are not
            compared, and why.

    Raises:
        ForwardError: If the model itself cannot run.
    """

    def __init__(self, model: nn.Module, analysis: Analysis,
                 forwards: Forwards, others: Forwards,
                 tolerance: float) -> None:
        self.tolerance = tolerance
        self.forwards = list(forwards)
        self.model, self.inputs = self._random_copy(model,
                                                    analysis.input_shape)
        self.num_required = len(self.forwards)
        self.skipped: dict[str, str] = {}
        self.forwards += [one for one in others if self._runs(one)]
        self.use(analysis)

    def use(self, analysis: Analysis) -> None:
        """Put the gates of an analysis on a new copy of the model."""
        self.analysis = analysis
        self.gates = _WatchedGates(analysis.num_gates)
        self.gated = copy_model(self.model)
        self.known: dict[tuple[tuple[int, ...], bool], Outcome] = {}
        self.failed_at = ''  # the module that ran last
        gate_(self.gated, analysis, self.gates)

    # -- runs --------------------------------------------------------------

    def _random_copy(self, model: nn.Module,
                     shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
        """Return a copy with random weights and a small input for it."""
        whole = max(shape[2:])
        for side in dict.fromkeys((self._least_side(model, shape), whole)):
            inputs = torch.randn(_shape_within(shape, side))
            try:
                random_copy = copy_with_random_weights(
                    model, lambda net: self._run(-1, net, inputs))
                return random_copy, inputs
            except Exception as error:  # a user's forward can raise anything
                if side == whole:
                    raise ForwardError(
                        'expected the model to run on an input of shape '
                        f'(N, C, H, W) = {tuple(inputs.shape)}, but got '
                        f'{first_line(error)}; the model fails without any '
                        'pruning, so correct its forward') from error
        raise AssertionError('unreachable')

    def _least_side(self, model: nn.Module, shape: tuple[int, ...]) -> int:
        """Find a small side that the model accepts, on the meta device.

        A model that cannot run there gets the whole side.
        """
        empty = copy_model(model, lambda tensor: tensor.to('meta'))
        dtype = next(model.parameters()).dtype

        def takes(side: int) -> bool:
            inputs = torch.zeros(
                _shape_within(shape, side), dtype=dtype, device='meta')
            try:
                # The last forward runs all that the others run.
                self._run(-1, empty, inputs)
            except Exception:  # this side is too small
                return False
            return True

        whole = max(shape[2:])
        low, high = 0, whole
        for side in _SIDES:
            if side >= whole or takes(side):
                return min(side, whole)
            low = side
        while high - low > _STEP:
            middle = (low + high) // (2 * _STEP) * _STEP
            low, high = (low, middle) if takes(middle) else (middle, high)
        return high

    def _run(self, index: int, model: nn.Module,
             inputs: Tensor) -> list[Tensor]:
        forward, training = self.forwards[index]
        # A copy of the gated model has to use these very gates, which record
        # their use.
        return outputs_of(model, forward, inputs, training,
                          getattr(self, 'gates', None))

    def _runs(self, one: tuple[Forward, bool]) -> bool:
        """Return True if the model itself runs a forward to finite numbers."""
        forward, training = one
        try:
            outputs = outputs_of(self.model, forward, self.inputs, training)
        except Exception as error:  # it needs samples of another kind
            self.skipped[_name_of(forward)] = first_line(error)
            return False
        if not outputs or not all(
                bool(output.isfinite().all()) for output in outputs):
            self.skipped[_name_of(forward)] = 'no finite numbers'
            return False
        return True

    def _run_gated(self, index: int) -> list[Tensor]:
        try:
            return self._run(index, self.gated, self.inputs)
        except Exception as error:  # a user's forward can raise anything
            raise ForwardError(
                'expected the model to run with gates in it, but got '
                f'{first_line(error)}; nothing is pruned in it, so correct '
                "the model's forward") from error

    def check_repeatable(self) -> None:
        """Refuse a model that computes something else each time.

        Other forwards than the required ones are left out in that case.

        Raises:
            ValueError: If two runs on the same input differ.
        """
        for index in reversed(range(len(self.forwards))):
            difference = largest_difference(
                self._run_gated(index), self._run_gated(index))
            if difference <= self.tolerance:
                continue
            if index >= self.num_required:
                forward, _ = self.forwards.pop(index)
                self.skipped[_name_of(forward)] = 'other numbers in each run'
                self.known.clear()
            else:
                raise ValueError(
                    'expected the same outputs from two runs of the model on '
                    'the same input, but got a relative difference of '
                    f'{difference:.1e}; the forward depends on something '
                    'other than its input, its state and the random numbers '
                    'of Python, NumPy and PyTorch')

    # -- outcomes ----------------------------------------------------------

    def exact(self, closed: Sequence[int], half: bool) -> bool:
        """Return True if the outcome is within the tolerance."""
        return self.outcome(closed, half).difference <= self.tolerance

    def outcome(self, closed: Sequence[int], half: bool) -> Outcome:
        """Compare gated and pruned outputs.

        Args:
            closed (Sequence[int]): Groups of which channels are removed. All
                others are kept with open gates.
            half (bool): True to remove about half of the channels and give
                the others random gates in (0, 1); False to remove all, which
                is compared in inference only.

        Returns:
            Outcome: The largest difference, or the first above the tolerance.
        """
        key = tuple(closed), half
        if key not in self.known:
            self.known[key] = self._measure(closed, half)
        return self.known[key]

    def _measure(self, closed: Sequence[int], half: bool) -> Outcome:
        openness = self._openness(closed, half)
        with torch.no_grad():
            self.gates.theta.copy_(theta_of(openness, self.gates.epsilon))
        if half:
            # The gated copy shares its biases with the model that is cut.
            centre_biases_(self.gated,
                           lambda: self._run_gated(self.num_required - 1))
        pruned, _ = cut(self.model, self.analysis, openness)
        self.failed_at = ''
        for name, module in pruned.named_modules():
            module.register_forward_pre_hook(self._remember(name))
        worst = 0.
        for index, (_, training) in enumerate(self.forwards):
            # Nothing needs to be trainable without any channel.
            if training and not half:
                continue
            wanted = self._run_gated(index)
            try:
                got = self._run(index, pruned, self.inputs)
            except Exception as error:  # a user's forward can raise anything
                return Outcome(math.inf, first_line(error))
            worst = max(worst, largest_difference(got, wanted))
            if worst > self.tolerance:
                break
        return Outcome(worst)

    def _openness(self, closed: Sequence[int], half: bool) -> Tensor:
        openness = torch.ones(self.analysis.num_gates)
        generator = torch.Generator().manual_seed(len(closed))
        for index in closed:
            gates = self.analysis.groups[index].gates
            # The number that is kept is odd and differs between groups, by
            # multiples of the golden ratio: a forward that expects a number,
            # or another group's number, must not find it by chance.
            golden = index * 0.618 % 1
            stay = len(gates) // 4 + int(golden * (len(gates) // 2 + 1)) | 1
            if len(gates) > 3:
                # One channel alone would be broadcast to a wrong shape.
                stay = max(stay, 3)
            number = len(gates) - stay * half
            order = torch.randperm(len(gates), generator=generator)
            openness[gates] = 0.3 + 0.6 * torch.rand(
                len(gates), generator=generator)
            openness[gates[order[:number]]] = 0
        return openness

    def _remember(self, name: str) -> Callable[..., None]:

        def begin(module: nn.Module, inputs: Any) -> None:
            self.failed_at = name

        return begin

    # -- where to look, and reasons ----------------------------------------

    def without_effect(self) -> dict[int, str]:
        """Return groups with a layer that runs without its gates, by index.

        Returns:
            dict[int, str]: The reason for each such group.
        """
        self.gates.used.clear()
        for index in range(len(self.forwards)):
            self._run_gated(index)
        reasons: dict[int, str] = {}
        for number, layer in enumerate(self.analysis.gated_layers()):
            module: Any = self.model.get_submodule(layer.name)
            if number not in self.gates.used:
                reason = 'uses the kernel itself; let it call its base class'
            elif _has_own_forward(module) and not self.exact((), half=True):
                # Open gates changed something, with no channel removed.
                reason = 'does more than the forward that gates replace'
            else:
                continue
            for index, group in enumerate(self.analysis.groups):
                if bool(torch.isin(layer.inputs, group.gates).any()):
                    reasons.setdefault(
                        index, f'no gate can act in {layer.name}: the forward '
                        f'of {type(module).__name__} {reason}')
        return reasons

    def reason(self, index: int) -> str:
        """Say why the surgery of a group by itself is not exact."""
        error = self.outcome((index, ), True).error
        return f'{_INEXACT} ({error})' if error else _INEXACT

    def same_role(self, index: int, suspects: Sequence[int]) -> list[int]:
        """Return groups whose modules differ only by numbers in their names.
        """
        role = _role(self.analysis, index)
        return [
            other for other in suspects if _role(self.analysis, other) == role
        ]

    def near_failure(self, suspects: Sequence[int]) -> list[tuple[int, ...]]:
        """Return groups around the module at which a forward last failed.

        The first ones touch that module, the next ones the module around it,
        and so on.
        """
        found: list[tuple[int, ...]] = []
        module = self.failed_at
        while module:
            near = tuple(
                index for index in suspects
                if any(f'{name}.'.startswith(f'{module}.')
                       for name in _members(self.analysis, index)))
            if near and near not in found:
                found.append(near)
            module = module.rpartition('.')[0]
        return found


def _name_of(forward: Forward) -> str:
    """Return what a forward runs by its name, e.g. "loss"."""
    # A callable object may have no name of its own.
    name = getattr(forward, '__name__', type(forward).__name__)
    return name.removesuffix('_forward')


def _shape_within(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Shape of one input whose sides are at most ``side``."""
    return (1, shape[1], *(min(side, length) for length in shape[2:]))


def _has_own_forward(module: nn.Module) -> bool:
    """Return True if gates on a layer would skip code of its own class.

    Gates replace the whole forward of a linear layer or a transposed
    convolution; of a convolution they only replace an inner method.
    """
    classes = (nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d,
               nn.ConvTranspose3d)
    return isinstance(module, classes) and type(module).forward not in [
        plain.forward for plain in classes
    ]


def _members(analysis: Analysis, index: int) -> tuple[str, ...]:
    group = analysis.groups[index]
    return group.writers + group.readers


def _role(analysis: Analysis, index: int) -> tuple[str, ...]:
    return tuple(
        re.sub(r'\d+', '', name) for name in _members(analysis, index))
