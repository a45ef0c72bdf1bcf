import json
import pickle

import numpy as np
import pytest

from neurobayes.data import Scaling, bucket_size, pad_rows, row_weights
from neurobayes.errors import DataError


def rows(n=200, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize(
    ("centre", "spread"), [(0.0, 1.0), (900.0, 100.0), (0.0, 1e-9), (5e-9, 1e-10), (1e9, 1.0), (0, 1e-200), (0, 1e200)]
)
def test_data_of_any_unit_reaches_unit_scale_and_comes_back(centre, spread):
    X, y = rows(), centre + spread * rows(d=2, seed=1)
    scaling = Scaling.fit(centre + spread * X, y)
    x_scaled, y_scaled = scaling.inputs(centre + spread * X), scaling.targets(y)
    assert x_scaled.dtype == y_scaled.dtype == np.float32
    for scaled in (x_scaled, y_scaled):
        np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-5)
    # The same data in other units is the same data to the network.
    np.testing.assert_allclose(x_scaled, Scaling.fit(X, None).inputs(X), atol=1e-5)
    np.testing.assert_allclose(scaling.mean_to_user(y_scaled), y, rtol=1e-6, atol=1e-6 * spread)


def test_statistics_are_per_column_of_the_training_rows():
    X = rows() * [1.0, 10.0, 100.0] + [0.0, 5.0, -3.0]
    scaling = Scaling.fit(X, None)
    np.testing.assert_allclose(scaling.x_mean, X.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.x_std, X.std(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.inputs(X[:1]), (X[:1] - X.mean(0)) / X.std(0), rtol=1e-6)


def test_images_are_scaled_per_channel():
    X = np.random.default_rng(0).normal(size=(20, 4, 5, 2)) * [1.0, 50.0] + [0.0, 7.0]
    scaling = Scaling.fit(X, None)
    assert scaling.x_mean.shape == scaling.x_std.shape == (2,)
    np.testing.assert_allclose(scaling.x_std, X.std((0, 1, 2)), rtol=1e-12)
    assert scaling.inputs(X).shape == X.shape


def test_variance_comes_back_in_squared_units():
    y = 900 + 100 * rows(d=2)
    scaling = Scaling.fit(rows(), y)
    draws = np.random.default_rng(1).normal(size=(5, 7, 2))  # leading axes broadcast
    np.testing.assert_allclose(scaling.var_to_user(draws**2), draws**2 * y.var(0), rtol=1e-12)
    assert scaling.mean_to_user(draws).shape == draws.shape


@pytest.mark.parametrize("value", [0.0, 0.1, 7e-9, 1e9])
@pytest.mark.parametrize("n", [1, 1000])
def test_constant_columns_and_targets_get_scale_one(value, n):
    constant = np.full((n, 1), value)
    scaling = Scaling.fit(constant, constant[:, 0])
    assert scaling.x_std == scaling.y_std == 1
    np.testing.assert_allclose(scaling.inputs(constant), 0, atol=1e-12 * value)
    np.testing.assert_allclose(scaling.mean_to_user(scaling.targets(constant)), constant, rtol=1e-12)


def test_a_column_that_varies_by_rounding_only_is_constant():
    noise = np.where(np.arange(100) % 2, 0.3, 0.1 + 0.2)[:, None]
    assert np.std(noise) > 0
    assert Scaling.fit(noise, None).x_std == 1


def test_one_dimensional_targets_are_one_column():
    y = 900 + 100 * rows(d=1)[:, 0]
    scaling = Scaling.fit(rows(), y)
    assert scaling.y_mean.shape == (1,)
    assert scaling.targets(y).shape == scaling.targets(y[:, None]).shape == (200, 1)


def test_identity_changes_no_value():
    X, y = rows().astype(np.float32), rows(d=2).astype(np.float32)
    scaling = Scaling.fit(900 + X, 900 + y, standardize=False)
    assert scaling == Scaling.identity()
    np.testing.assert_array_equal(scaling.inputs(X), X)
    np.testing.assert_array_equal(scaling.targets(y), y)
    np.testing.assert_array_equal(scaling.mean_to_user(y), y)
    np.testing.assert_array_equal(scaling.var_to_user(y), y)


@pytest.mark.parametrize("standardize", [True, False])
def test_tokens_are_never_scaled(standardize):
    tokens = np.array([[0, 5, 9], [3, 3, 3]])
    scaling = Scaling.fit(tokens, np.array([800.0, 1000.0]), tokens=True, standardize=standardize)
    assert scaling.inputs(tokens).dtype == np.int32
    np.testing.assert_array_equal(scaling.inputs(tokens), tokens)
    assert scaling.y_std == (100.0 if standardize else 1.0)


@pytest.mark.parametrize("value", [1e39, -1e300, 1.7e308])
def test_what_float32_cannot_hold_raises_instead_of_becoming_infinite(value):
    far = np.array([[0.0, 0.0], [0.0, value]])
    with pytest.raises(DataError, match=r"X has 1 value too large .* row 1, column 1 .*standardize=True"):
        Scaling.identity().inputs(far)
    with pytest.raises(DataError, match="y has 1 value too large"):
        Scaling.identity().targets(far)
    assert np.isfinite(Scaling.fit(far, far).inputs(far)).all()
    assert np.isfinite(Scaling.fit(far, far).targets(far)).all()


def test_opposite_extremes_do_not_overflow():
    X = np.array([[1.7e308], [-1.7e308]])
    np.testing.assert_allclose(Scaling.fit(X, None).inputs(X), [[1], [-1]])


def test_fitting_changes_neither_data_nor_later_with_it():
    X = rows()
    X.flags.writeable = False
    scaling = Scaling.fit(X, None)
    scaling.inputs(X)
    source = np.zeros(3)
    built = Scaling(source, np.ones(3), np.zeros(1), np.ones(1))
    source[:] = 5
    assert (built.x_mean == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        built.x_mean[0] = 1


def test_equality_is_one_bool():
    scaling = Scaling.fit(rows(), rows(d=2))
    assert (scaling == Scaling.fit(rows(), rows(d=2))) is True
    assert (scaling == Scaling.fit(rows(seed=1), rows(d=2))) is False
    assert (scaling == Scaling.fit(rows(), rows(d=1))) is False
    assert (Scaling.identity() == Scaling.identity(tokens=True)) is False
    assert scaling != "scaling"


@pytest.mark.parametrize("tokens", [True, False])
def test_survives_pickle_and_json_exactly(tokens):
    X = np.arange(6).reshape(2, 3) if tokens else rows()
    scaling = Scaling.fit(X, rows(len(X)), tokens=tokens)
    assert pickle.loads(pickle.dumps(scaling)) == scaling
    for name, value in json.loads(json.dumps(scaling.to_dict())).items():
        np.testing.assert_array_equal(value, getattr(scaling, name))


@pytest.mark.parametrize("number", [8, 32])
def test_buckets_hold_the_rows_with_little_waste(number):
    sizes = [bucket_size(n, number) for n in range(8, 5000)]
    for n, size in enumerate(sizes, start=8):
        assert n <= size <= (1 + 1 / number) * n
        assert bucket_size(size, number) == size
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= number * (np.log2(5000 / 8) + 1)


def test_buckets_by_default():
    assert [bucket_size(n) for n in (0, 1, 8, 100, 1000, 1_000_000)] == [8, 8, 8, 104, 1024, 1_048_576]
    assert type(bucket_size(np.int32(17))) is int


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 5, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_padding_repeats_the_last_row(shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    padded = pad_rows(array, 8)
    assert padded.dtype == dtype and padded.shape == (8, *shape[1:])
    assert (padded[:3] == array).all() and (padded[3:] == array[-1]).all()
    np.testing.assert_array_equal(pad_rows(array, 3), array)
    with pytest.raises(ValueError, match="3 rows, more than size=2"):
        pad_rows(array, 2)


def test_row_weights_count_the_real_rows():
    weights = row_weights(3, 8)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, [1, 1, 1, 0, 0, 0, 0, 0])
