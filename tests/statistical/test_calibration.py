"""Simulation-based calibration of the whole Bayesian path.

Weights and noise are drawn from the prior, data from them, and the posterior
given the data is sampled. Over many replicates the rank of the truth among the
draws is then uniform, for every quantity (Talts et al. 2018,
doi:10.48550/arXiv.1804.06788). The log likelihood is among the quantities,
because ranks of weights alone are uniform for a sampler that ignores the data
(Modrák et al. 2023, doi:10.1214/23-BA1404).

All replicates have the same shapes and run in one compiled program.
"""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import neurobayes as nb
from neurobayes import data, log_density, trees
from neurobayes.inference import NUTS
from neurobayes.likelihoods import Gaussian
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import WeightPrior

NUM_ROWS, HIDDEN = 7, 3  # 7 rows are padded to 8
NUM_KEPT, THIN = 63, 4
NUM_BINS = 8
FAMILY_WISE = 1e-4
NOISE_PRIOR = dist.HalfNormal(1.0)
NETWORK = nb.FlaxMLP([HIDDEN], 1)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(NUM_ROWS, 2)).astype(np.float32)
X_NEW = 2 * RNG.normal(size=(3, 2)).astype(np.float32)
PARAMS = {
    "Dense0": {"bias": RNG.normal(size=HIDDEN), "kernel": RNG.normal(size=(2, HIDDEN))},
    "Dense1": {"bias": np.zeros(1), "kernel": np.zeros((HIDDEN, 1))},
}
PARAMS = jax.tree.map(np.float32, PARAMS)


def features(x):
    hidden = np.tanh(x.astype(float) @ PARAMS["Dense0"]["kernel"] + PARAMS["Dense0"]["bias"])
    return np.concatenate([np.ones((len(x), 1)), hidden], axis=1)


def log_likelihood(weights, noise_std, y):
    """Of the data for each draw: weights (draws, 1 + hidden), noise (draws,)."""
    return scipy.stats.norm.logpdf(y, weights @ features(X).T, noise_std[:, None]).sum(axis=1)


def quantities(weights, noise_std, y):
    """What is ranked, (draws, quantity): weights, function values at new rows, noise, log likelihood."""
    values = weights @ features(X_NEW).T
    return np.column_stack([weights, values, noise_std, log_likelihood(weights, noise_std, y)])


def simulate(replicate):
    """Truth from the prior and data from the truth."""
    rng = np.random.default_rng([1, replicate])
    weights, noise_std = rng.normal(size=1 + HIDDEN), np.abs(rng.normal())
    return weights, noise_std, features(X) @ weights + noise_std * rng.normal(size=NUM_ROWS)


def sample_density(y, replicate):
    """Draws of weights and noise from the log density itself."""
    masks = {"Dense1.bias": np.ones(1, bool), "Dense1.kernel": np.ones((HIDDEN, 1), bool)}
    partition = Partition.from_masks(masks, trees.shapes(PARAMS))
    size = data.bucket_size(NUM_ROWS)
    density = log_density.build(
        as_network(NETWORK), partition, PARAMS, {}, data.pad_rows(X, size),
        data.pad_rows(y[:, None].astype(np.float32), size), data.row_weights(NUM_ROWS, size),
        likelihood=Gaussian(), prior=WeightPrior(np.zeros(1 + HIDDEN, np.float32), np.ones(1 + HIDDEN, np.float32)),
        noise_prior=NOISE_PRIOR,
    )  # fmt: skip
    residual = np.float32(np.log(0.5 * np.std(y)))
    posterior = NUTS().run(
        jax.random.key(replicate), density, np.append(np.zeros(1 + HIDDEN, np.float32), residual),
        num_warmup=250, num_samples=NUM_KEPT * THIN,
    )  # fmt: skip
    draws = posterior.flat_draws.astype(float)
    return draws[:, :-1], np.exp(draws[:, -1])


def sample_model(y, replicate):
    """Draws of weights and noise from a fitted model."""
    model = nb.PartialBNN(
        NETWORK, num_probabilistic_layers=1, deterministic_weights=PARAMS, noise_prior=NOISE_PRIOR, prior_mean="zero",
        standardize=False, num_backbones=1
    )  # fmt: skip
    model.fit(
        X, y, num_warmup=250, num_samples=NUM_KEPT * THIN, engine=NUTS(), progress_bar=False, seed=replicate
    )  # fmt: skip
    samples = model.get_samples()
    weights = np.concatenate([samples["Dense1.bias"], samples["Dense1.kernel"][..., 0]], axis=1)
    return weights.astype(float), samples["noise_std"].astype(float)


