"""The closed loop's parts: prices fitted on artifacts, predicted cells timed, drops judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hwmpq import methods
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.measure import CellTiming
from hwmpq.methods.study import Chosen
from hwmpq.methods.trials import TIMED, Trial, candidates, confirmed
from hwmpq.pipeline import Options
from hwmpq.search import solve
from hwmpq.stages import latency
from hwmpq.stages.bench import Attempt, Clock
from hwmpq.stages.build import Made
from hwmpq.stages.cells import glue_fact, glue_seconds
from hwmpq.stages.choose import fastest_within_drop, refined, walk_frontier, within
from hwmpq.stages.facts import calibrate
from hwmpq.stages.fit import ADDITIVE, LEAST_RESIDUAL, Whole, fit_prices, fitted
from hwmpq.stages.ground import Ground, measured
from hwmpq.stages.job import Images, Job, Silent, load_images, open_job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu, make_menu
from hwmpq.stages.pricing import price, table
from hwmpq.stages.timing import Timed
from hwmpq.stages.verify import LOOK, Jury, float_logits, simulated_drop
from hwmpq.stages.walks import calling, schedule_of, schedules
from hwmpq.types import Assignment, Measurement, Problem, Sensitivity

FORMATS = ("fp32", "w8a8", "w4a8")


def test_fit_finds_overhead_and_speed() -> None:
    rng = np.random.default_rng(0)
    calls, cells = rng.integers(10, 100, 8).astype(float), rng.uniform(1e-4, 1e-3, 8)
    seconds = 2e-6 * calls + 1.2 * cells
    assert fitted(calls, cells, seconds) == pytest.approx((2e-6, 1.2, LEAST_RESIDUAL))
    disturbed = seconds * np.where(np.arange(8) == 3, 3.0, 1.0)
    overhead, speed, residual = fitted(calls, cells, disturbed)
    assert (overhead, speed) == pytest.approx((2e-6, 1.2)) and residual > 0.5


def test_fit_takes_no_overhead_that_foretells_nothing() -> None:
    """All plans of a network make about as many calls: the speed alone explains them."""
    rng = np.random.default_rng(1)
    calls, cells = rng.integers(26, 31, 7).astype(float), rng.uniform(4e-4, 1e-3, 7)
    seconds = 1.3 * cells * rng.uniform(0.97, 1.03, 7)
    overhead, speed, residual = fitted(calls, cells, seconds)
    assert abs((overhead * calls + speed * cells) / (1.3 * cells) - 1).max() < 0.05
    assert 0.02 <= residual < 0.08
    assert fitted(calls[:1], cells[:1], seconds[:1])[:2] == (0.0, seconds[0] / cells[0])


def test_glue_is_corrected_for_the_speed_of_its_block() -> None:
    timing = CellTiming("g", (2e-6, 4e-6, 3e-6), quality={"speed_factor": 0.5})
    assert glue_seconds(glue_fact({}, {}, timing)) == pytest.approx(1.5e-6)
    failed = glue_fact({}, {}, None, "compile: no")
    assert failed["error"] == "compile: no" and glue_seconds(failed) == float("inf")


def problem(seed: int = 0, layers: int = 6) -> Problem:
    """Wide formats are slow and lose nothing."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(1, 2, (layers, 1)) * np.array([4.0, 2.0, 1.0])
    loss = rng.uniform(1, 2, (layers, 1)) * np.array([0.0, 1.0, 8.0])
    names = tuple(f"l{i}" for i in range(layers))
    return Problem(layers=names, formats=FORMATS, loss=loss, latency_s=seconds)


def test_the_frontier_is_refined_where_the_limit_lies() -> None:
    posed = problem()
    job = SimpleNamespace(options=Options("m"))
    loss = {f"l{i}": dict(zip(FORMATS, row, strict=True)) for i, row in enumerate(posed.loss)}

    def drop(plan: dict[str, str]) -> float:
        return float(sum(loss[layer][fmt] for layer, fmt in plan.items()))

    points = walk_frontier(job, posed, points=3)
    limit = (points[0].loss + points[1].loss) / 2
    index = fastest_within_drop(points, drop, limit)
    more, at = refined(posed, points, index, lambda plan: drop(plan) <= limit)
    assert drop(more[at].assignment) <= limit < drop(more[at - 1].assignment)
    assert more[at].latency_s < points[index].latency_s
    assert [p.latency_s for p in more] == sorted(p.latency_s for p in more)
    assert refined(posed, points, 0, lambda _: True) == (points, 0)


