"""The commands on a real artifact: with everything installed, and with numpy and TVM alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hwmpq.cli
from hwmpq.artifact.folder import read_manifest, sha256
from hwmpq.errors import InfeasibleError

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(hwmpq.__file__).resolve().parents[1]
#: What an artifact's machine need not have.
ABSENT = (
    *("typer", "rich", "torch", "pydantic", "scipy", "safetensors", "xgboost", "ortools"),
    *("sqlalchemy", "platformdirs", "sklearn", "PIL", "plotly", "jinja2"),
)
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zoo:digits_cnn, fp32 but for one w8a8 layer."""
    import torch

    from hwmpq.quantize.calibrate import calibrate
    from hwmpq.stages.build import make_artifact
    from hwmpq.stages.job import Options, Silent, load_images, open_job

    folder = tmp_path_factory.mktemp("made")
    options = Options("zoo:digits_cnn", calib_data="digits#train", store=str(folder / "s.sqlite"))
    job = open_job(options, Silent())
    x = load_images(job).calib.batch(range(32))
    quantizers = calibrate(job.graph, [torch.from_numpy(x)], ["fp32", "w8a8"])
    assignment = {name: "fp32" for name in job.network.names} | {"conv2": "w8a8"}
    make_artifact(job, assignment, quantizers, folder / "artifact", {job.graph.inputs[0]: x[:4]})
    job.store.close()
    return folder / "artifact"


