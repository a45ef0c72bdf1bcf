"""Noise that the network gives (``noise="network"``): one formula in training, sampling and prediction."""

import copy
import dataclasses
import pickle
import types
import warnings

import jax
import numpy as np
import pytest
import scipy.stats

import neurobayes as nb
from neurobayes import log_density, mixture, trees
from neurobayes.errors import ConvergenceWarning, DataError, OptionError
from neurobayes.inference import NUTS, LastLayer
from neurobayes.inference._gauss_newton import spectrum
from neurobayes.inference.collapse import collapsed_form
from neurobayes.inference.last_layer import examine
from neurobayes.likelihoods import HeteroskedasticGaussian, split_outputs
from neurobayes.models import sampling
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.priors import WeightPrior

pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
UNITS = 1000.0, 900.0  # of a twin of the targets
NEW = np.random.default_rng(7).normal(size=(25, 3))


def fit(X, y, options, width, **kwargs):
    network = nb.FlaxMLP([6, 4], width)
    return nb.PartialBNN(network, num_probabilistic_layers=1, noise="network", **kwargs).fit(X, y, **options, seed=0)


@pytest.fixture(scope="module")
def one(regression, quick):
    """One output and two backbones."""
    return fit(*regression, quick, 2, num_backbones=2)


@pytest.fixture(scope="module")
def multi(two_outputs, quick):
    """Two outputs and three backbones."""
    return fit(*two_outputs, quick, 4, num_backbones=3)


def all_draws(model, X):
    """Means and noise std (draws, n, d) of every draw, in working units, by the network itself."""
    x, means, stds = model._fitted.scaling.inputs(X), [], []
    for member in model._fitted.members:
        source = member.source
        for theta in source.theta:
            outputs = source.network.apply(source.partition.merge(theta, source.params), source.state, x)
            half = outputs.shape[1] // 2
            means.append(np.asarray(outputs[:, :half], float))
            stds.append(np.exp(np.asarray(outputs[:, half:], float)))
    return np.stack(means), np.stack(stds)


# The formula


def test_variance_head_trained_as_variance_sampled_as_sd(regression, at_the_trained_weights):
    """The trap. Here every draw is the given network, whose second output is the logarithm of a standard deviation."""
    X, y = regression
    network = nb.FlaxMLP([6], 2)
    det = nb.DeterministicNN(network, (3,), noise="network").train(X, 20 * y + 50, epochs=30, progress_bar=False)
    params = det.get_params()
    options = {k: v for k, v in at_the_trained_weights.items() if k not in ("sgd_epochs", "map_sigma")}
    model = nb.PartialBNN(network, deterministic_weights=params, noise="network").fit(X, 20 * y + 50, **options)
    x = (NEW - X.mean(0)) / X.std(0)
    outputs = np.tanh(x @ params["Dense0"]["kernel"] + params["Dense0"]["bias"]) @ params["Dense1"]["kernel"]
    outputs = outputs + params["Dense1"]["bias"]
    noise_std = 20 * y.std() * np.exp(outputs[:, 1])
    found = model.posterior_predictive(NEW)
    np.testing.assert_allclose(np.sqrt(found.aleatoric_var), noise_std, rtol=1e-4)
    np.testing.assert_allclose(found.epistemic_var, 0.0, atol=1e-6)
    mean = 20 * (y.mean() + y.std() * outputs[:, 0]) + 50
    for predicted in (found.mean, det.predict(NEW), model.deterministic_predict(NEW)):
        np.testing.assert_allclose(predicted, mean, rtol=1e-5)
    low, high = model.predict_interval(NEW, 0.95)
    np.testing.assert_allclose(high - low, 2 * 1.959964 * noise_std, rtol=1e-3)
    target = mean + noise_std
    expected = scipy.stats.norm.logpdf(target, mean, noise_std)
    np.testing.assert_allclose(model.log_predictive_density(NEW, target), expected, rtol=1e-4, atol=1e-4)
    assert set(model.get_samples()) == {"Dense1.kernel", "Dense1.bias"}
    assert model.out_of_fold is None and model.held_out_std is None


