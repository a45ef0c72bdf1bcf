"""Noise that varies with the input, against data drawn from the model itself."""

import numpy as np
import pytest
import scipy.stats

from neurobayes import noise_model, out_of_fold
from neurobayes.noise_model import NoiseVariation, Standard, evidence_precision, fit_noise, fit_variance, table

RNG = np.random.default_rng(0)
NUM_ROWS = 20_000
FACTOR, NOISE_VAR = 2.0, 0.5
COEFFICIENTS = np.array([0.8, -0.4, 0.0])


@pytest.fixture(scope="module")
def rows():
    """Epistemic variances, features and standardised errors."""
    return RNG.gamma(1.0, size=NUM_ROWS), RNG.normal(size=(NUM_ROWS, 3)), RNG.normal(size=NUM_ROWS)


def squared_errors(epistemic, features, errors, coefficients):
    return (FACTOR * epistemic + NOISE_VAR * np.exp(features @ coefficients)) * errors**2


# Four standard errors, by the scatter of the estimates over repetitions.
LIMITS = {"factor": 0.15, "noise_var": 0.05, "coefficients": 0.08}


class TestFit:
    def fitted(self, rows, coefficients, features=None, dof=1e6):
        epistemic, every, _ = rows
        squared = squared_errors(*rows, coefficients)
        return fit_noise(FACTOR * epistemic, squared, every if features is None else features, dof, squared.mean())

    def check(self, found, coefficients):
        noise_var, estimate = found
        assert abs(noise_var - NOISE_VAR) < LIMITS["noise_var"]
        np.testing.assert_allclose(estimate, coefficients, atol=LIMITS["coefficients"])

    def test_finds_what_the_errors_were_drawn_with(self, rows):
        self.check(self.fitted(rows, COEFFICIENTS), COEFFICIENTS)

    def test_constant_noise_is_found_constant(self, rows):
        """Negative control."""
        self.check(self.fitted(rows, np.zeros(3)), np.zeros(3))

    def test_noise_that_varies_is_not_found_constant(self, rows):
        """Negative control: without the features the fit is another."""
        noise_var, none = self.fitted(rows, COEFFICIENTS, rows[1][:, :0])
        assert none.shape == (0,)
        assert abs(noise_var - NOISE_VAR) > LIMITS["noise_var"]

    def test_the_factor_and_constant_noise(self, rows):
        factor, noise_var = fit_variance(rows[0], squared_errors(*rows, np.zeros(3)))
        assert abs(factor - FACTOR) < LIMITS["factor"]
        assert abs(noise_var - NOISE_VAR) < LIMITS["noise_var"]

    def test_errors_with_the_tails_of_a_t(self, rows):
        errors = np.random.default_rng(1).standard_t(5.0, NUM_ROWS) * np.sqrt(3.0 / 5.0)  # of variance one
        self.check(self.fitted((*rows[:2], errors), COEFFICIENTS, dof=5.0), COEFFICIENTS)

    def test_it_is_a_maximum(self, rows):
        """The gradient is right: no step in any direction makes the errors likelier."""
        epistemic, features, _ = some = tuple(array[:500] for array in rows)
        noise_var, found = self.fitted(some, COEFFICIENTS, dof=7.0)
        squared = squared_errors(*some, COEFFICIENTS)

        def score(values):
            total = FACTOR * epistemic + np.exp(values[0] + features @ values[1:])
            scale = np.sqrt(total * 5.0 / 7.0)
            penalty = 0.5 * noise_model.FIRST_PRECISION * np.sum(values[1:] ** 2)
            return scipy.stats.t.logpdf(np.sqrt(squared), 7.0, scale=scale).sum() - penalty

        best = np.array([np.log(noise_var), *found])
        for direction in np.eye(4):
            for step in (-0.05, 0.05):
                assert score(best + step * direction) < score(best)

    def test_a_few_rows_leave_it_nearly_constant(self, rows):
        _, found = self.fitted(tuple(array[:20] for array in rows), COEFFICIENTS)
        assert np.abs(found).max() < 0.2

    def test_the_unit_of_the_errors_does_not_matter(self, rows):
        epistemic, features, _ = some = tuple(array[:500] for array in rows)
        noise_var, found = self.fitted(some, COEFFICIENTS)
        squared = 1e-6 * squared_errors(*some, COEFFICIENTS)
        scaled = fit_noise(1e-6 * FACTOR * epistemic, squared, features, 1e6, squared.mean())
        np.testing.assert_allclose(scaled[0], 1e-6 * noise_var, rtol=1e-3)
        np.testing.assert_allclose(scaled[1], found, atol=1e-3)


