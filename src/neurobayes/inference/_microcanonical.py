"""Chains of microcanonical dynamics: their static part, their state, how they start, and how they are tuned.

BlackJAX's tuners go on over non-finite and frozen runs in silence, and set the
unadjusted step size by a robust mean of the energy error; both are checked here.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..log_density import Form
from . import _blackjax
from ._driver import map_chains
from .collapse import CollapsedForm

MAX_ATTEMPTS = 4
"""Tuning runs before it is given up; each starts with a quarter of the step size of the one before."""

FROZEN_RATIO = 1e-2
"""A tuned step that crosses less than this part of a decoherence length in the whole tuning run has collapsed."""

MIN_TUNING_STEPS = 100
CALIBRATIONS = 2
"""Times the unadjusted step size is checked, after tuning, against the mean energy error it really makes."""

LONGEST_TRAJECTORY = 4
"""In multiples of ``trajectory_steps``; only a tuner that has lost its way asks for more."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The static part of a run: equal kernels share compiled programs."""

    form: Form | CollapsedForm
    adjusted: bool
    num_tuning: int
    transitions: int
    energy_var: float
    target_accept: float
    trajectory_steps: int
    diagonal: bool


class Start(NamedTuple):
    """What chains start from, each with a leading chain axis."""

    position: Any
    scale: Any
    inverse_mass: Any
    step_size: Any
    L: Any


class ChainState(NamedTuple):
    """One chain between two draws: BlackJAX's own state, the random key, and what tuning has found.

    BlackJAX sees positions divided by ``scale``: its tuners assume spreads of about one at the start.
    """

    inner: Any
    key: Any
    scale: Any
    L: Any
    step_size: Any
    inverse_mass: Any
    attempts: Any
    tuned: Any


@functools.lru_cache(maxsize=64)
def transition_of(adjusted: bool, energy_var: float, trajectory_steps: int):
    """BlackJAX's transition; the adjusted one draws its trajectory lengths from a low-discrepancy sequence."""
    blackjax = _blackjax.load("engine='mclmc'")
    if not adjusted:
        return blackjax.mclmc.build_kernel(desired_energy_var=energy_var)
    longest = LONGEST_TRAJECTORY * trajectory_steps

    def steps(count, average):
        """Between 1 and about twice ``average``, equally distributed: multiples of the golden ratio, modulo one."""
        fraction = (count.astype(jnp.uint32) * jnp.uint32(2654435769)).astype(jnp.float32) / 2.0**32
        wanted = jnp.nan_to_num(jnp.ceil(fraction * (2.0 * average - 1.0)))
        return jnp.clip(wanted, 1, longest).astype(jnp.int32)

    return blackjax.adjusted_mclmc_dynamic.build_kernel(
        integration_steps_fn=steps, next_random_arg_fn=lambda count: count + 1
    )


def _inner(kernel: Kernel, key, position, log_prob):
    blackjax = _blackjax.load("engine='mclmc'")
    if kernel.adjusted:
        return blackjax.adjusted_mclmc_dynamic.init(position, log_prob, jnp.uint32(1))
    return blackjax.mclmc.init(position, log_prob, key)


def log_prob_of(kernel: Kernel, scale, terms):
    """The log density of a position divided by ``scale``."""
    return lambda scaled: kernel.form(scaled * scale, terms)


def _first_state(kernel: Kernel, key, index, first: Start, jitter, terms) -> ChainState:
    """A chain before tuning; chain c depends on the seed and c alone."""
    key_jitter, key_inner, key_run = jax.random.split(jax.random.fold_in(key, index), 3)
    moved = jitter * kernel.form.position_scale(terms) * jax.random.normal(key_jitter, first.position.shape)
    inner = _inner(kernel, key_inner, (first.position + moved) / first.scale, log_prob_of(kernel, first.scale, terms))
    return ChainState(
        inner, key_run, first.scale, first.L, first.step_size, first.inverse_mass, jnp.int32(0), jnp.bool_(False)
    )


@functools.partial(jax.jit, static_argnums=0)
def start_chains(kernel: Kernel, key, indices, jitter, first: Start, terms) -> ChainState:
    """The first state of every chain, untuned."""

    def one(chain):
        index, of_chain = chain
        return _first_state(kernel, key, index, of_chain, jitter, terms)

    return map_chains(one, (indices, first))


