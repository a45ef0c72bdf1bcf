"""The numbers every table reports. Lower is better for all but coverage and accuracy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NORMAL_95 = 1.959963984540054


def gaussian_nll(y: np.ndarray, mean: np.ndarray, var: np.ndarray) -> float:
    """Mean negative log density of a Gaussian with the predictive mean and variance, in nats, in the units of y."""
    return float(0.5 * np.mean(np.log(2 * math.pi * var) + (y - mean) ** 2 / var))


def gaussian_interval(mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = NORMAL_95 * np.sqrt(var)
    return mean - half, mean + half


def regression(
    y: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    log_density: np.ndarray | None = None,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """Errors, both forms of the negative log likelihood, and the coverage and width of the 95 % interval.

    ``nll`` is the Gaussian-moment form; ``nll_own`` that of the model's own
    density, where it has one. The interval is the Gaussian one unless given.
    """
    error = y - mean
    lower, upper = interval or gaussian_interval(mean, var)
    found = {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "nll": gaussian_nll(y, mean, var),
        "coverage": float(np.mean((lower <= y) & (y <= upper))),
        "width": float(np.mean(upper - lower)),
    }
    if log_density is not None:
        found["nll_own"] = -float(np.mean(log_density))
    if not all(math.isfinite(value) for value in found.values()):
        raise ArithmeticError(f"scores are not finite: {found}")
    return found


def classification(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15) -> dict[str, float]:
    """Accuracy, negative log likelihood, expected calibration error (equal-width bins of the top probability), Brier.

    Probabilities are kept above 1e-12 in the logarithm: a forest may say 0.
    """
    of_label = probabilities[np.arange(len(labels)), labels]
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, hit - confidence, num_bins)  # each bin's share times its gap, times the number of rows
    return {
        "accuracy": float(hit.mean()),
        "nll": -float(np.mean(np.log(np.maximum(of_label, 1e-12)))),
        "ece": float(np.abs(gaps).sum() / len(labels)),
        "brier": float(np.mean(np.sum(probabilities**2, 1) - 2 * of_label + 1)),
    }


def over_splits(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error, median and number; the error is 0 for one split."""
    array = np.asarray(values, float)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else 0.0
    return {"mean": float(array.mean()), "error": error, "median": float(np.median(array)), "num": len(array)}


def summarise(records: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, dict[str, Any]]:
    """For each group of records the statistics of every number that all its members have, in order of appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record["metrics"])
    return {
        group: {
            name: over_splits([metrics[name] for metrics in members])
            for name in members[0]
            if all(isinstance(metrics.get(name), int | float) for metrics in members)
        }
        for group, members in groups.items()
    }
