"""Plots of class probabilities: reliability, confidence, and whether uncertainty finds the wrong predictions.

They are part of ``plots``, which says what they take.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from . import errors, metrics
from ._drawing import BLUE, ORANGE, legend, new_axes, one_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _classified(labels: Any, probabilities: Any, third: Any = None) -> tuple[Any, Any, Any]:
    """Labels, probabilities and uncertainty, as given or from ``(model, X, y)``."""
    if not hasattr(labels, "predict"):
        return labels, probabilities, third
    model, X, y = labels, probabilities, third
    if model.is_regression:
        raise errors.OptionError("this plot is for classes and the model predicts numbers. Use plots.calibration.")
    if y is None:
        raise errors.DataError("a model needs inputs and labels: give (model, X, y).")
    return y, *model.predict(X)


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
        ax.hist(groups, bins, stacked=True, color=[BLUE, ORANGE], label=labels, edgecolor="white", linewidth=0.5)
        return
    for group, colour, label in zip(groups, (BLUE, ORANGE), labels, strict=True):
        weights = np.full(len(group), 1 / max(len(group), 1))
        ax.hist(group, bins, weights=weights, color=colour, alpha=0.55, label=label, edgecolor="white", linewidth=0.5)


def reliability(
    labels: Any, probabilities: ArrayLike, y: ArrayLike | None = None, *, num_bins: int = 15, ax: "Axes | None" = None
) -> "Axes":
    """Accuracy against confidence, the probability of the most probable class, in bins of confidence.

    On the diagonal the probabilities are right; below it the classifier is
    overconfident. Error bars are one binomial standard error (of the add-one
    estimate, so that a bin of few rows does not look certain); numbers say how
    many rows a bin holds.

    Parameters
    ----------
    labels, probabilities : shapes (n,), in ``0..C-1``, and (n, C); or a fitted model and X, with y.
    y : labels, shape (n,), where the first two are a model and X.
    num_bins : number of equally wide bins on [0, 1].
    ax : axes to draw into.
    """
    labels, probabilities, _ = _classified(labels, probabilities, y)
    curve = metrics.reliability_curve(labels, probabilities, num_bins)
    ece = metrics.ece(labels, probabilities, num_bins)
    ax = new_axes(ax, square=True)
    smoothed = (curve.accuracy * curve.counts + 1) / (curve.counts + 2)
    margin = np.sqrt(smoothed * (1 - smoothed) / (curve.counts + 2))
    bars = [np.minimum(margin, curve.accuracy), np.minimum(margin, 1 - curve.accuracy)]
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle="--", label="calibrated")
    ax.errorbar(
        curve.confidence, curve.accuracy, yerr=bars, color=BLUE, marker="o", markersize=5, capsize=3, linewidth=1.2,
        ecolor=(*_rgb(BLUE), 0.45), label="this model",
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
    legend(ax, "upper left")
    return ax


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def confidence_histogram(
    labels: Any, probabilities: ArrayLike, y: ArrayLike | None = None, *, num_bins: int = 20, ax: "Axes | None" = None
) -> "Axes":
    """How many rows are predicted with which confidence, right and wrong ones stacked.

    Parameters
    ----------
    labels, probabilities : shapes (n,), in ``0..C-1``, and (n, C); or a fitted model and X, with y.
    y : labels, shape (n,), where the first two are a model and X.
    num_bins : number of equally wide bins between chance, 1 / C, and 1.
    ax : axes to draw into.
    """
    labels, probabilities, _ = _classified(labels, probabilities, y)
    confidence, right = _top_class(labels, probabilities)
    ax = new_axes(ax, square=False)
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
    legend(ax, "upper left")
    return ax


def uncertainty_histogram(
    labels: Any,
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
    labels, probabilities : shapes (n,), in ``0..C-1``, and (n, C).
    uncertainty : shape (n,): entropy, mutual information or any other score. Or the three are a fitted model, X and y.
    num_bins : number of equally wide bins.
    name : what the uncertainty is, for the axis label.
    ax : axes to draw into.
    """
    labels, probabilities, uncertainty = _classified(labels, probabilities, uncertainty)
    _, right = _top_class(labels, probabilities)
    right_as_float, values = one_output(labels=right, uncertainty=uncertainty)
    if not np.isfinite(values).all():
        raise errors.DataError("uncertainty has non-finite values. Leave out such rows.")
    ax = new_axes(ax, square=False)
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
    legend(ax, "upper right")
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
