"""Inference engines: configs with one method, ``run``."""

from .base import Engine
from .nuts import NUTS

__all__ = ["NUTS", "Engine"]
