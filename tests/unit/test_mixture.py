"""Predictions of several backbones against all their draws, written out in numpy."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

import neurobayes as nb
from neurobayes import mixture, trees
from neurobayes.mixture import Mixture
from neurobayes.networks import as_network
from neurobayes.noise_model import NoiseVariation, Standard
from neurobayes.out_of_fold import OutOfFold
from neurobayes.partition import Partition
from neurobayes.predictive import Source

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)
NETWORK = as_network(nb.FlaxMLP([4], 2))
COUNTS = (30, 9, 17)
PARTS = np.array([0, 1, 0])
WEIGHTS = np.array([0.3, 0.7])
FACTOR = np.array([[2.0, 0.5], [4.0, 1.0]])
NOISE_VAR = np.array([[0.3, 0.1], [0.02, 1.5]])
CALIBRATION = OutOfFold(WEIGHTS, FACTOR, NOISE_VAR, None, np.ones(2), 0.0, np.ones(2))
COEFFICIENTS = np.array([[[0.5, 0.0, -0.3, 0.2], [0.0, 0.4, 0.0, -0.5]], [[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]]])
VARIATION = NoiseVariation(
    COEFFICIENTS, *(Standard(*(np.full(shape, value) for value in (-1.4, 1.6, 0.1, 1.1))) for shape in [(3,), (2, 2)])
)


def source(seed, num_draws):
    """A backbone of its own weights, with draws about them and a noise of each draw."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(np.asarray, NETWORK.init(jax.random.key(seed), X)[0])
    masks = {"Dense1.kernel": np.ones((4, 2), bool), "Dense1.bias": np.ones(2, bool)}
    partition = Partition.from_masks(masks, trees.shapes(params))
    theta = np.asarray(partition.split(params)) + 0.5 * rng.normal(size=(num_draws, partition.size))
    return Source(NETWORK, partition, params, {}, theta.astype(np.float32),
                  rng.uniform(0.2, 1.5, size=(num_draws, 2)).astype(np.float32))  # fmt: skip


def outputs_of(source):
    """(draws, n, outputs) in float64."""
    frozen = {path: np.asarray(leaf, float) for path, leaf in trees.flatten(source.params).items()}
    hidden = np.tanh(X.astype(float) @ frozen["Dense0.kernel"] + frozen["Dense0.bias"])
    theta = source.theta.astype(float)  # bias first: leaves are ordered by name
    return np.einsum("nh,dho->dno", hidden, theta[:, 2:].reshape(-1, 4, 2)) + theta[:, None, :2]


SOURCES = tuple(source(seed, count) for seed, count in enumerate(COUNTS))
EACH = [outputs_of(one) for one in SOURCES]
DRAWS = np.concatenate(EACH)
PART_OF_DRAW = np.repeat(PARTS, COUNTS)
# Draws of a backbone count alike, backbones of a part count alike.
SHARES = np.concatenate([np.full(c, WEIGHTS[p] / (p == PARTS).sum() / c) for c, p in zip(COUNTS, PARTS, strict=True)])
PLAIN = Mixture(SOURCES, PARTS, WEIGHTS)
CALIBRATED = PLAIN._replace(calibration=CALIBRATION)
VARYING = PLAIN._replace(calibration=dataclasses.replace(CALIBRATION, noise_variation=VARIATION))


def part_mean(part):
    return np.mean([EACH[k].mean(axis=0) for k in np.flatnonzero(part == PARTS)], axis=0)


def components(parts):
    """Means ``(draws, n, outputs)`` and noise std of that shape of the mixture's Gaussians."""
    if parts.calibration is None:
        noise_std = np.concatenate([one.noise_std for one in SOURCES]).astype(float)[:, None, :]
        return DRAWS, np.broadcast_to(noise_std, DRAWS.shape)
    centre = np.stack([part_mean(0), part_mean(1)])[PART_OF_DRAW]
    stretched = centre + np.sqrt(FACTOR)[PART_OF_DRAW][:, None, :] * (DRAWS - centre)
    return stretched, np.sqrt(noise_vars(parts))[PART_OF_DRAW]


def noise_vars(parts):
    """Noise variance of each part and row, ``(parts, n, outputs)``."""
    found = np.broadcast_to(NOISE_VAR[:, None], (2, len(X), 2)).copy()
    if parts.calibration.noise_variation is not None:
        for part, output in np.ndindex(2, 2):
            features = np.column_stack([X, part_mean(part)[:, output]])
            standard = (np.clip(features, -1.4, 1.6) - 0.1) / 1.1
            found[part, :, output] *= np.exp(standard @ COEFFICIENTS[part, output])
    return found


