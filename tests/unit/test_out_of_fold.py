"""What left-out rows say: estimates against simulations whose truth is known."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from neurobayes import out_of_fold


def every_member_leaves_out(num_members, num_rows, share, seed=0):
    """(members, rows) booleans; every row is new to ``share`` of the members."""
    ranks = np.argsort(np.random.default_rng(seed).random((num_members, num_rows)), axis=0)
    return ranks < share * num_members


def ensemble(num_members, num_rows, bias, between, noise, seed=0):
    """Members' predictions of targets zero: a bias that they share, and scatter of their own."""
    rng = np.random.default_rng(seed)
    shared = np.asarray(bias) * rng.choice([-1.0, 1.0], size=(num_rows, len(bias)))
    values = shared + np.sqrt(between) * rng.normal(size=(num_members, num_rows, len(bias)))
    return values, np.sqrt(noise) * rng.normal(size=(num_rows, len(bias)))


@pytest.fixture(scope="module")
def given():
    """Values of five members, and rows that are new to one, two or more of them."""
    rng = np.random.default_rng(0)
    unseen = rng.random((5, 40)) < 0.4
    unseen[0] |= ~unseen.any(axis=0)
    return rng.normal(size=(5, 40, 2)), unseen


class TestLeftOutMean:
    def test_is_that_of_a_plain_loop(self, given):
        values, unseen = given
        mean, between = out_of_fold.left_out_mean(values, unseen)
        for i in range(values.shape[1]):
            new = values[unseen[:, i], i]
            np.testing.assert_allclose(mean[i], new.mean(axis=0), rtol=1e-12)
            judged = new if len(new) > 1 else values[:, i]
            np.testing.assert_allclose(between[i], judged.var(axis=0, ddof=1), rtol=1e-12)

    def test_members_that_saw_a_row_have_no_say_in_its_mean(self, given):
        values, unseen = given
        mean, _ = out_of_fold.left_out_mean(values, unseen)
        changed = np.where(unseen[:, :, None], values, values + 100.0)
        np.testing.assert_array_equal(out_of_fold.left_out_mean(changed, unseen)[0], mean)
        changed = np.where(unseen[:, :, None], values + 100.0, values)
        assert np.all(np.abs(out_of_fold.left_out_mean(changed, unseen)[0] - mean) > 50.0)

    def test_one_member_has_no_variance(self):
        mean, between = out_of_fold.left_out_mean(np.ones((1, 3, 1)), np.ones((1, 3), bool))
        np.testing.assert_array_equal(mean, 1.0)
        np.testing.assert_array_equal(between, 0.0)

    def test_probabilities_stay_probabilities(self, given):
        values, unseen = given
        each = scipy.special.softmax(values, axis=-1)
        found = out_of_fold.ensemble_probabilities(each, unseen)
        np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
        np.testing.assert_allclose(found[7], each[unseen[:, 7], 7].mean(axis=0), rtol=1e-12)


