"""The user's own model with gates in it, and its pruned form.

Both are functions registered under the name that a config gives as ``type``.
They build the user's own class from the user's own, flat config and work on
that object, so its class, attributes and state-dict keys stay the same.
"""
from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
from typing import Any, Iterator, Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from ..analysis.analyse import analyse
from ..analysis.structure import Analysis, Layer, LayerCall
from ..analysis.tracer import ForwardError, fixed_seeds
from ..cost.counts import FlopCost
from ..pruner.settings import Gate, Settings
from ..registry import MODELS
from ..surgery.outputs import first_line
from ..surgery.verify import verify
from ..surgery.widths import apply_widths_
from .bare import without_random_weights
from .config import GATED, PRUNED, ModelConfig, default_base
from .forwards import (count_inference_flops, inference_forward,
                       inputs_of_preprocessor, loss_forward,
                       prediction_forward, training_forward)
from .hooked import HookedPruner
from .matching import fitting_of, refuse_others_, stored_analysis
from .start import StartFromExport

_KNOWN: contextvars.ContextVar[Mapping[str, Any]
                               | None] = contextvars.ContextVar(
                                   'known_gates', default=None)


@contextlib.contextmanager
def known_gates(gates: Mapping[str, Any] | None) -> Iterator[None]:
    """Let gated models that are built inside use a stored analysis.

    A resumed training takes the analysis from its checkpoint and neither
    traces nor verifies the model again.

    Args:
        gates (Mapping[str, Any], optional): Gates of a checkpoint, as
            :func:`gdp_mmseg.engine.matching.gate_meta` describes them. They
            are used for models that they belong to.
    """
    token = _KNOWN.set(gates)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def find_pruner(model: nn.Module) -> HookedPruner:
    """Return the pruner of a gated model, wrapped or not.

    Raises:
        ValueError: If the model has no gates.
    """
    network: Any = model
    while is_model_wrapper(network) or isinstance(network, BaseTTAModel):
        network = network.module
    pruner = getattr(network, 'gdp', None)
    if not isinstance(pruner, HookedPruner):
        raise ValueError('expected a model with gates, but got '
                         f'{type(network).__name__}; set model=dict(type='
                         "'gdp_mmseg.GDPModel', gdp=dict(target=0.4))")
    return pruner


@MODELS.register_module(name=GATED)
def build_gated_model(gdp: Mapping[str, Any] | None = None,
                      base: Any = None,
                      **model: Any) -> nn.Module:
    """Build a model of the user's own class with gates in it.

    Args:
        gdp (Mapping[str, Any]): See :class:`Settings`.
        base (Any, optional): Type of the user's model. Defaults to
            mmsegmentation's ``EncoderDecoder``; ``CascadeEncoderDecoder`` if
            there are several decode heads; mmpretrain's ``ImageClassifier``
            if there is none.
        **model: The rest of the user's model config, unchanged.

    Returns:
        nn.Module: Model of the class ``base`` with a :class:`HookedPruner`
        at ``gdp``.

    Raises:
        ValueError: If a setting is wrong or the model cannot be pruned.
    """
    config = ModelConfig('gated', base or default_base(model), gdp, model)
    settings, shape = config.settings, config.input_shape()
    network = build_base_model(base, model)
    analysis = stored_analysis(_KNOWN.get(), settings, shape,
                               network.state_dict())
    if analysis is None:
        _check_without_pretrained(network, config)
        analysis, _ = analyse_model(network, shape, settings.ignore,
                                    settings.only, settings.gate)
    return add_gates_(network, analysis, settings)


def _check_without_pretrained(network: nn.Module, config: ModelConfig) -> None:
    """Check that a model can be built without its pretrained weights.

    An export builds it so, because the weights may be elsewhere by then.

    Raises:
        ValueError: If it cannot, or has other parameters then.
    """
    bare = config.without_pretrained()
    # Texts, because parts may hold arrays, which have no single truth.
    if repr(bare.parts) == repr(config.parts):
        return
    try:
        # The random numbers of the training stay what they are.
        with fixed_seeds(), without_random_weights():
            built = build_base_model(bare.base, bare.parts).state_dict()
        found = {name: value.shape for name, value in built.items()}
    except Exception as error:  # a user's model can raise anything
        cause = first_line(error)
    else:
        wanted = {
            name: value.shape
            for name, value in network.state_dict().items()
        }
        other = [
            name for name in {
                **wanted,
                **found
            } if wanted.get(name) != found.get(name)
        ]
        if not other:
            return
        cause = f'another one ({other[0]} first)'
    raise ValueError(
        'model: expected the same model without its pretrained weights, as an '
        f'export builds it, but got {cause}; remove pretrained or init_cfg '
        'from the config, and pass the weights as load_from')


