"""How training ends: at the edge of a compiled chunk, without a finite loss, without progress, in double precision."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import neurobayes as nb
from neurobayes import row_blocks, training_steps
from neurobayes.errors import ConvergenceWarning, OptionError, TrainingError
from neurobayes.networks import as_network
from neurobayes.partition import Partition

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = X[:, 0] - 0.5 * X[:, 1] + 0.1 * RNG.normal(size=40)
SHORT = {"num_warmup": 60, "num_samples": 100, "sgd_epochs": 20, "map_sigma": 1.0, "seed": 0}
pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")


def small():
    return nb.FlaxMLP([4], 1)


def test_early_stopping_at_the_end_of_a_compiled_chunk():
    model = nb.DeterministicNN(small(), input_shape=3)
    patience = training_steps.EPOCHS_PER_CALL - 1  # nothing improves by 1e9, so the run lasts patience + 1 epochs
    model.train(X, Y, 300, validation_data=(X, Y), early_stopping={"patience": patience, "min_delta": 1e9})
    assert len(model.history["loss"]) == training_steps.EPOCHS_PER_CALL


def test_a_validation_loss_that_is_never_finite_raises():
    def loss(outputs, y):
        import jax.numpy as jnp

        return jnp.sum((outputs - y) ** 2, axis=-1) + jnp.where(y[:, 0] > 1e3, jnp.nan, 0.0)

    model = nb.DeterministicNN(small(), input_shape=3, loss=loss, standardize=False)
    with pytest.raises(TrainingError, match="validation loss was never finite"):
        model.train(X, Y, 50, validation_data=(X, np.full(40, 1e4)), early_stopping=5)


def test_a_search_whose_every_run_blows_up_raises():
    with pytest.raises(TrainingError, match="left-out rows is not finite"):
        nb.PartialBNN(small(), num_backbones=1).fit(X, Y, sgd_lr=1e30, sgd_epochs=20, num_samples=100, seed=0)


@pytest.mark.filterwarnings("default::neurobayes.errors.ConvergenceWarning")
def test_a_search_without_progress_warns():
    with pytest.warns(ConvergenceWarning, match="does not improve the predictions of left-out rows"):
        nb.PartialBNN(small(), num_backbones=1).fit(X, Y, sgd_lr=30.0, sgd_epochs=20, num_samples=200, seed=0)


@pytest.mark.filterwarnings("default::neurobayes.errors.ConvergenceWarning")
@pytest.mark.parametrize("num_backbones", [1, 3])
def test_training_that_diverges_to_finite_weights_warns(num_backbones):
    model = nb.PartialBNN(small(), num_probabilistic_layers=1, num_backbones=num_backbones)
    with pytest.warns(ConvergenceWarning, match=r"times its spread.*Lower sgd_lr") as warned:
        model.fit(X, Y, sgd_lr=1e6, **SHORT)
    assert any(each.filename == __file__ for each in warned if "sgd_lr" in str(each.message))


@pytest.mark.slow
def test_a_noise_prior_that_excludes_the_observed_error_still_starts():
    model = nb.PartialBNN(small(), num_probabilistic_layers=2, noise_prior=dist.Uniform(0.5, 1.0), num_backbones=1)
    noise = model.fit(X, Y, **SHORT).get_samples()["noise_std"] / np.std(Y)
    assert (noise > 0.49).all() and (noise < 1.01).all()


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [None, 2])
def test_double_precision(num_classes):
    y = Y if num_classes is None else (Y > 0).astype(int)
    network = nb.FlaxMLP([4], num_classes or 1)
    with jax.enable_x64(True):
        model = nb.PartialBNN(network, num_classes, num_probabilistic_layers=2, num_backbones=1).fit(X, y, **SHORT)
        first, second = model.predict(X)
        deterministic = nb.DeterministicNN(nb.FlaxMLP([4], 1), input_shape=3).train(X, Y, 20).predict(X)
    assert np.isfinite(first).all() and np.isfinite(second).all() and np.isfinite(deterministic).all()


def test_rows_and_positions_in_one_axis_are_not_cut_into_blocks(monkeypatch):
    """A time-major network carries (positions x rows, features): its blocks must not be strung together."""
    import jax.numpy as jnp

    def apply(params, x):
        n, length, _ = x.shape
        steps = jnp.tanh(x.swapaxes(0, 1).reshape(length * n, -1) @ params["a"])
        return (steps @ params["b"]).reshape(length, n, -1).sum(0)

    params = {"a": RNG.normal(size=(2, 3)).astype(np.float32), "b": RNG.normal(size=(3, 1)).astype(np.float32)}
    network = as_network((apply, params))
    x = RNG.normal(size=(37, 5, 2)).astype(np.float32)
    partition = Partition.from_masks({"b": np.ones((3, 1), bool)}, {"a": (2, 3), "b": (3, 1)})
    monkeypatch.setattr(row_blocks, "rows_per_block", lambda *arguments: 16)
    hoisted, carry = row_blocks.hoist_rows(network, partition, params, {}, x)
    late = hoisted.late(partition.split(params), carry)
    np.testing.assert_allclose(late, apply(params, x), rtol=1e-5, atol=1e-5)


def test_monitoring_in_blocks_equals_monitoring_at_once(monkeypatch):
    losses = []
    for rows in (1024, 16):
        monkeypatch.setattr(training_steps, "MONITOR_ROWS", rows)
        jax.clear_caches()
        model = nb.DeterministicNN(small(), input_shape=3, seed=0)
        losses.append(model.train(X, Y, 5, batch_size=8, validation_data=(X[:21], Y[:21])).history["validation_loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_schedule_counts_real_steps_only():
    """25 steps of 4 rows make an epoch of 100 rows, however far they are padded."""
    network, seen = small(), []

    def schedule(step):
        seen.append(step.shape)
        return 0.01 * (step < 50)

    data = RNG.normal(size=(100, 3))
    model = nb.DeterministicNN(network, input_shape=3, learning_rate=schedule, seed=0)
    model.train(data, data[:, 0], 2, batch_size=4)
    two = model.get_params()
    model.train(data, data[:, 0], 4, batch_size=4)  # the step size is zero from the third epoch on
    jax.tree.map(np.testing.assert_array_equal, two, model.get_params())


def test_warm_start_refuses_another_automatic_selection():
    model = nb.PartialBNN(small(), num_backbones=1).fit(X, Y, **SHORT)
    config = {"method": "magnitude", "layer_names": ["Dense0"], "num_pairs_per_layer": 2}
    with pytest.raises(OptionError, match="leave select_neurons_config out"):
        model.fit(X, Y, warm_start=True, select_neurons_config=config, **SHORT)
