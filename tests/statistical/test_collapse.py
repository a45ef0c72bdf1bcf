"""The output layer integrated out: against row covariances, numerical gradients, and draws by the long way."""

import dataclasses

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import neurobayes as nb
from neurobayes import log_density, trees
from neurobayes.checkpoint import Checkpoint
from neurobayes.errors import OptionError
from neurobayes.inference import MCLMC, NUTS, _driver
from neurobayes.inference.base import RunControl
from neurobayes.inference.collapse import Completion, collapsed_form
from neurobayes.likelihoods import Categorical, Gaussian
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import WeightPrior

ROWS, REAL = 24, 20  # the last rows are padding


def network_density(num_outputs, *, hidden=3, kernel_mask=None, likelihood=None, noise_prior=dist.HalfNormal(1.0)):  # noqa: B008
    """All weights of a small network random, or some of its output kernel; prior centred off zero."""
    rng = np.random.default_rng(num_outputs)
    network = as_network(nb.FlaxMLP([hidden], num_outputs))
    x = rng.normal(size=(ROWS, 2)).astype(np.float32)
    y = (np.sin(x[:, :1]) + 0.3 * rng.normal(size=(ROWS, num_outputs))).astype(np.float32)
    params = {
        "Dense0": {"bias": rng.normal(size=hidden), "kernel": rng.normal(size=(2, hidden))},
        "Dense1": {"bias": rng.normal(size=num_outputs), "kernel": rng.normal(size=(hidden, num_outputs))},
    }
    params = jax.tree.map(np.float32, params)
    masks = {path: np.ones(shape, bool) for path, shape in trees.shapes(params).items()}
    if kernel_mask is not None:
        masks["Dense1.kernel"] = kernel_mask
    partition = Partition.from_masks(masks, trees.shapes(params))
    size = partition.size
    prior = WeightPrior(
        rng.normal(scale=0.3, size=size).astype(np.float32), rng.uniform(0.5, 2, size).astype(np.float32)
    )
    weights = np.where(np.arange(ROWS) < REAL, rng.choice([1.0, 2.0], ROWS), 0.0).astype(np.float32)
    density = log_density.build(
        network, partition, params, {}, x, y, weights,
        likelihood=likelihood or Gaussian(), prior=prior, noise_prior=noise_prior,
    )  # fmt: skip
    noise = np.log(np.linspace(0.3, 0.6, density.form.num_noise)).astype(np.float32)
    return density, np.concatenate([np.asarray(partition.split(params)), noise])


PARTLY = np.array([[True, False], [True, True], [False, True]])
CASES = {
    "one output": lambda: network_density(1),
    "two outputs": lambda: network_density(2),
    "part of the kernel": lambda: network_density(2, kernel_mask=PARTLY),
}


@pytest.fixture(
    params=[
        "two outputs",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("one output", "part of the kernel")),
    ],
    scope="module",
)
def case(request):
    density, start = CASES[request.param]()
    return density, start, collapsed_form(density)


def by_rows(density, form, position):
    """The collapsed log density from the covariance of the targets, in float64."""
    at, terms = form.linear_indices, density.terms
    prior_mean, prior_std = (np.asarray(part, float) for part in terms.prior)
    kept = form.kept_indices[: form.num_theta]
    full = np.zeros(density.size)
    full[form.kept_indices] = position

    def outputs(weights):
        theta = full.copy()
        theta[at] = weights
        return np.asarray(density.form.outputs(theta.astype(np.float32), terms.carry), float)

    base = outputs(np.zeros(len(at)))
    features = np.stack([outputs(row) - base for row in np.eye(len(at))])
    noise = np.exp(full[density.form.num_theta :])
    total = scipy.stats.norm.logpdf(full[kept], prior_mean[kept], prior_std[kept]).sum()
    total += (scipy.stats.halfnorm.logpdf(noise) + np.log(noise)).sum()
    real = np.asarray(terms.row_weights) > 0
    weights = np.asarray(terms.row_weights, float)[real]
    y = np.asarray(terms.y, float)[real]
    # A row of weight 2 counts twice: as one with half the variance, but for the constant of its density.
    spread = np.concatenate([noise[k] ** 2 / weights for k in range(y.shape[1])])
    phi = np.concatenate([features[:, real, k].T for k in range(y.shape[1])])
    centre = np.concatenate([base[real, k] for k in range(y.shape[1])]) + phi @ prior_mean[at]
    cov = (phi * prior_std[at] ** 2) @ phi.T + np.diag(spread)
    total += scipy.stats.multivariate_normal.logpdf(y.T.ravel(), centre, cov)
    repeated = np.concatenate([(weights - 1) * -0.5 * np.log(2 * np.pi * noise[k] ** 2) for k in range(y.shape[1])])
    return total + repeated.sum() - 0.5 * np.sum(np.log(np.tile(weights, y.shape[1])))


