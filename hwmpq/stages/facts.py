"""Calibration and sensitivities of a job, with what is kept of them in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.quantizers import Quantizers
from hwmpq.stages.job import Images, Job, estimator_of
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu
from hwmpq.stages.pool import pool_of
from hwmpq.types import BoolArray, Sensitivity, digest

if TYPE_CHECKING:
    from torch import Tensor

    from hwmpq.quantize.calibrate import Observed
    from hwmpq.quantize.ranges import Method
    from hwmpq.sensitivity.task import Forecast, Kept

#: Images that an estimator looks at, for small and for large inputs (from 64 pixels on); more cost
#: time in proportion.
SENSITIVITY_IMAGES, SENSITIVITY_LARGE = 64, 32
#: Part of the sensitivities' keys: raise it when an estimator or the simulator changes.
SENSITIVITY_VERSION = 4
#: Stage of the facts that tell the parts of those keys, for who asks why one does not fit.
KEYS: Final = "sensitivity key"
#: How activations are calibrated where nothing else is asked.
RANGES: Final = "mse"
PERCENTILE: Final = 99.99


@dataclass(frozen=True, eq=False)
class Facts:
    """All that is known before anything is chosen. cache: of `reuse.explained`."""

    images: Images
    menu: Menu
    quantizers: Quantizers
    loss: Sensitivity
    latency: LatencyFacts
    cache: dict[str, Any] = field(default_factory=dict)


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


def observe(job: Job, images: Images, formats: Sequence[str], equalize: bool) -> Observed:
    """What the images tell for some formats, from which numbers of any setting can be made."""
    from hwmpq.quantize.calibrate import observe as run

    with job.progress.stage("calibrate", None) as advance:
        return run(job.graph, batches(job, images), formats, equalize, lambda: advance(1))


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
    from hwmpq import sensitivity

    name, part, keys = asked(job, images)
    able = _able(job, menu)
    job.store.put_fact(KEYS, keys.own, keys.parts)

    def save(item: str, value: Kept) -> None:
        job.store.put_fact("sensitivity", keys.of(item), value)

    def tell(cost: Forecast) -> None:
        if cost.layer_runs:
            job.progress.note(
                f"{name}: {cost.layer_runs} layer runs over {len(part)} images"
                f" ({cost.without_reuse} without reuse), about {cost.seconds:.0f} s"
            )

    with (
        pool_of(job) as pool,
        job.progress.stage(f"sensitivity ({name})", 100) as advance,
    ):
        if pool and sensitivity.needs_gradients(name):
            job.progress.note(f"{name}: gradients are computed by this process alone")
        before = 0

        def note(items: int, of: int, _left: float) -> None:
            nonlocal before
            percent = 100 * items // of
            advance(percent - before)
            before = percent

        found = _estimate(job, images, menu, quantizers, tell, progress=note, save=save, pool=pool)
    if not np.isfinite(found.loss[able]).all():
        bad = [
            f"{job.network.names[i]} in {menu.formats[j]}"
            for i, j in np.argwhere(able & ~np.isfinite(found.loss))
        ]
        raise InputError(
            "sensitivities are not finite", ", ".join(bad[:5]),
            next="Leave these formats out (--formats, --pin), or look at the model's outputs.",
        )  # fmt: skip
    if found.pair_loss is not None:
        job.store.put_fact("sensitivity", pairs_key(job, menu, keys), found.pair_loss.tobytes())
    return found


def foreseen(job: Job, images: Images, menu: Menu, quantizers: Quantizers) -> Forecast:
    """What `sensitivities` would cost. An estimator says so before it begins, and is left there."""
    from hwmpq.sensitivity.task import Forecast

    class Enough(Exception):
        pass

    costs: list[Forecast] = []

    def tell(cost: Forecast) -> None:
        costs.append(cost)
        raise Enough

    with suppress(Enough):
        _estimate(job, images, menu, quantizers, tell)
    return costs[0] if costs else Forecast(0, 0, 0.0)


def _estimate(
    job: Job, images: Images, menu: Menu, quantizers: Quantizers, tell: Callable[[Forecast], None],
    **more: Any,
) -> Sensitivity:  # fmt: skip
    """The job's estimator on what it looks at, with what the store has."""
    import torch

    from hwmpq import sensitivity

    name, part, keys = asked(job, images)
    labels = None if part.labels is None else torch.from_numpy(part.labels)
    return sensitivity.estimate(
        name, quantizers.graph(job.graph), quantizers,
        torch.from_numpy(part.batch(range(len(part)))), labels,
        loss=job.options.loss, formats=menu.formats, legal=_able(job, menu),
        done=_done(job, keys), forecast=tell, seed=job.options.seed, **more,
    )  # fmt: skip


