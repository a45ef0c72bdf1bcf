"""What a fitted model is worth on held-out rows: scores, figures and prediction tables, written as one folder."""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from . import errors, metrics, plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

LEVEL = 0.95
"""Probability of the intervals in scores, tables and figures."""

BAYESIAN = "PartialBNN"
CONSTANT_NOISE = "same net, constant noise"
POINT = "same net, point only"
DETERMINISTIC = "same net, deterministic"

_NO_SCORE = "\N{EN DASH}"
_TITLES = {
    "rmse": "RMSE",
    "nlpd": "NLPD",
    "coverage": "95 % coverage",
    "crps": "CRPS",
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """Scores of several models on the same rows, and the predictions of the first.

    Attributes
    ----------
    scores : model -> score -> value; None where a model has no such score.
    predictions : the columns of the prediction table, each of length n.
    figures : file name -> function that draws the figure.
    """

    scores: dict[str, dict[str, float | None]]
    predictions: dict[str, Sequence[Any]]
    figures: dict[str, Callable[[], "Axes"]]


def regression(
    y_true: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    point: ArrayLike | None = None,
    noise_std: float | None = None,
    index: Mapping[str, Sequence[int]] | None = None,
    name: str = "target",
    unit: str = "",
) -> Report:
    """The report of a regression model, beside a deterministic network if ``point`` is given.

    Parameters
    ----------
    y_true, mean, var : shape (n,), in the user's units; ``var`` includes the noise.
    point : predictions of the deterministic network, shape (n,).
    noise_std : the standard deviation that ``point`` is given on every row; without
        it the row of the constant-noise network is left out.
    index : name and values of a column that says which row is which; by default ``row``, 0 … n-1.
    name, unit : what the target is, for the figures.

    Notes
    -----
    The CRPS of a point prediction is its mean absolute error.
    """
    y_true, mean, var = (np.asarray(a, np.float64) for a in (y_true, mean, var))
    lower, upper = metrics.gaussian_interval(mean, var, LEVEL)
    scores: dict[str, dict[str, float | None]] = {BAYESIAN: _gaussian_scores(y_true, mean, var)}
    if point is not None:
        point = np.asarray(point, np.float64)
        if noise_std is not None:
            scores[CONSTANT_NOISE] = _gaussian_scores(y_true, point, np.full_like(point, noise_std**2))
        rmse, mae = metrics.rmse(y_true, point), metrics.mae(y_true, point)
        scores[POINT] = {"rmse": rmse, "nlpd": None, "coverage": None, "crps": mae}
    predictions = {
        **(index or {"row": range(len(y_true))}),
        "measured": y_true.tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(var).tolist(),
        "lower_95": lower.tolist(),
        "upper_95": upper.tolist(),
    }
    figures: dict[str, Callable[[], Axes]] = {
        "parity.png": lambda: plots.parity(y_true, mean, var, level=LEVEL, name=name, unit=unit),
        "calibration.png": lambda: plots.calibration(y_true, mean, var),
        "interval_width.png": lambda: plots.interval_width(y_true, mean, var, level=LEVEL, name=name, unit=unit),
    }
    return Report(scores, predictions, figures)


def _gaussian_scores(y_true: np.ndarray, mean: np.ndarray, var: np.ndarray) -> dict[str, float | None]:
    return {
        "rmse": metrics.rmse(y_true, mean),
        "nlpd": metrics.nlpd(y_true, mean, var),
        "coverage": metrics.coverage(y_true, mean, var, LEVEL),
        "crps": metrics.crps(y_true, mean, var),
    }


def classification(
    labels: ArrayLike,
    probabilities: ArrayLike,
    uncertainty: ArrayLike,
    *,
    class_names: Sequence[str],
    point: ArrayLike | None = None,
    index: Mapping[str, Sequence[int]] | None = None,
) -> Report:
    """The report of a classifier, beside a deterministic network if ``point`` is given.

    Parameters
    ----------
    labels : shape (n,), in ``0..C-1``.
    probabilities : shape (n, C).
    uncertainty : shape (n,).
    class_names : what the C classes are called.
    point : class probabilities of the deterministic network, shape (n, C).
    index : name and values of a column that says which row is which; by default ``row``, 0 … n-1.
    """
    labels = np.asarray(labels)
    probabilities, uncertainty = np.asarray(probabilities, np.float64), np.asarray(uncertainty, np.float64)
    scores = {BAYESIAN: _class_scores(labels, probabilities)}
    if point is not None:
        scores[DETERMINISTIC] = _class_scores(labels, np.asarray(point, np.float64))
    names = np.array(list(class_names), dtype=object)
    if len(names) != probabilities.shape[1]:
        raise errors.DataError(f"class_names has {len(names)} names for {probabilities.shape[1]} classes.")
    predictions = {
        **(index or {"row": range(len(labels))}),
        "label": names[labels].tolist(),
        "predicted": names[probabilities.argmax(axis=1)].tolist(),
        **{f"probability_{name}": column.tolist() for name, column in zip(names, probabilities.T, strict=True)},
        "uncertainty": uncertainty.tolist(),
    }
    figures: dict[str, Callable[[], Axes]] = {
        "reliability.png": lambda: plots.reliability(labels, probabilities),
        "confidence.png": lambda: plots.confidence_histogram(labels, probabilities),
        "uncertainty.png": lambda: plots.uncertainty_histogram(labels, probabilities, uncertainty),
    }
    return Report(scores, predictions, figures)


def _class_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    scores = (metrics.accuracy, metrics.nll, metrics.ece, metrics.brier)
    return {score.__name__: score(labels, probabilities) for score in scores}


def score_table(scores: Mapping[str, Mapping[str, float | None]], *, title: str = "") -> "Table":
    """The scores as a rich table: one row per model, an en dash where a model has no such score."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    names = list(next(iter(scores.values())))
    for name in names:
        table.add_column(_TITLES.get(name, name), justify="right", no_wrap=True)
    for model, row in scores.items():
        cells = [_NO_SCORE if (value := row[name]) is None else _format(name, value) for name in names]
        table.add_row(model, *cells, style="bold" if model == BAYESIAN else "")
    return table


def _format(name: str, value: float) -> str:
    if name in ("coverage", "accuracy"):
        return f"{value:.3f}"
    return (
        f"{value:#.4g}" if 1e-3 < abs(value) < 1e3 else f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"
    )


# Files


def check_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """``folder`` as a path, if a report can be written there; nothing is created.

    Raises
    ------
    OptionError
        If it, or what it would lie in, is a file, or may not be written to.
    """
    path = pathlib.Path(folder)
    existing = next(part for part in (path, *path.absolute().parents) if part.exists() or part.is_symlink())
    if not existing.is_dir():
        raise errors.OptionError(f"{existing} exists and is not a folder. Choose another output folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise errors.OptionError(f"{existing} may not be written to. Choose another output folder.")
    return path


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary folder whose files replace those in ``folder`` once all are complete.

    If the block raises, ``folder`` is left as it was.
    """
    path = check_folder(folder)
    created = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    stage = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path))
    try:
        yield stage
        files = sorted(stage.iterdir())
        for file in files:
            if (path / file.name).is_dir():
                raise errors.OptionError(f"{path / file.name} is a folder. Move it, or choose another output folder.")
        for file in files:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        for file in files:
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):  # it holds something: the report is there
                path.rmdir()


def write(report: Report, folder: str | os.PathLike[str], details: Mapping[str, Any], *, figures: bool = True) -> None:
    """Write ``predictions.csv``, ``metrics.json`` and the figures into ``folder``, all or nothing.

    Parameters
    ----------
    report : what ``regression`` or ``classification`` returned.
    folder : created if need be; files of these names in it are replaced.
    details : further entries of ``metrics.json``, which holds the scores as ``scores``.
    figures : whether to draw the figures.

    Raises
    ------
    OptionError
        If ``folder`` is a file or may not be written to.
    MissingExtraError
        If figures are wanted and Matplotlib is not installed.
    """
    with staged(folder) as stage:
        with open(stage / "predictions.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(report.predictions)
            writer.writerows(zip(*report.predictions.values(), strict=True))
        text = json.dumps({**details, "scores": report.scores}, indent=2, ensure_ascii=False, allow_nan=False)
        (stage / "metrics.json").write_text(text + "\n", encoding="utf-8")
        if figures:
            for name, draw in report.figures.items():
                figure: Any = draw().figure
                figure.savefig(stage / name)
