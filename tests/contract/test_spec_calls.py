"""Every call of the user document on partially Bayesian networks, on data and sizes of our own."""

import jax
import numpy as np
import pytest

import neurobayes as nb

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

HIDDEN = [12, 8, 6]
NEURONS = {"Dense0": [(0, 5), (2, 10)], "Dense2": [(1, 0), (3, 2)]}


@pytest.fixture(scope="module")
def four_columns():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(80, 4))
    y = X[:, 0] + np.sin(X[:, 1]) + 0.1 * rng.normal(size=80)
    return X[:60], y[:60], X[60:], y[60:]


@pytest.fixture(scope="module")
def deep_mlp():
    return nb.FlaxMLP(hidden_dims=HIDDEN, target_dim=1, activation="tanh")


@pytest.fixture(scope="module")
def document_choice(deep_mlp):
    """Whole layers by name and single weights of others, as the document combines them."""
    return nb.PartialBNN(
        deep_mlp, probabilistic_layer_names=["Dense1", "Dense3"], probabilistic_neurons=NEURONS, num_backbones=1
    )


def counts(model):
    return {path: number for path, number in model.partition.counts().items() if number}


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, {"Dense3.bias": 1, "Dense3.kernel": 6}),
     (2, {"Dense2.bias": 6, "Dense2.kernel": 48, "Dense3.bias": 1, "Dense3.kernel": 6})],
)  # fmt: skip
def test_number_of_probabilistic_layers_counts_the_output_layer(deep_mlp, four_columns, quick, num_layers, expected):
    """Trap: num_probabilistic_layers=1 means two layers."""
    pbn = nb.PartialBNN(deep_mlp, num_probabilistic_layers=num_layers, num_backbones=1)
    assert counts(pbn.fit(*four_columns[:2], **quick)) == expected


def test_named_layers_are_wholly_bayesian(deep_mlp, four_columns, quick):
    pbn = nb.PartialBNN(deep_mlp, probabilistic_layer_names=["Dense1", "Dense3"], num_backbones=1)
    assert counts(pbn.fit(*four_columns[:2], **quick)) == {
        "Dense1.bias": 8, "Dense1.kernel": 96, "Dense3.bias": 1, "Dense3.kernel": 6,
    }  # fmt: skip


def test_named_layers_and_the_listed_weights_of_other_layers(document_choice, four_columns, quick):
    """Trap: weights named for layers outside probabilistic_layer_names ignored (the document's own example)."""
    document_choice.fit(*four_columns[:2], **quick)
    assert counts(document_choice) == {
        "Dense0.kernel": 2, "Dense1.bias": 8, "Dense1.kernel": 96, "Dense2.kernel": 2,
        "Dense3.bias": 1, "Dense3.kernel": 6,
    }  # fmt: skip
    masks = document_choice.partition.masks()
    assert np.argwhere(masks["Dense0.kernel"]).tolist() == [[0, 5], [2, 10]]
    assert np.argwhere(masks["Dense2.kernel"]).tolist() == [[1, 0], [3, 2]]


@pytest.mark.slow
def test_automatic_selection_adds_to_the_chosen_layers(document_choice, four_columns):
    """Trap: weights named for layers outside probabilistic_layer_names ignored (also select_neurons_config)."""
    X, y, X_val, _ = four_columns
    returned = document_choice.fit(
        X, y, sgd_epochs=20, num_warmup=50, num_samples=60,
        select_neurons_config={
            "method": "variance", "layer_names": ["Dense0", "Dense2"], "num_pairs_per_layer": 10,
        },
    )  # fmt: skip
    assert returned is document_choice
    found = counts(document_choice)
    assert found["Dense1.kernel"] == 96 and found["Dense3.kernel"] == 6
    # The listed two may be among the ten that were selected.
    assert 10 <= found["Dense0.kernel"] <= 12 and 10 <= found["Dense2.kernel"] <= 12
    mean, variance = document_choice.predict(X_val)
    assert mean.shape == variance.shape == (20,)
    assert np.all(variance > 0)


def test_automatic_selection_alone_leaves_other_layers_deterministic(deep_mlp, four_columns, quick):
    pbn = nb.PartialBNN(deep_mlp, num_backbones=1)
    config = {"method": "variance", "layer_names": ["Dense0", "Dense2"], "num_pairs_per_layer": 10}
    pbn.fit(*four_columns[:2], select_neurons_config=config, **quick)
    assert counts(pbn) == {"Dense0.kernel": 10, "Dense2.kernel": 10}


