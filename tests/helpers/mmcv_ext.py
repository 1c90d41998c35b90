"""Stand-in for ``mmcv._ext``, the compiled operators of mmcv 2.1.0.

mmsegmentation 1.2.2 imports them all, and its usual models call none. Copied
to mmcv's folder as ``_ext.py``, this module lets that import pass in a pure
Python build of mmcv. An operator that is called nevertheless says so.
"""
from __future__ import annotations

from typing import Any, Callable


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith('__'):
        raise AttributeError(name)

    def operator(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f'mmcv: expected the compiled operator {name}, but got a pure '
            'Python build of mmcv; install a build with compiled operators')

    return operator
