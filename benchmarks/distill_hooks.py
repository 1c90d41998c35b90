"""Hooks that add the distance from a dense network to the loss."""
from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from gdp_mmseg.engine.model import find_pruner
from gdp_mmseg.engine.shrinking import ShrinkHook
from gdp_mmseg.gates.lookup import slot_values

# Iterations in which only the maps of features learn, and learning rate of
# these maps.
ALONE = 50
RATE_OF_MAPS = 1e-3


class _TeacherHook(Hook):
    """Add a term to the decoder's loss that compares with a dense network.

    Args:
        model (dict): Config of the dense network, the teacher.
        checkpoint (str): Its weights.
        weight (float): Factor of the term.
        begin (float): Share of the training after which it counts.
    """

    name: str

    def __init__(self,
                 model: dict[str, Any],
                 checkpoint: str,
                 weight: float = 1.,
                 begin: float = 0.) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.weight = weight
        self.begin = begin

    @property
    def iteration(self) -> int:
        """Iterations since the term counts, below 0 before that."""
        return int(self.runner.iter -
                   round(self.begin * self.runner.max_iters))

    def before_train(self, runner: Runner) -> None:
        """Build the teacher and add the term to the decoder's loss."""
        self.runner = runner
        student: Any = runner.model
        teacher: Any = MODELS.build(self.model)
        load_checkpoint(teacher, self.checkpoint, 'cpu')
        teacher = teacher.to(next(student.parameters()).device).eval()
        teacher.to(memory_format=torch.channels_last)
        seen: dict[str, Any] = {}
        student.backbone.register_forward_hook(
            lambda _, args, features: seen.update(
                images=args[0], features=features))
        plain = student.decode_head.loss_by_feat

        def loss_by_feat(logits: Tensor, samples: Any) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = plain(logits, samples)
            images, features = seen.pop('images'), seen.pop('features')
            if self.iteration >= 0:
                losses[self.name] = self.weight * self.term(
                    teacher, images, features, logits)
            return losses

        student.decode_head.loss_by_feat = loss_by_feat

    def term(self, teacher: Any, images: Tensor, features: tuple[Tensor, ...],
             logits: Tensor) -> Tensor:
        """Compare the teacher with a student.

        Args:
            teacher (Any): The dense segmentor.
            images (Tensor): Normalised images ``(N, 3, H, W)``.
            features (tuple[Tensor, ...]): What the student's backbone returns
                for them.
            logits (Tensor): What its decoder returns.

        Returns:
            Tensor: The scalar that is added to the loss.
        """
        raise NotImplementedError


