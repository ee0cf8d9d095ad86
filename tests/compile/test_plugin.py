"""examples/plugin, installed by pip: its target and kernels are there without a change here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hwmpq import targets

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin"
#: What a user of the package does: list the targets, look at one, test its kernels.
LOOK = """
import json
from hwmpq import cli, targets
from hwmpq.formats import format_named
from hwmpq.kernels import best, cases, conformance
from hwmpq.types import Workload

assert cli.main(["targets", "--json"]) == 0
assert cli.main(["target", "probe", "example-chip", "--json"]) == 0
target = targets.load("example-chip")
layer = Workload.make("linear", "", m=1, k=64, n=10)
found = [c for c in cases.subset(target.features) if ".example_mul16." in c.kernel]
wrong = conformance.check(found[0], target)
kernel = best(layer, format_named("w8a8"), target.features)
older = best(layer, format_named("w8a8"), targets.load("x86-avx2").features)
print(json.dumps([kernel.name, older.name, len(found), wrong]))
"""


@pytest.mark.skipif(bool(targets.satisfied_by_host(targets.load("x86-avx2"))), reason="no AVX2")
def test_a_package_adds_a_chip(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source)  # building leaves files there
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(place)]
    subprocess.run([*pip, *offline, str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed, probed, looked = map(json.loads, done.stdout.splitlines())
    assert "example-chip" in {target["name"] for target in listed["targets"]}
    assert probed["runs_here"] and "example_mul16" in probed["formats"]["w8a8"]
    kernel, older, cases, wrong = looked
    assert "example_mul16" in kernel and "example_mul16" not in older
    assert cases > 20 and wrong is None
