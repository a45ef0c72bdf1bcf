"""Selectors: what each one matches, how they combine, and how wrong ones fail."""

import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurobayes import selectors as sel
from neurobayes import trees
from neurobayes.errors import NotFittedError, OptionError, SelectionError
from neurobayes.networks.base import Layer
from neurobayes.networks.linen import LinenNetwork
from neurobayes.selectors import NetworkInfo, resolve


class Net(nn.Module):
    """One layer of every kind."""

    @nn.compact
    def __call__(self, tokens, image):
        h = nn.Embed(7, 6, name="TokenEmbed")(tokens)
        h = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=6, out_features=4, name="Block0_Attention")(h)
        h = nn.LayerNorm(name="Norm0")(h).mean(1)
        image = nn.Conv(5, (3, 2), name="Conv0")(image).mean((1, 2))
        h = nn.Dense(3, name="Dense0")(jnp.concatenate([h, image], -1))
        return nn.Dense(2, name="Dense1")(h)


@pytest.fixture(scope="module")
def info():
    class Both(nn.Module):
        """``Net`` behind one input, at the root, so that its layers keep their names."""

        @nn.compact
        def __call__(self, x):
            return Net.__call__(self, x[:, :4].astype(jnp.int32), x[:, 4:].reshape(-1, 4, 2, 2))

    network = LinenNetwork(Both())
    x = jnp.zeros((1, 20))
    params, _ = jax.jit(network.init)(jax.random.key(0), x)
    return NetworkInfo(network.layers(x), trees.shapes(params), params)


def chosen(selector, info):
    """Leaf path -> number of chosen scalars, without the frozen leaves."""
    return {path: count for path, count in resolve(selector, info).counts().items() if count}


def test_layers_of_the_example(info):
    assert [(layer.name, layer.kind) for layer in info.layers] == [
        ("TokenEmbed", "embedding"),
        ("Block0_Attention", "attention"),
        ("Norm0", "norm"),
        ("Conv0", "conv"),
        ("Dense0", "dense"),
        ("Dense1", "dense"),
    ]


# --- whole layers and leaves ---


def test_last_counts_the_output_layer_and_not_norms(info):
    assert chosen(sel.last(1), info) == {"Dense1.bias": 2, "Dense1.kernel": 6}
    four = chosen(sel.last(4), info)
    assert {trees.parent(path).split(".")[0] for path in four} == {"Dense1", "Dense0", "Conv0", "Block0_Attention"}
    assert set(chosen(sel.everything(), info)) - set(chosen(sel.last(5), info)) == {"Norm0.bias", "Norm0.scale"}


def test_last_of_too_many_layers_raises(info):
    with pytest.raises(SelectionError, match=r"last\(6\) asks for more layers than the network has: 5"):
        resolve(sel.last(6), info)


@pytest.mark.parametrize("k", [0, -1, 1.0, True, "1", None])
def test_counts_must_be_positive_whole_numbers(k):
    for make in (sel.last, sel.top, sel.random_subset):
        with pytest.raises(SelectionError, match=r"whole number, 1 or more"):
            make(k)


def test_layers_by_name_subtree_and_leaf(info):
    assert chosen(sel.layers("Dense0", "Norm0"), info) == {
        "Dense0.bias": 3, "Dense0.kernel": 27, "Norm0.bias": 4, "Norm0.scale": 4,
    }  # fmt: skip
    assert set(chosen(sel.layers("Block0_Attention"), info)) == {
        f"Block0_Attention.{name}.{leaf}" for name in ("query", "key", "value", "out") for leaf in ("kernel", "bias")
    }
    assert chosen(sel.layers("Block0_Attention.query"), info) == {
        "Block0_Attention.query.bias": 6, "Block0_Attention.query.kernel": 36,
    }  # fmt: skip
    assert chosen(sel.layers("Dense0.bias"), info) == {"Dense0.bias": 3}


def test_names_match_whole_keys_only():
    layers = tuple(Layer(name, "dense", (f"{name}.kernel",)) for name in ("Dense1", "Dense10", "encoder.layers.0.q"))
    info = NetworkInfo(layers, {layer.leaves[0]: (2, 2) for layer in layers})
    assert chosen(sel.layers("Dense1"), info) == {"Dense1.kernel": 4}
    assert chosen(sel.layers("encoder"), info) == {"encoder.layers.0.q.kernel": 4}
    assert chosen(sel.layers("encoder.layers[0].q"), info) == {"encoder.layers.0.q.kernel": 4}
    assert chosen(sel.weights({"encoder.layers[0].q": [(1, 1)]}), info) == {"encoder.layers.0.q.kernel": 1}


