"""One plan by a method that trains, towards budgets of predicted seconds, bytes or bit operations.

Nothing is measured. Plan, numbers and the run itself are left in the training's folder; `hwmpq
compile --assignment --quantizers` builds them. Each rank of a torchrun calls this alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import methods
from hwmpq.artifact.folder import write_json
from hwmpq.methods.fliqs.ranks import leads
from hwmpq.methods.fliqs.targets import latency_target
from hwmpq.methods.study import Study
from hwmpq.quantizers import Quantizers
from hwmpq.search.problem_file import write_problem
from hwmpq.side_jobs.finetune import accuracies
from hwmpq.side_jobs.search import known_latencies, limit_of_prices, priced_problem
from hwmpq.stages.choose import given_limits, make_problem, within
from hwmpq.stages.facts import Facts
from hwmpq.stages.job import Job, Options, Progress, Silent, load_images, open_job, train_folder
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu, make_menu
from hwmpq.stages.pricing import LatencyTable
from hwmpq.stages.reuse import explained
from hwmpq.types import Problem, Sensitivity


def search_by_training(
    options: Options, progress: Progress | None = None, save: Path | None = None
) -> dict[str, Any]:
    """save: where the problem goes. Raises InputError, InfeasibleError."""
    options = methods.settle(options)
    limit = latency_target(options)
    job = open_job(options, progress or Silent())
    with job.store:
        images = load_images(job)
        menu = make_menu(job.network, job.target, options.formats, options.pins, options.ties)
        none = _no_losses(job, menu)
        cache = explained(job, menu, times=limit is not None)
        if limit is None:
            latency, problem = LatencyFacts({}, {}), _untimed(job, menu, none)
        else:
            latency = known_latencies(job, menu)
            seconds = limit_of_prices(job, menu, latency, limit)
            problem = within(priced_problem(job, menu, none, latency), seconds)
        if save and leads():
            write_problem(problem, save)
        study = Study(job, Facts(images, menu, Quantizers(), none, latency))
        chosen = methods.choose(study, problem)
        solution, numbers, folder = chosen.solution, chosen.quantizers, train_folder(options)
        files = [str(Path(folder) / n) for n in ("assignment.json", "quantizers.safetensors")]
        if leads():
            write_json(Path(files[0]), solution.choice)
            numbers.save(Path(files[1]))
        return {
            "version": 1, "status": solution.status, "model": options.model,
            "target": job.target.name, "threads": options.threads, "method": options.method,
            "budget": dict(problem.budgets), "assignment": solution.choice,
            "latency_s": solution.latency_s, "nbytes": solution.nbytes, "bops": solution.bops,
            "accuracy": accuracies(job, solution.choice, {"found": numbers}, images.test),
            "files": files, **chosen.told, **cache,
        }  # fmt: skip


def _no_losses(job: Job, menu: Menu) -> Sensitivity:
    """Training finds them."""
    nothing = np.zeros((len(job.network.layers), len(menu.formats)))
    return Sensitivity(job.network.names, menu.formats, nothing, "none", 0)


def _untimed(job: Job, menu: Menu, loss: Sensitivity) -> Problem:
    """Without latencies: no budget asks for one."""
    table = LatencyTable(np.zeros_like(loss.loss), (), 0.0)
    return replace(make_problem(job, menu, loss, table, given_limits(job)), latency_s=None)
