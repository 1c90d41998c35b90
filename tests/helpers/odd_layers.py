"""Parts of odd networks: blocks as users write them, each with one oddity.

Every block maps ``(N, C, H, W)`` to ``(N, C', H', W')`` and is made from its
two numbers of channels, which are even, and the kind of its norms.
"""
from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from helpers.toys import CachedBias


def norm(kind: str, channels: int) -> nn.Module:
    """Make a norm of a kind: BN, SyncBN, GN or none."""
    if kind == 'none':
        return nn.Identity()
    if kind == 'GN':
        return nn.GroupNorm(2 - channels % 2, channels)
    return (nn.SyncBatchNorm if kind == 'SyncBN' else nn.BatchNorm2d)(channels)


class Plain(nn.Sequential):
    """Convolution, norm and activation."""

    def __init__(self,
                 inputs: int,
                 outputs: int,
                 kind: str,
                 kernel: int = 3,
                 stride: int = 1,
                 groups: int = 1,
                 dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(
                inputs,
                outputs,
                kernel,
                stride,
                padding=dilation * (kernel // 2),
                groups=groups,
                dilation=dilation,
                bias=kind == 'none'), norm(kind, outputs), nn.ReLU())


class Residual(nn.Module):
    """Two residual blocks that add to the same stream."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind)
        self.bodies = nn.ModuleList(
            nn.Sequential(
                Plain(outputs, 8, kind), nn.Conv2d(8, outputs, 3, padding=1))
            for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for body in self.bodies:
            x = x + body(x)
        return F.relu(x)


class Concatenated(nn.Module):
    """A dense block: each layer reads all maps before it."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Plain(inputs + 6 * index, 6, kind) for index in range(2))
        self.last = Plain(inputs + 12, outputs, kind, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return self.last(torch.cat(maps, 1))


class Shuffle(nn.Module):
    """Half of the channels is convolved, then all are shuffled."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind, 1)
        self.branch = Plain(outputs // 2, outputs // 2, kind)

    def forward(self, x: Tensor) -> Tensor:
        still, moved = self.enter(x).chunk(2, 1)
        x = torch.cat([still, self.branch(moved)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Split(nn.Module):
    """Unequal parts of the channels take different ways."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs + 4, kind)
        self.left = Plain(4, 4, kind, 3)
        self.right = Plain(outputs, outputs, kind, 1)
        self.leave = Plain(outputs + 4, outputs, kind, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        left, right = torch.split(x, [4, x.shape[1] - 4], 1)
        return self.leave(torch.cat([self.right(right), self.left(left)], 1))


class SqueezeExcite(nn.Module):
    """Channels are weighted by a small network of their means."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.body = Plain(inputs, outputs, kind)
        self.squeeze = nn.Linear(outputs, 4)
        self.excite = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        weight = self.excite(F.relu(self.squeeze(x.mean((2, 3)))))
        return x * weight.sigmoid()[:, :, None, None]


class Depthwise(nn.Sequential):
    """Inverted bottleneck with a depthwise convolution."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 12, kind, 1), Plain(12, 12, kind, groups=12),
            Plain(12, outputs, kind, 1))


class Grouped(nn.Sequential):
    """Bottleneck with a grouped convolution."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 8, kind, 1), Plain(8, 8, kind, groups=2),
            Plain(8, outputs, kind, 1))


class Transposed(nn.Module):
    """Transposed convolution to twice the size, joined with a resized map."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, 6, 2, 2)
        self.leave = Plain(inputs + 6, outputs, kind, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        up = F.relu(self.up(x))
        return self.leave(torch.cat([F.interpolate(x, up.shape[-2:]), up], 1))


class Dilated(nn.Module):
    """Parallel convolutions of several dilations, joined with a pooled one."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            Plain(inputs, 4, kind, dilation=dilation)
            for dilation in (1, 2, 4))
        self.pooled = nn.Conv2d(inputs, 4, 1)
        self.leave = Plain(16, outputs, kind, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.adaptive_avg_pool2d(x, 1))
        return self.leave(
            torch.cat([branch(x) for branch in self.branches] +
                      [pooled.expand(-1, -1, *x.shape[-2:])], 1))


class StandardisedConv(nn.Conv2d):
    """Convolution whose kernel is standardised in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class Standardised(nn.Sequential):
    """Layers with weight standardisation between plain ones."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 8, kind), StandardisedConv(8, 8, 3, padding=1),
            nn.GroupNorm(2, 8), nn.ReLU(), Plain(8, outputs, kind))


class SpectralNorm(nn.Sequential):
    """Convolution under spectral norm."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 8, kind),
            parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
            nn.ReLU(), Plain(8, outputs, kind))


class OldSpectralNorm(nn.Sequential):
    """Convolution under spectral norm, as torch had it first."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 8, kind),
            nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU(),
            Plain(8, outputs, kind))


class WeightNorm(nn.Sequential):
    """Convolution under weight norm."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 8, kind),
            parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
            nn.ReLU(), Plain(8, outputs, kind))


class OldWeightNorm(nn.Sequential):
    """Convolution under weight norm, as torch had it first."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            Plain(inputs, 8, kind),
            nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU(),
            Plain(8, outputs, kind))


class SameConv(nn.Conv2d):
    """Convolution that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (side // 2 for side in self.kernel_size)
        x = F.pad(x, [columns, columns, rows, rows])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class ScaledConv(nn.Conv2d):
    """Convolution whose kernel is scaled by its fan-in (equalised rate)."""

    def forward(self, x: Tensor) -> Tensor:
        fan = self.weight[0].numel()
        return F.conv2d(x,
                        self.weight * (2 / fan)**0.5, self.bias, self.stride,
                        self.padding)


class OwnConv(nn.Sequential):
    """Convolutions of own classes."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(
            SameConv(inputs, 8, 3), norm(kind, 8), nn.ReLU(),
            ScaledConv(8, 8, 3, padding=1), nn.ReLU(),
            Plain(8, outputs, kind, 1))


class FloatSoftmax(nn.Module):
    """Attention with its softmax in single precision."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind, stride=2)
        self.query, self.key = nn.Conv2d(outputs, 4,
                                         1), nn.Conv2d(outputs, 4, 1)
        self.value = nn.Conv2d(outputs, 6, 1)
        self.leave = nn.Conv2d(6, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        query, key, value = (
            layer(x).flatten(2).float()
            for layer in (self.query, self.key, self.value))
        weight = (query.transpose(1, 2) @ key / 2.).softmax(-1)
        found = value @ weight.transpose(1, 2)
        return x + self.leave(
            found.to(x.dtype).view(x.shape[0], -1, *x.shape[2:]))


class FloatResize(nn.Module):
    """Resize in single precision, and back to the dtype of the input."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, 8, kind, stride=2)
        self.leave = Plain(8, outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        found = F.interpolate(
            self.enter(x).float(),
            x.shape[-2:],
            mode='bilinear',
            align_corners=False)
        return self.leave(found.to(x.dtype))


class Coordinates(nn.Module):
    """Convolution that also reads two maps of coordinates (float32)."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, 8, kind)
        self.leave = Plain(10, outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = torch.linspace(
            -1, 1, height, dtype=torch.float32, device=x.device)
        columns = torch.linspace(
            -1, 1, width, dtype=torch.float32, device=x.device)
        both = torch.stack(torch.meshgrid(rows, columns, indexing='ij'))
        return self.leave(
            torch.cat(
                [self.enter(x), both.expand(len(x), -1, -1, -1)], 1))


class State(nn.Module):
    """Running mean of the features in a buffer, and a count of the calls."""

    mean: Tensor

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.body = Plain(inputs, outputs, kind)
        self.register_buffer('mean', torch.zeros(1, outputs, 1, 1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.calls += 1
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3), keepdim=True), 0.1)
        return x - self.mean


class StateInInference(nn.Module):
    """Adaptive scale in a buffer that inference moves too."""

    scale: Tensor

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.body = Plain(inputs, outputs, kind)
        self.register_buffer('scale', torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * x.abs().mean().clamp(0.1, 10))
        return x / self.scale.clone()


class RandomBlock(nn.Module):
    """Residual branch that training drops by a random number.

    Args:
        source (str): Library that the number comes from.
    """
    source = 'torch'

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind)
        self.body = Plain(outputs, outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if not self.training:
            return x + self.body(x)
        if self.source == 'python' and random.random() < 0.3:
            return x
        if self.source == 'numpy':
            return x + self.body(x) * np.random.binomial(1, 0.7)
        keep = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.7
        return x + self.body(x) * keep.to(x)


class NumpyBlock(RandomBlock):
    """Branch dropped by a number of NumPy's."""
    source = 'numpy'


class PythonBlock(RandomBlock):
    """Branch dropped by a number of Python's."""
    source = 'python'


class NoiseInInference(nn.Module):
    """Noise from three generators, in inference too."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.body = Plain(inputs, outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        factor = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x * factor * (1 + 0.1 * torch.rand_like(x[:, :1]))


class CalledTwice(nn.Module):
    """One block, called twice in a row."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind)
        self.again = Plain(outputs, outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(self.enter(x)))


class TiedKernel(nn.Module):
    """Two convolutions that have the same parameter."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind)
        self.first = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(self.enter(x))))


class Heads(nn.Module):
    """Attention of two heads by reshapes that name their sizes."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = Plain(inputs, outputs, kind, stride=2)
        self.qkv = nn.Linear(outputs, 24)
        self.leave = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(n, h * w, 3, 2,
                                        4).permute(2, 0, 3, 1, 4)
        found = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        found = found.transpose(1, 2).reshape(n, h * w, 8)
        return x + self.leave(found).transpose(1, 2).reshape(n, c, h, w)


class GatedUnit(nn.Module):
    """Half of the channels weights the other half."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, 2 * outputs, 3, padding=1)
        self.norm = norm(kind, outputs)

    def forward(self, x: Tensor) -> Tensor:
        value, weight = self.enter(x).chunk(2, 1)
        return self.norm(value * weight.sigmoid())


class FrozenNorm(nn.Module):
    """Own ``train``, which keeps the norms in eval mode."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.body = Residual(inputs, outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        return self


class PlainWithCachedBias(nn.Sequential):
    """Own ``train``, which computes a bias once for inference."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__(Plain(inputs, outputs, kind), CachedBias(outputs))


# Blocks by the property of a project that they stand for.
BLOCKS: dict[str, type[nn.Module]] = {
    'residual': Residual,
    'concatenation': Concatenated,
    'channel shuffle': Shuffle,
    'channel split': Split,
    'squeeze and excite': SqueezeExcite,
    'depthwise': Depthwise,
    'grouped': Grouped,
    'transposed': Transposed,
    'dilated': Dilated,
    'weight standardisation': Standardised,
    'spectral norm': SpectralNorm,
    'old spectral norm': OldSpectralNorm,
    'weight norm': WeightNorm,
    'old weight norm': OldWeightNorm,
    'own convolution class': OwnConv,
    'softmax in float32': FloatSoftmax,
    'resize in float32': FloatResize,
    'float32 constants': Coordinates,
    'state in training': State,
    'state in inference': StateInInference,
    'torch random': RandomBlock,
    'numpy random': NumpyBlock,
    'python random': PythonBlock,
    'random in inference': NoiseInInference,
    'called twice': CalledTwice,
    'parameter in two modules': TiedKernel,
    'attention of heads': Heads,
    'gated linear unit': GatedUnit,
    'train keeps norms': FrozenNorm,
    'train caches a tensor': PlainWithCachedBias,
}
