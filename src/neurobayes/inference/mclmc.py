"""Microcanonical Langevin Monte Carlo (MCLMC) with BlackJAX's kernels and tuners, in compiled chunks.

Robnik, De Luca, Silverstein & Seljak (2023), "Microcanonical Hamiltonian Monte
Carlo", JMLR 24; the adjusted variant follows Robnik, Cohn-Gordon & Seljak
(2025). The dynamics keep the energy instead of drawing a new one for each
trajectory, which suits posteriors of hundreds to thousands of weights.

Unadjusted, the step size alone bounds the bias: the tuner sets it so that the
variance of the energy error per dimension is ``desired_energy_var``. Adjusted,
a Metropolis test removes the bias.
"""

import dataclasses
import functools
import math
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._typing import Key
from ..errors import OptionError, TrainingError
from ..log_density import LogDensity
from ..posterior import Posterior
from . import _blackjax
from ._driver import Chains, advance, chains_by_program, longest_chunk, map_chains
from ._microcanonical import (
    MAX_ATTEMPTS,
    MIN_TUNING_STEPS,
    ChainState,
    Kernel,
    Start,
    log_prob_of,
    start_chains,
    transition_of,
    tuned_chains,
)
from .base import Engine, RunControl
from .collapse import Completion, require_collapsed
from .curvature import inverse_mass

_GRADIENTS_PER_STEP = 2  # McLachlan's integrator


@dataclasses.dataclass(frozen=True, kw_only=True)
class MCLMC(Engine):
    """Microcanonical Langevin dynamics, tuned to an energy error (unadjusted) or an acceptance rate (adjusted).

    Parameters
    ----------
    adjusted : correct each trajectory by a Metropolis test: no bias, and fewer effective draws per gradient.
    desired_energy_var : variance of the energy error per dimension that the unadjusted step size is tuned to;
        the bias of variances falls with it.
    target_accept : mean acceptance probability the adjusted step size is tuned to.
    trajectory_steps : mean number of steps between two Metropolis tests.
    thinning : integrator steps per stored draw. The default of 16 costs 32 gradients, as much as a NUTS draw of
        tree depth 5. An iteration of warm-up is as many steps.
    diagonal_preconditioning : scale every coordinate by its posterior spread as estimated during tuning.
    initial_mass : where those scales start: ``"curvature"`` (Fisher information at the trained weights) or
        ``"identity"``.
    collapse : integrate a linear output layer with Gaussian noise out analytically and draw it exactly.
    jitter : chains start at the trained weights plus this many prior standard deviations of noise.
    """

    adjusted: bool = False
    desired_energy_var: float = 5e-4
    target_accept: float = 0.9
    trajectory_steps: int = 8
    thinning: int = 16
    diagonal_preconditioning: bool = True
    initial_mass: str = "curvature"
    collapse: bool = False
    jitter: float = 0.05

    one_core: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_positive("desired_energy_var", self.desired_energy_var)
        _checks.check_fraction("target_accept", self.target_accept)
        _checks.check_positive_int("trajectory_steps", self.trajectory_steps, minimum=2)
        _checks.check_positive_int("thinning", self.thinning)
        _checks.check_one_of("initial_mass", self.initial_mass, ("curvature", "identity"))
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
        _blackjax.load("engine='mclmc'")
        key_mass, key_chains, key_draw = _split(key)
        form, start = log_density.form, np.asarray(start, jax.dtypes.canonicalize_dtype(float))
        terms = jax.device_put(log_density.terms)  # once, and not in every call
        mass = np.ones_like(start)
        if self.initial_mass == "curvature":
            mass = np.asarray(inverse_mass(log_density.form, key_mass, start, terms, False), start.dtype)
        completion = None
        if self.collapse:
            form = require_collapsed(log_density, "MCLMC")
            start, mass = start[form.kept_indices], mass[form.kept_indices]
            completion = Completion(form, key_draw, terms)
            control = completion.judging(control)
        if len(start) < 2:
            raise OptionError("engine='mclmc' needs at least two random scalars, and there is one. Use engine='nuts'.")
        kernel = Kernel(
            form, self.adjusted, max(MIN_TUNING_STEPS, num_warmup * self._transitions), self._transitions,
            self.desired_energy_var, self.target_accept, self.trajectory_steps, self.diagonal_preconditioning,
        )  # fmt: skip
        step = functools.partial(_advance, kernel, terms)
        states = self._states(kernel, key_chains, start, mass, terms, num_chains, control)
        groups = [Chains(step, state, lambda state: state.inner.logdensity, len(start)) for state in states]
        outcome = advance(groups, num_warmup if control.warm_start else 0, num_samples, control)
        last = jax.tree.map(lambda *parts: np.concatenate(parts), *(group.state._replace(key=()) for group in groups))
        adaptation = {
            "position": last.inner.position * last.scale,
            **{name: getattr(last, name) for name in ("L", "step_size", "inverse_mass", "scale")},
        }
        info = {
            "engine": "mclmc",
            "adjusted": self.adjusted,
            "collapsed": self.collapse,
            "num_warmup": num_warmup,
            "L": adaptation["L"].tolist(),
            "step_size": adaptation["step_size"].tolist(),
            "tuning_attempts": last.attempts.tolist(),
            "ended_by": outcome.ended_by,
        }
        draws = outcome.draws if completion is None else completion(outcome.draws)
        info["seconds"] = time.perf_counter() - started
        return Posterior(draws, outcome.stats, info, adaptation)

    @property
    def _transitions(self) -> int:
        """Kernel calls per stored draw; an adjusted one is a whole trajectory."""
        return max(1, round(self.thinning / self.trajectory_steps)) if self.adjusted else self.thinning

    def _states(
        self, kernel: Kernel, key, start, mass, terms, num_chains: int, control: RunControl
    ) -> list[ChainState]:
        """Tuned chains; those of an earlier run as they were; or a frame for what a checkpoint holds."""
        parts = [part.astype(np.int32) for part in chains_by_program(num_chains)]
        if control.warm_start:
            first, jitter = _warm_start(control.warm_start, num_chains, len(start)), np.float32(0)
        else:
            positions, scales = np.tile(start, (num_chains, 1)), np.tile(np.sqrt(mass), (num_chains, 1))
            steps = np.full(num_chains, 0.25 * math.sqrt(len(start)), start.dtype)
            first, jitter = Start(positions, scales, np.ones_like(scales), steps, 4 * steps), np.float32(self.jitter)
        is_tuned = control.warm_start or (control.checkpoint is not None and control.checkpoint.load() is not None)
        make: Any = start_chains if is_tuned else tuned_chains
        states = jax.block_until_ready(
            [make(kernel, key, part, jitter, Start(*(values[part] for values in first)), terms) for part in parts]
        )
        if not is_tuned:
            _require_tuned(np.concatenate([np.asarray(state.tuned) for state in states]), kernel)
        return states


