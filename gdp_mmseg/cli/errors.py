"""Errors of the command lines: one line on stderr instead of a traceback.

The line names what was expected, what came, and what to pass or change. The
exit status is 2, the status that argparse uses.
"""
from __future__ import annotations

import contextlib
import errno
import os
import os.path as osp
import sys
import traceback
import warnings
from typing import Any, Iterable, Iterator, NoReturn, TextIO

from ..analysis.spelling import did_you_mean

PACKAGE = __name__.partition('.')[0]
# Types of the errors that this package raises about a user's input. Other
# types, raised by the same code, are bugs and keep their traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError)
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS,
                errno.EACCES, errno.EPERM)
# Types of errors about data. Other types that a dataset raises are bugs of its
# code, whose author needs the traceback.
DATA_ERRORS = (OSError, RuntimeError, ValueError, KeyError, AssertionError)
BUILDING = ('__init__', 'full_init', 'load_data_list')


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    line = ' '.join(message.split())
    print(f'{osp.basename(sys.argv[0])}: error: {line}', file=sys.stderr)
    raise SystemExit(2)


def fail_unknown(what: str, name: str, known: Iterable[str]) -> NoReturn:
    """End the program because of a name that is none of the known ones.

    Args:
        what (str): Description of what was expected, e.g. ``a command``.
        name (str): What came; empty if nothing did.
        known (Iterable[str]): All names that would be right.
    """
    names = [*known]
    fail(f'expected {what}, one of {", ".join(names)}, but got '
         f'{name or "none"}' + did_you_mean(name, names))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Replace the traceback of an error that the user can mend by one line.

    Usable as a context manager and, as ``@one_line_errors()``, as a decorator.
    Errors about the user's input that this package raised are replaced, also
    when mmengine's registry has wrapped them, and so are errors of other code
    about names that no registry has, and about files and data that cannot be
    read or written. All other errors keep their traceback. ``GDP_DEBUG=1`` in
    the environment keeps every traceback.

    Warnings, of which the libraries give several while they build a model,
    are shown when the command ends or when :func:`held_output` does; an error
    of one line stands alone.
    """
    show = warnings.showwarning
    held: Any = _HeldWarnings()
    warnings.showwarning = held
    try:
        yield
        held.release()
    except Exception as error:
        line = _line(error)
        if line is None:
            held.release()
            raise
        fail(line)
    finally:
        warnings.showwarning = show


@contextlib.contextmanager
def held_output() -> Iterator[None]:
    """Hold back what is written to stdout until it is known how a block ends.

    mmengine prints the whole config before it builds the model. If the model
    tells that the config is wrong, the one line about it stands alone, and
    the config is in the log file only. Loggers that were made in the block
    keep the stream and write through it afterwards.
    """
    stream = _HeldStream(sys.stdout)
    try:
        with contextlib.redirect_stdout(stream):
            yield
    except Exception as error:
        if _line(error) is None:
            stream.release()
        raise
    stream.release()
    if isinstance(warnings.showwarning, _HeldWarnings):
        warnings.showwarning.release()


class _HeldWarnings:
    """Function that shows warnings and keeps them until they are released."""

    def __init__(self) -> None:
        self._show = warnings.showwarning
        self._held: list[tuple[Any, ...]] | None = []

    def __call__(self, *warning: Any) -> None:
        if self._held is None:
            self._show(*warning)
        else:
            self._held.append(warning)

    def release(self) -> None:
        held, self._held = self._held or [], None
        for warning in held:
            self._show(*warning)


class _HeldStream:
    """Text stream that keeps what is written to it until it is released."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._held: list[str] | None = []

    def write(self, text: str) -> int:
        if self._held is None:
            return self._stream.write(text)
        self._held.append(text)
        return len(text)

    def release(self) -> None:
        held, self._held = self._held or [], None
        self._stream.write(''.join(held))
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _line(error: Exception) -> str | None:
    """Return the message for the user; None if the traceback is wanted."""
    # Slow to import: an unknown command is answered at once.
    from PIL import UnidentifiedImageError

    from .names import unknown_name
    if os.environ.get('GDP_DEBUG') == '1':
        return None
    cause = _first_of_this_package(error)
    if cause is not None:
        return str(cause)
    unknown = unknown_name(error)
    if unknown is not None:
        return unknown
    last = (str(error).splitlines() or [''])[-1]
    if isinstance(error, UnidentifiedImageError) or (isinstance(
            error, AssertionError) and 'failed to load image' in str(error)):
        # Pillow's and mmcv's errors for an image that they cannot read.
        return (f'expected readable images, but got: {last}; replace the '
                'file, or take it from the list')
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return ('expected to read and write files, but got: '
                f'{error.strerror} ({error.filename or "while writing"}); '
                'make room, or choose another folder; --resume continues from '
                'the last checkpoint')
    if isinstance(error, IndexError) and 'out of bounds' in str(error):
        # torch's error on a CPU for a label that has no class.
        return (f'expected labels below num_classes, but got: {last}; change '
                'num_classes of the heads, or reduce_zero_label')
    dataset = _built_dataset(error)
    if dataset is not None and isinstance(error, DATA_ERRORS):
        return (f'expected data that {type(dataset).__name__} can read, but '
                f'got {type(error).__name__}: {last}; change the dataset in '
                'the config, or set GDP_DEBUG=1 for the traceback')
    return None


def _built_dataset(error: BaseException) -> Any:
    """Return the dataset whose constructor raised an error, if any."""
    from torch.utils.data import Dataset
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get('self')
        if isinstance(owner, Dataset) and frame.f_code.co_name in BUILDING:
            return owner
    return None


def _first_of_this_package(
        error: BaseException | None) -> BaseException | None:
    """Return the first error of a chain that this package raised, if any."""
    while error is not None and not _is_of_this_package(error):
        error = error.__cause__ or error.__context__
    return error


def _is_of_this_package(error: BaseException) -> bool:
    """Tell whether this package raised an error about the user's input."""
    trace = error.__traceback__
    if trace is None or not isinstance(error, USER_ERRORS):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get('__name__') or ''
    return module.partition('.')[0] == PACKAGE