@HOOKS.register_module()
class DistillHook(_TeacherHook):
    """Compare the classes' probabilities at each pixel of the logits.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015, section 2.

    Args:
        temperature (float): Divisor of the logits; the divergence is
            multiplied by its square.
        **kwargs (Any): Arguments of ``_TeacherHook``.
    """

    name = 'loss_distill'

    def __init__(self, temperature: float = 2., **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature

    def term(self, teacher: Any, images: Tensor, features: tuple[Tensor, ...],
             logits: Tensor) -> Tensor:
        """Return the mean divergence over the pixels."""
        with torch.no_grad():
            wanted = teacher.decode_head(teacher.backbone(images))
        pixels = F.kl_div(
            (logits.float() / self.temperature).log_softmax(1),
            (wanted.float() / self.temperature).log_softmax(1),
            reduction='none',
            log_target=True)
        return pixels.sum(1).mean() * self.temperature**2


@HOOKS.register_module()
class FeatureHook(_TeacherHook):
    """Compare the features that the stages of the backbone return.

    A linear map of the channels, which learns along, predicts the teacher's
    features from the student's, whose channels may be fewer.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015,
    section 2.2.
    """

    name = 'loss_features'

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.maps = nn.ModuleList()
        self.optimizer: torch.optim.Optimizer | None = None

    def term(self, teacher: Any, images: Tensor, features: tuple[Tensor, ...],
             logits: Tensor) -> Tensor:
        """Return the share of the teacher's variance that is not predicted.

        It is the mean over stages and channels.
        """
        with torch.no_grad():
            wanted = teacher.backbone(images)
        self._fit_maps_(features, wanted)
        if self.iteration < ALONE:  # a random map would teach noise
            features = tuple(feature.detach() for feature in features)
        return torch.stack([
            _shares(one(feature), target).mean()
            for one, feature, target in zip(self.maps, features, wanted)
        ]).mean()

    def _fit_maps_(self, features: tuple[Tensor, ...],
                   wanted: tuple[Tensor, ...]) -> None:
        """Make the maps anew if the student's channels have changed."""
        channels = [feature.shape[1] for feature in features]
        if channels == [one.in_channels for one in self.maps]:
            return
        self.maps = nn.ModuleList(
            nn.Conv2d(feature.shape[1], target.shape[1], 1)
            for feature, target in zip(features, wanted))
        self.maps.to(features[0].device)
        self.optimizer = torch.optim.AdamW(self.maps.parameters(),
                                           RATE_OF_MAPS)

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        """Move the maps by the gradient of this iteration."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


@HOOKS.register_module()
class ChannelHook(_TeacherHook):
    """Compare the channels that are left with what they were at the start.

    Channels of the features that the stages of the backbone return count as
    much as their gates are open.
    """

    name = 'loss_channels'

    def before_train(self, runner: Runner) -> None:
        """Find the norms that write the features, too."""
        super().before_train(runner)
        self.norms = _last_norms(runner.model)

    def term(self, teacher: Any, images: Tensor, features: tuple[Tensor, ...],
             logits: Tensor) -> Tensor:
        """Return the share of the variance by which channels have changed.

        It is the mean over the stages and over the channels that are left.
        """
        with torch.no_grad():
            wanted = teacher.backbone(images)
        means = []
        for norm, feature, target in zip(self.norms, features, wanted):
            left, openness = self._channels(norm, target)
            shares = _shares(feature, target[:, left])
            means.append(shares @ openness / openness.sum())
        return torch.stack(means).mean()

    def _channels(self, norm: str, target: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and openness of the channels that are left of a stage."""
        runner = self.runner
        left = torch.arange(target.shape[1], device=target.device)
        openness = torch.ones(len(left), device=target.device)
        if not hasattr(runner.model, 'gdp'):
            return left, openness
        pruner = find_pruner(runner.model)
        slots = pruner.analysis.gate_of_slot.get((f'{norm}.weight', 0))
        if slots is None:
            return left, openness
        slots = slots.to(target.device)
        openness = slot_values(pruner.gates.openness().detach(), slots)
        for hook in runner.hooks:
            if isinstance(hook, ShrinkHook) and hook._shrinkages:
                present = hook._shrinkages[0].present.to(target.device)
                left = ((slots < 0) | present[slots]).nonzero()[:, 0]
        return left, openness[left]


def _last_norms(model: Any) -> list[str]:
    """Names of the last batch norm of each stage whose features are read."""
    backbone = model.backbone
    stages = getattr(backbone, 'res_layers', None) or backbone.layers
    return [
        f'backbone.{stage}.{norms[-1]}'
        for stage in (stages[index] for index in backbone.out_indices)
        if (norms := [
            name for name, module in getattr(backbone, stage).named_modules()
            if isinstance(module, _BatchNorm)
        ])
    ]


def _shares(features: Tensor, wanted: Tensor) -> Tensor:
    """Mean square errors over the variances of channels.

    Args:
        features (Tensor): ``(N, C, H, W)``.
        wanted (Tensor): Values that they should have.

    Returns:
        Tensor: ``(C,)``; 1 if a feature were the mean of its values.
    """
    error = (features - wanted).float().square().mean((0, 2, 3))
    variance = wanted.float().var((0, 2, 3), correction=0)
    return error / (variance + 1e-3 * variance.mean())
