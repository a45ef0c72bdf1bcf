"""Fits whose programs are made for more rows than there are yet."""

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import backbones
from neurobayes.models import deterministic_stage, extent

pytestmark = pytest.mark.filterwarnings(
    "ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning",
    "ignore::neurobayes.errors.CalibrationWarning",
)
EXACT = {"sgd_epochs": 2, "map_sigma": 1.0, "num_samples": 200, "progress_bar": False, "seed": 0}


@pytest.fixture
def one(mlp):
    """The output layer above a single network."""
    return nb.PartialBNN(mlp, num_probabilistic_layers=1, num_backbones=1)


@pytest.fixture
def several():
    return nb.PartialBNN(nb.FlaxMLP([8], 1), num_probabilistic_layers=1)


def test_more_rows_compile_nothing(one, regression, short, count_compilations):
    """Active learning: as many as are added, one by one or many at once."""
    X, y = regression
    one.fit(X[:20], y[:20], **short, room_for=60).predict(X)
    with count_compilations() as compiled:
        for size in (21, 22, 35, 60):
            one.fit(X[:size], y[:size], **short, room_for=60)
    assert compiled.number == 0


def test_room_changes_the_draws_by_rounding_only(mlp, one, regression, short):
    X, y = regression
    roomy = one.fit(X, y, **short, rng_key=jax.random.key(0), room_for=200)
    tight = nb.PartialBNN(mlp, num_probabilistic_layers=1, num_backbones=1).fit(X, y, **short)
    assert roomy._fitted.capacity >= 200 > tight._fitted.capacity
    np.testing.assert_allclose(roomy.predict(X)[0], tight.predict(X)[0], rtol=1e-3, atol=1e-3 * np.std(y))


@pytest.mark.parametrize("room", [59, 0, 60.5, "60"])
def test_room_for_too_few_rows_is_an_error(one, regression, short, room):
    with pytest.raises(nb.errors.OptionError, match="room_for"):
        one.fit(*regression, **short, room_for=room)


def test_there_are_as_many_backbones_as_of_all_rows(several, regression, count_compilations):
    X, y = (np.resize(values, (extent.SMALL_ROWS, *values.shape[1:])) for values in regression)
    options = {**EXACT, "room_for": extent.SMALL_ROWS}
    several.fit(X[:40], y[:40], **options)
    assert len(several.backbones.members) == extent.EXACT_BACKBONES
    with count_compilations() as compiled:
        for rows in (41, 60, extent.SMALL_ROWS):
            assert len(several.fit(X[:rows], y[:rows], **options).backbones.members) == extent.EXACT_BACKBONES
    assert compiled.number == 0


def test_another_number_of_prior_scales_compiles_nothing(several, regression, count_compilations, monkeypatch):
    X, y = regression
    options = {**EXACT, "map_sigma": "auto", "room_for": 60}
    monkeypatch.setattr(backbones, "NEGLIGIBLE", -np.inf)
    assert several.fit(X[:40], y[:40], **options).backbones.parts.max() == 0
    monkeypatch.setattr(backbones, "NEGLIGIBLE", np.inf)
    with count_compilations() as compiled:
        several.fit(X[:41], y[:41], **options)
    assert several.backbones.parts.max() > 0 and compiled.number == 0


@pytest.mark.parametrize("num_backbones", ["auto", 1])
def test_the_first_fit_compiles_for_batches(regression, num_backbones, count_compilations, monkeypatch):
    """Up to 256 rows each step takes all of them, beyond a batch."""
    monkeypatch.setattr(deterministic_stage, "beside", lambda function: function())
    X, y = (np.resize(values, (270, *values.shape[1:])) for values in regression)
    model = nb.PartialBNN(nb.FlaxMLP([8], 1), num_probabilistic_layers=1, num_backbones=num_backbones)
    model.fit(X[:200], y[:200], **EXACT, room_for=270)
    with count_compilations() as compiled:
        model.fit(X, y, **EXACT, room_for=270)
    assert compiled.number == 0


def test_a_shrinking_pool_compiles_next_to_nothing(one, regression, short, count_compilations):
    """Every draw runs over the rows in blocks of few sizes."""
    X, y = regression
    pool = np.resize(X, (500, 3))
    one.fit(X, y, **short).predict(pool)
    with count_compilations() as compiled:
        for rows in (490, 440, 390, 300, 260):
            one.predict(pool[:rows])
    assert compiled.number == 0
