"""A network and its formats by a method that finds both; nothing is compiled or measured.

Its files in the training's folder are what other commands take: module, weights, plan, numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwmpq import methods
from hwmpq.methods.fliqs.ranks import leads
from hwmpq.methods.fliqs_nas import Designed
from hwmpq.methods.fliqs_nas.found import numbers, write
from hwmpq.side_jobs.finetune import accuracies
from hwmpq.stages.job import Options, Progress, Silent, load_images, train_folder


def search_network(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Each rank of a torchrun calls this alike. Raises InputError, InfeasibleError."""
    design = methods.named(options.method).design
    assert design is not None
    model: Designed = design(options, progress or Silent(), load_images, None)[0]
    found, job, plan = model.found, model.job, model.found.solution.choice
    own = numbers(found.shared, found.graph, plan)
    files = write(Path(train_folder(options)), found, own) if leads() else []
    return {
        "version": 1, "status": found.solution.status, "model": options.model,
        "target": job.target.name, "threads": options.threads, "method": options.method,
        "budget": dict(found.problem.budgets), "assignment": plan,
        "latency_s": found.solution.latency_s, "nbytes": found.solution.nbytes,
        "bops": found.solution.bops,
        "accuracy": accuracies(job, plan, {"found": own}, model.images.test, found.graph),
        "files": files, **found.told,
    }  # fmt: skip
