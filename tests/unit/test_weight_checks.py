import types

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurobayes import _weight_checks
from neurobayes.errors import ParameterError


def weights(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "Dense0": {"kernel": rng.normal(size=(2, 3)).astype(dtype), "bias": np.zeros(3, dtype)},
        "Dense1": {"kernel": rng.normal(size=(3, 1)).astype(dtype), "bias": np.zeros(1, dtype)},
    }


TEMPLATE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), weights())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"params": w},
        lambda w: {"params": w, "batch_stats": {}},
        flax.core.freeze,
        types.MappingProxyType,
        lambda w: jax.tree.map(jnp.asarray, w),
        lambda w: {f"{layer}.{leaf}": array for layer, leaves in w.items() for leaf, array in leaves.items()},
        lambda w: dict(reversed(w.items())),
    ],
    ids=["bare", "wrapped", "empty-collection", "frozen", "mapping", "jax", "paths", "order"],
)
def test_weights_of_every_form_take_the_network_structure(wrap):
    params = _weight_checks.check_weights_structure(wrap(weights()), TEMPLATE)
    assert jax.tree.structure(params) == jax.tree.structure(TEMPLATE)
    for got, given in zip(jax.tree.leaves(params), jax.tree.leaves(weights()), strict=True):
        assert isinstance(got, jax.Array) and got.dtype == jnp.float32
        np.testing.assert_array_equal(got, given.astype(np.float32))


def test_lists_and_a_layer_called_params_are_structure_too():
    template = {"params": [jnp.zeros(2), (jnp.zeros(1),)]}
    params = _weight_checks.check_weights_structure({"params": [np.ones(2), (np.ones(1),)]}, template)
    assert jax.tree.structure(params) == jax.tree.structure(template)


def test_later_changes_to_given_weights_do_not_reach_the_model():
    given = weights(np.float32)
    params = _weight_checks.check_weights_structure(given, TEMPLATE)
    before = np.array(params["Dense0"]["kernel"])
    given["Dense0"]["kernel"][:] = 99
    np.testing.assert_array_equal(params["Dense0"]["kernel"], before)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (64, 65)])
def test_copied_weights_are_where_jax_uses_them_without_another_copy(shape):
    copy = _weight_checks._as_leaf(np.ones(shape))
    assert copy.shape == shape and copy.dtype == np.float32 and (copy == 1).all()
    assert not copy.size or jax.device_put(copy).unsafe_buffer_pointer() == copy.ctypes.data


def test_every_fault_of_weights_is_listed_at_once():
    given = weights()
    del given["Dense0"]["bias"]
    given["Dense2"] = {"bias": np.zeros(3)}
    given["Dense0"]["kernel"] = np.zeros((4, 3))
    given["Dense1"] = {"kernel": np.array([[np.nan], [1e39], [0]]), "bias": "zero"}
    with pytest.raises(ParameterError) as caught:
        _weight_checks.check_weights_structure(given, TEMPLATE)
    message = str(caught.value)
    assert "deterministic_weights do not fit" in message
    assert "missing: Dense0.bias, shape (3,)" in message
    assert "unexpected: Dense2.bias, shape (3,) (closest: 'Dense" in message
    assert "wrong shape: Dense0.kernel is (4, 3), the network has (2, 3)" in message
    assert "not finite in single precision: Dense1.kernel, 2 values" in message
    assert "not an array of real numbers: Dense1.bias, a str" in message


def test_running_statistics_are_not_dropped_in_silence():
    given = {"params": weights(), "batch_stats": {"mean": np.zeros(3)}}
    with pytest.raises(ParameterError, match=r"batch_stats.*deterministic_weights\['params'\]"):
        _weight_checks.check_weights_structure(given, TEMPLATE)


def test_a_model_is_no_weights():
    with pytest.raises(ParameterError, match=r"is a object\. .*get_params\(\)"):
        _weight_checks.check_weights_structure(object(), TEMPLATE)