def test_a_typo_in_a_layer_name_raises(info):
    """Trap: a typo in a layer name gives a silently deterministic net."""
    message = (
        r"no layer is named 'Dense2'. The network has TokenEmbed, .*, Dense1 \(closest: 'Dense1'\). "
        r"`nb.print_layer_configs\(network\)` lists layers, shapes and sizes."
    )
    with pytest.raises(SelectionError, match=message):
        resolve(sel.layers("Dense2"), info)
    with pytest.raises(SelectionError, match=r"no layer is named 'dense0'"):
        resolve(sel.last(1) | sel.layers("dense0"), info)


@pytest.mark.parametrize("names", [(), ("",), (["Dense0"],), (3,)])
def test_layers_takes_names_only(names):
    with pytest.raises(SelectionError, match=r"takes one or more names"):
        sel.layers(*names)


def test_path_by_glob_and_regex(info):
    kernels = {path for path in info.shapes if path.endswith("kernel")}
    assert set(chosen(sel.path("*.kernel"), info)) == kernels
    assert set(chosen(sel.path("re:kernel$"), info)) == kernels
    assert set(chosen(sel.path(re.compile("KERNEL", re.IGNORECASE)), info)) == kernels
    assert set(chosen(sel.path("Dense?.bias"), info)) == {"Dense0.bias", "Dense1.bias"}
    with pytest.raises(SelectionError, match=r"matches none of the leaves.*closest: 'Dense0.bias'"):
        resolve(sel.path("Dense0.bais"), info)
    with pytest.raises(SelectionError, match=r"no valid regular expression"):
        sel.path("re:(")
    with pytest.raises(SelectionError, match=r"takes a glob"):
        sel.path(3)


def test_brackets_in_a_glob_are_indices_and_digits():
    names = ["blocks.0.q.kernel", "blocks.1.q.kernel", "blocks.10.q.kernel", "blocks1.kernel", "Dense0.bias", "0.w"]
    names += ["heads[2].w", "0.1.w"]
    shapes = dict.fromkeys(names, (2,))
    brackets = NetworkInfo(tuple(Layer(name.rpartition(".")[0], "other", (name,)) for name in names), shapes)

    def found(glob):
        return set(chosen(sel.path(glob), brackets))

    assert found("blocks[0].*") == {"blocks.0.q.kernel"}
    assert found("blocks[10].*") == {"blocks.10.q.kernel", "blocks1.kernel"}  # the index, and the digits 1 and 0
    assert found("blocks[1].q.kernel") == {"blocks.1.q.kernel"}
    assert found("Dense[01].bias") == {"Dense0.bias"}
    assert found("[0].w") == {"0.w"} and found("[0][1].w") == {"0.1.w"}
    assert found("heads[2].w") == {"heads[2].w"}
    assert found("blocks[!0]*.kernel") == {"blocks.0.q.kernel", "blocks.1.q.kernel", "blocks.10.q.kernel",
                                           "blocks1.kernel"}  # fmt: skip
    with pytest.raises(SelectionError, match=r"matches none of the leaves"):
        found("blocks[7].*")
    assert set(chosen(sel.layers("[0][1]"), brackets)) == {"0.1.w"}


def test_kinds_biases_and_norms(info):
    assert set(chosen(sel.module_type("conv", "norm"), info)) == {
        "Conv0.bias", "Conv0.kernel", "Norm0.bias", "Norm0.scale",
    }  # fmt: skip
    assert set(chosen(sel.norms(), info)) == {"Norm0.bias", "Norm0.scale"}
    assert set(chosen(sel.biases(), info)) == {path for path in info.shapes if path.endswith("bias")}
    with pytest.raises(OptionError, match=r"closest: 'dense'"):
        sel.module_type("Dense")
    with pytest.raises(SelectionError, match=r"no layer of kind other"):
        resolve(sel.module_type("other"), info)


