"""How good predictions are: point errors, intervals, proper scores, calibration.

Arguments are always ``(y_true, prediction)``. For regression ``y_true``, ``mean``
and ``var`` have one shape, ``(n,)`` or ``(n, d)``, and every result is the average
over all their entries. For classification ``labels`` has shape ``(n,)`` with whole
numbers in ``0..C-1`` and ``probabilities`` has shape ``(n, C)``; its rows must sum
to 1 within 0.001 and are then divided by their sum, so that the rounding of float32
does not enter the score.

Anything that NumPy can read as real numbers is accepted (lists, NumPy and JAX
arrays, pandas and polars columns); work is in float64. Shapes that differ, empty,
missing or non-finite values, variances that are not positive and labels out of range
raise ``DataError``; an impossible ``level`` or ``num_bins`` raises ``OptionError``.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ._score_checks import aligned as _aligned
from ._score_checks import as_classes as _as_classes
from ._score_checks import as_floats as _as_floats
from ._score_checks import as_levels as _as_levels
from ._score_checks import as_probabilities as _as_probabilities
from ._score_checks import check_bounds as _check_bounds
from ._score_checks import check_var as _check_var
from ._score_checks import errors_and_variances as _gaussian
from ._score_checks import half_width as _half_width
from .errors import DataError, OptionError

_SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)


class CalibrationCurve(NamedTuple):
    """Nominal levels of central intervals and the share of targets inside, each of shape ``(k,)``."""

    levels: np.ndarray
    observed: np.ndarray


class ReliabilityCurve(NamedTuple):
    """Mean confidence, accuracy and number of rows of each bin that holds any, each of shape ``(k,)``."""

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray


class Scores(dict[str, float]):
    """Scores by name, a dict that prints as a table.

    Attributes
    ----------
    by_output : name -> one score for each of several outputs, shape ``(d,)``; empty for one output and for classes.
    """

    def __init__(self, scores: Mapping[str, float], by_output: Mapping[str, np.ndarray] | None = None):
        super().__init__(scores)
        self.by_output = dict(by_output or {})

    def __str__(self) -> str:
        width = max(len(name) for name in self)
        num_outputs = len(next(iter(self.by_output.values()), ()))
        lines = [" " * width + "".join(f"{title:>12}" for title in ("all", *range(num_outputs)))] if num_outputs else []
        for name, score in self.items():
            lines.append(f"{name:<{width}}" + "".join(f"{x:12.4g}" for x in (score, *self.by_output.get(name, ()))))
        return "\n".join(lines)


class Predictor(Protocol):
    """What ``summary`` asks of a model."""

    @property
    def is_regression(self) -> bool:
        """Whether ``predict`` returns ``(mean, variance)`` rather than ``(probabilities, uncertainty)``."""
        ...

    def predict(self, X: Any) -> tuple[Any, Any]:
        """Predictions for the rows of ``X``."""
        ...


def mse(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean squared error, in squared units of the target."""
    y, prediction = _aligned(y_true=y_true, y_pred=y_pred)
    return float(np.mean((y - prediction) ** 2))


