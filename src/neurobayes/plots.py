"""Plots of predictions against what was measured: accuracy, calibration, and whether uncertainty finds the errors.

Every function draws into the Matplotlib axes ``ax``, or into those of a new
figure, and returns the axes: ``plots.parity(model, X_test, y_test).figure.savefig("parity.png")``.
Arguments are a fitted model with inputs and targets, or predictions as in ``metrics``:
``(y_true, mean, var)`` of shape (n,) or (n, 1), or ``(labels, probabilities)`` of shapes
(n,) and (n, C). A model that has ``predict_interval`` is judged by its own intervals,
everything else by Gaussian ones. Pyplot is not used, so no global state and no backend is
touched. ``partition`` and ``partition_comparison`` show which weights are Bayesian, and
which should be; they return a whole figure.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from . import _checks, errors, metrics
from ._drawing import BLUE as _BLUE
from ._drawing import GREY as _GREY
from ._drawing import ORANGE as _ORANGE
from ._drawing import legend as _legend
from ._drawing import new_axes as _axes
from ._drawing import one_output as _one_output
from .classification_plots import confidence_histogram, reliability, uncertainty_histogram
from .partition_plots import partition, partition_comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "calibration", "confidence_histogram", "interval_width", "parity", "partition", "partition_comparison",
    "reliability", "uncertainty_histogram",
]  # fmt: skip

_Intervals: TypeAlias = Callable[[float], tuple[np.ndarray, np.ndarray]]

_MAX_POINTS = 2000  # more would hide each other and take seconds to draw


class _Predicted(NamedTuple):
    """One output: targets, means, the bounds of its central intervals, and the share inside at several levels."""

    y: np.ndarray
    mean: np.ndarray
    interval: _Intervals
    curve: Callable[[], metrics.CalibrationCurve]


def _predicted(y_true: Any, mean: Any, var: Any, output: int | None) -> _Predicted:
    """From ``(y_true, mean, var)`` or from ``(model, X, y)``."""
    own = None
    if hasattr(y_true, "predict"):
        model, X, y_true = y_true, mean, var
        if not model.is_regression:
            raise errors.OptionError("this plot is for numbers and the model predicts classes. Use plots.reliability.")
        mean, var = model.predict(X)
        predict_interval = getattr(model, "predict_interval", None)
        if predict_interval is not None:
            own = lambda level: [_column(bound, output) for bound in predict_interval(X, level)]  # noqa: E731
    chosen = {"y_true": y_true, "mean": mean, "var": var}
    y, mean, var = _one_output(**{name: _column(array, output) for name, array in chosen.items()})
    if own is None:
        return _Predicted(
            y, mean, lambda level: metrics.gaussian_interval(mean, var, level),
            lambda: metrics.calibration_curve(y, mean, var),
        )  # fmt: skip

    def interval(level: float) -> tuple[np.ndarray, np.ndarray]:
        low, high = own(level)
        low, high = _one_output(lower=low, upper=high)
        return low, high

    def curve() -> metrics.CalibrationCurve:
        levels = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])  # the model computes each anew
        return metrics.CalibrationCurve(levels, np.array([metrics.interval_coverage(y, *interval(p)) for p in levels]))

    return _Predicted(y, mean, interval, curve)


def _column(array: Any, output: int | None) -> Any:
    """Column ``output`` of an (n, d) array; one of shape (n,), which has output 0 only, is left as it is."""
    if output is None:
        return array
    array = np.asarray(array)
    count = array.shape[1] if array.ndim == 2 else 1
    if _checks.check_positive_int("output", output, minimum=0) >= count:
        there = f"there are {count}, counted from 0" if count > 1 else "there is one, so leave output out"
        raise errors.OptionError(f"output={output!r} does not exist: {there}.")
    return array[:, output] if array.ndim == 2 else array


def _with_unit(label: str, unit: str) -> str:
    return f"{label} [{unit}]" if unit else label


def _percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"


def _shown(n: int) -> tuple[np.ndarray, str]:
    """Positions of the rows to draw (the same random ones each time) and a phrase that says how many."""
    if n <= _MAX_POINTS:
        return np.arange(n), f"n = {n:,}"
    return np.random.default_rng(0).permutation(n)[:_MAX_POINTS], f"{_MAX_POINTS:,} of n = {n:,} shown"


def _padded_limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.04 * (high - low) or 1.0
    return low - pad, high + pad


def parity(
    y_true: Any,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    level: float = 0.95,
    output: int | None = None,
    name: str = "target",
    unit: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Predicted against measured, with the central ``level`` interval of each row as an error bar.

    Rows whose interval misses the diagonal are coloured apart.

    Parameters
    ----------
    y_true, mean, var : shape (n,) or (n, 1); or a fitted model, X and y.
    level : probability of the intervals.
    output : which column, where there are several outputs.
    name, unit : what the target is, for the axis labels.
    ax : axes to draw into.
    """
    y, mean, interval, _ = _predicted(y_true, mean, var, output)
    lower, upper = interval(level)
    covered = metrics.interval_coverage(y, lower, upper)
    rmse = metrics.rmse(y, mean)
    ax = _axes(ax, square=True)
    shown, count = _shown(len(y))
    inside = (lower <= y) & (y <= upper)
    limits = _padded_limits(np.concatenate([values[shown] for values in (y, lower, upper)]))
    ax.plot(limits, limits, color="0.4", linewidth=1, linestyle="--", zorder=1)
    for rows, colour, label in (
        (shown[inside[shown]], _BLUE, f"inside the {_percent(level)} interval ({_percent(covered)})"),
        (shown[~inside[shown]], _ORANGE, f"outside ({_percent(1 - covered)})"),
    ):
        ax.vlines(y[rows], lower[rows], upper[rows], color=colour, alpha=0.25, linewidth=1.2, zorder=2)
        ax.scatter(y[rows], mean[rows], s=16, color=colour, edgecolor="white", linewidth=0.4, zorder=3, label=label)
    ax.set(
        xlim=limits,
        ylim=limits,
        aspect="equal",
        xlabel=_with_unit(f"measured {name}", unit),
        ylabel=_with_unit(f"predicted {name}", unit),
        title=f"Predicted against measured ({count}, RMSE {rmse:.3g})",
    )
    _legend(ax, "upper left")
    return ax


