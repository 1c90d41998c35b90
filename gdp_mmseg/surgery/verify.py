"""Verification by experiment that the surgery of a model is exact.

The analysis knows what operators do, but not what a forward pass reads from
its own attributes: ``x.view(n, self.heads, 32, -1)`` works on the dense
network only. So before anything is trained, the surgery is done on a copy with
random weights and random gates, and the outputs of the pruned and the gated
copy are compared. Groups of channels for which they differ are frozen.
"""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import sys
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from torch import nn

from ..analysis.analyse import nothing_left
from ..analysis.structure import Analysis
from ..analysis.tracer import Forward, ForwardError, fixed_seeds
from .trial import Forwards, Trial

# Tolerance in double precision, where a small error is not lost in rounding.
TOLERANCE = 1e-8
# A forward that names float32 may round to single precision. Differences
# between these two bounds are taken for that, and the model is verified anew
# at the second.
_ROUNDING = 1e-5
# Such a forward may also fail in double precision. The model is then verified
# in single precision, with the tolerance of about a thousand roundings.
_SINGLE_TOLERANCE = 1e-4
# The first one that suits the model decides.
_ATTEMPTS = ((torch.float64, TOLERANCE), (torch.float64, _ROUNDING),
             (torch.float32, _SINGLE_TOLERANCE))


def is_exact(single: float, double: float | None) -> bool:
    """Judge the outputs of a model with random weights as :func:`verify` does.

    Args:
        single (float): Relative difference of the gated and the pruned outputs
            in single precision.
        double (float, optional): The same in double precision; None if the
            model does not run in it.
    """
    # Comparisons with nan are false, so nan is never exact.
    if double is None:
        return single <= _SINGLE_TOLERANCE
    return double <= _ROUNDING


def verify(
        model: nn.Module,
        analysis: Analysis,
        forward: Forward,
        training_forward: Forward | None = None,
        others: Forwards = (),
        note: Callable[[str],
                       None] = lambda line: None) -> tuple[Analysis, float]:
    """Freeze the groups whose surgery is not exact on a copy of the model.

    Args:
        model (nn.Module): The model that was analysed, without gates. It
            stays unchanged.
        analysis (Analysis): The analysis of the model.
        forward (Forward): The forward of inference (see
            :func:`gdp_mmseg.analysis.analyse.analyse`).
        training_forward (Forward, optional): The forward of training.
        others (Forwards): Further forwards that must
            stay exact, each with True if it is one of training. Those that
            the model itself cannot run are left out.
        note (Callable[[str], None]): Called with a line for each forward that
            was left out.

    Returns:
        tuple[Analysis, float]: The analysis, in which some groups may be
        frozen and others must keep a channel; and the relative difference of
        the outputs with half of the channels removed.

    Raises:
        ValueError: If the model's own forward fails, if it is not the same
            each time, or if the surgery is not exact whatever is frozen.
    """
    forwards = [(forward, False)]
    if training_forward is not None:
        forwards.append((training_forward, True))
    found = _tried(model, analysis, forwards, others)
    if found.analysis.num_gates < analysis.num_gates and any(
            group.norms for group in analysis.groups):
        # Code that was not traced may change what norms with gates give.
        at_layers = _tried(model, analysis.at_layers(), forwards, others)
        if at_layers.analysis.num_gates > found.analysis.num_gates:
            found = at_layers
    for name, cause in found.skipped.items():
        note(f'{name} was not verified, because it gave: {cause}')
    _give_memory_back()
    return found.analysis, found.difference


class _Found(NamedTuple):
    """Result of a verification.

    Args:
        analysis (Analysis): See :func:`verify`.
        difference (float): See :func:`verify`.
        skipped (dict[str, str]): Names of the forwards that were left out,
            and why.
    """
    analysis: Analysis
    difference: float
    skipped: dict[str, str]


def _tried(model: nn.Module, analysis: Analysis, forwards: Forwards,
           others: Forwards) -> _Found:
    """Verify an analysis with the gates at their places (see :func:`verify`).
    """
    attempts = list(_ATTEMPTS)
    while True:
        dtype, tolerance = attempts.pop(0)
        with fixed_seeds(), default_dtype(dtype):
            try:
                trial = Trial(model, analysis, forwards, others, tolerance)
                if trial.skipped and attempts and _runs_more_in_single(
                        trial, model, others):
                    attempts = attempts[-1:]
                    continue
                return _Found(*_verified(trial), trial.skipped)
            except _Rounded:
                continue
            except ForwardError:
                if not attempts:
                    raise
                attempts = attempts[-1:]


