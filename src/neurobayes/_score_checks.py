"""Checks of what is scored: targets, predictions, variances, labels, probabilities, levels.

Each takes whatever NumPy can read as real numbers and returns float64, or raises
one error that says what was given and how to mend it. Nothing is broadcast.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import DataError, OptionError

_ROW_SUM_TOLERANCE = 1e-3


def as_floats(name: str, values: Any, axes: tuple[str, ...] = ("row", "column")) -> np.ndarray:
    """``values`` as a non-empty, finite float64 array; ``axes`` names its axes in messages."""
    try:
        if isinstance(values, np.ma.MaskedArray):  # np.asarray would uncover what the mask hides
            values = np.ma.filled(values.astype(np.float64), np.nan)
        array = np.asarray(values)
        holds_text = array.dtype == object and any(isinstance(value, str | bytes) for value in array.flat)
        if holds_text or array.dtype.kind in "USMmc":
            raise TypeError(f"its type is {array.dtype}")
        array = array.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        fix = "Pass a numeric array without missing values."
        raise DataError(f"{name} cannot be read as real numbers: {error}. {fix}") from error
    if array.ndim == 0:
        raise DataError(f"{name} is not an array. Pass one entry per row, a single row as [value].")
    if array.size == 0:
        raise DataError(f"{name} is empty (shape {array.shape}). A metric needs at least one row.")
    refuse(~np.isfinite(array), name, array, "non-finite values", "Impute or drop such rows before scoring.", axes)
    return array


def refuse(
    bad: np.ndarray, name: str, array: np.ndarray, fault: str, fix: str, axes: tuple[str, ...] = ("row", "column")
) -> None:
    """Raise where any entry is ``bad``, saying how many and which is the first."""
    if not bad.any():
        return
    index = np.unravel_index(np.argmax(bad), bad.shape)
    axes += tuple(f"axis {axis}" for axis in range(len(axes), bad.ndim))
    where = ", ".join(f"{axis} {position}" for axis, position in zip(axes, index, strict=False))
    raise DataError(f"{name} has {bad.sum()} {fault}, the first at {where} ({array[index]:g}). {fix}")


def aligned(**arrays: Any) -> list[np.ndarray]:
    """The arrays in float64, all of the shape of the first: broadcasting would average wrong differences."""
    (first, target), *rest = [(name, as_floats(name, values)) for name, values in arrays.items()]
    for name, array in rest:
        if array.shape == target.shape:
            continue
        message = f"{name} has shape {array.shape} but {first} has shape {target.shape}; nothing is broadcast."
        if array.size == target.size:
            raise DataError(f"{message} Use {name}.reshape({target.shape}) if the entries are in the same order.")
        raise DataError(f"{message} Each entry of {first} needs one entry of {name}.")
    return [target, *(array for _, array in rest)]


def errors_and_variances(y_true: Any, mean: Any, var: Any) -> tuple[np.ndarray, np.ndarray]:
    """Errors ``y - mean`` and their predictive variances."""
    y, mean, var = aligned(y_true=y_true, mean=mean, var=var)
    check_var(var)
    return y - mean, var


def check_var(var: np.ndarray) -> None:
    fix = "Pass predictive variances (std**2, noise included), not their logarithms."
    refuse(var <= 0, "var", var, "values that are not positive", fix)


def check_bounds(lower: np.ndarray, upper: np.ndarray) -> None:
    refuse(lower > upper, "lower", lower, "values above upper", "Are the two bounds swapped?")


def as_levels(level: Any, ndim: int = 0) -> np.ndarray:
    """A level, or with ``ndim=1`` a list of levels, in float64."""
    levels = np.asarray(level, dtype=np.float64)
    if levels.ndim != ndim or levels.size == 0 or not ((levels > 0) & (levels < 1)).all():
        kind = "a list of numbers" if ndim else "a number"
        raise OptionError(f"level={level!r} is not {kind} between 0 and 1. Write 95 % as 0.95.")
    return levels


def half_width(levels: np.ndarray) -> np.ndarray:
    """Half the width of the central interval of a standard normal that holds each of ``levels``."""
    from scipy.special import ndtri

    return ndtri((1 + levels) / 2)


def as_probabilities(probabilities: ArrayLike) -> np.ndarray:
    """A new array of class probabilities ``(n, C)`` whose rows sum to 1."""
    p = as_floats("probabilities", probabilities, ("row", "class"))
    if p.ndim != 2 or p.shape[1] < 2:
        raise DataError(
            f"probabilities has shape {p.shape}; it needs one row per label and one column per class. "
            "From the probability p of class 1 of two: np.column_stack([1 - p, p])."
        )
    fix = "If these are logits, apply a softmax first."
    refuse(p < 0, "probabilities", p, "negative values", fix, ("row", "class"))
    total = p.sum(axis=1)
    refuse(np.abs(total - 1) > _ROW_SUM_TOLERANCE, "probabilities", total, "rows whose sum is not 1", fix)
    return p / total[:, None]


def as_classes(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels as integers ``(n,)`` and a new array of probabilities ``(n, C)`` whose rows sum to 1."""
    p = as_probabilities(probabilities)
    y = as_floats("labels", labels)
    if y.shape != p.shape[:1]:
        fix = "Each row of probabilities needs one label."
        if y.ndim == 2 and len(y) == len(p):
            fix = "Use labels.ravel()." if y.shape[1] == 1 else "For one-hot labels use labels.argmax(axis=1)."
        raise DataError(f"labels has shape {y.shape} but probabilities has shape {p.shape}. {fix}")
    fix = "Number the classes from 0, in the order of the columns of probabilities."
    fault = f"values outside the whole numbers 0..{p.shape[1] - 1}"
    refuse((y < 0) | (y >= p.shape[1]) | (y != np.floor(y)), "labels", y, fault, fix)
    return y.astype(np.int64), p
