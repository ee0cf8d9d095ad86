"""The problem file of `hwmpq solve`, version 1, and the JSON of its answer.

{"version": 1, "layers": [name...], "formats": [name...], "loss": [[L×F]],
 "latency_s": [[L×F]], "nbytes": [[L×F]], "bops": [[L×F]], "legal": [[L×F]] (optional),
 "pair_loss": {"matrix": "pairs.npy"} (optional; (L·F)×(L·F), symmetric, row l·F+f),
 "transitions": [{"from", "to", "latency_s": [[F×F]]}] (optional), "fixed_latency_s": x,
 "ties": [[layer, ...], ...], "minimize": "loss" | "latency_s" | "nbytes" | "bops",
 "budgets": {"loss", "latency_s", "nbytes", "bops"} (any of them)}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from hwmpq.errors import InputError, UnsafeFile
from hwmpq.search.check import check
from hwmpq.search.evaluate import QUANTITIES
from hwmpq.types import FloatArray, Problem, Solution, Transition, reject_unknown

VERSION = 1
_KEYS = {"version", "layers", "formats", *QUANTITIES, "legal", "pair_loss", "transitions"}
_KEYS |= {"fixed_latency_s", "ties", "minimize", "budgets"}
_ANSWER = (
    *("status", "choice", "objective", "raw_objective", "bound", "gap"),
    *("latency_s", "nbytes", "bops", "seconds"),
)


def read_problem(path: str | Path) -> Problem:
    """Read a problem file; the pair matrix lies beside it. Raises InputError, UnsafeFile."""
    path = Path(path)
    try:
        data = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
        )
    except OSError as error:
        raise InputError("cannot read the problem file", error) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path.name} is not JSON", error) from None
    return problem_from_json(data, path.parent)


def problem_from_json(data: Any, folder: Path) -> Problem:
    """The Problem of a parsed file. folder: where `pair_loss.matrix` is looked for.

    Raises InputError for anything that the format in the module's docstring does not allow.
    """
    _expect("the problem file", data, dict, "an object")
    reject_unknown("problem file", data, _KEYS)
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise InputError(
            "version of the problem file", data.get("version", "none"), [VERSION], "Upgrade hwmpq."
        )
    for name in ("layers", "formats"):
        if name not in data:
            raise InputError(f"{name} is missing", allowed="a list of names")
        _texts(name, data[name])
    problem = Problem(
        layers=tuple(data["layers"]),
        formats=tuple(data["formats"]),
        legal=_flags(data["legal"]) if "legal" in data else None,
        pair_loss=_pairs(data["pair_loss"], folder) if "pair_loss" in data else None,
        transitions=_transitions(data.get("transitions", [])),
        fixed_latency_s=_number("fixed_latency_s", data.get("fixed_latency_s", 0.0), 0.0),
        ties=_ties(data.get("ties", [])),
        minimize=_expect("minimize", data.get("minimize", "loss"), str, "a string"),
        budgets=_budgets(data.get("budgets", {})),
        **{name: _table(name, data[name]) for name in QUANTITIES if name in data},
    )
    check(problem)
    return problem


def write_problem(problem: Problem, path: str | Path) -> None:
    """Write a problem file, and `<stem>.pairs.npy` beside it when there are pair losses.

    A cell with a non-finite number is written as an illegal one. Raises InputError when the
    problem contradicts itself, a transition is not finite, or the place cannot be written.
    """
    check(problem)
    path = Path(path)
    data: dict[str, Any] = {
        "version": VERSION,
        "layers": list(problem.layers),
        "formats": list(problem.formats),
    }
    tables = {name: getattr(problem, name) for name in QUANTITIES}
    given = {name: np.asarray(cells) for name, cells in tables.items() if cells is not None}
    legal = np.ones((len(problem.layers), len(problem.formats)), bool)
    if problem.legal is not None:
        legal &= np.asarray(problem.legal, bool)
    for cells in given.values():
        legal &= np.isfinite(cells)
    for name, cells in given.items():
        data[name] = np.where(np.isfinite(cells), cells, 0.0).tolist()
    if not legal.all():
        data["legal"] = legal.tolist()
    if problem.transitions:
        data["transitions"] = [
            {"from": move.source, "to": move.target, "latency_s": np.asarray(cost).tolist()}
            for move in problem.transitions
            if (cost := _finite(f"transition {move.source!r} -> {move.target!r}", move.latency_s))
            is not None
        ]
    data["fixed_latency_s"] = problem.fixed_latency_s
    data["ties"] = [list(group) for group in problem.ties]
    data["minimize"] = problem.minimize
    data["budgets"] = dict(problem.budgets)
    if problem.pair_loss is not None:
        data["pair_loss"] = {"matrix": path.stem + ".pairs.npy"}
    try:
        path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        if problem.pair_loss is not None:
            beside = path.with_name(data["pair_loss"]["matrix"])
            np.save(beside, np.asarray(problem.pair_loss, np.float64), allow_pickle=False)
    except OSError as error:
        raise InputError("cannot write the problem file", error) from None


def solution_to_json(solution: Solution) -> dict[str, Any]:
    """The answer of `hwmpq solve`: exactly the contract's keys."""
    return {name: getattr(solution, name) for name in _ANSWER} | {"choice": dict(solution.choice)}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = (
        sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    )
    if twice:
        raise InputError("a key stands twice in the problem file", ", ".join(twice))
    return dict(pairs)


