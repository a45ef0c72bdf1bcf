"""Every check on what users hand in: data, options, random keys; ``_weight_checks`` has those on weights.

Each function returns its argument in the one form the library works with, or
raises one error that says what was given and how to mend it; none changes it.
"""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Key
from .errors import DataError, OptionError, nearest, unknown_choice

if TYPE_CHECKING:
    from .networks.base import InputSpec

Shape: TypeAlias = tuple[int, ...]
Columns: TypeAlias = Sequence[Any] | None

_NUMERIC_KINDS = "biuf"
_REENCODE = "Re-encode with `classes, y = np.unique(y, return_inverse=True)`; `classes` maps predictions back."
_SPATIAL_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def _where(index: Shape, columns: Columns = None) -> str:
    """An array index in words: ``row 17, column 4 ('age')``."""
    row, *rest = index
    if len(rest) == 1:
        return f"row {row}, column {rest[0]}" + (f" ({columns[rest[0]]!r})" if columns is not None else "")
    return f"row {row}" + (f", position {tuple(rest)}" if rest else "")


def _require(ok: np.ndarray, array: np.ndarray, name: str, fault: str, fix: str, columns: Columns = None) -> None:
    """Raise a ``DataError`` that counts the values where ``ok`` is False and locates the first."""
    if not ok.all():
        first = tuple(int(i) for i in np.unravel_index(np.argmin(ok), ok.shape))
        count = int(ok.size - ok.sum())
        faults = fault.replace("(s)", "s" * (count > 1))
        raise DataError(f"{name} has {count} {faults}, the first at {_where(first, columns)} ({array[first]}). {fix}")


def require_numbers(values: np.ndarray, label: str, remedy: str) -> np.ndarray:
    if values.dtype.kind in _NUMERIC_KINDS:
        return values
    if jnp.issubdtype(values.dtype, jnp.floating):  # bfloat16 and the like
        return values.astype(np.float64)
    if values.dtype.kind == "c":
        raise DataError(f"{label} is complex. Give real and imaginary parts as separate columns of real numbers.")
    if values.dtype.kind == "O":
        odd = [(index, v) for index, v in np.ndenumerate(np.atleast_1d(values)) if not isinstance(v, numbers.Number)]
        if not odd:
            raise DataError(f"{label} has dtype object although it holds numbers. Convert it with .astype(float).")
        index, value = odd[0]
        raise DataError(f"{label} holds what is no number at {_where(index)}: {value!r:.60}. {remedy}")
    shown = f", such as {str(values.flat[0])!r:.60}" if values.size else ""
    raise DataError(f"{label} has dtype {values.dtype}, not numbers{shown}. {remedy}")


def _series_values(series: Any, label: str, remedy: str) -> np.ndarray:
    values = np.asarray(series.to_numpy())
    declared = getattr(getattr(series, "dtype", None), "kind", "O")
    if values.dtype.kind == "O" and declared in _NUMERIC_KINDS:  # pandas' nullable numbers, with gaps
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    return require_numbers(values, label, remedy)


def _read(
    data: Any, name: str, remedy: str = "Encode text and categories as numbers first."
) -> tuple[np.ndarray, Columns]:
    """``data`` as a numeric array, and its column names where it is a table."""
    if np.ma.isMaskedArray(data):
        raise DataError(f"{name} is a masked array. Drop the masked rows, or fill them with {name}.filled(value).")
    if hasattr(data, "toarray") and hasattr(data, "nnz"):
        raise DataError(f"{name} is a sparse matrix. Make it dense with {name}.toarray().")
    # Tables are known by what they offer, so that neither pandas nor polars is ever imported here.
    if hasattr(data, "to_numpy") and hasattr(data, "columns"):
        columns = list(data.columns)
        series = [data.iloc[:, i] if hasattr(data, "iloc") else data.to_series(i) for i in range(len(columns))]
        parts = [_series_values(s, f"{name} column {c!r}", remedy) for s, c in zip(series, columns, strict=True)]
        return (np.stack(parts, axis=1) if parts else np.empty((len(data), 0))), columns
    if hasattr(data, "to_numpy"):
        return _series_values(data, name, remedy), None
    try:
        array = np.asarray(data)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not a rectangular array of numbers ({error}).") from error
    if array.ndim == 0:
        raise DataError(f"{name} is a single {type(data).__name__}. Give an array with one row per example.")
    return require_numbers(array, name, remedy), None


