"""What rows that a backbone has not seen say about the ensemble, and how wide its intervals must be.

The prediction for a row by the backbones that left it out is that of a smaller
ensemble on new data. Its error, corrected for the ensemble's size, is an
unbiased estimate of the whole ensemble's; its likelihood decides how the
variance between draws and backbones translates into variance of the error.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.special

from ._optimise import least
from .noise_model import (
    FIRST_PRECISION,
    HeadNoise,
    NoiseVariation,
    Standard,
    evidence_precision,
    fit_noise,
    fit_variance,
    table,
)

FULL_CORRECTION_ROWS = 100
"""Rows at which half of the correction for an ensemble's size is made. It is unbiased, and with few rows so uncertain
that the least of many corrected errors would be the luckiest."""

LEAST_ERROR = 0.05
"""Least corrected squared error, as a share of the uncorrected one; guards an estimate from few rows."""

ROUNDS = 5
"""Rounds of fitting tails, noise and its prior in turn: noise that varies looks like heavy tails until it is fitted."""

MOST_ROWS = 10_000
"""Left-out rows that tails and noise are fitted to, spread evenly over more."""

MIN_DOF = 2.0
GAUSSIAN_DOF = 30.0
DOF_SPREAD = 1.0
LEAST_FIT_DOF = 4.0
"""Least degrees of freedom of the tails (a variance must exist), and the prior of their logarithm above it; and the
least with which the variance is fitted, which near 2 would have little to do with the errors' squares."""

TEMPERATURES = (0.05, 20.0)
TEMPERATURE_SPREAD = 0.5
"""Prior standard deviation of the temperature's logarithm about 0. Where all left-out rows are classified rightly their
likelihood rises without end as the temperature falls, and the first wrong row would then cost without end."""

SCALE_PARAMETERS = 4
"""Numbers that are as good as fitted to the errors besides the mean: the factor, the noise, and the prior scale and
epoch that were best. A variance that ``n`` errors show is, for a new row, larger by ``n / (n - 4)``: that of the
Student's t which is the predictive distribution of a normal with unknown scale. Errors of rows that are left out
together go together, so there ``n`` is the number of groups."""

STACKING = 0.5
"""Parts are weighed by their likelihood of left-out rows to this power: the rows are predicted from much the same data,
so a difference between parts is less certain than as many independent rows would make it."""


@dataclasses.dataclass(frozen=True)
class OutOfFold:
    """How well left-out rows were predicted, and what follows for the predictive variance.

    A part is a group of backbones trained with one prior scale; the first is the best.

    Attributes
    ----------
    weights : (parts,) share of each part in the mixture; they sum to one.
    epistemic_factor : (parts, outputs) ``a`` in ``variance = a * epistemic + b``; None for classes.
    noise_var : (parts, outputs) ``b``, in squared working units; None for classes. Where the noise varies this is
        its value for a row with all features at their mean, or with the geometric mean of the network's noise.
    temperature : class probabilities are raised to one over it and renormalised; None for regression.
    rmse : (outputs,) error expected of the first part on new rows, working units; None for classes.
    log_score : mean log density (log probability) of the left-out rows after calibration, nats per row.
    coverage : (outputs,) share of left-out rows inside their 95 % interval; None for classes.
    tail : (outputs, 2) degrees of freedom and scale of the Student's t that errors follow, over predicted standard
        deviations without the allowance for few rows (``scale_uncertainty``); None for classes.
    noise_variation : how the noise depends on the input; None for constant noise, noise of the network, and classes.
    noise_head : how the noise follows that of the network; None where the network gives none.
    """

    weights: np.ndarray
    epistemic_factor: np.ndarray | None
    noise_var: np.ndarray | None
    temperature: float | None
    rmse: np.ndarray | None
    log_score: float
    coverage: np.ndarray | None
    tail: np.ndarray | None = None
    noise_variation: NoiseVariation | None = None
    noise_head: HeadNoise | None = None


