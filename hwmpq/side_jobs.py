"""The jobs beside `quantize`, made of the same stages: look at a model, measure it, solve for it.

inspect_model      what there is, and what may run where: no data, no device
profile_model      seconds of every cell, into the store
sensitivity_model  loss of every cell, into the store
frontier_model     the whole curve, nothing compiled but the uniform artifacts
search_model       one plan from what the store knows; measures and writes nothing
compile_model      an artifact from an assignment
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import artifact, targets
from hwmpq.artifact.folder import is_ours, read_manifest
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import format_named, known_formats
from hwmpq.graph import Graph, network_of
from hwmpq.kernels import best, why_not
from hwmpq.measure import WorkerProcess, fingerprint
from hwmpq.pipeline import Bench, Clock, Facts, fp32_bytes, gather, limit_seconds, survey
from hwmpq.quantizers import Quantizers
from hwmpq.search import solve
from hwmpq.search.evaluate import QUANTITIES, evaluate, index_of
from hwmpq.stages import budget as budgets
from hwmpq.stages.build import make_artifact
from hwmpq.stages.choose import (
    fastest_within_drop,
    frontier_rows,
    infeasible,
    make_problem,
    solver_limit_s,
    walk_frontier,
    within,
)
from hwmpq.stages.facts import (
    calibrate,
    monotone_violations,
    sensitivities,
    stored_sensitivities,
)
from hwmpq.stages.job import (
    Images,
    Job,
    Options,
    Progress,
    Silent,
    input_shape,
    load_images,
    open_job,
)
from hwmpq.stages.latency import (
    LatencyFacts,
    overhead_key,
    price,
    profile,
    table,
    unknown_cells,
)
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.stages.predicted import fill_in
from hwmpq.stages.result import layer_rows, shape_text
from hwmpq.stages.verify import float_logits, simulated, simulated_drop
from hwmpq.types import Assignment, Network, Problem, Sensitivity, Solution

#: Plans of a frontier whose accuracy is simulated.
JUDGED = 8


def inspect_model(options: Options) -> dict[str, Any]:
    """Layers, glue and sizes of a model, and which formats the target's kernels run.

    Formats: those asked for, else all known ones that some kernel of some target runs.
    Raises UnsupportedModel naming every operator that cannot be taken.
    """
    from hwmpq.frontend.model import load_model

    target = targets.load(options.target)
    weights = Path(options.weights) if options.weights else None
    graph = load_model(options.model, weights, options.input_shape).graph()
    network = network_of(graph)
    formats = [format_named(name) for name in options.formats or _runnable(network)]
    layers = []
    for layer in network.layers:
        able, reasons = [], {}
        for fmt in formats:
            reason = why_not(layer.workload, fmt, target.features)
            if reason is None:
                able.append(fmt.name)
            else:
                reasons[fmt.name] = reason
        layers.append(
            {
                "name": layer.name, "op": layer.workload.op, "shape": shape_text(layer.workload),
                "macs": layer.workload.macs, "nbytes": 4 * (layer.parameters + layer.bias),
                "workload": layer.workload.key, "formats": able, "why_not": reasons,
                "source": graph.node(layer.name).source,
            }
        )  # fmt: skip
    return {
        "version": 1, "model": options.model, "target": target.name,
        "runs_here": not targets.satisfied_by_host(target), "layers": layers,
        "glue": [
            {"name": n.name, "op": n.op, "source": n.source} for n in graph.nodes if not n.is_layer
        ],
        "inputs": _tensors(graph, graph.inputs), "outputs": _tensors(graph, graph.outputs),
        "macs": sum(layer.workload.macs for layer in network.layers),
        "parameters": sum(layer.parameters + layer.bias for layer in network.layers),
    }  # fmt: skip


def _runnable(network: Network) -> list[str]:
    """Formats that a kernel runs on a machine with every feature, in some layer."""
    everything = frozenset(targets.FEATURES)
    workloads = {layer.workload for layer in network.layers}
    return [
        name for name in known_formats()
        if any(best(w, format_named(name), everything) for w in workloads)
    ]  # fmt: skip


def _tensors(graph: Graph, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(graph.tensors[name])} for name in names]


def profile_model(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every layer in every format, and the glue; each time is saved at once."""
    job = open_job(options, progress or Silent())
    with job.store:
        menu = make_menu(job.network, job.target, options.formats, options.pins)
        facts = profile(job, menu)
    return {
        "version": 1, "model": options.model, "layers": list(job.network.names),
        "formats": list(menu.formats), "latency_s": _times(job, menu, facts),
        "why_not": _reasons(job, menu, facts), "glue": len(facts.glue),
        "new_timings": facts.new_timings, "failures": facts.failures, "target": job.target.name,
        "threads": options.threads, "fingerprint": fingerprint(),
    }  # fmt: skip