def rmse(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Root of the mean squared error over all rows and outputs, in units of the target."""
    return math.sqrt(mse(y_true, y_pred))


def mae(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean absolute error, in units of the target."""
    y, prediction = _aligned(y_true=y_true, y_pred=y_pred)
    return float(np.mean(np.abs(y - prediction)))


def r2(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Share of the target's variance explained, at most 1; the plain average over outputs.

    A constant output (a single row among them) has no variance to explain and raises ``DataError``.
    """
    y, prediction = _aligned(y_true=y_true, y_pred=y_pred)
    if (np.ptp(y, axis=0) == 0).any():
        raise DataError("y_true is constant, so R2 is undefined. Use rmse or mae, or score more rows.")
    residual = np.sum((y - prediction) ** 2, axis=0)
    return float(np.mean(1 - residual / np.sum((y - y.mean(axis=0)) ** 2, axis=0)))


def nlpd(y_true: ArrayLike, mean: ArrayLike, var: ArrayLike) -> float:
    """Mean negative log predictive density of a Gaussian, in nats per entry of ``y_true``.

    ``log(2 pi var) / 2 + (y - mean)^2 / (2 var)``. Lower is better. It is a density:
    a target in other units, ``c * y``, shifts it by ``log(c)``. ``var`` is the whole
    predictive variance, noise included.
    """
    errors, var = _gaussian(y_true, mean, var)
    return float(0.5 * np.mean(math.log(2 * math.pi) + np.log(var) + errors**2 / var))


def crps(y_true: ArrayLike, mean: ArrayLike, var: ArrayLike) -> float:
    """Mean continuous ranked probability score of a Gaussian, in units of the target.

    The integral of ``(F(x) - [y <= x])^2`` over ``x``, in closed form. Lower is better;
    it is the absolute error as ``var`` goes to zero and punishes a miss less than ``nlpd``.

    References
    ----------
    Gneiting & Raftery, "Strictly proper scoring rules, prediction, and estimation",
    JASA 2007, doi:10.1198/016214506000001437.
    """
    from scipy.special import ndtr

    errors, var = _gaussian(y_true, mean, var)
    std = np.sqrt(var)
    z = errors / std
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return float(np.mean(std * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))))


def crps_from_draws(y_true: ArrayLike, draws: ArrayLike) -> float:
    """Mean continuous ranked probability score of predictive draws, in units of the target.

    Exact for the empirical distribution of the ``m`` draws. As an estimate for the
    distribution they come from it is high by half its mean absolute difference over
    ``m`` (0.56 std / m for a Gaussian).

    Parameters
    ----------
    y_true : shape (n,) or (n, d).
    draws : shape (m, n) or (m, n, d), draws of the target itself, noise included; chains joined.

    Notes
    -----
    Draws are sorted once: O(n m log m) time, no m-by-m differences.
    """
    y, x = _as_floats("y_true", y_true), _as_floats("draws", draws, ("draw", "row", "column"))
    if x.shape[1:] != y.shape:
        raise DataError(
            f"draws has shape {x.shape} but y_true has shape {y.shape}; draws needs shape (m, *y_true.shape). "
            "Join chains with draws.reshape(-1, *y_true.shape); put the draws first with np.moveaxis."
        )
    m = len(x)
    errors = x - y
    errors.sort(axis=0)
    # Half the mean of |x_i - x_j| over all pairs is a weighted sum of the sorted draws.
    weights = (2 * np.arange(1, m + 1) - m - 1) / m**2
    return float(np.mean(np.abs(errors)) - np.mean(np.tensordot(weights, errors, axes=1)))


def coverage(y_true: ArrayLike, mean: ArrayLike, var: ArrayLike, level: float = 0.95) -> float:
    """Share of targets inside the central Gaussian interval of probability ``level``, ends included."""
    return float(calibration_curve(y_true, mean, var, [level]).observed[0])


def calibration_curve(
    y_true: ArrayLike, mean: ArrayLike, var: ArrayLike, levels: ArrayLike | None = None
) -> CalibrationCurve:
    """The share of targets inside the central Gaussian interval of each of ``levels``.

    Calibrated predictions lie on the diagonal, overconfident ones below it.
    ``levels`` has shape (k,); by default 0.05, 0.10 … 0.95. Costs one sort of ``n`` entries.
    """
    errors, var = _gaussian(y_true, mean, var)
    nominal = np.linspace(0.05, 0.95, 19) if levels is None else _as_levels(levels, ndim=1)
    distance = np.sort(np.abs(errors) / np.sqrt(var), axis=None)
    num_inside = np.searchsorted(distance, _half_width(nominal), side="right")
    return CalibrationCurve(nominal, num_inside / errors.size)


def gaussian_interval(mean: ArrayLike, var: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of the central Gaussian interval of probability ``level``, shaped like ``mean``."""
    mean, var = _aligned(mean=mean, var=var)
    _check_var(var)
    margin = _half_width(_as_levels(level)) * np.sqrt(var)
    return mean - margin, mean + margin


def interval_coverage(y_true: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """Share of targets with ``lower <= y <= upper``."""
    y, lower, upper = _aligned(y_true=y_true, lower=lower, upper=upper)
    _check_bounds(lower, upper)
    return float(np.mean((lower <= y) & (y <= upper)))


def interval_width(lower: ArrayLike, upper: ArrayLike) -> float:
    """Mean of ``upper - lower``, in units of the target."""
    lower, upper = _aligned(lower=lower, upper=upper)
    _check_bounds(lower, upper)
    return float(np.mean(upper - lower))


def interval_score(y_true: ArrayLike, lower: ArrayLike, upper: ArrayLike, level: float) -> float:
    """Mean interval (Winkler) score of central intervals of probability ``level``, in units of the target.

    Width plus ``2 / (1 - level)`` times the distance by which the target lies outside. Lower is
    better; in expectation least at the ``(1 - level) / 2`` and ``(1 + level) / 2`` quantiles.

    References
    ----------
    Gneiting & Raftery, JASA 2007, section 6.2, doi:10.1198/016214506000001437.
    """
    y, lower, upper = _aligned(y_true=y_true, lower=lower, upper=upper)
    _check_bounds(lower, upper)
    outside = np.maximum(lower - y, 0) + np.maximum(y - upper, 0)
    return float(np.mean(upper - lower + 2 / (1 - _as_levels(level)) * outside))


def accuracy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Share of rows whose most probable class is the label; of equally probable classes the first counts."""
    y, p = _as_classes(labels, probabilities)
    return float(np.mean(p.argmax(axis=1) == y))


def nll(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean negative log probability of the label (log loss, cross-entropy), in nats per row.

    As in scikit-learn, a probability below 2.2e-16 counts as 2.2e-16: a label
    held to be impossible costs 36 nats rather than infinity.
    """
    y, p = _as_classes(labels, probabilities)
    return float(np.mean(-np.log(np.maximum(p[np.arange(len(y)), y], _SMALLEST_PROBABILITY))))


log_loss = nll


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean over rows of ``sum_k (p_k - [label = k])^2``, from 0 (certain and right) to 2 (certain and wrong).

    The sum runs over all classes, as Brier defined it; for two classes it is
    twice the score that looks at the positive class alone.

    References
    ----------
    Brier, "Verification of forecasts expressed in terms of probability", Mon. Weather Rev. 1950.
    """
    y, p = _as_classes(labels, probabilities)
    p[np.arange(len(y)), y] -= 1
    return float(np.mean(np.sum(p**2, axis=1)))


def reliability_curve(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> ReliabilityCurve:
    """Accuracy against confidence, the probability of the most probable class.

    Confidences fall into ``num_bins`` equally wide bins ``(a, b]`` on [0, 1];
    a bin without rows is left out of the result.
    """
    if isinstance(num_bins, bool) or not isinstance(num_bins, int | np.integer) or num_bins < 1:
        raise OptionError(f"num_bins={num_bins!r} is not a positive whole number. The usual choice is 15.")
    y, p = _as_classes(labels, probabilities)
    inner_edges = np.linspace(0, 1, int(num_bins) + 1)[1:-1]
    bins = np.digitize(p.max(axis=1), inner_edges, right=True)
    counts = np.bincount(bins)
    used = counts > 0
    confidence = np.bincount(bins, weights=p.max(axis=1))[used] / counts[used]
    hits = np.bincount(bins, weights=p.argmax(axis=1) == y)[used]
    return ReliabilityCurve(confidence, hits / counts[used], counts[used])


def ece(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> float:
    """Expected calibration error: mean over rows of their bin's ``|accuracy - confidence|``, from 0 to 1.

    Bins are those of ``reliability_curve``. With few rows per bin it is above zero
    even for calibrated probabilities.

    References
    ----------
    Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    curve = reliability_curve(labels, probabilities, num_bins)
    return float(np.average(np.abs(curve.accuracy - curve.confidence), weights=curve.counts))


def entropy(probabilities: ArrayLike) -> float:
    """Mean entropy of the rows of ``probabilities``, in nats: what a classifier says of its own uncertainty."""
    p = _as_probabilities(probabilities)
    return float(np.mean(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)))


def summary(model: Predictor, X: Any, y: ArrayLike, level: float = 0.95) -> Scores:
    """The usual scores of a fitted model on the rows of ``X``.

    Parameters
    ----------
    model : anything with ``is_regression`` and ``predict``. Intervals are those of its
        ``predict_interval(X, level)`` if it has one, else Gaussian.
    X : inputs, as ``model.predict`` takes them.
    y : targets in the shape of the predictions, or class labels of shape (n,).
    level : probability of the intervals behind ``coverage`` and ``interval_width`` (regression only).

    Returns
    -------
    For regression ``rmse``, ``mae``, ``r2`` (NaN where the target is constant), ``nlpd``, ``crps``, ``coverage``,
    ``coverage_50`` and ``interval_width``, over all entries as the functions of these names give them, and
    ``by_output`` for each column of a target of shape (n, d). For classification ``accuracy``, ``nll``, ``brier``,
    ``ece`` and ``entropy``.
    """
    if not model.is_regression:
        probabilities, _ = model.predict(X)
        scores = {metric.__name__: metric(y, probabilities) for metric in (accuracy, nll, brier, ece)}
        return Scores({**scores, "entropy": entropy(probabilities)})
    mean, var = model.predict(X)
    own = getattr(model, "predict_interval", None)
    bounds = [gaussian_interval(mean, var, p) if own is None else own(X, p) for p in (level, 0.5)]
    y, *arrays = _aligned(y=y, mean=mean, var=var, lower=bounds[0][0], upper=bounds[0][1],
                          lower_50=bounds[1][0], upper_50=bounds[1][1])  # fmt: skip
    overall = _regression_scores(y, *arrays)
    if y.ndim == 1:
        return Scores(overall)
    columns = [_regression_scores(*(array[:, j] for array in (y, *arrays))) for j in range(y.shape[1])]
    return Scores(overall, {name: np.array([column[name] for column in columns]) for name in overall})


def _regression_scores(
    y: np.ndarray, mean: np.ndarray, var: np.ndarray,
    lower: np.ndarray, upper: np.ndarray, lower_50: np.ndarray, upper_50: np.ndarray,
) -> dict[str, float]:  # fmt: skip
    return {
        "rmse": rmse(y, mean),
        "mae": mae(y, mean),
        "r2": math.nan if (np.ptp(y, axis=0) == 0).any() else r2(y, mean),
        "nlpd": nlpd(y, mean, var),
        "crps": crps(y, mean, var),
        "coverage": interval_coverage(y, lower, upper),
        "coverage_50": interval_coverage(y, lower_50, upper_50),
        "interval_width": interval_width(lower, upper),
    }
