"""An artifact from an assignment that somebody wrote or changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import artifact, targets
from hwmpq.artifact import golden
from hwmpq.artifact.cuda import driver
from hwmpq.artifact.folder import is_ours
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import format_named
from hwmpq.kernels import why_not
from hwmpq.quantizers import Quantizers
from hwmpq.side_jobs.batches import at_sizes
from hwmpq.side_jobs.inputs import calibrated, named_arrays, noise
from hwmpq.stages.build import make_artifact
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.menu import make_menu
from hwmpq.stages.place import check_above
from hwmpq.stages.refine import refine
from hwmpq.stages.verify import replayed, running
from hwmpq.types import Assignment


def compile_model(
    options: Options,
    assignment: Mapping[str, str],
    quantizers: str | None = None,
    progress: Progress | None = None,
    batch: Sequence[int] = (),
    system_lib: bool = False,
) -> dict[str, Any]:
    """An artifact in options.out from an assignment, replayed on its golden samples.

    quantizers: a file of an earlier artifact; without it they are calibrated on --calib-data.
    batch: sizes to compile for, instead of the model's own. system_lib: see `make_artifact`.
    For another kind of machine, and with no device of that kind, it is not run: "parity" is None.
    Raises InputError naming every layer that is missing or cannot run in its format.
    """
    out = Path(options.out)
    if out.exists() and not is_ours(out):
        raise InputError(
            "the output folder holds something else", out, "a new folder or an artifact",
            "Choose another --out.",
        )  # fmt: skip
    check_above(out)
    here = options.device != "local" or not _elsewhere(options.target)
    opened = open_job(options, progress or Silent(), here=here, timed=False)
    with opened.store:
        jobs = at_sizes(opened, batch)
        job = jobs[min(jobs)]
        if system_lib and job.target.gpu:
            raise InputError(f"--system-lib for target {job.target.name}", None, "a CPU's target")
        chosen, *_ = [checked(one, assignment) for one in jobs.values()]
        numbers, samples = _numbers(job, chosen, quantizers)
        with job.progress.stage("compile", None):
            others = {size: one for size, one in jobs.items() if one is not job}
            made = make_artifact(job, chosen, numbers, out, samples, others, system_lib)
        parity = None
        if here:
            with running(job, out) as loaded:
                parity = asdict(replayed(loaded))
        else:
            hint = f"; `hwmpq verify {out} --emulated` does" if job.target.gpu else ""
            job.progress.note(f"not run: this machine is none for {job.target.name}{hint}")
    manifest = artifact.read_manifest(out)
    return {
        "version": 1, "artifact": str(out), "model": options.model, "target": job.target.name,
        "threads": options.threads, "batch": sorted(jobs), "assignment": made.assignment,
        "kernels": manifest["kernels"],
        "nbytes": {
            "weights": made.weight_bytes,
            "artifact": artifact.nbytes(out),
            "peak_memory": manifest["nbytes"]["peak_memory"],
        },
        "parity": parity,
        **({"machine_code": manifest["machine_code"]} if job.target.gpu else {}),
    }  # fmt: skip


def _numbers(
    job: Job, chosen: Assignment, file: str | None
) -> tuple[Quantizers, Mapping[str, np.ndarray]]:
    """Quantizers, from a file or calibrated, and inputs for golden samples: data where there are
    any, else seeded noise."""
    read = fitting(job, Quantizers.load(Path(file)), chosen) if file else None
    if read and not (job.options.data or job.options.calib_data):
        return read, noise(job)
    if len(job.graph.inputs) > 1:
        arrays = named_arrays(job)
        return read or calibrated(job, arrays, chosen), arrays
    images = load_images(job)
    samples = images.calib.batch(range(min(golden.SAMPLES, len(images.calib))))
    if not read:
        menu = make_menu(job.network, job.target, tuple(dict.fromkeys(chosen.values())))
        read = refine(job, images, chosen, calibrate(job, images, menu))
    return read, {job.graph.inputs[0]: samples}


def _elsewhere(name: str) -> bool:
    """Is that a target of another kind of machine, or of a GPU that is not here?"""
    if name == "native":
        return False
    target = targets.load(name)
    return target.foreign or (target.gpu and not driver.present())


def complete(job: Job, assignment: Mapping[str, str]) -> Assignment:
    """In the layers' order. Raises UnknownName; InputError listing the layers that are missing."""
    names = job.network.names
    for name in assignment:
        if name not in names:
            raise UnknownName("layer in the assignment", name, names)
    missing = [name for name in names if name not in assignment]
    if missing:
        raise InputError(
            f"the assignment lacks {len(missing)} of {len(names)} layers: {', '.join(missing)}",
            next="Name a format for every layer; `hwmpq inspect` lists them.",
        )
    return {name: assignment[name] for name in names}


def checked(job: Job, assignment: Mapping[str, str]) -> Assignment:
    """`complete`, and raises InputError listing the layers that no kernel of the target runs."""
    found = complete(job, assignment)
    wrong = []
    for layer in job.network.layers:
        fmt = format_named(found[layer.name])
        reason = why_not(layer.workload, fmt, job.target.features)
        if reason:
            wrong.append(f"{layer.name} in {fmt.name}: {reason}")
    if wrong:
        raise InputError(
            f"{len(wrong)} layers cannot run in their format on {job.target.name}",
            "; ".join(wrong), None, "`hwmpq inspect` lists the formats of every layer.",
        )  # fmt: skip
    return found


def fitting(job: Job, quantizers: Quantizers, assignment: Assignment) -> Quantizers:
    """Raises InputError for quantizers of another model or without the formats chosen."""
    for layer in job.network.layers:
        if not layer.workload.has_weight:
            continue
        shape = quantizers.weight(layer.name, assignment[layer.name]).codes.shape
        if shape != layer.workload.weight_shape:
            raise InputError(
                f"weights of layer {layer.name!r} in the quantizers", shape,
                str(layer.workload.weight_shape), "Use quantizers of this very model.",
            )  # fmt: skip
    return quantizers
