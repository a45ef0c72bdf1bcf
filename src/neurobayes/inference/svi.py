"""Variational inference with NumPyro's guides: the nearest member of a family of distributions.

Kucukelbir, Tran, Ranganath, Gelman & Blei (2017), "Automatic differentiation
variational inference", JMLR 18. Guides live in coordinates centred at the
start and scaled by the curvature there, where one learning rate suits all; where
the guide can be correlated and the position is small, they are rotated by it too.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._typing import Array, Key
from ..errors import OptionError, TrainingError
from ..log_density import Form, LogDensity, Terms
from ..posterior import Posterior
from ._coordinates import Coordinates, by_curvature
from .base import Engine, RunControl

GUIDES = ("mean_field", "low_rank", "flow")

MAX_FLOW = 128
"""Largest position for a flow, whose layers have 64 weights per pair of dimensions."""

MIN_RANK = 10
CHUNK = 500
INITIAL_SPREAD = 0.5
"""Of the guide at the start, in standard deviations by the curvature."""

CLIP = 100.0
FINAL_SHARE = 0.1
"""Share of the steps, the last ones, that the reported evidence bound is the mean of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVI(Engine):
    """Independent draws of a guide fitted by maximising the evidence lower bound (ELBO).

    ``posterior.info["elbo"]`` is the bound at every step, in nats.

    Parameters
    ----------
    guide : ``"mean_field"`` (independent Gaussians), ``"low_rank"`` (Gaussian, covariance of low rank plus diagonal)
        or ``"flow"`` (block neural autoregressive, up to 128 dimensions).
    num_steps : gradient steps of Adam; the learning rate falls to zero along a cosine.
    learning_rate : at its start, in standard deviations by the curvature.
    num_particles : draws per step that the gradient is averaged over.
    rank : of ``"low_rank"``; by default the square root of the dimension, 10 at least.
    """

    guide: str = "low_rank"
    num_steps: int = 4000
    learning_rate: float = 0.02
    num_particles: int = 8
    rank: int | None = None

    def __post_init__(self) -> None:
        _checks.check_one_of("guide", self.guide, GUIDES)
        _checks.check_positive_int("num_steps", self.num_steps)
        _checks.check_positive_int("num_particles", self.num_particles)
        _checks.check_positive("learning_rate", self.learning_rate)
        if self.rank is not None:
            _checks.check_positive_int("rank", self.rank)

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
        started = time.perf_counter()
        num_samples = control.independent_draws(num_samples)
        size = log_density.size
        if self.guide == "flow" and not 2 <= size <= MAX_FLOW:
            raise OptionError(
                f"guide='flow' is for 2 to {MAX_FLOW} random scalars, and there are {size}. Use guide='low_rank'."
            )
        rank = min(size, max(MIN_RANK, int(size**0.5)) if self.rank is None else self.rank)
        family = Family(
            log_density.form, size, self.guide, rank, self.num_steps, self.learning_rate, self.num_particles
        )
        _prepare(family)
        key_scale, key_run, key_draw = _split(key)
        coordinates = by_curvature(
            log_density.form, key_scale, np.asarray(start, np.float32), log_density.terms,
            rotate=self.guide != "mean_field",
        )  # fmt: skip
        problem = Problem(coordinates, log_density.terms)
        state, elbo, ended_by = _optimise(family, _start(family, key_run, problem), problem, control, started)
        draws = np.asarray(_draw(family, num_chains * num_samples, state, key_draw, problem))
        if not np.all(np.isfinite(draws)):
            raise TrainingError("the fitted guide gives draws that are not finite. Lower learning_rate.")
        shape = (num_chains, num_samples)
        info = {
            "engine": "svi",
            "independent": True,
            "approximation": "variational",
            "guide": self.guide,
            "elbo": elbo,
            "final_elbo": float(np.mean(elbo[-max(1, int(FINAL_SHARE * len(elbo))) :])),
            "ended_by": ended_by,
            "seconds": time.perf_counter() - started,
        }
        if control.on_progress is not None:
            control.on_progress("sampling", num_samples, num_samples)
        return Posterior(draws.reshape(*shape, size), {"diverging": np.zeros(shape, bool)}, info)


