"""The whole story, top to bottom: from a trained model to a measured mixed-precision artifact.

open_job          the model becomes one canonical graph
make_menu         which formats each layer may take on the target
calibrate         scales, zero points, rounded weights
profile           seconds of every cell, measured, into the store; fill_in: or predicted
sensitivities     how much the loss grows per layer and format
make_problem      arrays; solve: the plan that is proven best
make_artifact     compiled; timed beside the fp32 and uniform artifacts; its accuracy measured
and, where measured and predicted disagree, corrected and solved again
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmpq import data
from hwmpq.data import DataSet
from hwmpq.errors import InfeasibleError, InputError
from hwmpq.measure import WorkerProcess
from hwmpq.quantizers import Quantizers
from hwmpq.stages import budget as budgets
from hwmpq.stages.build import Made, make_artifact
from hwmpq.stages.choose import (
    Point,
    fastest_within_drop,
    frontier_rows,
    least_loss,
    make_problem,
    walk_frontier,
    within,
)
from hwmpq.stages.facts import calibrate, monotone_violations, sensitivities
from hwmpq.stages.job import (
    Images,
    Job,
    Options,
    Progress,
    Silent,
    classes,
    divide,
    input_shape,
    load_images,
    open_job,
)
from hwmpq.stages.latency import (
    LatencyFacts,
    fit_overhead,
    overhead_key,
    price,
    profile,
    table,
)
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.stages.predicted import fill_in, spread
from hwmpq.stages.result import (
    EXIT_CODES,
    LayerRow,
    Result,
    check_place,
    layer_rows,
    result_json,
)
from hwmpq.stages.timing import Timed, stored_times, time_artifacts, torch_eager_s
from hwmpq.stages.verify import (
    Accuracy,
    deployed_outputs,
    float_logits,
    measure_accuracy,
    score,
    simulated_drop,
)
from hwmpq.types import Assignment, Problem, Sensitivity

if TYPE_CHECKING:
    import torch

__all__ = ["EXIT_CODES", "LayerRow", "Options", "Progress", "Result", "quantize", "quantize_model"]

MAX_ROUNDS = 5
#: Uniform artifacts that every plan is compared with, where the target runs them.
BASELINES = ("fp32", "w8a8", "bf16")
#: Predicted and measured may differ by this share before the plan is corrected and solved again.
TOLERANCE = 0.10


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


@dataclass(frozen=True, eq=False)
class Facts:
    """All that is known before anything is chosen."""

    images: Images
    menu: Menu
    quantizers: Quantizers
    loss: Sensitivity
    latency: LatencyFacts


def gather(job: Job, clock: Clock, images: Images) -> Facts:
    """Menu, calibration, cell times and sensitivities; what the store has is not made again."""
    o = job.options
    menu = make_menu(job.network, job.target, o.formats, o.pins, o.ties)
    limit = budgets.parse_latency(o.latency)
    if limit and limit.of not in baseline_names(menu):
        raise InputError(f"budget relative to {limit.of!r}", None, baseline_names(menu))
    with clock.time("sensitivity"):
        quantizers = calibrate(job, images, menu)
    with clock.time("profile"):
        latency = profile(job, menu)
    with clock.time("predict"):
        latency = fill_in(job, menu, latency)
    with clock.time("sensitivity"):
        loss = sensitivities(job, images, menu, quantizers)
    strange = monotone_violations(loss)
    if strange.cells:
        job.progress.note(f"loss not monotone in bits: {', '.join(strange.cells[:5])}")
    return Facts(images, menu, quantizers, loss, latency)


def fp32_bytes(job: Job) -> int:
    """Bytes of the layers' parameters in fp32: what relative sizes are relative to."""
    return 4 * sum(layer.parameters + layer.bias for layer in job.network.layers)


def baseline_names(menu: Menu) -> list[str]:
    """The uniform artifacts that the target can run."""
    return [name for name in BASELINES if name in menu.formats or name == "fp32"]


@dataclass(frozen=True, eq=False)
class Attempt:
    """A compiled plan and how it did."""

    made: Made
    predicted_s: float
    timed: dict[str, Timed]
    limit_s: float | None

    @property
    def own(self) -> Timed:
        return self.timed["plan"]

    @property
    def within_limit(self) -> bool:
        return self.limit_s is None or self.own.interval[1] <= self.limit_s

    @property
    def ambiguous(self) -> bool:
        low, high = self.own.interval
        return self.limit_s is not None and low <= self.limit_s < high


