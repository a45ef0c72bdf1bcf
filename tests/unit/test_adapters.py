"""Modules of other frameworks as networks: same outputs, same names, the user's object untouched."""

import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neurobayes import trees
from neurobayes.errors import OptionError, ParameterError
from neurobayes.networks import as_network
from neurobayes.networks.base import InputSpec, Network
from neurobayes.networks.functions import FunctionNetwork

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)


class NNXNet(nnx.Module):
    """Attributes whose names do not sort in the order of the calls."""

    def __init__(self, rngs, rate=0.5):
        self.stem = nnx.Linear(3, 4, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.drop_again = nnx.Dropout(rate, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])
        self.attn = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        x = self.drop(self.bn(self.stem(x)))
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.head(self.drop_again(self.attn(x[:, None])[:, 0]))


class EqxNet(eqx.Module):
    zeroth: eqx.nn.Linear
    drop: eqx.nn.Dropout
    layers: list
    norm: eqx.nn.LayerNorm
    steps: jax.Array
    activation: str

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.zeroth = eqx.nn.Linear(4, "scalar", key=keys[0])
        self.drop = eqx.nn.Dropout(0.5)
        self.layers = [eqx.nn.Linear(3, 4, key=keys[1]), eqx.nn.Linear(4, 4, key=keys[2])]
        self.norm = eqx.nn.LayerNorm(4)
        self.steps = jnp.arange(2)
        self.activation = "tanh"

    def __call__(self, x, key=None):
        for layer in self.layers:
            x = getattr(jnp, self.activation)(layer(x))
        return self.zeroth(self.drop(self.norm(x), key=key)) + self.steps[1]


def plain(params, x):
    """A list of (matrix, vector), and integers that say how often to apply the first."""
    x = x @ params["in"][0] + params["in"][1]
    x = jnp.tanh(x) * params["repeat"]
    return (x @ params["a_head"]["w"] + params["a_head"]["b"])[:, 0]


def plain_params():
    rng = np.random.default_rng(2)
    return {
        "in": (rng.normal(size=(3, 4)), np.zeros(4)),
        "a_head": {"w": rng.normal(size=(4, 1)), "b": np.ones(1)},
        "repeat": np.array(2),
    }


def nnx_case():
    module = NNXNet(nnx.Rngs(0))
    module.bn.mean[...] = jnp.arange(4.0)
    reference = nnx.clone(module)
    reference.eval()
    return module, reference(X)


def eqx_case():
    module = EqxNet(KEY)
    return module, jax.vmap(eqx.nn.inference_mode(module))(X)[:, None]


def plain_case():
    pair = (plain, plain_params())
    return pair, plain(jax.tree.map(jnp.asarray, pair[1]), X)[:, None]


CASES = {"nnx": nnx_case, "equinox": eqx_case, "plain": plain_case}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_prediction_is_the_frameworks_own(case):
    module, expected = case
    network = as_network(module)
    params, state = network.init(KEY, X)
    outputs = jax.jit(network.apply)(params, state, X)
    assert outputs.shape == (len(X), 1)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


def test_weights_are_the_pretrained_ones_and_differentiable(case):
    network = as_network(case[0])
    params, state = network.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, params, network.pretrained)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params))
    gradient = jax.grad(lambda p: network.apply(p, state, X).sum())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(gradient)) > 0


def test_parameters_survive_a_round_trip_by_path(case):
    network = as_network(case[0])
    params, state = network.init(KEY, X)
    doubled = trees.unflatten({path: 2 * leaf for path, leaf in trees.flatten(params).items()}, params)
    assert not np.allclose(network.apply(doubled, state, X), network.apply(params, state, X))


def test_same_object_gives_an_equal_network(case):
    module, _ = case
    first, second = as_network(module), as_network(module)
    assert first is not second and first == second and hash(first) == hash(second)
    assert as_network(first) is first


