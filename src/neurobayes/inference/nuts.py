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
from ..errors import OptionError, TrainingError
from ..log_density import Form, LogDensity
from ..posterior import Posterior
from .base import Engine, ProgressCallback

CHUNK = 50
"""Iterations per compiled call: often enough for progress and interruption, rarely enough to cost nothing."""

DENSE_MASS_LIMIT = 100
"""Largest position for which ``dense_mass="auto"`` estimates a full covariance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NUTS(Engine):
    """Hamiltonian Monte Carlo that chooses its own trajectory lengths.

    Parameters
    ----------
    target_accept : mean acceptance probability the step size is tuned to, in (0, 1).
    max_tree_depth : a draw takes at most ``2**max_tree_depth - 1`` gradients.
    dense_mass : full (True), diagonal (False) mass matrix, or ``"auto"``: full up to 100 dimensions.
    chain_method : ``"vectorized"`` (all chains in one program), ``"parallel"`` (one chain per device)
        or ``"sequential"``.
    jitter : chains start at the trained weights plus this many prior standard deviations of noise.
    """

    target_accept: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool | str = "auto"
    chain_method: str = "vectorized"
    jitter: float = 0.05

    def __post_init__(self) -> None:
        _checks.check_fraction("target_accept", self.target_accept)
        _checks.check_positive_int("max_tree_depth", self.max_tree_depth)
        _checks.check_one_of("chain_method", self.chain_method, ("vectorized", "parallel", "sequential"))
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
        on_progress: ProgressCallback | None = None,
    ) -> Posterior:
        started = time.perf_counter()
        form, terms = log_density.form, log_density.terms
        dense = log_density.size <= DENSE_MASS_LIMIT if self.dense_mass == "auto" else bool(self.dense_mass)
        kernel = Kernel(form, num_warmup, self.target_accept, self.max_tree_depth, dense)
        groups = self._groups(num_chains)
        initial = _start_chains(kernel, key, np.asarray(start, np.float32), np.float32(self.jitter), terms, num_chains)
        chains = []
        for group, device in groups:
            state = jax.tree.map(lambda leaf, at=group: leaf[np.asarray(at)], initial) if len(groups) > 1 else initial
            if device is not None:
                state, moved = jax.device_put((state, terms), device)
            else:
                moved = terms
            chains.append(_Chain(kernel, state, moved))
        _advance(chains, num_warmup, num_samples, on_progress)
        draws = np.concatenate([chain.draws() for chain in chains])
        stats: dict[str, np.ndarray] = {
            name: np.concatenate([chain.stats(name) for chain in chains]) for name in _STATS
        }
        info = {
            "engine": "nuts",
            "dense_mass": dense,
            "max_tree_depth": self.max_tree_depth,
            "num_warmup": num_warmup,
            "step_size": [float(s) for chain in chains for s in np.atleast_1d(chain.state.adapt_state.step_size)],
            "seconds": time.perf_counter() - started,
        }
        return Posterior(draws, stats, info)

    def _groups(self, num_chains: int) -> list[tuple[list[int], Any]]:
        """Which chains run together, and on which device."""
        if self.chain_method == "vectorized" or num_chains == 1:
            return [(list(range(num_chains)), None)]
        if self.chain_method == "sequential":
            return [([chain], None) for chain in range(num_chains)]
        devices = jax.local_devices()
        if len(devices) < 2:
            raise OptionError(
                f"chain_method='parallel' needs more than one device, and JAX sees {len(devices)}. Use "
                "chain_method='vectorized', or call jax.config.update('jax_num_cpu_devices', N) before JAX is used."
            )
        return [([chain], devices[chain % len(devices)]) for chain in range(num_chains)]


_STATS = ("diverging", "num_steps", "accept_prob", "energy", "potential_energy")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The static part of a run: equal kernels share compiled programs."""

    form: Form
    num_warmup: int
    target_accept: float
    max_tree_depth: int
    dense_mass: bool


@functools.lru_cache(maxsize=64)
def _numpyro_kernel(kernel: Kernel):
    def potential_of(terms):
        return lambda position: -kernel.form(position, terms)

    return hmc(potential_fn_gen=potential_of, algo="NUTS")