@pytest.fixture(params=["plain", "calibrated", "varying"])
def parts(request):
    return {"plain": PLAIN, "calibrated": CALIBRATED, "varying": VARYING}[request.param]


def test_shares_of_the_draws():
    np.testing.assert_allclose(PLAIN.draw_weights, SHARES, rtol=1e-12)
    np.testing.assert_allclose(PLAIN.member_weights, [0.15, 0.7, 0.15], rtol=1e-12)
    np.testing.assert_allclose(PLAIN.draw_weights.sum(), 1.0, rtol=1e-12)
    assert mixture.num_draws(PLAIN) == sum(COUNTS)


@pytest.mark.parametrize("rows_at_once", [4, 10**6])
def test_moments_are_those_of_the_weighted_draws(monkeypatch, rows_at_once):
    monkeypatch.setattr(mixture, "ROWS_AT_ONCE", rows_at_once)
    mean, epistemic, noise_var = mixture.regression_moments(PLAIN, X)
    expected = np.tensordot(SHARES, DRAWS, 1)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(epistemic, np.tensordot(SHARES, (DRAWS - expected) ** 2, 1), rtol=1e-3, atol=1e-6)
    each = np.concatenate([one.noise_std for one in SOURCES]).astype(float) ** 2
    np.testing.assert_allclose(noise_var, np.broadcast_to(SHARES @ each, mean.shape), rtol=1e-6)


def test_calibration_stretches_the_variance_of_each_part_and_leaves_the_mean():
    mean, epistemic, noise_var = mixture.regression_moments(CALIBRATED, X)
    np.testing.assert_array_equal(mean, mixture.regression_moments(PLAIN, X)[0])
    np.testing.assert_allclose(noise_var, np.broadcast_to(WEIGHTS @ NOISE_VAR, mean.shape), rtol=1e-12)
    expected = 0.0
    for part in (0, 1):
        centre, members = part_mean(part), np.flatnonzero(part == PARTS)
        inside = np.mean([np.mean((EACH[k] - centre) ** 2, axis=0) for k in members], axis=0)
        expected = expected + WEIGHTS[part] * (FACTOR[part] * inside + (centre - mean) ** 2)
    np.testing.assert_allclose(epistemic, expected, rtol=1e-3)


@pytest.mark.parametrize("rows_at_once", [4, 10**6])
def test_the_noise_of_each_row(monkeypatch, rows_at_once):
    monkeypatch.setattr(mixture, "ROWS_AT_ONCE", rows_at_once)
    _, epistemic, noise_var = mixture.regression_moments(VARYING, X)
    np.testing.assert_allclose(noise_var, np.tensordot(WEIGHTS, noise_vars(VARYING), 1), rtol=1e-4)
    np.testing.assert_array_equal(epistemic, mixture.regression_moments(CALIBRATED, X)[1])
    assert noise_var[:, 0].max() > 1.5 * noise_var[:, 0].min()


def test_a_part_has_factor_times_epistemic_plus_noise():
    """With one part the predictive variance is ``a * epistemic + b``."""
    one = OutOfFold(np.ones(1), FACTOR[:1], NOISE_VAR[:1], None, np.ones(2), 0.0, np.ones(2))
    alone = Mixture(SOURCES, np.zeros(3, int), np.ones(1))
    mean, epistemic, _ = mixture.regression_moments(alone, X)
    calibrated = mixture.regression_moments(alone._replace(calibration=one), X)
    np.testing.assert_array_equal(calibrated[0], mean)
    np.testing.assert_allclose(calibrated[1] + calibrated[2], FACTOR[0] * epistemic + NOISE_VAR[0], rtol=1e-9)


