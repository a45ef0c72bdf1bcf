"""Representative weights of a kernel by k-means on its rows and on its columns."""

import math
import warnings
from collections.abc import Sequence

import numpy as np


def representatives(grids: Sequence[np.ndarray], num_pairs: int, seed: int) -> list[tuple[int, int]]:
    """Distinct pairs that stand for the blocks of similar weights that some kernels fall into.

    The rows of a kernel (all weights of one input) and its columns (all weights
    of one output) are clustered by k-means. Each cluster of rows meets each
    cluster of columns in a block of weights that do similar things. Every block
    gives the weight nearest to its mean, the largest blocks first; where there
    are fewer blocks than pairs wanted, every block gives its second nearest, and so on.

    Parameters
    ----------
    grids : kernels of shape (num_in, num_out, window), ranked together.
    num_pairs : how many to give; all where there are fewer.
    seed : of the k-means starting points.

    Returns
    -------
    ``min(num_pairs, number of pairs)`` tuples (grid, flat position in num_in × num_out).
    """
    per_grid = math.ceil(num_pairs / max(len(grids), 1))
    ranked = []
    for number, grid in enumerate(grids):
        for block in _blocks(grid, per_grid, seed):
            ranked += [(turn, -len(block), number, int(p)) for turn, p in enumerate(block[:num_pairs])]
    return [(number, position) for _, _, number, position in sorted(ranked)[:num_pairs]]


def _blocks(grid: np.ndarray, num_blocks: int, seed: int) -> list[np.ndarray]:
    """The flat positions of each block's pairs, nearest to the block's mean first."""
    num_in, num_out, _ = grid.shape
    if grid.size == 0:
        return []
    num_rows = min(math.ceil(math.sqrt(num_blocks)), num_in)
    row_labels = _labels(grid.reshape(num_in, -1), num_rows, seed)
    column_labels = _labels(grid.swapaxes(0, 1).reshape(num_out, -1), math.ceil(num_blocks / num_rows), seed)
    blocks = []
    for row_label in np.unique(row_labels):
        for column_label in np.unique(column_labels):
            rows, columns = np.flatnonzero(row_labels == row_label), np.flatnonzero(column_labels == column_label)
            values = grid[np.ix_(rows, columns)].reshape(len(rows) * len(columns), -1)
            order = np.argsort(np.linalg.norm(values - values.mean(0), axis=1), kind="stable")
            blocks.append((rows[:, None] * num_out + columns).ravel()[order])
    return blocks


def _labels(profiles: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """The cluster of each row of ``profiles``; at most as many clusters as there are different rows."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    num_clusters = min(num_clusters, len(np.unique(profiles, axis=0)))
    if num_clusters <= 1:
        return np.zeros(len(profiles), int)
    with warnings.catch_warnings():
        # Rows that differ by rounding alone end in fewer clusters, which is what we want of them.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(num_clusters, random_state=seed).fit_predict(profiles)