class TestEnsembleError:
    NUM_MEMBERS = 8
    BIAS, BETWEEN, NOISE = np.array([0.3, 0.0]), np.array([0.5, 2.0]), np.array([0.2, 0.1])

    def estimates(self, num_rows, trials, num_members=NUM_MEMBERS):
        unseen = every_member_leaves_out(self.NUM_MEMBERS, num_rows, 0.25)
        for seed in range(trials):
            values, y = ensemble(self.NUM_MEMBERS, num_rows, self.BIAS, self.BETWEEN, self.NOISE, seed)
            yield out_of_fold.ensemble_error(values, unseen, y, num_members)

    def truth(self, num_members):
        return self.BIAS**2 + self.BETWEEN / num_members + self.NOISE

    def test_is_that_of_the_whole_ensemble(self, monkeypatch):
        monkeypatch.setattr(out_of_fold, "FULL_CORRECTION_ROWS", 0)
        found = np.array(list(self.estimates(500, 200)))
        standard_error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
        assert np.all(np.abs(found.mean(axis=0) - self.truth(self.NUM_MEMBERS)) < 4.0 * standard_error)
        # The small ensembles that predict left-out rows are worse by far more than that.
        assert np.all(self.truth(2) - found.mean(axis=0) > 20.0 * standard_error)

    def test_of_as_many_members_as_left_the_row_out_needs_no_correction(self):
        values, y = ensemble(self.NUM_MEMBERS, 50, self.BIAS, self.BETWEEN, self.NOISE)
        unseen = every_member_leaves_out(self.NUM_MEMBERS, 50, 0.25)
        found = out_of_fold.ensemble_error(values, unseen, y, 2)
        mean, _ = out_of_fold.left_out_mean(values, unseen)
        np.testing.assert_allclose(found, ((mean - y) ** 2).mean(axis=0), rtol=1e-12)

    @pytest.mark.parametrize("num_rows", [5, 100])
    def test_few_rows_are_corrected_less_but_never_the_wrong_way(self, num_rows):
        found = np.array(list(self.estimates(num_rows, 400)))
        standard_error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
        assert np.all(found.mean(axis=0) > self.truth(self.NUM_MEMBERS) - 4.0 * standard_error)
        assert np.all(found.mean(axis=0) < self.truth(2) + 4.0 * standard_error)

    def test_is_positive_where_the_correction_exceeds_the_error(self, monkeypatch):
        monkeypatch.setattr(out_of_fold, "FULL_CORRECTION_ROWS", 0)
        values = np.array([[[5.0]] * 4, [[-5.0]] * 4])  # members disagree, and their mean is right
        found = out_of_fold.ensemble_error(values, np.ones((2, 4), bool), np.full((4, 1), 0.1), 1000)
        assert found.shape == (1,) and found[0] > 0

    def test_of_predictions_that_are_not_finite_is_not_finite(self):
        values = np.zeros((3, 6, 1))
        values[1, 2] = np.nan
        assert not np.isfinite(out_of_fold.ensemble_error(values, np.ones((3, 6), bool), np.zeros((6, 1)), 3)).any()


