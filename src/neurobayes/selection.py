"""Single weights chosen by what training says of them: variance, gradient, magnitude or clustering.

The result is a dict of index tuples, as ``weights(...)`` and
``probabilistic_neurons`` take it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from ._checks import check_fraction, check_one_of, check_positive_int
from ._clustering import representatives
from .errors import OptionError, nearest
from .network_info import NetworkInfo, as_arrays, check_finite, check_recorded
from .networks.base import Layer
from .weight_indices import pair_grids

METHODS = ("variance", "gradient", "magnitude", "clustering")
"""Ways to choose weights."""

_STATISTICS = {"variance": "weight_variance", "gradient": "mean_abs_gradient"}
_REQUIRED = ("method", "layer_names", "num_pairs_per_layer")


class TrainedNetwork(Protocol):
    """What selection needs of a trained model."""

    @property
    def training_statistics(self) -> Any:
        """Per-weight statistics of the training run, or None."""
        ...

    def network_info(self) -> NetworkInfo:
        """The layers, shapes and trained weights."""
        ...


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """A checked ``select_neurons_config``."""

    method: str
    layer_names: tuple[str, ...]
    num_pairs_per_layer: int
    seed: int = 0
    burn_in: float = 0.5


def validate_select_config(config: Mapping[str, Any], info: NetworkInfo) -> SelectionConfig:
    """``select_neurons_config`` checked against the network, before anything is trained.

    Parameters
    ----------
    config : 'method', 'layer_names' and 'num_pairs_per_layer', and optionally 'seed' (of the clustering) and 'burn_in'
        (share of the epochs, in [0, 1), before the variance and gradient of weights are gathered).
    info : layers and shapes of the network; weights are not needed.

    Raises
    ------
    OptionError
        An entry is missing, unknown or of the wrong type or size.
    SelectionError
        A layer does not exist, or has no kernel.
    """
    if not isinstance(config, Mapping):
        raise OptionError(f"select_neurons_config must be a dict with {', '.join(_REQUIRED)}; got {config!r}.")
    known = [field.name for field in dataclasses.fields(SelectionConfig)]
    for entry in config:
        if entry not in known:
            raise OptionError(
                f"select_neurons_config has the unknown entry {entry!r}{nearest(str(entry), known)}. "
                f"It takes: {', '.join(known)}."
            )
    missing = [entry for entry in _REQUIRED if entry not in config]
    if missing:
        raise OptionError(f"select_neurons_config lacks {', '.join(missing)}. It needs {', '.join(_REQUIRED)}.")
    checked = SelectionConfig(
        check_one_of("method", config["method"], METHODS),
        _check_names(config["layer_names"]),
        check_positive_int("num_pairs_per_layer", config["num_pairs_per_layer"]),
        check_positive_int("seed", config.get("seed", 0), minimum=0),
        check_fraction("burn_in", config.get("burn_in", 0.5), allow_zero=True),
    )
    for name in checked.layer_names:
        pair_grids(info.layer(name), info.shapes)
    return checked


def select_bayesian_components(
    det_model: TrainedNetwork,
    layer_names: Iterable[str],
    method: str = "variance",
    num_pairs_per_layer: int = 10,
    seed: int = 0,
) -> dict[str, list[tuple]]:
    """The most telling weights of some layers of a trained deterministic network.

    Parameters
    ----------
    det_model : a trained ``DeterministicNN``.
    layer_names : the layers to choose from: dense, conv, attention or embedding.
    method : 'variance', of each weight over the steps after burn-in, in general the second half of
        training (see ``burn_in`` of ``train``); 'gradient', the mean absolute gradient over the
        same steps; 'magnitude' of the trained weight; or 'clustering',
        the weights nearest to the centroids of blocks of similar weights (k-means on the rows and
        on the columns of the kernel).
    num_pairs_per_layer : how many per layer, at least 1; all where a layer has fewer. A pair of
        convolution channels counts as one and is scored by the mean over its window; the
        projections of an attention layer are ranked together.
    seed : of the clustering's starting points.

    Returns
    -------
    Layer -> ``min(num_pairs_per_layer, number of pairs)`` distinct index tuples, the best first;
    ready for ``weights(...)`` and ``probabilistic_neurons``.

    Raises
    ------
    OptionError
        An argument is wrong, or training kept no statistics, or of too few steps: a variance needs
        two, a gradient one.
    SelectionError
        A layer does not exist, has no kernel, or its scores are not finite.
    """
    info = det_model.network_info()
    config = {
        "method": method, "layer_names": layer_names, "num_pairs_per_layer": num_pairs_per_layer, "seed": seed
    }  # fmt: skip
    checked = validate_select_config(config, info)
    values = _values(checked.method, det_model.training_statistics, info)
    return {
        name: select_pairs(
            checked.method, info.layer(name), info.shapes, values, checked.num_pairs_per_layer, checked.seed
        )
        for name in checked.layer_names
    }


def select_pairs(
    method: str,
    layer: Layer,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, np.ndarray],
    num_pairs: int,
    seed: int = 0,
) -> list[tuple]:
    """The best ``min(num_pairs, number of pairs)`` pairs of one layer as distinct index tuples.

    Parameters
    ----------
    method : 'clustering' takes representatives of ``values``, any other method the highest of them.
    layer, shapes : the layer, and the shapes of the network's leaves by path.
    values : leaf path -> the weights to cluster, or the scores to rank by.
    num_pairs : at least 1.
    seed : of the clustering's starting points.
    """
    grids = pair_grids(layer, shapes)
    for grid in grids:
        check_finite(values[grid.leaf], grid.leaf, "weights" if method == "clustering" else method)
    pairs = [grid.values(values[grid.leaf]) for grid in grids]
    if method == "clustering":
        return [grids[number].index(position) for number, position in representatives(pairs, num_pairs, seed)]
    scores = np.concatenate([pair.mean(-1).ravel() for pair in pairs])
    best = np.argsort(-scores, kind="stable")[:num_pairs]
    starts = np.cumsum([0] + [grid.num_in * grid.num_out for grid in grids])
    owners = np.searchsorted(starts, best, side="right") - 1
    return [grids[owner].index(position - starts[owner]) for owner, position in zip(owners, best, strict=True)]


def _values(method: str, statistics: Any, info: NetworkInfo) -> dict[str, np.ndarray]:
    if method == "magnitude":
        return info.score("magnitude")
    if method == "clustering":
        return info.weights()
    check_recorded(method, statistics)
    return as_arrays(getattr(statistics, _STATISTICS[method]))


def _check_names(layer_names: Any) -> tuple[str, ...]:
    if isinstance(layer_names, (str, Mapping)) or not isinstance(layer_names, Iterable):
        raise OptionError(f"layer_names must be a list of layer names such as ['Dense0']; got {layer_names!r}.")
    names = tuple(layer_names)
    repeated = {name for name in names if names.count(name) > 1}
    if not names or repeated or not all(isinstance(name, str) for name in names):
        fault = f"names {', '.join(map(repr, repeated))} twice" if repeated else f"is {list(names)!r}"
        raise OptionError(f"layer_names {fault}. List each layer once, at least one.")
    return names
