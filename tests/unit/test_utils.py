"""Scores with the prediction first: same numbers as sklearn and as ``metrics``, and no broadcasting."""

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, mean_squared_error, root_mean_squared_error

from neurobayes import metrics, utils
from neurobayes.errors import DataError


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    return rng.normal(size=30), rng.normal(size=30), rng.uniform(0.5, 2.0, size=30)


def test_point_errors_match_sklearn(predictions):
    y_true, y_pred, _ = predictions
    assert utils.mse(y_pred, y_true) == pytest.approx(mean_squared_error(y_true, y_pred))
    assert utils.rmse(y_pred, y_true) == pytest.approx(root_mean_squared_error(y_true, y_pred))
    assert utils.mae(y_pred, y_true) == pytest.approx(mean_absolute_error(y_true, y_pred))


def test_nlpd_takes_mean_variance_target_in_this_order(predictions):
    y_true, mean, var = predictions
    assert utils.nlpd(mean, var, y_true) == metrics.nlpd(y_true, mean, var)
    assert utils.nlpd(np.zeros(2), np.ones(2), np.full(2, 2.0)) == pytest.approx(0.5 * np.log(2 * np.pi) + 2.0)


@pytest.mark.parametrize("score", [utils.mse, utils.rmse, utils.mae])
def test_a_column_against_a_vector_raises(score):
    with pytest.raises(DataError, match=r"y_pred has shape \(3, 1\) but y_true has shape \(3,\).*reshape\(\(3,\)\)"):
        score(np.zeros((3, 1)), np.zeros(3))


def test_nlpd_of_a_column_against_a_vector_raises():
    with pytest.raises(DataError, match="nothing is broadcast"):
        utils.nlpd(np.zeros(3), np.ones((3, 1)), np.zeros(3))
