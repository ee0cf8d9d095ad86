"""`fliqs`: formats are drawn while the network trains, and a policy learns which ones pay.

FLIQS (arXiv 2308.03290): one run searches and trains, so that the plan found needs no retraining.
The cost in the reward is the problem's: predicted seconds of layers and transitions on the target,
bit operations, bytes, or several of them; nothing is compiled or timed while it trains.

The paper's result is the most probable plan. Ours is the most probable one *within the budgets*,
an exact integer program over −log p, which is the same plan wherever that one is within them. As
the weights serve all plans, prices that are corrected later only ask for another plan, not for
another run. Groups, pins and ties hold as for every method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwmpq.methods.fliqs.loop import shown
from hwmpq.methods.fliqs.policy import shares
from hwmpq.methods.fliqs.searched import Searched
from hwmpq.methods.fliqs.settings import Settings, parsed
from hwmpq.methods.fliqs.train import search
from hwmpq.methods.study import Chosen, Method, Study
from hwmpq.quantizers import Quantizers
from hwmpq.search.evaluate import index_of
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import Images, Job, train_folder, training_images
from hwmpq.stages.menu import Menu
from hwmpq.types import Problem

__all__ = ["METHOD", "Searched", "Settings", "choose", "parsed", "run", "search"]


def choose(study: Study, problem: Problem) -> Chosen:
    """The most probable plan within the budgets, with the weights it was trained with."""
    job, facts = study.job, study.facts
    found: Searched = study.once("fliqs", lambda: run(job, facts.images, facts.menu, problem))
    solution = found.within(problem, study.solve)
    numbers = found.shared.quantizers(solution.choice)
    loss = study.judge_with(solution.choice, numbers)
    return Chosen(solution, numbers, told(found, problem) | {"measured_loss": loss})


def run(job: Job, images: Images, menu: Menu, problem: Problem) -> Searched:
    """The search of a job's options, or what is left of it in their folder."""
    o = job.options
    settings = parsed(o.train, o.seed)
    data = training_images(job, images)
    numbers = _calibrated(job, images, menu)
    asked = [o.latency, o.max_size, o.max_bops, o.max_drop, job.target.name, o.threads, menu.ties]
    with shown(job.progress, "one-shot search", settings.training(len(data)).steps) as note:
        return search(
            job.graph, problem, numbers, data, settings, Path(train_folder(o)), asked, note
        )


def told(found: Searched, problem: Problem) -> dict[str, Any]:
    """What there is to tell of a run: its length, the policy's last state, and what the paper's
    plan costs, as a share of each target."""
    policy = found.policy
    best = index_of(problem, found.best)
    return {
        "steps": len(found.rows), "warmup": policy.warmup, "seconds": found.seconds,
        "entropy": policy.entropy(), "baseline": policy.baseline,
        "most_probable": found.best,
        "most_probable_cost": {n: float(share) for n, share in shares(problem, best).items()},
    }  # fmt: skip


def _calibrated(job: Job, images: Images, menu: Menu) -> Quantizers:
    """What training begins with: least squared errors, no corrections of single formats."""
    return calibrate(job, images, menu, steps=[s for s in job.options.ptq if s == "equalize"])


METHOD = Method(choose, trained=lambda options: parsed(options.train, options.seed))