def stored_sensitivities(job: Job, images: Images, menu: Menu) -> Sensitivity:
    """loss[L, F] as far as the store has it; nan elsewhere, but 0 for fp32. Pairs: all or none."""
    name, part, keys = asked(job, images)
    done = _done(job, keys)
    able = _able(job, menu)
    loss = np.full(able.shape, np.nan)
    for i, j in np.argwhere(able):
        if menu.formats[j] == "fp32":
            loss[i, j] = 0.0
        elif kept := done(item_of(job.network.names[i], menu.formats[j])):
            loss[i, j] = float(kept[0])
    pairs = job.store.fact("sensitivity", pairs_key(job, menu, keys))
    matrix = None if pairs is None else np.frombuffer(pairs).reshape(loss.size, loss.size)
    return Sensitivity(job.network.names, menu.formats, loss, name, len(part), pair_loss=matrix)


def _able(job: Job, menu: Menu) -> BoolArray:
    """[L, F]: is there a kernel?"""
    rows = [[f in menu.kernels[la.name] for f in menu.formats] for la in job.network.layers]
    return np.array(rows, bool)


def item_of(layer: str, fmt: str) -> str:
    """Under which name every estimator keeps what it finds of a cell."""
    return f"{layer}|{fmt}"


@dataclass(frozen=True)
class Keys:
    """How the keys of facts begin: those of one estimator, and those that all of them share.

    parts: what `own` is a digest of, by name.
    """

    own: str
    shared: str
    parts: Mapping[str, Any]

    def of(self, item: str) -> str:
        from hwmpq.sensitivity.task import SHARED

        return f"{self.shared if item.startswith(SHARED) else self.own}|{item}"


def asked(job: Job, images: Images) -> tuple[str, DataSet, Keys]:
    """The estimator, the images it looks at, and how the keys of its facts begin."""
    from hwmpq.quantize.scores import source_key

    name = estimator_of(job.options)
    large = job.graph.tensors[job.graph.inputs[0]][-1] >= 64
    count = min(SENSITIVITY_LARGE if large else SENSITIVITY_IMAGES, len(images.calib))
    part = images.calib.subset(np.linspace(0, len(images.calib) - 1, count).astype(int))
    o = job.options
    # the values in this order are what the keys are digests of
    common = {
        "version": SENSITIVITY_VERSION, "model": job.key, "samples": part.digest,
        "images": images.calib.digest,
    }  # fmt: skip
    calibration = {"ranges": RANGES, "ptq": list(o.ptq)}
    parts = {
        **common, "estimator": name, **calibration, "seed": o.seed, "loss": source_key(o.loss)
    }  # fmt: skip
    shared = {**common, **calibration}
    return name, part, Keys(digest([*parts.values()]), digest([*shared.values()]), parts)


def _done(job: Job, keys: Keys) -> Callable[[str], Kept | None]:
    """An estimator's item -> what the store has of it."""
    return lambda item: job.store.fact("sensitivity", keys.of(item))


def pairs_key(job: Job, menu: Menu, keys: Keys) -> str:
    """Of the pair matrix for all cells of the menu, kept as the bytes of float64."""
    able = _able(job, menu).tolist()
    return f"{keys.own}|pairs|{digest([job.network.names, menu.formats, able])}"


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
