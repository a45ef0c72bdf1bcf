"""Automatic selection: exactly k distinct weights by every method, in every kind of layer."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurobayes import trees
from neurobayes._clustering import representatives
from neurobayes.errors import NotFittedError, OptionError, SelectionError
from neurobayes.networks.base import Layer
from neurobayes.networks.convnet import FlaxConvNet
from neurobayes.networks.linen import LinenNetwork
from neurobayes.networks.mlp import FlaxMLP
from neurobayes.networks.transformer import FlaxTransformer
from neurobayes.selection import METHODS, select_bayesian_components, select_pairs, validate_select_config
from neurobayes.selectors import NetworkInfo, from_keywords, resolve, weights

NETWORKS = {
    "mlp": (FlaxMLP([6, 5], 1), jnp.zeros((1, 3))),
    "conv_1d": (FlaxConvNet(input_dim=1, conv_layers=[2, 3], fc_layers=[4], target_dim=1), jnp.zeros((1, 6, 2))),
    "conv_3d": (FlaxConvNet(input_dim=3, conv_layers=[2], fc_layers=[4], target_dim=1), jnp.zeros((1, 3, 2, 4, 2))),
    "transformer": (
        FlaxTransformer(vocab_size=7, max_length=5, target_dim=1, d_model=6, num_heads=3, num_layers=1, mlp_dim=4),
        jnp.zeros((1, 5), jnp.int32),
    ),
}
LAYERS = [
    ("mlp", "Dense0", 18),
    ("mlp", "Dense2", 5),
    ("conv_1d", "Conv1", 6),
    ("conv_3d", "Conv0", 4),
    ("transformer", "TokenEmbed", 42),
    ("transformer", "PosEmbed", 30),
    ("transformer", "Block0_Attention", 4 * 36),
    ("transformer", "Block0_MLP_dense1", 24),
]


@dataclasses.dataclass
class Statistics:
    weight_variance: Any
    mean_abs_gradient: Any
    num_steps: int = 10


@dataclasses.dataclass
class Trained:
    """What selection asks of a deterministic model, with weights and statistics drawn at random."""

    info: NetworkInfo
    training_statistics: Statistics | None

    def network_info(self) -> NetworkInfo:
        return self.info


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def trained():
    models = {}
    for name, (module, x) in NETWORKS.items():
        network = LinenNetwork(module)
        shapes = jax.eval_shape(network.init, jax.random.key(0), x)[0]
        params = random_like(shapes, 0)
        statistics = Statistics(
            jax.tree.map(np.square, random_like(shapes, 1)), jax.tree.map(np.abs, random_like(shapes, 2))
        )
        models[name] = Trained(NetworkInfo(network.layers(x), trees.shapes(params), params), statistics)
    return models


# --- every method, every kind of layer ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("network", "layer", "num_pairs"), LAYERS)
@pytest.mark.parametrize("k", [1, 5, 23, 1000])
def test_exactly_k_distinct_pairs_that_weights_accepts(trained, method, network, layer, num_pairs, k):
    model = trained[network]
    pairs = select_bayesian_components(model, [layer], method, k)
    expected = min(k, num_pairs)
    assert list(pairs) == [layer]
    assert len(pairs[layer]) == len(set(pairs[layer])) == expected
    counts = resolve(weights(pairs), model.info).counts()
    window = 1
    if layer.startswith("Conv"):
        window = math.prod(model.info.shapes[f"{layer}.kernel"][:-2])
        assert window > 1
    assert sum(counts.values()) == expected * window
    assert not any(count for path, count in counts.items() if path.endswith("bias"))
    assert pairs == select_bayesian_components(model, [layer], method, k)
    keyword = from_keywords(probabilistic_neurons=json.loads(json.dumps(pairs)))
    assert resolve(keyword, model.info).counts() == counts


@pytest.mark.parametrize("method", ["variance", "gradient", "magnitude"])
def test_dense_pairs_are_those_with_the_highest_score(trained, method):
    model = trained["mlp"]
    scores = {
        "variance": model.training_statistics.weight_variance,
        "gradient": model.training_statistics.mean_abs_gradient,
        "magnitude": jax.tree.map(np.abs, model.info.params),
    }[method]
    kernel = scores["Dense0"]["kernel"]
    pairs = select_bayesian_components(model, ["Dense0"], method, 4)["Dense0"]
    np.testing.assert_array_equal([kernel[pair] for pair in pairs], np.sort(kernel.ravel())[::-1][:4])


def test_conv_pairs_are_ranked_by_the_mean_over_the_window(trained):
    model = trained["conv_1d"]
    mean = np.abs(model.info.params["Conv1"]["kernel"]).mean(0)
    pairs = select_bayesian_components(model, ["Conv1"], "magnitude", 3)["Conv1"]
    assert [mean[pair] for pair in pairs] == sorted(mean.ravel(), reverse=True)[:3]


def test_attention_projections_are_ranked_jointly(trained):
    model = trained["transformer"]
    leaves = model.info.params["Block0_Attention"]
    flat = {name: np.abs(leaves[name]["kernel"]).reshape(6, 6) for name in ("query", "key", "value", "out")}
    pairs = select_bayesian_components(model, ["Block0_Attention"], "magnitude", 8)["Block0_Attention"]
    got = [flat[projection][i, j] for projection, i, j in pairs]
    np.testing.assert_array_equal(got, np.sort(np.concatenate([v.ravel() for v in flat.values()]))[::-1][:8])


def test_embedding_pairs_are_token_and_feature(trained):
    model = trained["transformer"]
    table = model.info.params["TokenEmbed"]["embedding"]
    (pair,) = select_bayesian_components(model, ["TokenEmbed"], "magnitude", 1)["TokenEmbed"]
    assert abs(table[pair]) == np.abs(table).max()


def test_equal_scores_are_ranked_by_position():
    layer = Layer("d", "dense", ("d.kernel",))
    pairs = select_pairs("variance", layer, {"d.kernel": (3, 2)}, {"d.kernel": np.zeros((3, 2))}, 3)
    assert pairs == [(0, 0), (0, 1), (1, 0)]


def test_several_layers_keep_their_order(trained):
    pairs = select_bayesian_components(trained["mlp"], ["Dense2", "Dense0"], "variance", 3)
    assert list(pairs) == ["Dense2", "Dense0"]
    assert [len(chosen) for chosen in pairs.values()] == [3, 3]


# --- clustering ---


def block_kernel():
    """6 × 8 weights in 2 × 2 blocks of values around 0, 10, 20, 30, with noise below 1."""
    rng = np.random.default_rng(0)
    return np.kron([[0.0, 10.0], [20.0, 30.0]], np.ones((3, 4))) + rng.uniform(-1, 1, (6, 8))


def test_clustering_takes_the_weight_nearest_to_each_block_mean():
    kernel = block_kernel()
    chosen = [position for _, position in representatives([kernel[..., None]], 4, seed=0)]
    values = sorted(kernel.ravel()[chosen])
    for value, (rows, columns) in zip(values, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        block = kernel[3 * rows : 3 * rows + 3, 4 * columns : 4 * columns + 4]
        assert value == block.ravel()[np.abs(block - block.mean()).argmin()]


def test_clustering_spreads_what_is_left_over_the_blocks():
    """With two weights per cluster of rows and columns, none gives a third before all gave a second."""
    kernel = np.kron(np.array([[0.0, 10.0], [20.0, 30.0]]), np.ones((3, 4)))
    chosen = [position for _, position in representatives([kernel[..., None]], 8, seed=0)]
    blocks = [(p // 8 // 3, p % 8 // 4) for p in chosen]
    assert len(set(chosen)) == 8
    assert {blocks.count(block) for block in set(blocks)} == {2}


@pytest.mark.parametrize("shape", [(2, 10), (10, 1), (1, 10), (1, 1)])
@pytest.mark.parametrize("constant", [True, False])
def test_clustering_with_fewer_rows_than_clusters(shape, constant):
    """Trap: clustering unseeded, fails for fewer rows than clusters and then makes the layer fully Bayesian."""
    kernel = np.zeros(shape) if constant else np.random.default_rng(0).normal(size=shape)
    for k in (1, 8, 100):
        chosen = representatives([kernel[..., None]], k, seed=0)
        assert len(set(chosen)) == len(chosen) == min(k, kernel.size)


def test_clustering_is_decided_by_the_seed(trained):
    model = trained["transformer"]
    pairs = [select_bayesian_components(model, ["Block0_Attention"], "clustering", 12, seed=s) for s in (0, 0, 1)]
    assert pairs[0] == pairs[1]
    assert pairs[0] != pairs[2]
    assert {projection for projection, _, _ in pairs[0]["Block0_Attention"]} == {"query", "key", "value", "out"}


# --- wrong arguments ---

GOOD = {"method": "variance", "layer_names": ["Dense0"], "num_pairs_per_layer": 3}


def test_config_is_checked_against_layers_and_shapes_alone(trained):
    info = trained["mlp"].info
    config = validate_select_config({**GOOD, "seed": 5}, NetworkInfo(info.layers, info.shapes))
    assert (config.method, config.layer_names, config.num_pairs_per_layer, config.seed) == (
        "variance",
        ("Dense0",),
        3,
        5,
    )


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({**GOOD, "num_pairs_per_layer": 0}, OptionError, "num_pairs_per_layer=0 must be"),
        ({**GOOD, "num_pairs_per_layer": -3}, OptionError, "num_pairs_per_layer=-3"),
        ({**GOOD, "num_pairs_per_layer": 2.5}, OptionError, "num_pairs_per_layer=2.5"),
        ({**GOOD, "num_pairs_per_layer": True}, OptionError, "num_pairs_per_layer"),
        ({**GOOD, "method": "varianse"}, OptionError, "closest: 'variance'"),
        ({**GOOD, "method": None}, OptionError, "method=None"),
        ({**GOOD, "num_pairs": 3}, OptionError, "unknown entry 'num_pairs' .closest: 'num_pairs_per_layer'"),
        ({"method": "variance"}, OptionError, "lacks layer_names, num_pairs_per_layer"),
        ({**GOOD, "layer_names": []}, OptionError, "at least one"),
        ({**GOOD, "layer_names": "Dense0"}, OptionError, "must be a list"),
        ({**GOOD, "layer_names": [0]}, OptionError, "layer_names is"),
        ({**GOOD, "layer_names": ["Dense0", "Dense0"]}, OptionError, "'Dense0' twice"),
        ({**GOOD, "layer_names": ["Dense9"]}, SelectionError, "no layer is named 'Dense9'"),
        ({**GOOD, "seed": -1}, OptionError, "seed=-1"),
        (None, OptionError, "must be a dict"),
        ("variance", OptionError, "must be a dict"),
    ],
)
def test_wrong_configs_raise(trained, config, error, message):
    """Traps: num_pairs 0 selects all, negatives nonsense; bad config reported only after pre-training."""
    with pytest.raises(error, match=message):
        validate_select_config(config, trained["mlp"].info)


@pytest.mark.parametrize("method", METHODS)
def test_layers_without_a_kernel_raise(trained, method):
    model = trained["transformer"]
    with pytest.raises(SelectionError, match="'Block0_LayerNorm1' is of kind 'norm'"):
        select_bayesian_components(model, ["Block0_LayerNorm1"], method, 2)


@pytest.mark.parametrize("num_pairs", [0, -1])
def test_num_pairs_zero_does_not_select_all(trained, num_pairs):
    with pytest.raises(OptionError, match="num_pairs_per_layer"):
        select_bayesian_components(trained["mlp"], ["Dense0"], "magnitude", num_pairs)


@pytest.mark.parametrize("method", METHODS)
def test_missing_statistics(trained, method):
    model = Trained(trained["mlp"].info, None)
    if method in ("magnitude", "clustering"):
        assert len(select_bayesian_components(model, ["Dense0"], method, 2)["Dense0"]) == 2
    else:
        with pytest.raises(OptionError, match=f"'{method}'. Train with `track_statistics=True`"):
            select_bayesian_components(model, ["Dense0"], method, 2)


@pytest.mark.parametrize(("method", "needed"), [("variance", 2), ("gradient", 1), ("magnitude", 0), ("clustering", 0)])
def test_statistics_of_too_few_steps(trained, method, needed):
    """Over one step all variances are zero, and the first weights would be chosen."""
    info, statistics = trained["mlp"].info, trained["mlp"].training_statistics
    for num_steps in (0, 1, 2):
        model = Trained(info, dataclasses.replace(statistics, num_steps=num_steps))
        if num_steps >= needed:
            assert len(select_bayesian_components(model, ["Dense0"], method, 2)["Dense0"]) == 2
        else:
            with pytest.raises(OptionError, match=f"'{method}' needs .* those of {num_steps}\\..*lower burn_in"):
                select_bayesian_components(model, ["Dense0"], method, 2)


@pytest.mark.parametrize("method", ["magnitude", "clustering"])
def test_untrained_network_raises(trained, method):
    info = trained["mlp"].info
    with pytest.raises(NotFittedError, match="needs trained weights"):
        select_bayesian_components(Trained(NetworkInfo(info.layers, info.shapes), None), ["Dense0"], method, 2)


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_raise(trained, method):
    info = trained["mlp"].info
    broken = jax.tree.map(np.array, info.params)
    broken["Dense0"]["kernel"][2, 1] = np.inf
    model = Trained(NetworkInfo(info.layers, info.shapes, broken), Statistics(broken, broken))
    with pytest.raises(SelectionError, match=r"'Dense0.kernel' has 1 non-finite values, the first at \(2, 1\)"):
        select_bayesian_components(model, ["Dense0"], method, 2)
    assert len(select_bayesian_components(model, ["Dense1"], method, 2)["Dense1"]) == 2