def test_layers_cover_every_parameter_once(case):
    network = as_network(case[0])
    owned = [leaf for layer in network.layers(X) for leaf in layer.leaves]
    assert sorted(owned) == sorted(trees.flatten(network.pretrained))
    assert network.layers(jax.ShapeDtypeStruct(X.shape, X.dtype)) == network.layers(X)


def test_equal_weights_in_another_object_are_another_network():
    assert as_network(EqxNet(KEY)) != as_network(EqxNet(KEY))


def test_module_trained_further_is_another_network():
    module = NNXNet(nnx.Rngs(0))
    before = as_network(module)
    module.head.bias[...] = jnp.ones(1)
    assert as_network(module) != before
    assert before.pretrained["head"]["bias"] == 0
    module.head.bias[...] = jnp.zeros(1)
    assert as_network(module) == before


def test_nnx_layers_in_order_of_calls():
    layers = as_network(NNXNet(nnx.Rngs(0))).layers(X)
    blocks = [f"blocks.{i}" for i in range(11)]
    assert [layer.name for layer in layers] == ["stem", "bn", *blocks, "attn", "head"]
    assert [layer.kind for layer in layers] == ["dense", "norm", *["dense"] * 11, "attention", "dense"]
    assert "attn.query.kernel" in layers[-2].leaves


def test_nnx_module_and_its_mode_stay_as_they_were():
    module = NNXNet(nnx.Rngs(0))
    module.train()
    network = as_network(module)
    params, state = network.init(KEY, X)
    network.apply(params, state, X, key=KEY)
    assert not module.drop.deterministic and not module.bn.use_running_average
    np.testing.assert_array_equal(module.bn.mean[...], 0)
    assert list(trees.flatten(state)) == ["bn.mean", "bn.var"]


