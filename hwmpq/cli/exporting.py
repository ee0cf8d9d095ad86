"""The command that hands a model with its number formats over to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli import options as shared
from hwmpq.cli.command import command
from hwmpq.cli.jobs import AssignmentFile, QuantizersFile, read_assignment
from hwmpq.cli.output import Answer
from hwmpq.cli.progress import reporter


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    given = (*shared.MODEL, "calib_data", "calib", "ptq", "store")
    command(app, *given, panel="The main job and its parts")(export)


def export(
    assignment: AssignmentFile,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="onnx-qdq|openvino|pt2e|assignment",
            help="An ONNX file in Q/DQ form, OpenVINO's own form of it, a torch.export program in "
            "PT2E's operators, or the formats, scales and zero points as JSON.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help=".onnx, .xml, .pt2 or .json.")],
    quantizers: QuantizersFile = None,
    **given: Any,
) -> Answer:
    """Hand a model with its number formats over to another compiler or runtime.

    The file computes what the exact simulator computes, but for the last place where sums are
    rounded. Its batch size is the model's: --input-shape changes it.

    Example: hwmpq export zoo:digits_cnn --assignment my.json --calib-data digits#train --to
    onnx-qdq --out digits.onnx
    """
    chosen = read_assignment(assignment)
    from hwmpq.cli import tables
    from hwmpq.peers import need
    from hwmpq.side_jobs.export import export_model, form_named

    need(*form_named(to).packages)
    found = export_model(shared.options(**given), chosen, to, out, quantizers, reporter())
    return Answer(found, lambda console: tables.pairs(console, found))