def sample_prior(y, replicate):
    """A sampler that ignores the data: its weights are distributed right, their relation to the data is not."""
    rng = np.random.default_rng([2, replicate])
    return rng.normal(size=(NUM_KEPT * THIN, 1 + HIDDEN)), np.abs(rng.normal(size=NUM_KEPT * THIN))


# --- hidden biases and output layer random: the part that ``collapse=True`` integrates out, and one that stays


def deep_values(weights, x):
    """Outputs for each draw: weights (draws, hidden + 1 + hidden), hidden biases first."""
    inside = x.astype(float) @ PARAMS["Dense0"]["kernel"]
    hidden = np.tanh(inside + weights[:, None, :HIDDEN])
    return weights[:, HIDDEN, None] + np.einsum("dnh,dh->dn", hidden, weights[:, HIDDEN + 1 :])


def deep_quantities(weights, noise_std, y):
    """What is ranked, as ``quantities``."""
    log_likelihoods = scipy.stats.norm.logpdf(y, deep_values(weights, X), noise_std[:, None]).sum(axis=1)
    return np.column_stack([weights, deep_values(weights, X_NEW), noise_std, log_likelihoods])


def deep_simulate(replicate):
    """Truth from the prior and data from the truth."""
    rng = np.random.default_rng([4, replicate])
    weights, noise_std = rng.normal(size=1 + 2 * HIDDEN), np.abs(rng.normal())
    return weights, noise_std, deep_values(weights[None], X)[0] + noise_std * rng.normal(size=NUM_ROWS)


def sample_collapsed_density(y, replicate):
    """Draws of weights and noise, the output layer integrated out and drawn back."""
    size = data.bucket_size(NUM_ROWS)
    masks = {"Dense0.bias": np.ones(HIDDEN, bool), "Dense1.bias": np.ones(1, bool)}
    masks["Dense1.kernel"] = np.ones((HIDDEN, 1), bool)
    partition = Partition.from_masks(masks, trees.shapes(PARAMS))
    prior = WeightPrior(np.zeros(partition.size, np.float32), np.ones(partition.size, np.float32))
    density = log_density.build(
        as_network(NETWORK), partition, PARAMS, {}, data.pad_rows(X, size),
        data.pad_rows(y[:, None].astype(np.float32), size), data.row_weights(NUM_ROWS, size),
        likelihood=Gaussian(), prior=prior, noise_prior=NOISE_PRIOR,
    )  # fmt: skip
    residual = np.float32(np.log(0.5 * np.std(y)))
    posterior = NUTS(collapse=True).run(
        jax.random.key(replicate), density, np.append(np.zeros(partition.size, np.float32), residual),
        num_warmup=250, num_samples=NUM_KEPT * THIN,
    )  # fmt: skip
    draws = posterior.flat_draws.astype(float)
    return draws[:, :-1], np.exp(draws[:, -1])


def sample_collapsed_model(y, replicate):
    """Draws of weights and noise from a fitted model."""
    model = nb.PartialBNN(
        NETWORK, bayesian=nb.path("Dense0.bias") | nb.last(1), deterministic_weights=PARAMS, noise_prior=NOISE_PRIOR,
        prior_mean="zero", standardize=False, num_backbones=1
    )  # fmt: skip
    engine = NUTS(collapse=True)
    model.fit(X, y, num_warmup=250, num_samples=NUM_KEPT * THIN, engine=engine, progress_bar=False, seed=replicate)
    samples = model.get_samples()
    parts = [samples["Dense0.bias"], samples["Dense1.bias"], samples["Dense1.kernel"][..., 0]]
    return np.concatenate(parts, axis=1).astype(float), samples["noise_std"].astype(float)


def run(sample, replicates, simulate=simulate, quantities=quantities):
    """Truth and thinned draws of each replicate: ``(replicate, quantity)`` and ``(replicate, kept, quantity)``."""
    truths, kept = [], []
    for replicate in replicates:
        weights, noise_std, y = simulate(replicate)
        truths.append(quantities(weights[None], np.array([noise_std]), y)[0])
        kept.append(quantities(*sample(y, replicate), y)[THIN - 1 :: THIN])
    return np.stack(truths), np.stack(kept)


