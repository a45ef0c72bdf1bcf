"""Corrections against closed forms, known distortions and the guarantee of split conformal intervals."""

import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from neurobayes import metrics
from neurobayes.calibration import METHODS, Temperature, fit_calibration
from neurobayes.errors import CalibrationWarning, DataError, OptionError

RNG = np.random.default_rng(0)
few_rows = pytest.mark.filterwarnings("ignore:calibration by:neurobayes.errors.CalibrationWarning")


def gaussian_rows(n, scale=1.0, bias=0.0, seed=0):
    """Targets whose scaled error is ``bias + scale * standard normal``, with uneven predicted variances."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(5, 2, n), rng.uniform(0.3, 4.0, n)
    return mean + np.sqrt(var) * (bias + scale * rng.standard_normal(n)), mean, var


def numbers(method, n=50, **kwargs):
    return fit_calibration(method, *gaussian_rows(n, **kwargs))


def coverage(correction, level, y, mean, var):
    return metrics.interval_coverage(y, *correction.interval(mean, np.sqrt(var), level))


# Variance


def test_the_variance_factor_is_the_mean_squared_scaled_error():
    correction = fit_calibration("variance", [1.0, 5.0] * 10, [0.0, 2.0] * 10, [4.0, 1.0] * 10)
    np.testing.assert_allclose(correction.factor, [(1 / 4 + 9) / 2])
    np.testing.assert_allclose(correction.variance([2.0, 4.0]), [9.25, 18.5])


def test_the_variance_factor_has_the_highest_likelihood():
    y, mean, var = gaussian_rows(200, scale=2.0)
    factor = fit_calibration("variance", y, mean, var).factor[0]
    best = metrics.nlpd(y, mean, factor * var)
    assert best < min(metrics.nlpd(y, mean, f * var) for f in (0.99 * factor, 1.01 * factor, 1.0))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_variance_factor_recovers_a_known_scale(scale):
    factor = numbers("variance", 4000, scale=scale).factor[0]
    assert factor == pytest.approx(scale**2, rel=4 * math.sqrt(2 / 4000))


def test_variance_scaling_stretches_any_distribution_about_its_mean():
    correction = numbers("variance", scale=2.0)
    root = math.sqrt(correction.factor[0])
    skewed = stats.gamma(2.0)
    q = correction.quantiles([0.1, 0.7], np.full(3, skewed.mean()), np.ones(3), lambda p: skewed.ppf(p)[:, None])
    np.testing.assert_allclose(q, np.tile(2 + root * (skewed.ppf([[0.1], [0.7]]) - 2), 3))


def test_intervals_of_scaled_variance_are_gaussian():
    y, mean, var = gaussian_rows(40, scale=2.0)
    correction = fit_calibration("variance", y, mean, var)
    expected = metrics.gaussian_interval(mean, correction.variance(var), 0.8)
    np.testing.assert_allclose(correction.interval(mean, np.sqrt(var), 0.8), expected)


# Isotonic


@pytest.mark.parametrize(("scale", "bias"), [(3.0, 0.0), (0.4, 0.0), (1.0, 1.5), (6.0, -2.0)])
def test_isotonic_mends_a_wrong_gaussian_at_every_level(scale, bias):
    correction = numbers("isotonic", 2000, scale=scale, bias=bias)
    y, mean, var = gaussian_rows(4000, scale=scale, bias=bias, seed=1)
    before = metrics.coverage(y, mean, var, 0.9)
    levels = np.array([0.025, 0.2, 0.5, 0.8, 0.975])
    below = np.mean(y <= correction.quantiles(levels, mean, np.sqrt(var)), axis=1)
    assert abs(before - 0.9) > 0.09
    np.testing.assert_allclose(below, levels, atol=0.04)  # 3 standard errors of 2,000 and 4,000 rows
    np.testing.assert_allclose(correction.variance(np.ones(2)), scale**2, rtol=0.12)
    np.testing.assert_allclose(correction.mean(np.full(2, 7.0), np.full(2, 3.0)), 7 + 3 * bias, atol=0.3 * scale)


def test_isotonic_learns_a_shape_that_no_factor_can_mend():
    rng = np.random.default_rng(0)
    y, zeros, ones = rng.exponential(size=3000), np.zeros(3000), np.ones(3000)
    q = fit_calibration("isotonic", y, zeros, ones).quantiles([0.05, 0.5, 0.95], zeros[:1], ones[:1])[:, 0]
    np.testing.assert_allclose(q, stats.expon.ppf([0.05, 0.5, 0.95]), rtol=0.1)
    stretched = fit_calibration("variance", y, zeros, ones).quantiles([0.05, 0.5, 0.95], zeros[:1], ones[:1])[:, 0]
    assert stretched[0] < -1


@given(st.lists(st.integers(-40, 40), min_size=20, max_size=60, unique=True))
def test_the_share_of_calibration_rows_below_each_quantile_is_exact(tenths):
    y = np.array(tenths) / 10
    n, zeros, ones = len(y), np.zeros(len(y)), np.ones(len(y))
    correction = fit_calibration("isotonic", y, zeros, ones)
    levels = np.arange(1, n + 1) / (n + 1)
    q = correction.quantiles(levels, zeros, ones)[:, 0]
    np.testing.assert_allclose(q, np.sort(y), atol=1e-9)
    fine = correction.quantiles(np.linspace(1e-6, 1 - 1e-6, 201), zeros, ones)[:, 0]
    assert (np.diff(fine) >= 0).all() and fine[0] < y.min() and fine[-1] > y.max()


def test_rows_with_equal_scores_share_one_level():
    y = np.repeat([-1.0, 0.0, 2.0], 10)
    ((levels, scores),) = fit_calibration("isotonic", y, np.zeros(30), np.ones(30)).knots
    np.testing.assert_allclose(scores, [-1, 0, 2])
    np.testing.assert_allclose(levels, np.array([5.5, 15.5, 25.5]) / 31)


MIXTURE = stats.norm(-2, 0.5), stats.norm(3, 1.0)
GRID = np.linspace(-12, 14, 40001)
GRID_CDF = (MIXTURE[0].cdf(GRID) + MIXTURE[1].cdf(GRID)) / 2


def mixture_quantiles(num_rows):
    return lambda levels: np.repeat(np.interp(levels, GRID_CDF, GRID)[:, None], num_rows, axis=1)


def test_isotonic_takes_quantiles_that_are_not_gaussian():
    """A bimodal model that is right stays as it is; its Gaussian approximation would not."""
    rng = np.random.default_rng(0)
    n = 4000
    y = np.where(rng.random(n) < 0.5, rng.normal(-2, 0.5, n), rng.normal(3, 1.0, n))
    mean, var = np.full(n, 0.5), np.full(n, np.var(y))
    correction = fit_calibration("isotonic", y, mean, var, quantile_function=mixture_quantiles(n))
    assert correction.shift[0] == pytest.approx(0, abs=0.06) and correction.factor[0] == pytest.approx(1, abs=0.08)
    levels = np.array([0.1, 0.3, 0.7, 0.9])
    q = correction.quantiles(levels, mean[:2], np.ones(2), mixture_quantiles(2))
    np.testing.assert_allclose(q, mixture_quantiles(2)(levels), atol=0.12)


def test_isotonic_moments_are_those_of_the_errors_also_of_a_narrow_mixture():
    """A model with a narrow peak and rare far components: its scores are far larger than errors over its std."""
    rng = np.random.default_rng(3)
    n = 2000
    y, mean, var = 0.3 + 0.5 * rng.standard_t(3, n), np.zeros(n), np.full(n, 1.0)

    def own(levels):
        return np.repeat(0.01 * stats.norm.ppf(levels)[:, None], n, axis=1)

    correction = fit_calibration("isotonic", y, mean, var, quantile_function=own)
    assert correction.spread[0] > 20  # which is no factor on the standard deviation
    np.testing.assert_allclose(correction.mean(mean[:2], np.ones(2)), y.mean(), rtol=1e-6)
    np.testing.assert_allclose(correction.variance(var[:2]), y.var(ddof=1), rtol=1e-6)
    median = correction.quantiles([0.5], mean, np.ones(n), own)[0]
    np.testing.assert_allclose(median, np.median(y), atol=0.05)


def test_quantiles_beyond_the_looked_up_ones_follow_straight_lines():
    y, mean, var = gaussian_rows(400, scale=8.0)

    def own(levels):
        return mean + np.sqrt(var) * stats.norm.ppf(levels)[:, None]

    correction = fit_calibration("isotonic", y, mean, var, quantile_function=own)
    levels, std = [0.01, 0.5, 0.99], np.sqrt(var)
    expected = fit_calibration("isotonic", y, mean, var).quantiles(levels, mean, std)
    assert np.abs((expected - mean) / std).max() > 10  # far outside the scores that are looked up
    np.testing.assert_allclose(correction.quantiles(levels, mean, std, own), expected, rtol=1e-6)


# Conformal


@given(st.integers(20, 300), st.integers(1, 199))
@example(99, 110)  # 0.55 * 100 is 55.00000000000001
def test_the_conformal_rank_is_exact_and_too_few_rows_are_refused(n, halves_of_a_percent):
    level = Fraction(halves_of_a_percent, 200)
    rank = math.ceil((n + 1) * level)
    correction = fit_calibration("conformal", np.arange(n, 0, -1.0), np.zeros(n), np.ones(n))
    if rank <= n:
        assert correction.multiplier(float(level)) == [rank]
        return
    needed = next(m for m in range(n, 10_000) if math.ceil((m + 1) * level) <= m)
    with pytest.raises(OptionError, match=rf"at least {needed} calibration rows and there are {n}"):
        correction.multiplier(float(level))


@pytest.mark.parametrize(("n", "level", "rank"), [(20, 0.9, 19), (39, 0.95, 38), (25, 0.5, 13)])
def test_conformal_coverage_over_many_splits_is_what_the_theorem_says(n, level, rank):
    """Each column is one split, of a model that is wrong in scale and in the tails."""
    splits = 4000
    residuals = stats.t(2).rvs((n, splits), random_state=1)
    std = np.random.default_rng(2).uniform(0.1, 3.0, (n, splits))
    correction = fit_calibration("conformal", 5 * std * residuals, np.zeros((n, splits)), std**2)
    inside = 2 * stats.t(2).cdf(correction.multiplier(level) / 5) - 1
    expected = rank / (n + 1)
    assert level <= expected <= level + 1 / (n + 1)
    standard_error = math.sqrt(expected * (1 - expected) / (n + 2) / splits)
    assert inside.mean() == pytest.approx(expected, abs=4 * standard_error)
    assert 4 * standard_error < 0.25 / (n + 1)  # the neighbouring rank would fail


def test_conformal_intervals_are_the_mean_and_a_multiple_of_each_std():
    y, mean, var = gaussian_rows(60, scale=2.0)
    correction = fit_calibration("conformal", y, mean, var)
    low, high = correction.interval([1.0, 2.0], [1.0, 3.0], 0.9)
    margin = np.sort(np.abs(y - mean) / np.sqrt(var))[54] * np.array([1.0, 3.0])  # ceil(61 * 0.9) = 55
    np.testing.assert_allclose(low, np.subtract([1, 2], margin))
    np.testing.assert_allclose(high, np.add([1, 2], margin))


# Temperature


def classes(n, temperature=1.0, seed=0):
    """Labels, and the probabilities they were drawn from raised to the power ``temperature``."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.full(3, 0.7), n)
    labels = (rng.random((n, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    stated = true**temperature
    return labels, stated / stated.sum(axis=1, keepdims=True), true


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    labels, stated, true = classes(8000, temperature)
    correction = fit_calibration("temperature", labels, probabilities=stated)
    assert correction.temperature == pytest.approx(temperature, rel=0.06)
    np.testing.assert_allclose(correction.probabilities(stated), true, atol=0.03)


def test_a_temperature_is_the_power_of_the_probabilities():
    p = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    np.testing.assert_allclose(Temperature(30, 2.0).probabilities(p)[0], np.sqrt(p[0]) / np.sqrt(p[0]).sum())
    np.testing.assert_allclose(Temperature(30, 2.0).probabilities(p)[1], [0, 0.5, 0.5], atol=1e-100)
    np.testing.assert_allclose(Temperature(30, 1.0).probabilities(p), p, atol=1e-100)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 8.0))
def test_a_temperature_never_worsens_the_loss_or_changes_the_class(seed, temperature):
    labels, stated, _ = classes(60, temperature, seed)
    corrected = fit_calibration("temperature", labels, probabilities=stated).probabilities(stated)
    assert metrics.nll(labels, corrected) <= metrics.nll(labels, stated) + 1e-9
    np.testing.assert_array_equal(corrected.argmax(1), stated.argmax(1))
    np.testing.assert_allclose(corrected.sum(1), 1)


def test_equal_probabilities_keep_a_temperature_of_one():
    correction = fit_calibration("temperature", np.arange(30) % 3, probabilities=np.full((30, 3), 1 / 3))
    assert correction.temperature == 1.0


@pytest.mark.parametrize("labels", [np.zeros(30), np.ones(30)], ids=["all_right", "all_wrong"])
def test_a_likelihood_without_a_maximum_warns(labels):
    with pytest.warns(CalibrationWarning, match="no temperature between 0.05 and 20"):
        fit_calibration("temperature", labels, probabilities=np.tile([0.8, 0.2], (30, 1)))


# All of them


@pytest.mark.parametrize("method", ["variance", "isotonic", "conformal"])
def test_several_outputs_are_corrected_one_by_one(method):
    parts = [gaussian_rows(60, scale=scale, seed=i) for i, scale in enumerate((0.5, 1.0, 4.0))]
    y, mean, var = (np.stack(arrays, axis=1) for arrays in zip(*parts, strict=True))
    together = fit_calibration(method, y, mean, var)
    low, high = together.interval(mean, np.sqrt(var), 0.9)
    assert low.shape == high.shape == (60, 3)
    for j, part in enumerate(parts):
        alone = fit_calibration(method, *part).interval(mean[:, j], np.sqrt(var[:, j]), 0.9)
        np.testing.assert_allclose((low[:, j], high[:, j]), alone)


def test_a_quantile_function_of_several_outputs_is_looked_up_at_the_scores_of_each():
    parts = [gaussian_rows(80, scale=scale, seed=i) for i, scale in enumerate((0.5, 3.0))]
    y, mean, var = (np.stack(arrays, axis=1) for arrays in zip(*parts, strict=True))
    std = np.sqrt(var)

    def own(levels):
        return mean + std * stats.norm.ppf(levels)[:, None, None]

    correction = fit_calibration("isotonic", y, mean, var, quantile_function=own)
    expected = fit_calibration("isotonic", y, mean, var).quantiles([0.05, 0.4, 0.9], mean, std)
    np.testing.assert_allclose(correction.quantiles([0.05, 0.4, 0.9], mean, std, own), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
@pytest.mark.parametrize("method", ["variance", "isotonic", "conformal"])
def test_bounds_have_the_shape_of_the_mean(method, shape):
    y, mean, var = (array.reshape(shape) for array in gaussian_rows(40, scale=2.0))
    low, high = fit_calibration(method, y, mean, var).interval(mean, np.sqrt(var), 0.9)
    assert low.shape == high.shape == shape and (low < high).all()


def corrections():
    labels, stated, _ = classes(60, 2.0)
    made = {name: numbers(name, 60, scale=2.0) for name in METHODS if name != "temperature"}
    return {**made, "temperature": fit_calibration("temperature", labels, probabilities=stated)}


CALLS = {
    "mean": (lambda c: c.mean(np.ones(3), np.ones(3)), {"isotonic"}),
    "variance": (lambda c: c.variance(np.ones(3)), {"variance", "isotonic"}),
    "quantiles": (lambda c: c.quantiles([0.2, 0.9], np.ones(3), np.ones(3)), {"variance", "isotonic"}),
    "interval": (lambda c: c.interval(np.ones(3), np.ones(3)), {"variance", "isotonic", "conformal"}),
    "probabilities": (lambda c: c.probabilities([[0.9, 0.1], [0.3, 0.7]]), {"temperature"}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", METHODS)
def test_each_changes_what_it_says_and_refuses_the_rest(method, call):
    correction, (apply, applies_to) = corrections()[method], CALLS[call]
    if method in applies_to:
        assert np.isfinite(apply(correction)).all()
        return
    with pytest.raises(OptionError, match=f"calibration by '{method}' does not change .* only {correction.changes}"):
        apply(correction)


@pytest.mark.parametrize("method", METHODS)
def test_corrections_can_be_pickled_and_cannot_be_changed(method):
    correction, (apply, _) = corrections()[method], CALLS["probabilities" if method == "temperature" else "interval"]
    again = pickle.loads(pickle.dumps(correction))
    np.testing.assert_array_equal(apply(again), apply(correction))
    assert again.num_rows == correction.num_rows == 60
    with pytest.raises(dataclasses.FrozenInstanceError):
        correction.num_rows = 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [19, 20])
def test_fewer_than_twenty_rows_warn(method, n, recwarn):
    if method == "temperature":
        labels, stated, _ = classes(n, 2.0, seed=3)
        fit_calibration(method, labels, probabilities=stated)
    else:
        numbers(method, n, scale=2.0)
    found = [str(w.message) for w in recwarn if issubclass(w.category, CalibrationWarning) and "rows" in str(w.message)]
    assert len(found) == (n < 20) and all("has 19 rows" in text for text in found)


# What is refused


Y, MEAN, VAR = gaussian_rows(30)
LABELS, STATED, _ = classes(30)
FAULTS = {
    "unknown": (lambda: fit_calibration("isotone", Y, MEAN, VAR), OptionError, "closest: 'isotonic'"),
    "no_mean": (lambda: fit_calibration("variance", Y), OptionError, "learns from y, mean and var"),
    "both": (lambda: fit_calibration("variance", Y, MEAN, VAR, probabilities=STATED), OptionError, "without prob"),
    "no_prob": (lambda: fit_calibration("temperature", LABELS, MEAN, VAR), OptionError, "probabilities="),
    "function": (
        lambda: fit_calibration("variance", Y, MEAN, VAR, quantile_function=lambda p: p), OptionError, "leave quant",
    ),
    "shapes": (lambda: fit_calibration("conformal", Y, MEAN[:, None], VAR), DataError, "nothing is broadcast"),
    "var": (lambda: fit_calibration("conformal", Y, MEAN, VAR - 5), DataError, "not positive"),
    "three_axes": (lambda: fit_calibration("variance", *[np.ones((4, 2, 2))] * 3), DataError, r"\(n, d\)"),
    "nan": (lambda: fit_calibration("isotonic", np.where(Y > 8, np.nan, Y), MEAN, VAR), DataError, "non-finite"),
    "exact": (lambda: fit_calibration("variance", MEAN, MEAN, VAR), DataError, "every prediction"),
    "constant": (lambda: fit_calibration("isotonic", MEAN, MEAN, VAR), DataError, "different errors"),
    "labels": (lambda: fit_calibration("temperature", LABELS + 1, probabilities=STATED), DataError, "0..2"),
    "level": (lambda: numbers("conformal").interval(MEAN, VAR, 95), OptionError, "95 % as 0.95"),
    "outputs": (lambda: numbers("variance").variance(np.ones((5, 2))), DataError, r"\(5, 2\).* 1 output"),
    "outputs_of_mean": (lambda: numbers("isotonic").interval(*[np.ones((5, 2))] * 2), DataError, "1 output"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_meant_raises(fault):
    call, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        call()


@few_rows
def test_a_single_row_gives_a_factor_but_no_map():
    assert fit_calibration("variance", [3.0], [0.0], [1.0]).factor == [9.0]
    with pytest.raises(DataError, match="at least two rows"):
        fit_calibration("isotonic", [3.0], [0.0], [1.0])
