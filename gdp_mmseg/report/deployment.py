"""ONNX file of a pruned network, and what its latency is made of."""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """ONNX file of a network, compared with PyTorch in ONNX Runtime.

    Args:
        file (str): Name of the file.
        output (str): ``'logits'`` or ``'classes'``, of the input's size.
        dynamic (bool): Whether batch, height and width may change.
        max_rel_diff (float): Largest difference between the outputs of ONNX
            Runtime and PyTorch, relative to the largest logit.
        compared_on (str): Inputs on which they were compared.
    """
    file: str
    output: str
    dynamic: bool
    max_rel_diff: float
    compared_on: str

    def sentence(self) -> str:
        """Describe the file and its check."""
        sizes = 'any batch and size' if self.dynamic else 'one size'
        return (f'{self.file}: normalised images of {sizes} to {self.output}. '
                'Largest difference between ONNX Runtime '
                'and PyTorch, relative to the largest logit: '
                f'{self.max_rel_diff:.1e} on {self.compared_on}.')


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """Time of a layer of the pruned network, and of the dense one's.

    Args:
        name (str): Name of the module, or description of several.
        dense_ms (float): Milliseconds in the dense network, in PyTorch.
        pruned_ms (float): Milliseconds in the pruned network.
        work (float, optional): FLOPs of the pruned layer over those of the
            dense one; None for what has no FLOPs.
    """
    name: str
    dense_ms: float
    pruned_ms: float
    work: float | None = None


@dataclasses.dataclass(frozen=True)
class Deployment:
    """ONNX file of a pruned network, and what its latency is made of.

    Args:
        onnx (OnnxFile): The file.
        threads (int): Number of threads of all runtimes.
        layers (list[LayerRow]): Slowest layers of the pruned network, then
            the sum of the others, of the modules without FLOPs, and of what
            runs between the modules.
        picture (str): File name of the chart of the shares.
    """
    onnx: OnnxFile
    threads: int
    layers: list[LayerRow]
    picture: str

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Deployment:
        """Take a deployment from a mapping, as a JSON file has it."""
        rows = [LayerRow(**row) for row in content['layers']]
        return cls(
            **dict(content, onnx=OnnxFile(**content['onnx']), layers=rows))
