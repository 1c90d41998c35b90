"""The record of the gates names its groups, and is cut to an iteration."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gdp_mmseg.analysis.structure import Group
from gdp_mmseg.report.record import (GateRow, append_row, begin_record,
                                     read_rows)

from helpers.stages import network


def groups() -> tuple[Group, ...]:
    return network()[0].groups


def row(iteration: int) -> GateRow:
    return GateRow(iteration, 1., 0.5, 0.6, [0.25] * len(groups()))


def record(folder: Path, iterations: int) -> Path:
    """A record of some iterations."""
    path = folder / 'gates.jsonl'
    begin_record(path, groups(), 0)
    for iteration in range(1, iterations + 1):
        append_row(path, row(iteration))
    return path


def test_first_line_says_which_number_is_which_group(tmp_path: Path) -> None:
    first, second = record(tmp_path, 1).read_text().splitlines()
    assert json.loads(first)['groups'] == [
        dict(writers=['backbone.stem.0'], channels=6),
        dict(
            writers=['backbone.layer1.down', 'backbone.layer1.branch.3'],
            channels=6),
        dict(writers=['backbone.layer1.branch.0'], channels=4),
        dict(
            writers=['backbone.layer2.down', 'backbone.layer2.branch.3'],
            channels=6),
        dict(writers=['backbone.layer2.branch.0'], channels=4),
    ]
    assert len(json.loads(second)['openness']) == 5


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = record(tmp_path, 3)
    assert read_rows(path) == [row(1), row(2), row(3)]
    assert read_rows(path, until=2, groups=groups()) == [row(1), row(2)]


@pytest.mark.parametrize('iteration', [0, 1, 2, 9])
def test_rows_after_an_iteration_and_torn_ones_go(tmp_path: Path,
                                                  iteration: int) -> None:
    path = record(tmp_path, 3)
    with open(path, 'a') as file:
        file.write('{"iter": 4, "fl')
    begin_record(path, groups(), iteration)
    kept = read_rows(path, groups=groups())
    assert kept == [row(1), row(2), row(3)][:iteration]


def test_new_training_replaces_any_record(tmp_path: Path) -> None:
    path = tmp_path / 'gates.jsonl'
    path.write_text('{"iter": 1, "openness": [0.5]}\n')
    begin_record(path, groups(), 0)
    assert read_rows(path, groups=groups()) == []


def test_resume_without_a_record_begins_one(tmp_path: Path) -> None:
    path = tmp_path / 'gates.jsonl'
    for content in (None, ''):
        if content is not None:
            path.write_text(content)
        begin_record(path, groups(), 7)
        append_row(path, row(8))
        assert read_rows(path, groups=groups()) == [row(8)]


def _named(**first: Any) -> str:
    """First line of a record whose first group is another one."""
    group = dict(dict(writers=['backbone.stem.0'], channels=6), **first)
    return json.dumps(dict(groups=[group])) + '\n'


@pytest.mark.parametrize('content, came', [
    (_named(channels=8), r'whose group 0 is backbone\.stem\.0 \(8 channels\) '
     r'and not backbone\.stem\.0 \(6 channels\)'),
    (_named(writers=['head']), r'group 0 is head \(6 channels\) and not'),
    (_named(), 'with 1 groups and not 5'),
    ('{"iter": 1, "flops": 1.0, "openness": [0.5]}\n', 'names no groups'),
    ('{"groups": [{"wri', 'names no groups'),
])
def test_record_of_other_groups_is_refused_and_left_as_it_is(
        tmp_path: Path, content: str, came: str) -> None:
    path = tmp_path / 'gates.jsonl'
    path.write_text(content)
    with pytest.raises(ValueError, match=came):
        begin_record(path, groups(), 3)
    with pytest.raises(ValueError, match=came):
        read_rows(path, groups=groups())
    assert path.read_text() == content
    assert [one.name for one in tmp_path.iterdir()] == ['gates.jsonl']


@pytest.mark.parametrize('line, came', [
    ('{"iter": 1, "fl', 'Unterminated string'),
    ('{"iter": 1}', 'missing 4 required'),
    ('{"iter": 1, "flops": 1, "budget": 1, "held_cost": 1, "openness": [1]}',
     '1 numbers for 5 groups at iteration 1'),
])
def test_line_of_another_kind_is_refused(tmp_path: Path, line: str,
                                         came: str) -> None:
    path = record(tmp_path, 0)
    with open(path, 'a') as file:
        file.write(f'{line}\n')
    with pytest.raises(ValueError, match=came):
        read_rows(path)


def test_no_record_is_begun(tmp_path: Path) -> None:
    begin_record(tmp_path / 'gates.jsonl', groups(), 0)
    assert read_rows(tmp_path / 'gates.jsonl') == []
