"""A checkpoint folder speaks of complete files only, whatever moment its process died at."""

import json
import os

import jax
import numpy as np
import pytest

from neurobayes import checkpoint as module
from neurobayes.checkpoint import Checkpoint, as_host_leaves, fingerprint, restore_leaves
from neurobayes.errors import CheckpointError

COUNTERS = {"warm-up": 50, "sampling": 50}


def state(number):
    return {"a": np.full((2, 3), number, np.float32), "key": jax.random.split(jax.random.key(number), 2)}


def draws(first, count=5):
    values = np.arange(first, first + count, dtype=np.float32)
    return {"position": np.tile(values[None, :, None], (2, 1, 3)), "diverging": np.tile(values[None] > 3, (2, 1))}


def saved(folder, times=2):
    checkpoint = Checkpoint(folder, "me")
    for i in range(times):
        checkpoint.save({**COUNTERS, "sampling": 5 * (i + 1)}, state(i), draws(5 * i))
    return checkpoint


def test_an_unused_folder_is_a_new_run(tmp_path):
    assert Checkpoint(tmp_path / "deep" / "run", "me").load() is None


def test_draws_are_joined_and_the_last_state_counts(tmp_path):
    saved(tmp_path)
    found = Checkpoint(tmp_path, "me").load()
    assert found.counters == {"warm-up": 50, "sampling": 10}
    np.testing.assert_array_equal(found.draws["position"][1, :, 2], np.arange(10))
    assert found.draws["diverging"].dtype == bool
    restored = restore_leaves(state(0), found.state)
    np.testing.assert_array_equal(restored["a"], state(1)["a"])
    assert jax.dtypes.issubdtype(restored["key"].dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(jax.random.normal(restored["key"][0]), jax.random.normal(state(1)["key"][0]))


def test_a_save_without_draws_replaces_the_state(tmp_path):
    checkpoint = Checkpoint(tmp_path, "me")
    checkpoint.save({"warm-up": 50}, state(0), {})
    checkpoint.save({"warm-up": 100}, state(1), {})
    found = Checkpoint(tmp_path, "me").load()
    assert (found.counters, found.draws) == ({"warm-up": 100}, {})
    assert len(list(tmp_path.glob("state-*"))) == 1


class Killed(BaseException):
    """The process ends here, as far as the folder is concerned."""


@pytest.mark.parametrize("survivors", range(6))
@pytest.mark.parametrize("cut", ["before the write", "half written", "before the renaming"])
def test_a_death_at_any_file_of_a_save_leaves_the_old_or_the_new_snapshot(tmp_path, monkeypatch, survivors, cut):
    saved(tmp_path, times=1)
    left, original = [survivors], module._atomically

    def dying(path, content):
        left[0] -= 1
        if left[0] >= 0:
            return original(path, content)
        if cut != "before the write":
            end = len(content) // 2 if cut == "half written" else len(content)
            path.with_name(path.name + ".part").write_bytes(content[:end])
        raise Killed

    monkeypatch.setattr(module, "_atomically", dying)
    checkpoint = Checkpoint(tmp_path, "me")
    try:
        checkpoint.save({**COUNTERS, "sampling": 10}, state(1), draws(5))
        checkpoint.save({**COUNTERS, "sampling": 15}, state(2), draws(10))
    except Killed:
        pass
    monkeypatch.undo()
    expected = 5 + 5 * (survivors // 3)
    found = Checkpoint(tmp_path, "me").load()
    assert found.counters["sampling"] == expected
    np.testing.assert_array_equal(found.draws["position"][0, :, 0], np.arange(expected))
    np.testing.assert_array_equal(restore_leaves(state(0), found.state)["a"], state(survivors // 3)["a"])
    # The run goes on over whatever was left lying about.
    again = Checkpoint(tmp_path, "me")
    again.save({**COUNTERS, "sampling": expected + 5}, state(9), draws(expected))
    joined = Checkpoint(tmp_path, "me").load().draws["position"][0, :, 0]
    np.testing.assert_array_equal(joined, np.arange(expected + 5))


def test_a_failed_save_can_be_repeated_in_the_same_process(tmp_path, monkeypatch):
    checkpoint = saved(tmp_path, times=1)
    original = os.replace

    def full(source, target):
        if str(target).endswith("manifest.json"):
            raise OSError("disk full")
        original(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({**COUNTERS, "sampling": 10}, state(1), draws(5))
    monkeypatch.undo()
    checkpoint.save({**COUNTERS, "sampling": 10}, state(1), draws(5))
    np.testing.assert_array_equal(checkpoint.load().draws["position"][0, :, 0], np.arange(10))


def test_everything_is_on_disk_before_it_is_named(tmp_path, monkeypatch):
    synced, renamed = set(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), fsync(handle))[1])

    def checked(source, target):
        assert os.stat(source).st_ino in synced
        renamed.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    saved(tmp_path, times=1)
    assert renamed == ["draws-000001.safetensors", "state-000001.safetensors", "manifest.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '"text"'])
def test_an_unreadable_manifest_is_reported(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(tmp_path, "me")


def test_folders_of_others_are_refused(tmp_path):
    saved(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run"):
        Checkpoint(tmp_path / "run", "you")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    with pytest.raises(CheckpointError, match="another run"):
        Checkpoint(tmp_path / "run", "me")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint(tmp_path / "file", "me")


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_damaged_draws_are_reported(tmp_path, fault):
    saved(tmp_path)
    victim = tmp_path / "draws-000001.safetensors"
    content = victim.read_bytes()
    victim.unlink()
    if fault == "cut":
        victim.write_bytes(content[:40])
    with pytest.raises(CheckpointError, match="draws-000001"):
        Checkpoint(tmp_path, "me").load()


def test_arrays_keep_order_shape_and_type(tmp_path):
    arrays = {
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "fortran": np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4)),
        "strided": np.arange(10, dtype=np.float32)[::3],
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "flag": np.array([True, False]),
    }
    Checkpoint(tmp_path, "me").keep("trained", arrays, sigma=0.1, note=None)
    found = Checkpoint(tmp_path, "me")
    for name, array in found.arrays("trained").items():
        assert (array.shape, array.dtype) == (arrays[name].shape, arrays[name].dtype)
        np.testing.assert_array_equal(array, arrays[name])
    assert found.facts("trained") == {"sigma": 0.1, "note": None}
    assert (found.arrays("other"), found.facts("other")) == (None, {})


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_keys_of_every_kind_come_back(implementation):
    keys = {"key": jax.random.key(7, impl=implementation), "x": np.ones(2)}
    restored = restore_leaves(keys, as_host_leaves(keys))
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(keys["key"])
    np.testing.assert_array_equal(jax.random.bits(restored["key"], (4,)), jax.random.bits(keys["key"], (4,)))


def test_a_state_of_another_form_is_refused():
    with pytest.raises(CheckpointError, match="does not fit"):
        restore_leaves({"a": np.ones(2)}, [np.ones(2), np.ones(2)])


def test_fingerprints_tell_values_types_shapes_and_names_apart():
    base = {"a": np.arange(4.0)}
    others = [
        {"b": np.arange(4.0)}, {"a": np.arange(4)}, {"a": np.arange(4.0).reshape(2, 2)}, {"a": np.arange(4.0) + 1e-9},
        {"a": np.arange(4.0), "c": 1}, {"a": "text"}, {"a": jax.random.key(0)}, {"a": jax.random.key(1)},
    ]  # fmt: skip
    assert len({fingerprint(tree) for tree in [base, *others]}) == 9
    assert fingerprint(base, "x") == fingerprint({"a": np.arange(8.0)[:4]}, "x") != fingerprint(base, "y")


def damaged(folder, **changes):
    """The folder with entries of its manifest changed; None takes one away."""
    saved(folder).keep("weights", {"w": np.ones(2, np.float32)})
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    kept = {name: value for name, value in manifest.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("part", ["number", "state", "draws", "counters", "extra", "facts"])
@pytest.mark.parametrize("value", [None, 1.5])
def test_a_manifest_that_lacks_something_is_damaged(tmp_path, part, value):
    damaged(tmp_path, **{part: value})
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}.*is damaged: it lacks {part},.*Delete the folder"):
        Checkpoint(tmp_path, "me")


OUTSIDE = [
    {part: value}
    for name in ("../other.safetensors", "/tmp/other", "a/b", "a\\b", "..")
    for part, value in (("state", name), ("draws", [name]), ("extra", {"weights": name}))
]


@pytest.mark.parametrize("changes", [*OUTSIDE, {"draws": [3]}], ids=str)
def test_files_outside_the_folder_are_refused(tmp_path, changes):
    damaged(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="which is no file of the folder"):
        Checkpoint(tmp_path, "me")


def test_files_that_do_not_fit_together(tmp_path):
    saved(tmp_path)
    module._write(tmp_path / "draws-000002.safetensors", {"other": np.ones((2, 5), np.float32)})
    with pytest.raises(CheckpointError, match="do not fit together"):
        Checkpoint(tmp_path, "me").load()
