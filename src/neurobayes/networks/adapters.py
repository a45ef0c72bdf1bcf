"""From whatever a user calls a network to a ``Network``."""

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from .._typing import Params
from ..errors import OptionError, missing_extra
from .base import Network

_ACCEPTED = (
    "Accepted are: a Flax linen module (FlaxMLP, FlaxConvNet, FlaxTransformer or your own), a Flax NNX module, "
    "an Equinox module or the pair (module, state) of eqx.nn.make_with_state, a PyTorch nn.Module, "
    "and a pair (apply_fn, params) with apply_fn(params, x) -> outputs."
)


def as_network(network: Any, *, params: Params | None = None) -> Network:
    """The network behind a module of any supported framework, or behind a plain function.

    No framework is imported to find out: an object can be of a framework only
    if that is loaded already.

    Parameters
    ----------
    network : one of

        - a ``Network``, returned as it is;
        - a Flax linen module, whose weights are drawn later;
        - a Flax NNX, Equinox or PyTorch module with the weights it has, which
          are the pre-trained ones; for Equinox modules with running
          statistics the pair ``(module, state)``;
        - a pair ``(apply_fn, params)``, or ``apply_fn`` with ``params`` as keyword.

        Layers carry the framework's own names: ``blocks.0.attn`` (NNX),
        ``layers.0`` (Equinox), ``encoder.layers.1.linear2`` (PyTorch).
    params : pytree of float arrays, for a plain function only.

    Raises
    ------
    OptionError
        ``network`` is nothing of the above, or ``params`` comes with a module.
    MissingExtraError
        A PyTorch module is given and torchax is not installed.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> network = as_network((lambda params, x: x @ params["w"], {"w": jnp.ones((3, 1))}))
    >>> [layer.name for layer in network.layers(jnp.zeros((1, 3)))]
    ['w']
    """
    if isinstance(network, Network):
        _check_no_params(network, params)
        return network
    wrap = _wrapper_of(network)
    if wrap is not None:
        _check_no_params(network, params)
        return wrap(network)
    if isinstance(network, (tuple, list)) and len(network) == 2 and params is None:
        return _pair(*network)
    if callable(network) and not isinstance(network, type):
        if params is None:
            raise OptionError(
                f"the function {_name(network)} came without its parameters. Give the pair (apply_fn, params)."
            )
        return _pair(network, params)
    raise OptionError(f"network={network!r:.200} is not known as a network. {_hint(network)}{_ACCEPTED}")


def _pair(first: Any, second: Any) -> Network:
    if _is_a(second, "equinox.nn", "State") and _is_a(first, "equinox", "Module"):
        from .equinox_modules import EquinoxNetwork

        return EquinoxNetwork(first, second)
    if isinstance(first, Network) or _wrapper_of(first) is not None:
        _check_no_params(first, second)
    if not callable(first):
        raise OptionError(f"the first of the pair, {first!r:.200}, is not a function. {_ACCEPTED}")
    from .functions import FunctionNetwork

    return FunctionNetwork(first, second)


def _wrapper_of(network: Any) -> Callable[[Any], Network] | None:
    """The adapter of the framework that ``network`` is a module of, or None."""
    if _is_a(network, "flax.linen", "Module"):
        from .linen import LinenNetwork

        return LinenNetwork
    if _is_a(network, "flax.nnx", "Module"):
        from .nnx_modules import NNXNetwork

        return NNXNetwork
    if _is_a(network, "equinox", "Module"):
        from .equinox_modules import EquinoxNetwork

        return EquinoxNetwork
    if _is_a(network, "torch.nn", "Module"):
        if find_spec("torchax") is None:
            raise missing_extra("torchax", "torch", "a PyTorch network")
        from .torch_modules import TorchNetwork

        return TorchNetwork
    return None


def _is_a(thing: Any, module: str, name: str) -> bool:
    """Whether ``thing`` is an instance of ``module.name``, without importing ``module``."""
    known = getattr(sys.modules.get(module), name, None)
    return isinstance(known, type) and isinstance(thing, known)


def _check_no_params(network: Any, params: Params | None) -> None:
    if params is not None:
        raise OptionError(
            f"params came together with the module {_name(network)}, but they are for a plain function only. "
            "Give the module alone, and trained weights as deterministic_weights."
        )


def _hint(network: Any) -> str:
    if isinstance(network, type):
        return f"It is a class: construct it first, {network.__name__}(…). "
    if isinstance(network, Mapping):
        return "To use a PyTorch state_dict, load it into a Flax network with nb.networks.load_torch_weights. "
    return ""


def _name(thing: Any) -> str:
    return repr(getattr(thing, "__name__", type(thing).__name__))
