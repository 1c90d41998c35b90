"""The record of the gates is cut back to an iteration."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from gdp_mmseg.report.record import drop_rows_after


@pytest.mark.parametrize('iteration, kept', [
    (0, ''),
    (1, '{"iter": 1}\n'),
    (2, '{"iter": 1}\n{"iter": 2, "flops": 0.5}\n'),
    (9, '{"iter": 1}\n{"iter": 2, "flops": 0.5}\n{"iter": 3}\n'),
])
def test_rows_after_an_iteration_and_torn_ones_go(tmp_path: Path,
                                                  iteration: int,
                                                  kept: str) -> None:
    path = tmp_path / 'gates.jsonl'
    path.write_text('{"iter": 1}\n{"iter": 2, "flops": 0.5}\n{"iter": 3}\n'
                    '{"iter": 4, "fl')
    drop_rows_after(path, iteration)
    assert path.read_text() == kept


def test_no_record_is_no_error(tmp_path: Path) -> None:
    drop_rows_after(tmp_path / 'gates.jsonl', 3)
    assert os.listdir(tmp_path) == []
