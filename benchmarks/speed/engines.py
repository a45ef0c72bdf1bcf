"""Effective draws of the predicted function per second, against the predecessor and against bare samplers."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result
from neurobayes.diagnostics import effective_sample_size
from neurobayes.inference import MCLMC, NUTS, Engine, Laplace, LastLayer

from .bare_samplers import gradient_rates

HIDDEN = [64, 32, 16]
PREDECESSOR = "neurobayes==0.0.14"
EPOCHS = 500  # of a cold start that searches for nothing, as the predecessor does not

# The wheel of that release does not name these, though it imports them.
UNDECLARED = ("matplotlib", "scikit-learn")
TIME_LIMIT = 1200
CHAINS = 2

NOISE = functools.partial(nb.priors.default_noise_prior, np.ones(1))


@dataclasses.dataclass(frozen=True)
class Size:
    """A Bayesian part, the effort it is given, and what runs on it.

    ``engines`` maps a label to (engine, how many times as many draws, chains). ``exact`` are those whose draws are
    of the posterior itself; the rest is reported only.
    """

    bayesian: Any
    num_warmup: int
    num_samples: int
    wanted: float
    engines: Mapping[str, tuple[Engine | None, int, int]]
    exact: tuple[str, ...]
    prior_mean: str = "map"


SAMPLERS: dict[str, tuple[Engine | None, int, int]] = {
    "auto": (None, 1, 1),
    f"auto, {CHAINS} chains": (None, 1, CHAINS),
    "nuts": (NUTS(), 1, 1),
    "mclmc, collapsed": (MCLMC(collapse=True), 1, 1),
    f"mclmc, collapsed, {CHAINS} chains": (MCLMC(collapse=True), 1, CHAINS),
    "mclmc, adjusted, collapsed": (MCLMC(adjusted=True, collapse=True), 1, 1),
    "laplace": (Laplace(), 1, 1),
}
UNBIASED = (f"auto, {CHAINS} chains", "auto", "nuts", "mclmc, adjusted, collapsed")
SIZES = {
    "last_layer": Size(
        nb.last(1), 500, 1000, 1000.0,
        # Exact draws cost next to nothing each, so that a thousand would time everything but them.
        {"last_layer": (LastLayer(), 50, 1), "last_layer, 1,000 draws": (LastLayer(), 1, 1), "nuts": (NUTS(), 1, 1)},
        ("last_layer", "last_layer, 1,000 draws", "nuts"),
    ),
    "two_layers": Size(nb.last(2), 500, 1000, 5.0, SAMPLERS, UNBIASED),
    "all_layers": Size(nb.everything(), 100, 200, 5.0, SAMPLERS, UNBIASED, prior_mean="zero"),
}  # fmt: skip


def engines(repeats: int) -> Result:
    """500 x 8 data, [64, 32, 16]: every engine on three sizes of Bayesian part, all in this one run."""
    X, y, weights = _trained()
    rows = np.linspace(0, len(X) - 1, 64).astype(int)
    checks: list[Check] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        old = _Predecessor(Path(folder), X, y, rows, dict(weights.get_params()))
        for name, size in SIZES.items():
            theirs = old.run(name)
            found, draws = _measure_all(size, X, y, rows, weights, min(repeats, 3))
            details[name] = {"ours": found, "predecessor": theirs}
            for label, value in found.items():
                rate = value["ess_per_second"]
                checks.append(Check(f"{name}, {label}: effective draws per second", rate, unit="/s"))
            checks += _against(name, size, found, theirs)
            checks += _agreements(name, size, draws, theirs.pop("draws", None))
            print(_common.table([Result(name, checks, {})]), file=sys.stderr, flush=True)
    return Result("engines", checks, details, old.note)


def cold_engines(repeats: int) -> Result:
    """Process start to predictions, exact last layer, in turn with the predecessor's."""
    X, y, weights = _trained()
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        old = _Predecessor(Path(folder), X, y, np.arange(64), dict(weights.get_params()))
        return Result("cold_engines", _cold_starts(old, min(repeats, 3), details), details, old.note)


def gradients(repeats: int) -> Result:
    """Gradients per second against bare samplers, and compilations of a second fit with more rows."""
    X, y, weights = _trained()
    details: dict[str, Any] = {}
    return Result("gradients", gradient_rates(X, y, weights, repeats, details) + _more_rows(X, y), details)


