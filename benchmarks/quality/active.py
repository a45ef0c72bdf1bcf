"""Active learning by the protocol of Allec & Ziatdinov (2025): one point of largest variance at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common
from benchmarks._common import Check
from benchmarks.quality import configuration, data, published, scores
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
)

STEPS, FAST_STEPS, SEEDS = 200, 20, 5
SETTLED_AFTER = 2  # compilations are counted after this step
METRICS = ("rmse", "mae", "nll", "coverage")
# Of the fully Bayesian network over 200 steps: NLPD at step 0, mean NLPD, final RMSE.
TARGETS = {
    "esol": (1.28, 1.10, 0.643),
    "freesolv": (1.96, 1.56, 0.901),
    "htem_conductivity": (1.20, 0.56, 0.156),
}
SECONDS_PER_STEP = 3.0
# Our models, as changes of the one configuration, and what the report calls them.
MODELS: dict[str, dict[str, Any]] = {"ours": {}, "first layers": configuration.FIRST_LAYERS}
LABELS = {"ours": "ours, default", "first layers": "ours, first layers Bayesian"}

FitPredict = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def tasks(settings: Settings) -> list[Task]:
    steps = STEPS if settings.full else FAST_STEPS
    found = []
    for method, changes in MODELS.items():
        changed = dataclasses.replace(settings, changes={**changes, **settings.changes})
        # With room, all is compiled at once for as many rows as there will be.
        options = options_for("ours", "active", changed, steps=steps, refit=configuration.ACTIVE_REFIT, room=True)
        found += [
            Task("active", dataset, split, method, options)
            for dataset in TARGETS
            for split in settings.split_numbers(1, SEEDS)
        ]
    return found


def run(task: Task, folder: Path) -> dict[str, Any]:
    X, y, initial = data.active_pool(folder, task.dataset)
    num_steps, known = task.options["steps"], initial[task.split]
    steps = learn(X, y, known, num_steps, _ours(X, y, task, most_rows=len(known) + num_steps))
    curves = {name: [step[name] for step in steps] for name in steps[0]}
    settled = [step["compilations"] for step in steps[SETTLED_AFTER + 1 :]]
    return {
        "first_nll": curves["nll"][0],
        "first_coverage": curves["coverage"][0],
        "mean_nll": float(np.mean(curves["nll"])),
        "mean_coverage": float(np.mean(curves["coverage"])),
        "final_rmse": curves["rmse"][-1],
        "step_seconds": float(np.median(curves["seconds"][1:] or curves["seconds"])),
        "late_compilations": int(np.sum(settled)),
        "seconds": float(np.sum(curves["seconds"])),
        "curves": curves,
    }


def learn(
    X: np.ndarray, y: np.ndarray, initial: np.ndarray, num_steps: int, fit_predict: FitPredict
) -> list[dict[str, Any]]:
    """At each step: fit, score the rest of the pool, then move its row of largest epistemic variance over.

    ``fit_predict(known, pool)`` takes row numbers and gives mean, variance and epistemic variance of the pool's rows.
    Where the noise is the same for all rows, as in the paper, the largest variance is the largest epistemic one.
    """
    known, steps = np.asarray(initial), []
    for _ in range(num_steps):
        pool = data.others(known, len(y))
        with _common.count_compilations() as compiled:
            started = time.perf_counter()
            mean, var, epistemic = fit_predict(known, pool)
            seconds = time.perf_counter() - started
        found = scores.regression(y[pool], mean, var)
        chosen = int(pool[np.argmax(epistemic)])
        steps.append(
            {name: found[name] for name in METRICS}
            | {"seconds": seconds, "compilations": compiled.count, "chosen": chosen, "rows": len(known)}
        )
        known = np.append(known, chosen)
    return steps


def _ours(X: np.ndarray, y: np.ndarray, task: Task, most_rows: int) -> FitPredict:
    import warnings

    import neurobayes as nb
    from benchmarks.quality import methods

    network, constructor, fit = configuration.sort_options(task.options["options"])
    example = data.Problem(X, y, X, y[:0])
    model = nb.PartialBNN(methods.network_for(example, network), **constructor)
    refit = task.options["refit"]
    if task.options.get("room"):
        fit = fit | {"room_for": most_rows}

    def fit_predict(known: np.ndarray, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        nonlocal fit
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(X[known], y[known], progress_bar=False, seed=task.split, **fit)
        fit = fit | refit
        found = model.posterior_predictive(X[pool])
        return found.mean, found.var, found.epistemic_var

    return fit_predict


def report(records: Sequence[Record], settings: Settings) -> Report:
    parts = [
        "Initial rows as published, inputs standardised on all rows, raw targets (log10 for htem), one row of largest "
        "epistemic variance per step, metrics on the remaining pool, mean over seeds. NLPD is the Gaussian form. Ours: "
        "the default configuration, and the network of the paper with its first two layers Bayesian. "
        "Theirs: the fully Bayesian network, the partially Bayesian run with the least mean NLPD, and the Gaussian "
        "process; the means over steps are over the same steps as ours."
    ]
    rows, checks, drawn = [], [], {}
    for dataset in TARGETS:
        members = [record for record in records if record["dataset"] == dataset]
        if members:
            found = _section(dataset, members, settings)
            parts += [f"### {dataset}", found.markdown]
            rows += found.rows
            checks += found.checks
            drawn[dataset] = found.curves
    return Report("\n\n".join(parts), rows, checks, functools.partial(_draw, drawn) if drawn else None)


@dataclasses.dataclass
class _Section:
    """What a report says of one data set."""

    markdown: str
    rows: list[dict[str, Any]]
    checks: list[Check]
    curves: Mapping[str, Mapping[str, np.ndarray]]


def _section(dataset: str, members: Sequence[Record], settings: Settings) -> _Section:
    steps = max(record["options"]["steps"] for record in members)  # a full run beside a fast one
    members = [record for record in members if record["options"]["steps"] == steps]
    runs = {name: [record for record in members if record["method"] == name] for name in MODELS}
    runs = {name: found for name, found in runs.items() if found}
    ours = {name: scores.summarise(found, lambda record: record["dataset"])[dataset] for name, found in runs.items()}
    published_curves = published.active_curves(settings.reference, dataset)
    theirs = {
        label: curve
        for label, prefix in _PUBLISHED.items()
        if (curve := published.best_curve(published_curves, prefix, steps)) is not None
    }
    curves = {LABELS[name]: _mean_curves(found) for name, found in runs.items()}
    curves |= {
        label: {name: values[:steps] for name, values in curve.values.items()} for label, curve in theirs.items()
    }
    seeds = {name: len(found) for name, found in runs.items()}
    rows = [
        {"dataset": dataset, "method": name, "steps": steps, **ours[name], "curves": _plain(curves[LABELS[name]])}
        for name in ours
    ]
    rows += [{"dataset": dataset, "published": curve.run, "curves": _plain(curve.values)} for curve in theirs.values()]
    full_bnn = theirs.get("fully Bayesian")
    checks = [
        check
        for name, found in runs.items()
        for check in _checks(f"{dataset}, {name}", TARGETS[dataset], ours[name], full_bnn, steps, found)
    ]
    tables = [f"{steps} steps", _summary_table(ours, seeds, theirs, steps), _curve_table(curves, steps)]
    return _Section("\n\n".join(tables), rows, checks, curves)


_PUBLISHED = {
    "fully Bayesian": published.FULLY_BAYESIAN,
    "partially Bayesian": published.PARTIALLY_BAYESIAN,
    "Gaussian process": published.GAUSSIAN_PROCESS,
}


def _plain(curves: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: np.asarray(values).tolist() for name, values in curves.items()}


def _mean_curves(members: Sequence[Record]) -> dict[str, np.ndarray]:
    return {name: np.mean([record["metrics"]["curves"][name] for record in members], 0) for name in METRICS}


def _summary_table(
    ours: Mapping[str, Any], seeds: Mapping[str, int], theirs: Mapping[str, published.Curve], steps: int
) -> str:
    header = ["run", "seeds", "NLPD, step 0", "coverage, step 0", "mean NLPD", "mean coverage", "final RMSE",
              "seconds a step", "compilations after step 2"]  # fmt: skip
    names = ("first_nll", "first_coverage", "mean_nll", "mean_coverage", "final_rmse")
    lines = [
        [f"**{LABELS[method]}**", str(seeds[method]), *(number(found[name]["mean"]) for name in names),
         number(found["step_seconds"]["median"], 2), number(found["late_compilations"]["mean"], 0)]
        for method, found in ours.items()
    ]  # fmt: skip
    for label, curve in theirs.items():
        nll, coverage = curve.values["nll"][:steps], curve.values["coverage"][:steps]
        found = (nll[0], coverage[0], nll.mean(), coverage.mean(), curve.values["rmse"][:steps][-1])
        lines.append([f"{label} ({curve.run})", str(SEEDS), *map(number, map(float, found)), "", ""])
    return markdown_table(header, lines)


def _curve_table(runs: Mapping[str, Mapping[str, np.ndarray]], steps: int) -> str:
    shown = sorted({s for s in (0, 5, 10, 20, 50, 100, 150) if s < steps} | {steps - 1})
    header = ["step", *(f"{name}: {label}" for name in ("RMSE", "NLPD", "coverage") for label in runs)]
    lines = [
        [str(s), *(number(float(run[name][s])) for name in ("rmse", "nll", "coverage") for run in runs.values())]
        for s in shown
    ]
    return markdown_table(header, lines)


def _draw(drawn: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], path: Path) -> None:
    """One row of panels for each data set; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = {"rmse": "RMSE", "nll": "NLPD", "coverage": "95 % coverage"}
    figure = Figure(figsize=(12, 3 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), len(shown), squeeze=False)
    for axes, (dataset, runs) in zip(grid, drawn.items(), strict=True):
        for panel, (name, title) in zip(axes, shown.items(), strict=True):
            for label, curves in runs.items():
                panel.plot(curves[name], label=label, linewidth=2 if label in LABELS.values() else 1)
            panel.set(title=f"{dataset}: {title}", xlabel="step")
            if name == "coverage":
                panel.axhspan(0.90, 0.98, color="0.9")
            if name == "nll":  # a bad start of one run would hide all others
                values = np.concatenate([curves["nll"] for curves in runs.values()])
                panel.set_ylim(values.min() - 0.1, min(values.max() + 0.1, values.min() + 3))
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def _checks(
    case: str,
    targets: tuple[float, float, float],
    ours: Mapping[str, Any],
    full_bnn: published.Curve | None,
    steps: int,
    members: Sequence[Record],
) -> list[Check]:
    first, mean, final = targets
    if steps != STEPS:  # a fast run is held against the same first steps of theirs
        mean = full_bnn.mean_nll(steps) if full_bnn else None
        final = float(full_bnn.values["rmse"][steps - 1]) if full_bnn else None
    checks = [at_most(f"{case}: NLPD at step 0", ours["first_nll"]["mean"], first)]
    if mean is not None and final is not None:
        checks += [
            at_most(f"{case}: mean NLPD over {steps} steps", ours["mean_nll"]["mean"], mean),
            at_most(f"{case}: final RMSE", ours["final_rmse"]["mean"], final),
        ]
    for record in members:  # the target is for every run
        checks += coverage_checks(f"{case}, seed {record['split'] + 1}, step 0", record["metrics"]["first_coverage"])
    return [
        *checks,
        at_most(f"{case}: seconds a step, median", ours["step_seconds"]["median"], SECONDS_PER_STEP, "s"),
        at_most(f"{case}: compilations after step 2", ours["late_compilations"]["mean"], 0),
    ]


TABLES = [Table("active", "Active learning (Allec & Ziatdinov 2025)", tasks, report, run)]
