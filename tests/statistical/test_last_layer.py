"""Exact draws: against closed forms, an independent integration, NUTS, and the prior they must reproduce."""

import functools

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from scipy.integrate import trapezoid
from scipy.special import gammaln, logsumexp

import neurobayes as nb
from neurobayes import trees
from neurobayes.hoisting import hoist_network
from neurobayes.inference import NUTS, LastLayer
from neurobayes.inference.last_layer import analytic_moments, examine
from neurobayes.likelihoods import Gaussian
from neurobayes.log_density import LogDensity, build
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import WeightPrior

KEY = jax.random.key(0)


def problem(features, y, *, noise_prior, prior_std=1.0, prior_mean=0.0, row_weights=None):
    """A linear network whose kernel is random; theta[f * outputs + o] belongs to feature f and output o."""
    features, y = np.asarray(features, np.float32), np.asarray(y, np.float32).reshape(len(features), -1)
    network = as_network(nb.FlaxMLP([], y.shape[1]))
    shape = (features.shape[1], y.shape[1])
    params = {"Dense0": {"bias": np.zeros(shape[1], np.float32), "kernel": np.zeros(shape, np.float32)}}
    partition = Partition.from_masks({"Dense0.kernel": np.ones(shape, bool)}, trees.shapes(params))
    mean, std = (np.broadcast_to(np.float32(v), partition.size) for v in (prior_mean, prior_std))
    weights = np.ones(len(y), np.float32) if row_weights is None else np.asarray(row_weights, np.float32)
    return build(
        network, partition, params, {}, features, y, weights,
        likelihood=Gaussian(), prior=WeightPrior(mean, std), noise_prior=noise_prior,
    )  # fmt: skip


def run(density, num_samples=1000, engine=None, **options):
    engine = LastLayer() if engine is None else engine
    return engine.run(KEY, density, np.zeros(density.size), num_warmup=1, num_samples=num_samples, **options)


def data(rows=40, features=4, noise_std=0.3, seed=0):
    """Correlated features and targets of random weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)) @ (np.eye(features) + 0.9)
    return x, x @ rng.normal(size=features) + noise_std * rng.normal(size=rows)


def known(noise_std):
    """A prior that pins the noise."""
    return dist.LogNormal(np.log(noise_std), 1e-5)


def weight_moments(output):
    """Posterior mean and covariance of one output's weights relative to the prior mean, from its mixture."""
    basis, weights = output.spectrum.basis, output.weights
    means = output.spectrum.conditional_mean(output.noise_std, output.prior_scale) @ basis.T
    shrinkage = output.spectrum.shrinkage(output.noise_std, output.prior_scale)
    scale = output.prior_scale**2
    mean = weights @ means
    cov = (weights @ scale) * np.eye(len(basis)) - (basis * ((weights * scale) @ shrinkage)) @ basis.T
    cov += (weights[:, None] * (means - mean)).T @ (means - mean)
    return output.prior_std * mean, np.outer(output.prior_std, output.prior_std) * cov


def log_normal(y, cov):
    """Log density of a centred Gaussian, also where its covariance is nearly singular."""
    return -0.5 * (len(y) * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1] + y @ np.linalg.solve(cov, y))


