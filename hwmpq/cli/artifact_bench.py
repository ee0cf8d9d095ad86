"""Timing an artifact, and other programs beside it. numpy and the TVM runtime are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.cli.artifact_jobs import runtime_only
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError, UnknownName
from hwmpq.report import words

#: Names of programs that `bench --against` may time beside an artifact.
AGAINST = ("torch", "onnxruntime", "openvino")
#: The longest silence of the child, which loads TVM and the artifact first.
_DEADLINE_S = 240.0


def bench_artifact(
    artifact: str, rounds: int = 24, threads: int | None = None, seed: int = 0,
    against: tuple[str, str] | None = None,
) -> Answer:  # fmt: skip
    """Time whole runs in a child process, as `quantize` does."""
    if against is not None:
        _check_against(against[0])
    runtime_only()
    from hwmpq.artifact import read_manifest
    from hwmpq.measure import Cell, CellTiming, Protocol, WorkerProcess

    manifest = read_manifest(Path(artifact))
    count = threads or int(manifest.get("threads", 1))
    cell = Cell("artifact", "artifact", path=str(Path(artifact).resolve()))
    protocol = Protocol(rounds=rounds, threads=count, seed=seed)
    with WorkerProcess(threads=count) as worker:
        # time_block would compile a kernel first, for which TVM's runtime alone is not enough
        request = {"cells": [cell.to_json()], **protocol.to_json()}
        reply = worker.call("time", request, _DEADLINE_S)
    timing = CellTiming.from_json(reply["cells"][0])
    if timing.error:
        raise InputError("the artifact could not be timed", timing.error)
    found = timing_json(timing.samples_s)
    told: dict[str, Any] = {
        "version": VERSION, "artifact": str(artifact), "latency_s": found, "threads": count,
        "target": manifest["target"]["name"], "quality": dict(timing.quality),
    }  # fmt: skip
    lines = [
        f"{words.seconds(found['median'])} median (95 % interval "
        f"{words.interval(found['interval'])}), fastest {words.seconds(found['min'])}, "
        f"p90 {words.seconds(found['p90'])}; {found['samples']} samples, {count} thread(s)"
    ]
    if timing.quality.get("noisy"):
        lines.append("The machine was busy: these times are disturbed.")
    if against is not None:
        other = _torch_seconds(against[1], manifest, rounds, count)
        ratio = other["median"] / found["median"]
        told["against"] = {"name": "torch", "model": against[1], "latency_s": other,
                           "ratio": ratio}  # fmt: skip
        lines.append(f"torch eager: {words.seconds(other['median'])}, {ratio:.2f} times as long")
    return Answer(told, "\n".join(lines))


def timing_json(samples_s: Sequence[float]) -> dict[str, Any]:
    """{"median", "interval", "min", "p90", "samples"} of the contract."""
    from hwmpq.measure import median_interval

    return {
        "median": float(np.median(samples_s)), "interval": list(median_interval(samples_s)),
        "min": min(samples_s), "p90": float(np.quantile(samples_s, 0.9)),
        "samples": len(samples_s),
    }  # fmt: skip


def _check_against(name: str) -> None:
    if name not in AGAINST:
        raise UnknownName("program for --against", name, AGAINST)
    if name != "torch":
        raise InputError(
            f"--against {name} is not supported in this version", name, "torch",
            "Time it with its own tool, or compare with --against torch MODEL.",
        )  # fmt: skip


def _torch_seconds(
    spec: str, manifest: Mapping[str, Any], rounds: int, threads: int
) -> dict[str, Any]:
    """Time torch eager fp32 on this machine under the same lock and pinning."""
    import torch

    from hwmpq.frontend.model import load_model
    from hwmpq.measure.gates import machine_lock, pinned
    from hwmpq.measure.timing import Calls

    entries = manifest["inputs"]
    model = load_model(spec, input_shape=entries[0]["shape"]).module
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal(e["shape"]).astype(np.float32) for e in entries]
    inputs = [torch.from_numpy(array) for array in noise]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with machine_lock(), pinned(threads == 1), torch.inference_mode():
            calls = Calls(lambda: model(*inputs))
            calls.run(3)
            count = max(1, round(0.008 / max(calls.run(3) / 3, 1e-9)))
            return timing_json([calls.run(count) / count for _ in range(rounds)])
    finally:
        torch.set_num_threads(before)
