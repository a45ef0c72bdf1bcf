"""Flax linen modules as networks."""

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax

from .. import trees
from .._typing import Array, Key, Params, State
from .base import InputSpec, Layer, LayerKind, Network

_KINDS: tuple[tuple[tuple[type, ...], LayerKind], ...] = (
    ((nn.MultiHeadDotProductAttention,), "attention"),
    ((nn.Conv, nn.ConvTranspose, nn.ConvLocal), "conv"),
    ((nn.Dense, nn.DenseGeneral, nn.Einsum), "dense"),
    ((nn.Embed,), "embedding"),
    ((nn.LayerNorm, nn.BatchNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm), "norm"),
)

_TRAIN_FLAGS = ("train", "training", "is_training")


def _kind(module: nn.Module) -> LayerKind:
    for types, kind in _KINDS:
        if isinstance(module, types):
            return kind
    return "other"


@dataclasses.dataclass(frozen=True, eq=False)
class LinenNetwork(Network):
    """A linen module; collections other than ``params`` are its frozen state."""

    module: nn.Module

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinenNetwork):
            return NotImplemented
        try:
            return bool(self.module == other.module)
        except ValueError:  # arrays among the attributes have no single answer
            return self.module is other.module

    def __hash__(self) -> int:
        try:
            return hash(self.module)
        except TypeError:  # a module with a list among its attributes: equality still decides
            return hash(type(self.module))

    def init(self, key: Key, x: Array) -> tuple[Params, State]:
        key_params, key_dropout = jax.random.split(key)
        rngs = {"params": key_params, "dropout": key_dropout}
        variables = dict(self.module.init(rngs, x, **self._mode(training=False)))
        return variables.pop("params", {}), variables

    def apply(self, params: Params, state: State, x: Array, *, key: Key | None = None) -> Any:
        variables = {"params": params, **state}
        if key is None or not self.has_dropout:
            return self.module.apply(variables, x, **self._mode(training=False))
        return self.module.apply(
            variables, x, rngs={"dropout": key}, **self._mode(training=True, has_state=bool(state))
        )

    def layers(self, x: Array) -> tuple[Layer, ...]:
        calls: dict[str, nn.Module] = {}

        def record(call, args, kwargs, context):
            # Setting up is no call, and a module's own helpers may run before it has a place in the network.
            if context.method_name != "setup" and context.module.scope is not None:
                calls.setdefault(trees.SEPARATOR.join(context.module.path), context.module)
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            params, _ = jax.eval_shape(self.init, jax.random.key(0), x)
        whole = [path for path, module in calls.items() if _kind(module) == "attention"]

        def owner(leaf: str) -> str:
            return next((path for path in whole if trees.is_under(leaf, path)), trees.parent(leaf))

        leaves: dict[str, list[str]] = {}
        for leaf in trees.flatten(params):
            leaves.setdefault(owner(leaf), []).append(leaf)
        # A layer is where its module was first called; parameters of no recorded module come last.
        order = {path: position for position, path in enumerate(calls)}
        names = sorted(leaves, key=lambda name: order.get(name, len(order)))
        return tuple(
            Layer(name, _kind(calls[name]) if name in calls else "other", tuple(leaves[name])) for name in names
        )

    @property
    def input_spec(self) -> InputSpec:
        return getattr(self.module, "input_spec", InputSpec())

    @property
    def has_dropout(self) -> bool:
        return bool(getattr(self.module, "dropout_rate", 0.0)) or not hasattr(self.module, "dropout_rate")

    def _mode(self, *, training: bool, has_state: bool = False) -> dict[str, Any]:
        """The keywords by which this module is told whether it trains, where it takes any."""
        accepted = inspect.signature(type(self.module).__call__).parameters
        # `deterministic` governs dropout alone. The others also make running statistics follow the
        # batch; these are frozen here, so that a module which has any is never put in train mode.
        modes = {"deterministic": not training} | dict.fromkeys(_TRAIN_FLAGS, training and not has_state)
        return {name: value for name, value in modes.items() if name in accepted}