class Bench:
    """Compiles plans beside the uniform artifacts and times them together, in one worker."""

    def __init__(self, job: Job, facts: Facts, clock: Clock, folder: Path, worker: WorkerProcess):
        self.job, self.facts, self.clock, self.folder = job, facts, clock, folder
        self.worker = worker
        count = min(4, len(facts.images.calib))
        self.samples = facts.images.calib.batch(range(count))
        self.baselines: dict[str, Made] = {}
        self.tried: dict[str, Attempt] = {}
        self.statistic = "median"
        self._reference: Any = None

    def compile(self, assignment: Assignment, name: str) -> Made:
        with self.clock.time("compile"), self.job.progress.stage(f"compile {name}", None):
            return make_artifact(
                self.job, assignment, self.facts.quantizers, self.folder / name, self.samples
            )

    def uniforms(self) -> dict[str, Assignment]:
        """fp32 and the uniform assignments that the target can run."""
        facts, network = self.facts, self.job.network
        names = baseline_names(facts.menu)
        return {name: uniform(facts.menu, network, name)[0] for name in names}

    def add_baselines(self) -> None:
        """Build the uniform artifacts, unless that was done."""
        for name, assignment in self.uniforms().items():
            if name not in self.baselines:
                self.baselines[name] = self.compile(assignment, name)

    def first_times(self) -> dict[str, Timed]:
        """The baselines' times that the choice rests on."""
        return stored_times(self.job, self.uniforms(), self.statistic, self.time)

    def reference(self) -> Any:
        """The float model's outputs on the test images."""
        if self._reference is None:
            with self.clock.time("verify"):
                self._reference = float_logits(self.job, self.facts.images.test, "the test images")
        return self._reference

    def time(self, plan: Made | None = None) -> dict[str, Timed]:
        """Time the baselines, and the plan, in one run."""
        self.add_baselines()
        folders = {name: made.path for name, made in self.baselines.items()}
        if plan is not None:
            folders["plan"] = plan.path
        with self.clock.time("verify"), self.job.progress.stage("time the artifacts", None):
            return time_artifacts(self.job, folders, self.statistic, self.worker)

    def attempt(
        self, assignment: Assignment, latency: LatencyFacts, limit: budgets.Latency | None
    ) -> Attempt:
        """Compile a plan and time it in one run with the baselines."""
        made = self.compile(assignment, f"plan{len(self.tried)}")
        timed = self.time(made)
        done = Attempt(
            made, price(self.job, assignment, latency), timed, limit_seconds(limit, timed)
        )
        self.tried[made.path.name] = done
        return done


@dataclass(frozen=True, eq=False)
class Ground:
    """What every choice rests on. first: the baselines' times; latency: with the overhead."""

    first: dict[str, Timed]
    latency: LatencyFacts
    problem: Problem


def survey(bench: Bench, size: int | None) -> Ground:
    """Time the baselines unless the store knows, fit the overhead, put the problem together.

    The overhead is kept in the store, for `hwmpq search`, where it rests on measured cells alone.
    """
    job, facts = bench.job, bench.facts
    first = bench.first_times()
    measured = [(plan, first[name].latency_s) for name, plan in bench.uniforms().items()]
    latency = fit_overhead(job, facts.latency, measured)
    if all(cell.source == "measured" for cell in facts.latency.layers.values()):
        job.store.put_fact("overhead", overhead_key(job), [latency.overhead_s, latency.speed])
    with bench.clock.time("search"):
        problem = make_problem(job, facts.menu, facts.loss, table(job, facts.menu, latency), size)
    return Ground(first, latency, problem)


def limit_seconds(limit: budgets.Latency | None, timed: dict[str, Timed]) -> float | None:
    """The budget in seconds, relative ones from the artifacts timed in the same run."""
    if limit is None or limit.fastest:
        return None
    if limit.seconds is not None:
        return limit.seconds
    assert limit.ratio is not None
    return limit.ratio * timed[limit.of].latency_s


