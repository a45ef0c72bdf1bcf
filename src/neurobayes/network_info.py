"""What a selector may know of a network: its layers, shapes, weights and scores."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from . import trees
from ._typing import Params
from .errors import NotFittedError, OptionError, SelectionError, nearest
from .networks.base import Layer
from .subspaces import RandomPart

TRAINING_SCORES = ("variance", "gradient", "swag_variance")
"""Scores that need statistics which training keeps only where it is asked to."""

DATA_SCORES = ("fisher", "laplace_variance")
"""Scores that need the trained weights and the training data."""

SCORE_NAMES = ("magnitude", *TRAINING_SCORES, *DATA_SCORES)
"""Scores that are known by name."""

_HOW_TO_LIST = "`nb.print_layer_configs(network)` lists layers, shapes and sizes."
_MAX_LISTED = 20


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkInfo:
    """What is known of a network when its Bayesian part is chosen.

    Attributes
    ----------
    layers : the layers that own parameters, in the order in which they are called.
    shapes : leaf path -> shape, in pytree order.
    params : the trained weights, where there are any.
    scores : name (one of ``SCORE_NAMES`` but 'magnitude') -> score by leaf path, or None where it is not known.
    """

    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]
    params: Params | None = None
    scores: Callable[[str], Mapping[str, Any] | None] | None = None

    def leaves_of(self, name: str) -> tuple[str, ...]:
        """The leaves of a layer, of a whole sub-tree or of one leaf, by its name.

        Square brackets are read as keys: ``blocks[0].query`` is ``blocks.0.query``.

        Raises
        ------
        SelectionError
            Nothing has this name.
        """
        key = trees.as_path(name)
        owned = {leaf for layer in self.layers if layer.name in (name, key) for leaf in layer.leaves}
        leaves = tuple(path for path in self.shapes if path in owned or trees.is_under(path, key))
        if not leaves:
            raise self.unknown(name)
        return leaves

    def layer(self, name: str) -> Layer:
        """The layer of this name.

        Raises
        ------
        SelectionError
            No layer has this name.
        """
        found = self.find_layer(name)
        if found is None:
            raise self.unknown(name)
        return found

    def find_layer(self, name: str) -> Layer | None:
        """The layer of this name, or None."""
        return next((layer for layer in self.layers if layer.name in (name, trees.as_path(name))), None)

    def find_leaf(self, name: str) -> str | None:
        """The path of the leaf of this name, or None."""
        return next((path for path in (name, trees.as_path(name)) if path in self.shapes), None)

    def unknown(self, name: str) -> SelectionError:
        """The error for a name that is neither a layer, nor a sub-tree, nor a leaf."""
        names = [layer.name for layer in self.layers]
        # Layers first: users mean them more often than the leaves and modules below or above.
        close = nearest(name, names) or nearest(name, self._prefixes())
        return SelectionError(f"no layer is named {name!r}. The network has {listed(names)}{close}. {_HOW_TO_LIST}")

    def weights(self) -> dict[str, np.ndarray]:
        """The trained weights, leaf path -> float64 array.

        Raises
        ------
        NotFittedError
            There are none yet.
        """
        if self.params is None:
            raise NotFittedError("a choice by the values of the weights needs trained weights. Train or fit first.")
        return as_arrays(self.params)

    def score(self, name: str) -> dict[str, np.ndarray]:
        """A score by its name, leaf path -> float64 array.

        Raises
        ------
        NotFittedError
            The magnitude of the weights is asked for before there are any.
        OptionError
            Training kept no statistics to score by, or there are no data to score on.
        """
        if name == "magnitude":
            return {path: np.abs(leaf) for path, leaf in self.weights().items()}
        scores = self.scores(name) if self.scores is not None else None
        if scores is None:
            raise missing_statistics(name)
        return as_arrays(scores)

    def _prefixes(self) -> set[str]:
        found = set()
        for path in self.shapes:
            while path:
                found.add(path)
                path = trees.parent(path)
        return found


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One line of the table of layers; ``num_bayesian`` is None where no choice was made yet."""

    layer: str
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    num_weights: int
    num_bayesian: int | None


def layer_table(info: NetworkInfo, partition: RandomPart | None = None) -> tuple[LayerRow, ...]:
    """One row per layer: its leaves by their name within the layer, its weights, and how many of them are Bayesian."""
    counts = None if partition is None else partition.counts()
    rows = []
    for layer in info.layers:
        prefix = layer.name + trees.SEPARATOR
        rows.append(
            LayerRow(
                layer.name,
                layer.kind,
                tuple((leaf.removeprefix(prefix), tuple(info.shapes[leaf])) for leaf in layer.leaves),
                sum(math.prod(info.shapes[leaf]) for leaf in layer.leaves),
                None if counts is None else sum(counts[leaf] for leaf in layer.leaves),
            )
        )
    return tuple(rows)


def as_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree, or of a mapping by path, as float64 arrays."""
    return {path: np.asarray(leaf, dtype=np.float64) for path, leaf in trees.flatten(tree).items()}


def missing_statistics(name: str) -> OptionError:
    """The error for a score that is not known for want of training statistics or of data."""
    if name in DATA_SCORES:
        return OptionError(f"{name!r} needs the training data. Use it inside PartialBNN(network, bayesian=...).fit.")
    return OptionError(
        f"there are no training statistics for {name!r}. Train with `track_statistics=True` (the default of `fit` and "
        "`train`), or choose by 'magnitude', which needs the weights alone."
    )


def check_recorded(name: str, statistics: Any) -> None:
    """Raise where training kept no statistics for a score, or of too few steps: a variance over one is zero."""
    if statistics is None:
        raise missing_statistics(name)
    needed = 1 if name == "gradient" else 2
    if statistics.num_steps < needed:
        raise OptionError(
            f"{name!r} needs the statistics of at least {needed} training steps, and there are those of "
            f"{statistics.num_steps}. They begin after burn_in, a share of the epochs: train for more epochs, lower "
            "burn_in, let early stopping wait longer, or choose by 'magnitude', which needs the weights alone."
        )


def check_finite(scores: np.ndarray, owner: str, what: str) -> None:
    """Raise where a score is NaN or infinite: a ranking by it would be arbitrary."""
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise SelectionError(
            f"the {what} of {owner!r} has {len(bad)} non-finite values, the first at {tuple(map(int, bad[0]))}. "
            "Training may have diverged: lower the learning rate."
        )


def listed(names: Iterable[str]) -> str:
    """Names joined by commas, cut off where there are very many."""
    names = list(names)
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
