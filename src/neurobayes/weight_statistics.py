"""What a training run remembers of each weight: its variance, its gradients, its spread while averaging.

One pass, no stored history.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, Params


class Statistics(NamedTuple):
    """Running moments of each weight over the steps after burn-in, and over the averaged weights (Welford)."""

    num_steps: Array
    mean: Params
    sum_squares: Params
    sum_abs_gradient: Params
    averaged_squares: Params


@dataclasses.dataclass(frozen=True)
class TrainingStatistics:
    """Per-weight summaries of a training run, pytrees shaped like the parameters.

    Attributes
    ----------
    weight_variance, mean_abs_gradient : over the steps after burn-in.
    num_steps : how many these were.
    averaged_variance : variance over the weights that entered the average (the diagonal of SWAG, Maddox et al.
        2019, arXiv:1902.02476); None where fewer than two did.
    """

    weight_variance: Params
    mean_abs_gradient: Params
    num_steps: int
    averaged_variance: Params | None = None


def start(params: Params) -> Statistics:
    """Statistics of no step yet."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Statistics(jnp.zeros((), jnp.float32), zeros, zeros, zeros, zeros)


def update(statistics: Statistics, params: Params, gradient: Params, counts: Array) -> Statistics:
    """One step's weights and gradient added where ``counts`` is true (Welford)."""
    gate = counts.astype(jnp.float32)
    count = statistics.num_steps + gate
    rate = gate / jnp.maximum(count, 1.0)
    mean = jax.tree.map(lambda m, p: m + rate * (p - m), statistics.mean, params)
    squares = jax.tree.map(
        lambda s, m_old, m_new, p: s + gate * (p - m_old) * (p - m_new),
        statistics.sum_squares, statistics.mean, mean, params,
    )  # fmt: skip
    absolute = jax.tree.map(lambda a, g: a + gate * jnp.abs(g), statistics.sum_abs_gradient, gradient)
    return Statistics(count, mean, squares, absolute, statistics.averaged_squares)


@jax.jit
def _finish(statistics: Statistics) -> tuple[Params, Params]:
    count = jnp.maximum(statistics.num_steps, 1.0)
    variance = jax.tree.map(lambda s: s / count, statistics.sum_squares)
    return variance, jax.tree.map(lambda a: a / count, statistics.sum_abs_gradient)


def summarise(statistics: Statistics, num_averaged: int) -> TrainingStatistics:
    """The summaries of a finished run, ``num_averaged`` of whose weights entered an average."""
    variance, gradient = _finish(statistics)
    averaged = None
    if num_averaged > 1:
        averaged = jax.tree.map(lambda s: np.asarray(s) / num_averaged, statistics.averaged_squares)
    return TrainingStatistics(variance, gradient, int(statistics.num_steps), averaged)
