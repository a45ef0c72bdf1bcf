"""A chain's draws depend on the seed and its number: not on its neighbours, the layout, the devices or the chunking."""

import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import neurobayes as nb
from neurobayes.errors import OptionError

pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")

SCRIPT = textwrap.dedent("""
    import sys, warnings
    import jax
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    import numpy as np
    import neurobayes as nb

    warnings.simplefilter("ignore", nb.errors.ConvergenceWarning)
    with np.load(sys.argv[2]) as data:
        X, y = data["X"], data["y"]
    draws = {}
    for layout in sys.argv[4:]:
        method, chains = layout.split("-")
        model = nb.PartialBNN(nb.FlaxMLP([6, 4], 1), num_backbones=1).fit(
            X, y, num_warmup=40, num_samples=30, num_chains=int(chains), chain_method=method, engine="nuts",
            sgd_epochs=20, map_sigma=1.0, seed=4, progress_bar=False,
        )
        draws[layout] = model.posterior.draws
    np.savez(sys.argv[3], **draws)
""")


def fit(data, num_chains, method="vectorized", num_samples=30):
    return nb.PartialBNN(nb.FlaxMLP([6, 4], 1), num_backbones=1).fit(
        *data, num_warmup=40, num_samples=num_samples, num_chains=num_chains, chain_method=method, engine="nuts",
        sgd_epochs=20, map_sigma=1.0, seed=4, progress_bar=False,
    ).posterior.draws  # fmt: skip


@pytest.fixture(scope="module")
def four(regression):
    draws = fit(regression, 4)
    assert len({chain.tobytes() for chain in draws}) == 4
    return draws


@pytest.mark.parametrize(("num_chains", "method"), [(1, "vectorized"), (2, "vectorized"), (4, "sequential")])
def test_in_one_process(regression, four, num_chains, method):
    np.testing.assert_array_equal(fit(regression, num_chains, method), four[:num_chains])


@pytest.mark.parametrize("chunk", [1, 7, 29, 256])
def test_in_any_chunking(regression, four, chunks_of, chunk):
    chunks_of(chunk)
    np.testing.assert_array_equal(fit(regression, 4), four)


def test_fewer_draws_are_the_first(regression, four):
    np.testing.assert_array_equal(fit(regression, 4, num_samples=11), four[:, :11])


def in_process(data, tmp_path, num_devices, layouts):
    np.savez(tmp_path / "data.npz", X=data[0], y=data[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(nb.__file__).parents[1])}
    arguments = [str(num_devices), str(tmp_path / "data.npz"), str(tmp_path / "draws.npz"), *layouts]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=500, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    with np.load(tmp_path / "draws.npz") as found:
        return dict(found)


@pytest.mark.slow
def test_on_two_devices(regression, four, tmp_path):
    found = in_process(regression, tmp_path, 2, ["parallel-2"])
    np.testing.assert_array_equal(found["parallel-2"], four[:2])


@pytest.mark.slow
def test_on_four_devices(regression, four, tmp_path):
    layouts = ["parallel-4", "parallel-2", "parallel-3", "vectorized-4", "sequential-2", "parallel-6"]
    found = in_process(regression, tmp_path, 4, layouts)
    for layout, draws in found.items():
        assert draws.shape[0] == int(layout[-1])
        np.testing.assert_array_equal(draws[:4], four[: len(draws)][:4])


def test_parallel_needs_devices(regression):
    import jax

    if len(jax.local_devices()) > 1:
        pytest.skip("several devices are there")
    with pytest.raises(OptionError, match="more than one device"):
        fit(regression, 2, "parallel")