def _trained():
    """500 rows of 8 columns at unit scale, and a network trained on them."""
    warnings.simplefilter("ignore", nb.errors.CalibrationWarning)  # one network on all rows, as in the predecessor
    X, y = _common.friedman(500)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    network = nb.DeterministicNN(nb.FlaxMLP(HIDDEN, 1), input_shape=(8,))
    return X, y, network.train(X, y, epochs=200, progress_bar=False)


def _measure_all(size: Size, X, y, rows, weights, repeats: int):
    """Timings by label, and the draws of the last run of each, ``(chain, draw, row)``."""
    found, draws = {}, {}
    for label, (engine, factor, num_chains) in size.engines.items():
        found[label], draws[label] = _measure(size, engine, factor, num_chains, X, y, rows, weights, repeats)
        print(label, found[label], file=sys.stderr, flush=True)
    return found, draws


def _measure(size: Size, engine, factor: int, num_chains: int, X, y, rows, weights, repeats: int):
    seconds, ess = [], []
    for repeat in range(repeats + 1):
        model = nb.PartialBNN(
            nb.FlaxMLP(HIDDEN, 1), bayesian=size.bayesian, deterministic_weights=weights, noise_prior=NOISE(),
            prior_mean=size.prior_mean, num_backbones=1,
        )  # fmt: skip
        # The first fit compiles. For the slow samplers it is short: their programs serve every number of draws.
        short = repeat == 0 and isinstance(engine, NUTS | MCLMC | None)
        num_samples = 60 if short else factor * size.num_samples
        started = time.perf_counter()
        model.fit(X, y, size.num_warmup, num_samples, num_chains, engine=engine, progress_bar=False, seed=repeat)
        elapsed = time.perf_counter() - started
        if repeat == 0:
            continue
        draws = _function_draws(model, X[rows]).reshape(num_chains, -1, len(rows))
        seconds.append(elapsed)
        ess.append(function_ess(draws))
    info = model.posterior.info
    return {
        "engine": info["engine"],
        "collapsed": bool(info.get("collapsed", False)),
        "ess": _common.median(ess),
        "seconds": _common.median(seconds),
        "ess_per_second": _common.median(np.asarray(ess) / np.asarray(seconds)),
        "divergent": int(np.sum(model.posterior.stats.get("diverging", 0))),
        "verdict": model.diagnostics().verdict,
    }, draws


def _function_draws(model, X) -> np.ndarray:
    from neurobayes import predictive

    fitted = model._require_fitted()
    (member,) = fitted.members
    return predictive.function_draws(member.source, fitted.scaling.inputs(X), member.source.theta)[..., 0]


def function_ess(draws: np.ndarray) -> float:
    """Median over rows of the effective sample size of the predicted function; ``draws`` is (chain, draw, row)."""
    return float(np.median(effective_sample_size(draws)))


def _against(name: str, size: Size, found: dict[str, dict], theirs: dict) -> list[Check]:
    """Engines that sample the identical posterior, against the predecessor measured here; the first has the target."""
    if "ess_per_second" not in theirs:
        return []
    checks = [Check(f"{name}: predecessor, effective draws per second", theirs["ess_per_second"], unit="/s")]
    for label in size.exact:
        best = label == size.exact[0]
        ratio = found[label]["ess_per_second"] / theirs["ess_per_second"]
        checks.append(Check(f"{name}: {label} / predecessor", ratio, size.wanted if best else None))
    return checks


def _agreements(name: str, size: Size, draws: dict[str, np.ndarray], theirs: np.ndarray | None) -> list[Check]:
    """Moments of the predicted function against plain NUTS, in Monte-Carlo standard errors."""
    wanted = 4.5 if name == "last_layer" else None  # elsewhere short runs on curved posteriors: reported only
    first = size.exact[0]
    checks = [_agreement(f"{name}: {first} against nuts", draws[first], draws["nuts"], wanted)]
    if theirs is not None:
        checks.append(_agreement(f"{name}: {first} against the predecessor", draws[first], theirs[None], wanted))
    return checks


def _agreement(name: str, a: np.ndarray, b: np.ndarray, wanted: float | None) -> Check:
    def moments(draws):
        spread = draws.std(axis=(0, 1))
        ess = effective_sample_size(draws, "mean")
        of_squares = effective_sample_size((draws - draws.mean(axis=(0, 1))) ** 2, "mean")
        return draws.mean(axis=(0, 1)), spread, spread**2 / ess, 0.5 / of_squares

    (mean_a, std_a, error_a, log_a), (mean_b, std_b, error_b, log_b) = moments(a), moments(b)
    by_mean = np.abs(mean_a - mean_b) / np.sqrt(error_a + error_b)
    by_std = np.abs(np.log(std_a / std_b)) / np.sqrt(log_a + log_b)
    largest = float(max(by_mean.max(), by_std.max()))
    return Check(f"{name}: largest difference of moments", largest, wanted, at_least=False, unit="standard errors")


