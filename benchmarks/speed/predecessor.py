"""Runs inside the throw-away environment of the predecessor: fits by its public documentation and saves function draws.

    python predecessor.py DATA.npz OUT_DIR CASE

``mu`` among its samples is the predicted function at the training rows. Never imported by the benchmark.
"""

import json
import sys
import time
from pathlib import Path

started = time.perf_counter()

import numpy as np  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

import neurobayes as nb  # noqa: E402

HIDDEN = [64, 32, 16]
CASES = {
    "last_layer": (["Dense3"], 500, 1000),
    "two_layers": (["Dense2", "Dense3"], 500, 1000),
    "all_layers": (None, 100, 200),
    "cold": (["Dense3"], 500, 1000),
}


def main() -> None:
    data, out, case = np.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    layers, num_warmup, num_samples = CASES[case]
    network = nb.FlaxMLP(hidden_dims=HIDDEN, target_dim=1, activation="tanh")
    # The same deterministic weights and noise prior as ours: the posterior is the same. A cold start trains its own.
    weights: dict = {}
    for name in sorted(name for name in data.files if "/" in name):
        layer, leaf = name.split("/")
        outer = f"MLPLayerModule_{layer.removeprefix('Dense')}"  # as its own get_params() nests them
        weights.setdefault(outer, {}).setdefault(layer, {})[leaf] = data[name]
    options = {} if case == "cold" else {"noise_prior": dist.HalfNormal(1.0)}
    imported = time.perf_counter()
    if layers is None:
        model = nb.BNN(network, **options)
        model.fit(data["X"], data["y"], num_warmup=num_warmup, num_samples=num_samples)
    else:
        given = None if case == "cold" else weights
        model = nb.PartialBNN(network, deterministic_weights=given, probabilistic_layer_names=layers, **options)
        model.fit(data["X"], data["y"], num_warmup=num_warmup, num_samples=num_samples)
    fitted = time.perf_counter()
    draws = np.asarray(model.get_samples()["mu"])[:, data["rows"], 0]
    model.predict(data["X"])
    np.savez(out / f"{case}.npz", draws=draws)
    seconds = {"import": imported - started, "fit": fitted - imported, "predict": time.perf_counter() - fitted}
    print(json.dumps({"case": case, "seconds": seconds, "version": "0.0.14"}))


main()