def test_the_evidence_tells_noise_that_varies_from_noise_that_does_not(rows):
    def precision(coefficients, used):
        some, found = tuple(array[:used] for array in rows), noise_model.FIRST_PRECISION
        squared = squared_errors(*some, coefficients)
        for _ in range(8):
            noise_var, fitted = fit_noise(FACTOR * some[0], squared, some[1], 1e6, squared.mean(), found)
            noise = noise_var * np.exp(some[1] @ fitted)
            found = evidence_precision(fitted, some[1], noise / (FACTOR * some[0] + noise), 1e6, found)
        return found

    varies, constant = precision(COEFFICIENTS, NUM_ROWS), precision(np.zeros(3), NUM_ROWS)
    assert varies == noise_model.PRECISIONS[0]  # three over the sum of squares, 0.8, is below the least
    assert constant > 500.0


@pytest.mark.parametrize("dof", [5.0, 1e6])
def test_a_step_to_the_precision_with_the_most_evidence(dof):
    """With the information of an error about the logarithm of its noise variance integrated numerically."""
    share, precision, coefficients = 0.6, 40.0, np.array([0.15, -0.1])
    features = np.repeat([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], 50, axis=0)  # orthogonal
    errors, step = np.linspace(-200.0, 200.0, 400_001), 1e-3

    def log_density(change):
        variance = 1.0 - share + share * np.exp(change)
        return scipy.stats.t.logpdf(errors, dof, scale=np.sqrt(variance * (dof - 2.0) / dof))

    slope = (log_density(step) - log_density(-step)) / (2.0 * step)
    curvature = len(features) * np.trapezoid(slope**2 * np.exp(log_density(0.0)), errors)
    expected = 2.0 * curvature / (curvature + precision) / np.sum(coefficients**2)
    assert noise_model.PRECISIONS[0] < 1.1 * expected < noise_model.PRECISIONS[1]
    found = evidence_precision(coefficients, features, np.full(len(features), share), dof, precision)
    assert found == pytest.approx(expected, rel=1e-3)