def left_out_mean(values: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the members to which a row is new, and the variance between them.

    Parameters
    ----------
    values : (members, n, d).
    unseen : (members, n) booleans, at least one for each row.

    Returns
    -------
    Both ``(n, d)``. Where a row is new to fewer than two members the variance is that between all of them.
    """
    gate = unseen[:, :, None].astype(float)
    count = gate.sum(axis=0)
    mean = (values * gate).sum(axis=0) / count
    between = (gate * (values - mean) ** 2).sum(axis=0) / np.maximum(count - 1, 1)
    if len(values) > 1:
        between = np.where(count > 1, between, values.var(axis=0, ddof=1))
    return mean, between


def expected_squared_error(
    values: np.ndarray, unseen: np.ndarray, y: np.ndarray, num_members: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared error of the whole ensemble on each row as if new, the left-out mean, and the variance between members.

    The mean of ``u`` members has ``between / u`` more squared error than that of infinitely many, so the error of
    ``num_members`` is that of ``u`` less ``between * (1 / u - 1 / num_members)``: unbiased where all of that is taken
    off, and for a single row possibly negative.
    """
    mean, between = left_out_mean(values, unseen)
    count = unseen.sum(axis=0)[:, None]
    trust = len(y) / (len(y) + FULL_CORRECTION_ROWS)
    surplus = np.where(count > 1, trust * between * (1.0 / np.maximum(count, 1) - 1.0 / num_members), 0.0)
    return (mean - y) ** 2 - surplus, mean, between


def ensemble_error(values: np.ndarray, unseen: np.ndarray, y: np.ndarray, num_members: int) -> np.ndarray:
    """Mean squared error ``(outputs,)`` expected of ``num_members`` such members on new rows; NaN if any is."""
    squared, mean, _ = expected_squared_error(np.asarray(values, float), unseen, y, num_members)
    return np.maximum(squared.mean(axis=0), LEAST_ERROR * np.mean((mean - y) ** 2, axis=0))


def ensemble_log_loss(
    mean: np.ndarray, noise_var: np.ndarray, unseen: np.ndarray, y: np.ndarray, num_members: int
) -> float:
    """Mean negative log density, nats per row, expected of ``num_members`` such members on new rows.

    That of a Gaussian with the members' mean and, as variance, their mean noise variance ``(members, n, d)`` and the
    variance between them.
    """
    squared, _, between = expected_squared_error(mean, unseen, y, num_members)
    total = left_out_mean(noise_var, unseen)[0] + between * (1.0 - 1.0 / num_members)
    return -float(_log_score(squared, total).mean())


def scale_uncertainty(num_errors: int) -> float:
    """Factor on a variance that was fitted to so many independent errors; no more than two, however few they are."""
    return num_errors / max(num_errors - SCALE_PARAMETERS, 0.5 * num_errors)


def ensemble_probabilities(probabilities: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Class probabilities ``(n, classes)`` of each row by the members to which it is new."""
    return left_out_mean(np.asarray(probabilities, float), unseen)[0]


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability of the labels, in nats."""
    picked = probabilities[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(picked, np.finfo(float).tiny))))


def calibrate_variance(
    mean: np.ndarray,
    variance: np.ndarray,
    unseen: np.ndarray,
    parts: np.ndarray,
    y: np.ndarray,
    x: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    num_groups: int | None = None,
) -> OutOfFold:
    """The factors and noise with which the intervals of left-out rows are most likely, and the weights of the parts.

    Parameters
    ----------
    mean, variance : (members, n, outputs) predictions of every row by every member, noise not included.
    unseen : (members, n).
    parts : (members,) number of each member's part.
    y : (n, outputs) targets, working units.
    x : (n, …) inputs, for noise that may vary with them; None for constant noise.
    noise : (members, n, outputs) noise variance of every row, where the members give it; ``x`` is then None.
    num_groups : how many groups of rows were left out as wholes; None if each row is one.
    """
    num_groups = len(y) if num_groups is None else num_groups
    columns = None if x is None else Standard.of(table(x))
    values = None if columns is None or x is None else columns(table(x))
    found = [
        _calibrate_part(
            mean[parts == p], variance[parts == p], unseen[parts == p], y, values,
            None if noise is None else noise[parts == p], num_groups,
        )
        for p in np.unique(parts)
    ]  # fmt: skip
    scores = np.array([part.log_score for part in found])
    weights = scipy.special.softmax(STACKING * num_groups * scores)
    centres, totals = np.stack([part.centre for part in found]), np.stack([part.total for part in found])
    centre = np.tensordot(weights, centres, 1)
    total = np.tensordot(weights, totals + (centres - centre) ** 2, 1)
    squared = (centre - y) ** 2
    score = scores[0] if len(found) == 1 else np.mean(_log_score(squared, total))
    fitted = np.sqrt(total / scale_uncertainty(num_groups))
    tail = np.array([_fit_tail(z) for z in ((y - centre) / fitted).T])
    return OutOfFold(
        weights, np.stack([part.factor for part in found]), np.stack([part.noise_var for part in found]), None,
        np.sqrt(found[0].mse), float(score), np.mean(squared < 1.959964**2 * total, axis=0), tail,
        None if columns is None else _variation(found, columns), None if noise is None else _head(found),
    )  # fmt: skip


