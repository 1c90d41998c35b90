"""Mixed precision where mmengine has none: bfloat16, also on a CPU."""
from __future__ import annotations

import contextlib
import warnings
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from ..registry import OPTIM_WRAPPERS


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


def computes_in_bfloat16(device: str) -> bool:
    """Tell whether a type of device has instructions for bfloat16.

    Args:
        device (str): Type of the device, e.g. ``'cpu'``.
    """
    if device != 'cpu':
        return True
    # A build of torch may lack the library or the operator.
    supports = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
    return (torch.backends.mkldnn.is_available() and supports is not None
            and bool(supports()))


def precision_of_training() -> str:
    """Describe the precision of trainings with this wrapper, for a report."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if computes_in_bfloat16(device):
        return 'bfloat16 autocast in training, float32 in evaluation'
    return 'float32'
