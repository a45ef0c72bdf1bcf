"""``engine=``: what 'auto' picks, names, configs, and that exact draws are reported as what they are."""

import numpy as np
import pytest

import neurobayes as nb
from neurobayes.errors import ConvergenceWarning, OptionError
from neurobayes.inference import ENGINES, NUTS, Auto, LastLayer

OPTIONS = {"num_samples": 150, "sgd_epochs": 10, "map_sigma": 1.0, "progress_bar": False}
SHORT_NUTS = {**OPTIONS, "num_warmup": 30, "num_samples": 30}
short_runs = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")


def fit(network, data, **options):
    classes = options.pop("num_classes", None)
    bayesian = options.pop("bayesian", None)
    return nb.PartialBNN(network, classes, bayesian=bayesian, num_backbones=1).fit(*data, **{**OPTIONS, **options})


def test_the_default_is_exact_for_a_random_output_layer(mlp, regression):
    model = fit(mlp, regression)
    assert model.posterior.info["engine"] == "last_layer"
    judged = model.diagnostics()
    assert judged.ok
    assert "150 are independent draws of the exact posterior" in judged.verdict
    assert (judged.ess_bulk, judged.ess_tail, judged.r_hat, judged.num_divergent) == (150, 150, 1, 0)
    mean, variance = model.predict(regression[0])
    assert mean.shape == variance.shape == (60,)
    assert np.all(variance > 0)


def test_every_way_to_ask_for_it_gives_the_same_draws(mlp, regression):
    asked = [None, "auto", "last_layer", Auto(), LastLayer()]
    models = [fit(mlp, regression, engine=engine, seed=3) for engine in asked]
    models.append(fit(mlp, regression, seed=3, num_warmup=7))  # there is no warm-up
    for model in models[1:]:
        np.testing.assert_array_equal(model.posterior.draws, models[0].posterior.draws)
    assert not np.array_equal(fit(mlp, regression, seed=4).posterior.draws, models[0].posterior.draws)


def test_chains_are_parts_of_one_stream(mlp, regression):
    one = fit(mlp, regression, num_samples=160)
    four = fit(mlp, regression, num_samples=40, num_chains=4)
    assert four.posterior.draws.shape[:2] == (4, 40)
    np.testing.assert_array_equal(four.posterior.flat_draws, one.posterior.flat_draws)


def test_two_outputs_have_noise_of_their_own(two_outputs):
    X, y = two_outputs
    model = fit(nb.FlaxMLP([6, 4], 2), (X, y), num_samples=400)
    assert model.posterior.info["engine"] == "last_layer"
    assert model.posterior.draws.shape[-1] == 2 * 5 + 2
    first, second = model.get_samples()["noise_std"].mean(axis=0)
    assert 4 < second < 12
    assert first < 1.5


@short_runs
def test_other_weights_are_sampled(mlp, regression):
    model = fit(mlp, regression, bayesian=nb.last(2), **SHORT_NUTS)
    info = model.posterior.info
    assert (info["engine"], info["collapsed"]) == ("nuts", True)
    assert "linearly, but those of the output layer do" in info["chosen_because"]
    hidden = fit(mlp, regression, bayesian=nb.layers("Dense0"), **SHORT_NUTS)
    assert not hidden.posterior.info["collapsed"]


@short_runs
def test_classes_are_sampled(three_classes):
    model = fit(nb.FlaxMLP([4], 3), three_classes, num_classes=3, **SHORT_NUTS)
    assert model.posterior.info["engine"] == "nuts"
    assert "Gaussian" in model.posterior.info["chosen_because"]
    assert "independent draws" not in model.diagnostics().verdict


@short_runs
def test_nuts_on_request(mlp, regression):
    by_name, by_config = (fit(mlp, regression, engine=engine, **SHORT_NUTS) for engine in ("nuts", NUTS()))
    assert by_name.posterior.info["engine"] == "nuts"
    np.testing.assert_array_equal(by_name.posterior.draws, by_config.posterior.draws)


def test_exact_draws_that_are_not_possible_say_why(regression, three_classes):
    with pytest.raises(OptionError, match=r"do not enter the output linearly. Use engine='auto'"):
        fit(nb.FlaxMLP([4], 1), regression, bayesian=nb.last(2), engine="last_layer")
    with pytest.raises(OptionError, match="not Gaussian"):
        fit(nb.FlaxMLP([4], 3), three_classes, num_classes=3, engine="last_layer")


def test_unknown_engines_name_the_known_ones(mlp, regression):
    with pytest.raises(OptionError, match=r"engine='last-layer' is not known \(closest: 'last_layer'\)"):
        fit(mlp, regression, engine="last-layer")
    with pytest.raises(OptionError, match="must be one of auto, "):
        fit(mlp, regression, engine=7)
    with pytest.raises(OptionError, match="chain_method"):
        fit(mlp, regression, chain_method="sideways")


@pytest.mark.parametrize("name", ENGINES)
def test_engines_have_defaults(name):
    assert ENGINES[name]() == ENGINES[name]()


@pytest.mark.parametrize("options", [{"num_noise_nodes": 20}, {"prior_scale": -1.0}, {"prior_scale": "some"}], ids=str)
def test_bad_options_of_the_exact_engine(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        LastLayer(**options)


def test_few_draws_are_still_few(mlp, regression):
    with pytest.warns(ConvergenceWarning, match="only 20 effective draws"):
        fit(mlp, regression, num_samples=20)


def test_a_second_fit_compiles_nothing(mlp, regression, count_compilations):
    X, y = regression
    fit(mlp, (X, y), seed=0)
    with count_compilations() as compiled:
        fit(mlp, (X[::-1] + 0.1, 0.3 * y - X[:, 2]), seed=1)
    assert compiled.number == 0


def test_an_unknown_prior_scale_is_reported(mlp, regression):
    model = fit(mlp, regression, engine=LastLayer(prior_scale="auto"))
    scale = model.posterior.stats["prior_scale"]
    assert scale.shape == (1, 150)
    assert np.all(scale > 0)
    assert np.ptp(scale) > 0
