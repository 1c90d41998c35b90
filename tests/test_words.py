"""Docstrings begin as a sentence does; functions and modules stay short."""
from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Iterator

import pytest

from helpers import ROOT

SOURCES = sorted(
    path for folder in ('gdp_mmseg', 'tools', 'benchmarks')
    for path in (ROOT / folder).rglob('*.py'))
DOCUMENTED = [path for path in SOURCES if 'benchmarks' not in path.parts]
# Prepositions, pronouns and words of questions: with one of these in front, a
# docstring is understood only together with the name of what it describes.
FRAGMENT = re.compile(
    r'(About|Above|After|Against|Among|As|At|Before|Behind|Below|Besides'
    r'|Between|But|By|Beyond|Down|During|Except|For|From|He|Her|His|How|I|If'
    r'|In|Inside|Into|It|Its|Like|Of|Off|On|Onto|Our|Out|Outside|Over|She'
    r'|Since|Than|That|Their|Them|These|They|This|Those|Through|Till|To'
    r'|Towards|Under|Until|Up|Upon|We|What|When|Where|Whether|Which|While'
    r'|Who|Whom|Whose|Why|With|Within|Without|You|Your)\b')
LONGEST_FUNCTION = 60
LONGEST_MODULE = 400
# One rule for each operator, in one table.
LONG_MODULES = {'gdp_mmseg/analysis/operators.py'}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


def nodes(path: Path) -> Iterator[ast.AST]:
    """Everything in a module."""
    return ast.walk(ast.parse(path.read_text()))


def length(node: Function) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return lines - (docstring.count('\n') + 1 if docstring else 0)


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('line, is_fragment', [
    ('Of a layer, its name.', True),
    ('What to keep how much of.', True),
    ('Its groups.', True),
    ('Offsets of each layer.', False),
    ('Return the offsets.', False),
    ('Input of a layer.', False),
])
def test_fragments_are_known_by_their_first_word(line: str,
                                                 is_fragment: bool) -> None:
    assert bool(FRAGMENT.match(line)) == is_fragment


@pytest.mark.parametrize('path', DOCUMENTED, ids=where)
def test_docstrings_begin_as_a_sentence_does(path: Path) -> None:
    firsts = [(ast.get_docstring(node) or '').partition('\n')[0]
              for node in nodes(path) if isinstance(node, Documented)]
    assert [first for first in firsts if FRAGMENT.match(first)] == []


@pytest.mark.parametrize('path', SOURCES, ids=where)
def test_functions_are_short(path: Path) -> None:
    lengths = {
        node.name: length(node)
        for node in nodes(path) if isinstance(node, Function)
    }
    assert {
        name: lines
        for name, lines in lengths.items() if lines > LONGEST_FUNCTION
    } == {}


@pytest.mark.parametrize('path', SOURCES, ids=where)
def test_modules_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_MODULE or where(path) in LONG_MODULES
