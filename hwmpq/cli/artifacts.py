"""The commands for artifacts, and inspect, which takes a model as well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli import options as shared
from hwmpq.cli.command import command
from hwmpq.cli.durations import duration
from hwmpq.cli.output import Answer

_PANEL = "Artifacts"
group = typer.Typer(help="Sign artifacts, and make keys to do so.", no_args_is_help=True)
Artifact = Annotated[str, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")]
Signed = Annotated[
    Path | None,
    typer.Option(
        "--require-signature",
        metavar="KEY.pub",
        help="Refuse the artifact unless this key signed it; HWMPQ_REQUIRE_SIGNATURE=KEY.pub asks "
        "it of every command.",
    ),
]

Limit = Annotated[
    int | None, typer.Option("--eval", metavar="N", min=1, help="Samples of --data; all.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    inspected = tuple(name for name in shared.MODEL if name != "model")
    command(app, *inspected, "target", "threads", "formats", panel="Look first")(inspect)
    for body in (run, bench, verify):
        command(app, panel=_PANEL)(body)


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT", help="As for quantize, or a folder.")
    ],
    outputs: Annotated[
        str | None,
        typer.Option("--outputs", metavar="NODE,..", help="Cut the model at these nodes."),
    ] = None,
    require_signature: Signed = None,
    **given: Any,
) -> Answer:
    """Layers, sizes, MACs and the formats each may take, with the reasons against the others.

    Operators that cannot be taken are listed all at once. For an artifact: what it was built from.

    Example: hwmpq inspect zoo:resnet18 --target x86-avx2
    """
    from hwmpq.cli import artifact_jobs

    artifact_jobs.require(require_signature)
    if artifact_jobs.is_artifact(what):
        return artifact_jobs.inspect_artifact(what)
    from hwmpq.cli import tables
    from hwmpq.side_jobs import inspect_model

    found = inspect_model(shared.options(model=what, **given), shared.words(outputs))
    return Answer(found, lambda console: tables.inspected(console, found))


def run(
    artifact: Artifact,
    source: Annotated[
        Path,
        typer.Option(
            "--input", metavar="x.npy|x.npz", help="One array, or arrays by the inputs' names."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="y.npy|y.npz", help="Where the outputs go.")
    ],
    require_signature: Signed = None,
) -> Answer:
    """Run an artifact on arrays from a file; needs no torch.

    Inputs are those of the torch module: same order, shape and dtype, already normalized. Loading
    an artifact runs its author's native code: use only those you trust.

    Example: hwmpq run hwmpq-out/artifact --input x.npy --output y.npy
    """
    from hwmpq.cli import artifact_jobs

    artifact_jobs.require(require_signature)
    return artifact_jobs.run_artifact(artifact, source, output)


def bench(
    artifact: Artifact,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Samples to take.")] = 24,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Those it was built for by default.")
    ] = None,
    against: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--against",
            metavar="torch|onnxruntime|openvino MODEL",
            help="Also time this float model in another runtime, in the same rounds.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Of the MODEL of --against."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Also the accuracy on this, of both."),
    ] = None,
    limit: Limit = None,
    sustain: Annotated[
        str | None,
        typer.Option(
            "--sustain",
            metavar="TIME",
            help="Also keep it running for so long, such as 10m: time and temperature by minute.",
        ),
    ] = None,
    require_signature: Signed = None,
    seed: int = 0,
) -> Answer:
    """Time whole runs at every batch size: median with a 95 % interval; needs no torch.

    What --json prints with --against is also shown by `hwmpq report RESULT --peer FILE`.

    Example: hwmpq bench hwmpq-out/artifact --against torch zoo:digits_cnn --data digits
    """
    from hwmpq.cli import artifact_bench, artifact_jobs
    from hwmpq.cli.against import Against

    artifact_jobs.require(require_signature)
    other = Against(*against, weights) if against else None
    return artifact_bench.bench_artifact(
        artifact, rounds, threads, seed, duration(sustain, "--sustain"), other, data, limit
    )


def verify(
    artifact: Artifact,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Also the accuracy on this.")
    ] = None,
    limit: Limit = None,
    emulated: Annotated[
        bool,
        typer.Option("--emulated", help="One for a GPU, run on this CPU: needs g++, takes long."),
    ] = False,
    require_signature: Signed = None,
) -> Answer:
    """Replay the golden samples: does it still compute what was built? Needs no torch.

    Exit code 5 when it does not; then the first tensor that differs is named.

    Example: hwmpq verify hwmpq-out/artifact --data digits
    """
    from hwmpq.cli import artifact_jobs

    artifact_jobs.require(require_signature)
    return artifact_jobs.verify_artifact(artifact, data, limit, emulated)


def keygen(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="New file for the private key.")],
) -> Answer:
    """Make an ed25519 key pair: KEY, to keep secret, and KEY.pub, for those who run artifacts.

    Example: hwmpq artifact keygen release.key
    """
    from hwmpq.cli import artifact_jobs

    return artifact_jobs.make_keys(key)


def sign(
    artifact: Artifact,
    key: Annotated[
        Path, typer.Option("--key", metavar="KEY", help="File of the private key, PEM.")
    ],
) -> Answer:
    """Sign an artifact: manifest.sig over its manifest, which holds the hashes of all its files.

    Example: hwmpq artifact sign hwmpq-out/artifact --key release.key
    """
    from hwmpq.cli import artifact_jobs

    return artifact_jobs.sign_artifact(artifact, key)


for _body in (keygen, sign):
    command(group)(_body)
