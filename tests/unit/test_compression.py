"""Columns with long tails: which they are, and what becomes of them."""

import json

import numpy as np
import pytest
import scipy.stats

from neurobayes.compression import Compression
from neurobayes.data import Scaling


def quantiles(distribution, n=400):
    """A column without chance: standardised quantiles of a distribution."""
    values = distribution.ppf((np.arange(n) + 0.5) / n)
    return ((values - values.mean()) / values.std()).astype(np.float32)


LONG = {"lognormal": scipy.stats.lognorm(1.0), "exponential": scipy.stats.expon(), "t": scipy.stats.t(2.5)}
SHORT = {"normal": scipy.stats.norm(), "uniform": scipy.stats.uniform(), "beta": scipy.stats.beta(2, 5)}


@pytest.mark.parametrize("name", LONG)
def test_long_tails_are_found_and_shortened(name):
    column = quantiles(LONG[name])
    found = Compression.fit(np.stack([column, -column, quantiles(SHORT["normal"])], 1))
    assert found is not None
    np.testing.assert_array_equal(found.columns, [True, True, False])
    z = found.apply(np.stack([column, -column, column], 1))
    np.testing.assert_allclose(z[:, :2].mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(z[:, :2].std(axis=0), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(z[:, 2], column)  # to the last bit
    np.testing.assert_allclose(z[:, 1], -z[:, 0], atol=1e-5)  # tails on either side are treated alike
    assert scipy.stats.kurtosis(z[:, 0]) < scipy.stats.kurtosis(column) / 2
    assert np.all(np.diff(z[:, 0]) > 0)


@pytest.mark.parametrize("name", SHORT)
def test_short_tails_are_left_alone(name):
    assert Compression.fit(quantiles(SHORT[name])[:, None]) is None


@pytest.mark.parametrize("values", [np.zeros(100), np.eye(100)[0], np.array([3.0])], ids=["constant", "rare", "one"])
def test_columns_of_at_most_two_values_are_left_alone(values):
    assert Compression.fit(values[:, None]) is None


def test_a_column_that_varies_by_rounding_only_is_left_alone():
    column = np.ones(200)
    column[:6], column[6:9] = 1 + 2e-16, 1 - 1.2e-16
    assert len(np.unique(column)) > 2
    long = np.exp(quantiles(SHORT["normal"], 200).astype(float))
    scaling = Scaling.fit(np.stack([column, long], 1), None, standardize="compressed")
    np.testing.assert_array_equal(scaling.compression.columns, [False, True])
    np.testing.assert_allclose(scaling.inputs(np.array([[1.001, 1.0]]))[0, 0], 0.001, rtol=1e-3)


def test_distances_survive_far_away():
    """No value is cut off: what is twice as far stays further, by the logarithm of two."""
    found = Compression.fit(quantiles(LONG["lognormal"])[:, None])
    z = found.apply(np.array([[1e3], [2e3], [4e3], [1e30], [2e30]]))[:, 0]
    np.testing.assert_allclose(np.diff(z)[[0, 1, 3]], np.log(2) / found.std[0], rtol=1e-3)


def test_the_middle_is_hardly_bent():
    column = quantiles(LONG["t"])
    z = Compression.fit(column[:, None]).apply(column[:, None])[:, 0]
    middle = np.abs(column) < 0.2
    assert np.corrcoef(column[middle], z[middle])[0, 1] > 0.999


class TestScaling:
    X = np.stack([np.exp(quantiles(SHORT["normal"])), quantiles(SHORT["uniform"])], 1) * 1e-6 + 5.0

    def test_asked_for(self):
        scaling = Scaling.fit(self.X, None, standardize="compressed")
        np.testing.assert_array_equal(scaling.compression.columns, [True, False])
        plain = Scaling.fit(self.X, None)
        np.testing.assert_array_equal(scaling.inputs(self.X)[:, 1], plain.inputs(self.X)[:, 1])
        np.testing.assert_allclose(scaling.inputs(self.X).std(axis=0), 1.0, rtol=1e-5)

    def test_at_once_or_later_is_the_same_to_the_last_bit(self):
        plain = Scaling.fit(self.X, None)
        later = plain.compressed(plain.inputs(self.X))
        assert later == Scaling.fit(self.X, None, standardize="compressed") != plain
        np.testing.assert_array_equal(later.inputs(self.X), later.compression.apply(plain.inputs(self.X)))

    def test_nothing_to_compress(self):
        plain = Scaling.fit(self.X[:, 1:], None)
        assert plain.compressed(plain.inputs(self.X[:, 1:])) is plain
        images = np.exp(3 * np.random.default_rng(0).normal(size=(20, 4, 4, 1)))
        assert Scaling.fit(images, None, standardize="compressed").compression is None
        tokens = np.array([[0, 0, 0, 90]] * 3)
        assert Scaling.fit(tokens, None, tokens=True, standardize="compressed").compression is None

    def test_as_json(self):
        scaling = Scaling.fit(self.X, None, standardize="compressed")
        kept = json.loads(json.dumps(scaling.to_dict()))
        assert kept == scaling.to_dict()
        restored = Compression(**{name: np.array(values) for name, values in kept.pop("compression").items()})
        np.testing.assert_array_equal(Scaling(**kept, compression=restored).inputs(self.X), scaling.inputs(self.X))