def by_hand(x, y, noise_prior_log_prob, *, prior_std=1.0, prior_mean=0.0, low=-12.0, high=4.0, num=1601):
    """Log evidence, moments of weights and of log noise, by brute force in float64 over the logarithm of the noise."""
    x, y = (
        np.asarray(x, np.float32).astype(float),
        np.asarray(y, np.float32).astype(float) - x @ np.broadcast_to(prior_mean, x.shape[1]),
    )
    std = np.broadcast_to(np.float32(prior_std).astype(float), x.shape[1])
    nodes = np.linspace(low, high, num)
    log_joint, means, covs = [], [], []
    for t in nodes:
        marginal = (x * std**2) @ x.T + np.exp(2 * t) * np.eye(len(y))
        log_joint.append(log_normal(y, marginal) + noise_prior_log_prob(np.exp(t)) + t)
        gain = np.linalg.solve(marginal, x * std**2).T
        means.append(gain @ y + prior_mean)
        covs.append(np.diag(std**2) - gain @ (x * std**2))
    log_joint = np.array(log_joint)
    log_evidence = logsumexp(log_joint) + np.log(nodes[1] - nodes[0])
    weights = np.exp(log_joint - logsumexp(log_joint))
    means = np.array(means)
    mean = weights @ means
    cov = np.tensordot(weights, np.array(covs), axes=1) + (weights[:, None] * (means - mean)).T @ (means - mean)
    log_noise = weights @ nodes
    return log_evidence, mean, cov, log_noise, weights @ (nodes - log_noise) ** 2


# --- moments without draws, to the precision of float32 features


