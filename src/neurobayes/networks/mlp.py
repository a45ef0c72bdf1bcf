"""Fully connected networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._checks import check_fraction, check_positive_int
from .._typing import Array
from ..errors import DataError
from .activations import Activation, as_activation, as_dims, get_activation
from .base import InputSpec


class FlaxMLP(nn.Module):
    """A fully connected network: ``Dense0``, ``Dense1``, … with an activation between layers.

    The last ``Dense`` is the linear output layer, so a network with k hidden
    layers has k + 1 layers, the output layer being ``Dense{k}``.

    Parameters
    ----------
    hidden_dims : width of each hidden layer, >= 1 each; empty for a linear model.
    target_dim : number of outputs, >= 1: target columns, or classes.
    activation : name of the function between layers (see ``get_activation``), or a function.
    dropout_rate : share of hidden units switched off in each training step, in [0, 1).

    Raises
    ------
    OptionError
        At construction, if an argument is out of its range or the activation is unknown.
    DataError
        When called, if the input is not of shape ``(n, features)``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> mlp = FlaxMLP(hidden_dims=[64, 32], target_dim=1)
    >>> params = mlp.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> mlp.apply(params, jnp.zeros((5, 3))).shape
    (5, 1)
    """

    hidden_dims: Sequence[int]
    target_dim: int
    activation: Activation = "tanh"
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        self.hidden_dims = as_dims("hidden_dims", self.hidden_dims)
        self.target_dim = check_positive_int("target_dim", self.target_dim)
        self.dropout_rate = check_fraction("dropout_rate", self.dropout_rate, allow_zero=True)
        self.activation = as_activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        """Outputs of shape ``(n, target_dim)`` for inputs ``(n, features)``."""
        if x.ndim != 2:
            raise DataError(f"FlaxMLP takes inputs of shape (n, features), got {x.shape}. Reshape the input.")
        activate = get_activation(self.activation)
        for i, width in enumerate(self.hidden_dims):
            x = activate(nn.Dense(width, name=f"Dense{i}")(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(self.target_dim, name=f"Dense{len(self.hidden_dims)}")(x)

    @property
    def input_spec(self) -> InputSpec:
        """Rows of numbers, any number of columns."""
        return InputSpec()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Two inputs that differ in every size the network leaves open."""
        return tuple(jax.ShapeDtypeStruct((1, features), jnp.float32) for features in (3, 5))
