"""Each metric against scikit-learn, scipy, an integral or a case worked by hand; and what each refuses."""

import json
import pickle

import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn.metrics as skm
from scipy import integrate, stats

from neurobayes import metrics
from neurobayes.errors import DataError, OptionError


@pytest.fixture(params=[(40,), (20, 3)], ids=["vector", "two_outputs"])
def regression(request):
    rng = np.random.default_rng(0)
    y_true, mean = rng.normal(size=(2, *request.param))
    return y_true, mean, rng.uniform(0.2, 3.0, size=request.param)


@pytest.fixture
def classification():
    rng = np.random.default_rng(0)
    return rng.integers(0, 4, size=200), rng.dirichlet(np.full(4, 0.5), size=200)


def test_point_errors_match_sklearn(regression):
    y_true, y_pred, _ = regression
    assert metrics.mse(y_true, y_pred) == pytest.approx(skm.mean_squared_error(y_true, y_pred))
    assert metrics.mae(y_true, y_pred) == pytest.approx(skm.mean_absolute_error(y_true, y_pred))
    assert metrics.rmse(y_true, y_pred) == pytest.approx(skm.mean_squared_error(y_true, y_pred) ** 0.5)
    assert metrics.r2(y_true, y_pred) == pytest.approx(skm.r2_score(y_true, y_pred))


@pytest.mark.parametrize("y_true", [[5.0], [0.1, 0.1, 0.1], [[1.0, 0.3], [2.0, 0.3]]])
def test_r2_of_a_constant_target_raises(y_true):
    with pytest.raises(DataError, match="constant"):
        metrics.r2(y_true, np.zeros(np.shape(y_true)))


def test_nlpd_matches_scipy(regression):
    y_true, mean, var = regression
    expected = -stats.norm.logpdf(y_true, mean, np.sqrt(var)).mean()
    assert metrics.nlpd(y_true, mean, var) == pytest.approx(expected)


def crps_integral(y, mean, std):
    below = integrate.quad(lambda x: stats.norm.cdf(x, mean, std) ** 2, mean - 12 * std - abs(y - mean), y)[0]
    above = integrate.quad(lambda x: stats.norm.sf(x, mean, std) ** 2, y, mean + 12 * std + abs(y - mean))[0]
    return below + above


@pytest.mark.parametrize(
    ("y", "mean", "std"), [(0.0, 0.0, 1.0), (1.3, 0.2, 0.5), (-4.0, 1.0, 2.0), (905.0, 900.0, 3.0)]
)
def test_crps_is_the_integral_of_its_definition(y, mean, std):
    assert metrics.crps([y], [mean], [std**2]) == pytest.approx(crps_integral(y, mean, std), rel=1e-6)


def test_crps_tends_to_the_absolute_error(regression):
    y_true, mean, var = regression
    assert metrics.crps(y_true, mean, 1e-20 * var) == pytest.approx(metrics.mae(y_true, mean))


def test_crps_from_draws_equals_all_pairwise_differences(regression):
    y_true, mean, _ = regression
    draws = mean + np.random.default_rng(1).gamma(2.0, size=(7, *mean.shape))
    pairs = np.abs(draws[:, None] - draws[None]).mean(axis=(0, 1))
    expected = np.mean(np.abs(draws - y_true).mean(axis=0) - pairs / 2)
    assert metrics.crps_from_draws(y_true, draws) == pytest.approx(expected)
    assert metrics.crps_from_draws(y_true, mean[None]) == pytest.approx(metrics.mae(y_true, mean))


def test_crps_from_draws_at_gaussian_quantiles_matches_the_closed_form(regression):
    y_true, mean, var = regression
    num_draws = 2000
    z = stats.norm.ppf((np.arange(num_draws) + 0.5) / num_draws).reshape(-1, *[1] * mean.ndim)
    approximate = metrics.crps_from_draws(y_true, mean + z * np.sqrt(var))
    assert approximate == pytest.approx(metrics.crps(y_true, mean, var), rel=1e-3)


