"""Cells measured for a cost model: which next, timed block by block, some of them twice.

A block is a shape in all its formats, timed interleaved, so that ratios need no steady machine. The
first third of the blocks is drawn at random, in random order; then models of the rows so far say
which shapes of the pool they disagree on, and those come next. The last rows repeat earlier cells:
how well a measurement agrees with itself is the most that a prediction can. Failures are rows too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats import Format, format_named
from hwmpq.graph import Graph
from hwmpq.kernels import best
from hwmpq.predict.analytic import work
from hwmpq.predict.boost import Point, Settings
from hwmpq.predict.features import F32, of_work
from hwmpq.predict.rows import Table
from hwmpq.predict.train import FAMILIES, families_in, select
from hwmpq.stages.cells import Builder, CellBench, LayerCell, layer_key, replicas, workers
from hwmpq.stages.job import Job, Options, Progress, open_job
from hwmpq.stages.menu import DEFAULT
from hwmpq.stages.schedule import cell_call
from hwmpq.stages.shapes import Families, pool
from hwmpq.types import FloatArray, Workload, digest

#: Of the rows, this share repeats earlier cells.
AGAIN = 0.15
#: Of the other rows, this share is drawn at random.
_RANDOM = 1 / 3
#: Shapes that are drawn between two looks at the models, from the best of so many times as many.
_BATCH, _AMONG = 8, 4
#: Models whose disagreement counts, and what they are made of: quick, and as unlike as the seed.
_MODELS = 4
_QUICK = Settings(trees=120, depth=4, rate=0.12)
#: Shapes in the pool for each that is measured.
_POOL = 4


class _NoModel:
    """Cells belong to no model."""

    def graph(self) -> Graph:
        return Graph((), (), (), {}, {})


@dataclass(frozen=True)
class Sampled:
    """rows: of the sample that the store has now, failed and repeated ones among them; shapes: that
    they are of; again: of the rows, repeated ones; failed: of the rows, those without a time."""

    rows: int
    shapes: int
    again: int
    failed: int
    new_timings: int


def machine(options: Options, progress: Progress) -> Job:
    """A job of no model, for its target, device, store and options."""
    return open_job(options, progress, _NoModel())


def sample(job: Job, origins: Families, rows: int) -> Sampled:
    """Measure up to `rows` cells of shapes like the origins; each is committed as it is timed.

    What the store already has counts and is not measured again, so starting again goes on. No
    block begins once --max-time is used up. Raises InputError when no kernel runs any shape.
    """
    if rows < 20:
        raise InputError("--rows", rows, "20 or more")
    formats = [format_named(name) for name in job.options.formats or DEFAULT]
    size = _POOL * -(-rows // len(formats))
    shapes = pool(origins, job.target.caches, size, job.options.seed)
    blocks = {workload: _block(job, workload, formats) for workload in shapes}
    blocks = {workload: block for workload, block in blocks.items() if block}
    if not blocks:
        raise InputError("formats to sample", [f.name for f in formats], "some that a kernel runs")
    _keep_families(job, shapes)
    with _bench(job) as bench, job.progress.stage("sample", rows) as advance:
        run = _Run(job, bench, blocks, advance)
        run.measure(rows - round(rows * AGAIN))
        run.repeat(rows)
        return run.told()


class _Run:
    """One sample in the making. done: blocks whose cells the store has, in the order of the sample;
    again: those that it has twice."""

    def __init__(
        self, job: Job, bench: CellBench, blocks: Mapping[Workload, list[LayerCell]],
        advance: Callable[[int], None],
    ):  # fmt: skip
        self.job, self.bench, self.blocks, self.advance = job, bench, blocks, advance
        self.rng = np.random.default_rng(job.options.seed)
        names = sorted(blocks, key=lambda workload: workload.key)
        self.order = [names[i] for i in self.rng.permutation(len(names))]
        self.done = [w for w in self.order if not self._missing(blocks[w])]
        self.again: list[Workload] = []
        self.numbers: dict[Workload, tuple[F32, FloatArray]] = {}
        self.new, self.began = 0, time.monotonic()
        advance(self._count(self.done))

    def measure(self, rows: int) -> None:
        """Blocks that are new to the store, until it has so many rows of the sample."""
        while self._count(self.done) < rows and not self._late():
            open_ = [w for w in self.order if w not in set(self.done)]
            if not open_:
                return
            if self._count(self.done) >= rows * _RANDOM:
                open_ = self._doubtful(open_)
            for workload in open_[:_BATCH]:
                if self._count(self.done) >= rows or self._late():
                    return
                self._time(self.blocks[workload])
                self.done.append(workload)

    def repeat(self, rows: int) -> None:
        """Blocks of the sample once more, until there are so many rows in all: those first that
        have been repeated, the others in an order of hashes."""
        twice = {
            w: [replace(cell, key=again_key(cell.key)) for cell in self.blocks[w]]
            for w in sorted(self.done, key=lambda w: digest([self.job.options.seed, w.key]))
        }
        for workload in sorted(twice, key=lambda w: bool(self._missing(twice[w]))):
            if self._count(self.done) + self._count(self.again) >= rows or self._late():
                return
            self._time(twice[workload])
            self.again.append(workload)

    def told(self) -> Sampled:
        """What the store has of the sample."""
        cells = [cell for w in self.done for cell in self.blocks[w]]
        found = [self.job.store.measurement(cell.key) for cell in cells]
        failed = sum(m is None or bool(m.error) for m in found)
        again = self._count(self.again)
        return Sampled(len(cells) + again, len(self.done), again, failed, self.new)

    def _count(self, workloads: Sequence[Workload]) -> int:
        return sum(len(self.blocks[workload]) for workload in workloads)

    def _missing(self, block: Sequence[LayerCell]) -> list[LayerCell]:
        return [cell for cell in block if self.job.store.measurement(cell.key) is None]

    def _late(self) -> bool:
        limit = self.job.options.max_time
        return bool(limit) and time.monotonic() - self.began >= float(limit or 0)

    def _time(self, block: Sequence[LayerCell]) -> None:
        """Measure what is missing of a block, in random order: no format always comes first."""
        missing = self._missing(block)
        if missing:
            self.bench.layers([missing[i] for i in self.rng.permutation(len(missing))])
            self.new += len(missing)
        self.advance(len(block))

    def _doubtful(self, open_: Sequence[Workload]) -> list[Workload]:
        """The shapes that models of the rows so far disagree on most, some of the most by chance.

        Each model is of the shapes of one bootstrap draw.
        """
        target = self.job.target
        rows = select(self.job.store.rows(target.name, "measured"), target, self.job.fingerprint)
        table = Table.of(rows.rows, target)
        groups = np.unique(table.group)
        parts = []
        for seed in range(_MODELS):
            drawn = self.rng.choice(groups, len(groups))
            keep = np.concatenate([np.flatnonzero(table.group == group) for group in drawn])
            point = Point.fit(table.rows_at(keep), seed, _QUICK)
            parts.append([np.log(point.seconds(*self._numbers(w))) for w in open_])
        spread = [float(np.mean(np.std([p[i] for p in parts], axis=0))) for i in range(len(open_))]
        most = np.argsort(spread)[::-1][: _BATCH * _AMONG]
        return [open_[i] for i in self.rng.permutation(most)]

    def _numbers(self, workload: Workload) -> tuple[F32, FloatArray]:
        """[formats, features] and [formats, terms] of a block."""
        if workload not in self.numbers:
            target, threads = self.job.target, self.job.options.threads
            x, terms = [], []
            for cell in self.blocks[workload]:
                done = work(workload, cell.call.format, cell.kernel, target, threads)
                x.append(of_work(workload, cell.call.format, cell.kernel, target, threads, done))
                terms.append(done.terms)
            self.numbers[workload] = np.stack(x), np.stack(terms)
        return self.numbers[workload]


def again_key(key: str) -> str:
    """The store's key of a cell that is measured once more."""
    return digest(["again", key])


def _keep_families(job: Job, shapes: Families) -> None:
    """Let the store know which families of networks the shapes stand for."""
    known = {workload.key: list(names) for workload, names in shapes.items()}
    job.store.put_fact(*FAMILIES, {**families_in(job.store), **known})


def _block(job: Job, workload: Workload, formats: Sequence[Format]) -> list[LayerCell]:
    """A shape in every format that a kernel runs it in, by default schedules."""
    found = []
    for fmt in formats:
        kernel = best(workload, fmt, job.target.features)
        if kernel is not None:
            call = cell_call(workload, fmt, job.options.threads)
            key = layer_key(kernel.cell(call), job.target.tvm, job.fingerprint)
            found.append(LayerCell(key, call, kernel, failed=False))
    return found


@contextmanager
def _bench(job: Job) -> Iterator[CellBench]:
    """What compiles and times; it compiles a block before it times it, never beside."""
    with (
        workers(job) as (compiler, timer),
        replicas(job) as others,
        tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
    ):
        builder = Builder(job, compiler, Path(folder), with_loop=job.device.remote)
        yield CellBench(job, builder, timer, job.fingerprint, others)