def _refuse_constant(word: str) -> Any:
    raise InputError("non-finite number in the problem file", word, "finite numbers")


def _expect(what: str, value: Any, kind: type, allowed: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(what, json.dumps(value)[:80], allowed)
    return value


def _texts(what: str, value: Any) -> list[str]:
    for name in _expect(what, value, list, "a list of names"):
        _expect(f"a name in {what}", name, str, "a string")
    names: list[str] = value
    return names


def _number(what: str, value: Any, least: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(what, json.dumps(value)[:80], "a number")
    return float(_finite(what, value, least))


def _finite(what: str, value: Any, least: float | None = None) -> FloatArray:
    """Numbers as float64. Raises InputError for other types, ragged rows, nan, inf, < least."""
    try:
        raw = np.asarray(value)
    except ValueError:
        raise InputError(f"{what} has rows of different lengths", allowed="a full table") from None
    if raw.dtype.kind not in "iuf" or _has_bool(value):
        raise InputError(f"{what} holds something that is no number", allowed="finite numbers")
    numbers: FloatArray = raw.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise InputError(
            f"{what} has a non-finite value",
            allowed="finite numbers",
            next="Mark what is impossible in `legal`.",
        )
    if least is not None and (numbers < least).any():
        raise InputError(f"{what} has a negative value", float(numbers.min()), f">= {least:g}")
    return numbers


def _has_bool(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_bool(item) for item in value)
    return isinstance(value, bool)


def _table(name: str, value: Any) -> FloatArray:
    _expect(name, value, list, "a list of rows")
    return _finite(name, value, None if name == "loss" else 0.0)


def _flags(value: Any) -> Any:
    _expect("legal", value, list, "rows of true and false")
    try:
        flags = np.asarray(value)
    except ValueError:
        raise InputError("legal has rows of different lengths", allowed="a full table") from None
    if flags.dtype.kind not in "biu" or not np.isin(flags, (0, 1)).all():
        raise InputError("legal holds something else", allowed="true, false, 1, 0")
    return flags.astype(bool)


def _transitions(value: Any) -> tuple[Transition, ...]:
    moves = []
    for item in _expect("transitions", value, list, "a list of objects"):
        _expect("a transition", item, dict, "an object")
        keys = {"from", "to", "latency_s"}
        reject_unknown("transition", item, keys)
        for key in sorted(keys - set(item)):
            raise InputError(f"a transition without {key}", allowed=sorted(keys))
        ends = [_expect("an end of a transition", item[k], str, "a layer") for k in ("from", "to")]
        what = f"transition {ends[0]!r} -> {ends[1]!r}"
        _expect(what, item["latency_s"], list, "a list of rows")
        moves.append(Transition(ends[0], ends[1], _finite(what, item["latency_s"], 0.0)))
    return tuple(moves)


def _ties(value: Any) -> tuple[tuple[str, ...], ...]:
    groups = _expect("ties", value, list, "a list of lists of layers")
    return tuple(tuple(_texts("ties", group)) for group in groups)


def _budgets(value: Any) -> Mapping[str, float]:
    limits = _expect("budgets", value, dict, "an object")
    reject_unknown("budgets", limits, set(QUANTITIES))
    return {name: _number(f"budget {name}", limit) for name, limit in limits.items()}


def _pairs(value: Any, folder: Path) -> FloatArray:
    """The pair matrix: a .npy file in `folder` or below, never unpickled."""
    _expect("pair_loss", value, dict, 'an object {"matrix": "pairs.npy"}')
    reject_unknown("pair_loss", value, {"matrix"})
    name = _expect("pair_loss.matrix", value.get("matrix"), str, "a file name")
    path = (folder / name).resolve()
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name
    if outside or ".." in PurePosixPath(name).parts or not path.is_relative_to(folder.resolve()):
        raise UnsafeFile(
            "pair_loss.matrix leaves the folder of the problem file",
            repr(name),
            "a path inside that folder",
            "Copy the matrix beside the problem file.",
        )
    try:
        # mapped: a header that promises more than the file holds is refused, not allocated
        matrix = np.array(np.lib.format.open_memmap(path, mode="r"))
    except OSError as error:
        raise InputError("cannot read pair_loss.matrix", error) from None
    except (ValueError, EOFError) as error:
        raise UnsafeFile("pair_loss.matrix is no plain .npy array", error) from None
    return _finite("pair_loss", matrix)
