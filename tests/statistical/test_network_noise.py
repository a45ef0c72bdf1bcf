"""Noise that varies, learnt by the network: recovered, and intervals right where it is small and where it is large."""

import numpy as np
import pytest

import neurobayes as nb

NUM_ROWS, NUM_NEW = 400, 4000


def truth(x):
    return np.sin(2 * x), 0.1 * np.exp(0.8 * x)


def rows(num_rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, size=num_rows)
    mean, noise_std = truth(x)
    return x[:, None], 1000 * (mean + noise_std * rng.normal(size=num_rows)) + 900


@pytest.fixture(scope="module")
def fits():
    options = {"sgd_epochs": 400, "num_warmup": 200, "num_samples": 200, "map_sigma": 1.0, "progress_bar": False}
    found = {}
    for noise, width in (("network", 2), ("constant", 1)):
        network = nb.FlaxMLP([16, 16], width, activation="silu")
        model = nb.PartialBNN(network, num_probabilistic_layers=1, noise=noise)
        found[noise] = model.fit(*rows(NUM_ROWS, 0), seed=0, **options)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::neurobayes.errors.ConvergenceWarning")
class TestNoiseOfTheNetwork:
    @pytest.mark.parametrize("calibration", ["out_of_fold", None])
    def test_is_recovered(self, fits, calibration):
        x = np.linspace(-1.8, 1.8, 19)
        noise_std = np.sqrt(fits["network"].posterior_predictive(x[:, None], calibration=calibration).aleatoric_var)
        # A row tells half a squared unit of the logarithm; a curve with about six degrees of freedom is then known to
        # the root of 6 / (2 * 400), 9 %, and with 9 % more for what the mean misses, four such errors are 0.5.
        np.testing.assert_allclose(np.log(noise_std), np.log(1000 * truth(x)[1]), atol=0.5)
        assert np.corrcoef(np.log(noise_std), x)[0, 1] > 0.98

    @pytest.mark.parametrize("calibration", ["out_of_fold", None])
    def test_intervals_cover_where_noise_is_small_and_where_it_is_large(self, fits, calibration):
        X, y = rows(NUM_NEW, 1)
        low, high = fits["network"].predict_interval(X, 0.95, calibration=calibration)
        inside = (low <= y) & (y <= high)
        for region in (X[:, 0] < -1, np.abs(X[:, 0]) < 0.5, X[:, 0] > 1):
            # The noise of a region is learnt from a hundred rows or so: to 7 % at best, which moves coverage by 1.5 %.
            training = 4 * 0.23 * np.sqrt(0.5 / 100)
            new = 4 * np.sqrt(0.95 * 0.05 / region.sum())
            assert abs(inside[region].mean() - 0.95) < training + new

    def test_constant_noise_is_told_apart(self, fits):
        """Negative control: too wide here, too narrow there, and less likely."""
        X, y = rows(NUM_NEW, 1)
        density = {name: model.log_predictive_density(X, y).mean() for name, model in fits.items()}
        assert density["network"] > density["constant"] + 0.3
        mean, var = fits["constant"].predict(X)
        assert nb.metrics.coverage(y[X[:, 0] < -1], mean[X[:, 0] < -1], var[X[:, 0] < -1]) > 0.99
        assert nb.metrics.coverage(y[X[:, 0] > 1.5], mean[X[:, 0] > 1.5], var[X[:, 0] > 1.5]) < 0.85
