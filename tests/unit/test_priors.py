"""Priors of weights and noise: densities, centres, standard deviations by layer, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from neurobayes import priors, trees
from neurobayes.errors import OptionError, SelectionError
from neurobayes.partition import Partition

PARAMS = {
    "Dense0": {"bias": jnp.arange(3.0), "kernel": jnp.arange(6.0).reshape(2, 3) + 10},
    "Dense1": {"bias": jnp.arange(1.0) + 50, "kernel": jnp.arange(3.0).reshape(3, 1) + 60},
    "Dense10": {"kernel": jnp.ones((1, 2))},
}
EVERYTHING = Partition.everything(trees.shapes(PARAMS))


def std_of(priors_sigma):
    tree = priors.prior_std_tree(PARAMS, priors_sigma)
    return {path: np.unique(leaf).tolist() for path, leaf in trees.flatten(tree).items()}


def test_weight_prior_is_scipys_normal():
    rng = np.random.default_rng(0)
    theta, mean, std = rng.normal(size=7), rng.normal(size=7), rng.uniform(0.1, 3.0, size=7)
    prior = priors.WeightPrior(*np.float32([mean, std]))
    expected = scipy.stats.norm.logpdf(theta, mean, std).sum()
    np.testing.assert_allclose(prior.log_prob(np.float32(theta)), expected, rtol=1e-5)


def test_one_number_serves_all_weights():
    tree = priors.prior_std_tree(PARAMS, 0.5)
    assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
    for std, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(std, np.full(leaf.shape, 0.5))


def test_layers_take_their_own_standard_deviation():
    assert std_of({"Dense1": 2.0}) == {
        "Dense0.bias": [1.0], "Dense0.kernel": [1.0], "Dense1.bias": [2.0], "Dense1.kernel": [2.0],
        "Dense10.kernel": [1.0],
    }  # fmt: skip


def test_the_longest_name_decides_whatever_the_order():
    for sigmas in ({"Dense1": 2.0, "Dense1.bias": 0.25}, {"Dense1.bias": 0.25, "Dense1": 2.0}):
        assert std_of(sigmas)["Dense1.kernel"] == [2.0]
        assert std_of(sigmas)["Dense1.bias"] == [0.25]


def test_unknown_layer_raises_with_the_nearest_name():
    with pytest.raises(SelectionError, match=r"'Dense4'.*closest: 'Dense\d"):
        priors.prior_std_tree(PARAMS, {"Dense4": 1.0})


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan, "1", None, True, [1.0]])
def test_a_standard_deviation_that_is_not_positive_raises(value):
    with pytest.raises(OptionError, match="priors_sigma must be a positive number"):
        priors.prior_std_tree(PARAMS, value)
    with pytest.raises(OptionError, match="Dense0"):
        priors.prior_std_tree(PARAMS, {"Dense0": value})


def test_prior_of_a_part_is_that_of_the_whole_tree_there():
    shapes = trees.shapes(PARAMS)
    masks = {path: np.arange(np.prod(shape)).reshape(shape) % 2 == 0 for path, shape in shapes.items()}
    del masks["Dense1.bias"]
    partition = Partition.from_masks(masks, shapes)
    sigmas = {"Dense0": 3.0, "Dense10": 0.2, "Dense0.bias": 0.1}
    prior = priors.weight_prior(partition, PARAMS, sigmas, "zero")
    np.testing.assert_array_equal(prior.std, partition.split(priors.prior_std_tree(PARAMS, sigmas)))
    np.testing.assert_array_equal(prior.mean, np.zeros(partition.size))


def test_prior_is_centred_at_the_trained_weights_or_at_zero():
    trained = priors.weight_prior(EVERYTHING, PARAMS, {"Dense0": 3.0}, "map")
    zero = priors.weight_prior(EVERYTHING, PARAMS, {"Dense0": 3.0}, "zero")
    np.testing.assert_array_equal(trained.mean, EVERYTHING.split(PARAMS))
    np.testing.assert_array_equal(zero.mean, np.zeros(EVERYTHING.size))
    for prior in (trained, zero):
        np.testing.assert_array_equal(prior.std, [3.0] * 9 + [1.0] * 6)


def test_prior_of_a_partition_covers_its_scalars_alone():
    masks = {"Dense0.kernel": np.array([[0, 1, 0], [0, 0, 1]], bool), "Dense1.bias": np.array([True])}
    partition = Partition.from_masks(masks, trees.shapes(PARAMS))
    prior = priors.weight_prior(partition, PARAMS, {"Dense1": 0.5}, "map")
    np.testing.assert_array_equal(prior.mean, [11.0, 15.0, 50.0])
    np.testing.assert_array_equal(prior.std, [1.0, 1.0, 0.5])


def test_target_scale_ignores_padding_and_constant_columns():
    y = np.array([[1.0, 7.0], [3.0, 7.0], [99.0, 99.0]], np.float32)
    np.testing.assert_array_equal(priors.target_scale(y, np.array([1.0, 1.0, 0.0])), [1.0, 1.0])
    np.testing.assert_array_equal(priors.target_scale(3 * y, np.array([1.0, 1.0, 0.0])), [3.0, 1.0])


def test_default_noise_prior_scales_with_the_targets():
    scale = np.array([0.5, 20.0])
    values = np.array([0.3, 11.0])
    np.testing.assert_allclose(
        priors.default_noise_prior(scale).log_prob(values), scipy.stats.halfnorm.logpdf(values, scale=scale), rtol=1e-5
    )


@pytest.mark.parametrize(
    "noise_prior",
    [
        dist.HalfNormal(1.0), dist.LogNormal(0.0, 1.0), dist.Gamma(2.0, 2.0), dist.InverseGamma(2.0, 1.0),
        dist.HalfCauchy(1.0), dist.HalfNormal(np.ones(2)), dist.HalfNormal(np.ones(1)), dist.Uniform(0.0, 3.0),
        dist.TruncatedNormal(1.0, 1.0, low=0.0),
    ],
    ids=lambda d: f"{type(d).__name__}{d.batch_shape}",
)  # fmt: skip
def test_priors_over_positive_numbers_are_accepted(noise_prior):
    assert priors.check_noise_prior(noise_prior, 2) is noise_prior


@pytest.mark.parametrize(
    ("noise_prior", "message"),
    [
        (1.0, "NumPyro distribution"), (dist.HalfNormal, "NumPyro distribution"),
        (scipy.stats.halfnorm(), "NumPyro distribution"),
        (dist.Normal(0.0, 1.0), "negative numbers"), (dist.Uniform(-1.0, 3.0), "negative numbers"),
        (dist.Bernoulli(0.5), "whole numbers"), (dist.Poisson(3.0), "whole numbers"),
        (dist.HalfNormal(np.ones(3)), r"shape \(3,\)"), (dist.HalfNormal(np.ones(2)).to_event(1), r"one of shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)  # fmt: skip
def test_other_noise_priors_raise(noise_prior, message):
    with pytest.raises(OptionError, match=message):
        priors.check_noise_prior(noise_prior, 2)
