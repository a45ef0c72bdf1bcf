"""PyTorch weights in our Flax networks, against a NumPy account of what PyTorch computes."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from neurobayes import trees
from neurobayes.errors import OptionError, ParameterError
from neurobayes.networks import load_torch_weights
from neurobayes.networks.convnet import FlaxConvNet
from neurobayes.networks.mlp import FlaxMLP
from neurobayes.networks.transformer import FlaxTransformer

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32) / 2


def linear(name, num_in, num_out):
    return {f"{name}.weight": draw(num_out, num_in), f"{name}.bias": draw(num_out)}


def torch_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp_state(names=("body.0", "body.2", "body.4"), sizes=(3, 4, 5, 2)):
    layers = zip(names, itertools.pairwise(sizes), strict=True)
    return {key: value for name, (i, o) in layers for key, value in linear(name, i, o).items()}


def mlp():
    return FlaxMLP(hidden_dims=[4, 5], target_dim=2)


def torch_mlp(x, state, names=("body.0", "body.2", "body.4")):
    for name in names[:-1]:
        x = np.tanh(torch_linear(x, state, name))
    return torch_linear(x, state, names[-1])


def run(network, params, x):
    return np.asarray(network.apply({"params": params}, jnp.asarray(x)))


def test_mlp_computes_what_pytorch_computes():
    state, x = mlp_state(), draw(6, 3)
    params = load_torch_weights(mlp(), state, input_shape=3)
    assert jax.tree.structure(params) == jax.tree.structure(mlp().init(jax.random.key(0), x)["params"])
    np.testing.assert_allclose(run(mlp(), params, x), torch_mlp(x, state), atol=1e-5)
    again = load_torch_weights(mlp(), state, x_example=x)
    assert trees.shapes(again) == trees.shapes(params)


def torch_conv(x, state, name):
    """Cross-correlation with 'same' padding of ``x`` (n, channels, *spatial), odd kernels."""
    weight = state[f"{name}.weight"]
    window = weight.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *((k // 2, k // 2) for k in window)])
    out = np.zeros((len(x), len(weight), *x.shape[2:]), np.float32)
    for offset in np.ndindex(*window):
        part = padded[(..., *(slice(o, o + size) for o, size in zip(offset, x.shape[2:], strict=True)))]
        out += np.einsum("nc...,oc->no...", part, weight[(..., *offset)])
    return out + state[f"{name}.bias"].reshape(-1, *[1] * len(window))


def halved(x):
    """Max pooling by 2 of even spatial sizes."""
    for axis in range(2, x.ndim):
        x = np.maximum(np.take(x, range(0, x.shape[axis], 2), axis), np.take(x, range(1, x.shape[axis], 2), axis))
    return x


@pytest.mark.parametrize("spatial", [(8,), (4, 6), (2, 4, 6)], ids=["1d", "2d", "3d"])
def test_convnet_computes_what_pytorch_computes(spatial):
    window = (3, 5, 1)[: len(spatial)]
    num_cells = int(np.prod(spatial)) // 2 ** len(spatial)
    state = {
        "conv.weight": draw(3, 2, *window),
        "conv.bias": draw(3),
        **linear("fc", 3 * num_cells, 4),
        **linear("out", 4, 1),
    }
    x = draw(5, 2, *spatial)
    hidden = halved(np.tanh(torch_conv(x, state, "conv"))).reshape(5, -1)
    expected = torch_linear(np.tanh(torch_linear(hidden, state, "fc")), state, "out")
    network = FlaxConvNet(input_dim=len(spatial), conv_layers=[3], fc_layers=[4], target_dim=1, kernel_size=window)
    params = load_torch_weights(network, state, input_shape=(*spatial, 2))
    np.testing.assert_allclose(run(network, params, np.moveaxis(x, 1, -1)), expected, atol=1e-5)


def transformer_state(d=4, ff=6, vocab=11, length=5):
    """Defined in PyTorch's order, which is not that of the calls; the position table is a bare parameter."""
    state = {"pos": draw(1, length, d), "tok.weight": draw(vocab, d)}
    for i in range(2):
        block = f"blocks.{i}"
        state |= {f"{block}.self_attn.in_proj_weight": draw(3 * d, d), f"{block}.self_attn.in_proj_bias": draw(3 * d)}
        state |= linear(f"{block}.self_attn.out_proj", d, d)
        state |= linear(f"{block}.linear1", d, ff) | linear(f"{block}.linear2", ff, d)
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": 1 + draw(d), f"{block}.{norm}.bias": draw(d)}
    return state | linear("pre", d, d) | linear("head", d, 2)