def p_values(truths, kept):
    """For each quantity: bins of the ranks by chi-square, their centre, and their spread, all two-sided but the first.

    Centre and spread are those of the normal scores of the ranks. The spread
    tells a posterior that is too narrow or too wide with far fewer replicates
    than the bins.
    """
    ranks = (kept < truths[:, None]).sum(axis=1)  # 0 … NUM_KEPT, each as likely
    bins = ranks * NUM_BINS // (NUM_KEPT + 1)
    counts = np.stack([np.bincount(column, minlength=NUM_BINS) for column in bins.T])
    scores = scipy.stats.norm.ppf((np.arange(NUM_KEPT + 1) + 0.5) / (NUM_KEPT + 1))
    drawn = scores[ranks]

    def two_sided(values, possible):
        z = (values.mean(axis=0) - possible.mean()) / possible.std() * np.sqrt(len(ranks))
        return 2 * scipy.stats.norm.sf(np.abs(z))

    by_bins = scipy.stats.chisquare(counts, axis=1).pvalue
    return np.stack([by_bins, two_sided(drawn, scores), two_sided(drawn**2, scores**2)])


def is_uniform(truths, kept):
    """Whether no quantity's ranks are further from uniform than chance allows."""
    values = p_values(truths, kept)
    return values.min() > FAMILY_WISE / values.size


def shrunk(kept, factor=0.8):
    centre = kept.mean(axis=1, keepdims=True)
    return centre + factor * (kept - centre)


@pytest.fixture(scope="module")
def few():
    return run(sample_density, range(200))


def test_ranks_of_the_truth_are_uniform(few):
    assert is_uniform(*few), p_values(*few)


def test_draws_that_are_too_narrow_are_rejected(few):
    truths, kept = few
    assert not is_uniform(truths, shrunk(kept))


def test_draws_that_are_biased_are_rejected(few):
    truths, kept = few
    assert not is_uniform(truths, kept + 0.5 * kept.std(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def few_collapsed():
    return run(sample_collapsed_density, range(200), deep_simulate, deep_quantities)


def test_ranks_are_uniform_with_the_output_layer_integrated_out(few_collapsed):
    assert is_uniform(*few_collapsed), p_values(*few_collapsed)


def test_collapsed_draws_that_are_too_narrow_are_rejected(few_collapsed):
    truths, kept = few_collapsed
    assert not is_uniform(truths, shrunk(kept))


def test_the_prior_is_rejected_and_only_by_its_likelihood():
    truths, kept = run(sample_prior, range(200))
    assert not is_uniform(truths, kept)
    assert is_uniform(truths[:, :-1], kept[:, :, :-1])


def test_independent_draws_of_the_truths_own_distribution_pass():
    """The judge itself: exact draws pass for many seeds, so that it is no accident when they do."""
    rng = np.random.default_rng(3)
    for _ in range(100):
        draws = rng.normal(size=(150, NUM_KEPT + 1, 9))
        assert is_uniform(draws[:, 0], draws[:, 1:])


# The weights come from the prior and were never trained, so they predict badly, as the warning says.
@pytest.mark.filterwarnings("ignore::neurobayes.errors.UnitsWarning")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")  # 252 draws are meant to be few
def test_ranks_are_uniform_through_the_model():
    truths, kept = run(sample_model, range(1000, 1300))
    assert is_uniform(truths, kept), p_values(truths, kept)
    assert not is_uniform(truths, shrunk(kept))


@pytest.mark.filterwarnings("ignore::neurobayes.errors.UnitsWarning")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
def test_ranks_are_uniform_through_the_model_with_the_output_layer_integrated_out():
    truths, kept = run(sample_collapsed_model, range(1000, 1300), deep_simulate, deep_quantities)
    assert is_uniform(truths, kept), p_values(truths, kept)
    assert not is_uniform(truths, shrunk(kept))


@pytest.mark.slow
def test_ranks_of_the_truth_are_uniform_over_many_replicates():
    truths, kept = run(sample_density, range(2000, 2800))
    assert is_uniform(truths, kept), p_values(truths, kept)
    assert not is_uniform(truths, shrunk(kept, 0.9))