def small_density(y, prior_std=0.7):
    """The log density of an output layer ``(4, 2 d)`` over rows of weights one and, last, zero."""
    rng = np.random.default_rng(3)
    network = as_network(nb.FlaxMLP([4], 2 * y.shape[1]))
    x = rng.normal(size=(len(y), 2)).astype(np.float32)
    params, state = network.init(jax.random.key(0), x)
    masks = {"Dense1.kernel": np.ones((4, 2 * y.shape[1]), bool)}
    partition = Partition.from_masks(masks, trees.shapes(params))
    prior = WeightPrior(np.zeros(partition.size, np.float32), np.full(partition.size, prior_std, np.float32))
    weights = np.r_[np.ones(len(y) - 2), np.zeros(2)].astype(np.float32)
    density = log_density.build(
        network, partition, params, state, x, y, weights, likelihood=HeteroskedasticGaussian(), prior=prior,
        noise_prior=None,
    )  # fmt: skip
    features = np.tanh(x @ np.asarray(params["Dense0"]["kernel"], float) + np.asarray(params["Dense0"]["bias"], float))
    return density, features, np.asarray(params["Dense1"]["bias"], float)


@pytest.mark.parametrize("num_targets", [1, 2])
def test_log_density_is_the_full_log_joint(num_targets):
    rng = np.random.default_rng(num_targets)
    y = rng.normal(size=(9, num_targets)).astype(np.float32)
    density, features, bias = small_density(y)
    assert density.size == 8 * num_targets
    theta = rng.normal(size=density.size).astype(np.float32)
    outputs = features @ theta.reshape(4, -1) + bias
    mean, noise_std = outputs[:7, :num_targets], np.exp(outputs[:7, num_targets:])
    expected = scipy.stats.norm.logpdf(theta, 0.0, 0.7).sum() + scipy.stats.norm.logpdf(y[:7], mean, noise_std).sum()
    assert float(density(theta)) == pytest.approx(expected, rel=1e-5)