@pytest.mark.parametrize(("rows", "features"), [(40, 4), (6, 15), (1, 3)], ids=["tall", "wide", "one row"])
def test_known_noise_is_the_conjugate_regression(rows, features, bayesian_linear_regression):
    x, y = data(rows, features)
    (output,) = run(problem(x, y, noise_prior=known(0.3), prior_std=0.7)).analytic.outputs
    expected = bayesian_linear_regression(x, y, 0.7, 0.3)
    for mine, theirs in zip(weight_moments(output), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


PRIORS = {
    "half-normal": (dist.HalfNormal(0.8), lambda s: scipy.stats.halfnorm.logpdf(s, scale=0.8)),
    "inverse gamma": (dist.InverseGamma(2.0, 0.5), lambda s: scipy.stats.invgamma.logpdf(s, 2.0, scale=0.5)),
    "half-cauchy": (dist.HalfCauchy(0.5), lambda s: scipy.stats.halfcauchy.logpdf(s, scale=0.5)),
    "uniform": (dist.Uniform(0.01, 3.0), lambda s: scipy.stats.uniform.logpdf(s, 0.01, 2.99)),
}


@pytest.mark.parametrize("prior", ["half-normal", "inverse gamma", "half-cauchy"])
@pytest.mark.parametrize(("rows", "features"), [(40, 4), (6, 15), (3, 1)], ids=["tall", "wide", "three rows"])
def test_unknown_noise_is_integrated(rows, features, prior):
    x, y = data(rows, features)
    ours, theirs = PRIORS[prior]
    std = np.linspace(0.4, 1.5, features)
    posterior = run(problem(x, y, noise_prior=ours, prior_std=std, prior_mean=0.2), num_samples=20_000)
    log_evidence, mean, cov, log_noise, log_noise_var = by_hand(
        x, y, theirs, prior_std=std, prior_mean=0.2, low=-9.0 if rows > features else -30.0, high=12.0, num=2401
    )
    (output,) = posterior.analytic.outputs
    np.testing.assert_allclose(posterior.info["log_evidence"], log_evidence, atol=2e-4)
    got_mean, got_cov = weight_moments(output)
    np.testing.assert_allclose(got_mean + 0.2, mean, atol=5e-5)
    np.testing.assert_allclose(got_cov, cov, atol=5e-5)
    logs = np.log(output.noise_std)
    np.testing.assert_allclose(output.weights @ logs, log_noise, atol=1e-4)
    np.testing.assert_allclose(output.weights @ (logs - log_noise) ** 2, log_noise_var, rtol=2e-3)
    drawn = posterior.draws[0, :, -1].astype(float)
    assert abs(drawn.mean() - log_noise) < 5 * np.sqrt(log_noise_var / len(drawn))


def test_a_prior_with_two_bounds():
    """The coordinate of such a noise is a logit, not a logarithm."""
    x, y = data(12, 3)
    ours, theirs = PRIORS["uniform"]
    posterior = run(problem(x, y, noise_prior=ours))
    log_evidence, mean, _, log_noise, _ = by_hand(x, y, theirs, low=np.log(0.0101), high=np.log(2.99))
    (output,) = posterior.analytic.outputs
    np.testing.assert_allclose(posterior.info["log_evidence"], log_evidence, atol=0.02)
    np.testing.assert_allclose(weight_moments(output)[0], mean, atol=2e-3)
    np.testing.assert_allclose(output.weights @ np.log(output.noise_std), log_noise, atol=2e-3)


SQRT_INVERSE_GAMMA = dist.TransformedDistribution(
    dist.InverseGamma(3.0, 0.5), dist.transforms.PowerTransform(np.float32(0.5))
)


def test_noise_alone_is_an_inverse_gamma():
    """With features of zero and an inverse gamma prior on the variance everything is known in closed form."""
    rng = np.random.default_rng(1)
    y = 0.4 * rng.normal(size=30)
    posterior = run(problem(np.zeros((30, 2)), y, noise_prior=SQRT_INVERSE_GAMMA), num_samples=4000)
    shape, rate = 3.0 + 15.0, 0.5 + 0.5 * np.sum(y**2)
    evidence = gammaln(shape) - gammaln(3.0) + 3.0 * np.log(0.5) - shape * np.log(rate) - 15.0 * np.log(2 * np.pi)
    np.testing.assert_allclose(posterior.info["log_evidence"], evidence, atol=1e-4)
    (output,) = posterior.analytic.outputs
    np.testing.assert_allclose(output.noise_var, rate / (shape - 1), rtol=1e-5)
    assert output.effective_dimensions == 0
    variances = np.exp(2 * posterior.draws[0, :, -1].astype(float))
    assert scipy.stats.kstest(variances, scipy.stats.invgamma(shape, scale=rate).cdf).pvalue > 1e-4
    assert scipy.stats.kstest(posterior.draws[0, :, 0], "norm").pvalue > 1e-4  # weights without data keep their prior


def test_a_flat_prior_gives_the_normal_inverse_gamma_posterior():
    """Weights have a multivariate t distribution with ``2 a + n - p`` degrees of freedom."""
    x, y = data(30, 3)
    posterior = run(problem(x, y, noise_prior=SQRT_INVERSE_GAMMA, prior_std=1000.0), num_samples=4000)
    gram = x.T @ x
    least_squares = np.linalg.solve(gram, x.T @ y)
    freedom = 2 * 3.0 + 30 - 3
    rate = 2 * 0.5 + np.sum((y - x @ least_squares) ** 2)
    mean, cov = weight_moments(posterior.analytic.outputs[0])
    np.testing.assert_allclose(mean, least_squares, atol=1e-4)
    np.testing.assert_allclose(cov, rate / (freedom - 2) * np.linalg.inv(gram), rtol=1e-3)
    scale = np.sqrt(rate / freedom * np.linalg.inv(gram)[0, 0])
    assert scipy.stats.kstest((posterior.draws[0, :, 0] - least_squares[0]) / scale, "t", (freedom,)).pvalue > 1e-4


def test_an_unknown_prior_scale_is_integrated():
    x, y = data(20, 4)
    posterior = run(problem(x, y, noise_prior=known(0.3)), 4000, LastLayer(prior_scale="auto"))
    nodes = np.linspace(-7, 7, 1401)
    x, y = np.float32(x).astype(float), np.float32(y).astype(float)
    log_joint = np.array(
        [log_normal(y, np.exp(2 * t) * x @ x.T + 0.09 * np.eye(20)) + scipy.stats.norm.logpdf(t) for t in nodes]
    )
    log_evidence = np.log(trapezoid(np.exp(log_joint - log_joint.max()), nodes)) + log_joint.max()
    np.testing.assert_allclose(posterior.info["log_evidence"], log_evidence, atol=1e-3)
    weights = np.exp(log_joint - logsumexp(log_joint))
    mean, var = weights @ nodes, weights @ nodes**2 - (weights @ nodes) ** 2
    drawn = np.log(posterior.stats["prior_scale"])
    assert abs(drawn.mean() - mean) < 5 * np.sqrt(var / drawn.size)
    np.testing.assert_allclose(drawn.var(), var, rtol=0.15)


def test_row_weights_count_rows():
    """A row of weight two is that row twice; a row of weight zero is absent, whatever it holds."""
    x, y = data(12, 3)
    weights = np.ones(14)
    weights[:3], weights[12:] = 2.0, 0.0
    weighted = problem(
        np.concatenate([x, 1e3 * x[:2]]),
        np.append(y, [1e4, -1e4]),
        noise_prior=dist.HalfNormal(1.0),
        row_weights=weights,
    )
    repeated = problem(np.concatenate([x, x[:3]]), np.append(y, y[:3]), noise_prior=dist.HalfNormal(1.0))
    mine, theirs = run(weighted), run(repeated)
    np.testing.assert_allclose(mine.info["log_evidence"], theirs.info["log_evidence"], rtol=1e-6)
    np.testing.assert_allclose(mine.draws, theirs.draws, atol=1e-4)


def test_the_evidence_is_joint_over_posterior_at_every_draw():
    """Ties draws, evidence and the log density that every other engine samples together."""
    rng = np.random.default_rng(3)
    x, y = data(25, 3)
    y = np.stack([y, x[:, 0] + rng.normal(size=25)], axis=1)
    density = problem(x, y, noise_prior=dist.HalfNormal(np.float32([0.5, 2.0])), prior_std=[0.5, 1.0] * 3)
    posterior = run(density, 50)
    outputs = posterior.analytic.outputs
    for position in posterior.draws[0, :10].astype(float):
        log_posterior = 0.0
        for i, output in enumerate(outputs):
            noise = np.array([np.exp(position[6 + i])])
            spectrum, std = output.spectrum, output.prior_std
            mean = std * (spectrum.conditional_mean(noise, 1.0)[0] @ spectrum.basis.T)
            inner = np.eye(3) - (spectrum.basis * spectrum.shrinkage(noise, 1.0)[0]) @ spectrum.basis.T
            log_posterior += scipy.stats.multivariate_normal.logpdf(
                position[output.scalars], mean, std[:, None] * inner * std
            )
            log_posterior += np.interp(position[6 + i], np.log(output.noise_std), np.log(density_of(output)))
        joint = float(density(position.astype(np.float32)))
        np.testing.assert_allclose(joint - log_posterior, posterior.info["log_evidence"], atol=0.02)


def density_of(output):
    """The density of the log noise at the nodes."""
    return output.weights / np.gradient(np.log(output.noise_std))


def test_analytic_moments_are_those_of_the_draws():
    x, y = data(12, 3)
    y = np.stack([y, -y + x[:, 1]], axis=1)
    density = problem(x, y, noise_prior=dist.HalfNormal(1.0))
    posterior = run(density, 40_000)
    new = data(7, 3, seed=5)[0].astype(np.float32)
    network = as_network(nb.FlaxMLP([], 2))
    params = {"Dense0": {"bias": np.zeros(2, np.float32), "kernel": np.zeros((3, 2), np.float32)}}
    partition = Partition.from_masks({"Dense0.kernel": np.ones((3, 2), bool)}, trees.shapes(params))
    hoisted = hoist_network(network, partition, params, {}, new)
    mean, variance = analytic_moments(posterior.analytic, hoisted, hoisted.early(partition, params, {}, new))
    values = np.einsum("nf,dfo->dno", new, posterior.draws[0, :, :6].reshape(-1, 3, 2)).astype(float)
    error = values.std(axis=0) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(axis=0) - mean) < 5 * error)
    np.testing.assert_allclose(values.var(axis=0), variance, rtol=0.05)
    np.testing.assert_allclose(
        posterior.analytic.noise_var, np.exp(2 * posterior.draws[0, :, 6:]).mean(axis=0), rtol=0.05
    )


