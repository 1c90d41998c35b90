"""Time spared in programs of the tests, where nobody asks about it."""
from __future__ import annotations

import gc

from yapf.yapflib import yapf_api


def spare_time_() -> None:
    """Format no configs, and collect no garbage of what is imported by now.

    A training writes its config several times, and mmengine collects whenever
    it builds a data set. Either takes as long as ten iterations here.
    """
    yapf_api.FormatCode = lambda text, **_: (text, True)
    gc.freeze()
