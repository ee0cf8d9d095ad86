"""The wheel, built and used outside the checkout: what a user who installs it gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

IGNORED = shutil.ignore_patterns(
    ".*", "build", "dist", "tests", "_targets", "_cost_models", "__pycache__", "*.egg-info"
)


def run(*command: object, cwd: Path) -> str:
    """stdout of a command that sees neither the checkout nor the caller's Python settings."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source") / "hwmpq"
    shutil.copytree(checkout, source, ignore=IGNORED)
    out = source.parent / "dist"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel. Its dependencies are those of
    the environment running the tests, behind a .pth file's line: hwmpq itself comes from the wheel,
    which stands before them on the path (and an editable install's hook is not read there)."""
    env = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", env, cwd=env)
    python = env / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=env)
    (site,) = env.glob("lib/python*/site-packages")
    here = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join([*here, ""]))
    return python


def test_the_wheel_holds_code_data_and_licence_and_nothing_else(
    wheel: Path, checkout: Path
) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    info = next(name.split("/")[0] for name in held if name.endswith("/METADATA"))
    wanted = {
        f"{inside}/{path.relative_to(checkout / folder)}"
        for folder, inside in (
            ("hwmpq", "hwmpq"),
            ("targets", "hwmpq/_targets"),
            ("cost_models", "hwmpq/_cost_models"),
        )
        for path in (checkout / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "hwmpq/_targets/x86-avx2.toml" in wanted
    assert f"{info}/licenses/LICENSE" in held
    assert {name for name in held if not name.startswith(f"{info}/")} == wanted


def test_the_installed_package_finds_its_data(python: Path, tmp_path: Path, checkout: Path) -> None:
    code = """
import hwmpq
from hwmpq import targets
print(hwmpq.__file__)
print(targets.data_folder("targets"))
print(targets.data_folder("cost_models"))
print(*(targets.load(name).name for name in targets.names()))
print(hwmpq.__version__, hwmpq.Target.__name__)
"""
    package, target_folder, models, names, version = run(
        python, "-c", code, cwd=tmp_path
    ).splitlines()
    installed = Path(package).parent
    assert not installed.is_relative_to(checkout)
    assert installed.is_relative_to(python.parents[1])
    assert Path(target_folder) == installed / "_targets"
    assert Path(models) == installed / "_cost_models"
    assert names.split() == sorted(path.stem for path in (checkout / "targets").glob("*.toml"))
    assert version.split()[1] == "Target"


def test_the_installed_package_compiles_and_runs(python: Path, tmp_path: Path) -> None:
    code = """
import json, subprocess, sys
listed = json.loads(subprocess.run(
    [sys.executable, "-m", "hwmpq.cli", "targets", "--json"], capture_output=True, check=True
).stdout)
print("x86-avx2" in json.dumps(listed))
import numpy as np, torch
import hwmpq
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(),
                          torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 4)).eval()
x = torch.randn(1, 3, 6, 6)
from hwmpq import lower, targets
from hwmpq.frontend.relax_module import relax_module
from hwmpq.quantize.calibrate import calibrate
import tvm
graph = hwmpq.trace(net, (x,))
plan = {node.name: "w8a8" for node in graph.layers}
built = lower.build(relax_module(graph), plan, calibrate(graph, [x], ["w8a8"]), targets.native())
vm = tvm.relax.VirtualMachine(built.executable, tvm.cpu())
weights = [tvm.runtime.tensor(a) for a in built.parameters.values()]
y = vm["main"](tvm.runtime.tensor(x.numpy()), *weights).numpy()
print(y.shape, bool(np.abs(y - net(x).detach().numpy()).max() < 0.1))
"""
    listed, ran = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert listed == "True"
    assert ran == "(1, 4) True"
