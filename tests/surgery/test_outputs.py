"""Runs that are compared start from the same state."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from gdp_mmseg.surgery.outputs import outputs_of


class MeanTeacher(nn.Module):
    """Network whose forward moves an average of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for slow, fast in zip(self.teacher.parameters(),
                              self.student.parameters()):
            slow.data.lerp_(fast.data, 0.5)
        return self.student(x) - self.teacher(x)


def test_an_average_that_a_forward_moves_is_the_same_in_each_run() -> None:
    net, x = MeanTeacher(), torch.randn(1, 2)
    before = net.teacher.weight.clone()
    first, second = (
        outputs_of(net, lambda net, x: net(x), x) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(net.teacher.weight, before)
