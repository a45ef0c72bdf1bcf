"""Index tuples of single weights: what they select in each kind of layer, and how wrong ones fail."""

import numpy as np
import pytest

from neurobayes.errors import SelectionError
from neurobayes.networks.base import Layer
from neurobayes.selectors import NetworkInfo, resolve, weights

PROJECTIONS = [f"Block0_Attention.{name}" for name in ("query", "key", "value", "out")]
# Attention with 3 heads of size 2, 6 inputs and 4 outputs; a convolution over windows of 3 x 2, of 2 to 5 channels.
LAYERS = (
    Layer("TokenEmbed", "embedding", ("TokenEmbed.embedding",)),
    Layer("Block0_Attention", "attention", tuple(f"{p}.{leaf}" for p in PROJECTIONS for leaf in ("bias", "kernel"))),
    Layer("Norm0", "norm", ("Norm0.bias", "Norm0.scale")),
    Layer("Conv0", "conv", ("Conv0.bias", "Conv0.kernel")),
    Layer("Dense0", "dense", ("Dense0.bias", "Dense0.kernel")),
)
SHAPES = {
    "TokenEmbed.embedding": (7, 6),
    **{f"{projection}.bias": (3, 2) for projection in PROJECTIONS[:3]},
    **{f"{projection}.kernel": (6, 3, 2) for projection in PROJECTIONS[:3]},
    "Block0_Attention.out.bias": (4,),
    "Block0_Attention.out.kernel": (3, 2, 4),
    "Norm0.bias": (4,),
    "Norm0.scale": (4,),
    "Conv0.bias": (5,),
    "Conv0.kernel": (3, 2, 2, 5),
    "Dense0.bias": (3,),
    "Dense0.kernel": (9, 3),
}
INFO = NetworkInfo(LAYERS, SHAPES)


def chosen(selector, info):
    """Leaf path -> number of chosen scalars, without the frozen leaves."""
    return {path: count for path, count in resolve(selector, info).counts().items() if count}


def test_dense_pairs_leave_biases_alone():
    """Trap: pairs sharing an output make one dead bias site each."""
    masks = resolve(weights({"Dense0": [(0, 2), (8, 2)]}), INFO).masks()
    assert np.argwhere(masks["Dense0.kernel"]).tolist() == [[0, 2], [8, 2]]
    assert sum(mask.sum() for mask in masks.values()) == 2


def test_conv_pairs_take_the_whole_window():
    masks = resolve(weights({"Conv0": [(1, 4)]}), INFO).masks()
    expected = np.zeros((3, 2, 2, 5), bool)
    expected[:, :, 1, 4] = True
    np.testing.assert_array_equal(masks["Conv0.kernel"], expected)


def test_embedding_pairs():
    masks = resolve(weights({"TokenEmbed": [(6, 5)]}), INFO).masks()
    assert np.argwhere(masks["TokenEmbed.embedding"]).tolist() == [[6, 5]]


def test_attention_indices_are_flat_over_heads():
    """Trap: attention out indices wrong."""
    pairs = [("query", 5, 3), ("out", 3, 1), ("value", 0, 0)]
    masks = resolve(weights({"Block0_Attention": pairs}), INFO).masks()
    # Flat position 3 of (3 heads, head size 2) is head 1, feature 1.
    assert np.argwhere(masks["Block0_Attention.query.kernel"]).tolist() == [[5, 1, 1]]
    assert np.argwhere(masks["Block0_Attention.out.kernel"]).tolist() == [[1, 1, 1]]
    assert np.argwhere(masks["Block0_Attention.value.kernel"]).tolist() == [[0, 0, 0]]
    assert not masks["Block0_Attention.key.kernel"].any()


def test_the_same_pair_in_frameworks_that_store_outputs_first():
    layers = (
        Layer("fc", "dense", ("fc.weight", "fc.bias")),
        Layer("conv", "conv", ("conv.weight",)),
        Layer("embed", "embedding", ("embed.weight",)),
        Layer("attn", "attention", tuple(f"attn.{p}_proj.weight" for p in ("query", "key", "value", "output"))),
    )
    shapes = {"fc.weight": (3, 9), "fc.bias": (3,), "conv.weight": (5, 2, 3, 3), "embed.weight": (7, 6)}
    shapes |= dict.fromkeys(layers[3].leaves, (4, 6))
    pairs = {"fc": [(8, 2)], "conv": [(1, 4)], "embed": [(6, 5)], "attn": [("out", 5, 3)]}
    masks = resolve(weights(pairs), NetworkInfo(layers, shapes)).masks()
    assert np.argwhere(masks["fc.weight"]).tolist() == [[2, 8]]
    assert masks["conv.weight"][4, 1].all()
    assert masks["conv.weight"].sum() == 9
    assert np.argwhere(masks["embed.weight"]).tolist() == [[6, 5]]
    assert np.argwhere(masks["attn.output_proj.weight"]).tolist() == [[3, 5]]


