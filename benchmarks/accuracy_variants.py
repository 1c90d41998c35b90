"""Changes to the trainings that ``accuracy.py`` compares, by their names.

A change is added to a method's name, as in ``gdp+ema``; it can be made to the
dense training too, so that both have it.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from distill_hooks import ChannelHook, DistillHook, FeatureHook
from gate_hooks import GainHook, StreamHook
from mmengine.config import Config
from mmengine.hooks import Hook

from gdp_mmseg.pruner.schedule import Schedule

# Share of the training after which weights are averaged.
AVERAGED_FROM = 0.5
# Openness under which a gate closes for good in all steps.
CLOSE_BELOW = 0.5
# Factor of the learning rate after the pruning phase.
RESTART = 2.
# Phases of the gates with a short warm-up and a long settling phase.
SHORT = (0.1, 0.2, 0.7)


def _ema(cfg: Config, teacher: Path) -> None:
    """Average the weights over the second half, and evaluate the average."""
    begin = round(AVERAGED_FROM * cfg.train_cfg.max_iters)
    _add_hook_(
        cfg,
        type='EMAHook',
        ema_type='ExponentialMovingAverage',
        momentum=0.02,
        update_buffers=True,
        begin_iter=begin)


def _add_hook_(cfg: Config, **hook: Any) -> None:
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), hook]


def _taught(hook: type[Hook],
            weight: float,
            begin: float | None = None,
            by_start: bool = True) -> Callable[[Config, Path], None]:
    """Compare with a dense network, by one of the hooks that do.

    Args:
        hook (type[Hook]): The hook.
        weight (float): Factor of its term in the loss.
        begin (float, optional): Share of the training after which it counts.
            Defaults to that of warm-up and pruning.
        by_start (bool): Whether the teacher is the network that the training
            starts from, else the dense one that was trained on.
    """

    def change(cfg: Config, teacher: Path) -> None:
        _add_hook_(
            cfg,
            type=hook.__name__,
            model=_dense(cfg),
            checkpoint=cfg.load_from if by_start else str(teacher),
            weight=weight,
            begin=_end_of_pruning(cfg) if begin is None else begin)

    return change


def _end_of_pruning(cfg: Config) -> float:
    """Share of a training after which gates are fixed, or would be."""
    phases = cfg.model.get('gdp', {}).get('phases', Schedule.phases)
    return Schedule(tuple(phases)).end_of_pruning


def _dense(cfg: Config) -> dict[str, Any]:
    """Return the config of the dense network of a training."""
    model = dict(cfg.model)
    model.pop('gdp', None)
    model['type'] = 'EncoderDecoder'
    return model


def _faster(factor: float) -> Callable[[Config, Path], None]:
    """Multiply the learning rate."""

    def change(cfg: Config, teacher: Path) -> None:
        cfg.optim_wrapper.optimizer.lr *= factor

    return change


def hold_(cfg: Config, share: float) -> None:
    """Hold the learning rate for a share of the training, in place.

    Then it falls linearly.
    """
    end = cfg.train_cfg.max_iters
    cfg.param_scheduler[0].update(
        type='PolyLR', power=1., begin=round(share * end), end=end)


def _flat(cfg: Config, teacher: Path) -> None:
    """Hold the learning rate for 0.6 of the training."""
    hold_(cfg, 0.6)


def _phases(*phases: float) -> Callable[[Config, Path], None]:
    """Set the phases of the gates."""

    def change(cfg: Config, teacher: Path) -> None:
        cfg.model.gdp.phases = phases

    return change


def _close_early(cfg: Config, teacher: Path) -> None:
    """Close a gate once it is half closed."""
    cfg.model.gdp.close_below = CLOSE_BELOW


def _take_over_nothing(cfg: Config, teacher: Path) -> None:
    """Let no other channels take over what a closing one told."""
    cfg.model.gdp.takeover = False


def _long_means(cfg: Config, teacher: Path) -> None:
    """Average the gains over more steps, of which more are a warm-up."""
    _add_hook_(cfg, type=GainHook.__name__, betas=(0.98, 0.995))


def _keep_streams(cfg: Config, teacher: Path) -> None:
    """Keep three quarters of the channels of each residual stream."""
    # So small that it keeps one channel of every other group.
    cfg.model.gdp.min_keep_ratio = 1e-3
    _add_hook_(cfg, type=StreamHook.__name__, ratio=0.75)


def _restart(cfg: Config, teacher: Path) -> None:
    """Double the learning rate after the pruning phase, then let it fall."""
    end = cfg.train_cfg.max_iters
    begin = round(_end_of_pruning(cfg) * end)
    hold_(cfg, begin / end)
    cfg.param_scheduler.insert(
        0,
        dict(
            type='MultiStepLR',
            milestones=[begin],
            gamma=RESTART,
            by_epoch=False))


@dataclass(frozen=True)
class Change:
    """A change to a training.

    Args:
        label (str): What it is, in tables.
        apply_ (Callable): Takes the config of the training and the checkpoint
            of a trained dense network, and changes the config in place.
        teacher (bool): Whether it reads that checkpoint.
    """

    label: str
    apply_: Callable[[Config, Path], None]
    teacher: bool = False


# After the pruning phase.
_FEATURES = 'features of the start as a target, weight'
_CHANNELS = 'each channel of the start as a target, weight'
CHANGES: dict[str, Change] = dict(
    ema=Change('average of the weights over the second half', _ema),
    kd=Change(
        'distillation from the dense network that was trained on',
        _taught(DistillHook, 1., 0., by_start=False),
        teacher=True),
    kd_half=Change(
        'distillation from the dense network that was trained on, at weight '
        '0.5',
        _taught(DistillHook, 0.5, 0., by_start=False),
        teacher=True),
    kd_late=Change(
        'distillation from the dense network that was trained on, after the '
        'pruning phase',
        _taught(DistillHook, 1., by_start=False),
        teacher=True),
    feat=Change(f'{_FEATURES} 1', _taught(FeatureHook, 1.)),
    feat5=Change(f'{_FEATURES} 5', _taught(FeatureHook, 5.)),
    feat20=Change(f'{_FEATURES} 20', _taught(FeatureHook, 20.)),
    same5=Change(f'{_CHANNELS} 5', _taught(ChannelHook, 5.)),
    same20=Change(f'{_CHANNELS} 20', _taught(ChannelHook, 20.)),
    always5=Change(f'{_CHANNELS} 5, from the beginning',
                   _taught(ChannelHook, 5., 0.)),
    close=Change('gates close at an openness of 0.5', _close_early),
    alone=Change('no takeover', _take_over_nothing),
    gains=Change('longer means of the gains', _long_means),
    parts=Change('three quarters of each residual stream stay', _keep_streams),
    restart=Change(
        'learning rate times 2 after the pruning phase, then linear',
        _restart),
    lr2=Change('learning rate times 2.5', _faster(2.5)),
    lr5=Change('learning rate times 5', _faster(5.)),
    flat=Change('learning rate held for 0.6, then linear', _flat),
    early=Change('phases 0.05, 0.1, 0.85', _phases(0.05, 0.1, 0.85)),
    mid=Change('phases 0.1, 0.35, 0.55', _phases(0.1, 0.35, 0.55)),
    short=Change('phases 0.1, 0.2, 0.7', _phases(*SHORT)))
