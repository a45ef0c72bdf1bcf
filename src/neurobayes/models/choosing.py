"""Which weights are Bayesian: the stage between training and sampling.

``check`` finds what can be wrong with a choice before anything is trained;
``choose`` turns it into a partition, or into a plane through weight space, once
there are trained weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import directions, priors, scores, selection, selectors, trees
from .._typing import Key, Params, State
from ..directions import SubspaceSelector
from ..errors import OptionError, SelectionError
from ..likelihoods import Likelihood
from ..network_info import TRAINING_SCORES, NetworkInfo
from ..networks.base import Network
from ..partition import Partition
from ..subspaces import RandomPart
from ..training import Rows
from .base import network_info


class Trained(NamedTuple):
    """A trained network with its training rows: what choices may look at.

    ``noise_std`` is the error of the trained network in working units, and
    ``prior_precision`` that of its training (zero for none).
    """

    network: Network
    params: Params
    state: State
    rows: Rows
    likelihood: Likelihood
    noise_std: np.ndarray
    prior_precision: float
    statistics: Any


def check(
    choice: selectors.Selector | None,
    config: selection.SelectionConfig | None,
    info: NetworkInfo,
    template: Params,
    priors_sigma: Any,
) -> set[str]:
    """The training statistics a choice needs; finds every wrong name and index on the way."""
    if isinstance(choice, SubspaceSelector):
        _check_subspace(choice, config, template, priors_sigma)
        return set()
    asked = _scores_asked_for(choice, info, template)
    if config is not None:
        asked.add(config.method)
    return asked & set(TRAINING_SCORES)


def choose(
    choice: selectors.Selector | None,
    config: selection.SelectionConfig | None,
    trained: Trained,
    key: Key,
    priors_sigma: float | Mapping[str, float],
) -> RandomPart:
    """The union of the chosen weights and the automatically selected ones; or the plane that is asked for."""
    if isinstance(choice, SubspaceSelector):
        network, params, state, rows, likelihood, noise_std, precision, _ = trained
        return directions.find(choice, key, network, params, state, rows, likelihood, noise_std, precision)
    x = trained.rows.x
    info = network_info(
        trained.network, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), trained.params, trained.statistics,
        lambda name: _data_score(name, trained, priors_sigma),
    )  # fmt: skip
    if config is not None:
        snapshot = _Snapshot(info, trained.statistics)
        picked = selectors.weights(
            selection.select_bayesian_components(
                snapshot, config.layer_names, config.method, config.num_pairs_per_layer, config.seed
            )
        )
        choice = picked if choice is None else choice | picked
    assert choice is not None
    return selectors.resolve(choice, info)


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """A trained network as automatic selection wants it."""

    info: NetworkInfo
    training_statistics: Any

    def network_info(self) -> NetworkInfo:
        return self.info


def _data_score(name: str, trained: Trained, priors_sigma: Any) -> Params:
    """The score of every weight that a look at the training rows gives."""
    arguments = trained[:6]
    if name == "fisher":
        return scores.fisher(*arguments)
    return scores.laplace_variance(*arguments, priors.prior_std_tree(trained.params, priors_sigma))


def resolve_untrained(
    choice: selectors.Selector, info: NetworkInfo, template: Params, on_score: Callable[[str], None] = lambda name: None
) -> Partition:
    """The partition for weights and scores that are all zero: right in its names and counts before any training.

    ``on_score`` is told the name of each score that the choice looks at.
    """
    # Broadcast, so that the stand-ins for all weights take no memory.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0.0), leaf.shape), template)

    def scores_of(name: str) -> Mapping[str, Any]:
        on_score(name)
        return {path: np.broadcast_to(0.0, shape) for path, shape in info.shapes.items()}

    return selectors.resolve(choice, dataclasses.replace(info, params=zeros, scores=scores_of))


def _scores_asked_for(choice: selectors.Selector | None, info: NetworkInfo, template: Params) -> set[str]:
    asked: set[str] = set()
    if choice is not None:
        resolve_untrained(choice, info, template, asked.add)
    return asked


def _check_subspace(choice: SubspaceSelector, config: Any, template: Params, priors_sigma: Any) -> None:
    if config is not None:
        raise SelectionError(f"{choice!r} moves all weights, so select_neurons_config has nothing to add. Drop one.")
    if isinstance(priors_sigma, Mapping):
        raise OptionError(
            f"{choice!r} has directions that cross all layers, so priors_sigma must be one number; "
            f"got {priors_sigma!r}."
        )
    total = trees.num_scalars(template)
    if choice.rank >= total:
        raise SelectionError(f"{choice!r}: the network has {total} weights; the rank must be below. Use everything().")
