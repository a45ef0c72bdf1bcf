"""Pathfinder: a Gaussian from the curvature that L-BFGS finds on its way to the mode, with BlackJAX.

Zhang, Carpenter, Gelman & Vehtari (2022), "Pathfinder: parallel quasi-Newton
variational inference", JMLR 23. Several paths start from dispersed points,
in coordinates scaled by the curvature at the trained weights; the Gaussian with
the largest evidence bound over all of them is drawn from.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from .. import _checks
from .._typing import Key
from ..errors import TrainingError
from ..log_density import Form, LogDensity, Terms
from ..posterior import Posterior
from . import _blackjax
from ._coordinates import Coordinates, by_curvature
from .base import Engine, RunControl

DENSE_COVARIANCE = 100
"""Up to this size the draws' full covariance is handed to samplers that start from here, else its diagonal."""

SMALLEST_TAIL = 5
CONSTANT_RATIOS = 1e-3
"""Log ratios that differ by less differ by rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pathfinder(Engine):
    """Independent draws of the best Gaussian along the way to the mode; seconds, and no warm-up.

    ``posterior.info["pareto_k"]`` judges it: above 0.7 the Gaussian is too far
    from the posterior for its moments to be relied on. ``posterior.adaptation``
    starts a sampler there: ``NUTS().run(..., control=RunControl(warm_start=posterior.adaptation))``.

    Parameters
    ----------
    num_paths : number of starting points.
    max_iterations : L-BFGS iterations of a path, at most.
    history : gradient pairs that the curvature is made of.
    num_elbo_draws : draws that judge each Gaussian.
    jitter : paths start this many posterior standard deviations, by the curvature, around the trained weights:
        at the mode there is no way left to learn from.
    """

    num_paths: int = 4
    max_iterations: int = 100
    history: int = 10
    num_elbo_draws: int = 50
    jitter: float = 2.0

    def __post_init__(self) -> None:
        for name in ("num_paths", "max_iterations", "history", "num_elbo_draws"):
            _checks.check_positive_int(name, getattr(self, name))
        _checks.check_positive("jitter", self.jitter)

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
        _blackjax.load("engine='pathfinder'")
        started = time.perf_counter()
        num_samples = control.independent_draws(num_samples)
        form, terms = log_density.form, log_density.terms
        key_scale, key_draw, key_paths = _split(key)
        coordinates = by_curvature(form, key_scale, np.asarray(start, np.float32), terms)
        paths = [
            _path(self, form, jax.random.fold_in(key_paths, path), coordinates, terms) for path in range(self.num_paths)
        ]
        elbos = np.array([float(path.elbo) for path in paths]) + float(coordinates.log_volume)
        if not np.any(np.isfinite(elbos)):
            raise TrainingError(
                "no Gaussian along any path has a finite evidence bound. Likely causes: weights or inputs of extreme "
                "size, or starting points too far out. Lower jitter, or use engine='nuts'."
            )
        best = paths[int(np.nanargmax(elbos))]
        num_draws = num_chains * num_samples
        draws, log_ratios = _draw(form, num_draws, key_draw, best, coordinates, terms)
        draws = np.asarray(draws)
        shape = (num_chains, num_samples)
        info = {
            "engine": "pathfinder",
            "independent": True,
            "approximation": "Pathfinder",
            "elbo": elbos,
            "pareto_k": _pareto_k(np.asarray(log_ratios, float)),
            "seconds": time.perf_counter() - started,
        }
        if control.on_progress is not None:
            control.on_progress("sampling", num_samples, num_samples)
        chains = draws.reshape(*shape, -1)
        return Posterior(chains, {"diverging": np.zeros(shape, bool)}, info, _adaptation(chains))


_split = jax.jit(lambda key: jax.random.split(key, 3))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _path(config: Pathfinder, form: Form, key: Key, coordinates: Coordinates, terms: Terms) -> Any:
    """BlackJAX's state of the best Gaussian of one path."""
    approximate = _blackjax.load("engine='pathfinder'").vi.pathfinder.approximate
    key_start, key_run = jax.random.split(key)
    state, _ = approximate(
        key_run, _density(form, coordinates, terms),
        config.jitter * jax.random.normal(key_start, coordinates.centre.shape),
        num_samples=config.num_elbo_draws, maxiter=config.max_iterations, maxcor=config.history, maxls=100,
    )  # fmt: skip
    return state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(form: Form, num_draws: int, key: Key, state: Any, coordinates: Coordinates, terms: Terms):
    """Positions, and the log of density over approximation up to a constant."""
    sample = _blackjax.load("engine='pathfinder'").vi.pathfinder.sample
    latent, log_q = sample(key, state, num_draws)
    log_p = jax.lax.map(_density(form, coordinates, terms), latent)
    return coordinates.position(latent), log_p - log_q


def _density(form: Form, coordinates: Coordinates, terms: Terms):
    return lambda latent: form(coordinates.position(latent), terms)


def _pareto_k(log_ratios: np.ndarray) -> float:
    """Shape of the generalised Pareto tail of the importance ratios (Vehtari et al. 2024, JMLR 25)."""
    from arviz_stats.base import array_stats

    if len(log_ratios) < 5 * SMALLEST_TAIL or not np.all(np.isfinite(log_ratios)):
        return float("nan")
    if np.ptp(log_ratios) < CONSTANT_RATIOS:
        return float("-inf")  # no tail at all
    return float(array_stats.psislw(-log_ratios)[1])  # like LOO, it takes the ratios' negative logarithms


def _adaptation(chains: np.ndarray) -> dict[str, Any]:
    """What a sampler with as many chains can start from."""
    num_chains, _, size = chains.shape
    flat = chains.reshape(-1, size).astype(float)
    if size <= DENSE_COVARIANCE:
        covariance = np.atleast_2d(np.cov(flat.T)) if len(flat) > 1 else np.eye(size)
        spread = covariance + 1e-6 * np.diag(np.diag(covariance))
    else:
        spread = flat.var(axis=0)
    return {
        "position": chains[:, -1],
        "step_size": np.full(num_chains, 0.1, np.float32),
        "inverse_mass": np.tile(spread.astype(np.float32), (num_chains, *[1] * spread.ndim)),
    }
