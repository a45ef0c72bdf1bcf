"""Compiled programs kept on disk, so that the next process need not compile them."""

import contextlib
import hashlib
import os
import platform
import stat
from pathlib import Path

import jax
import jaxlib

from .errors import OptionError


def cache_programs(folder: str | os.PathLike | None = None) -> Path:
    """Keep compiled programs in a folder, where later processes find them; call it before the first fit.

    Most of the seconds before a first prediction are compilation. JAX can keep its results; this sets it up so that
    the many small programs of a fit are kept too, apart for each kind of processor and each version of JAX.

    Parameters
    ----------
    folder : where to keep them, by default ``neurobayes`` in the user's cache folder. Made if it is not there. What
        lies in it is machine code that is run, so it must be the user's own, and nobody else's to write to.

    Returns
    -------
    The folder for this processor and version. It may be deleted at any time.

    Raises
    ------
    OptionError
        The folder cannot be made, or others can write to it.

    Notes
    -----
    Sets JAX's ``jax_compilation_cache_dir`` for the whole process.

    NumPyro's distributions list their parameters in the order of a set, which is another in each process, and so a
    program that takes a noise prior may not be recognised. With the environment variable ``PYTHONHASHSEED=0`` it is.
    """
    try:
        base = (_default() if folder is None else Path(folder).expanduser()).resolve()
        own = base / f"programs-{_fingerprint()}"
        base.parent.mkdir(parents=True, exist_ok=True)
        for place in (base, own):  # one by one: the mode is not that of parents made on the way
            place.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter where no home folder is known
        raise OptionError(f"folder={folder!r} cannot be made: {error}. Give one that you can write to.") from error
    for place in (base, own):
        _check_private(place)
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _forget_earlier_folder()
    return own


def _forget_earlier_folder() -> None:
    """JAX decides at the first compilation of a process whether it keeps programs; let it decide again."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def _default() -> Path:
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "neurobayes"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "neurobayes"  # relative ones do not count


def _check_private(folder: Path) -> None:
    if os.name == "nt":  # access rights are not in the mode there, and the user's folders are private
        return
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OptionError(
            f"folder={str(folder)!r} can be written to by other users, and what lies there would be run. Choose a "
            f"folder of your own, or take their rights away: chmod go-w {folder}"
        )


def _fingerprint() -> str:
    """A short name for this processor and these versions: machine code for another might not run."""
    flags = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    text = "|".join((platform.machine(), platform.system(), flags, jax.__version__, jaxlib.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
