"""PyTorch modules in JAX: PyTorch's own outputs, names and weights, and the user's module untouched."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from neurobayes import trees
from neurobayes.networks import as_network, load_torch_weights
from neurobayes.networks.base import InputSpec
from neurobayes.networks.convnet import FlaxConvNet
from neurobayes.networks.transformer import FlaxTransformer

KEY = jax.random.key(0)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 1)
        self.up = torch.nn.Linear(3, 8)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.up(x)).mean(1)).squeeze(-1)


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))


def batch_norm():
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    with torch.no_grad():
        module(torch.tensor(draw(32, 3)))
    return module


def convnet():
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(24, 5),
        torch.nn.Tanh(),
        torch.nn.Linear(5, 1),
    )


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 5, batch_first=True)
        self.head = torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


CASES = {
    "mlp": (mlp, (6, 3)),
    "encoder": (Encoder, (6, 4, 3)),
    "batch_norm": (batch_norm, (6, 3)),
    "convnet": (convnet, (6, 2, 4, 6)),
    "lstm": (Recurrent, (6, 4, 3)),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, shape = CASES[request.param]
    return make(), draw(*shape)


def torch_outputs(module, x):
    with torch.no_grad():
        outputs = copy.deepcopy(module).eval()(torch.tensor(x)).numpy()
    return outputs.reshape(len(x), -1)


def test_prediction_is_pytorchs(case):
    module, x = case
    expected = torch_outputs(module, x)
    network = as_network(module)
    params, state = network.init(KEY, x)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(jax.jit(network.apply)(params, state, jnp.asarray(x)), expected, atol=1e-5)


def test_parameters_have_pytorchs_names_and_go_back(case):
    module, x = case
    network = as_network(module)
    params, state = network.init(KEY, x)
    assert set(params) == {name for name, _ in module.named_parameters()}
    assert set(state) == {name for name, _ in module.named_buffers()}
    owned = [leaf for layer in network.layers(x) for leaf in layer.leaves]
    assert sorted(owned) == sorted(params)
    moved = {name: leaf + 0.1 for name, leaf in params.items()}
    module.load_state_dict({name: torch.tensor(np.asarray(leaf)) for name, leaf in (moved | state).items()})
    expected = torch_outputs(module, x)
    np.testing.assert_allclose(network.apply(moved, state, jnp.asarray(x)), expected, atol=1e-5)


def test_gradient_is_pytorchs(case):
    module, x = case
    network = as_network(module)
    params, state = network.init(KEY, x)
    gradient = jax.grad(lambda p: (network.apply(p, state, jnp.asarray(x)) ** 2).sum())(params)
    reference = copy.deepcopy(module).eval()
    (reference(torch.tensor(x)) ** 2).sum().backward()
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(gradient[name], parameter.grad.numpy(), atol=1e-4, rtol=1e-4, err_msg=name)


def test_module_is_left_as_it_was(case):
    module, x = case
    module.train()
    before = copy.deepcopy(module.state_dict())
    network = as_network(module)
    network.apply(*network.init(KEY, x), jnp.asarray(x), key=KEY)
    assert all(child.training for child in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(tensor.is_meta for tensor in module.parameters())


def test_layers_in_order_of_calls():
    layers = as_network(Encoder()).layers(draw(2, 4, 3))
    per_block = ("self_attn", "norm1", "linear1", "linear2", "norm2")
    blocks = [f"encoder.layers.{i}.{name}" for i in range(2) for name in per_block]
    assert [layer.name for layer in layers] == ["up", *blocks, "head"]
    assert [layer.kind for layer in layers[:6]] == ["dense", "attention", "norm", "dense", "dense", "norm"]


def test_layers_without_any_input_in_order_of_definition():
    network = as_network(Encoder())
    known = network.layers(draw(2, 4, 3))
    listed = network.layers(None)
    assert sorted(listed, key=lambda layer: layer.name) == sorted(known, key=lambda layer: layer.name)
    assert [layer.name for layer in listed[:3]] == ["head", "up", "encoder.layers.0.self_attn"]


@pytest.mark.parametrize(("make", "shape"), [(mlp, (1, 3)), (Encoder, (1, 4, 3))], ids=["mlp", "encoder"])
def test_dropout_with_key_only(make, shape):
    network = as_network(make())
    x = jnp.asarray(draw(*shape))
    params, state = network.init(KEY, x)
    assert network.has_dropout
    with_key = jax.jit(lambda key: network.apply(params, state, x, key=key))
    np.testing.assert_array_equal(with_key(KEY), with_key(KEY))
    assert not np.allclose(with_key(KEY), with_key(jax.random.key(1)))
    np.testing.assert_array_equal(network.apply(params, state, x), network.apply(params, state, x))


def test_batch_statistics_are_used_and_never_updated():
    module = batch_norm()
    network = as_network(module)
    x = jnp.asarray(draw(6, 3))
    params, state = network.init(KEY, x)
    assert not network.has_dropout
    np.testing.assert_array_equal(network.apply(params, state, x, key=KEY), network.apply(params, state, x))
    shifted = state | {"1.running_mean": state["1.running_mean"] + 1}
    assert not np.allclose(network.apply(params, shifted, x), network.apply(params, state, x))


def test_equality_follows_the_module_and_its_weights():
    module = mlp()
    first = as_network(module)
    assert first == as_network(module) and hash(first) == hash(as_network(module))
    assert first != as_network(copy.deepcopy(module))
    weight = np.array(first.pretrained["0.weight"])
    with torch.no_grad():
        module[0].weight.add_(1.0)
    assert as_network(module) != first
    np.testing.assert_array_equal(first.pretrained["0.weight"], weight)
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor(weight))
    module[1] = torch.nn.ReLU()
    assert as_network(module) != first


def test_two_heads_pass_through():
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_std = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.mean(x), self.log_std(x)

    network = as_network(Heads())
    x = jnp.asarray(draw(4, 3))
    outputs = network.apply(*network.init(KEY, x), x)
    assert isinstance(outputs, tuple) and [part.shape for part in outputs] == [(4, 1), (4, 1)]


def test_tied_weights_appear_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    module, x = Tied(), draw(4, 3)
    network = as_network(module)
    params, state = network.init(KEY, x)
    assert sorted(params) == ["decode.bias", "encode.bias", "encode.weight"]
    doubled = params | {"encode.weight": 2 * params["encode.weight"]}
    with torch.no_grad():
        module.encode.weight.mul_(2)
    np.testing.assert_allclose(network.apply(doubled, state, jnp.asarray(x)), torch_outputs(module, x), atol=1e-5)


def test_first_layer_an_embedding_means_tokens():
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Flatten(), torch.nn.Linear(8, 1))
    tokens = np.array([[1, 2], [3, 6]], np.int32)
    network = as_network(module)
    assert network.input_spec == InputSpec(tokens=True, vocab_size=7)
    params, state = network.init(KEY, tokens)
    np.testing.assert_allclose(
        network.apply(params, state, jnp.asarray(tokens)), torch_outputs(module, tokens), atol=1e-5
    )


def test_state_dict_of_a_convnet_in_ours():
    module, x = convnet(), draw(6, 2, 4, 6)
    network = FlaxConvNet(input_dim=2, conv_layers=[4], fc_layers=[5], target_dim=1)
    params = load_torch_weights(network, module.state_dict(), input_shape=(4, 6, 2))
    outputs = network.apply({"params": params}, jnp.moveaxis(jnp.asarray(x), 1, -1))
    np.testing.assert_allclose(outputs, torch_outputs(module, x), atol=1e-5)


class TokenEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(11, 8), torch.nn.Embedding(5, 8)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, layer_norm_eps=1e-6)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.hidden, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.out(torch.relu(self.hidden(self.encoder(x).mean(1))))


def test_state_dict_of_a_transformer_in_ours():
    module = TokenEncoder()
    with torch.no_grad():  # biases start at zero: give every parameter a part
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tokens = np.random.default_rng(0).integers(0, 11, (4, 5)).astype(np.int32)
    network = FlaxTransformer(11, 5, 1, d_model=8, num_heads=2, num_layers=2, mlp_dim=16)
    params = load_torch_weights(network, module.state_dict())
    outputs = network.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(outputs, torch_outputs(module, tokens), atol=1e-5)
    half = load_torch_weights(network, {name: t.bfloat16() for name, t in module.state_dict().items()})
    assert all(leaf.dtype == jnp.float32 for leaf in trees.flatten(half).values())
