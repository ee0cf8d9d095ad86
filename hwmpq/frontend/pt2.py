"""Opening a saved `torch.export` program (.pt2) without running anything that it says.

torch 2.13 stores weights as raw bytes beside JSON, but unpickles members that the JSON marks so,
loads native libraries, evaluates size expressions as Python, imports modules that a tree
specification names and resolves operators to any attribute of `torch`. All of it is refused here,
by a list of what is allowed; torch then reads a fresh archive of the inspected members only.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmpq.errors import InputError, UnsafeFile
from hwmpq.zoo.archive import check_tensor_archive, read_archive, repack

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: the members an archive may have, below its root folder
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|version"
    r"|models/model\.json|extra/[\w./-]+|data/sample_inputs/model\.pt"
    r"|data/(weights/weight|constants/tensor)_\d+"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json"
    r"|\.format_version|\.storage_alignment"
)
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
#: operators that a program may call: pure ones (aten.from_file would open any file)
_OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)[\w.]+|_operator\.getitem"
    r"|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"
)
#: kinds of values in the JSON; what is missing here holds expressions or pickled objects
_VALUES = frozenset(
    "as_none as_tensor as_tensors as_int as_ints as_float as_floats as_string as_strings as_bool "
    "as_bools as_scalar_type as_memory_format as_layout as_device as_graph as_optional_tensor "
    "as_optional_tensors as_nested_tensors as_complex as_int_lists as_name "
    "as_sym_int as_sym_ints".split()
)
_TREES = frozenset(
    {None, "builtins.list", "builtins.tuple", "builtins.dict", "collections.OrderedDict"}
)


def load_pt2(path: Path) -> ExportedProgram:
    """Inspect and load a saved program.

    Raises: UnsafeFile where loading would unpickle objects or run code; InputError for a missing or
    broken file and for symbolic sizes.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such model file", path, "a file saved by torch.export.save")
    members = read_archive(path)
    inspect(members, str(path))
    import torch

    try:
        return torch.export.load(io.BytesIO(repack(members)))
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            "broken exported program", f"{path} ({text[0]})", "a file saved by torch.export.save",
            f"It must be written by a torch near this one ({torch.__version__}).",
        ) from error  # fmt: skip


def inspect(members: Mapping[str, bytes], where: str) -> None:
    """Raises UnsafeFile, InputError for what `load_pt2` must not hand to torch."""
    roots = {name.split("/")[0] for name in members}
    inner = {name.partition("/")[2]: data for name, data in members.items()}
    if len(roots) != 1 or "models/model.json" not in inner:
        raise InputError("no exported program", where, "a file saved by torch.export.save")
    for name in inner:
        if not _MEMBERS.fullmatch(name):
            raise UnsafeFile(f"{where}: member that is no plain program or tensor", name)
    for name in _CONFIGS:
        for key, entry in _json(inner, name, where).get("config", {}).items():
            raw = f"{name.rsplit('/', 1)[0]}/{entry.get('path_name')}"
            if entry.get("use_pickle") is not False or not _MEMBERS.fullmatch(raw):
                raise UnsafeFile(f"{where}: {key} would have to be unpickled", raw, "raw tensors")
    samples = inner.get("data/sample_inputs/model.pt", b"")
    if samples:
        nested = read_archive(samples, f"{where}: sample inputs")
        check_tensor_archive(nested, f"{where}: sample inputs")
    _check_program(_json(inner, "models/model.json", where), where)


def _json(members: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(members.get(name, b"{}"))
    except ValueError as error:
        raise InputError("broken exported program", f"{where}: {name} ({error})") from error
    if not isinstance(found, dict):
        raise InputError("broken exported program", f"{where}: {name}", "a JSON object")
    return found


def _check_program(program: dict[str, Any], where: str) -> None:
    if program.get("range_constraints"):
        symbols = ", ".join(program["range_constraints"])
        raise InputError(
            "symbolic sizes in the exported program", symbols, "fixed sizes",
            "Export without dynamic_shapes.",
        )  # fmt: skip
    if program.get("guards_code"):
        raise UnsafeFile(f"{where}: guard code", program["guards_code"], "none")
    for key, value in _walk(program):
        if key in ("as_expr", "expr_str"):
            raise UnsafeFile(f"{where}: expression that would be evaluated", value, "numbers")
        if key.startswith("as_") and key not in _VALUES:
            raise UnsafeFile(f"{where}: value that would run code", key, sorted(_VALUES))
        if key == "nodes":
            _check_operators(value, where)
        if key in ("in_spec", "out_spec") and isinstance(value, str):
            _check_tree(value, where)


def _check_operators(nodes: Any, where: str) -> None:
    for node in nodes:
        target = node.get("target") if isinstance(node, dict) else node
        if not isinstance(target, str) or not _OPERATORS.fullmatch(target):
            raise UnsafeFile(f"{where}: operator", target, "pure operators of torch.ops.aten")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON."""
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, dict):
            yield from ((str(key), item) for key, item in top.items())
            stack.extend(top.values())
        elif isinstance(top, list):
            stack.extend(top)


def _check_tree(text: str, where: str) -> None:
    """A pytree specification may name plain containers only."""
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise UnsafeFile(f"{where}: tree specification", text[:80], "JSON") from error
    for key, value in _walk(spec):
        if key == "type" and value not in _TREES:
            raise UnsafeFile(f"{where}: container in a tree", value, sorted(map(str, _TREES)))
