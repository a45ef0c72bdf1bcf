"""Networks: the library's own, and adapters for those of other frameworks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import as_network
    from .torch_weights import load_torch_weights

__all__ = ["as_network", "load_torch_weights"]

_HOME = {"as_network": "adapters", "load_torch_weights": "torch_weights"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