class _Part(NamedTuple):
    """Left-out predictions of one part: ``centre`` and calibrated variance ``total``, ``(n, outputs)``."""

    factor: np.ndarray
    noise_var: np.ndarray
    prediction: Standard
    coefficients: np.ndarray
    centre: np.ndarray
    total: np.ndarray
    mse: np.ndarray
    log_score: float
    own_noise: np.ndarray | None


def _calibrate_part(
    mean: np.ndarray,
    variance: np.ndarray,
    unseen: np.ndarray,
    y: np.ndarray,
    columns: np.ndarray | None,
    noise: np.ndarray | None,
    num_groups: int,
) -> _Part:
    """One part; ``columns`` (n, k) are what its noise depends on besides its prediction, None for constant noise.

    With ``noise`` (members, n, outputs) its noise is what its members say, but for a factor.
    """
    num_members, num_rows = len(mean), len(y)
    squared, centre, between = expected_squared_error(mean, unseen, y, num_members)
    within, _ = left_out_mean(variance, unseen)
    epistemic = within + between * (1.0 - 1.0 / num_members)  # what the variance over all members' draws will be
    prediction, shapes = Standard.of(centre), np.ones_like(centre)
    own_noise = None if noise is None else left_out_mean(noise, unseen)[0]
    if own_noise is not None:
        shapes = own_noise / _typical(own_noise)
    standard, fits, changes = prediction(centre), [], []
    for i in range(y.shape[1]):
        features = np.zeros((num_rows, 0)) if columns is None else np.column_stack([columns, standard[:, i]])
        fits.append(_fit_output(epistemic[:, i], squared[:, i], (centre - y)[:, i], features, shapes[:, i]))
        changes.append(shapes[:, i] * np.exp(features @ fits[i][2]))
    factor, noise_var, coefficients = (np.array(found) for found in zip(*fits, strict=True))
    factor, noise_var = factor * scale_uncertainty(num_groups), noise_var * scale_uncertainty(num_groups)
    total = factor * epistemic + noise_var * np.stack(changes, axis=1)
    mse = ensemble_error(mean, unseen, y, num_members)
    score = float(_log_score(squared, total).mean())
    return _Part(factor, noise_var, prediction, coefficients, centre, total, mse, score, own_noise)


def _typical(noise: np.ndarray) -> np.ndarray:
    """Geometric mean over rows: one row with much noise does not decide it."""
    return np.exp(np.log(noise).mean(axis=0))


def _head(parts: list[_Part]) -> HeadNoise:
    known = [(part.noise_var, part.own_noise) for part in parts if part.own_noise is not None]
    return HeadNoise(
        np.stack([noise_var / _typical(own) for noise_var, own in known]),
        np.stack([own.min(axis=0) for _, own in known]), np.stack([own.max(axis=0) for _, own in known]),
    )  # fmt: skip


def _variation(parts: list[_Part], columns: Standard) -> NoiseVariation:
    predictions = [part.prediction for part in parts]
    ranges = (np.stack([getattr(one, field.name) for one in predictions]) for field in dataclasses.fields(Standard))
    return NoiseVariation(np.stack([part.coefficients for part in parts]), columns, Standard(*ranges))


