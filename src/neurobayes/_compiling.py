"""Compiled programs that are cheap to compile."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax


def compiler_options(level: int = 1) -> dict[str, Any] | None:
    """Options of ``jax.jit`` for programs that a user waits for: on a CPU, LLVM's optimisation at a low level.

    XLA's own passes and the matrix products of its library are as always. At the first level compilation takes a
    third less time, and training ran as fast as with the usual third level on every size that was tried; level 0
    takes half, for what runs a few times on little.
    """
    return {"xla_backend_optimization_level": level} if jax.default_backend() == "cpu" else None


class QuickJit:
    """``jax.jit`` with ``compiler_options``; the first argument is static.

    Not to be called within another compiled function.
    """

    def __init__(self, function: Callable[..., Any], level: int = 1) -> None:
        self._function, self._level = function, level
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        """The result of the compiled function."""
        return self._jitted(jax.default_backend())(*arguments)

    def eval_shape(self, *arguments: Any) -> Any:
        """Shapes and dtypes of the result; what is traced for it serves the first call."""
        return self._jitted(jax.default_backend()).eval_shape(*arguments)

    def compile(self, *arguments: Any) -> None:
        """Compile for arguments, or for shapes in their place: a later call with such arguments finds the program.

        A thread that asks for what another is compiling waits for it.
        """
        with self._lock(arguments[0]):
            self._jitted(jax.default_backend()).lower(*arguments).compile()

    @functools.cache  # noqa: B019 - instances are module-level functions
    def _jitted(self, backend: str) -> Any:
        return jax.jit(self._function, static_argnums=0, compiler_options=compiler_options(self._level))

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _lock(self, static: Any) -> threading.Lock:
        return threading.Lock()
