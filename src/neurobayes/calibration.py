"""Corrections of predictions by rows that the model was not fitted to.

``fit_calibration`` learns one from targets and what was predicted for them. A
correction is a small immutable object that knows no model, can be pickled, and
says what it changes: variances, quantiles, intervals or class probabilities.
What it does not change it refuses with an ``OptionError``, so that nothing is
taken for corrected that is not. Several outputs are corrected one by one.

Arrays are as in ``metrics``: ``y``, ``mean`` and ``var`` have one shape, ``(n,)`` or
``(n, d)``; class probabilities have shape ``(n, C)``.
"""

import dataclasses
import math
import warnings
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ._quantile_functions import QuantileFunction, at_normal_scores, gaussian, normal_scores
from ._score_checks import aligned, as_classes, as_floats, as_levels, as_probabilities, check_var, errors_and_variances
from .errors import CalibrationWarning, DataError, OptionError, unknown_choice

FEWEST_ROWS = 20
"""With fewer rows a correction warns: its own error is then as large as most of what it corrects."""

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.05, 20.0


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """A correction of predictions; every method that does not apply raises ``OptionError``.

    Attributes
    ----------
    num_rows : rows it was learnt from.
    """

    method: ClassVar[str]
    changes: ClassVar[str]

    num_rows: int

    def mean(self, mean: ArrayLike, std: ArrayLike) -> np.ndarray:
        """The mean of the corrected distribution, where its mean is changed at all."""
        raise self._refusal("the mean")

    def variance(self, var: ArrayLike) -> np.ndarray:
        """Corrected predictive variances, shaped like ``var``."""
        raise self._refusal("the variance")

    def quantiles(
        self, levels: ArrayLike, mean: ArrayLike, std: ArrayLike, quantile_function: QuantileFunction | None = None
    ) -> np.ndarray:
        """Corrected quantiles, shape ``(k, *mean.shape)``.

        Parameters
        ----------
        levels : (k,) in (0, 1).
        mean, std : the prediction to be corrected.
        quantile_function : its quantiles; those of a Gaussian if left out.
        """
        raise self._refusal("quantiles")

    def interval(
        self,
        mean: ArrayLike,
        std: ArrayLike,
        level: float = 0.95,
        quantile_function: QuantileFunction | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of the corrected central interval of probability ``level``, shaped like ``mean``."""
        p = float(as_levels(level))
        low, high = self.quantiles([(1 - p) / 2, (1 + p) / 2], mean, std, quantile_function)
        return low, high

    def probabilities(self, probabilities: ArrayLike) -> np.ndarray:
        """Corrected class probabilities, rows summing to one."""
        raise self._refusal("class probabilities")

    def _refusal(self, what: str) -> OptionError:
        return OptionError(f"calibration by {self.method!r} does not change {what}, only {self.changes}.")

    def _prediction(self, mean: ArrayLike, std: ArrayLike, num_outputs: int) -> tuple[np.ndarray, np.ndarray]:
        mean, std = aligned(mean=mean, std=std)
        check_var(std)
        _check_outputs("mean", mean, num_outputs)
        return mean, std


@dataclasses.dataclass(frozen=True, eq=False)
class VarianceScaling(Calibration):
    """Multiplies the predictive variance by one factor for each output: the distribution is stretched about its mean.

    Attributes
    ----------
    factor : (d,) the maximum-likelihood factor of a Gaussian, the mean of ``(y - mean)^2 / var``. Above one the
        model was over-confident.
    """

    method = "variance"
    changes = "the spread: variances, quantiles and intervals"

    factor: np.ndarray

    def variance(self, var: ArrayLike) -> np.ndarray:
        return _scaled(var, self.factor)

    def quantiles(
        self, levels: ArrayLike, mean: ArrayLike, std: ArrayLike, quantile_function: QuantileFunction | None = None
    ) -> np.ndarray:
        mean, std = self._prediction(mean, std, len(self.factor))
        p = as_levels(levels, ndim=1)
        base = gaussian(mean, std) if quantile_function is None else quantile_function
        return mean + np.sqrt(self.factor) * (base(p) - mean)


@dataclasses.dataclass(frozen=True, eq=False)
class IsotonicQuantiles(Calibration):
    """Maps the level of every quantile by the share of calibration rows that were found below it.

    In place of the model's distribution function ``F`` stands ``R(F)`` with ``R`` non-decreasing (Kuleshov et al.
    2018). ``R`` is kept in normal scores, ``z = Phi^-1(F(y))``, where the tails of an over-confident model have not
    yet run into 0 or 1. Between the scores of two calibration rows it is a straight line; beyond the outermost, where
    the rows say nothing, it goes on as a Gaussian with the spread of the scores. Mean and variance follow from the
    errors themselves: the scores of a model far from Gaussian are no multiples of its standard deviation.

    Attributes
    ----------
    shift : (d,) mean of ``(y - mean) / std``, 0 for a calibrated model.
    factor : (d,) variance of ``(y - mean) / std``, 1 for a calibrated model.
    spread : (d,) standard deviation of the scores, 1 for a calibrated model.
    knots : for each output the pair (levels, scores) that the map goes through.
    """

    method = "isotonic"
    changes = "the whole distribution of a numeric target: mean, variances, quantiles and intervals"

    shift: np.ndarray
    factor: np.ndarray
    spread: np.ndarray
    knots: tuple[tuple[np.ndarray, np.ndarray], ...] = dataclasses.field(repr=False)

    def mean(self, mean: ArrayLike, std: ArrayLike) -> np.ndarray:
        """Mean of the corrected distribution: the model's own, moved by the mean error in standard deviations."""
        mean, std = self._prediction(mean, std, len(self.shift))
        return mean + self.shift * std

    def variance(self, var: ArrayLike) -> np.ndarray:
        return _scaled(var, self.factor)

    def quantiles(
        self, levels: ArrayLike, mean: ArrayLike, std: ArrayLike, quantile_function: QuantileFunction | None = None
    ) -> np.ndarray:
        mean, std = self._prediction(mean, std, len(self.shift))
        scores = self.scores(as_levels(levels, ndim=1))
        if quantile_function is None:
            return mean + std * (scores[:, :1] if mean.ndim == 1 else scores[:, None, :])
        return at_normal_scores(scores, quantile_function)

    def scores(self, levels: np.ndarray) -> np.ndarray:
        """Normal scores of the model's quantiles that stand at ``levels``, shape ``(k, d)``."""
        from scipy.special import ndtri

        columns = []
        for (known, scores), spread in zip(self.knots, self.spread, strict=True):
            inside = np.interp(levels, known, scores)
            beyond = ndtri(levels) - ndtri(np.clip(levels, known[0], known[-1]))
            columns.append(inside + spread * beyond)
        return np.stack(columns, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class ConformalIntervals(Calibration):
    """Split conformal intervals: mean ± a multiple of the model's standard deviation.

    The multiple for a level is the ``ceil((n + 1) * level)``-th smallest of the ``n`` calibration rows'
    ``|y - mean| / std``. If these rows and a new one are exchangeable, the interval contains the new target with
    probability ``level`` at least, and at most ``level + 1 / (n + 1)`` without ties, whatever the model is worth.

    Attributes
    ----------
    residuals : (n, d) the scaled residuals, sorted.
    """

    method = "conformal"
    changes = "intervals"

    residuals: np.ndarray = dataclasses.field(repr=False)

    def multiplier(self, level: float = 0.95) -> np.ndarray:
        """Half the width of the interval in predictive standard deviations, shape ``(d,)``.

        Raises
        ------
        OptionError
            No finite interval of this level can be promised with so few rows.
        """
        p, n = float(as_levels(level)), self.num_rows
        rank = math.ceil((n + 1) * p - 1e-9)  # 0.55 * 100 is 55.00000000000001
        if rank > n:
            raise OptionError(
                f"level={p:g} needs at least {math.ceil(p / (1 - p) - 1e-9)} calibration rows and there are {n}: the "
                f"guaranteed interval would be infinite. Give more rows, or a level of at most {n / (n + 1):.3g}."
            )
        return self.residuals[rank - 1]

    def interval(
        self,
        mean: ArrayLike,
        std: ArrayLike,
        level: float = 0.95,
        quantile_function: QuantileFunction | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self._prediction(mean, std, self.residuals.shape[1])
        margin = self.multiplier(level) * std
        return mean - margin, mean + margin


@dataclasses.dataclass(frozen=True, eq=False)
class Temperature(Calibration):
    """Raises class probabilities to the power ``1 / temperature`` and renormalises them; the ranking stays.

    Attributes
    ----------
    temperature : the maximum-likelihood value; above one the model was over-confident.
    """

    method = "temperature"
    changes = "class probabilities"

    temperature: float

    def probabilities(self, probabilities: ArrayLike) -> np.ndarray:
        return np.exp(_tempered(_log(as_probabilities(probabilities)), self.temperature))


METHODS: dict[str, type[Calibration]] = {
    kind.method: kind for kind in (VarianceScaling, IsotonicQuantiles, ConformalIntervals, Temperature)
}


def check_method(method: Any, *, regression: bool | None = None) -> str:
    """``method`` if it is known and, where it is said which, fits the kind of target."""
    if method not in METHODS:
        raise unknown_choice("method", method, METHODS)
    if regression is not None and regression == (method == "temperature"):
        kind, other = ("numbers", "classes") if regression else ("classes", "numbers")
        choices = ", ".join(repr(name) for name in METHODS if (name == "temperature") != regression)
        raise OptionError(f"method={method!r} is for {other} and the targets are {kind}. Use {choices}.")
    return method


def fit_calibration(
    method: str,
    y: ArrayLike,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    *,
    probabilities: ArrayLike | None = None,
    quantile_function: QuantileFunction | None = None,
) -> Calibration:
    """Learn a correction from targets and the predictions for them.

    Parameters
    ----------
    method : ``"variance"``, ``"isotonic"`` or ``"conformal"`` for numbers, ``"temperature"`` for classes.
    y : targets (n,) or (n, d), or class labels (n,), of rows that the model was not fitted to.
    mean, var : predictions for numbers, shaped like ``y``; ``var`` includes the noise.
    probabilities : (n, C) predictions for classes.
    quantile_function : the quantiles of the predictions, where these are not Gaussian (``"isotonic"`` only).

    Raises
    ------
    DataError
        Arrays that do not belong together, or from which nothing can be learnt.
    OptionError
        The method is unknown, or what it needs is missing.

    Warns
    -----
    CalibrationWarning
        Fewer than 20 rows, or no temperature fits best.

    References
    ----------
    Kuleshov, Fenner & Ermon, "Accurate uncertainties for deep learning using calibrated regression", ICML 2018.
    Lei, G'Sell, Rinaldo, Tibshirani & Wasserman, "Distribution-free predictive inference for regression", JASA 2018.
    Guo, Pleiss, Sun & Weinberger, "On calibration of modern neural networks", ICML 2017.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = rng.normal(scale=3.0, size=400)  # the model believes in a standard deviation of 1
    >>> correction = fit_calibration("variance", y, mean=np.zeros(400), var=np.ones(400))
    >>> correction.factor.round(1)
    array([8.8])
    """
    check_method(method)
    if method == "temperature":
        if probabilities is None or mean is not None or var is not None:
            raise OptionError("method='temperature' learns from labels and probabilities=(n, C), without mean and var.")
        return _warned(_fit_temperature(y, probabilities))
    if mean is None or var is None or probabilities is not None:
        raise OptionError(f"method={method!r} learns from y, mean and var, without probabilities.")
    if quantile_function is not None and method != "isotonic":
        raise OptionError(f"method={method!r} looks at means and variances only; leave quantile_function out.")
    error, variances = errors_and_variances(y, mean, var)
    if error.ndim > 2:
        raise DataError(f"y has shape {error.shape}. Give (n,) or (n, d).")
    residuals = _columns(error / np.sqrt(variances))
    n = len(residuals)
    if method == "conformal":
        return _warned(ConformalIntervals(n, np.sort(np.abs(residuals), axis=0)))
    if method == "variance":
        factor = np.mean(residuals**2, axis=0)
        if not (factor > 0).all():
            raise DataError("every prediction of an output is exact, so its variance has no scale. Give other rows.")
        return _warned(VarianceScaling(n, factor))
    scores = residuals
    if quantile_function is not None:
        scores = normal_scores(_columns(as_floats("y", y)), quantile_function)
    return _warned(_fit_isotonic(residuals, scores))


def _warned(calibration: Calibration) -> Calibration:
    if calibration.num_rows < FEWEST_ROWS:
        warnings.warn(
            f"calibration by {calibration.method!r} has {calibration.num_rows} rows; with fewer than {FEWEST_ROWS} its "
            "own error is as large as most of what it corrects. Give more rows.",
            CalibrationWarning,
            stacklevel=3,
        )
    return calibration


def _fit_isotonic(residuals: np.ndarray, scores: np.ndarray) -> IsotonicQuantiles:
    """The map from levels to normal scores: the k-th smallest of ``n`` scores stands at ``k / (n + 1)``.

    ``residuals`` are the errors in predicted standard deviations: the scores, if the model were Gaussian.
    """
    from sklearn.isotonic import IsotonicRegression

    n = len(scores)
    if n < 2 or not (np.ptp(scores, axis=0) > 0).all():
        raise DataError("isotonic calibration needs at least two rows with different errors for each output.")
    knots = []
    for column in np.sort(scores, axis=0).T:
        fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit(column, np.arange(1, n + 1) / (n + 1))
        knots.append((fitted.y_thresholds_, fitted.X_thresholds_))
    return IsotonicQuantiles(
        n, residuals.mean(axis=0), residuals.var(axis=0, ddof=1), scores.std(axis=0, ddof=1), tuple(knots)
    )


def _fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> Temperature:
    from scipy.optimize import minimize_scalar

    y, p = as_classes(labels, probabilities)
    log_p, rows = _log(p), np.arange(len(y))

    def loss(log_temperature: float) -> float:
        return -float(np.mean(_tempered(log_p, math.exp(log_temperature))[rows, y]))

    low, high = math.log(LEAST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    best = float(found.x)  # pyright: ignore[reportAttributeAccessIssue]
    if loss(0.0) - loss(best) <= 1e-12:  # probabilities that are all equal fit at any temperature
        best = 0.0
    if min(best - low, high - best) < 1e-3:
        warnings.warn(
            f"no temperature between {LEAST_TEMPERATURE:g} and {LARGEST_TEMPERATURE:g} fits best: the likelihood rises "
            "to the end. The rows are all predicted rightly, or no better than by chance; give more rows.",
            CalibrationWarning,
            stacklevel=3,
        )
    return Temperature(len(y), math.exp(best))


def _log(p: np.ndarray) -> np.ndarray:
    """Logarithms, of the smallest number where a probability has underflowed."""
    return np.log(np.maximum(p, np.finfo(np.float64).tiny))


def _tempered(log_p: np.ndarray, temperature: float) -> np.ndarray:
    """Logarithms of ``p^(1 / temperature)``, renormalised."""
    from scipy.special import log_softmax

    return log_softmax(log_p / temperature, axis=1)


def _columns(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _scaled(var: ArrayLike, factor: np.ndarray) -> np.ndarray:
    """Variances times the factor ``(d,)`` of their output."""
    var = as_floats("var", var)
    _check_outputs("var", var, len(factor))
    return var * factor


def _check_outputs(name: str, array: np.ndarray, num_outputs: int) -> None:
    found = 1 if array.ndim == 1 else array.shape[-1]
    if array.ndim > 2 or found != num_outputs:
        raise DataError(f"{name} has shape {array.shape}, but the calibration rows had {num_outputs} output(s).")
