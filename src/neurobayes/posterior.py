"""Draws from a posterior, with how they were made."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .errors import OptionError


class Analytic(Protocol):
    """Predictive moments that need no draws, where an engine knows them in closed form."""

    @property
    def noise_var(self) -> np.ndarray:
        """Posterior mean of each output's noise variance, ``(outputs,)``, in working units."""
        ...

    def moments(self, hoisted: Any, carry: Any, num_rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the outputs, noise not included, each ``(n, outputs)``, for a split forward pass.

        ``num_rows`` is how many of its rows are wanted, the first ones; all by default.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Draws of the flat position, and what the sampler reported on the way.

    Attributes
    ----------
    draws : (chain, draw, size) positions: random weights, then unconstrained noise.
    stats : per-draw reports, each (chain, draw): ``diverging``, ``num_steps``, ``accept_prob``, ``energy`` …
    info : one entry per run: engine, seconds, step size, tree depth limit, versions.
    analytic : exact predictive moments, from engines that know them.
    adaptation : what a later run over the same position can start from: last positions, step size, mass matrix.
    """

    draws: np.ndarray
    stats: dict[str, np.ndarray]
    info: dict[str, Any]
    adaptation: dict[str, Any] = dataclasses.field(default_factory=dict)
    analytic: Analytic | None = None

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return self.draws.shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return self.draws.shape[1]

    @property
    def flat_draws(self) -> np.ndarray:
        """All draws of all chains, shape (chain * draw, size)."""
        return self.draws.reshape(self.num_chains * self.num_draws, self.draws.shape[-1])


def joined(parts: Sequence[Posterior]) -> Posterior:
    """Posteriors of positions of the same length as one, the chains of each after those of the one before."""
    if len(parts) == 1:
        return parts[0]
    if len({part.draws.shape[-1] for part in parts}) > 1:
        raise OptionError(
            "the backbones chose different numbers of Bayesian weights, so their draws cannot be one array. Choose "
            "weights by name or index, or fit with num_backbones=1."
        )
    names = [name for name in parts[0].stats if all(name in part.stats for part in parts)]
    draws = min(part.num_draws for part in parts)  # runs that ended by a rule may differ
    stats = {name: np.concatenate([part.stats[name][:, :draws] for part in parts]) for name in names}
    seconds = sum(float(part.info.get("seconds", 0.0)) for part in parts)
    info = {**parts[0].info, "num_backbones": len(parts), "seconds": seconds}
    early = [part.info["ended_by"] for part in parts if part.info.get("ended_by", "num_samples") != "num_samples"]
    if early:
        info["ended_by"] = early[0]
    return Posterior(np.concatenate([part.draws[:, :draws] for part in parts]), stats, info)
