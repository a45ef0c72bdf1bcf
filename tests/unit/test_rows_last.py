"""Functions computed with the rows as the last axis give what they give with the rows first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import trees
from neurobayes.hoisting import Hoisted, hoist_network
from neurobayes.networks import as_network
from neurobayes.partition import Partition
from neurobayes.rows_last import with_rows_last

ROWS, WIDTH = 10, 6
RNG = np.random.default_rng(0)
FROZEN = {"a": RNG.normal(size=(WIDTH, 4)).astype(np.float32), "b": RNG.normal(size=4).astype(np.float32)}
THETA = RNG.normal(size=20).astype(np.float32)
X = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)


def dense(theta, frozen, x):
    return jnp.tanh(x @ frozen["a"]) @ theta[:8].reshape(4, 2) + theta[8:10]


def normalised(theta, frozen, x):
    h = x @ frozen["a"] + theta[:4]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)
    return jax.nn.gelu(h * frozen["b"]) @ theta[4:12].reshape(4, 2)


def branches(theta, frozen, x):
    left = jax.nn.relu(x @ frozen["a"] * theta[:4])
    right = jnp.where(left > 0.5, jnp.exp(-left), jax.nn.silu(left) ** 3)
    both = jnp.concatenate([left, right, jnp.ones((len(x), 1))], axis=1)
    return both @ theta[:18].reshape(9, 2)


def columns_first(theta, frozen, x):
    """Rows on the last axis from the start, and once on the middle one."""
    h = jnp.tanh(theta[:8].reshape(2, 4) @ (x @ frozen["a"]).T)
    middle = jnp.stack([h.T[None], h.T[None] ** 2], axis=-1).sum(0)
    return jnp.max(middle.reshape(len(x), 4), axis=1, keepdims=True)


def scalar_output(theta, frozen, x):
    return jnp.squeeze(x @ theta[:WIDTH, None], 1)[:, None]


def softmax(outputs):
    return jax.nn.log_softmax(outputs, axis=-1)


def second_half(outputs):
    half = outputs.shape[-1] // 2
    return jnp.concatenate([outputs[..., :half], jnp.exp(outputs[..., half:].clip(-1.0, 1.0))], axis=-1)


def every_other(outputs):
    return outputs[:, ::2]


def identity(outputs):
    return outputs


def evaluated(fn, quantity, rows=ROWS):
    """The value with the rows last, and whether it was computed so all the way."""
    split = Hoisted(fn, jax.ShapeDtypeStruct(THETA.shape, np.float32), (FROZEN, X[:rows]))
    late = with_rows_last(split, split.resized(rows + 3), quantity, len(THETA))
    carry = split.early(FROZEN, X[:rows])
    value = jax.jit(lambda theta, carry: late.function(theta, late.arrange(carry)))(THETA, carry)
    assert value.shape == late.shape
    return np.asarray(value), late.rewritten


@pytest.mark.parametrize("quantity", [identity, softmax, second_half, every_other])
@pytest.mark.parametrize("fn", [dense, normalised, branches, scalar_output])
def test_known_equations_are_rewritten(fn, quantity):
    value, rewritten = evaluated(fn, quantity)
    assert rewritten
    np.testing.assert_allclose(value, quantity(fn(THETA, FROZEN, X)).T, rtol=2e-5, atol=2e-6)


def test_as_many_rows_as_features_are_told_apart():
    value, rewritten = evaluated(dense, identity, rows=4)
    assert rewritten
    np.testing.assert_allclose(value, dense(THETA, FROZEN, X[:4]).T, rtol=2e-5, atol=2e-6)


def test_what_is_not_known_is_left_as_it_is():
    def sorted_features(theta, frozen, x):
        return jnp.sort(x * theta[:WIDTH], axis=1)

    def cumulative(theta, frozen, x):
        return jnp.cumsum(x, axis=1) * theta[:WIDTH] @ jnp.cumsum(theta[:12]).reshape(WIDTH, 2)

    def over_rows(theta, frozen, x):
        return x * theta[:WIDTH] - jnp.mean(x * theta[:WIDTH], axis=0)

    for fn, expected in ((sorted_features, False), (cumulative, True), (over_rows, False), (columns_first, False)):
        value, rewritten = evaluated(fn, identity)
        assert rewritten is expected, fn
        np.testing.assert_allclose(value, fn(THETA, FROZEN, X).T, rtol=2e-5, atol=2e-6)


def network_case(module, x, masked=None):
    network = as_network(module)
    params, state = jax.jit(network.init)(jax.random.key(0), x[:1])
    shapes = trees.shapes(params)
    rng = np.random.default_rng(1)
    masks = {path: rng.random(shape) < 0.5 for path, shape in shapes.items() if masked is None or path in masked}
    partition = Partition.from_masks(masks, shapes)
    split = hoist_network(network, partition, params, state, x)
    late = with_rows_last(split, split.resized(2 * len(x)), softmax, partition.size)
    theta = np.asarray(partition.split(params)) + 0.1
    carry = split.early(partition, params, state, x)
    value = jax.jit(lambda theta, carry: late.function(theta, late.arrange(carry)))(theta, carry)
    expected = softmax(network.apply(partition.merge(theta, params), state, x))
    np.testing.assert_allclose(value, np.asarray(expected).T, rtol=5e-5, atol=5e-6)
    return late.rewritten


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu"])
def test_partly_random_dense_networks_are_rewritten(activation):
    assert network_case(nb.FlaxMLP([5, 4], 3, activation=activation), X)


def test_dense_head_of_a_convolution_is_rewritten_and_the_convolution_is_not():
    module = nb.FlaxConvNet(input_dim=2, conv_layers=[2], fc_layers=[4], target_dim=3)
    images = RNG.normal(size=(5, 6, 4, 1)).astype(np.float32)
    assert network_case(module, images, {"Dense0.kernel", "Dense1.kernel", "Dense1.bias"})
    assert not network_case(module, images, {"Conv0.kernel", "Dense1.bias"})


@pytest.mark.slow
def test_head_of_a_transformer_is_rewritten_and_its_attention_is_right():
    module = nb.FlaxTransformer(vocab_size=5, max_length=4, target_dim=2, d_model=4, num_heads=2, num_layers=1)
    tokens = RNG.integers(0, 5, (6, 4)).astype(np.int32)
    assert network_case(module, tokens, {"FinalDense1.kernel", "FinalDense2.kernel"})
    network_case(module, tokens)