def test_any_leaf_by_full_rank_indices():
    pairs = {"Dense0.bias": [(2,)], "Block0_Attention.query.bias": [(2, 1)], "Norm0.scale": [(0,)]}
    masks = resolve(weights(pairs), INFO).masks()
    assert np.argwhere(masks["Dense0.bias"]).tolist() == [[2]]
    assert np.argwhere(masks["Block0_Attention.query.bias"]).tolist() == [[2, 1]]
    assert np.argwhere(masks["Norm0.scale"]).tolist() == [[0]]


def test_indices_from_numpy_and_json():
    for pairs in ([[0, 2], [8, 1]], np.array([[0, 2], [8, 1]]), [(np.int64(0), 2), (8, np.int32(1))]):
        selector = weights({"Dense0": pairs})
        assert repr(selector) == "weights({'Dense0': [(0, 2), (8, 1)]})"
        assert chosen(selector, INFO) == {"Dense0.kernel": 2}


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (
            {"Dense0": [(9, 0)]},
            r"'Dense0': weight index \(9, 0\) is out of range. Valid: in 0..8, out 0..2",
        ),
        ({"Dense0": [(0, 3)]}, "out of range"),
        ({"Dense0": [(0, -1)]}, "out of range"),
        ({"Dense0": [(0, 1), (1, 1), (0, 1)]}, r"\(0, 1\) is given twice"),
        ({"Dense0": [(0,)]}, "must hold 2 whole numbers"),
        ({"Dense0": [(0, 1, 2)]}, "must hold 2 whole numbers"),
        ({"Dense0": [(0, 1.0)]}, "must hold 2 whole numbers"),
        ({"Dense0": [(0, True)]}, "must hold 2 whole numbers"),
        ({"Conv0": [(2, 0)]}, "Valid: in_channel 0..1, out_channel 0..4"),
        ({"TokenEmbed": [(7, 0)]}, "Valid: token 0..6, feature 0..5"),
        ({"Block0_Attention": [(0, 1)]}, r"is \(projection, in, out\) with projection one of 'query', 'key', 'value'"),
        ({"Block0_Attention": [("q", 0, 1)]}, r"got \('q', 0, 1\)"),
        ({"Block0_Attention": [("out", 6, 0)]}, "Valid: in 0..5, out 0..3"),
        ({"Block0_Attention": [("out", 0, 0), ("out", 0, 0)]}, "given twice"),
        ({"Dense0.bias": [(3,)]}, "Valid: axis 0 0..2"),
        ({"Dense0.kernel": [(0,)]}, "must hold 2 whole numbers"),
        ({"Norm0": [(0, 0)]}, r"'Norm0' is of kind 'norm' and has no kernel.*'Norm0.bias': \[...\]"),
        ({"Dense4": [(0, 0)]}, "no layer is named 'Dense4'"),
        ({"Block0_Attention.query": [(0, 0)]}, "neither, but has Block0_Attention.query.bias"),
    ],
)
def test_wrong_indices_raise(indices, message):
    """Traps: out-of-range pairs accepted and sample the prior; unknown layer makes it fully Bayesian."""
    with pytest.raises(SelectionError, match=message):
        resolve(weights(indices), INFO)


@pytest.mark.parametrize(
    "indices",
    [{}, [], None, "Dense0", {"Dense0": []}, {"Dense0": 3}, {"Dense0": "ab"}, {"Dense0": [3]}, {0: [(0, 1)]}],
)
def test_wrong_types_of_indices_raise_at_once(indices):
    with pytest.raises(SelectionError):
        weights(indices)


def test_kernels_that_do_not_say_what_is_in_and_out_raise():
    layers = (Layer("Dense0", "dense", ("Dense0.kernel",)), Layer("attn", "attention", ("attn.in_proj_weight",)))
    info = NetworkInfo(layers, {"Dense0.kernel": (2, 3, 4), "attn.in_proj_weight": (12, 4)})
    with pytest.raises(SelectionError, match=r"\{'Dense0.kernel': \[\(0, 0, 0\)\]\}"):
        resolve(weights({"Dense0": [(0, 1)]}), info)
    with pytest.raises(SelectionError, match=r"does not say which leaf is which kernel: attn.in_proj_weight"):
        resolve(weights({"attn": [("query", 0, 1)]}), info)
    assert chosen(weights({"attn.in_proj_weight": [(11, 3)]}), info) == {"attn.in_proj_weight": 1}