def column_names(X: Any) -> tuple[str, ...] | None:
    """The column names of a pandas or polars frame, None for anything else."""
    names = getattr(X, "columns", None)
    return None if names is None else tuple(str(name) for name in names)


def check_columns(X: Any, expected: tuple[str, ...] | None, name: str = "X") -> None:
    """Raise where both this frame and the one at fit name their columns, and not the same in the same order."""
    found = column_names(X)
    if expected is None or found is None or found == expected:
        return
    if sorted(found) == sorted(expected):
        fix = f"{name}[{list(expected)!r:.200}]"
        raise DataError(f"{name} has the columns of fit in another order. Select them in that order: {fix}.")
    odd = next((column for column in found if column not in expected), None)
    if odd is None:
        return  # repeated or missing ones: their number is checked with the shape
    raise DataError(f"{name} has a column {odd!r} that fit did not see{nearest(odd, expected)}. Use the same columns.")


def check_finite(array: np.ndarray, name: str, columns: Columns = None) -> None:
    """Raise a ``DataError`` that counts and locates values that are NaN or infinite."""
    _require(np.isfinite(array), array, name, "non-finite value(s)", "Impute or drop such rows first.", columns)


def as_float32(array: np.ndarray, name: str) -> np.ndarray:
    """``array`` as float32; raises a ``DataError`` where a value would overflow to infinity."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(array, dtype=np.float32)
    fix = "Train with standardize=True on data of this size, or rescale it."
    _require(np.isfinite(narrow), array, name, "value(s) too large for single precision after scaling", fix)
    return narrow


def as_inputs(X: Any, spec: "InputSpec", *, expected_shape: Shape | None = None, name: str = "X") -> np.ndarray:
    """Inputs as a C-contiguous array, one example per row.

    Parameters
    ----------
    X : numbers of any real dtype, shape ``(n, ...)``: numpy, JAX, nested lists, pandas or polars.
    spec : what the network accepts.
    expected_shape : shape of one row as ``fit`` saw it, checked where given. Token sequences
        may differ in length from those if the network states the longest it takes.
    name : what to call the argument in errors.

    Returns
    -------
    float64, or int32 token ids if ``spec.tokens``; with a channel axis for convolutions. May share memory with ``X``.

    Raises
    ------
    DataError : not numeric, empty, wrong shape, NaN or infinite, not a known token.
    """
    array, columns = _read(X, name)
    if array.ndim == 1:
        fix, what = ("(1, -1)", "one example") if array.shape == expected_shape else ("(-1, 1)", "one column")
        raise DataError(f"{name} is 1-D, shape {array.shape}. If it holds {what}, pass {name}.reshape{fix}.")
    if array.size == 0:
        raise DataError(f"{name} is empty, shape {array.shape}. At least one row and one column are needed.")
    if array.ndim - 1 == spec.spatial_dims:
        array = array[..., None]
    if expected_shape is not None and len(expected_shape) == spec.spatial_dims:
        expected_shape = (*expected_shape, 1)
    _check_shape(array.shape, spec, expected_shape, name)
    if spec.tokens:
        return _as_tokens(array, spec, name, columns)
    array = np.ascontiguousarray(array, dtype=np.float64)
    check_finite(array, name, columns)
    return array


def _check_shape(shape: Shape, spec: "InputSpec", expected: Shape | None, name: str) -> None:
    dims, longest = spec.spatial_dims, spec.max_length if spec.tokens else None
    if dims is not None and len(shape) != dims + 2:
        wanted = f"(n, {_SPATIAL_AXES[dims]}, channels); channels may be left out if there is one"
        raise DataError(f"{name} has shape {shape}, but this {dims}-D convolutional network needs {wanted}.")
    if longest is not None:
        if len(shape) != 2:
            raise DataError(f"{name} has shape {shape}, but token sequences need shape (n, length).")
        if shape[1] > longest:
            raise DataError(
                f"{name} has sequences of length {shape[1]}, but this network takes at most {longest}. "
                f"Cut them with {name}[:, :{longest}], or build the network for longer ones."
            )
    elif expected is not None and shape[1:] != tuple(expected):
        got, saw = f"each row of {name} has shape {shape[1:]}", f"{tuple(expected)}"
        if len(shape) == 2 and len(expected) == 1:
            got, saw = f"{name} has {shape[1]} columns", f"{expected[0]}"
        raise DataError(f"{got} but fit saw {saw}. Give what fit was given, in the same order.")


def _as_tokens(array: np.ndarray, spec: "InputSpec", name: str, columns: Columns) -> np.ndarray:
    if array.dtype.kind not in "iu":
        # Whole floats raise too: a silent cast would hide that scaled or measured data went in.
        whole = array.dtype.kind == "b" or bool((array == np.floor(array)).all() and np.isfinite(array).all())
        fix = f"If these are token ids, pass {name}.astype(int)." if whole else "Turn tokens into integer ids first."
        raise DataError(f"this network embeds integer tokens, but {name} has dtype {array.dtype}. {fix}")
    limit = np.iinfo(np.int32).max + 1 if spec.vocab_size is None else spec.vocab_size
    fix = "Map unknown tokens to a reserved id, or build the network with a larger vocabulary."
    _require((array >= 0) & (array < limit), array, name, f"token id(s) outside 0..{limit - 1}", fix, columns)
    return np.ascontiguousarray(array, dtype=np.int32)


def _check_target_rows(shape: Shape, num_rows: int, training: bool, name: str) -> None:
    if shape[0] == 1 and len(shape) == 2 and shape[1] == num_rows != 1:
        raise DataError(f"{name} has shape {shape}, one row, but X has {num_rows} rows. Pass {name}.ravel().")
    if shape[0] != num_rows:
        raise DataError(f"{name} has {shape[0]} rows but X has {num_rows}. Each row of X needs one target.")
    if math.prod(shape) == 0:
        raise DataError(f"{name} is empty, shape {shape}. At least one row and one column are needed.")
    if training and num_rows < 2:
        raise DataError(f"training needs at least 2 rows, but X and {name} have {num_rows}.")


def as_targets(
    y: Any, num_rows: int, *, training: bool = True, name: str = "y", num_outputs: int | None = None
) -> np.ndarray:
    """Regression targets as float64, shape ``(n,)`` or ``(n, d)`` as given.

    Parameters
    ----------
    y : numbers of any real dtype, one row per row of X.
    num_rows : number of rows of X.
    training : whether a model is to be trained on them, which takes at least 2 rows.
    name : what to call the argument in errors.
    num_outputs : columns that the model was fitted to, if it was.

    Raises
    ------
    DataError : not numeric, another number of rows than X or of columns than ``num_outputs``, more than 2 axes, NaN
        or infinite.
    """
    array, columns = _read(y, name)
    if array.ndim > 2:
        raise DataError(f"{name} has shape {array.shape}. Give (n,) or (n, d): {name}.reshape(len({name}), -1).")
    _check_target_rows(array.shape, num_rows, training, name)
    found = 1 if array.ndim == 1 else array.shape[1]
    if num_outputs is not None and found != num_outputs:
        raise DataError(f"{name} has {found} columns but y had {num_outputs} at fit. Give a value for each output.")
    array = np.ascontiguousarray(array, dtype=np.float64)
    check_finite(array, name, columns)
    return array


def as_class_labels(y: Any, num_rows: int, num_classes: int, *, training: bool = True, name: str = "y") -> np.ndarray:
    """Class labels as int32, shape ``(n,)``, each in ``0..num_classes-1``.

    Parameters
    ----------
    y : integers, or whole floats or bools, shape ``(n,)`` or ``(n, 1)``.
    num_rows, training, name : as in ``as_targets``; training also takes at least 2 classes.
    num_classes : number of classes of the model.

    Raises
    ------
    DataError : text, fractions, one-hot rows, labels out of range, or all of one class.
    """
    wanted = f"Class labels are the integers 0..{num_classes - 1} for num_classes={num_classes}, one per row."
    array, columns = _read(y, name, f"{wanted} {_REENCODE}")
    if array.ndim > 2 or (array.ndim == 2 and array.shape[0] == num_rows and array.shape[1] > 1):
        raise DataError(f"{name} has shape {array.shape}. {wanted} If it is one-hot, pass {name}.argmax(axis=-1).")
    _check_target_rows(array.shape, num_rows, training, name)
    check_finite(array, name, columns)
    array = array.ravel()
    if array.dtype.kind == "f":
        fix = f"{wanted} For regression leave num_classes unset."
        _require(array == np.floor(array), array, name, "fractional label(s)", fix)
    found = np.unique(array)
    shown = ", ".join(str(int(label)) for label in found[:10]) + ", ..." * (len(found) > 10)
    fix = _REENCODE if len(found) <= num_classes else f"Its {len(found)} classes need num_classes={len(found)}."
    within = (array >= 0) & (array < num_classes)
    _require(within, array, name, "label(s) out of range", f"It holds {shown}. {wanted} {fix}")
    if training and len(found) == 1:
        raise DataError(
            f"all {num_rows} labels in {name} are {int(found[0])}: one class alone cannot train a classifier. "
            "Give rows of at least two classes (was sorted data split without shuffling?)."
        )
    return array.astype(np.int32)


def check_positive_int(name: str, value: Any, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``; bools and floats are not integers."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        real = _as_real(value)
        close = f" (nearest: {max(minimum, round(real))})" if math.isfinite(real) else ""
        raise OptionError(f"{name}={value!r} must be an integer of at least {minimum}{close}.")
    return number


def _as_real(value: Any) -> float:
    """``value`` as a float, or NaN where it is no single real number."""
    if isinstance(value, (bool, np.bool_, str, bytes)) or getattr(value, "ndim", 0):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def check_positive(name: str, value: Any, *, allow_zero: bool = False) -> float:
    """``value`` as a finite float above zero, or of at least zero."""
    number = _as_real(value)
    if not (0 < number < math.inf or (allow_zero and number == 0)):
        raise OptionError(f"{name}={value!r} must be a finite number {'of at least' if allow_zero else 'above'} 0.")
    return number


def check_fraction(name: str, value: Any, *, allow_zero: bool = False, allow_one: bool = False) -> float:
    """``value`` as a float between 0 and 1, ends only where allowed."""
    number = _as_real(value)
    if not (0 < number < 1 or (allow_zero and number == 0) or (allow_one and number == 1)):
        low, high = "above" if not allow_zero else "of at least", "below" if not allow_one else "at most"
        raise OptionError(f"{name}={value!r} must be a number {low} 0 and {high} 1 (10 % is 0.1).")
    return number


def check_one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """``value`` where it is one of ``known``; else an error that names the nearest."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise unknown_choice(name, value, known)
    return value


def as_key(rng_key: Any = None, seed: int | None = None) -> Key:
    """A typed JAX key from a key, an old-style uint32 key, or an integer seed; seed 0 by default."""
    if rng_key is not None and seed is not None:
        raise OptionError("both rng_key and seed are given. Give one: either fixes all randomness.")
    if isinstance(rng_key, (np.ndarray, jax.Array)):
        typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
        if typed and rng_key.shape == ():
            return jnp.asarray(rng_key)
        if rng_key.dtype == np.uint32 and rng_key.shape == jax.random.key_data(jax.random.key(0)).shape:
            return jax.random.wrap_key_data(jnp.asarray(rng_key))
        if typed or rng_key.ndim:
            raise OptionError(f"rng_key has shape {rng_key.shape}, dtype {rng_key.dtype}. Give one, jax.random.key(0).")
    name, number = ("seed", seed) if rng_key is None else ("rng_key", rng_key)
    number = check_positive_int(name, 0 if number is None else number, minimum=0)
    if number >= 2**32:  # JAX would drop the high bits and different seeds would coincide
        raise OptionError(f"{name}={number} must be below 2**32.")
    return jax.random.key(number)
