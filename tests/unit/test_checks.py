import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse

from neurobayes import _checks
from neurobayes.errors import DataError, OptionError
from neurobayes.networks.base import InputSpec

PLAIN = InputSpec()
TOKENS = InputSpec(tokens=True, vocab_size=10, max_length=4)
VALUES = [[1, 0], [0, 1], [1, 1]]


# Inputs


@pytest.mark.parametrize(
    "X",
    [
        VALUES,
        tuple(map(tuple, VALUES)),
        np.array(VALUES, np.int8),
        np.array(VALUES, np.uint64),
        np.array(VALUES, bool),
        np.array(VALUES, np.float16),
        np.array(VALUES, np.float64, order="F"),
        jnp.array(VALUES),
        jnp.array(VALUES, jnp.bfloat16),
        pd.DataFrame(VALUES, columns=["a", "b"]),
        pd.DataFrame(VALUES, columns=["same", "same"]),
        pd.DataFrame(VALUES, dtype="Int64"),
        pd.DataFrame({"a": [1, 0, 1], "b": [False, True, True]}),
        pl.DataFrame({"a": [1.0, 0.0, 1.0], "b": [0, 1, 1]}),
    ],
    ids=lambda X: type(X).__module__ + "." + str(getattr(X, "dtype", type(X).__name__)),
)
def test_inputs_of_every_kind_become_one_kind(X):
    array = _checks.as_inputs(X, PLAIN)
    assert array.dtype == np.float64 and array.flags.c_contiguous and type(array) is np.ndarray
    np.testing.assert_array_equal(array, VALUES)


def test_read_only_inputs_are_left_alone():
    X = np.array(VALUES, np.float64)
    X.flags.writeable = False
    np.testing.assert_array_equal(_checks.as_inputs(X, PLAIN), VALUES)
    np.testing.assert_array_equal(X, VALUES)


def test_one_row_is_enough_to_predict():
    assert _checks.as_inputs([[1.0, 2.0]], PLAIN, expected_shape=(2,)).shape == (1, 2)


def test_non_finite_inputs_are_counted_and_located():
    X = np.ones((20, 5))
    X[17, 4], X[18, 0], X[19, 1] = np.nan, np.inf, -np.inf
    with pytest.raises(DataError, match=r"X has 3 non-finite values, the first at row 17, column 4 \(nan\)\. Impute"):
        _checks.as_inputs(X, PLAIN)
    with pytest.raises(DataError, match=r"1 non-finite value, the first at row 1, position \(0, 2\) \(-inf\)"):
        _checks.as_inputs([[[0, 0, 0]], [[0, 0, -np.inf]]], PLAIN)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"age": [1.0, 2.0], "height": [3.0, None]}),
        pd.DataFrame({"age": [1, 2], "height": pd.array([3, None], dtype="Int64")}),
        pl.DataFrame({"age": [1, 2], "height": [3, None]}),
    ],
    ids=["pandas", "pandas-nullable", "polars"],
)
def test_gaps_in_frames_are_named_by_column(frame):
    with pytest.raises(DataError, match=r"row 1, column 1 \('height'\) \(nan\)"):
        _checks.as_inputs(frame, PLAIN)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"age": [1.0, 2.0], "city": ["Oslo", "Rome"]}),
        pd.DataFrame({"age": [1.0, 2.0], "city": np.array(["Oslo", 2.0], object)}),
        pd.DataFrame({"age": [1.0, 2.0], "city": pd.Categorical(["Oslo", "Rome"])}),
        pd.DataFrame({"age": [1.0, 2.0], "city": pd.to_datetime(["2020-01-01", "2020-01-02"])}),
        pl.DataFrame({"age": [1.0, 2.0], "city": ["Oslo", "Rome"]}),
    ],
    ids=["text", "object", "categorical", "dates", "polars"],
)
def test_columns_that_are_not_numbers_are_named(frame):
    with pytest.raises(DataError, match=r"X column 'city' .*Encode"):
        _checks.as_inputs(frame, PLAIN)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (None, "X is a single NoneType"),
        (3.0, "X is a single float"),
        ("data.csv", "X is a single str"),
        (np.array([1.0, 2.0]), r"X is 1-D, shape \(2,\).*one column.*X\.reshape\(-1, 1\)"),
        (pd.Series([1.0, 2.0]), r"X\.reshape\(-1, 1\)"),
        (np.zeros((0, 3)), r"X is empty, shape \(0, 3\)"),
        (np.zeros((3, 0)), r"X is empty, shape \(3, 0\)"),
        ([], "X is "),
        (pd.DataFrame(index=range(3)), r"X is empty, shape \(3, 0\)"),
        ([[1.0], [1.0, 2.0]], "X is not a rectangular array"),
        ([[1.0, None]], "X holds what is no number at row 0, column 1: None"),
        ([["a", "b"]], "X has dtype <U1, not numbers, such as 'a'. Encode"),
        (np.array(VALUES, object), r"X has dtype object although it holds numbers.*\.astype\(float\)"),
        (np.array(VALUES, "datetime64[s]"), "X has dtype datetime64"),
        (np.ones((2, 2), complex), "X is complex"),
        (np.ma.masked_array(VALUES, mask=False), r"X is a masked array.*X\.filled"),
        (scipy.sparse.csr_matrix(VALUES), r"X is a sparse matrix.*X\.toarray\(\)"),
        (pl.LazyFrame({"a": [1]}), "X is a single LazyFrame"),
    ],
)
def test_inputs_that_are_no_table_of_numbers_raise(X, message):
    with pytest.raises(DataError, match=message):
        _checks.as_inputs(X, PLAIN)


