"""Small data, short fits and a sampler in form only, shared by the contract tests."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes.inference.base import Engine
from neurobayes.posterior import Posterior


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scatter(Engine):
    """Draws scattered around the start: for tests of what surrounds the sampler, which takes seconds to compile."""

    scale: float = 0.1

    def run(self, key, log_density, start, *, num_warmup, num_samples, num_chains=1, **kwargs):
        shape = (num_chains, num_samples)
        noise = np.asarray(jax.random.normal(key, (*shape, log_density.size)))
        draws = np.asarray(start + self.scale * noise, np.float32)
        return Posterior(draws, {"diverging": np.zeros(shape, bool)}, {"engine": "scatter"})


@pytest.fixture(scope="session")
def regression():
    """X (60, 3) and y (60,) with noise 0.1."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    return X, X[:, 0] - 0.5 * X[:, 1] ** 2 + 0.1 * rng.normal(size=60)


@pytest.fixture(scope="session")
def two_outputs(regression):
    """X (60, 3) and y (60, 2): noise 0.1 on the first output, 1.0 on the second, which is in units ten times larger."""
    X, y = regression
    rng = np.random.default_rng(1)
    return X, np.stack([y, 10 * (X[:, 2] + 1.0 * rng.normal(size=60))], axis=1)


@pytest.fixture(scope="session")
def three_classes():
    """X (60, 4) and labels 0, 1, 2 of overlapping classes."""
    rng = np.random.default_rng(2)
    y = rng.permutation(np.repeat(np.arange(3), 20))
    return rng.normal(size=(60, 4)) + 1.5 * np.eye(3, 4)[y], y


@pytest.fixture(scope="session")
def short():
    """Options of a short fit with the real sampler."""
    return {
        "num_warmup": 80, "num_samples": 100, "sgd_epochs": 30, "map_sigma": 1.0, "progress_bar": False,
        "engine": "nuts",
    }  # fmt: skip


@pytest.fixture(scope="session")
def quick():
    """Options of a fit whose draws are only scattered around the trained weights."""
    return {"num_samples": 20, "sgd_epochs": 10, "map_sigma": 1.0, "progress_bar": False, "engine": Scatter()}


@pytest.fixture(scope="session")
def at_the_trained_weights(quick):
    """Options of a fit every draw of which is the trained network."""
    return {**quick, "engine": Scatter(scale=0.0)}


@pytest.fixture(scope="session")
def mlp():
    """The network most tests use."""
    return nb.FlaxMLP([6, 4], 1)


@pytest.fixture
def count_compilations():
    """A context manager whose value has ``.number``, the programs XLA compiled inside it."""

    @contextlib.contextmanager
    def counting():
        found = types.SimpleNamespace(number=0)

        def listen(event, duration, **kwargs):
            found.number += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield found
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counting


@pytest.fixture
def chunks_of(monkeypatch):
    """A function that has samplers advance by as many iterations in every call, however fast they are."""
    from neurobayes.inference import _driver

    def fix(number: int) -> None:
        monkeypatch.setattr(_driver, "CHUNK", number)
        monkeypatch.setattr(_driver, "FIRST_CHUNK", number)
        monkeypatch.setattr(_driver, "SECONDS_PER_CHUNK", float("inf"))

    return fix
