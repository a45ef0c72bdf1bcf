"""The built-in architectures, alone and as networks, and linen modules written by others."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neurobayes import trees
from neurobayes.errors import DataError, OptionError
from neurobayes.networks.activations import ACTIVATIONS, get_activation
from neurobayes.networks.base import InputSpec
from neurobayes.networks.convnet import FlaxConvNet
from neurobayes.networks.linen import LinenNetwork
from neurobayes.networks.mlp import FlaxMLP
from neurobayes.networks.transformer import FlaxTransformer

KEY = jax.random.key(0)


def small_transformer(**options):
    options = {"d_model": 8, "num_heads": 2, "num_layers": 1, "mlp_dim": 12, "pad_token": 0} | options
    return FlaxTransformer(vocab_size=11, max_length=6, target_dim=2, **options)


def normal(*shape):
    return jax.random.normal(jax.random.key(7), shape)


def init(network, x):
    """Random weights and positive statistics of the right shapes, without compiling anything."""
    rng = np.random.default_rng(5)
    params, state = jax.eval_shape(network.init, KEY, x)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), params)
    return params, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), state)


# Compiled, and shared by equal networks: eager calls would compile every operation by itself.
@functools.partial(jax.jit, static_argnums=0)
def apply(network, params, state, x, key=None):
    return network.apply(params, state, x, key=key)


@functools.partial(jax.jit, static_argnums=0)
def gradient_of_squares(network, params, state, x):
    return jax.grad(lambda p: (network.apply(p, state, x) ** 2).sum())(params)


TOKENS = jnp.array([[3, 7, 1, 9], [5, 2, 10, 4], [8, 6, 0, 0]])

# (module, inputs of three rows, names of its layers in order)
CASES = {
    "mlp": (FlaxMLP([5, 4], 2), normal(3, 6), ["Dense0", "Dense1", "Dense2"]),
    "linear": (FlaxMLP([], 2), normal(3, 6), ["Dense0"]),
    "conv1d": (FlaxConvNet(1, [3, 4], [5], 2), normal(3, 9, 2), ["Conv0", "Conv1", "Dense0", "Dense1"]),
    "conv2d": (FlaxConvNet(2, [3, 4], [], 2, pool="avg"), normal(3, 7, 1, 2), ["Conv0", "Conv1", "Dense0"]),
    "conv3d": (
        FlaxConvNet(3, [2], [4], 2, kernel_size=(1, 2, 3)),
        normal(3, 3, 5, 1, 1),
        ["Conv0", "Dense0", "Dense1"],
    ),
    "transformer": (
        small_transformer(num_layers=2),
        TOKENS,
        ["TokenEmbed", "PosEmbed"]
        + [
            f"Block{i}_{part}"
            for i in range(2)
            for part in ("Attention", "LayerNorm1", "MLP_dense1", "MLP_dense2", "LayerNorm2")
        ]
        + ["FinalDense1", "FinalDense2"],
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


class TestActivations:
    def test_every_name_is_a_finite_elementwise_function(self):
        x = jnp.linspace(-3.0, 3.0, 7)
        for name in ACTIVATIONS:
            y = get_activation(name)(x)
            assert y.shape == x.shape and jnp.isfinite(y).all(), name

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("tanh", np.tanh(1.5)),
            ("relu", 1.5),
            ("silu", 1.5 / (1 + np.exp(-1.5))),
            ("swish", 1.5 / (1 + np.exp(-1.5))),
            ("sigmoid", 1 / (1 + np.exp(-1.5))),
            ("softplus", np.log1p(np.exp(1.5))),
            ("mish", 1.5 * np.tanh(np.log1p(np.exp(1.5)))),
            ("sin", np.sin(1.5)),
            ("identity", 1.5),
        ],
    )
    def test_values(self, name, expected):
        np.testing.assert_allclose(get_activation(name)(jnp.float32(1.5)), expected, rtol=1e-6)

    def test_a_callable_is_taken_as_it_is(self):
        assert get_activation(jnp.cos) is jnp.cos

    def test_unknown_name_raises_with_the_nearest_and_all_known(self):
        with pytest.raises(OptionError, match="closest: 'tanh'") as caught:
            FlaxMLP([4], 1, activation="tahn")
        assert all(name in str(caught.value) for name in ACTIVATIONS)

    @pytest.mark.parametrize(
        "build", [lambda a: FlaxConvNet(1, [2], [], 1, activation=a), lambda a: small_transformer(activation=a)]
    )
    @pytest.mark.parametrize("activation", ["nope", None, 3])
    def test_unknown_activation_raises_in_every_architecture(self, build, activation):
        with pytest.raises(OptionError, match="activation="):
            build(activation)

    @pytest.mark.parametrize("function", [jax.nn.silu, jax.nn.relu, jnp.tanh])
    @pytest.mark.parametrize(
        "build",
        [
            lambda a: FlaxMLP([4], 1, activation=a),
            lambda a: FlaxConvNet(1, [2], [], 1, activation=a),
            lambda a: small_transformer(activation=a),
        ],
        ids=["mlp", "convnet", "transformer"],
    )
    def test_known_functions_are_kept_by_name_and_can_be_pickled(self, build, function):
        name = next(name for name in ACTIVATIONS if ACTIVATIONS[name] is function)
        network = build(function)
        assert pickle.loads(pickle.dumps(network)) == network == build(name)
        assert hash(network) == hash(build(name))

    def test_the_activation_is_used(self):
        x = normal(3, 6)
        outputs = []
        for activation in ("tanh", "relu", jnp.tanh):
            network = LinenNetwork(FlaxMLP([5], 1, activation=activation))
            outputs.append(apply(network, *init(network, x), x))
        assert (outputs[0] == outputs[2]).all()
        assert not jnp.allclose(outputs[0], outputs[1])


class TestModules:
    def test_equal_by_value_and_hashable(self):
        assert FlaxMLP([64, 32], 1) == FlaxMLP((64, 32), 1) == FlaxMLP(np.array([64, 32]), np.int64(1))
        assert len({FlaxMLP([64, 32], 1), FlaxMLP((64, 32), 1), FlaxMLP(np.array([64, 32]), 1)}) == 1
        assert FlaxMLP([64, 32], 1) != FlaxMLP([64, 32], 2)
        assert FlaxConvNet(2, [4], [8], 1, kernel_size=3) == FlaxConvNet(2, (4,), (8,), 1, kernel_size=[3, 3])
        assert hash(small_transformer()) == hash(small_transformer()) != hash(small_transformer(pad_token=None))

    def test_arguments_are_not_changed(self):
        hidden_dims = [5, 4]
        FlaxMLP(hidden_dims, 1)
        assert hidden_dims == [5, 4]

    def test_pickle_gives_an_equal_module_that_works(self, case):
        module, x, _ = case
        copy = pickle.loads(pickle.dumps(module))
        assert copy == module and hash(copy) == hash(module)
        network = LinenNetwork(copy)
        assert apply(network, *init(network, x), x).shape == (3, 2)

    def test_example_inputs_fit_the_network_and_differ_only_in_open_sizes(self, case):
        module = case[0]
        first, second = (trees.shapes(jax.eval_shape(module.init, KEY, x)["params"]) for x in module.example_inputs())
        assert first.keys() == second.keys()
        differ = {path for path in first if first[path] != second[path]}
        opened = {
            "FlaxMLP": {"Dense0.kernel"},
            "FlaxConvNet": {"Conv0.kernel", "Dense0.kernel"},
            "FlaxTransformer": set(),
        }
        assert differ == opened[type(module).__name__]

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: FlaxMLP([4, 0], 1), r"hidden_dims\[1\]=0"),
            (lambda: FlaxMLP([4, -2], 1), r"hidden_dims\[1\]=-2"),
            (lambda: FlaxMLP([4.5], 1), r"hidden_dims\[0\]=4.5"),
            (lambda: FlaxMLP([True], 1), r"hidden_dims\[0\]=True"),
            (lambda: FlaxMLP(64, 1), "hidden_dims=64 must be a sequence"),
            (lambda: FlaxMLP("64", 1), "hidden_dims='64' must be a sequence"),
            (lambda: FlaxMLP([4], 0), "target_dim=0"),
            (lambda: FlaxMLP([4], 1.0), "target_dim=1.0"),
            (lambda: FlaxMLP([4], 1, dropout_rate=1.0), "dropout_rate=1.0"),
            (lambda: FlaxMLP([4], 1, dropout_rate=-0.1), "dropout_rate=-0.1"),
            (lambda: FlaxMLP([4], 1, dropout_rate=float("nan")), "dropout_rate=nan"),
            (lambda: FlaxMLP([4], 1, dropout_rate=None), "dropout_rate=None"),
            (lambda: FlaxConvNet(0, [4], [], 1), "input_dim=0"),
            (lambda: FlaxConvNet(4, [4], [], 1), "input_dim=4"),
            (lambda: FlaxConvNet(2, [], [4], 1), "conv_layers="),
            (lambda: FlaxConvNet(2, [4], [0], 1), r"fc_layers\[0\]=0"),
            (lambda: FlaxConvNet(2, [4], [], 0), "target_dim=0"),
            (lambda: FlaxConvNet(2, [4], [], 1, kernel_size=0), "kernel_size=0"),
            (lambda: FlaxConvNet(2, [4], [], 1, kernel_size=(3, 3, 3)), "each of the 2 spatial axes"),
            (lambda: FlaxConvNet(2, [4], [], 1, pool="mix"), "pool='mix' is not known.*(closest: 'max')"),
            (lambda: FlaxConvNet(2, [4], [], 1, dropout_rate=2), "dropout_rate=2"),
            (lambda: small_transformer(num_heads=3), "num_heads=3 does not divide d_model=8"),
            (lambda: small_transformer(num_layers=0), "num_layers=0"),
            (lambda: small_transformer(mlp_dim=-1), "mlp_dim=-1"),
            (lambda: small_transformer(pad_token=11), "pad_token=11 is not below vocab_size=11"),
            (lambda: small_transformer(pad_token=-1), "pad_token=-1"),
            (lambda: small_transformer(dropout_rate=1), "dropout_rate=1"),
            (lambda: FlaxTransformer(0, 4, 1), "vocab_size=0"),
            (lambda: FlaxTransformer(5, 0, 1), "max_length=0"),
        ],
    )
    def test_a_bad_argument_raises_at_construction(self, build, message):
        with pytest.raises(OptionError, match=message):
            build()


class TestAsNetwork:
    def test_layers_in_execution_order_with_every_leaf_once(self, case):
        module, x, names = case
        network = LinenNetwork(module)
        layers = network.layers(x)
        assert [layer.name for layer in layers] == names
        leaves = [leaf for layer in layers for leaf in layer.leaves]
        assert sorted(leaves) == sorted(trees.flatten(init(network, x)[0]))

    def test_kinds(self):
        kinds = {layer.name: layer.kind for layer in LinenNetwork(small_transformer(num_layers=2)).layers(TOKENS)}
        assert kinds["TokenEmbed"] == kinds["PosEmbed"] == "embedding"
        assert kinds["Block0_Attention"] == "attention"
        assert kinds["Block1_LayerNorm2"] == "norm"
        assert kinds["Block1_MLP_dense2"] == kinds["FinalDense2"] == "dense"
        conv = LinenNetwork(FlaxConvNet(1, [2], [], 1)).layers(normal(1, 4, 1))
        assert [layer.kind for layer in conv] == ["conv", "dense"]

    def test_attention_is_one_layer_with_its_four_projections(self):
        layers = {layer.name: layer for layer in LinenNetwork(small_transformer()).layers(TOKENS)}
        assert set(layers["Block0_Attention"].leaves) == {
            f"Block0_Attention.{projection}.{leaf}"
            for projection in ("query", "key", "value", "out")
            for leaf in ("kernel", "bias")
        }

    def test_output_shape_and_no_state_for_any_number_of_rows(self, case):
        module, x, _ = case
        network = LinenNetwork(module)
        params, state = init(network, x)
        assert not state
        for num_rows in (1, 3):
            assert jax.eval_shape(network.apply, params, state, x[:num_rows]).shape == (num_rows, 2)

    def test_fresh_weights_follow_the_key(self):
        network = LinenNetwork(FlaxMLP([5], 1))
        x = normal(3, 6)
        first, again, other = (network.init(jax.random.key(i), x)[0]["Dense0"]["kernel"] for i in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert jnp.isfinite(first).all() and not jnp.allclose(first, other)

    def test_rows_do_not_leak_into_each_other(self, case):
        module, x, _ = case
        network = LinenNetwork(module)
        params, state = init(network, x)
        together = apply(network, params, state, x)
        alone = jnp.concatenate([apply(network, params, state, x[i : i + 1]) for i in range(3)])
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
        changed = apply(network, params, state, x.at[1].set(x[0]))
        np.testing.assert_allclose(changed[2], together[2], rtol=1e-4, atol=1e-6)
        assert not jnp.allclose(changed[1], together[1])

    def test_every_weight_the_data_reaches_has_a_finite_gradient(self, case):
        module, x, _ = case
        network = LinenNetwork(module)
        params, state = init(network, x)
        gradient = trees.flatten(gradient_of_squares(network, params, state, x))
        for path, leaf in gradient.items():
            assert jnp.isfinite(leaf).all(), path
            # A bias common to all keys shifts every attention logit alike, which softmax ignores.
            assert jnp.abs(leaf).max() > 0 or path.endswith("key.bias"), path

    def test_dropout_only_with_a_key(self, case):
        module, x, _ = case
        network = LinenNetwork(module.clone(dropout_rate=0.5))
        params, state = init(network, x)
        plain = apply(network, params, state, x)
        np.testing.assert_array_equal(plain, apply(LinenNetwork(module), params, state, x))
        np.testing.assert_array_equal(plain, apply(network, params, state, x))
        first, again, second = (apply(network, params, state, x, key=jax.random.key(i)) for i in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        if getattr(module, "hidden_dims", True):  # a linear model has no hidden units to drop
            assert not jnp.allclose(first, plain)
            assert not jnp.allclose(first, second)

    def test_without_dropout_a_key_changes_nothing(self, case):
        module, x, _ = case
        network = LinenNetwork(module)
        assert not network.has_dropout
        assert LinenNetwork(module.clone(dropout_rate=0.1)).has_dropout
        params, state = init(network, x)
        np.testing.assert_array_equal(apply(network, params, state, x, key=KEY), apply(network, params, state, x))

    def test_dropout_keeps_the_mean_of_a_hidden_layer(self):
        x, rate, draws = normal(1, 6), 0.3, 2000
        network = LinenNetwork(FlaxMLP([50], 1, dropout_rate=rate))
        params, state = init(network, x)
        outputs = apply(network, params, state, jnp.tile(x, (draws, 1)), key=KEY).ravel()
        standard_error = outputs.std() / jnp.sqrt(draws)
        assert abs(outputs.mean() - apply(network, params, state, x)[0, 0]) < 4 * standard_error

    def test_input_spec(self):
        assert LinenNetwork(FlaxMLP([4], 1)).input_spec == InputSpec()
        assert LinenNetwork(FlaxConvNet(3, [4], [], 1)).input_spec == InputSpec(spatial_dims=3)
        assert LinenNetwork(small_transformer()).input_spec == InputSpec(
            tokens=True, vocab_size=11, max_length=6, pad_token=0
        )

    def test_equal_networks_share_one_compiled_program(self):
        traces = []

        def outputs(network, params, x):
            traces.append(network)
            return network.apply(params, {}, x)

        compiled = jax.jit(outputs, static_argnums=0)
        x = normal(2, 6)
        params, _ = init(LinenNetwork(FlaxMLP([5], 1)), x)
        for hidden_dims in ([5], (5,), np.array([5])):
            compiled(LinenNetwork(FlaxMLP(hidden_dims, 1)), params, x)
        assert len(traces) == 1


class TestMLP:
    def test_matches_numpy(self):
        network = LinenNetwork(FlaxMLP([5, 4], 2))
        x = normal(3, 6)
        params, state = init(network, x)
        h = np.asarray(x)
        for i in range(3):
            h = h @ np.asarray(params[f"Dense{i}"]["kernel"]) + np.asarray(params[f"Dense{i}"]["bias"])
            h = np.tanh(h) if i < 2 else h
        np.testing.assert_allclose(apply(network, params, state, x), h, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("shape", [(6,), (3, 6, 2)])
    def test_wrong_number_of_axes_raises(self, shape):
        with pytest.raises(DataError, match=r"\(n, features\)"):
            FlaxMLP([5], 1).init(KEY, jnp.zeros(shape))


class TestConvNet:
    @pytest.mark.parametrize("pool", ["max", "avg"])
    @pytest.mark.parametrize("input_dim", [1, 2, 3])
    @pytest.mark.parametrize("size", [1, 5])
    def test_odd_sizes_and_sizes_of_one_work(self, input_dim, size, pool):
        network = LinenNetwork(FlaxConvNet(input_dim, [2, 3], [], 1, pool=pool))
        x = normal(2, *[size] * input_dim, 1)
        params, state = init(network, x)
        after_two_poolings = -(-size // 4)
        assert params["Dense0"]["kernel"].shape == (3 * after_two_poolings**input_dim, 1)
        assert jax.eval_shape(network.apply, params, state, x).shape == (2, 1)
        if size == 1 or input_dim == 2:
            assert jnp.isfinite(apply(network, params, state, x)).all()

    @pytest.mark.parametrize("input_dim", [1, 2, 3])
    def test_a_missing_channel_axis_is_one_channel(self, input_dim):
        network = LinenNetwork(FlaxConvNet(input_dim, [2], [3], 1))
        x = normal(2, *[5] * input_dim)
        params, state = init(network, x)
        np.testing.assert_array_equal(apply(network, params, state, x), apply(network, params, state, x[..., None]))

    def test_largest_of_a_window_and_its_derivative(self):
        network = FlaxConvNet(2, [1], [], 1)
        x = jax.random.normal(jax.random.key(0), (3, 5, 4, 2))

        def windows(x):
            return nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")

        np.testing.assert_array_equal(network._halve(x), windows(x))
        found, expected = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (network._halve, windows))
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    @pytest.mark.parametrize(("pool", "pooled"), [("max", [3.0, 7.0, -2.0]), ("avg", [2.0, 6.0, -2.0])])
    def test_pooling_halves_and_leaves_padding_out(self, pool, pooled):
        x = jnp.array([[1.0, 3.0, 5.0, 7.0, -2.0]])
        network = LinenNetwork(FlaxConvNet(1, [1], [], 3, kernel_size=1, pool=pool, activation="identity"))
        params = {
            "Conv0": {"kernel": jnp.ones((1, 1, 1)), "bias": jnp.zeros(1)},
            "Dense0": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
        }
        np.testing.assert_allclose(apply(network, params, {}, x), [pooled], rtol=1e-6)

    @pytest.mark.parametrize(("input_dim", "axes"), [(1, "length"), (2, "height, width"), (3, "depth, height, width")])
    def test_wrong_number_of_axes_says_what_is_wanted(self, input_dim, axes):
        module = FlaxConvNet(input_dim, [2], [], 1)
        for num_axes in (input_dim, input_dim + 3):
            with pytest.raises(DataError, match=rf"\(n, {axes}, channels\) or \(n, {axes}\)"):
                module.init(KEY, jnp.zeros((2,) * num_axes))


class TestTransformer:
    def test_padding_at_the_end_changes_nothing(self):
        network = LinenNetwork(small_transformer())
        tokens = TOKENS[:2]
        params, state = init(network, tokens)
        plain = apply(network, params, state, tokens)
        for extra in (1, 2):
            padded = jnp.pad(tokens, ((0, 0), (0, extra)))
            np.testing.assert_allclose(apply(network, params, state, padded), plain, rtol=1e-4, atol=1e-6)

    def test_without_a_pad_token_every_token_counts(self):
        network = LinenNetwork(small_transformer(pad_token=None))
        params, state = init(network, TOKENS)
        plain = apply(network, params, state, TOKENS)
        assert not jnp.allclose(apply(network, params, state, jnp.pad(TOKENS, ((0, 0), (0, 1)))), plain, atol=1e-3)

    def test_the_padding_embedding_is_never_used(self):
        network = LinenNetwork(small_transformer())
        params, state = init(network, TOKENS)
        gradient = gradient_of_squares(network, params, state, TOKENS)
        assert (gradient["TokenEmbed"]["embedding"][0] == 0).all()

    def test_a_row_of_padding_is_finite_with_finite_gradient(self):
        network = LinenNetwork(small_transformer())
        tokens = TOKENS.at[1].set(0)
        params, state = init(network, tokens)
        outputs = apply(network, params, state, tokens)
        assert jnp.isfinite(outputs).all()
        gradient = gradient_of_squares(network, params, state, tokens)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        alone = apply(network, params, state, jnp.zeros((1, 2), jnp.int32))
        np.testing.assert_allclose(outputs[1], alone[0], rtol=1e-5, atol=1e-6)

    def test_the_mean_over_tokens_comes_before_the_head(self):
        network = LinenNetwork(small_transformer(num_layers=1))
        params, state = init(network, TOKENS)
        _, recorded = network.module.apply(
            {"params": params}, TOKENS, capture_intermediates=lambda module, _: module.name == "Block0_LayerNorm2"
        )
        h = np.asarray(recorded["intermediates"]["Block0_LayerNorm2"]["__call__"][0])
        is_token = np.asarray(TOKENS != 0)
        pooled = np.stack([row[kept].mean(0) for row, kept in zip(h, is_token, strict=True)])
        head = [{name: np.asarray(leaf) for name, leaf in params[f"FinalDense{i}"].items()} for i in (1, 2)]
        hidden = np.maximum(pooled @ head[0]["kernel"] + head[0]["bias"], 0)
        expected = hidden @ head[1]["kernel"] + head[1]["bias"]
        np.testing.assert_allclose(apply(network, params, state, TOKENS), expected, rtol=1e-4, atol=1e-6)

    def test_order_of_tokens_matters(self):
        network = LinenNetwork(small_transformer())
        params, state = init(network, TOKENS)
        reordered = apply(network, params, state, TOKENS[:2, ::-1])
        assert not jnp.allclose(reordered, apply(network, params, state, TOKENS[:2]), atol=1e-3)

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (jnp.zeros((2, 3)), "integer token ids, got float32"),
            (jnp.zeros((2, 7), jnp.int32), "max_length=6"),
            (jnp.zeros((2, 0), jnp.int32), r"got \(2, 0\)"),
            (jnp.zeros(3, jnp.int32), r"\(n, length\)"),
        ],
    )
    def test_inputs_that_do_not_fit_raise(self, tokens, message):
        with pytest.raises(DataError, match=message):
            small_transformer().init(KEY, tokens)


class Encoder(nn.Module):
    """Submodules defined in the reverse of the order in which they are called."""

    def setup(self):
        self.second = nn.Dense(3)
        self.first = nn.Dense(4)

    def __call__(self, x):
        return self.second(nn.relu(self.first(x)))


class Nested(nn.Module):
    """Setup style, with running statistics and a train flag that has no default."""

    def setup(self):
        self.head = nn.Dense(2)
        self.norm = nn.BatchNorm()
        self.encoder = Encoder()

    def __call__(self, x, train: bool):
        return self.head(self.norm(self.encoder(x), use_running_average=not train))


class TrainFlag(nn.Module):
    """Dropout governed by a train flag, without running statistics."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(20)(x))
        return nn.Dense(1)(x)


