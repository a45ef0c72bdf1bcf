"""Every engine recovers the moments of every target; a sampler that is too narrow is rejected."""

import numpy as np


def test_engine_recovers_means_and_covariances(case, target, draws, disagreement):
    assert draws.shape == (case.num_chains, case.num_samples, target.log_density.size)
    budget = case.budget.get(target.name, 0.0)
    assert disagreement(draws, target.mean, target.cov, min_ess=case.min_ess, budget=budget) == []


def test_draws_that_are_too_narrow_are_rejected(case, target, draws, disagreement, shrunk):
    """The negative control: the same judge, the same draws at 0.8 of their spread."""
    budget = case.budget.get(target.name, 0.0)
    assert disagreement(shrunk(draws), target.mean, target.cov, min_ess=case.min_ess, budget=budget)


def test_draws_that_are_off_centre_are_rejected(case, target, draws, disagreement):
    moved = draws + 0.5 * np.sqrt(np.diag(target.cov))
    budget = case.budget.get(target.name, 0.0)
    assert disagreement(moved, target.mean, target.cov, min_ess=case.min_ess, budget=budget)


def test_exact_draws_of_a_gaussian_pass_and_wrong_correlations_do_not(disagreement):
    """The judge itself, without any engine."""
    rng = np.random.default_rng(0)
    cov = np.array([[1.0, 1.8, 0.0], [1.8, 4.0, 0.02], [0.0, 0.02, 0.01]])
    exact = rng.multivariate_normal(np.ones(3), cov, size=(4, 750))
    assert disagreement(exact, np.ones(3), cov) == []
    independent = rng.multivariate_normal(np.ones(3), np.diag(np.diag(cov)), size=(4, 750))
    assert any("covariance 0, 1" in line for line in disagreement(independent, np.ones(3), cov))
