"""Inference engines: configs with one method, ``run``."""

from .auto import Auto
from .base import Engine
from .last_layer import LastLayer
from .nuts import NUTS

ENGINES: dict[str, type[Engine]] = {"auto": Auto, "last_layer": LastLayer, "nuts": NUTS}
"""What ``engine`` may be called in ``fit``, with the config behind each name."""

__all__ = ["ENGINES", "NUTS", "Auto", "Engine", "LastLayer"]
