"""Networks and data sets of odd projects, registered as a user's are.

A config of an odd project names this module in ``custom_imports``.
"""
from __future__ import annotations

import copy
from collections import namedtuple
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel, BaseModule
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.odd_layers import BLOCKS, Plain

Labels = Callable[[Sequence[Any]], Tensor]
# Metainfo of users: mmseg's own data sets have lists only.
Origin = namedtuple('Origin', ['sensor', 'year'])


def _blocks(in_channels: int, blocks: Sequence[Any],
            norm: str) -> nn.ModuleList:
    """Make the parts of a backbone from pairs of kind and channels."""
    widths = [8, *(channels for _, channels in blocks)]
    return nn.ModuleList([
        Plain(in_channels, 8, norm, stride=2),
        *(BLOCKS[kind](inputs, outputs, norm)
          for (kind, _), inputs, outputs in zip(blocks, widths, widths[1:]))
    ])


def _outputs(parts: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Run the parts of a backbone and return all maps but the first."""
    maps = []
    for part in parts:
        x = part(x)
        maps.append(x)
    return tuple(maps[1:])


@MODELS.register_module()
class OddNet(BaseModule):
    """Backbone of odd blocks.

    Args:
        in_channels (int): Bands of the images.
        blocks (Sequence): Pairs of the kind of a block and its channels.
        norm (str): Kind of the norms.
        overwrites (bool): Whether ``init_weights`` initialises all parts
            anew, without asking them.
        init_cfg (dict, optional): As in mmengine.
    """

    def __init__(self,
                 in_channels: int,
                 blocks: Sequence[Any],
                 norm: str = 'BN',
                 overwrites: bool = False,
                 init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.overwrites = overwrites
        self.parts = _blocks(in_channels, blocks, norm)

    def init_weights(self) -> None:
        """Initialise the weights, also those that were loaded."""
        if not self.overwrites:
            super().init_weights()
            return
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return _outputs(self.parts, x)


@MODELS.register_module()
class LeanNet(nn.Module):
    """Backbone of plain torch: no ``init_cfg``, other names of arguments."""

    def __init__(self, bands: int, layers: Sequence[Any], norm: str) -> None:
        super().__init__()
        self.parts = _blocks(bands, layers, norm)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return _outputs(self.parts, x)


@MODELS.register_module()
class OddHead(BaseDecodeHead):
    """Head of two convolutions.

    Args:
        dropped (bool): Whether features are dropped in inference too, as
            Monte Carlo dropout does.
        **options: Arguments of ``BaseDecodeHead``.
    """

    def __init__(self, dropped: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.dropped = dropped
        self.body = nn.Sequential(
            Plain(self.in_channels, self.channels, 'BN'),
            Plain(self.channels, self.channels, 'BN', 1))

    def forward(self, inputs: Any) -> Tensor:
        features = self.body(self._transform_inputs(inputs))
        if self.dropped:
            features = F.dropout2d(features, 0.3, training=True)
        return self.cls_seg(features)


@MODELS.register_module()
class OddSegmentor(EncoderDecoder):
    """Segmentor that does more in ``loss`` and ``predict`` than in `tensor`.

    Args:
        tricks (Sequence[str]): What it does, see the methods.
        widths (Sequence[int]): Channels of the first and last map.
        **options: Arguments of ``EncoderDecoder``.
    """

    def __init__(self,
                 tricks: Sequence[str] = (),
                 widths: Sequence[int] = (),
                 **options: Any) -> None:
        slow = copy.deepcopy(options['backbone'])
        super().__init__(**options)
        self.tricks = set(tricks)
        first, last = widths
        if 'edge head in loss' in tricks:
            self.edge = nn.Sequential(
                nn.Conv2d(last, 8, 3, padding=1), nn.ReLU(),
                nn.Conv2d(8, 1, 1))
        if 'contrast in loss' in tricks:
            self.projection = nn.Sequential(
                nn.Conv2d(first, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))
        if 'refinement in predict' in tricks:
            self.refine = nn.Conv2d(
                first + self.out_channels, self.out_channels, 3, padding=1)
        if self.tricks & {'teacher', 'mean teacher', 'average predicts'}:
            self.slow = MODELS.build(slow).requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise the weights, or let the parts do it."""
        if 'init_weights of parts' not in self.tricks:
            super().init_weights()
            return
        for part in (self.backbone, self.decode_head):
            if hasattr(part, 'init_weights'):
                part.init_weights()

    def encode_decode(self, inputs: Tensor, batch_img_metas: Any) -> Tensor:
        """Predict the logits of all pixels."""
        features = self.extract_feat(inputs)
        if 'average predicts' in self.tricks:
            features = self.slow(inputs)
        logits = self.decode_head.forward(features)
        if 'several passes' in self.tricks:
            logits = (logits + self.decode_head.forward(features)) / 2
        if 'affinity in predict' in self.tricks:
            logits = self._smooth(features[0], logits)
        if 'refinement in predict' in self.tricks:
            logits = self._refined(features[0], logits)
        return resize(logits, inputs.shape[-2:], mode='bilinear')

    def _smooth(self, features: Tensor, logits: Tensor) -> Tensor:
        """Average the logits of pixels with similar features."""
        near = F.adaptive_avg_pool2d(features, logits.shape[-2:]).flatten(2)
        near = F.normalize(near - near.mean(2, keepdim=True), dim=1)
        alike = (8 * near.transpose(1, 2) @ near).softmax(-1)
        smooth = logits.flatten(2) @ alike.transpose(1, 2)
        return smooth.view_as(logits)

    def _refined(self, features: Tensor, logits: Tensor) -> Tensor:
        logits = resize(logits, features.shape[-2:], mode='bilinear')
        return logits + self.refine(torch.cat([features, logits], 1))

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """Compute the losses, with those of the tricks."""
        losses = super().loss(inputs, data_samples)
        features = self.extract_feat(inputs)
        labels = torch.stack([one.gt_sem_seg.data for one in data_samples])
        labels = torch.where(labels == 255, 0, labels).float()
        if 'edge head in loss' in self.tricks:
            rim = F.max_pool2d(labels, 3, 1, 1) != labels
            edge = resize(
                self.edge(features[-1]), labels.shape[-2:], mode='bilinear')
            losses['edge.loss_bce'] = F.binary_cross_entropy_with_logits(
                edge, rim.float())
        if 'contrast in loss' in self.tricks:
            found = F.normalize(self.projection(features[0]), dim=1).flatten(2)
            small = F.interpolate(labels, features[0].shape[-2:]).flatten(2)
            same = (small.transpose(1, 2) == small).float()
            losses['loss_contrast'] = F.binary_cross_entropy_with_logits(
                5 * found.transpose(1, 2) @ found, same)
        if 'refinement in predict' in self.tricks:
            logits = self._refined(features[0],
                                   self.decode_head.forward(features))
            losses['loss_refined'] = resize(logits,
                                            labels.shape[-2:]).abs().mean()
        if self.tricks & {'teacher', 'mean teacher', 'average predicts'}:
            losses.update(self._slow_loss(inputs, features))
        return losses

    def _slow_loss(self, inputs: Tensor, features: Any) -> dict[str, Tensor]:
        """Compare with the slow network, and let it follow."""
        with torch.no_grad():
            wanted = self.slow(inputs)
            if self.training and 'teacher' not in self.tricks:
                for slow, fast in zip(self.slow.parameters(),
                                      self.backbone.parameters()):
                    slow.lerp_(fast, 0.1)
        if 'average predicts' in self.tricks:
            return {}
        return dict(loss_distill=F.mse_loss(features[-1], wanted[-1]))


@MODELS.register_module()
class LeanSegmentor(EncoderDecoder):
    """Segmentor without the argument ``init_cfg``."""

    def __init__(self,
                 backbone: Any,
                 decode_head: Any,
                 auxiliary_head: Any = None,
                 train_cfg: Any = None,
                 test_cfg: Any = None,
                 data_preprocessor: Any = None) -> None:
        super().__init__(
            backbone=backbone,
            decode_head=decode_head,
            auxiliary_head=auxiliary_head,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            data_preprocessor=data_preprocessor)


@MODELS.register_module()
class Tasks(BaseModel):
    """Several tasks on one backbone.

    Args:
        backbone (dict): Config of the backbone.
        heads (dict): Output channels of each head, ``segment`` among them.
        width (int): Channels that the heads read.
        container (str): Container of the outputs in tensor mode.
        data_preprocessor (dict, optional): As in mmengine.
    """

    def __init__(self,
                 backbone: Any,
                 heads: dict[str, int],
                 width: int,
                 container: str = 'dict',
                 data_preprocessor: Any = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.container = container
        self.heads = nn.ModuleDict({
            name:
            nn.Sequential(Plain(width, 6, 'BN'), nn.Conv2d(6, channels, 1))
            for name, channels in heads.items()
        })

    def forward(self,
                inputs: Tensor,
                data_samples: Any = None,
                mode: str = 'tensor') -> Any:
        features = self.backbone(inputs)
        found = {name: head(features[-1]) for name, head in self.heads.items()}
        if mode == 'tensor':
            if self.container == 'dict':
                return found
            return (list if self.container == 'list' else tuple)(
                found.values())
        found = {
            name: resize(logits, inputs.shape[-2:], mode='bilinear')
            for name, logits in found.items()
        }
        if mode == 'loss':
            labels = torch.stack([one.gt_sem_seg.data for one in data_samples])
            losses = {
                f'loss_{name}': logits.square().mean()
                for name, logits in found.items() if name != 'segment'
            }
            return dict(
                losses,
                loss_ce=F.cross_entropy(
                    found['segment'], labels.squeeze(1), ignore_index=255))
        for index, sample in enumerate(data_samples):
            for name, logits in found.items():
                sample.set_data({f'{name}_map': PixelData(data=logits[index])})
            logits = found['segment'][index]
            sample.set_data(
                dict(
                    seg_logits=PixelData(data=logits),
                    pred_sem_seg=PixelData(data=logits.argmax(0, True))))
        return data_samples


def _draw(index: int, bands: int, size: Sequence[int],
          classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image ``(C, H, W)`` and its labels ``(H, W)``."""
    random = np.random.default_rng(index)
    image = random.normal(90, 25, (bands, *size))
    labels = np.zeros(size, np.int64)
    for label in range(1, classes):
        top, left = (int(random.integers(0, side // 2)) for side in size)
        labels[top:top + 12, left:left + 12] = label
        image[label % bands, top:top + 12, left:left + 12] += 100
    labels[0, 0] = 255
    return image.clip(0, 255).astype(np.uint8), labels


def _packed(index: int, bands: int, size: Sequence[int],
            classes: int) -> dict[str, Any]:
    image, labels = _draw(index, bands, size, classes)
    sample = SegDataSample(
        metainfo=dict(
            img_shape=tuple(size), ori_shape=tuple(size), sample_idx=index))
    sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
    return dict(inputs=torch.from_numpy(image), data_samples=sample)


def _metainfo(kind: str, classes: int) -> dict[str, Any]:
    """Make the metainfo of a data set: lists, arrays or other objects."""
    names = tuple(f'class{index}' for index in range(classes))
    palette = np.arange(3 * classes, dtype=np.uint8).reshape(-1, 3)
    if kind == 'arrays':
        return dict(classes=names, palette=palette, gain=np.float32(0.5))
    if kind == 'objects':
        return dict(
            classes=names,
            palette=palette.tolist(),
            origin=Origin('sensor', 2020),
            folder=Path('images') / 'all')
    return dict(classes=names, palette=palette.tolist())


@DATASETS.register_module()
class TorchImages(torch.utils.data.Dataset):
    """Data set of plain torch, drawn in memory."""

    def __init__(self,
                 number: int,
                 bands: int,
                 size: Sequence[int],
                 classes: int,
                 meta: str = 'lists',
                 root: Any = None) -> None:
        self.number = number
        self.image = bands, size, classes
        self.metainfo = _metainfo(meta, classes)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.number:
            raise IndexError(index)
        return _packed(index, *self.image)


@TRANSFORMS.register_module()
class DrawImage(BaseTransform):
    """Transform that draws an image instead of loading it."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return _packed(*results['drawn'])


@DATASETS.register_module()
class MMEngineImages(BaseDataset):
    """Data set of mmengine's class, drawn by its pipeline."""

    def __init__(self,
                 number: int,
                 bands: int,
                 size: Sequence[int],
                 classes: int,
                 meta: str = 'lists',
                 root: Any = None) -> None:
        self.number = number
        self.image = bands, tuple(size), classes
        super().__init__(
            metainfo=_metainfo(meta, classes),
            serialize_data=False,
            pipeline=[dict(type='DrawImage')])

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the images."""
        return [
            dict(drawn=(index, *self.image)) for index in range(self.number)
        ]
