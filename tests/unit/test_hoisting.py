"""Hoisting: the split function is the function, whatever the network is made of, and little of it is left."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import selectors, trees
from neurobayes.hoisting import Hoisted, hoist_network
from neurobayes.models.base import network_info
from neurobayes.networks import as_network
from neurobayes.partition import Partition

THETA = np.linspace(-1.0, 1.0, 6, dtype=np.float32)
W = np.linspace(-0.5, 0.8, 12, dtype=np.float32).reshape(3, 4)
X = np.linspace(-2.0, 1.5, 15, dtype=np.float32).reshape(5, 3)
TABLE = np.cos(np.arange(20, dtype=np.float32)).reshape(5, 4)


def assert_split_is_exact(fn, theta, frozen, rtol=2e-6):
    """``late(theta, early(frozen))`` and its gradient are those of ``fn``, also for values it was not traced with."""
    hoisted = Hoisted(fn, theta, frozen)
    for scale in (1.0, -0.7):
        now = jax.tree.map(lambda leaf, s=scale: leaf * leaf.dtype.type(s) if leaf.dtype.kind == "f" else leaf, frozen)
        at = np.asarray(theta) * np.float32(scale) + np.float32(0.1)
        carry = hoisted.early(*now)

        def plain(t, now=now):
            return fn(t, *now)

        def split(t, carry=carry):
            return hoisted.late(t, carry)

        for mine, expected in zip(
            jax.tree.leaves(jax.jit(split)(at)), jax.tree.leaves(jax.jit(plain)(at)), strict=True
        ):
            np.testing.assert_allclose(mine, expected, rtol=rtol, atol=rtol)
        gradients = [jax.jit(jax.grad(lambda t, f=f: _loss(f(t))))(at) for f in (split, plain)]
        size = 1e-3 + np.abs(gradients[1]).max(initial=0.0)
        np.testing.assert_allclose(gradients[0] / size, gradients[1] / size, atol=5 * rtol)
    assert jax.tree.structure(jax.eval_shape(split, at)) == jax.tree.structure(jax.eval_shape(plain, at))
    return hoisted


def _loss(outputs):
    return sum(jnp.sum(jnp.sin(jnp.asarray(leaf, jnp.float32))) for leaf in jax.tree.leaves(outputs))


def features(w, x):
    return jnp.tanh(jnp.tanh(x @ w) @ w.T) @ w


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1.0, 1.0)


@clipped.defjvp
def _clipped_jvp(primals, tangents):
    return clipped(*primals), 0.5 * tangents[0]  # not the true derivative, so that losing the rule is seen


@jax.custom_vjp
def squashed(x):
    return jnp.tanh(x)


squashed.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (3.0 * g,))


def author_jitted(theta, w, x):
    @jax.jit
    def network(theta, w, x):
        return jax.jit(features)(w, x) @ theta[:4] + theta[4]

    return network(theta, w, x)


def jitted_with_a_captured_table(theta, w, x):
    return jax.jit(lambda t, w, x: (features(w, x) + TABLE) @ t[:4])(theta, w, x)


def jitted_twice_with_captured_tables(theta, w, x):
    @jax.jit
    def layer(h, w):
        return jnp.tanh(h @ w) * TABLE + jax.jit(lambda h: h.sum() * TABLE)(h)

    return layer(layer(x, w)[:, :3], w) @ theta[:4]


def rematerialised(theta, w, x):
    return jax.checkpoint(lambda t, w, x: features(w, x) @ t[:4])(theta, w, x)


def remat_of_jit_of_remat(theta, w, x):
    inner = jax.checkpoint(lambda t, w, x: features(w, x) @ t[:4] + TABLE[:, 0])
    return jax.checkpoint(jax.jit(inner))(theta, w, x)


def custom_derivatives(theta, w, x):
    return squashed(clipped(clipped(squashed(x @ w)) @ theta[:4]) * theta[5])


def scanned_features(theta, w, x):
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w @ w.T), None), x, None, length=3)
    return h @ theta[:3]


def scanned_with_theta(theta, w, x):
    h, sums = jax.lax.scan(lambda h, t: (jnp.tanh(h @ w @ w.T) * t, h.sum()), x, theta)
    return h, sums


def branches(theta, w, x):
    chosen = jax.lax.cond(x[0, 0] > 0, lambda t: t[:3] * 2, lambda t: t[3:], theta)
    return x @ jnp.where(chosen > 0, chosen, 0.1 * chosen) + features(w, x).sum()


def called_twice_with_shared_layers(theta, w, x):
    layer = jax.jit(lambda h, w: jnp.tanh(h @ w))
    return layer(layer(x, w)[:, :3], w) @ theta[:4] + layer(x * theta[0], w)[:, 0]


def independent_of_theta(theta, w, x):
    return features(w, x)


def outputs_that_are_inputs(theta, w, x):
    return {"theta": theta, "x": x, "both": (w, x @ w * theta[0]), "constant": jnp.float32(2.0)}


def jitted_outputs_that_are_inputs(theta, w, x):
    a, b, c = jax.jit(lambda theta, w, x: (x, theta, 3.0))(theta, w, x)
    return a, b, c * b


def unused_results(theta, w, x):
    _, q = jnp.linalg.qr(x), jnp.sin(theta)
    q, _ = jnp.frexp(x @ w)
    return q @ theta[:4]


def with_effects(theta, w, x):
    jax.debug.callback(lambda total: None, x.sum())
    return features(w, x) @ theta[:4]


FUNCTIONS = [
    author_jitted, jitted_with_a_captured_table, jitted_twice_with_captured_tables, rematerialised,
    remat_of_jit_of_remat, custom_derivatives, scanned_features, scanned_with_theta, branches,
    called_twice_with_shared_layers, independent_of_theta, outputs_that_are_inputs, jitted_outputs_that_are_inputs,
    unused_results, with_effects,
]  # fmt: skip


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_split_function_is_the_function(fn):
    assert_split_is_exact(fn, THETA, (W, X))


@pytest.mark.parametrize(
    ("fn", "most"),
    [
        (author_jitted, 5), (jitted_with_a_captured_table, 3), (jitted_twice_with_captured_tables, 3),
        (rematerialised, 3), (remat_of_jit_of_remat, 4), (scanned_features, 3), (independent_of_theta, 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_only_what_needs_theta_is_left(fn, most):
    hoisted = Hoisted(fn, THETA, (W, X))
    assert hoisted.num_late_equations <= most


def test_carry_is_what_late_needs_and_no_more():
    hoisted = Hoisted(author_jitted, THETA, (W, X))
    carry = hoisted.early(W, X)
    assert [leaf.shape for leaf in carry] == [(5, 4)]
    assert hoisted.carry_bytes == 5 * 4 * 4
    np.testing.assert_allclose(carry[0], jax.jit(features)(W, X), rtol=1e-6)


def test_split_function_works_under_vmap_and_in_a_larger_program():
    hoisted = Hoisted(author_jitted, THETA, (W, X))
    many = np.stack([THETA, 2 * THETA, -THETA])
    carry = hoisted.early(W, X)
    got = jax.jit(lambda many, carry: jax.vmap(lambda t: hoisted.late(t, carry))(many))(many, carry)
    np.testing.assert_allclose(got, [author_jitted(t, W, X) for t in many], rtol=1e-5, atol=1e-6)


def test_the_function_is_traced_once_for_all_values():
    calls = []

    def fn(theta, w, x):
        calls.append(1)
        return features(w, x) @ theta[:4]

    hoisted = Hoisted(fn, THETA, (W, X))
    for scale in (1, 2, 3):
        hoisted.late(THETA, hoisted.early(scale * W, X))
    assert len(calls) == 1


# --- networks

TOKENS = np.array([[3, 7, 1, 2], [5, 2, 0, 0], [9, 9, 4, 0]], np.int32)


def _inputs(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


NETWORKS = {
    "mlp": (nb.FlaxMLP([6, 5], 2), _inputs(7, 3)),
    "silu": (nb.FlaxMLP([6, 5], 1, activation="silu"), _inputs(7, 3)),
    "relu": (nb.FlaxMLP([6], 1, activation="relu"), _inputs(7, 3)),
    "conv1d": (nb.FlaxConvNet(1, [3, 2], [4], 2), _inputs(4, 9, 2)),
    "conv2d": (nb.FlaxConvNet(2, [3], [4], 2, pool="avg"), _inputs(3, 5, 6)),
    "conv3d": (nb.FlaxConvNet(3, [2], [3], 1), _inputs(2, 3, 4, 5, 1)),
    "transformer": (nb.FlaxTransformer(12, 6, 2, d_model=8, num_heads=2, num_layers=1, mlp_dim=8, pad_token=0), TOKENS),
}
CHOICES = {
    "last": selectors.last(1),
    "last two": selectors.last(2),
    "biases": selectors.biases(),
    "scattered": selectors.random_subset(9, seed=3),
    "everything": selectors.everything(),
}


@functools.cache
def made(name):
    network, x = as_network(NETWORKS[name][0]), NETWORKS[name][1]
    params, state = jax.jit(network.init)(jax.random.key(1), x)
    params, state = jax.tree.map(np.asarray, (params, state))
    return network, params, state, x, network_info(network, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))


def assert_network_is_split(network, partition, params, state, x, rtol=5e-6):
    hoisted = hoist_network(network, partition, params, state, x)
    carry = hoisted.early(partition, params, state, x)
    theta = np.asarray(partition.split(params)) + np.float32(0.05)

    @jax.jit
    def plain(theta):
        outputs = network.apply(partition.merge(theta, params), state, x)
        return jnp.sum(jnp.sin(outputs)), outputs

    @jax.jit
    def split(theta, carry):
        outputs = hoisted.late(theta, carry)
        return jnp.sum(jnp.sin(outputs)), outputs

    gradient, outputs = jax.grad(split, has_aux=True)(theta, carry)
    expected_gradient, expected = jax.grad(plain, has_aux=True)(theta)
    np.testing.assert_allclose(outputs, expected, rtol=rtol, atol=rtol)
    size = 1e-3 + np.abs(expected_gradient).max(initial=0.0)
    np.testing.assert_allclose(gradient / size, expected_gradient / size, atol=5 * rtol)
    return hoisted


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_networks_are_split_exactly_for_every_choice(name, choice):
    network, params, state, x, info = made(name)
    assert_network_is_split(network, selectors.resolve(CHOICES[choice], info), params, state, x)


@pytest.mark.parametrize("choice", ["last", "scattered"])
@pytest.mark.parametrize("name", ["silu", "relu", "conv1d", "conv2d", "conv3d"])
def test_architectures_are_split_exactly(name, choice):
    network, params, state, x, info = made(name)
    assert_network_is_split(network, selectors.resolve(CHOICES[choice], info), params, state, x)


def test_norms_of_a_transformer_are_split_exactly():
    network, params, state, x, info = made("transformer")
    assert_network_is_split(network, selectors.resolve(selectors.norms(), info), params, state, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_last_layer_leaves_a_matrix_product(name):
    network, params, state, x, info = made(name)
    hoisted = hoist_network(network, selectors.resolve(selectors.last(1), info), params, state, x)
    everything = hoist_network(network, selectors.resolve(selectors.everything(), info), params, state, x)
    assert hoisted.num_late_equations <= 6  # theta cut into bias and kernel, the kernel's shape; product, sum
    assert hoisted.num_late_equations < everything.num_late_equations


class Jitted(nn.Module):
    """An author's module whose parts are jitted and rematerialised."""

    @nn.compact
    def __call__(self, x):
        h = nn.jit(nn.Dense)(6, name="Dense0")(x)
        h = nn.remat(nn.Dense)(5, name="Dense1")(jnp.tanh(h))
        return nn.jit(nn.Dense)(1, name="Dense2")(jax.jit(jnp.tanh)(h) + np.arange(5.0, dtype=np.float32))


