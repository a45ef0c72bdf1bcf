"""Set up this checkout and run it. Needs nothing but Python 3.11 or newer.

    python3 dev.py demo [ARGS]    install, then run `neurobayes demo ARGS`
    python3 dev.py test [ARGS]    install for development, then run the tests (ARGS go to pytest)
    python3 dev.py check          every check: formatting, lint, types, layers, all tests

Add `--venv DIR` to use another virtual environment than `.venv`. The environment is made on
the first run and brought up to date when pyproject.toml or constraints.txt has changed; the
checkout is installed in editable mode, so changes of the source count at once.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EXTRA_FOR = {"demo": "plots", "test": "dev", "check": "dev"}
# An environment installed with one extra also serves the commands that need these.
COVERS = {"plots": ["plots"], "dev": ["dev", "plots"]}
# Two workers suit two cores and a laptop's memory; a file stays on one worker and compiles its programs once.
WORKERS = ["-n", "2", "--dist", "loadfile"]


def main() -> int:
    """Run the command given on the command line; the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this is where an older Python is told
        return fail(f"neurobayes needs Python 3.11 or newer, and this is {sys.version.split()[0]}: {sys.executable}")
    # --help after a command is for the program that the command runs.
    parser = argparse.ArgumentParser(prog="dev.py", add_help=False, allow_abbrev=False)
    parser.add_argument("command", choices=list(EXTRA_FOR))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0
    options, arguments = parser.parse_known_args()
    if options.command == "check" and arguments:
        parser.error(f"check takes no arguments: {shlex.join(arguments)}")

    venv = options.venv.resolve()
    install(venv, EXTRA_FOR[options.command])
    if options.command == "demo":
        run([program(venv, "neurobayes"), "demo", *arguments])
    elif options.command == "test":
        run([program(venv, "python"), "-m", "pytest", *WORKERS, *arguments], cwd=ROOT)
    else:
        check(venv)
    return 0


def check(venv: Path) -> None:
    """Run every check, the quick ones first; the first that fails ends the run."""
    python = program(venv, "python")
    run([python, "-m", "ruff", "format", "--check"], cwd=ROOT)
    run([python, "-m", "ruff", "check"], cwd=ROOT)
    run([python, "-m", "pyright", "--pythonpath", python], cwd=ROOT)
    run([program(venv, "lint-imports")], cwd=ROOT)
    run([python, "-m", "pytest", *WORKERS, "-m", ""], cwd=ROOT)


def install(venv: Path, extra: str) -> None:
    """Make sure that ``venv`` holds this checkout with ``extra``, at the versions of constraints.txt."""
    wanted = fingerprint()
    python = Path(program(venv, "python"))
    if python.exists() and stamp(venv, extra).is_file() and stamp(venv, extra).read_text() == wanted:
        return
    for stale in COVERS:  # a failed installation must not look like a finished one
        stamp(venv, stale).unlink(missing_ok=True)
    if not has_pip(python):
        run([sys.executable, "-m", "venv", str(venv)])
    options = ["--disable-pip-version-check", "--constraint", "constraints.txt"]
    run([str(python), "-m", "pip", "install", *options, "--editable", f".[{extra}]"], cwd=ROOT)
    for covered in COVERS[extra]:
        stamp(venv, covered).write_text(wanted)


def has_pip(python: Path) -> bool:
    """Whether ``python`` is a working interpreter with pip; not so after an interrupted set-up."""
    if not python.exists():
        return False
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def fingerprint() -> str:
    """What an installation depends on: the declared versions, and where the checkout lies."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def stamp(venv: Path, extra: str) -> Path:
    """The file that marks ``extra`` as installed."""
    return venv / f"neurobayes-{extra}.stamp"


def program(venv: Path, name: str) -> str:
    """The path of an installed program."""
    return str(venv / "Scripts" / f"{name}.exe" if os.name == "nt" else venv / "bin" / name)


def run(command: list[str], cwd: Path | None = None) -> None:
    """Print a command and run it; a command that fails ends this program with the same status."""
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    try:
        status = subprocess.run(command, cwd=cwd).returncode
    except KeyboardInterrupt:
        status = 130
    if status:
        sys.exit(fail(f"this command ended with status {status}: {shlex.join(command)}", status))


def fail(message: str, status: int = 1) -> int:
    """Print what went wrong; the exit status."""
    print(f"dev.py: {message}", file=sys.stderr)
    return status if 0 < status < 256 else 1


if __name__ == "__main__":
    sys.exit(main())
