"""Checkpoints of data sets whose metainfo holds more than plain types."""
from __future__ import annotations

import types
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmengine')

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from gdp_mmseg.engine.checkpoint import read_checkpoint
from gdp_mmseg.engine.resume import ResumeHook

Origin = namedtuple('Origin', ['sensor', 'year'])
METAINFO = dict(
    palette=np.array([[0, 0, 0], [9, 9, 9]], np.uint8),
    origin=Origin('radar', 2020),
    folder=Path('images') / 'all')


def test_metainfo_is_saved_as_plain_types_wherever_mmengine_keeps_it(
        tmp_path: Path) -> None:
    runner: Any = types.SimpleNamespace(model=nn.Linear(1, 1), cfg=Config())
    checkpoint: dict[str, Any] = dict(
        meta=dict(dataset_meta=METAINFO),
        state_dict=runner.model.state_dict(),
        message_hub=dict(runtime_info=dict(dataset_meta=METAINFO)))
    ResumeHook().before_save_checkpoint(runner, checkpoint)
    torch.save(checkpoint, tmp_path / 'iter_1.pth')
    _, meta = read_checkpoint(str(tmp_path / 'iter_1.pth'))
    expected = dict(
        palette=[[0, 0, 0], [9, 9, 9]],
        origin=('radar', 2020),
        folder='images/all')
    assert meta['dataset_meta'] == expected
    info = checkpoint['message_hub']['runtime_info']
    assert info['dataset_meta'] == expected
