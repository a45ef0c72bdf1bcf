"""The verdict on a run: each figure against its definition, each complaint with its remedy."""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.signal
from arviz_stats.base import array_stats

from neurobayes.diagnostics import combine, diagnose, effective_sample_size, energy_fraction, split_r_hat


def independent(num_chains=4, num_draws=500, num_quantities=3, seed=0):
    return np.random.default_rng(seed).normal(size=(num_chains, num_draws, num_quantities))


def autoregressive(rho, num_chains=4, num_draws=4000):
    noise = np.random.default_rng(1).normal(size=(num_chains, num_draws, 1)) * np.sqrt(1 - rho**2)
    return scipy.signal.lfilter([1.0], [1.0, -rho], noise, axis=1)


def stats_of(quantities, **changes):
    shape = quantities.shape[:2]
    energy = np.random.default_rng(2).normal(size=shape)
    return {"diverging": np.zeros(shape, bool), "num_steps": np.full(shape, 7), "energy": energy} | changes


def test_independent_draws_are_trusted():
    values = independent()
    judged = diagnose(values, stats_of(values), 10)
    assert judged.ok
    assert judged.verdict.startswith("The draws can be trusted")
    assert 0.99 < judged.r_hat < 1.01
    assert judged.ess_bulk == effective_sample_size(values).min() > 1500
    assert judged.ess_tail == effective_sample_size(values, "tail").min()
    assert judged.ess_bulk <= judged.ess_bulk_median
    assert (judged.num_chains, judged.num_draws, judged.num_divergent, judged.saturated) == (4, 500, 0, 0.0)
    assert str(judged).startswith(judged.verdict)
    assert set(judged.summary()) >= {"r_hat", "ess_bulk", "num_divergent"}


def test_one_chain_is_judged_by_its_halves_and_says_so():
    values = independent(num_chains=1)
    judged = diagnose(values, stats_of(values), 10)
    assert judged.ok and "one chain" in judged.verdict
    drifting = values + np.linspace(0, 3, 500)[None, :, None]
    assert diagnose(drifting, stats_of(values), 10).r_hat > 1.3


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(rho):
    """An AR(1) chain of n draws has n (1 - rho) / (1 + rho) effective ones."""
    expected = 16000 * (1 - rho) / (1 + rho)
    np.testing.assert_allclose(effective_sample_size(autoregressive(rho)), expected, rtol=0.2)


def test_r_hat_sees_chains_that_differ_in_place_or_in_spread():
    values = independent()
    moved, widened = values.copy(), values.copy()
    moved[0] += 2.0
    widened[0] *= 4.0
    assert (split_r_hat(values) < 1.01).all()
    assert (split_r_hat(moved) > 1.1).all()
    assert (split_r_hat(widened) > 1.05).all()


def test_energy_fraction_is_the_mean_square_change_over_the_variance():
    energy = np.random.default_rng(0).normal(size=(2, 300))
    by_hand = [np.sum(np.diff(chain) ** 2) / 299 / np.var(chain) for chain in energy]
    np.testing.assert_allclose(energy_fraction(energy), min(by_hand))
    assert np.isnan(energy_fraction(np.ones((2, 300))))


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        ({"diverging": np.arange(2000).reshape(4, 500) < 40}, "40 of 2000 trajectories diverged", "target_accept"),
        ({"num_steps": np.full((4, 500), 1023)}, "100 % of the draws used the whole tree depth", "num_warmup"),
        ({"energy": np.cumsum(np.ones((4, 500)), axis=1)}, "E-BFMI", "noise a prior"),
    ],
    ids=["divergences", "tree depth", "energy"],
)
def test_sampler_reports_are_complained_about_with_a_remedy(change, problem, remedy):
    values = independent()
    judged = diagnose(values, stats_of(values, **change), 10)
    assert not judged.ok
    assert judged.verdict.startswith("Do not trust these draws yet")
    assert problem in judged.verdict and remedy in judged.verdict


def test_disagreeing_chains_and_few_effective_draws_are_complained_about():
    values = independent()
    values[0] += 5.0
    judged = diagnose(values, stats_of(values), 10)
    assert not judged.ok and "R-hat" in judged.verdict
    slow = autoregressive(0.99, num_chains=2, num_draws=500)
    judged = diagnose(slow, stats_of(slow), 10)
    assert not judged.ok and "effective draws" in judged.verdict


def test_a_remedy_that_another_contains_is_not_said_again():
    values = independent(num_draws=100)
    values[0] += 5.0
    verdict = diagnose(values, stats_of(values), 10).verdict
    assert "R-hat" in verdict and "effective draws" in verdict
    assert verdict.endswith("To mend it: raise num_warmup and num_samples.")


@pytest.mark.parametrize(("number", "said"), [(2, "The other backbone is no"), (3, "The other 2 backbones are no")])
def test_backbones_are_counted_as_one_says_it(number, said):
    values = independent()
    judged = diagnose(values, stats_of(values), 10)
    assert said in combine([judged] * number).verdict


@pytest.mark.parametrize(
    ("pareto_k", "ok", "said"),
    [(0.9, False, "Pareto k 0.90"), (0.3, True, "close to the posterior"), (np.nan, True, "do not show")],
)
def test_an_approximation_is_judged_by_its_importance_ratios(pareto_k, ok, said):
    values = independent()
    judged = diagnose(values, {}, 10, independent=True, approximation="Pathfinder", pareto_k=pareto_k)
    assert judged.ok == ok
    assert said in judged.verdict


def test_a_single_divergence_among_many_draws_is_reported_but_forgiven():
    values = independent()
    one = np.zeros((4, 500), bool)
    one[0, 0] = True
    judged = diagnose(values, stats_of(values, diverging=one), 10)
    assert judged.ok and judged.num_divergent == 1 and " 1 divergence." in judged.verdict


@pytest.mark.parametrize("values", [np.zeros((2, 50, 3)), np.ones((1, 3, 2))], ids=["constant", "three draws"])
def test_draws_that_cannot_be_judged_are_not_trusted(values):
    judged = diagnose(values, {"diverging": np.zeros(values.shape[:2], bool)}, 10)
    assert not judged.ok
    assert np.isnan(judged.r_hat) and "num_samples" in judged.verdict


def test_constant_quantities_beside_varying_ones_are_left_out():
    values = np.concatenate([independent(), np.zeros((4, 500, 1))], axis=-1)
    judged = diagnose(values, stats_of(values), 10)
    assert judged.ok and np.isfinite(judged.r_hat)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_draws_that_are_not_finite_are_not_trusted(bad):
    values = independent()
    values[2, 7, 1] = bad
    judged = diagnose(values, stats_of(values), 10)
    assert not judged.ok and "not finite" in judged.verdict
    assert np.isfinite(judged.r_hat)  # of the others


def test_an_engine_without_reports_is_judged_by_its_draws():
    assert diagnose(independent(), {}, 10).ok


def test_threads_that_judge_at_once_leave_the_filters_of_warnings(monkeypatch):
    """ArviZ changes them around its Fourier transforms, here slow ones."""
    transform = type(array_stats).rfft
    monkeypatch.setattr(type(array_stats), "rfft", lambda *args, **kw: time.sleep(0.002) or transform(*args, **kw))
    values = independent(num_draws=50, num_quantities=1)
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda number: effective_sample_size(values).min(), range(8)))
        assert warnings.filters == before
    assert len(set(found)) == 1
