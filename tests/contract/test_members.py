"""Backbones whose samplers run side by side."""

import warnings

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import _threads, training
from neurobayes.errors import ConvergenceWarning, TrainingError
from neurobayes.models import members
from neurobayes.models.sampling import Sampling

FEW = {"sgd_epochs": 5, "map_sigma": 1.0, "num_warmup": 20, "num_samples": 60, "progress_bar": False, "seed": 0}


def fit(data, engine="nuts", model=None, **options):
    model = model or nb.PartialBNN(nb.FlaxMLP([6], 1), num_backbones=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(*data, engine=engine, **{**FEW, **options})


@pytest.fixture
def started(monkeypatch):
    """How many backbones were started side by side, on two cores."""
    counts, follow = [], members.follow

    def noting(first, others, *ends):
        counts.append(1 + len(others))
        return follow(first, others, *ends)

    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(members, "follow", noting)
    return counts


@pytest.mark.parametrize("engine", ["nuts", pytest.param("mclmc", marks=pytest.mark.slow)])
def test_draws_are_those_of_one_after_another(regression, started, monkeypatch, engine):
    together = fit(regression, engine)
    assert started == [3]
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 1)
    in_turn = fit(regression, engine)
    assert started == [3]
    for name, draws in together.get_samples().items():
        np.testing.assert_array_equal(draws, in_turn.get_samples()[name])


def test_only_where_cores_are_idle(regression, started, monkeypatch):
    fit(regression, num_chains=2)
    fit(regression, seconds=30.0)
    fit(regression, "laplace")
    monkeypatch.setattr(members, "MOST_GRADIENT_WORK", 1.0)
    fit(regression)
    assert started == []


def test_progress_is_that_of_one_run(regression, started, monkeypatch):
    told = []

    class Noting:
        def __enter__(self):
            return lambda stage, done, total, note="": told.append((stage, done, total))

        def __exit__(self, *_):
            return False

    monkeypatch.setattr("neurobayes.models.partial_bnn.progress", lambda show: Noting())
    fit(regression)
    assert started == [3]
    made = [(done, total) for stage, done, total in told if stage == "sampling"]
    assert [done for done, _ in made] == sorted(done for done, _ in made)
    assert made[-1] == (3 * 35, 3 * 35)  # each makes its share: the draws over the root of the number


def test_a_rule_is_shared_and_judged_side_by_side(regression, started, monkeypatch, chunks_of):
    chunks_of(20)
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 4)
    model = nb.PartialBNN(nb.FlaxMLP([6], 1), num_backbones=4)
    options = {**FEW, "num_warmup": 80, "num_samples": 2000, "until": "ess>120", "engine": "nuts"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        before = list(warnings.filters)
        model.fit(*regression, **options)
        assert warnings.filters == before
    assert started == [4]
    found = [member.diagnostics.ess_bulk for member in model._fitted.members]
    assert all(member.posterior.info["ended_by"] == "until" for member in model._fitted.members)
    assert 30 < min(found) < 120


def test_what_each_of_several_backbones_must_reach():
    sampling = Sampling.from_user("nuts", "vectorized", 10, None, 1, "ess>400 and r_hat<1.1", None, None)
    for exact in (False, True):
        share = sampling.shared(4, exact=exact).until
        assert share is not None and (share.ess, share.r_hat) == (100.0, 1.1)


def test_every_use_of_a_key_has_one_of_its_own(regression, monkeypatch):
    """Training, the choice of weights, the learning of prior scales and the draws, of every backbone."""
    used = []

    def noting(module, name, position):
        function = getattr(module, name)

        def noted(*arguments, **options):
            used.append(tuple(np.asarray(jax.random.key_data(arguments[position])).tolist()))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, noted)

    def seen(seed, **options):
        used.clear()
        model = nb.PartialBNN(nb.FlaxMLP([3], 1), **options)
        fit(regression, "last_layer", model, priors_sigma="auto", num_samples=20, seed=seed)
        return set(used)

    noting(members, "choose", 3)
    noting(members, "learn_scales", 1)
    noting(members, "sample", 1)
    noting(training, "initialise", 1)
    for num_backbones in (1, 3):
        found = seen(0, num_backbones=num_backbones)
        assert len(found) == len(used) == 4 * num_backbones
        assert not found & seen(1, num_backbones=num_backbones)


@pytest.mark.parametrize("number", [0, 2])
def test_a_failure_of_one_leaves_the_model_as_it_was(regression, started, monkeypatch, number):
    model = fit(regression)
    before = model.predict(regression[0])
    sampled = members._sample_member

    def failing(k, *arguments, **options):
        if k == number:
            raise TrainingError("made to fail")
        return sampled(k, *arguments, **options)

    monkeypatch.setattr(members, "_sample_member", failing)
    with pytest.raises(TrainingError, match="made to fail"):
        fit(regression, model=model, seed=1)
    for one, other in zip(model.predict(regression[0]), before, strict=True):
        np.testing.assert_array_equal(one, other)
