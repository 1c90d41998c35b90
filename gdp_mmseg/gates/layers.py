"""Gates of a model: g norm(y) before a layer, conv(g x, W), or conv(x, W g).

Letters: ``G`` gates, ``C`` channels on an axis of a kernel.
"""
from __future__ import annotations

import functools
from typing import Any, Iterator, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..analysis.liveness import kept_slots
from ..analysis.structure import Analysis
from .base import GateMethod, has_processes
from .operators import Convolution, Matrix, Operator, Plain
from .scaling import Scaling, run

# Forwards of convolutions whose operator is known.
_FORWARDS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward,
             nn.Conv3d._conv_forward)


def gate_(model: nn.Module, analysis: Analysis, gates: GateMethod) -> None:
    """Put the gates of an analysis on a model, in place.

    They stand at batch norms where these can have them (see
    :class:`gdp_mmseg.analysis.structure.Group`), which costs nothing, and on
    the layers that read gated channels where not.

    Args:
        model (nn.Module): The model that was analysed, without gates.
        analysis (Analysis): Layers and the gates of their inputs.
        gates (GateMethod): ``G`` gates, as many as the analysis has.
    """
    gates.bind_(model)
    norms = {}
    for place in _places(model, analysis):
        if place.is_norm:
            norms[place.name] = _GatedNorm(place.module, gates, place.gated)
        else:
            gate_layer_(place.module, gates, place.gated)
    if norms:
        model.register_forward_pre_hook(_Keeper(norms))
        _restore_(model)


def ungate_(model: nn.Module, analysis: Analysis) -> None:
    """Take the gates off that :func:`gate_` put on a model, in place.

    Args:
        model (nn.Module): A model with gates.
        analysis (Analysis): The analysis that its gates are from.
    """
    for place, name, _ in _gated(model, analysis):
        delattr(place.module, name)
    hooks = model._forward_pre_hooks
    for key in [key for key in hooks if isinstance(hooks[key], _Keeper)]:
        del hooks[key]


def move_to_layers_(model: nn.Module, analysis: Analysis,
                    gates: GateMethod) -> Analysis:
    """Move the gates at norms to the layers behind them, in place.

    Args:
        model (nn.Module): A model with gates.
        analysis (Analysis): The analysis that its gates are from.
        gates (GateMethod): The gates.

    Returns:
        Analysis: The analysis of the model from now on.
    """
    ungate_(model, analysis)
    moved = analysis.at_layers()
    gate_(model, moved, gates)
    return moved


def select_slots_(model: nn.Module, analysis: Analysis, keep: Tensor) -> None:
    """Let the gated modules read the slots of some gates only, in place.

    Args:
        model (nn.Module): A model with gates, whose parameters have those
            slots.
        analysis (Analysis): The analysis that its gates are from.
        keep (Tensor): ``(G,)`` bool on the CPU.
    """
    for place, _, found in _gated(model, analysis):
        found.gates.lookup.replace_(found.index,
                                    place.gated[kept_slots(place.slots, keep)])


class _Place(NamedTuple):
    """Module with gates.

    Args:
        name (str): Name of the module.
        module (nn.Module): Layer or batch norm.
        is_norm (bool): Whether it is a batch norm.
        slots (Tensor): ``(C,)`` gate of each slot on its axis of channels, of
            inputs if it is a layer, -1 for none.
        gated (Tensor): The same, but -1 for a gate that stands elsewhere.
    """
    name: str
    module: nn.Module
    is_norm: bool
    slots: Tensor
    gated: Tensor


def _places(model: nn.Module, analysis: Analysis) -> Iterator[_Place]:
    """Yield the modules of a model that have gates."""
    norms = dict.fromkeys(norm for group in analysis.groups
                          for norm in group.norms)
    axes = [(name, True, analysis.gate_of_slot[f'{name}.weight', 0])
            for name in norms]
    axes += [(layer.name, False, layer.inputs)
             for layer in analysis.gated_layers()]
    for name, is_norm, slots in axes:
        here = analysis.stands_at(name)[slots.clamp(min=0)]
        gated = slots.masked_fill(~here, -1)
        if bool((gated >= 0).any()):
            yield _Place(name, model.get_submodule(name), is_norm, slots,
                         gated)


def _gated(model: nn.Module,
           analysis: Analysis) -> Iterator[tuple[_Place, str, _GatedForward]]:
    """Yield places, the method that gates replaced there, and what by."""
    _restore_(model)
    for place in _places(model, analysis):
        for name in ('forward', '_conv_forward'):
            found = vars(place.module).get(name)
            if isinstance(found, _GatedForward):
                yield place, name, found


def gate_layer_(layer: nn.Module, gates: GateMethod, slots: Tensor) -> None:
    """Put gates on the input channels of a layer, in place.

    They multiply its kernel or its inputs, whichever has fewer elements. Both
    give the same outputs and gradients, and the layer's parameters keep their
    names.

    Args:
        layer (nn.Module): Convolution, transposed convolution or linear
            layer.
        gates (GateMethod): Gates of the model.
        slots (Tensor): Gate of each slot on the kernel's axis of inputs, -1
            for none: ``(C_in,)``, for a grouped convolution ``(C_in /
            groups,)``.

    Raises:
        TypeError: If the layer is of another kind.
    """
    gated: Any = layer
    if isinstance(layer, nn.Linear):
        gated.forward = _GatedLinear(layer, gates, slots)
    elif isinstance(layer, _ConvTransposeNd):
        gated.forward = _GatedTransposed(layer, gates, slots)
    elif isinstance(layer, _ConvNd):
        gated._conv_forward = _GatedConvolution(layer, gates, slots)
    else:
        raise TypeError('expected a convolution or linear layer, but got '
                        f'{type(layer).__name__}')


