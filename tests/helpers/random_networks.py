"""Random networks, for the property that surgery is exact on all of them."""
from __future__ import annotations

import random
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (3, 8, 8)
# From the parts of a network (or of its copy) and the maps so far.
Step = Callable[[Any, list[Tensor]], Tensor]


class RandomNetwork(nn.Module):
    """Steps that each read earlier feature maps and add one.

    All maps are of ``(N, C, 8, 8)`` with their own C, which is even.

    Args:
        seed (int): The same seed gives the same network.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.parts = nn.ModuleList()
        self.program: list[Step] = []
        self.widths: list[int] = []
        self.kinds: list[str] = []
        width = self._width()
        stem = self._block(3, width)
        self._add(width, lambda p, maps: p[stem](maps[-1]), 'stem')
        for _ in range(self.random.randint(3, 9)):
            step = self.random.choice(STEPS)
            step(self)
            self.kinds += [step.__name__] * (
                len(self.widths) - len(self.kinds))
        # One block at least is between two convolutions.
        self.plain()
        self.kinds.append('plain')
        left = sorted({len(self.widths) - 1, *self._some(2)})
        head = self._part(
            nn.Conv2d(sum(self.widths[i] for i in left), 3, 1, bias=True))
        self._add(
            3, lambda p, maps: p[head]
            (torch.cat([maps[1 + i] for i in left], 1)), 'head')

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, 3, 8, 8) -> (N, 3, 8, 8)``."""
        maps = [inputs]
        for step in self.program:
            maps.append(step(self.parts, maps))
        return maps[-1]

    def _width(self) -> int:
        return self.random.choice([4, 6, 8, 12])

    def _part(self, module: nn.Module) -> int:
        """Add a module, by whose place a step finds it in any copy."""
        self.parts.append(module)
        return len(self.parts) - 1

    def _block(self, inputs: int, outputs: int, **options: Any) -> int:
        kernel = self.random.choice([1, 3])
        layers: list[nn.Module] = [
            nn.Conv2d(
                inputs,
                outputs,
                kernel,
                padding=kernel // 2,
                bias=self.random.random() < 0.5,
                **options)
        ]
        if self.random.random() < 0.7:
            layers.append(nn.BatchNorm2d(outputs))
        if self.random.random() < 0.7:
            layers.append(
                self.random.choice(
                    [nn.ReLU(),
                     nn.PReLU(outputs),
                     nn.GELU(),
                     nn.Hardswish()]))
        return self._part(nn.Sequential(*layers))

    def _pick(self) -> tuple[int, int]:
        """Place and width of an earlier map, late ones more often."""
        place = max(self.random.randrange(len(self.widths)) for _ in range(2))
        return place, self.widths[place]

    def _some(self, number: int) -> list[int]:
        return [self._pick()[0] for _ in range(number)]

    def _add(self, width: int, step: Step, kind: str = '') -> None:
        self.widths.append(width)
        self.program.append(step)
        if kind:
            self.kinds.append(kind)

    # -- steps: each reads maps[1 + place] ---------------------------------

    def plain(self) -> None:
        place, width = self._pick()
        outputs = self._width()
        body = self._block(width, outputs)
        self._add(outputs, lambda p, maps: p[body](maps[1 + place]))

    def residual(self) -> None:
        place, width = self._pick()
        inside = self._width()
        first = self._block(width, inside)
        second = self._block(inside, width)
        self._add(
            width, lambda p, maps: maps[1 + place] + p[second]
            (p[first](maps[1 + place])))

    def add_two(self) -> None:
        (one, width), (two, other) = self._pick(), self._pick()
        fit = self._block(other, width)
        self._add(
            width, lambda p, maps: F.relu(maps[1 + one] + p[fit]
                                          (maps[1 + two])))

    def padded(self) -> None:
        """Shortcut that is padded with channels of zeros."""
        place, width = self._pick()
        before, after = self.random.choice([(1, 1), (0, 2), (2, 4)])
        body = self._block(width, width + before + after)
        sides = (0, 0, 0, 0, before, after)
        self._add(
            width + before + after, lambda p, maps: F.relu(
                F.pad(maps[1 + place], sides) + p[body](maps[1 + place])))

    def concat(self) -> None:
        (one, width), (two, other) = self._pick(), self._pick()
        self._add(width + other,
                  lambda p, maps: torch.cat([maps[1 + one], maps[1 + two]], 1))

    def split(self) -> None:
        place, width = self._pick()
        body = self._block(width // 2, width // 2)

        def step(p: Any, maps: list[Tensor]) -> Tensor:
            left, right = maps[1 + place].chunk(2, 1)
            return torch.cat([left, p[body](right)], 1)

        self._add(width, step)

    def shuffle(self) -> None:
        place, width = self._pick()

        def step(p: Any, maps: list[Tensor]) -> Tensor:
            n, c, h, w = maps[1 + place].shape
            x = maps[1 + place].view(n, 2, c // 2, h, w)
            return x.transpose(1, 2).reshape(n, c, h, w)

        self._add(width, step)

    def depthwise(self) -> None:
        place, width = self._pick()
        times = self.random.choice([1, 2])
        body = self._block(width, times * width, groups=width)
        self._add(times * width, lambda p, maps: p[body](maps[1 + place]))

    def grouped(self) -> None:
        place, width = self._pick()
        groups = self.random.choice([2, width // 2])
        outputs = groups * self.random.choice([2, 4])
        body = self._block(width, outputs, groups=groups)
        self._add(outputs, lambda p, maps: p[body](maps[1 + place]))

    def transposed(self) -> None:
        place, width = self._pick()
        outputs = self._width()
        up = self._part(nn.ConvTranspose2d(width, outputs, 2, 2))
        self._add(outputs,
                  lambda p, maps: F.max_pool2d(p[up](maps[1 + place]), 2))

    def linear(self) -> None:
        place, width = self._pick()
        inside = self._width()
        first = self._part(nn.Linear(width, inside))
        second = self._part(nn.Linear(inside, width, bias=False))

        def step(p: Any, maps: list[Tensor]) -> Tensor:
            x = maps[1 + place].permute(0, 2, 3, 1)
            return p[second](F.gelu(p[first](x))).permute(0, 3, 1, 2)

        self._add(width, step)

    def shared(self) -> None:
        place, width = self._pick()
        body = self._block(width, width)
        self._add(width, lambda p, maps: p[body](p[body](maps[1 + place])))

    def gate(self) -> None:
        """Squeeze and excitation."""
        place, width = self._pick()
        inside = self._width()
        down = self._part(nn.Conv2d(width, inside, 1))
        up = self._part(nn.Conv2d(inside, width, 1))

        def step(p: Any, maps: list[Tensor]) -> Tensor:
            x = maps[1 + place]
            return x * p[up](p[down](x.mean(
                (2, 3), keepdim=True)).relu()).sigmoid()

        self._add(width, step)

    def attend(self) -> None:
        place, width = self._pick()
        query, key, value = (
            self._part(nn.Linear(width, size)) for size in (4, 4, width))

        def step(p: Any, maps: list[Tensor]) -> Tensor:
            x = maps[1 + place].flatten(2).transpose(1, 2)
            weights = (p[query](x) @ p[key](x).transpose(1, 2) / 2).softmax(-1)
            return (weights @ p[value](x)).transpose(1, 2).unflatten(2, (8, 8))

        self._add(width, step)

    def group_norm(self) -> None:
        place, width = self._pick()
        norm = self._part(nn.GroupNorm(width // 2, width))
        self._add(width, lambda p, maps: p[norm](maps[1 + place]))

    def layer_scale(self) -> None:
        place, width = self._pick()
        scale = self._part(nn.ParameterList([torch.ones(width)]))
        self._add(
            width, lambda p, maps: maps[1 + place] * p[scale][0].unsqueeze(-1).
            unsqueeze(-1))

    def softmax(self) -> None:
        """Mixes channels: these are frozen."""
        place, width = self._pick()
        self._add(width, lambda p, maps: maps[1 + place].softmax(1))


STEPS = (RandomNetwork.plain, RandomNetwork.plain, RandomNetwork.residual,
         RandomNetwork.residual, RandomNetwork.add_two, RandomNetwork.padded,
         RandomNetwork.concat, RandomNetwork.split, RandomNetwork.shuffle,
         RandomNetwork.depthwise, RandomNetwork.grouped,
         RandomNetwork.transposed, RandomNetwork.linear, RandomNetwork.shared,
         RandomNetwork.gate, RandomNetwork.attend, RandomNetwork.group_norm,
         RandomNetwork.layer_scale, RandomNetwork.softmax)