def test_crps_from_draws_does_not_lose_digits_far_from_zero():
    y_true, draws = np.array([0.25]), np.array([[0.0], [0.5], [1.0]])
    far = metrics.crps_from_draws(y_true + 2.0**40, draws + 2.0**40)
    assert far == pytest.approx(metrics.crps_from_draws(y_true, draws), rel=1e-12)


def test_crps_from_draws_leaves_the_draws_as_they_were():
    draws = np.array([[3.0], [1.0], [2.0]])
    metrics.crps_from_draws([0.0], draws)
    assert draws.ravel().tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 3), (3, 5), (3,)], ids=["rows", "chains", "rows_first", "no_draws"])
def test_crps_from_draws_of_another_shape_raises(shape):
    with pytest.raises(DataError, match=r"draws needs shape \(m, \*y_true.shape\)"):
        metrics.crps_from_draws(np.zeros(3), np.zeros(shape))


def test_coverage_matches_scipy_intervals(regression):
    y_true, mean, var = regression
    for level in (0.5, 0.9, 0.95):
        lower, upper = stats.norm.interval(level, mean, np.sqrt(var))
        expected = np.mean((lower <= y_true) & (y_true <= upper))
        assert metrics.coverage(y_true, mean, var, level) == expected
        assert metrics.interval_coverage(y_true, lower, upper) == expected
    assert metrics.coverage(y_true, mean, var) == metrics.coverage(y_true, mean, var, level=0.95)


def test_gaussian_interval_matches_scipy(regression):
    _, mean, var = regression
    expected = stats.norm.interval(0.8, mean, np.sqrt(var))
    np.testing.assert_allclose(metrics.gaussian_interval(mean, var, 0.8), expected)
    assert metrics.interval_width(*expected) == pytest.approx(np.mean(expected[1] - expected[0]))


def test_calibration_curve_is_the_coverage_at_each_level(regression):
    y_true, mean, var = regression
    levels, observed = metrics.calibration_curve(y_true, mean, var, [0.9, 0.3, 0.6])
    assert levels.tolist() == [0.9, 0.3, 0.6]
    assert observed.tolist() == [metrics.coverage(y_true, mean, var, level) for level in levels]


def test_calibration_curve_of_exact_quantiles_is_the_diagonal():
    y_true = stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    curve = metrics.calibration_curve(y_true, np.zeros(1000), np.ones(1000))
    assert curve.levels[[0, -1]] == pytest.approx([0.05, 0.95])
    np.testing.assert_allclose(curve.observed, curve.levels, atol=0.002)
    overconfident = metrics.calibration_curve(y_true, np.zeros(1000), np.full(1000, 0.25))
    assert (overconfident.observed < curve.levels - 0.01).all()


def test_interval_bounds_count_as_inside():
    assert metrics.coverage([stats.norm.ppf((1 + 0.9) / 2)], [0.0], [1.0], level=0.9) == 1.0
    assert metrics.interval_coverage([0.0, 1.0, 1.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]) == pytest.approx(2 / 3)


def test_interval_score_by_hand():
    # inside: 4; 1 below: 4 + 2 / 0.2 * 1; 0.5 above: 4 + 2 / 0.2 * 0.5
    score = metrics.interval_score([0.0, -3.0, 2.5], [-2.0] * 3, [2.0] * 3, level=0.8)
    assert score == pytest.approx((4 + 14 + 9) / 3)


def test_interval_score_is_least_at_the_true_quantiles():
    level = 0.9
    y_true = stats.gamma.ppf((np.arange(4000) + 0.5) / 4000, a=2.0)
    best = stats.gamma.ppf([0.05, 0.95], a=2.0)

    def score(lower, upper):
        return metrics.interval_score(y_true, np.full(4000, lower), np.full(4000, upper), level)

    for shift in [(-0.1, 0), (0.1, 0), (0, -0.3), (0, 0.3), (-0.1, 0.3), (0.1, -0.3)]:
        assert score(*(best + shift)) > score(*best) + 1e-3


