"""Predictions from draws: streamed moments, quantiles and classes against all draws at once in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

import neurobayes as nb
from neurobayes import mixture, predictive, row_blocks, trees
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.predictive import ClassPrediction, RegressionPrediction, Source

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 3)).astype(np.float32)
NETWORK = as_network(nb.FlaxMLP([4], 2))
PARAMS = jax.tree.map(np.asarray, NETWORK.init(jax.random.key(0), X)[0])
SHAPES = trees.shapes(PARAMS)
LAST = Partition.from_masks({"Dense1.kernel": np.ones((4, 2), bool), "Dense1.bias": np.ones(2, bool)}, SHAPES)
SCATTERED = Partition.from_masks({"Dense0.kernel": RNG.random((3, 4)) < 0.5, "Dense1.bias": np.ones(2, bool)}, SHAPES)


def source_of(partition, num_draws=37, spread=0.5):
    rng = np.random.default_rng(1)
    centre = np.asarray(partition.split(PARAMS))
    theta = (centre + spread * rng.normal(size=(num_draws, partition.size))).astype(np.float32)
    noise_std = rng.uniform(0.2, 1.5, size=(num_draws, 2)).astype(np.float32)
    return Source(NETWORK, partition, PARAMS, {}, theta, noise_std)


def alone(source):
    """One backbone as a mixture."""
    return mixture.Mixture((source,), np.zeros(1, int), np.ones(1))


def outputs_by_hand(source, x):
    """(draws, n, outputs) in float64."""
    outputs = []
    for theta in source.theta:
        leaves = {path: np.array(leaf, float) for path, leaf in trees.flatten(source.params).items()}
        start = 0
        for path, mask in source.partition.masks().items():
            leaves[path][mask] = theta[start : start + mask.sum()]
            start += mask.sum()
        hidden = np.tanh(x.astype(float) @ leaves["Dense0.kernel"] + leaves["Dense0.bias"])
        outputs.append(hidden @ leaves["Dense1.kernel"] + leaves["Dense1.bias"])
    return np.stack(outputs)


@pytest.fixture(params=[(4096, 256), (16, 5), (4, 1), (32, 37)], ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
def blocks(request, monkeypatch):
    """Rows and draws evaluated at once: everything in one block, blocks that divide nothing, draws one by one."""
    rows, draws = request.param
    monkeypatch.setattr(row_blocks, "MAX_BLOCK_ROWS", rows)
    monkeypatch.setattr(predictive, "MAX_DRAWS_PER_BLOCK", draws)
    monkeypatch.setattr(mixture, "VALUES_PER_BLOCK", rows * draws)


@pytest.mark.parametrize("num_draws", [1, 37, 64])
def test_streamed_moments_are_those_of_all_draws(blocks, num_draws):
    source = source_of(LAST, num_draws)
    mean, var = predictive.regression_moments(source, X)
    outputs = outputs_by_hand(source, X)
    np.testing.assert_allclose(mean, outputs.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var, outputs.var(axis=0), rtol=1e-3, atol=1e-6)


def test_moments_of_partly_random_layers(blocks):
    source = source_of(SCATTERED)
    mean, var = predictive.regression_moments(source, X)
    outputs = outputs_by_hand(source, X)
    np.testing.assert_allclose(mean, outputs.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var, outputs.var(axis=0), rtol=1e-3, atol=1e-6)


def test_variance_of_a_large_offset_is_not_lost(blocks):
    """The mean of the squares minus the square of the mean would have no correct digit here."""
    source = source_of(LAST, 64, spread=0.0)
    theta = source.theta.copy()
    theta[:, :2] = 1000.0 + np.random.default_rng(2).normal(scale=0.05, size=(64, 2))  # the biases
    mean, var = predictive.regression_moments(source._replace(theta=theta), X)
    np.testing.assert_allclose(var, np.broadcast_to(theta[:, :2].astype(float).var(axis=0), var.shape), rtol=0.02)
    np.testing.assert_allclose(mean, outputs_by_hand(source._replace(theta=theta), X).mean(axis=0), rtol=1e-6)


def test_equal_draws_have_no_variance(blocks):
    source = source_of(LAST, 20, spread=0.0)
    _, var = predictive.regression_moments(source, X)
    np.testing.assert_allclose(var, 0.0, atol=1e-12)


def test_function_draws_are_the_network_at_each_draw(blocks):
    source = source_of(SCATTERED)
    draws = predictive.function_draws(source, X, source.theta[5:20])
    assert draws.shape == (15, 50, 2)
    np.testing.assert_allclose(draws, outputs_by_hand(source, X)[5:20], rtol=1e-4, atol=1e-5)


def test_nothing_random_gives_the_trained_network(blocks):
    source = source_of(Partition.nothing(SHAPES), 9)
    mean, var = predictive.regression_moments(source, X)
    trained = predictive.deterministic_outputs(NETWORK, PARAMS, {}, X)
    np.testing.assert_allclose(mean, trained, rtol=1e-6)
    np.testing.assert_allclose(var, 0.0, atol=1e-12)
    np.testing.assert_allclose(trained, outputs_by_hand(source, X)[0], rtol=1e-5, atol=1e-5)


def test_class_moments_are_those_of_all_draws(blocks):
    source = source_of(LAST)
    probabilities, entropy = predictive.class_moments(source, X)
    by_draw = scipy.special.softmax(outputs_by_hand(source, X), axis=-1)
    np.testing.assert_allclose(probabilities, by_draw.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(entropy, scipy.stats.entropy(by_draw, axis=-1).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 50])
def test_padding_never_leaks(num_rows):
    """A row's prediction is its own, whatever shares its block."""
    source = source_of(LAST)
    whole, part = predictive.regression_moments(source, X), predictive.regression_moments(source, X[:num_rows])
    for all_rows, some in zip(whole, part, strict=True):
        assert some.shape == (num_rows, 2)
        np.testing.assert_allclose(some, all_rows[:num_rows], rtol=1e-5, atol=1e-6)


