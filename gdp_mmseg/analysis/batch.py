"""Number of images that an operator of a traced forward pass computes for."""
from __future__ import annotations

from typing import Sequence

from torch import Tensor


class BatchTracker:
    """Record of the tensors that grow with the batch or depend on the inputs.

    A cost is that of one image. An operator whose tensors hold one part for
    each image costs a share of what a batch costs; an operator on parameters
    alone, e.g. one that computes a kernel, runs once however many images there
    are. Tensors are known by their id: the caller keeps them alive.

    Attributes:
        images (int): Number of images in the operator that runs now: that of
            the batch, or 1 if no tensor grows with the batch.
    """

    def __init__(self) -> None:
        self.images = 1
        self._size = 1
        self._batched: set[int] = set()
        self._from_inputs: set[int] = set()

    def begin(self, inputs: Tensor) -> None:
        """Begin a forward pass on a batch ``(N, C, H, W)``."""
        self._size = len(inputs)
        self._batched, self._from_inputs = {id(inputs)}, {id(inputs)}

    def follow(self, tensors: Sequence[Tensor],
               outputs: Sequence[Tensor]) -> None:
        """Take note of the tensors that an operator reads and returns."""
        if self.from_inputs(tensors):
            self._from_inputs.update(map(id, outputs))
        batched = (
            any(id(tensor) in self._batched for tensor in tensors)
            or self._repeats(tensors, outputs))
        self.images = self._size if batched else 1
        if batched:
            self._batched.update(map(id, outputs))

    def _repeats(self, tensors: Sequence[Tensor],
                 outputs: Sequence[Tensor]) -> bool:
        """Return True if an operator repeats a tensor for each image.

        Learnt queries, for example, are expanded to the size of the batch.
        Only an operator whose output is larger than what it reads does that;
        a transposed kernel with two inputs does not.
        """
        return not any(tensor.dim() and len(tensor) == self._size
                       for tensor in tensors) and any(
                           output.dim() > 1 and len(output) == self._size
                           and output.numel() > sum(tensor.numel()
                                                    for tensor in tensors)
                           for output in outputs)

    def from_inputs(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if one of the tensors depends on the model's inputs."""
        return any(id(tensor) in self._from_inputs for tensor in tensors)
