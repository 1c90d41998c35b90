"""Mixed precision where mmengine has none: bfloat16, also on a CPU."""
from __future__ import annotations

import contextlib
import warnings
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from ..registry import OPTIM_WRAPPERS
from ..report.precision import computes_in_bfloat16


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward passes under ``torch.autocast`` to bfloat16, on any device.

    mmengine's ``AmpOptimWrapper`` refuses a CPU. bfloat16 has the range of
    float32, so that no loss scale is needed. On CPUs with AMX or AVX512-BF16
    a training step takes about half the time of float32. A CPU without
    instructions for it takes twenty times as long; there, the passes stay in
    float32, and a warning says so.

    Examples:
        In a config: ``optim_wrapper = dict(type=
        'gdp_mmseg.BFloat16OptimWrapper')``.
    """

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of a forward pass in training."""
        device = next(model.parameters()).device.type
        is_quick = computes_in_bfloat16(device)
        if not is_quick:
            warnings.warn('BFloat16OptimWrapper: this CPU has no instructions '
                          'for bfloat16; the training runs in float32')
        with super().optim_context(model), torch.autocast(
                device, torch.bfloat16, enabled=is_quick):
            yield