def test_swapped_bounds_raise():
    y, lower, upper = [0.0], [1.0], [-1.0]
    for metric, arguments in [
        (metrics.interval_coverage, (y, lower, upper)),
        (metrics.interval_width, (lower, upper)),
        (metrics.interval_score, (y, lower, upper, 0.9)),
    ]:
        with pytest.raises(DataError, match="Are the two bounds swapped"):
            metric(*arguments)


def test_classification_scores_match_sklearn(classification):
    labels, p = classification
    assert metrics.accuracy(labels, p) == pytest.approx(skm.accuracy_score(labels, p.argmax(axis=1)))
    assert metrics.nll(labels, p) == pytest.approx(skm.log_loss(labels, p))
    assert metrics.log_loss is metrics.nll
    expected = skm.brier_score_loss(labels, p, labels=range(4), scale_by_half=False)
    assert metrics.brier(labels, p) == pytest.approx(expected)


def test_brier_of_two_classes_is_twice_the_one_sided_score(classification):
    labels, p = classification[0] % 2, classification[1][:, 0]
    both = np.column_stack([1 - p, p])
    assert metrics.brier(labels, both) == pytest.approx(2 * skm.brier_score_loss(labels, p))


def test_ends_of_the_ranges():
    labels, right, wrong = np.arange(3), np.eye(3), np.eye(3)[[1, 2, 0]]
    assert [m(labels, right) for m in (metrics.accuracy, metrics.nll, metrics.ece, metrics.brier)] == [1, 0, 0, 0]
    assert [m(labels, wrong) for m in (metrics.accuracy, metrics.ece, metrics.brier)] == [0, 1, 2]
    assert metrics.nll(labels, wrong) == pytest.approx(skm.log_loss(labels, wrong))


def test_ece_and_reliability_by_hand():
    # confidences 0.9 (right), 0.8 (wrong), 0.6 (right), 0.6 (wrong); bins of width 1/4: (0.5, 0.75], (0.75, 1]
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]])
    labels = [0, 1, 1, 0]
    curve = metrics.reliability_curve(labels, p, num_bins=4)
    assert curve.counts.tolist() == [2, 2]
    assert curve.confidence == pytest.approx([0.6, 0.85])
    assert curve.accuracy == pytest.approx([0.5, 0.5])
    assert metrics.ece(labels, p, num_bins=4) == pytest.approx(0.5 * 0.1 + 0.5 * 0.35)
    assert metrics.ece(labels, p, num_bins=1) == pytest.approx(abs(0.725 - 0.5))
    edge = [[0.5, 0.5], [0.51, 0.49]]  # a confidence on an edge belongs to the bin below
    assert metrics.reliability_curve([0, 0], edge, num_bins=2).counts.tolist() == [1, 1]


def test_ece_equals_a_loop_over_bins(classification):
    labels, p = classification
    gap, bins = (p.argmax(axis=1) == labels) - p.max(axis=1), np.ceil(15 * p.max(axis=1))
    assert metrics.ece(labels, p) == pytest.approx(sum(abs(gap[bins == b].sum()) for b in range(1, 16)) / len(labels))


def test_float32_rounding_of_the_rows_does_not_enter(classification):
    labels, p = classification
    assert metrics.brier(labels, p.astype(np.float32)) == pytest.approx(metrics.brier(labels, p), rel=1e-5)
    assert metrics.brier(labels, 1.0005 * p) == pytest.approx(metrics.brier(labels, p), rel=1e-12)


POINT = [metrics.mse, metrics.rmse, metrics.mae, metrics.r2]
GAUSSIAN = [metrics.nlpd, metrics.crps, metrics.coverage, metrics.calibration_curve]
CLASSES = [metrics.accuracy, metrics.nll, metrics.brier, metrics.ece, metrics.reliability_curve]

