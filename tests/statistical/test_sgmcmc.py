"""Stochastic-gradient samplers: unbiased mini-batches, a bias that falls with the step size, cycles."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import row_blocks
from neurobayes.checkpoint import Checkpoint
from neurobayes.errors import ConvergenceWarning, OptionError
from neurobayes.inference import SGMCMC, _batches, sgmcmc
from neurobayes.inference.base import RunControl
from neurobayes.log_density import LogDensity

ROWS, BATCH = 60, 20


@pytest.fixture(scope="module")
def target(last_layer):
    return last_layer("small", rows=ROWS, hidden=2, noise_std=(0.5,))


def draw(target, engine, *, seed=0, num_samples=60, num_chains=1, density=None, **control):
    return engine.run(
        jax.random.key(seed), density or target.log_density, target.start, num_warmup=20, num_samples=num_samples,
        num_chains=num_chains, control=RunControl(**control),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_steps_are_stable_where_the_noise_is_known_beforehand(method):
    """As in backbones, whose noise left-out rows have measured: its prior is far narrower than what rows say."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(ROWS, 2))
    model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(
            X, X[:, 0] + 0.3 * rng.normal(size=ROWS), num_warmup=50, num_samples=200, sgd_epochs=20, map_sigma=1.0,
            engine=SGMCMC(method=method, batch_size=BATCH), seed=0, progress_bar=False,
        )  # fmt: skip
    logs = np.log(model.get_samples(chain_dim=True)["noise_std"])
    width = 0.1 / np.sqrt(2 * ROWS)  # of that prior
    assert ((0.3 * width < logs.std(axis=1)) & (logs.std(axis=1) < 3 * width)).all()


def padded(density, num_real):
    """The density with all but the first rows turned into padding that must not be looked at."""
    terms = density.terms
    weights = (np.arange(ROWS) < num_real).astype(np.float32)
    y = np.where(weights[:, None] > 0, terms.y, 1e6).astype(np.float32)
    return LogDensity(density.form, terms._replace(row_weights=weights, y=y))


def estimates(density, position, num=4000):
    batches = _batches.make_batches(density, BATCH)
    real = np.asarray(density.terms.row_weights) > 0
    data = _batches.Data(density.terms, np.argsort(~real, kind="stable").astype(np.int32), np.float32(real.sum()))
    keys = jax.random.split(jax.random.key(1), num)
    return np.asarray(jax.jit(jax.vmap(lambda key: batches.log_prob(position, key, data)))(keys), float)


@pytest.mark.parametrize("num_real", [ROWS, 33])
def test_a_mini_batch_estimates_the_whole_log_joint(target, num_real):
    density, position = padded(target.log_density, num_real), jnp.array([0.3, -0.2, 0.5])
    values = estimates(density, position)
    assert values.std() > 0
    exact = float(density.form(position, density.terms))
    assert abs(values.mean() - exact) < 5 * values.std() / np.sqrt(len(values))


def test_recomputed_rows_give_the_same_estimates(target, last_layer, monkeypatch):
    monkeypatch.setattr(row_blocks, "CARRY_BUDGET_BYTES", 0)
    again = last_layer("small", rows=ROWS, hidden=2, noise_std=(0.5,)).log_density
    assert again.form.hoisted.recomputes
    position = jnp.array([0.3, -0.2, 0.5])
    np.testing.assert_allclose(
        estimates(again, position, 20), estimates(target.log_density, position, 20), rtol=1e-4, atol=1e-3
    )


def test_what_does_not_follow_the_rows_cannot_be_cut():
    def axes(*shapes):
        batch, whole = (
            types.SimpleNamespace(carry_avals=[jax.ShapeDtypeStruct(pair[side], np.float32) for pair in shapes])
            for side in (0, 1)
        )
        return row_blocks.row_axes(batch, whole, BATCH, ROWS)

    assert axes(((3, BATCH), (3, ROWS)), ((3, 4), (3, 4))) == [1, None]
    assert axes(((2 * BATCH,), (2 * ROWS,))) is None
    assert axes(((BATCH, BATCH), (ROWS, ROWS))) is None


@pytest.fixture(scope="module", params=sgmcmc.METHODS)
def widening(request, target):
    """Share by which the variances are too large on average: at the default step size, and at eight times that."""

    def variance(factor):
        default = SGMCMC(method=request.param)
        step = factor * default._step_size(1.0, BATCH, ROWS)
        engine = SGMCMC(
            method=request.param, schedule="constant", batch_size=BATCH, step_size=step, thinning=round(160 / factor)
        )
        draws = draw(target, engine, num_samples=1500, num_chains=2).draws
        white = np.linalg.solve(np.linalg.cholesky(target.cov), (draws - target.mean)[..., None])[..., 0]
        return white.var(axis=(0, 1)).mean() - 1.0

    return variance(1), variance(8)


def test_temperature_one_targets_the_posterior_as_the_step_size_shrinks(widening):
    """Declared budget: 0.25 of a variance at the default step size; 3,000 draws leave an error below 0.1."""
    small, large = widening
    assert abs(small) < 0.25
    assert large > 2 * abs(small)


@pytest.mark.parametrize("method", sgmcmc.METHODS)
def test_cycles_explore_first_and_end_with_small_steps(target, method):
    engine = SGMCMC(method=method, batch_size=BATCH, thinning=10, cycle_draws=20)
    stats = draw(target, engine, num_samples=40).stats
    steps, sizes = stats["num_steps"][0], stats["step_size"][0]
    assert steps[0] == steps[20] == 200 + 10  # half of the cycle's 400 steps store nothing
    assert np.all(np.delete(steps, [0, 20]) == 10)
    np.testing.assert_allclose(sizes[:20], sizes[20:])
    assert np.all(np.diff(sizes[:20]) < 0)
    assert sizes[19] < 0.05 * sizes[0]


def test_a_resumed_run_ends_with_the_same_draws(target, tmp_path):
    engine = SGMCMC(method="sghmc", batch_size=BATCH, thinning=5)
    whole = draw(target, engine, num_samples=120)
    draw(target, engine, num_samples=70, checkpoint=Checkpoint(tmp_path, {"run": "1"}))
    resumed = draw(target, engine, num_samples=120, checkpoint=Checkpoint(tmp_path, {"run": "1"}))
    np.testing.assert_array_equal(resumed.draws, whole.draws)


def test_more_rows_within_the_padding_compile_nothing(target):
    engine = SGMCMC(batch_size=BATCH, thinning=5)
    draw(target, engine, density=padded(target.log_density, 40))
    before = sgmcmc._run_chunk._cache_size()
    draw(target, engine, density=padded(target.log_density, 42), seed=1)
    assert sgmcmc._run_chunk._cache_size() == before


def test_a_warm_start_goes_on_from_the_earlier_position(target):
    engine = SGMCMC(batch_size=BATCH, thinning=5)
    first = draw(target, engine)
    second = draw(target, engine, warm_start=first.adaptation)
    np.testing.assert_array_equal(second.adaptation["scale"], first.adaptation["scale"])
    with pytest.raises(OptionError, match="another engine"):
        draw(target, engine, warm_start={"position": np.zeros((1, 3))})


def test_options_are_checked():
    for options in ({"method": "sgd"}, {"schedule": "cosine"}, {"batch_size": 0}, {"temperature": 0.0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            SGMCMC(**options)
