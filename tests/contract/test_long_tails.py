"""Inputs with long tails: compressed where left-out rows ask for it, and only there."""

import pickle
import warnings

import numpy as np
import pytest

import neurobayes as nb
from neurobayes import backbone_runs, backbones
from neurobayes.errors import CheckpointError, OptionError
from neurobayes.models import deterministic_stage

pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
OPTIONS = {"map_sigma": 1.0, "num_samples": 64, "progress_bar": False, "seed": 0}
NETWORK = nb.FlaxMLP([16, 16], 1, activation="silu")


def log_normal(n, seed):
    """Three concentrations over decades, of whose logarithms the target is a function."""
    u = np.random.default_rng(seed).normal(size=(n, 3))
    return np.exp(1.5 * u), np.sin(1.5 * u[:, 0]) + u[:, 1]


def linear(n, seed):
    """The same, but of which the target is a linear function."""
    X, _ = log_normal(n, seed)
    return X, X @ np.array([1.0, -2.0, 0.5])


def fit(X, y, options=OPTIONS, **kwargs):
    model = nb.PartialBNN(NETWORK, num_probabilistic_layers=1, **{"num_backbones": 4, **kwargs})
    return model.fit(X, y, **options)


@pytest.fixture(scope="module")
def data():
    return log_normal(120, seed=0)


@pytest.fixture(scope="module")
def new():
    return log_normal(500, seed=1)


@pytest.fixture(scope="module")
def model(data):
    return fit(*data)


@pytest.fixture(scope="module")
def plain(data):
    return fit(*data, standardize=True)


def test_left_out_rows_ask_for_it(model, plain, new):
    """And new rows agree."""
    assert model.backbones.compressed
    assert not plain.backbones.compressed
    X, y = new
    errors = [nb.metrics.rmse(y, each.predict(X)[0]) for each in (model, plain)]
    assert errors[0] < 0.8 * errors[1]
    densities = [each.log_predictive_density(X, y).mean() for each in (model, plain)]
    assert densities[0] > densities[1] + 0.1


