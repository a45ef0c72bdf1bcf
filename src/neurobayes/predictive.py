"""Predictions from draws, in bounded memory.

The part of the forward pass that no random weight enters is computed once for
each block of rows; the draws then run through the rest one after another,
and only running moments are kept. Memory follows the block sizes, not the
number of rows times the number of draws.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import data, linearity, trees
from ._threads import side_by_side
from ._typing import Array, Params, State
from .hoisting import Hoisted, hoist_network
from .likelihoods import mean_noise_var, split_outputs
from .networks.base import Network
from .partition import Partition
from .posterior import Analytic
from .row_blocks import probe, row_bytes, rows_per_block
from .rows_last import RowsLast, with_rows_last
from .subspaces import RandomPart

MAX_DRAWS_PER_BLOCK = 256
"""Draws in one compiled call at most."""

MAX_ROWS_PER_BLOCK = 512
"""Rows of a block at most: more blocks keep all cores busy, and their activations in the cache."""


CHEAP_ROW_BYTES = 2**12
"""Where the largest activation of a row is no larger, blocks of rows are padded generously: to 8, 64 or 512 rows."""

MAX_HALVINGS = 60
QUANTILE_TOLERANCE = 1e-4
"""Quantiles are exact to this share of the tail beyond them."""


@dataclasses.dataclass(frozen=True)
class RegressionPrediction:
    """Moments of the predictive distribution, in the user's units, shaped like the training target.

    Attributes
    ----------
    mean : posterior mean of the network's output.
    epistemic_var : variance of the output between draws: what more data would reduce.
    aleatoric_var : mean noise variance over draws: what it would not.
    quantiles : level -> quantile of the predictive mixture (noise included), where asked for.
    draws : (num_draws, …) draws of new observations (noise included), where asked for.
    """

    mean: np.ndarray
    epistemic_var: np.ndarray
    aleatoric_var: np.ndarray
    quantiles: dict[float, np.ndarray] | None = None
    draws: np.ndarray | None = None

    @property
    def var(self) -> np.ndarray:
        """Predictive variance: epistemic plus aleatoric."""
        return self.epistemic_var + self.aleatoric_var

    @property
    def std(self) -> np.ndarray:
        """Predictive standard deviation."""
        return np.sqrt(self.var)


@dataclasses.dataclass(frozen=True)
class ClassPrediction:
    """The predictive distribution over classes, and its uncertainty split in two; entropies in nats.

    Attributes
    ----------
    probabilities : (n, classes) mean over draws of the class probabilities.
    total_entropy : (n,) entropy of ``probabilities``.
    expected_entropy : (n,) mean entropy of the draws' probabilities: the aleatoric part.
    mutual_information : (n,) their difference: the epistemic part, what the draws disagree about.
    draws : (num_draws, n, classes) class probabilities of single draws, where asked for.
    """

    probabilities: np.ndarray
    total_entropy: np.ndarray
    expected_entropy: np.ndarray
    mutual_information: np.ndarray
    draws: np.ndarray | None = None

    @classmethod
    def of(cls, probabilities: np.ndarray, expected_entropy: np.ndarray, draws: np.ndarray | None) -> Self:
        """From the draws' mean probabilities and mean entropy; rows are renormalised in float64."""
        probabilities = probabilities.astype(float)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            total = -np.sum(np.where(probabilities > 0, probabilities * np.log(probabilities), 0.0), axis=1)
        expected = np.clip(expected_entropy.astype(float), 0.0, total)
        return cls(probabilities, total, expected, total - expected, draws)


def as_pair(prediction: RegressionPrediction | ClassPrediction) -> tuple[np.ndarray, np.ndarray]:
    """What ``predict`` of a model returns: mean and variance, or class probabilities and their entropy."""
    if isinstance(prediction, RegressionPrediction):
        return prediction.mean, prediction.var
    return prediction.probabilities, prediction.total_entropy


