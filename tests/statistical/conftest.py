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
from neurobayes.inference import NUTS, Engine
from neurobayes.likelihoods import Categorical, Gaussian, Likelihood
from neurobayes.log_density import LogDensity, Terms
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
class KnownNoise(Likelihood):
    """Gaussian noise whose standard deviations are given: with a Gaussian prior, the conjugate case."""

    noise_std: tuple[float, ...]

    def log_prob(self, outputs, y, noise_std):
        return Gaussian().log_prob(outputs, y, jnp.asarray(self.noise_std))

    def num_noise(self, num_outputs: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class LogGammaForm:
    """Independent logarithms of gamma variables: skewed, with moments in closed form."""

    shapes: tuple[float, ...]
    num_noise: int = 0

    @property
    def num_theta(self) -> int:
        return len(self.shapes)

    def __call__(self, position, terms):
        return jnp.sum(jnp.asarray(self.shapes) * position - jnp.exp(position))


def bayesian_linear_regression(features, y, prior_std, noise_std):
    """Mean (d,) and covariance (d, d) of the weights of one output, prior centred at zero; float64."""
    cov = np.linalg.inv(features.T @ features / noise_std**2 + np.eye(features.shape[1]) / prior_std**2)
    return cov @ features.T @ y / noise_std**2, cov


@pytest.fixture(name="bayesian_linear_regression", scope="session")
def _bayesian_linear_regression():
    return bayesian_linear_regression


def last_layer(name, *, rows, hidden, noise_std, prior_std=1.0, inputs=2, seed=0) -> Target:
    """A network whose output layer alone is random, noise known: its posterior is Gaussian."""
    rng = np.random.default_rng(seed)
    num_outputs = len(noise_std)
    network = as_network(nb.FlaxMLP([hidden], num_outputs))
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    y = (np.sin(2 * x[:, :1]) + rng.normal(size=(rows, num_outputs)) * noise_std).astype(np.float32)
    params = {
        "Dense0": {"bias": rng.normal(size=hidden), "kernel": rng.normal(size=(inputs, hidden))},
        "Dense1": {"bias": np.zeros(num_outputs), "kernel": np.zeros((hidden, num_outputs))},
    }
    params = jax.tree.map(np.float32, params)
    partition = Partition.from_masks(
        {"Dense1.bias": np.ones(num_outputs, bool), "Dense1.kernel": np.ones((hidden, num_outputs), bool)},
        trees.shapes(params),
    )
    prior = WeightPrior(np.zeros(partition.size, np.float32), np.full(partition.size, prior_std, np.float32))
    density = log_density.build(
        network, partition, params, {}, x, y, np.ones(rows, np.float32),
        likelihood=KnownNoise(tuple(noise_std)), prior=prior, noise_prior=None,
    )  # fmt: skip
    first = params["Dense0"]
    features = np.tanh(x.astype(float) @ first["kernel"] + first["bias"])
    features = np.concatenate([np.ones((rows, 1)), features], axis=1)
    # theta is the biases, then the kernel row by row: entry (feature f, output k) at f * num_outputs + k.
    mean = np.zeros(partition.size)
    cov = np.zeros((partition.size, partition.size))
    for k, std in enumerate(noise_std):
        at = np.arange(hidden + 1) * num_outputs + k
        mean[at], cov[np.ix_(at, at)] = bayesian_linear_regression(features, y[:, k].astype(float), prior_std, std)
    return Target(name, density, np.zeros(partition.size, np.float32), mean, cov)


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
    partition = Partition.from_masks({"Dense0.kernel": np.ones((1, 1), bool)}, trees.shapes(params))
    prior = WeightPrior(np.zeros(1, np.float32), np.ones(1, np.float32))
    density = log_density.build(
        network, partition, params, {}, x, y, np.ones(5, np.float32),
        likelihood=Gaussian(), prior=prior, noise_prior=dist.HalfNormal(2.0),
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
    partition = Partition.from_masks(masks, trees.shapes(params))
    prior = WeightPrior(np.zeros(3, np.float32), np.full(3, 1.5, np.float32))
    density = log_density.build(
        network, partition, params, {}, x, labels, np.ones(24, np.float32),
        likelihood=Categorical(), prior=prior, noise_prior=None,
    )  # fmt: skip

    def by_hand(points):
        logits = points[:, :1] + points[:, 1:] @ x.T.astype(float)
        data = np.where(labels == 1, scipy.special.log_expit(logits), scipy.special.log_expit(-logits))
        return scipy.stats.norm.logpdf(points, scale=1.5).sum(axis=1) + data.sum(axis=1)

    mean, cov = grid_moments(by_hand, [np.linspace(-6, 7, 66)] * 3)
    return Target("logistic regression", density, np.zeros(3, np.float32), mean, cov)


def log_gamma() -> Target:
    """Skewness from -1.1 to -0.5, in closed form."""
    shapes = (1.0, 2.0, 5.0)
    prior = WeightPrior(np.zeros(3, np.float32), np.ones(3, np.float32))
    density = LogDensity(LogGammaForm(shapes), Terms([], None, None, prior, None))  # type: ignore[arg-type]
    mean, var = scipy.special.digamma(shapes), scipy.special.polygamma(1, shapes)
    return Target("log-gamma", density, np.zeros(3, np.float32), mean, np.diag(var))


TARGETS: Mapping[str, Callable[[], Target]] = {
    "correlated": lambda: last_layer("correlated", rows=60, hidden=6, noise_std=(0.3,)),
    "fewer rows than weights": lambda: last_layer("fewer rows than weights", rows=5, hidden=11, noise_std=(0.3,)),
    "two outputs": lambda: last_layer("two outputs", rows=30, hidden=3, noise_std=(0.2, 1.0), prior_std=2.0),
    "unknown noise": unknown_noise,
    "logistic regression": logistic_regression,
    "log-gamma": log_gamma,
}


@functools.cache
def made(name: str) -> Target:
    return TARGETS[name]()


@pytest.fixture(params=TARGETS)
def target(request) -> Target:
    """Each target in turn."""
    return made(request.param)


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
    """

    name: str
    engine: Engine
    num_warmup: int = 400
    num_samples: int = 750
    num_chains: int = 4
    min_ess: float = 400.0
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()


ENGINES = [
    Case(name="nuts", engine=NUTS()),
    Case(name="nuts, diagonal mass", engine=NUTS(dense_mass=False), num_samples=1500),
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


@pytest.fixture(params=ENGINES, ids=lambda case: case.name)
def case(request) -> Case:
    """Each engine in turn."""
    return request.param


@pytest.fixture
def draws(case, target) -> np.ndarray:
    """What the engine made of the target, run once for all tests."""
    if target.name in case.passed_over:
        pytest.skip(f"{case.name} is not made for {target.name}")
    return _run(case.name, target.name)