def test_curvature_is_the_expected_one_and_exact_engines_stand_aside():
    """J' F J with the Fisher information ``F`` of means and logarithms, each row by its weight."""
    y = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    density, features, bias = small_density(y)
    theta = np.random.default_rng(1).normal(size=density.size).astype(np.float32)
    found = spectrum(density.form, jax.random.key(0), theta / 0.7, np.zeros(0), density.terms, "full", 0)
    log_std = (features @ theta.reshape(4, 4) + bias)[:7, 2:]
    fisher = np.concatenate([np.exp(-2 * log_std), np.full_like(log_std, 2.0)], axis=1)
    expected = np.zeros((16, 16))
    for row, information in zip(features[:7], fisher, strict=True):
        jacobian = np.kron(row, np.eye(4))  # outputs by weights
        expected += 0.49 * jacobian.T @ np.diag(information) @ jacobian
    matrix = (found.vectors * found.values) @ found.vectors.T
    np.testing.assert_allclose(matrix, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert examine(density) == ("the noise is an output of the network", None)
    assert collapsed_form(density) is None


def test_priors_sigma_ignored_by_heteroskedastic_models(regression, quick):
    """The trap: it reaches the weights of both heads. Laplace's Gaussian has the Fisher information as curvature."""
    options = {k: v for k, v in quick.items() if k != "engine"} | {"engine": "laplace", "num_samples": 400, "seed": 0}
    network = nb.FlaxMLP([4], 2)
    stds = []
    for sigma in (0.01, 1.0):
        model = nb.PartialBNN(network, noise="network", num_backbones=1).fit(*regression, **options, priors_sigma=sigma)
        stds.append(model.get_samples()["Dense1.kernel"].std(axis=0))
    assert stds[0].max() < 0.0115 and stds[0].min() > 0.004
    assert stds[1].min() > 2 * stds[0].max()
    # With the logarithm of the noise linear in the weights, its moments are those of a log-normal.
    found, (means, stds) = model.posterior_predictive(NEW), all_draws(model, NEW)
    error = 5 / np.sqrt(400)
    np.testing.assert_allclose(found.epistemic_var, regression[1].var() * means.var(axis=0)[:, 0], rtol=1.5 * error)
    relative = stds[..., 0] ** 2 / np.mean(stds[..., 0] ** 2, axis=0)
    expected = regression[1].var() * np.mean(stds[..., 0] ** 2, axis=0)
    np.testing.assert_array_less(np.abs(found.aleatoric_var / expected - 1), error * relative.std(axis=0) + 1e-3)


# Predictions of several backbones


def test_purely_bayesian_predictions_are_moments_of_all_draws(multi, two_outputs):
    means, stds = all_draws(multi, NEW)
    scale = two_outputs[1].std(axis=0)
    found = multi.posterior_predictive(NEW, calibration=None)
    assert found.mean.shape == found.epistemic_var.shape == found.aleatoric_var.shape == (25, 2)
    np.testing.assert_allclose(found.mean, two_outputs[1].mean(axis=0) + scale * means.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.epistemic_var, scale**2 * means.var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found.aleatoric_var, scale**2 * (stds**2).mean(axis=0), rtol=1e-3)


def test_calibrated_noise_is_that_of_the_network_times_a_factor(multi):
    judged, bayesian = multi.out_of_fold, multi.posterior_predictive(NEW, calibration=None)
    found = multi.posterior_predictive(NEW)
    assert judged.noise_variation is None and judged.noise_head.factor.shape == (1, 2)
    np.testing.assert_allclose(found.mean, bayesian.mean, rtol=1e-12)
    np.testing.assert_allclose(found.epistemic_var, judged.epistemic_factor * bayesian.epistemic_var, rtol=1e-6)
    head, scale = judged.noise_head, multi._fitted.scaling.y_std**2
    held = np.clip(bayesian.aleatoric_var / scale, head.lower, head.upper)
    np.testing.assert_allclose(found.aleatoric_var, scale * head.factor * held, rtol=1e-6)
    assert np.ptp(found.aleatoric_var[:, 0]) > 0.01 * found.aleatoric_var[:, 0].mean()
    # Far away the noise is held, and the rest is epistemic.
    far = multi.posterior_predictive(100 * NEW).aleatoric_var
    assert np.all(far <= scale * head.factor * head.upper * (1 + 1e-6))
    assert np.all((judged.coverage > 0.8) & (judged.coverage <= 1.0)) and judged.rmse.shape == (2,)


@pytest.mark.parametrize("calibration", ["out_of_fold", None])
def test_draws_quantiles_and_densities_belong_to_one_distribution(multi, calibration):
    found = multi.posterior_predictive(NEW, quantiles=[0.1, 0.5, 0.9], calibration=calibration)
    fitted, x = multi._inputs(NEW)
    parts = multi._mixture(fitted, calibration)
    means, stds = mixture.function_draws(parts, x, np.arange(mixture.num_draws(parts)))
    assert means.shape == stds.shape == (mixture.num_draws(parts), 25, 2)
    for level, values in found.quantiles.items():
        scaled = (values - fitted.scaling.y_mean) / fitted.scaling.y_std
        np.testing.assert_allclose(scipy.stats.norm.cdf(scaled, means, stds).mean(axis=0), level, atol=1e-3)
    y = found.mean + 0.5 * found.std
    scaled = (y - fitted.scaling.y_mean) / fitted.scaling.y_std
    each = scipy.stats.norm.logpdf(scaled, means, stds).sum(axis=-1)
    expected = np.log(np.exp(each).mean(axis=0)) - np.log(fitted.scaling.y_std).sum()
    density = multi.log_predictive_density(NEW, y, form="mixture", calibration=calibration)
    np.testing.assert_allclose(density, expected, rtol=1e-4, atol=1e-4)
    drawn = multi.sample_from_posterior(NEW[:3], 20_000, seed=0, calibration=calibration)
    assert drawn.shape == (20_000, 3, 2)
    np.testing.assert_allclose(drawn.var(axis=0), found.var[:3], rtol=0.08)
    assert multi.sample_from_posterior(NEW, 5, noise=False, calibration=calibration).shape == (5, 25, 2)


def test_shapes_and_reports_of_a_single_output(one, regression):
    assert one.predict(NEW)[0].shape == one.predict_interval(NEW)[0].shape == (25,)
    assert one.sample_from_posterior(NEW, 4).shape == (4, 25)
    assert one.log_predictive_density(NEW, np.zeros(25)).shape == (25,)
    assert one.deterministic_predict(NEW).shape == (25,)
    assert one.held_out_std.shape == one.out_of_fold.rmse.shape == (1,)
    assert len(one.backbones.members) == 2 and set(one.get_samples()) == {"Dense2.kernel", "Dense2.bias"}
    assert one.posterior.draws.shape[-1] == one.num_bayesian_weights == 4 * 2 + 2
    with pytest.raises(DataError, match="2 columns but y had 1"):
        one.log_predictive_density(NEW, np.zeros((25, 2)))
    corrected = one.calibrate(NEW, np.random.default_rng(0).normal(size=25))
    assert corrected.predict(NEW)[1].shape == (25,)


def test_any_units_give_the_same(one, regression, quick):
    X, y = regression
    factor, shift = UNITS
    twin = fit(X, factor * y + shift, quick, 2, num_backbones=2)
    for calibration in ("out_of_fold", None):
        ours, theirs = (m.posterior_predictive(NEW, calibration=calibration) for m in (one, twin))
        np.testing.assert_allclose(factor * ours.mean + shift, theirs.mean, rtol=2e-3)
        np.testing.assert_allclose(factor**2 * ours.epistemic_var, theirs.epistemic_var, rtol=2e-2)
        np.testing.assert_allclose(factor**2 * ours.aleatoric_var, theirs.aleatoric_var, rtol=2e-2)
    density = one.log_predictive_density(X, y) - np.log(factor)
    np.testing.assert_allclose(density, twin.log_predictive_density(X, factor * y + shift), rtol=2e-2, atol=2e-2)


def test_a_second_fit_and_its_predictions_compile_nothing(one, regression, quick, count_compilations):
    def everything(rows, number):
        model = fit(*rows, quick, 2, num_backbones=2)
        for calibration in ("out_of_fold", None):
            model.posterior_predictive(NEW[:number], quantiles=[0.5], num_draws=7, calibration=calibration)
            model.log_predictive_density(NEW[:number], np.zeros(number), form="mixture", calibration=calibration)

    everything(regression, 24)
    with count_compilations() as compilations:
        everything([values[::-1] for values in regression], 23)
    assert compilations.number == 0


def test_left_out_rows_are_judged_by_their_density(one, regression):
    """The loss at the best look is that of the members' Gaussian, noise included."""
    fitted, (X, y) = one._fitted, regression
    x, target = fitted.scaling.inputs(X), fitted.scaling.targets(y).astype(float)
    outputs = np.stack([np.asarray(m.network.apply(m.params, m.state, x), float) for m in fitted.mixture.sources])
    mean, log_std = split_outputs(outputs)
    unseen = one.backbones.row_weights[:, :60] == 0
    assert np.all(unseen.sum(axis=0) == 1)  # of two, each row is new to one: nothing to correct
    own = unseen.argmax(axis=0), np.arange(60)
    variance = np.exp(2 * log_std)[own] + 0.5 * mean.var(axis=0, ddof=1)
    expected = -scipy.stats.norm.logpdf(target, mean[own], np.sqrt(variance)).mean()
    assert one.backbones.search.losses.min() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(one.backbones.unseen_rmse, np.sqrt(np.mean((mean[own] - target) ** 2)), rtol=1e-4)


def test_copies_and_pickles_predict_the_same(multi):
    for again in (pickle.loads(pickle.dumps(multi)), copy.deepcopy(multi)):
        np.testing.assert_array_equal(again.predict(NEW), multi.predict(NEW))


def test_arviz_has_the_noise_of_each_row(multi, two_outputs):
    pytest.importorskip("arviz_base")
    X, y = two_outputs
    tree = nb.to_arviz(multi, X, y, seed=0)
    means, stds = all_draws(multi, X)
    scaling = multi._fitted.scaling
    expected = scipy.stats.norm.logpdf(y, scaling.mean_to_user(means), scaling.y_std * stds).sum(axis=-1)
    found = tree["log_likelihood"]["y"].values
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)
    assert "noise_std" not in tree["posterior"].data_vars


