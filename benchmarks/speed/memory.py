"""Peak memory of prediction and of fitting a large frozen network, each in a process of its own."""

import gc
import itertools
import time

import jax
import numpy as np

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result

GB, MB = 1e9, 1e6


def prediction_memory(repeats: int) -> Result:
    """Moments of a million rows from 1,000 draws."""
    run = _common.in_subprocess("benchmarks.speed.memory:predict_many", num_rows=1_000_000, num_draws=1000)
    checks = [
        Check("peak memory of the process", run["peak_bytes"] / GB, 2.0, at_least=False, unit="GB"),
        Check("  before predicting", run["before_bytes"] / GB, unit="GB"),
        Check("seconds", run["seconds"], unit="s"),
    ]
    return Result("prediction_memory", checks, run)


def predict_many(num_rows: int, num_draws: int) -> dict[str, float]:
    X, y = _common.friedman(500)
    model = nb.PartialBNN(nb.FlaxMLP([64, 32, 16], 1), num_probabilistic_layers=1)
    model.fit(X, y, num_warmup=200, num_samples=num_draws, sgd_epochs=100, map_sigma=1.0, progress_bar=False)
    before = _common.peak_memory_bytes()
    rows, _ = _common.friedman(num_rows, seed=1)
    started = time.perf_counter()
    mean, variance = model.predict(rows)
    seconds = time.perf_counter() - started
    assert mean.shape == variance.shape == (num_rows,) and np.all(variance > 0)
    return {"before_bytes": before, "seconds": seconds}


# 5,055,301 weights, of which the output layer's 500 are Bayesian.
LARGE = [1600, 2400, 499]
SMALL = [16, 24, 499]
"""The same Bayesian weights on next to no frozen ones: what compiling and sampling take by themselves."""

LARGE_ROWS, LARGE_DRAWS = 500, 1000


def frozen_memory(repeats: int) -> Result:
    """Fitting 500 Bayesian weights on top of 5 million frozen ones, against one forward pass and the draws."""
    name = "benchmarks.speed.memory:"
    runs = {
        f"{function} {hidden}": [_common.in_subprocess(name + function, hidden=hidden) for _ in range(min(repeats, 3))]
        for function in ("one_forward_pass", "fit_on_frozen")
        for hidden in (LARGE, SMALL)
    }
    peak_forward, small_forward, peak_fit, small_fit = (
        _common.median([run["peak_bytes"] for run in each]) for each in runs.values()
    )
    imports = _common.median([run["imported_bytes"] for each in runs.values() for run in each])
    fit = runs[f"fit_on_frozen {LARGE}"]
    checks = [
        Check("fit / (forward pass + draws), whole process", peak_fit / peak_forward, 1.3, at_least=False),
        Check("  fit", peak_fit / MB, unit="MB"),
        Check("  forward pass + draws", peak_forward / MB, unit="MB"),
        Check("  of both: the libraries, imported", imports / MB, unit="MB"),
        Check("  ratio without the libraries", (peak_fit - imports) / (peak_forward - imports)),
        Check(
            "  the same at best, 5 million weights costing no more than in the forward pass",
            (small_fit + peak_forward - small_forward - imports) / (peak_forward - imports),
        ),
        Check("  ratio of what the 5 million weights add", (peak_fit - small_fit) / (peak_forward - small_forward)),
        Check("  fit without them, libraries excluded", (small_fit - imports) / MB, unit="MB"),
        Check("  forward pass + draws without them, libraries excluded", (small_forward - imports) / MB, unit="MB"),
        Check("seconds of the fit", _common.median([run["seconds"] for run in fit]), unit="s"),
    ]
    note = (
        "Without the libraries, most of a fit is what compiled programs take (the same for a network of a few weights, "
        "which is why the last lines fit one): a forward pass compiles one program, a fit about fifteen."
    )
    return Result("frozen_memory", checks, runs, note)


def one_forward_pass(hidden: list[int]) -> dict[str, float]:
    imported = _import_everything()
    network, params, X, _ = _network(hidden)
    outputs = jax.jit(network.apply)({"params": params}, X)
    draws = np.ones((LARGE_DRAWS, hidden[-1] + 2), np.float32)
    assert np.all(np.isfinite(outputs)) and draws.all()
    return {"imported_bytes": imported}


def fit_on_frozen(hidden: list[int]) -> dict[str, float]:
    imported = _import_everything()
    network, params, X, y = _network(hidden)
    started = time.perf_counter()
    model = nb.PartialBNN(network, num_probabilistic_layers=1, deterministic_weights=params)
    model.fit(X, y, num_warmup=100, num_samples=LARGE_DRAWS, progress_bar=False)
    assert model.num_bayesian_weights == hidden[-1] + 1
    return {"imported_bytes": imported, "seconds": time.perf_counter() - started}


def _network(hidden: list[int]):
    """Network, weights and data, made without leaving anything else in memory."""
    network = nb.FlaxMLP(hidden, 1)
    rng = np.random.default_rng(0)
    sizes = [8, *hidden, 1]
    params = {
        f"Dense{i}": {
            "kernel": rng.standard_normal((a, b), np.float32) / np.float32(np.sqrt(a)),
            "bias": np.zeros(b, np.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    X, y = _common.friedman(LARGE_ROWS)
    X = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    return network, params, X, (y - y.mean()) / y.std()


def _import_everything() -> int:
    """Load all that a fit loads, so that both processes start from the same memory."""
    import arviz_stats.base  # noqa: F401

    import neurobayes.inference.nuts
    import neurobayes.models.partial_bnn  # noqa: F401

    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(3, np.float32)))
    gc.collect()
    return _common.peak_memory_bytes()


CASES = {"prediction_memory": prediction_memory, "frozen_memory": frozen_memory}
