"""No-U-Turn sampling with NumPyro's kernel, over the flat position, in compiled chunks.

Hoffman & Gelman (2014), "The No-U-Turn Sampler", JMLR 15. The kernel's state
carries its own random key, so draws do not depend on how they are chunked.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.hmc import hmc

from .. import _checks
from .._typing import Key
from ..errors import OptionError
from ..log_density import Form, LogDensity
from ..posterior import Posterior
from ._driver import CHUNK, advance, map_chains
from .base import Engine, RunControl
from .curvature import inverse_mass

DENSE_MASS_LIMIT = 100
"""Largest position for which ``dense_mass="auto"`` estimates a full covariance."""

CHAIN_METHODS = ("vectorized", "parallel", "sequential")
SHORTEST_MASS_WARMUP = 150
"""A warm start keeps the mass matrix it was given in a shorter warm-up, which could not estimate a better one."""

_STATS = ("diverging", "num_steps", "accept_prob", "energy", "potential_energy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NUTS(Engine):
    """Hamiltonian Monte Carlo that chooses its own trajectory lengths.

    Parameters
    ----------
    target_accept : mean acceptance probability the step size is tuned to, in (0, 1).
    max_tree_depth : a draw takes at most ``2**max_tree_depth - 1`` gradients.
    dense_mass : full (True), diagonal (False) mass matrix, or ``"auto"``: full up to 100 dimensions.
    initial_mass : where the mass matrix starts: ``"curvature"``, the Fisher information at the trained
        weights, or ``"identity"``.
    chain_method : ``"vectorized"`` (all chains in one program), ``"parallel"`` (chains spread over the devices)
        or ``"sequential"``. On CPUs the draws are the same in each.
    jitter : chains start at the trained weights plus this many prior standard deviations of noise.
    """

    target_accept: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool | str = "auto"
    initial_mass: str = "curvature"
    chain_method: str = "vectorized"
    jitter: float = 0.05

    def __post_init__(self) -> None:
        _checks.check_fraction("target_accept", self.target_accept)
        _checks.check_positive_int("max_tree_depth", self.max_tree_depth)
        _checks.check_one_of("chain_method", self.chain_method, CHAIN_METHODS)
        _checks.check_one_of("initial_mass", self.initial_mass, ("curvature", "identity"))
        _checks.check_positive("jitter", self.jitter, allow_zero=True)
        if self.dense_mass not in (True, False, "auto"):
            raise OptionError(f"dense_mass must be True, False or 'auto', got {self.dense_mass!r}.")

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
        dense = log_density.size <= DENSE_MASS_LIMIT if self.dense_mass == "auto" else bool(self.dense_mass)
        adapt_mass = control.warm_start is None or num_warmup >= SHORTEST_MASS_WARMUP
        kernel = Kernel(log_density.form, num_warmup, self.target_accept, self.max_tree_depth, dense, adapt_mass)
        groups = self._groups(kernel, key, np.asarray(start, np.float32), log_density.terms, num_chains, control)
        outcome = advance(groups, num_warmup, num_samples, control)
        adapted = [group.state.adapt_state for group in groups]
        adaptation = {
            "position": np.concatenate([np.asarray(group.state.z) for group in groups]),
            "step_size": np.concatenate([np.asarray(a.step_size) for a in adapted]),
            "inverse_mass": np.concatenate([np.asarray(a.inverse_mass_matrix) for a in adapted]),
        }
        info = {
            "engine": "nuts",
            "dense_mass": dense,
            "max_tree_depth": self.max_tree_depth,
            "num_warmup": num_warmup,
            "step_size": adaptation["step_size"].tolist(),
            "ended_by": outcome.ended_by,
            "seconds": time.perf_counter() - started,
        }
        return Posterior(outcome.draws, outcome.stats, info, adaptation)

    def _groups(self, kernel, key, start, terms, num_chains: int, control: RunControl) -> list["_Group"]:
        """Chains as they run together: all in one program, or one by one, on one device or several."""
        key_mass, key_chains = _split(key)
        if control.warm_start:
            positions, mass, step = _warm_start(control.warm_start, num_chains, len(start), kernel.dense_mass)
        else:
            mass = _initial_mass(kernel, key_mass, start, terms, self.initial_mass)
            positions, step = np.tile(start, (num_chains, 1)), np.full(num_chains, 0.1, np.float32)
            mass = np.tile(mass, (num_chains, *[1] * np.ndim(mass)))
        jitter = np.float32(0.0 if control.warm_start else self.jitter)
        states = _start_chains(kernel, key_chains, positions, jitter, step, mass, terms)
        if self.chain_method == "vectorized" or num_chains == 1:
            return [_Group(kernel, states, terms)]
        if self.chain_method == "sequential":
            return [_Group(kernel, _chains(states, c, c + 1), terms) for c in range(num_chains)]
        devices = tuple(jax.local_devices()[:num_chains])
        if len(devices) < 2:
            raise OptionError(
                f"chain_method='parallel' needs more than one device, and JAX sees {len(devices)}. Use "
                "chain_method='vectorized', or call jax.config.update('jax_num_cpu_devices', N) before JAX is used."
            )
        # One program per device and not one shard_map over all: compiled for several devices, the same operations
        # round differently, and the draws would depend on the layout.
        ends = [round(num_chains * (i + 1) / len(devices)) for i in range(len(devices))]
        shares = zip([0, *ends], ends, devices, strict=False)
        placed = [jax.device_put((_chains(states, first, end), terms), device) for first, end, device in shares]
        return [_Group(kernel, state, moved) for state, moved in placed]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The static part of a run: equal kernels share compiled programs."""

    form: Form
    num_warmup: int
    target_accept: float
    max_tree_depth: int
    dense_mass: bool
    adapt_mass: bool = True


