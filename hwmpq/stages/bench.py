"""Plans compiled beside the uniform artifacts, and timed together with them in one worker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.artifact.golden import SAMPLES
from hwmpq.measure import WorkerProcess
from hwmpq.quantizers import Quantizers
from hwmpq.stages import budget as budgets
from hwmpq.stages.build import Made, make_artifact
from hwmpq.stages.facts import Facts
from hwmpq.stages.job import Job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu, uniform
from hwmpq.stages.pricing import price
from hwmpq.stages.timing import Timed, stored_times, time_artifacts, torch_eager_s
from hwmpq.stages.verify import (
    Accuracy,
    deployed_outputs,
    float_logits,
    measure_accuracy,
    runs,
    score,
    simulated,
)
from hwmpq.types import Assignment

#: Uniform artifacts that every plan is compared with, where the target runs them.
BASELINES = ("fp32", "w8a8", "bf16")
#: Random mixed artifacts that the prices are fitted on, beside those.
MIXED = 4


@dataclass
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def baseline_names(menu: Menu) -> list[str]:
    """The uniform artifacts that the target can run."""
    return [name for name in BASELINES if name in menu.formats or name == "fp32"]


def limit_seconds(limit: budgets.Latency | None, timed: dict[str, Timed]) -> float | None:
    """The budget in seconds, relative ones from the artifacts timed in the same run."""
    if limit is None or limit.fastest:
        return None
    if limit.seconds is not None:
        return limit.seconds
    assert limit.ratio is not None
    return limit.ratio * timed[limit.of].latency_s


@dataclass(frozen=True, eq=False)
class Attempt:
    """A compiled plan and how it did. timed: the baselines, in the same run."""

    made: Made
    predicted_s: float
    own: Timed
    timed: dict[str, Timed]
    limit_s: float | None

    @property
    def share(self) -> float:
        """Of the limit that the upper end of the time takes; 0 where there is none."""
        return 0.0 if self.limit_s is None else self.own.interval[1] / self.limit_s

    @property
    def within_limit(self) -> bool:
        return self.share <= 1

    @property
    def ambiguous(self) -> bool:
        low, high = self.own.interval
        return self.limit_s is not None and low <= self.limit_s < high


class Bench:
    """Compiles plans beside the uniform artifacts and times them together, in one worker.

    statistic: of the times, as the budget names it; history: all attempts so far.
    """

    def __init__(
        self, job: Job, facts: Facts, clock: Clock, folder: Path, worker: WorkerProcess,
        limit: budgets.Latency | None = None,
    ):  # fmt: skip
        self.job, self.facts, self.clock, self.folder = job, facts, clock, folder
        self.worker, self.limit = worker, limit
        self.statistic = limit.statistic if limit else "median"
        count = min(SAMPLES, len(facts.images.calib))
        self.samples = {job.graph.inputs[0]: facts.images.calib.batch(range(count))}
        self.baselines: dict[str, Made] = {}
        self.attempts = 0
        self.history: list[Attempt] = []
        self._reference: Any = None

    def compile(self, assignment: Assignment, name: str, quantizers: Quantizers) -> Made:
        with self.clock.time("compile"), self.job.progress.stage(f"compile {name}", None):
            return make_artifact(self.job, assignment, quantizers, self.folder / name, self.samples)

    def uniforms(self) -> dict[str, Assignment]:
        """fp32 and the uniform assignments that the target can run."""
        facts, network = self.facts, self.job.network
        names = baseline_names(facts.menu)
        return {name: uniform(facts.menu, network, name)[0] for name in names}

    def mixed(self) -> dict[str, Assignment]:
        """MIXED random assignments, of the formats that every layer has a time for; none where
        artifacts take just the sum of their cells."""
        if self.job.estimated:
            return {}
        chance = np.random.default_rng(self.job.options.seed)
        found: dict[str, Assignment] = {}
        for i in range(MIXED):
            plan = {}
            for layer in self.job.network.layers:
                kernels = sorted(self.facts.menu.kernels[layer.name])
                cells = [self.facts.latency.cell(layer.workload, name) for name in kernels]
                able = [cell.format for cell in cells if cell is not None and not cell.error]
                plan[layer.name] = str(chance.choice(able or ["fp32"]))
            found[f"mixed{i}"] = plan
        return found

    def add_baselines(self) -> None:
        """Build the uniform artifacts, unless that was done."""
        for name, assignment in self.uniforms().items():
            if name not in self.baselines:
                self.baselines[name] = self.compile(assignment, name, self.facts.quantizers)

    def first_times(self) -> dict[str, Timed]:
        """The times of the baselines and of the mixed artifacts that the choice rests on."""

        def measure() -> dict[str, Timed]:
            numbers = self.facts.quantizers
            return self.time({n: self.compile(p, n, numbers) for n, p in self.mixed().items()})

        plans = self.uniforms() | self.mixed()
        return stored_times(self.job, plans, self.statistic, measure)

    def time(self, plans: Mapping[str, Made]) -> dict[str, Timed]:
        """Time the baselines and the plans in one run; or give their prices where nothing is."""
        self.add_baselines()
        if self.job.estimated:
            return {name: self._priced(m) for name, m in {**self.baselines, **plans}.items()}
        folders = {name: made.path for name, made in {**self.baselines, **plans}.items()}
        with self.clock.time("verify"), self.job.progress.stage("time the artifacts", None):
            return time_artifacts(self.job, folders, self.statistic, self.worker)

    def _priced(self, made: Made) -> Timed:
        """The price of an artifact, as if it had been timed."""
        seconds = price(self.job, made.assignment, self.facts.latency)
        return Timed(seconds, (seconds, seconds), (seconds,), {})

    def attempt(
        self, plans: Sequence[tuple[Assignment, Quantizers]], latency: LatencyFacts
    ) -> list[Attempt]:
        """Compile plans and time them in one run with the baselines."""
        made = []
        for assignment, quantizers in plans:
            made.append(self.compile(assignment, f"plan{self.attempts}", quantizers))
            self.attempts += 1
        prices = [price(self.job, one.assignment, latency) for one in made]
        return self._attempted(made, prices)

    def again(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        """The same artifacts timed afresh, in one run with the baselines."""
        return self._attempted([a.made for a in attempts], [a.predicted_s for a in attempts])

    def _attempted(self, made: Sequence[Made], prices: Sequence[float]) -> list[Attempt]:
        timed = self.time({one.path.name: one for one in made})
        beside = {name: timed[name] for name in self.baselines}
        limit = limit_seconds(self.limit, beside)
        found = [
            Attempt(one, predicted_s, timed[one.path.name], beside, limit)
            for one, predicted_s in zip(made, prices, strict=True)
        ]
        self.history += found
        return found

    def reference(self) -> Any:
        """The float model's outputs on the test images."""
        if self._reference is None:
            with self.clock.time("verify"):
                self._reference = float_logits(self.job, self.facts.images.test, "the test images")
        return self._reference

    def accuracy(self, made: Made, quantizers: Quantizers) -> Accuracy:
        """Of an artifact, on the test images."""
        reference = self.reference()
        with self.clock.time("verify"):
            return measure_accuracy(
                self.job, made.path, made.assignment, quantizers, self.facts.images.test, reference
            )

    def baseline_rows(self, timed: Mapping[str, Timed]) -> dict[str, dict[str, Any]]:
        """Time, accuracy and size of each uniform artifact; others: layers in another format."""
        rows: dict[str, dict[str, Any]] = {}
        with self.clock.time("verify"):
            eager = torch_eager_s(self.job)
            for name, made in self.baselines.items():
                rows[name] = {
                    "latency_s": timed[name].latency_s,
                    "interval": list(timed[name].interval),
                    "accuracy": self._score(made, name),
                    "nbytes": made.weight_bytes,
                    "others": uniform(self.facts.menu, self.job.network, name)[1],
                }
        if eager is not None:
            rows["fp32"]["vs_torch_eager"] = eager / timed["fp32"].latency_s
        return rows

    def _score(self, made: Made, name: str) -> float:
        """Of a uniform artifact: its own, or the exact simulator's where no machine runs it."""
        job, test, reference = self.job, self.facts.images.test, self.reference()
        if not runs(job):
            numbers = self.facts.quantizers
            return float(simulated(job, made.assignment, numbers, test, reference).simulated)
        outputs = deployed_outputs(job, made.path, test, f"uniform {name}")
        return score(job, outputs, reference, test)