def calibration(
    y_true: Any, mean: ArrayLike, var: ArrayLike, *, output: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Share of targets inside the central intervals against the probability the intervals promise.

    On the diagonal the intervals are right; below it they are too narrow. The
    band holds the curve of calibrated predictions on 95 % of data sets, level by
    level (normal approximation of the binomial).

    Parameters
    ----------
    y_true, mean, var : shape (n,) or (n, 1); or a fitted model, X and y.
    output : which column, where there are several outputs.
    ax : axes to draw into.
    """
    predicted = _predicted(y_true, mean, var, output)
    y, curve = predicted.y, predicted.curve()
    ax = _axes(ax, square=True)
    level = np.linspace(0, 1, 101)
    margin = 1.96 * np.sqrt(level * (1 - level) / len(y))
    ax.fill_between(
        level,
        np.clip(level - margin, 0, 1),
        np.clip(level + margin, 0, 1),
        color=_GREY,
        alpha=0.2,
        linewidth=0,
        label="expected by chance (95 %)",
    )
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle="--", label="calibrated")
    ax.plot([0, *curve.levels, 1], [0, *curve.observed, 1], color=_BLUE, marker="o", markersize=4, label="this model")
    ax.text(0.97, 0.03, "below the diagonal:\nintervals too narrow", ha="right", va="bottom", color="0.4", fontsize=9)
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
        xlabel="expected coverage",
        ylabel="observed coverage",
        title=f"Calibration of the intervals (n = {len(y):,})",
    )
    _legend(ax, "upper left")
    return ax


def interval_width(
    y_true: Any,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    level: float = 0.95,
    output: int | None = None,
    name: str = "target",
    unit: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Absolute error against the width of the central ``level`` interval.

    Shows whether wide intervals find the errors. Rows above the line ``error = width / 2`` lie outside their interval.

    Parameters
    ----------
    y_true, mean, var : shape (n,) or (n, 1); or a fitted model, X and y.
    level : probability of the intervals.
    output : which column, where there are several outputs.
    name, unit : what the target is, for the axis labels.
    ax : axes to draw into.
    """
    y, mean, interval, _ = _predicted(y_true, mean, var, output)
    lower, upper = interval(level)
    width, error = upper - lower, np.abs(y - mean)
    ax = _axes(ax, square=False)
    shown, count = _shown(len(y))
    missed = (y < lower) | (upper < y)
    outside, inside = shown[missed[shown]], shown[~missed[shown]]
    middle = float(np.median(width))
    # Widths that hardly differ are shown as such, instead of spread over the whole axis.
    xlim = _padded_limits(np.concatenate([width[shown], [0.9 * middle, 1.1 * middle]]))
    edge = np.array([max(xlim[0], 0.0), xlim[1]])
    ax.plot(edge, edge / 2, color="0.4", linewidth=1, linestyle="--", label="edge of the interval")
    style = {"s": 20, "alpha": 0.8, "edgecolor": "white", "linewidth": 0.4}
    ax.scatter(width[inside], error[inside], color=_BLUE, label="inside", **style)
    ax.scatter(width[outside], error[outside], color=_ORANGE, label="outside", **style)
    ax.set(
        xlim=xlim,
        ylim=(0, 1.25 * max(float(error[shown].max()), edge[1] / 2)),
        xlabel=_with_unit(f"width of the {_percent(level)} interval, {name}", unit),
        ylabel=_with_unit("absolute error", unit),
        title=f"Interval width against error ({count})",
    )
    ax.legend(loc="upper left", ncols=3, frameon=False, fontsize="small")
    return ax
