"""The compiled training loop keeps and computes only what was asked for."""

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import training
from neurobayes.likelihoods import Gaussian
from neurobayes.networks import as_network

EPOCHS = 12
NETWORK = as_network(nb.FlaxMLP([4], 1))
PROGRAM = training.Program(NETWORK, Gaussian())


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 2)).astype(np.float32)
    return training.Rows(x, np.sin(x[:, :1]), np.ones(16, np.float32))


def run(rows, program=PROGRAM, collect=None, **options):
    settings = training.Settings(rows.real, np.float32(1.0), np.ones(1, np.float32))
    rates = np.full((EPOCHS, 1), 0.05, np.float32)
    result, _ = training.train(
        program, jax.random.key(0), rows, settings, learning_rates=rates, collect=collect, **options
    )
    return result


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_a_plain_run_carries_neither_an_average_nor_the_best_weights(rows):
    progress = run(rows).progress
    assert progress.average is None and progress.best_params is None and progress.statistics is None


def test_what_is_kept_besides_does_not_change_the_weights_or_the_losses(rows):
    plain = run(rows)
    averaged = run(rows, collect=np.ones(EPOCHS, np.float32))
    watched = run(rows, training.Program(NETWORK, Gaussian(), monitor="validation", early_stopping=True),
                  validation=rows)  # fmt: skip
    for other in (averaged, watched):
        np.testing.assert_array_equal(other.history["loss"], plain.history["loss"])
        for a, b in zip(leaves(other.progress.params), leaves(plain.params), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_average_is_that_of_the_collected_epochs(rows):
    collect = np.zeros(EPOCHS, np.float32)
    collect[[5, 8, 11]] = 1.0
    averaged = run(rows, collect=collect)
    paths = []
    for epochs in (6, 9, 12):
        settings = training.Settings(rows.real, np.float32(1.0), np.ones(1, np.float32))
        rates = np.full((epochs, 1), 0.05, np.float32)
        result, _ = training.train(PROGRAM, jax.random.key(0), rows, settings, learning_rates=rates)
        paths.append(leaves(result.params))
    assert averaged.num_averaged == 3
    for got, *each in zip(leaves(averaged.params), *paths, strict=True):
        np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-5, atol=1e-6)


def test_early_stopping_returns_the_best_weights_it_kept(rows):
    program = training.Program(NETWORK, Gaussian(), monitor="validation", early_stopping=True)
    opposite = rows._replace(y=-rows.y)  # every step towards y makes these worse
    stopped = run(rows, program, validation=opposite)
    num_epochs = int(stopped.progress.best_epoch) + 1
    assert num_epochs < EPOCHS
    settings = training.Settings(rows.real, np.float32(1.0), np.ones(1, np.float32))
    rates = np.full((num_epochs, 1), 0.05, np.float32)
    short, _ = training.train(PROGRAM, jax.random.key(0), rows, settings, learning_rates=rates)
    for a, b in zip(leaves(stopped.params), leaves(short.params), strict=True):
        np.testing.assert_array_equal(a, b)
