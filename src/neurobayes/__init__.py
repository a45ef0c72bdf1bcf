"""Partially and fully Bayesian neural networks in JAX.

``import neurobayes as nb`` loads no framework: a public name is imported
from its module when it is first used.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import calibration, datasets, errors, inference, metrics, networks, plots, utils
    from .advisor import compare_partitions
    from .arviz import to_arviz
    from .calibration import fit_calibration
    from .compiled_programs import cache_programs
    from .directions import subspace
    from .models.bnn import BNN
    from .models.calibrated import CalibratedModel
    from .models.deterministic import DeterministicNN
    from .models.partial_bnn import PartialBNN
    from .models.tables import print_layer_configs
    from .networks.convnet import FlaxConvNet
    from .networks.mlp import FlaxMLP
    from .networks.transformer import FlaxTransformer
    from .selection import select_bayesian_components
    from .selectors import (
        biases,
        everything,
        last,
        layers,
        mask,
        module_type,
        norms,
        nothing,
        path,
        random_subset,
        top,
        weights,
    )

# Spelled out, and not built from the table below, because type checkers read it without running it.
__all__ = [
    "BNN",
    "CalibratedModel",
    "DeterministicNN",
    "FlaxConvNet",
    "FlaxMLP",
    "FlaxTransformer",
    "PartialBNN",
    "biases",
    "cache_programs",
    "calibration",
    "compare_partitions",
    "datasets",
    "errors",
    "everything",
    "fit_calibration",
    "inference",
    "last",
    "layers",
    "mask",
    "metrics",
    "module_type",
    "networks",
    "norms",
    "nothing",
    "path",
    "plots",
    "print_layer_configs",
    "random_subset",
    "select_bayesian_components",
    "subspace",
    "to_arviz",
    "top",
    "utils",
    "weights",
]

_SUBMODULES = ("calibration", "datasets", "errors", "inference", "metrics", "networks", "plots", "utils")

_MODULE_OF = {
    "BNN": "models.bnn",
    "CalibratedModel": "models.calibrated",
    "DeterministicNN": "models.deterministic",
    "FlaxConvNet": "networks.convnet",
    "FlaxMLP": "networks.mlp",
    "FlaxTransformer": "networks.transformer",
    "PartialBNN": "models.partial_bnn",
    "biases": "selectors",
    "cache_programs": "compiled_programs",
    "compare_partitions": "advisor",
    "everything": "selectors",
    "fit_calibration": "calibration",
    "last": "selectors",
    "layers": "selectors",
    "mask": "selectors",
    "module_type": "selectors",
    "norms": "selectors",
    "nothing": "selectors",
    "path": "selectors",
    "print_layer_configs": "models.tables",
    "random_subset": "selectors",
    "select_bayesian_components": "selection",
    "subspace": "directions",
    "to_arviz": "arviz",
    "top": "selectors",
    "weights": "selectors",
}

try:
    __version__ = importlib.metadata.version("neurobayes")
except importlib.metadata.PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value  # the next access finds it without coming here
        return value
    from .errors import nearest

    raise AttributeError(f"module 'neurobayes' has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
