"""What a partially Bayesian network promises: shapes, units, seeds, refits, predictions and draws."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.optimize
import scipy.stats

import neurobayes as nb
from neurobayes import mixture, predictive

pytestmark = pytest.mark.filterwarnings("ignore:Do not trust these draws yet:neurobayes.errors.ConvergenceWarning")

LAST = {"num_probabilistic_layers": 1}


@pytest.fixture(scope="module")
def fitted(mlp, regression, short):
    """The output layer of the usual network, sampled for real."""
    return nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **short)


@pytest.fixture(scope="module")
def classifier(three_classes, short):
    return nb.PartialBNN(nb.FlaxMLP([6], 3), num_classes=3, **LAST, num_backbones=1).fit(*three_classes, **short)


@pytest.fixture(scope="module")
def two_output_fit(two_outputs, short):
    return nb.PartialBNN(nb.FlaxMLP([6, 4], 2), **LAST, num_backbones=1).fit(*two_outputs, **short)


def outputs_by_hand(model, X):
    """Outputs (draws, n, d) of a tanh MLP in working units, in float64 numpy, from the public draws."""
    scaling, samples = model._fitted.scaling, model.get_samples()
    h = (X - X.mean(0)) / X.std(0)
    np.testing.assert_allclose(scaling.x_mean, X.mean(0), atol=1e-12)
    layers = model.pretraining.params
    *hidden, last = sorted(layers)
    for name in hidden:
        h = np.tanh(h @ np.asarray(layers[name]["kernel"], float) + np.asarray(layers[name]["bias"], float))
    return h @ samples[f"{last}.kernel"].astype(float) + samples[f"{last}.bias"].astype(float)[:, None, :]


# Shapes and units


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_predictions_have_the_shape_of_the_target(mlp, regression, quick, shape):
    X, y = regression
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y.reshape(shape), **quick)
    check_shapes(model, X[:7], (7, *shape[1:]))


def test_predictions_of_two_outputs_have_the_shape_of_the_target(two_output_fit, two_outputs):
    check_shapes(two_output_fit, two_outputs[0][:7], (7, 2))


def check_shapes(model, X, shape):
    mean, variance = model.predict(X)
    prediction = model.posterior_predictive(X, quantiles=[0.1, 0.9], num_draws=5)
    parts = [mean, variance, prediction.mean, prediction.epistemic_var, prediction.aleatoric_var, prediction.std,
             prediction.quantiles[0.1], prediction.quantiles[0.9], model.deterministic_predict(X)]  # fmt: skip
    assert all(part.shape == shape and part.dtype == np.float64 for part in parts)
    assert prediction.draws.shape == model.sample_from_posterior(X, 5).shape == (5, *shape)


def test_a_target_in_mpa_predicts_as_its_standardised_twin(fitted, mlp, regression, short):
    X, y = regression
    mpa = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(1000.0 * X - 7.0, 900.0 + 100.0 * y, **short)
    mean, variance = fitted.predict(X)
    mean_mpa, variance_mpa = mpa.predict(1000.0 * X - 7.0)
    back, std = (mean_mpa - 900.0) / 100.0, np.sqrt(variance)
    # 100 draws of the same posterior, rounded differently on the way: a few Monte-Carlo errors.
    assert np.max(np.abs(back - mean) / std) < 0.5
    np.testing.assert_allclose(np.sqrt(variance_mpa) / 100.0, std, rtol=0.35)
    covered = np.mean(np.abs(y - mean) < 1.96 * std)
    assert np.mean(np.abs(y - back) < 1.96 * np.sqrt(variance_mpa) / 100.0) == pytest.approx(covered, abs=0.08)


def test_a_target_in_mpa_predicts_the_same_but_for_rounding(mlp, regression, quick):
    X, y = regression
    usual, mpa = (
        nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, 900.0 * k + (1 + 99 * k) * y, **quick) for k in (0, 1)
    )
    np.testing.assert_allclose((mpa.predict(X)[0] - 900.0) / 100.0, usual.predict(X)[0], atol=1e-3)
    np.testing.assert_allclose(mpa.predict(X)[1] / 1e4, usual.predict(X)[1], rtol=1e-2)


# Seeds, refits, state


def test_same_seed_same_draws(fitted, mlp, regression, short):
    again = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **short, rng_key=jax.random.key(0))
    for name, values in fitted.get_samples().items():
        np.testing.assert_array_equal(again.get_samples()[name], values)


def test_another_seed_reaches_training_and_sampling(fitted, mlp, regression, short):
    """Trap: rng_key never reaches pre-training."""
    other = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **short, rng_key=jax.random.PRNGKey(1))
    assert not np.allclose(other.pretraining.params["Dense0"]["kernel"], fitted.pretraining.params["Dense0"]["kernel"])
    assert not np.allclose(other.get_samples()["Dense2.kernel"], fitted.get_samples()["Dense2.kernel"])


def test_refit_equals_a_fresh_fit_also_after_other_data(fitted, mlp, regression, two_outputs, short, quick):
    """Trap: refit keeps old weights."""
    X, y = regression
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1)
    model.fit(np.hstack([X, X])[:40], 5.0 + 3.0 * y[:40], **quick)
    assert model.predict(np.hstack([X, X]))[0].shape == (60,)
    model.fit(X, y, **short)
    np.testing.assert_array_equal(model.predict(X), fitted.predict(X))


def test_a_second_fit_of_a_fresh_model_compiles_nothing(fitted, mlp, regression, short, count_compilations):
    """Also with another seed, step size, prior, a few rows fewer and other values."""
    X, y = regression
    fitted.predict(X)
    with count_compilations() as compiled:
        model = nb.PartialBNN(nb.FlaxMLP([6, 4], 1), **LAST, num_backbones=1)
        options = {**short, "map_sigma": 0.5, "sgd_epochs": 25}
        model.fit(2.0 * X[:59], -y[:59], **options, seed=3, sgd_lr=0.02, priors_sigma=0.7)
        model.predict(X[:59])
    assert compiled.number == 0


def test_five_percent_more_rows_compile_nothing(mlp, regression, short, count_compilations):
    X, y = regression
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **short)
    model.predict(X)
    with count_compilations() as compiled:
        more = np.concatenate([X, X[:3]]), np.concatenate([y, y[:3]])
        model.fit(*more, **short)
    assert compiled.number == 0 and model.predict(more[0])[0].shape == (63,)


def test_a_failed_fit_leaves_the_model_as_it_was(fitted, regression, short):
    model = copy.copy(fitted)
    X, y = regression
    before = model.predict(X)
    with pytest.raises(nb.errors.TrainingError, match="learning rate"):
        model.fit(X, 2.0 * y, **short, sgd_lr=1e30)
    with pytest.raises(nb.errors.DataError):
        model.fit(X, y[:-1], **short)
    with pytest.raises(nb.errors.SelectionError):
        model.fit(X, y, **short, priors_sigma={"Dense7": 1.0})
    np.testing.assert_array_equal(model.predict(X), before)


def test_a_first_fit_that_fails_leaves_the_model_unfitted(mlp, regression, short):
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1)
    for sigma in (1.0, "auto"):
        with pytest.raises(nb.errors.TrainingError):
            model.fit(*regression, **{**short, "map_sigma": sigma}, sgd_lr=1e30)
    with pytest.raises(nb.errors.NotFittedError, match="fit"):
        model.predict(regression[0])


def test_fit_mutates_neither_constructor_arguments_nor_data(mlp, regression, quick):
    names, neurons = ["Dense2"], {"Dense0": [(0, 1), (2, 3)]}
    given = nb.DeterministicNN(mlp, input_shape=(3,)).train(*regression, epochs=2, progress_bar=False).get_params()
    config = {"method": "magnitude", "layer_names": ["Dense1"], "num_pairs_per_layer": 3}
    sigmas = {"Dense2": 0.5}
    originals = (names, neurons, config, sigmas, jax.tree.map(np.array, dict(given)), *regression)
    kept = copy.deepcopy(originals)
    model = nb.PartialBNN(
        mlp,
        probabilistic_layer_names=names,
        probabilistic_neurons=neurons,
        deterministic_weights=given,
        num_backbones=1,
    )
    model.fit(*regression, **quick, select_neurons_config=config, priors_sigma=sigmas)
    assert originals[:4] == kept[:4]
    assert model.probabilistic_layer_names is names and model.probabilistic_neurons is neurons
    assert model.deterministic_weights is given
    jax.tree.map(np.testing.assert_array_equal, dict(given), kept[4])
    jax.tree.map(np.testing.assert_array_equal, list(regression), list(kept[5:]))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS = {
    "read-only": (read_only, read_only),
    "float32": (lambda X: X.astype(np.float32), lambda y: y.astype(np.float32)),
    "lists": (lambda X: X.tolist(), lambda y: y.tolist()),
    "jax": (jnp.asarray, jnp.asarray),
    "fortran order": (np.asfortranarray, lambda y: np.repeat(y, 2)[::2]),
    "pandas": (lambda X: pd.DataFrame(X, columns=list("abc")), lambda y: pd.Series(y, name="y")),
    "polars": (lambda X: pl.DataFrame(X, schema=list("abc")), lambda y: pl.Series("y", y)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_model(mlp, regression, quick, form):
    as_x, as_y = FORMS[form]
    expected = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **quick).predict(regression[0])
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(as_x(regression[0]), as_y(regression[1]), **quick)
    np.testing.assert_allclose(model.predict(as_x(regression[0])), expected, rtol=1e-3, atol=1e-4)


def test_integer_data(mlp, quick):
    rng = np.random.default_rng(5)
    X, y = rng.integers(-5, 5, (60, 3)), rng.integers(0, 9, 60)
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **quick)
    twin = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X.astype(float), y.astype(float), **quick)
    np.testing.assert_array_equal(model.predict(X), twin.predict(X.astype(float)))


def test_a_fitted_model_survives_pickling(fitted, classifier, regression, three_classes):
    """Trap: not picklable."""
    for model, X in ((fitted, regression[0]), (classifier, three_classes[0])):
        copied = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(copied.predict(X)[0], model.predict(X)[0])
        np.testing.assert_array_equal(copied.predict(X)[1], model.predict(X)[1])
        assert copied.diagnostics() == model.diagnostics()


# Predictions


def test_moments_are_those_of_a_network_written_by_hand(fitted, regression):
    """Trap: variance from one noisy draw (9 % mean, 35 % max error)."""
    X, y = regression
    outputs = y.mean() + y.std() * outputs_by_hand(fitted, X)[..., 0]
    prediction = fitted.posterior_predictive(X)
    np.testing.assert_allclose(prediction.mean, outputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prediction.epistemic_var, outputs.var(0), rtol=1e-3)
    noise_var = np.mean(fitted.get_samples()["noise_std"] ** 2)
    np.testing.assert_allclose(prediction.aleatoric_var, noise_var, rtol=1e-4)
    np.testing.assert_allclose(fitted.predict(X)[1], outputs.var(0) + noise_var, rtol=1e-3)
    np.testing.assert_allclose(prediction.std**2, prediction.var)


def test_quantiles_are_those_of_the_mixture(fitted, regression):
    X, y = regression
    X = X[:6]
    outputs = y.mean() + y.std() * outputs_by_hand(fitted, regression[0])[:, :6, 0]
    noise = fitted.get_samples()["noise_std"][:, None]
    levels = [0.025, 0.5, 0.9]
    quantiles = fitted.posterior_predictive(X, quantiles=levels).quantiles
    assert list(quantiles) == levels
    for level in levels:
        for row in range(6):
            solved = scipy.optimize.brentq(
                lambda v, row=row, level=level: scipy.stats.norm.cdf(v, outputs[:, row], noise[:, 0]).mean() - level,
                -50, 50,
            )  # fmt: skip
            assert quantiles[level][row] == pytest.approx(solved, abs=2e-4 * y.std())


def test_variance_and_quantiles_agree_with_many_draws(fitted, regression):
    X = regression[0][:5]
    num_draws = 40_000
    prediction = fitted.posterior_predictive(X, quantiles=[0.05, 0.5, 0.95], num_draws=num_draws, seed=1)
    draws, std = prediction.draws, prediction.std
    assert np.max(np.abs(draws.mean(0) - prediction.mean) / std) < 5 / np.sqrt(num_draws)
    assert np.max(np.abs(draws.var(0) / prediction.var - 1)) < 6 * np.sqrt(2 / num_draws)
    for level, value in prediction.quantiles.items():
        share = (draws < value).mean(0)
        assert np.max(np.abs(share - level)) < 5 * np.sqrt(level * (1 - level) / num_draws)


def test_draws_of_the_function_have_its_moments_exactly(fitted, regression):
    X = regression[0]
    functions = fitted.sample_from_posterior(X, 100, noise=False, seed=2)
    prediction = fitted.posterior_predictive(X)
    np.testing.assert_allclose(functions.mean(0), prediction.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(functions.var(0), prediction.epistemic_var, rtol=1e-3)
    np.testing.assert_array_equal(functions, fitted.sample_from_posterior(X, 100, noise=False, seed=2))
    assert not np.array_equal(functions, fitted.sample_from_posterior(X, 100, noise=False, seed=3))


def test_predictions_in_blocks_equal_those_in_one(fitted, classifier, regression, three_classes, monkeypatch):
    X, tokens = regression[0], three_classes[0]
    whole = fitted.posterior_predictive(X, quantiles=[0.1])
    probabilities, entropy = classifier.predict(tokens)
    monkeypatch.setattr(predictive, "rows_per_block", lambda *args: 16)
    monkeypatch.setattr(predictive, "MAX_DRAWS_PER_BLOCK", 7)  # 100 draws: the last block is short
    monkeypatch.setattr(mixture, "VALUES_PER_BLOCK", 2000)
    blocks = fitted.posterior_predictive(X, quantiles=[0.1])
    for name in ("mean", "epistemic_var", "aleatoric_var"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(blocks.quantiles[0.1], whole.quantiles[0.1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(classifier.predict(tokens)[0], probabilities, atol=1e-6)
    np.testing.assert_allclose(classifier.predict(tokens)[1], entropy, atol=1e-5)
    np.testing.assert_allclose(fitted.deterministic_predict(X[:1]), fitted.deterministic_predict(X)[:1], rtol=1e-5)


def test_class_entropies_are_split_as_defined(classifier, three_classes):
    """Trap: expected entropy sold as uncertainty."""
    X, y = three_classes
    prediction = classifier.posterior_predictive(X, num_draws=100)
    draws, p = prediction.draws, prediction.probabilities
    assert draws.shape == (100, 60, 3)
    np.testing.assert_allclose(draws.mean(0), p, atol=1e-5)
    np.testing.assert_allclose(prediction.total_entropy, scipy.stats.entropy(p, axis=1), atol=1e-9)
    expected = scipy.stats.entropy(draws, axis=2).mean(0)
    np.testing.assert_allclose(prediction.expected_entropy, expected, atol=1e-4)
    np.testing.assert_allclose(
        prediction.mutual_information, prediction.total_entropy - prediction.expected_entropy, atol=1e-12
    )
    assert prediction.mutual_information.min() >= 0 and prediction.mutual_information.max() > 0
    probabilities, uncertainty = classifier.predict(X)
    np.testing.assert_array_equal(uncertainty, prediction.total_entropy)
    np.testing.assert_array_equal(classifier.predict_classes(X), probabilities.argmax(1))
    assert np.mean(classifier.predict_classes(X) == y) > 0.6
    assert "noise_std" not in classifier.get_samples()
    with pytest.raises(nb.errors.OptionError, match="quantiles"):
        classifier.posterior_predictive(X, quantiles=[0.5])


def test_each_output_has_its_own_noise_in_its_own_units(two_output_fit, two_outputs):
    X, y = two_outputs
    noise = two_output_fit.get_samples()["noise_std"]
    assert noise.shape == (100, 2)
    prediction = two_output_fit.posterior_predictive(X)
    np.testing.assert_allclose(prediction.aleatoric_var, np.broadcast_to((noise**2).mean(0), (60, 2)), rtol=1e-4)
    # Noise of 10 in the second output; the first is noisy only as far as a short training leaves a misfit.
    assert 5 < noise[:, 1].mean() < 15
    assert noise[:, 0].mean() < 2
    outputs = y.mean(0) + y.std(0) * outputs_by_hand(two_output_fit, X)
    np.testing.assert_allclose(prediction.mean, outputs.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(prediction.epistemic_var, outputs.var(0), rtol=1e-3)


def test_regression_has_no_classes(fitted, regression):
    assert fitted.is_regression
    with pytest.raises(nb.errors.OptionError, match="num_classes"):
        fitted.predict_classes(regression[0])


# Draws


def test_samples_are_keyed_by_leaf_with_chains_on_request(mlp, regression, quick):
    model = nb.PartialBNN(mlp, probabilistic_neurons={"Dense0": [(2, 5), (0, 1)]}, **LAST, num_backbones=1)
    model.fit(*regression, **quick, num_chains=3)
    flat, chains = model.get_samples(), model.get_samples(chain_dim=True)
    shapes = {"Dense0.kernel": (2,), "Dense2.bias": (1,), "Dense2.kernel": (4, 1), "noise_std": ()}
    assert {name: values.shape for name, values in flat.items()} == {n: (60, *s) for n, s in shapes.items()}
    assert {name: values.shape for name, values in chains.items()} == {n: (3, 20, *s) for n, s in shapes.items()}
    for name, values in flat.items():
        np.testing.assert_array_equal(values, chains[name].reshape(values.shape))
    # A partly Bayesian leaf is in the order of its positions: the weight (0, 1) comes first.
    trained = model.pretraining.params["Dense0"]["kernel"]
    assert abs(flat["Dense0.kernel"][:, 0].mean() - trained[0, 1]) < 0.1
    assert abs(flat["Dense0.kernel"][:, 1].mean() - trained[2, 5]) < 0.1


def test_chains_run_vectorised_or_one_after_the_other(fitted, mlp, regression, short):
    X, y = regression
    shapes = []
    for method in ("vectorized", "sequential"):
        model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **short, num_chains=2, chain_method=method)
        shapes.append({name: values.shape for name, values in model.get_samples(chain_dim=True).items()})
        assert model.diagnostics().num_chains == 2 and model.diagnostics().num_draws == 100
        first, second = model.get_samples(chain_dim=True)["Dense2.kernel"]
        assert not np.array_equal(first, second)
        mean, variance = model.predict(X)
        # Another run of the same posterior.
        assert np.max(np.abs(mean - fitted.predict(X)[0]) / np.sqrt(variance)) < 0.5
    assert shapes[0] == shapes[1]
    assert shapes[0]["Dense2.kernel"] == (2, 100, 4, 1)


def test_parallel_chains_without_devices_say_what_to_do(mlp, regression, short):
    if jax.local_device_count() > 1:
        pytest.skip("there are several devices")
    with pytest.raises(nb.errors.OptionError, match="vectorized"):
        nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(*regression, **short, num_chains=2, chain_method="parallel")


def test_the_posterior_keeps_what_the_sampler_reported(fitted):
    """Trap: extra_fields dropped."""
    stats = fitted.posterior.stats
    assert {"diverging", "num_steps", "accept_prob", "energy", "potential_energy"} <= set(stats)
    assert all(values.shape == (1, 100) for values in stats.values())
    assert np.all(stats["num_steps"] >= 1)
    assert np.all((stats["accept_prob"] >= 0) & (stats["accept_prob"] <= 1))
    diagnostics = fitted.diagnostics()
    assert diagnostics.num_divergent == stats["diverging"].sum()
    assert diagnostics.verdict and isinstance(diagnostics.ok, bool)
    assert {"r_hat", "ess_bulk", "ess_tail", "num_divergent"} <= set(diagnostics.summary())


# The deterministic stage


@pytest.mark.parametrize("schedule", ["constant", "linear", "cyclic"])
def test_weight_averaging_within_a_fit(mlp, regression, quick, schedule):
    X, y = regression
    plain = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **quick)
    averaged = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(
        X, y, **quick, swa_config={"schedule": schedule, "start_pct": 0.5}
    )
    assert len(averaged.pretraining.history["loss"]) == 10
    assert not np.allclose(averaged.deterministic_predict(X), plain.deterministic_predict(X))


def test_the_regularisation_is_chosen_by_unseen_rows(mlp, regression, quick):
    """A network trained to the end memorises; by default the data choose how strongly and how long to train."""
    X, y = regression
    options = {name: value for name, value in quick.items() if name not in ("map_sigma", "sgd_epochs")}
    model = nb.PartialBNN(mlp, **LAST, num_backbones=1).fit(X, y, **options, sgd_epochs=60)
    search = model.pretraining.search
    assert search.losses.shape[0] == len(search.sigmas)
    assert search.sigma in search.sigmas and model.pretraining.sigma == search.sigma
    assert 1 <= search.num_epochs <= 60
    assert len(model.pretraining.history["loss"]) == search.num_epochs


def test_given_weights_of_another_network_raise(mlp, regression, quick):
    other = nb.DeterministicNN(nb.FlaxMLP([6, 5], 1), input_shape=(3,)).train(*regression, epochs=1)
    model = nb.PartialBNN(mlp, deterministic_weights=other.get_params(), **LAST, num_backbones=1)
    with pytest.raises(nb.errors.ParameterError, match=r"deterministic_weights.*\n.*Dense1"):
        model.fit(*regression, **quick)


def test_a_trained_model_or_plain_arrays_serve_as_given_weights(mlp, regression, quick):
    X, y = regression
    det = nb.DeterministicNN(mlp, input_shape=(3,)).train(X, y, epochs=5, progress_bar=False)
    model = nb.PartialBNN(mlp, deterministic_weights=det, **LAST, num_backbones=1).fit(X, y, **quick)
    np.testing.assert_allclose(model.deterministic_predict(X), det.predict(X), rtol=1e-5)
    raw = nb.DeterministicNN(mlp, input_shape=(3,), standardize=False).train(X, y, epochs=5, progress_bar=False)
    plain = {name: {k: np.array(v) for k, v in leaves.items()} for name, leaves in raw.get_params().items()}
    model = nb.PartialBNN(mlp, deterministic_weights=plain, **LAST, num_backbones=1).fit(X, y, **quick)
    np.testing.assert_allclose(model.deterministic_predict(X), raw.predict(X), rtol=1e-5)
