"""target probe, check, evaluate: does a target fit this machine, are its kernels right and fast?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli import options as shared
from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer, plain
from hwmpq.cli.progress import reporter
from hwmpq.errors import InputError

group = typer.Typer(help="Look at a target, and test its kernels.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="See `hwmpq targets`.")]


def probe(
    name: Name = "native",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="NAME.toml",
            help="Measure this machine and write a target file for it; HWMPQ_TARGET_PATH names the "
            "folder that it is found in.",
        ),
    ] = None,
) -> Answer:
    """What the target file says beside what this machine has.

    With --out also a target file for this very machine: its features and caches, measured peaks,
    clock and bandwidths.

    Example: hwmpq target probe --out lab-7.toml
    """
    if out is not None:
        return _written(name, out)
    from hwmpq import targets
    from hwmpq.formats import format_named, known_formats
    from hwmpq.kernels.micro import micros
    from hwmpq.measure.environment import hardware

    target = targets.load(name)
    host, missing = targets.host_features(), targets.satisfied_by_host(target)
    able = [m for m in micros() if m.requires <= target.features]
    taken = {
        fmt: sorted(m.name for m in able if m.why_not(format_named(fmt)) is None)
        for fmt in known_formats()
    }
    told: dict[str, Any] = {
        "version": VERSION, "target": target.name, "description": target.description,
        "features": sorted(target.features), "runs_here": not missing, "missing": missing,
        "also_here": sorted(host - target.features), "machine": hardware(),
        "micro_kernels": [m.name for m in able],
        "formats": {fmt: names for fmt, names in taken.items() if names},
        "sources": dict(target.sources),
    }  # fmt: skip
    lines = [
        f"{target.name}: {target.description}",
        f"this CPU: {'can run it' if not missing else 'lacks ' + ' '.join(missing)}",
        f"also here: {' '.join(told['also_here']) or 'nothing more'}",
        f"micro-kernels: {', '.join(told['micro_kernels']) or 'none'}",
        *(f"  {names}: {' '.join(fmts)}" for names, fmts in _by_kernel(told["formats"]).items()),
        *(f"{what}: {source}" for what, source in target.sources.items()),
    ]
    return Answer(told, "\n".join(lines))


def _written(name: str, out: Path) -> Answer:
    if name != "native":
        raise InputError(
            "NAME with --out", name, next="The file is about this machine: leave NAME out."
        )
    from hwmpq.side_jobs import probe_machine

    target = probe_machine(out, reporter())
    assert target.measured is not None
    told = {"version": VERSION, "file": str(out), **asdict(target)}
    lines = [f"{out}: {target.description}", f"features: {' '.join(sorted(target.features))}",
             f"clock: {target.measured.clock_hz / 1e9:.2f} GHz"]  # fmt: skip
    lines += [f"{pair}: {peak:g} multiply-accumulates per cycle"
              for pair, peak in target.peaks.items()]  # fmt: skip
    lines += [f"{level}: {rate / 1e9:.1f} GB/s" for level, rate
              in target.measured.bandwidth.items()]  # fmt: skip
    return Answer(told, "\n".join(lines))


def _by_kernel(formats: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Names of micro-kernels -> the formats that just these take."""
    found: dict[str, list[str]] = {}
    for fmt, names in formats.items():
        found.setdefault(", ".join(names), []).append(fmt)
    return found


def check(
    name: Name = "native",
    everything: Annotated[
        bool, typer.Option("--all", help="The whole grid: thousands of cases, most of an hour.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="N cases, spread over all of them."),
    ] = None,
) -> Answer:
    """Conformance: compile kernels of the target, run them, compare with the reference.

    Instructions that this CPU lacks are emulated; kernels for another kind of machine run as they
    are under its emulator (QEMU), where code for newer chips must be trapped. Kernels for a GPU are
    compiled for it, inspected (no spills, tensor cores used) and run on this CPU. A kernel that
    crashes is one more failure, not the end. Also says what no kernel runs, and why. Every core is
    used; after an interruption the same command goes on. Exit code 5 when any case is wrong.

    Example: hwmpq target check arm-cortex-a76 --limit 100
    """
    from hwmpq.side_jobs import check_target

    found = check_target(name, everything, limit, reporter())
    kernels, traps, missing = found["kernels"], found["traps"], found["unsupported"]
    failures = found["failures"]
    lines = [f"{kernel}: {number} cases" for kernel, number in sorted(kernels.items())]
    lines += [f"a kernel of {other}: {ended}" for other, ended in traps.items()]
    lines += [
        f"{op}: no kernel for {len(reasons)} formats, such as {fmt}: {reasons[fmt]}"
        for op, reasons in missing.items()
        for fmt in list(reasons)[:1]
    ]
    lines += filter(None, [found["ran"]])
    lines.append(f"{found['cases']} of {found['of']} cases, {len(failures)} wrong")
    lines += [f"  {f['case']}: {f['wrong']}" for f in failures]
    return Answer({"version": VERSION, **found}, "\n".join(lines), 5 if failures else 0)


def evaluate(
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="MODEL,MODEL,..", help="Networks; some of the zoo."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the report.")
    ] = Path("hwmpq-evaluation"),
    name: Name = "native",
    **given: Any,
) -> Answer:
    """What a chip does with networks: every layer in every format measured, how near each comes to
    the machine's roof, what mixed precision gains, how good the cost model is, energy where it is
    counted.

    DIR gets evaluation.json and report.html, after every network; starting it again goes on.
    --dry-run says how long it would take.

    Example: hwmpq target evaluate native --models zoo:resnet18,zoo:vit_tiny --out lab-7
    """
    from hwmpq.report import evaluation
    from hwmpq.report.content import EVALUATION
    from hwmpq.side_jobs import evaluate_target
    from hwmpq.side_jobs.evaluate import NETWORKS

    chosen = tuple(shared.words(models)) or NETWORKS
    asked = shared.options(model="", target=name, **given)
    pages = [out / EVALUATION, out / "report.html"]

    if out.exists() and not out.is_dir():
        raise InputError("--out", out, "a folder")

    def keep(found: Mapping[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for page in pages:
            evaluation.write(plain(found), page)

    found = evaluate_target(asked, chosen, reporter(), keep)
    if asked.dry_run:
        lines = [f"{n['model']}: {n['cells']} cells to measure, about {_minutes(n['forecast_s'])}"
                 for n in found["networks"]]  # fmt: skip
        return Answer(found, "\n".join([*lines, f"in all {_minutes(found['forecast_s'])}"]))
    lines = [evaluation.verdict(found), *(f"written: {page}" for page in pages)]
    return Answer(found, "\n".join(lines))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


command(group)(probe)
command(group)(check)
command(group, "device", "threads", "allow_estimates", "formats", *shared.WORK, "dry_run")(evaluate)
