"""Linear regression on an eigendecomposition against dense matrices."""

import numpy as np
import pytest

from neurobayes.linear_regression import OutputPosterior, decompose


@pytest.mark.parametrize("num_nodes", [2, 9])  # fewer and more than the directions, which are summed in another order
def test_moments_are_those_of_the_mixture_over_the_noise(num_nodes):
    rng = np.random.default_rng(0)
    num_features, n = 4, 5
    slopes, targets, prior_std = rng.normal(size=(num_features, n)), rng.normal(size=n), rng.uniform(0.5, 2.0, 4)
    noise_std, scale = np.geomspace(0.05, 5.0, num_nodes), np.geomspace(0.7, 1.4, num_nodes)
    weights = rng.dirichlet(np.ones(num_nodes))
    (spectrum,) = decompose(slopes * prior_std[:, None], [targets], np.ones(n))
    posterior = OutputPosterior(np.arange(num_features), prior_std, spectrum, noise_std, scale, weights)
    new = rng.normal(size=(num_features, 3))
    means, variances = [], []
    for noise, factor in zip(noise_std, scale, strict=True):
        cov = np.linalg.inv(slopes @ slopes.T / noise**2 + np.diag((factor * prior_std) ** -2.0))
        means.append(new.T @ cov @ slopes @ targets / noise**2)
        variances.append(np.sum(new * (cov @ new), axis=0))
    expected_mean = weights @ means
    between = weights @ (np.array(means) - expected_mean) ** 2
    mean, variance = posterior.moments(np.ones(3), new)
    np.testing.assert_allclose(mean, 1.0 + expected_mean, rtol=1e-9)
    np.testing.assert_allclose(variance, weights @ variances + between, rtol=1e-9)
    assert np.any(between > 0.05 * variance)
