"""Models of several backbones: what they predict, and what of them survives."""

import copy
import dataclasses
import math
import pickle
import warnings

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

import neurobayes as nb
from neurobayes import _threads, mixture, predictive
from neurobayes.diagnostics import combine
from neurobayes.errors import CalibrationWarning, CheckpointError, ConvergenceWarning, DataError, OptionError
from neurobayes.models import deterministic_stage, extent, members, resuming

pytestmark = pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
EXACT = {"sgd_epochs": 25, "num_samples": 200, "progress_bar": False, "seed": 0}
SAMPLED = {"sgd_epochs": 15, "map_sigma": 1.0, "num_warmup": 30, "num_samples": 40, "progress_bar": False, "seed": 0,
           "engine": "nuts"}  # fmt: skip


def fit(X, y, width=1, num_classes=None, options=EXACT, model=None, **kwargs):
    """A fit with an output layer that is Bayesian; ``kwargs`` are the model's."""
    if model is None:
        network = nb.FlaxMLP([8], num_classes or width)
        model = nb.PartialBNN(network, num_classes, num_probabilistic_layers=1, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X, y, **options)


def draws_of(model):
    """Draws ``(draws, …)`` by leaf, with the share of each in the predictions."""
    fitted = model._fitted
    return model.get_samples(), fitted.mixture.draw_weights


def left_out(model, num_rows):
    return model.backbones.row_weights[:, :num_rows] == 0


@pytest.fixture(scope="module")
def data(regression):
    return regression


@pytest.fixture(scope="module")
def new_rows():
    return np.random.default_rng(7).normal(size=(25, 3))


@pytest.fixture(scope="module")
def model(data):
    """Everything by default, but the length of training."""
    return fit(*data)


@pytest.fixture(scope="module")
def sampled(data):
    return fit(*data, options=SAMPLED, num_backbones=2)


@pytest.fixture(scope="module")
def multi(two_outputs):
    return fit(*two_outputs, width=2, num_backbones=3)


@pytest.fixture(scope="module")
def scattered(quick):
    """Options of a fit without a sampler worth the name."""
    return {**quick, "seed": 0}


@pytest.fixture(scope="module")
def classes(three_classes, scattered):
    return fit(*three_classes, num_classes=3, options=scattered, num_backbones=2)


def chain_draws(num_samples, num_backbones):
    """Draws of each chain: more than a share, because each chain must show that it has converged."""
    return math.ceil(num_samples / num_backbones**0.5)


