"""Tables of repeated splits of regression data: UCI standard and gap splits, steels, two small sets, sequences."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._common import Check
from benchmarks.quality import methods, published, scores
from benchmarks.quality.published import Entry
from benchmarks.quality.table import (
    Record,
    Report,
    Settings,
    Table,
    Task,
    at_most,
    coverage_checks,
    markdown_table,
    number,
    options_for,
    run_problem,
    with_error,
)

METHODS = ("ours", "gp", "forest", "ensemble")
# Data set: (protocol, splits in the fast mode, splits in all).
UCI = {
    "boston": ("standard", 2, 20),
    "concrete": ("standard", 2, 20),
    "energy": ("standard", 2, 20),
    "wine_red": ("standard", 2, 20),
    "airfoil": ("bde", 1, 1),
    "naval": ("standard", 1, 20),
}
GAP = {
    "boston": ("gap", 2, 13),
    "concrete": ("gap", 2, 8),
    "energy": ("gap", 2, 8),
    "wine_red": ("gap", 2, 11),
    "naval": ("gap", 1, 16),
}
STEELS = {"matbench_steels": ("steels", 2, 5)}
SMALL = {"friedman": ("friedman", 2, 5), "diabetes": ("diabetes", 2, 5)}
SEQUENCES = {"esol": ("smiles", 1, 3), "lipophilicity": ("smiles", 0, 1)}

AIRFOIL_TARGETS = {"rmse": 0.1216, "nll": -0.934, "seconds": 24.0}
SMALL_TARGETS = {"friedman": {"nll": -0.10}, "diabetes": {"rmse": 0.72, "nll": 1.08}}
WARM_SECONDS = {"friedman": 5.0}
STEELS_DUMMY_MAE = 229.7445  # the leaderboard's mean predictor


def tasks(name: str, sets: Mapping[str, tuple[str, int, int]], settings: Settings, used: Sequence[str]) -> list[Task]:
    """Split by split, so that two workers share the longest data set."""
    return [
        Task(name, dataset, split, method, options_for(method, protocol, settings, **_more(name, method)))
        for dataset, (protocol, fast, full) in sets.items()
        for method in used
        for split in (settings.split_numbers(fast, full) if fast or settings.full else ())
    ]


def _more(name: str, method: str) -> dict[str, Any]:
    return {"warm": True} if name == "small" and method == "ours" else {}


def entries_for(name: str, dataset: str, settings: Settings) -> list[Entry]:
    """Published results for a data set of a table."""
    if name == "uci" and dataset == "airfoil":
        return published.airfoil(settings.reference)
    if name in ("uci", "gap"):
        return published.uci(settings.reference, dataset, "standard" if name == "uci" else "gap")
    if name == "steels":
        return [Entry("mean of the training rows: MAE 229.74", source="Matbench leaderboard")]
    return []


def report(
    name: str, sets: Mapping[str, tuple[str, int, int]], notes: str, records: Sequence[Record], settings: Settings
) -> Report:
    summary = scores.summarise(records, lambda record: (record["dataset"], record["method"]))
    parts, rows, checks = [notes], [], []
    for dataset in sets:
        ours = {method: found for (name_, method), found in summary.items() if name_ == dataset}
        if not ours:
            continue
        entries = entries_for(name, dataset, settings)
        parts += [f"### {dataset}", _one_set(ours, entries)]
        rows += [{"dataset": dataset, "method": method, **found} for method, found in ours.items()]
        rows += [{"dataset": dataset, "published": True, **vars(entry)} for entry in entries]
        if "ours" in ours:
            checks += _checks(name, dataset, ours["ours"], entries)
    used = dict.fromkeys(record["method"] for record in records)
    parts += ["Methods run here:\n\n" + "\n".join(f"- {method}: {methods.DESCRIPTIONS[method]}" for method in used)]
    return Report("\n\n".join(parts), rows, checks)


def _one_set(ours: Mapping[str, Mapping[str, Any]], entries: Sequence[Entry]) -> str:
    header = [
        "method",
        "RMSE",
        "MAE",
        "NLL, Gaussian",
        "NLL, own density",
        "95 % coverage",
        "seconds",
        "splits, or source",
    ]
    lines = [
        [
            f"**{method}**" if method == "ours" else method,
            with_error(found["rmse"]),
            with_error(found["mae"]),
            with_error(found["nll"]),
            with_error(found.get("nll_own")),
            number(found["coverage"]["mean"]),
            number(found["seconds"]["median"], 1),
            str(found["rmse"]["num"]),
        ]
        for method, found in ours.items()
    ]
    lines += [
        [e.method, number(e.rmse), "", number(e.nll), "", "", number(e.seconds, 1), e.source or "published"]
        for e in entries
    ]
    return markdown_table(header, lines)


def _checks(name: str, dataset: str, found: Mapping[str, Any], entries: Sequence[Entry]) -> list[Check]:
    checks = coverage_checks(dataset, found["coverage"]["mean"])
    forms = {"Gaussian": found["nll"]["mean"]}
    if "nll_own" in found:
        forms = {"own density": found["nll_own"]["mean"]} | forms
    rmse, seconds = found["rmse"]["mean"], found["seconds"]["median"]
    best = published.best_nll(entries)
    if name == "uci" and dataset == "airfoil":
        best = AIRFOIL_TARGETS["nll"]
        checks += [
            at_most(f"{dataset}: RMSE", rmse, AIRFOIL_TARGETS["rmse"]),
            at_most(f"{dataset}: seconds", seconds, AIRFOIL_TARGETS["seconds"], "s"),
        ]
    if name == "uci" and best is not None:
        checks += [at_most(f"{dataset}: NLL ({form}), best published", nll, best) for form, nll in forms.items()]
    for metric, target in SMALL_TARGETS.get(dataset, {}).items() if name == "small" else ():
        values = forms.items() if metric == "nll" else [("", rmse)]
        checks += [at_most(f"{dataset}: {metric.upper()} {form}".strip(), value, target) for form, value in values]
    if name == "small" and dataset == "friedman":
        coverage = found["coverage"]["mean"]
        checks += [Check("friedman: 95 % coverage, not below", coverage, 0.93, unit="")]
        checks += [at_most("friedman: warm seconds, fit and predict", seconds, WARM_SECONDS["friedman"], "s")]
    if name == "steels":
        checks += [at_most(f"{dataset}: MAE, mean predictor", found["mae"]["mean"], STEELS_DUMMY_MAE, "MPa")]
    return checks


def _table(
    name: str, title: str, sets: Mapping[str, tuple[str, int, int]], notes: str, used: Sequence[str] = METHODS
) -> Table:
    return Table(
        name,
        title,
        functools.partial(_tasks_of, name, sets, used),
        functools.partial(report, name, sets, notes),
        run_problem,
        needs_data=name != "small",
    )


def _tasks_of(name: str, sets: Mapping[str, tuple[str, int, int]], used: Sequence[str], settings: Settings):
    return tasks(name, sets, settings, used)


TABLES = [
    _table(
        "uci",
        "UCI, standard splits",
        UCI,
        "Twenty random 90/10 splits, metrics in the units of the target; airfoil: the one split of the bde paper, "
        "inputs and target in standard deviations of the training rows. NLL is the negative mean test log "
        "likelihood: of a Gaussian with the predictive mean and variance, and of the method's own density. "
        "Mean ± standard error over splits; seconds are the median of fit and prediction in one thread.",
    ),
    _table(
        "gap",
        "UCI, gap splits",
        GAP,
        "For each feature the middle third of the rows is the test set (Foong et al. 2019). Columns as for the "
        "standard splits.",
    ),
    _table(
        "steels",
        "matbench_steels",
        STEELS,
        "The five Matbench folds; 13 composition columns; yield strength in MPa.",
    ),
    _table(
        "small",
        "Friedman-1 and diabetes",
        SMALL,
        "In standard deviations of the training target. Friedman: 500 training rows of 8 columns, 2,000 fresh test "
        "rows, a new draw of both for each split. Diabetes: 350 training rows, the split of `neurobayes demo` every "
        "time, the model's seed varies. Seconds of ours are those of a second fit and prediction in the same process.",
    ),
    _table(
        "sequences",
        "SMILES with a Transformer",
        SEQUENCES,
        "Character tokens (Cl, Br and @@ are one), 80/20 splits: the test rows are the last fifth of "
        "`numpy.random.default_rng(1 + split).permutation(n)`. The forest takes 9 descriptors instead.",
        ("ours", "forest"),
    ),
]
