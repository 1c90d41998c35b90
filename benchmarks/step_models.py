"""Networks whose single training steps are timed."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from gdp_mmseg.engine.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'gdp_deeplabv3plus_voc.py'
CONFIGS = {
    'DeepLabV3Plus-ResNet50': CONFIG,
    'DeepLabV3Plus-MobileNetV2': ROOT / 'benchmarks' / 'configs' / 'voc.py',
}


def build(gated: bool, gate: str = 'gdp', config: Path = CONFIG) -> nn.Module:
    """Build the network of a VOC config with norms for one process."""
    cfg = load(config)
    cfg.model.update(type='gdp_mmseg.GDPModel', gdp=dict(target=0.4))
    cfg.model.gdp.update(gate=gate, input_shape=cfg.crop_size)
    model = cfg.model if gated else ModelConfig.of(cfg).ungated
    built = MODELS.build(model).train()
    if gated and gate == 'trainable':
        # With open gates alone, the kernels would stay as they are.
        built.gdp.gates.theta.data[::2] *= -1
    return built


def load(config: Path = CONFIG) -> Config:
    """Return a VOC config without pretrained weights and SyncBN."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    cfg.model.pretrained = None
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        cfg.model[part].norm_cfg = dict(type='BN', requires_grad=True)
    return cfg


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that mmseg uses for this config.

    Gates are no part of it: it never moves them in a training, where their
    step takes the gradient away.
    """
    parameters = [
        parameter for name, parameter in model.named_parameters()
        if not name.startswith('gdp.')
    ]
    return torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)


def outputs_of(model: Any, inputs: Tensor) -> list[Tensor]:
    """Return the outputs of both heads of a network in training."""
    features = model.extract_feat(inputs)
    return [
        head(features) for head in (model.decode_head, model.auxiliary_head)
    ]
