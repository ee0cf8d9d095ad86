"""A target file for the machine that this runs on: what it says of itself, what was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.formats import format_named, known_formats
from hwmpq.kernels.micro import Micro, TileMicro, micros
from hwmpq.measure.environment import hardware
from hwmpq.measure.peaks import clock_hz, peak_macs_per_s, read_bandwidths
from hwmpq.stages.job import Progress, Silent
from hwmpq.targets import Target
from hwmpq.toml_text import dumps

#: Peaks that every target states: one of each kind of accumulator.
_FAMILIES = ("fp32.fp32", "u8.s8")
_SHARED = Path("/sys/devices/system/cpu/cpu0/cache")


def probe_machine(out: Path, progress: Progress | None = None) -> Target:
    """Measure this machine and write OUT, whose name is the target's.

    The code is generated as for the best shipped target that fits. Raises InputError where none
    does, the system tells no caches, or OUT exists.
    """
    if out.suffix != ".toml" or out.exists():
        raise InputError("target file", out, "a new NAME.toml; NAME will be the target's")
    progress = progress or Silent()
    base, host = targets.native(), hardware()
    able = [
        micro
        for micro in micros()
        # tiles have no peak of their own: it is measured with vectors
        if micro.requires <= targets.host_features() and not isinstance(micro, TileMicro)
    ]
    with progress.stage("clock and bandwidths", None):
        clock, levels = clock_hz(base), read_bandwidths(base)
    peaks = _peaks(able, base, clock, progress)
    when = f"`hwmpq target probe`, {time.strftime('%Y-%m-%d')}, {host['model']}"
    text = dumps({
        "description": f"{host['model']}, {host['cores']} cores, probed",
        "rank": 0, "features": sorted(targets.host_features()),
        "vector_bytes": max(m.vector_bytes for m in able),
        "registers": max(m.registers for m in able),
        "tvm": dict(base.tvm),
        "caches": _caches(host["caches"]),
        "peaks": peaks,
        "protocol": {"rounds": base.protocol.rounds, "epoch_s": base.protocol.epoch_s},
        "measured": {
            "clock_hz": round(clock),
            "bandwidth": {level.name: round(level.bytes_per_s) for level in levels},
        },
        "sources": {
            "features": f"/proc/cpuinfo, {host['model']}",
            "registers": "those of the kernels that run here",
            "caches": f"{_SHARED.parent}; L3: this core's share",
            "peaks": f"{when}: the kernels' own instructions, operands in L1, over the clock",
            "protocol": f"as for {base.name}",
            "measured": when,
        },
    })  # fmt: skip
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("cannot write the target file", f"{out} ({error.strerror})") from None
    return targets.read(out)


def _peaks(able: list[Micro], base: Target, clock: float, progress: Progress) -> dict[str, float]:
    """'<activation>.<weight>' -> multiply-accumulates per cycle, of the best micro-kernel: for the
    two families, and for what is multiplied natively."""
    ways: dict[str, list[tuple[Micro, str]]] = {}
    for name in known_formats():
        fmt = format_named(name)
        pair = f"{fmt.activation.name}.{fmt.weight.name}"
        for micro in able:
            if micro.why_not(fmt) is None and (
                pair in _FAMILIES or micro.execution(fmt) == "native"
            ):
                ways.setdefault(pair, []).append((micro, name))
    found = {}
    with progress.stage("peaks", len(ways)) as advance:
        for pair, group in ways.items():
            best = max(peak_macs_per_s(m, format_named(name), base) for m, name in group)
            found[pair] = round(best / clock, 1)
            advance(1)
    return found


def _caches(found: Mapping[str, int]) -> dict[str, int]:
    """Bytes that one core can count on; l3: its share."""
    if not {"L1", "L2"} <= set(found):
        raise InputError("caches of this machine", dict(found), "L1 and L2, in /sys or by lscpu")
    return {"l1d": found["L1"], "l2": found["L2"], "l3": found.get("L3", 0) // _sharing("3")}


def _sharing(level: str) -> int:
    """How many cores share a cache of this level; 1 where the system does not say."""
    for index in _SHARED.glob("index*"):
        if (index / "level").read_text().strip() == level:
            text = (index / "shared_cpu_list").read_text().strip()
            spans = [part.split("-") for part in text.split(",")]
            return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
    return 1
