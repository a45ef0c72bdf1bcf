"""Published results, as the files of the reference folder have them; empty where that folder is not there."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FULLY_BAYESIAN = "bnn8888/"
PARTIALLY_BAYESIAN = "pbnn"
GAUSSIAN_PROCESS = "gp/"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published method on one data set; ``nll`` is the negative of the mean test log likelihood."""

    method: str
    rmse: float | None = None
    nll: float | None = None
    seconds: float | None = None
    source: str = ""


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def uci(reference: Path, dataset: str, kind: str) -> list[Entry]:
    """Entries in the units of the data for splits that start with ``kind`` ("standard" or "gap"), best first."""
    found: dict[str, Entry] = {}
    for row in _rows(reference / "published_uci.csv"):
        is_listed = row["dataset"] == dataset and row["split"].startswith(kind) and row["target_scale"] == "raw"
        if not is_listed or row["metric"] not in ("RMSE", "NLL", "LL"):
            continue
        method = row["method"] if row["split"] in ("gap", "standard20x90/10") else f"{row['method']}, {row['split']}"
        source = row["source"] if not row["source"].startswith("same") else found[method].source
        entry = found.get(method, Entry(method, source=source))
        value = float(row["value"])
        new = {"rmse": value} if row["metric"] == "RMSE" else {"nll": value if row["metric"] == "NLL" else -value}
        found[method] = dataclasses.replace(entry, **new)
    return best_first(list(found.values()))


def airfoil(reference: Path) -> list[Entry]:
    """Means over the runs of the bde paper; ``nll_mean`` (one noise level for all) where a method has no own one."""
    rows = _rows(reference / "bde_paper_results_airfoil.csv")
    entries = []
    for method in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == method]
        own = all(row["nll_default"] for row in runs)
        entries.append(
            Entry(
                method if own else f"{method} (one noise level)",
                float(np.mean([float(row["rmse"]) for row in runs])),
                float(np.mean([float(row["nll_default" if own else "nll_mean"]) for row in runs])),
                float(np.mean([float(row["total_time"]) for row in runs])),
                "bde paper, 10 cores",
            )
        )
    return best_first(entries)


def best_first(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (entry.nll is None, entry.nll))


def best_nll(entries: Sequence[Entry]) -> float | None:
    return min((entry.nll for entry in entries if entry.nll is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Means over seeds at each step of an active-learning run: arrays by metric."""

    run: str
    values: dict[str, np.ndarray]

    def mean_nll(self, steps: int) -> float:
        return float(self.values["nll"][:steps].mean())


def active_curves(reference: Path, dataset: str) -> list[Curve]:
    """Every run of 200 steps on the data set in Allec & Ziatdinov (2025)."""
    name = {"htem_conductivity": "htem"}.get(dataset, dataset)
    runs: dict[str, list[dict[str, str]]] = {}
    for row in _rows(reference / "allec_ziatdinov_2025_al_curves.csv"):
        if row["dataset"] == name:
            label = f"{row['run']} {row['activation']}".strip()
            runs.setdefault(label, []).append(row)
    names = {"rmse": "rmse_mean", "mae": "mae_mean", "nll": "nlpd_mean", "coverage": "cov95_mean"}
    return [
        Curve(label, {metric: np.array([float(row[column]) for row in rows]) for metric, column in names.items()})
        for label, rows in runs.items()
        if len(rows) > 1
    ]


def best_curve(curves: Sequence[Curve], prefix: str, steps: int) -> Curve | None:
    """The run with the least mean NLPD over the first steps, of those whose name starts with ``prefix``."""
    return min(
        (curve for curve in curves if curve.run.startswith(prefix)), key=lambda c: c.mean_nll(steps), default=None
    )
