"""Prior scales learnt by the evidence."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import neurobayes as nb
from neurobayes.errors import OptionError
from neurobayes.inference.empirical_prior import _log_evidence

RNG = np.random.default_rng(0)
DESIGN, NOISE = RNG.normal(size=(12, 5)), 0.3
Y = DESIGN @ RNG.normal(size=5) + NOISE * RNG.normal(size=12)
CURVATURE, PULL = DESIGN.T @ DESIGN / NOISE**2, DESIGN.T @ Y / NOISE**2


def marginal(scale):
    """The log evidence of the linear model by its multivariate normal."""
    cov = DESIGN @ np.diag(scale**2) @ DESIGN.T + NOISE**2 * np.eye(12)
    return scipy.stats.multivariate_normal(np.zeros(12), cov).logpdf(Y)


def test_evidence_of_a_linear_model_is_its_marginal_likelihood():
    scales = np.exp(RNG.normal(size=(4, 5)))
    ours = np.array([_log_evidence(CURVATURE, PULL, s)[0] for s in scales])
    exact = np.array([marginal(s) for s in scales])
    np.testing.assert_allclose(ours - ours[0], exact - exact[0], rtol=1e-8)


@pytest.mark.parametrize("curvature", [CURVATURE, np.diag(CURVATURE)], ids=["dense", "diagonal"])
def test_derivative_is_that_of_the_evidence(curvature):
    logs = RNG.normal(size=5)
    numeric = scipy.optimize.approx_fprime(logs, lambda t: _log_evidence(curvature, PULL, np.exp(t))[0], 1e-6)
    np.testing.assert_allclose(_log_evidence(curvature, PULL, np.exp(logs))[1], numeric, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(60, 3))
    return X, np.sin(X[:, 0]) + 0.1 * rng.normal(size=60)


def learnt(problem, amplitude, **options):
    X, y = problem
    model = nb.PartialBNN(nb.FlaxMLP([8, 6], 1), prior_mean="zero", num_backbones=1, standardize=False, **options)
    model.fit(X, amplitude * y, sgd_epochs=40, sgd_lr=0.02, map_sigma=3.0, priors_sigma="auto", progress_bar=False)
    return model.posterior.info["priors_sigma"]


def test_larger_targets_ask_for_a_wider_prior_of_the_output_layer(problem):
    small, large = (learnt(problem, amplitude)["Dense2.kernel"] for amplitude in (0.3, 6.0))
    assert large > 1.5 * small


@pytest.mark.slow
def test_every_bayesian_leaf_has_a_scale_of_its_own(problem):
    found = learnt(problem, 1.0, bayesian=nb.last(2) - nb.biases())
    assert set(found) == {"Dense1.kernel", "Dense2.kernel"}
    assert len(set(found.values())) == 2


def test_other_words_are_refused(problem):
    with pytest.raises(OptionError, match="priors_sigma"):
        nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1).fit(*problem, priors_sigma="guess")
