"""Plots of predictions against what was measured: accuracy, calibration, and whether uncertainty finds the errors.

Every function draws into the Matplotlib axes ``ax``, or into those of a new
figure, and returns the axes: ``plots.parity(y, mean, var).figure.savefig("parity.png")``.
Arguments are as in ``metrics``: ``(y_true, mean, var)`` of shape (n,) or (n, 1),
or ``(labels, probabilities)`` of shapes (n,) and (n, C). Pyplot is not used, so
no global state and no backend is touched. ``partition`` and ``partition_comparison``
show which weights are Bayesian, and which should be; they return a whole figure.
"""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from . import errors, metrics
from ._drawing import BLUE as _BLUE
from ._drawing import GREY as _GREY
from ._drawing import ORANGE as _ORANGE
from ._drawing import light_grid, new_figure
from .partition_plots import partition, partition_comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "calibration", "confidence_histogram", "interval_width", "parity", "partition", "partition_comparison",
    "reliability", "uncertainty_histogram",
]  # fmt: skip

_MAX_POINTS = 2000  # more would hide each other and take seconds to draw


def _axes(ax: "Axes | None", *, square: bool) -> "Axes":
    """``ax``, or the axes of a new figure, with a light grid and two spines."""
    if ax is None:
        ax = new_figure(*((5.0, 5.0) if square else (6.0, 4.2))).subplots()
    light_grid(ax)
    return ax


def _one_output(**arrays: Any) -> list[np.ndarray]:
    """The arrays as float64 of one shape (n,)."""
    checked = []
    for name, array in arrays.items():
        values = np.asarray(array, np.float64)
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise errors.DataError(f"{name} has shape {values.shape}. Plot one output at a time: {name}[:, j].")
        if checked and len(values) != len(checked[0]):
            raise errors.DataError(f"{name} has {len(values)} rows but {next(iter(arrays))} has {len(checked[0])}.")
        checked.append(values)
    return checked


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


def _legend(ax: "Axes", location: Literal["upper left", "upper right"]) -> None:
    ax.legend(loc=location, frameon=True, framealpha=0.9, edgecolor="none", fontsize="small")


# Regression


