"""The commands that work on a model: quantize, frontier, sensitivity, profile, search, compile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli import options as shared
from hwmpq.cli.command import command
from hwmpq.cli.output import Answer
from hwmpq.cli.progress import reporter
from hwmpq.errors import HwmpqError, InputError

_PANEL = "The main job and its parts"
#: Exit codes of what a search may end in; others are 0.
_SEARCHED = {"infeasible": 3, "timeout": 4, "accuracy": 5}


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    command(app, *shared.JOB, *shared.TRAIN, "executor", "out", "dry_run", panel=_PANEL)(quantize)
    curve = (n for n in shared.JOB if n != "max_drop")
    command(app, *curve, "executor", panel=_PANEL)(frontier)
    names = tuple(n for n in shared.JOB if n not in ("sensitivity", "allow_estimates"))
    estimated = (n for n in names if n not in shared.GOAL)
    command(app, *estimated, "executor", panel=_PANEL)(sensitivity)
    where = (*shared.MODEL, *shared.TARGET, "allow_estimates")
    profiled = (*where, "formats", "pins", "tune", "processes", "executor", "explain_cache")
    command(app, *profiled, *shared.WORK, panel=_PANEL)(profile)
    command(app, *shared.JOB, *shared.TRAIN, panel=_PANEL)(search)
    compiled = (*shared.MODEL, *shared.TARGET, *shared.DATA, "store", "out")
    command(app, *compiled, name="compile", panel=_PANEL)(compile_)
    trained = ("target", *(name for name in shared.DATA if name != "loss"), "store", "out")
    command(app, *shared.MODEL, *trained, panel=_PANEL)(finetune)


def quantize(**given: Any) -> Answer:
    """The main job: choose a format for every layer, compile, time it on the device, verify.

    Measures what is not in the store yet, solves with a proof, builds the artifact and accepts it
    on its own measured time. Starting it again resumes. DIR gets artifact/, result.json and
    report.html.

    Example: hwmpq quantize zoo:digits_cnn --data digits --latency 0.7x --max-drop 0.5
    """
    from hwmpq.cli import tables
    from hwmpq.pipeline import quantize_model

    result = quantize_model(shared.options(**given), reporter())
    return Answer(result.json, lambda console: tables.quantized(console, result), result.exit_code)


def frontier(**given: Any) -> Answer:
    """The whole curve: the least loss for every latency, with sizes.

    Nothing is compiled; the plans come from measured and predicted times.

    Example: hwmpq frontier zoo:digits_cnn --calib-data digits#train --json > curve.json
    """
    from hwmpq.cli import tables
    from hwmpq.side_jobs import frontier_model

    found = frontier_model(shared.options(**given), reporter())
    return Answer(found, lambda console: tables.frontier(console, found))


def sensitivity(
    estimator: Annotated[
        str | None,
        typer.Option(
            "--sensitivity", metavar="NAME", help="Estimator; the method's own by default."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Also write the JSON here.")
    ] = None,
    **given: Any,
) -> Answer:
    """How much the loss grows when one layer alone uses a format; kept in the store.

    Example: hwmpq sensitivity zoo:digits_cnn --calib-data digits#train --sensitivity output-error
    """
    from hwmpq.cli import tables
    from hwmpq.side_jobs import sensitivity_model

    job = shared.options(**given, sensitivity=estimator)
    found = sensitivity_model(job, reporter(), estimator)
    if save:
        _write(save, found)
    return Answer(found, lambda console: tables.grid(console, found, "loss"))


def profile(
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="FILE.tar",
            help="Time nothing: pack all cells for a machine out of reach. There, unpack it, run "
            "`python runner.py` and bring result.json to `hwmpq store import`.",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="TABLE.csv",
            help="Time nothing: take in times with the columns workload ('conv2d n=1 h=16 ... "
            "bias+relu'), format, latency_s and, if not 1, threads.",
        ),
    ] = None,
    **given: Any,
) -> Answer:
    """Measure every layer in every format on the device; each time is saved at once.

    With --tune also several schedules of each; plans and artifacts then use the fastest.

    Example: hwmpq profile zoo:digits_cnn --target native --formats fp32,w8a8 --max-time 10m
    """
    from hwmpq.cli import tables
    from hwmpq.side_jobs import bundle_model, import_times, profile_model

    if bundle and table:
        raise InputError("--bundle and --import", "both", "one of them")
    if bundle or table:
        job = shared.options(**given)
        done = bundle_model(job, bundle, reporter()) if bundle else {}
        if table:
            done = import_times(job, table, reporter())
        return Answer(done, lambda console: tables.pairs(console, done))
    found = profile_model(shared.options(**given), reporter())
    return Answer(found, lambda console: tables.grid(console, found, "latency_s"))


def search(
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also every layer's options, why not others, and what the budgets are worth.",
        ),
    ] = False,
    problem: Annotated[
        Path | None,
        typer.Option(
            "--problem", metavar="FILE", help="Also write what is solved, for `hwmpq solve`."
        ),
    ] = None,
    **given: Any,
) -> Answer:
    """Solve again from what the store knows: another budget costs no new measurement.

    With --method fliqs the plan is searched while the network trains; it and the trained numbers
    are left in --train-out for `hwmpq compile`. With fliqs-nas so is the network, which --train-out
    then holds as a module. torchrun runs both on several processes.

    Example: hwmpq search zoo:digits_cnn --calib-data digits#train --latency 0.6x --explain
    """
    from hwmpq import methods
    from hwmpq.cli import tables
    from hwmpq.side_jobs import search_by_training, search_model, search_network

    job = shared.options(**given)
    method = methods.named(job.method)
    if method.trained and explain:
        raise InputError("--explain", f"with --method {job.method}", "methods that estimate")
    if method.design:
        for name, value in (("--problem", problem), ("--explain-cache", job.explain_cache)):
            if value:
                raise InputError(name, f"with --method {job.method}", "other methods")
        network = search_network(job, reporter())
        return Answer(network, lambda console: tables.pairs(console, network))
    if method.trained:
        trained = search_by_training(job, reporter(), problem)
        return Answer(trained, lambda console: tables.searched(console, trained, explain))
    found = search_model(job, reporter(), explain, problem)
    error = {name: part for name, part in found.get("error", {}).items() if name != "code"}
    note = f"error: {HwmpqError(**error)}" if error else ""
    exit_code = _SEARCHED.get(str(found.get("status")), 0)
    return Answer(found, lambda console: tables.searched(console, found, explain), exit_code, note)


AssignmentFile = Annotated[
    Path,
    typer.Option(
        "--assignment",
        metavar="F",
        help="JSON {layer: format}, or a result.json or manifest.json that holds one.",
    ),
]


QuantizersFile = Annotated[
    Path | None,
    typer.Option(
        "--quantizers",
        metavar="Q",
        help="quantizers.safetensors of an earlier artifact, instead of --calib-data.",
    ),
]


def compile_(
    assignment: AssignmentFile,
    quantizers: QuantizersFile = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N,N,..",
            help="Batch sizes to compile for; the artifact takes the library of its inputs' size.",
        ),
    ] = None,
    system_lib: Annotated[
        bool,
        typer.Option(
            "--system-lib",
            help="Also write model.a, to link the network, at its smallest batch size, into a "
            "program: see examples/cpp.",
        ),
    ] = False,
    **given: Any,
) -> Answer:
    """Build an artifact from an assignment that you wrote or changed.

    For a model of several inputs, DATA is npz:FILE with an array by the name of each input.

    Example: hwmpq compile zoo:digits_cnn --assignment my.json --calib-data digits#train --out built
    """
    chosen = read_assignment(assignment)
    from hwmpq.cli import tables
    from hwmpq.side_jobs import compile_model

    path = None if quantizers is None else str(quantizers)
    sizes = shared.shape(batch, "--batch", "1,4,8") or ()
    found = compile_model(shared.options(**given), chosen, path, reporter(), sizes, system_lib)
    return Answer(found, lambda console: tables.pairs(console, found))  # fmt: skip


def finetune(
    assignment: AssignmentFile,
    epochs: Annotated[
        float, typer.Option("--epochs", metavar="N", help="Over the images; may be 0.1.")
    ] = 1.0,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Images of a step.")] = 64,
    rate: Annotated[
        float, typer.Option("--rate", metavar="R", help="Adam's, at first; it falls to 0.")
    ] = 2e-4,
    distill: Annotated[
        float,
        typer.Option(
            "--distill",
            metavar="D",
            help="0: learn the labels; 1: the float model's outputs, which need none.",
        ),
    ] = 0.5,
    augment: Annotated[
        bool, typer.Option("--augment", help="Shift images a little, and mirror half of them.")
    ] = False,
    **given: Any,
) -> Answer:
    """Train the weights and scales of an assignment for its rounding (LSQ), on all --calib-data.

    DIR gets quantizers.safetensors and assignment.json for `hwmpq compile`; starting the command
    again goes on from its last checkpoint. --data is for the reported accuracy only.

    Example: hwmpq finetune zoo:digits_cnn --assignment my.json --calib-data digits#train --data
    digits#test --epochs 5 --out tuned
    """
    chosen = read_assignment(assignment)
    from hwmpq.cli import tables
    from hwmpq.side_jobs import finetune_model
    from hwmpq.side_jobs.finetune import Training

    training = Training(epochs, batch, rate, distill, augment)
    found = finetune_model(shared.options(**given), chosen, training, reporter())
    return Answer(found, lambda console: tables.pairs(console, found))


def read_assignment(path: Path) -> dict[str, str]:
    """The layer -> format table of a file. Raises InputError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot read the assignment", f"{path} ({error})", "JSON {layer: format}"
        ) from None
    if isinstance(data, dict) and isinstance(data.get("assignment"), dict):
        data = data["assignment"]
    if (
        not isinstance(data, dict)
        or not data
        or not all(isinstance(value, str) for value in data.values())
    ):
        raise InputError(f"assignment {path}", type(data).__name__, "JSON {layer: format}")
    return data


def _write(path: Path, value: Any) -> None:
    from hwmpq.cli.output import plain

    try:
        path.write_text(json.dumps(plain(value), allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError("cannot write", f"{path} ({error.strerror})") from None
