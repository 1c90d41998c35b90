"""Code that only a prediction or a loss runs keeps the channels it reads."""
from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import ConfigDict
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from gdp_mmseg.analysis.structure import Analysis
from gdp_mmseg.cost.counts import FlopCost
from gdp_mmseg.engine.forwards import (count_inference_flops,
                                       inference_forward, loss_forward,
                                       prediction_forward, tensors_of)
from gdp_mmseg.engine.model import analyse_model
from gdp_mmseg.gates.gdp import GDPGates
from gdp_mmseg.gates.layers import gate_
from gdp_mmseg.report.measure import count_flops
from gdp_mmseg.surgery.outputs import largest_difference, outputs_of
from gdp_mmseg.surgery.prune import prune

from helpers.project import build
from helpers.toys import BACKBONES, deeplab

SHAPE = (3, 32, 32)
# Channels of the first feature map.
LOW = BACKBONES['ResNet-18'].low


@MODELS.register_module()
class EdgeInLoss(EncoderDecoder):
    """A head beside the others, for training alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.edge = nn.Conv2d(LOW, 1, 1)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        losses = super().loss(inputs, data_samples)
        losses['loss_edge'] = self.edge(
            self.extract_feat(inputs)[0]).square().mean()
        return losses


@MODELS.register_module()
class RefinedPrediction(EncoderDecoder):
    """A convolution that corrects the logits of a prediction."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.refine = nn.Conv2d(LOW, self.num_classes, 1)

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any) -> Tensor:
        logits = super().encode_decode(inputs, batch_img_metas)
        low = self.refine(self.extract_feat(inputs)[0])
        return logits + F.interpolate(low, logits.shape[2:])


@MODELS.register_module()
class SmoothedPrediction(EncoderDecoder):
    """Features say which positions are alike; no layer reads them."""

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any) -> Tensor:
        logits = super().encode_decode(inputs, batch_img_metas)
        low = F.normalize(
            F.adaptive_avg_pool2d(self.extract_feat(inputs)[0], 4)).flatten(2)
        alike = (low.transpose(1, 2) @ low).mean((1, 2))
        return logits * alike[:, None, None, None]


@functools.lru_cache
def analysed(kind: str) -> tuple[nn.Module, Analysis]:
    """Build a small segmentor of a class of this file, and analyse it."""
    model = dict(
        deeplab(BACKBONES['ResNet-18']),
        type=kind,
        data_preprocessor=dict(type='SegDataPreProcessor'))
    model['backbone']['norm_cfg'] = dict(type='BN')
    net = build(ConfigDict(model)).eval()
    return net, analyse_model(net, SHAPE)[0]


@pytest.mark.parametrize('kind', [
    'EncoderDecoder', 'EdgeInLoss', 'RefinedPrediction', 'SmoothedPrediction'
])
def test_predictions_and_losses_are_the_same_when_pruned(kind: str) -> None:
    net, analysis = analysed(kind)
    openness = (torch.arange(analysis.num_gates) % 3 > 0).float()
    pruned, _ = prune(net, analysis, openness)
    dense_but_gated = zero_readers(net, analysis, openness)
    inputs = torch.randn(2, *SHAPE)
    for forward, training in ((inference_forward, False),
                              (prediction_forward, False), (loss_forward,
                                                            True)):
        got, wanted = (
            outputs_of(one, forward, inputs, training)
            for one in (pruned, dense_but_gated))
        assert largest_difference(got, wanted) < 1e-4


def zero_readers(net: nn.Module, analysis: Analysis,
                 openness: Tensor) -> nn.Module:
    """Return a copy whose kernels are multiplied by the gates."""
    gates = GDPGates(analysis.num_gates)
    gates.close_(openness == 0)
    gated = copy.deepcopy(net)
    gate_(gated, analysis, gates)
    return gated


@pytest.mark.parametrize('kind, low_stays', [('EncoderDecoder', False),
                                             ('EdgeInLoss', True),
                                             ('RefinedPrediction', True),
                                             ('SmoothedPrediction', True)])
def test_channels_that_such_code_reads_are_frozen(kind: str,
                                                  low_stays: bool) -> None:
    _, analysis = analysed(kind)
    frozen = {
        writer
        for row in analysis.frozen if 'not exact' in row.reason
        for writer in row.writers
    }
    assert any(name.startswith('backbone.layer1')
               for name in frozen) == low_stays


@pytest.mark.parametrize(
    'kind', ['EncoderDecoder', 'RefinedPrediction', 'SmoothedPrediction'])
def test_flops_are_those_of_the_prediction(kind: str) -> None:
    net, analysis = analysed(kind)
    flops = count_inference_flops(net, (1, *SHAPE))
    assert FlopCost(analysis).dense == flops
    logits = count_flops(net, (1, *SHAPE), inference_forward)
    assert (flops > logits) == (kind != 'EncoderDecoder')


def test_tensors_are_found_in_any_order_of_keys() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    first = list(tensors_of(dict(b=[two], a=(one, None))))
    second = list(tensors_of(dict(a=(one, ), b=[two, 'text'])))
    assert [tensor.shape
            for tensor in first] == [tensor.shape
                                     for tensor in second] == [(1, ), (2, )]