CONTAINERS = {
    "list": lambda a: a.tolist(),
    "jax": jnp.asarray,
    "pandas": lambda a: pd.Series(a, index=np.arange(len(a))[::-1]),
    "polars": pl.Series,
    "float32": lambda a: a.astype(np.float32),
    "object": lambda a: a.astype(object),
}


@pytest.mark.parametrize("convert", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_any_container_gives_the_same_numbers(convert):
    y_true, mean, var = np.array([[0.5, 1.5, -2.0], [0.25, 1.0, -1.0], [1.0, 0.5, 2.0]])
    for metric in POINT:
        assert metric(convert(y_true), convert(mean)) == metric(y_true, mean)
    for metric in (metrics.nlpd, metrics.crps, metrics.coverage):
        assert metric(convert(y_true), convert(mean), convert(var)) == metric(y_true, mean, var)
    draws = np.stack([mean, mean + 1])
    assert metrics.crps_from_draws(convert(y_true), draws) == metrics.crps_from_draws(y_true, draws)
    assert metrics.brier(convert(np.array([0, 2])), np.eye(3)[:2]) == 1.0


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, jnp.asarray])
def test_frames_of_probabilities_and_outputs(frame):
    p = np.array([[0.75, 0.25], [0.5, 0.5]])
    assert metrics.nll([0, 1], frame(p)) == metrics.nll([0, 1], p)
    assert metrics.mse(frame(p), p + 1) == 1.0


def test_read_only_arrays_and_whole_float_labels_are_fine():
    p = np.array([[0.75, 0.25], [0.25, 0.75]])
    before = p.copy()
    p.setflags(write=False)
    assert metrics.brier([0.0, 1.0], p) == pytest.approx(0.125)
    assert metrics.accuracy([False, True], p) == 1.0
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("metric", POINT)
def test_point_metrics_never_broadcast(metric):
    with pytest.raises(DataError, match=r"y_pred has shape \(3, 1\) but y_true has shape \(3,\).*reshape\(\(3,\)\)"):
        metric(np.arange(3.0), np.zeros((3, 1)))
    with pytest.raises(DataError, match="Each entry of y_true needs one entry of y_pred"):
        metric(np.arange(3.0), np.zeros(2))
    with pytest.raises(DataError, match="y_pred is not an array"):
        metric(np.arange(3.0), 0.0)


@pytest.mark.parametrize("metric", GAUSSIAN)
def test_gaussian_metrics_check_shapes_and_variances(metric):
    y = np.zeros(3)
    with pytest.raises(DataError, match=r"mean has shape \(3, 1\)"):
        metric(y, np.zeros((3, 1)), np.ones(3))
    with pytest.raises(DataError, match=r"var has shape \(1,\)"):
        metric(y, y, np.ones(1))
    with pytest.raises(DataError, match=r"var has 2 values that are not positive, the first at row 1 \(0\)"):
        metric(y, y, [1.0, 0.0, -2.0])


@pytest.mark.parametrize("metric", [*POINT, *GAUSSIAN])
@pytest.mark.parametrize("position", [0, 1])
def test_bad_values_raise_and_are_located(metric, position):
    def call(values):
        arguments = [np.arange(3.0), np.ones(3), np.ones(3)][: 2 if metric in POINT else 3]
        arguments[position] = values
        return metric(*arguments)

    with pytest.raises(DataError, match=r"1 non-finite values, the first at row 2 \(nan\)"):
        call([0.0, 1.0, np.nan])
    with pytest.raises(DataError, match=r"2 non-finite values, the first at row 0 \(inf\)"):
        call([np.inf, 1.0, -np.inf])
    with pytest.raises(DataError, match="is empty"):
        call([])
    for unreadable in (
        ["a", "b", "c"],
        np.array(["1", "2", "3"], dtype=object),
        [1j, 0, 0],
        [[1.0], [1.0, 2.0], [3.0]],
    ):
        with pytest.raises(DataError, match="cannot be read as real numbers"):
            call(unreadable)


