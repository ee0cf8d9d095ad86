"""cost-model sample, train, eval, predict: times of cells that were not measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwmpq.cli import options as shared
from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.cli.progress import reporter
from hwmpq.errors import InputError

if TYPE_CHECKING:
    from hwmpq.predict import Predictor, Row
    from hwmpq.targets import Target

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
Prior = Annotated[
    str,
    typer.Option(
        "--prior",
        metavar="TARGET|DIR",
        help="Another target's cost model to start from, as far as the rows say that it helps.",
    ),
]


def sample(
    rows: Annotated[
        int,
        typer.Option(
            "--rows", metavar="N", help="Timed cells in all; 15 % of them are repetitions."
        ),
    ] = 2000,
    **given: Any,
) -> Answer:
    """Measure layers like those of the zoo in every format, to train on; each is saved at once.

    Starting again with the same options goes on. Leave the machine alone meanwhile: 2000 cells
    take up to an hour.

    Example: hwmpq cost-model sample --target x86-avx2 --rows 2000 --max-time 1h
    """
    from hwmpq.side_jobs import sample_cells

    done = sample_cells(shared.options(model="", **given), rows, reporter())
    text = (
        f"{done['rows']} rows of {done['shapes']} shapes, {done['again']} of them repeated, "
        f"{done['failed']} failed; {done['new_timings']} timed now"
    )
    return Answer(done, text)


def train(
    folder: Folder = None, fingerprint: Machine = "", ablate: Ablate = False, prior: Prior = "",
    **given: Any,
) -> Answer:  # fmt: skip
    """Train on the measured rows of the store, judge on held-out shapes, and write the folder.

    Example: hwmpq cost-model train --target x86-avx2
    """
    from hwmpq import targets
    from hwmpq.measure.store import Store
    from hwmpq.predict.train import train as fit

    found = targets.load(given["target"])
    start = load_prior(prior) if prior else None
    with Store.open(given["store"]) as opened:
        predictor, report = fit(
            opened, found, folder, given["seed"], fingerprint, ablate=ablate, prior=start
        )
    place = folder or targets.data_folder("cost_models") / found.name
    told = {
        "version": VERSION, "target": found.name, "folder": str(place),
        "rows": len(predictor.rows), "errors": predictor.errors,
    }  # fmt: skip
    return Answer(told, f"{report}written: {place}")


def evaluate(
    fingerprint: Machine = "",
    ablate: Ablate = False,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="S1,..",
            help="S1 new shapes, S2 new families of networks, S3 new formats, S4 new time, S5 new "
            "device (needs --prior); all that the rows allow.",
        ),
    ] = "",
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="Models to train, with other folds each.")
    ] = 5,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="F.html", help="Predicted against measured times of S1."),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="F.jsonl", help="rows.jsonl of a cost model, instead of the store."
        ),
    ] = None,
    networks: Annotated[
        str,
        typer.Option(
            "--networks",
            metavar="MODEL,..",
            help="Also judge blocks (L2) and whole networks (L3): sums of the cells that the store "
            "has of these models, such as zoo:resnet18, foretold without their shapes and family.",
        ),
    ] = "",
    prior: Prior = "",
    **given: Any,
) -> Answer:
    """How well would it predict shapes, networks and formats it has not seen? Writes no model.

    Beside each figure stands the noise ceiling: how well measuring agrees with itself.

    Example: hwmpq cost-model eval --target x86-avx2 --split S1,S2 --plot parity.html
    """
    from hwmpq import targets
    from hwmpq.predict import as_text
    from hwmpq.predict import evaluate as judge

    found = targets.load(given["target"])
    asked = _splits(split, prior, seeds)
    chosen, left_out = _rows(rows, found, given["store"], fingerprint)
    result = judge(
        chosen, found, given["seed"], splits=[s for s in asked if s != "S5"], ablate=ablate,
        seeds=seeds,
    )  # fmt: skip
    text = as_text(result)
    points = result.pop("points", [])
    if networks:
        from hwmpq.predict import levels
        from hwmpq.side_jobs import measured_networks

        options = shared.options(model="", **given)
        nets = measured_networks(shared.words(networks), options, reporter())
        result["levels"] = levels.levels(nets, chosen, found, given["seed"], seeds=seeds)
        text += levels.as_text(result["levels"])
    if prior:
        from hwmpq.predict.transfer import shots

        result["S5"] = shots(load_prior(prior).point, chosen, found, seed=given["seed"])
        text += "".join(
            f"S5 {k:>4} rows, {name}{' (' + v['way'] + ')' if 'way' in v else ''}: "
            f"within 10 %: {v['within_10_pct']:.1f}, rmspe {v['rmspe_pct']:.1f} %\n"
            for k, models in result["S5"].items()
            for name, v in models.items()
        )
    if plot:
        from hwmpq.report.parity import write_parity

        write_parity(points, f"{found.name}: shapes that were held out", plot)
        text += f"written: {plot}\n"
    told = {"version": VERSION, "target": found.name, **result, "left_out": left_out}
    return Answer(told, text)


def load_prior(name: str) -> Predictor:
    """The cost model of a target or in a folder. Raises InputError."""
    from hwmpq import targets
    from hwmpq.predict import Predictor

    place = Path(name) if Path(name).is_dir() else targets.data_folder("cost_models") / name
    return Predictor.load(place)


def _splits(text: str, prior: str, seeds: int) -> list[Any]:
    """The splits asked for. Raises InputError."""
    from hwmpq.predict.evaluate import SPLITS

    asked = shared.words(text) or list(SPLITS)
    unknown = [name for name in asked if name not in (*SPLITS, "S5")]
    if unknown:
        raise InputError("--split", ",".join(unknown), (*SPLITS, "S5"))
    if "S5" in asked and not prior:
        raise InputError("--split S5 without --prior", None, "a target that has a cost model")
    if seeds < 1:
        raise InputError("--seeds", seeds, "1 or more")
    return asked


def _rows(
    file: Path | None, target: Target, store: str | None, fingerprint: str
) -> tuple[list[Row], dict[str, int]]:
    """The rows to judge by, and why others of the store were left out."""
    from hwmpq.measure.store import Store
    from hwmpq.predict.files import read_rows
    from hwmpq.predict.train import families_in, select

    if file:
        return list(read_rows(file)), {}
    with Store.open(store) as opened:
        chosen = select(
            opened.rows(target.name, "measured"), target, fingerprint, families_in(opened)
        )
    return list(chosen.rows), dict(chosen.left_out)


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


command(group, *shared.TARGET, "formats", "store", "max_time")(sample)
command(group, "target", "store")(train)
command(group, "target", "store", name="eval")(evaluate)
command(group, *shared.MODEL, "target", "threads", "formats")(predict)
