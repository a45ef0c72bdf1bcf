"""Noise that varies with the input, as the errors on left-out rows show it.

The variance of an error is taken as ``a * epistemic + b * s(x)``, where the
logarithm of ``s`` is linear in the inputs and the prediction. A multiplicative
variance function: Harvey (1976), "Estimating regression models with
multiplicative heteroscedasticity", Econometrica 44(3). Its coefficients have a
normal prior whose width the evidence chooses: MacKay (1992), "Bayesian
interpolation", Neural Computation 4(3), so noise that does not vary is left
nearly constant, and so is noise of which a few rows tell little.
"""

import dataclasses

import numpy as np

from ._optimise import least

FACTOR_SPREAD = 1.0
"""Prior standard deviation of the logarithm of the epistemic factor: a guard for a handful of rows."""

FIRST_PRECISION = 50.0
PRECISIONS = (10.0, 1e4)
"""Prior precision of the change of log noise variance with one standard deviation of a feature: to begin with, and the
range in which the evidence chooses it."""

MOST_COLUMNS = 100
"""With more inputs than this, or inputs that are no table, the noise depends on the prediction alone."""

MOST_DEVIATIONS = 3.0
"""Features are held within this many standard deviations, and within the range they have in the training rows."""

LARGEST_CHANGE = 5.0
"""Most that a coefficient may be."""

NOISE_BOUNDS = (float(np.log(1e-3)), float(np.log(10.0)))
"""Bounds of the logarithm of the noise variance over the mean squared error on left-out rows."""

ROWS_PER_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class Standard:
    """Features brought to mean 0 and standard deviation 1, none beyond its range; each array holds one per feature."""

    lower: np.ndarray
    upper: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Standard":
        """That of values ``(n, ...)``."""
        values = np.asarray(values, float)
        centre, spread = values.mean(axis=0), values.std(axis=0)
        scale = np.where(spread > 1e-6 * np.abs(values).max(axis=0, initial=0.0), spread, 1.0)
        lower = np.maximum(values.min(axis=0), centre - MOST_DEVIATIONS * scale)
        upper = np.minimum(values.max(axis=0), centre + MOST_DEVIATIONS * scale)
        return cls(lower, upper, centre, scale)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return (np.clip(np.asarray(values, float), self.lower, self.upper) - self.centre) / self.scale


@dataclasses.dataclass(frozen=True)
class NoiseVariation:
    """How noise depends on the columns of a table, where there are few, and on the prediction itself.

    The noise variance of a row is a constant times ``exp(features @ coefficients)``. Beyond the range of a feature in
    the training rows, or three standard deviations, it stays as it is at that end.

    Attributes
    ----------
    coefficients : (parts, outputs, features) change of the logarithm with one standard deviation of a feature: the
        columns used, and last the prediction.
    columns : of the columns used, each ``(columns,)``.
    prediction : of the predictions, each ``(parts, outputs)``.
    """

    coefficients: np.ndarray
    columns: Standard
    prediction: Standard

    def factor(self, x: np.ndarray, means: np.ndarray) -> np.ndarray:
        """``exp(features @ coefficients)`` of rows ``x``, ``(parts, n, outputs)``; ``means`` are the predictions."""
        of_prediction = self.coefficients[:, None, :, -1]
        logs = of_prediction * np.swapaxes(self.prediction(np.swapaxes(means, 0, 1)), 0, 1)
        for first in range(0, len(x) if self.coefficients.shape[2] > 1 else 0, ROWS_PER_BLOCK):
            rows = slice(first, first + ROWS_PER_BLOCK)
            logs[:, rows] += np.einsum("nf,pof->pno", self.columns(x[rows]), self.coefficients[:, :, :-1])
        return np.exp(logs)


@dataclasses.dataclass(frozen=True)
class HeadNoise:
    """Noise that the network gives for each row, scaled by the factor that left-out rows ask for.

    What the network gives is held within its range on the training rows: beyond them it follows no data, and it is the
    logarithm that the network extrapolates.

    Attributes
    ----------
    factor : (parts, outputs) on the members' mean noise variance.
    lower, upper : (parts, outputs) range of that mean on the training rows, squared working units.
    """

    factor: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def __call__(self, noise_var: np.ndarray) -> np.ndarray:
        """Calibrated noise variance, ``(parts, n, outputs)``, for that of the network."""
        bounds = self.lower[:, None], self.upper[:, None]
        return self.factor[:, None] * np.clip(noise_var, *bounds)


def table(x: np.ndarray) -> np.ndarray:
    """The columns ``(n, columns)`` that the noise may depend on: those of a table that is not too wide, else none."""
    usable = x.ndim == 2 and np.issubdtype(x.dtype, np.floating) and x.shape[1] <= MOST_COLUMNS
    return x if usable else np.zeros((len(x), 0))


