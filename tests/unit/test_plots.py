import subprocess
import sys

import numpy as np
import pytest

from neurobayes import metrics, plots
from neurobayes.errors import DataError, MissingExtraError, OptionError

pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
MEAN = RNG.normal(10, 3, 60)
VAR = RNG.uniform(0.5, 2, 60)
Y = MEAN + 1.5 * np.sqrt(VAR) * RNG.standard_normal(60)
LABELS = RNG.integers(0, 3, 90)
LOGITS = RNG.normal(size=(90, 3)) + 2 * np.eye(3)[LABELS]
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
ENTROPY = -(PROBABILITIES * np.log(PROBABILITIES)).sum(1)
RIGHT = PROBABILITIES.argmax(1) == LABELS

PLOTS = {
    "parity": lambda **options: plots.parity(Y, MEAN, VAR, **options),
    "calibration": lambda **options: plots.calibration(Y, MEAN, VAR, **options),
    "interval_width": lambda **options: plots.interval_width(Y, MEAN, VAR, **options),
    "reliability": lambda **options: plots.reliability(LABELS, PROBABILITIES, **options),
    "confidence_histogram": lambda **options: plots.confidence_histogram(LABELS, PROBABILITIES, **options),
    "uncertainty_histogram": lambda **options: plots.uncertainty_histogram(LABELS, PROBABILITIES, ENTROPY, **options),
}


def offsets(ax):
    """Number of points of each scatter, by its label without the share in brackets."""
    return {c.get_label().split(" ")[0]: len(c.get_offsets()) for c in ax.collections if hasattr(c, "get_sizes")}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_is_labelled_saved_and_legended(draw, tmp_path):
    ax = draw()
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title() and ax.get_legend() is not None
    ax.figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_draws_into_given_axes(draw):
    from matplotlib.figure import Figure

    first, second = Figure().subplots(1, 2)
    assert draw(ax=second) is second
    assert second.has_data() and not first.has_data()