def test_plans_beside_the_methods_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = within(problem(layers=12), 25.0)
    own = solve(posed)
    asked: list[float] = []

    def candidate(near: Problem, solver: str, _: float) -> Any:
        asked.append(near.budgets["latency_s"])
        return solve(near, solver)

    study = SimpleNamespace(
        job=SimpleNamespace(options=Options("m")), facts=SimpleNamespace(quantizers=None),
        time_for=lambda count: count < 3, candidate=candidate,
    )  # fmt: skip
    monkeypatch.setattr(methods, "choose", lambda *_: Chosen(own, None, {}))  # type: ignore[arg-type]
    found = candidates(study, posed, ())  # type: ignore[arg-type]
    assert found[0].solution is own and asked[0] == pytest.approx(1.03 * 25)
    above = found[1].solution
    assert above.objective < own.objective and above.latency_s > own.latency_s
    known = {frozenset(above.choice.items())}
    assert above.choice not in [p.solution.choice for p in candidates(study, posed, known)[1:]]  # type: ignore[arg-type]
    assert len(candidates(study, problem(), ())) == 1  # type: ignore[arg-type]


def attempt(name: str, seconds: float, limit_s: float | None = 2.0) -> Attempt:
    own = Timed(seconds, (seconds, seconds), (seconds,), {})
    return Attempt(Made(Path(name), {}, 0), seconds, own, {}, limit_s)


def trial(name: str, seconds: float, loss: float, limit_s: float | None = 2.0) -> Trial:
    return Trial(Chosen(None, None, {}), (attempt(name, seconds, limit_s),), loss)  # type: ignore[arg-type]


def test_the_least_loss_within_the_limit_wins_else_the_fastest() -> None:
    late, fast, good = trial("late", 3.0, 0.1), trial("fast", 1.0, 0.9), trial("good", 2.0, 0.5)
    assert min([late, fast, good], key=Trial.order) is good
    assert min([trial("later", 4.0, 0.0), late], key=Trial.order) is late


def test_a_plan_counts_by_the_slowest_of_its_timings() -> None:
    asked: list[str] = []
    fresh = {"lucky": 2.01, "sound": 1.95, "bad": 1.0}

    class Run:
        def again(self, attempts: Sequence[Attempt]) -> list[Attempt]:
            asked.extend(a.made.path.name for a in attempts)
            return [attempt(a.made.path.name, fresh[a.made.path.name]) for a in attempts]

    tried = [
        trial("far", 3.0, 0.0), trial("bad", 1.0, 0.9), trial("lucky", 1.99, 0.1),
        trial("sound", 1.9, 0.2),
    ]  # fmt: skip
    best = confirmed(Run(), tried)[0]  # type: ignore[arg-type]
    assert asked[:3] == ["lucky", "sound", "bad"] and asked.count("sound") == TIMED - 1
    assert best.loss == 0.2 and best.attempt.own.latency_s == 1.95
    unlimited = trial("unlimited", 1.0, 0.3, None)
    assert confirmed(None, [unlimited]) == [unlimited]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Images, Menu]]:
    store = tmp_path_factory.mktemp("loop") / "store.sqlite"
    options = Options(
        "zoo:digits_cnn", calib_data="digits#train", formats=FORMATS, calib=32, store=str(store)
    )
    job = open_job(options, Silent())
    with job.store:
        yield job, load_images(job), make_menu(job.network, job.target, FORMATS)


def test_the_jury_sees_only_as_many_images_as_it_needs(opened: tuple[Job, Images, Menu]) -> None:
    job, images, menu = opened
    assert len(images.jury) > len(images.holdout) and len(images.jury) > 2 * LOOK
    first = images.jury.batch(range(len(images.holdout)))
    assert (first == images.holdout.batch(range(len(images.holdout)))).all()
    numbers = calibrate(job, images, menu)
    plan = dict.fromkeys(job.network.names, "w8a8")
    clear, never, close = (Jury(job, numbers, images.jury, limit) for limit in (50.0, -50.0, 0.0))
    assert clear.judge(plan).n == never.judge(plan).n == LOOK
    assert clear.allows(plan) and not never.allows(plan)
    whole = close.judge(plan)
    assert whole.n == len(images.jury)
    reference = float_logits(job, images.jury, "held-out images")
    truth = simulated_drop(job, plan, numbers, images.jury, reference)
    assert whole.drop == pytest.approx(truth)


