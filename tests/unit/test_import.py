"""``import neurobayes`` is cheap, and its names lead where they say."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import neurobayes

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``code``."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


@pytest.mark.parametrize("code", ["import neurobayes", "import neurobayes; dir(neurobayes); neurobayes.__version__"])
def test_import_loads_no_framework(code):
    loaded = modules_after(code)
    assert "neurobayes" in loaded
    assert not loaded & {"jax", "flax", "optax", "numpyro", "sklearn", "scipy", "matplotlib", "pandas", "typer", "rich"}


def test_star_import_gives_every_public_name():
    namespace = {}
    exec("from neurobayes import *", namespace)
    assert set(neurobayes.__all__) <= set(namespace)


@pytest.mark.parametrize("name", neurobayes.__all__)
def test_public_name_is_what_it_says(name):
    value = getattr(neurobayes, name)
    assert value.__name__.rpartition(".")[2] == name
    assert value is getattr(neurobayes, name)
    assert value.__doc__


def test_dir_lists_every_public_name():
    assert set(neurobayes.__all__) <= set(dir(neurobayes))


def test_names_are_listed_once_and_sorted():
    assert list(neurobayes.__all__) == sorted(set(neurobayes.__all__))


def test_unknown_name_raises_with_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'PartialBnn' \(closest: 'PartialBNN'\)"):
        neurobayes.PartialBnn  # noqa: B018


def test_version_is_that_of_the_project():
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    assert neurobayes.__version__ in (project["version"], "0+unknown")