def test_the_law_of_total_variance(parts):
    """Moments and draws are of one distribution: mean and variance of the mixture's Gaussians are the moments."""
    mean, epistemic, noise_var = mixture.regression_moments(parts, X)
    outputs, noise_std = mixture.function_draws(parts, X, np.arange(sum(COUNTS)))
    centre = np.tensordot(SHARES, outputs, 1)
    np.testing.assert_allclose(centre, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.tensordot(SHARES, (outputs - centre) ** 2, 1), epistemic, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(np.broadcast_to(np.tensordot(SHARES, noise_std**2, 1), mean.shape), noise_var, rtol=1e-5)


def test_draws_are_numbered_through_the_backbones(parts):
    picked = np.array([55, 0, 31, 29, 30, 38, 39, 0])
    outputs, noise_std = mixture.function_draws(parts, X, picked)
    expected, noise = components(parts)
    np.testing.assert_allclose(outputs, expected[picked], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.broadcast_to(noise_std, outputs.shape), noise[picked], rtol=1e-4)
    without, none = mixture.function_draws(parts, X, picked, noise=False)
    np.testing.assert_array_equal(without, outputs)
    assert none is None


@pytest.mark.parametrize("rows_at_once", [2**22, 8 * sum(COUNTS) * 2])
def test_quantiles_solve_the_distribution_function(parts, monkeypatch, rows_at_once):
    monkeypatch.setattr(mixture, "VALUES_PER_BLOCK", rows_at_once)
    levels = [0.025, 0.5, 0.9]
    solved = mixture.quantiles(parts, X, levels)
    assert solved.shape == (3, 20, 2)
    means, noise = components(parts)
    for i, level in enumerate(levels):
        for row, k in [(0, 0), (7, 1), (8, 0), (19, 1)]:

            def missing(value, row=row, k=k, level=level):
                return SHARES @ scipy.stats.norm.cdf(value, means[:, row, k], noise[:, row, k]) - level

            expected = scipy.optimize.brentq(missing, -50, 50, xtol=1e-10)
            np.testing.assert_allclose(solved[i, row, k], expected, atol=2e-3)


@pytest.mark.parametrize("rows_at_once", [2**22, 8 * sum(COUNTS) * 2])
def test_log_density_is_that_of_the_mixture(parts, monkeypatch, rows_at_once):
    monkeypatch.setattr(mixture, "VALUES_PER_BLOCK", rows_at_once)
    y = np.random.default_rng(5).normal(size=(20, 2))
    means, noise = components(parts)
    each = scipy.stats.norm.logpdf(y, means, noise).sum(axis=-1)
    expected = scipy.special.logsumexp(each, axis=0, b=SHARES[:, None])
    np.testing.assert_allclose(mixture.log_density(parts, X, y), expected, rtol=1e-4, atol=1e-4)


def test_the_density_integrates_to_one(parts):
    grid = np.linspace(-25, 25, 301)
    first, second = np.meshgrid(grid, grid, indexing="ij")
    y = np.stack([first.ravel(), second.ravel()], axis=1)
    row = np.broadcast_to(X[3], (len(y), 3))
    density = np.exp(mixture.log_density(parts, row, y)).reshape(first.shape)
    total = scipy.integrate.trapezoid(scipy.integrate.trapezoid(density, grid), grid)
    np.testing.assert_allclose(total, 1.0, rtol=2e-3)


def test_a_log_density_far_away_is_finite():
    assert np.isfinite(mixture.log_density(PLAIN, X[:2], np.full((2, 2), 1e4))).all()


class TestClasses:
    BY_DRAW = scipy.special.softmax(DRAWS, axis=-1)

    def tempered(self, temperature):
        return PLAIN._replace(calibration=OutOfFold(WEIGHTS, None, None, temperature, None, 0.0, None))

    def test_probabilities_are_those_of_the_weighted_draws(self):
        probabilities, entropy = mixture.class_moments(PLAIN, X)
        np.testing.assert_allclose(probabilities, np.tensordot(SHARES, self.BY_DRAW, 1), rtol=1e-4)
        np.testing.assert_allclose(entropy, SHARES @ scipy.stats.entropy(self.BY_DRAW, axis=-1), rtol=1e-4)

    def test_a_temperature_of_one_changes_nothing(self):
        for ours, plain in zip(mixture.class_moments(self.tempered(1.0), X), mixture.class_moments(PLAIN, X),
                               strict=True):  # fmt: skip
            np.testing.assert_allclose(ours, plain, rtol=1e-6)

    @pytest.mark.parametrize("temperature", [0.5, 4.0])
    def test_temperature(self, temperature):
        plain, _ = mixture.class_moments(PLAIN, X)
        probabilities, entropy = mixture.class_moments(self.tempered(temperature), X)
        powers = plain ** (1.0 / temperature)
        np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
        np.testing.assert_array_equal(probabilities.argmax(axis=1), plain.argmax(axis=1))
        assert (entropy <= scipy.stats.entropy(probabilities, axis=-1) + 1e-9).all() and (entropy > 0).all()


def test_one_backbone_is_the_backbone_itself():
    alone = Mixture(SOURCES[:1], np.zeros(1, int), np.ones(1))
    mean, epistemic, _ = mixture.regression_moments(alone, X)
    np.testing.assert_allclose(mean, EACH[0].mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(epistemic, EACH[0].var(axis=0), rtol=1e-3, atol=1e-6)


def test_other_weights_give_other_moments():
    """Negative control: shares matter."""
    other = mixture.regression_moments(PLAIN._replace(weights=WEIGHTS[::-1]), X)
    for ours, theirs in zip(mixture.regression_moments(PLAIN, X), other, strict=True):
        assert np.abs(ours - theirs).max() > 0.05