@dataclasses.dataclass(frozen=True)
class Family:
    """The static part of a run: equal families share compiled programs."""

    form: Form
    size: int
    guide: str
    rank: int
    num_steps: int
    learning_rate: float
    num_particles: int


class Problem(NamedTuple):
    """The density in the guide's coordinates."""

    coordinates: Coordinates
    terms: Terms


_split = jax.jit(lambda key: jax.random.split(key, 3))


@functools.lru_cache(maxsize=64)
def _prepare(family: Family) -> Any:
    """NumPyro's optimisation problem, its guide set up on a model without data so that it holds none."""
    import numpyro
    import optax
    from numpyro import distributions as dist
    from numpyro.infer import SVI as NumpyroSVI
    from numpyro.infer import Trace_ELBO, autoguide, init_to_value

    def latent_alone(*_):
        return numpyro.sample("latent", dist.ImproperUniform(dist.constraints.real_vector, (), (family.size,)))

    def model(problem):
        latent = latent_alone()
        value = family.form(problem.coordinates.position(latent), problem.terms)
        numpyro.factor("log_density", value + problem.coordinates.log_volume)

    with jax.ensure_compile_time_eval():  # also when first called while another program is traced
        origin = init_to_value(values={"latent": np.zeros(family.size, np.float32)})
        if family.guide == "mean_field":
            guide: Any = autoguide.AutoDiagonalNormal(latent_alone, init_loc_fn=origin, init_scale=INITIAL_SPREAD)
        elif family.guide == "low_rank":
            guide = autoguide.AutoLowRankMultivariateNormal(
                latent_alone, init_loc_fn=origin, init_scale=INITIAL_SPREAD, rank=family.rank
            )
        else:
            guide = autoguide.AutoBNAFNormal(latent_alone, init_loc_fn=origin)
        numpyro.handlers.seed(guide, jax.random.key(0))()
    rate = optax.cosine_decay_schedule(family.learning_rate, family.num_steps)
    optimiser = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate))
    return NumpyroSVI(model, guide, optimiser, Trace_ELBO(family.num_particles))


@functools.partial(jax.jit, static_argnums=0)
def _start(family: Family, key: Key, problem: Problem):
    return _prepare(family).init(key, problem)


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(family: Family, state: Any, problem: Problem, num_steps: Array):
    """``num_steps <= CHUNK`` steps: (state, ELBO of each step, padded to CHUNK)."""
    svi = _prepare(family)
    # Sets up what NumPyro keeps in the object, should this trace come first.
    jax.eval_shape(svi.init, jax.random.key(0), problem)

    def body(i, carry):
        state, elbo = carry
        state, loss = svi.update(state, problem)
        return state, elbo.at[i].set(-loss)

    return jax.lax.fori_loop(0, num_steps, body, (state, jnp.zeros(CHUNK, jnp.float32)))


def _optimise(family: Family, state: Any, problem: Problem, control: RunControl, started: float):
    """All steps in chunks: (state, ELBO history, how it ended)."""
    history: list[np.ndarray] = []
    done = 0
    while done < family.num_steps:
        size = min(CHUNK, family.num_steps - done)
        state, elbo = _run_chunk(family, state, problem, np.int32(size))
        history.append(np.asarray(elbo)[:size])
        done += size
        if not np.all(np.isfinite(history[-1])):
            raise TrainingError(
                f"the evidence bound is not finite after {done} of {family.num_steps} steps. Likely causes: "
                "learning_rate too high, or weights or inputs of extreme size. Lower learning_rate, or use "
                "guide='mean_field'."
            )
        if control.on_progress is not None:
            control.on_progress("warm-up", done, family.num_steps)
        if control.seconds is not None and time.perf_counter() - started >= control.seconds and done < family.num_steps:
            return state, np.concatenate(history), "seconds"
    return state, np.concatenate(history), "num_steps"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(family: Family, num_draws: int, state: Any, key: Key, problem: Problem) -> Array:
    svi = _prepare(family)
    jax.eval_shape(svi.init, jax.random.key(0), problem)
    params = svi.get_params(state)
    latent = svi.guide.sample_posterior(key, params, sample_shape=(num_draws,))["latent"]
    return problem.coordinates.position(latent)
