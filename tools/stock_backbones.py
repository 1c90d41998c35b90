"""Stock backbones under a small segmentation head, for check_models.py.

All backbones of mmpretrain's registry, one model for each of many families of
timm, and a few classifiers of torchvision. Every model is built with random
weights; nothing is downloaded.
"""
from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor, nn

from gdp_mmseg.cli.check import Candidate, check_candidate

# Sides of the input, of which the first that a backbone accepts is used.
SIDES = (64, 128, 224, 256)
NUM_CLASSES = 5
# Arguments of mmpretrain's backbones: a small variant where a class has
# several, and a feature map where the default is a vector of classification.
# Classes that are not listed are built with their defaults.
_TOKENS = dict(img_size=64, out_type='featmap')
_OPTIONS: dict[str, dict[str, Any]] = dict(
    BEiTViT=_TOKENS,
    ConvNeXt=dict(arch='atto', gap_before_final_norm=False),
    CSPDarkNet=dict(depth=53),
    CSPResNeXt=dict(depth=50),
    CSPResNet=dict(depth=50),
    DeiT3=dict(arch='small', **_TOKENS),
    DistilledVisionTransformer=dict(arch='deit-tiny', **_TOKENS),
    EdgeNeXt=dict(gap_before_final_norm=False),
    EfficientFormer=dict(reshape_last_feat=True),
    HRNet=dict(arch='w18'),
    HiViT=dict(arch='tiny', img_size=64),
    HorNet=dict(gap_before_final_norm=False),
    LeViT=dict(arch='128s', img_size=64),
    MlpMixer=dict(arch='small', img_size=64),
    MobileOne=dict(arch='s0'),
    MobileViT=dict(arch='xx_small'),
    PCPVT=dict(arch='small'),
    PyramidVig=dict(arch='tiny'),
    RegNet=dict(arch='regnetx_400mf'),
    RepLKNet=dict(arch='31B'),
    RepMLPNet=dict(arch='B'),
    RepVGG=dict(arch='A0'),
    Res2Net=dict(depth=50),
    ResNeSt=dict(depth=50),
    ResNeXt=dict(depth=50),
    ResNet=dict(depth=18),
    ResNetV1c=dict(depth=18),
    ResNetV1d=dict(depth=18),
    ResNet_CIFAR=dict(depth=18),
    RevVisionTransformer=dict(arch='deit-tiny', **_TOKENS),
    SEResNeXt=dict(depth=50),
    SEResNet=dict(depth=50),
    SVT=dict(arch='small'),
    SparseResNet=dict(depth=50),
    T2T_ViT=_TOKENS,
    TNT=dict(arch='s'),
    TinyViT=dict(gap_before_final_norm=False),
    VGG=dict(depth=11),
    ViTEVA02=_TOKENS,
    ViTSAM=dict(img_size=64),
    Vig=dict(arch='tiny'),
    VisionTransformer=dict(arch='deit-tiny', **_TOKENS),
    XCiT=dict(img_size=64, embed_dims=192, num_heads=4, out_type='featmap'))
_TIMM = ('coatnet_nano_rw_224', 'convnext_atto', 'convnextv2_atto',
         'cs3darknet_s', 'cspresnet50', 'darknet53', 'densenet121', 'dla34',
         'dm_nfnet_f0', 'dpn68', 'edgenext_xx_small', 'efficientformer_l1',
         'efficientnet_b0', 'efficientnetv2_rw_t', 'ese_vovnet19b_dw',
         'fastvit_t8', 'gernet_s', 'ghostnet_100', 'hardcorenas_a',
         'hrnet_w18', 'inception_v3', 'inception_v4', 'lcnet_050',
         'levit_128s', 'maxvit_nano_rw_256', 'mixnet_s', 'mnasnet_100',
         'mobilenetv2_100', 'mobilenetv3_small_100', 'mobileone_s0',
         'nf_regnet_b0', 'poolformer_s12', 'pvt_v2_b0', 'regnetx_004',
         'regnety_004', 'repvgg_a0', 'res2net50_26w_4s', 'resnest14d',
         'resnet18', 'resnet50d', 'resnext50_32x4d', 'rexnet_100',
         'selecsls42', 'seresnet50', 'skresnet18',
         'swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256',
         'tinynet_a', 'tresnet_m', 'twins_pcpvt_small', 'visformer_tiny',
         'xception41')
