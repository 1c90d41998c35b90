"""Kinds of reasons for which channels have no gate."""
from __future__ import annotations

import re
from collections import Counter
from typing import Iterable


def kind_of_reason(reason: str) -> str:
    """Shorten the reason of frozen channels to its kind.

    Examples:
        >>> kind_of_reason('native_layer_norm in backbone.layers.0.0.norm')
        'native_layer_norm'
        >>> kind_of_reason('head.weight is used without a call of its layer')
        'kernel used without a call of its layer'
        >>> kind_of_reason('auxiliary_head.conv_seg is for training only')
        'layer for training only'
        >>> kind_of_reason("not exact (RuntimeError: shape '[1]' is invalid)")
        'not exact'
    """
    reason = re.sub(r'^\S+ is used without', 'kernel used without', reason)
    reason = re.sub(r'^\S+ is for', 'layer for', reason)
    # The module or an error's message follows, different in each row.
    return re.split(r' in | \(', reason)[0]


def frozen_by_kind(frozen: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Count the channels without a gate by kind of reason, most first.

    Args:
        frozen (Iterable[tuple[str, int]]): Reasons and numbers of channels.
    """
    counts: Counter[str] = Counter()
    for reason, channels in frozen:
        counts[kind_of_reason(reason)] += channels
    return counts.most_common()
