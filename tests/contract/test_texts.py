"""What models print as, and that those given a function of JAX can be pickled."""

import pickle

import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import neurobayes as nb


@pytest.fixture(scope="module")
def model(mlp, regression):
    """Several backbones with an output layer that is Bayesian."""
    options = {"num_samples": 400, "sgd_epochs": 5, "map_sigma": 1.0, "progress_bar": False, "seed": 0}
    return nb.PartialBNN(mlp, num_probabilistic_layers=1, num_backbones=3).fit(*regression, **options)


def test_a_model_prints_what_differs_from_the_default(mlp):
    silu = nb.FlaxMLP([6], 3, activation="silu")
    assert repr(nb.PartialBNN(mlp, num_probabilistic_layers=1)) == (
        "PartialBNN(FlaxMLP((6, 4), 1), num_probabilistic_layers=1)"
    )
    assert repr(nb.BNN(silu, 3)) == "BNN(FlaxMLP((6,), 3, activation='silu'), num_classes=3)"
    assert repr(nb.DeterministicNN(mlp, 3, optimizer="sgd")) == (
        "DeterministicNN(FlaxMLP((6, 4), 1), (3,), optimizer='sgd')"
    )


def test_no_weights_are_printed(mlp):
    assert repr(nb.PartialBNN(eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0)))) == "PartialBNN(MLP(…))"
    weights = {"Dense0": {"kernel": [[1.0, 2.0]]}}
    text = repr(nb.PartialBNN(mlp, deterministic_weights=weights, noise_prior=dist.HalfNormal(0.3)))
    assert text.endswith("deterministic_weights={…}, noise_prior=HalfNormal(…))")


def test_a_fitted_model_prints_its_size(model, mlp, regression):
    assert repr(model).endswith("num_backbones=3); fitted to 60 rows, 5 Bayesian weights, 3 backbones")
    trained = nb.DeterministicNN(mlp, 3).train(*regression, 5)
    assert repr(trained) == "DeterministicNN(FlaxMLP((6, 4), 1), (3,)); trained for 5 epochs"


def test_backbones_print_in_a_line(model):
    assert repr(model.backbones) == "Backbones(3 members, sigmas=[1.0], num_parts=4)"
    assert len(repr(model.pretraining)) < 200


def test_a_fitted_model_with_a_function_of_jax_can_be_pickled(regression):
    X, y = regression
    exact = {"num_samples": 200, "sgd_epochs": 5, "map_sigma": 1.0, "progress_bar": False, "seed": 0}
    model = nb.PartialBNN(nb.FlaxMLP([4], 1, activation=jax.nn.silu), num_backbones=2).fit(X, y, **exact)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(X)[0], model.predict(X)[0])
