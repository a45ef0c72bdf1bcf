"""What each ingredient of the default contributes: the same splits with one thing changed at a time."""

from collections.abc import Sequence

from benchmarks.quality import configuration, scores
from benchmarks.quality.table import (
    Record,
    Report,
    Settings,
    Table,
    Task,
    markdown_table,
    number,
    options_for,
    run_problem,
)

# Data set: (protocol, splits in the fast mode, splits in all).
SETS = {
    "boston": ("standard", 1, 5),
    "concrete": ("standard", 1, 5),
    "friedman": ("friedman", 1, 5),
    "diabetes": ("diabetes", 1, 5),
    "freesolv": ("initial", 1, 5),
    "esol": ("initial", 1, 5),
}
METRICS = {"nll": "NLL (Gaussian form)", "coverage": "95 % coverage", "rmse": "RMSE"}
NOTES = (
    "Each row changes the default configuration as named; rows of `ABLATION` in `configuration.py`. Boston and "
    "concrete: standard splits; Friedman (500 rows) and diabetes in standard deviations of the training target; "
    "freesolv with 32 and esol with 56 training rows (the initial rows of the active-learning protocol), the other "
    "rows are the test set. Means over splits."
)


def tasks(settings: Settings) -> list[Task]:
    found = []
    for row, changes in configuration.ABLATION.items():
        for dataset, (protocol, fast, full) in SETS.items():
            options = options_for("ours", protocol, settings)
            options["options"] = options["options"] | changes
            for split in settings.split_numbers(fast, full):
                found.append(Task("ablation", dataset, split, row, options))
    return found


def report(records: Sequence[Record], settings: Settings) -> Report:
    summary = scores.summarise(records, lambda record: (record["method"], record["dataset"]))
    names = [row for row in configuration.ABLATION if any(method == row for method, _ in summary)]
    parts = [NOTES]
    for metric, title in [*METRICS.items(), ("seconds", "Seconds of fit and prediction, median")]:
        statistic = "median" if metric == "seconds" else "mean"
        lines = [
            [row, *(number(summary[row, d][metric][statistic]) if (row, d) in summary else "" for d in SETS)]
            for row in names
        ]
        parts += [f"### {title}", markdown_table(["configuration", *SETS], lines)]
    rows = [{"configuration": row, "dataset": dataset, **found} for (row, dataset), found in summary.items()]
    return Report("\n\n".join(parts), rows)


TABLES = [Table("ablation", "Ablation of the default configuration", tasks, report, run_problem)]
