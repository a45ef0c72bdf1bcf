"""A fitted model together with a correction learnt from rows it was not fitted to."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .. import _checks
from ..calibration import Calibration, ConformalIntervals, VarianceScaling, check_method, fit_calibration
from ..errors import DataError, OptionError
from ..metrics import Predictor
from ..predictive import ClassPrediction, RegressionPrediction, as_pair


class PredictiveModel(Predictor, Protocol):
    """What can be calibrated: a fitted model of this library, or anything with the same three members."""

    def posterior_predictive(
        self, X: Any, *, quantiles: Sequence[float] | None = None, num_draws: int = 0, seed: int | None = None
    ) -> RegressionPrediction | ClassPrediction:
        """The predictive distribution for the rows of ``X``."""
        ...


class CalibratedModel:
    """A fitted model whose predictions pass through a correction; made by ``model.calibrate(X_cal, y_cal)``.

    The model itself stays as it is, and what is fitted to it later does not reach this object.

    Attributes
    ----------
    model : the model as it was when it was calibrated.
    calibration : what is corrected, with its figures: ``num_rows``, and ``factor``, ``temperature`` or
        ``multiplier(level)``.
    """

    def __init__(self, model: PredictiveModel, calibration: Calibration):
        check_method(calibration.method, regression=model.is_regression)
        self.model = copy.copy(model)  # shares the fit, which a refit of the original replaces and never changes
        self.calibration = calibration

    def __repr__(self) -> str:
        return f"CalibratedModel({type(self.model).__name__}, {self.calibration!r})"

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers rather than class labels."""
        return self.model.is_regression

    def predict(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Corrected mean and variance, or class probabilities and their entropy, as the model's own ``predict``.

        After ``"conformal"``, which corrects intervals only, these are the model's own.
        """
        return as_pair(self.posterior_predictive(X))

    def predict_classes(self, X: Any) -> np.ndarray:
        """The most probable class of each row, shape ``(n,)``: the same as before calibration."""
        if self.is_regression:
            raise OptionError("predict_classes needs a model built with num_classes; this one predicts numbers.")
        return np.argmax(self.predict(X)[0], axis=-1)

    def predict_interval(self, X: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of the corrected central interval of each target, shaped like the training target.

        Parameters
        ----------
        X : (n, …) inputs, rows shaped as at fit.
        level : probability that the interval contains the target.

        Raises
        ------
        OptionError
            The model predicts classes, or conformal calibration has too few rows for this level.
        """
        level = _checks.check_fraction("level", level)
        if not self.is_regression:
            raise OptionError("predict_interval is for numbers; a model with num_classes predicts probabilities.")
        if isinstance(self.calibration, ConformalIntervals):
            mean, var = self.model.predict(X)
            return self.calibration.interval(mean, np.sqrt(var), level)
        ends = [(1 - level) / 2, (1 + level) / 2]
        prediction = self.posterior_predictive(X, quantiles=ends)
        assert isinstance(prediction, RegressionPrediction) and prediction.quantiles is not None
        return prediction.quantiles[ends[0]], prediction.quantiles[ends[1]]

    def posterior_predictive(
        self, X: Any, *, quantiles: Sequence[float] | float | None = None, num_draws: int = 0, seed: int | None = None
    ) -> RegressionPrediction | ClassPrediction:
        """The corrected predictive distribution; both parts of its uncertainty are corrected by one factor.

        Parameters
        ----------
        X : (n, …) inputs, rows shaped as at fit.
        quantiles : levels in (0, 1), or one, at which to give corrected quantiles (``"variance"``, ``"isotonic"``).
        num_draws : draws of new observations to return (``"variance"`` only).
        seed : chooses the draws.

        Raises
        ------
        OptionError
            Draws or quantiles are asked for that the correction says nothing about.
        """
        if num_draws and not isinstance(self.calibration, VarianceScaling):
            raise OptionError(
                f"calibration by {self.calibration.method!r} does not change draws. "
                ".model.posterior_predictive(X, num_draws=...) gives the model's own."
            )
        levels = None if quantiles is None else quantile_levels(quantiles)
        if not self.is_regression:
            return self._classes(X, levels)
        if isinstance(self.calibration, ConformalIntervals):
            if levels is not None:
                raise OptionError("conformal calibration changes intervals only. Use predict_interval(X, level).")
            return self.model.posterior_predictive(X)
        if isinstance(self.calibration, VarianceScaling):
            return self._stretched(self.calibration, X, levels, num_draws, seed)
        return self._remapped(X, levels)

    def _classes(self, X: Any, quantiles: Sequence[float] | None) -> ClassPrediction:
        """Corrected probabilities, their entropy parted between its two sources as in the model's own."""
        own = self.model.posterior_predictive(X, quantiles=quantiles)
        assert isinstance(own, ClassPrediction)
        with np.errstate(divide="ignore", invalid="ignore"):
            aleatoric_share = np.where(own.total_entropy > 0, own.expected_entropy / own.total_entropy, 1.0)
        corrected = self.calibration.probabilities(own.probabilities)
        total = ClassPrediction.of(corrected, own.expected_entropy, None).total_entropy
        return ClassPrediction.of(corrected, aleatoric_share * total, None)

    def _stretched(
        self, scaling: VarianceScaling, X: Any, levels: Sequence[float] | None, num_draws: int, seed: int | None
    ) -> RegressionPrediction:
        own = _numbers(self.model.posterior_predictive(X, quantiles=levels, num_draws=num_draws, seed=seed))
        corrected = None
        if own.quantiles is not None:
            known = np.stack(list(own.quantiles.values()))
            values = scaling.quantiles(list(own.quantiles), own.mean, own.std, lambda _: known)
            corrected = dict(zip(own.quantiles, values, strict=True))
        draws = None if own.draws is None else own.mean + np.sqrt(scaling.factor) * (own.draws - own.mean)
        return dataclasses.replace(
            own,
            epistemic_var=scaling.variance(own.epistemic_var),
            aleatoric_var=scaling.variance(own.aleatoric_var),
            quantiles=corrected,
            draws=draws,
        )

    def _remapped(self, X: Any, levels: Sequence[float] | None) -> RegressionPrediction:
        own = _numbers(self.model.posterior_predictive(X))
        corrected = None
        if levels is not None:
            values = self.calibration.quantiles(levels, own.mean, own.std, _quantile_function(self.model, X))
            corrected = dict(zip(levels, values, strict=True))
        return RegressionPrediction(
            mean=self.calibration.mean(own.mean, own.std),
            epistemic_var=self.calibration.variance(own.epistemic_var),
            aleatoric_var=self.calibration.variance(own.aleatoric_var),
            quantiles=corrected,
        )


def calibrate(model: PredictiveModel, X: Any, y: Any, method: str | None = None) -> CalibratedModel:
    """Learn a correction of a fitted model from rows it was not fitted to; the model itself is not changed.

    Parameters
    ----------
    model : a fitted model.
    X : (n, …) inputs, rows shaped as at fit.
    y : targets shaped like the model's predictions, or class labels (n,).
    method : ``"variance"`` (the default for numbers), ``"isotonic"`` or ``"conformal"``; ``"temperature"`` (the
        default) for classes.

    Raises
    ------
    DataError, OptionError, NotFittedError

    Warns
    -----
    CalibrationWarning
        Fewer than 20 rows.
    """
    regression = model.is_regression
    if method is None:
        method = "variance" if regression else "temperature"
    check_method(method, regression=regression)
    if not regression:
        probabilities, _ = model.predict(X)
        n, num_classes = probabilities.shape
        labels = _checks.as_class_labels(y, n, num_classes, training=False, name="y_cal")
        return CalibratedModel(model, fit_calibration(method, labels, probabilities=probabilities))
    mean, var = model.predict(X)
    targets = _checks.as_targets(y, len(mean), training=False, name="y_cal")
    if targets.shape != mean.shape:
        raise DataError(f"y_cal has shape {targets.shape}, but the model predicts {mean.shape}, as y had at fit.")
    own = _quantile_function(model, X) if method == "isotonic" else None
    return CalibratedModel(model, fit_calibration(method, targets, mean, var, quantile_function=own))


def quantile_levels(quantiles: Any) -> list[float]:
    """The levels that quantiles are asked for at, each in (0, 1), from a sequence of them or a single one."""
    levels = quantiles if np.iterable(quantiles) and not isinstance(quantiles, str) else [quantiles]
    return [_checks.check_fraction("quantiles", level) for level in levels]


def _quantile_function(model: PredictiveModel, X: Any):
    def quantiles(levels: np.ndarray) -> np.ndarray:
        found = _numbers(model.posterior_predictive(X, quantiles=levels.tolist())).quantiles
        assert found is not None
        return np.stack(list(found.values()))

    return quantiles


def _numbers(prediction: RegressionPrediction | ClassPrediction) -> RegressionPrediction:
    assert isinstance(prediction, RegressionPrediction)
    return prediction
