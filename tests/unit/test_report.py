import csv
import json

import numpy as np
import pytest

from neurobayes import metrics, report
from neurobayes.errors import DataError, OptionError

Y = np.array([1.0, 2.0, 3.0, 4.0])
MEAN = np.array([1.5, 2.0, 2.0, 4.0])
VAR = np.array([0.25, 1.0, 0.04, 1.0])
POINT = np.array([1.0, 2.5, 3.0, 4.5])
PROBABILITIES = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])


def regression(**options):
    return report.regression(Y, MEAN, VAR, point=POINT, noise_std=0.5, **options)


def classification(**options):
    return report.classification(
        [0, 0, 1], PROBABILITIES, [0.3, 0.7, 0.6], class_names=("no", "yes"), point=PROBABILITIES[::-1], **options
    )


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_regression_scores_are_those_of_the_metrics():
    scores = regression().scores
    assert list(scores) == [report.BAYESIAN, report.CONSTANT_NOISE, report.POINT]
    assert scores[report.BAYESIAN] == {
        "rmse": metrics.rmse(Y, MEAN),
        "nlpd": metrics.nlpd(Y, MEAN, VAR),
        "coverage": 0.75,
        "crps": metrics.crps(Y, MEAN, VAR),
    }
    assert scores[report.CONSTANT_NOISE]["nlpd"] == metrics.nlpd(Y, POINT, np.full(4, 0.25))
    assert scores[report.POINT] == {"rmse": metrics.rmse(Y, POINT), "nlpd": None, "coverage": None, "crps": 0.25}


def test_classification_scores_are_those_of_the_metrics():
    scores = classification().scores
    assert list(scores) == [report.BAYESIAN, report.DETERMINISTIC]
    assert list(scores[report.BAYESIAN]) == ["accuracy", "nll", "ece", "brier"]
    assert scores[report.BAYESIAN]["accuracy"] == pytest.approx(2 / 3)
    assert scores[report.DETERMINISTIC]["nll"] == metrics.nll([0, 0, 1], PROBABILITIES[::-1])


def test_without_a_deterministic_network_there_is_one_row():
    assert list(report.regression(Y, MEAN, VAR).scores) == [report.BAYESIAN]
    assert list(report.regression(Y, MEAN, VAR, point=POINT).scores) == [report.BAYESIAN, report.POINT]


def test_regression_predictions_round_trip_through_the_file(tmp_path):
    report.write(regression(index={"line": [7, 3, 9, 2]}), tmp_path / "out", {"seed": 3}, figures=False)
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert list(rows[0]) == ["line", "measured", "mean", "std", "lower_95", "upper_95"]
    assert [row["line"] for row in rows] == ["7", "3", "9", "2"]
    read = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    assert np.array_equal(read["measured"], Y) and np.array_equal(read["mean"], MEAN)
    assert np.array_equal(read["std"], np.sqrt(VAR))
    assert np.allclose(read["upper_95"] - read["mean"], 1.959964 * np.sqrt(VAR))
    assert np.allclose(read["mean"] - read["lower_95"], 1.959964 * np.sqrt(VAR))


def test_class_predictions_use_the_class_names(tmp_path):
    report.write(classification(), tmp_path, {}, figures=False)
    rows = read_csv(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["row", "label", "predicted", "probability_no", "probability_yes", "uncertainty"]
    assert [(row["label"], row["predicted"]) for row in rows] == [("no", "no"), ("no", "yes"), ("yes", "yes")]
    assert [float(row["probability_yes"]) for row in rows] == [0.1, 0.6, 0.7]


def test_metrics_file_holds_scores_and_details(tmp_path):
    report.write(regression(), tmp_path, {"seed": 3}, figures=False)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["seed"] == 3
    assert content["scores"] == regression().scores
    assert content["scores"][report.POINT]["nlpd"] is None


@pytest.mark.parametrize("make", [regression, classification])
def test_figures_are_written_as_png(make, tmp_path):
    pytest.importorskip("matplotlib")
    result = make()
    report.write(result, tmp_path / "a" / "b", {})
    written = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert written == {"predictions.csv", "metrics.json", *result.figures}
    assert len(result.figures) == 3
    assert all((tmp_path / "a" / "b" / name).read_bytes().startswith(b"\x89PNG") for name in result.figures)


def test_a_second_report_replaces_the_first(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    report.write(regression(), tmp_path, {"seed": 1}, figures=False)
    report.write(regression(), tmp_path, {"seed": 2}, figures=False)
    assert json.loads((tmp_path / "metrics.json").read_text())["seed"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "metrics.json", "predictions.csv"}


def test_a_failed_report_leaves_nothing_behind(tmp_path):
    result = regression()
    with pytest.raises(ValueError, match="JSON"):
        report.write(result, tmp_path / "out", {"bad": float("nan")}, figures=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_report_leaves_the_last_one_whole(tmp_path):
    report.write(regression(), tmp_path, {"seed": 1}, figures=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        report.write(classification(), tmp_path, {"bad": float("inf")}, figures=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_where_a_file_should_go_is_refused(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OptionError, match=r"metrics\.json is a folder"):
        report.write(regression(), tmp_path, {}, figures=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_file_is_never_taken_for_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below" / "it"):
        with pytest.raises(OptionError, match="file exists and is not a folder"):
            report.check_folder(folder)
        with pytest.raises(OptionError, match="file exists and is not a folder"):
            report.write(regression(), folder, {}, figures=False)
    assert file.read_text() == "mine"


def test_checking_a_folder_creates_nothing(tmp_path):
    assert report.check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_score_table_shows_every_model_and_a_dash_for_what_it_lacks():
    from rich.console import Console

    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(report.score_table(regression().scores, title="four rows"))
    lines = capture.get().splitlines()
    assert any("RMSE" in line and "95 % coverage" in line for line in lines)
    point = next(line for line in lines if report.POINT in line)
    assert point.count("\N{EN DASH}") == 2 and "0.25" in point
    assert any(report.BAYESIAN in line and "0.750" in line for line in lines)


def test_wrong_number_of_class_names_raises():
    with pytest.raises(DataError, match="class_names has 3 names for 2 classes"):
        report.classification([0, 0, 1], PROBABILITIES, [0.1, 0.2, 0.3], class_names="abc")
