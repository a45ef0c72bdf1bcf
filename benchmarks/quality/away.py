"""Predictions away from the data: the default model on two one-dimensional sets, drawn for the documentation.

Of ``snelson1d`` the rows with 1.5 < x < 3 are left out; ``agw1d`` has gaps of its own. Prints how much larger the
epistemic standard deviation is in the gaps, and beyond the data, than where there are data.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _common
from benchmarks.quality import configuration
from benchmarks.quality.data import MissingData, numbers, read_columns

DEFAULT_DATA = _common.ROOT.parent / "shared" / "data"
DEFAULT_OUT = _common.ROOT / "docs" / "images"
LEFT_OUT = {"snelson1d": (1.5, 3.0), "agw1d": None}
MARGIN = 0.3
"""Share of the data's range that is drawn beyond each end."""

WIDEST_HOLE = 0.1
"""A stretch without rows that is longer than this share of the range is a gap."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.away", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, metavar="DIR", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        sets = {name: load(options.data, name) for name in LEFT_OUT}
    except MissingData as error:
        print(error, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (x, y, left_out) in sets.items():
        started = time.perf_counter()
        found = curves(x, y, options.seed)
        seconds = time.perf_counter() - started
        on, gap, beyond = regions(x, found["x"])
        std = np.sqrt(found["epistemic_var"])
        noise = np.sqrt(found["aleatoric_var"].mean())
        print(
            f"{name}: {len(x)} rows, {seconds:.1f} s. Epistemic std {std[on].mean():.3f} on the data "
            f"(noise {noise:.3f}); "
            f"{std[gap].mean() / std[on].mean():.1f} times as much in the gaps, "
            f"{std[beyond].mean() / std[on].mean():.1f} times beyond the data"
        )
        draw(options.out / f"{name}.png", x, y, left_out, found)
    return 0


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``x`` and ``y`` of the training rows, and the rows left out ``(k, 2)``."""
    rows = numbers(read_columns(folder / name / "train.csv"), ["x", "y"])
    hole = LEFT_OUT[name]
    inside = np.zeros(len(rows), bool) if hole is None else (rows[:, 0] > hole[0]) & (rows[:, 0] < hole[1])
    return rows[~inside, 0], rows[~inside, 1], rows[inside]


def curves(x: np.ndarray, y: np.ndarray, seed: int) -> Mapping[str, np.ndarray]:
    """Mean, both variances and the 95 % interval of the default model on a grid."""
    import neurobayes as nb

    network, constructor, fit = configuration.sort_options(configuration.OUR_MODEL)
    model = nb.PartialBNN(nb.FlaxMLP(target_dim=1, **network), **constructor)
    model.fit(x[:, None], y, seed=seed, progress_bar=False, **fit)
    beyond = MARGIN * np.ptp(x)
    grid = np.linspace(x.min() - beyond, x.max() + beyond, 300)
    prediction: Any = model.posterior_predictive(grid[:, None], quantiles=[0.025, 0.975])
    return {
        "x": grid, "mean": prediction.mean, "epistemic_var": prediction.epistemic_var,
        "aleatoric_var": prediction.aleatoric_var,
        "low": prediction.quantiles[0.025], "high": prediction.quantiles[0.975],
    }  # fmt: skip


def regions(x: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which grid points are among the rows, in the middle half of a gap, and beyond all rows."""
    ordered = np.sort(x)
    below = np.searchsorted(ordered, grid)
    inside = (below > 0) & (below < len(x))
    left, right = ordered[np.clip(below - 1, 0, None)], ordered[np.clip(below, None, len(x) - 1)]
    width = np.where(inside, right - left, 0.0)
    hole = width > WIDEST_HOLE * np.ptp(x)
    middle = hole & (np.minimum(grid - left, right - grid) > width / 4)
    return inside & ~hole, middle, ~inside


def draw(path: Path, x: np.ndarray, y: np.ndarray, left_out: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    """The mean, the 95 % interval and two epistemic standard deviations, in a small file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 2.8), layout="constrained")
    axes = figure.subplots()
    band = 2.0 * np.sqrt(found["epistemic_var"])
    axes.fill_between(found["x"], found["low"], found["high"], color="#dbe7f3", lw=0, label="95 % interval")
    axes.fill_between(found["x"], found["mean"] - band, found["mean"] + band, color="#9dbfe0", lw=0,
                      label="epistemic part, 2 std")  # fmt: skip
    axes.plot(found["x"], found["mean"], color="#1f4e79", lw=1.5, label="mean")
    axes.plot(x, y, ".", color="black", ms=3, label="training rows")
    if len(left_out):
        axes.plot(*left_out.T, "x", color="#c0504d", ms=4, label="left out")
    axes.set(xlabel="x", ylabel="y", xlim=(found["x"][0], found["x"][-1]))
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
