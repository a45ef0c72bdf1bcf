"""The search for prior scale and epochs: folds, what it reacts to, and the error it reports."""

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import _threads, data, left_out, regularisation, schedules, training
from neurobayes.errors import ConvergenceWarning
from neurobayes.likelihoods import Categorical, Gaussian
from neurobayes.networks import as_network
from neurobayes.predictive import deterministic_outputs
from neurobayes.pretraining import PretrainingOptions, pretrain
from neurobayes.training import Program, Rows, Settings, train

NUM_EPOCHS = 200
NETWORK = as_network(nb.FlaxMLP([8], 1))
PROGRAM = Program(NETWORK, Gaussian())
RATES = schedules.learning_rates(0.02, NUM_EPOCHS, 1)
UNIT_NOISE = np.ones(1, np.float32)


def rows_of(x, y, size=None):
    size = size or data.bucket_size(len(x))
    arrays = (x.astype(np.float32), y)
    return Rows(*(data.pad_rows(a, size) for a in arrays), data.row_weights(len(x), size))


def regression(kind, n=50):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3))
    y = rng.normal(size=n) if kind == "noise" else 2 * x[:, 0] - x[:, 1]
    y = (y - y.mean()) / y.std()
    return x, y[:, None].astype(np.float32)


def choose(rows, sigmas=regularisation.SIGMA_GRID, program=PROGRAM, rates=RATES, seed=0):
    return regularisation.choose(program, jax.random.key(0), rows, UNIT_NOISE, sigmas, rates, seed)


@pytest.fixture(scope="module")
def searches():
    return {kind: choose(rows_of(*regression(kind))) for kind in ("noise", "signal")}


def test_padding_counts_in_no_fold():
    x, y = regression("signal")
    rows = rows_of(x, y, size=56)
    absurd = Rows(rows.x.copy(), rows.y.copy(), rows.real)
    absurd.x[50:], absurd.y[50:] = 1e3, -1e6
    results = [choose(r, sigmas=(1.0,), rates=RATES[:20]) for r in (rows, absurd)]
    np.testing.assert_array_equal(results[0].losses, results[1].losses)
    assert np.isfinite(results[0].losses).all()


def test_a_target_of_noise_is_trained_little_and_a_clean_signal_much(searches):
    noise, signal = searches["noise"], searches["signal"]
    assert noise.sigma < signal.sigma
    assert noise.sigma == min(regularisation.SIGMA_GRID) or noise.num_epochs < NUM_EPOCHS // 4
    assert signal.num_epochs > noise.num_epochs
    assert noise.unseen_rmse is not None and signal.unseen_rmse is not None
    np.testing.assert_allclose(noise.unseen_rmse, 1.0, atol=0.15)
    assert signal.unseen_rmse < 0.3


PERFECT = 0.5 * np.log(2 * np.pi)
"""Loss of predictions without error, at unit noise."""


def test_a_flat_end_of_the_curve_is_not_waited_for():
    flat = np.array([2.0, 1.5, 1.004, 1.001, 1.0])
    assert regularisation.earliest_good_epoch(flat, 0.0) == 2
    assert regularisation.earliest_good_epoch(flat, 0.999) == 4  # where the loss is all but perfect, 0.001 counts
    assert regularisation.earliest_good_epoch(flat + 1e6 * (np.arange(5) == 0), 0.0) == 2  # whatever it starts from
    assert regularisation.earliest_good_epoch(flat, -np.inf) == 4


def test_choice_is_the_least_left_out_loss(searches):
    for search in searches.values():
        i, _ = np.unravel_index(np.argmin(search.losses), search.losses.shape)
        assert search.sigmas == regularisation.SIGMA_GRID
        assert search.sigma == search.sigmas[i]
        excess = search.losses[i] - PERFECT  # the first epoch whose squared error is at most 1 % above the least
        good = np.flatnonzero(excess <= 1.01 * excess.min())
        assert search.num_epochs == max(1, good[0])
        assert search.losses.shape[0] == len(search.sigmas) and search.losses.shape[1] <= NUM_EPOCHS


@pytest.mark.parametrize("kind", ["noise", "signal"])
def test_reported_error_is_that_of_networks_trained_fold_by_fold(searches, kind):
    """Each fold trained on its own, outside the search, for the chosen epochs; error on its left-out rows."""
    x, y = regression(kind)
    rows, search = rows_of(x, y), searches[kind]
    curve = search.losses[search.sigmas.index(search.sigma)]
    epoch = regularisation.earliest_good_epoch(curve, PERFECT)
    folds = left_out.assign_folds(np.asarray(rows.x), rows.real, seed=0)
    keys = jax.random.split(jax.random.key(0), 5)
    squares = []
    for k in range(5):
        params = None
        settings = Settings(rows.real * (folds != k), np.float32(1 / search.sigma**2), UNIT_NOISE)
        if epoch:
            result, state = train(PROGRAM, keys[k], rows, settings, learning_rates=RATES[:epoch])
            params = result.params
        else:
            progress, state = regularisation.initialise(PROGRAM, keys[k], rows.x, None)
            params = progress.params
        held = (folds == k) & (rows.real > 0)
        predicted = deterministic_outputs(NETWORK, params, state, rows.x[held])
        squares.append(np.mean((predicted - rows.y[held]) ** 2))
    np.testing.assert_allclose(search.unseen_rmse, np.sqrt(np.mean(squares)), rtol=1e-3)
    loss = 0.5 * np.mean(squares) + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(curve[epoch], loss, rtol=1e-3)


def test_the_same_seed_gives_the_same_choice(searches):
    again = choose(rows_of(*regression("noise")))
    np.testing.assert_array_equal(again.losses, searches["noise"].losses)


