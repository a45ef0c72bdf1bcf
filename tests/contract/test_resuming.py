"""A fit killed at any moment and started again by the same call ends with the draws of an uninterrupted run."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import numpyro.distributions as dist
import pytest

import neurobayes as nb
from neurobayes.errors import CheckpointError
from neurobayes.inference import NUTS, _driver

SCRIPT = pathlib.Path(__file__).with_name("long_run.py")
NUM_SAMPLES = 60


def load_script():
    spec = importlib.util.spec_from_file_location("long_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


long_run = load_script()


@pytest.fixture(scope="module")
def uninterrupted():
    """The run without a checkpoint, in chunks of the usual length."""
    return long_run.fit(None, NUM_SAMPLES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its model."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, long_run.fit(folder, NUM_SAMPLES)


def start(folder, result):
    source = pathlib.Path(nb.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(result), str(NUM_SAMPLES)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(source), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def run_and_kill(folder, result, rng, most_writes):
    """Start the run and kill it a moment after one of its first writes; whether it had come to its end before."""
    with start(folder, result) as process:
        for _ in range(int(rng.integers(1, most_writes + 1))):
            if not process.stdout.readline():
                break
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        errors = process.stderr.read()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode == 0


def run_to_the_end(folder, result):
    with start(folder, result) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def assert_same(result, model):
    with np.load(result) as found:
        np.testing.assert_array_equal(found["draws"], model.posterior.draws)
        np.testing.assert_array_equal(found["mean"], model.predict(long_run.data()[0])[0])
        for name, values in model.posterior.stats.items():
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.slow
def test_killed_twice(tmp_path, uninterrupted):
    rng = np.random.default_rng(0)
    folder, result = tmp_path / "run", tmp_path / "result.npz"
    killed = [not run_and_kill(folder, result, rng, most_writes) for most_writes in (25, 25)]
    assert killed == [True, True]
    assert not result.exists()
    run_to_the_end(folder, result)
    assert_same(result, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_until_it_ends(tmp_path, uninterrupted, seed):
    rng = np.random.default_rng(seed)
    folder, result = tmp_path / "run", tmp_path / "result.npz"
    attempts = 0
    while not run_and_kill(folder, result, rng, most_writes=12):
        attempts += 1
        assert attempts < 60
    assert attempts >= 3
    assert_same(result, uninterrupted)


def test_a_finished_run_is_not_run_again(finished, uninterrupted, monkeypatch):
    folder, first = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def chunk(*_):
        raise AssertionError("a chunk was run")

    monkeypatch.setattr(_driver._Run, "_chunk", chunk)
    again = long_run.fit(folder, NUM_SAMPLES)
    np.testing.assert_array_equal(again.posterior.draws, first.posterior.draws)
    np.testing.assert_array_equal(again.posterior.draws, uninterrupted.posterior.draws)
    assert again.posterior.info["step_size"] == first.posterior.info["step_size"]
    assert again.pretraining.num_epochs == first.pretraining.num_epochs
    np.testing.assert_array_equal(again.pretraining.history["loss"], first.pretraining.history["loss"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_fewer_draws_are_the_first_and_more_go_on(tmp_path, uninterrupted):
    long_run.fit(tmp_path, 25)
    more = long_run.fit(tmp_path, NUM_SAMPLES)
    np.testing.assert_array_equal(more.posterior.draws, uninterrupted.posterior.draws)
    fewer = long_run.fit(tmp_path, 10)
    np.testing.assert_array_equal(fewer.posterior.draws, uninterrupted.posterior.draws[:, :10])
    assert fewer.posterior.stats["num_steps"].shape == (2, 10)


def mask(chosen):
    return nb.mask({path: path.startswith(chosen) for path in
                    ("Dense0.kernel", "Dense0.bias", "Dense1.kernel", "Dense1.bias")})  # fmt: skip


CHANGED = {
    "seed": {"seed": 6},
    "warm-up": {"num_warmup": 41},
    "chains": {"num_chains": 1},
    "prior": {"priors_sigma": 2.0},
    "epochs": {"sgd_epochs": 21},
    "learning rate": {"sgd_lr": 0.02},
    "engine option": {"engine": NUTS(target_accept=0.9)},
    "width": {"model": nb.PartialBNN(nb.FlaxMLP([5], 1), num_backbones=1)},
    "activation": {"model": nb.PartialBNN(nb.FlaxMLP([4], 1, activation="relu"), num_backbones=1)},
    "Bayesian layers": {"model": nb.PartialBNN(nb.FlaxMLP([4], 1), num_probabilistic_layers=2, num_backbones=1)},
    "noise prior": {"model": nb.PartialBNN(nb.FlaxMLP([4], 1), noise_prior=dist.HalfNormal(2.0), num_backbones=1)},
    "noise prior's form": {
        "model": nb.PartialBNN(nb.FlaxMLP([4], 1), noise_prior=dist.InverseGamma(3.0, 1.0), num_backbones=1)
    },
    "prior centre": {"model": nb.PartialBNN(nb.FlaxMLP([4], 1), prior_mean="zero", num_backbones=1)},
}


@pytest.mark.parametrize("change", CHANGED)
def test_another_run_is_refused(finished, change):
    with pytest.raises(CheckpointError, match="belongs to another run"):
        long_run.fit(finished[0], NUM_SAMPLES, **CHANGED[change])


@pytest.mark.parametrize("change", ["x", "y", "rows"])
def test_other_data_are_refused(finished, change):
    X, y = long_run.data()
    X, y = {"x": (X + 1e-3 * (X > 1), y), "y": (X, np.abs(y)), "rows": (X[:-1], y[:-1])}[change]
    with pytest.raises(CheckpointError, match="data, network, options, seed or version differ"):
        nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1).fit(
            X, y, num_samples=NUM_SAMPLES, checkpoint_dir=finished[0], **long_run.OPTIONS
        )


def test_schedules_of_one_kind_are_told_apart(tmp_path):
    import optax

    def run(rate):
        return long_run.fit(tmp_path, 10, num_warmup=10, sgd_lr=optax.exponential_decay(rate, 10, 0.5))

    first = run(0.01)
    np.testing.assert_array_equal(run(0.01).posterior.draws, first.posterior.draws)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(0.02)


def test_choices_by_arrays_are_told_apart(tmp_path):
    def run(chosen):
        model = nb.PartialBNN(nb.FlaxMLP([4], 1), bayesian=mask(chosen), num_backbones=1)
        return long_run.fit(tmp_path, 10, model=model, num_warmup=10)

    run("Dense1")
    with pytest.raises(CheckpointError, match="other Bayesian weights"):
        run("Dense0")


def test_automatic_choices_survive(tmp_path, monkeypatch):
    """What training measured of each weight is kept: a restarted run chooses the same weights."""
    model = {"model": nb.PartialBNN(nb.FlaxMLP([4], 1), bayesian=nb.top(3, by="swag_variance"), num_backbones=1),
             "swa_config": {"start_pct": 0.5}, "num_warmup": 10}  # fmt: skip
    first = long_run.fit(tmp_path, 10, **model)
    monkeypatch.setattr("neurobayes.models.deterministic_stage.pretrain", None)  # trained weights are in the folder
    again = long_run.fit(tmp_path, 10, **{**model, "model": nb.PartialBNN(nb.FlaxMLP([4], 1), bayesian=nb.top(
        3, by="swag_variance"), num_backbones=1)})  # fmt: skip
    assert again.partition.counts() == first.partition.counts()
    np.testing.assert_array_equal(again.posterior.draws, first.posterior.draws)


@pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
def test_the_search_is_kept_too(tmp_path, monkeypatch):
    options = {**long_run.OPTIONS, "map_sigma": "auto", "num_warmup": 10, "num_samples": 10}
    first = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1).fit(*long_run.data(), checkpoint_dir=tmp_path, **options)
    monkeypatch.setattr("neurobayes.models.deterministic_stage.pretrain", None)
    again = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1).fit(*long_run.data(), checkpoint_dir=tmp_path, **options)
    np.testing.assert_array_equal(again.posterior.draws, first.posterior.draws)
    ours, theirs = again.pretraining.search, first.pretraining.search
    assert (ours.sigma, ours.num_epochs, ours.sigmas) == (theirs.sigma, theirs.num_epochs, theirs.sigmas)
    np.testing.assert_array_equal(ours.losses, theirs.losses)
    np.testing.assert_array_equal(ours.unseen_rmse, theirs.unseen_rmse)


def test_a_run_that_stopped_by_quality_stops_there_again(tmp_path, chunks_of, monkeypatch):
    """Interrupted between the checks or not: quality is judged after the same draws."""
    chunks_of(20)
    monkeypatch.setattr(_driver, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(_driver, "SHARE_BETWEEN_CHECKPOINTS", 0.0)
    whole = long_run.fit(None, None, until="ess>150")
    assert whole.posterior.info["ended_by"] == "until"

    class Dead(BaseException):
        pass

    chunk, left = _driver._Run._chunk, [4]

    def dying(run, stage, size):
        left[0] -= 1
        if left[0] < 0:
            raise Dead
        chunk(run, stage, size)

    monkeypatch.setattr(_driver._Run, "_chunk", dying)
    for _ in range(50):
        left[0] = 4
        try:
            resumed = long_run.fit(tmp_path, None, until="ess>150")
            break
        except Dead:
            pass
    np.testing.assert_array_equal(resumed.posterior.draws, whole.posterior.draws)
    left[0] = 0
    again = long_run.fit(tmp_path, None, until="ess>150")
    np.testing.assert_array_equal(again.posterior.draws, whole.posterior.draws)
    assert again.posterior.info["ended_by"] == "until"


def test_the_identity_of_a_warm_start_includes_where_it_starts(tmp_path):
    def run(first):
        model = long_run.fit(None, 10, num_warmup=first)
        return long_run.fit(tmp_path, 10, model=model, num_warmup=10, warm_start=True)

    drawn = run(10).posterior.draws
    np.testing.assert_array_equal(run(10).posterior.draws, drawn)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(12)


def test_the_pause_between_saves_grows_with_the_run(chunks_of, monkeypatch):
    chunks_of(50)
    clock = [0.0]
    monkeypatch.setattr(_driver.time, "perf_counter", lambda: clock[0])
    saves = []

    class Folder:
        def load(self):
            return None

        def save(self, counters, state, new):
            saves.append(clock[0])

    class Still:
        state, waits, longest = np.zeros((1, 1)), False, 50

        def dispatch(self, num_steps, sampling):
            clock[0] += 0.5
            return self.state, np.zeros((1, 50, 1)), {}

        def is_healthy(self, state):
            return True

    control = _driver.RunControl(checkpoint=Folder())
    outcome = _driver.advance([Still()], 50, 50 * 2000, control)
    assert outcome.draws.shape == (1, 100_000, 1)
    gaps = np.diff(saves)
    assert gaps[0] <= 1.5
    assert gaps[-2] >= 9.0
    assert len(saves) < 400


def test_interrupted_by_hand_then_continued(tmp_path, uninterrupted, chunks_of, monkeypatch):
    chunks_of(20)
    monkeypatch.setattr(_driver, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    chunk = _driver._Run._chunk

    def interrupted(run, stage, size):
        chunk(run, stage, size)
        if run.counters["sampling"] == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_driver._Run, "_chunk", interrupted)
        with pytest.warns() as caught:
            model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1).fit(
                *long_run.data(), num_samples=NUM_SAMPLES, checkpoint_dir=tmp_path, **long_run.OPTIONS
            )
    assert "interrupted: 40 of 60 draws per chain are kept." in [str(warning.message) for warning in caught]
    assert model.posterior.draws.shape[1] == 40
    np.testing.assert_array_equal(long_run.fit(tmp_path, NUM_SAMPLES).posterior.draws, uninterrupted.posterior.draws)