@pytest.mark.parametrize("method", ["variance", "gradient", "magnitude", "clustering"])
def test_every_selection_method_gives_the_asked_number_of_weights(deep_mlp, four_columns, quick, method):
    """Traps: gradient selection broken on new JAX; clustering makes the layer fully Bayesian."""
    pbn = nb.PartialBNN(deep_mlp, num_probabilistic_layers=1, num_backbones=1)
    config = {"method": method, "layer_names": ["Dense0", "Dense2"], "num_pairs_per_layer": 7}
    pbn.fit(*four_columns[:2], select_neurons_config=config, **quick)
    assert counts(pbn) == {"Dense0.kernel": 7, "Dense2.kernel": 7, "Dense3.bias": 1, "Dense3.kernel": 6}


@pytest.mark.slow
def test_classification_with_ten_classes():
    rng = np.random.default_rng(4)
    y_train = rng.permutation(np.repeat(np.arange(10), 8))
    X_train = rng.normal(size=(80, 5)) + 2.0 * rng.normal(size=(10, 5))[y_train]
    X_test = X_train[:15]
    mlp = nb.FlaxMLP(hidden_dims=[8, 6], target_dim=10, activation="tanh")
    model = nb.PartialBNN(mlp, num_classes=10, num_probabilistic_layers=1, num_backbones=1)
    model.fit(X_train, y_train, sgd_epochs=40, num_warmup=50, num_samples=60)
    probs, uncertainty = model.predict(X_test)
    assert probs.shape == (15, 10) and uncertainty.shape == (15,)
    np.testing.assert_allclose(probs.sum(1), 1.0, atol=1e-6)
    predicted_classes = model.predict_classes(X_test)
    np.testing.assert_array_equal(predicted_classes, probs.argmax(1))
    assert np.mean(predicted_classes == y_train[:15]) > 0.3  # chance is 0.1
    assert not model.is_regression


def test_manual_two_stage_training(four_columns):
    X, y, X_val, y_val = four_columns
    mlp = nb.FlaxMLP(hidden_dims=[8, 6, 5, 4], target_dim=1, activation="silu")
    det_model = nb.DeterministicNN(mlp, input_shape=(X.shape[-1],), learning_rate=0.001, map=True, sigma=1.0)
    det_model.train(X, y, epochs=50, batch_size=16)
    y_pred = det_model.predict(X_val)
    assert y_pred.shape == y_val.shape
    assert nb.utils.mse(y_pred, y_val) == pytest.approx(np.mean((y_pred - y_val) ** 2))
    pretrained_weights = det_model.get_params()
    before = jax.tree.map(np.array, pretrained_weights)
    pbn = nb.PartialBNN(
        mlp, deterministic_weights=pretrained_weights, probabilistic_layer_names=["Dense1"], num_backbones=1
    )
    pbn.fit(X, y, num_warmup=50, num_samples=60)
    assert pbn.pretraining is None, "the deterministic stage is skipped"
    np.testing.assert_allclose(pbn.deterministic_predict(X_val), y_pred, rtol=1e-5, atol=1e-6)
    samples = pbn.get_samples()
    assert set(samples) == {"Dense1.kernel", "Dense1.bias", "noise_std"}
    assert samples["Dense1.kernel"].shape == (60, 8, 6)
    jax.tree.map(np.testing.assert_array_equal, dict(before), dict(pretrained_weights))


@pytest.mark.parametrize(("shape", "predicted"), [((60,), (20,)), ((60, 1), (20, 1))])
def test_mse_of_predictions_never_broadcasts(four_columns, quick, shape, predicted):
    X, y, X_val, y_val = four_columns
    pbn = nb.PartialBNN(nb.FlaxMLP([8], 1), num_backbones=1).fit(X, y.reshape(shape), **quick)
    mean, _ = pbn.predict(X_val)
    assert mean.shape == predicted
    assert np.isfinite(nb.utils.mse(mean, y_val.reshape(predicted)))
    other = y_val[:, None] if len(predicted) == 1 else y_val
    with pytest.raises(nb.errors.DataError, match="shape"):
        nb.utils.mse(mean, other)