class TestCalibrateVariance:
    """Members predict the truth plus scatter; within each, draws have a variance that varies from row to row."""

    NUM_MEMBERS, NUM_ROWS = 6, 4000

    def case(self, a, b, num_rows=NUM_ROWS, seed=0):
        """Targets whose errors have variance ``a * within + b``; ``(mean, variance, unseen, parts, y)``."""
        rng = np.random.default_rng(seed)
        within = rng.gamma(1.0, size=(num_rows, len(a))) + 0.05
        mean = np.zeros((self.NUM_MEMBERS, num_rows, len(a)))
        y = np.sqrt(np.asarray(a) * within + np.asarray(b)) * rng.normal(size=within.shape)
        unseen = every_member_leaves_out(self.NUM_MEMBERS, num_rows, 0.5, seed)
        variance = np.where(unseen[:, :, None], within, 1e6)  # what members say of rows they saw must not matter
        return mean, variance, unseen, np.zeros(self.NUM_MEMBERS, int), y

    def test_finds_the_factor_and_the_noise_of_each_output(self):
        a, b = np.array([3.0, 0.5]), np.array([0.4, 1.5])
        found = out_of_fold.calibrate_variance(*self.case(a, b))
        np.testing.assert_allclose(found.epistemic_factor, [a], rtol=0.25)
        np.testing.assert_allclose(found.noise_var, [b], rtol=0.2)
        np.testing.assert_allclose(found.weights, [1.0])
        np.testing.assert_allclose(found.coverage, 0.95, atol=0.015)
        assert found.temperature is None

    def test_the_error_and_the_score_are_those_of_the_rows(self):
        mean, variance, unseen, parts, y = self.case([2.0], [0.5])
        found = out_of_fold.calibrate_variance(mean, variance, unseen, parts, y)
        np.testing.assert_allclose(found.rmse, np.sqrt(np.mean(y**2, axis=0)), rtol=1e-6)
        within = variance[unseen].reshape(-1)
        assert within.max() < 1e6
        total = found.epistemic_factor[0] * np.where(unseen[:, :, None], variance, 0).sum(0) / 3 + found.noise_var[0]
        expected = -0.5 * np.mean(np.log(2 * np.pi * total) + y**2 / total)
        np.testing.assert_allclose(found.log_score, expected, rtol=1e-6)

    def test_nothing_near_beats_it(self):
        """A maximum of the likelihood: negative control for the optimiser."""
        mean, variance, unseen, parts, y = self.case([2.0], [0.5], num_rows=300)
        found = out_of_fold.calibrate_variance(mean, variance, unseen, parts, y)
        within = np.where(unseen[:, :, None], variance, 0).sum(0) / 3

        def score(a, b):
            total = a * within + b
            # With 300 rows the guard of the factor weighs as much as a row or so.
            return -0.5 * np.mean(np.log(total) + y**2 / total)

        a, b = found.epistemic_factor[0, 0], found.noise_var[0, 0]
        best = score(a, b)
        for p, q in [(3 * a, b), (a / 3, b), (a, 3 * b), (a, b / 3), (3 * a, b / 3), (a / 3, 3 * b)]:
            assert score(p, q) < best

    def test_the_scale_of_the_targets_does_not_matter(self):
        mean, variance, unseen, parts, y = self.case([2.0], [0.5], num_rows=500)
        found = out_of_fold.calibrate_variance(mean, variance, unseen, parts, y)
        scaled = out_of_fold.calibrate_variance(1e-3 * mean, 1e-6 * variance, unseen, parts, 1e-3 * y)
        np.testing.assert_allclose(scaled.epistemic_factor, found.epistemic_factor, rtol=1e-3)
        np.testing.assert_allclose(scaled.noise_var, 1e-6 * found.noise_var, rtol=1e-3)

    def test_scatter_between_members_counts_as_epistemic(self):
        """Members without any draws' variance, whose scatter is half of that of the truth about them."""
        rng = np.random.default_rng(0)
        scale = np.exp(0.5 * rng.normal(size=(self.NUM_ROWS, 1)))
        mean = scale * rng.normal(size=(16, self.NUM_ROWS, 1))
        y = 2.0 * scale * rng.normal(size=(self.NUM_ROWS, 1)) + 0.1 * rng.normal(size=(self.NUM_ROWS, 1))
        unseen = every_member_leaves_out(16, self.NUM_ROWS, 0.5)
        found = out_of_fold.calibrate_variance(mean, np.zeros_like(mean), unseen, np.zeros(16, int), y)
        # The whole ensemble's variance is 15/16 of the scatter, and its mean's error 4 + 1/16 of it.
        np.testing.assert_allclose(found.epistemic_factor, 65 / 15, rtol=0.2)
        # Scatter known from half of the members is itself uncertain, which looks like noise.
        assert found.noise_var[0, 0] < 0.2 * found.rmse[0] ** 2

    def test_a_handful_of_rows_leaves_the_factor_near_one(self):
        few = [out_of_fold.calibrate_variance(*self.case([50.0], [1e-3], 4, seed)) for seed in range(20)]
        many = out_of_fold.calibrate_variance(*self.case([50.0], [1e-3], 2000))
        assert np.median([found.epistemic_factor[0, 0] for found in few]) < 0.7 * many.epistemic_factor[0, 0]
        assert all(np.isfinite(found.noise_var).all() and found.noise_var.min() > 0 for found in few)

    def test_weights_favour_the_better_part(self):
        mean, variance, unseen, _, y = self.case([1.0], [0.5], num_rows=400)
        parts = np.repeat([0, 1], self.NUM_MEMBERS)
        worse = mean + 0.5  # a bias of every member of the second part

        def joined(second, swap=False):
            both = [second, mean] if swap else [mean, second]
            return out_of_fold.calibrate_variance(
                np.concatenate(both), np.tile(variance, (2, 1, 1)), np.tile(unseen, (2, 1)), parts, y
            )

        found = joined(worse)
        assert found.weights[0] > 0.9
        np.testing.assert_allclose(joined(worse, swap=True).weights, found.weights[::-1], rtol=1e-6)
        np.testing.assert_allclose(found.weights.sum(), 1.0)
        assert found.noise_var[1, 0] > found.noise_var[0, 0]
        # Negative control: parts that predict alike count alike.
        np.testing.assert_allclose(joined(mean).weights, 0.5, rtol=1e-9)

    def test_errors_that_have_nothing_to_do_with_the_variance_are_noise(self):
        """Negative control: an epistemic variance that tells nothing is not relied on."""
        mean, variance, unseen, parts, _ = self.case([1.0], [1.0])
        y = np.random.default_rng(1).normal(size=mean.shape[1:])
        found = out_of_fold.calibrate_variance(mean, variance, unseen, parts, y)
        assert found.epistemic_factor[0, 0] < 0.1
        np.testing.assert_allclose(found.noise_var, 1.0, rtol=0.1)


