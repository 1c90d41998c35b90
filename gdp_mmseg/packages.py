"""Optional packages, and the command that installs missing ones."""
from __future__ import annotations

import importlib.util
from typing import Any

# Packages that an ONNX file needs.
ONNX = ('onnx', 'onnxruntime', 'onnxscript')


def check_packages(asked_by: str, *names: str) -> None:
    """Check that optional packages are installed.

    Args:
        asked_by (str): Option or key that needs them.
        *names (str): Names under which they are imported and installed.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in names if not is_installed(name)]
    if missing:
        raise ValueError(
            f'{asked_by}: expected the packages {", ".join(names)}, but got '
            f'no {" and no ".join(missing)}; install them by: pip install '
            f'{" ".join(missing)}')


def is_installed(name: str) -> bool:
    """Tell whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def onnxruntime_session(content: bytes) -> Any:
    """Load an ONNX file into ONNX Runtime, with as many threads as torch.

    Args:
        content (bytes): Content of the file.
    """
    # Slow to import, and only needed where a file is loaded.
    import onnxruntime
    import torch
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # A refusal is reported by us, in one line.
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        content, options, providers=['CPUExecutionProvider'])
