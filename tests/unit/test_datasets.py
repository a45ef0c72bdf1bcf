import numpy as np
import pytest

from neurobayes import datasets
from neurobayes.errors import DataError, OptionError


@pytest.mark.parametrize("name", datasets.NAMES)
def test_every_dataset_is_consistent(name):
    data = datasets.load(name)
    assert data.name == name
    assert data.X.ndim == 2 and data.X.dtype == np.float64 and np.isfinite(data.X).all()
    assert data.y.shape == (len(data.X),)
    assert len(data.feature_names) == data.X.shape[1]
    if data.task == "classification":
        assert sorted(set(data.y.tolist())) == list(range(len(data.class_names)))
    else:
        assert data.y.dtype == np.float64 and data.class_names == ()


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(OptionError, match=r"closest: 'diabetes'"):
        datasets.load("diabets")


def test_diabetes_split_is_the_documented_one():
    data = datasets.load("diabetes")
    order = np.random.default_rng(0).permutation(442)
    train, test = datasets.split_rows(442, 92 / 442, seed=0)
    assert np.array_equal(train, order[:350]) and np.array_equal(test, order[350:])
    X_train, X_test, y_train, y_test = datasets.train_test_split(data.X, data.y, 92 / 442, seed=0)
    assert np.array_equal(X_test, data.X[order[-92:]]) and np.array_equal(y_test, data.y[order[-92:]])
    assert np.array_equal(X_train, data.X[order[:-92]]) and np.array_equal(y_train, data.y[order[:-92]])


@pytest.mark.parametrize(("n", "fraction", "num_test"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 2), (10, 0.999, 9)])
def test_both_parts_of_a_split_have_rows(n, fraction, num_test):
    train, test = datasets.split_rows(n, fraction)
    assert len(test) == num_test
    assert sorted([*train, *test]) == list(range(n))


def test_stratified_split_keeps_the_shares():
    labels = np.repeat([0, 1, 2], [70, 29, 1])
    train, test = datasets.split_rows(100, 0.2, seed=3, labels=labels)
    assert np.bincount(labels[test], minlength=3).tolist() == [14, 6, 0]
    assert sorted([*train, *test]) == list(range(100))
    again = datasets.split_rows(100, 0.2, seed=3, labels=labels)
    assert np.array_equal(train, again[0]) and np.array_equal(test, again[1])


def test_stratified_split_of_single_rows_per_class_still_has_a_test_row():
    train, test = datasets.split_rows(3, 0.2, labels=np.array(["a", "b", "c"]))
    assert (len(train), len(test)) == (2, 1)


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5, float("nan")])
def test_impossible_fractions_raise(fraction):
    with pytest.raises(OptionError, match="test_fraction"):
        datasets.split_rows(10, fraction)


def test_too_few_rows_and_unequal_lengths_raise():
    with pytest.raises(DataError, match="1 row cannot be split"):
        datasets.split_rows(1)
    with pytest.raises(DataError, match="y has 3 rows but X has 4"):
        datasets.train_test_split(np.zeros((4, 2)), np.zeros(3))
    with pytest.raises(DataError, match="labels has 3 entries for 4 rows"):
        datasets.split_rows(4, labels=np.zeros(3))


def test_friedman_follows_its_formula():
    data = datasets.friedman(20_000, seed=1, num_features=7, noise_std=0.5)
    x = data.X.T
    signal = 10 * np.sin(np.pi * x[0] * x[1]) + 20 * (x[2] - 0.5) ** 2 + 10 * x[3] + 5 * x[4]
    # The std of 20,000 normal draws has a standard error of 0.5 / sqrt(40,000).
    assert abs((data.y - signal).std() - 0.5) < 5 * 0.5 / np.sqrt(40_000)
    assert np.array_equal(data.y, datasets.friedman(20_000, seed=1, num_features=7, noise_std=0.5).y)
    assert not np.array_equal(data.y, datasets.friedman(20_000, seed=2, num_features=7, noise_std=0.5).y)


@pytest.mark.parametrize("options", [{"n": 0}, {"num_features": 4}, {"noise_std": -1.0}])
def test_impossible_friedman_options_raise(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        datasets.friedman(**options)


def test_groups_are_held_out_as_wholes():
    groups = np.array(["a", "b", "c", "d", "e"])[np.random.default_rng(0).integers(5, size=60)]
    for seed in range(5):
        train, test = datasets.split_rows(60, 0.3, seed, groups=groups)
        assert sorted([*train, *test]) == list(range(60))
        assert len(set(groups[test])) == 2 and not set(groups[test]) & set(groups[train])
    again = datasets.split_rows(60, 0.3, 4, groups=list(groups))
    np.testing.assert_array_equal(again[1], test)
    assert (np.diff(test) < 0).any() and (np.diff(train) < 0).any()  # in random order
    assert len(datasets.split_rows(100, 0.07, 5_000_000_000, groups=np.arange(100))[1]) == 7
    y = np.arange(60)
    *_, y_test = datasets.train_test_split(y[:, None], y, 0.3, 4, groups=groups)
    np.testing.assert_array_equal(y_test, test)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_groups_are_a_group_each(fraction):
    train, test = datasets.split_rows(4, fraction, groups=[1, 1, 2, 2])
    assert len(train) == len(test) == 2


def test_groups_and_classes_exclude_each_other():
    with pytest.raises(OptionError, match="cannot both be kept together"):
        datasets.split_rows(4, labels=[0, 0, 1, 1], groups=[1, 1, 2, 2])
    with pytest.raises(DataError, match="one group only"):
        datasets.split_rows(4, groups=[1, 1, 1, 1])
