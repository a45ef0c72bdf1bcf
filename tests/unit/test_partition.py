"""Partition: theta and its way back, inside and outside of transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurobayes import trees
from neurobayes.errors import ParameterError, SelectionError
from neurobayes.partition import Partition

PARAMS = {
    "Dense0": {"bias": jnp.arange(3.0), "kernel": jnp.arange(6.0).reshape(2, 3) + 10},
    "Dense1": {"bias": jnp.arange(1.0) + 50, "kernel": jnp.arange(3.0).reshape(3, 1) + 60},
}
SHAPES = trees.shapes(PARAMS)
KERNEL_MASK = np.array([[True, False, False], [False, True, True]])
MASKS = {"Dense0.kernel": KERNEL_MASK, "Dense1.bias": np.array([True])}


@pytest.fixture
def partition():
    return Partition.from_masks(MASKS, SHAPES)


def test_theta_follows_leaf_order_then_flat_position(partition):
    np.testing.assert_array_equal(partition.split(PARAMS), [10.0, 14.0, 15.0, 50.0])
    assert partition.size == 4
    assert partition.counts() == {"Dense0.bias": 0, "Dense0.kernel": 3, "Dense1.bias": 1, "Dense1.kernel": 0}


def test_merge_replaces_random_scalars_and_returns_frozen_leaves_as_they_are(partition):
    merged = partition.merge(jnp.array([1.0, 2.0, 3.0, 4.0]), PARAMS)
    np.testing.assert_array_equal(merged["Dense0"]["kernel"], [[1.0, 11.0, 12.0], [13.0, 2.0, 3.0]])
    np.testing.assert_array_equal(merged["Dense1"]["bias"], [4.0])
    assert merged["Dense0"]["bias"] is PARAMS["Dense0"]["bias"]
    assert merged["Dense1"]["kernel"] is PARAMS["Dense1"]["kernel"]


def test_frozen_leaves_do_not_depend_on_theta(partition):
    """Nothing that is computed from frozen leaves alone may need theta."""

    def frozen_part(theta):
        merged = partition.merge(theta, PARAMS)
        return merged["Dense0"]["bias"].sum() + merged["Dense1"]["kernel"].sum()

    jaxpr = jax.make_jaxpr(frozen_part)(jnp.zeros(4)).jaxpr
    depends = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in depends for v in eqn.invars):
            depends.update(eqn.outvars)
    assert not depends & set(v for v in jaxpr.outvars if not hasattr(v, "val"))


def test_wholly_random_leaf_does_not_depend_on_its_trained_values():
    partition = Partition.everything(SHAPES)

    def merged(scale):
        return partition.merge(jnp.ones(partition.size), jax.tree.map(lambda leaf: scale * leaf, PARAMS))

    _, tangents = jax.jvp(merged, (1.0,), (1.0,))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(tangents))


def test_everything_and_nothing():
    everything, nothing = Partition.everything(SHAPES), Partition.nothing(SHAPES)
    assert everything.size == trees.num_scalars(PARAMS) == 13
    assert nothing.size == 0
    assert nothing.split(PARAMS).shape == (0,)
    assert nothing.split(PARAMS).dtype == jnp.float32
    merged = nothing.merge(jnp.zeros(0), PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS), strict=True))
    assert all(mask.all() for mask in everything.masks().values())
    assert not any(mask.any() for mask in nothing.masks().values())


def test_masks_invert_from_masks(partition):
    masks = partition.masks()
    assert list(masks) == list(SHAPES)
    np.testing.assert_array_equal(masks["Dense0.kernel"], KERNEL_MASK)
    assert masks["Dense1.bias"].all()
    assert not masks["Dense0.bias"].any()
    again = Partition.from_masks(masks, SHAPES)
    assert again.structure == partition.structure
    np.testing.assert_array_equal(again.indices[0], partition.indices[0])


def test_unravel_gives_leaves_for_every_draw(partition):
    draws = jnp.arange(24.0).reshape(2, 3, 4)
    leaves = partition.unravel(draws)
    assert list(leaves) == ["Dense0.kernel", "Dense1.bias"]
    np.testing.assert_array_equal(leaves["Dense0.kernel"], draws[..., :3])
    assert leaves["Dense1.bias"].shape == (2, 3, 1)
    whole = Partition.everything(SHAPES).unravel(np.arange(26.0).reshape(2, 13))
    np.testing.assert_array_equal(whole["Dense0.kernel"][1], np.arange(16.0, 22.0).reshape(2, 3))
    assert isinstance(whole["Dense0.kernel"], np.ndarray)


def test_jit_vmap_and_grad(partition):
    def value(theta, partition, params):
        merged = partition.merge(theta, params)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(merged))

    theta = jnp.array([1.0, -2.0, 3.0, 4.0])
    np.testing.assert_allclose(jax.jit(jax.grad(value))(theta, partition, PARAMS), 2 * theta)
    thetas = jnp.stack([theta, 2 * theta])
    batched = jax.vmap(value, in_axes=(0, None, None))(thetas, partition, PARAMS)
    np.testing.assert_allclose(batched, [value(t, partition, PARAMS) for t in thetas])
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    np.testing.assert_array_equal(jax.vmap(partition.split)(many)[1], 2 * partition.split(PARAMS))


def test_another_selection_of_the_same_sizes_does_not_recompile(partition):
    traces = []

    @jax.jit
    def split(partition, params):
        traces.append(1)
        return partition.split(params)

    other = Partition.from_masks({"Dense0.kernel": ~KERNEL_MASK, "Dense1.bias": np.array([True])}, SHAPES)
    np.testing.assert_array_equal(split(partition, PARAMS), [10.0, 14.0, 15.0, 50.0])
    np.testing.assert_array_equal(split(other, PARAMS), [11.0, 12.0, 13.0, 50.0])
    assert len(traces) == 1
    smaller = Partition.from_masks({"Dense1.bias": np.array([True])}, SHAPES)
    assert split(smaller, PARAMS).shape == (1,)
    assert len(traces) == 2


def test_selections_can_be_batched(partition):
    other = Partition.from_masks({"Dense0.kernel": ~KERNEL_MASK, "Dense1.bias": np.array([True])}, SHAPES)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), partition, other)
    thetas = jax.vmap(lambda p: p.split(PARAMS))(both)
    np.testing.assert_array_equal(thetas, [[10.0, 14.0, 15.0, 50.0], [11.0, 12.0, 13.0, 50.0]])


def test_structure_is_hashable(partition):
    assert hash(partition.structure) == hash(Partition.from_masks(MASKS, SHAPES).structure)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_theta_follows_the_dtype_of_the_parameters(partition, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    theta = partition.split(params)
    assert theta.dtype == dtype
    merged = partition.merge(theta.astype(jnp.float32), params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(merged))
    assert Partition.nothing(SHAPES).split(params).dtype == dtype


def test_float64_parameters_keep_their_precision(partition):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) + 1e-12, PARAMS)
        theta = partition.split(params)
        assert theta.dtype == jnp.float64
        assert partition.merge(theta, params)["Dense0"]["kernel"].dtype == jnp.float64
        np.testing.assert_array_equal(partition.split(partition.merge(theta, params)), theta)


def test_numpy_parameters_and_lists_tuples_and_scalars():
    params = [(np.float32(3.0) * np.ones(()), {"w": np.arange(4, dtype=np.float32)}), np.zeros((0, 2), np.float32)]
    shapes = trees.shapes(params)
    partition = Partition.from_masks({"0.0": np.array(True), "0.1.w": np.arange(4) % 2 == 1}, shapes)
    np.testing.assert_array_equal(partition.split(params), [3.0, 1.0, 3.0])
    merged = partition.merge(jnp.array([7.0, 8.0, 9.0]), params)
    assert merged[0][0] == 7.0
    np.testing.assert_array_equal(merged[0][1]["w"], [0.0, 8.0, 2.0, 9.0])
    assert merged[1] is params[1]


def test_no_parameters_at_all():
    partition = Partition.everything({})
    assert partition.size == 0
    assert partition.merge(partition.split({}), {}) == {}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"Dense0.kernal": KERNEL_MASK}, "closest: 'Dense0.kernel'"),
        ({"Dense0.kernel": KERNEL_MASK.T}, r"shape \(2, 3\).*got bool with shape \(3, 2\)"),
        ({"Dense0.kernel": KERNEL_MASK.astype(int)}, "must be boolean"),
    ],
)
def test_wrong_masks_raise(masks, message):
    with pytest.raises(SelectionError, match=message):
        Partition.from_masks(masks, SHAPES)


def test_wrong_parameters_and_theta_raise(partition):
    with pytest.raises(ParameterError, match=r"theta must have shape \(4,\); got \(3,\)"):
        partition.merge(jnp.zeros(3), PARAMS)
    with pytest.raises(ParameterError, match=r"'Dense1.bias': expected shape \(1,\), got no such leaf"):
        partition.split({"Dense0": PARAMS["Dense0"]})
    transposed = {**PARAMS, "Dense0": {**PARAMS["Dense0"], "kernel": jnp.zeros((3, 2))}}
    with pytest.raises(ParameterError, match=r"'Dense0.kernel': expected shape \(2, 3\), got \(3, 2\)"):
        partition.split(transposed)
    with pytest.raises(ParameterError, match="last axis of theta must have length 4"):
        partition.unravel(jnp.zeros((4, 3)))


def test_keys_with_dots_that_collide_raise():
    params = {"a.b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ParameterError, match="same path"):
        Partition.everything(trees.shapes(params)).split(params)
