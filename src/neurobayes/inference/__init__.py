"""Inference engines: configs with one method, ``run``."""

from .auto import Auto
from .base import Engine
from .laplace import Laplace
from .last_layer import LastLayer
from .mclmc import MCLMC
from .nuts import NUTS
from .pathfinder import Pathfinder
from .sgmcmc import SGMCMC
from .svi import SVI

ENGINES: dict[str, type[Engine]] = {
    "auto": Auto,
    "last_layer": LastLayer,
    "nuts": NUTS,
    "mclmc": MCLMC,
    "sgmcmc": SGMCMC,
    "laplace": Laplace,
    "svi": SVI,
    "pathfinder": Pathfinder,
}
"""What ``engine`` may be called in ``fit``, with the config behind each name."""

__all__ = ["ENGINES", "MCLMC", "NUTS", "SGMCMC", "SVI", "Auto", "Engine", "Laplace", "LastLayer", "Pathfinder"]
