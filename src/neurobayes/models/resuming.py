"""What a killed fit finds again: the identity of a run, and its trained weights on disk."""

import dataclasses
from typing import Any

import jax
import numpy as np

from .. import trees
from .._typing import Key, Params, State
from ..checkpoint import Checkpoint, fingerprint
from ..pretraining import Pretrained, PretrainingOptions
from ..regularisation import Regularisation
from ..training import TrainingStatistics

_NAME = "trained"


def run_identity(plan: Any, key: Key, options: PretrainingOptions, sampling: Any) -> str:
    """A digest of everything that decides the draws; the same in another process.

    The number of draws is left out, so that a finished run can be extended.
    """
    prepared = plan.prepared
    rate = options.learning_rate
    plain = dataclasses.replace(options, learning_rate=None)
    return fingerprint(
        prepared.rows, plan.weights, _parameters(plan.noise_prior), type(plan.noise_prior).__name__,
        sorted(trees.shapes(plan.template).items()), type(plan.network).__name__, repr(plan.choice),
        repr(plan.select_config), plan.prior_mean, repr(plan.priors_sigma), repr(plain),
        getattr(rate, "__qualname__", repr(rate)), repr(sampling.engine), sampling.num_warmup, sampling.num_chains, key,
    )  # fmt: skip


def _parameters(distribution: Any) -> list[np.ndarray]:
    """The numbers of a distribution; its tree also holds objects that print their memory address."""
    leaves = jax.tree.leaves(distribution)
    return [np.asarray(leaf) for leaf in leaves if isinstance(leaf, float | int | np.ndarray | np.generic | jax.Array)]


def save_trained(checkpoint: Checkpoint, pretrained: Pretrained) -> None:
    """Keep the outcome of the deterministic stage."""
    arrays = {f"history.{name}": values for name, values in pretrained.history.items()}
    for group, tree in (("params", pretrained.params), ("state", pretrained.state)):
        arrays |= {f"{group}.{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    facts: dict[str, Any] = {"sigma": pretrained.sigma, "num_epochs": pretrained.num_epochs}
    if pretrained.statistics is not None:
        facts["num_steps"] = pretrained.statistics.num_steps
        for group in ("weight_variance", "mean_abs_gradient"):
            leaves = jax.tree.leaves(getattr(pretrained.statistics, group))
            arrays |= {f"{group}.{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    if pretrained.search is not None:
        search = dataclasses.asdict(pretrained.search)
        arrays["search.losses"] = search.pop("losses")
        rmse = search.pop("unseen_rmse")
        facts["search"] = search | {"unseen_rmse": None if rmse is None else np.asarray(rmse, float).tolist()}
    checkpoint.keep(_NAME, arrays, **facts)


def load_trained(checkpoint: Checkpoint, template: Params, state_template: State) -> Pretrained | None:
    """The outcome of the deterministic stage, if it was kept."""
    arrays = checkpoint.arrays(_NAME)
    if arrays is None:
        return None
    facts = checkpoint.facts(_NAME)

    def tree(group: str, like: Any) -> Any:
        names = sorted(name for name in arrays if name.startswith(f"{group}."))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])

    statistics = search = None
    if "num_steps" in facts:
        statistics = TrainingStatistics(
            tree("weight_variance", template), tree("mean_abs_gradient", template), facts["num_steps"]
        )
    if "search" in facts:
        kept = dict(facts["search"])
        rmse = kept.pop("unseen_rmse")
        search = Regularisation(
            sigma=kept["sigma"], num_epochs=kept["num_epochs"], losses=arrays["search.losses"],
            sigmas=tuple(kept["sigmas"]), unseen_rmse=None if rmse is None else np.array(rmse),
        )  # fmt: skip
    history = {name.removeprefix("history."): values for name, values in arrays.items() if name.startswith("history.")}
    return Pretrained(
        tree("params", template), tree("state", state_template), history, statistics, facts["sigma"],
        facts["num_epochs"], search,
    )  # fmt: skip
