"""What a reward can compare costs with."""

from __future__ import annotations

from hwmpq.errors import InputError
from hwmpq.stages.budget import Latency, parse_latency, parse_sums
from hwmpq.stages.job import Options


def latency_target(options: Options) -> Latency | None:
    """The latency that is asked for. Raises InputError unless some cost has a target, and nothing
    else is asked for."""
    limit = parse_latency(options.latency)
    sums = parse_sums(options.max_size, options.max_bops)
    if options.max_drop is not None or (limit and limit.fastest) or not (limit or sums):
        raise InputError(
            f"budget of a search by {options.method}", options.latency or options.max_drop,
            "--latency (a time or a share), --max-size, --max-bops: one or more",
            "Its reward compares costs with targets, and knows no drop.",
        )  # fmt: skip
    return limit