def torch_attention(x, state, name, num_heads):
    n, length, d = x.shape
    packed = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    query, key, value = (
        part.reshape(n, length, num_heads, d // num_heads).transpose(0, 2, 1, 3) for part in np.split(packed, 3, -1)
    )
    logits = np.exp(query @ key.transpose(0, 1, 3, 2) / np.sqrt(d // num_heads))
    mixed = (logits / logits.sum(-1, keepdims=True)) @ value
    return torch_linear(mixed.transpose(0, 2, 1, 3).reshape(n, length, d), state, f"{name}.out_proj")


def torch_norm(x, state, name):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def torch_transformer(tokens, state):
    x = state["tok.weight"][tokens] + state["pos"][0]
    for i in range(2):
        block = f"blocks.{i}"
        x = torch_norm(x + torch_attention(x, state, f"{block}.self_attn", 2), state, f"{block}.norm1")
        hidden = np.maximum(torch_linear(x, state, f"{block}.linear1"), 0)
        x = torch_norm(x + torch_linear(hidden, state, f"{block}.linear2"), state, f"{block}.norm2")
    return torch_linear(np.maximum(torch_linear(x.mean(1), state, "pre"), 0), state, "head")


def transformer():
    return FlaxTransformer(vocab_size=11, max_length=5, target_dim=2, d_model=4, num_heads=2, num_layers=2, mlp_dim=6)


def test_transformer_computes_what_pytorch_computes():
    state, tokens = transformer_state(), RNG.integers(0, 11, (3, 5)).astype(np.int32)
    params = load_torch_weights(transformer(), state)
    np.testing.assert_allclose(run(transformer(), params, tokens), torch_transformer(tokens, state), atol=2e-5)


def test_safetensors_file_in_another_order(tmp_path):
    state, x = mlp_state(("net.2", "net.8", "net.10"), (3, 4, 4, 4)), draw(6, 3)
    save_file(state, tmp_path / "model.safetensors")
    network = FlaxMLP(hidden_dims=[4, 4], target_dim=4)
    params = load_torch_weights(network, tmp_path / "model.safetensors", input_shape=(3,))
    np.testing.assert_allclose(run(network, params, x), torch_mlp(x, state, ("net.2", "net.8", "net.10")), atol=1e-5)


def test_safetensors_transformer_equals_state_dict(tmp_path):
    state = transformer_state()
    save_file(state, tmp_path / "model.safetensors")
    from_file = load_torch_weights(transformer(), str(tmp_path / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, from_file, load_torch_weights(transformer(), state))


def test_layers_told_apart_by_a_word_only_have_no_order_in_a_file(tmp_path):
    save_file(mlp_state(("first", "second", "last"), (4, 4, 4, 4)), tmp_path / "m.safetensors")
    with pytest.raises(ParameterError, match=r"unknown order: .*first.* name them in name_map"):
        load_torch_weights(FlaxMLP([4, 4], 4), tmp_path / "m.safetensors", 4)


def test_ambiguous_order_is_settled_by_name_map(tmp_path):
    names = ("first", "second", "last")
    state, x = mlp_state(names, (4, 4, 4, 4)), draw(6, 4)
    save_file(state, tmp_path / "m.safetensors")
    name_map = {"first": "Dense0", "second": "Dense1", "last": "Dense2"}
    network = FlaxMLP([4, 4], 4)
    params = load_torch_weights(network, tmp_path / "m.safetensors", 4, name_map=name_map)
    np.testing.assert_allclose(run(network, params, x), torch_mlp(x, state, names), atol=1e-5)


def test_name_map_for_layers_tensors_and_extras():
    state, x = mlp_state(), draw(6, 3)
    renamed = {
        "odd_bias": state["body.0.bias"],
        "odd_weight": state["body.0.weight"],
        "extra.scale": draw(7),
        "aux.0.weight": draw(2, 2),
        **{name: value for name, value in reversed(state.items()) if not name.startswith("body.0")},
    }
    name_map = {
        "odd_weight": "Dense0.kernel",
        "odd_bias": "Dense0.bias",
        "body.2": "Dense1",
        "extra.scale": None,
        "aux": None,
    }
    params = load_torch_weights(mlp(), renamed, 3, name_map=name_map)
    np.testing.assert_allclose(run(mlp(), params, x), torch_mlp(x, state), atol=1e-5)


def test_every_mismatch_is_in_one_error():
    state = mlp_state(sizes=(3, 7, 5, 2))
    del state["body.4.bias"]
    state |= linear("body.6", 2, 2)
    with pytest.raises(ParameterError) as caught:
        load_torch_weights(mlp(), state, 3, name_map={"bodi.0": "Dense0", "body.6": "Dens"})
    message = str(caught.value)
    for part in (
        "body.0.weight (7, 3) gives (3, 7) for Dense0.kernel, which needs (3, 4)",
        "body.0.bias (7,) gives (7,) for Dense0.bias",
        "body.2.weight (5, 7) gives (7, 5) for Dense1.kernel, which needs (4, 5)",
        "missing, no PyTorch tensor for: Dense2.bias (2,)",
        "unexpected, no place for: body.6.weight (2, 2), body.6.bias (2,)",
        "name_map: 'bodi.0' is not in the PyTorch weights (closest: 'body.0')",
        "name_map: 'Dens' is no layer",
    ):
        assert part in message
    assert "Dense1.bias" not in message


def test_batch_norm_is_unexpected_not_taken_for_layer_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.LayerNorm()(x))

    state = {f"bn.{part}": draw(3) for part in ("weight", "bias", "running_mean", "running_var")} | linear("fc", 3, 1)
    with pytest.raises(ParameterError, match=r"missing.*LayerNorm_0.*\n.*unexpected.*bn\.running_mean"):
        load_torch_weights(Net(), state, 3)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(OptionError, match=r"safetensors\.torch\.save_file"):
        load_torch_weights(mlp(), tmp_path / name, 3)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 40])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(OptionError, match=r"'m\.safetensors' cannot be read as a safetensors file"):
        load_torch_weights(mlp(), tmp_path / "m.safetensors", 3)


def test_sources_and_shapes_that_are_no_use(tmp_path):
    with pytest.raises(OptionError, match="does not exist"):
        load_torch_weights(mlp(), tmp_path / "none.safetensors", 3)
    with pytest.raises(OptionError, match="state dict"):
        load_torch_weights(mlp(), 3.0, 3)
    with pytest.raises(OptionError, match=r"source\['body'\]"):
        load_torch_weights(mlp(), {"body": "text"}, 3)
    with pytest.raises(OptionError, match="input_shape"):
        load_torch_weights(mlp(), mlp_state())
    with pytest.raises(OptionError, match="input_shape"):
        load_torch_weights(mlp(), mlp_state(), 3, x_example=draw(2, 3))