# --- what float32 makes hard


@pytest.mark.parametrize("rows", [220, 8])
def test_duplicated_features_and_tiny_noise(rows):
    rng = np.random.default_rng(0)
    x = np.tanh(rng.normal(size=(rows, 8)))
    x = np.concatenate([x, x, np.ones((rows, 1)), np.ones((rows, 1)), np.zeros((rows, 1))], axis=1)
    y = x[:, :8] @ rng.normal(size=8) + 1e-4 * rng.normal(size=rows)
    posterior = run(problem(x, y, noise_prior=dist.HalfNormal(1.0)), 2000)
    assert np.all(np.isfinite(posterior.draws))
    (output,) = posterior.analytic.outputs
    assert len(output.spectrum.eigenvalues) == min(rows, 9)
    fitted = posterior.draws[0, :, :-1].astype(float) @ x.T
    noise = np.exp(posterior.draws[0, :, -1].astype(float))
    if rows == 220:
        assert 0.8e-4 < noise.mean() < 1.25e-4
        assert np.abs(fitted.mean(axis=0) - y).max() < 1e-3
        np.testing.assert_allclose(output.effective_dimensions, 9, atol=1e-3)
    else:
        assert np.all(np.sqrt(np.mean((fitted - y) ** 2, axis=1)) < 10 * noise + 1e-5)
    difference = posterior.draws[0, :, 0] - posterior.draws[0, :, 8]  # the data know only the sum of the two
    assert scipy.stats.kstest(difference / np.sqrt(2), "norm").pvalue > 1e-4
    assert scipy.stats.kstest(posterior.draws[0, :, -2], "norm").pvalue > 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_targets_of_any_scale(scale):
    x, y = data(30, 3)
    unit = run(problem(x, y, noise_prior=dist.HalfNormal(1.0)))
    scaled = run(problem(x, scale * y, noise_prior=dist.HalfNormal(scale), prior_std=scale))
    np.testing.assert_allclose(scaled.draws[..., :3] / scale, unit.draws[..., :3], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(scaled.draws[..., 3] - np.log(scale), unit.draws[..., 3], atol=2e-3)


def test_many_rows_have_a_narrow_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50_000, 2))
    y = x @ [1.0, -1.0] + 0.5 * rng.normal(size=50_000)
    posterior = run(problem(x, y, noise_prior=dist.HalfNormal(1.0)), 4000)
    log_noise = posterior.draws[0, :, -1].astype(float)
    np.testing.assert_allclose(log_noise.std(), 1 / np.sqrt(2 * 50_000), rtol=0.06)
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert abs(log_noise.mean() - np.log(residual.std())) < 5e-4


