"""The density that a partially Bayesian network samples, against one written by hand, and its priors."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import neurobayes as nb
from neurobayes import log_density, trees
from neurobayes.likelihoods import Categorical, Gaussian
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import weight_prior

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

LAST = {"num_probabilistic_layers": 1}


CHOICES = {
    "all": None,
    "none": 0.0,
    "random": 0.4,
    "one in ten": 0.1,
}


@pytest.mark.parametrize("noise_prior", [dist.HalfNormal(0.7), dist.LogNormal(-1.0, 0.5), dist.InverseGamma(3.0, 1.0)])
@pytest.mark.parametrize("chosen", CHOICES)
def test_log_density_is_the_full_log_joint(mlp, chosen, noise_prior):
    rng = np.random.default_rng(6)
    network = as_network(mlp)
    x, y = rng.normal(size=(12, 3)).astype(np.float32), rng.normal(size=(12, 1)).astype(np.float32)
    row_weights = np.r_[np.ones(9), np.zeros(3)].astype(np.float32)
    params, state = network.init(jax.random.key(0), x)
    shapes = trees.shapes(params)
    if chosen == "all":
        partition = Partition.everything(shapes)
    else:
        masks = {path: rng.random(shape) < CHOICES[chosen] for path, shape in shapes.items()}
        partition = Partition.from_masks(masks, shapes)
    sigmas = {"Dense0": 0.3, "Dense2.bias": 2.0}
    prior = weight_prior(partition, params, sigmas, "map")
    density = log_density.build(
        network, partition, params, state, x, y, row_weights,
        likelihood=Gaussian(), prior=prior, noise_prior=noise_prior,
    )  # fmt: skip
    theta = rng.normal(size=partition.size).astype(np.float32)
    noise = 0.8
    position = np.concatenate([theta, log_density.unconstrain_noise(np.array([noise]), noise_prior)])

    flat = {path: np.array(leaf, float) for path, leaf in trees.flatten(params).items()}
    total, used = 0.0, 0
    for path, mask in partition.masks().items():
        std = 0.3 if path.startswith("Dense0") else 2.0 if path == "Dense2.bias" else 1.0
        values = theta[used : used + mask.sum()]
        used += mask.sum()
        total += scipy.stats.norm.logpdf(values, flat[path][mask], std).sum()
        flat[path][mask] = values
    h = np.tanh(x @ flat["Dense0.kernel"] + flat["Dense0.bias"])
    h = np.tanh(h @ flat["Dense1.kernel"] + flat["Dense1.bias"])
    outputs = h @ flat["Dense2.kernel"] + flat["Dense2.bias"]
    total += scipy.stats.norm.logpdf(y[:9], outputs[:9], noise).sum()
    log_prior_of_noise = {
        "HalfNormal": scipy.stats.halfnorm(scale=0.7), "LogNormal": scipy.stats.lognorm(0.5, scale=np.exp(-1.0)),
        "InverseGamma": scipy.stats.invgamma(3.0, scale=1.0),
    }[type(noise_prior).__name__].logpdf(noise)  # fmt: skip
    total += log_prior_of_noise + np.log(noise)  # the position holds the logarithm of the noise
    assert float(density(position)) == pytest.approx(total, rel=2e-6, abs=1e-4)


def test_log_density_of_classes(three_classes):
    X, y = three_classes
    network = as_network(nb.FlaxMLP([], 3))
    x, labels = X[:8].astype(np.float32), y[:8].astype(np.int32)
    params, state = network.init(jax.random.key(0), x)
    partition = Partition.everything(trees.shapes(params))
    density = log_density.build(
        network, partition, params, state, x, labels, np.ones(8, np.float32),
        likelihood=Categorical(), prior=weight_prior(partition, params, 2.0, "zero"), noise_prior=None,
    )  # fmt: skip
    theta = np.random.default_rng(7).normal(size=15).astype(np.float32)
    logits = x @ theta[3:].reshape(4, 3) + theta[:3]
    expected = scipy.stats.norm.logpdf(theta, 0.0, 2.0).sum()
    expected += (logits[np.arange(8), labels] - np.log(np.exp(logits).sum(1))).sum()
    assert float(density(theta)) == pytest.approx(expected, rel=1e-6)


def test_without_bayesian_weights_the_prediction_is_deterministic(mlp, regression, three_classes, quick):
    X, y = regression
    model = nb.PartialBNN(mlp, bayesian=nb.nothing(), num_backbones=1).fit(X, y, **quick)
    prediction = model.posterior_predictive(X)
    np.testing.assert_allclose(prediction.mean, model.deterministic_predict(X), rtol=1e-6, atol=1e-6)
    assert np.max(prediction.epistemic_var) < 1e-12  # rounding of a mean of equal numbers
    assert np.all(prediction.aleatoric_var > 0)
    assert set(model.get_samples()) == {"noise_std"}
    assert model.num_bayesian_weights == 0
    X, y = three_classes
    model = nb.PartialBNN(nb.FlaxMLP([6], 3), num_classes=3, bayesian=nb.nothing(), num_backbones=1).fit(X, y, **quick)
    np.testing.assert_allclose(model.predict(X)[0], model.deterministic_predict(X), atol=1e-6)
    assert np.max(model.posterior_predictive(X).mutual_information) < 1e-5


# Priors


def test_prior_scales_by_layer_and_prior_centres_have_effect(mlp, regression, short):
    """Trap: priors_sigma ignored."""
    X, y = regression
    wide = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **short).get_samples()["Dense2.kernel"].std(0)
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **short, priors_sigma={"Dense2": 1e-3})
    trained = model.pretraining.params["Dense2"]["kernel"]
    assert np.all(wide > 0.01)
    np.testing.assert_allclose(model.get_samples()["Dense2.kernel"].mean(0), trained, atol=3e-3)
    assert np.all(model.get_samples()["Dense2.kernel"].std(0) < 3e-3)
    zero = nb.PartialBNN(mlp, prior_mean="zero", **LAST, num_backbones=1).fit(
        X, y, **short, priors_sigma={"Dense2.kernel": 1e-3}
    )
    assert np.max(np.abs(zero.get_samples()["Dense2.kernel"])) < 0.05
    assert np.max(np.abs(trained)) > 0.1


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, "wide", {"Dense2": 0.0}, None])
def test_prior_scales_that_make_no_sense_raise(mlp, regression, quick, sigma):
    with pytest.raises(nb.errors.OptionError, match="priors_sigma"):
        nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **quick, priors_sigma=sigma)


def test_prior_scales_of_unknown_layers_raise(mlp, regression, quick):
    with pytest.raises(nb.errors.SelectionError, match=r"Dense3.*closest: 'Dense\d'"):
        nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **quick, priors_sigma={"Dense3": 1.0})


def test_a_noise_prior_decides_where_it_is_sharp(mlp, regression, short):
    X, y = regression
    model = nb.PartialBNN(mlp, noise_prior=dist.LogNormal(np.log(2.0), 0.01), **LAST, num_backbones=1).fit(
        X, y, **short
    )
    np.testing.assert_allclose(model.get_samples()["noise_std"], 2.0 * y.std(), rtol=0.1)


@pytest.mark.parametrize(
    "noise_prior",
    [dist.InverseGamma(3.0, 1.0), dist.HalfCauchy(1.0), dist.Gamma(2.0, 2.0), dist.HalfNormal(np.array([1.0]))],
    ids=lambda prior: type(prior).__name__,
)
def test_noise_priors_of_every_family(mlp, regression, quick, noise_prior):
    model = nb.PartialBNN(mlp, noise_prior=noise_prior, **LAST, num_backbones=1).fit(*regression, **quick)
    assert np.all(model.get_samples()["noise_std"] > 0)
    assert model.noise_prior is noise_prior


@pytest.mark.parametrize(
    "noise_prior",
    [dist.Normal(0.0, 1.0), 0.5, dist.HalfNormal(np.ones(3)), dist.Dirichlet(np.ones(2)), dist.Poisson(2.0),
     dist.HalfNormal],
    ids=["negative", "a number", "three outputs", "a vector", "whole numbers", "a class"],
)  # fmt: skip
def test_noise_priors_that_make_no_sense_raise(mlp, regression, quick, noise_prior):
    with pytest.raises(nb.errors.OptionError, match="noise_prior"):
        nb.PartialBNN(mlp, noise_prior=noise_prior, **LAST, num_backbones=1).fit(*regression, **quick)


def test_classification_has_no_noise_prior():
    with pytest.raises(nb.errors.OptionError, match="noise_prior"):
        nb.PartialBNN(nb.FlaxMLP([4], 3), num_classes=3, noise_prior=dist.HalfNormal(1.0), num_backbones=1)
