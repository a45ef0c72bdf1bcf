"""How strongly and how long to train, chosen by rows the network has not seen.

The rows are split into folds. For each prior scale of a grid and each fold a
network is trained on the other folds, all of them together in one vmapped
program, and its loss on the left-out fold is followed through the epochs. The
prior scale and the number of epochs with the least left-out loss are then used
on all rows. A network trained to the end memorises a few hundred rows, and no
posterior over its last layer can undo that.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, Key
from .training import EPOCHS_PER_CALL, Program, Rows, Settings, initialise, pad_chunk, run_epochs

SIGMA_GRID = (0.1, 0.3, 1.0, 3.0)
"""Prior standard deviations tried by ``map_sigma="auto"``, for noise of one standard deviation of the target."""

MAX_FOLDS = 5
FOLD_ROWS = 2000
"""Rows times trained folds of a search: small data sets are cross-fitted, large ones leave out one part."""

SEARCH_ROWS = 8192
"""Largest number of rows a search uses; the choice hardly moves with more."""


@dataclasses.dataclass(frozen=True)
class Regularisation:
    """The outcome of a search.

    Attributes
    ----------
    sigma : chosen prior standard deviation of the weights; infinite means none.
    num_epochs : chosen number of epochs.
    losses : (sigmas, epochs) mean left-out loss in nats per row.
    sigmas : the grid.
    unseen_rmse : (d,) root mean squared error of the left-out predictions at the choice, in working
        units; None for classification.
    """

    sigma: float
    num_epochs: int
    losses: np.ndarray
    sigmas: tuple[float, ...]
    unseen_rmse: np.ndarray | None


def choose(
    program: Program,
    key: Key,
    rows: Rows,
    noise_std: np.ndarray,
    sigmas: tuple[float, ...],
    learning_rates: np.ndarray,
    seed: int,
) -> Regularisation:
    """The prior scale among ``sigmas`` and the epoch with the least left-out loss.

    Parameters
    ----------
    rows : padded training rows.
    learning_rates : (epochs, steps per epoch), the schedule of the final run, which the search follows.
    seed : decides the folds.
    """
    program = dataclasses.replace(program, monitor="unseen", early_stopping=False, track_statistics=False)
    folds = assign_folds(np.asarray(rows.real), seed)
    num_rows = int(np.asarray(rows.real).sum())
    used = range(min(int(folds.max()) + 1, max(1, FOLD_ROWS // num_rows)))
    weights = np.stack([(folds != k) for k in used]).astype(np.float32) * np.asarray(rows.real)
    members = [(sigma, w) for sigma in sigmas for w in weights]
    settings = Settings(
        row_weights=np.stack([w for _, w in members]),
        prior_precision=np.array([1.0 / sigma**2 for sigma, _ in members], np.float32),
        noise_std=np.asarray(noise_std, np.float32),
    )
    # The same initialisation for every sigma of a fold: differences are then due to sigma.
    progress, state = _start_members(program, list(jax.random.split(key, len(weights))), len(sigmas), rows.x)
    losses = _follow(program, progress, state, rows, settings, learning_rates)
    per_sigma = losses.reshape(len(sigmas), len(weights), -1).mean(axis=1)
    best_sigma, best_epoch = np.unravel_index(int(np.nanargmin(per_sigma)), per_sigma.shape)
    return Regularisation(
        sigma=float(sigmas[best_sigma]),
        num_epochs=max(1, int(best_epoch)),
        losses=per_sigma,
        sigmas=sigmas,
        unseen_rmse=_unseen_rmse(program, per_sigma[best_sigma, best_epoch], noise_std),
    )


def assign_folds(real: np.ndarray, seed: int) -> np.ndarray:
    """A fold number for each row; padding gets zero and counts in no fold."""
    n = int(real.sum())
    num_folds = max(2, min(MAX_FOLDS, n))
    folds = np.zeros(len(real), np.int32)
    folds[np.flatnonzero(real > 0)] = np.random.default_rng(seed).permutation(np.arange(n) % num_folds)
    return folds


def _unseen_rmse(program: Program, loss: float, noise_std: np.ndarray) -> np.ndarray | None:
    """The error behind a mean Gaussian loss; one number for all outputs, exact for a single one."""
    if not program.likelihood.is_regression or program.likelihood.num_noise(1) == 0:
        return None
    noise_std = np.asarray(noise_std, float)
    excess = loss - np.sum(np.log(noise_std)) - 0.5 * len(noise_std) * np.log(2 * np.pi)
    return noise_std * np.sqrt(max(2.0 * excess / len(noise_std), 1e-12))


def _follow(program, progress, state, rows, settings, learning_rates) -> np.ndarray:
    """Left-out loss by member and epoch; ends early once every curve has risen well past its minimum."""
    num_epochs, curves = len(learning_rates), []
    for first in range(0, num_epochs, EPOCHS_PER_CALL):
        chunk = learning_rates[first : first + EPOCHS_PER_CALL]
        progress, watched = _run_members(
            program, progress, state, rows, settings, pad_chunk(chunk), np.int32(len(chunk))
        )
        curves.append(np.asarray(watched)[:, : len(chunk)])
        done = np.concatenate(curves, axis=1)
        if _all_past_minimum(done):
            break
    losses = np.concatenate(curves, axis=1)
    return np.where(np.isfinite(losses), losses, np.inf)


def _all_past_minimum(curves: np.ndarray) -> bool:
    """Whether every curve's minimum lies in the first half of what has been run."""
    return bool(np.all(np.argmin(curves, axis=1) < curves.shape[1] // 2 - EPOCHS_PER_CALL // 2))


def _start_members(program: Program, keys: Sequence[Key], num_copies: int, x: Array) -> tuple[Any, Any]:
    """Members that start from one initialisation per key, each repeated ``num_copies`` times, and the network's state.

    The compiled initialisation of the final run serves all of them: compiling a
    vmapped one takes longer than the search.
    """
    starts = [initialise(program, key, x, None) for key in keys]
    return _stack([progress for progress, _ in starts], num_copies), starts[0][1]


@functools.partial(jax.jit, static_argnums=1)
def _stack(trees: list[Any], num_copies: int) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves * num_copies), *trees)


@functools.partial(jax.jit, static_argnums=0)
def _run_members(program: Program, progress, state, rows, settings, learning_rates, num_epochs):
    axes = Settings(row_weights=0, prior_precision=0, noise_std=None, burn_in=None, patience=None, min_delta=None)

    def one(progress, settings):
        collect = jnp.zeros(EPOCHS_PER_CALL)
        progress, _, watched = run_epochs(
            program, progress, state, rows, None, settings, learning_rates, collect, num_epochs
        )
        return progress, watched

    return jax.vmap(one, in_axes=(0, axes))(progress, settings)
