"""Laplace against closed forms: exact where the model is linear, and its own dense algebra where it is not."""

import dataclasses

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import neurobayes as nb
from neurobayes import log_density, trees
from neurobayes.errors import OptionError
from neurobayes.inference import Laplace
from neurobayes.inference._gauss_newton import spectrum
from neurobayes.inference.laplace import predictive_moments
from neurobayes.likelihoods import Gaussian
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import WeightPrior

KEY = jax.random.key(3)


def run(config, target, num_samples=50):
    return config.run(KEY, target.log_density, target.start, num_warmup=1, num_samples=num_samples, num_chains=2)


def covariance(gaussian):
    """Dense covariance of the weights: the inverse of prior precision plus curvature."""
    vectors = gaussian.eigenvectors
    vectors = np.eye(len(gaussian.prior_std)) if vectors is None else getattr(vectors, "dense", lambda: vectors)()
    inner = np.linalg.inv(np.eye(len(gaussian.prior_std)) + (vectors * gaussian.eigenvalues) @ vectors.T)
    return gaussian.prior_std[:, None] * inner * gaussian.prior_std


@pytest.fixture(scope="module")
def linear(last_layer):
    return last_layer("linear", rows=25, hidden=5, noise_std=(0.3, 0.8), prior_std=1.5, seed=4)


@pytest.fixture(scope="module")
def curved():
    """A small network with all its weights random, and rows to spare."""
    rng = np.random.default_rng(0)
    network = as_network(nb.FlaxMLP([3], 1))
    x = rng.normal(size=(40, 2)).astype(np.float32)
    y = np.tanh(x[:, :1] - 0.5 * x[:, 1:]) + 0.1 * rng.normal(size=(40, 1)).astype(np.float32)
    params = {
        "Dense0": {"bias": rng.normal(size=3), "kernel": rng.normal(size=(2, 3))},
        "Dense1": {"bias": rng.normal(size=1), "kernel": rng.normal(size=(3, 1))},
    }
    params = jax.tree.map(np.float32, params)
    partition = Partition.from_masks(
        {path: np.ones(shape, bool) for path, shape in trees.shapes(params).items()}, trees.shapes(params)
    )
    prior = WeightPrior(np.zeros(partition.size, np.float32), np.full(partition.size, 2.0, np.float32))
    density = log_density.build(
        network, partition, params, {}, x, y, np.ones(40, np.float32),
        likelihood=Gaussian(), prior=prior, noise_prior=dist.HalfNormal(1.0),
    )  # fmt: skip
    theta = np.asarray(partition.split(params))
    return density, np.append(theta, np.float32(-1.0))


@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_known_noise_gives_the_exact_posterior(linear, structure):
    """Low rank too, since the rank here is that of all weights."""
    gaussian = run(Laplace(structure=structure), linear).info["gaussian"]
    std = np.sqrt(np.diag(linear.cov))
    np.testing.assert_allclose(gaussian.mode / std, linear.mean / std, atol=2e-4)
    np.testing.assert_allclose(covariance(gaussian) / np.outer(std, std), linear.cov / np.outer(std, std), atol=2e-4)


def test_diagonal_is_the_diagonal_of_the_precision(linear):
    gaussian = run(Laplace(structure="diagonal"), linear).info["gaussian"]
    expected = np.diag(1.0 / np.diag(np.linalg.inv(linear.cov)))
    np.testing.assert_allclose(covariance(gaussian), expected, rtol=1e-4)


def by_hand(linear, scale=1.0):
    """Log marginal likelihood of both outputs at a factor on the prior standard deviation, by the rows' covariance."""
    total, terms = 0.0, linear.log_density.terms
    for k, noise in enumerate((0.3, 0.8)):
        columns = [
            np.asarray(linear.log_density.form.outputs(row, terms.carry), float)[:, k]
            for row in np.eye(len(linear.mean), dtype=np.float32)
        ]
        features = np.stack(columns, axis=1)
        cov = (1.5 * scale) ** 2 * features @ features.T + noise**2 * np.eye(len(features))
        total += scipy.stats.multivariate_normal.logpdf(np.asarray(terms.y, float)[:, k], cov=cov)
    return total


