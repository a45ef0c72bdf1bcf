"""Scores from data against Jacobians and Hessians written out in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import neurobayes as nb
from neurobayes import data, scores
from neurobayes.errors import OptionError
from neurobayes.likelihoods import Categorical, Gaussian, HeteroskedasticGaussian
from neurobayes.models.base import network_info
from neurobayes.network_info import SCORE_NAMES
from neurobayes.networks import as_network
from neurobayes.selectors import resolve
from neurobayes.training import Rows

N, D_OUT = 13, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 2)).astype(np.float32)
NUMBERS = RNG.normal(size=(N, D_OUT)).astype(np.float32)
LABELS = RNG.integers(0, D_OUT, N).astype(np.int32)
NOISE = np.array([0.5, 1.0, 2.0], np.float32)
NETWORK = as_network(nb.FlaxMLP([4], D_OUT))
PARAMS, STATE = jax.tree.map(np.asarray, NETWORK.init(jax.random.key(3), X))
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def rows(y, size=16):
    """Padded rows, the padding copies of a real row that must not count."""
    return Rows(data.pad_rows(X, size), data.pad_rows(y, size), data.row_weights(N, size))


def outputs_of(flat, x):
    return NETWORK.apply(UNRAVEL(flat), STATE, x[None])[0]


def log_likelihood(likelihood, y):
    return lambda flat, i: likelihood.log_prob(outputs_of(flat, X[i])[None], y[i : i + 1], NOISE)[0]


def test_noise_of_the_network_has_the_curvature_of_its_fisher_information():
    outputs = jnp.float32([0.3, -1.0])
    for y in (0.3, 5.0):  # the Hessian would depend on the target
        factor = scores.curvature_factor(HeteroskedasticGaussian(), outputs, jnp.float32([y]), NOISE)
        np.testing.assert_allclose(factor @ factor.T, np.diag([np.exp(2.0), 2.0]), rtol=1e-6)


CASES = {"numbers": (Gaussian(), NUMBERS), "classes": (Categorical(), LABELS)}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_fisher_is_the_mean_squared_gradient_of_single_rows(case):
    likelihood, y = case
    got = scores.fisher(NETWORK, PARAMS, STATE, rows(y), likelihood, NOISE)
    gradients = jnp.stack([jax.grad(log_likelihood(likelihood, y))(FLAT, i) for i in range(N)])
    np.testing.assert_allclose(ravel_pytree(got)[0], (gradients**2).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values_per_chunk", [1, 5 * len(FLAT), 2**24])
def test_ggn_is_the_full_one_whatever_the_chunks(case, values_per_chunk, monkeypatch):
    monkeypatch.setattr(scores, "VALUES_PER_CHUNK", values_per_chunk)
    likelihood, y = case
    got = scores.ggn_diagonal(NETWORK, PARAMS, STATE, rows(y), likelihood, NOISE)
    expected = np.zeros(len(FLAT))
    for i in range(N):
        jacobian = np.asarray(jax.jacobian(outputs_of)(FLAT, X[i]), float)
        curvature = np.asarray(
            jax.hessian(lambda f, i=i: -likelihood.log_prob(f[None], y[i : i + 1], NOISE)[0])(outputs_of(FLAT, X[i])),
            float,
        )
        expected += np.diag(jacobian.T @ curvature @ jacobian)
    np.testing.assert_allclose(ravel_pytree(got)[0], expected, rtol=1e-4, atol=1e-5)


def test_laplace_variance_adds_the_prior_and_follows_its_standard_deviations():
    stds = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5 + leaf.ndim, np.float32), PARAMS)
    curvature = scores.ggn_diagonal(NETWORK, PARAMS, STATE, rows(NUMBERS), Gaussian(), NOISE)
    got = scores.laplace_variance(NETWORK, PARAMS, STATE, rows(NUMBERS), Gaussian(), NOISE, stds)
    expected = jax.tree.map(lambda ggn, std: 1 / (ggn + std**-2.0), curvature, stds)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_laplace_variance_of_one_linear_weight_is_its_posterior_variance():
    network = as_network((lambda p, x: x @ p["w"], {"w": np.ones((1, 1))}))
    x = X[:, :1]
    batch = Rows(x, NUMBERS[:, :1], np.ones(N, np.float32))
    stds = {"w": np.full((1, 1), 2.0, np.float32)}
    variance = scores.laplace_variance(network, network.pretrained, {}, batch, Gaussian(), NOISE[:1], stds)
    np.testing.assert_allclose(variance["w"], [[1 / (np.sum(x**2) / 0.25 + 0.25)]], rtol=1e-5)


def test_curvature_of_an_unknown_likelihood_is_its_hessian():
    class Cauchy(Gaussian):
        def log_prob(self, outputs, y, noise_std):
            return -jnp.sum(jnp.log1p((y - outputs) ** 2), axis=-1)

    outputs = jnp.array([0.1, 3.0, -0.2])  # the second is in the tail, where the density is log-convex
    factor = scores.curvature_factor(Cauchy(), outputs, jnp.zeros(3), NOISE)
    exact = np.asarray(jax.hessian(lambda f: jnp.sum(jnp.log1p(f**2)))(outputs))
    assert exact[1, 1] < 0
    np.testing.assert_allclose(factor @ factor.T, np.diag(np.maximum(np.diag(exact), 0)), atol=1e-5)


# In a fit

OPTIONS = {"num_warmup": 20, "num_samples": 20, "sgd_epochs": 12, "map_sigma": 1.0, "progress_bar": False, "seed": 0}
pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")


def fitted(by, k=3, **options):
    model = nb.PartialBNN(nb.FlaxMLP([4], 1), bayesian=nb.top(k, by=by), num_backbones=1)
    return model.fit(X, NUMBERS[:, 0], **OPTIONS, **options)


@pytest.mark.parametrize("by", ["fisher", "laplace_variance"])
def test_top_by_a_data_score_needs_no_statistics_and_takes_the_highest(by):
    model = fitted(by)
    assert model.pretraining.statistics is None
    params = model.pretraining.params
    assert model.num_bayesian_weights == 3
    network = as_network(nb.FlaxMLP([4], 1))
    scaled = Rows(
        (X - X.mean(0)) / X.std(0),
        ((NUMBERS[:, :1] - NUMBERS[:, :1].mean()) / NUMBERS[:, :1].std()),
        np.ones(N, np.float32),
    )
    outputs = network.apply(params, {}, scaled.x)
    noise_std = np.sqrt(np.mean((outputs - scaled.y) ** 2, axis=0))
    arguments = (network, params, {}, scaled, Gaussian(), noise_std)
    if by == "fisher":
        expected = scores.fisher(*arguments)
    else:
        expected = scores.laplace_variance(*arguments, jax.tree.map(lambda leaf: np.ones_like(leaf), params))
    flat = np.asarray(ravel_pytree(expected)[0])
    chosen = np.concatenate([mask.ravel() for mask in model.partition.masks().values()])
    assert flat[chosen].min() >= flat[~chosen].max() * (1 - 1e-4)


def test_swag_variance_is_that_of_the_averaged_weights():
    averaged = fitted("swag_variance", swa_config={"schedule": "constant", "start_pct": 0.7})
    statistics = averaged.pretraining.statistics
    flat = ravel_pytree(statistics.averaged_variance)[0]
    chosen = np.concatenate([mask.ravel() for mask in averaged.partition.masks().values()])
    assert flat.min() > 0 and flat[chosen].min() >= flat[~chosen].max()
    assert not np.allclose(flat, ravel_pytree(statistics.weight_variance)[0])
    plain = fitted("swag_variance")
    assert plain.pretraining.statistics.averaged_variance is None
    assert plain.partition.masks().keys() == fitted("variance").partition.masks().keys()
    for path, mask in fitted("variance").partition.masks().items():
        np.testing.assert_array_equal(mask, plain.partition.masks()[path])


def test_averaged_variance_is_the_variance_of_the_snapshots():
    """Four epochs from the same start, one at a time and averaged, by the training loop itself."""
    from neurobayes import training

    program = training.Program(NETWORK, Gaussian(), track_statistics=True)
    batch = rows(NUMBERS)
    settings = training.Settings(batch.real, np.float32(1.0), NOISE)
    rates = np.full((4, 1), 0.05, np.float32)
    collect = np.array([0, 1, 1, 1], np.float32)
    result, _ = training.train(
        program, jax.random.key(0), batch, settings, learning_rates=rates, collect=collect, params=PARAMS
    )
    snapshots = [
        ravel_pytree(
            training.train(program, jax.random.key(0), batch, settings, learning_rates=rates[:k], params=PARAMS)[
                0
            ].params
        )[0]
        for k in (2, 3, 4)
    ]
    np.testing.assert_allclose(
        ravel_pytree(result.statistics.averaged_variance)[0], np.var(snapshots, axis=0), rtol=1e-3, atol=1e-9
    )


def test_data_scores_outside_a_fit_say_where_they_belong():
    info = network_info(NETWORK, jax.ShapeDtypeStruct((1, 2), np.float32), PARAMS)
    for by in ("fisher", "laplace_variance"):
        with pytest.raises(OptionError, match=r"needs the training data.*fit"):
            resolve(nb.top(2, by=by), info)


def test_wrong_score_names_raise_before_anything():
    with pytest.raises(OptionError, match=r"'fischer' is not known \(closest: 'fisher'\)"):
        nb.top(3, by="fischer")
    assert {"fisher", "laplace_variance", "swag_variance"} <= set(SCORE_NAMES)


def test_given_weights_without_statistics_serve_data_scores_only():
    model = nb.PartialBNN(
        nb.FlaxMLP([4], D_OUT), bayesian=nb.top(2, by="fisher"), deterministic_weights=PARAMS, num_backbones=1
    )
    assert model.fit(X, NUMBERS, **OPTIONS).num_bayesian_weights == 2
    model = nb.PartialBNN(
        nb.FlaxMLP([4], D_OUT), bayesian=nb.top(2, by="swag_variance"), deterministic_weights=PARAMS, num_backbones=1
    )
    with pytest.raises(OptionError, match="swag_variance needs the statistics"):
        model.fit(X, NUMBERS, **OPTIONS)


@pytest.mark.parametrize("by", ["variance", "gradient", "swag_variance"])
def test_a_score_of_too_few_steps_raises(by):
    trained = nb.DeterministicNN(nb.FlaxMLP([4], D_OUT), (2,))
    for epochs, num_steps in ((1, 1), (4, 2)):
        trained.train(X, NUMBERS, epochs=epochs, progress_bar=False)
        assert trained.training_statistics.num_steps == num_steps
        score = trained.network_info().score
        if by == "gradient" or num_steps == 2:
            assert any(np.any(leaf > 0) for leaf in score(by).values())
        else:
            with pytest.raises(OptionError, match=f"'{by}' needs the statistics of at least 2"):
                score(by)
