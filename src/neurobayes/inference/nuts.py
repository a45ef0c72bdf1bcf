"""No-U-Turn sampling with NumPyro's kernel, over the flat position, in compiled chunks.

Hoffman & Gelman (2014), "The No-U-Turn Sampler", JMLR 15. The kernel's state
carries its own random key, so draws do not depend on how they are chunked.
"""

import dataclasses
import functools
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.hmc import hmc

from .. import _checks
from .._typing import Key
from ..errors import OptionError
from ..log_density import Form, LogDensity
from ..posterior import Posterior
from ._driver import Chains, advance, chains_by_program, from_all_processes, longest_chunk, map_chains
from .base import Engine, RunControl
from .collapse import CollapsedForm, Completion, require_collapsed
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
    collapse : integrate a linear output layer with Gaussian noise out analytically and draw it exactly.
    chain_method : ``"vectorized"`` (chains in one program on an accelerator, on all cores of a CPU), ``"parallel"``
        (chains spread over the devices, those of other JAX processes too) or ``"sequential"``. On CPUs the draws
        are the same in each.
    jitter : chains start at the trained weights plus this many prior standard deviations of noise.
    """

    target_accept: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool | str = "auto"
    initial_mass: str = "curvature"
    collapse: bool = False
    chain_method: str = "vectorized"
    jitter: float = 0.05

    one_core: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_fraction("target_accept", self.target_accept)
        _checks.check_positive_int("max_tree_depth", self.max_tree_depth)
        _checks.check_one_of("chain_method", self.chain_method, CHAIN_METHODS)
        _checks.check_one_of("initial_mass", self.initial_mass, ("curvature", "identity"))
        _checks.check_positive("jitter", self.jitter, allow_zero=True)
        if not isinstance(self.collapse, bool):
            raise OptionError(f"collapse must be True or False, got {self.collapse!r}.")
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
        form, start = log_density.form, np.asarray(start, np.float32)
        terms = jax.device_put(log_density.terms)  # once, and not in every call
        collapsed = require_collapsed(log_density, "NUTS") if self.collapse else None
        completion = None if collapsed is None else Completion(collapsed, jax.random.fold_in(key, 2), terms)
        kept = np.arange(len(start)) if collapsed is None else collapsed.kept_indices
        dense = len(kept) <= DENSE_MASS_LIMIT if self.dense_mass == "auto" else bool(self.dense_mass)
        adapt_mass = control.warm_start is None or num_warmup >= SHORTEST_MASS_WARMUP
        kernel = Kernel(collapsed or form, num_warmup, self.target_accept, self.max_tree_depth, dense, adapt_mass)
        key_mass, key_chains = _split(key)
        if control.warm_start:
            first = _warm_start(control.warm_start, num_chains, len(kept), dense)
        else:
            first = self._first(form, key_mass, start, kept, terms, dense, num_chains)
        jitter = np.float32(0.0 if control.warm_start else self.jitter)
        groups = self._groups(kernel, key_chains, jitter, first, terms, control)
        judged = control if completion is None else completion.judging(control)
        outcome = advance(groups, num_warmup, num_samples, judged)
        adapted = [group.state.adapt_state for group in groups]
        adaptation = {
            "position": np.concatenate([np.asarray(group.state.z) for group in groups]),
            "step_size": np.concatenate([np.asarray(a.step_size) for a in adapted]),
            "inverse_mass": np.concatenate([np.asarray(a.inverse_mass_matrix) for a in adapted]),
        }
        made, stats = outcome.draws, outcome.stats
        if self.chain_method == "parallel" and num_chains > 1:
            made, stats, adaptation = from_all_processes((made, stats, adaptation))
        draws = made if completion is None else completion(made)
        info = {
            "engine": "nuts",
            "dense_mass": dense,
            "collapsed": collapsed is not None,
            "max_tree_depth": self.max_tree_depth,
            "num_warmup": num_warmup,
            "step_size": adaptation["step_size"].tolist(),
            "ended_by": outcome.ended_by,
            "seconds": time.perf_counter() - started,
        }
        return Posterior(draws, stats, info, adaptation)

    def _first(self, form, key, start, kept, terms, dense: bool, num_chains: int) -> tuple[np.ndarray, ...]:
        """Positions, mass matrices and step sizes of all chains."""
        precision: Any = jax.dtypes.canonicalize_dtype(float)  # that of NumPyro's adaptation
        if self.initial_mass == "identity":
            mass = np.eye(len(kept), dtype=precision) if dense else np.ones(len(kept), precision)
        else:
            mass = np.asarray(inverse_mass(form, key, start, terms, dense), precision)
            mass = mass[np.ix_(kept, kept)] if dense else mass[kept]
        positions, steps = np.tile(start[kept], (num_chains, 1)), np.full(num_chains, 0.1, np.float32)
        return positions, np.tile(mass, (num_chains, *[1] * mass.ndim)), steps

    def _groups(
        self, kernel: "Kernel", key, jitter, first: tuple[np.ndarray, ...], terms, control: RunControl
    ) -> list[Chains]:
        """Chains as they run together: in programs of their own or in one, on one device or several."""
        num_chains = len(first[0])
        parts, devices = chains_by_program(num_chains), [None] * num_chains
        if self.chain_method == "sequential":
            parts = np.split(np.arange(num_chains), num_chains)
        elif self.chain_method == "parallel" and num_chains > 1:
            devices = jax.devices()[:num_chains]
            _require_devices(len(devices), control)
            # One program per device and not one shard_map over all: compiled for several devices, the same
            # operations round differently, and the draws would depend on the layout.
            parts = np.array_split(np.arange(num_chains), len(devices))
        groups = []
        for part, device in zip(parts, devices, strict=False):
            if device is not None and device.process_index != jax.process_index():
                continue
            state = _start_chains(
                kernel, key, part.astype(np.int32), jitter, *(values[part] for values in first), terms
            )
            state, moved = (state, terms) if device is None else jax.device_put((state, terms), device)
            step = functools.partial(_advance, kernel, moved)
            size, waits = state.z.shape[-1], self.chain_method == "sequential"
            groups.append(Chains(step, state, lambda state: state.potential_energy, size, waits))
        return groups


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The static part of a run: equal kernels share compiled programs."""

    form: Form | CollapsedForm
    num_warmup: int
    target_accept: float
    max_tree_depth: int
    dense_mass: bool
    adapt_mass: bool = True