def test_evidence_is_that_of_the_rows(linear):
    assert run(Laplace(), linear).info["log_evidence"] == pytest.approx(by_hand(linear), abs=2e-3)
    assert run(Laplace(prior_scale=0.4), linear).info["log_evidence"] == pytest.approx(by_hand(linear, 0.4), abs=2e-3)


def test_evidence_with_unknown_noise_is_the_integral_over_it(last_layer):
    target = last_layer("unknown noise", rows=40, hidden=3, noise_std=(0.4,), noise_prior_scale=1.0, prior_std=1.5)
    form, terms = target.log_density.form, target.log_density.terms
    rows = np.append(np.eye(form.num_theta), np.zeros((form.num_theta, 1)), axis=1).astype(np.float32)
    features = np.stack([np.asarray(form.outputs(row, terms.carry), float)[:, 0] for row in rows], axis=1)
    noise = np.geomspace(0.1, 2.0, 400)
    log_joint = scipy.stats.halfnorm.logpdf(noise) + [
        scipy.stats.multivariate_normal.logpdf(
            np.asarray(terms.y, float)[:, 0], cov=1.5**2 * features @ features.T + std**2 * np.eye(len(features))
        )
        for std in noise
    ]
    expected = np.log(np.trapezoid(np.exp(log_joint - log_joint.max()), noise)) + log_joint.max()
    assert run(Laplace(), target).info["log_evidence"] == pytest.approx(expected, abs=0.1)


def test_marginal_likelihood_chooses_the_prior_scale(linear):
    info = run(Laplace(prior_scale="marginal_likelihood"), linear).info
    scales = np.exp(np.linspace(-3, 3, 241))
    best = scales[np.argmax([by_hand(linear, scale) for scale in scales])]
    assert 0.2 < best < 5 and best != pytest.approx(1.0, rel=0.1)
    assert info["prior_scale"] == pytest.approx(best, rel=0.08)
    assert info["log_evidence"] == pytest.approx(by_hand(linear, best), abs=0.02)


def test_linearised_moments_are_the_dense_computation(curved):
    density, start = curved
    for structure, rank in (("full", 1), ("low_rank", 4), ("diagonal", 1)):
        config = Laplace(structure=structure, rank=rank)
        gaussian = config.run(KEY, density, start, num_warmup=1, num_samples=10).info["gaussian"]
        mean, variance = predictive_moments(gaussian, density.form.hoisted, density.terms.carry)
        theta = np.asarray(gaussian.mode[: density.form.num_theta], np.float32)
        jacobian = jax.jacobian(lambda t: density.form.hoisted.late(t, density.terms.carry))(theta)
        slopes = np.asarray(jacobian, float)[:, 0]
        np.testing.assert_allclose(
            variance[:, 0], np.einsum("ni,ij,nj->n", slopes, covariance(gaussian), slopes), rtol=2e-3
        )
        np.testing.assert_allclose(mean, density.form.hoisted.late(theta, density.terms.carry), rtol=1e-5, atol=1e-5)


def test_curvature_is_the_gauss_newton_matrix_at_a_mode(curved):
    density, start = curved
    posterior = Laplace(structure="full").run(KEY, density, start, num_warmup=1, num_samples=10)
    gaussian, size = posterior.info["gaussian"], density.form.num_theta
    mode = gaussian.mode.astype(np.float32)
    gradient = np.asarray(jax.grad(lambda p: density.form(p, density.terms))(mode))[:size]
    step = covariance(gaussian) @ gradient  # what is left of a Newton step
    assert np.all(np.abs(step) < 0.02 * np.sqrt(np.diag(covariance(gaussian))))
    slopes = np.asarray(jax.jacobian(lambda t: density.form.hoisted.late(t, density.terms.carry))(mode[:size]), float)
    precision = slopes[:, 0].T @ slopes[:, 0] / np.exp(2 * float(mode[size])) + np.eye(size) / 2.0**2
    expected = np.linalg.inv(precision)
    std = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(covariance(gaussian) / np.outer(std, std), expected / np.outer(std, std), atol=0.01)


