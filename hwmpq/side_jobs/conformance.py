"""The conformance cases of a target, run by processes of this machine.

What has been checked is kept until the end, so that a check which was interrupted goes on. A case
that ends its process, or takes too long, is one more failure.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from hwmpq import targets, toolchain
from hwmpq.executor import Pool
from hwmpq.kernels import conformance, guest
from hwmpq.kernels.cases import Case, grid, kinds, subset, unsupported
from hwmpq.kernels.cuda import check as gpu
from hwmpq.measure import WorkerProcess
from hwmpq.targets import Target
from hwmpq.types import digest

if TYPE_CHECKING:
    from hwmpq.stages.job import Progress

#: Cases that are compiled at once; the loss of a process costs them a second try, each alone.
_CHUNK = 48
_DEADLINE_S = 900.0


def check_target(
    name: str, everything: bool, limit: int | None, progress: Progress
) -> dict[str, Any]:
    """Compile and run kernels of a target, and compare with the reference.

    everything: the whole grid, not its pairwise subset; limit: so many of the cases, spread over
    them. Raises InputError where programs are missing.
    """
    target = targets.load(name)
    guests = target.foreign and not target.gpu
    if target.gpu:
        gpu.check_tools()
    elif guests:
        guest.check_tools(target)
    cases = _cases(target.name, everything)
    count = min(len(cases), limit or len(cases))
    chosen = [i * len(cases) // count for i in range(count)]
    journal = _Journal(digest([_codes(target), everything, limit]))
    known = len(journal.found)
    # Those that may be the same code are neighbours.
    chosen.sort(key=lambda i: (cases[i].kernel, cases[i].seed, i))
    left = [i for i in chosen if i not in journal.found]
    if known:
        progress.note(f"{known} cases were checked before this was interrupted")
    with progress.stage(f"kernels of {target.name}", count) as advance:
        advance(known)
        for found in _checked(target.name, everything, left):
            journal.add(found)
            advance(len(found))
    trapped = conformance.traps(target) if guests else {}
    failures = [
        {"case": str(cases[i]), "wrong": wrong}
        for i, wrong in sorted(journal.found.items())
        if wrong
    ]
    failures += [
        {"case": f"a kernel of {other}", "wrong": f"not trapped: {ended}"}
        for other, ended in trapped.items()
        if "SIGILL" not in ended
    ]
    journal.end()
    return {
        "target": target.name, "cases": count, "of": len(cases), "resumed": known,
        "emulator": target.emulator[0] if guests else "",
        "kernels": dict(Counter(cases[i].kernel for i in chosen)),
        "ran": gpu.how(target) if target.gpu else "", "traps": trapped,
        "unsupported": unsupported(target.features),
        "status": "accuracy" if failures else "met", "failures": failures,
    }  # fmt: skip


def check_cases(request: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: {"target", "all", "cases": numbers} -> {"wrong": [text or None, ...]}."""
    target = targets.load(request["target"])
    cases = _cases(target.name, request["all"])
    given = [cases[number] for number in request["cases"]]
    try:
        return {"wrong": conformance.check_all(given, target)}
    except Exception as error:  # whatever compiling raises is that case's failure
        if len(given) == 1:
            return {"wrong": [f"{type(error).__name__}: {error}"]}
    alone = [check_cases({**request, "cases": [number]}) for number in request["cases"]]
    return {"wrong": [one["wrong"][0] for one in alone]}


class _Journal:
    """What is known of a check's cases, in a file of the user's cache: case -> '' or what differs.

    key: of all that the outcome depends on.
    """

    def __init__(self, key: str):
        self._path = platformdirs.user_cache_path("hwmpq") / f"check-{key}.jsonl"
        self.found: dict[int, str] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it was cut off
                    self.found |= {int(number): wrong for number, wrong in json.loads(line)}

    def add(self, found: Mapping[int, str]) -> None:
        self.found |= found
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(list(found.items())) + "\n")

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


def _checked(name: str, everything: bool, numbers: Sequence[int]) -> Iterator[dict[int, str]]:
    """Parts of the cases as they are done: case -> '' or what differs."""
    parts = [list(numbers[i : i + _CHUNK]) for i in range(0, len(numbers), _CHUNK)]
    workers = [WorkerProcess(threads=2) for _ in os.sched_getaffinity(0)]
    with Pool(workers, tries=1) as pool:
        alone: list[list[int]] = []
        for part, answer in _mapped(pool, name, everything, parts):
            if isinstance(answer, str):
                alone += [[number] for number in part]
            else:
                yield {n: wrong or "" for n, wrong in zip(part, answer, strict=True)}
        for (number,), answer in _mapped(pool, name, everything, alone):
            yield {number: answer if isinstance(answer, str) else answer[0] or ""}


def _mapped(
    pool: Pool, name: str, everything: bool, parts: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[str | None] | str]]:
    """Each part with what differs in its cases, or with why there is no answer."""
    payloads = [{"target": name, "all": everything, "cases": part} for part in parts]
    function = f"{__name__}:{check_cases.__name__}"
    for i, answer in pool.map(function, payloads, _DEADLINE_S):
        yield parts[i], answer["wrong"] if isinstance(answer, dict) else str(answer)


@cache
def _cases(name: str, everything: bool) -> list[Case]:
    target = targets.load(name)
    if everything:
        return list(grid(target.features))
    return subset(target.features, kinds(target))


def _codes(target: Target) -> list[Any]:
    """All that the code of a target's kernels depends on, and what is compared with it."""
    root = Path(targets.__file__).parent
    sources = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c", ".cpp", ".cuh"))
    return [
        target.name, sorted(target.features), dict(target.tvm), target.emulator,
        toolchain.versions(), [[str(p.relative_to(root)), p.read_text()] for p in sources],
    ]  # fmt: skip
