"""The compiled part of training: epochs of an optimiser on the negative log joint.

The objective is the negative of the full-data log joint divided by the number
of rows, in nats: ``-(sum_i w_i log p(y_i | f_i) + log p(params)) / n``. A
mini-batch estimates the sum over rows without bias; the prior is never
rescaled. Everything a user may vary between runs (learning rates, prior scale,
row weights, stopping) is an argument of the compiled program, so that changing
it recompiles nothing and members with different values can be trained together
under ``vmap``.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import trees, weight_statistics
from ._typing import Array, Key, Params, State
from .convolutions import with_ordered_convolutions
from .likelihoods import LOG_2PI, Likelihood
from .networks.base import Network
from .short_rows import for_batch
from .weight_statistics import Statistics

MONITOR_ROWS = 1024
"""Rows put through the network at once when the loss of unseen or validation rows is measured."""

FLAT_WEIGHTS = 2**14
"""Most weights that the optimiser takes as one vector: to copy more would take longer than it saves."""

EPOCHS_PER_CALL = 128
"""Epochs run by one compiled call at most; between calls progress is shown and losses are checked."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a training run compiles to; two runs with equal programs and shapes share it.

    Attributes
    ----------
    optimizer : ``"adam"``, ``"sgd"``, ``"lbfgs"``, or any optax transformation, which then sets its own step sizes.
    batch_size : rows per step; None takes all rows in every step.
    monitor : what is watched after each epoch: ``"validation"`` rows, the rows of weight zero (``"unseen"``), or None.
    early_stopping : stop once the monitored loss has not improved for ``Settings.patience`` epochs.
    track_statistics : keep the running variance of every weight and its mean absolute gradient.
    """

    network: Network
    likelihood: Likelihood
    optimizer: str | optax.GradientTransformation = "adam"
    batch_size: int | None = None
    monitor: Literal["validation", "unseen"] | None = None
    early_stopping: bool = False
    track_statistics: bool = False


class Rows(NamedTuple):
    """Rows as a compiled program sees them: padded, with ``real`` one for rows and zero for padding."""

    x: Any
    y: Any
    real: Any


class Settings(NamedTuple):
    """What may change without recompiling; every field may carry a leading member axis.

    Attributes
    ----------
    row_weights : (n,) multiplicity of each row; zero leaves a row out.
    prior_precision : one over the prior variance of every weight; zero for no prior.
    noise_std : (d,) the noise the objective assumes, in the targets' working units.
    burn_in : epochs before statistics are gathered.
    patience, min_delta : early stopping.
    """

    row_weights: Any
    prior_precision: Any
    noise_std: Any
    burn_in: Any = np.int32(0)
    patience: Any = np.int32(2**30)
    min_delta: Any = np.float32(0.0)


class Progress(NamedTuple):
    """Everything a training run carries from step to step; None for what it was not asked to keep.

    ``average`` is there where weights are averaged, ``best_params`` with early
    stopping. What is None is in no compiled step.
    """

    params: Params
    opt_state: Any
    key: Key
    epoch: Array
    best_params: Params | None
    best_loss: Array
    best_epoch: Array
    average: Params | None
    num_averaged: Array
    statistics: Statistics | None


def make_optimizer(choice: str | optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optax transformation for a choice; named ones leave the step size to the caller."""
    if choice == "lbfgs":
        return optax.with_extra_args_support(optax.lbfgs())
    if isinstance(choice, str):
        named = {"adam": _adam, "sgd": optax.identity}
        return optax.with_extra_args_support(named[choice]())
    return optax.with_extra_args_support(choice)


def _adam() -> optax.GradientTransformation:
    """Adam; for few weights with all of them as one vector, whose step compiles and runs faster than that of leaves."""
    plain, flat = optax.scale_by_adam(), optax.flatten(optax.scale_by_adam())

    def fitting(params: Params) -> optax.GradientTransformation:
        return flat if trees.num_scalars(params) <= FLAT_WEIGHTS else plain

    def update(updates, state, params=None):
        return fitting(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: fitting(params).init(params), update)


