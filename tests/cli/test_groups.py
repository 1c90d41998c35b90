"""Tables of groups: long lists of modules are short, reasons are whole."""
from __future__ import annotations

import pytest

pytest.importorskip('mmengine')

from gdp_mmseg.cli.groups import show


def test_modules_are_cut_short_and_reasons_are_not(
        capsys: pytest.CaptureFixture[str]) -> None:
    reason = "not exact (RuntimeError: shape '[1, 3, 4]' is invalid)"
    show(
        dict(
            input_shape=[1, 3, 8, 8],
            macs=10**9,
            gates=4,
            groups=[
                dict(
                    writers=['a', 'b', 'c'],
                    readers=['d'],
                    channels=4,
                    flops_share=0.5)
            ],
            frozen=[dict(reason=reason, writers=['d', 'e'], channels=8)]))
    text = capsys.readouterr().out
    assert '| a and 2 more |' in text and 'd and 1 more' in text
    assert reason in text
