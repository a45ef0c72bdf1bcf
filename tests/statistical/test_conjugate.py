"""The conjugate case through the model itself: its draws are those of Bayesian linear regression.

The hidden layer is given and frozen, so the output layer is a linear
regression on its units. The model has no switch for known noise; a log-normal
prior of one percent around the value says the same: what is left of the
noise's freedom changes the reference by less than a tenth of its Monte-Carlo
error. ``test_engines`` has the case without any noise parameter.
"""

import numpy as np
import numpyro.distributions as dist
import pytest

import neurobayes as nb
from neurobayes.inference import NUTS

NUM_ROWS, HIDDEN = 40, 4
NOISE = np.array([0.3, 1.0])
PRIOR_STD = 1.5


def given_weights(num_outputs):
    rng = np.random.default_rng(7)
    return {
        "Dense0": {"bias": rng.normal(size=HIDDEN), "kernel": rng.normal(size=(2, HIDDEN))},
        "Dense1": {"bias": rng.normal(size=num_outputs), "kernel": rng.normal(size=(HIDDEN, num_outputs))},
    }


def features(X):
    first = given_weights(1)["Dense0"]
    return np.concatenate([np.ones((len(X), 1)), np.tanh(X @ first["kernel"] + first["bias"])], axis=1)


def problem(num_outputs):
    rng = np.random.default_rng(8)
    last = given_weights(num_outputs)["Dense1"]
    X = rng.normal(size=(NUM_ROWS, 2))
    mean = features(X) @ np.concatenate([last["bias"][None], last["kernel"]])
    return X, mean + rng.normal(size=mean.shape) * NOISE[:num_outputs]


@pytest.fixture(scope="module", params=[("nuts", 1), ("nuts", 2), ("last_layer", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def fitted(request):
    engine, num_outputs = request.param
    X, y = problem(num_outputs)
    noise_prior = dist.LogNormal(np.log(NOISE[:num_outputs]), 0.01)
    model = nb.PartialBNN(
        nb.FlaxMLP([HIDDEN], num_outputs), num_probabilistic_layers=1, deterministic_weights=given_weights(num_outputs),
        noise_prior=noise_prior, prior_mean="zero", standardize=False, num_backbones=1
    )  # fmt: skip
    model.fit(
        X, y, num_warmup=500, num_samples=1000, num_chains=2, priors_sigma=PRIOR_STD, progress_bar=False,
        engine=NUTS() if engine == "nuts" else engine,
    )  # fmt: skip
    return model, X, y


def test_posterior_mean_and_covariance_are_the_closed_form(fitted, bayesian_linear_regression, disagreement, shrunk):
    model, X, y = fitted
    samples = model.get_samples(chain_dim=True)
    for k in range(y.shape[1]):
        bias, kernel = samples["Dense1.bias"][..., k, None], samples["Dense1.kernel"][..., k]
        draws = np.concatenate([bias, kernel], axis=-1)
        mean, cov = bayesian_linear_regression(features(X), y[:, k], PRIOR_STD, NOISE[k])
        assert disagreement(draws, mean, cov) == []
        assert disagreement(shrunk(draws), mean, cov)


def test_outputs_are_independent_given_the_data(fitted):
    model, _, y = fitted
    if y.shape[1] == 1:
        assert model.get_samples()["Dense1.kernel"].shape[-1] == 1
        return
    kernel = model.get_samples()["Dense1.kernel"]  # (draws, hidden, 2)
    correlation = np.corrcoef(kernel[..., 0].T, kernel[..., 1].T)[:HIDDEN, HIDDEN:]
    assert np.abs(correlation).max() < 5 / np.sqrt(500)  # 500 effective draws would do


def test_predictions_are_the_closed_form(fitted, bayesian_linear_regression):
    model, X, y = fitted
    new = np.random.default_rng(9).normal(size=(30, 2))
    prediction = model.posterior_predictive(new)
    for k in range(y.shape[1]):
        mean, cov = bayesian_linear_regression(features(X), y[:, k], PRIOR_STD, NOISE[k])
        var = np.einsum("ni,ij,nj->n", features(new), cov, features(new))
        # 2,000 draws, at least 500 of them effective: five standard errors of a mean and of a variance.
        np.testing.assert_array_less(np.abs(prediction.mean[:, k] - features(new) @ mean), 5 * np.sqrt(var / 500))
        np.testing.assert_allclose(prediction.epistemic_var[:, k], var, rtol=5 * np.sqrt(2 / 500))
        np.testing.assert_allclose(prediction.aleatoric_var[:, k], NOISE[k] ** 2, rtol=0.01)


def test_predicted_moments_are_those_of_the_draws(fitted):
    """Analytic variance: no noise of its own beside the draws'; exact engines agree up to the noise of the draws."""
    model, X, _ = fitted
    samples = model.get_samples()
    weights = np.concatenate([samples["Dense1.bias"][:, None, :], samples["Dense1.kernel"]], axis=1).astype(float)
    draws = np.einsum("ni,sik->snk", features(X), weights)
    prediction = model.posterior_predictive(X)
    exact = model.posterior.analytic is not None
    off = 5 * draws.std(axis=0) / np.sqrt(len(draws)) if exact else 1e-4 * (1 + abs(draws.mean(axis=0)))
    spread = 5 * np.sqrt(2 / len(draws)) if exact else 1e-3
    assert (abs(prediction.mean - draws.mean(axis=0)) <= off).all()
    np.testing.assert_allclose(prediction.epistemic_var, draws.var(axis=0), rtol=spread)
    noise = samples["noise_std"].astype(float).reshape(len(draws), -1)
    np.testing.assert_allclose(
        prediction.var, draws.var(axis=0) + np.mean(noise**2, axis=0) * np.ones_like(prediction.mean), rtol=spread
    )