def objective(
    program: Program, params: Params, state: State, rows: Rows, settings: Settings, num_rows: Any, key: Key | None
) -> tuple[Array, Array]:
    """The loss for a batch and the negative log likelihood of each of its rows.

    ``num_rows`` is the number of real rows in the whole training set; the batch
    sum is scaled by ``num_rows / batch rows``.
    """
    outputs = program.network.apply(params, state, rows.x, key=key)
    row_loss = -program.likelihood.log_prob(outputs, rows.y, settings.noise_std)
    in_batch = jnp.maximum(rows.real.sum(), 1.0)
    data_term = jnp.sum(settings.row_weights * rows.real * row_loss) / in_batch
    return data_term - log_prior(params, settings.prior_precision) / num_rows, row_loss


def log_prior(params: Params, precision: Array) -> Array:
    """Log density of ``N(0, 1 / precision)`` over all weights; zero where precision is zero (no prior)."""
    leaves = jax.tree.leaves(params)
    squares = sum(jnp.sum(leaf**2) for leaf in leaves)
    size = sum(leaf.size for leaf in leaves)
    constant = 0.5 * size * (jnp.log(jnp.where(precision > 0, precision, 1.0)) - LOG_2PI)
    return jnp.where(precision > 0, constant - 0.5 * precision * squares, 0.0)


def _step(program, progress, state, rows, settings, num_rows, learning_rate):
    """One optimiser step on one batch: (progress, batch loss)."""
    key, key_dropout = progress.key, None
    if program.network.has_dropout:  # splitting a key is a loop of its own in the compiled step
        key, key_dropout = jax.random.split(key)

    def loss_with(network):
        own = dataclasses.replace(program, network=network)
        return lambda params: objective(own, params, state, rows, settings, num_rows, key_dropout)[0]

    derivative = for_batch(program.network, rows.x, lambda network: jax.value_and_grad(loss_with(network)))
    loss, gradient = with_ordered_convolutions(derivative)(progress.params)
    updates, opt_state = make_optimizer(program.optimizer).update(
        gradient, progress.opt_state, progress.params, value=loss, grad=gradient, value_fn=loss_with(program.network)
    )
    if program.optimizer in ("adam", "sgd"):
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    params = optax.apply_updates(progress.params, updates)
    statistics = progress.statistics
    if statistics is not None:
        statistics = weight_statistics.update(statistics, params, gradient, progress.epoch >= settings.burn_in)
    return progress._replace(params=params, opt_state=opt_state, key=key, statistics=statistics), loss


def _epoch(program, progress, state, rows, settings, num_rows, learning_rates):
    """All batches once, in a fresh random order: (progress, mean batch loss)."""
    if program.batch_size is None:
        return _step(program, progress, state, rows, settings, num_rows, learning_rates[0])
    key, key_order = jax.random.split(progress.key)
    progress = progress._replace(key=key)
    size, batch = rows.real.shape[0], program.batch_size
    # Real rows in random order first, padding last: batches without a real row are never run.
    # Each row has a key of its own, so that the order does not depend on the amount of padding.
    ranks = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key_order, row)))(jnp.arange(size))
    order = jnp.argsort(jnp.where(rows.real > 0, ranks, 2.0))
    order = jnp.pad(order, (0, batch), mode="edge")

    def body(i, carry):
        progress, total = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * batch, batch)
        inside = (i * batch + jnp.arange(batch) < num_rows).astype(jnp.float32)
        picked = Rows(rows.x[at], rows.y[at], inside)
        weights = settings._replace(row_weights=settings.row_weights[at])
        progress, loss = _step(program, progress, state, picked, weights, num_rows, learning_rates[i])
        return progress, total + loss

    num_batches = jnp.ceil(num_rows / batch).astype(jnp.int32)
    progress, total = jax.lax.fori_loop(0, num_batches, body, (progress, jnp.zeros((), jnp.float32)))
    return progress, total / num_batches