def unit_direction(params, x):
    return jnp.tanh(x / jnp.linalg.norm(x, axis=1, keepdims=True)) @ params["kernel"]


@pytest.mark.parametrize("num_rows", [1, 5, 13])
def test_a_network_that_is_nan_at_a_row_of_zeros_is_safe(num_rows):
    params = {"kernel": np.ones((3, 2), np.float32)}
    network = as_network((unit_direction, params))
    theta = RNG.normal(size=(11, 6)).astype(np.float32)
    source = Source(network, Partition.everything({"kernel": (3, 2)}), params, {}, theta, np.ones((11, 2), np.float32))
    assert np.isnan(unit_direction(params, np.zeros((1, 3), np.float32))).all()
    results = [
        *predictive.regression_moments(source, X[:num_rows]), *predictive.class_moments(source, X[:num_rows]),
        predictive.deterministic_outputs(network, params, {}, X[:num_rows]),
        predictive.function_draws(source, X[:num_rows], theta),
        mixture.quantiles(alone(source), X[:num_rows], [0.1, 0.9]),
    ]  # fmt: skip
    assert all(np.isfinite(result).all() for result in results)


def quantiles_by_scipy(means, noise_std, level):
    def missing(value):
        return scipy.stats.norm.cdf(value, means, noise_std).mean() - level

    spread = 10 * noise_std.max()
    return scipy.optimize.brentq(missing, means.min() - spread, means.max() + spread, xtol=1e-10)


def test_quantiles_solve_the_mixtures_distribution_function(blocks):
    source, levels = source_of(LAST), [0.005, 0.025, 0.5, 0.9, 0.995]
    solved = mixture.quantiles(alone(source), X, levels)
    assert solved.shape == (5, 50, 2)
    outputs = outputs_by_hand(source, X)
    for i, level in enumerate(levels):
        for row in (0, 17, 49):
            for k in (0, 1):
                expected = quantiles_by_scipy(outputs[:, row, k], source.noise_std[:, k].astype(float), level)
                np.testing.assert_allclose(solved[i, row, k], expected, atol=2e-3 if level in (0.005, 0.995) else 5e-4)
    assert (np.diff(solved, axis=0) > 0).all()


def test_quantiles_of_a_single_draw_are_a_normals():
    source = source_of(LAST, 1)
    solved = mixture.quantiles(alone(source), X, [0.025, 0.975])
    outputs = outputs_by_hand(source, X)[0]
    for level, values in zip([0.025, 0.975], solved, strict=True):
        np.testing.assert_allclose(values, scipy.stats.norm.ppf(level, outputs, source.noise_std[0]), atol=1e-4)


def test_variance_of_a_regression_prediction_is_the_sum_of_its_parts():
    prediction = RegressionPrediction(np.zeros(2), np.array([1.0, 4.0]), np.array([3.0, 5.0]))
    np.testing.assert_array_equal(prediction.var, [4.0, 9.0])
    np.testing.assert_array_equal(prediction.std, [2.0, 3.0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction.mean = np.ones(2)  # type: ignore[misc]


def test_entropies_of_a_class_prediction_split_the_total():
    probabilities = np.float32([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    expected_entropy = np.float32([0.2, 0.1, 1.0])  # the second is above its total: rounding must not show
    split = ClassPrediction.of(probabilities, expected_entropy, None)
    np.testing.assert_allclose(split.total_entropy, scipy.stats.entropy(probabilities.astype(float), axis=1), rtol=1e-6)
    np.testing.assert_allclose(split.total_entropy, split.expected_entropy + split.mutual_information)
    assert (split.mutual_information >= 0).all()
    assert split.mutual_information[1] == 0.0
    np.testing.assert_allclose(split.probabilities.sum(axis=1), 1.0, rtol=1e-15)