def _times(job: Job, menu: Menu, facts: LatencyFacts) -> dict[str, dict[str, float]]:
    """Layer -> format -> seconds of its cell."""
    times: dict[str, dict[str, float]] = {}
    for layer in job.network.layers:
        cells = {fmt: facts.cell(layer.workload, fmt) for fmt in menu.formats}
        times[layer.name] = {f: c.latency_s for f, c in cells.items() if c and not c.error}
    return times


def _reasons(job: Job, menu: Menu, facts: LatencyFacts) -> dict[str, dict[str, str]]:
    """Layer -> format -> why it may not be chosen."""
    unknown = unknown_cells(job.network, facts)
    return {name: menu.reasons[name] | unknown[name] for name in job.network.names}


def sensitivity_model(
    options: Options, progress: Progress | None = None, name: str | None = None
) -> dict[str, Any]:
    """loss[L][F] by an estimator, kept in the store; None where no kernel of the target runs it.

    name: of the estimator; else the options'. The target need not be this machine.
    """
    options = replace(options, sensitivity=name or options.sensitivity)
    job = open_job(options, progress or Silent(), here=False)
    with job.store:
        images = load_images(job)
        menu = make_menu(job.network, job.target, options.formats, options.pins, options.ties)
        found = sensitivities(job, images, menu, calibrate(job, images, menu))
    return {
        "version": 1, "model": options.model, "target": job.target.name,
        "layers": list(found.layers), "formats": list(found.formats),
        "loss": [[float(x) if np.isfinite(x) else None for x in row] for row in found.loss],
        "pair_loss": None if found.pair_loss is None else found.pair_loss.tolist(),
        "estimator": found.estimator, "samples": found.samples, "metric": found.metric,
        "not_monotone": list(monotone_violations(found).cells), "data": images.split,
    }  # fmt: skip