class TestDefault:
    def test_there_are_several_backbones(self, model, data):
        found = model.backbones
        assert len(found.members) >= 4 and len(found.members) == len(found.parts)
        assert model.posterior.num_chains == len(found.members)
        unseen = left_out(model, 60)
        assert (unseen.sum(axis=0) >= 2).all() and (unseen.sum(axis=1) < 60).all()

    def test_shapes(self, model, new_rows):
        mean, variance = model.predict(new_rows)
        assert mean.shape == variance.shape == (25,)
        assert mean.dtype == variance.dtype == np.float64 and (variance > 0).all()
        found = model.posterior_predictive(new_rows, quantiles=[0.1, 0.5], num_draws=7)
        assert found.draws.shape == (7, 25) and found.quantiles[0.1].shape == (25,)
        np.testing.assert_allclose(found.var, variance, rtol=1e-12)
        low, high = model.predict_interval(new_rows, 0.9)
        assert (low < mean).all() and (mean < high).all()
        assert model.deterministic_predict(new_rows).shape == (25,)

    def test_samples_are_those_of_all_backbones(self, model):
        num_members, draws = len(model.backbones.members), model.posterior.num_draws
        assert num_members * draws >= EXACT["num_samples"]
        samples, by_chain = model.get_samples(), model.get_samples(chain_dim=True)
        assert samples["Dense1.kernel"].shape == (num_members * draws, 8, 1)
        assert by_chain["Dense1.kernel"].shape == (num_members, draws, 8, 1)
        assert samples["noise_std"].shape == (num_members * draws,)
        assert set(samples) == {"Dense1.kernel", "Dense1.bias", "noise_std"}
        assert model.posterior.draws.shape == (num_members, draws, 8 + 1 + 1)
        assert model.num_bayesian_weights == 9
        assert model.posterior.flat_draws.shape == (num_members * draws, 10)

    def test_calibration_changes_the_variance_and_not_the_mean(self, model, new_rows):
        mean, variance = model.predict(new_rows)
        plain_mean, plain_variance = model.predict(new_rows, calibration=None)
        np.testing.assert_allclose(plain_mean, mean, rtol=1e-9, atol=1e-12)
        assert (np.abs(plain_variance / variance - 1.0) > 1e-3).all()
        np.testing.assert_array_equal(model.predict(new_rows, calibration="out_of_fold")[1], variance)

    def test_the_variance_is_factor_times_epistemic_plus_noise(self, multi, two_outputs):
        """In the user's units, for each output and each part; parts differ in their means besides."""
        X, y = two_outputs
        found, plain = (multi.posterior_predictive(X, calibration=c) for c in ("out_of_fold", None))
        summary, scale = multi.out_of_fold, y.std(axis=0)
        fitted, x = multi._inputs(X)
        change = summary.noise_variation.factor(x, mixture.part_moments(multi._mixture(fitted, None), x)[0])
        noise = np.tensordot(summary.weights, summary.noise_var[:, None] * change, 1)
        np.testing.assert_allclose(found.aleatoric_var, noise * scale**2, rtol=1e-6)
        constant = mixture.regression_moments(multi._mixture(fitted, None), x)[2]
        assert np.ptp(found.aleatoric_var, axis=0).min() > 0 == np.ptp(constant, axis=0).max()
        if len(summary.weights) == 1:
            expected = summary.epistemic_factor[0] * plain.epistemic_var
            np.testing.assert_allclose(found.epistemic_var, expected, rtol=1e-6)
        assert summary.epistemic_factor.shape == summary.noise_var.shape == (len(summary.weights), 2)

    def test_a_model_may_be_uncalibrated(self, model, data, new_rows):
        plain = copy.copy(model)
        plain.calibration = None
        np.testing.assert_array_equal(plain.predict(new_rows)[1], model.predict(new_rows, calibration=None)[1])
        np.testing.assert_array_equal(plain.predict(new_rows, calibration="out_of_fold")[1], model.predict(new_rows)[1])

    def test_the_summary_is_complete(self, model):
        found = model.out_of_fold
        parts = len(found.weights)
        assert parts == model.backbones.parts.max() + 1 == len(model.backbones.sigmas)
        np.testing.assert_allclose(found.weights.sum(), 1.0)
        assert found.epistemic_factor.shape == found.noise_var.shape == (parts, 1)
        assert 0.8 <= found.coverage[0] <= 1.0 and np.isfinite(found.log_score)
        np.testing.assert_allclose(model.held_out_std, model.backbones.unseen_rmse[0] * model._fitted.scaling.y_std)

    def test_the_verdict_is_on_all_backbones(self, model):
        found = model.diagnostics()
        assert found.ok and found.num_chains == len(model.backbones.members)
        assert found.ess_bulk == found.num_chains * model.posterior.num_draws

    def test_draws_are_of_the_predictive_distribution(self, model, new_rows):
        mean, variance = model.predict(new_rows)
        draws = model.sample_from_posterior(new_rows, 4000, seed=1)
        assert draws.shape == (4000, 25)
        np.testing.assert_allclose(draws.mean(axis=0), mean, atol=6 * np.sqrt(variance.max() / 4000))
        np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.4)
        np.testing.assert_allclose(np.median(draws.var(axis=0) / variance), 1.0, rtol=0.1)

    def test_deterministic_predictions_are_the_mean_of_the_networks(self, sampled, new_rows):
        fitted, inputs = sampled._fitted, None
        inputs = fitted.scaling.inputs(new_rows)
        each = [sampled._network.apply(member.params, member.state, inputs) for member in sampled.backbones.members]
        expected = fitted.scaling.mean_to_user(np.mean(each, axis=0))[:, 0]
        np.testing.assert_allclose(sampled.deterministic_predict(new_rows), expected, rtol=1e-4, atol=1e-5)


