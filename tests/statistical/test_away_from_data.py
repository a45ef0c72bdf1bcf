"""The default model knows where it has no data: between two groups of rows, and beyond them."""

import numpy as np
import pytest

import neurobayes as nb

NOISE_STD = 0.1
ON = np.concatenate([np.linspace(-2.8, -1.2, 20), np.linspace(1.2, 2.8, 20)])
GAP = np.linspace(-0.5, 0.5, 11)
BEYOND = np.array([-5.0, -4.5, 4.5, 5.0])

# Four seeds gave factors between 46 and 80, with and without calibration, in the gap and beyond; with rows in the gap
# 1.2 to 1.5. The error in the gap was 0.4 to 0.8 of what was predicted.
LEAST_FACTOR = 10.0


def curve(x):
    return np.sin(1.5 * x) + 0.3 * x


def fitted(x: np.ndarray, seed: int):
    noise = NOISE_STD * np.random.default_rng(seed + 100).normal(size=len(x))
    network = nb.FlaxMLP([16, 16], 1)
    return nb.PartialBNN(network).fit(x[:, None], curve(x) + noise, sgd_epochs=300, seed=seed)


def two_groups(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-3, -1, 40), rng.uniform(1, 3, 40)])


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def model(request):
    return fitted(two_groups(request.param), request.param)


def mean_variances(model, x, **options) -> tuple[float, float]:
    prediction = model.posterior_predictive(x[:, None], **options)
    return float(prediction.epistemic_var.mean()), float(prediction.aleatoric_var.mean())


@pytest.mark.parametrize("calibration", ["out_of_fold", None])
@pytest.mark.parametrize("place", [GAP, BEYOND], ids=["gap", "beyond"])
def test_epistemic_variance_grows_away_from_the_data_and_noise_does_not(model, place, calibration):
    on, noise_on = mean_variances(model, ON, calibration=calibration)
    away, noise_away = mean_variances(model, place, calibration=calibration)
    assert away > LEAST_FACTOR * on
    assert noise_away < 1.5 * noise_on


def test_the_error_in_the_gap_is_of_the_size_that_is_predicted(model):
    prediction = model.posterior_predictive(GAP[:, None])
    error = np.sqrt(np.mean((prediction.mean - curve(GAP)) ** 2))
    error_on = np.sqrt(np.mean((model.predict(ON[:, None])[0] - curve(ON)) ** 2))
    assert error > 2 * error_on  # there is something to be uncertain about
    assert error < 2 * np.sqrt(prediction.epistemic_var.mean())


def test_rows_in_the_gap_close_it():
    x = np.concatenate([two_groups(0), np.random.default_rng(1).uniform(-1, 1, 40)])
    model = fitted(x, seed=0)
    assert mean_variances(model, GAP)[0] < 0.3 * LEAST_FACTOR * mean_variances(model, ON)[0]