class TestVariation:
    def variation(self, x, means, coefficients):
        over_rows = Standard.of(np.swapaxes(means, 0, 1))
        return NoiseVariation(np.asarray(coefficients), Standard.of(table(x)), over_rows)

    def test_of_features_at_their_mean_it_is_one(self, monkeypatch):
        monkeypatch.setattr(noise_model, "ROWS_PER_BLOCK", 7)
        x, means = RNG.normal(3.0, 2.0, size=(50, 2)).astype(np.float32), RNG.normal(size=(1, 50, 2))
        found = self.variation(x, means, [[[0.3, -0.2, 0.5], [0.0, 0.1, 0.0]]]).factor(x, means)
        assert found.shape == (1, 50, 2)
        np.testing.assert_allclose(np.log(found).mean(axis=1), 0.0, atol=0.02)
        columns = np.column_stack([x.astype(float), means[0, :, 0]])
        standard = np.clip((columns - columns.mean(axis=0)) / columns.std(axis=0), -3, 3)
        np.testing.assert_allclose(np.log(found)[0, :, 0], standard @ [0.3, -0.2, 0.5], rtol=1e-4, atol=1e-6)

    def test_beyond_the_rows_it_stays_as_it_is_at_their_edge(self):
        x, means = np.linspace(-1, 1, 9, dtype=np.float32)[:, None], np.zeros((1, 9, 1))
        one = self.variation(x, means, [[[0.7, 0.0]]])
        far = one.factor(np.array([[-50.0], [-1.0], [1.0], [1e6]], np.float32), np.zeros((1, 4, 1)))[0, :, 0]
        np.testing.assert_allclose(far[:2], far[0])
        np.testing.assert_allclose(far[2:], far[3])
        assert far[3] > 2 * far[0]

    def test_columns_with_heavy_tails_do_not_run_away(self):
        """Rows of extreme size, which are within the range of the training rows, get bounded noise."""
        rng = np.random.default_rng(0)
        x = np.exp(1.5 * rng.normal(size=(3000, 3))).astype(np.float32)
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        errors = rng.normal(size=(3000, 1)) * (1.0 + (x[:, :1] > 0))
        mean = np.zeros((2, 3000, 1))
        unseen = np.arange(3000) % 2 == np.arange(2)[:, None]
        found = out_of_fold.calibrate_variance(mean, mean + 1e-3, unseen, np.zeros(2, int), errors, x)
        factor = found.noise_variation.factor(x, mean[:1])
        assert found.noise_variation.coefficients[0, 0, 0] > 0.2
        assert factor.max() < 50 and factor.min() > 0.02

    @pytest.mark.parametrize("x", [np.zeros((9, 101), np.float32), np.zeros((9, 4, 4, 1), np.float32),
                                   np.zeros((9, 5), np.int32)], ids=["wide", "images", "tokens"])  # fmt: skip
    def test_where_there_is_no_small_table_only_the_prediction_counts(self, x):
        means = np.linspace(-1, 1, 9)[None, :, None]
        assert table(x).shape == (9, 0)
        found = self.variation(x, means, [[[0.5]]]).factor(x, means)[0, :, 0]
        assert np.all(np.diff(found) > 0)

    def test_a_column_without_spread_changes_nothing(self):
        x, means = np.full((9, 1), 0.1, np.float32), np.linspace(-1, 1, 9)[None, :, None]
        found = self.variation(x, means, [[[5.0, 0.0]]]).factor(x, means)
        np.testing.assert_allclose(found, 1.0, rtol=1e-6)


