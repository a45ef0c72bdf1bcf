# pyright: reportMissingImports=false
"""PyTorch modules as networks, through torchax (the extra ``torch``)."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax
from torchax.interop import jax_view, torch_view

from .._typing import Array, Key, Params, State
from ..errors import OptionError
from ._module_network import ModuleNetwork, as_columns, kind_of, token_spec
from .base import LayerKind

_DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)
_WITH_DROPOUT = (torch.nn.MultiheadAttention, torch.nn.RNNBase)
_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.RMSNorm,
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.SyncBatchNorm,
    torch.nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d,
)
_KINDS: tuple[tuple[tuple[type, ...], LayerKind], ...] = (
    ((torch.nn.MultiheadAttention,), "attention"),
    ((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), "conv"),
    ((torch.nn.Linear,), "dense"),
    ((torch.nn.Embedding, torch.nn.EmbeddingBag), "embedding"),
    (_NORMS, "norm"),
)


class TorchNetwork(ModuleNetwork):
    """A PyTorch module with the weights it has now, traced into JAX.

    The module itself is neither changed nor used later. Parameters are a dict
    with PyTorch's own names (``encoder.layers.1.linear2.weight``), in
    PyTorch's layout, ``(out, in)`` for ``Linear``, so that
    ``{name: torch.tensor(array)}`` goes back through ``load_state_dict``.
    Buffers are the frozen state. Weights shared between layers appear once.

    The module runs in evaluation mode; with a key, its dropout modules alone
    (the ones inside attention as well) are in training mode.

    Parameters
    ----------
    module : maps a batch ``(n, ...)``, one tensor, to outputs.

    Raises
    ------
    OptionError
        The module cannot be copied.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        params = {name: _as_jax(tensor) for name, tensor in module.named_parameters()}
        buffers = {name: _as_jax(tensor) for name, tensor in module.named_buffers()}
        layers = {name: child for name, child in module.named_modules() if _kind(child) != "other"}
        super().__init__(
            module,
            params,
            buffers,
            kinds={name: _kind(child) for name, child in layers.items()},
            input_spec=token_spec((_kind(child), child) for child in layers.values()),
            has_dropout=any(_dropout_rate(child) > 0 for child in module.modules()),
            fingerprint=repr(module),
        )
        self._evaluating = _without_weights(module).eval()
        self._training = _without_weights(module).eval()
        for child in self._training.modules():
            child.training = _dropout_rate(child) > 0

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Any:
        module = self._evaluating if key is None else self._training
        environment = torchax.default_env()
        # Whatever is drawn inside must not touch torchax's global key: under jit that would leak a tracer.
        seed = jax.random.key(0) if key is None else key
        with environment, environment.override_property(prng=seed), torch.no_grad():
            weights, inputs = torch_view(({**params, **state}, x))
            outputs = torch.func.functional_call(module, weights, (inputs,))
        return as_columns(jax_view(outputs))


def _kind(module: torch.nn.Module) -> LayerKind:
    return kind_of(module, _KINDS)


def _dropout_rate(module: torch.nn.Module) -> float:
    if isinstance(module, _DROPOUTS):
        return module.p
    return float(module.dropout) if isinstance(module, _WITH_DROPOUT) else 0.0


def _as_jax(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return jnp.array(tensor.numpy())  # a copy: later steps of a PyTorch optimiser must not reach it


def _without_weights(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module whose parameters and buffers take no memory; calls bring their own."""
    empty: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        shell = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        empty[id(tensor)] = torch.nn.Parameter(shell, requires_grad=False) if is_parameter else shell
    try:
        return copy.deepcopy(module, empty)
    except (TypeError, RuntimeError) as error:
        raise OptionError(
            f"the PyTorch module {type(module).__name__} cannot be copied ({error}). "
            "Remove what cannot be copied from its attributes (hooks, files, old-style weight normalisation)."
        ) from error
