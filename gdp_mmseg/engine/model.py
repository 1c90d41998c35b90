"""The user's own model with gates in it, and its pruned form.

Both are functions registered under the name that a config gives as ``type``.
They build the user's own class from the user's own, flat config and work on
that object: its class, attributes and state-dict keys stay what they were.
"""
from __future__ import annotations

from typing import Any, Mapping, Sequence

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from ..analysis.analyse import analyse
from ..analysis.structure import Analysis
from ..gates.layers import gate_layer_
from ..pruner.pruner import Pruner
from ..pruner.settings import Settings
from ..registry import MODELS
from ..surgery.verify import verify
from ..surgery.widths import Fitting, apply_widths_
from .checkpoint import refuse_others_
from .config import default_base, input_shape_of, split_config


def find_pruner(model: nn.Module) -> Pruner:
    """The :class:`Pruner` of a gated model, wrapped or not.

    Raises:
        ValueError: If the model has no gates.
    """
    network: Any = model
    while is_model_wrapper(network) or isinstance(network, BaseTTAModel):
        network = network.module
    pruner = getattr(network, 'gdp', None)
    if not isinstance(pruner, Pruner):
        raise ValueError('GDPHook: expected a model with gates, but got '
                         f"{type(network).__name__}; set model=dict(type="
                         "'gdp_mmseg.GDPModel', gdp=dict(target=0.4))")
    return pruner


@MODELS.register_module(name='GDPModel')
def build_gated_model(gdp: Mapping[str, Any] | None = None,
                      base: str | None = None,
                      **model: Any) -> nn.Module:
    """Build a model of the user's own class with gates in it.

    Args:
        gdp (Mapping[str, Any]): See :class:`Settings`.
        base (str, optional): The model's own ``type``. Defaults to
            mmsegmentation's ``EncoderDecoder``, ``CascadeEncoderDecoder`` if
            there are several decode heads, or, if there is none,
            mmpretrain's ``ImageClassifier``.
        **model: The rest of the user's model config, as it is.

    Returns:
        nn.Module: Of the class ``base``, with a :class:`Pruner` at ``gdp``.

    Raises:
        ValueError: If a setting is wrong or the model cannot be pruned.
    """
    settings = Settings.from_config(gdp)
    shape = input_shape_of(settings, model)
    network = build_base_model(base, model)
    analysis, _ = analyse_model(network, shape, settings.ignore, settings.only)
    network.gdp = Pruner(analysis, settings)
    for layer in analysis.gated_layers():
        gate_layer_(
            network.get_submodule(layer.name), network.gdp.gates, layer.inputs)
    refuse_others_(network, dict(_gated_axes(analysis), gdp=None))
    return network


def _gated_axes(analysis: Analysis) -> Fitting:
    """Of the backbone: no other weights of it are meant to be taken in part.

    Those of a head may be, from a network of another kind.
    """
    axes: Fitting = {}
    for name, axis in analysis.gate_of_slot:
        if name.startswith('backbone.'):
            axes[name] = (*(axes.get(name) or ()), axis)
    return axes


@MODELS.register_module(name='PrunedModel')
def build_pruned_model(gdp: Mapping[str, Any] | None = None,
                       base: str | None = None,
                       **model: Any) -> nn.Module:
    """Build a model of the user's own class with the widths of a pruned one.

    Args:
        gdp (Mapping[str, Any]): ``widths``, as an export wrote them.
        base (str, optional): See :func:`build_gated_model`.
        **model: The rest of the model config.

    Returns:
        nn.Module: Of the class ``base``.

    Raises:
        ValueError: If the widths do not fit the model.
    """
    if not gdp or set(gdp) != {'widths'}:
        raise ValueError("gdp: expected dict(widths=...) as an export wrote "
                         f'it, but got {gdp if gdp is None else list(gdp)}')
    network = build_base_model(base, model)
    refuse_others_(network, apply_widths_(network, gdp['widths']))
    return network


def build_base_model(base: str | None, model: Mapping[str, Any]) -> nn.Module:
    """Build the user's model without gates, in the current default scope."""
    return MMENGINE_MODELS.build(dict(model, type=base or default_base(model)))


def analyse_config(model: Mapping[str, Any]) -> Analysis:
    """Analyse the model of a config, with ``GDPModel`` or without.

    Args:
        model (Mapping[str, Any]): ``cfg.model``.
    """
    base, settings, plain = split_config(model)
    shape = input_shape_of(settings, plain)
    network = build_base_model(base, plain)
    return analyse_model(network, shape, settings.ignore, settings.only)[0]


def analyse_model(network: nn.Module,
                  shape: tuple[int, ...],
                  ignore: Sequence[str] = (),
                  only: Sequence[str] | None = None) -> tuple[Analysis, float]:
    """Analyse an mm model, and prove on a copy that its surgery is exact.

    Args:
        network (nn.Module): Without gates.
        shape (tuple[int, ...]): ``(C, H, W)``.
        ignore (Sequence[str]): See :class:`Settings`.
        only (Sequence[str], optional): Likewise.

    Returns:
        tuple[Analysis, float]: See :func:`gdp_mmseg.proof.prove`.

    Raises:
        ValueError: If the model cannot be pruned.
    """
    analysis = analyse(network, shape, inference_forward, training_forward,
                       ignore, only)
    return verify(network, analysis, inference_forward, training_forward)


def inference_forward(network: Any, inputs: Tensor) -> Any:
    """What inference runs."""
    return network(inputs, mode='tensor')


def training_forward(network: Any, inputs: Tensor) -> Any:
    """What training runs, but for the losses: with auxiliary heads."""
    heads = getattr(network, 'auxiliary_head', None)
    if heads is None:
        return [network(inputs, mode='tensor')]
    features: list[Any] = []
    plain = network.extract_feat

    def extract_feat(images: Tensor) -> Any:
        features.append(plain(images))
        return features[-1]

    # All heads read the same features, as when the losses are computed.
    network.extract_feat = extract_feat
    try:
        outputs = [network(inputs, mode='tensor')]
    finally:
        del network.extract_feat
    heads = heads if isinstance(heads, nn.ModuleList) else [heads]
    return outputs + [
        head(features[0] if features else plain(inputs)) for head in heads
    ]