def test_warm_starts_and_checkpoints(one, regression, quick, tmp_path):
    X, y = regression
    more = np.concatenate([X, NEW]), np.concatenate([y, NEW[:, 0]])
    again = nb.PartialBNN(one.network, num_probabilistic_layers=1, noise="network", num_backbones=2)
    again.fit(*more, **quick, seed=1, warm_start=one)
    assert again.backbones.row_weights[:, :85].sum() == 85 and np.isfinite(again.held_out_std).all()
    assert again.predict(NEW)[0].shape == (25,)
    runs = [fit(X, y, quick | {"checkpoint_dir": tmp_path}, 2, num_backbones=2) for _ in range(2)]
    np.testing.assert_array_equal(*(run.predict(NEW)[1] for run in runs))


def test_convergence_is_judged_by_means_and_log_noise(one):
    """A log noise that does not settle is seen, though the means of these draws are all the same."""
    member = one._fitted.members[0]
    bias = member.source.partition.unravel(np.arange(10.0)[None])["Dense2.bias"][0]  # places in a position
    theta = np.repeat(member.source.theta[:1], 100, axis=0)
    theta[:, int(bias[1])] += np.where(np.arange(100) < 50, 0.0, 3.0)
    theta[:, int(bias[1])] += 0.01 * np.random.default_rng(0).normal(size=100)
    x = one._fitted.scaling.inputs(NEW)
    prepared = types.SimpleNamespace(rows=types.SimpleNamespace(x=x), num_rows=len(x))
    posterior = dataclasses.replace(member.posterior, draws=theta[None], info={})
    source = member.source._replace(theta=theta, noise_std=np.zeros((100, 0)))
    verdict = sampling.judge(prepared, source, posterior)
    assert not verdict.ok and verdict.r_hat > 1.5


