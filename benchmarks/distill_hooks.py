"""Hooks that add the distance from a dense network to the loss."""
from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

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
        self.iteration = 0  # since the term counts

    def before_train(self, runner: Runner) -> None:
        """Build the teacher and add the term to the decoder's loss."""
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
            self.iteration = runner.iter - round(self.begin * runner.max_iters)
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
        shares = []
        for one, feature, target in zip(self.maps, features, wanted):
            error = (one(feature) - target).float().square().mean((0, 2, 3))
            variance = target.float().var((0, 2, 3), correction=0)
            shares.append((error / (variance + 1e-3 * variance.mean())).mean())
        return torch.stack(shares).mean()

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
