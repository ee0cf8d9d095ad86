"""The list of what a GPU launches: read as it was written, and never outside its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hwmpq.errors import InputError
from hwmpq.launches import Launch, Launches

ONE = Launch("k", (2, 1), 64, 0, (0, 1, 2), 2, 8, "float32")
ALL = Launches("sm_90", (16, 64, 32), (0,), (1,), (2,), (ONE,))


def parsed(**changes: Any) -> Launches:
    return Launches.parse(json.dumps({**ALL.to_json(), **changes}).encode(), Path("a"))


def test_round_trip() -> None:
    assert parsed() == ALL


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": [3]},
        {"inputs": [-1]},
        {"buffers": [16, 64, 31]},
        {"buffers": [16, 0, 32]},
        {"arch": "x86"},
        {"launches": [{**ALL.to_json()["launches"][0], "arguments": [0, 1, 3]}]},
        {"launches": [{**ALL.to_json()["launches"][0], "kernel": "k;k"}]},
        {"launches": [{**ALL.to_json()["launches"][0], "threads": 2048}]},
        {"launches": [{**ALL.to_json()["launches"][0], "blocks": [0, 1]}]},
        {"launches": [{**ALL.to_json()["launches"][0], "more": 1}]},
        {"launches": None},
    ],
)
def test_what_leads_outside_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="damaged list of launches of a"):
        parsed(**changes)