_TORCHVISION = ('convnext_tiny', 'efficientnet_b0', 'mnasnet0_5',
                'mnasnet0_75', 'mnasnet1_0', 'mnasnet1_3',
                'mobilenet_v3_small', 'resnet18', 'swin_v2_t', 'vit_b_16')


def stock() -> list[str]:
    """Return the names of all backbones, e.g. ``'timm/resnet18'``."""
    from mmpretrain.models import backbones
    names = dict(
        mmpretrain=sorted(set(backbones.__all__) - {'TIMMBackbone', 'CSPNet'}),
        timm=_TIMM,
        torchvision=_TORCHVISION)
    return [
        f'{library}/{model}' for library, models in names.items()
        for model in models
    ]


def check_backbone(name: str) -> dict[str, Any]:
    """Check one backbone (see :func:`gdp_mmseg.cli.check.check_candidate`).

    Args:
        name (str): One of :func:`stock`.
    """
    library, _, model = name.partition('/')
    row = check_candidate(name, model, lambda: _candidate(library, model))
    return dict(row, library=_with_version(library))


def _with_version(library: str) -> str:
    """Return the name of a library with its version, if it is installed."""
    # The maintained fork of an mm package has a name of its own.
    for package in (library, f'onedl-{library}'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f'{library} {importlib.metadata.version(package)}'
    return library


def _candidate(library: str, model: str) -> Candidate:
    """Build one model; return it with an input shape that it accepts."""
    if library == 'torchvision':
        import torchvision
        return Candidate(
            _PlainCall(torchvision.models.get_model(model)).eval(),
            [(3, 224, 224)])
    from mmengine.registry import MODELS, init_default_scope
    init_default_scope('mmseg')
    backbone = _backbone(library, model)
    last, side = _last_output(MODELS.build(backbone))
    if last.dim() == 4:
        whole = _segmentor(backbone, last.shape[1])
    else:
        init_default_scope('mmpretrain')
        whole = _classifier(backbone, last.shape[1])
    network = MODELS.build(whole)
    return Candidate(network.eval(), [(3, side, side)])


def _segmentor(backbone: dict[str, Any], channels: int) -> dict[str, Any]:
    """Return the config of a segmentor that reads the last feature map."""
    head = dict(
        type='FCNHead',
        in_channels=channels,
        in_index=-1,
        channels=32,
        num_convs=1,
        num_classes=NUM_CLASSES,
        norm_cfg=dict(type='BN'),
        align_corners=False)
    return dict(
        type='EncoderDecoder',
        backbone=backbone,
        decode_head=head,
        train_cfg=dict(),
        test_cfg=dict(mode='whole'))


def _classifier(backbone: dict[str, Any], channels: int) -> dict[str, Any]:
    """Return the config of a classifier that reads one vector per image."""
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=backbone,
        head=dict(
            type='LinearClsHead',
            in_channels=channels,
            num_classes=NUM_CLASSES))


def _backbone(library: str, model: str) -> dict[str, Any]:
    """Return the config of a backbone, as a user of mmseg would write it."""
    if library == 'timm':
        return dict(
            type='TIMMBackbone',
            model_name=model,
            features_only=True,
            pretrained=False)
    import mmpretrain.models  # noqa: F401, fills the registry
    return dict(type=f'mmpretrain.{model}', **_OPTIONS.get(model, {}))


def _last_output(backbone: nn.Module) -> tuple[Tensor, int]:
    """Run a backbone; return its last output and the side of the input.

    Returns:
        tuple[Tensor, int]: A feature map ``(1, C, H, W)`` or a vector
        ``(1, C)``, and the side in pixels.

    Raises:
        ValueError: If the backbone gives neither at any side.
    """
    # Not chained, because train() of some backbones returns nothing.
    backbone.eval()
    found: list[str] = []
    for side in SIDES:
        try:
            with torch.no_grad():
                last: Any = backbone(torch.zeros(1, 3, side, side))[-1]
        except Exception as error:  # the side may not suit the backbone
            found.append(f'{error} at {side} x {side}')
            continue
        if isinstance(last, Tensor) and last.dim() in (2, 4):
            return last, side
        shape = getattr(last, 'shape', None)
        kind = type(last).__name__ if shape is None else tuple(shape)
        found.insert(0, f'{kind} at {side} x {side}')
    raise ValueError('expected a feature map or a vector as the last output '
                     f'of the backbone, but got {found[0]}')


class _PlainCall(nn.Module):
    """Model that takes nothing but images, with the forward of an mm model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self,
                inputs: Tensor,
                data_samples: Any = None,
                mode: str = 'tensor') -> Any:
        return self.network(inputs)
