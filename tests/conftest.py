"""One thread for each test process: runs are small, machines shared."""
from __future__ import annotations

import importlib.util

import pytest
import torch

# What serves plain PyTorch models is tested without any mm package too.
pytest_plugins = ['helpers.project'
                  ] if importlib.util.find_spec('mmseg') else []


@pytest.fixture(autouse=True, scope='session')
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def mmseg_scope() -> None:
    """mmsegmentation's models, by their short names."""
    pytest.importorskip('mmseg')
    from mmseg.utils import register_all_modules
    register_all_modules()
