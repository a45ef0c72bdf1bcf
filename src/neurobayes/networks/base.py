"""What a network is to the rest of the library: a pure function of a parameter pytree."""

import abc
import dataclasses
from typing import Literal

from .._typing import Array, Key, Params, State

LayerKind = Literal["dense", "conv", "attention", "embedding", "norm", "other"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network, as users address it.

    Attributes
    ----------
    name : the path of the layer in the parameter tree (``Dense0``, ``encoder.layers_1.linear2``).
    kind : what it computes; ``last(k)`` counts every kind but ``norm``.
    leaves : paths of its parameter leaves (``Dense0.kernel``, ``Dense0.bias``).
    """

    name: str
    kind: LayerKind
    leaves: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What a network accepts, as far as it says so itself.

    Attributes
    ----------
    tokens : whether inputs are integer token ids rather than numbers to be scaled.
    vocab_size : ids must be below this, where known.
    max_length : longest sequence, where known.
    spatial_dims : number of spatial axes (1, 2 or 3), where the network is convolutional.
    pad_token : id that fills up short sequences, if any number of it at a row's end leaves the output as it is.
    """

    tokens: bool = False
    vocab_size: int | None = None
    max_length: int | None = None
    spatial_dims: int | None = None
    pad_token: int | None = None


class Network(abc.ABC):
    """A network as the pure function ``apply(params, state, x)``.

    Implementations are hashable and compare equal when they compute the same
    function of the same parameters: compiled programs are cached by network.
    """

    @abc.abstractmethod
    def init(self, key: Key, x: Array) -> tuple[Params, State]:
        """Fresh random parameters, and the frozen state, for inputs like ``x`` (batch axis first)."""

    @abc.abstractmethod
    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Array:
        """Outputs for a batch, shape ``(n, outputs)``.

        ``key`` switches on whatever is random in training (dropout); without
        it the result is a deterministic function.
        """

    @abc.abstractmethod
    def layers(self, x: Array) -> tuple[Layer, ...]:
        """The layers that own parameters, in the order in which they are called."""

    @property
    def input_spec(self) -> InputSpec:
        """What inputs the network accepts."""
        return InputSpec()

    @property
    def has_dropout(self) -> bool:
        """Whether ``apply`` with a key differs from ``apply`` without one."""
        return True

    @property
    def pretrained(self) -> Params | None:
        """The weights the network came with, where its framework keeps them inside the module."""
        return None
