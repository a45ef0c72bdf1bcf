"""Standardisation of inputs and targets, and padding of rows to few distinct sizes."""

import dataclasses
from typing import Any, Self

import numpy as np

from . import _checks
from .compression import Compression

_STATISTICS = ("x_mean", "x_std", "y_mean", "y_std")

_CONSTANT = 1e-12
"""A column whose std is below this share of its largest magnitude varies by rounding only."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """Means and standard deviations that carry data to unit scale and predictions back.

    Statistics are float64: a target of 900 ± 100 or of 1e-9 loses nothing before
    it becomes float32 at unit scale.

    Attributes
    ----------
    x_mean, x_std : in the units of X, broadcast against the last axis of a row.
    y_mean, y_std : in the units of y, shape ``(d,)``, or ``(1,)`` to serve any ``d``.
    tokens : whether inputs are token ids, which pass through unscaled.
    compression : what follows for columns with long tails; None for nothing.
    """

    x_mean: np.ndarray
    x_std: np.ndarray
    y_mean: np.ndarray
    y_std: np.ndarray
    tokens: bool = False
    compression: Compression | None = None

    def __post_init__(self) -> None:
        for name in _STATISTICS:
            values = np.array(getattr(self, name), dtype=np.float64)
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scaling):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    @classmethod
    def fit(cls, X: np.ndarray, y: np.ndarray | None, *, tokens: bool = False, standardize: bool | str = True) -> Self:
        """Statistics of training data.

        Parameters
        ----------
        X : shape ``(n, d)``, scaled per column, or ``(n, ..., channels)``, scaled per channel
            over rows and all other axes; left alone if ``tokens``.
        y : targets ``(n,)`` or ``(n, d)``, scaled per output; None (class labels) for no scaling.
        tokens : whether X holds token ids.
        standardize : False for the identity; ``"compressed"`` compresses columns with long tails as well.

        Notes
        -----
        A constant column is centred and keeps its unit: its std is taken as 1.
        """
        if not standardize:
            return cls.identity(tokens=tokens)
        x_mean, x_std = (np.zeros(1), np.ones(1)) if tokens else _mean_std(X)
        y_mean, y_std = (np.zeros(1), np.ones(1)) if y is None else _mean_std(_columns(y))
        scaling = cls(x_mean, x_std, y_mean, y_std, tokens)
        return scaling.compressed(scaling.inputs(X)) if standardize == "compressed" else scaling

    def compressed(self, z: np.ndarray) -> Self:
        """The same with long tails of the columns of ``z`` compressed, which are rows it has scaled.

        The same altogether where there are none, or where rows are no vectors of numbers.
        """
        compression = None if self.tokens or z.ndim != 2 else Compression.fit(z)
        return self if compression is None else dataclasses.replace(self, compression=compression)

    @classmethod
    def identity(cls, *, tokens: bool = False) -> Self:
        """The scaling that changes nothing, for rows of any shape and any number of outputs."""
        return cls(np.zeros(1), np.ones(1), np.zeros(1), np.ones(1), tokens)

    def inputs(self, X: np.ndarray) -> np.ndarray:
        """Inputs at unit scale, float32, or token ids, int32, as they are.

        Raises
        ------
        DataError : a value is so far from the training data that float32 cannot hold it.
        """
        if self.tokens:
            return np.asarray(X, dtype=np.int32)
        scaled = _checks.as_float32(_standardized(X, self.x_mean, self.x_std), "X")
        # From single precision, so that it makes no difference whether it follows at once or later.
        return scaled if self.compression is None else self.compression.apply(scaled)

    def targets(self, y: np.ndarray) -> np.ndarray:
        """Targets ``(n,)`` or ``(n, d)`` at unit scale, float32, shape ``(n, d)``.

        Raises
        ------
        DataError : a value is too large for float32.
        """
        return _checks.as_float32(_standardized(_columns(y), self.y_mean, self.y_std), "y")

    def mean_to_user(self, mean: Any) -> np.ndarray:
        """Means (or draws) of the target in the user's units, float64; ``mean`` is ``(..., d)``."""
        return np.asarray(mean, dtype=np.float64) * self.y_std + self.y_mean

    def var_to_user(self, var: Any) -> np.ndarray:
        """Variances of the target in the user's squared units, float64; ``var`` is ``(..., d)``."""
        return np.asarray(var, dtype=np.float64) * self.y_std * self.y_std

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain lists and dicts, exact when written as JSON."""
        compression = None if self.compression is None else self.compression.to_dict()
        statistics = {name: getattr(self, name).tolist() for name in _STATISTICS}
        return {**statistics, "tokens": self.tokens, "compression": compression}


def _columns(y: np.ndarray) -> np.ndarray:
    return np.reshape(y, (len(y), -1))


def _mean_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std over all axes but the last, float64; std 1 where nothing varies."""
    values = np.asarray(values, dtype=np.float64)
    axes = tuple(range(values.ndim - 1))
    largest = np.abs(values).max(axis=axes)
    # Squares of 1e200 overflow and of 1e-200 vanish: divide by a power of two, which is exact.
    _, exponent = np.frexp(largest)
    scaled = np.ldexp(values, -exponent)
    mean, std = np.ldexp(scaled.mean(axis=axes), exponent), np.ldexp(scaled.std(axis=axes), exponent)
    return mean, np.where(std > _CONSTANT * largest, std, 1.0)


def _standardized(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (np.asarray(values, dtype=np.float64) - mean) / std


def bucket_size(n: int, sizes: int = 8) -> int:
    """The smallest size of a geometric grid that holds ``n`` rows.

    Grid points are the multiples of one in ``sizes`` (a power of two) of the power of two below, at least 8: a compiled
    program serves all row counts of a bucket, each doubling of ``n`` has ``sizes`` of them, and at most one in
    ``sizes`` of the rows is padding (from 8 rows on).
    """
    n = max(int(n), 8)
    step = max(1, (1 << (n.bit_length() - 1)) // sizes)
    return -(-n // step) * step


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """``array`` with its last row repeated up to ``size`` rows; of any rank and dtype.

    A copy of a real row, not zeros: a network may give NaN for a row of zeros,
    and weight zero does not silence a NaN.
    """
    missing = size - len(array)
    if missing < 0:
        raise ValueError(f"array has {len(array)} rows, more than size={size}.")
    return np.pad(array, [(0, missing)] + [(0, 0)] * (np.ndim(array) - 1), mode="edge")


def row_weights(n: int, size: int) -> np.ndarray:
    """Weights of ``size`` rows, float32: 1 for the first ``n``, which are data, 0 for padding."""
    return (np.arange(size) < n).astype(np.float32)
