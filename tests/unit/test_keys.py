"""Derived keys are those of ``jax.random.split``."""

import jax
import numpy as np
import pytest

from neurobayes import _keys


def _words(keys):
    return np.stack([np.asarray(jax.random.key_data(key)) for key in keys])


@pytest.mark.parametrize("number", [1, 3, 16, 40, 300])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_children_are_those_of_split(number, impl):
    key = jax.random.key(5, impl=impl)
    found = _keys.children(key, number)
    assert len(found) == number and all(each.dtype == key.dtype and each.shape == () for each in found)
    if impl == "threefry2x32":
        np.testing.assert_array_equal(_words(found), _words(jax.random.split(key, number)))
    assert len(np.unique(_words(found), axis=0)) == number


def test_any_usual_number_has_one_program(caplog):
    key = jax.random.key(1)
    _keys.children(key, 2)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for number in (17, 66, 130):  # of all backbones of several prior scales
            _keys.children(key, number)
    assert [r.message for r in caplog.records if "Finished XLA compilation" in r.message] == []


def test_seeds_fit_a_generator_and_differ():
    seeds = {_keys.as_seed(key) for key in _keys.children(jax.random.key(0), 32)}
    assert len(seeds) == 32 and all(0 <= seed < 2**32 for seed in seeds)