def test_plain_heads_are_read_off_the_network():
    assert [CASES[name]()[0].form.num_theta for name in CASES] == [13, 17, 15]
    heads = {name: collapsed_form(CASES[name]()[0]).head for name in CASES}
    assert heads["one output"].slots.shape == (4, 1)
    assert heads["two outputs"].slots.shape == (4, 2)
    assert heads["part of the kernel"] is None


def test_density_is_that_of_the_rows(case):
    density, start, form = case
    rng = np.random.default_rng(0)
    for _ in range(3):
        position = start[form.kept_indices] + 0.3 * rng.normal(size=len(form.kept_indices)).astype(np.float32)
        assert float(form(position, density.terms)) == pytest.approx(by_rows(density, form, position), abs=5e-3)


def test_gradient_is_the_slope(case):
    density, start, form = case
    position = start[form.kept_indices]
    gradient = np.asarray(jax.grad(form)(position, density.terms))
    for i in range(len(position)):
        step = 2e-3 * np.eye(len(position))[i]
        slope = (by_rows(density, form, position + step) - by_rows(density, form, position - step)) / 4e-3
        assert gradient[i] == pytest.approx(slope, rel=2e-2, abs=0.1)


def test_both_ways_to_the_features_agree():
    density, start = CASES["two outputs"]()
    form = collapsed_form(density)
    generic = dataclasses.replace(form, head=None)
    position = start[form.kept_indices]
    value, gradient = jax.value_and_grad(form)(position, density.terms)
    other, other_gradient = jax.value_and_grad(generic)(position, density.terms)
    assert float(value) == pytest.approx(float(other), rel=1e-5)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-3, atol=1e-3)


def test_completed_draws_have_the_conditional_moments(case, disagreement):
    density, start, form = case
    position = start[form.kept_indices]
    draws = Completion(form, jax.random.key(0), density.terms)(np.tile(position, (2, 1000, 1)))
    np.testing.assert_array_equal(draws[..., form.kept_indices], np.tile(position, (2, 1000, 1)))
    # The joint density is quadratic in the integrated weights: its second differences are their precision.
    at, start64 = form.linear_indices, start.astype(float)

    def joint(weights):
        full = np.float32(start64)
        return density.form(jax.numpy.asarray(full).at[at].set(weights), density.terms)

    precision = -np.asarray(jax.hessian(joint)(np.float32(start[at])), float)
    gradient = np.asarray(jax.grad(joint)(np.float32(start[at])), float)
    mean = start[at] + np.linalg.solve(precision, gradient)
    assert disagreement(draws[..., at], mean, np.linalg.inv(precision)) == []


def draw(engine, density, start, num_samples=60, num_chains=1, **control):
    return engine.run(
        jax.random.key(0), density, start, num_warmup=50, num_samples=num_samples, num_chains=num_chains,
        control=RunControl(**control),
    )  # fmt: skip


