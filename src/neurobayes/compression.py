"""Columns of a table with long tails, compressed.

Values that span decades leave a network little to tell the many small ones
apart by, and lead it far off where it meets the few large ones. The inverse
hyperbolic sine is linear about the middle of a column and a logarithm in its
tails: order and differences are kept, no value is cut off, and far from the
training rows inputs still differ. A single value far beyond all others stays
far beyond them: whether it is a mistake is not for a transform to say.
Burbidge, Magee & Robb (1988), "Alternative transformations to handle extreme
values of the dependent variable", JASA 83.
"""

import dataclasses
from typing import Any, Self

import numpy as np

SKEWNESS, EXCESS_KURTOSIS = 1.0, 3.0
"""A column with more of either (of any sign of the first) has long tails; an exponential distribution has 2 and 6."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compression:
    """``(arcsinh((z - centre) / width) - mean) / std`` in some columns; the others are left as they are.

    Attributes
    ----------
    columns : (d,) booleans, the columns that are compressed.
    centre, width : (d,) median of a column and mean distance from it, standardised units.
    mean, std : (d,) of the compressed column over the training rows.
    """

    columns: np.ndarray
    centre: np.ndarray
    width: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, z: np.ndarray) -> Self | None:
        """What the standardised rows ``(n, d)`` of a table call for; None where no column has long tails.

        Columns of two values look the same after any transform, and are left alone.
        """
        z = np.asarray(z, np.float64)
        columns = np.array([len(np.unique(column)) > 2 and _has_long_tails(column) for column in z.T], bool)
        if not columns.any():
            return None
        centre = np.median(z, axis=0)
        width = np.where(columns, np.abs(z - centre).mean(axis=0), 1.0)
        compressed = np.arcsinh((z - centre) / width)
        std = np.where(columns, compressed.std(axis=0), 1.0)
        return cls(columns, centre, width, compressed.mean(axis=0), std)

    def apply(self, z: np.ndarray) -> np.ndarray:
        """Standardised rows ``(n, d)`` as the network gets them, float32."""
        z = np.asarray(z, np.float64)
        compressed = (np.arcsinh((z - self.centre) / self.width) - self.mean) / self.std
        return np.where(self.columns, compressed, z).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain lists, exact when written as JSON."""
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}


def _has_long_tails(column: np.ndarray) -> bool:
    if column.std() < 0.5:  # a constant but for rounding, which standardisation has left as it is
        return False
    import scipy.stats  # half a second, which a network of images need not wait for

    skewed = abs(scipy.stats.skew(column)) > SKEWNESS
    return bool(skewed or scipy.stats.kurtosis(column) > EXCESS_KURTOSIS)