def test_outputs_that_share_features_share_a_decomposition():
    x, y = data(20, 3)
    density = problem(x, np.stack([y, -2 * y], axis=1), noise_prior=dist.HalfNormal(1.0))
    first, second = run(density).analytic.outputs
    assert first.spectrum.basis is second.spectrum.basis
    uneven = problem(x, np.stack([y, -2 * y], axis=1), noise_prior=dist.HalfNormal(1.0), prior_std=[1, 2] * 3)
    first, second = run(uneven).analytic.outputs
    assert first.spectrum.basis is not second.spectrum.basis


def test_weights_shared_between_outputs_are_not_claimed():
    network = as_network((lambda params, x: x @ params["w"] + params["b"], {"w": np.ones((3, 2)), "b": np.ones(1)}))
    params = {"b": np.ones(1, np.float32), "w": np.ones((3, 2), np.float32)}
    partition = Partition.everything(trees.shapes(params))
    x, y = data(10, 3)
    prior = WeightPrior(np.zeros(7, np.float32), np.ones(7, np.float32))
    density = build(
        network, partition, params, {}, np.float32(x), np.float32(np.stack([y, y], axis=1)), np.ones(10, np.float32),
        likelihood=Gaussian(), prior=prior, noise_prior=dist.HalfNormal(1.0),
    )  # fmt: skip
    assert examine(density) == ("several outputs share random weights", None)


