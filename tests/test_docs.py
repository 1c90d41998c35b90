"""Commands and configs of the pages work, and the reference is complete."""
from __future__ import annotations

import argparse
import ast
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import gdp_mmseg
from gdp_mmseg import __main__ as program
from gdp_mmseg.pruner.settings import Settings, Target

from helpers import ROOT

TUTORIAL = (ROOT / 'docs' / 'tutorial.md').read_text()
PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md')), *sorted(
        (ROOT / 'docs').glob('*.md'))
]
# What a page calls the clone.
CLONE = '/path/to/gdp_mmseg/'


def blocks(language: str, page: str = TUTORIAL) -> list[str]:
    """Blocks of a page in one language."""
    return re.findall(rf'^ *```{language}\n(.*?)^ *```', page, re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Words of each command in the blocks of a page."""
    text = '\n'.join(blocks('bash', page.read_text()))
    lines = text.replace('\\\n', ' ').replace('&&', '\n').splitlines()
    return [words for line in lines if (words := shlex.split(line, True))]


class Parsed(BaseException):
    """The flags of a command were accepted."""


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """The tutorial's gated config, beside the one that it inherits from."""
    pytest.importorskip('mmseg')
    for name, text in zip(('my_config', 'my_gdp_config'), blocks('python')):
        (tmp_path / f'{name}.py').write_text(text)
    return tmp_path / 'my_gdp_config.py'


def test_reference_describes_every_public_name_once() -> None:
    page = (ROOT / 'docs' / 'reference.md').read_text()
    names = re.findall(r'^\.\. [\w:]+:: gdp_mmseg\.(\w+)$', page, re.M)
    assert sorted(names) == sorted(gdp_mmseg.__all__)


def test_commands_of_the_pages_have_these_flags(
        monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('mmseg')
    parse = argparse.ArgumentParser.parse_args

    def parse_only(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_only)
    starts = {
        ('gdp-mmseg', ): program.main,
        ('python', '-m', 'gdp_mmseg'): program.main,
        ('python', '-m', 'gdp_mmseg.demo.data'): 'gdp_mmseg.demo.data:main'
    }
    found = set()
    for page in PAGES:
        for words in commands(page):
            for start, main in starts.items():
                if tuple(words[:len(start)]) != start:
                    continue
                monkeypatch.setattr(sys, 'argv', words[len(start) - 1:])
                try:
                    (main if callable(main) else pkgutil.resolve_name(main))()
                except Parsed:
                    found.add(words[len(start)])
                except SystemExit as end:
                    assert end.code == 0, (page.name, words)
    assert found >= set(program.COMMANDS)


def test_commands_of_the_pages_name_files_and_targets_that_exist() -> None:
    targets = re.findall(r'^\.PHONY: (.+)$', (ROOT / 'Makefile').read_text(),
                         re.M)[0].split()
    made = set()
    for page in PAGES:
        for words in commands(page):
            if words[0] == 'make':
                made.add(words[1])
            for word in words:
                name = word.partition(CLONE)[2] or word
                if word != name or name.startswith(('tools/', 'configs/')):
                    assert (ROOT / name).exists(), (page.name, word)
    assert len(made) > 4 and made <= set(targets)


def test_guide_names_the_lengths_that_are_refused_and_warned_of() -> None:
    page = (ROOT / 'docs' / 'guide.md').read_text()
    rows = re.findall(
        r'^\| `(\(.+\))` \| (\d+) iterations \| (\d+) iterations \|$', page,
        re.M)
    assert len(rows) == 2
    for phases, least, enough in rows:
        settings = Settings(Target(0.4), phases=ast.literal_eval(phases))
        assert settings.check_length(int(enough)) is None
        assert settings.check_length(int(enough) - 1) is not None
        settings.check_length(int(least))
        with pytest.raises(ValueError, match='gdp.phases'):
            settings.check_length(int(least) - 1)


def test_tutorial_prints_the_groups_of_its_config(
        gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from gdp_mmseg.cli.groups import describe, show
    from gdp_mmseg.engine.config import ModelConfig
    init_default_scope('mmseg')
    show(describe(ModelConfig.of(Config.fromfile(gated))))
    printed = capsys.readouterr().out.splitlines()
    block, = (block for block in blocks('text') if ' read by |' in block)
    shown = [line for line in block.splitlines() if line != '...']
    assert len(shown) > 10
    assert [line for line in shown if line not in printed] == []


def test_tutorial_trains_as_printed(gated: Path) -> None:
    pytest.importorskip('mmseg')
    from helpers.project import make_demo_data, run_tool
    folder = gated.parent
    make_demo_data(folder / 'data/shapes', train=6, val=1, size=128, seed=0)
    outcome = run_tool(
        'train.py',
        gated,
        '--work-dir',
        'out',
        '--cfg-options',
        'train_cfg.max_iters=2',
        'model.gdp.gate_travel=1',
        cwd=folder)
    assert outcome.status == 0, outcome.stderr
    assert (folder / 'out' / 'iter_2.pth').exists()