def test_another_row_shape_than_fit_saw_raises():
    with pytest.raises(DataError, match="X has 3 columns but fit saw 8"):
        _checks.as_inputs(np.ones((4, 3)), PLAIN, expected_shape=(8,))
    with pytest.raises(DataError, match=r"each row of X has shape \(7, 8, 1\) but fit saw \(8, 8, 1\)"):
        _checks.as_inputs(np.ones((4, 7, 8, 1)), PLAIN, expected_shape=(8, 8, 1))
    with pytest.raises(DataError, match=r"one example, pass X\.reshape\(1, -1\)"):
        _checks.as_inputs(np.ones(8), PLAIN, expected_shape=(8,))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_need_their_spatial_axes_and_may_leave_out_one_channel(dims):
    spec = InputSpec(spatial_dims=dims)
    X = np.random.default_rng(0).normal(size=(2,) + (4,) * dims + (1,))
    for given in (X, X[..., 0]):
        for expected in (None, X.shape[1:], X.shape[1:-1]):
            np.testing.assert_array_equal(_checks.as_inputs(given, spec, expected_shape=expected), X)
    for wrong in (X[..., None], X[..., 0, 0]):
        with pytest.raises(DataError, match=rf"X .*{dims}-D convolutional network needs \(n, |1-D"):
            _checks.as_inputs(wrong, spec)


def test_the_argument_is_called_by_its_name():
    with pytest.raises(DataError, match=r"^X_new has 1 non-finite"):
        _checks.as_inputs([[np.nan]], PLAIN, name="X_new")


# Tokens


@pytest.mark.parametrize("ids", [[[0, 9]], np.array([[0, 9]], np.uint64), pd.DataFrame([[0, 9]]), jnp.array([[0, 9]])])
def test_token_ids_become_int32(ids):
    array = _checks.as_inputs(ids, TOKENS)
    assert array.dtype == np.int32 and array.flags.c_contiguous
    np.testing.assert_array_equal(array, [[0, 9]])


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([[0.5, 1.0]], "embeds integer tokens, but X has dtype float64. Turn tokens into integer ids"),
        ([[0.0, np.nan]], "X has dtype float64. Turn tokens"),
        ([[0.0, 1.0]], r"embeds integer tokens, but X has dtype float64.*X\.astype\(int\)"),
        ([[True, False]], r"X has dtype bool.*X\.astype\(int\)"),
        ([[0, 10], [0, 11]], r"X has 2 token ids outside 0\.\.9, the first at row 0, column 1 \(10\)"),
        ([[0, 1], [-1, 0]], r"X has 1 token id outside 0\.\.9, the first at row 1, column 0 \(-1\)"),
        ([[0] * 5], r"sequences of length 5, but this network takes at most 4.*X\[:, :4\]"),
        ([[[0]]], r"token sequences need shape \(n, length\)"),
        (np.array([[2**63]], np.uint64), "outside 0..9"),
    ],
)
def test_what_is_no_token_sequence_raises(X, message):
    with pytest.raises(DataError, match=message):
        _checks.as_inputs(X, TOKENS)


def test_without_a_known_vocabulary_ids_must_fit_int32():
    spec = InputSpec(tokens=True)
    assert _checks.as_inputs([[2**31 - 1]], spec)[0, 0] == 2**31 - 1
    with pytest.raises(DataError, match="outside"):
        _checks.as_inputs([[2**31]], spec)


def test_sequence_length_may_differ_only_below_a_known_longest():
    assert _checks.as_inputs([[1, 2]], TOKENS, expected_shape=(4,)).shape == (1, 2)
    with pytest.raises(DataError, match="X has 2 columns but fit saw 4"):
        _checks.as_inputs([[1, 2]], InputSpec(tokens=True), expected_shape=(4,))


