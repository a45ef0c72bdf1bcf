"""Likelihoods against scipy: every constant, every row on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from neurobayes.likelihoods import Categorical, Gaussian, RowLoss

RNG = np.random.default_rng(0)
OUTPUTS = RNG.normal(size=(6, 3)).astype(np.float32)
TARGETS = RNG.normal(size=(6, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2], np.int32)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_gaussian_is_scipys_normal_with_a_standard_deviation_per_output(num_outputs):
    outputs, y = OUTPUTS[:, :num_outputs], TARGETS[:, :num_outputs]
    noise_std = np.float32([0.3, 1.0, 4.0])[:num_outputs]
    expected = scipy.stats.norm.logpdf(y.astype(float), outputs, noise_std).sum(axis=1)
    np.testing.assert_allclose(Gaussian().log_prob(outputs, y, noise_std), expected, rtol=1e-5)
    assert Gaussian().num_noise(num_outputs) == num_outputs
    assert Gaussian().is_regression


def test_gaussian_noise_is_a_standard_deviation_not_a_variance():
    at_centre = Gaussian().log_prob(np.zeros((1, 1)), np.zeros((1, 1)), np.array([0.1]))
    np.testing.assert_allclose(at_centre, -np.log(0.1 * np.sqrt(2 * np.pi)), rtol=1e-6)


def test_categorical_is_the_log_of_the_softmax_at_the_label():
    expected = scipy.special.log_softmax(OUTPUTS.astype(float), axis=1)[np.arange(6), LABELS]
    np.testing.assert_allclose(Categorical().log_prob(OUTPUTS, LABELS, np.ones(1)), expected, rtol=1e-5)
    assert Categorical().num_noise(3) == 0
    assert not Categorical().is_regression


def test_categorical_is_finite_for_extreme_logits():
    outputs = np.float32([[1000.0, -1000.0], [1000.0, -1000.0]])
    values = Categorical().log_prob(outputs, np.int32([0, 1]), np.ones(1))
    np.testing.assert_allclose(values, [0.0, -2000.0])
    gradient = jax.grad(lambda o: Categorical().log_prob(o, np.int32([0, 1]), np.ones(1)).sum())(outputs)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [-1.0, 1.0]])


def test_row_loss_is_a_negative_log_density():
    def loss(outputs, y):
        return jnp.abs(outputs - y).sum(axis=-1)

    likelihood = RowLoss(loss)
    expected = -np.abs(OUTPUTS.astype(float) - TARGETS).sum(axis=1)
    np.testing.assert_allclose(likelihood.log_prob(OUTPUTS, TARGETS, np.ones(1)), expected, rtol=1e-5)
    assert likelihood.num_noise(3) == 0
    assert likelihood == RowLoss(loss)


@pytest.mark.parametrize("likelihood", [Gaussian(), Categorical()], ids=lambda value: type(value).__name__)
def test_equal_likelihoods_key_the_same_program(likelihood):
    assert likelihood == type(likelihood)()
    assert hash(likelihood) == hash(type(likelihood)())