def _require_devices(num_devices: int, control: RunControl) -> None:
    """Raise where chains cannot be spread over devices, or a rule of one process would end the run of all."""
    if num_devices < 2:
        raise OptionError(
            f"chain_method='parallel' needs more than one device, and JAX sees {num_devices}. Use "
            "chain_method='vectorized', which uses all cores of a CPU, or call "
            "jax.config.update('jax_num_cpu_devices', N) before JAX is used."
        )
    if jax.process_count() == 1:
        return
    if num_devices < len(jax.devices()):
        raise OptionError(
            f"num_chains must be at least the number of devices of all processes, {len(jax.devices())}, so that every "
            "process has a chain."
        )
    if control.seconds is not None or control.is_enough is not None or control.checkpoint is not None:
        raise OptionError(
            "until, seconds and checkpoint_dir need all chains in one process. Leave them out, or use one process."
        )


def _advance(kernel: Kernel, terms: Any, state: Any, num_steps: np.int32, sampling: bool) -> Any:
    return _run_chunk(kernel, state, terms, num_steps)


_split = jax.jit(jax.random.split)


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
def _start_chains(kernel: Kernel, key, indices, jitter, positions, masses, step_sizes, terms):
    """The first state of every chain; chain c depends on the seed and c alone."""

    def one(chain):
        index, position, step_size, mass = chain
        key_jitter, key_run = jax.random.split(jax.random.fold_in(key, index))
        position = position + jitter * kernel.form.position_scale(terms) * jax.random.normal(key_jitter, position.shape)
        return _init(kernel, key_run, position, step_size, mass, terms)

    return map_chains(one, (indices, positions, step_sizes, masses))


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(kernel: Kernel, states, terms, num_steps):
    """``num_steps <= longest_chunk`` iterations of each chain: (states, positions, reports), padded to it."""
    _, sample = _numpyro_kernel(kernel)
    # Sets up what NumPyro keeps in the closure of its kernel, should this trace come first in a process.
    one_state = jax.tree.map(lambda leaf: leaf[0], states)
    adapted = one_state.adapt_state
    jax.eval_shape(
        functools.partial(_init, kernel), jax.random.key(0), one_state.z, adapted.step_size,
        adapted.inverse_mass_matrix, terms,
    )  # fmt: skip

    def one(state):
        longest = longest_chunk(state.z.shape[-1])
        blank = jnp.zeros((longest, state.z.shape[-1]), state.z.dtype)
        reports = {name: jnp.zeros(longest, getattr(state, name).dtype) for name in _STATS}

        def body(i, carry):
            state, positions, reports = carry
            state = sample(state, model_args=(terms,), model_kwargs={})
            reports = {name: values.at[i].set(getattr(state, name)) for name, values in reports.items()}
            return state, positions.at[i].set(state.z), reports

        return jax.lax.fori_loop(0, num_steps, body, (state, blank, reports))

    return map_chains(one, states)
