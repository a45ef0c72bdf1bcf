"""What every test relies on: one device, no screen, reproducible examples, small seeded data."""

import os
import sys

# Before anything imports jax or matplotlib. A caller's own choice of device wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest

# No deadline, because the first example of a shape compiles; the same examples on every run.
hypothesis.settings.register_profile("neurobayes", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("neurobayes")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """Each compiled program maps memory, and a process that keeps thousands of them runs out of mappings."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def friedman() -> tuple[np.ndarray, np.ndarray]:
    """Friedman's first function of 8 inputs (3 of them idle) with noise 0.5: X (60, 8), y (60,)."""
    rng = np.random.default_rng(0)
    X = rng.uniform(size=(60, 8))
    mean = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2 + 10 * X[:, 3] + 5 * X[:, 4]
    return X, mean + rng.normal(scale=0.5, size=60)


@pytest.fixture
def classes() -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping Gaussian classes, 20 rows each: X (60, 4), y (60,) in 0..2."""
    rng = np.random.default_rng(1)
    y = np.repeat(np.arange(3), 20)
    X = rng.normal(size=(60, 4)) + 1.5 * np.eye(3, 4)[y]
    order = rng.permutation(60)
    return X[order], y[order]


@pytest.fixture
def compilation_cache():
    """JAX's settings for programs that are kept; afterwards they are as they were."""
    import jax

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    from neurobayes import compiled_programs

    compiled_programs._forget_earlier_folder()