class _Predecessor:
    """The predecessor in an environment of its own, or a note that says why it is not there."""

    def __init__(self, folder: Path, X, y, rows, params: dict):
        self.folder, self.is_there = folder, False
        self.python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        leaves = {f"{layer}/{leaf}": np.asarray(v) for layer, part in params.items() for leaf, v in part.items()}
        np.savez(folder / "data.npz", X=X, y=y, rows=rows, **leaves)
        try:
            venv.create(folder / "venv", with_pip=True)
            install = [str(self.python), "-m", "pip", "install", "--quiet", PREDECESSOR, *UNDECLARED]
            subprocess.run(install, check=True, capture_output=True, text=True, timeout=TIME_LIMIT)
        except (subprocess.SubprocessError, OSError) as error:
            self.note = f"the predecessor could not be installed and is left out ({type(error).__name__})."
            print(self.note, file=sys.stderr)
            return
        self.is_there = True
        self.note = "The predecessor's rate is that of its one fit, compilation included: it compiles in every fit."

    def run(self, case: str) -> dict[str, Any]:
        """Its report on one case, with the draws; why there is none; nothing if it is not installed."""
        if not self.is_there:
            return {}
        script = Path(__file__).with_name("predecessor.py")
        command = [str(self.python), str(script), str(self.folder / "data.npz"), str(self.folder), case]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, cwd=self.folder, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            return self._failed(case, f"longer than {TIME_LIMIT} s")
        if done.returncode:
            return self._failed(case, done.stderr[-500:])
        elapsed = time.perf_counter() - started
        report = json.loads(done.stdout.strip().splitlines()[-1])
        draws = np.load(self.folder / f"{case}.npz")["draws"]
        ess = function_ess(draws[None])
        rate = ess / report["seconds"]["fit"]
        return {**report, "process_seconds": elapsed, "ess": ess, "ess_per_second": rate, "draws": draws}

    def _failed(self, case: str, why: str) -> dict[str, Any]:
        self.note += f" {case} failed there: {why}"
        return {"failed": why}


def _cold_starts(old: _Predecessor, repeats: int, details: dict[str, Any]) -> list[Check]:
    """Process start to predictions with an exact last layer, in turn with the predecessor's."""
    labels = {
        "default": "cold start",
        "nothing searched": f"cold start, prior scale and {EPOCHS} epochs given",
        "kept programs": "cold start, programs kept by cache_programs",
    }
    found: dict[str, list[float]] = {label: [] for label in labels}
    theirs = []
    with tempfile.TemporaryDirectory() as folder:
        _cold(programs=folder)  # fills the folder
        for _ in range(repeats):
            report = old.run("cold")
            if "process_seconds" in report:
                theirs.append(report["process_seconds"])
            found["default"].append(_cold())
            found["nothing searched"].append(_cold(epochs=EPOCHS))
            found["kept programs"].append(_cold(programs=folder))
    details["cold"] = {**found, "predecessor": theirs}
    checks = []
    for label, text in labels.items():
        checks.append(Check(f"{text}: to predictions", _common.median(found[label]), unit="s"))
        if len(theirs) == len(found[label]):
            ratio = _common.median(np.asarray(theirs) / np.asarray(found[label]))
            checks.append(Check(f"{text}: predecessor / ours", ratio, 4.0))
    return checks


def _cold(**options: Any) -> float:
    return _common.in_subprocess("benchmarks.speed.cold:run", **options)["process_seconds"]


def _more_rows(X, y) -> list[Check]:
    """Compilations of a second fit with five per cent more rows."""
    checks = []
    for label, choice in (("last_layer", nb.last(1)), ("two_layers", nb.last(2))):
        model = nb.PartialBNN(nb.FlaxMLP(HIDDEN, 1), bayesian=choice, num_backbones=1)
        options = {"num_warmup": 100, "num_samples": 100, "progress_bar": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nb.errors.ConvergenceWarning)
            fewer = round(len(X) / 1.05)
            model.fit(X[:fewer], y[:fewer], **options)
            with _common.count_compilations() as compiled:
                model.fit(X, y, **options)
        name = f"{label}: compilations of a second fit with 5 % more rows"
        checks.append(Check(name, compiled.count, 0, at_least=False, unit=""))
    return checks


CASES = {"engines": engines, "cold_engines": cold_engines, "gradients": gradients}
