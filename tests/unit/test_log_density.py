"""The log joint density against scipy in float64: priors, noise coordinates, row weights, constants."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats

import neurobayes as nb
from neurobayes import log_density, priors, trees
from neurobayes.likelihoods import Categorical, Gaussian
from neurobayes.networks import as_network
from neurobayes.partition import Partition

RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 3)).astype(np.float32)
Y = RNG.normal(size=(10, 2)).astype(np.float32)
LABELS = RNG.integers(0, 2, size=10).astype(np.int32)
ALL_ROWS = np.ones(10, np.float32)
NETWORK = as_network(nb.FlaxMLP([4], 2))
PARAMS = jax.tree.map(np.asarray, NETWORK.init(jax.random.key(0), X)[0])
SHAPES = trees.shapes(PARAMS)
MASKS = {"Dense0.kernel": RNG.random((3, 4)) < 0.4, "Dense1.bias": np.ones(2, bool), "Dense1.kernel": np.eye(4, 2) > 0}
PARTITIONS = {
    "everything": Partition.everything(SHAPES),
    "scattered": Partition.from_masks(MASKS, SHAPES),
    "nothing": Partition.nothing(SHAPES),
}
# numpyro's prior, scipy's, over the same standard deviation
NOISE_PRIORS = {
    "half-normal": (dist.HalfNormal(0.7), scipy.stats.halfnorm(scale=0.7)),
    "log-normal": (dist.LogNormal(-1.0, 0.5), scipy.stats.lognorm(s=0.5, scale=np.exp(-1.0))),
    "inverse gamma": (dist.InverseGamma(3.0, 0.8), scipy.stats.invgamma(3.0, scale=0.8)),
    "per output": (dist.HalfNormal(np.float32([0.4, 2.0])), scipy.stats.halfnorm(scale=np.array([0.4, 2.0]))),
}


def build(partition, *, rows=(X, Y, ALL_ROWS), likelihood=None, noise_prior=None, sigma=1.0, centre="map"):
    prior = priors.weight_prior(partition, PARAMS, sigma, centre)
    return log_density.build(
        NETWORK, partition, PARAMS, {}, *rows, likelihood=likelihood or Gaussian(), prior=prior,
        noise_prior=noise_prior or dist.HalfNormal(0.7),
    )  # fmt: skip


def outputs_of(partition, theta, x):
    """The network in float64, by hand."""
    leaves = {path: np.array(leaf, float) for path, leaf in trees.flatten(PARAMS).items()}
    start = 0
    for path, mask in partition.masks().items():
        size = int(mask.sum())
        leaves[path][mask] = theta[start : start + size]
        start += size
    hidden = np.tanh(x.astype(float) @ leaves["Dense0.kernel"] + leaves["Dense0.bias"])
    return hidden @ leaves["Dense1.kernel"] + leaves["Dense1.bias"]


@pytest.mark.parametrize("noise", NOISE_PRIORS)
@pytest.mark.parametrize("choice", PARTITIONS)
def test_density_is_the_sum_of_prior_noise_prior_volume_and_likelihood(choice, noise):
    partition, (noise_prior, reference) = PARTITIONS[choice], NOISE_PRIORS[noise]
    density = build(partition, noise_prior=noise_prior, sigma={"Dense0": 0.5, "Dense1": 2.0}, centre="map")
    std = np.concatenate([np.full(m.sum(), 0.5 if "Dense0" in p else 2.0) for p, m in partition.masks().items()])
    centre = np.asarray(partition.split(PARAMS), float)
    assert density.size == partition.size + 2
    for scale in (0.0, 0.3):
        theta = centre + scale * np.random.default_rng(1).normal(size=partition.size)
        log_noise = np.array([-0.8, 0.4]) * (1 + scale)
        noise_std = np.exp(log_noise)
        expected = (
            scipy.stats.norm.logpdf(theta, centre, std).sum()
            + reference.logpdf(noise_std).sum()
            + log_noise.sum()  # d noise / d log noise
            + scipy.stats.norm.logpdf(Y, outputs_of(partition, theta, X), noise_std).sum()
        )
        position = np.float32(np.concatenate([theta, log_noise]))
        np.testing.assert_allclose(density(position), expected, rtol=2e-5)


def test_noise_density_integrates_to_one_in_its_own_coordinates():
    """A wrong change of variables would show as a total other than one."""
    for noise_prior, _ in (NOISE_PRIORS[name] for name in ("half-normal", "log-normal", "inverse gamma")):
        density = build(PARTITIONS["nothing"], rows=(X[:, :], Y, 0 * ALL_ROWS), noise_prior=noise_prior)
        grid = np.linspace(-12.0, 8.0, 2001, dtype=np.float32)
        positions = np.stack([grid, np.zeros_like(grid)], axis=1)
        values = jax.vmap(lambda p, d=density: d.form(p, d.terms))(positions)
        other = noise_prior.log_prob(1.0)  # the second coordinate rests at log 1 = 0
        np.testing.assert_allclose(np.trapezoid(np.exp(values - other), grid), 1.0, rtol=1e-4)


def test_a_bounded_noise_prior_keeps_its_bounds_and_volume():
    noise_prior = dist.Uniform(0.1, 0.9)
    density = build(PARTITIONS["nothing"], rows=(X, Y, 0 * ALL_ROWS), noise_prior=noise_prior)
    for unconstrained in (-3.0, 0.0, 2.0):
        share = scipy.special.expit(unconstrained)
        expected = 2 * (np.log(1 / 0.8) + np.log(0.8 * share * (1 - share)))
        np.testing.assert_allclose(density(np.full(2, unconstrained, np.float32)), expected, rtol=1e-5)


def test_noise_coordinates_round_trip():
    for noise_prior, _ in NOISE_PRIORS.values():
        values = np.float32([0.02, 3.0])
        unconstrained = log_density.unconstrain_noise(values, noise_prior)
        np.testing.assert_allclose(unconstrained, np.log(values), rtol=1e-6)
        np.testing.assert_allclose(log_density.constrain_noise(unconstrained, noise_prior), values, rtol=1e-6)


def test_classification_has_no_noise():
    partition = PARTITIONS["scattered"]
    density = build(partition, rows=(X, LABELS, ALL_ROWS), likelihood=Categorical(), centre="zero")
    assert density.form.num_noise == 0 and density.size == partition.size
    theta = np.random.default_rng(2).normal(size=partition.size)
    logits = scipy.special.log_softmax(outputs_of(partition, theta, X), axis=1)
    expected = scipy.stats.norm.logpdf(theta).sum() + logits[np.arange(10), LABELS].sum()
    np.testing.assert_allclose(density(np.float32(theta)), expected, rtol=2e-5)


def test_rows_of_weight_zero_do_not_count():
    partition = PARTITIONS["scattered"]
    position = np.float32(np.append(np.asarray(partition.split(PARAMS)) + 0.2, [-0.3, 0.1]))
    few = build(partition, rows=(X[:7], Y[:7], ALL_ROWS[:7]))
    padded = [np.concatenate([a[:7], np.repeat(a[6:7], 3, axis=0)]) for a in (X, Y)]
    weights = np.float32([1] * 7 + [0] * 3)
    np.testing.assert_allclose(build(partition, rows=(*padded, weights))(position), few(position), rtol=1e-6)
    changed = build(partition, rows=(padded[0], padded[1] + 100 * (weights == 0)[:, None], weights))
    np.testing.assert_allclose(changed(position), few(position), rtol=1e-6)


def test_row_weights_are_multiplicities():
    partition = PARTITIONS["scattered"]
    position = np.float32(np.append(np.asarray(partition.split(PARAMS)) + 0.2, [-0.3, 0.1]))
    weights = np.array([2, 0, 1, 1, 3, 1, 0, 1, 1, 0])
    repeated = [np.repeat(a, weights, axis=0) for a in (X, Y)]
    np.testing.assert_allclose(
        build(partition, rows=(X, Y, weights.astype(np.float32)))(position),
        build(partition, rows=(*repeated, np.ones(weights.sum(), np.float32)))(position),
        rtol=1e-5,
    )


def test_all_random_equals_the_fully_bayesian_network():
    """No frozen part: the density written from the network alone, on the raveled parameters."""
    density = build(PARTITIONS["everything"], centre="zero")
    position = np.float32(np.random.default_rng(3).normal(scale=0.5, size=density.size))

    @jax.jit
    def plain(position):
        flat, unravel = jax.flatten_util.ravel_pytree(PARAMS)
        theta, noise_std = position[: flat.size], jnp.exp(position[flat.size :])
        outputs = NETWORK.apply(unravel(theta), {}, X)
        return (
            dist.Normal(0.0, 1.0).log_prob(theta).sum()
            + (dist.HalfNormal(0.7).log_prob(noise_std) + position[flat.size :]).sum()
            + dist.Normal(outputs, noise_std).log_prob(Y).sum()
        )

    np.testing.assert_allclose(density(position), plain(position), rtol=1e-6)
    mine = jax.jit(jax.grad(lambda p: density.form(p, density.terms)))(position)
    np.testing.assert_allclose(mine, jax.jit(jax.grad(plain))(position), rtol=1e-4, atol=1e-4)


def test_gradient_is_that_of_finite_differences():
    partition = PARTITIONS["scattered"]
    density = build(partition, noise_prior=dist.LogNormal(-1.0, 0.5))
    position = np.append(np.asarray(partition.split(PARAMS), float) + 0.2, [-0.3, 0.1])

    def by_hand(p):
        noise_std = np.exp(p[-2:])
        theta, centre = p[:-2], np.asarray(partition.split(PARAMS), float)
        return (
            scipy.stats.norm.logpdf(theta, centre).sum()
            + scipy.stats.lognorm(s=0.5, scale=np.exp(-1.0)).logpdf(noise_std).sum()
            + p[-2:].sum()
            + scipy.stats.norm.logpdf(Y, outputs_of(partition, theta, X), noise_std).sum()
        )

    steps = 1e-5 * np.eye(len(position))
    expected = [(by_hand(position + step) - by_hand(position - step)) / 2e-5 for step in steps]
    gradient = jax.jit(jax.grad(lambda p: density.form(p, density.terms)))(np.float32(position))
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


def test_data_and_priors_are_arguments_not_constants():
    """Other data, weights and prior scales of the same shapes evaluate the same compiled program."""
    partition = PARTITIONS["scattered"]
    position = np.zeros(partition.size + 2, np.float32)
    first = build(partition)
    first(position)
    compiled = log_density.evaluate._cache_size()
    second = build(partition, rows=(X + 1, Y * 2, 0.5 * ALL_ROWS), sigma=3.0, noise_prior=dist.HalfNormal(0.1))
    assert second.form == first.form
    assert second(position) != first(position)
    assert log_density.evaluate._cache_size() == compiled
