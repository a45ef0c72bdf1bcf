"""Hoisting on random choices of weights: the split network is the network, in value and gradient."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

import neurobayes as nb
from neurobayes import trees
from neurobayes.hoisting import Hoisted, hoist_network
from neurobayes.networks import as_network
from neurobayes.partition import Partition

ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
TOKENS = np.array([[3, 1, 2], [5, 2, 0]], np.int32)
NETWORKS = {
    "mlp": (nb.FlaxMLP([4, 3], 2), ROWS),
    "conv": (nb.FlaxConvNet(1, [2], [3], 1), ROWS),
    "transformer": (nb.FlaxTransformer(6, 3, 1, d_model=4, num_heads=2, num_layers=1, mlp_dim=4, pad_token=0), TOKENS),
}


@functools.cache
def made(name):
    network, x = as_network(NETWORKS[name][0]), NETWORKS[name][1]
    params, state = jax.jit(network.init)(jax.random.key(1), x)
    return network, *jax.tree.map(np.asarray, (params, state)), x


@st.composite
def networks_and_partitions(draw):
    """A network and a partition that takes none, some or all scalars of each leaf."""
    network, params, state, x = made(draw(st.sampled_from(sorted(NETWORKS))))
    shapes = trees.shapes(params)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    touched = draw(st.sets(st.sampled_from(sorted(shapes)), max_size=4))
    share = {path: draw(st.sampled_from([0.4, 1.0])) for path in sorted(touched)}
    masks = {path: generator.random(shapes[path]) < p for path, p in share.items()}
    return network, params, state, x, Partition.from_masks(masks, shapes)


@given(networks_and_partitions(), st.floats(-1.0, 1.0, width=32))
@settings(max_examples=10)
def test_split_network_is_the_network_for_random_choices(case, shift):
    network, params, state, x, partition = case
    hoisted = hoist_network(network, partition, params, state, x)
    carry = hoisted.early(partition, params, state, x)
    theta = np.asarray(partition.split(params)) + np.float32(shift)

    def both(theta):
        split = hoisted.late(theta, carry)
        plain = network.apply(partition.merge(theta, params), state, x)
        return split, plain, jnp.sin(split).sum(), jnp.sin(plain).sum()

    @jax.jit
    def evaluate(theta):
        split, plain, _, _ = both(theta)
        return split, plain, jax.grad(lambda t: both(t)[2])(theta), jax.grad(lambda t: both(t)[3])(theta)

    split, plain, gradient, expected = evaluate(theta)
    np.testing.assert_allclose(split, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * (1 + np.abs(expected).max(initial=0.0)))


# Programs of elementary steps, some behind a jit of their own, with theta entering where it likes.

STEPS = {
    "tanh": lambda a, b: jnp.tanh(a),
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "jitted": jax.jit(lambda a, b: jnp.tanh(a + 0.5 * b)),
    "twice jitted": jax.jit(lambda a, b: jax.jit(lambda a: a * np.arange(3, dtype=np.float32))(b) - a),
    "passed on": jax.jit(lambda a, b: b),
    "remat": jax.checkpoint(lambda a, b: jnp.sin(a) * b),
    "scan": lambda a, b: jax.lax.scan(lambda h, _: (jnp.tanh(h + b), None), a, None, length=2)[0],
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 9),
)
@settings(max_examples=20)
def test_split_program_is_the_program(steps, extra):
    def run(theta, x, w):
        values = [theta, x, w]
        for name, i, j in steps:
            values.append(STEPS[name](values[i % len(values)], values[j % len(values)]))
        return values[-1], values[extra % len(values)]

    theta, x, w = np.float32([0.3, -0.2, 0.9]), np.float32([1.0, 0.5, -0.4]), np.float32([-0.8, 0.1, 0.7])
    hoisted = Hoisted(run, theta, (w, x))  # traced with the values swapped: none of them may be kept
    carry = hoisted.early(x, w)

    def late(theta):
        return hoisted.late(theta, carry)

    for mine, expected in zip(jax.jit(late)(theta), jax.jit(run)(theta, x, w), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    jacobians = [jax.jit(jax.jacrev(lambda t, f=f: f(t)[0]))(theta) for f in (late, lambda t: run(t, x, w))]
    np.testing.assert_allclose(*jacobians, rtol=1e-4, atol=1e-5)