# Options


def test_options_that_contradict_are_refused_before_training(regression, quick, monkeypatch):
    monkeypatch.setattr("neurobayes.training.run_epochs", lambda *a, **k: pytest.fail("training has started"))
    import numpyro.distributions as dist

    network = nb.FlaxMLP([4], 2)
    for model in (nb.PartialBNN, nb.BNN):
        with pytest.raises(OptionError, match=r"noise='network' belongs to regression"):
            model(network, num_classes=2, noise="network")
        with pytest.raises(OptionError, match=r"noise_prior.*priors_sigma"):
            model(network, noise="network", noise_prior=dist.HalfNormal(1.0))
    with pytest.raises(OptionError, match=r"noise.*closest: 'network'"):
        nb.PartialBNN(network, noise="netwrk")
    with pytest.raises(OptionError, match=r"noise='network' is for the Gaussian loss.*cross_entropy"):
        nb.DeterministicNN(network, (3,), loss="cross_entropy", noise="network")
    for engine, name in ((LastLayer(), "last_layer"), (NUTS(collapse=True), "collapse=True")):
        with pytest.raises(OptionError, match=rf"{name}.*noise='network'.*engine='nuts'"):
            nb.PartialBNN(network, noise="network").fit(*regression, **quick | {"engine": engine})


def test_a_network_of_another_width_says_what_it_needs(regression, two_outputs, quick):
    with pytest.raises(DataError, match=r"1 outputs.*1 columns.*mean and a log noise std.*target_dim=2"):
        nb.BNN(nb.FlaxMLP([4], 1), noise="network").fit(*regression, **quick)
    with pytest.raises(DataError, match=r"2 outputs.*2 columns.*target_dim=4"):
        nb.PartialBNN(nb.FlaxMLP([4], 2), noise="network").fit(*two_outputs, **quick)
    with pytest.raises(DataError, match=r"2 outputs but y has 1 columns.*target_dim=1.*noise='network'"):
        nb.PartialBNN(nb.FlaxMLP([4], 2)).fit(*regression, **quick)
    with pytest.raises(DataError, match=r"target_dim=2"):
        nb.DeterministicNN(nb.FlaxMLP([4], 1), (3,), noise="network").train(*regression, epochs=1)


@pytest.mark.slow
def test_automatic_choice_of_weights_and_of_backbones(regression, quick):
    """Scores need the curvature of this likelihood; four backbones are the default of what is sampled."""
    X, y = regression
    config = {"method": "gradient", "layer_names": ["Dense0"], "num_pairs_per_layer": 3}
    model = nb.PartialBNN(nb.FlaxMLP([4], 2), bayesian=nb.top(5, by="laplace_variance"), noise="network")
    model.fit(X, y, **quick, select_neurons_config=config, seed=0)
    assert len(model.backbones.members) == 4 and 5 <= model.num_bayesian_weights <= 8


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "mclmc", "laplace", "svi", "pathfinder", "sgmcmc"])
@pytest.mark.parametrize("choice", ["output", "all"])
def test_every_engine_draws_from_it(regression, engine, choice):
    X, y = regression
    options = {"num_warmup": 150, "num_samples": 150, "sgd_epochs": 60, "progress_bar": False, "seed": 0}
    network = nb.FlaxMLP([4], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if choice == "all":
            model = nb.BNN(network, noise="network")
        else:
            model = nb.PartialBNN(network, noise="network", num_backbones=1, num_probabilistic_layers=1)
        sigma = 0.3 if engine == "sgmcmc" else "auto"
        if engine == "sgmcmc" and choice == "all":  # its own step, by the curvature where it starts, is too large here
            engine = nb.inference.SGMCMC(step_size=1e-3)
        model.fit(X, y, engine=engine, priors_sigma=sigma, map_sigma=1.0, **options)
    mean, variance = model.predict(X)
    assert nb.metrics.rmse(y, mean) < 0.6 * y.std()
    assert 0.25 < np.mean((y - mean) ** 2 / variance) < 1.5  # training rows, so below one
    if engine == "auto":
        assert model.posterior.info["engine"] == "nuts" and not model.posterior.info["collapsed"]
