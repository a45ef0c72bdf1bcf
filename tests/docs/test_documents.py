"""Every code block of the README and of docs/ runs as printed."""

import shlex
from pathlib import Path

import pytest

from code_blocks import CodeBlock, code_blocks, run_block

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [path for path in [README, *sorted((ROOT / "docs").rglob("*.md"))] if path.is_file()]
MOST_SKIPPED = 2


def blocks_of(path: Path, language: str) -> list[CodeBlock]:
    return [block for block in code_blocks(path.read_text(encoding="utf-8")) if block.language == language]


def runs_cli(block: CodeBlock) -> bool:
    return block.text.lstrip().startswith("neurobayes")


def commands(block: CodeBlock) -> list[list[str]]:
    """The arguments of each command of a shell block; comments and line continuations are understood."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


WITH_PYTHON = [path for path in DOCUMENTS if blocks_of(path, "python")]
CLI_BLOCKS = [block for path in DOCUMENTS if path == README for block in blocks_of(path, "bash") if runs_cli(block)]


# The pages that take longest are left to the slow run.
SLOW_PAGES = ("05-two-stage-training.md", "11-which-weights.md")
PAGES = [
    pytest.param(path, id=name, marks=[pytest.mark.slow] if path.name in SLOW_PAGES else [])
    for path, name in zip(WITH_PYTHON, ids(WITH_PYTHON), strict=True)
]


@pytest.mark.parametrize("path", PAGES)
def test_python_blocks_run_in_order(path, tmp_path, monkeypatch, compilation_cache):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks_of(path, "python"):
        if not block.skipped:
            run_block(block, namespace, path)


@pytest.mark.parametrize("block", CLI_BLOCKS, ids=[f"README.md:{block.line}" for block in CLI_BLOCKS])
def test_command_line_blocks_run(block, tmp_path, monkeypatch):
    if block.skipped:
        pytest.skip("marked no-run")
    from typer.testing import CliRunner

    from neurobayes.cli import app

    monkeypatch.chdir(tmp_path)
    for program, *arguments in commands(block):
        assert program == "neurobayes", f"line {block.line}: a block runs neurobayes only, not {program}"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"neurobayes {shlex.join(arguments)}\n{result.output}\n{result.exception!r}"


def test_the_readme_has_code_and_little_is_skipped():
    if not README.is_file():
        pytest.skip("there is no README.md yet")
    assert blocks_of(README, "python"), "README.md has no python block"
    skipped = [
        f"{path.name}:{block.line}"
        for path in DOCUMENTS
        for language in ("python", "bash")
        for block in blocks_of(path, language)
        if block.skipped
    ]
    assert len(skipped) <= MOST_SKIPPED, f"too many blocks are marked no-run: {skipped}"


def test_blocks_are_found_with_their_line_and_mark():
    text = "intro\n```python\na = 1\n```\n<!-- no-run -->\n\n````bash\nx ``` y\n````\n```\nplain\n```\n"
    assert list(code_blocks(text)) == [
        CodeBlock("python", "a = 1\n", 3, False),
        CodeBlock("bash", "x ``` y\n", 8, True),
        CodeBlock("", "plain\n", 11, False),
    ]


def test_an_unclosed_block_is_an_error():
    with pytest.raises(ValueError, match="line 2"):
        list(code_blocks("```python\na = 1\n"))


def test_a_traceback_names_the_line_of_the_document():
    block = CodeBlock("python", "a = 1\nraise KeyError(a)\n", 7, False)
    with pytest.raises(KeyError) as caught:
        run_block(block, {}, Path("GUIDE.md"))
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("GUIDE.md", 8)


def test_commands_join_continued_lines_and_drop_comments():
    block = CodeBlock("bash", "neurobayes fit a.csv \\\n  --target 'two words'  # why\n\n", 1, False)
    assert commands(block) == [["neurobayes", "fit", "a.csv", "--target", "two words"]]
