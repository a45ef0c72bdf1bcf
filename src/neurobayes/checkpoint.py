"""Runs that survive being killed: draws and sampler state on disk, never half-written.

A checkpoint folder holds files of draws, one file with the sampler's state and
``manifest.json``, which names the files that count. Every file is written under
another name, flushed to disk and then renamed; the manifest comes last. Whatever
moment a process dies at, the manifest speaks of complete files only.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import CheckpointError

_MANIFEST = "manifest.json"
_FORMAT = 1
_PARTS = {"number": int, "state": str, "draws": list, "counters": dict, "extra": dict, "facts": dict}
"""What a manifest holds beside its format and fingerprint."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: progress counters, the sampler's state, and all draws so far by name."""

    counters: dict[str, int]
    state: list[np.ndarray]
    draws: dict[str, np.ndarray]


class Checkpoint:
    """A checkpoint folder of one run.

    Parameters
    ----------
    folder : created if absent.
    fingerprint : identifies the run; a folder with another fingerprint raises.

    Raises
    ------
    CheckpointError
        The folder belongs to another run, or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str):
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"checkpoint_dir={str(folder)!r} is a file. Give a folder, new or used by this run.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manifest = self._read_manifest()

    def load(self) -> Snapshot | None:
        """The last complete snapshot, or None for a new run."""
        if not self._manifest["state"]:
            return None
        state = _read(self.folder / self._manifest["state"])
        parts = [_read(self.folder / name) for name in self._manifest["draws"]]
        try:
            draws = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]} if parts else {}
            leaves = [state[f"leaf{i:04d}"] for i in range(len(state))]
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"files of {self.folder} do not fit together ({error}). Delete the folder and start again."
            ) from error
        return Snapshot(dict(self._manifest["counters"]), leaves, draws)

    def save(self, counters: Mapping[str, int], state: Any, new_draws: Mapping[str, np.ndarray]) -> None:
        """Add draws ``(chain, draw, …)`` made since the last call and replace the state."""
        number = self._manifest["number"] + 1
        draws = list(self._manifest["draws"])
        if new_draws:
            draws.append(f"draws-{number:06d}.safetensors")
            _write(self.folder / draws[-1], dict(new_draws))
        state_name = f"state-{number:06d}.safetensors"
        _write(self.folder / state_name, {f"leaf{i:04d}": leaf for i, leaf in enumerate(as_host_leaves(state))})
        stale = self._manifest["state"]
        self._write_manifest(number=number, state=state_name, draws=draws, counters=dict(counters))
        if stale:
            (self.folder / stale).unlink(missing_ok=True)

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays kept under a name beside the run (trained weights), or None."""
        known = self._manifest["extra"].get(name)
        return None if known is None else _read(self.folder / known)

    def keep(self, name: str, arrays: Mapping[str, np.ndarray], **facts: Any) -> None:
        """Keep arrays, and plain facts that go with them, under a name."""
        file = f"{name}.safetensors"
        _write(self.folder / file, dict(arrays))
        self._write_manifest(
            extra={**self._manifest["extra"], name: file}, facts={**self._manifest["facts"], name: facts}
        )

    def facts(self, name: str) -> dict[str, Any]:
        """The plain facts kept under a name."""
        return self._manifest["facts"].get(name, {})

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / _MANIFEST
        if not path.exists():
            return {
                "format": _FORMAT, "fingerprint": self.fingerprint, "number": 0, "state": "", "draws": [],
                "counters": {}, "extra": {}, "facts": {},
            }  # fmt: skip
        try:
            manifest = json.loads(path.read_text())
            fingerprint, version = manifest["fingerprint"], manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read as a checkpoint ({error}). Give an empty folder.") from error
        if fingerprint != self.fingerprint or version != _FORMAT:
            raise CheckpointError(
                f"checkpoint_dir={str(self.folder)!r} belongs to another run: data, network, options, seed or "
                "version differ. Give each run a folder of its own, or delete this one."
            )
        fault = _fault(manifest)
        if fault:
            raise CheckpointError(f"{path} is damaged: {fault}. Delete the folder and start again.")
        return manifest

    def _write_manifest(self, **changes: Any) -> None:
        manifest = {**self._manifest, **changes}
        _atomically(self.folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
        self._manifest = manifest


def _fault(manifest: Mapping[str, Any]) -> str:
    """What a manifest lacks or should not hold; nothing where it is whole."""
    wrong = [part for part, kind in _PARTS.items() if not isinstance(manifest.get(part), kind)]
    if wrong:
        return f"it lacks {', '.join(wrong)}, or holds it in another form"
    names = [*manifest["draws"], *manifest["extra"].values(), *filter(None, [manifest["state"]])]
    outside = [name for name in names if not _is_file_name(name)]
    return f"it names {outside[0]!r}, which is no file of the folder" if outside else ""


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def fingerprint(*parts: Any) -> str:
    """A digest of arrays, pytrees and the text of anything else."""
    digest = hashlib.sha256()
    for part in parts:
        # Paths and not the tree's own text, which holds memory addresses for some node types.
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
            digest.update(jax.tree_util.keystr(path).encode())
            if isinstance(leaf, np.ndarray | jax.Array | np.generic):
                array = np.ascontiguousarray(as_host_leaves(leaf)[0])
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes())
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def as_host_leaves(tree: Any) -> list[np.ndarray]:
    """The leaves as numpy arrays; random keys as their raw data."""
    return [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in jax.tree.leaves(tree)]


def restore_leaves(like: Any, leaves: list[np.ndarray]) -> Any:
    """A pytree like ``like`` with its leaves replaced; raw data become keys where ``like`` has keys."""
    originals, tree = jax.tree.flatten(like)
    if len(originals) != len(leaves):
        raise CheckpointError("the checkpoint's state does not fit this version of the library. Use an empty folder.")
    restored = [
        jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(original)) if _is_key(original) else leaf
        for original, leaf in zip(originals, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, restored)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Delete the folder and start again.") from error


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    # safetensors silently mixes up arrays that are not contiguous; ascontiguousarray would add an axis to scalars.
    _atomically(path, save({name: np.asarray(array, order="C") for name, array in arrays.items()}))


def _atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system can open a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
