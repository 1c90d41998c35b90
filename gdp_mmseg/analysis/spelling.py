"""Suggestions for misspelt names in messages."""
from __future__ import annotations

import difflib
from typing import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of a message that names the nearest known name.

    Args:
        name (object): What came.
        known (Iterable[str]): All names that would be right.

    Returns:
        str: ``"; did you mean 'x'?"``, or nothing if no name is near.

    Examples:
        >>> did_you_mean('tagret', ['gate', 'target'])
        "; did you mean 'target'?"
        >>> did_you_mean('lr', ['gate', 'target'])
        ''
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f'; did you mean {near[0]!r}?' if near else ''
