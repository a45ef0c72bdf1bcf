"""Rows through the frozen part in blocks: same values, bounded memory, recomputed where its result would not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neurobayes as nb
from neurobayes import row_blocks, trees
from neurobayes.errors import MemoryBudgetWarning
from neurobayes.networks import as_network
from neurobayes.partition import Partition

NETWORKS = {
    "mlp": (nb.FlaxMLP([6, 4], 2), (5,), np.float32),
    "conv": (nb.FlaxConvNet(2, [3], [4], 1), (6, 5, 1), np.float32),
    "transformer": (nb.FlaxTransformer(7, 5, 1, d_model=8, num_heads=2, num_layers=1, mlp_dim=8), (5,), np.int32),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request):
    module, row_shape, dtype = NETWORKS[request.param]
    network = as_network(module)
    x = np.random.default_rng(0).integers(0, 7, (37, *row_shape)).astype(dtype)
    params, state = network.init(jax.random.key(0), x[:1])
    shapes = trees.shapes(params)
    last_two = [layer.name for layer in network.layers(x[:1])][-2:]
    masks = {path: np.full(shape, trees.parent(path) in last_two) for path, shape in shapes.items()}
    partition = Partition.from_masks(masks, shapes)
    return network, partition, params, state, x


def value_and_gradient(function, theta):
    return jax.value_and_grad(lambda t: jnp.sum(jnp.sin(function(t))))(theta)


@pytest.mark.parametrize("way", ["kept", "in blocks", "recomputed"])
def test_every_way_gives_the_plain_function_and_gradient(case, way, monkeypatch):
    network, partition, params, state, x = case
    if way != "kept":
        monkeypatch.setattr(row_blocks, "rows_per_block", lambda *arguments: 16)
    budget = 0 if way == "recomputed" else None
    hoisted, carry = row_blocks.hoist_rows(network, partition, params, state, x, budget)
    assert hoisted.recomputes == (way == "recomputed")
    theta = partition.split(params) + 0.1
    plain = value_and_gradient(lambda t: network.apply(partition.merge(t, params), state, x), theta)
    split = value_and_gradient(lambda t: hoisted.late(t, carry), theta)
    np.testing.assert_allclose(split[0], plain[0], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(split[1], plain[1], rtol=2e-4, atol=2e-5)


def test_equal_arguments_give_the_same_object(case):
    network, partition, params, state, x = case
    for budget in (None, 0):
        first, _ = row_blocks.hoist_rows(network, partition, params, state, x, budget)
        second, _ = row_blocks.hoist_rows(network, partition, params, state, x + 0, budget)
        assert first is second


def test_blocks_shrink_as_activations_grow(monkeypatch):
    def rows(width):
        network = as_network(nb.FlaxMLP([width], 1))
        params, state = network.init(jax.random.key(0), np.zeros((1, 3), np.float32))
        frozen = Partition.nothing(trees.shapes(params))
        return row_blocks.rows_per_block(network, frozen, params, state, np.zeros((1, 3), np.float32))

    monkeypatch.setattr(row_blocks, "CPU_BLOCK_BYTES", 2**14)
    assert rows(8) > rows(64) > rows(512) >= 8


def test_blocks_follow_the_kind_of_machine(monkeypatch):
    network = as_network(nb.FlaxMLP([512], 1))
    params, state = network.init(jax.random.key(0), np.zeros((1, 3), np.float32))
    arguments = network, Partition.nothing(trees.shapes(params)), params, state, np.zeros((1, 3), np.float32)
    monkeypatch.setattr(row_blocks, "CPU_BLOCK_BYTES", 2**16)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 2**18)
    rows = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        rows[backend] = row_blocks.rows_per_block(*arguments)
    assert rows == {"cpu": 32, "gpu": 128}


def test_fit_says_when_it_recomputes(monkeypatch):
    monkeypatch.setattr(row_blocks, "CARRY_BUDGET_BYTES", 8)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 2))
    model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1)
    with pytest.warns(MemoryBudgetWarning, match="30 rows exceed the memory budget") as caught:
        model.fit(X, X[:, 0], num_samples=150, sgd_epochs=5, map_sigma=1.0, seed=0)
    assert [w.filename for w in caught if w.category is MemoryBudgetWarning] == [__file__]  # it points at the call
    kept = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1)
    monkeypatch.setattr(row_blocks, "CARRY_BUDGET_BYTES", 2**30)
    kept.fit(X, X[:, 0], num_samples=150, sgd_epochs=5, map_sigma=1.0, seed=0)
    np.testing.assert_allclose(model.predict(X)[0], kept.predict(X)[0], rtol=1e-3, atol=1e-3)
