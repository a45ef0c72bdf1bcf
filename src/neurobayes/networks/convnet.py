"""Convolutional networks over one, two or three spatial axes."""

from collections.abc import Iterable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._checks import check_fraction, check_one_of, check_positive_int
from .._typing import Array
from ..errors import DataError, OptionError
from .activations import Activation, as_activation, as_dims, get_activation
from .base import InputSpec

_SPATIAL_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


class FlaxConvNet(nn.Module):
    """A convolutional network: ``Conv0``, ``Conv1``, …, then ``Dense0``, ``Dense1``, ….

    Each convolution keeps the spatial size and is followed by the activation
    and by pooling that halves every spatial axis, rounded up, so that any size
    from 1 works. The last ``Dense`` is the linear output layer.

    Parameters
    ----------
    input_dim : number of spatial axes: 1, 2 or 3.
    conv_layers : number of output channels of each convolution, at least one.
    fc_layers : width of each hidden dense layer; may be empty.
    target_dim : number of outputs, >= 1: target columns, or classes.
    activation : name of the function after each hidden layer (see ``get_activation``), or a function.
    kernel_size : extent of the kernels, one number for all spatial axes or one for each.
    pool : ``"max"`` or ``"avg"``, over windows of 2 along each spatial axis.
    dropout_rate : share of hidden units switched off in each training step, in [0, 1).

    Raises
    ------
    OptionError
        At construction, if an argument is out of its range or a name is unknown.
    DataError
        When called, if the input has neither the axes ``(n, *spatial, channels)``
        nor ``(n, *spatial)``, which is taken as one channel.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> net = FlaxConvNet(input_dim=2, conv_layers=[8], fc_layers=[16], target_dim=10)
    >>> params = net.init(jax.random.key(0), jnp.zeros((1, 7, 5, 3)))
    >>> net.apply(params, jnp.zeros((4, 7, 5, 3))).shape
    (4, 10)
    """

    input_dim: int
    conv_layers: Sequence[int]
    fc_layers: Sequence[int]
    target_dim: int
    activation: Activation = "tanh"
    kernel_size: int | Sequence[int] = 3
    pool: Literal["max", "avg"] = "max"
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        self.input_dim = check_positive_int("input_dim", self.input_dim)
        if self.input_dim not in _SPATIAL_AXES:
            raise OptionError(f"input_dim={self.input_dim} is the number of spatial axes: give 1, 2 or 3.")
        self.conv_layers = as_dims("conv_layers", self.conv_layers, min_length=1)
        self.fc_layers = as_dims("fc_layers", self.fc_layers)
        self.target_dim = check_positive_int("target_dim", self.target_dim)
        self.kernel_size = _kernel_shape(self.kernel_size, self.input_dim)
        check_one_of("pool", self.pool, ("max", "avg"))
        self.dropout_rate = check_fraction("dropout_rate", self.dropout_rate, allow_zero=True)
        self.activation = as_activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        """Outputs of shape ``(n, target_dim)`` for inputs ``(n, *spatial, channels)`` or ``(n, *spatial)``."""
        x = self._with_channels(x)
        activate = get_activation(self.activation)
        for i, channels in enumerate(self.conv_layers):
            x = activate(nn.Conv(channels, self.kernel_size, name=f"Conv{i}")(x))
            x = nn.Dropout(self.dropout_rate)(self._halve(x), deterministic=deterministic)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.fc_layers):
            x = activate(nn.Dense(width, name=f"Dense{i}")(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(self.target_dim, name=f"Dense{len(self.fc_layers)}")(x)

    @property
    def input_spec(self) -> InputSpec:
        """Arrays with ``input_dim`` spatial axes."""
        return InputSpec(spatial_dims=self.input_dim)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Two inputs that differ in every size the network leaves open."""
        size = 2 ** len(self.conv_layers)  # one cell is left after the last pooling, two for the doubled size
        return tuple(
            jax.ShapeDtypeStruct((1, *[factor * size] * self.input_dim, factor), jnp.float32) for factor in (1, 2)
        )

    def _with_channels(self, x: Array) -> Array:
        if x.ndim == self.input_dim + 1:
            return x[..., None]
        if x.ndim == self.input_dim + 2:
            return x
        axes = _SPATIAL_AXES[self.input_dim]
        raise DataError(
            f"FlaxConvNet with input_dim={self.input_dim} takes inputs of shape (n, {axes}, channels) "
            f"or (n, {axes}), got {x.shape}. Reshape the input or change input_dim."
        )

    def _halve(self, x: Array) -> Array:
        if self.pool == "max":
            for axis in range(1, 1 + self.input_dim):
                x = _larger_of_pairs(x, axis)
            return x
        window = (2,) * self.input_dim
        # Cells that the padding adds at the edge of an odd size are no data: leave them out of the mean.
        return nn.avg_pool(x, window, strides=window, padding="SAME", count_include_pad=False)


def _larger_of_pairs(x: Array, axis: int) -> Array:
    """The larger of each two neighbours along an axis; a last one without a neighbour stays.

    Its derivative takes a few elementwise steps, where that of a window reduction searches each window on a CPU.
    """
    odd = x.shape[axis] % 2
    pairs = jnp.pad(x, [(0, odd if i == axis else 0) for i in range(x.ndim)], mode="edge") if odd else x
    pairs = pairs.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    return jnp.maximum(*(jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1)))


def _kernel_shape(kernel_size: int | Sequence[int], input_dim: int) -> tuple[int, ...]:
    if not isinstance(kernel_size, Iterable):
        return (check_positive_int("kernel_size", kernel_size),) * input_dim
    shape = as_dims("kernel_size", kernel_size)
    if len(shape) != input_dim:
        raise OptionError(f"kernel_size={shape} must be one number, or one for each of the {input_dim} spatial axes.")
    return shape
