"""Predictions of a fitted model: moments, quantiles, draws, densities and intervals, in the user's units."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import _checks, left_out, mixture, predictive
from .._checks import check_fraction
from ..errors import CalibrationWarning, NotFittedError, OptionError
from ..mixture import Mixture
from ..networks.base import Network
from ..predictive import ClassPrediction, RegressionPrediction, as_pair
from . import calibrated
from .base import constructor_text, softmax, to_target_shape
from .fitting import Fitted, Member

_SAME = "as the model"


def check_calibration(calibration: Any) -> None:
    """Raise unless ``calibration`` is one that a fitted model can apply."""
    if calibration not in ("out_of_fold", None):
        raise OptionError(f"calibration must be 'out_of_fold' or None, got {calibration!r}.")


class Predicting:
    """What a fitted model can say about new rows; the part of ``PartialBNN`` that comes after ``fit``."""

    num_classes: int | None
    calibration: str | None
    _network: Network
    _fitted: Fitted | None

    def __repr__(self) -> str:
        text, fitted = constructor_text(self), self._fitted
        if fitted is None:
            return text
        size, count = fitted.members[0].source.partition.size, len(fitted.members)
        weights = f"{size} Bayesian weight{'s' * (size != 1)}, {count} backbone{'s' * (count != 1)}"
        return f"{text}; fitted to {fitted.num_rows} rows, {weights}"

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers rather than class labels."""
        return self.num_classes is None

    def predict(self, X: Any, *, calibration: str | None = _SAME) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of a new observation, or class probabilities and their uncertainty.

        Parameters
        ----------
        X : (n, …) inputs, rows shaped as at fit.
        calibration : ``"out_of_fold"`` or None, if other than the model's own.

        Returns
        -------
        Regression: mean and variance (epistemic plus noise), both shaped like the training target, in the user's
        units. Classification: probabilities ``(n, classes)`` and the entropy of each row's probabilities ``(n,)``
        in nats: the total uncertainty. ``posterior_predictive`` splits both.
        """
        return as_pair(self.posterior_predictive(X, calibration=calibration))

    def predict_classes(self, X: Any) -> np.ndarray:
        """The most probable class of each row, shape ``(n,)``."""
        if self.is_regression:
            raise OptionError("predict_classes needs a model built with num_classes; this one predicts numbers.")
        return np.argmax(self.predict(X)[0], axis=-1)

    def posterior_predictive(
        self,
        X: Any,
        *,
        quantiles: Sequence[float] | float | None = None,
        num_draws: int = 0,
        seed: int | None = None,
        calibration: str | None = _SAME,
    ) -> RegressionPrediction | ClassPrediction:
        """The predictive distribution with its uncertainty split into epistemic and aleatoric.

        Parameters
        ----------
        X : (n, …) inputs, rows shaped as at fit.
        quantiles : levels in (0, 1), or one, at which to give quantiles of the predictive mixture (regression).
        num_draws : draws to return: of new observations (regression) or of class probabilities.
        seed : chooses the draws.
        calibration : ``"out_of_fold"`` or None, if other than the model's own.
        """
        num_draws = _checks.check_positive_int("num_draws", num_draws, minimum=0)
        fitted, x = self._inputs(X)
        parts, draws = self._mixture(fitted, calibration), None
        if num_draws:
            draws = self._draws(fitted, parts, x, num_draws, noise=True, key=_checks.as_key(None, seed))
        if not self.is_regression:
            if quantiles is not None:
                raise OptionError("quantiles are for regression; for classes ask for draws of the probabilities.")
            return ClassPrediction.of(*mixture.class_moments(parts, x), draws)
        mean, epistemic, aleatoric = mixture.regression_moments(parts, x)
        solved = None
        if quantiles is not None:
            levels = calibrated.quantile_levels(quantiles)
            values = fitted.scaling.mean_to_user(mixture.quantiles(parts, x, levels))
            solved = dict(zip(levels, to_target_shape(values, fitted.target_ndim), strict=True))
        return RegressionPrediction(
            mean=to_target_shape(fitted.scaling.mean_to_user(mean), fitted.target_ndim),
            epistemic_var=to_target_shape(fitted.scaling.var_to_user(epistemic), fitted.target_ndim),
            aleatoric_var=to_target_shape(fitted.scaling.var_to_user(aleatoric), fitted.target_ndim),
            quantiles=solved,
            draws=draws,
        )

    def predict_interval(self, X: Any, level: float = 0.95, *, calibration: str | None = _SAME):
        """The central interval of a new observation: (low, high), both shaped like the training target.

        Its ends are quantiles of the predictive mixture, so it need not be symmetric about the mean.
        """
        if not self.is_regression:
            raise OptionError("predict_interval is for regression; this model predicts classes.")
        level = check_fraction("level", level)
        ends = (0.5 * (1.0 - level), 0.5 * (1.0 + level))
        found: Any = self.posterior_predictive(X, quantiles=ends, calibration=calibration)
        return found.quantiles[ends[0]], found.quantiles[ends[1]]

    def log_predictive_density(
        self, X: Any, y: Any, *, form: str | None = None, calibration: str | None = _SAME
    ) -> np.ndarray:
        """Log density of each row's target (log probability of its class), ``(n,)`` in nats, in the user's units.

        Parameters
        ----------
        X, y : rows and their targets, as for ``fit``.
        form : ``"gaussian"``: of a normal distribution with the predictive mean and variance; ``"mixture"``: of the
            mixture over all draws, noise included; ``"student"``: of a Student's t about the predictive mean with the
            tails that left-out rows show. By default the last where there are left-out rows, else the mixture.
        calibration : ``"out_of_fold"`` or None, if other than the model's own.
        """
        if form is not None:
            _checks.check_one_of("form", form, ("gaussian", "mixture", "student"))
        fitted, x = self._inputs(X)
        parts = self._mixture(fitted, calibration)
        if self.num_classes is not None:
            labels = _checks.as_class_labels(y, len(x), self.num_classes, training=False)
            probabilities = mixture.class_moments(parts, x)[0]
            return np.log(np.maximum(probabilities[np.arange(len(x)), labels], np.finfo(float).tiny))
        columns = _checks.as_targets(y, len(x), training=False, num_outputs=parts.num_outputs)
        targets = fitted.scaling.targets(columns).astype(float)
        jacobian = float(np.sum(np.log(np.broadcast_to(fitted.scaling.y_std, targets.shape[1:]))))
        tail = None if parts.calibration is None else parts.calibration.tail
        if form == "student" and tail is None:
            raise OptionError("form='student' needs left-out rows: several backbones, and calibration='out_of_fold'.")
        if form == "mixture" or (form is None and tail is None):
            return mixture.log_density(parts, x, targets) - jacobian
        mean, epistemic, aleatoric = mixture.regression_moments(parts, x)
        std = np.sqrt(epistemic + aleatoric)
        import scipy.stats  # takes a quarter of a second

        if form == "gaussian" or tail is None:
            each = scipy.stats.norm.logpdf(targets, mean, std)
        else:
            each = scipy.stats.t.logpdf(targets, tail[:, 0], mean, tail[:, 1] * std)
        return each.sum(axis=1) - jacobian

    def calibrate(self, X_cal: Any, y_cal: Any, method: str | None = None) -> calibrated.CalibratedModel:
        """A calibrated copy, corrected by rows that were not used in ``fit``; this model is not changed.

        Parameters
        ----------
        X_cal, y_cal : inputs and targets, as for ``fit``.
        method : ``"variance"`` (the default for numbers), ``"isotonic"``, ``"conformal"``; ``"temperature"`` (the
            default) for classes.

        Warns
        -----
        CalibrationWarning
            Fewer than 20 rows, or most of them are rows of the fit.
        """
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", CalibrationWarning)
            result = calibrated.calibrate(self, X_cal, y_cal, method)
        for each in warned:  # again, from where it can be mended
            warnings.warn(each.message, stacklevel=2)
        fitted, x = self._inputs(X_cal)
        if self.num_classes is None:
            y = fitted.scaling.targets(_checks.as_targets(y_cal, len(x), training=False))
        else:
            y = _checks.as_class_labels(y_cal, len(x), self.num_classes, training=False)
        known = int(np.isin(left_out.hashes(x, y), fitted.row_hashes).sum())
        # Where rows repeat within the training data, new ones may well equal some of them.
        distinct = len(np.unique(fitted.row_hashes)) > 0.9 * len(fitted.row_hashes)
        if distinct and known > len(x) / 2:
            warnings.warn(
                f"{known} of the {len(x)} rows of X_cal and y_cal were used in fit, where errors are smaller than on "
                "new rows: the correction makes intervals too narrow. Give rows that were set aside before fit.",
                CalibrationWarning,
                stacklevel=2,
            )
        return result

    def sample_from_posterior(
        self,
        X: Any,
        num_draws: int = 100,
        *,
        noise: bool = True,
        seed: int | None = None,
        rng_key: Any = None,
        calibration: str | None = _SAME,
    ) -> np.ndarray:
        """Draws of new observations at X, or of the function itself with ``noise=False``.

        Returns
        -------
        ``(num_draws, n)`` or ``(num_draws, n, d)`` in the user's units; for classification the draws' class
        probabilities ``(num_draws, n, classes)``. Rows of one draw share its weights. A draw is taken as often as its
        share asks for, so none twice while there are enough that count alike.
        """
        fitted, x = self._inputs(X)
        num_draws = _checks.check_positive_int("num_draws", num_draws)
        parts = self._mixture(fitted, calibration)
        return self._draws(fitted, parts, x, num_draws, noise=noise, key=_checks.as_key(rng_key, seed))

    def get_samples(self, chain_dim: bool = False) -> dict[str, np.ndarray]:
        """Draws of the Bayesian weights by leaf (``Dense1.kernel``), and of the noise in the user's units.

        A wholly Bayesian leaf has shape ``(draws, *leaf_shape)``, a partly Bayesian one ``(draws, k)`` in the
        order of ``partition.indices``. ``chain_dim=True`` puts a chain axis first. Noise that the network gives has no
        draws besides those of the weights.
        """
        samples = self._samples_of(self._require_fitted().members)
        if chain_dim:
            return samples
        return {path: values.reshape(-1, *values.shape[2:]) for path, values in samples.items()}

    def deterministic_predict(self, X: Any) -> np.ndarray:
        """What the trained networks predict without any Bayesian part: their mean, or mean class probabilities."""
        fitted, x = self._inputs(X)
        parts = fitted.mixture
        outputs = [predictive.deterministic_means(source, x) for source in parts.sources]
        if not self.is_regression:
            return np.tensordot(parts.member_weights, np.stack([softmax(values) for values in outputs]), 1)
        mean = np.tensordot(parts.member_weights, np.stack(outputs).astype(float), 1)
        return to_target_shape(fitted.scaling.mean_to_user(mean), fitted.target_ndim)

    def _require_fitted(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("this PartialBNN is not fitted yet. Call fit(X, y) first.")
        return self._fitted

    def _inputs(self, X: Any) -> tuple[Fitted, np.ndarray]:
        fitted = self._require_fitted()
        _checks.check_columns(X, fitted.columns)
        inputs = _checks.as_inputs(X, self._network.input_spec, expected_shape=fitted.row_shape)
        return fitted, fitted.scaling.inputs(inputs)

    def _mixture(self, fitted: Fitted, calibration: str | None) -> Mixture:
        """The backbones, calibrated where that is asked for and left-out rows exist."""
        if calibration == _SAME:
            calibration = self.calibration
        check_calibration(calibration)
        parts = fitted.mixture
        return parts if calibration is None else parts._replace(calibration=fitted.out_of_fold)

    def _samples_of(self, members: Sequence[Member]) -> dict[str, np.ndarray]:
        """Draws by leaf and of the noise, ``(chain, draw, …)``, one backbone's chains after another's."""
        fitted, found = self._require_fitted(), []
        num_draws = min(member.posterior.num_draws for member in members)
        for member in members:
            source, positions = member.source, member.posterior.draws
            theta = positions[..., : source.partition.size]
            samples = {path: np.asarray(values) for path, values in source.partition.unravel(theta).items()}
            if source.noise_std.shape[1]:
                noise = source.noise_std.reshape(*positions.shape[:2], -1) * fitted.scaling.y_std
                samples["noise_std"] = noise[..., 0] if fitted.target_ndim == 1 else noise
            found.append({path: values[:, :num_draws] for path, values in samples.items()})
        if any({k: v.shape[2:] for k, v in s.items()} != {k: v.shape[2:] for k, v in found[0].items()} for s in found):
            raise OptionError(
                "the backbones chose different numbers of Bayesian weights in a layer, so their draws cannot be one "
                "array. Choose weights by name or index, or fit with num_backbones=1."
            )
        return {path: np.concatenate([samples[path] for samples in found]) for path in found[0]}

    def _draws(
        self, fitted: Fitted, parts: Mixture, x: np.ndarray, num_draws: int, *, noise: bool, key: Any
    ) -> np.ndarray:
        """Draws of observations, of the function, or of class probabilities, in the user's units."""
        seeds = np.asarray(jax.random.key_data(key)).ravel()
        generator = np.random.default_rng([int(word) for word in seeds])
        available = mixture.num_draws(parts)
        if len(parts.sources) == 1:
            picked = generator.choice(available, num_draws, bool(num_draws > available))
        else:
            # Evenly along the shares: each draw as often as its share asks for, to within one.
            places = (generator.permutation(num_draws) + generator.random()) / num_draws
            picked = np.searchsorted(np.cumsum(parts.draw_weights), places, side="right").clip(max=available - 1)
        outputs, noise_std = mixture.function_draws(parts, x, picked, noise=noise and self.is_regression)
        if not self.is_regression:
            temperature = None if parts.calibration is None else parts.calibration.temperature
            return softmax(outputs if temperature is None else outputs / temperature)
        outputs = outputs.astype(float)
        if noise_std is not None:
            outputs += noise_std * generator.standard_normal(outputs.shape)
        return to_target_shape(fitted.scaling.mean_to_user(outputs), fitted.target_ndim)