def test_missing_values_raise():
    masked = np.ma.masked_array([0.0, 1.0, 2.0], mask=[False, True, False])
    values = [0, None, 1]
    for missing in (values, masked, pd.Series(values, dtype="Int64"), pl.Series(values)):
        with pytest.raises(DataError, match=r"y_true (has 1 non-finite|cannot be read)"):
            metrics.mse(missing, np.zeros(3))


def test_the_place_of_a_bad_value_names_each_axis():
    values = np.zeros((2, 3, 4))
    values[1, 2, 3] = np.nan
    with pytest.raises(DataError, match="draw 1, row 2, column 3"):
        metrics.crps_from_draws(np.zeros((3, 4)), values)
    with pytest.raises(DataError, match="row 1, column 2, axis 2 3"):
        metrics.mse(values, values)


@pytest.mark.parametrize("metric", CLASSES)
@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], r"outside the whole numbers 0..1, the first at row 1 \(2\)"),
        ([-1, 0], [[0.5, 0.5], [0.5, 0.5]], "outside the whole numbers"),
        ([0.5, 0], [[0.5, 0.5], [0.5, 0.5]], "outside the whole numbers"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.502]], r"1 rows whose sum is not 1, the first at row 1 \(1.002\)"),
        ([0, 1], [[0.5, 0.5], [1.5, -0.5]], "negative values, the first at row 1, class 1"),
        ([0, 1], [0.5, 0.5], "np.column_stack"),
        ([0, 1], [[1.0], [1.0]], "one column per class"),
        ([[0], [1]], [[0.5, 0.5], [0.5, 0.5]], r"labels.ravel\(\)"),
        ([[1, 0], [0, 1]], [[0.5, 0.5], [0.5, 0.5]], "argmax"),
        ([0, 1, 1], [[0.5, 0.5], [0.5, 0.5]], "Each row of probabilities needs one label"),
        (["a", "b"], [[0.5, 0.5], [0.5, 0.5]], "labels cannot be read as real numbers"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "probabilities has 1 non-finite"),
        ([], np.zeros((0, 2)), "probabilities is empty"),
    ],
)
def test_classification_metrics_refuse(metric, labels, probabilities, message):
    with pytest.raises(DataError, match=message):
        metric(labels, probabilities)


@pytest.mark.parametrize("level", [0, 1, 95, -0.1, np.nan, None, [0.5, 0.9]])
def test_impossible_levels_raise(level):
    y = np.zeros(2)
    for call in (
        lambda: metrics.coverage(y, y, y + 1, level),
        lambda: metrics.gaussian_interval(y, y + 1, level),
        lambda: metrics.interval_score(y, y, y + 1, level),
        lambda: metrics.calibration_curve(y, y, y + 1, [[level]]),
    ):
        with pytest.raises(OptionError, match=r"between 0 and 1\. Write 95 % as 0.95"):
            call()


@pytest.mark.parametrize("num_bins", [0, -3, 2.0, True, "ten"])
def test_impossible_numbers_of_bins_raise(num_bins):
    with pytest.raises(OptionError, match="num_bins"):
        metrics.ece([0], [[0.5, 0.5]], num_bins)


class Fixed:
    """A model that returns what it was given."""

    def __init__(self, is_regression, *prediction):
        self.is_regression = is_regression
        self._prediction = prediction

    def predict(self, X):
        return tuple(part[: len(X)] for part in self._prediction)


def by_hand(y_true, mean, var, level, bounds=metrics.gaussian_interval):
    lower, upper = bounds(mean, var, level)
    return {
        "rmse": metrics.rmse(y_true, mean),
        "mae": metrics.mae(y_true, mean),
        "r2": metrics.r2(y_true, mean),
        "nlpd": metrics.nlpd(y_true, mean, var),
        "crps": metrics.crps(y_true, mean, var),
        "coverage": metrics.interval_coverage(y_true, lower, upper),
        "coverage_50": metrics.interval_coverage(y_true, *bounds(mean, var, 0.5)),
        "interval_width": metrics.interval_width(lower, upper),
    }