def test_draws_have_the_gaussians_moments_and_low_rank_is_never_narrower(curved, disagreement):
    density, start = curved
    posterior = Laplace(structure="low_rank", rank=3).run(
        KEY, density, start, num_warmup=1, num_samples=1500, num_chains=2
    )
    gaussian, size = posterior.info["gaussian"], density.form.num_theta
    assert disagreement(posterior.draws[..., :size], gaussian.mode[:size], covariance(gaussian)) == []
    full = Laplace(structure="full").run(KEY, density, start, num_warmup=1, num_samples=10).info["gaussian"]
    assert np.all(np.diag(covariance(gaussian)) > 0.9 * np.diag(covariance(full)))


def test_noise_is_not_that_of_the_overfitted_rows():
    """More weights than rows: the joint mode would explain the noise away."""
    rng = np.random.default_rng(1)
    X = rng.uniform(-2, 2, size=(30, 1))
    y = np.sin(2 * X[:, 0]) + 0.3 * rng.normal(size=30)
    model = nb.PartialBNN(nb.FlaxMLP([16], 1), probabilistic_layer_names=["Dense0", "Dense1"], num_backbones=1)
    model.fit(
        X, y, num_warmup=1, num_samples=200, sgd_epochs=50, map_sigma=1.0, engine="laplace", progress_bar=False, seed=0
    )
    noise = np.sqrt(np.mean(model.posterior_predictive(X).aleatoric_var))
    assert 0.15 < noise < 0.6
    assert model.diagnostics().ok
    assert "Laplace approximation" in model.diagnostics().verdict


def test_draws_do_not_depend_on_the_number_of_chains(curved):
    density, start = curved
    config = Laplace()
    two_chains = config.run(KEY, density, start, num_warmup=1, num_samples=20, num_chains=2)
    one_chain = config.run(KEY, density, start, num_warmup=1, num_samples=40)
    np.testing.assert_array_equal(two_chains.draws.reshape(40, -1), one_chain.draws[0])


@pytest.mark.parametrize("config", [Laplace(), Laplace(structure="low_rank", rank=3), Laplace(structure="diagonal")])
def test_second_run_compiles_nothing(curved, config, caplog):
    density, start = curved
    config.run(KEY, density, start, num_warmup=1, num_samples=20)
    terms = density.terms._replace(y=density.terms.y + np.float32(0.01))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        config.run(KEY, dataclasses.replace(density, terms=terms), start + 0.01, num_warmup=1, num_samples=20)
    assert [record.message for record in caplog.records if "Finished XLA compilation" in record.message] == []


def one_row_or_linear(hidden, rows, num_outputs=1):
    """All weights of a network random, with known noise."""
    rng = np.random.default_rng(8)
    network = as_network(nb.FlaxMLP(hidden, num_outputs))
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = rng.normal(size=(rows, num_outputs)).astype(np.float32)
    params, _ = network.init(jax.random.key(1), x)
    params = jax.tree.map(np.asarray, params)
    partition = Partition.everything(trees.shapes(params))
    prior = WeightPrior(np.zeros(partition.size, np.float32), np.full(partition.size, 1.5, np.float32))
    weights = np.where(np.arange(rows) < max(1, rows - 2), 1.0, 0.0).astype(np.float32)
    density = log_density.build(
        network, partition, params, {}, x, y, weights, likelihood=Gaussian(), prior=prior,
        noise_prior=dist.HalfNormal(1.0),
    )  # fmt: skip
    theta = np.asarray(partition.split(params))
    noise = np.log(np.linspace(0.4, 0.8, num_outputs)).astype(np.float32)
    return density, (theta / 1.5).astype(np.float32), noise


