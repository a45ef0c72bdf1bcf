"""The same small network as linen, NNX, Equinox and plain function, through ``fit`` and ``predict``."""

import equinox as eqx
import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import neurobayes as nb
from neurobayes import priors, trees
from neurobayes.likelihoods import Gaussian
from neurobayes.log_density import build
from neurobayes.networks import as_network
from neurobayes.partition import Partition

pytestmark = [
    pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::neurobayes.errors.UnitsWarning"),  # the weights are random
]

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
Y = (np.sin(X[:, 0]) + 0.1 * RNG.normal(size=40)).astype(np.float32)
WEIGHTS = [RNG.normal(size=shape).astype(np.float32) / 2 for shape in ((3, 5), (5,), (5, 4), (4,), (4, 1), (1,))]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, name="first")(x))
        x = nn.tanh(nn.Dense(4, name="second")(x))
        return nn.Dense(1, name="head")(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


class EqxNet(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x):
        return self.head(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


def linen_case():
    names = ("first", "second", "head")
    params = {name: {"kernel": WEIGHTS[2 * i], "bias": WEIGHTS[2 * i + 1]} for i, name in enumerate(names)}
    return LinenNet(), params, lambda x: LinenNet().apply({"params": params}, x)


def nnx_case():
    module = NNXNet(nnx.Rngs(0))
    for i, layer in enumerate((module.first, module.second, module.head)):
        layer.kernel[...], layer.bias[...] = WEIGHTS[2 * i], WEIGHTS[2 * i + 1]
    return module, None, module


def eqx_case():
    key = jax.random.key(0)
    layers = [eqx.nn.Linear(*sizes, key=key) for sizes in ((3, 5), (5, 4), (4, 1))]
    layers = [
        eqx.tree_at(lambda m: (m.weight, m.bias), layer, (jnp.asarray(kernel.T), jnp.asarray(bias)))
        for layer, kernel, bias in zip(layers, WEIGHTS[::2], WEIGHTS[1::2], strict=True)
    ]
    module = EqxNet(*layers)
    return module, None, jax.vmap(module)


def plain(params, x):
    x = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    x = jnp.tanh(x @ params["second"]["w"] + params["second"]["b"])
    return x @ params["head"]["w"] + params["head"]["b"]


def plain_case():
    names = ("first", "second", "head")
    params = {name: {"w": WEIGHTS[2 * i], "b": WEIGHTS[2 * i + 1]} for i, name in enumerate(names)}
    return (plain, params), None, lambda x: plain(params, x)


CASES = {"linen": linen_case, "nnx": nnx_case, "equinox": eqx_case, "plain": plain_case}
MADE = {name: make() for name, make in CASES.items()}
OPTIONS = {"num_warmup": 60, "num_samples": 80, "progress_bar": False, "seed": 0}


@pytest.fixture(scope="module", params=CASES)
def fitted(request):
    network, weights, own = MADE[request.param]
    model = nb.PartialBNN(network, num_probabilistic_layers=1, deterministic_weights=weights, num_backbones=1)
    return model.fit(X, Y, **OPTIONS), own


def test_head_is_bayesian_and_the_rest_is_frozen_under_the_frameworks_names(fitted):
    model, _ = fitted
    assert model.num_bayesian_weights == 5
    random = {path for path, count in model.partition.counts().items() if count}
    assert {trees.parent(path) for path in random} == {"head"}
    assert model.pretraining is None


def test_deterministic_prediction_is_the_frameworks_own(fitted):
    model, own = fitted
    expected = np.asarray(own(jnp.asarray(X)))[:, 0]
    np.testing.assert_allclose(model.deterministic_predict(X), expected, atol=1e-5)


def test_prediction_fits_better_than_the_weights_it_started_from(fitted):
    model, own = fitted
    mean, var = model.predict(X)
    assert mean.shape == var.shape == Y.shape and (var > 0).all()
    before = np.mean((np.asarray(own(jnp.asarray(X)))[:, 0] - Y) ** 2)
    assert np.mean((mean - Y) ** 2) < 0.8 * before


def test_all_frameworks_have_the_same_posterior():
    """The same weights, prior and data: the log densities agree, with theta in each framework's own order."""
    values = []
    for network, weights, _ in MADE.values():
        wrapped = as_network(network)
        params = weights if weights is not None else wrapped.pretrained
        _, state = wrapped.init(jax.random.key(0), X)
        head = {path: np.ones(shape, bool) for path, shape in trees.shapes(params).items() if path.startswith("head")}
        density = _density(wrapped, Partition.from_masks(head, trees.shapes(params)), params, state)
        position = np.r_[np.asarray(density.terms.prior.mean) + 0.3, -1.0].astype(np.float32)
        values.append(float(density(position)))
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


def _density(network, partition, params, state):
    from numpyro.distributions import HalfNormal

    prior = priors.weight_prior(partition, params, 1.0, "map")
    return build(
        network, partition, params, state, X, Y[:, None], np.ones(len(X), np.float32),
        likelihood=Gaussian(), prior=prior, noise_prior=HalfNormal(np.ones(1, np.float32)),
    )  # fmt: skip


@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=5, deadline=None)
def test_hoisted_density_is_the_plain_one_for_random_masks(name, seed, share):
    network, weights, _ = MADE[name]
    network = as_network(network)
    params, state = network.init(jax.random.key(0), X)
    params = jax.tree.map(np.asarray, params if weights is None else weights)
    generator = np.random.default_rng(seed)
    shapes = trees.shapes(params)
    touched = {path: shape for path, shape in shapes.items() if generator.random() < 0.5}
    masks = {path: generator.random(shape) < share for path, shape in touched.items()}
    partition = Partition.from_masks(masks, shapes)
    density = _density(network, partition, params, state)
    position = np.r_[np.asarray(partition.split(params)), -0.5].astype(np.float32)
    position = (position + 0.3 * generator.standard_normal(len(position))).astype(np.float32)

    def unhoisted(position):
        outputs = network.apply(partition.merge(position[:-1], params), state, X)
        noise_std = density.form.noise_std(position, density.terms.noise_prior)
        likelihood = Gaussian().log_prob(outputs, jnp.asarray(Y[:, None]), noise_std)
        return density.form.log_prior(position, density.terms) + likelihood.sum()

    got, gradient = jax.value_and_grad(lambda p: density.form(p, density.terms))(position)
    expected, plain_gradient = jax.value_and_grad(unhoisted)(position)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-4, atol=1e-5 * (1 + np.abs(plain_gradient).max()))
