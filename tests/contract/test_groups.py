"""Rows that belong together: left out as wholes, so that intervals speak of new groups."""

import warnings

import numpy as np
import pytest

import neurobayes as nb
from neurobayes import backbone_runs
from neurobayes.errors import CalibrationWarning, CheckpointError, DataError, OptionError

pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
OPTIONS = {"map_sigma": 1.0, "num_samples": 128, "progress_bar": False, "seed": 0}
NETWORK = nb.FlaxMLP([16, 16], 1)
ROWS = 6


def batches(number, seed):
    """Batches of rows with similar inputs, and an offset of the target in each that no input tells."""
    rng = np.random.default_rng(seed)
    batch = np.repeat(np.arange(number), ROWS)
    X = rng.normal(size=(number, 3))[batch] + 0.1 * rng.normal(size=(number * ROWS, 3))
    offset = 0.5 * rng.normal(size=number)[batch]
    return X, X[:, 0] + offset + 0.1 * rng.normal(size=len(X)), np.array([f"batch {b}" for b in batch])


def fit(X, y, groups=None, model=None, **kwargs):
    model = model or nb.PartialBNN(NETWORK, num_probabilistic_layers=1, num_backbones=8)
    return model.fit(X, y, groups=groups, **{**OPTIONS, **kwargs})


@pytest.fixture(scope="module")
def data():
    return batches(20, seed=0)


@pytest.fixture(scope="module")
def model(data):
    X, y, groups = data
    return fit(X, y, groups)


def left_out(model, num_rows):
    return model.backbones.row_weights[:, :num_rows] == 0


def test_intervals_hold_for_new_groups(model, data):
    """Without groups every row is predicted by networks that know its batch; the negative control."""
    X, y, _ = data
    new_X, new_y, _ = batches(200, seed=1)
    single = fit(X, y)
    coverage, density = {}, {}
    for name, each in (("groups", model), ("rows", single)):
        coverage[name] = nb.metrics.coverage(new_y, *each.predict(new_X))
        density[name] = each.log_predictive_density(new_X, new_y).mean()
    assert coverage["rows"] < 0.85 < 0.88 < coverage["groups"]
    assert density["groups"] > density["rows"] + 0.2


def test_groups_are_left_out_as_wholes(model, data):
    unseen = left_out(model, len(data[2]))
    for name in np.unique(data[2]):
        assert (np.ptp(unseen[:, data[2] == name].astype(int), axis=1) == 0).all()
    assert unseen.any(axis=0).all() and not unseen.all(axis=1).any()
    assert not model.backbones.whole_inputs


def test_the_names_do_not_matter(model, data):
    X, y, groups = data
    numbers = 100 - np.unique(groups, return_inverse=True)[1]
    again = fit(X, y, list(numbers))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_continued_with_more_rows(model, data):
    X, y, groups = data
    new_X, new_y, _ = batches(3, seed=2)
    rows, targets = np.concatenate([X, new_X]), np.concatenate([y, new_y])
    labels = [*groups, *np.repeat(["batch 0", "new", "newer"], ROWS)]
    warm = fit(rows, targets, labels, warm_start=model)
    unseen = left_out(warm, len(rows))
    np.testing.assert_array_equal(unseen[:, : len(X)], left_out(model, len(X)))
    np.testing.assert_array_equal(unseen[:, len(X) : len(X) + ROWS], unseen[:, :ROWS])  # of a batch that was there
    for other, kind in ((None, "was made with groups"), (["batch 1", *labels[1:]], "was made with groups")):
        with pytest.raises(OptionError, match=kind):
            fit(rows, targets, other, warm_start=model)
    with pytest.raises(OptionError, match="had no groups: give the same ones, none"):
        fit(rows, targets, labels, warm_start=fit(X, y))


def test_a_checkpoint_is_of_its_groups(model, data, tmp_path):
    X, y, groups = data
    fit(X, y, groups, checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(fit(X, y, groups, checkpoint_dir=tmp_path).predict(X), model.predict(X))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        fit(X, y, checkpoint_dir=tmp_path)


def test_a_single_network_is_searched_by_groups(data, quick):
    """Its folds are of whole batches: the error it expects is that on new ones."""
    X, y, groups = data
    make = {"model": nb.PartialBNN(NETWORK, num_backbones=1), "map_sigma": "auto", "sgd_epochs": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        expected = [
            fit(X, y, labels, engine=quick["engine"], num_samples=20, **make).held_out_std[0]
            for labels in (groups, None)
        ]
    assert expected[0] > 1.3 * expected[1]


@pytest.mark.parametrize("kind", [nb.BNN, nb.PartialBNN])
def test_a_single_network_is_continued_without(kind, data, quick):
    """Nothing is left out any more."""
    X, y, groups = data
    model = kind(NETWORK) if kind is nb.BNN else kind(NETWORK, num_backbones=1)
    options = {"engine": quick["engine"], "num_samples": 20, "map_sigma": "auto", "sgd_epochs": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        fit(X, y, groups, model=model, **options)
        with pytest.raises(OptionError, match="nothing is left out here"):
            fit(X, y, groups, model=model, warm_start=True, **options)
        assert fit(X, y, model=model, warm_start=True, **options) is model


def test_a_group_that_is_most_of_the_rows_is_warned_of(data, quick):
    X, y, _ = data
    with pytest.warns(CalibrationWarning, match="one of the groups has 75% of the rows"):
        fit(X, y, np.arange(120) // 90, **quick)


def test_evidence_is_counted_by_groups(data, monkeypatch):
    """So many rows of twenty batches say no more than twenty rows would."""
    X, y, groups = data
    seen = []
    monkeypatch.setattr(
        backbone_runs.Shared, "evidence", property(lambda shared: seen.append(shared.num_groups) or 9.9)
    )
    fit(np.exp(3 * X), y, groups)
    fit(np.exp(3 * X), y)
    assert seen[0] == 20 and seen[-1] == 120


def test_classes(data, quick):
    X, y, groups = data
    model = nb.PartialBNN(nb.FlaxMLP([8], 2), num_classes=2, num_backbones=4)
    fit(X, (y > 0).astype(int), groups, model=model, **quick)
    unseen = left_out(model, len(y))
    assert all((np.ptp(unseen[:, groups == name].astype(int), axis=1) == 0).all() for name in np.unique(groups))


@pytest.mark.parametrize(("groups", "message"), [
    (np.arange(3), r"groups has shape \(3,\) and X has 120 rows"),
    (np.zeros(120), "groups has one group only"),
])  # fmt: skip
def test_labels_are_checked_before_any_training(data, groups, message):
    with pytest.raises(DataError, match=message):
        fit(*data[:2], groups)


def test_where_nothing_is_left_out_groups_have_nothing_to_say(data):
    X, y, groups = data
    given = nb.DeterministicNN(NETWORK, 3).train(X, y, epochs=2, progress_bar=False)
    for model, options in (
        (nb.PartialBNN(NETWORK, deterministic_weights=given), {}),
        (nb.PartialBNN(NETWORK, prior_mean="zero"), {"sgd_epochs": 0}),
        (nb.PartialBNN(NETWORK, num_backbones=1), {"sgd_epochs": 5}),
    ):
        with pytest.raises(OptionError, match="nothing is left out here"):
            fit(X, y, groups, model=model, **options)
