"""When sampling ends: by quality, by time, by hand; and what a warm start takes over from an earlier fit."""

import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import neurobayes as nb
from neurobayes.diagnostics import effective_sample_size
from neurobayes.errors import ConvergenceError, ConvergenceWarning, NotFittedError, OptionError, TrainingError
from neurobayes.inference import NUTS, _driver
from neurobayes.inference.base import RunControl
from neurobayes.models.sampling import Sampling, Until

pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")

OPTIONS = {"num_warmup": 60, "sgd_epochs": 20, "map_sigma": 1.0, "progress_bar": False, "engine": "nuts", "seed": 1}


@pytest.fixture(autouse=True)
def short_chunks(chunks_of):
    chunks_of(20)


@pytest.fixture(scope="module")
def data(regression):
    return regression[0][:50], regression[1][:50]


@pytest.fixture(scope="module")
def network():
    return nb.FlaxMLP([4], 1)


def fit(network, data, model=None, **options):
    model = nb.PartialBNN(network, num_backbones=1) if model is None else model
    return model.fit(*data, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def fitted(network, data):
    return fit(network, data, num_samples=100)


# --- by quality and by time


def test_until_ess(network, data, fitted):
    model = fit(network, data, until="ess>60")
    assert model.posterior.info["ended_by"] == "until"
    assert model.diagnostics().ess_bulk > 60
    assert 40 <= model.posterior.num_draws < 1000
    shared = min(model.posterior.num_draws, 100)
    np.testing.assert_array_equal(model.posterior.draws[:, :shared], fitted.posterior.draws[:, :shared])
    assert fit(network, data, until="ess>200").posterior.num_draws > model.posterior.num_draws


def test_until_r_hat_and_ess(network, data):
    model = fit(network, data, until="r_hat<1.1 and ess>50")
    assert model.posterior.info["ended_by"] == "until"
    judged = model.diagnostics()
    assert judged.r_hat < 1.1
    assert judged.ess_bulk > 50


def test_num_samples_bounds_a_rule_that_is_never_met(network, data):
    model = fit(network, data, until="ess>1000000", num_samples=70)
    assert (model.posterior.info["ended_by"], model.posterior.num_draws) == ("num_samples", 70)


def test_seconds(network, data):
    model = fit(network, data, seconds=1e-6)
    assert (model.posterior.info["ended_by"], model.posterior.num_draws) == ("seconds", 20)


def test_texts_that_are_understood():
    assert Until.parse("ess>400") == Until(ess=400.0) == Until.parse("ess >= 400")
    assert Until.parse(" r_hat < 1.01 and ess>4.5") == Until(ess=4.5, r_hat=1.01)
    assert Until.parse(None) is None


@pytest.mark.parametrize(
    "text", ["", "ess", "ess<400", "r_hat>1.01", "ess>", "ess>1.2.3", "ess>.", "ess>400 or r_hat<1.01", "rhat<1.01",
             "ess>400 and", "ess>-3", "ess>nan", 400, True, ["ess>400"]]
)  # fmt: skip
def test_texts_that_are_not(network, data, text):
    with pytest.raises(OptionError, match="is not understood"):
        fit(network, data, until=text)


def test_an_r_hat_that_cannot_be_reached(network, data):
    with pytest.raises(OptionError, match="cannot be met"):
        fit(network, data, until="r_hat<1")


@pytest.mark.parametrize("seconds", [0, -1, "soon", np.nan])
def test_times_that_are_none(network, data, seconds):
    with pytest.raises(OptionError, match="seconds"):
        fit(network, data, seconds=seconds)


def test_draws_that_are_no_numbers_are_never_good_enough():
    rng = np.random.default_rng(0)
    good = rng.normal(size=(2, 200, 3))
    assert Until(ess=50).holds(good)
    assert not Until(ess=50).holds(np.where(np.arange(3) == 1, np.nan, good))
    assert not Until(ess=50).holds(np.zeros((2, 200, 3)))
    assert not Until(ess=0).holds(good[:, :3])
    assert not Until(r_hat=1.05).holds(good + 3 * np.arange(2)[:, None, None])
    assert effective_sample_size(good).min() > 50


def test_the_number_of_draws_without_a_rule_and_with_one():
    def wanted(**options):
        return Sampling.from_user("nuts", "vectorized", 1, None, 1, **options).num_samples

    none = {"until": None, "seconds": None, "checkpoint_dir": None}
    assert wanted(**none) == 1000
    assert wanted(**{**none, "until": "ess>5"}) == wanted(**{**none, "seconds": 5}) == 50_000


def test_exact_draws_are_no_more_than_a_rule_needs(network, data):
    def number(**rule):
        return fit(network, data, engine="auto", **rule).posterior.num_draws

    assert number(until="ess>400") == number(seconds=5) == 1000
    assert number(until="ess>1500") == 1501
    assert number(until="ess>400", num_samples=30) == 30


class Chains:
    """Chains that only count, for what happens between chunks."""

    waits = False
    longest = 40

    def __init__(self, finite=True):
        self.state, self.finite, self.calls = np.zeros((1, 1)), finite, []

    def dispatch(self, num_steps, sampling):
        self.calls.append(num_steps)
        return self.state + num_steps, np.arange(40.0)[None, :, None], {"diverging": np.zeros((1, 40), bool)}

    def is_healthy(self, state):
        return self.finite


@pytest.mark.parametrize("control", [RunControl(), RunControl(seconds=1e-9), RunControl(is_enough=lambda draws: True)])
def test_a_density_that_is_not_finite_is_reported_however_the_run_ends(control):
    with pytest.raises(TrainingError, match="not finite"):
        _driver.advance([Chains(finite=False)], 0, 60, control)


def test_quality_is_judged_ever_more_rarely():
    seen = []
    control = RunControl(is_enough=lambda draws: seen.append(draws.shape[1]) or False)
    _driver.advance([Chains()], 20, 20 * 200, control)
    assert seen[0] == 20
    assert len(seen) < 40
    assert np.all(np.diff(seen) >= 20)
    assert np.all(np.array(seen[1:]) <= 1.2 * np.array(seen[:-1]) + 40)


def test_calls_grow_to_what_they_can_hold_and_none_passes_a_judgement(chunks_of, monkeypatch):
    chunks_of(_driver.LONGEST)
    monkeypatch.setattr(_driver, "FIRST_CHUNK", 16)
    chains, seen = Chains(), []
    control = RunControl(is_enough=lambda draws: seen.append(draws.shape[1]) or False)
    _driver.advance([chains], 100, 1000, control)
    assert chains.calls[0] == 16 and max(chains.calls) == chains.longest
    assert set(seen) < set(np.cumsum(chains.calls) - 100)
    assert seen[:2] == [50, 110]
    assert sum(chains.calls) == 1100


def test_long_positions_are_returned_few_at_a_time():
    found = [_driver.longest_chunk(size) for size in (1, 10_000, 100_000, 10_000_000)]
    assert found[0] == _driver.LONGEST and found == sorted(found, reverse=True)
    assert found[2] * 100_000 <= _driver.VALUES_PER_CHUNK and found[3] == 8


@pytest.mark.parametrize("folder", [5, b"run", ["run"]])
def test_folders_that_are_none(network, data, folder, monkeypatch):
    monkeypatch.setattr("neurobayes.models.partial_bnn.progress", lambda show: pytest.fail("training has begun"))
    with pytest.raises(OptionError, match="checkpoint_dir must be the path of a folder"):
        fit(network, data, checkpoint_dir=folder)


# --- by hand


def interrupt_at(monkeypatch, stage, done):
    """Ctrl-C arrives as this much of a stage is reported."""

    def report(stage_, done_, total, note=""):
        if (stage_, done_) == (stage, done):
            raise KeyboardInterrupt

    class Showing:
        def __enter__(self):
            return report

        def __exit__(self, *_):
            return False

    monkeypatch.setattr("neurobayes.models.partial_bnn.progress", lambda show: Showing())


def test_an_interrupt_keeps_the_draws_and_says_so(network, data, fitted, monkeypatch):
    interrupt_at(monkeypatch, "sampling", 60)
    with pytest.warns(ConvergenceWarning, match="interrupted: 60 of 100 draws per chain are kept"):
        model = fit(network, data, num_samples=100)
    assert model.posterior.info["ended_by"] == "interrupt"
    np.testing.assert_array_equal(model.posterior.draws, fitted.posterior.draws[:, :60])
    assert np.all(np.isfinite(model.predict(data[0])[0]))


@pytest.mark.parametrize("first", [None, "an earlier fit"])
def test_an_interrupt_during_warm_up_is_raised(network, data, monkeypatch, first):
    model = nb.PartialBNN(network, num_backbones=1)
    if first:
        fit(network, data, model, num_samples=20)
        before = model.predict(data[0])[0]
    interrupt_at(monkeypatch, "warm-up", 40)
    with pytest.raises(KeyboardInterrupt):
        fit(network, data, model, num_samples=100)
    if first:
        np.testing.assert_array_equal(model.predict(data[0])[0], before)
    else:
        with pytest.raises(NotFittedError):
            model.predict(data[0])


@pytest.mark.parametrize("num_backbones", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_real_interrupt_signal(num_backbones):
    """It ends the run, or of several that run at once all that have draws; each sends a signal of its own."""
    script = textwrap.dedent("""
        import os, signal
        import numpy as np
        import neurobayes as nb
        from neurobayes.inference import _driver

        chunk = _driver._Run._chunk

        def signalled(run, stage, size):
            chunk(run, stage, size)
            if run.counters["sampling"] >= 100:
                os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have switched it off
        _driver._Run._chunk = signalled
        X = np.random.default_rng(0).normal(size=(30, 2))
        model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=NUM_BACKBONES).fit(
            X, X[:, 0], num_warmup=50, num_samples=2000, sgd_epochs=10, map_sigma=1.0, engine="nuts", seed=0
        )
        made = [member.posterior.num_draws for member in model._fitted.members]
        print(model.posterior.info["ended_by"], min(made), max(made), model.predict(X)[0].shape)
    """).replace("NUM_BACKBONES", str(num_backbones))
    source = str(pathlib.Path(nb.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": source, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    ended_by, least, most, shape = ended.stdout.split() or ["", "0", "0", ""]
    assert (ended_by, shape) == ("interrupt", "(30,)"), ended.stderr
    assert 100 <= int(most) < (2000 if num_backbones == 1 else 1000)
    assert int(least) > (99 if num_backbones == 1 else 0)


# --- raise_on_failure


def test_a_bad_run_raises_and_leaves_the_model_as_it_was(network, data):
    model = nb.PartialBNN(network, num_backbones=1)
    with pytest.raises(ConvergenceError, match="Do not trust"):
        fit(network, data, model, num_samples=20, raise_on_failure=True)
    with pytest.raises(NotFittedError):
        model.predict(data[0])
    fit(network, data, model, num_samples=20)
    before = model.predict(data[0])[0]
    with pytest.raises(ConvergenceError):
        fit(network, data, model, num_samples=20, seed=2, raise_on_failure=True)
    np.testing.assert_array_equal(model.predict(data[0])[0], before)


def test_a_good_run_does_not_raise(network, data):
    model = nb.PartialBNN(network, num_backbones=1)
    fit(network, data, model, engine="last_layer", num_samples=200, raise_on_failure=True)
    assert model.diagnostics().ok


# --- warm starts


@pytest.fixture(scope="module")
def more(regression):
    return regression


def test_a_warm_start_keeps_weights_units_and_choice(network, data, more):
    model = fit(network, data, num_samples=100)
    first = model._fitted
    fit(network, more, model, num_samples=50, num_warmup=20, warm_start=True)
    now = model._fitted
    assert now.members[0].source.partition is first.members[0].source.partition
    np.testing.assert_array_equal(now.scaling.y_mean, first.scaling.y_mean)
    for ours, theirs in zip(
        now.members[0].source.params["Dense0"].values(), first.members[0].source.params["Dense0"].values(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert model.pretraining is None


@pytest.mark.slow
def test_a_warm_start_needs_few_warm_up_steps(network, data, more):
    """Ten steps from where the last run stood do for what takes far more from nothing."""
    careful = fit(network, more, num_samples=400, num_warmup=400)
    model = nb.PartialBNN(network, num_backbones=1)
    fit(network, data, model, num_samples=200, num_warmup=300)
    step_size = model.posterior.info["step_size"]
    fit(network, more, model, num_samples=400, num_warmup=10, warm_start=True)
    assert model.diagnostics().ess_bulk > 40
    assert model.diagnostics().num_divergent <= 8
    assert 0.3 < model.posterior.info["step_size"][0] / step_size[0] < 3
    ours, theirs = (m.predict(more[0])[0] for m in (model, careful))
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.5 * np.std(more[1])


def test_a_short_warm_up_keeps_the_mass_matrix_and_a_long_one_learns(network, data):
    model = fit(network, data, num_samples=40)
    before = model.posterior.adaptation["inverse_mass"]
    short = fit(network, data, nb.PartialBNN(network, num_backbones=1), num_samples=20, num_warmup=30, warm_start=model)
    np.testing.assert_array_equal(short.posterior.adaptation["inverse_mass"], before)
    long = fit(network, data, nb.PartialBNN(network, num_backbones=1), num_samples=20, num_warmup=200, warm_start=model)
    assert not np.array_equal(long.posterior.adaptation["inverse_mass"], before)


def test_a_warm_start_from_another_model(network, data, more, fitted):
    before = fitted.posterior.draws.copy()
    other = fit(
        network, more, nb.PartialBNN(network, num_backbones=1), num_samples=30, num_warmup=20, warm_start=fitted
    )
    again = fit(
        network,
        more,
        nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1),
        num_samples=30,
        num_warmup=20,
        warm_start=fitted,
    )
    np.testing.assert_array_equal(other.posterior.draws, again.posterior.draws)
    np.testing.assert_array_equal(fitted.posterior.draws, before)


def test_more_chains_than_before_use_its_chains_in_turn(network, data, fitted):
    model = fit(
        network,
        data,
        nb.PartialBNN(network, num_backbones=1),
        num_samples=20,
        num_warmup=10,
        num_chains=3,
        warm_start=fitted,
    )
    draws = model.posterior.draws
    assert draws.shape[:2] == (3, 20)
    assert not np.array_equal(draws[0], draws[1])


def test_warm_starts_that_cannot_be(network, data, fitted):
    with pytest.raises(NotFittedError):
        fit(network, data, nb.PartialBNN(network, num_backbones=1), warm_start=True)
    with pytest.raises(NotFittedError):
        fit(network, data, warm_start=nb.PartialBNN(network, num_backbones=1))
    with pytest.raises(OptionError, match="another network"):
        fit(nb.FlaxMLP([5], 1), data, warm_start=fitted)
    with pytest.raises(OptionError, match="another network"):
        fit(nb.FlaxMLP([4], 1, activation="relu"), data, warm_start=fitted)
    with pytest.raises(OptionError, match="True, False or a fitted"):
        fit(network, data, warm_start="yes")
    with pytest.raises(OptionError, match="dense_mass differ"):
        fit(network, data, warm_start=fitted, engine=NUTS(dense_mass=False))


def test_a_warm_start_says_when_other_weights_are_asked_for(network, data, fitted):
    with pytest.raises(OptionError, match="other Bayesian weights"):
        fit(network, data, nb.PartialBNN(network, num_probabilistic_layers=2, num_backbones=1), warm_start=fitted)


def test_a_warm_start_after_exact_draws_starts_from_the_weights(network, data):
    exact = nb.PartialBNN(network, num_backbones=1)
    fit(network, data, exact, engine="last_layer", num_samples=50)
    model = fit(network, data, nb.PartialBNN(network, num_backbones=1), num_samples=20, num_warmup=20, warm_start=exact)
    assert model.posterior.info["engine"] == "nuts"
    np.testing.assert_array_equal(
        model._fitted.members[0].source.params["Dense0"]["kernel"],
        exact._fitted.members[0].source.params["Dense0"]["kernel"],
    )
