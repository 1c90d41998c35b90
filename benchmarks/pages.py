"""Generated sections of the pages."""
from __future__ import annotations

from pathlib import Path


def put_between(page: Path, mark: str, content: str) -> None:
    """Replace the text between two marks of a page, in place."""
    text = page.read_text()
    start, end = text.index(f'<!-- {mark}'), text.index(f'<!-- /{mark} -->')
    start = text.index('\n', start) + 1
    page.write_text(f'{text[:start]}{content}\n{text[end:]}')