def test_the_search_is_that_of_the_inputs_taken(model, data):
    asked = fit(*data, standardize="compressed")
    assert not asked.backbones.compressed  # there was nothing to decide
    np.testing.assert_array_equal(model.backbones.search.losses, asked.backbones.search.losses)
    for ours, theirs in zip(model.predict(data[0]), asked.predict(data[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_scales_that_lose_are_not_tried_again(data):
    searched = fit(*data, options={**OPTIONS, "map_sigma": "auto"}).backbones
    assert searched.compressed
    assert set(searched.search.sigmas) <= set(backbones.SIGMA_GRID)
    assert searched.search.losses.shape == (len(searched.search.sigmas), len(searched.epochs))
    best = np.unravel_index(np.argmin(searched.search.losses), searched.search.losses.shape)
    assert searched.search.sigmas[best[0]] == searched.sigmas[0] == searched.search.sigma


def test_not_where_the_tails_matter(data):
    """A linear function of them: left-out rows say no, and all is as if it had not been tried."""
    X, y = linear(120, seed=0)
    left, right = fit(X, y), fit(X, y, standardize=True)
    assert not left.backbones.compressed
    np.testing.assert_array_equal(left.predict(X)[0], right.predict(X)[0])


def test_short_tails_are_not_tried(monkeypatch):
    X = np.random.default_rng(0).uniform(size=(60, 3))
    monkeypatch.setattr(backbone_runs.Run, "with_inputs", None)
    assert not fit(X, X[:, 0]).backbones.compressed


def test_it_must_be_clearly_better():
    """A tie is not enough, nor a lead within chance: targets without any relation to X."""
    X, _ = log_normal(80, seed=3)
    y = np.random.default_rng(4).normal(size=80)
    assert not fit(X, y).backbones.compressed


def test_a_rival_ends_early(data, monkeypatch):
    """What lags behind is not trained to the end."""
    ends, advance = {}, backbone_runs.Run.advance

    def counted(run, number, first, last):
        name = "second" if second else "first"
        ends[name] = max(last, ends.get(name, 0))
        return advance(run, number, first, last)

    second, with_inputs = [], backbone_runs.Run.with_inputs

    def begun(run, x):
        second.append(run)
        return with_inputs(run, x)

    monkeypatch.setattr(backbone_runs.Run, "advance", counted)
    monkeypatch.setattr(backbone_runs.Run, "with_inputs", begun)
    fit(*linear(120, seed=0))
    assert ends["second"] < ends["first"] / 2


def test_progress_never_goes_back(data):
    seen = []
    reports = nb.PartialBNN(NETWORK, num_backbones=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deterministic_stage, "_reporter", lambda _: lambda done, total, loss: seen.append(done / total))
        reports.fit(*data, **OPTIONS)
    assert seen == sorted(seen)
    assert max(seen) <= 1.0


def test_pickled_and_fitted_further(model, data, new):
    X, y = data
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(new[0])[0], model.predict(new[0])[0])
    more = [np.concatenate(pair) for pair in zip(data, log_normal(8, seed=5), strict=True)]
    again.fit(*more, warm_start=True, **OPTIONS)
    assert again.backbones.compressed
    for ours, theirs in zip(again._fitted.members, model._fitted.members, strict=True):
        assert ours.source.params is theirs.source.params or np.array_equal(
            ours.source.params["Dense0"]["kernel"], theirs.source.params["Dense0"]["kernel"]
        )
    assert nb.metrics.rmse(y, again.predict(X)[0]) < 2 * nb.metrics.rmse(y, model.predict(X)[0])


def test_a_killed_run_is_continued(model, data, new, tmp_path, monkeypatch):
    options = {**OPTIONS, "checkpoint_dir": tmp_path}
    fit(*data, options=options)
    monkeypatch.setattr(deterministic_stage.backbones, "train_backbones", None)
    resumed = fit(*data, options=options)
    assert resumed.backbones.compressed
    np.testing.assert_array_equal(resumed.predict(new[0])[0], model.predict(new[0])[0])
    with pytest.raises(CheckpointError, match="belongs to another run"):
        fit(*data, options=options, standardize=True)


def test_classes():
    X, y = log_normal(120, seed=0)
    labels = (y > 0).astype(int)
    network = nb.FlaxMLP([8], 2)
    model = nb.PartialBNN(network, num_classes=2, num_backbones=4).fit(X, labels, **OPTIONS, engine="laplace")
    assert model.backbones.compressed
    Z, z = log_normal(500, seed=1)
    assert np.mean((z > 0) == model.predict_classes(Z)) > 0.85


@pytest.mark.parametrize("kind", ["deterministic", "one", "full"])
def test_asked_for_where_there_is_one_network(kind, data, quick):
    X, y = data
    if kind == "deterministic":
        model = nb.DeterministicNN(NETWORK, 3, standardize="compressed").train(X, y, epochs=20, progress_bar=False)
        scaling = model.scaling
        partial = nb.PartialBNN(NETWORK, deterministic_weights=model).fit(X, y, num_samples=16, progress_bar=False)
        assert partial.scaling == scaling  # weights remember their units
    else:
        make = {
            "one": lambda **k: nb.PartialBNN(NETWORK, num_backbones=1, **k),
            "full": lambda **k: nb.BNN(NETWORK, **k),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scaling = make[kind](standardize="compressed").fit(X, y, **quick).scaling
            assert make[kind]().fit(X, y, **quick).scaling.compression is None  # no left-out rows to ask
    np.testing.assert_array_equal(scaling.compression.columns, [True, True, True])


@pytest.mark.parametrize("value", ["log", None, 2])
def test_unknown_options(value):
    with pytest.raises(OptionError, match="standardize must be one of True, False, 'auto', 'compressed', got"):
        nb.PartialBNN(NETWORK, standardize=value)
    with pytest.raises(OptionError, match="standardize must be one of True, False, 'compressed', got"):
        nb.DeterministicNN(NETWORK, 3, standardize=value)
