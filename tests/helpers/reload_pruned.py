"""Run an exported pair with mmseg alone, then train it for one step.

In a process of its own: CONFIG CHECKPOINT INPUTS OUTPUTS WORK_DIR.
"""
from __future__ import annotations

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import init_model


def main() -> None:
    config, checkpoint, inputs, outputs, work_dir = sys.argv[1:]
    model = init_model(config, checkpoint, device='cpu')
    with torch.no_grad():
        logits = model(torch.load(inputs, weights_only=True), mode='tensor')
    torch.save(logits, outputs)

    cfg = Config.fromfile(config)
    cfg.work_dir = work_dir
    cfg.train_cfg.update(max_iters=1, val_interval=1000)
    cfg.default_hooks.checkpoint.interval = 1
    Runner.from_cfg(cfg).train()
    tuned = torch.load(
        f'{work_dir}/iter_1.pth', weights_only=False)['state_dict']
    before = torch.load(checkpoint, weights_only=True)['state_dict']
    if {
            key: tensor.shape
            for key, tensor in tuned.items()
    } != {
            key: tensor.shape
            for key, tensor in before.items()
    }:
        raise SystemExit('expected the fine-tuned state to fit the exported')
    moved = sum(not torch.equal(tuned[key], before[key]) for key in before)
    print(f'moved {moved} of {len(before)}')


if __name__ == '__main__':
    main()
