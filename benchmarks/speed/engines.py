"""Effective draws of the predicted function per second, against the predecessor and against bare samplers."""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result
from neurobayes.diagnostics import effective_sample_size
from neurobayes.inference import ENGINES

from .bare_samplers import gradient_rates

HIDDEN = [64, 32, 16]
PREDECESSOR = "neurobayes==0.0.14"
# The wheel of that release does not name these, though it imports them.
UNDECLARED = ("matplotlib", "scikit-learn")
TIME_LIMIT = 600

# size -> (Bayesian part, warm-up, draws, factor wanted over the predecessor)
SIZES: dict[str, tuple[Any, int, int, float]] = {
    "last_layer": (nb.last(1), 500, 1000, 1000.0),
    "two_layers": (nb.last(2), 500, 1000, 5.0),
    "all_layers": (nb.everything(), 100, 200, 5.0),
}
# Which engines make sense for which size; a name that is not in the registry is passed over.
CANDIDATES = {
    "last_layer": ("last_layer", "nuts", "mclmc", "laplace"),
    "two_layers": ("nuts", "mclmc", "laplace", "svi"),
    "all_layers": ("nuts", "mclmc", "laplace", "svi"),
}
APPROXIMATE = ("laplace", "svi")


def engines(repeats: int) -> Result:
    """500 x 8 data, [64, 32, 16]: every engine on three sizes of Bayesian part, all in this one run."""
    X, y = _common.friedman(500)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    rows = np.linspace(0, len(X) - 1, 64).astype(int)
    weights = nb.DeterministicNN(nb.FlaxMLP(HIDDEN, 1), input_shape=(8,)).train(X, y, epochs=200, progress_bar=False)
    with tempfile.TemporaryDirectory() as folder:
        old, note = _predecessor(Path(folder), X, y, rows)
    checks, details = [], {"predecessor": old}
    for size in SIZES:
        found = {}
        for engine in CANDIDATES[size]:
            if engine not in ENGINES:
                continue
            found[engine] = _measure(size, engine, X, y, rows, weights, min(repeats, 3))
            rate = found[engine]["ess_per_second"]
            checks.append(Check(f"{size}, {engine}: effective draws per second", rate, unit="/s"))
        details[size] = found
        checks += _against(size, found, old.get(size))
    checks += gradient_rates(X, y, weights, repeats, details)
    return Result("engines", checks, details, note)


def _against(size: str, found: dict[str, dict], old: dict | None) -> list[Check]:
    """The best engine that samples the identical posterior, against the predecessor measured here."""
    if old is None or "ess_per_second" not in old:
        return []
    exact = [value["ess_per_second"] for name, value in found.items() if name not in APPROXIMATE]
    wanted = SIZES[size][3]
    checks = [Check(f"{size}: predecessor, effective draws per second", old["ess_per_second"], unit="/s")]
    return [*checks, Check(f"{size}: best engine / predecessor", max(exact) / old["ess_per_second"], wanted)]


def _measure(size: str, engine: str, X, y, rows, weights, repeats: int) -> dict[str, Any]:
    choice, num_warmup, num_samples, _ = SIZES[size]
    seconds, ess = [], []
    for repeat in range(repeats + 1):
        model = nb.PartialBNN(nb.FlaxMLP(HIDDEN, 1), bayesian=choice, deterministic_weights=weights)
        started = time.perf_counter()
        model.fit(X, y, num_warmup, num_samples, engine=engine, progress_bar=False, seed=repeat)
        elapsed = time.perf_counter() - started
        if repeat == 0:
            cold = elapsed
            continue
        seconds.append(elapsed)
        ess.append(function_ess(_function_draws(model, X[rows])))
    divergent = int(np.sum(model.posterior.stats.get("diverging", 0)))
    return {
        "ess": _common.median(ess),
        "seconds": _common.median(seconds),
        "first_seconds": cold,
        "ess_per_second": _common.median(np.asarray(ess) / np.asarray(seconds)),
        "divergent": divergent,
    }


def _function_draws(model, X) -> np.ndarray:
    from neurobayes import predictive

    fitted = model._require_fitted()
    return predictive.function_draws(fitted.source, fitted.scaling.inputs(X), fitted.source.theta)[..., 0]


def function_ess(draws: np.ndarray) -> float:
    """Median over rows of the effective sample size of the predicted function; ``draws`` is (draw, row)."""
    return float(np.median(effective_sample_size(draws[None])))


def _predecessor(folder: Path, X, y, rows) -> tuple[dict[str, Any], str]:
    """Install the predecessor into an environment of its own, run it there, and measure its draws as ours."""
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    try:
        venv.create(folder / "venv", with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", PREDECESSOR, *UNDECLARED]
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=TIME_LIMIT)
    except (subprocess.SubprocessError, OSError) as error:
        message = f"the predecessor could not be installed and is left out ({type(error).__name__})."
        print(message, file=sys.stderr)
        return {}, message
    np.savez(folder / "data.npz", X=X, y=y, rows=rows)
    script = Path(__file__).with_name("predecessor.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found: dict[str, Any] = {}
    for size in SIZES:
        command = [str(python), str(script), str(folder / "data.npz"), str(folder), size]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, cwd=folder, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            found[size] = {"failed": f"longer than {TIME_LIMIT} s"}
            continue
        if done.returncode:
            found[size] = {"failed": done.stderr[-500:]}
            continue
        report = json.loads(done.stdout.strip().splitlines()[-1])
        ess = function_ess(np.load(folder / f"{size}.npz")["draws"])
        found[size] = {**report, "ess": ess, "ess_per_second": ess / report["seconds"]["fit"]}
    failed = [f"{size}: {value['failed']}" for size, value in found.items() if "failed" in value]
    note = "The predecessor's rate is that of its one fit, compilation included: it compiles in every fit."
    return found, " ".join([note, *failed])


CASES = {"engines": engines}
