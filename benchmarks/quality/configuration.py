"""The one configuration that every table uses, for every data set. Nothing below depends on a data set's name.

``OUR_MODEL`` holds keyword arguments of the network, of ``nb.PartialBNN`` and of its ``fit``; each is handed to
whichever takes it, and what is not named here is the library's default.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUR_MODEL: dict[str, Any] = {"hidden_dims": [64, 64, 64], "activation": "silu"}

# What replaces the fully connected network where rows are not vectors.
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "convnet": {"conv_layers": [16, 32], "fc_layers": [64]},
    "transformer": {"d_model": 32, "num_heads": 4, "num_layers": 2, "mlp_dim": 64},
}

# Protocols whose rows are not vectors.
NETWORK_OF = {"spectra": "convnet", "digits": "convnet", "few_digits": "convnet", "smiles": "transformer"}

# Active learning refits after every new row: keywords of every fit but the first, beside those of OUR_MODEL.
ACTIVE_REFIT: dict[str, Any] = {}

# Active learning once more, as changes of OUR_MODEL: the network of the paper with its first two layers Bayesian. Rows
# that a model chose are unlike those still in the pool, so what it learns from rows left out misleads it there.
FIRST_LAYERS: dict[str, Any] = {
    "hidden_dims": [8, 8, 8, 8],
    "probabilistic_layer_names": ["Dense0", "Dense1"],
    "num_backbones": 1,
    "engine": "mclmc",
    "num_chains": 2,
    "num_warmup": 250,
    "num_samples": 250,
}

BASELINES: dict[str, dict[str, Any]] = {
    "gp": {"rows": 2000, "hyperparameter_rows": 1000},
    "forest": {"trees": 300, "min_leaf": 3},
    "ensemble": {"members": 5, "hidden_dims": [64, 64], "epochs": 1000, "patience": 50, "held_out": 0.1},
    "logistic": {},
    "forest_classes": {"trees": 500},
}

# The ablation: one row each, as changes of OUR_MODEL.
ABLATION: dict[str, dict[str, Any]] = {
    "default": {},
    "one backbone": {"num_backbones": 1},
    "four backbones": {"num_backbones": 4},
    "no calibration": {"calibration": None},
    "one backbone, no calibration": {"num_backbones": 1, "calibration": None},
    "constant noise": {"noise": "constant"},
    "prior centred at zero": {"prior_mean": "zero"},
    "prior scale 0.3": {"priors_sigma": 0.3},
    "NUTS": {"engine": "nuts"},
    "last two layers": {"num_probabilistic_layers": 2},
}


def digest(value: Any) -> str:
    """A short name of a configuration: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def source_digest(folder: Path) -> str:
    """A short name of the state of the library's source, kept with each record."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def sort_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Keyword arguments of ``FlaxMLP``, of ``PartialBNN`` and of ``fit``, each option at the one that takes it."""
    import neurobayes as nb

    takers = [nb.FlaxMLP, nb.PartialBNN, nb.PartialBNN.fit]
    known = [set(inspect.signature(taker).parameters) for taker in takers]
    sorted_options: tuple[dict[str, Any], ...] = ({}, {}, {})
    for name, value in options.items():
        place = next((i for i, names in enumerate(known) if name in names), None)
        if place is None:
            raise ValueError(f"neither FlaxMLP, PartialBNN nor its fit takes {name!r}.")
        sorted_options[place][name] = value
    network, constructor, fit = sorted_options
    return network, constructor, fit