# Targets


@pytest.mark.parametrize(
    "y",
    [[1, 2, 3], np.arange(1, 4, dtype=np.uint8), jnp.arange(1, 4), pd.Series([1, 2, 3]), pl.Series([1.0, 2.0, 3.0])],
)
def test_targets_of_every_kind_become_float64(y):
    array = _checks.as_targets(y, 3)
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, [1, 2, 3])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2)])
def test_targets_keep_their_shape(shape):
    assert _checks.as_targets(np.ones(shape), 3).shape == shape


def test_a_frame_of_targets_is_two_dimensional():
    assert _checks.as_targets(pd.DataFrame({"strength": [1.0, 2.0]}), 2).shape == (2, 1)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.ones(4), "y has 4 rows but X has 3. Each row of X needs one target"),
        (np.ones(2), "y has 2 rows but X has 3"),
        (np.ones((1, 3)), r"y has shape \(1, 3\), one row, but X has 3 rows. Pass y\.ravel\(\)"),
        (np.ones((3, 1, 1)), r"y has shape \(3, 1, 1\).*y\.reshape\(len\(y\), -1\)"),
        (np.ones((3, 0)), "y is empty"),
        (5.0, "y is a single float"),
        ([1.0, np.nan, np.inf], r"y has 2 non-finite values, the first at row 1 \(nan\)"),
        (["a", "b", "c"], "y has dtype <U1, not numbers"),
        (pd.Series(["a", "b", "c"]), "y holds what is no number at row 0: 'a'"),
        ([1j, 2, 3], "y is complex"),
    ],
)
def test_targets_that_do_not_fit_raise(y, message):
    with pytest.raises(DataError, match=message):
        _checks.as_targets(y, 3)


def test_training_takes_two_rows():
    with pytest.raises(DataError, match="at least 2 rows"):
        _checks.as_targets([1.0], 1)
    with pytest.raises(DataError, match="at least 2 rows"):
        _checks.as_class_labels([1], 1, 2)
    assert _checks.as_targets([1.0], 1, training=False).shape == (1,)
    assert _checks.as_class_labels([1], 1, 2, training=False).shape == (1,)


# Class labels


@pytest.mark.parametrize(
    "y", [[0, 1, 1], [0.0, 1.0, 1.0], [False, True, True], [[0], [1], [1]], pl.Series([0, 1, 1]), pd.Series([0, 1, 1])]
)
def test_class_labels_become_int32(y):
    labels = _checks.as_class_labels(y, 3, 2)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [0, 1, 1])


@pytest.mark.parametrize(
    ("y", "num_classes", "message"),
    [
        ([1, 2, 1], 2, r"1 label out of range, the first at row 1 \(2\).*holds 1, 2\..*0\.\.1.*np\.unique"),
        ([-1, 1, 1], 2, r"1 label out of range, the first at row 0 \(-1\).*np\.unique"),
        ([0, 1, 2], 2, "3 classes need num_classes=3"),
        ([0.5, 1, 1], 2, r"1 fractional label, the first at row 0 \(0\.5\).*0\.\.1.*regression"),
        ([0, 1, np.nan], 2, "1 non-finite value"),
        (["a", "b", "b"], 2, r"no.? number.*0\.\.1.*np\.unique"),
        (pd.Series(["a", "b", "b"]), 2, r"no.? number.*0\.\.1.*np\.unique"),
        ([1, 1, 1], 2, "all 3 labels in y are 1: one class alone"),
        ([True, True, True], 2, "all 3 labels in y are 1"),
        (np.eye(3), 3, r"shape \(3, 3\).*y\.argmax\(axis=-1\)"),
        ([[0, 1, 1]], 2, r"Pass y\.ravel\(\)"),
        ([0, 1], 2, "y has 2 rows but X has 3"),
    ],
)
def test_labels_that_are_no_classes_raise(y, num_classes, message):
    with pytest.raises(DataError, match=message):
        _checks.as_class_labels(y, 3, num_classes)


def test_one_class_is_enough_to_evaluate():
    np.testing.assert_array_equal(_checks.as_class_labels([1, 1], 2, 2, training=False), [1, 1])


# Values


def test_float32_never_overflows_in_silence():
    assert _checks.as_float32(np.array([3e38]), "X").dtype == np.float32
    with pytest.raises(DataError, match="X has 2 values too large for single precision"):
        _checks.as_float32(np.array([1e39, 0, -1e39]), "X")


# Options


@pytest.mark.parametrize("value", [5, np.int32(5), np.array(5)])
def test_whole_numbers_are_integers(value):
    number = _checks.check_positive_int("num_samples", value)
    assert number == 5 and type(number) is int


