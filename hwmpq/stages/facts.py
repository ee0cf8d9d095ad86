"""Calibration and sensitivities of a job, with what is kept of them in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from hwmpq.data import DataSet
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import format_named
from hwmpq.quantizers import Quantizers
from hwmpq.stages.job import Images, Job
from hwmpq.stages.menu import Menu
from hwmpq.types import BoolArray, Sensitivity, digest

#: Images that an estimator looks at, for small and for large inputs (from 64 pixels on); more cost
#: time in proportion.
SENSITIVITY_IMAGES, SENSITIVITY_LARGE = 64, 32
#: Part of the sensitivities' keys: raise it when an estimator or the simulator changes.
SENSITIVITY_VERSION = 1
RANGES: Final = "mse"


def calibrate(job: Job, images: Images, menu: Menu) -> Quantizers:
    """Scales, zero points and rounded weights for every format of the menu.

    Deterministic and cheap beside the rest, so made again by every run.
    """
    import torch

    from hwmpq.quantize.calibrate import calibrate as run

    shape = job.graph.tensors[job.graph.inputs[0]]
    size = max(shape[0], 8 if shape[-1] >= 64 else 64)
    count = len(images.calib)
    limit = min(count, 64) if shape[-1] >= 64 else count
    picked = np.linspace(0, count - 1, limit).astype(int)
    batches = [
        torch.from_numpy(images.calib.batch(picked[i : i + size])) for i in range(0, limit, size)
    ]
    with job.progress.stage("calibrate", None) as advance:
        return run(job.graph, batches, menu.formats, RANGES, progress=lambda *_: advance(1))


def sensitivities(job: Job, images: Images, menu: Menu, quantizers: Quantizers) -> Sensitivity:
    """loss[L, F] of every legal cell, item by item kept in the store."""
    import torch

    from hwmpq import sensitivity

    name, part, formats = _asked(job, images, menu)
    able = _able(job, menu)
    count = len(part)
    done = _stored(job, formats)

    def save(item: str, value: float) -> None:
        layer, fmt = item.rsplit("|", 1)
        job.store.put_fact("sensitivity", f"{formats[fmt]}|{layer}", value)

    labels = None if part.labels is None else torch.from_numpy(part.labels)
    total = int(able.sum())
    with job.progress.stage(f"sensitivity ({name})", total) as advance:
        before = 0

        def note(cells: int, _all: int, _left: float) -> None:
            nonlocal before
            advance(cells - before)
            before = cells

        found = sensitivity.estimate(
            name, job.graph, quantizers, torch.from_numpy(part.batch(range(count))), labels,
            formats=menu.formats, legal=able, progress=note, done=done, save=save,
            seed=job.options.seed,
        )  # fmt: skip
    if not np.isfinite(found.loss[able]).all():
        bad = [
            f"{job.network.names[i]} in {menu.formats[j]}"
            for i, j in np.argwhere(able & ~np.isfinite(found.loss))
        ]
        raise InputError("sensitivities are not finite", ", ".join(bad[:5]))
    return found


def stored_sensitivities(job: Job, images: Images, menu: Menu) -> Sensitivity:
    """loss[L, F] as far as the store has it; nan elsewhere, but 0 for fp32."""
    name, part, formats = _asked(job, images, menu)
    done = _stored(job, formats)
    names = job.network.names
    loss = np.array(
        [[done.get(f"{la}|{f}", 0.0 if f == "fp32" else np.nan) for f in menu.formats]
         for la in names]
    )  # fmt: skip
    loss = np.where(_able(job, menu), loss, np.nan)
    return Sensitivity(names, menu.formats, loss, name, len(part))


def _able(job: Job, menu: Menu) -> BoolArray:
    """[L, F]: is there a kernel?"""
    rows = [[f in menu.kernels[la.name] for f in menu.formats] for la in job.network.layers]
    return np.array(rows, bool)


def _asked(job: Job, images: Images, menu: Menu) -> tuple[str, DataSet, dict[str, str]]:
    """The estimator, the images it looks at, and format -> start of the facts' keys.

    Raises UnknownName for an unknown estimator.
    """
    from hwmpq import sensitivity

    name = job.options.sensitivity or "output-error"
    if name not in sensitivity.names():
        raise UnknownName("sensitivity estimator", name, sensitivity.names())
    large = job.graph.tensors[job.graph.inputs[0]][-1] >= 64
    count = min(SENSITIVITY_LARGE if large else SENSITIVITY_IMAGES, len(images.calib))
    part = images.calib.subset(np.linspace(0, len(images.calib) - 1, count).astype(int))
    key = digest(
        [SENSITIVITY_VERSION, job.key, part.digest, images.calib.digest, name, RANGES,
         job.options.seed]
    )  # fmt: skip
    return name, part, {f: digest([key, f]) for f in menu.formats}


def _stored(job: Job, formats: Mapping[str, str]) -> dict[str, float]:
    """'layer|format' -> loss, of all that the store has."""
    done = {}
    for layer in job.network.names:
        for fmt, key in formats.items():
            value = job.store.fact("sensitivity", f"{key}|{layer}")
            if value is not None:
                done[f"{layer}|{fmt}"] = float(value)
    return done


@dataclass(frozen=True)
class Violations:
    """Cells whose loss falls when bits are taken away, within the integer family."""

    cells: tuple[str, ...]


def monotone_violations(found: Sensitivity) -> Violations:
    """Counted and reported: on real nets a few are normal (noise of the images)."""
    family = [f for f in found.formats if format_named(f).is_integer]
    order = sorted(family, key=lambda f: -format_named(f).rank)
    cells = []
    for i, layer in enumerate(found.layers):
        for wide, narrow in pairwise(order):
            a = found.loss[i, found.formats.index(wide)]
            b = found.loss[i, found.formats.index(narrow)]
            if np.isfinite(a) and np.isfinite(b) and b < a:
                cells.append(f"{layer}: {narrow} < {wide}")
    return Violations(tuple(cells))