class TestDraws:
    def test_unequal_weights_are_respected(self, model, new_rows):
        """All draws taken: parts of little weight must not count as much as the others."""
        fitted = model._fitted
        tilted = np.zeros(len(fitted.out_of_fold.weights))
        tilted[0] = 1.0
        summary = dataclasses.replace(fitted.out_of_fold, weights=tilted)
        other = copy.copy(model)
        other._fitted = dataclasses.replace(fitted, out_of_fold=summary)
        available = len(fitted.mixture.draw_weights)
        draws = other.sample_from_posterior(new_rows, available, noise=False, calibration=None)
        of_first = np.flatnonzero(fitted.parts == 0)
        alone = [model_member_outputs(fitted, k, new_rows) for k in of_first]
        known = np.round(np.concatenate(alone)[:, 0], 5)
        assert np.isin(np.round(draws[:, 0], 5), known).mean() > 0.99

    def test_none_is_taken_twice_while_there_are_enough(self, sampled, new_rows):
        available = sampled.posterior.flat_draws.shape[0]
        draws = sampled.sample_from_posterior(new_rows, available, noise=False, calibration=None)
        assert len(np.unique(draws[:, 0])) == len(np.unique(sampled.posterior.flat_draws[:, 0]))
        more = sampled.sample_from_posterior(new_rows, 3 * available, noise=False, calibration=None)
        values, counts = np.unique(more[:, 0], return_counts=True)
        assert len(values) == len(np.unique(draws[:, 0])) and counts.min() >= 3

    def test_few_draws_are_of_different_backbones(self, sampled, new_rows):
        draws = sampled.sample_from_posterior(new_rows, 2, noise=False, calibration=None)
        fitted = sampled._fitted
        for k in range(2):
            mine = model_member_outputs(fitted, k, new_rows)[:, 0]
            assert np.min(np.abs(mine[:, None] - draws[:, 0]), axis=0).min() < 1e-5

    def test_the_seed_decides(self, model, new_rows):
        first, again, other = (model.sample_from_posterior(new_rows, 5, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def model_member_outputs(fitted, number, X):
    source = fitted.members[number].source
    outputs = predictive.function_draws(source, fitted.scaling.inputs(X), source.theta)
    return fitted.scaling.mean_to_user(outputs)[..., 0]


class TestDensity:
    def test_gaussian_form(self, multi, two_outputs):
        X, y = two_outputs
        for calibration in ("out_of_fold", None):
            mean, variance = multi.predict(X, calibration=calibration)
            expected = scipy.stats.norm.logpdf(y, mean, np.sqrt(variance)).sum(axis=1)
            found = multi.log_predictive_density(X, y, form="gaussian", calibration=calibration)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_student_form(self, multi, two_outputs):
        X, y = two_outputs
        mean, variance = multi.predict(X)
        freedom, width = multi.out_of_fold.tail.T
        expected = scipy.stats.t.logpdf(y, freedom, mean, width * np.sqrt(variance)).sum(axis=1)
        for form in ("student", None):
            np.testing.assert_allclose(multi.log_predictive_density(X, y, form=form), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(OptionError, match="left-out rows"):
            multi.log_predictive_density(X, y, form="student", calibration=None)
        with pytest.raises(DataError, match="y has 1 columns but y had 2 at fit"):
            multi.log_predictive_density(X, y[:, 0])
        plain = multi.log_predictive_density(X, y, form="mixture", calibration=None)
        np.testing.assert_array_equal(multi.log_predictive_density(X, y, calibration=None), plain)

    def test_mixture_form(self, sampled, data):
        X, y = data
        samples, shares = draws_of(sampled)
        outputs = np.concatenate([model_member_outputs(sampled._fitted, k, X) for k in range(2)])
        each = scipy.stats.norm.logpdf(y, outputs, samples["noise_std"][:, None])
        expected = scipy.special.logsumexp(each, axis=0, b=shares[:, None])
        found = sampled.log_predictive_density(X, y, form="mixture", calibration=None)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)

    def test_calibrated_mixture_form(self, sampled, data):
        X, y = data
        mean = sampled.predict(X)[0]
        outputs = np.concatenate([model_member_outputs(sampled._fitted, k, X) for k in range(2)])
        found, scale = sampled.out_of_fold, y.std()
        stretched = mean + np.sqrt(found.epistemic_factor[0, 0]) * (outputs - mean)
        working = sampled._fitted.scaling
        change = found.noise_variation.factor(working.inputs(X), working.targets(mean)[None])[0, :, 0]
        each = scipy.stats.norm.logpdf(y, stretched, np.sqrt(found.noise_var[0, 0] * change) * scale)
        expected = scipy.special.logsumexp(each, axis=0) - np.log(len(outputs))
        np.testing.assert_allclose(
            sampled.log_predictive_density(X, y, form="mixture"), expected, rtol=1e-4, atol=1e-3
        )  # fmt: skip

    @pytest.mark.parametrize("form", [None, "gaussian", "mixture"])
    def test_integrates_to_one_in_the_users_units(self, model, new_rows, form):
        mean, variance = model.predict(new_rows[:1])
        grid = mean[0] + np.sqrt(variance[0]) * np.linspace(-40, 40, 2001)
        rows = np.broadcast_to(new_rows[:1], (2001, 3))
        density = np.exp(model.log_predictive_density(rows, grid, form=form))
        np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, rtol=5e-3)

    def test_pools_of_other_sizes_compile_nothing(self, model, new_rows, count_compilations):
        """Active learning scores a pool that shrinks row by row."""
        rows = np.resize(new_rows, (120, new_rows.shape[1]))
        whole = model.predict(rows)
        with count_compilations() as compiled:
            for size in (119, 101, 77, 65):
                for all_rows, some in zip(whole, model.predict(rows[:size]), strict=True):
                    np.testing.assert_allclose(some, all_rows[:size], rtol=1e-4)
        assert compiled.number == 0

    def test_intervals_hold_their_share_of_the_draws(self, model, new_rows):
        low, high = model.predict_interval(new_rows, 0.8, calibration=None)
        draws = model.sample_from_posterior(new_rows, 3000, seed=3, calibration=None)
        np.testing.assert_allclose(np.mean((low < draws) & (draws < high)), 0.8, atol=0.02)

    def test_of_a_class_is_its_log_probability(self, classes, three_classes):
        X, y = three_classes
        expected = np.log(classes.predict(X)[0][np.arange(60), y])
        for form in ("gaussian", "mixture"):
            np.testing.assert_allclose(classes.log_predictive_density(X, y, form=form), expected, rtol=1e-6)


class TestClasses:
    def test_probabilities_and_draws(self, classes, three_classes):
        X, y = three_classes
        probabilities, entropy = classes.predict(X)
        assert probabilities.shape == (60, 3) and entropy.shape == (60,)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-9)
        np.testing.assert_allclose(entropy, scipy.stats.entropy(probabilities, axis=1), rtol=1e-6)
        assert np.mean(classes.predict_classes(X) == y) > 0.6
        found = classes.posterior_predictive(X, num_draws=5)
        assert found.draws.shape == (5, 60, 3) and (found.mutual_information >= 0).all()
        assert classes.backbones.unseen_rmse is None and classes.held_out_std is None

    def test_calibration_is_a_temperature(self, classes, three_classes):
        X, _ = three_classes
        temperature = classes.out_of_fold.temperature
        plain, found = classes.predict(X, calibration=None)[0], classes.predict(X)[0]
        powers = plain ** (1.0 / temperature)
        np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
        if temperature != 1.0:
            assert not np.allclose(found, plain)


