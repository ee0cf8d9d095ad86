"""The command line without tvm or torch: help, JSON, exit codes, options, solve, listings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hwmpq.cli
from hwmpq import targets
from hwmpq.cli import durations, options, output
from hwmpq.cli.output import Answer, perform
from hwmpq.errors import DeviceError, InfeasibleError, InputError, InternalError

COMMANDS = [
    *("quantize", "frontier", "inspect", "sensitivity", "profile", "search", "solve", "compile"),
    "export",
    "finetune",
    *("run", "bench", "verify", "targets", "doctor", "report"),
    *("devices", "devices setup", "devices serve", "devices tracker"),
    *(
        "target probe",
        "target check",
        "target evaluate",
        "cost-model sample",
        "cost-model train",
        "cost-model eval",
        "cost-model predict",
    ),
    *("store ls", "store path", "store export", "store import", "store prune"),
    *("store merge", "store remove"),
    *("store compare", "artifact keygen", "artifact sign"),
]
PROBLEM = {
    "version": 1,
    "layers": ["a", "b"],
    "formats": ["fp32", "w8a8"],
    "loss": [[0.0, 1.0], [0.0, 3.0]],
    "latency_s": [[4e-3, 1e-3], [4e-3, 1e-3]],
    "budgets": {"latency_s": 5e-3},
}


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = hwmpq.cli.main([str(a) for a in arguments])
        told = capfd.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(PROBLEM))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(cli: Any, command: str) -> None:
    code, out, _ = cli(*command.split(), "--help")
    assert code == 0
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", out).split())
    assert f"Example: hwmpq {command}" in text
    assert "--json" in text and "--seed" in text


def test_no_command_is_left_out() -> None:
    def below(group: Any, prefix: str) -> list[str]:
        found = []
        for name, command in group.commands.items():
            path = f"{prefix}{name}"
            deeper = below(command, f"{path} ") if hasattr(command, "commands") else []
            found += deeper + [path] * (not deeper or command.invoke_without_command)
        return found

    import typer

    from hwmpq.cli.app import app

    assert sorted(below(typer.main.get_command(app), "")) == sorted(COMMANDS)


#: Arguments that a command refuses while it works, where it has any that it can refuse.
REFUSED = {
    **dict.fromkeys(("quantize", "frontier", "sensitivity", "profile", "search"),
                    "zoo:none --max-time soon"),
    "inspect": "zoo:none --input-shape x", "solve": "none.json", "report": "none",
    "compile": "zoo:none --assignment none.json", "bench": "none", "verify": "none",
    "run": "none --input none.npy --output out.npy",
    **dict.fromkeys(("target probe", "target check", "target evaluate"), "none"),
    **dict.fromkeys(("cost-model train", "cost-model eval"), "--target none"),
    "cost-model predict": "zoo:none --target none", "store compare": "none-a none-b",
    "store import": "none.jsonl", "store export": "a.jsonl --store none/none",
    **dict.fromkeys(("store ls", "store prune"), "--store none/none"),
    "artifact keygen": "none", "artifact sign": "none --key none",
    "store merge": "a.sqlite none-b", "store remove": "x --store none/none",
    "devices serve": "--key k --host 0.0.0.0", "devices tracker": "--host 0.0.0.0",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["usage", "work"])
def test_a_failure_is_exactly_one_json_object(
    cli: Any, command: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").write_text("a file where a folder is wanted")
    given = REFUSED.get(command, "--seed one") if how == "work" else "--no-such-option"
    code, out, err = cli(*command.split(), *given.split(), "--json")
    told = json.loads(out)
    assert code in (2, 7) and out.count("\n") == 1
    assert (told["version"], told["status"]) == (1, "error")
    assert set(told["error"]) == {"code", "what", "got", "allowed", "next"}
    assert told["error"]["what"] and err.startswith("error: ") and "Traceback" not in err


def test_help_lists_every_command_and_is_quick() -> None:
    began = time.perf_counter()
    code = "import sys; sys.argv = ['hwmpq', '--help']; from hwmpq.cli import main; main()\n"
    code += "print(*sorted({'torch', 'tvm', 'numpy', 'xgboost', 'ortools'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.perf_counter() - began < 5.0  # a bound for a crowded machine; alone it is 0.3 s
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command.split()[0] in done.stdout
    assert done.stdout.splitlines()[-1] == "", "something heavy was imported"


def test_version(cli: Any) -> None:
    code, out, _ = cli("--version")
    assert code == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quantise x --json", ["No such command", "quantize"]),
        ("solve --json", ["Missing argument"]),
        ("solve x --jsson --json", ["No such option", "--json"]),
        ("solve x --time-limit soon --json", ["time-limit", "number"]),
        ("store ll --json", ["No such command"]),
    ],
)
def test_usage_errors_are_one_json_object(cli: Any, line: str, words: list[str]) -> None:
    code, out, _ = cli(*line.split())
    told = json.loads(out)
    assert code == 2
    assert (told["version"], told["status"]) == (1, "error")
    assert set(told["error"]) == {"code", "what", "got", "allowed", "next"}
    for word in words:
        assert word in told["error"]["what"]
    assert "--help" in told["error"]["next"]
    assert ("quantize" in (told["error"]["allowed"] or [])) == line.startswith("quantise")


def test_usage_errors_for_people_leave_stdout_empty(cli: Any) -> None:
    code, out, err = cli("solve")
    assert (code, out) == (2, "")
    assert "Missing argument" in err and "hwmpq solve --help" in err


def test_nothing_asked_shows_help(cli: Any) -> None:
    code, out, err = cli()
    assert code == 2 and "quantize" in out + err


@pytest.mark.parametrize(
    ("error", "exit_code", "status", "code"),
    [
        (InputError("bad thing", 3, "4", "Do that."), 2, "error", "error"),
        (InfeasibleError("no plan", "1 ms", "2 ms"), 3, "infeasible", "infeasible"),
        (DeviceError("gone"), 7, "error", "device"),
        (InternalError("broken promise"), 70, "error", "internal"),
        (ZeroDivisionError("x / 0"), 70, "error", "internal"),
        (KeyboardInterrupt(), 130, "error", "interrupted"),
    ],
)
def test_every_failure_has_its_exit_code(
    capfd: pytest.CaptureFixture[str], error: BaseException, exit_code: int, status: str, code: str
) -> None:
    def body() -> Answer:
        raise error

    assert perform(body, as_json=True) == exit_code
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert (told["status"], told["error"]["code"]) == (status, code)
    assert "Traceback" not in err
    assert perform(body, as_json=False) == exit_code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error:")


def test_ctrl_c_says_how_to_go_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["hwmpq", "quantize", "zoo:m", "--pin", "fc=fp32|bf16"])
    assert perform(body, as_json=False) == 130
    assert "to go on: hwmpq quantize zoo:m --pin 'fc=fp32|bf16'" in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["hwmpq", "profile", "zoo:m", "--fresh"])
    assert perform(body, as_json=False) == 130
    assert "(with --fresh it begins anew): hwmpq profile zoo:m\n" in capfd.readouterr().err


def test_completion_of_a_word() -> None:
    """What the shell asks once `hwmpq --install-completion` was run."""
    done = subprocess.run(
        [sys.executable, "-m", "hwmpq.cli"], capture_output=True, text=True,
        env={**os.environ, "_HWMPQ_COMPLETE": "complete_bash", "COMP_WORDS": "hwmpq qu",
             "COMP_CWORD": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["quantize"], done.stderr


def test_traceback_only_when_asked(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HWMPQ_DEBUG", "1")
    assert perform(lambda: Answer({"x": 1 // 0}), as_json=True) == 70
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_workers_traceback_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> Answer:
        raise DeviceError("time failed", "x", next="Traceback (most recent call last):\n  secret")

    assert perform(body, as_json=True) == 7
    out, err = capfd.readouterr()
    assert "secret" not in out + err and "HWMPQ_DEBUG=1" in json.loads(out)["error"]["next"]
    monkeypatch.setenv("HWMPQ_DEBUG", "1")
    assert perform(body, as_json=True) == 7
    assert "secret" in capfd.readouterr().err


def test_what_libraries_print_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> Answer:
        import ctypes
        import os

        print("python noise")
        os.write(1, b"descriptor noise\n")
        ctypes.CDLL(None).puts(b"C noise")
        return Answer({"a": float("nan"), "b": {1, 2}, "c": Path("x")})

    assert perform(body, as_json=True) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": None, "b": [1, 2], "c": "x"}
    assert err.count("noise") == 3
    print("stdout is itself again")
    assert "itself" in capfd.readouterr().out


def test_plain_makes_json_of_arrays() -> None:
    import numpy as np

    given = {"x": np.float32(0.5), "y": np.array([[1, 2]]), "z": (np.int64(3), None), 4: True}
    assert output.plain(given) == {"x": 0.5, "y": [[1, 2]], "z": [3, None], "4": True}


def test_solve_answers_with_the_contracts_keys(cli: Any, problem: Path) -> None:
    code, out, _ = cli("solve", problem, "--json")
    told = json.loads(out)
    assert code == 0 and told["status"] == "optimal"
    assert told["choice"] == {"a": "w8a8", "b": "fp32"}
    assert told["latency_s"] == pytest.approx(5e-3)
    keys = "status choice objective raw_objective bound gap latency_s nbytes bops seconds"
    assert set(told) == set(keys.split())
    code, out, _ = cli("solve", problem, "--search", "exhaustive")
    assert code == 0 and "optimal" in out and "b  fp32" in out


def test_solve_explains(cli: Any, problem: Path, tmp_path: Path) -> None:
    told = json.loads(cli("solve", problem, "--explain", "--json")[1])
    assert told["prices"]["latency_s"]["more"] == 0 and told["prices"]["latency_s"]["less"] > 0
    step = told["layers"]["b"]["down"]
    assert step["fmt"] == "w8a8" and step["cost"] == pytest.approx(2.0) and step["changed"] == ["a"]
    text = cli("solve", problem, "--explain")[1]
    assert "w8a8: all else solved again: +2, with a changed" in text
    assert "price of latency_s: one ms more saves 0, less costs" in text
    tight = tmp_path / "tight.json"
    tight.write_text(json.dumps(PROBLEM | {"budgets": {"latency_s": 1e-3}}))
    code, out, _ = cli("solve", tight, "--explain")
    assert code == 3 and "cannot be met: latency_s" in out
    assert "enough alone: latency_s raised to 2.00 ms" in " ".join(out.split())


def test_solve_for_several_devices(cli: Any, problem: Path, tmp_path: Path) -> None:
    other = tmp_path / "board.json"
    slow = {"latency_s": [[2e-3, 1e-3], [9e-3, 1e-3]], "budgets": {"latency_s": 4e-3}}
    other.write_text(json.dumps(PROBLEM | slow))
    code, out, _ = cli("solve", problem, other, "--json")
    told = json.loads(out)
    assert code == 0 and told["choice"] == {"a": "fp32", "b": "w8a8"}
    assert told["devices"] == {"problem": pytest.approx(5e-3), "board": pytest.approx(3e-3)}
    assert "latency_s on board: 0.003" in cli("solve", problem, other)[1]
    assert cli("solve", problem, problem)[0] == 2
    assert "ilp solves them" in cli("solve", problem, other, "--explain")[2]


def test_solve_infeasible_names_the_least(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PROBLEM | {"budgets": {"latency_s": 1e-3}}))
    code, out, err = cli("solve", path, "--json")
    told = json.loads(out)
    assert code == 3 and told["status"] == "infeasible"
    assert told["least"]["latency_s"] == pytest.approx(2e-3)
    assert "0.002" in err


def test_unknown_names_come_with_the_nearest(cli: Any, problem: Path) -> None:
    code, out, _ = cli("solve", problem, "--search", "ilpp", "--json")
    error = json.loads(out)["error"]
    assert code == 2 and "ilp" in error["allowed"] and "Nearest: ilp" in error["next"]
    code, out, _ = cli("target", "probe", "x86-avx3", "--json")
    assert code == 2 and "x86-avx2" in json.loads(out)["error"]["next"]


def test_solve_refuses_a_missing_file(cli: Any, tmp_path: Path) -> None:
    code, out, _ = cli("solve", tmp_path / "none.json", "--json")
    assert code == 2 and "none.json" in json.loads(out)["error"]["got"]


def test_targets_lists_all(cli: Any) -> None:
    code, out, _ = cli("targets", "--json")
    told = json.loads(out)
    assert code == 0 and [row["name"] for row in told["targets"]] == targets.names()
    for row in told["targets"]:
        assert row["runs_here"] == (not row["missing"])
    code, out, _ = cli("targets")
    assert code == 0 and all(name in out for name in targets.names())


def test_devices_shows_this_machine(cli: Any) -> None:
    code, out, _ = cli("devices", "--json")
    told = json.loads(out)
    assert code == 0 and told["here"]["cores"] >= 1
    assert "local" in [row["name"] for row in told["devices"]]
    assert "local" in cli("devices")[1]


def test_target_probe(cli: Any) -> None:
    code, out, _ = cli("target", "probe", "x86-avx2", "--json")
    told = json.loads(out)
    assert code == 0 and told["target"] == "x86-avx2" and "fp32" in told["formats"]


def test_store_commands(cli: Any, tmp_path: Path) -> None:
    from hwmpq.measure.store import Store
    from hwmpq.types import Measurement, Workload

    place = tmp_path / "a.sqlite"
    workload = Workload.make("linear", m=1, k=2, n=3)
    with Store.open(place) as store:
        for seconds in (1e-3, 2e-3):
            store.put(Measurement("k", workload, "fp32", "x", 1, (seconds,)), "t", "machine")
        store.put(Measurement("bad", workload, "w8a8", "x", 1, error="crashed"), "t", "machine")
    assert json.loads(cli("store", "path", "--store", place, "--json")[1])["store"] == str(place)
    told = json.loads(cli("store", "ls", "--store", place, "--json")[1])
    (group,) = told["groups"]
    assert (group["cells"], group["failed"], group["target"]) == (2, 1, "t")
    assert "machine" in cli("store", "ls", "--store", place)[1]
    file = tmp_path / "all.jsonl"
    assert json.loads(cli("store", "export", file, "--store", place, "--json")[1])["rows"] == 3
    other = tmp_path / "b.sqlite"
    assert json.loads(cli("store", "import", file, "--store", other, "--json")[1])["rows"] == 3
    assert json.loads(cli("store", "import", file, "--store", other, "--json")[1])["rows"] == 0
    told = json.loads(cli("store", "prune", "--store", place, "--json")[1])
    assert told["dropped"] == {"replaced by a newer row": 1} and not told["done"]
    told = json.loads(cli("store", "prune", "--yes", "--failed", "--store", place, "--json")[1])
    assert told["done"] and told["dropped"] == {"replaced by a newer row": 1, "failed": 1}
    with Store.open(place) as store:
        (left,) = store.measurements()
        assert left.latency_s == 2e-3
    back = cli("store", "import", told["backup"], "--store", place, "--json")
    assert json.loads(back[1])["rows"] == 2
    assert json.loads(cli("store", "merge", place, other, "--json")[1])["rows"] == 0
    assert cli("store", "merge", place, tmp_path / "none.sqlite")[0] == 2
    with Store.open(other) as store:
        store.put(Measurement("i", workload, "fp32", "x", 1, (1.0,)), "t", "m", origin="board")
    for line, done, code in ((), False, 0), (("--yes",), True, 0), ((), False, 2):
        found = cli("store", "remove", "board", *line, "--store", other, "--json")
        assert found[0] == code
        if code == 0:
            told = json.loads(found[1])
            assert (told["measurements"], told["facts"], told["done"]) == (1, 0, done)
    assert cli("store", "import", tmp_path / "none.jsonl", "--json")[0] == 2


def test_lost_store_is_exit_7(cli: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"no database, whatever one may think" * 100)
    code, out, _ = cli("store", "ls", "--store", broken, "--json")
    assert code == 7 and json.loads(out)["error"]["code"] == "store"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("10m", 600), ("2 h", 7200), (None, None)]
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert durations.duration(text, "--sustain") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3", "0", "5 days"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InputError, match=r"--sustain: got .*a time such as"):
        durations.duration(text, "--sustain")


def test_shapes_and_words() -> None:
    assert options.shape("1,3,224,224") == (1, 3, 224, 224)
    assert options.shape("1x3x8x8") == (1, 3, 8, 8)
    assert options.words("fp32, w8a8,,bf16") == ["fp32", "w8a8", "bf16"]
    with pytest.raises(InputError, match="--input-shape"):
        options.shape("1,3,-1")


def test_report_command_refuses_other_files(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("[1]")
    assert cli("report", tmp_path, "--json")[0] == 2
    assert cli("report", tmp_path / "no.json", "--json")[0] == 2
    (tmp_path / "result.json").write_text('{"version": 1, "status": "met"}')
    code, out, _ = cli("report", tmp_path, "--out", tmp_path / "x.pdf", "--json")
    assert code == 2 and "NAME.html" in json.loads(out)["error"]["allowed"]
    assert cli("report", tmp_path, "--to", "md", "--out", tmp_path / "x.html", "--json")[0] == 2
    assert cli("report", tmp_path, "--to", "pdf", "--json")[0] == 2
    assert cli("report", tmp_path, "--out", tmp_path / "x.md", "--json")[0] == 0
    assert cli("report", tmp_path, "--to", "json", "--anonymize", "--json")[0] == 0
    assert json.loads((tmp_path / "report.json").read_text())["verdict"].startswith("Met")