@pytest.mark.parametrize(
    ("value", "nearest"),
    [(0, "1"), (-3, "1"), (2.6, "3"), (10.0, "10"), (np.nan, None), (True, None), (np.True_, None), ("5", None)],
)
def test_what_is_no_positive_int_raises(value, nearest):
    end = f" (nearest: {nearest})." if nearest else "."
    with pytest.raises(OptionError, match=re.escape(f"must be an integer of at least 1{end}") + "$"):
        _checks.check_positive_int("num_samples", value)


@pytest.mark.parametrize("value", [None, [5], [[1], [1, 2]], np.array([5])])
def test_what_is_no_number_is_no_positive_int(value):
    with pytest.raises(OptionError, match=r"num_samples=.* must be an integer"):
        _checks.check_positive_int("num_samples", value)


def test_the_least_integer_can_be_chosen():
    assert _checks.check_positive_int("num_warmup", 0, minimum=0) == 0
    with pytest.raises(OptionError, match=r"num_classes=1 must be an integer of at least 2 \(nearest: 2\)"):
        _checks.check_positive_int("num_classes", 1, minimum=2)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, True, "1", None, [1.0], np.array([1.0]), 1j])
def test_what_is_not_positive_raises(value):
    with pytest.raises(OptionError, match=r"sigma=.* must be a finite number above 0"):
        _checks.check_positive("sigma", value)


@pytest.mark.parametrize("value", [1e-30, 2, np.float32(2), jnp.float32(2)])
def test_positive_numbers_become_floats(value):
    assert type(_checks.check_positive("sigma", value)) is float


def test_zero_is_positive_only_where_allowed():
    assert _checks.check_positive("decay", 0, allow_zero=True) == 0.0
    with pytest.raises(OptionError, match="of at least 0"):
        _checks.check_positive("decay", -1, allow_zero=True)


def test_fractions_lie_between_their_ends():
    assert _checks.check_fraction("test_fraction", 0.2) == 0.2
    assert _checks.check_fraction("dropout_rate", 0, allow_zero=True) == 0.0
    assert _checks.check_fraction("level", 1, allow_one=True) == 1.0
    for value in (0, 1, 1.5, -0.1, np.nan, True, "0.2", 20):
        with pytest.raises(OptionError, match=r"test_fraction=.* above 0 and below 1"):
            _checks.check_fraction("test_fraction", value)


def test_choices_name_the_nearest():
    assert _checks.check_one_of("method", "variance", ["variance", "gradient"]) == "variance"
    with pytest.raises(OptionError, match=r"method='variense' .*closest: 'variance'.*variance, gradient"):
        _checks.check_one_of("method", "variense", ["variance", "gradient"])
    for value in (None, 1, ["variance"], np.zeros(2)):
        with pytest.raises(OptionError, match="Choose one of: variance, gradient"):
            _checks.check_one_of("method", value, ["variance", "gradient"])


# Keys


@pytest.mark.parametrize(
    ("rng_key", "seed", "number"),
    [
        (None, None, 0),
        (None, 7, 7),
        (None, np.int64(7), 7),
        (7, None, 7),
        (jnp.uint32(7), None, 7),
        (jax.random.PRNGKey(7), None, 7),
        (np.array([0, 7], np.uint32), None, 7),
        (jax.random.key(7), None, 7),
        (None, 2**32 - 1, 2**32 - 1),
    ],
)
def test_every_form_of_key_gives_the_same_key(rng_key, seed, number):
    key = _checks.as_key(rng_key, seed)
    assert key.dtype == jax.random.key(0).dtype and key.shape == ()
    np.testing.assert_array_equal(jax.random.key_data(key), [0, number])


@pytest.mark.parametrize(
    ("rng_key", "seed", "message"),
    [
        (jax.random.key(0), 0, "both rng_key and seed"),
        (0, 0, "both rng_key and seed"),
        (jax.random.split(jax.random.key(0)), None, r"shape \(2,\)"),
        (jax.random.split(jax.random.PRNGKey(0)), None, r"shape \(2, 2\)"),
        (np.array([1.0, 2.0]), None, "dtype float64"),
        (None, 2**32, "seed=4294967296 must be below"),
        (None, -1, "seed=-1"),
        (None, 1.5, "seed=1.5"),
        (None, True, "seed=True"),
        ("0", None, "rng_key='0'"),
    ],
)
def test_what_is_no_key_raises(rng_key, seed, message):
    with pytest.raises(OptionError, match=message):
        _checks.as_key(rng_key, seed)


# Weights


def test_table_libraries_are_never_imported():
    code = "import sys, neurobayes._checks, neurobayes.data; print(*{'pandas', 'polars'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