def _advance(kernel: Kernel, terms: Any, state: ChainState, num_steps: np.int32, sampling: bool) -> Any:
    return _run_chunk(kernel, state, terms, num_steps)


_split = jax.jit(lambda key: jax.random.split(key, 3))


def _warm_start(adaptation: dict[str, Any], num_chains: int, size: int) -> Start:
    """Positions, scales, step sizes and decoherence lengths of an earlier run, its chains reused in turn."""
    if "L" not in adaptation or adaptation["position"].shape[1] != size:
        raise OptionError(
            "warm_start comes from a run of another engine, other Bayesian weights or another choice of collapse. "
            "Fit without warm_start."
        )
    chains = np.arange(num_chains) % len(adaptation["position"])
    return Start(*(adaptation[name][chains] for name in Start._fields))


def _require_tuned(tuned: np.ndarray, kernel: Kernel) -> None:
    failed = np.flatnonzero(~tuned)
    if len(failed):
        raise TrainingError(
            f"the step size of MCLMC collapsed or became non-finite in {MAX_ATTEMPTS} tuning runs of "
            f"{kernel.num_tuning} steps (chains {', '.join(map(str, failed))}). Raise num_warmup, give a noise prior "
            "that stays away from zero, or use engine='nuts'."
        )


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(kernel: Kernel, states: ChainState, terms, num_steps):
    """``num_steps <= longest_chunk`` stored draws of each chain: (states, positions, reports), padded to it."""

    def one(state):
        size = state.inner.position.shape[-1]
        longest = longest_chunk(size)
        _, report = jax.eval_shape(lambda state, terms: _draw(kernel, state, terms), state, terms)
        reports = jax.tree.map(lambda a: jnp.zeros((longest, *a.shape), a.dtype), report)

        def body(i, carry):
            state, positions, reports = carry
            state, new = _draw(kernel, state, terms)
            reports = jax.tree.map(lambda all_, one: all_.at[i].set(one), reports, new)
            return state, positions.at[i].set(state.inner.position * state.scale), reports

        return jax.lax.fori_loop(0, num_steps, body, (state, jnp.zeros((longest, size)), reports))

    return map_chains(one, states)


def _draw(kernel: Kernel, state: ChainState, terms) -> tuple[ChainState, dict[str, Any]]:
    """All transitions of one stored draw, and their joint report."""
    key_next, key_draw = jax.random.split(state.key)
    transition = transition_of(kernel.adjusted, kernel.energy_var, kernel.trajectory_steps)
    dim, log_prob = state.inner.position.shape[-1], log_prob_of(kernel, state.scale, terms)

    def adjusted(inner, key):
        average = state.L / state.step_size
        inner, info = transition(
            key, inner, log_prob, state.step_size, inverse_mass_matrix=state.inverse_mass,
            integration_steps_params=(average,),
        )  # fmt: skip
        steps = _GRADIENTS_PER_STEP * info.num_integration_steps
        return inner, {"diverging": info.is_divergent, "num_steps": steps, "accept_prob": info.acceptance_rate}

    def unadjusted(inner, key):
        inner, info = transition(key, inner, log_prob, state.inverse_mass, state.L, state.step_size)
        energy = {"energy_change": info.energy_change, "energy_var": info.energy_change**2 / dim}
        return inner, {"diverging": ~info.nonans, "num_steps": jnp.int32(_GRADIENTS_PER_STEP), **energy}

    step = adjusted if kernel.adjusted else unadjusted
    inner, each = jax.lax.scan(step, state.inner, jax.random.split(key_draw, kernel.transitions))
    join = {"diverging": jnp.any, "num_steps": jnp.sum, "energy_change": jnp.sum}
    return state._replace(inner=inner, key=key_next), {k: join.get(k, jnp.mean)(v) for k, v in each.items()}