def test_biases_of_other_frameworks():
    shapes = dict.fromkeys(["attn.in_proj_bias", "rnn.bias_hh_l0", "0.b", "unbiased.scale", "bias.weight"], (2,))
    info = NetworkInfo((), shapes)
    assert set(chosen(sel.biases(), info)) == {"attn.in_proj_bias", "rnn.bias_hh_l0", "0.b"}


def test_absent_biases_and_norms_raise():
    info = NetworkInfo((Layer("Dense0", "dense", ("Dense0.kernel",)),), {"Dense0.kernel": (2, 2)})
    with pytest.raises(SelectionError, match=r"biases\(\) matches none"):
        resolve(sel.biases(), info)
    with pytest.raises(SelectionError, match=r"no layer of kind norm; its kinds are: dense"):
        resolve(sel.everything() - sel.norms(), info)


def test_mask(info):
    tree = jax.tree.map(lambda leaf: np.asarray(leaf) > 1e9, info.params)
    tree["Dense0"]["kernel"][2, 1] = True
    tree["Dense1"]["bias"] = True
    partition = resolve(sel.mask(tree), info)
    assert partition.counts()["Dense0.kernel"] == 1
    assert partition.masks()["Dense0.kernel"][2, 1]
    assert partition.counts()["Dense1.bias"] == 2
    again = resolve(sel.mask(partition.masks()), info)
    assert again.structure == partition.structure


def test_wrong_masks_raise(info):
    none = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), info.params)
    with pytest.raises(SelectionError, match=r"False everywhere"):
        resolve(sel.mask(none), info)
    with pytest.raises(SelectionError, match=r"'Dense0.kernel' must be boolean; got int"):
        sel.mask({"Dense0": {"kernel": np.zeros((9, 3), int)}})
    with pytest.raises(SelectionError, match=r"nothing is given for the leaves .*Dense1.bias"):
        resolve(sel.mask({"Dense0": none["Dense0"]}), info)
    with pytest.raises(SelectionError, match=r"no leaf 'Dense9.kernel'"):
        resolve(sel.mask({**none, "Dense9": {"kernel": np.zeros(1, bool)}}), info)
    with pytest.raises(SelectionError, match=r"'Dense0.kernel' has shape \(3, 9\)"):
        resolve(sel.mask({**none, "Dense0": {"kernel": np.ones((3, 9), bool), "bias": False}}), info)


# --- ranking and random choice ---


def test_top_by_magnitude_is_global_and_exact(info):
    values = np.concatenate([np.abs(np.ravel(leaf)) for leaf in jax.tree.leaves(info.params)])
    for k in (1, 10, 200):
        theta = resolve(sel.top(k, by="magnitude"), info).split(info.params)
        np.testing.assert_allclose(np.sort(np.abs(theta)), np.sort(values)[-k:], rtol=1e-6)


def test_top_within_a_selector_takes_no_more_than_there_are(info):
    assert chosen(sel.top(1000, by="magnitude", within=sel.layers("Dense1")), info) == {
        "Dense1.bias": 2, "Dense1.kernel": 6,
    }  # fmt: skip
    picked = resolve(sel.top(3, within=sel.weights({"Dense0": [(0, 0), (1, 0), (2, 0), (3, 0)]})), info).masks()
    assert picked["Dense0.kernel"][:4, 0].sum() == 3
    assert picked["Dense0.kernel"].sum() == 3


def test_ties_are_broken_by_position(info):
    scores = jax.tree.map(jnp.zeros_like, info.params)
    masks = resolve(sel.top(2, by=scores, within=sel.layers("Dense0.kernel")), info).masks()
    assert np.argwhere(masks["Dense0.kernel"]).tolist() == [[0, 0], [0, 1]]


def test_top_by_named_statistics_callable_and_tree(info):
    def scores(name):
        return {"variance": info.params, "gradient": None}[name]

    with_scores = NetworkInfo(info.layers, info.shapes, info.params, scores)
    expected = resolve(sel.top(5, by=info.params), info).masks()
    for by in ("variance", lambda info: info.params):
        got = resolve(sel.top(5, by=by), with_scores).masks()
        assert all((got[path] == expected[path]).all() for path in expected)
    with pytest.raises(OptionError, match=r"no training statistics for 'gradient'.*track_statistics=True"):
        resolve(sel.top(5, by="gradient"), with_scores)
    with pytest.raises(OptionError, match=r"track_statistics=True"):
        resolve(sel.top(5, by="variance"), info)
    with pytest.raises(OptionError, match=r"closest: 'variance'"):
        sel.top(5, by="varianse")
    with pytest.raises(NotFittedError, match=r"needs trained weights"):
        resolve(sel.top(5, by="magnitude"), NetworkInfo(info.layers, info.shapes))