def test_summary_of_a_regression(regression):
    y_true, mean, var = regression
    scores = metrics.summary(Fixed(True, mean, var), y_true, y_true, level=0.8)
    assert scores == by_hand(y_true, mean, var, 0.8)
    assert all(type(score) is float for score in scores.values())


def test_summary_gives_the_scores_of_each_output():
    rng = np.random.default_rng(0)
    y_true, mean, var = rng.normal(size=(20, 3)) * [1, 10, 100], np.zeros((20, 3)), np.ones((20, 3))
    scores = metrics.summary(Fixed(True, mean, var), y_true, y_true)
    for j in range(3):
        expected = by_hand(y_true[:, j], mean[:, j], var[:, j], 0.95)
        assert {name: column[j] for name, column in scores.by_output.items()} == pytest.approx(expected)
    assert scores["mae"] == pytest.approx(scores.by_output["mae"].mean())
    assert metrics.summary(Fixed(True, mean[:, 0], var[:, 0]), y_true, y_true[:, 0]).by_output == {}


def test_summary_judges_a_model_by_its_own_intervals(regression):
    y_true, mean, var = regression
    model = Fixed(True, mean, var)
    model.predict_interval = lambda X, level: (mean - level, mean + 3 * level)
    expected = by_hand(y_true, mean, var, 0.9, lambda mean, var, level: (mean - level, mean + 3 * level))
    assert metrics.summary(model, y_true, y_true, level=0.9) == pytest.approx(expected)
    assert expected["interval_width"] == pytest.approx(3.6)


def test_summary_of_a_constant_target_has_no_r2():
    scores = metrics.summary(Fixed(True, np.zeros(4), np.ones(4)), np.ones(4), np.ones(4))
    assert np.isnan(scores["r2"]) and scores["rmse"] == 1


def test_summary_of_other_shapes_raises():
    with pytest.raises(DataError, match="nothing is broadcast"):
        metrics.summary(Fixed(True, np.zeros(4), np.ones(4)), np.ones(4), np.ones((4, 1)))


def test_summary_of_a_classification(classification):
    labels, p = classification
    scores = metrics.summary(Fixed(False, p, np.zeros(len(p))), p, labels)
    assert scores == {
        "accuracy": metrics.accuracy(labels, p),
        "nll": metrics.nll(labels, p),
        "brier": metrics.brier(labels, p),
        "ece": metrics.ece(labels, p),
        "entropy": metrics.entropy(p),
    }
    assert all(type(score) is float for score in scores.values())


def test_scores_print_as_a_table_of_all_outputs_and_each():
    one = metrics.Scores({"rmse": 0.123456, "nlpd": -1.0})
    assert str(one).splitlines() == ["rmse      0.1235", "nlpd          -1"]
    two = metrics.Scores({"mae": 2.0}, {"mae": np.array([1.0, 3.0])})
    assert [line.split() for line in str(two).splitlines()] == [["all", "0", "1"], ["mae", "2", "1", "3"]]
    assert len({len(line) for line in str(two).splitlines()}) == 1


def test_scores_are_a_dict_that_survives_pickling_and_json():
    scores = metrics.Scores({"mae": 2.0}, {"mae": np.array([1.0, 3.0])})
    again = pickle.loads(pickle.dumps(scores))
    assert again == scores == json.loads(json.dumps(scores))
    np.testing.assert_array_equal(again.by_output["mae"], [1, 3])


def test_entropy_matches_scipy_and_knows_certainty(classification):
    _, p = classification
    assert metrics.entropy(p) == pytest.approx(stats.entropy(p, axis=1).mean())
    assert metrics.entropy([[1.0, 0.0], [0.0, 1.0]]) == 0
    assert metrics.entropy([[0.25] * 4]) == pytest.approx(np.log(4))
    with pytest.raises(DataError, match="rows whose sum is not 1"):
        metrics.entropy([[0.5, 0.6]])