def test_plotting_leaves_pyplot_alone():
    code = (
        "import sys, numpy as np; from neurobayes import plots; y = np.arange(5.0); "
        "plots.parity(y, y + 1, y + 1).figure.canvas; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'matplotlib.*pip install ".\[plots\]"'):
        plots.parity(Y, MEAN, VAR)


def test_parity_is_square_and_tells_covered_rows_apart():
    ax = plots.parity(Y, MEAN, VAR, name="strength", unit="MPa")
    assert ax.get_xlabel() == "measured strength [MPa]" and ax.get_ylabel() == "predicted strength [MPa]"
    assert ax.get_xlim() == ax.get_ylim() and ax.get_aspect() == 1
    num_inside = round(metrics.coverage(Y, MEAN, VAR) * len(Y))
    assert 0 < num_inside < len(Y)
    assert offsets(ax) == {"inside": num_inside, "outside": len(Y) - num_inside}
    assert "n = 60" in ax.get_title() and f"{metrics.rmse(Y, MEAN):.3g}" in ax.get_title()
    lower, upper = metrics.gaussian_interval(MEAN, VAR)
    assert ax.get_ylim()[0] < lower.min() and ax.get_ylim()[1] > upper.max()


def test_wider_intervals_leave_fewer_rows_outside():
    assert offsets(plots.parity(Y, MEAN, VAR, level=0.999))["outside"] < offsets(plots.parity(Y, MEAN, VAR))["outside"]


def test_interval_width_agrees_with_parity_on_what_is_outside():
    assert offsets(plots.interval_width(Y, MEAN, VAR)) == offsets(plots.parity(Y, MEAN, VAR))


def test_calibration_draws_the_curve_of_the_metrics():
    curve = metrics.calibration_curve(Y, MEAN, VAR)
    line = next(line for line in plots.calibration(Y, MEAN, VAR).lines if line.get_label() == "this model")
    assert np.array_equal(line.get_xydata()[1:-1], np.column_stack(curve))


def test_reliability_draws_the_curve_of_the_metrics_and_its_counts():
    curve = metrics.reliability_curve(LABELS, PROBABILITIES, 8)
    ax = plots.reliability(LABELS, PROBABILITIES, num_bins=8)
    points = next(line for line in ax.lines if len(line.get_xdata()) == len(curve.counts) and line.get_marker() == "o")
    assert np.array_equal(points.get_xydata(), np.column_stack([curve.confidence, curve.accuracy]))
    shown = {text.get_text() for text in ax.texts}
    assert {str(count) for count in curve.counts} <= shown
    assert f"ECE {metrics.ece(LABELS, PROBABILITIES, 8):.3f}" in ax.get_title()


def test_confidence_histogram_counts_every_row():
    ax = plots.confidence_histogram(LABELS, PROBABILITIES)
    assert sum(patch.get_height() for patch in ax.patches) == len(LABELS)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"right ({RIGHT.sum()})" in labels and f"wrong ({(~RIGHT).sum()})" in labels


def test_uncertainty_histogram_gives_shares_and_the_auroc():
    from sklearn.metrics import roc_auc_score

    rounded = ENTROPY.round(1)  # ties count one half
    ax = plots.uncertainty_histogram(LABELS, PROBABILITIES, rounded)
    assert np.isclose(sum(patch.get_height() for patch in ax.patches), 2)
    assert f"AUROC {roc_auc_score(~RIGHT, rounded):.2f}" in ax.get_title()


def test_uncertainty_histogram_without_a_wrong_prediction_has_no_auroc():
    ax = plots.uncertainty_histogram([0, 1], np.eye(2), [0.0, 0.0])
    assert "AUROC" not in ax.get_title()


def test_many_rows_are_thinned_but_counted():
    y = np.random.default_rng(1).normal(size=5000)
    ax = plots.parity(y, np.zeros(5000), np.ones(5000))
    assert sum(offsets(ax).values()) == 2000
    assert "2,000 of n = 5,000 shown" in ax.get_title()


@pytest.mark.parametrize("draw", [plots.parity, plots.calibration, plots.interval_width])
def test_one_row_constant_target_and_column_shapes_are_drawn(draw):
    draw([1.0], [1.0], [0.1]).figure.canvas.draw()
    draw(np.full((4, 1), 2.0), np.full(4, 2.0), np.full((4, 1), 1e-12)).figure.canvas.draw()


@pytest.mark.parametrize("draw", [plots.parity, plots.calibration, plots.interval_width])
def test_wrong_shapes_raise(draw):
    with pytest.raises(DataError, match=r"y_true has shape \(3, 2\).*one output at a time"):
        draw(np.zeros((3, 2)), np.zeros((3, 2)), np.ones((3, 2)))
    with pytest.raises(DataError, match="mean has 4 rows but y_true has 3"):
        draw(np.zeros(3), np.zeros(4), np.ones(3))
    with pytest.raises(DataError, match="var"):
        draw(np.zeros(3), np.zeros(3), np.array([1.0, 0.0, 1.0]))


def test_uncertainty_of_wrong_length_or_value_raises():
    with pytest.raises(DataError, match="uncertainty has 2 rows"):
        plots.uncertainty_histogram(LABELS, PROBABILITIES, [0.1, 0.2])
    with pytest.raises(DataError, match="non-finite"):
        plots.uncertainty_histogram([0, 1], np.eye(2), [0.0, np.nan])


class Model:
    """A model that predicts what it was given, and has intervals of its own where these are given."""

    def __init__(self, is_regression, *prediction, interval=None):
        self.is_regression, self.prediction = is_regression, prediction
        if interval is not None:
            self.predict_interval = interval

    def predict(self, X):
        return self.prediction


def points(ax):
    """Everything drawn as points or lines, as plain lists."""
    scatters = [c.get_offsets().tolist() for c in ax.collections if hasattr(c, "get_sizes")]
    return scatters + [line.get_xydata().tolist() for line in ax.lines]


@pytest.mark.parametrize("name", ["parity", "calibration", "interval_width"])
def test_a_model_is_drawn_as_its_predictions(name):
    draw = getattr(plots, name)
    assert points(draw(Model(True, MEAN, VAR), None, Y)) == points(draw(Y, MEAN, VAR))


@pytest.mark.parametrize("name", ["reliability", "confidence_histogram", "uncertainty_histogram"])
def test_a_classifier_is_drawn_as_its_predictions(name):
    draw, model = getattr(plots, name), Model(False, PROBABILITIES, ENTROPY)
    ax, expected = draw(model, None, LABELS), PLOTS[name]()
    assert points(ax) == points(expected) and ax.get_title() == expected.get_title()
    assert [p.get_height() for p in ax.patches] == [p.get_height() for p in expected.patches]


@pytest.mark.parametrize("name", ["parity", "calibration", "interval_width"])
def test_one_of_several_outputs_is_chosen(name):
    draw = getattr(plots, name)
    pairs = [np.stack([np.zeros(60), array], axis=1) for array in (Y, MEAN, VAR)]
    assert points(draw(*pairs, output=1)) == points(draw(Y, MEAN, VAR))
    assert points(draw(Model(True, *pairs[1:]), None, pairs[0], output=1)) == points(draw(Y, MEAN, VAR))
    with pytest.raises(OptionError, match="output=2 does not exist: there are 2"):
        draw(*pairs, output=2)
    with pytest.raises(OptionError, match="output=3 does not exist: there is one"):
        draw(Y, MEAN, VAR, output=3)


def test_a_model_is_judged_by_its_own_intervals():
    def interval(X, level):  # holds this share of the targets, exactly at tenths
        half = np.quantile(np.abs(Y - MEAN), level, method="inverted_cdf")
        return MEAN - half, MEAN + half

    model = Model(True, MEAN, 1e-6 * VAR, interval=interval)
    line = next(line for line in plots.calibration(model, None, Y).lines if line.get_label() == "this model")
    np.testing.assert_allclose(line.get_xdata()[1:-1], [*np.arange(1, 10) / 10, 0.95])
    np.testing.assert_allclose(line.get_ydata()[1:-1], [*np.arange(1, 10) / 10, 57 / 60])
    assert offsets(plots.parity(model, None, Y, level=0.8)) == {"inside": 48, "outside": 12}
    assert offsets(plots.interval_width(model, None, Y, level=0.8)) == {"inside": 48, "outside": 12}


def test_calibration_shows_the_band_of_chance():
    band = plots.calibration(Y, MEAN, VAR).collections[0].get_paths()[0].vertices
    middle = band[np.isclose(band[:, 0], 0.5)][:, 1]
    np.testing.assert_allclose([middle.min(), middle.max()], 0.5 + np.array([-1.96, 1.96]) * 0.5 / 60**0.5)


def test_plots_of_the_other_kind_of_model_say_which_to_use():
    with pytest.raises(OptionError, match=r"Use plots\.reliability"):
        plots.parity(Model(False, PROBABILITIES, ENTROPY), None, LABELS)
    with pytest.raises(OptionError, match=r"Use plots\.calibration"):
        plots.reliability(Model(True, MEAN, VAR), None, Y)
    with pytest.raises(DataError, match=r"\(model, X, y\)"):
        plots.reliability(Model(False, PROBABILITIES, ENTROPY), None)
