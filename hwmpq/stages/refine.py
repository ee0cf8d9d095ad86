"""What post-training quantization does for a chosen plan, beyond the calibration of the menu."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from hwmpq.quantizers import Quantizers
from hwmpq.stages.facts import RANGES, batches
from hwmpq.stages.job import Images, Job
from hwmpq.types import Assignment, digest

if TYPE_CHECKING:
    from torch import Tensor


def refine(job: Job, images: Images, assignment: Assignment, quantizers: Quantizers) -> Quantizers:
    """The quantizers after the job's steps for a plan; what is learned is kept in the store."""
    from hwmpq.quantize.correct import corrected
    from hwmpq.quantize.ptq import OF_PLAN

    asked = [step for step in OF_PLAN if step in job.options.ptq]
    if not asked:
        return quantizers
    given = batches(job, images)
    for step in asked:
        if step == "affine":
            with job.progress.stage("affine correction", len(job.graph.nodes)) as advance:
                quantizers = corrected(job.graph, assignment, quantizers, given, lambda: advance(1))
        else:
            quantizers = _adaround(job, given, images, assignment, quantizers, step)
    return quantizers


def _adaround(
    job: Job, given: list[Tensor], images: Images, assignment: Assignment, quantizers: Quantizers,
    step: str,
) -> Quantizers:  # fmt: skip
    from hwmpq.quantize.adaround import VERSION, Keeper, Settings, adaround

    settings = Settings(blocks=step == "adaround-blocks")
    key = digest(
        [VERSION, asdict(settings), job.key, images.calib.digest, RANGES, job.options.ptq,
         job.options.seed, assignment]
    )  # fmt: skip

    def forecast(seconds: float) -> None:
        if seconds:
            job.progress.note(f"{step}: about {seconds:.0f} s; stopping loses one unit at most")

    with job.progress.stage(step, 100) as advance:
        shown = 0

        def note(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // total
            advance(percent - shown)
            shown = percent

        keeper = Keeper(
            lambda unit: job.store.fact("adaround", f"{key}|{unit}"),
            lambda unit, value: job.store.put_fact("adaround", f"{key}|{unit}", value),
            note, forecast,
        )  # fmt: skip
        return adaround(
            job.graph, assignment, quantizers, given, settings, keeper,
            job.options.seed,
        )  # fmt: skip
