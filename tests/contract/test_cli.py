"""The command line, from arguments to files, with real (small) fits."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from neurobayes import cli, datasets, report
from neurobayes.errors import OptionError

SMALL = ("--hidden", "8,4", "--num-warmup", "50", "--num-samples", "50")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_one_red_line(result):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def write_table(path, n, *, seed=0, text_target=False):
    """A semicolon-separated file: two numbers, a category that shifts the target, a constant column."""
    rng = np.random.default_rng(seed)
    x, z, kind = rng.normal(size=n), rng.normal(size=n), rng.integers(0, 2, n)
    y = 900 + 100 * (x + 2 * kind) + 5 * rng.normal(size=n)
    target = np.where(y > 1000, "tough, hard", "soft") if text_target else y.round(3)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["x", "kind", "z", "batch", "strength"])
        writer.writerows(zip(x, np.array(["cast", "rolled"])[kind], z, ["B7"] * n, target, strict=True))
    return path


@pytest.fixture(scope="module")
def regression_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return invoke("demo", "--quick", "--out", out), out


@pytest.fixture(scope="module")
def classification_demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return invoke("demo", "--task", "classification", "--dataset", "iris", "--quick", "--out", out), out


# Demo


def test_demo_prints_the_table_and_writes_the_report(regression_demo):
    result, out = regression_demo
    assert result.exit_code == 0, result.output
    for text in ("RMSE", "NLPD", "95 % coverage", "CRPS", report.BAYESIAN, report.CONSTANT_NOISE, report.POINT):
        assert text in result.stdout
    # 10 inputs through layers of 64, 32, 16 and 1; the output layer has 16 weights and a bias.
    assert "17 of 3,329 weights are Bayesian" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "predictions.csv",
        "metrics.json",
        "parity.png",
        "calibration.png",
        "interval_width.png",
    }


def test_demo_is_quiet_where_there_is_no_terminal(regression_demo):
    result, _ = regression_demo
    assert "\x1b" not in result.output
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())


def test_demo_holds_out_the_documented_rows_of_diabetes(regression_demo):
    _, out = regression_demo
    rows = read_csv(out / "predictions.csv")
    held_out = np.random.default_rng(0).permutation(442)[-92:]
    assert [int(row["row"]) for row in rows] == held_out.tolist()
    assert [float(row["measured"]) for row in rows] == datasets.load("diabetes").y[held_out].tolist()


def test_demo_scores_follow_from_the_predictions_and_beat_the_mean(regression_demo):
    _, out = regression_demo
    content = json.loads((out / "metrics.json").read_text())
    rows = read_csv(out / "predictions.csv")
    read = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    scores = content["scores"][report.BAYESIAN]
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((read["measured"] - read["mean"]) ** 2)))
    inside = (read["lower_95"] <= read["measured"]) & (read["measured"] <= read["upper_95"])
    assert scores["coverage"] == pytest.approx(inside.mean())
    assert scores["rmse"] < read["measured"].std()
    assert (content["num_train"], content["num_test"]) == (350, 92)
    assert content["compressed_columns"] == []  # diabetes has columns without long tails
    assert content["num_bayesian_weights"] == 17 and content["num_weights"] == 3329
    assert content["diagnostics"] and content["fit_seconds"] > 0 and content["constant_noise"]["std"] > 0


def test_classification_demo(classification_demo):
    result, out = classification_demo
    assert result.exit_code == 0, result.output
    for text in ("accuracy", "NLL", "ECE", "Brier", report.BAYESIAN, report.DETERMINISTIC):
        assert text in result.stdout
    rows = read_csv(out / "predictions.csv")
    names = ["setosa", "versicolor", "virginica"]
    assert sorted(row["label"] for row in rows) == sorted(names * 10)  # stratified: ten of each
    probabilities = np.array([[float(row[f"probability_{name}"]) for name in names] for row in rows])
    assert np.allclose(probabilities.sum(1), 1, atol=1e-3)
    assert [row["predicted"] for row in rows] == [names[i] for i in probabilities.argmax(1)]
    accuracy = np.mean([row["predicted"] == row["label"] for row in rows])
    scores = json.loads((out / "metrics.json").read_text())["scores"]
    assert scores[report.BAYESIAN]["accuracy"] == pytest.approx(accuracy) and accuracy > 0.6
    assert {"reliability.png", "confidence.png", "uncertainty.png"} <= {path.name for path in out.iterdir()}


# Fit


def test_fit_splits_a_file_and_names_its_lines(tmp_path):
    data = write_table(tmp_path / "data.csv", 60)
    result = invoke("fit", data, "--target", "strength", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert "note: Left out, because constant: batch." in result.stdout
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 12
    lines = data.read_text().splitlines()
    assert all(float(lines[int(row["line"]) - 1].split(";")[-1]) == float(row["measured"]) for row in rows)
    mean = np.array([float(row["mean"]) for row in rows])
    assert mean.min() > 500 and mean.max() < 1500  # in the user's units


def test_fit_with_a_test_file_and_named_layers_is_reproducible(tmp_path):
    data, test = write_table(tmp_path / "data.csv", 60), write_table(tmp_path / "test.csv", 9, seed=1)
    for out in ("first", "second"):
        options = ("--test", test, "--layers", "Dense0,Dense2", "--seed", 5, "--no-figures", *SMALL)
        result = invoke("fit", data, "--target", "strength", "--out", tmp_path / out, *options)
        assert result.exit_code == 0, result.output
    # Four inputs (the category counts twice): Dense0 has 4 * 8 + 8 weights, Dense2 has 4 + 1.
    assert "45 of 81 weights are Bayesian" in result.stdout
    first = (tmp_path / "first" / "predictions.csv").read_bytes()
    assert first == (tmp_path / "second" / "predictions.csv").read_bytes()
    assert [row["line"] for row in read_csv(tmp_path / "first" / "predictions.csv")] == [str(i) for i in range(2, 11)]
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"predictions.csv", "metrics.json"}


def test_fit_holds_out_whole_groups(tmp_path):
    data = write_table(tmp_path / "data.csv", 60)
    header, *lines = data.read_text().splitlines()
    names = [f"M{i % 6}" for i in range(60)]
    data.write_text("\n".join([f"{header};melt", *(f"{line};{name}" for line, name in zip(lines, names, strict=True))]))
    options = ("--target", "strength", "--group", "melt", "--no-figures", *SMALL)
    result = invoke("fit", data, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    held_out = {names[int(row["line"]) - 2] for row in read_csv(tmp_path / "out" / "predictions.csv")}
    assert len(held_out) == 1 and len(read_csv(tmp_path / "out" / "predictions.csv")) == 10
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["num_groups"] == 5
    assert content["num_weights"] == 4 * 8 + 8 + 8 * 4 + 4 + 4 + 1  # the name is no input


def test_groups_of_a_test_file_that_are_not_new_are_noted(tmp_path):
    train, test = (tmp_path / name for name in ("train.csv", "test.csv"))
    rows = [f"{i},{i % 7},{i * 1.5 + i % 3},M{i // 6}" for i in range(60)]
    train.write_text("\n".join(["a,b,y,melt", *rows[:42]]))
    test.write_text("\n".join(["a,b,y,melt", *rows[36:]]))
    problem = cli.csv_problem(
        train, "y", test=test, test_fraction=None, task="auto", drop=[], seed=0, group="melt"
    )  # fmt: skip
    assert "1 of 4 groups of the test file are in the training file as well" in problem.notes[-1]
    assert len(np.unique(problem.groups)) == 7 and problem.X_train.shape == (42, 2)


def test_fit_names_the_columns_it_compresses(tmp_path):
    logarithms = np.random.default_rng(0).normal(size=(120, 2))
    rows = np.column_stack([np.exp(4.0 * logarithms), np.sin(logarithms[:, 0]) + logarithms[:, 1]])
    lines = [",".join(map(str, row)) for row in np.insert(rows, 1, np.linspace(0, 1, 120), axis=1)]
    (tmp_path / "data.csv").write_text("\n".join(["dose,time,salt,y", *lines]))
    options = ("--target", "y", "--no-figures", "--hidden", "16,16", "--num-samples", 64)
    result = invoke("fit", tmp_path / "data.csv", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "Left-out rows asked for long tails to be compressed: dose, salt." in result.stdout
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["compressed_columns"] == ["dose", "salt"]


def test_fit_recognises_classes_by_their_names(tmp_path):
    data = write_table(tmp_path / "data.csv", 60, text_target=True)
    options = ("--drop", "z", "--drop", "batch", "--test-fraction", 0.25, "--no-figures", *SMALL)
    result = invoke("fit", data, "--target", "strength", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert {row["label"] for row in rows} == {"soft", "tough, hard"}
    assert {"probability_soft", "probability_tough, hard"} < set(rows[0])


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "strenght"), r"closest: 'strength'"),
        (("--target", "strength", "--test", "absent.csv"), "There is no file 'absent.csv'"),
        (("--target", "strength", "--test-fraction", "1.5"), "test_fraction=1.5"),
        (("--target", "strength", "--test", "t.csv", "--test-fraction", "0.1"), "exclude each other"),
        (("--target", "strength", "--layers", "last:5"), "k from 1 to 4"),
        (("--target", "strength", "--layers", "Dense7", "--hidden", "4"), "Dense7"),
        (("--target", "strength", "--hidden", "8,x"), "8,x"),
        (("--target", "strength", "--drop", "colour"), "no column 'colour'"),
        (("--target", "strength", "--group", "bach"), "no column 'bach' (closest: 'batch')"),
        (("--target", "strength", "--group", "batch"), "groups has one group only"),
        (("--target", "strength", "--group", "strength"), "'strength' is the target and cannot name groups"),
        (("--target", "strength", "--group", "kind"), "has 2 groups in column 'kind', and 3 are needed"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, arguments, message):
    data = write_table(tmp_path / "data.csv", 20)
    result = invoke("fit", data, *arguments, "--out", tmp_path / "out")
    assert message in result.stderr
    if "Dense7" in arguments:  # found when the network is known, after the notes on the data were printed
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
    else:
        assert_one_red_line(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,y\n1,2\n,3\n4,5\n6,7\n", "1 missing value: column 'a' line 3"),
        ("a,y\n1,2\n2,3\n4,oops\n6,7\n", "column 'y' line 4: 'oops' is not a finite number"),
        ("a,y\n1,2\n", "has only 1 row of data"),
        ("a,y\n1,2\n3,4\n", "leaves 1 row to train on"),
        ("", "is empty"),
    ],
)
def test_bad_tables_are_one_line_and_write_nothing(tmp_path, content, message):
    data = tmp_path / "data.csv"
    data.write_text(content)
    result = invoke("fit", data, "--target", "y", "--out", tmp_path / "out")
    assert message in result.stderr
    assert_one_red_line(result)
    assert not (tmp_path / "out").exists()


def test_an_existing_file_is_not_overwritten(tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("mine")
    result = invoke("demo", "--out", out)
    assert "notes.txt exists and is not a folder" in result.stderr
    assert_one_red_line(result)
    assert out.read_text() == "mine"


def test_demo_refuses_what_does_not_fit_together(tmp_path):
    result = invoke("demo", "--task", "regression", "--dataset", "digits", "--out", tmp_path / "out")
    assert "--dataset digits is for classification" in result.stderr
    assert_one_red_line(result)
    result = invoke("demo", "--dataset", "diabets", "--out", tmp_path / "out")
    assert "closest: 'diabetes'" in result.stderr
    assert_one_red_line(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last:2", {"num_probabilistic_layers": 2}),
        ("all", {"num_probabilistic_layers": 4}),
        ("Dense0, Dense3", {"probabilistic_layer_names": ["Dense0", "Dense3"]}),
    ],
)
def test_layers_as_text(text, expected):
    assert cli.parse_layers(text, num_hidden=3) == expected


@pytest.mark.parametrize("text", ["", ",", "last:0", "last:5", "last:", "last:-1", "first:2"])
def test_layers_that_mean_nothing_raise(text):
    with pytest.raises(OptionError, match="--layers"):
        cli.parse_layers(text, num_hidden=3)


@pytest.mark.parametrize("text", ["", "0", "64,-1", "64,,3", "1.5"])
def test_hidden_widths_that_mean_nothing_raise(text):
    with pytest.raises(OptionError, match="--hidden"):
        cli.parse_hidden(text)


# Help


def test_version_and_help():
    assert invoke("--version").stdout.startswith("neurobayes ")
    assert {"demo", "fit"} <= set(invoke("--help").stdout.split())
    for command, options in {"demo": ("--task", "--dataset"), "fit": ("--target", "--test-fraction")}.items():
        text = invoke(command, "--help").stdout
        assert all(option in text for option in (*options, "--seed", "--out"))


def test_help_loads_neither_jax_nor_matplotlib():
    code = (
        "import sys; from typer.testing import CliRunner; from neurobayes import cli; "
        "assert CliRunner().invoke(cli.app, ['fit', '--help']).exit_code == 0; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'matplotlib', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
