"""The methods on a small network, with its real menu and invented times: legal plans within the
budgets, judged by the true loss; and what each is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwmpq import data, methods
from hwmpq.errors import InfeasibleError, InputError, UnknownName
from hwmpq.formats import format_named
from hwmpq.measure.store import Store
from hwmpq.methods import lcpaq, proxy
from hwmpq.methods.elsewhere import holders
from hwmpq.methods.nearby import neighbours
from hwmpq.methods.study import Judged, Setting, Study
from hwmpq.search import solve
from hwmpq.search.evaluate import choice_of, evaluate, index_of, within
from hwmpq.stages.choose import make_problem
from hwmpq.stages.facts import Facts, calibrate, sensitivities
from hwmpq.stages.job import Job, Options, Silent, load_images, open_job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import make_menu
from hwmpq.stages.pricing import LatencyTable
from hwmpq.types import Problem, Transition

FORMATS = ("fp32", "w8a8", "w4a8", "w4a4", "w2a8")
LAYERS = 4


class Small(nn.Module):
    """Random features of 16×16 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(256, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        return torch.relu(self.pointwise(x)).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


def small() -> Small:
    """Its last layer is fitted to the digits, by least squares."""
    torch.manual_seed(0)
    model = Small()
    digits = data.load("digits#train", None, (1, 1, 16, 16), 10)
    images = torch.from_numpy(digits.batch(range(800)))
    assert digits.labels is not None
    wanted = 8.0 * nn.functional.one_hot(torch.from_numpy(digits.labels[:800]), 10).float()
    with torch.no_grad():
        features = torch.cat([model.features(images), torch.ones(800, 1)], 1)
        square = features.T @ features + 0.1 * torch.eye(257)
        found = torch.linalg.solve(square, features.T @ wanted)
        model.fc.weight.copy_(found[:-1].T)
        model.fc.bias.copy_(found[-1])
    return model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    store = tmp_path_factory.mktemp("methods") / "store.sqlite"
    options = Options(
        f"{__name__}:small", input_shape=(1, 1, 16, 16), target="x86-avx2",
        calib_data="digits#train", formats=FORMATS, calib=64, store=str(store),
    )  # fmt: skip
    job = open_job(methods.settle(options), Silent())
    with job.store:
        yield job


@pytest.fixture(scope="module")
def facts(job: Job) -> Facts:
    """Without losses, which are each method's own."""
    images = load_images(job)
    images = replace(images, holdout=images.holdout.subset(np.arange(96)))
    menu = make_menu(job.network, job.target, FORMATS)
    quantizers = calibrate(job, images, menu)
    none: Any = None
    return Facts(images, menu, quantizers, none, LatencyFacts({}, {}))


def posed(job: Job, facts: Facts, ratio: float = 0.17, **options: Any) -> tuple[Study, Problem]:
    """A study and its problem within so many invented seconds; fp32 has 1."""
    job = replace(job, options=methods.settle(replace(job.options, **options)))
    found = sensitivities(job, facts.images, facts.menu, facts.quantizers)
    facts = replace(facts, loss=found)
    macs = np.array([layer.workload.macs for layer in job.network.layers], float)
    bits = [format_named(f).weight.bits + format_named(f).activation.bits for f in FORMATS]
    seconds = np.outer(macs, bits) / float(macs.sum() * bits[0])
    step = np.where(np.subtract.outer(bits, bits) == 0, 0.0, 0.01)
    moves = tuple(Transition(a, b, step) for a, b, _ in job.network.edges)
    table = LatencyTable(seconds, moves, 0.001)
    problem = make_problem(job, facts.menu, found, table, {})
    return Study(job, facts), replace(problem, budgets={"latency_s": ratio})


GIVEN_A_NETWORK = [name for name in methods.names() if methods.named(name).design is None]


@pytest.mark.parametrize("name", GIVEN_A_NETWORK)
def test_a_legal_plan_within_the_budget(job: Job, facts: Facts, name: str, tmp_path: Path) -> None:
    training: dict[str, Any] = {"train": ("steps=30", "batch=32"), "train_out": str(tmp_path)}
    trains = methods.named(name).trained is not None
    study, problem = posed(job, facts, method=name, **(training if trains else {}))
    found = methods.choose(study, problem)
    assert problem.legal is not None
    index = index_of(problem, found.solution.choice)
    assert problem.legal[np.arange(len(index)), index].all()
    assert within(problem, evaluate(problem, index))
    judged = study.judge_with(found.solution.choice, found.quantizers)
    assert found.told["measured_loss"] == judged
    for layer, fmt in found.solution.choice.items():
        assert found.quantizers.weight(layer, fmt)
    with pytest.raises(InfeasibleError, match="The fastest plan is"):
        methods.choose(study, replace(problem, budgets={"latency_s": 1e-9}))


class Notes(Silent):
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_auto_runs_the_single_cells_once(job: Job, facts: Facts, tmp_path: Path) -> None:
    told = Notes()
    with Store.open(tmp_path / "store.db") as store:
        study, problem = posed(replace(job, store=store, progress=told), facts)
        study.with_losses_of("clado-gn", problem)
    first, second = told.notes
    assert first.startswith("output-error: ") and f" {LAYERS} layer runs" not in first
    assert second.startswith(f"clado-gn: {LAYERS} layer runs"), "those of fp32"


def test_auto_is_never_worse_than_any_estimator_alone(job: Job, facts: Facts) -> None:
    study, problem = posed(job, facts)
    found = methods.choose(study, problem)
    losses = found.told["candidates"]
    assert len(losses) > 1 and next(iter(losses)) == "output-error"
    assert found.told["measured_loss"] <= min(losses.values())
    for name in ("output-error", "measured", "weight-error", "clado-gn"):
        alone, same = posed(job, facts, sensitivity=name)
        single = methods.choose(alone, same)
        assert "candidates" not in single.told
        assert found.told["measured_loss"] <= single.told["measured_loss"]
    assert found.solution.bound is not None and found.solution.objective is not None
    assert found.solution.objective >= found.solution.bound


def test_auto_keeps_its_first_plan_when_the_time_is_up(job: Job, facts: Facts) -> None:
    study, problem = posed(job, facts, max_time=1e-9)
    study.spent_s = 1.0
    found = methods.choose(study, problem)
    assert found.solution == study.solve(problem) or found.told["moves"] == 0
    assert list(found.told["candidates"]) == ["output-error"]


def test_a_named_solver_is_the_one_that_solves(job: Job, facts: Facts) -> None:
    study, problem = posed(job, facts, search="greedy")
    assert methods.choose(study, problem).solution.choice == solve(problem, "greedy").choice


def test_neighbours_are_near_and_within_the_budget(job: Job, facts: Facts) -> None:
    _, problem = posed(job, facts)
    plan = solve(problem).choice
    found = list(neighbours(problem, plan))
    values = [float(evaluate(problem, index_of(problem, other)).of("loss")) for other in found]
    assert found and values == sorted(values)
    for other in found:
        assert 1 <= sum(plan[layer] != other[layer] for layer in plan) <= 2
        assert within(problem, evaluate(problem, index_of(problem, other)))
    single = [o for o in found if sum(plan[la] != o[la] for la in plan) == 1]
    assert len(single) == len(_single_changes(problem, plan))


def _single_changes(problem: Problem, plan: dict[str, str]) -> list[dict[str, str]]:
    assert problem.legal is not None
    changed = [
        plan | {layer: fmt}
        for i, layer in enumerate(problem.layers)
        for j, fmt in enumerate(problem.formats)
        if problem.legal[i, j] and fmt != plan[layer]
    ]
    return [o for o in changed if within(problem, evaluate(problem, index_of(problem, o)))]


# clado


def test_pairs_find_the_best_plan_where_singles_do_not(job: Job, facts: Facts) -> None:
    """Two layers cheap alone and costly together: brute force knows the best plan."""
    study, problem = posed(job, facts, method="clado", sensitivity="clado-gn")
    pairs = np.zeros((LAYERS, 5, LAYERS, 5))
    loss = np.tile([0.0, 1.0, 2.0, 3.0, 9.0], (LAYERS, 1))
    loss[[0, 1]] *= 0.1
    for i, j in ((0, 1), (1, 0)):
        pairs[i, 2:, j, 2:] = 20.0
    pairs = pairs.reshape(loss.size, loss.size)
    np.fill_diagonal(pairs, 2.0 * loss)
    times = np.tile([5.0, 4.0, 3.0, 2.0, 1.0], (LAYERS, 1))
    problem = replace(
        problem, loss=loss, pair_loss=pairs, latency_s=times, transitions=(),
        legal=np.ones(loss.shape, bool), budgets={"latency_s": 14.1},
    )  # fmt: skip
    every = np.array(list(product(range(5), repeat=LAYERS)))
    values = evaluate(problem, every)
    assert values.raw_objective is not None
    best = float(values.raw_objective[within(problem, values)].min())
    found = methods.choose(study, problem)
    alone = evaluate(problem, index_of(problem, solve(problem).choice)).raw_objective
    assert alone is not None
    assert found.solution.objective == pytest.approx(best, rel=1e-6)
    assert found.told["raw_objective"] == pytest.approx(best, rel=1e-6)
    assert best < float(alone)


def test_clado_wants_an_estimator_of_pairs() -> None:
    with pytest.raises(InputError, match=r"method clado.*got measured; allowed: clado, clado-b"):
        methods.settle(Options("m", method="clado", sensitivity="measured"))
    settled = methods.settle(Options("m", method="clado", sensitivity="clado-gn"))
    assert (settled.sensitivity, settled.search) == ("clado-gn", "iqp")


# lcpaq


def test_pruning_loses_no_best_plan(job: Job, facts: Facts) -> None:
    _, problem = posed(job, facts)
    assert problem.legal is not None and problem.loss is not None
    loss = problem.loss.copy()
    loss[2, FORMATS.index("w4a8")] = 2 * loss[2, FORMATS.index("w4a4")]
    for share, moves in product((0.8, 1.0, 1.4, 2.0), (problem.transitions, ())):
        budgets = {"latency_s": share * problem.budgets["latency_s"]}
        whole = replace(problem, loss=loss, budgets=budgets, transitions=moves)
        kept = lcpaq.undominated(whole)
        assert not (kept & ~problem.legal).any()
        assert moves or not kept[2, FORMATS.index("w4a8")]
        best, pruned = solve(whole, "exhaustive"), solve(replace(whole, legal=kept))
        assert pruned.objective == pytest.approx(best.objective, rel=1e-9)


def test_of_equal_cells_one_is_kept(job: Job, facts: Facts) -> None:
    _, problem = posed(job, facts)
    same = np.ones((LAYERS, 5))
    equal = replace(
        problem, loss=same, latency_s=same, nbytes=same, bops=same, transitions=(),
        legal=np.ones(same.shape, bool), budgets={},
    )  # fmt: skip
    assert (lcpaq.undominated(equal).sum(1) == 1).all()


def test_settings_given_up_early_compare_with_the_others() -> None:
    """By what the default does on the same images, whichever those are."""
    other = Setting("minmax")
    found = {Setting(): [Judged(2.0, 16, 0.1), Judged(4.0, 16, 0.1)], other: [Judged(1.0, 16, 0.1)]}
    assert proxy.relative(found) == {Setting(): 1.0, other: 0.5}


class Stopped(Exception):
    """The run was killed here."""


def test_an_interrupted_proxy_search_goes_on(
    job: Job, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, problem = posed(job, facts, method="lcpaq")
    plan = choice_of(problem, np.full(LAYERS, FORMATS.index("w4a8")))
    whole, interrupted = [replace(job, store=Store.open(tmp_path / f"{n}.db")) for n in "ab"]
    count = 0
    real = Study._judge
    monkeypatch.setattr(proxy, "SETTINGS", 9)

    def counted(*given: Any) -> tuple[float, float]:
        nonlocal count
        count += 1
        if count == 12:
            raise Stopped
        return real(*given)

    expected, report = proxy.search(Study(whole, study.facts), plan)
    with whole.store, interrupted.store, monkeypatch.context() as patch:
        patch.setattr(Study, "_judge", counted)
        with pytest.raises(Stopped):
            proxy.search(Study(interrupted, study.facts), plan)
        found, again = proxy.search(Study(interrupted, study.facts), plan)
        resumed = count - 12
        count = 12
        assert proxy.search(Study(interrupted, study.facts), plan)[0] == expected
        assert count == 12, "what was judged is not judged again"
    assert found == expected
    same = ("settings", "judged_in_full", "spearman", "kendall", "image_passes")
    assert {k: again[k] for k in same} == {k: report[k] for k in same}
    assert resumed > 0 and report["image_passes"] < report["full_search_image_passes"]
    assert -1 <= report["spearman"] <= 1 and report["seconds"] > 0


def test_workers_judge_settings_alike(
    job: Job, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, problem = posed(job, facts, method="lcpaq")
    plan = choice_of(problem, np.full(LAYERS, FORMATS.index("w4a8")))
    monkeypatch.setattr(proxy, "SETTINGS", 5)
    found = []
    for word in ("serial", "processes:1"):
        options = replace(study.job.options, executor=word)
        own = replace(study.job, options=options, store=Store.open(tmp_path / f"{len(found)}.db"))
        with own.store, holders(own, facts.images.holdout) as helpers:
            assert (helpers is None) == (word == "serial")
            tried = proxy.trials(Study(own, facts), plan, helpers)
            whole = Study(own, facts).judge_all(plan, list(tried)[:2], helpers=helpers)
        found.append([[c.loss for c in chunks] for chunks in tried.values()])
        found[-1].append([judged.loss for judged in whole])
    assert len(found[0]) == 6 and found[0] == found[1]


def test_the_best_setting_is_not_worse_than_the_default(job: Job, facts: Facts) -> None:
    study, problem = posed(job, facts, method="lcpaq")
    found = methods.choose(study, problem)
    default = study.judge(found.solution.choice).loss
    assert found.told["measured_loss"] <= default
    assert found.told["options_kept"] <= found.told["options"]


# names


def test_only_methods_that_train_take_training() -> None:
    with pytest.raises(InputError, match="--train-out of the method hawq; allowed: fliqs"):
        methods.settle(Options("m", method="hawq", train=("steps=3",)))
    with pytest.raises(InputError, match=r"--train steps: got 'x'; allowed: int"):
        methods.settle(Options("m", method="fliqs", train=("steps=x",)))


def test_an_unknown_method() -> None:
    with pytest.raises(UnknownName, match=r"unknown method: got 'hawk'.*Nearest: hawq"):
        methods.settle(Options("m", method="hawk"))
    assert {"auto", "hawq", "lcpaq", "clado", "fliqs", "fliqs-nas"} <= set(methods.names())
