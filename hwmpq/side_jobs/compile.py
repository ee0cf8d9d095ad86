"""An artifact from an assignment that somebody wrote or changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import targets
from hwmpq.artifact import golden, read_manifest
from hwmpq.artifact.folder import is_ours
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import format_named
from hwmpq.kernels import why_not
from hwmpq.quantizers import Quantizers
from hwmpq.stages.build import make_artifact
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import (
    Images,
    Job,
    Options,
    Progress,
    Silent,
    input_shape,
    load_images,
    open_job,
)
from hwmpq.stages.menu import make_menu
from hwmpq.stages.refine import refine
from hwmpq.stages.verify import replayed, running
from hwmpq.types import Assignment


def compile_model(
    options: Options,
    assignment: Mapping[str, str],
    quantizers: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """An artifact in options.out from an assignment, replayed on its golden samples.

    quantizers: a file of an earlier artifact; without it they are calibrated on --calib-data. For
    another kind of machine, and with no device of that kind, it is not run: "parity" is None.
    Raises InputError naming every layer that is missing or cannot run in its format.
    """
    out = Path(options.out)
    if out.exists() and not is_ours(out):
        raise InputError(
            "the output folder holds something else", out, "a new folder or an artifact",
            "Choose another --out.",
        )  # fmt: skip
    here = options.device != "local" or not _elsewhere(options.target)
    job = open_job(options, progress or Silent(), here=here, timed=False)
    with job.store:
        chosen = checked(job, assignment)
        images = load_images(job) if options.data or options.calib_data or not quantizers else None
        if quantizers:
            numbers = _fitting(job, Quantizers.load(Path(quantizers)), chosen)
        else:
            assert images is not None
            menu = make_menu(job.network, job.target, tuple(dict.fromkeys(chosen.values())))
            numbers = refine(job, images, chosen, calibrate(job, images, menu))
        with job.progress.stage("compile", None):
            made = make_artifact(job, chosen, numbers, out, _samples(job, images))
        parity = None
        if here:
            with running(job, out) as loaded:
                parity = asdict(replayed(loaded))
        else:
            job.progress.note(f"not run: this machine is none for {job.target.name}")
    manifest = read_manifest(out)
    return {
        "version": 1, "artifact": str(out), "model": options.model, "target": job.target.name,
        "threads": options.threads, "assignment": made.assignment, "kernels": manifest["kernels"],
        "nbytes": {
            "weights": made.weight_bytes,
            "artifact": sum(path.stat().st_size for path in out.iterdir()),
            "peak_memory": manifest["nbytes"]["peak_memory"],
        },
        "parity": parity,
    }  # fmt: skip


def _elsewhere(name: str) -> bool:
    """Is that a target of another kind of machine?"""
    return name != "native" and targets.load(name).foreign


def checked(job: Job, assignment: Mapping[str, str]) -> Assignment:
    """In the layers' order. Raises UnknownName, InputError listing all that is wrong."""
    names = job.network.names
    for name in assignment:
        if name not in names:
            raise UnknownName("layer in the assignment", name, names)
    missing = [name for name in names if name not in assignment]
    if missing:
        raise InputError(
            f"the assignment lacks {len(missing)} of {len(names)} layers", ", ".join(missing), None,
            "Name a format for every layer; `hwmpq inspect` lists them.",
        )  # fmt: skip
    wrong = []
    for layer in job.network.layers:
        fmt = format_named(assignment[layer.name])
        reason = why_not(layer.workload, fmt, job.target.features)
        if reason:
            wrong.append(f"{layer.name} in {fmt.name}: {reason}")
    if wrong:
        raise InputError(
            f"{len(wrong)} layers cannot run in their format on {job.target.name}",
            "; ".join(wrong), None, "`hwmpq inspect` lists the formats of every layer.",
        )  # fmt: skip
    return {name: assignment[name] for name in names}


def _fitting(job: Job, quantizers: Quantizers, assignment: Assignment) -> Quantizers:
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


def _samples(job: Job, images: Images | None) -> np.ndarray:
    """Inputs for golden samples: images where there are any, else seeded noise."""
    count = golden.SAMPLES
    if images is not None:
        return images.calib.batch(range(min(count, len(images.calib))))
    shape = (count, *input_shape(job.graph)[1:])
    return np.random.default_rng(job.options.seed).standard_normal(shape).astype(np.float32)
