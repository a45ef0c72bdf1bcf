"""Chains spread over two processes that talk over the loopback address are the chains of one process."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import neurobayes as nb

TIME_LIMIT = 400

pytestmark = pytest.mark.slow  # five processes, each of which imports and compiles everything
SCRIPT = textwrap.dedent("""
    import sys, warnings
    import jax

    address, number, data, result = sys.argv[1:]
    if address != "alone":
        jax.distributed.initialize(address, num_processes=2, process_id=int(number), initialization_timeout=120)
    import numpy as np
    import neurobayes as nb

    warnings.simplefilter("ignore", nb.errors.ConvergenceWarning)
    warnings.simplefilter("ignore", nb.errors.CalibrationWarning)
    with np.load(data) as found:
        X, y = found["X"], found["y"]

    def fit(**options):
        method = "parallel" if len(jax.devices()) > 1 else "vectorized"
        engine = nb.inference.NUTS(collapse=True, chain_method=method)
        options = {"num_chains": 5, **options}
        return nb.PartialBNN(nb.FlaxMLP([6, 4], 1), bayesian=nb.last(2), num_backbones=1).fit(
            X, y, num_warmup=40, num_samples=30, engine=engine, sgd_epochs=20, map_sigma=1.0, seed=4,
            progress_bar=False, **options,
        )

    model = fit()
    refused = []
    if address != "alone":
        for options in ({"until": "ess>10"}, {"num_chains": 1}):
            try:
                fit(**options)
            except nb.errors.OptionError as error:
                refused.append(str(error))
    np.savez(
        result, draws=model.posterior.draws, mean=model.predict(X)[0], steps=model.posterior.stats["num_steps"],
        devices=len(jax.devices()), local=len(jax.local_devices()), refused=refused,
    )
""")


def start(tmp_path, address, number, num_devices=1):
    result = tmp_path / f"{address.replace(':', '-')}-{number}-{num_devices}.npz"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(nb.__file__).parents[1]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, address, str(number), str(tmp_path / "data.npz"), str(result)]
    with open(result.with_suffix(".log"), "w") as log:  # not a pipe, which would fill up while another is waited for
        return result, subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(*started):
    """What each process left; all are ended should one fail or hang."""
    found = []
    try:
        for result, process in started:
            process.wait(timeout=TIME_LIMIT)
            assert process.returncode == 0, result.with_suffix(".log").read_text()[-3000:]
            with np.load(result) as arrays:
                found.append(dict(arrays))
    finally:
        for _, process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def alone(regression, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    np.savez(folder / "data.npz", X=regression[0], y=regression[1])
    (found,) = finish(start(folder, "alone", 0))
    assert found["draws"].shape[:2] == (5, 30)
    return found


@pytest.mark.parametrize("num_devices", [1, 2])
def test_two_processes_draw_what_one_draws(regression, alone, tmp_path, num_devices):
    np.savez(tmp_path / "data.npz", X=regression[0], y=regression[1])
    address = f"127.0.0.1:{free_port()}"
    both = finish(*(start(tmp_path, address, number, num_devices) for number in range(2)))
    for found in both:
        assert (found["devices"], found["local"]) == (2 * num_devices, num_devices)
        for name in ("draws", "mean", "steps"):
            np.testing.assert_array_equal(found[name], alone[name])
        assert "until, seconds and checkpoint_dir need all chains in one process" in found["refused"][0]


def test_forced_host_devices_draw_what_one_draws(regression, alone, tmp_path):
    np.savez(tmp_path / "data.npz", X=regression[0], y=regression[1])
    (found,) = finish(start(tmp_path, "alone", 0, 2))
    assert found["devices"] == 2
    np.testing.assert_array_equal(found["draws"], alone["draws"])
