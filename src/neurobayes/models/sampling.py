"""The sampling stage of a fit: options, stopping rules, checkpoints, and the verdict on the draws."""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .. import _checks, log_density, predictive
from .._typing import Key
from ..checkpoint import Checkpoint
from ..data import bucket_size, pad_rows
from ..diagnostics import Diagnostics, diagnose, effective_sample_size, split_r_hat
from ..errors import OptionError, unknown_choice
from ..inference.base import Engine, RunControl
from ..posterior import Posterior
from ..predictive import Source
from .base import Prepared
from .progress import Report

NUM_REFERENCE_ROWS = 64
"""Training rows at which convergence of the predicted function is judged."""

NO_TREE = 60
"""Tree depth that no run reaches, for engines whose draws are made without one."""

USUAL_TREE_DEPTH = 10

LEAST_PADDED_DRAWS = 512
"""Draws of a backbone are padded to so many: how many there are depends on how many backbones take part, and one
program should serve all numbers."""

DEFAULT_SAMPLES = 1000
LEAST_SAMPLES = 8
"""Draws per chain of each backbone at least: fewer say nothing about its spread."""

MOST_SAMPLES = 50_000
"""Draws per chain at which a run with a stopping rule ends in any case."""


@dataclasses.dataclass(frozen=True)
class Until:
    """A quality at which sampling may end, read from text such as ``"ess>400"`` or ``"ess>400 and r_hat<1.01"``."""

    ess: float = 0.0
    r_hat: float = np.inf

    @classmethod
    def parse(cls, text: Any) -> "Until | None":
        """The rule a user wrote; None for none."""
        if text is None:
            return None
        found: dict[str, float] = {}
        parts = str(text).split(" and ") if isinstance(text, str) else []
        for part in parts:
            match = re.fullmatch(r"\s*(?:(ess)\s*>=?|(r_hat)\s*<=?)\s*([0-9]+(?:\.[0-9]+)?)\s*", part)
            if match is None:
                parts = []
                break
            found[match[1] or match[2]] = float(match[3])
        if not parts:
            raise OptionError(f"until={text!r} is not understood. Write 'ess>400', 'r_hat<1.01', or both with ' and '.")
        if found.get("r_hat", np.inf) <= 1:
            raise OptionError(f"until={text!r} cannot be met: R-hat of perfect draws is 1. Write 'r_hat<1.01'.")
        return cls(**found)

    def holds(self, quantities: np.ndarray) -> bool:
        """Whether draws ``(chain, draw, quantity)`` are good enough in every quantity that varies."""
        if not np.all(np.isfinite(quantities)):
            return False
        varying = quantities[..., np.ptp(quantities, axis=(0, 1)) > 0]
        if varying.shape[-1] == 0 or varying.shape[1] < 4:
            return False
        if not effective_sample_size(varying).min() > self.ess:  # also where it is not a number
            return False
        return bool(np.isinf(self.r_hat) or split_r_hat(varying).max() < self.r_hat)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from the posterior, and when to stop."""

    engine: Engine
    num_warmup: int
    num_samples: int
    num_chains: int
    until: Until | None = None
    seconds: float | None = None
    checkpoint_dir: str | os.PathLike | None = None
    num_backbones: int = 1

    @classmethod
    def from_user(
        cls,
        engine: Any,
        chain_method: str,
        num_warmup: int,
        num_samples: int | None,
        num_chains: int,
        until: str | None,
        seconds: float | None,
        checkpoint_dir: str | os.PathLike | None,
    ) -> "Sampling":
        """Checked options; without an engine, exact draws where they are possible, else NUTS."""
        rule = Until.parse(until)
        if seconds is not None:
            seconds = _checks.check_positive("seconds", seconds)
        if num_samples is None:
            num_samples = DEFAULT_SAMPLES if rule is None and seconds is None else MOST_SAMPLES
        if checkpoint_dir is not None and not isinstance(checkpoint_dir, str | os.PathLike):
            raise OptionError(f"checkpoint_dir must be the path of a folder; got {checkpoint_dir!r}.")
        for name, count in (("num_warmup", num_warmup), ("num_samples", num_samples), ("num_chains", num_chains)):
            _checks.check_positive_int(name, count)
        config = engine_config(engine, chain_method)
        return cls(config, num_warmup, num_samples, num_chains, rule, seconds, checkpoint_dir)

    def shared(self, num_backbones: int, *, exact: bool) -> "Sampling":
        """What each of several backbones does.

        Exact draws are shared out, so that all together make as many as one alone would. Chains must show that they
        have converged, so each makes more than its share: the draws over the square root of the number.
        """
        if num_backbones == 1:
            return self
        until = self.until
        if until is not None:
            until = dataclasses.replace(until, ess=until.ess / num_backbones)
        return dataclasses.replace(
            self,
            num_samples=max(
                LEAST_SAMPLES, math.ceil(self.num_samples / (num_backbones if exact else num_backbones**0.5))
            ),
            seconds=None if self.seconds is None else self.seconds / num_backbones,
            until=until,
            num_backbones=num_backbones,
        )

    @property
    def enough_independent(self) -> int | None:
        """Independent draws of each chain with which every stopping rule holds; None without a rule."""
        if self.until is None and self.seconds is None:
            return None
        wanted = 0.0 if self.until is None else self.until.ess
        return max(-(-DEFAULT_SAMPLES // self.num_backbones), int(wanted) + 1)


def engine_config(engine: Any, chain_method: str) -> Engine:
    """The engine behind a name or a config; ``"auto"`` where none is given."""
    from ..inference import ENGINES

    engine = "auto" if engine is None else engine
    if isinstance(engine, str):
        if engine not in ENGINES:
            raise unknown_choice("engine", engine, ENGINES)
        config: Any = ENGINES[engine]
        has_method = "chain_method" in (field.name for field in dataclasses.fields(config))
        return config(chain_method=chain_method) if has_method else config()
    if not isinstance(engine, Engine):
        raise OptionError(
            f"engine must be one of {', '.join(ENGINES)}, or a config such as nb.inference.NUTS(); got {engine!r}."
        )
    return engine


def sample(
    sampling: Sampling,
    key: Key,
    density: log_density.LogDensity,
    start: np.ndarray,
    *,
    is_enough: Callable[[np.ndarray], bool] | None,
    checkpoint: Checkpoint | None,
    warm_start: dict[str, Any] | None,
    report: Report,
    interrupted: Callable[[], bool],
) -> Posterior:
    """Draws from the engine; a density without any random scalar needs none."""
    if density.size == 0:
        shape = (sampling.num_chains, min(sampling.num_samples, DEFAULT_SAMPLES))
        return Posterior(np.zeros((*shape, 0), np.float32), {"diverging": np.zeros(shape, bool)}, {"engine": "none"})
    control = RunControl(
        on_progress=report, checkpoint=checkpoint, seconds=sampling.seconds, is_enough=is_enough,
        warm_start=warm_start or None, enough_independent=sampling.enough_independent, interrupted=interrupted,
    )  # fmt: skip
    return sampling.engine.run(
        key, density, start, num_warmup=sampling.num_warmup, num_samples=sampling.num_samples,
        num_chains=sampling.num_chains, control=control,
    )  # fmt: skip


def with_draws(source: Source, density: log_density.LogDensity, draws: np.ndarray) -> Source:
    """``source`` with positions ``(draws, size)`` as its random weights and noise (in working units)."""
    theta, unconstrained = draws[:, : density.form.num_theta], draws[:, density.form.num_theta :]
    if not density.form.num_noise:
        return source._replace(theta=theta, noise_std=np.zeros((len(draws), 0), np.float32))
    padded = pad_rows(unconstrained, bucket_size(max(len(draws), LEAST_PADDED_DRAWS)))
    noise_std = np.asarray(log_density.constrain_noise(padded, density.terms.noise_prior))[: len(draws)]
    return source._replace(theta=theta, noise_std=noise_std)


def reference_quantities(prepared: Prepared, source: Source, num_chains: int) -> np.ndarray:
    """Predicted values at reference rows and noise of each draw, ``(chain, draw, quantity)``."""
    # Always as many, some of them twice where there are few, so that one compiled program serves all data sets.
    chosen = np.linspace(0, prepared.num_rows - 1, NUM_REFERENCE_ROWS).astype(int)
    values = predictive.function_draws(source, np.asarray(prepared.rows.x)[chosen], source.theta)
    flat = np.concatenate([values.reshape(len(values), -1), source.noise_std], axis=-1)
    return flat.reshape(num_chains, -1, flat.shape[-1])


def stopping_rule(
    sampling: Sampling, prepared: Prepared, source: Source, density: log_density.LogDensity
) -> Callable[[np.ndarray], bool] | None:
    """The quality rule as a function of the positions drawn so far, ``(chain, draw, size)``."""
    rule = sampling.until
    if rule is None:
        return None

    def is_enough(positions: np.ndarray) -> bool:
        drawn = with_draws(source, density, positions.reshape(-1, positions.shape[-1]))
        return rule.holds(reference_quantities(prepared, drawn, len(positions)))

    return is_enough


def judge(prepared: Prepared, source: Source, posterior: Posterior, num_backbones: int = 1) -> Diagnostics:
    """Convergence of predicted values at reference rows, and of the noise."""
    info = posterior.info
    if posterior.analytic is None or info.get("approximation"):
        quantities = reference_quantities(prepared, source, posterior.num_chains)
    else:  # independent draws, in whose weights the predictions are linear: only whether they are finite matters
        quantities = np.concatenate([source.theta, source.noise_std], axis=-1)
        quantities = quantities.reshape(posterior.num_chains, -1, quantities.shape[-1])
    depth = info.get("max_tree_depth", NO_TREE)
    return diagnose(
        # A limit below the usual was chosen for speed; whether the short trajectories do, the effective draws tell.
        quantities, posterior.stats, depth if depth >= USUAL_TREE_DEPTH else NO_TREE,
        independent=info.get("independent", False), approximation=info.get("approximation", ""),
        num_backbones=num_backbones, pareto_k=info.get("pareto_k", float("nan")),
    )  # fmt: skip


def on_host(source: Source) -> Source:
    """``source`` with its arrays on the host, so that a fitted model can be pickled."""
    params, state = jax.tree.map(np.asarray, (source.params, source.state))
    return source._replace(params=params, state=state)