def noise_bounds(shape: np.ndarray | float) -> tuple[float, float]:
    """``NOISE_BOUNDS`` for the factor on ``shape``: where a few rows have most of the noise, it may be far smaller."""
    low, high = NOISE_BOUNDS
    return low - float(np.log(max(1.0, np.mean(shape)))), high


def fit_variance(epistemic: np.ndarray, squared: np.ndarray, shape: np.ndarray | float = 1.0) -> tuple[float, float]:
    """``(a, b)`` of the variance ``a * epistemic + b * shape`` for which errors, taken as normal, are most likely.

    Parameters
    ----------
    epistemic, squared : (n,) variance between draws and backbones, and squared errors.
    shape : (n,) noise of each row beside that of others, where it is known.
    """
    mse = max(float(squared.mean()), 1e-30)
    epistemic, squared = epistemic / mse, squared / mse

    def negative(logs: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = np.exp(logs)
        total = a * epistemic + b * shape
        slope = 0.5 * (1.0 / total - squared / total**2)
        prior = 0.5 * (logs[0] / FACTOR_SPREAD) ** 2 / len(squared)
        value = 0.5 * np.mean(np.log(total) + squared / total) + prior
        pull = logs[0] / FACTOR_SPREAD**2 / len(squared)
        return value, np.array([a * np.mean(slope * epistemic) + pull, b * np.mean(slope * shape)])

    low, high = noise_bounds(shape)
    bounds = [(-8.0, 8.0), (low, high)]
    shares = (1.0, 0.3, 0.03)  # the likelihood may have two modes
    starts = [np.log([1.0, share * scale]) for share in shares for scale in {1.0, np.exp(low - NOISE_BOUNDS[0])}]
    runs = [least(negative, s, bounds) for s in starts]
    a, b = np.exp(min(runs, key=lambda run: run.fun).x)
    return float(a), float(b * mse)


def fit_noise(
    epistemic: np.ndarray,
    squared: np.ndarray,
    features: np.ndarray,
    dof: float,
    start: float,
    precision: float = FIRST_PRECISION,
    shape: np.ndarray | float = 1.0,
) -> tuple[float, np.ndarray]:
    """``(b, coefficients)`` of the most likely noise variance ``b * shape * exp(features @ coefficients)``.

    Parameters
    ----------
    epistemic, squared : (n,) calibrated epistemic variance, which is taken as it is, and squared errors. Fitted anew
        it would be found smaller, since both tell hard rows from easy ones; but only it grows away from the data.
    features : (n, k), standardised; ``k = 0`` for constant noise.
    dof : degrees of freedom of the Student's t that the errors follow, above 2; the variance is that of the t.
    start : noise variance to start from.
    precision : prior precision of the coefficients.
    shape : (n,) as for ``fit_variance``.
    """
    mse = max(float(squared.mean()), 1e-30)
    epistemic, squared = epistemic / mse, squared / mse
    num_rows, size = features.shape

    def negative(values: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = values[1:]
        noise = shape * np.exp(values[0] + features @ coefficients)
        total = epistemic + noise
        ratio = squared / (total * (dof - 2.0))
        slope = (0.5 - 0.5 * (dof + 1.0) * ratio / (1.0 + ratio)) / total * noise
        penalty = 0.5 * precision * np.sum(coefficients**2) / num_rows
        value = np.mean(0.5 * np.log(total) + 0.5 * (dof + 1.0) * np.log1p(ratio)) + penalty
        pull = precision * coefficients / num_rows
        return value, np.append(np.mean(slope), features.T @ slope / num_rows + pull)

    of_noise = noise_bounds(shape)
    bounds = [of_noise, *[(-LARGEST_CHANGE, LARGEST_CHANGE)] * size]
    first = np.append(np.clip(np.log(start / mse), *of_noise), np.zeros(size))
    found = least(negative, first, bounds).x
    return float(np.exp(found[0]) * mse), found[1:]


def evidence_precision(
    coefficients: np.ndarray, features: np.ndarray, noise_share: np.ndarray, dof: float, precision: float
) -> float:
    """The prior precision for which the errors are more likely: one step of MacKay's fixed-point iteration.

    ``noise_share`` is (n,), noise over total variance; ``precision`` that with which ``coefficients`` were fitted.
    """
    information = dof / (2.0 * (dof + 3.0)) * noise_share**2  # of a row about the logarithm of its noise variance
    curvature = np.linalg.eigvalsh((features * information[:, None]).T @ features)
    well_determined = np.sum(curvature / (curvature + precision))
    return float(np.clip(well_determined / max(np.sum(coefficients**2), 1e-12), *PRECISIONS))