class Whole(nn.Module):
    """A network behind one jit, as ``jax.jit(model.apply)`` makes it."""

    @nn.compact
    def __call__(self, x):
        return nn.jit(Jitted)(name="inner")(x)


@pytest.mark.parametrize("module", [Jitted(), Whole()], ids=["parts", "whole"])
def test_a_network_its_author_jitted_is_hoisted_too(module):
    network, x = as_network(module), _inputs(7, 3)
    params, state = network.init(jax.random.key(0), x)
    info = network_info(network, jax.ShapeDtypeStruct((1, 3), np.float32))
    partition = selectors.resolve(selectors.last(1), info)
    hoisted = assert_network_is_split(network, partition, params, state, x)
    assert hoisted.num_late_equations <= 6


def test_a_jitted_function_is_hoisted_as_the_plain_one():
    params = {"w1": _inputs(3, 4), "w2": _inputs(4, 1)}

    def apply(params, x):
        return jnp.tanh(x @ params["w1"] + TABLE[0]) @ params["w2"]

    partition = Partition.from_masks({"w2": np.ones((4, 1), bool)}, trees.shapes(params))
    counts = []
    for fn in (apply, jax.jit(apply)):
        network = as_network((fn, params))
        counts.append(assert_network_is_split(network, partition, params, {}, _inputs(5, 3)).num_late_equations)
    assert counts[0] == counts[1] <= 3