class _GatedForward:
    """Replacement of a module's forward that multiplies by gates.

    It is an object and not a closure, because ``deepcopy`` (as in EMA) binds
    its attributes to the copied module and gates.

    Args:
        module (nn.Module): The module.
        gates (GateMethod): Gates of the model.
        slots (Tensor): See :func:`gate_layer_`.
    """

    def __init__(self, module: nn.Module, gates: GateMethod,
                 slots: Tensor) -> None:
        self.module = module
        self.gates = gates
        self.index = gates.lookup.add(slots)

    def factors(self, parameter: Tensor) -> Tensor:
        """Factors ``(C,)`` of the channels.

        Args:
            parameter (Tensor): What they change. If it is trained, the loss
                has a gradient without them.
        """
        factors = self.gates.slot_factors(self.index)
        # Wrappers of several processes wait for a gradient of theta.
        if self.heeded or has_processes() or not parameter.requires_grad:
            return factors
        return factors.detach()

    @property
    def heeded(self) -> bool:
        """Tell whether a gradient of the factors would be used."""
        return self.gates.heeded or not self.gates.training


class _GatedNorm(_GatedForward):
    """Batch norm times gates: its scale and shift are multiplied."""

    def __call__(self, inputs: Tensor) -> Tensor:
        norm: Any = self.module
        # A forward only reads these attributes of its module.
        found: Tensor = type(norm).forward(
            _Scaled(norm, self.factors(norm.weight)), inputs)
        return found


class _Keeper:
    """Hook that puts gates on norms again that other code has replaced.

    Frameworks do that with all batch norms of a model when a training begins,
    to synchronise them between processes, or to stop that.

    Args:
        norms (dict[str, _GatedNorm]): New forwards of norms by their names.
    """

    def __init__(self, norms: dict[str, _GatedNorm]) -> None:
        self.norms = norms

    def __call__(self, model: nn.Module, *_: Any) -> None:
        for name, gated in self.norms.items():
            norm: Any = model.get_submodule(name)
            if gated.module is not norm or 'forward' not in vars(norm):
                gated.module, norm.forward = norm, gated


def _restore_(model: nn.Module) -> None:
    """Put gates on norms again that other code has replaced, in place."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Keeper):
            hook(model)


class _Scaled:
    """View of a batch norm with another scale and shift.

    Args:
        norm (nn.Module): The norm.
        factors (Tensor): ``(C,)`` factors of both.
    """

    def __init__(self, norm: Any, factors: Tensor) -> None:
        self._norm = norm
        # What is found here is found much faster.
        vars(self).update(vars(norm), **norm._buffers)
        self.weight = norm.weight * factors
        self.bias = norm.bias * factors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._norm, name)


class _GatedLayer(_GatedForward):
    # Axis of the kernel along which its inputs lie.
    axis = 1

    def run(self, operator: Operator | Plain, inputs: Tensor, weight: Tensor,
            bias: Tensor | None, inputs_axis: int) -> Tensor:
        """Compute outputs with gates on inputs or kernel, the smaller one.

        Args:
            operator (Operator | Plain): Operator of the layer, or a plain
                function.
            inputs (Tensor): Inputs of the layer.
            weight (Tensor): Its kernel.
            bias (Tensor, optional): Its bias.
            inputs_axis (int): Axis of the inputs that has the channels.
        """
        factors = self.factors(weight)
        # The slots of a grouped kernel stand for one channel of each group.
        # A layer with a frozen kernel does not keep its inputs, which other
        # code may then change.
        of_inputs = (
            inputs.numel() < weight.numel() and weight.requires_grad
            and inputs.shape[inputs_axis] == len(factors))
        return run(
            operator, inputs, weight, bias, factors,
            Scaling(of_inputs, inputs_axis if of_inputs else self.axis,
                    self.gates.neutral, self.heeded))


class _GatedConvolution(_GatedLayer):

    def __call__(self, inputs: Tensor, weight: Tensor,
                 bias: Tensor | None) -> Tensor:
        return self.run(
            self._operator(inputs.dim() == weight.dim()), inputs, weight, bias,
            1 - weight.dim())

    def _operator(self, is_batch: bool) -> Operator | Plain:
        """Operator of the layer, or a plain function where it has no own."""
        layer: Any = self.module
        # The class's own method: the layer's attribute is this object.
        forward = type(layer)._conv_forward
        if (not is_batch or forward not in _FORWARDS
                or layer.padding_mode != 'zeros'
                or isinstance(layer.padding, str)):
            return functools.partial(forward, layer)
        return Convolution(layer.stride, layer.padding, layer.dilation, False,
                           layer.output_padding, layer.groups)


class _GatedTransposed(_GatedLayer):
    axis = 0

    def __call__(self,
                 inputs: Tensor,
                 output_size: list[int] | None = None) -> Tensor:
        layer: Any = self.module
        axes = len(layer.kernel_size)
        added = layer._output_padding(inputs, output_size, layer.stride,
                                      layer.padding, layer.kernel_size, axes,
                                      layer.dilation)
        operator = Convolution(layer.stride, layer.padding, layer.dilation,
                               True, tuple(added), layer.groups)
        is_batch = inputs.dim() == axes + 2
        outputs = self.run(operator, inputs if is_batch else inputs[None],
                           layer.weight, layer.bias, -1 - axes)
        return outputs if is_batch else outputs[0]


class _GatedLinear(_GatedLayer):

    def __call__(self, inputs: Tensor) -> Tensor:
        layer: Any = self.module
        return self.run(Matrix(), inputs, layer.weight, layer.bias, -1)
