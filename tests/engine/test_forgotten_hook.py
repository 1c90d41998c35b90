"""A gated training without its hook says so at its start and at its end."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip('mmseg')

from helpers.project import Project, build_runner


def test_log_says_it_before_the_first_and_after_the_last_step(
        project: Project, tmp_path: Path) -> None:
    cfg = project.load(tmp_path, **{'train_cfg.max_iters': 2})
    del cfg.default_hooks['gdp']
    build_runner(cfg).train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    seen = re.findall(
        r'Iter\(train\) +\[\d/2\]|Saving checkpoint|nothing moves the gates'
        '|nothing moved the gates', log)
    assert seen == [
        'nothing moves the gates', 'Iter(train) [1/2]', 'Iter(train) [2/2]',
        'Saving checkpoint', 'nothing moved the gates'
    ]
