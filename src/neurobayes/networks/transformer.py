"""Transformer encoders over token sequences."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._checks import check_fraction, check_positive_int
from .._typing import Array
from ..errors import DataError, OptionError
from .activations import Activation, as_activation, get_activation
from .base import InputSpec


class FlaxTransformer(nn.Module):
    """A transformer encoder over integer tokens, pooled over the sequence to one output per row.

    Token and learned position embeddings (``TokenEmbed``, ``PosEmbed``) are
    added and pass through ``num_layers`` blocks ``Block{i}_…``: self-attention
    and a two-layer perceptron, each added to its input and normalised after
    (post-LN). The mean over the sequence goes through ``FinalDense1``, the
    activation and the linear output layer ``FinalDense2``.

    Padding takes part neither in attention nor in the mean, so that padding
    a sequence at its end does not change its output. A row of padding only
    gives the output for a mean of zero.

    Parameters
    ----------
    vocab_size : number of tokens; ids are ``0 … vocab_size - 1``.
    max_length : longest sequence, >= 1; shorter ones need no padding.
    target_dim : number of outputs, >= 1: target columns, or classes.
    d_model : width of the embeddings, a multiple of ``num_heads``.
    num_heads : number of attention heads.
    num_layers : number of blocks, >= 1.
    mlp_dim : width of the hidden layer of each block's perceptron.
    activation : name of the function (see ``get_activation``), or a function.
    dropout_rate : share of units of each embedding and sub-layer switched off in each training step, in [0, 1).
    pad_token : id of the token that fills up short sequences, or None if there is none.

    Raises
    ------
    OptionError
        At construction, if an argument is out of its range or the activation is unknown.
    DataError
        When called, if the input is not of integers, not of shape ``(n, length)``
        or longer than ``max_length``.

    Notes
    -----
    Time and memory grow as the square of the sequence length.

    References
    ----------
    Vaswani et al., "Attention is all you need", 2017, doi:10.48550/arXiv.1706.03762.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> net = FlaxTransformer(vocab_size=20, max_length=8, target_dim=1, d_model=16, num_heads=2, pad_token=0)
    >>> tokens = jnp.array([[3, 7, 1], [5, 2, 0]])
    >>> net.apply(net.init(jax.random.key(0), tokens), tokens).shape
    (2, 1)
    """

    vocab_size: int
    max_length: int
    target_dim: int
    d_model: int = 64
    num_heads: int = 4
    num_layers: int = 2
    mlp_dim: int = 128
    activation: Activation = "relu"
    dropout_rate: float = 0.0
    pad_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "target_dim", "d_model", "num_heads", "num_layers", "mlp_dim"):
            setattr(self, name, check_positive_int(name, getattr(self, name)))
        if self.d_model % self.num_heads:
            raise OptionError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}. "
                "Each head takes an equal share of d_model: choose a multiple of num_heads."
            )
        if self.pad_token is not None:
            self.pad_token = check_positive_int("pad_token", self.pad_token, minimum=0)
            if self.pad_token >= self.vocab_size:
                raise OptionError(
                    f"pad_token={self.pad_token} is not below vocab_size={self.vocab_size}. "
                    "Count the padding token among the vocabulary."
                )
        self.dropout_rate = check_fraction("dropout_rate", self.dropout_rate, allow_zero=True)
        self.activation = as_activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        """Outputs of shape ``(n, target_dim)`` for token ids ``(n, length)``."""
        self._check_tokens(x)
        activate = get_activation(self.activation)
        is_token = jnp.ones(x.shape, bool) if self.pad_token is None else x != self.pad_token

        def dropout(h: Array) -> Array:
            return nn.Dropout(self.dropout_rate)(h, deterministic=deterministic)

        tokens = nn.Embed(self.vocab_size, self.d_model, name="TokenEmbed")(x)
        positions = nn.Embed(self.max_length, self.d_model, name="PosEmbed")(jnp.arange(x.shape[1]))
        h = dropout(tokens + positions)
        for i in range(self.num_layers):
            attention = nn.MultiHeadDotProductAttention(self.num_heads, name=f"Block{i}_Attention")
            # Masking keys alone is enough: what padding itself attends to never leaves its position.
            attended = attention(h, mask=is_token[:, None, None, :])
            h = nn.LayerNorm(name=f"Block{i}_LayerNorm1")(h + dropout(attended))
            hidden = activate(nn.Dense(self.mlp_dim, name=f"Block{i}_MLP_dense1")(h))
            hidden = nn.Dense(self.d_model, name=f"Block{i}_MLP_dense2")(hidden)
            h = nn.LayerNorm(name=f"Block{i}_LayerNorm2")(h + dropout(hidden))
        h = activate(nn.Dense(self.d_model, name="FinalDense1")(_masked_mean(h, is_token)))
        return nn.Dense(self.target_dim, name="FinalDense2")(dropout(h))

    @property
    def input_spec(self) -> InputSpec:
        """Token ids below ``vocab_size``, in sequences up to ``max_length``."""
        return InputSpec(tokens=True, vocab_size=self.vocab_size, max_length=self.max_length, pad_token=self.pad_token)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """One shape twice: no parameter's shape depends on the input."""
        return (jax.ShapeDtypeStruct((1, self.max_length), jnp.int32),) * 2

    def _check_tokens(self, x: Array) -> None:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise DataError(
                f"FlaxTransformer takes integer token ids, got {x.dtype}. Convert with X.astype('int32') "
                "if the numbers are ids; for other numbers use FlaxMLP or FlaxConvNet."
            )
        if x.ndim != 2 or not 1 <= x.shape[1] <= self.max_length:
            raise DataError(
                f"FlaxTransformer takes token ids of shape (n, length) with length from 1 to "
                f"max_length={self.max_length}, got {x.shape}. Reshape or truncate X, or raise max_length."
            )


def _masked_mean(h: Array, is_token: Array) -> Array:
    """Mean of ``h`` (n, length, width) over the positions that are tokens; zero where a row has none."""
    weights = is_token[..., None].astype(h.dtype)
    return (h * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)
