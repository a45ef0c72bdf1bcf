"""Data frames: columns by name, and the burn-in of per-weight statistics."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

import neurobayes as nb
from neurobayes.errors import DataError, OptionError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = X[:, 0] - 0.5 * X[:, 1] + 0.1 * RNG.normal(size=40)
NAMES = ["width", "height", "mass"]


@pytest.fixture(scope="module", params=["pandas", "polars"])
def frame(request):
    return pd.DataFrame(X, columns=NAMES) if request.param == "pandas" else pl.DataFrame(X, schema=NAMES)


@pytest.fixture(scope="module", params=["partial", "deterministic"])
def fitted(request, frame):
    if request.param == "partial":
        options = {"num_samples": 150, "sgd_epochs": 10, "map_sigma": 1.0, "seed": 0}
        return nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1).fit(frame, Y, **options)
    return nb.DeterministicNN(nb.FlaxMLP([4], 1), input_shape=3).train(frame, Y, 10)


def test_columns_in_another_order_raise(fitted, frame):
    with pytest.raises(DataError, match="another order"):
        fitted.predict(frame[NAMES[::-1]])


def test_an_unknown_column_is_named(fitted):
    with pytest.raises(DataError, match="'masse' that fit did not see \\(closest: 'mass'\\)"):
        fitted.predict(pd.DataFrame(X, columns=["width", "height", "masse"]))


@pytest.mark.parametrize("chosen", [NAMES[::-1], NAMES[:2]], ids=["another order", "too few"])
def test_a_warm_start_refuses_other_columns(fitted, frame, chosen):
    before = np.asarray(fitted.predict(frame))
    go_on = fitted.fit if isinstance(fitted, nb.PartialBNN) else fitted.train
    with pytest.raises(DataError, match=r"another order|2 columns but fit saw 3"):
        go_on(frame[chosen], Y, warm_start=True)
    np.testing.assert_array_equal(np.asarray(fitted.predict(frame)), before)


def test_the_same_columns_and_plain_arrays_predict_alike(fitted, frame):
    np.testing.assert_array_equal(np.asarray(fitted.predict(frame)), np.asarray(fitted.predict(X)))


@pytest.mark.parametrize(("burn_in", "steps"), [(0.0, 20), (0.5, 10), (0.9, 2)])
def test_burn_in_is_a_share_of_the_epochs(burn_in, steps):
    model = nb.DeterministicNN(nb.FlaxMLP([4], 1), input_shape=3).train(X, Y, 20, burn_in=burn_in)
    assert model.training_statistics.num_steps == steps


def test_burn_in_of_a_selection():
    config = {"method": "variance", "layer_names": ["Dense0"], "num_pairs_per_layer": 2}
    options = {"num_samples": 100, "num_warmup": 50, "sgd_epochs": 20, "map_sigma": 1.0, "seed": 0, "engine": "laplace"}
    model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1)
    model.fit(X, Y, select_neurons_config=config | {"burn_in": 0.9}, **options)
    assert model.pretraining.statistics.num_steps == 2
    with pytest.raises(OptionError, match="burn_in"):
        model.fit(X, Y, select_neurons_config=config | {"burn_in": 1.0}, **options)


def test_brackets_are_read_as_paths_in_priors():
    from neurobayes import priors

    tree = {"blocks": {"0": {"kernel": np.zeros((2, 2))}, "1": {"kernel": np.zeros((2, 2))}}}
    std = priors.prior_std_tree(tree, {"blocks[1]": 0.5})
    assert (std["blocks"]["0"]["kernel"] == 1.0).all() and (std["blocks"]["1"]["kernel"] == 0.5).all()
