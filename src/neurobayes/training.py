"""Deterministic training: maximum a posteriori, averaged weights, early stopping.

All epochs run inside a handful of compiled calls, of what ``training_steps``
has; between them losses are checked and progress is shown.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import weight_statistics
from ._compiling import QuickJit
from ._threads import beside
from ._typing import Array, Key, Params, State
from .errors import TrainingError
from .short_rows import without_blocks
from .training_steps import EPOCHS_PER_CALL, Program, Progress, Rows, Settings, make_optimizer, run_epochs
from .weight_statistics import TrainingStatistics

FEW_WEIGHTS = 2**18
"""Numbers, those of the optimiser included, that are initialised in less time than it takes to compile well."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The outcome of ``train``: chosen parameters, losses by epoch, and how it ended."""

    params: Params
    history: dict[str, np.ndarray]
    statistics: TrainingStatistics | None
    num_epochs: int
    num_averaged: int
    progress: Progress


def initialise(
    program: Program, key: Key, x: Array, params: Params | None, *, averages: bool = False
) -> tuple[Progress, State]:
    """The progress before the first epoch, for inputs like ``x``.

    ``params`` overrides the random initialisation; ``averages`` makes room for an average of the weights.
    """
    arguments = _at_start(program), key, np.zeros((1, *x.shape[1:]), x.dtype), params
    shapes = jax.tree.leaves(_initialise.eval_shape(*arguments))
    few = sum(math.prod(leaf.shape) for leaf in shapes) <= FEW_WEIGHTS
    progress, state = (_initialise_few if few else _initialise)(*arguments)
    return _with_room(program, progress, averages), state


def initialise_members(
    program: Program, keys: Sequence[Key], x: Array, *, averages: bool = False
) -> tuple[Progress, State]:
    """As ``initialise`` for one member with each key: the progress with a leading axis, and the network's state."""
    starts = [initialise(program, key, x, None, averages=averages) for key in keys]
    # Stacked on the host: a program of its own for it, or a vmapped initialisation, would take longer to compile.
    host = [jax.tree.map(np.asarray, progress._replace(key=None)) for progress, _ in starts]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *host)
    return stacked._replace(key=jnp.stack([progress.key for progress, _ in starts])), starts[0][1]


def compile_ahead(
    program: Program,
    key: Key,
    rows: Rows,
    settings: Settings,
    *,
    averages: bool = False,
    params: Params | None = None,
    validation: Rows | None = None,
    run: Any = None,
) -> None:
    """Compile what ``run_alone`` runs, or ``run`` for stacked members, before there are any weights."""
    row = np.zeros((1, *rows.x.shape[1:]), rows.x.dtype)
    one, state = _initialise.eval_shape(_at_start(program), key, row, params)
    progress = _with_room(program, one, averages)
    if run is not None:
        members = np.shape(settings.row_weights)[:1]
        progress = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*members, *leaf.shape), leaf.dtype), progress)
    none = np.zeros((0, num_steps_per_epoch(program, len(rows.real))), np.float32)
    chunk = pad_chunk(none), pad_chunk(none[:, 0]), np.int32(0)
    if run is not None:
        run.compile(program, progress, state, rows, settings, *chunk)
    else:
        _run_epochs.compile(program, progress, state, rows, validation, settings, *chunk)


def _at_start(program: Program) -> Program:
    """The program without what only matters later, so that a search and a run share what initialises them."""
    network = without_blocks(program.network)
    return dataclasses.replace(program, network=network, batch_size=None, monitor=None, early_stopping=False)


def _with_room(program: Program, progress: Progress, averages: bool) -> Progress:
    if program.early_stopping:
        progress = progress._replace(best_params=progress.params)
    if averages:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), progress.params)
        progress = progress._replace(average=zeros)
    return progress


def initialise_fn(program: Program, key: Key, x: Array, params: Params | None) -> tuple[Progress, State]:
    """As ``initialise`` for one row ``x``, to be compiled."""
    key_init, key_run = jax.random.split(key)
    fresh, state = program.network.init(key_init, x)
    start: Any = fresh if params is None else params
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    statistics = weight_statistics.start(params) if program.track_statistics else None
    opt_state = make_optimizer(program.optimizer).init(params)  # pyright: ignore[reportArgumentType]
    progress = Progress(
        params, opt_state, key_run, jnp.int32(0),
        None, jnp.float32(jnp.inf), jnp.int32(0), None, jnp.zeros((), jnp.float32), statistics,
    )  # fmt: skip
    return progress, state


_initialise = QuickJit(initialise_fn)
_initialise_few = QuickJit(initialise_fn, level=0)


