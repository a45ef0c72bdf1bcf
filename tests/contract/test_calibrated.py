"""What calibration promises of a fitted model: corrected predictions, and a model that stays as it is."""

import pickle

import numpy as np
import pytest

import neurobayes as nb
from neurobayes import metrics
from neurobayes.calibration import METHODS
from neurobayes.errors import CalibrationWarning, DataError, NotFittedError, OptionError
from neurobayes.models.calibrated import CalibratedModel, calibrate

pytestmark = pytest.mark.filterwarnings("ignore:.*Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

NUMBERS = [name for name in METHODS if name != "temperature"]


def rows(n, seed):
    """As the regression data of the other contract tests, with ten times their noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    return X, X[:, 0] - 0.5 * X[:, 1] ** 2 + 1.0 * rng.normal(size=n)


X_CAL, Y_CAL = rows(150, 10)
X_TEST, Y_TEST = rows(400, 11)


@pytest.fixture(scope="module")
def fitted(mlp, regression, short):
    """Over-confident on the rows above: its noise is that of other data."""
    return nb.PartialBNN(mlp, num_probabilistic_layers=1, num_backbones=1).fit(
        *regression, **{**short, "engine": "auto"}
    )


@pytest.fixture(scope="module")
def two_output_fit(two_outputs, quick):
    return nb.PartialBNN(nb.FlaxMLP([6, 4], 2), num_probabilistic_layers=1, num_backbones=1).fit(*two_outputs, **quick)


@pytest.fixture(scope="module")
def classifier(three_classes, quick):
    return nb.PartialBNN(nb.FlaxMLP([6], 3), num_classes=3, num_backbones=1).fit(*three_classes, **quick)


@pytest.fixture(scope="module")
def calibrated(fitted):
    return {name: calibrate(fitted, X_CAL, Y_CAL, name) for name in NUMBERS}


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("method", NUMBERS)
def test_intervals_cover_new_rows_as_they_promise(fitted, calibrated, method, level):
    before = metrics.coverage(Y_TEST, *fitted.predict(X_TEST), level)
    after = metrics.interval_coverage(Y_TEST, *calibrated[method].predict_interval(X_TEST, level))
    assert before < level - 0.2
    # Three standard errors: 150 calibration rows place the bounds, 400 rows judge them.
    assert after == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) * (1 / 150 + 1 / 400)))


@pytest.mark.parametrize("method", ["variance", "isotonic"])
def test_a_corrected_distribution_is_likelier(fitted, calibrated, method):
    own, corrected = (metrics.nlpd(Y_TEST, *model.predict(X_TEST)) for model in (fitted, calibrated[method]))
    assert corrected < own - 1


@pytest.mark.parametrize("method", NUMBERS)
def test_calibration_leaves_the_model_alone(fitted, method):
    before = fitted.posterior_predictive(X_TEST, quantiles=[0.1], num_draws=3)
    attributes = dict(vars(fitted))
    made = calibrate(fitted, X_CAL, Y_CAL, method)
    made.predict(X_TEST), made.predict_interval(X_TEST)
    after = fitted.posterior_predictive(X_TEST, quantiles=[0.1], num_draws=3)
    for name in ("mean", "epistemic_var", "aleatoric_var", "draws"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    np.testing.assert_array_equal(after.quantiles[0.1], before.quantiles[0.1])
    assert vars(fitted).keys() == attributes.keys() and all(vars(fitted)[k] is attributes[k] for k in attributes)


def test_rows_of_the_fit_are_noticed(fitted, regression, classifier, three_classes):
    X, y = regression
    with pytest.warns(CalibrationWarning, match=f"{len(X)} of the {len(X)} rows of X_cal and y_cal were used in fit"):
        fitted.calibrate(X, y)
    with pytest.warns(CalibrationWarning, match="were used in fit"):
        classifier.calibrate(*three_classes)
    # Negative control: other rows, and a few rows of the fit among them, are taken without a word.
    fitted.calibrate(np.concatenate([X_CAL, X[:20]]), np.concatenate([Y_CAL, y[:20]]))
    fitted.calibrate(X, y + 1.0)


def test_calibration_leaves_a_classifier_alone(classifier, three_classes):
    X, y = three_classes
    before = classifier.predict(X)
    calibrate(classifier, X, y).predict(X)
    for now, then in zip(classifier.predict(X), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_refit_does_not_reach_what_was_calibrated(mlp, regression, quick):
    X, y = regression
    model = nb.PartialBNN(mlp, num_backbones=1).fit(X, y, **quick)
    made = calibrate(model, X_CAL, Y_CAL)
    before = made.predict(X)
    model.fit(X, 100 - 3 * y, **quick)
    np.testing.assert_array_equal(made.predict(X), before)


def test_scaled_variance_is_one_factor_on_all_of_the_distribution(fitted, calibrated):
    made = calibrated["variance"]
    factor = made.calibration.factor[0]
    mean, var = fitted.predict(X_CAL)
    assert factor == pytest.approx(np.mean((Y_CAL - mean) ** 2 / var)) and factor > 2
    options = {"quantiles": [0.1, 0.8], "num_draws": 4, "seed": 1}
    own, corrected = (model.posterior_predictive(X_TEST, **options) for model in (fitted, made))
    np.testing.assert_array_equal(corrected.mean, own.mean)
    np.testing.assert_allclose(corrected.epistemic_var, factor * own.epistemic_var)
    np.testing.assert_allclose(corrected.aleatoric_var, factor * own.aleatoric_var)
    np.testing.assert_allclose(corrected.draws - own.mean, np.sqrt(factor) * (own.draws - own.mean))
    for level in (0.1, 0.8):
        stretched = own.mean + np.sqrt(factor) * (own.quantiles[level] - own.mean)
        np.testing.assert_allclose(corrected.quantiles[level], stretched)


@pytest.mark.parametrize("method", ["variance", "isotonic"])
def test_a_single_quantile_may_be_asked_for(fitted, calibrated, method):
    for model in (fitted, calibrated[method]):
        one, listed = (model.posterior_predictive(X_TEST, quantiles=levels).quantiles for levels in (0.3, [0.3]))
        np.testing.assert_array_equal(one[0.3], listed[0.3])


def test_the_warning_of_few_rows_points_at_the_caller(fitted):
    with pytest.warns(CalibrationWarning) as warned:
        fitted.calibrate(X_CAL[:5], Y_CAL[:5])
    assert [each.filename for each in warned] == [__file__]


@pytest.mark.parametrize("method", ["variance", "isotonic"])
def test_an_interval_lies_between_two_quantiles(calibrated, method):
    low, high = calibrated[method].predict_interval(X_TEST[:20], 0.8)
    quantiles = calibrated[method].posterior_predictive(X_TEST[:20], quantiles=[0.1, 0.9]).quantiles
    np.testing.assert_allclose([low, high], [quantiles[0.1], quantiles[0.9]], rtol=1e-6)


def test_isotonic_puts_quantiles_where_new_rows_are(calibrated):
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    found = calibrated["isotonic"].posterior_predictive(X_TEST, quantiles=levels).quantiles
    below = [np.mean(found[level] >= Y_TEST) for level in levels]
    np.testing.assert_allclose(below, levels, atol=0.13)  # three standard errors


def test_conformal_changes_intervals_only(fitted, calibrated):
    made = calibrated["conformal"]
    mean, var = fitted.predict(X_TEST)
    np.testing.assert_array_equal(made.predict(X_TEST), (mean, var))
    low, high = made.predict_interval(X_TEST, 0.9)
    np.testing.assert_allclose((high - low) / 2, made.calibration.multiplier(0.9) * np.sqrt(var))
    np.testing.assert_allclose((high + low) / 2, mean)
    with pytest.raises(OptionError, match="predict_interval"):
        made.posterior_predictive(X_TEST, quantiles=[0.5])


@pytest.mark.parametrize("method", NUMBERS)
def test_two_outputs_are_corrected_each_by_itself(two_output_fit, two_outputs, method):
    X, y = two_outputs
    spread = y + np.random.default_rng(0).normal(size=y.shape) * [5, 0.1]
    low, high = calibrate(two_output_fit, X, spread, method).predict_interval(X, 0.9)
    own_low, own_high = metrics.gaussian_interval(*two_output_fit.predict(X), 0.9)
    assert low.shape == high.shape == (60, 2)
    np.testing.assert_allclose(np.mean((low <= spread) & (spread <= high), axis=0), 0.9, atol=0.06)
    wider = np.mean(high - low, axis=0) / np.mean(own_high - own_low, axis=0)
    assert wider[0] > 3 * wider[1]


def test_a_temperature_corrects_probabilities_and_keeps_classes(classifier, three_classes):
    X, y = three_classes
    shuffled = np.random.default_rng(0).permutation(y)  # nothing can be known of these
    made = calibrate(classifier, X, shuffled)
    probabilities, entropy = made.predict(X)
    prediction, own = made.posterior_predictive(X), classifier.posterior_predictive(X)
    assert made.calibration.temperature > 1.2
    np.testing.assert_allclose(probabilities, made.calibration.probabilities(own.probabilities))
    np.testing.assert_allclose(entropy, -np.sum(probabilities * np.log(probabilities), axis=1))
    np.testing.assert_array_equal(made.predict_classes(X), classifier.predict_classes(X))
    assert metrics.nll(shuffled, probabilities) < metrics.nll(shuffled, own.probabilities)
    np.testing.assert_allclose(prediction.expected_entropy + prediction.mutual_information, prediction.total_entropy)
    shares = [p.expected_entropy / p.total_entropy for p in (prediction, own)]
    np.testing.assert_allclose(*shares, rtol=1e-6)


def test_defaults_are_variance_and_temperature(fitted, classifier, three_classes):
    assert fitted.calibrate(X_CAL, Y_CAL).calibration.method == "variance"
    X, y = three_classes
    assert classifier.calibrate(X + 1e-3, y).calibration.method == "temperature"


def test_the_method_of_the_model_is_the_function(fitted, calibrated):
    made = fitted.calibrate(X_CAL, Y_CAL, method="conformal")
    np.testing.assert_array_equal(made.predict_interval(X_TEST), calibrated["conformal"].predict_interval(X_TEST))


@pytest.mark.parametrize("method", NUMBERS)
def test_a_calibrated_model_can_be_pickled_scored_and_told_apart(calibrated, method):
    made = calibrated[method]
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(again.predict_interval(X_TEST[:5]), made.predict_interval(X_TEST[:5]))
    scores = metrics.summary(made, X_TEST, Y_TEST)
    assert scores["coverage"] == metrics.interval_coverage(Y_TEST, *made.predict_interval(X_TEST))
    assert "PartialBNN" in repr(made) and "num_rows=150" in repr(made)


def test_few_rows_warn_and_too_few_for_a_level_are_refused(fitted):
    with pytest.warns(CalibrationWarning, match="has 12 rows"):
        made = calibrate(fitted, X_CAL[:12], Y_CAL[:12], "conformal")
    assert made.predict_interval(X_TEST, 0.9)[0].shape == Y_TEST.shape
    with pytest.raises(OptionError, match="at least 19 calibration rows and there are 12"):
        made.predict_interval(X_TEST, 0.95)


FAULTS = {
    "method": (lambda m, c: calibrate(m, X_CAL, Y_CAL, "platt"), OptionError, "variance, isotonic, conformal"),
    "kind": (lambda m, c: calibrate(m, X_CAL, Y_CAL, "temperature"), OptionError, "is for classes"),
    "kind_of_classes": (lambda m, c: calibrate(c, X_CAL, Y_CAL, "variance"), OptionError, "Use 'temperature'"),
    "rows": (lambda m, c: calibrate(m, X_CAL, Y_CAL[:9]), DataError, "y_cal has 9 rows"),
    "shape": (lambda m, c: calibrate(m, X_CAL, Y_CAL[:, None]), DataError, r"y_cal has shape \(150, 1\)"),
    "columns": (lambda m, c: calibrate(m, X_CAL[:, :2], Y_CAL), DataError, "X has 2 columns but fit saw 3"),
    "labels": (lambda m, c: calibrate(c, np.zeros((3, 4)), [0, 1, 3]), DataError, "out of range"),
    "level": (lambda m, c: calibrate(m, X_CAL, Y_CAL).predict_interval(X_CAL, 95), OptionError, "level=95"),
    "draws": (
        lambda m, c: calibrate(m, X_CAL, Y_CAL, "isotonic").posterior_predictive(X_CAL, num_draws=2), OptionError,
        "does not change draws",
    ),
    "classes": (lambda m, c: calibrate(m, X_CAL, Y_CAL).predict_classes(X_CAL), OptionError, "predicts numbers"),
    "unfitted": (lambda m, c: calibrate(nb.PartialBNN(m.network), X_CAL, Y_CAL), NotFittedError, "not fitted"),
    "wrong_pair": (lambda m, c: CalibratedModel(c, calibrate(m, X_CAL, Y_CAL).calibration), OptionError, "is for num"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_meant_raises(fitted, classifier, fault):
    call, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        call(fitted, classifier)


def test_intervals_of_classes_are_refused(classifier, three_classes):
    with pytest.raises(OptionError, match="is for numbers"):
        calibrate(classifier, *three_classes).predict_interval(three_classes[0])
