"""Partition on random trees and random masks: split and merge are inverses."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neurobayes import trees
from neurobayes.partition import Partition

# Few shapes, because each new one costs JAX a compilation; () and an empty leaf are among them.
SHAPES = st.sampled_from([(), (1,), (4,), (2, 3), (3, 1, 2), (0, 2)])
TREES = st.recursive(
    SHAPES.map(lambda shape: np.empty(shape, np.float32)),
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["kernel", "bias", "Dense0", "a_1"]), children, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def trees_and_partitions(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    params = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), draw(TREES))
    shapes = trees.shapes(params)
    share = draw(st.dictionaries(st.sampled_from(sorted(shapes)), st.sampled_from([0.0, 0.5, 1.0]))) if shapes else {}
    masks = {path: generator.random(shapes[path]) < p for path, p in share.items()}
    masks = {path: np.asarray(mask) for path, mask in masks.items()}
    return params, masks, Partition.from_masks(masks, shapes)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@given(trees_and_partitions())
@settings(max_examples=60, deadline=None)
def test_split_and_merge_are_inverses(case):
    params, masks, partition = case
    theta = partition.split(params)
    assert theta.shape == (partition.size,) == (sum(int(mask.sum()) for mask in masks.values()),)
    assert_same(partition.merge(theta, params), params)
    other = jnp.arange(partition.size, dtype=jnp.float32) + 100
    merged = partition.merge(other, params)
    np.testing.assert_array_equal(partition.split(merged), other)
    for path, leaf in trees.flatten(merged).items():
        mask = masks.get(path, np.zeros(leaf.shape, bool))
        np.testing.assert_array_equal(np.asarray(leaf)[~mask], np.asarray(trees.flatten(params)[path])[~mask])


@given(trees_and_partitions())
@settings(max_examples=60, deadline=None)
def test_masks_and_pytree_round_trips(case):
    params, masks, partition = case
    for path, mask in partition.masks().items():
        np.testing.assert_array_equal(mask, masks.get(path, np.zeros(mask.shape, bool)))
    leaves, structure = jax.tree.flatten(partition)
    again = jax.tree.unflatten(structure, leaves)
    assert again.structure == partition.structure
    unraveled = partition.unravel(np.asarray(partition.split(params)))
    for path, leaf in unraveled.items():
        np.testing.assert_array_equal(np.ravel(leaf), np.asarray(trees.flatten(params)[path])[masks[path]])