class TestLeftOutRows:
    def case(self, varies, seed=0, num_rows=2000):
        """Predictions by members without scatter, and targets whose noise depends on the first column or not."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(num_rows, 3)).astype(np.float32)
        mean = np.repeat(rng.normal(size=(1, num_rows, 1)), 4, axis=0)
        std = np.exp(0.5 * x[:, :1].astype(float)) if varies else np.ones((num_rows, 1))
        y = mean[0] + std * rng.normal(size=(num_rows, 1))
        unseen = np.arange(num_rows) % 4 == np.arange(4)[:, None]
        return (mean, np.full_like(mean, 1e-4), unseen, np.zeros(4, int), y), x, std[:, 0]

    def test_varying_noise_covers_every_part_of_the_inputs(self):
        arguments, x, std = self.case(True)
        found = out_of_fold.calibrate_variance(*arguments, x)
        noise = found.noise_var[0, 0] * found.noise_variation.factor(x, arguments[0][:1])[0, :, 0]
        assert np.mean(np.abs(np.log(noise) - 2 * np.log(std))) < 0.25  # of a standard deviation of one
        assert np.corrcoef(np.log(noise), np.log(std))[0, 1] > 0.99
        constant = out_of_fold.calibrate_variance(*arguments)
        assert constant.noise_variation is None
        assert found.log_score > constant.log_score + 0.05
        assert abs(found.coverage[0] - 0.95) < 0.02

    def test_noise_that_does_not_vary_is_left_alone(self):
        """Negative control."""
        arguments, x, _ = self.case(False)
        found = out_of_fold.calibrate_variance(*arguments, x)
        assert np.abs(found.noise_variation.coefficients).max() < 0.15


class TestNoiseOfTheNetwork:
    """Members give the noise of each row, too large by some factor."""

    def case(self, factor, num_rows=800, spread=0.7):
        rng = np.random.default_rng(0)
        own = np.exp(2 * spread * rng.normal(size=(num_rows, 2)))
        y = np.sqrt(own * factor) * rng.normal(size=own.shape)
        mean = np.zeros((4, num_rows, 2))
        unseen = np.arange(num_rows) % 4 == np.arange(4)[:, None]
        noise = np.where(unseen[:, :, None], own, 1e9)  # what members say of rows they saw must not matter
        return (mean, mean + 1e-4, unseen, np.zeros(4, int), y, None, noise), own

    def test_the_factor_is_found_whatever_the_range_of_the_noise(self):
        factor = np.array([0.5, 2.0])
        for spread in (0.1, 2.0):  # at the end standard deviations differ by a factor of ten thousand
            arguments, own = self.case(factor, spread=spread)
            found = out_of_fold.calibrate_variance(*arguments)
            # Twice the information of a row about the logarithm of its variance is one: four standard errors.
            np.testing.assert_allclose(found.noise_head.factor, [factor], rtol=4 * np.sqrt(2 / len(own)))
            np.testing.assert_allclose(found.coverage, 0.95, atol=4 * np.sqrt(0.05 * 0.95 / len(own)))
            typical = found.noise_head.factor * np.exp(np.log(own).mean(axis=0))
            np.testing.assert_allclose(found.noise_var, typical, rtol=1e-6)
            np.testing.assert_allclose(found.noise_head.lower[0], own.min(axis=0))
            assert found.noise_variation is None

    @pytest.mark.parametrize("low_std", [0.02, 1e-3, 1e-4])
    def test_the_factor_is_found_where_few_rows_have_all_the_noise(self, low_std):
        (mean, variance, unseen, parts, y, _, noise), own = self.case(1.0)
        own = np.where(np.arange(len(own))[:, None] % 10 == 0, 1.0, low_std**2) * np.ones_like(own)
        y = np.sqrt(own) * np.random.default_rng(1).normal(size=own.shape)
        variance = np.full_like(variance, 1e-12)
        found = out_of_fold.calibrate_variance(
            mean, variance, unseen, parts, y, None, np.broadcast_to(own, noise.shape)
        )
        np.testing.assert_allclose(found.noise_head.factor, 1.0, rtol=4 * np.sqrt(2 / len(own)))

    def test_beyond_the_training_rows_the_noise_is_held(self):
        head = noise_model.HeadNoise(np.array([[2.0]]), np.array([[0.1]]), np.array([[3.0]]))
        given = np.array([[[1e-9], [0.5], [1e12]]])
        np.testing.assert_allclose(head(given)[0, :, 0], [0.2, 1.0, 6.0])

    def test_one_row_with_much_noise_does_not_decide(self):
        arguments, own = self.case(1.0)
        noise = arguments[-1].copy()
        noise[:, 5] = 1e8
        found = out_of_fold.calibrate_variance(*arguments[:-1], noise)
        np.testing.assert_allclose(found.noise_head.factor, 1.0, rtol=4 * np.sqrt(2 / len(own)))

    def test_expected_log_loss_is_that_of_the_whole_ensemble_on_new_rows(self):
        """Left-out predictions of few members judge many; the right value is that of fresh rows and all members."""
        rng = np.random.default_rng(0)
        members, rows, between, noise = 8, 100_000, 0.5, 0.3
        truth = rng.normal(size=(rows, 1))
        mean = truth + np.sqrt(between) * rng.normal(size=(members, rows, 1))
        y = truth + np.sqrt(noise) * rng.normal(size=(rows, 1))
        unseen = rng.permuted(np.arange(members)[:, None] < 4 * np.ones(rows, int), axis=0)
        own = np.full_like(mean, noise)
        found = out_of_fold.ensemble_log_loss(mean, own, unseen, y, members)
        spread = between * (1 - 1 / members)
        expected = 0.5 * np.log(2 * np.pi * (noise + spread)) + 0.5 * (noise + between / members) / (noise + spread)
        # The variance between four members is uncertain, which the logarithm feels: a few hundredths.
        assert abs(found - expected) < 0.15
        everything = out_of_fold.ensemble_log_loss(mean, own, np.ones_like(unseen), y, members)
        assert abs(everything - expected) < 0.05