class ListOfWidths(nn.Module):
    """A list attribute, which cannot be hashed, and one layer called twice in a loop."""

    widths: list[int]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        shared = nn.Dense(self.widths[-1], name="shared")
        for _ in range(2):
            x = nn.tanh(shared(x))
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * nn.Dense(1, name="out")(x)


class TestForeignModules:
    def test_setup_style_layers_are_listed_as_called(self):
        layers = LinenNetwork(Nested()).layers(normal(3, 6))
        assert [(layer.name, layer.kind) for layer in layers] == [
            ("encoder.first", "dense"),
            ("encoder.second", "dense"),
            ("norm", "norm"),
            ("head", "dense"),
        ]
        assert set(layers[0].leaves) == {"encoder.first.kernel", "encoder.first.bias"}

    def test_running_statistics_are_state_and_stay_frozen(self):
        network = LinenNetwork(Nested())
        x = normal(3, 6)
        params, state = init(network, x)
        assert set(state) == {"batch_stats"}
        assert set(params) == {"encoder", "norm", "head"}
        plain = apply(network, params, state, x)
        np.testing.assert_array_equal(apply(network, params, state, x, key=KEY), plain)
        np.testing.assert_allclose(apply(network, params, state, x[:1]), plain[:1], rtol=1e-5)
        shifted = jax.tree.map(lambda leaf: leaf + 1.0, state)
        assert not jnp.allclose(apply(network, params, shifted, x), plain)

    def test_a_train_flag_switches_dropout_where_there_are_no_running_statistics(self):
        network = LinenNetwork(TrainFlag())
        x = normal(3, 6)
        params, state = init(network, x)
        plain = apply(network, params, state, x)
        np.testing.assert_array_equal(plain, apply(network, params, state, x))
        assert not jnp.allclose(apply(network, params, state, x, key=KEY), plain)

    def test_a_list_attribute_and_a_shared_layer(self):
        network = LinenNetwork(ListOfWidths([4, 3]))
        assert hash(network) == hash(LinenNetwork(ListOfWidths([4, 3])))
        assert network == LinenNetwork(ListOfWidths([4, 3])) != LinenNetwork(ListOfWidths([5, 3]))
        x = normal(3, 6)
        layers = network.layers(x)
        assert [layer.name for layer in layers if layer.name] == ["Dense_0", "Dense_1", "shared", "out"]
        assert [layer.leaves for layer in layers if not layer.name] == [("scale",)]
        params, state = init(network, x)
        assert apply(network, params, state, x).shape == (3, 1)
