"""Quantization-aware training of an assignment; the result is what `compile --quantizers` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmpq.artifact.folder import write_json
from hwmpq.errors import InputError
from hwmpq.graph import Graph
from hwmpq.quantizers import Quantizers
from hwmpq.side_jobs.compile import checked
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.menu import make_menu
from hwmpq.stages.verify import float_logits

if TYPE_CHECKING:
    from hwmpq.quantize.finetune import Settings

#: What the folder holds; a folder with anything else is not written to.
FILES = ("checkpoint.safetensors", "quantizers.safetensors", "assignment.json", "finetune.json")


@dataclass(frozen=True)
class Training:
    """epochs: over the training images, may be a fraction; the rest: see `quantize.finetune`."""

    epochs: float = 1.0
    batch: int = 64
    rate: float = 2e-4
    distill: float = 0.5
    augment: bool = False


def finetune_model(
    options: Options,
    assignment: Mapping[str, str],
    training: Training = Training(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on all of --calib-data into options.out, or go on there; exact accuracy on --data.

    Raises InputError for a folder that holds something else, and as `finetune` does.
    """
    from hwmpq.quantize.finetune import finetune

    out = Path(options.out)
    strange = [p.name for p in out.iterdir() if p.name not in FILES] if out.is_dir() else []
    if strange or (out.exists() and not out.is_dir()):
        raise InputError(
            "the output folder holds something else", out, "a new folder", "Choose another --out."
        )
    job = open_job(options, progress or Silent(), here=False)
    with job.store:
        chosen = checked(job, assignment)
        images = load_images(job)
        menu = make_menu(job.network, job.target, tuple(dict.fromkeys(chosen.values())))
        start = calibrate(job, images, menu)
        settings = _settings(training, len(images.pool), options.seed)
        out.mkdir(parents=True, exist_ok=True)
        with job.progress.stage("training", settings.steps) as advance:
            done = 0

            def note(step: int, _loss: float) -> None:
                nonlocal done
                advance(step - done)
                done = step

            trained = finetune(
                job.graph, chosen, start, images.pool, settings, out / FILES[0], note
            )
        trained.quantizers.save(out / "quantizers.safetensors")
        write_json(out / "assignment.json", chosen)
        found = {
            "version": 1, "quantizers": str(out / "quantizers.safetensors"),
            "assignment": str(out / "assignment.json"), "settings": asdict(settings),
            "images": len(images.pool), "loss": trained.loss, "seconds": trained.seconds,
            "accuracy": accuracies(job, chosen, {"before": start, "after": trained.quantizers},
                                    images.test),
        }  # fmt: skip
        write_json(out / "finetune.json", found)
    return found


def _settings(training: Training, images: int, seed: int) -> Settings:
    from hwmpq.quantize.finetune import Settings

    if not training.epochs > 0:
        raise InputError("--epochs", training.epochs, "above 0")
    steps = max(1, round(training.epochs * images / min(training.batch, images)))
    return Settings(
        steps, training.batch, training.rate, training.distill, training.augment, seed=seed
    )


def accuracies(
    job: Job, assignment: Mapping[str, str], numbers: Mapping[str, Quantizers], test: Any,
    graph: Graph | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Float's and each quantizers' score in the exact simulator, and the drops.

    graph: of another network for the same task, whose drops are from the job's float model.
    """
    import torch

    from hwmpq.quantize.judge import judge, predict
    from hwmpq.quantize.simulate import Simulator

    reference = float_logits(job, test, "test images")
    labels = None if test.labels is None else torch.from_numpy(np.asarray(test.labels))
    found: dict[str, Any] = {}
    for name, quantizers in numbers.items():
        outputs = predict(Simulator(graph or job.graph, assignment, quantizers), test)
        judged = judge(reference, outputs, labels, job.options.metric)
        found |= {"metric": judged.metric, "float": judged.float, "n": judged.n}
        found[name] = {
            "simulated": judged.simulated, "drop": judged.drop,
            "drop_interval": list(judged.drop_interval),
        }  # fmt: skip
    return found
