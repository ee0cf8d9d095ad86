"""The options that several commands share, each once, and how they become pipeline.Options."""

from __future__ import annotations

import re
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwmpq.cli.durations import duration
from hwmpq.errors import InputError

if TYPE_CHECKING:
    from hwmpq.pipeline import Options

_MODEL, _TARGET, _DATA = "Model and weights", "Where it runs", "Data"
_GOAL, _SEARCH, _WORK = "What is wanted", "How it is searched", "Work and files"
_TRAIN = "Methods that train"
REQUIRED = Parameter.empty


def _option(kind: Any, flag: str, panel: str, text: str, metavar: str | None = None) -> Any:
    return Annotated[kind, typer.Option(flag, help=text, rich_help_panel=panel, metavar=metavar)]


#: name in pipeline.Options -> annotation, default
TABLE: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str,
            typer.Argument(
                help="zoo:NAME, package.module:callable (runs its code), file.pt2 or file.onnx",
                metavar="MODEL",
            ),
        ],
        REQUIRED,
    ),
    "weights": (
        _option(str | None, "--weights", _MODEL, "safetensors, or a plain state dict.", "FILE"),
        None,
    ),
    "input_shape": (
        _option(str | None, "--input-shape", _MODEL, "Where it cannot be known.", "1,3,224,224"),
        None,
    ),
    "target": (_option(str, "--target", _TARGET, "See `hwmpq targets`.", "NAME"), "native"),
    "device": (_option(str, "--device", _TARGET, "See `hwmpq devices`.", "NAME"), "local"),
    "allow_estimates": (
        _option(
            bool, "--allow-estimates", _TARGET,
            "Where there is no board of a foreign target, go by estimated cycles (QEMU and "
            "llvm-mca): good for ranking, no promise.",
        ),
        False,
    ),
    "threads": (_option(int, "--threads", _TARGET, "Threads of the compiled model.", "N"), 1),
    "data": (
        _option(
            str | None, "--data", _DATA,
            "For the reported accuracy only: digits, npz:FILE, npz:FILE#PART, imagefolder:DIR, "
            "package.module:callable.", "DATA",
        ),
        None,
    ),
    "calib_data": (
        _option(
            str | None, "--calib-data", _DATA,
            "For calibration, sensitivities and every choice. With one of the two given, it is "
            "split into disjoint parts.", "DATA",
        ),
        None,
    ),
    "calib": (_option(int, "--calib", _DATA, "Calibration samples.", "N"), 256),
    "ptq": (
        _option(
            str | None, "--ptq", _DATA,
            "Post-training quantization: bias, equalize, affine (means and deviations of "
            "channels), adaround, adaround-blocks (learned rounding of the plan: minutes), or "
            "none. bias.", "A,B,..",
        ),
        None,
    ),
    "eval": (_option(int | None, "--eval", _DATA, "Samples of --data to use; all.", "N"), None),
    "metric": (
        _option(
            str | None, "--metric", _DATA,
            "top1 (agreement without labels), agreement, sqnr, package.module:callable.", "NAME",
        ),
        None,
    ),
    "loss": (
        _option(
            str | None, "--loss", _DATA,
            "What sensitivities measure: cross-entropy (kl without labels), kl, "
            "package.module:callable.", "NAME",
        ),
        None,
    ),
    "latency": (
        _option(
            str | None, "--latency", _GOAL,
            "2.5ms or 800us (medians), p95:2.5ms, 0.5x (of the fp32 artifact), 0.9x:w8a8, fastest.",
            "BUDGET",
        ),
        None,
    ),
    "max_size": (
        _option(str | None, "--max-size", _GOAL, "4MB, or 0.25x of the fp32 parameters.", "SIZE"),
        None,
    ),
    "max_bops": (
        _option(
            str | None, "--max-bops", _GOAL,
            "Bit operations, Σ MACs × weight bits × activation bits: 2.5G, or 0.2x of fp32.",
            "BOPS",
        ),
        None,
    ),
    "max_drop": (
        _option(
            float | None, "--max-drop", _GOAL, "Largest loss of accuracy, in points.", "POINTS"
        ),
        None,
    ),
    "formats": (
        _option(
            str | None, "--formats", _SEARCH,
            "Formats to choose from, such as w8a8,w4a8,bf16; all that a kernel runs.", "A,B,..",
        ),
        None,
    ),
    "pins": (
        _option(
            list[str] | None, "--pin", _SEARCH,
            "Layers that may only take these formats; may be repeated.", "'GLOB=FORMAT|FORMAT,..'",
        ),
        None,
    ),
    "ties": (
        _option(
            list[str] | None, "--tie", _SEARCH, "Layers that must agree; may be repeated.", "GLOB"
        ),
        None,
    ),
    "method": (
        _option(
            str, "--method", _SEARCH,
            "auto, hawq, lcpaq, clado, fliqs (trains: hours on CPUs; see --train), fliqs-nas (also "
            "finds another network in place of MODEL).", "NAME",
        ),
        "auto",
    ),
    "search": (
        _option(
            str | None, "--search", _SEARCH,
            "ilp, iqp, greedy, random, exhaustive; the method's own.", "NAME",
        ),
        None,
    ),
    "sensitivity": (
        _option(
            str | None, "--sensitivity", _SEARCH,
            "Estimator of the loss per layer and format; the method's own.", "NAME",
        ),
        None,
    ),
    "train_data": (
        _option(
            str | None, "--train-data", _TRAIN,
            "Images that --method fliqs or fliqs-nas trains on; those of --calib-data without the "
            "held-out ones.", "DATA",
        ),
        None,
    ),
    "train": (
        _option(
            str | None, "--train", _TRAIN,
            "Settings of --method fliqs and fliqs-nas: epochs, steps, batch, rate, clip, distill, "
            "augment, warmup, delay, policy_rate, quality, cost, entropy, average, decide, "
            "separate, checkpoint.", "KEY=VALUE,..",
        ),
        None,
    ),
    "train_out": (
        _option(
            str | None, "--train-out", _TRAIN,
            "Folder of its checkpoints, scalars and plots, where it also goes on; OUT-train.",
            "DIR",
        ),
        None,
    ),
    "store": (
        _option(
            str | None, "--store", _WORK, "File or URL; HWMPQ_STORE, else the user's own.", "URL"
        ),
        None,
    ),
    "out": (_option(str, "--out", _WORK, "Folder for the results.", "DIR"), "hwmpq-out"),
    "fresh": (
        _option(bool, "--fresh", _WORK, "Read nothing from the store; nothing is deleted."), False
    ),
    "max_time": (
        _option(str | None, "--max-time", _WORK, "Stop measuring after 90s, 10m or 2h.", "TIME"),
        None,
    ),
    "tune": (
        _option(
            int, "--tune", _WORK,
            "Time the N best schedules of every kernel by estimate; the fastest is used from then "
            "on. 0: none.", "N",
        ),
        0,
    ),
    "processes": (
        _option(
            int, "--processes", _WORK,
            "Time every cell in N processes, whose luck with memory differs; they share the "
            "rounds.", "N",
        ),
        3,
    ),
    "executor": (
        _option(
            str, "--executor", _WORK,
            "Who runs the forward passes of sensitivities and the trials of a proxy, and compiles "
            "kernels: serial (this process), processes (one per core) or processes:N, ray (the "
            "cluster that Ray finds, else one here) or ray://HOST:PORT. The results are the same.",
            "WHO",
        ),
        "serial",
    ),
    "dry_run": (
        _option(
            bool, "--dry-run", _WORK, "Only say what would be done, and in about how many minutes."
        ),
        False,
    ),
    "explain_cache": (
        _option(
            bool, "--explain-cache", _WORK,
            "Also say what the store had, stage by stage, and why the rest did not fit: another "
            "machine, other threads, other images, ...",
        ),
        False,
    ),
}  # fmt: skip

