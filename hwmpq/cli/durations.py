"""Lengths of time as people write them."""

from __future__ import annotations

import re

from hwmpq.errors import InputError


def duration(text: str | None, option: str) -> float | None:
    """'90', '90s', '10m', '2h' -> seconds. Raises InputError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?", text.strip())
    seconds = float(match[1]) * {"m": 60, "min": 60, "h": 3600}.get(match[2], 1) if match else 0.0
    if not seconds > 0:
        raise InputError(option, repr(text), "a time such as 90s, 10m or 2h")
    return seconds
