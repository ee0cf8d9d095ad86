"""README and docs: commands exist, data parses, code runs.

Every fenced block with a language is tested. `<!-- slow: WHY -->` before it: it runs only with
HWMPQ_SLOW_DOCS=1, page by page from the top, in one folder per page, which is a clone of the last
commit where the page begins with `make demo`; `<!-- not run: WHY -->`: it needs what no test has.
Both are listed as skips with their reason; their commands are still parsed.
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
    folder = place(tmp_path, newcomer=any("$ make demo" in step.text for step in steps))
    paths = [folder / ".venv/bin", Path(sys.executable).parent, os.environ["PATH"]]
    env = {**os.environ, "PATH": ":".join(map(str, paths))}
    for step in steps:
        if step.title:
            (folder / step.title).write_text(step.text)
        if step.when == "not run":
            continue
        if step.language == "console":
            program = ["bash", "-euc", "\n".join(step.commands)]
        elif step.language == "python":
            program = ["python", "-c", step.text]
        else:
            continue
        done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"


def place(folder: Path, newcomer: bool) -> Path:
    """Where a page is followed: a fresh clone, whose environment is made on the way, or a folder
    beside this one's."""
    if newcomer:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
        return folder / "clone"
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_results_page_is_what_the_files_say() -> None:
    made = bench_tool.load("results_page").page(ROOT / "docs/results")
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == made


def test_what_a_bench_leaves_becomes_a_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, results = bench_tool.load("record"), bench_tool.load("results_page")
    file = tmp_path / "threads.json"
    words = ["/home/me/art", "--model=npz:/data/x.npz#test", "--calls", "9", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["/src/tools/bench/threads.py", *words])
    told = {"calls": 9, "seconds": {"1 thread": 0.123456, "8": [1, 2.0]}, "either": "a|b"}
    table = record.quantities(told)
    record.show(table)
    assert "1 thread 0.1235, 8 1, 2" in capsys.readouterr().out
    record.write(file, table)
    (tmp_path / "page.toml").write_text(
        '[[section]]\ntitle = "Threads"\nrecords = ["threads"]\nabout = "Eight."'
    )
    made = results.page(tmp_path)
    assert "## Threads\n\nEight.\n\n`python tools/bench/threads.py art " in made
    assert "art '--model=npz:x.npz#test' --calls 9`, 20" in made
    assert "| calls | 9 |\n| seconds | 1 thread 0.1235, 8 1, 2 |\n| either | a\\|b |" in made
    (tmp_path / "lost.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no section of page.toml shows \['lost'\]"):
        results.page(tmp_path)
