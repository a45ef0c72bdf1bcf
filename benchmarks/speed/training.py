"""Deterministic training, the last-layer fit, and a cold start."""

import os
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import neurobayes as nb
from benchmarks import _common
from benchmarks._common import Check, Result

HIDDEN = [64, 32, 16]
ROWS, EPOCHS, RATE = 500, 1000, 0.01


def training(repeats: int) -> Result:
    """1,000 full-batch epochs: ours against Python loops over jitted steps, from the usual one to the leanest."""
    X, y = _common.friedman(ROWS)
    loops = _python_loops(X, y)
    functions = {
        "ours": lambda: _train(X, y, track_statistics=False),
        "ours_statistics": lambda: _train(X, y, track_statistics=True),
        **loops,
    }
    times = _common.time_together(functions, repeats)
    with _common.count_compilations() as compiled:
        _train(X, y, track_statistics=False)
        _train(X, y, track_statistics=True)
    checks = [
        Check("against a loop with reshuffle and loss read-back", _common.ratio(times, "usual", "ours"), 15),
        Check("  the same, per-weight statistics tracked", _common.ratio(times, "usual", "ours_statistics"), 15),
        Check("against the loop of Flax's own examples", _common.ratio(times, "flax_example", "ours"), 15),
        Check("against the leanest loop", _common.ratio(times, "lean", "ours")),
        Check("one lean step compiled into a scan, against ours", _common.ratio(times, "bare_scan", "ours")),
        Check("  its data an argument, not compiled in", _common.ratio(times, "bare_scan_data", "ours")),
        Check("compilations of the second call", compiled.count, 0, at_least=False, unit=""),
        Check("seconds for 1,000 epochs", times["ours"]["median"], unit="s"),
    ]
    flops = 6 * ROWS * sum(a * b for a, b in zip([8, *HIDDEN], [*HIDDEN, 1], strict=True))
    return Result(
        "training",
        checks,
        {"times": times, "matrix_flops_per_step": flops},
        f"A step is {flops / 1e6:.1f} MFLOP of matrix products, which bounds every loop from below; what a compiled "
        "run saves is Python, dispatch and eager operations. A scan with the data compiled in is faster "
        "than the same scan with the data as arguments, but compiles again for every data set.",
    )


def _train(X, y, *, track_statistics: bool):
    model = nb.DeterministicNN(nb.FlaxMLP(HIDDEN, 1), input_shape=(X.shape[1],), learning_rate=RATE)
    return model.train(X, y, epochs=EPOCHS, batch_size=ROWS, track_statistics=track_statistics, progress_bar=False)


def _python_loops(X, y) -> dict[str, Any]:
    network = nb.FlaxMLP(HIDDEN, 1)
    x = jnp.asarray((X - X.mean(0)) / X.std(0), jnp.float32)
    target = jnp.asarray(((y - y.mean()) / y.std())[:, None], jnp.float32)
    optimizer = optax.adam(RATE)
    params = jax.jit(network.init)(jax.random.key(0), x)["params"]
    start = params, jax.jit(optimizer.init)(params)

    def loss_of(params, x, y):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return 0.5 * jnp.mean((network.apply({"params": params}, x) - y) ** 2) + 0.5 * squares / ROWS

    def step_fn(params, state, x, y):
        loss, gradient = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step_fn)

    def lean():
        params, state = start
        for _ in range(EPOCHS):
            params, state, _ = step(params, state, x, target)
        jax.block_until_ready(params)

    def usual():
        (params, state), key, history = start, jax.random.key(0), []
        for _ in range(EPOCHS):
            key, key_order = jax.random.split(key)
            order = jax.random.permutation(key_order, ROWS)
            params, state, loss = step(params, state, x[order], target[order])
            history.append(float(loss))

    def scan(params, state, x, target):
        def body(carry, _):
            params, state, loss = step_fn(*carry, x, target)
            return (params, state), loss

        return jax.lax.scan(body, (params, state), None, length=EPOCHS)

    bare_scan = jax.jit(lambda params, state: scan(params, state, x, target))
    bare_scan_data = jax.jit(scan)

    return {
        "lean": lean,
        "usual": usual,
        "flax_example": _flax_example(network, params, x, target, loss_of),
        "bare_scan": lambda: jax.block_until_ready(bare_scan(*start)),
        "bare_scan_data": lambda: jax.block_until_ready(bare_scan_data(*start, x, target)),
    }


