"""How strongly and how long to train, chosen by rows the network has not seen.

The rows are split into folds. For each prior scale of a grid and each fold a
network is trained on the other folds, the folds of a scale together in one
vmapped program, and its loss on the left-out fold is followed through the epochs. The
prior scale and the number of epochs with the least left-out loss are then used
on all rows. A network trained to the end memorises a few hundred rows, and no
posterior over its last layer can undo that.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from . import left_out
from ._compiling import QuickJit
from ._keys import children
from ._threads import beside, side_by_side
from ._typing import Key
from .errors import ConvergenceWarning, TrainingError
from .likelihoods import LOG_2PI, Categorical, Gaussian
from .training import compile_ahead, initialise, initialise_members, pad_chunk, pad_steps, run_alone
from .training_steps import EPOCHS_PER_CALL, Program, Progress, Rows, Settings, run_epochs

SIGMA_GRID = (0.1, 0.3, 1.0, 3.0)
"""Prior standard deviations tried by ``map_sigma="auto"``, for noise of one standard deviation of the target."""

TIE = 0.01
"""Relative increase of the excess loss (of the squared error, for regression) that is not worth more epochs."""

HOPELESS = {0.05: 0.3, 0.1: 0.2, 0.2: 0.1, 0.4: 0.04}
"""A prior scale is given up once its log loss is this much above the best (nats per row; half the log ratio for squared
errors), by the share of the epochs done; more by one over the root of the number of rows. On data of all sizes here,
scales that were behind by more never caught up."""

FOLD_ROWS = 2000
"""Rows times trained folds of a search: small data sets are cross-fitted, large ones leave out one part."""


@dataclasses.dataclass(frozen=True)
class Regularisation:
    """The outcome of a search.

    Attributes
    ----------
    sigma : chosen prior standard deviation of the weights; infinite means none.
    num_epochs : chosen number of epochs.
    losses : (sigmas, epochs) mean left-out loss in nats per row; infinite after the epoch at which a sigma's run ended.
    sigmas : the grid.
    unseen_rmse : (d,) root mean squared error of the left-out predictions at the choice, in working
        units; None for classification.
    """

    sigma: float
    num_epochs: int
    losses: np.ndarray = dataclasses.field(repr=False)
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
    groups: np.ndarray | None = None,
) -> Regularisation:
    """The prior scale among ``sigmas`` and the epoch with the least left-out loss.

    Parameters
    ----------
    rows : padded training rows.
    learning_rates : (epochs, steps per epoch), the schedule of the final run, which the search follows.
    seed : decides the folds.
    groups : (rows without padding,) numbers of what is left out together; None for no such wish.
    """
    program = search_program(program)
    folds = left_out.assign_folds(np.asarray(rows.x), np.asarray(rows.real), seed, groups)
    num_rows = int(np.asarray(rows.real).sum())
    used = range(min(int(folds.max()) + 1, max(1, FOLD_ROWS // num_rows)))
    weights = np.stack([(folds != k) for k in used]).astype(np.float32) * np.asarray(rows.real)
    # The same initialisation for every sigma of a fold: differences are then due to sigma.
    noise = np.asarray(noise_std, np.float32)
    if one_by_one():
        starts, state = _start_one_by_one(program, key, len(weights), rows, Settings(weights[0], np.float32(1), noise))
    else:
        keys = children(key, len(weights))
        start, state = start_members(program, keys, rows, Settings(weights, np.float32(1.0), noise))
        starts, weights = [start], weights[None]

    rates = pad_steps(program, learning_rates, len(np.asarray(rows.real)))
    runs = [
        _Run(program, starts, state, rows, [Settings(each, np.float32(1.0 / s**2), noise) for each in weights])
        for s in sigmas
    ]
    perfect = perfect_loss(program, noise_std) if type(program.likelihood) is Gaussian else None
    _follow(runs, rates, perfect, num_rows)
    per_sigma = np.full((len(sigmas), max(len(run.curve) for run in runs)), np.inf)
    for losses, run in zip(per_sigma, runs, strict=True):
        losses[: len(run.curve)] = run.curve
    best_sigma = int(np.argmin(per_sigma.min(axis=1)))
    best_epoch = earliest_good_epoch(per_sigma[best_sigma], perfect_loss(program, noise_std))
    _check_search(per_sigma, best_epoch)
    return Regularisation(
        sigma=float(sigmas[best_sigma]),
        num_epochs=max(1, int(best_epoch)),
        losses=per_sigma,
        sigmas=sigmas,
        unseen_rmse=_unseen_rmse(program, per_sigma[best_sigma, best_epoch], noise_std),
    )


def search_program(program: Program) -> Program:
    """The program of a search; with ``one_by_one``, one that can do the final run as well."""
    return dataclasses.replace(program, monitor="unseen", early_stopping=False, track_statistics=False)


def one_by_one() -> bool:
    """Whether the folds of a scale are trained one by one, on a CPU, and not in one vmapped program.

    There they share the final run's program and keep all cores busy; an accelerator is faster with all at once.
    """
    return jax.default_backend() == "cpu"


def earliest_good_epoch(curve: np.ndarray, perfect: float) -> int:
    """The first epoch whose loss is all but the least: its excess over a ``perfect`` one at most ``TIE`` larger.

    The end of a flat curve is decided by chance, and a longer run costs time and memorises more.
    """
    least = float(np.min(curve))
    room = TIE * max(least - perfect, 0.0) if np.isfinite(perfect) else 0.0
    return int(np.argmax(curve <= least + room))


def perfect_loss(program: Program, noise_std: np.ndarray) -> float:
    """The loss per row of predictions without error; minus infinity for a loss that is not known to have a least."""
    if type(program.likelihood) is Gaussian:
        return float(np.sum(np.log(np.asarray(noise_std, float)) + 0.5 * LOG_2PI))
    return 0.0 if type(program.likelihood) is Categorical else -np.inf


def _check_search(per_sigma: np.ndarray, best_epoch: int) -> None:
    """Raise where every run blew up; warn where none predicts left-out rows better than the untrained network."""
    if per_sigma.shape[1] > 1 and not np.isfinite(per_sigma[:, 1:]).any():
        raise TrainingError(
            "the loss on left-out rows is not finite after the first epoch, whatever the regularisation. Likely "
            "causes: a learning rate that is too high (try a tenth of it), or inputs far outside the usual range."
        )
    if best_epoch == 0 and per_sigma.shape[1] > 1:
        warnings.warn(
            "training does not improve the predictions of left-out rows, so the network is kept almost untrained. "
            "Lower sgd_lr; if that does not help, X may say nothing about y.",
            ConvergenceWarning,
            stacklevel=2,
        )


def _unseen_rmse(program: Program, loss: float, noise_std: np.ndarray) -> np.ndarray | None:
    """The error behind a mean Gaussian loss; one number for all outputs, exact for a single one."""
    if type(program.likelihood) is not Gaussian:
        return None
    noise_std = np.asarray(noise_std, float)
    excess = loss - perfect_loss(program, noise_std)
    return noise_std * np.sqrt(max(2.0 * excess / len(noise_std), 1e-12))


class _Run:
    """The folds of one prior scale, and their left-out loss by epoch, averaged over them."""

    def __init__(self, program: Program, starts: Sequence[Any], state: Any, rows: Rows, settings: Sequence[Settings]):
        self.program, self.progress, self.state, self.rows, self.settings = program, [*starts], state, rows, settings
        self.watched: list[Any] = [None] * len(starts)
        self.curve = np.zeros(0)

    def advance(self, number: int, rates: np.ndarray) -> None:
        """At most ``EPOCHS_PER_CALL`` more epochs of a fold, or of all folds where they are stacked."""
        settings, no_average = self.settings[number], np.zeros(EPOCHS_PER_CALL, np.float32)
        run = run_members if settings.row_weights.ndim == 2 else run_alone
        self.progress[number], _, watched = run(
            self.program, self.progress[number], self.state, self.rows, settings, pad_chunk(rates), no_average,
            np.int32(len(rates)),
        )  # fmt: skip
        self.watched[number] = np.atleast_2d(np.asarray(watched, float))[:, : len(rates)]

    def record(self) -> None:
        """Take the epochs that all folds have run into the curve."""
        mean = np.concatenate(self.watched).mean(axis=0)
        self.curve = np.concatenate([self.curve, np.where(np.isfinite(mean), mean, np.inf)])

    @property
    def is_past_its_best(self) -> bool:
        """Whether the loss has risen well past its minimum."""
        return len(self.curve) > EPOCHS_PER_CALL and bool(np.argmin(self.curve) < len(self.curve) // 2)


def _follow(runs: list[_Run], rates: np.ndarray, perfect: float | None, num_rows: int) -> None:
    """Train all scales side by side, until each has ended, is past its best, or is hopeless."""
    alive, ends = runs, _ends(len(rates))
    for first, last in itertools.pairwise((0, *ends)):
        chunk = rates[first:last]
        tasks = [(run, number) for run in alive for number in range(len(run.watched))]
        side_by_side(lambda run, number, chunk=chunk: run.advance(number, chunk), tasks, compiled=True)
        for run in alive:
            run.record()
        least = min(run.curve.min() for run in runs)
        allowed = hopeless(last / len(rates), num_rows)
        alive = [
            run for run in alive
            if not run.is_past_its_best and not _gap(run.curve.min(), least, perfect) > allowed
        ]  # fmt: skip
        if not alive:
            break


def _ends(num_epochs: int) -> list[int]:
    """Epochs after which the scales are compared: soon at first, when most of the hopeless are known."""
    soon = [EPOCHS_PER_CALL // 4, EPOCHS_PER_CALL // 2]
    return [end for end in (*soon, *range(EPOCHS_PER_CALL, num_epochs, EPOCHS_PER_CALL)) if end < num_epochs] + [
        num_epochs
    ]


def _gap(loss: float, best: float, perfect: float | None) -> float:
    """How much worse left-out rows are predicted, in nats per row.

    With squared errors, whose loss is ``perfect`` where there are none, as if the noise were as large as they are.
    """
    if not np.isfinite(loss):
        return np.inf
    if perfect is None:
        return float(loss - best)
    # Losses are rounded: below this all predictions are as good as perfect.
    excess, least = (max(value - perfect, 1e-5) for value in (loss, best))
    return 0.5 * float(np.log(excess / least))


def hopeless(share: float, num_rows: int) -> float:
    """How far behind a prior scale may be after a share of the epochs."""
    if share < min(HOPELESS):
        return np.inf
    return float(np.interp(share, list(HOPELESS), list(HOPELESS.values()))) + num_rows**-0.5


def start_members(
    program: Program, keys: Sequence[Key], rows: Rows, settings: Settings, *, averages: bool = False
) -> tuple[Progress, Any]:
    """Members that start from one initialisation per key, and the network's state.

    Meanwhile ``run_members`` is compiled for them, with ``settings`` of the kind that they will have.
    """
    compiled = beside(lambda: compile_ahead(program, keys[0], rows, settings, averages=averages, run=run_members))
    members = initialise_members(program, keys, rows.x, averages=averages)
    compiled()
    return members


def _start_one_by_one(
    program: Program, key: Key, number: int, rows: Rows, settings: Settings
) -> tuple[list[Progress], Any]:
    """As ``start_members`` for ``number`` networks that are not stacked."""
    compiled = beside(lambda: compile_ahead(program, key, rows, settings))
    starts = [initialise(program, each, rows.x, None) for each in children(key, number)]
    compiled()
    return [progress for progress, _ in starts], starts[0][1]


@QuickJit
def run_members(program: Program, progress, state, rows, settings, learning_rates, collect, num_epochs):
    """``run_epochs`` for members that differ in their row weights: (progress, training losses, monitored losses)."""
    axes = Settings(row_weights=0, prior_precision=None, noise_std=None, burn_in=None, patience=None, min_delta=None)

    def one(progress, settings):
        return run_epochs(program, progress, state, rows, None, settings, learning_rates, collect, num_epochs)

    if settings.row_weights.shape[0] == 1:
        alone = jax.tree.map(lambda leaf: leaf[0], progress)
        results = one(alone, settings._replace(row_weights=settings.row_weights[0]))
        return jax.tree.map(lambda leaf: leaf[None], results)
    return jax.vmap(one, in_axes=(0, axes))(progress, settings)
