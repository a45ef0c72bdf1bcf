"""Scores with the prediction first, for a quick look at a model.

The formulas and all other scores are in ``metrics``, whose argument order is
``(y_true, prediction)``.
"""

from numpy.typing import ArrayLike

from . import metrics


def mse(y_pred: ArrayLike, y_true: ArrayLike) -> float:
    """Mean squared error of predictions shaped like the targets; shapes that differ raise ``DataError``."""
    return metrics.mse(y_true, y_pred)


def rmse(y_pred: ArrayLike, y_true: ArrayLike) -> float:
    """Root mean squared error, in units of the target."""
    return metrics.rmse(y_true, y_pred)


def mae(y_pred: ArrayLike, y_true: ArrayLike) -> float:
    """Mean absolute error, in units of the target."""
    return metrics.mae(y_true, y_pred)


def nlpd(y_pred: ArrayLike, y_var: ArrayLike, y_true: ArrayLike) -> float:
    """Mean negative log density of the targets under Gaussians with mean ``y_pred`` and variance ``y_var``, in nats."""
    return metrics.nlpd(y_true, y_pred, y_var)