# --- against NUTS, and calibration


def two_outputs():
    x, y = data(25, 2)
    return problem(x, np.stack([y, 0.3 * y + x[:, 0]], axis=1), noise_prior=dist.HalfNormal(1.0))


TARGETS = {
    "correlated": lambda: problem(*data(40, 4), noise_prior=dist.HalfNormal(1.0)),
    "fewer rows than weights": lambda: problem(*data(5, 8), noise_prior=dist.InverseGamma(3.0, 1.0)),
    "two outputs": two_outputs,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nuts_agrees(name, disagreement, shrunk):
    """The exact moments judge draws of NUTS by the Monte-Carlo error of the latter."""
    density = TARGETS[name]()
    size, theta = density.size, density.form.num_theta
    mean, cov = np.zeros(size), np.zeros((size, size))
    exact = run(density, 200_000).draws[0].astype(float)  # covariances of weights and noise have no closed form here
    mean, cov = exact.mean(axis=0), np.cov(exact.T)
    for output in run(density).analytic.outputs:
        at = output.scalars
        mean[at], cov[np.ix_(at, at)] = weight_moments(output)
    nuts = NUTS(target_accept=0.95).run(
        KEY, density, np.concatenate([np.zeros(theta), np.full(size - theta, -0.5)]),
        num_warmup=800, num_samples=2000, num_chains=4,
    ).draws  # fmt: skip
    assert disagreement(nuts, mean, cov, budget=0.02) == []
    assert disagreement(shrunk(nuts), mean, cov, budget=0.02)


NUM_DRAWS, NUM_BINS, NUM_DATA_SETS = 127, 8, 1000


@functools.cache
def ranked_draws():
    """Truths drawn from the prior, and the draws for data made from each: (sets, size), (sets, draws, size)."""
    rng = np.random.default_rng(7)
    x = np.tanh(rng.normal(size=(12, 3)) @ rng.normal(size=(3, 4)))
    blank = problem(x, np.zeros(12), noise_prior=dist.HalfNormal(0.5), prior_std=0.8)
    truths, draws = [], []
    for k in range(NUM_DATA_SETS):
        theta, noise_std = 0.8 * rng.normal(size=4), abs(0.5 * rng.normal())
        y = np.float32(x @ theta + noise_std * rng.normal(size=12))[:, None]
        density = LogDensity(blank.form, blank.terms._replace(y=y))
        posterior = LastLayer().run(jax.random.key(k), density, np.zeros(5), num_warmup=1, num_samples=NUM_DRAWS)
        truths.append(np.append(theta, np.log(noise_std)))
        draws.append(posterior.draws[0])
    truths, draws = np.array(truths), np.array(draws, float)
    # The functions at two rows, beside the weights and the noise.
    at = x[:2].T
    return np.append(truths, truths[:, :4] @ at, axis=1), np.append(draws, draws[:, :, :4] @ at, axis=2)


def calibration_pvalues(truths, draws):
    """For each quantity, of the chi-square test that ranks of the truth among the draws are uniform."""
    ranks = np.sum(draws < truths[:, None], axis=1) * NUM_BINS // (NUM_DRAWS + 1)
    counts = np.stack([np.bincount(column, minlength=NUM_BINS) for column in ranks.T])
    return scipy.stats.chisquare(counts, axis=1).pvalue


@pytest.mark.slow
def test_simulation_based_calibration():
    truths, draws = ranked_draws()
    assert calibration_pvalues(truths, draws).min() > 1e-4 / truths.shape[1]


@pytest.mark.slow
def test_calibration_rejects_draws_that_are_too_narrow():
    truths, draws = ranked_draws()
    centre = draws.mean(axis=1, keepdims=True)
    assert calibration_pvalues(truths, centre + 0.8 * (draws - centre)).max() < 1e-4
