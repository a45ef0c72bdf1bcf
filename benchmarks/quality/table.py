"""What a table is: a list of tasks, a way to run one of them, and a report of the records they left."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common
from benchmarks._common import Check
from benchmarks.quality import configuration

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    data: Path
    full: bool = False
    splits: int | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of OUR_MODEL

    @property
    def reference(self) -> Path:
        """Published results lie beside the data."""
        return self.data.parent / "reference"

    @property
    def our_model(self) -> dict[str, Any]:
        return configuration.OUR_MODEL | dict(self.changes)

    def split_numbers(self, fast: int, full: int) -> range:
        """The first splits: as many as asked for, else the table's default for the mode."""
        count = self.splits or (full if self.full else fast)
        return range(min(count, full))


@dataclasses.dataclass(frozen=True)
class Task:
    """One (data set, split, method) of a table, with all options that its result depends on."""

    table: str
    dataset: str
    split: int
    method: str
    options: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return configuration.digest(self.options)

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.dataset, self.split, self.method, self.digest

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "options": dict(self.options)}


@dataclasses.dataclass
class Report:
    """A table as Markdown, its numbers, and what was checked against the targets."""

    markdown: str
    rows: list[dict[str, Any]]
    checks: list[Check] = dataclasses.field(default_factory=list)
    figure: Callable[[Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """One command of the benchmark."""

    name: str
    title: str
    tasks: Callable[[Settings], list[Task]]
    report: Callable[[Sequence[Record], Settings], Report]
    run: Callable[[Task, Path], dict[str, Any]]
    needs_data: bool = True


def options_for(method: str, protocol: str, settings: Settings, **more: Any) -> dict[str, Any]:
    """All that a result of one of the ``METHODS`` depends on, apart from data set and split."""
    if method != "ours":
        return {"method": method, "protocol": protocol, "options": configuration.BASELINES[method], **more}
    network = configuration.NETWORKS[configuration.NETWORK_OF.get(protocol, "mlp")]
    return {"method": method, "protocol": protocol, "options": settings.our_model, "network": network, **more}


def run_problem(task: Task, folder: Path) -> dict[str, Any]:
    """Fit the task's method on the split's training rows and score it on the test rows.

    With ``warm`` all is done twice and the second time is the one in ``seconds``.
    """
    from benchmarks.quality import data, methods, scores

    problem = data.PROTOCOLS[task.options["protocol"]](folder, task.dataset, task.split)
    hidden = dataclasses.replace(problem, y_test=np.empty(0))
    method = methods.METHODS[task.options["method"]]
    found: dict[str, Any] = {"train_rows": len(problem.y_train), "test_rows": len(problem.y_test)}
    with _common.count_compilations() as compiled:
        started = time.perf_counter()
        prediction = method(hidden, task.options["options"], task.split)
        seconds = time.perf_counter() - started
    if task.options.get("warm"):
        found |= {"cold_seconds": seconds}
        started = time.perf_counter()
        prediction = method(hidden, task.options["options"], task.split)
        seconds = time.perf_counter() - started
    if prediction.probabilities is not None:
        found |= scores.classification(problem.y_test, prediction.probabilities)
    elif prediction.mean is not None and prediction.var is not None:
        density = prediction.log_density(problem.y_test) if prediction.log_density else None
        found |= scores.regression(problem.y_test, prediction.mean, prediction.var, density, prediction.interval)
    return {**found, "seconds": seconds, "compilations": compiled.count, "notes": prediction.notes}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Three digits after the point, four significant ones where that would be too few; empty for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4g}"


def with_error(statistics: Mapping[str, float] | None, digits: int = 3) -> str:
    """Mean ± standard error over splits; the mean alone for one split."""
    if statistics is None:
        return ""
    text = number(statistics["mean"], digits)
    return text if statistics["num"] < 2 else f"{text} ± {number(statistics['error'], digits)}"


def coverage_checks(name: str, coverage: float) -> list[Check]:
    return [
        Check(f"{name}: 95 % coverage, not below", coverage, 0.90, unit=""),
        Check(f"{name}: 95 % coverage, not above", coverage, 0.98, at_least=False, unit=""),
    ]


def at_most(name: str, measured: float, target: float, unit: str = "") -> Check:
    return Check(name, measured, target, at_least=False, unit=unit)