def quantize(
    model: torch.nn.Module,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    calib: Any,
    *,
    eval: Any = None,
    target: str = "native",
    device: str = "local",
    latency: str | float | None = None,
    max_size: str | int | None = None,
    max_drop: float | None = None,
    formats: Sequence[str] = (),
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
    search: str = "ilp",
    sensitivity: str | None = None,
    metric: str = "",
    calib_count: int = 256,
    eval_count: int | None = None,
    threads: int = 1,
    seed: int = 0,
    store: str | Path | None = None,
    out: str | Path = "hwmpq-out",
    fresh: bool = False,
    max_time: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Quantize a torch module for a target within budgets; `hwmpq quantize` from Python.

    model: float32; left in the mode (training or not) it was in. example_input: float32
    [N, C, H, W] with the batch size to compile for, or a sequence of one tensor per argument.
    calib: images for scales, sensitivities and every choice: float32 [M, C, H, W], normalized, as
    array or tensor; or (images, labels) with labels int [M]; or a `hwmpq.data.DataSet`; or a name
    such as 'digits#train' or 'npz:FILE'. eval: the same, for the reported accuracy only; without it
    half of calib is set aside. Without labels the metric is agreement with float.

    latency: seconds or a budget such as '0.7x'; max_size: bytes or a budget such as '0.25x';
    max_drop: accuracy points; calib_count, eval_count: at most so many images; max_time: seconds.
    The rest as the command's options of the same names. The result is written to `out`.
    Raises HwmpqError as `quantize_model` does.
    """
    from torch import nn

    from hwmpq.frontend.model import LoadedModel

    if not isinstance(model, nn.Module):
        raise InputError("model", type(model).__name__, "torch.nn.Module")
    modes = {module: module.training for module in model.modules()}
    name = type(model).__name__
    options = Options(
        model=name, target=target, device=device,
        latency=f"{latency:.12f}s" if isinstance(latency, (int, float)) else latency,
        max_size=f"{max_size}B" if isinstance(max_size, int) else max_size,
        max_drop=max_drop, formats=tuple(formats), pins=tuple(pins), ties=tuple(ties),
        search=search, sensitivity=sensitivity, metric=metric, calib=calib_count,
        eval=eval_count, threads=threads, seed=seed, store=None if store is None else str(store),
        out=str(out), fresh=fresh, max_time=max_time,
    )  # fmt: skip
    loaded = LoadedModel(model, _examples(example_input), name)
    try:
        return quantize_model(options, progress, lambda job: _given(job, calib, eval), loaded)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _examples(given: Any) -> tuple[torch.Tensor, ...]:
    import torch

    examples = (given,) if isinstance(given, torch.Tensor) else tuple(given)
    for item in examples:
        if not isinstance(item, torch.Tensor) or item.dtype != torch.float32:
            got = item.dtype if isinstance(item, torch.Tensor) else type(item).__name__
            raise InputError("example_input", got, "float32 tensors, one per argument of forward")
    return examples


def _given(job: Job, calib: Any, test: Any) -> Images:
    """The caller's images, checked against the model."""

    def read(given: Any, name: str) -> DataSet:
        if isinstance(given, str):
            return data.load(given, None, shape, labels_below)
        if not isinstance(given, DataSet):
            images, labels = given if isinstance(given, (tuple, list)) else (given, None)
            given = data.from_arrays(images, labels, name)
        return data.checked(given, shape, labels_below)

    shape, labels_below = input_shape(job.graph), classes(job)
    return divide(
        read(calib, "calib"), None if test is None else read(test, "eval"), job.options
    )  # fmt: skip


def quantize_model(
    options: Options, progress: Progress | None = None,
    images: Callable[[Job], Images] = load_images, model: Any = None,
) -> Result:  # fmt: skip
    """The main job. Raises HwmpqError for bad input, an impossible budget or a lost device.

    images, model: where they do not come from the options (`quantize`); model: a LoadedModel.
    """
    limit = budgets.parse_latency(options.latency)
    budgets.parse_size(options.max_size, 0)
    if not options.dry_run:
        check_place(Path(options.out))
    clock = Clock()
    with clock.time("trace"):
        job = open_job(options, progress or Silent(), model)
    with job.store:
        return _run(job, clock, images(job), limit)


def _run(job: Job, clock: Clock, images: Images, limit: budgets.Latency | None) -> Result:
    options = job.options
    size = budgets.parse_size(options.max_size, fp32_bytes(job))
    facts = gather(job, clock, images)
    if options.dry_run:
        return _forecast(job, facts, clock)
    out = Path(options.out)
    with (
        workshop(out) as folder,
        WorkerProcess(job.device.prefix, threads=options.threads) as worker,
    ):
        bench = Bench(job, facts, clock, folder, worker)
        bench.statistic = limit.statistic if limit else "median"
        ground = survey(bench, size)
        first, latency, problem = ground.first, ground.latency, ground.problem
        with clock.time("search"):
            points = walk_frontier(job, problem)
        job.progress.note(f"frontier of {len(points)} plans")
        by_drop = limit is None or limit.fastest
        if by_drop and not (size is not None and limit is None and options.max_drop is None):
            plan = _fastest(job, facts, clock, bench, latency, points)
        else:
            plan = _least_loss(job, facts, clock, bench, latency, problem, limit, first)
        return _finish(job, facts, clock, bench, latency, problem, points, plan, out)


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in, so that the result is put in place by rename.

    Those of killed runs, which hold their lock no more, are removed. Raises InputError.
    """
    import fcntl

    prefix = f".{out.name}.work."
    try:
        for left in out.parent.glob(f"{prefix}*/lock"):
            with left.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another run is at work
                shutil.rmtree(left.parent, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        held = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(
            f"cannot write beside {out}", error.strerror or error, None,
            "Free some space or choose another --out.",
        ) from error  # fmt: skip
    try:
        with held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Plan:
    """The accepted (or best) attempt, its accuracy, rounds taken and what the solver proved."""

    attempt: Attempt
    accuracy: Accuracy
    rounds: int
    objective: float | None
    bound: float | None
    gap: float | None


def _least_loss(
    job: Job, facts: Facts, clock: Clock, bench: Bench, latency: LatencyFacts, problem: Problem,
    limit: budgets.Latency | None, first: dict[str, Timed],
) -> Plan:  # fmt: skip
    """Least loss within the budgets; the measured time decides, and corrects the prediction."""
    seconds = limit_seconds(limit, first)
    allowed = seconds
    best: tuple[Attempt, Any] | None = None
    rounds = 0
    while rounds < MAX_ROUNDS:
        with clock.time("search"):
            try:
                solution = least_loss(job, within(problem, allowed))
            except InfeasibleError:
                if best is None:
                    raise
                break
        rounds += 1
        attempt = bench.attempt(solution.choice, latency, limit)
        if best is None or _better(attempt, best[0]):
            best = (attempt, solution)
        if attempt.within_limit:
            break
        assert allowed is not None and attempt.limit_s is not None
        # What the plan took beyond its price is taken off the next plan's allowance.
        excess = attempt.own.interval[1] / attempt.limit_s
        reached = float(solution.latency_s or allowed)
        allowed = min(allowed, reached) / excess * 0.995
        job.progress.note(
            f"round {rounds}: measured {attempt.own.latency_s * 1e3:.3g} ms against a limit of "
            f"{attempt.limit_s * 1e3:.3g} ms; solving again"
        )
    assert best is not None
    attempt, solution = best
    reference = bench.reference()
    with clock.time("verify"):
        accuracy = measure_accuracy(
            job, attempt.made.path, attempt.made.assignment, facts.quantizers, facts.images.test,
            reference,
        )  # fmt: skip
    return Plan(attempt, accuracy, rounds, solution.objective, solution.bound, solution.gap)


def _better(new: Attempt, old: Attempt) -> bool:
    """Within the limit beats outside; outside, the faster one."""
    if new.within_limit != old.within_limit:
        return new.within_limit
    return new.own.latency_s < old.own.latency_s


def _fastest(
    job: Job, facts: Facts, clock: Clock, bench: Bench, latency: LatencyFacts,
    points: list[Point],
) -> Plan:  # fmt: skip
    """The fastest plan within the drop: judged by simulation, then on the artifact itself."""
    max_drop = 1.0 if job.options.max_drop is None else job.options.max_drop
    holdout = facts.images.holdout
    with clock.time("search"):
        reference = float_logits(job, holdout, "held-out images")

        def drop(assignment: Assignment) -> float:
            return simulated_drop(job, assignment, facts.quantizers, holdout, reference)

        index = fastest_within_drop(points, drop, max_drop)
    test = bench.reference()
    rounds = 0
    while True:
        rounds += 1
        point = points[index]
        attempt = bench.attempt(point.assignment, latency, None)
        with clock.time("verify"):
            accuracy = measure_accuracy(
                job, attempt.made.path, attempt.made.assignment, facts.quantizers,
                facts.images.test, test,
            )  # fmt: skip
        enough = accuracy.drop <= max_drop
        if enough or rounds >= MAX_ROUNDS or index + 1 >= len(points):
            return Plan(attempt, accuracy, rounds, point.loss, point.loss, 0.0)
        job.progress.note(
            f"round {rounds}: drop {accuracy.drop:.2f} points is above {max_drop:g}; "
            "taking the next slower plan"
        )
        index += 1


def _finish(
    job: Job, facts: Facts, clock: Clock, bench: Bench, latency: LatencyFacts, problem: Problem,
    points: list[Point], plan: Plan, out: Path,
) -> Result:  # fmt: skip
    """Baselines' accuracy, the verdict, the artifact in its place."""
    attempt = plan.attempt
    reference = bench.reference()
    baselines = {}
    with clock.time("verify"):
        eager = torch_eager_s(job)
        for name, made in bench.baselines.items():
            outputs = deployed_outputs(job, made.path, facts.images.test, f"uniform {name}")
            baselines[name] = {
                "latency_s": attempt.timed[name].latency_s,
                "accuracy": score(job, outputs, reference, facts.images.test),
                "nbytes": made.weight_bytes,
                "others": uniform(facts.menu, job.network, name)[1],
            }
    if eager is not None:
        baselines["fp32"]["vs_torch_eager"] = eager / attempt.timed["fp32"].latency_s
    status = _status(job, attempt, plan.accuracy)
    rows = layer_rows(job, facts.menu, latency, problem, attempt.made.assignment)
    json = result_json(
        job, status=status, ambiguous=attempt.ambiguous, assignment=attempt.made.assignment,
        rows=rows, predicted_s=attempt.predicted_s,
        predicted_interval=predicted_interval(job, attempt, latency), own=attempt.own,
        limit_s=attempt.limit_s, statistic=bench.statistic, baselines=baselines,
        accuracy=plan.accuracy, objective=plan.objective, bound=plan.bound, gap=plan.gap,
        rounds=plan.rounds, seconds=clock.seconds, out=out, made=attempt.made,
        split=facts.images.split, new_timings=facts.latency.new_timings,
        failures=facts.latency.failures, estimator=facts.loss.estimator,
    )  # fmt: skip
    result = Result(json, rows, frontier_rows(points), EXIT_CODES[status], problem)
    result.write(out, attempt.made.path)
    return result


def predicted_interval(job: Job, attempt: Attempt, latency: LatencyFacts) -> tuple[float, float]:
    """TOLERANCE on either side, and what the bands of predicted cells add."""
    centre = attempt.predicted_s
    below, above = spread(job, attempt.made.assignment, latency)
    return max(centre * (1 - TOLERANCE) + below, 0.0), centre * (1 + TOLERANCE) + above


def _status(job: Job, attempt: Attempt, accuracy: Accuracy) -> str:
    if not attempt.within_limit:
        return "missed"
    max_drop = job.options.max_drop
    if max_drop is None and job.options.latency in (None, "fastest") and not job.options.max_size:
        max_drop = 1.0
    if max_drop is not None and accuracy.drop > max_drop:
        return "accuracy"
    if attempt.own.interval[0] > attempt.timed["fp32"].interval[1]:
        return "slower"
    return "met"


def _forecast(job: Job, facts: Facts, clock: Clock) -> Result:
    """What a run would do, without compiling networks."""
    rows = [
        LayerRow(
            la.name, la.workload.op, "", "", "", "", 0.0, None, {}, facts.menu.reasons[la.name]
        )
        for la in job.network.layers
    ]
    json = {
        "version": 1, "status": "met", "dry_run": True, "model": job.options.model,
        "target": job.target.name, "device": job.device.name, "formats": list(facts.menu.formats),
        "layers": len(job.network.layers), "new_timings": facts.latency.new_timings,
        "seconds": clock.seconds,
    }  # fmt: skip
    return Result(json, rows, [], 0, None)
