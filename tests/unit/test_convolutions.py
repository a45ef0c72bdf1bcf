"""Convolutions with their axes moved: the same values and gradients, wherever they are, and in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import neurobayes as nb
from neurobayes.convolutions import convolves, has_convolution, with_ordered_convolutions
from neurobayes.networks import as_network

LAYOUTS = {
    "1d": ((3, 9, 2), (3, 2, 4), ("NWC", "WIO", "NWC"), {}),
    "rows first, channels last": ((3, 7, 6, 2), (3, 3, 2, 4), ("NHWC", "HWIO", "NHWC"), {}),
    "channels first": ((3, 2, 7, 6), (4, 2, 3, 3), ("NCHW", "OIHW", "NCHW"), {}),
    "mixed": ((2, 3, 7, 6), (4, 2, 3, 3), ("CNHW", "OIHW", "NHWC"), {}),
    "strides": ((3, 7, 6, 2), (3, 3, 2, 4), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 1)}),
    "dilated kernel": ((3, 9, 8, 2), (3, 3, 2, 4), ("NHWC", "HWIO", "NHWC"), {"rhs_dilation": (2, 1)}),
    "dilated input": ((3, 5, 4, 2), (3, 3, 2, 4), ("NHWC", "HWIO", "NHWC"), {"lhs_dilation": (2, 2)}),
    "groups": ((3, 7, 6, 4), (3, 3, 2, 6), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}),
    "3d": ((2, 5, 4, 6, 2), (2, 2, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {}),
}


def convolution(layout):
    shape, kernel_shape, numbers, more = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, kernel_shape))
    options = {
        "window_strides": (1,) * (len(shape) - 2),
        "padding": "SAME" if "lhs_dilation" not in more else [(1, 2)] * 2,
    }
    return x, kernel, lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=numbers, **(options | more))


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_stay_the_same(layout):
    x, kernel, apply = convolution(layout)
    function = jax.value_and_grad(lambda x, k: jnp.sum(jnp.tanh(apply(x, k))), argnums=(0, 1))
    assert_same(with_ordered_convolutions(function)(x, kernel), function(x, kernel))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_convolution_has_rows_first_and_channels_last(layout):
    x, kernel, apply = convolution(layout)
    function = jax.grad(lambda x, k: jnp.sum(jnp.tanh(apply(x, k))), argnums=(0, 1))
    found = convolutions_of(jax.make_jaxpr(with_ordered_convolutions(function))(x, kernel).jaxpr)
    assert len(found) >= 2
    last = x.ndim - 1
    for numbers in found:
        assert numbers.lhs_spec == numbers.out_spec == (0, last, *range(1, last))
        assert numbers.rhs_spec == (last, last - 1, *range(last - 1))


def convolutions_of(jaxpr):
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            found.append(eqn.params["dimension_numbers"])
        for value in eqn.params.values():
            for each in value if isinstance(value, tuple) else (value,):
                inner = getattr(each, "jaxpr", each)
                found += convolutions_of(inner) if hasattr(inner, "eqns") else []
    return found


WITHIN = {
    "jit": lambda apply: jax.jit(apply),
    "scan": lambda apply: lambda x, k: lax.scan(lambda c, row: (c, apply(row[None], k)[0]), 0.0, x)[1],
    "map": lambda apply: lambda x, k: lax.map(lambda row: apply(row[None], k)[0], x),
    "cond": lambda apply: lambda x, k: lax.cond(k.sum() > -1e6, apply, lambda x, k: 0.0 * apply(x, k), x, k),
    "checkpoint": lambda apply: jax.checkpoint(apply),
    "custom_jvp": lambda apply: lambda x, k: nb_square(apply(x, k)),
}


@jax.custom_jvp
def nb_square(x):
    return x * x


nb_square.defjvp(lambda primals, tangents: (nb_square(*primals), 2 * primals[0] * tangents[0]))


@pytest.mark.parametrize("place", WITHIN)
def test_within_other_equations_too(place):
    x, kernel, apply = convolution("channels first")
    inner = WITHIN[place](apply)
    function = jax.value_and_grad(lambda x, k: jnp.sum(jnp.tanh(inner(x, k))), argnums=(0, 1))
    found = with_ordered_convolutions(function)
    assert_same(jax.jit(found)(x, kernel), function(x, kernel))
    assert all(n.lhs_spec == (0, 3, 1, 2) for n in convolutions_of(jax.make_jaxpr(found)(x, kernel).jaxpr))


def test_forwards_within_a_while_loop():
    x, kernel, apply = convolution("channels first")

    def function(x, k):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + apply(x, k)), (0, 0 * apply(x, k)))

    assert_same(with_ordered_convolutions(function)(x, kernel), function(x, kernel))


def test_a_function_without_any_is_left_alone(monkeypatch):
    x, kernel, apply = convolution("1d")
    found = jax.make_jaxpr(with_ordered_convolutions(lambda x: {"a": jnp.sin(x)}))(x)
    assert str(found) == str(jax.make_jaxpr(lambda x: {"a": jnp.sin(x)})(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    channels_first, kernel, apply = convolution("channels first")
    (numbers,) = convolutions_of(jax.make_jaxpr(with_ordered_convolutions(apply))(channels_first, kernel).jaxpr)
    assert numbers.lhs_spec == (0, 1, 2, 3)


def test_networks_that_convolve():
    assert convolves(as_network(nb.FlaxConvNet(2, target_dim=1, conv_layers=[4], fc_layers=[8])), (8, 8, 1), np.float32)
    assert not convolves(as_network(nb.FlaxMLP([4], 1)), (3,), np.float32)
    assert not has_convolution(jax.make_jaxpr(jnp.sin)(1.0).jaxpr)
