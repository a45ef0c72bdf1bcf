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
    Points ``(nodes, columns)``, evenly spaced in each column; log weights of that shape, the weights of each
    column summing to one; the logarithm of each integral ``(columns,)``.
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
        points, values = _halve(log_density, points, values)
    peak = values.max(axis=0)
    mass = np.exp(values - peak)
    spacing = points[1] - points[0]
    total = mass.sum(axis=0)
    return points, values - peak - np.log(total), peak + np.log(total * spacing)


def _look(log_density: LogDensity, ends, num_nodes: int):
    """Values on an even grid, and the ends of the part that matters, one spacing wider on either side."""
    points = np.linspace(ends[0], ends[1], num_nodes)
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


def _halve(log_density: LogDensity, points: np.ndarray, values: np.ndarray):
    """The grid with its midpoints added."""
    middle = 0.5 * (points[1:] + points[:-1])
    new_points, new_values = (np.empty((2 * len(points) - 1, points.shape[1])) for _ in range(2))
    new_points[::2], new_points[1::2] = points, middle
    new_values[::2], new_values[1::2] = values, _finite(log_density(middle))
    return new_points, new_values


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), -np.inf, values)


def draw(nodes: np.ndarray, log_weights: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the piecewise linear density through evenly spaced nodes, and the node that each belongs to.

    The density is a mixture of hat functions, one for each node. ``uniforms`` is (draws, 2), in [0, 1): the first
    column goes through the inverse distribution function, the second chooses between the two hats at that point.
    """
    density = np.exp(log_weights)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    mass = uniforms[:, 0] * cumulative[-1]
    cell = np.minimum(np.searchsorted(cumulative, mass, side="right"), len(nodes) - 1) - 1
    left, right = density[cell], density[cell + 1]
    rest = mass - cumulative[cell]
    root = np.sqrt(np.maximum(left**2 + 2.0 * (right - left) * rest, 0.0))
    fraction = np.clip(2.0 * rest / np.maximum(left + root, 1e-300), 0.0, 1.0)
    to_right = uniforms[:, 1] * (left * (1.0 - fraction) + right * fraction) < right * fraction
    return nodes[cell] + (nodes[1] - nodes[0]) * fraction, cell + to_right