def _monitored(program, params, state, rows, validation, settings):
    """Mean negative log likelihood of the watched rows (no prior), in nats per row."""
    if program.monitor == "unseen":
        watched, weights = rows, rows.real * (settings.row_weights == 0)
    else:
        watched, weights = validation, validation.real

    def total(x, y, weights):
        outputs = with_ordered_convolutions(program.network.apply)(params, state, x)
        return jnp.sum(weights * -program.likelihood.log_prob(outputs, y, settings.noise_std))

    def measured():
        size = weights.shape[0]
        if program.batch_size is None and size <= MONITOR_ROWS:
            return total(watched.x, watched.y, weights).astype(jnp.float32)

        def block(first):
            at = first + jnp.arange(MONITOR_ROWS)
            inside = jnp.minimum(at, size - 1)
            return total(watched.x[inside], watched.y[inside], weights[inside] * (at < size))

        # Activations of all rows need not fit in memory.
        return jnp.sum(jax.lax.map(block, jnp.arange(0, size, MONITOR_ROWS))).astype(jnp.float32)

    count = weights.sum()
    # The run after a search has the program of the search, and no unseen rows to spend time on.
    return jax.lax.cond(count > 0, measured, lambda: jnp.zeros((), jnp.float32)) / jnp.maximum(count, 1.0)


def run_epochs(program, progress, state, rows, validation, settings, learning_rates, collect, num_epochs):
    """Up to ``num_epochs <= EPOCHS_PER_CALL`` epochs: (progress, training losses, monitored losses).

    Losses are NaN for epochs that were not run. The ``"unseen"`` loss of an
    epoch is that of the weights the epoch starts from, because the training
    step computes that forward pass anyway; ``"validation"`` is measured after it.
    Where ``progress`` holds no average, ``collect`` is not looked at.
    """
    num_rows = jnp.maximum(rows.real.sum(), 1.0)
    blank = jnp.full(EPOCHS_PER_CALL, jnp.nan, jnp.float32)

    def body(carry):
        i, progress, losses, watched = carry
        before = progress.params
        progress, loss = _epoch(program, progress, state, rows, settings, num_rows, learning_rates[i])
        losses = losses.at[i].set(loss)
        if program.monitor is not None:
            seen = before if program.monitor == "unseen" else progress.params
            value = _monitored(program, seen, state, rows, validation, settings)
            watched = watched.at[i].set(value)
            if program.early_stopping:
                progress = _keep_best(progress, seen, value, settings.min_delta)
        if progress.average is not None:
            progress = _average(progress, collect[i])
        return i + 1, progress._replace(epoch=progress.epoch + 1), losses, watched

    def goes_on(carry):
        i, progress, _, _ = carry
        more = i < num_epochs
        if program.early_stopping:
            more = more & (progress.epoch - progress.best_epoch <= settings.patience)
        return more

    _, progress, losses, watched = jax.lax.while_loop(goes_on, body, (jnp.int32(0), progress, blank, blank))
    return progress, losses, watched


def _average(progress: Progress, gate: Array) -> Progress:
    """The progress with its weights taken into the average, where ``gate`` is one."""
    count = progress.num_averaged + gate
    rate = gate / jnp.maximum(count, 1.0)
    average = jax.tree.map(lambda a, p: a + rate * (p - a), progress.average, progress.params)
    statistics = progress.statistics
    if statistics is not None:
        squares = jax.tree.map(
            lambda s, old, new, p: s + gate * (p - old) * (p - new),
            statistics.averaged_squares, progress.average, average, progress.params,
        )  # fmt: skip
        statistics = statistics._replace(averaged_squares=squares)
    return progress._replace(average=average, num_averaged=count, statistics=statistics)


def _keep_best(progress: Progress, params: Params, value: Array, min_delta: Array) -> Progress:
    better = value < progress.best_loss - min_delta
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, progress.best_params)
    return progress._replace(
        best_params=best,
        best_loss=jnp.where(better, value, progress.best_loss),
        best_epoch=jnp.where(better, progress.epoch, progress.best_epoch),
    )
