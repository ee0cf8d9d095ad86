"""README and docs: commands exist, data parses, code runs.

Every fenced block with a language is tested. `<!-- slow: WHY -->` before it: it runs only with
HWMPQ_SLOW_DOCS=1, page by page from the top, in one folder per page; `<!-- not run: WHY -->`: it
needs what no test has. Both are listed as skips with their reason; their commands are still parsed.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import bench_tool
import pytest
import typer

from hwmpq.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- (slow|not run): (.+?) -->\n)?```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """page: relative to the checkout; when: '' (in the suite), 'slow' or 'not run', and why;
    title: the file that it is."""

    page: str
    line: int
    when: str
    why: str
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Lines of a shell session, without what they print."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line[2:] for line in lines if line.startswith("$ ")]


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            when, why, language, title, body = (part or "" for part in match.groups())
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(str(page.relative_to(ROOT)), line, when, why, language, title, body))
    return found


BLOCKS = blocks()
COMMAND: Any = typer.main.get_command(app)
SHELL = [block for block in BLOCKS if block.language == "console"]


def test_every_block_has_a_language_that_is_tested() -> None:
    known = {"console", "python", "toml", "json", "csv", "text"}
    assert {block.language for block in BLOCKS} <= known
    for page in PAGES:  # an opening fence that the pattern above misses is one that nobody tests
        fences = re.findall(r"^```.*$", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == 2 * sum(block.page == str(page.relative_to(ROOT)) for block in BLOCKS)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_understood(block: Block) -> None:
    """Every `hwmpq` of a session: the command exists and takes these options."""
    for line in block.commands:
        words = shlex.shlex(re.sub(r"\s#.*", "", line), posix=True, punctuation_chars=True)
        words.commenters, words.whitespace_split = "", True
        for separator, part in groupby(words, lambda word: set(word) <= set("&|;")):
            command = [word for word in part if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if not separator and command and command[0].endswith("hwmpq"):
                understood(command[1:])


def understood(words: list[str]) -> None:
    """Raises what typer raises for a command line that it does not understand."""
    command, names = COMMAND, []
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no command {' '.join([*names, *words])}"
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    if "--help" not in words:
        command.make_context(" ".join(names), list(words))


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in ("toml", "json", "csv")], ids=str
)
def test_data_parses(block: Block) -> None:
    read = {"toml": tomllib.loads, "json": json.loads, "csv": lambda text: list(csv.reader(text))}
    assert read[block.language](block.text)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_programs_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(block.text, str(block), "exec")
    if block.when:
        pytest.skip(f"{block.when}: {block.why}")
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})


def sessions() -> dict[str, list[Block]]:
    """Page -> its blocks that make or run something."""
    found = defaultdict(list)
    for block in BLOCKS:
        if block.title or block.language in ("console", "python"):
            found[block.page].append(block)
    return found


@pytest.mark.parametrize(("page", "steps"), sessions().items(), ids=list(sessions()))
def test_a_page_from_top_to_bottom(page: str, steps: list[Block], tmp_path: Path) -> None:
    if os.environ.get("HWMPQ_SLOW_DOCS") != "1":
        told = [f"{step.line} {step.when}: {step.why}" for step in steps if step.when]
        pytest.skip(f"set HWMPQ_SLOW_DOCS=1 to run it; {'; '.join(told) or 'nothing slow'}")
    for name in ("tools", "examples", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for step in steps:
        if step.title:
            (tmp_path / step.title).write_text(step.text)
        if step.when == "not run" or "$ make demo" in step.text:  # of an environment of its own
            continue
        if step.language == "console":
            program = ["bash", "-euc", "\n".join(step.commands)]
        elif step.language == "python":
            program = [sys.executable, "-c", step.text]
        else:
            continue
        done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"


def test_results_page_is_what_the_files_say() -> None:
    made = bench_tool.load("../results_page").page(ROOT / "docs/results")
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == made
