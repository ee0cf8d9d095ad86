"""Who may import whom: `Rule` per part, checked on the source without running it.

A part is a file or folder right under `hwmpq/`. Imports within a part are free.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hwmpq

PACKAGE = Path(hwmpq.__file__).resolve().parent

#: Third-party packages that any part may import: small, or needed by the values themselves.
LIGHT = {"numpy", "ml_dtypes", "safetensors", "pydantic", "platformdirs"}
#: Third-party packages that a part needs leave for.
HEAVY = {
    "torch", "tvm", "tvm_ffi", "xgboost", "ortools", "scipy", "sklearn", "sqlalchemy", "plotly",
    "jinja2", "PIL", "typer", "rich", "ray", "onnx", "onnxruntime", "openvino", "timm",
    "torchvision", "optuna", "clarabel", "piqp", "osqp", "threadpoolctl", "pyarrow",
    "cryptography",
}  # fmt: skip


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Rule:
    """parts: what of hwmpq may be imported, `part` or `part.module`. heavy: third-party packages
    that may be imported anywhere; inside: only within functions or under TYPE_CHECKING."""

    parts: frozenset[str]
    heavy: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()


COMMON = words("types errors graph toolchain tensors tile_permission toml_text launches")
NUMBERS = words("formats storage requantize quantizers resolve")
FOUNDATION = COMMON | NUMBERS | words("targets devices data executor")
KERNELS = FOUNDATION | {"kernels"}
STAGES = words(
    "frontend quantize sensitivity measure predict search lower artifact export report zoo"
)
METHODS = KERNELS | STAGES | {"methods", "stages"}

RULES = {
    # lowest first: a part imports only parts above its own line
    "__init__": Rule(words("")),
    "errors": Rule(words("")),
    "types": Rule(words("errors")),
    "graph": Rule(words("types errors")),
    "toolchain": Rule(words("types errors")),
    "tile_permission": Rule(words("errors")),
    "tensors": Rule(words("types errors")),
    "launches": Rule(words("errors")),
    "toml_text": Rule(words("")),
    "storage": Rule(COMMON),
    "formats": Rule(COMMON, inside=words("torch")),
    "requantize": Rule(COMMON | words("storage formats"), inside=words("torch")),
    "quantizers": Rule(COMMON | words("formats requantize")),
    "resolve": Rule(COMMON | NUMBERS),
    "targets": Rule(COMMON),
    "devices": Rule(COMMON),
    "data": Rule(COMMON, inside=words("sklearn PIL torch")),
    "executor": Rule(COMMON, inside=words("ray")),
    "zoo": Rule(COMMON, heavy=words("torch")),
    "kernels": Rule(COMMON | NUMBERS | {"targets"}, inside=words("tvm tvm_ffi")),
    "frontend": Rule(
        KERNELS | words("zoo lower.annotations lower.moved"),
        heavy=words("torch tvm"), inside=words("onnx"),
    ),
    "quantize": Rule(KERNELS, heavy=words("torch scipy")),
    "sensitivity": Rule(KERNELS | {"quantize"}, heavy=words("torch scipy")),
    "measure": Rule(
        KERNELS | {"artifact"}, heavy=words("tvm tvm_ffi sqlalchemy"), inside=words("pyarrow")
    ),
    "predict": Rule(KERNELS | {"measure.store"}, heavy=words("xgboost")),
    "search": Rule(FOUNDATION, heavy=words("scipy ortools"), inside=words("threadpoolctl")),
    "artifact": Rule(
        FOUNDATION | {"tensors"}, heavy=words("tvm tvm_ffi"), inside=words("cryptography")
    ),
    "lower": Rule(KERNELS | {"artifact"}, heavy=words("tvm tvm_ffi")),
    "export": Rule(KERNELS, inside=words("torch onnx openvino")),
    # programs to be timed beside ours; the worker finds them by name, so measure needs no edge
    "peers": Rule(
        FOUNDATION | words("frontend export"), inside=words("torch onnx onnxruntime openvino")
    ),
    "report": Rule(KERNELS, heavy=words("plotly jinja2")),
    "stages": Rule(KERNELS | STAGES | {"stages"}, inside=words("torch")),
    "methods": Rule(METHODS, heavy=words("torch scipy"), inside=words("optuna")),
    "pipeline": Rule(METHODS, inside=words("torch tvm")),
    "api": Rule(METHODS | {"pipeline"}, inside=words("torch")),
    "side_jobs": Rule(METHODS | {"pipeline"}, inside=words("torch tvm")),
    "cli": Rule(
        METHODS | words("pipeline side_jobs peers"),
        heavy=words("typer rich"),
        inside=words("torch tvm xgboost"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """`module`: full dotted name; runs: it is executed when the file is imported."""

    module: str
    line: int
    runs: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a file that lies in `package` (dotted), however deep it stands."""

    def walk(node: ast.AST, runs: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, runs) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, runs and not later(node, child))

    def later(node: ast.AST, child: ast.AST) -> bool:
        if isinstance(node, ast.If) and child in node.body:
            return "TYPE_CHECKING" in ast.unparse(node.test)
        return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))

    return walk(ast.parse(source), True)


