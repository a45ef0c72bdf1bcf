"""Step sizes and averaging: shapes, when weights are collected, and what is refused."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neurobayes.errors import OptionError
from neurobayes.schedules import DEFAULT_FLOOR, DEFAULT_PEAK, AveragingConfig, learning_rates

BASE = np.full((20, 3), 0.1, np.float32)


@pytest.mark.parametrize("rate", [None, 0.1, 1, optax.cosine_decay_schedule(0.1, 60), lambda step: 0.1])
def test_rates_have_a_row_per_epoch_and_a_column_per_step(rate):
    rates = learning_rates(rate, 20, 3)
    assert rates.shape == (20, 3) and rates.dtype == np.float32
    assert (rates > 0).all() or rate is not None


def test_default_is_a_cosine_from_the_peak_to_the_floor():
    rates = learning_rates(None, 500, 2).ravel()
    assert rates[0] == np.float32(DEFAULT_PEAK)
    np.testing.assert_allclose(rates[-1], DEFAULT_PEAK * DEFAULT_FLOOR, rtol=1e-3)
    assert (np.diff(rates) < 0).all()
    np.testing.assert_allclose(rates[500], DEFAULT_PEAK * (1 + DEFAULT_FLOOR) / 2, rtol=1e-6)


def test_schedule_is_read_once_for_every_step_across_epochs():
    rates = learning_rates(lambda step: 0.5 * 0.9**step, 4, 5)
    np.testing.assert_allclose(rates.ravel(), 0.5 * 0.9 ** np.arange(20), rtol=1e-5)
    piecewise = learning_rates(optax.piecewise_constant_schedule(1.0, {10: 0.1}), 4, 5)
    np.testing.assert_allclose(piecewise.ravel(), [1.0] * 10 + [0.1] * 10, rtol=1e-6)


def test_a_schedule_that_changes_is_read_anew():
    class Schedule:
        __hash__ = None
        peak = 0.1

        def __call__(self, step):
            return jnp.full((), self.peak)

    schedule = Schedule()
    assert np.all(learning_rates(schedule, 3, 1) == np.float32(0.1))
    schedule.peak = 0.2
    assert np.all(learning_rates(schedule, 3, 1) == np.float32(0.2))


@pytest.mark.parametrize("rate", [0.0, -0.1, np.nan, np.inf, "fast", [0.1]])
def test_a_rate_that_is_no_positive_number_raises(rate):
    with pytest.raises(OptionError, match="learning_rate"):
        learning_rates(rate, 5, 1)


def test_a_schedule_that_is_not_finite_raises():
    with pytest.raises(OptionError, match="not finite"):
        learning_rates(lambda step: 1.0 / jnp.where(step == 3, 0.0, 1.0), 5, 1)


def test_constant_averaging_falls_to_its_rate_and_collects_every_epoch():
    rates, collect = AveragingConfig("constant", start_pct=0.75, swa_lr=0.02).apply(BASE)
    np.testing.assert_allclose(rates[:15], 0.1)
    np.testing.assert_allclose(rates[15:], 0.02)
    np.testing.assert_array_equal(np.flatnonzero(collect), np.arange(15, 20))


def test_averaging_rate_is_half_the_base_rate_by_default():
    sloped = np.linspace(0.2, 0.1, 20, dtype=np.float32)[:, None]
    rates, _ = AveragingConfig("constant", start_pct=0.5).apply(sloped)
    np.testing.assert_allclose(rates[10:], 0.5 * sloped[10:])


def test_collect_freq_spaces_the_averaged_weights():
    _, collect = AveragingConfig("constant", start_pct=0.5, collect_freq=4).apply(BASE)
    np.testing.assert_array_equal(np.flatnonzero(collect), [10, 14, 18])


def test_linear_averaging_falls_over_half_its_stage_then_stays():
    rates, collect = AveragingConfig("linear", start_pct=0.0, swa_lr=0.05).apply(BASE)
    np.testing.assert_allclose(rates[0], 0.1)
    np.testing.assert_allclose(rates[5], 0.075)
    np.testing.assert_allclose(rates[10:], 0.05)
    assert (np.diff(rates[:11, 0]) < 0).all()
    assert collect.sum() == 20


def test_cyclic_averaging_collects_at_the_end_of_each_cycle_where_the_rate_is_lowest():
    rates, collect = AveragingConfig("cyclic", start_pct=0.5, swa_lr=0.01, cycle_length=5).apply(BASE)
    np.testing.assert_array_equal(np.flatnonzero(collect), [14, 19])
    np.testing.assert_allclose(rates[[14, 19]], 0.01, rtol=1e-6)
    np.testing.assert_allclose(rates[[10, 15]], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[10:15], rates[15:20])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cyclic"])
@pytest.mark.parametrize("num_epochs", [1, 2, 3, 7, 50, 200])
@pytest.mark.parametrize("start_pct", [0.0, 0.5, 0.75, 0.99])
def test_every_schedule_collects_something_by_default_and_changes_nothing_before_its_start(
    schedule, num_epochs, start_pct
):
    """Linear and cyclic schedules once collected nothing by default."""
    base = np.full((num_epochs, 2), 0.1, np.float32)
    given = base.copy()
    rates, collect = AveragingConfig(schedule, start_pct=start_pct).apply(base)
    start = min(int(np.ceil(start_pct * num_epochs)), num_epochs - 1)
    assert rates.shape == base.shape and collect.shape == (num_epochs,)
    assert collect.sum() >= 1
    assert not collect[:start].any()
    np.testing.assert_array_equal(rates[:start], base[:start])
    assert ((rates > 0) & (rates <= np.float32(0.1))).all()
    np.testing.assert_array_equal(base, given)


def test_a_cycle_longer_than_the_stage_still_collects():
    _, collect = AveragingConfig("cyclic", start_pct=0.5, cycle_length=1000).apply(BASE)
    np.testing.assert_array_equal(np.flatnonzero(collect), [19])


def test_a_cycle_of_one_epoch_runs_at_one_rate():
    rates, collect = AveragingConfig("cyclic", start_pct=0.5, cycle_length=1, swa_lr=0.01).apply(BASE)
    assert collect[10:].all()
    assert np.isfinite(rates).all() and np.unique(rates[10:]).size == 1


def test_config_from_a_users_mapping():
    config = AveragingConfig.from_user({"schedule": "cyclic", "cycle_length": 3})
    assert config == AveragingConfig("cyclic", cycle_length=3)
    assert AveragingConfig.from_user(config) is config
    assert AveragingConfig.from_user(None) is None


def test_unknown_entry_raises_with_the_nearest_name():
    with pytest.raises(OptionError, match=r"no entry 'start_percent' \(closest: 'start_pct'\).*collect_freq"):
        AveragingConfig.from_user({"start_percent": 0.5})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedule": "cycle"}, "cyclic"), ({"start_pct": 1.0}, "start_pct"), ({"start_pct": -0.1}, "start_pct"),
        ({"swa_lr": 0.0}, "swa_lr"), ({"swa_lr": "low"}, "swa_lr"), ({"cycle_length": 0}, "cycle_length"),
        ({"cycle_length": 2.5}, "cycle_length"), ({"collect_freq": 0}, "collect_freq"), ("constant", "dict"),
        ([("schedule", "constant")], "dict"),
    ],
)  # fmt: skip
def test_bad_entries_raise(config, message):
    with pytest.raises(OptionError, match=message):
        AveragingConfig.from_user(config)
