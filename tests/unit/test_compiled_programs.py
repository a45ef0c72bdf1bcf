"""Programs kept for the next process: they are found again, and only where nobody else can put some."""

import json
import os
import subprocess
import sys

import jax
import pytest

import neurobayes as nb
from neurobayes import compiled_programs
from neurobayes.errors import OptionError

FIT = """
import json, sys, warnings, neurobayes as nb, jax, numpy as np
kept = nb.cache_programs(sys.argv[1])
found = {"hit": 0, "miss": 0}
def note(name, **_):
    if "compilation_cache/cache_" in name: found["hit" if "hit" in name else "miss"] += 1
jax.monitoring.register_event_listener(note)
x = np.linspace(-1, 1, 30)[:, None]
warnings.simplefilter("ignore")
model = nb.PartialBNN(nb.FlaxMLP([4], 1), num_backbones=1)
model.fit(x, x[:, 0], sgd_epochs=5, map_sigma=1.0, num_samples=20, progress_bar=False, seed=0)
print(json.dumps({"mean": model.predict(x)[0].tolist(), "kept": str(kept), **found}))
"""


def in_a_process(folder):
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # see the notes of cache_programs
    command = [sys.executable, "-c", FIT, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    first, second = in_a_process(tmp_path / "kept"), in_a_process(tmp_path / "kept")
    assert first["miss"] > 5
    assert second["miss"] == 0 and second["hit"] >= first["miss"]
    assert second["mean"] == first["mean"]
    assert os.listdir(first["kept"])


def test_the_folder_is_made_for_its_user_alone(tmp_path, compilation_cache):
    folder = nb.cache_programs(tmp_path / "a" / "b")
    assert folder.parent == tmp_path / "a" / "b" and folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    assert nb.cache_programs(tmp_path / "a" / "b") == folder
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_a_umask_that_lets_the_group_write_is_no_hindrance(tmp_path, compilation_cache):
    before = os.umask(0o002)
    try:
        folder = nb.cache_programs(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_processors_and_versions_have_folders_of_their_own(tmp_path, compilation_cache, monkeypatch):
    here = nb.cache_programs(tmp_path)
    monkeypatch.setattr(compiled_programs.platform, "machine", lambda: "another")
    assert nb.cache_programs(tmp_path) != here


def test_by_default_it_is_in_the_cache_of_the_user(tmp_path, compilation_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nb.cache_programs().parent == tmp_path / "neurobayes"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_write_to_is_refused(tmp_path, mode):
    before = jax.config.jax_compilation_cache_dir
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(OptionError, match="written to by other users"):
        nb.cache_programs(shared)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be made"):
        nb.cache_programs(tmp_path / "file")