def test_classification_reports_no_error_and_follows_the_loss():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, size=40).astype(np.int32)
    x = rng.normal(size=(40, 2)) + 3 * labels[:, None]
    program = Program(as_network(nb.FlaxMLP([4], 2)), Categorical())
    search = choose(rows_of(x, labels), sigmas=(0.1, 3.0), program=program, rates=RATES[:60])
    assert search.unseen_rmse is None
    assert search.sigma == 3.0
    assert search.losses.min() < 0.2 < np.log(2)


def test_no_prior_is_a_choice_too():
    search = choose(rows_of(*regression("signal")), sigmas=(np.inf,), rates=RATES[:30])
    assert search.sigma == np.inf and np.isfinite(search.losses).all()


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_rows_are_enough_to_search(n):
    x, y = regression("signal", n=10)
    search = choose(rows_of(x[:n], y[:n]), sigmas=(0.3, 1.0), rates=RATES[:10])
    assert np.isfinite(search.losses).all()
    assert 1 <= search.num_epochs <= 10


def test_a_run_that_diverges_is_not_chosen():
    rates = schedules.learning_rates(50.0, 30, 1)
    program = Program(NETWORK, Gaussian(), optimizer="sgd")
    with pytest.warns(ConvergenceWarning, match="does not improve the predictions of left-out rows"):
        search = choose(rows_of(*regression("signal")), sigmas=(0.1, 3.0), program=program, rates=rates)
    assert not np.isfinite(search.losses).all()
    assert np.isfinite(search.losses[search.sigmas.index(search.sigma)].min())
    assert np.isfinite(search.unseen_rmse).all()


class Lagging:
    """A scale's run in form only: its loss by epoch is given."""

    def __init__(self, losses):
        self.losses, self.curve, self.watched, self.ran = np.asarray(losses, float), np.zeros(0), [None, None], 0

    def advance(self, number, rates):
        self.ran += len(rates) * (number == 0)

    def record(self):
        self.curve = self.losses[: self.ran]

    is_past_its_best = regularisation._Run.is_past_its_best


class TestScalesThatFallBehind:
    """Losses in nats per row of a Gaussian whose perfect loss is -1: excess 0.5 is a standardised error of one."""

    def followed(self, *excesses, perfect=-1.0, num_rows=10_000):
        falling = np.linspace(1.0, 0.9, 512)
        runs = [Lagging(-1.0 + 0.5 * excess * falling) for excess in excesses]
        regularisation._follow(runs, np.zeros((512, 1)), perfect, num_rows)
        return [len(run.curve) for run in runs]

    def test_the_hopeless_end_and_the_near_go_on(self):
        assert self.followed(1.0, 1.05, 2.0) == [512, 512, 32]

    def test_the_gap_is_that_of_errors_however_small_they_are(self):
        assert self.followed(1e-3, 1.05e-3, 2e-3) == [512, 512, 32]

    def test_other_losses_are_compared_as_they_are(self):
        assert self.followed(1e-3, 2e-3, perfect=None) == [512, 512]
        assert self.followed(1.0, 2.0, perfect=None) == [512, 32]

    def test_few_rows_decide_less(self):
        assert self.followed(1.0, 1.3) == [512, 128]
        assert self.followed(1.0, 1.3, num_rows=20) == [512, 512]

    def test_more_is_allowed_to_those_that_may_catch_up(self):
        assert self.followed(1.0, 1.7) == [512, 64]  # 0.27 nats behind
        assert self.followed(1.0, 1.7, perfect=None) == [512, 32]

    def test_the_looks_are_at_fixed_epochs_and_the_last_at_the_end(self):
        assert regularisation._ends(300) == [32, 64, 128, 256, 300]
        assert regularisation._ends(64) == [32, 64]
        assert regularisation._ends(7) == [7]

    def test_one_that_blows_up_ends_alone(self):
        assert self.followed(np.inf, 1.0) == [32, 512]

    def test_errors_below_rounding_are_all_the_same(self):
        assert self.followed(1e-9, 1e-7) == [512, 512]


def test_one_by_one_and_stacked_folds_are_followed_alike(searches, monkeypatch):
    monkeypatch.setattr(regularisation, "one_by_one", lambda: False)
    stacked = choose(rows_of(*regression("signal")))
    assert (stacked.sigma, stacked.num_epochs) == (searches["signal"].sigma, searches["signal"].num_epochs)
    np.testing.assert_allclose(stacked.losses[:, :50], searches["signal"].losses[:, :50], rtol=1e-3)


def test_the_run_after_a_search_has_its_program(caplog, monkeypatch):
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 1)  # what other threads compile is not logged
    rows = rows_of(*regression("signal"))
    network = as_network(nb.FlaxMLP([6], 1))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        pretrain(network, Gaussian(), jax.random.key(0), rows, UNIT_NOISE, PretrainingOptions(epochs=20), seed=0)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message and "run_" in r.message]
    assert len(compiled) == 1, compiled


def test_what_is_compiled_ahead_is_what_trains(caplog):
    program = Program(as_network(nb.FlaxMLP([7], 1)), Gaussian(), batch_size=8)
    rows, rates = rows_of(*regression("signal")), schedules.learning_rates(0.02, 12, 7)
    settings = Settings(np.asarray(rows.real, np.float32), np.float32(1.0), UNIT_NOISE, np.int32(0))
    training.initialise(program, jax.random.key(0), rows.x, None)
    training.compile_ahead(program, jax.random.key(0), rows, settings)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(program, jax.random.key(1), rows, settings, learning_rates=rates)
    assert [r.message for r in caplog.records if "Finished XLA compilation" in r.message] == []