def test_scores_must_be_finite_and_fit(info):
    scores = jax.tree.map(np.array, info.params)
    scores["Dense0"]["kernel"][1, 2] = np.nan
    with pytest.raises(SelectionError, match=r"'Dense0.kernel' has 1 non-finite values, the first at \(1, 2\)"):
        resolve(sel.top(5, by=scores), info)
    assert chosen(sel.top(2, by=scores, within=sel.layers("Dense1.bias")), info) == {"Dense1.bias": 2}
    scores["Dense0"]["kernel"] = np.zeros((3, 9))
    with pytest.raises(SelectionError, match=r"'Dense0.kernel' have shape \(3, 9\); the weights have \(9, 3\)"):
        resolve(sel.top(5, by=scores), info)
    del scores["Dense0"]
    with pytest.raises(SelectionError, match=r"nothing is given for the leaves Dense0.bias, Dense0.kernel"):
        resolve(sel.top(5, by=scores), info)


def test_random_subset_is_exact_and_depends_on_the_seed_alone(info):
    first, same, other = (resolve(sel.random_subset(20, seed=seed), info).masks() for seed in (3, 3, 4))
    assert sum(mask.sum() for mask in first.values()) == 20
    assert all((first[path] == same[path]).all() for path in first)
    assert any((first[path] != other[path]).any() for path in first)
    assert chosen(sel.random_subset(99, within=sel.layers("Dense1")), info) == chosen(sel.layers("Dense1"), info)
    with pytest.raises(SelectionError, match=r"seed"):
        sel.random_subset(3, seed=-1)


@pytest.mark.parametrize("make", [sel.top, sel.random_subset])
def test_choosing_within_nothing_raises(info, make):
    with pytest.raises(SelectionError, match=r"no weights to choose from in nothing\(\)"):
        resolve(make(3, within=sel.nothing()), info)
    with pytest.raises(SelectionError, match=r"within must be a selector"):
        make(3, within="Dense0")


# --- combination ---


def test_combination_by_masks(info):
    union = sel.weights({"Dense0": [(0, 1)]}) | sel.layers("Dense0.bias", "Dense1")
    assert chosen(union, info) == {"Dense0.bias": 3, "Dense0.kernel": 1, "Dense1.bias": 2, "Dense1.kernel": 6}
    assert chosen(union & sel.layers("Dense0"), info) == {"Dense0.bias": 3, "Dense0.kernel": 1}
    assert chosen(union - sel.biases(), info) == {"Dense0.kernel": 1, "Dense1.kernel": 6}
    assert chosen(sel.layers("Dense1") - sel.weights({"Dense1": [(0, 0)]}), info)["Dense1.kernel"] == 5
    assert chosen(sel.nothing() | sel.last(1), info) == chosen(sel.last(1), info)
    assert chosen(sel.last(1) - sel.nothing(), info) == chosen(sel.last(1), info)


@pytest.mark.parametrize(
    "selector",
    [
        sel.layers("Dense0") & sel.layers("Dense1"),
        sel.everything() - sel.everything(),
        sel.nothing() & sel.last(1),
        sel.nothing() | sel.nothing(),
        sel.last(1) | (sel.layers("Dense0") & sel.norms()),
    ],
    ids=repr,
)
def test_combinations_that_match_nothing_raise(info, selector):
    with pytest.raises(SelectionError, match=r"matches no weight of the network"):
        resolve(selector, info)


def test_only_nothing_may_match_nothing(info):
    assert resolve(sel.nothing(), info).size == 0
    assert resolve(sel.everything(), info).size == trees.num_scalars(info.params)
    with pytest.raises(SelectionError, match=r"matches no weight"):
        resolve(sel.everything(), NetworkInfo((), {}))


def test_resolve_takes_selectors_only(info):
    with pytest.raises(SelectionError, match=r"such as layers\('Dense0'\); got 'Dense0'"):
        resolve("Dense0", info)
    with pytest.raises(TypeError):
        sel.last(1) | "Dense0"


# --- representation ---