class TestMultiOutput:
    def test_shapes(self, multi, two_outputs):
        X, _ = two_outputs
        mean, variance = multi.predict(X)
        assert mean.shape == variance.shape == (60, 2)
        assert multi.predict_interval(X)[0].shape == (60, 2)
        assert multi.sample_from_posterior(X, 4).shape == (4, 60, 2)
        assert multi.get_samples()["noise_std"].shape[1:] == (2,)
        assert multi.held_out_std.shape == (2,)

    def test_each_output_has_intervals_of_its_own(self, multi, two_outputs):
        """The second is mostly noise, in units ten times larger."""
        X, y = two_outputs
        std = np.sqrt(multi.predict(X)[1]).mean(axis=0) / y.std(axis=0)
        assert std[1] > 1.2 * std[0]


class TestSampled:
    def test_each_backbone_has_its_chains(self, sampled):
        assert len(sampled.backbones.members) == 2 and sampled.posterior.info["engine"] == "nuts"
        assert sampled.posterior.draws.shape[:2] == (2, chain_draws(SAMPLED["num_samples"], 2))
        assert sampled.diagnostics().num_chains == 2

    def test_the_posterior_of_a_backbone_is_that_of_its_own_rows(self, model, data):
        """Exact moments at the trained weights: a regression on the rows that were not left out, in numpy."""
        fitted = model._fitted
        X, y = data
        inputs, targets = fitted.scaling.inputs(X).astype(float), fitted.scaling.targets(y)[:, 0].astype(float)
        for k in (0, len(fitted.members) - 1):
            source, params = fitted.members[k].source, fitted.members[k].source.params
            features = np.tanh(inputs @ params["Dense0"]["kernel"] + params["Dense0"]["bias"])
            design = np.column_stack([np.ones(60), features])  # bias first, as leaves are ordered
            centre = np.append(params["Dense1"]["bias"], params["Dense1"]["kernel"][:, 0]).astype(float)
            noise = float(model.backbones.unseen_rmse[fitted.parts[k], 0])
            seen = model.backbones.row_weights[k, :60] > 0
            precision = design[seen].T @ design[seen] / noise**2 + np.eye(9)
            residual = targets[seen] - design[seen] @ centre
            expected = design @ (centre + np.linalg.solve(precision, design[seen].T @ residual / noise**2))
            variance = np.einsum("ni,ij,nj->n", design, np.linalg.inv(precision), design)
            mean, var = predictive.regression_moments(source, fitted.scaling.inputs(X))
            np.testing.assert_allclose(mean[:, 0], expected, atol=5e-3)
            np.testing.assert_allclose(var[:, 0], variance, rtol=0.05)


