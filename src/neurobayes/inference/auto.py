"""The engine that chooses an engine."""

import dataclasses

import numpy as np

from .._typing import Key
from ..log_density import LogDensity
from ..posterior import Posterior
from .base import Engine, RunControl
from .last_layer import LastLayer, examine
from .nuts import NUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Engine):
    """Exact draws where they are possible (``LastLayer``), else NUTS.

    Parameters
    ----------
    chain_method : how NUTS runs its chains, as there.
    """

    chain_method: str = "vectorized"

    def __post_init__(self) -> None:
        NUTS(chain_method=self.chain_method)

    def run(
        self,
        key: Key,
        log_density: LogDensity,
        start: np.ndarray,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        control: RunControl = RunControl(),  # noqa: B008 - frozen
    ) -> Posterior:
        reason, design = examine(log_density)
        if design is not None:
            reason = "the random weights enter the output linearly"
            posterior = LastLayer().solve(
                design, key, log_density.terms.noise_prior,
                num_samples=num_samples, num_chains=num_chains, control=control,
            )  # fmt: skip
        else:
            posterior = NUTS(chain_method=self.chain_method).run(
                key, log_density, start,
                num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains, control=control,
            )  # fmt: skip
        posterior.info["chosen_because"] = reason
        return posterior
