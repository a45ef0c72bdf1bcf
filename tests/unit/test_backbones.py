"""Backbones trained together: who leaves out what, and that what is left out is never seen."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import backbone_runs, backbones, out_of_fold, schedules, training
from neurobayes.data import pad_rows, row_weights
from neurobayes.errors import TrainingError
from neurobayes.likelihoods import Categorical, Gaussian
from neurobayes.models import extent
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.predictive import deterministic_outputs
from neurobayes.pretraining import PretrainingOptions
from neurobayes.schedules import AveragingConfig
from neurobayes.training import Rows

NETWORK = as_network(nb.FlaxMLP([8], 1))
FIXED = PretrainingOptions(epochs=20, sigma=1.0)


def rows_of(x, y, size=None):
    size = len(x) if size is None else size
    return Rows(pad_rows(x.astype(np.float32), size), pad_rows(y, size), row_weights(len(x), size))


def regression(n=40, noise=0.1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2))
    return x, (np.sin(2 * x[:, :1]) + noise * rng.normal(size=(n, 1))).astype(np.float32)


def pure_noise():
    rng = np.random.default_rng(0)
    return rows_of(rng.normal(size=(40, 8)), rng.normal(size=(40, 1)).astype(np.float32))


def trained(rows, options=FIXED, num_backbones=3, likelihood=None, network=NETWORK, stacked=False, **kwargs):
    outputs = 1 if rows.y.ndim == 1 else rows.y.shape[1]
    return backbones.train_backbones(
        network, likelihood or Gaussian(), jax.random.key(0), rows, np.ones(outputs, np.float32), options,
        num_backbones, stacked=stacked, **{"seed": 0, **kwargs},
    )  # fmt: skip


def leaves(member):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(member.params)]


def outputs_of(found, x, network=NETWORK):
    x = x.astype(np.float32)
    each = [deterministic_outputs(network, member.params, member.state, x) for member in found.members]
    return np.stack(each).astype(float)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


@pytest.fixture(scope="module")
def fixed():
    return trained(rows_of(*regression()))


@pytest.fixture(scope="module")
def chosen():
    """Prior scale and length chosen, other scales kept as parts."""
    return trained(rows_of(*regression()), PretrainingOptions(epochs=30), stacked=True)


class TestWhatIsLeftOut:
    def test_repeated_measurements_are_left_out_together(self):
        x, y = regression(20)
        found = trained(rows_of(np.tile(x, (2, 1)), np.concatenate([y, y + 0.1])), num_backbones=4)
        assert found.whole_inputs
        np.testing.assert_array_equal(found.row_weights[:, :20], found.row_weights[:, 20:])

    @pytest.mark.parametrize("options", [
        FIXED, PretrainingOptions(epochs=6, sigma=None, batch_size=7),
        PretrainingOptions(epochs=10, sigma=1.0, averaging=AveragingConfig(start_pct=0.5)),
    ], ids=["whole", "batches", "averaged"])  # fmt: skip
    def test_is_never_seen(self, options):
        """A target that changes changes nothing of the members that left its row out, to the last bit."""
        x, y = regression()
        before = trained(rows_of(x, y, 48), options)
        unseen = before.row_weights[:, :40] == 0
        for row in (0, 13, 39):
            other = y.copy()
            other[row] += 3.0
            after = trained(rows_of(x, other, 48), options)
            np.testing.assert_array_equal(after.row_weights, before.row_weights)
            for k in range(3):
                assert same(before.members[k], after.members[k]) == unseen[k, row]

    def test_padding_is_in_no_ones_share(self):
        x, y = regression()
        plain, padded = trained(rows_of(x, y)), trained(rows_of(x, y, 48))
        np.testing.assert_array_equal(padded.row_weights[:, :40], plain.row_weights)
        np.testing.assert_array_equal(padded.row_weights[:, 40:], 0.0)
        for ours, theirs in zip(padded.members, plain.members, strict=True):
            for a, b in zip(leaves(ours), leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(padded.search.losses, plain.search.losses, rtol=1e-3)

    def test_members_are_those_of_training_without_their_rows(self):
        """Zero weight is absence: with no prior, a member is the network trained on its own rows alone."""
        x, y = regression()
        options = PretrainingOptions(epochs=15, sigma=None)
        found = trained(rows_of(x, y), options, num_backbones=2)
        keys = jax.random.split(jax.random.key(0), 2)
        program = training.Program(NETWORK, Gaussian())
        seen = found.row_weights[1] > 0
        rows = rows_of(x[seen], y[seen])
        settings = training.Settings(rows.real, np.float32(0), np.ones(1, np.float32))
        rates = schedules.learning_rates(None, 15, 1)
        alone, _ = training.train(program, keys[1], rows, settings, learning_rates=rates)
        for a, b in zip(leaves(found.members[1]), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)  # Adam hardly minds the scale of the loss


class TestOutcome:
    def test_fixed_options_are_kept(self, fixed):
        assert len(fixed.members) == 3
        np.testing.assert_array_equal(fixed.parts, 0)
        assert fixed.sigmas == [1.0]
        assert [(member.sigma, member.num_epochs) for member in fixed.members] == [(1.0, 20)] * 3
        assert all(len(member.history["loss"]) == 20 for member in fixed.members)
        assert fixed.search.losses.shape == (1, 1)

    def test_members_differ(self, fixed):
        assert not same(fixed.members[0], fixed.members[1])

    def test_the_error_is_that_of_the_left_out_predictions(self, fixed):
        x, y = regression()
        outputs = outputs_of(fixed, x)
        expected = out_of_fold.ensemble_error(outputs, fixed.row_weights == 0, y, 3)
        np.testing.assert_allclose(fixed.unseen_rmse, [np.sqrt(expected)], rtol=1e-4)
        np.testing.assert_allclose(fixed.search.losses, np.mean(expected), rtol=1e-4)
        np.testing.assert_allclose(fixed.search.unseen_rmse, fixed.unseen_rmse[0])

    def test_parts_share_rows_but_not_scales(self, chosen):
        per_part = np.bincount(chosen.parts)
        np.testing.assert_array_equal(per_part, 3)
        np.testing.assert_array_equal(chosen.parts, np.sort(chosen.parts))
        assert len(set(chosen.sigmas)) == len(per_part) == len(chosen.unseen_rmse)
        assert set(chosen.sigmas) <= set(backbones.SIGMA_GRID)
        for part in range(len(per_part)):
            mine = [chosen.members[k] for k in np.flatnonzero(chosen.parts == part)]
            assert {member.sigma for member in mine} == {chosen.sigmas[part]}
            assert len({member.num_epochs for member in mine}) == 1
            np.testing.assert_array_equal(chosen.row_weights[chosen.parts == part], chosen.row_weights[:3])

    def test_the_best_part_has_the_least_loss(self, chosen):
        losses = chosen.search.losses
        assert losses.shape == (len(backbones.SIGMA_GRID), len(chosen.epochs))
        best = np.unravel_index(np.argmin(losses), losses.shape)
        assert backbones.SIGMA_GRID[best[0]] == chosen.sigmas[0] == chosen.search.sigma
        assert chosen.epochs[best[1]] == chosen.search.num_epochs == chosen.members[0].num_epochs

    def test_a_part_is_the_ensemble_trained_for_its_length(self, chosen):
        """Weights are kept from the look that was best: bookkeeping of looks, parts and members."""
        x, y = regression()
        program = training.Program(NETWORK, Gaussian())
        keys = jax.random.split(jax.random.key(0), 3)
        for k in {0, len(chosen.members) - 2}:
            member = chosen.members[k]
            rates = schedules.learning_rates(None, 30, 1)[: member.num_epochs]
            settings = training.Settings(
                chosen.row_weights[k], np.float32(1 / member.sigma**2), np.ones(1, np.float32)
            )  # fmt: skip
            alone, _ = training.train(program, keys[k % 3], rows_of(x, y), settings, learning_rates=rates)
            np.testing.assert_allclose(member.history["loss"], alone.history["loss"], rtol=1e-3)
            for a, b in zip(leaves(member), jax.tree.leaves(alone.params), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)

    def test_only_the_best_where_nothing_is_stacked(self):
        found = trained(rows_of(*regression()), PretrainingOptions(epochs=10), num_backbones=2)
        assert len(found.members) == 2 and len(found.sigmas) == 1

    def test_the_same_seed_gives_the_same(self, fixed):
        again = trained(rows_of(*regression()))
        assert all(same(a, b) for a, b in zip(fixed.members, again.members, strict=True))
        other = trained(rows_of(*regression()), seed=1)
        assert not np.array_equal(other.row_weights, fixed.row_weights)
        assert not same(fixed.members[0], other.members[0])

    def test_groups_need_not_be_full(self):
        number = backbone_runs.GROUP + 1
        found = trained(rows_of(*regression()), num_backbones=number)
        assert len(found.members) == number == len(found.row_weights)
        assert len({leaves(member)[-1].tobytes() for member in found.members}) == number

    def test_progress_is_reported(self):
        seen = []
        found = trained(rows_of(*regression()), PretrainingOptions(epochs=12), num_backbones=2,
                        on_progress=lambda *report: seen.append(report))  # fmt: skip
        done, totals, losses = map(list, zip(*seen, strict=True))
        assert done == sorted(done) and set(totals) == {12}
        assert losses[-1] == found.search.losses.min()

    def test_pure_noise_is_given_up_early(self):
        found = trained(pure_noise(), PretrainingOptions(epochs=None, sigma=None), num_backbones=2)
        assert found.search.num_epochs < backbones.MOST_EPOCHS // 4
        assert np.isinf(found.search.losses).any() or found.search.losses[0, -1] > found.search.losses.min()
        assert found.members[0].sigma is None and np.isinf(found.search.sigma)

    def test_statistics_cover_a_share_of_the_length_that_was_chosen(self):
        """The length is known only after the runs: statistics must not be empty where it is short."""
        options = PretrainingOptions(epochs=None, sigma=None, track_statistics=True, burn_in=0.5)
        rows = rows_of(*regression(noise=0.3))
        found = trained(rows, options, num_backbones=2)
        plain = trained(rows, dataclasses.replace(options, track_statistics=False), num_backbones=2)
        for member, without in zip(found.members, plain.members, strict=True):
            assert member.num_epochs < backbones.MOST_EPOCHS // 2  # where those of the longest run would begin
            assert member.statistics.num_steps == member.num_epochs - member.num_epochs // 2
            assert all((np.asarray(leaf) > 0).any() for leaf in jax.tree.leaves(member.statistics.mean_abs_gradient))
            assert without.num_epochs == member.num_epochs
            for a, b in zip(leaves(member), leaves(without), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_averaged_weights_are_those_that_are_judged(self):
        x, y = regression()
        options = PretrainingOptions(epochs=10, sigma=1.0, averaging=AveragingConfig(start_pct=0.5))
        found = trained(rows_of(x, y), options)
        assert {member.num_epochs for member in found.members} == {10}
        outputs = outputs_of(found, x)
        expected = out_of_fold.ensemble_error(outputs, found.row_weights == 0, y, 3)
        np.testing.assert_allclose(found.unseen_rmse, [np.sqrt(expected)], rtol=1e-4)

    def test_rows_are_put_through_in_blocks(self, fixed, monkeypatch):
        monkeypatch.setattr(backbone_runs, "FORWARD_ROWS", 16)
        network = as_network(nb.FlaxMLP([9], 1))  # whose program for one block is not there yet
        x, y = regression()
        found = trained(rows_of(x, y), network=network)
        outputs = outputs_of(found, x, network)
        expected = out_of_fold.ensemble_error(outputs, found.row_weights == 0, y, 3)
        np.testing.assert_allclose(found.unseen_rmse, [np.sqrt(expected)], rtol=1e-4)

    def test_outputs_have_errors_of_their_own(self):
        x, y = regression()
        rng = np.random.default_rng(1)
        both = np.concatenate([y, rng.normal(size=y.shape)], axis=1).astype(np.float32)
        found = trained(rows_of(x, both), PretrainingOptions(epochs=60, sigma=3.0), network=as_network(
            nb.FlaxMLP([8], 2)), num_backbones=4)  # fmt: skip
        assert found.unseen_rmse.shape == (1, 2)
        assert found.unseen_rmse[0, 0] < 0.8 * found.unseen_rmse[0, 1]

    def test_classes_are_judged_by_the_log_loss_of_the_mixture(self):
        x, _ = regression()
        labels = (x[:, 0] > 0).astype(np.int32)
        network = as_network(nb.FlaxMLP([8], 2))
        found = trained(rows_of(x, labels), PretrainingOptions(epochs=30, sigma=1.0), likelihood=Categorical(),
                        network=network)  # fmt: skip
        outputs = outputs_of(found, x, network)
        each = np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)
        unseen = found.row_weights == 0
        left_out = np.stack([each[unseen[:, i], i].mean(axis=0) for i in range(40)])
        expected = -np.mean(np.log(left_out[np.arange(40), labels]))
        np.testing.assert_allclose(found.search.losses.min(), expected, rtol=1e-4)
        assert found.unseen_rmse is None and expected < np.log(2)


class TestExtent:
    """How much is trained, and what shares a compiled call."""

    def prepared(self, num_rows):
        x = np.zeros((num_rows, 2), np.float32)
        return SimpleNamespace(rows=SimpleNamespace(x=x), num_rows=num_rows)

    @pytest.mark.parametrize("num_backbones", [1, 2, 4, 16])
    def test_a_run_is_shorter_where_an_epoch_is_more_work(self, num_backbones):
        wide = as_network(nb.FlaxMLP([64, 64], 1))
        longest = [extent.longest_run(wide, self.prepared(n), num_backbones) for n in (10**3, 10**5, 10**9)]
        assert longest[0] > longest[1] > longest[2] == extent.LEAST_EPOCHS
        work = extent.epoch_work(wide, self.prepared(10**5))
        runs = 1 + 2 if num_backbones == 1 else 2 * min(num_backbones, 4)  # half of four scales'
        assert longest[1] == pytest.approx(extent.MOST_WORK / (runs * work), rel=0.05)

    def test_with_room_the_number_of_backbones_is_that_of_all_rows(self):
        """Also that which a costly network can afford."""
        wide = as_network(nb.FlaxMLP([512, 512], 1))
        exact = extent.Bayesian(513, Partition((), ()))
        few, many = (extent.how_many(wide, self.prepared(n), "auto", exact) for n in (200, 50_000))
        assert few > many == extent.SAMPLED_BACKBONES
        roomy = [extent.how_many(wide, self.prepared(n), "auto", exact, room_for=50_000) for n in (200, 50_000)]
        assert roomy == [many, many]

    def test_a_given_prior_scale_leaves_more_epochs(self):
        network, prepared = as_network(nb.FlaxMLP([64, 64], 1)), self.prepared(10**5)
        searched, given = (extent.longest_run(network, prepared, 4, searched=s) for s in (True, False))
        assert given == pytest.approx(2 * searched, rel=0.01)  # one run in place of half of four

    @pytest.mark.parametrize(
        ("num_backbones", "epochs", "sigma", "expected"),
        [(1, 10, 1.0, 10), (1, 10, "auto", 30), (1, None, 1.0, 200), (4, 10, 1.0, 40), (4, 10, "auto", 80)],
    )
    def test_epochs_of_all_networks_are_counted(self, num_backbones, epochs, sigma, expected, monkeypatch):
        """With a single fold beside a single network, and half of four prior scales trained to the end."""
        seen = []
        monkeypatch.setattr(
            extent, "trained_network", lambda network, prepared, number, size: seen.append(number) or network
        )
        plan = SimpleNamespace(
            network=as_network(nb.FlaxMLP([4], 1)), prepared=self.prepared(10**6), num_backbones=num_backbones
        )
        extent.of_training(plan, PretrainingOptions(epochs=epochs, sigma=sigma))
        assert seen == [expected]

    def test_work_is_counted(self):
        """Two products of matrices, forwards and twice backwards, and little else."""
        work = extent.epoch_work(as_network(nb.FlaxMLP([512, 512], 1)), self.prepared(100))
        assert work == pytest.approx(3 * 100 * 2 * (2 * 512 + 512 * 512 + 512), rel=0.05)

    def test_the_longest_run_bounds_only_the_default(self):
        rows = rows_of(*regression())
        short = trained(rows, PretrainingOptions(sigma=1.0), most_epochs=10)
        assert short.epochs[-1] == 10
        assert trained(rows, PretrainingOptions(epochs=12, sigma=1.0), most_epochs=10).members[0].num_epochs == 12

    def test_networks_that_convolve_are_trained_one_by_one_with_the_same_result(self, monkeypatch):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(30, 8, 1))
        rows = rows_of(x, x.max(axis=1).astype(np.float32))
        network = as_network(nb.FlaxConvNet(1, target_dim=1, conv_layers=[2], fc_layers=[4]))
        alone = trained(rows, network=network)
        monkeypatch.setattr(backbone_runs, "convolves", lambda *_: False)
        together = trained(rows, network=network)
        for one, other in zip(alone.members, together.members, strict=True):
            for a, b in zip(leaves(one), leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


class TestFailure:
    @pytest.mark.parametrize("where", ["x", "y"])
    def test_data_that_are_not_finite(self, where):
        x, y = regression()
        (x if where == "x" else y)[3] = np.nan
        with pytest.raises(TrainingError, match="never finite"):
            trained(rows_of(x, y))

    def test_a_step_size_that_is_far_too_high(self):
        with pytest.raises(TrainingError, match="never finite"):
            trained(rows_of(*regression()), PretrainingOptions(epochs=40, sigma=1.0, learning_rate=1e38))

    def test_classes_too(self):
        x, _ = regression()
        x[3] = np.nan
        with pytest.raises(TrainingError, match="never finite"):
            trained(rows_of(x, np.arange(40, dtype=np.int32) % 2), likelihood=Categorical(),
                    network=as_network(nb.FlaxMLP([8], 2)))  # fmt: skip
