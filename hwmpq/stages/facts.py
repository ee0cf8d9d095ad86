"""Calibration and sensitivities of a job, with what is kept of them in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.quantizers import Quantizers
from hwmpq.stages.job import Images, Job, estimator_of
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu
from hwmpq.types import BoolArray, Sensitivity, digest

if TYPE_CHECKING:
    from torch import Tensor

    from hwmpq.quantize.ranges import Method
    from hwmpq.sensitivity.task import Forecast, Kept

#: Images that an estimator looks at, for small and for large inputs (from 64 pixels on); more cost
#: time in proportion.
SENSITIVITY_IMAGES, SENSITIVITY_LARGE = 64, 32
#: Part of the sensitivities' keys: raise it when an estimator or the simulator changes.
SENSITIVITY_VERSION = 4
#: How activations are calibrated where nothing else is asked.
RANGES: Final = "mse"
PERCENTILE: Final = 99.99


@dataclass(frozen=True, eq=False)
class Facts:
    """All that is known before anything is chosen."""

    images: Images
    menu: Menu
    quantizers: Quantizers
    loss: Sensitivity
    latency: LatencyFacts


def calibrate(
    job: Job, images: Images, menu: Menu, ranges: Method = RANGES, percentile: float = PERCENTILE,
    steps: Sequence[str] | None = None, search: bool = True,
) -> Quantizers:  # fmt: skip
    """Scales, zero points, rounded weights and biases for every format of the menu.

    steps: the job's by default. search: see `quantize.calibrate`.
    Deterministic and cheap beside the rest, so made again by every run.
    """
    from hwmpq.quantize.calibrate import calibrate as run

    steps = job.options.ptq if steps is None else steps
    with job.progress.stage("calibrate", None) as advance:
        return run(
            job.graph, batches(job, images), menu.formats, ranges, percentile,
            progress=lambda *_: advance(1), steps=steps, search=search,
        )  # fmt: skip


def batches(job: Job, images: Images) -> list[Tensor]:
    """The images that numbers are calibrated on; of large ones 64 are enough."""
    import torch

    shape = job.graph.tensors[job.graph.inputs[0]]
    size = max(shape[0], 8 if shape[-1] >= 64 else 64)
    count = len(images.calib)
    limit = min(count, 64) if shape[-1] >= 64 else count
    picked = np.linspace(0, count - 1, limit).astype(int)
    return [
        torch.from_numpy(images.calib.batch(picked[i : i + size])) for i in range(0, limit, size)
    ]


def sensitivities(job: Job, images: Images, menu: Menu, quantizers: Quantizers) -> Sensitivity:
    """loss[L, F] of every legal cell, item by item kept in the store."""
    import torch

    from hwmpq import sensitivity

    name, part, key = _asked(job, images)
    able = _able(job, menu)

    def save(item: str, value: Kept) -> None:
        job.store.put_fact("sensitivity", f"{key}|{item}", value)

    def tell(cost: Forecast) -> None:
        if cost.layer_runs:
            job.progress.note(
                f"{name}: {cost.layer_runs} layer runs over {len(part)} images"
                f" ({cost.without_reuse} without reuse), about {cost.seconds:.0f} s"
            )

    labels = None if part.labels is None else torch.from_numpy(part.labels)
    with job.progress.stage(f"sensitivity ({name})", 100) as advance:
        before = 0

        def note(items: int, of: int, _left: float) -> None:
            nonlocal before
            percent = 100 * items // of
            advance(percent - before)
            before = percent

        found = sensitivity.estimate(
            name, quantizers.graph(job.graph), quantizers,
            torch.from_numpy(part.batch(range(len(part)))), labels,
            loss=job.options.loss, formats=menu.formats, legal=able, progress=note,
            done=_done(job, key), save=save,
            forecast=tell, seed=job.options.seed,
        )  # fmt: skip
    if not np.isfinite(found.loss[able]).all():
        bad = [
            f"{job.network.names[i]} in {menu.formats[j]}"
            for i, j in np.argwhere(able & ~np.isfinite(found.loss))
        ]
        raise InputError("sensitivities are not finite", ", ".join(bad[:5]))
    if found.pair_loss is not None:
        job.store.put_fact("sensitivity", _pairs_key(job, menu, key), found.pair_loss.tobytes())
    return found


def stored_sensitivities(job: Job, images: Images, menu: Menu) -> Sensitivity:
    """loss[L, F] as far as the store has it; nan elsewhere, but 0 for fp32. Pairs: all or none."""
    name, part, key = _asked(job, images)
    done = _done(job, key)
    able = _able(job, menu)
    loss = np.full(able.shape, np.nan)
    for i, j in np.argwhere(able):
        if menu.formats[j] == "fp32":
            loss[i, j] = 0.0
        elif kept := done(f"{job.network.names[i]}|{menu.formats[j]}"):
            loss[i, j] = float(kept[0])
    pairs = job.store.fact("sensitivity", _pairs_key(job, menu, key))
    matrix = None if pairs is None else np.frombuffer(pairs).reshape(loss.size, loss.size)
    return Sensitivity(job.network.names, menu.formats, loss, name, len(part), pair_loss=matrix)


def _able(job: Job, menu: Menu) -> BoolArray:
    """[L, F]: is there a kernel?"""
    rows = [[f in menu.kernels[la.name] for f in menu.formats] for la in job.network.layers]
    return np.array(rows, bool)


def _asked(job: Job, images: Images) -> tuple[str, DataSet, str]:
    """The estimator, the images it looks at, and the start of the facts' keys."""
    from hwmpq.quantize.scores import source_key

    name = estimator_of(job.options)
    large = job.graph.tensors[job.graph.inputs[0]][-1] >= 64
    count = min(SENSITIVITY_LARGE if large else SENSITIVITY_IMAGES, len(images.calib))
    part = images.calib.subset(np.linspace(0, len(images.calib) - 1, count).astype(int))
    key = digest(
        [SENSITIVITY_VERSION, job.key, part.digest, images.calib.digest, name, RANGES,
         job.options.ptq, job.options.seed, source_key(job.options.loss)]
    )  # fmt: skip
    return name, part, key


def _done(job: Job, key: str) -> Callable[[str], Kept | None]:
    """An estimator's item -> what the store has of it."""
    return lambda item: job.store.fact("sensitivity", f"{key}|{item}")


def _pairs_key(job: Job, menu: Menu, key: str) -> str:
    """Of the pair matrix for all cells of the menu, kept as the bytes of float64."""
    able = _able(job, menu).tolist()
    return f"{key}|pairs|{digest([job.network.names, menu.formats, able])}"


def monotone_violations(found: Sensitivity) -> tuple[str, ...]:
    """Cells whose loss falls when bits are taken away, within the integer family.

    Counted and reported: on real nets a few are normal (noise of the images).
    """
    family = [f for f in found.formats if format_named(f).is_integer]
    order = sorted(family, key=lambda f: -format_named(f).rank)
    cells = []
    for i, layer in enumerate(found.layers):
        for wide, narrow in pairwise(order):
            a = found.loss[i, found.formats.index(wide)]
            b = found.loss[i, found.formats.index(narrow)]
            if np.isfinite(a) and np.isfinite(b) and b < a:
                cells.append(f"{layer}: {narrow} < {wide}")
    return tuple(cells)
