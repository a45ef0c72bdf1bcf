"""The command ``neurobayes``: fit a partially Bayesian network to a table and report on held-out rows."""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import typer

from . import __version__, _terminal, errors

_DIABETES_TEST_ROWS = 92  # of 442: the split that the published comparisons use

app = typer.Typer(
    name="neurobayes",
    help="Partially Bayesian neural networks: predictions with honest error bars.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Training and test rows, and what to call them. ``class_names`` is empty for regression."""

    name: str
    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    index: Mapping[str, Sequence[int]]
    target_name: str
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    groups: np.ndarray | None = None  # of the training rows


@dataclasses.dataclass(frozen=True)
class Options:
    """How the model is built and fitted; a number of draws that is None is left to ``PartialBNN.fit``."""

    hidden: tuple[int, ...]
    selection: Mapping[str, Any]
    num_warmup: int | None
    num_samples: int | None
    seed: int
    out: pathlib.Path
    figures: bool


# Options as text


def parse_hidden(text: str) -> tuple[int, ...]:
    """``"64,32,16"`` as layer widths."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise errors.OptionError(f"--hidden {text!r} is not a list of layer widths. Write it as 64,32,16.")
    return widths


def parse_layers(text: str, num_hidden: int) -> dict[str, Any]:
    """``"last:2"``, ``"all"`` or ``"Dense0,Dense3"`` as arguments of ``PartialBNN``."""
    kind, colon, count = text.strip().partition(":")
    if text.strip() == "all":
        return {"num_probabilistic_layers": num_hidden + 1}
    if colon:
        if kind == "last" and count.isdecimal() and 1 <= int(count) <= num_hidden + 1:
            return {"num_probabilistic_layers": int(count)}
        raise errors.OptionError(
            f"--layers {text!r} is not known. Write last:k with k from 1 to {num_hidden + 1} (last:1 is the output "
            "layer), all, or layer names as in Dense0,Dense3."
        )
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise errors.OptionError("--layers is empty. Write last:1, all, or layer names as in Dense0,Dense3.")
    return {"probabilistic_layer_names": names}


# What to fit


def demo_problem(task: str | None, dataset: str | None) -> Problem:
    """A bundled data set, always split in the same way."""
    from . import datasets

    name = dataset or ("breast_cancer" if task == "classification" else "diabetes")
    data = datasets.load(name)
    if task is not None and task != data.task:
        raise errors.OptionError(f"--dataset {name} is for {data.task}, not for --task {task}. Leave out one of them.")
    fraction = _DIABETES_TEST_ROWS / len(data.y) if name == "diabetes" else 0.2
    train, test = datasets.split_rows(len(data.y), fraction, seed=0, labels=data.y if data.class_names else None)
    return Problem(
        name=name,
        X_train=data.X[train],
        y_train=data.y[train],
        X_test=data.X[test],
        y_test=data.y[test],
        index={"row": test.tolist()},
        target_name=data.target_name,
        feature_names=data.feature_names,
        class_names=data.class_names,
    )


def csv_problem(
    path: pathlib.Path,
    target: str,
    *,
    test: pathlib.Path | None,
    test_fraction: float | None,
    task: str,
    drop: Sequence[str],
    seed: int,
    group: str | None = None,
) -> Problem:
    """A CSV file split at random, by whole groups where a column names them, or a training and a test file."""
    from . import csv_files, datasets, tabular

    if test is not None and test_fraction is not None:
        raise errors.OptionError("--test and --test-fraction exclude each other. Leave out one of them.")
    table = csv_files.read(path)
    if group == target:
        raise errors.DataError(f"{target!r} is the target and cannot name groups.")
    groups, notes = None if group is None else csv_files.labels(table, group), ()
    encoding = tabular.encode(table, target, task=task, ignore=drop if group is None else [*drop, group])
    X, y = encoding.transform(table)
    if test is not None:
        held_out = csv_files.read(test)
        X_train, y_train = X, y
        X_test, y_test = encoding.transform(held_out)
        lines = held_out.lines
        if groups is not None and group in held_out.columns:
            notes = tuple(_shared_groups(groups, csv_files.labels(held_out, group)))
    else:
        fraction = 0.2 if test_fraction is None else test_fraction
        classes = y if encoding.classes and groups is None else None
        train, rows = datasets.split_rows(len(y), fraction, seed, labels=classes, groups=groups)
        groups = None if groups is None else groups[train]
        if groups is not None and len(np.unique(groups)) < 2:
            raise errors.DataError(
                f"{path} has 2 groups in column {group!r}, and 3 are needed: one to hold out, and two to train on."
            )
        X_train, y_train, X_test, y_test = X[train], y[train], X[rows], y[rows]
        lines = [table.lines[row] for row in rows]
    if len(y_train) < 2:
        raise errors.DataError(f"{path} leaves {len(y_train)} row to train on. At least 2 are needed.")
    return Problem(
        name=path.name,
        X_train=X_train,
        y_train=y_train,
        X_test=X_test,
        y_test=y_test,
        index={"line": lines},
        target_name=target,
        feature_names=encoding.feature_names,
        class_names=encoding.classes,
        notes=(*encoding.notes, *notes),
        groups=groups,
    )


def _shared_groups(train: np.ndarray, test: np.ndarray) -> Iterator[str]:
    """A note on groups that are not new to the model."""
    shared = np.intersect1d(train, test)
    if len(shared):
        yield (
            f"{len(shared)} of {len(np.unique(test))} groups of the test file are in the training file as well, so the "
            "scores are not those of new groups alone."
        )


# Fit and report


def run(problem: Problem, options: Options) -> None:
    """Fit, print the table of scores, and write the report."""
    from rich.console import Console
    from rich.text import Text

    from . import report

    console, status = Console(), Console(stderr=True)
    report.check_folder(options.out)
    if options.figures and importlib.util.find_spec("matplotlib") is None:
        raise errors.missing_extra("matplotlib", "plots", "Plotting (leave it out with --no-figures)")
    for note in problem.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    with _terminal.warnings_as_lines(status) as messages:
        with _terminal.stage(status, "Loading the network library …"):
            model = _new_model(problem, options)
        with _terminal.stage(status, f"Training and sampling on {len(problem.y_train):,} rows …"):
            seconds = _fit(model, problem, options)
        with _terminal.stage(status, "Predicting the held-out rows …"):
            result, noise = _evaluate(model, problem)
            details = {**_details(model, problem, options), "fit_seconds": round(seconds, 3), "constant_noise": noise}
        with _terminal.stage(status, f"Writing {options.out} …"):
            report.write(result, options.out, {**details, "warnings": messages}, figures=options.figures)
    title = f"{problem.name}: {problem.target_name}, {len(problem.y_test):,} held-out rows"
    console.print(report.score_table(result.scores, title=title))
    if noise is not None:
        console.print(Text(f"Constant noise: std {noise['std']:.4g}, from {noise['from']}."), soft_wrap=True)
    if details["compressed_columns"]:
        names = ", ".join(details["compressed_columns"])
        console.print(Text(f"Left-out rows asked for long tails to be compressed: {names}."), soft_wrap=True)
    share = f"{details['num_bayesian_weights']:,} of {details['num_weights']:,} weights are Bayesian"
    files = ", ".join(("predictions.csv", "metrics.json", *(result.figures if options.figures else ())))
    for line in (f"Fitted in {seconds:.1f} s; {share}; {details['diagnostics']}", f"Written to {options.out}: {files}"):
        console.print(Text(line), soft_wrap=True)


def _details(model: Any, problem: Problem, options: Options) -> dict[str, Any]:
    """What ``metrics.json`` says beside the scores."""
    diagnostics = model.diagnostics()
    return {
        "data": problem.name,
        "target": problem.target_name,
        "task": "classification" if problem.class_names else "regression",
        "num_train": len(problem.y_train),
        "num_test": len(problem.y_test),
        "hidden": list(options.hidden),
        "seed": options.seed,
        "num_groups": None if problem.groups is None else len(np.unique(problem.groups)),
        "compressed_columns": _compressed_columns(model, problem),
        "num_bayesian_weights": int(model.num_bayesian_weights),
        "num_weights": sum(mask.size for mask in model.partition.masks().values()),
        "diagnostics_ok": bool(diagnostics.ok),
        "diagnostics": diagnostics.verdict,
        "neurobayes": __version__,
    }


def _compressed_columns(model: Any, problem: Problem) -> list[str]:
    """Names of the columns whose long tails the model compresses."""
    compression = model.scaling.compression
    if compression is None:
        return []
    return [name for name, chosen in zip(problem.feature_names, compression.columns, strict=True) if chosen]


def _new_model(problem: Problem, options: Options) -> Any:
    import neurobayes as nb

    num_classes = len(problem.class_names) or None
    network = nb.FlaxMLP(hidden_dims=options.hidden, target_dim=num_classes or 1)
    return nb.PartialBNN(network, num_classes=num_classes, **options.selection)


def _fit(model: Any, problem: Problem, options: Options) -> float:
    """Fit the model; seconds it took."""
    draws = {"num_warmup": options.num_warmup, "num_samples": options.num_samples}
    given = {name: value for name, value in draws.items() if value is not None}
    start = time.perf_counter()
    model.fit(problem.X_train, problem.y_train, groups=problem.groups, progress_bar=False, seed=options.seed, **given)
    return time.perf_counter() - start


def _evaluate(model: Any, problem: Problem) -> tuple[Any, dict[str, Any] | None]:
    """The report on the test rows, and for regression what the constant-noise network was given."""
    from . import report

    prediction = [np.asarray(array) for array in model.predict(problem.X_test)]
    point = np.asarray(model.deterministic_predict(problem.X_test))
    if problem.class_names:
        return report.classification(
            problem.y_test, *prediction, class_names=problem.class_names, point=point, index=problem.index
        ), None
    noise = _constant_noise(model, problem)
    return report.regression(
        problem.y_test, *prediction, point=point, noise_std=noise["std"], index=problem.index, name=problem.target_name
    ), noise


def _constant_noise(model: Any, problem: Problem) -> dict[str, Any]:
    """The noise std of a deterministic network and where it is from; the test rows have no part in it."""
    from . import metrics

    if model.held_out_std is not None:
        std = float(model.held_out_std[0])
        source = "residuals on rows left out in turn from training"
    else:
        std = metrics.rmse(problem.y_train, np.asarray(model.deterministic_predict(problem.X_train)))
        source = "residuals on the training rows"
    # A network that meets every row exactly claims no noise at all, but variances must be positive.
    smallest = float(np.finfo(np.float32).eps) * (1.0 + float(np.abs(problem.y_train).max()))
    return {"std": max(std, smallest), "from": source}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"neurobayes {__version__}")
        raise typer.Exit


# Commands


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Partially Bayesian neural networks: predictions with honest error bars."""


_Out = Annotated[pathlib.Path, typer.Option("--out", help="Folder for predictions.csv, metrics.json and the figures.")]
_Figures = Annotated[bool, typer.Option("--figures/--no-figures", help="Whether to draw the figures.")]
_NumWarmup = Annotated[int | None, typer.Option(help="Warm-up steps of a sampler.", show_default="as PartialBNN.fit")]
_NumSamples = Annotated[int | None, typer.Option(help="Draws from the posterior.", show_default="as PartialBNN.fit")]


@app.command()
def demo(
    task: Annotated[
        Literal["regression", "classification"] | None, typer.Option(help="What to predict: a quantity or a class.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="diabetes, friedman (regression); breast_cancer, digits, iris, wine (classification).",
            show_default="diabetes, or breast_cancer for classification",
        ),
    ] = None,
    out: _Out = pathlib.Path("neurobayes-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of training and sampling; the split is always the same.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few draws: see that it works, not how well.")] = False,
    figures: _Figures = True,
) -> None:
    """Fit a bundled data set, compare with the deterministic network, and write figures and predictions."""
    with _terminal.errors_as_lines():
        draws = 100 if quick else None
        options = Options((64, 32, 16), {"num_probabilistic_layers": 1}, draws, draws, seed, out, figures)
        run(demo_problem(task, dataset), options)


