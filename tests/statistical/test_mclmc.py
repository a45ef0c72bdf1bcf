"""MCLMC: its tuner's guard, its options, and that draws depend on the seed alone. ``test_engines`` has its moments."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurobayes.checkpoint import Checkpoint
from neurobayes.errors import MissingExtraError, OptionError, TrainingError
from neurobayes.inference import MCLMC, mclmc
from neurobayes.inference.base import RunControl
from neurobayes.likelihoods import Gaussian
from neurobayes.log_density import LogDensity


@pytest.fixture(scope="module")
def target(last_layer):
    return last_layer("small", rows=20, hidden=2, noise_std=(0.5,))


def draw(target, engine=MCLMC(), *, density=None, seed=0, num_samples=60, num_chains=1, **control):  # noqa: B008
    return engine.run(
        jax.random.key(seed), density or target.log_density, target.start, num_warmup=40, num_samples=num_samples,
        num_chains=num_chains, control=RunControl(**control),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cliff(Gaussian):
    """Finite at outputs of zero and nowhere else."""

    def log_prob(self, outputs, y, noise_std):
        return jnp.where(jnp.abs(outputs[:, 0]) < 1e-9, 0.0, jnp.nan) * (1.0 + outputs[:, 0])

    def num_noise(self, num_outputs):
        return 0


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_tuner_that_froze_is_an_error_that_says_what_to_do(target, adjusted):
    form = dataclasses.replace(target.log_density.form, likelihood=Cliff())
    density = LogDensity(form, target.log_density.terms)
    engine = MCLMC(adjusted=adjusted, initial_mass="identity", jitter=0.0)
    with pytest.raises(TrainingError, match="Raise num_warmup"):
        draw(target, engine, density=density)


@pytest.mark.parametrize("adjusted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_ends_with_the_same_draws(target, adjusted, tmp_path):
    engine = MCLMC(adjusted=adjusted)
    whole = draw(target, engine, num_samples=120)
    draw(target, engine, num_samples=70, checkpoint=Checkpoint(tmp_path, {"run": "1"}))
    resumed = draw(target, engine, num_samples=120, checkpoint=Checkpoint(tmp_path, {"run": "1"}))
    np.testing.assert_array_equal(resumed.draws, whole.draws)


@pytest.mark.slow
def test_a_chain_does_not_depend_on_its_neighbours(target):
    two = draw(target, num_chains=2).draws
    assert not np.array_equal(two[0], two[1])
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(draw(target).draws[0], two[0])


def test_a_second_run_on_other_data_compiles_nothing(target):
    draw(target)
    before = mclmc._run_chunk._cache_size(), mclmc.tuned_chains._cache_size()
    terms = target.log_density.terms
    draw(target, density=LogDensity(target.log_density.form, terms._replace(y=terms.y + 1)), seed=1)
    assert (mclmc._run_chunk._cache_size(), mclmc.tuned_chains._cache_size()) == before


def test_a_warm_start_goes_on_from_the_earlier_adaptation(target):
    first = draw(target, num_chains=2)
    second = draw(target, num_chains=2, warm_start=first.adaptation)
    np.testing.assert_array_equal(second.adaptation["step_size"], first.adaptation["step_size"])
    assert not np.array_equal(second.draws, first.draws)
    with pytest.raises(OptionError, match="another engine"):
        draw(target, warm_start={"position": np.zeros((1, 3)), "inverse_mass": np.ones((1, 3))})


def test_reports(target):
    unadjusted, adjusted = draw(target), draw(target, MCLMC(adjusted=True))
    assert set(unadjusted.stats) == {"diverging", "num_steps", "energy_change", "energy_var"}
    assert np.all(unadjusted.stats["num_steps"] == 2 * MCLMC().thinning)  # the integrator takes two gradients a step
    assert np.all((adjusted.stats["accept_prob"] > 0) & (adjusted.stats["accept_prob"] <= 1))
    assert len(np.unique(adjusted.stats["num_steps"])) > 1
    assert not unadjusted.stats["diverging"].any()


def test_collapse_needs_weights_before_the_output_layer(target):
    with pytest.raises(OptionError, match="collapse"):
        draw(target, MCLMC(collapse=True))


def test_one_dimension_is_refused(target):
    form = dataclasses.replace(target.log_density.form, num_theta=1)
    with pytest.raises(OptionError, match="at least two"):
        MCLMC(initial_mass="identity").run(
            jax.random.key(0), LogDensity(form, target.log_density.terms), np.zeros(1), num_warmup=1, num_samples=1
        )


def test_without_blackjax_the_error_names_the_extra(target, monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    with pytest.raises(MissingExtraError, match=r"\[blackjax\]"):
        draw(target)
