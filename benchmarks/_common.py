"""Timing, memory and reporting that all benchmarks share."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("neurobayes", "jax", "jaxlib", "flax", "optax", "numpyro", "blackjax", "numpy")
_MARK = "benchmark-result:"


@dataclasses.dataclass(frozen=True)
class Check:
    """One number against its target; ``target`` None is a number that is only reported."""

    name: str
    measured: float
    target: float | None = None
    at_least: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "met": self.met}


@dataclasses.dataclass
class Result:
    """What one case found: its checks, and every raw number behind them."""

    case: str
    checks: list[Check]
    details: dict[str, Any]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "checks": [check.to_dict() for check in self.checks],
            "details": self.details,
            "note": self.note,
        }


def time_together(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each function, run in turn (A B A B …) so that a busy spell of the machine hits all alike.

    Each runs once before, to compile. Returns median, minimum and all times by name.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"median": median(s), "min": min(s), "all": s} for name, s in seconds.items()}


def ratio(times: Mapping[str, Mapping[str, Any]], numerator: str, denominator: str) -> float:
    """Median over rounds of the ratio within the round, which a slow spell of the machine leaves alone."""
    return median(np.asarray(times[numerator]["all"]) / np.asarray(times[denominator]["all"]))


def median(values: Any) -> float:
    return float(np.median(values))


@dataclasses.dataclass
class Compilations:
    """XLA compilations while ``count_compilations`` was open."""

    count: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts the programs XLA compiles inside the block."""
    import jax

    found, is_open = Compilations(), True

    def listen(event: str, duration: float, **_: Any) -> None:
        # The listener stays registered, since JAX has no public way to take a single one away.
        if is_open and event == "/jax/core/compile/backend_compile_duration":
            found.count += 1
            found.seconds += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        is_open = False


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far.

    On Linux from /proc: the figure of ``getrusage`` also counts what the parent
    held when it started the process.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_subprocess(target: str, **arguments: Any) -> dict[str, Any]:
    """Call ``module:function(**arguments)`` in a fresh process; its dict, with ``process_seconds`` and peak memory.

    Memory and cold-start figures mean something only in a process that has done nothing else.
    """
    command = [sys.executable, "-m", "benchmarks._common", target, json.dumps(arguments)]
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{target} failed in its process:\n{done.stderr[-2000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK))
    return {**json.loads(line.removeprefix(_MARK)), "process_seconds": seconds}


def environment() -> dict[str, Any]:
    """Where the numbers were measured."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_average": load,
        "versions": versions,
    }


def write_json(path: Path, results: list[Result]) -> None:
    """Results by case, keeping those of cases that were not run this time."""
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    where = environment()
    kept.update({result.case: {**result.to_dict(), "environment": where} for result in results})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cases": kept}, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else np.asarray(value).tolist()


def table(results: list[Result]) -> str:
    """A Markdown table: one line per check."""
    rows = [("case", "check", "measured", "target", "met")]
    for result in results:
        for check in result.checks:
            sign = "≥" if check.at_least else "≤"
            target = "" if check.target is None else f"{sign} {check.target:.4g} {check.unit}"
            met = {None: "", True: "yes", False: "NO"}[check.met]
            rows.append((result.case, check.name, f"{check.measured:.4g} {check.unit}", target, met))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"{result.case}: {result.note}" for result in results if result.note]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def friedman(num_rows: int, num_columns: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Data like Friedman's first problem: five columns matter, unit noise."""
    rng = np.random.default_rng(seed)
    X = rng.random((num_rows, num_columns))
    signal = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2 + 10 * X[:, 3] + 5 * X[:, 4]
    return X, signal + rng.normal(size=num_rows)


def _main() -> None:
    module, function = sys.argv[1].split(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(_MARK + json.dumps({**found, "peak_bytes": peak_memory_bytes()}, default=_plain))


if __name__ == "__main__":
    _main()
