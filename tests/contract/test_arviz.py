"""``nb.to_arviz``: groups, units, and that ArviZ's own leave-one-out and comparison work on them."""

import sys

import numpy as np
import pytest
from scipy import stats

import neurobayes as nb
from neurobayes import predictive
from neurobayes.errors import DataError, NotFittedError, OptionError

pytest.importorskip("arviz_base")
pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")

OPTIONS = {"num_samples": 150, "num_chains": 2, "sgd_epochs": 60, "map_sigma": 1.0, "progress_bar": False}


@pytest.fixture(scope="module")
def fitted(regression):
    X, y = regression
    return nb.PartialBNN(nb.FlaxMLP([6, 4], 1), num_backbones=1).fit(X, 50 + 20 * y, **OPTIONS)


@pytest.fixture(scope="module")
def tree(fitted, regression):
    X, y = regression
    return nb.to_arviz(fitted, X, 50 + 20 * y, seed=0)


def test_groups_and_shapes(tree, fitted):
    assert set(tree.children) == {
        "posterior", "sample_stats", "posterior_predictive", "log_likelihood", "observed_data",
    }  # fmt: skip
    samples = fitted.get_samples(chain_dim=True)
    assert set(tree["posterior"].data_vars) == set(samples)
    for name, values in samples.items():
        np.testing.assert_array_equal(tree["posterior"][name].values, values)
    assert tree["log_likelihood"]["y"].shape == (2, 150, 60)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert tree.attrs["inference_library"] == "neurobayes"


def test_log_likelihood_is_in_the_units_of_the_user(tree, fitted, regression):
    X, y = regression
    noise_std = fitted.get_samples(chain_dim=True)["noise_std"]
    chain, draw = 1, 17
    draws = fitted._fitted.posterior.draws.reshape(-1, fitted._fitted.posterior.draws.shape[-1])
    theta = draws[chain * 150 + draw][None, : fitted.partition.size]
    outputs = predictive.function_draws(fitted._fitted.members[0].source, fitted._fitted.scaling.inputs(X), theta)
    mean = fitted._fitted.scaling.mean_to_user(outputs)[0, :, 0]
    expected = stats.norm.logpdf(50 + 20 * y, mean, noise_std[chain, draw])
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[chain, draw], expected, rtol=1e-5)


def test_posterior_predictive_matches_predict(tree, fitted, regression):
    new = tree["posterior_predictive"]["y"].values.reshape(300, 60)
    mean, variance = fitted.predict(regression[0])
    error = (new.mean(axis=0) - mean) / np.sqrt(variance / 300)
    assert np.abs(error).max() < 5
    assert 0.8 < np.mean(new.var(axis=0) / variance) < 1.2
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, 50 + 20 * regression[1])


@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")  # ArviZ 0.8 with pandas 3.1
def test_leave_one_out_and_comparison(tree, regression):
    from arviz_stats import compare, loo

    X, y = regression
    blind = nb.PartialBNN(nb.FlaxMLP([6, 4], 1), num_backbones=1).fit(X[:, 2:], 50 + 20 * y, **OPTIONS)
    found = loo(tree, pointwise=True)
    assert found.elpd < np.sum(np.log(np.mean(np.exp(tree["log_likelihood"]["y"].values), axis=(0, 1))))
    assert found.elpd_i.shape == (60,)
    table = compare({"all": tree, "blind": nb.to_arviz(blind, X[:, 2:], 50 + 20 * y)})
    assert list(table.index) == ["all", "blind"]
    assert table.loc["blind", "elpd"] < table.loc["all", "elpd"]


def test_sampler_reports_have_their_usual_names(mlp, regression, short):
    model = nb.PartialBNN(mlp, num_backbones=1).fit(*regression, **short)
    found = nb.to_arviz(model)
    assert set(found.children) == {"posterior", "sample_stats"}
    assert {"diverging", "energy", "lp", "n_steps", "acceptance_rate"} == set(found["sample_stats"].data_vars)
    np.testing.assert_array_equal(found["sample_stats"]["lp"], -model.posterior.stats["potential_energy"])
    by_leaf = model.layer_diagnostics()
    assert set(by_leaf) == {"Dense2.kernel", "Dense2.bias", "noise_std"}
    assert by_leaf["Dense2.kernel"].num_weights == 4
    assert 0 < by_leaf["Dense2.kernel"].ess_bulk <= by_leaf["Dense2.kernel"].ess_bulk_median
    assert 0.9 < by_leaf["Dense2.kernel"].r_hat_median <= by_leaf["Dense2.kernel"].r_hat


def test_two_outputs(two_outputs, quick):
    X, y = two_outputs
    model = nb.PartialBNN(nb.FlaxMLP([6, 4], 2), num_backbones=1).fit(X, y, **{**quick, "num_samples": 120})
    found = nb.to_arviz(model, X, y)
    assert found["posterior_predictive"]["y"].dims == ("chain", "draw", "row", "output")
    assert found["log_likelihood"]["y"].shape == (1, 120, 60)
    assert found["observed_data"]["y"].shape == (60, 2)
    with pytest.raises(DataError, match="has 1 columns"):
        nb.to_arviz(model, X, y[:, :1])


def test_classes(three_classes, quick):
    X, y = three_classes
    model = nb.PartialBNN(nb.FlaxMLP([6], 3), 3, num_backbones=1).fit(X, y, **{**quick, "num_samples": 120})
    found = nb.to_arviz(model, X, y)
    likelihood = np.exp(found["log_likelihood"]["y"].values).mean(axis=(0, 1))
    np.testing.assert_allclose(likelihood, model.predict(X)[0][np.arange(60), y], rtol=1e-4)
    new = found["posterior_predictive"]["y"].values
    assert set(np.unique(new)) <= {0, 1, 2}
    frequency = np.mean(new == y, axis=(0, 1))
    np.testing.assert_allclose(frequency.mean(), likelihood.mean(), atol=0.05)


def test_a_tree_goes_to_a_file_and_back(tree, tmp_path):
    xarray = pytest.importorskip("xarray")
    tree.to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "fit.nc", engine="h5netcdf") as back:
        np.testing.assert_array_equal(back["posterior"]["Dense2.kernel"], tree["posterior"]["Dense2.kernel"])


def test_mistakes(fitted, mlp, regression):
    with pytest.raises(OptionError, match="needs X too"):
        nb.to_arviz(fitted, y=regression[1])
    with pytest.raises(NotFittedError):
        nb.to_arviz(nb.PartialBNN(mlp, num_backbones=1))
    with pytest.raises(DataError):
        nb.to_arviz(fitted, regression[0], regression[1][:-1])


def test_without_arviz_the_error_names_the_extra(monkeypatch, fitted):
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(nb.errors.MissingExtraError, match=r'arviz-base.*from the checkout.*"\.\[arviz\]"'):
        nb.to_arviz(fitted)
