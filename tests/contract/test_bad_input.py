"""Faulty data: one clear error that names the argument, before any training; or it is handled right."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

import neurobayes as nb

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

TOKENS = nb.FlaxTransformer(
    vocab_size=9, max_length=6, target_dim=1, d_model=4, num_heads=2, num_layers=1, mlp_dim=6, pad_token=0
)


def spoiled(array, value, at=(3, 1)):
    array = np.array(array, float)
    array[at[: array.ndim]] = value
    return array


REGRESSION_FAULTS = {
    "NaN in X": (lambda X, y: (spoiled(X, np.nan), y), r"^X has 1 non-finite value, .*row 3, column 1"),
    "infinite X": (lambda X, y: (spoiled(X, -np.inf), y), r"^X has 1 non-finite value, .*row 3, column 1 \(-inf\)"),
    "NaN in y": (lambda X, y: (X, spoiled(y, np.nan)), r"^y has 1 non-finite value, .*row 3"),
    "infinite y": (lambda X, y: (X, spoiled(y, np.inf)), r"^y has 1 non-finite value, .*row 3"),
    "None in y": (lambda X, y: (X, [None, *y[1:]]), r"^y holds what is no number at row 0: None"),
    "y longer than X": (lambda X, y: (X, np.r_[y, y[:1]]), r"^y has 61 rows but X has 60"),
    "y shorter than X": (lambda X, y: (X, y[:-1]), r"^y has 59 rows but X has 60"),
    "y as one row": (lambda X, y: (X, y[None]), r"^y has shape \(1, 60\).*ravel"),
    "y with three axes": (lambda X, y: (X, y[:, None, None]), r"^y has shape"),
    "y a number": (lambda X, y: (X, 3.0), r"^y is a single float"),
    "y of text": (lambda X, y: (X, y.astype(str)), r"^y has dtype"),
    "X of one axis": (lambda X, y: (X[:, 0], y), r"^X is 1-D.*reshape"),
    "X of text": (lambda X, y: (X.astype(str), y), r"^X has dtype"),
    "X ragged": (lambda X, y: ([[1.0], [1.0, 2.0]], y[:2]), r"^X is not a rectangular array"),
    "X complex": (lambda X, y: (X + 1j, y), r"^X is complex"),
    "no rows": (lambda X, y: (X[:0], y[:0]), r"^X is empty"),
    "no columns": (lambda X, y: (X[:, :0], y), r"^X is empty"),
    "one row": (lambda X, y: (X[:1], y[:1]), r"at least 2 rows, but X and y have 1"),
    "too many targets": (lambda X, y: (X, np.c_[y, y]), r"1 outputs but y has 2 columns.*target_dim=2"),
    "text in a frame": (
        lambda X, y: (pd.DataFrame({"a": X[:, 0], "b": ["x"] * 60}), y), r"^X column 'b' .*(no number|not numbers)"
    ),
    "NaN in a frame": (
        lambda X, y: (pl.DataFrame(spoiled(X, np.nan), schema=list("abc")), y), r"^X has 1 .*column 1 \('b'\)"
    ),
}  # fmt: skip

CLASS_FAULTS = {
    "labels from 1": (lambda X, y: (X, y + 1), r"^y has 20 label\(?s?\)? out of range.*0\.\.2.*np\.unique"),
    "negative labels": (lambda X, y: (X, y - 1), r"^y has 20 labels out of range"),
    "fractions": (lambda X, y: (X, y + 0.5), r"^y has 60 fractional labels"),
    "text": (lambda X, y: (X, np.array(["cat", "dog", "eel"])[y]), r"^y has dtype .*np\.unique"),
    "one-hot": (lambda X, y: (X, np.eye(3)[y]), r"^y has shape \(60, 3\).*argmax"),
    "one class only": (lambda X, y: (X, np.zeros(60, int)), r"all 60 labels in y are 0"),
    "NaN": (lambda X, y: (X, spoiled(y, np.nan)), r"^y has 1 non-finite value"),
    "too few labels": (lambda X, y: (X, y[:-1]), r"^y has 59 rows but X has 60"),
}

PREDICTION_FAULTS = {
    "too few columns": (lambda X: X[:, :2], r"^X has 2 columns but fit saw 3"),
    "too many columns": (lambda X: np.c_[X, X], r"^X has 6 columns but fit saw 3"),
    "one row without its axis": (lambda X: X[0], r"^X is 1-D.*reshape\(1, -1\)"),
    "NaN": (lambda X: spoiled(X, np.nan), r"^X has 1 non-finite value"),
    "infinity": (lambda X: spoiled(X, np.inf), r"^X has 1 non-finite value"),
    "empty": (lambda X: X[:0], r"^X is empty"),
    "beyond single precision": (lambda X: spoiled(X, 1e300), r"^X has 1 value too large"),
}


@pytest.fixture(scope="module")
def partial(mlp, regression, quick):
    return nb.PartialBNN(mlp, num_backbones=1).fit(*regression, **quick)


@pytest.fixture(scope="module")
def deterministic(mlp, regression):
    return nb.DeterministicNN(mlp, input_shape=(3,)).train(
        *regression, epochs=3, track_statistics=False, progress_bar=False
    )


@pytest.fixture(scope="module")
def classifiers(three_classes, quick):
    network = nb.FlaxMLP([6], 3)
    return (
        nb.PartialBNN(network, num_classes=3, num_backbones=1).fit(*three_classes, **quick),
        nb.DeterministicNN(network, (4,), loss="cross_entropy").train(
            *three_classes, epochs=3, track_statistics=False, progress_bar=False
        ),
    )


@pytest.fixture
def no_training(monkeypatch):
    """Any deterministic training fails the test: the fault must be found before."""

    def train(*args, **kwargs):
        pytest.fail("training has started")

    monkeypatch.setattr("neurobayes.training.train", train)
    monkeypatch.setattr("neurobayes.regularisation.choose", train)


@pytest.mark.parametrize("fault", REGRESSION_FAULTS)
def test_faulty_regression_data(partial, deterministic, regression, quick, no_training, fault):
    """Trap: y longer or shorter than X, (1,n), NaN accepted."""
    spoil, message = REGRESSION_FAULTS[fault]
    X, y = spoil(*regression)
    check_refused(partial, deterministic, X, y, regression[0], quick, message)


@pytest.mark.parametrize("fault", CLASS_FAULTS)
def test_faulty_class_labels(classifiers, three_classes, quick, no_training, fault):
    """Trap: labels {1,2} fail obscurely."""
    spoil, message = CLASS_FAULTS[fault]
    X, y = spoil(*three_classes)
    check_refused(*classifiers, X, y, three_classes[0], quick, message)


def check_refused(partial, deterministic, X, y, good, quick, message):
    """Both models refuse the data with the same message, and predict afterwards as before."""
    before = partial.predict(good), deterministic.predict(good)
    with pytest.raises(nb.errors.DataError, match=message):
        partial.fit(X, y, **quick)
    with pytest.raises(nb.errors.DataError, match=message):
        deterministic.train(X, y, epochs=3)
    np.testing.assert_array_equal(partial.predict(good)[0], before[0][0])
    np.testing.assert_array_equal(partial.predict(good)[1], before[0][1])
    np.testing.assert_array_equal(deterministic.predict(good), before[1])


@pytest.mark.parametrize("fault", PREDICTION_FAULTS)
def test_faulty_inputs_at_prediction(partial, deterministic, regression, fault):
    spoil, message = PREDICTION_FAULTS[fault]
    X = spoil(regression[0])
    for predict in (partial.predict, partial.posterior_predictive, partial.sample_from_posterior,
                    partial.deterministic_predict, deterministic.predict):  # fmt: skip
        with pytest.raises(nb.errors.DataError, match=message):
            predict(X)


def test_faulty_validation_data(mlp, regression, no_training):
    X, y = regression
    model = nb.DeterministicNN(mlp, input_shape=(3,))
    for validation, message in (
        ((spoiled(X, np.nan), y), "^X_val has 1 non-finite"), ((X, y[:-1]), "^y_val has 59 rows"),
        ((X[:, :2], y), "^X_val has 2 columns"), (X, "validation_data must be the pair"),
        ((X, np.c_[y, y]), "y_val"),
    ):  # fmt: skip
        with pytest.raises(nb.errors.DataError, match=message):
            model.train(X, y, epochs=2, validation_data=validation)


def test_data_that_do_not_fit_the_stated_input_shape(mlp, regression, no_training):
    X, y = regression
    with pytest.raises(nb.errors.DataError, match=r"X.*\(3,\).*input_shape=\(4,\)"):
        nb.DeterministicNN(mlp, input_shape=(4,)).train(X, y, epochs=2)


TOKEN_FAULTS = {
    "fractions": (np.full((20, 5), 0.5), r"integer tokens, but X has dtype float64"),
    "whole floats": (np.ones((20, 5)), r"integer tokens, but X has dtype float64.*astype\(int\)"),
    "beyond the vocabulary": (np.full((20, 5), 9), r"^X has 100 token ids outside 0\.\.8"),
    "negative": (np.full((20, 5), -1), r"^X has 100 token ids outside 0\.\.8"),
    "too long": (np.ones((20, 7), int), r"^X has sequences of length 7.*at most 6"),
}


@pytest.fixture(scope="module")
def token_models(quick):
    X = np.random.default_rng(0).integers(0, 9, (40, 6))
    y = X.sum(1).astype(float)
    partial = nb.PartialBNN(TOKENS, num_backbones=1).fit(X, y, **quick)
    return partial, nb.DeterministicNN(TOKENS, (6,)).train(X, y, epochs=2, track_statistics=False, progress_bar=False)


@pytest.mark.parametrize("fault", TOKEN_FAULTS)
def test_faulty_tokens(token_models, quick, no_training, fault):
    """Traps: an integer-token network fed floats; out-of-vocabulary tokens give NaN."""
    X, message = TOKEN_FAULTS[fault]
    y = np.arange(20.0)
    partial, deterministic = token_models
    for call in (lambda: partial.fit(X, y, **quick), lambda: deterministic.train(X, y, epochs=1),
                 lambda: partial.predict(X), lambda: deterministic.predict(X)):  # fmt: skip
        with pytest.raises(nb.errors.DataError, match=message):
            call()


def test_images_of_another_rank(quick, no_training):
    network = nb.FlaxConvNet(input_dim=2, conv_layers=[2], fc_layers=[], target_dim=1)
    with pytest.raises(nb.errors.DataError, match=r"^X has shape \(20, 4\).*height, width"):
        nb.PartialBNN(network, num_backbones=1).fit(np.ones((20, 4)), np.arange(20.0), **quick)


# Odd data that are right as they are


def check_sane(partial, deterministic, X, y, quick):
    mean, variance = partial.fit(X, y, **quick).predict(X)
    assert mean.shape == np.shape(y)
    assert np.all(np.isfinite(mean)) and np.all(np.isfinite(variance)) and np.all(variance >= 0)
    assert np.all(
        np.isfinite(deterministic.train(X, y, epochs=5, track_statistics=False, progress_bar=False).predict(X))
    )
    return mean


@pytest.fixture
def fresh(mlp):
    return nb.PartialBNN(mlp, num_backbones=1), nb.DeterministicNN(mlp, input_shape=(3,))


def test_constant_columns(fresh, regression, quick):
    X, y = regression
    X = np.c_[X[:, 0], np.full(60, 7.5), np.zeros(60)]
    check_sane(*fresh, X, y, quick)
    # Other values of a column that was constant in training are no reason to fail.
    assert np.all(np.isfinite(fresh[0].predict(X + 1.0)[0]))


def test_constant_target(fresh, regression, short):
    X, _ = regression
    mean = check_sane(*fresh, X, np.full(60, 42.0), short)
    np.testing.assert_allclose(mean, 42.0, atol=1.0)


def test_two_rows(fresh, regression, quick):
    X, y = regression
    check_sane(*fresh, X[:2], y[:2], quick)


def test_extreme_scales(fresh, regression, quick):
    X, y = regression
    check_sane(*fresh, X * np.array([1e-9, 1.0, 1e9]) + np.array([0.0, 1e4, 0.0]), 1e12 * (3.0 + y), quick)


def test_duplicated_rows(fresh, regression, quick):
    X, y = regression
    check_sane(*fresh, np.repeat(X[:3], 20, axis=0), y, quick)


def test_boolean_and_integer_columns(fresh, regression, quick):
    X, y = regression
    check_sane(*fresh, X > 0, y, quick)
    check_sane(*fresh, (10 * X).astype(np.int8), y.astype(np.float16), quick)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.float64, bool])
def test_labels_of_any_whole_dtype(three_classes, quick, dtype):
    X, y = three_classes
    labels = (y > 0).astype(dtype)
    model = nb.PartialBNN(nb.FlaxMLP([6], 2), num_classes=2, num_backbones=1).fit(X, labels, **quick)
    probabilities, _ = model.predict(X)
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    twin = nb.PartialBNN(nb.FlaxMLP([6], 2), num_classes=2, num_backbones=1).fit(X, labels.astype(int), **quick)
    np.testing.assert_array_equal(probabilities, twin.predict(X)[0])


def test_labels_as_column_or_series(three_classes, quick):
    X, y = three_classes
    network = nb.FlaxMLP([6], 3)
    expected = nb.PartialBNN(network, num_classes=3, num_backbones=1).fit(X, y, **quick).predict(X)[0]
    for labels in (y[:, None], pd.Series(y), pl.Series("y", y), y.tolist()):
        found = nb.PartialBNN(network, num_classes=3, num_backbones=1).fit(X, labels, **quick).predict(X)[0]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_warmup": 0}, "num_warmup"), ({"num_samples": 0}, "num_samples"), ({"num_samples": 10.5}, "num_samples"),
     ({"num_chains": 0}, "num_chains"), ({"sgd_epochs": 0}, "sgd_epochs"), ({"sgd_lr": 0.0}, "sgd_lr"),
     ({"sgd_batch_size": -4}, "sgd_batch_size"), ({"map_sigma": "best"}, "map_sigma"), ({"map_sigma": 0}, "map_sigma"),
     ({"engine": "nuts", "chain_method": "vectorised"}, "chain_method.*closest: 'vectorized'"),
     ({"engine": "nutz"}, "engine.*nuts"), ({"swa_config": {"schedule": "cosine"}}, "schedule"),
     ({"seed": 0, "rng_key": 1}, "rng_key"), ({"seed": -1}, "seed"), ({"seed": 1.5}, "seed"),
     ({"select_neurons_config": {"method": "variance"}}, "layer_names"),
     ({"select_neurons_config": "variance"}, "select_neurons_config")],
)  # fmt: skip
def test_bad_options_of_fit_raise_before_training(mlp, regression, quick, no_training, options, message):
    with pytest.raises(nb.errors.OptionError, match=message):
        nb.PartialBNN(mlp, num_backbones=1).fit(*regression, **{**quick, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_classes": 1}, "num_classes"), ({"num_classes": 2.5}, "num_classes"), ({"prior_mean": "mle"}, "prior_mean"),
     ({"standardize": "yes"}, "standardize")],
)  # fmt: skip
def test_bad_options_of_construction(mlp, options, message):
    with pytest.raises(nb.errors.OptionError, match=message):
        nb.PartialBNN(mlp, **options, num_backbones=1)


def test_classes_that_do_not_fit_the_network(three_classes, quick, no_training):
    with pytest.raises(nb.errors.DataError, match=r"5 outputs but num_classes=3.*target_dim=3"):
        nb.PartialBNN(nb.FlaxMLP([6], 5), num_classes=3, num_backbones=1).fit(*three_classes, **quick)


def test_what_is_no_network(regression, quick):
    for thing in (3, "mlp", None):
        with pytest.raises(nb.errors.NeuroBayesError, match=r"(?i)network"):
            nb.PartialBNN(thing, num_backbones=1)


@pytest.mark.parametrize("levels", [[0.0], [1.0], [1.5], ["median"], "0.5", 1.5])
def test_bad_quantile_levels(partial, regression, levels):
    with pytest.raises(nb.errors.OptionError, match="quantiles"):
        partial.posterior_predictive(regression[0], quantiles=levels)


@pytest.mark.parametrize("num_draws", [0, -1, 2.5])
def test_bad_numbers_of_draws(partial, regression, num_draws):
    with pytest.raises(nb.errors.OptionError, match="num_draws"):
        partial.sample_from_posterior(regression[0], num_draws)
    if num_draws:
        with pytest.raises(nb.errors.OptionError, match="num_draws"):
            partial.posterior_predictive(regression[0], num_draws=num_draws)