class _Group:
    """Chains that advance together on one device."""

    def __init__(self, kernel: Kernel, state: Any, terms: Any):
        self.kernel, self.state, self.terms = kernel, state, terms

    def dispatch(self, num_steps: int, sampling: bool) -> Any:
        return _run_chunk(self.kernel, self.state, self.terms, np.int32(num_steps))

    def is_healthy(self, state: Any) -> bool:
        return bool(np.all(np.isfinite(np.asarray(state.potential_energy))))


_split = jax.jit(jax.random.split)


def _chains(states: Any, first: int, end: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[first:end], states)


def _initial_mass(kernel: Kernel, key: Key, start: np.ndarray, terms: Any, choice: str) -> np.ndarray:
    size = len(start)
    if choice == "identity":
        return np.eye(size, dtype=np.float32) if kernel.dense_mass else np.ones(size, np.float32)
    return np.asarray(inverse_mass(kernel.form, key, start, terms, kernel.dense_mass))


def _warm_start(adaptation: dict[str, Any], num_chains: int, size: int, dense: bool):
    """Positions, mass matrices and step sizes of an earlier run, its chains reused in turn."""
    shape = (size, size) if dense else (size,)
    found = adaptation["inverse_mass"].shape[1:] if "inverse_mass" in adaptation else None
    if found != shape:
        raise OptionError(
            f"warm_start comes from a run with a mass matrix of shape {found}, and this one needs {shape}: the engine, "
            "the Bayesian weights or dense_mass differ. Fit without warm_start."
        )
    chains = np.arange(num_chains) % len(adaptation["position"])
    return tuple(adaptation[name][chains] for name in ("position", "inverse_mass", "step_size"))


@functools.lru_cache(maxsize=64)
def _numpyro_kernel(kernel: Kernel):
    def potential_of(terms):
        return lambda position: -kernel.form(position, terms)

    return hmc(potential_fn_gen=potential_of, algo="NUTS")


def _init(kernel: Kernel, key, position, step_size, mass, terms):
    init, _ = _numpyro_kernel(kernel)
    return init(
        position,
        num_warmup=kernel.num_warmup,
        dense_mass=kernel.dense_mass,
        target_accept_prob=kernel.target_accept,
        max_tree_depth=kernel.max_tree_depth,
        adapt_mass_matrix=kernel.adapt_mass,
        trajectory_length=None,  # pyright: ignore[reportArgumentType] - NUTS takes none
        step_size=step_size,
        inverse_mass_matrix=mass,
        model_args=(terms,),
        rng_key=key,
    )


@functools.partial(jax.jit, static_argnums=0)
def _start_chains(kernel: Kernel, key, positions, jitter, step_sizes, masses, terms):
    """The first state of every chain; chain c depends on the seed and c alone."""

    def one(chain):
        index, position, step_size, mass = chain
        key_jitter, key_run = jax.random.split(jax.random.fold_in(key, index))
        position = position + jitter * kernel.form.position_scale(terms) * jax.random.normal(key_jitter, position.shape)
        return _init(kernel, key_run, position, step_size, mass, terms)

    return map_chains(one, (jnp.arange(len(positions)), positions, step_sizes, masses))


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(kernel: Kernel, states, terms, num_steps):
    """``num_steps <= CHUNK`` iterations of each chain: (states, positions, reports), padded to CHUNK."""
    _, sample = _numpyro_kernel(kernel)
    # Sets up what NumPyro keeps in the closure of its kernel, should this trace come first in a process.
    one_state = jax.tree.map(lambda leaf: leaf[0], states)
    adapted = one_state.adapt_state
    jax.eval_shape(
        functools.partial(_init, kernel), jax.random.key(0), one_state.z, adapted.step_size,
        adapted.inverse_mass_matrix, terms,
    )  # fmt: skip

    def one(state):
        blank = jnp.zeros((CHUNK, state.z.shape[-1]), state.z.dtype)
        reports = {name: jnp.zeros(CHUNK, getattr(state, name).dtype) for name in _STATS}

        def body(i, carry):
            state, positions, reports = carry
            state = sample(state, model_args=(terms,), model_kwargs={})
            reports = {name: values.at[i].set(getattr(state, name)) for name, values in reports.items()}
            return state, positions.at[i].set(state.z), reports

        return jax.lax.fori_loop(0, num_steps, body, (state, blank, reports))

    return map_chains(one, states)
