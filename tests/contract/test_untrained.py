"""``sgd_epochs=0``: fixed weights that keep their random initial values, and know nothing of the data."""

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes.models.base import as_user_network

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

FAST = {"sgd_epochs": 0, "progress_bar": False, "seed": 3}


@pytest.fixture(scope="module")
def last_layer(mlp, regression):
    """The output layer above features that nothing was learnt for."""
    return nb.PartialBNN(mlp, num_probabilistic_layers=1, prior_mean="zero", num_backbones=1).fit(*regression, **FAST)


def fixed_weights(model):
    return model._fitted.members[0].source.params


def test_fixed_weights_are_random_and_do_not_depend_on_the_data(mlp, regression, last_layer):
    X, y = regression
    other = nb.PartialBNN(mlp, num_probabilistic_layers=1, prior_mean="zero").fit(X[::-1], y**3, **FAST)
    again = nb.PartialBNN(mlp, num_probabilistic_layers=1, prior_mean="zero").fit(X, y, **FAST | {"seed": 4})
    hidden = [np.asarray(fixed_weights(model)["Dense0"]["kernel"]) for model in (last_layer, other, again)]
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert np.abs(hidden[0] - hidden[2]).min() > 0
    # The network's own initial values: variance one over the number of inputs.
    assert 0.3 < hidden[0].std() * np.sqrt(X.shape[1]) < 2.0


def test_nothing_is_trained_and_there_is_one_backbone(last_layer):
    assert last_layer.pretraining is None
    assert last_layer.backbones is None
    assert last_layer.out_of_fold is None
    assert last_layer.fit_seconds["training"] >= 0


def test_output_layer_is_a_linear_regression_on_random_features(regression, last_layer):
    """Against the closed form, by hand in float64, given each drawn noise: mean and variance are those of ridge."""
    X, y = regression
    scaling, params = last_layer._fitted.scaling, fixed_weights(last_layer)
    X_new = np.random.default_rng(5).normal(size=(9, 3))

    def features(rows):
        h = (rows - scaling.x_mean) / scaling.x_std
        for name in sorted(params)[:-1]:
            h = np.tanh(h @ np.asarray(params[name]["kernel"], float) + np.asarray(params[name]["bias"], float))
        return np.column_stack([h, np.ones(len(h))])

    train, new, targets = features(X), features(X_new), (y - scaling.y_mean) / scaling.y_std
    found = last_layer.posterior_predictive(X_new, calibration=None)
    noise = last_layer.get_samples()["noise_std"].astype(float).ravel() / float(np.ravel(scaling.y_std)[0])
    means, variances = [], []
    for std in noise:
        precision = train.T @ train / std**2 + np.eye(train.shape[1])
        means.append(new @ np.linalg.solve(precision, train.T @ targets / std**2))
        variances.append(np.einsum("ij,jk,ik->i", new, np.linalg.inv(precision), new))
    epistemic = np.mean(variances, 0) + np.var(means, 0)
    unit = float(np.ravel(scaling.y_std)[0])
    np.testing.assert_allclose(found.mean, np.mean(means, 0) * unit + float(np.ravel(scaling.y_mean)[0]), atol=0.02)
    np.testing.assert_allclose(found.epistemic_var, epistemic * unit**2, rtol=0.05)


def test_hidden_layers_learn_below_a_random_output_layer(regression):
    """The Bayesian layers alone must fit the data: residuals well below the target's spread."""
    X, y = regression
    model = nb.PartialBNN(
        nb.FlaxMLP([8, 8], 1), probabilistic_layer_names=["Dense0", "Dense1"], prior_mean="zero", num_backbones=1
    ).fit(X, y, engine="laplace", **FAST)
    mean, _ = model.predict(X)
    assert np.sqrt(np.mean((mean - y) ** 2)) < 0.4 * y.std()
    assert model.num_bayesian_weights == (3 * 8 + 8) + (8 * 8 + 8)


@pytest.mark.slow
def test_classes_and_a_fully_bayesian_network(three_classes, regression):
    X, labels = three_classes
    options = {"engine": "laplace", **FAST}
    classifier = nb.PartialBNN(nb.FlaxMLP([6], 3), num_classes=3, prior_mean="zero").fit(X, labels, **options)
    assert np.mean(classifier.predict_classes(X) == labels) > 0.6  # a third by chance
    assert nb.BNN(nb.FlaxMLP([4], 1)).fit(*regression, **options).pretraining is None


def test_a_checkpoint_gives_the_same_draws(mlp, regression, tmp_path):
    def draws(**options):
        model = nb.PartialBNN(mlp, num_probabilistic_layers=1, prior_mean="zero")
        return model.fit(*regression, engine="nuts", num_warmup=50, num_samples=50, **FAST, **options).posterior.draws

    first = draws(checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(first, draws(checkpoint_dir=tmp_path))
    np.testing.assert_array_equal(first, draws())


def test_given_weights_stay_as_they_are(mlp, regression):
    weights, _ = as_user_network(mlp).init(jax.random.key(0), np.zeros((1, 3), np.float32))
    model = nb.PartialBNN(mlp, deterministic_weights=weights, standardize=True)
    model.fit(*regression, **FAST)  # prior_mean="map": the given weights are its centre
    np.testing.assert_array_equal(fixed_weights(model)["Dense0"]["kernel"], weights["Dense0"]["kernel"])


@pytest.mark.parametrize(
    ("constructor", "fit", "message"),
    [
        ({}, {}, "prior_mean='zero'"),
        ({"prior_mean": "zero", "num_backbones": 4}, {}, "num_backbones=4 .* sgd_epochs=0"),
        ({"prior_mean": "zero", "bayesian": nb.top(5, by="gradient")}, {}, "gradient .* sgd_epochs=0"),
        (
            {"prior_mean": "zero"},
            {"select_neurons_config": {"method": "variance", "layer_names": ["Dense0"], "num_pairs_per_layer": 2}},
            "variance .* sgd_epochs=0",
        ),
        ({"prior_mean": "zero"}, {"sgd_epochs": -1}, "sgd_epochs=-1 must be an integer of at least 0"),
    ],
)
def test_what_needs_a_training_is_an_error(mlp, regression, constructor, fit, message):
    model = nb.PartialBNN(mlp, **constructor)
    with pytest.raises(nb.errors.OptionError, match=message):
        model.fit(*regression, **FAST | fit)


def test_comparing_partitions_of_no_training_is_an_error(mlp, regression):
    with pytest.raises(nb.errors.OptionError, match="sgd_epochs=0 must be an integer of at least 1"):
        nb.compare_partitions(mlp, *regression, sgd_epochs=0)
