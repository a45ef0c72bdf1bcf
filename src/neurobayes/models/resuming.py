"""What a killed fit finds again: the identity of a run, and its trained weights on disk."""

import dataclasses
import re
import warnings
from typing import Any

import jax
import numpy as np

from .. import trees
from .._typing import Key, Params, State
from ..backbones import Backbones
from ..checkpoint import Checkpoint, fingerprint
from ..errors import CheckpointError
from ..partition import Partition
from ..pretraining import Pretrained, PretrainingOptions
from ..regularisation import Regularisation
from ..subspaces import RandomPart
from ..weight_statistics import TrainingStatistics

_NAME = "trained"
_CHOICE = "choice"
_ENSEMBLE = "backbones"
_STEPS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_STATISTICS = ("weight_variance", "mean_abs_gradient", "averaged_variance")


def run_identity(plan: Any, key: Key, options: PretrainingOptions, sampling: Any) -> str:
    """A digest of everything that decides the draws; the same in another process.

    The number of draws is left out, so that a finished run can be extended.
    """
    prepared, warm = plan.prepared, plan.warm
    plain = dataclasses.replace(options, learning_rate=None)
    return fingerprint(
        prepared.rows, prepared.groups, prepared.scaling.to_dict(), plan.weights, _density_values(plan.noise_prior),
        type(plan.noise_prior).__name__, sorted(trees.shapes(plan.template).items()), _computation(plan),
        plan.noise_is_default, plan.choice, plan.select_config, plan.prior_mean, repr(plan.priors_sigma),
        plan.learns_prior, plan.may_compress, repr(plain), plan.num_backbones, _rate(options.learning_rate),
        repr(sampling.engine), sampling.num_warmup, sampling.num_chains, key,
        None if warm is None else [(_choice_made(m.source.partition), m.posterior.adaptation) for m in warm.members],
    )  # fmt: skip


def check_choice(checkpoint: Checkpoint, partition: RandomPart) -> None:
    """Hold a run to the Bayesian weights it began with: a choice by arrays does not show in its text."""
    digest = fingerprint(_choice_made(partition))
    known = checkpoint.facts(_CHOICE).get("digest")
    if known is None:
        checkpoint.keep(_CHOICE, {}, digest=digest)
    elif known != digest:
        raise CheckpointError(
            f"checkpoint_dir={str(checkpoint.folder)!r} belongs to a run with other Bayesian weights. Give each run a "
            "folder of its own, or delete this one."
        )


def _choice_made(partition: RandomPart) -> Any:
    return partition.masks() if isinstance(partition, Partition) else partition


def _computation(plan: Any) -> str:
    """What the network computes, operation by operation: two with weights of equal shapes may differ in activation."""
    network, x = plan.network, plan.prepared.rows.x
    row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    params, state = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), row)
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(network.apply)(params, state, row)))


def _rate(rate: Any) -> Any:
    """A learning rate, or a schedule's values at some steps: all schedules of one kind bear the same name."""
    return np.array([np.asarray(rate(step), float) for step in _STEPS]) if callable(rate) else repr(rate)


def _density_values(distribution: Any) -> Any:
    """A noise prior by its log density at some points; its tree orders its numbers anew in every process."""
    if distribution is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # points outside its support
        return np.asarray(distribution.log_prob(np.geomspace(1e-3, 1e3, 25, dtype=np.float32)[:, None]))


def save_trained(checkpoint: Checkpoint, pretrained: Pretrained, name: str = _NAME) -> None:
    """Keep the outcome of the deterministic stage."""
    arrays = {f"history.{name}": values for name, values in pretrained.history.items()}
    for group, tree in (("params", pretrained.params), ("state", pretrained.state)):
        arrays |= {f"{group}.{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    facts: dict[str, Any] = {"sigma": pretrained.sigma, "num_epochs": pretrained.num_epochs}
    if pretrained.statistics is not None:
        facts["num_steps"] = int(pretrained.statistics.num_steps)
        for group in _STATISTICS:
            leaves = jax.tree.leaves(getattr(pretrained.statistics, group))
            arrays |= {f"{group}.{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    if pretrained.search is not None:
        search = dataclasses.asdict(pretrained.search)
        arrays["search.losses"] = search.pop("losses")
        rmse = search.pop("unseen_rmse")
        facts["search"] = search | {"unseen_rmse": None if rmse is None else np.asarray(rmse, float).tolist()}
    checkpoint.keep(name, arrays, **facts)


def is_trained(checkpoint: Checkpoint) -> bool:
    """Whether the deterministic stage is over."""
    return bool(checkpoint.facts(_NAME) or checkpoint.facts(_ENSEMBLE))


def load_trained(
    checkpoint: Checkpoint, template: Params, state_template: State, name: str = _NAME
) -> Pretrained | None:
    """The outcome of the deterministic stage, if it was kept."""
    arrays = checkpoint.arrays(name)
    if arrays is None:
        return None
    facts = checkpoint.facts(name)

    def tree(group: str, like: Any) -> Any:
        keys = sorted(key for key in arrays if key.startswith(f"{group}."))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[key] for key in keys])

    statistics = search = None
    if "num_steps" in facts:
        kept_statistics = {name: tree(name, template) for name in _STATISTICS if f"{name}.00000" in arrays}
        statistics = TrainingStatistics(num_steps=facts["num_steps"], **kept_statistics)
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


def save_backbones(checkpoint: Checkpoint, ensemble: Backbones) -> None:
    """Keep the outcome of training several backbones; the entry that names them comes last."""
    for k, member in enumerate(ensemble.members):
        save_trained(checkpoint, member, f"{_NAME}-{k:02d}")
    arrays = {"row_weights": ensemble.row_weights, "parts": ensemble.parts, "epochs": ensemble.epochs}
    if ensemble.unseen_rmse is not None:
        arrays["unseen_rmse"] = ensemble.unseen_rmse
    facts = {name: getattr(ensemble, name) for name in ("num_parts", "whole_inputs", "compressed")}
    checkpoint.keep(_ENSEMBLE, arrays, num_members=len(ensemble.members), **facts)


def load_backbones(checkpoint: Checkpoint, template: Params, state_template: State) -> Backbones | None:
    """The outcome of training several backbones, if it was kept."""
    arrays = checkpoint.arrays(_ENSEMBLE)
    if arrays is None:
        return None
    facts = checkpoint.facts(_ENSEMBLE)
    found = [
        load_trained(checkpoint, template, state_template, f"{_NAME}-{k:02d}") for k in range(facts["num_members"])
    ]
    members = tuple(member for member in found if member is not None)
    search = members[0].search
    assert search is not None  # it is kept with every member
    return Backbones(
        members, arrays["row_weights"], arrays["parts"], facts["num_parts"], facts["whole_inputs"], search,
        arrays["epochs"], arrays.get("unseen_rmse"), facts["compressed"],
    )  # fmt: skip
