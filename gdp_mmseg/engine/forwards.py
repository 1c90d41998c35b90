"""Forward passes of mm models: logits, training heads, predictions, losses.

An mm model does different things by ``mode``. Logits and training heads are
traced, so their layers get gates. Predictions and losses may run further
layers and read features themselves; they are run when the surgery is
verified, so that channels which such code depends on stay.
"""
from __future__ import annotations

import copy
from typing import Any, Iterator, Mapping

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..report.measure import count_flops


def inference_forward(network: Any, inputs: Tensor) -> Any:
    """Run what inference runs, up to the logits."""
    return network(inputs, mode='tensor')


def training_forward(network: Any, inputs: Tensor) -> Any:
    """Run what training runs, auxiliary heads included, up to the losses."""
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


def prediction_forward(network: Any, inputs: Tensor) -> list[Tensor]:
    """Run a prediction on made-up samples and return all its tensors."""
    return list(
        tensors_of(
            network(
                inputs,
                data_samples=samples_for(network, inputs),
                mode='predict')))


def loss_forward(network: Any, inputs: Tensor) -> list[Tensor]:
    """Compute the losses on made-up labels and return them."""
    losses = network(
        inputs, data_samples=samples_for(network, inputs), mode='loss')
    # mmengine adds up what has "loss" in its name; the rest, e.g. an accuracy,
    # may jump where a rounding changes the class of a pixel.
    return [
        tensor for name, value in losses.items() if 'loss' in name
        for tensor in tensors_of(value)
    ]


def count_inference_flops(network: nn.Module, input_shape: tuple[int,
                                                                 ...]) -> int:
    """Count the multiply-adds of an inference by torch's own counter.

    A prediction is counted where the model can predict on made-up samples;
    elsewhere, the logits.

    Args:
        network (nn.Module): An mm model.
        input_shape (tuple[int, ...]): ``(N, C, H, W)``.
    """
    logits = count_flops(network, input_shape, inference_forward)
    try:
        predicted = count_flops(network, input_shape, _whole_prediction)
    except Exception:  # the model needs samples of its own kind
        return logits
    return max(logits, predicted)


def _whole_prediction(network: Any, inputs: Tensor) -> list[Tensor]:
    """Predict on the whole input, also where a model slides a window."""
    settings = getattr(network, 'test_cfg', None)
    if isinstance(settings, Mapping) and settings.get('mode') == 'slide':
        network.test_cfg = copy.copy(settings)
        network.test_cfg['mode'] = 'whole'
    return prediction_forward(network, inputs)


def inputs_of_preprocessor(network: Any, shape: tuple[int, ...]) -> Any:
    """Return what the data preprocessor of a model makes of two images.

    Args:
        network (Any): An mm model.
        shape (tuple[int, ...]): Shape ``(C, H, W)`` of one image.

    Returns:
        Any: Value that the model's forward gets as its inputs; None if the
        preprocessor needs data of another kind.
    """
    images = torch.zeros(2, *shape)
    try:
        data = dict(
            inputs=list(images.byte()),
            data_samples=samples_for(network, images))
        return network.data_preprocessor(data, False)['inputs']
    except Exception:  # a user's preprocessor can raise anything
        return None


def samples_for(network: Any, inputs: Tensor) -> list[BaseDataElement]:
    """Make a data sample with labels for each image of a batch.

    Args:
        network (Any): A segmentor, or a classifier with ``head``.
        inputs (Tensor): ``(N, C, H, W)``.
    """
    height, width = inputs.shape[-2:]
    meta = dict(
        img_shape=(height, width),
        ori_shape=(height, width),
        pad_shape=(height, width),
        batch_input_shape=(height, width),
        padding_size=[0, 0, 0, 0],
        flip=False)
    if hasattr(network, 'head') and not hasattr(network, 'decode_head'):
        from mmpretrain.structures import DataSample
        return [
            DataSample(metainfo=meta).set_gt_label(index % 2).to(inputs.device)
            for index in range(len(inputs))
        ]
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    # Both classes of a binary head occur.
    labels = torch.arange(height * width, device=inputs.device) % 2
    return [
        SegDataSample(
            metainfo=meta,
            gt_sem_seg=PixelData(data=labels.reshape(1, height, width)))
        for _ in range(len(inputs))
    ]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield all tensors and arrays in nested outputs, data samples included.

    Mappings are read in the order of their keys, so that two models which
    fill them in another order can be compared.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in 'fiub':
        yield torch.from_numpy(value)
    elif isinstance(value, (BaseDataElement, Mapping)):
        for _, item in sorted(value.items(), key=lambda item: str(item[0])):
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