class Source(NamedTuple):
    """What predictions are made from: a network, its frozen weights, and draws of the random ones.

    ``noise_outputs`` is the number of targets whose noise the network gives, by twice as many outputs; 0 where the
    noise std has draws of its own, ``noise_std``, or there is none.
    """

    network: Network
    partition: RandomPart
    params: Params
    state: State
    theta: np.ndarray
    noise_std: np.ndarray
    analytic: Analytic | None = None
    noise_outputs: int = 0

    @property
    def noise_var(self) -> np.ndarray:
        """Posterior mean of each output's noise variance, ``(outputs,)``, in working units."""
        if self.analytic is not None:
            return self.analytic.noise_var
        return np.mean(self.noise_std.astype(float) ** 2, axis=0)


def deterministic_outputs(network: Network, params: Params, state: State, x: np.ndarray) -> np.ndarray:
    """Outputs of the network with one set of weights, shape ``(n, outputs)``, in row blocks."""
    frozen = Partition.nothing(trees.shapes(params))
    rows = rows_per_block(network, frozen, params, state, x)
    blocks = [np.asarray(_apply(network, params, state, block))[:size] for block, size in _row_blocks(x, rows)]
    return np.concatenate(blocks)


def deterministic_means(source: Source, x: np.ndarray) -> np.ndarray:
    """What the network predicts at its trained weights, ``(n, outputs)``: outputs that are noise are left out."""
    outputs = deterministic_outputs(source.network, source.params, source.state, x)
    return split_outputs(outputs)[0] if source.noise_outputs else outputs


_apply = functools.partial(jax.jit, static_argnums=0)(lambda network, params, state, x: network.apply(params, state, x))


