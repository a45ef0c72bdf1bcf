"""Which functions are known to be affine, and that the map read off them is theirs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import linearity, selectors
from neurobayes.hoisting import Hoisted, hoist_network
from neurobayes.models.base import network_info
from neurobayes.networks import as_network
from neurobayes.row_blocks import hoist_rows

THETA = np.linspace(-1.0, 1.0, 6, dtype=np.float32)
W = np.linspace(-0.5, 0.8, 18, dtype=np.float32).reshape(3, 6)
TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4) % 7


def is_affine(fn, theta=THETA):
    return linearity.is_affine(jax.make_jaxpr(fn)(theta).jaxpr, [True])


AFFINE = {
    "constant": lambda t: jnp.ones(3),
    "matrix product": lambda t: W @ t + 1.0,
    "product from the left": lambda t: t.reshape(2, 3) @ W,
    "two uses of one weight": lambda t: W @ t + jnp.tanh(W) @ t - t.sum(),
    "slices and stacks": lambda t: jnp.stack(jnp.split(t, 3))[::-1].T.ravel() / 3.0,
    "gather and scatter": lambda t: jnp.zeros(9).at[jnp.array([1, 3, 5])].set(t[jnp.array([0, 5, 2])]),
    "scatter-add": lambda t: jnp.zeros(4).at[jnp.array([1, 1])].add(t[:2]),
    "selection by a constant": lambda t: jnp.where(jnp.asarray(W[0]) > 0, t, 2.0 * t),
    "mean and padding": lambda t: jnp.pad(t - t.mean(), 2).cumsum(),
    "concatenation with a constant": lambda t: jnp.concatenate([t, jnp.ones(2)]),
    "convolution": lambda t: jax.lax.conv(jnp.ones((1, 1, 8)), t.reshape(1, 1, 6), (1,), "SAME"),
    "the author's own jit": lambda t: jax.jit(lambda s: jax.jit(jnp.negative)(s) * 2.0)(t),
    "rematerialisation": lambda t: jax.checkpoint(lambda s: W @ s)(t),
    "scan over rows": lambda t: jax.lax.map(lambda row: row @ t, jnp.asarray(W)),
    "scan with a carried sum": lambda t: jax.lax.scan(lambda s, row: (0.5 * s + row * t, s), t, jnp.asarray(W))[1],
    "tanh of another quantity": lambda t: jnp.tanh(jnp.asarray(W)) @ t,
    "what is nonlinear but unused": lambda t: (W @ t, jnp.tanh(t))[0],
}

NOT_KNOWN = {
    "tanh": lambda t: jnp.tanh(W @ t),
    "relu": lambda t: jax.nn.relu(W @ t),
    "square": lambda t: t**2,
    "product with itself": lambda t: t * t,
    "quadratic form": lambda t: t @ t,
    "a divisor": lambda t: 1.0 / t,
    "an index": lambda t: jnp.asarray(W[0])[t.astype(int)],
    "a condition": lambda t: jnp.where(t > 0, t, 2.0 * t),
    "maximum": lambda t: jnp.maximum(t, 0.0),
    "sorting": lambda t: jnp.sort(t),
    "rounding to 16 bits": lambda t: t.astype(jnp.bfloat16).astype(jnp.float32),
    "stopped gradients": lambda t: jax.lax.stop_gradient(t),
    "scan that squares": lambda t: jax.lax.scan(lambda s, row: (s * t, s), jnp.ones(6), jnp.asarray(W))[1],
    "scan whose carry becomes a product": lambda t: jax.lax.scan(
        lambda s, row: ((s[1] * t[0], t[1]), s[0]), (jnp.float32(1), jnp.float32(1)), jnp.asarray(W)
    )[1],
    "a loop of unknown length": lambda t: jax.lax.while_loop(
        lambda s: s[1] < 3, lambda s: (s[0] + t, s[1] + 1), (t, 0)
    )[0],
    "nonlinear inside a jit": lambda t: jax.jit(jnp.exp)(t),
}


@jax.custom_jvp
def doubled(x):
    return 2.0 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 5.0 * tangents[0]))


@pytest.mark.parametrize("name", AFFINE)
def test_affine_functions_are_known(name):
    fn = AFFINE[name]
    assert is_affine(fn)
    half = fn(0.5 * THETA + 0.5 * np.cos(THETA))  # and they are affine
    np.testing.assert_allclose(half, 0.5 * fn(THETA) + 0.5 * fn(np.cos(THETA)), atol=1e-5)


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_others_are_not(name):
    assert not is_affine(NOT_KNOWN[name])


def test_derivative_rules_of_the_users_own_are_not_trusted():
    assert not is_affine(doubled)


def hoisted(network, choice, x):
    network = as_network(network)
    params, state = network.init(jax.random.key(0), x[:1])
    info = network_info(network, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), params)
    partition = selectors.resolve(choice, info)
    split = hoist_network(network, partition, params, state, x)
    return split, partition, split.early(partition, params, state, x), partition.split(params)


ROWS = np.cos(np.arange(24, dtype=np.float32)).reshape(8, 3)
IMAGES = np.cos(np.arange(5 * 8 * 8, dtype=np.float32)).reshape(5, 8, 8, 1)


def mlp(outputs=1):
    return nb.FlaxMLP([6, 4], outputs)


def convnet():
    return nb.FlaxConvNet((8, 8), conv_layers=[3], fc_layers=[4], target_dim=2)


def transformer():
    return nb.FlaxTransformer(vocab_size=7, max_length=4, target_dim=2, d_model=8, num_heads=2, num_layers=1, mlp_dim=8)


class SharedHead(nn.Module):
    """The same output layer reads two sets of features; ``squared`` puts a nonlinearity behind it."""

    squared: bool = False

    @nn.compact
    def __call__(self, x):
        head = nn.Dense(2)
        outputs = head(nn.tanh(nn.Dense(4)(x))) + 0.5 * head(nn.tanh(nn.Dense(4)(-x)))
        return outputs**2 if self.squared else outputs


LINEAR = {
    "output layer": (mlp, nb.last(1), ROWS),
    "output layer of a transformer": (transformer, nb.last(1), TOKENS),
    "biases of the output layer": (mlp, nb.last(1) & nb.biases(), ROWS),
    "kernel of the output layer": (mlp, nb.last(1) - nb.biases(), ROWS),
    "single output weights": (mlp, nb.weights({"Dense2": [(0, 0), (3, 0)]}), ROWS),
    "shared head": (SharedHead, nb.layers("Dense_0"), ROWS),
}

NONLINEAR = {
    "last two layers": (mlp, nb.last(2), ROWS),
    "hidden layer": (mlp, nb.layers("Dense0"), ROWS),
    "single hidden weight": (mlp, nb.weights({"Dense1": [(0, 0)]}), ROWS),
    "last two layers of a transformer": (transformer, nb.last(2), TOKENS),
    "square behind the head": (lambda: SharedHead(squared=True), nb.layers("Dense_0"), ROWS),
}


@pytest.mark.parametrize("name", LINEAR)
def test_random_weights_that_enter_linearly_are_detected_and_the_map_is_exact(name):
    make, choice, x = LINEAR[name]
    split, partition, carry, theta = hoisted(make(), choice, x)
    assert linearity.late_is_affine(split, partition.size, carry)
    scalars = linearity.separate(linearity.entering_scalars(split, theta, carry, np.ones(len(x), np.float32)))
    assert scalars is not None
    assert sorted(scalars[scalars < partition.size]) == list(range(partition.size))
    values, slopes = linearity.linearise(split, theta, carry, scalars)
    moved = np.asarray(theta) + np.sin(1 + np.arange(partition.size, dtype=np.float32))
    step = np.append(moved - theta, 0.0)[scalars]
    np.testing.assert_allclose(values + np.einsum("kno,ko->no", slopes, step), split.late(moved, carry), atol=1e-5)


@pytest.mark.parametrize("name", NONLINEAR)
def test_other_choices_are_not(name):
    make, choice, x = NONLINEAR[name]
    split, partition, carry, _ = hoisted(make(), choice, x)
    assert not linearity.late_is_affine(split, partition.size, carry)


def test_rows_that_are_recomputed_give_the_same_map():
    network = as_network(mlp())
    params, state = network.init(jax.random.key(0), ROWS[:1])
    partition = selectors.resolve(nb.last(1), network_info(network, jax.ShapeDtypeStruct((1, 3), np.float32), params))
    scalars = np.arange(partition.size, dtype=np.int32)[:, None]
    maps = []
    for budget in (None, 0):
        split, carry = hoist_rows(network, partition, params, state, ROWS, budget)
        assert linearity.late_is_affine(split, partition.size, carry)
        maps.append(linearity.linearise(split, partition.split(params), carry, scalars))
    assert not isinstance(split, Hoisted)
    for kept, recomputed in zip(*maps, strict=True):
        np.testing.assert_allclose(recomputed, kept, atol=1e-6)


def test_many_scalars_are_linearised_in_blocks():
    matrix = np.cos(np.arange(5 * 150, dtype=np.float32)).reshape(5, 150)
    split = Hoisted(lambda t, m: (m @ t)[:, None], np.zeros(150, np.float32), (matrix,))
    _, slopes = linearity.linearise(
        split, np.ones(150, np.float32), split.early(matrix), np.arange(150, dtype=np.int32)[:, None]
    )
    np.testing.assert_allclose(slopes[:, :, 0].T, matrix, rtol=1e-6)


def test_a_weight_that_moves_two_outputs_is_found():
    def shared(t, x):
        return jnp.stack([x @ t[:3], x @ t[3:] + t[0]], axis=1)

    split = Hoisted(shared, THETA, (ROWS,))
    entering = linearity.entering_scalars(split, THETA, split.early(ROWS), np.ones(8, np.float32))
    np.testing.assert_array_equal(entering, [[1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1]])
    assert linearity.separate(entering) is None


def test_weights_that_move_no_output_fill_the_slots_evenly():
    entering = np.array([[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(linearity.separate(entering), [[0, 1], [3, 2], [4, 5]])
    np.testing.assert_array_equal(linearity.separate(entering[:, [0, 1, 4]]), [[0, 1], [2, 3]])


def test_rows_of_weight_zero_do_not_count():
    x = np.zeros((3, 2), np.float32)
    x[2] = 1.0
    split = Hoisted(lambda t, x: (x @ t)[:, None], np.zeros(2, np.float32), (x,))
    weights = np.array([1, 1, 0], np.float32)
    assert not linearity.entering_scalars(split, np.zeros(2, np.float32), split.early(x), weights).any()