def facts_of(job: Job, menu: Menu, seconds: dict[tuple[str, str], float]) -> LatencyFacts:
    """Cells that are predicted, 1e-5 s where nothing else is said; glue for nothing."""
    cells = {}
    for layer in job.network.layers:
        for fmt in menu.kernels[layer.name]:
            own = seconds.get((layer.name, fmt), 1e-5)
            cells[layer.workload.key, fmt] = Measurement(
                f"predicted|{layer.name}|{fmt}", layer.workload, fmt, "k", 1, (own,),
                source="predicted", quality={"interval": [own / 2, 2 * own], "upper": 1.5 * own},
            )  # fmt: skip
    calls = [step.call for walk in schedules(job, menu) for step in walk.steps]
    return LatencyFacts(cells, {glue_kernels.key(c): 0.0 for c in calls if isinstance(c, GlueCall)})


def test_steps_are_priced_inside_artifacts_where_the_sum_of_the_cells_is_not_the_time(
    opened: tuple[Job, Images, Menu],
) -> None:
    job, _, menu = opened
    names, rng = job.network.names, np.random.default_rng(2)
    cells = {(n, f): float(rng.uniform(1e-5, 9e-5)) for n in names for f in FORMATS}
    facts = facts_of(job, menu, cells)

    def whole(plan: Assignment, true: dict[tuple[str, str], float]) -> Whole:
        """Its calls took 1.1 times as long while they were timed one by one."""
        places = [(s.node.name, isinstance(s.call, GlueCall))
                  for s in calling(schedule_of(job, plan))]  # fmt: skip
        seconds = [1e-7 if glue else true[name, plan[name]] for name, glue in places]
        return Whole(plan, sum(seconds), tuple(1.1 * s for s in seconds))

    plans = [{n: str(rng.choice(FORMATS)) for n in names} for _ in range(9)]
    true = {key: float(rng.uniform(0.4, 2)) * seconds for key, seconds in cells.items()}
    found = fit_prices(job, facts, [whole(plan, true) for plan in plans])
    assert found.inside and found.residual < 0.5
    other = {n: str(rng.choice([plan[n] for plan in plans])) for n in names}
    assert other not in plans
    assert price(job, other, found) == pytest.approx(whole(other, true).seconds, rel=0.01)
    seconds = table(job, menu, found).latency_s[1]
    fmt = plans[0][names[1]]
    assert seconds[menu.formats.index(fmt)] == pytest.approx(true[names[1], fmt])
    wanting = {f for f in FORMATS if all(plan[names[1]] != f for plan in plans)}
    assert not wanting
    # one speed explains these, and is all there is to say
    even = {key: 1.3 * seconds for key, seconds in cells.items()}
    told = fit_prices(job, facts, [whole(plan, even) for plan in plans])
    assert told.speed == pytest.approx(1.3, rel=0.05) and not told.inside
    assert told.residual < ADDITIVE


def test_predicted_cells_of_a_plan_are_timed_first(
    opened: tuple[Job, Images, Menu], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, menu = opened
    asked: list[tuple[str, str]] = []

    class Made:
        def layers(self, block: Any) -> list[tuple[tuple[str, str], Measurement]]:
            asked.extend(item.name for item in block)
            return [
                (i.name, Measurement(i.key, i.call.workload, i.name[1], "k", 1, (2e-5,)))
                for i in block
            ]

    @contextmanager
    def bench(_: Job) -> Iterator[Made]:
        yield Made()

    monkeypatch.setattr(latency, "cell_bench", bench)
    facts = facts_of(job, menu, {})
    wide, plan = (dict.fromkeys(job.network.names, fmt) for fmt in ("fp32", "w8a8"))
    loss = Sensitivity(job.network.names, menu.formats, np.zeros(menu.legal.shape), "x", 1)
    run = SimpleNamespace(job=job, clock=Clock(), facts=SimpleNamespace(menu=menu, loss=loss))
    before = Ground({}, facts, problem(), (Whole(wide, 6 * 2e-5, ()),))
    after = measured(run, before, [plan])  # type: ignore[arg-type]
    assert after is not None and after.timed == before.timed
    assert set(asked) == {(la.workload.key, "w8a8") for la in job.network.layers}
    assert measured(run, after, [plan]) is None  # type: ignore[arg-type]
    # a price is of what is thought likely; the search is told what is hardly exceeded
    assert after.latency.speed == pytest.approx(2)
    assert price(job, wide, after.latency) == pytest.approx(6 * 2e-5)
    assert price(job, plan, after.latency) == pytest.approx(6 * 4e-5)
    seconds = after.problem.latency_s
    assert seconds is not None
    assert seconds[1] == pytest.approx([3e-5, 4e-5, 3e-5])
