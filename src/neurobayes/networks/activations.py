"""Activation functions by name, and the check of layer widths that the built-in networks share."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._checks import check_positive_int
from .._typing import Array
from ..errors import OptionError, unknown_choice

Activation: TypeAlias = str | Callable[[Array], Array]
"""A name in ``ACTIVATIONS``, or any elementwise function of an array."""


def _identity(x: Array) -> Array:
    return x


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "sigmoid": jax.nn.sigmoid,
    "hard_tanh": jax.nn.hard_tanh,
    "mish": jax.nn.mish,
    "sin": jnp.sin,
    "identity": _identity,
    "linear": _identity,
}


def get_activation(name: Activation) -> Callable[[Array], Array]:
    """The function called ``name``; a callable is returned as it is.

    Raises
    ------
    OptionError
        If the name is unknown; the message gives the nearest and all known names.
    """
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if callable(name):
        return name
    raise unknown_choice("activation", name, ACTIVATIONS)


def as_activation(value: Activation) -> Activation:
    """``value``, checked, and by its name where it is one of the known functions.

    Those of JAX cannot be pickled and names can; and networks given either way are then equal.
    """
    get_activation(value)
    return next((name for name, function in ACTIVATIONS.items() if function is value), value)


def as_dims(name: str, values: Any, *, min_length: int = 0) -> tuple[int, ...]:
    """``values`` as a tuple of positive Python ints, so that equal networks hash alike."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{name}={values!r} must be a sequence of widths, one for each layer: for example [64, 32].")
    dims = tuple(check_positive_int(f"{name}[{i}]", value) for i, value in enumerate(values))
    if len(dims) < min_length:
        raise OptionError(f"{name}={values!r} needs at least {min_length} {'entry' if min_length == 1 else 'entries'}.")
    return dims
