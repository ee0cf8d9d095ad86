"""What a method is given: facts, a solver, other estimators, and the true loss of any plan.

True means measured: the exact simulator's mean loss on the held-out calibration images, less the
float model's on the same images. Each value is kept in the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch

from hwmpq.quantize.judge import predict
from hwmpq.quantize.ranges import Method as Ranges
from hwmpq.quantize.scores import LOSSES, Batch, default_loss, find_score, source_key
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.search import solve
from hwmpq.stages.choose import least_loss
from hwmpq.stages.facts import PERCENTILE, RANGES, SENSITIVITY_VERSION, observe, sensitivities
from hwmpq.stages.job import PTQ
from hwmpq.stages.verify import float_logits
from hwmpq.types import Problem, Sensitivity, Solution, digest

if TYPE_CHECKING:
    from hwmpq.methods.elsewhere import Holders
    from hwmpq.stages.facts import Facts
    from hwmpq.stages.job import Images, Job, Options, Progress

T = TypeVar("T")
GetImages: TypeAlias = "Callable[[Job], Images]"

#: Seconds that judging plans may take, where --max-time does not say.
SECONDS = 120.0


@dataclass(frozen=True)
class Setting:
    """How numbers are calibrated. ranges, percentile: of activations; search: are the scales of
    weights searched for, or do they reach to the largest weight? steps: what calibration does
    beside that, of `quantize.calibrate.STEPS`."""

    ranges: Ranges = RANGES
    percentile: float = PERCENTILE
    search: bool = True
    steps: tuple[str, ...] = PTQ


@dataclass(frozen=True)
class Judged:
    """loss: true loss increase of a plan, mean over `images`; seconds: what judging it took."""

    loss: float
    images: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plan, the numbers it is to be built with, and what there is to tell of the choice."""

    solution: Solution
    quantizers: Quantizers
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """choose: the facts and a problem -> the plan of least loss within its budgets.

    estimators: those it can work with, its own first; () for any. solver: its own; None: ilp.
    trained: of a method that trains: raises InputError for options that its training cannot take.
    design: of a method that finds the network, too: what `quantize_model` is given -> a
    LoadedModel, and the options of a job for that.
    """

    choose: Callable[[Study, Problem], Chosen]
    estimators: tuple[str, ...] = ()
    solver: str | None = None
    trained: Callable[[Options], object] | None = None
    design: Callable[[Options, Progress, GetImages, Any], tuple[Any, Options]] | None = None


def by_estimate(study: Study, problem: Problem) -> Chosen:
    """The solver's plan for the job's estimates; its true loss is told beside its objectives."""
    found = study.solve(problem)
    told = {
        "objective": found.objective, "raw_objective": found.raw_objective,
        "measured_loss": study.judge(found.choice).loss,
    }  # fmt: skip
    return Chosen(found, study.facts.quantizers, told)


