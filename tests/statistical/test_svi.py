"""Variational guides and Pathfinder where the nearest approximation is known."""

import dataclasses

import jax
import numpy as np
import pytest

from neurobayes.errors import OptionError, TrainingError
from neurobayes.inference import NUTS, SVI, Pathfinder, pathfinder
from neurobayes.inference.base import RunControl
from neurobayes.log_density import LogDensity

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def linear(last_layer):
    return last_layer("linear", rows=25, hidden=3, noise_std=(0.3,), prior_std=1.5, seed=4)


@pytest.fixture(scope="module")
def skewed(last_layer):
    target = last_layer("skewed", rows=5, hidden=1, noise_std=(0.3,), noise_prior_scale=2.0, seed=4)
    return target.log_density, target.start


def run(config, target, **kwargs):
    return config.run(KEY, target.log_density, target.start, num_warmup=1, num_samples=1000, num_chains=2, **kwargs)


@pytest.fixture(scope="module")
def low_rank(linear):
    return run(SVI(num_steps=2500), linear)


def test_low_rank_guide_finds_a_gaussian_posterior(linear, low_rank, disagreement):
    assert disagreement(low_rank.draws, linear.mean, linear.cov, budget=0.15) == []


def test_mean_field_guide_has_the_precisions_of_the_posterior(linear):
    """The closest independent Gaussian has the right mean, and the inverse of the precision's diagonal as variances."""
    draws = run(SVI(guide="mean_field", num_steps=3000), linear).draws.reshape(2000, -1)
    expected = 1.0 / np.diag(np.linalg.inv(linear.cov))
    np.testing.assert_allclose(draws.var(axis=0), expected, rtol=0.25)
    assert np.all(np.abs(draws.mean(axis=0) - linear.mean) < 0.2 * np.sqrt(np.diag(linear.cov)))


def test_bound_rises_to_the_evidence(linear, low_rank):
    """KL to the exact posterior is what is missing to the evidence; the guide contains the posterior."""
    elbo = low_rank.info["elbo"]
    assert elbo.shape == (2500,)
    at_mean = float(linear.log_density(linear.mean.astype(np.float32)))
    evidence = at_mean + 0.5 * np.linalg.slogdet(2 * np.pi * linear.cov)[1]
    assert evidence - 0.3 < low_rank.info["final_elbo"] < evidence + 0.1


@pytest.mark.slow
def test_flow_fits_a_skewed_posterior_better_than_a_gaussian(skewed):
    """Two weights and the noise of five rows: the bound of the richer family is higher."""
    density, start = skewed
    bound = {
        guide: SVI(guide=guide, num_steps=1500)
        .run(KEY, density, start, num_warmup=1, num_samples=10)
        .info["final_elbo"]
        for guide in ("flow", "low_rank")
    }
    assert bound["flow"] > bound["low_rank"] + 0.02


def test_not_finite_bound_is_an_error(linear):
    terms = linear.log_density.terms
    broken = LogDensity(linear.log_density.form, terms._replace(y=np.full_like(terms.y, np.nan)))
    with pytest.raises(TrainingError, match="not finite"):
        SVI(num_steps=10).run(KEY, broken, linear.start, num_warmup=1, num_samples=10)


def test_progress_and_time_limit(linear):
    seen = []
    control = RunControl(on_progress=lambda *args: seen.append(args), seconds=1e-9)
    posterior = run(SVI(num_steps=1500), linear, control=control)
    assert posterior.info["ended_by"] == "seconds" and len(posterior.info["elbo"]) == 500
    assert seen[0] == ("warm-up", 500, 1500)


def test_options_are_checked(linear):
    with pytest.raises(OptionError, match="guide"):
        SVI(guide="full")
    wide = dataclasses.replace(linear.log_density.form, num_theta=500)
    with pytest.raises(OptionError, match="flow"):
        SVI(guide="flow").run(
            KEY, LogDensity(wide, linear.log_density.terms), np.zeros(500), num_warmup=1, num_samples=1
        )


@pytest.mark.parametrize(("std", "low", "high"), [(0.2, 0.8, 1.2), (3.0, -np.inf, 0.2)], ids=["narrow", "wide"])
def test_pareto_k_tells_an_approximation_that_is_too_narrow(std, low, high):
    """Of a Gaussian with standard deviation s < 1 for a standard normal density it is 1 - s**2."""
    draws = std * np.random.default_rng(0).normal(size=4000)
    log_ratios = 0.5 * (draws / std) ** 2 - 0.5 * draws**2
    assert low < pathfinder._pareto_k(log_ratios) < high


def test_pathfinder_judges_itself_and_starts_nuts(linear, disagreement):
    posterior = run(Pathfinder(num_paths=2), linear)
    assert posterior.info["pareto_k"] < 0.7 and posterior.info["elbo"].shape == (2,)
    assert disagreement(posterior.draws, linear.mean, linear.cov, budget=0.2) == []
    chains = NUTS().run(
        KEY, linear.log_density, linear.start, num_warmup=100, num_samples=500, num_chains=2,
        control=RunControl(warm_start=posterior.adaptation),
    )  # fmt: skip
    assert disagreement(chains.draws, linear.mean, linear.cov, min_ess=200) == []
