"""How near a cell comes to the machine's roof: MACs and bytes per second over measured peaks.

A peak is measured with the very instructions of the cell's kernel, once per machine: the store
keeps it. Bytes: input, packed weights, residual and output, each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels import CODEGEN_VERSION, Kernel
from hwmpq.measure.peaks import Level, peak_macs_per_s, read_bandwidths
from hwmpq.predict.analytic import work
from hwmpq.stages.job import Job
from hwmpq.types import Workload, digest


@dataclass(frozen=True)
class Roof:
    """of_peak: multiplications that the kernel does, which Winograd's are fewer than MACs, over the
    peak. roof_s: the least time that peak and bandwidth allow, weights coming from behind the L2,
    as in the timing of a cell; of_roof: its share of the measured time. bound: by what."""

    macs_per_s: float
    peak_macs_per_s: float
    of_peak: float
    bytes_per_s: float
    intensity: float
    roof_s: float
    of_roof: float
    bound: str


class Roofline:
    """The roof of the machine of a job whose cells are timed here. levels: nearest first."""

    def __init__(self, job: Job):
        self.job = job
        self._peaks: dict[str, float] = {}
        key = self._key("bandwidths", job.target.vector_bytes)
        found = job.store.fact("peak", key)
        if found is None:
            with job.progress.stage("bandwidths", None):
                found = [[level.name, level.nbytes, level.bytes_per_s]
                         for level in read_bandwidths(job.target)]  # fmt: skip
            job.store.put_fact("peak", key, found)
        self.levels = tuple(Level(*level) for level in found)

    @property
    def bandwidth(self) -> Mapping[str, float]:
        """Level -> bytes per second."""
        return {level.name: level.bytes_per_s for level in self.levels}

    def peak(self, kernel: Kernel, fmt: Format) -> float:
        """MACs per second of the kernel's instructions. Equal ones share a peak."""
        key = self._key(kernel.micro.name, kernel.micro.run_length(fmt))
        if key not in self._peaks:
            found = self.job.store.fact("peak", key)
            if found is None:
                with self.job.progress.stage(f"peak of {kernel.micro.name}", None):
                    found = peak_macs_per_s(kernel.micro, fmt, self.job.target)
                self.job.store.put_fact("peak", key, found)
            self._peaks[key] = float(found)
        return self._peaks[key]

    def of(self, workload: Workload, fmt: Format, kernel: Kernel, seconds: float) -> Roof:
        """A cell that took so long."""
        done = work(workload, fmt, kernel, self.job.target)
        peak, levels = self.peak(kernel, fmt), self.bandwidth
        warm = (done.nbytes - done.weight_bytes) / levels.get("L2", levels["memory"])
        products = kernel.nest.products(workload, kernel.micro)
        moving = done.weight_bytes / levels.get("L3", levels["memory"]) + warm
        roof = max(products / peak, moving)
        return Roof(
            done.macs / seconds, peak, products / seconds / peak, done.nbytes / seconds,
            done.macs / done.nbytes, roof, roof / seconds,
            "multiplies" if products / peak > moving else "bytes",
        )  # fmt: skip

    def _key(self, *what: object) -> str:
        return digest([*what, CODEGEN_VERSION, dict(self.job.target.tvm), self.job.fingerprint])
