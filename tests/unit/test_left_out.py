"""Who leaves out what: shares of rows, folds, and repeated inputs that stay together."""

import numpy as np
import pandas as pd
import pytest

from neurobayes import data, left_out
from neurobayes.errors import DataError

SIZES = [(2, 2), (2, 4), (3, 4), (5, 4), (6, 8), (8, 4), (16, 8), (17, 8)]


def distinct(n):
    return np.arange(n, dtype=np.float32)[:, None] + 1.0


def measured_again(inputs=20, times=3):
    """``times`` rows for each of so many inputs, shuffled."""
    x = np.repeat(np.random.default_rng(0).normal(size=(inputs, 2)), times, axis=0).astype(np.float32)
    return np.random.default_rng(1).permutation(x)


@pytest.mark.parametrize(("members", "parts"), SIZES)
@pytest.mark.parametrize("num_rows", [17, 100])
def test_every_row_is_left_out_and_trained_on(members, parts, num_rows):
    weights = left_out.leave_out(np.arange(num_rows), members, parts, seed=3)
    assert weights.shape == (members, num_rows) and set(np.unique(weights)) == {0.0, 1.0}
    assert ((weights == 0).sum(axis=0) >= 1).all()
    assert (weights.sum(axis=0) >= 1).all()


@pytest.mark.parametrize(("members", "parts"), SIZES)
def test_shares_are_balanced(members, parts):
    weights = left_out.leave_out(np.arange(100), members, parts, seed=3)
    left = (weights == 0).sum(axis=1)
    # A group may be smaller than num_parts; a lone last member is not a group of its own.
    groups = [min(parts, members - first) for first in range(0, members, parts)]
    sizes = np.repeat(groups, groups)
    sizes[sizes == 1] = min(parts, members)
    assert (left >= 100 // sizes).all() and (left <= -(-100 // sizes)).all()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_no_more_members_than_rows(num_rows):
    """As many members as rows is what the models ask for at most: each leaves some out, but not all."""
    if num_rows == 1:
        return
    for members in range(2, num_rows + 1):
        weights = left_out.leave_out(np.arange(num_rows), members, 4, seed=0)
        assert (weights.sum(axis=1) >= 1).all() and ((weights == 0).any(axis=0)).all()
        assert ((weights == 0).any(axis=1)).all()


@pytest.mark.parametrize(("members", "parts"), SIZES)
def test_rows_that_are_added_leave_the_others_where_they_were(members, parts):
    long = left_out.leave_out(np.arange(60), members, parts, seed=5)
    for num_rows in (20, 21, 37, 59):
        np.testing.assert_array_equal(
            left_out.leave_out(np.arange(num_rows), members, parts, seed=5), long[:, :num_rows]
        )


def test_groups_share_the_rows_out_between_them():
    weights = left_out.leave_out(np.arange(50), 8, 4, seed=0)
    np.testing.assert_array_equal((weights[:4] == 0).sum(axis=0), 1)
    np.testing.assert_array_equal((weights[4:] == 0).sum(axis=0), 1)
    assert not np.array_equal(weights[:4], weights[4:])  # each group in its own way


def test_the_seed_decides():
    first, again, other = (left_out.leave_out(np.arange(50), 4, 4, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 17, 442])
def test_every_row_is_in_exactly_one_fold_and_folds_are_of_one_size(n):
    real = data.row_weights(n, data.bucket_size(n))
    folds = left_out.assign_folds(distinct(len(real)), real, seed=3)
    counts = np.bincount(folds[real > 0])
    assert folds.shape == real.shape
    assert counts.sum() == n
    assert len(counts) == min(n, 5)
    assert counts.max() - counts.min() <= 1
    assert not folds[real == 0].any()


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows():
    real = np.ones(40, np.float32)
    one, again, other = (left_out.assign_folds(distinct(len(real)), real, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (np.diff(one) < 0).any() and (np.diff(one) > 0).any()


# Repeated inputs


def test_equal_inputs_have_one_number_by_first_appearance():
    x = np.array([[2.0, 0.0], [1.0, 5.0], [2.0, -0.0], [0.0, 2.0], [1.0, 5.0]], np.float32)
    np.testing.assert_array_equal(left_out.whole_inputs(x), [0, 1, 0, 2, 1])
    np.testing.assert_array_equal(left_out.whole_inputs(distinct(7)), np.arange(7))


def test_inputs_of_any_shape_are_told_apart():
    images = np.random.default_rng(0).normal(size=(5, 4, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(left_out.whole_inputs(images[[3, 0, 3, 1]]), [0, 1, 0, 2])


@pytest.mark.parametrize(("x", "expected"), [
    (measured_again(), True),
    (measured_again(times=1), False),  # nothing is repeated
    (np.concatenate([measured_again(100, 1), measured_again(100, 1)[:30]]), False),  # a few equal rows, as in new data
    (measured_again(inputs=left_out.LEAST_INPUTS, times=2), True),
    (measured_again(inputs=left_out.LEAST_INPUTS - 1, times=9), False),  # a quarter of so few would be whole regions
])  # fmt: skip
def test_repeats_stay_together_where_there_are_enough_others(x, expected):
    assert left_out.repeats(x) is expected


def test_repeated_inputs_are_left_out_together():
    x = measured_again()
    groups = left_out.whole_inputs(x)
    weights = left_out.leave_out(groups, 8, 4, seed=0)
    assert (weights == 0).any(axis=0).all() and (weights.sum(axis=1) > 0).all()
    for number in range(groups.max() + 1):
        assert (weights[:, groups == number] == weights[:, groups == number][:, :1]).all()
    folds = left_out.assign_folds(x, np.ones(len(x)), seed=0)
    assert all(len(set(folds[groups == number])) == 1 for number in range(groups.max() + 1))
    assert len(set(folds)) == left_out.MAX_FOLDS


def test_rows_added_to_repeats_leave_the_others_where_they_were():
    x = np.concatenate([measured_again(), measured_again()[:30] + 1.0, measured_again()[:9]])
    long = left_out.leave_out(left_out.whole_inputs(x), 8, 4, seed=0)
    short = left_out.leave_out(left_out.whole_inputs(x[:60]), 8, 4, seed=0)
    np.testing.assert_array_equal(short, long[:, :60])


# Groups of the user


@pytest.mark.parametrize("labels", [
    ["b", "a", "b", "c", "a"], [7, -1, 7, 0, -1], np.array([2.5, 1.0, 2.5, 9.0, 1.0]), np.array(list("xyxzy"), object),
    [True, False, True, False, False], pd.Series(["b", "a", "b", "c", "a"], dtype="category", index=[9, 8, 7, 6, 5]),
])  # fmt: skip
def test_labels_are_numbered_by_first_appearance(labels):
    expected = [0, 1, 0, 1, 1] if next(iter(labels)) is True else [0, 1, 0, 2, 1]
    np.testing.assert_array_equal(left_out.as_groups(labels, 5), expected)


@pytest.mark.parametrize(("labels", "message"), [
    ([1, 2], "groups has shape (2,) and X has 3 rows."),
    ([[1], [2], [3]], "groups has shape (3, 1) and X has 3 rows."),
    ("abc", "groups has shape () and X has 3 rows."),
    ([1.0, np.nan, 2.0], "groups has no label for row 1."),
    (["a", "b", None], "groups has no label for row 2."),
    (np.array([1, "a", 2], object), "groups mixes labels of several kinds"),
    ([1, "1", "a"], "groups mixes labels of several kinds"),
    (["a", "b", float("nan")], "groups has no label for row 2."),
    (pd.Series(["a", pd.NA, "b"], dtype="string"), "groups has no label for row 1."),
    (["a", "a", "a"], "groups has one group only"),
])  # fmt: skip
def test_labels_that_say_nothing_raise(labels, message):
    with pytest.raises(DataError) as raised:
        left_out.as_groups(labels, 3)
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith((".", "more."))


@pytest.mark.parametrize("num_groups", [2, 3, 9, 40])
def test_groups_are_left_out_as_wholes(num_groups):
    groups = left_out.as_groups(np.random.default_rng(0).integers(num_groups, size=120), 120)
    real = data.row_weights(120, 128)
    weights, parts, whole = left_out.share_out(distinct(128), real, 8, seed=0, groups=groups)
    assert parts == min(4, num_groups) and not whole
    assert not weights[:, 120:].any()
    for number in range(groups.max() + 1):
        assert (np.ptp(weights[:, :120][:, groups == number], axis=1) == 0).all()
    unseen = weights[:, :120] == 0
    assert (unseen.sum(axis=0) >= 2).all()  # each row is new to some in each set of ``parts``
    assert (unseen.any(axis=1) & ~unseen.all(axis=1)).all()
    folds = left_out.assign_folds(distinct(128), real, seed=0, groups=groups)
    assert len(np.unique(folds[:120])) == min(num_groups, 5)
    assert all(np.ptp(folds[:120][groups == number]) == 0 for number in range(groups.max() + 1))


def test_new_groups_leave_the_others_where_they_were():
    groups = np.repeat(np.arange(30), 4)
    long, *_ = left_out.share_out(distinct(120), np.ones(120), 8, seed=1, groups=groups)
    short, *_ = left_out.share_out(distinct(50), np.ones(50), 8, seed=1, groups=groups[:50])
    np.testing.assert_array_equal(long[:, :50], short)


def test_groups_are_counted():
    x = measured_again()
    assert left_out.num_groups(x, False, None) == 60
    assert left_out.num_groups(x, True, None) == 20
    assert left_out.num_groups(x, True, np.arange(60) // 10) == 6