class TestTemperature:
    def case(self, temperature, num_rows=4000):
        """Labels drawn from the members' logits over ``temperature``; members that saw a row claim to be certain."""
        rng = np.random.default_rng(0)
        logits = 3.0 * rng.normal(size=(num_rows, 3))
        labels = np.argmax(logits / temperature + rng.gumbel(size=logits.shape), axis=1)
        unseen = every_member_leaves_out(4, num_rows, 0.5)
        certain = np.eye(3)[(labels + 1) % 3]
        return np.where(unseen[:, :, None], scipy.special.softmax(logits, axis=-1), certain), unseen, labels

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_is_found(self, temperature):
        probabilities, unseen, labels = self.case(temperature)
        found = out_of_fold.calibrate_temperature(probabilities, unseen, labels)
        np.testing.assert_allclose(found.temperature, temperature, rtol=0.1)
        left_out = out_of_fold.ensemble_probabilities(probabilities, unseen)
        tempered = out_of_fold.temper(left_out, found.temperature)
        np.testing.assert_allclose(found.log_score, -out_of_fold.log_loss(tempered, labels), rtol=1e-9)
        assert found.log_score >= -out_of_fold.log_loss(left_out, labels)
        assert found.epistemic_factor is None and found.noise_var is None and found.coverage is None

    @pytest.mark.parametrize("num_rows", [20, 100])
    def test_does_not_collapse_where_all_left_out_rows_are_classified_rightly(self, num_rows):
        """Their likelihood rises without end as the temperature falls; 95 rights in 100 would then be certain."""
        labels = np.arange(num_rows) % 3
        right = np.where(np.eye(3)[labels] > 0, 0.8, 0.1)
        probabilities, unseen = np.tile(right, (4, 1, 1)), every_member_leaves_out(4, num_rows, 0.5)
        found = out_of_fold.calibrate_temperature(probabilities, unseen, labels)
        assert 0.2 < found.temperature < 0.9

    def test_to_temper_is_to_divide_the_logits(self):
        logits = np.random.default_rng(0).normal(size=(5, 3))
        tempered = out_of_fold.temper(scipy.special.softmax(logits, axis=-1), 2.5)
        np.testing.assert_allclose(tempered, scipy.special.softmax(logits / 2.5, axis=-1), rtol=1e-9)
        np.testing.assert_array_equal(out_of_fold.temper([[1.0, 0.0]], 0.7), [[1.0, 0.0]])

    def test_log_loss_is_that_of_the_labels(self):
        probabilities = np.array([[0.2, 0.8], [0.6, 0.4]])
        np.testing.assert_allclose(out_of_fold.log_loss(probabilities, np.array([1, 0])), -np.log([0.8, 0.6]).mean())
        assert np.isfinite(out_of_fold.log_loss(np.array([[1.0, 0.0]]), np.array([1])))

    def test_labels_of_one_group_count_once(self):
        """The prior has as much say as with so few rows: the stationary point of likelihood and prior."""
        probabilities, unseen, labels = self.case(3.0, num_rows=400)
        found = [out_of_fold.calibrate_temperature(probabilities, unseen, labels, n).temperature for n in (400, 10, 2)]
        assert 1.0 < found[2] < found[1] < found[0]
        left_out, step = out_of_fold.ensemble_probabilities(probabilities, unseen), 1e-3
        losses = [
            out_of_fold.log_loss(out_of_fold.temper(left_out, found[1] * np.exp(h)), labels) for h in (step, -step)
        ]
        slope = (losses[0] - losses[1]) / (2 * step)
        prior = np.log(found[1]) / out_of_fold.TEMPERATURE_SPREAD**2
        np.testing.assert_allclose(10 * slope, -prior, rtol=0.02)


