"""Lossless channel pruning for semantic segmentation, after GDP."""
from .version import __version__

__all__ = ['__version__']
