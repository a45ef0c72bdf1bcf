"""Stochastic-gradient Langevin dynamics and Hamiltonian Monte Carlo over mini-batches, with BlackJAX's integrators.

Welling & Teh (2011); Chen, Fox & Guestrin (2014); cyclical step sizes: Zhang,
Li, Zhang, Chen & Wilson (2020), "Cyclical Stochastic Gradient MCMC", ICLR.

Every step follows an unbiased estimate of the gradient of the full log joint
density, ``log p(theta, noise) + N / B * sum over B rows``, and adds the noise
that makes the posterior itself, at temperature 1, the stationary distribution
as the step size goes to zero. There is no accept step: the discretisation and
the noise of the estimate widen the draws. Where the log density has curvature
``c``, the variance of SGLD is too large by a share of about
``step_size * c * (1 + N / B) / 2``.

Steps are taken in coordinates scaled by the curvature at the trained weights,
where every weight has a spread of about one: the same step size suits all.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._typing import Key
from ..errors import OptionError
from ..log_density import Form, LogDensity
from ..posterior import Posterior
from . import _blackjax
from ._batches import Batches, Data, make_batches
from ._driver import Chains, advance, chains_by_program, longest_chunk, map_chains
from .base import Engine, RunControl
from .curvature import NUM_PROBES, inverse_mass, simulated_scores

METHODS = ("sgld", "sghmc")
SCHEDULES = ("cyclical", "constant", "decreasing")
DECAY_STEPS = 1000
"""Steps after which a decreasing step size has fallen to 0.8 of its first value; the exponent is -1/3."""

WIDENING = 0.1
"""Share by which the default step size widens the variance in the narrowest direction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGMCMC(Engine):
    """Langevin dynamics on mini-batches of the rows: for data too large for full gradients.

    Parameters
    ----------
    method : ``"sgld"`` (overdamped) or ``"sghmc"`` (with momentum and friction).
    schedule : ``"cyclical"``: the step size falls from twice ``step_size`` to zero along a cosine, again and again;
        the first part of each cycle explores and stores nothing. ``"constant"``, or ``"decreasing"`` with the power
        -1/3 of the number of steps.
    batch_size : rows per gradient, drawn with replacement; all rows, without any noise, where there are fewer.
    step_size : in units of the posterior spread of a weight; None for the one that widens the variance in the
        narrowest direction by about a tenth, and others by less.
    thinning : steps per stored draw, and per iteration of warm-up.
    friction : decay rate of the momentum of ``"sghmc"``.
    cycle_draws : stored draws per cycle.
    exploration : the share of a cycle's steps that explores: without noise in its first half, and with it in the
        second, so that what is stored afterwards is not too near the mode.
    temperature : 1 targets the posterior; less, a sharper ("cold") one.
    jitter : chains start at the trained weights plus this many prior standard deviations of noise.
    """

    method: str = "sgld"
    schedule: str = "cyclical"
    batch_size: int = 256
    step_size: float | None = None
    thinning: int = 50
    friction: float = 1.0
    cycle_draws: int = 50
    exploration: float = 0.5
    temperature: float = 1.0
    jitter: float = 0.05

    def __post_init__(self) -> None:
        _checks.check_one_of("method", self.method, METHODS)
        _checks.check_one_of("schedule", self.schedule, SCHEDULES)
        for name in ("batch_size", "thinning", "cycle_draws"):
            _checks.check_positive_int(name, getattr(self, name))
        for name in ("friction", "temperature"):
            _checks.check_positive(name, getattr(self, name))
        if self.step_size is not None:
            _checks.check_positive("step_size", self.step_size)
        _checks.check_fraction("exploration", self.exploration, allow_zero=True)
        _checks.check_positive("jitter", self.jitter, allow_zero=True)

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
        _blackjax.load("engine='sgmcmc'")
        terms, start = log_density.terms, np.asarray(start, np.float32)
        real = np.asarray(terms.row_weights) > 0
        data = Data(terms, np.argsort(~real, kind="stable").astype(np.int32), np.float32(real.sum()))
        batches = make_batches(log_density, self.batch_size)
        kernel = Kernel(batches, self.method, self.schedule, self.thinning, self.cycle_draws, self.exploration,
                        self.friction, self.temperature)  # fmt: skip
        key_scale, key_chains = _split(key)
        scale, curvature = (np.asarray(a) for a in _scale_and_curvature(log_density.form, key_scale, start, terms))
        positions, jitter = np.tile(start, (num_chains, 1)), np.float32(self.jitter)
        if control.warm_start:
            positions, scale = _warm_start(control.warm_start, num_chains, len(start))
            jitter = np.float32(0)
        step_size = self._step_size(float(curvature), batches.size, int(real.sum()))
        step, groups = functools.partial(_advance, kernel, data), []
        for part in chains_by_program(num_chains):
            indices, step_size = part.astype(np.int32), np.float32(step_size)
            state = _start_chains(kernel, key_chains, indices, positions[part], jitter, scale, step_size, terms)
            groups.append(Chains(step, state, lambda state: np.where(state.finite, 0.0, np.nan), len(start)))
        outcome = advance(groups, num_warmup, num_samples, control)
        scale = np.concatenate([np.asarray(group.state.scale) for group in groups])
        scaled = np.concatenate([np.asarray(group.state.scaled) for group in groups])
        adaptation = {"position": scaled * scale, "scale": scale}
        info = {
            "engine": "sgmcmc",
            "method": self.method,
            "schedule": self.schedule,
            "batch_size": batches.size,
            "step_size": float(step_size),
            "temperature": self.temperature,
            "num_warmup": num_warmup,
            "ended_by": outcome.ended_by,
            "seconds": time.perf_counter() - started,
        }
        return Posterior(outcome.draws, outcome.stats, info, adaptation)

    def _step_size(self, curvature: float, batch_size: int, num_real: int) -> float:
        """The step size given, or that at which the terms of the widening add up to ``WIDENING`` at most."""
        if self.step_size is not None:
            return self.step_size
        noise = num_real / batch_size if batch_size < num_real else 0.0
        if self.method == "sgld":
            return 2.0 * WIDENING / (curvature * (1.0 + noise))
        by_friction = self.friction + curvature * noise / self.friction
        return 2.0 * WIDENING / (by_friction + (WIDENING * curvature) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The static part of a run: equal kernels share compiled programs."""

    batches: Batches
    method: str
    schedule: str
    thinning: int
    cycle_draws: int
    exploration: float
    friction: float
    temperature: float

    @property
    def exploring_steps(self) -> int:
        """Steps at the start of a cycle that store nothing."""
        return round(self.cycle_draws * self.thinning * self.exploration / (1.0 - self.exploration))

    @property
    def cycle_steps(self) -> int:
        """Steps of a whole cycle."""
        return self.exploring_steps + self.cycle_draws * self.thinning


class ChainState(NamedTuple):
    """One chain between two draws; ``scaled`` times ``scale`` is its position."""

    scaled: Any
    momentum: Any
    key: Any
    num_draws: Any
    scale: Any
    step_size: Any
    finite: Any


def _advance(kernel: Kernel, data: Data, state: ChainState, num_steps: np.int32, sampling: bool) -> Any:
    return _run_chunk(kernel, state, data, num_steps, np.bool_(sampling))


_split = jax.jit(jax.random.split)


@functools.partial(jax.jit, static_argnums=0)
def _scale_and_curvature(form: Form, key, position, terms):
    """Spread of each coordinate by the curvature at ``position``, and the largest curvature in those units."""
    key_scale, key_curvature = jax.random.split(key)
    scale = jnp.sqrt(inverse_mass(form, key_scale, position, terms, False))
    scores = simulated_scores(form, key_curvature, position, terms, NUM_PROBES) * scale
    return scale, jnp.maximum(jnp.linalg.eigvalsh(scores @ scores.T / NUM_PROBES)[-1], 1.0)


def _warm_start(adaptation: dict[str, Any], num_chains: int, size: int):
    """Positions and scales of an earlier run, its chains reused in turn."""
    if "scale" not in adaptation or adaptation["position"].shape[1] != size:
        raise OptionError(
            "warm_start comes from a run of another engine or with other Bayesian weights. Fit without warm_start."
        )
    chains = np.arange(num_chains) % len(adaptation["position"])
    return adaptation["position"][chains], adaptation["scale"][0]


@functools.partial(jax.jit, static_argnums=0)
def _start_chains(kernel: Kernel, key, indices, positions, jitter, scale, step_size, terms) -> ChainState:
    """The first state of every chain; chain c depends on the seed and c alone."""

    def one(chain):
        index, position = chain
        key_jitter, key_momentum, key_run = jax.random.split(jax.random.fold_in(key, index), 3)
        spread = kernel.batches.form.position_scale(terms)
        position = position + jitter * spread * jax.random.normal(key_jitter, position.shape)
        momentum = jax.random.normal(key_momentum, position.shape)
        return ChainState(position / scale, momentum, key_run, jnp.int32(0), scale, step_size, jnp.bool_(True))

    return map_chains(one, (indices, positions))


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(kernel: Kernel, states: ChainState, data: Data, num_steps, sampling):
    """``num_steps <= longest_chunk`` stored draws of each chain: (states, positions, reports), padded to it."""

    def one(state):
        longest = longest_chunk(state.scaled.shape[-1])
        blank = jnp.zeros((longest, state.scaled.shape[-1]), state.scaled.dtype)
        reports = {
            "diverging": jnp.zeros(longest, bool), "num_steps": jnp.zeros(longest, jnp.int32),
            "step_size": jnp.zeros(longest),
        }  # fmt: skip

        def body(i, carry):
            state, positions, reports = carry
            state, new = _draw(kernel, state, data, sampling)
            reports = {name: values.at[i].set(new[name]) for name, values in reports.items()}
            return state, positions.at[i].set(state.scaled * state.scale), reports

        return jax.lax.fori_loop(0, num_steps, body, (state, blank, reports))

    return map_chains(one, states)


def _draw(kernel: Kernel, state: ChainState, data: Data, sampling) -> tuple[ChainState, dict[str, Any]]:
    """The steps that lead to one stored draw, and their report."""
    key_next, key_steps = jax.random.split(state.key)
    first, last = _steps_of_draw(kernel, state.num_draws, sampling)

    def body(step, carry):
        scaled, momentum, finite = carry
        step_size, temperature = _at_step(kernel, step, state.step_size, sampling)
        key = jax.random.fold_in(key_steps, step)
        scaled, momentum, ok = _step(kernel, key, scaled, momentum, state.scale, step_size, temperature, data)
        return scaled, momentum, finite & ok

    scaled, momentum, finite = jax.lax.fori_loop(first, last, body, (state.scaled, state.momentum, jnp.bool_(True)))
    step_size, _ = _at_step(kernel, last - 1, state.step_size, sampling)
    report = {"diverging": ~finite, "num_steps": last - first, "step_size": step_size}
    num_draws = state.num_draws + jnp.asarray(sampling, jnp.int32)
    state = state._replace(scaled=scaled, momentum=momentum, key=key_next, num_draws=num_draws, finite=finite)
    return state, report


def _steps_of_draw(kernel: Kernel, num_draws, sampling):
    """The first step of a draw and the one after its last, counted from the start of the cycle or of sampling."""
    if kernel.schedule != "cyclical":
        first = num_draws * kernel.thinning
        return first, first + kernel.thinning
    in_cycle = num_draws % kernel.cycle_draws
    last = kernel.exploring_steps + (in_cycle + 1) * kernel.thinning
    explores = jnp.asarray(sampling) & (in_cycle == 0)
    return jnp.where(explores, 0, last - kernel.thinning), last


def _at_step(kernel: Kernel, step, step_size, sampling):
    """Step size and temperature at a step; during warm-up the step size is constant."""
    warm = jnp.float32(kernel.temperature)
    if kernel.schedule == "constant":
        return step_size, warm
    if kernel.schedule == "decreasing":
        return jnp.where(sampling, step_size * (1.0 + step / DECAY_STEPS) ** (-1.0 / 3.0), step_size), warm
    share = (step + 0.5) / kernel.cycle_steps
    cosine = step_size * (1.0 + jnp.cos(jnp.pi * share))
    exploring = jnp.asarray(sampling) & (2 * step < kernel.exploring_steps)
    return jnp.where(sampling, cosine, step_size), jnp.where(exploring, 0.0, warm)


def _step(kernel: Kernel, key, scaled, momentum, scale, step_size, temperature, data: Data):
    """One step along a mini-batch gradient; one that would leave the finite numbers is not taken."""
    diffusions = _blackjax.load("engine='sgmcmc'").sgmcmc.diffusions
    key_rows, key_noise = jax.random.split(key)
    # BlackJAX moves the position first and then the momentum; only a gradient from the new position makes that stable.
    at = scaled if kernel.method == "sgld" else scaled + step_size * momentum
    gradient = jax.grad(lambda z: kernel.batches.log_prob(z * scale, key_rows, data))(at)
    if kernel.method == "sgld":
        new = diffusions.overdamped_langevin()(key_noise, scaled, gradient, step_size, temperature)
        new_momentum = momentum
    else:
        new, new_momentum = diffusions.sghmc(kernel.friction)(
            key_noise, scaled, momentum, gradient, step_size, temperature
        )
    ok = jnp.all(jnp.isfinite(new) & jnp.isfinite(new_momentum))
    return jnp.where(ok, new, scaled), jnp.where(ok, new_momentum, jnp.zeros_like(momentum)), ok