def parity(
    y_true: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    level: float = 0.95,
    name: str = "target",
    unit: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Predicted against measured, with the central ``level`` interval of each row as an error bar.

    Rows whose interval misses the diagonal are coloured apart.

    Parameters
    ----------
    y_true, mean, var : shape (n,) or (n, 1).
    level : probability of the intervals.
    name, unit : what the target is, for the axis labels.
    ax : axes to draw into.
    """
    y, mean, var = _one_output(y_true=y_true, mean=mean, var=var)
    lower, upper = metrics.gaussian_interval(mean, var, level)
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


def calibration(y_true: ArrayLike, mean: ArrayLike, var: ArrayLike, *, ax: "Axes | None" = None) -> "Axes":
    """Share of targets inside the central intervals against the probability the intervals promise.

    On the diagonal the intervals are right; below it they are too narrow. The
    band holds the curve of calibrated predictions on 95 % of data sets, level by
    level (normal approximation of the binomial).

    Parameters
    ----------
    y_true, mean, var : shape (n,) or (n, 1).
    ax : axes to draw into.
    """
    y, mean, var = _one_output(y_true=y_true, mean=mean, var=var)
    curve = metrics.calibration_curve(y, mean, var)
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
    y_true: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    level: float = 0.95,
    name: str = "target",
    unit: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Absolute error against the width of the central ``level`` interval.

    Shows whether wide intervals find the errors. Rows above the line ``error = width / 2`` lie outside their interval.

    Parameters
    ----------
    y_true, mean, var : shape (n,) or (n, 1).
    level : probability of the intervals.
    name, unit : what the target is, for the axis labels.
    ax : axes to draw into.
    """
    y, mean, var = _one_output(y_true=y_true, mean=mean, var=var)
    lower, upper = metrics.gaussian_interval(mean, var, level)
    width, error = upper - lower, np.abs(y - mean)
    ax = _axes(ax, square=False)
    shown, count = _shown(len(y))
    outside = shown[error[shown] > width[shown] / 2]
    inside = np.setdiff1d(shown, outside)
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


# Classification


def _top_class(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the most probable class, and whether that class is right, both (n,)."""
    metrics.accuracy(labels, probabilities)  # checks both
    probabilities = np.asarray(probabilities, np.float64)
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == np.asarray(labels)


def _right_and_wrong(ax: "Axes", values: np.ndarray, right: np.ndarray, bins: list[float], *, shares: bool) -> None:
    """Histograms of ``values`` of the right and of the wrong predictions, as shares of each or as stacked counts."""
    groups = [values[right], values[~right]]
    labels = [f"right ({len(groups[0]):,})", f"wrong ({len(groups[1]):,})"]
    if not shares:
        ax.hist(groups, bins, stacked=True, color=[_BLUE, _ORANGE], label=labels, edgecolor="white", linewidth=0.5)
        return
    for group, colour, label in zip(groups, (_BLUE, _ORANGE), labels, strict=True):
        weights = np.full(len(group), 1 / max(len(group), 1))
        ax.hist(group, bins, weights=weights, color=colour, alpha=0.55, label=label, edgecolor="white", linewidth=0.5)


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 15, ax: "Axes | None" = None) -> "Axes":
    """Accuracy against confidence, the probability of the most probable class, in bins of confidence.

    On the diagonal the probabilities are right; below it the classifier is
    overconfident. Error bars are one binomial standard error (of the add-one
    estimate, so that a bin of few rows does not look certain); numbers say how
    many rows a bin holds.

    Parameters
    ----------
    labels : shape (n,), in ``0..C-1``.
    probabilities : shape (n, C).
    num_bins : number of equally wide bins on [0, 1].
    ax : axes to draw into.
    """
    curve = metrics.reliability_curve(labels, probabilities, num_bins)
    ece = metrics.ece(labels, probabilities, num_bins)
    ax = _axes(ax, square=True)
    smoothed = (curve.accuracy * curve.counts + 1) / (curve.counts + 2)
    margin = np.sqrt(smoothed * (1 - smoothed) / (curve.counts + 2))
    bars = [np.minimum(margin, curve.accuracy), np.minimum(margin, 1 - curve.accuracy)]
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle="--", label="calibrated")
    ax.errorbar(
        curve.confidence, curve.accuracy, yerr=bars, color=_BLUE, marker="o", markersize=5, capsize=3, linewidth=1.2,
        ecolor=(*_rgb(_BLUE), 0.45), label="this model",
    )  # fmt: skip
    for x, y, count in zip(curve.confidence, curve.accuracy, curve.counts, strict=True):
        ax.annotate(
            f"{count:,}", (x, y), xytext=(6, -12), textcoords="offset points", ha="left", fontsize=8, color="0.35"
        )
    ax.text(0.97, 0.03, "below the diagonal:\noverconfident", ha="right", va="bottom", color="0.4", fontsize=9)
    ax.set(
        xlim=(0, 1.06),
        ylim=(-0.05, 1.06),
        aspect="equal",
        xlabel="confidence",
        ylabel="accuracy",
        title=f"Reliability (n = {int(curve.counts.sum()):,}, ECE {ece:.3f})",
    )
    _legend(ax, "upper left")
    return ax


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def confidence_histogram(
    labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 20, ax: "Axes | None" = None
) -> "Axes":
    """How many rows are predicted with which confidence, right and wrong ones stacked.

    Parameters
    ----------
    labels : shape (n,), in ``0..C-1``.
    probabilities : shape (n, C).
    num_bins : number of equally wide bins between chance, 1 / C, and 1.
    ax : axes to draw into.
    """
    confidence, right = _top_class(labels, probabilities)
    ax = _axes(ax, square=False)
    chance = 1 / np.asarray(probabilities).shape[1]
    _right_and_wrong(ax, confidence, right, np.linspace(chance, 1 + 1e-6, num_bins + 1).tolist(), shares=False)
    for value, style, label in (
        (confidence.mean(), "-", f"mean confidence {confidence.mean():.3f}"),
        (right.mean(), ":", f"accuracy {right.mean():.3f}"),
    ):
        ax.axvline(value, color="0.25", linestyle=style, linewidth=1.4, label=label)
    ax.set(
        xlim=(chance, 1.005),
        xlabel="confidence (probability of the predicted class)",
        ylabel="number of rows",
        title=f"Confidence (n = {len(right):,})",
    )
    _legend(ax, "upper left")
    return ax


def uncertainty_histogram(
    labels: ArrayLike,
    probabilities: ArrayLike,
    uncertainty: ArrayLike,
    *,
    num_bins: int = 20,
    name: str = "uncertainty",
    ax: "Axes | None" = None,
) -> "Axes":
    """Uncertainty of right predictions and of wrong ones, each as shares that add up to 1.

    The better the uncertainty, the less the two overlap; the title gives the
    probability that a wrong prediction is the more uncertain of a random pair (AUROC).

    Parameters
    ----------
    labels : shape (n,), in ``0..C-1``.
    probabilities : shape (n, C).
    uncertainty : shape (n,): entropy, mutual information or any other score.
    num_bins : number of equally wide bins.
    name : what the uncertainty is, for the axis label.
    ax : axes to draw into.
    """
    _, right = _top_class(labels, probabilities)
    right_as_float, values = _one_output(labels=right, uncertainty=uncertainty)
    if not np.isfinite(values).all():
        raise errors.DataError("uncertainty has non-finite values. Leave out such rows.")
    ax = _axes(ax, square=False)
    top = float(values.max()) or 1.0
    bins = np.linspace(min(0.0, float(values.min())), top, num_bins + 1).tolist()
    _right_and_wrong(ax, values, right, bins, shares=True)
    score = _auroc(values, right_as_float == 0)
    found = "" if score is None else f", AUROC {score:.2f}"
    ax.set(
        xlabel=name,
        ylabel="share of predictions",
        title=f"Uncertainty, right and wrong (n = {len(right):,}{found})",
    )
    _legend(ax, "upper right")
    return ax


def _auroc(values: np.ndarray, positive: np.ndarray) -> float | None:
    """Probability that a positive has the larger value of a random pair, ties counting one half."""
    num_pairs = int(positive.sum()) * int((~positive).sum())
    if num_pairs == 0:
        return None
    negatives = np.sort(values[~positive])
    below = np.searchsorted(negatives, values[positive], side="left")
    up_to = np.searchsorted(negatives, values[positive], side="right")
    return float((below + up_to).sum() / (2 * num_pairs))
