"""Evaluation of models whose predictions draw random numbers."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip('mmseg')

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import PixelData

from gdp_mmseg.export.export import run_test

# Imported for its data set, which a config names.
import helpers.odd_models  # noqa: F401


class Guess(BaseModel):
    """Model that guesses the class of each pixel."""

    def forward(self,
                inputs: Any,
                data_samples: Any = None,
                mode: str = 'tensor') -> Any:
        for sample in data_samples:
            shape = sample.gt_sem_seg.data.shape
            sample.pred_sem_seg = PixelData(data=torch.randint(3, shape))
        return data_samples


def test_two_evaluations_draw_the_same_numbers() -> None:
    cfg = Config(
        dict(
            test_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(
                    type='TorchImages',
                    number=4,
                    bands=3,
                    size=(8, 8),
                    classes=3)),
            test_evaluator=dict(type='IoUMetric'),
            test_cfg=dict(type='TestLoop')))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = run_test(cfg, Guess())
    assert run_test(cfg, Guess()) == first
    assert torch.equal(torch.get_rng_state(), before)