def gauss_newton(density, u, noise, structure):
    """Eigenvalues by noise, and the matrix they make with their vectors."""
    found = spectrum(density.form, KEY, u, noise, density.terms, structure, 1)
    vectors = found.vectors if isinstance(found.vectors, np.ndarray) else found.vectors.dense()
    return found, (vectors * found.values) @ vectors.T


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_kronecker_is_exact_for_a_linear_model(num_outputs):
    density, u, noise = one_row_or_linear([], 12, num_outputs)
    expected = gauss_newton(density, u, noise, "full")[1]
    np.testing.assert_allclose(gauss_newton(density, u, noise, "kronecker")[1], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_kronecker_is_exact_for_one_row_but_between_layers(num_outputs):
    density, u, noise = one_row_or_linear([4, 3], 1, num_outputs)
    found, kronecker = gauss_newton(density, u, noise, "kronecker")
    full = gauss_newton(density, u, noise, "full")[1]
    ends = np.cumsum(density.form.blocks)
    layer = np.searchsorted(ends, np.arange(ends[-1]), side="right") // 2  # bias and kernel of each
    within = layer[:, None] == layer
    np.testing.assert_allclose(kronecker, np.where(within, full, 0.0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.by_noise.sum(axis=1), found.values)


def test_the_kronecker_basis_multiplies_as_its_matrix_does():
    density, u, noise = one_row_or_linear([4, 3], 9)
    basis = gauss_newton(density, u, noise, "kronecker")[0].vectors
    matrix, rng = basis.dense(), np.random.default_rng(0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(u)), atol=1e-12)
    rows, column = rng.normal(size=(5, len(u))), rng.normal(size=len(u))
    np.testing.assert_allclose(rows @ basis, rows @ matrix)
    np.testing.assert_allclose(rows @ basis.T, rows @ matrix.T)
    np.testing.assert_allclose(basis @ column, matrix @ column)
    np.testing.assert_allclose(basis.T @ column, matrix.T @ column)


def test_kronecker_is_nearer_to_the_full_curvature_than_the_diagonal(curved):
    density, start = curved
    spread = {}
    for structure in ("full", "kronecker", "diagonal"):
        config = Laplace(structure=structure)
        gaussian = config.run(KEY, density, start, num_warmup=1, num_samples=10).info["gaussian"]
        _, variance = predictive_moments(gaussian, density.form.hoisted, density.terms.carry)
        spread[structure] = np.log(variance)
    distance = {name: np.sqrt(np.mean((spread[name] - spread["full"]) ** 2)) for name in ("kronecker", "diagonal")}
    assert distance["kronecker"] < 0.7 * distance["diagonal"]


def test_kronecker_draws_have_the_gaussians_moments(curved, disagreement):
    density, start = curved
    posterior = Laplace(structure="kronecker").run(KEY, density, start, num_warmup=1, num_samples=1500, num_chains=2)
    gaussian, size = posterior.info["gaussian"], density.form.num_theta
    assert disagreement(posterior.draws[..., :size], gaussian.mode[:size], covariance(gaussian)) == []


def test_kronecker_says_what_it_is_for(regression_like):
    X, y = regression_like
    model = nb.PartialBNN(nb.FlaxMLP([4], 1), probabilistic_neurons={"Dense0": [(0, 1)]}, num_backbones=1)
    with pytest.raises(OptionError, match="whole dense layers"):
        model.fit(X, y, num_samples=10, sgd_epochs=5, map_sigma=1.0, engine=Laplace(structure="kronecker"))


@pytest.fixture
def regression_like():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 2))
    return X, X[:, 0] + 0.1 * rng.normal(size=30)


def test_options_are_checked():
    with pytest.raises(OptionError, match="structure"):
        Laplace(structure="block")
    with pytest.raises(OptionError, match="prior_scale"):
        Laplace(prior_scale="auto")
