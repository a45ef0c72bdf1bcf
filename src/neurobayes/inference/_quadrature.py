"""Quadrature of a one-dimensional density on an even grid that finds and covers its mass."""

from collections.abc import Callable

import numpy as np

NEGLIGIBLE = 25.0
"""A point this many nats below the mode is outside the grid: less than 1e-10 of the mass lies there."""

NUM_COARSE = 2048
MAX_NODES = 2**15
MAX_ZOOMS = 20

SMOOTHING = 0.01
"""Largest mean squared spacing in units of the local standard deviation. Drawing between nodes adds a sixth of it
to the variance."""

LogDensity = Callable[[np.ndarray], np.ndarray]
"""Log densities ``(nodes, columns)``, up to a constant, at points of that shape."""


def integrate(
    log_density: LogDensity, low: float, high: float, num_columns: int, num_nodes: int, num_coarse: int = NUM_COARSE
):
    """Nodes and log weights for each column's density, at least ``num_nodes`` of them, and log integrals.

    Returns
    -------
    Points ``(nodes, columns)``, evenly spaced in each column; log weights of that shape, each column summing to
    one; the logarithm of each integral ``(columns,)``. ``log_density`` sees arrays of ``num_coarse`` or
    ``num_nodes`` rows only, so that a compiled one is compiled twice.
    """
    ends = np.full(num_columns, low), np.full(num_columns, high)
    points, values, ends = _look(log_density, ends, num_coarse)
    for _ in range(MAX_ZOOMS):
        points, values, hull = _look(log_density, ends, num_nodes)
        done = np.all(hull[1] - hull[0] > 0.8 * (ends[1] - ends[0]))
        ends = hull
        if done:
            break
    while len(points) < MAX_NODES and np.any(_roughness(values) > SMOOTHING):
        points, values = _halve(log_density, points, values, num_nodes)
    peak = values.max(axis=0)
    mass = np.exp(values - peak)
    spacing = points[1] - points[0]
    total = mass.sum(axis=0)
    return points, values - peak - np.log(total), peak + np.log(total * spacing)


def _look(log_density: LogDensity, ends, num_nodes: int):
    """Values on an even grid, and the ends of the part that matters, one spacing wider on either side."""
    points = np.linspace(*ends, num_nodes)
    values = _finite(log_density(points))
    inside = values > values.max(axis=0) - NEGLIGIBLE
    first = np.maximum(np.argmax(inside, axis=0) - 1, 0)
    last = np.minimum(num_nodes - np.argmax(inside[::-1], axis=0), num_nodes - 1)
    columns = np.arange(points.shape[1])
    return points, values, (points[first, columns], points[last, columns])


def _roughness(values: np.ndarray) -> np.ndarray:
    """Mean over the density of its log's second differences: squared spacing over local variance."""
    with np.errstate(invalid="ignore"):
        curvature = np.abs(values[2:] - 2 * values[1:-1] + values[:-2])
    mass = np.where(np.isfinite(curvature), np.exp(values[1:-1] - values.max(axis=0)), 0.0)
    return np.sum(mass * np.where(mass > 0, curvature, 0.0), axis=0) / np.maximum(mass.sum(axis=0), 1e-300)


def _halve(log_density: LogDensity, points: np.ndarray, values: np.ndarray, num_rows: int):
    """The grid with its midpoints added, evaluated ``num_rows`` at a time."""
    middle = 0.5 * (points[1:] + points[:-1])
    padded = np.pad(middle, ((0, -len(middle) % num_rows), (0, 0)), mode="edge")
    blocks = [_finite(log_density(block)) for block in np.split(padded, len(padded) // num_rows)]
    new_points, new_values = (np.empty((2 * len(points) - 1, points.shape[1])) for _ in range(2))
    new_points[::2], new_points[1::2] = points, middle
    new_values[::2], new_values[1::2] = values, np.concatenate(blocks)[: len(middle)]
    return new_points, new_values


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), -np.inf, values)


def pick(log_weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Nodes drawn by their weights ``(nodes,)``, one for each number in [0, 1)."""
    cumulative = np.cumsum(np.exp(log_weights))
    return np.minimum(np.searchsorted(cumulative, uniforms * cumulative[-1], side="right"), len(log_weights) - 1)
