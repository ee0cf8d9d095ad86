"""cost-model train, eval, predict: times of cells that were not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli import options as shared
from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer

group = typer.Typer(help="Predict seconds of layers that were not measured.", no_args_is_help=True)
Machine = Annotated[
    str,
    typer.Option("--fingerprint", metavar="NAME", help="The machine, where the store has several."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--folder", metavar="DIR", help="Of the cost model; cost_models/<target>."),
]

Ablate = Annotated[bool, typer.Option("--ablate", help="Also judge without parts of the features.")]


def train(
    folder: Folder = None, fingerprint: Machine = "", ablate: Ablate = False, **given: Any
) -> Answer:
    """Train on the measured rows of the store, judge on held-out shapes, and write the folder.

    Example: hwmpq cost-model train --target x86-avx2
    """
    from hwmpq import targets
    from hwmpq.measure.store import Store
    from hwmpq.predict.train import train as fit

    found = targets.load(given["target"])
    with Store.open(given["store"]) as opened:
        predictor, report = fit(opened, found, folder, given["seed"], fingerprint, ablate=ablate)
    place = folder or targets.data_folder("cost_models") / found.name
    told = {
        "version": VERSION, "target": found.name, "folder": str(place),
        "rows": len(predictor.rows), "errors": predictor.errors,
    }  # fmt: skip
    return Answer(told, f"{report}written: {place}")


def evaluate(fingerprint: Machine = "", ablate: Ablate = False, **given: Any) -> Answer:
    """How well would it predict shapes, networks and formats it has not seen? Writes nothing.

    Example: hwmpq cost-model eval --target x86-avx2
    """
    from hwmpq import targets
    from hwmpq.measure.store import Store
    from hwmpq.predict import as_text
    from hwmpq.predict import evaluate as judge
    from hwmpq.predict.train import select

    found = targets.load(given["target"])
    with Store.open(given["store"]) as opened:
        chosen = select(opened.rows(found.name, "measured"), found, fingerprint)
    result = judge(chosen.rows, found, given["seed"], ablate=ablate)
    left_out = dict(chosen.left_out)
    told = {"version": VERSION, "target": found.name, **result, "left_out": left_out}
    return Answer(told, as_text(result))


def predict(
    folder: Folder = None,
    **given: Any,
) -> Answer:
    """Predicted seconds, with an interval, of every layer of a model in every format.

    Example: hwmpq cost-model predict zoo:resnet18 --target x86-avx2 --formats fp32,w8a8
    """
    from hwmpq import targets
    from hwmpq.formats import format_named, known_formats
    from hwmpq.frontend.model import load_model
    from hwmpq.graph import network_of
    from hwmpq.kernels import best
    from hwmpq.predict import Predictor

    job = shared.options(**given)
    target = targets.load(job.target)
    place = folder or targets.data_folder("cost_models") / target.name
    predictor = Predictor.load(place, target)
    weights = None if job.weights is None else Path(job.weights)
    network = network_of(load_model(job.model, weights, job.input_shape).graph())
    formats = [format_named(name) for name in job.formats or known_formats()]
    cells: dict[str, dict[str, Any]] = {layer.name: {} for layer in network.layers}
    reasons: dict[str, dict[str, str]] = {layer.name: {} for layer in network.layers}
    for layer in network.layers:
        for fmt in formats:
            kernel = best(layer.workload, fmt, target.features)
            reason = "no kernel" if kernel is None else None
            reason = reason or predictor.why_not(layer.workload, fmt, job.threads)
            if reason or kernel is None:
                reasons[layer.name][fmt.name] = str(reason)
                continue
            centre, low, high = predictor.predict(layer.workload, fmt, kernel, job.threads)
            cells[layer.name][fmt.name] = {
                "latency_s": centre, "interval": [low, high], "kernel": kernel.name
            }  # fmt: skip
    told = {
        "version": VERSION, "target": target.name, "threads": job.threads,
        "layers": cells, "why_not": reasons,
    }  # fmt: skip

    def show(console: Any) -> None:
        from hwmpq.cli.tables import table
        from hwmpq.report import words

        names = [f.name for f in formats if any(f.name in row for row in cells.values())]
        rows = [
            [layer, *(words.seconds(words.part(row, name, "latency_s")) for name in names)]
            for layer, row in cells.items()
        ]
        console.print(table(["layer", *names], rows))

    return Answer(told, show)


command(group, "target", "store")(train)
command(group, "target", "store", name="eval")(evaluate)
command(group, *shared.MODEL, "target", "threads", "formats")(predict)