def _flax_example(network, params, x, y, loss_of):
    """The shape of the loop in Flax's published MNIST example: a TrainState, a jitted step, batches by permutation."""
    from flax.training import train_state

    state = train_state.TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(RATE))

    @jax.jit
    def compute(state, x, y):
        return jax.value_and_grad(loss_of)(state.params, x, y)

    @jax.jit
    def update(state, gradient):
        return state.apply_gradients(grads=gradient)

    def run():
        trained, key = state, jax.random.key(0)
        for _ in range(EPOCHS):
            key, key_order = jax.random.split(key)
            orders = jax.random.permutation(key_order, len(x)).reshape((1, len(x)))
            losses = []
            for order in orders:
                loss, gradient = compute(trained, x[order, ...], y[order, ...])
                trained = update(trained, gradient)
                losses.append(loss)
            np.mean(losses)

    return run


def last_layer_fit(repeats: int) -> Result:
    """Fit with the output layer Bayesian, 500 warm-up iterations and 1,000 draws: the second call.

    Above one network, as where the target comes from, and with the several of the default, which has none.
    """
    warnings.simplefilter("ignore", nb.errors.CalibrationWarning)
    X, y = _common.friedman(ROWS)
    checks, details = [], {}
    for engine, backbones in (("nuts", 1), ("auto", 1), ("auto", "auto")):
        _last_layer(X, y, num_backbones=backbones, engine=engine)
        label, target = (engine, 2.0) if backbones == 1 else ("the default, several backbones", None)
        seconds, parts = [], []
        with _common.count_compilations() as compiled:
            for _ in range(repeats):
                started = time.perf_counter()
                model = _last_layer(X, y, num_backbones=backbones, engine=engine)
                seconds.append(time.perf_counter() - started)
                parts.append(model.fit_seconds)
        checks += [
            Check(f"{label}: second fit", _common.median(seconds), target, at_least=False, unit="s"),
            *(Check(f"  of it {part}", _common.median([p[part] for p in parts]), unit="s") for part in parts[0]),
            Check(f"{label}: compilations", compiled.count, 0, at_least=False, unit=""),
        ]
        details[label] = {"seconds": seconds, "parts": parts}
    return Result("last_layer_fit", checks, details)


def _last_layer(X, y, num_backbones: int | str = "auto", **options: Any):
    model = nb.PartialBNN(nb.FlaxMLP(HIDDEN, 1), num_probabilistic_layers=1, num_backbones=num_backbones)
    return model.fit(X, y, num_warmup=500, num_samples=1000, progress_bar=False, seed=0, **options)


def cold_start(repeats: int) -> Result:
    """A fresh process from its start to predictions: how long, and how many programs it compiles."""
    runs = [_common.in_subprocess("benchmarks.speed.training:cold_run") for _ in range(repeats)]
    typical = {name: _common.median([run[name] for run in runs]) for name in runs[0]}
    checks = [
        Check("process start to predictions", typical["process_seconds"], unit="s"),
        Check("  import", typical["import"], unit="s"),
        Check("  fit", typical["fit"], unit="s"),
        Check("  predict", typical["predict"], unit="s"),
        Check("programs compiled", typical["compilations"], 40, at_least=False, unit=""),
        Check("  seconds compiling", typical["compile_seconds"], unit="s"),
    ]
    note = "The limit of 40 programs is this benchmark's reading of 'a handful'; the predecessor compiles about 210."
    return Result("cold_start", checks, {"runs": runs}, note)


def cold_run() -> dict[str, float]:
    """What a fresh process does; the modules above were imported on the way and count as import time."""
    X, y = _common.friedman(ROWS)
    with _common.count_compilations() as compiled:
        started = time.perf_counter()
        model = _last_layer(X, y)
        fitted = time.perf_counter()
        model.predict(X)
        done = time.perf_counter()
    return {
        "import": _since_process_start() - (done - started),
        "fit": fitted - started,
        "predict": done - fitted,
        "compilations": compiled.count,
        "compile_seconds": compiled.seconds,
    }


def _since_process_start() -> float:
    """Wall-clock seconds since this process was started (Linux), else since it began to use the CPU."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        started_after_boot = float(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_after_boot
    except (OSError, AttributeError):
        return time.process_time()


CASES = {"training": training, "last_layer_fit": last_layer_fit, "cold_start": cold_start}
