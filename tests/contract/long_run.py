"""A fit that saves itself after every few draws and dawdles in each save, run as a process of its own to be killed.

Arguments: checkpoint folder, result file, number of draws. Prints a line as each file is written.
"""

import os
import sys
import time
import warnings

import jax
import numpy as np

import neurobayes as nb
from neurobayes.inference import _driver

OPTIONS = {
    "num_warmup": 40, "num_chains": 2, "sgd_epochs": 20, "map_sigma": 1.0, "progress_bar": False, "engine": "nuts",
    "seed": 5,
}  # fmt: skip


def data():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(30, 2))
    return X, np.sin(X[:, 0]) + 0.1 * rng.normal(size=30)


def fit(folder, num_samples, model=None, **options):
    model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nb.errors.ConvergenceWarning)
        return model.fit(*data(), num_samples=num_samples, checkpoint_dir=folder, **{**OPTIONS, **options})


def dawdle(fsync):
    def slowly(handle):
        print("writing", flush=True)
        time.sleep(0.01)
        fsync(handle)

    return slowly


def main(folder, result, num_samples):
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.dirname(result), "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _driver.CHUNK, _driver.SECONDS_BETWEEN_CHECKPOINTS, _driver.SHARE_BETWEEN_CHECKPOINTS = 5, 0.0, 0.0
    os.fsync = dawdle(os.fsync)
    model = fit(folder, int(num_samples))
    np.savez(result, draws=model.posterior.draws, mean=model.predict(data()[0])[0], **model.posterior.stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
