"""What a run takes from the store, what it must make, and why: for `--explain-cache`.

A value fits where every part of its key does. For one that is not there, the store is searched for
the same thing under other keys; the parts in which the nearest of them differs are the reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.cell import to_json
from hwmpq.stages.cells import circumstances
from hwmpq.stages.facts import KEYS, asked, item_of, pairs_key
from hwmpq.stages.job import Images, Job
from hwmpq.stages.latency import known_glue, known_layers
from hwmpq.stages.menu import Menu
from hwmpq.types import digest

#: Part of a key -> what to say where it differs. {0}: what the store has; {1}: what is wanted.
_DIFFERS = {
    "fingerprint": "on another machine (fingerprint {0})",
    "target": "for another target ({0})",
    "threads": "with another number of threads ({0}, now {1})",
    "codegen": "by another version of the kernels (codegen {0}, now {1})",
    "kernel": "with another kernel",
    "schedule": "with another schedule",
    "version": "by another version of the estimators ({0}, now {1})",
    "model": "of another model or with other weights",
    "samples": "on other calibration images",
    "images": "on other calibration images",
    "estimator": "by another estimator ({0})",
    "ranges": "with activations calibrated otherwise ({0}, now {1})",
    "ptq": "with another --ptq",
    "seed": "with another --seed ({0}, now {1})",
    "loss": "with another --loss",
}
_ALIKE = "in another way (timing protocol, default schedule or compiler options)"
_AGAIN = "failed in a way that may pass"
_FRESH = "--fresh: the store is not read"
_UNTOLD = "{0} under a key whose parts were not kept"

#: A key's parts by name; None: what made the value did not keep them.
Parts = Mapping[str, Any] | None


def explained(
    job: Job, menu: Menu, images: Images | None = None, times: bool = True
) -> dict[str, Any]:
    """What the store has of the job's times and, with images, sensitivities before they are made;
    nothing where --explain-cache does not ask for it.

    Answers {"cache": [{"stage", "reused", "new": how many, "why": {reason: how many of them}}]}.
    """
    if not job.options.explain_cache:
        return {}
    rows = [_layers(job, menu), _glue(job, menu)] if times else []
    return {"cache": rows + ([] if images is None else [*_losses(job, images, menu)])}


def _layers(job: Job, menu: Menu) -> dict[str, Any]:
    known, blocks = known_layers(job, menu)
    cells = [cell for block in blocks for cell in block]
    kept = _timed_layers(job) if cells else {}
    why = []
    for cell in cells:
        timed, threads = cell.kernel.timed, cell.call.threads
        parts = _here(job, threads) | {
            "kernel": cell.kernel.name, "schedule": timed.text if timed else "",
        }  # fmt: skip
        why.append(_AGAIN if cell.failed else _why(job, "timed", parts, kept.get(cell.name, ())))
    return _row("layer cells", len(known) - why.count(_AGAIN), why)


def _timed_layers(job: Job) -> dict[tuple[str, str], list[Parts]]:
    """Workload key and format -> the parts of every key that has a time, newest first."""
    found: dict[tuple[str, str], list[Parts]] = defaultdict(list)
    for row in reversed(job.store.rows()):
        m = row.measurement
        if m.source != "imported":
            found[m.workload.key, m.format].append(
                circumstances(row.fingerprint, row.target, row.toolchain)
                | {"threads": m.threads, "kernel": m.kernel,
                   "schedule": m.quality.get("schedule", "")}
            )  # fmt: skip
    return found


def _glue(job: Job, menu: Menu) -> dict[str, Any]:
    known, calls = known_glue(job, menu)
    kept = _timed_glue(job) if calls else {}
    why = []
    for call in calls:
        failed = glue_kernels.key(call) in known
        others = kept.get(_computed(to_json(call)), ())
        why.append(_AGAIN if failed else _why(job, "timed", _here(job, call.threads), others))
    kernels = sum(seconds > 0 for seconds in known.values())  # a view takes no time, and no value
    return _row("glue cells", kernels - why.count(_AGAIN), why)


def _timed_glue(job: Job) -> dict[str, list[Parts]]:
    """What is computed -> the parts of every key that has a time."""
    found: dict[str, list[Parts]] = defaultdict(list)
    for key in job.store.keys("glue"):
        fact = job.store.fact("glue", key)
        parts = fact.get("circumstances")
        threads = {"threads": fact["call"]["threads"]}
        found[_computed(fact["call"])].append(parts and parts | threads)
    return found


def _computed(call: Mapping[str, Any]) -> str:
    """What a glue kernel computes, however. call: of `glue.cell.to_json`."""
    return digest([call[name] for name in ("op", "attrs", "inputs", "out", "shared")])


def _here(job: Job, threads: int) -> dict[str, Any]:
    """The parts that the keys of all of the job's cells have."""
    codegen = {"codegen": CODEGEN_VERSION}
    return circumstances(job.fingerprint, job.target.name, codegen) | {"threads": threads}


def _losses(job: Job, images: Images, menu: Menu) -> Iterator[dict[str, Any]]:
    from hwmpq import sensitivity

    estimator, _, keys = asked(job, images)
    known = job.store.keys("sensitivity")
    parts = {key: job.store.fact(KEYS, key) for key in job.store.keys(KEYS)}
    kept: dict[str, list[Parts]] = defaultdict(list)
    for key in known:
        begin, _, item = key.partition("|")
        kept[item].append(parts.get(begin))

    def row(stage: str, wanted: Mapping[str, str]) -> dict[str, Any]:
        """wanted: key -> what it is called under every key."""
        why = [
            _why(job, "estimated", keys.parts, kept.get(item, ()))
            for key, item in wanted.items()
            if key not in known
        ]
        return _row(stage, len(wanted) - len(why), why)

    items = [
        item_of(name, fmt)
        for name in job.network.names
        for fmt in menu.kernels[name]
        if fmt != "fp32"
    ]
    yield row("sensitivities", {keys.of(item): item for item in items})
    if sensitivity.has_pairs(estimator):
        key = pairs_key(job, menu, keys)
        yield row("pairs", {key: key.partition("|")[2]})


def _why(job: Job, done: str, wanted: Mapping[str, Any], others: Sequence[Parts]) -> str:
    """Why there is no value under a key of these parts. done: 'timed' or 'estimated'; others: the
    parts of the keys under which the same is kept."""
    if job.options.fresh:
        return _FRESH
    told = [parts for parts in others if parts]
    if not told:
        return _UNTOLD.format(done) if others else f"never {done}"
    differing = min((_differing(wanted, parts) for parts in told), key=len)
    return f"{done} {', '.join(dict.fromkeys(differing)) or _ALIKE}"


def _differing(wanted: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """What to say of each part that is not as wanted."""
    return [
        _DIFFERS[name].format(kept.get(name), value)
        for name, value in wanted.items()
        if kept.get(name) != value
    ]


def _row(stage: str, reused: int, why: Sequence[str]) -> dict[str, Any]:
    reasons = dict(Counter(why).most_common())
    return {"stage": stage, "reused": reused, "new": len(why), "why": reasons}
