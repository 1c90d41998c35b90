"""Sections of generated pages."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence


@dataclass(frozen=True)
class Section:
    """Section of a page on one report.

    Args:
        title (str): Heading.
        body (list[str]): Lines of tables, pictures and text.
        facts (list[str]): Sentences on the conditions, in a list below them.
    """

    title: str
    body: list[str]
    facts: list[str]


def chapter(title: str, intro: Sequence[str],
            sections: Sequence[Section]) -> list[str]:
    """Return the lines of some sections of one kind.

    Facts that all of them share are said once, at the top.

    Args:
        title (str): Heading of the chapter; not used for a single section.
        intro (Sequence[str]): Facts that are said in any case.
        sections (Sequence[Section]): Sections of the chapter.
    """
    if len(sections) == 1:
        (only, ) = sections
        return _lines(f'## {only.title}',
                      Section(only.title, only.body, [*intro, *only.facts]))
    shared = [
        fact for fact in (sections[0].facts if sections else ())
        if all(fact in section.facts for section in sections)
    ]
    lines = [f'## {title}', '', *_items([*intro, *shared])] * bool(sections)
    for section in sections:
        own = [fact for fact in section.facts if fact not in shared]
        lines += _lines(f'### {section.title}',
                        Section(section.title, section.body, own))
    return lines


def _lines(heading: str, section: Section) -> list[str]:
    return [
        heading, '', *section.body, *[''] * bool(section.body),
        *_items(section.facts)
    ]


def _items(facts: Sequence[str]) -> list[str]:
    """Return a list of facts and the empty line below it."""
    lines = [f'- {fact}' for fact in facts if fact]
    return [*lines, ''] if lines else []


def put_between(page: Path, mark: str, content: str) -> None:
    """Replace the text between two marks of a page, in place."""
    text = page.read_text()
    start, end = text.index(f'<!-- {mark}'), text.index(f'<!-- /{mark} -->')
    start = text.index('\n', start) + 1
    page.write_text(f'{text[:start]}{content}\n{text[end:]}')
