"""Likelihoods against scipy: every constant, every row on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from neurobayes.likelihoods import (
    LOG_STD_BOUNDS,
    Categorical,
    Gaussian,
    HeteroskedasticGaussian,
    RowLoss,
    mean_noise_var,
    split_outputs,
)

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


class TestHeteroskedasticGaussian:
    likelihood = HeteroskedasticGaussian()

    @pytest.mark.parametrize("num_targets", [1, 3])
    def test_the_second_half_is_the_logarithm_of_the_standard_deviation(self, num_targets):
        mean, log_std, y = RNG.normal(size=(3, 6, num_targets)).astype(np.float32)
        outputs = np.concatenate([mean, log_std], axis=1)
        expected = scipy.stats.norm.logpdf(y.astype(float), mean, np.exp(log_std.astype(float))).sum(axis=1)
        for noise_std in (np.ones(1), np.full(num_targets, 7.0)):  # the assumed noise has no say
            np.testing.assert_allclose(self.likelihood.log_prob(outputs, y, noise_std), expected, rtol=1e-5)
        assert self.likelihood.num_noise(num_targets) == 0
        np.testing.assert_array_equal(self.likelihood.means(outputs), mean)

    def test_samples_have_that_standard_deviation(self):
        outputs = np.repeat(np.float32([[2.0, -1.0, np.log(0.1), np.log(5.0)]]), 20_000, axis=0)
        drawn = np.asarray(self.likelihood.sample(jax.random.key(0), outputs, np.ones(1)))
        error = 4 / np.sqrt(2 * len(drawn))  # four standard errors of a standard deviation
        np.testing.assert_allclose(drawn.std(axis=0), [0.1, 5.0], rtol=error)
        np.testing.assert_allclose(drawn.mean(axis=0), [2.0, -1.0], atol=4 * 5.0 / np.sqrt(len(drawn)))

    def test_the_root_of_the_fisher_information_is_that_of_the_expected_hessian(self):
        outputs = jnp.float32([0.3, -2.0, -1.0, 0.7])
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact: the Hessian is quadratic in the target
        mean, log_std = (np.asarray(part) for part in split_outputs(outputs))

        def hessian(y):
            return -jax.hessian(lambda o: self.likelihood.log_prob(o[None], y[None], jnp.ones(1))[0])(outputs)

        pairs = np.array([(a, b) for a in range(5) for b in range(5)])
        hessians = jax.jit(jax.vmap(hessian))(np.float32(mean + np.exp(log_std) * nodes[pairs]))
        expected = np.average(hessians, axis=0, weights=weights[pairs].prod(axis=1))
        root = np.asarray(self.likelihood.fisher_root(outputs))
        np.testing.assert_allclose(np.diag(root**2), expected, rtol=1e-5, atol=1e-5)

    def test_extreme_outputs_overflow_nowhere(self):
        outputs, y = np.float32([[0.0, -1e4], [0.0, 1e4], [1e3, -200.0]]), np.float32([[1e3], [1e3], [-1e3]])

        def total(outputs):
            return self.likelihood.log_prob(outputs, y, np.ones(1)).sum()

        value, gradient = jax.value_and_grad(total)(outputs)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert np.isfinite(self.likelihood.sample(jax.random.key(0), outputs, np.ones(1))).all()
        np.testing.assert_array_equal(split_outputs(outputs)[1][:, 0], np.float32(LOG_STD_BOUNDS)[[0, 1, 0]])
        # Where the bound holds, the rows say nothing about the logarithm.
        np.testing.assert_array_equal(self.likelihood.fisher_root(outputs)[:, 1], 0.0)


@pytest.mark.parametrize(
    "likelihood", [Gaussian(), HeteroskedasticGaussian(), Categorical()], ids=lambda value: type(value).__name__
)
def test_equal_likelihoods_key_the_same_program(likelihood):
    assert likelihood == type(likelihood)()
    assert hash(likelihood) == hash(type(likelihood)())


def test_mean_noise_variance_is_that_of_draws():
    mean, var = np.array([-1.0, 0.3, 0.0]), np.array([0.1, 0.2, 0.0])
    draws = np.exp(2.0 * np.random.default_rng(0).normal(mean, np.sqrt(var), size=(100_000, 3)))
    error = 5.0 * draws.std(axis=0) / np.sqrt(len(draws)) + 1e-12
    assert np.all(np.abs(mean_noise_var(mean, var) - draws.mean(axis=0)) < error)