@functools.partial(jax.jit, static_argnums=0)
def tuned_chains(kernel: Kernel, key, indices, jitter, first: Start, terms) -> ChainState:
    """Chains with step size, decoherence length and scales tuned, at the end of their tuning run.

    A run that came to nothing is repeated from where the chain is, with a
    quarter of the step size.
    """

    def one(chain):
        index, of_chain = chain
        first = _first_state(kernel, key, index, of_chain, jitter, terms)

        def attempt(state: ChainState) -> ChainState:
            key_next, key_tune = jax.random.split(state.key)
            shrunk = first.step_size * 0.25**state.attempts
            tuned = _tune(kernel, key_tune, first._replace(inner=state.inner, step_size=shrunk), terms)
            ok = _is_tuned(kernel, tuned, shrunk)
            usable = jnp.all(jnp.isfinite(tuned.inner.position)) & jnp.isfinite(tuned.inner.logdensity)
            inner = jax.tree.map(lambda new, old: jnp.where(usable, new, old), tuned.inner, first.inner)
            return tuned._replace(inner=inner, key=key_next, attempts=state.attempts + 1, tuned=ok)

        return jax.lax.while_loop(lambda s: ~s.tuned & (s.attempts < MAX_ATTEMPTS), attempt, first)

    return map_chains(one, (indices, first))


def _is_tuned(kernel: Kernel, state: ChainState, first_step):
    """Whether a tuning run moved, changed its step size, and ended with usable numbers."""
    values = jnp.concatenate([state.L[None], state.step_size[None], state.inverse_mass])
    positive = jnp.all(jnp.isfinite(values) & (values > 0)) & jnp.isfinite(state.inner.logdensity)
    moves = state.step_size * kernel.num_tuning >= FROZEN_RATIO * state.L
    return positive & moves & (state.step_size != first_step)


def _tune(kernel: Kernel, key, state: ChainState, terms) -> ChainState:
    """One run of BlackJAX's tuner. Its fractions are of the tuning run itself, whose length they add up to."""
    blackjax = _blackjax.load("engine='mclmc'")
    key, key_calibration = jax.random.split(key)
    from_ = blackjax.adaptation.mclmc_adaptation.MCLMCAdaptationState(state.L, state.step_size, state.inverse_mass)
    common = {
        "mclmc_kernel": transition_of(kernel.adjusted, kernel.energy_var, kernel.trajectory_steps),
        "num_steps": kernel.num_tuning,
        "state": state.inner,
        "rng_key": key,
        "logdensity_fn": log_prob_of(kernel, state.scale, terms),
        "diagonal_preconditioning": kernel.diagonal,
        "params": from_,
    }
    if kernel.adjusted:
        inner, found, *_ = blackjax.adjusted_mclmc_find_L_and_step_size(
            target=kernel.target_accept, target_num_integration_steps=float(kernel.trajectory_steps),
            frac_tune1=0.25, frac_tune2=0.5, frac_tune3=0.0, **common,
        )  # fmt: skip
    else:
        inner, found, _ = blackjax.mclmc_find_L_and_step_size(
            desired_energy_var=kernel.energy_var, frac_tune1=0.25, frac_tune2=0.3, frac_tune3=0.2, **common
        )
    as_before = [jnp.asarray(value, state.step_size.dtype) for value in found]
    state = state._replace(inner=inner, L=as_before[0], step_size=as_before[1], inverse_mass=as_before[2])
    return state if kernel.adjusted else _calibrated(kernel, key_calibration, state, terms)


def _calibrated(kernel: Kernel, key, state: ChainState, terms) -> ChainState:
    """The chain with its step size reduced until the mean energy error is the one asked for.

    The tuner averages robustly over the last 150 steps. On curved posteriors rare large errors make most of the
    bias; the plain mean over longer runs sees them.
    """
    transition = transition_of(False, kernel.energy_var, kernel.trajectory_steps)
    log_prob, dim = log_prob_of(kernel, state.scale, terms), state.scale.shape[-1]

    def calibrate(state, key):
        def step(inner, key):
            inner, info = transition(key, inner, log_prob, state.inverse_mass, state.L, state.step_size)
            return inner, info.energy_change**2 / dim

        inner, energy_var = jax.lax.scan(step, state.inner, jax.random.split(key, kernel.num_tuning // 10))
        # The variance grows with the sixth power of the step size (Bou-Rabee & Sanz-Serna, 2018).
        excess = jnp.maximum(jnp.mean(energy_var) / kernel.energy_var, 1.0)
        return state._replace(inner=inner, step_size=state.step_size * excess ** (-1.0 / 6.0)), None

    return jax.lax.scan(calibrate, state, jax.random.split(key, CALIBRATIONS))[0]