class Study:
    """One job's facts, with what was asked about them so far."""

    def __init__(self, job: Job, facts: Facts):
        self.job, self.facts = job, facts
        self.budget_s = job.options.max_time or SECONDS
        self.spent_s = 0.0
        self._made: tuple[str, Quantizers] | None = None
        self._sensitivities: dict[str, Sensitivity] = {}
        self._judged: dict[str, Judged] = {}
        self._reference: torch.Tensor | None = None
        self._made_once: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What a method makes for the whole study, however often it is asked for plans."""
        if name not in self._made_once:
            self._made_once[name] = make()
        found: T = self._made_once[name]
        return found

    @property
    def images(self) -> int:
        """Held-out images."""
        return len(self.facts.images.holdout)

    def solve(self, problem: Problem) -> Solution:
        """By the job's solver. Raises InfeasibleError naming the best possible plans."""
        return least_loss(self.job, problem)

    def candidate(self, problem: Problem, solver: str, time_limit_s: float) -> Solution | None:
        """A plan, or None where there is none within the budgets or the time."""
        found = solve(problem, solver, time_limit_s, self.job.options.seed)
        return found if found.choice else None

    def with_losses_of(self, estimator: str, problem: Problem) -> Problem:
        """The problem with another estimator's losses and pairs, of the default loss."""
        if estimator not in self._sensitivities:
            options = replace(self.job.options, sensitivity=estimator, loss="")
            job, facts = replace(self.job, options=options), self.facts
            self._sensitivities[estimator] = sensitivities(
                job, facts.images, facts.menu, facts.quantizers
            )
        found = self._sensitivities[estimator]
        assert problem.legal is not None
        loss = np.where(problem.legal, found.loss, 0.0)
        return replace(problem, loss=loss, pair_loss=found.pair_loss)

    def quantizers(self, setting: Setting, assignment: Mapping[str, str]) -> Quantizers:
        """The numbers of a plan, calibrated in this setting; the last ones are kept at hand."""
        if setting == Setting():
            return self.facts.quantizers
        key = digest([asdict(setting), dict(assignment)])
        if self._made is None or self._made[0] != key:
            self._made = (key, self._calibrated(setting, assignment))
        return self._made[1]

    def _calibrated(self, setting: Setting, assignment: Mapping[str, str]) -> Quantizers:
        """Settings share the passes over the images, and what else they have in common."""
        formats, equalize = sorted({*assignment.values()}), "equalize" in setting.steps
        seen = self.once(
            f"observed|{formats}|{equalize}",
            lambda: observe(self.job, self.facts.images, formats, equalize),
        )
        bias = "bias" in setting.steps
        return seen.quantizers(setting.ranges, setting.percentile, bias, setting.search)

    def judge(
        self, assignment: Mapping[str, str], setting: Setting | None = None,
        start: int = 0, stop: int | None = None, loss: str = "",
    ) -> Judged:  # fmt: skip
        """The true loss of a plan on the held-out images, or on those from start to stop.

        loss: another loss than the job's, by name.
        """
        [found] = self.judge_all(assignment, [setting or Setting()], start, stop, loss)
        return found

    def judge_all(
        self, assignment: Mapping[str, str], settings: Sequence[Setting], start: int = 0,
        stop: int | None = None, loss: str = "", helpers: Holders | None = None,
    ) -> list[Judged]:  # fmt: skip
        """As `judge`, in several settings; helpers: workers that run them side by side."""
        loss = loss or self.job.options.loss
        stop = self.images if stop is None else min(stop, self.images)
        keys = {s: self._key(assignment, s, start, stop, loss) for s in settings}
        for key in keys.values():
            kept = None if key in self._judged else self.job.store.fact("judged", key)
            if kept is not None:
                self._judged[key] = Judged(float(kept[0]), stop - start, float(kept[1]))
        missing = [s for s, key in keys.items() if key not in self._judged]
        if helpers is None:
            found = self._here(assignment, missing, start, stop, loss)
        else:
            found = self._elsewhere(assignment, missing, start, stop, loss, helpers)
        for setting, increase, seconds in found:
            self.job.store.put_fact("judged", keys[setting], [increase, seconds])
            self._judged[keys[setting]] = Judged(increase, stop - start, seconds)
        return [self._judged[keys[s]] for s in settings]

    def _here(
        self, assignment: Mapping[str, str], settings: Sequence[Setting], start: int, stop: int,
        loss: str,
    ) -> Iterator[tuple[Setting, float, float]]:  # fmt: skip
        """Setting, loss increase and seconds of each."""
        for setting in settings:
            numbers = partial(self.quantizers, setting, assignment)
            yield setting, *self._judge(assignment, numbers, start, stop, loss)

    def _elsewhere(
        self, assignment: Mapping[str, str], settings: Sequence[Setting], start: int, stop: int,
        loss: str, helpers: Holders,
    ) -> Iterator[tuple[Setting, float, float]]:  # fmt: skip
        """As `_here`; numbers are made here, so they are the same."""
        began = time.perf_counter()
        named = {digest([asdict(s), dict(assignment)]): s for s in settings}
        numbers = {name: partial(self.quantizers, s, assignment) for name, s in named.items()}
        for name, outputs, seconds in helpers.outputs(assignment, numbers, start, stop):
            yield named[name], _increase(outputs, self._batch(start, stop), loss), seconds
        self.spent_s += time.perf_counter() - began

    def judge_with(self, assignment: Mapping[str, str], quantizers: Quantizers) -> float:
        """The true loss of a plan with numbers of its own, on the held-out images."""
        loss = self.job.options.loss
        return self._judge(assignment, lambda: quantizers, 0, self.images, loss)[0]

    def time_for(self, count: int = 1) -> bool:
        """Is there time to judge so many more plans, as long as judged ones took?"""
        times = [judged.seconds for judged in self._judged.values()]
        return self.spent_s + count * max(times, default=0.0) <= self.budget_s

    def _key(
        self, assignment: Mapping[str, str], setting: Setting, start: int, stop: int, loss: str
    ) -> str:
        images, options = self.facts.images, self.job.options
        return digest(
            [SENSITIVITY_VERSION, self.job.key, images.calib.digest, images.holdout.digest,
             start, stop, dict(assignment), asdict(setting), options.ptq, source_key(loss)]
        )  # fmt: skip

    def _judge(
        self, assignment: Mapping[str, str], numbers: Callable[[], Quantizers], start: int,
        stop: int, word: str,
    ) -> tuple[float, float]:  # fmt: skip
        """Loss increase and seconds."""
        batch = self._batch(start, stop)
        began = time.perf_counter()
        part = self.facts.images.holdout.subset(np.arange(start, stop))
        outputs = predict(Simulator(self.job.graph, assignment, numbers()), part)
        increase = _increase(outputs, batch, word)
        seconds = time.perf_counter() - began
        self.spent_s += seconds
        return increase, seconds

    def _batch(self, start: int, stop: int) -> Batch:
        """Of the held-out images from start to stop."""
        holdout = self.facts.images.holdout
        if self._reference is None:
            self._reference = float_logits(self.job, holdout, "held-out images")
        labels = None if holdout.labels is None else torch.from_numpy(holdout.labels[start:stop])
        return Batch(self._reference[start:stop], labels)


def _increase(outputs: torch.Tensor, batch: Batch, word: str) -> float:
    """The mean loss of outputs, less float's. word: the loss by name; '' for the default."""
    loss = find_score("loss", word, LOSSES) if word else default_loss(batch.labels)
    return float((loss(outputs, batch) - loss(batch.reference, batch)).mean())
