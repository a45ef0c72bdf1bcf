"""Accuracy, negative log likelihood and calibration error of class probabilities."""

from collections.abc import Sequence

from benchmarks.quality import methods, scores
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
    with_error,
)

METHODS = ("ours", "logistic", "forest_classes")
# Data set: (protocol, splits in the fast mode, splits in all); 0 leaves it out of the fast mode.
SETS = {
    "ionosphere": ("half", 2, 5),
    "heart": ("half", 2, 5),
    "nir_milk_powder": ("spectra", 1, 5),
    "mnist_t10k, 1,000 rows": ("few_digits", 1, 1),
    "mnist_t10k": ("digits", 0, 1),
}
NOTES = (
    "Ionosphere and heart: half of the rows for testing (as in MILE, whose 10 % for validation we train on); "
    "nir_milk_powder: a fifth. The test rows are the last of `numpy.random.default_rng(1 + split).permutation(n)`. "
    "MNIST: rows 0–7,999 against rows 8,000–9,999 of the 10,000, and a small variant of 1,000 against 1,000. Spectra "
    "and digits go through a ConvNet, spectra along one axis. ECE has 15 bins of equal width of the top probability. "
    "The reference folder holds no published numbers for these splits."
)


def tasks(settings: Settings) -> list[Task]:
    return [
        Task("classification", dataset, split, method, options_for(method, protocol, settings))
        for dataset, (protocol, fast, full) in SETS.items()
        for method in METHODS
        for split in (settings.split_numbers(fast, full) if fast or settings.full else ())
    ]


def report(records: Sequence[Record], settings: Settings) -> Report:
    summary = scores.summarise(records, lambda record: (record["dataset"], record["method"]))
    header = ["data set", "method", "accuracy", "NLL", "ECE", "Brier", "seconds", "splits"]
    lines = [
        [
            dataset,
            f"**{method}**" if method == "ours" else method,
            *(with_error(found[name]) for name in ("accuracy", "nll", "ece", "brier")),
            number(found["seconds"]["median"], 1),
            str(found["nll"]["num"]),
        ]
        for (dataset, method), found in sorted(summary.items(), key=lambda item: list(SETS).index(item[0][0]))
    ]
    used = dict.fromkeys(record["method"] for record in records)
    legend = "Methods:\n\n" + "\n".join(f"- {method}: {methods.DESCRIPTIONS[method]}" for method in used)
    rows = [{"dataset": dataset, "method": method, **found} for (dataset, method), found in summary.items()]
    return Report("\n\n".join([NOTES, markdown_table(header, lines), legend]), rows)


TABLES = [Table("classification", "Classification", tasks, report, run_problem)]