def frontier_model(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Least loss for every latency within the budgets, with sizes and simulated accuracies.

    Raises InfeasibleError when no plan is within them.
    """
    limit = budgets.parse_latency(options.latency)
    budgets.parse_size(options.max_size, 0)
    clock = Clock()
    with clock.time("trace"):
        job = open_job(options, progress or Silent())
    size = budgets.parse_size(options.max_size, fp32_bytes(job))
    with job.store:
        facts = gather(job, clock, load_images(job))
        with (
            tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
            WorkerProcess(job.device.prefix, threads=options.threads) as worker,
        ):
            bench = Bench(job, facts, clock, Path(folder), worker)
            bench.statistic = limit.statistic if limit else "median"
            ground = survey(bench, size)
        seconds = limit_seconds(limit, ground.first)
        with clock.time("search"):
            points = walk_frontier(job, within(ground.problem, seconds))
        rows = frontier_rows(points)
        with clock.time("verify"):
            metric, reference = _judge_some(job, facts, rows)
    return {
        "version": 1, "model": options.model, "target": job.target.name, "device": job.device.name,
        "threads": options.threads, "seed": options.seed, "frontier": rows,
        "budget": {"latency_s": seconds, "nbytes": size},
        "baselines": {n: {"latency_s": t.latency_s} for n, t in ground.first.items()},
        "accuracy": {"metric": metric, "float": reference, "n": len(facts.images.holdout)},
        "overhead_s": ground.latency.overhead_s, "estimator": facts.loss.estimator,
        "new_timings": ground.latency.new_timings, "failures": ground.latency.failures,
        "data": facts.images.split, "seconds": clock.seconds,
    }  # fmt: skip


def _judge_some(job: Job, facts: Facts, rows: list[dict[str, Any]]) -> tuple[str, float]:
    """Add accuracy and drop on the held-out images to at most JUDGED plans, evenly spread; returns
    the metric and float's score."""
    holdout = facts.images.holdout
    reference = float_logits(job, holdout, "held-out images")
    metric, score = "", 0.0
    for i in np.unique(np.linspace(0, len(rows) - 1, min(JUDGED, len(rows))).astype(int)):
        found = simulated(job, rows[i]["assignment"], facts.quantizers, holdout, reference)
        rows[i] |= {"accuracy": found.simulated, "drop": found.drop}
        metric, score = found.metric, found.float
    return metric, score


def search_model(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """One plan within the budgets, from stored facts alone: nothing is measured or written.

    Relative latencies are of the predicted price of the uniform plan. With --max-drop a plan is
    judged by simulation; without --latency it is then the fastest within the drop. An impossible
    budget is status 'infeasible', with the least that can be had. Raises InputError.
    """
    limit = budgets.parse_latency(options.latency)
    budgets.parse_size(options.max_size, 0)
    if limit is None and options.max_size is None and options.max_drop is None:
        raise InputError("no budget", None, "--latency, --max-size, --max-drop: one or more")
    job = open_job(options, progress or Silent())
    with job.store:
        images = load_images(job)
        menu = make_menu(job.network, job.target, options.formats, options.pins, options.ties)
        facts = fill_in(job, menu, profile(job, menu, measure=False))
        overhead, speed = job.store.fact("overhead", overhead_key(job)) or (0.0, 1.0)
        facts = replace(facts, overhead_s=overhead, speed=speed)
        loss = _known_losses(job, images, menu)
        seconds = _limit_of_prices(job, menu, facts, limit)
        size = budgets.parse_size(options.max_size, fp32_bytes(job))
        problem = within(_problem(job, menu, loss, facts, size), seconds)
        if limit is not None and limit.fastest and options.max_drop is None:
            problem = replace(problem, minimize="latency_s")
        solution = solve(problem, options.search, solver_limit_s(job), options.seed)
        told = {
            "version": 1, "status": solution.status, "model": options.model,
            "target": job.target.name, "threads": options.threads, "minimize": problem.minimize,
            "budget": dict(problem.budgets), "overhead_s": facts.overhead_s,
            "estimator": loss.estimator,
        }  # fmt: skip
        if solution.status == "infeasible":
            error = infeasible(problem, solution)
            return told | {"least": dict(solution.least), "error": error.to_json()}
        if not solution.choice:
            return told | {"bound": solution.bound, "seconds": solution.seconds}
        choice = solution.choice
        drop: dict[str, float] = {}
        if options.max_drop is not None:
            by_drop = limit is None or limit.fastest
            choice, drop = _judged(job, images, menu, problem, solution, by_drop)
            if drop["drop"] > options.max_drop:
                told["status"] = "accuracy"
    return told | drop | _explained(job, menu, facts, loss, problem, solution, choice)


def _known_losses(job: Job, images: Images, menu: Menu) -> Sensitivity:
    """Raises InputError when the store has no loss of any format but fp32."""
    loss = stored_sensitivities(job, images, menu)
    narrow = [f != "fp32" for f in menu.formats]
    if any(narrow) and not np.isfinite(loss.loss[:, narrow]).any():
        raise InputError(
            f"sensitivities ({loss.estimator}) for these images in the store", "none", None,
            "Run `hwmpq sensitivity` first, with the same data options and seed.",
        )  # fmt: skip
    return loss


def _limit_of_prices(
    job: Job, menu: Menu, facts: LatencyFacts, limit: budgets.Latency | None
) -> float | None:
    """The latency budget in seconds. Raises InputError when its reference has no known price."""
    if limit is None or limit.ratio is None:
        return None if limit is None else limit.seconds
    if limit.of not in menu.formats:
        raise InputError(f"budget relative to {limit.of!r}", None, menu.formats)
    whole = price(job, uniform(menu, job.network, limit.of)[0], facts)
    if not np.isfinite(whole):
        raise InputError(
            f"the price of {limit.of}, of which the budget is a part", "unknown", None,
            "Run `hwmpq profile` first, or give the budget in seconds.",
        )  # fmt: skip
    return limit.ratio * whole


def _problem(
    job: Job, menu: Menu, loss: Sensitivity, facts: LatencyFacts, size: int | None
) -> Problem:
    """Raises InputError when what every plan needs was never measured."""
    found = table(job, menu, facts)
    if not np.isfinite(found.fixed_s):
        raise InputError(
            "operators between the layers without a measured time", None, None,
            "Run `hwmpq profile` first.",
        )  # fmt: skip
    return make_problem(job, menu, loss, found, size)


def _judged(
    job: Job, images: Images, menu: Menu, problem: Problem, solution: Solution, by_drop: bool
) -> tuple[Assignment, dict[str, float]]:
    """The plan and its simulated drop on held-out images; by_drop: the fastest plan within
    --max-drop instead of the solution."""
    quantizers = calibrate(job, images, menu)
    reference = float_logits(job, images.holdout, "held-out images")

    def drop(assignment: Assignment) -> float:
        return simulated_drop(job, assignment, quantizers, images.holdout, reference)

    choice = solution.choice
    if by_drop:
        points = walk_frontier(job, problem)
        choice = points[fastest_within_drop(points, drop, job.options.max_drop or 0.0)].assignment
    return choice, {"drop": drop(choice)}


def _explained(
    job: Job, menu: Menu, facts: LatencyFacts, loss: Sensitivity, problem: Problem,
    solution: Solution, choice: Assignment,
) -> dict[str, Any]:  # fmt: skip
    """The plan with its sums; rows: what each layer could take instead, and what that changes."""
    values = evaluate(problem, index_of(problem, choice))
    changes = marginals(problem, choice)
    rows = []
    for row in layer_rows(job, menu, facts, problem, choice):
        reasons = dict(row.why_not)
        losses = loss.loss[job.network.names.index(row.name)]
        for fmt, value in zip(menu.formats, losses, strict=True):
            if not np.isfinite(value):
                reasons.setdefault(fmt, "no loss in the store: run `hwmpq sensitivity`")
        rows.append(asdict(row) | {"why_not": reasons, "marginal": changes[row.name]})
    same = choice == solution.choice
    return {
        "assignment": choice, "loss": float(values.of("loss")),
        "latency_s": float(values.of("latency_s")), "nbytes": float(values.of("nbytes")),
        "bops": float(values.of("bops")), "objective": float(values.of(problem.minimize)),
        "bound": solution.bound if same else None, "gap": solution.gap if same else None,
        "seconds": solution.seconds, "rows": rows,
    }  # fmt: skip


def marginals(problem: Problem, choice: Assignment) -> dict[str, dict[str, dict[str, float]]]:
    """Layer -> other legal format -> quantity -> change of the whole, were that layer (with those
    tied to it) in that format. Formats that a neighbour rules out are left out."""
    index = index_of(problem, choice)
    base = evaluate(problem, index)
    place = {name: i for i, name in enumerate(problem.layers)}
    legal = np.ones((len(index), len(problem.formats)), bool)
    if problem.legal is not None:
        legal = np.asarray(problem.legal, bool)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in problem.layers}
    for name, i in place.items():
        tied = [place[n] for group in problem.ties if name in group for n in group] or [i]
        for j, fmt in enumerate(problem.formats):
            if j == index[i] or not legal[tied, j].all():
                continue
            other = index.copy()
            other[tied] = j
            values = evaluate(problem, other)
            change = {q: float(values.of(q) - base.of(q)) for q in QUANTITIES}
            if np.isfinite(list(change.values())).all():
                found[name][fmt] = change
    return found


def compile_model(
    options: Options,
    assignment: Mapping[str, str],
    quantizers: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """An artifact in options.out from an assignment, replayed on its golden samples.

    quantizers: a file of an earlier artifact; without it they are calibrated on --calib-data.
    Raises InputError naming every layer that is missing or cannot run in its format.
    """
    out = Path(options.out)
    if out.exists() and not is_ours(out):
        raise InputError(
            "the output folder holds something else", out, "a new folder or an artifact",
            "Choose another --out.",
        )  # fmt: skip
    job = open_job(options, progress or Silent())
    with job.store:
        chosen = _checked(job, assignment)
        images = load_images(job) if options.data or options.calib_data or not quantizers else None
        if quantizers:
            numbers = _fitting(job, Quantizers.load(Path(quantizers)), chosen)
        else:
            assert images is not None
            menu = make_menu(job.network, job.target, tuple(dict.fromkeys(chosen.values())))
            numbers = calibrate(job, images, menu)
        with job.progress.stage("compile", None):
            made = make_artifact(job, chosen, numbers, out, _samples(job, images))
        replayed = artifact.replay(artifact.load(out))
    manifest = read_manifest(out, check=False)
    return {
        "version": 1, "artifact": str(out), "model": options.model, "target": job.target.name,
        "threads": options.threads, "assignment": made.assignment, "kernels": manifest["kernels"],
        "nbytes": {
            "weights": made.weight_bytes,
            "artifact": sum(path.stat().st_size for path in out.iterdir()),
            "peak_memory": manifest["nbytes"]["peak_memory"],
        },
        "parity": asdict(replayed),
    }  # fmt: skip


def _checked(job: Job, assignment: Mapping[str, str]) -> Assignment:
    """In the layers' order. Raises UnknownName, InputError listing all that is wrong."""
    names = job.network.names
    for name in assignment:
        if name not in names:
            raise UnknownName("layer in the assignment", name, names)
    missing = [name for name in names if name not in assignment]
    if missing:
        raise InputError(
            f"the assignment lacks {len(missing)} of {len(names)} layers", ", ".join(missing), None,
            "Name a format for every layer; `hwmpq inspect` lists them.",
        )  # fmt: skip
    wrong = []
    for layer in job.network.layers:
        fmt = format_named(assignment[layer.name])
        reason = why_not(layer.workload, fmt, job.target.features)
        if reason:
            wrong.append(f"{layer.name} in {fmt.name}: {reason}")
    if wrong:
        raise InputError(
            f"{len(wrong)} layers cannot run in their format on {job.target.name}",
            "; ".join(wrong), None, "`hwmpq inspect` lists the formats of every layer.",
        )  # fmt: skip
    return {name: assignment[name] for name in names}


def _fitting(job: Job, quantizers: Quantizers, assignment: Assignment) -> Quantizers:
    """Raises InputError for quantizers of another model or without the formats chosen."""
    for layer in job.network.layers:
        if not layer.workload.has_weight:
            continue
        shape = quantizers.weight(layer.name, assignment[layer.name]).codes.shape
        if shape != layer.workload.weight_shape:
            raise InputError(
                f"weights of layer {layer.name!r} in the quantizers", shape,
                str(layer.workload.weight_shape), "Use quantizers of this very model.",
            )  # fmt: skip
    return quantizers


def _samples(job: Job, images: Images | None) -> np.ndarray:
    """Inputs for golden samples: images where there are any, else seeded noise."""
    count = artifact.golden.SAMPLES
    if images is not None:
        return images.calib.batch(range(min(count, len(images.calib))))
    shape = (count, *input_shape(job.graph)[1:])
    return np.random.default_rng(job.options.seed).standard_normal(shape).astype(np.float32)
