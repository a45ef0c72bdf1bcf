"""The fenced code blocks of a Markdown document."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

NO_RUN = "<!-- no-run -->"


@dataclasses.dataclass(frozen=True)
class CodeBlock:
    """One fenced block: its language, its text, the line of its first line of text, and whether to pass it over."""

    language: str
    text: str
    line: int
    skipped: bool


def code_blocks(document: str) -> Iterator[CodeBlock]:
    """The blocks fenced by ``` in their order. One right below ``<!-- no-run -->`` is marked as skipped."""
    fence, language, first, body, last_text = "", "", 0, [], ""
    for number, line in enumerate(document.splitlines(), start=1):
        if fence:
            if line.strip().startswith(fence) and not line.strip().strip("`"):
                yield CodeBlock(language, "\n".join(body) + "\n", first, last_text == NO_RUN)
                fence, last_text = "", ""
            else:
                body.append(line)
        elif opening := re.match(r"\s*(```+)\s*([\w-]*)", line):
            fence, language = opening.groups()
            first, body = number + 1, []
        elif line.strip():
            last_text = line.strip()
    if fence:
        raise ValueError(f"the block that begins at line {first} is never closed")


def run_block(block: CodeBlock, namespace: dict, path: Path) -> None:
    """Execute a Python block in ``namespace``; a traceback names the document and its line."""
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    exec(code, namespace)
