"""ResNet for images of 32 x 32, with shortcuts that hold no parameters.

The networks of section 4.2 of "Deep Residual Learning for Image Recognition"
(CVPR 2016): depth 20, 32, 44, 56 or 110, and 16, 32 and 64 channels. A
shortcut that changes the shape takes every second row and column and pads the
channels with zeros (option A). mmpretrain's ``ResNet_CIFAR`` has wider stages
and convolutions in its shortcuts.
"""
from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS


class CIFARBlock(nn.Module):
    """Two convolutions of 3 x 3 and a shortcut without parameters.

    Args:
        in_channels (int): Channels of the input.
        channels (int): Channels of both convolutions.
        stride (int): Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        # Fixed numbers, so that a pruned block pads as many channels around
        # those that are left.
        before = (channels - in_channels) // 2
        self.padding = (before, channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C, H / stride, W / stride)``."""
        shortcut = x
        if self.stride > 1:
            shortcut = shortcut[:, :, ::self.stride, ::self.stride]
        if any(self.padding):
            shortcut = F.pad(shortcut, (0, 0, 0, 0, *self.padding))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


@MODELS.register_module()
class CIFARResNet(BaseModule):
    """Backbone of a classifier of images of 32 x 32.

    The keys of its state dict (``conv1``, ``bn1``, ``layer1.0.conv1`` ...) are
    those of https://github.com/akamaster/pytorch_resnet_cifar10, whose files
    of weights can be loaded by an ``init_cfg`` of type ``'Pretrained'``.

    Args:
        depth (int): Number of layers with the classifier, ``6 n + 2``.
        channels (tuple[int, ...]): Channels of the three stages. Defaults to
            (16, 32, 64).
        init_cfg (dict | list[dict], optional): Initialisation of the weights.
            Defaults to Kaiming's.

    Raises:
        ValueError: If the depth is not one of such a network.
    """

    def __init__(self,
                 depth: int = 56,
                 channels: tuple[int, ...] = (16, 32, 64),
                 init_cfg: Any = None) -> None:
        super().__init__(init_cfg or [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1., layer='BatchNorm2d')
        ])
        if depth < 8 or (depth - 2) % 6:
            raise ValueError('backbone.depth: expected 6 n + 2, e.g. 20, 32, '
                             f'44, 56 or 110, but got {depth}')
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.stages = [f'layer{index + 1}' for index in range(len(channels))]
        width = channels[0]
        for index, name in enumerate(self.stages):
            blocks = []
            for block in range((depth - 2) // 6):
                stride = 2 if index and not block else 1
                blocks.append(CIFARBlock(width, channels[index], stride))
                width = channels[index]
            setattr(self, name, nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map images ``(N, 3, H, W)`` to ``((N, 64, H / 4, W / 4), )``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return (x, )