MODEL = ("model", "weights", "input_shape")
TARGET = ("target", "device", "threads")
DATA = ("data", "calib_data", "calib", "ptq", "eval", "metric", "loss")
GOAL = ("latency", "max_size", "max_bops", "max_drop")
CHOICE = ("formats", "pins", "ties", "method", "search", "sensitivity")
WORK = ("store", "fresh", "max_time")
TRAIN = ("train_data", "train", "train_out")
#: The whole job: everything but --out, --dry-run and what only methods that train take.
JOB = (*MODEL, *TARGET, "allow_estimates", *DATA, *GOAL, *CHOICE, *WORK, "explain_cache")


def options(**given: Any) -> Options:
    """pipeline.Options from what the command line gave. Raises InputError."""
    from hwmpq.pipeline import Options

    if "input_shape" in given:
        given["input_shape"] = shape(given["input_shape"])
    if "formats" in given:
        given["formats"] = tuple(words(given["formats"]))
    if given.get("ptq") is not None:
        given["ptq"] = tuple(step for step in words(given["ptq"]) if step != "none")
    if "train" in given:
        given["train"] = tuple(words(given["train"]))
    if "pins" in given:
        given["pins"] = tuple(item for text in given["pins"] or () for item in words(text))
    if "ties" in given:
        given["ties"] = tuple(given["ties"] or ())
    if "max_time" in given:
        given["max_time"] = duration(given["max_time"], "--max-time")
    return Options(**{name: value for name, value in given.items() if value is not None})


def words(text: str | None) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def shape(
    text: str | None, option: str = "--input-shape", example: str = "1,3,224,224"
) -> tuple[int, ...] | None:
    """'1,3,224,224' (or with x) -> sizes. Raises InputError."""
    if text is None:
        return None
    parts = re.split(r"[,x]", text.strip())
    if not all(re.fullmatch(r"[1-9]\d*", part.strip()) for part in parts):
        raise InputError(option, repr(text), f"positive sizes such as {example}")
    return tuple(int(part) for part in parts)
