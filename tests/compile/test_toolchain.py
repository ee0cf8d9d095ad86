"""The TVM pair: which ones are refused, and that the installed one does what others crash on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hwmpq import targets, toolchain
from hwmpq.errors import InputError

TENSORIZE = """
import numpy as np
import tvm
from tvm.script import tirx as T

@T.prim_func(s_tir=True)
def desc(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (4,), "float32", offset_factor=1)
    B = T.match_buffer(b, (4,), "float32", offset_factor=1)
    C = T.match_buffer(c, (4,), "float32", offset_factor=1)
    with T.sblock("root"):
        T.reads(A[0:4], B[0:4])
        T.writes(C[0:4])
        for i in range(4):
            with T.sblock("add"):
                vi = T.axis.spatial(4, i)
                C[vi] = A[vi] + B[vi]

@T.prim_func(s_tir=True)
def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
    A = T.match_buffer(a, (4,), "float32", offset_factor=1)
    B = T.match_buffer(b, (4,), "float32", offset_factor=1)
    C = T.match_buffer(c, (4,), "float32", offset_factor=1)
    with T.sblock("root"):
        T.reads(A[0:4], B[0:4])
        T.writes(C[0:4])
        C[T.ramp(0, 1, 4)] = A[T.ramp(0, 1, 4)] + B[T.ramp(0, 1, 4)]

@T.prim_func(s_tir=True)
def main(A: T.Buffer((64,), "float32"), B: T.Buffer((64,), "float32"),
         C: T.Buffer((64,), "float32")):
    T.func_attr({"global_symbol": "main"})
    for i in range(64):
        with T.sblock("add"):
            vi = T.axis.spatial(64, i)
            C[vi] = A[vi] + B[vi]

tvm.s_tir.TensorIntrin.register("test.add4", desc, impl)
schedule = tvm.s_tir.Schedule(tvm.IRModule({"main": main}))
loop, = schedule.get_loops(schedule.get_sblock("add"))
_, inner = schedule.split(loop, [None, 4])
schedule.tensorize(inner, "test.add4")
built = tvm.compile(schedule.mod, tvm.target.Target({"kind": "llvm"}))
a, b = np.arange(64, dtype="float32"), np.ones(64, dtype="float32")
c = tvm.runtime.tensor(np.zeros(64, dtype="float32"))
built.jit()["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b), c)
np.testing.assert_array_equal(c.numpy(), a + b)
print("tensorized")
"""

TARGETS = """
import json, sys, tvm
for line in sys.argv[1:]:
    print(tvm.target.Target(json.loads(line)).attrs["mcpu"])
"""


def run(code: str, folder: Path, *words: str) -> str:
    """stdout of a fresh interpreter: a crash must not take the test run along."""
    script = folder / "script.py"  # TVMScript reads its own source
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    return done.stdout


def test_the_installed_pair_tensorizes(tmp_path: Path) -> None:
    assert "tensorized" in run(TENSORIZE, tmp_path)


def test_tvm_takes_every_shipped_target(tmp_path: Path) -> None:
    found = map(targets.load, targets.names())
    wanted = [target.tvm for target in found if not target.gpu]
    said = run(TARGETS, tmp_path, *map(json.dumps, wanted)).split()
    assert said == [target["mcpu"] for target in wanted]


@pytest.mark.parametrize(
    ("tvm", "ffi", "reason"),
    [
        ("0.27.0.post1", "0.1.14.post1", None),
        ("0.27.0", "0.1.14.post0", None),
        ("0.27.0.post1", "0.1.15.post2", "Schedule.tensorize crashes the process"),
        ("0.26.0", "0.1.15", "Schedule.tensorize crashes the process"),
        ("0.27.0", "0.2.0", "Schedule.tensorize crashes the process"),
        ("0.27.0.post1", "0.1.13.post3", "tvm cannot be imported"),
        ("0.27.0.post1", "", "tvm cannot be imported"),
        ("0.28.0", "0.1.16", None),
    ],
)
def test_known_pairs(tvm: str, ffi: str, reason: str | None) -> None:
    assert toolchain.why_not(tvm, ffi) == reason


def test_a_bad_pair_is_refused_by_name_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
    monkeypatch.setattr(toolchain, "_version", lambda name: have.get(name, ""))
    with pytest.raises(
        InputError,
        match=r"apache-tvm 0\.27\.0\.post1 with apache-tvm-ffi 0\.1\.15\.post2.*"
        r"Run: pip install 'apache-tvm-ffi==0\.1\.14\.post1'",
    ):
        toolchain.check()
    assert toolchain.versions() == have


def test_the_fix_is_the_pinned_version(checkout: Path) -> None:
    pinned = toolchain.FIX.split("'")[1]
    assert pinned in (checkout / "constraints.txt").read_text().splitlines()


def test_what_is_installed_passes() -> None:
    toolchain.check()
    assert {"apache-tvm", "apache-tvm-ffi", "numpy"} <= set(toolchain.versions())


def test_no_tvm_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_version", lambda name: "")
    toolchain.check()
