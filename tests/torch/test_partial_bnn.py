"""A PyTorch transformer with a Bayesian head, from the module to predictions in the user's units."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

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
X = RNG.normal(size=(30, 6, 3)).astype(np.float32)
Y = (X[:, :, 0].mean(1) + 0.05 * RNG.normal(size=30)).astype(np.float32)


class Regressor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(3, 8)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.encoder(self.up(x)).mean(1)).squeeze(-1)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Regressor()


@pytest.fixture(scope="module")
def model(module):
    made = nb.PartialBNN(module, bayesian=nb.layers("head"), num_backbones=1)
    return made.fit(X, Y, num_warmup=100, num_samples=100, progress_bar=False, seed=0)


def torch_outputs(module):
    with torch.no_grad():
        return copy.deepcopy(module).eval()(torch.tensor(X)).numpy()


def test_only_the_head_is_bayesian_and_nothing_was_trained(module, model):
    assert {path for path, count in model.partition.counts().items() if count} == {"head.weight", "head.bias"}
    assert model.num_bayesian_weights == 9 and model.pretraining is None
    assert set(model.get_samples()) == {"head.weight", "head.bias", "noise_std"}
    assert model.get_samples()["head.weight"].shape == (100, 1, 8)


def test_deterministic_prediction_is_pytorchs(module, model):
    np.testing.assert_allclose(model.deterministic_predict(X), torch_outputs(module), atol=1e-5)


def test_prediction_improves_on_the_weights_it_started_from(module, model):
    mean, var = model.predict(X)
    assert mean.shape == var.shape == Y.shape and (var > 0).all()
    assert np.mean((mean - Y) ** 2) < 0.5 * np.mean((torch_outputs(module) - Y) ** 2)


def test_draws_go_back_into_pytorch(module, model):
    draws = model.get_samples()
    again = copy.deepcopy(module)
    state = again.state_dict() | {name: torch.tensor(draws[name][7]) for name in ("head.weight", "head.bias")}
    again.load_state_dict(state)
    theta = model.posterior.flat_draws[7, :9]
    network = as_network(module)
    params, buffers = network.init(jax.random.key(0), X)
    ours = network.apply(model.partition.merge(theta, params), buffers, jnp.asarray(X))
    np.testing.assert_allclose(np.ravel(ours), torch_outputs(again), atol=1e-5)


@pytest.mark.parametrize("choice", ["head", "encoder.layers.1.linear2", "one weight of each"])
def test_hoisted_density_is_the_plain_one(module, choice):
    from numpyro.distributions import HalfNormal

    network = as_network(module)
    params, state = network.init(jax.random.key(0), X)
    shapes = trees.shapes(params)
    masks = {path: np.ones(shape, bool) for path, shape in shapes.items() if trees.is_under(path, choice)}
    if not masks:
        masks = {path: np.arange(np.prod(shape)).reshape(shape) == 0 for path, shape in shapes.items()}
    partition = Partition.from_masks(masks, shapes)
    density = build(
        network, partition, params, state, X, Y[:, None], np.ones(len(X), np.float32), likelihood=Gaussian(),
        prior=priors.weight_prior(partition, params, 1.0, "map"), noise_prior=HalfNormal(np.ones(1, np.float32)),
    )  # fmt: skip
    position = np.r_[np.asarray(partition.split(params)) + 0.1, -0.5].astype(np.float32)

    def unhoisted(position):
        outputs = network.apply(partition.merge(position[:-1], params), state, jnp.asarray(X))
        noise_std = density.form.noise_std(position, density.terms.noise_prior)
        likelihood = Gaussian().log_prob(outputs, jnp.asarray(Y[:, None]), noise_std)
        return density.form.log_prior(position, density.terms) + likelihood.sum()

    got, gradient = jax.jit(jax.value_and_grad(lambda p: density.form(p, density.terms)))(position)
    expected, plain_gradient = jax.jit(jax.value_and_grad(unhoisted))(position)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-4, atol=1e-5 * (1 + np.abs(plain_gradient).max()))
