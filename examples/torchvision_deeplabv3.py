"""torchvision's DeepLabV3-MobileNetV3, pruned to half of its FLOPs.

    python examples/torchvision_deeplabv3.py

The loop is one as in torchvision's references, shortened: the loss of the
auxiliary head, gradient clipping, a polynomial learning rate. The images are
noise, so replace ``batches`` by a loader of your own data.
"""
from __future__ import annotations

import argparse
from typing import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import gdp_mmseg

SIDE = 96
NUM_CLASSES = 5


def build() -> nn.Module:
    """Build the dense network; ``weights='DEFAULT'`` loads a trained one."""
    return deeplabv3_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CLASSES,
        aux_loss=True)


def batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images ``(N, 3, H, W)`` and their labels ``(N, H, W)``."""
    for _ in range(number):
        images = torch.randn(4, 3, SIDE, SIDE)
        yield images, torch.randint(NUM_CLASSES, (4, SIDE, SIDE))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with gates, export and save."""
    parser = argparse.ArgumentParser(description='Prune DeepLabV3.')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--file', default='deeplabv3_pruned.pt')
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    gated = gdp_mmseg.gate(
        build(), (3, SIDE, SIDE), target=0.5, num_steps=args.steps)
    optimizer = torch.optim.SGD(
        gated.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(
        optimizer, args.steps, power=0.9)
    for step, (images, labels) in enumerate(batches(args.steps)):
        optimizer.zero_grad()
        outputs = gated(images)
        loss = F.cross_entropy(outputs['out'], labels)
        loss = loss + 0.5 * F.cross_entropy(outputs['aux'], labels)
        loss.backward()
        gated.step(step)  # before the gradients are clipped
        nn.utils.clip_grad_norm_(gated.parameters(), 10.)
        optimizer.step()
        schedule.step()
    print(gated.summary())

    pruned, widths = gated.export()
    gdp_mmseg.save_pruned(pruned, widths, args.file)
    loaded = gdp_mmseg.load_pruned(build(), args.file).eval()
    images, _ = next(batches(1))
    with torch.no_grad():
        difference = (loaded(images)['out'] -
                      gated.eval()(images)['out']).abs().max()
    print(f'gated and loaded outputs differ by {difference.item():.1e}')


if __name__ == '__main__':
    main()
