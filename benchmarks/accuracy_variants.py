"""Changes to the trainings that ``accuracy.py`` compares, by their names.

A change is added to a method's name, as in ``gdp+ema``; it can be made to the
dense training too, so that both have it.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from gate_hooks import GainHook, StreamHook
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor
from torch.nn import functional as F

# Share of the training after which weights are averaged: GDP's gates are
# fixed by then.
AVERAGED_FROM = 0.5
# Openness under which a gate closes for good in all steps.
CLOSE_BELOW = 0.5
# Factor of the learning rate after the pruning phase.
RESTART = 2.


@HOOKS.register_module()
class DistillHook(Hook):
    """Add the divergence from a trained dense network to the loss.

    The classes' probabilities of student and teacher are compared at each
    pixel of the decoder's logits (Hinton et al., 2015).

    Args:
        model (dict): Config of the dense network.
        checkpoint (str): Its weights.
        weight (float): Factor of the divergence in the loss.
        temperature (float): Divisor of the logits; the divergence is
            multiplied by its square.
        begin (float): Share of the training after which it counts.
    """

    def __init__(self,
                 model: dict[str, Any],
                 checkpoint: str,
                 weight: float = 1.,
                 temperature: float = 2.,
                 begin: float = 0.) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.weight = weight
        self.temperature = temperature
        self.begin = begin

    def before_train(self, runner: Runner) -> None:
        """Build the teacher and add its term to the decoder's loss."""
        student: Any = runner.model
        teacher: Any = MODELS.build(self.model)
        load_checkpoint(teacher, self.checkpoint, 'cpu')
        teacher = teacher.to(next(student.parameters()).device).eval()
        teacher.to(memory_format=torch.channels_last)
        images: list[Tensor] = []
        student.backbone.register_forward_pre_hook(
            lambda _, args: images.append(args[0]))
        plain = student.decode_head.loss_by_feat

        def loss_by_feat(logits: Tensor, samples: Any) -> dict[str, Tensor]:
            if runner.iter < self.begin * runner.max_iters:
                images.clear()
                return plain(logits, samples)
            with torch.no_grad():
                wanted = teacher.decode_head(teacher.backbone(images.pop()))
            images.clear()
            losses: dict[str, Tensor] = plain(logits, samples)
            losses['loss_distill'] = self.weight * _divergence(
                logits.float() / self.temperature,
                wanted.float() / self.temperature) * self.temperature**2
            return losses

        student.decode_head.loss_by_feat = loss_by_feat


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean divergence over the pixels of logits ``(N, C, H, W)``."""
    pixels = F.kl_div(
        logits.log_softmax(1),
        wanted.log_softmax(1),
        reduction='none',
        log_target=True)
    return pixels.sum(1).mean()


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


def _distilled(weight: float = 1.,
               begin: float = 0.) -> Callable[[Config, Path], None]:
    """Distil from the dense network that was trained on, its own too."""

    def change(cfg: Config, teacher: Path) -> None:
        model = dict(cfg.model)
        model.pop('gdp', None)
        model['type'] = 'EncoderDecoder'
        _add_hook_(
            cfg,
            type=DistillHook.__name__,
            model=model,
            checkpoint=str(teacher),
            weight=weight,
            begin=begin)

    return change


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
    begin = round(sum(cfg.model.gdp.phases[:2]) * end)
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


CHANGES: dict[str, Change] = dict(
    ema=Change('average of the weights over the second half', _ema),
    kd=Change(
        'distillation from the dense network that was trained on',
        _distilled(),
        teacher=True),
    kd_half=Change(
        'distillation from the dense network that was trained on, at weight '
        '0.5',
        _distilled(0.5),
        teacher=True),
    kd_late=Change(
        'distillation from the dense network that was trained on, after the '
        'pruning phase',
        _distilled(begin=0.3),
        teacher=True),
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
    late=Change('phases 0.3, 0.3, 0.4', _phases(0.3, 0.3, 0.4)))
