"""target probe, target check: does a target fit this machine, are its kernels right?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.cli.progress import reporter

group = typer.Typer(help="Look at a target, and test its kernels.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="See `hwmpq targets`.")]
#: Cases per call of the worker; a crash costs the rest of a chunk a second try.
_CHUNK = 25
_DEADLINE_S = 600.0


def probe(name: Name = "native") -> Answer:
    """What the target file says beside what this machine has.

    Example: hwmpq target probe x86-avx512-vnni
    """
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


def _by_kernel(formats: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Names of micro-kernels -> the formats that just these take."""
    found: dict[str, list[str]] = {}
    for fmt, names in formats.items():
        found.setdefault(", ".join(names), []).append(fmt)
    return found


def check(
    name: Name = "native",
    everything: Annotated[
        bool, typer.Option("--all", help="The whole grid: very many cases, hours.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Stop after N cases.")
    ] = None,
) -> Answer:
    """Conformance: compile kernels of the target, run them here, compare with the reference.

    Instructions that this CPU lacks are emulated. A kernel that crashes is one more failure, not
    the end. Exit code 5 when any case is wrong.

    Example: hwmpq target check x86-avx2 --limit 100
    """
    from hwmpq import targets

    target = targets.load(name)
    cases = _cases(target.name, everything)
    count = min(len(cases), limit or len(cases))
    failures: list[dict[str, str]] = []
    with reporter().stage(f"kernels of {target.name}", count) as advance:
        for start in range(0, count, _CHUNK):
            stop = min(count, start + _CHUNK)
            failures += [
                {"case": str(cases[i]), "wrong": wrong}
                for i, wrong in _run(target.name, everything, start, stop)
            ]
            advance(stop - start)
    told = {"version": VERSION, "target": target.name, "cases": count, "of": len(cases),
            "status": "accuracy" if failures else "met", "failures": failures}  # fmt: skip
    lines = [f"{count} cases, {len(failures)} wrong"]
    lines += [f"  {f['case']}: {f['wrong']}" for f in failures]
    return Answer(told, "\n".join(lines), 5 if failures else 0)


def check_cases(request: Mapping[str, Any]) -> dict[str, Any]:
    """In the worker: {"target", "all", "start", "stop"} -> {"wrong": [[number, text], ...]}."""
    from hwmpq import targets
    from hwmpq.kernels.conformance import check as check_case

    target = targets.load(request["target"])
    cases = _cases(target.name, request["all"])
    wrong: list[list[Any]] = []
    for number in range(request["start"], request["stop"]):
        try:
            found = check_case(cases[number], target)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found:
            wrong.append([number, found])
    return {"wrong": wrong}


@cache
def _cases(name: str, everything: bool) -> list[Any]:
    from hwmpq import targets
    from hwmpq.kernels import conformance

    features = targets.load(name).features
    return list(conformance.grid(features)) if everything else conformance.subset(features)


def _run(name: str, everything: bool, start: int, stop: int) -> list[tuple[int, str]]:
    """Cases start .. stop in a child; when it dies, each one alone."""
    from hwmpq.measure import WorkerCrashed, WorkerProcess, WorkerTimeout

    request = {"target": name, "all": everything, "start": start, "stop": stop}
    payload = {"function": "hwmpq.cli.target:check_cases", "payload": request}
    with WorkerProcess(threads=2) as worker:
        try:
            found = worker.call("call", payload, _DEADLINE_S)
            return [(int(number), str(wrong)) for number, wrong in found["wrong"]]
        except (WorkerCrashed, WorkerTimeout) as error:
            if stop - start == 1:
                return [(start, str(error))]
    return [item for i in range(start, stop) for item in _run(name, everything, i, i + 1)]


command(group)(probe)
command(group)(check)