@pytest.fixture(params=["all", "minimal"])
def cli(
    request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:  # fmt: skip
    """Run a command line: (exit code, stdout, stderr). With everything installed in this process,
    which has loaded what is slow; with little in one of its own, where the rest is blocked."""

    def here(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = hwmpq.cli.main([*map(str, arguments)])
        return code, *capfd.readouterr()

    def apart(*arguments: object) -> tuple[int, str, str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "block"), str(ROOT)])}
        command = [sys.executable, "-m", "hwmpq.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return done.returncode, done.stdout, done.stderr

    monkeypatch.chdir(tmp_path)
    if request.param == "all":
        return here
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    return apart


only_all = pytest.mark.parametrize("cli", ["all"], indirect=True)
only_minimal = pytest.mark.parametrize("cli", ["minimal"], indirect=True)


def test_inspect(cli: Run, artifact: Path) -> None:
    code, out, err = cli("inspect", artifact, "--json")
    told = json.loads(out)
    assert code == 0, err
    assert told["kind"] == "hwmpq-artifact" and told["assignment"]["conv2"] == "w8a8"
    code, out, _ = cli("inspect", artifact)
    assert code == 0 and "conv2" in out and "w8a8" in out


def test_run_on_a_file(cli: Run, artifact: Path, tmp_path: Path) -> None:
    entry = read_manifest(artifact)["inputs"][0]
    x = np.random.default_rng(0).standard_normal(entry["shape"]).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", **{entry["name"]: x})
    code, out, err = cli("run", artifact, "--input", "x.npy", "--output", "y.npy", "--json")
    assert code == 0, err
    (output,) = json.loads(out)["outputs"]
    y = np.load(tmp_path / "y.npy", allow_pickle=False)
    assert y.shape == (1, 10) and np.isfinite(y).all()
    code, _, err = cli("run", artifact, "--input", "x.npz", "--output", "y.npz")
    assert code == 0, err
    with np.load(tmp_path / "y.npz", allow_pickle=False) as named:
        assert named.files == [output]
        np.testing.assert_array_equal(named[output], y)


@only_all
def test_run_refuses_bad_input(cli: Run, artifact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.zeros((1, 1, 4, 4), np.float32))
    code, out, _ = cli("run", artifact, "--input", "small.npy", "--output", "y.npy", "--json")
    assert code == 2 and "float32 [1, 1, 4, 4]" in json.loads(out)["error"]["got"]
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    code, out, _ = cli("run", artifact, "--input", "object.npy", "--output", "y.npy", "--json")
    assert code == 2 and "unpickled" in json.loads(out)["error"]["what"]
    code, out, _ = cli("run", artifact, "--input", "none.npy", "--output", "y.txt", "--json")
    assert code == 2 and "NAME.npy" in json.loads(out)["error"]["allowed"]
    assert not (tmp_path / "y.npy").exists()


def test_verify(cli: Run, artifact: Path, tmp_path: Path) -> None:
    shape = read_manifest(artifact)["inputs"][0]["shape"]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, *shape[2:], 1), np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(5))
    code, out, err = cli("verify", artifact, "--data", "npz:d.npz", "--eval", 4, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["parity"]["passed"] and told["parity"]["samples"] == 4
    assert told["accuracy"]["n"] == 4 and 0 <= told["accuracy"]["top1"] <= 100
    assert "Verified" in cli("verify", artifact)[1]


def damaged(artifact: Path, place: Path, honest: bool) -> Path:
    """A copy with other parameters; honest: the manifest agrees with them."""
    shutil.copytree(artifact, place)
    file = place / "parameters.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-40_000:] = bytes(40_000)
    file.write_bytes(raw)
    if honest:
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["files"][file.name] = sha256(file)
        (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def test_verify_finds_other_numbers(cli: Run, artifact: Path, tmp_path: Path) -> None:
    changed = damaged(artifact, tmp_path / "changed", honest=True)
    code, out, _ = cli("verify", changed, "--json")
    told = json.loads(out)
    assert code == 5 and told["status"] == "accuracy" and not told["parity"]["passed"]
    assert told["parity"]["first_difference"]


@pytest.mark.parametrize("command", ["verify", "bench", "inspect"])
@only_minimal
def test_damage_is_found_before_loading(
    cli: Run, artifact: Path, tmp_path: Path, command: str
) -> None:
    changed = damaged(artifact, tmp_path / "changed", honest=False)
    code, out, _ = cli(command, changed, "--json")
    told = json.loads(out)
    assert code == 2 and "parameters.safetensors" in told["error"]["what"]


def test_bench(cli: Run, artifact: Path) -> None:
    code, out, err = cli("bench", artifact, "--rounds", 7, "--sustain", "0.4s", "--json")
    assert code == 0, err
    told = json.loads(out)
    times = told["latency_s"]
    assert set(times) == {"median", "interval", "min", "p90", "samples"}
    assert 0 < times["min"] <= times["median"] <= times["p90"] and times["samples"] >= 6
    low, high = times["interval"]
    assert low <= times["median"] <= high
    assert told["threads"] == 1 and told["target"] and "noisy" in told["quality"]
    assert set(told["start_up_s"]) == {"import_tvm", "load", "first_call"}
    assert min(told["start_up_s"].values()) > 0, told["start_up_s"]
    assert told["batch"] == 1 and told["batches"] == [] and "accuracy" not in told
    first, last = told["sustained"]
    assert first["begin_s"] < 0.2 <= last["begin_s"] and first["latency_s"]["samples"] >= 10
    assert {"begin_s", "latency_s", "temperature_c"} == set(last) and len(err.splitlines()) == 2


@only_all
def test_bench_against(cli: Run, artifact: Path) -> None:
    for runtime in ("torch", "onnxruntime"):
        pytest.importorskip(runtime, reason="the extra `bench` is not installed")
        code, out, err = cli(
            "bench", artifact, "--rounds", 6, "--against", runtime, "zoo:digits_cnn",
            "--data", "digits", "--eval", 30, "--json",
        )  # fmt: skip
        assert code == 0, err
        told = json.loads(out)
        found = told["against"]
        low, high = found["interval"]
        assert min(told["accuracy"]["top1"], found["accuracy"]["top1"]) > 90
        assert found["accuracy"]["n"] == 30 and found["accuracy"]["agreement"] > 95
        assert found["latency_s"]["median"] > 0 and low <= found["ratio"] <= high
        assert found["description"]["precision"] == "fp32"
    code, out, _ = cli("bench", artifact, "--against", "tensorflow", "x", "--json")
    assert code == 2 and "unknown program" in json.loads(out)["error"]["what"]


@only_minimal
def test_minimal_front(cli: Run, artifact: Path) -> None:
    code, out, _ = cli("quantize", "zoo:digits_cnn", "--json")
    error = json.loads(out)["error"]
    assert code == 2 and "quantize" in error["what"] and "pip install hwmpq" in error["next"]
    code, out, err = cli("run", artifact)
    assert (code, out) == (2, "") and "--input" in err
    code, out, _ = cli("--help")
    assert code == 0 and all(name in out for name in ("run", "bench", "verify", "inspect"))


@only_all
def test_compile_refuses_an_unreadable_assignment(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"conv1": 8}')
    code, out, _ = cli("compile", "zoo:digits_cnn", "--assignment", "a.json", "--json")
    assert code == 2 and "{layer: format}" in json.loads(out)["error"]["allowed"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--target", "x86-avx3"], "unknown target"),
        (["--device", "locl"], "unknown device"),
        (["--latency", "fast"], "latency budget"),
        (["--max-time", "soon"], "--max-time"),
        (["--input-shape", "a,b"], "--input-shape"),
    ],
)
def test_quantize_refuses_bad_words(
    capfd: pytest.CaptureFixture[str], change: list[str], words: str
) -> None:
    line = ["quantize", "zoo:digits_cnn", "--data", "digits", *change, "--json"]
    assert hwmpq.cli.main(line) == 2
    told: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert words in told["error"]["what"]


@only_all
def test_target_check_runs_cases(cli: Run) -> None:
    code, out, err = cli("target", "check", "x86-avx2", "--limit", 3, "--json")
    told = json.loads(out)
    assert code == 0, err
    assert told["cases"] == 3 and told["failures"] == []


@only_all
def test_doctor(cli: Run) -> None:
    code, out, _ = cli("doctor", "--json")
    told = json.loads(out)
    named = {check["name"]: check for check in told["checks"]}
    assert set(named) >= {"tvm pair", "target", "store", "kernel", "disk", "extras"}
    assert code == 0 and told["status"] == "met", told
    assert "right numbers" in named["kernel"]["told"] and not named["kernel"]["note"]
    assert named["extras"]["note"] and named["other chips"]["note"]


LAYER = {
    "name": "conv1", "op": "conv2d", "shape": "3x8x8 > 4, 3x3", "macs": 2_000_000, "nbytes": 448,
    "formats": ["fp32", "w8a8"], "why_not": {"w4.g64": "no kernel applies group scales yet"},
}  # fmt: skip
PLAN = {"loss": 0.01, "latency_s": 2e-3, "nbytes": 120.0, "assignment": {"conv1": "w8a8"}}
GRID = {"version": 1, "layers": ["conv1"], "formats": ["fp32", "w8a8"]}


@pytest.mark.parametrize(
    ("line", "function", "answer", "shown"),
    [
        ("inspect m --outputs a,b", "inspect_model", {"layers": [LAYER]}, "no w4.g64 for conv1"),
        ("frontier m", "frontier_model", {"version": 1, "frontier": [PLAN]}, "1×w8a8"),
        ("sensitivity m", "sensitivity_model", GRID | {"loss": [[0.0, 0.25]]}, "0.25"),
        ("profile m", "profile_model", GRID | {"latency_s": [[4e-3, 1e-3]]}, "4.00 ms"),
        ("profile m", "profile_model", {"latency_s": {"conv1": {"fp32": 4e-3}}}, "4.00 ms"),
        ("search m", "search_model", {"status": "optimal", "latency_s": 2e-3}, "2.00 ms"),
        ("compile m --assignment a.json", "compile_model", {"artifact": "x"}, "artifact: x"),
    ],
)
def test_what_the_pipeline_finds_is_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    line: str, function: str, answer: dict[str, Any], shown: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('{"assignment": {"conv1": "w8a8"}}')
    asked: list[Any] = []
    monkeypatch.setattr(f"hwmpq.side_jobs.{function}", lambda *given: asked.append(given) or answer)
    assert hwmpq.cli.main([*line.split(), "--threads", "2"]) == 0
    assert shown in capfd.readouterr().out
    assert asked[0][0].model == "m" and asked[0][0].threads == 2
    assert hwmpq.cli.main([*line.split(), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == answer


def test_search_without_a_plan_is_exit_3(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = InfeasibleError("no plan meets the budgets", "1 ms", "at least 2 ms", "Loosen them.")
    found = {"status": "infeasible", "error": error.to_json()}
    monkeypatch.setattr("hwmpq.side_jobs.search_model", lambda *_: found)
    assert hwmpq.cli.main(["search", "m", "--json"]) == 3
    assert f"error: {error}\n" in capfd.readouterr().err


def test_the_table_of_quantize(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hwmpq.pipeline import LayerRow, Options, Result

    asked: list[Options] = []
    row = LayerRow(
        "conv1", "conv2d", "", "w8a8", "conv2d.fast", "native", 0.01, 1e-5, {"fp32": 4e-5}, {}
    )
    told = {
        "version": 1, "status": "missed", "ambiguous": False,
        "latency_s": {"budget": 1e-3, "measured": 2e-3, "measured_interval": [1.9e-3, 2.1e-3]},
        "baselines": {"fp32": {"latency_s": 4e-3, "accuracy": 98.0, "nbytes": 1e6}},
        "accuracy": {"metric": "top1", "deployed": 97.5, "float": 98.0, "drop": 0.5, "n": 10},
    }  # fmt: skip

    def fake(options: Options, progress: Any) -> Result:
        asked.append(options)
        with progress.stage("work", 3) as advance:
            advance(3)
        return Result(told, [row], [PLAN], 4, None)

    monkeypatch.setattr("hwmpq.pipeline.quantize_model", fake)
    line = "quantize m --pin a=fp32,b=w8a8|bf16 --pin c=fp32 --tie x* --formats fp32,w8a8"
    line += " --max-time 2m --seed 7 --input-shape 1,3,8,8"
    assert hwmpq.cli.main(line.split()) == 4
    out, err = capfd.readouterr()
    for word in ("conv2d.fast", "10.0 µs", "40.0 µs", "4.00 ms", "Missed: 2.00 ms", "Σ 0.01"):
        assert word in out, word
    assert "work" in err
    (given,) = asked
    assert given.pins == ("a=fp32", "b=w8a8|bf16", "c=fp32") and given.ties == ("x*",)
    assert given.formats == ("fp32", "w8a8") and given.seed == 7
    assert given.max_time == 120 and given.input_shape == (1, 3, 8, 8)
    assert given.calib == 256 and given.metric == Options("m").metric