class TestScaleUncertainty:
    def test_vanishes_with_many_rows_and_never_exceeds_two(self):
        factors = [out_of_fold.scale_uncertainty(n) for n in (1, 4, 8, 32, 10_000)]
        np.testing.assert_allclose(factors, [2.0, 2.0, 2.0, 32 / 28, 10_000 / 9_996])

    @pytest.mark.slow
    def test_intervals_from_few_rows_hold_as_often_as_they_say(self):
        """Coverage over many small data sets; without the factor it is less."""
        num_rows, unseen = 24, every_member_leaves_out(8, 24, 0.25)
        rng, inside = np.random.default_rng(3), []
        for seed in range(100):
            values, y = ensemble(8, num_rows, [0.0], 0.05, 1.0, seed)
            found = out_of_fold.calibrate_variance(values, np.full_like(values, 1e-6), unseen, np.zeros(8, int), y)
            var = found.epistemic_factor[0, 0] * 0.05 * 7 / 8 + found.noise_var[0, 0]
            error = np.sqrt(0.05 / 8 + 1.0) * rng.normal(size=200)
            shrunk = var / out_of_fold.scale_uncertainty(num_rows)
            inside.append([np.mean(error**2 < 1.96**2 * v) for v in (var, shrunk)])
        calibrated, uncorrected = np.mean(inside, axis=0)
        margin = 4 * np.std(inside, axis=0)[0] / np.sqrt(len(inside))
        assert abs(calibrated - 0.95) < margin + 0.01
        assert uncorrected < calibrated - 0.005

    @pytest.mark.parametrize("num_groups", [6, 24])
    def test_errors_of_one_group_count_once(self, num_groups):
        """A variance from few groups is as uncertain as one from as many rows, however many rows they have."""
        values, y = ensemble(8, 240, [0.0], 0.05, 1.0)
        unseen, parts = every_member_leaves_out(8, 240, 0.25), np.zeros(8, int)
        each = out_of_fold.calibrate_variance(values, np.full_like(values, 1e-6), unseen, parts, y)
        together = out_of_fold.calibrate_variance(
            values, np.full_like(values, 1e-6), unseen, parts, y, num_groups=num_groups
        )
        ratio = out_of_fold.scale_uncertainty(num_groups) / out_of_fold.scale_uncertainty(240)
        np.testing.assert_allclose(together.noise_var, ratio * each.noise_var, rtol=1e-9)
        np.testing.assert_allclose(together.epistemic_factor, ratio * each.epistemic_factor, rtol=1e-9)
        np.testing.assert_allclose(together.tail, each.tail, rtol=1e-3)

    def test_parts_are_weighed_by_groups(self):
        values = [ensemble(8, 240, [bias], 0.05, 1.0) for bias in (0.0, 0.3)]
        unseen, y = np.tile(every_member_leaves_out(8, 240, 0.25), (2, 1)), values[0][1]
        both, parts = np.concatenate([value for value, _ in values]), np.repeat([0, 1], 8)
        logits = [
            np.log(
                out_of_fold.calibrate_variance(both, np.full_like(both, 1e-6), unseen, parts, y, num_groups=n).weights
            )
            for n in (24, 48)
        ]
        np.testing.assert_allclose(np.diff(logits[1]), 2 * np.diff(logits[0]), rtol=0.15)

    def test_the_tails_density_has_the_same_correction(self):
        values, y = ensemble(8, 24, [0.0], 0.05, 1.0)
        unseen = every_member_leaves_out(8, 24, 0.25)
        found = out_of_fold.calibrate_variance(values, np.full_like(values, 1e-6), unseen, np.zeros(8, int), y)
        centre, between = out_of_fold.left_out_mean(values, unseen)
        total = found.epistemic_factor[0] * (1e-6 + between * 7 / 8) + found.noise_var[0]
        z = (y - centre) / np.sqrt(total / out_of_fold.scale_uncertainty(24))
        dof, scale = found.tail[0]

        def density(scale):
            return np.sum(scipy.stats.t.logpdf(z / scale, dof)) - len(z) * np.log(scale)

        assert density(scale) > max(density(0.97 * scale), density(1.03 * scale))
