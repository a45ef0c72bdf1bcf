"""Predictive distributions as functions from levels to quantiles, looked up by normal score.

The normal score of a value is ``Phi^-1(F(value))``: 0 at the median, ±1.96 at the ends of the
central 95 % interval. For a Gaussian a quantile is a straight line in it, so straight lines
between a few scores are enough for distributions that are nearly Gaussian, and for tails.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

QuantileFunction: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Levels ``(k,)`` -> quantiles ``(k, *y.shape)``, one predictive distribution for each entry of ``y``."""

# Further out, quantiles found in single precision say nothing.
_KNOTS = np.linspace(-3.5, 3.5, 29)


def gaussian(mean: np.ndarray, std: np.ndarray) -> QuantileFunction:
    """The quantiles of Gaussians."""
    from scipy.special import ndtri

    return lambda levels: mean + std * ndtri(levels).reshape(-1, *(1,) * mean.ndim)


def _quantiles_at(scores: np.ndarray, quantile_function: QuantileFunction) -> np.ndarray:
    from scipy.special import ndtr

    return np.asarray(quantile_function(ndtr(scores)), np.float64)


def normal_scores(y: np.ndarray, quantile_function: QuantileFunction) -> np.ndarray:
    """``Phi^-1(F(y))``, shape (n, d), by straight lines between quantiles and beyond the outermost."""
    q = _quantiles_at(_KNOTS, quantile_function).reshape(len(_KNOTS), *y.shape)
    below = np.clip(np.sum(q <= y, axis=0) - 1, 0, len(_KNOTS) - 2)
    left, right = (np.take_along_axis(q, (below + i)[None], axis=0)[0] for i in (0, 1))
    smallest = np.finfo(np.float32).eps * np.maximum(np.abs(left), np.abs(right)) + np.finfo(np.float64).tiny
    return _KNOTS[below] + (y - left) / np.maximum(right - left, smallest) * (_KNOTS[1] - _KNOTS[0])


def at_normal_scores(scores: np.ndarray, quantile_function: QuantileFunction) -> np.ndarray:
    """Quantiles at normal scores ``(k, d)``, each output at its own, shape ``(k, n)`` or ``(k, n, d)``."""
    last, previous = _KNOTS[-1], _KNOTS[-2]
    inner = np.clip(scores, -last, last)
    beyond = scores - inner
    wanted, place = np.unique(inner, return_inverse=True)
    q = _quantiles_at(wanted, quantile_function)
    place = place.reshape(scores.shape)
    columns = [q[place[:, j]] if q.ndim == 2 else q[place[:, j], :, j] for j in range(scores.shape[1])]
    values = columns[0] if q.ndim == 2 else np.stack(columns, axis=-1)
    if not beyond.any():
        return values
    edges = _quantiles_at(np.array([-last, -previous, previous, last]), quantile_function)
    slope = np.stack([edges[1] - edges[0], edges[3] - edges[2]]) / (last - previous)
    beyond = beyond[:, :1] if q.ndim == 2 else beyond[:, None, :]
    return values + beyond * np.where(beyond < 0, slope[0], slope[1])