@pytest.mark.parametrize(
    "text",
    [
        "last(2) | layers('Dense0')",
        "last(1) | layers('a', 'b') | biases()",
        "(last(1) | norms()) - biases()",
        "last(1) | (norms() & (everything() - path('*.bias')))",
        "everything() - (biases() - norms())",
        "weights({'Dense0': [(0, 5), (2, 10)], 'A': [('query', 0, 1)]})",
        "path(re.compile('x', re.IGNORECASE))",
        "module_type('dense', 'conv')",
        "random_subset(5, seed=3, within=last(1))",
        "top(5, by='magnitude', within=layers('Dense0') | norms())",
        "nothing()",
    ],
)
def test_reprs_create_an_equal_selector(text):
    names = {name: getattr(sel, name) for name in sel.__all__} | {"re": re}
    selector = eval(text, names)
    assert repr(selector) == text
    assert eval(repr(selector), names) == selector
    assert hash(eval(repr(selector), names)) == hash(selector)
    assert pickle.loads(pickle.dumps(selector)) == selector


# --- keywords of the models ---


def test_keywords_are_a_union(info):
    """Trap: weights named for layers outside probabilistic_layer_names ignored."""
    selector = sel.from_keywords(
        probabilistic_layer_names=["Dense1"], probabilistic_neurons={"Dense0": [(0, 2), (2, 1)]}
    )
    assert repr(selector) == "layers('Dense1') | weights({'Dense0': [(0, 2), (2, 1)]})"
    assert chosen(selector, info) == {"Dense1.bias": 2, "Dense1.kernel": 6, "Dense0.kernel": 2}
    everything_given = sel.from_keywords(1, ["Norm0"], {"Dense0": [(0, 2)]}, sel.layers("Conv0.bias"))
    assert set(chosen(everything_given, info)) == {
        "Dense1.bias", "Dense1.kernel", "Norm0.bias", "Norm0.scale", "Dense0.kernel", "Conv0.bias",
    }  # fmt: skip


def test_one_probabilistic_layer_is_the_output_layer_alone(info):
    """Trap: num_probabilistic_layers=1 means two layers."""
    assert chosen(sel.from_keywords(num_probabilistic_layers=1), info) == {"Dense1.bias": 2, "Dense1.kernel": 6}


def test_without_keywords_the_last_layer_is_bayesian():
    assert sel.from_keywords() == sel.last(1)


def test_nothing_alone_gives_a_deterministic_network(info):
    assert resolve(sel.from_keywords(bayesian=sel.nothing()), info).size == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_probabilistic_layers": 0}, r"num_probabilistic_layers must be .* got 0. .*bayesian=nothing\(\)"),
        ({"num_probabilistic_layers": 1.5}, "got 1.5"),
        ({"probabilistic_layer_names": []}, "probabilistic_layer_names is empty"),
        ({"probabilistic_layer_names": "Dense1"}, r"Write \['Dense1'\]"),
        ({"probabilistic_layer_names": [1]}, "takes one or more names"),
        ({"probabilistic_neurons": {}}, "probabilistic_neurons is empty"),
        ({"probabilistic_neurons": {"Dense0": []}}, "no weight is listed for 'Dense0'"),
        ({"probabilistic_neurons": [(0, 1)]}, "mapping of layers"),
        ({"bayesian": "last"}, "bayesian must be a selector"),
    ],
)
def test_wrong_keywords_raise(keywords, message):
    with pytest.raises(SelectionError, match=message):
        sel.from_keywords(**keywords)


def test_layer_table(info):
    partition = resolve(sel.last(1) | sel.weights({"Conv0": [(0, 0), (1, 1)]}), info)
    rows = {row.layer: row for row in sel.layer_table(info, partition)}
    assert list(rows) == [layer.name for layer in info.layers]
    assert (rows["Conv0"].kind, rows["Conv0"].num_weights, rows["Conv0"].num_bayesian) == ("conv", 65, 12)
    assert dict(rows["Conv0"].shapes) == {"kernel": (3, 2, 2, 5), "bias": (5,)}
    assert dict(rows["Block0_Attention"].shapes)["query.kernel"] == (6, 3, 2)
    assert sum(row.num_weights for row in rows.values()) == trees.num_scalars(info.params)
    assert sum(row.num_bayesian for row in rows.values()) == partition.size
    assert all(row.num_bayesian is None for row in sel.layer_table(info))
