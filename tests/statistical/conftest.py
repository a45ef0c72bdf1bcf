"""Targets with known moments, the engines that are to recover them, and the judge of both.

A new engine is one line in ``ENGINES`` and is then run on every target; a new
target is one function in ``TARGETS`` and is then put to every engine.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats

import neurobayes as nb
from neurobayes import log_density, trees
from neurobayes.diagnostics import effective_sample_size
from neurobayes.inference import MCLMC, NUTS, SGMCMC, SVI, Engine, Laplace, LastLayer, Pathfinder
from neurobayes.likelihoods import Categorical, Gaussian, Likelihood
from neurobayes.log_density import LogDensity
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import WeightPrior

FAMILY_WISE = 1e-4
"""Chance that a right sampler fails one test of one target, all its comparisons together."""


# --- the judge


def disagreement(draws, mean, cov, *, min_ess=400.0, budget=0.0) -> list[str]:
    """Which moments of draws (chain, draw, size) are off by more than their Monte-Carlo error allows.

    Coordinates are whitened by the reference, so that every direction counts,
    narrow ones too; compared are all means and all covariances. The allowance
    of each is its own Monte-Carlo standard error, from its own effective
    sample size, times the normal quantile for that many comparisons, plus
    ``budget`` posterior standard deviations of known bias.
    """
    draws = np.asarray(draws, float)
    white = np.linalg.solve(np.linalg.cholesky(cov), (draws - mean)[..., None])[..., 0]
    size = white.shape[-1]
    i, j = np.triu_indices(size)
    quantities = np.concatenate([white, white[..., i] * white[..., j]], axis=-1)
    expected = np.concatenate([np.zeros(size), (i == j).astype(float)])
    names = [f"mean {k}" for k in range(size)] + [f"covariance {a}, {b}" for a, b in zip(i, j, strict=True)]
    ess = effective_sample_size(quantities, "mean")
    assert ess.min() >= min_ess, f"too few effective draws to judge: {ess.min():.0f} of {names[int(ess.argmin())]}"
    quantile = scipy.stats.norm.isf(FAMILY_WISE / 2 / len(expected))
    allowed = quantile * quantities.std(axis=(0, 1)) / np.sqrt(ess) + budget
    error = np.abs(quantities.mean(axis=(0, 1)) - expected)
    return [f"{names[k]}: off by {error[k]:.3f}, allowed {allowed[k]:.3f}" for k in np.flatnonzero(error > allowed)]


def shrunk(draws, factor=0.8):
    """Draws of a sampler whose spread is too small: the negative control."""
    centre = draws.mean(axis=(0, 1))
    return centre + factor * (draws - centre)


@pytest.fixture(name="disagreement", scope="session")
def _disagreement():
    return disagreement


@pytest.fixture(name="shrunk", scope="session")
def _shrunk():
    return shrunk


# --- targets


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A log density with its exact mean and covariance, in the coordinates of a position."""

    name: str
    log_density: LogDensity
    start: np.ndarray
    mean: np.ndarray
    cov: np.ndarray