def why_not(part: str, found: Import) -> str | None:
    """What is wrong with this import in this part; None if it is allowed."""
    rule = RULES[part]
    root, *inner = found.module.split(".")
    if root == "hwmpq":
        if not inner or inner[0] == part:
            return None
        allowed = inner[0] in rule.parts or ".".join(inner[:2]) in rule.parts
        lazy = part == "__init__" and not found.runs
        return None if allowed or lazy else f"{part} may not import hwmpq.{inner[0]}"
    if root in sys.stdlib_module_names or root in LIGHT or root in rule.heavy:
        return None
    if root not in HEAVY:
        return f"{root} is neither in LIGHT nor in HEAVY of this test: is it a dependency?"
    if root in rule.inside:
        return f"{part} may import {root} only inside functions" if found.runs else None
    return f"{part} may not import {root}"


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.startswith(".")]


def test_every_part_keeps_its_rule() -> None:
    broken: dict[str, None] = {}  # in order, each once
    for path in sources():
        if part_of(path) not in RULES:
            broken[f"{path}:1: part {part_of(path)!r} has no rule in {Path(__file__).name}"] = None
            continue
        package = ".".join(("hwmpq", *path.relative_to(PACKAGE).parent.parts))
        for found in imports(path.read_text(encoding="utf-8"), package):
            if reason := why_not(part_of(path), found):
                broken[f"{path}:{found.line}: {reason}"] = None
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("part", "line", "reason"),
    [
        ("search", "import torch", "search may not import torch"),
        ("search", "def f():\n    import torch.nn", "search may not import torch"),
        ("predict", "from tvm import relax", "predict may not import tvm"),
        ("kernels", "import tvm", "kernels may import tvm only inside functions"),
        ("kernels", "def emit():\n    from tvm.script import tirx", None),
        ("kernels", "from hwmpq import lower", "kernels may not import hwmpq.lower"),
        ("kernels", "from ..measure import store", "kernels may not import hwmpq.measure"),
        ("kernels", "from .registry import scan", None),
        ("predict", "from hwmpq.measure.store import Store", None),
        ("predict", "from hwmpq.measure import store", None),
        ("predict", "import hwmpq.measure.worker", "predict may not import hwmpq.measure"),
        ("formats", "if TYPE_CHECKING:\n    import torch", None),
        ("formats", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "only inside"),
        ("types", "import requests", "requests is neither in LIGHT nor in HEAVY"),
        ("types", "from hwmpq.errors import InputError", None),
    ],
)
def test_the_rules_themselves(part: str, line: str, reason: str | None) -> None:
    (found,) = imports(line, f"hwmpq.{part}")
    got = why_not(part, found)
    assert (got is None) if reason is None else (got is not None and reason in got)


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_hwmpq_loads_nothing_heavy() -> None:
    assert not loaded_by("import hwmpq; dir(hwmpq)") & (HEAVY | LIGHT)


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        ("formats kernels search predict storage requantize resolve targets", {"torch", "tvm"}),
        ("quantize sensitivity zoo data", {"tvm"}),
        ("measure.store artifact", {"torch"}),
    ],
)
def test_importing_a_part_loads_nothing_it_may_not_know(parts: str, absent: set[str]) -> None:
    paths = {part: PACKAGE / part.replace(".", "/") for part in parts.split()}
    there = [p for p, path in paths.items() if path.is_dir() or path.with_suffix(".py").exists()]
    if there:
        assert not loaded_by("\n".join(f"import hwmpq.{part}" for part in there)) & absent


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'hwmpq' has no attribute 'quantise'"):
        hwmpq.quantise  # noqa: B018


def test_a_sub_package_does_not_hide_the_function_of_the_same_name() -> None:
    code = (
        "import sys, types, hwmpq\n"
        "hwmpq.quantize = types.ModuleType('hwmpq.quantize')  # what the import system does\n"
        "assert 'quantize' not in vars(hwmpq)\n"
        "assert hwmpq.Target.__name__ == 'Target'"
    )
    loaded_by(code)