def test_nothing_selected_leaves_nothing_late():
    network, params, state, x, info = made("mlp")
    partition = Partition.nothing(info.shapes)
    hoisted = hoist_network(network, partition, params, state, x)
    assert hoisted.num_late_equations == 0
    outputs = hoisted.late(np.zeros(0, np.float32), hoisted.early(partition, params, state, x))
    np.testing.assert_allclose(outputs, jax.jit(network.apply)(params, state, x), rtol=1e-6)


def test_split_networks_are_cached_by_network_structure_and_shapes():
    network, params, state, x, info = made("mlp")
    last = selectors.resolve(selectors.last(1), info)
    first = hoist_network(network, last, params, state, x)
    again = as_network(nb.FlaxMLP([6, 5], 2))  # an equal network, other weights, other rows
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    assert hoist_network(again, selectors.resolve(selectors.last(1), info), other, state, x * 2) is first
    assert hoist_network(network, last, params, state, x[:5]) is not first
    assert hoist_network(network, selectors.resolve(selectors.last(2), info), params, state, x) is not first


def test_other_scalars_of_the_same_leaves_reuse_the_split():
    network, params, state, x, info = made("mlp")
    one, two = (Partition.from_masks({"Dense1.kernel": np.eye(6, 5, k=k, dtype=bool)}, info.shapes) for k in (0, -1))
    assert hoist_network(network, one, params, state, x) is hoist_network(network, two, params, state, x)
    for partition in (one, two):
        assert_network_is_split(network, partition, params, state, x)