def regression_moments(source: Source, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and variance of the outputs, each ``(n, outputs)``, in working units.

    In closed form where the engine knows it, else over the draws.
    """
    return noisy_moments(source, x)[:2]


def noisy_moments(source: Source, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``regression_moments``, and the mean noise variance over draws, ``(n or 1, outputs)``."""
    size = source.noise_outputs
    if source.analytic is not None:
        mean, variance = _analytic_moments(source, source.analytic, x)
        if size:
            return mean[:, :size], variance[:, :size], mean_noise_var(mean[:, size:], variance[:, size:])
        return mean, variance, source.noise_var[None]
    mean, squares = _reduce(source, x, _means_and_noise_vars if size else _identity)
    variance = np.maximum(squares, 0.0) / len(source.theta)
    if size:
        return mean[:, :size], variance[:, :size], mean[:, size:]
    return mean, variance, source.noise_var[None]


def _analytic_moments(source: Source, analytic: Analytic, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts, num_rows, rows = [], len(x), _analytic_rows(source, x)
    x = data.pad_rows(x, rows) if num_rows < rows else x
    for block, size in _row_blocks(x, rows):
        # A block may be mostly padding: the posterior's own linear algebra is for the rows alone.
        mean, variance = analytic.moments(*_hoist(source, block), min(size, num_rows))
        parts.append((mean, np.maximum(variance, 0.0)))
    mean, variance = (np.concatenate(values) for values in zip(*parts, strict=True))
    return mean, variance


def _analytic_rows(source: Source, x: Any) -> int:
    """Rows of a block: of few sizes, so that adding or taking away rows compiles next to nothing."""
    rows, step = _rows(source, x), 3 if row_bytes(*source[:4], x) <= CHEAP_ROW_BYTES else 1
    doublings = max(3, (len(x) - 1).bit_length())
    return min(rows, 1 << -(-doublings // step) * step)


def compile_analytic(source: Source, x: Any) -> None:
    """Compile the moments in closed form of rows like those of ``x``; shapes will do."""
    shape = (_analytic_rows(source, x), *x.shape[1:])
    hoisted = hoist_network(*source[:4], jax.ShapeDtypeStruct(shape, x.dtype))
    hoisted.compile()
    linearity.compile_ahead(hoisted, source.partition.size, source.noise_std.shape[1])


def class_moments(source: Source, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean class probabilities ``(n, classes)`` and mean entropy of the draws ``(n,)`` in nats."""
    means, _ = _reduce(source, x, _probabilities_and_entropy)
    return means[:, :-1], means[:, -1]


def function_draws(source: Source, x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The network's outputs for given draws, shape ``(draws, n, outputs)``; memory is that of the result."""
    parts = []
    for block, size in _row_blocks(x, _rows(source, x)):
        hoisted, carry = _hoist(source, block)
        outs = [
            np.asarray(_outputs(hoisted, chunk, carry))[:count, :size]
            for chunk, count in _draw_blocks(theta, MAX_DRAWS_PER_BLOCK)
        ]
        parts.append(np.concatenate(outs))
    return np.concatenate(parts, axis=1)


def observation_draws(
    source: Source, x: np.ndarray, theta: np.ndarray, noise_std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means ``(draws, n, d)`` and noise std ``(draws, n or 1, d)`` of given draws.

    The latter is ``noise_std`` ``(draws, d)`` but where the network gives it.
    """
    values = function_draws(source, x, theta)
    if not source.noise_outputs:
        return values, noise_std[:, None, :]
    means, log_std = split_outputs(values)
    return means, np.exp(log_std)


def solve_quantiles(
    means: np.ndarray, noise_std: np.ndarray, weights: np.ndarray, levels: Sequence[float]
) -> np.ndarray:
    """Quantiles ``(levels, n, d)`` of mixtures of Gaussians.

    ``means`` is (draws, n, d), ``noise_std`` (draws, n or 1, d), and ``weights`` (draws,) sum to one.
    """
    size = data.bucket_size(means.shape[1])  # one compiled program for all row counts of a bucket

    def padded(values: np.ndarray) -> np.ndarray:
        more = size - means.shape[1] if values.shape[1] == means.shape[1] else 0
        return np.pad(values, [(0, 0), (0, more), (0, 0)], mode="edge").astype(np.float32)

    solved = _solve_quantiles(
        padded(means), padded(noise_std), weights.astype(np.float32), np.asarray(levels, np.float32)
    )
    return np.asarray(solved)[:, : means.shape[1]]


@jax.jit
def _solve_quantiles(means: Array, noise_std: Array, weights: Array, levels: Array) -> Array:
    """Newton's method on the mixture's distribution function, kept inside a bracket that bisection would use."""
    low = jnp.min(means - 6.0 * noise_std, axis=0)
    high = jnp.max(means + 6.0 * noise_std, axis=0)
    mean = jnp.tensordot(weights, means, 1)
    std = jnp.sqrt(jnp.tensordot(weights, (means - mean) ** 2 + noise_std**2, 1))

    def solve(level):
        tolerance = QUANTILE_TOLERANCE * jnp.minimum(level, 1.0 - level)

        def unsettled(state):
            step, _, _, _, error = state
            return (step < MAX_HALVINGS) & (jnp.max(error) > tolerance)

        def improve(state):
            step, low, high, middle, _ = state
            scaled = (middle - means) / noise_std
            excess = jnp.tensordot(weights, jax.scipy.stats.norm.cdf(scaled), 1) - level
            slope = jnp.tensordot(weights, jax.scipy.stats.norm.pdf(scaled) / noise_std, 1)
            low, high = jnp.where(excess < 0, middle, low), jnp.where(excess < 0, high, middle)
            newton = middle - excess / jnp.maximum(slope, 1e-30)
            # Where the function is all but flat Newton's step leaves the bracket.
            inside = (newton > low) & (newton < high) & (step % 4 != 3)
            better = jnp.where(inside, newton, 0.5 * (low + high))
            return step + 1, low, high, jnp.where(jnp.abs(excess) > tolerance, better, middle), jnp.abs(excess)

        start = jnp.clip(mean + std * jax.scipy.stats.norm.ppf(level), low, high)
        state = (jnp.int32(0), low, high, start, jnp.full_like(start, jnp.inf))
        return jax.lax.while_loop(unsettled, improve, state)[3]

    return jax.lax.map(solve, levels)


def _identity(outputs: Array) -> Array:
    return outputs


def _means_and_noise_vars(outputs: Array) -> Array:
    means, log_std = split_outputs(outputs)
    return jnp.concatenate([means, jnp.exp(2.0 * log_std)], axis=-1)


def _probabilities_and_entropy(outputs: Array) -> Array:
    log_probabilities = jax.nn.log_softmax(outputs, axis=-1)
    probabilities = jnp.exp(log_probabilities)
    entropy = -jnp.sum(probabilities * log_probabilities, axis=-1, keepdims=True)
    return jnp.concatenate([probabilities, entropy], axis=-1)


def _reduce(source: Source, x: np.ndarray, quantity) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations over draws of ``quantity(outputs)``, each ``(n, quantities)``."""

    def moments_of(block: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        hoisted, carry = _hoist(source, block)
        late = with_rows_last(hoisted, _twin(source, hoisted, block), quantity, source.partition.size)
        zeros = np.zeros(late.shape, np.float32)
        moments = np.float32(0), zeros, zeros
        for chunk, count in _draw_blocks(source.theta, MAX_DRAWS_PER_BLOCK):
            moments = _accumulate(late, chunk, carry, np.int32(count), moments)
        mean, squares = (np.moveaxis(np.asarray(moment), -1, 0)[:size] for moment in moments[1:])
        return mean, squares

    parts = side_by_side(moments_of, _row_blocks(x, _rows(source, x)))
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([squares for _, squares in parts])


@functools.partial(jax.jit, static_argnums=0)
def _accumulate(late: RowsLast, theta: Array, carry: Any, count: Array, moments):
    """Welford's update of (number, mean, sum of squares), rows last, with the first ``count`` draws of a block.

    One draw after another: its activations stay in the processor's cache, which
    those of many draws at once would not.
    """
    arranged = late.arrange(carry)

    def add(i, moments):
        number, mean, squares = moments
        values = late.function(theta[i], arranged).astype(mean.dtype)
        change = values - mean
        mean = mean + change / (number + 1)
        return number + 1, mean, squares + change * (values - mean)

    return jax.lax.fori_loop(0, count, add, moments)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(hoisted: Hoisted, theta: Array, carry: Any) -> Array:
    return jax.lax.map(lambda draw: hoisted.late(draw, carry), theta)


def _hoist(source: Source, block: np.ndarray):
    network, partition, params, state = source[:4]
    hoisted = hoist_network(network, partition, params, state, block)
    return hoisted, hoisted.early(partition, params, state, block)


def _twin(source: Source, hoisted: Hoisted, block: np.ndarray) -> Hoisted:
    """The same split for another number of rows: the one that measured the size of a block, if it is another."""
    twin = probe(*source[:4], block)
    return twin if twin.num_rows != hoisted.num_rows else hoisted.resized(2 * hoisted.num_rows)


def _row_blocks(x: np.ndarray, rows: int):
    """Blocks of ``rows`` rows, a power of two, or of a smaller one where there are fewer, each with its real rows.

    The last of several blocks is as long as the others: a pool that shrinks row by row compiles hardly anything.
    """
    for first in range(0, len(x), rows):
        block = x[first : first + rows]
        size = rows if len(x) > rows else min(max(8, 1 << (len(block) - 1).bit_length()), max(rows, 8))
        yield data.pad_rows(block, size), len(block)


def _rows(source: Source, x: np.ndarray) -> int:
    return min(rows_per_block(*source[:4], x), MAX_ROWS_PER_BLOCK)


def _draw_blocks(theta: np.ndarray, size: int):
    """Blocks of draws, the last padded with copies of its first draw, each with its number of real draws."""
    size = min(size, data.bucket_size(len(theta)))
    for first in range(0, len(theta), size):
        block = theta[first : first + size]
        count = len(block)
        if count < size:
            block = np.concatenate([block, np.broadcast_to(block[:1], (size - count, *block.shape[1:]))])
        yield block, count
