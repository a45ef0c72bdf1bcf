"""Compiled programs that are cheap to compile."""

import functools
from collections.abc import Callable
from typing import Any

import jax


class QuickJit:
    """``jax.jit`` for programs that a user waits for: on a CPU, by LLVM's first level of optimisation.

    XLA's own passes and the matrix products of its library are as always; the compilation takes a third less time,
    and training ran as fast as with the usual third level on every size that was tried. Not to be called within
    another compiled function.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self._function, self._options = function, options
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        """The result of the compiled function."""
        return self._jitted(jax.default_backend())(*arguments)

    def eval_shape(self, *arguments: Any) -> Any:
        """Shapes and dtypes of the result; what is traced for it serves the first call."""
        return self._jitted(jax.default_backend()).eval_shape(*arguments)

    @functools.cache  # noqa: B019 - instances are module-level functions
    def _jitted(self, backend: str) -> Any:
        level = {"xla_backend_optimization_level": 1} if backend == "cpu" else None
        return jax.jit(self._function, compiler_options=level, **self._options)


def quick_jit(**options: Any) -> Callable[[Callable[..., Any]], QuickJit]:
    """A decorator: ``QuickJit`` with these options of ``jax.jit``."""
    return lambda function: QuickJit(function, **options)
