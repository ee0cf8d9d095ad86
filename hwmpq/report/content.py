"""What a report is made of: a result and all that lies beside it, as JSON values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError
from hwmpq.report.words import part

Entry = Mapping[str, Any]
#: Where an evaluation of a target lies in its folder.
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Content:
    """result: result.json; rows: the fields of LayerRow; frontier: plans {"loss", "latency_s",
    "nbytes", "assignment"}; evidence: of `stages.evidence`; peers: what `bench --against` told."""

    result: Entry
    rows: Sequence[Entry] = ()
    frontier: Sequence[Entry] = ()
    evidence: Entry = field(default_factory=dict)
    peers: Sequence[Entry] = ()


def file_in(place: Path) -> Path:
    """The result.json or evaluation.json in a folder; a file as it is."""
    if not place.is_dir():
        return place
    evaluated = place / EVALUATION
    return evaluated if evaluated.is_file() else place / "result.json"


def read(path: Path) -> Content:
    """A result.json, with the rest from the rows.json beside it; without that file layers as the
    assignment tells. Raises InputError for another kind of file."""
    result = json_of(path)
    if not isinstance(result, dict) or result.get("version") != 1 or "status" not in result:
        raise InputError(f"{path} is no result", None, "the result.json that quantize wrote")
    beside = path.with_name("rows.json")
    more = json_of(beside) if beside.is_file() else {}
    rows = more.get("rows") or [
        {"name": name, "format": fmt, **(part(result, "kernels", name) or {})}
        for name, fmt in (result.get("assignment") or {}).items()
    ]
    return Content(result, rows, more.get("frontier") or [], more.get("evidence") or {})


def with_peers(content: Content, files: Sequence[Path]) -> Content:
    """The content with the rivals in files that `bench --against --json` printed.

    Raises InputError for another kind of file.
    """
    peers = []
    for path in files:
        found = json_of(path)
        if not isinstance(found, dict) or part(found, "against", "latency_s", "median") is None:
            raise InputError(
                f"{path} tells of no other runtime", None,
                "what `hwmpq bench ARTIFACT --against NAME MODEL --json` printed",
            )  # fmt: skip
        peers.append(found["against"])
    return replace(content, peers=[*content.peers, *peers])


def json_of(path: Path) -> Any:
    """The value in a JSON file. Raises InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("cannot read the result", f"{path} ({error})", "result.json") from None