def _init(kernel: Kernel, key, position, terms):
    init, _ = _numpyro_kernel(kernel)
    return init(
        position,
        num_warmup=kernel.num_warmup,
        dense_mass=kernel.dense_mass,
        target_accept_prob=kernel.target_accept,
        max_tree_depth=kernel.max_tree_depth,
        trajectory_length=None,  # pyright: ignore[reportArgumentType] - NUTS takes none
        find_heuristic_step_size=False,
        step_size=0.1,
        model_args=(terms,),
        rng_key=key,
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _start_chains(kernel: Kernel, key, start, jitter, terms, num_chains: int):
    """The first state of every chain; chain c depends on the seed and c alone."""

    def one(chain):
        key_jitter, key_run = jax.random.split(jax.random.fold_in(key, chain))
        scale = jnp.concatenate([terms.prior.std, jnp.ones(kernel.form.num_noise)])
        position = start + jitter * scale * jax.random.normal(key_jitter, start.shape)
        return _init(kernel, key_run, position, terms)

    return _map_chains(one, jnp.arange(num_chains))


@functools.partial(jax.jit, static_argnums=0)
def _run_chunk(kernel: Kernel, state, terms, num_steps):
    """``num_steps <= CHUNK`` iterations of each chain: (state, positions, stats), padded to CHUNK."""
    _, sample = _numpyro_kernel(kernel)
    # Sets up what NumPyro keeps in the closure of its kernel, should this trace come first in a process.
    jax.eval_shape(functools.partial(_init, kernel), jax.random.key(0), state.z[0], terms)

    def one(state):
        blank = jnp.zeros((CHUNK, state.z.shape[-1]), state.z.dtype)
        reports = {name: jnp.zeros(CHUNK, dtype) for name, dtype in _report_dtypes(state).items()}

        def body(i, carry):
            state, positions, reports = carry
            state = sample(state, model_args=(terms,), model_kwargs={})
            reports = {name: values.at[i].set(getattr(state, name)) for name, values in reports.items()}
            return state, positions.at[i].set(state.z), reports

        return jax.lax.fori_loop(0, num_steps, body, (state, blank, reports))

    return _map_chains(one, state)


def _map_chains(fn, chains):
    """``vmap`` over chains; a single chain runs plain, since batching turns its branches into both-sides selects."""
    if jax.tree.leaves(chains)[0].shape[0] > 1:
        return jax.vmap(fn)(chains)
    return jax.tree.map(lambda leaf: leaf[None], fn(jax.tree.map(lambda leaf: leaf[0], chains)))


def _report_dtypes(state) -> dict[str, Any]:
    return {name: getattr(state, name).dtype for name in _STATS}


class _Chain:
    """A group of chains that advance together, and the draws they have made."""

    def __init__(self, kernel: Kernel, state: Any, terms: Any):
        self.kernel, self.state, self.terms = kernel, state, terms
        self.kept: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self.pending: Any = None

    def dispatch(self, num_steps: int) -> None:
        """Start a chunk; returns at once, so that several devices work side by side."""
        self.pending = _run_chunk(self.kernel, self.state, self.terms, np.int32(num_steps))

    def collect(self, num_steps: int, keep: bool) -> None:
        self.state, positions, reports = self.pending
        if keep:
            kept = {name: np.asarray(values)[:, :num_steps] for name, values in reports.items()}
            self.kept.append((np.asarray(positions)[:, :num_steps], kept))
        else:
            jax.block_until_ready(self.state.z)

    def draws(self) -> np.ndarray:
        return np.concatenate([positions for positions, _ in self.kept], axis=1)

    def stats(self, name: str) -> np.ndarray:
        return np.concatenate([reports[name] for _, reports in self.kept], axis=1)


def _advance(chains, num_warmup: int, num_samples: int, on_progress: ProgressCallback | None) -> None:
    for stage, total, keep in (("warm-up", num_warmup, False), ("sampling", num_samples, True)):
        done = 0
        while done < total:
            size = min(CHUNK, total - done)
            for chain in chains:
                chain.dispatch(size)
            for chain in chains:
                chain.collect(size, keep)
            done += size
            if on_progress is not None:
                on_progress(stage, done, total)
        for chain in chains:
            if not np.all(np.isfinite(np.asarray(chain.state.potential_energy))):
                raise TrainingError(
                    f"the log density is not finite after {stage}. Likely causes: weights or inputs of extreme size, "
                    "or a noise prior that reaches zero with a network that fits every row exactly."
                )