@app.command()
def fit(
    data: Annotated[pathlib.Path, typer.Argument(metavar="DATA.csv", help="Training rows, with a header row.")],
    target: Annotated[str, typer.Option(help="Name of the column to predict.")],
    test: Annotated[pathlib.Path | None, typer.Option(help="Test rows: a CSV file with the same columns.")] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Share of DATA.csv to hold out where --test is not given.", show_default="0.2")
    ] = None,
    task: Annotated[
        Literal["auto", "regression", "classification"],
        typer.Option(help="auto: classification for a target of text, regression for one of numbers."),
    ] = "auto",
    layers: Annotated[
        str, typer.Option(help="The Bayesian layers: last:2, all, or names as in Dense0,Dense3.")
    ] = "last:1",
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers.")] = "64,32,16",
    group: Annotated[
        str | None,
        typer.Option(help="A column that names each row's batch, sample or family, which are held out as wholes."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; may be given several times.")] = None,
    num_warmup: _NumWarmup = None,
    num_samples: _NumSamples = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split, training and sampling.")] = 0,
    out: _Out = pathlib.Path("neurobayes-fit"),
    figures: _Figures = True,
) -> None:
    """Fit a CSV file and report on held-out rows.

    Columns of text are one-hot encoded and constant columns left out. A missing
    value, or text among numbers, is an error that names the column and the line.
    """
    with _terminal.errors_as_lines():
        widths = parse_hidden(hidden)
        selection = parse_layers(layers, len(widths))
        options = Options(widths, selection, num_warmup, num_samples, seed, out, figures)
        problem = csv_problem(
            data, target, test=test, test_fraction=test_fraction, task=task, drop=drop or [], seed=seed, group=group
        )
        run(problem, options)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