class TestAgain:
    """The same fit again, killed, pickled or continued."""

    def test_the_same_seed(self, sampled, data, new_rows):
        again = fit(*data, options=SAMPLED, num_backbones=2)
        np.testing.assert_array_equal(again.posterior.draws, sampled.posterior.draws)
        for ours, theirs in zip(again.predict(new_rows), sampled.predict(new_rows), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        refitted = fit(*data, options=SAMPLED, model=again)
        np.testing.assert_array_equal(refitted.posterior.draws, sampled.posterior.draws)
        other = fit(*data, options={**SAMPLED, "seed": 1}, num_backbones=2)
        assert not np.array_equal(other.backbones.row_weights, sampled.backbones.row_weights)

    @pytest.mark.parametrize("name", ["model", "classes"])
    def test_pickled(self, name, request, new_rows):
        before = request.getfixturevalue(name)
        after = pickle.loads(pickle.dumps(before))
        X = new_rows if name == "model" else np.column_stack([new_rows, new_rows[:, 0]])
        for ours, theirs in zip(after.predict(X), before.predict(X), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(after.backbones.row_weights, before.backbones.row_weights)
        assert after.backbones.sigmas == before.backbones.sigmas

    def test_killed_after_each_stage(self, sampled, data, tmp_path, monkeypatch):
        """Dead once within training, once after it, once after the first backbone's draws; then to the end."""

        class Dead(BaseException):
            pass

        def run():
            return fit(*data, options={**SAMPLED, "checkpoint_dir": tmp_path}, num_backbones=2)

        def dead(*_, **__):
            raise Dead

        saved, drawn = resuming.save_trained, members.sample
        names = []

        def save_one(checkpoint, pretrained, name="trained"):
            if names:
                raise Dead
            names.append(name)
            saved(checkpoint, pretrained, name)

        def draw_one(*args, **kwargs):
            if len(names) > 1:
                raise Dead
            names.append("drawn")
            return drawn(*args, **kwargs)

        for target, stand_in in [(resuming, ("save_trained", save_one)), (members, ("sample", dead)),
                                 (members, ("sample", draw_one))]:  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(target, *stand_in)
                with pytest.raises(Dead):
                    run()
        assert len(names) == 2
        monkeypatch.setattr(deterministic_stage.backbones, "train_backbones", dead)  # what was trained is kept
        resumed = run()
        np.testing.assert_array_equal(resumed.posterior.draws, sampled.posterior.draws)
        for ours, theirs in zip(resumed.predict(data[0]), sampled.predict(data[0]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert resumed.backbones.sigmas == sampled.backbones.sigmas
        np.testing.assert_array_equal(resumed.backbones.search.losses, sampled.backbones.search.losses)
        np.testing.assert_array_equal(resumed.held_out_std, sampled.held_out_std)
        with pytest.raises(CheckpointError, match="belongs to another run"):
            fit(*data, options={**SAMPLED, "checkpoint_dir": tmp_path}, num_backbones=3)

    def test_parts_survive_a_checkpoint(self, model, data, new_rows, tmp_path, monkeypatch):
        options = {**EXACT, "checkpoint_dir": tmp_path}
        fit(*data, options=options)
        monkeypatch.setattr(deterministic_stage.backbones, "train_backbones", None)
        again = fit(*data, options=options)
        np.testing.assert_array_equal(again.backbones.parts, model.backbones.parts)
        for ours, theirs in zip(again.predict(new_rows), model.predict(new_rows), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_continued_with_more_rows(self, model, data, new_rows):
        """Rows that came later are shared out too; earlier ones stay where they were, backbones as they are."""
        X, y = np.concatenate([data[0], new_rows]), np.append(data[1], np.zeros(25))
        before = left_out(model, 60)
        warm = fit(X, y, options={**EXACT, "warm_start": model}, model=nb.PartialBNN(
            nb.FlaxMLP([8], 1), num_probabilistic_layers=1))  # fmt: skip
        after = left_out(warm, 85)
        np.testing.assert_array_equal(after[:, :60], before)
        assert after[:, 60:].any(axis=0).all() and after[:, 60:].any(axis=1).any()
        np.testing.assert_array_equal(warm.backbones.parts, model.backbones.parts)
        for mine, earlier in zip(warm._fitted.members, model._fitted.members, strict=True):
            for a, b in zip(*(jax.tree.leaves(m.source.params) for m in (mine, earlier)), strict=True):
                np.testing.assert_array_equal(a, b)
        assert len(warm.out_of_fold.weights) == len(model.out_of_fold.weights)
        gap = np.abs(warm.predict(new_rows)[0]) - np.abs(model.predict(new_rows)[0])
        assert gap.mean() < 0  # the new targets are zero: the posteriors have seen them
        further = fit(X[:70], y[:70], options={**EXACT, "warm_start": True}, model=warm)
        np.testing.assert_array_equal(left_out(further, 70), after[:, :70])

    def test_other_rows_cannot_be_continued_with(self, model, data):
        """Which rows a backbone has seen goes by their place."""
        X, y = (part[::-1] for part in data)
        with pytest.raises(OptionError, match="in their order"):
            fit(X, y, options={**EXACT, "warm_start": model}, model=nb.PartialBNN(
                nb.FlaxMLP([8], 1), num_probabilistic_layers=1))  # fmt: skip

    def test_a_sampled_model_continued(self, sampled, data):
        X, y = (np.concatenate([part, part[:3] + 0.1]) for part in data)
        warm = fit(X, y, options={**SAMPLED, "warm_start": sampled}, num_backbones=2)
        np.testing.assert_array_equal(left_out(warm, 60), left_out(sampled, 60))
        assert warm.posterior.draws.shape == sampled.posterior.draws.shape


class TestNumber:
    @pytest.mark.parametrize("number", [2, 3, 5])
    def test_as_many_as_are_asked_for(self, data, number):
        found = fit(*data, options={**EXACT, "map_sigma": 1.0, "sgd_epochs": 5}, num_backbones=number)
        assert len(found.backbones.members) == number
        assert left_out(found, 60).any(axis=0).all()
        assert np.isfinite(found.predict(data[0])[1]).all()

    @pytest.mark.parametrize("num_rows", [2, 3, 5])
    def test_no_more_than_rows(self, data, num_rows):
        X, y = data[0][:num_rows], data[1][:num_rows]
        found = fit(X, y, options={**EXACT, "sgd_epochs": 4})
        assert np.bincount(found.backbones.parts)[0] == num_rows
        mean, variance = found.predict(data[0])
        assert np.isfinite(mean).all() and (variance > 0).all()

    def test_few_rows_have_twice_as_many(self, data):
        options = {**EXACT, "sgd_epochs": 2, "map_sigma": 1.0}
        found = fit(*data, options=options)
        assert np.bincount(found.backbones.parts)[0] == extent.SMALL_BACKBONES
        more = [np.resize(values, (extent.SMALL_ROWS, *values.shape[1:])) for values in data]
        assert len(fit(*more, options=options).backbones.members) == extent.EXACT_BACKBONES

    def test_one_warns_and_is_never_calibrated(self, data):
        options = {**EXACT, "map_sigma": 1.0, "sgd_epochs": 5}
        one = nb.PartialBNN(nb.FlaxMLP([8], 1), num_backbones=1)
        with pytest.warns(CalibrationWarning, match="with one backbone trained on all of 60 rows") as caught:
            one.fit(*data, **options)
        assert caught[0].filename == __file__  # it points at the call
        assert one.backbones is None and one.out_of_fold is None
        np.testing.assert_array_equal(one.predict(data[0])[1], one.predict(data[0], calibration=None)[1])

    @pytest.mark.parametrize("chosen, warns", [
        (nb.layers("Dense0"), False), (nb.layers("Dense0") - nb.biases(), True), (nb.last(1), True),
        (nb.everything(), False),
    ])  # fmt: skip
    def test_one_does_not_warn_where_the_first_layer_is_bayesian(self, data, scattered, chosen, warns):
        """Below such a layer nothing was learnt from the rows."""
        one = nb.PartialBNN(nb.FlaxMLP([8], 1), bayesian=chosen, num_backbones=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one.fit(*data, **{**scattered, "sgd_epochs": 3, "map_sigma": 1.0})
        assert any(each.category is CalibrationWarning for each in caught) == warns

    def test_more_than_one_does_not_warn(self, data):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(*data, options={**EXACT, "map_sigma": 1.0, "sgd_epochs": 5}, num_backbones=2)

    def test_given_weights_are_one(self, data, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nb.errors.UnitsWarning)
            found = fit(*data, deterministic_weights=model.backbones.members[0].params, num_backbones=1)
        assert found.backbones is None

    def test_a_network_without_anything_deterministic_is_one(self):
        assert nb.BNN(nb.FlaxMLP([4], 1)).num_backbones == 1

    @pytest.mark.parametrize("bad", [0, -1, 2.5, True, "many", None])
    def test_bad_numbers(self, bad):
        with pytest.raises(OptionError, match="num_backbones"):
            nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=bad)

    def test_backbones_of_given_weights(self, data, quick):
        network = nb.FlaxMLP([4], 1)
        weights = nb.DeterministicNN(network, (3,)).train(*data, epochs=2).get_params()
        with pytest.raises(OptionError, match="num_backbones=4 asks for networks trained here"):
            nb.PartialBNN(network, deterministic_weights=weights, num_backbones=4).fit(*data, **quick)

    @pytest.mark.parametrize("bad", ["in_fold", True, 1])
    def test_bad_calibration(self, bad, model, new_rows):
        with pytest.raises(OptionError, match="calibration must be 'out_of_fold' or None"):
            nb.PartialBNN(nb.FlaxMLP([4], 1), calibration=bad)
        with pytest.raises(OptionError, match="calibration must be 'out_of_fold' or None"):
            model.predict(new_rows, calibration=bad)

    def test_other_bad_options(self, model, classes, new_rows, data):
        with pytest.raises(OptionError, match="form"):
            model.log_predictive_density(*data, form="cauchy")
        with pytest.raises(OptionError, match="regression"):
            classes.predict_interval(np.zeros((2, 4)))
        with pytest.raises(DataError):
            model.log_predictive_density(new_rows, np.zeros(24))


class TestChoices:
    def test_the_same_weights_of_every_backbone(self, data, scattered):
        chosen = {"Dense0": [(0, 1), (2, 3)]}
        found = nb.PartialBNN(nb.FlaxMLP([8], 1), probabilistic_neurons=chosen, num_backbones=2)
        fit(*data, options=scattered, model=found)
        assert found.get_samples()["Dense0.kernel"].shape == (2 * chain_draws(scattered["num_samples"], 2), 2)

    def test_weights_that_each_backbone_chooses(self, data, new_rows, scattered):
        config = {"method": "variance", "layer_names": ["Dense0"], "num_pairs_per_layer": 3}
        found = fit(*data, options={**scattered, "select_neurons_config": config}, model=nb.PartialBNN(
            nb.FlaxMLP([8], 1), num_backbones=2))  # fmt: skip
        masks = [member.source.partition.masks()["Dense0.kernel"] for member in found._fitted.members]
        for member, mask in zip(found.backbones.members, masks, strict=True):
            variance = np.asarray(member.statistics.weight_variance["Dense0"]["kernel"])
            assert mask.sum() == 3 and variance[mask].min() >= variance[~mask].max()
        assert not np.array_equal(*masks)
        assert found.get_samples()["Dense0.kernel"].shape == (2 * chain_draws(scattered["num_samples"], 2), 3)
        assert found.predict(new_rows)[0].shape == (25,)

    def test_left_out_targets_have_no_say_in_the_choice(self, data, sampled, scattered):
        """A score of training rows is one of the rows that the backbone was trained on."""
        X, y = data
        hidden = np.flatnonzero(left_out(sampled, 60)[0])  # decided by the seed and the numbers alone

        def first_backbone(order):
            """The choice where targets that the first backbone left out are far off, in some order."""
            targets = y.copy()
            targets[hidden] = np.linspace(-9, 9, len(hidden))[order]
            found = nb.PartialBNN(
                nb.FlaxMLP([8], 1), bayesian=nb.top(6, by="fisher"), num_backbones=2, standardize=False
            )
            fit(X, targets, options={**scattered, "sgd_epochs": 3}, model=found)
            np.testing.assert_array_equal(np.flatnonzero(left_out(found, 60)[0]), hidden)
            return found._fitted.members[0].source

        rank = np.argsort(np.argsort(X[hidden, 2]))
        one, other = first_backbone(rank), first_backbone(np.roll(rank, len(hidden) // 2))
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        for path, mask in one.partition.masks().items():
            np.testing.assert_array_equal(mask, other.partition.masks()[path])

    def test_choices_of_different_sizes_predict_but_are_no_one_array(self, data, new_rows, scattered):
        chosen = nb.top(5, by="magnitude") | nb.weights({"Dense0": [(0, 0), (0, 1), (1, 1), (2, 5), (2, 7)]})
        for seed in range(10):
            found = nb.PartialBNN(nb.FlaxMLP([8], 1), bayesian=chosen, num_backbones=2)
            fit(*data, options={**scattered, "seed": seed}, model=found)
            if len({member.source.partition.size for member in found._fitted.members}) > 1:
                break
        else:
            pytest.fail("no seed gave choices of different sizes")
        assert found.predict(new_rows)[0].shape == (25,)
        assert found.sample_from_posterior(new_rows, 4).shape == (4, 25)
        assert found.layer_diagnostics()
        for ask in (found.get_samples, lambda: found.posterior):
            with pytest.raises(OptionError, match="chose different numbers of Bayesian weights"):
                ask()

    def test_averaged_weights(self, data, new_rows):
        options = {**EXACT, "map_sigma": 1.0, "sgd_epochs": 10, "swa_config": {"start_pct": 0.5}}
        found = fit(*data, options=options, num_backbones=2)
        assert {member.num_epochs for member in found.backbones.members} == {10}
        assert (found.predict(new_rows)[1] > 0).all()


def test_the_verdict_on_several_backbones_is_that_on_the_worst(model):
    """Whatever the backbones are, the figures are the worst or the sum."""
    good = model.diagnostics()
    good = dataclasses.replace(good, r_hat=1.01, ess_bulk=300.0, e_bfmi=0.9, num_draws=50, num_chains=2)
    mixed = dataclasses.replace(good, r_hat=1.04, ess_bulk=400.0, e_bfmi=float("nan"), num_draws=40)
    bad = dataclasses.replace(good, r_hat=float("nan"), ess_bulk=500.0, saturated=0.5, ok=False, verdict="No.")
    found = combine([good, mixed])
    assert (found.ok, found.r_hat, found.e_bfmi, found.ess_bulk) == (True, 1.04, 0.9, 700.0)
    assert (found.num_draws, found.num_chains) == (40, 4)
    found = combine([good, bad, mixed])
    assert (found.ok, found.r_hat, found.saturated) == (False, 1.04, 0.5)
    assert found.verdict == "1 of 3 backbones need attention. The worst: No."
    assert combine([bad]) is bad


def test_coverage_is_better_than_that_of_one_backbone():
    """Targets of new rows fall into the default's intervals more often than into those of one backbone."""
    rng = np.random.default_rng(3)
    inside = {}
    X, held_out = rng.uniform(-1, 1, size=(40, 5)), rng.uniform(-1, 1, size=(400, 5))

    def truth(x):
        return np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.1 * rng.normal(size=len(x))

    y, targets = truth(X), truth(held_out)
    for number in ("auto", 1):
        found = fit(X, y, options={**EXACT, "map_sigma": 3.0, "sgd_epochs": 150}, num_backbones=number)
        low, high = found.predict_interval(held_out)
        inside[number] = np.mean((low < targets) & (targets < high))
    standard_error = np.sqrt(0.25 / 400)
    assert inside["auto"] > inside[1] + 4 * standard_error
    assert inside["auto"] > 0.85


@pytest.mark.parametrize("num_backbones", [1, 3])
@pytest.mark.parametrize("width", [1, 2])
def test_what_follows_training_is_compiled_before_it(num_backbones, width, caplog, monkeypatch):
    """Beside the training's own program: afterwards the exact posterior and its predictions compile nothing big."""
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 1)  # what other threads compile is not logged
    generator = np.random.default_rng(0)
    X = generator.normal(size=(41, 3))
    y = X[:, :1] * np.ones(width) + 0.1 * generator.normal(size=(41, width))
    trained = []
    train = deterministic_stage.train

    def noting(*arguments):
        stage = train(*arguments)
        trained.append(len(caplog.records))
        return stage

    monkeypatch.setattr(deterministic_stage, "train", noting)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        model = fit(X, y, width, num_backbones=num_backbones, options={**EXACT, "map_sigma": 1.0})
        model.predict(X[:20])
    messages = [record.message for record in caplog.records[trained[0] :]]
    compiled = [message for message in messages if "Finished XLA compilation" in message]
    big = ("run_", "_linearise", "jaxpr_as_fun", "_evaluate_noise_prior", "_entering", "initialise", "_split")
    assert [message for message in compiled if any(name in message for name in big)] == []
    assert len(compiled) < 12, compiled


@pytest.mark.parametrize("num_backbones", [1, 3])
def test_training_that_a_checkpoint_holds_is_not_compiled(num_backbones, data, tmp_path, monkeypatch):
    asked, compile_ahead = [], deterministic_stage.compile_ahead

    def noting(*arguments):
        asked.append(arguments)
        return compile_ahead(*arguments)

    monkeypatch.setattr(deterministic_stage, "compile_ahead", noting)
    options = {**EXACT, "checkpoint_dir": tmp_path / "run"}
    first, again = (fit(*data, num_backbones=num_backbones, options=options) for _ in range(2))
    assert len(asked) == 1
    np.testing.assert_array_equal(first.predict(data[0])[0], again.predict(data[0])[0])
