"""Noise that varies with the input, as the errors on left-out rows show it.

The variance of an error is taken as ``a * epistemic + b * s(x)``, where the
logarithm of ``s`` is linear in the inputs and the prediction. A multiplicative
variance function: Harvey (1976), "Estimating regression models with
multiplicative heteroscedasticity", Econometrica 44(3). Its coefficients have a
normal prior, so that a few rows leave the noise nearly constant.
"""

import dataclasses

import numpy as np
import scipy.optimize

FACTOR_SPREAD = 1.0
"""Prior standard deviation of the logarithm of the epistemic factor: a guard for a handful of rows."""

COEFFICIENT_PRECISION = 50.0
"""Prior precision of the change of log noise variance with one standard deviation of a feature."""

MOST_COLUMNS = 100
"""With more inputs than this, or inputs that are no table, the noise depends on the prediction alone."""

LARGEST_CHANGE = 5.0
"""Most that a coefficient may be."""

NOISE_BOUNDS = (float(np.log(1e-3)), float(np.log(10.0)))
"""Bounds of the logarithm of the noise variance over the mean squared error on left-out rows."""


@dataclasses.dataclass(frozen=True)
class NoiseVariation:
    """How noise depends on the columns of a table, where there are few, and on the prediction itself.

    The noise variance of a row is ``exp(features @ coefficients)`` times its geometric mean over the training rows.
    Beyond the range of a feature in those rows it stays as it is at the end of the range.

    Attributes
    ----------
    coefficients : (parts, outputs, features) change of the logarithm with one standard deviation of a feature: the
        columns used, and last the prediction.
    lower, upper, centre, scale : (parts, outputs, features) range, mean and standard deviation of each feature.
    """

    coefficients: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    def factor(self, x: np.ndarray, means: np.ndarray) -> np.ndarray:
        """Noise variance over its geometric mean, ``(parts, n, outputs)``; ``means`` are the parts' predictions."""
        result = np.empty(means.shape)
        columns = self.coefficients.shape[2] - 1
        for part, output in np.ndindex(self.coefficients.shape[:2]):
            at = (part, output)
            raw = np.clip(_raw(x, means[part, :, output], columns), self.lower[at], self.upper[at])
            result[part, :, output] = np.exp((raw - self.centre[at]) / self.scale[at] @ self.coefficients[at])
        return result


def num_columns(x: np.ndarray) -> int:
    """How many input columns the noise may depend on: those of a table that is not too wide, else none."""
    table = x.ndim == 2 and np.issubdtype(x.dtype, np.floating) and x.shape[1] <= MOST_COLUMNS
    return x.shape[1] if table else 0


class Features:
    """Standardised features of the rows a noise model is fitted to, for one part and output."""

    def __init__(self, x: np.ndarray, prediction: np.ndarray):
        raw = _raw(x, prediction, num_columns(x))
        spread = raw.std(axis=0)
        self.lower, self.upper, self.centre = raw.min(axis=0), raw.max(axis=0), raw.mean(axis=0)
        self.scale = np.where(spread > 0, spread, 1.0)
        self.values = (raw - self.centre) / self.scale


def _raw(x: np.ndarray, prediction: np.ndarray, columns: int) -> np.ndarray:
    prediction = np.asarray(prediction, float)[:, None]
    return np.concatenate([np.asarray(x, float), prediction], axis=1) if columns else prediction


def joined(features: list[list[Features]], coefficients: np.ndarray) -> NoiseVariation:
    """The variation of all parts and outputs; ``coefficients`` is ``(parts, outputs, features)``."""
    ranges = {name: np.array([[getattr(one, name) for one in part] for part in features])
              for name in ("lower", "upper", "centre", "scale")}  # fmt: skip
    return NoiseVariation(coefficients, **ranges)


def fit_variance(epistemic: np.ndarray, squared: np.ndarray) -> tuple[float, float]:
    """``(a, b)`` of the variance ``a * epistemic + b`` for which errors, taken as normal, are most likely.

    Parameters
    ----------
    epistemic, squared : (n,) variance between draws and backbones, and squared errors.
    """
    mse = max(float(squared.mean()), 1e-30)
    epistemic, squared = epistemic / mse, squared / mse

    def negative(logs: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = np.exp(logs)
        total = a * epistemic + b
        slope = 0.5 * (1.0 / total - squared / total**2)
        prior = 0.5 * (logs[0] / FACTOR_SPREAD) ** 2 / len(squared)
        value = 0.5 * np.mean(np.log(total) + squared / total) + prior
        pull = logs[0] / FACTOR_SPREAD**2 / len(squared)
        return value, np.array([a * np.mean(slope * epistemic) + pull, b * np.mean(slope)])

    bounds = [(-8.0, 8.0), NOISE_BOUNDS]
    starts = [np.log([1.0, share]) for share in (1.0, 0.3, 0.03)]  # the likelihood may have two modes
    runs = [scipy.optimize.minimize(negative, s, jac=True, method="L-BFGS-B", bounds=bounds) for s in starts]
    a, b = np.exp(min(runs, key=lambda run: run.fun).x)
    return float(a), float(b * mse)


def fit_noise(
    epistemic: np.ndarray, squared: np.ndarray, features: np.ndarray, dof: float, start: float
) -> tuple[float, np.ndarray]:
    """``(b, coefficients)`` of the most likely noise variance ``b * exp(features @ coefficients)``.

    Parameters
    ----------
    epistemic, squared : (n,) calibrated epistemic variance, which is taken as it is, and squared errors. Fitted anew
        it would be found smaller, since both tell hard rows from easy ones; but only it grows away from the data.
    features : (n, k), standardised; ``k = 0`` for constant noise.
    dof : degrees of freedom of the Student's t that the errors follow, above 2; the variance is that of the t.
    start : noise variance to start from.
    """
    mse = max(float(squared.mean()), 1e-30)
    epistemic, squared = epistemic / mse, squared / mse
    num_rows, size = features.shape

    def negative(values: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = values[1:]
        noise = np.exp(values[0] + features @ coefficients)
        total = epistemic + noise
        ratio = squared / (total * (dof - 2.0))
        slope = (0.5 - 0.5 * (dof + 1.0) * ratio / (1.0 + ratio)) / total * noise
        penalty = 0.5 * COEFFICIENT_PRECISION * np.sum(coefficients**2) / num_rows
        value = np.mean(0.5 * np.log(total) + 0.5 * (dof + 1.0) * np.log1p(ratio)) + penalty
        pull = COEFFICIENT_PRECISION * coefficients / num_rows
        return value, np.append(np.mean(slope), features.T @ slope / num_rows + pull)

    bounds = [NOISE_BOUNDS, *[(-LARGEST_CHANGE, LARGEST_CHANGE)] * size]
    first = np.append(np.clip(np.log(start / mse), *NOISE_BOUNDS), np.zeros(size))
    found = scipy.optimize.minimize(negative, first, jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(np.exp(found[0]) * mse), found[1:]