def add_gates_(network: nn.Module, analysis: Analysis,
               settings: Settings) -> nn.Module:
    """Put gates on an mm model and return it, in place.

    Args:
        network (nn.Module): The model that was analysed.
        analysis (Analysis): Its analysis.
        settings (Settings): Settings of the gates.

    Raises:
        ValueError: If the target is below the share that cannot be pruned.
    """
    pruner = HookedPruner(analysis, settings)
    network.gdp = pruner
    pruner.gate_(network)
    refuse_others_(network, fitting_of(analysis))
    return network


@MODELS.register_module(name=PRUNED)
def build_pruned_model(gdp: Mapping[str, Any] | None = None,
                       base: Any = None,
                       **model: Any) -> nn.Module:
    """Build a model of the user's own class with the widths of a pruned one.

    Args:
        gdp (Mapping[str, Any]): ``widths``, as an export wrote them, and
            optionally ``checkpoint``, the exported weights that a training
            starts from.
        base (Any, optional): See :func:`build_gated_model`.
        **model: The rest of the model config.

    Returns:
        nn.Module: Model of the class ``base``.

    Raises:
        ValueError: If the widths do not fit the model.
    """
    if not gdp or 'widths' not in gdp or not set(gdp) <= {
            'widths', 'checkpoint'
    }:
        raise ValueError('gdp: expected dict(widths=..., checkpoint=...) as '
                         'an export wrote it, but got '
                         f'{gdp if gdp is None else list(gdp)}')
    network: Any = build_base_model(base, model)
    refuse_others_(network, apply_widths_(network, gdp['widths']))
    if gdp.get('checkpoint'):
        network.init_weights = StartFromExport(network, gdp['checkpoint'])
    return network


def build_base_model(base: Any, parts: Mapping[str, Any]) -> nn.Module:
    """Build the user's model without gates, in the current default scope.

    Args:
        base (Any): Name or class of the model; None for the usual one.
        parts (Mapping[str, Any]): The rest of the model config.
    """
    return MMENGINE_MODELS.build(dict(parts, type=base or default_base(parts)))


def analyse_config(config: ModelConfig, gate: str | None = None) -> Analysis:
    """Analyse the model of a config, gated or not.

    Args:
        config (ModelConfig): Config of the model.
        gate (str, optional): Gate method. Defaults to that of the config.
    """
    settings = config.settings
    chosen = Gate(gate) if gate else settings.gate
    with without_random_weights():
        network = MMENGINE_MODELS.build(config.ungated)
    return analyse_model(network, config.input_shape(), settings.ignore,
                         settings.only, chosen)[0]


def analyse_model(
    network: nn.Module,
    shape: tuple[int, ...],
    ignore: Sequence[str] = (),
    only: Sequence[str] | None = None,
    gate: Gate = Gate()
) -> tuple[Analysis, float]:
    """Analyse an mm model, and verify on a copy that its surgery is exact.

    Args:
        network (nn.Module): The model without gates.
        shape (tuple[int, ...]): Shape ``(C, H, W)`` of one input.
        ignore (Sequence[str]): See :class:`Settings`.
        only (Sequence[str], optional): See :class:`Settings`.
        gate (Gate): Gate method; channels that it has no gates for are
            frozen.

    Returns:
        tuple[Analysis, float]: See :func:`gdp_mmseg.surgery.verify.verify`.

    Raises:
        ValueError: If the model cannot be pruned.
    """
    try:
        analysis = analyse(network, shape, inference_forward, training_forward,
                           ignore, only)
    except ForwardError as error:
        inputs = inputs_of_preprocessor(network, shape)
        if inputs is None or isinstance(inputs, torch.Tensor):
            raise
        raise ValueError(_several_inputs(network, inputs)) from error
    analysis, difference = verify(
        network, analysis, inference_forward, training_forward,
        [(prediction_forward, False),
         (loss_forward, True)], lambda line: print_log(
             f'GDP: {line}, on made-up samples; an export compares the '
             'networks on real ones',
             logger='current',
             level=logging.WARNING))
    analysis = gate.admitted(analysis, network)
    return _with_fixed_cost(network, analysis), difference


def _several_inputs(network: Any, inputs: Any) -> str:
    """Message for a model whose forward takes more than one tensor."""
    keys = f' with the keys {[*inputs]}' if isinstance(inputs, Mapping) else ''
    return ('model: expected a forward on one tensor of images (N, C, H, W), '
            f'but {type(network.data_preprocessor).__name__} makes a '
            f'{type(inputs).__name__}{keys} of them; let the data preprocessor'
            ' concatenate them along the channels and let extract_feat split '
            'them again, and set gdp.input_shape to the (C, H, W) of all '
            'channels together')


def _with_fixed_cost(network: nn.Module, analysis: Analysis) -> Analysis:
    """Add the FLOPs of a prediction that the logits do not need."""
    more = (
        count_inference_flops(network, analysis.input_shape) -
        FlopCost(analysis).dense)
    if more <= 0:
        return analysis
    none = torch.tensor([-1])
    layer = Layer('prediction', '', more, 1, none, none, False, True,
                  (LayerCall((more, )), ))
    return dataclasses.replace(analysis, layers=(*analysis.layers, layer))