@dataclasses.dataclass(frozen=True)
class KnownNoise(Gaussian):
    """Gaussian noise whose standard deviations are given: with a Gaussian prior, the conjugate case."""

    noise_std: tuple[float, ...]

    def log_prob(self, outputs, y, noise_std):
        return super().log_prob(outputs, y, jnp.asarray(self.noise_std))

    def sample(self, key, outputs, noise_std):
        return super().sample(key, outputs, jnp.asarray(self.noise_std))

    def num_noise(self, num_outputs: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Counts(Likelihood):
    """Poisson counts, whose logarithmic rate is the output."""

    def log_prob(self, outputs, y, noise_std):
        return jnp.sum(y * outputs - jnp.exp(outputs) - jax.scipy.special.gammaln(y + 1), axis=-1)

    def sample(self, key, outputs, noise_std):
        return jax.random.poisson(key, jnp.exp(outputs), outputs.shape).astype(outputs.dtype)

    def num_noise(self, num_outputs: int) -> int:
        return 0


def bayesian_linear_regression(features, y, prior_std, noise_std):
    """Mean (d,) and covariance (d, d) of the weights of one output, prior centred at zero; float64."""
    cov = np.linalg.inv(features.T @ features / noise_std**2 + np.eye(features.shape[1]) / prior_std**2)
    return cov @ features.T @ y / noise_std**2, cov


@pytest.fixture(name="bayesian_linear_regression", scope="session")
def _bayesian_linear_regression():
    return bayesian_linear_regression


def last_layer(name, *, rows, hidden, noise_std, noise_prior_scale=None, prior_std=1.0, seed=0) -> Target:
    """A network whose output layer alone is random, the noise known or half-normal of the given scale.

    Its posterior is Gaussian given the noise, which the reference integrates by quadrature.
    """
    rng = np.random.default_rng(seed)
    inputs, num_outputs = 2, len(noise_std)
    network = as_network(nb.FlaxMLP([hidden], num_outputs))
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    y = (np.sin(2 * x[:, :1]) + rng.normal(size=(rows, num_outputs)) * noise_std).astype(np.float32)
    params = {
        "Dense0": {"bias": rng.normal(size=hidden), "kernel": rng.normal(size=(inputs, hidden))},
        "Dense1": {"bias": np.zeros(num_outputs), "kernel": np.zeros((hidden, num_outputs))},
    }
    params = jax.tree.map(np.float32, params)
    masks = {"Dense1.bias": np.ones(num_outputs, bool), "Dense1.kernel": np.ones((hidden, num_outputs), bool)}
    known = noise_prior_scale is None
    density = linear_target(
        network, params, masks, x, y, likelihood=KnownNoise(tuple(noise_std)) if known else Gaussian(),
        prior_std=prior_std, noise_prior=None if known else dist.HalfNormal(noise_prior_scale),
    )  # fmt: skip
    first = params["Dense0"]
    features = np.tanh(x.astype(float) @ first["kernel"] + first["bias"])
    features = np.concatenate([np.ones((rows, 1)), features], axis=1)
    # theta is the biases, then the kernel row by row: entry (feature f, output k) at f * num_outputs + k.
    num_theta = (hidden + 1) * num_outputs
    mean, cov = np.zeros(density.size), np.zeros((density.size, density.size))
    for k, std in enumerate(noise_std):
        at = np.arange(hidden + 1) * num_outputs + k
        target = y[:, k].astype(float)
        if known:
            moments = bayesian_linear_regression(features, target, prior_std, std)
        else:
            at = np.append(at, num_theta + k)
            moments = integrated_over_noise(features, target, prior_std, noise_prior_scale)
        mean[at], cov[np.ix_(at, at)] = moments
    return Target(name, density, np.zeros(density.size, np.float32), mean, cov)


def linear_target(network, params, masks, x, y, *, likelihood, prior_std, noise_prior=None) -> LogDensity:
    """The library's log density for the chosen weights, prior centred at zero."""
    partition = Partition.from_masks(masks, trees.shapes(params))
    prior = WeightPrior(np.zeros(partition.size, np.float32), np.full(partition.size, prior_std, np.float32))
    return log_density.build(
        network, partition, params, {}, x, y, np.ones(len(x), np.float32),
        likelihood=likelihood, prior=prior, noise_prior=noise_prior,
    )  # fmt: skip


def integrated_over_noise(features, y, prior_std, noise_prior_scale):
    """Mean and covariance of one output's weights and the logarithm of its noise, by quadrature over the latter."""
    nodes = np.linspace(-5.0, 2.5, 301)
    log_weights = [
        scipy.stats.halfnorm.logpdf(np.exp(t), scale=noise_prior_scale) + t
        + scipy.stats.multivariate_normal.logpdf(
            y, cov=prior_std**2 * features @ features.T + np.exp(2 * t) * np.eye(len(y))
        )
        for t in nodes
    ]  # fmt: skip
    weights = np.exp(log_weights - np.max(log_weights))
    weights /= weights.sum()
    assert max(weights[0], weights[-1]) < 1e-8, "the quadrature cuts off mass"
    given = [bayesian_linear_regression(features, y, prior_std, np.exp(t)) for t in nodes]
    means = np.column_stack([np.stack([mean for mean, _ in given]), nodes])
    mean = weights @ means
    cov = (weights[:, None] * (means - mean)).T @ (means - mean)
    cov[:-1, :-1] += np.tensordot(weights, np.stack([cov for _, cov in given]), axes=1)
    return mean, cov


def grid_moments(log_prob: Callable, axes) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of an unnormalised density by the trapezoid rule on a grid that holds all its mass."""
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    values = log_prob(points)
    weights = np.exp(values - values.max())
    weights /= weights.sum()
    edge = np.any([(points[:, k] == axis[0]) | (points[:, k] == axis[-1]) for k, axis in enumerate(axes)], axis=0)
    assert weights[edge].sum() < 1e-6, "the grid cuts off mass"
    mean = weights @ points
    return mean, (weights[:, None] * (points - mean)).T @ (points - mean)


def unknown_noise() -> Target:
    """Slope and noise from five rows: the logarithm of the noise has a long upper tail."""
    rng = np.random.default_rng(5)
    x = np.float32([[-1.5], [-0.4], [0.1], [0.8], [1.7]])
    y = (0.8 * x + 0.4 * rng.normal(size=x.shape)).astype(np.float32)
    network, params = as_network(nb.FlaxMLP([], 1)), {"Dense0": {"bias": np.zeros(1), "kernel": np.zeros((1, 1))}}
    params = jax.tree.map(np.float32, params)
    density = linear_target(
        network, params, {"Dense0.kernel": np.ones((1, 1), bool)}, x, y,
        likelihood=Gaussian(), prior_std=1.0, noise_prior=dist.HalfNormal(2.0),
    )  # fmt: skip

    def by_hand(points):
        slope, log_noise = points.T
        noise_std = np.exp(log_noise)
        data = scipy.stats.norm.logpdf(y.astype(float).T, slope[:, None] * x[:, 0].astype(float), noise_std[:, None])
        prior = scipy.stats.norm.logpdf(slope) + scipy.stats.halfnorm.logpdf(noise_std, scale=2.0) + log_noise
        return prior + data.sum(axis=1)

    mean, cov = grid_moments(by_hand, [np.linspace(-5, 6, 441), np.linspace(-5, 4, 541)])
    return Target("unknown noise", density, np.float32([0.0, -0.5]), mean, cov)


def logistic_regression() -> Target:
    """Two classes, two inputs; the logit of the second class has random weights, that of the first is zero."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(24, 2)).astype(np.float32)
    labels = (rng.random(24) < scipy.special.expit(2.0 * x[:, 0] - x[:, 1] + 1.0)).astype(np.int32)
    network = as_network(nb.FlaxMLP([], 2))
    params = {"Dense0": {"bias": np.zeros(2, np.float32), "kernel": np.zeros((2, 2), np.float32)}}
    masks = {"Dense0.bias": np.array([False, True]), "Dense0.kernel": np.array([[False, True], [False, True]])}
    density = linear_target(network, params, masks, x, labels, likelihood=Categorical(), prior_std=1.5)

    def by_hand(points):
        logits = points[:, :1] + points[:, 1:] @ x.T.astype(float)
        data = np.where(labels == 1, scipy.special.log_expit(logits), scipy.special.log_expit(-logits))
        return scipy.stats.norm.logpdf(points, scale=1.5).sum(axis=1) + data.sum(axis=1)

    mean, cov = grid_moments(by_hand, [np.linspace(-6, 7, 66)] * 3)
    return Target("logistic regression", density, np.zeros(3, np.float32), mean, cov)


def counts() -> Target:
    """Logarithmic rates of three counters that have counted 0, 2 and 9 in one interval: skewed to either side."""
    y = np.float32([[0.0, 2.0, 9.0]])
    network = as_network(nb.FlaxMLP([], 3))
    params = {"Dense0": {"bias": np.zeros(3, np.float32), "kernel": np.zeros((1, 3), np.float32)}}
    density = linear_target(
        network, params, {"Dense0.bias": np.ones(3, bool)}, np.ones((1, 1), np.float32), y,
        likelihood=Counts(), prior_std=2.0,
    )  # fmt: skip
    mean, var = np.zeros(3), np.zeros(3)
    for k in range(3):

        def by_hand(points, count=float(y[0, k])):
            rate = points[:, 0]
            return scipy.stats.norm.logpdf(rate, scale=2.0) + count * rate - np.exp(rate)

        (mean[k],), ((var[k],),) = grid_moments(by_hand, [np.linspace(-14, 6, 4001)])
    return Target("counts", density, np.zeros(3, np.float32), mean, np.diag(var))


def hidden_bias() -> Target:
    """The bias of the one hidden unit random besides the output layer: given it and the noise, all is Gaussian."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(25, 2)).astype(np.float32)
    kernel = np.float32([[1.5], [-0.5]])
    y = (np.tanh(x @ kernel + 0.7) + 0.3 * rng.normal(size=(25, 1))).astype(np.float32)
    network = as_network(nb.FlaxMLP([1], 1))
    zero = np.zeros(1, np.float32)
    params = {"Dense0": {"bias": zero, "kernel": kernel}, "Dense1": {"bias": zero, "kernel": np.zeros((1, 1))}}
    params = jax.tree.map(np.float32, params)
    masks = {"Dense0.bias": np.ones(1, bool), "Dense1.bias": np.ones(1, bool), "Dense1.kernel": np.ones((1, 1), bool)}
    density = linear_target(
        network, params, masks, x, y, likelihood=Gaussian(), prior_std=1.0, noise_prior=dist.HalfNormal(1.0)
    )
    biases, log_noises = np.linspace(-6, 6, 241), np.linspace(-3.5, 1.5, 121)
    points, log_weights, covs = [], [], []
    for bias in biases:
        features = np.column_stack([np.ones(25), np.tanh(x.astype(float) @ kernel + bias)])
        values, vectors = np.linalg.eigh(features @ features.T)
        rotated = (vectors.T @ y[:, 0].astype(float)) ** 2
        for t in log_noises:
            total = values + np.exp(2 * t)
            evidence = -0.5 * np.sum(np.log(2 * np.pi * total) + rotated / total)
            prior = scipy.stats.norm.logpdf(bias) + np.log(2 / np.sqrt(2 * np.pi)) - 0.5 * np.exp(2 * t) + t
            mean, cov = bayesian_linear_regression(features, y[:, 0].astype(float), 1.0, np.exp(t))
            points.append([bias, *mean, t])
            covs.append(cov)
            log_weights.append(evidence + prior)
    weights = np.exp(log_weights - np.max(log_weights))
    weights /= weights.sum()
    grid = weights.reshape(len(biases), len(log_noises))
    assert max(grid[0].sum(), grid[-1].sum(), grid[:, 0].sum(), grid[:, -1].sum()) < 1e-6, "the grid cuts off mass"
    points = np.array(points)
    mean = weights @ points
    cov = (weights[:, None] * (points - mean)).T @ (points - mean)
    cov[1:3, 1:3] += np.tensordot(weights, np.stack(covs), axes=1)
    return Target("hidden bias", density, np.float32([0.7, 0.0, 1.0, -1.0]), mean, cov)


TARGETS: Mapping[str, Callable[[], Target]] = {
    "correlated": lambda: last_layer("correlated", rows=60, hidden=6, noise_std=(0.3,), noise_prior_scale=1.0),
    "fewer rows than weights": lambda: last_layer("fewer rows than weights", rows=5, hidden=11, noise_std=(0.3,)),
    "two outputs": lambda: last_layer(
        "two outputs", rows=30, hidden=3, noise_std=(0.2, 1.0), noise_prior_scale=0.5, prior_std=2.0
    ),
    "unknown noise": unknown_noise,
    "logistic regression": logistic_regression,
    "counts": counts,
    "hidden bias": hidden_bias,
}


@functools.cache
def made(name: str) -> Target:
    return TARGETS[name]()


@pytest.fixture(name="last_layer", scope="session")
def _last_layer():
    return last_layer


# --- engines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An engine with the effort it is given, and what is known of its bias.

    Attributes
    ----------
    min_ess : fewer effective draws of any moment than this, and the run cannot be judged. 400 leave an
        allowance for a variance of about a third of the variance.
    budget : target -> known bias in posterior standard deviations (of variances: in variances); none by default.
    passed_over : targets that are outside what the engine is made for.
    slow : targets left out of the default run.
    """

    name: str
    engine: Engine
    num_warmup: int = 400
    num_samples: int = 750
    num_chains: int = 4
    min_ess: float = 400.0
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()


ALL = frozenset(TARGETS)

TOO_SKEWED = frozenset({"unknown noise", "hidden bias"})
"""Where a Gaussian is off by 0.6 standard deviations: a budget that wide would let wrong engines pass too."""

NOTHING_HIDDEN = frozenset(TARGETS) - {"hidden bias"}
"""Where there is no output layer to integrate out besides other weights."""

ENGINES = [
    Case(name="nuts", engine=NUTS()),
    Case(name="nuts, diagonal mass", engine=NUTS(dense_mass=False), num_samples=1500, slow=ALL),
    Case(
        name="last layer",
        engine=LastLayer(),
        passed_over=frozenset({"fewer rows than weights", "logistic regression", "counts", "hidden bias"}),
    ),
    Case(name="nuts, collapsed", engine=NUTS(collapse=True), passed_over=NOTHING_HIDDEN),
    Case(
        name="mclmc, collapsed",
        engine=MCLMC(collapse=True),
        num_samples=2000,
        passed_over=NOTHING_HIDDEN,
        budget={"hidden bias": 0.1},
    ),
    # Without an accept step. In two dimensions, with a tail in one, the energy error per dimension says least.
    Case(
        name="mclmc",
        engine=MCLMC(),
        budget={"unknown noise": 0.1, "hidden bias": 0.1},
        slow=ALL - {"correlated"},
    ),
    Case(name="mclmc, adjusted", engine=MCLMC(adjusted=True), slow=ALL),
    # All rows in a batch; the step size widens variances by up to a tenth, and ``test_sgmcmc`` has smaller batches.
    Case(
        name="sgmcmc",
        engine=SGMCMC(method="sghmc", schedule="constant", thinning=100),
        num_samples=1500,
        budget=dict.fromkeys(TARGETS, 0.1),
        slow=ALL,
    ),
    # Gaussians at a mode: exact for known noise; else they miss the skewness, and the weights' dependence on the noise.
    Case(
        name="laplace",
        engine=Laplace(),
        passed_over=TOO_SKEWED,
        budget={
            "correlated": 0.05,
            "two outputs": 0.1,
            "logistic regression": 0.35,
            "counts": 0.28,
        },
    ),
    # The nearest Gaussian has the right mean, but is too narrow where the posterior has heavier tails.
    Case(
        name="svi",
        engine=SVI(),
        slow=ALL,
        passed_over=TOO_SKEWED,
        budget={
            "correlated": 0.1,
            "two outputs": 0.1,
            "logistic regression": 0.1,
            "counts": 0.2,
        },
    ),
    # Of the mode's neighbourhood, with a curvature from a few gradients.
    Case(
        name="pathfinder",
        engine=Pathfinder(),
        slow=ALL,
        passed_over=TOO_SKEWED,
        budget={
            "correlated": 0.3,
            "fewer rows than weights": 0.1,
            "two outputs": 0.42,
            "logistic regression": 0.35,
            "counts": 0.28,
        },
    ),
]


@functools.cache
def _run(case_name: str, target_name: str) -> np.ndarray:
    case = next(case for case in ENGINES if case.name == case_name)
    target = made(target_name)
    posterior = case.engine.run(
        jax.random.key(0), target.log_density, target.start,
        num_warmup=case.num_warmup, num_samples=case.num_samples, num_chains=case.num_chains,
    )  # fmt: skip
    return posterior.draws


PAIRS = [
    pytest.param((case, name), marks=[pytest.mark.slow] if name in case.slow else [], id=f"{case.name}-{name}")
    for case in ENGINES
    for name in TARGETS
    if name not in case.passed_over
]


@pytest.fixture(params=PAIRS)
def pair(request) -> tuple[Case, str]:
    """Each engine with each target it is made for."""
    return request.param


@pytest.fixture
def case(pair) -> Case:
    return pair[0]


@pytest.fixture
def target(pair) -> Target:
    return made(pair[1])


@pytest.fixture
def draws(pair) -> np.ndarray:
    """What the engine made of the target, run once for all tests."""
    return _run(pair[0].name, pair[1])