def test_nnx_dropout_with_key_only_and_batch_statistics_always():
    network = as_network(NNXNet(nnx.Rngs(0)))
    params, state = network.init(KEY, X)
    assert network.has_dropout
    one, same, other = (network.apply(params, state, X, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    shifted = jax.tree.map(lambda leaf: leaf + 1, state)
    assert not np.allclose(network.apply(params, shifted, X, key=KEY), one)  # statistics of the batch would not see it
    assert not as_network(NNXNet(nnx.Rngs(0), rate=0.0)).has_dropout


def test_nnx_dropout_layers_draw_different_masks():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return jnp.stack([self.first(x), self.second(x)]) * self.scale

    network = as_network(Twice(nnx.Rngs(0)))
    first, second = network.apply(*network.init(KEY, X), jnp.ones((1, 64)), key=KEY)
    assert not np.array_equal(first, second)


def test_nnx_tied_weights_appear_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.encode = nnx.Linear(3, 3, rngs=rngs)
            self.decode = self.encode

        def __call__(self, x):
            return self.decode(jnp.tanh(self.encode(x)))

    module = Tied(nnx.Rngs(0))
    network = as_network(module)
    assert len(trees.flatten(network.pretrained)) == 2
    np.testing.assert_allclose(network.apply(*network.init(KEY, X), X), module(X), atol=1e-6)


def test_nnx_call_keywords():
    class Flagged(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x, train: bool, deterministic: bool = False, rngs=None):
            noise = 0.0 if deterministic else jax.random.normal(rngs.noise(), (len(x), 1))
            return self.linear(x) + noise + 100 * train

    network = as_network(Flagged(nnx.Rngs(0)))
    variables = network.init(KEY, X)
    still, noisy = network.apply(*variables, X), network.apply(*variables, X, key=KEY)
    assert 0 < np.abs(still - noisy).max() < 50


def test_equinox_layers_have_dotted_names_in_order_of_calls():
    layers = as_network(EqxNet(KEY)).layers(X)
    assert [layer.name for layer in layers] == ["layers.0", "layers.1", "norm", "zeroth"]
    assert [layer.kind for layer in layers] == ["dense", "dense", "norm", "dense"]
    assert layers[0].leaves == ("layers.0.bias", "layers.0.weight")


def test_equinox_dropout_draws_per_example():
    network = as_network(EqxNet(KEY))
    params, state = network.init(KEY, X)
    rows = jnp.tile(X[:1], (32, 1))
    assert len(np.unique(network.apply(params, state, rows))) == 1
    drawn = network.apply(params, state, rows, key=KEY)
    assert len(np.unique(drawn)) > 2
    np.testing.assert_array_equal(drawn, network.apply(params, state, rows, key=KEY))
    assert list(trees.flatten(state)) == ["buffers.steps"]


def test_equinox_module_without_key_has_no_dropout():
    class Keyless(eqx.Module):
        drop: eqx.nn.Dropout
        linear: eqx.nn.Linear

        def __call__(self, x):
            return self.linear(self.drop(x))

    network = as_network(Keyless(eqx.nn.Dropout(0.5), eqx.nn.Linear(3, 1, key=KEY)))
    params, state = network.init(KEY, X)
    assert not network.has_dropout
    np.testing.assert_array_equal(network.apply(params, state, X, key=KEY), network.apply(params, state, X))


class EqxBatchNorm(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.linear = eqx.nn.Linear(3, 2, key=key)
        self.norm = eqx.nn.BatchNorm(2, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


def test_equinox_running_statistics_need_their_state():
    module, layer_state = eqx.nn.make_with_state(EqxBatchNorm)(KEY)
    with pytest.raises(OptionError, match="make_with_state"):
        as_network(module)
    batched = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, layer_state = batched(X, layer_state)
    network = as_network((module, layer_state))
    evaluated = eqx.nn.inference_mode(module)
    expected = jax.vmap(lambda x: evaluated(x, layer_state)[0])(X)
    variables = network.init(KEY, X)
    np.testing.assert_allclose(jax.jit(network.apply)(*variables, X), expected, atol=1e-6)
    assert network == as_network((module, layer_state))
    assert not network.has_dropout


def test_plain_layers_follow_containers():
    layers = as_network((plain, plain_params())).layers(X)
    assert [(layer.name, layer.kind) for layer in layers] == [("in", "dense"), ("a_head", "dense")]


def test_plain_leaves_at_the_root_join_their_matrix():
    params = {"b0": np.zeros(2), "b1": np.zeros(1), "w0": np.ones((3, 2)), "w1": np.ones((2, 1)), "unused": np.ones(5)}

    @jax.jit
    def jitted(p, x):
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)  # in the tree's order, before any use
        return jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]

    layers = as_network(jitted, params=params).layers(X)
    assert [(layer.name, layer.leaves[:2]) for layer in layers] == [("w0", ("w0", "b0")), ("w1", ("w1", "b1"))]


@pytest.mark.parametrize(
    ("leaves", "kind"),
    [
        ({"kernel": (3, 2), "bias": (2,)}, "dense"),
        ({"weight": (2, 3), "bias": (2,)}, "dense"),  # by its name read as (out, in), and the bias agrees
        ({"weight": (3, 2), "bias": (2,)}, "other"),
        ({"kernel": (2, 3), "bias": (2,)}, "other"),
        ({"scale": (3,), "bias": (3,)}, "norm"),
        ({"a": (3, 2), "b": (2, 3)}, "other"),
    ],
)
def test_plain_kinds_are_only_claimed_when_certain(leaves, kind):
    params = {"layer": {name: np.ones(shape) for name, shape in leaves.items()}}
    network = as_network(lambda p, x: x[:, :1] + sum(leaf.sum() for leaf in jax.tree.leaves(p)), params=params)
    assert network.layers(X)[0].kind == kind


@pytest.mark.parametrize("keyword", ["key", "rng"])
def test_plain_function_gets_the_key_in_training_only(keyword):
    scope = {"jax": jax}
    exec(f"def f(p, x, {keyword}=0): return x @ p if {keyword} is None else jax.random.normal({keyword}, (4,))", scope)
    network = as_network(scope["f"], params=jnp.ones((3, 1)))
    assert network.has_dropout
    params, state = network.init(KEY, X)
    np.testing.assert_allclose(network.apply(params, state, X), X.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(network.apply(params, state, X, key=KEY)[:, 0], jax.random.normal(KEY, (4,)))


def test_plain_arrays_are_copied_and_other_leaves_passed_on():
    weight = np.ones((3, 1), np.float32)
    network = as_network((lambda p, x: getattr(jnp, p["name"])(x @ p["w"]), {"name": "tanh", "w": weight}))
    weight[:] = 5
    np.testing.assert_array_equal(network.pretrained["w"], 1)
    np.testing.assert_allclose(network.apply(*network.init(KEY, X), X), jnp.tanh(X.sum(1, keepdims=True)), atol=1e-6)


def test_two_heads_pass_through():
    def heads(params, x):
        return x @ params["mean"], jnp.exp(x @ params["log_std"])

    network = as_network(heads, params={"mean": jnp.ones((3, 1)), "log_std": jnp.zeros((3, 1))})
    outputs = network.apply(*network.init(KEY, X), X)
    assert isinstance(outputs, tuple) and [part.shape for part in outputs] == [(6, 1), (6, 1)]
    assert [layer.name for layer in network.layers(X)] == ["mean", "log_std"]


class Tokens(eqx.Module):
    embed: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __call__(self, tokens):
        return self.head(jax.vmap(self.embed)(tokens).mean(0))


def test_first_layer_an_embedding_means_tokens():
    class NNXTokens(nnx.Module):
        def __init__(self, rngs):
            self.words = nnx.Embed(7, 4, rngs=rngs)
            self.a_head = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, tokens):
            return self.a_head(self.words(tokens).mean(1))

    tokens = jnp.array([[1, 2], [3, 6]])
    for module in (NNXTokens(nnx.Rngs(0)), Tokens(eqx.nn.Embedding(7, 4, key=KEY), eqx.nn.Linear(4, 1, key=KEY))):
        network = as_network(module)
        assert network.input_spec == InputSpec(tokens=True, vocab_size=7)
        assert network.apply(*network.init(KEY, tokens), tokens).shape == (2, 1)
        assert [layer.kind for layer in network.layers(tokens)] == ["embedding", "dense"]
    assert as_network(EqxNet(KEY)).input_spec == InputSpec()


def test_declared_input_spec_wins():
    def embed(params, tokens):
        return params[tokens].mean(1)

    embed.input_spec = InputSpec(tokens=True, vocab_size=5)
    assert as_network(embed, params=jnp.ones((5, 2))).input_spec.vocab_size == 5


def test_linen_modules_are_accepted():
    network = as_network(nn.Dense(2))
    assert isinstance(network, Network) and network == as_network(nn.Dense(2)) and network.pretrained is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_network(3), "network=3 is not known.*linen.*NNX.*Equinox.*PyTorch.*apply_fn"),
        (lambda: as_network(nn.Dense), r"It is a class: construct it first, Dense\(…\)"),
        (lambda: as_network({"a.weight": np.ones(2)}), "load_torch_weights"),
        (lambda: as_network(plain), r"'plain' came without its parameters"),
        (lambda: as_network((nn.Dense(1), {})), "'Dense'.*deterministic_weights"),
        (lambda: as_network(nn.Dense(1), params={}), "'Dense'.*deterministic_weights"),
        (lambda: as_network((3, {})), "the first of the pair, 3, is not a function"),
        (lambda: as_network((plain, plain)), r"\(init_fn, apply_fn\)"),
    ],
)
def test_what_is_no_network_is_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_params_without_floats_are_refused():
    with pytest.raises(ParameterError, match="'plain' hold no float array"):
        FunctionNetwork(plain, {"a": np.arange(3)})


def test_dispatch_imports_no_framework():
    code = """
import sys
from neurobayes.networks import as_network
network = as_network((lambda p, x: x @ p, __import__("numpy").ones((2, 1))))
loaded = {"flax", "equinox", "torch"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
