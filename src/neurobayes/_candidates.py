"""What held-out rows say of candidates that were scored on the same ones: which are alike, and a sentence."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

LEAST_ROWS = 3
"""With fewer rows, how much the scores scatter is not known."""


def standard_error(values: np.ndarray) -> float:
    """Of the mean of ``values``; NaN for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def equals(losses: Mapping[str, np.ndarray | None], best: str | None) -> tuple[str, ...]:
    """The candidates whose mean loss the rows cannot tell from that of the best."""
    if best is None:
        return ()
    behind = {name: loss - losses[best] for name, loss in losses.items() if loss is not None}
    return tuple(n for n, d in behind.items() if len(d) < LEAST_ROWS or abs(d.mean()) <= 2 * standard_error(d))


def closing(table: Iterable[Mapping[str, Any]], best: str, equal: Iterable[str], score: str, num_rows: int) -> str:
    """The line below the table: the best, what scored better but is not to be trusted, and what is as good."""
    others = {row["name"]: row for row in table if row["status"] == "done"}
    row = others.pop(best)
    sentence = f"* best: {best}, by {score} on {num_rows} held-out row{'s' * (num_rows != 1)}"
    if not row["ok"]:
        sentence += ", although no candidate's draws can be trusted yet"
    if not others:
        return f"{sentence}; no other candidate was scored."
    better = [name for name, other in others.items() if other[score] < row[score]]
    if better:
        sentence += f", among those whose draws can be trusted ({', '.join(better)} scored better and cannot be yet)"
    if num_rows < LEAST_ROWS:
        return f"{sentence}. So few rows cannot tell candidates apart: raise held_out_fraction."
    alike = [name for name in equal if name != best]
    if alike:
        mixed = any(others[name]["ok"] != row["ok"] for name in alike)
        which = "the cheapest of them whose draws can be trusted" if mixed else "the cheapest of them"
        return f"{sentence}. These rows cannot tell it from {', '.join(alike)}: {which} will do."
    if len(better) == len(others):
        return f"{sentence}."
    rest = "the others" if better else "all others"
    return f"{sentence}; {rest} that were scored are worse by two standard errors or more."