def _give_memory_back() -> None:
    """Return the memory of the copies to the system, where that is possible.

    The GNU C library keeps what is freed, about as much as a large model, and
    a training needs its memory in other pieces.
    """
    gc.collect()
    if sys.platform == 'linux':
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _runs_more_in_single(trial: Trial, model: nn.Module,
                         others: Forwards) -> bool:
    """Tell whether fewer forwards fail in single than in double precision."""
    required = trial.forwards[:trial.num_required]
    with default_dtype(torch.float32):
        single = Trial(model, trial.analysis, required, others,
                       _SINGLE_TOLERANCE)
    return len(single.skipped) < len(trial.skipped)


class _Rounded(Exception):
    """Differences that look like a forward's own rounding."""


def _verified(trial: Trial) -> tuple[Analysis, float]:
    """Verify with one trial (see :func:`verify`)."""
    analysis = trial.analysis
    num_frozen = len(analysis.frozen)

    def freeze(reasons: dict[int, str]) -> Analysis:
        if not reasons:
            return analysis
        frozen = analysis.without(reasons)
        if not frozen.num_gates:
            raise ValueError(nothing_left(frozen))
        trial.use(frozen)
        return frozen

    if not trial.exact(range(len(analysis.groups)), half=True):
        trial.check_repeatable()
        # These first, because a layer in which gates do not act is inexact
        # whichever group is removed.
        analysis = freeze(trial.without_effect())
        analysis = freeze(_inexact_groups(trial, half=True))
    must_keep_one = _inexact_groups(trial, half=False)
    if must_keep_one:
        analysis = dataclasses.replace(
            analysis,
            groups=tuple(
                dataclasses.replace(
                    group,
                    can_be_empty=group.can_be_empty
                    and index not in must_keep_one)
                for index, group in enumerate(analysis.groups)))
        trial.use(analysis)
    all_groups = range(len(analysis.groups))
    half, whole = (trial.outcome(all_groups, half) for half in (True, False))
    worst = max(half, whole, key=lambda outcome: outcome.difference)
    if not worst.difference <= trial.tolerance:
        _refuse_rounding(trial)
        frozen = [row.writers[0] for row in analysis.frozen[num_frozen:]]
        raise ValueError(
            'expected a pruned copy of the model to compute what the gated '
            f'one does, but got a relative difference of '
            f'{worst.difference:.1e}{worst.error and f" ({worst.error})"}, '
            'also with the channels of '
            f'{", ".join(frozen) or "no layer"} frozen; keep '
            'parts out with ignore=[...]')
    return analysis, half.difference


def _refuse_rounding(trial: Trial) -> None:
    """Raise if a difference in double precision looks like a rounding."""
    if trial.tolerance == TOLERANCE and any(
            TOLERANCE < outcome.difference <= _ROUNDING
            for outcome in trial.known.values()):
        raise _Rounded


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the dtype of new tensors, including those that a forward creates.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _inexact_groups(trial: Trial, half: bool) -> dict[int, str]:
    """Find the groups that are not exact by themselves, with the reasons.

    The groups near a failing module are tested first. When one is inexact,
    groups with the same role elsewhere are tested next. Both save most of the
    forward passes that a bisection over all groups would take.
    """

    def search(suspects: Sequence[int]) -> list[int]:
        if not suspects or trial.exact(suspects, half):
            return []
        if len(suspects) == 1:
            return list(suspects)
        middle = len(suspects) // 2
        return search(suspects[:middle]) + search(suspects[middle:])

    all_groups = range(len(trial.analysis.groups))
    found: dict[int, str] = {}

    def remaining() -> tuple[int, ...]:
        return tuple(index for index in all_groups if index not in found)

    while remaining() and not trial.exact(remaining(), half):
        for suspects in (*trial.near_failure(remaining()), remaining()):
            more = search(suspects)
            if more:
                break
        else:
            break  # only together are they inexact; the caller refuses that
        _refuse_rounding(trial)
        found.update((index, trial.reason(index)) for index in more)
        for index in trial.same_role(more[-1], remaining()):
            if trial.exact((index, ), half):
                break
            found[index] = trial.reason(index)
    return dict(sorted(found.items()))
