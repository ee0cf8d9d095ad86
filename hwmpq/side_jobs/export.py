"""A model with its number formats in the form that another program reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError, UnknownName
from hwmpq.export import assignment as handed_over
from hwmpq.export import openvino
from hwmpq.export.onnx_qdq import qdq_model
from hwmpq.quantizers import Quantizers
from hwmpq.side_jobs.compile import complete, fitting
from hwmpq.side_jobs.inputs import calibrated, named_arrays
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.menu import make_menu
from hwmpq.stages.refine import refine
from hwmpq.types import Assignment


@dataclass(frozen=True)
class Form:
    """suffix: of its file; packages: what writing it needs."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Job, Assignment, Quantizers, Path], None]


def form_named(name: str) -> Form:
    """Raises UnknownName."""
    if name not in FORMS:
        raise UnknownName("form of export", name, FORMS)
    return FORMS[name]


def export_model(
    options: Options,
    assignment: Mapping[str, str],
    to: str,
    out: Path,
    quantizers: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the file `out`. Any known format will do: no kernel of ours has to run it.

    quantizers: a file of an earlier artifact; without it they are calibrated on --calib-data.
    Raises UnknownName for a form; InputError for layers that are missing or cannot be told so.
    """
    form = form_named(to)
    if out.suffix != form.suffix:
        raise InputError(f"file for {to}", out, f"NAME{form.suffix}")
    job = open_job(options, progress or Silent(), here=False, timed=False)
    with job.store:
        chosen = complete(job, assignment)
        numbers = _numbers(job, chosen, quantizers)
        with job.progress.stage("export", None):
            try:
                form.write(job, chosen, numbers, out)
            except OSError as error:
                raise InputError("cannot write", f"{out} ({error.strerror})") from None
    return {
        "version": 1, "file": str(out), "form": to, "model": options.model, "assignment": chosen,
        "nbytes": out.stat().st_size,
    }  # fmt: skip


def _numbers(job: Job, chosen: Assignment, file: Path | None) -> Quantizers:
    if file is not None:
        return fitting(job, Quantizers.load(file), chosen)
    if len(job.graph.inputs) > 1:
        return calibrated(job, named_arrays(job), chosen)
    images = load_images(job)
    formats = tuple(dict.fromkeys(chosen.values()))
    menu = replace(make_menu(job.network, job.target), formats=formats)
    return refine(job, images, chosen, calibrate(job, images, menu))


def _onnx(job: Job, chosen: Assignment, numbers: Quantizers, out: Path) -> None:
    out.write_bytes(qdq_model(job.graph, chosen, numbers).SerializeToString())


def _openvino(job: Job, chosen: Assignment, numbers: Quantizers, out: Path) -> None:
    openvino.write(qdq_model(job.graph, chosen, numbers), out)


def _pt2e(job: Job, chosen: Assignment, numbers: Quantizers, out: Path) -> None:
    import torch

    from hwmpq.quantize.decomposed import exported

    torch.export.save(exported(job.graph, chosen, numbers), out)


def _assignment(job: Job, chosen: Assignment, numbers: Quantizers, out: Path) -> None:
    told = handed_over.handover(job.graph, chosen, numbers, job.options.model)
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


FORMS = {
    "onnx-qdq": Form(".onnx", ("onnx",), _onnx),
    "openvino": Form(".xml", ("onnx", "openvino"), _openvino),
    "pt2e": Form(".pt2", (), _pt2e),
    "assignment": Form(".json", (), _assignment),
}
