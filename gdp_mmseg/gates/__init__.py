"""Gates: how open each channel is, and the methods that move them.

``METHODS`` names the gate methods that ``gdp=dict(gate=...)`` chooses from.
"""
from __future__ import annotations

from .base import GateMethod
from .gdp import GDPGates
from .scp import SCPGates
from .trainable import TrainableGates

METHODS: dict[str, type[GateMethod]] = dict(
    gdp=GDPGates, scp=SCPGates, trainable=TrainableGates)
