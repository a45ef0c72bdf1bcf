"""Sessions in which JAX computes in double precision (JAX_ENABLE_X64) fit as others do."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import neurobayes as nb

SCRIPT = textwrap.dedent("""
    import warnings
    import numpy as np
    import numpyro.distributions as dist
    import neurobayes as nb

    warnings.simplefilter("ignore", nb.errors.ConvergenceWarning)
    X = np.linspace(-2, 2, 30)[:, None]
    y = np.sin(X[:, 0])
    engines = {
        "mclmc": nb.inference.MCLMC(), "adjusted": nb.inference.MCLMC(adjusted=True),
        "full": nb.inference.Laplace(structure="full"), "low_rank": nb.inference.Laplace(structure="low_rank"),
        "nuts": nb.inference.NUTS(), "identity": nb.inference.NUTS(initial_mass="identity", max_tree_depth=3),
        "diagonal": nb.inference.Laplace(structure="diagonal"),
    }
    model = nb.BNN(nb.FlaxMLP([3], 1), noise_prior=dist.HalfNormal(np.float64(0.3)))
    options = {"num_warmup": 20, "num_samples": 20, "sgd_epochs": 20, "map_sigma": 1.0, "progress_bar": False}
    for name, engine in engines.items():
        print("engine", name, flush=True)
        model.fit(X, y, engine=engine, seed=0, **options)
        assert np.isfinite(model.predict(X)).all()
""")


@pytest.mark.slow  # seven engines are compiled in a process of its own
def test_engines_run_in_double_precision():
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(pathlib.Path(nb.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