ENGINES = [
    NUTS(collapse=True),
    pytest.param(MCLMC(collapse=True), marks=pytest.mark.slow),
    pytest.param(MCLMC(collapse=True, adjusted=True), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ENGINES, ids=["nuts", "mclmc", "mclmc, adjusted"])
def test_draws_depend_on_the_seed_alone(engine, tmp_path, monkeypatch):
    density, start = CASES["one output"]()
    four = draw(engine, density, start, num_chains=4)
    assert four.draws.shape == (4, 60, density.size)
    assert len({chain.tobytes() for chain in four.draws}) == 4
    assert four.info["collapsed"]
    for num_chains in (1, 2):
        np.testing.assert_array_equal(
            draw(engine, density, start, num_chains=num_chains).draws, four.draws[:num_chains]
        )
    np.testing.assert_array_equal(draw(engine, density, start, 23, 2).draws, four.draws[:2, :23])
    draw(engine, density, start, 23, 2, checkpoint=Checkpoint(tmp_path, {"run": "1"}))
    resumed = draw(engine, density, start, 60, 2, checkpoint=Checkpoint(tmp_path, {"run": "1"}))
    np.testing.assert_array_equal(resumed.draws, four.draws[:2])
    monkeypatch.setattr(_driver, "CHUNK", 17)
    monkeypatch.setattr(_driver, "FIRST_CHUNK", 17)
    monkeypatch.setattr(_driver, "SECONDS_PER_CHUNK", float("inf"))
    np.testing.assert_array_equal(draw(engine, density, start, num_chains=2).draws, four.draws[:2])


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_nuts_draws_are_the_same_in_each_layout(method):
    density, start = CASES["one output"]()
    one = draw(NUTS(collapse=True), density, start)
    two = draw(NUTS(collapse=True, chain_method=method), density, start, num_chains=2)
    np.testing.assert_array_equal(two.draws[:1], one.draws)


def test_stopping_rules_see_the_draws_that_are_returned():
    density, start = CASES["one output"]()
    seen = []

    def is_enough(positions):
        seen.append(positions)
        return positions.shape[1] >= 100

    posterior = draw(NUTS(collapse=True), density, start, 500, 2, is_enough=is_enough)
    np.testing.assert_array_equal(seen[-1], posterior.draws)
    np.testing.assert_array_equal(seen[0], posterior.draws[:, : seen[0].shape[1]])


def test_a_warm_start_goes_on_in_collapsed_coordinates():
    density, start = CASES["one output"]()
    first = draw(NUTS(collapse=True), density, start)
    assert first.adaptation["position"].shape[1] == density.size - 4
    again = draw(NUTS(collapse=True), density, start, warm_start=first.adaptation)
    assert again.draws.shape == first.draws.shape
    with pytest.raises(OptionError, match="warm_start"):
        draw(NUTS(), density, start, warm_start=first.adaptation)


def test_where_it_does_not_apply_the_error_says_so(last_layer):
    target = last_layer("small", rows=20, hidden=2, noise_std=(0.5,), noise_prior_scale=1.0)
    with pytest.raises(OptionError, match=r"Use NUTS\(collapse=False\)"):
        draw(NUTS(collapse=True), target.log_density, target.start)
    density, start = network_density(1, likelihood=Categorical(), noise_prior=None)
    with pytest.raises(OptionError, match="Gaussian noise"):
        draw(NUTS(collapse=True), density, start)
    with pytest.raises(OptionError, match="collapse must be"):
        NUTS(collapse="yes")


def test_a_second_run_on_other_data_compiles_nothing():
    from neurobayes.inference import collapse, nuts

    density, start = CASES["one output"]()
    draw(NUTS(collapse=True), density, start)
    before = nuts._run_chunk._cache_size(), collapse._complete_draws._cache_size()
    moved = dataclasses.replace(density, terms=density.terms._replace(y=density.terms.y + 1))
    draw(NUTS(collapse=True), moved, start, num_samples=40, num_chains=2)
    assert (nuts._run_chunk._cache_size(), collapse._complete_draws._cache_size()) == before
