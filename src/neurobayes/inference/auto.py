"""The engine that chooses an engine, by what was measured (``docs/12-engines.md`` has the figures)."""

import dataclasses
from typing import ClassVar

import numpy as np

from .._typing import Key
from ..log_density import LogDensity
from ..posterior import Posterior
from .base import Engine, RunControl
from .collapse import is_cheap_to_collapse
from .last_layer import LastLayer, examine
from .nuts import NUTS

SHORT_TREES = 7
"""Tree depth with the output layer integrated out: of the depths measured, that of most effective draws per second."""

CAREFUL_ACCEPT = 0.9
"""Its acceptance rate: at 0.8 a few trajectories in a thousand diverge where the posterior is most curved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Engine):
    """Exact draws where they are possible (``LastLayer``), else NUTS, which is exact in the long run.

    Where it can be, the output layer is integrated out (``NUTS(collapse=True)``), with trajectories of at most 127
    steps. Approximations and unadjusted samplers are never chosen.

    Parameters
    ----------
    chain_method : how NUTS runs its chains, as there.
    """

    chain_method: str = "vectorized"

    one_core: ClassVar[bool] = True

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
            engine = NUTS(chain_method=self.chain_method)
            if is_cheap_to_collapse(log_density):
                engine = dataclasses.replace(
                    engine, collapse=True, max_tree_depth=SHORT_TREES, target_accept=CAREFUL_ACCEPT
                )
                reason += ", but those of the output layer do"
            posterior = engine.run(
                key, log_density, start,
                num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains, control=control,
            )  # fmt: skip
        posterior.info["chosen_because"] = reason
        return posterior
