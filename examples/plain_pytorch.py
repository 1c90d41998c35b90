"""A U-Net with a training loop of its own, pruned to 40 % of its FLOPs.

    python examples/plain_pytorch.py

Trains on drawn discs with gates, exports the pruned network, saves it, loads
it again and compares. Needs torch and gdp_mmseg, and about a minute on a CPU.
"""
from __future__ import annotations

import argparse
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdp_mmseg

SIDE = 64


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """U-Net with two levels below the input and skip connections."""

    def __init__(self, width: int = 24, classes: int = 2) -> None:
        super().__init__()
        self.top = nn.Sequential(block(3, width), block(width, width))
        self.middle = block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up_middle = block(6 * width, 2 * width)
        self.up_top = block(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, classes, H, W)`` for ``(N, 3, H, W)``."""
        top = self.top(images)
        middle = self.middle(F.max_pool2d(top, 2))
        bottom = self.bottom(F.max_pool2d(middle, 2))
        up = F.interpolate(bottom, scale_factor=2.)
        up = self.up_middle(torch.cat([up, middle], 1))
        up = F.interpolate(up, scale_factor=2.)
        return self.head(self.up_top(torch.cat([up, top], 1)))


def discs(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw bright discs on noise: images ``(N, 3, S, S)``, labels."""
    grid = torch.arange(float(SIDE))
    centre = torch.rand(number, 2, 1, 1, generator=generator) * SIDE
    radius = 8 + 12 * torch.rand(number, 1, 1, generator=generator)
    distance = torch.hypot(grid[:, None] - centre[:, 0],
                           grid[None] - centre[:, 1])
    labels = (distance < radius).long()
    noise = torch.randn(number, 3, SIDE, SIDE, generator=generator)
    return noise + labels[:, None], labels


def accuracy(model: nn.Module) -> float:
    """Share of the pixels of unseen images that get the right class."""
    images, labels = discs(32, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, save, load and compare."""
    parser = argparse.ArgumentParser(description='Prune a U-Net.')
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--file', default='unet_pruned.pt')
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = UNet()
    # Puts gates on the model; at the end, 40 % of its FLOPs are to be left.
    gated = gdp_mmseg.gate(
        model, (3, SIDE, SIDE), target=0.4, num_steps=args.steps)
    optimizer = torch.optim.SGD(
        gated.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(args.steps):
        images, labels = discs(8, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(gated(images), labels)
        loss.backward()
        gated.step(step)  # before optimizer.step()
        optimizer.step()
        if step % 50 == 0:
            print(f'step {step}: loss {loss.item():.3f}, '
                  f'FLOPs {gated.flops():.3f}')
    print(gated.summary())

    # Smaller layers, no gates, the same outputs.
    pruned, widths = gated.export()
    gdp_mmseg.save_pruned(pruned, widths, args.file)
    # Elsewhere: build the dense model, narrow it and load the weights.
    loaded = gdp_mmseg.load_pruned(UNet(), args.file)
    print(f'accuracy: gated {accuracy(gated):.4f}, '
          f'pruned {accuracy(pruned):.4f}, loaded {accuracy(loaded):.4f}')


if __name__ == '__main__':
    main()