_run_epochs = QuickJit(run_epochs)


def run_alone(program, progress, state, rows, settings, learning_rates, collect, num_epochs, validation=None):
    """``run_epochs``, compiled."""
    return _run_epochs(program, progress, state, rows, validation, settings, learning_rates, collect, num_epochs)


def num_steps_per_epoch(program: Program, num_rows: int) -> int:
    """Steps in one epoch over ``num_rows`` rows."""
    return 1 if program.batch_size is None else -(-num_rows // program.batch_size)


def pad_steps(program: Program, learning_rates: np.ndarray, size: int) -> np.ndarray:
    """Step sizes ``(epochs, steps)`` for real rows with room for the steps of ``size`` padded ones, which never run."""
    missing = num_steps_per_epoch(program, size) - learning_rates.shape[1]
    return np.pad(learning_rates, [(0, 0), (0, max(0, missing))], mode="edge")


def train(
    program: Program,
    key: Key,
    rows: Rows,
    settings: Settings,
    *,
    learning_rates: np.ndarray,
    collect: np.ndarray | None = None,
    validation: Rows | None = None,
    params: Params | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> tuple[TrainingResult, State]:
    """Train for ``len(learning_rates)`` epochs, or until early stopping ends it.

    Parameters
    ----------
    learning_rates : (epochs, steps per epoch) step sizes of the named optimisers.
    collect : (epochs,) one where the weights after that epoch enter the average (SWA).
    params : weights to start from instead of a random initialisation.
    on_progress : called with (epochs done, training loss) between compiled calls.

    Raises
    ------
    TrainingError
        When the loss stops being finite; nothing is returned.
    """
    averages = collect is not None
    compiled = beside(
        lambda: compile_ahead(program, key, rows, settings, averages=averages, params=params, validation=validation)
    )
    progress, state = initialise(program, key, rows.x, params, averages=averages)
    compiled()
    num_epochs = len(learning_rates)
    learning_rates = pad_steps(program, learning_rates, len(rows.real))
    collect = np.zeros(num_epochs, np.float32) if collect is None else collect
    losses, watched, done = [], [], 0
    while done < num_epochs:
        chunk = slice(done, done + EPOCHS_PER_CALL)
        size = len(learning_rates[chunk])
        progress, loss, value = run_alone(
            program, progress, state, rows, settings,
            pad_chunk(learning_rates[chunk]), pad_chunk(collect[chunk]), np.int32(size), validation,
        )  # fmt: skip
        ran = int(progress.epoch) - done
        if ran == 0:  # stopped exactly at the end of the chunk before
            break
        losses.append(np.asarray(loss)[:ran])
        watched.append(np.asarray(value)[:ran])
        _check_finite(losses[-1], done)
        done += ran
        if on_progress is not None:
            on_progress(done, float(losses[-1][-1]))
        if ran < size:
            break
    history = {"loss": np.concatenate(losses)}
    if validation is not None:
        history["validation_loss"] = np.concatenate(watched)
    result = _result(program, progress, history, done)
    # The loss of an epoch is that of the weights before its steps, so the last steps are not in it.
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params)):
        raise TrainingError(f"the weights are not finite after epoch {done}. {CAUSES}")
    return result, state


def pad_chunk(values: np.ndarray) -> np.ndarray:
    """``values`` filled up with zeros to ``EPOCHS_PER_CALL`` entries."""
    out = np.zeros((EPOCHS_PER_CALL, *values.shape[1:]), np.float32)
    out[: len(values)] = values
    return out


CAUSES = (
    "Likely causes: a learning rate that is too high (try a tenth of it), inputs far outside the usual range with "
    "standardize=False, or a custom loss that is not finite for some rows."
)


def _check_finite(losses: np.ndarray, first_epoch: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise TrainingError(
            f"the training loss became {losses[bad[0]]} at epoch {first_epoch + int(bad[0]) + 1}. {CAUSES}"
        )


def _result(program: Program, progress: Progress, history, num_epochs: int) -> TrainingResult:
    params, num_averaged = progress.params, int(progress.num_averaged)
    if num_averaged:
        params = progress.average
    elif program.early_stopping:
        if not np.isfinite(progress.best_loss):
            raise TrainingError(f"the {program.monitor} loss was never finite. {CAUSES}")
        params = progress.best_params
    statistics = None if progress.statistics is None else weight_statistics.summarise(progress.statistics, num_averaged)
    return TrainingResult(
        params=params,
        history=history,
        statistics=statistics,
        num_epochs=num_epochs,
        num_averaged=num_averaged,
        progress=progress,
    )