def _fit_output(
    epistemic: np.ndarray, squared: np.ndarray, error: np.ndarray, features: np.ndarray, shape: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """``(a, b, coefficients)`` of one output: the factor for errors that are normal, the noise with tails they show.

    ``shape`` (n,) is the noise of each row beside that of others, as far as it is known beforehand.
    """
    if squared.mean() < LEAST_ERROR * np.mean(error**2):  # as ``ensemble_error`` has it
        squared = LEAST_ERROR * error**2
    factor, noise_var = fit_variance(epistemic, squared, shape)
    chosen = slice(None, None, -(-len(error) // MOST_ROWS))
    features, shape, error, inside = features[chosen], shape[chosen], error[chosen], factor * epistemic[chosen]
    each = np.maximum(squared[chosen], LEAST_ERROR * error**2)  # a single corrected square may be negative
    coefficients, precision, dof = np.zeros(features.shape[1]), FIRST_PRECISION, GAUSSIAN_DOF
    for number in range(ROUNDS):
        noise = noise_var * shape * np.exp(features @ coefficients)
        if number and len(coefficients):
            precision = evidence_precision(coefficients, features, noise / (inside + noise), dof, precision)
        dof = max(_fit_tail(error / np.sqrt(inside + noise))[0], LEAST_FIT_DOF)
        noise_var, coefficients = fit_noise(inside, each, features, dof, noise_var, precision, shape)
    return factor, noise_var, coefficients


def _fit_tail(scaled: np.ndarray) -> tuple[float, float]:
    """Degrees of freedom and scale of a Student's t for standardised errors; nearly Gaussian where rows are few."""

    def negative(values: np.ndarray) -> float:
        dof, scale = MIN_DOF + np.exp(values[0]), np.exp(values[1])
        constant = scipy.special.gammaln([(dof + 1) / 2, dof / 2]) @ [1, -1] - 0.5 * np.log(np.pi * dof) - values[1]
        fit = len(scaled) * constant - 0.5 * (dof + 1) * np.sum(np.log1p((scaled / scale) ** 2 / dof))
        # The prior of the degrees of freedom is centred where the tails are those of a Gaussian for all purposes.
        return 0.5 * ((values[0] - np.log(GAUSSIAN_DOF)) / DOF_SPREAD) ** 2 - fit

    bounds = [(np.log(0.1), np.log(10.0 * GAUSSIAN_DOF)), (-3.0, 3.0)]
    starts = [(np.log(dof), 0.0) for dof in (3.0, GAUSSIAN_DOF)]
    runs = [least(negative, start, bounds, gradient=False) for start in starts]
    best = min(runs, key=lambda run: run.fun).x
    return float(MIN_DOF + np.exp(best[0])), float(np.exp(best[1]))


def _log_score(squared: np.ndarray, total: np.ndarray) -> np.ndarray:
    return -0.5 * np.sum(np.log(2.0 * np.pi * total) + squared / total, axis=1)


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Class probabilities to the power of one over ``temperature``, renormalised."""
    logs = np.log(np.maximum(np.asarray(probabilities, float), np.finfo(float).tiny)) / temperature
    return scipy.special.softmax(logs, axis=-1)


def calibrate_temperature(
    probabilities: np.ndarray, unseen: np.ndarray, labels: np.ndarray, num_groups: int | None = None
) -> OutOfFold:
    """The temperature that is most probable given the labels of left-out rows, and a prior about one.

    Parameters
    ----------
    probabilities : (members, n, classes) predictions of every row by every member.
    unseen : (members, n).
    labels : (n,) integers.
    num_groups : as for ``calibrate_variance``.
    """
    import scipy.optimize  # a tenth of a second, which most fits need not wait for

    left_out = ensemble_probabilities(probabilities, unseen)
    num_groups = len(labels) if num_groups is None else num_groups

    def loss(log_temperature: float) -> float:
        return log_loss(temper(left_out, float(np.exp(log_temperature))), labels)

    def objective(log_temperature: float) -> float:
        return loss(log_temperature) + 0.5 * (log_temperature / TEMPERATURE_SPREAD) ** 2 / num_groups

    found = scipy.optimize.minimize_scalar(objective, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    temperature = float(np.exp(found.x)) if found.fun < objective(0.0) else 1.0
    return OutOfFold(np.ones(1), None, None, temperature, None, -loss(np.log(temperature)), None)
