"""Precision in which a device trains best."""
from __future__ import annotations

import torch


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
    """Describe trainings by ``BFloat16OptimWrapper`` here, for a report."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if computes_in_bfloat16(device):
        return 'bfloat16 autocast in training, float32 in evaluation'
    return 'float32'
